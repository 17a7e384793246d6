package fssnaptest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/fssnap"
)

// ZFSFuse starts the daemon and makes a pool on a file, until the test ends. It returns the pool's name
// and where its top dataset is mounted. There can be one daemon on a machine: it waits for its turn.
func ZFSFuse(t testing.TB) (pool, top string) {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"/var/run/zfs", "/var/lock/zfs"} { // of the daemon's socket and lock
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	turn, err := os.Open("/var/lock/zfs")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { turn.Close() })
	if err := syscall.Flock(int(turn.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if _, err := fssnap.Run(context.Background(), "zpool", "list"); err == nil {
		t.Fatal("there is a ZFS already, and zfs-fuse cannot run beside it; stop zfs-fuse, or run the tests elsewhere")
	}
	cmd := exec.Command("/usr/sbin/zfs-fuse", "--no-daemon", "--no-kstat-mount", "--enable-xattr")
	if _, err := os.Stat(cmd.Path); err != nil {
		cmd.Path = "/sbin/zfs-fuse"
	}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v; install the package zfs-fuse", err)
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	pool, top = fmt.Sprintf("hftest%d", os.Getpid()), filepath.Join(dir, "pool")
	t.Cleanup(func() {
		for try := 0; ; try++ { // what was unmounted is let go of a little later
			_, err := fssnap.Run(context.Background(), "zpool", "destroy", "-f", pool)
			if err == nil {
				break
			}
			if try == 50 {
				t.Error(err)
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-exited:
		case <-time.After(10 * time.Second):
			_ = cmd.Process.Kill()
			<-exited
			t.Error("zfs-fuse had to be killed")
		}
		if err := fssnap.Unmount(dir); err != nil {
			t.Error(err)
		}
		_ = os.Remove("/var/run/zfs/zfs_socket") // which it leaves
	})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		_, err := fssnap.Run(context.Background(), "zpool", "list")
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("zfs-fuse does not answer: %v: %s", err, out.String())
		}
	}
	image := filepath.Join(dir, "vdev")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 100<<20); err != nil {
		t.Fatal(err)
	}
	Tool(t, "zpool", "create", "-m", top, pool, image)
	return pool, top
}
