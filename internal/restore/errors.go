package restore

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// NotEmptyError is returned when a destination holds something and Options.Overwrite is not set.
type NotEmptyError struct {
	// Paths are the destinations that are not empty.
	Paths []string
	// Markers are files that an earlier, unfinished restore of another snapshot left behind.
	Markers []string
}

func (e *NotEmptyError) Error() string {
	return "destination is not empty: " + strings.Join(e.Paths, ", ")
}

// Hints says what to do next.
func (e *NotEmptyError) Hints() []string {
	h := []string{
		"Choose an empty place with --base-data-path and --config-dir, or",
		"use --overwrite: only what differs is written, and what is in the way is moved into a dated folder beside it.",
	}
	for _, m := range e.Markers {
		h = append(h, m+" tells that a restore of another snapshot into this place was not finished.")
	}
	return h
}

// NoSpaceError is returned when a filesystem has not enough room for what is to be written.
type NoSpaceError struct {
	Path   string // a destination on that filesystem
	Needed int64  // bytes
	Free   int64  // bytes
	// NeededInodes and FreeInodes are set where inodes are what is short.
	NeededInodes, FreeInodes int64
}

func (e *NoSpaceError) Error() string {
	if e.NeededInodes > 0 {
		return fmt.Sprintf("no room at %s: %d files and folders have to be made, %d inodes are free", e.Path, e.NeededInodes, e.FreeInodes)
	}
	return fmt.Sprintf("no room at %s: %d bytes are needed, %d are free", e.Path, e.Needed, e.Free)
}

// Hints says what to do next.
func (e *NoSpaceError) Hints() []string {
	return []string{"Make room, or restore to another filesystem with --base-data-path or --map."}
}

// UnmappedError is returned when a restore to another place would put a data set back at its old
// one, because that lies outside the paths that were mapped.
type UnmappedError struct{ DataSet, Path string }

func (e *UnmappedError) Error() string {
	return fmt.Sprintf("data set %s lay at %s, and nothing says where it is to go", e.DataSet, e.Path)
}

// Hints says what to do next.
func (e *UnmappedError) Hints() []string {
	return []string{
		fmt.Sprintf("Add --map %s=NEW, or --map %s=%s to put it back at its old place.", e.Path, e.Path, e.Path),
	}
}

// IncompleteError is returned when the run reached its end and single entries could not be
// restored.
type IncompleteError struct {
	// Errors are the first of them; Count is the number of all.
	Errors []error
	Count  int64
	// Marker is the file that says so to the next run; "" if none was left.
	Marker string
}

func (e *IncompleteError) Error() string {
	if e.Count == 1 && len(e.Errors) == 1 {
		return "one entry was not restored: " + e.Errors[0].Error()
	}
	s := fmt.Sprintf("%d entries were not restored", e.Count)
	if len(e.Errors) > 0 {
		s += ", the first: " + e.Errors[0].Error()
	}
	return s
}

// Unwrap gives the single errors to errors.Is and errors.As.
func (e *IncompleteError) Unwrap() []error { return e.Errors }

// Hints says what to do next.
func (e *IncompleteError) Hints() []string {
	h := []string{"Everything else is in place."}
	if e.Marker != "" {
		h = append(h, "Once the cause is removed, run the same restore again: it goes on where it is needed.",
			"If you accept the result as it is, delete "+e.Marker+".")
	}
	return h
}

// StoppedError is returned when the run could not go on, e.g. because the disk is full.
type StoppedError struct {
	Path string
	Err  error
}

func (e *StoppedError) Error() string { return fmt.Sprintf("restore stopped at %q: %v", e.Path, e.Err) }
func (e *StoppedError) Unwrap() error { return e.Err }

// Hints says what to do next.
func (e *StoppedError) Hints() []string {
	if errors.Is(e.Err, unix.ENOSPC) || errors.Is(e.Err, unix.EDQUOT) {
		return []string{"Make room and run the same restore again: it goes on where it stopped."}
	}
	return []string{"Run the same restore again once the cause is removed: it goes on where it stopped."}
}

// ErrRefused is wrapped in the error for an entry of the snapshot that would reach outside the
// destination or is no sound entry. Nothing of it was restored.
var ErrRefused = errors.New("refused")

func refused(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrRefused, fmt.Sprintf(format, args...))
}

// isFatal reports whether err makes every further write pointless.
func isFatal(err error) bool {
	for _, e := range []unix.Errno{unix.ENOSPC, unix.EDQUOT, unix.EROFS, unix.EIO, unix.EMFILE, unix.ENFILE, unix.ENOMEM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
