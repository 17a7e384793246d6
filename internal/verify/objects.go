package verify

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/internal/bucket"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// objects is a bucket with contents of snapshots.
type objects struct {
	b *bucket.Bucket // nil: it cannot be asked
	// mu is held while it is asked, which is done for many objects at once.
	mu sync.Mutex
	// found holds what was asked for already: many snapshots name the same objects. "" is right.
	found map[object]string
}

// object is one as a snapshot records it.
type object struct {
	key, version, etag string
	size               int64
}

// askedAtOnce is how many objects are asked for at once.
const askedAtOnce = 32

// objectsOf makes ready the bucket of a store; nil if the repository has all its contents.
func (c *checker) objectsOf(ctx context.Context, st *snapshot.Store) (*objects, error) {
	if st.Bucket == nil || st.Bucket.Way == snapshot.WayCopy {
		return nil, nil
	}
	place := st.Bucket.BucketPlace
	if st.Bucket.Way == snapshot.WayReplica && st.Bucket.Replica != nil {
		place = *st.Bucket.Replica
	}
	key := place.Endpoint + " " + place.Bucket
	if o := c.buckets[key]; o != nil {
		return o, nil
	}
	o := &objects{found: map[object]string{}}
	c.buckets[key] = o
	err := errors.New("its keys are not known")
	if c.o.Bucket != nil {
		if o.b, err = c.o.Bucket(ctx, st); err == nil {
			// One question whose answer is known tells whether the bucket can be asked at all.
			for _, a := range o.b.CheckAccess(ctx, bucket.GetObject) {
				err = a.Err
			}
		}
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		if o.b != nil {
			o.b.Close()
			o.b = nil
		}
		c.mu.Lock()
		c.rep.Hints = append(c.rep.Hints, fmt.Sprintf("contents that lie in bucket %q at %s were not looked up: %v", place.Bucket, place.Endpoint, err))
		c.mu.Unlock()
	}
	return o, nil
}

func (c *checker) closeBuckets() {
	for _, o := range c.buckets {
		if o.b != nil {
			o.b.Close()
		}
	}
}

// object notes an object that the snapshot needs, and returns its size, in bytes.
func (p *prover) object(it *item) (int64, error) {
	ref := it.ref
	size, err := strconv.ParseUint(ref.size, 10, 62)
	if err != nil {
		p.errorf("%q: record %s=%q", it.name, pax.Size, ref.size)
	}
	if p.away == nil {
		p.errorf("%q has its content in the object %q, and the manifest names no bucket for it", it.name, ref.object)
		return int64(size), nil
	}
	p.asked = append(p.asked, object{key: ref.object, version: ref.version, etag: ref.etag, size: int64(size)})
	return int64(size), nil
}

// ask looks up the objects of the archive.
func (p *prover) ask() error {
	if p.away == nil || p.away.b == nil || len(p.asked) == 0 {
		return nil
	}
	p.away.mu.Lock()
	defer p.away.mu.Unlock()
	b := p.away.b
	var todo []object
	for _, x := range p.asked {
		if _, ok := p.away.found[x]; !ok {
			todo = append(todo, x)
		}
	}
	if p.unasked != nil && len(todo) > 0 {
		return nil // one of its other archives has told it
	}
	wrong := make([]string, len(todo))
	g, ctx := errgroup.WithContext(p.ctx)
	g.SetLimit(askedAtOnce)
	for i, x := range todo {
		g.Go(func() error {
			have, err := b.Stat(ctx, x.key, x.version)
			switch {
			case errors.Is(err, bucket.ErrNotFound):
				wrong[i] = "is not there"
			case err != nil:
				return err
			case have.Size != x.size:
				wrong[i] = fmt.Sprintf("has %d bytes, not %d", have.Size, x.size)
			case x.etag != "" && have.ETag != x.etag:
				wrong[i] = fmt.Sprintf("has the ETag %s, not %s: it is another content", have.ETag, x.etag)
			}
			return nil
		})
	}
	if len(todo) > 0 {
		p.c.o.Progress.Emit(progress.Event{Kind: progress.Update, Phase: "check", Item: "objects in " + b.String(), Done: int64(len(todo))})
	}
	if err := g.Wait(); err != nil {
		if p.ctx.Err() != nil {
			return context.Cause(p.ctx)
		}
		p.unasked = err
		return nil
	}
	for i, x := range todo {
		p.away.found[x] = wrong[i]
	}
	for _, x := range p.asked {
		if w := p.away.found[x]; w != "" {
			version := ""
			if x.version != "" {
				version = " (version " + x.version + ")"
			}
			p.errorf("object %q%s of %s %s", x.key, version, b, w)
		}
	}
	return nil
}
