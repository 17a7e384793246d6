package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/bucket"
	"github.com/holdfast-backup/holdfast/internal/cpus"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
	"github.com/holdfast-backup/holdfast/internal/verify"
)

func (a *app) checkCommand() *cobra.Command {
	var readData, noLock bool
	var against sourceFlags
	c := &cobra.Command{
		Use:   "check",
		Short: "Check that the repository is whole, and prove its snapshots again",
		Long: `Check the structure of the repository: that every pack, index and tree is there and
that they agree. Then prove each of Holdfast's snapshots again. With --read-data every
byte is read and compared with its checksum, which takes as long as reading the
whole repository.

Of a repository in a bucket with Object Lock it is told until when files are locked.

Contents that lie in a bucket (backup --blobs replica or versions) are looked up there,
if HOLDFAST_BUCKET_ACCESS_KEY and HOLDFAST_BUCKET_SECRET_KEY, or those with REPLICA for
a replica, are set.

With --against-source, instead, a sample of the instance as it is now is compared with its
last snapshot, while the service runs. What was changed since is counted; what differs
although its change time says that nobody touched it is an error.

Exit code 3 tells that the repository is whole, but that a snapshot in it is
incomplete because something was missing when it was made.

` + exitHelp(append([]int{exitIncomplete}, repoCodes...)...),
		Args: args(0, 0, "no arguments"),
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			a.opt.noCache = true // the originals are to be looked at
			return a.withRepository(ctx, repoOptions{}, readLock(noLock), func(ctx context.Context, r *repo.Repository) error {
				if against.on {
					return a.againstSource(ctx, r, &against)
				}
				return a.check(ctx, r, readData)
			})
		}),
	}
	c.Flags().BoolVar(&readData, "read-data", false, "read and compare every byte")
	noLockFlag(c, &noLock)
	against.add(c)
	return c
}

func (a *app) check(ctx context.Context, r *repo.Repository, readData bool) error {
	if err := a.loadIndex(ctx, r); err != nil {
		return err
	}
	rep, err := verify.Run(ctx, r, verify.Options{
		ReadData: readData, Progress: a.ui.Sink(), Spaces: min(a.mem.Workers, cpus.Count()),
		Remember: int64(a.mem.Batch),
		Bucket: func(ctx context.Context, st *snapshot.Store) (*bucket.Bucket, error) {
			return a.openSource(ctx, nil, st)
		},
	})
	if err != nil {
		return fmt.Errorf("cannot check the repository: %w", err)
	}
	locks := a.showLocks(ctx, r)
	if locks != "" {
		rep.Hints = append(rep.Hints, locks)
	}
	incomplete := 0
	for i := range rep.Snapshots {
		if !rep.Snapshots[i].Complete {
			incomplete++
		}
	}
	if a.ui.JSON() {
		a.checkJSON(rep, readData)
	} else {
		for _, e := range rep.Errors {
			a.ui.Text("error: " + ui.Clean(e))
		}
		for _, h := range rep.Hints {
			a.ui.Text("hint:  " + ui.Clean(h))
		}
		for i := range rep.Snapshots {
			if s := &rep.Snapshots[i]; !s.Complete {
				missing := missingLines(&s.Proof)
				end := ":"
				if len(missing) == 0 {
					end = ", by the errors above"
				}
				a.ui.Text("snapshot " + s.ID.Short() + " is incomplete" + end)
				a.ui.Text(missing...)
			}
		}
		if len(rep.Errors) == 0 && !a.ui.Quiet() {
			what := "structure"
			if readData {
				what = "structure and every byte"
			}
			a.ui.Text(fmt.Sprintf("the repository is whole: checked %s, and %s", what, ui.Count(int64(len(rep.Snapshots)), "snapshot")))
		}
	}
	switch {
	case len(rep.Errors) > 0:
		return ui.WithHints(fmt.Errorf("the repository is damaged: %s", ui.Count(int64(len(rep.Errors)), "error")),
			"Make a copy of the repository before anything else, and look at the disk that it lies on.")
	case incomplete > 0:
		return withCode(exitIncomplete, fmt.Errorf("the repository is whole, but holds %s", ui.Count(int64(incomplete), "incomplete snapshot")))
	}
	return nil
}

func (a *app) checkJSON(rep *verify.Report, readData bool) {
	type problem struct {
		Event    string `json:"event"`
		Severity string `json:"severity"`
		Message  string `json:"message"`
	}
	for _, e := range rep.Errors {
		a.ui.Object(problem{"problem", "error", e})
	}
	for _, h := range rep.Hints {
		a.ui.Object(problem{"problem", "hint", h})
	}
	for _, s := range rep.Snapshots {
		a.ui.Object(struct {
			Event    string         `json:"event"`
			ID       string         `json:"id"`
			Complete bool           `json:"complete"`
			Proof    snapshot.Proof `json:"proof"`
		}{"snapshot", s.ID.String(), s.Complete, s.Proof})
	}
	a.ui.Object(struct {
		Event     string `json:"event"`
		Verb      string `json:"verb"`
		ReadData  bool   `json:"read_data"`
		Errors    int    `json:"errors"`
		Hints     int    `json:"hints"`
		Snapshots int    `json:"snapshots"`
	}{"summary", "check", readData, len(rep.Errors), len(rep.Hints), len(rep.Snapshots)})
}
