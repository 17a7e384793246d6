package inplace

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/restore/posix"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Spaces of the posix driver: the file that users see is the blob and the node, its attributes are the
// metadata. So an item is built aside, with all that is in it, and takes its place at once by a rename:
// first its versions and what its attributes had no room for, then itself.

// pfile is an entry of a posix space in the snapshot: about 200 bytes while a part of it is put back.
type pfile struct {
	id   string
	dir  bool
	size int64
}

// pspace is a posix space in the snapshot. Paths are below its folder.
type pspace struct {
	files map[string]pfile
	order []string
	byID  map[string]string // of what users see
	infos map[string]ocis.TrashInfo
}

func (r *run) attrName(name string) string { return r.t.Store.Prefix + name }

// xattr reads an attribute of the server from a file or folder; links have none.
func (r *run) xattr(rel, name string) (string, bool) {
	f, err := posix.Open(r.root, rel)
	if err != nil {
		return "", false
	}
	defer f.Close()
	for size := 256; size <= 1<<16; size *= 4 {
		v := make([]byte, size)
		n, err := unix.Fgetxattr(int(f.Fd()), r.attrName(name), v)
		if err == nil {
			return string(v[:n]), true
		}
		if !errors.Is(err, unix.ERANGE) {
			return "", false
		}
	}
	return "", false
}

func (r *run) setXattr(rel, name, value string) error {
	f, err := posix.Open(r.root, rel)
	if err != nil {
		return err
	}
	defer f.Close()
	step()
	if err := unix.Fsetxattr(int(f.Fd()), r.attrName(name), []byte(value), 0); err != nil {
		return fmt.Errorf("%s: set attribute %q: %w", r.abs(rel), r.attrName(name), err)
	}
	return nil
}

// xattrOf is an attribute of the server in the snapshot.
func (r *run) xattrOf(h *pax.Header, name string) string {
	return h.Records[pax.Xattr+pax.EscapeXattrName(r.attrName(name))]
}

var errStop = errors.New("enough")

// posixPlace finds the folder of the space: by its attributes, or else where it was. It tells whether there is one.
func (r *run) posixPlace() (bool, error) {
	err := r.each(r.spaceTar(), func(_ *pax.Header, rel string, _ io.Reader) error {
		r.src = rel // the archive begins with the folder of the space
		return errStop
	})
	if !errors.Is(err, errStop) {
		if err == nil || errors.Is(err, snapshot.ErrNoSuchPath) {
			err = fmt.Errorf("space %s: %w", r.t.Space.ID, ErrNotInSnapshot)
		}
		return false, err
	}
	if r.src == "" { // the root of the store is in no space
		return false, fmt.Errorf("space %s: %w", r.t.Space.ID, ErrNotInSnapshot)
	}
	r.sp = r.pre + r.src
	list, err := posix.Spaces(r.ctx, r.root, strings.TrimSuffix(r.pre, "/"), r.t.Store.Prefix)
	if err != nil {
		return false, err
	}
	at := ""
	for i := range list {
		r.spaceAt[list[i].Rel] = list[i].ID
		if list[i].ID == r.t.Space.ID && (at == "" || list[i].Rel == r.sp) { // the others are copies of it
			at = list[i].Rel
		}
	}
	if at != "" {
		r.sp = at
	}
	return at != "", nil
}

// posixPlaceForSpace finds the place for a whole space. One that is there is in the way, wherever it is; a place
// that another space has taken is left to that.
func (r *run) posixPlaceForSpace() error {
	there, err := r.posixPlace()
	if err != nil {
		return err
	}
	if there {
		return nil
	}
	if other := r.spaceAt[r.sp]; other != "" {
		r.warn("the folder %s belongs to the space %s now, so that the space gets one of another name", r.abs(r.sp), other)
		r.sp += "-" + r.t.Space.ID
	}
	return nil
}

// countPosix counts one entry of a whole space.
func (r *run) countPosix(h *pax.Header, in string) {
	if h.Type == '0' || h.Type == '5' {
		countIn(in, h.Type == '5', sizeOf(h), &piece{}).into(r.res)
	}
}

// countIn adds one entry to what a piece has: locks, records and folders for other things are nothing to people.
func countIn(in string, dir bool, size int64, p *piece) *piece {
	switch {
	case posix.IsLock(in):
		return p
	case strings.HasPrefix(in, posix.Nodes+"/"):
		if kind, _, _ := ocis.ClassifyNodeName(path.Base(in)); dir || kind != ocis.NameRevision {
			return p
		}
		p.revisions++
	case posix.Hidden(in) && !strings.HasPrefix(in, posix.Trash+"/files/"):
		return p
	default:
		p.nodes++
	}
	if !dir {
		p.files++
		p.bytes += size
	}
	return p
}

func (p *piece) into(res *Result) {
	res.Nodes += p.nodes
	res.Revisions += p.revisions
	res.Blobs += p.files
	res.Bytes += p.bytes
}

// readPosix reads the entries of the space from the snapshot.
func (r *run) readPosix() (*pspace, error) {
	s := &pspace{files: map[string]pfile{}, byID: map[string]string{}, infos: map[string]ocis.TrashInfo{}}
	err := r.each(r.spaceTar(), func(h *pax.Header, rel string, data io.Reader) error {
		in, ok := strings.CutPrefix(rel+"/", r.src+"/")
		if !ok {
			return fmt.Errorf("%q does not lie in the space", h.Name)
		}
		in = strings.TrimSuffix(in, "/")
		if posix.IsLock(in) {
			return nil
		}
		if h.Type == '5' && (in == "" || posix.Hidden(in)) {
			r.dirs[rel] = h
		}
		f := pfile{id: r.xattrOf(h, "id"), dir: h.Type == '5', size: sizeOf(h)}
		if !safeID(f.id) {
			f.id = ""
		}
		s.files[in] = f
		s.order = append(s.order, in)
		if f.id != "" && !posix.Hidden(in) {
			s.byID[f.id] = in
		}
		if key, ok := strings.CutSuffix(in, ".trashinfo"); ok && h.Type == '0' && path.Dir(in) == posix.Trash+"/info" {
			src, _, err := r.content(h, data)
			if err != nil {
				return err
			}
			p, err := io.ReadAll(io.LimitReader(src, 1<<20))
			if err != nil {
				return err
			}
			if info, err := ocis.ParseTrashInfo(p); err == nil {
				s.infos[path.Base(key)] = info
			}
		}
		return nil
	})
	return s, err
}

// trashKey finds the item of the trash that r.t names.
func (s *pspace) trashKey(node, stamp string) string {
	found := ""
	for in, f := range s.files {
		key, ok := strings.CutSuffix(in, ".trashitem")
		if !ok || path.Dir(in) != posix.Trash+"/files" || f.id != node {
			continue
		}
		key = path.Base(key)
		if date := s.infos[key].DeletionDate; date == stamp || snapshot.SafeName(date) == stamp {
			return key
		}
		if _, has := s.infos[key]; !has && stamp == "unknown" || found == "" {
			found = key
		}
	}
	return found
}

// revisionOf is the id of the file or folder that an entry below .oc-nodes belongs to, or "".
func revisionOf(in string) string {
	parts := strings.Split(in, "/")
	if len(parts) != ocis.NodeDepth+2 || parts[0] != posix.Nodes {
		return ""
	}
	kind, last, _ := ocis.ClassifyNodeName(parts[len(parts)-1])
	if kind != ocis.NameRevision && kind != ocis.NameMeta {
		return ""
	}
	return strings.Join(parts[1:len(parts)-1], "") + last
}

// piece is one thing that takes its place by one rename.
type piece struct {
	from string // in the snapshot, below the space's folder
	to   string // on disk, likewise
	own  bool   // what is there is the same item, or nothing that users see

	nodes, revisions, files, bytes int64
}

func beneath(in, top string) bool { return in == top || strings.HasPrefix(in, top+"/") }

// underAny tells whether in, or a folder that it is in, is one of the set.
func underAny(in string, set map[string]bool) bool {
	for !set[in] {
		i := strings.LastIndexByte(in, '/')
		if i < 0 {
			return false
		}
		in = in[:i]
	}
	return true
}

// posixPart puts back a file, folder, version or trashed item.
func (r *run) posixPart() error {
	there, err := r.posixPlace()
	if err != nil {
		return err
	}
	s, err := r.readPosix()
	if err != nil {
		return err
	}
	_, stamp, trashed := strings.Cut(r.t.Key, ".T.")
	version := !trashed && strings.Contains(r.t.Key, ".REV.")
	top, trashKey := s.byID[r.t.Node], ""
	switch {
	case version:
		top = posix.Nodes + "/" + ocis.NodePath(r.t.Key)
	case trashed:
		if trashKey = s.trashKey(r.t.Node, stamp); trashKey != "" {
			top = posix.Trash + "/files/" + trashKey + ".trashitem"
		}
	}
	if _, ok := s.files[top]; !ok || top == "" {
		return fmt.Errorf("node %s: %w", r.t.Key, ErrNotInSnapshot)
	}
	if !there {
		return fmt.Errorf("space %s: %w", r.t.Space.ID, ErrNoSpace)
	}
	// What is wanted, and where it is now.
	want, above := map[string]bool{}, map[string]bool{}
	if version {
		want[r.t.Node] = true
	} else {
		for in, f := range s.files {
			if beneath(in, top) && f.id != "" {
				want[f.id] = true
			}
		}
		for in := top; in != "" && !trashed; {
			if in = path.Dir(in); in == "." {
				in = ""
			}
			above[s.files[in].id] = true
		}
	}
	now, err := r.posixNow(want, above)
	if err != nil {
		return err
	}
	if version && len(now.live[r.t.Node])+len(now.trash[r.t.Node]) == 0 {
		return fmt.Errorf("the file of this version is gone, restore the file itself: %w", fs.ErrNotExist)
	}
	pieces := []piece{}
	affected := map[string]bool{} // folders whose sizes change
	switch {
	case version:
		pieces = append(pieces, piece{from: top, to: top, own: true})
	case trashed:
		for id := range want {
			if len(now.live[id]) > 0 {
				return fmt.Errorf("node %s: %w", id, ErrLives)
			}
		}
		info := posix.Trash + "/info/" + trashKey + ".trashinfo"
		if _, ok := s.files[info]; ok {
			pieces = append(pieces, piece{from: info, to: info, own: true})
		} else {
			r.warn("the snapshot had no record of the trash for it, so that the server cannot list it")
		}
		pieces = append(pieces, piece{from: top, to: top, own: true})
	default:
		parent, err := r.posixParent(s, now, top, 0)
		if err != nil {
			return err
		}
		affected[parent] = true
		pieces = append(pieces, piece{from: top, to: path.Join(parent, path.Base(top))})
	}
	if !version {
		var more []piece
		for _, in := range s.order {
			if want[revisionOf(in)] {
				more = append(more, piece{from: in, to: in, own: true})
			}
		}
		pieces = append(more, pieces...)
	}
	gone := r.posixGone(want, pieces, now, version, affected)
	if r.o.DryRun {
		if err := r.posixDry(pieces, want); err != nil {
			return err
		}
		for _, in := range gone {
			if err := r.moveAside(r.sp + "/" + in); err != nil {
				return err
			}
		}
		return nil
	}
	stage := r.work + "/" + r.t.Space.ID
	if err := r.clear(stage); err != nil { // of a run that was killed
		return err
	}
	if err := r.root.Mkdir(stage, 0o700); err != nil {
		return err
	}
	if err := r.posixBuild(stage, pieces); err != nil {
		return err
	}
	for _, in := range gone {
		if err := r.moveAside(r.sp + "/" + in); err != nil {
			return err
		}
	}
	for i := range pieces {
		if err := r.posixTake(stage, i, &pieces[i], want); err != nil {
			return err
		}
	}
	for _, in := range sortedSet(affected) {
		if err := r.posixResize(in); err != nil {
			return err
		}
	}
	if err := r.root.RemoveAll(stage); err != nil {
		return err
	}
	return r.done()
}

// pnow is where things are on disk, below the space's folder. A copied file has the id of the original.
type pnow struct {
	live, trash map[string][]string
}

// posixNow looks for ids.
func (r *run) posixNow(want, above map[string]bool) (*pnow, error) {
	n := &pnow{live: map[string][]string{}, trash: map[string][]string{}}
	var look func(in string, at map[string][]string) error
	look = func(in string, at map[string][]string) error {
		if r.ctx.Err() != nil {
			return r.ctx.Err()
		}
		if in != posix.Trash+"/files" {
			if id, _ := r.xattr(path.Join(r.sp, in), "id"); want[id] || above[id] {
				at[id] = append(at[id], in)
			}
		}
		for _, e := range r.list(path.Join(r.sp, in)) {
			p := path.Join(in, e.Name())
			if posix.Hidden(p) && !beneath(p, posix.Trash+"/files") || posix.IsLock(p) || !e.IsDir() && !e.Type().IsRegular() {
				continue
			}
			if !e.IsDir() {
				if id, _ := r.xattr(path.Join(r.sp, p), "id"); want[id] {
					at[id] = append(at[id], p)
				}
				continue
			}
			if err := look(p, at); err != nil {
				return err
			}
		}
		return nil
	}
	if err := look("", n.live); err != nil {
		return nil, err
	}
	if r.exists(path.Join(r.sp, posix.Trash, "files")) {
		if err := look(posix.Trash+"/files", n.trash); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// posixGone lists what has to make way: all that is there of the wanted items but where they go, and their
// versions that the snapshot does not have.
func (r *run) posixGone(want map[string]bool, pieces []piece, now *pnow, version bool, affected map[string]bool) []string {
	if version {
		return nil
	}
	var out []string
	seen, places := map[string]bool{}, map[string]bool{}
	for i := range pieces {
		places[pieces[i].to] = true
	}
	add := func(in string) {
		// What is at a place makes way, or is right, when that is taken.
		if !underAny(in, places) && !underAny(in, seen) {
			seen[in] = true
			out = append(out, in)
		}
	}
	for _, id := range sortedSet(want) {
		for _, in := range now.live[id] {
			if in == "" {
				continue
			}
			add(in)
			if up := path.Dir(in); seen[in] && up == "." {
				affected[""] = true
			} else if seen[in] {
				affected[up] = true
			}
		}
		for _, in := range now.trash[id] {
			add(in)
			if key, ok := strings.CutSuffix(in, ".trashitem"); ok && seen[in] && path.Dir(in) == posix.Trash+"/files" {
				info := posix.Trash + "/info/" + path.Base(key) + ".trashinfo"
				if r.exists(path.Join(r.sp, info)) {
					add(info)
				}
			}
		}
		dir, base := path.Split(posix.Nodes + "/" + ocis.NodePath(id))
		for _, e := range r.list(path.Join(r.sp, dir)) {
			if rest, ok := strings.CutPrefix(e.Name(), base); ok && strings.HasPrefix(rest, ".") && !posix.IsLock(rest) {
				add(dir + e.Name())
			}
		}
	}
	// A folder that makes way itself has no size any more.
	for in := range affected {
		if underAny(in, seen) {
			delete(affected, in)
		}
	}
	return out
}

// eachPiece reads the entries of the pieces from the snapshot. below is the path below the piece, with its slash.
func (r *run) eachPiece(pieces []piece, fn func(i int, h *pax.Header, in, below string, data io.Reader) error) error {
	at := map[string]int{}
	for i := range pieces {
		at[pieces[i].from] = i
	}
	return r.each(r.spaceTar(), func(h *pax.Header, rel string, data io.Reader) error {
		in := strings.TrimPrefix(rel, r.src+"/")
		if rel == r.src || posix.IsLock(in) {
			return nil
		}
		top := in
		i, ok := at[top]
		for !ok && strings.Contains(top, "/") {
			top = path.Dir(top)
			i, ok = at[top]
		}
		if !ok {
			return nil
		}
		return fn(i, h, in, strings.TrimPrefix(in, top), data)
	})
}

// posixDry counts what would be written, by all that tells without reading contents.
func (r *run) posixDry(pieces []piece, want map[string]bool) error {
	differs, entries := map[int]bool{}, map[int]int{}
	err := r.eachPiece(pieces, func(i int, h *pax.Header, in, below string, _ io.Reader) error {
		countIn(in, h.Type == '5', sizeOf(h), &pieces[i])
		entries[i]++
		differs[i] = differs[i] || !r.looksSame(h, r.sp+"/"+pieces[i].to+below)
		return nil
	})
	if err != nil {
		return err
	}
	var count func(rel string) int
	count = func(rel string) int {
		n := 1
		for _, e := range r.list(rel) {
			if !posix.IsLock(e.Name()) {
				n += count(rel + "/" + e.Name())
			}
		}
		return n
	}
	for i := range pieces {
		p, to := &pieces[i], r.sp+"/"+pieces[i].to
		if !differs[i] && count(to) == entries[i] {
			r.res.Unchanged += p.files
			continue
		}
		p.into(r.res)
		if id, _ := r.xattr(to, "id"); id != "" && !p.own && !want[id] {
			r.res.Trashed = append(r.res.Trashed, p.to)
		} else if err := r.moveAside(to); err != nil {
			return err
		}
	}
	return nil
}

// looksSame tells whether an entry is on disk, by its type, size, time and attributes.
func (r *run) looksSame(h *pax.Header, rel string) bool {
	f, err := posix.Open(r.root, rel)
	if err != nil {
		return false
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || fi.IsDir() != (h.Type == '5') || !fi.IsDir() && (fi.Size() != sizeOf(h) || !fi.ModTime().Equal(time.Unix(h.Sec, h.Nsec))) {
		return false
	}
	have, err := posix.Attributes(f)
	want := slices.DeleteFunc(snapshot.EntryXattrs(h), func(x snapshot.Xattr) bool { return !strings.HasPrefix(x.Name, "user.") })
	return err == nil && slices.EqualFunc(have, want, func(a ocis.Attribute, x snapshot.Xattr) bool {
		return a.Key == x.Name && bytes.Equal(a.Value, x.Value)
	})
}

// posixBuild writes the pieces into the folder stage, by their numbers.
func (r *run) posixBuild(stage string, pieces []piece) error {
	type further struct{ from, to string }
	var links []further
	err := r.eachPiece(pieces, func(i int, h *pax.Header, in, below string, data io.Reader) error {
		p := &pieces[i]
		to := stage + "/" + strconv.Itoa(i) + below
		if h.Type == '1' {
			from := strings.TrimPrefix(strings.TrimPrefix(h.Link, "./"), r.src+"/")
			if !safePath(from) || !beneath(from, p.from) {
				r.warn("%q is a further name of %q, which is not restored with it: it was left out", in, from)
				return nil
			}
			links = append(links, further{stage + "/" + strconv.Itoa(i) + strings.TrimPrefix(from, p.from), to})
			return nil
		}
		countIn(in, h.Type == '5', sizeOf(h), p)
		return r.put(h, to, data)
	})
	if err != nil {
		return err
	}
	for _, l := range links {
		if err := r.root.Link(l.from, l.to); err != nil {
			return err
		}
	}
	return r.settle()
}

// posixTake gives piece i its place.
func (r *run) posixTake(stage string, i int, p *piece, want map[string]bool) error {
	from, to := stage+"/"+strconv.Itoa(i), r.sp+"/"+p.to
	if !r.exists(from) {
		return nil // it was neither file nor folder
	}
	if !posix.Hidden(p.to) {
		parent, _ := r.xattr(path.Dir(to), "id")
		if old, ok := r.xattr(from, "parentid"); ok && parent != "" && old != parent {
			if err := r.setXattr(from, "parentid", parent); err != nil {
				return err
			}
		}
	}
	if same, err := r.sameTree(from, to); err != nil {
		return err
	} else if same {
		r.res.Unchanged += p.files
		return nil
	}
	p.into(r.res)
	if r.exists(to) {
		id, _ := r.xattr(to, "id")
		var err error
		if p.own || want[id] || id == "" {
			err = r.moveAside(to)
		} else {
			err = r.posixTrashAway(p.to, id)
		}
		if err != nil {
			return err
		}
	}
	if err := r.shards(to); err != nil {
		return err
	}
	step()
	if err := r.root.Rename(from, to); err != nil {
		return err
	}
	return r.syncDir(path.Dir(to))
}

// sameTree tells whether what was built is there already, with contents, times and attributes.
func (r *run) sameTree(a, b string) (bool, error) {
	if err := r.plain(b); err != nil {
		return false, err
	}
	x, err := r.root.Lstat(a)
	if err != nil {
		return false, err
	}
	y, err := r.root.Lstat(b)
	if err != nil || x.Mode() != y.Mode() || x.Mode().IsRegular() && (x.Size() != y.Size() || !x.ModTime().Equal(y.ModTime())) {
		return false, nil //nolint:nilerr // it is not there
	}
	if !x.IsDir() && !x.Mode().IsRegular() {
		return false, nil
	}
	ux, gx, _, err := ownerOf(x)
	if err != nil {
		return false, err
	}
	if uy, gy, _, err := ownerOf(y); err != nil || ux != uy || gx != gy {
		return false, err
	}
	fa, err := posix.Open(r.root, a)
	if err != nil {
		return false, err
	}
	defer fa.Close()
	fb, err := posix.Open(r.root, b)
	if err != nil {
		return false, err
	}
	defer fb.Close()
	p, err := posix.Attributes(fa)
	if err != nil {
		return false, err
	}
	q, err := posix.Attributes(fb)
	if err != nil || !slices.EqualFunc(p, q, func(a, b ocis.Attribute) bool { return a.Key == b.Key && bytes.Equal(a.Value, b.Value) }) {
		return false, err
	}
	if !x.IsDir() {
		return sameBytes(r.ctx, fa, fb)
	}
	la, lb := r.list(a), r.list(b)
	n := 0
	for _, e := range lb {
		if !posix.IsLock(e.Name()) {
			n++
		}
	}
	if len(la) != n {
		return false, nil
	}
	for _, e := range la {
		if same, err := r.sameTree(a+"/"+e.Name(), b+"/"+e.Name()); err != nil || !same {
			return false, err
		}
	}
	return true, nil
}

// posixParent finds the folder for an item: the one that had it, wherever it is now, put back if it is gone.
func (r *run) posixParent(s *pspace, now *pnow, in string, depth int) (string, error) {
	dir := path.Dir(in)
	if dir == "." {
		return "", nil
	}
	id := s.files[dir].id
	if id == "" || depth > 1000 {
		return "", fmt.Errorf("the folder of %q: %w", in, ErrNotInSnapshot)
	}
	if list := now.live[id]; len(list) > 0 {
		return list[0], nil
	}
	if len(now.trash[id]) > 0 {
		return "", fmt.Errorf("the folder %q was deleted: %w", path.Base(dir), ErrInTrash)
	}
	up, err := r.posixParent(s, now, dir, depth+1)
	if err != nil {
		return "", err
	}
	at := path.Join(up, path.Base(dir))
	if fi, err := r.root.Lstat(r.sp + "/" + at); err == nil {
		if fi.IsDir() {
			return at, nil
		}
		return "", fmt.Errorf("%q, which is a file, is where a folder was: rename it first: %w", at, fs.ErrExist)
	}
	r.res.Parents = append(r.res.Parents, path.Base(dir))
	if r.o.DryRun {
		return at, nil
	}
	return at, r.posixFolder(dir, at, up)
}

// posixFolder makes a folder as it was, without what was in it.
func (r *run) posixFolder(dir, at, up string) error {
	err := r.each(r.spaceTar(), func(h *pax.Header, rel string, _ io.Reader) error {
		if rel != r.src+"/"+dir || h.Type != '5' {
			return nil
		}
		// Made aside, so that nobody sees it without its attributes.
		tmp := r.work + "/" + r.t.Space.ID + ".folder"
		if err := r.clear(tmp); err != nil {
			return err
		}
		if err := r.put(h, tmp, nil); err != nil {
			return err
		}
		r.late = nil
		if err := r.setXattr(tmp, "treesize", "0"); err != nil {
			return err
		}
		if id, ok := r.xattr(path.Join(r.sp, up), "id"); ok {
			if err := r.setXattr(tmp, "parentid", id); err != nil {
				return err
			}
		}
		if err := r.plain(r.sp + "/" + at); err != nil {
			return err
		}
		step()
		if err := r.root.Rename(tmp, r.sp+"/"+at); err != nil {
			return err
		}
		return errStop
	})
	if errors.Is(err, errStop) {
		return r.syncDir(path.Dir(r.sp + "/" + at))
	}
	if err == nil {
		err = fmt.Errorf("the folder %q: %w", dir, ErrNotInSnapshot)
	}
	return err
}

// posixTrashAway deletes what has taken the place of an item, as the server does: into the trash.
func (r *run) posixTrashAway(in, id string) error {
	key := id
	if !safeID(key) || r.exists(path.Join(r.sp, posix.Trash, "files", key+".trashitem")) || r.exists(path.Join(r.sp, posix.Trash, "info", key+".trashinfo")) {
		key = newID()
	}
	item, info := r.sp+"/"+posix.Trash+"/files/"+key+".trashitem", r.sp+"/"+posix.Trash+"/info/"+key+".trashinfo"
	for _, rel := range []string{item, info} {
		if err := r.shards(rel); err != nil {
			return err
		}
	}
	h, err := r.headerOf(r.sp + "/" + in)
	if err != nil {
		return err
	}
	h.Mode = 0o600
	text := "[Trash Info]\nPath=" + in + "\nDeletionDate=" + r.o.Now.Local().Format("2006-01-02T15:04:05")
	if err := r.writeBytes(h, info, []byte(text)); err != nil {
		return err
	}
	if err := r.plain(r.sp + "/" + in); err != nil {
		return err
	}
	r.res.Trashed = append(r.res.Trashed, in)
	step()
	if err := r.root.Rename(r.sp+"/"+in, item); err != nil {
		return err
	}
	return r.syncDir(path.Dir(item))
}

// posixResize sets the sizes and times of a folder and of all above, as the server does after a change.
func (r *run) posixResize(in string) error {
	for {
		dir := path.Join(r.sp, in)
		sum := int64(0)
		for _, e := range r.list(dir) {
			p := path.Join(in, e.Name())
			if in == "" && posix.Hidden(p) || posix.IsLock(p) {
				continue
			}
			name := "blobsize"
			if e.IsDir() {
				name = "treesize"
			}
			text, ok := r.xattr(dir+"/"+e.Name(), name)
			n, err := strconv.ParseInt(text, 10, 64)
			if ok && err != nil {
				r.warn("the size of folder %q was not set: %q has the size %q", in, p, text)
				return nil
			}
			sum += n // without an attribute the server has not seen it yet, and adds it when it does
		}
		if err := r.setXattr(dir, "treesize", strconv.FormatInt(sum, 10)); err != nil {
			return err
		}
		at, _ := r.xattr(dir, "tmtime")
		if t, err := time.Parse(time.RFC3339Nano, at); err != nil || t.Before(r.o.Now) {
			if err := r.setXattr(dir, "tmtime", r.o.Now.UTC().Format(time.RFC3339Nano)); err != nil {
				return err
			}
		}
		if etag, ok := r.xattr(dir, "tmp.etag"); ok && etag != "" {
			if err := r.setXattr(dir, "tmp.etag", ""); err != nil {
				return err
			}
		}
		if in == "" {
			return nil
		}
		if in = path.Dir(in); in == "." {
			in = ""
		}
	}
}
