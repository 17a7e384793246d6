package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/bench/internal/measure"
)

// The physical limits, in their order.
const (
	limitFind  = "find with lstat of all entries"
	limitRead  = "reading all bytes, one thread"
	limitHash  = "SHA-256 of as many bytes, one core"
	limitWrite = "writing as many bytes, 16 MiB files, fsync"
	// On virtual machines the page cache may be slower than the disk.
	limitDirect = "writing them without the page cache (O_DIRECT), fsync"
)

var limitNames = []string{limitFind, limitRead, limitHash, limitWrite, limitDirect}

// stepLimits is where the costs of the limits are kept.
const stepLimits = "limits"

// limits measures what no backup program can be faster than, page cache warm. What is written goes first: the disk is done with it
// when the first program begins.
func (b *bench) limits() error {
	size, err := b.readStore() // this pass fills the page cache
	if err != nil {
		return err
	}
	// Mapped, so that it begins at a page, which O_DIRECT wants.
	buf, err := unix.Mmap(-1, 0, 16<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return fmt.Errorf("map a buffer: %w", err)
	}
	defer unix.Munmap(buf)
	for i := range buf {
		buf[i] = byte(i * 7)
	}
	if err := b.writeLimits(buf, size); err != nil {
		return err
	}
	unix.Sync()
	find, err := look("find")
	if err != nil {
		return err
	}
	c, _, err := measure.Command("", nil, find, b.store, "-fprintf", "/dev/null", "%s %T@\n")
	if err != nil {
		return err
	}
	b.limit(limitFind, c)
	c, err = measure.Func(func() error {
		_, err := b.readStore()
		return err
	})
	if err != nil {
		return err
	}
	b.limit(limitRead, c)
	c, err = measure.Func(func() error {
		h := sha256.New()
		for left := size; left > 0; left -= int64(len(buf)) {
			h.Write(buf[:min(left, int64(len(buf)))])
		}
		return nil
	})
	if err != nil {
		return err
	}
	b.limit(limitHash, c)
	return nil
}

// writeLimits measures how fast size bytes are written, with the page cache and without.
func (b *bench) writeLimits(buf []byte, size int64) error {
	dir := filepath.Join(b.scratch, "plain-write")
	defer os.RemoveAll(dir)
	c, err := measure.Func(func() error { return writePlain(dir, buf, size, 0) })
	if err != nil {
		return err
	}
	b.limit(limitWrite, c)
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	unix.Sync()
	c, err = measure.Func(func() error { return writePlain(dir, buf, size, unix.O_DIRECT) })
	if errors.Is(err, unix.EINVAL) {
		fmt.Fprintln(b.log, "this filesystem cannot write without the page cache")
		return nil
	}
	if err != nil {
		return err
	}
	b.limit(limitDirect, c)
	return nil
}

func (b *bench) limit(name string, c measure.Cost) {
	fmt.Fprintf(b.log, "%-42s %8.2f s wall\n", name, c.Wall.Seconds())
	b.add(stepLimits, name, c)
}

// writePlain writes size bytes; with O_DIRECT among the flags they are rounded up to whole blocks.
func writePlain(dir string, buf []byte, size int64, flags int) error {
	const block = 4096

	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for i := 0; size > 0; i++ {
		f, err := os.OpenFile(filepath.Join(dir, fmt.Sprint(i)), os.O_WRONLY|os.O_CREATE|os.O_EXCL|flags, 0o600)
		if err != nil {
			return err
		}
		n := min(size, int64(len(buf)))
		part := n
		if flags&unix.O_DIRECT != 0 {
			part = (n + block - 1) / block * block
		}
		_, err = f.Write(buf[:part])
		if err == nil {
			err = f.Sync()
		}
		if e := f.Close(); err == nil {
			err = e
		}
		if err != nil {
			return err
		}
		size -= n
	}
	return nil
}

// readStore reads every file of the store once and returns the bytes.
func (b *bench) readStore() (int64, error) {
	buf := make([]byte, 1<<20)
	var size int64
	err := filepath.WalkDir(b.store, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !e.Type().IsRegular() {
			return nil
		}
		if err := b.ctx.Err(); err != nil {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		for {
			n, err := f.Read(buf)
			size += int64(n)
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
		}
	})
	return size, err
}
