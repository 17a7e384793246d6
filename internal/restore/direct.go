package restore

import (
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Contents of some size are written past the page cache. What is restored is not read again soon, and taking
// pages for it, copying it into them and writing them out cost more of the processor than all else
// of a restore; and it drives out of memory what the rest of the machine works with.

const (
	// directMin is the length of whole pages from which a write goes past the page cache, in bytes. Below it, the
	// wait for the device costs more than the copy.
	directMin = 64 << 10
	// memoryAlign is what devices at most want of addresses, in bytes.
	memoryAlign = 4096
	// bounceSize is the length of the buffers for data that lies askew, in bytes: one for each write under way.
	bounceSize = 512 << 10
)

// directAlign is what file systems at most want of offsets and lengths, in bytes; whole pages, so
// that a page is written either way but never both.
var directAlign = max(int64(os.Getpagesize()), 4096)

// What the kernel does, for tests.
var (
	directPwrite = unix.Pwrite
	directFS     = fsTakesDirect
)

var bounces = sync.Pool{New: func() any { b := make([]byte, bounceSize); return &b }}

// fsTakesDirect reports whether the file system of fd is one where direct writes are known to be a
// gain. btrfs and ZFS would compress and checksum less, or copy all the same; over a network each write would
// wait for the server.
func fsTakesDirect(fd int) bool {
	var fs unix.Statfs_t
	if unix.Fstatfs(fd, &fs) != nil {
		return false
	}
	return fs.Type == unix.EXT4_SUPER_MAGIC || fs.Type == unix.XFS_SUPER_MAGIC
}

// direct reports whether contents may go past the page cache at d.
func (d *dest) direct() bool {
	d.past.once.Do(func() {
		if d.root == nil || !directFS(d.root.fd) {
			d.past.refused.Store(true)
		}
	})
	return !d.past.refused.Load()
}

// put writes p at off, which is part of the content of j.
func (j *job) put(fd int, p []byte, off int64) error {
	head := -off & (directAlign - 1)
	end := int64(len(p)) - (off+int64(len(p)))&(directAlign-1)
	if end-head >= directMin && j.d.direct() {
		n, err := j.d.putDirect(fd, p[head:end], off+head)
		if err != nil {
			return err
		}
		add(&j.d.res.direct, int64(n))
		if n > 0 {
			if err := pwrite(fd, p[:head], off); err != nil {
				return err
			}
			p, off = p[head+int64(n):], off+head+int64(n)
		}
	}
	return pwrite(fd, p, off)
}

// putDirect writes p past the page cache and tells how much of it: less than all, or nothing, where the file
// system does not take it. off and len(p) are aligned.
func (d *dest) putDirect(fd int, p []byte, off int64) (done int, err error) {
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, unix.O_DIRECT); err != nil {
		d.past.refused.Store(true)
		return 0, nil //nolint:nilerr // then not
	}
	defer func() {
		if _, ferr := unix.FcntlInt(uintptr(fd), unix.F_SETFL, 0); ferr != nil && err == nil {
			err = fmt.Errorf("write: %w", ferr)
		}
	}()
	askew := !aligned(p)
	var bounce *[]byte
	if askew {
		bounce = bounces.Get().(*[]byte)
		defer bounces.Put(bounce)
	}
	for done < len(p) {
		part := p[done:]
		if askew {
			part = (*bounce)[:copy(*bounce, part)]
		}
		n, err := directPwrite(fd, part, off+int64(done))
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EINVAL || err == unix.EOPNOTSUPP:
			d.past.refused.Store(true)
			return done, nil
		case err != nil:
			return done, fmt.Errorf("write: %w", err)
		}
		done += n
		if int64(n)%directAlign != 0 { // what follows would lie askew on the disk
			return done, nil
		}
	}
	return done, nil
}

func aligned(p []byte) bool { return uintptr(unsafe.Pointer(unsafe.SliceData(p)))%memoryAlign == 0 }

// reserve asks for the room of a file that comes in several pieces, so that it lies in one place of
// the disk although they come in any order. Where that is not possible it comes to be without.
func (j *job) reserve(fd int) {
	if len(j.ids) < 2 || len(j.holes) > 0 || j.state.reserved.Swap(true) || !j.d.direct() {
		return
	}
	_ = unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 0, j.size)
}

// pwrite writes all of p by way of the page cache.
func pwrite(fd int, p []byte, off int64) error {
	for len(p) > 0 {
		n, err := unix.Pwrite(fd, p, off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}
