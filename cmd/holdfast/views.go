package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/fssnap/btrfs"
	"github.com/holdfast-backup/holdfast/internal/fssnap/ceph"
	"github.com/holdfast-backup/holdfast/internal/fssnap/command"
	"github.com/holdfast-backup/holdfast/internal/fssnap/lvm"
	"github.com/holdfast-backup/holdfast/internal/fssnap/zfs"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// viewFlags say how to make still views of the data.
type viewFlags struct {
	kind            string
	create, destroy string
	includeNested   bool
	lvmSize         string
	keep            int
}

func (f *viewFlags) add(c *cobra.Command) {
	fs := c.Flags()
	fs.StringVar(&f.kind, "view", "", "`kind` of views: auto, none, "+strings.Join(viewWords(), ", ")+"\n(default: command if --view-create is set, else auto)")
	fs.StringVar(&f.create, "view-create", "", "shell `command` that makes a view of $HOLDFAST_SOURCE named $HOLDFAST_VIEW_NAME,\nand prints its path as the last line; run in /")
	fs.StringVar(&f.destroy, "view-destroy", "", "shell `command` that removes it; $HOLDFAST_VIEW is the path, empty if that is not known")
	fs.BoolVar(&f.includeNested, "include-nested", false, "btrfs: take along the subvolumes below the data")
	fs.StringVar(&f.lvmSize, "lvm-size", "", "LVM: room for changes of a snapshot that is not thin, as `SIZE` such as 20G (default: a fifth)")
	fs.IntVar(&f.keep, "keep-views", 0, "`number` of views of this instance that stay on its filesystems afterwards")
}

// viewKind is one word of --view that stands for a driver.
type viewKind struct {
	word string
	auto bool // part of auto
	does string
	make func(o viewOptions) fssnap.Driver
}

// viewOptions are the flags in the units of the drivers.
type viewOptions struct {
	*viewFlags
	lvmBytes int64
	stateDir string
}

// viewKinds are the drivers, in the order in which they are asked.
var viewKinds = []viewKind{
	{"btrfs", true, "snapshots of the subvolumes the data lies in; needs root", func(o viewOptions) fssnap.Driver {
		return btrfs.New(btrfs.Options{IncludeNested: o.includeNested, StateDir: o.stateDir})
	}},
	{"zfs", true, "snapshots of the datasets, with the command zfs", func(o viewOptions) fssnap.Driver {
		return zfs.New(zfs.Options{StateDir: o.stateDir})
	}},
	{"lvm", true, "snapshots of the logical volumes; needs root", func(o viewOptions) fssnap.Driver {
		return lvm.New(lvm.Options{Size: o.lvmBytes, StateDir: o.stateDir})
	}},
	{"cephfs", true, "snapshots of the directories", func(viewOptions) fssnap.Driver { return ceph.New(ceph.Options{}) }},
	{"command", false, "what --view-create makes and --view-destroy removes", func(o viewOptions) fssnap.Driver {
		return command.New(command.Options{Create: o.create, Destroy: o.destroy, StateDir: o.stateDir})
	}},
}

func viewWords() []string {
	var out []string
	for _, k := range viewKinds {
		out = append(out, k.word)
	}
	return out
}

// viewHelp is the table for the help.
func viewHelp() string {
	var b strings.Builder
	fmt.Fprintf(&b, "  %-8s %s\n  %-8s %s\n", "auto", "btrfs, zfs, lvm and cephfs, each where it applies", "none", "no views")
	for _, k := range viewKinds {
		fmt.Fprintf(&b, "  %-8s %s\n", k.word, k.does)
	}
	return b.String()
}

// drivers makes the drivers that the flags ask for; none is an empty list.
func (f *viewFlags) drivers(stateDir string) ([]fssnap.Driver, error) {
	word := f.kind
	switch {
	case word == "" && f.create != "":
		word = "command"
	case word == "":
		word = "auto"
	}
	if f.keep < 0 {
		return nil, usageError("--keep-views must be 0 or more, not %d", f.keep)
	}
	o, err := f.options(stateDir)
	if err != nil {
		return nil, err
	}
	if word == "command" && (f.create == "" || f.destroy == "") {
		return nil, ui.WithHints(usageError("--view=command needs --view-create and --view-destroy"),
			"What one command makes, the other one must be able to remove.")
	}
	var list []fssnap.Driver
	for _, k := range viewKinds {
		if word == k.word || word == "auto" && k.auto {
			list = append(list, k.make(o))
		}
	}
	if list == nil && word != "none" {
		return nil, usageError("--view is auto, none, %s; %q is not known", strings.Join(viewWords(), ", "), word)
	}
	return list, nil
}

func (f *viewFlags) options(stateDir string) (viewOptions, error) {
	o := viewOptions{viewFlags: f}
	var err error
	if f.lvmSize != "" {
		if o.lvmBytes, err = parseSize(f.lvmSize); err != nil {
			return o, withCode(exitUsage, fmt.Errorf("--lvm-size: %w", err))
		}
	}
	if stateDir != "" {
		// Views are mounted below it.
		o.stateDir, err = filepath.Abs(stateDir)
	}
	return o, err
}

// parseSize reads a size such as 512M or 20G, in powers of 1024.
func parseSize(s string) (int64, error) {
	number := strings.TrimSuffix(strings.TrimSuffix(strings.ToUpper(strings.TrimSpace(s)), "B"), "I")
	shift := 0
	if i := strings.IndexAny(number, "KMGT"); i >= 0 && i == len(number)-1 {
		shift = 10 * (strings.IndexByte("KMGT", number[i]) + 1)
		number = number[:i]
	}
	n, err := strconv.ParseInt(strings.TrimSpace(number), 10, 64)
	if err != nil || n <= 0 || n > (1<<62)>>shift {
		return 0, fmt.Errorf("%q is no size, such as 512M or 20G", s)
	}
	return n << shift, nil
}

// backupDrivers are the drivers of a backup. Where nothing is stopped, views gain nothing unless
// somebody asks for them.
func (a *app) backupDrivers(f *viewFlags, method string) ([]fssnap.Driver, error) {
	list, err := f.drivers(a.opt.stateDir)
	if err != nil || method == freeze.KindNone && f.kind == "" && f.create == "" {
		return nil, err
	}
	return list, nil
}

// allDrivers are those that find and remove views, whatever made them.
func (a *app) allDrivers() ([]fssnap.Driver, error) {
	o, err := (&viewFlags{}).options(a.opt.stateDir)
	if err != nil {
		return nil, err
	}
	var list []fssnap.Driver
	for _, k := range viewKinds {
		list = append(list, k.make(o))
	}
	return list, nil
}

// removeLeftViews removes the views of runs that were killed. That it fails does not keep a backup
// from being made.
func (a *app) removeLeftViews(ctx context.Context) {
	drivers, err := a.allDrivers()
	var removed []fssnap.View
	if err == nil {
		removed, err = fssnap.RemoveLeftovers(ctx, drivers, fssnap.FindOptions{StateDir: a.opt.stateDir})
	}
	for _, v := range removed {
		a.ui.Info("removed the %s view %s of %s, which a run that was killed had left", v.Kind, ui.Quote(v.Name), ui.Quote(v.Source))
	}
	if err != nil && ctx.Err() == nil {
		a.ui.Warn("views of a run that was killed are left behind: %v", err)
	}
}

func (a *app) viewsCommand() *cobra.Command {
	var remove, orphans bool
	c := &cobra.Command{
		Use:   "views [--remove [NAME...]]",
		Short: "List the views on the filesystems, or remove them",
		Long: `List all views that Holdfast has made and that are still there, oldest first:

  live      a run that uses it is at work
  kept      --keep-views left it as a fast way back; newer ones replace it
  leftover  its run was killed; the next backup removes it
  orphan    nothing is known about it: it may belong to another machine that shares the
            filesystem, or to a Holdfast with another --state-dir

--remove removes leftovers, with --orphans the orphans, too; with a NAME it removes that
view if it is kept. Live views are never removed.

` + exitHelp(exitDone, exitError, exitUsage, exitInterrupted),
		Example: `  holdfast views
  holdfast views --remove
  holdfast views --remove holdfast-20260304T040607Z-0a1b2c`,
		RunE: a.verb(func(ctx context.Context, names []string) error {
			switch {
			case len(names) > 0 && !remove:
				return ui.WithHints(usageError("holdfast views takes names only with --remove"), "Without arguments it lists all views.")
			case orphans && (!remove || len(names) > 0):
				return usageError("--orphans goes with --remove, and without names")
			case remove:
				return a.removeViews(ctx, names, orphans)
			}
			return a.listViews(ctx)
		}),
	}
	c.Flags().BoolVar(&remove, "remove", false, "remove leftovers, or the kept views that are named")
	c.Flags().BoolVar(&orphans, "orphans", false, "with --remove: remove orphans, too")
	return c
}

// viewRow is one view as it is shown.
type viewRow struct {
	Event    string     `json:"event"`
	State    string     `json:"state"`
	Name     string     `json:"name"` // of the set, which is what --remove takes
	View     string     `json:"view"`
	Kind     string     `json:"kind"`
	Source   string     `json:"source"`
	Path     string     `json:"path,omitempty"`
	MadeAt   *time.Time `json:"made_at,omitempty"`
	Bytes    int64      `json:"bytes,omitempty"`
	BasePath string     `json:"base_path,omitempty"`
	PID      int        `json:"pid,omitempty"`
	Broken   string     `json:"broken,omitempty"`
}

// stateRemoved is the state of a view that was just removed.
const stateRemoved = "removed"

func newViewRow(v fssnap.View, state string) viewRow {
	return viewRow{
		Event: "view", State: state, Name: v.Set(), View: v.Name, Kind: v.Kind, Source: v.Source, Path: v.Path,
		MadeAt: timeOrNil(v.MadeAt), Bytes: v.Size, Broken: v.Broken,
	}
}

func (a *app) listViews(ctx context.Context) error {
	drivers, err := a.allDrivers()
	if err != nil {
		return err
	}
	list, err := fssnap.Find(ctx, drivers, fssnap.FindOptions{StateDir: a.opt.stateDir})
	count := map[fssnap.State]int{}
	var rows [][]string
	for _, v := range list {
		count[v.State]++
		r := newViewRow(v.View, string(v.State))
		r.BasePath, r.PID = v.Label, v.PID
		if a.ui.JSON() {
			a.ui.Object(r)
			continue
		}
		made, size, state := "", "", r.State
		if r.MadeAt != nil {
			made = localTime(*r.MadeAt)
		}
		if r.Bytes > 0 {
			size = ui.Bytes(r.Bytes)
		}
		if r.Broken != "" {
			state += ", BROKEN"
		}
		rows = append(rows, []string{ui.Quote(r.Name), state, r.Kind, made, size, ui.Quote(r.Source), quoteOrBlank(r.Path)})
	}
	if a.ui.JSON() {
		a.ui.Object(struct {
			Event     string `json:"event"`
			Verb      string `json:"verb"`
			Live      int    `json:"live"`
			Kept      int    `json:"kept"`
			Leftovers int    `json:"leftovers"`
			Orphans   int    `json:"orphans"`
			Removed   int    `json:"removed"`
		}{"summary", "views", count[fssnap.Live], count[fssnap.Kept], count[fssnap.Leftover], count[fssnap.Orphan], 0})
		return ui.WithHints(err, viewHints(err)...)
	}
	if len(rows) > 0 {
		a.ui.Text(ui.Table([]string{"Name", "State", "Kind", "Time", ">Size", "Source", "Location"}, rows)...)
	}
	a.ui.Info("%s", ui.Count(int64(len(rows)), "view"))
	if n := count[fssnap.Leftover]; n > 0 {
		a.ui.Info("`holdfast views --remove` removes what is left over")
	}
	return ui.WithHints(err, viewHints(err)...)
}

func (a *app) removeViews(ctx context.Context, names []string, orphans bool) error {
	drivers, err := a.allDrivers()
	if err != nil {
		return err
	}
	o := fssnap.FindOptions{StateDir: a.opt.stateDir, Orphans: orphans}
	var removed []fssnap.View
	if len(names) == 0 {
		removed, err = fssnap.RemoveLeftovers(ctx, drivers, o)
	} else {
		removed, err = removeKept(ctx, drivers, names, o)
	}
	for _, v := range removed {
		if a.ui.JSON() {
			a.ui.Object(newViewRow(v, stateRemoved))
		} else if !a.ui.Quiet() {
			a.ui.Text(fmt.Sprintf("removed the %s view %s of %s", v.Kind, ui.Quote(v.Name), ui.Quote(v.Source)))
		}
	}
	if a.ui.JSON() {
		a.ui.Object(struct {
			Event   string `json:"event"`
			Verb    string `json:"verb"`
			Removed int    `json:"removed"`
		}{"summary", "views", len(removed)})
	} else if len(removed) == 0 && err == nil && !a.ui.Quiet() {
		a.ui.Text("nothing to do: no views are left over")
	}
	return ui.WithHints(err, viewHints(err)...)
}

// removeKept removes kept sets, and returns the views that are gone with them.
func removeKept(ctx context.Context, drivers []fssnap.Driver, names []string, o fssnap.FindOptions) ([]fssnap.View, error) {
	list, err := fssnap.Find(ctx, drivers, o)
	errs := []error{err}
	var removed []fssnap.View
	for _, name := range names {
		if err := fssnap.RemoveKept(ctx, drivers, name, o); err != nil {
			errs = append(errs, err)
			continue
		}
		for _, v := range list {
			if v.Set() == name {
				removed = append(removed, v.View)
			}
		}
	}
	return removed, errors.Join(errs...)
}

func viewHints(err error) []string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return []string{"`holdfast views` lists the names. Is --state-dir the one of the backup?"}
	case errors.Is(err, fs.ErrPermission):
		return []string{"Most filesystems show their snapshots to root alone."}
	}
	return nil
}
