package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// addressHelp tells verbs' users how to name things.
const addressHelp = `SNAPSHOT is "latest", "latest~1" for the one before it, a time such as "2026-11-20 14:00"
for the last one before it, or the beginning of an id. SPACE is the space's alias, such
as personal/alan, its name, its owner's name, or id:SPACEID. A path that begins with a
slash is one in the snapshot itself.`

// pickFlags pick a version or the trash.
type pickFlags struct {
	version string
	trash   bool
}

func (f *pickFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&f.version, "version", "", "the version of a file: a `time` that ls --versions shows, or the last before a time")
	c.Flags().BoolVar(&f.trash, "trash", false, "PATH is in the trash: as ls --trash shows it, or the name or former path\nof what was deleted")
}

// picked is what an address names: an item of a space, or else a node of the snapshot itself.
type picked struct {
	sn   *snapshot.Snapshot
	view *browse.View // nil: a path of the snapshot
	item *browse.Item
	node *snapshot.Node
	path string // as it was given, for messages
}

// openView opens the snapshot that what names.
func (a *app) openView(ctx context.Context, r *repo.Repository, what string) (*browse.View, error) {
	sn, err := a.findSnapshot(ctx, r, what)
	if err != nil {
		return nil, err
	}
	if err := a.loadIndexOnce(ctx, r); err != nil {
		return nil, err
	}
	v, err := browse.Open(ctx, r, sn)
	if err != nil {
		return nil, err
	}
	// Addresses can name owners. A directory that cannot be read makes that harder, and nothing else.
	if _, err := v.Identities(ctx); err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		a.ui.Warn("snapshot %s: %v", sn.ID().Short(), err)
	}
	return v, nil
}

// isSpaceAddress tells SNAPSHOT:SPACE/PATH from SNAPSHOT and SNAPSHOT:/PATH.
func isSpaceAddress(arg string) bool {
	_, rest, found := snapshot.SplitAddress(arg)
	return found && rest != "" && rest[0] != '/'
}

// pick finds what an address names.
func (a *app) pick(ctx context.Context, r *repo.Repository, arg string, f pickFlags) (*picked, error) {
	what, rest, _ := snapshot.SplitAddress(arg)
	if !isSpaceAddress(arg) {
		if f.version != "" || f.trash {
			return nil, ui.WithHints(usageError("%s names no space, and only a space has versions and a trash", ui.Quote(arg)),
				"Such an address is SNAPSHOT:SPACE/PATH, e.g. latest:personal/alan/notes.txt.")
		}
		sn, err := a.findSnapshot(ctx, r, what)
		if err != nil {
			return nil, err
		}
		if sn.Tree == nil {
			return nil, fmt.Errorf("snapshot %s has no tree", sn.ID().Short())
		}
		if err := a.loadIndexOnce(ctx, r); err != nil {
			return nil, err
		}
		_, p := snapshot.Split(arg)
		n, err := snapshot.Lookup(ctx, r, *sn.Tree, p)
		if err != nil {
			return nil, noSuchPath(sn, what, p, err)
		}
		return &picked{sn: sn, node: n, path: p}, nil
	}
	v, err := a.openView(ctx, r, what)
	if err != nil {
		return nil, err
	}
	p := &picked{sn: v.Snapshot(), view: v, path: strings.TrimSuffix(rest, "/")}
	if f.trash {
		var sp *browse.Space
		var in string
		if sp, in, err = v.Resolve(ctx, rest); err == nil {
			p.item, err = v.TrashItem(ctx, sp, in)
		}
	} else {
		p.item, err = v.Lookup(ctx, rest)
	}
	if err != nil {
		return nil, err
	}
	if f.version != "" {
		if p.item, err = v.Version(ctx, p.item, f.version, time.Local); err != nil {
			return nil, err
		}
	}
	p.node = p.item.Node
	return p, nil
}
