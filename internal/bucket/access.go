package bucket

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/lifecycle"

	"github.com/holdfast-backup/holdfast/internal/s3"
)

// Right is one of those that the vendor's bucket policy gives.
type Right string

// The rights. A backup needs the first two, the server and a restore need all.
const (
	ListBucket   Right = "list"
	GetObject    Right = "get"
	PutObject    Right = "put"
	DeleteObject Right = "delete"
)

// Action is the name of the right in bucket policies.
func (r Right) Action() string {
	switch r {
	case ListBucket:
		return "s3:ListBucket"
	case GetObject:
		return "s3:GetObject"
	case PutObject:
		return "s3:PutObject"
	case DeleteObject:
		return "s3:DeleteObject"
	}
	return string(r)
}

// Access is the result of one test: Err is nil if the right is there. Untested says why it could not be
// tested without a trace.
type Access struct {
	Right    Right
	Err      error
	Untested string
}

// probeKey is no key of the product, and nobody else's.
func probeKey() string {
	var r [12]byte
	_, _ = rand.Read(r[:])
	return "holdfast-access-test-" + hex.EncodeToString(r[:])
}

// CheckAccess finds out which of the rights the keys have, and leaves nothing in the bucket: list asks for
// one key, get and delete name an object that is not there, put begins an upload in parts and gives it up.
func (b *Bucket) CheckAccess(ctx context.Context, rights ...Right) []Access {
	var out []Access
	key := probeKey()
	blind := false // without the right to list
	for _, r := range rights {
		a := Access{Right: r}
		switch r {
		case ListBucket:
			err := b.list(ctx, "", "", "", func(Object) error { return errStop })
			if !errors.Is(err, errStop) {
				a.Err = err
			}
			blind = errors.Is(err, s3.ErrAccessDenied)
		case GetObject:
			// Without the right to list, S3 does not say that a name is not there.
			_, err := b.Stat(ctx, key, "")
			switch {
			case err == nil, errors.Is(err, ErrNotFound):
			case blind && errors.Is(err, s3.ErrAccessDenied):
				a.Untested = "without the right to list, the server does not tell"
			default:
				a.Err = err
			}
		case PutObject:
			var id string
			err := b.again(ctx, func() (err error) {
				id, err = b.core.NewMultipartUpload(ctx, b.cfg.Bucket, key, minio.PutObjectOptions{})
				return err
			})
			if err == nil {
				err = b.abort(context.WithoutCancel(ctx), key, id)
			}
			a.Err = b.fail(ctx, "begin an upload", "", err)
		case DeleteObject:
			v, err := b.Versioning(ctx)
			if err == nil && v {
				a.Untested = "the bucket keeps versions, and the test would leave a marker"
				break
			}
			a.Err = b.Remove(ctx, key, "")
		}
		out = append(out, a)
		if ctx.Err() != nil {
			break
		}
	}
	return out
}

// abort gives an upload in parts up.
func (b *Bucket) abort(ctx context.Context, key, id string) error {
	err := b.again(ctx, func() error { return b.core.AbortMultipartUpload(ctx, b.cfg.Bucket, key, id) })
	var r minio.ErrorResponse
	if errors.As(err, &r) && r.Code == "NoSuchUpload" { // an earlier try did it, and its answer was lost
		return nil
	}
	return err
}

// Versioning reports whether the bucket keeps versions now.
func (b *Bucket) Versioning(ctx context.Context) (bool, error) {
	var v minio.BucketVersioningConfiguration
	err := b.again(ctx, func() (err error) {
		v, err = b.cl.GetBucketVersioning(ctx, b.cfg.Bucket)
		return err
	})
	if unsupported(err) {
		return false, nil
	}
	return v.Enabled(), b.fail(ctx, "ask for the versioning", "", err)
}

// unsupported reports whether the server does not know the request.
func unsupported(err error) bool {
	var r minio.ErrorResponse
	if !errors.As(err, &r) {
		return false
	}
	return r.StatusCode == http.StatusNotImplemented || r.Code == "NotImplemented" || r.Code == "VersioningNotConfigured" ||
		r.StatusCode == http.StatusMethodNotAllowed
}

// Rule is a rule of the bucket's life cycle that ends versions, or moves them out of reach.
type Rule struct {
	ID     string
	Prefix string
	// What it does, in words.
	What string
	// Ends is true if it expires objects, or versions of them.
	Ends bool
}

func (r Rule) String() string {
	s := fmt.Sprintf("rule %q", r.ID)
	if r.Prefix != "" {
		s += fmt.Sprintf(" (keys that begin with %q)", r.Prefix)
	}
	return s + " " + r.What
}

// Hits reports whether the rule concerns the object with this key.
func (r Rule) Hits(key string) bool { return strings.HasPrefix(key, r.Prefix) }

// Touches reports whether the rule can concern objects below one of the prefixes.
func (r Rule) Touches(prefix string) bool {
	return strings.HasPrefix(prefix, r.Prefix) || strings.HasPrefix(r.Prefix, prefix)
}

// Rules reads the rules of the bucket's life cycle that can concern objects without tags, as the
// product's are. A server that has no such thing has no rules.
func (b *Bucket) Rules(ctx context.Context) ([]Rule, error) {
	var c *lifecycle.Configuration
	err := b.again(ctx, func() (err error) {
		c, err = b.cl.GetBucketLifecycle(ctx, b.cfg.Bucket)
		return err
	})
	var r minio.ErrorResponse
	if errors.As(err, &r) && r.Code == "NoSuchLifecycleConfiguration" || unsupported(err) {
		return nil, nil
	}
	if err != nil {
		return nil, b.fail(ctx, "read the life cycle rules", "", err)
	}
	var out []Rule
	for i := range c.Rules {
		l := &c.Rules[i]
		if l.Status != "Enabled" {
			continue
		}
		f := &l.RuleFilter
		if f.Tag.Key != "" || len(f.And.Tags) > 0 {
			continue
		}
		prefix := l.Prefix
		for _, p := range []string{f.Prefix, f.And.Prefix} {
			if p != "" {
				prefix = p
			}
		}
		add := func(ends bool, format string, args ...any) {
			out = append(out, Rule{ID: l.ID, Prefix: prefix, What: fmt.Sprintf(format, args...), Ends: ends})
		}
		if n := l.NoncurrentVersionExpiration; n.NoncurrentDays > 0 || n.NewerNoncurrentVersions > 0 {
			add(true, "removes versions %d days after the object was deleted or replaced", n.NoncurrentDays)
		}
		if l.AllVersionsExpiration.Days > 0 || bool(l.Expiration.DeleteAll) {
			add(true, "removes all versions of an object")
		}
		if !l.Expiration.IsDaysNull() || !l.Expiration.IsDateNull() {
			// The version stays, and is not the current one any more: the server does not find it, and whatever
			// ends old versions ends it.
			add(true, "deletes objects by their age")
		}
		if l.Transition.StorageClass != "" || l.NoncurrentVersionTransition.StorageClass != "" {
			add(false, "moves objects to another storage class, from which a restore may be slow or impossible")
		}
	}
	return out, nil
}

// Lock keeps a version from being removed until a time. It never shortens what is set: S3 refuses that.
func (b *Bucket) Lock(ctx context.Context, key, version string, until time.Time) error {
	mode := minio.Governance
	err := b.again(ctx, func() error {
		info, err := b.cl.StatObject(ctx, b.cfg.Bucket, key, minio.StatObjectOptions{VersionID: version})
		if err == nil {
			m, old := s3.Retention(&info)
			if !old.Before(until) {
				return nil
			}
			if m == minio.Compliance {
				mode = m // it can be made longer, but not be weakened
			}
		}
		return b.cl.PutObjectRetention(ctx, b.cfg.Bucket, key, minio.PutObjectRetentionOptions{
			Mode: &mode, RetainUntilDate: &until, VersionID: version,
		})
	})
	err = b.fail(ctx, "lock object", key, err)
	if errors.Is(err, s3.ErrLocked) || errors.Is(err, s3.ErrAccessDenied) {
		// Perhaps it is locked for longer, and the server did not say so.
		if old, aerr := b.cl.AskRetention(ctx, b.cfg.Bucket, key, version); aerr == nil && !old.Before(until) {
			return nil
		}
	}
	return err
}

// LockEnabled reports whether versions in the bucket can be locked.
func (b *Bucket) LockEnabled(ctx context.Context) (bool, error) {
	var state string
	err := b.again(ctx, func() (err error) {
		state, _, _, _, err = b.cl.GetObjectLockConfig(ctx, b.cfg.Bucket)
		return err
	})
	var r minio.ErrorResponse
	if errors.As(err, &r) && r.Code == "ObjectLockConfigurationNotFoundError" || unsupported(err) {
		return false, nil
	}
	return state == "Enabled", b.fail(ctx, "ask for the object lock", "", err)
}
