// Package pax reads the POSIX pax archives that hold the metadata of a store, and names the records that
// Holdfast adds to them. What writes them, restores them and checks them shares it, so that all three
// take the same archives for good.
package pax

import "strings"

// Keys of the records that Holdfast adds. Other readers pass them over.
const (
	Content = "HOLDFAST.content" // path in the snapshot of the file that holds the content
	Size    = "HOLDFAST.size"    // length of that content, decimal bytes
	Holes   = "HOLDFAST.holes"   // holes of a sparse file: see ParseHoles
	Type    = "HOLDFAST.type"    // Socket, which tar has no type for
	// Object says that the blob lay in a bucket: it is the object's key there. Where the content is in no
	// file of the snapshot, there is no Content, and the others tell how to find and know it.
	Object  = "HOLDFAST.object"
	Version = "HOLDFAST.version" // version id of the object
	ETag    = "HOLDFAST.etag"
	SHA1    = "HOLDFAST.sha1" // as the instance recorded it, hexadecimal
	MD5     = "HOLDFAST.md5"  // the same
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
