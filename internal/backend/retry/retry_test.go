package retry_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/backendtest"
	"github.com/holdfast-backup/holdfast/internal/backend/fault"
	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/backend/retry"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

func noSleep(ctx context.Context, _ time.Duration) error { return ctx.Err() }

func TestLaws(t *testing.T) {
	backendtest.Run(t, func(*testing.T) backend.Backend { return retry.New(mem.New(), retry.Options{Sleep: noSleep}) })
}

// Every third call fails in some way, and the laws hold all the same, but for those
// where after a failure nobody can tell whether the file that is there, or gone, is the work of one's own first try.
func TestLawsOnABadLine(t *testing.T) {
	for _, e := range []fault.Effect{fault.Fail, fault.FailAfter} {
		t.Run(e.String(), func(t *testing.T) {
			backendtest.Run(t, func(*testing.T) backend.Backend {
				fb := fault.New(mem.New())
				for _, op := range []fault.Op{fault.Save, fault.Stat, fault.Remove, fault.Create} {
					for n := 1; n < 2000; n += 3 {
						fb.Add(fault.Fault{Op: op, N: n, Effect: e})
					}
				}
				return retry.New(fb, retry.Options{Sleep: noSleep})
			}, "NotExist", "Concurrent", "Exists", "Config")
		})
	}
}

func h(s string) backend.Handle {
	return backend.Handle{Type: backend.PackFile, Name: id.Hash([]byte(s)).String()}
}

func TestPermanentErrorsAreNotRetried(t *testing.T) {
	ctx := context.Background()
	fb := fault.New(mem.New(), fault.Fault{Op: fault.Save, Times: -1, Err: &backend.PermanentError{Err: errors.New("disk full")}})
	be := retry.New(fb, retry.Options{Sleep: noSleep})
	if err := be.Save(ctx, h("a"), []byte("a")); err == nil || fb.Count(fault.Save, 0) != 1 {
		t.Errorf("Save: %v after %d calls", err, fb.Count(fault.Save, 0))
	}
	if _, err := be.Stat(ctx, h("a")); !errors.Is(err, backend.ErrNotExist) || fb.Count(fault.Stat, 0) != 1 {
		t.Errorf("Stat: %v after %d calls", err, fb.Count(fault.Stat, 0))
	}
}

func TestGivesUp(t *testing.T) {
	fb := fault.New(mem.New(), fault.Fault{Op: fault.Stat, Times: -1})
	var waits []time.Duration
	be := retry.New(fb, retry.Options{Tries: 6, First: time.Second, Longest: 4 * time.Second,
		Sleep: func(_ context.Context, d time.Duration) error { waits = append(waits, d); return nil }})
	if _, err := be.Stat(context.Background(), h("a")); !errors.Is(err, fault.ErrFault) {
		t.Errorf("Stat: %v", err)
	}
	if n := fb.Count(fault.Stat, 0); n != 6 {
		t.Errorf("%d tries", n)
	}
	for i, mid := range []time.Duration{1, 2, 4, 4, 4} {
		mid *= time.Second
		if waits[i] < mid/2 || waits[i] > mid*3/2 {
			t.Errorf("wait %d is %v, not about %v", i, waits[i], mid)
		}
	}
}

func TestLostAnswerOfSave(t *testing.T) {
	ctx := context.Background()
	fb := fault.New(mem.New(), fault.Fault{Op: fault.Save, Effect: fault.FailAfter})
	be := retry.New(fb, retry.Options{Sleep: noSleep})
	if err := be.Save(ctx, h("a"), []byte("a")); err != nil {
		t.Errorf("Save: %v", err)
	}
	// Half a file under the final name is no success.
	fb = fault.New(mem.New(), fault.Fault{Op: fault.Save, Effect: fault.Short})
	be = retry.New(fb, retry.Options{Sleep: noSleep})
	if err := be.Save(ctx, h("abcd"), []byte("abcd")); !errors.Is(err, backend.ErrExist) {
		t.Errorf("Save over a half file: %v", err)
	}
}

func TestListDeliversOnce(t *testing.T) {
	ctx := context.Background()
	m := mem.New()
	for i := range 10 {
		s := fmt.Sprint(i)
		if err := m.Save(ctx, h(s), []byte(s)); err != nil {
			t.Fatal(err)
		}
	}
	fb := fault.New(m, fault.Fault{Op: fault.List, Effect: fault.Short}, fault.Fault{Op: fault.List, N: 2, Effect: fault.FailAfter})
	be := retry.New(fb, retry.Options{Sleep: noSleep})
	seen := map[string]int{}
	if err := be.List(ctx, backend.PackFile, func(fi backend.FileInfo) error { seen[fi.Name]++; return nil }); err != nil {
		t.Fatal(err)
	}
	if len(seen) != 10 {
		t.Errorf("%d names", len(seen))
	}
	for n, c := range seen {
		if c != 1 {
			t.Errorf("%s came %d times", n, c)
		}
	}
	if left := fb.Unfired(); len(left) > 0 {
		t.Errorf("not fired: %v", left)
	}
}

func TestContextEndsTheWait(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	fb := fault.New(mem.New(), fault.Fault{Op: fault.Save, Times: -1})
	start := time.Now()
	err := retry.New(fb, retry.Options{First: time.Hour, Longest: time.Hour}).Save(ctx, h("a"), []byte("a"))
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, fault.ErrFault) || time.Since(start) > 5*time.Second {
		t.Errorf("Save: %v after %v", err, time.Since(start))
	}
	// A hanging backend ends with the context too.
	ctx, cancel = context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	fb = fault.New(mem.New(), fault.Fault{Op: fault.Save, Effect: fault.Hang})
	if err := retry.New(fb, retry.Options{}).Save(ctx, h("a"), []byte("a")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hanging Save: %v", err)
	}
}
