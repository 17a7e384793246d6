package consistency

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"strings"
)

// key stands for an id: the 16 bytes of a UUID, or a hash of any other id. Ids are chosen by the server, so
// nobody gains by two that collide, and 16 bytes make it as unlikely as two equal UUIDs.
type key [16]byte

// keyOf makes the key of an id. uuid tells whether the key gives the id back.
func keyOf(s string) (k key, uuid bool) {
	if len(s) == 36 && s[8] == '-' && s[13] == '-' && s[18] == '-' && s[23] == '-' {
		var buf [32]byte
		n := 0
		for i := range len(s) {
			c := s[i]
			if i == 8 || i == 13 || i == 18 || i == 23 {
				continue
			}
			if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
				n = -1
				break
			}
			buf[n] = c
			n++
		}
		if n == len(buf) {
			_, _ = hex.Decode(k[:], buf[:]) // only hexadecimal digits are left
			return k, true
		}
	}
	sum := sha256.Sum256([]byte(s))
	copy(k[:], sum[:])
	return k, false
}

// uuid writes a key as the id that it was made from.
func (k key) uuid() string {
	var b [36]byte
	hex.Encode(b[:8], k[:4])
	hex.Encode(b[9:13], k[4:6])
	hex.Encode(b[14:18], k[6:8])
	hex.Encode(b[19:23], k[8:10])
	hex.Encode(b[24:], k[10:])
	b[8], b[13], b[18], b[23] = '-', '-', '-', '-'
	return string(b[:])
}

// ids turns keys back into ids. Only those that are no UUIDs are remembered: system spaces, and trashed
// nodes with the time in their name.
type ids struct{ odd map[key]string }

func (t *ids) key(s string) key {
	k, uuid := keyOf(s)
	if !uuid {
		if t.odd == nil {
			t.odd = map[key]string{}
		}
		t.odd[k] = s
	}
	return k
}

func (t *ids) text(k key) string {
	if s, ok := t.odd[k]; ok {
		return s
	}
	return k.uuid()
}

// index finds the place of a key: open addressing with 4 bytes a slot, so that a million ids take 8 MB.
type index struct {
	slots []int32 // place + 1; 0 is free
	n     int
}

// find returns the place of k, or -1. at gives the key of a place.
func (x *index) find(k key, at func(int32) key) int32 {
	if len(x.slots) == 0 {
		return -1
	}
	for i := x.slot(k); ; i = (i + 1) & (len(x.slots) - 1) {
		switch p := x.slots[i] - 1; {
		case p < 0:
			return -1
		case at(p) == k:
			return p
		}
	}
}

func (x *index) slot(k key) int {
	// Version and variant of a UUID are fixed bits; the others are random, or a clock.
	h := (binary.LittleEndian.Uint64(k[:8]) ^ binary.LittleEndian.Uint64(k[8:])*0x9e3779b97f4a7c15) * 0xff51afd7ed558ccd
	return int(h>>33) & (len(x.slots) - 1)
}

// put notes that k, which is not there yet, lies at place.
func (x *index) put(k key, place int32, at func(int32) key) {
	if 2*(x.n+1) > len(x.slots) {
		old := x.slots
		x.slots = make([]int32, max(64, 2*len(old)))
		for _, p := range old {
			if p > 0 {
				x.place(at(p-1), p)
			}
		}
	}
	x.place(k, place+1)
	x.n++
}

func (x *index) place(k key, p int32) {
	i := x.slot(k)
	for x.slots[i] != 0 {
		i = (i + 1) & (len(x.slots) - 1)
	}
	x.slots[i] = p
}

// Flags of a node.
const (
	fPresent   = 1 << iota // its directory or file is there
	fDir                   // it is a directory
	fMeta                  // its metadata was read
	fBad                   // its metadata is there and cannot be read
	fLinked                // a folder's link leads to it
	fTrashLink             // a trash link leads to it
	fTrashed               // its name has .T.<time>
	fRevision              // it is a version
	fFile                  // metadata says file
	fFolder                // metadata says folder
	fHasSize               // it has a tree size
	fOrigin                // it tells where it was before it was trashed
	fBusy                  // it is being processed
	fTold                  // something is wrong with it that explains other findings
	fSeen                  // a walk came here
	fUnknown               // the size of something below it is not known
)

// node is a node, a trashed node or a revision: 88 bytes.
type node struct {
	id       key // table key: with .REV.<time> or .T.<time> as in its name
	base     key // the node's own id
	parent   key // by metadata
	nameHash uint32
	name     uint32 // place in names: of the link that leads to it, or its origin in the trash
	treeSize int64  // by metadata; of a file without a blob its size
	sum      int64  // of what is below it
	link     int32  // folder with the link, or for a revision its node; -1
	next     int32  // next child of the same folder, or -1
	kid      int32  // first child, or -1
	blob     int32  // -1
	flags    uint32
}

// blob is a blob: one that is there, or is named by metadata, or both. 72 bytes.
type blob struct {
	id    key
	sha1  [20]byte
	md5   [16]byte
	has   bool // sha1 is known
	sum   bool // md5 is known
	odd   bool // the bucket says another MD5
	sizes bool // metadata says different sizes in different places
	want  int64
	size  int64 // -1 if it is not there
	mtime int64 // nanoseconds since 1970
	node  int32 // the first that refers to it, or -1
}

const chunkBits = 12

// list grows without copying: a table of millions is never in memory twice.
type list[T any] struct {
	chunks [][]T
	n      int32
}

func (l *list[T]) at(i int32) *T { return &l.chunks[i>>chunkBits][i&(1<<chunkBits-1)] }

func (l *list[T]) add(v T) int32 {
	if l.n&(1<<chunkBits-1) == 0 {
		size := 1 << chunkBits
		if l.n == 0 { // most spaces are small
			size = 64
		}
		l.chunks = append(l.chunks, make([]T, 0, size))
	}
	last := &l.chunks[len(l.chunks)-1]
	*last = append(*last, v)
	l.n++
	return l.n - 1
}

// names keeps names one after the other, with their lengths before them.
type names struct{ b []byte }

func (n *names) add(s string) uint32 {
	if len(s) > 1<<16-1 || len(n.b) > 1<<32-1<<17 {
		s = "" // no file system has such names; then messages do without
	}
	if len(n.b) == 0 {
		n.b = append(n.b, 0, 0) // place 0 is no name
	}
	at := len(n.b)
	n.b = binary.LittleEndian.AppendUint16(n.b, uint16(len(s)))
	n.b = append(n.b, s...)
	return uint32(at)
}

func (n *names) get(at uint32) string {
	if at == 0 {
		return ""
	}
	l := uint32(binary.LittleEndian.Uint16(n.b[at:]))
	return string(n.b[at+2 : at+2+l])
}

// table holds the nodes and blobs of one space.
type table struct {
	ids   ids
	nodes list[node]
	byID  index
	blobs list[blob]
	byBlb index
	names names
	// grants of nodes other than the root, which are few: "u:<id>" or "g:<id>".
	grants map[int32][]string
}

func (t *table) nodeKey(i int32) key { return t.nodes.at(i).id }
func (t *table) blobKey(i int32) key { return t.blobs.at(i).id }

func (t *table) find(k key) int32 { return t.byID.find(k, t.nodeKey) }

// node returns the node called id, made if need be. id may end in .REV.<time> or .T.<time>.
func (t *table) node(id string) int32 {
	k := t.ids.key(id)
	if i := t.find(k); i >= 0 {
		return i
	}
	n := node{id: k, base: k, link: -1, next: -1, kid: -1, blob: -1}
	if base, _, ok := cutID(id); ok {
		n.base = t.ids.key(base)
	}
	i := t.nodes.add(n)
	t.byID.put(k, i, t.nodeKey)
	return i
}

// cutID cuts the time off the id of a revision or a trashed node.
func cutID(id string) (base, stamp string, ok bool) {
	for _, mark := range []string{".REV.", ".T."} {
		if i := strings.LastIndex(id, mark); i > 0 {
			return id[:i], id[i+len(mark):], true
		}
	}
	return id, "", false
}

func (t *table) blobAt(id string) int32 {
	k := t.ids.key(id)
	if i := t.byBlb.find(k, t.blobKey); i >= 0 {
		return i
	}
	i := t.blobs.add(blob{id: k, size: -1, node: -1})
	t.byBlb.put(k, i, t.blobKey)
	return i
}

// id is the name of node i.
func (t *table) id(i int32) string { return t.ids.text(t.nodes.at(i).id) }
