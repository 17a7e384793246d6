package live

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/cloud"
)

// session is what is remembered of an unfinished upload: its address at the server, in a file that only
// its owner can read, because the address is also the right to it.
type session struct{ file string }

// sessionAge is how long the server keeps an unfinished upload by default.
const sessionAge = 24 * time.Hour

const sessionEnding = ".upload"

// openSession names the file by all that must be the same for an upload to go on.
func openSession(dir, host, drive, at string, f *cloud.File) session {
	if dir == "" {
		return session{}
	}
	key := fmt.Sprintf("%q %q %q %d %s %d", host, drive, at, f.Size, f.SHA1, f.ModTime.UnixNano())
	sum := sha256.Sum256([]byte(key))
	return session{filepath.Join(dir, hex.EncodeToString(sum[:16])+sessionEnding)}
}

// load returns the address, or "".
func (s session) load() string {
	if s.file == "" {
		return ""
	}
	p, err := os.ReadFile(s.file)
	if err != nil {
		return "" // the upload begins anew, and save tells about the file
	}
	return strings.TrimSpace(string(p))
}

func (s session) save(at string) error {
	if s.file == "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(s.file), 0o700); err != nil {
		return &sourceError{fmt.Errorf("cannot remember an upload: %w", err)}
	}
	// A torn file would only cost the session.
	tmp := s.file + ".new"
	err := os.WriteFile(tmp, []byte(at+"\n"), 0o600)
	if err == nil {
		err = os.Rename(tmp, s.file)
	}
	if err != nil {
		return &sourceError{fmt.Errorf("cannot remember an upload: %w", err)}
	}
	return nil
}

func (s session) remove() {
	if s.file != "" {
		_ = os.Remove(s.file) // a stale one is removed by age
	}
}

// pruneSessions removes what the server has forgotten by now.
func pruneSessions(dir string) error {
	list, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot look for unfinished uploads: %w", err)
	}
	for _, d := range list {
		st, err := d.Info()
		if err != nil || !st.Mode().IsRegular() || !strings.Contains(d.Name(), sessionEnding) {
			continue
		}
		if time.Since(st.ModTime()) > sessionAge {
			_ = os.Remove(filepath.Join(dir, d.Name()))
		}
	}
	return nil
}
