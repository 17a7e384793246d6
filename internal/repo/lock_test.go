package repo

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/fault"
	"github.com/holdfast-backup/holdfast/internal/backend/mem"
)

// fakeClock is a time that moves when the test says so.
type fakeClock struct {
	mu    sync.Mutex
	t     time.Time
	sleep map[chan struct{}]time.Time // who sleeps until when
}

func newFakeClock() *fakeClock {
	return &fakeClock{t: time.Unix(1_800_000_000, 0), sleep: map[chan struct{}]time.Time{}}
}

func (c *fakeClock) now() time.Time { c.mu.Lock(); defer c.mu.Unlock(); return c.t }

func (c *fakeClock) wait(ctx context.Context, d time.Duration) error {
	if d == lockSettle || ctx.Err() != nil {
		return ctx.Err()
	}
	wake := make(chan struct{})
	c.mu.Lock()
	c.sleep[wake] = c.t.Add(d)
	c.mu.Unlock()
	select {
	case <-wake:
		return nil
	case <-ctx.Done():
		c.mu.Lock()
		delete(c.sleep, wake)
		c.mu.Unlock()
		return context.Cause(ctx)
	}
}

// advance moves the time from one end of a sleep to the next, each time once n goroutines sleep.
func (c *fakeClock) advance(t *testing.T, d time.Duration, n int) {
	t.Helper()
	end := c.now().Add(d)
	for {
		c.settle(t, n)
		c.mu.Lock()
		if !c.t.Before(end) {
			c.mu.Unlock()
			return
		}
		c.t = end
		for _, e := range c.sleep {
			if e.Before(c.t) {
				c.t = e
			}
		}
		for wake, e := range c.sleep {
			if !e.After(c.t) {
				delete(c.sleep, wake)
				close(wake)
			}
		}
		c.mu.Unlock()
	}
}

func (c *fakeClock) settle(t *testing.T, n int) {
	t.Helper()
	for start := time.Now(); time.Since(start) < 10*time.Second; time.Sleep(20 * time.Microsecond) {
		c.mu.Lock()
		got := len(c.sleep)
		c.mu.Unlock()
		if got >= n {
			return
		}
	}
	t.Fatalf("%d goroutines never slept", n)
}

func locked(t *testing.T, be backend.Backend) (*Repository, *fakeClock) {
	t.Helper()
	r, err := Open(context.Background(), be, password, Options{})
	if err != nil {
		t.Fatal(err)
	}
	c := newFakeClock()
	r.clock = clock{c.now, c.wait}
	return r, c
}

func lockNames(t *testing.T, be backend.Backend) (names []string) {
	t.Helper()
	for _, h := range list(t, be) {
		if h.Type == backend.LockFile {
			names = append(names, h.Name)
		}
	}
	return names
}

func TestLockMatrix(t *testing.T) {
	ctx := context.Background()
	be := mem.New()
	initRepo(t, be, InitOptions{})
	a, _ := locked(t, be)
	b, _ := locked(t, be)
	for _, c := range []struct {
		first, second, ok bool
	}{{false, false, true}, {false, true, false}, {true, false, false}, {true, true, false}} {
		l, _, err := a.Lock(ctx, LockOptions{Exclusive: c.first})
		if err != nil {
			t.Fatal(err)
		}
		l2, _, err := b.Lock(ctx, LockOptions{Exclusive: c.second})
		if (err == nil) != c.ok {
			t.Errorf("%+v: %v", c, err)
		}
		var le *LockedError
		if err != nil && (!errors.As(err, &le) || le.Exclusive != c.second || le.Holder.Exclusive != c.first || le.Holder.PID != os.Getpid()) {
			t.Errorf("%+v: %v", c, err)
		}
		if err == nil {
			if err := l2.Unlock(); err != nil {
				t.Error(err)
			}
		}
		if n := lockNames(t, be); len(n) != 1 {
			t.Errorf("%+v: %d lock files", c, len(n))
		}
		if err := errors.Join(l.Unlock(), l.Unlock()); err != nil {
			t.Error(err)
		}
		if n := lockNames(t, be); len(n) != 0 {
			t.Errorf("%+v: %d lock files left", c, len(n))
		}
	}
}

func TestLockRefresh(t *testing.T) {
	be := mem.New()
	initRepo(t, be, InitOptions{})
	r, c := locked(t, be)
	l, ctx, err := r.Lock(context.Background(), LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	before := lockNames(t, be)
	c.advance(t, 5*time.Minute+5*time.Second, 2)
	after := lockNames(t, be)
	if len(before) != 1 || len(after) != 1 || before[0] == after[0] {
		t.Errorf("lock files %v became %v", before, after)
	}
	locks, err := r.Locks(context.Background())
	if err != nil || len(locks) != 1 || c.now().Sub(locks[0].Time) > 10*time.Second {
		t.Errorf("%+v, %v", locks, err)
	}
	c.advance(t, time.Hour, 2)
	if ctx.Err() != nil {
		t.Errorf("a lock that is refreshed was lost: %v", context.Cause(ctx))
	}
	if err := l.Unlock(); err != nil || ctx.Err() == nil {
		t.Errorf("Unlock: %v, context %v", err, ctx.Err())
	}
	if n := lockNames(t, be); len(n) != 0 {
		t.Errorf("left: %v", n)
	}
}

func TestLockLost(t *testing.T) {
	for _, effect := range []fault.Effect{fault.Fail, fault.Hang} {
		t.Run(effect.String(), func(t *testing.T) {
			m := mem.New()
			initRepo(t, m, InitOptions{})
			fb := fault.New(m, fault.Fault{Op: fault.Save, Type: backend.LockFile, N: 2, Times: -1, Effect: effect})
			r, c := locked(t, fb)
			l, ctx, err := r.Lock(context.Background(), LockOptions{})
			if err != nil {
				t.Fatal(err)
			}
			sleepers := 2
			if effect == fault.Hang {
				sleepers = 1
			}
			c.advance(t, 22*time.Minute+15*time.Second, sleepers)
			if ctx.Err() != nil {
				t.Error("given up too early")
			}
			c.advance(t, 40*time.Second, 0)
			select {
			case <-ctx.Done():
			case <-time.After(10 * time.Second):
				t.Fatal("the work goes on without a lock")
			}
			if !errors.Is(context.Cause(ctx), ErrLockLost) {
				t.Errorf("cause: %v", context.Cause(ctx))
			}
			if err := l.Unlock(); err != nil {
				t.Error(err)
			}
			if n := lockNames(t, m); len(n) != 0 {
				t.Errorf("left: %v", n)
			}
		})
	}
}

// A refresh that fails for a while is made up for.
func TestLockRefreshRecovers(t *testing.T) {
	m := mem.New()
	initRepo(t, m, InitOptions{})
	fb := fault.New(m, fault.Fault{Op: fault.Save, Type: backend.LockFile, N: 2, Times: 50}, fault.Fault{Op: fault.Remove, N: 1, Times: 1})
	r, c := locked(t, fb)
	l, ctx, err := r.Lock(context.Background(), LockOptions{Exclusive: true})
	if err != nil {
		t.Fatal(err)
	}
	c.advance(t, 40*time.Minute, 2)
	if ctx.Err() != nil {
		t.Errorf("lost: %v", context.Cause(ctx))
	}
	if err := l.Unlock(); err != nil {
		t.Error(err)
	}
	if n := lockNames(t, m); len(n) != 0 || len(fb.Unfired()) > 0 {
		t.Errorf("left: %v; not fired: %v", n, fb.Unfired())
	}
}

func TestUnlockAfterCancel(t *testing.T) {
	be := mem.New()
	initRepo(t, be, InitOptions{})
	r, _ := locked(t, be)
	ctx, cancel := context.WithCancel(context.Background())
	l, lctx, err := r.Lock(ctx, LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if lctx.Err() == nil {
		t.Error("the lock's context outlives its parent")
	}
	if err := l.Unlock(); err != nil || len(lockNames(t, be)) != 0 {
		t.Errorf("Unlock: %v, left %v", err, lockNames(t, be))
	}
}

func TestLockRetry(t *testing.T) {
	ctx := context.Background()
	be := mem.New()
	initRepo(t, be, InitOptions{})
	a, _ := locked(t, be)
	b, c := locked(t, be)
	l, _, err := a.Lock(ctx, LockOptions{Exclusive: true})
	if err != nil {
		t.Fatal(err)
	}
	type result struct {
		l   *Lock
		err error
	}
	done := make(chan result)
	try := func(d time.Duration) {
		l, _, err := b.Lock(ctx, LockOptions{RetryFor: d})
		done <- result{l, err}
	}
	go try(time.Minute)
	c.advance(t, 30*time.Second, 1)
	if err := l.Unlock(); err != nil {
		t.Fatal(err)
	}
	c.advance(t, 10*time.Second, 0)
	got := <-done
	if got.err != nil {
		t.Fatal(got.err)
	}
	defer got.l.Unlock()
	excl := &LockedError{}
	if _, _, err := a.Lock(ctx, LockOptions{Exclusive: true, RetryFor: 0}); !errors.As(err, &excl) {
		t.Errorf("without a wait: %v", err)
	}
	cctx, cancel := context.WithCancel(ctx)
	cancel()
	if _, _, err := b.Lock(cctx, LockOptions{Exclusive: true, RetryFor: time.Hour}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled wait: %v", err)
	}
}

func putLock(t *testing.T, r *Repository, f lockFile) ID {
	t.Helper()
	body, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	d, err := r.SaveUnpacked(context.Background(), backend.LockFile, body)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// deadPID returns the number of a process that has ended.
func deadPID(t *testing.T) int {
	t.Helper()
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid
}

func TestStaleLocks(t *testing.T) {
	ctx := context.Background()
	be := mem.New()
	initRepo(t, be, InitOptions{})
	r, c := locked(t, be)
	_, host := whoAmI()
	now := c.now()
	stale := map[ID]bool{
		putLock(t, r, lockFile{Time: now.Add(-31 * time.Minute), Hostname: "elsewhere", PID: 1}):    true,
		putLock(t, r, lockFile{Time: now.Add(-29 * time.Minute), Hostname: "elsewhere", PID: 1}):    false,
		putLock(t, r, lockFile{Time: now, Hostname: host, PID: deadPID(t)}):                         true,
		putLock(t, r, lockFile{Time: now, Hostname: host, PID: os.Getpid()}):                        false,
		putLock(t, r, lockFile{Time: now, Hostname: host, PID: os.Getppid()}):                       false,
		putLock(t, r, lockFile{Time: now, Hostname: "elsewhere", PID: deadPID(t)}):                  false,
		putLock(t, r, lockFile{Time: now.Add(100 * 365 * 24 * time.Hour), Hostname: "far away"}):    false,
		putLock(t, r, lockFile{Time: now.Add(-time.Hour), Hostname: host, PID: 1, Exclusive: true}): true,
	}
	be.Put(backend.Handle{Type: backend.LockFile, Name: strings.Repeat("0", 64)}, nil) // left by a crash
	locks, err := r.Locks(ctx)
	if err != nil || len(locks) != len(stale) {
		t.Fatalf("%d locks, %v", len(locks), err)
	}
	for _, l := range locks {
		if l.Stale != stale[l.ID] {
			t.Errorf("%+v", l)
		}
	}
	var le *LockedError
	if _, _, err := r.Lock(ctx, LockOptions{}); !errors.As(err, &le) || !le.Holder.Stale || !strings.Contains(err.Error(), "unlock") {
		t.Errorf("a stale lock was passed over: %v", err)
	}
	if n, err := r.Unlock(ctx, false); n != 3 || err != nil {
		t.Errorf("Unlock removed %d, %v", n, err)
	}
	l, _, err := r.Lock(ctx, LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Unlock(); err != nil {
		t.Error(err)
	}
	if n, err := r.Unlock(ctx, true); n != 6 || err != nil {
		t.Errorf("Unlock of all removed %d, %v", n, err)
	}
}

// A lock that cannot be read may be anybody's.
func TestUnreadableLock(t *testing.T) {
	ctx := context.Background()
	be := mem.New()
	initRepo(t, be, InitOptions{})
	r, _ := locked(t, be)
	be.Put(backend.Handle{Type: backend.LockFile, Name: strings.Repeat("1", 64)}, []byte("junk"))
	var le *LockedError
	if _, _, err := r.Lock(ctx, LockOptions{}); !errors.As(err, &le) || le.Holder.Damaged == "" || !strings.Contains(err.Error(), "--all") {
		t.Errorf("Lock: %v", err)
	}
	if n, err := r.Unlock(ctx, false); n != 0 || err != nil {
		t.Errorf("Unlock removed %d, %v", n, err)
	}
	if n, err := r.Unlock(ctx, true); n != 1 || err != nil {
		t.Errorf("Unlock of all removed %d, %v", n, err)
	}
}

// Two that lock at the same moment see each other at the second look.
func TestLockRace(t *testing.T) {
	ctx := context.Background()
	be := mem.New()
	initRepo(t, be, InitOptions{})
	r, c := locked(t, be)
	var rival ID
	r.clock.sleep = func(ctx context.Context, d time.Duration) error {
		if d == lockSettle {
			rival = putLock(t, r, lockFile{Time: c.now(), Hostname: "rival", PID: 7, Exclusive: true})
			return nil
		}
		return c.wait(ctx, d)
	}
	var le *LockedError
	if _, _, err := r.Lock(ctx, LockOptions{Exclusive: true}); !errors.As(err, &le) || le.Holder.ID != rival {
		t.Errorf("Lock: %v", err)
	}
	if n := lockNames(t, be); len(n) != 1 || n[0] != rival.String() {
		t.Errorf("locks left: %v", n)
	}
}

// settling makes each later look of r wait for a signal.
func settling(r *Repository, c *fakeClock) (look chan struct{}) {
	look = make(chan struct{})
	r.clock.sleep = func(ctx context.Context, d time.Duration) error {
		if d != lockSettle {
			return c.wait(ctx, d)
		}
		select {
		case <-look:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return look
}

// A lock that is not exclusive is held before the second look, which ends the work.
func TestLockSettles(t *testing.T) {
	ctx := context.Background()
	be := mem.New()
	initRepo(t, be, InitOptions{})
	r, c := locked(t, be)
	exclusive := func() ID {
		return putLock(t, r, lockFile{Time: c.now(), Hostname: "rival", PID: 7, Exclusive: true})
	}
	look := settling(r, c)
	l, lctx, err := r.Lock(ctx, LockOptions{})
	if err != nil || lctx.Err() != nil {
		t.Fatal(err)
	}
	// Nothing that counts is stored or removed meanwhile.
	before := len(list(t, be))
	stored := make(chan error, 2)
	go func() {
		_, err := r.SaveUnpacked(lctx, backend.SnapshotFile, []byte("{}"))
		stored <- err
	}()
	go func() { stored <- r.RemoveUnpacked(lctx, backend.IndexFile, ID{}) }()
	time.Sleep(20 * time.Millisecond)
	if n := len(list(t, be)); n != before {
		t.Errorf("%d files, not %d: something was stored before the second look", n, before)
	}
	late := exclusive()
	for range lockLooks {
		look <- struct{}{}
	}
	<-lctx.Done()
	var le *LockedError
	if err := context.Cause(lctx); !errors.As(err, &le) || le.Holder.ID != late {
		t.Errorf("the end of the work: %v", err)
	}
	for range 2 {
		if err := <-stored; !errors.As(err, &le) {
			t.Errorf("storing under a lock that did not settle: %v", err)
		}
	}
	if err := r.Settled(ctx); !errors.As(err, &le) {
		t.Errorf("settled: %v", err)
	}
	if err := l.Unlock(); err != nil {
		t.Error(err)
	}
	if n := lockNames(t, be); len(n) != 1 {
		t.Errorf("locks left: %v", n)
	}
	if _, _, err := r.Lock(ctx, LockOptions{}); !errors.As(err, &le) {
		t.Errorf("beside an exclusive lock: %v", err)
	}
	if _, err := r.Unlock(ctx, true); err != nil {
		t.Fatal(err)
	}

	// The rival locks between the first look and our own lock.
	rival := &rivalBackend{Backend: be, before: func() { late = exclusive() }}
	r.be = rival
	if _, _, err := r.Lock(ctx, LockOptions{}); !errors.As(err, &le) || le.Holder.ID != late {
		t.Errorf("beside one that locks at the same moment: %v", err)
	}
	if n := lockNames(t, be); len(n) != 1 || n[0] != late.String() {
		t.Errorf("locks left: %v", n)
	}
	// Whoever is alone in it by right waits all the same, and an end before the later look is no error.
	r.be = be
	if _, err := r.Unlock(ctx, true); err != nil {
		t.Fatal(err)
	}
	if l, _, err = r.Lock(ctx, LockOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := l.Unlock(); err != nil {
		t.Error(err)
	}
	wctx, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if _, _, err := r.Lock(wctx, LockOptions{Exclusive: true}); err == nil {
		t.Error("an exclusive lock without the wait")
	}
	if err := r.Settled(ctx); err != nil {
		t.Errorf("without a lock: %v", err)
	}
}

// A rival that gives way ends nothing, unless it has changed the index that we have read by then.
func TestLockRivalGivesWay(t *testing.T) {
	ctx := context.Background()
	be := mem.New()
	initRepo(t, be, InitOptions{})
	r, c := locked(t, be)
	w := r.NewWriter(ctx)
	if _, _, err := w.Save(ctx, DataBlob, []byte("one")); err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	look := settling(r, c)
	try := func(between func()) error {
		t.Helper()
		l, lctx, err := r.Lock(ctx, LockOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Unlock()
		if err := r.LoadIndex(lctx); err != nil {
			t.Fatal(err)
		}
		rival := putLock(t, r, lockFile{Time: c.now(), Hostname: "rival", PID: 7, Exclusive: true})
		look <- struct{}{}
		look <- struct{}{} // it has seen the rival, and sleeps again
		between()
		if err := r.RemoveUnpacked(ctx, backend.LockFile, rival); err != nil {
			t.Fatal(err)
		}
		select {
		case look <- struct{}{}:
		case <-l.settled:
		}
		_, err = r.SaveUnpacked(lctx, backend.SnapshotFile, []byte("{}"))
		return err
	}
	if err := try(func() {}); err != nil {
		t.Errorf("a rival that gave way: %v", err)
	}
	// One that we could not see in time, and that could not see us, has pruned.
	err := try(func() {
		for _, h := range list(t, be) {
			if h.Type == backend.IndexFile {
				if err := be.Remove(ctx, h); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
	if !errors.Is(err, ErrPruned) {
		t.Errorf("a rival that has pruned: %v", err)
	}
	if n := lockNames(t, be); len(n) != 0 {
		t.Errorf("locks left: %v", n)
	}
}

// rivalBackend lets another one lock right before we do.
type rivalBackend struct {
	backend.Backend
	before func()
}

func (b *rivalBackend) Save(ctx context.Context, h backend.Handle, data []byte) error {
	if before := b.before; before != nil {
		b.before = nil
		before()
	}
	return b.Backend.Save(ctx, h, data)
}

// restic asks with SIGHUP whether a lock's holder lives.
func TestHangupDoesNotKill(t *testing.T) {
	be := mem.New()
	initRepo(t, be, InitOptions{})
	r, _ := locked(t, be)
	l, _, err := r.Lock(context.Background(), LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(50 * time.Millisecond)
	if err := l.Unlock(); err != nil {
		t.Error(err)
	}
}

// The lock of a process that was killed is stale although its parent never asked how it ended.
func TestZombieHoldsNoLock(t *testing.T) {
	if !processExists(os.Getpid()) {
		t.Error("this process is taken for dead")
	}
	c := exec.Command("sleep", "1000")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Wait() }() // not before: until then it is a zombie
	if !processExists(c.Process.Pid) {
		t.Error("a living process is taken for dead")
	}
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(30 * time.Second); processExists(c.Process.Pid); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a zombie is taken for alive")
		}
	}
}
