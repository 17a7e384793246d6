package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/restore"
)

// idCacheStreams is where the event store keeps the posix driver's map from paths to ids.
const idCacheStreams = "jetstream/$G/streams"

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

// idCache deals with the id cache of a posix store that was moved. It holds absolute paths: a server that
// finds the old place still there takes the restored files for copies of those and drops their ids,
// shares and versions. Without the cache the server makes it anew by a scan.
func (a *app) idCache(plan *restore.Plan, drop bool) error {
	old, to := movedPosix(plan)
	if old == "" {
		return nil
	}
	for _, t := range plan.Targets {
		if t.DataSet != "nats" {
			continue
		}
		root, err := os.OpenRoot(filepath.Join(t.To, filepath.FromSlash(idCacheStreams)))
		if err != nil {
			return nil //nolint:nilerr // no event store, or not that kind
		}
		defer root.Close()
		dir, err := root.Open(".")
		if err != nil {
			return err
		}
		defer dir.Close()
		names, err := dir.Readdirnames(-1)
		if err != nil {
			return err
		}
		for _, n := range names {
			if !strings.HasPrefix(n, "KV_ids-") {
				continue
			}
			where := filepath.Join(t.To, filepath.FromSlash(idCacheStreams), n)
			if !drop {
				a.ui.Warn("the files of %s are in %s now, but the id cache %s still says the old paths: where those still exist, the server takes the restored files for copies and drops their ids and shares; remove that folder before you start it there (the server makes it anew), or restore with --drop-id-cache", old, to, where)
				continue
			}
			if err := root.RemoveAll(n); err != nil {
				return fmt.Errorf("the instance is restored, but its id cache could not be removed: %w", err)
			}
			a.ui.Info("left out the id cache %s: the server makes it anew", where)
		}
	}
	return nil
}
