package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// lsOptions are the flags of ls.
type lsOptions struct {
	long, recursive, noLock bool
	versions, trash         bool
}

func (a *app) lsCommand() *cobra.Command {
	var o lsOptions
	c := &cobra.Command{
		Use:   "ls SNAPSHOT[:SPACE/PATH]",
		Short: "List what is in a snapshot",
		Long: `List a folder of a space, one name a line, or with a path that begins with a slash one
of the snapshot itself.

` + addressHelp + `

--versions lists the older versions of a file, or of the files in a folder. --trash
lists what was deleted; what it shows as the name is a PATH for --trash of cat, dump
and restore.

Names that hold control characters or are no UTF-8 are printed in quotation marks
with escapes; --json gives their bytes.

` + exitHelp(repoCodes...),
		Example: `  holdfast ls --long 'latest:personal/alan/Round 0'
  holdfast ls --versions 'latest:personal/alan/Round 0/notes.txt'
  holdfast ls --trash latest:personal/alan
  holdfast ls latest:/storage/users/spaces`,
		Args: args(1, 1, "one argument, SNAPSHOT, SNAPSHOT:SPACE/PATH or SNAPSHOT:/PATH"),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withRepository(ctx, repoOptions{}, readLock(o.noLock), func(ctx context.Context, r *repo.Repository) error {
				return a.ls(ctx, r, args[0], o)
			})
		}),
	}
	c.Flags().BoolVarP(&o.long, "long", "l", false, "print size, time and number of versions too; of a path in the snapshot\nmode, owner, size and time")
	c.Flags().BoolVarP(&o.recursive, "recursive", "R", false, "print the full paths of all that is below")
	c.Flags().BoolVar(&o.versions, "versions", false, "list older versions")
	c.Flags().BoolVar(&o.trash, "trash", false, "list what is in the trash of the space")
	noLockFlag(c, &o.noLock)
	return c
}

func (a *app) ls(ctx context.Context, r *repo.Repository, arg string, o lsOptions) error {
	p, err := a.pick(ctx, r, arg, pickFlags{trash: o.trash})
	if err != nil {
		return err
	}
	out := bufio.NewWriterSize(a.ui.Writer(), 64<<10)
	if p.view != nil {
		l := &itemLister{ctx: ctx, view: p.view, out: out, o: o, json: a.ui.JSON()}
		err = l.run(p.item)
	} else if o.versions {
		return ui.WithHints(usageError("%s names no space, and only a space has versions", ui.Quote(arg)),
			"Such an address is SNAPSHOT:SPACE/PATH, e.g. latest:personal/alan/notes.txt.")
	} else {
		l := &lister{ctx: ctx, repo: r, out: out, o: o, json: a.ui.JSON()}
		if p.node.Type == snapshot.Dir {
			err = l.dir(p.node.Subtree, p.path, 0)
		} else {
			err = l.node(p.node, p.path)
		}
	}
	// What was found before an error is worth showing.
	if ferr := out.Flush(); err == nil && ferr != nil {
		err = fmt.Errorf("cannot write the list: %w", ferr)
	}
	return err
}

// noSuchPath says where to look instead.
func noSuchPath(sn *snapshot.Snapshot, what, p string, err error) error {
	err = fmt.Errorf("snapshot %s: %w", sn.ID().Short(), err)
	if errors.Is(err, snapshot.ErrNoSuchPath) {
		return ui.WithHints(err, fmt.Sprintf("`holdfast ls %s:%s` lists the folder above.", ui.Quote(what), ui.Quote(path.Dir(p))))
	}
	return err
}

// findSnapshot finds what an argument names. Damaged records get in the way only if what is
// looked for was not found.
func (a *app) findSnapshot(ctx context.Context, r *repo.Repository, what string) (*snapshot.Snapshot, error) {
	list, lerr := snapshot.List(ctx, r)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	s, err := snapshot.Find(list, what)
	if err != nil {
		return nil, errors.Join(err, lerr)
	}
	if lerr != nil {
		a.ui.Warn("%v", lerr)
	}
	return s, nil
}

// maxDepth bounds how deep a tree may go. Real ones end at PATH_MAX, 4096 bytes; a longer chain was
// made to do harm.
const maxDepth = 4096

type lister struct {
	ctx  context.Context
	repo *repo.Repository
	out  io.Writer
	o    lsOptions
	json bool
}

func (l *lister) dir(tree id.ID, p string, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("%s: more than %d folders deep", ui.Quote(p[:64]), maxDepth)
	}
	t, err := snapshot.LoadTree(l.ctx, l.repo, tree)
	if err != nil {
		return fmt.Errorf("%s: %w", ui.Quote(p), err)
	}
	for _, n := range t.Nodes {
		if l.ctx.Err() != nil {
			return context.Cause(l.ctx)
		}
		// Not path.Join: a hostile name such as ".." must show as it is.
		full := strings.TrimSuffix(p, "/") + "/" + n.Name
		if err := l.node(n, full); err != nil {
			return err
		}
		if l.o.recursive && n.Type == snapshot.Dir {
			if err := l.dir(n.Subtree, full, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

// lsEntry is a node as JSON.
type lsEntry struct {
	Event string            `json:"event"`
	Name  string            `json:"name"`
	Path  string            `json:"path"`
	Raw   []byte            `json:"path_raw,omitempty"` // the bytes of a path that is no UTF-8
	Type  snapshot.NodeType `json:"type"`
	Mode  string            `json:"mode"`
	UID   uint32            `json:"uid"`
	GID   uint32            `json:"gid"`
	Size  uint64            `json:"size"`
	MTime time.Time         `json:"mtime"`
	Link  string            `json:"link_target,omitempty"`
}

func (l *lister) node(n *snapshot.Node, full string) error {
	var line string
	switch {
	case l.json:
		e := lsEntry{
			Event: "entry", Name: n.Name, Path: full, Type: n.Type, Mode: fmt.Sprintf("%04o", unixMode(n)),
			UID: n.UID, GID: n.GID, Size: n.Size, MTime: n.ModTime.UTC(), Link: n.LinkTarget,
		}
		if !utf8.ValidString(full) {
			e.Raw = []byte(full)
		}
		p, err := json.Marshal(e)
		if err != nil {
			return fmt.Errorf("%s: %w", ui.Quote(full), err)
		}
		line = string(p)
	default:
		name := n.Name
		if name == "" || l.o.recursive {
			name = full
		}
		line = ui.Quote(name)
		if l.o.long {
			size := ""
			if n.Type == snapshot.File {
				size = fmt.Sprint(n.Size)
			}
			line = fmt.Sprintf("%s %5d:%-5d %12s %s %s", n.Mode, n.UID, n.GID, size, n.ModTime.Local().Format(time.DateTime), line)
			if n.Type == snapshot.Symlink {
				line += " -> " + ui.Quote(n.LinkTarget)
			}
		}
	}
	_, err := fmt.Fprintln(l.out, line)
	if err != nil {
		return fmt.Errorf("cannot write the list: %w", err)
	}
	return nil
}

// unixMode returns permissions with the bits for setuid, setgid and sticky.
func unixMode(n *snapshot.Node) uint32 {
	m := uint32(n.Mode.Perm())
	if n.Mode&fs.ModeSetuid != 0 {
		m |= 0o4000
	}
	if n.Mode&fs.ModeSetgid != 0 {
		m |= 0o2000
	}
	if n.Mode&fs.ModeSticky != 0 {
		m |= 0o1000
	}
	return m
}
