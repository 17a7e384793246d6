package verify

import (
	"context"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// level is a folder on the way from the root to where the walk is.
type level struct {
	id   id.ID
	name string
	tree *snapshot.Tree
	next int // node to look at
	bad  bool
}

// A treeWalk goes through the folders of one snapshot, with a stack of its own: nothing bounds how deep
// folders lie in each other, and a circle cannot be, because a tree's id is the hash of its content.
type treeWalk struct {
	c     *checker
	where string // what goes before the path in messages
	stack []level
}

// walk looks at all folders below root: every blob must be there, and sizes must add up. A tree is walked
// once, whatever number of snapshots hold it.
func (c *checker) walk(ctx context.Context, root id.ID, where string) error {
	w := &treeWalk{c: c, where: where}
	if err := w.enter(ctx, root, ""); err != nil {
		return err
	}
	for len(w.stack) > 0 {
		l := &w.stack[len(w.stack)-1]
		if l.next == len(l.tree.Nodes) {
			c.trees[l.id] = l.bad
			bad := l.bad
			w.stack = w.stack[:len(w.stack)-1]
			w.taint(bad)
			continue
		}
		l.next++
		n := l.tree.Nodes[l.next-1]
		switch n.Type {
		case snapshot.Dir:
			if err := w.enter(ctx, n.Subtree, n.Name); err != nil {
				return err
			}
		case snapshot.File:
			w.file(n)
		}
	}
	return nil
}

// taint marks the innermost folder.
func (w *treeWalk) taint(bad bool) {
	if bad && len(w.stack) > 0 {
		w.stack[len(w.stack)-1].bad = true
	}
}

// path is made only for messages: in folders that lie very deep each one is long.
func (w *treeWalk) path(name string) string {
	var b strings.Builder
	b.WriteString(w.where)
	for i := range w.stack {
		if i > 0 {
			b.WriteString("/" + w.stack[i].name)
		}
	}
	return b.String() + "/" + name
}

// errorf reports what is wrong with the node called name of the innermost folder. Its path is the first
// argument of format.
func (w *treeWalk) errorf(name, format string, args ...any) {
	w.taint(true)
	w.c.errorf(format, append([]any{w.path(name)}, args...)...)
}

// enter goes into the folder called name, unless it was walked before.
func (w *treeWalk) enter(ctx context.Context, d id.ID, name string) error {
	if bad, ok := w.c.trees[d]; ok {
		w.taint(bad)
		return nil
	}
	t, err := snapshot.LoadTree(ctx, w.c.r, d)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		w.c.trees[d] = true
		w.errorf(name, "%q: %v", err)
		return nil
	}
	w.stack = append(w.stack, level{id: d, name: name, tree: t})
	var names map[string]bool // only for folders out of order, where those of one name may lie apart
	for i, n := range t.Nodes {
		switch {
		case names != nil && names[n.Name], i > 0 && n.Name == t.Nodes[i-1].Name:
			w.errorf(n.Name, "%q stands twice in its folder")
		case names == nil && i > 0 && n.Name < t.Nodes[i-1].Name:
			names = map[string]bool{}
			for _, n := range t.Nodes[:i] {
				names[n.Name] = true
			}
			if names[n.Name] {
				w.errorf(n.Name, "%q stands twice in its folder")
			} else {
				w.errorf(n.Name, "%q is not in the order of the names of its folder: other programs refuse the folder")
			}
		}
		if names != nil {
			names[n.Name] = true
		}
		if n.Name == "" || n.Name == "." || n.Name == ".." || strings.ContainsAny(n.Name, "/\x00") {
			w.errorf(n.Name, "%q is no name for a file: it is not restored")
		}
	}
	return nil
}

func (w *treeWalk) file(n *snapshot.Node) {
	sum, lost := w.c.sizeOf(n)
	for _, b := range lost {
		if _, ok := w.c.r.Size(repo.DataBlob, b); !ok {
			w.errorf(n.Name, "%q needs blob %s, which is not in the index", b.Short())
		}
	}
	switch {
	case len(lost) > 0:
		w.taint(true)
	case sum != n.Size:
		w.errorf(n.Name, "%q has %d bytes by its blobs and %d by its record", sum, n.Size)
	default:
		if h, ok := n.Attr(snapshot.AttrHoles); ok {
			if _, err := pax.ParseHoles(h, int64(n.Size)); err != nil {
				w.errorf(n.Name, "%q: %v", err)
			}
		}
	}
}

// sizeOf adds up the blobs of n, in bytes, and returns those that are not there.
func (c *checker) sizeOf(n *snapshot.Node) (sum uint64, lost []id.ID) {
	for _, b := range n.Content {
		size, ok := c.r.Size(repo.DataBlob, b)
		if _, doubt := c.doubt[repo.BlobRef{Type: repo.DataBlob, ID: b}]; !ok || doubt {
			lost = append(lost, b)
		}
		sum += uint64(size)
	}
	return sum, lost
}

// whole reports whether the content of n is there with the right size. If not, the walk has told it.
func (c *checker) whole(n *snapshot.Node) bool {
	sum, lost := c.sizeOf(n)
	return len(lost) == 0 && sum == n.Size
}
