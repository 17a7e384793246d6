package consistency

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// The spaces of the system storage that hold the lists of shares.
const (
	userShares   = "jsoncs3-share-manager-metadata"        // storages/<storage id>/<space id>.json
	publicShares = "jsoncs3-public-share-manager-metadata" // publicshares.json
)

func isShareSpace(id string) bool { return id == userShares || id == publicShares }

// shareLimit bounds a list of shares, in bytes: a space with 100,000 shares has less.
const shareLimit = 256 << 20

// shares are the share records of the system storage: about 300 bytes each.
type shares struct {
	st      *storeCheck
	bySpace map[string][]*share
}

type share struct {
	id      string
	space   string
	node    string
	grantee string // "u:<id>" or "g:<id>"; "" is a public link, unknownGrantee what cannot be told
	file    string // path of the list
	checked bool
}

// unknownGrantee stands for a record that does not tell in the known form who has the share.
const unknownGrantee = "?"

func (x *shares) rest(c *checker) []Finding {
	var out []Finding
	for _, st := range c.stores {
		if st.Name == systemStore {
			x.st = st
		}
	}
	for _, id := range sortedKeys(x.bySpace) {
		for _, sh := range x.bySpace[id] {
			if sh.checked || c.spaces[id] != nil || c.nameless {
				continue
			}
			f := c.finding(x.st, ShareStale, sh.file, fmt.Sprintf("%s of an item in space %s, which is not there", sh.what(), id))
			f.Space, f.Node = id, sh.node
			out = append(out, f)
		}
	}
	return out
}

func (sh *share) what() string {
	if sh.grantee == "" {
		return fmt.Sprintf("the public link %q", sh.id)
	}
	return fmt.Sprintf("the share %q", sh.id)
}

// readShares reads the lists of shares in a space of the system storage.
func (s *spaceCheck) readShares(ctx context.Context) error {
	if s.st.Name != systemStore || !isShareSpace(s.sp.ID) || s.st.Remote && s.st.Blobs == nil {
		return nil
	}
	s.c.shares.st = s.st
	t := &s.t
	lists := map[string]int32{} // nodes by blob id
	for i := range t.nodes.n {
		n := t.nodes.at(i)
		if n.flags&(fPresent|fMeta|fLinked|fDir|fRevision|fTrashed) != fPresent|fMeta|fLinked || n.blob < 0 {
			continue
		}
		p := s.path(i)
		public := s.sp.ID == publicShares && p == "/publicshares.json"
		if public || s.sp.ID == userShares && strings.HasPrefix(p, "/storages/") && strings.HasSuffix(p, ".json") {
			lists[t.ids.text(t.blobs.at(n.blob).id)] = i
		}
	}
	read := func(blob string, open func() (io.ReadCloser, error)) error {
		i, ok := lists[blob]
		if !ok {
			return nil
		}
		delete(lists, blob)
		data, err := readAll(open)
		if err == nil && s.sp.ID == publicShares {
			err = s.c.parsePublic(data, s.path(i))
		} else if err == nil {
			err = s.c.parseUser(data, s.path(i))
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			f := s.add(ShareMalformed, i, "the list of shares cannot be read: %v", err)
			f.Blob = blob
		}
		return nil
	}
	if s.st.Remote {
		for _, blob := range sortedKeys(lists) {
			if err := read(blob, func() (io.ReadCloser, error) { return s.st.Blobs.Open(ctx, s.sp.ID, blob) }); err != nil {
				return err
			}
		}
		return nil
	}
	err := s.eachBlob(ctx, func(b *blob, e *Entry) error { return read(t.ids.text(b.id), e.open) })
	if err != nil || len(lists) == 0 {
		return err
	}
	// What is missing is told, unless it is in flight.
	return s.st.Place.Rest(ctx, func(e *Entry) error {
		if blob, ok := strings.CutPrefix(e.Path, "uploads/"); ok && e.Type == 'f' {
			return read(blob, e.open)
		}
		return nil
	}, func(string, error) {})
}

var errTooLong = errors.New("it is too long")

func readAll(open func() (io.ReadCloser, error)) ([]byte, error) {
	r, err := open()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	p, err := io.ReadAll(io.LimitReader(r, shareLimit+1))
	if err == nil && len(p) > shareLimit {
		err = errTooLong
	}
	return p, err
}

func (c *checker) addShare(sh *share) {
	if c.shares.bySpace == nil {
		c.shares.bySpace = map[string][]*share{}
	}
	c.sum.Shares++
	c.shares.bySpace[sh.space] = append(c.shares.bySpace[sh.space], sh)
}

// resource is the id of an item, in the two spellings of the two lists.
type resource struct {
	Space1 string `json:"space_id"`
	Node1  string `json:"opaque_id"`
	Space2 string `json:"spaceId"`
	Node2  string `json:"opaqueId"`
}

func (r resource) ids() (space, node string) { return r.Space1 + r.Space2, r.Node1 + r.Node2 }

// parseUser reads storages/<storage id>/<space id>.json.
func (c *checker) parseUser(data []byte, file string) error {
	if len(data) == 0 {
		return nil
	}
	var list struct {
		Shares map[string]*struct {
			Resource resource `json:"resource_id"`
			Grantee  struct {
				ID map[string]struct {
					ID string `json:"opaque_id"`
				} `json:"Id"`
			} `json:"grantee"`
		}
	}
	if err := json.Unmarshal(data, &list); err != nil {
		return err
	}
	for _, id := range sortedKeys(list.Shares) {
		rec := list.Shares[id]
		if rec == nil {
			continue
		}
		sh := &share{id: id, file: file, grantee: unknownGrantee}
		sh.space, sh.node = rec.Resource.ids()
		for kind, g := range rec.Grantee.ID {
			if g.ID == "" {
				continue
			}
			sh.grantee = "u:" + g.ID
			if kind == "GroupId" {
				sh.grantee = "g:" + g.ID
			}
		}
		c.addShare(sh)
	}
	return nil
}

// parsePublic reads publicshares.json.
func (c *checker) parsePublic(data []byte, file string) error {
	if len(data) == 0 {
		return nil
	}
	var list map[string]struct {
		Share string `json:"share"`
	}
	if err := json.Unmarshal(data, &list); err != nil {
		return err
	}
	for _, id := range sortedKeys(list) {
		var rec struct {
			Resource1 resource `json:"resourceId"`
			Resource2 resource `json:"resource_id"`
		}
		if err := json.Unmarshal([]byte(list[id].Share), &rec); err != nil {
			return fmt.Errorf("public link %q: %w", id, err)
		}
		sh := &share{id: id, file: file}
		sh.space, sh.node = rec.Resource1.ids()
		if sh.space == "" {
			sh.space, sh.node = rec.Resource2.ids()
		}
		c.addShare(sh)
	}
	return nil
}

// sharesOf compares the share records of a space with its nodes.
func (s *spaceCheck) sharesOf() {
	if s.st.Name == systemStore {
		return
	}
	t := &s.t
	for _, sh := range s.c.shares.bySpace[s.sp.ID] {
		sh.checked = true
		k, _ := keyOf(sh.node)
		i := t.find(k)
		if i < 0 || t.nodes.at(i).flags&fPresent == 0 {
			if tr, ok := s.trashed[k]; ok {
				i = tr
			}
		}
		report := func(class Class, format string, args ...any) {
			f := s.add(class, i, format, args...)
			f.Node = sh.node
		}
		if i < 0 || t.nodes.at(i).flags&(fPresent|fTold) == 0 {
			if s.nameless { // it may be one of those that lost their ids, which is told
				continue
			}
			i = -1
			report(ShareStale, "%s of an item that is not there any more", sh.what())
			continue
		}
		if t.nodes.at(i).flags&fTold != 0 {
			continue // what is wrong with the item is told
		}
		if s.inTrash(i) {
			report(ShareStale, "%s of an item that is in the trash", sh.what())
			continue
		}
		if sh.grantee == "" || sh.grantee == unknownGrantee {
			continue
		}
		have := t.grants[i]
		if i == s.rootNode {
			have = s.info.members
		}
		found := false
		for _, g := range have {
			found = found || g == sh.grantee
		}
		if !found {
			report(ShareWithoutGrant, "%s is listed, and the item has no grant for it (%s)", sh.what(), sh.grantee)
		}
	}
}

// inTrash tells whether node i is trashed, or in a folder that is.
func (s *spaceCheck) inTrash(i int32) bool {
	for steps := int32(0); i >= 0 && steps <= s.t.nodes.n; steps++ {
		n := s.t.nodes.at(i)
		if n.flags&fTrashed != 0 {
			return true
		}
		i = n.link
	}
	return false
}
