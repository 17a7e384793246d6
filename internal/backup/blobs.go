package backup

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/holdfast-backup/holdfast/internal/bucket"
	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/replica"
	"github.com/holdfast-backup/holdfast/internal/s3"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// BlobOptions say how a bucket with blobs is secured. The zero value copies it into the repository.
type BlobOptions struct {
	// Way is snapshot.WayCopy, WayReplica or WayVersions; "" is WayCopy.
	Way string
	// AccessKey and SecretKey replace those of the server; "" are the server's.
	AccessKey, SecretKey string
	// Replica is the second bucket of WayReplica. What is empty in it is as in the instance's bucket.
	Replica bucket.Config
	// CountSpare and KeepSpare: see capture.Objects.
	CountSpare, KeepSpare bool
	// LockFor locks the pinned versions for at least so long; zero: no lock.
	LockFor time.Duration
	// Tries and Pause are those of bucket.Config, for the instance's bucket; zero: its defaults.
	Tries int
	Pause time.Duration
}

// BucketOf is the configuration of the bucket of a store, with the keys that were given apart.
func (o *BlobOptions) BucketOf(s *ocis.S3) bucket.Config {
	c := bucket.Of(s)
	if o.AccessKey != "" {
		c.AccessKey, c.SecretKey = o.AccessKey, o.SecretKey
	}
	c.Tries, c.Pause = o.Tries, o.Pause
	return c
}

// ReplicaOf is the configuration of the replica of a bucket.
func (o *BlobOptions) ReplicaOf(of bucket.Config) bucket.Config {
	c := o.Replica
	if c.Endpoint == "" {
		c.Endpoint, c.PathStyle = of.Endpoint, of.PathStyle
		if c.Region == "" {
			c.Region = of.Region
		}
	}
	if c.AccessKey == "" {
		c.AccessKey, c.SecretKey = of.AccessKey, of.SecretKey
	}
	if c.PartSize == 0 {
		c.PartSize = of.PartSize
	}
	return c
}

// BucketError says that a bucket cannot be secured in the way that was chosen.
type BucketError struct {
	Store string
	Err   error
	hints []string
}

func (e *BucketError) Error() string { return fmt.Sprintf("the blobs of store %s: %v", e.Store, e.Err) }
func (e *BucketError) Unwrap() error { return e.Err }

// Hints says what to do next.
func (e *BucketError) Hints() []string {
	var h interface{ Hints() []string }
	if len(e.hints) == 0 && errors.As(e.Err, &h) {
		return h.Hints()
	}
	return e.hints
}

// openBuckets makes ready what is needed to secure the buckets, and makes sure of the rights while the
// service still runs.
func (b *run) openBuckets(ctx context.Context) error {
	b.objects = map[string]*capture.Objects{}
	for i := range b.o.Instance.Stores {
		s := &b.o.Instance.Stores[i]
		if s.S3 == nil {
			continue
		}
		// What is copied into a replica, and what is found there, counts on nobody removing it.
		if err := b.o.Repo.Settled(ctx); err != nil {
			return err
		}
		o, err := b.openBucket(ctx, s)
		if o != nil {
			b.objects[s.Name] = o
		}
		if err != nil {
			var be *BucketError
			if ctx.Err() != nil || errors.As(err, &be) {
				return err
			}
			return &BucketError{Store: s.Name, Err: err}
		}
	}
	return nil
}

func (b *run) closeBuckets() {
	for _, o := range b.objects {
		o.Source.Close()
		if o.Replica != nil {
			o.Replica.Close()
		}
	}
}

func (b *run) openBucket(ctx context.Context, s *ocis.Store) (*capture.Objects, error) {
	opts := &b.o.Blobs
	fail := func(err error, hints ...string) error { return &BucketError{Store: s.Name, Err: err, hints: hints} }
	cfg := opts.BucketOf(s.S3)
	src, err := bucket.Open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	o := &capture.Objects{
		Way: opts.Way, Source: src, CountSpare: opts.CountSpare, KeepSpare: opts.KeepSpare, DryRun: b.o.DryRun,
	}
	if o.Way == "" {
		o.Way = snapshot.WayCopy
	}
	if err := allowed(ctx, src, bucket.ListBucket, bucket.GetObject); err != nil {
		return o, err
	}
	switch o.Way {
	case snapshot.WayCopy:
	case snapshot.WayReplica:
		if o.Replica, err = bucket.Open(ctx, opts.ReplicaOf(cfg)); err != nil {
			return o, fmt.Errorf("replica: %w", err)
		}
		if o.Replica.Same(src) {
			return o, fail(fmt.Errorf("the replica is the instance's own %s", src), "Name another bucket with --replica-bucket.")
		}
		if err := allowed(ctx, o.Replica, bucket.ListBucket, bucket.GetObject, bucket.PutObject); err != nil {
			return o, fmt.Errorf("replica: %w", err)
		}
		if !b.o.DryRun {
			m, err := replica.Join(ctx, o.Replica, b.o.Repo.ID(), b.o.Hostname)
			if err != nil {
				return o, fmt.Errorf("replica: %w", err)
			}
			b.replicas = append(b.replicas, m)
		}
	case snapshot.WayVersions:
		on, err := src.Versioning(ctx)
		if err != nil {
			return o, err
		}
		if !on {
			return o, fail(fmt.Errorf("%s keeps no versions, so none can be pinned", src),
				"Enable versioning for the bucket, or secure it with --blobs copy or --blobs replica.")
		}
		if o.Rules, err = src.Rules(ctx); err != nil {
			return o, fail(err, "Without the rules nothing tells whether pinned versions stay. The keys need the right to read them (s3:GetLifecycleConfiguration).")
		}
		if opts.LockFor > 0 {
			can, err := src.LockEnabled(ctx)
			if err != nil {
				return o, err
			}
			if !can {
				return o, fail(fmt.Errorf("%s has no object lock, so no version can be locked", src),
					"A bucket gets it when it is made. Leave --object-lock-days out, or secure the bucket in another way.")
			}
			o.LockUntil = b.start.Add(opts.LockFor)
		}
	default:
		return o, fmt.Errorf("there is no way %q to secure a bucket", o.Way)
	}
	return o, nil
}

// renewReplicas notes in the replicas that what this backup has copied belongs to a snapshot.
func (b *run) renewReplicas(ctx context.Context) {
	for _, m := range b.replicas {
		if err := m.Renew(ctx); err != nil {
			b.o.warn("what this backup has copied into the replica is not removed before the end of the next one: %v", err)
		}
	}
}

// allowed makes sure that the keys have the rights.
func allowed(ctx context.Context, b *bucket.Bucket, rights ...bucket.Right) error {
	for _, a := range b.CheckAccess(ctx, rights...) {
		if errors.Is(a.Err, s3.ErrAccessDenied) {
			return fmt.Errorf("the keys lack the right %s: %w", a.Right.Action(), a.Err)
		}
		if a.Err != nil {
			return a.Err
		}
	}
	return context.Cause(ctx)
}

// hasBucket reports whether the store with this root keeps its blobs in a bucket.
func (b *run) hasBucket(root string) bool {
	for i := range b.o.Instance.Stores {
		if s := &b.o.Instance.Stores[i]; s.S3 != nil && s.Root == root {
			return true
		}
	}
	return false
}

// distrustCache drops what the cache says of objects that the repository does not have, unless the
// snapshot that it is of is still there: with a snapshot that was forgotten, objects may have gone.
func (b *run) distrustCache() {
	for name, o := range b.objects {
		if o.Way != snapshot.WayCopy && b.cache != nil && (b.parent == nil || !b.cache.Knows(b.parent.ID())) {
			b.cache.DropStore(name)
		}
	}
}
