package fssnap

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/mountinfo"
	"github.com/holdfast-backup/holdfast/internal/statedir"
)

// ViewsDir is the name of the directory in which views lie that their filesystem needs a place for.
const ViewsDir = ".holdfast-views"

// A Place is where a path lies.
type Place struct {
	// Path has no symbolic links; Dir tells that it is a directory.
	Path  string
	Dir   bool
	Mount mountinfo.Mount
	// Inner is the path within the filesystem; it begins with a slash.
	Inner string
	Table mountinfo.Table
}

// Locate finds the place of a path, which must exist. Symbolic links are followed.
func Locate(path string) (Place, error) {
	t, err := mountinfo.Self()
	if err != nil {
		return Place{}, fmt.Errorf("read the mount table: %w", err)
	}
	return locate(t, path)
}

func locate(t mountinfo.Table, path string) (Place, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return Place{}, err
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return Place{}, err
	}
	st, err := os.Lstat(path)
	if err != nil {
		return Place{}, err
	}
	p := Place{Path: path, Dir: st.IsDir(), Table: t}
	m, ok := mountOf(t, path)
	if !ok {
		return Place{}, fmt.Errorf("no mount found for %s", path)
	}
	p.Mount = m
	p.Inner = filepath.Join(m.Root, rel(path, m.Point))
	return p, nil
}

// mountOf returns the mount on which path lies. The kernel is asked, because a mount table alone does
// not tell what is hidden by what; kernels before 5.8 cannot tell, then the table must do.
func mountOf(t mountinfo.Table, path string) (mountinfo.Mount, bool) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_MNT_ID, &st)
	if err == nil && st.Mask&unix.STATX_MNT_ID != 0 {
		for _, m := range t {
			if uint64(m.ID) == st.Mnt_id && mountinfo.Below(path, m.Point) {
				return m, true
			}
		}
	}
	return t.Find(path)
}

// Visible tells whether the mount can be reached at its mount point.
func Visible(t mountinfo.Table, m mountinfo.Mount) bool {
	top, ok := mountOf(t, m.Point)
	return ok && top.ID == m.ID
}

// MountsBelow returns the mounts strictly below dir that can be reached, outer ones first. Views and
// what only leads to views are left out.
func MountsBelow(t mountinfo.Table, dir string) []mountinfo.Mount {
	var list []mountinfo.Mount
	for _, m := range t {
		switch {
		case m.Point == dir || !mountinfo.Below(m.Point, dir):
		case strings.Contains(m.Point+"/", "/"+ViewsDir+"/"):
		case isZFS(m.Type) && strings.Contains(m.Source, "@"): // a snapshot in .zfs
		case Visible(t, m):
			list = append(list, m)
		}
	}
	return list
}

func isZFS(fsType string) bool { return fsType == "zfs" || fsType == "fuse.zfs" }

// ReadOnly tells whether nothing can be written through the mount.
func ReadOnly(m mountinfo.Mount) bool {
	for _, o := range strings.Split(m.Options+","+m.Super, ",") {
		if o == "ro" {
			return true
		}
	}
	return false
}

// rel returns path relative to dir, "." for dir itself. Both are clean, and path is in dir.
func rel(path, dir string) string {
	if path == dir {
		return "."
	}
	return strings.TrimPrefix(strings.TrimPrefix(path, dir), "/")
}

// Rel is like filepath.Rel for a clean path at or below a clean dir.
//
// Errors: path is not in dir.
func Rel(path, dir string) (string, error) {
	if !mountinfo.Below(path, dir) {
		return "", fmt.Errorf("%s is not below %s", path, dir)
	}
	return rel(path, dir), nil
}

// viewsSub is the directory of the records and mount points in the state directory.
const viewsSub = "views"

// MountPoint makes the directory, for root alone, on which a driver mounts the named view. stateDir ""
// is statedir.Default.
func MountPoint(stateDir, view string) (string, error) {
	dir, err := MountPointName(stateDir, view)
	if err == nil {
		err = os.MkdirAll(dir, 0o700)
	}
	if err != nil {
		return "", fmt.Errorf("make a place to mount the view %s: %w", view, err)
	}
	return dir, nil
}

// MountPointName is the directory of MountPoint, which it does not make.
func MountPointName(stateDir, view string) (string, error) {
	dir, err := statedir.Path(stateDir, viewsSub)
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "mnt", view), nil
}

// RemoveMountPoint unmounts what is mounted at or below the mount point of a view, and removes it.
func RemoveMountPoint(stateDir, view string) error {
	dir, err := MountPointName(stateDir, view)
	if err != nil {
		return err
	}
	if err := Unmount(dir); err != nil {
		return err
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// unmountTries: another program that looks at mounts, such as a file indexer or df, is soon done.
const unmountTries = 40

// Unmount takes away all mounts at dir and below it, the newest first. A mount that stays busy for
// about 4 s is detached, so that it ends with its last user; that is said by no error. Without mounts
// it does nothing.
func Unmount(dir string) error { return unmount(dir, true) }

// UnmountBelow is Unmount without what is mounted at dir itself.
func UnmountBelow(dir string) error { return unmount(dir, false) }

func unmount(dir string, itself bool) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	// The parents may be links, and mount points are without links. The last part is ours.
	if parent, err := filepath.EvalSymlinks(filepath.Dir(dir)); err == nil {
		dir = filepath.Join(parent, filepath.Base(dir))
	}
	t, err := mountinfo.Self()
	if err != nil {
		return err
	}
	for i := len(t) - 1; i >= 0; i-- {
		if m := t[i]; mountinfo.Below(m.Point, dir) && (itself || m.Point != dir) {
			if err := unmountOne(m.Point); err != nil {
				return err
			}
		}
	}
	return nil
}

func unmountOne(point string) error {
	for try := 0; ; try++ {
		err := unix.Unmount(point, unix.UMOUNT_NOFOLLOW)
		switch {
		case err == nil, errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT): // went away by itself
			return nil
		case !errors.Is(err, unix.EBUSY):
			return fmt.Errorf("unmount %s: %w", point, err)
		case try == unmountTries:
			if err := unix.Unmount(point, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
				return fmt.Errorf("unmount %s: %w", point, err)
			}
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
}
