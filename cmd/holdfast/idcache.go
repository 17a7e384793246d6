package main

import (
	"fmt"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/restore"
)

// movedPosix returns the old and the new root of a posix store that the plan puts elsewhere.
func movedPosix(plan *restore.Plan) (old, to string) {
	for _, s := range plan.Manifest.Stores {
		if s.Layout != string(ocis.Posix) {
			continue
		}
		for _, t := range plan.Targets {
			if t.From == s.Root && t.To != s.Root {
				return s.Root, t.To
			}
		}
	}
	return "", ""
}

// idCache deals with the id cache of a posix store that was moved, which holds absolute paths.
func (a *app) idCache(plan *restore.Plan, drop bool) error {
	old, to := movedPosix(plan)
	if old == "" {
		return nil
	}
	for _, t := range plan.Targets {
		if t.DataSet != "nats" {
			continue
		}
		if drop {
			gone, err := restore.DropIDCaches(t.To)
			for _, where := range gone {
				a.ui.Info("left out the id cache %s: the server makes it anew", where)
			}
			if err != nil {
				return fmt.Errorf("the instance is restored, but its id cache could not be removed: %w", err)
			}
			continue
		}
		list, err := restore.IDCaches(t.To)
		if err != nil {
			return fmt.Errorf("the instance is restored, but its id cache could not be looked for: %w", err)
		}
		for _, where := range list {
			a.ui.Warn("the files of %s are in %s now, but the id cache %s still says the old paths: where those still exist, the server takes the restored files for copies and drops their ids and shares; remove that folder before you start it there (the server makes it anew), or restore with --drop-id-cache", old, to, where)
		}
	}
	return nil
}
