// Package verify checks a repository: its structure, on request every byte, and the proof of each
// snapshot once more from what is stored. It reads repo and snapshot and changes nothing.
package verify

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Options of a check.
type Options struct {
	// ReadData reads every pack and compares every byte with its checksum.
	ReadData bool
	Progress progress.Sink
}

// Report is what a check found. Errors are damage; Hints are harmless and will go with the next prune.
type Report struct {
	Errors    []string
	Hints     []string
	Snapshots []Snapshot
}

// Snapshot is the verdict on one of Holdfast's snapshots.
type Snapshot struct {
	ID       id.ID
	Complete bool
	Proof    snapshot.Proof // as found now
}

// checker is the state of one check.
type checker struct {
	r    *repo.Repository
	o    Options
	rep  *Report
	mu   sync.Mutex
	seen map[id.ID]bool // trees that were walked
}

func (c *checker) errorf(format string, args ...any) {
	c.mu.Lock()
	c.rep.Errors = append(c.rep.Errors, fmt.Sprintf(format, args...))
	c.mu.Unlock()
}

// Run checks the repository, whose index must be loaded.
//
// Errors: only those that end the check; damage is in the report.
func Run(ctx context.Context, r *repo.Repository, o Options) (*Report, error) {
	c := &checker{r: r, o: o, rep: &Report{}, seen: map[id.ID]bool{}}
	phase := func(k progress.Kind, item string) {
		o.Progress.Emit(progress.Event{Kind: k, Phase: "check", Item: item})
	}
	phase(progress.Start, "packs and index")
	err := r.Check(ctx, repo.CheckOptions{ReadData: o.ReadData, Progress: o.Progress}, func(err error) {
		var h interface{ Hint() bool }
		if errors.As(err, &h) && h.Hint() {
			c.mu.Lock()
			c.rep.Hints = append(c.rep.Hints, err.Error())
			c.mu.Unlock()
			return
		}
		c.errorf("%v", err)
	})
	if err != nil {
		return nil, err
	}
	list, err := snapshot.List(ctx, r)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		c.errorf("%v", err)
	}
	for _, s := range list {
		phase(progress.Update, "snapshot "+s.ID().Short())
		if s.Tree == nil {
			c.errorf("snapshot %s has no tree", s.ID().Short())
			continue
		}
		if err := c.tree(ctx, *s.Tree, s.ID().Short()+":", 0); err != nil {
			return nil, err
		}
	}
	for _, s := range snapshot.Own(list) {
		if s.Tree == nil {
			continue
		}
		phase(progress.Update, "proof of "+s.ID().Short())
		if err := c.prove(ctx, s); err != nil {
			return nil, err
		}
	}
	phase(progress.Finish, "")
	sort.Strings(c.rep.Errors)
	sort.Strings(c.rep.Hints)
	return c.rep, nil
}

// treeDepth bounds how deep trees lie in each other.
const treeDepth = 4096

// tree walks d: every blob must be in the index, and sizes must add up. A tree is walked once,
// whatever number of snapshots hold it.
func (c *checker) tree(ctx context.Context, d id.ID, where string, depth int) error {
	if c.seen[d] {
		return nil
	}
	c.seen[d] = true
	if depth > treeDepth {
		c.errorf("%s folders lie too deep in each other", where)
		return nil
	}
	t, err := snapshot.LoadTree(ctx, c.r, d)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		c.errorf("%s %v", where, err)
		return nil
	}
	names := map[string]bool{}
	for _, n := range t.Nodes {
		p := where + "/" + n.Name
		if names[n.Name] {
			c.errorf("%q stands twice in its folder", p)
		}
		names[n.Name] = true
		if n.Name == "" || n.Name == "." || n.Name == ".." || strings.Contains(n.Name, "/") {
			c.errorf("%q is no name for a file: it is not restored", p)
		}
		switch n.Type {
		case snapshot.Dir:
			if err := c.tree(ctx, n.Subtree, p, depth+1); err != nil {
				return err
			}
		case snapshot.File:
			var sum int64
			for _, b := range n.Content {
				size, ok := c.r.Size(repo.DataBlob, b)
				if !ok {
					c.errorf("%q needs blob %s, which is not in the index", p, b.Short())
				}
				sum += size
			}
			if uint64(sum) != n.Size {
				c.errorf("%q has %d bytes by its blobs and %d by its record", p, sum, n.Size)
			}
		}
	}
	return nil
}

// prove repeats the proof of a snapshot with what the repository holds.
func (c *checker) prove(ctx context.Context, s *snapshot.Snapshot) error {
	short := s.ID().Short()
	m, err := snapshot.LoadManifest(ctx, c.r, *s.Tree)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		c.errorf("snapshot %s: %v", short, err)
		return nil
	}
	v := Snapshot{ID: s.ID(), Complete: m.Proof.Complete}
	known := map[string]bool{}
	for _, x := range m.Proof.Missing {
		known[x.BlobID] = true
	}
	for i := range m.Stores {
		st := &m.Stores[i]
		p := &prover{c: c, ctx: ctx, root: *s.Tree, st: st, short: short, known: known, proof: &v.Proof, trees: map[string]*snapshot.Tree{}, uploads: map[string]bool{}}
		if err := p.run(); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			c.errorf("snapshot %s, store %s: %v", short, st.Name, err)
			v.Complete = false
		}
		if p.failed {
			v.Complete = false
		}
	}
	want, got := &m.Proof, &v.Proof
	posix := slices.ContainsFunc(m.Stores, func(s snapshot.Store) bool { return s.Layout == string(ocis.Posix) }) // hard links count there
	if !posix && got.Blobs+int64(len(got.Missing)) < want.Blobs-int64(len(want.Missing)) {
		c.errorf("snapshot %s: its record speaks of %d blobs, its metadata of %d", short, want.Blobs, got.Blobs)
		v.Complete = false
	}
	c.rep.Snapshots = append(c.rep.Snapshots, v)
	return nil
}

// prover proves one store of one snapshot.
type prover struct {
	c       *checker
	ctx     context.Context
	root    id.ID
	st      *snapshot.Store
	short   string
	known   map[string]bool // blobs that were missing when the snapshot was made
	proof   *snapshot.Proof
	uploads map[string]bool
	trees   map[string]*snapshot.Tree
	failed  bool
}

func (p *prover) errorf(format string, args ...any) {
	p.failed = true
	p.c.errorf("snapshot %s: %s", p.short, fmt.Sprintf(format, args...))
}

func (p *prover) run() error {
	base := "/storage/" + p.st.Name
	if err := p.each(base+"/store.tar", func(h *tar.Header, _ io.Reader) error {
		if up, ok := strings.CutPrefix(h.Name, "uploads/"); ok {
			p.uploads[up] = true
		}
		return p.content(h)
	}); err != nil {
		return err
	}
	for i := range p.st.Spaces {
		if err := p.space(base, &p.st.Spaces[i]); err != nil {
			return err
		}
	}
	return nil
}

// each reads the tar at place entry by entry.
func (p *prover) each(place string, fn func(h *tar.Header, r io.Reader) error) error {
	n, err := snapshot.Lookup(p.ctx, p.c.r, p.root, place)
	if err != nil {
		return err
	}
	tr := tar.NewReader(snapshot.NewReader(p.ctx, p.c.r, n))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", place, err)
		}
		if err := fn(h, tr); err != nil {
			return fmt.Errorf("%s: %w", place, err)
		}
	}
}

// content checks that the file that holds the content of an entry is there with the right size.
func (p *prover) content(h *tar.Header) error {
	place, ok := h.PAXRecords["HOLDFAST.content"]
	if !ok {
		return nil
	}
	n, err := p.lookup(place)
	if err != nil {
		return err
	}
	switch {
	case n == nil:
		p.errorf("%q has its content in %q, which is not there", h.Name, place)
	case strconv.FormatUint(n.Size, 10) != h.PAXRecords["HOLDFAST.size"]:
		p.errorf("%q has %s bytes, but %q holds %d", h.Name, h.PAXRecords["HOLDFAST.size"], place, n.Size)
	}
	return nil
}

// treeCache bounds the folders that are kept decoded.
const treeCache = 4096

// lookup finds a file by its path and keeps the folders that it went through.
func (p *prover) lookup(place string) (*snapshot.Node, error) {
	dir, name := path.Split(path.Clean(place))
	t, err := p.folder(path.Clean(dir))
	if err != nil || t == nil {
		return nil, err
	}
	i := sort.Search(len(t.Nodes), func(i int) bool { return t.Nodes[i].Name >= name })
	if i < len(t.Nodes) && t.Nodes[i].Name == name && t.Nodes[i].Type == snapshot.File {
		return t.Nodes[i], nil
	}
	return nil, nil
}

func (p *prover) folder(dir string) (*snapshot.Tree, error) {
	if t, ok := p.trees[dir]; ok {
		return t, nil
	}
	if len(p.trees) > treeCache {
		clear(p.trees)
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
		return nil, err
	}
	p.trees[dir] = t
	return t, nil
}

// need is a blob that the metadata of a space refers to.
type need struct {
	size int64
	node string
}

// space proves one space from its tar.
func (p *prover) space(base string, sp *snapshot.Space) error {
	needs := map[string]need{}
	metas := map[string]need{} // blob by node path, until the node itself was seen
	have := map[string]int64{}
	sizes := map[string]int64{} // of the files in blobs/ by name, for hard links to them
	nodes := map[string]bool{}
	place := base + "/metadata/" + snapshot.SafeName(sp.ID) + ".tar"
	err := p.each(place, func(h *tar.Header, r io.Reader) error {
		if err := p.content(h); err != nil {
			return err
		}
		if p.st.Layout == string(ocis.Posix) {
			p.posixFile(h)
			return nil
		}
		parts := strings.Split(strings.TrimSuffix(h.Name, "/"), "/") // spaces/xx/rest/nodes/...
		if len(parts) != 9 {
			return nil
		}
		key := strings.Join(parts[4:], "")
		switch parts[3] {
		case "blobs":
			if s := h.PAXRecords["HOLDFAST.size"]; s != "" {
				size, err := strconv.ParseInt(s, 10, 64)
				if err != nil {
					p.errorf("%q has no size: %v", h.Name, err)
				}
				have[key] = size
				sizes[h.Name] = size
			} else if size, ok := sizes[h.Linkname]; ok && h.Typeflag == tar.TypeLink {
				have[key] = size
			}
		case "nodes":
			kind, _, _ := ocis.ClassifyNodeName(parts[8])
			switch {
			case kind.IsMeta():
				data, err := io.ReadAll(io.LimitReader(r, 16<<20))
				if err != nil {
					return err
				}
				m, err := ocis.ParseNode(p.st.Prefix, data)
				var ae *ocis.AttributeError
				if err == nil || errors.As(err, &ae) { // also an empty id: attributes left from oCIS 2 no longer count
					metas[strings.TrimSuffix(key, ".mpk")] = need{m.BlobSize, m.BlobID}
				}
			case kind == kind.Base():
				nodes[key] = true
				if strings.Contains(key, ".REV.") {
					p.proof.Revisions++
				} else {
					p.proof.Nodes++
				}
				p.xattrNeed(h, key, metas)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for key, m := range metas {
		if nodes[key] && m.node != "" { // metadata without its node is left over from a purge
			needs[m.node] = need{m.size, key}
		}
	}
	for blob, n := range needs {
		p.proof.Blobs++
		size, ok := have[blob]
		switch {
		case p.known[blob]:
		case !ok && p.uploads[blob]:
			p.proof.InFlight++
		case !ok:
			p.errorf("space %s: blob %s of node %s is not in the snapshot", sp.Folder, blob, n.node)
		case size != n.size:
			p.errorf("space %s: blob %s of node %s has %d bytes, metadata says %d", sp.Folder, blob, n.node, size, n.size)
		default:
			p.proof.Bytes += size
		}
	}
	return nil
}

// posixFile compares a file of the posix driver with its own attributes, as capture does.
func (p *prover) posixFile(h *tar.Header) {
	m, ok := p.attrs(h)
	if !ok || m.BlobID == "" || h.Typeflag != tar.TypeReg {
		return
	}
	p.proof.Blobs++
	size := h.Size
	if s := h.PAXRecords["HOLDFAST.size"]; s != "" {
		size, _ = strconv.ParseInt(s, 10, 64) // content has compared it
	}
	p.proof.Bytes += size
	switch {
	case strings.HasPrefix(m.NodeStatus, "processing:"), p.known[m.BlobID]:
	case !m.MTime.IsZero() && !m.MTime.Equal(h.ModTime): // changed behind the server's back
	case size != m.BlobSize:
		p.errorf("%q has %d bytes, its metadata says %d", h.Name, size, m.BlobSize)
	}
}

// attrs reads the metadata that lies in the attributes of an entry.
func (p *prover) attrs(h *tar.Header) (ocis.NodeMeta, bool) {
	var attrs []ocis.Attribute
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok && strings.HasPrefix(name, p.st.Prefix) {
			attrs = append(attrs, ocis.Attribute{Key: name, Value: []byte(v)})
		}
	}
	if len(attrs) == 0 {
		return ocis.NodeMeta{}, false
	}
	m, err := ocis.NodeFromAttributes(p.st.Prefix, attrs)
	var ae *ocis.AttributeError
	return m, err == nil || errors.As(err, &ae)
}

// xattrNeed takes the blob of a node whose metadata lies in its attributes (before oCIS 3).
func (p *prover) xattrNeed(h *tar.Header, key string, metas map[string]need) {
	if m, ok := p.attrs(h); ok && m.BlobID != "" {
		if _, ok := metas[key]; !ok {
			metas[key] = need{m.BlobSize, m.BlobID}
		}
	}
}
