package bucket

import (
	"context"
	"errors"
	"strings"

	"github.com/minio/minio-go/v7"
	"golang.org/x/sync/errgroup"
)

// listers is how many parts of a prefix are listed at once.
const listers = 16

// firstPage is how many keys one request lists at the most.
const firstPage = 1000

var errStop = errors.New("stop")

// List calls fn for each object whose key begins with prefix, several at once and in no order. Nothing
// is held but what one answer has. What is added or removed meanwhile may come or not.
//
// Errors: *Error, those of fn.
func (b *Bucket) List(ctx context.Context, prefix string, fn func(Object) error) error {
	// The first page alone is enough for most spaces. For the others the rest is cut where the next letter
	// of the key, a hexadecimal digit of an id, changes.
	last, n := "", 0
	err := b.list(ctx, prefix, "", "", func(o Object) error {
		if n == firstPage {
			return errStop
		}
		n++
		last = o.Key
		return fn(o)
	})
	if !errors.Is(err, errStop) {
		return err
	}
	const digits = "123456789abcdef"
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(listers)
	from := last
	for i := range len(digits) + 1 {
		to := ""
		if i < len(digits) {
			if to = prefix + digits[i:i+1]; to <= from {
				continue
			}
		}
		after := from
		g.Go(func() error { return b.list(gctx, prefix, after, to, fn) })
		from = to
	}
	return g.Wait()
}

// list lists the keys after one key up to and with another, "" for no bound, in order.
func (b *Bucket) list(ctx context.Context, prefix, after, to string, fn func(Object) error) error {
	done := after
	var stop error
	err := b.again(ctx, func() error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		owner := false
		for i := range b.cl.ListObjectsIter(ctx, b.cfg.Bucket, minio.ListObjectsOptions{
			Prefix: prefix, Recursive: true, StartAfter: done, FetchOwner: &owner,
		}) {
			if i.Err != nil {
				return i.Err
			}
			if i.Key <= done || !strings.HasPrefix(i.Key, prefix) {
				continue // a server that does not know where to begin
			}
			if to != "" && i.Key > to {
				return nil
			}
			if stop = fn(object(&i)); stop != nil {
				return nil
			}
			done = i.Key
		}
		return nil
	})
	if stop != nil {
		return stop
	}
	if err == nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	return b.fail(ctx, "list objects", "", err)
}

// Versions lists the versions of one object, delete markers as well, newest first.
func (b *Bucket) Versions(ctx context.Context, key string) ([]Object, error) {
	var out []Object
	err := b.versions(ctx, key, func(o Object) error {
		if o.Key > key { // another object whose name begins like this one
			return errStop
		}
		out = append(out, o)
		return nil
	})
	if errors.Is(err, errStop) {
		err = nil
	}
	return out, err
}

func (b *Bucket) versions(ctx context.Context, prefix string, fn func(Object) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for i := range b.cl.ListObjectsIter(ctx, b.cfg.Bucket, minio.ListObjectsOptions{Prefix: prefix, Recursive: true, WithVersions: true}) {
		if i.Err != nil {
			return b.fail(ctx, "list versions", "", i.Err)
		}
		if err := fn(object(&i)); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

// Tops lists the first parts of all keys: "<space id>/", of which only the Key is set, and the objects whose
// keys have no slash.
func (b *Bucket) Tops(ctx context.Context, fn func(Object) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for i := range b.cl.ListObjectsIter(ctx, b.cfg.Bucket, minio.ListObjectsOptions{}) {
		if i.Err != nil {
			return b.fail(ctx, "list objects", "", i.Err)
		}
		if err := fn(object(&i)); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}
