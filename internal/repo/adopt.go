package repo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/repo/pack"
)

// Adopted counts what AdoptPacks has found. Bytes are as stored.
type Adopted struct {
	Packs, Blobs int
	Bytes        int64
}

// AdoptPacks makes use of packs that a killed program has stored but entered in no index file: it reads
// the lists at their ends and enters them in the index in memory; the next Flush of a Writer makes that
// durable. The index must have been loaded.
//
// It does nothing unless we hold a lock and nobody else holds one that looks alive, because the packs of
// another program that runs have their index file still to come. Should one be taken all the same,
// then two index files name it alike, which does no harm. Packs of which every blob is stored elsewhere are left
// to prune, and so are those whose list cannot be read.
func (r *Repository) AdoptPacks(ctx context.Context) (Adopted, error) {
	var got Adopted
	own := r.held.Load()
	if own == nil {
		return got, nil
	}
	type orphan struct {
		id   ID
		size int64
	}
	// The list comes before the look at the locks: whoever has stored one of these packs and is still at
	// work has a lock by now.
	var orphans []orphan
	err := r.ListFiles(ctx, backend.PackFile, func(d ID, size int64) error {
		r.mu.RLock()
		defer r.mu.RUnlock()
		if !r.idx.HasPack(d) {
			orphans = append(orphans, orphan{d, size})
		}
		return nil
	})
	if err != nil || len(orphans) == 0 {
		return got, err
	}
	locks, err := r.Locks(ctx)
	if err != nil {
		return got, err
	}
	own.mu.Lock()
	mine := append([]ID{own.id}, own.old...)
	own.mu.Unlock()
	for _, l := range locks {
		if !l.Stale && !slices.Contains(mine, l.ID) {
			return got, nil
		}
	}
	// Somebody may have ended in between, and entered what was an orphan a moment ago.
	if err := r.LoadIndex(ctx); err != nil {
		return got, err
	}
	var mu sync.Mutex
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(r.opts.Readers)
	for _, o := range orphans {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			entries, err := r.packHeader(gctx, o.id, o.size)
			var de *damageError
			switch {
			case errors.As(err, &de), errors.Is(err, backend.ErrNotExist):
				return nil
			case err != nil:
				return fmt.Errorf("read the list of the pack %s: %w", o.id.Short(), err)
			}
			mu.Lock() // one after the other, so that copies in two orphans are seen
			defer mu.Unlock()
			if !r.wants(o.id, entries) {
				return nil
			}
			r.addPack(o.id, entries)
			got.Packs++
			got.Blobs += len(entries)
			got.Bytes += o.size
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return got, err
	}
	if ctx.Err() != nil {
		return got, context.Cause(ctx)
	}
	return got, nil
}

// wants reports whether a pack that the index does not have holds a blob that it does not have.
func (r *Repository) wants(p ID, entries []pack.Entry) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.idx.HasPack(p) {
		return false
	}
	for _, e := range entries {
		if _, ok := r.idx.First(e.Type, e.ID); !ok {
			return true
		}
	}
	return false
}
