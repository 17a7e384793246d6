package ocis

import (
	"strings"
	"time"
)

// Depths and widths of Pathify for the two kinds of ids.
const (
	SpaceDepth, SpaceWidth = 1, 2
	NodeDepth, NodeWidth   = 4, 2
)

// Pathify cuts depth groups of width bytes off the front of id, one directory each; what remains is
// the last element. Without the slashes the path is the id again. An id that is too short is cut
// less often, so that something always remains.
func Pathify(id string, depth, width int) string {
	if depth <= 0 || width <= 0 || len(id) <= width {
		return id
	}
	b := make([]byte, 0, len(id)+depth)
	for ; depth > 0 && len(id) > width; depth-- {
		b = append(b, id[:width]...)
		b = append(b, '/')
		id = id[width:]
	}
	return string(append(b, id...))
}

// SpacePath is where a space lies below the store's root: spaces/b1/f74ec4-...
func SpacePath(spaceID string) string {
	return "spaces/" + Pathify(spaceID, SpaceDepth, SpaceWidth)
}

// NodePath is where a node, revision, blob or trash entry lies below its kind's folder.
func NodePath(id string) string { return Pathify(id, NodeDepth, NodeWidth) }

// NameKind is what a name inside the folder of a node (nodes/aa/bb/cc/dd/) stands for.
type NameKind uint8

// The kinds of names. Those of one form (current, revision, trashed) follow each other in the same
// order: entry, metadata, locks.
const (
	NameNode  NameKind = iota // the node itself: a directory or an empty file
	NameMeta                  // .mpk
	NameMLock                 // .mlock: lock of the metadata
	NameLock                  // .lock: a user's lock
	NameFLock                 // .flock: lock of the content
	NameRevision
	NameRevisionMeta
	NameRevisionMLock
	NameRevisionLock
	NameRevisionFLock
	NameTrashed
	NameTrashedMeta
	NameTrashedMLock
	NameTrashedLock
	NameTrashedFLock
	NameTemp    // left over by a crash in the middle of writing metadata
	NameUnknown // none of these
)

const kindsPerForm = NameRevision - NameNode

// Base is the kind of the entry that k belongs to: NameNode, NameRevision, NameTrashed; NameTemp and
// NameUnknown are their own.
func (k NameKind) Base() NameKind {
	if k >= NameTemp {
		return k
	}
	return k - k%kindsPerForm
}

// IsMeta tells whether k is a metadata file.
func (k NameKind) IsMeta() bool {
	return k == NameMeta || k == NameRevisionMeta || k == NameTrashedMeta
}

// IsLock tells whether k is one of the lock files.
func (k NameKind) IsLock() bool { return k < NameTemp && k%kindsPerForm >= NameMLock }

var nameKinds = [...]string{
	"node", "metadata", "metadata lock", "lock", "content lock",
	"revision", "revision metadata", "revision metadata lock", "revision lock", "revision content lock",
	"trashed node", "trashed metadata", "trashed metadata lock", "trashed lock", "trashed content lock",
	"temporary file", "unknown",
}

func (k NameKind) String() string {
	if int(k) < len(nameKinds) {
		return nameKinds[k]
	}
	return "unknown"
}

const (
	revisionMark = ".REV."
	trashMark    = ".T."
)

// ClassifyNodeName takes a name inside nodes/aa/bb/cc/dd/ apart: its kind, the last part of the node
// id (put the four folder names before it to get the id), and for revisions and trashed nodes the
// time as it stands in the name. A revision that clashed with another carries a number after the
// time ("2026-01-02T03:04:05Z.1"); it is part of stamp.
func ClassifyNodeName(name string) (kind NameKind, rest, stamp string) {
	if isTempName(name) {
		return NameTemp, name, ""
	}
	base, part := name, NameNode
	for _, s := range nodeSuffixes {
		if cut, ok := strings.CutSuffix(name, s.suffix); ok {
			base, part = cut, s.kind
			break
		}
	}
	if base == "" {
		return NameUnknown, name, ""
	}
	if i := strings.LastIndex(base, revisionMark); i >= 0 {
		rest, stamp = base[:i], base[i+len(revisionMark):]
		if _, _, ok := ParseStamp(stamp); !ok || rest == "" {
			return NameUnknown, name, ""
		}
		return NameRevision + part, rest, stamp
	}
	if i := strings.LastIndex(base, trashMark); i >= 0 {
		rest, stamp = base[:i], base[i+len(trashMark):]
		if _, n, ok := ParseStamp(stamp); !ok || n != 0 || rest == "" {
			return NameUnknown, name, ""
		}
		return NameTrashed + part, rest, stamp
	}
	return part, base, ""
}

var nodeSuffixes = [...]struct {
	suffix string
	kind   NameKind
}{{".mpk", NameMeta}, {".mlock", NameMLock}, {".lock", NameLock}, {".flock", NameFLock}}

// isTempName: dot, name of the target, digits.
func isTempName(name string) bool {
	if len(name) < 3 || name[0] != '.' {
		return false
	}
	target := strings.TrimRight(name, "0123456789")
	return len(target) < len(name) && len(target) > len("..mpk") && strings.HasSuffix(target, ".mpk")
}

// ParseStamp reads the time in the name of a revision or trashed node. clash is the number after it,
// 0 if there is none.
func ParseStamp(stamp string) (t time.Time, clash int, ok bool) {
	if i := strings.LastIndexByte(stamp, 'Z'); i >= 0 && i+1 < len(stamp) {
		digits := stamp[i+1:]
		if digits[0] != '.' || len(digits) < 2 || len(digits) > 7 {
			return t, 0, false
		}
		for _, c := range []byte(digits[1:]) {
			if c < '0' || c > '9' {
				return t, 0, false
			}
			clash = clash*10 + int(c-'0')
		}
		if clash == 0 {
			return t, 0, false
		}
		stamp = stamp[:i+1]
	}
	t, err := time.Parse(time.RFC3339Nano, stamp)
	if err != nil {
		return t, 0, false
	}
	return t.UTC(), clash, true
}
