// Package freeze holds an instance still and lets it go again. Start at Guarded, which is a whole
// freeze from the stop to the start; Look tells who uses an instance.
//
// A Freezer proves that nothing can write before it calls anything frozen. The instance runs again
// whatever happens in between:
//
//   - an error, a panic or a signal: Guarded thaws before it returns;
//   - the death of this process, a hang, or the end of the time allowed: a guard process, started
//     before the stop, has the recipe and starts the instance; the backup is then lost;
//   - the death of the guard: this process sees it at once, and starts the instance itself;
//   - the death of both, or of the machine: the record on disk, written before the stop, has the
//     recipe as well, and Recover runs it.
//
// Programs that freeze call MaybeGuard first thing in main.
package freeze

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// ErrRunning is returned (wrapped in *BusyError) when the instance runs although it must not.
var ErrRunning = errors.New("the instance is running")

// ErrNotStarted is returned (wrapped) by Thaw when the instance could not be started again.
var ErrNotStarted = errors.New("the instance could not be started again")

// BusyError names what still uses the data of an instance.
type BusyError struct {
	Holders []Holder
}

// Holder is one sign that an instance is alive, in most cases a lock or a process with open files.
type Holder struct {
	PID     int    // 0 if unknown, e.g. a process in another PID namespace
	Command string // "" if unknown
	Path    string // the locked or open file
	How     string // HowLock, HowOpen, ...
	Writing bool   // it could change the file: a lock, or open for writing
}

func (e *BusyError) Error() string {
	var b strings.Builder
	b.WriteString(ErrRunning.Error())
	for i, h := range e.Holders {
		if i == 3 {
			fmt.Fprintf(&b, ", and %d more", len(e.Holders)-i)
			break
		}
		sep := ": "
		if i > 0 {
			sep = ", "
		}
		who := "another process"
		if h.PID != 0 {
			who = fmt.Sprintf("process %d", h.PID)
			if h.Command != "" {
				who += " (" + h.Command + ")"
			}
		}
		verb := "holds"
		switch h.How {
		case HowChanges:
			who, verb = "something", "writes to"
		case HowRuns:
			verb = "serves"
		}
		fmt.Fprintf(&b, "%s%s %s %s (%s)", sep, who, verb, h.Path, h.How)
	}
	return b.String()
}

// Is makes errors.Is(err, ErrRunning) true.
func (e *BusyError) Is(target error) bool { return target == ErrRunning }

// Record tells how the instance was held still. Times are UTC; what has not come yet is zero.
type Record struct {
	Method   string    // none, command, ...
	Stopping time.Time // when it was told to stop
	Stopped  time.Time // when the proof was complete
	Started  time.Time
	Ready    time.Time
	// Downtime and UntilReady count from Stopping to Started and Ready by a clock that nobody sets.
	Downtime   time.Duration
	UntilReady time.Duration
}

// setStarted enters the end of a freeze that began at the instant begin.
func (r *Record) setStarted(begin, started, ready time.Time) {
	r.Started, r.Ready = started, ready
	if !started.IsZero() {
		r.Downtime = started.Sub(begin)
	}
	if !ready.IsZero() {
		r.UntilReady = ready.Sub(begin)
	}
}

// Freezer is one way to stop and start an instance.
type Freezer interface {
	// Method is the word of --freeze.
	Method() string
	// Freeze stops the writers of inst and returns once nothing can write below its data sets:
	// locks are free and no process has files open there. When it fails, nothing stays stopped.
	//
	// Nothing guards it if this process dies meanwhile: see Guarded.
	//
	// Errors: *BusyError if something still runs.
	Freeze(ctx context.Context, inst *ocis.Instance) (Frozen, error)
}

// Frozen is an instance held still. It must be thawed exactly once; further calls do nothing.
type Frozen interface {
	// Thaw starts the instance again and waits until it is ready. It does not look at the
	// cancellation of the backup: pass a context of its own.
	//
	// Errors: ErrNotStarted.
	Thaw(ctx context.Context) error
	// Record may be called at any time; times that have not come yet are zero.
	Record() Record
}
