package browse

import (
	"context"
	"errors"
	"fmt"
	"path"
	"sort"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Kind tells what an item is to its users.
type Kind string

// The kinds of items.
const (
	Current Kind = "file" // what the space shows, folders as well
	Version Kind = "version"
	Trashed Kind = "trash"
)

// Item is one file or folder of a space: current, an older version, or in the trash.
type Item struct {
	Space *Space
	Kind  Kind
	// Path in the space, without a slash at either end; "" is the root. That of a version is the path of
	// its file. Trashed items have the time of deletion before: 2026-11-20T14:00:00Z/Reports/a.txt.
	Path string
	// Stamp is the time in the name of a version, and that of the deletion of a trashed item, as the server wrote it.
	Stamp string
	// Of is the kind of the file that a version belongs to.
	Of   Kind
	Node *snapshot.Node
	name string // a hostile one may hold slashes
	// place is the path in the snapshot's trees; it differs from Path where a file of the posix driver is
	// shown under another name than it has.
	place string
}

// IsDir tells folders from files.
func (it *Item) IsDir() bool { return it.Node.Type == snapshot.Dir }

// Name is the last part of the path; of the root, the name of the space.
func (it *Item) Name() string { return it.name }

// NodeID is the server's id of the item; "" if the snapshot has none.
func (it *Item) NodeID() string {
	s, _ := it.Node.Attr(snapshot.AttrID)
	return s
}

// SHA1 is what the server recorded for the content, hexadecimal; "" for folders and most empty files.
func (it *Item) SHA1() string {
	s, _ := it.Node.Attr(snapshot.AttrSHA1)
	return s
}

// VersionKey is how the server's API names a version; "" for other items.
func (it *Item) VersionKey() string {
	if it.Kind != Version {
		return ""
	}
	return it.NodeID() + ".REV." + it.Stamp
}

// split cuts a path into its folder and its last name. Names are raw: only the slash means something.
func split(p string) (dir, name string) {
	if i := strings.LastIndexByte(p, '/'); i >= 0 {
		return p[:i], p[i+1:]
	}
	return "", p
}

func join(dir, name string) string {
	if dir == "" {
		return name
	}
	if name == "" {
		return dir
	}
	return dir + "/" + name
}

// plain tells whether s can be the name of one file.
func plain(s string) bool {
	return s != "" && s != "." && s != ".." && !strings.ContainsAny(s, "/\x00")
}

// shownName is the name that the server shows for n, a node of the tree t. The posix driver keeps names in an
// attribute, which differs from that of the file where the server forgot to change it, as after bringing a file
// back from the trash under another name. Where both names would be one, those of the files hold.
func shownName(s *Space, t *snapshot.Tree, n *snapshot.Node) string {
	if !s.Posix() {
		return n.Name
	}
	name, ok := n.Attr(s.Prefix() + "name")
	if !ok || name == n.Name || !plain(name) {
		return n.Name
	}
	for _, other := range t.Nodes {
		if o, _ := other.Attr(s.Prefix() + "name"); other != n && (other.Name == name || o == name) {
			return n.Name
		}
	}
	return name
}

// child finds the node that is shown as name.
func child(s *Space, t *snapshot.Tree, name string) *snapshot.Node {
	if n := t.Find(name); n != nil || !s.Posix() {
		return n
	}
	for _, n := range t.Nodes {
		if o, _ := n.Attr(s.Prefix() + "name"); o == name && shownName(s, t, n) == name {
			return n
		}
	}
	return nil
}

// Item finds the file or folder p of a space.
//
// Errors: *AddressError.
func (v *View) Item(ctx context.Context, s *Space, p string) (*Item, error) {
	return v.item(ctx, s, Current, p)
}

// TrashItem finds an item in the trash. p begins with the time of deletion, as in Item.Path, or is the
// node id of what was deleted, its name or its former path if only one deleted item has that.
//
// Errors: *AddressError.
func (v *View) TrashItem(ctx context.Context, s *Space, p string) (*Item, error) {
	p = strings.Trim(p, "/")
	it, err := v.item(ctx, s, Trashed, p)
	if !errors.Is(err, snapshot.ErrNoSuchPath) || p == "" {
		return it, err
	}
	all, lerr := v.Trash(ctx, s)
	if lerr != nil {
		return nil, lerr
	}
	var found []*Item
	rest := ""
	for _, t := range all {
		names := []string{t.NodeID(), t.Name()}
		if o, err := v.Origin(ctx, t); err == nil {
			names = append(names, o)
		}
		for _, n := range names {
			if r, ok := beneath(p, n); ok && n != "" {
				found, rest = append(found, t), r
				break
			}
		}
	}
	switch {
	case len(found) == 0:
		return nil, err
	case len(found) > 1:
		var list []string
		for _, t := range found {
			list = append(list, t.Path)
		}
		return nil, v.noSuch(s.Folder+"/"+p, fmt.Sprintf("the trash has %d items of this name", len(found)), "Name one by its time: "+strings.Join(list, ", ")+".")
	case rest == "":
		return found[0], nil
	}
	return v.item(ctx, s, Trashed, join(found[0].Path, rest))
}

func tops(k Kind) (top, versions string) {
	if k == Trashed {
		return "trash", "trash-versions"
	}
	return "spaces", "versions"
}

func (v *View) item(ctx context.Context, s *Space, k Kind, p string) (*Item, error) {
	p = strings.Trim(p, "/")
	top, _ := tops(k)
	it := &Item{Space: s, Kind: k, Path: p, name: s.Name}
	n, err := v.lookup(ctx, s.in(top))
	for name := range strings.SplitSeq(p, "/") {
		if err != nil {
			break
		}
		if name == "" {
			continue
		}
		if n.Type != snapshot.Dir {
			err = snapshot.ErrNoSuchPath
			break
		}
		var t *snapshot.Tree
		if t, err = v.tree(ctx, n.Subtree); err != nil {
			break
		}
		if n = child(s, t, name); n == nil {
			err = snapshot.ErrNoSuchPath
			break
		}
		it.place, it.name = join(it.place, n.Name), name
	}
	if errors.Is(err, snapshot.ErrNoSuchPath) {
		hint := "`holdfast find NAME` looks into all snapshots, versions and trash."
		if k == Trashed {
			hint = fmt.Sprintf("`holdfast ls --trash SNAPSHOT:%s` lists what is in the trash.", s.Folder)
		}
		return nil, v.noSuch(join(s.Folder, p), "no such file or folder", hint)
	}
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", v.sn.ID().Short(), err)
	}
	it.Node = n
	if k == Trashed {
		it.Stamp, _, _ = strings.Cut(p, "/")
	}
	return it, nil
}

// List returns what is in a folder, sorted by name. Of the root of the trash it gives the times of deletion:
// see Trash for the items.
func (v *View) List(ctx context.Context, it *Item) ([]*Item, error) {
	if !it.IsDir() {
		return nil, fmt.Errorf("%q is no folder", it.Path)
	}
	t, err := v.tree(ctx, it.Node.Subtree)
	if err != nil {
		return nil, fmt.Errorf("%q: %w", it.Path, err)
	}
	out := make([]*Item, len(t.Nodes))
	items := make([]Item, len(t.Nodes))
	for i, n := range t.Nodes {
		name := shownName(it.Space, t, n)
		items[i] = Item{
			Space: it.Space, Kind: it.Kind, Path: join(it.Path, name), Stamp: it.Stamp, Node: n, place: join(it.place, n.Name), name: name,
		}
		if it.Kind == Trashed && it.Path == "" {
			items[i].Stamp = n.Name
		}
		out[i] = &items[i]
	}
	return out, nil
}

// NamedNode is a node with the name that it is shown by.
type NamedNode struct {
	Name string
	Node *snapshot.Node
}

// Part is the folder of a space below spaces, versions or trash of its store; nil if there is none.
func (v *View) Part(ctx context.Context, s *Space, top string) (*snapshot.Node, error) {
	n, err := v.lookup(ctx, s.in(top))
	if errors.Is(err, snapshot.ErrNoSuchPath) || err == nil && n.Type != snapshot.Dir {
		return nil, nil
	}
	return n, err
}

// Nodes lists a folder below a Part. It is List for those who need no more than nodes.
func (v *View) Nodes(ctx context.Context, s *Space, dir *snapshot.Node) ([]NamedNode, error) {
	t, err := v.tree(ctx, dir.Subtree)
	if err != nil {
		return nil, err
	}
	out := make([]NamedNode, len(t.Nodes))
	for i, n := range t.Nodes {
		out[i] = NamedNode{shownName(s, t, n), n}
	}
	return out, nil
}

// Trash lists the deleted items of a space, oldest first.
func (v *View) Trash(ctx context.Context, s *Space) ([]*Item, error) {
	root, err := v.item(ctx, s, Trashed, "")
	if errors.Is(err, snapshot.ErrNoSuchPath) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	stamps, err := v.List(ctx, root)
	if err != nil {
		return nil, err
	}
	var out []*Item
	for _, st := range stamps {
		if !st.IsDir() {
			continue
		}
		list, err := v.List(ctx, st)
		if err != nil {
			return nil, err
		}
		out = append(out, list...)
	}
	return out, nil
}

// Versions lists the older versions of a file, oldest first. Folders have none.
func (v *View) Versions(ctx context.Context, it *Item) ([]*Item, error) {
	if it.Node.Type != snapshot.File || it.Kind == Version {
		return nil, nil
	}
	_, top := tops(it.Kind)
	n, err := v.lookup(ctx, it.Space.in(top)+"/"+it.place)
	if errors.Is(err, snapshot.ErrNoSuchPath) || err == nil && n.Type != snapshot.Dir {
		if it.Kind == Trashed && it.Space.Posix() {
			return v.posixVersions(ctx, it)
		}
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return v.versionsIn(ctx, it, n, "")
}

// posixVersions finds the versions of a trashed file of the posix driver: no folder of the trash has
// them, so capture keeps them by id.
func (v *View) posixVersions(ctx context.Context, it *Item) ([]*Item, error) {
	nodeID := it.NodeID()
	n, err := v.lookup(ctx, "/storage/"+it.Space.Store+"/unreferenced/"+snapshot.SafeName(it.Space.ID))
	if errors.Is(err, snapshot.ErrNoSuchPath) || nodeID == "" || err == nil && n.Type != snapshot.Dir {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return v.versionsIn(ctx, it, n, nodeID+".REV.")
}

// versionsIn lists the versions of a file in the folder dir, where their names are prefix and time.
func (v *View) versionsIn(ctx context.Context, it *Item, dir *snapshot.Node, prefix string) ([]*Item, error) {
	t, err := v.tree(ctx, dir.Subtree)
	if err != nil {
		return nil, err
	}
	var out []*Item
	for _, n := range t.Nodes {
		if stamp, ok := strings.CutPrefix(n.Name, prefix); ok && n.Type == snapshot.File {
			out = append(out, &Item{Space: it.Space, Kind: Version, Of: it.Kind, Path: it.Path, Stamp: stamp, Node: withID(n, it.NodeID()), place: it.place, name: it.Name()})
		}
	}
	sortVersions(out)
	return out, nil
}

// withID gives a node an id that it does not bear itself: versions of the posix driver have only their
// file's.
func withID(n *snapshot.Node, nodeID string) *snapshot.Node {
	if _, ok := n.Attr(snapshot.AttrID); ok || nodeID == "" {
		return n
	}
	m := *n
	m.Xattrs = append([]snapshot.Xattr{{Name: snapshot.AttrID, Value: []byte(nodeID)}}, n.Xattrs...)
	return &m
}

// sortVersions sorts by time: names do not sort as times, because fractions end where their zeros begin.
func sortVersions(list []*Item) {
	sort.SliceStable(list, func(i, j int) bool {
		a, n, ok := ocis.ParseStamp(list[i].Stamp)
		b, m, ok2 := ocis.ParseStamp(list[j].Stamp)
		if !ok || !ok2 {
			return list[i].Stamp < list[j].Stamp
		}
		if !a.Equal(b) {
			return a.Before(b)
		}
		return n < m
	})
}

// Version picks the version of a file that when names: as it stands in the list, the beginning of that, or
// a time, which is that of the last version before it.
//
// Errors: *AddressError.
func (v *View) Version(ctx context.Context, it *Item, when string, loc *time.Location) (*Item, error) {
	list, err := v.Versions(ctx, it)
	if err != nil {
		return nil, err
	}
	what := join(it.Space.Folder, it.Path)
	hint := "`holdfast ls --versions` lists the versions of a file."
	var found []*Item
	for _, x := range list {
		if x.Stamp == when {
			return x, nil
		}
		if when != "" && strings.HasPrefix(x.Stamp, when) {
			found = append(found, x)
		}
	}
	if len(found) == 1 {
		return found[0], nil
	}
	if t, ok := snapshot.ParseTime(when, loc); ok {
		for i := len(list) - 1; i >= 0; i-- {
			if at, _, ok := ocis.ParseStamp(list[i].Stamp); ok && !at.After(t) {
				return list[i], nil
			}
		}
	} else if len(found) > 1 {
		return nil, v.noSuch(what, fmt.Sprintf("%d versions begin with %q", len(found), when), hint)
	}
	return nil, v.noSuch(what, fmt.Sprintf("there is no version %q", when), hint)
}

// CountVersions counts the versions of the files in a folder, by the names of their nodes. Files without are
// left out.
func (v *View) CountVersions(ctx context.Context, dir *Item) (map[string]int, error) {
	_, top := tops(dir.Kind)
	n, err := v.lookup(ctx, dir.Space.in(top)+"/"+dir.place)
	if errors.Is(err, snapshot.ErrNoSuchPath) || err == nil && n.Type != snapshot.Dir {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	t, err := v.tree(ctx, n.Subtree)
	if err != nil {
		return nil, err
	}
	out := map[string]int{}
	for _, d := range t.Nodes {
		if d.Type != snapshot.Dir {
			continue
		}
		vt, err := v.tree(ctx, d.Subtree)
		if err != nil {
			return nil, err
		}
		for _, n := range vt.Nodes {
			if n.Type == snapshot.File {
				out[d.Name]++
			}
		}
	}
	return out, nil
}

// FileID is the id as users' tools know it, <mount id>$<space id>!<node id>; without the mount id if
// the snapshot does not tell it; "" for items without an id.
func (v *View) FileID(ctx context.Context, it *Item) string {
	n := it.NodeID()
	if n == "" {
		return ""
	}
	out := it.Space.ID + "!" + n
	if m := v.MountID(ctx, it.Space.Store); m != "" {
		out = m + "$" + out
	}
	return out
}

// treeCache keeps a few decoded trees: walking down the same folders again and again is what browsing does.
// It is bounded by the number of nodes, at about 1 KiB each.
type treeCache struct {
	order []id.ID // oldest first
	byID  map[id.ID]*snapshot.Tree
	nodes int
}

const treeCacheNodes = 20000

func (v *View) tree(ctx context.Context, d id.ID) (*snapshot.Tree, error) {
	v.mu.Lock()
	t := v.trees.byID[d]
	v.mu.Unlock()
	if t != nil {
		return t, nil
	}
	t, err := snapshot.LoadTree(ctx, v.repo, d)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	c := &v.trees
	if c.byID[d] == nil && len(t.Nodes) <= treeCacheNodes/2 {
		if c.byID == nil {
			c.byID = map[id.ID]*snapshot.Tree{}
		}
		c.byID[d] = t
		c.order = append(c.order, d)
		c.nodes += len(t.Nodes) + 1
		for c.nodes > treeCacheNodes {
			old := c.order[0]
			c.order = c.order[1:]
			c.nodes -= len(c.byID[old].Nodes) + 1
			delete(c.byID, old)
		}
	}
	return t, nil
}

// originName is the former path without its leading slash.
func originName(s string) string { return strings.TrimPrefix(path.Clean("/"+s), "/") }
