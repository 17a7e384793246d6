package restore

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// childEnv tells a process that the tests start what to do; its value is the destination.
const childEnv = "HOLDFAST_RESTORE_TEST_CHILD"

// mount puts a small filesystem at dir until the test ends.
func mountTmpfs(t *testing.T, dir, size string) {
	t.Helper()
	needRoot(t)
	check(t, os.MkdirAll(dir, 0o755))
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatalf("mount: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			_ = unix.Unmount(dir, unix.MNT_DETACH)
			t.Errorf("unmount: %v", err)
		}
	})
}

// TestDiskFull: a clear error that names the file, nothing that looks whole and is not, and the
// next run goes on.
func TestDiskFull(t *testing.T) {
	top := t.TempDir()
	r := newMemRepo()
	var files []*snapshot.Node
	for i := range 40 {
		files = append(files, r.file(fmt.Sprintf("f%02d", i), strings.Repeat(fmt.Sprint(i%10), 100000)))
	}
	sn := r.plain(files...)
	mnt := filepath.Join(top, "mnt")
	mountTmpfs(t, mnt, "2m")
	_, err := restoreTo(t, r, sn, mnt, nil)
	var stop *StoppedError
	if !errors.As(err, &stop) || !errors.Is(err, unix.ENOSPC) || !strings.Contains(stop.Path, "/data/") || len(stop.Hints()) == 0 {
		t.Fatalf("got %v", err)
	}
	for _, f := range files {
		fi, err := os.Lstat(filepath.Join(mnt, "data", f.Name))
		if err == nil && fi.ModTime().Equal(f.ModTime) && uint64(fi.Size()) != f.Size {
			t.Errorf("%s is not complete and bears its time", f.Name)
		}
	}
	if !exists(filepath.Join(mnt, "data"+markerSuffix)) {
		t.Error("no marker")
	}
	check(t, unix.Mount("", mnt, "", unix.MS_REMOUNT, "size=64m"))
	res := mustRestore(t, r, sn, mnt, nil)
	for i, f := range files {
		if b, _ := os.ReadFile(filepath.Join(mnt, "data", f.Name)); string(b) != strings.Repeat(fmt.Sprint(i%10), 100000) {
			t.Errorf("%s is wrong", f.Name)
		}
	}
	if s := res.sum(); s.MovedAside != 0 {
		t.Errorf("the second run moved aside %v", s.Moved)
	}
}

// TestMountPoint: the root is a filesystem of its own, so that nothing can be renamed to beside it.
func TestMountPoint(t *testing.T) {
	top := t.TempDir()
	data := filepath.Join(top, "data")
	mountTmpfs(t, data, "8m")
	r := newMemRepo()
	sn := r.plain(r.file("f", "right"))
	mustRestore(t, r, sn, top, nil)
	write(t, filepath.Join(data, "f"), "wrong, and mine")
	write(t, filepath.Join(data, "extra"), "mine")
	for range 2 {
		res := mustRestore(t, r, sn, top, func(o *Options) { o.Overwrite = true })
		in := filepath.Join(data, ".holdfast-"+testStamp)
		if b, _ := os.ReadFile(filepath.Join(in, "f")); string(b) != "wrong, and mine" || !exists(filepath.Join(in, "extra")) {
			t.Errorf("not moved aside: %+v", res)
		}
	}
	if b, _ := os.ReadFile(filepath.Join(data, "f")); string(b) != "right" {
		t.Errorf("got %q", b)
	}
}

// child starts this test binary again to run one test as another process.
func child(t *testing.T, test, dst string, uid uint32) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	check(t, err)
	c := exec.Command(exe, "-test.run=^"+test+"$", "-test.v")
	c.Env = append(os.Environ(), childEnv+"="+dst)
	if uid != 0 {
		bin := filepath.Join(dst, "test.bin") // where that user may run it
		p, err := os.ReadFile(exe)
		check(t, err)
		check(t, os.WriteFile(bin, p, 0o755))
		c.Path, c.Args[0], c.Dir = bin, bin, dst
		c.Env = append(c.Env, "TMPDIR="+dst)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	return c
}

func killRepo() (*memRepo, *snapshot.Snapshot, []*snapshot.Node) {
	r := newMemRepo()
	var files []*snapshot.Node
	for i := range 200 {
		files = append(files, r.file(fmt.Sprintf("f%03d", i), strings.Repeat(fmt.Sprintf("%d.", i), 3000)))
	}
	return r, r.plain(files...), files
}

// TestKilled: SIGKILL at several moments; the same command goes on, and the result is exact.
func TestKilled(t *testing.T) {
	if dst := os.Getenv(childEnv); dst != "" {
		r, sn, _ := killRepo()
		r.hook = func(id.ID) { time.Sleep(time.Millisecond) }
		_, _ = restoreTo(t, r, sn, dst, nil)
		return
	}
	r, sn, files := killRepo()
	for _, after := range []int{1, 20, 80, 150} {
		dst := t.TempDir()
		c := child(t, "TestKilled", dst, 0)
		check(t, c.Start())
		deadline := time.Now().Add(20 * time.Second)
		for time.Now().Before(deadline) {
			if list, _ := os.ReadDir(filepath.Join(dst, "data")); len(list) >= after {
				break
			}
			time.Sleep(time.Millisecond)
		}
		check(t, c.Process.Kill())
		_ = c.Wait()
		if !exists(filepath.Join(dst, "data"+markerSuffix)) {
			t.Log("the child was done before it was killed")
		}
		// Another snapshot is not poured over what is half done.
		var ne *NotEmptyError
		if _, err := restoreTo(t, r, r.plain(r.file("other", "x")), dst, nil); !errors.As(err, &ne) {
			t.Errorf("got %v", err)
		}
		res := mustRestore(t, r, sn, dst, func(o *Options) { o.TrustTimes = true; o.Overwrite = !exists(filepath.Join(dst, "data"+markerSuffix)) })
		for i, f := range files {
			if b, _ := os.ReadFile(filepath.Join(dst, "data", f.Name)); string(b) != strings.Repeat(fmt.Sprintf("%d.", i), 3000) {
				t.Errorf("killed after %d files: %s is wrong", after, f.Name)
			}
		}
		if exists(filepath.Join(dst, "data"+markerSuffix)) || len(res.Aside) != 0 {
			t.Errorf("left behind: %v", res.Aside)
		}
	}
}

// TestNotRoot: without rights everything but owners and devices comes back, and that is said once.
func TestNotRoot(t *testing.T) {
	if dst := os.Getenv(childEnv); dst != "" {
		r := newMemRepo()
		var nodes []*snapshot.Node
		for i := range 5 {
			f := r.file(fmt.Sprint("f", i), "content")
			f.UID, f.GID = 12, 34
			nodes = append(nodes, f)
		}
		suid := r.file("suid", "s")
		suid.Mode |= os.ModeSetuid
		closed := r.folder("closed", r.file("in", "x"), r.folder("sub", r.file("deep", "y")))
		closed.Mode = os.ModeDir | 0o500
		none := r.folder("none", r.file("in", "x"))
		none.Mode = os.ModeDir
		nodes = append(nodes, suid, closed, none,
			&snapshot.Node{Name: "null", Type: snapshot.CharDev, Device: 259, Mode: 0o666}, &snapshot.Node{Name: "sock", Type: snapshot.Socket, Mode: 0o600, UID: 2000, GID: 2000})
		sn := r.plain(nodes...)
		for _, overwrite := range []bool{false, true} {
			res := mustRestore(t, r, sn, dst, func(o *Options) { o.Overwrite = overwrite })
			if len(res.Warnings) != 2 || !strings.Contains(strings.Join(res.Warnings, "\n"), "owners") {
				t.Errorf("warnings: %q", res.Warnings)
			}
			for name, mode := range map[string]os.FileMode{"suid": 0o644, "closed": 0o500 | os.ModeDir, "none": os.ModeDir, "f0": 0o644} {
				fi, err := os.Stat(filepath.Join(dst, "data", name))
				if err != nil || fi.Mode() != mode {
					t.Errorf("%s: %v, %v", name, fi.Mode(), err)
				}
			}
			if b, _ := os.ReadFile(filepath.Join(dst, "data/closed/sub/deep")); string(b) != "y" {
				t.Error("content of a folder without write permission is missing")
			}
			if exists(filepath.Join(dst, "data/null")) || !exists(filepath.Join(dst, "data/sock")) {
				t.Error("device or socket")
			}
		}
		_, err := restoreTo(t, r, sn, "/proc/nowhere", nil)
		if err == nil {
			t.Error("no error for a place that nothing can be written to")
		}
		return
	}
	needRoot(t)
	dst := onDisk(t)
	check(t, os.Chown(dst, 2000, 2000))
	out, err := child(t, "TestNotRoot", dst, 2000).CombinedOutput()
	if err != nil || strings.Contains(string(out), "no tests to run") {
		t.Fatalf("%v\n%s", err, out)
	}
}

// TestRealRepository: the same through packs, index and encryption.
func TestRealRepository(t *testing.T) {
	needRoot(t)
	src := onDisk(t)
	makeInstance(t, src)
	m := newMemRepo()
	sn := m.instance(src)
	be := mem.New()
	r, err := repo.Init(t.Context(), be, "secret", repo.InitOptions{KDF: repo.KDF{N: 1024, R: 1, P: 1}})
	check(t, err)
	w := r.NewWriter(t.Context())
	for typ, blobs := range m.blobs {
		for _, p := range blobs {
			_, _, err := w.Save(t.Context(), repo.BlobType(typ), p)
			check(t, err)
		}
	}
	check(t, w.Flush(t.Context()))
	if r, err = repo.Open(t.Context(), be, "secret", repo.Options{}); err != nil {
		t.Fatal(err)
	}
	check(t, r.LoadIndex(t.Context()))
	dst := onDisk(t)
	mustRestore(t, r, sn, dst, nil)
	compare(t, src, dst)
	mustRestore(t, r, sn, dst, func(o *Options) { o.Overwrite = true })
	compare(t, src, dst)
}
