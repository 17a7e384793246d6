// Package pax reads the POSIX pax archives that hold the metadata of a store, and names the records that
// Holdfast adds to them. What writes them, restores them and checks them shares it, so that all three
// take the same archives for good.
package pax

import (
	"fmt"
	"strconv"
	"strings"
)

// Keys of the records that Holdfast adds. Other readers pass them over.
const (
	Content = "HOLDFAST.content" // path in the snapshot of the file that holds the content
	Size    = "HOLDFAST.size"    // length of that content, decimal bytes
	Holes   = "HOLDFAST.holes"   // holes of a sparse file: see ParseHoles
	Type    = "HOLDFAST.type"    // Socket, which tar has no type for
)

// Socket is the value of the record Type.
const Socket = "socket"

// Xattr begins the keys of extended attributes, as GNU tar and star write them. What follows is the name
// as EscapeXattrName makes it.
const Xattr = "SCHILY.xattr."

// BlockSize is the unit of an archive, in bytes.
const BlockSize = 512

var (
	escape   = strings.NewReplacer("%", "%25", "=", "%3D")
	unescape = strings.NewReplacer("%25", "%", "%3D", "=")
)

// EscapeXattrName makes the name of an attribute fit for the key of a record, where an equals sign would
// end the key, the way GNU tar does.
func EscapeXattrName(name string) string {
	if !strings.ContainsAny(name, "%=") {
		return name
	}
	return escape.Replace(name)
}

// XattrName undoes EscapeXattrName.
func XattrName(escaped string) string {
	if strings.IndexByte(escaped, '%') < 0 {
		return escaped
	}
	return unescape.Replace(escaped)
}

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
