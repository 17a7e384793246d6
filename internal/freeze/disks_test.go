package freeze

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestUnmountedDisk: an instance whose disk is not there is neither given up nor started on an empty
// folder; one that was removed from its disk is given up.
func TestUnmountedDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	mnt, stateDir, started := filepath.Join(dir, "mnt"), filepath.Join(dir, "state"), filepath.Join(dir, "started")
	base := filepath.Join(mnt, "data")
	mount := func(source string) {
		t.Helper()
		if err := unix.Mount(source, mnt, "tmpfs", 0, "size=1m"); err != nil {
			t.Fatal(err)
		}
	}
	unmount := func() {
		t.Helper()
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Fatal(err)
		}
	}
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	do(os.Mkdir(mnt, 0o755))
	mount("disk-of-the-instance")
	t.Cleanup(func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) })
	do(os.Mkdir(base, 0o755))
	do(os.WriteFile(filepath.Join(base, "file"), nil, 0o600))

	files, err := openState(stateDir, base)
	do(err)
	record := state{
		Version: stateVersion, BasePath: Text(base), Method: "command", Since: time.Now(), Reported: true,
		Recipe: Recipe{Kind: KindCommand, Paths: []string{base}, Command: &CommandRecipe{Start: Text("touch " + started), Dir: "/"}},
		Disks:  disksOf([]string{base, base}),
	}
	if len(record.Disks) != 1 || string(record.Disks[0].Point) != mnt {
		t.Fatalf("disks %+v", record.Disks)
	}
	do(files.write(record))
	kept := func(when string) {
		t.Helper()
		r, err := Recover(background(), stateDir)
		var hints interface{ Hints() []string }
		if !errors.Is(err, ErrNotStarted) || !strings.Contains(err.Error(), "disk-of-the-instance (tmpfs) at "+mnt) ||
			!errors.As(err, &hints) || len(r) != 1 || r[0].Gone || !r[0].Started.IsZero() {
			t.Errorf("%s: %+v, %v", when, r, err)
		}
		if _, err := os.Lstat(files.record()); err != nil {
			t.Errorf("%s: the record: %v", when, err)
		}
		if _, err := os.Lstat(started); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: it was started: %v", when, err)
		}
	}
	unmount()
	kept("not mounted")
	do(os.Mkdir(base, 0o755))
	kept("not mounted, an empty folder in its place")
	do(os.Remove(base))
	mount("another-disk")
	kept("another disk in its place")
	unmount()

	mount("disk-of-the-instance")
	r, err := Recover(background(), stateDir)
	if err != nil || len(r) != 1 || !r[0].Gone {
		t.Errorf("removed from its disk: %+v, %v", r, err)
	}

	// It is there again: started, whatever it lies on.
	unmount()
	do(files.write(record))
	do(os.Mkdir(base, 0o755))
	do(os.WriteFile(filepath.Join(base, "file"), nil, 0o600))
	if r, err = Recover(background(), stateDir); err != nil || len(r) != 1 || r[0].Started.IsZero() {
		t.Errorf("moved to another disk: %+v, %v", r, err)
	}
	if _, err := os.Lstat(started); err != nil {
		t.Error(err)
	}
}
