package snapshot

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

// BlobLoader loads blobs by id, verified. *repo.Repository is one.
type BlobLoader interface {
	LoadBlob(ctx context.Context, t repo.BlobType, d id.ID, buf []byte) ([]byte, error)
}

// ErrNoSuchPath is returned (wrapped) when a path is not in a snapshot.
var ErrNoSuchPath = errors.New("no such file or folder in the snapshot")

// LoadTree loads and decodes the tree called d.
func LoadTree(ctx context.Context, l BlobLoader, d id.ID) (*Tree, error) {
	p, err := l.LoadBlob(ctx, repo.TreeBlob, d, nil)
	if err != nil {
		return nil, fmt.Errorf("load tree %s: %w", d.Short(), err)
	}
	t, err := DecodeTree(p)
	if err != nil {
		return nil, fmt.Errorf("tree %s: %w", d.Short(), err)
	}
	return t, nil
}

// Lookup finds the node at the slash-separated path p below the tree root. The path "/" gives a
// directory node without a name.
//
// Errors: ErrNoSuchPath.
func Lookup(ctx context.Context, l BlobLoader, root id.ID, p string) (*Node, error) {
	n := &Node{Type: Dir, Subtree: root}
	done := ""
	for _, name := range strings.Split(p, "/") {
		if name == "" {
			continue
		}
		done += "/" + name
		if n.Type != Dir {
			return nil, fmt.Errorf("%q: %w", done, ErrNoSuchPath)
		}
		t, err := LoadTree(ctx, l, n.Subtree)
		if err != nil {
			return nil, err
		}
		if n = t.Find(name); n == nil {
			return nil, fmt.Errorf("%q: %w", done, ErrNoSuchPath)
		}
	}
	return n, nil
}

// LoadContent returns the whole content of a file node of at most limit bytes.
func LoadContent(ctx context.Context, l BlobLoader, n *Node, limit int64) ([]byte, error) {
	if n.Type != File {
		return nil, fmt.Errorf("%q is no file but a %s", n.Name, n.Type)
	}
	if n.Size > uint64(limit) {
		return nil, fmt.Errorf("%q has %d bytes, more than the %d that are expected here", n.Name, n.Size, limit)
	}
	var out, buf []byte
	for _, d := range n.Content {
		p, err := l.LoadBlob(ctx, repo.DataBlob, d, buf)
		if err != nil {
			return nil, fmt.Errorf("content of %q: %w", n.Name, err)
		}
		if int64(len(out)+len(p)) > limit {
			return nil, fmt.Errorf("%q holds more than the %d bytes that are expected here", n.Name, limit)
		}
		out = append(out, p...)
		buf = p
	}
	return out, nil
}
