package btrfs

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/btrfsctl"
)

// The numbers are of linux/btrfs.h and linux/btrfs_tree.h.
const (
	iocSnapDestroy   = 0x5000940f // _IOW(0x94, 15, 4096 bytes)
	iocSnapCreateV2  = 0x50009417 // _IOW(0x94, 23, 4096 bytes)
	iocGetFlags      = 0x80089419 // _IOR(0x94, 25, 8 bytes)
	iocSetFlags      = 0x4008941a // _IOW(0x94, 26, 8 bytes)
	iocSnapDestroyV2 = 0x5000943f // _IOW(0x94, 63, 4096 bytes)

	flagReadOnly = 1 << 1
	flagByID     = 1 << 4

	topLevel     = 5 // the subvolume that holds all others
	typeRootItem = 132
	typeBackref  = 144
)

// volArgs is struct btrfs_ioctl_vol_args, volArgs2 struct btrfs_ioctl_vol_args_v2; in the latter the
// first eight bytes of the name are also the number of a subvolume.
type volArgs struct {
	fd   int64
	name [4088]byte
}

type volArgs2 struct {
	fd      int64
	transid uint64
	flags   uint64
	unused  [4]uint64
	name    [4040]byte
}

// snapshot makes a snapshot of the subvolume whose top is src, with a name in dir.
func snapshot(dir int, name string, src int, readOnly bool) error {
	a := volArgs2{fd: int64(src)}
	if readOnly {
		a.flags = flagReadOnly
	}
	if len(name) >= 256 {
		return unix.ENAMETOOLONG
	}
	copy(a.name[:], name)
	return btrfsctl.Call(dir, iocSnapCreateV2, unsafe.Pointer(&a))
}

// destroyID deletes a subvolume anywhere on the filesystem of fd. Linux 5.7 and later.
func destroyID(fd int, id uint64) error {
	a := volArgs2{flags: flagByID}
	binary.NativeEndian.PutUint64(a.name[:], id)
	return btrfsctl.Call(fd, iocSnapDestroyV2, unsafe.Pointer(&a))
}

// destroyName deletes a subvolume by its name in dir.
func destroyName(dir int, name string) error {
	a := volArgs{}
	copy(a.name[:4087], name)
	return btrfsctl.Call(dir, iocSnapDestroy, unsafe.Pointer(&a))
}

func isReadOnly(fd int) (bool, error) {
	var flags uint64
	err := btrfsctl.Call(fd, iocGetFlags, unsafe.Pointer(&flags))
	return flags&flagReadOnly != 0, err
}

func setReadOnly(fd int, on bool) error {
	var flags uint64
	if err := btrfsctl.Call(fd, iocGetFlags, unsafe.Pointer(&flags)); err != nil {
		return err
	}
	flags &^= flagReadOnly
	if on {
		flags |= flagReadOnly
	}
	return btrfsctl.Call(fd, iocSetFlags, unsafe.Pointer(&flags))
}

// subvolumeOf returns the number of the subvolume that an open file is in.
func subvolumeOf(fd int) (uint64, error) {
	_, id, err := btrfsctl.Lookup(fd, 0, btrfsctl.FirstInode)
	return id, err
}

// subvolume is one of a filesystem.
type subvolume struct {
	id, parent uint64 // parent holds the directory it is in
	dir        uint64 // that directory
	name       string
	own, from  btrfsctl.UUID // from is that of the subvolume it is a snapshot of
	path       string
}

// subvolumes lists all subvolumes of the filesystem of fd, with their paths from its very top. Only
// root may ask.
func subvolumes(fd int) (map[uint64]*subvolume, error) {
	list := map[uint64]*subvolume{topLevel: {id: topLevel, path: "/"}}
	get := func(id uint64) *subvolume {
		if list[id] == nil {
			list[id] = &subvolume{id: id}
		}
		return list[id]
	}
	le := binary.LittleEndian // on disk
	items := btrfsctl.Searcher{FD: fd}
	err := items.Search(context.Background(), btrfsctl.Key{
		Tree: btrfsctl.RootTree, MinObject: topLevel, MaxObject: btrfsctl.LastObject, MinType: typeRootItem, MaxType: typeBackref,
	}, func(it *btrfsctl.Item) error {
		switch {
		case it.Type == typeRootItem && len(it.Data) >= 279 && (it.Object == topLevel || it.Object >= btrfsctl.FirstInode):
			s := get(it.Object)
			copy(s.own[:], it.Data[247:])
			copy(s.from[:], it.Data[263:])
		case it.Type == typeBackref && len(it.Data) >= 18:
			s := get(it.Object)
			n := int(le.Uint16(it.Data[16:]))
			if len(it.Data) < 18+n {
				return fmt.Errorf("the entry of %d is cut off", it.Object)
			}
			s.parent, s.dir, s.name = it.Offset, le.Uint64(it.Data), string(it.Data[18:18+n])
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list the subvolumes: %w", err)
	}
	for id, s := range list {
		if s.path == "" && findPath(fd, list, s, 0) != nil {
			delete(list, id) // deleted, and being cleaned up; or on its way
		}
	}
	return list, nil
}

// findPath fills in the path of s and of those above it.
func findPath(fd int, list map[uint64]*subvolume, s *subvolume, depth int) error {
	p := list[s.parent]
	if s.parent == 0 || p == nil || depth > 1000 {
		return unix.ENOENT
	}
	if p.path == "" {
		if err := findPath(fd, list, p, depth+1); err != nil {
			return err
		}
	}
	dir, _, err := btrfsctl.Lookup(fd, s.parent, s.dir)
	if err != nil {
		return err
	}
	top := p.path
	if top != "/" {
		top += "/"
	}
	s.path = top + dir + s.name
	return nil
}

// mountDetached mounts a subvolume at no place: it can be reached by the returned directory alone and
// is gone when that is closed, or when the process dies.
func mountDetached(device string, id uint64) (*os.File, error) {
	fs, err := unix.Fsopen("btrfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", device, err)
	}
	defer unix.Close(fs)
	err = unix.FsconfigSetString(fs, "source", device)
	if err == nil {
		err = unix.FsconfigSetString(fs, "subvolid", fmt.Sprint(id))
	}
	if err == nil {
		err = unix.FsconfigCreate(fs)
	}
	if err != nil {
		return nil, fmt.Errorf("mount subvolume %d of %s: %w", id, device, err)
	}
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, fmt.Errorf("mount subvolume %d of %s: %w", id, device, err)
	}
	defer unix.Close(m)
	// What Fsmount returns is good for paths only.
	fd, err := unix.Openat(m, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open subvolume %d of %s: %w", id, device, err)
	}
	return os.NewFile(uintptr(fd), fmt.Sprintf("subvolume %d of %s", id, device)), nil
}
