package replica

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/internal/bucket"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
)

// Options of Remove.
type Options struct {
	Repository string // id
	// Claim takes also a bucket that was not empty when the repository began to use it.
	Claim  bool
	DryRun bool
	// Confirm is asked before each thousand removals whether the repository is still ours alone.
	Confirm  func(context.Context) error
	Progress progress.Sink
}

// Result tells what was found and done. With a dry run Removed is what would be.
type Result struct {
	Bucket   string `json:"bucket"`
	Endpoint string `json:"endpoint"`
	// Refused says why nothing is removed; the amounts are then zero.
	Refused string      `json:"refused,omitempty"`
	Needed  repo.Amount `json:"needed"`
	Removed repo.Amount `json:"removed"`
	// Newer came after the last backup that used the bucket had ended: nobody knows yet whether it is needed.
	Newer repo.Amount `json:"newer"`
	// Foreign has no name that the product gives.
	Foreign repo.Amount `json:"foreign"`
	// Failed could not be removed.
	Failed int64 `json:"failed"`
	// Missing counts objects that snapshots need and that are not there.
	Missing int64 `json:"missing"`
	// Versions is true if the bucket keeps the contents of what is removed as old versions.
	Versions bool `json:"keeps_versions"`
}

const (
	removers     = 16   // requests at once
	confirmEvery = 1000 // removals
	// failuresMost ends the work: who may not remove a hundred objects may not remove the others.
	failuresMost = 100
	// failuresTold is how many failures are reported one by one.
	failuresTold = 10
	// undoTime is how long taking back our flag may take after the work was cancelled.
	undoTime = 20 * time.Second
)

// FailedError says that objects could not be removed.
type FailedError struct {
	Bucket string
	Count  int64
	Err    error // the first one
}

func (e *FailedError) Error() string {
	return fmt.Sprintf("%d objects of %s that no snapshot needs could not be removed: %v", e.Count, e.Bucket, e.Err)
}
func (e *FailedError) Unwrap() error { return e.Err }

// Hints says what to do next.
func (e *FailedError) Hints() []string {
	return []string{"The keys of the replica need the right s3:DeleteObject, and the objects must not be locked. The next prune tries again; nothing that is needed was touched."}
}

// Remove removes the objects of the bucket that no snapshot needs, and tells what it comes to. Except for a dry
// run the repository must be locked exclusively. It can be stopped at any moment; the next one goes on.
//
// Errors: *FailedError, those of Confirm.
func Remove(ctx context.Context, b *bucket.Bucket, n *Needed, o Options) (res *Result, err error) {
	res = &Result{Bucket: b.Name(), Endpoint: b.Endpoint()}
	for _, p := range n.Sources {
		if p.Bucket == b.Name() && strings.TrimRight(p.Endpoint, "/") == strings.TrimRight(b.Endpoint(), "/") {
			res.Refused = "snapshots name it as the bucket of an instance"
			return res, nil
		}
	}
	list, err := markers(ctx, b)
	if err != nil {
		return nil, err
	}
	own := markerOf(list, o.Repository)
	if own == nil {
		res.Refused = "this repository has no marker there; the next backup writes it"
		return res, nil
	}
	if res.Refused = shared(list, o.Repository); res.Refused != "" {
		return res, nil
	}
	m, err := load(ctx, b, o.Repository)
	if err != nil {
		return nil, err
	}
	if !m.Empty && !o.Claim {
		res.Refused = "it was not empty when this repository began to use it, so what is in it may be somebody else's; --replica-claim says that it is not"
		return res, nil
	}
	// The right to ask is none that a replica needs otherwise.
	if on, verr := b.Versioning(ctx); verr == nil {
		res.Versions = on
	} else if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if !o.DryRun {
		key := Prefix + o.Repository + removing
		if err := put(ctx, b, key, []byte("{}")); err != nil {
			return nil, err
		}
		lost := false
		confirm := o.Confirm
		o.Confirm = func(ctx context.Context) error {
			err := confirm(ctx)
			lost = lost || err != nil && ctx.Err() == nil
			return err
		}
		defer func() {
			if lost {
				return // another process of this repository may rely on it
			}
			uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
			defer cancel()
			if rerr := b.Remove(uctx, key, ""); rerr != nil {
				err = errors.Join(err, rerr)
			}
		}()
		if list, err = markers(ctx, b); err != nil {
			return nil, err
		}
		if res.Refused = shared(list, o.Repository); res.Refused != "" {
			return res, nil
		}
	}
	return res, (&remover{b: b, n: n, o: &o, res: res, since: own.written, found: make([]uint64, len(n.keys)/64+1)}).run(ctx)
}

// shared says that other repositories use the bucket, or "".
func shared(list []seen, own string) string {
	o := others(list, own)
	if len(o) == 0 {
		return ""
	}
	return fmt.Sprintf("other repositories use it, and only they know what they need: %s (if one is no more, delete its marker, the object %s and its id)",
		strings.Join(o, ", "), Prefix)
}

type remover struct {
	b     *bucket.Bucket
	n     *Needed
	o     *Options
	res   *Result
	since time.Time // end of the last backup

	mu    sync.Mutex
	found []uint64 // guarded by mu, as res is: a bit for each key that is needed
	first error    // guarded by mu: of those that failed
	done  int64    // guarded by mu
}

// errEnough ends the work after too many failures.
var errEnough = errors.New("too many failures")

func (r *remover) run(ctx context.Context) error {
	ev := progress.Event{Kind: progress.Start, Phase: "replica", Item: r.b.String(), Unit: "objects"}
	r.o.Progress.Emit(ev)
	todo := make(chan bucket.Object, confirmEvery)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(todo)
		return r.b.List(gctx, "", func(x bucket.Object) error {
			if !r.goes(x) {
				return nil
			}
			if r.o.DryRun {
				r.count(&r.res.Removed, x)
				return nil
			}
			select {
			case todo <- x:
				return nil
			case <-gctx.Done():
				return context.Cause(gctx)
			}
		})
	})
	g.Go(func() error { return r.work(gctx, todo) })
	err := g.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil && !errors.Is(err, errEnough) {
		return err
	}
	if err == nil {
		have := int64(0)
		for i := range r.n.keys {
			if r.found[i/64]&(1<<(i%64)) != 0 {
				have++
			}
		}
		if len(r.n.Replicas) == 1 { // else they may lie in another one
			r.res.Missing = int64(len(r.n.keys)) - have
		}
	}
	if r.res.Failed > 0 {
		return &FailedError{Bucket: r.b.String(), Count: r.res.Failed, Err: r.first}
	}
	ev.Kind, ev.Done = progress.Finish, r.done
	r.o.Progress.Emit(ev)
	return nil
}

// goes judges one object of the listing.
func (r *remover) goes(x bucket.Object) bool {
	if strings.HasPrefix(x.Key, Prefix) {
		return false
	}
	i, ok := r.n.find(x.Key)
	switch {
	case ok:
		r.mu.Lock()
		r.found[i/64] |= 1 << (i % 64)
		r.mu.Unlock()
		r.count(&r.res.Needed, x)
	case !r.n.product(x.Key):
		r.count(&r.res.Foreign, x)
	case x.Modified.After(r.since):
		r.count(&r.res.Newer, x)
	default:
		return true
	}
	return false
}

func (r *remover) count(a *repo.Amount, x bucket.Object) {
	r.mu.Lock()
	a.Count++
	a.Bytes += x.Size
	r.mu.Unlock()
}

// work removes what comes.
func (r *remover) work(ctx context.Context, todo <-chan bucket.Object) error {
	for {
		batch, more := make([]bucket.Object, 0, confirmEvery), true
		for more && len(batch) < confirmEvery {
			var x bucket.Object
			if x, more = <-todo; more {
				batch = append(batch, x)
			}
		}
		if len(batch) > 0 {
			if err := r.batch(ctx, batch); err != nil {
				return err
			}
		}
		if !more {
			return nil
		}
	}
}

func (r *remover) batch(ctx context.Context, batch []bucket.Object) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if err := r.o.Confirm(ctx); err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(removers)
	for _, x := range batch {
		g.Go(func() error {
			if gctx.Err() != nil {
				return context.Cause(gctx)
			}
			err := r.b.Remove(gctx, x.Key, "")
			if err != nil && gctx.Err() != nil {
				return context.Cause(gctx)
			}
			return r.removed(x, err)
		})
	}
	return g.Wait()
}

// removed notes what became of one object.
func (r *remover) removed(x bucket.Object, err error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil {
		r.res.Removed.Count++
		r.res.Removed.Bytes += x.Size
		r.done++
		r.o.Progress.Emit(progress.Event{Kind: progress.Update, Phase: "replica", Unit: "objects", Done: r.done, Bytes: r.res.Removed.Bytes})
		return nil
	}
	if r.first == nil {
		r.first = err
	}
	r.res.Failed++
	if r.res.Failed <= failuresTold {
		r.o.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "replica", Item: x.Key, Message: err.Error()})
	}
	if r.res.Failed >= failuresMost {
		return errEnough
	}
	return nil
}

// product reports whether the product gives such names: <space id>/<blob id in parts>, or, in former times, the
// blob id alone; and whatever lies below a space.
func (n *Needed) product(key string) bool {
	space, rel, below := strings.Cut(key, "/")
	if isUUID(space) || below && n.spaces[space] {
		return true
	}
	return below && ocis.NodePath(strings.ReplaceAll(rel, "/", "")) == rel && strings.Count(rel, "/") == ocis.NodeDepth
}

func isUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if dash := i == 8 || i == 13 || i == 18 || i == 23; dash != (c == '-') || !dash && !strings.ContainsRune("0123456789abcdefABCDEF", rune(c)) {
			return false
		}
	}
	return true
}
