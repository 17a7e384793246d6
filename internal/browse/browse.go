// Package browse shows a snapshot as people know it: spaces with their names and owners, folders,
// files, versions, the trash. It reads the repository and prints nothing.
//
// A View is one snapshot; an Item is one file, folder, version or trashed item in it. What is asked of a
// View costs a few trees, so that it answers at once on stores of any size. A View may be used by several
// goroutines at once.
package browse

import (
	"context"
	"errors"
	"fmt"
	"path"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Repo is what browsing needs of a repository. *repo.Repository is one.
type Repo interface {
	snapshot.BlobLoader
	Size(t repo.BlobType, blob id.ID) (plain int64, ok bool)
	LoadBlobs(ctx context.Context, t repo.BlobType, ids []id.ID, fn func(blob id.ID, data []byte) error) error
}

// systemStore holds settings and shares in spaces that no user sees.
const systemStore = "system"

// metaChunks bounds what is kept of the archives with metadata, in bytes: 32 of their largest chunks.
const metaChunks = 16 << 20

// View is one snapshot, opened for people.
type View struct {
	repo   Repo
	sn     *snapshot.Snapshot
	m      *snapshot.Manifest
	root   id.ID
	spaces []*Space
	trees  treeCache
	chunks *ChunkCache // of the archives with metadata

	mu      sync.Mutex
	mount   *string
	people  *Identities
	metas   map[string]*metaTar
	origins map[*Space]map[string]posixTrash
}

// Open reads the manifest of a snapshot. The index of the repository must be loaded.
//
// Errors: ErrForeign for a snapshot of another program.
func Open(ctx context.Context, r Repo, sn *snapshot.Snapshot) (*View, error) {
	if sn.Tree == nil {
		return nil, fmt.Errorf("snapshot %s has no tree", sn.ID().Short())
	}
	m, err := snapshot.LoadManifest(ctx, r, *sn.Tree)
	if errors.Is(err, snapshot.ErrNoSuchPath) {
		return nil, fmt.Errorf("snapshot %s: %w", sn.ID().Short(), ErrForeign)
	}
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", sn.ID().Short(), err)
	}
	v := &View{repo: r, sn: sn, m: m, root: *sn.Tree, chunks: NewChunkCache(metaChunks), metas: map[string]*metaTar{}, origins: map[*Space]map[string]posixTrash{}}
	for i := range m.Stores {
		st := &m.Stores[i]
		for k := range st.Spaces {
			sp := &st.Spaces[k]
			v.spaces = append(v.spaces, &Space{
				ID: sp.ID, Name: sp.Name, Kind: sp.Type, Alias: sp.Alias, OwnerID: sp.Owner, Disabled: sp.Disabled,
				Files: sp.Files, Bytes: sp.Bytes, Folder: sp.Folder, Store: st.Name, store: st,
			})
		}
	}
	sort.SliceStable(v.spaces, func(i, j int) bool {
		a, b := v.spaces[i], v.spaces[j]
		if a.Kind != b.Kind {
			return a.Kind < b.Kind
		}
		return a.Folder < b.Folder
	})
	return v, nil
}

// ErrForeign is returned (wrapped) for snapshots that Holdfast did not make: they have no spaces.
var ErrForeign = errors.New("another program made it, so it has no spaces: give a path that begins with a slash")

// Snapshot is what the View shows.
func (v *View) Snapshot() *snapshot.Snapshot { return v.sn }

// Manifest is that of the snapshot. It must not be changed.
func (v *View) Manifest() *snapshot.Manifest { return v.m }

// Space is one space as the snapshot has it.
type Space struct {
	ID    string
	Name  string // as people see it: Alan Turing, Project Alpha
	Kind  string // personal, project, ...
	Alias string // personal/alan
	// OwnerID is a user's id; the space's own for projects.
	OwnerID  string
	Disabled string // when it was switched off, RFC 3339; "" if it is not
	Files    int64  // without versions and trash
	Bytes    int64
	// Folder is the space's folder below spaces/, versions/ and trash/ of its store. It is the alias unless
	// another space has the same.
	Folder string
	Store  string // users, ...

	store *snapshot.Store
}

// Posix reports whether the files themselves are what the server keeps (driver posix).
func (s *Space) Posix() bool { return s.store.Layout == "posix" }

// Prefix of attribute names in this space, with the final dot.
func (s *Space) Prefix() string { return s.store.Prefix }

// in is the place of the part called top of the space in the snapshot.
func (s *Space) in(top string) string { return "/storage/" + s.Store + "/" + top + "/" + s.Folder }

// Spaces lists the spaces of users, personal ones first, sorted by alias. It must not be changed.
func (v *View) Spaces() []*Space {
	out := make([]*Space, 0, len(v.spaces))
	for _, s := range v.spaces {
		if s.Store != systemStore {
			out = append(out, s)
		}
	}
	return out
}

// SpaceByID returns a space of any store, or nil.
func (v *View) SpaceByID(spaceID string) *Space {
	for _, s := range v.spaces {
		if s.ID == spaceID {
			return s
		}
	}
	return nil
}

// AddressError says that a snapshot has not what was asked for.
type AddressError struct {
	Snapshot string   // short id
	What     string   // as it was asked for
	Why      string   // no such space, ...
	Advice   []string // sentences
}

func (e *AddressError) Error() string {
	return fmt.Sprintf("snapshot %s: %q: %s", e.Snapshot, e.What, e.Why)
}

// Hints says what to do next.
func (e *AddressError) Hints() []string { return e.Advice }

// Is makes every AddressError a snapshot.ErrNoSuchPath.
func (e *AddressError) Is(target error) bool { return target == snapshot.ErrNoSuchPath }

func (v *View) noSuch(what, why string, advice ...string) error {
	return &AddressError{Snapshot: v.sn.ID().Short(), What: what, Why: why, Advice: advice}
}

// idPrefix begins an address that names the space by its id.
const idPrefix = "id:"

// Resolve takes the address SPACE/PATH apart. SPACE is the alias (personal/alan), the space's name, its
// owner's name or login, or id:SPACEID. An alias goes before a name and a name before an owner.
//
// Errors: *AddressError.
func (v *View) Resolve(ctx context.Context, addr string) (*Space, string, error) {
	if rest, ok := strings.CutPrefix(addr, idPrefix); ok {
		for _, s := range v.spaces {
			// Ids hold no slash, except in a damaged store.
			if p, ok := beneath(rest, s.ID); ok && s.ID != "" {
				return s, p, nil
			}
		}
		return nil, "", v.noSuch(addr, "there is no space with this id", spacesHint)
	}
	by := []func(s *Space) []string{
		func(s *Space) []string { return []string{s.Folder} },
		func(s *Space) []string { return []string{s.Alias} },
		func(s *Space) []string { return []string{s.Name} },
		func(s *Space) []string {
			if s.Kind != "personal" {
				return nil
			}
			p, err := v.Identities(ctx)
			if err != nil {
				return nil
			}
			u := p.User(s.OwnerID)
			return []string{u.Login, u.Name, u.Mail, s.OwnerID}
		},
	}
	for _, names := range by {
		var found []*Space
		longest, rest := 0, ""
		for _, s := range v.Spaces() {
			for _, n := range names(s) {
				p, ok := beneath(addr, n)
				if !ok || n == "" || len(n) < longest {
					continue
				}
				if len(n) > longest {
					found = found[:0]
				}
				if len(found) == 0 || found[len(found)-1] != s {
					found = append(found, s)
				}
				longest, rest = len(n), p
			}
		}
		if len(found) == 1 {
			return found[0], rest, nil
		}
		if len(found) > 1 {
			var ids []string
			for _, s := range found {
				ids = append(ids, idPrefix+s.ID)
			}
			return nil, "", v.noSuch(addr, fmt.Sprintf("%d spaces have this name", len(found)), "Name one by its id: "+strings.Join(ids, ", ")+".")
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, "", context.Cause(ctx)
	}
	return nil, "", v.noSuch(addr, "there is no such space", spacesHint)
}

const spacesHint = "`holdfast spaces` lists the spaces of a snapshot. A path that begins with a slash is one in the snapshot itself."

// beneath reports whether addr is name, or a path below it, which it returns.
func beneath(addr, name string) (rest string, ok bool) {
	rest, ok = strings.CutPrefix(addr, name)
	if !ok || rest != "" && rest[0] != '/' {
		return "", false
	}
	return strings.Trim(rest, "/"), true
}

// Lookup finds what the address SPACE/PATH names.
//
// Errors: *AddressError.
func (v *View) Lookup(ctx context.Context, addr string) (*Item, error) {
	sp, p, err := v.Resolve(ctx, addr)
	if err != nil {
		return nil, err
	}
	return v.Item(ctx, sp, p)
}

// LastChange is when something in the space was changed last.
func (v *View) LastChange(ctx context.Context, s *Space) (time.Time, error) {
	it, err := v.Item(ctx, s, "")
	if err != nil {
		return time.Time{}, err
	}
	t := it.Node.ModTime
	if m, _, err := v.Meta(ctx, it); err == nil && m.TMTime.After(t) {
		t = m.TMTime
	}
	return t, nil
}

// lookup finds a path of the snapshot by way of the cache.
func (v *View) lookup(ctx context.Context, p string) (*snapshot.Node, error) {
	n := &snapshot.Node{Type: snapshot.Dir, Subtree: v.root}
	for name := range strings.SplitSeq(strings.Trim(p, "/"), "/") {
		if name == "" {
			continue
		}
		if n.Type != snapshot.Dir {
			return nil, fmt.Errorf("%q: %w", p, snapshot.ErrNoSuchPath)
		}
		t, err := v.tree(ctx, n.Subtree)
		if err != nil {
			return nil, err
		}
		if n = t.Find(name); n == nil {
			return nil, fmt.Errorf("%q: %w", p, snapshot.ErrNoSuchPath)
		}
	}
	return n, nil
}

// Find returns the node at a path of the snapshot itself, such as /config/files.
//
// Errors: snapshot.ErrNoSuchPath.
func (v *View) Find(ctx context.Context, p string) (*snapshot.Node, error) {
	return v.lookup(ctx, path.Clean("/"+p))
}
