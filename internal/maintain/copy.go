package maintain

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// ErrSameRepository is returned by Copy when source and destination are one repository.
var ErrSameRepository = errors.New("the two repositories are the same one")

// CopyOptions of Copy.
type CopyOptions struct {
	// ReadBack reads everything that a copied snapshot needs from the destination before its record is written.
	ReadBack bool
	// Done is told of each snapshot: to is null if it was there already. May be nil.
	Done     func(from *snapshot.Snapshot, to id.ID)
	Progress progress.Sink
}

// CopyResult tells what Copy did. Sizes are bytes.
type CopyResult struct {
	Copied, Present int
	Blobs           int64 // that were not there yet
	PlainBytes      int64
	StoredBytes     int64
	// Failed are the snapshots that could not be copied, each with its reason.
	Failed []error
}

// Copy copies the snapshots in list from src to dst, in that order, with all blobs that are not there yet. Both are
// locked and their indexes loaded. Every blob is compared with its hash when it is read, and is encrypted anew. What was
// stored before an interruption is there the next time. A snapshot whose data is damaged at the source
// is not copied; the others are.
func Copy(ctx context.Context, src, dst *repo.Repository, list []*snapshot.Snapshot, o CopyOptions) (*CopyResult, error) {
	if src.ID() == dst.ID() {
		return nil, ErrSameRepository
	}
	have, err := snapshot.List(ctx, dst)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("list the snapshots of the destination: %w", err)
	}
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := &copier{src: src, dst: dst, w: dst.NewWriter(wctx), seen: src.NewMarks(), sink: o.Progress}
	c.ev = progress.Event{Kind: progress.Start, Phase: "copy", Unit: "snapshots", Total: int64(len(list))}
	c.sink.Emit(c.ev)
	res := &CopyResult{}
	for n, s := range list {
		to, err := c.copy(ctx, s, have, o.ReadBack)
		if ctx.Err() != nil {
			return res, context.Cause(ctx)
		}
		st := c.w.Stats()
		res.Blobs, res.PlainBytes, res.StoredBytes = st.NewBlobs[0]+st.NewBlobs[1], st.PlainBytes[0]+st.PlainBytes[1], st.StoredBytes[0]+st.StoredBytes[1]
		var broken *destinationError
		switch {
		case errors.As(err, &broken):
			return res, fmt.Errorf("copy snapshot %s: %w", s.ID().Short(), err)
		case err != nil:
			res.Failed = append(res.Failed, fmt.Errorf("snapshot %s: %w", s.ID().Short(), err))
			c.seen = src.NewMarks() // what was marked may not have been copied
			continue
		case to.IsNull():
			res.Present++
		default:
			res.Copied++
		}
		if o.Done != nil {
			o.Done(s, to)
		}
		c.emit(int64(n + 1))
	}
	c.ev.Kind = progress.Finish
	c.sink.Emit(c.ev)
	return res, nil
}

// destinationError is trouble at the destination: nothing more can be copied.
type destinationError struct{ error }

func (e *destinationError) Unwrap() error { return e.error }

// copyBatch is how many blobs are read at a time: 0.5 MB of ids.
const copyBatch = 16 << 10

type copier struct {
	src, dst *repo.Repository
	w        *repo.Writer
	seen     *repo.Marks // blobs of the source that are at the destination or on their way
	sink     progress.Sink
	bytes    atomic.Int64

	mu sync.Mutex
	ev progress.Event // guarded by mu
}

func (c *copier) emit(done int64) {
	c.mu.Lock()
	c.ev.Kind, c.ev.Bytes = progress.Update, c.bytes.Load()
	c.ev.Done = max(c.ev.Done, done)
	e := c.ev
	c.mu.Unlock()
	c.sink.Emit(e)
}

// copy copies one snapshot. The result is null if it was there.
func (c *copier) copy(ctx context.Context, s *snapshot.Snapshot, have []*snapshot.Snapshot, readBack bool) (id.ID, error) {
	if s.Tree == nil {
		return id.ID{}, errors.New("it has no tree")
	}
	first := s.ID()
	if s.Original != nil {
		first = *s.Original
	}
	for _, h := range have {
		if (h.ID() == first || h.Original != nil && *h.Original == first) && sameRecord(h, s) {
			return id.ID{}, nil
		}
	}
	if err := c.blobs(ctx, *s.Tree); err != nil {
		return id.ID{}, err
	}
	if err := c.w.Flush(ctx); err != nil {
		return id.ID{}, &destinationError{err}
	}
	if readBack {
		if err := c.readBack(ctx, *s.Tree); err != nil {
			return id.ID{}, &destinationError{fmt.Errorf("read back what was copied: %w", err)}
		}
	}
	n := *s
	n.Parent, n.Original = nil, &first
	if err := snapshot.Save(ctx, c.dst, &n); err != nil {
		return id.ID{}, &destinationError{err}
	}
	return n.ID(), nil
}

// blobs copies everything below root that is not there.
func (c *copier) blobs(ctx context.Context, root id.ID) error {
	mark := c.seen.Adder().Mark
	missing := func(t repo.BlobType, d id.ID) error {
		if _, ok := c.src.Size(t, d); !ok {
			return fmt.Errorf("%v blob %s: %w", t, d.Short(), repo.ErrUnknownBlob)
		}
		return nil
	}
	todo := []id.ID{}
	if err := missing(repo.TreeBlob, root); err != nil {
		return err
	}
	if mark(repo.TreeBlob, root) {
		todo = append(todo, root)
	}
	var mu sync.Mutex
	var data []id.ID
	flush := func(least int) error {
		for len(data) > least {
			n := min(len(data), copyBatch)
			if err := c.load(ctx, repo.DataBlob, data[len(data)-n:], nil); err != nil {
				return err
			}
			data = data[:len(data)-n]
		}
		return nil
	}
	for len(todo) > 0 {
		n := min(len(todo), 2048)
		batch := append([]id.ID(nil), todo[len(todo)-n:]...)
		todo = todo[:len(todo)-n]
		err := c.load(ctx, repo.TreeBlob, batch, func(d id.ID, p []byte) error {
			var t struct {
				Nodes []struct {
					Type    snapshot.NodeType `json:"type"`
					Content []id.ID           `json:"content"`
					Subtree *id.ID            `json:"subtree"`
				} `json:"nodes"`
			}
			if err := json.Unmarshal(p, &t); err != nil {
				return fmt.Errorf("tree %s: %w", d.Short(), err)
			}
			mu.Lock()
			defer mu.Unlock()
			for _, n := range t.Nodes {
				switch {
				case n.Type == snapshot.File:
					for _, b := range n.Content {
						if err := missing(repo.DataBlob, b); err != nil {
							return err
						}
						if !mark(repo.DataBlob, b) {
							continue
						}
						size, ok := c.dst.Size(repo.DataBlob, b)
						if want, _ := c.src.Size(repo.DataBlob, b); ok && size != want {
							return &destinationError{fmt.Errorf("data blob %s has %d bytes at the source and %d at the destination: one of the indexes is wrong", b.Short(), want, size)}
						}
						if !ok {
							data = append(data, b)
						}
					}
				case n.Type == snapshot.Dir && n.Subtree != nil:
					if err := missing(repo.TreeBlob, *n.Subtree); err != nil {
						return err
					}
					if mark(repo.TreeBlob, *n.Subtree) {
						todo = append(todo, *n.Subtree)
					}
				}
			}
			return nil
		})
		if err == nil {
			err = flush(copyBatch)
		}
		if err != nil {
			return err
		}
	}
	return flush(0)
}

// load reads blobs at the source and stores them at the destination.
func (c *copier) load(ctx context.Context, t repo.BlobType, ids []id.ID, look func(id.ID, []byte) error) error {
	return c.src.LoadBlobs(ctx, t, ids, func(d id.ID, p []byte) error {
		if look != nil {
			if err := look(d, p); err != nil {
				return err
			}
		}
		if len(p) == 0 {
			return fmt.Errorf("%v blob %s is empty, which cannot be stored", t, d.Short())
		}
		if _, _, err := c.w.Save(ctx, t, p); err != nil {
			return &destinationError{err}
		}
		c.bytes.Add(int64(len(p)))
		c.emit(0)
		return nil
	})
}

// readBack loads everything below root from the destination; loading compares with the hashes. It holds 32 bytes for
// each data blob of the snapshot.
func (c *copier) readBack(ctx context.Context, root id.ID) error {
	add := c.dst.NewMarks().Adder()
	var mu sync.Mutex
	var data []id.ID
	var unknown error
	err := snapshot.Used(ctx, c.dst, []id.ID{root}, func(t repo.BlobType, d id.ID) bool {
		if !add.Mark(t, d) {
			if _, ok := c.dst.Size(t, d); !ok {
				mu.Lock()
				unknown = fmt.Errorf("%v blob %s: %w", t, d.Short(), repo.ErrUnknownBlob)
				mu.Unlock()
			}
			return false
		}
		if t == repo.DataBlob {
			mu.Lock()
			data = append(data, d)
			mu.Unlock()
		}
		return true
	}, nil)
	if err == nil {
		err = unknown
	}
	for err == nil && len(data) > 0 {
		n := min(len(data), copyBatch)
		err = c.dst.LoadBlobs(ctx, repo.DataBlob, data[:n], func(id.ID, []byte) error { return nil })
		data = data[n:]
	}
	return err
}
