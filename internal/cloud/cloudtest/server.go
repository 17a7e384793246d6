// Package cloudtest is a stand-in for the server of an instance: it keeps spaces in memory and
// answers the parts of Graph, WebDAV and TUS that package cloud uses, with the statuses, properties
// and quirks of the real one.
//
// New makes one; its fields make it misbehave.
package cloudtest

import (
	"crypto/sha1" // the product's checksum
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// Mount is the mount id in the ids of all spaces.
const Mount = "11111111-2222-4333-8444-555555555555"

// Server is a stand-in. Its fields may be set before the first request; all methods may be called at
// any time.
type Server struct {
	URL string

	// PublicURL is how the server names itself in the addresses of uploads; zero is URL.
	PublicURL string
	// Processing is how many times an uploaded file is shown as being worked on.
	Processing int
	// MaxChunk is the limit that the capabilities announce, in bytes.
	MaxChunk int64
	// Impersonation allows administrators to make tokens for others.
	Impersonation bool
	// Purged has the server not make personal spaces, as it does not for a while after one was purged.
	Purged bool
	// LinkPasswords refuses public links without a password, as the product does by default.
	LinkPasswords bool
	// Fault is asked before each request; a status other than 0 is answered at once.
	Fault func(*http.Request) int
	// Cut is asked before each request: after that many bytes of its body the connection is broken;
	// 0 leaves it alone.
	Cut func(*http.Request) int64
	// Down makes the server answer nothing but errors.
	Down atomic.Bool
	// Corrupt changes what arrives of a resumable upload, as a broken proxy would.
	Corrupt func([]byte)

	mu       sync.Mutex
	users    []*user
	groups   []*group
	drives   []*drive
	sessions map[string]*session
	requests []string
	ids      int
}

type user struct {
	id, name, full, password string
	admin                    bool
	tokens                   []string
}

type group struct{ id, name string }

type drive struct {
	id, name, kind, alias, description string
	owner                              *user
	quota                              int64 // bytes; 0 is no limit
	disabled                           bool
	root                               *node
	grants                             []grant // of the whole space
	links                              []Link
	trash                              []*trashed
}

type grant struct {
	id      string // of user or group
	group   bool
	role    string
	actions []string
	expires string
}

type node struct {
	id, name   string
	folder     bool
	parent     *node
	children   map[string]*node
	data       []byte
	mtime      time.Time
	tags       []string
	versions   []version
	grants     []grant
	links      []Link
	locked     bool
	processing int // answers left
}

type version struct {
	key   string
	data  []byte
	mtime time.Time
}

type trashed struct {
	*node
	path    string
	deleted time.Time
}

// New starts a server that t's end stops. It has one administrator, admin with the password admin.
func New(t testing.TB) *Server {
	t.Helper()
	s, stop := Start()
	t.Cleanup(stop)
	return s
}

// Start is New where there is no testing.TB.
func Start() (s *Server, stop func()) {
	s = newServer()
	hs := httptest.NewServer(s)
	s.URL = hs.URL
	return s, hs.Close
}

// NewTLS is New with TLS, and the certificate to trust in PEM.
func NewTLS(t testing.TB) (*Server, []byte) {
	t.Helper()
	s := newServer()
	hs := httptest.NewUnstartedServer(s)
	hs.Config.ErrorLog = log.New(io.Discard, "", 0) // clients that do not trust it
	hs.StartTLS()
	t.Cleanup(hs.Close)
	s.URL = hs.URL
	return s, pemOf(hs.Certificate().Raw)
}

func newServer() *Server {
	s := &Server{sessions: map[string]*session{}, Impersonation: true}
	s.AddUser("admin", "admin")
	s.users[0].admin = true
	return s
}

// newID makes ids that look like the server's.
func (s *Server) newID() string {
	s.ids++
	return fmt.Sprintf("%08x-0000-4000-8000-%012x", s.ids, s.ids)
}

// AddUser adds an account and returns its id. The personal space comes with the first request.
func (s *Server) AddUser(name, password string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := &user{id: s.newID(), name: name, full: strings.ToUpper(name[:1]) + name[1:], password: password}
	s.users = append(s.users, u)
	return u.id
}

// AddGroup adds a group and returns its id.
func (s *Server) AddGroup(name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := &group{s.newID(), name}
	s.groups = append(s.groups, g)
	return g.id
}

// Role ids of the product.
const (
	RoleViewer      = "b1e2218d-eef8-4d4c-b82d-0f1a1b48f3b5"
	RoleEditor      = "fb6c3e19-e378-47e5-b277-9732f9de6e21"
	RoleFileEditor  = "2d00ce52-1fc2-4dbc-8b95-a73b73395f5a"
	RoleSpaceViewer = "a8d5fe5e-96e3-418d-825b-534dbdf22b99"
	RoleSpaceEditor = "58c63c02-1d89-4572-916a-870abc5a1b7d"
	RoleManager     = "312c0871-5ef7-4b3a-85b6-0e4074c64049"
)

// AddProject adds a project space that the user manages, and returns its id.
func (s *Server) AddProject(name, manager string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.addProject(name, "", s.user(manager)).id
}

func (s *Server) addProject(name, description string, manager *user) *drive {
	id := s.newID()
	alias := "project/" + strings.ToLower(strings.ReplaceAll(name, " ", "-"))
	d := &drive{
		id: Mount + "$" + id, name: name, kind: "project", alias: alias, description: description,
		root: &node{id: id, folder: true, children: map[string]*node{}, mtime: time.Now()},
	}
	if manager != nil {
		d.grants = []grant{{id: manager.id, role: RoleManager}}
	}
	s.drives = append(s.drives, d)
	return d
}

func (s *Server) user(nameOrID string) *user {
	for _, u := range s.users {
		if u.name == nameOrID || u.id == nameOrID {
			return u
		}
	}
	return nil
}

// home returns the personal space of a user, made if need be.
func (s *Server) home(u *user) *drive {
	for _, d := range s.drives {
		if d.owner == u {
			return d
		}
	}
	d := &drive{
		id: Mount + "$" + u.id, name: u.full, kind: "personal", alias: "personal/" + u.name, owner: u,
		root: &node{id: u.id, folder: true, children: map[string]*node{}, mtime: time.Now()},
	}
	s.drives = append(s.drives, d)
	return d
}

// Home is the id of the personal space of a user.
func (s *Server) Home(name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.home(s.user(name)).id
}

// Find is the id of a project space by its name, or else of a user's personal space.
func (s *Server) Find(name string) string {
	s.mu.Lock()
	for _, d := range s.drives {
		if d.kind == "project" && d.name == name {
			s.mu.Unlock()
			return d.id
		}
	}
	s.mu.Unlock()
	return s.Home(name)
}

// SetQuota limits a space, in bytes.
func (s *Server) SetQuota(driveID string, bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drive(driveID).quota = bytes
}

func (s *Server) drive(id string) *drive {
	for _, d := range s.drives {
		if d.id == id {
			return d
		}
	}
	return nil
}

// Item is a file or folder as a test looks at it.
type Item struct {
	ID       string
	Folder   bool
	Data     string
	ModTime  time.Time
	Tags     []string
	Versions []string // contents, oldest first
	Grants   []Grant
	Links    []Link
}

// Link is a public link.
type Link struct {
	Type, Name, Password string
	Quick                bool
	Expires              string
}

// Grant is what somebody may do.
type Grant struct {
	ID, Role string
	Group    bool
	Actions  []string
	Expires  string
}

// Items returns all that is in a space, by path without leading slash; "" is the root.
func (s *Server) Items(driveID string) map[string]Item {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.drive(driveID)
	out := map[string]Item{}
	var walk func(n *node, p string)
	walk = func(n *node, p string) {
		i := Item{ID: d.id + "!" + n.id, Folder: n.folder, Data: string(n.data), ModTime: n.mtime, Tags: slices.Clone(n.tags)}
		for _, v := range n.versions {
			i.Versions = append(i.Versions, string(v.data))
		}
		grants, links := n.grants, n.links
		if p == "" {
			grants, links = d.grants, d.links
		}
		i.Links = slices.Clone(links)
		for _, g := range grants {
			i.Grants = append(i.Grants, Grant{g.id, g.role, g.group, g.actions, g.expires})
		}
		out[p] = i
		for name, c := range n.children {
			walk(c, strings.TrimPrefix(p+"/"+name, "/"))
		}
	}
	walk(d.root, "")
	return out
}

// Write puts a file into a space, with the folders above.
func (s *Server) Write(driveID, p, data string, mtime time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.drive(driveID).root
	names := strings.Split(p, "/")
	for i, name := range names {
		c := n.children[name]
		if c == nil {
			c = &node{id: s.newID(), name: name, parent: n, mtime: mtime}
			if i < len(names)-1 {
				c.folder, c.children = true, map[string]*node{}
			}
			n.children[name] = c
		}
		n = c
	}
	n.data, n.mtime = []byte(data), mtime
}

// Lock locks a file, as somebody who edits it does, or unlocks it.
func (s *Server) Lock(driveID, p string, on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drive(driveID).root.at(p).locked = on
}

// DropSessions forgets all unfinished uploads, as their expiry does.
func (s *Server) DropSessions() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.sessions)
}

// Requests returns the method and path of all requests so far.
func (s *Server) Requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// Count counts the requests with a method so far.
func (s *Server) Count(method string) int {
	n := 0
	for _, r := range s.Requests() {
		if strings.HasPrefix(r, method+" ") {
			n++
		}
	}
	return n
}

// at finds a node below n; nil if there is none.
func (n *node) at(p string) *node {
	for _, name := range strings.FieldsFunc(p, func(r rune) bool { return r == '/' }) {
		if n == nil {
			return nil
		}
		n = n.children[name]
	}
	return n
}

// etag changes with id and time.
func (n *node) etag() string {
	sum := sha1.Sum([]byte(n.id + n.mtime.String()))
	return `"` + hex.EncodeToString(sum[:16]) + `"`
}

func (n *node) size() int64 {
	size := int64(len(n.data))
	for _, c := range n.children {
		size += c.size()
	}
	return size
}

// touch makes the folders above as new as the change below.
func (n *node) touch() {
	for ; n != nil; n = n.parent {
		n.mtime = time.Now()
	}
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.requests = append(s.requests, r.Method+" "+r.URL.Path)
	s.mu.Unlock()
	if s.Down.Load() {
		w.WriteHeader(http.StatusNotImplemented) // which clients do not try again
		return
	}
	if s.Fault != nil {
		if status := s.Fault(r); status != 0 {
			w.WriteHeader(status)
			return
		}
	}
	if s.Cut != nil {
		if n := s.Cut(r); n > 0 {
			r.Body = &cutBody{r.Body, n}
		}
	}
	path := strings.TrimPrefix(r.URL.EscapedPath(), "/remote.php")
	parts, ok := split(path)
	if !ok {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	switch head := parts[0]; {
	case head == "status.php":
		reply(w, 200, map[string]any{"installed": true, "product": "OpenCloud", "productversion": "1.0.0", "version": "10.11.0.0"})
	case head == "data" && len(parts) == 2: // the token in the address is the right to it
		s.upload(w, r, parts[1])
	default:
		u := s.login(r)
		if u == nil {
			w.Header().Set("WWW-Authenticate", `Basic realm="stand-in", charset="UTF-8"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		switch {
		case head == "graph":
			s.graph(w, r, u, parts[1:])
		case head == "ocs":
			reply(w, 200, map[string]any{"ocs": map[string]any{"data": map[string]any{"capabilities": map[string]any{
				"files": map[string]any{"tus_support": map[string]any{"max_chunk_size": s.MaxChunk}},
			}}}})
		case head == "auth-app":
			s.tokens(w, r, u)
		case head == "dav" && len(parts) > 1:
			s.dav(w, r, u, parts[1:])
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}
}

// login finds the user of a request, and makes the personal space as the real server does.
func (s *Server) login(r *http.Request) *user {
	s.mu.Lock()
	defer s.mu.Unlock()
	name, secret, basic := r.BasicAuth()
	bearer, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	for _, u := range s.users {
		switch {
		case basic && u.name == name && (u.password == secret || slices.Contains(u.tokens, secret)),
			!basic && slices.Contains(u.tokens, bearer):
			if !s.Purged {
				s.home(u)
			}
			return u
		}
	}
	return nil
}

// AddToken gives a user a further secret, for basic or bearer authentication; RemoveTokens takes all.
func (s *Server) AddToken(name, token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.user(name)
	u.tokens = append(u.tokens, token)
}

// RemoveTokens makes all tokens of a user useless.
func (s *Server) RemoveTokens(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.user(name).tokens = nil
}

// Tokens counts the tokens of a user.
func (s *Server) Tokens(name string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.user(name).tokens)
}

func (s *Server) tokens(w http.ResponseWriter, r *http.Request, u *user) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch q := r.URL.Query(); r.Method {
	case http.MethodPost:
		if _, err := time.ParseDuration(q.Get("expiry")); err != nil {
			http.Error(w, "error parsing expiry. Use e.g. 30m or 72h", http.StatusBadRequest)
			return
		}
		who := u
		if id := q.Get("userID"); id != "" {
			if !s.Impersonation || !u.admin {
				http.Error(w, "impersonation is not allowed", http.StatusForbidden)
				return
			}
			if who = s.user(id); who == nil {
				w.WriteHeader(http.StatusInternalServerError)
				return
			}
		}
		token := "token-" + s.newID()
		who.tokens = append(who.tokens, token)
		reply(w, 200, map[string]string{"token": token})
	case http.MethodDelete:
		// The real server of the 1.0 era knows only the hashes that it lists.
		hash := []byte(q.Get("token"))
		n := len(u.tokens)
		u.tokens = slices.DeleteFunc(u.tokens, func(t string) bool { return bcrypt.CompareHashAndPassword(hash, []byte(t)) == nil })
		if len(u.tokens) == n {
			w.WriteHeader(http.StatusInternalServerError)
		}
	case http.MethodGet:
		list := []any{}
		for _, t := range u.tokens {
			hash, err := bcrypt.GenerateFromPassword([]byte(t), bcrypt.MinCost)
			if err != nil {
				panic(err)
			}
			list = append(list, map[string]string{"token": string(hash), "label": "Generated via API"})
		}
		reply(w, 200, list)
	default:
		w.WriteHeader(http.StatusMethodNotAllowed)
	}
}

func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}
