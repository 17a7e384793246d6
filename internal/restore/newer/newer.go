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
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/restore/posix"
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
	Was    *snapshot.Store
	// Blobs opens a blob of a store that keeps them in a bucket, fs.ErrNotExist if there is none; nil: they
	// are files.
	Blobs func(ctx context.Context, space, blob string) (io.ReadCloser, error)
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
// Errors: ErrLayout; those of the disk, the repository, the bucket, and Found.
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

// ErrLayout says that a store is of a layout that is not known.
var ErrLayout = errors.New("its layout is not known")

type compare struct {
	ctx  context.Context
	l    snapshot.BlobLoader
	tree id.ID
	o    Options
	save *os.Root
	out  []Space
	// posix: the store at hand may have files without an id, which stand under their paths.
	posix bool
}

// was is what the snapshot has of a node.
type was struct {
	path, blob string
	dir, seen  bool
	size       int64
	mtime      time.Time
}

func (c *compare) store(st *Store) error {
	isPosix := st.Was.Layout == string(ocis.Posix)
	if !isPosix && st.Was.Layout != string(ocis.Decomposed) {
		return fmt.Errorf("store %q: %w", st.Was.Name, ErrLayout)
	}
	c.posix = isPosix
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
	var list []*disk
	if isPosix {
		list, err = posixSpaces(c.ctx, root, st)
	} else {
		list, err = spaces(root, st)
	}
	if err != nil {
		return err
	}
	for _, d := range list {
		if err := c.space(st, d, then[d.id]); err != nil {
			return err
		}
		delete(then, d.id)
	}
	for i := range st.Was.Spaces {
		if sp := &st.Was.Spaces[i]; then[sp.ID] != nil {
			c.out = append(c.out, Space{Store: st.Was.Name, ID: sp.ID, Name: sp.Folder, Gone: true, Deleted: sp.Files})
		}
	}
	return nil
}

// spaces lists the spaces of a decomposed store on disk.
func spaces(root *os.Root, st *Store) ([]*disk, error) {
	var out []*disk
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
			if sp := ocis.SpacePath(a + b); sp == "spaces/"+a+"/"+b {
				d := &disk{id: a + b, root: root, sp: sp, prefix: st.Prefix, blobs: st.Blobs}
				d.walk, d.open = d.walkNodes, d.openBlob
				if m, err := d.meta(d.id); err == nil && m.Space != nil {
					d.alias = m.Space.Alias
				}
				out = append(out, d)
			}
		}
	}
	slices.SortFunc(out, func(a, b *disk) int { return strings.Compare(a.id, b.id) })
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
func (c *compare) space(st *Store, now *disk, then *snapshot.Space) error {
	spaceID := now.id
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
	if now.alias != "" && then == nil {
		sum.Name = now.alias
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
	err := now.walk(c.ctx, func(node, p string, dir bool, m *ocis.NodeMeta) error {
		it := Item{Path: p, Dir: dir, Node: node, Bytes: m.BlobSize, MTime: m.MTime}
		if node == "" { // the server has not seen it yet
			node = unseen + p
		}
		b := before[node]
		switch {
		case b == nil || b.seen: // a copy with the id of the original
			it.Kind = New
		case !dir && (b.blob != m.BlobID || c.posix && (b.size != m.BlobSize || !b.mtime.Equal(m.MTime))):
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
		if !dir && it.Kind != Moved && c.save != nil {
			saved, err := c.keep(now, sum.Name, p, m)
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
			if strings.HasPrefix(node, unseen) {
				node = ""
			}
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
		node, ok := n.Attr(snapshot.AttrID)
		if !ok {
			node = unseen + p
		}
		w := &was{path: p, dir: n.Type == snapshot.Dir, size: int64(n.Size), mtime: n.ModTime}
		w.blob, _ = n.Attr(snapshot.AttrBlobID)
		if s, ok := n.Attr(snapshot.AttrSize); ok { // of an object that the repository does not have
			w.size, _ = strconv.ParseInt(s, 10, 64)
		}
		if ok || c.posix {
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

// unseen begins what stands for the id of a file that has none. No id has a slash.
const unseen = "./"

// disk is one space on disk.
type disk struct {
	id, alias  string
	root       *os.Root
	sp, prefix string
	blobs      func(ctx context.Context, space, blob string) (io.ReadCloser, error)
	// walk visits what is in the space, a folder before what is in it. What cannot be read is passed over:
	// the consistency check tells it. open opens the content of a file.
	walk func(ctx context.Context, fn visitor) error
	open func(ctx context.Context, p string, m *ocis.NodeMeta) (io.ReadCloser, error)
}

type visitor func(node, p string, dir bool, m *ocis.NodeMeta) error

// posixSpaces lists the spaces of a store of the posix driver on disk.
func posixSpaces(ctx context.Context, root *os.Root, st *Store) ([]*disk, error) {
	found, err := posix.Spaces(ctx, root, "", st.Prefix)
	var out []*disk
	seen := map[string]bool{}
	for i := range found {
		f := &found[i]
		if seen[f.ID] {
			continue // a copy; the server goes by one of them
		}
		seen[f.ID] = true
		d := &disk{id: f.ID, root: root, sp: f.Rel, prefix: st.Prefix}
		if f.Space != nil {
			d.alias = f.Space.Alias
		}
		d.walk, d.open = d.walkFiles, d.openFile
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b *disk) int { return strings.Compare(a.id, b.id) })
	return out, err
}

// walkFiles is walk for the posix driver. Size and time are those of the file.
func (d *disk) walkFiles(ctx context.Context, fn visitor) error {
	var look func(in string, depth int) error
	look = func(in string, depth int) error {
		if ctx.Err() != nil || depth > maxDepth {
			return context.Cause(ctx)
		}
		for _, e := range posix.List(d.root, path.Join(d.sp, in)) {
			p := path.Join(in, e.Name())
			fi, err := e.Info()
			if err != nil || !fi.IsDir() && !fi.Mode().IsRegular() || posix.Hidden(p) || posix.IsLock(p) {
				continue
			}
			m, _, err := posix.Meta(d.root, path.Join(d.sp, p), d.prefix)
			if err != nil {
				continue
			}
			if !m.MTime.Equal(fi.ModTime()) { // changed behind the server's back: its checksum is of what was
				m.HasSHA1 = false
			}
			m.MTime = fi.ModTime().UTC()
			if !fi.IsDir() {
				m.BlobSize = fi.Size()
			}
			if err := fn(m.ID, p, fi.IsDir(), &m); err != nil {
				return err
			}
			if fi.IsDir() {
				if err := look(p, depth+1); err != nil {
					return err
				}
			}
		}
		return nil
	}
	return look("", 0)
}

func (d *disk) openFile(_ context.Context, p string, _ *ocis.NodeMeta) (io.ReadCloser, error) {
	return posix.Open(d.root, path.Join(d.sp, p))
}

// openBlob is open for decomposed stores.
func (d *disk) openBlob(ctx context.Context, _ string, m *ocis.NodeMeta) (io.ReadCloser, error) {
	if m.BlobID == "" {
		return io.NopCloser(strings.NewReader("")), nil
	}
	var f io.ReadCloser
	var err error
	if d.blobs != nil {
		f, err = d.blobs(ctx, d.id, m.BlobID)
	} else {
		f, err = d.root.Open(d.sp + "/blobs/" + ocis.NodePath(m.BlobID))
	}
	if errors.Is(err, fs.ErrNotExist) { // the server has not finished with it
		return d.root.Open("uploads/" + m.BlobID)
	}
	return f, err
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

// walkNodes is walk for decomposed stores.
func (d *disk) walkNodes(ctx context.Context, fn visitor) error {
	return d.walkFolder(ctx, d.id, "", map[string]bool{}, fn)
}

func (d *disk) walkFolder(ctx context.Context, node, rel string, seen map[string]bool, fn visitor) error {
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
			if err := d.walkFolder(ctx, kid, p, seen, fn); err != nil {
				return err
			}
		}
	}
	return nil
}

// keep copies the content of a file to the folder for them, by its name.
func (c *compare) keep(d *disk, space, p string, m *ocis.NodeMeta) (string, error) {
	to := plain(space) + "/" + plain(p)
	if err := c.save.MkdirAll(path.Dir(to), 0o700); err != nil {
		return "", err
	}
	src, err := d.open(c.ctx, p, m)
	if err != nil {
		return "", err
	}
	defer src.Close()
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
	_, err = io.Copy(f, io.TeeReader(&ctxReader{c.ctx, src}, h))
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
