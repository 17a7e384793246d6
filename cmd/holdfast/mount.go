package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/browse/mount"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

func (a *app) mountCommand() *cobra.Command {
	var noLock bool
	var o mount.Options
	c := &cobra.Command{
		Use:   "mount DIR",
		Short: "Show all snapshots as a file system",
		Long: `Show all snapshots as a read-only file system in the folder DIR, until interrupted or
unmounted:

  snapshots/2026-11-20T14-00-00Z/personal/alan/...   the space as its users see it
  .../personal/alan/.versions/PATH/TIME              older versions of a file
  .../personal/alan/.trash/TIME/NAME                 what was deleted
  snapshots/latest                                   the newest

Times are in UTC. It works for every user who may use FUSE, and only that user can look
into it; --allow-other lets all users of the machine read everything.

` + exitHelp(repoCodes...),
		Example: `  holdfast mount /mnt/backup
  umount /mnt/backup`,
		Args: args(1, 1, "one argument, the folder"),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			dir, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			return a.withRepository(ctx, repoOptions{}, readLock(noLock), func(ctx context.Context, r *repo.Repository) error {
				return a.mount(ctx, r, dir, o)
			})
		}),
	}
	c.Flags().BoolVar(&o.AllowOther, "allow-other", false, "let all users of the machine read everything")
	noLockFlag(c, &noLock)
	return c
}

func (a *app) mount(ctx context.Context, r *repo.Repository, dir string, o mount.Options) error {
	st, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return ui.WithHints(fmt.Errorf("there is no folder %s", ui.Quote(dir)), "Make it first: mkdir.")
	}
	if err == nil && !st.IsDir() {
		return fmt.Errorf("%s is no folder", ui.Quote(dir))
	}
	list, listErr := snapshot.List(ctx, r)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if listErr != nil {
		a.ui.Warn("%v", listErr)
	}
	var own []*snapshot.Snapshot
	for _, sn := range snapshot.Own(list) {
		if sn.Tree != nil {
			own = append(own, sn)
		}
	}
	if err := a.loadIndexOnce(ctx, r); err != nil {
		return err
	}
	o.Warn = func(err error) { a.ui.Warn("%v", err) }
	s, err := mount.Mount(r, own, dir, o)
	if err != nil {
		// What fusermount said ends in line feeds.
		return ui.WithHints(fmt.Errorf("cannot mount at %s: %s", ui.Quote(dir), strings.TrimSpace(err.Error())),
			"FUSE must be there: the device /dev/fuse, which this user may open (udev gives it the mode 0666), and for users other than root the program fusermount3 (Debian: package fuse3).",
			"--allow-other needs the line user_allow_other in /etc/fuse.conf.")
	}
	a.ui.Info("%s in %s", ui.Count(int64(len(own)), "snapshot"), ui.Quote(dir))
	ended := make(chan struct{})
	go func() {
		s.Wait()
		close(ended)
	}()
	select {
	case <-ended: // unmounted by somebody
		return nil
	case <-ctx.Done():
	}
	if err := s.Unmount(); err != nil {
		return ui.WithHints(fmt.Errorf("cannot unmount %s: %w", ui.Quote(dir), err), "`umount -l DIR`, or `fusermount3 -uz DIR`, takes it away.")
	}
	return nil // to be interrupted is how it ends
}
