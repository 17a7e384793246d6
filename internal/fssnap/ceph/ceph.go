// Package ceph makes views by the snapshot directories of CephFS.
package ceph

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

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/mountinfo"
)

// magic is CEPH_SUPER_MAGIC of linux/magic.h.
const magic = 0x00c36400

// Options are those of a Driver. The zero value works; the functions are replaced in tests.
type Options struct {
	// IsCeph tells whether a path lies on CephFS.
	IsCeph func(path string, m mountinfo.Mount) (bool, error)
	// SnapDir returns the directory with the snapshots of dir.
	SnapDir func(dir string, m mountinfo.Mount) string
	// Mkdir and Rmdir make and remove a snapshot.
	Mkdir, Rmdir func(path string) error
}

// Driver makes views of directories of CephFS by making a directory in their .snap.
//
// It promises: one instant for each directory; where several are wanted of one mount, the directory
// that holds them all is taken, so that they are of one instant, too. The picture is read in .snap, or
// what the mount calls it (snapdirname). A directory that a killed run took a snapshot of is found
// where the record, or the caller, says to look: CephFS cannot be searched.
//
// The user must be allowed to make snapshots (the letter s in the capabilities), and the filesystem
// must have them enabled.
//
// Not run for real: CephFS. The tests play it with copies of directories. Snapshots of CephFS are
// known to have lost extended attributes, so Verify is not to be left out here.
type Driver struct{ o Options }

// New returns a driver.
func New(o Options) *Driver {
	if o.IsCeph == nil {
		o.IsCeph = isCeph
	}
	if o.SnapDir == nil {
		o.SnapDir = snapDir
	}
	if o.Mkdir == nil {
		o.Mkdir = func(path string) error { return unix.Mkdir(path, 0o700) }
	}
	if o.Rmdir == nil {
		o.Rmdir = unix.Rmdir
	}
	return &Driver{o}
}

func isCeph(path string, m mountinfo.Mount) (bool, error) {
	if m.Type == "fuse.ceph" || m.Type == "fuse.ceph-fuse" {
		return true, nil
	}
	var st unix.Statfs_t
	err := unix.Statfs(path, &st)
	return err == nil && st.Type == magic, err
}

// Kind is cephfs.
func (*Driver) Kind() string { return "cephfs" }

// snapDir returns the directory with the snapshots of dir. It is there, but is not listed.
func snapDir(dir string, m mountinfo.Mount) string {
	for _, o := range strings.Split(m.Options+","+m.Super, ",") {
		if name, ok := strings.CutPrefix(o, "snapdirname="); ok && name != "" && !strings.Contains(name, "/") {
			return filepath.Join(dir, name)
		}
	}
	return filepath.Join(dir, ".snap")
}

// Probe implements fssnap.Driver.
func (d *Driver) Probe(_ context.Context, path string) (fssnap.Source, error) {
	at, err := fssnap.Locate(path)
	if err != nil {
		return fssnap.Source{}, err
	}
	ok, err := d.o.IsCeph(at.Path, at.Mount)
	if err != nil {
		return fssnap.Source{}, fmt.Errorf("find out the filesystem of %s: %w", path, err)
	}
	if !ok {
		return fssnap.Source{}, &fssnap.OtherFilesystem{Path: path, Filesystem: at.Mount.Type}
	}
	if fssnap.ReadOnly(at.Mount) {
		return fssnap.Source{}, fssnap.Unsupported("%s is mounted read-only, so no CephFS snapshot can be made", at.Mount.Point)
	}
	dir, rel := at.Path, "."
	if !at.Dir {
		dir, rel = filepath.Split(at.Path)
		dir = filepath.Clean(dir)
	}
	if st, err := os.Stat(d.o.SnapDir(dir, at.Mount)); err != nil || !st.IsDir() {
		return fssnap.Source{}, fssnap.Unsupported("there is no %s; allow snapshots on this CephFS (ceph fs set NAME allow_new_snaps true)", d.o.SnapDir(dir, at.Mount))
	}
	return fssnap.Source{Kind: d.Kind(), Name: dir, Root: dir, Path: at.Path, Rel: rel}, nil
}

// common returns the innermost directory that holds both.
func common(a, b string) string {
	for !mountinfo.Below(b, a) {
		a = filepath.Dir(a)
	}
	return a
}

// Create implements fssnap.Driver.
func (d *Driver) Create(ctx context.Context, name string, sources []fssnap.Source) (views []fssnap.View, err error) {
	tops := map[int]string{} // by the number of the mount
	mounts := make([]mountinfo.Mount, len(sources))
	for i, s := range sources {
		at, err := fssnap.Locate(s.Root)
		if err != nil {
			return nil, err
		}
		mounts[i] = at.Mount
		if top, ok := tops[at.Mount.ID]; ok {
			tops[at.Mount.ID] = common(top, s.Root)
		} else {
			tops[at.Mount.ID] = s.Root
		}
	}
	var made []string
	defer func() {
		if err != nil {
			for _, dir := range made {
				if rerr := d.o.Rmdir(dir); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
					err = errors.Join(err, fmt.Errorf("remove the snapshot %s: %w", dir, rerr))
				}
			}
			views = nil
		}
	}()
	for i, s := range sources {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		top := tops[mounts[i].ID]
		dir := filepath.Join(d.o.SnapDir(top, mounts[i]), name)
		v := fssnap.View{Kind: d.Kind(), Name: name, Source: s.Name, Transaction: name + " " + top, MadeAt: time.Now().UTC()}
		if j := slices.Index(made, dir); j < 0 {
			if err := d.o.Mkdir(dir); err != nil {
				hint := ""
				if errors.Is(err, fs.ErrPermission) {
					hint = "; the client needs the capability s to make snapshots"
				}
				return nil, fmt.Errorf("cephfs snapshot of %s: mkdir %s: %w%s", top, dir, err, hint)
			}
			made = append(made, dir)
		} else {
			k := slices.IndexFunc(views, func(o fssnap.View) bool { return o.Transaction == v.Transaction })
			v.MadeAt = views[k].MadeAt
		}
		below, err := fssnap.Rel(s.Root, top)
		if err != nil {
			return nil, err
		}
		v.Path = filepath.Join(dir, below)
		views = append(views, v)
	}
	return views, nil
}

// snapshotOf returns the directory that is to be removed for a view.
func snapshotOf(v fssnap.View) (string, bool) {
	for dir := filepath.Clean(v.Path); len(dir) > 1; dir = filepath.Dir(dir) {
		if filepath.Base(dir) == v.Name {
			return dir, true
		}
	}
	return "", false
}

// List implements fssnap.Driver. It looks at the roots that lie on CephFS, at all directories above
// them on the same mount, and at the tops of all mounts of CephFS.
func (d *Driver) List(ctx context.Context, roots ...string) ([]fssnap.View, error) {
	t, err := mountinfo.Self()
	if err != nil {
		return nil, err
	}
	for _, m := range t {
		if m.Type == "ceph" || strings.HasPrefix(m.Type, "fuse.ceph") {
			roots = append(roots, m.Point)
		}
	}
	var seen []string
	var list []fssnap.View
	var errs []error
	for _, r := range roots {
		if err := context.Cause(ctx); err != nil {
			return list, err
		}
		at, err := fssnap.Locate(r)
		if err != nil {
			continue // it is gone, and its snapshots with it
		}
		if ok, err := d.o.IsCeph(at.Path, at.Mount); err != nil || !ok {
			continue
		}
		for dir := at.Path; mountinfo.Below(dir, at.Mount.Point); dir = filepath.Dir(dir) {
			if !slices.Contains(seen, dir) {
				seen = append(seen, dir)
				views, err := d.in(dir, d.o.SnapDir(dir, at.Mount))
				list, errs = append(list, views...), append(errs, err)
			}
			if dir == "/" {
				break
			}
		}
	}
	return list, errors.Join(errs...)
}

// in lists the views that lie in snap, the snapshot directory of dir. Those of directories above appear
// there, too, but with another name.
func (d *Driver) in(dir, snap string) ([]fssnap.View, error) {
	entries, err := os.ReadDir(snap)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	var list []fssnap.View
	for _, e := range entries {
		if made, ok := fssnap.ParseName(e.Name()); ok {
			list = append(list, fssnap.View{Kind: d.Kind(), Name: e.Name(), Source: dir, Path: filepath.Join(snap, e.Name()), MadeAt: made})
		}
	}
	return list, err
}

// Open implements fssnap.Driver. A snapshot can always be read.
func (d *Driver) Open(ctx context.Context, v fssnap.View) (fssnap.View, error) {
	return v, d.Check(ctx, v)
}

// Check implements fssnap.Driver.
func (d *Driver) Check(_ context.Context, v fssnap.View) error {
	dir, ok := snapshotOf(v)
	if !ok {
		return fmt.Errorf("%s at %s: %w", v.Name, v.Path, fssnap.ErrGone)
	}
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w", dir, fssnap.ErrGone)
	} else if err != nil {
		return err
	}
	if _, err := os.Lstat(v.Path); err != nil {
		return &fssnap.BrokenError{View: v.Name, Why: err.Error()}
	}
	return nil
}

// Remove implements fssnap.Driver.
func (d *Driver) Remove(_ context.Context, v fssnap.View) error {
	dir, ok := snapshotOf(v)
	if _, ours := fssnap.ParseName(v.Name); !ok || !ours {
		return nil
	}
	if err := d.o.Rmdir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the CephFS snapshot %s: %w", dir, err)
	}
	return nil
}
