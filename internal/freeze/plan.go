package freeze

import (
	"context"
	"fmt"
	"sync"
	"time"

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
	paths := Paths(inst)
	return &Plan{
		Recipe: Recipe{Kind: KindNone, Paths: paths},
		Stop: func(ctx context.Context, run *Run) error {
			u, err := lookTwice(ctx, paths, run)
			if err != nil {
				return err
			}
			warn(run, u)
			return u.Err()
		},
	}, nil
}

func warn(run *Run, u Usage) {
	for _, l := range u.Limits {
		run.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "freeze", Message: l})
	}
}

// lookTwice proves that nothing holds paths, now and a moment later. It returns what it found first.
func lookTwice(ctx context.Context, paths []string, run *Run) (Usage, error) {
	u, err := Look(ctx, paths, run.Except...)
	if err != nil || len(u.Holders) > 0 {
		return u, err
	}
	if !sleep(ctx, settlePause) {
		return u, context.Cause(ctx)
	}
	return Look(ctx, paths, run.Except...)
}

// waitFree waits for the proof until deadline, and says once in a while what it waits for. more, if
// not nil, tells of a holder that has no files.
//
// Errors: *BusyError.
func waitFree(ctx context.Context, paths []string, more func() []Holder, deadline time.Time, timeout time.Duration, run *Run) error {
	pause := 10 * time.Millisecond
	said := time.Now()
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
		if time.Since(said) > 5*time.Second {
			said = time.Now()
			run.Progress.Emit(progress.Event{Kind: progress.Info, Phase: "freeze",
				Message: fmt.Sprintf("waiting for the instance to stop: %v", u.Err())})
		}
		if !sleep(ctx, min(pause, time.Until(deadline))) {
			return context.Cause(ctx)
		}
		pause = min(pause*3/2, 250*time.Millisecond)
	}
}

// freezePlain freezes without a guard.
func freezePlain(ctx context.Context, p Planner, inst *ocis.Instance, sink progress.Sink) (Frozen, error) {
	plan, err := p.Plan(ctx, inst)
	if err != nil {
		return nil, err
	}
	f := &frozen{recipe: plan.Recipe, run: &Run{Progress: sink}}
	f.record.Method = p.Method()
	f.record.Stopping = time.Now().UTC()
	if err := plan.Stop(ctx, f.run); err != nil {
		return nil, joinThaw(err, f.Thaw(context.WithoutCancel(ctx)))
	}
	f.record.Stopped = time.Now().UTC()
	return f, nil
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

	once sync.Once

	mu     sync.Mutex
	record Record // guarded by mu
}

// Thaw runs the recipe. All callers wait for the one that came first; they get nil.
func (f *frozen) Thaw(ctx context.Context) error {
	var err error
	f.once.Do(func() {
		var started, ready time.Time
		started, ready, err = startInstance(ctx, f.recipe, f.run)
		f.mu.Lock()
		f.record.Started, f.record.Ready = started, ready
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
