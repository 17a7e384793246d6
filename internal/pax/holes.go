package pax

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Extent is a run of bytes of a file.
type Extent struct{ Off, Len int64 }

// End is the offset of the first byte after x.
func (x Extent) End() int64 { return x.Off + x.Len }

// ParseHoles reads the list of the holes of a file of size bytes: "offset:length,...", decimal,
// ascending, apart, within the file. The empty list is "".
func ParseHoles(s string, size int64) ([]Extent, error) {
	if s == "" {
		return nil, nil
	}
	var out []Extent
	last := int64(0)
	for part := range strings.SplitSeq(s, ",") {
		a, b, ok := strings.Cut(part, ":")
		off, err1 := strconv.ParseUint(a, 10, 63)
		n, err2 := strconv.ParseUint(b, 10, 63)
		if !ok || err1 != nil || err2 != nil || n == 0 || int64(off) < last || int64(n) > size || int64(off) > size-int64(n) {
			return nil, fmt.Errorf("the list of holes is damaged at %q", part)
		}
		out = append(out, Extent{int64(off), int64(n)})
		last = int64(off + n)
	}
	return out, nil
}

// FormatHoles writes what ParseHoles reads.
func FormatHoles(holes []Extent) string {
	var b []byte
	for i, h := range holes {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendInt(b, h.Off, 10)
		b = append(b, ':')
		b = strconv.AppendInt(b, h.Len, 10)
	}
	return string(b)
}

// FindHoles returns the holes of an open file of size bytes, and sets its offset to 0. On a filesystem
// that does not tell there are none.
func FindHoles(f interface {
	Fd() uintptr
	Name() string
}, size int64) ([]Extent, error) {
	var holes []Extent
	fd := int(f.Fd())
	for off := int64(0); off < size; {
		data, err := unix.Seek(fd, off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			data = size
		} else if errors.Is(err, unix.EINVAL) {
			return nil, nil
		} else if err != nil {
			return nil, &fs.PathError{Op: "seek", Path: f.Name(), Err: err}
		}
		data = min(data, size)
		if data > off {
			holes = append(holes, Extent{off, data - off})
		}
		if data >= size {
			break
		}
		hole, err := unix.Seek(fd, data, unix.SEEK_HOLE)
		if err != nil {
			return nil, &fs.PathError{Op: "seek", Path: f.Name(), Err: err}
		}
		off = hole
	}
	_, err := unix.Seek(fd, 0, 0)
	return holes, err
}
