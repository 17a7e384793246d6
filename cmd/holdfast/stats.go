package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/maintain"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

func (a *app) statsCommand() *cobra.Command {
	var filter filterFlags
	var noLock bool
	c := &cobra.Command{
		Use:   "stats [SNAPSHOT...]",
		Short: "Show what snapshots and instances take",
		Long: `Show for each instance, or for the snapshots that are named, how many files there are,
how large they are when they are restored, and what they take in the repository. What
several snapshots share is counted once in the last two: content is what it comes to
before compression, stored after it. For a named snapshot, "own" is what no other one
needs: what forget and prune would give back.

` + exitHelp(repoCodes...),
		Args: args(0, 1000, "ids of snapshots"),
		RunE: a.verb(func(ctx context.Context, names []string) error {
			return a.withRepository(ctx, repoOptions{}, readLock(noLock), func(ctx context.Context, r *repo.Repository) error {
				list, err := a.listSnapshots(ctx, r)
				if err != nil {
					return err
				}
				which, err := findSnapshots(list, names)
				if err != nil {
					return err
				}
				if err := a.loadIndex(ctx, r); err != nil {
					return err
				}
				if len(names) > 0 {
					return a.snapshotStats(ctx, r, list, which)
				}
				f := filter.filter()
				list = slices.DeleteFunc(list, func(s *snapshot.Snapshot) bool { return !f.Fits(s.Hostname, s.Paths, s.Tags) })
				return a.stats(ctx, r, list)
			})
		}),
	}
	filter.add(c.Flags(), "count")
	noLockFlag(c, &noLock)
	return c
}

// figuresJSON is what every object of stats has.
type figuresJSON struct {
	maintain.Figures
	Dedup       float64 `json:"dedup_ratio"`
	Compression float64 `json:"compression_ratio"`
}

func newFiguresJSON(f maintain.Figures) figuresJSON {
	return figuresJSON{f, f.DedupRatio(), f.CompressionRatio()}
}

func figureCells(f *maintain.Figures) []string {
	return []string{
		fmt.Sprint(f.Files), ui.Bytes(f.RestoreBytes), ui.Bytes(f.PlainBytes), ui.Bytes(f.StoredBytes),
		fmt.Sprintf("%.1f", f.DedupRatio()), fmt.Sprintf("%.1f", f.CompressionRatio()),
	}
}

func (a *app) stats(ctx context.Context, r *repo.Repository, list []*snapshot.Snapshot) error {
	// By instance, in the order of the first snapshot of each.
	var groups [][]*snapshot.Snapshot
	place := map[string]int{}
	for _, s := range list {
		key := fmt.Sprintf("%q %q", s.Hostname, slices.Sorted(slices.Values(s.Paths)))
		i, ok := place[key]
		if !ok {
			i = len(groups)
			place[key] = i
			groups = append(groups, nil)
		}
		groups[i] = append(groups[i], s)
	}
	each, total, err := maintain.Stats(ctx, r, groups, a.ui.Sink())
	if err != nil {
		return ui.WithHints(fmt.Errorf("cannot add up the snapshots: %w", err), "`holdfast check` tells what is damaged.")
	}
	var stored, blobs int64
	r.EachBlob(func(_ repo.BlobType, _, _ repo.ID, _, n int64) { blobs++; stored += n })
	if a.ui.JSON() {
		for i, f := range each {
			s := groups[i][0]
			a.ui.Object(struct {
				Event    string   `json:"event"`
				Hostname string   `json:"hostname"`
				Paths    []string `json:"paths"`
				figuresJSON
			}{"instance", s.Hostname, append([]string{}, s.Paths...), newFiguresJSON(f)})
		}
		a.ui.Object(struct {
			Event string `json:"event"`
			Verb  string `json:"verb"`
			figuresJSON
			RepositoryBlobs int64 `json:"repository_blobs"`
			RepositoryBytes int64 `json:"repository_bytes"`
		}{"summary", "stats", newFiguresJSON(total), blobs, stored})
		return nil
	}
	var rows [][]string
	for i, f := range each {
		s := groups[i][0]
		paths := make([]string, len(s.Paths))
		for k, p := range s.Paths {
			paths[k] = ui.Quote(p)
		}
		name := strings.TrimSpace(quoteOrBlank(s.Hostname) + " " + strings.Join(paths, ", "))
		rows = append(rows, append([]string{name, fmt.Sprint(f.Snapshots)}, figureCells(&f)...))
	}
	if len(each) != 1 {
		rows = append(rows, append([]string{"all", fmt.Sprint(total.Snapshots)}, figureCells(&total)...))
	}
	a.ui.Text(ui.Table([]string{"Instance", ">Snapshots", ">Files", ">Restored", ">Content", ">Stored", ">Dedup", ">Compr."}, rows)...)
	a.ui.Info("the repository holds %s, %s", ui.Count(blobs, "blob"), ui.Bytes(stored))
	return nil
}

func (a *app) snapshotStats(ctx context.Context, r *repo.Repository, list, which []*snapshot.Snapshot) error {
	var rows [][]string
	for _, s := range which {
		f, err := maintain.SnapshotStats(ctx, r, s, list, a.ui.Sink())
		if err != nil {
			return ui.WithHints(fmt.Errorf("cannot add up a snapshot: %w", err), "`holdfast check` tells what is damaged.")
		}
		if a.ui.JSON() {
			a.ui.Object(struct {
				Event string    `json:"event"`
				ID    string    `json:"id"`
				Time  time.Time `json:"time"`
				figuresJSON
				OwnBytes int64 `json:"own_bytes"`
			}{"snapshot", s.ID().String(), s.Time.UTC(), newFiguresJSON(f.Figures), f.OwnBytes})
			continue
		}
		rows = append(rows, append(append([]string{s.ID().Short(), s.Time.Local().Format(time.DateTime)}, figureCells(&f.Figures)...), ui.Bytes(f.OwnBytes)))
	}
	if !a.ui.JSON() {
		a.ui.Text(ui.Table([]string{"ID", "Time", ">Files", ">Restored", ">Content", ">Stored", ">Dedup", ">Compr.", ">Own"}, rows)...)
	}
	return nil
}
