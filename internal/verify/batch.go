package verify

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/internal/cpus"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Snapshots are proven together, space by space, because most of a space is the same in all of them: what one has learned serves the
// next. These bound how many, because their lists of spaces (about 400 bytes for each space) are held meanwhile.
const (
	togetherSpaces    = 16384
	togetherSnapshots = 128
)

// defaultRemember is Options.Remember by default, in bytes.
const defaultRemember = 16 << 20

// record is one of the snapshots that are proven together.
type record struct {
	Snapshot
	short  string
	root   id.ID
	known  map[string]bool // blobs that were missing when it was made
	blobs  int64           // that its manifest counts
	uneven bool            // not all that the manifest counts can be counted again
	stores []*storeProof
}

// storeProof adds up what the provers of one store of a snapshot find.
type storeProof struct {
	rec  *record
	st   *snapshot.Store
	away *objects
	// Those of store.tar, which is read before the spaces.
	uploads map[string]int64
	gaps    id.ID
	// unasked is why the bucket could not be asked, which is told once. The checker's mu guards it.
	unasked error
}

// archive is one archive of one snapshot.
type archive struct {
	*storeProof
	sp *snapshot.Space // nil: store.tar
}

// proveSome repeats the proofs of the first snapshots of own with what the repository holds, and returns of how many.
func (c *checker) proveSome(ctx context.Context, own []*snapshot.Snapshot) (int, error) {
	var recs []*record
	spaces := 0
	for _, s := range own {
		rec, err := c.record(ctx, s)
		if err != nil {
			return 0, err
		}
		recs = append(recs, rec)
		for _, p := range rec.stores {
			spaces += len(p.st.Spaces)
		}
		if spaces >= togetherSpaces || len(recs) >= togetherSnapshots {
			break
		}
	}
	// The same archive of all snapshots, in their order, is one list.
	type place struct{ store, space string }
	var stores, all [][]archive
	at := map[place]int{}
	enter := func(lists *[][]archive, k place, a archive) {
		i, ok := at[k]
		if !ok {
			i = len(*lists)
			at[k] = i
			*lists = append(*lists, nil)
		}
		(*lists)[i] = append((*lists)[i], a)
	}
	for _, rec := range recs {
		for _, p := range rec.stores {
			enter(&stores, place{p.st.Name, ""}, archive{p, nil})
		}
	}
	clear(at)
	for _, rec := range recs {
		for _, p := range rec.stores {
			for i := range p.st.Spaces {
				sp := &p.st.Spaces[i]
				enter(&all, place{p.st.Name, sp.ID}, archive{p, sp})
			}
		}
	}
	if err := c.proveAll(ctx, stores, progress.Event{}); err != nil {
		return 0, err
	}
	for _, rec := range recs {
		for _, p := range rec.stores {
			p.gaps = gapsOf(rec.known, p.uploads)
		}
	}
	about := progress.Event{Kind: progress.Update, Phase: "check", Item: "proof of " + recs[0].short, Unit: "spaces"}
	if len(recs) > 1 {
		about.Item += fmt.Sprintf(" and %d more", len(recs)-1)
	}
	if err := c.proveAll(ctx, all, about); err != nil {
		return 0, err
	}
	for _, rec := range recs {
		if !rec.uneven && rec.Proof.Blobs < rec.blobs {
			c.errorf("snapshot %s: its record speaks of %d blobs, its metadata of %d", rec.short, rec.blobs, rec.Proof.Blobs)
			rec.Complete = false
		}
		c.rep.Snapshots = append(c.rep.Snapshots, rec.Snapshot)
	}
	return len(recs), nil
}

// record reads what there is to prove of a snapshot. It has no stores if that cannot be read.
func (c *checker) record(ctx context.Context, s *snapshot.Snapshot) (*record, error) {
	rec := &record{Snapshot: Snapshot{ID: s.ID()}, short: s.ID().Short()}
	if s.Tree == nil {
		return rec, nil
	}
	rec.root = *s.Tree
	switch n, err := snapshot.Lookup(ctx, c.r, *s.Tree, snapshot.ManifestPath); {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case err != nil && !errors.Is(err, snapshot.ErrNoSuchPath), err == nil && n.Type == snapshot.File && !c.whole(n):
		return rec, nil // the walk over the trees has told it
	}
	m, err := snapshot.LoadManifest(ctx, c.r, *s.Tree)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		c.errorf("snapshot %s: %v", rec.short, err)
		return rec, nil
	}
	rec.Complete = m.Proof.Complete && !c.trees[*s.Tree]
	rec.Proof.Missing, rec.Proof.Unreadable, rec.Proof.NotCaptured = m.Proof.Missing, m.Proof.Unreadable, m.Proof.NotCaptured
	rec.blobs = m.Proof.Blobs
	rec.known = map[string]bool{}
	for _, x := range m.Proof.Missing {
		rec.known[x.BlobID] = true
	}
	for i := range m.Stores {
		st := m.Stores[i] // a copy, so that the rest of the manifest is not held
		away, err := c.objectsOf(ctx, &st)
		if err != nil {
			return nil, err
		}
		rec.stores = append(rec.stores, &storeProof{rec: rec, st: &st, away: away, uploads: map[string]int64{}})
		if st.Layout == string(ocis.Posix) { // hard links count there, and their attributes stand once
			rec.uneven = true
		}
	}
	return rec, nil
}

// proveAll proves the archives of the lists: several lists at a time, and those of a list one after the other. about is reported, with
// how many are done, if it is of a kind.
func (c *checker) proveAll(ctx context.Context, lists [][]archive, about progress.Event) error {
	n := min(cmp.Or(max(c.o.Spaces, 0), cpus.Count()), len(lists))
	g, gctx := errgroup.WithContext(ctx)
	var next atomic.Int64
	for range n {
		g.Go(func() error {
			have := folders{}
			for {
				i := int(next.Add(1)) - 1
				if i >= len(lists) {
					return nil
				}
				if e := about; e.Kind != "" {
					e.Done, e.Total = int64(i), int64(len(lists))
					c.o.Progress.Emit(e)
				}
				var m *memo
				if len(lists[i]) > 1 {
					m = &memo{limit: cmp.Or(max(c.o.Remember, 0), defaultRemember) / int64(n)}
				}
				for _, a := range lists[i] {
					if err := c.prove(gctx, a, m, have); err != nil {
						return err
					}
				}
			}
		})
	}
	err := g.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// prove proves one archive, and adds what was found to what is known of its snapshot.
func (c *checker) prove(ctx context.Context, a archive, m *memo, have folders) error {
	c.mu.Lock()
	unasked := a.unasked
	c.mu.Unlock()
	p := &prover{c: c, ctx: ctx, root: a.rec.root, st: a.st, sp: a.sp, base: "/storage/" + a.st.Name, known: a.rec.known, gaps: a.gaps,
		uploads: a.uploads, folders: have, trees: map[string]*snapshot.Tree{}, away: a.away, unasked: unasked}
	if err := p.run(m); err != nil {
		return err
	}
	found := p.found
	c.mu.Lock()
	if p.unasked != nil && a.unasked == nil {
		a.unasked = p.unasked
		found = append(slices.Clip(found), p.unasked.Error())
	}
	a.rec.add(&p.proof)
	a.rec.Complete = a.rec.Complete && len(found) == 0
	a.rec.uneven = a.rec.uneven || p.cut
	c.mu.Unlock()
	for _, s := range found {
		c.errorf("snapshot %s: %s", a.rec.short, s)
	}
	return nil
}

// add takes over what was counted.
func (r *record) add(q *snapshot.Proof) {
	r.Proof.Nodes += q.Nodes
	r.Proof.Revisions += q.Revisions
	r.Proof.TrashItems += q.TrashItems
	r.Proof.Blobs += q.Blobs
	r.Proof.Bytes += q.Bytes
	r.Proof.Verified += q.Verified
	r.Proof.InFlight += q.InFlight
}
