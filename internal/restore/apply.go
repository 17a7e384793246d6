package restore

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// entry is one thing to restore.
type entry struct {
	rel   string // below the destination; "" is the root itself
	from  string // what it came from: the folder or archive in the snapshot, for messages
	typ   snapshot.NodeType
	meta  meta
	size  int64
	link  string // target of a symbolic link
	rdev  uint64
	holes []pax.Extent
	// One of these for a file: data, of size bytes; ids; or content, the path in the snapshot.
	// hardlink is another name below the destination, and needs none of them.
	data     io.Reader
	ids      []id.ID
	content  string
	hardlink string
	// Of a view: src opens the content, stat is how the picture looks, and complete reads what is
	// left of the metadata, once it is needed.
	src      func() (*os.File, error)
	stat     *unix.Stat_t
	complete func() error
}

// fill reads what was left to be read of the metadata.
func (e *entry) fill() error {
	if e.complete == nil {
		return nil
	}
	return e.complete()
}

// job is a file whose content is still to come.
type job struct {
	d       *dest
	rel     string
	from    string // see entry
	meta    meta
	size    int64
	holes   []pax.Extent
	content string
	ids     []id.ID
	src     func() (*os.File, error) // see entry
	// present: a file of that size is there, and has to be compared first.
	present bool
	// all: see setMeta.
	all bool
	// object is set for what becomes an object of a bucket, not a file.
	object *objectPut

	state jobState
}

// inlineLimit is how much of a file's content inside a tar is held in memory for a comparison, in
// bytes; metadata files have a few hundred.
const inlineLimit = 4 << 20

// openFrames bounds how many directories on the way down are kept open, so that a tree of any
// depth needs few descriptors.
const openFrames = 128

// frame is a directory on the way from the root to the entry at hand.
type frame struct {
	rel, from string
	fd        int // -1: closed for now, or absent
	// own: its entry came in this stream, and m is its metadata.
	own bool
	m   meta
	// fresh: made by this run, so nothing can be in it. absent: a dry run, and it is not there.
	fresh, absent bool
	// all: what is made here may get attributes by itself (default access lists).
	all bool
	// same: it is the folder of the view that is restored, unchanged, so its names and attributes are right.
	same bool
	// seen are the names that came so far, kept where others may be there.
	seen map[string]struct{}
}

// An applier brings a stream of entries, parents before children, to the destination. Contents go
// to sink. It is not for concurrent use; several appliers may work on one dest.
type applier struct {
	d     *dest
	sink  func(*job) error
	stack []frame
	skip  string // folder that could not be made: what lies below it is passed over
	skips bool
}

func newApplier(d *dest, sink func(*job) error) *applier {
	a := &applier{d: d, sink: sink}
	f := frame{fd: -1, absent: d.absent}
	if !d.absent {
		f.fd = d.root.fd
		f.all = inherits(f.fd)
		f.fresh = !d.delta
	}
	a.stack = append(a.stack, f)
	return a
}

// inherits reports whether what is made in the directory gets an access list by itself.
func inherits(fd int) bool {
	n, err := unix.Fgetxattr(fd, "system.posix_acl_default", nil)
	return err == nil && n > 0
}

func (a *applier) top() *frame { return &a.stack[len(a.stack)-1] }

// put restores one entry, contents excepted. It returns an error only if the run cannot go on.
func (a *applier) put(e *entry) error {
	d := a.d
	if d.run.ctx.Err() != nil {
		return d.run.cause()
	}
	d.run.entries.Add(1)
	if e.rel == "" {
		return a.putRoot(e)
	}
	if a.skips && within(e.rel, a.skip) {
		return nil
	}
	if err := checkPath(e.rel); err != nil {
		return d.fail(e.from, e.rel, err)
	}
	dir, name := splitPath(e.rel)
	if err := a.enter(dir); err != nil {
		return a.failed(e, err)
	}
	f := a.top()
	if !f.own {
		if !d.claim(e.rel, whole) {
			return a.failed(e, refused("the name comes twice"))
		}
		if !f.absent {
			if err := d.touch(f.rel, f.fd); err != nil {
				return a.failed(e, err)
			}
		}
	}
	if f.seen != nil {
		if _, twice := f.seen[name]; twice {
			return a.failed(e, refused("the name comes twice"))
		}
		f.seen[name] = struct{}{}
	}
	if e.hardlink != "" {
		if err := checkPath(e.hardlink); err != nil {
			return a.failed(e, err)
		}
		if within(e.rel, e.hardlink) {
			return a.failed(e, refused("a hard link to itself"))
		}
		d.mu.Lock()
		d.links = append(d.links, hardlink{e.rel, e.hardlink, e.from})
		d.mu.Unlock()
		return nil
	}
	var err error
	if d.isProtected(e.rel) && e.typ != snapshot.Dir {
		err = a.protected(f, name, e)
	} else {
		switch e.typ {
		case snapshot.Dir:
			err = a.dir(f, name, e)
		case snapshot.File:
			err = a.file(f, name, e)
		case snapshot.Symlink, snapshot.FIFO, snapshot.Socket, snapshot.Dev, snapshot.CharDev:
			err = a.special(f, name, e)
		default:
			err = refused("unknown type %q", e.typ)
		}
	}
	if err != nil {
		return a.failed(e, err)
	}
	return nil
}

// failed notes that e was not restored, nor what lies below it.
func (a *applier) failed(e *entry, err error) error {
	var r *refusedBelow
	if errors.As(err, &r) {
		a.skip, a.skips = r.rel, true
	} else if e.typ == snapshot.Dir {
		a.skip, a.skips = e.rel, true
	}
	return a.d.fail(e.from, e.rel, err)
}

// refusedBelow says that nothing below rel can be restored.
type refusedBelow struct {
	rel string
	err error
}

func (e *refusedBelow) Error() string { return e.err.Error() }
func (e *refusedBelow) Unwrap() error { return e.err }

func (a *applier) putRoot(e *entry) error {
	if e.typ != snapshot.Dir {
		return a.failed(e, refused("the top is a %s, not a folder", e.typ))
	}
	f := &a.stack[0]
	if f.own {
		return a.d.fail(e.from, "", refused("the top comes twice"))
	}
	if err := e.fill(); err != nil {
		return a.failed(e, err)
	}
	f.own, f.m, f.from = true, e.meta, e.from
	a.d.run.own(&f.m)
	add(&a.d.res.Dirs, 1)
	if a.d.delta && !f.absent {
		f.seen = map[string]struct{}{}
	}
	return nil
}

// enter makes dir the top of the stack. Directories that did not come as entries of this stream
// are opened, or made if they are missing.
func (a *applier) enter(dir string) error {
	for !within(dir, a.top().rel) {
		if err := a.pop(); err != nil {
			return err
		}
	}
	for {
		f := a.top()
		if f.rel == dir {
			return nil
		}
		rest := dir
		if f.rel != "" {
			rest = dir[len(f.rel)+1:]
		}
		name, _, _ := strings.Cut(rest, "/")
		rel := joinPath(f.rel, name)
		a.d.claim(rel, way)
		if f.absent {
			a.push(frame{rel: rel, fd: -1, absent: true})
			continue
		}
		fd, err := openSubdir(f.fd, name)
		if err == unix.ENOENT && !a.d.run.dry {
			if err = a.d.touch(f.rel, f.fd); err != nil {
				return err
			}
			if err = unix.Mkdirat(f.fd, name, 0o755); err == nil || err == unix.EEXIST {
				if err == nil {
					a.d.mu.Lock()
					if a.d.implicit == nil {
						a.d.implicit = map[string]bool{}
					}
					a.d.implicit[rel] = true
					a.d.mu.Unlock()
				}
				fd, err = openSubdir(f.fd, name)
			}
		}
		if err == unix.ENOENT {
			a.push(frame{rel: rel, fd: -1, absent: true})
			continue
		}
		if isNoDir(err) {
			return &refusedBelow{rel, refused("%q is no folder", a.d.show(rel))}
		}
		if err != nil {
			return fmt.Errorf("open folder: %w", err)
		}
		a.push(frame{rel: rel, fd: fd, fresh: !a.d.delta, all: inherits(fd)})
	}
}

func (a *applier) push(f frame) {
	a.stack = append(a.stack, f)
	if i := len(a.stack) - openFrames; i > 0 && a.stack[i].fd >= 0 {
		unix.Close(a.stack[i].fd)
		a.stack[i].fd = -1
	}
}

// pop leaves the top directory and gives it its metadata.
func (a *applier) pop() error {
	f := a.top()
	err := a.leave(f)
	if f.fd >= 0 && len(a.stack) > 1 {
		unix.Close(f.fd)
	}
	a.stack = a.stack[:len(a.stack)-1]
	if err != nil {
		return err
	}
	if len(a.stack) > 1 && a.top().fd < 0 && !a.top().absent {
		return a.reopen()
	}
	return nil
}

// reopen opens the last directories of a deep way again, several at once, because the first of them
// has to be reached from the root.
func (a *applier) reopen() error {
	for i := max(1, len(a.stack)-openFrames/2); i < len(a.stack); i++ {
		f := &a.stack[i]
		if f.fd >= 0 {
			continue
		}
		var err error
		if up := &a.stack[i-1]; up.fd >= 0 {
			_, name := splitPath(f.rel)
			f.fd, err = openSubdir(up.fd, name)
		} else {
			f.fd, err = a.d.root.openDir(f.rel)
		}
		if err != nil {
			f.fd = -1
			return a.d.fail(f.from, f.rel, err)
		}
	}
	return nil
}

// finish leaves all directories.
func (a *applier) finish() error {
	for len(a.stack) > 0 {
		if err := a.pop(); err != nil {
			a.close()
			return err
		}
	}
	return nil
}

// close gives up after an error.
func (a *applier) close() {
	for i := len(a.stack) - 1; i > 0; i-- {
		if a.stack[i].fd >= 0 {
			unix.Close(a.stack[i].fd)
		}
	}
	a.stack = nil
}

func (a *applier) leave(f *frame) error {
	d := a.d
	if f.absent {
		return nil
	}
	if f.seen != nil && !d.keepExtra {
		if err := a.findExtras(f); err != nil {
			if err := d.fail(f.from, f.rel, fmt.Errorf("list folder: %w", err)); err != nil {
				return err
			}
		}
	}
	if d.run.dry || !f.own {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return d.fail(f.from, f.rel, err)
	}
	m := f.m
	if d.run.euid != 0 && m.mode&0o700 != 0o700 {
		d.mu.Lock()
		d.modes = append(d.modes, lateMode{f.rel, m.mode})
		d.mu.Unlock()
		m.mode |= 0o700
	}
	_, err := d.setMeta(f.fd, &st, &m, !f.same && (f.all || !f.fresh))
	d.settled(&st, &m)
	if err != nil {
		return d.fail(f.from, f.rel, err)
	}
	return nil
}

// findExtras notes what the folder holds and the stream did not name. Whether another stream names
// it is known at the end only.
func (a *applier) findExtras(f *frame) error {
	fd, err := openat(f.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	dir := os.NewFile(uintptr(fd), f.rel)
	defer dir.Close()
	for {
		names, err := dir.Readdirnames(1024)
		for _, name := range names {
			if _, ok := f.seen[name]; ok || f.rel == "" && a.d.keepAtTop(name) || a.d.run.view.leaves(name) {
				continue
			}
			a.d.mu.Lock()
			a.d.extras = append(a.d.extras, extra{f.rel, name})
			a.d.mu.Unlock()
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// keepAtTop names what may lie in a root and belongs to no data set: the filesystem's own folder,
// and our own files where they could not lie beside it.
func (d *dest) keepAtTop(name string) bool {
	return name == "lost+found" || name == insideMarker || strings.HasPrefix(name, asideInfix)
}

// stat looks what is at name; nothing can be in a folder that this run made.
func (a *applier) stat(f *frame, name string) (*unix.Stat_t, error) {
	if f.fresh || f.absent {
		return nil, nil
	}
	var st unix.Stat_t
	err := unix.Fstatat(f.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == unix.ENOENT {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up: %w", err)
	}
	return &st, nil
}

func (a *applier) dir(f *frame, name string, e *entry) error {
	d := a.d
	st, err := a.stat(f, name)
	if err != nil {
		return err
	}
	same := d.unchanged(e, st)
	if !same {
		if err := e.fill(); err != nil {
			return err
		}
	}
	n := frame{rel: e.rel, from: e.from, fd: -1, own: true, m: e.meta, all: f.all, same: same}
	d.run.own(&n.m)
	add(&d.res.Dirs, 1)
	if st != nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if st.Mode&unix.S_IFMT == unix.S_IFLNK && d.isProtected(e.rel) {
			d.run.warnOnce("link "+e.rel, fmt.Sprintf("%s stays a symbolic link, because another data set lies behind it", d.show(e.rel)))
			a.skip, a.skips = e.rel, true
			return nil
		}
		if err := d.clear(f.fd, f.rel, name, st); err != nil {
			return err
		}
		st = nil
	}
	if d.run.dry && st == nil {
		n.absent = true
		a.push(n)
		return nil
	}
	if st == nil {
		err := unix.Mkdirat(f.fd, name, 0o700)
		if err == unix.EEXIST {
			d.mu.Lock()
			made := d.implicit[e.rel]
			delete(d.implicit, e.rel)
			d.mu.Unlock()
			if !made {
				return a.twice()
			}
		} else if err != nil {
			return fmt.Errorf("make folder: %w", err)
		}
		n.fresh = true
	}
	if !n.fresh && d.run.euid != 0 && st.Mode&0o700 != 0o700 && !d.run.dry {
		if err := chmodAt(f.fd, name, st.Mode&0o7777|0o700); err != nil {
			return fmt.Errorf("open folder for writing: %w", err)
		}
	}
	if n.fd, err = openSubdir(f.fd, name); err != nil {
		return fmt.Errorf("open folder: %w", err)
	}
	if !n.fresh {
		n.all = n.all || inherits(n.fd)
		if !n.same {
			n.seen = map[string]struct{}{}
		}
	}
	a.push(n)
	return nil
}

func (a *applier) twice() error {
	return refused("the name comes twice in the snapshot, or somebody else writes into the destination")
}

// protected handles an entry that is no folder and stands where the way to another data set's root
// leads through: the other data set needs a real folder there.
func (a *applier) protected(f *frame, name string, e *entry) error {
	d := a.d
	if e.typ != snapshot.Symlink {
		return refused("a %s where another data set has its place", e.typ)
	}
	st, err := a.stat(f, name)
	if err != nil {
		return err
	}
	if st != nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
		if t, err := readlinkat(f.fd, name); err == nil && t == e.link {
			add(&d.res.Unchanged, 1)
			return nil // the administrator's own, and the snapshot agrees
		}
	}
	d.run.warnOnce("link "+e.rel, fmt.Sprintf("the symbolic link %s to %q is not restored, because another data set is restored to that place", d.show(e.rel), e.link))
	return nil
}

func readlinkat(dir int, name string) (string, error) {
	buf := make([]byte, 256)
	for {
		n, err := unix.Readlinkat(dir, name, buf)
		if err != nil || n < len(buf) {
			return string(buf[:max(n, 0)]), err
		}
		buf = make([]byte, 2*len(buf))
	}
}

// special restores what has no content.
func (a *applier) special(f *frame, name string, e *entry) error {
	d := a.d
	d.run.own(&e.meta)
	st, err := a.stat(f, name)
	if err != nil {
		return err
	}
	if d.unchanged(e, st) {
		add(&d.res.Unchanged, 1)
		return nil
	}
	if err := e.fill(); err != nil {
		return err
	}
	want := fileType(e.typ)
	device := e.typ == snapshot.Dev || e.typ == snapshot.CharDev
	all := f.all
	if st != nil {
		same := st.Mode&unix.S_IFMT == want && (!device || uint64(st.Rdev) == e.rdev)
		if same && e.typ == snapshot.Symlink {
			t, err := readlinkat(f.fd, name)
			same = err == nil && t == e.link
		}
		if same {
			if d.run.dry {
				add(&d.res.Unchanged, 1)
				return nil
			}
			changed, err := d.setMetaAt(f.fd, name, st, &e.meta, true)
			d.count(changed)
			return err
		}
		if err := d.clear(f.fd, f.rel, name, st); err != nil {
			return err
		}
	}
	if d.run.dry {
		add(&d.res.Files, 1)
		return nil
	}
	switch {
	case e.typ == snapshot.Symlink:
		if strings.IndexByte(e.link, 0) >= 0 || e.link == "" {
			return refused("a symbolic link to %q", e.link)
		}
		err = unix.Symlinkat(e.link, f.fd, name)
	case device && d.run.euid != 0:
		d.run.warnOnce("device", fmt.Sprintf("device files are not restored at %s: only root may make them", d.path))
		return nil
	default:
		err = unix.Mknodat(f.fd, name, want|0o600, int(e.rdev))
	}
	if err == unix.EEXIST {
		return a.twice()
	}
	if device && err == unix.EPERM { // a container without the right to make them
		d.run.warnOnce("device", fmt.Sprintf("device files are not restored at %s: %v", d.path, err))
		return nil
	}
	if err != nil {
		return fmt.Errorf("make %s: %w", e.typ, err)
	}
	var now unix.Stat_t
	if err := unix.Fstatat(f.fd, name, &now, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	_, err = d.setMetaAt(f.fd, name, &now, &e.meta, all)
	add(&d.res.Files, 1)
	return err
}

func (d *dest) count(changed bool) {
	if changed {
		add(&d.res.Files, 1)
	} else {
		add(&d.res.Unchanged, 1)
	}
}

// file restores a regular file, or makes it empty and hands its content on.
func (a *applier) file(f *frame, name string, e *entry) error {
	d := a.d
	d.run.own(&e.meta)
	st, err := a.stat(f, name)
	if err != nil {
		return err
	}
	if d.unchanged(e, st) {
		add(&d.res.Unchanged, 1)
		d.run.bytes.Add(e.size)
		return nil
	}
	if err := e.fill(); err != nil {
		return err
	}
	same := st != nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == e.size
	if e.size != 0 && e.data == nil && e.content == "" && len(e.ids) == 0 && e.src == nil {
		return fmt.Errorf("the snapshot records %d bytes and holds none", e.size)
	}
	later := e.content != "" || len(e.ids) > 0 || e.src != nil
	if later && e.size == 0 && len(e.ids) == 0 {
		later = false // nothing to look up
	}
	if e.data != nil && e.size == 0 {
		e.data = nil
	}
	j := &job{
		d: d, rel: e.rel, from: e.from, meta: e.meta, size: e.size, holes: e.holes,
		content: e.content, ids: e.ids, src: e.src, present: same, all: f.all,
	}
	if same && st.Nlink > 1 {
		d.mu.Lock()
		d.shared = append(d.shared, j)
		d.mu.Unlock()
	}
	if same && d.run.sizeOnly {
		add(&d.res.Unchanged, 1)
		return nil
	}
	if same && later {
		return a.sink(j)
	}
	if same && e.data != nil && e.size <= inlineLimit {
		return a.inline(f, name, e, j)
	}
	if same && e.data == nil {
		return a.compareEmpty(f, name, e)
	}
	if st != nil && !(same && e.data != nil) {
		if err := d.clear(f.fd, f.rel, name, st); err != nil {
			return err
		}
	}
	if d.run.dry && !same {
		add(&d.res.Files, 1)
		add(&d.res.Bytes, e.size)
		return nil
	}
	if later {
		err := unix.Mknodat(f.fd, name, unix.S_IFREG|0o600, 0)
		if err == unix.EEXIST {
			return a.twice()
		}
		if err != nil {
			return fmt.Errorf("make file: %w", err)
		}
		return a.sink(j)
	}
	if same {
		return a.longInline(f, name, e, j)
	}
	return a.newFile(f, name, e, j, e.data)
}

// newFile makes a file with content from r, nil for none.
func (a *applier) newFile(f *frame, name string, e *entry, j *job, r io.Reader) error {
	d := a.d
	fd, err := openat(f.fd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW)
	if err == unix.EEXIST {
		return a.twice()
	}
	if err != nil {
		return fmt.Errorf("make file: %w", err)
	}
	defer unix.Close(fd)
	var st *unix.Stat_t
	if r != nil {
		if st, err = j.fill(fd, r); err != nil {
			_ = unix.Unlinkat(f.fd, name, 0) // half a file must not look like a whole one
			return err
		}
	}
	if st == nil {
		if st, err = statRegular(fd); err != nil {
			return err
		}
	}
	_, err = d.setMeta(fd, st, &j.meta, j.all)
	add(&d.res.Files, 1)
	add(&d.res.Bytes, e.size)
	d.run.bytes.Add(e.size)
	return err
}

// fill writes all of r, which holds size bytes, with the holes left out.
func (j *job) fill(fd int, r io.Reader) (*unix.Stat_t, error) {
	buf := j.d.run.buffer()
	defer j.d.run.buffers.Put(buf)
	off := int64(0)
	for off < j.size {
		n, err := io.ReadFull(r, (*buf)[:min(int64(len(*buf)), j.size-off)])
		if err != nil {
			return nil, fmt.Errorf("read content: %w", err)
		}
		if err := j.write(fd, off, (*buf)[:n], pwrite); err != nil {
			return nil, err
		}
		off += int64(n)
	}
	return j.checkSize(fd)
}

// compareEmpty is for a file without content that is there already.
func (a *applier) compareEmpty(f *frame, name string, e *entry) error {
	if a.d.run.dry {
		add(&a.d.res.Unchanged, 1)
		return nil
	}
	return a.fixFile(f, name, e)
}

// fixFile sets the metadata of a file whose content is right.
func (a *applier) fixFile(f *frame, name string, e *entry) error {
	fd, st, err := openRegular(f.fd, name)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	changed, err := a.d.setMeta(fd, st, &e.meta, true)
	a.d.count(changed)
	return err
}

// openRegular opens an existing regular file for reading, and leaves its access time alone where
// that is allowed.
func openRegular(dir int, name string) (int, *unix.Stat_t, error) {
	const flags = unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_NOCTTY
	fd, err := openat(dir, name, flags|unix.O_NOATIME)
	if err == unix.EPERM {
		fd, err = openat(dir, name, flags)
	}
	if err != nil {
		return -1, nil, fmt.Errorf("open: %w", err)
	}
	st, err := statRegular(fd)
	if err != nil {
		unix.Close(fd)
		return -1, nil, err
	}
	return fd, st, nil
}

func statRegular(fd int) (*unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errors.New("it is no regular file any more: something else writes into the destination")
	}
	return &st, nil
}

// inline compares a small file that is there with the content that came in the tar.
func (a *applier) inline(f *frame, name string, e *entry, j *job) error {
	d := a.d
	data := make([]byte, e.size)
	if _, err := io.ReadFull(e.data, data); err != nil {
		return fmt.Errorf("read content: %w", err)
	}
	fd, st, err := openRegular(f.fd, name)
	if errors.Is(err, unix.EACCES) { // our own, but closed to us: write it again
		fd, err = -1, nil
		if st, err = a.stat(f, name); err == nil && st == nil {
			err = unix.ENOENT
		}
	}
	if err != nil {
		return err
	}
	same := fd >= 0 && d.run.trustTimes && j.meta.sameTime(st) && st.Size == e.size
	if !same && fd >= 0 {
		same, err = sameContent(fd, data)
	}
	if err == nil && same {
		defer unix.Close(fd)
		if d.run.dry {
			add(&d.res.Unchanged, 1)
			return nil
		}
		changed, err := d.setMeta(fd, st, &j.meta, true)
		d.count(changed)
		return err
	}
	if fd >= 0 {
		unix.Close(fd)
	}
	if err != nil {
		return err
	}
	if err := d.clear(f.fd, f.rel, name, st); err != nil {
		return err
	}
	if d.run.dry {
		add(&d.res.Files, 1)
		add(&d.res.Bytes, e.size)
		return nil
	}
	return a.newFile(f, name, e, j, strings.NewReader(string(data)))
}

func sameContent(fd int, data []byte) (bool, error) {
	buf := make([]byte, min(len(data)+1, 64<<10))
	for off := 0; ; {
		n, err := pread(fd, buf, int64(off))
		if err != nil {
			return false, fmt.Errorf("read: %w", err)
		}
		if n == 0 {
			return off == len(data), nil
		}
		if n > len(data)-off || string(buf[:n]) != string(data[off:off+n]) {
			return false, nil
		}
		off += n
	}
}

func pread(fd int, p []byte, off int64) (int, error) {
	for {
		n, err := unix.Pread(fd, p, off)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// longInline compares a long file with the stream: the content can be read once only, so it is
// written beside the old file meanwhile, and thrown away if they agree.
func (a *applier) longInline(f *frame, name string, e *entry, j *job) error {
	d := a.d
	if err := d.touch(f.rel, f.fd); err != nil {
		return err
	}
	old, st, err := openRegular(f.fd, name)
	if err != nil {
		return err
	}
	defer unix.Close(old)
	cmp := &comparer{r: e.data, fd: old, same: true}
	if d.run.dry {
		if _, err := io.Copy(io.Discard, cmp); err != nil {
			return fmt.Errorf("read content: %w", err)
		}
		if cmp.same {
			add(&d.res.Unchanged, 1)
			return nil
		}
		add(&d.res.Files, 1)
		add(&d.res.Bytes, e.size)
		return d.clear(f.fd, f.rel, name, st)
	}
	tmp := fmt.Sprintf("%s%d", tempPrefix, d.run.temp.Add(1))
	fd, err := openat(f.fd, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW)
	if err != nil {
		return fmt.Errorf("make file: %w", err)
	}
	defer unix.Close(fd)
	now, err := j.fill(fd, cmp)
	if err == nil && cmp.same {
		_ = unix.Unlinkat(f.fd, tmp, 0)
		changed, err := d.setMeta(old, st, &j.meta, true)
		d.count(changed)
		return err
	}
	if err == nil {
		err = d.clear(f.fd, f.rel, name, st)
	}
	if err == nil {
		err = unix.Renameat2(f.fd, tmp, f.fd, name, unix.RENAME_NOREPLACE)
	}
	if err != nil {
		_ = unix.Unlinkat(f.fd, tmp, 0)
		return err
	}
	_, err = d.setMeta(fd, now, &j.meta, j.all)
	add(&d.res.Files, 1)
	add(&d.res.Bytes, e.size)
	d.run.bytes.Add(e.size)
	return err
}

// comparer passes r on and tells whether the file has the same bytes.
type comparer struct {
	r    io.Reader
	fd   int
	off  int64
	buf  []byte
	same bool
}

func (c *comparer) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if c.same && n > 0 {
		if len(c.buf) < n {
			c.buf = make([]byte, n)
		}
		for done := 0; done < n && c.same; {
			m, err := pread(c.fd, c.buf[done:n], c.off+int64(done))
			c.same = err == nil && m > 0 && string(c.buf[done:done+m]) == string(p[done:done+m])
			done += max(m, 1)
		}
	}
	c.off += int64(n)
	return n, err
}
