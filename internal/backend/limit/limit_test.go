package limit_test

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/backendtest"
	"github.com/holdfast-backup/holdfast/internal/backend/limit"
	"github.com/holdfast-backup/holdfast/internal/backend/mem"
)

func TestLaws(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) backend.Backend { return limit.New(mem.New(), 2, limit.NewRates(1<<20, 1<<20)) })
}

// 96 KiB at 128 KiB/s take at least half a second (the first 16 KiB are free), in both directions
// and however many connections share the limit.
func TestConn(t *testing.T) {
	const kib, total, conns = 128, 96 << 10, 3
	for _, up := range []bool{true, false} {
		r := limit.NewRates(0, kib)
		if up {
			r = limit.NewRates(kib, 0)
		}
		start := time.Now()
		var wg sync.WaitGroup
		for range conns {
			a, b := net.Pipe()
			wg.Go(func() {
				defer a.Close()
				w := net.Conn(a)
				if up {
					w = r.Conn(a)
				}
				if n, err := w.Write(make([]byte, total/conns)); n != total/conns || err != nil {
					t.Errorf("wrote %d, %v", n, err)
				}
			})
			wg.Go(func() {
				rd := net.Conn(b)
				if !up {
					rd = r.Conn(b)
				}
				if n, err := io.Copy(io.Discard, rd); n != total/conns || err != nil {
					t.Errorf("read %d, %v", n, err)
				}
			})
		}
		wg.Wait()
		if d := time.Since(start); d < 500*time.Millisecond {
			t.Errorf("up %v: only %v", up, d)
		}
	}
}

// Closing a connection ends its waits.
func TestClose(t *testing.T) {
	a, b := net.Pipe()
	go io.Copy(io.Discard, b)
	c := limit.NewRates(1, 0).Conn(a)
	time.AfterFunc(20*time.Millisecond, func() { c.Close() })
	if n, err := c.Write(make([]byte, 10<<20)); err == nil || n > 1<<20 {
		t.Errorf("wrote %d, %v", n, err)
	}
}

// slow counts how many loads run at a time.
type slow struct {
	backend.Backend
	now, most atomic.Int32
	hold      chan struct{}
}

func (s *slow) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	if h.Type == backend.LockFile {
		return nil
	}
	n := s.now.Add(1)
	for {
		m := s.most.Load()
		if n <= m || s.most.CompareAndSwap(m, n) {
			break
		}
	}
	<-s.hold
	s.now.Add(-1)
	return nil
}

func TestConnections(t *testing.T) {
	s := &slow{Backend: mem.New(), hold: make(chan struct{})}
	be := limit.New(s, 3, nil)
	ctx := context.Background()
	name := strings.Repeat("a", 64)
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			if err := be.Load(ctx, backend.Handle{Type: backend.PackFile, Name: name}, 0, 0, nil); err != nil {
				t.Error(err)
			}
		})
	}
	for s.now.Load() < 3 {
		time.Sleep(time.Millisecond)
	}
	// A lock does not wait for a place, and a context ends a wait.
	if err := be.Load(ctx, backend.Handle{Type: backend.LockFile, Name: name}, 0, 0, nil); err != nil {
		t.Error(err)
	}
	cctx, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if err := be.Remove(cctx, backend.Handle{Type: backend.PackFile, Name: name}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Remove: %v", err)
	}
	close(s.hold)
	wg.Wait()
	if m := s.most.Load(); m != 3 {
		t.Errorf("%d at a time", m)
	}
}
