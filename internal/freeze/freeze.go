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
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// ErrRunning is returned (wrapped in *BusyError) when the instance runs although it must not.
var ErrRunning = errors.New("the instance is running")

// ErrNotStarted is returned (wrapped) by Thaw when the instance could not be started again.
var ErrNotStarted = errors.New("the instance could not be started again")

// ErrNotReady is returned (wrapped, with ErrNotStarted) by Thaw when the start took, but the instance
// did not get ready in time. It runs, as far as anybody can tell.
var ErrNotReady = errors.New("the instance was started but did not get ready")

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
	list := mergeHolders(e.Holders)
	for i, h := range list {
		if i == 3 {
			fmt.Fprintf(&b, ", and %d more", len(list)-i)
			break
		}
		sep := ": "
		if i > 0 {
			sep = ", "
		}
		who, verb := h.who(), "holds"
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

// who names the process for messages.
func (h Holder) who() string {
	if h.PID == 0 {
		return "another process"
	}
	if h.Command == "" {
		return fmt.Sprintf("process %d", h.PID)
	}
	return fmt.Sprintf("process %d (%s)", h.PID, h.Command)
}

// mergeHolders makes one of the signs of one process on one file: How then lists them.
func mergeHolders(list []Holder) []Holder {
	type key struct {
		pid  int
		path string
	}
	at := map[key]int{}
	var out []Holder
	for _, h := range list {
		k := key{h.PID, h.Path}
		i, ok := at[k]
		if !ok {
			at[k] = len(out)
			out = append(out, h)
			continue
		}
		if !slices.Contains(strings.Split(out[i].How, ", "), h.How) {
			out[i].How += ", " + h.How
		}
		out[i].Writing = out[i].Writing || h.Writing
	}
	return out
}

// hintError is an error with a sentence on what to do next.
type hintError struct {
	error
	hint string
}

func (e *hintError) Unwrap() error { return e.error }

// Hints says what to do next.
func (e *hintError) Hints() []string { return []string{e.hint} }

// Is makes errors.Is(err, ErrRunning) true.
func (e *BusyError) Is(target error) bool { return target == ErrRunning }

// Record tells how the instance was held still. Times are UTC; what has not come yet is zero.
type Record struct {
	Method   string    // none, command, ...
	Stopping time.Time // when it was told to stop
	Stopped  time.Time // when the proof was complete
	Started  time.Time
	Ready    time.Time
	// Downtime is how long the instance was not available: from Stopping to Ready, or to Started if
	// it did not get ready. UntilReady is the same, but zero if it did not get ready. All that follow
	// count by a clock that nobody sets.
	Downtime   time.Duration
	UntilReady time.Duration
	// ForStop, ForHold and ForStart are the parts of Downtime: from Stopping to the proof, from there
	// to the beginning of the start, and from there to its end.
	ForStop  time.Duration
	ForHold  time.Duration
	ForStart time.Duration
}

// setStarted enters the end of a freeze. total is the time from the beginning of the stop to that of
// being ready, or to the start if it did not get ready; stop is that of the stop, 0 if it was not
// proven.
func (r *Record) setStarted(o outcome, total, stop time.Duration) {
	r.Started, r.Ready = o.started, o.ready
	if o.started.IsZero() {
		return
	}
	r.Downtime = total
	if !o.ready.IsZero() {
		r.UntilReady = total
	}
	r.ForStart = min(o.took, total)
	if stop <= 0 {
		r.ForStop = total - r.ForStart
		return
	}
	r.ForStop = min(stop, total-r.ForStart)
	r.ForHold = total - r.ForStart - r.ForStop
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
