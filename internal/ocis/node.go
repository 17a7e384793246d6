package ocis

import (
	"errors"
	"fmt"
	"strconv"
	"time"
)

// NodeType is what a node is, as its metadata says it.
type NodeType uint8

// The types of nodes. The root of a space says none.
const (
	TypeUnknown   NodeType = 0
	TypeFile      NodeType = 1
	TypeFolder    NodeType = 2
	TypeReference NodeType = 3
)

// NodeMeta is what the metadata of one node, revision or trashed node says. Strings that come from
// names (Name, TrashOrigin) may hold any bytes.
type NodeMeta struct {
	ID       string // "" for folders and revisions: their path tells it
	ParentID string // "" for space roots and revisions
	Name     string
	Type     NodeType
	// BlobID is "" for folders and empty files. Two metadata files can name the same blob.
	BlobID   string
	BlobSize int64 // bytes
	TreeSize int64 // bytes of all files below; folders only
	// HasTreeSize tells a folder of size 0 from one without a size, as those of the system storage.
	HasTreeSize bool
	SHA1        [20]byte
	HasSHA1     bool
	MD5         [16]byte
	HasMD5      bool
	MTime       time.Time // UTC; zero if unset
	TMTime      time.Time // UTC; newest change below; zero if unset
	// DTime is set on the root of a disabled space: when it was switched off, RFC 3339.
	DTime string
	// TrashOrigin is set on trashed nodes: the path in the space, starting with a slash.
	TrashOrigin string
	// NodeStatus is "processing:<upload id>" while the content is still in uploads/.
	NodeStatus string
	// Offloaded: the posix driver moved grants and md.* to .oc-nodes/<path of the id>.mpk.
	Offloaded bool
	Grants    []Grant
	Space     *SpaceMeta // only on the root of a space
}

// SpaceMeta is what the root node of a space says about the space.
type SpaceMeta struct {
	ID          string
	Name        string
	Type        string // personal, project, metadata, ...
	Alias       string // personal/alan
	Description string
	OwnerID     string
	OwnerIDP    string
	OwnerType   string // primary, spaceowner
	Quota       string // decimal bytes, "0" is unlimited; "" if unset
}

// AttributeError says that one attribute has a value that makes no sense. The NodeMeta that comes
// with it holds all the others.
type AttributeError struct {
	Name  string // without prefix
	Value string // shortened, quoted
	Err   error
}

func (e *AttributeError) Error() string {
	return fmt.Sprintf("attribute %s has the value %s: %v", e.Name, e.Value, e.Err)
}

func (e *AttributeError) Unwrap() error { return e.Err }

// ParseNode reads a .mpk file. prefix is that of the store ("user.ocis." or "user.oc."); names with
// another one are left alone; "" takes both.
//
// Errors: ErrEmptyMPK and *MPKError, where the result is what was read before the damage;
// *AttributeError, where only that attribute is missing from the result (the first such is
// reported).
func ParseNode(prefix string, data []byte) (NodeMeta, error) {
	var b nodeBuilder
	var odd error
	err := ScanMPK(data, func(key, value []byte) error {
		if err := b.add(prefix, key, value); err != nil && odd == nil {
			odd = err
		}
		return nil
	})
	m := b.finish()
	if err == nil {
		err = odd
	}
	return m, err
}

// NodeFromAttributes is ParseNode for attributes that were read elsewhere, such as xattrs.
func NodeFromAttributes(prefix string, attrs []Attribute) (NodeMeta, error) {
	var b nodeBuilder
	var odd error
	for _, a := range attrs {
		if err := b.add(prefix, []byte(a.Key), a.Value); err != nil && odd == nil {
			odd = err
		}
	}
	return b.finish(), odd
}

// nodeBuilder gathers the texts where they lie, and copies them out together in the end, so that a
// node costs one allocation and holds no more memory than its own texts need: a scan keeps millions
// of them.
type nodeBuilder struct {
	m NodeMeta
	// values of text attributes, slices of the data that is read
	id, parent, name, blob, dtime, origin, status []byte
	isSpace                                       bool
	space                                         spaceTexts
}

type spaceTexts struct{ id, name, kind, alias, description, owner, ownerIDP, ownerType, quota []byte }

func (b *nodeBuilder) add(prefix string, key, value []byte) error {
	if prefix == "" {
		switch {
		case len(key) >= len(PrefixOCIS) && string(key[:len(PrefixOCIS)]) == PrefixOCIS:
			prefix = PrefixOCIS
		case len(key) >= len(PrefixOpenCloud) && string(key[:len(PrefixOpenCloud)]) == PrefixOpenCloud:
			prefix = PrefixOpenCloud
		default:
			return nil
		}
	}
	if len(key) <= len(prefix) || string(key[:len(prefix)]) != prefix {
		return nil
	}
	name := key[len(prefix):]
	switch string(name) {
	case "id":
		b.id = value
	case "parentid":
		b.parent = value
	case "name":
		b.name = value
	case "type":
		n, ok := decimal(value)
		if !ok || n < 0 || n > int64(TypeReference) {
			return odd(name, value, "not 1 (file), 2 (folder) or 3 (reference)")
		}
		b.m.Type = NodeType(n)
	case "blobid":
		b.blob = value
	case "blobsize":
		n, ok := decimal(value)
		if !ok || n < 0 {
			return odd(name, value, "not a size in bytes")
		}
		b.m.BlobSize = n
	case "treesize":
		n, ok := decimal(value)
		if !ok {
			return odd(name, value, "not a size in bytes")
		}
		b.m.TreeSize, b.m.HasTreeSize = n, true
	case "cs.sha1":
		if len(value) != len(b.m.SHA1) {
			return odd(name, value, "not 20 bytes long")
		}
		copy(b.m.SHA1[:], value)
		b.m.HasSHA1 = true
	case "cs.md5":
		if len(value) != len(b.m.MD5) {
			return odd(name, value, "not 16 bytes long")
		}
		copy(b.m.MD5[:], value)
		b.m.HasMD5 = true
	case "mtime":
		return stamp(&b.m.MTime, name, value)
	case "tmtime":
		return stamp(&b.m.TMTime, name, value)
	case "dtime":
		b.dtime = value
	case "trash.origin":
		b.origin = value
	case "nodestatus":
		b.status = value
	case "metadata_offloaded":
		b.m.Offloaded = string(value) == "1" || string(value) == "true"
	case "quota":
		b.space.quota = value
	case "space.id":
		b.space.id, b.isSpace = value, true
	case "space.name":
		b.space.name, b.isSpace = value, true
	case "space.type":
		b.space.kind, b.isSpace = value, true
	case "space.alias":
		b.space.alias, b.isSpace = value, true
	case "space.description":
		b.space.description, b.isSpace = value, true
	case "owner.id":
		b.space.owner = value
	case "owner.idp":
		b.space.ownerIDP = value
	case "owner.type":
		b.space.ownerType = value
	default:
		if len(name) > len(grantPrefix) && string(name[:len(grantPrefix)]) == grantPrefix {
			g, err := ParseGrant(string(name), value)
			if err != nil {
				return &AttributeError{Name: printableName(name), Value: printable(value), Err: err}
			}
			b.m.Grants = append(b.m.Grants, g)
		}
	}
	return nil
}

func (b *nodeBuilder) finish() NodeMeta {
	var store [512]byte // more than nearly every node needs
	m := b.m
	fields := [...]struct {
		value []byte
		into  *string
	}{
		{b.id, &m.ID}, {b.parent, &m.ParentID}, {b.name, &m.Name}, {b.blob, &m.BlobID},
		{b.dtime, &m.DTime}, {b.origin, &m.TrashOrigin}, {b.status, &m.NodeStatus},
	}
	buf := store[:0]
	for _, f := range fields {
		buf = append(buf, f.value...)
	}
	all := string(buf)
	for _, f := range fields {
		*f.into, all = all[:len(f.value)], all[len(f.value):]
	}
	if b.isSpace {
		s := &b.space
		m.Space = &SpaceMeta{
			ID: string(s.id), Name: string(s.name), Type: string(s.kind), Alias: string(s.alias),
			Description: string(s.description), OwnerID: string(s.owner), OwnerIDP: string(s.ownerIDP),
			OwnerType: string(s.ownerType), Quota: string(s.quota),
		}
	}
	return m
}

func odd(name, value []byte, why string) error {
	return &AttributeError{Name: string(name), Value: printable(value), Err: errors.New(why)}
}

func printableName(name []byte) string {
	s := printable(name)
	return s[:min(len(s), 100)]
}

func stamp(t *time.Time, name, value []byte) error {
	if len(value) == 0 {
		return nil
	}
	var parsed time.Time
	if err := parsed.UnmarshalText(value); err != nil {
		return odd(name, value, "not a time of the form 2006-01-02T15:04:05.999999999Z")
	}
	*t = parsed.UTC()
	return nil
}

// decimal reads a whole number without allocating for the usual case.
func decimal(b []byte) (int64, bool) {
	if len(b) == 0 || len(b) > 20 {
		return 0, false
	}
	if len(b) <= 18 && b[0] != '-' && b[0] != '+' {
		var n int64
		for _, c := range b {
			if c < '0' || c > '9' {
				return 0, false
			}
			n = n*10 + int64(c-'0')
		}
		return n, true
	}
	n, err := strconv.ParseInt(string(b), 10, 64)
	return n, err == nil
}
