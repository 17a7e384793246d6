// Package retry repeats operations of a backend that failed for a passing reason.
package retry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
)

// Options of New; the zero value works.
type Options struct {
	// Tries is how often an operation is tried in all. Zero: 10, which with the default waits
	// outlasts a server's restart (about four minutes).
	Tries int
	// First and Longest are the wait after the first failure, doubled each time, and its upper
	// limit. Zero: 0.5 s and one minute. Each wait is spread over 50 to 150 % of that, so that
	// many clients do not come back in step.
	First, Longest time.Duration
	// Sleep waits for d or until ctx is done. Nil: with a timer.
	Sleep func(ctx context.Context, d time.Duration) error
	// Report is told of each failure that will be tried again. May be nil.
	Report func(op string, h backend.Handle, err error, wait time.Duration)
}

// Backend is a backend that tries again.
type Backend struct {
	backend.Backend
	o Options
}

var _ backend.Backend = (*Backend)(nil)

// Unwrap returns the backend that is wrapped.
func (b *Backend) Unwrap() backend.Backend { return b.Backend }

// New wraps be.
func New(be backend.Backend, o Options) *Backend {
	if o.Tries <= 0 {
		o.Tries = 10
	}
	if o.First <= 0 {
		o.First = 500 * time.Millisecond
	}
	if o.Longest <= 0 {
		o.Longest = time.Minute
	}
	if o.Sleep == nil {
		o.Sleep = sleep
	}
	return &Backend{be, o}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// stop wraps an error that comes from the caller's own function, to end the tries.
type stop struct{ error }

func (b *Backend) do(ctx context.Context, op string, h backend.Handle, fn func(try int) error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s %v: %w", op, h, err)
	}
	wait := b.o.First
	for try := 1; ; try++ {
		err := fn(try)
		if err == nil {
			return nil
		}
		var st stop
		if errors.As(err, &st) {
			return st.error
		}
		var pe *backend.PermanentError
		if errors.Is(err, backend.ErrNotExist) || errors.Is(err, backend.ErrExist) || errors.As(err, &pe) {
			return err
		}
		// Nothing more may change after the caller has given up.
		if ctx.Err() != nil {
			return err
		}
		if try == b.o.Tries {
			return fmt.Errorf("%w (gave up after %d tries)", err, try)
		}
		d := time.Duration(float64(wait) * (0.5 + rand.Float64()))
		if b.o.Report != nil {
			b.o.Report(op, h, err, d)
		}
		if serr := b.o.Sleep(ctx, d); serr != nil {
			return fmt.Errorf("%w, while waiting to try again: %w", serr, err)
		}
		wait = min(2*wait, b.o.Longest)
	}
}

// Save tries to save. A try may have stored the file although its answer was lost: if the name
// exists at a later try with the right size, that counts as success, as names tell contents.
func (b *Backend) Save(ctx context.Context, h backend.Handle, data []byte) error {
	return b.do(ctx, "save", h, func(try int) error {
		err := b.Backend.Save(ctx, h, data)
		if try == 1 || !errors.Is(err, backend.ErrExist) {
			return err
		}
		fi, serr := b.Backend.Stat(ctx, h)
		switch {
		case serr != nil && !errors.Is(serr, backend.ErrNotExist):
			return fmt.Errorf("save %v: look at what an earlier try left: %w", h, serr)
		case serr != nil:
			return fmt.Errorf("save %v: exists, and exists not", h) // gone again: try once more
		case fi.Size != int64(len(data)):
			return fmt.Errorf("save %v: an earlier try left %d of %d bytes: %w", h, fi.Size, len(data), err)
		}
		if h.Type == backend.ConfigFile {
			// Its name tells nothing: the file may be another program's.
			return b.Backend.Load(ctx, h, 0, 0, func(r io.Reader) error {
				got, rerr := io.ReadAll(r)
				if rerr == nil && !bytes.Equal(got, data) {
					rerr = err
				}
				return rerr
			})
		}
		return nil
	})
}

// Load tries to load. An error of fn counts as a failure too, since it may come from damaged
// bytes; fn can end the tries with a *backend.PermanentError.
func (b *Backend) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	return b.do(ctx, "load", h, func(int) error { return b.Backend.Load(ctx, h, length, offset, fn) })
}

// Stat tries to stat.
func (b *Backend) Stat(ctx context.Context, h backend.Handle) (fi backend.FileInfo, err error) {
	err = b.do(ctx, "stat", h, func(int) error {
		fi, err = b.Backend.Stat(ctx, h)
		return err
	})
	return fi, err
}

// List tries to list; a name is handed to fn only once. An error of fn ends it.
func (b *Backend) List(ctx context.Context, t backend.FileType, fn func(backend.FileInfo) error) error {
	seen := map[string]struct{}{}
	return b.do(ctx, "list", backend.Handle{Type: t}, func(int) error {
		return b.Backend.List(ctx, t, func(fi backend.FileInfo) error {
			if _, ok := seen[fi.Name]; ok {
				return nil
			}
			seen[fi.Name] = struct{}{}
			if err := fn(fi); err != nil {
				return stop{err}
			}
			return nil
		})
	})
}

// Remove tries to remove. A file that is gone at a later try was removed by an earlier one.
func (b *Backend) Remove(ctx context.Context, h backend.Handle) error {
	return b.do(ctx, "remove", h, func(try int) error {
		err := b.Backend.Remove(ctx, h)
		if try > 1 && errors.Is(err, backend.ErrNotExist) {
			return nil
		}
		return err
	})
}

// Create tries to create.
func (b *Backend) Create(ctx context.Context) error {
	return b.do(ctx, "create", backend.Handle{}, func(int) error { return b.Backend.Create(ctx) })
}
