// Package compare compares a sample of the live source with a snapshot of it. It tells what changed since, which is
// normal, from what differs although its change time says that nobody touched it, which is a defect: of the backup, of the
// disk, or of whatever writes past the file system. It changes nothing, and works while the service runs.
//
// Contents are compared without reading them from the repository: the name of a blob is the hash of its bytes.
package compare

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Options of Run.
type Options struct {
	// Percent of the spaces (at least one), and of the files' contents in them and elsewhere, that are compared; 100 is all.
	Percent float64
	// Seed picks the sample: the same one picks the same.
	Seed     uint64
	Progress progress.Sink
}

// Difference is something that is not as in the snapshot although nothing says that it was changed.
type Difference struct {
	Path string `json:"path"` // on this machine
	What string `json:"what"`
}

// maxDifferences is how many are listed.
const maxDifferences = 1000

// Report tells what was found.
type Report struct {
	// Moment is when the picture was taken: what was changed later may differ.
	Moment time.Time
	Spaces int   // compared
	Of     int   // spaces in the snapshot
	Same   int64 // entries
	Files  int64 // of those, files whose contents were read
	Bytes  int64 // that were read
	// Changed, Gone and New count what was changed, removed and made since.
	Changed, Gone, New int64
	// Differ counts the defects; Differences has the first of them.
	Differ      int64
	Differences []Difference
	// Skipped names what cannot be compared, and why.
	Skipped []string
}

// slack makes up for clocks of file systems, which are coarse, and for what was under way at the moment.
const slack = 2 * time.Second

// Run compares. The index must be loaded.
func Run(ctx context.Context, r *repo.Repository, sn *snapshot.Snapshot, inst *ocis.Instance, o Options) (*Report, error) {
	if sn.Tree == nil {
		return nil, errors.New("the snapshot has no tree")
	}
	m, err := snapshot.LoadManifest(ctx, r, *sn.Tree)
	if err != nil {
		return nil, err
	}
	c := &comparer{r: r, root: *sn.Tree, o: o, rep: &Report{Moment: moment(sn, m)}, find: snapshot.NewFinder(r, *sn.Tree)}
	c.before = c.rep.Moment.Add(-slack)
	c.ev = progress.Event{Kind: progress.Start, Phase: "compare", Unit: "entries"}
	o.Progress.Emit(c.ev)
	for i := range m.DataSets {
		if d := &m.DataSets[i]; d.Captured && d.Store == "" && d.Tree != "" {
			if err := c.plain(ctx, d, m, inst); err != nil {
				return nil, err
			}
		}
	}
	type place struct {
		store *snapshot.Store
		space *snapshot.Space
	}
	var spaces []place
	for i := range m.Stores {
		st := &m.Stores[i]
		for k := range st.Spaces {
			spaces = append(spaces, place{st, &st.Spaces[k]})
		}
	}
	c.rep.Of = len(spaces)
	rnd := rand.New(rand.NewPCG(o.Seed, 0))
	rnd.Shuffle(len(spaces), func(i, j int) { spaces[i], spaces[j] = spaces[j], spaces[i] })
	n := min(len(spaces), max(1, int(float64(len(spaces))*o.Percent/100+0.999)))
	for _, p := range spaces[:n] {
		live := inst.Store(p.store.Name)
		if live == nil {
			c.skip("store %s: the instance has none of that name", p.store.Name)
			continue
		}
		if err := c.space(ctx, live, p.store, p.space); err != nil {
			return nil, err
		}
		c.rep.Spaces++
	}
	c.ev.Kind, c.ev.Total = progress.Finish, c.ev.Done
	o.Progress.Emit(c.ev)
	return c.rep, nil
}

// moment is the earliest time at which the picture was taken.
func moment(sn *snapshot.Snapshot, m *snapshot.Manifest) time.Time {
	var t time.Time
	take := func(x *time.Time) {
		if x != nil && (t.IsZero() || x.Before(t)) {
			t = *x
		}
	}
	for i := range m.Views {
		take(m.Views[i].MadeAt)
	}
	take(m.Freeze.StoppedAt)
	if t.IsZero() {
		t = sn.Time
	}
	return t
}

type comparer struct {
	r      *repo.Repository
	root   id.ID
	o      Options
	rep    *Report
	before time.Time
	find   *snapshot.Finder
	ev     progress.Event
	buf    []byte
}

func (c *comparer) skip(format string, args ...any) {
	c.rep.Skipped = append(c.rep.Skipped, fmt.Sprintf(format, args...))
}

func (c *comparer) differs(p, format string, args ...any) {
	c.rep.Differ++
	if len(c.rep.Differences) < maxDifferences {
		c.rep.Differences = append(c.rep.Differences, Difference{p, fmt.Sprintf(format, args...)})
	}
}

// sampled picks files by their place, so that a seed picks the same in any order.
func (c *comparer) sampled(p string) bool {
	if c.o.Percent >= 100 {
		return true
	}
	h := fnv.New64a()
	var seed [8]byte
	binary.LittleEndian.PutUint64(seed[:], c.o.Seed)
	h.Write(seed[:])
	io.WriteString(h, p)
	x := h.Sum64()
	x = (x ^ x>>31) * 0x9E3779B97F4A7C15 // the low bits of FNV are poor
	return float64(x>>11)/(1<<53)*100 < c.o.Percent
}

// item is an entry as the snapshot has it.
type item struct {
	rel      string // "" is the root
	typ      snapshot.NodeType
	mode     uint32 // permission, setuid, setgid, sticky
	uid, gid uint32
	mtime    time.Time
	size     int64
	link     string // target
	hard     string // another name of the same file
	rdev     uint64
	xattrs   map[string]string
	content  []id.ID   // nil: see data
	data     io.Reader // content that stands in the archive
}

// set is a directory that is compared, with the folders on the way to the entry at hand.
type set struct {
	c     *comparer
	root  *os.Root
	path  string
	inner func(rel string) bool // belongs to another set
	stack []*folder
}

// folder is a directory whose children are being compared: what is there and not in the snapshot must be new.
type folder struct {
	rel   string
	names map[string]bool
}

func (c *comparer) open(dir string) (*set, error) {
	r, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &set{c: c, root: r, path: dir, inner: func(string) bool { return false }}, nil
}

func (s *set) abs(rel string) string { return filepath.Join(s.path, rel) }

// statOf returns the live entry; every folder on the way must be a real one.
func (s *set) statOf(rel string) (*syscall.Stat_t, error) {
	if rel == "" {
		rel = "."
	}
	fi, err := s.root.Lstat(rel)
	if err != nil {
		return nil, err
	}
	return fi.Sys().(*syscall.Stat_t), nil
}

func ctime(st *syscall.Stat_t) time.Time { return time.Unix(st.Ctim.Sec, st.Ctim.Nsec) }

// put compares one entry. Entries come with a folder before its children.
func (s *set) put(ctx context.Context, it *item) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	c := s.c
	c.ev.Kind, c.ev.Done, c.ev.Bytes = progress.Update, c.ev.Done+1, c.rep.Bytes
	c.o.Progress.Emit(c.ev)
	s.leave(it.rel)
	if n := len(s.stack); n > 0 {
		s.stack[n-1].names[path.Base(it.rel)] = true
	}
	p := s.abs(it.rel)
	st, err := s.statOf(it.rel)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		if s.untouched(path.Dir(it.rel)) {
			c.differs(p, "it is not there, although its folder was not changed since")
		} else {
			c.rep.Gone++
		}
		return nil
	}
	if err != nil {
		c.skip("%v", err)
		return nil
	}
	what, err := s.compare(ctx, it, st)
	if errors.Is(err, fs.ErrPermission) { // not run as the user who can read it all
		c.skip("%v", err)
		return nil
	}
	if err != nil {
		return err
	}
	// Once more: it may have been changed while it was read.
	now, err := s.statOf(it.rel)
	switch {
	case what == "":
		c.rep.Same++
	case err != nil || now.Ino != st.Ino || now.Ctim != st.Ctim || !ctime(st).Before(c.before):
		c.rep.Changed++
	default:
		c.differs(p, "%s, although it was not changed since", what)
	}
	if it.typ == snapshot.Dir {
		s.stack = append(s.stack, &folder{it.rel, map[string]bool{}})
	}
	return nil
}

// untouched reports whether a folder is as it was at the moment of the picture: if it is not there, the one above it
// tells.
func (s *set) untouched(rel string) bool {
	for {
		st, err := s.statOf(rel)
		if err == nil {
			return ctime(st).Before(s.c.before)
		}
		if rel == "." || rel == "" {
			return false
		}
		rel = path.Dir(rel)
	}
}

// leave finishes the folders that rel does not lie in.
func (s *set) leave(rel string) {
	for n := len(s.stack); n > 0; n-- {
		f := s.stack[n-1]
		if f.rel == "" || strings.HasPrefix(rel, f.rel+"/") {
			return
		}
		s.finish(f)
		s.stack = s.stack[:n-1]
	}
}

// finish looks for what the snapshot should have and has not.
func (s *set) finish(f *folder) {
	rel := f.rel
	if rel == "" {
		rel = "."
	}
	d, err := s.root.Open(rel)
	if err != nil {
		return // gone meanwhile
	}
	defer d.Close()
	for {
		names, err := d.Readdirnames(1024)
		for _, n := range names {
			p := path.Join(f.rel, n)
			if f.names[n] || s.inner(p) {
				continue
			}
			st, serr := s.statOf(p)
			if serr != nil {
				continue
			}
			if ctime(st).Before(s.c.before) && s.untouched(f.rel) {
				s.c.differs(s.abs(p), "the snapshot does not have it, although it was there")
			} else {
				s.c.rep.New++
			}
		}
		if err != nil {
			return
		}
	}
}

func (s *set) close() {
	for n := len(s.stack); n > 0; n-- {
		s.finish(s.stack[n-1])
	}
	s.root.Close()
}

// compare says in words what differs, or "".
func (s *set) compare(ctx context.Context, it *item, st *syscall.Stat_t) (string, error) {
	live := map[uint32]snapshot.NodeType{
		unix.S_IFREG: snapshot.File, unix.S_IFDIR: snapshot.Dir, unix.S_IFLNK: snapshot.Symlink, unix.S_IFBLK: snapshot.Dev,
		unix.S_IFCHR: snapshot.CharDev, unix.S_IFIFO: snapshot.FIFO, unix.S_IFSOCK: snapshot.Socket,
	}[st.Mode&unix.S_IFMT]
	mtime := time.Unix(st.Mtim.Sec, st.Mtim.Nsec)
	switch {
	case live != it.typ:
		return fmt.Sprintf("it is a %s, in the snapshot a %s", live, it.typ), nil
	case it.hard != "":
		if first, err := s.statOf(it.hard); err != nil || first.Ino != st.Ino {
			return "it is not the same file as " + strconv.Quote(it.hard), nil
		}
		return "", nil
	case it.typ == snapshot.File && st.Size != it.size:
		return fmt.Sprintf("it has %d bytes, in the snapshot %d", st.Size, it.size), nil
	case !mtime.Equal(it.mtime):
		return fmt.Sprintf("it bears the time %s, in the snapshot %s", mtime.UTC().Format(time.RFC3339Nano), it.mtime.UTC().Format(time.RFC3339Nano)), nil
	case it.typ != snapshot.Symlink && st.Mode&0o7777 != it.mode:
		return fmt.Sprintf("it has the mode %04o, in the snapshot %04o", st.Mode&0o7777, it.mode), nil
	case st.Uid != it.uid || st.Gid != it.gid:
		return fmt.Sprintf("it belongs to %d:%d, in the snapshot to %d:%d", st.Uid, st.Gid, it.uid, it.gid), nil
	case (it.typ == snapshot.Dev || it.typ == snapshot.CharDev) && st.Rdev != it.rdev:
		return "it is another device", nil
	}
	if it.typ == snapshot.Symlink {
		if to, err := s.root.Readlink(it.rel); err != nil || to != it.link {
			return "it points elsewhere", nil
		}
		return "", nil
	}
	if it.typ != snapshot.File && it.typ != snapshot.Dir {
		return "", nil
	}
	rel := it.rel
	if rel == "" {
		rel = "."
	}
	// Not blocking, should a FIFO have taken its place.
	f, err := s.root.OpenFile(rel, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrPermission) {
		return "", err
	}
	if err != nil {
		return "it cannot be read: " + err.Error(), nil
	}
	defer f.Close()
	xattrs, err := xattrsOf(int(f.Fd()))
	if err != nil {
		return "its attributes cannot be read: " + err.Error(), nil
	}
	for k, v := range it.xattrs {
		if got, ok := xattrs[k]; !ok || got != v {
			return fmt.Sprintf("its attribute %q differs", k), nil
		}
	}
	for k := range xattrs {
		if _, ok := it.xattrs[k]; !ok {
			return fmt.Sprintf("its attribute %q is not in the snapshot", k), nil
		}
	}
	if it.typ == snapshot.Dir || !s.c.sampled(s.abs(it.rel)) {
		return "", nil
	}
	s.c.rep.Files++
	return s.content(ctx, it, f)
}

// xattrsOf reads all attributes of an open file.
func xattrsOf(fd int) (map[string]string, error) {
	names := make([]byte, 64<<10) // the kernel's own limit
	n, err := unix.Flistxattr(fd, names)
	if errors.Is(err, unix.ENOTSUP) || n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	v := make([]byte, 64<<10)
	for _, name := range strings.Split(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		n, err := unix.Fgetxattr(fd, name, v)
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out[name] = string(v[:n])
	}
	return out, nil
}

// content compares bytes: with the hashes of the blobs, or with what stands in the archive.
func (s *set) content(ctx context.Context, it *item, f io.Reader) (string, error) {
	c := s.c
	at := int64(0)
	read := func(n int) error {
		if cap(c.buf) < n {
			c.buf = make([]byte, n)
		}
		c.buf = c.buf[:n]
		_, err := io.ReadFull(f, c.buf)
		c.rep.Bytes += int64(n)
		return err
	}
	if it.content == nil {
		want := make([]byte, 64<<10)
		for at < it.size {
			n, err := io.ReadFull(it.data, want[:min(int64(len(want)), it.size-at)])
			if err != nil {
				return "", err
			}
			if err := read(n); err != nil || string(c.buf) != string(want[:n]) {
				return fmt.Sprintf("its content differs after byte %d", at), nil
			}
			at += int64(n)
		}
		return "", nil
	}
	for _, b := range it.content {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		size, ok := c.r.Size(repo.DataBlob, b)
		if !ok {
			return "", fmt.Errorf("%s: data blob %s: %w", s.abs(it.rel), b.Short(), repo.ErrUnknownBlob)
		}
		if err := read(int(size)); err != nil || id.Hash(c.buf) != b {
			return fmt.Sprintf("its content differs after byte %d", at), nil
		}
		at += size
	}
	return "", nil
}

// plain compares a data set of plain files.
func (c *comparer) plain(ctx context.Context, d *snapshot.DataSet, m *snapshot.Manifest, inst *ocis.Instance) error {
	i := slices.IndexFunc(inst.DataSets, func(x ocis.DataSet) bool { return x.Name == d.Name })
	if i < 0 || !inst.DataSets[i].Found {
		c.skip("data set %s: the instance has none of that name", d.Name)
		return nil
	}
	dir := inst.DataSets[i].Path
	top, err := snapshot.Lookup(ctx, c.r, c.root, d.Tree)
	if err != nil {
		return fmt.Errorf("data set %s: %w", d.Name, err)
	}
	if top.Type != snapshot.Dir {
		s, err := c.open(filepath.Dir(dir))
		if err != nil {
			c.skip("data set %s: %v", d.Name, err)
			return nil
		}
		defer s.root.Close()
		return s.put(ctx, nodeItem(top, filepath.Base(dir)))
	}
	s, err := c.open(dir)
	if err != nil {
		c.skip("data set %s: %v", d.Name, err)
		return nil
	}
	defer s.close()
	// What is another data set, or on the way to one, or was left out.
	s.inner = func(rel string) bool {
		p := s.abs(rel)
		return slices.ContainsFunc(inst.DataSets, func(x ocis.DataSet) bool { return x.Path == p || strings.HasPrefix(x.Path, p+"/") }) ||
			slices.ContainsFunc(inst.Stores, func(x ocis.Store) bool { return x.Root == p || strings.HasPrefix(x.Root, p+"/") })
	}
	type level struct {
		rel   string
		nodes []*snapshot.Node
	}
	if err := s.put(ctx, nodeItem(top, "")); err != nil {
		return err
	}
	tree, err := snapshot.LoadTree(ctx, c.r, top.Subtree)
	if err != nil {
		return err
	}
	stack := []level{{"", tree.Nodes}}
	for len(stack) > 0 {
		l := &stack[len(stack)-1]
		if len(l.nodes) == 0 {
			stack = stack[:len(stack)-1]
			continue
		}
		n := l.nodes[0]
		l.nodes = l.nodes[1:]
		rel := path.Join(l.rel, n.Name)
		if n.Name == "" || n.Name == "." || n.Name == ".." || strings.ContainsAny(n.Name, "/\x00") {
			c.skip("data set %s: the name %q is none", d.Name, n.Name)
			continue
		}
		if err := s.put(ctx, nodeItem(n, rel)); err != nil {
			return err
		}
		if n.Type == snapshot.Dir {
			tree, err := snapshot.LoadTree(ctx, c.r, n.Subtree)
			if err != nil {
				return err
			}
			stack = append(stack, level{rel, tree.Nodes})
		}
	}
	return nil
}

// nodeItem makes an item of a node of a plain data set.
func nodeItem(n *snapshot.Node, rel string) *item {
	it := &item{rel: rel, typ: n.Type, mode: uint32(n.Mode.Perm()), uid: n.UID, gid: n.GID, mtime: n.ModTime, size: int64(n.Size),
		link: n.LinkTarget, rdev: n.Device, content: n.Content, xattrs: map[string]string{}}
	for bit, unixBit := range map[fs.FileMode]uint32{fs.ModeSetuid: unix.S_ISUID, fs.ModeSetgid: unix.S_ISGID, fs.ModeSticky: unix.S_ISVTX} {
		if n.Mode&bit != 0 {
			it.mode |= unixBit
		}
	}
	if it.content == nil {
		it.content = []id.ID{}
	}
	for _, x := range n.Xattrs {
		if !strings.HasPrefix(x.Name, snapshot.AttrPrefix) {
			it.xattrs[x.Name] = string(x.Value)
		}
	}
	return it
}

// space compares what the archive of a space holds.
func (c *comparer) space(ctx context.Context, live *ocis.Store, st *snapshot.Store, sp *snapshot.Space) error {
	where := "/storage/" + st.Name + "/metadata/" + snapshot.SafeName(sp.ID) + ".tar"
	n, err := snapshot.Lookup(ctx, c.r, c.root, where)
	if err != nil {
		return err
	}
	s, err := c.open(live.Root)
	if err != nil {
		c.skip("store %s: %v", st.Name, err)
		return nil
	}
	defer s.close()
	tr := pax.NewReader(bufio.NewReaderSize(snapshot.NewReader(ctx, c.r, n), 64<<10))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", where, err)
		}
		it, err := c.tarItem(ctx, h, tr)
		if err == nil {
			err = s.put(ctx, it)
		}
		if err != nil {
			return fmt.Errorf("%s: %s: %w", where, strconv.Quote(h.Name), err)
		}
	}
}

// tarItem makes an item of an entry of an archive.
func (c *comparer) tarItem(ctx context.Context, h *pax.Header, data io.Reader) (*item, error) {
	rel := strings.TrimSuffix(strings.TrimPrefix(h.Name, "./"), "/")
	if rel != "" && !filepath.IsLocal(rel) {
		return nil, errors.New("the name leads out of the store")
	}
	it := &item{rel: rel, mode: h.Mode, uid: h.UID, gid: h.GID, mtime: time.Unix(h.Sec, h.Nsec), size: h.Size, xattrs: map[string]string{}}
	for _, x := range snapshot.EntryXattrs(h) {
		it.xattrs[x.Name] = string(x.Value)
	}
	var ok bool
	if it.typ, ok = snapshot.EntryType(h); !ok {
		return nil, fmt.Errorf("an entry of the unknown type %q", h.Type)
	}
	switch h.Type {
	case '0':
		it.data = data
		if p := h.Records[pax.Content]; p != "" {
			n, err := c.find.File(ctx, p)
			if err != nil {
				return nil, err
			}
			if it.size, err = strconv.ParseInt(h.Records[pax.Size], 10, 64); err != nil || uint64(it.size) != n.Size {
				return nil, fmt.Errorf("record %s=%q for a file of %d bytes", pax.Size, h.Records[pax.Size], n.Size)
			}
			it.content = n.Content
			if it.content == nil {
				it.content = []id.ID{}
			}
		}
	case '1':
		it.hard = strings.TrimPrefix(h.Link, "./")
	case '2':
		it.link = h.Link
	case '3', '4':
		it.rdev = unix.Mkdev(h.Major, h.Minor)
	}
	return it, nil
}
