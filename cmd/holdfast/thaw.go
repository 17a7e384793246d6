package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// noRecovery are the verbs that do not look for stopped instances first: those that do it
// themselves, and those that tell about this program only.
var noRecovery = map[string]bool{"thaw": true, "status": true, "version": true, "generate": true, "init": true}

// instanceVerbs work on an instance: for them a state directory that cannot be read is bad news.
var instanceVerbs = map[string]bool{"backup": true, "with-view": true, "restore": true}

// startLeft looks for what a backup left stopped, before the verb does its own work. A backup starts
// it; all others only tell, because a start that fails takes minutes, and a list of snapshots may be
// what is needed now. That it fails does not keep the verb from its work.
func (a *app) startLeft(ctx context.Context, verb string) {
	if noRecovery[verb] {
		return
	}
	// One look at a directory; the rest only if there is something.
	before, err := freeze.ReadStatus(a.opt.stateDir)
	if err != nil {
		if instanceVerbs[verb] || a.ui.Verbose() {
			a.ui.Warn("cannot tell whether a backup left an instance stopped: %v", err)
		}
		return
	}
	if len(before) == 0 {
		return
	}
	if verb != "backup" {
		a.warnLeft(before)
		return
	}
	owners := a.announce(before)
	list, err := freeze.RecoverWith(ctx, a.opt.stateDir, a.recoverOptions(verb))
	a.announceEnd(owners)
	if err != nil && len(list) == 0 {
		a.ui.Warn("cannot tell whether a backup left an instance stopped: %v; see `holdfast thaw`", err)
	}
	for _, r := range list {
		switch {
		case r.Running && r.Err == nil:
			a.ui.Info("%s", runningText(r.BasePath, r.Sign))
		case r.Gone && r.Err == nil:
			a.ui.Warn("%s", goneText(r.BasePath))
		case !r.Started.IsZero():
			a.ui.Info("%s", startedText(r.BasePath, r.Since, owners[r.BasePath], r.Reported))
		}
		if errors.Is(r.Err, freeze.ErrNotReady) || r.Err != nil && !r.Started.IsZero() {
			a.ui.Warn("%v; see `holdfast status`, and `holdfast thaw` if it is still listed", r.Err)
		} else if r.Err != nil {
			a.ui.Warn("%v", r.Err)
		}
	}
}

// warnLeft tells of what waits for a start.
func (a *app) warnLeft(list []freeze.Status) {
	for _, s := range list {
		switch {
		case s.Err != nil:
			a.ui.Warn("%v; `holdfast thaw` tries again", s.Err)
		case !s.OwnerAlive && !s.GuardAlive:
			a.ui.Warn("the instance at %s is on record as stopped since %s by %s: `holdfast thaw` starts it, unless it runs already",
				ui.Quote(s.BasePath), localTime(s.Since), ownerText(s.Owner, s.Reported))
		}
	}
}

// recoverOptions takes the start command of a backup for the instance that it is given for.
func (a *app) recoverOptions(verb string) freeze.RecoverOptions {
	c, _, err := a.root.Find([]string{verb})
	if err != nil {
		return freeze.RecoverOptions{}
	}
	value := func(flag string) string {
		if f := c.Flags().Lookup(flag); f != nil {
			return f.Value.String()
		}
		return ""
	}
	return freeze.RecoverOptions{StartCommand: value("start-command"), BasePath: value("base-data-path")}
}

// announce tells that a start is about to be tried, which may take minutes. It returns the process
// of the backup for each instance that is waiting for a start.
func (a *app) announce(list []freeze.Status) map[string]int {
	owners := map[string]int{}
	for _, s := range list {
		if s.Err == nil && !s.OwnerAlive && !s.GuardAlive {
			owners[s.BasePath] = s.Owner
		}
	}
	if len(owners) > 0 {
		a.ui.Sink().Emit(progress.Event{Kind: progress.Start, Phase: "thaw", Message: "starting what an earlier backup left stopped"})
	}
	return owners
}

func (a *app) announceEnd(owners map[string]int) {
	if len(owners) > 0 {
		a.ui.Sink().Emit(progress.Event{Kind: progress.Finish, Phase: "thaw"})
	}
}

func startedText(base string, since time.Time, owner int, reported bool) string {
	return fmt.Sprintf("started the instance at %s again: it was stopped since %s by %s", ui.Quote(base), localTime(since), ownerText(owner, reported))
}

func runningText(base, sign string) string {
	return fmt.Sprintf("the instance at %s runs already (%s): nothing was started, and the record of the backup that left it stopped was removed", ui.Quote(base), ui.Clean(sign))
}

func goneText(base string) string {
	return fmt.Sprintf("an earlier backup left the instance at %s stopped, but that does not exist any more: its record was removed", ui.Quote(base))
}

// ownerText tells of the backup that left an instance stopped: whether it said so or died.
func ownerText(pid int, reported bool) string {
	if reported {
		return processText(pid) + ", which could not start it again"
	}
	return processText(pid) + ", which died"
}

func processText(pid int) string {
	if pid <= 0 {
		return "a backup"
	}
	return fmt.Sprintf("a backup (process %d)", pid)
}

func localTime(t time.Time) string { return t.Local().Format(time.DateTime) }

// rawPath returns the bytes of a path that JSON cannot hold as text.
func rawPath(p string) []byte {
	if utf8.ValidString(p) {
		return nil
	}
	return []byte(p)
}

func (a *app) thawCommand() *cobra.Command {
	var forget bool
	c := &cobra.Command{
		Use:   "thaw [PATH]",
		Short: "Start what a backup left stopped",
		Long: `Start the instances that a backup stopped and did not start again, because it and its
guard process were killed, the machine went down, or the start failed. A backup does the
same before its own work; this command does nothing else, and fails if a start does.

An instance is left alone while a backup still works on it. If only the guard process
of a backup is left, that starts the instance; this command waits until it has. Of an
instance that runs already only the record is removed.

--forget removes the record and starts nothing: for an instance that was started by hand
and is not seen to run, or was given up. PATH is its base data directory, and may be left
out if there is one record only.

` + exitHelp(exitDone, exitError, exitUsage, exitNotStarted, exitInterrupted),
		Args: args(0, 1, "at most one path"),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			switch {
			case forget && len(args) == 1:
				return a.forget(args[0])
			case forget:
				return a.forget("")
			case len(args) == 1:
				return usageError("holdfast thaw takes a path only with --forget, not %q", args[0])
			}
			return a.thaw(ctx)
		}),
	}
	c.Flags().BoolVar(&forget, "forget", false, "remove the record of a stopped instance, and start nothing")
	return c
}

// forget removes a record.
func (a *app) forget(base string) error {
	f, err := freeze.Forget(a.opt.stateDir, base)
	if err != nil {
		return ui.WithHints(err, "`holdfast status` lists what is on record.")
	}
	if a.ui.JSON() {
		a.ui.Object(thawed{Event: "thaw", BasePath: f.BasePath, Raw: rawPath(f.BasePath), Method: f.Method,
			Since: timeOrNil(f.Since), Owner: f.Owner, Result: thawForgotten})
		a.ui.Object(thawSummary{Event: "summary", Verb: "thaw", Forgotten: 1})
		return nil
	}
	if a.ui.Quiet() {
		return nil
	}
	what := "the record " + ui.Quote(f.File)
	if f.BasePath != "" {
		what = fmt.Sprintf("the record of the instance at %s, stopped since %s by %s", ui.Quote(f.BasePath), localTime(f.Since), processText(f.Owner))
	}
	a.ui.Text("removed " + what + "; nothing was started")
	return nil
}

// The outcomes of a thaw for one instance.
const (
	thawStarted = "started" // by this command
	thawGuarded = "guarded" // meanwhile, by the backup or its guard process
	thawBusy    = "busy"    // a backup is at work on it
	thawFailed  = "failed"

	thawRunning   = "running"   // it ran already; the record was removed
	thawGone      = "gone"      // its base path does not exist; the record was removed
	thawForgotten = "forgotten" // by --forget
)

// thawSummary is the final object of a thaw.
type thawSummary struct {
	Event     string `json:"event"`
	Verb      string `json:"verb"`
	Started   int    `json:"started"`
	Busy      int    `json:"busy"`
	Failed    int    `json:"failed"`
	Running   int    `json:"running,omitempty"`
	Gone      int    `json:"gone,omitempty"`
	Forgotten int    `json:"forgotten,omitempty"`
}

// thawed is what was done about one instance.
type thawed struct {
	Event    string     `json:"event"`
	BasePath string     `json:"base_path"`
	Raw      []byte     `json:"base_path_raw,omitempty"` // the bytes of a path that is no UTF-8
	Method   string     `json:"method,omitempty"`
	Since    *time.Time `json:"since,omitempty"`
	Owner    int        `json:"owner,omitempty"`
	Result   string     `json:"result"`
	Started  *time.Time `json:"started,omitempty"`
	Error    string     `json:"error,omitempty"`

	err      error
	reported bool
	sign     string
}

func timeOrNil(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

// guardPoll is how often is looked whether a guard has done its work.
const guardPoll = 100 * time.Millisecond

func (a *app) thaw(ctx context.Context) error {
	list, err := a.thawAll(ctx)
	if err != nil {
		return explainState(err)
	}
	count := map[string]int{}
	var errs []error
	for _, t := range list {
		count[t.Result]++
		if t.err != nil {
			errs = append(errs, t.err)
		}
		a.showThawed(t)
	}
	if a.ui.JSON() {
		a.ui.Object(thawSummary{
			Event: "summary", Verb: "thaw", Started: count[thawStarted] + count[thawGuarded], Busy: count[thawBusy],
			Failed: count[thawFailed], Running: count[thawRunning], Gone: count[thawGone],
		})
	} else if len(list) == 0 && !a.ui.Quiet() {
		a.ui.Text("nothing to do: no backup left an instance stopped")
	}
	// A record that cannot be read may stand for a service that is down: that is as bad.
	err = errors.Join(errs...)
	if err != nil && !errors.Is(err, freeze.ErrNotStarted) && ctx.Err() == nil {
		return ui.WithHints(withCode(exitNotStarted, err), "See that the service runs.")
	}
	for _, e := range errs {
		if !errors.Is(e, freeze.ErrNotReady) {
			return err // one that is down weighs more
		}
	}
	return explainNotReady(err)
}

// thawAll starts what is left, and waits for the guards of dead backups to start theirs.
func (a *app) thawAll(ctx context.Context) ([]thawed, error) {
	out, err := a.thawOnce(ctx)
	if err != nil {
		return nil, err
	}
	again := false
	for i := range out {
		if out[i].Result != thawBusy {
			continue
		}
		left, err := a.awaitGuard(ctx, &out[i])
		if err != nil {
			return nil, err
		}
		again = again || left
	}
	if !again {
		return out, nil
	}
	// A guard died as well.
	more, err := a.thawOnce(ctx)
	for _, t := range more {
		i := slices.IndexFunc(out, func(o thawed) bool { return o.BasePath == t.BasePath })
		if i >= 0 {
			out[i] = t
		} else {
			out = append(out, t)
		}
	}
	return out, err
}

func (a *app) thawOnce(ctx context.Context) ([]thawed, error) {
	before, err := freeze.ReadStatus(a.opt.stateDir)
	if err != nil {
		return nil, err
	}
	owners := a.announce(before)
	list, err := freeze.Recover(ctx, a.opt.stateDir)
	a.announceEnd(owners)
	if err != nil && len(list) == 0 {
		return nil, err
	}
	var out []thawed
	for _, r := range list {
		t := thawed{
			Event: "thaw", BasePath: r.BasePath, Raw: rawPath(r.BasePath), Method: r.Method, Result: thawStarted,
			Since: timeOrNil(r.Since), Owner: r.PID, Started: timeOrNil(r.Started), err: r.Err,
			reported: r.Reported, sign: r.Sign,
		}
		if i := slices.IndexFunc(before, func(s freeze.Status) bool { return s.BasePath == r.BasePath }); i >= 0 {
			t.Owner = before[i].Owner
		}
		switch {
		case r.Err != nil:
			t.Result, t.Error = thawFailed, r.Err.Error()
		case r.Busy:
			t.Result = thawBusy
		case r.Running:
			t.Result = thawRunning
		case r.Gone:
			t.Result = thawGone
		}
		out = append(out, t)
	}
	return out, nil
}

// awaitGuard waits as long as a guard without its backup is at work on t. It reports whether the
// guard is gone and the record is not, so that the instance still has to be started.
func (a *app) awaitGuard(ctx context.Context, t *thawed) (left bool, err error) {
	for said := false; ; {
		list, err := freeze.ReadStatus(a.opt.stateDir)
		if err != nil {
			return false, err
		}
		i := slices.IndexFunc(list, func(s freeze.Status) bool { return s.BasePath == t.BasePath })
		switch {
		case i < 0:
			t.Result = thawGuarded
			return false, nil
		case list[i].OwnerAlive:
			return false, nil
		case !list[i].GuardAlive:
			// Where neither is to be seen from here, as in another container, said tells them apart.
			return said, nil
		}
		if !said {
			said = true
			a.ui.Info("the backup of %s died, and its guard (process %d) starts the instance: waiting for it", ui.Quote(t.BasePath), list[i].Guard)
		}
		select {
		case <-ctx.Done():
			return false, context.Cause(ctx)
		case <-time.After(guardPoll):
		}
	}
}

func (a *app) showThawed(t thawed) {
	if a.ui.JSON() {
		a.ui.Object(t)
		return
	}
	switch t.Result {
	case thawStarted:
		if !a.ui.Quiet() {
			a.ui.Text(startedText(t.BasePath, *t.Since, t.Owner, t.reported))
		}
	case thawGuarded:
		if !a.ui.Quiet() {
			a.ui.Text(fmt.Sprintf("the instance at %s was started again meanwhile: it was stopped since %s by %s",
				ui.Quote(t.BasePath), localTime(*t.Since), processText(t.Owner)))
		}
	case thawRunning:
		if !a.ui.Quiet() {
			a.ui.Text(runningText(t.BasePath, t.sign))
		}
	case thawGone:
		a.ui.Warn("%s", goneText(t.BasePath))
	case thawBusy:
		a.ui.Text(fmt.Sprintf("left alone: %s is at work on the instance at %s", processText(t.Owner), ui.Quote(t.BasePath)))
	}
	// Failures are the error of the command.
}

// explainState is for a state directory that cannot be read.
func explainState(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, errInterrupted) {
		return err
	}
	return ui.WithHints(err, "Is --state-dir the one of the backup, and may this user read it?")
}
