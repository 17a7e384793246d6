package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// itemLister lists items of a space.
type itemLister struct {
	ctx  context.Context
	view *browse.View
	out  io.Writer
	o    lsOptions
	json bool
	// depth is how many folders deep a recursive list goes; 0 is all.
	depth int
}

// itemRow is an item as JSON.
type itemRow struct {
	Event    string            `json:"event"`
	Snapshot string            `json:"snapshot"`
	Space    string            `json:"space"` // its address
	Kind     browse.Kind       `json:"kind"`
	Name     string            `json:"name"`
	Path     string            `json:"path"`               // in the space
	Raw      []byte            `json:"path_raw,omitempty"` // the bytes of a path that is no UTF-8
	Type     snapshot.NodeType `json:"type"`
	Size     uint64            `json:"size"`
	MTime    time.Time         `json:"mtime"`
	ID       string            `json:"id"`
	SHA1     string            `json:"sha1"`
	Versions int               `json:"versions"`
	// Version and Key name a version; Deleted, Origin and Key a trashed item.
	Version string `json:"version,omitempty"`
	Key     string `json:"key,omitempty"`
	Deleted string `json:"deleted,omitempty"`
	Origin  string `json:"origin,omitempty"` // its former path in the space
}

func (l *itemLister) run(it *browse.Item) error {
	switch {
	case l.o.trash && it.Path == "":
		list, err := l.view.Trash(l.ctx, it.Space)
		if err != nil {
			return err
		}
		for _, x := range list {
			if err := l.any(x, -1, 0); err != nil {
				return err
			}
		}
		return nil
	}
	return l.dirOrItem(it)
}

// dirOrItem lists what is in a folder, or a file.
func (l *itemLister) dirOrItem(it *browse.Item) error {
	if it.IsDir() {
		return l.dir(it, 0)
	}
	return l.any(it, -1, 0)
}

func (l *itemLister) dir(it *browse.Item, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("%s: more than %d folders deep", ui.Quote(it.Path[:64]), maxDepth)
	}
	list, err := l.view.List(l.ctx, it)
	if err != nil {
		return err
	}
	var versions map[string]int
	if l.json || l.o.long || l.o.versions {
		if versions, err = l.view.CountVersions(l.ctx, it); err != nil {
			return err
		}
	}
	for _, x := range list {
		if l.ctx.Err() != nil {
			return context.Cause(l.ctx)
		}
		if err := l.any(x, versions[nameOf(x)], depth); err != nil {
			return err
		}
	}
	return nil
}

// nameOf is the raw name.
func nameOf(it *browse.Item) string { return it.Node.Name }

// any lists one item, with its versions and what is in it if that is wanted. versions is their number, -1
// if it is not known yet.
func (l *itemLister) any(x *browse.Item, versions, depth int) error {
	var list []*browse.Item
	if versions < 0 && (l.json || l.o.long || l.o.versions) || versions > 0 && l.o.versions || l.o.versions && l.o.trash {
		var err error
		if list, err = l.view.Versions(l.ctx, x); err != nil {
			return err
		}
		versions = len(list)
	}
	if l.o.versions {
		for _, ver := range list {
			if err := l.item(ver, 0); err != nil {
				return err
			}
		}
	} else if err := l.item(x, max(versions, 0)); err != nil {
		return err
	}
	if l.o.recursive && x.IsDir() && (l.depth == 0 || depth+1 < l.depth) {
		return l.dir(x, depth+1)
	}
	return nil
}

// item prints one line.
func (l *itemLister) item(x *browse.Item, versions int) error {
	row := itemRow{
		Event: "entry", Snapshot: l.view.Snapshot().ID().String(), Space: x.Space.Folder, Kind: x.Kind, Name: x.Name(), Path: x.Path,
		Type: x.Node.Type, Size: x.Node.Size, MTime: x.Node.ModTime.UTC(), SHA1: x.SHA1(), Versions: versions,
	}
	switch x.Kind {
	case browse.Version:
		row.Version, row.Key = x.Stamp, x.VersionKey()
	case browse.Trashed:
		row.Deleted = x.Stamp
		if l.json || strings.Count(x.Path, "/") == 1 {
			var err error
			if row.Origin, err = l.view.Origin(l.ctx, x); err == nil {
				row.Key, err = l.view.TrashKey(l.ctx, x)
			}
			if err != nil && l.ctx.Err() != nil {
				return context.Cause(l.ctx)
			}
		}
	}
	var line string
	if l.json {
		row.ID = l.view.FileID(l.ctx, x)
		if !utf8.ValidString(row.Path) {
			row.Raw = []byte(row.Path)
		}
		p, err := json.Marshal(row)
		if err != nil {
			return fmt.Errorf("%s: %w", ui.Quote(row.Path), err)
		}
		line = string(p)
	} else {
		line = l.text(&row)
	}
	if _, err := fmt.Fprintln(l.out, line); err != nil {
		return fmt.Errorf("cannot write the list: %w", err)
	}
	return nil
}

func (l *itemLister) text(row *itemRow) string {
	name := row.Name
	if l.o.recursive || row.Kind == browse.Trashed {
		name = row.Path
	}
	if row.Type == snapshot.Dir {
		name += "/"
	}
	name = ui.Quote(name)
	if row.Kind == browse.Trashed && row.Origin != "" {
		name += "  was " + ui.Quote(row.Origin)
	}
	if row.Kind == browse.Version {
		return fmt.Sprintf("%-30s %12d  %s", ui.Quote(row.Version), row.Size, name)
	}
	if !l.o.long {
		return name
	}
	size, versions := "", ""
	if row.Type == snapshot.File {
		size = strconv.FormatUint(row.Size, 10)
	}
	if row.Versions > 0 {
		versions = ui.Count(int64(row.Versions), "version")
	}
	return fmt.Sprintf("%12s %s  %-12s %s", size, row.MTime.Local().Format(time.DateTime), versions, name)
}
