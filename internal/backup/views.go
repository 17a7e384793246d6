package backup

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/mountinfo"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// views tell which data sets and stores are held still by views. The others are called cold, because
// they must be read while nothing runs.
type views struct {
	set    *fssnap.Set     // nil: everything is cold
	frozen map[string]bool // the roots of what is cold, if there is a set
	madeAt time.Time       // zero until the views are made
	keep   bool            // they are those of a good snapshot
}

// cold tells whether what has this root has no view.
func (v *views) cold(root string) bool { return v.set == nil || v.frozen[root] }

// all tells whether everything has a view.
func (v *views) all() bool { return v.set != nil && len(v.frozen) == 0 }

// translate returns where the picture of a path is. What has none, such as the server's binary, is read
// where it lies.
func (v *views) translate(path string) string {
	if v.set != nil {
		if p, ok := v.set.Translate(path); ok {
			return p
		}
	}
	return path
}

// check makes sure that the views are still whole: one that overflowed while it was read is no picture.
func (v *views) check(ctx context.Context) error {
	if v.set == nil {
		return nil
	}
	return v.set.Check(ctx)
}

// coldRoots lists the roots of what is cold, without those that lie in another one.
func (v *views) coldRoots(inst *ocis.Instance) []string {
	var cold []string
	for _, d := range inst.DataSets {
		if v.frozen[d.Path] && !slices.Contains(cold, d.Path) {
			cold = append(cold, d.Path)
		}
	}
	all := slices.Clone(cold)
	return slices.DeleteFunc(cold, func(p string) bool {
		return slices.ContainsFunc(all, func(o string) bool { return o != p && mountinfo.Below(p, o) })
	})
}

// planViews finds out what can be held still.
func (b *run) planViews(ctx context.Context) error {
	o, v := b.o, &b.views
	if i := slices.IndexFunc(o.Instance.Stores, func(s ocis.Store) bool { return s.S3 != nil }); i >= 0 && o.Freezer.Method() == freeze.KindViewOnly {
		return &HotError{Why: fmt.Sprintf("the blobs of store %s lie in a bucket, which no view holds still", o.Instance.Stores[i].Name)}
	}
	if len(o.Views) == 0 && o.Freezer.Method() == freeze.KindViewOnly {
		return &HotError{Why: "views are turned off"}
	}
	if len(o.Views) == 0 {
		return nil
	}
	var roots, left []string // what is read, and what is not
	for _, d := range o.Instance.DataSets {
		if d.Found && !excluded(o)[d.Name] {
			roots = append(roots, d.Path)
		} else if d.Path != "" {
			left = append(left, d.Path)
		}
	}
	newSet := func(paths, except []string) (*fssnap.Set, error) {
		return fssnap.NewSet(ctx, o.Views, paths, fssnap.Options{
			StateDir: o.Guard.StateDir, Label: o.Instance.BasePath, KeepLast: o.KeepViews, Except: except, Now: o.Now,
		})
	}
	set, err := newSet(roots, left)
	if err != nil {
		return err
	}
	// What cannot be held still makes cold the innermost root that it is, or lies in: others leave it out.
	v.frozen = map[string]bool{}
	lacking := set.Uncovered()
	for _, u := range lacking {
		v.frozen[innermost(u.Path, roots)] = true
	}
	if len(lacking) == 0 {
		v.set = set
		return nil
	}
	if o.Freezer.Method() == freeze.KindViewOnly {
		return &HotError{Why: fmt.Sprintf("%s cannot be held still by a view: %v", lacking[0].Path, lacking[0].Reason)}
	}
	viewed := slices.DeleteFunc(roots, func(r string) bool { return v.frozen[r] })
	what := "no views"
	if len(viewed) > 0 {
		what = "no view of " + strings.Join(v.coldRoots(o.Instance), ", ")
	}
	o.Progress.Emit(progress.Event{Kind: progress.Info, Phase: "view", Message: fmt.Sprintf(
		"%s: %s cannot be held still (%v); it is copied before and during the stop instead", what, lacking[0].Path, lacking[0].Reason)})
	if o.KeepViews > 0 {
		o.KeepViews = 0
		o.warn("no views are kept: they would be no way back for the whole instance")
	}
	if len(viewed) == 0 {
		return nil
	}
	for r := range v.frozen {
		left = append(left, r)
	}
	if set, err = newSet(viewed, left); err != nil {
		return err
	}
	if u := set.Uncovered(); len(u) > 0 {
		return fmt.Errorf("views of a part of the data: %s: %w", u[0].Path, u[0].Reason)
	}
	v.set = set
	return nil
}

// innermost returns the root that path is, or lies in: the longest if there are several.
func innermost(path string, roots []string) string {
	best, length := path, -1
	for _, r := range roots {
		real := r
		if p, err := filepath.EvalSymlinks(r); err == nil {
			real = p
		}
		if (path == r || mountinfo.Below(path, real)) && len(real) > length {
			best, length = r, len(real)
		}
	}
	return best
}

// makeViews makes the views, while nothing writes.
func (b *run) makeViews(ctx context.Context) error {
	v := &b.views
	if v.set == nil {
		return nil
	}
	if err := MakeViews(ctx, v.set, b.o.Instance, b.o.Freezer.Method(), b.o.Progress); err != nil {
		return err
	}
	for _, x := range v.set.Views() {
		// The earliest, because a service that was not stopped may have changed something since.
		if v.madeAt.IsZero() || x.MadeAt.Before(v.madeAt) {
			v.madeAt = x.MadeAt
		}
	}
	return nil
}

// MakeViews makes the views of an instance that is held still by the freeze method, and compares a sample
// with the source.
//
// Errors: *HotError; *fssnap.LossyViewError.
func MakeViews(ctx context.Context, set *fssnap.Set, inst *ocis.Instance, method string, sink progress.Sink) error {
	sink.Emit(progress.Event{Kind: progress.Start, Phase: "view"})
	if err := set.Create(ctx); err != nil {
		return err
	}
	hot := method == freeze.KindViewOnly
	if hot && !set.OneInstant(configPaths(inst)...) {
		return &HotError{Why: "its views are not known to be of one instant"}
	}
	var roots []string
	for _, s := range inst.Stores {
		roots = append(roots, s.Root)
	}
	if _, err := set.Verify(ctx, fssnap.VerifyOptions{Roots: roots, Frozen: !hot}); err != nil {
		return err
	}
	sink.Emit(progress.Event{Kind: progress.Finish, Phase: "view"})
	return nil
}

// configPaths are those of the configuration, which the instance itself does not write.
func configPaths(inst *ocis.Instance) []string {
	var out []string
	for _, d := range inst.DataSets {
		if d.Kind == ocis.Config {
			out = append(out, d.Path)
		}
	}
	return out
}

// HotError is returned for an instance that was to run while views were made, and must not.
type HotError struct{ Why string }

func (e *HotError) Error() string {
	return "the instance cannot be backed up while it runs: " + e.Why
}

// Hints says what to do next.
func (e *HotError) Hints() []string {
	return []string{"No snapshot was made. --freeze auto stops the instance for as short as can be, and copies before the stop what no view can hold still."}
}

// keepFor lets the views stay after a good backup.
func (v *views) keepFor(res *Result) {
	if v.set != nil && !res.SnapshotID.IsNull() {
		v.keep = v.set.SetNote(snapshot.NewViewNote(res.SnapshotID.String(), res.Manifest)) == nil
	}
}

// closeViews removes the views, or keeps them.
func (b *run) closeViews(ctx context.Context) {
	v := &b.views
	if v.set == nil {
		return
	}
	if !v.keep {
		v.set.Discard()
	}
	if err := v.set.Close(context.WithoutCancel(ctx)); err != nil {
		b.o.warn("a view is left behind: %v; `holdfast views --remove` removes it", err)
	}
}

// viewRecords is what the manifest says: a view for each source, and one of kind none for each root
// that has no view.
func (b *run) viewRecords() []snapshot.View {
	v, inst := &b.views, b.o.Instance
	if v.set == nil {
		return []snapshot.View{{Kind: "none", Source: inst.BasePath}}
	}
	var out []snapshot.View
	for _, x := range v.set.Views() {
		at := x.MadeAt.UTC()
		out = append(out, snapshot.View{Kind: x.Kind, Source: x.Source, MadeAt: &at})
	}
	for _, root := range v.coldRoots(inst) {
		out = append(out, snapshot.View{Kind: "none", Source: root})
	}
	return out
}
