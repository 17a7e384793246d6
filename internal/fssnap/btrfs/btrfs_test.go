package btrfs

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/fssnap/fssnaptest"
)

func TestMain(m *testing.M) {
	fssnaptest.Main(m, func(state string) fssnap.Driver { return New(Options{StateDir: state, IncludeNested: true}) })
}

const imageSize = 128 << 20

func device(t *testing.T) string {
	t.Helper()
	return fssnaptest.Device(t, imageSize, "mkfs.btrfs", "-q")
}

func mkdir(t *testing.T, path string) string {
	t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func subvolumeAt(t *testing.T, path string) string {
	t.Helper()
	fssnaptest.Tool(t, "btrfs", "subvolume", "create", path)
	return path
}

func write(t *testing.T, path, data string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestLaws tries all the ways in which data can lie on btrfs.
func TestLaws(t *testing.T) {
	for _, c := range []struct {
		name string
		make func(t *testing.T, dev, top string) (dir string)
	}{
		{"plain directory in the top-level subvolume", func(t *testing.T, dev, top string) string {
			fssnaptest.MountAt(t, dev, top, "btrfs", "")
			return mkdir(t, filepath.Join(top, "srv/ocis"))
		}},
		{"the top-level subvolume itself", func(t *testing.T, dev, top string) string {
			fssnaptest.MountAt(t, dev, top, "btrfs", "")
			return top
		}},
		{"a subvolume in a mount", func(t *testing.T, dev, top string) string {
			fssnaptest.MountAt(t, dev, top, "btrfs", "")
			return subvolumeAt(t, filepath.Join(top, "ocis"))
		}},
		{"a mounted subvolume", func(t *testing.T, dev, top string) string {
			fssnaptest.MountAt(t, dev, top+"0", "btrfs", "")
			subvolumeAt(t, filepath.Join(top+"0", "@ocis"))
			if err := fssnap.Unmount(top + "0"); err != nil {
				t.Fatal(err)
			}
			fssnaptest.MountAt(t, dev, top, "btrfs", "subvol=@ocis")
			return top
		}},
		{"a directory in a mounted subvolume below another", func(t *testing.T, dev, top string) string {
			fssnaptest.MountAt(t, dev, top+"0", "btrfs", "")
			subvolumeAt(t, filepath.Join(top+"0", "@"))
			subvolumeAt(t, filepath.Join(mkdir(t, filepath.Join(top+"0", "@/x/y")), "var"))
			if err := fssnap.Unmount(top + "0"); err != nil {
				t.Fatal(err)
			}
			fssnaptest.MountAt(t, dev, top, "btrfs", "subvol=@/x/y/var")
			return mkdir(t, filepath.Join(top, "lib/ocis"))
		}},
		{"a bind mount of a directory, the rest unseen", func(t *testing.T, dev, top string) string {
			fssnaptest.MountAt(t, dev, top+"0", "btrfs", "")
			subvolumeAt(t, filepath.Join(top+"0", "@ocis"))
			mkdir(t, filepath.Join(top+"0", "@ocis/some/data"))
			mkdir(t, top)
			fssnaptest.MountAt(t, filepath.Join(top+"0", "@ocis/some/data"), top, "", "bind")
			if err := fssnap.Unmount(top + "0"); err != nil {
				t.Fatal(err)
			}
			return top
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := c.make(t, device(t), filepath.Join(t.TempDir(), "mnt"))
			fssnaptest.Laws(t, fssnaptest.Rig{
				Driver: func(state string) fssnap.Driver { return New(Options{StateDir: state}) },
				Dir:    dir, Fork: true,
			})
		})
	}
}

// TestLawsNested: what holds of one subvolume holds of those in it, too.
func TestLawsNested(t *testing.T) {
	top := filepath.Join(t.TempDir(), "mnt")
	fssnaptest.MountAt(t, device(t), top, "btrfs", "")
	dir := subvolumeAt(t, filepath.Join(top, "ocis"))
	subvolumeAt(t, filepath.Join(dir, "storage"))
	subvolumeAt(t, filepath.Join(mkdir(t, filepath.Join(dir, "storage/users/deep")), "inner"))
	write(t, filepath.Join(dir, "storage/users/deep/inner/file"), "inner")
	subvolumeAt(t, filepath.Join(top, "elsewhere"))
	fssnaptest.Laws(t, fssnaptest.Rig{
		Driver: func(state string) fssnap.Driver { return New(Options{StateDir: state, IncludeNested: true}) },
		Dir:    dir, Fork: true,
	})

	state := t.TempDir()
	s, err := fssnap.NewSet(context.Background(), []fssnap.Driver{New(Options{StateDir: state})}, []string{dir}, fssnap.Options{StateDir: state})
	if err != nil {
		t.Fatal(err)
	}
	var nested *NestedError
	u := s.Uncovered()
	if len(u) != 1 || u[0].Path != dir || !errors.As(u[0].Reason, &nested) || !errors.Is(u[0].Reason, fssnap.ErrNotSupported) {
		t.Fatalf("uncovered: %v", u)
	}
	for _, n := range []string{"storage", "storage/users/deep/inner"} {
		if !strings.Contains(u[0].Reason.Error(), filepath.Join(dir, n)) {
			t.Errorf("%s is not named: %v", n, u[0].Reason)
		}
	}
	if strings.Contains(u[0].Reason.Error(), "elsewhere") {
		t.Errorf("what is not below is named: %v", u[0].Reason)
	}
	if err := s.Create(context.Background()); !errors.Is(err, fssnap.ErrNotSupported) {
		t.Errorf("create without sources: %v", err)
	}
}

func TestReadOnlyMount(t *testing.T) {
	top := filepath.Join(t.TempDir(), "mnt")
	dev := device(t)
	fssnaptest.MountAt(t, dev, top, "btrfs", "")
	mkdir(t, filepath.Join(top, "data"))
	if err := unix.Mount("", top, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	d := New(Options{StateDir: t.TempDir()})
	if _, err := d.Probe(context.Background(), filepath.Join(top, "data")); !errors.Is(err, fssnap.ErrNotSupported) || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("probe on a read-only mount: %v", err)
	}
	// Another mount that can be written to will do.
	fssnaptest.MountAt(t, dev, top+"2", "btrfs", "")
	if _, err := d.Probe(context.Background(), filepath.Join(top, "data")); err != nil {
		t.Errorf("probe with a writable mount elsewhere: %v", err)
	}
}

// TestPlanted: what others put in the way of the views' directory is neither followed nor used.
func TestPlanted(t *testing.T) {
	top := filepath.Join(t.TempDir(), "mnt")
	fssnaptest.MountAt(t, device(t), top, "btrfs", "")
	dir := mkdir(t, filepath.Join(top, "data"))
	elsewhere := mkdir(t, filepath.Join(top, "elsewhere"))
	planted := filepath.Join(top, fssnap.ViewsDir)
	d := New(Options{StateDir: t.TempDir()})
	ctx := context.Background()
	src, err := d.Probe(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	for name, plant := range map[string]func() error{
		"symlink":    func() error { return os.Symlink(elsewhere, planted) },
		"file":       func() error { return os.WriteFile(planted, nil, 0o600) },
		"of another": func() error { return errors.Join(os.Mkdir(planted, 0o777), os.Chown(planted, 1000, 1000)) },
	} {
		if err := plant(); err != nil {
			t.Fatal(err)
		}
		if v, err := d.Create(ctx, fssnap.NewName(time.Now()), []fssnap.Source{src}); err == nil {
			t.Errorf("%s: %v", name, v)
		}
		if e, err := os.ReadDir(elsewhere); err != nil || len(e) > 0 {
			t.Errorf("%s: the link was followed: %v, %v", name, e, err)
		}
		if err := os.RemoveAll(planted); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(planted, 0o755); err != nil {
		t.Fatal(err)
	}
	v, err := d.Create(ctx, fssnap.NewName(time.Now()), []fssnap.Source{src})
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(planted); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("%s is %v, %v", planted, st.Mode(), err)
	}
	// A view that was changed is no longer one.
	fssnaptest.Tool(t, "btrfs", "property", "set", v[0].Path, "ro", "false")
	var broken *fssnap.BrokenError
	if err := d.Check(ctx, v[0]); !errors.As(err, &broken) {
		t.Errorf("check of a writable view: %v", err)
	}
	if list, err := d.List(ctx); err != nil || len(list) != 1 || list[0].Broken == "" {
		t.Errorf("list: %+v, %v", list, err)
	}
	// It can be removed, even with a subvolume in it that nobody knows of.
	subvolumeAt(t, filepath.Join(v[0].Path, "later"))
	if err := d.Remove(ctx, v[0]); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(planted); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", planted, err)
	}
}

// TestSeveral: two subvolumes of one filesystem have views side by side, also in the data itself; a
// second set does not see the first.
func TestSeveral(t *testing.T) {
	top := filepath.Join(t.TempDir(), "mnt")
	fssnaptest.MountAt(t, device(t), top, "btrfs", "")
	a := subvolumeAt(t, filepath.Join(top, "a"))
	b := subvolumeAt(t, filepath.Join(top, "b"))
	write(t, filepath.Join(a, "f"), "a")
	write(t, filepath.Join(b, "f"), "b")
	state := t.TempDir()
	o := fssnap.Options{StateDir: state}
	ds := []fssnap.Driver{New(Options{StateDir: state})}
	s := fssnaptest.NewSet(t, o, ds, a, b)
	if len(s.Views()) != 2 || s.OneInstant() {
		t.Errorf("views: %+v, of one instant: %v", s.Views(), s.OneInstant())
	}
	for path, want := range map[string]string{a: "a", b: "b"} {
		if data, err := os.ReadFile(filepath.Join(fssnaptest.At(t, s, path), "f")); err != nil || string(data) != want {
			t.Errorf("%s: %q, %v", path, data, err)
		}
	}
	// The whole filesystem, with the views of the first set in it.
	ds = []fssnap.Driver{New(Options{StateDir: state, IncludeNested: true})}
	s2 := fssnaptest.NewSet(t, o, ds, top)
	fssnaptest.Same(t, "all", fssnaptest.Describe(t, top), fssnaptest.Describe(t, fssnaptest.At(t, s2, top)))
	if _, err := os.Lstat(filepath.Join(fssnaptest.At(t, s2, top), fssnap.ViewsDir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("views are in the view: %v", err)
	}
	if s2.OneInstant() {
		t.Error("three subvolumes cannot be of one instant")
	}
	if _, err := s2.Verify(context.Background(), fssnap.VerifyOptions{Frozen: true}); err != nil {
		t.Error(err)
	}
}

// TestCreateFails: what was made before the failure is gone.
func TestCreateFails(t *testing.T) {
	top := filepath.Join(t.TempDir(), "mnt")
	fssnaptest.MountAt(t, device(t), top, "btrfs", "")
	a := subvolumeAt(t, filepath.Join(top, "a"))
	b := subvolumeAt(t, filepath.Join(top, "b"))
	state := t.TempDir()
	d := New(Options{StateDir: state})
	s, err := fssnap.NewSet(context.Background(), []fssnap.Driver{d}, []string{a, b}, fssnap.Options{StateDir: state})
	if err != nil {
		t.Fatal(err)
	}
	fssnaptest.Tool(t, "btrfs", "subvolume", "delete", b)
	if err := s.Create(context.Background()); err == nil {
		t.Error("created without a source")
	}
	if list, err := d.List(context.Background()); err != nil || len(list) > 0 {
		t.Errorf("left: %v, %v", list, err)
	}
	if e, err := os.ReadDir(filepath.Join(state, "views")); err != nil || len(e) > 0 {
		t.Errorf("left: %v, %v", e, err)
	}
	if _, err := os.Lstat(filepath.Join(top, fssnap.ViewsDir)); err == nil {
		t.Error("the directory of the views is left")
	}
}

// TestMountedInPlace: a nested subvolume that is mounted where it lies is a path of its own, and its
// picture is in its place.
func TestMountedInPlace(t *testing.T) {
	top := filepath.Join(t.TempDir(), "mnt")
	dev := device(t)
	fssnaptest.MountAt(t, dev, top, "btrfs", "")
	dir := mkdir(t, filepath.Join(top, "ocis"))
	users := subvolumeAt(t, filepath.Join(dir, "users"))
	fssnaptest.MountAt(t, dev, users, "btrfs", "subvol=ocis/users")
	fssnaptest.Fill(t, users)
	write(t, filepath.Join(dir, "file"), "outer")
	state := t.TempDir()
	fssnaptest.Clean(t, state)
	d := New(Options{StateDir: state})
	s := fssnaptest.NewSet(t, fssnap.Options{StateDir: state}, []fssnap.Driver{d}, dir)
	if len(s.Views()) != 2 {
		t.Errorf("views: %+v", s.Views())
	}
	fssnaptest.Same(t, "all", fssnaptest.Describe(t, dir), fssnaptest.Describe(t, fssnaptest.At(t, s, dir)))
	if v, err := s.Verify(context.Background(), fssnap.VerifyOptions{Frozen: true}); err != nil || v.Compared < 15 {
		t.Errorf("verify: %+v, %v", v, err)
	}
	if err := s.Close(context.Background()); err != nil {
		t.Error(err)
	}
	fssnaptest.Killed(t, state, d, dir)
	if e, err := os.ReadDir(filepath.Join(state, "views")); err != nil || len(e) > 1 {
		t.Errorf("left: %v, %v", e, err)
	}
}

// TestWayBack restores an instance from a view that was kept, in the top-level subvolume and in one of
// its own; the contents are shared with the view.
func TestWayBack(t *testing.T) {
	top := filepath.Join(t.TempDir(), "top")
	fssnaptest.MountAt(t, device(t), top, "btrfs", "")
	for name, dir := range map[string]string{
		"a folder": mkdir(t, filepath.Join(top, "srv")), "a subvolume": subvolumeAt(t, filepath.Join(top, "own")),
	} {
		t.Run(name, func(t *testing.T) {
			state := t.TempDir()
			fssnaptest.WayBack(t, New(Options{StateDir: state}), state, dir, false)
		})
	}
}
