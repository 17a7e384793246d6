package capture

import (
	"context"
	"fmt"
	"io/fs"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// folder is a directory of the snapshot while it is put together.
type folder struct {
	node    snapshot.Node // what is known of the directory itself
	kids    map[string]*snapshot.Node
	folders map[string]*folder
}

// newFolder returns a directory that no source has: readable by all, with the time zero, so that a
// tree depends on the data alone.
func newFolder() *folder {
	return &folder{
		node:    snapshot.Node{Type: snapshot.Dir, Mode: fs.ModeDir | 0o755, ModTime: time.Unix(0, 0).UTC()},
		kids:    map[string]*snapshot.Node{},
		folders: map[string]*folder{},
	}
}

// sub returns the folder at the slash-separated path p below f, made where it is missing.
func (f *folder) sub(p string) *folder {
	for _, name := range strings.Split(p, "/") {
		if name == "" {
			continue
		}
		for f.folders[name] == nil && f.kids[name] != nil {
			name += ".d" // two nodes of one name would make a tree that nobody takes
		}
		next := f.folders[name]
		if next == nil {
			next = newFolder()
			f.folders[name] = next
		}
		f = next
	}
	return f
}

// put adds n under its own name. A name that is taken gets the suffix, and a number if that is taken
// too; put returns the name in use.
func (f *folder) put(n *snapshot.Node, suffix string) string {
	name := n.Name
	for i := 1; f.taken(name); i++ {
		name = n.Name + suffix
		if i > 1 || suffix == "" {
			name = fmt.Sprintf("%s.%d", name, i)
		}
	}
	n.Name = name
	f.kids[name] = n
	return name
}

func (f *folder) taken(name string) bool {
	_, a := f.kids[name]
	_, b := f.folders[name]
	return a || b
}

// save writes the trees of f and below, and returns the node of f.
func (f *folder) save(ctx context.Context, t Target, name string) (*snapshot.Node, error) {
	nodes := make([]*snapshot.Node, 0, len(f.kids)+len(f.folders))
	for _, n := range f.kids {
		nodes = append(nodes, n)
	}
	for sub, ff := range f.folders {
		n, err := ff.save(ctx, t, sub)
		if err != nil {
			return nil, err
		}
		nodes = append(nodes, n)
	}
	n := f.node
	n.Name = name
	d, err := saveTree(ctx, t, nodes)
	if err != nil {
		return nil, err
	}
	n.Subtree = d
	return &n, nil
}

// saveTree sorts nodes by name and writes them as one tree.
func saveTree(ctx context.Context, t Target, nodes []*snapshot.Node) (repo.ID, error) {
	sort.Slice(nodes, func(i, j int) bool { return nodes[i].Name < nodes[j].Name })
	for i := 1; i < len(nodes); i++ {
		if nodes[i].Name == nodes[i-1].Name {
			return repo.ID{}, fmt.Errorf("save tree: two entries are called %q; this is a flaw of Holdfast, please report it", nodes[i].Name)
		}
	}
	w := treeWriters.Get().(*snapshot.TreeWriter)
	defer treeWriters.Put(w)
	w.Reset()
	for _, n := range nodes {
		w.Add(n)
	}
	d, _, err := t.Save(ctx, repo.TreeBlob, w.Bytes())
	if err != nil {
		return d, fmt.Errorf("save tree: %w", err)
	}
	return d, nil
}

// treeWriters are used again: their buffers were a tenth of all that a backup of the changed store allocated.
var treeWriters = sync.Pool{New: func() any { return new(snapshot.TreeWriter) }}

// treeRecorder notes the trees that pass through it: a result is used again only while all of them
// are in the repository.
type treeRecorder struct {
	Target
	ids []repo.ID
}

func (r *treeRecorder) Save(ctx context.Context, t repo.BlobType, data []byte) (repo.ID, bool, error) {
	d, isNew, err := r.Target.Save(ctx, t, data)
	if err == nil && t == repo.TreeBlob {
		r.ids = append(r.ids, d)
	}
	return d, isNew, err
}

func (r *treeRecorder) SaveAs(ctx context.Context, t repo.BlobType, d repo.ID, data []byte) (bool, error) {
	isNew, err := r.Target.SaveAs(ctx, t, d, data)
	if err == nil && t == repo.TreeBlob {
		r.ids = append(r.ids, d)
	}
	return isNew, err
}

// hasTrees reports whether the repository holds all these trees.
func (c *capturer) hasTrees(ids []repo.ID) bool {
	for i := range ids {
		if !c.repo.Has(repo.TreeBlob, ids[i]) {
			return false
		}
	}
	return true
}
