package discover

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/holdfast-backup/holdfast/internal/mountinfo"
)

// PathMap says under which name a path of the server is found on this host.
type PathMap struct {
	Server string // as the server sees it, e.g. /var/lib/ocis
	Host   string // on this host, e.g. /srv/ocis/data
}

// ParseMap reads SERVER=HOST. Both must be absolute paths.
func ParseMap(s string) (PathMap, error) {
	server, host, ok := strings.Cut(s, "=")
	if !ok || !filepath.IsAbs(server) || !filepath.IsAbs(host) {
		return PathMap{}, fmt.Errorf("%q is no path map: it must read SERVER=HOST with two absolute paths, e.g. /var/lib/ocis=/srv/ocis/data", s)
	}
	return PathMap{Server: filepath.Clean(server), Host: filepath.Clean(host)}, nil
}

// pathMap is a list of maps with their rank; higher rank wins between equal prefixes.
type pathMap struct {
	entries []mapEntry
	root    string // before paths that no entry covers
}

type mapEntry struct {
	PathMap
	rank   int
	origin string // for messages and DataSet.Setting
}

const (
	rankMount = 1 // mounts of a container or process, volumes of a compose file
	rankBase  = 2 // --base-data-path for another configured base
	rankFlag  = 3 // --map
)

func (m *pathMap) add(p PathMap, rank int, origin string) {
	if p.Server == "" || p.Host == "" {
		return
	}
	m.entries = append(m.entries, mapEntry{PathMap{filepath.Clean(p.Server), filepath.Clean(p.Host)}, rank, origin})
}

// host translates a clean absolute path of the server.
func (m *pathMap) host(server string) string {
	if e := m.find(server); e != nil {
		return filepath.Join(e.Host, strings.TrimPrefix(server, e.Server))
	}
	return filepath.Join(m.root, server)
}

func (m *pathMap) find(server string) *mapEntry {
	var best *mapEntry
	for i := range m.entries {
		e := &m.entries[i]
		if !mountinfo.Below(server, e.Server) {
			continue
		}
		if best == nil || len(e.Server) > len(best.Server) || len(e.Server) == len(best.Server) && e.rank >= best.rank {
			best = e
		}
	}
	return best
}

// resolve follows symbolic links as far as the path exists.
func resolve(path string) string {
	path = filepath.Clean(path)
	rest := ""
	for p := path; ; p = filepath.Dir(p) {
		r, err := filepath.EvalSymlinks(p)
		if err == nil {
			return filepath.Join(r, rest)
		}
		if p == "/" || p == "." {
			return path
		}
		rest = filepath.Join(filepath.Base(p), rest)
	}
}

// exists reports whether path is there. Anything but a clear no is an error, e.g. no permission.
func exists(path string) (bool, error) {
	_, err := os.Stat(path)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return false, nil
	}
	return false, err
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}

func isFile(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}
