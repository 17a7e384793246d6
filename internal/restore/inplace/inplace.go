// Package inplace puts one space, folder, file, version or trashed item of a snapshot back into the
// storage of a stopped instance, with its ids, versions and trash, as the server itself would have left it:
// blobs, nodes, links, indexes, and the sizes and times of the folders above. Blobs may lie in a bucket
// (objects.go); spaces of the posix driver are in posix.go.
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
	"github.com/holdfast-backup/holdfast/internal/restore/posix"
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
	// Objects is the bucket that holds the blobs of the store; nil: they are files.
	Objects *Objects
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
	// AsideObjects is the prefix of the keys that objects in the way have now.
	AsideObjects string   `json:"aside_objects,omitempty"`
	Aside        string   `json:"aside,omitempty"`
	Trashed      []string `json:"trashed"` // what had taken the place meanwhile, and was put into the trash
	Parents      []string `json:"parents"` // folders above that were gone and were put back, too
	Indexes      []string `json:"indexes"` // index files with an entry added
	Shares       []string `json:"shares"`  // lists of shares that were put back
	Warnings     []string `json:"warnings"`
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
	// ErrPlanted says that a link or a file is where only a folder can be. Nothing is written through it.
	ErrPlanted = errors.New("nothing is written through it")
	// ErrLives says that a trashed item is to be put back, and it is in use.
	ErrLives = errors.New("it is in use, not in the trash")
)

// run is one run.
type run struct {
	ctx  context.Context
	l    snapshot.BlobLoader
	tree id.ID
	t    Target
	o    Options
	root *os.Root
	top  string // path of root, for messages
	// The store lies at pre below root ("" is root itself, else it ends with a slash); work is the folder
	// for what is being built, and aside begins the name of the one for what was in the way.
	pre, work, asideStem string

	res  *Result
	find *snapshot.Finder
	// aside is the folder that takes what is in the way, made when it is needed.
	aside     *os.Root
	asideName string
	sp        string                 // the space's folder below the root
	src       string                 // the same in the archives
	same      map[string]bool        // what is there as the snapshot has it
	dirs      map[string]*pax.Header // of shard folders, by path, of the entry at hand and its neighbours
	late      []lateTime
	// the links that showed the node in the snapshot
	shown, trashed *pax.Header
	objects        *objects
	spaceAt        map[string]string // ids of the spaces of the posix driver, by their folders
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
	r, err := newRun(ctx, l, root, t, o)
	if err != nil {
		return r.res, err
	}
	defer r.close()
	switch {
	case t.Node == "":
		err = r.space()
	case t.Store.Layout == string(ocis.Posix):
		err = r.posixPart()
	default:
		err = r.part()
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return r.res, err
}

// newRun begins. With an error, the run is closed.
func newRun(ctx context.Context, l snapshot.BlobLoader, root id.ID, t Target, o Options) (*run, error) {
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	r := &run{
		ctx: ctx, l: l, tree: root, t: t, o: o, find: snapshot.NewFinder(l, root), dirs: map[string]*pax.Header{}, spaceAt: map[string]string{},
		res: &Result{Moved: []string{}, Trashed: []string{}, Parents: []string{}, Indexes: []string{}, Shares: []string{}, Warnings: []string{}},
		sp:  ocis.SpacePath(t.Space.ID), src: ocis.SpacePath(t.Space.ID),
	}
	r.objects = newObjects(r)
	isPosix := t.Store.Layout == string(ocis.Posix)
	switch {
	case !isPosix && t.Store.Layout != string(ocis.Decomposed):
		return r, fmt.Errorf("store %q has the layout %q: %w", t.Store.Name, t.Store.Layout, ErrLayout)
	case t.Store.Bucket != nil && o.Objects == nil:
		return r, fmt.Errorf("the blobs of store %q lay in a bucket, and here they are files: %w", t.Store.Name, ErrLayout)
	case isPosix && o.Objects != nil:
		return r, fmt.Errorf("store %q is of the posix driver, which has no bucket: %w", t.Store.Name, ErrLayout)
	}
	for _, s := range []string{t.Space.ID, t.Node, t.Key} {
		if s != "" && !safeID(s) {
			return r, fmt.Errorf("%q is no id: %w", s, ErrNotInSnapshot)
		}
	}
	return r, r.open(isPosix)
}

func (r *run) close() {
	_ = r.root.Close()
	if r.aside != nil {
		_ = r.aside.Close()
	}
}

// clear makes the folder for what is being built, and removes from it what an earlier run left at rel.
func (r *run) clear(rel string) error {
	if err := r.plain(rel); err != nil {
		return err
	}
	if err := r.root.MkdirAll(path.Dir(rel), 0o700); err != nil {
		return err
	}
	return r.root.RemoveAll(rel)
}

// step is called before each change on disk; tests end the process there.
var step = func() {}

func (r *run) warn(format string, args ...any) {
	r.res.Warnings = append(r.res.Warnings, fmt.Sprintf(format, args...))
}

// open opens the storage.
//
// What is being built, and what was in the way, must be on the same file system. It lies in the store's root,
// where servers pass it over; but those of the posix driver look for files everywhere below, and would take
// copies for originals. There it lies beside the root, or in the folder of the uploads, which they leave
// alone, if a mount begins at the root.
func (r *run) open(isPosix bool) error {
	root := filepath.Clean(r.o.Root)
	r.top, r.work, r.asideStem = root, JournalDir, ".holdfast-"
	if isPosix {
		name := filepath.Base(root)
		var in, above unix.Stat_t
		if err := unix.Stat(root, &in); err != nil {
			return &fs.PathError{Op: "stat", Path: root, Err: err}
		}
		fi, err := os.Lstat(root)
		if err == nil && fi.IsDir() && unix.Stat(filepath.Dir(root), &above) == nil && in.Dev == above.Dev {
			r.top, r.pre = filepath.Dir(root), name+"/"
			r.work, r.asideStem = name+JournalDir, name+".holdfast-"
		} else {
			r.work, r.asideStem = "uploads/"+JournalDir, "uploads/.holdfast-"
		}
	}
	var err error
	r.root, err = os.OpenRoot(r.top)
	r.sp = r.pre + r.sp
	return err
}

func (r *run) abs(rel string) string { return filepath.Join(r.top, rel) }

// plain makes sure that the way to rel goes through folders alone. os.Root keeps all within the storage,
// but would follow a link there to another space.
func (r *run) plain(rel string) error {
	err := posix.Plain(r.root, rel)
	var pe *fs.PathError
	if errors.Is(err, fs.ErrInvalid) && errors.As(err, &pe) {
		return fmt.Errorf("%s: a folder is expected here, and there is something else: %w", r.abs(pe.Path), ErrPlanted)
	}
	return err
}

// --- reading the snapshot -------------------------------------------------------------------------

func (r *run) base() string { return "/storage/" + r.t.Store.Name }

func (r *run) spaceTar() string {
	return r.base() + "/metadata/" + snapshot.SafeName(r.t.Space.ID) + ".tar"
}

// each reads an archive of the snapshot.
func (r *run) each(tar string, fn func(h *pax.Header, rel string, data io.Reader) error) error {
	n, err := r.find.File(r.ctx, tar)
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

// content opens the content of an entry.
func (r *run) content(h *pax.Header, data io.Reader) (io.Reader, int64, error) {
	place, ok := h.Records[pax.Content]
	if !ok {
		return data, h.Size, nil
	}
	n, err := r.find.File(r.ctx, place)
	if err != nil {
		return nil, 0, err
	}
	return snapshot.NewReader(r.ctx, r.l, n), int64(n.Size), nil
}

// --- writing --------------------------------------------------------------------------------------

// put writes one entry at rel, which is free. Folders get their times in the end. It is durable after the next
// flush, which must come before anything that shows it.
func (r *run) put(h *pax.Header, rel string, data io.Reader) error {
	if err := r.plain(rel); err != nil {
		return err
	}
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
		return r.file(rel, src, size, false, func(f *os.File) error { return r.dressFile(h, f) })
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

// flush makes durable all that was written: once for thousands of files, where syncing each takes hours.
func (r *run) flush() error {
	f, err := r.root.Open(".")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return &fs.PathError{Op: "sync the file system of", Path: r.top, Err: err}
	}
	return nil
}

// file writes a file under a temporary name and renames it; durable makes it durable before.
func (r *run) file(rel string, src io.Reader, size int64, durable bool, dress func(*os.File) error) error {
	if err := r.plain(rel); err != nil {
		return err
	}
	tmp := path.Join(path.Dir(rel), ".holdfast-"+path.Base(rel))
	if len(path.Base(tmp)) > 255 {
		tmp = path.Join(path.Dir(rel), ".holdfast-tmp")
	}
	_ = r.root.Remove(tmp) // of a run that was killed
	f, err := r.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	n, err := io.Copy(f, src) // what is long comes from the repository, and ends with the context
	if err == nil && n != size {
		err = fmt.Errorf("%s: the snapshot gives %d of %d bytes", rel, n, size)
	}
	if err == nil {
		err = dress(f)
	}
	if err == nil && durable {
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

// settle gives folders their times, the deepest first, and makes all durable.
func (r *run) settle() error {
	for i := len(r.late) - 1; i >= 0; i-- {
		l := r.late[i]
		if err := r.root.Chtimes(l.rel, time.Time{}, l.t); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	r.late = nil
	return r.flush()
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
			return fmt.Errorf("%s: a folder is expected here, and there is something else: %w", r.abs(p), ErrPlanted)
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
		h := r.dirs[strings.TrimPrefix(p, r.pre)]
		if h == nil { // then it looks like the one above, so that the server can use it
			if h, err = r.headerOf(path.Dir(p)); err != nil {
				return err
			}
		}
		if err := r.dress(h, p); err != nil {
			return err
		}
	}
	return nil
}

// headerOf is a header with owner and mode of what is at rel, and the time of this run.
func (r *run) headerOf(rel string) (*pax.Header, error) {
	fi, err := r.root.Lstat(rel)
	if err != nil {
		return nil, err
	}
	h := &pax.Header{Type: '0', Sec: r.o.Now.Unix(), Nsec: int64(r.o.Now.Nanosecond())}
	h.UID, h.GID, h.Mode, err = ownerOf(fi)
	return h, err
}

// exists tells whether something is at rel.
func (r *run) exists(rel string) bool {
	_, err := r.root.Lstat(rel)
	return err == nil
}

// --- moving aside ---------------------------------------------------------------------------------

// moveAside takes rel out of the way. Nothing is ever removed.
func (r *run) moveAside(rel string) error {
	if key := r.objects.key(rel); key != "" {
		return r.objects.moveAside(key)
	}
	if err := r.plain(rel); err != nil {
		return err
	}
	if !r.exists(rel) {
		return nil
	}
	r.res.Moved = append(r.res.Moved, r.abs(rel))
	if r.o.DryRun {
		return nil
	}
	if r.aside == nil {
		// On the file system of the store, so that it is a rename; the server and the consistency check
		// pass it over.
		r.asideName = r.asideStem + r.o.Now.UTC().Format("20060102T150405Z")
		if err := r.root.Mkdir(r.asideName, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := r.plain(r.asideName + "/x"); err != nil {
			return err
		}
		r.res.Aside = r.abs(r.asideName)
		var err error
		if r.aside, err = r.root.OpenRoot(r.asideName); err != nil {
			return err
		}
	}
	to := strings.TrimPrefix(rel, r.pre)
	if err := r.aside.MkdirAll(path.Dir(to), 0o700); err != nil {
		return err
	}
	step()
	for n, at := 1, to; ; n++ {
		if _, err := r.aside.Lstat(to); errors.Is(err, fs.ErrNotExist) {
			break
		}
		to = fmt.Sprintf("%s.%d", at, n)
	}
	return r.root.Rename(rel, path.Join(r.asideName, to))
}
