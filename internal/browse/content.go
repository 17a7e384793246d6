package browse

import (
	"context"
	"fmt"
	"io"
	"iter"
	"sort"
	"sync"

	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Content gives the bytes of one file. Each chunk is verified when it is read. It may be used by several
// goroutines at once.
type Content struct {
	repo Repo
	name string
	ids  []id.ID
	ends []int64 // where each chunk ends

	shared *ChunkCache
	near   bool // copies of the chunks are worth keeping on this machine
	mu     sync.Mutex
	last   []chunk // the last ones read, newest first
}

type chunk struct {
	no   int
	data []byte
}

// keptChunks is how many chunks a Content keeps: at 8 MiB at most, usually below 4.
const keptChunks = 3

// OpenContent returns the content of a file node.
//
// Errors: a node that is no file; chunks that the repository has not, or that do not add up to its size.
func OpenContent(r Repo, n *snapshot.Node) (*Content, error) {
	if n.Type != snapshot.File {
		return nil, fmt.Errorf("%q is no file but a %s", n.Name, n.Type)
	}
	c := &Content{repo: r, name: n.Name, ids: n.Content, ends: make([]int64, len(n.Content))}
	sum := int64(0)
	for i, d := range n.Content {
		size, ok := r.Size(repo.DataBlob, d)
		if !ok {
			return nil, fmt.Errorf("%q: blob %s is not in the repository", n.Name, d.Short())
		}
		sum += size
		c.ends[i] = sum
	}
	if uint64(sum) != n.Size {
		return nil, fmt.Errorf("%q: its content has %d bytes, its entry says %d", n.Name, sum, n.Size)
	}
	return c, nil
}

// Content returns that of a file, version or trashed file.
func (v *View) Content(it *Item) (*Content, error) { return OpenContent(v.repo, it.Node) }

// Size is the length in bytes.
func (c *Content) Size() int64 {
	if len(c.ends) == 0 {
		return 0
	}
	return c.ends[len(c.ends)-1]
}

// ChunkCache keeps the chunks that were read last, of any number of files.
type ChunkCache struct {
	mu    sync.Mutex
	limit int
	bytes int
	byID  map[id.ID][]byte
	order []id.ID // oldest first
}

// NewChunkCache makes a cache of at most limit bytes.
func NewChunkCache(limit int) *ChunkCache { return &ChunkCache{limit: limit, byID: map[id.ID][]byte{}} }

func (k *ChunkCache) get(d id.ID) []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.byID[d]
}

func (k *ChunkCache) put(d id.ID, p []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.byID[d] != nil || len(p) > k.limit {
		return
	}
	k.byID[d] = p
	k.order = append(k.order, d)
	for k.bytes += len(p); k.bytes > k.limit; {
		old := k.order[0]
		k.order = k.order[1:]
		k.bytes -= len(k.byID[old])
		delete(k.byID, old)
	}
}

// Share makes c keep its chunks in a cache that others use as well. It must come before the first reading.
func (c *Content) Share(k *ChunkCache) { c.shared = k }

// openMeta is OpenContent for metadata: what is read again and again, and little beside the users' files.
func (v *View) openMeta(n *snapshot.Node) (*Content, error) {
	c, err := OpenContent(v.repo, n)
	if err == nil {
		c.near = true
	}
	return c, err
}

// loadMeta reads a whole file of metadata.
func (v *View) loadMeta(ctx context.Context, n *snapshot.Node, limit int64) ([]byte, error) {
	return snapshot.LoadContent(repo.Near(ctx), v.repo, n, limit)
}

// chunk loads the chunk no.
func (c *Content) chunk(ctx context.Context, no int) ([]byte, error) {
	if c.near {
		ctx = repo.Near(ctx)
	}
	if c.shared != nil {
		if p := c.shared.get(c.ids[no]); p != nil {
			return p, nil
		}
		p, err := c.repo.LoadBlob(ctx, repo.DataBlob, c.ids[no], nil)
		if err != nil {
			return nil, fmt.Errorf("content of %q: %w", c.name, err)
		}
		c.shared.put(c.ids[no], p)
		return p, nil
	}
	c.mu.Lock()
	for i, k := range c.last {
		if k.no == no {
			copy(c.last[1:i+1], c.last[:i])
			c.last[0] = k
			c.mu.Unlock()
			return k.data, nil
		}
	}
	c.mu.Unlock()
	p, err := c.repo.LoadBlob(ctx, repo.DataBlob, c.ids[no], nil)
	if err != nil {
		return nil, fmt.Errorf("content of %q: %w", c.name, err)
	}
	c.mu.Lock()
	c.last = append([]chunk{{no, p}}, c.last...)
	c.last = c.last[:min(len(c.last), keptChunks)]
	c.mu.Unlock()
	return p, nil
}

// start is where the chunk no begins.
func (c *Content) start(no int) int64 {
	if no == 0 {
		return 0
	}
	return c.ends[no-1]
}

// ReadAt reads as io.ReaderAt does.
func (c *Content) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("content of %q: negative offset", c.name)
	}
	n := 0
	no := sort.Search(len(c.ends), func(i int) bool { return c.ends[i] > off })
	for ; n < len(p) && no < len(c.ends); no++ {
		data, err := c.chunk(ctx, no)
		if err != nil {
			return n, err
		}
		at := off + int64(n) - c.start(no)
		n += copy(p[n:], data[at:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Reader reads from off on.
func (c *Content) Reader(ctx context.Context, off int64) io.Reader { return &reader{ctx, c, off} }

type reader struct {
	ctx context.Context
	c   *Content
	off int64
}

func (r *reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	n, err := r.c.ReadAt(r.ctx, p, r.off)
	r.off += int64(n)
	if n > 0 && err == io.EOF {
		err = nil
	}
	return n, err
}

// ahead is how many chunks are loaded before they are written: so the repository and what takes the
// content work at the same time, in at most 32 MiB.
const ahead = 4

// Chunks are the ids of the chunks, which are the SHA-256 of what is in them, with their sizes in bytes.
func (c *Content) Chunks() iter.Seq2[id.ID, int64] {
	return func(yield func(id.ID, int64) bool) {
		for i, d := range c.ids {
			if !yield(d, c.ends[i]-c.start(i)) {
				return
			}
		}
	}
}

// WriteTo writes the whole content to w.
func (c *Content) WriteTo(ctx context.Context, w io.Writer) error { return c.WriteFrom(ctx, 0, w) }

// WriteFrom writes the content from off on, where a chunk must begin.
func (c *Content) WriteFrom(ctx context.Context, off int64, w io.Writer) error {
	no := 0
	for no < len(c.ids) && c.start(no) < off {
		no++
	}
	type loaded struct {
		p   []byte
		err error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	queue := make(chan chan loaded, ahead-1)
	go func() {
		defer close(queue)
		for _, d := range c.ids[no:] {
			ch := make(chan loaded, 1)
			select {
			case queue <- ch:
			case <-ctx.Done():
				return
			}
			go func() {
				p, err := c.repo.LoadBlob(ctx, repo.DataBlob, d, nil)
				ch <- loaded{p, err}
			}()
		}
	}()
	for ch := range queue {
		l := <-ch
		if l.err != nil {
			return fmt.Errorf("content of %q: %w", c.name, l.err)
		}
		if _, err := w.Write(l.p); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}
