package freeze

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
)

// Defaults of Options.
const (
	// DefaultMaxDowntime is when service comes before backup.
	DefaultMaxDowntime = 10 * time.Minute
	// DefaultHangTimeout is far beyond the pauses of a machine under load.
	DefaultHangTimeout = 30 * time.Second
)

// ErrGivenUp is returned (wrapped, with the reason) by Guarded when the freeze ended before the work
// was done: it ran out of time, or out of its guard. What was read while frozen is worth nothing.
var ErrGivenUp = errors.New("the backup was given up so that the instance runs")

// Options of Guarded. The zero value works.
type Options struct {
	// StateDir keeps the record of the freeze; "" is statedir.Default.
	StateDir string
	// MaxDowntime is when the backup is given up and the instance started; 0 is DefaultMaxDowntime.
	MaxDowntime time.Duration
	// HangTimeout is how long the backup may give no sign of life; 0 is DefaultHangTimeout.
	HangTimeout time.Duration
	Progress    progress.Sink
	// ReadOnly tells that the work changes nothing of the instance: it may begin while the proof that nothing runs is
	// still going on. Where that fails, the work is ended and its result lost.
	ReadOnly bool
	// Own are directories that the work writes to, which may lie inside the instance.
	Own []string
	// Observe, if not nil, gets the Record that Guarded is about to return.
	Observe func(Record)

	tuning *tuning // nil is defaultTuning
}

func (o Options) withDefaults() Options {
	o.MaxDowntime = cmp.Or(o.MaxDowntime, DefaultMaxDowntime)
	o.HangTimeout = cmp.Or(o.HangTimeout, DefaultHangTimeout)
	if o.tuning == nil {
		o.tuning = &defaultTuning
	}
	return o
}

// Guarded freezes inst, calls fn, and thaws exactly once, whatever happens: an error, a panic (which
// goes on after the thaw), a signal that cancels ctx, the death of this process. For the latter a
// guard process and a record on disk are made before anything is stopped; if they cannot be made,
// nothing is stopped. fn gets a context that ends when the freeze does; its work is then lost, and
// Guarded says so even if fn returns nil. After MaxDowntime the instance runs, whether fn has
// returned or not. A Freezer that is no Planner is used without guard and record.
//
// The Record is valid with every error.
//
// Errors: ErrNotStarted comes before all others (exit code 4); *InUseError if another Holdfast has
// the instance; *BusyError if it does not stop, or came back while it was frozen; ErrGivenUp; those
// of fn.
func Guarded(ctx context.Context, f Freezer, inst *ocis.Instance, o Options, fn func(context.Context) error) (rec Record, err error) {
	if o.Observe != nil {
		defer func() { o.Observe(rec) }()
	}
	p, ok := f.(Planner)
	if !ok {
		return unguarded(ctx, f, inst, fn)
	}
	s := &session{o: o.withDefaults(), method: f.Method(), workDone: make(chan struct{}), stopDone: make(chan struct{})}
	s.record.Method = s.method
	if err := s.lockAndRecover(ctx, f, inst); err != nil {
		return s.Record(), err
	}
	defer s.lock.release()
	if s.plan, err = p.Plan(ctx, inst); err != nil {
		return s.Record(), err
	}
	if err := markBefore(ctx, &s.plan.Recipe); err != nil {
		return s.Record(), err
	}
	s.run = &Run{Progress: s.o.Progress, Own: s.o.Own}
	ctx, s.cancel = context.WithCancelCause(ctx)
	defer s.cancel(nil)
	if err := ctx.Err(); err != nil {
		return s.Record(), err
	}
	if s.plan.Recipe.Kind != KindNone {
		if err := s.prepare(); err != nil {
			return s.Record(), err
		}
	}
	return s.hold(ctx, fn)
}

// unguarded is for freezers without a plan.
func unguarded(ctx context.Context, f Freezer, inst *ocis.Instance, fn func(context.Context) error) (rec Record, err error) {
	fz, err := f.Freeze(ctx, inst)
	if err != nil {
		return Record{Method: f.Method()}, err
	}
	defer func() {
		err = joinThaw(err, fz.Thaw(context.WithoutCancel(ctx)))
		rec = fz.Record()
	}()
	return rec, fn(ctx)
}

// session is one call of Guarded.
type session struct {
	o      Options
	method string
	base   string
	files  stateFiles // empty if there is no state directory, for method none
	lock   *instanceLock
	plan   *Plan
	run    *Run
	guard  *guardClient // nil for method none
	cancel context.CancelCauseFunc

	stopDone chan struct{} // closed when Stop has returned
	workDone chan struct{} // closed when fn has returned, or will not be called

	once    sync.Once // the thaw
	thawErr error     // valid after once

	mu      sync.Mutex
	record  Record        // guarded by mu, as are the following
	stopped bool          // the stop was proven
	armedAt time.Time     // when the stop began
	gone    error         // why the freeze ended early
	took    time.Duration // of the stop, 0 until it is proven
	runs    string        // as in outcome
}

// Record returns the times so far.
func (s *session) Record() Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.record
}

// lockAndRecover takes the instance for this process, and undoes a freeze that was left behind.
func (s *session) lockAndRecover(ctx context.Context, f Freezer, inst *ocis.Instance) error {
	var err error
	if s.base, err = basePath(inst); err != nil {
		return err
	}
	s.files, err = openState(s.o.StateDir, s.base)
	if err == nil {
		s.lock, err = lockInstance(s.files, s.base)
	}
	var inUse *InUseError
	if err != nil && s.method == KindNone && !errors.As(err, &inUse) {
		// Nothing will be stopped, so nothing needs a record.
		s.o.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "freeze", Message: err.Error()})
		s.files = stateFiles{}
		s.lock, err = lockInstance(s.files, s.base)
	}
	if err != nil {
		return err
	}
	if s.files.dir == "" {
		return nil
	}
	left, err := readState(s.files.record())
	if err == nil {
		if c, ok := f.(*Command); ok {
			// What the user says now is newer than what was written down then.
			var plan *Plan
			if plan, err = c.Plan(ctx, inst); err == nil {
				plan.Recipe.Before = left.Recipe.Before
				left.Recipe = plan.Recipe
			}
		}
		if err == nil {
			_, err = recoverLocked(ctx, s.files, left, s.o.Progress)
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.lock.release()
		return err
	}
	return nil
}

// prepare makes everything that the thaw will need, while nothing is stopped.
func (s *session) prepare() (err error) {
	stop, err := s.openFiles()
	if err != nil {
		return fmt.Errorf("the state directory cannot be used, so nothing was stopped: %w", err)
	}
	s.run.Inherit, s.run.Log = []*os.File{stop}, s.files.log()
	recipe := s.plan.Recipe
	s.guard, err = startGuard(guardConfig{
		Dir: Text(s.files.dir), Key: s.files.key, BasePath: Text(s.base), Recipe: recipe,
		MaxDowntime: s.o.MaxDowntime, HangTimeout: s.o.HangTimeout, Tuning: *s.o.tuning,
	}, s.lock, s.o.Progress)
	if err != nil {
		stop.Close()
		return err
	}
	s.run.Except = []int{s.guard.id.PID}
	owner, err := identify(os.Getpid())
	if err == nil {
		err = s.files.write(state{
			Version: stateVersion, BasePath: Text(s.base), Method: s.method, Since: time.Now().UTC(),
			MaxDowntime: s.o.MaxDowntime, Owner: owner, Guard: s.guard.id, Recipe: recipe,
			Disks: disksOf(append([]string{s.base}, recipe.Paths...)),
		})
	}
	if err != nil {
		s.guard.kill()
		stop.Close()
		_ = s.files.remove()
		return fmt.Errorf("the record of the freeze cannot be written, so nothing was stopped: %w", err)
	}
	if err := s.guard.arm(); err != nil {
		s.guard.kill()
		stop.Close()
		_ = s.files.remove()
		return err
	}
	return nil
}

// openFiles makes the log, and the stop lock, which stop commands inherit.
func (s *session) openFiles() (*os.File, error) {
	log := s.files.log()
	if st, err := os.Lstat(log); err == nil && st.Size() > 1<<20 {
		// Not truncated: a server may write to it.
		if err := os.Rename(log, log+".old"); err != nil {
			return nil, err
		}
	}
	l, err := openLog(log)
	if err != nil {
		return nil, err
	}
	l.Close()
	// A new file: somebody may still have the lock of an earlier one.
	if err := os.Remove(s.files.stop()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	f, err := os.OpenFile(s.files.stop(), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock(f, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// hold is the time from the stop to the start.
func (s *session) hold(ctx context.Context, fn func(context.Context) error) (rec Record, err error) {
	now := time.Now()
	s.mu.Lock()
	s.record.Stopping, s.armedAt = now.UTC(), now
	s.mu.Unlock()

	var watching sync.WaitGroup
	if s.guard != nil {
		watching.Go(func() { s.monitor(ctx) })
	}
	returned, worked := false, false
	defer func() {
		// Also on a panic, which goes on behind this.
		if !worked {
			close(s.workDone)
		}
		thawErr := s.thaw(ctx)
		watching.Wait()
		s.mu.Lock()
		gone, runs := s.gone, s.runs
		s.mu.Unlock()
		err = stillRuns(err, runs)
		if gone != nil {
			if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, ErrGivenUp) {
				err = gone
			} else {
				err = fmt.Errorf("%w (before that: %w)", gone, err)
			}
		}
		if thawErr != nil && !returned {
			s.o.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "thaw", Message: thawErr.Error()})
		}
		err = joinThaw(err, thawErr)
		rec = s.Record()
	}()

	err = s.stop(ctx)
	if err == nil {
		err = s.work(ctx, fn)
	}
	if err == nil {
		err = s.verify(ctx)
	}
	close(s.workDone)
	worked, returned = true, true
	return rec, err
}

// work calls fn, while the proof goes on if it does.
func (s *session) work(ctx context.Context, fn func(context.Context) error) error {
	if s.plan.Confirm == nil || !s.o.ReadOnly {
		return fn(ctx)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	confirmed := make(chan error, 1)
	go func() {
		err := s.plan.Confirm(ctx, s.run)
		if err != nil {
			cancel(err)
		}
		confirmed <- err
	}()
	defer cancel(nil)
	err := fn(ctx)
	if err != nil {
		cancel(err)
	}
	// The proof says more than what ended because of it.
	if busy := <-confirmed; err == nil || errors.As(busy, new(*BusyError)) {
		err = busy
	}
	return err
}

// stop stops the instance and proves it.
func (s *session) stop(ctx context.Context) error {
	defer close(s.stopDone)
	err := s.plan.Stop(ctx, s.run)
	if err == nil && s.plan.Confirm != nil && !s.o.ReadOnly {
		err = s.plan.Confirm(ctx, s.run)
	}
	for _, f := range s.run.Inherit {
		f.Close() // what still has it is a stop command that goes on
	}
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	now := time.Now()
	s.stopped, s.took = true, now.Sub(s.armedAt)
	s.record.Stopped = now.UTC()
	s.mu.Unlock()
	if s.guard != nil {
		_ = s.guard.wire.send(message{Kind: msgStopped})
	}
	return nil
}

// verify makes sure that nothing came back to life behind our back, such as a container that is
// always restarted. Readers do no harm now.
func (s *session) verify(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	u, err := Look(ctx, s.plan.Recipe.Paths, s.run.Except...)
	if err != nil {
		return err
	}
	var writers []Holder
	for _, h := range u.Holders {
		if h.Writing {
			writers = append(writers, h)
		}
	}
	if len(writers) > 0 {
		return fmt.Errorf("the instance was started by somebody while it was frozen, so the backup cannot be trusted: %w", &BusyError{Holders: writers})
	}
	return nil
}

// giveUp ends the work.
func (s *session) giveUp(reason string) {
	s.mu.Lock()
	if s.gone == nil {
		s.gone = fmt.Errorf("%w: %s", ErrGivenUp, reason)
	}
	err := s.gone
	s.mu.Unlock()
	s.cancel(err)
}

const reasonGuardDied = "the guard process died"

// monitor ends the freeze early where that must be. It returns when the work is done.
func (s *session) monitor(ctx context.Context) {
	// The guard's clock comes first; this one is for a guard that hangs.
	late := time.NewTimer(s.o.MaxDowntime + s.o.HangTimeout/2)
	defer late.Stop()
	select {
	case <-s.workDone:
	case reason := <-s.guard.givenUp:
		s.giveUp(reason)
	case <-s.guard.dead:
		select {
		case reason := <-s.guard.givenUp:
			s.giveUp(reason)
		default:
			s.giveUp(reasonGuardDied)
		}
		_ = s.thaw(ctx)
	case <-late.C:
		s.giveUp(fmt.Sprintf("the instance was down for longer than %s, and the guard process did nothing", s.o.MaxDowntime))
		_ = s.thaw(ctx)
	case <-ctx.Done():
		// Cancelled from above. If the work takes long to see it, the instance need not wait.
		select {
		case <-s.workDone:
		case <-s.guard.dead:
			_ = s.thaw(ctx)
		case <-time.After(s.o.tuning.Grace):
			_ = s.thaw(ctx)
		}
	}
}

// thaw starts the instance; all callers wait for the one that came first and get its result.
func (s *session) thaw(ctx context.Context) error {
	s.once.Do(func() {
		if s.guard != nil {
			s.thawErr = s.thawOnce(context.WithoutCancel(ctx))
		}
	})
	return s.thawErr
}

func (s *session) thawOnce(ctx context.Context) error {
	s.mu.Lock()
	stopped := s.stopped
	s.mu.Unlock()
	_ = s.guard.wire.send(message{Kind: msgThaw, Stopped: stopped})
	m, ok := s.guard.await(s.o.HangTimeout)
	if ok {
		// The guard's times are of the wall clock; for how long it took there is our own.
		now := time.Now()
		s.mu.Lock()
		total := now.Sub(s.armedAt)
		if m.Ready.IsZero() {
			total -= m.Since
		}
		s.record.setStarted(outcome{started: m.Started, ready: m.Ready, took: m.Took}, total, s.took)
		s.runs = m.Runs
		s.mu.Unlock()
	} else {
		s.guard.kill()
		<-s.guard.dead
	}
	select {
	case reason := <-s.guard.givenUp:
		s.giveUp(reason)
	default:
	}
	if !ok {
		return s.thawAlone(ctx)
	}
	if !m.Stays {
		select {
		case <-s.guard.exited:
		case <-time.After(s.o.HangTimeout):
			s.guard.kill()
		}
	}
	s.guard.close()
	if m.Error != "" {
		return &thawError{m.Error, m.NotReady}
	}
	return nil
}

// thawAlone does the work of a guard that is no more.
func (s *session) thawAlone(ctx context.Context) error {
	s.o.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "thaw",
		Message: "the guard process does not work any more; starting the instance without it"})
	select {
	case <-s.stopDone:
	case <-time.After(s.o.tuning.Grace):
	}
	s.mu.Lock()
	stopped := s.stopped
	patience := s.plan.Recipe.StopTimeout - time.Since(s.armedAt)
	s.mu.Unlock()
	if !stopped {
		awaitStop(ctx, s.files, s.plan.Recipe, patience, s.run)
	}
	began := time.Since(s.armedAt)
	o, err := startInstance(ctx, s.plan.Recipe, s.run)
	s.mu.Lock()
	s.record.setStarted(o, began+o.took, s.took)
	s.runs = o.runs
	s.mu.Unlock()
	if err != nil && !errors.Is(err, ErrNotReady) {
		_ = s.files.markReported() // it is said in any case; the record is for the next one
	}
	if err == nil || errors.Is(err, ErrNotReady) {
		if rerr := s.files.remove(); rerr != nil {
			s.o.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "thaw",
				Message: fmt.Sprintf("the instance was started, but the record of its freeze stays: %v; remove it", rerr)})
		}
	}
	return err
}

// thawError is an error of the guard.
type thawError struct {
	text     string
	notReady bool
}

func (e *thawError) Error() string { return e.text }

// Is makes errors.Is(err, ErrNotStarted) true, and that for ErrNotReady where it is one.
func (e *thawError) Is(target error) bool {
	return target == ErrNotStarted || e.notReady && target == ErrNotReady
}
