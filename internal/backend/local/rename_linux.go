package local

import (
	"errors"

	"golang.org/x/sys/unix"
)

// renameNew renames and never replaces: two writers of one config must not both win.
func renameNew(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENOTSUP) {
		return renameCheck(from, to) // NFS and some others lack the flag
	}
	return err
}
