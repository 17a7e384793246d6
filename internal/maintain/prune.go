package maintain

import (
	"context"
	"fmt"

	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// PruneOptions of Prune.
type PruneOptions struct {
	repo.PruneOptions
	// DryRun makes the plan and hands it to Show, no more.
	DryRun bool
	// Show is told the plan before anything is changed, and can refuse it by an error. May be nil.
	Show func(*repo.PrunePlan) error
	// Remaining is called after the repository was pruned, and in a dry run in its place, with the snapshots that
	// remain, oldest first: it is where whatever keeps data of snapshots outside of the repository
	// gives it back. May be nil.
	Remaining func(ctx context.Context, remaining []*snapshot.Snapshot, dryRun bool) error
}

// UnreadableError says that a snapshot record cannot be read, so that nobody knows what it needs.
type UnreadableError struct{ Err error }

func (e *UnreadableError) Error() string {
	return "a snapshot cannot be read, so it cannot be told what it needs; nothing was removed: " + e.Err.Error()
}
func (e *UnreadableError) Unwrap() error { return e.Err }

// Prune removes what no snapshot needs. Except for a dry run, the repository must be locked exclusively. Snapshots
// in removed were removed just before, or would be: a dry run takes them for gone. Errors: *UnreadableError, *repo.MissingBlobsError, and those
// of repo.PrunePlan.Execute.
func Prune(ctx context.Context, r *repo.Repository, removed []id.ID, o PruneOptions) (*repo.PruneStats, error) {
	// The list first: what a snapshot needs was indexed before its record was written.
	list, err := snapshot.List(ctx, r)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, &UnreadableError{err}
	}
	if o.DryRun {
		list = Without(list, removed)
	}
	roots := make([]id.ID, len(list))
	for i, s := range list {
		if s.Tree == nil {
			return nil, &UnreadableError{fmt.Errorf("snapshot %s has no tree", s.ID().Short())}
		}
		roots[i] = *s.Tree
	}
	plan, err := r.PlanPrune(ctx, o.PruneOptions, func(ctx context.Context, mark func(repo.BlobType, id.ID) bool) error {
		return snapshot.Used(ctx, r, roots, mark, o.Progress)
	})
	if err != nil {
		return nil, err
	}
	if o.Show != nil {
		if err := o.Show(plan); err != nil {
			return nil, err
		}
	}
	if !o.DryRun {
		if err := plan.Execute(ctx); err != nil {
			return nil, err
		}
	}
	if o.Remaining != nil {
		if err := o.Remaining(ctx, list, o.DryRun); err != nil {
			return nil, err
		}
	}
	return &plan.Stats, nil
}
