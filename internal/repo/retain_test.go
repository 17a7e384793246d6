package repo

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/limit"
	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/backend/retry"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

// lockable is a backend that can lock files.
type lockable struct {
	backend.Backend
	can   bool
	err   error
	mu    sync.Mutex
	until map[backend.Handle]time.Time
	asked int
}

func (l *lockable) CanRetain(context.Context) (bool, error) { return l.can, nil }

func (l *lockable) Retention(_ context.Context, h backend.Handle) (backend.Retention, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.asked++
	return backend.Retention{Until: l.until[h], Mode: "GOVERNANCE"}, nil
}

func (l *lockable) Retain(_ context.Context, h backend.Handle, until time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil && l.until[h].Before(until) {
		l.until[h] = until
	}
	return l.err
}

func TestLocksOfNeededFilesAreProlonged(t *testing.T) {
	ctx := t.Context()
	be := &lockable{Backend: mem.New(), until: map[backend.Handle]time.Time{}}
	r, err := Init(ctx, retry.New(limit.New(be, 2, nil), retry.Options{}), "pw", InitOptions{KDF: KDF{N: 1024, R: 1, P: 1}})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.LoadIndex(ctx); err != nil {
		t.Fatal(err)
	}
	save := func(text string) {
		t.Helper()
		w := r.NewWriter(ctx)
		if _, _, err := w.Save(ctx, DataBlob, []byte(text)); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(ctx); err != nil {
			t.Fatal(err)
		}
	}
	save("one")
	day := 24 * time.Hour
	if _, _, err := r.Retain(ctx, day, nil, nil); !errors.Is(err, ErrNoRetention) {
		t.Errorf("a place that cannot lock: %v", err)
	}
	be.can = true
	// A pack that no index names is nobody's.
	stray := backend.Handle{Type: backend.PackFile, Name: id.Hash([]byte("stray")).String()}
	if err := be.Save(ctx, stray, []byte("stray")); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	r.clock.now = func() time.Time { return now }
	known, n, err := r.Retain(ctx, 10*day, nil, nil)
	if err != nil || n != 4 || len(known) != 4 { // config, key, index, pack
		t.Fatalf("%d renewed, %v, %v", n, known, err)
	}
	for h, u := range be.until {
		if u.Before(now.Add(10*day)) || u.After(now.Add(11*day)) {
			t.Errorf("%v is locked for %v", h, u.Sub(now))
		}
	}
	if _, ok := be.until[stray]; ok {
		t.Error("a pack that nothing names was locked")
	}
	// What is known is not asked for, as long as it is good enough; what is new is.
	save("two")
	be.asked, now = 0, now.Add(day/2)
	known, n, err = r.Retain(ctx, 10*day, known, nil)
	if err != nil || n != 2 || be.asked != 2 || len(known) != 6 {
		t.Errorf("half a day later: %d renewed, %d asked, %d known, %v", n, be.asked, len(known), err)
	}
	// After a tenth of the time everything is renewed.
	now = now.Add(2 * day)
	if known, n, err = r.Retain(ctx, 10*day, known, nil); err != nil || n != 6 {
		t.Errorf("two days later: %d renewed, %v", n, err)
	}
	for h, u := range be.until {
		if u.Before(now.Add(10 * day)) {
			t.Errorf("%v is locked for %v", h, u.Sub(now))
		}
	}
	// What is forgotten is asked for, and is good.
	be.asked = 0
	if _, n, err = r.Retain(ctx, 10*day, nil, nil); err != nil || n != 0 || be.asked != 6 {
		t.Errorf("without what is known: %d renewed, %d asked, %v", n, be.asked, err)
	}
	list, err := r.Retentions(ctx, nil)
	if err != nil || len(list) != 4 {
		t.Fatalf("%+v, %v", list, err)
	}
	be.until[stray] = now.Add(day)
	for _, x := range list {
		want := int64(1)
		if x.Type == backend.IndexFile || x.Type == backend.PackFile {
			want = 2
		}
		if x.Files != want || x.Locked != want || x.Modes["GOVERNANCE"] != want || x.First.Before(now.Add(10*day)) || x.Last.Before(x.First) {
			t.Errorf("%+v", x)
		}
	}
	now = now.Add(100 * day)
	if list, err = r.Retentions(ctx, nil); err != nil || list[0].Locked != 0 || !list[0].First.IsZero() {
		t.Errorf("after the locks ended: %+v, %v", list, err)
	}
	be.err = errors.New("no")
	if _, _, err = r.Retain(ctx, day, known, nil); !errors.Is(err, be.err) {
		t.Errorf("a lock that fails: %v", err)
	}
}
