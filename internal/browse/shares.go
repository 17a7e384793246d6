package browse

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sort"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Share is one share of an item, as the server's own list has it.
type Share struct {
	ID      string
	SpaceID string
	NodeID  string
	Link    bool   // a public link
	Group   bool   // With is a group
	With    string // user or group id; of a link what it is called, which may be nothing

	// Of a link.
	LinkType string    // view, upload, edit, createOnly, internal, as the server's API calls them; "" is another one
	Password bool      // it has one; the server keeps only its hash
	Quick    bool      // the one that the web client copies
	Expires  time.Time // zero is never
}

// linkType tells what a link allows, by the rights that are stored with it.
func linkType(may map[string]bool) string {
	get, put := may["initiateFileDownload"], may["initiateFileUpload"]
	any := false
	for _, v := range may {
		any = any || v
	}
	switch {
	case !any:
		return "internal" // for whoever has rights of their own
	case put && !get:
		return "createOnly"
	case put && (may["delete"] || may["move"] || !may["createContainer"]):
		return "edit"
	case put:
		return "upload"
	case get:
		return "view"
	}
	return ""
}

// publicShares is the space with the records of public links.
const publicShares = "jsoncs3-public-share-manager-metadata"

// sharesLimit bounds a list of shares, in bytes: it has about 1 KiB for each.
const sharesLimit = 256 << 20

// Shares lists shares with users and groups and public links of the space called spaceID; "" is all spaces.
func (v *View) Shares(ctx context.Context, spaceID string) ([]Share, error) {
	var out []Share
	if s := v.SpaceByID(shareManager); s != nil {
		mounts, err := v.listOrNone(ctx, s, "storages")
		if err != nil {
			return nil, err
		}
		for _, m := range mounts {
			files, err := v.listOrNone(ctx, s, m.Path)
			if err != nil {
				return nil, err
			}
			for _, f := range files {
				in, ok := strings.CutSuffix(f.Name(), ".json")
				if !ok || f.IsDir() || spaceID != "" && in != spaceID {
					continue
				}
				if out, err = v.userShares(ctx, f, out); err != nil {
					return nil, err
				}
			}
		}
	}
	if s := v.SpaceByID(publicShares); s != nil {
		it, err := v.Item(ctx, s, "publicshares.json")
		if err != nil && !errors.Is(err, snapshot.ErrNoSuchPath) {
			return nil, err
		}
		if err == nil {
			if out, err = v.links(ctx, it, spaceID, out); err != nil {
				return nil, err
			}
		}
	}
	sort.SliceStable(out, func(i, j int) bool { return out[i].ID < out[j].ID })
	return out, nil
}

func (v *View) listOrNone(ctx context.Context, s *Space, p string) ([]*Item, error) {
	it, err := v.Item(ctx, s, p)
	if errors.Is(err, snapshot.ErrNoSuchPath) || err == nil && !it.IsDir() {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return v.List(ctx, it)
}

func (v *View) userShares(ctx context.Context, f *Item, out []Share) ([]Share, error) {
	p, err := v.loadMeta(ctx, f.Node, sharesLimit)
	if err != nil {
		return nil, err
	}
	type principal struct {
		OpaqueID string `json:"opaque_id"`
	}
	var list struct {
		Shares map[string]struct {
			Resource struct {
				Space  string `json:"space_id"`
				Opaque string `json:"opaque_id"`
			} `json:"resource_id"`
			Grantee struct {
				ID struct{ UserID, GroupID *principal } `json:"Id"`
			} `json:"grantee"`
		}
	}
	if err := json.Unmarshal(p, &list); err != nil {
		return nil, fmt.Errorf("the list of shares %q: %w", f.Path, err)
	}
	for id, s := range list.Shares {
		x := Share{ID: id, SpaceID: s.Resource.Space, NodeID: s.Resource.Opaque}
		if g := s.Grantee.ID.GroupID; g != nil {
			x.Group, x.With = true, g.OpaqueID
		} else if u := s.Grantee.ID.UserID; u != nil {
			x.With = u.OpaqueID
		}
		out = append(out, x)
	}
	return out, nil
}

func (v *View) links(ctx context.Context, f *Item, spaceID string, out []Share) ([]Share, error) {
	p, err := v.loadMeta(ctx, f.Node, sharesLimit)
	if err != nil {
		return nil, err
	}
	var list map[string]struct {
		Share    string `json:"share"` // JSON in JSON
		Password string `json:"password"`
	}
	if err := json.Unmarshal(p, &list); err != nil {
		return nil, fmt.Errorf("the list of public links: %w", err)
	}
	for id, s := range list {
		var l struct {
			Resource struct{ SpaceID, OpaqueID string }    `json:"resourceId"`
			Name     string                                `json:"displayName"`
			May      struct{ Permissions map[string]bool } `json:"permissions"`
			Quick    bool                                  `json:"quicklink"`
			Expires  *struct {
				Seconds int64 `json:"seconds,string"`
			} `json:"expiration"`
		}
		if json.Unmarshal([]byte(s.Share), &l) != nil || spaceID != "" && l.Resource.SpaceID != spaceID {
			continue
		}
		x := Share{
			ID: id, SpaceID: l.Resource.SpaceID, NodeID: l.Resource.OpaqueID, Link: true, With: l.Name,
			LinkType: linkType(l.May.Permissions), Password: s.Password != "", Quick: l.Quick,
		}
		if l.Expires != nil {
			x.Expires = time.Unix(l.Expires.Seconds, 0).UTC()
		}
		out = append(out, x)
	}
	return out, nil
}

// PathOf finds the path of the item with a node id, by way of its parents. ok is false if it is not in the
// space's folders, as in the trash.
func (v *View) PathOf(ctx context.Context, s *Space, nodeID string) (p string, ok bool, err error) {
	if nodeID == s.ID {
		return "", true, nil
	}
	if s.Posix() {
		return v.pathByWalk(ctx, s, nodeID)
	}
	t, err := v.metaTar(ctx, s)
	if err != nil {
		return "", false, err
	}
	for at, n := nodeID, 0; at != s.ID; n++ {
		_, data, err := t.entry(ctx, t.first+"/nodes/"+ocis.NodePath(at)+".mpk")
		if errors.Is(err, errNoEntry) || n > maxDepth {
			return "", false, nil
		}
		if err != nil {
			return "", false, err
		}
		m, _ := ocis.ParseNode(s.Prefix(), data)
		if m.ParentID == "" || !plain(m.Name) {
			return "", false, nil
		}
		p = join(m.Name, p)
		at = m.ParentID
	}
	// What the item says of itself, and what its folder says, can differ in a damaged store.
	it, err := v.Item(ctx, s, p)
	if errors.Is(err, snapshot.ErrNoSuchPath) || err == nil && it.NodeID() != nodeID {
		return "", false, nil
	}
	return p, err == nil, err
}

var errFound = errors.New("found")

// pathByWalk looks at all items of a space: nothing else tells where an id is.
func (v *View) pathByWalk(ctx context.Context, s *Space, nodeID string) (p string, ok bool, err error) {
	err = compareSpace(ctx, v.repo, nil, nil, v, s, []string{"spaces"}, func(_, is *Entry) error {
		if is.NodeID == nodeID {
			p = is.Path
			return errFound
		}
		return nil
	})
	if errors.Is(err, errFound) {
		return p, true, nil
	}
	return "", false, err
}
