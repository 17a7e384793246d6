package consistency

import (
	"context"
	"errors"
	"io/fs"
	"path"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// Folders of a posix space that users do not see.
const (
	posixNodes = ".oc-nodes"
	posixTrash = ".Trash"
	posixTmp   = ".oc-tmp"
)

// posixCheck is what a look at a space of the posix driver needs beside the table.
type posixCheck struct {
	*spaceCheck
	ctx     context.Context
	folders []posixFolder       // those on the way to the entry at hand
	infos   map[string]string   // where the items of the trash were, by key
	items   map[string]int32    // items of the trash, by key
	spilled map[string][]string // grants in .oc-nodes/<id>.mpk, by node id
	needs   []int32             // nodes that say that they have such a file
	files   int64
	err     error
}

type posixFolder struct {
	rel  string
	node int32
}

// posix looks at one space of the posix driver. There the files are the blobs, their attributes the
// metadata, and the folders the links.
func (s *spaceCheck) posix(ctx context.Context) error {
	s.trashed = map[key]int32{}
	if s.sp.ID == "" {
		s.c.nameless = true
		s.at(SpaceRootMissing, s.sp.Root, "the folder looks like a space, and has no attributes that say so")
		return nil
	}
	if s.st.infos[s.sp.ID] != nil {
		s.at(IDDuplicate, s.sp.Root, "another folder, %s, is the same space by its attributes", s.st.infos[s.sp.ID].root)
	}
	s.rootNode = s.t.node(s.sp.ID)
	p := &posixCheck{spaceCheck: s, ctx: ctx, infos: map[string]string{}, items: map[string]int32{}, spilled: map[string][]string{}}
	err := s.st.Place.Walk(ctx, s.sp, "", func(e *Entry) error {
		p.entry(e)
		return p.err
	}, func(at string, err error) {
		if !isGone(err) {
			s.at(Unreadable, at, "%v", err)
		}
	})
	if err != nil {
		return err
	}
	p.finish()
	s.sharesOf()
	return nil
}

func (p *posixCheck) entry(e *Entry) {
	rel := strings.TrimPrefix(strings.TrimPrefix(e.Path, p.sp.Root), "/")
	if strings.HasSuffix(rel, ".mlock") || strings.HasSuffix(rel, ".flock") {
		return
	}
	first, rest, _ := strings.Cut(rel, "/")
	switch first {
	case posixTmp:
	case posixNodes:
		p.hidden(e, rest)
	case posixTrash:
		switch sub, below, _ := strings.Cut(rest, "/"); {
		case sub == "info" && e.Type == 'f':
			key, ok := strings.CutSuffix(below, ".trashinfo")
			data, err := e.data()
			if isGone(err) || !ok {
				return
			}
			info, err := ocis.ParseTrashInfo(data)
			if err != nil {
				p.at(TrashLeftover, e.Path, "the record of a trashed item cannot be read: %v", err)
				return
			}
			p.infos[key] = info.Path
		case sub == "files" && below != "":
			p.node(e, rel)
		}
	default:
		p.node(e, rel)
	}
}

// hidden takes what lies in .oc-nodes: versions, and metadata that the attributes had no room for.
func (p *posixCheck) hidden(e *Entry, rest string) {
	parts := strings.Split(rest, "/")
	if len(parts) != ocis.NodeDepth+1 || e.Type != 'f' {
		return
	}
	kind, last, stamp := ocis.ClassifyNodeName(parts[len(parts)-1])
	id := strings.Join(parts[:len(parts)-1], "") + last
	switch kind {
	case ocis.NameMeta:
		data, err := e.data()
		if isGone(err) {
			return
		}
		m, err := ocis.ParseNode(p.st.Prefix, data)
		var ae *ocis.AttributeError
		if err != nil && !errors.As(err, &ae) {
			p.at(MetadataMalformed, e.Path, "%v", err)
		}
		list := []string{}
		for _, g := range m.Grants {
			list = append(list, principal(g))
		}
		p.spilled[id] = list
	case ocis.NameRevision:
		i := p.t.node(id + ".REV." + stamp)
		n := p.t.nodes.at(i)
		n.flags |= fRevision | fPresent
		p.res.revisions++
		if m, ok := p.attributes(e, i); ok {
			p.content(e, i, &m)
		}
	}
}

// attributes reads the metadata of an entry, and tells what is wrong with it.
func (p *posixCheck) attributes(e *Entry, i int32) (ocis.NodeMeta, bool) {
	n := p.t.nodes.at(i)
	attrs, err := e.attrs()
	if isGone(err) {
		return ocis.NodeMeta{}, false
	}
	if err != nil {
		n.flags |= fTold
		p.at(Unreadable, e.Path, "%v", err)
		return ocis.NodeMeta{}, false
	}
	m, err := ocis.NodeFromAttributes(p.st.Prefix, attrs)
	if err != nil {
		n.flags |= fTold
		p.at(MetadataMalformed, e.Path, "%v", err)
	}
	if len(attrs) == 0 {
		n.flags |= fTold
		p.at(MetadataMissing, e.Path, "it has no attributes: the server takes it for new, without its id, shares and versions")
		return m, false
	}
	return m, true
}

// node takes a file or folder that users see, or that is in the trash.
func (p *posixCheck) node(e *Entry, rel string) {
	if e.Type != 'f' && e.Type != 'd' {
		p.at(UnknownEntry, e.Path, "it is neither a file nor a folder")
		return
	}
	dir := path.Dir(rel)
	if dir == "." {
		dir = ""
	}
	item, inTrash := strings.CutPrefix(rel, posixTrash+"/files/")
	top := rel == "" || inTrash && !strings.Contains(item, "/")
	key, isItem := strings.CutSuffix(item, ".trashitem")
	if inTrash && top && !isItem {
		p.at(UnknownEntry, e.Path, "it is no item of the trash")
		return
	}
	folder := int32(-1)
	for len(p.folders) > 0 && !top {
		if f := p.folders[len(p.folders)-1]; f.rel == dir {
			folder = f.node
			break
		}
		p.folders = p.folders[:len(p.folders)-1]
	}
	if folder < 0 && !top {
		return // its folder is none of ours
	}
	i := p.rootNode
	var m ocis.NodeMeta
	ok := true
	if attrs, err := e.attrs(); err == nil {
		m, _ = ocis.NodeFromAttributes(p.st.Prefix, attrs)
	}
	if rel != "" {
		switch have := p.t.find(keyFor(m.ID)); {
		case m.ID == "":
			p.nameless = true
			i = p.t.node("./" + rel) // no id has a slash
		case have >= 0 && p.t.nodes.at(have).flags&fPresent != 0:
			f := p.at(IDDuplicate, e.Path, "%s has the same id, and the server gives one of them another", p.path(have))
			f.Node = m.ID
			i = p.t.node("./" + rel)
			p.t.nodes.at(i).flags |= fTold
		default:
			i = p.t.node(m.ID)
		}
	}
	n := p.t.nodes.at(i)
	n.flags |= fPresent
	if rel != "" && !top {
		n.flags |= fLinked
		n.link, n.name = folder, p.t.names.add(path.Base(rel))
		f := p.t.nodes.at(folder)
		n.next, f.kid = f.kid, i
	}
	if inTrash && top {
		n.flags |= fTrashed
		p.trashed[n.base] = i
		p.items[key] = i
		p.res.trash++
	}
	if e.Type == 'd' {
		n.flags |= fDir
		p.folders = append(p.folders, posixFolder{rel, i})
	}
	p.res.nodes++
	if m, ok = p.attributes(e, i); !ok {
		p.doubt(i)
		return
	}
	name := n.name
	blob := m.BlobID
	m.BlobID = "" // the file itself is the blob
	size := m.BlobSize
	m.BlobSize = 0
	p.setMeta(i, &m)
	n.name = name
	m.BlobID, m.BlobSize = blob, size
	if i == p.rootNode {
		p.takeRoot(&m)
	}
	if m.Offloaded {
		p.needs = append(p.needs, i)
	}
	switch {
	case m.ID == "" && rel != "":
		n.flags |= fTold
		p.at(MetadataMissing, e.Path, "it has no id: the server takes it for new, without its shares and versions")
	case n.flags&fFile != 0 && e.Type == 'd':
		p.at(TypeMismatch, e.Path, "metadata says file, and it is a folder").Node = m.ID
	case n.flags&fFolder != 0 && e.Type == 'f':
		p.at(TypeMismatch, e.Path, "metadata says folder, and it is a file").Node = m.ID
	}
	if folder >= 0 && n.flags&fTold == 0 {
		f := p.t.nodes.at(folder)
		if f.flags&fTold == 0 && n.parent != f.base {
			says := "no parent"
			if m.ParentID != "" {
				says = "the parent " + m.ParentID
			}
			p.add(ParentMismatch, i, "metadata names %s, and it lies in %s", says, p.t.id(folder))
		}
		if hashName(path.Base(rel)) != n.nameHash {
			f := p.add(NameMismatch, i, "metadata has the name %q; the server goes by the name of the file", m.Name)
			f.Severity = Note
		}
	}
	if e.Type == 'f' {
		p.content(e, i, &m)
	}
}

func keyFor(id string) key {
	k, _ := keyOf(id)
	return k
}

// content compares a file with what its attributes say.
func (p *posixCheck) content(e *Entry, i int32, m *ocis.NodeMeta) {
	n := p.t.nodes.at(i)
	size, sec, nsec, err := e.stat()
	if err != nil {
		return // gone in between
	}
	n.blob = p.t.blobs.add(blob{want: m.BlobSize, size: size, node: i, mtime: sec*1e9 + nsec})
	if m.BlobID != "" || m.BlobSize > 0 {
		p.res.blobs++
		p.res.bytes += m.BlobSize
	}
	report := func(class Class, format string, args ...any) {
		var f *Finding
		if n.flags&fRevision != 0 { // the file that it belongs to may come later
			f = p.at(class, e.Path, format, args...)
			f.Node = p.t.id(i)
		} else {
			f = p.add(class, i, format, args...)
		}
		f.Blob, f.Bytes, f.Time = m.BlobID, size, unixTime(sec*1e9+nsec)
	}
	up := p.st.uploads[m.BlobID]
	changed := n.flags&fRevision == 0 && !m.MTime.IsZero() && !m.MTime.Equal(time.Unix(sec, nsec))
	switch {
	case m.BlobID != "" && up != nil && up.size == m.BlobSize && n.flags&fBusy != 0:
		up.used = true
		report(UploadInFlight, "its content of %d bytes is in uploads/: the server has not finished with it", m.BlobSize)
		return
	case changed:
		report(ChangedOutside, "its time is not the one that the server has set: the server will read it as changed")
		p.doubt(n.link)
		return
	case size != m.BlobSize:
		report(BlobSize, "the file has %d bytes, metadata says %d", size, m.BlobSize)
		return
	}
	if up != nil {
		up.used, up.stored = true, true
	}
	if !m.HasSHA1 {
		return
	}
	p.files++
	// The number of files is known only in the end: the first twenty, and then 1 in 50.
	if !p.c.o.ReadData && (size > maxSample || p.files > 20 && (hash64(n.id)^p.c.o.Seed)%50 != 0) {
		return
	}
	sum, read, err := p.sha1(p.ctx, e.open)
	p.res.readBytes += read
	switch {
	case p.ctx.Err() != nil:
		p.err = context.Cause(p.ctx)
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		report(Unreadable, "the file cannot be read: %v", err)
	case sum != m.SHA1:
		report(BlobChecksum, "the SHA-1 of the file is %x, metadata says %x", sum, m.SHA1)
		p.res.checksums++
	default:
		p.res.checksums++
	}
}

// finish looks at what is known only when all entries are there.
func (p *posixCheck) finish() {
	t := &p.t
	root := t.nodes.at(p.rootNode)
	if root.flags&fPresent == 0 {
		p.at(SpaceRootMissing, p.sp.Root, "the folder of the space is gone")
		return
	}
	for _, key := range sortedKeys(p.items) {
		i := p.items[key]
		n := t.nodes.at(i)
		origin, ok := p.infos[key]
		if !ok {
			n.name = t.names.add(key)
			f := p.add(LinkMissing, i, "the trashed item has no record, so that nobody can list or restore it")
			f.Path = p.sp.Root + "/" + posixTrash + "/files/" + key + ".trashitem"
			continue
		}
		n.name = t.names.add("/" + strings.TrimPrefix(origin, "/"))
	}
	for _, key := range sortedKeys(p.infos) {
		if _, ok := p.items[key]; !ok {
			f := p.at(TrashLeftover, p.sp.Root+"/"+posixTrash+"/info/"+key+".trashinfo", "the item that the record speaks of (%q) is not there", p.infos[key])
			f.same = key
		}
	}
	needs := map[string]bool{}
	for _, i := range p.needs {
		id := t.id(i)
		needs[id] = true
		if list, ok := p.spilled[id]; !ok {
			p.add(MetadataMissing, i, "its shares are in %s/%s.mpk, which is not there", posixNodes, ocis.NodePath(id))
		} else {
			if t.grants == nil {
				t.grants = map[int32][]string{}
			}
			t.grants[i] = append(t.grants[i], list...)
			if i == p.rootNode {
				p.info.members = append(p.info.members, list...)
			}
		}
	}
	for _, id := range sortedKeys(p.spilled) {
		if !needs[id] {
			p.at(MetadataLeftover, p.sp.Root+"/"+posixNodes+"/"+ocis.NodePath(id)+".mpk", "no file or folder says that its shares are there")
		}
	}
	for i := range t.nodes.n {
		n := t.nodes.at(i)
		if n.flags&fRevision == 0 {
			continue
		}
		if of := t.find(n.base); of >= 0 && t.nodes.at(of).flags&fPresent != 0 {
			n.link = of
		} else {
			p.add(RevisionLeftover, i, "a version of a file that is gone, as a purge may leave it")
		}
	}
	for i := range t.nodes.n {
		if n := t.nodes.at(i); n.link < 0 && n.flags&fRevision == 0 {
			p.walk(i, p.sizeUp)
		}
	}
}
