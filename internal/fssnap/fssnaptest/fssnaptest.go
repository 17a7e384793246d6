// Package fssnaptest holds the laws that every driver of fssnap keeps, and what their tests share.
package fssnaptest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/mountinfo"
)

// A Rig is a driver with a real filesystem to try it on.
type Rig struct {
	// Driver returns a driver that keeps what it must keep in stateDir.
	Driver func(stateDir string) fssnap.Driver
	// Dir is an empty directory that the driver can hold still.
	Dir string
	// Writable views are those of commands that copy.
	Writable bool
	// Fork tells that the test binary calls Main, so that runs can be killed.
	Fork bool
	// SearchNeedsRoots: a view that no record knows is found only where one looks.
	SearchNeedsRoots bool
}

// only sees the views of one source: other tests on this machine have theirs.
type only struct {
	fssnap.Driver
	source string
}

func (o *only) List(ctx context.Context, roots ...string) ([]fssnap.View, error) {
	list, err := o.Driver.List(ctx, roots...)
	return slices.DeleteFunc(list, func(v fssnap.View) bool { return v.Source != o.source }), err
}

const childEnv = "HOLDFAST_FSSNAPTEST_CHILD"

// Main runs the tests, or, in a child process, makes a set of views and waits to be killed.
func Main(m *testing.M, driver func(stateDir string) fssnap.Driver) {
	// The race detector makes each process wait for a second at its end; children need not.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		panic(err)
	}
	job := os.Getenv(childEnv)
	if job == "" {
		os.Exit(m.Run())
	}
	stateDir, path, _ := strings.Cut(job, "\n")
	ctx := context.Background()
	s, err := fssnap.NewSet(ctx, []fssnap.Driver{driver(stateDir)}, []string{path}, fssnap.Options{StateDir: stateDir})
	if err == nil {
		err = s.Create(ctx)
	}
	if err != nil {
		fmt.Println("failed:", err)
		os.Exit(1)
	}
	fmt.Println("made", s.Name())
	time.Sleep(time.Minute)
	os.Exit(1)
}

// Fill puts into dir one of everything that views must show: files, folders, links, odd names, times,
// and extended attributes with binary values.
func Fill(t testing.TB, dir string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"a/b/c", "storage/users/spaces/1", "name with \xff and\nnewline"} {
		must(os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	for i, f := range []string{"top", "a/one", "a/b/two", "a/b/c/three", "storage/users/spaces/1/root.mpk", "name with \xff and\nnewline/f"} {
		p := filepath.Join(dir, f)
		must(os.WriteFile(p, []byte(strings.Repeat(f, 1000*i+1)), 0o640))
		must(unix.Setxattr(p, "user.oc.id", []byte{0, 1, 0xff, 0, byte(i)}, 0))
		must(unix.Setxattr(p, "user.oc.grant.u:einstein", []byte("\x00t=A:f=fd:p=rw"), 0))
		must(unix.Setxattr(p, "user.empty", nil, 0))
	}
	must(unix.Setxattr(filepath.Join(dir, "a"), "user.oc.space.name", []byte("b\xe4r"), 0))
	must(os.Symlink("../a/one", filepath.Join(dir, "storage/link")))
	must(os.Symlink("/nowhere", filepath.Join(dir, "dangling")))
	must(unix.Mkfifo(filepath.Join(dir, "a/pipe"), 0o600))
	must(os.Chmod(filepath.Join(dir, "a/b"), 0o2750))
	must(os.Chown(filepath.Join(dir, "a/one"), 1234, 4321))
	old := time.Date(2001, 2, 3, 4, 5, 6, 123456789, time.UTC)
	for _, p := range []string{"top", "a/b/two", "a/b", "a", ""} {
		must(os.Chtimes(filepath.Join(dir, p), old, old))
	}
}

// Change does to a filled directory what a running server does.
func Change(t testing.TB, dir string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(filepath.Join(dir, "top"), []byte("other"), 0o600))
	must(os.WriteFile(filepath.Join(dir, "new"), nil, 0o600))
	must(os.Remove(filepath.Join(dir, "a/b/two")))
	must(os.Rename(filepath.Join(dir, "a/b/c"), filepath.Join(dir, "moved")))
	must(unix.Setxattr(filepath.Join(dir, "a/one"), "user.oc.id", []byte("other"), 0))
	must(unix.Removexattr(filepath.Join(dir, "a"), "user.oc.space.name"))
}

// Describe writes down a tree: all that a view must show of it.
func Describe(t testing.TB, dir string) []string {
	t.Helper()
	var list []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.Name() == fssnap.ViewsDir || d.Name() == ".snap" || d.Name() == "lost+found" {
			return filepath.SkipDir
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		line := fmt.Sprintf("%q %o %d:%d %d.%09d", rel, st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		switch {
		case d.Type().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d %q", len(data), data[:min(20, len(data))])
		case d.Type()&fs.ModeSymlink != 0:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %q", to)
		}
		buf := make([]byte, 4096)
		n, err := unix.Llistxattr(path, buf)
		if errors.Is(err, unix.ENOTSUP) {
			n, err = 0, nil // a filesystem without any
		}
		if err != nil {
			return err
		}
		names := strings.Split(strings.TrimRight(string(buf[:n]), "\x00"), "\x00")
		slices.Sort(names)
		for _, name := range names {
			if name == "" {
				continue
			}
			v := make([]byte, 4096)
			n, err := unix.Lgetxattr(path, name, v)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %s=%q", name, v[:n])
		}
		list = append(list, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// Same reports the differences between two descriptions.
func Same(t testing.TB, what string, want, got []string) {
	t.Helper()
	for _, w := range want {
		if !slices.Contains(got, w) {
			t.Errorf("%s: missing %s", what, w)
		}
	}
	for _, g := range got {
		if !slices.Contains(want, g) {
			t.Errorf("%s: unexpected %s", what, g)
		}
	}
}

// Mounts returns the mount points at and below some directories.
func Mounts(t testing.TB, dirs ...string) []string {
	t.Helper()
	table, err := mountinfo.Self()
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, m := range table {
		if slices.ContainsFunc(dirs, func(d string) bool { return mountinfo.Below(m.Point, d) }) {
			list = append(list, m.Point)
		}
	}
	slices.Sort(list)
	return list
}

// Clean makes sure, when the test ends, that nothing is mounted below dir. Call it before anything is
// mounted there, and after t.TempDir.
func Clean(t testing.TB, dir string) {
	t.Helper()
	t.Cleanup(func() {
		if err := fssnap.Unmount(dir); err != nil {
			t.Error(err)
		}
	})
}

// Tool runs a program of the test's and returns its output.
func Tool(t testing.TB, argv ...string) string {
	t.Helper()
	out, err := fssnap.Run(context.Background(), argv...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// Device makes an image of the given size in bytes in a directory of its own, makes a filesystem on it
// with the command, to which the device is added, and returns the loop device. At the end of the test
// it is taken away, after all that was mounted from it.
func Device(t testing.TB, size int64, mkfs ...string) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	dev := Attach(t, image)
	if len(mkfs) > 0 {
		Tool(t, append(mkfs, dev)...)
	}
	return dev
}

// Attach makes a loop device of an image until the test ends.
func Attach(t testing.TB, image string) string {
	t.Helper()
	dev := Tool(t, "losetup", "--find", "--show", image)
	t.Cleanup(func() {
		table, err := mountinfo.Self()
		if err != nil {
			t.Error(err)
		}
		for _, m := range slices.Backward(table) {
			if m.Source == dev {
				if err := fssnap.Unmount(m.Point); err != nil {
					t.Error(err)
				}
			}
		}
		if _, err := fssnap.Run(context.Background(), "losetup", "--detach", dev); err != nil {
			t.Error(err)
		}
	})
	return dev
}

// MountAt mounts a device at a new directory until the test ends.
func MountAt(t testing.TB, dev, point, fsType, options string) {
	t.Helper()
	if err := os.MkdirAll(point, 0o755); err != nil {
		t.Fatal(err)
	}
	var flags uintptr
	if options == "bind" {
		flags, options = unix.MS_BIND, ""
	}
	if err := unix.Mount(dev, point, fsType, flags, options); err != nil {
		t.Fatalf("mount %s at %s: %v", dev, point, err)
	}
	Clean(t, point)
}

// Laws runs all of them.
func Laws(t *testing.T, rig Rig) {
	ctx := context.Background()
	Fill(t, rig.Dir)
	run := func(name string, law func(t *testing.T, state string, d fssnap.Driver)) {
		t.Run(name, func(t *testing.T) {
			state := t.TempDir()
			Clean(t, state)
			mounts, tree := Mounts(t, rig.Dir, state), Describe(t, rig.Dir)
			d := &only{Driver: rig.Driver(state)}
			src, err := d.Probe(ctx, rig.Dir)
			if err != nil {
				t.Fatal(err)
			}
			d.source = src.Name
			law(t, state, d)
			if t.Failed() {
				return
			}
			Same(t, "mounts afterwards", mounts, Mounts(t, rig.Dir, state))
			list, err := d.List(ctx, rig.Dir)
			if err != nil || len(list) > 0 {
				t.Errorf("views left: %v, %v", list, err)
			}
			if name != "still" {
				Same(t, "the source afterwards", tree, Describe(t, rig.Dir))
			}
			if _, err := os.Lstat(filepath.Join(rig.Dir, fssnap.ViewsDir)); err == nil {
				t.Errorf("%s is left", fssnap.ViewsDir)
			}
			if left, _ := filepath.Glob(filepath.Join(state, "views", "*")); slices.ContainsFunc(left, func(p string) bool {
				e, err := os.ReadDir(p)
				return err != nil || len(e) > 0
			}) {
				t.Errorf("left in the state directory: %q", left)
			}
		})
	}
	run("probe", func(t *testing.T, _ string, d fssnap.Driver) { probe(t, rig, d) })
	run("life", func(t *testing.T, _ string, d fssnap.Driver) { life(t, rig, d) })
	run("set", func(t *testing.T, state string, d fssnap.Driver) { set(t, rig, state, d) })
	run("keep", func(t *testing.T, state string, d fssnap.Driver) { keep(t, rig, state, d) })
	run("orphans", func(t *testing.T, state string, d fssnap.Driver) { orphans(t, rig, state, d) })
	if rig.Fork {
		run("killed", func(t *testing.T, state string, d fssnap.Driver) { Killed(t, state, d, rig.Dir) })
	}
	run("still", func(t *testing.T, state string, d fssnap.Driver) { still(t, rig, state, d) })
}

func probe(t *testing.T, rig Rig, d fssnap.Driver) {
	ctx := context.Background()
	s, err := d.Probe(ctx, rig.Dir)
	if err != nil {
		t.Fatal(err)
	}
	if s.Kind != d.Kind() || s.Name == "" || s.Path != rig.Dir {
		t.Errorf("source of %s: %+v", rig.Dir, s)
	}
	f, err := d.Probe(ctx, filepath.Join(rig.Dir, "a/one"))
	if err != nil {
		t.Fatal(err)
	}
	if f.Path != filepath.Join(rig.Dir, "a/one") {
		t.Errorf("source of a file: %+v", f)
	}
	if _, err := d.Probe(ctx, filepath.Join(rig.Dir, "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("probe of what does not exist: %v", err)
	}
	if !rig.Writable {
		if _, err := d.Probe(ctx, "/proc"); !errors.Is(err, fssnap.ErrNotSupported) {
			t.Errorf("probe of /proc: %v", err)
		}
	}
}

func life(t *testing.T, rig Rig, d fssnap.Driver) {
	ctx := context.Background()
	src, err := d.Probe(ctx, rig.Dir)
	if err != nil {
		t.Fatal(err)
	}
	before := time.Now()
	name := fssnap.NewName(before)
	views, err := d.Create(ctx, name, []fssnap.Source{src})
	if err != nil {
		t.Fatal(err)
	}
	if len(views) != 1 {
		t.Fatalf("%d views", len(views))
	}
	v := views[0]
	if v.Kind != d.Kind() || v.Set() != name || v.Source != src.Name || !filepath.IsAbs(v.Path) ||
		v.MadeAt.Before(before.Add(-time.Second)) || v.MadeAt.After(time.Now()) || v.MadeAt.Location() != time.UTC {
		t.Errorf("view: %+v", v)
	}
	Same(t, "view", Describe(t, rig.Dir), Describe(t, filepath.Join(v.Path, src.Rel)))
	if err := d.Check(ctx, v); err != nil {
		t.Error(err)
	}
	list, err := d.List(ctx, rig.Dir)
	if err != nil || len(list) != 1 || list[0].Name != v.Name || list[0].Kind != v.Kind || list[0].Source != v.Source || list[0].Broken != "" {
		t.Errorf("list: %+v, %v", list, err)
	}
	again, err := d.Open(ctx, v)
	if err != nil || again.Path != v.Path {
		t.Errorf("open a view that is open: %+v, %v", again, err)
	}
	if _, err := d.Create(ctx, name, []fssnap.Source{src}); err == nil {
		t.Error("a second view of the same name was made")
		return
	}
	for range 2 { // once more does no harm
		if err := d.Remove(ctx, v); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Lstat(v.Path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the removed view is at %s still: %v", v.Path, err)
	}
	if err := d.Check(ctx, v); !errors.Is(err, fssnap.ErrGone) {
		t.Errorf("check of a removed view: %v", err)
	}
	if _, err := d.Open(ctx, v); !errors.Is(err, fssnap.ErrGone) {
		t.Errorf("open of a removed view: %v", err)
	}
}

// NewSet makes a set of views, or ends the test.
func NewSet(t testing.TB, o fssnap.Options, drivers []fssnap.Driver, paths ...string) *fssnap.Set {
	t.Helper()
	s, err := fssnap.NewSet(context.Background(), drivers, paths, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	if u := s.Uncovered(); len(u) > 0 {
		t.Fatalf("not covered: %v", u)
	}
	if err := s.Create(context.Background()); err != nil {
		t.Fatal(err)
	}
	return s
}

// At is Translate that ends the test.
func At(t testing.TB, s *fssnap.Set, path string) string {
	t.Helper()
	p, ok := s.Translate(path)
	if !ok {
		t.Fatalf("%s has no view: %v", path, s.Reason(path))
	}
	return p
}

func set(t *testing.T, rig Rig, state string, d fssnap.Driver) {
	ctx := context.Background()
	ds := []fssnap.Driver{d}
	s := NewSet(t, fssnap.Options{StateDir: state}, ds, rig.Dir, filepath.Join(rig.Dir, "a"), filepath.Join(rig.Dir, "storage/users"), filepath.Join(rig.Dir, "top"))
	for _, p := range []string{".", "a", "a/b/c", "storage", "storage/users/spaces", "name with \xff and\nnewline"} {
		p = filepath.Join(rig.Dir, p)
		Same(t, p, Describe(t, p), Describe(t, At(t, s, p)))
	}
	if data, err := os.ReadFile(At(t, s, filepath.Join(rig.Dir, "top"))); err != nil || string(data) != "top" {
		t.Errorf("top: %q, %v", data, err)
	}
	v, err := s.Verify(ctx, fssnap.VerifyOptions{Frozen: true, Roots: []string{filepath.Join(rig.Dir, "storage/users/spaces/1")}})
	if err != nil || v.Compared < 15 || v.Attrs < 19 || v.Skipped > 0 {
		t.Errorf("verify: %+v, %v", v, err)
	}
	if removed, err := fssnap.RemoveLeftovers(ctx, ds, fssnap.FindOptions{StateDir: state, Orphans: true}); err != nil || len(removed) > 0 {
		t.Errorf("views in use: %v, %v", removed, err)
	}
	found, err := fssnap.Find(ctx, ds, fssnap.FindOptions{StateDir: state})
	if err != nil || len(found) != len(s.Views()) || found[0].State != fssnap.Live || found[0].PID != os.Getpid() {
		t.Errorf("find: %+v, %v", found, err)
	}
	if err := s.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(ctx); err != nil {
		t.Errorf("closed again: %v", err)
	}
}

func keep(t *testing.T, rig Rig, state string, d fssnap.Driver) {
	ctx := context.Background()
	ds := []fssnap.Driver{d}
	o := fssnap.Options{StateDir: state, Label: "cloud", KeepLast: 2}
	other := NewSet(t, fssnap.Options{StateDir: state, Label: "other", KeepLast: 1}, ds, rig.Dir)
	if err := other.Close(ctx); err != nil {
		t.Fatal(err)
	}
	var names []string
	for range 3 {
		s := NewSet(t, o, ds, rig.Dir)
		names = append(names, s.Name())
		if err := s.Close(ctx); err != nil {
			t.Fatal(err)
		}
	}
	found, err := fssnap.Find(ctx, ds, fssnap.FindOptions{StateDir: state})
	if err != nil {
		t.Fatal(err)
	}
	var kept []string
	for _, f := range found {
		if f.State != fssnap.Kept {
			t.Errorf("%s is %s", f.Name, f.State)
		}
		if f.Label == "cloud" && !slices.Contains(kept, f.Set()) {
			kept = append(kept, f.Set())
		}
	}
	slices.Sort(kept)
	if want := slices.Sorted(slices.Values(names[1:])); !slices.Equal(kept, want) {
		t.Errorf("kept %q, not %q", kept, want)
	}
	if removed, err := fssnap.RemoveLeftovers(ctx, ds, fssnap.FindOptions{StateDir: state, Orphans: true}); err != nil || len(removed) > 0 {
		t.Errorf("kept views: %v, %v", removed, err)
	}
	// A restart of the machine takes the mounts away.
	if err := fssnap.Unmount(filepath.Join(state, "views")); err != nil {
		t.Fatal(err)
	}
	s, err := fssnap.OpenKept(ctx, []fssnap.Driver{rig.Driver(state)}, names[2], fssnap.Options{StateDir: state})
	if err != nil {
		t.Fatal(err)
	}
	Same(t, "kept view", Describe(t, rig.Dir), Describe(t, At(t, s, rig.Dir)))
	if _, err := s.Verify(ctx, fssnap.VerifyOptions{}); err != nil {
		t.Error(err)
	}
	if err := fssnap.RemoveKept(ctx, ds, names[2], fssnap.FindOptions{StateDir: state}); err == nil {
		t.Error("a view in use was removed")
	}
	if err := s.Close(ctx); err != nil {
		t.Error(err)
	}
	for _, name := range []string{names[1], names[2], other.Name()} {
		if err := fssnap.RemoveKept(ctx, ds, name, fssnap.FindOptions{StateDir: state}); err != nil {
			t.Error(err)
		}
	}
	if _, err := fssnap.OpenKept(ctx, ds, names[1], fssnap.Options{StateDir: state}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("open of a removed set: %v", err)
	}
}

func orphans(t *testing.T, rig Rig, state string, d fssnap.Driver) {
	ctx := context.Background()
	src, err := d.Probe(ctx, rig.Dir)
	if err != nil {
		t.Fatal(err)
	}
	views, err := d.Create(ctx, fssnap.NewName(time.Now()), []fssnap.Source{src})
	if err != nil {
		t.Fatal(err)
	}
	ds := []fssnap.Driver{&only{rig.Driver(state), src.Name}}
	o := fssnap.FindOptions{StateDir: state}
	if rig.SearchNeedsRoots {
		o.Roots = []string{rig.Dir}
	}
	if removed, err := fssnap.RemoveLeftovers(ctx, ds, o); err != nil || len(removed) > 0 {
		t.Errorf("orphans removed without being asked for: %v, %v", removed, err)
	}
	found, err := fssnap.Leftovers(ctx, ds, o)
	if err != nil || len(found) != 1 || found[0].State != fssnap.Orphan || found[0].Name != views[0].Name {
		t.Errorf("orphans: %+v, %v", found, err)
	}
	o.Orphans = true
	if removed, err := fssnap.RemoveLeftovers(ctx, ds, o); err != nil || len(removed) != 1 {
		t.Errorf("orphans removed: %v, %v", removed, err)
	}
}

// Killed kills a run that has made views of dir, and has them removed. The test binary must call Main.
func Killed(t *testing.T, state string, d fssnap.Driver, dir string) {
	t.Helper()
	ctx := context.Background()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), childEnv+"="+state+"\n"+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	name, ok := strings.CutPrefix(strings.TrimSpace(line), "made ")
	ds := []fssnap.Driver{d}
	o := fssnap.FindOptions{StateDir: state}
	if ok {
		if removed, err := fssnap.RemoveLeftovers(ctx, ds, o); err != nil || len(removed) > 0 {
			t.Errorf("views of a run that lives: %v, %v", removed, err)
		}
	}
	_ = cmd.Process.Signal(syscall.SIGKILL)
	_ = cmd.Wait()
	if !ok {
		t.Fatalf("the child says %q", line)
	}
	found, err := fssnap.Leftovers(ctx, ds, o)
	if err != nil || len(found) == 0 || found[0].State != fssnap.Leftover || found[0].Set() != name || found[0].PID != cmd.Process.Pid {
		t.Errorf("leftovers: %+v, %v", found, err)
	}
	removed, err := fssnap.RemoveLeftovers(ctx, ds, o)
	if err != nil || len(removed) == 0 || removed[0].Set() != name {
		t.Errorf("removed: %+v, %v", removed, err)
	}
}

func still(t *testing.T, rig Rig, state string, d fssnap.Driver) {
	ctx := context.Background()
	s := NewSet(t, fssnap.Options{StateDir: state}, []fssnap.Driver{d}, rig.Dir)
	before := Describe(t, rig.Dir)
	at := At(t, s, rig.Dir)
	time.Sleep(30 * time.Millisecond) // the kernel's clock for files is coarse
	Change(t, rig.Dir)
	Same(t, "the view after changes", before, Describe(t, at))
	if v, err := s.Verify(ctx, fssnap.VerifyOptions{}); err != nil || v.Compared == 0 || v.Skipped == 0 {
		t.Errorf("verify after changes: %+v, %v", v, err)
	}
	var lossy *fssnap.LossyViewError
	if _, err := s.Verify(ctx, fssnap.VerifyOptions{Frozen: true}); !errors.As(err, &lossy) {
		t.Errorf("verify with changes that were not to be: %v", err)
	}
	if !rig.Writable {
		for what, err := range map[string]error{
			"write":    os.WriteFile(filepath.Join(at, "top"), nil, 0o600),
			"make":     os.Mkdir(filepath.Join(at, "x"), 0o700),
			"remove":   os.Remove(filepath.Join(at, "top")),
			"setxattr": unix.Setxattr(filepath.Join(at, "a"), "user.x", nil, 0),
		} {
			if !errors.Is(err, unix.EROFS) {
				t.Errorf("%s in the view: %v", what, err)
			}
		}
	}
	if err := s.Close(ctx); err != nil {
		t.Error(err)
	}
}
