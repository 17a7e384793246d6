package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/compare"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// sourceFlags are the flags of check --against-source.
type sourceFlags struct {
	on               bool
	sample, snapshot string
	seed             uint64
	place            placeFlags
}

func (f *sourceFlags) add(c *cobra.Command) {
	fs := c.Flags()
	fs.BoolVar(&f.on, "against-source", false, "compare the live instance with its last snapshot")
	fs.StringVar(&f.sample, "sample", "5%", "compare this `percentage` of the spaces, and of the contents of files")
	fs.Uint64Var(&f.seed, "seed", 0, "`number` that picks the sample (default: another one each time)")
	fs.StringVar(&f.snapshot, "snapshot", "", "compare with this `snapshot`")
	f.place.add(c)
}

func (a *app) againstSource(ctx context.Context, r *repo.Repository, f *sourceFlags) error {
	percent, err := strconv.ParseFloat(strings.TrimSuffix(f.sample, "%"), 64)
	if err != nil || !(percent > 0 && percent <= 100) {
		return usageError("--sample is a percentage above 0%% and up to 100%%, not %q", f.sample)
	}
	seed := f.seed
	if seed == 0 {
		seed = 1 + rand.Uint64N(1<<32) // short enough to be typed again
	}
	where, err := f.place.options(a)
	if err != nil {
		return err
	}
	where.NoSizes = true
	inst, err := discover.Discover(ctx, where)
	if err != nil {
		return fmt.Errorf("cannot find the instance: %w", err)
	}
	for _, w := range inst.Warnings {
		a.ui.Warn("%s", w)
	}
	list, err := a.listSnapshots(ctx, r)
	if err != nil {
		return err
	}
	sn, err := f.choose(list, inst)
	if err != nil {
		return err
	}
	if err := a.loadIndex(ctx, r); err != nil {
		return err
	}
	rep, err := compare.Run(ctx, r, sn, inst, compare.Options{Percent: percent, Seed: seed, Progress: a.ui.Sink()})
	if err != nil {
		return ui.WithHints(fmt.Errorf("cannot compare the instance with snapshot %s: %w", sn.ID().Short(), err), "`holdfast check` tells whether the repository is whole.")
	}
	a.showComparison(sn, rep, seed)
	if rep.Differ > 0 {
		return ui.WithHints(fmt.Errorf("%s from snapshot %s without having been changed", differ(rep.Differ), sn.ID().Short()),
			"Either the disk or the backup is wrong. Look at the disk first, and make a backup with --full-scan.",
			fmt.Sprintf("--seed %d --sample %s compares the same again.", seed, f.sample))
	}
	return nil
}

func differ(n int64) string {
	if n == 1 {
		return "1 entry differs"
	}
	return fmt.Sprintf("%d entries differ", n)
}

// choose finds the newest snapshot of the instance.
func (f *sourceFlags) choose(list []*snapshot.Snapshot, inst *ocis.Instance) (*snapshot.Snapshot, error) {
	if f.snapshot != "" {
		return snapshot.Find(list, f.snapshot)
	}
	paths := []string{inst.BasePath}
	if inst.ConfigDir != "" && inst.ConfigDir != inst.BasePath {
		paths = append(paths, inst.ConfigDir)
	}
	slices.Sort(paths)
	for _, s := range slices.Backward(list) {
		if s.HasTag(snapshot.Tag) && slices.Equal(s.Paths, paths) {
			return s, nil
		}
	}
	return nil, ui.WithHints(errors.New("the repository has no snapshot of this instance"),
		"`holdfast snapshots` lists what there is; --snapshot compares with one that was made of another place.")
}

func (a *app) showComparison(sn *snapshot.Snapshot, rep *compare.Report, seed uint64) {
	if a.ui.JSON() {
		for _, d := range rep.Differences {
			a.ui.Object(struct {
				Event string `json:"event"`
				compare.Difference
			}{"difference", d})
		}
		a.ui.Object(struct {
			Event    string    `json:"event"`
			Verb     string    `json:"verb"`
			Snapshot string    `json:"snapshot"`
			Moment   time.Time `json:"moment"`
			Seed     uint64    `json:"seed"`
			Spaces   int       `json:"spaces"`
			Of       int       `json:"spaces_total"`
			Same     int64     `json:"same"`
			Files    int64     `json:"files_read"`
			Bytes    int64     `json:"bytes_read"`
			Changed  int64     `json:"changed"`
			Gone     int64     `json:"gone"`
			New      int64     `json:"new"`
			Differ   int64     `json:"differ"`
			Skipped  []string  `json:"skipped"`
		}{"summary", "check", sn.ID().String(), rep.Moment.UTC(), seed, rep.Spaces, rep.Of, rep.Same, rep.Files, rep.Bytes,
			rep.Changed, rep.Gone, rep.New, rep.Differ, append([]string{}, rep.Skipped...)})
		return
	}
	for _, s := range rep.Skipped {
		a.ui.Warn("not compared: %s", s)
	}
	for _, d := range rep.Differences {
		a.ui.Text("differs: " + ui.Quote(d.Path) + ": " + ui.Clean(d.What))
	}
	if n := rep.Differ - int64(len(rep.Differences)); n > 0 {
		a.ui.Text(fmt.Sprintf("and %d more", n))
	}
	if a.ui.Quiet() {
		return
	}
	a.ui.Text(
		fmt.Sprintf("compared with snapshot %s, taken %s (seed %d)", sn.ID().Short(), rep.Moment.Local().Format(time.DateTime), seed),
		fmt.Sprintf("  compared:      %d of %s; %d entries are the same, the contents of %s, %s, were read", rep.Spaces, ui.Count(int64(rep.Of), "space"),
			rep.Same, ui.Count(rep.Files, "file"), ui.Bytes(rep.Bytes)),
		fmt.Sprintf("  changed since: %d changed, %d gone, %d new", rep.Changed, rep.Gone, rep.New),
		fmt.Sprintf("  wrong:         %s", differ(rep.Differ)),
	)
}
