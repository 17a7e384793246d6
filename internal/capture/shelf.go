package capture

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

// shelf is where a cache keeps its spaces, so that they need not be in memory: a file that is only appended
// to, or memory where there is no file. What lies on it is never changed, so that the caches of several passes
// can share it. It is for concurrent use.
type shelf struct {
	base string // the file's name begins so; "": memory

	mu   sync.Mutex
	f    *os.File
	size int64 // bytes that were put, or that the index knew of
	mem  map[int64][]byte
}

// slot is one space on a shelf.
type slot struct {
	on   *shelf
	off  int64
	len  int64
	sum  id.ID
	live bool // see cachedSpace
}

// put appends p, whose hash is sum.
func (s *shelf) put(p []byte, sum id.ID) (slot, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.f == nil && s.base != "" {
		if err := s.create(); err != nil {
			return slot{}, err
		}
	}
	at := slot{on: s, off: s.size, len: int64(len(p)), sum: sum}
	if s.f == nil {
		if s.mem == nil {
			s.mem = map[int64][]byte{}
		}
		s.mem[at.off] = p
	} else if _, err := s.f.WriteAt(p, at.off); err != nil {
		return slot{}, err
	}
	s.size += at.len
	return at, nil
}

// create makes the file and locks it: who holds the lock appends, and others leave the file alone.
func (s *shelf) create() error {
	if err := os.MkdirAll(filepath.Dir(s.base), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(s.base), filepath.Base(s.base)+"*")
	if err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		_ = os.Remove(f.Name())
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	s.f = f
	return nil
}

// get returns what was put; it must not be changed. It reports whether it is still what it was.
func (t *slot) get() ([]byte, bool) {
	s := t.on
	s.mu.Lock()
	f, p := s.f, s.mem[t.off]
	s.mu.Unlock()
	if f != nil {
		st, err := f.Stat()
		if err != nil || t.off < 0 || t.len < 0 || t.off > st.Size()-t.len { // before so much is allocated
			return nil, false
		}
		p = make([]byte, t.len)
		if _, err := f.ReadAt(p, t.off); err != nil && err != io.EOF {
			return nil, false
		}
	}
	return p, int64(len(p)) == t.len && id.Hash(p) == t.sum
}

// name is the last part of the file's path; "" if there is no file.
func (s *shelf) name() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.f == nil {
		return ""
	}
	return filepath.Base(s.f.Name())
}

// used is how much was put.
func (s *shelf) used() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.size
}

// shelfSuffix stands between the path of a cache and what makes the name of its shelf unique.
const shelfSuffix = ".spaces-"

// openShelf opens the shelf that the index of the cache at path names, of which it knows the first size
// bytes. put appends to it, or to another one if somebody else does that now.
func openShelf(path, name string, size int64) (get, put *shelf) {
	sweepShelves(path, name)
	put = &shelf{base: path + shelfSuffix}
	if name == "" || filepath.Base(name) != name {
		return put, put
	}
	p := filepath.Join(filepath.Dir(path), name)
	f, err := os.OpenFile(p, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return put, put // it knows nothing: everything is looked at
	}
	get = &shelf{base: path + shelfSuffix, f: f, size: size}
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		put = get
	}
	return get, put
}

// close gives the file up. If no index names it, the next run removes it.
func (s *shelf) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.f != nil {
		_ = s.f.Close()
		s.f = nil
	}
	s.mem = nil
}

// sweepShelves removes the shelves of the cache at path that nobody uses but the one called keep: of
// interrupted runs, and those that were copied to a smaller one.
func sweepShelves(path, keep string) {
	all, _ := filepath.Glob(globEscape(path) + shelfSuffix + "*")
	for _, p := range all {
		if filepath.Base(p) == keep {
			continue
		}
		f, err := os.OpenFile(p, os.O_RDWR|unix.O_NOFOLLOW, 0)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			_ = os.Remove(p) // what is left costs space and nothing else
		}
		_ = f.Close()
	}
}

// globEscape quotes what filepath.Glob would take for a pattern.
func globEscape(p string) string {
	var b []byte
	for i := range len(p) {
		switch p[i] {
		case '*', '?', '[', '\\':
			b = append(b, '\\')
		}
		b = append(b, p[i])
	}
	return string(b)
}
