package freeze

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
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

// startInstance runs r with its retries and waits until the instance is ready. started is zero if
// no start took.
//
// Errors: ErrNotStarted.
func startInstance(ctx context.Context, r Recipe, run *Run) (started, ready time.Time, err error) {
	if r.Kind == KindNone {
		return time.Time{}, time.Time{}, nil
	}
	start := starters[r.Kind]
	if start == nil {
		return started, ready, fmt.Errorf("%w: this version of holdfast does not know the way %q; start it by hand", ErrNotStarted, r.Kind)
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
			return started, ready, fmt.Errorf("%w (tried %d times): %w; start it by hand and see its log", ErrNotStarted, try+1, err)
		}
		run.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "thaw",
			Message: fmt.Sprintf("the start of the instance failed, trying again in %s: %v", pause, err)})
		if !sleep(ctx, pause) {
			continue // ends above
		}
		pause = min(2*pause, 30*time.Second)
	}
	started = time.Now().UTC()
	if err := waitReady(ctx, r.Ready); err != nil {
		return started, ready, err
	}
	return started, time.Now().UTC(), nil
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

// errNotReady is wrapped in ErrNotStarted where the start took but the instance does not answer.
var errNotReady = errors.New("it was started but did not get ready")

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
			return fmt.Errorf("%w: %w within %s: %w; see the log of the server", ErrNotStarted, errNotReady, timeout, err)
		}
		pause = min(pause*3/2, 2*time.Second)
	}
}
