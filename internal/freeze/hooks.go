package freeze

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"time"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
)

// FreezePlain is Freezer.Freeze for those that are Planners: it plans, stops and, after an error,
// runs the recipe. Nothing guards it.
func FreezePlain(ctx context.Context, p Planner, inst *ocis.Instance, sink progress.Sink) (Frozen, error) {
	return freezePlain(ctx, p, inst, sink)
}

// WaitFree waits until paths are proven to be at rest, at the longest until deadline. timeout is what
// the user allowed for the whole stop, for the message. more, if not nil, tells of what still runs
// without having files open.
//
// Errors: *BusyError.
func WaitFree(ctx context.Context, paths []string, more func() []Holder, deadline time.Time, timeout time.Duration, run *Run) error {
	return waitFree(ctx, paths, more, deadline, timeout, run)
}

// AwaitUse is for the end of a Starter. It returns once somebody has files of r open for writing, or,
// where holds is false because nobody had before, once the server has lived for a second. An error of
// up says that the server ended, and is returned. After the time for readiness it warns and returns
// nil: the server may be at work on its data for its own reasons.
func AwaitUse(ctx context.Context, r Recipe, holds bool, up func(context.Context) error, run *Run) error {
	const settle = time.Second
	timeout := cmp.Or(r.Ready.Timeout, DefaultReadyTimeout)
	begin := time.Now()
	for {
		if holds {
			u, err := Look(ctx, r.Paths, run.Except...)
			if err != nil {
				return err
			}
			for _, h := range u.Holders {
				if h.Writing {
					return nil
				}
			}
		}
		if err := up(ctx); err != nil {
			return err
		}
		if !holds && time.Since(begin) > settle {
			return nil
		}
		if time.Since(begin) > timeout {
			run.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "thaw",
				Message: fmt.Sprintf("the server runs but has not opened its data within %s", timeout)})
			return nil
		}
		if !sleep(ctx, 50*time.Millisecond) {
			return context.Cause(ctx)
		}
	}
}

// NewReady makes the test of readiness from the options of a freezer: a command runs in the current
// directory, with what package userenv leaves of the environment of this process.
func NewReady(command, url string, timeout time.Duration) (Ready, error) {
	r := Ready{URL: url, Timeout: timeout}
	if command == "" {
		return r, nil
	}
	dir, err := os.Getwd()
	if err != nil {
		return r, fmt.Errorf("the directory to run the ready command in: %w", err)
	}
	r.Command, r.Dir, r.Env = Text(command), Text(dir), commandEnv()
	return r, nil
}
