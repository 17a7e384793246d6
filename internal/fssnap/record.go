package fssnap

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// recordVersion is the version of the record on disk. A record of another version is left alone.
const recordVersion = 1

// record says which views a set has or is about to make. It is on disk before the first view is.
type record struct {
	Version int       `json:"version"`
	Name    string    `json:"name"`
	Label   string    `json:"label,omitempty"`
	MadeAt  time.Time `json:"made_at"`
	PID     int       `json:"pid"` // for people; the lock tells whether the owner lives
	Kept    bool      `json:"kept,omitempty"`
	Parts   []part    `json:"parts"`
	Sources []Source  `json:"sources"`
	Views   []View    `json:"views"` // empty until all are made; in the order of Sources
}

// recordFiles names the files of one set.
type recordFiles struct{ dir, name string }

func (f recordFiles) record() string { return filepath.Join(f.dir, f.name+".json") }
func (f recordFiles) lock() string   { return filepath.Join(f.dir, f.name+".lock") }

// openRecords makes the directory.
func openRecords(stateDir, name string) (recordFiles, error) {
	dir, err := viewsState(stateDir)
	if err == nil {
		err = os.MkdirAll(dir, 0o700)
	}
	if err != nil {
		return recordFiles{}, fmt.Errorf("the state directory cannot be used, so no views are made: %w; set XDG_STATE_HOME to a place that can be written to", err)
	}
	return recordFiles{dir, name}, nil
}

var errLocked = errors.New("locked by a process that lives")

// acquire takes the lock that tells others that the owner of the set lives. The kernel gives it back
// however the owner ends; numbers of processes would mean nothing in another container.
//
// Errors: errLocked.
func (f recordFiles) acquire() (*os.File, error) {
	l, err := os.OpenFile(f.lock(), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(l.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		l.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errLocked
		}
		return nil, fmt.Errorf("lock %s: %w; the state directory must be on a filesystem with locks", f.lock(), err)
	}
	return l, nil
}

// live tells whether the owner of the set lives.
func (f recordFiles) live() bool {
	if _, err := os.Lstat(f.lock()); err != nil {
		return false
	}
	l, err := f.acquire()
	if err != nil {
		return errors.Is(err, errLocked)
	}
	l.Close()
	return false
}

// write puts the record on disk for good, or leaves what was there.
func (f recordFiles) write(r record) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(f.dir, f.name+".*.tmp") // mode 0600
	if err != nil {
		return err
	}
	_, err = tmp.Write(append(data, '\n'))
	if err == nil {
		err = tmp.Sync()
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), f.record())
	}
	if err != nil {
		_ = os.Remove(tmp.Name())
		return err
	}
	return f.sync()
}

func (f recordFiles) read() (record, error) {
	data, err := os.ReadFile(f.record())
	if err != nil {
		return record{}, err
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return record{}, fmt.Errorf("the record %s cannot be read: %w; if no backup is running, remove the views by hand and then this file", f.record(), err)
	}
	if r.Version != recordVersion || r.Name != f.name {
		return record{}, fmt.Errorf("the record %s is of version %d, which this holdfast does not know; use the version that made it", f.record(), r.Version)
	}
	return r, nil
}

// remove takes the record away, and the lock file last.
func (f recordFiles) remove() error {
	var errs []error
	for _, p := range []string{f.record(), f.lock()} {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if tmp, err := filepath.Glob(filepath.Join(f.dir, f.name+".*.tmp")); err == nil {
		for _, p := range tmp {
			_ = os.Remove(p)
		}
	}
	return errors.Join(append(errs, f.sync())...)
}

func (f recordFiles) sync() error {
	d, err := os.Open(f.dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// listRecords returns the files of all sets on record, the oldest first.
func listRecords(stateDir string) ([]recordFiles, error) {
	dir, err := viewsState(stateDir)
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for views on record: %w", err)
	}
	var list []recordFiles
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			// A lock without a record is of a run that was killed before it made any view.
			name, ok = strings.CutSuffix(e.Name(), ".lock")
		}
		f := recordFiles{dir, name}
		if _, valid := ParseName(name); ok && valid && !slices.Contains(list, f) {
			list = append(list, f)
		}
	}
	return list, nil
}
