package browse

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"sort"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// metaLimit bounds the metadata of one item, in bytes; capture reads as much.
const metaLimit = 16 << 20

// metaTar is the archive with all metadata of one space. Its entries are sorted, and most of its chunks
// begin with one: so an entry is found by reading a few chunks of an archive of any size.
type metaTar struct {
	v     *View
	c     *Content
	first string        // name of the first entry: the space's own directory
	known map[int]start // by chunk, guarded by View.mu
}

// start is the first entry that begins in a chunk.
type start struct {
	off  int64 // -1: none
	name string
}

// metaPath is where the archive of a space lies in the snapshot.
func (s *Space) metaPath() string {
	return "/storage/" + s.Store + "/metadata/" + snapshot.SafeName(s.ID) + ".tar"
}

// metaTar opens the archive of a space.
func (v *View) metaTar(ctx context.Context, s *Space) (*metaTar, error) {
	p := s.metaPath()
	v.mu.Lock()
	t := v.metas[p]
	v.mu.Unlock()
	if t != nil {
		return t, nil
	}
	n, err := v.lookup(ctx, p)
	if err != nil {
		return nil, err
	}
	c, err := v.openMeta(n)
	if err != nil {
		return nil, err
	}
	c.Share(v.chunks)
	t = &metaTar{v: v, c: c, known: map[int]start{}}
	h, err := pax.NewReader(bufio.NewReader(c.Reader(ctx, 0))).Next()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p, err)
	}
	t.first = strings.TrimSuffix(h.Name, "/")
	v.mu.Lock()
	v.metas[p] = t
	v.mu.Unlock()
	return t, nil
}

// comparePaths orders names as the archives do: component by component, byte by byte.
func comparePaths(a, b string) int {
	for i := 0; i < len(a) && i < len(b); i++ {
		if x, y := a[i], b[i]; x != y {
			switch {
			case x == '/':
				return -1
			case y == '/':
				return 1
			case x < y:
				return -1
			}
			return 1
		}
	}
	return len(a) - len(b)
}

// startOf finds the first entry of a chunk.
func (t *metaTar) startOf(ctx context.Context, no int) (start, error) {
	t.v.mu.Lock()
	s, ok := t.known[no]
	t.v.mu.Unlock()
	if ok {
		return s, nil
	}
	s.off = -1
	var blk [pax.BlockSize]byte
	begin := t.c.start(no)
	for off := (begin + pax.BlockSize - 1) / pax.BlockSize * pax.BlockSize; off+pax.BlockSize <= t.c.ends[no]; off += pax.BlockSize {
		if _, err := t.c.ReadAt(ctx, blk[:], off); err != nil {
			return s, err
		}
		if !isHeader(&blk) {
			continue
		}
		r := pax.NewReader(bufio.NewReaderSize(t.c.Reader(ctx, off), 4096))
		h, err := r.Next()
		if err != nil {
			if ctx.Err() != nil {
				return s, context.Cause(ctx)
			}
			continue // it only looked like one
		}
		if blk[156] != 'x' {
			// Its extended header, with its whole name, may be in the chunk before.
			off += h.Size + (-h.Size & (pax.BlockSize - 1))
			continue
		}
		s = start{off, strings.TrimSuffix(h.Name, "/")}
		break
	}
	t.v.mu.Lock()
	t.known[no] = s
	t.v.mu.Unlock()
	return s, nil
}

// isHeader tells headers from data by their checksum.
func isHeader(b *[pax.BlockSize]byte) bool {
	if !bytes.Equal(b[257:262], []byte("ustar")) {
		return false
	}
	sum, want := int64(8*' '), int64(0)
	for i, c := range b {
		if i < 148 || i >= 156 {
			sum += int64(c)
		}
	}
	for _, c := range b[148:156] {
		if c >= '0' && c <= '7' {
			want = want*8 + int64(c-'0')
		}
	}
	return sum == want
}

// scan calls fn for the entries from the one called from on, until fn returns false.
func (t *metaTar) scan(ctx context.Context, from string, fn func(h *pax.Header, data io.Reader) (bool, error)) error {
	// The last chunk whose first entry is not after from. A chunk without an entry is one with its left neighbour.
	lo, hi, at := 0, len(t.c.ids), int64(0)
	for lo < hi {
		mid := (lo + hi) / 2
		s := start{off: -1}
		k := mid
		for ; k >= lo; k-- {
			var err error
			if s, err = t.startOf(ctx, k); err != nil {
				return err
			}
			if s.off >= 0 {
				break
			}
		}
		switch {
		case s.off < 0:
			lo = mid + 1
		case comparePaths(s.name, from) <= 0:
			at, lo = s.off, mid+1
		default:
			hi = k
		}
	}
	r := pax.NewReader(bufio.NewReaderSize(t.c.Reader(ctx, at), 64<<10))
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		h, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		h.Name = strings.TrimSuffix(h.Name, "/")
		if comparePaths(h.Name, from) < 0 {
			continue
		}
		if more, err := fn(h, r); err != nil || !more {
			return err
		}
	}
}

// errNoEntry is returned when an archive has no such entry.
var errNoEntry = errors.New("the snapshot has no metadata for it")

// entry returns the entry called name with its content.
func (t *metaTar) entry(ctx context.Context, name string) (*pax.Header, []byte, error) {
	var found *pax.Header
	var data []byte
	err := t.scan(ctx, name, func(h *pax.Header, r io.Reader) (bool, error) {
		if h.Name != name {
			return false, nil
		}
		found = h
		var err error
		if p := h.Records[pax.Content]; p != "" {
			var n *snapshot.Node
			if n, err = t.v.lookup(ctx, p); err == nil {
				data, err = t.v.loadMeta(ctx, n, metaLimit)
			}
			return false, err
		}
		data, err = io.ReadAll(io.LimitReader(r, metaLimit))
		return false, err
	})
	if err == nil && found == nil {
		err = errNoEntry
	}
	return found, data, err
}

// Meta returns the server's metadata of an item: grants, tags and all the rest. attrs are all attributes
// with their full names, as they are stored.
//
// Errors: those of ocis.ParseNode; the result is usable with an *ocis.AttributeError.
func (v *View) Meta(ctx context.Context, it *Item) (m ocis.NodeMeta, attrs []ocis.Attribute, err error) {
	s := it.Space
	if s.Posix() {
		for _, x := range it.Node.Xattrs {
			if strings.HasPrefix(x.Name, s.Prefix()) {
				attrs = append(attrs, ocis.Attribute{Key: x.Name, Value: x.Value})
			}
		}
		if m, err = ocis.NodeFromAttributes(s.Prefix(), attrs); m.Offloaded && it.NodeID() != "" {
			t, terr := v.metaTar(ctx, s)
			if terr != nil {
				return m, attrs, terr
			}
			if _, p, terr := t.entry(ctx, t.first+"/.oc-nodes/"+ocis.NodePath(it.NodeID())+".mpk"); terr == nil {
				if more, terr := ocis.ParseMPK(p); terr == nil {
					attrs = append(attrs, more...)
					m, err = ocis.NodeFromAttributes(s.Prefix(), attrs)
				}
			} else if ctx.Err() != nil {
				return m, attrs, context.Cause(ctx)
			}
		}
		return m, attrs, err
	}
	key := it.NodeID()
	switch {
	case key == "":
		return m, nil, errNoEntry
	case it.Kind == Version:
		key = it.VersionKey()
	case it.Kind == Trashed && strings.Count(it.Path, "/") == 1:
		key += ".T." + it.Stamp
	}
	t, err := v.metaTar(ctx, s)
	if err != nil {
		return m, nil, err
	}
	name := t.first + "/nodes/" + ocis.NodePath(key)
	_, p, err := t.entry(ctx, name+".mpk")
	if errors.Is(err, errNoEntry) { // the metadata of oCIS 2 lies in attributes of the node itself
		var h *pax.Header
		if h, _, err = t.entry(ctx, name); err == nil {
			for k, val := range h.Records {
				if n, ok := strings.CutPrefix(k, pax.Xattr); ok {
					attrs = append(attrs, ocis.Attribute{Key: pax.XattrName(n), Value: []byte(val)})
				}
			}
			sort.Slice(attrs, func(i, j int) bool { return attrs[i].Key < attrs[j].Key })
			m, err = ocis.NodeFromAttributes(s.Prefix(), attrs)
			return m, attrs, err
		}
	}
	if err != nil {
		return m, nil, fmt.Errorf("metadata of %q: %w", it.Path, err)
	}
	list, _ := ocis.ParseMPK(p)
	m, err = ocis.ParseNode(s.Prefix(), p)
	return m, list, err
}

// posixTrash is what the record of a trashed item of the posix driver says.
type posixTrash struct{ key, origin string }

// Origin is the path that a trashed item had in its space, without a leading slash.
func (v *View) Origin(ctx context.Context, it *Item) (string, error) {
	if it.Kind != Trashed {
		return it.Path, nil
	}
	parts := strings.SplitN(it.Path, "/", 3)
	if len(parts) < 2 {
		return "", nil
	}
	top := it
	below := ""
	if len(parts) == 3 {
		var err error
		if top, err = v.item(ctx, it.Space, Trashed, parts[0]+"/"+parts[1]); err != nil {
			return "", err
		}
		below = parts[2]
	}
	var origin string
	if it.Space.Posix() {
		infos, err := v.posixTrash(ctx, it.Space)
		if err != nil {
			return "", err
		}
		origin = infos[top.place].origin
	} else {
		m, _, err := v.Meta(ctx, top)
		if err != nil {
			return "", err
		}
		origin = m.TrashOrigin
	}
	if origin == "" {
		return "", nil
	}
	return join(originName(origin), below), nil
}

// TrashKey is how the server's API names a trashed item; "" below one.
func (v *View) TrashKey(ctx context.Context, it *Item) (string, error) {
	if it.Kind != Trashed || strings.Count(it.Path, "/") != 1 {
		return "", nil
	}
	if !it.Space.Posix() {
		return it.NodeID(), nil
	}
	infos, err := v.posixTrash(ctx, it.Space)
	return infos[it.place].key, err
}

// posixTrash reads the records of the trash, by the item's place in the snapshot: capture names items by
// them.
func (v *View) posixTrash(ctx context.Context, s *Space) (map[string]posixTrash, error) {
	v.mu.Lock()
	have := v.origins[s]
	v.mu.Unlock()
	if have != nil {
		return have, nil
	}
	t, err := v.metaTar(ctx, s)
	if err != nil {
		return nil, err
	}
	dir := t.first + "/.Trash/info/"
	type record struct{ place, key, origin string }
	var list []record
	twins := map[string]int{}
	err = t.scan(ctx, dir, func(h *pax.Header, r io.Reader) (bool, error) {
		file, ok := strings.CutPrefix(h.Name, dir)
		if !ok {
			return h.Name == strings.TrimSuffix(dir, "/"), nil
		}
		key, ok := strings.CutSuffix(file, ".trashinfo")
		if !ok || h.Type != '0' {
			return true, nil
		}
		p, err := io.ReadAll(io.LimitReader(r, 1<<20))
		if err != nil {
			return false, err
		}
		info, err := ocis.ParseTrashInfo(p)
		if err != nil {
			return true, nil
		}
		place := info.DeletionDate + "/" + path.Base(info.Path)
		twins[place]++
		list = append(list, record{place, key, info.Path})
		return true, nil
	})
	if err != nil {
		return nil, err
	}
	out := map[string]posixTrash{}
	for _, x := range list {
		if twins[x.place] > 1 {
			x.place += " (" + x.key + ")"
		}
		out[x.place] = posixTrash{x.key, x.origin}
	}
	v.mu.Lock()
	v.origins[s] = out
	v.mu.Unlock()
	return out, nil
}

// Member is somebody who has access to a space or an item.
type Member struct {
	ocis.Grant
	// Name is that of the user or group; the id if the snapshot does not tell it.
	Name string
	// Role is manager, editor, viewer, none (denied) or other.
	Role string
}

// Members lists who has access to an item by its own grants: of a space's root, its members.
func (v *View) Members(ctx context.Context, it *Item) ([]Member, error) {
	m, _, err := v.Meta(ctx, it)
	var ae *ocis.AttributeError
	if err != nil && !errors.As(err, &ae) {
		return nil, err
	}
	who, err := v.Identities(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]Member, 0, len(m.Grants))
	for _, g := range m.Grants {
		x := Member{Grant: g, Name: who.User(g.Principal).Name, Role: role(g)}
		if g.Group {
			x.Name = who.Group(g.Principal)
		}
		out = append(out, x)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Principal < out[j].Principal })
	return out, nil
}

// role names what a grant allows.
func role(g ocis.Grant) string {
	has := func(c string) bool { return strings.Contains(g.Permissions, c) }
	switch {
	case g.Deny:
		return "none"
	case has("C") && has("o"):
		return "manager"
	case has("w"):
		return "editor"
	case has("r") && has("x"), has("r"):
		return "viewer"
	}
	return "other"
}
