package inplace

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/restore/posix"
)

// snapNode is a node of the snapshot's space: about 300 bytes while a part of the space is put back.
type snapNode struct {
	present, dir bool
	parent, name string
	blob         string
	kids         []string // keys
	revs         []string // keys
	mpk          []byte   // only of folders that may have to be put back as parents
}

// Forms of the targets of links.
const (
	childTarget = "../../../../../"
	trashTarget = "../../../../../nodes/"
)

func targetID(target, form string) string {
	rel, ok := strings.CutPrefix(target, form)
	if !ok {
		return ""
	}
	if id := strings.ReplaceAll(rel, "/", ""); ocis.NodePath(id) == rel && safeID(id) {
		return id
	}
	return ""
}

func baseOf(key string) string {
	for _, mark := range []string{".REV.", ".T."} {
		if i := strings.LastIndex(key, mark); i > 0 {
			return key[:i]
		}
	}
	return key
}

func ownerOf(fi fs.FileInfo) (uid, gid, mode uint32, err error) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, 0, 0, errors.New("no owner")
	}
	return st.Uid, st.Gid, st.Mode & 0o7777, nil
}

func (r *run) nodeRel(key string) string { return r.sp + "/nodes/" + ocis.NodePath(key) }
func (r *run) blobRel(b string) string   { return r.sp + "/blobs/" + ocis.NodePath(b) }
func (r *run) trashRel(id string) string { return r.sp + "/trash/" + ocis.NodePath(id) }

// keyOfName is the key of an entry nodes/aa/bb/cc/dd/name, and what the entry is.
func keyOfName(parts []string) (string, ocis.NameKind) {
	kind, rest, stamp := ocis.ClassifyNodeName(parts[5])
	key := strings.Join(parts[1:5], "") + rest
	switch kind.Base() {
	case ocis.NameRevision:
		key += ".REV." + stamp
	case ocis.NameTrashed:
		key += ".T." + stamp
	}
	return key, kind
}

// readSpace reads the nodes of the space from the snapshot.
func (r *run) readSpace() (map[string]*snapNode, map[string]string, error) {
	nodes, trash := map[string]*snapNode{}, map[string]string{}
	at := func(key string) *snapNode {
		n := nodes[key]
		if n == nil {
			n = &snapNode{}
			nodes[key] = n
			if strings.Contains(key, ".REV.") {
				b := nodes[baseOf(key)]
				if b == nil {
					b = &snapNode{}
					nodes[baseOf(key)] = b
				}
				b.revs = append(b.revs, key)
			}
		}
		return n
	}
	err := r.each(r.spaceTar(), func(h *pax.Header, rel string, data io.Reader) error {
		parts := strings.Split(strings.TrimPrefix(rel, r.sp+"/"), "/")
		switch {
		case len(parts) == 6 && parts[0] == "nodes":
			key, kind := keyOfName(parts)
			switch {
			case kind.IsMeta():
				src, _, err := r.content(h, data)
				if err != nil {
					return err
				}
				p, err := io.ReadAll(io.LimitReader(src, metaLimit))
				if err != nil {
					return err
				}
				m, err := ocis.ParseNode(r.t.Store.Prefix, p)
				var ae *ocis.AttributeError
				if err != nil && !errors.As(err, &ae) {
					return nil // the snapshot has it as it was
				}
				n := at(key)
				tame(&m)
				n.parent, n.name, n.blob = m.ParentID, m.Name, m.BlobID
				if m.Type == ocis.TypeFolder {
					n.mpk = p
				}
			case kind == ocis.NameNode, kind == ocis.NameRevision, kind == ocis.NameTrashed:
				n := at(key)
				n.present, n.dir = true, h.Type == '5'
			}
		case len(parts) == 7 && parts[0] == "nodes" && h.Type == '2':
			if id := targetID(h.Link, childTarget); id != "" {
				if id == r.t.Node {
					r.shown = h
				}
				n := at(strings.Join(parts[1:6], ""))
				n.kids = append(n.kids, id)
			}
		case len(parts) == 6 && parts[0] == "trash" && h.Type == '2':
			trash[strings.Join(parts[1:], "")] = targetID(h.Link, trashTarget)
			if strings.Join(parts[1:], "") == r.t.Node {
				r.trashed = h
			}
		}
		return nil
	})
	return nodes, trash, err
}

// tame empties ids that are none, and names that lead elsewhere.
func tame(m *ocis.NodeMeta) {
	for _, s := range []*string{&m.ParentID, &m.BlobID} {
		if !safeID(*s) {
			*s = ""
		}
	}
	if checkName(m.Name) != nil {
		m.Name = ""
	}
}

// part puts back a file, folder, version or trashed item.
func (r *run) part() error {
	nodes, trash, err := r.readSpace()
	if err != nil {
		return err
	}
	top := nodes[r.t.Key]
	if top == nil || !top.present {
		return fmt.Errorf("node %s: %w", r.t.Key, ErrNotInSnapshot)
	}
	if !r.exists(r.nodeRel(r.t.Space.ID)) {
		return fmt.Errorf("space %s: %w", r.t.Space.ID, ErrNoSpace)
	}
	version, trashed := strings.Contains(r.t.Key, ".REV."), strings.Contains(r.t.Key, ".T.")
	// What is wanted: the nodes with their versions, and the blobs of both.
	want := map[string]bool{}
	blobs := map[string]bool{}
	var gather func(key string)
	gather = func(key string) {
		n := nodes[key]
		if n == nil || !n.present || want[key] {
			return
		}
		want[key] = true
		if n.blob != "" {
			blobs[n.blob] = true
		}
		if strings.Contains(key, ".REV.") {
			return
		}
		if of := nodes[baseOf(key)]; of != nil {
			for _, rev := range of.revs {
				gather(rev)
			}
		}
		for _, k := range n.kids {
			gather(k)
		}
	}
	gather(r.t.Key)
	if version && !r.exists(r.nodeRel(r.t.Node)) && r.liveTrash(r.t.Node) == "" {
		return fmt.Errorf("the file of this version is gone, restore the file itself: %w", fs.ErrNotExist)
	}
	if trashed && r.exists(r.nodeRel(r.t.Node)) {
		return fmt.Errorf("node %s: %w", r.t.Node, ErrLives)
	}
	parent := ""
	if !version && !trashed {
		if parent, err = r.parentFor(nodes, top.parent, top.name, 0); err != nil {
			return err
		}
	}
	// What is there of it, and where.
	affected := map[string]bool{}
	gone := r.present(want, version, affected)
	if r.objects.err != nil {
		return r.objects.err
	}
	if err := r.blobsOf(blobs); err != nil {
		return err
	}
	if r.o.DryRun {
		if err := r.unchanged(want, blobs, gone); err != nil {
			return err
		}
		for _, rel := range gone {
			if r.same[rel] {
				continue
			}
			if err := r.moveAside(rel); err != nil {
				return err
			}
		}
		for key := range want {
			if !r.same[r.nodeRel(key)] {
				r.count(key)
			}
		}
		return nil
	}
	if parent != "" {
		affected[parent] = true
	}
	if err := r.flush(); err != nil { // the blobs
		return err
	}
	if err := r.journal(want, affected); err != nil {
		return err
	}
	if err := r.unchanged(want, blobs, gone); err != nil {
		return err
	}
	for _, rel := range gone {
		if r.same[rel] {
			continue
		}
		if err := r.moveAside(rel); err != nil {
			return err
		}
	}
	if err := r.nodesOf(want); err != nil {
		return err
	}
	if err := r.flush(); err != nil {
		return err
	}
	switch {
	case trashed:
		if err := r.trashLink(trash); err != nil {
			return err
		}
	case !version:
		if err := r.show(parent, top); err != nil {
			return err
		}
	}
	if err := r.settle(); err != nil {
		return err
	}
	for _, f := range sortedSet(affected) {
		if err := r.resize(f); err != nil {
			return err
		}
	}
	return r.endJournal()
}

func sortedSet(m map[string]bool) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}

func (r *run) count(key string) {
	if strings.Contains(key, ".REV.") {
		r.res.Revisions++
	} else {
		r.res.Nodes++
	}
}

// meta reads the metadata of a node on disk.
func (r *run) meta(key string) (ocis.NodeMeta, error) {
	p, err := r.root.ReadFile(r.nodeRel(key) + ".mpk")
	if err != nil {
		return ocis.NodeMeta{}, err
	}
	m, err := ocis.ParseNode(r.t.Store.Prefix, p)
	var ae *ocis.AttributeError
	if errors.As(err, &ae) {
		err = nil
	}
	tame(&m)
	return m, err
}

// list lists a folder on disk.
func (r *run) list(rel string) []os.DirEntry { return posix.List(r.root, rel) }

// beside lists what lies at a node's place: itself, its metadata, locks, versions.
func (r *run) beside(id string) []string {
	rel := r.nodeRel(id)
	dir, base := path.Split(rel)
	var out []string
	for _, e := range r.list(strings.TrimSuffix(dir, "/")) {
		if rest, ok := strings.CutPrefix(e.Name(), base); ok && (rest == "" || rest[0] == '.') {
			out = append(out, dir+e.Name())
		}
	}
	return out
}

// liveTrash is the key of the trashed node of an id on disk, or "".
func (r *run) liveTrash(id string) string {
	target, err := r.root.Readlink(r.trashRel(id))
	if err != nil {
		return ""
	}
	if key := targetID(target, trashTarget); baseOf(key) == id && r.exists(r.nodeRel(key)) {
		return key
	}
	return ""
}

// present lists, below the store's root, what has to make way: all that is there of the wanted nodes, and
// what their folders have got since. affected gets the folders that lose something.
func (r *run) present(want map[string]bool, version bool, affected map[string]bool) []string {
	var out []string
	seen := map[string]bool{}
	add := func(rel string) {
		if !seen[rel] {
			seen[rel] = true
			out = append(out, rel)
		}
	}
	if version {
		for _, rel := range []string{r.nodeRel(r.t.Key), r.nodeRel(r.t.Key) + ".mpk"} {
			if r.exists(rel) {
				add(rel)
			}
		}
		return out
	}
	done := map[string]bool{}
	var take func(id string)
	take = func(id string) {
		if done[id] {
			return
		}
		done[id] = true
		keys := []string{id}
		if t := r.liveTrash(id); t != "" {
			keys = append(keys, t)
			add(r.trashRel(id))
		}
		blobs := map[string]bool{}
		for _, key := range keys {
			m, err := r.meta(key)
			if err == nil && m.BlobID != "" {
				blobs[m.BlobID] = true
			}
			// Where it is now, a link leads to it.
			if key == id && err == nil && m.ParentID != "" && m.Name != "" {
				link := r.nodeRel(m.ParentID) + "/" + m.Name
				if target, err := r.root.Readlink(link); err == nil && targetID(target, childTarget) == id {
					if !want[m.ParentID] {
						add(link)
					}
					affected[m.ParentID] = true
				}
			}
			for _, e := range r.list(r.nodeRel(key)) {
				target, err := r.root.Readlink(r.nodeRel(key) + "/" + e.Name())
				if kid := targetID(target, childTarget); err == nil && kid != "" {
					if m, err := r.meta(kid); err == nil && m.ParentID == id {
						take(kid)
					}
				}
			}
		}
		for _, rel := range r.beside(id) {
			if strings.HasSuffix(rel, ".mlock") || strings.HasSuffix(rel, ".flock") {
				continue
			}
			add(rel)
			if strings.HasSuffix(rel, ".mpk") {
				p, err := r.root.ReadFile(rel)
				if err != nil {
					continue
				}
				if m, err := ocis.ParseNode(r.t.Store.Prefix, p); err == nil && safeID(m.BlobID) {
					blobs[m.BlobID] = true
				}
			}
		}
		for _, b := range sortedSet(blobs) {
			if r.blobThere(b) {
				add(r.blobRel(b))
			}
		}
	}
	for _, key := range sortedSet(want) {
		take(baseOf(key))
	}
	for _, id := range r.oldJournal() {
		take(baseOf(id))
	}
	for id := range done {
		delete(affected, id)
	}
	return out
}

// blobsOf writes the blobs that are not there.
func (r *run) blobsOf(want map[string]bool) error {
	found := map[string]bool{}
	err := r.each(r.spaceTar(), func(h *pax.Header, rel string, data io.Reader) error {
		parts := strings.Split(strings.TrimPrefix(rel, r.sp+"/"), "/")
		if h.Type == '5' && len(parts) <= 5 {
			r.dirs[rel] = h
			return nil
		}
		if len(parts) != 6 || parts[0] != "blobs" {
			return nil
		}
		b := strings.Join(parts[1:], "")
		if !want[b] {
			return nil
		}
		found[b] = true
		if r.objects.on() {
			return r.objects.back(h, rel)
		}
		if ok, err := r.sameContent(h, rel); err != nil || ok {
			if ok {
				r.res.Unchanged++
			}
			return err
		}
		r.res.Blobs++
		r.res.Bytes += sizeOf(h)
		if err := r.moveAside(rel); err != nil || r.o.DryRun {
			return err
		}
		if err := r.shards(rel); err != nil {
			return err
		}
		return r.put(h, rel, data)
	})
	for _, b := range sortedSet(want) {
		if err == nil && !found[b] {
			r.warn("blob %s is not in the snapshot: its file has no content", b)
		}
	}
	return err
}

// sameContent compares a file on disk with one of the snapshot.
func (r *run) sameContent(h *pax.Header, rel string) (bool, error) {
	fi, err := r.root.Lstat(rel)
	if err != nil || !fi.Mode().IsRegular() || h.Type != '0' || fi.Size() != sizeOf(h) {
		return false, nil
	}
	if _, inline := h.Records[pax.Content]; !inline && h.Size > 0 {
		return false, nil // its data comes once; small as it is, it is written again
	}
	src, _, err := r.content(h, bytes.NewReader(nil))
	if err != nil {
		return false, err
	}
	f, err := r.root.Open(rel)
	if err != nil {
		return false, nil
	}
	defer f.Close()
	return sameBytes(r.ctx, src, f)
}

// sameBytes compares two contents.
func sameBytes(ctx context.Context, want, have io.Reader) (bool, error) {
	a, b := make([]byte, 128<<10), make([]byte, 128<<10)
	for {
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		n, errA := io.ReadFull(want, a)
		m, errB := io.ReadFull(have, b)
		if errA != nil && errA != io.EOF && errA != io.ErrUnexpectedEOF {
			return false, errA
		}
		if n != m || !bytes.Equal(a[:n], b[:m]) || (errA == nil) != (errB == nil) {
			return false, nil
		}
		if errA != nil {
			return true, nil
		}
	}
}

// unchanged finds those of the entries in the way that are as the snapshot has them.
func (r *run) unchanged(want, blobs map[string]bool, gone []string) error {
	r.same = map[string]bool{}
	at := map[string]bool{}
	for _, rel := range gone {
		at[rel] = true
	}
	links := map[string]int{} // of folders that are as they should be so far
	err := r.each(r.spaceTar(), func(h *pax.Header, rel string, data io.Reader) error {
		parts := strings.Split(strings.TrimPrefix(rel, r.sp+"/"), "/")
		dir := path.Dir(rel)
		switch {
		case len(parts) == 6 && parts[0] == "blobs" && at[rel]:
			r.same[rel] = blobs[strings.Join(parts[1:], "")] // blobsOf has made it so
		case len(parts) == 6 && parts[0] == "nodes" && at[rel]:
			key, kind := keyOfName(parts)
			fi, err := r.root.Lstat(rel)
			if err != nil || !want[key] || kind.IsLock() {
				return nil //nolint:nilerr // it is not there
			}
			if h.Type == '5' && fi.IsDir() {
				links[rel] = 0
			}
			if h.Type == '0' && fi.Mode().IsRegular() && fi.Size() == sizeOf(h) && fi.Size() <= metaLimit {
				src, _, err := r.content(h, data)
				if err != nil {
					return err
				}
				p, err := io.ReadAll(src)
				if err != nil {
					return err
				}
				q, err := r.root.ReadFile(rel)
				r.same[rel] = err == nil && bytes.Equal(p, q)
			}
		case len(parts) == 6 && parts[0] == "trash" && rel == r.trashRel(r.t.Node):
			target, err := r.root.Readlink(rel)
			r.same[rel] = r.t.Key != r.t.Node && err == nil && target == h.Link && target == trashTarget+ocis.NodePath(r.t.Key)
		case len(parts) == 7 && h.Type == '2':
			if target, err := r.root.Readlink(rel); at[rel] && err == nil && target == h.Link {
				r.same[rel] = true
			}
			if n, ok := links[dir]; ok {
				if target, err := r.root.Readlink(rel); err != nil || target != h.Link {
					delete(links, dir)
				} else {
					links[dir] = n + 1
				}
			}
		}
		return nil
	})
	for rel, n := range links {
		r.same[rel] = len(r.list(rel)) == n
	}
	return err
}

// nodesOf writes nodes, versions and metadata: metadata first, since a node without it is damage.
func (r *run) nodesOf(want map[string]bool) error {
	wanted := func(parts []string) (string, ocis.NameKind, bool) {
		if len(parts) < 6 || parts[0] != "nodes" {
			return "", 0, false
		}
		key, kind := keyOfName(parts[:6])
		return key, kind, want[key] && !kind.IsLock()
	}
	for _, meta := range []bool{true, false} {
		err := r.each(r.spaceTar(), func(h *pax.Header, rel string, data io.Reader) error {
			parts := strings.Split(strings.TrimPrefix(rel, r.sp+"/"), "/")
			if h.Type == '5' && len(parts) <= 5 {
				r.dirs[rel] = h
				return nil
			}
			key, kind, ok := wanted(parts)
			if !ok || kind.IsMeta() != meta || r.same[rel] || len(parts) == 7 && r.same[path.Dir(rel)] {
				return nil
			}
			if len(parts) == 6 {
				if !meta {
					r.count(key)
				}
				if err := r.shards(rel); err != nil {
					return err
				}
				if h.Type != '5' && r.exists(rel) {
					if err := r.moveAside(rel); err != nil {
						return err
					}
				}
			} else if r.exists(rel) {
				return nil
			}
			return r.put(h, rel, data)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// trashLink makes the entry of the trash.
func (r *run) trashLink(trash map[string]string) error {
	if trash[r.t.Node] != r.t.Key {
		r.warn("the snapshot had no entry of the trash for it; it was made")
	}
	rel := r.trashRel(r.t.Node)
	if target, err := r.root.Readlink(rel); err == nil && target == trashTarget+ocis.NodePath(r.t.Key) {
		return nil
	}
	if r.exists(rel) {
		if err := r.moveAside(rel); err != nil {
			return err
		}
	}
	if err := r.shards(rel); err != nil {
		return err
	}
	return r.linkAs(r.trashed, trashTarget+ocis.NodePath(r.t.Key), rel, r.nodeRel(r.t.Key))
}

// link makes a symbolic link that belongs to whom like belongs.
func (r *run) link(target, rel, like string) error {
	if err := r.plain(rel); err != nil {
		return err
	}
	step()
	if err := r.root.Symlink(target, rel); err != nil {
		return err
	}
	if fi, err := r.root.Lstat(like); err == nil {
		if uid, gid, _, err := ownerOf(fi); err == nil {
			if err := r.root.Lchown(rel, int(uid), int(gid)); err != nil && !errors.Is(err, fs.ErrPermission) {
				return err
			}
		}
	}
	return r.syncDir(path.Dir(rel))
}

// linkAs is link with the time that the link had in the snapshot.
func (r *run) linkAs(h *pax.Header, target, rel, like string) error {
	if err := r.link(target, rel, like); err != nil || h == nil {
		return err
	}
	return r.linkTime(h, rel)
}

// parentFor finds the folder that takes a node: the one that had it, wherever it is now, put back if it
// is gone. It returns its id.
func (r *run) parentFor(nodes map[string]*snapNode, id, child string, depth int) (string, error) {
	if id == "" || depth > 1000 {
		return "", fmt.Errorf("%q names no folder in the snapshot: %w", child, ErrNotInSnapshot)
	}
	if fi, err := r.root.Lstat(r.nodeRel(id)); err == nil && fi.IsDir() {
		if up := r.trashedAbove(id); up != "" {
			return "", fmt.Errorf("the folder %q was deleted: %w", up, ErrInTrash)
		}
		return id, nil
	}
	if key := r.liveTrash(id); key != "" {
		m, _ := r.meta(key)
		return "", fmt.Errorf("the folder %q was deleted: %w", m.Name, ErrInTrash)
	}
	n := nodes[id]
	if n == nil || !n.present || !n.dir || n.mpk == nil {
		return "", fmt.Errorf("the folder of %q: %w", child, ErrNotInSnapshot)
	}
	up, err := r.parentFor(nodes, n.parent, n.name, depth+1)
	if err != nil {
		return "", err
	}
	link := r.nodeRel(up) + "/" + n.name
	if target, err := r.root.Readlink(link); err == nil { // another one has its name: it takes the node
		if other := targetID(target, childTarget); other != "" {
			if fi, err := r.root.Lstat(r.nodeRel(other)); err == nil && fi.IsDir() {
				return other, nil
			}
		}
		return "", fmt.Errorf("%q, which is a file, is where a folder was: rename it first: %w", n.name, fs.ErrExist)
	}
	r.res.Parents = append(r.res.Parents, n.name)
	if r.o.DryRun {
		return id, nil
	}
	attrs, err := ocis.ParseMPK(n.mpk)
	if err != nil {
		return "", err
	}
	attrs.Set(r.t.Store.Prefix, "treesize", []byte("0"))
	attrs.Set(r.t.Store.Prefix, "parentid", []byte(up))
	h, err := r.like(up)
	if err != nil {
		return "", err
	}
	rel := r.nodeRel(id)
	if err := r.shards(rel); err != nil {
		return "", err
	}
	if err := r.journal(nil, map[string]bool{id: true}); err != nil {
		return "", err
	}
	if err := r.writeBytes(h, rel+".mpk", ocis.EncodeMPK(attrs)); err != nil {
		return "", err
	}
	dir := *h
	dir.Type, dir.Mode = '5', 0o700
	if err := r.put(&dir, rel, nil); err != nil {
		return "", err
	}
	return id, r.link(childTarget+ocis.NodePath(id), link, rel)
}

// like is a header for new files beside the metadata of a folder.
func (r *run) like(id string) (*pax.Header, error) {
	return r.headerOf(r.nodeRel(id) + ".mpk")
}

// trashedAbove is the name of the deleted folder that a folder on disk lies in, or "".
func (r *run) trashedAbove(id string) string {
	for range 1000 {
		if id == r.t.Space.ID {
			return ""
		}
		if key := r.liveTrash(id); key != "" && !r.exists(r.nodeRel(id)) {
			m, _ := r.meta(key)
			return m.Name
		}
		m, err := r.meta(id)
		if err != nil || m.ParentID == "" {
			return ""
		}
		id = m.ParentID
	}
	return ""
}

// show makes the link that leads to the node.
func (r *run) show(parent string, top *snapNode) error {
	if err := checkName(top.name); err != nil {
		return err
	}
	link := r.nodeRel(parent) + "/" + top.name
	if target, err := r.root.Readlink(link); err == nil {
		other := targetID(target, childTarget)
		if other == r.t.Node {
			if r.shown != nil {
				return r.linkTime(r.shown, link)
			}
			return nil
		}
		if err := r.trashAway(parent, top.name, other); err != nil {
			return err
		}
	} else if r.exists(link) {
		if err := r.moveAside(link); err != nil {
			return err
		}
	}
	if parent != top.parent {
		if err := r.change(r.t.Node, func(a *ocis.Attributes) { a.Set(r.t.Store.Prefix, "parentid", []byte(parent)) }); err != nil {
			return err
		}
	}
	return r.linkAs(r.shown, childTarget+ocis.NodePath(r.t.Node), link, r.nodeRel(r.t.Node))
}

func checkName(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") || len(name) > 255 {
		return fmt.Errorf("%q is no name for a file", name)
	}
	return nil
}

// trashAway deletes the node that has taken the name, as the server does: into the trash.
func (r *run) trashAway(parent, name, id string) error {
	link := r.nodeRel(parent) + "/" + name
	if id == "" || !r.exists(r.nodeRel(id)) {
		return r.moveAside(link)
	}
	origin := "/" + name
	for up, n := parent, 0; up != r.t.Space.ID && n < 1000; n++ {
		m, err := r.meta(up)
		if err != nil || m.ParentID == "" {
			break
		}
		origin, up = "/"+m.Name+origin, m.ParentID
	}
	key := id + ".T." + r.o.Now.UTC().Format(time.RFC3339Nano)
	r.res.Trashed = append(r.res.Trashed, strings.TrimPrefix(origin, "/"))
	if err := r.change(id, func(a *ocis.Attributes) { a.Set(r.t.Store.Prefix, "trash.origin", []byte(origin)) }); err != nil {
		return err
	}
	rel := r.trashRel(id)
	if r.exists(rel) {
		if err := r.moveAside(rel); err != nil {
			return err
		}
	}
	if err := r.shards(rel); err != nil {
		return err
	}
	if err := r.link(trashTarget+ocis.NodePath(key), rel, r.nodeRel(id)); err != nil {
		return err
	}
	if err := r.plain(r.nodeRel(id)); err != nil {
		return err
	}
	step()
	if err := r.root.Rename(r.nodeRel(id), r.nodeRel(key)); err != nil {
		return err
	}
	step()
	if err := r.root.Rename(r.nodeRel(id)+".mpk", r.nodeRel(key)+".mpk"); err != nil {
		return err
	}
	step()
	return r.root.Remove(link)
}

// change rewrites the metadata of a node.
func (r *run) change(key string, fn func(*ocis.Attributes)) error {
	rel := r.nodeRel(key) + ".mpk"
	p, err := r.root.ReadFile(rel)
	if err != nil {
		return err
	}
	attrs, err := ocis.ParseMPK(p)
	if err != nil {
		return fmt.Errorf("%s: %w", r.abs(rel), err)
	}
	fn(&attrs)
	q := ocis.EncodeMPK(attrs)
	if bytes.Equal(p, q) {
		return nil
	}
	h, err := r.like(key)
	if err != nil {
		return err
	}
	return r.writeBytes(h, rel, q)
}

func (r *run) writeBytes(h *pax.Header, rel string, p []byte) error {
	hh := *h
	if hh.Records != nil {
		hh.Records = nil
	}
	return r.file(rel, bytes.NewReader(p), int64(len(p)), true, func(f *os.File) error { return r.dressFile(&hh, f) })
}

// resize sets the sizes and times of a folder and of all above, as the server does after a change.
func (r *run) resize(id string) error {
	if r.t.Space.Type == "metadata" {
		return nil // the system storage does not account for sizes
	}
	for range 1000 {
		sum := int64(0)
		for _, e := range r.list(r.nodeRel(id)) {
			target, err := r.root.Readlink(r.nodeRel(id) + "/" + e.Name())
			if err != nil {
				continue
			}
			m, err := r.meta(targetID(target, childTarget))
			if err != nil {
				r.warn("the size of folder %s was not set: %v", id, err)
				return nil
			}
			if m.Type == ocis.TypeFile {
				sum += m.BlobSize
			} else {
				sum += m.TreeSize
			}
		}
		m, err := r.meta(id)
		if err != nil {
			return err
		}
		err = r.change(id, func(a *ocis.Attributes) {
			a.Set(r.t.Store.Prefix, "treesize", []byte(strconv.FormatInt(sum, 10)))
			if m.TMTime.Before(r.o.Now) {
				a.Set(r.t.Store.Prefix, "tmtime", []byte(r.o.Now.UTC().Format(time.RFC3339Nano)))
			}
			if _, ok := a.Get("tmp.etag"); ok {
				a.Set(r.t.Store.Prefix, "tmp.etag", nil)
			}
		})
		if err != nil || id == r.t.Space.ID || m.ParentID == "" {
			return err
		}
		id = m.ParentID
	}
	return nil
}

// --- the journal ----------------------------------------------------------------------------------

func (r *run) journalRel() string { return r.work + "/" + r.t.Space.ID + ".nodes" }

// oldJournal returns the nodes that a killed run was about to write.
func (r *run) oldJournal() []string {
	p, err := r.root.ReadFile(r.journalRel())
	if err != nil {
		return nil
	}
	var out []string
	for line := range strings.Lines(string(p)) {
		if key, ok := strings.CutPrefix(strings.TrimSpace(line), "write "); ok && safeID(key) {
			out = append(out, key)
		}
	}
	return out
}

// journal notes the nodes that may look damaged until the run is over.
func (r *run) journal(want, affected map[string]bool) error {
	if err := r.root.MkdirAll(r.work, 0o700); err != nil {
		return err
	}
	old, err := r.root.ReadFile(r.journalRel())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	b := bytes.NewBuffer(old)
	for _, key := range sortedSet(want) {
		fmt.Fprintln(b, "write", key)
	}
	for _, key := range sortedSet(affected) {
		fmt.Fprintln(b, "change", key)
	}
	h := &pax.Header{Type: '0', Mode: 0o600, UID: uint32(os.Geteuid()), GID: uint32(os.Getegid()), Sec: r.o.Now.Unix()}
	return r.writeBytes(h, r.journalRel(), b.Bytes())
}

func (r *run) endJournal() error {
	step()
	if err := r.root.Remove(r.journalRel()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return r.done()
}
