// Package maintain holds what keeps a repository in order once backups are in it: forget and prune,
// tag, copy, and statistics. It ties the rules (retention), the engine (repo) and the records
// (snapshot) together; the command and whatever else does such work call it.
package maintain

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/retention"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// ErrNoPolicy is returned when a policy has no rule: it would keep nothing.
var ErrNoPolicy = errors.New("the policy has no rule, so nothing would be kept")

// LastCompleteError is returned when the last complete snapshot of an instance would go.
type LastCompleteError struct{ Snapshots []id.ID }

func (e *LastCompleteError) Error() string {
	s := "snapshot " + e.Snapshots[0].Short() + " is the last complete one of its instance"
	if n := len(e.Snapshots) - 1; n > 0 {
		s += fmt.Sprintf(", and so are %d more that were named for theirs", n)
	}
	return s
}

// Filter selects snapshots; what is empty selects all.
type Filter struct {
	Hosts []string
	// Tags: a snapshot must bear all of one of the lists. An empty list fits those without tags.
	Tags [][]string
	// Paths: a snapshot must hold all of them.
	Paths []string
}

// Fits reports whether f selects s.
func (f *Filter) Fits(host string, paths, tags []string) bool {
	if len(f.Hosts) > 0 && !slices.Contains(f.Hosts, host) {
		return false
	}
	for _, p := range f.Paths {
		if !slices.Contains(paths, p) {
			return false
		}
	}
	if len(f.Tags) == 0 {
		return true
	}
	return slices.ContainsFunc(f.Tags, func(want []string) bool { return retention.HasTags(tags, want) })
}

// ForgetOptions of PlanForget.
type ForgetOptions struct {
	// Remove names what goes; then the policy and what belongs to it must be empty.
	Remove []id.ID

	Policy        retention.Policy
	GroupBy       retention.GroupBy
	Filter        Filter
	OtherPrograms bool // judge snapshots, too, that Holdfast did not make

	// RemoveLastComplete allows an instance to be left without any complete snapshot.
	RemoveLastComplete bool
	Progress           progress.Sink
	Now                time.Time // zero: time.Now
}

// ForgetPlan says what goes and why the rest stays.
type ForgetPlan struct {
	// Groups hold a decision on each snapshot that was judged.
	Groups []retention.Group
	// Remove lists what goes, oldest first.
	Remove []id.ID
	// Others counts the snapshots that nobody asked about.
	Others int
}

// PlanForget decides which of the snapshots in list go. The index must be loaded, because whether a snapshot is complete
// lies in its manifest. Errors: ErrNoPolicy, *LastCompleteError.
func PlanForget(ctx context.Context, r *repo.Repository, list []*snapshot.Snapshot, o ForgetOptions) (*ForgetPlan, error) {
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	byID := make(map[id.ID]*snapshot.Snapshot, len(list))
	all := make([]retention.Snapshot, len(list))
	for i, s := range list {
		byID[s.ID()] = s
		all[i] = retention.Snapshot{ID: s.ID(), Time: s.Time, Host: s.Hostname, Paths: s.Paths, Tags: s.Tags, Own: s.HasTag(snapshot.Tag)}
	}
	known := map[id.ID]bool{}
	complete := func(s *retention.Snapshot) bool {
		c, ok := known[s.ID]
		if !ok {
			c = isComplete(ctx, r, byID[s.ID], o.Progress)
			known[s.ID] = c
		}
		return c
	}
	p := &ForgetPlan{}
	if len(o.Remove) > 0 {
		remove := map[id.ID]bool{}
		for _, d := range o.Remove {
			remove[d] = true
		}
		if !o.RemoveLastComplete {
			var e LastCompleteError
			for _, s := range retention.LastComplete(all, remove, complete) {
				e.Snapshots = append(e.Snapshots, s.ID)
			}
			if err := ctx.Err(); err != nil {
				return nil, context.Cause(ctx)
			}
			if len(e.Snapshots) > 0 {
				return nil, &e
			}
		}
		for _, s := range list {
			if remove[s.ID()] {
				p.Remove = append(p.Remove, s.ID())
				delete(remove, s.ID())
			}
		}
		// Records that cannot be read are in no list.
		for _, d := range o.Remove {
			if remove[d] {
				p.Remove = append(p.Remove, d)
				delete(remove, d)
			}
		}
		p.Others = len(list) - len(p.Remove)
		return p, nil
	}

	if o.Policy.Empty() {
		return nil, ErrNoPolicy
	}
	p.Groups = retention.Decide(all, retention.Options{
		Policy: o.Policy, GroupBy: o.GroupBy, OtherPrograms: o.OtherPrograms, Now: o.Now,
		Select:   func(s *retention.Snapshot) bool { return o.Filter.Fits(s.Host, s.Paths, s.Tags) },
		Complete: complete, RemoveLastComplete: o.RemoveLastComplete,
	})
	if ctx.Err() != nil { // then completeness is unknown, and so is the plan
		return nil, context.Cause(ctx)
	}
	goes := map[id.ID]bool{}
	p.Others = len(list)
	for _, g := range p.Groups {
		p.Others -= len(g.Decisions)
		for _, d := range g.Decisions {
			goes[d.ID] = !d.Keep
		}
	}
	for _, s := range list { // oldest first
		if goes[s.ID()] {
			p.Remove = append(p.Remove, s.ID())
		}
	}
	return p, nil
}

// isComplete asks the manifest. What cannot be told is not complete: it must not be relied on.
func isComplete(ctx context.Context, r *repo.Repository, s *snapshot.Snapshot, sink progress.Sink) bool {
	if s.Tree == nil {
		return false
	}
	m, err := snapshot.LoadManifest(ctx, r, *s.Tree)
	if err != nil {
		if ctx.Err() == nil {
			sink.Emit(progress.Event{Kind: progress.Warning, Phase: "forget",
				Message: fmt.Sprintf("snapshot %s is not counted as complete, because its manifest cannot be read: %v", s.ID().Short(), err)})
		}
		return false
	}
	return m.Proof.Complete
}

// Forget removes the records that the plan names. The repository must be locked exclusively. A kill
// leaves some of them, and nothing else. It returns how many are gone; their data goes with the next prune.
func Forget(ctx context.Context, r *repo.Repository, p *ForgetPlan) (removed int, err error) {
	if len(p.Remove) == 0 {
		return 0, nil
	}
	if err := r.CanRemove(ctx, backend.SnapshotFile); err != nil {
		return 0, err
	}
	for _, d := range p.Remove {
		if err := ctx.Err(); err != nil {
			return removed, context.Cause(ctx)
		}
		err := r.RemoveUnpacked(ctx, backend.SnapshotFile, d)
		if err != nil && !errors.Is(err, backend.ErrNotExist) {
			return removed, fmt.Errorf("remove the record of snapshot %s: %w", d.Short(), err)
		}
		removed++
	}
	return removed, nil
}

// Without returns the snapshots of list that are not in removed.
func Without(list []*snapshot.Snapshot, removed []id.ID) []*snapshot.Snapshot {
	gone := map[id.ID]bool{}
	for _, d := range removed {
		gone[d] = true
	}
	return slices.DeleteFunc(slices.Clone(list), func(s *snapshot.Snapshot) bool { return gone[s.ID()] })
}
