package fssnap

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/statedir"
)

// State says what is to become of a view that was found.
type State string

// The states of a view.
const (
	// Live: a run that uses it lives.
	Live State = "live"
	// Kept: it stays until newer ones replace it.
	Kept State = "kept"
	// Leftover: its run was killed.
	Leftover State = "leftover"
	// Orphan: no record knows it. It may belong to another machine that shares the filesystem, or to a
	// Holdfast with another state directory, so it is removed only on demand.
	Orphan State = "orphan"
)

// Found is a view on a filesystem, or one that is on record.
type Found struct {
	View
	State State
	// Label is that of the set, "" for orphans.
	Label string
	PID   int // of the run that made it, 0 if unknown
}

// FindOptions say where to look for views.
type FindOptions struct {
	// StateDir is where the records are; "" is statedir.Default.
	StateDir string
	// Roots are directories to look at on filesystems that cannot be searched (CephFS).
	Roots []string
	// Orphans lets RemoveLeftovers remove the orphans, too.
	Orphans bool
}

// Find lists all views of Holdfast that the drivers can see, the oldest first. What could not be
// looked at is an error beside the list.
func Find(ctx context.Context, drivers []Driver, o FindOptions) ([]Found, error) {
	files, err := listRecords(o.StateDir)
	if err != nil {
		return nil, err
	}
	type known struct {
		record
		state State
	}
	sets := map[string]known{}
	roots := slices.Clone(o.Roots)
	var errs []error
	for _, f := range files {
		r, err := f.read()
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			errs = append(errs, err)
			sets[f.name] = known{state: Live} // whoever can read it shall decide
			continue
		}
		k := known{r, Leftover}
		switch {
		case r.Kept: // first: to look whether it lives would disturb OpenKept
			k.state = Kept
		case f.live():
			k.state = Live
		}
		sets[f.name] = k
		for _, s := range r.Sources {
			roots = append(roots, s.Wanted()...)
		}
	}
	var list []Found
	for _, d := range drivers {
		views, err := d.List(ctx, roots...)
		if err != nil {
			errs = append(errs, fmt.Errorf("look for %s views: %w", d.Kind(), err))
		}
		for _, v := range views {
			found := Found{View: v, State: Orphan}
			if k, ok := sets[v.Set()]; ok {
				found.State, found.Label, found.PID = k.state, k.Label, k.PID
			}
			list = append(list, found)
		}
	}
	slices.SortStableFunc(list, func(a, b Found) int { return a.MadeAt.Compare(b.MadeAt) })
	return list, errors.Join(errs...)
}

// Leftovers lists the views of killed runs, and the orphans.
func Leftovers(ctx context.Context, drivers []Driver, o FindOptions) ([]Found, error) {
	list, err := Find(ctx, drivers, o)
	return slices.DeleteFunc(list, func(f Found) bool { return f.State != Leftover && f.State != Orphan }), err
}

// RemoveLeftovers removes the views, mounts and records of killed runs, and with FindOptions.Orphans
// also views that no record knows. It returns what it removed. Without records, and without Orphans,
// it costs one look at a directory.
func RemoveLeftovers(ctx context.Context, drivers []Driver, o FindOptions) ([]View, error) {
	files, err := listRecords(o.StateDir)
	if err != nil {
		return nil, err
	}
	var removed []View
	var errs []error
	for _, f := range files {
		r, err := f.read()
		if errors.Is(err, fs.ErrNotExist) {
			r = record{} // killed between the lock and the record
		} else if err != nil {
			errs = append(errs, err)
			continue
		}
		if r.Kept {
			continue
		}
		lock, err := f.acquire()
		if errors.Is(err, statedir.ErrLocked) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		// Only now is it certain that nobody else is at it: look again.
		r, err = f.read()
		switch {
		case errors.Is(err, fs.ErrNotExist):
			// Killed before the record was written, so before any view was made; or closed just now.
			errs = append(errs, f.remove())
		case err != nil:
			errs = append(errs, err)
		case !r.Kept:
			errs = append(errs, removeSet(ctx, drivers, f, r, &removed))
		}
		lock.Close()
	}
	if o.Orphans {
		list, err := Find(ctx, drivers, o)
		errs = append(errs, err)
		for _, v := range list {
			if v.State == Orphan {
				err := remove(ctx, drivers, v.View)
				if err == nil {
					removed = append(removed, v.View)
				}
				errs = append(errs, err)
			}
		}
	}
	return removed, errors.Join(errs...)
}

// KeptSet is a set of views that Close had kept.
type KeptSet struct {
	Name   string
	Label  string
	MadeAt time.Time
}

// ListKept lists the kept sets on record, the oldest first. Records that cannot be read are an error
// beside the list.
func ListKept(stateDir string) ([]KeptSet, error) {
	files, err := listRecords(stateDir)
	if err != nil {
		return nil, err
	}
	var list []KeptSet
	var errs []error
	for _, f := range files {
		r, err := f.read()
		switch {
		case errors.Is(err, fs.ErrNotExist): // only a lock, or closed just now
		case err != nil:
			errs = append(errs, err)
		case r.Kept:
			list = append(list, KeptSet{r.Name, r.Label, r.MadeAt})
		}
	}
	slices.SortStableFunc(list, func(a, b KeptSet) int { return a.MadeAt.Compare(b.MadeAt) })
	return list, errors.Join(errs...)
}

// RemoveKept removes a kept set by its name.
//
// Errors: fs.ErrNotExist if there is none; it is in use.
func RemoveKept(ctx context.Context, drivers []Driver, name string, o FindOptions) error {
	dir, err := statedir.Path(o.StateDir, viewsSub)
	if err != nil {
		return err
	}
	if _, ok := ParseName(name); !ok || strings.Contains(name, ".") {
		return fmt.Errorf("%q is not the name of a set of views; holdfast views lists them", name)
	}
	f := recordFiles{dir, name}
	if _, err := f.read(); err != nil {
		return fmt.Errorf("remove the views %s: %w", name, err)
	}
	lock, err := f.acquire()
	if err != nil {
		return fmt.Errorf("remove the views %s: %w", name, err)
	}
	defer lock.Close()
	r, err := f.read()
	if err != nil {
		return fmt.Errorf("remove the views %s: %w", name, err)
	}
	if !r.Kept {
		return fmt.Errorf("the views %s are not kept; holdfast views --remove removes what killed runs left", name)
	}
	return removeSet(ctx, drivers, f, r, nil)
}

// removeOldKept removes all but the last o.KeepLast kept sets of a label.
func removeOldKept(ctx context.Context, drivers []Driver, o Options) error {
	files, err := listRecords(o.StateDir)
	if err != nil {
		return err
	}
	var kept []record
	for _, f := range files {
		if r, err := f.read(); err == nil && r.Kept && r.Label == o.Label {
			kept = append(kept, r)
		}
	}
	slices.SortFunc(kept, func(a, b record) int { return a.MadeAt.Compare(b.MadeAt) })
	var errs []error
	for _, r := range kept[:max(0, len(kept)-o.KeepLast)] {
		errs = append(errs, RemoveKept(ctx, drivers, r.Name, FindOptions{StateDir: o.StateDir}))
	}
	return errors.Join(errs...)
}

// removeSet removes all views of a set, known or found, its mounts, and then its record. The caller
// holds the lock. What was found and removed is added to removed.
func removeSet(ctx context.Context, drivers []Driver, f recordFiles, r record, removed *[]View) error {
	var errs []error
	var roots []string
	var kinds []string
	for _, s := range r.Sources {
		roots = append(roots, s.Wanted()...)
		if !slices.Contains(kinds, s.Kind) {
			kinds = append(kinds, s.Kind)
		}
	}
	// The pictures of what was mounted below the data are mounted in the outer ones, and keep each other
	// busy.
	for _, v := range r.Views {
		if v.Path != "" {
			errs = append(errs, UnmountBelow(v.Path))
		}
	}
	for _, kind := range kinds {
		i := slices.IndexFunc(drivers, func(d Driver) bool { return d.Kind() == kind })
		if i < 0 {
			errs = append(errs, fmt.Errorf("the %s views of %s stay, because no driver for them is configured", kind, r.Name))
			continue
		}
		d := drivers[i]
		var views []View
		for _, v := range r.Views {
			if v.Kind == kind {
				views = append(views, v)
			}
		}
		if len(views) == 0 || removed != nil {
			// The run died, or failed, before it wrote down what it made.
			list, err := d.List(ctx, roots...)
			if err != nil {
				errs = append(errs, fmt.Errorf("look for %s views: %w", kind, err))
			}
			for _, v := range list {
				known := slices.ContainsFunc(views, func(o View) bool { return o.Name == v.Name && o.Source == v.Source })
				if v.Set() == r.Name && !known {
					views = append(views, v)
				}
			}
		}
		for _, v := range slices.Backward(views) { // what is nested comes later in the list
			err := remove(ctx, drivers, v)
			if err == nil && removed != nil {
				*removed = append(*removed, v)
			}
			errs = append(errs, err)
		}
	}
	errs = append(errs, removeMountPoints(f))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%w; holdfast views --remove tries again", err)
	}
	return f.remove()
}

// removeMountPoints takes away what drivers that were killed left below the state directory.
func removeMountPoints(f recordFiles) error {
	dir := filepath.Join(f.dir, "mnt")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if (View{Name: e.Name()}).Set() == f.name {
			errs = append(errs, RemoveMountPoint(filepath.Dir(f.dir), e.Name()))
		}
	}
	return errors.Join(errs...)
}

func remove(ctx context.Context, drivers []Driver, v View) error {
	for _, d := range drivers {
		if d.Kind() != v.Kind {
			continue
		}
		if v.Path != "" {
			if err := UnmountBelow(v.Path); err != nil {
				return err
			}
		}
		if err := d.Remove(ctx, v); err != nil {
			return fmt.Errorf("remove the %s view %s of %s: %w", v.Kind, v.Name, v.Source, err)
		}
		return nil
	}
	return fmt.Errorf("the %s view %s of %s stays, because no driver for it is configured", v.Kind, v.Name, v.Source)
}
