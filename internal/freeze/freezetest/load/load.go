// Package load is the load on a server of the tests, and its witness: the server changes a generated
// instance without a pause, one change after the other, and acknowledges each in a journal that lies
// elsewhere. The journal tells afterwards what a snapshot must hold: what was acknowledged before the
// stop, and nothing that came after it.
package load

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/storegen"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// store is the storage that is changed, relative to the base data path.
const store = "storage/users"

// The marks of a journal.
const (
	Started = "started"
	Stopped = "stopped"
)

// Entry is a line of a journal: a mark, or one acknowledged change.
type Entry struct {
	At   time.Time `json:"at"`
	Mark string    `json:"mark,omitempty"`
	// Paths has what lies at each path that was touched, as State says it, relative to the base data
	// path.
	Paths map[string]string `json:"paths,omitempty"`
}

// State says what lies at a path: mode, time, content, and attributes; "" for nothing.
func State(path string) (string, error) {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	content := ""
	switch {
	case st.Mode().IsRegular():
		f, err := os.Open(path)
		if err != nil {
			return "", err
		}
		defer f.Close()
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil {
			return "", err
		}
		content = fmt.Sprintf("%d bytes %s", st.Size(), hex.EncodeToString(h.Sum(nil)))
	case st.Mode()&fs.ModeSymlink != 0:
		if content, err = os.Readlink(path); err != nil {
			return "", err
		}
	}
	attrs, err := attributes(path)
	return fmt.Sprintf("%s %d %s%s", st.Mode(), st.ModTime().UnixNano(), content, attrs), err
}

// attributes is a checksum of the extended attributes that a user can set, "" if there are none.
func attributes(path string) (string, error) {
	x, err := testfixture.Xattrs(path)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	n := 0
	for _, name := range slices.Sorted(maps.Keys(x)) {
		if strings.HasPrefix(name, "user.") {
			fmt.Fprintf(h, "%q=%q\n", name, x[name])
			n++
		}
	}
	if n == 0 {
		return "", nil
	}
	return fmt.Sprintf(" %d attributes %x", n, h.Sum(nil)[:8]), nil
}

// Tree is the State of everything below the base data path.
func Tree(base string) (map[string]string, error) {
	tree := map[string]string{}
	err := filepath.WalkDir(base, func(p string, _ fs.DirEntry, err error) error {
		if err != nil || p == base {
			return err
		}
		rel, err := filepath.Rel(base, p)
		if err == nil {
			tree[rel], err = State(p)
		}
		return err
	})
	return tree, err
}

// Journal is a journal that is being written.
type Journal struct{ f *os.File }

// Open opens the journal, or makes it.
func Open(file string) (*Journal, error) {
	f, err := os.OpenFile(file, os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o644)
	return &Journal{f}, err
}

// Mark writes a mark.
func (j *Journal) Mark(mark string) error { return j.write(Entry{Mark: mark}) }

// Change makes one change to the instance in dir, with the base data path dir/data, and acknowledges it.
// The instance was generated, or is one of the posix driver.
func (j *Journal) Change(dir string) error {
	touched := map[string]string{}
	note := func(p string) {
		// With the folders that may be made on the way to it.
		for p = path.Join(store, p); p != store; p = path.Dir(p) {
			touched[p] = ""
		}
	}
	var err error
	if base := filepath.Join(dir, "data"); isPosix(base) {
		err = changePosix(base, note)
	} else {
		_, err = storegen.MutateNoting(context.Background(), dir, 1, 0.000001, note)
	}
	if err != nil {
		return err
	}
	for p := range touched {
		if touched[p], err = State(filepath.Join(dir, "data", p)); err != nil {
			return err
		}
	}
	return j.write(Entry{Paths: touched})
}

func (j *Journal) write(e Entry) error {
	e.At = time.Now()
	text, err := json.Marshal(e)
	if err == nil {
		_, err = j.f.Write(append(text, '\n'))
	}
	if err == nil {
		err = j.f.Sync()
	}
	return err
}

// Read reads a journal. A line at the end that is not complete was not acknowledged.
func Read(file string) ([]Entry, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var list []Entry
	for r := bufio.NewReader(f); ; {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return list, nil
		}
		var e Entry
		if err == nil {
			err = json.Unmarshal(line, &e)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		list = append(list, e)
	}
}

// At is the tree after all changes up to the nth stop, made of the tree at the beginning. It tells how
// many changes were acknowledged before that stop, and how many after it.
//
// Errors: the server has not stopped that often.
func At(begin map[string]string, list []Entry, nth int) (tree map[string]string, before, after int, err error) {
	tree = maps.Clone(begin)
	for _, e := range list {
		switch {
		case e.Mark == Stopped:
			nth--
		case e.Mark == "" && nth > 0:
			before++
			for p, state := range e.Paths {
				tree[p] = state
				if state == "" {
					delete(tree, p)
				}
			}
		case e.Mark == "":
			after++
		}
	}
	if nth > 0 {
		err = errors.New("the server did not stop that often")
	}
	return tree, before, after, err
}

// Diff lists the first differences of two trees.
func Diff(want, got map[string]string) string {
	var b strings.Builder
	n := 0
	line := func(p, w, g string) {
		if n++; n <= 10 {
			fmt.Fprintf(&b, "%s: want %q, got %q\n", p, w, g)
		}
	}
	for p, w := range want {
		if g := got[p]; g != w {
			line(p, w, g)
		}
	}
	for p, g := range got {
		if _, ok := want[p]; !ok {
			line(p, "", g)
		}
	}
	if n > 10 {
		fmt.Fprintf(&b, "and %d more\n", n-10)
	}
	return b.String()
}
