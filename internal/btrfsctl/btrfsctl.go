// Package btrfsctl asks the kernel about btrfs: the calls that several packages need.
//
// Source of all numbers and layouts: Linux include/uapi/linux/btrfs.h and btrfs_tree.h.
package btrfsctl

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	iocTreeSearchV2 = 0xc0709411 // _IOWR(0x94, 17, 112 bytes)
	iocInoLookup    = 0xd0009412 // _IOWR(0x94, 18, 4096 bytes)
)

const (
	// RootTree is the tree that tells of all others.
	RootTree = 1
	// FirstInode is that of the top directory of each subvolume, and the lowest number of a subvolume but the
	// one that holds all others.
	FirstInode = 256
	// LastObject is the highest number of an inode or a subvolume.
	LastObject = 1<<64 - 256
)

// UUID names a file system or a subvolume.
type UUID [16]byte

// Call makes an ioctl. Errors: unix.Errno, never EINTR.
func Call(fd int, req uintptr, arg unsafe.Pointer) error {
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

// Lookup returns the path of a directory from the top of its subvolume, "" or with a slash at the end, and
// the number of the subvolume; with tree 0 that is the one of fd. Only root may ask for any inode but FirstInode.
func Lookup(fd int, tree, inode uint64) (path string, subvolume uint64, err error) {
	// struct btrfs_ioctl_ino_lookup_args
	a := struct {
		tree, inode uint64
		name        [4080]byte
	}{tree: tree, inode: inode}
	if err := Call(fd, iocInoLookup, unsafe.Pointer(&a)); err != nil {
		return "", 0, err
	}
	name, _, _ := bytes.Cut(a.name[:], []byte{0})
	return string(name), a.tree, nil
}

// Key bounds a search by whole keys (object, type, offset), from {MinObject, MinType, 0} to
// {MaxObject, MaxType, the last}: between the two come all types.
type Key struct {
	Tree                 uint64
	MinObject, MaxObject uint64
	MinType, MaxType     uint32
	MinTransid           uint64 // of the block that has the item
}

// Item is one item of a tree. Data is as on disk, little-endian.
type Item struct {
	Object, Offset uint64
	Type           uint32
	Data           []byte
}

// ErrStop, returned by the function of Search, ends the search without an error.
var ErrStop = errors.New("stop")

// Searcher searches the trees of the file system of FD. It keeps one buffer, and is not for concurrent use. It needs
// root.
type Searcher struct {
	FD  int
	buf []byte
}

// searchKey is struct btrfs_ioctl_search_key.
type searchKey struct {
	tree                   uint64
	minObject, maxObject   uint64
	minOffset, maxOffset   uint64
	minTransid, maxTransid uint64
	minType, maxType       uint32
	items, unused          uint32
	unused2                [4]uint64
}

// searchBuffer holds a few blocks of a tree. The kernel fills it under no lock that keeps others waiting for long.
const searchBuffer = 256 << 10

var errItem = errors.New("search a tree of btrfs: an item cannot be understood")

// Search calls fn for each item, in the order of keys. The item is valid during the call.
//
// Errors: of the kernel, of fn, the cause of ctx.
func (s *Searcher) Search(ctx context.Context, k Key, fn func(it *Item) error) error {
	const head, itemHead = 112, 32 // struct btrfs_ioctl_search_args_v2, struct btrfs_ioctl_search_header
	if s.buf == nil {
		s.buf = make([]byte, head+searchBuffer)
	}
	key := searchKey{
		tree: k.Tree, minObject: k.MinObject, maxObject: k.MaxObject, maxOffset: 1<<64 - 1,
		minTransid: k.MinTransid, maxTransid: 1<<64 - 1, minType: k.MinType, maxType: k.MaxType,
	}
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		key.items = 1<<32 - 1
		*(*searchKey)(unsafe.Pointer(&s.buf[0])) = key
		e := binary.NativeEndian
		e.PutUint64(s.buf[head-8:], searchBuffer)
		if err := Call(s.FD, iocTreeSearchV2, unsafe.Pointer(&s.buf[0])); err != nil {
			return fmt.Errorf("search a tree of btrfs: %w", err)
		}
		n := (*searchKey)(unsafe.Pointer(&s.buf[0])).items
		if n == 0 {
			return nil
		}
		b := s.buf[head:]
		var it Item
		for range n {
			if len(b) < itemHead {
				return errItem
			}
			size := int(e.Uint32(b[28:]))
			if size > len(b)-itemHead {
				return errItem
			}
			it = Item{Object: e.Uint64(b[8:]), Offset: e.Uint64(b[16:]), Type: e.Uint32(b[24:]), Data: b[itemHead : itemHead+size]}
			if err := fn(&it); errors.Is(err, ErrStop) {
				return nil
			} else if err != nil {
				return err
			}
			b = b[itemHead+size:]
		}
		key.minObject, key.minType, key.minOffset = it.Object, it.Type, it.Offset
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
