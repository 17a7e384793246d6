package local

import (
	"io/fs"
	"os"
)

// renameCheck is the next best thing where rename cannot refuse to replace by itself. In the
// moment between, another writer could put the same content-named file there, which is harmless.
func renameCheck(from, to string) error {
	if _, err := os.Lstat(to); err == nil {
		return fs.ErrExist
	}
	return os.Rename(from, to)
}
