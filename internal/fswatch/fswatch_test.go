package fswatch

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// top is the first component.
func top(rel string) string {
	t, _, _ := strings.Cut(rel, "/")
	return t
}

func start(t *testing.T, root string) *Watch {
	t.Helper()
	w, err := Start(root, top)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func take(t *testing.T, w *Watch) []string {
	t.Helper()
	m, err := w.Take()
	if err != nil {
		t.Fatal(err)
	}
	return slices.Sorted(maps.Keys(m))
}

func check(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// TestEachChange makes one change in one unit at a time: it is told, and nothing else is.
func TestEachChange(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	for i := range 16 {
		d := filepath.Join(root, fmt.Sprintf("u%02d", i), "a", "b")
		check(t, os.MkdirAll(d, 0o755), os.WriteFile(filepath.Join(d, "f"), []byte("x"), 0o600), os.Symlink("f", filepath.Join(d, "l")))
	}
	w := start(t, root)
	f := func(unit string, name ...string) string {
		return filepath.Join(append([]string{root, unit}, name...)...)
	}
	for i, c := range []struct {
		name   string
		change func(u string)
	}{
		{"nothing", nil},
		{"new file", func(u string) { check(t, os.WriteFile(f(u, "a/b/n"), nil, 0o600)) }},
		{"file replaced", func(u string) {
			check(t, os.WriteFile(f(u, "a/b/t"), nil, 0o600), os.Rename(f(u, "a/b/t"), f(u, "a/b/f")))
		}},
		{"file written in place", func(u string) {
			h, err := os.OpenFile(f(u, "a/b/f"), os.O_WRONLY, 0)
			check(t, err)
			_, err = h.WriteAt([]byte("y"), 0)
			check(t, err, h.Close())
		}},
		{"file truncated", func(u string) { check(t, os.Truncate(f(u, "a/b/f"), 0)) }},
		{"mode", func(u string) { check(t, os.Chmod(f(u, "a/b/f"), 0o640)) }},
		{"removed", func(u string) { check(t, os.Remove(f(u, "a/b/f"))) }},
		{"link", func(u string) { check(t, os.Symlink("x", f(u, "a/m"))) }},
		{"tree removed", func(u string) { check(t, os.RemoveAll(f(u, "a"))) }},
		{"new folders", func(u string) { check(t, os.MkdirAll(f(u, "c/d/e"), 0o755)) }},
		{"folder moved in from elsewhere", func(u string) {
			d := filepath.Join(filepath.Dir(root), "out")
			check(t, os.Mkdir(d, 0o755), os.Rename(d, f(u, "in")))
		}},
		{"folder moved away", func(u string) { check(t, os.Rename(f(u, "a/b"), filepath.Join(filepath.Dir(root), "gone"))) }},
	} {
		u := fmt.Sprintf("u%02d", i)
		want := []string{u}
		if c.change == nil {
			want = nil
		} else {
			c.change(u)
		}
		if got := take(t, w); !slices.Equal(got, want) {
			t.Errorf("%s: %q changed, not %q", c.name, got, want)
		}
	}
	// Outside of the root on the same file system.
	check(t, os.WriteFile(filepath.Join(filepath.Dir(root), "other"), nil, 0o600))
	if got := take(t, w); got != nil {
		t.Errorf("a change elsewhere was told as %q", got)
	}
	// A unit that goes and comes again.
	check(t, os.RemoveAll(f("u15")), os.Mkdir(f("u15"), 0o755))
	if got := take(t, w); !slices.Equal(got, []string{"u15"}) {
		t.Errorf("%q changed, not u15", got)
	}
}

// TestThroughLink watches a root that is named through a symbolic link.
func TestThroughLink(t *testing.T) {
	dir := t.TempDir()
	check(t, os.MkdirAll(filepath.Join(dir, "real/u"), 0o755), os.Symlink("real", filepath.Join(dir, "link")))
	w := start(t, filepath.Join(dir, "link"))
	check(t, os.WriteFile(filepath.Join(dir, "real/u/f"), nil, 0o600))
	if got := take(t, w); !slices.Equal(got, []string{"u"}) {
		t.Errorf("%q changed, not u", got)
	}
}

// TestManyChanges makes more changes than the kernel's queue holds (16384): either all are told, or the
// loss is.
func TestManyChanges(t *testing.T) {
	root := t.TempDir()
	w := start(t, root)
	want := map[string]bool{}
	for i := range 20000 {
		u := fmt.Sprintf("d%d", i%500)
		want[u] = true
		if i < 500 {
			check(t, os.Mkdir(filepath.Join(root, u), 0o755))
		}
		check(t, os.WriteFile(filepath.Join(root, u, fmt.Sprint(i)), nil, 0o600))
	}
	got, err := w.Take()
	if errors.Is(err, ErrLost) {
		if _, err := w.Take(); !errors.Is(err, ErrLost) {
			t.Errorf("after a loss the watch says %v", err)
		}
		return
	}
	check(t, err)
	if !maps.Equal(got, want) {
		t.Errorf("%d units are told of %d", len(got), len(want))
	}
}

func TestNoSuchRoot(t *testing.T) {
	if _, err := Start(filepath.Join(t.TempDir(), "missing"), top); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
