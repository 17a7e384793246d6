package capture

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/internal/fschange"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// store captures one storage root. What differs between the layouts is in decomposed.go and posix.go.
type store struct {
	c     *capturer
	s     *ocis.Store
	root  *root
	skip  func(rel string) bool // other data sets below the root
	rules uint64                // what skip leaves out, as a number
	// localTimes: what a directory's times say can be believed.
	localTimes bool
	marked     bool           // the next capture will have a list of changes since this one
	changed    *fschange.List // what was changed since the picture that the cache knows; nil: that is not known
	base       string         // /storage/<name> in the snapshot
	obj        *Objects       // nil: the blobs lie on disk
	spaces     []*space

	mu      sync.Mutex
	counts  counts
	uploads map[string]int64         // bytes of the files in uploads/
	unref   *folder                  // what belongs to no space and is too large for the tar
	ids     map[string]*snapshotPart // finished spaces by id
}

// space is one space of a store.
type space struct {
	id     string
	rel    string // its directory below the store's root
	meta   *ocis.SpaceMeta
	dtime  string
	packed bool   // metadata lies in files, not in attributes
	folder string // path below spaces/, versions/ and trash/
}

// snapshotPart is what a space adds to the snapshot.
type snapshotPart struct {
	tar       content
	space     *snapshot.Node // its folder as users see it, nil if there is none
	versions  *snapshot.Node
	trash     *snapshot.Node
	trashVers *snapshot.Node
	unref     *snapshot.Node
	info      snapshot.Space
	proof     snapshot.Proof // counters only
	files     int64
	dirs      int64
	bytes     int64
	trees     []id.ID
	spare     spareCount // not kept with the result: see cachedSpace
	perfect   bool       // nothing missing, in flight or unreadable: may be used again
}

// unrefStore is the folder below unreferenced/ for what belongs to no space.
const unrefStore = "_store"

func (c *capturer) newStore(s *ocis.Store) (*store, error) {
	r, err := openRoot(c.part.View(s.Root))
	if err != nil {
		return nil, err
	}
	skip, below := c.nested(s.Root)
	st := &store{
		c: c, s: s, root: r, skip: skip, rules: scanRules(below), localTimes: localTimes(r), base: "/storage/" + s.Name,
		uploads: map[string]int64{}, ids: map[string]*snapshotPart{},
	}
	if s.S3 != nil {
		st.obj = c.opts.Objects[s.Name]
	}
	return st, nil
}

// askChanges asks the file system what was changed in the store since the picture that the cache knows. It
// returns the moment of the picture that is about to be read: what changes later is in the next list.
func (s *store) askChanges(ctx context.Context) fschange.Mark {
	c := s.c
	var old fschange.Mark
	if !c.opts.FullScan {
		old = c.opts.Cache.marks[s.s.Name]
	}
	list, now, why := fschange.Since(ctx, c.part.View(s.s.Root), old, c.viewed)
	s.changed, s.marked = list, now != ""
	switch {
	case list != nil:
		why = fmt.Errorf("%d entries were changed, by the list of the file system; the others are not looked at", list.Len())
	case errors.Is(why, fschange.ErrNoMark), errors.Is(why, fschange.ErrNoList), why == nil, ctx.Err() != nil:
		return now
	}
	c.opts.Progress.Emit(progress.Event{Kind: progress.Verbose, Phase: "capture", Message: fmt.Sprintf("store %s: %v", s.s.Name, why)})
	return now
}

// looks is how many spaces, or parts of a large one, are compared with the cache at once. With cold caches each waits for the disk with every
// directory; a disk is fast only if it has many requests at a time.
const looks = 12

// run captures the store and returns its folder.
func (s *store) run(ctx context.Context, m *snapshot.Store) (*folder, error) {
	var err error
	switch s.s.Layout {
	case ocis.Posix:
		err = s.findPosixSpaces(ctx)
	default:
		err = s.findDecomposedSpaces(ctx)
	}
	if err != nil {
		return nil, err
	}
	s.nameSpaces()
	if err := s.checkRules(); err != nil {
		return nil, err
	}
	out := newFolder()
	tar, err := s.rest(ctx)
	if err != nil {
		return nil, err
	}
	out.put(tarNode("store.tar", tar), "")
	g, gctx := s.c.errgroup(ctx, max(s.c.opts.Limits.Spaces, looks))
	for _, sp := range s.spaces {
		g.Go(func() error {
			// As many as are read at once always fit, however large: those places have memory for it.
			size := min(s.c.opts.Cache.sizeOf(s.cacheKey(sp.id)), max(s.c.opts.Limits.Look/int64(s.c.opts.Limits.Spaces), 1))
			if err := s.c.looking.Acquire(gctx, size); err != nil {
				return context.Cause(gctx)
			}
			defer s.c.looking.Release(size)
			var part *snapshotPart
			var err error
			if s.s.Layout == ocis.Posix {
				part, err = s.posixSpace(gctx, sp)
			} else {
				part, err = s.decomposedSpace(gctx, sp)
			}
			if err != nil {
				return fmt.Errorf("space %s: %w", sp.id, err)
			}
			s.mu.Lock()
			s.ids[sp.id] = part
			s.mu.Unlock()
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for _, sp := range s.spaces {
		s.add(out, sp, s.ids[sp.id])
		m.Spaces = append(m.Spaces, s.ids[sp.id].info)
	}
	if m.Bucket != nil {
		m.Bucket.Unreferenced = s.unreferenced()
	}
	if s.unref != nil {
		out.sub("unreferenced").folders[unrefStore] = s.unref
	}
	return out, nil
}

// add puts the parts of a space where they belong.
func (s *store) add(out *folder, sp *space, p *snapshotPart) {
	n := tarNode(snapshot.SafeName(sp.id)+".tar", p.tar)
	out.sub("metadata").put(n, "")
	dir, name := path.Split(sp.folder)
	for _, part := range []struct {
		top  string
		node *snapshot.Node
	}{{"spaces", p.space}, {"versions", p.versions}, {"trash", p.trash}, {"trash-versions", p.trashVers}} {
		if part.node != nil {
			part.node.Name = name
			out.sub(part.top).sub(dir).put(part.node, "-"+snapshot.SafeName(sp.id))
		}
	}
	if p.unref != nil {
		p.unref.Name = snapshot.SafeName(sp.id)
		out.sub("unreferenced").put(p.unref, "")
	}
	c := s.c
	c.files.Add(p.files)
	c.dirs.Add(p.dirs)
	c.bytes.Add(p.bytes)
	c.mu.Lock()
	q := &c.proof
	q.Nodes += p.proof.Nodes
	q.Revisions += p.proof.Revisions
	q.TrashItems += p.proof.TrashItems
	q.Blobs += p.proof.Blobs
	q.Bytes += p.proof.Bytes
	q.Verified += p.proof.Verified
	q.InFlight += p.proof.InFlight
	q.Missing = append(q.Missing, p.proof.Missing...)
	c.mu.Unlock()
}

// tarNode is the node of a tar. Its time is zero: the entries have their own.
func tarNode(name string, c content) *snapshot.Node {
	return &snapshot.Node{
		Name: name, Type: snapshot.File, Mode: 0o600, ModTime: time.Unix(0, 0).UTC(), Size: uint64(c.size), Content: c.ids,
	}
}

// finishTar joins the groups to one tar and saves its end.
func (s *store) finishTar(ctx context.Context, groups []*group) (content, error) {
	ids, size := joinGroups(groups)
	end, err := s.c.saver.bytes(ctx, tarEnd())
	if err != nil {
		return content{}, err
	}
	return content{ids: append(ids, end.ids...), size: size + end.size}, nil
}

// cacheKey names a space in the cache; the rest of the store has the empty space id.
// What is remembered depends on how the store is read.
func (s *store) cacheKey(spaceID string) string {
	return strings.Join([]string{s.s.Name, string(s.s.Layout), s.s.Prefix, s.obj.identity(), spaceID}, "/")
}

func (s *store) cached(spaceID string) *cachedSpace {
	if old := s.c.opts.Cache.space(s.cacheKey(spaceID)); old != nil {
		return old
	}
	return &cachedSpace{}
}

// remember keeps cs, which was made from the space old, for the next run.
func (s *store) remember(spaceID string, old, cs *cachedSpace, groups []*group) {
	cs.was = old.at
	cs.groups = make(map[string]*group, len(groups))
	for _, g := range groups {
		cs.groups[g.first] = g
	}
	cs.rules = s.rules
	s.keepSpace(spaceID, cs)
}

// untouched returns the result of the last capture if nothing in the space has changed since that capture
// began, and nil if it has to be looked at. Who knows is a watch, of captures in this process, or the file
// system's list.
func (s *store) untouched(sp *space, old *cachedSpace) *snapshotPart {
	c := s.c
	if c.opts.FullScan || old.folder != sp.folder || len(old.result) == 0 || old.groups[sp.rel] == nil || // it lay elsewhere
		old.print == [32]byte{} || // something could not be read, or had just changed
		s.obj != nil && !s.obj.LockUntil.IsZero() { // the warm pass locks nothing
		return nil
	}
	watched := old.live && c.part.Unchanged != nil && c.part.Unchanged(path.Join(s.s.Root, sp.rel))
	if !watched && (s.changed == nil || s.changed.Touched(sp.rel)) {
		return nil
	}
	part, err := decodePart(old.result)
	if err != nil || !c.hasTrees(part.trees) || !old.live && !s.stillGood(old, part) {
		return nil
	}
	c.taken.Add(s.reuse(sp, old, part))
	return part
}

// reuse takes over what old says of the space, of how many entries it returns; part is what is in its result.
func (s *store) reuse(sp *space, old *cachedSpace, part *snapshotPart) int64 {
	s.count(old.counts)
	n := old.counts.metaEntries + old.counts.blobEntries
	s.c.entries.Add(n)
	s.keepSpace(sp.id, old)
	part.spare = old.spare
	return n
}

// stillGood reports whether what an earlier process remembered of a space is complete in the repository, and
// was read as it would be now.
func (s *store) stillGood(old *cachedSpace, part *snapshotPart) bool {
	if old.rules != s.rules || !s.c.hasAll(part.tar.ids) {
		return false
	}
	if o := s.obj; o != nil && (o.CountSpare || o.KeepSpare || old.spare.listed && old.spare.captured > 0) {
		return false
	}
	for _, g := range old.groups {
		if !s.c.hasAll(g.ids) || !s.c.hasAll(g.needs) {
			return false
		}
	}
	return true
}

// keepSpace keeps cs, what this run knows of the space, for the next one.
func (s *store) keepSpace(spaceID string, cs *cachedSpace) {
	cs.live = true
	s.c.next.putSpace(s.cacheKey(spaceID), cs)
}

// scanner walks below the store's root, without other data sets and without what skip names.
func (s *store) scanner(skip func(rel string) bool) *scanner {
	nested := s.skip
	return &scanner{
		r: s.root, workers: 2, ahead: s.c.opts.Limits.Ahead, listed: &s.c.listed, taken: &s.c.taken,
		skip: func(rel string) bool {
			return nested != nil && nested(rel) || skip != nil && skip(rel)
		},
		unreadable: func(rel string, err error) { s.c.unreadable(s.root.abs(rel), err) },
	}
}

// rest captures what belongs to no space: indexes, uploads, migrations, the folders above the spaces.
func (s *store) rest(ctx context.Context) (content, error) {
	isSpace := map[string]bool{}
	for _, sp := range s.spaces {
		isSpace[sp.rel] = true
	}
	old := s.cached("")
	h := &restHandler{store: s}
	gr := s.c.newGrouper(ctx, s.root, old.groups, func() (handler, error) { return h, nil })
	gr.refsOf = func(entries []entry) ([32]byte, error) { return hashRefs(entries, h.ref), nil }
	var n counts
	defer func() { s.count(n) }()
	err := s.scanner(func(rel string) bool { return isSpace[rel] }).walk(ctx, "", func(e *entry) error {
		if dir, name := path.Split(e.path); dir == "uploads/" && e.isRegular() {
			s.uploads[name] = e.size
		}
		n.meta(e)
		return gr.add(e)
	})
	groups, werr := gr.wait()
	if err = firstOf(werr, err); err != nil {
		return content{}, err
	}
	var large []*blobRec
	for _, g := range groups {
		for d := (decoder{p: g.recs}); len(d.p) > 0 && !d.bad; {
			if d.byte() == recLarge {
				large = append(large, decodeBlob(&d))
			}
		}
	}
	if f := unrefFolder(nil, large); f != nil {
		s.unref = f
	}
	s.remember("", old, &cachedSpace{}, groups)
	return s.finishTar(ctx, groups)
}

// unrefFolder adds to f (nil: none yet) the objects that large unexplained files became.
func unrefFolder(f *folder, large []*blobRec) *folder {
	for _, b := range large {
		if f == nil {
			f = newFolder()
		}
		f.put(b.node(snapshot.SafeName(b.id)), "")
	}
	return f
}

// restHandler handles what belongs to no space.
type restHandler struct{ *store }

func (h *restHandler) ref(e *entry) string {
	if e.size <= inlineLimit {
		return ""
	}
	return inSnapshot(h.base, "unreferenced", unrefStore, snapshot.SafeName(e.path))
}

func (h *restHandler) save(ctx context.Context, e *entry, _ []xattr, rec *encoder) ([]pax.Extent, error) {
	got, err := h.c.saver.path(ctx, h.root, e, false)
	if err != nil {
		return nil, err
	}
	rec.byte(recLarge)
	newBlobRec(e.path, e, &got, false).encode(rec)
	return got.holes, nil
}

func (h *restHandler) see(*entry, string, []byte, []xattr, *encoder) {}

// nameSpaces gives each space its folder. Two spaces that would share one, or of which one would lie
// inside the other, have their ids appended.
func (s *store) nameSpaces() {
	sort.Slice(s.spaces, func(i, j int) bool { return s.spaces[i].id < s.spaces[j].id })
	uses, above := map[string]int{}, map[string]bool{}
	for _, sp := range s.spaces {
		sp.folder = cleanAlias(sp)
		uses[sp.folder]++
		for d := path.Dir(sp.folder); d != "."; d = path.Dir(d) {
			above[d] = true
		}
	}
	inside := func(f string) bool {
		for d := path.Dir(f); d != "."; d = path.Dir(d) {
			if uses[d] > 0 {
				return true
			}
		}
		return false
	}
	var clash []*space
	for _, sp := range s.spaces {
		if f := sp.folder; uses[f] > 1 || above[f] || inside(f) {
			clash = append(clash, sp)
		}
	}
	for _, sp := range clash {
		for {
			sp.folder += "-" + snapshot.SafeName(sp.id)
			if uses[sp.folder] == 0 && !above[sp.folder] {
				break
			}
		}
		uses[sp.folder]++
	}
}

// cleanAlias makes the alias of a space a path that cannot leave its folder. A space whose metadata
// cannot be read stands under its id.
func cleanAlias(sp *space) string {
	if sp.meta == nil || sp.meta.Alias == "" {
		return snapshot.SafeName(sp.id)
	}
	var parts []string
	for _, p := range strings.Split(sp.meta.Alias, "/") {
		if p == "" || p == "." || p == ".." || strings.ContainsRune(p, 0) {
			return snapshot.SafeName(sp.id)
		}
		parts = append(parts, p)
	}
	return strings.Join(parts, "/")
}

// kinds of records in a group.
const (
	recLarge byte = iota + 1 // a large file that no rule explains
	recBlob                  // a blob of a local blob store, or the content of a posix file
	recEntry                 // the directory or file of a node
	recMeta                  // metadata of a node
	recChild                 // a child's symbolic link
	recTrash                 // a trash link
	recFile                  // a file or directory of a posix space
)

// blobRec is what is known of one captured content.
type blobRec struct {
	id       string
	size     int64
	stat     entry // mode, owner and times
	sha1     [20]byte
	hasSHA1  bool
	contents content
	xattrs   []xattr
	object   objectRef // where the content lay, or lies, in a bucket
}

func newBlobRec(blob string, e *entry, got *content, sha1 bool) *blobRec {
	return &blobRec{id: blob, size: got.size, stat: *e, sha1: got.sha1, hasSHA1: sha1, contents: *got}
}

func (b *blobRec) encode(e *encoder) {
	e.str(b.id)
	e.int(b.size)
	encodeStat(e, &b.stat)
	e.bool(b.hasSHA1)
	if b.hasSHA1 {
		e.p = append(e.p, b.sha1[:]...)
	}
	e.count(len(b.contents.holes))
	for _, h := range b.contents.holes {
		e.int(h.Off)
		e.int(h.Len)
	}
	e.ids(b.contents.ids)
	b.object.encode(e)
}

func decodeBlob(d *decoder) *blobRec {
	b := &blobRec{id: d.str(), size: d.int()}
	decodeStat(d, &b.stat)
	if b.hasSHA1 = d.bool(); b.hasSHA1 {
		copy(b.sha1[:], d.take(len(b.sha1)))
	}
	for n := d.count(); n > 0 && !d.bad; n-- {
		b.contents.holes = append(b.contents.holes, pax.Extent{Off: d.int(), Len: d.int()})
	}
	b.contents.ids = d.ids()
	b.contents.size = b.size
	b.object = decodeObject(d)
	return b
}

func encodeStat(e *encoder, st *entry) {
	e.int(int64(st.mode))
	e.int(int64(st.uid))
	e.int(int64(st.gid))
	e.int(st.size)
	e.time(st.mtime)
	e.time(st.ctime)
}

func decodeStat(d *decoder, st *entry) {
	st.mode, st.uid, st.gid = uint32(d.int()), uint32(d.int()), uint32(d.int())
	st.size, st.mtime, st.ctime = d.int(), d.time(), d.time()
}

// node makes a file node of the blob with the owner and times of its file.
func (b *blobRec) node(name string) *snapshot.Node {
	n := &snapshot.Node{Name: name}
	setStat(n, &b.stat)
	setContent(n, b.contents)
	return n
}

// Known is what the trees of a snapshot say of blobs: by store and blob id.
type Known struct {
	stores map[string]map[string]*blobRec
	// identities tell of each store where contents lie that the repository does not have.
	identities map[string]string
}

// LoadKnown walks the users' trees of the snapshot sn. It takes a while for a large one, so it is done
// before anything is frozen. A snapshot that cannot be read, or is not ours, tells nothing.
func LoadKnown(ctx context.Context, r Repository, sn *snapshot.Snapshot, sink progress.Sink) (*Known, error) {
	k := &Known{stores: map[string]map[string]*blobRec{}, identities: map[string]string{}}
	c := &capturer{repo: r, opts: Options{Progress: sink}}
	root := *sn.Tree
	m, err := snapshot.LoadManifest(ctx, r, root)
	if err != nil {
		return k, context.Cause(ctx)
	}
	bad := map[string]bool{}
	for _, x := range m.Proof.Missing {
		bad[x.BlobID] = true
	}
	for i := range m.Stores {
		k.identities[m.Stores[i].Name] = identityOf(m.Stores[i].Bucket)
	}
	storage, err := snapshot.Lookup(ctx, r, root, "/storage")
	if err != nil {
		return k, context.Cause(ctx)
	}
	stores, err := snapshot.LoadTree(ctx, r, storage.Subtree)
	if err != nil {
		return k, context.Cause(ctx)
	}
	for _, st := range stores.Nodes {
		known := map[string]*blobRec{}
		k.stores[st.Name] = known
		if err := c.walkKnown(ctx, st.Subtree, known, bad, 0); err != nil {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			c.warn("the last snapshot cannot be read in part, so more is read from the source: %v", err)
		}
	}
	return k, nil
}

// knownBlobs returns what the last snapshot says of the blobs of this store, for spaces that the cache
// does not know.
func (s *store) knownBlobs() map[string]*blobRec {
	if s.c.opts.Known == nil || s.c.opts.FullScan {
		return nil
	}
	k := s.c.opts.Known
	known := k.stores[s.s.Name]
	if s.obj.keepsContent() || k.identities[s.s.Name] == s.obj.identity() {
		return known
	}
	return nil // other places of contents are of no use
}

// treeDepth bounds how deep trees may lie in each other: a damaged repository can hold a circle.
const treeDepth = 4096

func (c *capturer) walkKnown(ctx context.Context, d id.ID, known map[string]*blobRec, bad map[string]bool, depth int) error {
	if depth > treeDepth {
		return errors.New("folders lie too deep in each other")
	}
	t, err := snapshot.LoadTree(ctx, c.repo, d)
	if err != nil {
		return err
	}
	for _, n := range t.Nodes {
		switch n.Type {
		case snapshot.Dir:
			if err := c.walkKnown(ctx, n.Subtree, known, bad, depth+1); err != nil {
				return err
			}
		case snapshot.Symlink:
			if b := linkedBlob(n); b != nil && !bad[b.id] {
				known[b.id] = b
			}
		case snapshot.File:
			blob, ok := n.Attr(snapshot.AttrBlobID)
			if !ok || blob == "" || bad[blob] || !c.hasAll(n.Content) {
				continue
			}
			b := &blobRec{id: blob, size: int64(n.Size), contents: content{ids: n.Content, size: int64(n.Size)}}
			b.stat.mtime = timespec{n.ModTime.Unix(), int64(n.ModTime.Nanosecond())}
			if h, ok := n.Attr(snapshot.AttrHoles); ok {
				b.contents.holes, _ = pax.ParseHoles(h, b.size) // damaged: it is written without
			}
			if h, ok := n.Attr(snapshot.AttrSHA1); ok {
				b.sha1, b.hasSHA1 = parseSHA1(h)
			}
			b.object.key, _ = n.Attr(snapshot.AttrObject)
			known[blob] = b
		}
	}
	return nil
}

// userMode is the mode of files and folders as users see them: the store's own modes (0600 for a
// node, 0644 for its blob) say nothing about users.
const (
	userFileMode   = fs.FileMode(0o644)
	userFolderMode = fs.ModeDir | 0o755
)

func (n *counts) meta(e *entry) {
	n.metaEntries++
	if e.isRegular() {
		n.metaBytes += e.size
	}
}

func (n *counts) blob(e *entry) {
	n.blobEntries++
	if e.isRegular() {
		n.blobBytes += e.size
	}
}

func (s *store) count(n counts) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts.metaEntries += n.metaEntries
	s.counts.metaBytes += n.metaBytes
	s.counts.blobEntries += n.blobEntries
	s.counts.blobBytes += n.blobBytes
}
