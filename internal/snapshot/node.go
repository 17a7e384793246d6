// Package snapshot holds the records of a repository: Snapshot, Tree and Node in restic's JSON, and
// the manifest that Holdfast adds. Trees are written in restic's canonical form, byte for byte, so
// that every reader re-encodes them to the same bytes.
//
// Source: restic's design document and the repository reference, "Trees" and "Snapshots".
package snapshot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"time"

	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

// NodeType is the type of a directory entry.
type NodeType string

// The node types.
const (
	File    NodeType = "file"
	Dir     NodeType = "dir"
	Symlink NodeType = "symlink"
	Dev     NodeType = "dev"
	CharDev NodeType = "chardev"
	FIFO    NodeType = "fifo"
	Socket  NodeType = "socket"
)

// Names of the attributes that Holdfast adds to nodes. Readers keep them; nobody applies them.
const (
	AttrPrefix = "holdfast."
	AttrHoles  = "holdfast.holes"  // "offset:length,..." of a sparse file, decimal bytes
	AttrID     = "holdfast.id"     // node id of the item
	AttrBlobID = "holdfast.blobid" // blob id of the content
	AttrSHA1   = "holdfast.sha1"   // checksum that the server recorded, hexadecimal
	AttrSpace  = "holdfast.space"  // space id, on the root folder of a space
	// Of contents that lie in a bucket and not in the repository; the node is a symbolic link there.
	AttrObject  = "holdfast.object"  // key of the object
	AttrVersion = "holdfast.version" // version id
	AttrETag    = "holdfast.etag"
	AttrSize    = "holdfast.size" // bytes
)

// Xattr is one extended attribute.
type Xattr struct {
	Name  string
	Value []byte
}

// Node is one entry of a tree.
type Node struct {
	Name string // raw bytes
	Type NodeType
	Mode fs.FileMode // permission, setuid, setgid, sticky and type bits
	// ModTime is written as atime and ctime as well, so that a tree depends on the data alone.
	ModTime time.Time
	UID     uint32
	GID     uint32
	// Inode and DeviceID are set for hard-link groups only (restic links what shares them).
	Inode    uint64
	DeviceID uint64
	Size     uint64 // bytes; files only
	Links    uint64
	// LinkTarget holds the raw bytes of a symbolic link's target.
	LinkTarget string
	Xattrs     []Xattr
	Device     uint64  // st_rdev of device nodes
	Content    []id.ID // files only
	Subtree    id.ID   // directories only
}

// Attr returns the value of the extended attribute called name.
func (n *Node) Attr(name string) (string, bool) {
	for i := range n.Xattrs {
		if n.Xattrs[i].Name == name {
			return string(n.Xattrs[i].Value), true
		}
	}
	return "", false
}

// Tree is the list of entries of one directory, sorted by raw name bytes.
type Tree struct {
	Nodes []*Node
}

// Find returns the node called name, or nil.
func (t *Tree) Find(name string) *Node {
	for _, n := range t.Nodes { // foreign trees need not be sorted
		if n.Name == name {
			return n
		}
	}
	return nil
}

// jsonNode is the JSON form of a Node, for reading.
type jsonNode struct {
	Name          string      `json:"name"`
	Type          NodeType    `json:"type"`
	Mode          uint32      `json:"mode"`
	MTime         time.Time   `json:"mtime"`
	UID           uint32      `json:"uid"`
	GID           uint32      `json:"gid"`
	Inode         uint64      `json:"inode"`
	DeviceID      uint64      `json:"device_id"`
	Size          uint64      `json:"size"`
	Links         uint64      `json:"links"`
	LinkTarget    string      `json:"linktarget"`
	LinkTargetRaw []byte      `json:"linktarget_raw"`
	Xattrs        []jsonXattr `json:"extended_attributes"`
	Device        uint64      `json:"device"`
	Content       []id.ID     `json:"content"`
	Subtree       *id.ID      `json:"subtree"`
}

type jsonXattr struct {
	Name  string `json:"name"`
	Value []byte `json:"value"`
}

type jsonTree struct {
	Nodes []jsonNode `json:"nodes"`
}

var errNoNodes = errors.New("no list of nodes")

// DecodeTree reads a tree blob, ours or another program's. Order and uniqueness of the names are
// not checked: whoever writes files from a tree must not trust its names.
//
// Errors: data that is no tree, or a node name whose quoting is broken.
func DecodeTree(p []byte) (*Tree, error) {
	if t, ok := canonical(p); ok {
		return t, nil
	}
	return decodeJSON(p)
}

func decodeJSON(p []byte) (*Tree, error) {
	var jt jsonTree
	if err := json.Unmarshal(p, &jt); err != nil {
		return nil, fmt.Errorf("decode tree: %w", err)
	}
	if jt.Nodes == nil {
		return nil, fmt.Errorf("decode tree: %w", errNoNodes)
	}
	nodes := make([]Node, len(jt.Nodes))
	t := &Tree{Nodes: make([]*Node, len(jt.Nodes))}
	for i := range jt.Nodes {
		j := &jt.Nodes[i]
		name, err := strconv.Unquote(`"` + j.Name + `"`)
		if err != nil {
			return nil, fmt.Errorf("decode tree: name %q of node %d: %w", j.Name, i, err)
		}
		n := &nodes[i]
		*n = Node{
			Name: name, Type: j.Type, Mode: fs.FileMode(j.Mode), ModTime: j.MTime,
			UID: j.UID, GID: j.GID, Inode: j.Inode, DeviceID: j.DeviceID, Size: j.Size, Links: j.Links,
			LinkTarget: j.LinkTarget, Device: j.Device, Content: j.Content,
		}
		if len(j.LinkTargetRaw) > 0 {
			n.LinkTarget = string(j.LinkTargetRaw)
		}
		if j.Subtree != nil {
			n.Subtree = *j.Subtree
		}
		for _, x := range j.Xattrs {
			n.Xattrs = append(n.Xattrs, Xattr(x))
		}
		t.Nodes[i] = n
	}
	return t, nil
}
