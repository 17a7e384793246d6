package freeze

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
)

// Planner is a Freezer that knows how to start an instance before it stops it. Guarded asks for it,
// because the guard and the record must have the recipe first.
type Planner interface {
	Freezer
	// Plan changes nothing.
	Plan(ctx context.Context, inst *ocis.Instance) (*Plan, error)
}

// Plan is a freeze that has not begun.
type Plan struct {
	// Recipe undoes Stop, wherever Stop got to.
	Recipe Recipe
	// Stop stops the instance and proves it. After an error the recipe is run.
	//
	// Errors: *BusyError.
	Stop func(ctx context.Context, run *Run) error
	// Confirm, if not nil, ends the proof that Stop began. Work that only reads may go on meanwhile.
	//
	// Errors: *BusyError.
	Confirm func(ctx context.Context, run *Run) error
}

// settlePause lies between the two looks of a proof. A supervisor that brings a server back at once
// shows itself in it.
const settlePause = 100 * time.Millisecond

// None is the freezer for an instance that is stopped already.
type None struct{ Progress progress.Sink }

// Method returns "none".
func (None) Method() string { return KindNone }

// Freeze proves that nothing runs.
func (n None) Freeze(ctx context.Context, inst *ocis.Instance) (Frozen, error) {
	return freezePlain(ctx, n, inst, n.Progress)
}

// Plan has nothing to start.
func (n None) Plan(_ context.Context, inst *ocis.Instance) (*Plan, error) {
	var (
		paths  = Paths(inst)
		before map[string]fileMark // as Stop saw them
		tries  int
	)
	// A passer-by, such as an index of file names, is gone soon. A server is not.
	passing := func(ctx context.Context, u Usage) bool {
		tries++
		return len(u.Holders) > 0 && u.Holders[0].How != HowLock && tries <= 3 && sleep(ctx, 200*time.Millisecond)
	}
	return &Plan{
		Recipe: Recipe{Kind: KindNone, Paths: paths},
		Stop: func(ctx context.Context, run *Run) error {
			for {
				u, marks, err := look(ctx, paths, run)
				if err != nil {
					return err
				}
				if passing(ctx, u) {
					continue
				}
				before = marks
				warn(run, u)
				return u.Err()
			}
		},
		Confirm: func(ctx context.Context, run *Run) error {
			u, err := lookAgain(ctx, paths, run, before)
			for err == nil && passing(ctx, u) {
				u, err = lookTwice(ctx, paths, run)
			}
			if err != nil {
				return err
			}
			return u.Err()
		},
	}, nil
}

// KindViewOnly is the word for ViewOnly.
const KindViewOnly = "view-only"

// ViewOnly stops nothing and proves nothing: whoever uses it must read views that are of one instant,
// and say that these are what a power cut would leave.
type ViewOnly struct{}

// Method returns "view-only".
func (ViewOnly) Method() string { return KindViewOnly }

// Freeze does nothing. There is no Plan, because there is nothing to guard.
func (v ViewOnly) Freeze(context.Context, *ocis.Instance) (Frozen, error) { return v, nil }

// Thaw does nothing.
func (ViewOnly) Thaw(context.Context) error { return nil }

// Record has no times.
func (ViewOnly) Record() Record { return Record{Method: KindViewOnly} }

func warn(run *Run, u Usage) {
	for _, l := range u.Limits {
		run.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "freeze", Message: l})
	}
}

// lookTwice proves that nothing holds paths, now and a moment later, and that nothing changes in
// between. It returns what it found first.
func lookTwice(ctx context.Context, paths []string, run *Run) (Usage, error) {
	u, before, err := look(ctx, paths, run)
	if err != nil || len(u.Holders) > 0 {
		return u, err
	}
	return lookAgain(ctx, paths, run, before)
}

// look returns who holds paths; if nobody does, also what the files there look like.
func look(ctx context.Context, paths []string, run *Run) (Usage, map[string]fileMark, error) {
	u, err := Look(ctx, paths, run.Except...)
	u.Holders = slices.DeleteFunc(u.Holders, func(h Holder) bool { return !h.Writing && isHoldfast(h.PID) })
	if err != nil || len(u.Holders) > 0 {
		return u, nil, err
	}
	return u, fingerprint(paths, run.Own), nil
}

// lookAgain is the second look of lookTwice.
func lookAgain(ctx context.Context, paths []string, run *Run, before map[string]fileMark) (Usage, error) {
	if !sleep(ctx, settlePause) {
		return Usage{}, context.Cause(ctx)
	}
	u, after, err := look(ctx, paths, run)
	if err != nil || len(u.Holders) > 0 {
		return u, err
	}
	for path, mark := range after {
		if was, ok := before[path]; !ok || was != mark {
			u.Holders = append(u.Holders, Holder{Path: path, How: HowChanges, Writing: true})
			break // one is enough, there may be thousands
		}
	}
	return u, nil
}

// isHoldfast tells whether a process runs this very program: such as another backup of the instance,
// which reads as much as it can before it finds out that it must wait.
func isHoldfast(pid int) bool {
	ours, err := os.Stat("/proc/self/exe")
	if err != nil || pid <= 0 {
		return false
	}
	theirs, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid))
	return err == nil && os.SameFile(ours, theirs)
}

// fileMark changes with whatever is done to a file.
type fileMark struct {
	ino, size    int64
	mtime, ctime unix.Timespec
}

// fingerprint marks the files near the top of paths. A server without locks (some services alone,
// external directories) opens files for moments only; what it does shows here, if it is at work.
// What lies in own is left out.
func fingerprint(paths, own []string) map[string]fileMark {
	const (
		depth = 3
		limit = 4096 // some 10 ms of downtime
	)
	type inode struct{ dev, ino uint64 }
	passed := map[inode]bool{}
	for _, p := range own {
		var st unix.Stat_t
		if unix.Stat(p, &st) == nil { // it may be named through a link
			passed[inode{st.Dev, st.Ino}] = true
		}
	}
	marks := map[string]fileMark{}
	type dir struct {
		path  string
		depth int
	}
	var queue []dir
	for _, p := range paths {
		queue = append(queue, dir{p, 0})
	}
	for len(queue) > 0 && len(marks) < limit {
		d := queue[0]
		queue = queue[1:]
		var st unix.Stat_t
		if _, seen := marks[d.path]; seen || unix.Lstat(d.path, &st) != nil || passed[inode{st.Dev, st.Ino}] {
			continue
		}
		marks[d.path] = fileMark{int64(st.Ino), st.Size, st.Mtim, st.Ctim}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR || d.depth == depth {
			continue
		}
		f, err := os.Open(d.path)
		if err != nil {
			continue
		}
		names, _ := f.Readdirnames(limit)
		f.Close()
		slices.Sort(names) // the same ones the next time, where there are too many
		for _, n := range names {
			queue = append(queue, dir{filepath.Join(d.path, n), d.depth + 1})
		}
	}
	return marks
}

// waitFree waits for the proof until deadline, and says once in a while what it waits for. more, if
// not nil, tells of a holder that has no files.
//
// Errors: *BusyError.
func waitFree(ctx context.Context, paths []string, more func() []Holder, deadline time.Time, timeout time.Duration, run *Run) error {
	pause := 10 * time.Millisecond
	said := waitReport{begin: time.Now()}
	for {
		u, err := lookTwice(ctx, paths, run)
		if err != nil {
			return err
		}
		if more != nil && len(u.Holders) == 0 {
			u.Holders = more()
		}
		if len(u.Holders) == 0 {
			warn(run, u)
			return nil
		}
		if !time.Now().Before(deadline) {
			return fmt.Errorf("it did not stop within %s: %w", timeout, u.Err())
		}
		if text := said.next(time.Now(), u, timeout); text != "" {
			run.Progress.Emit(progress.Event{Kind: progress.Info, Phase: "freeze", Message: text})
		}
		if !sleep(ctx, min(pause, time.Until(deadline))) {
			return context.Cause(ctx)
		}
		pause = min(pause*3/2, 250*time.Millisecond)
	}
}

// waitReport says what a stop waits for: everything once, then only that it goes on.
type waitReport struct {
	begin time.Time
	last  time.Time // zero: nothing was said yet
}

// next returns what is to be said now, mostly nothing.
func (w *waitReport) next(now time.Time, u Usage, timeout time.Duration) string {
	const first, every = 5 * time.Second, 10 * time.Second
	switch {
	case w.last.IsZero() && now.Sub(w.begin) >= first:
		w.last = now
		return fmt.Sprintf("waiting for the instance to stop: %v", u.Err())
	case !w.last.IsZero() && now.Sub(w.last) >= every:
		w.last = now
		return fmt.Sprintf("still waiting for it to stop: %d s, at most %s", int(now.Sub(w.begin).Seconds()), timeout)
	}
	return ""
}

// freezePlain freezes without a guard.
func freezePlain(ctx context.Context, p Planner, inst *ocis.Instance, sink progress.Sink) (Frozen, error) {
	plan, err := p.Plan(ctx, inst)
	if err != nil {
		return nil, err
	}
	if err := markBefore(ctx, &plan.Recipe); err != nil {
		return nil, err
	}
	f := &frozen{recipe: plan.Recipe, run: &Run{Progress: sink}, begin: time.Now()}
	f.record.Method = p.Method()
	f.record.Stopping = f.begin.UTC()
	err = plan.Stop(ctx, f.run)
	if err == nil && plan.Confirm != nil {
		err = plan.Confirm(ctx, f.run)
	}
	if err != nil {
		thawErr := f.Thaw(context.WithoutCancel(ctx))
		return nil, joinThaw(stillRuns(err, f.runs), thawErr)
	}
	now := time.Now()
	f.record.Stopped, f.stopTook = now.UTC(), now.Sub(f.begin)
	return f, nil
}

// stillRuns adds to the error of a stop that nothing was started, because who still runs; "" is that
// it was.
func stillRuns(err error, who string) error {
	if err == nil || who == "" {
		return err
	}
	return fmt.Errorf("%w; nothing was started, because %s still runs", err, who)
}

// joinThaw puts the error of the thaw first: it is the one that needs a human at once.
func joinThaw(err, thawErr error) error {
	switch {
	case thawErr == nil:
		return err
	case err == nil:
		return thawErr
	}
	return fmt.Errorf("%w (before that: %w)", thawErr, err)
}

// frozen is what freezePlain returns.
type frozen struct {
	recipe Recipe
	run    *Run
	begin  time.Time

	stopTook time.Duration // 0 until the stop is proven
	runs     string        // as in outcome; valid after once

	once sync.Once

	mu     sync.Mutex
	record Record // guarded by mu
}

// Thaw runs the recipe. All callers wait for the one that came first; they get nil.
func (f *frozen) Thaw(ctx context.Context) error {
	var err error
	f.once.Do(func() {
		began := time.Since(f.begin)
		var o outcome
		o, err = startInstance(ctx, f.recipe, f.run)
		f.runs = o.runs
		f.mu.Lock()
		f.record.setStarted(o, began+o.took, f.stopTook)
		f.mu.Unlock()
	})
	return err
}

// Record tells the times.
func (f *frozen) Record() Record {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.record
}
