package freeze

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/holdfast-backup/holdfast/internal/progress"
)

// The kinds of recipe that are known without Register.
const (
	KindNone    = "none" // nothing was stopped, nothing is to be started
	KindCommand = "command"
	KindProcess = "process"
)

// Recipe says how to start an instance again, as data: the same recipe is run by the backup, by its
// guard and, after a power cut, by whoever comes next. Running it for an instance that runs does no
// harm. It may hold secrets (the environment) and is kept only in files of mode 0600.
type Recipe struct {
	Kind    string          `json:"kind"`
	Command *CommandRecipe  `json:"command,omitempty"`
	Process *ProcessRecipe  `json:"process,omitempty"`
	Other   json.RawMessage `json:"other,omitempty"` // of registered kinds
	// Paths are the data of the instance. Kinds without a test of their own are taken to be ready
	// when Ready says so.
	Paths Texts `json:"paths,omitempty"`
	Ready Ready `json:"ready"`
	// StopTimeout is how long the instance may take to stop after it was told to.
	StopTimeout time.Duration `json:"stop_timeout"`
	// Retries is how often a failed start is tried again.
	Retries int `json:"retries"`
	// Backoff is the pause before the first retry; it doubles up to 30 s.
	Backoff time.Duration `json:"backoff"`
	// Before are the processes that had the data in use before the stop.
	Before []Seen `json:"before,omitempty"`
}

// Seen is a process that had data of an instance open for writing.
type Seen struct {
	Process identity `json:"process"` // zero if it could not be told
	Locks   Texts    `json:"locks"`
}

// Ready says when a started instance counts as up. The zero value is satisfied by the start alone.
type Ready struct {
	Command Text  `json:"command,omitempty"` // run by sh until it exits with 0
	Dir     Text  `json:"dir,omitempty"`     // of Command
	Env     Texts `json:"env,omitempty"`     // of Command
	// URL is asked until it answers with a status below 400; the certificate is not looked at.
	URL     string        `json:"url,omitempty"`
	Timeout time.Duration `json:"timeout"` // 0 is DefaultReadyTimeout
}

// Defaults of the options, with their reasons.
const (
	// DefaultStopTimeout is more than twice the 25 s the product gives its services.
	DefaultStopTimeout = 60 * time.Second
	// DefaultReadyTimeout leaves room for index migrations at the start.
	DefaultReadyTimeout = 2 * time.Minute
	// DefaultStartRetries covers a port or a lock that is not free at once.
	DefaultStartRetries = 3
	// DefaultBackoff makes 1, 2 and 4 s of the default retries.
	DefaultBackoff = time.Second
)

// Starter runs the recipes of one kind. It returns once the start was given and took; readiness is
// looked after by the caller. It must not start a second server where one runs.
type Starter func(ctx context.Context, r Recipe, run *Run) error

// Run is what stopping and starting go by besides their recipe.
type Run struct {
	// Log takes the output of commands; "" throws it away.
	Log string
	// Inherit are handed to stop commands as descriptors 3 and up; who has them is still stopping.
	Inherit []*os.File
	// Except are processes of Holdfast itself, which do not count as holders.
	Except []int
	// Own are directories that Holdfast itself writes to meanwhile; they may lie inside the instance.
	Own []string
	// Progress may be nil.
	Progress progress.Sink
}

var starters = map[string]Starter{
	KindCommand: startCommand,
	KindProcess: startProcess,
}

// Register makes another kind of recipe known. It must be called before MaybeGuard, in every
// process, because guards and later runs need it as well.
func Register(kind string, s Starter) { starters[kind] = s }

// outcome tells how a start went.
type outcome struct {
	started time.Time     // when the start took, zero if none did
	ready   time.Time     // zero if it is not known to be ready
	took    time.Duration // from the beginning of the start to being ready, or started
	runs    string        // the process because of which nothing was started: it never stopped
}

// startInstance runs r with its retries and waits until the instance is ready. It starts nothing by
// command if what ran before the stop still runs: not all commands bear that.
//
// Errors: ErrNotStarted, and ErrNotReady with it.
func startInstance(ctx context.Context, r Recipe, run *Run) (o outcome, err error) {
	if r.Kind == KindNone {
		return o, nil
	}
	if r.Kind == KindCommand {
		if who, ok := runsAsBefore(ctx, r, run); ok {
			run.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "thaw",
				Message: fmt.Sprintf("the start command was not run: %s still runs as before the stop", who)})
			return outcome{runs: who}, nil
		}
	}
	begin := time.Now()
	start := starters[r.Kind]
	if start == nil {
		return o, fmt.Errorf("%w: this version of holdfast does not know the way %q; start it by hand", ErrNotStarted, r.Kind)
	}
	pause := r.Backoff
	if pause <= 0 {
		pause = DefaultBackoff
	}
	for try := 0; ; try++ {
		if err = start(ctx, r, run); err == nil {
			break
		}
		if ctx.Err() != nil || try >= r.Retries {
			return o, fmt.Errorf("%w (tried %d times): %w; start it by hand and see its log", ErrNotStarted, try+1, err)
		}
		run.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "thaw",
			Message: fmt.Sprintf("the start of the instance failed, trying again in %s: %v", pause, err)})
		if !sleep(ctx, pause) {
			continue // ends above
		}
		pause = min(2*pause, 30*time.Second)
	}
	now := time.Now()
	o.started, o.took = now.UTC(), now.Sub(begin)
	if err := waitReady(ctx, r.Ready); err != nil {
		return o, err
	}
	now = time.Now()
	o.ready, o.took = now.UTC(), now.Sub(begin)
	return o, nil
}

// markBefore notes in r who uses the data now, before the stop.
//
// Errors: those of Look.
func markBefore(ctx context.Context, r *Recipe, except ...int) error {
	if r.Kind == KindNone {
		return nil
	}
	u, err := Look(ctx, r.Paths, except...)
	if err != nil {
		return err
	}
	r.Before = nil
	at := map[int]int{}
	for _, h := range u.Holders {
		if !h.Writing {
			continue
		}
		i, ok := at[h.PID]
		if !ok {
			seen := Seen{}
			if h.PID != 0 {
				if seen.Process, err = identify(h.PID); err != nil {
					continue // it has ended
				}
			}
			i = len(r.Before)
			at[h.PID] = i
			r.Before = append(r.Before, seen)
		}
		if h.How == HowLock {
			r.Before[i].Locks = append(r.Before[i].Locks, h.Path)
		}
	}
	return nil
}

// runsAsBefore tells whether all the processes of r.Before live and have their locks, and names one.
func runsAsBefore(ctx context.Context, r Recipe, run *Run) (who string, ok bool) {
	if len(r.Before) == 0 {
		return "", false
	}
	for _, b := range r.Before {
		if b.Process.PID != 0 && !b.Process.alive() {
			return "", false
		}
	}
	u, err := Look(ctx, r.Paths, run.Except...)
	if err != nil {
		return "", false
	}
	for _, b := range r.Before {
		for _, path := range b.Locks {
			i := slices.IndexFunc(u.Holders, func(h Holder) bool {
				return h.How == HowLock && h.PID == b.Process.PID && h.Path == path
			})
			if i < 0 {
				return "", false
			}
		}
	}
	for _, h := range u.Holders {
		for _, b := range r.Before {
			if h.Writing && h.PID == b.Process.PID {
				return h.who(), true
			}
		}
	}
	return "", false
}

// alreadyRuns tells whether an instance that is on record as stopped runs, and by what that is seen:
// somebody may have started it by hand. fresh leaves out what ran before the stop, which may be about
// to end.
func alreadyRuns(ctx context.Context, r Recipe, run *Run, fresh bool) (sign string, ok bool) {
	u, err := Look(ctx, r.Paths, run.Except...)
	writers := 0
	if err == nil {
		for _, h := range u.Holders {
			if !h.Writing || fresh && slices.ContainsFunc(r.Before, func(b Seen) bool { return b.Process.PID == h.PID && (h.PID == 0 || b.Process.alive()) }) {
				continue
			}
			if h.How == HowLock || h.PID != 0 && isServer(h.PID) {
				return h.who() + " holds " + h.Path, true
			}
			writers++
		}
	}
	// Where the server was seen by its files before the stop, an answer without any is not from it.
	if fresh || r.Ready.Command == "" && r.Ready.URL == "" || len(r.Before) > 0 && writers == 0 {
		return "", false
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if askReady(ctx, r.Ready) != nil {
		return "", false
	}
	return "it answers as ready", true
}

// sleep waits for d. It returns false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// notReadyError is both ErrNotReady and ErrNotStarted.
type notReadyError struct {
	timeout time.Duration
	err     error // of the last try
}

func (e *notReadyError) Error() string {
	return fmt.Sprintf("%v within %s: %v; see the log of the server", ErrNotReady, e.timeout, e.err)
}

// Is makes errors.Is true for both.
func (e *notReadyError) Is(target error) bool {
	return target == ErrNotReady || target == ErrNotStarted
}

func (e *notReadyError) Unwrap() error { return e.err }

func waitReady(ctx context.Context, r Ready) error {
	if r.Command == "" && r.URL == "" {
		return nil
	}
	timeout := r.Timeout
	if timeout <= 0 {
		timeout = DefaultReadyTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	pause := 50 * time.Millisecond
	for {
		err := askReady(ctx, r)
		if err == nil {
			return nil
		}
		if !sleep(ctx, pause) {
			return &notReadyError{timeout, err}
		}
		pause = min(pause*3/2, 2*time.Second)
	}
}
