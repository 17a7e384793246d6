package capture

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"sort"
	"strings"
	"sync/atomic"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Folders of a posix space that users do not see.
const (
	posixNodes = ".oc-nodes"
	posixTrash = ".Trash"
	posixTmp   = ".oc-tmp"
)

// posixDepth bounds how deep space roots are looked for below the store's root: the product's path
// templates have two levels, and an administrator may have added some.
const posixDepth = 6

// findPosixSpaces looks for directories whose attributes make them the root of a space.
func (s *store) findPosixSpaces(ctx context.Context) error {
	d := newDetails(s.root)
	defer d.close()
	l := newLister(s.scanner(nil))
	var look func(rel string, depth int) error
	look = func(rel string, depth int) error {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		items, _ := l.read(&entry{path: rel}, oldDir{})
		for i := range items {
			e := &items[i]
			if dir := path.Dir(e.path); e.isSymlink() && (dir == "users" || dir == "projects" || e.path == "users" || e.path == "projects") {
				s.c.unreadable(s.root.abs(e.path), errLinkedDir)
			}
			if !e.isDir() {
				continue
			}
			if rel == "" && (e.path == "indexes" || e.path == "uploads" || e.path == "changes") {
				continue
			}
			x, err := d.xattrs(e.path)
			if err != nil {
				s.c.unreadable(s.root.abs(e.path), err)
				continue
			}
			if m, ok := posixMeta(s.s.Prefix, x); ok && m.Space != nil {
				spaceID := m.Space.ID
				if spaceID == "" {
					spaceID = m.ID
				}
				s.spaces = append(s.spaces, &space{id: spaceID, rel: e.path, meta: m.Space, dtime: m.DTime})
				continue
			}
			if depth < posixDepth {
				if err := look(e.path, depth+1); err != nil {
					return err
				}
			}
		}
		return nil
	}
	if err := look("", 1); err != nil {
		return err
	}
	seen := map[string]int{}
	for _, sp := range s.spaces {
		seen[sp.id]++
	}
	for _, sp := range s.spaces {
		if seen[sp.id] > 1 || sp.id == "" { // a copied folder with its attributes: told apart by its path
			sp.id = strings.TrimPrefix(sp.id+"@"+sp.rel, "@")
		}
	}
	return nil
}

func posixMeta(prefix string, x []xattr) (ocis.NodeMeta, bool) {
	var attrs []ocis.Attribute
	for i := range x {
		if strings.HasPrefix(x[i].name, prefix) {
			attrs = append(attrs, ocis.Attribute{Key: x[i].name, Value: x[i].value})
		}
	}
	if len(attrs) == 0 {
		return ocis.NodeMeta{}, false
	}
	m, err := ocis.NodeFromAttributes(prefix, attrs)
	var ae *ocis.AttributeError
	return m, err == nil || errors.As(err, &ae)
}

// pnode is one file or directory of a posix space.
type pnode struct {
	rel  string // below the space's root
	dir  bool
	blob *blobRec // what a file holds; stat, attributes and content
	node *ocis.NodeMeta
}

// posix captures one space of the posix driver. The files are the blobs.
type posix struct {
	*store
	sp    *space
	old   *cachedSpace
	infos map[string]ocis.TrashInfo // by trash key
	twins map[string]int            // trashed items of one name and time
	paths map[string]string         // node id -> path below the space's root, for versions
	known map[string]*blobRec       // by path below the store's root, from the cache
	byID  map[string]*blobRec       // by blob id, from the parent's trees
	n     counts
}

func (s *store) posixSpace(ctx context.Context, sp *space) (*snapshotPart, error) {
	p := &posix{store: s, sp: sp, old: s.cached(sp.id), infos: map[string]ocis.TrashInfo{}, twins: map[string]int{}, paths: map[string]string{}}
	if part := s.untouched(sp, p.old); part != nil {
		return part, nil
	}
	done, err := s.c.beginReading(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	defer func() { s.count(p.n) }()
	if len(p.old.groups) > 0 {
		p.known = map[string]*blobRec{}
		for _, g := range p.old.groups {
			for dec := (decoder{p: g.recs}); len(dec.p) > 0 && !dec.bad; {
				if n := decodePosix(&dec, s.s.Prefix); n != nil && !n.dir {
					p.known[joinRel(sp.rel, n.rel)] = n.blob
				}
			}
		}
	} else {
		p.byID = s.knownBlobs()
	}
	// First what users see and the records of the trash, then versions and trashed files, whose
	// places in the snapshot follow from them.
	late := func(rel string) bool {
		return rel == joinRel(sp.rel, posixNodes) || rel == joinRel(sp.rel, posixTrash+"/files")
	}
	newGrouper := func() *grouper {
		gr := s.c.newGrouper(ctx, s.root, p.old.groups, func() (handler, error) { return p, nil })
		gr.refsOf = func(entries []entry) ([32]byte, error) { return hashRefs(entries, p.ref), nil }
		return gr
	}
	gr := newGrouper()
	var lossy atomic.Bool
	sc := s.scanner(late)
	sc.unreadable = func(rel string, err error) {
		lossy.Store(true)
		s.c.unreadable(s.root.abs(rel), err)
	}
	lateDirs := []string{joinRel(sp.rel, posixNodes), joinRel(sp.rel, posixTrash+"/files")}
	sort.Slice(lateDirs, func(i, j int) bool { return comparePaths(lateDirs[i], lateDirs[j]) < 0 })
	passed := 0
	err = sc.walk(ctx, sp.rel, func(e *entry) error {
		for passed < len(lateDirs) && comparePaths(e.path, lateDirs[passed]) > 0 {
			gr.cut()
			passed++
		}
		p.countEntry(e)
		return gr.add(e)
	})
	groups, werr := gr.wait()
	if err = firstOf(werr, err); err != nil {
		return nil, err
	}
	for _, g := range groups {
		for dec := (decoder{p: g.recs}); len(dec.p) > 0 && !dec.bad; {
			n := decodePosix(&dec, s.s.Prefix)
			if n != nil && !n.dir && n.node != nil && n.node.ID != "" {
				p.paths[n.node.ID] = n.rel
			}
		}
	}
	if err := p.readInfos(ctx); err != nil {
		return nil, err
	}
	for key := range p.infos {
		stamp, name := p.trashName(key)
		p.twins[stamp+"/"+name]++
	}
	for _, dir := range lateDirs {
		if _, err := s.root.stat(dir); errors.Is(err, fs.ErrNotExist) {
			continue // most spaces have neither
		} else if err != nil {
			lossy.Store(true)
			s.c.unreadable(s.root.abs(dir), err)
			continue
		}
		gr := newGrouper()
		sc := s.scanner(nil)
		sc.unreadable = func(rel string, err error) {
			lossy.Store(true)
			s.c.unreadable(s.root.abs(rel), err)
		}
		err := sc.walk(ctx, dir, func(e *entry) error {
			p.countEntry(e)
			return gr.add(e)
		})
		more, werr := gr.wait()
		if err = firstOf(werr, err); err != nil {
			return nil, err
		}
		groups = append(groups, more...)
	}
	sort.Slice(groups, func(i, j int) bool { return comparePaths(groups[i].first, groups[j].first) < 0 })
	sum := printOf(groups, sp.folder)
	same := sum == p.old.print && sum != [32]byte{} && len(p.old.result) > 0 && len(groups) == len(p.old.groups)
	for _, g := range groups {
		same = same && g.reused
	}
	if same {
		if part, err := decodePart(p.old.result); err == nil && s.c.hasTrees(part.trees) {
			s.remember(sp.id, p.old, &cachedSpace{folder: sp.folder, print: sum, counts: p.n, result: p.old.result}, groups)
			return part, nil
		}
	}
	part, err := p.assemble(ctx, groups)
	if err != nil {
		return nil, err
	}
	part.perfect = part.perfect && !lossy.Load()
	if part.tar, err = s.finishTar(ctx, groups); err != nil {
		return nil, err
	}
	cs := &cachedSpace{folder: sp.folder, print: sum, counts: p.n}
	if part.perfect {
		cs.result = encodePart(part)
	}
	s.remember(sp.id, p.old, cs, groups)
	return part, nil
}

func joinRel(dir, rel string) string {
	if dir == "" {
		return rel
	}
	if rel == "" {
		return dir
	}
	return dir + "/" + rel
}

func (p *posix) inside(full string) string {
	return strings.TrimPrefix(strings.TrimPrefix(full, p.sp.rel), "/")
}

func (p *posix) countEntry(e *entry) {
	if e.isRegular() && p.place(p.inside(e.path)).top != "" {
		p.n.blob(e)
	} else {
		p.n.meta(e)
	}
}

// readInfos reads the .trashinfo records of the space.
func (p *posix) readInfos(ctx context.Context) error {
	dir := joinRel(p.sp.rel, posixTrash+"/info")
	if _, err := p.root.stat(dir); err != nil {
		return nil //nolint:nilerr // no trash
	}
	d := newDetails(p.root)
	defer d.close()
	return p.scanner(nil).walk(ctx, dir, func(e *entry) error {
		key, ok := strings.CutSuffix(e.base(), ".trashinfo")
		if !ok || !e.isRegular() {
			return nil
		}
		data, err := d.readFile(e.path, 1<<20)
		if err != nil {
			return nil //nolint:nilerr // reported when the space was scanned
		}
		if info, err := ocis.ParseTrashInfo(data); err == nil {
			p.infos[key] = info
		}
		return nil
	})
}

// trashName is the time of deletion and the name of a trashed item.
func (p *posix) trashName(key string) (stamp, name string) {
	info, ok := p.infos[key]
	if !ok {
		return "unknown", plainName(key)
	}
	return plainName(info.DeletionDate, "unknown"), plainName(path.Base(info.Path), key)
}

// posixPlace is where a file of a space stands in the snapshot.
type posixPlace struct {
	top   string // spaces, versions, trash, unreferenced; "" for what goes into the tar
	rel   string // below the space's folder
	label string
	kind  byte // 'f' current, 'v' version, 't' trash
}

// place finds the place of the file rel below the space's root.
func (p *posix) place(rel string) posixPlace {
	first, rest, _ := strings.Cut(rel, "/")
	switch first {
	case posixNodes:
		// The id is cut into folders; its last part carries .REV.<time>.
		parts := strings.Split(rest, "/")
		if len(parts) != ocis.NodeDepth+1 {
			return posixPlace{}
		}
		kind, last, stamp := ocis.ClassifyNodeName(parts[len(parts)-1])
		if kind != ocis.NameRevision {
			return posixPlace{}
		}
		nodeID := strings.Join(parts[:len(parts)-1], "") + last
		if of, ok := p.paths[nodeID]; ok {
			return posixPlace{top: "versions", rel: of + "/" + stamp, label: "/" + of + " (version of " + stamp + ")", kind: 'v'}
		}
		name := nodeID + ".REV." + stamp
		return posixPlace{top: "unreferenced", rel: snapshot.SafeName(name), label: name, kind: 'v'}
	case posixTrash:
		sub, ok := strings.CutPrefix(rest, "files/")
		if !ok {
			return posixPlace{}
		}
		item, below, _ := strings.Cut(sub, "/")
		key, ok := strings.CutSuffix(item, ".trashitem")
		if !ok || isLockName(rel) {
			return posixPlace{}
		}
		stamp, name := p.trashName(key)
		if p.twins[stamp+"/"+name] > 1 { // deleted in one second: the key keeps them apart
			name += " (" + key + ")"
		}
		return posixPlace{top: "trash", rel: path.Join(stamp, name, below), label: "/" + path.Join(name, below) + " (trashed)", kind: 't'}
	case posixTmp:
		return posixPlace{}
	}
	if isLockName(rel) {
		return posixPlace{}
	}
	return posixPlace{top: "spaces", rel: rel, label: "/" + rel, kind: 'f'}
}

func isLockName(rel string) bool {
	return strings.HasSuffix(rel, ".mlock") || strings.HasSuffix(rel, ".flock")
}

func (p *posix) ref(e *entry) string {
	pl := p.place(p.inside(e.path))
	switch {
	case pl.top == "unreferenced":
		return inSnapshot(p.base, "unreferenced", snapshot.SafeName(p.sp.id), pl.rel)
	case pl.top != "" && e.size > 0:
		return strings.Join([]string{p.base, pl.top, p.sp.folder, pl.rel}, "/")
	case e.size > inlineLimit:
		return inSnapshot(p.base, "unreferenced", snapshot.SafeName(p.sp.id), snapshot.SafeName(p.inside(e.path)))
	}
	return ""
}

// save captures the content of a file. Files are changed in place and users choose their times, so
// size and mtime prove nothing: ctime does, or the blob id, which changes with every upload.
func (p *posix) save(ctx context.Context, e *entry, x []xattr, rec *encoder) ([]pax.Extent, error) {
	m, _ := posixMeta(p.s.Prefix, x)
	var got content
	hasSHA1 := true
	old := p.known[e.path]
	from := old != nil && old.stat.ctime == e.ctime && old.stat.mtime == e.mtime && old.size == e.size
	if !from && old == nil && m.BlobID != "" && m.HasSHA1 {
		old = p.byID[m.BlobID]
		from = old != nil && old.hasSHA1 && old.sha1 == m.SHA1 && old.size == e.size && old.stat.mtime == e.mtime
	}
	if from && !p.c.opts.FullScan && p.c.hasAll(old.contents.ids) {
		got, hasSHA1 = old.contents, old.hasSHA1
		got.sha1 = old.sha1
	} else {
		var err error
		if got, err = p.c.saver.path(ctx, p.root, e, true); err != nil {
			return nil, err
		}
	}
	p.encode(rec, e, x, newBlobRec("", e, &got, hasSHA1))
	return got.holes, nil
}

// see notes directories and empty files.
func (p *posix) see(e *entry, _ string, _ []byte, x []xattr, rec *encoder) {
	switch {
	case e.isDir():
		p.encode(rec, e, x, nil)
	case e.isRegular() && p.place(p.inside(e.path)).top != "":
		p.encode(rec, e, x, newBlobRec("", e, &content{}, false))
	}
}

func (p *posix) encode(rec *encoder, e *entry, x []xattr, b *blobRec) {
	rec.byte(recFile)
	rec.str(p.inside(e.path))
	encodeStat(rec, e)
	rec.count(len(x))
	for i := range x {
		rec.str(x[i].name)
		rec.bytes(x[i].value)
	}
	rec.bool(b != nil)
	if b != nil {
		b.encode(rec)
	}
}

func decodePosix(d *decoder, prefix string) *pnode {
	if d.byte() != recFile {
		d.bad = true
		return nil
	}
	n := &pnode{rel: d.str()}
	var st entry
	decodeStat(d, &st)
	var x []xattr
	for k := d.count(); k > 0 && !d.bad; k-- {
		x = append(x, xattr{d.str(), d.bytes()})
	}
	n.blob = &blobRec{}
	if d.bool() {
		n.blob = decodeBlob(d)
	}
	n.blob.stat, n.blob.xattrs, n.dir = st, x, st.isDir()
	if m, ok := posixMeta(prefix, x); ok {
		n.node = &m
	}
	if d.bad {
		return nil
	}
	return n
}

// assemble writes the trees of the space and compares files with what their attributes say.
func (p *posix) assemble(ctx context.Context, groups []*group) (*snapshotPart, error) {
	part := &snapshotPart{perfect: true}
	trees := &treeRecorder{Target: p.c.target}
	defer func() { part.trees = trees.ids }()
	part.proof.Missing = []snapshot.Missing{}
	tops := map[string]*folder{}
	top := func(name string) *folder {
		if tops[name] == nil {
			tops[name] = newFolder()
		}
		return tops[name]
	}
	trashItems := map[string]bool{}
	for _, g := range groups {
		for dec := (decoder{p: g.recs}); len(dec.p) > 0 && !dec.bad; {
			n := decodePosix(&dec, p.s.Prefix)
			if n == nil {
				return nil, fmt.Errorf("records of %s are damaged", g.first)
			}
			pl := p.place(n.rel)
			if n.dir && pl.top == "unreferenced" {
				continue
			}
			if pl.top == "" {
				if !n.dir && len(n.blob.contents.ids) > 0 { // a large file of the tar
					top("unreferenced").put(n.blob.node(snapshot.SafeName(n.rel)), "")
					part.bytes += n.blob.size
				}
				continue
			}
			if pl.kind == 't' {
				item := strings.Split(n.rel, "/")[2]
				trashItems[item] = true
			}
			if n.dir {
				if pl.top != "spaces" && pl.top != "trash" {
					continue
				}
				f := top(pl.top).sub(pl.rel)
				nd := n.blob.node("")
				nd.Xattrs = append(nd.Xattrs, p.attrs(n)...)
				setXattrs(nd, n.blob.xattrs)
				if n.rel == "" {
					nd.Xattrs = append(nd.Xattrs, snapshot.Xattr{Name: snapshot.AttrSpace, Value: []byte(p.sp.id)})
				}
				f.node = *nd
				part.dirs++
				part.proof.Nodes++
				continue
			}
			dir, name := path.Split(pl.rel)
			nd := n.blob.node(name)
			nd.Xattrs = append(nd.Xattrs, p.attrs(n)...)
			setXattrs(nd, n.blob.xattrs)
			top(pl.top).sub(dir).put(nd, "")
			p.prove(part, n, pl)
		}
	}
	part.proof.TrashItems = int64(len(trashItems))
	for name, dst := range map[string]**snapshot.Node{"spaces": &part.space, "versions": &part.versions, "trash": &part.trash, "unreferenced": &part.unref} {
		if f := tops[name]; f != nil {
			n, err := f.save(ctx, trees, "")
			if err != nil {
				return nil, err
			}
			*dst = n
		}
	}
	part.info.ID, part.info.Folder, part.info.Disabled = p.sp.id, p.sp.folder, p.sp.dtime
	if m := p.sp.meta; m != nil {
		part.info.Name, part.info.Type, part.info.Alias, part.info.Owner = m.Name, m.Type, m.Alias, m.OwnerID
	}
	return part, nil
}

// setXattrs puts the file's own attributes beside ours, sorted by name.
func setXattrs(n *snapshot.Node, x []xattr) {
	for i := range x {
		n.Xattrs = append(n.Xattrs, snapshot.Xattr{Name: x[i].name, Value: x[i].value})
	}
	sort.Slice(n.Xattrs, func(i, j int) bool { return n.Xattrs[i].Name < n.Xattrs[j].Name })
}

func (p *posix) attrs(n *pnode) []snapshot.Xattr {
	var x []snapshot.Xattr
	if n.node == nil {
		return nil
	}
	if n.node.ID != "" {
		x = append(x, snapshot.Xattr{Name: snapshot.AttrID, Value: []byte(n.node.ID)})
	}
	if n.dir {
		return x
	}
	if n.node.BlobID != "" {
		x = append(x, snapshot.Xattr{Name: snapshot.AttrBlobID, Value: []byte(n.node.BlobID)})
	}
	if n.node.HasSHA1 {
		x = append(x, snapshot.Xattr{Name: snapshot.AttrSHA1, Value: []byte(hex.EncodeToString(n.node.SHA1[:]))})
	}
	return x
}

// prove compares a file with its attributes. A file whose time differs from the recorded one was
// changed behind the server's back, which this driver allows: the server will take it in at its next
// scan, and its old checksum proves nothing.
func (p *posix) prove(part *snapshotPart, n *pnode, pl posixPlace) {
	q := &part.proof
	part.files++
	part.bytes += n.blob.size
	switch pl.kind {
	case 'v':
		q.Revisions++
	default:
		q.Nodes++
	}
	if pl.top == "spaces" {
		part.info.Files++
		part.info.Bytes += n.blob.size
	}
	m := n.node
	if m == nil || m.BlobID == "" {
		return
	}
	q.Blobs++
	q.Bytes += n.blob.size
	if strings.HasPrefix(m.NodeStatus, "processing:") {
		part.perfect = false
		if size, ok := p.uploads[m.BlobID]; ok && size == m.BlobSize {
			q.InFlight++
			return
		}
		// Not in uploads/: then the file must hold it already.
	}
	if !m.MTime.IsZero() && !m.MTime.Equal(n.blob.stat.mtime.time()) {
		return
	}
	problem, detail := "", ""
	switch {
	case n.blob.size != m.BlobSize:
		problem, detail = "size", fmt.Sprintf("has %d bytes, metadata says %d", n.blob.size, m.BlobSize)
	case !m.HasSHA1 || !n.blob.hasSHA1:
	case n.blob.sha1 == m.SHA1:
		q.Verified++
	default:
		problem, detail = "checksum", "SHA-1 is "+hex.EncodeToString(n.blob.sha1[:])+", metadata says "+hex.EncodeToString(m.SHA1[:])
	}
	if problem != "" {
		part.perfect = false
		space := p.sp.id
		if p.sp.meta != nil && p.sp.meta.Alias != "" {
			space = p.sp.meta.Alias
		}
		q.Missing = append(q.Missing, snapshot.Missing{Space: space, Path: pl.label, BlobID: m.BlobID, Problem: problem, Detail: detail})
	}
}
