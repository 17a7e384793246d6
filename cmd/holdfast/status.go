package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

func (a *app) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Tell whether an instance is frozen",
		Long: `Tell which instances are frozen: since when, by which process, whether that and its
guard live, and what to do. Nothing is changed.

` + exitHelp(exitDone, exitError, exitUsage),
		Args: args(0, 0, "no arguments"),
		RunE: a.verb(func(context.Context, []string) error { return a.status() }),
	}
}

// The states of a freeze that is on record.
const (
	stateHeld     = "held"     // a backup is at work
	stateStarting = "starting" // the backup or its guard died; the other one starts the instance
	stateLeft     = "left"     // both died: it waits for holdfast thaw
	stateUnknown  = "unknown"  // the record cannot be read
)

// frozen is one freeze as it is shown.
type frozen struct {
	Event       string     `json:"event"`
	State       string     `json:"state"`
	BasePath    string     `json:"base_path"`
	Raw         []byte     `json:"base_path_raw,omitempty"` // the bytes of a path that is no UTF-8
	Method      string     `json:"method,omitempty"`
	Since       *time.Time `json:"since,omitempty"`
	Seconds     float64    `json:"seconds"`
	MaxDowntime float64    `json:"max_downtime"`
	Owner       int        `json:"owner"`
	OwnerAlive  bool       `json:"owner_alive"`
	Guard       int        `json:"guard"`
	GuardAlive  bool       `json:"guard_alive"`
	ToDo        string     `json:"to_do"`
	Error       string     `json:"error,omitempty"`
}

func newFrozen(s freeze.Status, now time.Time) frozen {
	f := frozen{
		Event: "freeze", State: stateStarting, BasePath: s.BasePath, Raw: rawPath(s.BasePath), Method: s.Method, Since: timeOrNil(s.Since),
		MaxDowntime: s.MaxDowntime.Seconds(), Owner: s.Owner, OwnerAlive: s.OwnerAlive, Guard: s.Guard, GuardAlive: s.GuardAlive,
	}
	if !s.Since.IsZero() {
		f.Seconds = max(now.Sub(s.Since).Seconds(), 0) // the clock may have been set
	}
	switch {
	case s.Err != nil:
		f.State, f.Error = stateUnknown, s.Err.Error()
		f.ToDo = "see that the service runs, then remove the record"
	case s.OwnerAlive && s.GuardAlive:
		f.State, f.ToDo = stateHeld, "nothing: the backup starts it again"
	case s.OwnerAlive:
		f.ToDo = fmt.Sprintf("nothing: the backup starts it now; if it does not, kill process %d, then run `holdfast thaw`", s.Owner)
	case s.GuardAlive:
		f.ToDo = "nothing: the guard starts it now; `holdfast thaw` waits until it has"
	default:
		f.State, f.ToDo = stateLeft, "run `holdfast thaw`: it starts the instance again"
	}
	return f
}

func (a *app) status() error {
	list, err := freeze.ReadStatus(a.opt.stateDir)
	if err != nil {
		return explainState(err)
	}
	count := map[string]int{}
	var errs []error
	for _, s := range list {
		f := newFrozen(s, time.Now())
		count[f.State]++
		if s.Err != nil {
			errs = append(errs, s.Err)
		}
		a.showFrozen(f)
	}
	if a.ui.JSON() {
		a.ui.Object(struct {
			Event  string `json:"event"`
			Verb   string `json:"verb"`
			Frozen int    `json:"frozen"`
			Left   int    `json:"left"`
		}{"summary", "status", len(list), count[stateLeft]})
	} else if len(list) == 0 && !a.ui.Quiet() {
		a.ui.Text("no instance is frozen")
	}
	return errors.Join(errs...)
}

func (a *app) showFrozen(f frozen) {
	if a.ui.JSON() {
		a.ui.Object(f)
		return
	}
	if f.State == stateUnknown {
		return // it is the error of the command
	}
	life := func(pid int, alive bool) string {
		if alive {
			return fmt.Sprintf("process %d, alive", pid)
		}
		return fmt.Sprintf("process %d, DEAD", pid)
	}
	seconds := func(s float64) string { return ui.Duration(time.Duration(s * float64(time.Second))) }
	head := fmt.Sprintf("the instance at %s is frozen", ui.Quote(f.BasePath))
	if f.State == stateLeft {
		head = fmt.Sprintf("the instance at %s was LEFT STOPPED", ui.Quote(f.BasePath))
	}
	a.ui.Text(
		head,
		fmt.Sprintf("  since:  %s (%s, at most %s), by %s", localTime(*f.Since), seconds(f.Seconds), seconds(f.MaxDowntime), ui.Clean(f.Method)),
		"  backup: "+life(f.Owner, f.OwnerAlive),
		"  guard:  "+life(f.Guard, f.GuardAlive),
		"  to do:  "+f.ToDo,
	)
}
