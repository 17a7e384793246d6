package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

func (a *app) unlockCommand() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use:   "unlock",
		Short: "Remove locks that were left behind",
		Long: `Remove the locks of programs that are gone: those not refreshed for half an hour,
and those of this machine whose process has ended. With --all every lock goes;
a program that still works on the repository then stops, or does harm.

` + exitHelp(exitDone, exitError, exitUsage, exitNoRepository, exitWrongPassword, exitInterrupted),
		Args: args(0, 0, "no arguments"),
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			return a.withRepository(ctx, repoOptions{}, lockNone, func(ctx context.Context, r *repo.Repository) error {
				return a.unlock(ctx, r, all)
			})
		}),
	}
	c.Flags().BoolVar(&all, "all", false, "remove locks that are in use, too")
	return c
}

func (a *app) unlock(ctx context.Context, r *repo.Repository, all bool) error {
	removed, err := r.Unlock(ctx, all)
	if err != nil {
		return fmt.Errorf("cannot remove the locks: %w", err)
	}
	left, err := r.Locks(ctx)
	if err != nil {
		return fmt.Errorf("cannot list the locks: %w", err)
	}
	if a.ui.JSON() {
		a.ui.Object(struct {
			Event   string `json:"event"`
			Verb    string `json:"verb"`
			Removed int    `json:"removed"`
			Left    int    `json:"left"`
		}{"summary", "unlock", removed, len(left)})
		return nil
	}
	if !a.ui.Quiet() {
		a.ui.Text("removed " + ui.Count(int64(removed), "lock"))
	}
	for _, l := range left {
		if l.Damaged != "" {
			a.ui.Info("lock %s cannot be read: %s", l.ID.Short(), l.Damaged)
			continue
		}
		a.ui.Info("still locked by process %d of %s on %s since %s", l.PID, ui.Quote(l.Username), ui.Quote(l.Hostname), l.Time.Local().Format("2006-01-02 15:04:05"))
	}
	return nil
}
