package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

func (a *app) diffCommand() *cobra.Command {
	var noLock bool
	var space string
	c := &cobra.Command{
		Use:   "diff SNAPSHOT SNAPSHOT",
		Short: "Tell what users changed between two snapshots",
		Long: `Tell what users changed between two snapshots: what was added, changed, renamed,
moved, deleted, shared and unshared. A file that was moved is known by its id.

SNAPSHOT is as for ls.

` + exitHelp(repoCodes...),
		Example: `  holdfast diff latest~1 latest
  holdfast diff '2026-11-01' latest --space personal/alan`,
		Args: args(2, 2, "two arguments, the older and the newer snapshot"),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withRepository(ctx, repoOptions{}, readLock(noLock), func(ctx context.Context, r *repo.Repository) error {
				return a.diff(ctx, r, args[0], args[1], strings.TrimSuffix(space, "/"))
			})
		}),
	}
	c.Flags().StringVar(&space, "space", "", "this `space` only: its alias, name, or id:SPACEID")
	noLockFlag(c, &noLock)
	return c
}

// changeRow is a change as JSON.
type changeRow struct {
	Event   string            `json:"event"`
	Change  string            `json:"change"`
	Space   string            `json:"space"`
	SpaceID string            `json:"space_id"`
	Path    string            `json:"path"`
	From    string            `json:"from,omitempty"` // where it was before
	Type    snapshot.NodeType `json:"type,omitempty"`
	ID      string            `json:"id,omitempty"`
	Was     *uint64           `json:"size_before,omitempty"`
	Is      *uint64           `json:"size,omitempty"`
	Below   int               `json:"below,omitempty"`
	InTrash bool              `json:"in_trash,omitempty"`
	With    string            `json:"with,omitempty"`
	Link    bool              `json:"link,omitempty"`
}

func (a *app) diff(ctx context.Context, r *repo.Repository, from, to, space string) error {
	va, err := a.openView(ctx, r, from)
	if err != nil {
		return err
	}
	vb, err := a.openView(ctx, r, to)
	if err != nil {
		return err
	}
	var in func(*browse.Space) bool
	if space != "" {
		known := false
		in = func(s *browse.Space) bool {
			return isSpace(&browse.SpaceInfo{ID: s.ID, Folder: s.Folder, Name: s.Name}, space)
		}
		for _, s := range append(va.Spaces(), vb.Spaces()...) {
			known = known || in(s)
		}
		if !known {
			return ui.WithHints(fmt.Errorf("neither snapshot has a space %s", ui.Quote(space)), "`holdfast spaces` lists the spaces of a snapshot.")
		}
	}
	out := bufio.NewWriterSize(a.ui.Writer(), 64<<10)
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	n := int64(0)
	err = browse.Diff(ctx, va, vb, in, func(c *browse.Change) error {
		n++
		var err error
		if a.ui.JSON() {
			err = enc.Encode(newChangeRow(ctx, vb, c))
		} else {
			_, err = fmt.Fprintln(out, changeText(c))
		}
		if err != nil {
			return fmt.Errorf("cannot write the list: %w", err)
		}
		return nil
	})
	if ferr := out.Flush(); err == nil && ferr != nil {
		err = fmt.Errorf("cannot write the list: %w", ferr)
	}
	if err == nil {
		a.ui.Info("%s between %s and %s", ui.Count(n, "change"), va.Snapshot().ID().Short(), vb.Snapshot().ID().Short())
	}
	return err
}

func newChangeRow(ctx context.Context, v *browse.View, c *browse.Change) *changeRow {
	row := &changeRow{
		Event: "change", Change: c.What, Space: c.Space.Folder, SpaceID: c.Space.ID, Path: c.To, From: c.From, Below: c.Below,
		InTrash: c.InTrash, With: c.With, Link: c.Link,
	}
	switch c.What {
	case browse.Deleted:
		row.Path, row.From, row.Was = c.From, "", &c.Was
	case browse.Added:
		row.Is = &c.Is
	case browse.Changed, browse.Moved, browse.Renamed:
		row.Was, row.Is = &c.Was, &c.Is
	}
	if c.NodeID != "" {
		row.ID = c.Space.ID + "!" + c.NodeID
		if m := v.MountID(ctx, c.Space.Store); m != "" {
			row.ID = m + "$" + row.ID
		}
		if row.Type = snapshot.File; c.Dir {
			row.Type = snapshot.Dir
		}
		if c.What == browse.Shared || c.What == browse.Unshared {
			row.Type = ""
		}
	}
	return row
}

func changeText(c *browse.Change) string {
	at := func(p string) string {
		if p = c.Space.Folder + "/" + p; c.Dir {
			p += "/"
		}
		return ui.Quote(p)
	}
	line := fmt.Sprintf("%-14s ", c.What)
	switch c.What {
	case browse.Renamed, browse.Moved:
		line += at(c.From) + " -> " + at(c.To)
		if c.Below > 0 {
			line += " (with " + ui.Count(int64(c.Below), "item") + ")"
		}
	case browse.Deleted:
		line += at(c.From)
		if c.InTrash {
			line += " (in the trash)"
		}
	case browse.Changed:
		line += fmt.Sprintf("%s (%s -> %s)", at(c.To), ui.Bytes(int64(c.Was)), ui.Bytes(int64(c.Is)))
	case browse.Shared, browse.Unshared:
		with := "by a public link"
		if !c.Link {
			with = "with " + ui.Quote(c.With)
		}
		line += at(c.To) + " " + with
	case browse.MemberAdded, browse.MemberRemoved:
		line += ui.Quote(c.Space.Folder) + ": " + ui.Quote(c.With)
	case browse.SpaceRenamed:
		line += fmt.Sprintf("%s: %s -> %s", ui.Quote(c.Space.Folder), ui.Quote(c.From), ui.Quote(c.To))
	case browse.Added:
		line += at(c.To)
	default:
		line += ui.Quote(c.Space.Folder)
	}
	return line
}
