package repo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
)

const (
	lockRefresh = 5 * time.Minute
	// lockLost is how long a lock is trusted without a refresh. Others may remove it after
	// lockStale; the difference makes up for clocks that differ and work that takes time to stop.
	lockLost  = 22*time.Minute + 30*time.Second
	lockStale = 30 * time.Minute
	// lockSettle is how long to wait before looking again for others that locked at the same moment.
	lockSettle = 200 * time.Millisecond
	// lockLooks is how often a shared lock looks for a rival to give way, which takes that one
	// as long as lockSettle.
	lockLooks = 5
	// lockRetry is the wait between the tries of RetryFor, and after a refresh that failed.
	lockRetry = 5 * time.Second
)

// LockInfo describes a lock file.
type LockInfo struct {
	ID        ID        `json:"id"`
	Time      time.Time `json:"time"`
	Exclusive bool      `json:"exclusive"`
	Hostname  string    `json:"hostname"`
	Username  string    `json:"username"`
	PID       int       `json:"pid"`
	// Stale: its holder is dead, or has not refreshed it for half an hour.
	Stale bool `json:"stale"`
	// Damaged says why the lock cannot be read; the fields above but ID are then zero.
	Damaged string `json:"damaged,omitempty"`
}

// lockFile is the JSON of a lock file.
type lockFile struct {
	Time      time.Time `json:"time"`
	Exclusive bool      `json:"exclusive"`
	Hostname  string    `json:"hostname"`
	Username  string    `json:"username"`
	PID       int       `json:"pid"`
	UID       uint32    `json:"uid,omitempty"`
	GID       uint32    `json:"gid,omitempty"`
}

// LockedError is returned by Lock when someone else holds a lock that excludes ours.
type LockedError struct {
	Exclusive bool // what was asked for
	Holder    LockInfo
	// Location of the repository.
	Location string
}

func (e *LockedError) Error() string {
	kind := "locked"
	if e.Holder.Exclusive {
		kind = "locked exclusively"
	}
	if e.Holder.Damaged != "" {
		return fmt.Sprintf("the repository at %s has the lock %s, which cannot be read (%s); if nobody else uses it, remove all locks with \"unlock --all\"",
			e.Location, e.Holder.ID.Short(), e.Holder.Damaged)
	}
	advice := "wait until it is done"
	if e.Holder.Stale {
		advice = "the holder seems to be dead: remove the lock with \"unlock\""
	}
	return fmt.Sprintf("the repository at %s is %s by process %d of %s on %s since %s; %s", e.Location, kind, e.Holder.PID,
		e.Holder.Username, e.Holder.Hostname, e.Holder.Time.Local().Format("2006-01-02 15:04:05"), advice)
}

// LockOptions of Repository.Lock.
type LockOptions struct {
	// Exclusive shuts out everyone else; otherwise only those who want an exclusive lock.
	Exclusive bool
	// RetryFor is how long to wait for others. Zero: not at all.
	RetryFor time.Duration
}

// ErrLockLost is the cause of the end of the context that Lock returns, when the lock could not be
// refreshed for so long that others may take it for dead.
var ErrLockLost = errors.New("the lock on the repository was lost: it could not be refreshed for 22 minutes")

// Lock is a lock that is held, and refreshed in the background.
type Lock struct {
	r      *Repository
	cancel context.CancelCauseFunc
	done   sync.WaitGroup
	hup    chan os.Signal

	once sync.Once
	err  error

	ctx     context.Context // what Lock has returned
	settled chan struct{}   // closed after the last look for others

	renew sync.Mutex // held while the lock file is replaced

	mu   sync.Mutex
	id   ID        // guarded by mu: the present lock file
	last time.Time // guarded by mu: when it was made
	old  []ID      // guarded by mu: earlier lock files that are still to be removed
	body lockFile
}

// Lock locks the repository. The context it returns is a child of ctx that ends when the lock is lost
// (its cause is then ErrLockLost, or a *LockedError) or given up: all work under the lock must use it.
//
// Others that lock at the same moment may come to light a little late, so everyone looks twice. An
// exclusive lock is held after the second look. Any other is held after the first; the second comes while the work goes on,
// and ends its context with a *LockedError. Until then work may read, at worst a file that is gone or
// an old index, and store packs, which are nothing by themselves. What makes them count waits for
// Settled of its own accord.
//
// While the lock is held, the process ignores SIGHUP as its end, because that is how restic looks
// whether a lock's holder is alive. Errors: *LockedError.
func (r *Repository) Lock(ctx context.Context, o LockOptions) (*Lock, context.Context, error) {
	start := r.clock.now()
	for {
		l, err := r.tryLock(ctx, o)
		if err == nil {
			lctx := l.run(ctx)
			if o.Exclusive {
				r.exclusive.Store(l)
			}
			r.held.Store(l)
			return l, lctx, nil
		}
		var le *LockedError
		if !errors.As(err, &le) || r.clock.now().Sub(start) >= o.RetryFor {
			return nil, nil, err
		}
		left := o.RetryFor - r.clock.now().Sub(start)
		if serr := r.clock.sleep(ctx, min(lockRetry, left)); serr != nil {
			return nil, nil, fmt.Errorf("wait for a lock: %w: %w", serr, err)
		}
	}
}

func (r *Repository) tryLock(ctx context.Context, o LockOptions) (*Lock, error) {
	if err := r.conflict(ctx, o.Exclusive, ID{}); err != nil {
		return nil, err
	}
	// From before the lock appears: a looker that finds it may ask at once whether we live.
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	l := &Lock{r: r, hup: hup, settled: make(chan struct{})}
	l.body = lockFile{Exclusive: o.Exclusive, PID: os.Getpid()}
	l.body.Username, l.body.Hostname = whoAmI()
	if uid, gid := os.Getuid(), os.Getgid(); uid > 0 && gid >= 0 {
		l.body.UID, l.body.GID = uint32(uid), uint32(gid)
	}
	err := l.save(ctx)
	if err == nil {
		if o.Exclusive {
			err = r.clock.sleep(ctx, lockSettle)
		}
		if err == nil {
			err = r.conflict(ctx, o.Exclusive, l.id)
		}
		if err != nil {
			if rerr := l.remove(ctx, l.id); rerr != nil {
				err = fmt.Errorf("%w; and our own lock could not be removed: %w", err, rerr)
			}
		}
	}
	if err != nil {
		signal.Stop(hup)
		return nil, err
	}
	return l, nil
}

// save writes a lock file with the present time.
func (l *Lock) save(ctx context.Context) error {
	now := l.r.clock.now().Round(0) // without the monotonic clock, which stands still in standby
	body := l.body
	body.Time = now
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	name, err := l.r.SaveUnpacked(ctx, backend.LockFile, text)
	if err != nil {
		return fmt.Errorf("lock the repository: %w", err)
	}
	l.mu.Lock()
	if !l.id.IsNull() {
		l.old = append(l.old, l.id)
	}
	l.id, l.last = name, now
	l.mu.Unlock()
	return nil
}

// removeOld deletes the files of earlier refreshes. What cannot be removed now is tried again at
// the next refresh and in Unlock, as it would block others.
func (l *Lock) removeOld(ctx context.Context) error {
	l.mu.Lock()
	old := l.old
	l.old = nil
	l.mu.Unlock()
	var left []ID
	var errs []error
	for _, d := range old {
		if err := l.remove(ctx, d); err != nil {
			left, errs = append(left, d), append(errs, err)
		}
	}
	l.mu.Lock()
	l.old = append(l.old, left...)
	l.mu.Unlock()
	return errors.Join(errs...)
}

// remove deletes one of our lock files although ctx may be done.
func (l *Lock) remove(ctx context.Context, name ID) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), l.r.unlockTime)
	defer cancel()
	err := l.r.RemoveUnpacked(ctx, backend.LockFile, name)
	if errors.Is(err, backend.ErrNotExist) {
		return nil // someone ran unlock
	}
	return err
}

// run starts the refreshing.
func (l *Lock) run(ctx context.Context) context.Context {
	lctx, cancel := context.WithCancelCause(ctx)
	l.ctx, l.cancel = lctx, cancel
	l.done.Add(2)
	go l.refresh(lctx)
	go l.watch(lctx)
	if l.body.Exclusive {
		close(l.settled)
	} else {
		own := l.id
		l.done.Go(func() { l.settle(lctx, own) })
	}
	return lctx
}

// settle is the second look of a lock that is not exclusive. Another one that wants to be alone and has locked at the
// same moment gives way when it sees us.
func (l *Lock) settle(ctx context.Context, own ID) {
	var err error
	for range lockLooks {
		if l.r.clock.sleep(ctx, lockSettle) != nil {
			return
		}
		var le *LockedError
		if err = l.r.conflict(ctx, false, own); !errors.As(err, &le) {
			break
		}
	}
	if err != nil {
		l.cancel(err) // without effect if the work is done
		return
	}
	close(l.settled)
}

// ErrPruned is returned when another program has removed from the repository what the index tells, in the
// moment in which the work began.
var ErrPruned = errors.New("another program changed the repository in the moment in which this one began, which has changed nothing: try again")

// Settled waits until the lock has looked twice for others, and makes sure that an index that was
// loaded before is still the present one. Whoever stops a service or
// changes something outside of the repository calls it first. Without a lock there is nothing to wait for.
// Errors: *LockedError, ErrPruned.
func (r *Repository) Settled(ctx context.Context) error {
	l := r.held.Load()
	if l == nil {
		return nil
	}
	select {
	case <-l.settled:
	case <-l.ctx.Done():
		return context.Cause(l.ctx)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	r.earlyMu.Lock()
	defer r.earlyMu.Unlock()
	if len(r.early) == 0 {
		return nil
	}
	now, err := r.indexFiles(ctx)
	if err != nil {
		return err
	}
	there := make(map[ID]bool, len(now))
	for _, d := range now {
		there[d] = true
	}
	for _, d := range r.early {
		if !there[d] {
			return fmt.Errorf("%w (the index file %s at %s is gone)", ErrPruned, d.Short(), r.be.Location())
		}
	}
	r.early = nil
	return nil
}

// settles reports whether our lock has a look at others before it.
func (r *Repository) settles() bool {
	l := r.held.Load()
	if l == nil {
		return false
	}
	select {
	case <-l.settled:
		return false
	default:
		return true
	}
}

func (l *Lock) refresh(ctx context.Context) {
	defer l.done.Done()
	wait := lockRefresh
	for l.r.clock.sleep(ctx, wait) == nil {
		// A hanging backend must not keep us from trying again.
		sctx, cancel := context.WithTimeout(ctx, lockRefresh)
		l.renew.Lock()
		err := l.save(sctx)
		cancel()
		wait = lockRetry
		if err == nil {
			wait = lockRefresh
			l.removeOld(ctx)
		}
		l.renew.Unlock()
	}
}

// watch ends the work when the lock has become too old, even while a refresh hangs.
func (l *Lock) watch(ctx context.Context) {
	defer l.done.Done()
	for l.r.clock.sleep(ctx, 10*time.Second) == nil {
		l.mu.Lock()
		age := l.r.clock.now().Round(0).Sub(l.last)
		l.mu.Unlock()
		if age >= lockLost {
			l.cancel(ErrLockLost)
			return
		}
	}
}

// Unlock gives the lock up and ends its context. It removes the lock file even if the context that was
// given to Lock is done. Further calls return the same.
func (l *Lock) Unlock() error {
	l.once.Do(func() {
		l.r.exclusive.CompareAndSwap(l, nil)
		l.r.held.CompareAndSwap(l, nil)
		l.cancel(context.Canceled)
		l.done.Wait()
		ctx := context.Background()
		if err := errors.Join(l.remove(ctx, l.id), l.removeOld(ctx)); err != nil {
			l.err = fmt.Errorf("remove our lock %s from the repository at %s: %w; remove it with \"unlock\"", l.id.Short(), l.r.be.Location(), err)
		}
		signal.Stop(l.hup)
	})
	return l.err
}

// ErrNotExclusive is returned by work that must be alone in the repository and is not.
var ErrNotExclusive = errors.New("the repository is not locked exclusively")

// ConfirmExclusive is for whoever removes something outside of the repository under its exclusive lock: it
// makes sure that nobody else can be at work in it. Errors: ErrNotExclusive, *LockedError.
func (r *Repository) ConfirmExclusive(ctx context.Context) error { return r.confirmExclusive(ctx) }

// confirmExclusive makes sure, before something is removed, that nobody else can be at work: our exclusive
// lock is still there, and no other one. "unlock --all" may have made it otherwise.
func (r *Repository) confirmExclusive(ctx context.Context) error {
	l := r.exclusive.Load()
	if l == nil {
		return ErrNotExclusive
	}
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	l.renew.Lock()
	defer l.renew.Unlock()
	list, err := r.Locks(ctx)
	if err != nil {
		return err
	}
	l.mu.Lock()
	own := append([]ID{l.id}, l.old...)
	l.mu.Unlock()
	held := false
	for _, i := range list {
		switch {
		case i.ID == own[0]:
			held = true
		case !slices.Contains(own, i.ID):
			return &LockedError{Exclusive: true, Holder: i, Location: r.be.Location()}
		}
	}
	if !held {
		return fmt.Errorf("%w any more: somebody removed our lock %s", ErrNotExclusive, own[0].Short())
	}
	return nil
}

// conflict returns a *LockedError if a lock other than own excludes ours.
func (r *Repository) conflict(ctx context.Context, exclusive bool, own ID) error {
	list, err := r.Locks(ctx)
	if err != nil {
		return err
	}
	for _, i := range list {
		if i.ID != own && (exclusive || i.Exclusive || i.Damaged != "") {
			return &LockedError{Exclusive: exclusive, Holder: i, Location: r.be.Location()}
		}
	}
	return nil
}

// Locks lists the locks of all programs. Empty lock files, which a crash can leave behind, do not
// count. Locks are never passed over because they look stale: see Unlock.
func (r *Repository) Locks(ctx context.Context) ([]LockInfo, error) {
	var names []ID
	err := r.ListFiles(ctx, backend.LockFile, func(d ID, size int64) error {
		if size > 0 {
			names = append(names, d)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	var list []LockInfo
	for _, name := range names {
		text, err := r.LoadUnpacked(ctx, backend.LockFile, name)
		if errors.Is(err, backend.ErrNotExist) {
			continue // given up or refreshed meanwhile
		}
		var de *damageError
		if err != nil && !errors.As(err, &de) {
			return nil, fmt.Errorf("read the locks: %w", err)
		}
		i := LockInfo{ID: name}
		var f lockFile
		if err == nil {
			err = json.Unmarshal(text, &f)
		}
		if err != nil {
			i.Damaged = err.Error() // it may be anybody's, so it counts as a lock
		} else {
			i.Time, i.Exclusive, i.Hostname, i.Username, i.PID = f.Time, f.Exclusive, f.Hostname, f.Username, f.PID
			i.Stale = r.stale(i)
		}
		list = append(list, i)
	}
	return list, nil
}

func (r *Repository) stale(i LockInfo) bool {
	if r.clock.now().Sub(i.Time) > lockStale {
		return true
	}
	_, host := whoAmI()
	return host != "" && i.Hostname == host && i.PID > 0 && i.PID != os.Getpid() && !processExists(i.PID)
}

// processExists tells whether a process of this machine is alive; if that cannot be found out, it is.
func processExists(pid int) bool {
	p, err := os.FindProcess(pid)
	if err != nil {
		return false
	}
	err = p.Signal(syscall.Signal(0))
	if errors.Is(err, os.ErrProcessDone) || errors.Is(err, syscall.ESRCH) {
		return false
	}
	// One that has ended stays until its parent asks for it, which the first process of many containers never does. The state
	// stands behind the name, which may hold anything: proc(5).
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	rest := stat[bytes.LastIndexByte(stat, ')')+1:]
	return !bytes.HasPrefix(rest, []byte(" Z")) && !bytes.HasPrefix(rest, []byte(" X"))
}

// Unlock removes stale locks, or all of them, and tells how many. All is for when the user knows that nobody
// works on the repository.
func (r *Repository) Unlock(ctx context.Context, all bool) (removed int, err error) {
	var names []ID
	if all {
		err = r.ListFiles(ctx, backend.LockFile, func(d ID, _ int64) error { names = append(names, d); return nil })
	} else {
		var list []LockInfo
		list, err = r.Locks(ctx)
		for _, i := range list {
			if i.Stale {
				names = append(names, i.ID)
			}
		}
	}
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		err := r.RemoveUnpacked(ctx, backend.LockFile, name)
		if err != nil && !errors.Is(err, backend.ErrNotExist) {
			return removed, fmt.Errorf("remove a lock: %w", err)
		}
		if err == nil {
			removed++
		}
	}
	return removed, nil
}
