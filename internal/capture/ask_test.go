package capture

import (
	"os"
	"path/filepath"
	"testing"

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
