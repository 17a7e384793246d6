package local

import (
	"context"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// directAlign is what the file systems in use want of addresses, offsets and lengths, in bytes.
	directAlign = 4096
	// directMin is the size from which the page cache is passed by: smaller files are read again soon.
	directMin = 1 << 20
)

// writeDirect writes the aligned part of data past the page cache and returns its length, or how far it
// came where the file system or the address does not allow it: the caller writes the rest as usual, and
// looks at ctx. Packs are written once and seldom read: copying them
// into the cache, and writing them out of it again, took a seventh of the time of a first backup, and
// drove the instance's own data out of memory.
func (b *Backend) writeDirect(ctx context.Context, f *os.File, data []byte) (int, error) {
	if len(data) < directMin || b.noDirect.Load() || uintptr(unsafe.Pointer(&data[0]))%directAlign != 0 {
		return 0, nil
	}
	fd := int(f.Fd())
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return 0, nil //nolint:nilerr // then not
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags|unix.O_DIRECT); err != nil {
		b.noDirect.Store(true) // tmpfs before Linux 6.6, some network file systems
		return 0, nil
	}
	n := len(data) &^ (directAlign - 1)
	done := 0
	for done < n && ctx.Err() == nil {
		k, werr := unix.Write(fd, data[done:min(n, done+writeStep)])
		if werr == unix.EINTR {
			continue
		}
		if werr != nil && k <= 0 {
			err = werr
			break
		}
		done += k
		if k%directAlign != 0 { // a short write leaves the rest unaligned
			break
		}
	}
	if _, ferr := unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags); ferr != nil && err == nil {
		err = ferr
	}
	if err == unix.EINVAL || err == unix.EOPNOTSUPP { // it wants another alignment, or cannot after all
		b.noDirect.Store(true)
		return done, nil
	}
	if err != nil {
		return done, &os.PathError{Op: "write", Path: f.Name(), Err: err}
	}
	return done, nil
}
