// Package resttest is a server of restic's REST protocol for tests, over a directory in restic's layout.
// It follows rest-server: nothing is overwritten, contents must fit their names, and an append-only
// server deletes locks only.
package resttest

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"time"
)

// Server is a handler.
type Server struct {
	Dir        string
	AppendOnly bool
	// User and Password that clients must give; empty: none.
	User, Password string
	// Old speaks version 1 only: lists without sizes.
	Old bool
}

var route = regexp.MustCompile(`^(?:/[a-z0-9]+){0,2}?/(?:(config)|(data|keys|locks|snapshots|index)/([0-9a-f]{64})?|)$`)

func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	fail := func(code int) { http.Error(w, http.StatusText(code), code) }
	if s.User != "" || s.Password != "" {
		if u, p, ok := r.BasicAuth(); !ok || u != s.User || p != s.Password {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			fail(http.StatusUnauthorized)
			return
		}
	}
	m := route.FindStringSubmatch(r.URL.Path)
	if m == nil {
		fail(http.StatusNotFound)
		return
	}
	kind, name := m[2], m[3]
	file := filepath.Join(s.Dir, kind, name)
	switch {
	case m[1] != "":
		file = filepath.Join(s.Dir, "config")
	case kind == "data" && name != "":
		file = filepath.Join(s.Dir, kind, name[:2], name)
	}
	isFile := m[1] != "" || name != ""
	switch {
	case kind == "" && m[1] == "":
		if r.Method != http.MethodPost || r.URL.Query().Get("create") != "true" {
			fail(http.StatusMethodNotAllowed)
			return
		}
		for _, d := range []string{"data", "keys", "locks", "snapshots", "index"} {
			if err := os.MkdirAll(filepath.Join(s.Dir, d), 0o700); err != nil {
				fail(http.StatusInternalServerError)
				return
			}
		}
	case !isFile && r.Method == http.MethodGet:
		s.list(w, filepath.Join(s.Dir, kind))
	case !isFile:
		fail(http.StatusMethodNotAllowed)
	case r.Method == http.MethodGet || r.Method == http.MethodHead:
		f, err := os.Open(file)
		if err != nil {
			fail(http.StatusNotFound)
			return
		}
		defer f.Close()
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, r, "", time.Time{}, f)
	case r.Method == http.MethodPost:
		fail(s.save(file, name, r))
	case r.Method == http.MethodDelete:
		if s.AppendOnly && kind != "locks" {
			fail(http.StatusForbidden)
			return
		}
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			fail(http.StatusInternalServerError)
		}
	default:
		fail(http.StatusMethodNotAllowed)
	}
}

func (s *Server) save(file, name string, r *http.Request) int {
	if r.ContentLength < 0 {
		return http.StatusLengthRequired
	}
	if _, err := os.Lstat(file); err == nil {
		return http.StatusForbidden
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return http.StatusInternalServerError
	}
	tmp, err := os.CreateTemp(filepath.Dir(file), name+".rest-server-temp")
	if err != nil {
		return http.StatusInternalServerError
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(tmp, h), r.Body)
	if err != nil || n != r.ContentLength || (name != "" && hex.EncodeToString(h.Sum(nil)) != name) {
		return http.StatusBadRequest
	}
	if err := os.Link(tmp.Name(), file); err != nil { // fails where the name exists, unlike a rename
		return http.StatusForbidden
	}
	return http.StatusOK
}

func (s *Server) list(w http.ResponseWriter, dir string) {
	type entry struct {
		Name string `json:"name"`
		Size int64  `json:"size"`
	}
	list, names := []entry{}, []string{}
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		fi, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		list, names = append(list, entry{d.Name(), fi.Size()}), append(names, d.Name())
		return err
	})
	if err != nil {
		http.Error(w, "Not Found", http.StatusNotFound)
		return
	}
	var out any = list
	w.Header().Set("Content-Type", "application/vnd.x.restic.rest.v2")
	if s.Old {
		out = names
		w.Header().Set("Content-Type", "application/vnd.x.restic.rest.v1")
	}
	text, _ := json.Marshal(out)
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	_, _ = w.Write(text)
}
