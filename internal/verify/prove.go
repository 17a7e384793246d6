package verify

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"runtime"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// prover proves one store of one snapshot. The walk over the trees has told all that is wrong with them, so
// that the prover only finds out what of the proof they take along.
type prover struct {
	c       *checker
	ctx     context.Context
	root    id.ID
	st      *snapshot.Store
	short   string
	known   map[string]bool // blobs that were missing when the snapshot was made
	proof   *snapshot.Proof
	uploads map[string]int64 // bytes of what lies in uploads/
	trees   map[string]*snapshot.Tree
	away    *objects // where contents are that the repository does not have
	asked   []object // those of this store
	failed  bool
	cut     bool // an archive could not be read to its end
}

func (p *prover) errorf(format string, args ...any) {
	p.failed = true
	p.c.errorf("snapshot %s: %s", p.short, fmt.Sprintf(format, args...))
}

// run returns an error only if the check ends.
func (p *prover) run() error {
	base := "/storage/" + p.st.Name
	err := p.each(base+"/store.tar", func(h *pax.Header, _ io.Reader) error {
		size, err := p.content(h)
		if up, ok := strings.CutPrefix(h.Name, "uploads/"); ok {
			p.uploads[up] = size
		}
		return err
	})
	if err != nil {
		return err
	}
	// Several spaces at a time, each by a prover of its own: what they find is added up.
	g, ctx := errgroup.WithContext(p.ctx)
	parts := make([]*prover, min(cmp.Or(max(p.c.o.Spaces, 0), runtime.GOMAXPROCS(0)), max(len(p.st.Spaces), 1)))
	var next atomic.Int64
	for k := range parts {
		q := *p
		q.ctx, q.proof, q.trees, q.asked, q.failed, q.cut = ctx, &snapshot.Proof{}, map[string]*snapshot.Tree{}, nil, false, false
		parts[k] = &q
		g.Go(func() error {
			for {
				i := int(next.Add(1)) - 1
				if i >= len(p.st.Spaces) {
					return nil
				}
				if err := q.space(base, &p.st.Spaces[i]); err != nil {
					return err
				}
			}
		})
	}
	err = g.Wait()
	for _, q := range parts {
		p.add(q)
	}
	if p.ctx.Err() != nil {
		return context.Cause(p.ctx)
	}
	return err
}

// add takes over what q found.
func (p *prover) add(q *prover) {
	p.proof.Nodes += q.proof.Nodes
	p.proof.Revisions += q.proof.Revisions
	p.proof.TrashItems += q.proof.TrashItems
	p.proof.Blobs += q.proof.Blobs
	p.proof.Bytes += q.proof.Bytes
	p.proof.Verified += q.proof.Verified
	p.proof.InFlight += q.proof.InFlight
	p.asked = append(p.asked, q.asked...)
	p.failed = p.failed || q.failed
	p.cut = p.cut || q.cut
}

// each reads the tar at place entry by entry. Its errors are those of fn, and that the check was cancelled.
func (p *prover) each(place string, fn func(h *pax.Header, r io.Reader) error) error {
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
	tr := pax.NewReader(bufio.NewReaderSize(snapshot.NewReader(p.ctx, p.c.r, n), 64<<10))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fail(err)
		}
		if err := fn(h, tr); err != nil {
			return err
		}
	}
}

// content checks that the file that holds the content of an entry is there with the right size, and returns
// that size, in bytes.
func (p *prover) content(h *pax.Header) (int64, error) {
	place, ok := h.Records[pax.Content]
	size := h.Size
	if key := h.Records[pax.Object]; key != "" && !ok {
		return p.object(key, h)
	}
	if ok {
		n, err := p.lookup(place)
		if err != nil && !errors.Is(err, errTold) {
			return 0, err
		}
		var bad error
		size, bad = strconv.ParseInt(h.Records[pax.Size], 10, 64)
		switch {
		case err != nil, n != nil && !p.c.whole(n):
		case n == nil:
			p.errorf("%q has its content in %q, which is not there", h.Name, place)
		case bad != nil || size != int64(n.Size):
			p.errorf("%q has %q bytes, but %q holds %d", h.Name, h.Records[pax.Size], place, n.Size)
			size = int64(n.Size) // one finding is enough
		}
	}
	if _, err := pax.ParseHoles(h.Records[pax.Holes], size); err != nil && h.Type == '0' {
		p.errorf("%q: %v", h.Name, err)
	}
	return size, nil
}

// treeCache bounds the folders that a prover keeps decoded.
const treeCache = 4096

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
	d := p.root
	if dir != "/" {
		up, err := p.folder(path.Dir(dir))
		if err != nil || up == nil {
			return nil, err
		}
		n := up.Find(path.Base(dir))
		if n == nil || n.Type != snapshot.Dir {
			return nil, nil
		}
		d = n.Subtree
	}
	t, err := snapshot.LoadTree(p.ctx, p.c.r, d)
	if err != nil {
		if p.ctx.Err() != nil {
			return nil, context.Cause(p.ctx)
		}
		return nil, errTold
	}
	if len(p.trees) > treeCache {
		clear(p.trees)
	}
	p.trees[dir] = t
	return t, nil
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

// space proves one space from its tar.
func (p *prover) space(base string, sp *snapshot.Space) error {
	s := &spaceProof{metas: map[string]need{}, nodes: map[string]bool{}, have: map[string]int64{}, sizes: map[string]int64{}}
	root, first := "", true
	err := p.each(base+"/metadata/"+snapshot.SafeName(sp.ID)+".tar", func(h *pax.Header, r io.Reader) error {
		size, err := p.content(h)
		if err != nil {
			return err
		}
		if first { // parents come before what is in them
			root, first = strings.TrimSuffix(h.Name, "/"), false
		}
		if p.st.Layout == string(ocis.Posix) {
			p.posixEntry(h, strings.Trim(strings.TrimPrefix(h.Name, root), "/"), size)
			return nil
		}
		return p.entry(s, h, r, size)
	})
	if p.st.Layout != string(ocis.Posix) {
		// Of an archive that is cut off no blob is missed: blobs come before the nodes that need them.
		p.compare(sp, s)
	}
	return err
}

// entry takes one entry of a decomposed store: spaces/xx/rest/nodes/aa/bb/cc/dd/name, or the same below
// blobs.
func (p *prover) entry(s *spaceProof, h *pax.Header, r io.Reader, size int64) error {
	parts := strings.Split(strings.TrimSuffix(h.Name, "/"), "/")
	if len(parts) != 9 {
		return nil
	}
	key := strings.Join(parts[4:], "")
	switch parts[3] {
	case "blobs":
		switch h.Type {
		case '0':
			s.have[key], s.sizes[h.Name] = size, size
		case '1':
			if size, ok := s.sizes[h.Link]; ok {
				s.have[key] = size
			}
		}
	case "nodes":
		switch kind, _, _ := ocis.ClassifyNodeName(parts[8]); {
		case kind.IsMeta():
			data, err := io.ReadAll(io.LimitReader(r, metaLimit))
			if err != nil {
				return nil //nolint:nilerr // the archive is cut off: the next header tells it
			}
			// An empty id counts as well: attributes left from oCIS 2 are void then.
			if m, err := ocis.ParseNode(p.st.Prefix, data); tolerable(err) {
				s.metas[strings.TrimSuffix(key, ".mpk")] = need{m.BlobSize, m.BlobID}
			}
		case kind == ocis.NameNode, kind == ocis.NameRevision, kind == ocis.NameTrashed:
			if h.Type != '5' && h.Type != '1' && (h.Type != '0' || h.Records[pax.Type] != "") {
				return nil // capture takes none but directories and regular files for nodes
			}
			s.nodes[key] = true
			// Before oCIS 3 metadata lay in attributes. Those are void beside a file.
			if m, ok := p.attrs(h); ok && m.BlobID != "" {
				if _, ok := s.metas[key]; !ok {
					s.metas[key] = need{m.BlobSize, m.BlobID}
				}
			}
		}
	}
	return nil
}

// tolerable tells that metadata could be read, apart from single values that make no sense.
func tolerable(err error) bool {
	var ae *ocis.AttributeError
	return err == nil || errors.As(err, &ae)
}

// compare demands each blob that metadata refers to.
func (p *prover) compare(sp *snapshot.Space, s *spaceProof) {
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

// posixEntry compares a file of the posix driver with its own attributes, as capture does.
func (p *prover) posixEntry(h *pax.Header, rel string, size int64) {
	kind := posixKind(rel)
	if kind == 0 || h.Type != '0' && h.Type != '1' && h.Type != '5' || h.Records[pax.Type] != "" {
		return
	}
	switch {
	case kind != 'v':
		p.proof.Nodes++
	case h.Type != '5':
		p.proof.Revisions++
	}
	m, ok := p.attrs(h)
	if !ok || m.BlobID == "" || h.Type != '0' {
		return
	}
	p.proof.Blobs++
	p.proof.Bytes += size
	up, inFlight := p.uploads[m.BlobID]
	switch {
	case p.known[m.BlobID]:
	case strings.HasPrefix(m.NodeStatus, "processing:") && inFlight && up == m.BlobSize:
		p.proof.InFlight++
	case !m.MTime.IsZero() && !m.MTime.Equal(time.Unix(h.Sec, h.Nsec)): // changed behind the server's back
	case size != m.BlobSize:
		p.errorf("%q has %d bytes, its metadata says %d", h.Name, size, m.BlobSize)
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
