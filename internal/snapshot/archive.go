package snapshot

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

// What readers of the archives of a store share: each entry stands for a file, and most contents lie in files of
// the snapshot that the entries name.

// EntryType is what an entry of an archive stands for; false for what no archive of ours has. A further name
// of a file (pax type '1') is a File.
func EntryType(h *pax.Header) (NodeType, bool) {
	switch h.Type {
	case '0':
		if h.Records[pax.Type] == pax.Socket {
			return Socket, true
		}
		return File, true
	case '1':
		return File, true
	case '2':
		return Symlink, true
	case '3':
		return CharDev, true
	case '4':
		return Dev, true
	case '5':
		return Dir, true
	case '6':
		return FIFO, true
	}
	return "", false
}

// EntryXattrs are the extended attributes of an entry, sorted, without those that Holdfast adds.
func EntryXattrs(h *pax.Header) []Xattr {
	var out []Xattr
	for k, v := range h.Records {
		if x, ok := strings.CutPrefix(k, pax.Xattr); ok && !strings.HasPrefix(x, AttrPrefix) {
			out = append(out, Xattr{Name: pax.XattrName(x), Value: []byte(v)})
		}
	}
	slices.SortFunc(out, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// Finder finds files by their places in a snapshot. It keeps the folders that it went through, because neighbours
// are asked for one after the other. It is not safe for concurrent use.
type Finder struct {
	l     BlobLoader
	root  id.ID
	trees map[string]*Tree
}

// finderTrees is how many folders a Finder keeps.
const finderTrees = 1024

// NewFinder returns one for the snapshot with this tree.
func NewFinder(l BlobLoader, root id.ID) *Finder {
	return &Finder{l: l, root: root, trees: map[string]*Tree{}}
}

// File finds a file.
//
// Errors: ErrNoSuchPath, also if it is no file.
func (f *Finder) File(ctx context.Context, place string) (*Node, error) {
	place = path.Clean("/" + place)
	t, err := f.folder(ctx, path.Dir(place))
	if err != nil {
		return nil, err
	}
	if n := t.Find(path.Base(place)); n != nil && n.Type == File {
		return n, nil
	}
	return nil, fmt.Errorf("%q: %w", place, ErrNoSuchPath)
}

func (f *Finder) folder(ctx context.Context, dir string) (*Tree, error) {
	if t, ok := f.trees[dir]; ok {
		return t, nil
	}
	d := f.root
	if dir != "/" {
		up, err := f.folder(ctx, path.Dir(dir))
		if err != nil {
			return nil, err
		}
		n := up.Find(path.Base(dir))
		if n == nil || n.Type != Dir {
			return nil, fmt.Errorf("%q: %w", dir, ErrNoSuchPath)
		}
		d = n.Subtree
	}
	t, err := LoadTree(ctx, f.l, d)
	if err != nil {
		return nil, err
	}
	if len(f.trees) >= finderTrees {
		clear(f.trees)
	}
	f.trees[dir] = t
	return t, nil
}
