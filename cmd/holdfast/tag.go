package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/maintain"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

func (a *app) tagCommand() *cobra.Command {
	var set, add, remove []string
	c := &cobra.Command{
		Use:   "tag SNAPSHOT...",
		Short: "Change the tags of snapshots",
		Long: `Change the tags of the snapshots that are named. A snapshot gets a new id by that; its
data, its time and what forget makes of it stay as they are. Holdfast's own tag cannot be
taken from its snapshots.

` + exitHelp(repoCodes...),
		Example: `  holdfast tag --add before-upgrade latest`,
		Args:    args(1, 10000, "ids of snapshots"),
		RunE: a.verb(func(ctx context.Context, names []string) error {
			change := maintain.TagChange{Add: splitTags(add), Remove: splitTags(remove)}
			if len(set) > 0 {
				change.Set = append([]string{}, splitTags(set)...)
			}
			switch {
			case len(set)+len(add)+len(remove) == 0:
				return ui.WithHints(usageError("nothing says how to change the tags"), "Use --add, --remove or --set.")
			case len(set) > 0 && len(add)+len(remove) > 0:
				return usageError("--set replaces all tags, and cannot stand beside --add and --remove")
			}
			for _, t := range change.Remove {
				if t == snapshot.Tag {
					return usageError("the tag %q marks the snapshots of Holdfast and cannot be removed", t)
				}
			}
			return a.withRepository(ctx, repoOptions{}, lockExclusive, func(ctx context.Context, r *repo.Repository) error {
				return a.tag(ctx, r, names, change)
			})
		}),
	}
	fs := c.Flags()
	fs.StringArrayVar(&add, "add", nil, "add this `tag`, or several with commas between; may be repeated")
	fs.StringArrayVar(&remove, "remove", nil, "remove this `tag`; as above")
	fs.StringArrayVar(&set, "set", nil, "replace all tags by this `tag`; as above. \"\" removes all")
	return c
}

// splitTags takes lists apart at their commas, because no restic could select a tag with a comma in it.
func splitTags(lists []string) []string {
	var out []string
	for _, l := range lists {
		for _, t := range strings.Split(l, ",") {
			if t = strings.TrimSpace(t); t != "" {
				out = append(out, t)
			}
		}
	}
	return out
}

// findSnapshots finds the snapshots with these names, each once.
func findSnapshots(list []*snapshot.Snapshot, names []string) ([]*snapshot.Snapshot, error) {
	var out []*snapshot.Snapshot
	seen := map[*snapshot.Snapshot]bool{}
	for _, name := range names {
		s, err := snapshot.Find(list, name)
		if err != nil {
			return nil, err
		}
		if !seen[s] {
			seen[s] = true
			out = append(out, s)
		}
	}
	return out, nil
}

// listSnapshots lists the snapshots that can be read, and warns of the others.
func (a *app) listSnapshots(ctx context.Context, r *repo.Repository) ([]*snapshot.Snapshot, error) {
	list, err := snapshot.List(ctx, r)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		if len(list) == 0 {
			return nil, err
		}
		a.ui.Warn("some snapshots cannot be read and are left alone: %v", err)
	}
	return list, nil
}

func (a *app) tag(ctx context.Context, r *repo.Repository, names []string, change maintain.TagChange) error {
	list, err := a.listSnapshots(ctx, r)
	if err != nil {
		return err
	}
	which, err := findSnapshots(list, names)
	if err != nil {
		return err
	}
	done, err := maintain.Tag(ctx, r, list, which, change)
	for _, d := range done {
		if a.ui.JSON() {
			a.ui.Object(struct {
				Event string   `json:"event"`
				Old   string   `json:"old"`
				ID    string   `json:"id"`
				Tags  []string `json:"tags"`
			}{"tagged", d.Old.String(), d.New.String(), append([]string{}, d.Tags...)})
			continue
		}
		quoted := make([]string, len(d.Tags))
		for i, t := range d.Tags {
			quoted[i] = ui.Quote(t)
		}
		a.ui.Text(fmt.Sprintf("%s is now %s with the tags %s", d.Old.Short(), d.New.Short(), strings.Join(quoted, ", ")))
	}
	if err != nil {
		return explainForget(fmt.Errorf("changed the tags of %d of %s: %w", len(done), ui.Count(int64(len(which)), "snapshot"), err))
	}
	switch {
	case a.ui.JSON():
		a.ui.Object(struct {
			Event     string `json:"event"`
			Verb      string `json:"verb"`
			Changed   int    `json:"changed"`
			Unchanged int    `json:"unchanged"`
		}{"summary", "tag", len(done), len(which) - len(done)})
	case !a.ui.Quiet():
		a.ui.Info("changed the tags of %s", ui.Count(int64(len(done)), "snapshot"))
	}
	return nil
}
