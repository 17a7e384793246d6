// Package btrfs makes views by read-only snapshots of btrfs subvolumes, with system calls alone.
package btrfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/btrfsctl"
	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/mountinfo"
)

// Options are those of a Driver. The zero value refuses nested subvolumes.
type Options struct {
	// IncludeNested takes along the subvolumes below the data: each gets a snapshot of its own, in its
	// place in the picture. These are made one after the other.
	IncludeNested bool
	// StateDir is where views are mounted that can be seen nowhere else; "" is the default.
	StateDir string
}

// Driver makes views of btrfs subvolumes. The data may be a subvolume, or lie anywhere in one.
//
// It promises: the picture is read-only, holds all that was written before Create was called, and is
// of one instant for each subvolume; several subvolumes are taken one after the other. A subvolume
// below the data is not part of a snapshot, so it is refused by name or, on demand, put in. Where a
// snapshot must be kept within the data itself (the data is the very top of the filesystem), the
// directory for it is taken out of the picture, and the top keeps its mtime.
//
// The snapshots lie in .holdfast-views, which only root may enter, at the top of the mount of the data
// if the data is not that top itself; else at the top of the filesystem, and the view is mounted below
// the state directory. Views are found in the filesystem's own list of subvolumes, whether something
// shows them or not.
//
// It needs root. All of it runs for real in the tests, on a loop device, but for kernels before 5.7,
// which need the view to be visible to remove it.
type Driver struct{ o Options }

// New returns a driver.
func New(o Options) *Driver { return &Driver{o} }

// Kind is btrfs.
func (*Driver) Kind() string { return "btrfs" }

// A NestedError is the ErrNotSupported for data below which there are other subvolumes.
type NestedError struct {
	Path   string
	Nested []string // the subvolumes, as paths
}

func (e *NestedError) Error() string {
	return fmt.Sprintf("below %s lie the subvolumes %s, which a snapshot would leave out; make them plain directories, or have nested subvolumes included",
		e.Path, strings.Join(e.Nested, ", "))
}

// Is makes it an ErrNotSupported.
func (e *NestedError) Is(target error) bool { return target == fssnap.ErrNotSupported }

// volume is a mounted filesystem.
type volume struct {
	device string // as in mountinfo
	mounts []mountinfo.Mount
	table  mountinfo.Table
	dir    *os.File // any directory of it, of a writable mount if there is one
	subs   map[uint64]*subvolume
}

func (v *volume) close() { v.dir.Close() }

// openVolume opens the filesystem with a device number of mountinfo.
func openVolume(t mountinfo.Table, number string) (*volume, error) {
	v := &volume{table: t}
	for _, m := range t {
		if m.Type == "btrfs" && m.Device == number && fssnap.Visible(t, m) {
			v.mounts = append(v.mounts, m)
		}
	}
	slices.SortStableFunc(v.mounts, func(a, b mountinfo.Mount) int {
		switch ra, rb := fssnap.ReadOnly(a), fssnap.ReadOnly(b); {
		case ra == rb:
			return 0
		case rb:
			return -1
		}
		return 1
	})
	err := error(unix.ENOENT)
	for _, m := range v.mounts {
		if v.dir, err = openDir(m.Point); err == nil {
			v.device = m.Source
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open the btrfs filesystem %s: %w", number, err)
	}
	if v.subs, err = subvolumes(int(v.dir.Fd())); err != nil {
		v.close()
		return nil, err
	}
	return v, nil
}

func openDir(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// openIn opens a directory below dir, by no symbolic link.
func openIn(dir *os.File, name string) (*os.File, error) {
	fd, err := unix.Openat2(int(dir.Fd()), name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: filepath.Join(dir.Name(), name), Err: err}
	}
	return os.NewFile(uintptr(fd), filepath.Join(dir.Name(), name)), nil
}

// see opens the directory at a path of the filesystem by some mount that shows it. It must be in the
// given subvolume.
func (v *volume) see(inner string, id uint64) (*os.File, error) {
	for _, m := range v.mounts {
		below, err := fssnap.Rel(inner, m.Root)
		if err != nil {
			continue
		}
		d, err := openDir(filepath.Join(m.Point, below))
		if err != nil {
			continue
		}
		if got, err := subvolumeOf(int(d.Fd())); err == nil && got == id && v.here(d) {
			return d, nil
		}
		d.Close()
	}
	return nil, unix.ENOENT
}

// here tells whether an open directory is on this filesystem: numbers of subvolumes are the same on
// others.
func (v *volume) here(d *os.File) bool {
	p, err := fssnap.Locate(d.Name())
	return err == nil && slices.ContainsFunc(v.mounts, func(m mountinfo.Mount) bool { return m.Device == p.Mount.Device })
}

// open opens the top of a subvolume, which need not be visible.
func (v *volume) open(s *subvolume) (*os.File, error) {
	if d, err := v.see(s.path, s.id); err == nil {
		return d, nil
	}
	return mountDetached(v.device, s.id)
}

// placed is where a source lies.
type placed struct {
	*volume
	sub *subvolume
	// The wanted paths within the filesystem, and the mounts by which they are reached.
	inner  []string
	mounts []mountinfo.Mount
}

// find locates what is wanted of a source. The caller closes the volume.
func (d *Driver) find(paths []string) (*placed, error) {
	var p *placed
	for _, path := range paths {
		at, err := fssnap.Locate(path)
		if err == nil && at.Mount.Type != "btrfs" {
			err = &fssnap.OtherFilesystem{Path: path, Filesystem: at.Mount.Type}
		}
		if err == nil && p == nil {
			var v *volume
			if v, err = openVolume(at.Table, at.Mount.Device); err == nil {
				p = &placed{volume: v}
				err = p.identify(at)
			}
		}
		if err != nil {
			if p != nil {
				p.close()
			}
			if errors.Is(err, unix.EPERM) {
				return nil, fssnap.Unsupported("only root can make and find snapshots of btrfs: %w", err)
			}
			return nil, err
		}
		p.inner, p.mounts = append(p.inner, at.Inner), append(p.mounts, at.Mount)
	}
	return p, nil
}

func (p *placed) identify(at fssnap.Place) error {
	dir := at.Path
	if !at.Dir {
		dir = filepath.Dir(dir)
	}
	f, err := openDir(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	id, err := subvolumeOf(int(f.Fd()))
	if err != nil {
		return fmt.Errorf("find the subvolume of %s: %w", dir, err)
	}
	p.sub = p.subs[id]
	if p.sub == nil || !mountinfo.Below(at.Inner, p.sub.path) {
		return fssnap.Unsupported("%s lies on a btrfs subvolume (%d) that cannot be found from the top of its filesystem", at.Path, id)
	}
	return nil
}

// nested lists the subvolumes below the wanted paths that a walk would enter. Those that are hidden by
// a mount are another one's part.
func (p *placed) nested() []*subvolume {
	var list []*subvolume
	for _, s := range p.subs {
		if !strings.Contains(s.path+"/", "/"+fssnap.ViewsDir+"/") && slices.ContainsFunc(p.shownBelow(s), func(b bool) bool { return b }) {
			list = append(list, s)
		}
	}
	slices.SortFunc(list, func(a, b *subvolume) int { return strings.Compare(a.path, b.path) })
	return list
}

// shownBelow tells for each wanted path whether the subvolume can be seen strictly below it.
func (p *placed) shownBelow(s *subvolume) []bool {
	shown := make([]bool, len(p.inner))
	for i, inner := range p.inner {
		below, err := fssnap.Rel(s.path, p.mounts[i].Root)
		if err != nil || s.path == inner || !mountinfo.Below(s.path, inner) {
			continue
		}
		on, ok := p.table.Find(filepath.Join(p.mounts[i].Point, below))
		shown[i] = ok && on.ID == p.mounts[i].ID
	}
	return shown
}

// lodging is where a snapshot is to be put.
type lodging struct {
	parent *os.File // the directory that has .holdfast-views
	path   string   // of parent, "" if nothing shows it
	within bool     // it is the data
}

// lodge finds a place for the snapshot: outside of the data if that can be.
func (p *placed) lodge() (*lodging, error) {
	var writable []mountinfo.Mount
	for _, m := range p.volume.mounts {
		if mountinfo.Below(p.inner[0], m.Root) && !fssnap.ReadOnly(m) {
			writable = append(writable, m)
		}
	}
	if len(writable) == 0 {
		return nil, fssnap.Unsupported("%s is mounted read-only, so there is no place for a btrfs snapshot", p.mounts[0].Point)
	}
	// The mount by which the data is reached first, then others by their order.
	slices.SortStableFunc(writable, func(a, b mountinfo.Mount) int {
		switch p.mounts[0].ID {
		case a.ID:
			return -1
		case b.ID:
			return 1
		}
		return 0
	})
	isData := func(inner string) bool {
		return slices.ContainsFunc(p.inner, func(data string) bool { return mountinfo.Below(inner, data) })
	}
	for _, m := range writable {
		if isData(m.Root) {
			continue
		}
		if dir, err := openDir(m.Point); err == nil {
			return &lodging{parent: dir, path: m.Point}, nil
		}
	}
	if !isData("/") {
		dir, err := mountDetached(p.device, topLevel)
		if err != nil {
			return nil, fssnap.Unsupported("there is no place for a btrfs snapshot outside of %s: %w; mount a directory above it as well", p.mounts[0].Point, err)
		}
		return &lodging{parent: dir}, nil
	}
	dir, err := openDir(writable[0].Point)
	if err != nil {
		return nil, err
	}
	return &lodging{parent: dir, path: writable[0].Point, within: true}, nil
}

// Probe implements fssnap.Driver.
//
// Errors: *NestedError; ErrNotSupported.
func (d *Driver) Probe(_ context.Context, path string) (fssnap.Source, error) {
	p, err := d.find([]string{path})
	if err != nil {
		return fssnap.Source{}, err
	}
	defer p.close()
	at, err := fssnap.Locate(path)
	if err != nil {
		return fssnap.Source{}, err
	}
	s := fssnap.Source{Kind: d.Kind(), Name: p.sourceName(p.sub), Path: at.Path}
	if s.Rel, err = fssnap.Rel(p.inner[0], p.sub.path); err != nil {
		return fssnap.Source{}, err
	}
	top, err := p.open(p.sub)
	if err != nil {
		return fssnap.Source{}, fssnap.Unsupported("the top of the subvolume of %s can be seen nowhere: %w; mount it as well", at.Path, err)
	}
	if filepath.IsAbs(top.Name()) {
		s.Root = top.Name()
	}
	top.Close()
	if nested := p.nested(); len(nested) > 0 && !d.o.IncludeNested {
		e := &NestedError{Path: at.Path}
		for _, n := range nested {
			below, err := fssnap.Rel(n.path, p.inner[0])
			if err != nil {
				return fssnap.Source{}, err
			}
			e.Nested = append(e.Nested, filepath.Join(at.Path, below))
		}
		return fssnap.Source{}, e
	}
	l, err := p.lodge()
	if err != nil {
		return fssnap.Source{}, err
	}
	l.parent.Close()
	return s, nil
}

// sourceName is in the way of findmnt: device[path].
func (v *volume) sourceName(s *subvolume) string { return v.device + "[" + s.path + "]" }

// Create implements fssnap.Driver.
func (d *Driver) Create(ctx context.Context, name string, sources []fssnap.Source) (views []fssnap.View, err error) {
	defer func() {
		if err == nil {
			return
		}
		for i := range sources {
			err = errors.Join(err, d.Remove(context.WithoutCancel(ctx), fssnap.View{Name: fmt.Sprintf("%s.%d", name, i)}))
		}
		views = nil
	}()
	for i, s := range sources {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		v, err := d.create(fmt.Sprintf("%s.%d", name, i), s)
		if err != nil {
			return nil, fmt.Errorf("btrfs snapshot of %s: %w", s.Name, err)
		}
		views = append(views, v)
	}
	return views, nil
}

func (d *Driver) create(name string, s fssnap.Source) (fssnap.View, error) {
	p, err := d.find(s.Wanted())
	if err != nil {
		return fssnap.View{}, err
	}
	defer p.close()
	if got := p.sourceName(p.sub); got != s.Name {
		return fssnap.View{}, fmt.Errorf("%s lies on %s by now; look at the instance again", s.Path, got)
	}
	src, err := p.open(p.sub)
	if err != nil {
		return fssnap.View{}, err
	}
	defer src.Close()
	nested := p.nested()
	if len(nested) > 0 && !d.o.IncludeNested {
		return fssnap.View{}, &NestedError{Path: s.Path, Nested: []string{nested[0].path}} // made since Probe
	}
	l, err := p.lodge()
	if err != nil {
		return fssnap.View{}, err
	}
	defer l.parent.Close()
	edit := l.within || len(nested) > 0
	v := fssnap.View{Kind: d.Kind(), Name: name, Source: s.Name, MadeAt: time.Now().UTC()}
	var dir *os.File
	for try := 0; ; try++ {
		if dir, err = viewsDir(l.parent); err != nil {
			return v, err
		}
		err = snapshot(int(dir.Fd()), name, int(src.Fd()), !edit)
		if err == nil {
			break
		}
		dir.Close()
		// Another Holdfast may just have removed the directory, because it was empty.
		if !errors.Is(err, unix.ENOENT) || try == 5 {
			return v, err
		}
	}
	defer dir.Close()
	if len(nested) == 0 {
		v.Transaction = name
	}
	if edit {
		if err := p.edit(dir, name, nested, l.within); err != nil {
			return v, err
		}
	}
	if l.path != "" {
		v.Path = filepath.Join(l.path, fssnap.ViewsDir, name)
		return v, nil
	}
	return d.mount(v, p.device, dir)
}

// viewsDir opens the directory for views in parent, and makes it for us alone if need be. parent
// keeps its mtime: it may be the users' data.
func viewsDir(parent *os.File) (*os.File, error) {
	err := keepTime(parent, func() error { return unix.Mkdirat(int(parent.Fd()), fssnap.ViewsDir, 0o700) })
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("make %s in %s: %w", fssnap.ViewsDir, parent.Name(), err)
	}
	dir, err := openIn(parent, fssnap.ViewsDir)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(int(dir.Fd()), &st); err == nil {
		switch {
		case int(st.Uid) != os.Geteuid():
			err = fmt.Errorf("%s belongs to user %d, so it is not safe to keep views there; remove it", dir.Name(), st.Uid)
		case st.Mode&0o077 != 0:
			err = unix.Fchmod(int(dir.Fd()), 0o700)
		}
	}
	if err != nil {
		dir.Close()
		return nil, err
	}
	return dir, nil
}

// keepTime does something in a directory, and gives it back the mtime it had.
func keepTime(dir *os.File, do func() error) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return err
	}
	if err := do(); err != nil {
		return err
	}
	omit := unix.Timespec{Nsec: unix.UTIME_OMIT}
	return unix.UtimesNanoAt(int(dir.Fd()), ".", []unix.Timespec{omit, st.Mtim}, 0)
}

// edit completes a snapshot that was made writable, and makes it read-only.
func (p *placed) edit(dir *os.File, name string, nested []*subvolume, within bool) error {
	top, err := openIn(dir, name)
	if err != nil {
		return err
	}
	defer top.Close()
	if within {
		if err := hideViews(top); err != nil {
			return err
		}
	}
	lock := []string{"."}
	for _, n := range nested {
		below, err := fssnap.Rel(n.path, p.sub.path)
		if err != nil {
			return err
		}
		if err := p.include(top, below, n); err != nil {
			return fmt.Errorf("include the subvolume %s: %w", n.path, err)
		}
		lock = append(lock, below)
	}
	for _, below := range slices.Backward(lock) {
		f, err := openIn(top, below)
		if err != nil {
			return err
		}
		err = setReadOnly(int(f.Fd()), true)
		f.Close()
		if err != nil {
			return fmt.Errorf("make the view read-only: %w", err)
		}
	}
	return nil
}

// hideViews takes out of a picture the directory in which it and others lie, which has but empty
// directories in their places.
func hideViews(top *os.File) error {
	dir, err := openIn(top, fssnap.ViewsDir)
	if err != nil {
		return err
	}
	names, err := dir.Readdirnames(-1)
	for _, n := range names {
		if err == nil {
			err = unix.Unlinkat(int(dir.Fd()), n, unix.AT_REMOVEDIR)
		}
	}
	dir.Close()
	if err != nil {
		return fmt.Errorf("take %s out of the view: %w", dir.Name(), err)
	}
	return keepTime(top, func() error { return unix.Unlinkat(int(top.Fd()), fssnap.ViewsDir, unix.AT_REMOVEDIR) })
}

// include replaces the empty directory, which is all that a snapshot has of a nested subvolume, by a
// snapshot of that.
func (p *placed) include(top *os.File, below string, n *subvolume) error {
	src, err := p.open(n)
	if err != nil {
		return err
	}
	defer src.Close()
	parent, err := openIn(top, filepath.Dir(below))
	if err != nil {
		return err
	}
	defer parent.Close()
	return keepTime(parent, func() error {
		name := filepath.Base(below)
		if err := unix.Unlinkat(int(parent.Fd()), name, unix.AT_REMOVEDIR); err != nil {
			return err
		}
		return snapshot(int(parent.Fd()), name, int(src.Fd()), false)
	})
}

// mount makes a view readable below the state directory. dir is where it lies.
func (d *Driver) mount(v fssnap.View, device string, dir *os.File) (fssnap.View, error) {
	top, err := openIn(dir, v.Name)
	if err != nil {
		return v, err
	}
	defer top.Close()
	id, err := subvolumeOf(int(top.Fd()))
	if err != nil {
		return v, err
	}
	return d.mountID(v, device, id)
}

func (d *Driver) mountID(v fssnap.View, device string, id uint64) (fssnap.View, error) {
	point, err := fssnap.MountPoint(d.o.StateDir, v.Name)
	if err != nil {
		return v, err
	}
	flags := uintptr(unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	if err := unix.Mount(device, point, "btrfs", flags, fmt.Sprintf("subvolid=%d", id)); err != nil {
		return v, fmt.Errorf("mount the view %s at %s: %w", v.Name, point, err)
	}
	v.Path = point
	return v, nil
}

// volumes calls do for each btrfs filesystem that is mounted, until it returns true.
func volumes(ctx context.Context, do func(*volume) (bool, error)) error {
	t, err := mountinfo.Self()
	if err != nil {
		return err
	}
	var seen []string
	var errs []error
	for _, m := range t {
		if m.Type != "btrfs" || slices.Contains(seen, m.Device) {
			continue
		}
		seen = append(seen, m.Device)
		if err := context.Cause(ctx); err != nil {
			return err
		}
		v, err := openVolume(t, m.Device)
		if err != nil {
			// Others than root have made no views; what is hidden or just went away has none to see.
			if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, err)
			}
			continue
		}
		done, err := do(v)
		v.close()
		if errs = append(errs, err); done {
			break
		}
	}
	return errors.Join(errs...)
}

// isView tells whether a subvolume is a view that a driver made.
func isView(s *subvolume) bool {
	_, ok := fssnap.ParseName(s.name)
	return ok && filepath.Base(filepath.Dir(s.path)) == fssnap.ViewsDir
}

// named calls do with the view of that name, if there is one.
func named(ctx context.Context, name string, do func(*volume, *subvolume) error) (found bool, err error) {
	err = volumes(ctx, func(v *volume) (bool, error) {
		for _, s := range v.subs {
			if s.name == name && isView(s) {
				found = true
				return true, do(v, s)
			}
		}
		return false, nil
	})
	return found, err
}

// List implements fssnap.Driver. It needs no roots.
func (d *Driver) List(ctx context.Context, _ ...string) ([]fssnap.View, error) {
	var list []fssnap.View
	err := volumes(ctx, func(v *volume) (bool, error) {
		for _, s := range v.subs {
			if !isView(s) {
				continue
			}
			made, _ := fssnap.ParseName(s.name)
			view := fssnap.View{Kind: d.Kind(), Name: s.name, MadeAt: made, Source: v.device}
			for _, o := range v.subs {
				if o.own == s.from && s.from != (btrfsctl.UUID{}) {
					view.Source = v.sourceName(o)
				}
			}
			if dir, err := v.see(s.path, s.id); err == nil {
				view.Path = dir.Name()
				if ro, err := isReadOnly(int(dir.Fd())); err == nil && !ro {
					view.Broken = "it is not read-only: it was never completed, or was changed since"
				}
				dir.Close()
			}
			list = append(list, view)
		}
		return false, nil
	})
	slices.SortFunc(list, func(a, b fssnap.View) int { return strings.Compare(a.Source+a.Name, b.Source+b.Name) })
	return list, err
}

// Open implements fssnap.Driver.
func (d *Driver) Open(ctx context.Context, view fssnap.View) (fssnap.View, error) {
	found, err := named(ctx, view.Name, func(v *volume, s *subvolume) error {
		if dir, err := v.see(s.path, s.id); err == nil {
			view.Path = dir.Name()
			dir.Close()
			return nil
		}
		var err error
		view, err = d.mountID(view, v.device, s.id)
		return err
	})
	if err == nil && !found {
		err = fmt.Errorf("%s: %w", view.Name, fssnap.ErrGone)
	}
	return view, err
}

// Check implements fssnap.Driver.
func (d *Driver) Check(ctx context.Context, view fssnap.View) error {
	found, err := named(ctx, view.Name, func(v *volume, s *subvolume) error {
		dir, err := openDir(view.Path)
		if err != nil {
			return &fssnap.BrokenError{View: view.Name, Why: err.Error()}
		}
		defer dir.Close()
		if id, err := subvolumeOf(int(dir.Fd())); err != nil || id != s.id || !v.here(dir) {
			return &fssnap.BrokenError{View: view.Name, Why: "something else is at " + view.Path + " by now"}
		}
		if ro, err := isReadOnly(int(dir.Fd())); err != nil || !ro {
			return &fssnap.BrokenError{View: view.Name, Why: "it is no longer read-only"}
		}
		return nil
	})
	if err == nil && !found {
		err = fmt.Errorf("%s: %w", view.Name, fssnap.ErrGone)
	}
	return err
}

// Remove implements fssnap.Driver.
func (d *Driver) Remove(ctx context.Context, view fssnap.View) error {
	if err := fssnap.RemoveMountPoint(d.o.StateDir, view.Name); err != nil {
		return err
	}
	_, err := named(ctx, view.Name, func(v *volume, s *subvolume) error {
		if dir, err := v.see(s.path, s.id); err == nil {
			err = fssnap.Unmount(dir.Name())
			dir.Close()
			if err != nil {
				return err
			}
		}
		return v.remove(s)
	})
	return err
}

func (v *volume) remove(s *subvolume) error {
	var inner []*subvolume
	for _, n := range v.subs {
		if n != s && mountinfo.Below(n.path, s.path) {
			inner = append(inner, n)
		}
	}
	slices.SortFunc(inner, func(a, b *subvolume) int { return strings.Compare(b.path, a.path) }) // inmost first
	all := append(inner, s)
	for _, n := range all {
		if len(inner) == 0 {
			break
		}
		// Nothing can be taken out of what is read-only.
		top, err := v.open(n)
		if err != nil {
			return err
		}
		err = setReadOnly(int(top.Fd()), false)
		top.Close()
		if err != nil {
			return fmt.Errorf("make %s writable to remove it: %w", n.path, err)
		}
	}
	// A filesystem of which only read-only mounts are to be seen can still be written to.
	via := v.dir
	for try := 0; ; try++ {
		for len(all) > 0 {
			if err := v.destroy(via, all[0]); err != nil {
				if errors.Is(err, unix.EROFS) && try == 0 {
					break
				}
				return fmt.Errorf("delete the subvolume %s: %w", all[0].path, err)
			}
			all = all[1:]
		}
		if len(all) == 0 {
			break
		}
		top, err := mountDetached(v.device, topLevel)
		if err != nil {
			return err
		}
		defer top.Close()
		via = top
	}
	return v.removeViewsDir(s)
}

func (v *volume) destroy(via *os.File, s *subvolume) error {
	err := destroyID(int(via.Fd()), s.id)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.ENOTTY) {
		return err
	}
	dir, err := v.see(filepath.Dir(s.path), s.parent)
	if err != nil {
		return fmt.Errorf("%w: before Linux 5.7, only what is mounted can be deleted", err)
	}
	defer dir.Close()
	return destroyName(int(dir.Fd()), s.name)
}

// removeViewsDir removes the directory of the views if this was the last one.
func (v *volume) removeViewsDir(s *subvolume) error {
	inner := filepath.Dir(filepath.Dir(s.path))
	parent, err := v.see(inner, s.parent)
	if err != nil {
		top, err := mountDetached(v.device, topLevel)
		if err != nil {
			return nil // an empty directory that nobody sees stays
		}
		defer top.Close()
		if parent, err = openIn(top, "."+inner); err != nil {
			return err
		}
	}
	defer parent.Close()
	err = keepTime(parent, func() error {
		return unix.Unlinkat(int(parent.Fd()), fssnap.ViewsDir, unix.AT_REMOVEDIR)
	})
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EROFS) {
		return nil
	}
	return err
}
