package capture

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What the scan asks along the way is what is asked of each entry otherwise.
func TestAskTellsWhatDetailsTell(t *testing.T) {
	dir := t.TempDir()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"bare", "attr"} {
		check(os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600))
		check(os.Mkdir(filepath.Join(dir, "dir-"+name), 0o700))
	}
	check(unix.Setxattr(filepath.Join(dir, "attr"), "user.a", []byte("1"), 0))
	check(unix.Setxattr(filepath.Join(dir, "dir-attr"), "user.b", nil, 0))
	check(os.Symlink("../../nowhere/at all", filepath.Join(dir, "link")))
	r, err := openRoot(dir)
	check(err)
	defer r.close()
	d := newDetails(r)
	defer d.close()
	sc := &scanner{r: r, ask: true, unreadable: func(rel string, err error) { t.Errorf("%s: %v", rel, err) }}
	look := func() (bare, links int) {
		found, _ := newLister(sc).read(&entry{}, oldDir{})
		if len(found) != 5 {
			t.Fatalf("%d entries", len(found))
		}
		for i := range found {
			e := &found[i].entry
			x, err := d.xattrs(e.path)
			check(err)
			if e.bare {
				bare++
				if len(x) > 0 {
					t.Errorf("%s has %v and is called bare", e.path, x)
				}
			}
			if e.link != "" {
				links++
				if target, err := d.readlink(e.path); err != nil || target != e.link {
					t.Errorf("%s leads to %q, %v, and not to %q", e.path, target, err, e.link)
				}
			}
		}
		return bare, links
	}
	bare, links := look()
	if noListxattrat.Load() { // before Linux 6.13
		if bare+links > 0 {
			t.Error("known although nothing could be asked")
		}
		return
	}
	if bare != 3 || links != 1 {
		t.Errorf("%d entries are bare, %d links known", bare, links)
	}
	sc.ask = false
	if bare, links := look(); bare+links > 0 {
		t.Error("asked without need")
	}
}

// TestAttributesAreAskedOnce: what a listing tells of an entry is not asked again, unless the entry is changed.
func TestAttributesAreAskedOnce(t *testing.T) {
	dir := t.TempDir()
	at := func(rel string) string { return filepath.Join(dir, rel) }
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"same", "listed", "listed/sub"} {
		check(os.Mkdir(at(d), 0o700))
	}
	for _, f := range []string{"same/a", "same/b", "listed/a", "listed/b", "listed/c"} {
		check(os.WriteFile(at(f), []byte("x"), 0o600))
	}
	check(os.Symlink("nowhere", at("same/link")))
	for _, f := range []string{"same/b", "listed/b"} {
		check(unix.Setxattr(at(f), "user.a", []byte("1"), 0))
	}
	r, err := openRoot(dir)
	check(err)
	defer r.close()
	// scan returns which entries are bare, as the groups take it. lie is what the listing is told instead.
	scan := func(started time.Time, old []byte, lie func(e *entry)) (bare map[string]bool, seen []byte) {
		t.Helper()
		w := (&capturer{started: started}).newListingWriter(nil)
		sc := &scanner{
			r: r, workers: 2, ahead: 1 << 16, ask: true, old: readListing(old, 1), trust: nothingInPlace,
			unreadable: func(rel string, err error) { t.Error(rel, err) },
		}
		bare = map[string]bool{}
		check(sc.walk(t.Context(), "", func(e *entry) error {
			bare[e.path] = e.bare
			told := *e
			lie(&told)
			w.add(&told)
			return nil
		}))
		return bare, w.finish(1)
	}
	truth := func(*entry) {}
	later := time.Now().Add(time.Hour)
	expect := func(what string, bare map[string]bool, want ...string) {
		t.Helper()
		if noListxattrat.Load() { // before Linux 6.13
			want = nil
		}
		var got []string
		for p, b := range bare {
			if b {
				got = append(got, p)
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q are bare, not %q", what, got, want)
		}
	}
	bare, told := scan(later, nil, func(e *entry) { e.bare = e.path != "listed/c" })
	expect("first", bare, "listed", "listed/a", "listed/c", "listed/sub", "same", "same/a", "same/link")
	if noListxattrat.Load() {
		return
	}
	// The listing is believed, whatever the file system would say.
	bare, told = scan(later, told, truth)
	expect("unchanged", bare, "listed", "listed/a", "listed/b", "listed/sub", "same", "same/a", "same/b", "same/link")

	tick(t, at("tick"))
	check(os.WriteFile(at("listed/new"), nil, 0o600)) // so that it is listed
	check(unix.Setxattr(at("listed/a"), "user.a", nil, 0))
	check(unix.Setxattr(at("listed/sub"), "user.a", nil, 0))
	check(unix.Setxattr(at("same/a"), "user.a", nil, 0))
	check(os.WriteFile(at("same/b"), []byte("y"), 0o600)) // in place
	bare, told = scan(later, told, truth)
	expect("changed", bare, "listed", "listed/b", "listed/new", "same", "same/link")

	tick(t, at("tick"))
	check(unix.Removexattr(at("same/a"), "user.a"))
	check(unix.Removexattr(at("listed/sub"), "user.a"))
	bare, _ = scan(later, told, truth)
	expect("removed", bare, "listed", "listed/b", "listed/new", "listed/sub", "same", "same/a", "same/link")

	// What has just been changed may be changed again within the same tick: it is asked.
	_, told = scan(time.Now(), nil, func(e *entry) { e.bare = true })
	bare, _ = scan(later, told, truth)
	expect("just changed", bare, "listed", "listed/c", "listed/new", "listed/sub", "same", "same/a", "same/link")
}

// tick waits until the clock of the file system has moved on; p is a file to tell it by.
func tick(t *testing.T, p string) {
	t.Helper()
	now := func() time.Time {
		if err := os.WriteFile(p, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		st, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		return st.ModTime()
	}
	for first := now(); !now().After(first); {
	}
	if err := os.Remove(p); err != nil {
		t.Fatal(err)
	}
}
