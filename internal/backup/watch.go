package backup

import (
	"errors"
	"path/filepath"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/fswatch"
	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// watches follow the stores while the warm copy runs, so that the frozen pass need not look at spaces in
// which nothing was changed since. Without them, or when one fails, it looks at all.
//
// Only stores of decomposedfs are watched: the posix driver's files may be written through memory maps,
// which no watch sees.
type watches struct {
	stores []*storeWatch
}

type storeWatch struct {
	root    string
	watch   *fswatch.Watch
	changed map[string]bool // since the last pass that came to its end began
	failed  bool
	known   bool // one pass has come to its end
}

// startWatches watches those of the stores whose root cold tells of; why says which cannot be watched.
func startWatches(inst *ocis.Instance, cold func(root string) bool) (w *watches, why error) {
	w = &watches{}
	for i := range inst.Stores {
		s := &inst.Stores[i]
		if s.Layout == ocis.Posix || !cold(s.Root) {
			continue
		}
		f, err := fswatch.Start(s.Root, capture.SpaceOf)
		if err != nil {
			why = errors.Join(why, err)
			continue
		}
		w.stores = append(w.stores, &storeWatch{root: filepath.Clean(s.Root), watch: f, changed: map[string]bool{}})
	}
	return w, why
}

// begin is called before a pass, and for the last one after the instance stands still. It returns what
// the pass may take as unchanged: see capture.Options.Unchanged.
func (w *watches) begin() func(dir string) bool {
	if w == nil {
		return nil
	}
	clean := map[string]map[string]bool{}
	for _, s := range w.stores {
		now, err := s.watch.Take()
		if err != nil {
			s.failed = true // everything is looked at, as without a watch
		}
		for unit := range now {
			s.changed[unit] = true
		}
		if s.known && !s.failed {
			clean[s.root] = s.changed
		}
	}
	return func(dir string) bool {
		for root, changed := range clean {
			if rel, ok := strings.CutPrefix(dir, root+"/"); ok {
				return !capture.Touched(changed, rel)
			}
		}
		return false
	}
}

// end is called after a pass that came to its end: what had changed before it began is taken.
func (w *watches) end() {
	if w == nil {
		return
	}
	for _, s := range w.stores {
		s.changed, s.known = map[string]bool{}, true
	}
}

func (w *watches) close() {
	if w == nil {
		return
	}
	for _, s := range w.stores {
		_ = s.watch.Close() // nothing was written
	}
	w.stores = nil
}
