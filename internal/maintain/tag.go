package maintain

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// TagChange says what becomes of a snapshot's tags: Set replaces them all, if it is not nil; then Add and Remove.
type TagChange struct{ Set, Add, Remove []string }

// apply returns the new tags, and whether they differ. Holdfast's own tag stays on Holdfast's snapshots: without
// it they would be taken for another program's.
func (c *TagChange) apply(old []string) ([]string, bool) {
	tags := slices.Clone(old)
	if c.Set != nil {
		tags = nil
		if slices.Contains(old, snapshot.Tag) {
			tags = append(tags, snapshot.Tag)
		}
	}
	for _, t := range slices.Concat(c.Set, c.Add) {
		if t != "" && !slices.Contains(tags, t) {
			tags = append(tags, t)
		}
	}
	tags = slices.DeleteFunc(tags, func(t string) bool { return slices.Contains(c.Remove, t) && t != snapshot.Tag })
	return tags, !slices.Equal(tags, old)
}

// Retagged is a snapshot whose record was replaced.
type Retagged struct {
	Old, New id.ID
	Tags     []string
}

// Tag changes the tags of some snapshots; list holds all. A record cannot be changed, so a new one is stored and then
// the old one removed: a kill in between leaves both, and the next run takes the old one away. The repository
// must be locked exclusively. Errors: repo.ErrNoRemoval.
func Tag(ctx context.Context, r *repo.Repository, list, which []*snapshot.Snapshot, c TagChange) ([]Retagged, error) {
	if err := r.CanRemove(ctx, backend.SnapshotFile); err != nil {
		return nil, err
	}
	var done []Retagged
	for _, old := range which {
		tags, changed := c.apply(old.Tags)
		if !changed {
			continue
		}
		s := *old
		s.Tags = tags
		if s.Original == nil {
			first := old.ID()
			s.Original = &first
		}
		to := id.ID{}
		for _, other := range list {
			if other.ID() != old.ID() && other.Original != nil && *other.Original == *s.Original && sameRecord(other, &s) {
				to = other.ID() // stored by a run that was killed before it removed the old one
			}
		}
		if to.IsNull() {
			if err := snapshot.Save(ctx, r, &s); err != nil {
				return done, err
			}
			to = s.ID()
		}
		if err := r.RemoveUnpacked(ctx, backend.SnapshotFile, old.ID()); err != nil && !errors.Is(err, backend.ErrNotExist) {
			return done, fmt.Errorf("snapshot %s has a new record %s, but the old one could not be removed: %w", old.ID().Short(), to.Short(), err)
		}
		done = append(done, Retagged{old.ID(), to, tags})
	}
	return done, nil
}

// sameRecord reports whether two records say the same of the same data.
func sameRecord(a, b *snapshot.Snapshot) bool {
	return a.Time.Equal(b.Time) && a.Tree != nil && b.Tree != nil && *a.Tree == *b.Tree &&
		a.Hostname == b.Hostname && a.Username == b.Username && a.UID == b.UID && a.GID == b.GID &&
		slices.Equal(a.Paths, b.Paths) && slices.Equal(a.Excludes, b.Excludes) && slices.Equal(a.Tags, b.Tags)
}
