package verify

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// prover proves one archive of one snapshot: a space, or what of a store belongs to none. The walk over the trees has told all
// that is wrong with them, so that the prover only finds out what of the proof they take along.
type prover struct {
	c       *checker
	ctx     context.Context
	root    id.ID
	st      *snapshot.Store
	sp      *snapshot.Space // nil: the archive of the store
	base    string          // folder of the store in the snapshot
	known   map[string]bool // blobs that were missing when the snapshot was made
	gaps    id.ID           // of known and uploads
	proof   snapshot.Proof
	uploads map[string]int64 // bytes of what lies in uploads/
	folders folders
	trees   map[string]*snapshot.Tree // those of folders, by path
	away    *objects                  // where contents are that the repository does not have
	asked   []object                  // those of this archive
	own     []string                  // folders in which contents of the space are expected
	outside bool                      // a content was looked for elsewhere
	found   []string                  // what is wrong, without the name of the snapshot
	unasked error                     // why the bucket could not be asked
	top     string                    // folder of a space of the posix driver, in its archive
	begun   bool                      // top is known
	cut     bool                      // the archive could not be read to its end
}

func (p *prover) errorf(format string, args ...any) {
	p.found = append(p.found, fmt.Sprintf(format, args...))
}

// run proves the archive. m is what is remembered of the same archive in other snapshots, or nil. It returns an error only if the
// check ends.
func (p *prover) run(m *memo) error {
	if p.sp == nil {
		if err := p.archive(p.base+"/store.tar", m, p.upload, func(it *item, size int64) {
			if it.kind == isUpload {
				p.uploads[it.key] = size
			}
		}); err != nil {
			return err
		}
		return p.ask()
	}
	place := p.base + "/metadata/" + snapshot.SafeName(p.sp.ID) + ".tar"
	prove := func() error {
		if err := p.space(place, m); err != nil {
			return err
		}
		return p.ask()
	}
	if m == nil {
		return prove()
	}
	key, ok, err := p.key(place)
	if err != nil {
		return err
	}
	if ok && m.key == key {
		p.proof, p.found = m.proof, m.found
		return nil
	}
	m.key = spaceKey{}
	if err := prove(); err != nil {
		return err
	}
	if ok && !p.outside && !p.cut && p.unasked == nil {
		m.key, m.proof, m.found = key, p.proof, p.found
	}
	return nil
}

// archive reads the tar at place entry by entry: parse tells what of one counts, and take gets it with the size of its content.
// What parse tells must depend on the archive alone, because for runs of entries that m has it is not asked. Errors end the check.
func (p *prover) archive(place string, m *memo, parse func(h *pax.Header, r io.Reader, it *item), take func(it *item, size int64)) error {
	fail := func(err error) error {
		if p.ctx.Err() != nil {
			return context.Cause(p.ctx)
		}
		p.cut = true
		p.errorf("%s: %v", place, err)
		return nil
	}
	n, err := p.lookup(place)
	switch {
	case errors.Is(err, errTold):
		p.cut = true
		return nil
	case err != nil:
		return err
	case n == nil:
		return fail(snapshot.ErrNoSuchPath)
	case !p.c.whole(n):
		p.cut = true
		return nil
	}
	use := func(it *item) error {
		size, err := p.content(it)
		if err == nil {
			take(it, size)
		}
		return err
	}
	r := snapshot.NewReader(p.ctx, p.c.r, n)
	tr := pax.NewReader(r)
	m.begin(p.st)
	var s *segment // what is read now, if it is to be remembered
	for {
		if err := tr.Skip(); err != nil {
			return fail(err)
		}
		// Between two entries and between two blobs alike nothing that follows depends on what was before, but for global records.
		if at, ok := r.Boundary(); ok && m != nil {
			if tr.Global() {
				m, s = nil, nil
				continue
			}
			m.keep(s, n.Content[:at], tr.Offset())
			if s = m.find(n.Content[at:], at == 0); s != nil {
				if s.first == 0 {
					p.top, p.begun = m.root, true
				}
				for i := range s.items {
					if err := use(&s.items[i]); err != nil {
						return err
					}
				}
				r.SkipBlobs(len(s.blobs))
				tr.Passed(s.bytes)
				if s.end {
					return nil
				}
				s = nil
				continue
			}
			s = &segment{first: at, offset: tr.Offset()}
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			if s != nil && !tr.Global() {
				s.end = true
				at, _ := r.Boundary()
				m.keep(s, n.Content[:at], tr.Offset())
			}
			return nil
		}
		if err != nil {
			return fail(err)
		}
		it := item{name: h.Name, typ: h.Type, link: h.Link, size: h.Size}
		it.reference(h)
		if parse(h, tr, &it); it.kind == 0 && it.ref == nil {
			continue
		}
		if s != nil && !m.add(s, &it) {
			s = nil
		}
		if err := use(&it); err != nil {
			return err
		}
	}
}

// content checks that the file that holds the content of an entry is there with the right size, and returns
// that size, in bytes.
func (p *prover) content(it *item) (int64, error) {
	size, ref := it.size, it.ref
	if ref == nil {
		return size, nil
	}
	if ref.object != "" && !ref.inFile {
		return p.object(it)
	}
	if ref.inFile {
		place := ref.place
		if !p.expected(place) {
			p.outside = true
		}
		n, err := p.lookup(place)
		if err != nil && !errors.Is(err, errTold) {
			return 0, err
		}
		var bad error
		size, bad = strconv.ParseInt(ref.size, 10, 64)
		switch {
		case err != nil, n != nil && !p.c.whole(n):
		case n == nil:
			p.errorf("%q has its content in %q, which is not there", it.name, place)
		case bad != nil || size != int64(n.Size):
			p.errorf("%q has %q bytes, but %q holds %d", it.name, ref.size, place, n.Size)
			size = int64(n.Size) // one finding is enough
		}
	}
	if it.typ == '0' {
		if _, err := pax.ParseHoles(ref.holes, size); err != nil {
			p.errorf("%q: %v", it.name, err)
		}
	}
	return size, nil
}

// treeCache bounds the folders that are kept decoded for the provers that work one after the other.
const treeCache = 4096

// folders are decoded folders. Archives of one space in several snapshots, and spaces of one snapshot, have most of them in common.
type folders map[id.ID]*snapshot.Tree

// errTold is returned for what cannot be reached because of damage that the walk over the trees has told.
var errTold = errors.New("a folder on the way to it is damaged")

// lookup finds a file by its path and keeps the folders that it went through. The node is nil if there is
// none.
//
// Errors: errTold; others end the check.
func (p *prover) lookup(place string) (*snapshot.Node, error) {
	if place = "/" + strings.TrimPrefix(place, "/"); path.Clean(place) != place {
		return nil, nil
	}
	dir, name := path.Split(place)
	t, err := p.folder(path.Clean(dir))
	if err != nil || t == nil {
		return nil, err
	}
	i := sort.Search(len(t.Nodes), func(i int) bool { return t.Nodes[i].Name >= name })
	if i == len(t.Nodes) || t.Nodes[i].Name != name {
		if p.c.trees[p.root] { // perhaps it is not sorted
			i = slices.IndexFunc(t.Nodes, func(n *snapshot.Node) bool { return n.Name == name })
		} else {
			i = -1
		}
	}
	if i >= 0 && t.Nodes[i].Type == snapshot.File {
		return t.Nodes[i], nil
	}
	return nil, nil
}

func (p *prover) folder(dir string) (*snapshot.Tree, error) {
	if t, ok := p.trees[dir]; ok {
		return t, nil
	}
	d, ok, err := p.subtree(dir)
	if err != nil || !ok {
		return nil, err
	}
	t := p.folders[d]
	if t == nil {
		if t, err = snapshot.LoadTree(p.ctx, p.c.r, d); err != nil {
			if p.ctx.Err() != nil {
				return nil, context.Cause(p.ctx)
			}
			return nil, errTold
		}
	}
	if len(p.trees) > treeCache || len(p.folders) > treeCache {
		clear(p.trees)
		clear(p.folders)
	}
	p.trees[dir], p.folders[d] = t, t
	return t, nil
}

// subtree finds the id of a folder, and tells whether there is one. Errors are those of lookup.
func (p *prover) subtree(dir string) (id.ID, bool, error) {
	if dir == "/" {
		return p.root, true, nil
	}
	up, err := p.folder(path.Dir(dir))
	if err != nil || up == nil {
		return id.ID{}, false, err
	}
	n := up.Find(path.Base(dir))
	if n == nil || n.Type != snapshot.Dir {
		return id.ID{}, false, nil
	}
	return n.Subtree, true, nil
}

// metaLimit bounds a metadata file that is read as one, in bytes; capture reads as much.
const metaLimit = 16 << 20

// need is a blob that the metadata of a node refers to.
type need struct {
	size int64
	blob string
}

// spaceProof is what the tar of a space of a decomposed store tells. Keys are node ids, with .REV.<time> or
// .T.<time> as on disk.
type spaceProof struct {
	metas map[string]need  // what metadata refers to; also an empty blob id
	nodes map[string]bool  // those whose directory or file is there
	have  map[string]int64 // sizes of the blobs that are there
	sizes map[string]int64 // the same by the names of the files, for hard links to them
}

// space proves a space from its tar.
func (p *prover) space(place string, m *memo) error {
	if p.st.Layout == string(ocis.Posix) {
		return p.archive(place, m, func(h *pax.Header, _ io.Reader, it *item) {
			if !p.begun { // parents come before what is in them
				p.top, p.begun = strings.TrimSuffix(h.Name, "/"), true
				m.rooted(p.top)
			}
			p.posixEntry(h, strings.Trim(strings.TrimPrefix(h.Name, p.top), "/"), it)
		}, p.takePosix)
	}
	s := &spaceProof{metas: map[string]need{}, nodes: map[string]bool{}, have: map[string]int64{}, sizes: map[string]int64{}}
	err := p.archive(place, m, p.entry, s.take)
	// Of an archive that is cut off no blob is missed: blobs come before the nodes that need them.
	p.compare(s)
	return err
}

// upload looks at one entry of what of a store belongs to no space.
func (p *prover) upload(h *pax.Header, _ io.Reader, it *item) {
	if up, ok := strings.CutPrefix(h.Name, "uploads/"); ok {
		it.kind, it.key = isUpload, up
	}
}

// entry looks at one entry of a decomposed store: spaces/xx/rest/nodes/aa/bb/cc/dd/name, or the same below
// blobs.
func (p *prover) entry(h *pax.Header, r io.Reader, it *item) {
	if strings.Count(h.Name, "/") < 8 {
		return
	}
	parts := strings.Split(strings.TrimSuffix(h.Name, "/"), "/")
	if len(parts) != 9 {
		return
	}
	switch parts[3] {
	case "blobs":
		if h.Type == '0' || h.Type == '1' {
			it.kind, it.key = isBlob, strings.Join(parts[4:], "")
		}
	case "nodes":
		switch kind, _, _ := ocis.ClassifyNodeName(parts[8]); {
		case kind.IsMeta():
			data, err := io.ReadAll(io.LimitReader(r, metaLimit))
			if err != nil {
				return // the archive is cut off: the next header tells it
			}
			// An empty id counts as well: attributes left from oCIS 2 are void then.
			if m, err := ocis.ParseNode(p.st.Prefix, data); tolerable(err) {
				it.kind, it.key, it.need = isMeta, strings.TrimSuffix(strings.Join(parts[4:], ""), ".mpk"), need{m.BlobSize, m.BlobID}
			}
		case kind == ocis.NameNode, kind == ocis.NameRevision, kind == ocis.NameTrashed:
			if h.Type != '5' && h.Type != '1' && (h.Type != '0' || h.Records[pax.Type] != "") {
				return // capture takes none but directories and regular files for nodes
			}
			it.kind, it.key = isNode, strings.Join(parts[4:], "")
			if m, ok := p.attrs(h); ok {
				it.need = need{m.BlobSize, m.BlobID}
			}
		}
	}
}

// take enters what entry found.
func (s *spaceProof) take(it *item, size int64) {
	switch it.kind {
	case isBlob:
		if it.typ == '0' {
			s.have[it.key], s.sizes[it.name] = size, size
		} else if size, ok := s.sizes[it.link]; ok {
			s.have[it.key] = size
		}
	case isMeta:
		s.metas[it.key] = it.need
	case isNode:
		s.nodes[it.key] = true
		// Before oCIS 3 metadata lay in attributes. Those are void beside a file.
		if it.need.blob != "" {
			if _, ok := s.metas[it.key]; !ok {
				s.metas[it.key] = it.need
			}
		}
	}
}

// tolerable tells that metadata could be read, apart from single values that make no sense.
func tolerable(err error) bool {
	var ae *ocis.AttributeError
	return err == nil || errors.As(err, &ae)
}

// compare demands each blob that metadata refers to.
func (p *prover) compare(s *spaceProof) {
	sp := p.sp
	for key := range s.nodes {
		if !strings.Contains(key, ".REV.") {
			p.proof.Nodes++
		} else if _, ok := s.metas[key]; ok {
			p.proof.Revisions++
		}
	}
	seen := map[string]int64{}
	for _, key := range slices.Sorted(maps.Keys(s.metas)) {
		m := s.metas[key]
		if m.blob == "" || !s.nodes[key] { // metadata without its node is left over from a purge
			continue
		}
		if size, ok := seen[m.blob]; ok {
			if size != m.size && !p.known[m.blob] {
				p.errorf("space %s: blob %s has %d bytes by the metadata of node %s and %d by that of another", sp.Folder, m.blob, m.size, key, size)
			}
			continue
		}
		seen[m.blob] = m.size
		p.proof.Blobs++
		size, ok := s.have[m.blob]
		switch up, inFlight := p.uploads[m.blob]; {
		case p.known[m.blob]:
		case !ok && inFlight && up == m.size:
			p.proof.InFlight++
			p.proof.Bytes += m.size
		case !ok:
			p.errorf("space %s: blob %s of node %s is not in the snapshot", sp.Folder, m.blob, key)
		case size != m.size:
			p.errorf("space %s: blob %s of node %s has %d bytes, metadata says %d", sp.Folder, m.blob, key, size, m.size)
		default:
			p.proof.Bytes += size
		}
	}
}

// posixKind tells what an entry of a posix space is, by its path below the space's root, as capture sees
// it: 'f' what users see, 'v' an old version, 't' something trashed, 0 what the driver keeps for itself.
func posixKind(rel string) byte {
	first, rest, _ := strings.Cut(rel, "/")
	switch first {
	case ".oc-tmp":
		return 0
	case ".oc-nodes":
		parts := strings.Split(rest, "/")
		if kind, _, _ := ocis.ClassifyNodeName(parts[len(parts)-1]); len(parts) == ocis.NodeDepth+1 && kind == ocis.NameRevision {
			return 'v'
		}
		return 0
	}
	if strings.HasSuffix(rel, ".mlock") || strings.HasSuffix(rel, ".flock") {
		return 0
	}
	if first == ".Trash" {
		item, ok := strings.CutPrefix(rest, "files/")
		if item, _, _ = strings.Cut(item, "/"); !ok || !strings.HasSuffix(item, ".trashitem") {
			return 0
		}
		return 't'
	}
	return 'f'
}

// posixEntry looks at one entry of the posix driver.
func (p *prover) posixEntry(h *pax.Header, rel string, it *item) {
	kind := posixKind(rel)
	if kind == 0 || h.Type != '0' && h.Type != '1' && h.Type != '5' || h.Records[pax.Type] != "" {
		return
	}
	it.kind = isFile
	if kind == 'v' {
		it.kind = isVersion
	}
	if m, ok := p.attrs(h); ok && h.Type == '0' {
		it.need = need{m.BlobSize, m.BlobID}
		it.processing = strings.HasPrefix(m.NodeStatus, "processing:")
		it.changed = !m.MTime.IsZero() && !m.MTime.Equal(time.Unix(h.Sec, h.Nsec))
	}
}

// takePosix compares a file of the posix driver with its own attributes, as capture does.
func (p *prover) takePosix(it *item, size int64) {
	switch {
	case it.kind == isFile:
		p.proof.Nodes++
	case it.kind == isVersion && it.typ != '5':
		p.proof.Revisions++
	}
	if it.need.blob == "" {
		return
	}
	p.proof.Blobs++
	p.proof.Bytes += size
	up, inFlight := p.uploads[it.need.blob]
	switch {
	case p.known[it.need.blob]:
	case it.processing && inFlight && up == it.need.size:
		p.proof.InFlight++
	case it.changed: // behind the server's back
	case size != it.need.size:
		p.errorf("%q has %d bytes, its metadata says %d", it.name, size, it.need.size)
	}
}

// attrs reads the metadata that lies in the attributes of an entry.
func (p *prover) attrs(h *pax.Header) (ocis.NodeMeta, bool) {
	var attrs []ocis.Attribute
	for k, v := range h.Records {
		if escaped, ok := strings.CutPrefix(k, pax.Xattr); ok {
			if name := pax.XattrName(escaped); strings.HasPrefix(name, p.st.Prefix) {
				attrs = append(attrs, ocis.Attribute{Key: name, Value: []byte(v)})
			}
		}
	}
	if len(attrs) == 0 {
		return ocis.NodeMeta{}, false
	}
	m, err := ocis.NodeFromAttributes(p.st.Prefix, attrs)
	return m, tolerable(err)
}
