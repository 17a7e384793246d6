package cloudtest

import (
	"bytes"
	"crypto/md5" // the product's checksums
	"crypto/sha1"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"encoding/xml"
	"errors"
	"fmt"
	"hash/adler32"
	"io"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
)

// split takes a path apart before it decodes it.
func split(p string) ([]string, bool) {
	var out []string
	for _, e := range strings.Split(strings.Trim(p, "/"), "/") {
		d, err := url.PathUnescape(e)
		if err != nil {
			return nil, false
		}
		out = append(out, d)
	}
	return out, true
}

func pemOf(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// cutBody breaks after left bytes.
type cutBody struct {
	io.ReadCloser
	left int64
}

func (c *cutBody) Read(p []byte) (int, error) {
	if c.left <= 0 {
		panic(http.ErrAbortHandler) // closes the connection without an answer
	}
	n, err := c.ReadCloser.Read(p[:min(int64(len(p)), c.left)])
	c.left -= int64(n)
	return n, err
}

// fail answers as the WebDAV part does.
func fail(w http.ResponseWriter, status int, message string) {
	w.WriteHeader(status)
	if message == "" {
		return
	}
	var b bytes.Buffer
	_ = xml.EscapeText(&b, []byte(message))
	fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?><d:error xmlns:d="DAV" xmlns:s="http://sabredav.org/ns"><s:exception>Sabre\DAV\Exception</s:exception><s:message>%s</s:message></d:error>`, b.String())
}

// rights of a user in a space.
func (s *Server) rights(d *drive, u *user) (read, write bool) {
	if d.owner == u {
		return true, true
	}
	for _, g := range d.grants {
		if g.id == u.id {
			return true, g.role != RoleSpaceViewer
		}
	}
	return false, false
}

// dav serves below /dav.
func (s *Server) dav(w http.ResponseWriter, r *http.Request, u *user, parts []string) {
	// Bodies are read before the lock is taken: they come as slowly as the client sends them.
	var body []byte
	if r.Method == http.MethodPut || r.Method == "PROPFIND" || r.Method == "MKCOL" {
		var err error
		if body, err = io.ReadAll(r.Body); err != nil {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case parts[0] == "meta" && len(parts) >= 3 && parts[2] == "v":
		s.meta(w, r, u, parts[1], parts[3:])
	case parts[0] != "spaces":
		w.WriteHeader(http.StatusNotFound)
	case len(parts) == 1 || parts[1] == "":
		w.WriteHeader(http.StatusMethodNotAllowed)
	case parts[1] == "trash-bin":
		if len(parts) != 3 || r.Method != "PROPFIND" {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		s.trash(w, u, parts[2])
	default:
		s.space(w, r, u, parts[1], parts[2:], body)
	}
}

// root finds what the first element of an address names: a space, or a place in it.
func (s *Server) root(id string, u *user) (*drive, *node, bool) {
	spaceID, nodeID, inside := strings.Cut(id, "!")
	d := s.drive(spaceID)
	if d == nil || d.disabled {
		return nil, nil, false
	}
	read, write := s.rights(d, u)
	if !read {
		return nil, nil, false
	}
	if !inside {
		return d, d.root, write
	}
	return d, find(d.root, nodeID), write
}

func find(n *node, id string) *node {
	if n.id == id {
		return n
	}
	for _, c := range n.children {
		if f := find(c, id); f != nil {
			return f
		}
	}
	return nil
}

// badName is why the server refuses a name.
func badName(name string) string {
	switch {
	case strings.TrimSpace(name) == "":
		return "name validation failed: must not be empty"
	case strings.ContainsAny(name, "\f\r\n\\"):
		return "name validation failed: must not contain control characters"
	case len(name) > 255:
		return "name validation failed: must be shorter than 255"
	case name == "." || name == "..":
		return "name validation failed: . and .. are reserved names"
	}
	return ""
}

func (s *Server) space(w http.ResponseWriter, r *http.Request, u *user, id string, names []string, body []byte) {
	d, base, write := s.root(id, u)
	if base == nil {
		fail(w, http.StatusNotFound, "Resource not found")
		return
	}
	parent, last := base, ""
	if n := len(names); n > 0 && r.Method != http.MethodPost {
		parent, last = base.at(strings.Join(names[:n-1], "/")), names[n-1]
	}
	target := base
	if last != "" {
		target = nil
		if parent != nil && parent.folder {
			target = parent.children[last]
		}
	}
	changes := r.Method == http.MethodPut || r.Method == "MKCOL" || r.Method == http.MethodPost || r.Method == http.MethodDelete
	if changes && !write {
		fail(w, http.StatusForbidden, "permission denied")
		return
	}
	switch r.Method {
	case "PROPFIND":
		if target == nil {
			fail(w, http.StatusNotFound, "Resource not found")
			return
		}
		depth := r.Header.Get("Depth")
		if depth != "0" && depth != "1" {
			fail(w, http.StatusBadRequest, "Invalid Depth header value: infinity is not supported")
			return
		}
		wanted := asked(body)
		var list []string
		at := append([]string{"dav", "spaces", id}, names...)
		list = append(list, s.response(d, target, at, wanted))
		if depth == "1" {
			for _, name := range sorted(target.children) {
				list = append(list, s.response(d, target.children[name], append(slices.Clone(at), name), wanted))
			}
		}
		multistatus(w, list)
	case http.MethodGet, http.MethodHead:
		switch {
		case target == nil:
			fail(w, http.StatusNotFound, "Resource not found")
		case target.folder:
			w.Header().Set("Content-Length", "0")
			w.WriteHeader(http.StatusOK)
		case target.processing > 0:
			target.processing--
			w.WriteHeader(http.StatusTooEarly)
		default:
			w.Header().Set("ETag", target.etag())
			w.Header().Set("Content-Length", strconv.Itoa(len(target.data)))
			if r.Method == http.MethodGet {
				_, _ = w.Write(target.data)
			}
		}
	case "MKCOL":
		switch {
		case len(body) > 0:
			fail(w, http.StatusUnsupportedMediaType, "extended-mkcol not supported")
		case badName(last) != "":
			fail(w, http.StatusBadRequest, badName(last))
		case target != nil:
			fail(w, http.StatusMethodNotAllowed, "The resource you tried to create already exists")
		case parent == nil || !parent.folder:
			fail(w, http.StatusConflict, "intermediate collection does not exist")
		default:
			parent.children[last] = &node{id: s.newID(), name: last, parent: parent, folder: true, children: map[string]*node{}}
			parent.children[last].touch()
			w.WriteHeader(http.StatusCreated)
		}
	case http.MethodPut:
		s.put(w, r, d, parent, last, body)
	case http.MethodPost:
		s.tusCreate(w, r, d, base.at(strings.Join(names, "/")))
	case http.MethodDelete:
		if target == nil || target == d.root {
			fail(w, http.StatusNotFound, "Resource not found")
			return
		}
		delete(target.parent.children, target.name)
		target.parent.touch()
		d.trash = append(d.trash, &trashed{target, strings.Join(names, "/"), time.Now()})
		w.WriteHeader(http.StatusNoContent)
	default:
		w.WriteHeader(http.StatusNotImplemented)
	}
}

func sorted(m map[string]*node) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// mtimeOf reads a time as the server takes it.
func mtimeOf(s string) (time.Time, bool) {
	sec, frac, _ := strings.Cut(s, ".")
	n, err := strconv.ParseInt(sec, 10, 64)
	if err != nil {
		return time.Time{}, false
	}
	if frac == "" {
		return time.Unix(n, 0), true
	}
	ns, err := strconv.ParseInt((frac + "000000000")[:9], 10, 64)
	return time.Unix(n, ns), err == nil
}

func (s *Server) put(w http.ResponseWriter, r *http.Request, d *drive, parent *node, name string, body []byte) {
	if msg := badName(name); msg != "" {
		fail(w, http.StatusBadRequest, msg)
		return
	}
	if r.Header.Get("Content-Range") != "" {
		fail(w, http.StatusNotImplemented, "Content-Range not supported")
		return
	}
	mtime := time.Now()
	if v := r.Header.Get("X-OC-Mtime"); v != "" {
		t, ok := mtimeOf(v)
		if !ok {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		mtime = t
		w.Header().Set("X-OC-Mtime", "accepted")
	}
	want := ""
	if v := r.Header.Get("Upload-Checksum"); v != "" {
		want = v
	} else if v := r.Header.Get("OC-Checksum"); v != "" {
		algo, sum, ok := strings.Cut(v, ":")
		if !ok {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		want = strings.ToLower(algo) + " " + sum
	}
	status, err := s.store(d, parent, name, body, mtime, want, r.Header.Get("If-None-Match"))
	if err != nil {
		fail(w, status, err.Error())
		return
	}
	n := parent.children[name]
	w.Header().Set("ETag", n.etag())
	w.Header().Set("OC-ETag", n.etag())
	w.Header().Set("OC-FileId", d.id+"!"+n.id)
	w.WriteHeader(status)
}

//lint:ignore ST1005 these are the server's words
var errSum = errors.New("The computed checksum does not match the one received from the client.")

// store does what ends every upload.
func (s *Server) store(d *drive, parent *node, name string, data []byte, mtime time.Time, want, noneMatch string) (int, error) {
	if parent == nil || !parent.folder {
		return http.StatusConflict, errors.New("parent does not exist")
	}
	n := parent.children[name]
	switch {
	case n != nil && n.folder:
		return http.StatusConflict, errors.New("resource is not a file")
	case n != nil && n.locked:
		return http.StatusLocked, errors.New("file is locked")
	case noneMatch == "*" && n != nil:
		return http.StatusPreconditionFailed, errors.New("etag mismatch, resource exists")
	}
	was := int64(0)
	if n != nil {
		was = int64(len(n.data))
	}
	if d.quota > 0 && d.root.size()-was+int64(len(data)) > d.quota {
		return http.StatusInsufficientStorage, errors.New("quota exceeded")
	}
	if want != "" && len(data) > 0 && !sumMatches(want, data) {
		return http.StatusBadRequest, errSum
	}
	status := http.StatusCreated
	if n == nil {
		n = &node{id: s.newID(), name: name, parent: parent}
		parent.children[name] = n
	} else {
		// A version is named by the time of what it keeps. A second one of that time takes the place of
		// an equal one, and is refused otherwise.
		status = http.StatusNoContent
		key := n.id + ".REV." + n.mtime.UTC().Format(time.RFC3339Nano)
		if i := slices.IndexFunc(n.versions, func(v version) bool { return v.key == key }); i >= 0 {
			if !bytes.Equal(n.versions[i].data, n.data) {
				return http.StatusInternalServerError, errors.New("")
			}
		} else {
			n.versions = append(n.versions, version{key, n.data, n.mtime})
		}
	}
	parent.touch()
	n.data, n.mtime = data, mtime
	if len(data) > 0 {
		n.processing = s.Processing
	}
	return status, nil
}

func sumMatches(want string, data []byte) bool {
	algo, sum, _ := strings.Cut(want, " ")
	sha, md := sha1.Sum(data), md5.Sum(data)
	switch algo {
	case "sha1":
		return sum == hex.EncodeToString(sha[:])
	case "md5":
		return sum == hex.EncodeToString(md[:])
	case "adler32":
		return sum == fmt.Sprintf("%08x", adler32.Checksum(data))
	}
	return false
}

// session is an unfinished upload.
type session struct {
	drive  *drive
	parent *node
	name   string
	mtime  time.Time
	size   int64
	data   []byte
	busy   bool
}

func (s *Server) tusCreate(w http.ResponseWriter, r *http.Request, d *drive, parent *node) {
	h := w.Header()
	h.Set("Tus-Resumable", "1.0.0")
	h.Set("Tus-Extension", "creation,creation-with-upload,checksum,expiration")
	size, err := strconv.ParseInt(r.Header.Get("Upload-Length"), 10, 64)
	meta := map[string]string{}
	for _, kv := range strings.Split(r.Header.Get("Upload-Metadata"), ",") {
		k, v, _ := strings.Cut(kv, " ")
		b, _ := base64.StdEncoding.DecodeString(v)
		meta[k] = string(b)
	}
	name := path.Base(meta["filename"])
	if r.Header.Get("Tus-Resumable") != "1.0.0" || err != nil || badName(name) != "" || parent == nil {
		w.WriteHeader(http.StatusPreconditionFailed)
		return
	}
	x := &session{drive: d, parent: parent, name: name, size: size}
	x.mtime = time.Now()
	if t, ok := mtimeOf(meta["mtime"]); ok {
		x.mtime = t
	}
	switch n := parent.children[name]; {
	case n != nil && n.folder:
		w.WriteHeader(http.StatusConflict)
		return
	case n != nil && n.locked:
		w.WriteHeader(http.StatusLocked)
		return
	case d.quota > 0 && d.root.size()+size > d.quota:
		w.WriteHeader(http.StatusInsufficientStorage)
		return
	case size == 0:
		if n == nil {
			_, _ = s.store(d, parent, name, nil, x.mtime, "", "")
		}
		h.Set("Location", "")
		w.WriteHeader(http.StatusCreated)
		return
	}
	id := s.newID()
	s.sessions[id] = x
	public := s.PublicURL
	if public == "" {
		public = s.URL
	}
	h.Set("Location", public+"/data/"+id)
	w.WriteHeader(http.StatusCreated)
}

// upload serves the data of a session.
func (s *Server) upload(w http.ResponseWriter, r *http.Request, id string) {
	s.mu.Lock()
	x := s.sessions[id]
	if x == nil {
		s.mu.Unlock()
		w.WriteHeader(http.StatusNotFound)
		return
	}
	w.Header().Set("Tus-Resumable", "1.0.0")
	if x.busy {
		s.mu.Unlock()
		w.WriteHeader(http.StatusLocked)
		return
	}
	offset := int64(len(x.data))
	switch {
	case r.Method == http.MethodHead:
		w.Header().Set("Upload-Offset", strconv.FormatInt(offset, 10))
		w.Header().Set("Upload-Length", strconv.FormatInt(x.size, 10))
		s.mu.Unlock()
		return
	case r.Method != http.MethodPatch:
		s.mu.Unlock()
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	case r.Header.Get("Content-Type") != "application/offset+octet-stream":
		s.mu.Unlock()
		w.WriteHeader(http.StatusUnsupportedMediaType)
		return
	case r.Header.Get("Upload-Offset") != strconv.FormatInt(offset, 10):
		s.mu.Unlock()
		w.WriteHeader(http.StatusConflict)
		return
	}
	x.busy = true
	s.mu.Unlock()
	var got bytes.Buffer
	// What came before a break is kept.
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		x.busy = false
		p := got.Bytes()
		if s.Corrupt != nil {
			s.Corrupt(p)
		}
		x.data = append(x.data, p...)
		if e := recover(); e != nil {
			panic(e)
		}
		if int64(len(x.data)) > x.size {
			w.WriteHeader(http.StatusRequestEntityTooLarge)
			return
		}
		if int64(len(x.data)) == x.size {
			delete(s.sessions, id)
			if status, err := s.store(x.drive, x.parent, x.name, x.data, x.mtime, "", ""); err != nil {
				w.WriteHeader(status)
				return
			}
			n := x.parent.children[x.name]
			w.Header().Set("OC-FileId", x.drive.id+"!"+n.id)
		}
		w.Header().Set("Upload-Offset", strconv.Itoa(len(x.data)))
		w.WriteHeader(http.StatusNoContent)
	}()
	_, _ = io.Copy(&got, r.Body)
}

// asked lists the properties of a PROPFIND; nil is all.
func asked(body []byte) map[xml.Name]bool {
	var q struct {
		Prop *struct {
			Any []struct{ XMLName xml.Name } `xml:",any"`
		} `xml:"DAV: prop"`
	}
	if xml.Unmarshal(body, &q) != nil || q.Prop == nil {
		return nil
	}
	out := map[xml.Name]bool{}
	for _, p := range q.Prop.Any {
		out[p.XMLName] = true
	}
	return out
}

type prop struct {
	ns, name, xml string // xml is the inner text, escaped
}

func escaped(s string) string {
	var b bytes.Buffer
	_ = xml.EscapeText(&b, []byte(s))
	return b.String()
}

// propstat renders what is asked for, and what is asked for and not there.
func propstat(href string, props []prop, wanted map[xml.Name]bool, processing bool) string {
	var b, missing strings.Builder
	status := "HTTP/1.1 200 OK"
	if processing {
		status = "HTTP/1.1 425 TOO EARLY"
	}
	fmt.Fprintf(&b, "<d:response><d:href>%s</d:href><d:propstat><d:prop>", escaped(href))
	have := map[xml.Name]bool{}
	for _, p := range props {
		space := map[string]string{"d": "DAV:", "oc": "http://owncloud.org/ns"}[p.ns]
		name := xml.Name{Space: space, Local: p.name}
		have[name] = true
		if wanted == nil || wanted[name] {
			fmt.Fprintf(&b, "<%s:%s>%s</%[1]s:%[2]s>", p.ns, p.name, p.xml)
		}
	}
	fmt.Fprintf(&b, "</d:prop><d:status>%s</d:status></d:propstat>", status)
	for name := range wanted {
		if !have[name] {
			ns := "oc"
			if name.Space == "DAV:" {
				ns = "d"
			}
			fmt.Fprintf(&missing, "<%s:%s></%[1]s:%[2]s>", ns, name.Local)
		}
	}
	if missing.Len() > 0 && !processing {
		fmt.Fprintf(&b, "<d:propstat><d:prop>%s</d:prop><d:status>HTTP/1.1 404 Not Found</d:status></d:propstat>", missing.String())
	}
	b.WriteString("</d:response>")
	return b.String()
}

func multistatus(w http.ResponseWriter, responses []string) {
	w.Header().Set("Content-Type", "application/xml; charset=utf-8")
	w.WriteHeader(http.StatusMultiStatus)
	fmt.Fprintf(w, `<d:multistatus xmlns:s="http://sabredav.org/ns" xmlns:d="DAV:" xmlns:oc="http://owncloud.org/ns">%s</d:multistatus>`, strings.Join(responses, ""))
}

func href(elements []string, folder bool) string {
	var b strings.Builder
	for _, e := range elements {
		b.WriteString("/" + strings.ReplaceAll(url.PathEscape(e), "%24", "$"))
	}
	if folder {
		b.WriteString("/")
	}
	return b.String()
}

func (s *Server) response(d *drive, n *node, at []string, wanted map[xml.Name]bool) string {
	props := []prop{
		{"oc", "id", escaped(d.id + "!" + n.id)}, {"oc", "fileid", escaped(d.id + "!" + n.id)},
		{"d", "getetag", escaped(n.etag())}, {"d", "getlastmodified", n.mtime.UTC().Format(http.TimeFormat)},
		{"oc", "size", strconv.FormatInt(n.size(), 10)}, {"oc", "name", escaped(n.name)}, {"oc", "permissions", "RDNVWZP"},
	}
	if len(n.tags) > 0 {
		props = append(props, prop{"oc", "tags", strings.Join(n.tags, ",")})
	}
	if n.folder {
		props = append(props, prop{"d", "resourcetype", "<d:collection/>"})
	} else {
		props = append(props, prop{"d", "resourcetype", ""}, prop{"d", "getcontentlength", strconv.Itoa(len(n.data))})
		if len(n.data) > 0 {
			sha, md := sha1.Sum(n.data), md5.Sum(n.data)
			sums := fmt.Sprintf("SHA1:%x MD5:%x ADLER32:%08x", sha, md, adler32.Checksum(n.data))
			props = append(props, prop{"oc", "checksums", "<oc:checksum>" + sums + "</oc:checksum>"})
		}
	}
	processing := n.processing > 0
	if processing {
		n.processing--
	}
	return propstat(href(at, n.folder), props, wanted, processing)
}

// meta serves the versions of a file. The list stands under an address without /v, as in the real server.
func (s *Server) meta(w http.ResponseWriter, r *http.Request, u *user, id string, key []string) {
	_, n, _ := s.root(id, u)
	if n == nil {
		fail(w, http.StatusNotFound, "Resource not found")
		return
	}
	switch {
	case r.Method == "PROPFIND" && len(key) == 0:
		list := []string{propstat(href([]string{"dav", "meta", id}, true), []prop{{"d", "resourcetype", "<d:collection/>"}}, nil, false)}
		for _, v := range n.versions {
			list = append(list, propstat(href([]string{"dav", "meta", id, "v", v.key}, false), []prop{
				{"d", "resourcetype", ""}, {"d", "getcontentlength", strconv.Itoa(len(v.data))},
				{"d", "getlastmodified", v.mtime.UTC().Format(http.TimeFormat)},
			}, nil, false))
		}
		multistatus(w, list)
	case r.Method == http.MethodGet && len(key) == 1:
		for _, v := range n.versions {
			if v.key == key[0] {
				_, _ = w.Write(v.data)
				return
			}
		}
		fail(w, http.StatusNotFound, "Resource not found")
	default:
		w.WriteHeader(http.StatusMethodNotAllowed)
	}
}

func (s *Server) trash(w http.ResponseWriter, u *user, id string) {
	d, base, _ := s.root(id, u)
	if base == nil {
		fail(w, http.StatusNotFound, "Resource not found")
		return
	}
	list := []string{propstat(href([]string{"dav", "spaces", "trash-bin", id}, true), []prop{{"d", "resourcetype", "<d:collection/>"}}, nil, false)}
	for _, t := range d.trash {
		props := []prop{
			{"oc", "trashbin-original-filename", escaped(t.name)}, {"oc", "trashbin-original-location", escaped(t.path)},
			{"oc", "trashbin-delete-timestamp", strconv.FormatInt(t.deleted.Unix(), 10)},
		}
		if t.folder {
			props = append(props, prop{"d", "resourcetype", "<d:collection/>"}, prop{"oc", "size", strconv.FormatInt(t.size(), 10)})
		} else {
			props = append(props, prop{"d", "resourcetype", ""}, prop{"d", "getcontentlength", strconv.Itoa(len(t.data))})
		}
		list = append(list, propstat(href([]string{"dav", "spaces", "trash-bin", id, t.id}, t.folder), props, nil, false))
	}
	multistatus(w, list)
}
