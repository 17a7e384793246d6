// Package freeze holds an instance still and lets it go again. A Freezer proves that nothing can
// write before it calls anything frozen, and its Thaw runs whatever happened in between.
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

// Holder is one sign that an instance is alive: a lock, or a process with open files.
type Holder struct {
	PID     int    // 0 if unknown, e.g. a process in another PID namespace
	Command string // "" if unknown
	Path    string // the locked or open file
	How     string // HowLock, HowOpen or HowMapped
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
		fmt.Fprintf(&b, "%s%s holds %s (%s)", sep, who, h.Path, h.How)
	}
	return b.String()
}

// Is makes errors.Is(err, ErrRunning) true.
func (e *BusyError) Is(target error) bool { return target == ErrRunning }

// Record tells how the instance was held still. Times are UTC.
type Record struct {
	Method   string    // none, command, ...
	Stopping time.Time // when it was told to stop
	Stopped  time.Time // when the proof was complete
	Started  time.Time
	Ready    time.Time
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
