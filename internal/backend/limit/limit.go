// Package limit keeps a repository's traffic within bounds: bytes a second, and operations at a time.
//
// Bandwidth is measured where the bytes go out, at the connections ([Rates.Conn]), so that an upload
// is spread evenly and not sent in bursts with pauses between them.
package limit

import (
	"context"
	"io"
	"net"

	"golang.org/x/time/rate"

	"github.com/holdfast-backup/holdfast/internal/backend"
)

// step is the most that goes at once, in bytes: at 10 KiB/s still less than two seconds' worth, so
// that several connections share the link fairly and none hangs for long.
const step = 16 << 10

// Rates are upper limits that all connections share. A nil *Rates limits nothing.
type Rates struct{ up, down *rate.Limiter }

// NewRates makes limits from KiB a second; zero is no limit.
func NewRates(up, down int) *Rates {
	if up <= 0 && down <= 0 {
		return nil
	}
	bucket := func(kib int) *rate.Limiter {
		if kib <= 0 {
			return nil
		}
		return rate.NewLimiter(rate.Limit(kib)*1024, step)
	}
	return &Rates{bucket(up), bucket(down)}
}

// reader waits after each read for what it has read, which slows the sender down in the end.
type reader struct {
	ctx context.Context
	r   io.Reader
	l   *rate.Limiter
}

func (r *reader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p[:min(len(p), step)])
	if n > 0 {
		if werr := r.l.WaitN(r.ctx, n); werr != nil && err == nil {
			err = werr
		}
	}
	return n, err
}

type writer struct {
	ctx context.Context
	w   io.Writer
	l   *rate.Limiter
}

func (w *writer) Write(p []byte) (n int, err error) {
	for len(p) > 0 && err == nil {
		k := min(len(p), step)
		if err = w.l.WaitN(w.ctx, k); err != nil {
			return n, err
		}
		var m int
		m, err = w.w.Write(p[:k])
		n += m
		p = p[m:]
	}
	return n, err
}

// Reader limits what comes through r as a download. ctx ends its waits.
func (r *Rates) Reader(ctx context.Context, rd io.Reader) io.Reader {
	if r == nil || r.down == nil {
		return rd
	}
	return &reader{ctx, rd, r.down}
}

// Writer limits what goes through w as an upload. ctx ends its waits.
func (r *Rates) Writer(ctx context.Context, w io.Writer) io.Writer {
	if r == nil || r.up == nil {
		return w
	}
	return &writer{ctx, w, r.up}
}

// conn is a connection with limits. Closing it ends all waits.
type conn struct {
	net.Conn
	r      io.Reader
	w      io.Writer
	cancel context.CancelFunc
}

func (c *conn) Read(p []byte) (int, error)  { return c.r.Read(p) }
func (c *conn) Write(p []byte) (int, error) { return c.w.Write(p) }
func (c *conn) Close() error                { c.cancel(); return c.Conn.Close() }

// Conn limits a connection.
func (r *Rates) Conn(c net.Conn) net.Conn {
	if r == nil {
		return c
	}
	ctx, cancel := context.WithCancel(context.Background())
	return &conn{c, r.Reader(ctx, c), r.Writer(ctx, c), cancel}
}

// Backend lets so many operations run at a time. Locks do not wait: a lock that is refreshed too late
// is lost.
type Backend struct {
	backend.Backend
	slots chan struct{}
	rates *Rates
}

var _ backend.Backend = (*Backend)(nil)

// Unwrap returns the backend that is wrapped.
func (b *Backend) Unwrap() backend.Backend { return b.Backend }

// New wraps be. rates is for backends without connections of their own, such as a directory; nil for others.
// Connections of zero or less is no limit.
func New(be backend.Backend, connections int, rates *Rates) *Backend {
	b := &Backend{Backend: be, rates: rates}
	if connections > 0 {
		b.slots = make(chan struct{}, connections)
	}
	return b
}

func (b *Backend) do(ctx context.Context, t backend.FileType, fn func() error) error {
	if b.slots == nil || t == backend.LockFile {
		return fn()
	}
	select {
	case b.slots <- struct{}{}:
		defer func() { <-b.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	return fn()
}

// Save saves within the limits.
func (b *Backend) Save(ctx context.Context, h backend.Handle, data []byte) error {
	return b.do(ctx, h.Type, func() error {
		if h.Type != backend.LockFile {
			if _, err := b.rates.Writer(ctx, io.Discard).Write(data); err != nil {
				return err
			}
		}
		return b.Backend.Save(ctx, h, data)
	})
}

// Load loads within the limits.
func (b *Backend) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	return b.do(ctx, h.Type, func() error {
		return b.Backend.Load(ctx, h, length, offset, func(r io.Reader) error { return fn(b.rates.Reader(ctx, r)) })
	})
}

// Stat stats within the limits.
func (b *Backend) Stat(ctx context.Context, h backend.Handle) (fi backend.FileInfo, err error) {
	err = b.do(ctx, h.Type, func() error {
		fi, err = b.Backend.Stat(ctx, h)
		return err
	})
	return fi, err
}

// Remove removes within the limits.
func (b *Backend) Remove(ctx context.Context, h backend.Handle) error {
	return b.do(ctx, h.Type, func() error { return b.Backend.Remove(ctx, h) })
}
