// Package verify checks a repository: its structure, on request every byte, and the proof of each
// snapshot once more from what is stored. It reads repo and snapshot and changes nothing.
package verify

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"sync"

	"github.com/holdfast-backup/holdfast/internal/bucket"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Options of a check.
type Options struct {
	// ReadData reads every pack and compares every byte with its checksum.
	ReadData bool
	// Bucket makes a client of the bucket that has the contents of a store which the repository does not
	// have. nil, or an error: such objects are not asked for, and a hint says so.
	Bucket func(ctx context.Context, st *snapshot.Store) (*bucket.Bucket, error)
	// Spaces is how many spaces are proven at a time, each with folders and a part of its archive in memory; 0: one for
	// each processor.
	Spaces int
	// Remember bounds the memory for parts of archives that several snapshots have in common, in bytes; 0: 16 MiB. What is not
	// remembered is read again for each.
	Remember int64
	Progress progress.Sink
}

// Report is what a check found. Errors are damage; Hints are harmless and will go with the next prune.
type Report struct {
	Errors []string
	Hints  []string
	// Snapshots holds one verdict for each of Holdfast's snapshots whose record can be read.
	Snapshots []Snapshot
}

// Snapshot is the verdict on one of Holdfast's snapshots.
type Snapshot struct {
	ID id.ID
	// Complete is false if something was missing when the snapshot was made, and if anything that it
	// needs is missing or wrong now.
	Complete bool
	// Proof holds what was counted now. Its lists are those of the manifest: the gaps that were known
	// when the snapshot was made. What went wrong since is in the report's errors.
	Proof snapshot.Proof
}

// checker is the state of one check.
type checker struct {
	r   *repo.Repository
	o   Options
	rep *Report
	mu  sync.Mutex
	// trees holds those that were walked, and whether something was wrong with them or below them.
	trees map[id.ID]bool
	// doubt names the blobs in packs that are missing or damaged, by pack.
	doubt map[repo.BlobRef][]id.ID
	// buckets are those with contents of snapshots, by their places.
	buckets map[string]*objects
}

func (c *checker) errorf(format string, args ...any) {
	c.mu.Lock()
	c.rep.Errors = append(c.rep.Errors, fmt.Sprintf(format, args...))
	c.mu.Unlock()
}

// finding takes what the check of the packs reports.
func (c *checker) finding(err error) {
	if repo.IsHint(err) {
		c.mu.Lock()
		c.rep.Hints = append(c.rep.Hints, err.Error())
		c.mu.Unlock()
		return
	}
	c.errorf("%v", err)
	var ce *repo.CheckError
	if !errors.As(err, &ce) {
		return
	}
	pack, err := id.Parse(ce.File.Name)
	if err != nil {
		return
	}
	c.mu.Lock()
	for _, b := range ce.Blobs {
		c.doubt[b] = append(c.doubt[b], pack)
	}
	c.mu.Unlock()
}

// clear takes the blobs out of doubt that lie in another pack as well.
func (c *checker) clear() {
	if len(c.doubt) == 0 {
		return
	}
	c.r.EachBlob(func(t repo.BlobType, blob, pack id.ID, _, _ int64) {
		ref := repo.BlobRef{Type: t, ID: blob}
		if packs, ok := c.doubt[ref]; ok && !slices.Contains(packs, pack) {
			delete(c.doubt, ref)
		}
	})
}

// Run checks the repository, whose index must be loaded.
//
// Errors: only those that end the check; damage is in the report.
func Run(ctx context.Context, r *repo.Repository, o Options) (*Report, error) {
	c := &checker{r: r, o: o, rep: &Report{}, trees: map[id.ID]bool{}, doubt: map[repo.BlobRef][]id.ID{}, buckets: map[string]*objects{}}
	defer c.closeBuckets()
	phase := func(k progress.Kind, item string) {
		o.Progress.Emit(progress.Event{Kind: k, Phase: "check", Item: item})
	}
	phase(progress.Start, "packs and index")
	if err := r.Check(ctx, repo.CheckOptions{ReadData: o.ReadData, Progress: o.Progress}, c.finding); err != nil {
		return nil, err
	}
	c.clear()
	list, err := snapshot.List(ctx, r)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		c.errorf("%v", err)
	}
	for _, s := range list {
		phase(progress.Update, "snapshot "+s.ID().Short())
		if s.Tree == nil {
			c.errorf("snapshot %s has no tree", s.ID().Short())
			continue
		}
		if err := c.walk(ctx, *s.Tree, s.ID().Short()+":"); err != nil {
			return nil, err
		}
	}
	for own := snapshot.Own(list); len(own) > 0; {
		n, err := c.proveSome(ctx, own)
		if err != nil {
			return nil, err
		}
		own = own[n:]
	}
	phase(progress.Finish, "")
	sort.Strings(c.rep.Errors)
	sort.Strings(c.rep.Hints)
	return c.rep, nil
}
