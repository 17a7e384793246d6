package restore

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// The event store keeps the posix driver's map from absolute paths to ids in streams of these names.
const (
	idCacheStreams = "jetstream/$G/streams"
	idCachePrefix  = "KV_ids-"
)

// IDCaches lists the id caches in the event store at nats: none if it is no event store, or not of that
// kind. A server that finds the old place of moved files still there takes the files for copies of those
// and drops their ids, shares and versions; without the cache it makes it anew by a scan.
func IDCaches(nats string) ([]string, error) {
	dir := filepath.Join(nats, filepath.FromSlash(idCacheStreams))
	list, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range list {
		if strings.HasPrefix(e.Name(), idCachePrefix) {
			out = append(out, filepath.Join(dir, e.Name()))
		}
	}
	return out, nil
}

// DropIDCaches removes them, and returns what it has removed.
func DropIDCaches(nats string) ([]string, error) {
	list, err := IDCaches(nats)
	if err != nil || len(list) == 0 {
		return nil, err
	}
	// What was restored may hold links: none of them is followed.
	root, err := os.OpenRoot(nats)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	for i, p := range list {
		rel, err := filepath.Rel(nats, p)
		if err == nil {
			err = root.RemoveAll(rel)
		}
		if err != nil {
			return list[:i], err
		}
	}
	return list, nil
}
