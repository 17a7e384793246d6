package cloudtest

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// LoadStore makes a server of what a user storage (decomposedfs with local blobs) holds on disk: spaces,
// files, versions, trash. Users are the owners of personal spaces, under the names that the aliases
// give, with passwords that nobody has; Token(name) is an app token of each.
func LoadStore(root, prefix string) (*Server, error) {
	s := newServer()
	dirs, err := filepath.Glob(filepath.Join(root, "spaces", "*", "*"))
	if err != nil {
		return nil, err
	}
	type loaded struct {
		d    *drive
		meta ocis.NodeMeta
	}
	var all []loaded
	for _, dir := range dirs {
		rel, _ := filepath.Rel(filepath.Join(root, "spaces"), dir)
		l := loader{s: s, dir: dir, prefix: prefix, id: strings.ReplaceAll(rel, "/", "")}
		m, err := l.meta(ocis.NodePath(l.id))
		if err != nil {
			return nil, err
		}
		if m.Space == nil {
			return nil, fmt.Errorf("%s: the root is none", dir)
		}
		d := &drive{id: Mount + "$" + l.id, name: m.Space.Name, kind: m.Space.Type, alias: m.Space.Alias, disabled: m.DTime != ""}
		if d.root, err = l.node(l.id, ocis.NodePath(l.id), nil); err != nil {
			return nil, err
		}
		if err := l.trash(d); err != nil {
			return nil, err
		}
		s.drives = append(s.drives, d)
		all = append(all, loaded{d, m})
		if name, ok := strings.CutPrefix(m.Space.Alias, "personal/"); ok {
			u := s.user(name)
			if u == nil {
				u = &user{name: name, full: m.Space.Name}
				s.users = append(s.users, u)
			}
			u.id, d.owner, u.password, u.tokens = m.Space.OwnerID, u, s.newID(), []string{Token(name)}
		}
	}
	for _, x := range all {
		for _, g := range x.meta.Grants {
			role := RoleSpaceViewer
			if strings.Contains(g.Permissions, "w") {
				role = RoleSpaceEditor
			}
			x.d.grants = append(x.d.grants, grant{id: g.Principal, group: g.Group, role: role})
		}
	}
	return s, nil
}

// Token is the app token of a user of LoadStore.
func Token(name string) string { return "token-of-" + name }

// ServeTLS serves on l, with a certificate of its own, until the process ends.
func (s *Server) ServeTLS(l net.Listener) error {
	hs := httptest.NewUnstartedServer(s)
	hs.StartTLS() // for its certificate
	s.URL = "https://" + l.Addr().String()
	srv := &http.Server{Handler: s, TLSConfig: hs.TLS.Clone(), ErrorLog: hs.Config.ErrorLog}
	return srv.ServeTLS(l, "", "")
}

type loader struct {
	s               *Server
	dir, prefix, id string
}

func (l *loader) meta(node string) (ocis.NodeMeta, error) {
	p, err := os.ReadFile(filepath.Join(l.dir, "nodes", node+".mpk"))
	if err != nil {
		return ocis.NodeMeta{}, err
	}
	return ocis.ParseNode(l.prefix, p)
}

func (l *loader) blob(id string) ([]byte, error) {
	if id == "" {
		return nil, nil
	}
	return os.ReadFile(filepath.Join(l.dir, "blobs", ocis.NodePath(id)))
}

// node reads what lies at the path place below nodes.
func (l *loader) node(id, place string, parent *node) (*node, error) {
	m, err := l.meta(place)
	if err != nil {
		return nil, err
	}
	n := &node{id: id, name: m.Name, parent: parent, mtime: m.MTime}
	at := filepath.Join(l.dir, "nodes", place)
	st, err := os.Lstat(at)
	if err != nil {
		return nil, err
	}
	if !st.IsDir() {
		if n.data, err = l.blob(m.BlobID); err != nil {
			return nil, err
		}
		return n, l.versions(id, n)
	}
	n.folder, n.children = true, map[string]*node{}
	if n.mtime.IsZero() {
		n.mtime = m.TMTime
	}
	links, err := os.ReadDir(at)
	if err != nil {
		return nil, err
	}
	for _, e := range links {
		target, err := os.Readlink(filepath.Join(at, e.Name()))
		if err != nil {
			return nil, err
		}
		place := strings.TrimPrefix(target, "../../../../../")
		c, err := l.node(strings.ReplaceAll(place, "/", ""), place, n)
		if err != nil {
			return nil, err
		}
		c.name = e.Name()
		n.children[c.name] = c
	}
	return n, nil
}

func (l *loader) versions(id string, n *node) error {
	list, err := filepath.Glob(filepath.Join(l.dir, "nodes", ocis.NodePath(id)) + ".REV.*.mpk")
	if err != nil {
		return err
	}
	slices.Sort(list)
	for _, file := range list {
		rel, _ := filepath.Rel(filepath.Join(l.dir, "nodes"), strings.TrimSuffix(file, ".mpk"))
		m, err := l.meta(rel)
		if err != nil {
			return err
		}
		data, err := l.blob(m.BlobID)
		if err != nil {
			return err
		}
		n.versions = append(n.versions, version{strings.ReplaceAll(rel, "/", ""), data, m.MTime})
	}
	return nil
}

func (l *loader) trash(d *drive) error {
	list, err := filepath.Glob(filepath.Join(l.dir, "trash", "*", "*", "*", "*", "*"))
	if err != nil {
		return err
	}
	for _, link := range list {
		target, err := os.Readlink(link)
		if err != nil {
			return err
		}
		_, place, _ := strings.Cut(target, "nodes/")
		rel, _ := filepath.Rel(filepath.Join(l.dir, "trash"), link)
		id := strings.ReplaceAll(rel, "/", "")
		n, err := l.node(id, place, nil)
		if err != nil {
			return err
		}
		m, err := l.meta(place)
		if err != nil {
			return err
		}
		_, stamp, _ := strings.Cut(place, ".T.")
		at, _, _ := ocis.ParseStamp(stamp)
		d.trash = append(d.trash, &trashed{n, strings.TrimPrefix(m.TrashOrigin, "/"), at})
	}
	return nil
}
