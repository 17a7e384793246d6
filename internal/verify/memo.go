package verify

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// item is what counts of an entry of an archive. It depends on the archive alone, not on the snapshot around it.
type item struct {
	kind       itemKind
	typ        byte   // of the header
	processing bool   // the server had not finished with it
	changed    bool   // since the server wrote its metadata
	name, link string // of the header
	key        string // id of the node or blob, name of the upload
	size       int64  // bytes of data in the archive
	need       need   // what metadata refers to; no blob: nothing
	ref        *reference
}

type itemKind byte

const (
	isUpload itemKind = iota + 1
	isBlob
	isMeta
	isNode
	isFile // of the posix driver
	isVersion
)

// reference tells where the content of an entry is. Its texts are those of the records.
type reference struct {
	inFile                                    bool // at place, else in object
	place, size, holes, object, version, etag string
}

// reference takes from the header where the content is.
func (it *item) reference(h *pax.Header) {
	place, inFile := h.Records[pax.Content]
	object, holes := h.Records[pax.Object], h.Records[pax.Holes]
	if inFile || object != "" || holes != "" {
		it.ref = &reference{inFile, place, h.Records[pax.Size], holes, object, h.Records[pax.Version], h.Records[pax.ETag]}
	}
}

// keep makes the item independent of the buffers that its texts are parts of, and returns about how much memory it takes, in bytes.
func (it *item) keep() int64 {
	n := int64(160)
	hold := func(s *string) {
		*s = strings.Clone(*s)
		n += int64(len(*s))
	}
	hold(&it.name)
	hold(&it.link)
	hold(&it.key)
	hold(&it.need.blob)
	if it.ref != nil {
		r := *it.ref
		it.ref = &r
		n += 112
		for _, s := range []*string{&r.place, &r.size, &r.holes, &r.object, &r.version, &r.etag} {
			hold(s)
		}
	}
	return n
}

// segment is a run of whole entries of an archive that has blobs of its own. Capture ends blobs between groups of entries, so that of
// an archive that was changed in a few places most segments are those of the snapshot before.
type segment struct {
	blobs  []id.ID
	first  int // of its blobs, in the archive in which it was read
	items  []item
	offset int64 // where it began, bytes
	bytes  int64 // its length
	memory int64 // about what it takes, in bytes
	end    bool  // the archive ends in it
}

// memo is what is remembered of one archive while it is proven for several snapshots, one after the other: the segments of the last
// one, and what came of it. A nil memo remembers nothing.
type memo struct {
	limit          int64 // of the memory of old and now, in bytes
	used           int64
	old, now       map[id.ID]*segment // by the first blob
	layout, prefix string             // what items depend on beside the archive
	root           string             // the same, for the posix driver: the folder of the space

	// What the proof found, for a key that is not zero.
	key   spaceKey
	proof snapshot.Proof
	found []string
}

// begin is called before an archive is read.
func (m *memo) begin(st *snapshot.Store) {
	if m == nil {
		return
	}
	m.old, m.now = m.now, map[id.ID]*segment{}
	if m.layout != st.Layout || m.prefix != st.Prefix {
		m.layout, m.prefix, m.old = st.Layout, st.Prefix, nil
	}
	m.used = 0
	for _, s := range m.old {
		m.used += s.memory
	}
}

// rooted tells which folder the archive is of, as its first entry says.
func (m *memo) rooted(root string) {
	if m != nil && m.root != root {
		m.root, m.old = strings.Clone(root), nil
	}
}

// add remembers an item of a segment, if there is memory for it.
func (m *memo) add(s *segment, it *item) bool {
	x := *it
	s.memory += x.keep()
	s.items = append(s.items, x)
	return m.used+s.memory <= m.limit
}

// keep remembers a segment that was read to the end of the blobs.
func (m *memo) keep(s *segment, blobs []id.ID, offset int64) {
	if m == nil || s == nil {
		return
	}
	s.blobs, s.bytes = slices.Clone(blobs[s.first:]), offset-s.offset
	s.items = slices.Clip(s.items)
	s.memory += 160 + int64(len(s.blobs))*int64(len(id.ID{}))
	if m.used+s.memory > m.limit || m.now[s.blobs[0]] != nil {
		return
	}
	m.used += s.memory
	m.now[s.blobs[0]] = s
}

// find returns the segment that blobs begin with, or nil. An archive's first segment is no other's, because it tells the root.
func (m *memo) find(blobs []id.ID, first bool) *segment {
	if len(blobs) == 0 {
		return nil
	}
	s := m.old[blobs[0]]
	if s == nil || first != (s.first == 0) || len(s.blobs) > len(blobs) || !slices.Equal(s.blobs, blobs[:len(s.blobs)]) {
		return nil
	}
	if m.now[blobs[0]] == nil {
		m.now[blobs[0]] = s // and it stays in old, for an archive that has it twice
	}
	return s
}

// spaceKey is all that the proof of a space depends on.
type spaceKey struct {
	layout, prefix, id, folder string
	archive                    id.ID // its blobs and its size
	within                     [5]id.ID
	gaps                       id.ID // see gapsOf
	away                       *objects
}

// key tells what the proof of the space depends on. Without ok its outcome is for this snapshot only.
func (p *prover) key(place string) (k spaceKey, ok bool, err error) {
	pass := func(err error) error {
		if errors.Is(err, errTold) {
			return nil
		}
		return err
	}
	n, err := p.lookup(place)
	if err != nil || n == nil {
		return k, false, pass(err)
	}
	h := sha256.New()
	for _, b := range n.Content {
		h.Write(b[:])
	}
	h.Write(binary.LittleEndian.AppendUint64(nil, n.Size))
	k = spaceKey{layout: p.st.Layout, prefix: p.st.Prefix, id: p.sp.ID, folder: p.sp.Folder, gaps: p.gaps, away: p.away}
	h.Sum(k.archive[:0])
	p.own = nil
	for i, d := range []string{"spaces/" + p.sp.Folder, "versions/" + p.sp.Folder, "trash/" + p.sp.Folder, "trash-versions/" + p.sp.Folder,
		"unreferenced/" + snapshot.SafeName(p.sp.ID)} {
		d = p.base + "/" + d
		if path.Clean(d) != d {
			return k, false, nil
		}
		if k.within[i], _, err = p.subtree(d); err != nil {
			return k, false, pass(err)
		}
		p.own = append(p.own, d+"/")
	}
	return k, true, nil
}

// expected tells whether a place lies where the key of the space knows of.
func (p *prover) expected(place string) bool {
	place = "/" + strings.TrimPrefix(place, "/")
	return slices.ContainsFunc(p.own, func(d string) bool { return strings.HasPrefix(place, d) })
}

// gapsOf is a sum over what else the proof of a space takes from its snapshot: known gaps, and uploads.
func gapsOf(known map[string]bool, uploads map[string]int64) (d id.ID) {
	var b bytes.Buffer
	entry := func(s string, n int64) {
		b.Write(binary.AppendVarint(binary.AppendUvarint(nil, uint64(len(s))), n))
		b.WriteString(s)
	}
	entry("", int64(len(known)))
	for _, k := range slices.Sorted(maps.Keys(known)) {
		entry(k, -1)
	}
	for _, k := range slices.Sorted(maps.Keys(uploads)) {
		entry(k, uploads[k])
	}
	return id.Hash(b.Bytes())
}
