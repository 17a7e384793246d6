package maintain_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/fault"
	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/maintain"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// source makes a repository with some snapshots.
func source(t *testing.T, seed uint64, n int) (*mem.Backend, map[id.ID]state) {
	t.Helper()
	be := mem.New()
	newRepo(t, be)
	in := &instance{rand.New(rand.NewPCG(seed, 13)), "a", map[string][]byte{}}
	want := map[id.ID]state{}
	for i := range n {
		in.change()
		s, err := backUp(t.Context(), be, in, time.Now().Add(time.Duration(i-n)*time.Hour), true)
		if err != nil {
			t.Fatal(err)
		}
		want[*s.Tree] = in.state()
	}
	return be, want
}

// copyAll does what the command does.
func copyAll(ctx context.Context, from, to backend.Backend, o maintain.CopyOptions) (*maintain.CopyResult, error) {
	src, err := open(ctx, from)
	if err != nil {
		return nil, err
	}
	dst, err := open(ctx, to)
	if err != nil {
		return nil, err
	}
	l, ctx, err := dst.Lock(ctx, repo.LockOptions{})
	if err != nil {
		return nil, err
	}
	list, err := snapshot.List(ctx, src)
	if err := errors.Join(err, src.LoadIndex(ctx), dst.LoadIndex(ctx)); err != nil {
		return nil, err
	}
	res, err := maintain.Copy(ctx, src, dst, list, o)
	return res, errors.Join(err, l.Unlock())
}

func TestCopyKilledAndResumed(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	from, want := source(t, 1, 5)
	empty := mem.New()
	newRepo(t, empty)
	count := fault.New(empty.Clone())
	if _, err := copyAll(ctx, from, count, maintain.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	for n := 1; n <= count.Writes(); n += 2 {
		what := fmt.Sprintf("killed at write %d of %d", n, count.Writes())
		m := empty.Clone()
		f := fault.New(m)
		f.KillBefore(n)
		if _, err := copyAll(ctx, from, f, maintain.CopyOptions{}); !errors.Is(err, fault.ErrKilled) {
			t.Errorf("%s: %v", what, err)
		}
		before := len(holds(t, what, m, want))
		res, err := copyAll(ctx, from, m, maintain.CopyOptions{ReadBack: true})
		if err != nil || res.Copied != 5-before || res.Present != before {
			t.Errorf("%s: then %+v, %v", what, res, err)
		}
		if list := holds(t, what+", resumed", m, want); len(list) != 5 {
			t.Errorf("%s: %d snapshots", what, len(list))
		}
	}
}

func TestCopyKeepsRecords(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	from, want := source(t, 2, 3)
	dir := filepath.Join(t.TempDir(), "repo")
	to := local.New(dir)
	newRepo(t, to)
	var told int
	if _, err := copyAll(ctx, from, to, maintain.CopyOptions{Done: func(*snapshot.Snapshot, id.ID) { told++ }}); err != nil || told != 3 {
		t.Fatal(told, err)
	}
	holds(t, "copied", to, want)
	resticClean(t, "copied", dir)
	a, err := snapshot.List(ctx, mustOpen(t, from))
	if err != nil {
		t.Fatal(err)
	}
	b, err := snapshot.List(ctx, mustOpen(t, to))
	if err != nil {
		t.Fatal(err)
	}
	for i := range a {
		if x, y := a[i], b[i]; !x.Time.Equal(y.Time) || !slices.Equal(x.Tags, y.Tags) || *x.Tree != *y.Tree || y.Original == nil || *y.Original != x.ID() || y.Parent != nil {
			t.Errorf("%+v became %+v", x, y)
		}
	}
	// There and back again, and on to a third: nothing is copied twice, and the first id stays.
	if res, err := copyAll(ctx, to, from, maintain.CopyOptions{}); err != nil || res.Copied != 0 || res.Present != 3 {
		t.Errorf("back: %+v, %v", res, err)
	}
	third := mem.New()
	newRepo(t, third)
	if res, err := copyAll(ctx, to, third, maintain.CopyOptions{}); err != nil || res.Copied != 3 {
		t.Errorf("on: %+v, %v", res, err)
	}
	if res, err := copyAll(ctx, from, third, maintain.CopyOptions{}); err != nil || res.Copied != 0 {
		t.Errorf("from the first: %+v, %v", res, err)
	}
	if _, err := copyAll(ctx, from, from, maintain.CopyOptions{}); !errors.Is(err, maintain.ErrSameRepository) {
		t.Errorf("to itself: %v", err)
	}
}

func TestCopyTroubles(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	from, want := source(t, 3, 4)
	// A pack of the first backup is damaged at the source: what needs it is not copied, and nothing half.
	r := mustOpen(t, from)
	if err := r.LoadIndex(ctx); err != nil {
		t.Fatal(err)
	}
	var hurt backend.Handle
	r.EachBlob(func(bt repo.BlobType, _, p repo.ID, _, _ int64) {
		if bt == repo.DataBlob && hurt.Name == "" {
			hurt = backend.Handle{Type: backend.PackFile, Name: p.String()}
		}
	})
	bad := from.Clone()
	bad.Put(hurt, make([]byte, 100))
	to := mem.New()
	newRepo(t, to)
	res, err := copyAll(ctx, bad, to, maintain.CopyOptions{})
	if err != nil || len(res.Failed) == 0 || res.Copied+len(res.Failed) != 4 {
		t.Errorf("damaged source: %+v, %v", res, err)
	}
	if got := holds(t, "damaged source", to, want); len(got) != res.Copied {
		t.Errorf("%d snapshots, %d copied", len(got), res.Copied)
	}
	if res, err = copyAll(ctx, from, to, maintain.CopyOptions{}); err != nil || len(res.Failed) > 0 {
		t.Errorf("whole source: %+v, %v", res, err)
	}
	holds(t, "whole source", to, want)

	// The destination is full.
	to = mem.New()
	newRepo(t, to)
	full := fault.New(to, fault.Fault{Op: fault.Save, Type: backend.PackFile, N: 3, Times: -1, Err: &backend.PermanentError{Err: syscall.ENOSPC}})
	if _, err := copyAll(ctx, from, full, maintain.CopyOptions{}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("full: %v", err)
	}
	holds(t, "full", to, want)
	// It stores something else than it was given: reading back shows it.
	to = mem.New()
	newRepo(t, to)
	lies := fault.New(to, fault.Fault{Op: fault.Save, Type: backend.PackFile, Effect: fault.Corrupt, Times: -1})
	if _, err := copyAll(ctx, from, lies, maintain.CopyOptions{ReadBack: true}); err == nil {
		t.Error("a medium that lies was believed")
	}
	if list, err := snapshot.List(ctx, mustOpen(t, to)); err != nil || len(list) > 0 {
		t.Errorf("%d snapshots, %v", len(list), err)
	}
}

func tagAll(ctx context.Context, be backend.Backend, c maintain.TagChange) error {
	r, err := open(ctx, be)
	if err != nil {
		return err
	}
	list, err := snapshot.List(ctx, r)
	if err != nil {
		return err
	}
	_, err = maintain.Tag(ctx, r, list, list, c)
	return err
}

// Killed at any write, no snapshot is lost, and the next run leaves each once.
func TestTagKilled(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	base, want := source(t, 4, 3)
	c := maintain.TagChange{Add: []string{"x"}}
	for n := 1; n <= 7; n++ { // a trial removal, and two writes for each
		for _, after := range []bool{false, true} {
			what := fmt.Sprintf("killed at write %d, after it: %v", n, after)
			m := base.Clone()
			f := fault.New(m)
			if after {
				f.KillAfter(n)
			} else {
				f.KillBefore(n)
			}
			if err := tagAll(ctx, f, c); !errors.Is(err, fault.ErrKilled) {
				t.Fatalf("%s: %v", what, err)
			}
			trees := map[id.ID]bool{}
			for _, s := range holds(t, what, m, want) {
				trees[*s.Tree] = true
			}
			if len(trees) != 3 {
				t.Fatalf("%s: %d of 3 are left", what, len(trees))
			}
			if err := tagAll(ctx, m, c); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			list := holds(t, what+", again", m, want)
			if len(list) != 3 {
				t.Errorf("%s, again: %d snapshots", what, len(list))
			}
			for _, s := range list {
				if !slices.Equal(s.Tags, []string{snapshot.Tag, "x"}) || s.Original == nil {
					t.Errorf("%s: %v, %v", what, s.Tags, s.Original)
				}
			}
		}
	}
}

// Statistics against a slow oracle.
func TestStats(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	be, want := source(t, 5, 5)
	r := mustOpen(t, be)
	if err := r.LoadIndex(ctx); err != nil {
		t.Fatal(err)
	}
	list, err := snapshot.List(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	need := make([]map[repo.BlobRef]bool, len(list))
	for i, s := range list {
		need[i] = map[repo.BlobRef]bool{}
		walk(t, r, *s.Tree, need[i])
	}
	sum := func(m map[repo.BlobRef]bool) (plain, stored int64) {
		r.EachBlob(func(bt repo.BlobType, d, _ repo.ID, p, n int64) {
			if m[repo.BlobRef{Type: bt, ID: d}] {
				plain += p
				stored += n
			}
		})
		return plain, stored
	}
	union := map[repo.BlobRef]bool{}
	var bytes, files int64
	for i, s := range list {
		for b := range need[i] {
			union[b] = true
		}
		m, err := snapshot.Lookup(ctx, r, *s.Tree, "manifest.json")
		if err != nil {
			t.Fatal(err)
		}
		bytes += int64(m.Size)
		files++
		for _, data := range want[*s.Tree] {
			bytes += int64(len(data))
			files++
		}
	}
	each, total, err := maintain.Stats(ctx, r, [][]*snapshot.Snapshot{list[:2], list[2:]}, nil)
	if err != nil || len(each) != 2 || each[0].Snapshots != 2 {
		t.Fatal(each, err)
	}
	plain, _ := sum(union)
	if total.Blobs != int64(len(union)) || total.PlainBytes != plain || total.RestoreBytes != bytes || total.Files != files || total.Folders != 4*5 {
		t.Errorf("%+v, want %d blobs, %d plain, %d bytes, %d files", total, len(union), plain, bytes, files)
	}
	for i, s := range list {
		f, err := maintain.SnapshotStats(ctx, r, s, list, nil)
		if err != nil {
			t.Fatal(err)
		}
		own := map[repo.BlobRef]bool{}
		for b := range need[i] {
			own[b] = true
			for k := range need {
				if k != i && need[k][b] {
					delete(own, b)
				}
			}
		}
		plain, _ := sum(need[i])
		_, stored := sum(own)
		// EachBlob leaves the entries of the headers aside: 37 or 41 bytes each.
		if lo, hi := stored+37*int64(len(own)), stored+41*int64(len(own)); f.PlainBytes != plain || f.OwnBytes < lo || f.OwnBytes > hi {
			t.Errorf("snapshot %d: %+v, want %d plain, %d to %d own", i, f, plain, lo, hi)
		}
	}
}

func walk(t *testing.T, r *repo.Repository, d id.ID, into map[repo.BlobRef]bool) {
	t.Helper()
	into[repo.BlobRef{Type: repo.TreeBlob, ID: d}] = true
	tree, err := snapshot.LoadTree(t.Context(), r, d)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range tree.Nodes {
		for _, b := range n.Content {
			into[repo.BlobRef{Type: repo.DataBlob, ID: b}] = true
		}
		if n.Type == snapshot.Dir {
			walk(t, r, n.Subtree, into)
		}
	}
}
