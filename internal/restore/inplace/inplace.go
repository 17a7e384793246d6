// Package inplace puts one space, folder, file, version or trashed item of a snapshot back into the
// storage of a stopped instance, with its ids, versions and trash, as the server itself would have left it:
// blobs, nodes, links, indexes, and the sizes and times of the folders above.
//
// Start with Run. What is in the way is moved aside, never destroyed. What it does is in an order that a
// kill at any point leaves nothing that users see half done, and the next run finishes: blobs first, then a
// record of the nodes at hand (JournalDir), then the nodes, in the end the link that shows them.
package inplace

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// JournalDir is the folder in a store's root that holds what is not finished: a list of nodes for each
// space, and spaces that are being built. The consistency check knows it.
const JournalDir = ".holdfast-restore"

// Owner is a user and a group by number.
type Owner struct{ UID, GID int }

// Target is what to put back.
type Target struct {
	Space snapshot.Space
	Store snapshot.Store
	// Node is the id of a file or folder; "" is the whole space. Key is the id with .REV.<time> for a
	// version and with .T.<time> for a trashed item, else the same as Node.
	Node, Key string
}

// Options say how.
type Options struct {
	Root   string // of the store on this machine
	DryRun bool
	Owner  *Owner // nil: the recorded ones
	Now    time.Time
	// System is the root of the system storage, "" if it is not to be changed; SystemStore is its record.
	// They are used when a whole space is put back.
	System      string
	SystemStore *snapshot.Store
}

// Result says what was done, or would be.
type Result struct {
	Nodes     int64    `json:"nodes"`     // files and folders that were written
	Revisions int64    `json:"revisions"` // versions that were written
	Blobs     int64    `json:"blobs"`     // contents that were written
	Bytes     int64    `json:"bytes"`     // their size
	Unchanged int64    `json:"unchanged"` // contents that were there
	Moved     []string `json:"moved"`     // what was in the way
	Aside     string   `json:"aside,omitempty"`
	Trashed   []string `json:"trashed"` // what had taken the place meanwhile, and was put into the trash
	Parents   []string `json:"parents"` // folders above that were gone and were put back, too
	Indexes   []string `json:"indexes"` // index files with an entry added
	Shares    []string `json:"shares"`  // lists of shares that were put back
	Warnings  []string `json:"warnings"`
}

// Errors of Run.
var (
	// ErrNotInSnapshot says that the snapshot has no such node.
	ErrNotInSnapshot = errors.New("the snapshot does not have it")
	// ErrLayout says that the store is of a layout that cannot be restored in place.
	ErrLayout = errors.New("the store is not laid out as in the snapshot")
	// ErrInTrash says that a folder above is in the trash.
	ErrInTrash = errors.New("a folder above it is in the trash")
	// ErrNoSpace says that the space itself is gone.
	ErrNoSpace = errors.New("its space is gone")
	// ErrLives says that a trashed item is to be put back, and it is in use.
	ErrLives = errors.New("it is in use, not in the trash")
)

// run is one run.
type run struct {
	ctx   context.Context
	l     snapshot.BlobLoader
	tree  id.ID
	t     Target
	o     Options
	root  *os.Root
	res   *Result
	trees map[string]*snapshot.Tree
	// aside is the folder that takes what is in the way, made when it is needed.
	aside     *os.Root
	asideName string
	sp        string                 // the space's folder below the root
	same      map[string]bool        // what is there as the snapshot has it
	dirs      map[string]*pax.Header // of shard folders, by path, of the entry at hand and its neighbours
	late      []lateTime
	// the links that showed the node in the snapshot
	shown, trashed *pax.Header
}

type lateTime struct {
	rel string
	t   time.Time
}

// Run puts t back. root is the snapshot's tree.
//
// Errors: ErrNotInSnapshot, ErrLayout, ErrInTrash, ErrNoSpace, ErrLives; others are those of the disk and the
// repository. The result is what was done until then.
func Run(ctx context.Context, l snapshot.BlobLoader, root id.ID, t Target, o Options) (*Result, error) {
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	r := &run{
		ctx: ctx, l: l, tree: root, t: t, o: o, trees: map[string]*snapshot.Tree{}, dirs: map[string]*pax.Header{},
		res: &Result{Moved: []string{}, Trashed: []string{}, Parents: []string{}, Indexes: []string{}, Shares: []string{}, Warnings: []string{}},
		sp:  ocis.SpacePath(t.Space.ID),
	}
	if t.Store.Layout != string(ocis.Decomposed) {
		return r.res, fmt.Errorf("store %q has the layout %q: %w", t.Store.Name, t.Store.Layout, ErrLayout)
	}
	for _, s := range []string{t.Space.ID, t.Node, t.Key} {
		if s != "" && !safeID(s) {
			return r.res, fmt.Errorf("%q is no id: %w", s, ErrNotInSnapshot)
		}
	}
	var err error
	if r.root, err = os.OpenRoot(o.Root); err != nil {
		return r.res, err
	}
	defer r.root.Close()
	defer func() {
		if r.aside != nil {
			_ = r.aside.Close()
		}
	}()
	if t.Node == "" {
		err = r.space()
	} else {
		err = r.part()
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return r.res, err
}

// step is called before each change on disk; tests end the process there.
var step = func() {}

func (r *run) warn(format string, args ...any) {
	r.res.Warnings = append(r.res.Warnings, fmt.Sprintf(format, args...))
}

// --- reading the snapshot -------------------------------------------------------------------------

func (r *run) base() string { return "/storage/" + r.t.Store.Name }

func (r *run) spaceTar() string {
	return r.base() + "/metadata/" + snapshot.SafeName(r.t.Space.ID) + ".tar"
}

// each reads an archive of the snapshot.
func (r *run) each(tar string, fn func(h *pax.Header, rel string, data io.Reader) error) error {
	n, err := r.lookup(tar)
	if err != nil {
		return err
	}
	tr := pax.NewReader(bufio.NewReaderSize(snapshot.NewReader(r.ctx, r.l, n), 64<<10))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", tar, err)
		}
		rel := strings.TrimPrefix(strings.TrimSuffix(h.Name, "/"), "./")
		if rel == "." {
			rel = ""
		}
		if rel != "" && !safePath(rel) {
			return fmt.Errorf("%s: the name %q leads elsewhere", tar, h.Name)
		}
		if err := fn(h, rel, tr); err != nil {
			return err
		}
	}
}

// safePath tells whether no part of a path means another place than its name says.
func safePath(rel string) bool {
	for part := range strings.SplitSeq(rel, "/") {
		if part == "" || part == "." || part == ".." || strings.IndexByte(part, 0) >= 0 {
			return false
		}
	}
	return true
}

// safeID tells whether an id can be cut into a path. Ids come from the snapshot and from the disk.
func safeID(s string) bool {
	return s != "" && !strings.Contains(s, "/") && safePath(ocis.NodePath(s)) && safePath(ocis.SpacePath(s))
}

func (r *run) lookup(place string) (*snapshot.Node, error) {
	place = path.Clean("/" + place)
	dir := path.Dir(place)
	t, ok := r.trees[dir]
	if !ok {
		n, err := snapshot.Lookup(r.ctx, r.l, r.tree, dir)
		if err != nil {
			return nil, err
		}
		if t, err = snapshot.LoadTree(r.ctx, r.l, n.Subtree); err != nil {
			return nil, err
		}
		if len(r.trees) > 1000 {
			clear(r.trees)
		}
		r.trees[dir] = t
	}
	if n := t.Find(path.Base(place)); n != nil && n.Type == snapshot.File {
		return n, nil
	}
	return nil, fmt.Errorf("%q: %w", place, snapshot.ErrNoSuchPath)
}

// content opens the content of an entry.
func (r *run) content(h *pax.Header, data io.Reader) (io.Reader, int64, error) {
	place, ok := h.Records[pax.Content]
	if !ok {
		return data, h.Size, nil
	}
	n, err := r.lookup(place)
	if err != nil {
		return nil, 0, err
	}
	return snapshot.NewReader(r.ctx, r.l, n), int64(n.Size), nil
}

// --- writing --------------------------------------------------------------------------------------

// put writes one entry at rel, which is free. Folders get their times in the end.
func (r *run) put(h *pax.Header, rel string, data io.Reader) error {
	step()
	switch h.Type {
	case '5':
		if err := r.root.Mkdir(rel, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		r.late = append(r.late, lateTime{rel, time.Unix(h.Sec, h.Nsec)})
		return r.dress(h, rel)
	case '2':
		if err := r.root.Symlink(h.Link, rel); err != nil {
			return err
		}
		uid, gid := r.owner(h)
		if err := r.root.Lchown(rel, uid, gid); err != nil && !errors.Is(err, fs.ErrPermission) {
			return err
		}
		return r.linkTime(h, rel)
	case '0':
		src, size, err := r.content(h, data)
		if err != nil {
			return err
		}
		return r.file(rel, src, size, func(f *os.File) error { return r.dressFile(h, f) })
	}
	r.warn("%q is neither a file nor a folder nor a link: it was left out", rel)
	return nil
}

// linkTime sets the time of a symbolic link.
func (r *run) linkTime(h *pax.Header, rel string) error {
	d, err := r.root.Open(path.Dir(rel))
	if err != nil {
		return err
	}
	defer d.Close()
	ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: h.Sec, Nsec: h.Nsec}}
	return unix.UtimesNanoAt(int(d.Fd()), path.Base(rel), ts, unix.AT_SYMLINK_NOFOLLOW)
}

// file writes a file under a temporary name, makes it durable, and renames it.
func (r *run) file(rel string, src io.Reader, size int64, dress func(*os.File) error) error {
	tmp := path.Join(path.Dir(rel), ".holdfast-"+path.Base(rel))
	if len(path.Base(tmp)) > 255 {
		tmp = path.Join(path.Dir(rel), ".holdfast-tmp")
	}
	_ = r.root.Remove(tmp) // of a run that was killed
	f, err := r.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	n, err := io.Copy(f, readerOf(r.ctx, src))
	if err == nil && n != size {
		err = fmt.Errorf("%s: the snapshot gives %d of %d bytes", rel, n, size)
	}
	if err == nil {
		err = dress(f)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		step()
		err = r.root.Rename(tmp, rel)
	}
	if err != nil {
		_ = r.root.Remove(tmp)
	}
	return err
}

// readerOf ends with the context.
func readerOf(ctx context.Context, r io.Reader) io.Reader { return &ctxReader{ctx, r} }

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

func (r *run) owner(h *pax.Header) (uid, gid int) {
	if r.o.Owner != nil {
		return r.o.Owner.UID, r.o.Owner.GID
	}
	return int(h.UID), int(h.GID)
}

// dressFile gives an open file its owner, attributes, mode and time.
func (r *run) dressFile(h *pax.Header, f *os.File) error {
	uid, gid := r.owner(h)
	if err := f.Chown(uid, gid); err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	for k, v := range h.Records {
		if x, ok := strings.CutPrefix(k, pax.Xattr); ok {
			if err := unix.Fsetxattr(int(f.Fd()), pax.XattrName(x), []byte(v), 0); err != nil && strings.HasPrefix(x, "user.") {
				return fmt.Errorf("%s: set attribute %q: %w", f.Name(), pax.XattrName(x), err)
			}
		}
	}
	if err := unix.Fchmod(int(f.Fd()), h.Mode&0o7777); err != nil {
		return &fs.PathError{Op: "chmod", Path: f.Name(), Err: err}
	}
	ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: h.Sec, Nsec: h.Nsec}}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), ts, 0); err != nil {
		return &fs.PathError{Op: "set time of", Path: f.Name(), Err: err}
	}
	return nil
}

// dress is dressFile for a folder.
func (r *run) dress(h *pax.Header, rel string) error {
	f, err := r.root.Open(rel)
	if err != nil {
		return err
	}
	defer f.Close()
	return r.dressFile(h, f)
}

// settle gives folders their times, the deepest first, and makes them durable.
func (r *run) settle() error {
	for i := len(r.late) - 1; i >= 0; i-- {
		l := r.late[i]
		if err := r.root.Chtimes(l.rel, time.Time{}, l.t); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	r.late = nil
	return nil
}

// syncDir makes what was renamed in a folder durable.
func (r *run) syncDir(rel string) error {
	f, err := r.root.Open(rel)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// shards makes the folders above rel. Those that are missing look as in the snapshot.
func (r *run) shards(rel string) error {
	dir := path.Dir(rel)
	for i := 0; i <= len(dir); i++ {
		if i < len(dir) && dir[i] != '/' {
			continue
		}
		p := dir[:i]
		if p == "" || p == "." {
			continue
		}
		fi, err := r.root.Lstat(p)
		if err == nil && !fi.IsDir() {
			return fmt.Errorf("%s: a folder is expected here, and there is something else", filepath.Join(r.o.Root, p))
		}
		if err == nil {
			continue
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := r.root.Mkdir(p, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if h := r.dirs[p]; h != nil {
			if err := r.dress(h, p); err != nil {
				return err
			}
		}
	}
	return nil
}

// exists tells whether something is at rel.
func (r *run) exists(rel string) bool {
	_, err := r.root.Lstat(rel)
	return err == nil
}

// --- moving aside ---------------------------------------------------------------------------------

// moveAside takes rel out of the way. Nothing is ever removed.
func (r *run) moveAside(rel string) error {
	if !r.exists(rel) {
		return nil
	}
	r.res.Moved = append(r.res.Moved, filepath.Join(r.o.Root, rel))
	if r.o.DryRun {
		return nil
	}
	if r.aside == nil {
		// Inside of the store's root, so that it is a rename, wherever mounts begin; the server and the
		// consistency check pass it over.
		r.asideName = ".holdfast-" + r.o.Now.UTC().Format("20060102T150405Z")
		if err := r.root.Mkdir(r.asideName, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		r.res.Aside = filepath.Join(r.o.Root, r.asideName)
		var err error
		if r.aside, err = r.root.OpenRoot(r.asideName); err != nil {
			return err
		}
	}
	if err := r.aside.MkdirAll(path.Dir(rel), 0o700); err != nil {
		return err
	}
	step()
	to := rel
	for n := 1; ; n++ {
		if _, err := r.aside.Lstat(to); errors.Is(err, fs.ErrNotExist) {
			break
		}
		to = fmt.Sprintf("%s.%d", rel, n)
	}
	return r.root.Rename(rel, path.Join(r.asideName, to))
}
