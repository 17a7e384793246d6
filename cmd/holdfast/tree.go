package main

import (
	"bufio"
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

func (a *app) treeCommand() *cobra.Command {
	var noLock, trash bool
	var depth int
	c := &cobra.Command{
		Use:   "tree SNAPSHOT:SPACE/PATH",
		Short: "Draw a folder with all that is in it",
		Long: `Draw a folder with all that is in it. With --json it prints what ls --recursive prints.

` + addressHelp + `

` + exitHelp(repoCodes...),
		Example: `  holdfast tree latest:personal/alan --depth 2`,
		Args:    args(1, 1, "one argument, SNAPSHOT:SPACE/PATH"),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			if depth < 0 {
				return usageError("--depth is a number of folders, not %d", depth)
			}
			if !isSpaceAddress(args[0]) {
				return ui.WithHints(usageError("%s names no space", ui.Quote(args[0])),
					"Such an address is SNAPSHOT:SPACE/PATH, e.g. latest:personal/alan.", "`holdfast ls --recursive` lists a path of the snapshot.")
			}
			return a.withRepository(ctx, repoOptions{}, readLock(noLock), func(ctx context.Context, r *repo.Repository) error {
				return a.tree(ctx, r, args[0], trash, depth)
			})
		}),
	}
	c.Flags().IntVar(&depth, "depth", 0, "how many `folders` deep; 0 is all")
	c.Flags().BoolVar(&trash, "trash", false, "draw what is in the trash of the space")
	noLockFlag(c, &noLock)
	return c
}

func (a *app) tree(ctx context.Context, r *repo.Repository, arg string, trash bool, depth int) error {
	p, err := a.pick(ctx, r, arg, pickFlags{trash: trash})
	if err != nil {
		return err
	}
	out := bufio.NewWriterSize(a.ui.Writer(), 64<<10)
	if a.ui.JSON() {
		l := &itemLister{ctx: ctx, view: p.view, out: out, json: true, o: lsOptions{recursive: true}, depth: depth}
		err = l.dirOrItem(p.item)
	} else {
		t := &treeDrawer{view: p.view, out: out, depth: depth}
		fmt.Fprintln(out, ui.Quote(p.path))
		if p.item.IsDir() {
			err = t.draw(ctx, p.item, "", 1)
		}
		if err == nil {
			fmt.Fprintf(out, "\n%s, %s\n", ui.Count(t.dirs, "folder"), ui.Count(t.files, "file"))
		}
	}
	if ferr := out.Flush(); err == nil && ferr != nil {
		err = fmt.Errorf("cannot write the tree: %w", ferr)
	}
	return err
}

type treeDrawer struct {
	view        *browse.View
	out         io.Writer
	depth       int
	dirs, files int64
}

func (t *treeDrawer) draw(ctx context.Context, dir *browse.Item, before string, level int) error {
	if level > maxDepth {
		return fmt.Errorf("more than %d folders lie in each other", maxDepth)
	}
	list, err := t.view.List(ctx, dir)
	if err != nil {
		return err
	}
	for i, it := range list {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		branch, below := "|-- ", "|   "
		if i == len(list)-1 {
			branch, below = "`-- ", "    "
		}
		name := it.Name()
		if it.IsDir() {
			t.dirs++
			name += "/"
		} else if it.Node.Type == snapshot.File {
			t.files++
		}
		if _, err := fmt.Fprintln(t.out, before+branch+ui.Quote(name)); err != nil {
			return fmt.Errorf("cannot write the tree: %w", err)
		}
		if it.IsDir() && (t.depth == 0 || level < t.depth) {
			if err := t.draw(ctx, it, before+below, level+1); err != nil {
				return err
			}
		}
	}
	return nil
}
