package boltlock

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestTake: who has the lock for a moment does not keep the server from it.
func TestTake(t *testing.T) {
	open := func(path string) *os.File {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	path := filepath.Join(t.TempDir(), "db")
	looker, server, third := open(path), open(path), open(path)
	fd := int(looker.Fd())
	if err := unix.Flock(fd, unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	unlocked := make(chan error)
	time.AfterFunc(20*time.Millisecond, func() { unlocked <- unix.Flock(fd, unix.LOCK_UN) })
	took := make(chan error)
	go func() { took <- Take(server) }()
	if err := <-unlocked; err != nil {
		t.Fatal(err)
	}
	if err := <-took; err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(third.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != unix.EWOULDBLOCK {
		t.Errorf("the server has no lock: %v", err)
	}
}
