package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/holdfast-backup/holdfast/internal/maintain"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// pruneFlags are the flags of prune, which forget has as well.
type pruneFlags struct {
	maxUnused, maxRepack string
	compression          string
	packSize             int
	replica              replicaFlags
}

func (f *pruneFlags) add(fs *pflag.FlagSet) {
	fs.StringVar(&f.maxUnused, "max-unused", "5%", "leave what is not needed in packs up to this `limit`: a size, a percentage of the repository, or unlimited")
	fs.StringVar(&f.maxRepack, "max-repack-size", "", "pack no more than this `size` again, e.g. 10G; 0 removes only what is wholly unused")
	fs.StringVar(&f.compression, "compression", "auto", "`mode` for what is packed again: auto, off or max")
	fs.IntVar(&f.packSize, "pack-size", 0, "size of the repository's files in `MiB`, 4 to 128 (default 16)")
	f.replica.add(fs)
}

func (f *pruneFlags) repo() repoOptions {
	return repoOptions{compression: f.compression, packSize: f.packSize}
}

// options reads the flags.
func (f *pruneFlags) options() (o repo.PruneOptions, err error) {
	switch percent, isPercent := strings.CutSuffix(f.maxUnused, "%"); {
	case f.maxUnused == "unlimited":
		o.MaxUnused = func(int64) int64 { return 1 << 62 }
	case isPercent:
		p, err := strconv.ParseFloat(percent, 64)
		if err != nil || !(p >= 0 && p < 100) {
			return o, usageError("--max-unused: a percentage is 0%% to 99%%, not %q", f.maxUnused)
		}
		o.MaxUnused = repo.UnusedPercent(p)
	default:
		n, err := parseLimit(f.maxUnused)
		if err != nil {
			return o, withCode(exitUsage, fmt.Errorf("--max-unused: %w", err))
		}
		o.MaxUnused = func(int64) int64 { return n }
	}
	if f.maxRepack != "" {
		o.LimitRepack = true
		if o.MaxRepack, err = parseLimit(f.maxRepack); err != nil {
			return o, withCode(exitUsage, fmt.Errorf("--max-repack-size: %w", err))
		}
	}
	return o, nil
}

// parseLimit reads a size that may be 0.
func parseLimit(s string) (int64, error) {
	if s == "0" {
		return 0, nil
	}
	return parseSize(s)
}

func (a *app) pruneCommand() *cobra.Command {
	var f pruneFlags
	var dryRun bool
	c := &cobra.Command{
		Use:   "prune",
		Short: "Give back the space that no snapshot needs",
		Long: `Remove from the repository what no snapshot needs. Files of the repository that are
partly needed are packed again, the worst ones first, until no more than --max-unused is
wasted. What is kept is stored anew before anything is removed: prune can be stopped at
any moment, and the next one does the rest.

Then objects that no snapshot needs are removed from the replicas of buckets (backup
--blobs replica), if no other repository uses them. The keys of a replica are in
HOLDFAST_REPLICA_ACCESS_KEY and HOLDFAST_REPLICA_SECRET_KEY, or in those with BUCKET.

No backup can run meanwhile: prune waits as long as --retry-lock says, or gives up.

` + exitHelp(repoCodes...),
		Example: `  holdfast prune --dry-run
  holdfast prune --max-repack-size 50G --retry-lock 1h`,
		Args: args(0, 0, "no arguments"),
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			o, err := f.options()
			if err != nil {
				return err
			}
			return a.withRepository(ctx, f.repo(), writeLock(dryRun), func(ctx context.Context, r *repo.Repository) error {
				s, err := a.pruneRepository(ctx, r, o, &f.replica, nil, dryRun)
				if err != nil {
					return err
				}
				if a.ui.JSON() {
					a.ui.Object(struct {
						Event  string `json:"event"`
						Verb   string `json:"verb"`
						DryRun bool   `json:"dry_run"`
						*repo.PruneStats
					}{"summary", "prune", dryRun, s})
				}
				return nil
			})
		}),
	}
	f.add(c.Flags())
	c.Flags().BoolVarP(&dryRun, "dry-run", "n", false, "show the plan, and change nothing")
	return c
}

// writeLock is the lock for work that removes something.
func writeLock(dryRun bool) lockMode {
	if dryRun {
		return lockShared
	}
	return lockExclusive
}

// pruneRepository shows the plan and carries it out. A dry run takes the snapshots in without for removed.
func (a *app) pruneRepository(ctx context.Context, r *repo.Repository, o repo.PruneOptions, rf *replicaFlags, without []id.ID, dryRun bool) (*repo.PruneStats, error) {
	o.Progress = a.ui.Sink()
	nothing := false
	s, err := maintain.Prune(ctx, r, without, maintain.PruneOptions{
		PruneOptions: o, DryRun: dryRun,
		Show: func(p *repo.PrunePlan) error {
			nothing = p.Nothing()
			a.showPlan(&p.Stats, nothing)
			return nil
		},
		Remaining: func(ctx context.Context, list []*snapshot.Snapshot, dryRun bool) error {
			return a.pruneReplicas(ctx, r, list, rf, dryRun)
		},
	})
	if err != nil {
		return nil, explainPrune(err)
	}
	if !a.ui.JSON() && !a.ui.Quiet() {
		switch {
		case dryRun:
			a.ui.Text("dry run, nothing changed")
		case !nothing:
			a.ui.Text("freed " + ui.Bytes(s.Freed))
			if s.Remove.Count+s.Repack.Count > 0 && r.Retains(ctx) {
				a.ui.Info("the bucket keeps what was removed as old versions: until their locks end, and then until a rule of its life cycle ends them")
			}
		}
	}
	return s, nil
}

// showPlan shows what prune is about to do.
func (a *app) showPlan(s *repo.PruneStats, nothing bool) {
	if a.ui.JSON() {
		a.ui.Object(struct {
			Event string `json:"event"`
			*repo.PruneStats
		}{"plan", s})
		return
	}
	if a.ui.Quiet() {
		return
	}
	amount := func(x repo.Amount, noun string) string {
		return fmt.Sprintf("%s, %s", ui.Count(x.Count, noun), ui.Bytes(x.Bytes))
	}
	lines := []string{
		"needed:       " + amount(s.Used, "blob"),
		"not needed:   " + amount(s.Unused, "blob"),
	}
	if s.Duplicate.Count > 0 {
		lines = append(lines, "stored twice: "+amount(s.Duplicate, "blob"))
	}
	if nothing {
		a.ui.Text(append(lines, "there is nothing to do")...)
		return
	}
	lines = append(lines, "left alone:   "+amount(s.Keep, "pack"))
	if s.Remove.Count > 0 {
		lines = append(lines, "removed:      "+amount(s.Remove, "pack"))
	}
	if s.Unlisted.Count > 0 {
		lines = append(lines, "unfinished:   "+amount(s.Unlisted, "pack")+", in no index: removed")
	}
	if s.Repack.Count > 0 {
		lines = append(lines, fmt.Sprintf("packed again: %s, of which %s stay", amount(s.Repack, "pack"), ui.Bytes(s.RepackUsed.Bytes)))
	}
	if s.Missing > 0 {
		lines = append(lines, "missing:      "+ui.Count(s.Missing, "pack")+" that nothing needs: taken out of the index")
	}
	lines = append(lines, fmt.Sprintf("frees:        %s; %s that nothing needs stay in packs", ui.Bytes(s.Freed), ui.Bytes(s.UnusedAfter)))
	a.ui.Text(lines...)
}

// explainPrune adds what only the command line knows.
func explainPrune(err error) error {
	var missing *repo.MissingBlobsError
	var unreadable *maintain.UnreadableError
	switch {
	case errors.As(err, &missing):
		return ui.WithHints(err, "`holdfast check` tells which snapshots are hit. If what is missing cannot be brought back, forget those, and prune again.")
	case errors.As(err, &unreadable):
		return ui.WithHints(err, "`holdfast check` tells more. `holdfast forget ID` removes a record that cannot be read; then what that snapshot alone needs is lost.")
	case errors.Is(err, syscall.ENOSPC):
		return ui.WithHints(err, "Nothing that is needed was removed. `holdfast prune --max-repack-size 0` needs next to no room, and frees what is wholly unused.")
	case errors.Is(err, repo.ErrNoRemoval):
		return ui.WithHints(err, appendOnlyHint)
	}
	return err
}

const appendOnlyHint = "A repository that only takes new data (append-only) must be cleaned up where it lies, by somebody who may remove there."
