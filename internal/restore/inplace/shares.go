package inplace

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// sharesSpace holds the lists of shares: storages/<storage id>/<space id>.json.
const sharesSpace = "jsoncs3-share-manager-metadata"

// shareList puts back the list of the space's shares, if the system storage has none any more.
func (r *run) shareList() error {
	if r.o.System == "" || r.o.SystemStore == nil {
		return nil
	}
	for _, sp := range r.o.SystemStore.Spaces {
		if sp.ID != sharesSpace {
			continue
		}
		sub := &run{
			ctx: r.ctx, l: r.l, tree: r.tree, trees: r.trees, t: Target{Space: sp, Store: *r.o.SystemStore}, o: r.o,
			sp: ocis.SpacePath(sp.ID),
		}
		nodes, _, err := sub.readSpace()
		if err != nil {
			return err
		}
		for key, n := range nodes {
			if !n.present || n.dir || n.name != r.t.Space.ID+".json" || strings.Contains(key, ".") {
				continue
			}
			o := r.o
			o.Root, o.System, o.SystemStore = r.o.System, "", nil
			if sub.lives(key, o.Root) {
				continue
			}
			res, err := Run(r.ctx, r.l, r.tree, Target{Space: sp, Store: *r.o.SystemStore, Node: key, Key: key}, o)
			if res != nil {
				r.res.Warnings = append(r.res.Warnings, res.Warnings...)
				r.res.Moved = append(r.res.Moved, res.Moved...)
			}
			if errors.Is(err, ErrNoSpace) {
				r.warn("the system storage has no lists of shares, so that those of the space were not put back")
				return nil
			}
			if err != nil {
				return err
			}
			r.res.Shares = append(r.res.Shares, n.name)
		}
	}
	return nil
}

// lives tells whether the node is there.
func (r *run) lives(key, root string) bool {
	_, err := os.Lstat(filepath.Join(root, r.nodeRel(key)))
	return err == nil
}
