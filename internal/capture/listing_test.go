package capture

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestListing writes the entries of a walk down and reads them back, directory by directory.
func TestListing(t *testing.T) {
	dir := t.TempDir()
	for _, p := range []string{"a/b/c/-1", "a/b/c/-1.mpk", "a/b/d/-2", "b", "b\xff\n", "c/x", "c/y"} {
		p = filepath.Join(dir, p)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(p), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{
		os.Symlink("a", filepath.Join(dir, "c/link")),
		os.Link(filepath.Join(dir, "b"), filepath.Join(dir, "c/b")),
		unix.Mkfifo(filepath.Join(dir, "c/fifo"), 0o600),
		os.Truncate(filepath.Join(dir, "c/x"), 1<<20),
		os.Chtimes(filepath.Join(dir, "c/y"), time.Unix(-5, 7), time.Unix(-5, 7)),
		os.Chtimes(filepath.Join(dir, "b"), time.Unix(1<<40, 0), time.Unix(1<<33, 0)), // later than nanoseconds can tell
		os.Mkdir(filepath.Join(dir, "empty"), 0o700),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	r, err := openRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	c := &capturer{started: time.Now().Add(time.Hour)}
	w := c.newListingWriter(nil)
	var want []string
	sc := &scanner{r: r, workers: 2, ahead: 1 << 16, unreadable: func(rel string, err error) { t.Error(rel, err) }, record: w}
	if err := sc.walk(t.Context(), "", func(e *entry) error {
		if e.path != "" {
			want = append(want, describe(e, e.path))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	p := w.finish(7)
	if readListing(p, 8) != nil {
		t.Error("a listing was read under other rules")
	}
	l := readListing(p, 7)
	if l == nil {
		t.Fatal("the listing cannot be read")
	}
	var got []string
	var read func(prefix string, kids []byte)
	read = func(prefix string, kids []byte) {
		if !l.each(kids, func(o *oldEntry) bool {
			p := prefix + o.entry.path
			e := o.entry
			if o.flags&listedKind == listedOther {
				st, err := r.stat(p)
				if err != nil {
					t.Fatal(err)
				}
				if st.nlink < 2 && st.isRegular() && st.mtime.sec < 1<<32 {
					t.Errorf("%q: only its name is there", p)
				}
				e = st
			}
			got = append(got, describe(&e, p))
			if o.isDir() {
				read(p+"/", o.kids)
			}
			return true
		}) {
			t.Errorf("%q cannot be read", prefix)
		}
	}
	read("", l.top.kids)
	if !slices.Equal(got, want) {
		t.Errorf("read back:\n%q\nwant:\n%q", got, want)
	}
}

func describe(e *entry, path string) string {
	size := e.size
	if e.isDir() {
		size = 0
	}
	return fmt.Sprint(path, " ", e.mode, e.uid, e.gid, " ", size, e.sparse(), e.mtime, e.ctime)
}

// FuzzListing: the cache has a checksum, so nothing damaged gets here; should it all the same, then it
// must end with an error and not with a crash.
func FuzzListing(f *testing.F) {
	c := &capturer{started: time.Now().Add(time.Hour)}
	w := c.newListingWriter(nil)
	for _, e := range []entry{
		{path: "s", mode: unix.S_IFDIR}, {path: "s/a", mode: unix.S_IFDIR | 0o700}, {path: "s/a/b", mode: unix.S_IFREG, nlink: 1, size: 5},
		{path: "s/b", mode: unix.S_IFLNK, nlink: 1, size: 1}, {path: "s/c", mode: unix.S_IFIFO},
	} {
		w.add(&e)
	}
	f.Add(w.finish(1))
	f.Fuzz(func(_ *testing.T, p []byte) {
		l := readListing(p, 1)
		if l == nil {
			return
		}
		var read func(kids []byte, depth int)
		read = func(kids []byte, depth int) {
			l.each(kids, func(o *oldEntry) bool {
				if o.isDir() && depth < 50 {
					read(o.kids, depth+1)
				}
				return true
			})
		}
		read(l.top.kids, 0)
	})
}

// TestWhatIsUnchangedAllocatesLittle: taking an entry over from a listing allocates its path and nothing else.
func TestWhatIsUnchangedAllocatesLittle(t *testing.T) {
	dir := t.TempDir()
	entries := 0
	for i := range 4 * 4 * 4 {
		p := filepath.Join(dir, fmt.Sprintf("%d/%d/%d/file", i/16, i/4%4, i%4))
		if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r, err := openRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	w := (&capturer{started: time.Now().Add(time.Hour)}).newListingWriter(nil)
	sc := &scanner{r: r, workers: 1, ahead: 1 << 16, unreadable: func(rel string, err error) { t.Error(rel, err) }, record: w}
	var want []string
	if err := sc.walk(t.Context(), "", func(e *entry) error {
		if e.path != "" {
			entries++
			want = append(want, describe(e, e.path))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	sc.record, sc.old = nil, readListing(w.finish(1), 1)
	st := &scanState{sc: sc, ctx: t.Context()}
	allocs := testing.AllocsPerRun(5, func() {
		if err := st.asBefore("", sc.old.top.kids, 0, func(*entry) error { return nil }); err != nil {
			t.Fatal(err)
		}
	})
	if most := float64(entries) * 1.05; allocs > most {
		t.Errorf("%v allocations for %d entries", allocs, entries)
	}
	var got []string
	if err := st.asBefore("", sc.old.top.kids, 0, func(e *entry) error { got = append(got, describe(e, e.path)); return nil }); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, want) {
		t.Errorf("taken over:\n%q\nwant:\n%q", got, want)
	}
}
