package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/backup"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// withViewFlags are the flags of with-view.
type withViewFlags struct {
	place         placeFlags
	freeze        freezeFlags
	view          viewFlags
	originalPaths bool
}

func (a *app) withViewCommand() *cobra.Command {
	var f withViewFlags
	c := &cobra.Command{
		Use:   "with-view [flags] -- COMMAND [ARG...]",
		Short: "Run any program on a still view of the instance",
		Long: `Stop the instance, make still views of all its data, start it again, and run a program
on the views: rsync, restic, a tape client. Afterwards the views are removed, whatever
happened, and the program's exit code is passed on (128 and the signal's number if a
signal ended it). Signals are passed on to the program; if Holdfast is killed, the
program gets SIGTERM, and the next run removes the views.

The program finds the view of each data set that is there in HOLDFAST_VIEW_ and its name
in upper case: HOLDFAST_VIEW_STORAGE_USERS. HOLDFAST_VIEW_BASE is that of the base data
path, HOLDFAST_VIEW_CONFIG that of the configuration; holdfast discover lists the data
sets. With --original-paths it sees the views, read-only, at the places of the data itself,
which nobody else does, and the variables name these. That needs root and Linux 5.12.

If a data set cannot be held still, nothing is stopped. --freeze says how the instance is
stopped and started:

` + wayHelp() + `
--view says how views are made:

` + viewHelp() + `
` + exitHelp(exitDone, exitError, exitUsage, exitNotStarted, exitInterrupted),
		Example: `  holdfast with-view --freeze process -- sh -c 'rsync -aX "$HOLDFAST_VIEW_BASE"/ /mnt/copy/'
  holdfast with-view --freeze process --original-paths -- tar -czf /mnt/cloud.tgz /var/lib/ocis`,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return ui.WithHints(usageError("holdfast with-view needs a command to run"), "Usage: "+c.UseLine())
			}
			return nil
		},
		RunE: a.verb(func(ctx context.Context, args []string) error { return a.withView(ctx, &f, args) }),
	}
	f.place.add(c)
	f.freeze.add(c)
	f.view.add(c)
	c.Flags().BoolVar(&f.originalPaths, "original-paths", false, "let the program see the views where the data itself lies")
	c.Flags().SetInterspersed(false) // the program's flags are its own
	return c
}

func (a *app) withView(ctx context.Context, f *withViewFlags, argv []string) error {
	sink := a.ui.Sink()
	fz, err := f.freeze.freezer(f.place.pid, sink)
	if err != nil {
		return err
	}
	drivers, err := f.view.drivers(a.opt.stateDir)
	if err != nil {
		return err
	}
	if len(drivers) == 0 {
		return usageError("with-view needs views: --view must not be none")
	}
	where, err := f.place.options(a)
	if err != nil {
		return err
	}
	where.NoSizes = true
	// What would fail afterwards fails now, while nothing is stopped.
	program, err := exec.LookPath(argv[0])
	if err != nil {
		return usageError("the command cannot be run: %w", err)
	}
	if f.originalPaths {
		if err := a.canOverlay(ctx); err != nil {
			return err
		}
	}
	a.removeLeftViews(ctx)
	inst, err := discover.Discover(ctx, where)
	if err != nil {
		return fmt.Errorf("cannot find the instance: %w", err)
	}
	for _, w := range inst.Warnings {
		a.ui.Warn("%s", w)
	}
	if fz, err = f.freeze.settle(ctx, fz, inst, sink); err != nil {
		return explain(ctx, err)
	}
	set, err := a.planViews(ctx, inst, drivers, f.view.keep)
	if err != nil {
		return explain(ctx, err)
	}
	whole := false
	defer func() {
		if !whole {
			set.Discard() // views that nobody should go back to
		}
		if err := set.Close(context.WithoutCancel(ctx)); err != nil {
			a.ui.Warn("a view is left behind: %v", err)
		}
	}()
	a.warnHot(fz.Method())
	a.held.Store(stops(fz.Method()))
	defer a.held.Store(false)
	guard := f.freeze.guard(a)
	guard.Progress = a.untilThawed(sink)
	made := false
	rec, err := freeze.Guarded(ctx, fz, inst, guard, func(ctx context.Context) error {
		if err := backup.MakeViews(ctx, set, inst, fz.Method(), sink); err != nil {
			return err
		}
		made = true
		return nil
	})
	a.held.Store(false)
	// A service that did not come back weighs most, but the views are good, and may be needed all the more.
	var down error
	if errors.Is(err, freeze.ErrNotStarted) && made && ctx.Err() == nil {
		down = err
		a.ui.Warn("%v; the views are good, so the command is run first", err)
	} else if err != nil {
		return explain(ctx, err)
	}
	if err := ctx.Err(); err != nil {
		return explain(ctx, err)
	}
	err = a.runOnViews(ctx, set, inst, program, argv, f.originalPaths)
	broken := set.Check(context.WithoutCancel(ctx))
	if whole = broken == nil; whole {
		if err := set.SetNote(snapshot.NewViewNote("", viewedManifest(inst, set, rec))); err != nil {
			return err
		}
	} else {
		// What the program read is worth nothing, whatever it says.
		err = errors.Join(fmt.Errorf("what the command read is no picture of one moment: %w", broken), err)
	}
	a.showWithView(rec, set, err)
	return errors.Join(down, err)
}

// planViews finds out how all data sets are held still.
//
// Errors: the data sets that cannot be, by name.
func (a *app) planViews(ctx context.Context, inst *ocis.Instance, drivers []fssnap.Driver, keep int) (*fssnap.Set, error) {
	var paths []string
	for _, d := range inst.DataSets {
		if d.Found && d.Path != "" {
			paths = append(paths, d.Path)
		}
	}
	for _, s := range inst.Stores {
		if s.S3 != nil {
			return nil, ui.WithHints(fmt.Errorf("the blobs of store %s lie on S3, which cannot be held still", ui.Quote(s.Name)), "Nothing was stopped.")
		}
	}
	set, err := fssnap.NewSet(ctx, drivers, paths, fssnap.Options{StateDir: a.opt.stateDir, Label: inst.BasePath, KeepLast: keep})
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, u := range set.Uncovered() {
		what := ui.Quote(u.Path)
		// The innermost data set that it is, or lies in.
		best := ""
		for _, d := range inst.DataSets {
			if _, err := fssnap.Rel(u.Path, d.Path); d.Found && err == nil && len(d.Path) > len(best) {
				best, what = d.Path, fmt.Sprintf("data set %s (%s)", ui.Quote(d.Name), ui.Quote(u.Path))
			}
		}
		errs = append(errs, fmt.Errorf("%s cannot be held still: %w", what, u.Reason))
	}
	if len(errs) > 0 {
		return nil, ui.WithHints(errors.Join(errs...), "Nothing was stopped.",
			"--view-create and --view-destroy make views by commands of your own; `holdfast backup` needs none.")
	}
	return set, nil
}

// viewPlace is a path and where its view is.
type viewPlace struct{ path, view string }

// viewVariable is the name of the variable for a data set.
func viewVariable(dataSet string) string {
	return "HOLDFAST_VIEW_" + strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' || r >= 'A' && r <= 'Z' {
			return r
		}
		return '_'
	}, strings.ToUpper(dataSet))
}

// viewEnvironment returns the variables, and the places for --original-paths, outer ones first. There
// the variables name the places, because one view may hide where another one lies.
func viewEnvironment(set *fssnap.Set, inst *ocis.Instance, original bool) (env []string, places []viewPlace, err error) {
	seen := map[string]bool{}
	add := func(name, path string) error {
		view, ok := set.Translate(path)
		if !ok {
			return fmt.Errorf("data set %s: %w", ui.Quote(name), set.Reason(path))
		}
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			return err
		}
		if v := viewVariable(name); !seen[v] {
			seen[v] = true
			at := view
			if original {
				at = real
			}
			env = append(env, v+"="+at)
		}
		places = append(places, viewPlace{real, view})
		return nil
	}
	for _, d := range inst.DataSets {
		if d.Found && d.Path != "" {
			if err := add(d.Name, d.Path); err != nil {
				return nil, nil, err
			}
		}
	}
	slices.SortStableFunc(places, func(a, b viewPlace) int { return cmp.Compare(len(a.path), len(b.path)) })
	var need []viewPlace
	for _, p := range places {
		covered := false
		for _, o := range need {
			if rel, err := fssnap.Rel(p.path, o.path); err == nil {
				// The inner one of several that contain it decides.
				covered = filepath.Join(o.view, rel) == p.view
			}
		}
		if !covered {
			need = append(need, p)
		}
	}
	return env, need, nil
}

// runOnViews runs the program and waits for it.
func (a *app) runOnViews(ctx context.Context, set *fssnap.Set, inst *ocis.Instance, program string, argv []string, original bool) error {
	env, places, err := viewEnvironment(set, inst, original)
	if err != nil {
		return err
	}
	cmd := &exec.Cmd{Path: program, Args: argv, SysProcAttr: &syscall.SysProcAttr{}}
	if original {
		cmd = overlayCommand(places, program, argv)
	}
	// A program that goes on without its views reads nothing but errors.
	cmd.SysProcAttr.Pdeathsig = syscall.SIGTERM
	cmd.Env = append(slices.Clone(a.environ), env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = a.in, a.out, a.err

	// The kernel takes the end of the thread that started it for the end of the parent.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	forward := func(s os.Signal) {
		if !typed(s) {
			_ = cmd.Process.Signal(s)
		}
	}
	more := make(chan os.Signal, 8)
	signal.Notify(more, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	defer signal.Stop(more)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("the command cannot be run: %w", err)
	}
	a.passOn.Store(&forward)
	defer a.passOn.Store(nil)
	if ctx.Err() != nil { // just before that
		_ = cmd.Process.Signal(syscall.SIGTERM)
	}
	over := make(chan struct{})
	defer close(over)
	go func() {
		for {
			select {
			case s := <-more:
				forward(s)
			case <-over:
				return
			}
		}
	}()
	return commandError(argv[0], cmd.Wait())
}

// typed tells whether a signal most likely came from the keyboard: then the program, being in the
// foreground like us, has got it already.
func typed(s os.Signal) bool {
	if s != os.Interrupt && s != syscall.SIGQUIT {
		return false
	}
	tty, err := os.OpenFile("/dev/tty", os.O_RDONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return false
	}
	defer tty.Close()
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// commandError carries the exit code of a program on, as a shell does.
func commandError(name string, err error) error {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	if st, ok := exit.Sys().(syscall.WaitStatus); ok && st.Signaled() {
		return withCode(128+int(st.Signal()), fmt.Errorf("%s was ended by %s", ui.Quote(name), unix.SignalName(st.Signal())))
	}
	return withCode(exit.ExitCode(), fmt.Errorf("%s ended with exit code %d", ui.Quote(name), exit.ExitCode()))
}

// withViewSummary is the final object of with-view.
type withViewSummary struct {
	Event    string          `json:"event"`
	Verb     string          `json:"verb"`
	Views    []snapshot.View `json:"views"`
	Freeze   snapshot.Freeze `json:"freeze"`
	ExitCode int             `json:"exit_code"`
}

// viewedManifest describes what the views show, for a restore from them.
func viewedManifest(inst *ocis.Instance, set *fssnap.Set, rec freeze.Record) snapshot.Manifest {
	m := snapshot.Manifest{
		Holdfast: version, Product: string(inst.Product), ProductVersion: inst.Version, Setup: inst.Setup,
		BasePath: inst.BasePath, ConfigDir: inst.ConfigDir, URL: inst.URL, Freeze: backup.FreezeRecord(rec), Views: viewsOf(set),
	}
	for _, d := range inst.DataSets {
		m.DataSets = append(m.DataSets, snapshot.DataSet{
			Name: d.Name, Kind: string(d.Kind), Path: d.Path, ServerPath: d.ServerPath, Class: string(d.Class),
			Filesystem: d.Filesystem, Captured: d.Found, Store: d.Store,
		})
	}
	for _, s := range inst.Stores {
		m.Stores = append(m.Stores, snapshot.Store{Name: s.Name, Root: s.Root, Driver: s.Driver, Layout: string(s.Layout), Prefix: s.Prefix})
	}
	return m
}

func viewsOf(set *fssnap.Set) (out []snapshot.View) {
	for _, v := range set.Views() {
		out = append(out, snapshot.View{Kind: v.Kind, Source: v.Source, MadeAt: timeOrNil(v.MadeAt)})
	}
	return out
}

func (a *app) showWithView(rec freeze.Record, set *fssnap.Set, err error) {
	if !a.ui.JSON() {
		if rec.Downtime > 0 && stops(rec.Method) {
			a.ui.Info("the instance was stopped for %.1f s, by %s", rec.Downtime.Seconds(), rec.Method)
		}
		return
	}
	s := withViewSummary{Event: "summary", Verb: "with-view", Freeze: backup.FreezeRecord(rec), ExitCode: exitCode(err)}
	s.Views = viewsOf(set)
	a.ui.Object(s)
}
