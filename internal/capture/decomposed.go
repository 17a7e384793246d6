package capture

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
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
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// findDecomposedSpaces lists spaces/<2>/<rest> and reads the root node of each.
func (s *store) findDecomposedSpaces(ctx context.Context) error {
	d := newDetails(s.root)
	defer d.close()
	l := newLister(s.scanner(nil))
	top, err := s.root.stat("spaces")
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a store that was never used
		}
		return err
	}
	first, _ := l.read(&top, oldDir{})
	for i := range first {
		if !s.realDir(&first[i].entry) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		second, _ := l.read(&first[i].entry, oldDir{})
		for k := range second {
			e := &second[k]
			if !s.realDir(&e.entry) {
				continue
			}
			sp := &space{id: strings.ReplaceAll(strings.TrimPrefix(e.path, "spaces/"), "/", ""), rel: e.path}
			if ocis.SpacePath(sp.id) != sp.rel || sp.id == unrefStore {
				continue // not the place of any space: it goes with the rest of the store
			}
			if p, err := d.readFile(sp.rel+"/nodes/"+ocis.NodePath(sp.id)+".mpk", metaLimit); err == nil {
				sp.packed = true
				if m, err := parseNode(s.s.Prefix, p); err == nil || m.Space != nil {
					sp.meta, sp.dtime = m.Space, m.DTime
				}
			} else if x, err := d.xattrs(sp.rel + "/nodes/" + ocis.NodePath(sp.id)); err == nil {
				if m, ok := posixMeta(s.s.Prefix, x); ok { // before oCIS 3
					sp.meta, sp.dtime = m.Space, m.DTime
				}
			}
			s.spaces = append(s.spaces, sp)
		}
	}
	return nil
}

// realDir reports whether e is a directory. A link in the place of one is not followed, so that what it
// leads to is not in the snapshot: the proof must say so.
func (s *store) realDir(e *entry) bool {
	if e.isSymlink() {
		s.c.unreadable(s.root.abs(e.path), errLinkedDir)
	}
	return e.isDir()
}

var errLinkedDir = errors.New("a symbolic link stands where the store has a folder, and it is not followed: put the folder in its place, by a bind mount for instance")

// parseNode reads metadata and tolerates single values that make no sense.
func parseNode(prefix string, p []byte) (ocis.NodeMeta, error) {
	m, err := ocis.ParseNode(prefix, p)
	var ae *ocis.AttributeError
	if errors.As(err, &ae) {
		return m, nil
	}
	return m, err
}

// dnode is one node, revision or trashed node of a space. Its key is the node id, with .REV.<time> or
// .T.<time> as on disk.
type dnode struct {
	present bool // its directory or file is there
	dir     bool
	uid     uint32
	gid     uint32
	mtime   timespec
	hasMeta bool
	bad     string // why the metadata cannot be read
	meta    nodeMeta
	kids    []dkid
	seen    bool // it has a place in the users' tree
}

type dkid struct{ name, key string }

// nodeMeta is what capture needs of ocis.NodeMeta.
type nodeMeta struct {
	name     string
	typ      ocis.NodeType
	blob     string
	size     int64
	sha1     [20]byte
	hasSHA1  bool
	md5      [16]byte
	hasMD5   bool
	mtime    time.Time
	tmtime   time.Time
	origin   string
	inFlight bool
}

// demand is a blob that metadata refers to.
type demand struct {
	size    int64
	sha1    [20]byte
	hasSHA1 bool
	md5     [16]byte
	hasMD5  bool
	mtime   timespec // of the content as users see it
	place   string   // path in the snapshot
	label   string   // path for people
	rec     *blobRec
	problem string
	detail  string
	flight  bool
}

// decomposed captures one space of a decomposedfs store.
type decomposed struct {
	*store
	sp    *space
	old   *cachedSpace
	nodes map[string]*dnode
	trash map[string]string // node id -> key of the trashed node
	revs  map[string][]string
	want  map[string]*demand

	nodeGroups []*group
	built      sync.Once
	buildErr   error
	known      map[string]*blobRec
	knownIn    map[string][]string // the ids of the blobs of each group of last time, in order
	large      []*blobRec          // large files that no rule explains
	lossyMu    sync.Mutex
	lossy      bool
	spare      spareCount
	objects    counts // of the bucket
}

// errMoved tells that a space is not what the short look has found: somebody changes it at this moment.
var errMoved = errors.New("the space changes while it is read")

// afterLook is called between a short look and what is done by it, in tests.
var afterLook func()

func (s *store) decomposedSpace(ctx context.Context, sp *space) (*snapshotPart, error) {
	d := &decomposed{store: s, sp: sp, old: s.cached(sp.id)}
	if part := s.untouched(sp, d.old); part != nil {
		return part, nil
	}
	part, err := d.capture(ctx, true)
	if errors.Is(err, errMoved) {
		d = &decomposed{store: s, sp: sp, old: d.old}
		part, err = d.capture(ctx, false)
	}
	return part, err
}

// capture captures the space; what has changed since the last time is found by a short look, if that will do. Errors: errMoved.
func (d *decomposed) capture(ctx context.Context, short bool) (_ *snapshotPart, failed error) {
	s, sp := d.store, d.sp
	var n counts
	defer func() {
		if errors.Is(failed, errMoved) { // they will be counted once more
			s.c.entries.Add(-n.metaEntries - n.blobEntries)
			return
		}
		s.count(n)
	}()
	blobsDir := sp.rel + "/blobs"
	// First all but the blobs: they tell which blobs there must be and where users see them.
	gr := s.c.newGrouper(ctx, s.root, d.old.groups, func() (handler, error) { return &nodeHandler{d: d}, nil })
	gr.refsOf = func(entries []entry) ([32]byte, error) { return hashRefs(entries, (&nodeHandler{d: d}).ref), nil }
	after := false
	quick := !s.c.opts.FullScan && s.localTimes
	cs := &cachedSpace{folder: sp.folder, looked: s.c.now(), seen: s.c.now()}
	// What an instance with a bucket has in blobs/ is left from before, and nothing knows of it.
	sc := s.scanner(func(rel string) bool { return s.obj == nil && rel == blobsDir })
	sc.unreadable, sc.ask = d.unreadable, d.localTimes || d.allNew()
	sc.record = s.c.newListingWriter(d.old.nodesSeen)
	var onlyBlobs differing
	if quick {
		sc.old, sc.trust, sc.list = readListing(d.old.nodesSeen, s.rules), nothingInPlace, d.changes(sp.rel)
		var young bool
		var err error
		if short {
			if sc.only, onlyBlobs, young, err = d.lookShort(ctx); err != nil {
				return nil, err
			}
			if afterLook != nil {
				afterLook()
			}
		}
		if sc.only != nil {
			cs.looked = d.old.looked
			if !young && len(sc.only)+len(onlyBlobs) == 0 {
				cs.seen = d.old.seen // so that what is kept of an unchanged space stays the same
			}
			if len(sc.only) == 0 && onlyBlobs != nil && len(onlyBlobs) == 0 {
				if part := d.asBefore(young); part != nil {
					return part, nil
				}
			}
		}
	}
	done, err := s.c.beginReading(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	if sc.only != nil {
		sc.record.like(sc.old)
		gr.over = d.passageOfNodes(sc.only)
		sc.pass = gr.passer(n.meta)
	}
	nodesSeen := sc.record
	err = sc.walk(ctx, sp.rel, func(e *entry) error {
		if !after && comparePaths(e.path, blobsDir) > 0 {
			gr.cut() // no group reaches over the place where the blobs come
			after = true
		}
		if in := d.inside(e.path); e.isSymlink() && (in == "nodes" || in == "blobs" || in == "trash") {
			d.unreadable(e.path, errLinkedDir)
		}
		n.meta(e)
		return gr.add(e)
	})
	var werr error
	d.nodeGroups, werr = gr.wait()
	if err = firstOf(werr, err); err != nil {
		return nil, err
	}
	if sc.moved.Load() || gr.passing() {
		return nil, errMoved
	}
	sameNodes := !gr.fresh && len(d.nodeGroups) == d.oldNodeGroups() && d.old.folder == sp.folder
	// Then the blobs.
	br := s.c.newGrouper(ctx, s.root, d.old.groups, func() (handler, error) {
		return &blobHandler{d: d}, d.build(ctx)
	})
	if !sameNodes {
		br.refsOf = func(entries []entry) ([32]byte, error) {
			if err := d.build(ctx); err != nil {
				return [32]byte{}, err
			}
			return hashRefs(entries, (&blobHandler{d: d}).ref), nil
		}
	}
	var blobGroups []*group
	blobsSeen := s.c.newListingWriter(d.old.blobsSeen)
	if s.obj != nil {
		if blobGroups, br.fresh, err = d.objectGroups(ctx, sameNodes); err != nil {
			return nil, err
		}
		n.blobEntries, n.blobBytes = d.objects.blobEntries, d.objects.blobBytes
	} else if _, err := s.root.stat(blobsDir); err == nil {
		sc := s.scanner(nil)
		sc.unreadable, sc.ask = d.unreadable, d.localTimes || d.allNew()
		sc.record = blobsSeen
		if quick {
			sc.old, sc.trust, sc.list = readListing(d.old.blobsSeen, s.rules), nothingInPlace, d.changes(blobsDir)
			if sc.only = onlyBlobs; sc.only != nil {
				blobsSeen.like(sc.old)
				if br.over, err = d.passageOfBlobs(ctx, sc.only, sameNodes); err != nil {
					return nil, err
				}
				sc.pass = br.passer(n.blob)
			}
		}
		err := sc.walk(ctx, blobsDir, func(e *entry) error {
			n.blob(e)
			return br.add(e)
		})
		blobGroups, werr = br.wait()
		if err = firstOf(werr, err); err != nil {
			return nil, err
		}
		if sc.moved.Load() || br.passing() {
			return nil, errMoved
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	groups := append(append([]*group{}, d.nodeGroups...), blobGroups...)
	sort.Slice(groups, func(i, j int) bool { return comparePaths(groups[i].first, groups[j].first) < 0 })
	sum := printOf(groups, sp.folder)
	cs.print, cs.counts, cs.spare = sum, n, d.spare
	if !d.lossy && s.localTimes {
		cs.nodesSeen = keep(d.old.nodesSeen, nodesSeen.finish(s.rules))
		cs.blobsSeen = keep(d.old.blobsSeen, blobsSeen.finish(s.rules))
	}
	if sameNodes {
		for _, g := range blobGroups { // their refs are those of last time, since the nodes are
			if g.reused {
				g.refs = d.old.groups[g.first].refs
			}
		}
		if !br.fresh && sum == d.old.print && len(d.old.result) > 0 && len(groups) == len(d.old.groups) {
			if part, err := decodePart(d.old.result); err == nil && s.c.hasTrees(part.trees) {
				if s.obj != nil { // its objects were not looked at one by one
					n.blobEntries, n.blobBytes = part.proof.Blobs, part.proof.Bytes
				}
				cs.result, cs.counts = d.old.result, n
				s.remember(sp.id, d.old, cs, groups)
				part.spare = d.spare
				return part, nil
			}
		}
	}
	if err := d.build(ctx); err != nil {
		return nil, err
	}
	part, err := d.assemble(ctx, blobGroups)
	if err != nil {
		return nil, err
	}
	if part.tar, err = s.finishTar(ctx, groups); err != nil {
		return nil, err
	}
	part.spare = d.spare
	if part.perfect {
		cs.result = encodePart(part)
	}
	s.remember(sp.id, d.old, cs, groups)
	return part, nil
}

// SpaceOf returns the directory of the space that a path belongs to, both relative to the root of a
// decomposedfs store: spaces/<2>/<rest>. It returns what is above a space as it is, and of what is
// elsewhere the first name.
func SpaceOf(rel string) string {
	parts := strings.SplitN(rel, "/", 4)
	switch {
	case parts[0] != "spaces":
		return parts[0]
	case len(parts) == 4:
		return strings.Join(parts[:3], "/")
	default:
		return rel
	}
}

// Touched reports whether the space in the directory rel is among changed, which SpaceOf named.
func Touched(changed map[string]bool, rel string) bool {
	return changed[rel] || changed[path.Dir(rel)] || changed["spaces"] || changed[""]
}

// allNew reports whether no group can be used again.
func (d *decomposed) allNew() bool { return d.c.opts.FullScan || len(d.old.groups) == 0 }

// changes returns the list of changes if it tells of the directory rel: not if another one was there.
func (d *decomposed) changes(rel string) *fschange.List {
	if d.changed == nil || d.changed.Moved(rel) {
		return nil
	}
	return d.changed
}

func (d *decomposed) unreadable(rel string, err error) {
	d.lossyMu.Lock()
	d.lossy = true
	d.lossyMu.Unlock()
	d.c.unreadable(d.root.abs(rel), err)
}

// isBlobGroup reports whether the group that begins with first holds blobs.
func (d *decomposed) isBlobGroup(first string) bool {
	dir := d.sp.rel + "/blobs"
	if d.obj != nil {
		return strings.HasPrefix(first, dir+objectsInfix)
	}
	return first == dir || within(first, dir)
}

// oldGroups returns the groups of last time in order, those of the blobs or all others.
func (d *decomposed) oldGroups(ofBlobs bool) (out []*group) {
	for first, g := range d.old.groups {
		if d.isBlobGroup(first) == ofBlobs {
			out = append(out, g)
		}
	}
	sort.Slice(out, func(i, j int) bool { return comparePaths(out[i].first, out[j].first) < 0 })
	return out
}

// passageOfNodes returns which groups beside those of the blobs can be passed over.
func (d *decomposed) passageOfNodes(differ differing) *passage {
	groups := d.oldGroups(false)
	blobs := d.sp.rel + "/blobs"
	var last *group // before the place of the blobs, where a group ends in any case
	for _, g := range groups {
		if comparePaths(g.first, blobs) < 0 {
			last = g
		}
	}
	return d.c.passage(groups, differ, func(g *group) bool { return g != last })
}

// passageOfBlobs returns which groups of blobs can be passed over: those of which each blob has the place that it had.
func (d *decomposed) passageOfBlobs(ctx context.Context, differ differing, sameNodes bool) (*passage, error) {
	usable := func(*group) bool { return true }
	if !sameNodes {
		if err := d.build(ctx); err != nil {
			return nil, err
		}
		usable = func(g *group) bool {
			h := newRefHash()
			for _, blob := range d.knownIn[g.first] {
				h.add(d.placeOf(blob))
			}
			return h.sum() == g.refs
		}
	}
	return d.c.passage(d.oldGroups(true), differ, usable), nil
}

// oldNodeGroups counts the groups of last time that hold no blobs.
func (d *decomposed) oldNodeGroups() int {
	n := 0
	for first := range d.old.groups {
		if !d.isBlobGroup(first) {
			n++
		}
	}
	return n
}

// printOf covers all groups; it is zero if one of them must not be used again.
func printOf(groups []*group, folder string) (sum [32]byte) {
	h := sha256.New()
	h.Write([]byte(folder))
	for _, g := range groups {
		if g.print == [32]byte{} {
			return [32]byte{}
		}
		h.Write(g.print[:])
	}
	h.Sum(sum[:0])
	return sum
}

// metaLimit bounds a metadata file that is read as one; verify reads as much.
const metaLimit = 16 << 20

// nodeHandler handles the nodes, the trash and whatever else is in a space beside the blobs.
type nodeHandler struct{ d *decomposed }

// inside returns the path of e below the space's directory.
func (d *decomposed) inside(p string) string {
	return strings.TrimPrefix(strings.TrimPrefix(p, d.sp.rel), "/")
}

func (h *nodeHandler) ref(e *entry) string {
	if e.size <= inlineLimit || e.size <= metaLimit && strings.HasSuffix(e.path, ".mpk") {
		return ""
	}
	return inSnapshot(h.d.base, "unreferenced", snapshot.SafeName(h.d.sp.id), snapshot.SafeName("./"+h.d.inside(e.path)))
}

func (h *nodeHandler) save(ctx context.Context, e *entry, _ []xattr, rec *encoder) ([]pax.Extent, error) {
	got, err := h.d.c.saver.path(ctx, h.d.root, e, false)
	if err != nil {
		return nil, err
	}
	rec.byte(recLarge)
	newBlobRec("./"+h.d.inside(e.path), e, &got, false).encode(rec)
	return got.holes, nil
}

func (h *nodeHandler) see(e *entry, link string, data []byte, x []xattr, rec *encoder) {
	parts := strings.Split(h.d.inside(e.path), "/")
	switch {
	case len(parts) < 6:
		return
	case parts[0] == "trash" && e.isSymlink():
		rec.byte(recTrash)
		rec.str(strings.Join(parts[1:], ""))
		rec.str(keyOfTarget(link))
	case parts[0] != "nodes":
		return
	case len(parts) == 7 && e.isSymlink():
		rec.byte(recChild)
		rec.str(strings.Join(parts[1:6], ""))
		rec.str(parts[6])
		rec.str(keyOfTarget(link))
	case len(parts) == 6:
		shard := strings.Join(parts[1:5], "")
		kind, rest, stamp := ocis.ClassifyNodeName(parts[5])
		key := shard + rest
		switch kind.Base() {
		case ocis.NameRevision:
			key += ".REV." + stamp
		case ocis.NameTrashed:
			key += ".T." + stamp
		}
		switch {
		case kind == kind.Base() && kind != ocis.NameTemp && kind != ocis.NameUnknown && (e.isDir() || e.isRegular()):
			rec.byte(recEntry)
			rec.str(key)
			rec.bool(e.isDir())
			rec.int(int64(e.uid))
			rec.int(int64(e.gid))
			rec.time(e.mtime)
			if m, ok := posixMeta(h.d.s.Prefix, x); ok { // the metadata of oCIS 2 lies in attributes
				encodeMeta(rec, key, &m, nil)
			}
		case kind.IsMeta() && e.isRegular():
			m, err := parseNode(h.d.s.Prefix, data)
			encodeMeta(rec, key, &m, err)
		}
	}
}

// keyOfTarget takes the node key out of the target of a child's or trash link.
func keyOfTarget(target string) string {
	parts := strings.Split(target, "/")
	if len(parts) < 5 {
		return ""
	}
	return strings.Join(parts[len(parts)-5:], "")
}

func encodeMeta(rec *encoder, key string, m *ocis.NodeMeta, err error) {
	rec.byte(recMeta)
	rec.str(key)
	if err != nil {
		rec.str(err.Error())
		return
	}
	rec.str("")
	rec.str(m.Name)
	rec.byte(byte(m.Type))
	rec.str(m.BlobID)
	rec.int(m.BlobSize)
	rec.bool(m.HasSHA1)
	if m.HasSHA1 {
		rec.p = append(rec.p, m.SHA1[:]...)
	}
	rec.bool(m.HasMD5)
	if m.HasMD5 {
		rec.p = append(rec.p, m.MD5[:]...)
	}
	encodeTime(rec, m.MTime)
	encodeTime(rec, m.TMTime)
	rec.str(m.TrashOrigin)
	rec.bool(strings.HasPrefix(m.NodeStatus, "processing:"))
}

func encodeTime(rec *encoder, t time.Time) {
	rec.bool(!t.IsZero())
	if !t.IsZero() {
		rec.time(timespec{t.Unix(), int64(t.Nanosecond())})
	}
}

func decodeTime(d *decoder) time.Time {
	if !d.bool() {
		return time.Time{}
	}
	return d.time().time()
}

func (t timespec) time() time.Time { return time.Unix(t.sec, t.nsec).UTC() }

func decodeMeta(d *decoder, n *dnode) {
	if n.bad = d.str(); n.bad != "" {
		return
	}
	n.hasMeta = true
	m := &n.meta
	m.name, m.typ, m.blob, m.size = d.str(), ocis.NodeType(d.byte()), d.str(), d.int()
	if m.hasSHA1 = d.bool(); m.hasSHA1 {
		copy(m.sha1[:], d.take(len(m.sha1)))
	}
	if m.hasMD5 = d.bool(); m.hasMD5 {
		copy(m.md5[:], d.take(len(m.md5)))
	}
	m.mtime, m.tmtime, m.origin, m.inFlight = decodeTime(d), decodeTime(d), d.str(), d.bool()
}

// build makes the table of nodes from the records of the groups, and from it the blobs that there
// must be and their places in the snapshot.
func (d *decomposed) build(ctx context.Context) error {
	d.built.Do(func() {
		d.buildErr = d.doBuild(ctx)
	})
	return d.buildErr
}

func (d *decomposed) doBuild(ctx context.Context) error {
	d.nodes, d.trash, d.revs = map[string]*dnode{}, map[string]string{}, map[string][]string{}
	d.want = map[string]*demand{}
	at := func(key string) *dnode {
		n := d.nodes[key]
		if n == nil {
			n = &dnode{}
			d.nodes[key] = n
			if i := strings.Index(key, ".REV."); i >= 0 {
				d.revs[key[:i]] = append(d.revs[key[:i]], key)
			}
		}
		return n
	}
	for _, g := range d.nodeGroups {
		dec := decoder{p: g.recs}
		for len(dec.p) > 0 && !dec.bad {
			switch dec.byte() {
			case recEntry:
				n := at(dec.str())
				n.present, n.dir = true, dec.bool()
				n.uid, n.gid = uint32(dec.int()), uint32(dec.int())
				n.mtime = dec.time()
			case recMeta:
				decodeMeta(&dec, at(dec.str()))
			case recChild:
				n := at(dec.str())
				n.kids = append(n.kids, dkid{dec.str(), dec.str()})
			case recTrash:
				d.trash[dec.str()] = dec.str()
			case recLarge:
				d.large = append(d.large, decodeBlob(&dec))
			default:
				dec.bad = true
			}
		}
		if dec.bad {
			return fmt.Errorf("records of %s are damaged", g.first) // cannot be: the cache has a checksum
		}
	}
	for _, revs := range d.revs {
		sort.Strings(revs)
	}
	if len(d.old.groups) > 0 {
		d.known, d.knownIn = map[string]*blobRec{}, map[string][]string{}
		for first, g := range d.old.groups {
			if !d.isBlobGroup(first) {
				continue
			}
			for dec := (decoder{p: g.recs}); len(dec.p) > 0 && !dec.bad; {
				dec.byte()
				b := decodeBlob(&dec)
				d.known[b.id] = b
				d.knownIn[first] = append(d.knownIn[first], b.id)
			}
		}
	} else {
		d.known = d.knownBlobs()
	}
	d.place()
	return nil
}

// place walks the space as its users see it and gives every blob its place in the snapshot: the
// current file first, then versions, then the trash. What the walk does not reach is unreferenced.
func (d *decomposed) place() {
	d.walkUsers(&placer{d: d})
	keys := make([]string, 0, len(d.nodes))
	for key := range d.nodes {
		keys = append(keys, key)
	}
	sort.Strings(keys)
	for _, key := range keys {
		if n := d.nodes[key]; !n.seen && d.live(n) {
			d.need(n, "", d.label(key, n))
		}
	}
}

// live reports whether the blob of n must be there: metadata whose node is gone is left over from a
// purge, and its blob may be gone as well.
func (d *decomposed) live(n *dnode) bool { return n.present && n.hasMeta && n.meta.blob != "" }

// label names a node that no folder holds.
func (d *decomposed) label(key string, n *dnode) string {
	if n.meta.origin != "" {
		return n.meta.origin + " (trashed, node " + key + ")"
	}
	if n.meta.name != "" {
		return n.meta.name + " (node " + key + ")"
	}
	return "node " + key
}

// need notes that the blob of n must be there.
func (d *decomposed) need(n *dnode, place, label string) *demand {
	w := d.want[n.meta.blob]
	if w == nil {
		w = &demand{
			size: n.meta.size, sha1: n.meta.sha1, hasSHA1: n.meta.hasSHA1, md5: n.meta.md5, hasMD5: n.meta.hasMD5,
			mtime: n.mtime, place: place, label: label, flight: n.meta.inFlight,
		}
		if t := n.meta.mtime; !t.IsZero() {
			w.mtime = timespec{t.Unix(), int64(t.Nanosecond())}
		}
		if place == "" {
			w.place = inSnapshot(d.base, "unreferenced", snapshot.SafeName(d.sp.id), snapshot.SafeName(n.meta.blob))
		}
		d.want[n.meta.blob] = w
	}
	w.flight = w.flight || n.meta.inFlight
	if n.meta.size != w.size && w.detail == "" {
		w.problem, w.detail = "size", fmt.Sprintf("metadata says %d bytes in one place (%s) and %d in another (%s)", w.size, w.label, n.meta.size, label)
	} else if !w.hasSHA1 && n.meta.hasSHA1 {
		w.sha1, w.hasSHA1 = n.meta.sha1, true
	} else if n.meta.hasSHA1 && n.meta.sha1 != w.sha1 && w.detail == "" {
		w.problem, w.detail = "checksum", "metadata records two checksums, for "+w.label+" and "+label
	}
	return w
}

// visitor is told of the space as its users see it. All paths are relative to the space's folder in
// the part of the snapshot called top.
type visitor interface {
	file(top, rel, name string, n *dnode, key string)
	enter(top, rel, name string, n *dnode, key string)
	leave(top string, n *dnode)
}

// walkUsers visits the current tree, the versions and the trash.
func (d *decomposed) walkUsers(v visitor) {
	for _, n := range d.nodes {
		n.seen = false
	}
	if root := d.nodes[d.sp.id]; root != nil && root.dir {
		d.walkFolder(v, "spaces", "", d.sp.id, root, "versions")
	}
	ids := make([]string, 0, len(d.trash))
	for nodeID := range d.trash {
		ids = append(ids, nodeID)
	}
	sort.Strings(ids)
	taken := map[string]bool{}
	for _, nodeID := range ids {
		key := d.trash[nodeID]
		n := d.nodes[key]
		i := strings.Index(key, ".T.")
		if n == nil || !n.present || i < 0 || n.seen {
			continue
		}
		stamp := key[i+len(".T."):]
		name := plainName(n.meta.name, path.Base(n.meta.origin), nodeID)
		if taken[stamp+"/"+name] {
			name += " (" + nodeID + ")"
		}
		taken[stamp+"/"+name] = true
		d.walkItem(v, "trash", stamp, name, key, nodeID, n, "trash-versions")
	}
}

// plainName returns the first of its arguments that can be the name of one file.
func plainName(names ...string) string {
	for _, n := range names {
		if n != "" && n != "." && n != ".." && len(n) <= 255 && !strings.ContainsAny(n, "/\x00") {
			return n
		}
	}
	return snapshot.SafeName(names[len(names)-1])
}

func (d *decomposed) walkItem(v visitor, top, rel, name, key, nodeID string, n *dnode, versions string) {
	if n.dir {
		v.enter(top, rel, name, n, key)
		d.walkFolder(v, top, path.Join(rel, name), key, n, versions)
		v.leave(top, n)
		return
	}
	n.seen = true
	v.file(top, rel, name, n, key)
	for _, rk := range d.revs[nodeID] {
		r := d.nodes[rk]
		if !r.present || !r.hasMeta || r.seen {
			continue
		}
		r.seen = true
		v.file(versions, path.Join(rel, name), rk[strings.Index(rk, ".REV.")+len(".REV."):], r, rk)
	}
}

// walkFolder visits the children of n in the order of their names. Each folder is visited once, so
// that links in a circle end.
func (d *decomposed) walkFolder(v visitor, top, rel, key string, n *dnode, versions string) {
	n.seen = true
	sort.Slice(n.kids, func(i, j int) bool { return n.kids[i].name < n.kids[j].name })
	for _, k := range n.kids {
		child := d.nodes[k.key]
		if child == nil || !child.present || child.seen && child.dir {
			continue
		}
		if !child.dir && !child.hasMeta {
			continue // without metadata nothing tells which blob it has: the tar keeps what there is
		}
		nodeID := k.key
		if i := strings.Index(nodeID, ".T."); i >= 0 {
			nodeID = nodeID[:i]
		}
		d.walkItem(v, top, rel, k.name, k.key, nodeID, child, versions)
	}
}

// placer notes the places of blobs.
type placer struct{ d *decomposed }

func (p *placer) file(top, rel, name string, n *dnode, _ string) {
	if n.meta.blob != "" && n.meta.typ != ocis.TypeReference {
		d := p.d
		place := strings.Join([]string{d.base, top, d.sp.folder, path.Join(rel, name)}, "/")
		d.need(n, place, labelOf(top, rel, name))
	} else if n.meta.blob != "" {
		p.d.need(n, "", labelOf(top, rel, name)) // a reference has no place of its own
	}
}
func (p *placer) enter(string, string, string, *dnode, string) {}
func (p *placer) leave(string, *dnode)                         {}

func labelOf(top, rel, name string) string {
	switch top {
	case "versions", "trash-versions":
		return "/" + rel + " (version of " + name + ")"
	case "trash":
		return "/" + rel + "/" + name + " (trashed)"
	}
	return "/" + path.Join(rel, name)
}

// blobHandler handles blobs/.
type blobHandler struct{ d *decomposed }

// blobID is the id of the blob in the file e: its path below blobs/ without the slashes.
func (d *decomposed) blobID(e *entry) string {
	rel := strings.TrimPrefix(d.inside(e.path), "blobs/")
	if strings.Count(rel, "/") == ocis.NodeDepth {
		if blob := strings.ReplaceAll(rel, "/", ""); ocis.NodePath(blob) == rel {
			return blob
		}
	}
	return "./blobs/" + rel // something else that lies there; no id of a blob has a slash
}

func (h *blobHandler) ref(e *entry) string { return h.d.placeOf(h.d.blobID(e)) }

// placeOf returns the place of a blob in the snapshot.
func (d *decomposed) placeOf(blob string) string {
	if w := d.want[blob]; w != nil {
		return w.place
	}
	return inSnapshot(d.base, "unreferenced", snapshot.SafeName(d.sp.id), snapshot.SafeName(blob))
}

func (h *blobHandler) save(ctx context.Context, e *entry, _ []xattr, rec *encoder) ([]pax.Extent, error) {
	d := h.d
	blob := d.blobID(e)
	w := d.want[blob]
	old := d.known[blob]
	if old != nil && d.usable(old, e, w) {
		b := *old
		b.stat = *e
		rec.byte(recBlob)
		b.encode(rec)
		return b.contents.holes, nil
	}
	got, err := d.c.saver.path(ctx, d.root, e, true)
	if err != nil {
		return nil, err
	}
	rec.byte(recBlob)
	newBlobRec(blob, e, &got, true).encode(rec)
	return got.holes, nil
}

// usable reports whether what was captured before is still what the file holds. Blobs are written
// once, so the id, the size and the time are enough; one that did not match its checksum is read
// again, because it may have been completed since.
func (d *decomposed) usable(old *blobRec, e *entry, w *demand) bool {
	if d.c.opts.FullScan || old.size != e.size || !d.c.hasAll(old.contents.ids) {
		return false
	}
	if old.stat.ctime != (timespec{}) && old.stat.mtime != e.mtime {
		return false
	}
	return w == nil || !w.hasSHA1 || old.hasSHA1 && old.sha1 == w.sha1
}

func (h *blobHandler) see(*entry, string, []byte, []xattr, *encoder) {}

// assemble checks each blob against what its metadata says, and writes the trees of the space.
func (d *decomposed) assemble(ctx context.Context, blobGroups []*group) (*snapshotPart, error) {
	part := &snapshotPart{perfect: !d.lossy}
	trees := &treeRecorder{Target: d.c.target}
	defer func() { part.trees = trees.ids }()
	part.proof.Missing = []snapshot.Missing{}
	var spare []*blobRec // blobs that nothing refers to
	for _, g := range blobGroups {
		for dec := (decoder{p: g.recs}); len(dec.p) > 0 && !dec.bad; {
			kind := dec.byte()
			b := decodeBlob(&dec)
			if kind != recBlob || dec.bad {
				return nil, fmt.Errorf("records of %s are damaged", g.first)
			}
			if w := d.want[b.id]; w != nil {
				w.rec = b
			}
			if w := d.want[b.id]; w == nil || strings.HasPrefix(w.place, d.base+"/unreferenced/") {
				spare = append(spare, b)
			}
		}
	}
	if err := d.prove(ctx, part); err != nil {
		return nil, err
	}
	t := &treeMaker{d: d, ctx: ctx, part: part, target: trees}
	if err := t.run(); err != nil {
		return nil, err
	}
	unref := unrefFolder(nil, d.large)
	for _, b := range spare {
		if unref == nil {
			unref = newFolder()
		}
		n := b.node(snapshot.SafeName(b.id))
		d.linkNode(n, b)
		n.Xattrs = append(n.Xattrs, snapshot.Xattr{Name: snapshot.AttrBlobID, Value: []byte(b.id)})
		if b.hasSHA1 {
			n.Xattrs = append(n.Xattrs, snapshot.Xattr{Name: snapshot.AttrSHA1, Value: []byte(hex.EncodeToString(b.sha1[:]))})
		}
		unref.put(n, "")
		part.bytes += b.size
	}
	if unref != nil {
		var err error
		if part.unref, err = unref.save(ctx, trees, ""); err != nil {
			return nil, err
		}
	}
	part.info.ID, part.info.Folder, part.info.Disabled = d.sp.id, d.sp.folder, d.sp.dtime
	if m := d.sp.meta; m != nil {
		part.info.Name, part.info.Type, part.info.Alias, part.info.Owner = m.Name, m.Type, m.Alias, m.OwnerID
	}
	return part, nil
}

// prove compares what metadata demands with what was captured.
func (d *decomposed) prove(ctx context.Context, part *snapshotPart) error {
	p := &part.proof
	for key, n := range d.nodes {
		switch {
		case strings.Contains(key, ".REV."):
			if n.present && n.hasMeta {
				p.Revisions++
			}
		case n.present:
			p.Nodes++
		}
		if n.bad != "" {
			part.perfect = false // so that the warning comes each time
			d.c.warn("space %s: metadata of node %s cannot be read: %s; the snapshot keeps it as it is", d.sp.id, key, n.bad)
		}
	}
	p.TrashItems = int64(len(d.trash))
	blobs := make([]string, 0, len(d.want))
	for blob := range d.want {
		blobs = append(blobs, blob)
	}
	sort.Strings(blobs)
	for _, blob := range blobs {
		w := d.want[blob]
		p.Blobs++
		p.Bytes += w.size
		if w.rec == nil {
			if err := d.fromUploads(ctx, blob, w); err != nil {
				return err
			}
			part.perfect = false
			if w.rec != nil {
				p.InFlight++
				continue
			}
			w.problem = "missing"
			if size, ok := d.uploads[blob]; ok {
				w.detail = fmt.Sprintf("uploads/%s has %d bytes, metadata says %d", blob, size, w.size)
			} else if w.flight {
				w.detail = "the server was still processing the upload, and uploads/ does not have it"
			}
		} else if w.rec.size != w.size {
			w.problem, w.detail = "size", fmt.Sprintf("has %d bytes, metadata says %d", w.rec.size, w.size)
		} else if w.hasSHA1 && w.rec.hasSHA1 {
			if w.rec.sha1 == w.sha1 {
				p.Verified++
			} else {
				w.problem, w.detail = "checksum", "SHA-1 is "+hex.EncodeToString(w.rec.sha1[:])+", metadata says "+hex.EncodeToString(w.sha1[:])
			}
		}
		if w.problem != "" {
			part.perfect = false
			p.Missing = append(p.Missing, snapshot.Missing{Space: d.spaceName(), Path: w.label, BlobID: blob, Problem: w.problem, Detail: w.detail})
		}
	}
	return nil
}

// spaceName is how people know the space.
func (d *decomposed) spaceName() string {
	if d.sp.meta != nil && d.sp.meta.Alias != "" {
		return d.sp.meta.Alias
	}
	return d.sp.id
}

// fromUploads looks for a blob that the server has not moved to its place yet: all its bytes are in
// uploads/<blob id> then.
func (d *decomposed) fromUploads(ctx context.Context, blob string, w *demand) error {
	size, ok := d.uploads[blob]
	if !ok || size != w.size {
		return nil
	}
	e, err := d.root.stat("uploads/" + blob)
	if err != nil {
		return nil //nolint:nilerr // reported when the rest of the store was scanned
	}
	got, err := d.c.saver.path(ctx, d.root, &e, true)
	var re *readError
	if errors.As(err, &re) {
		return nil
	}
	if err != nil {
		return err
	}
	if !w.hasSHA1 || got.sha1 == w.sha1 {
		w.rec = newBlobRec(blob, &e, &got, true)
	}
	return nil
}

// treeMaker writes the folders of a space as trees.
type treeMaker struct {
	d      *decomposed
	ctx    context.Context
	part   *snapshotPart
	target Target
	err    error
	stack  map[string][]*levelDir
	tops   map[string]*folder
}

type levelDir struct {
	name  string
	node  *dnode
	key   string
	nodes []*snapshot.Node
}

func (t *treeMaker) run() error {
	t.stack, t.tops = map[string][]*levelDir{}, map[string]*folder{}
	d := t.d
	root := d.nodes[d.sp.id]
	t.stack["spaces"] = []*levelDir{{node: root, key: d.sp.id}}
	d.walkUsers(t)
	if t.err != nil {
		return t.err
	}
	if root != nil && root.dir {
		n, err := t.close("spaces", userTime(root))
		if err != nil {
			return err
		}
		n.Xattrs = append(n.Xattrs, snapshot.Xattr{Name: snapshot.AttrID, Value: []byte(d.sp.id)}, snapshot.Xattr{Name: snapshot.AttrSpace, Value: []byte(d.sp.id)})
		t.part.space = n
	}
	for top, dst := range map[string]**snapshot.Node{"versions": &t.part.versions, "trash": &t.part.trash, "trash-versions": &t.part.trashVers} {
		if f := t.tops[top]; f != nil {
			n, err := f.save(t.ctx, t.target, "")
			if err != nil {
				return err
			}
			*dst = n
		}
	}
	return nil
}

// top returns the folder of a part whose folders are made as they are needed.
func (t *treeMaker) top(name string) *folder {
	if t.tops[name] == nil {
		t.tops[name] = newFolder()
	}
	return t.tops[name]
}

func (t *treeMaker) enter(top, _, name string, n *dnode, key string) {
	t.stack[top] = append(t.stack[top], &levelDir{name: name, node: n, key: key})
}

// close writes the innermost open folder of top and returns its node.
func (t *treeMaker) close(top string, mtime time.Time) (*snapshot.Node, error) {
	st := t.stack[top]
	l := st[len(st)-1]
	t.stack[top] = st[:len(st)-1]
	d, err := saveTree(t.ctx, t.target, l.nodes)
	if err != nil {
		return nil, err
	}
	t.part.dirs++
	return &snapshot.Node{
		Name: l.name, Type: snapshot.Dir, Mode: userFolderMode, ModTime: mtime,
		UID: l.node.uid, GID: l.node.gid, Subtree: d,
	}, nil
}

func (t *treeMaker) leave(top string, n *dnode) {
	if t.err != nil {
		return
	}
	l := t.stack[top][len(t.stack[top])-1]
	node, err := t.close(top, userTime(n))
	if err != nil {
		t.err = err
		return
	}
	node.Xattrs = []snapshot.Xattr{{Name: snapshot.AttrID, Value: []byte(nodeIDOf(l.key))}}
	if st := t.stack[top]; len(st) > 0 {
		p := st[len(st)-1]
		p.nodes = append(p.nodes, node)
		return
	}
	t.top(top).sub(t.trashStamp(l.key)).put(node, "")
}

// trashStamp is the folder of a trashed item: the time of its deletion.
func (t *treeMaker) trashStamp(key string) string {
	_, stamp, _ := strings.Cut(key, ".T.")
	return stamp
}

func nodeIDOf(key string) string {
	if i := strings.Index(key, ".T."); i >= 0 {
		return key[:i]
	}
	if i := strings.Index(key, ".REV."); i >= 0 {
		return key[:i]
	}
	return key
}

// userTime is the time of a folder as users see it.
func userTime(n *dnode) time.Time {
	if !n.meta.mtime.IsZero() {
		return n.meta.mtime
	}
	if !n.meta.tmtime.IsZero() {
		return n.meta.tmtime
	}
	return n.mtime.time()
}

func (t *treeMaker) file(top, rel, name string, n *dnode, key string) {
	if t.err != nil {
		return
	}
	m := &n.meta
	if n.hasMeta && m.typ == ocis.TypeReference {
		return // it points elsewhere and has no content; the tar has it
	}
	mt := m.mtime
	if mt.IsZero() {
		mt = n.mtime.time()
	}
	node := &snapshot.Node{Name: name, Type: snapshot.File, Mode: userFileMode, ModTime: mt, UID: n.uid, GID: n.gid}
	node.Xattrs = append(node.Xattrs, snapshot.Xattr{Name: snapshot.AttrID, Value: []byte(nodeIDOf(key))})
	size := int64(0)
	if m.blob != "" {
		w := t.d.want[m.blob]
		if w == nil || w.rec == nil {
			return // a file without its content would look like an empty one
		}
		setContent(node, w.rec.contents)
		t.d.linkNode(node, w.rec)
		size = w.rec.size
		node.Xattrs = append(node.Xattrs, snapshot.Xattr{Name: snapshot.AttrBlobID, Value: []byte(m.blob)})
		if m.hasSHA1 {
			node.Xattrs = append(node.Xattrs, snapshot.Xattr{Name: snapshot.AttrSHA1, Value: []byte(hex.EncodeToString(m.sha1[:]))})
		}
	}
	t.part.files++
	t.part.bytes += size
	if top == "spaces" {
		t.part.info.Files++
		t.part.info.Bytes += size
	}
	if st := t.stack[top]; len(st) > 0 {
		p := st[len(st)-1]
		p.nodes = append(p.nodes, node)
		return
	}
	t.top(top).sub(rel).put(node, "")
}

// encodePart and decodePart keep the result of a space in the cache.
func encodePart(p *snapshotPart) []byte {
	var e encoder
	e.int(p.tar.size)
	e.ids(p.tar.ids)
	e.ids(p.trees)
	for _, n := range []*snapshot.Node{p.space, p.versions, p.trash, p.trashVers, p.unref} {
		if n == nil {
			e.bytes(nil)
			continue
		}
		e.bytes(snapshot.EncodeTree([]*snapshot.Node{n}))
	}
	i := &p.info
	for _, s := range []string{i.ID, i.Name, i.Type, i.Alias, i.Owner, i.Folder, i.Disabled} {
		e.str(s)
	}
	q := &p.proof
	for _, v := range []int64{i.Files, i.Bytes, q.Nodes, q.Revisions, q.TrashItems, q.Blobs, q.Bytes, q.Verified, p.files, p.dirs, p.bytes} {
		e.int(v)
	}
	return e.p
}

func decodePart(b []byte) (*snapshotPart, error) {
	d := decoder{p: b}
	p := &snapshotPart{perfect: true}
	p.tar.size, p.tar.ids = d.int(), d.ids()
	p.trees = d.ids()
	for _, dst := range []**snapshot.Node{&p.space, &p.versions, &p.trash, &p.trashVers, &p.unref} {
		if b := d.bytes(); len(b) > 0 {
			t, err := snapshot.DecodeTree(b)
			if err != nil {
				return nil, err
			}
			*dst = t.Nodes[0]
		}
	}
	i := &p.info
	for _, s := range []*string{&i.ID, &i.Name, &i.Type, &i.Alias, &i.Owner, &i.Folder, &i.Disabled} {
		*s = d.str()
	}
	q := &p.proof
	for _, v := range []*int64{&i.Files, &i.Bytes, &q.Nodes, &q.Revisions, &q.TrashItems, &q.Blobs, &q.Bytes, &q.Verified, &p.files, &p.dirs, &p.bytes} {
		*v = d.int()
	}
	q.Missing = []snapshot.Missing{}
	if d.bad {
		return nil, errors.New("damaged")
	}
	return p, nil
}

func parseSHA1(s string) (sum [20]byte, ok bool) {
	n, err := hex.Decode(sum[:], []byte(s))
	return sum, err == nil && n == len(sum) && len(s) == 2*len(sum)
}
