package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/cpus"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/restore"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// restoreFlags are the flags of restore. In place, --base-data-path, --config-dir and --map are the
// destination.
type restoreFlags struct {
	place                    placeFlags
	start                    freezeFlags
	overwrite, trustTimes    bool
	dryRun, noLock, allowVer bool
	dropIDCache              bool
	fromView                 bool
	owner                    string
	only                     []string
	environmentDir           string
	reindex                  string
	to                       toFlags
	live                     liveFlags
	inPlace, reportLost      bool
	saveNewer                string
	objects                  objectFlags
}

// restoreLimits is what --memory leaves to a restore.
func (a *app) restoreLimits() restore.Limits {
	return restore.Limits{Workers: min(a.mem.Workers, cpus.Count()), Windows: a.mem.Windows, Batch: a.mem.Batch, ObjectRoom: a.mem.Objects}
}

func (a *app) restoreCommand() *cobra.Command {
	var f restoreFlags
	c := &cobra.Command{
		Use:   "restore SNAPSHOT[:SPACE/PATH] | --from-view [NAME]",
		Short: "Put the whole instance back, or get single files and folders",
		Long: `Put the whole instance back, to where it was or elsewhere, or with --to get a file, a
folder or a space as a folder, tar or zip.

` + addressHelp + `

With --to DIR the folder then holds the file, or what is in the folder. Files that are
right already are not written again; one that is in the way is renamed, or with
--keep-existing left alone. Contents are compared with the checksums that the server
recorded. --version and --trash get older versions and deleted items.

With --in-place the same goes into the storage of the instance, which must be stopped:
with its ids, versions and trash, as the server itself would have left it. A space that
was purged comes back with its members. What is in the way is moved into a dated folder,
and what has taken the name meanwhile into the trash. An interrupted one goes on when it
is run again.

With --report-lost nothing is restored: it lists what the instance has that is newer than
the snapshot. A restore of the whole would lose that, and clients that sync would delete
it as well, since the server has no way to tell them. --save-newer keeps copies of it.

All else is about whole instances.

The destination must be empty. With --overwrite only what differs is written, and what
is in the way is moved into a dated folder beside it. Nothing is ever restored onto a
running instance. An interrupted restore goes on when it is run again.

Blobs go back into the bucket that the snapshot names, or into the one of --bucket; only
what is missing or different is written. With --to-driver an instance changes between
a bucket and local blobs: s3ng and ocis, decomposeds3 and decomposed.

--from-view is the fast way back after a mishap: it restores from views that
"holdfast backup --keep-views" left on the filesystems, without the repository, over what
is there, as with --overwrite. NAME is one that "holdfast views" lists; without it the
latest is taken. Where the filesystem can share contents, nothing is copied.

The server at the destination must have the version that the snapshot was made with:
restoring and updating are different tasks. Where Holdfast can tell the version (from
--server-binary, --container or what is installed), it stops if it is another one.

What configured the instance from outside (environment files, compose files, units) is
not put back, because its place belongs to the machine; --environment-dir writes it
into a folder to look at.

` + liveHelp + `
` + exitHelp(append([]int{exitNotStarted}, repoCodes...)...),
		Example: `  holdfast restore 'latest:personal/alan/Round 0' --to /tmp/alan
  holdfast restore latest:project/project-alpha-0 --to project.zip
  holdfast restore latest:personal/alan --in-place
  holdfast restore latest
  holdfast restore latest --base-data-path /srv/new/data --config-dir /srv/new/config
  holdfast restore 'latest:personal/alan/Round 0' --live --user alan --token-file alan.token
  holdfast restore latest --start-command 'systemctl start ocis' \
      --reindex-command 'ocis search index --all-spaces'
  holdfast restore --from-view --start-command 'systemctl start ocis'`,
		Args: func(c *cobra.Command, got []string) error {
			if f.fromView {
				return args(0, 1, "at most one argument with --from-view, the name of the view")(c, got)
			}
			return args(1, 1, "one argument, SNAPSHOT or SNAPSHOT:SPACE/PATH")(c, got)
		},
		RunE: a.verb(func(ctx context.Context, args []string) error {
			if f.fromView {
				if f.live.live || f.to != (toFlags{}) || f.inPlace || f.reportLost || f.saveNewer != "" {
					return usageError("--from-view puts back the whole instance; it excludes --live, --to, --in-place, --report-lost and --save-newer")
				}
				if err := a.onlyLive(); err != nil {
					return err
				}
				return a.restoreView(ctx, strings.Join(args, ""), &f)
			}
			if f.live.live && (f.inPlace || f.reportLost || f.saveNewer != "") {
				return usageError("--live excludes --in-place, --report-lost and --save-newer")
			}
			if f.live.live {
				return a.restoreLive(ctx, args[0], f.to, &f.live, f.dryRun, f.noLock)
			}
			if err := a.onlyLive(); err != nil {
				return err
			}
			if f.reportLost || f.saveNewer != "" {
				return a.reportLost(ctx, args[0], &f)
			}
			if f.inPlace {
				return a.restoreInPlace(ctx, args[0], &f)
			}
			if f.to != (toFlags{}) || isSpaceAddress(args[0]) {
				return a.restoreTo(ctx, args[0], &f)
			}
			return a.restore(ctx, args[0], &f)
		}),
	}
	p, fs := &f.place, c.Flags()
	fs.StringVar(&f.to.to, "to", "", "get SPACE/PATH into this `directory`, or as this file if its name ends in .tar or .zip")
	f.to.pick.add(c)
	fs.BoolVar(&f.to.keep, "keep-existing", false, "with --to: leave alone what exists and differs")
	fs.BoolVar(&f.inPlace, "in-place", false, "put SPACE/PATH back into the storage of the stopped instance, exactly")
	fs.BoolVar(&f.reportLost, "report-lost", false, "restore nothing, list what is newer than the snapshot")
	fs.StringVar(&f.saveNewer, "save-newer", "", "restore nothing, copy what is newer than the snapshot into this `directory`, by name")
	fs.StringVar(&p.baseDataPath, "base-data-path", "", "`directory` to restore the base data path to (default: where it was)")
	fs.StringVar(&p.configDir, "config-dir", "", "`directory` to restore the configuration to (default: where it was)")
	fs.StringArrayVar(&p.maps, "map", nil, "restore what was at OLD to NEW: `OLD=NEW`; OLD may be the server's own name of it; may be repeated")
	fs.BoolVar(&f.overwrite, "overwrite", false, "restore onto what is there; what is in the way is moved aside")
	fs.BoolVar(&f.fromView, "from-view", false, "restore from views that a backup left on the filesystems")
	fs.BoolVar(&f.dropIDCache, "drop-id-cache", false, "leave out the id cache of the posix driver, which holds old paths; the server makes it anew")
	fs.BoolVar(&f.trustTimes, "trust-times", false, "with --overwrite: do not read files whose size and time are right")
	fs.StringVar(&f.owner, "owner", "", "give everything to `UID:GID` instead of the recorded owners")
	fs.StringArrayVar(&f.only, "only", nil, "restore this data `set` only; may be repeated")
	fs.BoolVarP(&f.dryRun, "dry-run", "n", false, "change nothing, tell what would be done")
	fs.BoolVar(&f.allowVer, "allow-version", false, "restore although the server here has another version")
	fs.StringVar(&p.serverBinary, "server-binary", "", "the program `file` of the server here, to ask it for its version")
	fs.StringVar(&p.container, "container", "", "the Docker `container` of the server here, to tell its version")
	fs.StringArrayVar(&p.envFiles, "env-file", nil, "environment `file` of the server here, for the keys of its bucket; may be repeated")
	fs.StringVar(&p.unit, "unit", "", "the systemd `unit` of the server here, to find its program")
	fs.StringVar(&f.environmentDir, "environment-dir", "", "write what configured the instance from outside into this `directory`")
	fs.StringVar(&f.start.start, "start-command", "", "shell `command` that starts the instance after the restore")
	f.start.addStart(c)
	fs.StringVar(&f.reindex, "reindex-command", "", "shell `command` that makes the search index anew; run after the start\nif the snapshot holds no index")
	f.objects.add(c)
	noLockFlag(c, &f.noLock)
	f.live.add(c)
	return c
}

func (a *app) restore(ctx context.Context, arg string, f *restoreFlags) error {
	if f.reindex != "" && f.start.start == "" {
		return ui.WithHints(usageError("--reindex-command needs --start-command: the running instance makes its index"),
			"Set --start-command, or run the command yourself after the start.")
	}
	owner, err := parseOwner(f.owner)
	if err != nil {
		return err
	}
	maps, err := parseMaps(f.place.maps)
	if err != nil {
		return err
	}
	what, path := snapshot.Split(arg)
	if path != "/" {
		return ui.WithHints(usageError("restore puts back whole instances, not the path %s of a snapshot", ui.Quote(path)),
			"--to puts it into a folder, --live into the running instance, --in-place into the storage of the stopped one.")
	}
	release := func() {}
	defer func() { release() }()
	var plan *restore.Plan
	var sn *snapshot.Snapshot
	var env []environmentFile
	err = a.withRepository(ctx, repoOptions{}, readLock(f.noLock), func(ctx context.Context, r *repo.Repository) error {
		if sn, err = a.findSnapshot(ctx, r, what); err != nil {
			return err
		}
		if err := a.loadIndex(ctx, r); err != nil {
			return err
		}
		o := restore.Options{
			BasePath: f.place.baseDataPath, ConfigDir: f.place.configDir, Overwrite: f.overwrite, TrustTimes: f.trustTimes,
			Owner: owner, DryRun: f.dryRun, Only: f.only, Progress: a.ui.Sink(),
			Limits: a.restoreLimits(),
		}
		if sn.Tree != nil {
			// Without a manifest there is nothing to translate; MakePlan says what is wrong.
			if m, err := snapshot.LoadManifest(ctx, r, *sn.Tree); err == nil {
				o.Map = hostMaps(m, maps)
				o.BasePath = moved(o.BasePath, m.BasePath)
				o.ConfigDir = moved(o.ConfigDir, m.ConfigDir)
				if o.Objects, err = a.restoreObjects(ctx, m, f); err != nil {
					return cannotRestore(sn, err)
				}
				defer closeObjects(o.Objects)
			}
		}
		if plan, err = restore.MakePlan(ctx, r, sn, o); err != nil {
			return cannotRestore(sn, err)
		}
		for _, w := range plan.Warnings {
			a.ui.Warn("%s", w)
		}
		if n := len(plan.Manifest.Proof.Missing); !plan.Manifest.Proof.Complete {
			a.ui.Warn("the snapshot is incomplete, %s missing: `holdfast check` lists what", ui.Count(int64(n), "blob"))
		}
		if release, err = a.nothingRuns(ctx, plan.BasePath(), plan.Paths(), f.dryRun); err != nil {
			return cannotRestore(sn, err)
		}
		if err := a.sameVersion(ctx, plan, f); err != nil {
			return cannotRestore(sn, err)
		}
		if env, err = environment(ctx, r, sn); err != nil {
			return cannotRestore(sn, err)
		}
		if err := r.Settled(ctx); err != nil {
			return err
		}
		res, err := restore.Run(ctx, r, plan)
		if res != nil {
			a.showRestore(restored{snapshot: sn.ID().String()}, plan, res, env, f)
		}
		if err != nil {
			return cannotRestore(sn, err)
		}
		if f.environmentDir != "" && !f.dryRun {
			if err := writeEnvironment(ctx, r, env, f.environmentDir); err != nil {
				return fmt.Errorf("the instance is restored, but what configured it from outside could not be written: %w", err)
			}
		}
		return nil
	})
	if err != nil || f.dryRun {
		return err
	}
	if err := a.idCache(plan, f.dropIDCache); err != nil {
		return err
	}
	return a.startRestored(ctx, plan, f)
}

func cannotRestore(sn *snapshot.Snapshot, err error) error {
	return fmt.Errorf("restore of snapshot %s: %w", sn.ID().Short(), err)
}

func parseOwner(s string) (*restore.Owner, error) {
	if s == "" {
		return nil, nil
	}
	u, g, _ := strings.Cut(s, ":")
	uid, err1 := strconv.ParseUint(u, 10, 31)
	gid, err2 := strconv.ParseUint(g, 10, 31)
	if err1 != nil || err2 != nil {
		return nil, usageError("--owner is UID:GID in numbers, such as 1000:1000, not %q", s)
	}
	return &restore.Owner{UID: int(uid), GID: int(gid)}, nil
}

// nothingRuns refuses a destination that something uses, and keeps it from being frozen until release
// is called, which may be done more than once.
func (a *app) nothingRuns(ctx context.Context, base string, paths []string, dryRun bool) (release func(), err error) {
	release = func() {}
	if !dryRun && base != "" {
		if release, err = freeze.Hold(a.opt.stateDir, base); err != nil {
			return func() {}, err
		}
	}
	use, err := freeze.Look(ctx, paths)
	if err == nil {
		for _, l := range use.Limits {
			a.ui.Warn("%s", l)
		}
		if err = use.Err(); err != nil && dryRun {
			a.ui.Warn("a restore would be refused: %v", err)
			err = nil
		}
	}
	if err != nil {
		release()
		return func() {}, err
	}
	return release, nil
}

// startRestored starts the instance, if that is wanted, and has its index made anew.
func (a *app) startRestored(ctx context.Context, plan *restore.Plan, f *restoreFlags) error {
	if f.start.start == "" {
		return nil
	}
	// The freezer knows how to start and to wait; there is nothing to stop.
	f.start.stop, f.start.method = ":", "command"
	f.start.stopTimeout, f.start.maxDowntime = freeze.DefaultStopTimeout, freeze.DefaultMaxDowntime
	fz, err := f.start.freezer(0, a.ui.Sink())
	if err != nil {
		return err
	}
	inst := &ocis.Instance{}
	for _, t := range plan.Targets {
		inst.DataSets = append(inst.DataSets, ocis.DataSet{Name: t.DataSet, Path: t.To, Found: true})
	}
	inst.BasePath = inst.DataSets[0].Path
	a.ui.Info("starting the instance")
	a.held.Store(true)
	defer a.held.Store(false)
	frozen, err := fz.Freeze(ctx, inst)
	if err == nil {
		err = frozen.Thaw(context.WithoutCancel(ctx))
	}
	if err != nil {
		return fmt.Errorf("the instance is restored, but: %w", err)
	}
	if f.reindex == "" || !indexMissing(plan.Manifest) {
		return nil
	}
	a.ui.Info("making the search index anew")
	if err := a.shell(ctx, f.reindex); err != nil {
		return ui.WithHints(fmt.Errorf("the instance is restored and runs, but the search index was not made: %w", err), indexHint(plan.Manifest))
	}
	return nil
}

// indexMissing tells whether the search index was left out of the snapshot.
func indexMissing(m *snapshot.Manifest) bool {
	for _, d := range m.DataSets {
		if d.Name == "search" {
			return !d.Captured
		}
	}
	return false
}

// indexHint tells how to make the index anew (product reference, "Regenerating what was not restored").
func indexHint(m *snapshot.Manifest) string {
	bin := "ocis"
	if m.Product == string(ocis.OpenCloud) {
		bin = "opencloud"
	}
	return fmt.Sprintf("Make the search index anew once the instance runs: `%s search index --all-spaces`.", bin)
}

// restored names what is restored: a snapshot, or a view and the snapshot that was made from it, if any.
type restored struct{ view, snapshot string }

func (r restored) String() string {
	if r.view != "" {
		return "view " + r.view
	}
	return "snapshot " + r.snapshot[:8]
}

// restoreSummary is the final object of a restore.
type restoreSummary struct {
	Event    string `json:"event"`
	Verb     string `json:"verb"`
	DryRun   bool   `json:"dry_run"`
	Snapshot string `json:"snapshot,omitempty"`
	View     string `json:"view,omitempty"`
	*restore.Result
	Seconds      float64  `json:"seconds"`
	Environment  []string `json:"environment"`
	IndexMissing bool     `json:"index_missing"`
	Crash        bool     `json:"crash_consistent,omitempty"`
}

func (a *app) showRestore(what restored, plan *restore.Plan, res *restore.Result, env []environmentFile, f *restoreFlags) {
	names := []string{}
	for _, e := range env {
		names = append(names, e.name)
	}
	if a.ui.JSON() {
		a.ui.Object(restoreSummary{
			"summary", "restore", f.dryRun, what.snapshot, what.view, res, res.Elapsed.Seconds(), names, indexMissing(plan.Manifest), plan.Manifest.Freeze.CrashConsistent,
		})
		return
	}
	if !a.ui.Quiet() {
		verb := "restored %s (%s) in %s"
		if f.dryRun {
			verb = "dry run, nothing changed; restoring %s (%s) would do this; took %s"
		}
		m := plan.Manifest
		product := cmp.Or(strings.TrimSpace(m.Product+" "+m.ProductVersion), "unknown product")
		a.ui.Text(fmt.Sprintf(verb, what, ui.Quote(product), ui.Duration(res.Elapsed)))
		var rows [][]string
		for _, d := range res.DataSets {
			rows = append(rows, []string{
				ui.Quote(d.Name), strconv.FormatInt(d.Files, 10), strconv.FormatInt(d.Unchanged, 10), ui.Bytes(d.Bytes),
				strconv.FormatInt(d.MovedAside, 10), ui.Quote(d.Path),
			})
		}
		a.ui.Text(ui.Table([]string{"Data set", ">Written", ">Unchanged", ">Size", ">Moved", "Location"}, rows)...)
		for _, b := range res.Buckets {
			a.ui.Text(fmt.Sprintf("bucket %s at %s: %s written (%d of them replaced, %s), %d unchanged", ui.Quote(b.Bucket), ui.Quote(b.Endpoint),
				ui.Count(b.Put+b.Replaced, "object"), b.Replaced, ui.Bytes(b.Bytes), b.Unchanged))
			if b.Aside != "" {
				a.ui.Text("  copies of what was replaced are below " + ui.Quote(b.Aside))
			}
			if b.Extra > 0 {
				a.ui.Text(fmt.Sprintf("  %s the snapshot does not have, %d deleted", ui.Count(b.Extra, "object"), b.Deleted))
			}
		}
		for _, p := range res.Aside {
			a.ui.Text("what was in the way is in " + ui.Quote(p))
		}
	}
	if len(env) > 0 && !a.ui.Quiet() {
		lines := []string{"", "Configured from outside; compare it with this machine, and put it where the server reads it:"}
		for _, e := range env {
			lines = append(lines, fmt.Sprintf("  %s (%s)", ui.Quote(e.name), ui.Bytes(int64(e.node.Size))))
		}
		where := "--environment-dir DIR writes these files into a folder; they may hold secrets"
		if f.environmentDir != "" {
			where = "they are written into " + ui.Quote(f.environmentDir)
		}
		a.ui.Text(append(lines, where)...)
	}
	if indexMissing(plan.Manifest) && f.reindex == "" && !f.dryRun {
		a.ui.Info("the snapshot holds no search index. %s", indexHint(plan.Manifest))
	}
}

// errOtherVersion is wrapped in the refusal of a destination with another version.
var errOtherVersion = errors.New("the server here has another version")

// absent tells whether nothing is at any of the paths.
func absent(paths []string) bool {
	for _, p := range paths {
		if d, err := os.ReadDir(p); err == nil && len(d) > 0 {
			return false
		}
	}
	return true
}
