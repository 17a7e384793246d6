package ceph

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/fssnap/fssnaptest"
	"github.com/holdfast-backup/holdfast/internal/mountinfo"
)

// cephFS plays CephFS on a tmpfs: making a snapshot copies the directory, and mounts the copy
// read-only. The directories with the snapshots, which CephFS does not list, lie elsewhere.
type cephFS struct {
	t          *testing.T
	top, snaps string
	made       []string
	deny       bool
}

func newCephFS(t *testing.T, dirs ...string) *cephFS {
	t.Helper()
	f := &cephFS{t: t, top: filepath.Join(t.TempDir(), "ceph"), snaps: t.TempDir()}
	fssnaptest.MountAt(t, "tmpfs", f.top, "tmpfs", "mode=755")
	for _, d := range append(dirs, ".") {
		for _, p := range []string{filepath.Join(f.top, d), f.snapDir(filepath.Join(f.top, d), mountinfo.Mount{})} {
			if err := os.MkdirAll(p, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	fssnaptest.Clean(t, f.snaps)
	return f
}

func (f *cephFS) snapDir(dir string, _ mountinfo.Mount) string {
	return filepath.Join(f.snaps, strings.ReplaceAll(dir, "/", "_"), ".snap")
}

func (f *cephFS) mkdir(path string) error {
	if f.deny {
		return unix.EACCES
	}
	if _, err := os.Lstat(path); err == nil {
		return unix.EEXIST
	}
	f.made = append(f.made, path)
	source := strings.ReplaceAll(filepath.Base(filepath.Dir(filepath.Dir(path))), "_", "/")
	if _, err := fssnap.Run(context.Background(), "cp", "-aT", source, path); err != nil {
		return err
	}
	if err := unix.Mount(path, path, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return unix.Mount("", path, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
}

func (f *cephFS) rmdir(path string) error {
	if _, err := os.Lstat(path); err != nil {
		return err
	}
	if err := fssnap.Unmount(path); err != nil {
		return err
	}
	return os.RemoveAll(path)
}

func (f *cephFS) driver() *Driver {
	return New(Options{
		IsCeph:  func(path string, _ mountinfo.Mount) (bool, error) { return mountinfo.Below(path, f.top), nil },
		SnapDir: f.snapDir, Mkdir: f.mkdir, Rmdir: f.rmdir,
	})
}

func TestLaws(t *testing.T) {
	f := newCephFS(t, "srv/ocis", "srv/ocis/a", "srv/ocis/storage/users")
	fssnaptest.Laws(t, fssnaptest.Rig{
		Driver: func(string) fssnap.Driver { return f.driver() },
		Dir:    filepath.Join(f.top, "srv/ocis"), SearchNeedsRoots: true,
	})
}

// TestSeveral: directories side by side are in one snapshot of what holds them both.
func TestSeveral(t *testing.T) {
	f := newCephFS(t, "srv", "srv/a", "srv/b", "srv/b/c")
	ctx := context.Background()
	for _, p := range []string{"srv/a/f", "srv/b/c/f"} {
		if err := os.WriteFile(filepath.Join(f.top, p), []byte(p), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	d := f.driver()
	state := t.TempDir()
	s := fssnaptest.NewSet(t, fssnap.Options{StateDir: state}, []fssnap.Driver{d}, filepath.Join(f.top, "srv/a"), filepath.Join(f.top, "srv/b/c"))
	if want := filepath.Join(f.snapDir(filepath.Join(f.top, "srv"), mountinfo.Mount{}), s.Name()); !slices.Equal(f.made, []string{want}) {
		t.Errorf("made %q, not %q", f.made, want)
	}
	if len(s.Views()) != 2 || !s.OneInstant() {
		t.Errorf("views: %+v", s.Views())
	}
	for _, p := range []string{"srv/a/f", "srv/b/c/f"} {
		if data, err := os.ReadFile(fssnaptest.At(t, s, filepath.Join(f.top, p))); err != nil || string(data) != p {
			t.Errorf("%s: %q, %v", p, data, err)
		}
	}
	// The snapshot is found from each of the directories.
	if list, err := d.List(ctx, filepath.Join(f.top, "srv/b/c"), filepath.Join(f.top, "srv/a")); err != nil || len(list) != 1 || list[0].Source != filepath.Join(f.top, "srv") {
		t.Errorf("list: %+v, %v", list, err)
	}
	if err := s.Close(ctx); err != nil {
		t.Error(err)
	}
	if list, err := d.List(ctx, filepath.Join(f.top, "srv/a")); err != nil || len(list) > 0 {
		t.Errorf("left: %+v, %v", list, err)
	}
}

func TestRefused(t *testing.T) {
	ctx := context.Background()
	f := newCephFS(t, "srv")
	d := f.driver()
	if _, err := d.Probe(ctx, t.TempDir()); !errors.Is(err, fssnap.ErrNotSupported) {
		t.Errorf("elsewhere: %v", err)
	}
	if _, err := New(Options{}).Probe(ctx, f.top); !errors.Is(err, fssnap.ErrNotSupported) {
		t.Errorf("tmpfs: %v", err)
	}
	none := filepath.Join(f.top, "none")
	if err := os.Mkdir(none, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Probe(ctx, none); !errors.Is(err, fssnap.ErrNotSupported) || !strings.Contains(err.Error(), "allow_new_snaps") {
		t.Errorf("snapshots are off: %v", err)
	}
	src, err := d.Probe(ctx, filepath.Join(f.top, "srv"))
	if err != nil {
		t.Fatal(err)
	}
	f.deny = true
	if _, err := d.Create(ctx, fssnap.NewName(time.Now()), []fssnap.Source{src}); !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "capability s") {
		t.Errorf("not allowed: %v", err)
	}
}

func TestSnapDir(t *testing.T) {
	for options, want := range map[string]string{
		"rw,name=admin,secret=<hidden>,acl": ".snap", "rw,snapdirname=.snapshots,acl": ".snapshots", "rw,snapdirname=../x": ".snap",
	} {
		if got := snapDir("/d", mountinfo.Mount{Options: "rw,relatime", Super: options}); got != "/d/"+want {
			t.Errorf("%s: %s", options, got)
		}
	}
}
