package snapshot

import (
	"context"
	"fmt"
	"io"

	"github.com/holdfast-backup/holdfast/internal/repo"
)

// Reader reads the content of a file node from its blobs, one blob in memory at a time.
type Reader struct {
	ctx  context.Context
	l    BlobLoader
	n    *Node
	next int
	buf  []byte
	rest []byte
}

// NewReader returns a reader of the content of n.
func NewReader(ctx context.Context, l BlobLoader, n *Node) *Reader {
	return &Reader{ctx: ctx, l: l, n: n}
}

// Read implements io.Reader.
func (r *Reader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		if r.next == len(r.n.Content) {
			return 0, io.EOF
		}
		b, err := r.l.LoadBlob(r.ctx, repo.DataBlob, r.n.Content[r.next], r.buf)
		if err != nil {
			return 0, fmt.Errorf("content of %q: %w", r.n.Name, err)
		}
		r.next++
		r.buf, r.rest = b, b
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// Boundary tells how many blobs were read, and whether nothing is left of the last of them.
func (r *Reader) Boundary() (blobs int, ok bool) { return r.next, len(r.rest) == 0 }

// SkipBlobs passes over the next n blobs, of which there must be as many. Nothing may be left of the one before.
func (r *Reader) SkipBlobs(n int) { r.next += n }
