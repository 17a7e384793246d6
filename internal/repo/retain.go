package repo

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

// retainers is how many files are asked about at once: each takes a request or two, and no memory.
const retainers = 16

// retainSlack is added to a lock in hundredths of its time, so that not every backup has to renew it.
const retainSlack = 10

// ErrNoRetention is returned where the place of the repository cannot lock files.
var ErrNoRetention = errors.New("the place of the repository cannot lock files")

// retainer finds what can lock files. Errors: ErrNoRetention.
func (r *Repository) retainer(ctx context.Context) (backend.Retainer, error) {
	ret := backend.RetainerOf(r.be)
	if ret == nil {
		return nil, ErrNoRetention
	}
	can, err := ret.CanRetain(ctx)
	if err == nil && !can {
		err = ErrNoRetention
	}
	return ret, err
}

// Retains reports whether the place of the repository can lock files, as far as it says.
func (r *Repository) Retains(ctx context.Context) bool {
	_, err := r.retainer(ctx)
	return err == nil
}

// retained lists the files that the repository needs: all but locks, and packs that no index names. The index must
// be loaded.
func (r *Repository) retained(ctx context.Context, fn func(backend.Handle) error) error {
	for _, t := range []backend.FileType{backend.ConfigFile, backend.KeyFile, backend.SnapshotFile, backend.IndexFile, backend.PackFile} {
		err := r.be.List(ctx, t, func(fi backend.FileInfo) error {
			if t == backend.PackFile {
				d, err := id.Parse(fi.Name)
				if err != nil {
					return nil //nolint:nilerr // no pack
				}
				r.mu.RLock()
				known := r.idx.HasPack(d)
				r.mu.RUnlock()
				if !known {
					return nil
				}
			}
			return fn(backend.Handle{Type: t, Name: fi.Name})
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Retentions says until when files of one type are locked.
type Retentions struct {
	Type  backend.FileType
	Files int64
	// Locked of them, from First to Last.
	Locked      int64
	First, Last time.Time
	// Modes of the locks, with their counts.
	Modes map[string]int64
}

// Retentions tells for each type of file until when files are locked. The index must be loaded. Errors: ErrNoRetention.
func (r *Repository) Retentions(ctx context.Context, sink progress.Sink) ([]Retentions, error) {
	ret, err := r.retainer(ctx)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	var out []Retentions
	now := r.clock.now()
	err = r.eachRetained(ctx, sink, func(ctx context.Context, h backend.Handle) error {
		have, err := ret.Retention(ctx, h)
		if errors.Is(err, backend.ErrNotExist) {
			return nil // removed meanwhile
		}
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		i := 0
		for i < len(out) && out[i].Type != h.Type {
			i++
		}
		if i == len(out) {
			out = append(out, Retentions{Type: h.Type, Modes: map[string]int64{}})
		}
		x := &out[i]
		x.Files++
		if !have.Until.After(now) {
			return nil
		}
		if x.Locked == 0 || have.Until.Before(x.First) {
			x.First = have.Until
		}
		if have.Until.After(x.Last) {
			x.Last = have.Until
		}
		x.Locked++
		x.Modes[have.Mode]++
		return nil
	})
	slices.SortFunc(out, func(a, b Retentions) int { return cmp.Compare(a.Type, b.Type) })
	return out, err
}

// eachRetained calls fn for each file that the repository needs, several at once.
func (r *Repository) eachRetained(ctx context.Context, sink progress.Sink, fn func(context.Context, backend.Handle) error) error {
	ev := progress.Event{Kind: progress.Start, Phase: "object locks", Unit: "files"}
	sink.Emit(ev)
	var files []backend.Handle // a listing must not wait for its own files
	if err := r.retained(ctx, func(h backend.Handle) error { files = append(files, h); return nil }); err != nil {
		return err
	}
	var mu sync.Mutex
	ev.Total = int64(len(files))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(retainers)
	for _, h := range files {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			if gctx.Err() != nil {
				return context.Cause(gctx)
			}
			if err := fn(gctx, h); err != nil {
				return err
			}
			mu.Lock()
			ev.Kind, ev.Done = progress.Update, ev.Done+1
			e := ev
			mu.Unlock()
			sink.Emit(e)
			return nil
		})
	}
	err := g.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err == nil {
		ev.Kind = progress.Finish
		sink.Emit(ev)
	}
	return err
}

// KnownLocks remembers until when files are locked, so that they need not be asked for. Keys are as handles print.
type KnownLocks map[string]time.Time

// Retain makes sure that each file that the repository needs is locked for so long from now on. What it has to renew it
// renews for a tenth more, so that the next ones need not. known says what earlier calls have found; the result is
// that for the files that are there now. The index must be loaded. Errors: ErrNoRetention.
func (r *Repository) Retain(ctx context.Context, lockFor time.Duration, known KnownLocks, sink progress.Sink) (now KnownLocks, renewed int64, err error) {
	ret, err := r.retainer(ctx)
	if err != nil {
		return known, 0, err
	}
	start := r.clock.now()
	least, until := start.Add(lockFor), start.Add(lockFor+lockFor*retainSlack/100).Truncate(time.Second)
	var mu sync.Mutex
	now = KnownLocks{}
	note := func(h backend.Handle, t time.Time, isNew int64) {
		mu.Lock()
		now[h.String()], renewed = t, renewed+isNew
		mu.Unlock()
	}
	err = r.eachRetained(ctx, sink, func(ctx context.Context, h backend.Handle) error {
		if t, ok := known[h.String()]; ok && !t.Before(least) {
			note(h, t, 0)
			return nil
		}
		have, err := ret.Retention(ctx, h)
		isNew := int64(0)
		if err == nil && have.Until.Before(least) {
			have.Until, isNew = until, 1
			err = ret.Retain(ctx, h, until)
		}
		if errors.Is(err, backend.ErrNotExist) {
			return nil // removed meanwhile
		}
		if err == nil {
			note(h, have.Until, isNew)
		}
		return err
	})
	return now, renewed, err
}
