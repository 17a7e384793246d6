// Package pack builds and reads pack files: sealed blobs one after another, then a sealed list of
// them, then the length of that list.
package pack

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/holdfast-backup/holdfast/internal/repo/crypto"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

// BlobType tells data from trees.
type BlobType uint8

// The two types of blob. A data blob and a tree blob of one ID are different things.
const (
	DataBlob BlobType = iota
	TreeBlob
)

func (t BlobType) String() string {
	switch t {
	case DataBlob:
		return "data"
	case TreeBlob:
		return "tree"
	}
	return fmt.Sprintf("blob type %d", uint8(t))
}

// Entry tells where a blob lies in its pack. Sizes are in bytes; Length counts the sealed blob.
// Plain is the size before compression, and zero for a blob that is not compressed.
type Entry struct {
	ID     id.ID
	Type   BlobType
	Offset uint32
	Length uint32
	Plain  uint32
}

// PlainSize returns the size of the blob's content in bytes.
func (e Entry) PlainSize() int64 {
	if e.Plain != 0 {
		return int64(e.Plain)
	}
	return int64(e.Length) - crypto.Overhead
}

// End returns the offset after the blob.
func (e Entry) End() int64 { return int64(e.Offset) + int64(e.Length) }

func (e Entry) headerSize() int {
	if e.Plain != 0 {
		return 41
	}
	return 37
}

const (
	// MaxHeader is the size up to which readers accept the sealed header.
	MaxHeader = 16 << 20
	// lengthSize is the size of the header's length at the end of the file.
	lengthSize = 4
	// TailSize is how much of a pack's end one should read first: it holds the header of 15 blobs.
	TailSize = 15*41 + crypto.Overhead + lengthSize
)

// FooterSize returns how many bytes follow the blobs in a pack of these entries.
func FooterSize(entries []Entry) int64 {
	n := int64(crypto.Overhead + lengthSize)
	for _, e := range entries {
		n += int64(e.headerSize())
	}
	return n
}

// EntrySize returns what an entry adds to the header.
func EntrySize(compressed bool) int64 {
	if compressed {
		return 41
	}
	return 37
}

// AppendHeader appends the plain header of entries, which follow one another without gaps.
func AppendHeader(dst []byte, entries []Entry) []byte {
	for _, e := range entries {
		t := byte(e.Type)
		if e.Plain != 0 {
			t += 2
		}
		dst = append(dst, t)
		dst = binary.LittleEndian.AppendUint32(dst, e.Length)
		if e.Plain != 0 {
			dst = binary.LittleEndian.AppendUint32(dst, e.Plain)
		}
		dst = append(dst, e.ID[:]...)
	}
	return dst
}

// ParseHeader reads a plain header. Offsets are counted from zero.
func ParseHeader(p []byte) ([]Entry, error) {
	entries := make([]Entry, 0, len(p)/37)
	var offset uint64
	for i := 0; len(p) > 0; i++ {
		t := p[0]
		if t > 3 {
			return nil, fmt.Errorf("entry %d of the pack header has the unknown type %d", i, t)
		}
		e := Entry{Type: BlobType(t & 1), Offset: uint32(offset)}
		size := 37
		if t >= 2 {
			size = 41
		}
		if len(p) < size {
			return nil, fmt.Errorf("entry %d of the pack header is cut off", i)
		}
		e.Length = binary.LittleEndian.Uint32(p[1:])
		if t >= 2 {
			if e.Plain = binary.LittleEndian.Uint32(p[5:]); e.Plain == 0 {
				return nil, fmt.Errorf("entry %d of the pack header is compressed but has no content", i)
			}
		}
		e.ID = id.ID(p[size-id.Size:])
		if e.Length < crypto.Overhead {
			return nil, fmt.Errorf("entry %d of the pack header is too short: %d bytes", i, e.Length)
		}
		if offset += uint64(e.Length); offset >= 1<<32 {
			return nil, fmt.Errorf("entry %d of the pack header ends beyond 4 GiB", i)
		}
		entries = append(entries, e)
		p = p[size:]
	}
	return entries, nil
}

// HeaderLength reads the length of the sealed header from the last bytes of a pack of the given
// size, and checks that it can be true.
func HeaderLength(tail []byte, size int64) (int, error) {
	if len(tail) < lengthSize {
		return 0, fmt.Errorf("pack of %d bytes is too short", size)
	}
	n := int64(binary.LittleEndian.Uint32(tail[len(tail)-lengthSize:]))
	if n < crypto.Overhead+37 || n > MaxHeader || n+lengthSize > size {
		return 0, fmt.Errorf("header length %d is impossible in a pack of %d bytes", n, size)
	}
	return int(n), nil
}

// OpenHeader decrypts and parses a sealed header, which it overwrites.
func OpenHeader(key *crypto.Key, sealed []byte) ([]Entry, error) {
	plain, err := key.Open(sealed)
	if err != nil {
		return nil, fmt.Errorf("pack header: %w", err)
	}
	return ParseHeader(plain)
}

// Writer builds a pack in a buffer.
type Writer struct {
	buf     []byte
	header  int64
	entries []Entry
}

// NewWriter returns a Writer that fills buf from its start and grows it only if it must.
func NewWriter(buf []byte) *Writer {
	return &Writer{buf: buf[:0], header: crypto.Overhead + lengthSize}
}

// Count returns the number of blobs.
func (w *Writer) Count() int { return len(w.entries) }

// Size returns the size in bytes that the pack would have now.
func (w *Writer) Size() int64 { return int64(len(w.buf)) + w.header }

// Reserve appends a blob of n sealed bytes, which the caller writes to the slice that it returns, before Finish. plain is as
// in Entry. A Reserve beyond the capacity of the buffer invalidates the slices before.
func (w *Writer) Reserve(t BlobType, blob id.ID, n int, plain uint32) []byte {
	e := Entry{ID: blob, Type: t, Offset: uint32(len(w.buf)), Length: uint32(n), Plain: plain}
	w.buf = slices.Grow(w.buf, n)[:len(w.buf)+n]
	w.header += int64(e.headerSize())
	w.entries = append(w.entries, e)
	return w.buf[e.Offset:len(w.buf):len(w.buf)]
}

// Finish appends the header and returns the whole file and its entries. The Writer is used up.
func (w *Writer) Finish(key *crypto.Key) ([]byte, []Entry) {
	head := AppendHeader(make([]byte, 0, w.header), w.entries)
	n := len(w.buf)
	w.buf = key.Seal(w.buf, head)
	w.buf = binary.LittleEndian.AppendUint32(w.buf, uint32(len(w.buf)-n))
	return w.buf, w.entries
}
