package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

func (a *app) catCommand() *cobra.Command {
	var noLock bool
	var f pickFlags
	c := &cobra.Command{
		Use:   "cat SNAPSHOT:SPACE/PATH",
		Short: "Write the content of a file to standard output",
		Long: `Write the content of a file to standard output.

` + addressHelp + `

` + exitHelp(repoCodes...),
		Example: `  holdfast cat 'latest:personal/alan/Round 0/notes.txt'
  holdfast cat 'latest:personal/alan/Round 0/notes.txt' --version 2026-11-20T14:00:00Z
  holdfast cat latest:/manifest.json`,
		Args: args(1, 1, "one argument, SNAPSHOT:SPACE/PATH"),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withRepository(ctx, repoOptions{}, readLock(noLock), func(ctx context.Context, r *repo.Repository) error {
				return a.cat(ctx, r, args[0], f)
			})
		}),
	}
	f.add(c)
	noLockFlag(c, &noLock)
	return c
}

func (a *app) cat(ctx context.Context, r *repo.Repository, arg string, f pickFlags) error {
	p, err := a.pick(ctx, r, arg, f)
	if err != nil {
		return err
	}
	if p.node.Type == snapshot.Dir {
		return ui.WithHints(fmt.Errorf("%s is a folder", ui.Quote(p.path)),
			"`holdfast ls` lists it; `holdfast dump` writes all that is in it as an archive.")
	}
	content, err := browse.OpenContent(r, p.node)
	if err != nil {
		return err
	}
	if err := content.WriteTo(ctx, a.ui.Writer()); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("cannot write %s: %w", ui.Quote(p.path), err)
	}
	return nil
}
