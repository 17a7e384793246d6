package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/restore"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// latestView is the word for the newest kept view.
const latestView = "latest"

// restoreView restores from views that a backup left on the filesystems. It needs no repository.
func (a *app) restoreView(ctx context.Context, name string, f *restoreFlags) error {
	if f.environmentDir != "" {
		return usageError("--environment-dir: a view does not hold what configured the instance from outside")
	}
	owner, err := parseOwner(f.owner)
	if err != nil {
		return err
	}
	maps, err := parseMaps(f.place.maps)
	if err != nil {
		return err
	}
	if name, err = a.findKept(cmp.Or(name, latestView)); err != nil {
		return err
	}
	cannot := func(err error) error { return fmt.Errorf("restore from view %s: %w", name, err) }
	drivers, err := a.allDrivers()
	if err != nil {
		return err
	}
	set, err := fssnap.OpenKept(ctx, drivers, name, fssnap.Options{StateDir: a.opt.stateDir})
	if err != nil {
		return cannot(explainBroken(err))
	}
	defer func() {
		if err := set.Close(context.WithoutCancel(ctx)); err != nil {
			a.ui.Warn("the view %s cannot be closed: %v", name, err)
		}
	}()
	if err := set.Check(ctx); err != nil {
		return cannot(explainBroken(err))
	}
	var note snapshot.ViewNote
	if len(set.Note()) > 0 {
		err = json.Unmarshal(set.Note(), &note)
	}
	if err != nil || note.Manifest == nil {
		return ui.WithHints(cannot(errors.Join(errors.New("its record does not say what it shows"), err)),
			"It may be of an older Holdfast. `holdfast with-view` and `cp -a` can read it; `holdfast restore` restores snapshots.")
	}
	m := note.Manifest
	plan, err := restore.MakeViewPlan(m, restore.View{
		Name: name, MadeAt: set.MadeAt(), Leave: []string{fssnap.ViewsDir},
		Path: func(path string) (string, error) {
			p, ok := set.Translate(path)
			if !ok {
				return "", set.Reason(path)
			}
			return p, nil
		},
	}, restore.Options{
		BasePath: moved(f.place.baseDataPath, m.BasePath), ConfigDir: moved(f.place.configDir, m.ConfigDir), Map: hostMaps(m, maps),
		TrustTimes: f.trustTimes, Owner: owner, DryRun: f.dryRun, Only: f.only, Progress: a.ui.Sink(),
	})
	if err != nil {
		return cannot(err)
	}
	for _, w := range plan.Warnings {
		a.ui.Warn("%s", w)
	}
	if !m.Proof.Complete && note.Snapshot != "" {
		a.ui.Warn("the snapshot that was made from the view is incomplete: `holdfast check` lists what is missing")
	}
	release, err := a.nothingRuns(ctx, plan.BasePath(), plan.Paths(), f.dryRun)
	if err != nil {
		return cannot(err)
	}
	defer release()
	if err := a.sameVersion(ctx, plan, f); err != nil {
		return cannot(err)
	}
	res, err := restore.RunView(ctx, plan)
	if res != nil {
		a.showRestore(restored{view: name, snapshot: note.Snapshot}, plan, res, nil, f)
	}
	// One that overflowed meanwhile has shown anything.
	if broken := set.Check(context.WithoutCancel(ctx)); broken != nil {
		err = errors.Join(err, fmt.Errorf("what was restored cannot be trusted: %w", explainBroken(broken)))
	}
	if err != nil {
		return cannot(err)
	}
	if f.dryRun {
		return nil
	}
	if err := a.idCache(plan, f.dropIDCache); err != nil {
		return err
	}
	return a.startRestored(ctx, plan, f)
}

func explainBroken(err error) error {
	var broken *fssnap.BrokenError
	if errors.As(err, &broken) || errors.Is(err, fssnap.ErrGone) {
		return ui.WithHints(err, "Restore a snapshot from the repository: `holdfast restore latest --overwrite`.")
	}
	return err
}

// findKept finds a kept set by its name; latest is the newest one, if all are of one instance.
func (a *app) findKept(name string) (string, error) {
	list, err := fssnap.ListKept(a.opt.stateDir)
	if err != nil && len(list) == 0 {
		return "", err
	}
	i := slices.IndexFunc(list, func(k fssnap.KeptSet) bool { return k.Name == name })
	switch {
	case i >= 0:
		return name, nil
	case len(list) == 0:
		return "", ui.WithHints(fmt.Errorf("no views are kept: %w", fs.ErrNotExist),
			"`holdfast backup --keep-views 1` leaves one. Is --state-dir the one of the backup?")
	case name != latestView:
		return "", ui.WithHints(fmt.Errorf("no kept view is named %s: %w", ui.Quote(name), fs.ErrNotExist), "`holdfast views` lists the names.")
	}
	last := list[len(list)-1]
	for _, k := range list {
		if k.Label != last.Label {
			return "", ui.WithHints(usageError("views of several instances are kept, of %s and %s: name one", ui.Quote(k.Label), ui.Quote(last.Label)),
				"`holdfast views` lists the names.")
		}
	}
	return last.Name, nil
}
