package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/maintain"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/retention"
	"github.com/holdfast-backup/holdfast/internal/settings"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// forgetFlags are the flags of forget.
type forgetFlags struct {
	policy             retention.Policy
	keepTags           []string
	groupBy            string
	filter             filterFlags
	otherPrograms      bool
	removeLastComplete bool
	dryRun, prune      bool
	pruning            pruneFlags
}

func (a *app) forgetCommand() *cobra.Command {
	var f forgetFlags
	c := &cobra.Command{
		Use:   "forget [SNAPSHOT...]",
		Short: "Remove snapshots that are not needed any more",
		Long: `Remove the snapshots that are named, or those that no rule keeps. What they alone
need stays in the repository until holdfast prune, or goes at once with --prune.

The rules are restic's. Each is applied to every instance on its own: to the snapshots
of one host and the same paths. A snapshot stays if any rule keeps it: --keep-daily 7
keeps the newest snapshot of each of the last 7 days that have one. While a rule has room
left, it keeps the oldest snapshot as well. A number may be "unlimited". A time is written
1y2m3d4h and counts back from the newest snapshot.

The last complete snapshot of an instance stays, whatever the rules say; one that is
incomplete does not count. Snapshots from the future stay, and do not take the place of
others. Snapshots of other programs are left alone, unless they are named.

` + exitHelp(repoCodes...),
		Example: `  holdfast forget --keep-last 2 --prune
  holdfast forget --keep-daily 7 --keep-weekly 5 --keep-monthly 12 --dry-run
  holdfast forget 2823f516`,
		Args: args(0, 10000, "ids of snapshots"),
		RunE: a.verb(func(ctx context.Context, args []string) error { return a.forgetSnapshots(ctx, &f, args) }),
	}
	fs := c.Flags()
	fs.SortFlags = false
	for _, k := range []struct {
		name, what string
		to         *retention.Count
	}{
		{"keep-last", "keep the last `N` snapshots", &f.policy.Last},
		{"keep-hourly", "keep the last one of each of the last `N` hours that have one", &f.policy.Hourly},
		{"keep-daily", "the same for `N` days", &f.policy.Daily},
		{"keep-weekly", "the same for `N` weeks, from Monday to Sunday", &f.policy.Weekly},
		{"keep-monthly", "the same for `N` months", &f.policy.Monthly},
		{"keep-yearly", "the same for `N` years", &f.policy.Yearly},
	} {
		fs.Var((*countFlag)(k.to), k.name, k.what)
	}
	for _, k := range []struct {
		name, what string
		to         *retention.Span
	}{
		{"keep-within", "all snapshots not older than `TIME`, e.g. 14d", &f.policy.Within},
		{"keep-within-hourly", "one an hour within `TIME`", &f.policy.WithinHourly},
		{"keep-within-daily", "one a day within `TIME`", &f.policy.WithinDaily},
		{"keep-within-weekly", "one a week within `TIME`", &f.policy.WithinWeekly},
		{"keep-within-monthly", "one a month within `TIME`", &f.policy.WithinMonthly},
		{"keep-within-yearly", "one a year within `TIME`", &f.policy.WithinYearly},
	} {
		fs.Var((*spanFlag)(k.to), k.name, "keep "+k.what)
	}
	fs.StringArrayVar(&f.keepTags, "keep-tag", nil, "keep snapshots with this `tag`, or with all of tag,tag; may be repeated")
	fs.StringVar(&f.groupBy, "group-by", "host,paths", "apply the rules to snapshots that share these: `host,paths,tags`, or \"\" for all together")
	f.filter.add(fs, "judge")
	fs.BoolVar(&f.otherPrograms, "other-programs", false, "judge the snapshots of other programs, too")
	fs.BoolVar(&f.removeLastComplete, "remove-last-complete", false, "remove even the last complete snapshot of an instance")
	fs.BoolVarP(&f.dryRun, "dry-run", "n", false, "show what would go, and remove nothing")
	fs.BoolVar(&f.prune, "prune", false, "then give back the space, as holdfast prune does")
	f.pruning.add(fs)
	return c
}

// filterFlags select snapshots.
type filterFlags struct{ hosts, paths, tags []string }

func (f *filterFlags) add(fs *pflag.FlagSet, do string) {
	fs.StringArrayVar(&f.hosts, "host", nil, do+" only snapshots of this `host`; may be repeated")
	fs.StringArrayVar(&f.tags, "tag", nil, do+" only snapshots with this `tag`, or with all of tag,tag; may be repeated")
	fs.StringArrayVar(&f.paths, "path", nil, do+" only snapshots of this `path`; may be repeated")
}

func (f *filterFlags) filter() maintain.Filter {
	return maintain.Filter{Hosts: f.hosts, Paths: f.paths, Tags: tagLists(f.tags)}
}

// tagLists splits each list at its commas, as restic does.
func tagLists(lists []string) [][]string {
	var out [][]string
	for _, l := range lists {
		tags := strings.Split(l, ",")
		for i := range tags {
			tags[i] = strings.TrimSpace(tags[i])
		}
		out = append(out, tags)
	}
	return out
}

type countFlag retention.Count

func (c *countFlag) String() string { return retention.Count(*c).String() }
func (c *countFlag) Type() string   { return "N" }
func (c *countFlag) Set(s string) error {
	n, err := retention.ParseCount(s)
	*c = countFlag(n)
	return err
}

type spanFlag retention.Span

func (s *spanFlag) String() string { return retention.Span(*s).String() }
func (s *spanFlag) Type() string   { return "TIME" }
func (s *spanFlag) Set(v string) error {
	p, err := retention.ParseSpan(v)
	*s = spanFlag(p)
	return err
}

func (a *app) forgetSnapshots(ctx context.Context, f *forgetFlags, names []string) error {
	f.policy.Tags = tagLists(f.keepTags)
	group, err := retention.ParseGroupBy(f.groupBy)
	if err != nil {
		return withCode(exitUsage, fmt.Errorf("--group-by: %w", err))
	}
	switch {
	case len(names) > 0 && a.onLine("keep-"):
		return usageError("forget takes either snapshots or rules to keep some, not both")
	case len(names) == 0 && f.policy.Empty():
		return ui.WithHints(usageError("nothing says what to keep, and forget does not remove everything"),
			"Name snapshots, or rules such as --keep-daily 7.")
	}
	pruning, err := f.pruning.options()
	if err != nil {
		return err
	}
	return a.withRepository(ctx, f.pruning.repo(), writeLock(f.dryRun), func(ctx context.Context, r *repo.Repository) error {
		list, listErr := snapshot.List(ctx, r)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if listErr != nil {
			a.ui.Warn("some snapshots cannot be read and are left alone: %v", listErr)
		}
		o := maintain.ForgetOptions{Filter: f.filter.filter(), RemoveLastComplete: f.removeLastComplete, Progress: a.ui.Sink()}
		if len(names) > 0 {
			if o.Remove, err = a.snapshotIDs(ctx, r, list, names); err != nil {
				return err
			}
		} else {
			o.Policy, o.GroupBy, o.OtherPrograms = f.policy, group, f.otherPrograms
		}
		if err := a.loadIndex(ctx, r); err != nil {
			return err
		}
		plan, err := maintain.PlanForget(ctx, r, list, o)
		if err != nil {
			return explainForget(err)
		}
		a.showForget(list, plan, f.dryRun)
		removed := 0
		if f.prune {
			remove := slices.DeleteFunc(slices.Clone(list), func(s *snapshot.Snapshot) bool { return !slices.Contains(plan.Remove, s.ID()) })
			if f.pruning.replica.gone, err = replicaPlaces(ctx, r, remove); err != nil {
				return err
			}
		}
		if !f.dryRun {
			if removed, err = maintain.Forget(ctx, r, plan); err != nil {
				return explainForget(fmt.Errorf("removed %d of %s: %w", removed, ui.Count(int64(len(plan.Remove)), "snapshot"), err))
			}
		}
		// Also if nothing was removed now: an earlier run may have been stopped before its prune.
		var pruned *repo.PruneStats
		if f.prune {
			if pruned, err = a.pruneRepository(ctx, r, pruning, &f.pruning.replica, plan.Remove, f.dryRun); err != nil {
				return fmt.Errorf("removed %s, but not what they alone need: %w", ui.Count(int64(removed), "snapshot"), err)
			}
		}
		a.forgotten(plan, removed, f.dryRun, pruned)
		return nil
	})
}

// onLine reports whether a flag whose name begins so was set on the command line.
func (a *app) onLine(prefix string) bool {
	for name, o := range a.set {
		if strings.HasPrefix(name, prefix) && o.Layer == settings.Flag {
			return true
		}
	}
	return false
}

// explainForget adds what only the command line knows.
func explainForget(err error) error {
	var last *maintain.LastCompleteError
	switch {
	case errors.As(err, &last):
		return ui.WithHints(fmt.Errorf("nothing was removed: %w", err),
			"A snapshot that is incomplete does not count. `holdfast snapshots` tells which are complete.",
			"--remove-last-complete removes it all the same; then nothing complete is left of that instance here.")
	case errors.Is(err, repo.ErrNoRemoval):
		return ui.WithHints(err, appendOnlyHint)
	}
	return err
}

// snapshotIDs finds the snapshots with these names. A record that cannot be read has an id as well.
func (a *app) snapshotIDs(ctx context.Context, r *repo.Repository, list []*snapshot.Snapshot, names []string) ([]id.ID, error) {
	var out []id.ID
	seen := map[id.ID]bool{}
	for _, name := range names {
		var d id.ID
		s, err := snapshot.Find(list, name)
		if err == nil {
			d = s.ID()
		} else {
			var nf *snapshot.NotFoundError
			if !errors.As(err, &nf) || nf.Count > 0 {
				return nil, err
			}
			unread, ferr := r.FindFile(ctx, backend.SnapshotFile, name)
			if ferr != nil {
				if ctx.Err() != nil {
					return nil, context.Cause(ctx)
				}
				return nil, err
			}
			d = unread
		}
		if !seen[d] {
			seen[d] = true
			out = append(out, d)
		}
	}
	return out, nil
}

// decisionRow is what is told of a snapshot.
type decisionRow struct {
	Event    string    `json:"event"`
	ID       string    `json:"id"`
	ShortID  string    `json:"short_id"`
	Time     time.Time `json:"time"`
	Hostname string    `json:"hostname"`
	Paths    []string  `json:"paths"`
	Tags     []string  `json:"tags"`
	Keep     bool      `json:"keep"`
	Reasons  []string  `json:"reasons"`
}

func newDecisionRow(s *retention.Snapshot, keep bool, reasons []string) decisionRow {
	return decisionRow{
		Event: "decision", ID: s.ID.String(), ShortID: s.ID.Short(), Time: s.Time.UTC(), Hostname: s.Host,
		Paths: append([]string{}, s.Paths...), Tags: append([]string{}, s.Tags...), Keep: keep, Reasons: append([]string{}, reasons...),
	}
}

// showForget tells for each snapshot that was judged why it stays or goes.
func (a *app) showForget(list []*snapshot.Snapshot, plan *maintain.ForgetPlan, dryRun bool) {
	goes := "remove"
	if dryRun {
		goes = "would remove"
	}
	if plan.Groups == nil {
		byID := map[id.ID]*snapshot.Snapshot{}
		for _, s := range list {
			byID[s.ID()] = s
		}
		for _, d := range plan.Remove {
			s := byID[d]
			if s == nil {
				s = &snapshot.Snapshot{}
			}
			if a.ui.JSON() {
				a.ui.Object(newDecisionRow(&retention.Snapshot{ID: d, Time: s.Time, Host: s.Hostname, Paths: s.Paths, Tags: s.Tags}, false, nil))
				continue
			}
			if s.Tree == nil {
				a.ui.Text(goes + " " + d.Short() + ", whose record cannot be read: named")
				continue
			}
			a.ui.Text(fmt.Sprintf("%s %s of %s: named", goes, d.Short(), s.Time.Local().Format(time.DateTime)))
		}
		return
	}
	for n, g := range plan.Groups {
		if a.ui.JSON() {
			for _, d := range g.Decisions {
				a.ui.Object(newDecisionRow(d.Snapshot, d.Keep, d.Reasons))
			}
			continue
		}
		if n > 0 {
			a.ui.Text("")
		}
		if name := groupName(g.Key); name != "" {
			a.ui.Text(name)
		}
		var rows [][]string
		for _, d := range g.Decisions {
			what, why := "keep", strings.Join(d.Reasons, ", ")
			switch {
			case !d.Keep:
				what, why = goes, "no rule keeps it"
			case d.Protected:
				why = "no rule keeps it, but it is the last complete snapshot of the instance"
			}
			rows = append(rows, []string{what, d.ID.Short(), d.Time.Local().Format(time.DateTime), ui.Clean(why)})
		}
		a.ui.Text(ui.Table([]string{"", "ID", "Time", "Why"}, rows)...)
	}
	if len(plan.Groups) > 0 && !a.ui.JSON() && !a.ui.Quiet() {
		a.ui.Text("")
	}
}

// groupName names a group for people.
func groupName(k retention.Key) string {
	var parts []string
	if k.Host != "" {
		parts = append(parts, "host "+ui.Quote(k.Host))
	}
	quoted := func(what string, list []string) {
		if len(list) == 0 {
			return
		}
		q := make([]string, len(list))
		for i, s := range list {
			q[i] = ui.Quote(s)
		}
		parts = append(parts, what+" "+strings.Join(q, ", "))
	}
	quoted("paths", k.Paths)
	quoted("tags", k.Tags)
	return strings.Join(parts, "; ")
}

// forgetSummary is the final object of forget.
type forgetSummary struct {
	Event   string `json:"event"`
	Verb    string `json:"verb"`
	DryRun  bool   `json:"dry_run"`
	Kept    int    `json:"kept"`
	Removed int    `json:"removed"`
	Others  int    `json:"others"`
	// Prune is there with --prune.
	Prune *repo.PruneStats `json:"prune,omitempty"`
}

func (a *app) forgotten(plan *maintain.ForgetPlan, removed int, dryRun bool, pruned *repo.PruneStats) {
	if dryRun {
		removed = len(plan.Remove)
	}
	kept := 0
	for _, g := range plan.Groups {
		for _, d := range g.Decisions {
			if d.Keep {
				kept++
			}
		}
	}
	switch {
	case a.ui.JSON():
		a.ui.Object(forgetSummary{"summary", "forget", dryRun, kept, removed, plan.Others, pruned})
	case !a.ui.Quiet():
		what := "removed"
		if dryRun {
			what = "dry run, nothing removed: would remove"
		}
		line := fmt.Sprintf("%s %s", what, ui.Count(int64(removed), "snapshot"))
		if plan.Groups != nil {
			line += fmt.Sprintf(", kept %d", kept)
		}
		if plan.Others > 0 {
			line += fmt.Sprintf(", left %d alone", plan.Others)
		}
		a.ui.Text(line)
	}
}
