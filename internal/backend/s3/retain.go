package s3

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/s3"
)

var _ backend.Retainer = (*Backend)(nil)

// retainTries is how often questions about locks are asked: the wrapper that tries again does not know them.
const retainTries = 4

func (b *Backend) again(ctx context.Context, fn func() error) error {
	for try := 1; ; try++ {
		err := fn()
		var pe *backend.PermanentError
		if err == nil || try == retainTries || ctx.Err() != nil || errors.As(err, &pe) || errors.Is(err, backend.ErrNotExist) {
			return err
		}
		select {
		case <-time.After(time.Duration(try*try) * 200 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// CanRetain reports whether the bucket has Object Lock.
func (b *Backend) CanRetain(ctx context.Context) (bool, error) {
	var state string
	err := b.again(ctx, func() error {
		var err error
		state, _, _, _, err = b.core.GetObjectLockConfig(ctx, b.o.Bucket)
		var r minio.ErrorResponse
		if errors.As(err, &r) && (r.Code == "ObjectLockConfigurationNotFoundError" || r.Code == "MethodNotAllowed") {
			return nil
		}
		if err = b.explain("ask for the object lock", backend.Handle{}, "", err); errors.Is(err, s3.ErrUnsupported) {
			return nil
		}
		return err
	})
	return state == "Enabled", err
}

// Retention asks for the retention of the present version of a file.
func (b *Backend) Retention(ctx context.Context, h backend.Handle) (out backend.Retention, err error) {
	if err := b.check(ctx, "ask for the lock of", h); err != nil {
		return out, err
	}
	key := b.key(h)
	err = b.again(ctx, func() error {
		info, err := b.core.StatObject(ctx, b.o.Bucket, key, minio.StatObjectOptions{})
		if err == nil {
			mode, until := s3.Retention(&info)
			out = backend.Retention{Until: until, Mode: string(mode)}
		}
		return b.explain("ask for the lock of", h, key, err)
	})
	return out, err
}

// Retain locks a file until then, in the mode that it has or that was chosen.
func (b *Backend) Retain(ctx context.Context, h backend.Handle, until time.Time) error {
	have, err := b.Retention(ctx, h)
	if err != nil || !have.Until.Before(until) {
		return err
	}
	mode := minio.Governance
	if b.o.LockCompliance || have.Mode == string(minio.Compliance) { // it can be made longer, but not be weakened
		mode = minio.Compliance
	}
	key := b.key(h)
	return b.again(ctx, func() error {
		return b.explain("lock", h, key, b.core.PutObjectRetention(ctx, b.o.Bucket, key, minio.PutObjectRetentionOptions{Mode: &mode, RetainUntilDate: &until}))
	})
}

// lockedError says until when a file that was to be removed is locked.
type lockedError struct {
	h    backend.Handle
	have backend.Retention
	err  error
}

func (e *lockedError) Error() string {
	return fmt.Sprintf("remove %v: it is locked until %s (Object Lock, %s)", e.h, e.have.Until.Local().Format(time.DateTime), e.have.Mode)
}
func (e *lockedError) Unwrap() error { return e.err }

// Hints says what to do next.
func (e *lockedError) Hints() []string {
	return []string{"Until then nobody can remove it. Run the same command again after that; nothing that is needed was touched."}
}

// locked adds to the refusal of a removal until when it holds.
func (b *Backend) locked(ctx context.Context, h backend.Handle, err error) error {
	if err == nil || !errors.Is(err, s3.ErrLocked) && !errors.Is(err, s3.ErrAccessDenied) {
		return err
	}
	have, rerr := b.Retention(ctx, h)
	if rerr != nil || have.Until.Before(time.Now()) {
		return err
	}
	return &lockedError{h, have, err}
}
