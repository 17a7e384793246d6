package cloudtest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"
)

// refuse answers as Graph does.
func refuse(w http.ResponseWriter, status int, code, message string) {
	reply(w, status, map[string]any{"error": map[string]string{"code": code, "message": message}})
}

func (u *user) json() map[string]any {
	return map[string]any{"id": u.id, "onPremisesSamAccountName": u.name, "displayName": u.full, "mail": u.name + "@example.org"}
}

func (s *Server) driveJSON(d *drive) map[string]any {
	root := map[string]any{"id": d.id + "!" + d.root.id, "eTag": d.root.etag(), "webDavUrl": s.URL + "/dav/spaces/" + d.id}
	if d.disabled {
		root["deleted"] = map[string]string{"state": "trashed"}
	}
	used := d.root.size()
	owner := d.root.id
	if d.owner != nil {
		owner = d.owner.id
	}
	return map[string]any{
		"id": d.id, "name": d.name, "driveType": d.kind, "driveAlias": d.alias, "description": d.description,
		"owner": map[string]any{"user": map[string]string{"id": owner}}, "root": root,
		"quota": map[string]any{"used": used, "total": d.quota, "remaining": max(d.quota-used, 0), "state": "normal"},
	}
}

func (s *Server) graph(w http.ResponseWriter, r *http.Request, u *user, parts []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var body map[string]any
	if r.Method == http.MethodPost || r.Method == http.MethodPut {
		if json.NewDecoder(r.Body).Decode(&body) != nil {
			refuse(w, http.StatusBadRequest, "invalidRequest", "invalid body schema definition")
			return
		}
	}
	str := func(k string) string { v, _ := body[k].(string); return v }
	where := r.Method + " " + strings.Join(parts, "/")
	switch {
	case where == "GET v1.0/me":
		reply(w, 200, u.json())
	case where == "GET v1.0/me/drives" || where == "GET v1.0/drives":
		list := []any{}
		for _, d := range s.drives {
			read, _ := s.rights(d, u)
			if read || u.admin && parts[1] == "drives" {
				list = append(list, s.driveJSON(d))
			}
		}
		reply(w, 200, map[string]any{"value": list})
	case where == "POST v1.0/drives":
		name := strings.TrimSpace(str("name"))
		switch {
		case !u.admin:
			refuse(w, http.StatusForbidden, "notAllowed", "insufficient permissions to create a space.")
		case name == "" || strings.ContainsAny(name, `/\.:?*"><|`):
			refuse(w, http.StatusBadRequest, "invalidRequest", "invalid spacename: spacenames must not contain the forbidden characters")
		default:
			reply(w, http.StatusCreated, s.driveJSON(s.addProject(name, str("description"), u)))
		}
	case where == "GET v1.0/users":
		list := []any{}
		for _, x := range s.users {
			list = append(list, x.json())
		}
		reply(w, 200, map[string]any{"value": list})
	case strings.HasPrefix(where, "GET v1.0/users/") && len(parts) == 3:
		if x := s.user(parts[2]); x != nil {
			reply(w, 200, x.json())
			return
		}
		refuse(w, http.StatusNotFound, "itemNotFound", "user not found")
	case where == "GET v1.0/groups":
		list := []any{}
		for _, g := range s.groups {
			list = append(list, map[string]string{"id": g.id, "displayName": g.name})
		}
		reply(w, 200, map[string]any{"value": list})
	case where == "PUT v1.0/extensions/org.libregraph/tags":
		s.tag(w, u, str("resourceId"), body["tags"])
	case where == "GET v1beta1/roleManagement/permissions/roleDefinitions":
		reply(w, 200, roleDefinitions())
	case strings.HasPrefix(where, r.Method+" v1beta1/drives/"):
		s.shares(w, r, u, parts[2:], body)
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

func (s *Server) tag(w http.ResponseWriter, u *user, id string, list any) {
	_, n, write := s.root(id, u)
	if n == nil {
		refuse(w, http.StatusBadRequest, "invalidRequest", "can't stat resource")
		return
	}
	if !write {
		w.WriteHeader(http.StatusForbidden)
		return
	}
	tags, _ := list.([]any)
	isNew := false
	for _, t := range tags {
		if v, ok := t.(string); ok && v != "" && !slices.Contains(n.tags, strings.ToLower(v)) {
			n.tags = append(n.tags, strings.ToLower(v))
			isNew = true
		}
	}
	if !isNew {
		refuse(w, http.StatusBadRequest, "invalidRequest", "no new tags in createtagsrequest or maximum reached")
	}
}

// shares serves /drives/{drive}/(root|items/{item})/(invite|createLink|permissions).
func (s *Server) shares(w http.ResponseWriter, r *http.Request, u *user, parts []string, body map[string]any) {
	d, n, write := s.root(parts[0], u)
	if n == nil {
		refuse(w, http.StatusNotFound, "itemNotFound", "stat failed")
		return
	}
	grants, links := &d.grants, &d.links
	var verb string
	switch {
	case len(parts) == 3 && parts[1] == "root":
		verb = parts[2]
		if d.kind != "project" {
			refuse(w, http.StatusBadRequest, "invalidRequest", "unsupported space type")
			return
		}
	case len(parts) == 4 && parts[1] == "items":
		verb = parts[3]
		if _, n, _ = s.root(parts[2], u); n == nil {
			refuse(w, http.StatusNotFound, "itemNotFound", "stat failed")
			return
		}
		grants, links = &n.grants, &n.links
	}
	switch {
	case r.Method == http.MethodGet && verb == "permissions":
		list := []any{}
		for _, g := range *grants {
			kind := "user"
			if g.group {
				kind = "group"
			}
			p := map[string]any{"id": g.id, "grantedToV2": map[string]any{kind: map[string]string{"id": g.id}}}
			if g.role != "" {
				p["roles"] = []string{g.role}
			} else {
				p["@libre.graph.permissions.actions"] = g.actions
			}
			list = append(list, p)
		}
		for i, l := range *links {
			list = append(list, l.json(i))
		}
		reply(w, 200, map[string]any{"value": list})
	case r.Method == http.MethodPost && verb == "createLink":
		l, why := s.linked(body)
		switch {
		case !write:
			refuse(w, http.StatusForbidden, "accessDenied", "permission denied")
		case why != "":
			refuse(w, http.StatusBadRequest, "invalidRequest", why)
		case !n.folder && (l.Type == "createOnly" || l.Type == "upload"):
			refuse(w, http.StatusBadRequest, "invalidRequest", "invalid link type")
		case n == d.root && d.kind == "personal":
			refuse(w, http.StatusBadRequest, "invalidRequest", "cannot create link on personal space root")
		default:
			if i := slices.IndexFunc(*links, func(x Link) bool { return x.Quick }); l.Quick && i >= 0 {
				reply(w, 200, (*links)[i].json(i))
				return
			}
			*links = append(*links, l)
			reply(w, 200, l.json(len(*links)-1))
		}
	case r.Method == http.MethodPost && verb == "invite":
		if !write {
			refuse(w, http.StatusForbidden, "accessDenied", "permission denied")
			return
		}
		g, why := s.invited(body)
		if why != "" {
			refuse(w, http.StatusBadRequest, "invalidRequest", why)
			return
		}
		if slices.ContainsFunc(*grants, func(h grant) bool { return h.id == g.id }) {
			refuse(w, http.StatusConflict, "nameAlreadyExists", "error creating share: already exists")
			return
		}
		*grants = append(*grants, g)
		reply(w, 200, map[string]any{"value": []any{}})
	default:
		w.WriteHeader(http.StatusMethodNotAllowed)
	}
}

func (l Link) json(i int) map[string]any {
	p := map[string]any{
		"id": fmt.Sprint("link", i), "hasPassword": l.Password != "",
		"link": map[string]any{"type": l.Type, "@libre.graph.displayName": l.Name, "@libre.graph.quickLink": l.Quick, "webUrl": fmt.Sprint("https://cloud.example/s/", i)},
	}
	if l.Expires != "" {
		p["expirationDateTime"] = l.Expires
	}
	return p
}

func (s *Server) linked(body map[string]any) (Link, string) {
	var in struct {
		Type     string `json:"type"`
		Name     string `json:"displayName"`
		Password string `json:"password"`
		Quick    bool   `json:"@libre.graph.quickLink"`
		Expires  string `json:"expirationDateTime"`
	}
	p, _ := json.Marshal(body)
	dec := json.NewDecoder(bytes.NewReader(p))
	dec.DisallowUnknownFields()
	if dec.Decode(&in) != nil {
		return Link{}, "invalid body schema definition"
	}
	l := Link{in.Type, in.Name, in.Password, in.Quick, in.Expires}
	at, err := time.Parse(time.RFC3339, in.Expires)
	switch {
	case !slices.Contains([]string{"view", "upload", "edit", "createOnly", "internal"}, l.Type):
		return l, "invalid link type"
	case l.Type == "internal" && l.Password != "":
		return l, "password is redundant for the internal link"
	case l.Expires != "" && err != nil:
		return l, "invalid body schema definition"
	case l.Expires != "" && at.Before(time.Now()):
		return l, "expiration date is in the past"
	case l.Type != "internal" && l.Password == "" && s.LinkPasswords:
		return l, "password protection is enforced"
	case l.Password != "" && (len(l.Password) < 8 || !strings.ContainsAny(l.Password, "0123456789") || !strings.ContainsAny(l.Password, "!-") || strings.ToLower(l.Password) == l.Password):
		return l, "at least 8 characters are required"
	}
	return l, ""
}

func (s *Server) invited(body map[string]any) (grant, string) {
	var in struct {
		Recipients []struct {
			ID   string `json:"objectId"`
			Type string `json:"@libre.graph.recipient.type"`
		}
		Roles   []string
		Actions []string `json:"@libre.graph.permissions.actions"`
		Expires string   `json:"expirationDateTime"`
	}
	p, _ := json.Marshal(body)
	if json.Unmarshal(p, &in) != nil || len(in.Recipients) != 1 || len(in.Roles) == 0 && len(in.Actions) == 0 {
		return grant{}, "invalid body schema definition"
	}
	to := in.Recipients[0]
	g := grant{id: to.ID, group: to.Type == "group", actions: in.Actions, expires: in.Expires}
	if g.group && !slices.ContainsFunc(s.groups, func(x *group) bool { return x.id == to.ID }) {
		return g, "itemNotFound: group not found"
	}
	if !g.group && !slices.ContainsFunc(s.users, func(x *user) bool { return x.id == to.ID }) {
		return g, "itemNotFound: user not found"
	}
	if len(in.Roles) > 0 {
		g.role = in.Roles[0]
		known := []string{RoleViewer, RoleEditor, RoleFileEditor, RoleSpaceViewer, RoleSpaceEditor, RoleManager}
		if !slices.Contains(known, g.role) {
			return g, "role not applicable to this resource"
		}
	}
	return g, ""
}

// The single rights that roles are made of.
const (
	basic    = "libre.graph/driveItem/basic/read"
	pathRead = "libre.graph/driveItem/path/read"
	quota    = "libre.graph/driveItem/quota/read"
	content  = "libre.graph/driveItem/content/read"
	children = "libre.graph/driveItem/children/read"
	deleted  = "libre.graph/driveItem/deleted/read"
	upload   = "libre.graph/driveItem/upload/create"
	create   = "libre.graph/driveItem/children/create"
	remove   = "libre.graph/driveItem/standard/delete"
	move     = "libre.graph/driveItem/path/update"
	undelete = "libre.graph/driveItem/deleted/update"
	purge    = "libre.graph/driveItem/deleted/delete"
	oldRead  = "libre.graph/driveItem/versions/read"
	oldBack  = "libre.graph/driveItem/versions/update"
	invite   = "libre.graph/driveItem/permissions/create"
	members  = "libre.graph/driveItem/permissions/read"
	change   = "libre.graph/driveItem/permissions/update"
	expel    = "libre.graph/driveItem/permissions/delete"
	deny     = "libre.graph/driveItem/permissions/deny"
)

// roleDefinitions are some of the product's roles, with their rights.
func roleDefinitions() []any {
	view := []string{pathRead, quota, content, children, deleted, basic}
	edit := append(slices.Clone(view), create, remove, upload, move, undelete)
	space := append(slices.Clone(edit), members, oldRead, oldBack)
	role := func(id, name string, actions []string, on ...string) any {
		var list []any
		for _, what := range on {
			list = append(list, map[string]any{"allowedResourceActions": actions, "condition": "exists @Resource." + what})
		}
		return map[string]any{"id": id, "displayName": name, "rolePermissions": list}
	}
	return []any{
		role(RoleViewer, "Can view", view, "File", "Folder"),
		role(RoleSpaceViewer, "Can view", append(slices.Clone(view), members), "Root"),
		role(RoleEditor, "Can edit", edit, "Folder"),
		role(RoleFileEditor, "Can edit", append(slices.Clone(view), upload, undelete), "File"),
		role(RoleSpaceEditor, "Can edit", space, "Root"),
		role(RoleManager, "Can manage", append(slices.Clone(space), purge, invite, change, expel, deny), "Root"),
	}
}
