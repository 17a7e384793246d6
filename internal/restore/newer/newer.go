// Package newer compares what a store holds now with a snapshot of it: what is newer, and would be lost if
// the snapshot were put back over it, and what clients would be surprised by. It changes nothing in the
// store, and keeps copies of the newer files on request.
//
// Why: clients that sync delete local files that the server does not have any more, and these products have
// no way to tell them of a restore (product reference, "Sync clients after a restore").
package newer

import (
	"context"
	"crypto/sha1" //nolint:gosec // the server's checksum
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Kind says how an item differs from the snapshot.
type Kind string

// The kinds.
const (
	New     Kind = "new"     // made since: lost by a restore, and clients delete their copies
	Changed Kind = "changed" // another content since: lost by a restore, and clients get the old one
	Moved   Kind = "moved"   // has another name or place since
	Deleted Kind = "deleted" // deleted since: comes back
)

// Item is one file or folder that differs.
type Item struct {
	Kind  Kind      `json:"kind"`
	Store string    `json:"store"`
	Space string    `json:"space"`      // id
	Name  string    `json:"space_name"` // alias
	Path  string    `json:"path"`       // now; of a deleted one as it was
	Was   string    `json:"was,omitempty"`
	Dir   bool      `json:"folder,omitempty"`
	Node  string    `json:"node"`
	Bytes int64     `json:"bytes"`
	MTime time.Time `json:"mtime"`
	// Saved is where a copy was put, below the folder for them.
	Saved string `json:"saved,omitempty"`
}

// Space counts what differs in one space.
type Space struct {
	Store   string `json:"store"`
	ID      string `json:"id"`
	Name    string `json:"name"`
	Gone    bool   `json:"gone"`     // it is in the snapshot alone
	NotThen bool   `json:"not_then"` // the snapshot does not have it: all of it would be lost
	New     int64  `json:"new"`
	Changed int64  `json:"changed"`
	Moved   int64  `json:"moved"`
	Deleted int64  `json:"deleted"`
	Bytes   int64  `json:"bytes"` // of new and changed files
}

// Store is one store: on this machine, and in the snapshot.
type Store struct {
	Root   string
	Prefix string
	Remote bool // the blobs lie in a bucket: nothing is saved
	Was    *snapshot.Store
}

// Options say what to do. The zero value only compares.
type Options struct {
	// Save is the folder for copies of new and changed files, "" for none. It is made.
	Save string
	// Found gets each item; an error ends the comparison.
	Found func(Item) error
}

// Run compares, and returns a line for each space in which something differs. It holds about 200 bytes for
// each file of one space.
//
// Errors: a store of another layout than decomposed; those of the disk, the repository, and Found.
func Run(ctx context.Context, l snapshot.BlobLoader, tree id.ID, stores []Store, o Options) ([]Space, error) {
	c := &compare{ctx: ctx, l: l, tree: tree, o: o}
	if o.Save != "" {
		if err := os.MkdirAll(o.Save, 0o700); err != nil {
			return nil, err
		}
		var err error
		if c.save, err = os.OpenRoot(o.Save); err != nil {
			return nil, err
		}
		defer c.save.Close()
	}
	for i := range stores {
		if err := c.store(&stores[i]); err != nil {
			return c.out, err
		}
	}
	return c.out, nil
}

// ErrLayout says that a store is not of the decomposed layout.
var ErrLayout = errors.New("only stores of the decomposed layout can be compared")

type compare struct {
	ctx  context.Context
	l    snapshot.BlobLoader
	tree id.ID
	o    Options
	save *os.Root
	out  []Space
}

// was is what the snapshot has of a node.
type was struct {
	path, blob string
	dir, seen  bool
	size       int64
	mtime      time.Time
}

func (c *compare) store(st *Store) error {
	if st.Was.Layout != string(ocis.Decomposed) {
		return fmt.Errorf("store %q: %w", st.Was.Name, ErrLayout)
	}
	root, err := os.OpenRoot(st.Root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // nothing that could be lost
	}
	if err != nil {
		return err
	}
	defer root.Close()
	then := map[string]*snapshot.Space{}
	for i := range st.Was.Spaces {
		then[st.Was.Spaces[i].ID] = &st.Was.Spaces[i]
	}
	ids, err := spaces(root)
	if err != nil {
		return err
	}
	for _, spaceID := range ids {
		if err := c.space(st, root, spaceID, then[spaceID]); err != nil {
			return err
		}
		delete(then, spaceID)
	}
	for i := range st.Was.Spaces {
		if sp := &st.Was.Spaces[i]; then[sp.ID] != nil {
			c.out = append(c.out, Space{Store: st.Was.Name, ID: sp.ID, Name: sp.Folder, Gone: true, Deleted: sp.Files})
		}
	}
	return nil
}

// spaces lists the spaces of a store on disk.
func spaces(root *os.Root) ([]string, error) {
	var out []string
	first, err := list(root, "spaces")
	if err != nil {
		return nil, err
	}
	for _, a := range first {
		second, err := list(root, "spaces/"+a)
		if err != nil {
			return nil, err
		}
		for _, b := range second {
			if ocis.SpacePath(a+b) == "spaces/"+a+"/"+b {
				out = append(out, a+b)
			}
		}
	}
	slices.Sort(out)
	return out, nil
}

// list gives the names in a folder; none if there is no such folder.
func list(root *os.Root, rel string) ([]string, error) {
	f, err := root.Open(rel)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

// space compares one space.
func (c *compare) space(st *Store, root *os.Root, spaceID string, then *snapshot.Space) error {
	sum := Space{Store: st.Was.Name, ID: spaceID, Name: spaceID, NotThen: then == nil}
	before := map[string]*was{}
	if then != nil {
		sum.Name = then.Folder
		n, err := snapshot.Lookup(c.ctx, c.l, c.tree, "/storage/"+st.Was.Name+"/spaces/"+then.Folder)
		switch {
		case errors.Is(err, snapshot.ErrNoSuchPath):
		case err != nil:
			return err
		default:
			if err := c.gather(n.Subtree, "", before, 0); err != nil {
				return err
			}
		}
	}
	now := &disk{root: root, sp: ocis.SpacePath(spaceID), prefix: st.Prefix}
	if m, err := now.meta(spaceID); err == nil && m.Space != nil && m.Space.Alias != "" && then == nil {
		sum.Name = m.Space.Alias
	}
	report := func(it Item) error {
		it.Store, it.Space, it.Name = st.Was.Name, spaceID, sum.Name
		switch it.Kind {
		case New:
			sum.New++
		case Changed:
			sum.Changed++
		case Moved:
			sum.Moved++
		case Deleted:
			sum.Deleted++
		}
		if it.Kind == New || it.Kind == Changed {
			sum.Bytes += it.Bytes
		}
		if c.o.Found != nil {
			return c.o.Found(it)
		}
		return nil
	}
	err := now.walk(c.ctx, spaceID, "", map[string]bool{}, func(node, p string, dir bool, m *ocis.NodeMeta) error {
		it := Item{Path: p, Dir: dir, Node: node, Bytes: m.BlobSize, MTime: m.MTime}
		b := before[node]
		switch {
		case b == nil:
			it.Kind = New
		case !dir && b.blob != m.BlobID:
			it.Kind = Changed
		case b.path != p:
			it.Kind, it.Was = Moved, b.path
		}
		if b != nil {
			b.seen = true
		}
		if it.Kind == "" {
			return nil
		}
		if !dir && it.Kind != Moved && c.save != nil && !st.Remote {
			saved, err := c.keep(root, now, sum.Name, p, m)
			if err != nil {
				return fmt.Errorf("keep a copy of %q: %w", p, err)
			}
			it.Saved = saved
		}
		return report(it)
	})
	if err != nil {
		return err
	}
	for _, node := range sorted(before) {
		if b := before[node]; !b.seen {
			if err := report(Item{Kind: Deleted, Path: b.path, Dir: b.dir, Node: node, Bytes: b.size, MTime: b.mtime}); err != nil {
				return err
			}
		}
	}
	if sum.New+sum.Changed+sum.Moved+sum.Deleted > 0 || sum.NotThen {
		c.out = append(c.out, sum)
	}
	return nil
}

func sorted(m map[string]*was) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.SortFunc(out, func(a, b string) int { return strings.Compare(m[a].path, m[b].path) })
	return out
}

// maxDepth ends folders that lie in each other without an end.
const maxDepth = 2000

// gather reads the nodes of a space's tree in the snapshot.
func (c *compare) gather(d id.ID, rel string, into map[string]*was, depth int) error {
	if c.ctx.Err() != nil {
		return context.Cause(c.ctx)
	}
	if depth > maxDepth {
		return nil
	}
	t, err := snapshot.LoadTree(c.ctx, c.l, d)
	if err != nil {
		return err
	}
	for _, n := range t.Nodes {
		p := path.Join(rel, n.Name)
		if node, ok := n.Attr(snapshot.AttrID); ok {
			w := &was{path: p, dir: n.Type == snapshot.Dir, size: int64(n.Size), mtime: n.ModTime}
			w.blob, _ = n.Attr(snapshot.AttrBlobID)
			into[node] = w
		}
		if n.Type == snapshot.Dir {
			if err := c.gather(n.Subtree, p, into, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

// disk is one space on disk.
type disk struct {
	root       *os.Root
	sp, prefix string
}

func (d *disk) meta(node string) (ocis.NodeMeta, error) {
	p, err := d.root.ReadFile(d.sp + "/nodes/" + ocis.NodePath(node) + ".mpk")
	if err != nil {
		return ocis.NodeMeta{}, err
	}
	m, err := ocis.ParseNode(d.prefix, p)
	var ae *ocis.AttributeError
	if errors.As(err, &ae) {
		err = nil
	}
	return m, err
}

// walk visits what is in the folder node. What cannot be read is passed over: the consistency check tells it.
func (d *disk) walk(ctx context.Context, node, rel string, seen map[string]bool, fn func(node, p string, dir bool, m *ocis.NodeMeta) error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if seen[node] {
		return nil
	}
	seen[node] = true
	dir := d.sp + "/nodes/" + ocis.NodePath(node)
	names, err := list(d.root, dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		target, err := d.root.Readlink(dir + "/" + name)
		if err != nil {
			continue
		}
		kid := strings.ReplaceAll(strings.TrimPrefix(target, "../../../../../"), "/", "")
		at := d.sp + "/nodes/" + ocis.NodePath(kid)
		fi, err := d.root.Lstat(at)
		m, merr := d.meta(kid)
		if err != nil || merr != nil {
			continue
		}
		p := path.Join(rel, name)
		if err := fn(kid, p, fi.IsDir(), &m); err != nil {
			return err
		}
		if fi.IsDir() {
			if err := d.walk(ctx, kid, p, seen, fn); err != nil {
				return err
			}
		}
	}
	return nil
}

// keep copies the content of a file to the folder for them, by its name.
func (c *compare) keep(root *os.Root, d *disk, space, p string, m *ocis.NodeMeta) (string, error) {
	to := plain(space) + "/" + plain(p)
	if err := c.save.MkdirAll(path.Dir(to), 0o700); err != nil {
		return "", err
	}
	var src io.Reader = strings.NewReader("")
	if m.BlobID != "" {
		f, err := root.Open(d.sp + "/blobs/" + ocis.NodePath(m.BlobID))
		if errors.Is(err, fs.ErrNotExist) { // the server has not finished with it
			f, err = root.Open("uploads/" + m.BlobID)
		}
		if err != nil {
			return "", err
		}
		defer f.Close()
		src = f
	}
	free := to
	var f *os.File
	for n := 1; ; n++ {
		var err error
		if f, err = c.save.OpenFile(free, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err == nil {
			break
		}
		if !errors.Is(err, fs.ErrExist) {
			return "", err
		}
		free = fmt.Sprintf("%s (%d)", to, n)
	}
	h := sha1.New() //nolint:gosec // see above
	_, err := io.Copy(f, io.TeeReader(&ctxReader{c.ctx, src}, h))
	if err == nil && m.HasSHA1 && [20]byte(h.Sum(nil)) != m.SHA1 {
		err = errors.New("its content has not the checksum that the server recorded")
	}
	if err == nil && !m.MTime.IsZero() {
		ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: m.MTime.Unix(), Nsec: int64(m.MTime.Nanosecond())}}
		err = unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), ts, 0)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		_ = c.save.Remove(free)
		return "", err
	}
	return filepath.Join(c.o.Save, free), nil
}

type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *ctxReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}

// plain makes a path of names that mean nothing else.
func plain(p string) string {
	parts := strings.Split(p, "/")
	for i, s := range parts {
		parts[i] = snapshot.SafeName(s)
	}
	return strings.Join(parts, "/")
}
