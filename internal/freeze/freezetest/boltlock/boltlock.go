// Package boltlock is how the servers of the tests lock their database.
package boltlock

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// patience is the time that Take waits. bbolt has no end unless it is told one.
const patience = 5 * time.Second

// Take takes the lock of an open database the way bbolt does, which tries again every 50 ms: whoever
// looks whether a server runs has the lock for a moment, and a server that gave up at once would now and
// then not come up.
//
// Errors: those of flock(2), EWOULDBLOCK if somebody else has it for longer than 5 s.
func Take(db *os.File) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		err := unix.Flock(int(db.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) || !time.Now().Before(deadline) {
			return err
		}
	}
}
