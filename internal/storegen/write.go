package storegen

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// writer puts a plan on disk.
type writer struct {
	plan         *plan
	data, config string
	done         atomic.Int64 // files
	orphans      int
	entries      int64
	userEntries  int64
}

func (w *writer) users() string { return filepath.Join(w.data, "storage", "users") }

func (w *writer) run(ctx context.Context) error {
	stop := w.report()
	defer stop()
	if err := os.MkdirAll(w.users()+"/spaces", 0o700); err != nil {
		return err
	}
	p := w.plan
	st, err := openStore(w.users(), p.o.Prefix)
	if err != nil {
		return err
	}
	defer st.close()
	for _, s := range p.spaces {
		if err := w.root(st, s); err != nil {
			return err
		}
	}
	folders, files := make([]int, len(p.spaces)), make([]int, len(p.spaces))
	for i, s := range p.spaces {
		folders[i], files[i] = len(s.folders)-1, len(s.files)
	}
	// All folders first: what lies in them needs them.
	err = each(ctx, p.o.Workers, folders, func(_ *filler, s, i int) error { return w.folder(st, p.spaces[s], i+1) })
	if err != nil {
		return err
	}
	err = each(ctx, p.o.Workers, folders, func(_ *filler, s, i int) error { return w.folderLink(st, p.spaces[s], i+1) })
	if err != nil {
		return err
	}
	err = each(ctx, p.o.Workers, files, func(f *filler, s, i int) error {
		w.done.Add(1)
		return w.file(st, f, p.spaces[s], i)
	})
	if err != nil {
		return err
	}
	if err := w.storeFiles(st); err != nil {
		return err
	}
	if err := w.systemStorage(); err != nil {
		return err
	}
	if err := w.systemData(); err != nil {
		return err
	}
	return w.times(ctx)
}

// report calls Progress until the function it returns is called.
func (w *writer) report() (stop func()) {
	call := w.plan.o.Progress
	if call == nil {
		return func() {}
	}
	quit, gone := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(gone)
		t := time.NewTicker(500 * time.Millisecond)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				call(int(w.done.Load()), w.plan.o.Files)
			case <-quit:
				call(int(w.done.Load()), w.plan.o.Files)
				return
			}
		}
	}()
	return func() { close(quit); <-gone }
}

// each calls fn for 0..counts[g]-1 of every group g, on several goroutines with a filler each.
func each(ctx context.Context, workers int, counts []int, fn func(f *filler, group, i int) error) error {
	type batch struct{ group, from, to int }
	const size = 32 // large enough to make the hand-over cheap, small enough to end together
	work := make(chan batch, workers)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(work)
		for group, n := range counts {
			for i := 0; i < n; i += size {
				select {
				case work <- batch{group, i, min(n, i+size)}:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		}
		return nil
	})
	for range workers {
		g.Go(func() error {
			f := newFiller()
			for b := range work {
				for i := b.from; i < b.to; i++ {
					if err := fn(f, b.group, i); err != nil {
						return err
					}
				}
			}
			return ctx.Err()
		})
	}
	return g.Wait()
}

// store is a storage root that is being filled.
type store struct {
	root   string
	fd     int // of root
	prefix string
	umask  uint32
}

func openStore(root, prefix string) (*store, error) {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: root, Err: err}
	}
	umask, err := currentUmask()
	if err != nil {
		return nil, err
	}
	return &store{root: root, fd: fd, prefix: prefix, umask: umask}, nil
}

// currentUmask reads the mask of the process: the only other way is to change it for a moment, which
// other goroutines would feel.
func currentUmask() (uint32, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(status), "\nUmask:")
	line, _, _ := strings.Cut(rest, "\n")
	mask, err := strconv.ParseUint(strings.TrimSpace(line), 8, 32)
	if err != nil {
		return 0, fmt.Errorf("umask in /proc/self/status: %w", err)
	}
	return uint32(mask), nil
}

func (st *store) close() { _ = unix.Close(st.fd) }

// mkdir makes the directory path, relative to the root, if it is missing.
func (st *store) mkdir(path string, mode uint32) error {
	err := unix.Mkdirat(st.fd, path, mode)
	if err == nil && mode&st.umask != 0 {
		err = unix.Fchmodat(st.fd, path, mode, 0)
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return &os.PathError{Op: "mkdir", Path: filepath.Join(st.root, path), Err: err}
	}
	return nil
}

// shards makes the folders that an id is cut into below base and returns where its last part goes.
func (st *store) shards(base, id string, mode uint32) (string, error) {
	path := base + "/" + ocis.NodePath(id)
	for i := len(base); i < len(path); i++ {
		if path[i] == '/' {
			if err := st.mkdir(path[:i], mode); err != nil {
				return "", err
			}
		}
	}
	return path, nil
}

// create makes a file with its final mode and time.
func (st *store) create(path string, mode uint32, at int64, fill func(f *os.File) error) error {
	if err := st.writeNew(path, mode, fill); err != nil {
		return err
	}
	return st.touch(path, at)
}

// writeNew makes a file that is not there yet.
func (st *store) writeNew(path string, mode uint32, fill func(f *os.File) error) error {
	fd, err := unix.Openat(st.fd, path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NOFOLLOW, mode)
	if err != nil {
		return &os.PathError{Op: "create", Path: filepath.Join(st.root, path), Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	if fill != nil {
		err = fill(f)
	}
	if err == nil && mode&st.umask != 0 {
		err = f.Chmod(os.FileMode(mode))
	}
	if e := f.Close(); err == nil {
		err = e
	}
	return err
}

func (st *store) put(path string, mode uint32, at int64, data []byte) error {
	return st.create(path, mode, at, func(f *os.File) error {
		_, err := f.Write(data)
		return err
	})
}

// touch sets the time of path itself, a symlink not followed.
func (st *store) touch(path string, at int64) error {
	ts := unix.NsecToTimespec(at)
	if err := unix.UtimesNanoAt(st.fd, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "set time of", Path: filepath.Join(st.root, path), Err: err}
	}
	return nil
}

func (st *store) symlink(target, path string, at int64) error {
	if err := unix.Symlinkat(target, st.fd, path); err != nil {
		return &os.PathError{Op: "symlink", Path: filepath.Join(st.root, path), Err: err}
	}
	return st.touch(path, at)
}

// node is one node to be made.
type node struct {
	id      string
	dir     bool
	mode    uint32
	at      int64 // time of the entry, and of its metadata a moment later
	trashed int64
	attrs   ocis.Attributes
	noLock  bool
}

// addNode makes entry, metadata and lock file of n in the space at base.
func (st *store) addNode(base string, n *node) error {
	path, err := st.shards(base+"/nodes", n.id, 0o700)
	if err != nil {
		return err
	}
	entry := path + trashMark(n.trashed)
	if n.dir {
		if err := st.mkdir(entry, n.mode); err != nil {
			return err
		}
	} else if err := st.create(entry, n.mode, n.at, nil); err != nil {
		return err
	}
	if err := st.put(entry+".mpk", 0o600, n.at+7345211, ocis.EncodeMPK(rotated(n.attrs, n.at))); err != nil {
		return err
	}
	if n.noLock {
		return nil
	}
	// A lock file keeps the name that it had, also when the node goes to the trash.
	return st.create(path+".mlock", 0o600, n.at+3120077, nil)
}

// rotated starts the attributes at another place for each node, since servers write them in the
// random order of their maps.
func rotated(attrs ocis.Attributes, at int64) ocis.Attributes {
	r := rng(at)
	k := r.below(len(attrs))
	return append(append(make(ocis.Attributes, 0, len(attrs)), attrs[k:]...), attrs[:k]...)
}

// addBlob makes a blob and returns the checksums.
func (st *store) addBlob(base, id string, at int64, f *filler, it item) (checksums, error) {
	path, err := st.shards(base+"/blobs", id, 0o700)
	if err != nil {
		return checksums{}, err
	}
	var c checksums
	err = st.create(path, 0o644, at, func(file *os.File) error {
		c, err = f.write(file, it)
		return err
	})
	return c, err
}

func trashMark(at int64) string {
	if at == 0 {
		return ""
	}
	return ".T." + stamp(at)
}

func stamp(at int64) string { return time.Unix(0, at).UTC().Format(time.RFC3339Nano) }

func number(n int64) []byte { return strconv.AppendInt(nil, n, 10) }

// attributes collects attributes of one prefix.
type attributes struct {
	prefix string
	list   ocis.Attributes
}

func (a *attributes) add(name string, value []byte) {
	a.list = append(a.list, ocis.Attribute{Key: a.prefix + name, Value: value})
}

func (a *attributes) text(name, value string) { a.add(name, []byte(value)) }

func (a *attributes) grant(g ocis.Grant) {
	name, value := g.Attribute()
	a.add(name, value)
}

func (a *attributes) content(blob string, size int64, c *checksums) {
	a.text("blobid", blob)
	a.add("blobsize", number(size))
	if c != nil {
		a.add("cs.sha1", c.sha1[:])
		a.add("cs.md5", c.md5[:])
		a.add("cs.adler32", c.adler[:])
	}
}

const (
	managerRights = "txrwadCcoOuUPvVq"
	editorRights  = "txrwadcuUvVq"
	viewerRights  = "txr"
)

// root makes a space with its root node.
func (w *writer) root(st *store, s *space) error {
	root := &s.folders[0]
	a := attributes{prefix: st.prefix}
	a.text("id", s.id)
	a.text("name", s.name)
	a.text("space.id", s.id)
	a.text("space.name", s.name)
	a.text("space.type", s.kind)
	a.text("space.alias", s.alias)
	a.text("owner.id", s.owner)
	a.text("propagation", "1")
	a.text("tmtime", stamp(root.changed))
	a.add("treesize", number(root.size))
	a.text("tmp.etag", "")
	if s.kind == "personal" {
		a.text("owner.idp", "https://localhost:9200")
		a.text("owner.type", "primary")
	} else {
		a.text("owner.idp", "")
		a.text("owner.type", "spaceowner")
		a.text("space.description", "made up: "+s.name)
		a.text("quota", "1000000000000")
		for i, m := range s.members {
			g := ocis.Grant{Principal: w.plan.users[m].id, Permissions: editorRights, Creator: w.plan.admin}
			if i == 0 {
				g.Permissions = managerRights
			}
			a.grant(g)
		}
		if s.disabled {
			a.text("dtime", stamp(lastDay))
		}
	}
	return st.addRoot(s.id, a.list, root.made, true)
}

// addRoot makes the folders of a space and its root node.
func (st *store) addRoot(id string, attrs ocis.Attributes, at int64, lock bool) error {
	base := ocis.SpacePath(id)
	for _, dir := range []struct {
		path string
		mode uint32
	}{{filepath.Dir(base), 0o755}, {base, 0o755}, {base + "/nodes", 0o755}, {base + "/blobs", 0o700}, {base + "/trash", 0o700}} {
		if err := st.mkdir(dir.path, dir.mode); err != nil {
			return err
		}
	}
	// The folders above a root node are wider open than all others.
	if _, err := st.shards(base+"/nodes", id, 0o755); err != nil {
		return err
	}
	return st.addNode(base, &node{id: id, dir: true, mode: 0o750, at: at, attrs: attrs, noLock: !lock})
}

// folder makes folder i of a space, without the link in its parent.
func (w *writer) folder(st *store, s *space, i int) error {
	p, f := w.plan, &s.folders[i]
	a := attributes{prefix: st.prefix}
	a.text("name", p.folderName(s, i))
	a.text("parentid", p.folderID(s, int(f.parent)))
	a.text("propagation", "1")
	a.text("type", "2")
	a.add("treesize", number(f.size))
	if f.changed != f.made { // nothing was ever put into it
		a.text("tmp.etag", "")
		a.text("tmtime", stamp(f.changed))
	}
	if f.trashed != 0 {
		a.text("trash.origin", p.path(s, i))
	}
	if f.shared {
		a.grant(ocis.Grant{Principal: p.users[i%len(p.users)].id, Permissions: editorRights, Creator: s.owner})
	}
	base := ocis.SpacePath(s.id)
	id := p.folderID(s, i)
	err := st.addNode(base, &node{id: id, dir: true, mode: 0o700, at: f.made, trashed: f.trashed, attrs: a.list})
	if err != nil || f.trashed == 0 {
		return err
	}
	return st.addTrash(base, id, f.trashed)
}

// addTrash makes the link in the trash.
func (st *store) addTrash(base, id string, at int64) error {
	path, err := st.shards(base+"/trash", id, 0o700)
	if err != nil {
		return err
	}
	return st.symlink("../../../../../nodes/"+ocis.NodePath(id)+trashMark(at), path, at)
}

func (w *writer) folderLink(st *store, s *space, i int) error {
	f := &s.folders[i]
	if f.trashed != 0 {
		return nil
	}
	return w.link(st, s, int(f.parent), w.plan.folderName(s, i), w.plan.folderID(s, i), f.made)
}

// link makes the entry of a child in its parent.
func (w *writer) link(st *store, s *space, parent int, name, id string, at int64) error {
	dir := ocis.SpacePath(s.id) + "/nodes/" + ocis.NodePath(w.plan.folderID(s, parent)) + trashMark(s.folders[parent].trashed)
	return st.symlink("../../../../../"+ocis.NodePath(id), dir+"/"+name, at)
}

// file makes a file with its revisions and blobs.
func (w *writer) file(st *store, fill *filler, s *space, i int) error {
	p, f := w.plan, &s.files[i]
	base, id, name := ocis.SpacePath(s.id), p.fileID(s, i), p.fileName(s, i)
	r := stream(p.o.Seed, forContent, s.index, i)
	// Clients name the time of the last change on their side, some to the second only.
	changed := f.received - int64(r.float()*float64(20*time.Hour))
	if r.below(3) == 0 {
		changed -= changed % int64(time.Second)
	}
	n := node{id: id, mode: 0o600, at: f.received, trashed: f.trashed, noLock: r.below(40) == 0}
	a := attributes{prefix: st.prefix}
	a.text("id", id)
	a.text("parentid", p.folderID(s, int(f.folder)))
	a.text("name", name)
	a.text("type", "1")
	a.text("mtime", stamp(changed))
	for k := range f.contents {
		it, blob := p.items[f.first+k], p.blobID(f.first+k)
		at := f.received - int64(k)*11*day
		c, err := w.blob(st, fill, s, i, blob, it, at, f.inFlight)
		if err != nil {
			return err
		}
		if k == 0 {
			a.content(blob, it.size, &c)
			continue
		}
		rev := attributes{prefix: st.prefix}
		rev.text("type", "1")
		rev.content(blob, it.size, &c)
		rev.text("mtime", stamp(changed-int64(k)*11*day))
		if err := st.addRevision(base, id, changed-int64(k)*11*day, f.received-int64(k-1)*11*day, rev.list); err != nil {
			return err
		}
	}
	if f.contents == 0 {
		a.content("", 0, nil)
		n.mode = 0o644
	}
	if r.below(30) == 0 {
		a.text("md.tags", "urgent,plan")
	}
	if f.inFlight {
		a.text("nodestatus", "processing:"+p.blobID(f.first))
	}
	if f.trashed != 0 {
		a.text("trash.origin", p.path(s, int(f.folder))+"/"+name)
	}
	n.attrs = a.list
	if err := st.addNode(base, &n); err != nil {
		return err
	}
	if f.trashed != 0 {
		return st.addTrash(base, id, f.trashed)
	}
	return w.link(st, s, int(f.folder), name, id, f.received)
}

// blob makes a blob, or the bytes of an upload that has not become one yet.
func (w *writer) blob(st *store, fill *filler, s *space, i int, blob string, it item, at int64, inFlight bool) (checksums, error) {
	if !inFlight {
		return st.addBlob(ocis.SpacePath(s.id), blob, at, fill, it)
	}
	if err := st.mkdir("uploads", 0o700); err != nil {
		return checksums{}, err
	}
	var c checksums
	err := st.create("uploads/"+blob, 0o644, at, func(f *os.File) error {
		var err error
		c, err = fill.write(f, it)
		return err
	})
	if err != nil {
		return c, err
	}
	info, err := w.uploadInfo(s, i, blob, it.size, it.size, at)
	if err != nil {
		return c, err
	}
	return c, st.put("uploads/"+blob+".info", 0o600, at, info)
}

// addRevision makes an older version of a file: the content of the time changed, replaced at.
func (st *store) addRevision(base, id string, changed, replaced int64, attrs ocis.Attributes) error {
	path, err := st.shards(base+"/nodes", id, 0o700)
	if err != nil {
		return err
	}
	path += ".REV." + stamp(changed)
	if err := st.create(path, 0o644, changed, nil); err != nil {
		return err
	}
	if err := st.put(path+".mpk", 0o600, replaced, ocis.EncodeMPK(rotated(attrs, changed))); err != nil {
		return err
	}
	return st.create(path+".mlock", 0o600, replaced, nil)
}

// times gives each directory the time of the newest entry below it, so that two runs are equal, and
// counts the entries.
func (w *writer) times(ctx context.Context) error {
	for _, top := range []string{w.data, w.config} {
		t := timer{ctx: ctx, users: w.users() + "/spaces", slots: make(chan struct{}, w.plan.o.Workers)}
		if _, err := t.dir(top); err != nil {
			return err
		}
		w.entries += t.entries.Load() + 1
		w.userEntries += t.userEntries.Load()
	}
	return nil
}

type timer struct {
	ctx                  context.Context
	users                string
	slots                chan struct{}
	entries, userEntries atomic.Int64
}

func (t *timer) dir(path string) (newest int64, err error) {
	if err := t.ctx.Err(); err != nil {
		return 0, err
	}
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	list, err := f.ReadDir(-1)
	if err != nil {
		f.Close()
		return 0, err
	}
	newest = firstDay
	for _, e := range list {
		if e.IsDir() {
			continue
		}
		var s unix.Stat_t
		if err := unix.Fstatat(int(f.Fd()), e.Name(), &s, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			f.Close()
			return 0, &os.PathError{Op: "lstat", Path: filepath.Join(path, e.Name()), Err: err}
		}
		newest = max(newest, s.Mtim.Nano())
	}
	f.Close()
	var wg sync.WaitGroup
	var mu sync.Mutex
	below := func(sub string) {
		n, e := t.dir(sub)
		mu.Lock()
		defer mu.Unlock()
		newest = max(newest, n)
		if err == nil {
			err = e
		}
	}
	for _, e := range list {
		if !e.IsDir() {
			continue
		}
		sub := filepath.Join(path, e.Name())
		select {
		case t.slots <- struct{}{}:
			wg.Go(func() {
				below(sub)
				<-t.slots
			})
		default:
			below(sub)
		}
	}
	wg.Wait()
	if err != nil {
		return 0, err
	}
	t.entries.Add(int64(len(list)))
	if len(path) >= len(t.users) && path[:len(t.users)] == t.users {
		t.userEntries.Add(int64(len(list)))
	}
	ts := unix.NsecToTimespec(newest)
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, 0); err != nil {
		return 0, fmt.Errorf("set time of %s: %w", path, err)
	}
	return newest, nil
}
