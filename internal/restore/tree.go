package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

const (
	// treeDepth bounds how deep folders may be nested: the kernel's paths end at 2048 levels, and
	// what is deeper was made to harm.
	treeDepth = 2500
	// treesAhead is how many subfolders are loaded in one go, so that a far repository is not asked
	// for each one by itself.
	treesAhead = 64
)

// A treeWalker turns a tree of the snapshot into entries.
type treeWalker struct {
	run  *run
	a    *applier
	from string // place of the tree in the snapshot
	on   map[id.ID]bool
	// groups are the first names of hard-link groups.
	groups map[[2]uint64]string
}

// node restores n at rel, with all that lies below it.
func (w *treeWalker) node(n *snapshot.Node, rel string) error {
	e, err := nodeEntry(n, rel, w.from)
	if err != nil {
		return w.a.d.fail(w.from, rel, err)
	}
	w.link(n, e)
	if err := w.a.put(e); err != nil {
		return err
	}
	if n.Type != snapshot.Dir {
		return nil
	}
	raw, err := w.load([]id.ID{n.Subtree}, map[string]id.ID{rel: n.Subtree})
	if err != nil {
		return err
	}
	return w.tree(n.Subtree, raw[n.Subtree], rel, 1)
}

// link makes e a hard link if another name of its group came before.
func (w *treeWalker) link(n *snapshot.Node, e *entry) {
	if n.Links < 2 || n.Inode == 0 || n.Type == snapshot.Dir {
		return
	}
	k := [2]uint64{n.DeviceID, n.Inode}
	if first, ok := w.groups[k]; ok {
		e.hardlink = first
	} else if checkPath(e.rel) == nil {
		w.groups[k] = e.rel
	}
}

// load reads trees; those that cannot be read are told as errors and are not in the result.
func (w *treeWalker) load(ids []id.ID, rels map[string]id.ID) (map[id.ID][]byte, error) {
	raw := make(map[id.ID][]byte, len(ids))
	var mu sync.Mutex
	err := loadEach(w.run.ctx, w.run.repo, repo.TreeBlob, ids, func(d id.ID, p []byte) error {
		p = append([]byte(nil), p...)
		mu.Lock()
		raw[d] = p
		mu.Unlock()
		return nil
	}, func(d id.ID, err error) error {
		for rel, of := range rels {
			if of == d {
				if err := w.a.d.fail(w.from, rel, fmt.Errorf("list of the folder: %w", err)); err != nil {
					return err
				}
			}
		}
		return nil
	})
	return raw, err
}

// tree restores the entries of one folder.
func (w *treeWalker) tree(self id.ID, raw []byte, rel string, depth int) error {
	if raw == nil {
		return nil // told already
	}
	fail := func(err error) error { return w.a.d.fail(w.from, rel, err) }
	if w.on[self] {
		return fail(refused("the folder contains itself"))
	}
	if depth > treeDepth {
		return fail(refused("more than %d folders within one another", treeDepth))
	}
	w.on[self] = true
	defer delete(w.on, self)
	t, err := snapshot.DecodeTree(raw)
	if err != nil {
		return fail(err)
	}
	seen := make(map[string]struct{}, len(t.Nodes))
	ahead := map[id.ID][]byte{}
	for i, n := range t.Nodes {
		child := joinPath(rel, n.Name)
		if err := checkName(n.Name); err != nil {
			if err := w.a.d.fail(w.from, joinPath(rel, "")+"/"+n.Name, err); err != nil {
				return err
			}
			continue
		}
		if _, twice := seen[n.Name]; twice {
			if err := w.a.d.fail(w.from, child, refused("the name comes twice")); err != nil {
				return err
			}
			continue
		}
		seen[n.Name] = struct{}{}
		e, err := nodeEntry(n, child, w.from)
		if err != nil {
			if err := w.a.d.fail(w.from, child, err); err != nil {
				return err
			}
			continue
		}
		w.link(n, e)
		if err := w.a.put(e); err != nil {
			return err
		}
		if n.Type != snapshot.Dir {
			continue
		}
		if _, ok := ahead[n.Subtree]; !ok {
			if ahead, err = w.ahead(t.Nodes[i:], rel); err != nil {
				return err
			}
		}
		if err := w.tree(n.Subtree, ahead[n.Subtree], child, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// ahead loads the trees of the first folders among nodes.
func (w *treeWalker) ahead(nodes []*snapshot.Node, rel string) (map[id.ID][]byte, error) {
	var ids []id.ID
	rels := map[string]id.ID{}
	have := map[id.ID]bool{}
	size := int64(0)
	for _, n := range nodes {
		if n.Type != snapshot.Dir {
			continue
		}
		rels[joinPath(rel, n.Name)] = n.Subtree
		if have[n.Subtree] {
			continue
		}
		have[n.Subtree] = true
		ids = append(ids, n.Subtree)
		k, _ := w.run.repo.Size(repo.TreeBlob, n.Subtree)
		if size += k; len(ids) == treesAhead || size > 4<<20 {
			break
		}
	}
	raw, err := w.load(ids, rels)
	for d := range have { // a nil entry says that it was tried
		if _, ok := raw[d]; !ok && err == nil {
			raw[d] = nil
		}
	}
	return raw, err
}

// nodeEntry makes an entry of a node.
func nodeEntry(n *snapshot.Node, rel, from string) (*entry, error) {
	e := &entry{rel: rel, from: from, typ: n.Type, meta: nodeMeta(n), link: n.LinkTarget, rdev: n.Device}
	if n.Type != snapshot.File {
		return e, nil
	}
	if n.Size > 1<<62 {
		return nil, fmt.Errorf("the snapshot records %d bytes", n.Size)
	}
	e.size, e.ids = int64(n.Size), n.Content
	if e.size == 0 && len(e.ids) > 0 {
		return nil, errors.New("the snapshot records no bytes and holds some")
	}
	var err error
	h, _ := n.Attr(snapshot.AttrHoles)
	e.holes, err = pax.ParseHoles(h, e.size)
	return e, err
}

// walkTree restores the node n as the root of the destination, or as rel below it.
func walkTree(d *dest, n *snapshot.Node, from, rel string) error {
	a := newApplier(d, d.run.fill.add)
	defer a.close()
	w := &treeWalker{run: d.run, a: a, from: from, on: map[id.ID]bool{}, groups: map[[2]uint64]string{}}
	if err := w.node(n, rel); err != nil {
		return err
	}
	return a.finish()
}

// contentReader reads the content of a file node from front to back, with the next stretch loaded
// while one is read.
type contentReader struct {
	next chan stretch
	now  stretch
	done context.CancelFunc
}

type stretch struct {
	blobs [][]byte
	err   error
}

// stretchBytes is how much of a file is loaded at once, in bytes. Two of them are in memory.
const stretchBytes = 8 << 20

func newContentReader(ctx context.Context, r Repo, ids []id.ID) *contentReader {
	ctx, cancel := context.WithCancel(ctx)
	c := &contentReader{next: make(chan stretch), done: cancel}
	go func() {
		defer close(c.next)
		for len(ids) > 0 {
			n, size := 0, int64(0)
			for n < len(ids) && (n == 0 || size < stretchBytes) {
				k, _ := r.Size(repo.DataBlob, ids[n])
				size += k
				n++
			}
			s := loadStretch(ctx, r, ids[:n])
			select {
			case c.next <- s:
			case <-ctx.Done():
				return
			}
			if s.err != nil {
				return
			}
			ids = ids[n:]
		}
	}()
	return c
}

func loadStretch(ctx context.Context, r Repo, ids []id.ID) stretch {
	got := make(map[id.ID][]byte, len(ids))
	var distinct []id.ID
	for _, d := range ids {
		if _, ok := got[d]; !ok {
			got[d] = nil
			distinct = append(distinct, d)
		}
	}
	var mu sync.Mutex
	err := r.LoadBlobs(ctx, repo.DataBlob, distinct, func(d id.ID, p []byte) error {
		p = append([]byte(nil), p...)
		mu.Lock()
		got[d] = p
		mu.Unlock()
		return nil
	})
	s := stretch{err: err}
	for _, d := range ids {
		s.blobs = append(s.blobs, got[d])
	}
	return s
}

func (c *contentReader) Read(p []byte) (int, error) {
	for {
		if len(c.now.blobs) > 0 {
			if b := c.now.blobs[0]; len(b) > 0 {
				n := copy(p, b)
				c.now.blobs[0] = b[n:]
				return n, nil
			}
			c.now.blobs = c.now.blobs[1:]
			continue
		}
		s, ok := <-c.next
		if !ok {
			return 0, io.EOF
		}
		if s.err != nil {
			return 0, s.err
		}
		c.now = s
	}
}

func (c *contentReader) close() {
	c.done()
	for range c.next { // the loader ends before the repository may be closed
	}
}
