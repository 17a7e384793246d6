package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/bucket"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/restore"
	"github.com/holdfast-backup/holdfast/internal/restore/inplace"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// inPlaceSummary is the final object of a restore in place.
type inPlaceSummary struct {
	partSummary
	InPlace bool `json:"in_place"`
	*inplace.Result
	Seconds float64 `json:"seconds"`
}

// restoreInPlace puts what the address names into the storage of the stopped instance.
func (a *app) restoreInPlace(ctx context.Context, arg string, f *restoreFlags) error {
	if !isSpaceAddress(arg) {
		return ui.WithHints(usageError("--in-place is about a space or what is in one, and %s names none", ui.Quote(arg)),
			"Such an address is SNAPSHOT:SPACE/PATH, e.g. latest:personal/alan/Reports.",
			"Without --in-place the whole instance is put back.")
	}
	if f.to.to != "" {
		return usageError("--to and --in-place exclude each other: one writes a copy, the other into the instance")
	}
	owner, err := parseOwner(f.owner)
	if err != nil {
		return err
	}
	return a.withRepository(ctx, repoOptions{}, readLock(f.noLock), func(ctx context.Context, r *repo.Repository) error {
		p, err := a.pick(ctx, r, arg, f.to.pick)
		if err != nil {
			return err
		}
		m := p.view.Manifest()
		inst, err := a.instanceHere(ctx, m, &f.place)
		if err != nil {
			return err
		}
		t, err := inPlaceTarget(m, p.item)
		if err != nil {
			return err
		}
		st := inst.Store(t.Store.Name)
		if st == nil {
			return fmt.Errorf("the instance at %s has no store %s", ui.Quote(inst.BasePath), ui.Quote(t.Store.Name))
		}
		if string(st.Layout) != t.Store.Layout || st.Prefix != t.Store.Prefix && st.Prefix != "" {
			return ui.WithHints(fmt.Errorf("store %s: %w", ui.Quote(st.Name), inplace.ErrLayout), "Restore into the running instance, or into a folder with --to.")
		}
		objects, err := a.inPlaceObjects(ctx, inst, st, &t.Store)
		if err != nil {
			return fmt.Errorf("the blobs of store %s: %w", ui.Quote(st.Name), err)
		}
		defer func() {
			if objects != nil {
				closeObjects(map[string]*restore.Objects{"": {Dest: objects.Dest, Source: objects.Source}})
			}
		}()
		var paths []string
		for _, d := range inst.DataSets {
			if d.Found {
				paths = append(paths, d.Path)
			}
		}
		release, err := a.nothingRuns(ctx, inst.BasePath, paths, f.dryRun)
		if err != nil {
			return cannotRestore(p.sn, err)
		}
		defer release()
		begun := time.Now()
		o := inplace.Options{Root: st.Root, DryRun: f.dryRun, Now: begun, Objects: objects}
		if owner != nil {
			o.Owner = &inplace.Owner{UID: owner.UID, GID: owner.GID}
		}
		if sys := inst.Store("system"); sys != nil && t.Store.Name != "system" {
			for i := range m.Stores {
				if m.Stores[i].Name == "system" {
					o.System, o.SystemStore = sys.Root, &m.Stores[i]
				}
			}
		}
		if err := r.Settled(ctx); err != nil {
			return err
		}
		res, err := inplace.Run(ctx, r, *p.sn.Tree, t, o)
		if err != nil {
			return explainInPlace(cannotRestore(p.sn, err), arg)
		}
		if t.Store.Layout == string(ocis.Posix) && !f.dryRun {
			a.ui.Info("the server reads the files anew when it starts; where STORAGE_USERS_POSIX_SCAN_FS is false, its command `posixfs scan` does that")
		}
		a.showInPlace(&inPlaceSummary{partSummary: summaryOf(p, f.dryRun), InPlace: true, Result: res, Seconds: time.Since(begun).Seconds()})
		return nil
	})
}

// inPlaceObjects opens the bucket that holds the blobs of a store, and the one with what the repository does not
// have; nil if the blobs are files.
func (a *app) inPlaceObjects(ctx context.Context, inst *ocis.Instance, st *ocis.Store, was *snapshot.Store) (*inplace.Objects, error) {
	if st.S3 == nil {
		if remoteDriver(st.Driver) {
			return nil, errors.New("the configuration does not say in which bucket they lie")
		}
		return nil, nil
	}
	o := &inplace.Objects{}
	var err error
	if o.Dest, err = a.bucketOf(ctx, st.S3); err != nil {
		return nil, err
	}
	for _, x := range o.Dest.CheckAccess(ctx, bucket.ListBucket, bucket.GetObject, bucket.PutObject, bucket.DeleteObject) {
		if err == nil {
			err = x.Err
		}
	}
	if err == nil {
		o.Source, err = a.openSource(ctx, inst, was)
	}
	if err != nil {
		o.Dest.Close()
		return nil, err
	}
	return o, nil
}

func explainInPlace(err error, arg string) error {
	switch {
	case errors.Is(err, inplace.ErrLayout):
		return ui.WithHints(err, "Restore into the running instance, or into a folder with --to.")
	case errors.Is(err, inplace.ErrInTrash):
		return ui.WithHints(err, "Restore that folder in its place, or take it out of the trash in the running instance first.")
	case errors.Is(err, inplace.ErrNoSpace):
		return ui.WithHints(err, "Restore the whole space: leave out the path in "+ui.Quote(arg)+".")
	case errors.Is(err, inplace.ErrPlanted):
		return ui.WithHints(err, "No server makes such a thing. `holdfast consistency` tells what else is wrong there.")
	case errors.Is(err, inplace.ErrLives):
		return ui.WithHints(err, "It was taken out of the trash since. Restore it to a folder with --to.")
	}
	return ui.WithHints(err, "Running it again finishes what was begun.")
}

// instanceHere finds the instance on this machine: where the flags say, else where it was.
func (a *app) instanceHere(ctx context.Context, m *snapshot.Manifest, p *placeFlags) (*ocis.Instance, error) {
	o, err := p.options(a)
	if err != nil {
		return nil, err
	}
	if o.BaseDataPath == "" && p.unit == "" && p.container == "" {
		o.BaseDataPath = m.BasePath
	}
	if o.ConfigDir == "" && p.unit == "" && p.container == "" {
		o.ConfigDir = m.ConfigDir
	}
	o.NoSizes = true
	inst, err := discover.Discover(ctx, o)
	if err != nil {
		return nil, explain(ctx, fmt.Errorf("cannot find the instance: %w", err))
	}
	for _, w := range inst.Warnings {
		a.ui.Warn("%s", w)
	}
	return inst, nil
}

// inPlaceTarget names what an item is on disk.
func inPlaceTarget(m *snapshot.Manifest, it *browse.Item) (inplace.Target, error) {
	t := inplace.Target{Node: it.NodeID()}
	for _, st := range m.Stores {
		for _, sp := range st.Spaces {
			if st.Name == it.Space.Store && sp.ID == it.Space.ID {
				t.Store, t.Space = st, sp
			}
		}
	}
	t.Key = t.Node
	switch {
	case it.Kind == browse.Current && it.Path == "":
		t.Node, t.Key = "", ""
	case t.Node == "":
		return t, fmt.Errorf("the snapshot has no id for %s", ui.Quote(it.Path))
	case it.Kind == browse.Version:
		t.Key = it.VersionKey()
	case it.Kind == browse.Trashed:
		if n := strings.Count(it.Path, "/"); n != 1 {
			return t, ui.WithHints(usageError("%s is not what was deleted, but in it", ui.Quote(it.Path)),
				"The item of the trash is put back as a whole; --to gives single files of it.")
		}
		t.Key = t.Node + ".T." + it.Stamp
	}
	return t, nil
}

func (a *app) showInPlace(s *inPlaceSummary) {
	if a.ui.JSON() {
		a.ui.Object(s)
		return
	}
	r := s.Result
	for _, w := range r.Warnings {
		a.ui.Warn("%s", w)
	}
	if a.ui.Quiet() {
		return
	}
	what := s.Space
	if s.Path != "" {
		what += "/" + s.Path
	}
	verb := "restored %s in its place: %s, %s, %s of content (%s) in %.1f s"
	if s.DryRun {
		verb = "dry run, nothing changed; restoring %s in its place would write %s, %s, %s of content (%s); took %.1f s"
	}
	lines := []string{fmt.Sprintf(verb, ui.Quote(what), ui.Count(r.Nodes, "node"), ui.Count(r.Revisions, "version"), ui.Count(r.Blobs, "blob"), ui.Bytes(r.Bytes), s.Seconds)}
	for _, x := range r.Parents {
		lines = append(lines, "the folder above was gone and is back: "+ui.Quote(x))
	}
	for _, x := range r.Trashed {
		lines = append(lines, "what had its name is in the trash now: "+ui.Quote(x))
	}
	for _, x := range r.Indexes {
		lines = append(lines, "the space is in the index again: "+ui.Quote(x))
	}
	for _, x := range r.Shares {
		lines = append(lines, "its list of shares is back: "+ui.Quote(x))
	}
	switch {
	case len(r.Moved) > 0 && s.DryRun:
		lines = append(lines, fmt.Sprintf("in the way and to be moved aside: %s", ui.Count(int64(len(r.Moved)), "entry")))
	case r.Aside != "":
		lines = append(lines, "what was in the way is in "+ui.Quote(r.Aside))
	}
	if r.AsideObjects != "" {
		lines = append(lines, "objects that were in the way are in the bucket below "+ui.Quote(r.AsideObjects))
	}
	a.ui.Text(lines...)
}
