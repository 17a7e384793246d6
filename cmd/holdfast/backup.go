package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/backup"
	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// backupFlags are the flags of backup.
type backupFlags struct {
	place                           placeFlags
	freeze                          freezeFlags
	view                            viewFlags
	blobs                           blobFlags
	cold                            bool
	targetDowntime                  time.Duration
	repo                            repoOptions
	excludeIndex, excludeThumbnails bool
	saveImage, dryRun, fullScan     bool
	host                            string
	tags                            []string
}

func (a *app) backupCommand() *cobra.Command {
	var f backupFlags
	c := &cobra.Command{
		Use:   "backup",
		Short: "Back up the whole instance",
		Long: `Back up the whole instance into the repository: configuration, system data, metadata
and blobs, at one moment. Every file, version and trashed item that the metadata
names must be in the snapshot; if something is missing at the source, the snapshot is
kept, is called incomplete, and the exit code is 3.

While it is read nothing may write to the instance, which is proven, not believed.
--freeze says how it is stopped and started:

` + wayHelp() + `
It is started again whatever happens: a guard process does that if this one is killed,
hangs, or takes longer than --max-downtime; then the backup is given up.

Where the filesystems can make snapshots of all the data, it is stopped only for as long
as that takes, and the views are read afterwards. --view says how:

` + viewHelp() + `
Elsewhere what is new is copied before the stop, again and again until what is left can be
read within --target-downtime; then only what changed since is read during the stop.

Blobs that are stored already are not read again.

` + blobHelp + exitHelp(append([]int{exitIncomplete, exitNotStarted}, repoCodes...)...),
		Example: `  holdfast backup --base-data-path /var/lib/ocis --config-dir /etc/ocis --freeze none
  holdfast backup --stop-command 'systemctl stop ocis' --start-command 'systemctl start ocis'
  holdfast backup --freeze process --ready-url https://localhost:9200/healthz`,
		Args: args(0, 0, "no arguments"),
		RunE: a.verb(func(ctx context.Context, _ []string) error { return explainBackup(a.backup(ctx, &f)) }),
	}
	f.place.add(c)
	f.freeze.add(c)
	f.view.add(c)
	f.blobs.add(c)
	fs := c.Flags()
	fs.BoolVar(&f.cold, "cold", false, "read nothing before the stop")
	fs.DurationVar(&f.targetDowntime, "target-downtime", backup.DefaultTargetDowntime, "go on copying before the stop until this would do for the rest")
	fs.BoolVar(&f.excludeIndex, "exclude-index", false, "leave the search index out; it must be made anew after a restore")
	fs.BoolVar(&f.excludeThumbnails, "exclude-thumbnails", false, "leave thumbnails out; the server makes them anew")
	fs.BoolVar(&f.saveImage, "save-image", false, "save the container image itself, too")
	fs.StringVar(&f.host, "host", "", "`name` of this machine in the snapshot (default: its host name)")
	fs.StringArrayVar(&f.tags, "tag", nil, "add this `tag` to the snapshot; may be repeated")
	fs.BoolVarP(&f.dryRun, "dry-run", "n", false, "read and prove, but write nothing into the repository")
	fs.BoolVar(&f.fullScan, "full-scan", false, "look at everything, also at what the server cannot have changed since the last backup")
	fs.StringVar(&f.repo.compression, "compression", "auto", "`mode`: auto, off or max")
	fs.IntVar(&f.repo.packSize, "pack-size", 0, "size of the repository's files in `MiB`, 4 to 128 (default 16)")
	return c
}

func (a *app) backup(ctx context.Context, f *backupFlags) error {
	sink := a.ui.Sink()
	fz, err := f.freeze.freezer(f.place.pid, sink)
	if err != nil {
		return err
	}
	where, err := f.place.options(a)
	if err != nil {
		return err
	}
	where.NoSizes = true
	blobs, err := a.blobOptions(&f.blobs)
	if err != nil {
		return err
	}
	if f.targetDowntime <= 0 {
		return usageError("--target-downtime must be longer than nothing, not %s", f.targetDowntime)
	}
	a.removeLeftViews(ctx)
	if f.host == "" {
		if f.host, err = os.Hostname(); err != nil {
			return ui.WithHints(fmt.Errorf("cannot tell the name of this machine: %w", err), "Set --host.")
		}
	}
	var res *backup.Result
	var rec freeze.Record
	guard := f.freeze.guard(a)
	guard.Observe = func(r freeze.Record) { rec = r }
	dctx, cancel := context.WithCancel(ctx)
	defer cancel()
	instance := discovered(dctx, where)
	err = a.withRepository(ctx, f.repo, lockShared, func(ctx context.Context, r *repo.Repository) error {
		inst, err := instance()
		if err != nil {
			return fmt.Errorf("cannot find the instance: %w", err)
		}
		for _, w := range inst.Warnings {
			a.ui.Warn("%s", w)
		}
		if fz, err = f.freeze.settle(ctx, fz, inst, sink); err != nil {
			return err
		}
		drivers, err := a.backupDrivers(&f.view, fz.Method())
		if err != nil {
			return err
		}
		if err := a.loadIndex(ctx, r); err != nil {
			return err
		}
		a.warnHot(fz.Method())
		// From here on a second signal must not end the program before the instance runs again.
		a.held.Store(stops(fz.Method()))
		defer a.held.Store(false)
		res, err = backup.Run(ctx, backup.Options{
			Instance: inst, Repo: r, Freezer: fz, Guard: guard, CacheDir: a.cacheDir(),
			Blobs: blobs, Views: drivers, KeepViews: f.view.keep, Cold: f.cold, TargetDowntime: f.targetDowntime,
			ExcludeIndex: f.excludeIndex, ExcludeThumbnails: f.excludeThumbnails,
			ServerBinary: f.place.serverBinary, SaveImage: f.saveImage, Hostname: f.host, Tags: f.tags,
			Limits: capture.Limits{Workers: a.mem.Workers, Compressors: a.mem.Compressors, Spaces: a.mem.Spaces, Ahead: a.mem.Ahead, Look: a.mem.Look},
			DryRun: f.dryRun, FullScan: f.fullScan, Progress: a.untilThawed(sink), Version: version,
		})
		if res != nil && !f.dryRun {
			a.prolongLocks(ctx, r)
		}
		return explainNotReady(hintRunning(err, fz.Method()))
	})
	if res != nil { // also when the instance did not start again after a good backup
		a.showBackup(res, rec, f.dryRun)
	}
	switch {
	case err != nil:
		return err
	case !res.Manifest.Proof.Complete && f.dryRun:
		return withCode(exitIncomplete, errors.New("the snapshot would be incomplete"))
	case !res.Manifest.Proof.Complete:
		return ui.WithHints(withCode(exitIncomplete, errors.New("the snapshot is incomplete")),
			"It is kept, and everything that is not in the list can be restored from it.",
			"The blobs are missing at the source: an older snapshot may still have them.")
	}
	return nil
}

// discovered looks for the instance while the repository is opened. The function that it returns waits for what
// was found.
func discovered(ctx context.Context, o discover.Options) func() (*ocis.Instance, error) {
	type found struct {
		inst *ocis.Instance
		err  error
	}
	c := make(chan found, 1)
	go func() {
		inst, err := discover.Discover(ctx, o)
		c <- found{inst, err}
	}()
	return func() (*ocis.Instance, error) {
		f := <-c
		return f.inst, f.err
	}
}

// untilThawed notes when the instance runs again.
func (a *app) untilThawed(sink progress.Sink) progress.Sink {
	return func(e progress.Event) {
		if e.Phase == "thaw" && e.Kind == progress.Finish {
			a.held.Store(false)
		}
		sink(e)
	}
}

// backupSummary is the final object of a backup.
type backupSummary struct {
	Event          string          `json:"event"`
	Verb           string          `json:"verb"`
	DryRun         bool            `json:"dry_run"`
	Snapshot       string          `json:"snapshot,omitempty"`
	Parent         string          `json:"parent,omitempty"`
	Product        string          `json:"product"`
	ProductVersion string          `json:"product_version"`
	Files          int64           `json:"files"`
	Folders        int64           `json:"folders"`
	Bytes          int64           `json:"bytes"`
	Entries        int64           `json:"entries"`
	EntriesTaken   int64           `json:"entries_taken_over"`
	NewBlobs       int64           `json:"new_blobs"`
	NewBytes       int64           `json:"new_bytes"`
	StoredBytes    int64           `json:"stored_bytes"`
	Seconds        float64         `json:"seconds"`
	Freeze         snapshot.Freeze `json:"freeze"`
	Views          []snapshot.View `json:"views"`
	Proof          snapshot.Proof  `json:"proof"`
}

// maxListed is how many missing blobs the summary for people lists; all are in the manifest.
const maxListed = 1000

func (a *app) showBackup(res *backup.Result, rec freeze.Record, dryRun bool) {
	m, st, p := &res.Manifest, &res.Stats, &res.Manifest.Proof
	if a.ui.JSON() {
		s := backupSummary{
			Event: "summary", Verb: "backup", DryRun: dryRun, Product: m.Product, ProductVersion: m.ProductVersion,
			Files: st.Files, Folders: st.Dirs, Bytes: st.Bytes, Entries: st.Entries, EntriesTaken: st.EntriesTaken, NewBlobs: st.NewBlobs, NewBytes: st.NewBytes,
			StoredBytes: st.StoredBytes, Seconds: st.Duration.Seconds(), Freeze: m.Freeze, Views: m.Views, Proof: *p,
		}
		if s.Proof.Missing == nil {
			s.Proof.Missing = []snapshot.Missing{}
		}
		if !res.SnapshotID.IsNull() {
			s.Snapshot = res.SnapshotID.String()
		}
		if res.Parent != nil {
			s.Parent = res.Parent.String()
		}
		a.ui.Object(s)
		return
	}
	if !a.ui.Quiet() {
		what := "snapshot " + res.SnapshotID.Short() + " made in " + ui.Duration(st.Duration)
		if dryRun {
			what = "dry run, nothing written, took " + ui.Duration(st.Duration)
		}
		if res.Parent != nil {
			what += ", compared with " + res.Parent.Short()
		}
		lines := []string{
			what,
			"  instance: " + ui.Quote(strings.TrimSpace(m.Product+" "+m.ProductVersion)),
			fmt.Sprintf("  holds:    %s, %s, %s", ui.Count(st.Files, "file"), ui.Count(st.Dirs, "folder"), ui.Bytes(st.Bytes)),
			fmt.Sprintf("  new:      %s, %s, stored in %s", ui.Count(st.NewBlobs, "blob"), ui.Bytes(st.NewBytes), ui.Bytes(st.StoredBytes)),
		}
		if line := downtimeLine(rec); line != "" {
			lines = append(lines, "  stopped:  "+line)
		}
		verdict := "complete"
		if !p.Complete {
			verdict = "INCOMPLETE"
		}
		proof := fmt.Sprintf("  proof:    %s: %s, %s, %s; %s with %s", verdict, ui.Count(p.Nodes, "node"), ui.Count(p.Revisions, "version"),
			ui.Count(p.TrashItems, "trashed item"), ui.Count(p.Blobs, "blob"), ui.Bytes(p.Bytes))
		if p.Verified > 0 {
			proof += fmt.Sprintf(", %d of them checked against the server's checksum", p.Verified)
		}
		if p.InFlight > 0 {
			proof += "; " + ui.Count(p.InFlight, "upload") + " in flight"
		}
		a.ui.Text(append(append(lines, proof), bucketLines(m)...)...)
	}
	if !p.Complete {
		a.ui.Text(missingLines(p)...)
	}
}

// bucketLines tell how buckets were secured.
func bucketLines(m *snapshot.Manifest) []string {
	var out []string
	for i := range m.Stores {
		b := m.Stores[i].Bucket
		if b == nil {
			continue
		}
		line := fmt.Sprintf("  bucket:   %s at %s, ", ui.Quote(b.Bucket), ui.Quote(b.Endpoint))
		switch b.Way {
		case snapshot.WayReplica:
			line += fmt.Sprintf("contents in replica %s at %s", ui.Quote(b.Replica.Bucket), ui.Quote(b.Replica.Endpoint))
		case snapshot.WayVersions:
			line += "contents stay there, by their versions"
			if b.LockedUntil != nil {
				line += ", locked until " + b.LockedUntil.Format(time.DateTime) + " UTC at least"
			}
		default:
			line += "contents in the repository"
		}
		if u := b.Unreferenced; u != nil && u.Objects > 0 {
			line += fmt.Sprintf("; %s with %s that nothing refers to", ui.Count(u.Objects, "object"), ui.Bytes(u.Bytes))
		}
		out = append(out, line)
	}
	return out
}

// missingLines lists what a snapshot lacks.
func missingLines(p *snapshot.Proof) []string {
	var out []string
	for _, name := range p.NotCaptured {
		out = append(out, "  not captured: data set "+ui.Quote(name))
	}
	for i, m := range p.Missing {
		if i == maxListed {
			out = append(out, fmt.Sprintf("  and %d more; manifest.json in the snapshot lists them all", len(p.Missing)-i))
			break
		}
		problem := m.Problem
		if problem == "size" || problem == "checksum" {
			problem = "damaged (" + problem + ")"
		}
		line := fmt.Sprintf("  %s: space %s, %s, blob %s", problem, ui.Quote(m.Space), ui.Quote(m.Path), ui.Quote(m.BlobID))
		if m.Detail != "" {
			line += ": " + ui.Clean(m.Detail)
		}
		out = append(out, line)
	}
	for i, u := range p.Unreadable {
		if i == maxListed {
			out = append(out, fmt.Sprintf("  and %d more that could not be read", len(p.Unreadable)-i))
			break
		}
		out = append(out, fmt.Sprintf("  unreadable: %s: %s", ui.Quote(u.Path), ui.Clean(u.Error)))
	}
	return out
}

// explainBackup adds what only the command line knows.
func explainBackup(err error) error {
	if (errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)) && len(ui.Hints(err)) == 0 {
		return ui.WithHints(err, "What was stored stays, and need not be stored again by the next backup.",
			"Make room where the message says. In the repository `holdfast forget` and then `holdfast prune --max-repack-size 0` do, which need next to none themselves.")
	}
	return err
}
