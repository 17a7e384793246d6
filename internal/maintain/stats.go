package maintain

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Figures of a set of snapshots. Sizes are bytes.
type Figures struct {
	Snapshots int `json:"snapshots"`
	// Files, Folders and RestoreBytes are what restoring each of the snapshots would write.
	Files        int64 `json:"files"`
	Folders      int64 `json:"folders"`
	RestoreBytes int64 `json:"restore_bytes"`
	// Blobs are distinct; PlainBytes is their content, StoredBytes what they take in the repository.
	Blobs       int64 `json:"blobs"`
	PlainBytes  int64 `json:"plain_bytes"`
	StoredBytes int64 `json:"stored_bytes"`
}

// DedupRatio is how many bytes would be written for each that had to be stored; 0 if nothing is stored.
func (f *Figures) DedupRatio() float64 { return ratio(f.RestoreBytes, f.PlainBytes) }

// CompressionRatio is how many bytes of content each stored byte stands for.
func (f *Figures) CompressionRatio() float64 { return ratio(f.PlainBytes, f.StoredBytes) }

func ratio(a, b int64) float64 {
	if b == 0 {
		return 0
	}
	return float64(a) / float64(b)
}

// SnapshotFigures are those of one snapshot. Own is what no other snapshot needs, in stored bytes: what prune would
// give back if it were forgotten.
type SnapshotFigures struct {
	Snapshot *snapshot.Snapshot
	Figures
	OwnBytes int64
}

// treeSum is what one tree comes to, with all below it.
type treeSum struct{ files, folders, bytes int64 }

// statsScan adds up trees. Each is read once, and remembered with 56 bytes.
type statsScan struct {
	r    *repo.Repository
	sums map[id.ID]treeSum
	sink progress.Sink
	ev   progress.Event
}

// sum adds up the tree d with a stack of its own, as nothing bounds how deep folders lie in each other.
func (s *statsScan) sum(ctx context.Context, d id.ID) (treeSum, error) {
	type frame struct {
		id    id.ID
		sum   treeSum
		below []id.ID
	}
	var stack []frame
	enter := func(d id.ID) error {
		p, err := s.r.LoadBlob(ctx, repo.TreeBlob, d, nil)
		if err != nil {
			return fmt.Errorf("tree %s: %w", d.Short(), err)
		}
		var t struct {
			Nodes []struct {
				Type    snapshot.NodeType `json:"type"`
				Size    int64             `json:"size"`
				Subtree *id.ID            `json:"subtree"`
			} `json:"nodes"`
		}
		if err := json.Unmarshal(p, &t); err != nil {
			return fmt.Errorf("tree %s: %w", d.Short(), err)
		}
		f := frame{id: d}
		for _, n := range t.Nodes {
			switch {
			case n.Type == snapshot.Dir && n.Subtree != nil:
				f.below = append(f.below, *n.Subtree)
				f.sum.folders++
			case n.Type == snapshot.File:
				f.sum.files++
				f.sum.bytes += n.Size
			}
		}
		stack = append(stack, f)
		s.ev.Kind, s.ev.Done = progress.Update, s.ev.Done+1
		s.sink.Emit(s.ev)
		return nil
	}
	if t, ok := s.sums[d]; ok {
		return t, nil
	}
	if err := enter(d); err != nil {
		return treeSum{}, err
	}
	for {
		f := &stack[len(stack)-1]
		if len(f.below) == 0 {
			s.sums[f.id] = f.sum
			stack = stack[:len(stack)-1]
			if len(stack) == 0 {
				return s.sums[d], nil
			}
			continue // the one above finds it in sums now
		}
		next := f.below[len(f.below)-1]
		t, ok := s.sums[next]
		if !ok {
			if err := enter(next); err != nil {
				return treeSum{}, err
			}
			continue
		}
		f.below = f.below[:len(f.below)-1]
		f.sum.files += t.files
		f.sum.folders += t.folders
		f.sum.bytes += t.bytes
	}
}

// needs marks what the snapshots in list need in m, and adds what was not marked before to f.
func (s *statsScan) needs(ctx context.Context, list []*snapshot.Snapshot, m *repo.Marks, f *Figures) error {
	roots := make([]id.ID, len(list))
	for i, sn := range list {
		roots[i] = *sn.Tree
	}
	add := m.Adder()
	err := snapshot.Used(ctx, s.r, roots, add.Mark, nil)
	blobs, plain, stored := add.Sum()
	f.Blobs += blobs
	f.PlainBytes += plain
	f.StoredBytes += stored
	return err
}

// Stats adds up groups of snapshots, each as a whole, and all of them together. The index must be loaded.
func Stats(ctx context.Context, r *repo.Repository, groups [][]*snapshot.Snapshot, sink progress.Sink) (each []Figures, total Figures, err error) {
	s := &statsScan{r: r, sums: map[id.ID]treeSum{}, sink: sink, ev: progress.Event{Kind: progress.Start, Phase: "scan", Unit: "folders"}}
	sink.Emit(s.ev)
	all := r.NewMarks()
	for _, g := range groups {
		f := Figures{Snapshots: len(g)}
		for _, sn := range g {
			if err := s.restore(ctx, sn, &f); err != nil {
				return nil, total, err
			}
		}
		if err := s.needs(ctx, g, r.NewMarks(), &f); err != nil {
			return nil, total, err
		}
		each = append(each, f)
		total.Snapshots += f.Snapshots
		total.Files += f.Files
		total.Folders += f.Folders
		total.RestoreBytes += f.RestoreBytes
	}
	if err := s.needs(ctx, slices.Concat(groups...), all, &total); err != nil {
		return nil, total, err
	}
	s.ev.Kind = progress.Finish
	sink.Emit(s.ev)
	return each, total, nil
}

func (s *statsScan) restore(ctx context.Context, sn *snapshot.Snapshot, f *Figures) error {
	if sn.Tree == nil {
		return fmt.Errorf("snapshot %s has no tree", sn.ID().Short())
	}
	t, err := s.sum(ctx, *sn.Tree)
	if err != nil {
		return fmt.Errorf("snapshot %s: %w", sn.ID().Short(), err)
	}
	f.Files += t.files
	f.Folders += t.folders
	f.RestoreBytes += t.bytes
	return nil
}

// SnapshotStats adds up one snapshot, and what it alone needs among all those in list.
func SnapshotStats(ctx context.Context, r *repo.Repository, sn *snapshot.Snapshot, list []*snapshot.Snapshot, sink progress.Sink) (*SnapshotFigures, error) {
	s := &statsScan{r: r, sums: map[id.ID]treeSum{}, sink: sink, ev: progress.Event{Kind: progress.Start, Phase: "scan", Unit: "folders"}}
	sink.Emit(s.ev)
	out := &SnapshotFigures{Snapshot: sn, Figures: Figures{Snapshots: 1}}
	if err := s.restore(ctx, sn, &out.Figures); err != nil {
		return nil, err
	}
	if err := s.needs(ctx, []*snapshot.Snapshot{sn}, r.NewMarks(), &out.Figures); err != nil {
		return nil, err
	}
	others := r.NewMarks()
	var dummy, own Figures
	rest := slices.DeleteFunc(slices.Clone(list), func(x *snapshot.Snapshot) bool { return x.ID() == sn.ID() || x.Tree == nil })
	if err := s.needs(ctx, rest, others, &dummy); err != nil {
		return nil, err
	}
	if err := s.needs(ctx, []*snapshot.Snapshot{sn}, others, &own); err != nil {
		return nil, err
	}
	out.OwnBytes = own.StoredBytes
	s.ev.Kind = progress.Finish
	sink.Emit(s.ev)
	return out, nil
}
