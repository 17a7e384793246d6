package browse

import (
	"context"
	"errors"
	"slices"
	"sort"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Change is one difference between two snapshots, in users' terms.
type Change struct {
	What string // one of the words below
	// Space is the space as it is in the newer snapshot, or was if it is gone.
	Space *Space
	// From and To are paths in the space: From of what was deleted, renamed or moved, To of all else.
	From, To string
	Dir      bool
	NodeID   string
	// Was and Is are sizes in bytes.
	Was, Is uint64
	// Below counts what was renamed or moved along with a folder, or shares the fate of a space.
	Below int
	// InTrash: what was deleted is in the trash.
	InTrash bool
	// With is who gained or lost access: a name, or "" for a public link.
	With string
	Link bool
}

// What can have happened.
const (
	Added         = "added"
	Changed       = "changed"
	Renamed       = "renamed"
	Moved         = "moved"
	Deleted       = "deleted"
	Shared        = "shared"
	Unshared      = "unshared"
	SpaceAdded    = "space added"
	SpaceDeleted  = "space deleted"
	SpaceRenamed  = "space renamed"
	SpaceDisabled = "space disabled"
	SpaceEnabled  = "space enabled"
	MemberAdded   = "member added"
	MemberRemoved = "member removed"
)

// Diff reports what users did between the snapshots a and b, space by space. in picks spaces; nil is all.
// Memory follows the number of changes in one space.
func Diff(ctx context.Context, a, b *View, in func(*Space) bool, fn func(*Change) error) error {
	old := map[string]*Space{}
	for _, s := range a.Spaces() {
		old[s.Store+"/"+s.ID] = s
	}
	was, err := a.sharesBySpace(ctx)
	if err != nil {
		return err
	}
	is, err := b.sharesBySpace(ctx)
	if err != nil {
		return err
	}
	for _, s := range b.Spaces() {
		o := old[s.Store+"/"+s.ID]
		delete(old, s.Store+"/"+s.ID)
		if in != nil && !in(s) {
			continue
		}
		if err := diffSpace(ctx, a, o, b, s, fn); err != nil {
			return err
		}
		if err := diffShares(ctx, a, o, was[s.ID], b, s, is[s.ID], fn); err != nil {
			return err
		}
	}
	var gone []*Space
	for _, o := range old {
		if in == nil || in(o) {
			gone = append(gone, o)
		}
	}
	sort.Slice(gone, func(i, j int) bool { return gone[i].Folder < gone[j].Folder })
	for _, o := range gone {
		if err := fn(&Change{What: SpaceDeleted, Space: o, Below: int(o.Files), Was: uint64(o.Bytes)}); err != nil {
			return err
		}
	}
	return nil
}

func (v *View) sharesBySpace(ctx context.Context) (map[string]map[string]Share, error) {
	list, err := v.Shares(ctx, "")
	if err != nil {
		return nil, err
	}
	out := map[string]map[string]Share{}
	for _, s := range list {
		if out[s.SpaceID] == nil {
			out[s.SpaceID] = map[string]Share{}
		}
		out[s.SpaceID][s.ID] = s
	}
	return out, nil
}

// diffSpace reports what happened to a space and to what is in it; o is nil for a new one.
func diffSpace(ctx context.Context, a *View, o *Space, b *View, s *Space, fn func(*Change) error) error {
	tell := func(what string) error {
		return fn(&Change{What: what, Space: s, From: nameOf(o), To: s.Name})
	}
	switch {
	case o == nil:
		if err := tell(SpaceAdded); err != nil {
			return err
		}
	case o.Name != s.Name:
		if err := tell(SpaceRenamed); err != nil {
			return err
		}
	}
	if s.Disabled != "" && (o == nil || o.Disabled == "") {
		if err := tell(SpaceDisabled); err != nil {
			return err
		}
	} else if s.Disabled == "" && o != nil && o.Disabled != "" {
		if err := tell(SpaceEnabled); err != nil {
			return err
		}
	}
	came, went := map[string]*Entry{}, map[string]*Entry{} // by id, or by path what has none
	key := func(e *Entry) string {
		if e.NodeID != "" {
			return e.NodeID
		}
		return "/" + e.Path
	}
	var list []*Change
	err := compareSpace(ctx, b.repo, a, o, b, s, []string{"spaces"}, func(was, is *Entry) error {
		if was != nil && is != nil && was.Path == is.Path && was.NodeID == is.NodeID && was.Dir == is.Dir {
			// The time of a folder is that of what is in it.
			if !is.Dir {
				list = append(list, &Change{What: Changed, Space: s, To: is.Path, NodeID: is.NodeID, Was: was.Size, Is: is.Size})
			}
			return nil
		}
		if was != nil {
			went[key(was)] = was
		}
		if is != nil {
			came[key(is)] = is
		}
		return nil
	})
	if err != nil {
		return err
	}
	trashed := map[string]bool{}
	if len(went) > 0 {
		items, err := b.Trash(ctx, s)
		if err != nil {
			return err
		}
		for _, t := range items {
			trashed[t.NodeID()] = true
		}
	}
	// Folders that moved take along what is in them.
	folders := map[string]*Change{} // by former path
	var moved []*Change
	for k, was := range went {
		is := came[k]
		if is == nil || is.Dir != was.Dir {
			continue
		}
		c := &Change{What: Moved, Space: s, From: was.Path, To: is.Path, Dir: is.Dir, NodeID: is.NodeID, Was: was.Size, Is: is.Size}
		if d, _ := split(was.Path); d == dirOf(is.Path) {
			c.What = Renamed
		}
		moved = append(moved, c)
		if c.Dir {
			folders[c.From] = c
		}
		if !is.Dir && (was.SHA1 != is.SHA1 || was.Size != is.Size) {
			list = append(list, &Change{What: Changed, Space: s, To: is.Path, NodeID: is.NodeID, Was: was.Size, Is: is.Size})
		}
		delete(went, k)
		delete(came, k)
	}
	for _, c := range moved {
		dir, name := split(c.From)
		if f := folders[dir]; f != nil && join(f.To, name) == c.To {
			for dir != "" { // to the outermost folder that moved as a whole
				up, base := split(dir)
				g := folders[up]
				if g == nil || join(g.To, base) != f.To {
					break
				}
				dir, f = up, g
			}
			f.Below++
			continue
		}
		list = append(list, c)
	}
	gone := map[string]bool{} // folders that are in the trash
	for _, e := range went {
		if e.Dir && trashed[e.NodeID] {
			gone[e.Path] = true
		}
	}
	inTrash := func(e *Entry) bool {
		for d := e.Path; d != ""; d = dirOf(d) {
			if gone[d] {
				return true
			}
		}
		return trashed[e.NodeID]
	}
	for _, e := range went {
		list = append(list, &Change{What: Deleted, Space: s, From: e.Path, Dir: e.Dir, NodeID: e.NodeID, Was: e.Size, InTrash: inTrash(e)})
	}
	for _, e := range came {
		if e.Path != "" {
			list = append(list, &Change{What: Added, Space: s, To: e.Path, Dir: e.Dir, NodeID: e.NodeID, Is: e.Size})
		}
	}
	sort.SliceStable(list, func(i, j int) bool {
		x, y := first(list[i].To, list[i].From), first(list[j].To, list[j].From)
		if x != y {
			return comparePaths(x, y) < 0
		}
		return list[i].What < list[j].What
	})
	for _, c := range list {
		if err := fn(c); err != nil {
			return err
		}
	}
	return nil
}

func nameOf(s *Space) string {
	if s == nil {
		return ""
	}
	return s.Name
}

func dirOf(p string) string { d, _ := split(p); return d }

// diffShares reports who gained or lost access.
func diffShares(ctx context.Context, a *View, o *Space, was map[string]Share, b *View, s *Space, is map[string]Share, fn func(*Change) error) error {
	tell := func(what string, v *View, in *Space, x Share) error {
		c := &Change{What: what, Space: s, NodeID: x.NodeID, Link: x.Link}
		switch {
		case x.Link:
		default:
			who, err := v.Identities(ctx)
			if who == nil {
				return err
			}
			if x.Group {
				c.With = who.Group(x.With)
			} else {
				c.With = who.User(x.With).Name
			}
		}
		p, ok, err := v.PathOf(ctx, in, x.NodeID)
		if err != nil {
			return err
		}
		if c.To = p; !ok {
			c.To = "(id " + x.NodeID + ")"
		}
		return fn(c)
	}
	for _, id := range sortedKeys(is) {
		if _, ok := was[id]; !ok {
			if err := tell(Shared, b, s, is[id]); err != nil {
				return err
			}
		}
	}
	for _, id := range sortedKeys(was) {
		if _, ok := is[id]; !ok && o != nil {
			if err := tell(Unshared, a, o, was[id]); err != nil {
				return err
			}
		}
	}
	if same, err := sameMeta(ctx, a, o, b, s); same || err != nil {
		return err
	}
	before, err := members(ctx, a, o)
	if err != nil {
		return err
	}
	now, err := members(ctx, b, s)
	if err != nil {
		return err
	}
	for _, id := range sortedKeys(now) {
		if _, ok := before[id]; !ok && o != nil {
			if err := fn(&Change{What: MemberAdded, Space: s, With: now[id].Name}); err != nil {
				return err
			}
		}
	}
	for _, id := range sortedKeys(before) {
		if _, ok := now[id]; !ok {
			if err := fn(&Change{What: MemberRemoved, Space: s, With: before[id].Name}); err != nil {
				return err
			}
		}
	}
	return nil
}

// sameMeta tells whether the archives with the metadata of a space are the same: then so are its members.
func sameMeta(ctx context.Context, a *View, o *Space, b *View, s *Space) (bool, error) {
	if o == nil || s.Posix() {
		return false, nil
	}
	x, err := a.lookup(ctx, o.metaPath())
	if err == nil {
		var y *snapshot.Node
		if y, err = b.lookup(ctx, s.metaPath()); err == nil {
			return x.Size == y.Size && slices.Equal(x.Content, y.Content), nil
		}
	}
	if errors.Is(err, snapshot.ErrNoSuchPath) {
		err = nil
	}
	return false, err
}

// members are those of a space by id; none if there is no such space, or it does not tell.
func members(ctx context.Context, v *View, s *Space) (map[string]Member, error) {
	out := map[string]Member{}
	if s == nil {
		return out, nil
	}
	root, err := v.Item(ctx, s, "")
	if err == nil {
		var list []Member
		if list, err = v.Members(ctx, root); err == nil {
			for _, m := range list {
				out[m.Principal] = m
			}
		}
	}
	if errors.Is(err, snapshot.ErrNoSuchPath) || errors.Is(err, errNoEntry) {
		err = nil
	}
	return out, err
}

func sortedKeys[T any](m map[string]T) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, strings.Compare)
	return keys
}
