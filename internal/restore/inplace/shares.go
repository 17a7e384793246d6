package inplace

import (
	"bytes"
	"crypto/md5" //nolint:gosec // the server's checksums
	"crypto/rand"
	"crypto/sha1" //nolint:gosec // likewise
	"encoding/json"
	"errors"
	"fmt"
	"hash/adler32"
	"io"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/pax"
)

// The spaces of the system storage that hold the lists of shares (product reference, "System storage"):
// storages/<storage id>/<space id>.json, users/<id>/created.json and received.json, groups/<id>/received.json in
// one, publicshares.json in the other.
const (
	userShares   = "jsoncs3-share-manager-metadata"
	publicShares = "jsoncs3-public-share-manager-metadata"
)

// shareLimit bounds a list of shares, in bytes: a space with 100,000 shares has less.
const shareLimit = 256 << 20

// shareLists puts back the records of the shares of the space: those that the lists have not any more are added, and
// lists that are gone are put back.
func (r *run) shareLists() error {
	if r.o.System == "" || r.o.SystemStore == nil {
		return nil
	}
	for _, sp := range r.o.SystemStore.Spaces {
		if sp.ID != userShares && sp.ID != publicShares {
			continue
		}
		o := r.o
		o.Root, o.System, o.SystemStore, o.Objects = r.o.System, "", nil, nil
		sub, err := newRun(r.ctx, r.l, r.tree, Target{Space: sp, Store: *r.o.SystemStore}, o)
		if errors.Is(err, ErrLayout) || errors.Is(err, fs.ErrNotExist) {
			r.warn("the shares of the space are not in the lists of shares again: %v", err)
			continue
		}
		if err != nil {
			return err
		}
		err = r.sharesFrom(sub)
		sub.close()
		if err != nil {
			return err
		}
		r.res.Warnings = append(r.res.Warnings, sub.res.Warnings...)
		r.res.Moved = append(r.res.Moved, sub.res.Moved...)
	}
	return nil
}

// sharesFrom is shareLists for the lists of one space of the system storage.
func (r *run) sharesFrom(sub *run) error {
	nodes, _, err := sub.readSpace()
	if err != nil {
		return err
	}
	lists, blobs := map[string]string{}, map[string][]byte{} // node ids by path; contents by blob id
	for key, n := range nodes {
		if !n.present || n.dir || n.blob == "" || strings.Contains(key, ".") {
			continue
		}
		if p := pathOf(nodes, sub.t.Space.ID, key); isShareList(sub.t.Space.ID, p, r.t.Space.ID) {
			lists[p] = key
			blobs[n.blob] = nil
		}
	}
	if err := sub.read(blobs); err != nil {
		return err
	}
	var paths []string
	for p := range lists {
		paths = append(paths, p)
	}
	slices.Sort(paths)
	for _, p := range paths {
		key := lists[p]
		was := blobs[nodes[key].blob]
		if _, n, err := mergeShares(nil, was, r.t.Space.ID); err != nil {
			r.warn("the list of shares %s of the snapshot is not of a form that is known, and was left out: %v", p, err)
			continue
		} else if n == 0 {
			continue // it says nothing of this space
		}
		at := sub.atPath(p)
		if at == "" {
			o := sub.o
			res, err := Run(r.ctx, r.l, r.tree, Target{Space: sub.t.Space, Store: sub.t.Store, Node: key, Key: key}, o)
			if res != nil {
				r.res.Warnings = append(r.res.Warnings, res.Warnings...)
				r.res.Moved = append(r.res.Moved, res.Moved...)
			}
			if errors.Is(err, ErrNoSpace) {
				r.warn("the system storage has no lists of shares, so that those of the space were not put back")
				return nil
			}
			if err != nil {
				return err
			}
			r.res.Shares = append(r.res.Shares, p)
			continue
		}
		m, err := sub.meta(at)
		if err != nil {
			return err
		}
		now, err := sub.blobBytes(m.BlobID)
		if err != nil {
			return fmt.Errorf("the list of shares %s: %w", p, err)
		}
		merged, n, err := mergeShares(now, was, r.t.Space.ID)
		if err != nil {
			r.warn("the list of shares %s is not of a form that is known, and was left as it is: %v", p, err)
			continue
		}
		if n == 0 {
			continue
		}
		r.res.Shares = append(r.res.Shares, p)
		if r.o.DryRun {
			continue
		}
		if err := sub.rewrite(at, merged); err != nil {
			return err
		}
	}
	return nil
}

// isShareList tells which files may speak of shares of a space.
func isShareList(in, p, space string) bool {
	if in == publicShares {
		return p == "publicshares.json"
	}
	parts := strings.Split(p, "/")
	if len(parts) != 3 {
		return false
	}
	switch parts[0] {
	case "storages":
		return parts[2] == space+".json"
	case "users":
		return parts[2] == "received.json" || parts[2] == "created.json"
	case "groups":
		return parts[2] == "received.json"
	}
	return false
}

// pathOf is the path of a node in its space, or "".
func pathOf(nodes map[string]*snapNode, top, key string) string {
	p := ""
	for range 20 {
		n := nodes[key]
		if key == top {
			return strings.TrimPrefix(p, "/")
		}
		if n == nil || n.name == "" {
			return ""
		}
		p = "/" + n.name + p
		key = n.parent
	}
	return ""
}

// read reads the contents of blobs from the snapshot.
func (r *run) read(blobs map[string][]byte) error {
	return r.each(r.spaceTar(), func(h *pax.Header, rel string, data io.Reader) error {
		below, ok := strings.CutPrefix(rel, r.src+"/blobs/")
		b := strings.ReplaceAll(below, "/", "")
		if _, wanted := blobs[b]; !ok || !wanted || h.Type != '0' {
			return nil
		}
		src, size, err := r.content(h, data)
		if err != nil {
			return err
		}
		if size > shareLimit {
			return fmt.Errorf("the list of shares %s has %d bytes, which is too much", rel, size)
		}
		blobs[b], err = io.ReadAll(io.LimitReader(src, shareLimit))
		return err
	})
}

// atPath is the id of the node at a path on disk, or "".
func (r *run) atPath(p string) string {
	id := r.t.Space.ID
	for name := range strings.SplitSeq(p, "/") {
		target, err := r.root.Readlink(r.nodeRel(id) + "/" + name)
		if err != nil {
			return ""
		}
		if id = targetID(target, childTarget); id == "" {
			return ""
		}
	}
	if !r.exists(r.nodeRel(id)) {
		return ""
	}
	return id
}

// blobBytes reads a blob from disk: a list may still be in uploads/.
func (r *run) blobBytes(b string) ([]byte, error) {
	if b == "" {
		return nil, nil
	}
	p, err := r.root.ReadFile(r.blobRel(b))
	if errors.Is(err, fs.ErrNotExist) {
		p, err = r.root.ReadFile(r.pre + "uploads/" + b)
	}
	return p, err
}

// mergeShares adds to now what was says of the shares of a space and now does not, and counts it. What the lists
// say of others, and members that are not known, stay as they are.
func mergeShares(now, was []byte, space string) ([]byte, int, error) {
	have, old := map[string]json.RawMessage{}, map[string]json.RawMessage{}
	if len(bytes.TrimSpace(now)) > 0 {
		if err := json.Unmarshal(now, &have); err != nil {
			return nil, 0, err
		}
	}
	if len(bytes.TrimSpace(was)) > 0 {
		if err := json.Unmarshal(was, &old); err != nil {
			return nil, 0, err
		}
	}
	n := 0
	// into adds to the member name of m the members of x that it has not and that pass.
	into := func(m map[string]json.RawMessage, name string, x json.RawMessage, pass func(key string) bool) error {
		a, b := map[string]json.RawMessage{}, map[string]json.RawMessage{}
		if len(m[name]) > 0 {
			if err := json.Unmarshal(m[name], &a); err != nil {
				return err
			}
		}
		if err := json.Unmarshal(x, &b); err != nil {
			return err
		}
		if a == nil { // null
			a = map[string]json.RawMessage{}
		}
		before := n
		for k, v := range b {
			if _, ok := a[k]; !ok && pass(k) {
				a[k] = v
				n++
			}
		}
		if n == before {
			return nil
		}
		p, err := json.Marshal(a)
		m[name] = p
		return err
	}
	all := func(string) bool { return true }
	for name, x := range old {
		switch name {
		case "Shares":
			if err := into(have, name, x, all); err != nil {
				return nil, 0, err
			}
		case "Spaces", "UserShares":
			// <storage id>:<space id> to States or IDs, and those to one entry for each share.
			ours, spaces := map[string]map[string]json.RawMessage{}, map[string]json.RawMessage{}
			if err := json.Unmarshal(x, &ours); err != nil {
				return nil, 0, err
			}
			if len(have[name]) > 0 {
				if err := json.Unmarshal(have[name], &spaces); err != nil {
					return nil, 0, err
				}
			}
			before := n
			for key, members := range ours {
				if !strings.HasSuffix(key, ":"+space) {
					continue
				}
				mine := map[string]json.RawMessage{}
				if len(spaces[key]) > 0 {
					if err := json.Unmarshal(spaces[key], &mine); err != nil {
						return nil, 0, err
					}
				}
				for _, list := range []string{"States", "IDs"} {
					if len(members[list]) > 0 {
						if err := into(mine, list, members[list], all); err != nil {
							return nil, 0, err
						}
					}
				}
				p, err := json.Marshal(mine)
				if err != nil {
					return nil, 0, err
				}
				if spaces == nil { // null
					spaces = map[string]json.RawMessage{}
				}
				spaces[key] = p
			}
			if n > before {
				p, err := json.Marshal(spaces)
				if err != nil {
					return nil, 0, err
				}
				have[name] = p
			}
		default:
			// publicshares.json: token to a link, as JSON in a string.
			if _, ok := have[name]; !ok && linkOf(x) == space {
				have[name] = x
				n++
			}
		}
	}
	p, err := json.Marshal(have)
	return p, n, err
}

// linkOf is the space that a public link leads into, or "".
func linkOf(x json.RawMessage) string {
	var rec struct {
		Share string `json:"share"`
	}
	type resource struct {
		Space1 string `json:"space_id"`
		Space2 string `json:"spaceId"`
	}
	var link struct {
		Resource1 resource `json:"resource_id"`
		Resource2 resource `json:"resourceId"`
	}
	if json.Unmarshal(x, &rec) != nil || json.Unmarshal([]byte(rec.Share), &link) != nil {
		return ""
	}
	return link.Resource1.Space1 + link.Resource1.Space2 + link.Resource2.Space1 + link.Resource2.Space2
}

// rewrite gives a file of the system storage another content, as the server does: a new blob, and then the
// metadata that names it. The old blob stays; there are no versions here.
func (r *run) rewrite(node string, content []byte) error {
	blob := newID()
	rel := r.blobRel(blob)
	m, err := r.meta(node)
	if err != nil {
		return err
	}
	h, err := r.like(node)
	if err != nil {
		return err
	}
	h.Mode = 0o644 // as the server makes blobs
	if old, err := r.headerOf(r.blobRel(m.BlobID)); err == nil && m.BlobID != "" {
		h = old
	}
	if err := r.shards(rel); err != nil {
		return err
	}
	if err := r.writeBytes(h, rel, content); err != nil {
		return err
	}
	if err := r.syncDir(path.Dir(rel)); err != nil {
		return err
	}
	s1, s5, a := sha1.Sum(content), md5.Sum(content), adler32.Checksum(content) //nolint:gosec // see the imports
	return r.change(node, func(at *ocis.Attributes) {
		p := r.t.Store.Prefix
		at.Set(p, "blobid", []byte(blob))
		at.Set(p, "blobsize", []byte(strconv.Itoa(len(content))))
		at.Set(p, "cs.sha1", s1[:])
		at.Set(p, "cs.md5", s5[:])
		at.Set(p, "cs.adler32", []byte{byte(a >> 24), byte(a >> 16), byte(a >> 8), byte(a)})
		at.Set(p, "mtime", []byte(r.o.Now.UTC().Format(time.RFC3339Nano)))
	})
}

// newID makes a random UUID.
func newID() string {
	var u [16]byte
	_, _ = rand.Read(u[:]) // never fails
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
