// Package fssnap makes still views of directories with what their filesystems offer: snapshots of
// btrfs, ZFS, LVM and CephFS, or commands of the user.
//
// Start at NewSet: it takes the paths of an instance, finds out which filesystems they lie on, and
// tells what cannot be held still. Set.Create then makes all views at once, Set.Translate says where
// to read, Set.Verify compares view and source, Set.Close removes the views or keeps the last few.
//
// Promises: a view that is made is never forgotten. A record is on disk before the first view is, and
// the name of each view is a pattern that its driver finds again, so RemoveLeftovers gets rid of what
// killed runs left behind. The views of a run that lives, kept views, and views that no record knows
// are left alone.
package fssnap

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"
)

// ErrNotSupported is returned when a driver cannot hold a path still. The text says why.
var ErrNotSupported = errors.New("no still view possible")

// ErrGone is returned by Check and Open when there is no such view any more.
var ErrGone = errors.New("the view is gone")

// A Driver makes views of one kind of filesystem. It is safe for use by one goroutine at a time.
type Driver interface {
	// Kind is btrfs, zfs, lvm, cephfs or command.
	Kind() string
	// Probe tells what would have to be held still for path, which may be a directory or a file and
	// must exist. It changes nothing.
	//
	// Errors: ErrNotSupported, with the reason, if this driver cannot do it.
	Probe(ctx context.Context, path string) (Source, error)
	// Create makes one view per source, in the order of sources, as nearly at one instant as the
	// filesystem allows: see View.Transaction. name is that of the set, from NewName. When it fails,
	// what it had made is removed again.
	Create(ctx context.Context, name string, sources []Source) ([]View, error)
	// Open makes the picture readable again, for instance mounts it after a restart of the machine,
	// and returns the view with its Path.
	//
	// Errors: ErrGone.
	Open(ctx context.Context, v View) (View, error)
	// Check tells whether the view is still whole. Some overflow while they are read.
	//
	// Errors: ErrGone; *BrokenError.
	Check(ctx context.Context, v View) error
	// List finds all views that Holdfast made, by the pattern of their names, without the help of a
	// record where the filesystem can be searched. roots are directories to look at where it cannot.
	List(ctx context.Context, roots ...string) ([]View, error)
	// Remove takes away the view, its mounts and directories. That there is none is no error.
	Remove(ctx context.Context, v View) error
}

// A Source is what a driver holds still as a whole: a subvolume, a dataset, a volume.
type Source struct {
	Kind string `json:"kind"`
	// Name is the driver's name for it, the same for all paths that lie on it.
	Name string `json:"name"`
	// Root is where its top can be seen, "" if it is not mounted as a whole.
	Root string `json:"root,omitempty"`
	// Path is the path that was asked for, without symbolic links; Rel is its place below the top,
	// "." for the top itself.
	Path string `json:"path"`
	Rel  string `json:"rel"`
	// Paths are all the paths that are wanted of it; a Set fills it in. Empty means Path alone.
	Paths []string `json:"paths,omitempty"`
}

// Wanted returns the paths that are wanted of the source.
func (s Source) Wanted() []string {
	if len(s.Paths) == 0 {
		return []string{s.Path}
	}
	return s.Paths
}

// A View is a still picture of a source.
type View struct {
	Kind string `json:"kind"`
	// Name is the name of the set, and ".N" where the filesystem needs a name for each view.
	Name string `json:"name"`
	// Source is the name of the source. Of a view that was found, it is what could be found out.
	Source string `json:"source"`
	// Path is where the picture of the source's top can be read, "" if it is mounted nowhere.
	Path string `json:"path,omitempty"`
	// MadeAt is no later than the instant of the picture, by less than a few seconds; UTC. Of a view
	// that was found, it may come from the name, in whole seconds.
	MadeAt time.Time `json:"made_at"`
	// Size is what the view takes on its filesystem by now, in bytes; 0 if unknown.
	Size int64 `json:"size,omitempty"`
	// Transaction is the same for views that are of the very same instant.
	Transaction string `json:"transaction,omitempty"`
	// Broken says what is wrong with a view that can no longer be trusted.
	Broken string `json:"broken,omitempty"`
}

// Set returns the name of the set that the view is part of.
func (v View) Set() string {
	name, _, _ := strings.Cut(v.Name, ".")
	return name
}

// A BrokenError is returned when a view can no longer be trusted.
type BrokenError struct {
	View string
	Why  string
}

func (e *BrokenError) Error() string {
	return fmt.Sprintf("the view %s cannot be used any more: %s", e.View, e.Why)
}

var namePattern = regexp.MustCompile(`^holdfast-([0-9]{8}T[0-9]{6}Z)-[0-9a-f]{6}(\.[0-9]{1,6})?$`)

const nameTime = "20060102T150405Z"

// NewName returns a name for a set of views made at now: holdfast-, the time in UTC, six random
// hexadecimal digits.
func NewName(now time.Time) string {
	var b [3]byte
	_, _ = rand.Read(b[:]) // never fails
	return "holdfast-" + now.UTC().Format(nameTime) + "-" + hex.EncodeToString(b[:])
}

// ParseName tells whether name is that of a set or of a view, and when it was made.
func ParseName(name string) (made time.Time, ok bool) {
	m := namePattern.FindStringSubmatch(name)
	if m == nil {
		return time.Time{}, false
	}
	made, err := time.Parse(nameTime, m[1])
	return made, err == nil
}

// Unsupported makes an error that is ErrNotSupported.
func Unsupported(format string, args ...any) error {
	return &unsupported{fmt.Errorf(format, args...)}
}

type unsupported struct{ why error }

func (e *unsupported) Error() string        { return e.why.Error() }
func (e *unsupported) Unwrap() error        { return e.why }
func (e *unsupported) Is(target error) bool { return target == ErrNotSupported }
