package btrfs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The numbers are of linux/btrfs.h and linux/btrfs_tree.h.
const (
	iocTreeSearch    = 0xd0009411 // _IOWR(0x94, 17, 4096 bytes)
	iocInoLookup     = 0xd0009412 // _IOWR(0x94, 18, 4096 bytes)
	iocSnapDestroy   = 0x5000940f // _IOW(0x94, 15, 4096 bytes)
	iocSnapCreateV2  = 0x50009417 // _IOW(0x94, 23, 4096 bytes)
	iocGetFlags      = 0x80089419 // _IOR(0x94, 25, 8 bytes)
	iocSetFlags      = 0x4008941a // _IOW(0x94, 26, 8 bytes)
	iocSnapDestroyV2 = 0x5000943f // _IOW(0x94, 63, 4096 bytes)

	flagReadOnly = 1 << 1
	flagByID     = 1 << 4

	rootTree      = 1
	topLevel      = 5   // the subvolume that holds all others
	firstInode    = 256 // of the top directory of each subvolume
	typeRootItem  = 132
	typeBackref   = 144
	lastSubvolume = 1<<64 - 256
)

func ioctl(fd int, req uintptr, arg unsafe.Pointer) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(arg))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return errno
		}
		return nil
	}
}

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
	return ioctl(dir, iocSnapCreateV2, unsafe.Pointer(&a))
}

// destroyID deletes a subvolume anywhere on the filesystem of fd. Linux 5.7 and later.
func destroyID(fd int, id uint64) error {
	a := volArgs2{flags: flagByID}
	binary.NativeEndian.PutUint64(a.name[:], id)
	return ioctl(fd, iocSnapDestroyV2, unsafe.Pointer(&a))
}

// destroyName deletes a subvolume by its name in dir.
func destroyName(dir int, name string) error {
	a := volArgs{}
	copy(a.name[:4087], name)
	return ioctl(dir, iocSnapDestroy, unsafe.Pointer(&a))
}

func isReadOnly(fd int) (bool, error) {
	var flags uint64
	err := ioctl(fd, iocGetFlags, unsafe.Pointer(&flags))
	return flags&flagReadOnly != 0, err
}

func setReadOnly(fd int, on bool) error {
	var flags uint64
	if err := ioctl(fd, iocGetFlags, unsafe.Pointer(&flags)); err != nil {
		return err
	}
	flags &^= flagReadOnly
	if on {
		flags |= flagReadOnly
	}
	return ioctl(fd, iocSetFlags, unsafe.Pointer(&flags))
}

// inoLookup is struct btrfs_ioctl_ino_lookup_args.
type inoLookup struct {
	tree, inode uint64
	name        [4080]byte
}

// subvolumeOf returns the number of the subvolume that an open file is in.
func subvolumeOf(fd int) (uint64, error) {
	a := inoLookup{inode: firstInode}
	err := ioctl(fd, iocInoLookup, unsafe.Pointer(&a))
	return a.tree, err
}

// dirName returns the path of a directory within its subvolume, "" for the top, else with a slash at
// the end.
func dirName(fd int, tree, inode uint64) (string, error) {
	a := inoLookup{tree: tree, inode: inode}
	if err := ioctl(fd, iocInoLookup, unsafe.Pointer(&a)); err != nil {
		return "", err
	}
	name, _, _ := bytes.Cut(a.name[:], []byte{0})
	return string(name), nil
}

// searchArgs is struct btrfs_ioctl_search_args.
type searchArgs struct {
	tree                   uint64
	minObject, maxObject   uint64
	minOffset, maxOffset   uint64
	minTransid, maxTransid uint64
	minType, maxType       uint32
	items, unused          uint32
	unused2                [4]uint64
	buf                    [3992]byte
}

type uuid [16]byte

// subvolume is one of a filesystem.
type subvolume struct {
	id, parent uint64 // parent holds the directory it is in
	dir        uint64 // that directory
	name       string
	own, from  uuid // from is that of the subvolume it is a snapshot of
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
	a := searchArgs{
		tree: rootTree, minObject: topLevel, maxObject: lastSubvolume,
		maxOffset: 1<<64 - 1, maxTransid: 1<<64 - 1, minType: typeRootItem, maxType: typeBackref,
	}
	for {
		a.items = 4096
		if err := ioctl(fd, iocTreeSearch, unsafe.Pointer(&a)); err != nil {
			return nil, fmt.Errorf("list the subvolumes: %w", err)
		}
		if a.items == 0 {
			break
		}
		e := binary.NativeEndian
		le := binary.LittleEndian // on disk
		b := a.buf[:]
		for range a.items {
			// struct btrfs_ioctl_search_header
			object, offset := e.Uint64(b[8:]), e.Uint64(b[16:])
			kind, size := e.Uint32(b[24:]), int(e.Uint32(b[28:]))
			item := b[32 : 32+size]
			b = b[32+size:]
			a.minObject, a.minType, a.minOffset = object, kind, offset
			switch {
			case kind == typeRootItem && size >= 279 && (object == topLevel || object >= firstInode):
				s := get(object)
				copy(s.own[:], item[247:])
				copy(s.from[:], item[263:])
			case kind == typeBackref && size >= 18:
				s := get(object)
				n := int(le.Uint16(item[16:]))
				if len(item) < 18+n {
					return nil, fmt.Errorf("list the subvolumes: the entry of %d is cut off", object)
				}
				s.parent, s.dir, s.name = offset, le.Uint64(item), string(item[18:18+n])
			}
		}
		if a.minOffset++; a.minOffset == 0 {
			if a.minType++; a.minType == 0 {
				a.minObject++
			}
		}
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
	dir, err := dirName(fd, s.parent, s.dir)
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
