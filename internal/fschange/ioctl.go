package fschange

import (
	"encoding/binary"

	"github.com/holdfast-backup/holdfast/internal/btrfsctl"
)

// The numbers are of linux/btrfs.h and linux/btrfs_tree.h.
const (
	iocFSInfo        = 0x8400941f // _IOR(0x94, 31, 1024 bytes)
	iocSubvolumeInfo = 0x81f8943c // _IOR(0x94, 60, 504 bytes)

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

// subvolumeInfo is struct btrfs_ioctl_get_subvol_info_args.
type subvolumeInfo struct {
	id                                     uint64
	name                                   [256]byte
	parent, dir                            uint64
	generation, flags                      uint64
	own, from, received                    btrfsctl.UUID
	ctransid, otransid, stransid, rtransid uint64
	times                                  [4][2]uint64
	reserved                               [8]uint64
}
