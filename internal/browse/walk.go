package browse

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Entry is what a history tells of one item: enough to name it and to tell whether it is what it was.
type Entry struct {
	Kind   Kind
	Path   string // as in Item
	Stamp  string // as in Item
	Dir    bool
	NodeID string
	SHA1   string
	Size   uint64 // bytes
	MTime  time.Time
}

// Name is the last part of the path.
func (e *Entry) Name() string { _, n := split(e.Path); return n }

// A comparison walks two snapshots at once and reports what differs. Trees that are in both are not looked
// into, so the work follows what was changed and not what there is.
type comparison struct {
	repo Repo
	// report is called with what was and what is at one place; one of them is nil if there was or is nothing.
	report func(was, is *Entry) error

	space *Space // for the names of the posix driver
	now   *View
	top   string
}

// maxDepth bounds how deep a tree may go. Real ones end at PATH_MAX, 4096 bytes.
const maxDepth = 4096

// batch is how many trees are loaded together: those of neighbouring folders lie side by side.
const batch = 64

// tops of a space in the order in which they are walked.
var allTops = []string{"spaces", "versions", "trash", "trash-versions"}

// compareSpace reports what differs between two states of a space. Either may be nil, and so may its view.
func compareSpace(ctx context.Context, r Repo, was *View, a *Space, is *View, b *Space, tops []string, report func(was, is *Entry) error) error {
	root := func(v *View, s *Space, top string) (*snapshot.Node, error) {
		if v == nil || s == nil {
			return nil, nil
		}
		n, err := v.lookup(ctx, s.in(top))
		if errors.Is(err, snapshot.ErrNoSuchPath) || err == nil && n.Type != snapshot.Dir {
			return nil, nil
		}
		return n, err
	}
	for _, top := range tops {
		old, err := root(was, a, top)
		if err != nil {
			return err
		}
		now, err := root(is, b, top)
		if err != nil {
			return err
		}
		c := &comparison{repo: r, report: report, space: b, now: is, top: top}
		if b == nil {
			c.space, c.now = a, was
		}
		if err := c.pair(ctx, old, now, "", 0); err != nil {
			return err
		}
	}
	return nil
}

// pair compares the folders old and now, of which one may be nil.
func (c *comparison) pair(ctx context.Context, old, now *snapshot.Node, p string, depth int) error {
	if old == nil && now == nil || old != nil && now != nil && old.Subtree == now.Subtree {
		return nil
	}
	var ids []id.ID
	if old != nil {
		ids = append(ids, old.Subtree)
	}
	if now != nil {
		ids = append(ids, now.Subtree)
	}
	trees, err := c.load(ctx, ids)
	if err != nil {
		return err
	}
	var a, b *snapshot.Tree
	if old != nil {
		a = trees[old.Subtree]
	}
	if now != nil {
		b = trees[now.Subtree]
	}
	return c.trees(ctx, a, b, p, depth)
}

// load loads and decodes trees.
func (c *comparison) load(ctx context.Context, ids []id.ID) (map[id.ID]*snapshot.Tree, error) {
	out := make(map[id.ID]*snapshot.Tree, len(ids))
	var mu sync.Mutex
	err := c.repo.LoadBlobs(ctx, repo.TreeBlob, ids, func(d id.ID, p []byte) error {
		t, err := snapshot.DecodeTree(p)
		if err != nil {
			return fmt.Errorf("tree %s: %w", d.Short(), err)
		}
		if !slices.IsSortedFunc(t.Nodes, func(a, b *snapshot.Node) int { return strings.Compare(a.Name, b.Name) }) {
			sort.SliceStable(t.Nodes, func(i, j int) bool { return t.Nodes[i].Name < t.Nodes[j].Name })
		}
		mu.Lock()
		out[d] = t
		mu.Unlock()
		return nil
	})
	return out, err
}

type twins struct {
	old, now *snapshot.Node
	path     string
}

// trees compares the entries of two folders, of which one may be nil.
func (c *comparison) trees(ctx context.Context, a, b *snapshot.Tree, p string, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("more than %d folders lie in each other", maxDepth)
	}
	var below []twins
	i, k := 0, 0
	size := func(t *snapshot.Tree) int {
		if t == nil {
			return 0
		}
		return len(t.Nodes)
	}
	for i < size(a) || k < size(b) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var old, now *snapshot.Node
		switch {
		case k >= size(b) || i < size(a) && a.Nodes[i].Name < b.Nodes[k].Name:
			old = a.Nodes[i]
			i++
		case i >= size(a) || a.Nodes[i].Name > b.Nodes[k].Name:
			now = b.Nodes[k]
			k++
		default:
			old, now = a.Nodes[i], b.Nodes[k]
			i, k = i+1, k+1
		}
		var was, is *Entry
		var err error
		if old != nil {
			was, err = c.entry(ctx, a, old, p, depth)
		}
		if now != nil && err == nil {
			is, err = c.entry(ctx, b, now, p, depth)
		}
		if err != nil {
			return err
		}
		same := was != nil && is != nil && *was == *is && slices.Equal(old.Content, now.Content)
		if !same && (was != nil || is != nil) {
			if err := c.report(was, is); err != nil {
				return err
			}
		}
		t := twins{}
		if now != nil {
			t.path = join(p, now.Name)
		} else {
			t.path = join(p, old.Name)
		}
		if c.space.Posix() && (c.top == "spaces" || c.top == "trash") {
			if is != nil {
				t.path = is.Path
			} else if was != nil {
				t.path = was.Path
			}
		}
		if old != nil && old.Type == snapshot.Dir {
			t.old = old
		}
		if now != nil && now.Type == snapshot.Dir {
			t.now = now
		}
		if t.old != nil && t.now != nil && t.old.Subtree == t.now.Subtree && (was == nil || is == nil || was.Path == is.Path) {
			continue
		}
		if t.old != nil && t.now != nil && was != nil && is != nil && was.Path != is.Path {
			below = append(below, twins{old: t.old, path: was.Path})
			t.old = nil
		}
		if t.old != nil || t.now != nil {
			below = append(below, t)
		}
	}
	for len(below) > 0 {
		n := min(len(below), batch)
		var ids []id.ID
		for _, t := range below[:n] {
			if t.old != nil {
				ids = append(ids, t.old.Subtree)
			}
			if t.now != nil {
				ids = append(ids, t.now.Subtree)
			}
		}
		trees, err := c.load(ctx, ids)
		if err != nil {
			return err
		}
		for _, t := range below[:n] {
			var a, b *snapshot.Tree
			if t.old != nil {
				a = trees[t.old.Subtree]
			}
			if t.now != nil {
				b = trees[t.now.Subtree]
			}
			if err := c.trees(ctx, a, b, t.path, depth+1); err != nil {
				return err
			}
		}
		below = below[n:]
	}
	return nil
}

// entry is what n in the folder p stands for; nil if it only holds others.
func (c *comparison) entry(ctx context.Context, t *snapshot.Tree, n *snapshot.Node, p string, depth int) (*Entry, error) {
	e := &Entry{Kind: Current, Path: join(p, n.Name), Dir: n.Type == snapshot.Dir, Size: n.Size, MTime: n.ModTime.UTC()}
	e.NodeID, _ = n.Attr(snapshot.AttrID)
	e.SHA1, _ = n.Attr(snapshot.AttrSHA1)
	switch c.top {
	case "versions", "trash-versions":
		if e.Dir {
			return nil, nil
		}
		e.Kind, e.Path, e.Stamp = Version, p, n.Name
		if e.NodeID == "" && c.space.Posix() { // such versions have only their file's id
			if it, err := c.now.item(ctx, c.space, Current, p); err == nil {
				e.NodeID = it.NodeID()
			} else if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
		}
		return e, nil
	case "trash":
		if depth == 0 {
			return nil, nil // a time of deletion
		}
		e.Kind = Trashed
		e.Stamp, _, _ = strings.Cut(p, "/")
	}
	if c.space.Posix() {
		e.Path = join(p, shownName(c.space, t, n))
	}
	return e, nil
}
