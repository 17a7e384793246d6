package restore

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// TreeOptions are those of RestoreTree and RestoreNode; the zero value works.
type TreeOptions struct {
	// Overwrite restores into a folder that holds something: what is in the way is moved aside.
	Overwrite bool
	// Exact moves aside what the folder holds and the snapshot does not, too.
	Exact    bool
	Owner    *Owner
	DryRun   bool
	Workers  int
	Progress progress.Sink
	Now      func() time.Time
}

// RestoreTree restores the folder whose list is tree to the local directory dest, which is made if
// it is missing. Dest may be reached by symbolic links; below it none is followed.
//
// Errors: those of Run.
func RestoreTree(ctx context.Context, r Repo, tree id.ID, dest string, o TreeOptions) (*Result, error) {
	return restoreNode(ctx, r, &snapshot.Node{Type: snapshot.Dir, Subtree: tree}, dest, o, false)
}

// RestoreNode restores one file or folder, its own metadata included, as dest.
//
// Errors: those of Run.
func RestoreNode(ctx context.Context, r Repo, n *snapshot.Node, dest string, o TreeOptions) (*Result, error) {
	return restoreNode(ctx, r, n, dest, o, true)
}

func restoreNode(ctx context.Context, r Repo, n *snapshot.Node, to string, o TreeOptions, withTop bool) (*Result, error) {
	ro := Options{
		Overwrite: o.Overwrite, Owner: o.Owner, DryRun: o.DryRun, Limits: Limits{Workers: o.Workers}, Progress: o.Progress, Now: o.Now,
	}
	ro.setDefaults()
	start := ro.Now()
	to, err := filepath.Abs(to)
	if err != nil {
		return nil, err
	}
	t := &Target{DataSet: filepath.Base(to), To: to, tree: n.Name, node: n}
	if t.path, err = resolve(to, t.single()); err != nil {
		return nil, err
	}
	empty, err := isEmpty(t)
	if err != nil {
		return nil, err
	}
	if !empty && !o.Overwrite {
		return nil, &NotEmptyError{Paths: []string{t.path}}
	}
	x := newRun(ctx, r, &ro)
	defer x.cancel(nil)
	stop := x.report(0, 0)
	defer stop()
	d := &dest{
		run: x, path: t.path, foreign: t.single() || !withTop, keepExtra: !o.Exact,
		res: &DataSetResult{Name: t.DataSet, Path: t.path},
	}
	if t.single() {
		d.path = filepath.Dir(t.path)
	}
	if !x.dry {
		if err := os.MkdirAll(filepath.Dir(d.path), 0o755); err != nil {
			return nil, err
		}
	}
	d.aside = x.asideAt(t.path + asideInfix + x.stamp)
	made, err := d.openTop()
	if err != nil {
		return nil, fmt.Errorf("%q: %w", d.path, err)
	}
	d.delta = !made && !empty && !d.absent
	dests := []*dest{d}
	if d.absent {
		dests = nil
	}
	defer func() { closeAll(dests) }()
	err = func() error {
		var err error
		switch {
		case t.single():
			err = walkTree(d, n, n.Name, filepath.Base(t.path))
		case withTop:
			err = walkTree(d, n, n.Name, "")
		default:
			err = walkList(d, n.Subtree)
		}
		if err != nil {
			return err
		}
		return x.finish([]*dest{d})
	}()
	if err != nil {
		x.cancel(err)
		_ = x.fill.finish()
		err = x.cause()
	}
	res := x.result([]*dest{d}, start, ro.Now())
	if err == nil && x.errCount > 0 {
		err = &IncompleteError{Errors: x.errs, Count: x.errCount}
	}
	return res, err
}

// walkList restores what is in the tree, but gives the root no metadata: none is known.
func walkList(d *dest, tree id.ID) error {
	a := newApplier(d, d.run.fill.add)
	defer a.close()
	if f := a.top(); !f.fresh && !f.absent {
		f.seen = map[string]struct{}{}
	}
	w := &treeWalker{run: d.run, a: a, on: map[id.ID]bool{}, groups: map[[2]uint64]string{}}
	raw, err := w.load([]id.ID{tree}, map[string]id.ID{"": tree})
	if err != nil {
		return err
	}
	if err := w.tree(tree, raw[tree], "", 1); err != nil {
		return err
	}
	return a.finish()
}
