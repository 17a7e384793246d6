package fschange

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The numbers are of linux/btrfs.h and linux/btrfs_tree.h.
const (
	iocTreeSearchV2  = 0xc0709411 // _IOWR(0x94, 17, 112 bytes)
	iocInoLookup     = 0xd0009412 // _IOWR(0x94, 18, 4096 bytes)
	iocFSInfo        = 0x8400941f // _IOR(0x94, 31, 1024 bytes)
	iocSubvolumeInfo = 0x81f8943c // _IOR(0x94, 60, 504 bytes)

	rootTree        = 1
	firstInode      = 256 // of the top directory of each subvolume
	lastObject      = 1<<64 - 256
	typeInode       = 1
	typeInodeRef    = 12
	typeInodeExtref = 13
	typeDirIndex    = 96
	typeRootRef     = 156

	inodeSize     = 160 // struct btrfs_inode_item
	dirEntryIsDir = 2
	rootReadOnly  = 1
)

var le = binary.LittleEndian // on disk

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

// inoLookup is struct btrfs_ioctl_ino_lookup_args.
type inoLookup struct {
	tree, inode uint64
	name        [4080]byte
}

// subvolumeInfo is struct btrfs_ioctl_get_subvol_info_args.
type subvolumeInfo struct {
	id                                     uint64
	name                                   [256]byte
	parent, dir                            uint64
	generation, flags                      uint64
	own, from, received                    uuid
	ctransid, otransid, stransid, rtransid uint64
	times                                  [4][2]uint64
	reserved                               [8]uint64
}

// searchKey is struct btrfs_ioctl_search_key. The bounds are of whole keys (object, type, offset): within
// them come all types.
type searchKey struct {
	tree                   uint64
	minObject, maxObject   uint64
	minOffset, maxOffset   uint64
	minTransid, maxTransid uint64 // of the block that has the item
	minType, maxType       uint32
	items, unused          uint32
	unused2                [4]uint64
}

// itemHeader is what of struct btrfs_ioctl_search_header is of use.
type itemHeader struct {
	object, offset uint64
	kind           uint32
}

// errStop ends a search.
var errStop = errors.New("stop")

// searchBuffer holds a few blocks of a tree. The kernel fills it under no lock that keeps others waiting for long.
const searchBuffer = 256 << 10

// search calls fn for each item, in the order of keys. item is valid during the call.
func (t *tree) search(key searchKey, fn func(h *itemHeader, item []byte) error) error {
	const head, itemHead = 112, 32
	if t.buf == nil {
		t.buf = make([]byte, head+searchBuffer)
	}
	key.maxOffset, key.maxTransid = 1<<64-1, 1<<64-1
	for {
		if err := t.ctx.Err(); err != nil {
			return context.Cause(t.ctx)
		}
		key.items = 1<<32 - 1
		*(*searchKey)(unsafe.Pointer(&t.buf[0])) = key
		binary.NativeEndian.PutUint64(t.buf[head-8:], searchBuffer)
		if err := ioctl(t.fd, iocTreeSearchV2, unsafe.Pointer(&t.buf[0])); err != nil {
			return fmt.Errorf("search the tree of the subvolume: %w", err)
		}
		n := (*searchKey)(unsafe.Pointer(&t.buf[0])).items
		if n == 0 {
			return nil
		}
		e := binary.NativeEndian
		b := t.buf[head:]
		var h itemHeader
		for range n {
			if len(b) < itemHead {
				return errors.New("search the tree of the subvolume: an item cannot be understood")
			}
			h = itemHeader{object: e.Uint64(b[8:]), offset: e.Uint64(b[16:]), kind: e.Uint32(b[24:])}
			size := int(e.Uint32(b[28:]))
			if size > len(b)-itemHead {
				return errors.New("search the tree of the subvolume: an item cannot be understood")
			}
			if err := fn(&h, b[itemHead:itemHead+size]); err != nil {
				if errors.Is(err, errStop) {
					return nil
				}
				return err
			}
			b = b[itemHead+size:]
		}
		key.minObject, key.minType, key.minOffset = h.object, h.kind, h.offset
		if key.minOffset++; key.minOffset == 0 {
			if key.minType++; key.minType > 255 {
				key.minType = 0
				if key.minObject++; key.minObject == 0 {
					return nil
				}
			}
		}
	}
}
