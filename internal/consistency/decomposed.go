package consistency

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"io/fs"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// Forms of the targets of links, relative to the folder they stand in.
const (
	childTarget = "../../../../../"
	trashTarget = "../../../../../nodes/"
)

// targetID takes the id out of the target of a link.
func targetID(target, form string) (id string, ok bool) {
	rel, ok := strings.CutPrefix(target, form)
	if !ok {
		return "", false
	}
	id = strings.ReplaceAll(rel, "/", "")
	return id, ocis.NodePath(id) == rel
}

// decomposed looks at one space of a decomposedfs store.
func (s *spaceCheck) decomposed(ctx context.Context) error {
	s.trashed = map[key]int32{}
	s.rootNode = s.t.node(s.sp.ID)
	s.readJournal()
	inAttrs := false // before oCIS 3
	if d, ok := s.st.Place.(*Dir); ok {
		if f, err := d.openFile(s.sp.Root + "/nodes/" + ocis.NodePath(s.sp.ID) + ".mpk"); errors.Is(err, fs.ErrNotExist) {
			inAttrs = true
		} else if err == nil {
			_ = f.Close()
		}
	} else {
		inAttrs = true // archives have them at hand
	}
	err := s.st.Place.Walk(ctx, s.sp, "", func(e *Entry) error {
		s.decomposedEntry(e, inAttrs)
		return nil
	}, func(p string, err error) {
		if !isGone(err) {
			s.at(Unreadable, p, "%v", err)
		}
	})
	if err != nil {
		return err
	}
	if s.st.Remote && s.st.Blobs != nil {
		err := s.st.Blobs.List(ctx, s.sp.ID, func(i BlobInfo) error {
			b := s.t.blobs.at(s.t.blobAt(i.ID))
			b.size = i.Size
			if !i.Modified.IsZero() {
				b.mtime = i.Modified.UnixNano()
			}
			b.odd = b.sum && i.MD5 != "" && i.MD5 != hex.EncodeToString(b.md5[:])
			return nil
		})
		if err != nil {
			return err
		}
	}
	if s.empty() {
		return nil
	}
	s.judge()
	if err := s.blobsCheck(ctx); err != nil {
		return err
	}
	s.sharesOf()
	return s.readShares(ctx)
}

// restoreDir is where a restore in place notes the nodes that it is about to write.
const restoreDir = ".holdfast-restore"

// readJournal reads that list: such nodes may be half there, and the restore finishes when it is run again.
func (s *spaceCheck) readJournal() {
	d, ok := s.st.Place.(*Dir)
	if !ok {
		return
	}
	f, err := d.openFile(restoreDir + "/" + s.sp.ID + ".nodes")
	if err != nil {
		return // most stores have none
	}
	defer f.Close()
	s.restoring = map[string]bool{}
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		_, key, _ := strings.Cut(sc.Text(), " ")
		base, _, _ := cutID(key)
		s.restoring[base] = true
	}
}

// forgive takes out what comes of an interrupted restore, and says so instead.
func (s *spaceCheck) forgive() {
	if s.restoring == nil {
		return
	}
	var kept []Finding
	var about []int32
	for k, f := range s.res.findings {
		base, _, _ := cutID(f.Node)
		if f.Severity == Damage && (s.restoring[base] || f.Class == TreeSize) {
			continue
		}
		kept, about = append(kept, f), append(about, s.about[k])
	}
	s.res.findings, s.about = kept, about
	s.at(RestoreUnfinished, restoreDir+"/"+s.sp.ID+".nodes", "a restore in place was interrupted: run it again, it finishes")
}

// empty tells whether the folder of the space holds nothing, as a purge may leave it.
func (s *spaceCheck) empty() bool {
	if s.t.nodes.n > 1 || s.t.blobs.n > 0 || len(s.odd) > 0 || s.t.nodes.at(s.rootNode).flags != 0 {
		return false
	}
	s.at(UnknownEntry, s.sp.Root, "the folder of a space without any node, as a purge may leave it")
	return true
}

func (s *spaceCheck) decomposedEntry(e *Entry, inAttrs bool) {
	rel := strings.TrimPrefix(strings.TrimPrefix(e.Path, s.sp.Root), "/")
	parts := strings.Split(rel, "/")
	switch {
	case parts[0] == "nodes" && len(parts) == 6:
		s.nodeEntry(e, strings.Join(parts[1:5], ""), parts[5], inAttrs)
	case parts[0] == "nodes" && len(parts) == 7:
		if e.Type != 'l' {
			s.at(UnknownEntry, e.Path, "no link, in a folder that holds links")
			return
		}
		folder := s.t.node(strings.Join(parts[1:6], ""))
		if id, ok := targetID(e.Link, childTarget); ok {
			s.link(folder, parts[6], id)
		} else {
			s.odd = append(s.odd, oddLink{folder, parts[6], e.Link})
		}
	case parts[0] == "trash" && len(parts) == 6 && e.Type == 'l':
		s.res.trash++
		id := strings.Join(parts[1:], "")
		target, ok := targetID(e.Link, trashTarget)
		if base, _, cut := cutID(target); !ok || !cut || base != id {
			s.odd = append(s.odd, oddLink{-1, id, e.Link})
			return
		}
		s.trashedNode(target).flags |= fTrashLink
	case parts[0] == "blobs" && len(parts) == 6 && e.Type == 'f':
		id := strings.Join(parts[1:], "")
		size, sec, nsec, err := e.stat()
		if err != nil {
			if !isGone(err) {
				s.at(Unreadable, e.Path, "%v", err)
			}
			return
		}
		if _, uuid := keyOf(id); !uuid && strings.HasPrefix(parts[5], "reva-blobstore-upload-") {
			f := s.at(TemporaryFile, e.Path, "left by a crash in the middle of storing a blob")
			f.Bytes, f.Time = size, unixTime(sec*1e9+nsec)
			return
		}
		if e.Hard != "" { // an archive has the size with the first name
			first := strings.TrimPrefix(e.Hard, s.sp.Root+"/blobs/")
			size = s.t.blobs.at(s.t.blobAt(strings.ReplaceAll(first, "/", ""))).size
		}
		b := s.t.blobs.at(s.t.blobAt(id))
		b.size, b.mtime = size, sec*1e9+nsec
	case e.Type == 'd' && len(parts) <= 5:
	default:
		s.at(UnknownEntry, e.Path, "no rule explains it")
	}
}

// trashedNode returns the node with .T.<time> in its name.
func (s *spaceCheck) trashedNode(id string) *node {
	i := s.t.node(id)
	n := s.t.nodes.at(i)
	n.flags |= fTrashed
	s.trashed[n.base] = i
	return n
}

// nodeEntry takes an entry of nodes/aa/bb/cc/dd/.
func (s *spaceCheck) nodeEntry(e *Entry, shard, name string, inAttrs bool) {
	if strings.HasPrefix(name, ".holdfast-") {
		s.at(TemporaryFile, e.Path, "left by a restore in place that was interrupted")
		return
	}
	kind, rest, stamp := ocis.ClassifyNodeName(name)
	id := shard + rest
	switch kind.Base() {
	case ocis.NameRevision:
		id += ".REV." + stamp
	case ocis.NameTrashed:
		id += ".T." + stamp
	case ocis.NameTemp:
		s.at(TemporaryFile, e.Path, "left by a crash in the middle of writing metadata")
		return
	case ocis.NameUnknown:
		s.at(UnknownEntry, e.Path, "the name is none of a node")
		return
	}
	if kind.IsLock() {
		return
	}
	if e.Type != 'f' && e.Type != 'd' || kind.IsMeta() && e.Type != 'f' {
		s.at(UnknownEntry, e.Path, "it is neither a file nor a folder")
		return
	}
	var i int32
	if kind.Base() == ocis.NameTrashed {
		s.trashedNode(id)
	}
	i = s.t.node(id)
	n := s.t.nodes.at(i)
	if kind.Base() == ocis.NameRevision {
		n.flags |= fRevision
	}
	if !kind.IsMeta() {
		n.flags |= fPresent
		if e.Type == 'd' {
			n.flags |= fDir
		}
		if inAttrs && n.flags&(fMeta|fBad) == 0 {
			if attrs, err := e.attrs(); err == nil && len(attrs) > 0 {
				m, err := ocis.NodeFromAttributes(s.st.Prefix, attrs)
				s.takeMeta(i, &m, err)
			}
		}
		return
	}
	p, err := e.data()
	if err != nil {
		if !isGone(err) {
			n.flags |= fBad | fTold
			s.add(MetadataMissing, i, "its metadata cannot be read: %v", err)
		}
		return
	}
	m, err := ocis.ParseNode(s.st.Prefix, p)
	s.takeMeta(i, &m, err)
}

// takeMeta notes the metadata of node i, or why it cannot be read.
func (s *spaceCheck) takeMeta(i int32, m *ocis.NodeMeta, err error) {
	n := s.t.nodes.at(i)
	var ae *ocis.AttributeError
	if err != nil && !errors.As(err, &ae) {
		n.flags = n.flags&^fMeta | fBad | fTold
		s.lost = append(s.lost, len(s.res.findings))
		s.add(MetadataMalformed, i, "%v", err)
		return
	}
	s.setMeta(i, m)
	if i == s.rootNode {
		s.takeRoot(m)
	}
	if err != nil {
		n.flags |= fTold
		s.add(MetadataMalformed, i, "%v", err)
		if ae.Name == "blobsize" || ae.Name == "treesize" {
			n.flags |= fUnknown
		}
	}
}

// judge looks at the nodes once all are there.
func (s *spaceCheck) judge() {
	t := &s.t
	root := t.nodes.at(s.rootNode)
	if root.flags&fPresent == 0 {
		root.flags |= fTold
		s.add(SpaceRootMissing, s.rootNode, "the root node of the space is not there")
	} else {
		s.res.nodes++
		if root.flags&(fMeta|fBad) == 0 {
			root.flags |= fTold
			s.lost = append(s.lost, len(s.res.findings))
			s.add(MetadataMissing, s.rootNode, "the root node of the space has no metadata")
		}
	}
	for i := range t.nodes.n {
		if n := t.nodes.at(i); n.flags&fRevision != 0 {
			s.judgeRevision(i, n)
		} else if i != s.rootNode {
			s.judgeNode(i, n)
		}
	}
	for k := range s.dups {
		s.rightLink(&s.dups[k])
	}
	s.circles()
	for i := range t.nodes.n { // after all that explain others
		if n := t.nodes.at(i); i != s.rootNode && n.flags&fRevision == 0 {
			s.judgeLink(i, n)
		}
	}
	for _, o := range s.odd {
		f := s.add(NodeMissing, o.folder, "the link %q leads to %q, which is no place of a node", o.name, o.target)
		if o.folder >= 0 {
			f.Path = strings.TrimSuffix(s.path(o.folder), "/") + "/" + o.name
			s.doubt(o.folder)
		} else {
			f.Node, f.Path = o.name, s.sp.Root+"/trash/"+ocis.NodePath(o.name)
		}
	}
	for _, d := range s.dups {
		f := s.add(LinkDuplicate, d.node, "%s leads to the same node", s.join(strings.TrimSuffix(s.path(d.folder), "/"), []string{d.name}, ""))
		f.same = d.name
		s.doubt(d.folder)
		s.doubt(t.nodes.at(d.node).link)
	}
	// Sizes last, when it is known which are in doubt.
	for i := range t.nodes.n {
		t.nodes.at(i).flags &^= fSeen
	}
	tops := []int32{s.rootNode}
	for i := range t.nodes.n {
		if n := t.nodes.at(i); i != s.rootNode && n.link < 0 && n.flags&(fRevision|fDir) == fDir {
			tops = append(tops, i)
		}
	}
	for _, top := range tops {
		s.walk(top, s.sizeUp)
	}
}

// rightLink makes that of two links count which metadata agrees with.
func (s *spaceCheck) rightLink(d *dupLink) {
	t := &s.t
	n := t.nodes.at(d.node)
	if n.flags&fMeta == 0 || t.nodes.at(d.folder).base != n.parent || hashName(d.name) != n.nameHash {
		return
	}
	old := t.nodes.at(n.link)
	for at := &old.kid; *at >= 0; at = &t.nodes.at(*at).next {
		if *at == d.node {
			*at = n.next
			break
		}
	}
	folder, name := n.link, t.names.get(n.name)
	p := t.nodes.at(d.folder)
	n.link, n.name, n.next, p.kid = d.folder, t.names.add(d.name), p.kid, d.node
	d.folder, d.name = folder, name
}

func (s *spaceCheck) judgeRevision(i int32, n *node) {
	of := s.t.find(n.base)
	if of < 0 || s.t.nodes.at(of).flags&fPresent == 0 {
		if t, ok := s.trashed[n.base]; ok {
			of = t
		}
	}
	n.link = of
	n.next = -1
	switch {
	case n.flags&fPresent == 0 && n.flags&(fMeta|fBad) != 0:
		n.blob = -1
		s.add(MetadataLeftover, i, "the version is gone, and its metadata is left, as a purge leaves it")
	case n.flags&fPresent == 0:
	default:
		s.res.revisions++
		if n.flags&(fMeta|fBad) == 0 {
			n.flags |= fTold
			s.lost = append(s.lost, len(s.res.findings))
			s.add(MetadataMissing, i, "a version without metadata")
		}
		if of < 0 || s.t.nodes.at(of).flags&(fPresent|fLinked|fTrashLink) == 0 {
			n.link = -1
			s.add(RevisionLeftover, i, "a version of a file that is gone, as a purge may leave it")
		}
	}
}

// judgeNode looks at a node and its metadata.
func (s *spaceCheck) judgeNode(i int32, n *node) {
	if n.flags&fPresent == 0 {
		switch {
		case n.flags&(fLinked|fTrashLink) != 0:
			n.flags |= fTold
			left := ""
			if n.flags&fMeta != 0 {
				left = "; its metadata is left"
			}
			if n.flags&fFolder == 0 {
				s.lost = append(s.lost, len(s.res.findings))
			}
			if n.flags&fLinked != 0 {
				s.add(NodeMissing, i, "a link leads to this node, which is not there%s", left)
				s.doubt(n.link)
			} else {
				s.add(NodeMissing, i, "an entry of the trash leads to this node, which is not there%s", left)
			}
		case n.flags&(fMeta|fBad) != 0:
			s.add(MetadataLeftover, i, "the node is gone, and its metadata is left, as a purge may leave it")
			n.blob = -1
		}
		return
	}
	s.res.nodes++
	if n.flags&fMeta == 0 {
		if n.flags&fBad == 0 {
			n.flags |= fTold
			if n.flags&fDir == 0 {
				s.lost = append(s.lost, len(s.res.findings))
			}
			s.add(MetadataMissing, i, "a node without metadata")
		} else if n.flags&fDir != 0 {
			s.notLost(i)
		}
		s.doubt(n.link)
		if n.flags&fDir != 0 {
			s.doubt(i)
		}
		return
	}
	if n.flags&fUnknown != 0 { // an attribute for the size makes no sense
		n.flags &^= fUnknown
		s.doubt(i)
	}
	switch {
	case n.flags&fFile != 0 && n.flags&fDir != 0:
		s.add(TypeMismatch, i, "metadata says file, and it is a folder")
	case n.flags&fFolder != 0 && n.flags&fDir == 0:
		s.add(TypeMismatch, i, "metadata says folder, and it is a file")
	}
}

// notLost takes a folder with malformed metadata out of those whose content is lost: it has none.
func (s *spaceCheck) notLost(i int32) {
	id := s.t.id(i)
	for k, f := range s.lost {
		if s.res.findings[f].Node == id {
			s.lost = append(s.lost[:k], s.lost[k+1:]...)
			return
		}
	}
}

// judgeLink looks at the link that leads to a node.
func (s *spaceCheck) judgeLink(i int32, n *node) {
	if n.flags&fPresent == 0 {
		return
	}
	t := &s.t
	if n.flags&fTrashed != 0 {
		switch {
		case n.flags&fTrashLink == 0:
			s.add(LinkMissing, i, "no entry of the trash leads to this trashed node")
		case n.flags&(fMeta|fOrigin) == fMeta:
			s.add(OriginMissing, i, "the trashed item does not tell where it was")
		}
		return
	}
	if n.flags&fLinked == 0 {
		parent := int32(-1)
		if n.parent != (key{}) {
			parent = t.find(n.parent)
		}
		if parent >= 0 && t.nodes.at(parent).flags&(fTold|fPresent) == fTold {
			return // its folder is gone, which is told
		}
		switch {
		case n.flags&fMeta == 0: // told already, and nothing says where it was
		case parent < 0 || t.nodes.at(parent).flags&fPresent == 0 && !s.isTrashed(n.parent):
			s.add(LinkMissing, i, "no folder leads to this node, and the folder that it names (%s) is gone", t.ids.text(n.parent))
		default:
			s.add(LinkMissing, i, "no folder leads to this node; it names the folder %s", s.path(s.live(parent, n.parent)))
			s.doubt(s.live(parent, n.parent))
		}
		return
	}
	if n.flags&fMeta == 0 {
		return
	}
	p := t.nodes.at(n.link)
	if n.parent != p.base {
		if n.flags&fTold == 0 {
			says := "no parent"
			if n.parent != (key{}) {
				says = "the parent " + t.ids.text(n.parent)
			}
			s.add(ParentMismatch, i, "metadata names %s, and the link is in %s", says, t.ids.text(p.base))
		}
		s.doubtParent(n)
	}
	if name := t.names.get(n.name); hashName(name) != n.nameHash {
		s.add(NameMismatch, i, "the link is called %q, and metadata has another name", name)
	}
}

func (s *spaceCheck) isTrashed(base key) bool {
	_, ok := s.trashed[base]
	return ok
}

// live is the node of an id: the one in place, or the trashed one.
func (s *spaceCheck) live(i int32, base key) int32 {
	if s.t.nodes.at(i).flags&fPresent == 0 {
		if t, ok := s.trashed[base]; ok {
			return t
		}
	}
	return i
}

// circles finds folders that lie in each other.
func (s *spaceCheck) circles() {
	t := &s.t
	nothing := func(int32) {}
	for i := range t.nodes.n {
		if n := t.nodes.at(i); n.link < 0 && n.flags&fSeen == 0 {
			s.walk(i, nothing)
		}
	}
	for i := range t.nodes.n {
		if n := t.nodes.at(i); n.flags&(fSeen|fRevision) != 0 {
			continue
		}
		// Nobody without a link is above it, so that the way up ends in a circle: one who goes twice as
		// fast meets the other there.
		up := func(i int32) int32 { return t.nodes.at(i).link }
		first, fast := up(i), up(up(i))
		for first != fast {
			first, fast = up(first), up(up(fast))
		}
		var ring []string
		for at := first; ; {
			n := t.nodes.at(at)
			n.flags |= fTold
			s.doubtParent(n)
			if len(ring) < 50 {
				ring = append(ring, t.names.get(n.name))
			}
			if at = n.link; at == first {
				break
			}
		}
		f := s.add(Cycle, first, "folders lie in each other in a circle, and nothing else leads to them: %s", strings.Join(ring, " in "))
		f.Path = s.sp.Root + "/nodes/" + ocis.NodePath(t.id(first))
		s.walk(first, nothing)
	}
}
