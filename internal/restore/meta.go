package restore

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// meta is what an entry has beside its name, type and content.
type meta struct {
	mode     uint32 // permission, setuid, setgid and sticky bits as chmod takes them
	uid, gid uint32
	sec      int64
	nsec     int64
	// xattrs are those to apply: ours (holdfast.*) are not among them.
	xattrs []snapshot.Xattr
}

func nodeMeta(n *snapshot.Node) meta {
	m := meta{
		mode: uint32(n.Mode & fs.ModePerm), uid: n.UID, gid: n.GID,
		sec: n.ModTime.Unix(), nsec: int64(n.ModTime.Nanosecond()),
	}
	if n.Mode&fs.ModeSetuid != 0 {
		m.mode |= unix.S_ISUID
	}
	if n.Mode&fs.ModeSetgid != 0 {
		m.mode |= unix.S_ISGID
	}
	if n.Mode&fs.ModeSticky != 0 {
		m.mode |= unix.S_ISVTX
	}
	for i := range n.Xattrs {
		if !strings.HasPrefix(n.Xattrs[i].Name, snapshot.AttrPrefix) {
			m.xattrs = append(m.xattrs, n.Xattrs[i])
		}
	}
	return m
}

func (m *meta) sameTime(st *unix.Stat_t) bool { return st.Mtim.Sec == m.sec && st.Mtim.Nsec == m.nsec }

func (m *meta) times() []unix.Timespec {
	return []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: m.sec, Nsec: m.nsec}}
}

// owned gives an error of chown its place: without the right to give files away the owner stays
// what it is, which is worth one warning; anything else is an error.
func (d *dest) owned(err error, mode uint32) (newMode uint32, fail error) {
	if err == nil {
		return mode, nil
	}
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) { // EINVAL: unknown in this user namespace
		d.run.warnOnce("owner", fmt.Sprintf("owners are not restored at %s: only root may give files to others", d.path))
		// With another owner these bits would lend rights that nobody meant to give.
		return mode &^ (unix.S_ISUID | unix.S_ISGID), nil
	}
	return mode, fmt.Errorf("set owner: %w", err)
}

// setMeta brings the open file or directory to m, as far as st says that it differs. All tells
// that it may have attributes that are not in m (it was there before, or its folder hands down
// access lists). The modification time comes last, since all else may change it.
func (d *dest) setMeta(fd int, st *unix.Stat_t, m *meta, all bool) (changed bool, err error) {
	mode, chowned := m.mode, false
	if st.Uid != m.uid || st.Gid != m.gid {
		if mode, err = d.owned(unix.Fchown(fd, int(m.uid), int(m.gid)), mode); err != nil {
			return changed, err
		}
		chowned, changed = true, true
	}
	if len(m.xattrs) > 0 || all {
		x, err := d.setXattrs(fdXattrs(fd), m.xattrs, all)
		if err != nil {
			return changed, err
		}
		changed = changed || x
		chowned = chowned || x // an access list changes the mode as well
	}
	if st.Mode&0o7777 != mode || chowned {
		if err := unix.Fchmod(fd, mode); err != nil {
			return changed, fmt.Errorf("set mode: %w", err)
		}
		changed = true
	}
	if !m.sameTime(st) {
		if err := unix.UtimesNanoAt(fd, "", m.times(), unix.AT_EMPTY_PATH); err != nil {
			if err = futimens(fd, m); err != nil {
				return changed, fmt.Errorf("set modification time: %w", err)
			}
		}
		changed = true
	}
	return changed, nil
}

// futimens is for kernels before 5.8, which know no AT_EMPTY_PATH here.
func futimens(fd int, m *meta) error {
	return unix.UtimesNanoAt(unix.AT_FDCWD, procFD(fd), m.times(), 0)
}

func procFD(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// setMetaAt is setMeta for what cannot be opened: symbolic links, FIFOs, sockets, devices.
func (d *dest) setMetaAt(dir int, name string, st *unix.Stat_t, m *meta, all bool) (changed bool, err error) {
	link := st.Mode&unix.S_IFMT == unix.S_IFLNK
	mode, chowned := m.mode, false
	if st.Uid != m.uid || st.Gid != m.gid {
		if mode, err = d.owned(unix.Fchownat(dir, name, int(m.uid), int(m.gid), unix.AT_SYMLINK_NOFOLLOW), mode); err != nil {
			return changed, err
		}
		chowned, changed = true, true
	}
	if len(m.xattrs) > 0 || all {
		x, err := d.setXattrs(pathXattrs(procFD(dir)+"/"+name), m.xattrs, all)
		if err != nil {
			return changed, err
		}
		changed = changed || x
		chowned = chowned || x
	}
	if !link && (st.Mode&0o7777 != mode || chowned) {
		if err := chmodAt(dir, name, mode); err != nil {
			return changed, fmt.Errorf("set mode: %w", err)
		}
		changed = true
	}
	if !m.sameTime(st) {
		if err := unix.UtimesNanoAt(dir, name, m.times(), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return changed, fmt.Errorf("set modification time: %w", err)
		}
		changed = true
	}
	return changed, nil
}

// chmodAt sets the mode of name without following a link that might have taken its place.
func chmodAt(dir int, name string, mode uint32) error {
	err := unix.Fchmodat(dir, name, mode, unix.AT_SYMLINK_NOFOLLOW)
	if err != unix.EOPNOTSUPP && err != unix.ENOSYS {
		return err
	}
	fd, err := openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Chmod(procFD(fd), mode)
}

// xattrCalls are the system calls on the attributes of one object.
type xattrCalls struct {
	list   func(buf []byte) (int, error)
	get    func(name string, buf []byte) (int, error)
	set    func(name string, v []byte) error
	remove func(name string) error
}

func fdXattrs(fd int) xattrCalls {
	return xattrCalls{
		list:   func(b []byte) (int, error) { return unix.Flistxattr(fd, b) },
		get:    func(n string, b []byte) (int, error) { return unix.Fgetxattr(fd, n, b) },
		set:    func(n string, v []byte) error { return unix.Fsetxattr(fd, n, v, 0) },
		remove: func(n string) error { return unix.Fremovexattr(fd, n) },
	}
}

func pathXattrs(p string) xattrCalls {
	return xattrCalls{
		list:   func(b []byte) (int, error) { return unix.Llistxattr(p, b) },
		get:    func(n string, b []byte) (int, error) { return unix.Lgetxattr(p, n, b) },
		set:    func(n string, v []byte) error { return unix.Lsetxattr(p, n, v, 0) },
		remove: func(n string) error { return unix.Lremovexattr(p, n) },
	}
}

// setXattrs makes the attributes those of want. All tells that others may be there; what the
// kernel itself puts on each file (the label of SELinux) is left alone.
func (d *dest) setXattrs(c xattrCalls, want []snapshot.Xattr, all bool) (changed bool, err error) {
	var have []string
	if all {
		if have, err = c.names(); err != nil {
			return false, fmt.Errorf("list extended attributes: %w", err)
		}
	}
	for _, name := range have {
		wanted := name == "security.selinux"
		for i := range want {
			wanted = wanted || want[i].Name == name
		}
		if wanted {
			continue
		}
		if err := c.remove(name); err != nil && err != unix.ENODATA {
			if strings.HasPrefix(name, "user.") {
				return changed, fmt.Errorf("remove extended attribute %q: %w", name, err)
			}
			d.run.warnOnce("xattr "+name, fmt.Sprintf("extended attribute %q cannot be removed at %s: %v", name, d.path, err))
			continue
		}
		changed = true
	}
	for i := range want {
		x := &want[i]
		if all && c.same(x) {
			continue
		}
		if err := c.set(x.Name, x.Value); err != nil {
			// What belongs to users must not be lost silently; the rest depends on rights and on the
			// filesystem, and once is enough.
			if !strings.HasPrefix(x.Name, "user.") && (err == unix.EPERM || err == unix.EACCES || err == unix.ENOTSUP) {
				d.run.warnOnce("xattr "+x.Name, fmt.Sprintf("extended attribute %q cannot be set at %s: %v", x.Name, d.path, err))
				continue
			}
			return changed, &xattrError{x.Name, err}
		}
		changed = true
	}
	return changed, nil
}

// xattrError keeps a full attribute area (ENOSPC) apart from a full disk.
type xattrError struct {
	name string
	err  error
}

func (e *xattrError) Error() string {
	return fmt.Sprintf("set extended attribute %q: %v", e.name, e.err)
}

func (c *xattrCalls) names() ([]string, error) {
	var small [512]byte
	buf := small[:]
	for {
		n, err := c.list(buf)
		if err == unix.ERANGE {
			buf = make([]byte, 128<<10)
			continue
		}
		if err == unix.ENOTSUP || n == 0 && err == nil {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		return strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00"), nil
	}
}

func (c *xattrCalls) same(x *snapshot.Xattr) bool {
	buf := make([]byte, len(x.Value)+1)
	n, err := c.get(x.Name, buf)
	return err == nil && bytes.Equal(buf[:n], x.Value)
}

func fileType(t snapshot.NodeType) uint32 {
	switch t {
	case snapshot.File:
		return unix.S_IFREG
	case snapshot.Dir:
		return unix.S_IFDIR
	case snapshot.Symlink:
		return unix.S_IFLNK
	case snapshot.Dev:
		return unix.S_IFBLK
	case snapshot.CharDev:
		return unix.S_IFCHR
	case snapshot.FIFO:
		return unix.S_IFIFO
	case snapshot.Socket:
		return unix.S_IFSOCK
	}
	return 0
}
