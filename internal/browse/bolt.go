package browse

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
)

// The identity database is a bbolt file. It is read here, straight from the repository, and not by the
// library: that maps a file into memory and trusts what is in it, so a damaged one can end the program in
// ways that nothing catches, and it would need a copy of everybody's password hashes on disk.
//
// Source: the file format of go.etcd.io/bbolt, version 2.

const (
	boltMagic   = 0xED0CDAED
	boltVersion = 2

	pageBranch = 0x01
	pageLeaf   = 0x02
	pageMeta   = 0x04

	leafBucket = 0x01

	pageHeader  = 16
	elementSize = 16
	bucketSize  = 16

	// Bounds of what is read. A page of one value is as large as that; the database of 100,000 users has
	// about 50,000 pages.
	maxPageBytes = 16 << 20
	maxPages     = 1 << 20
	maxPageSize  = 64 << 10
	boltDepth    = 32
)

var errBolt = errors.New("the identity database is damaged")

func boltErr(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errBolt, fmt.Sprintf(format, args...))
}

// bolt reads one database of size bytes.
type bolt struct {
	readAt   func(p []byte, off int64) error
	size     int64
	pageSize int64
	root     uint64
	seen     map[uint64]bool // each page is read once, so that circles end
}

// openBolt reads the newer of the two meta pages that is whole.
func openBolt(size int64, readAt func(p []byte, off int64) error) (*bolt, error) {
	b := &bolt{readAt: readAt, size: size, seen: map[uint64]bool{}}
	newest := uint64(0)
	// The second one stands at the page size, which only the first one tells; if that is torn, at one of these.
	offsets := []int64{0, 4096, 8192, 16384, 32768, 65536, 1024, 2048}
	for i := 0; i < len(offsets); i++ {
		var p [pageHeader + 64]byte
		if offsets[i]+int64(len(p)) > size {
			continue
		}
		if err := readAt(p[:], offsets[i]); err != nil {
			return nil, err
		}
		m := p[pageHeader:]
		if binary.LittleEndian.Uint16(p[8:])&pageMeta == 0 || binary.LittleEndian.Uint32(m) != boltMagic || binary.LittleEndian.Uint32(m[4:]) != boltVersion {
			continue
		}
		h := fnv.New64a()
		h.Write(m[:56])
		ps, txid := int64(binary.LittleEndian.Uint32(m[8:])), binary.LittleEndian.Uint64(m[48:])
		if h.Sum64() != binary.LittleEndian.Uint64(m[56:]) || ps < 512 || ps > maxPageSize {
			continue
		}
		if b.pageSize == 0 || txid > newest {
			b.pageSize, b.root, newest = ps, binary.LittleEndian.Uint64(m[16:]), txid
		}
	}
	if b.pageSize == 0 {
		return nil, boltErr("it has no valid header")
	}
	return b, nil
}

// page reads a page with what overflows it.
func (b *bolt) page(no uint64) ([]byte, error) {
	if no > uint64(b.size)/uint64(b.pageSize) {
		return nil, boltErr("it refers to page %d, which it has not", no)
	}
	if b.seen[no] || len(b.seen) > maxPages {
		return nil, boltErr("page %d is in two places", no)
	}
	b.seen[no] = true
	off := int64(no) * b.pageSize
	var h [pageHeader]byte
	if off+b.pageSize > b.size {
		return nil, boltErr("it ends before page %d", no)
	}
	if err := b.readAt(h[:], off); err != nil {
		return nil, err
	}
	if binary.LittleEndian.Uint64(h[:]) != no {
		return nil, boltErr("page %d is not where it should be", no)
	}
	n := (int64(binary.LittleEndian.Uint32(h[12:])) + 1) * b.pageSize
	if n > maxPageBytes || off+n > b.size {
		return nil, boltErr("page %d is larger than the database", no)
	}
	p := make([]byte, n)
	if err := b.readAt(p, off); err != nil {
		return nil, err
	}
	return p, nil
}

// walk calls fn for each pair below a page of a bucket, in order. bucket tells that val is a bucket. Both
// are valid during the call only.
func (b *bolt) walk(p []byte, depth int, fn func(key, val []byte, bucket bool) error) error {
	if depth > boltDepth {
		return boltErr("its pages lie too deep in each other")
	}
	flags, count := binary.LittleEndian.Uint16(p[8:]), int(binary.LittleEndian.Uint16(p[10:]))
	if pageHeader+count*elementSize > len(p) {
		return boltErr("a page has more entries than room")
	}
	for i := range count {
		at := pageHeader + i*elementSize
		e := p[at : at+elementSize]
		switch {
		case flags&pageBranch != 0:
			child, err := b.page(binary.LittleEndian.Uint64(e[8:]))
			if err != nil {
				return err
			}
			if err := b.walk(child, depth+1, fn); err != nil {
				return err
			}
		case flags&pageLeaf != 0:
			k, v := int64(binary.LittleEndian.Uint32(e[8:])), int64(binary.LittleEndian.Uint32(e[12:]))
			begin := int64(at) + int64(binary.LittleEndian.Uint32(e[4:]))
			if begin+k+v > int64(len(p)) {
				return boltErr("an entry reaches over the end of its page")
			}
			if err := fn(p[begin:begin+k], p[begin+k:begin+k+v], binary.LittleEndian.Uint32(e)&leafBucket != 0); err != nil {
				return err
			}
		default:
			return boltErr("a page is of an unknown kind")
		}
	}
	return nil
}

// bucket calls fn for each pair of the bucket called name.
func (b *bolt) bucket(name string, fn func(key, val []byte) error) error {
	root, err := b.page(b.root)
	if err != nil {
		return err
	}
	return b.walk(root, 0, func(key, val []byte, isBucket bool) error {
		if !isBucket || string(key) != name {
			return nil
		}
		if len(val) < bucketSize {
			return boltErr("a bucket has no header")
		}
		page := val[bucketSize:]
		if no := binary.LittleEndian.Uint64(val); no != 0 {
			var err error
			if page, err = b.page(no); err != nil {
				return err
			}
		} else if len(page) < pageHeader {
			return boltErr("a bucket is cut off")
		}
		return b.walk(page, 0, func(key, val []byte, isBucket bool) error {
			if isBucket {
				return nil
			}
			return fn(key, val)
		})
	})
}

// readerAt makes ReadAt of a content all or nothing.
func readerAt(read func(p []byte, off int64) (int, error)) func(p []byte, off int64) error {
	return func(p []byte, off int64) error {
		n, err := read(p, off)
		if n == len(p) {
			return nil
		}
		if err == nil || err == io.EOF {
			err = boltErr("it ends too early")
		}
		return err
	}
}
