package drill

import (
	"cmp"
	"context"
	"crypto/sha1" // what the server compares contents by
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/cloud"
)

// SpaceReport tells how one space compares.
type SpaceReport struct {
	ID       string `json:"id"`
	Alias    string `json:"alias"`
	As       string `json:"as,omitempty"` // the user who asked
	Folders  int64  `json:"folders"`
	Files    int64  `json:"files"`
	Versions int64  `json:"versions"`
	Trash    int64  `json:"trash"`
	Read     int64  `json:"read"` // files whose content was read and compared
	// NotAsked says why the server was not asked for it; "" if it was.
	NotAsked string `json:"not_asked,omitempty"`
	// Notes are what is odd and was so in the original, the first maxDifferences.
	Notes []string `json:"notes,omitempty"`
	// Differences are the first maxDifferences; Count is how many there are.
	Differences []string `json:"differences"`
	Count       int64    `json:"difference_count"`
}

const maxDifferences = 100

// readFiles is how many contents of a space are read through the server.
const readFiles = 20

func (s *SpaceReport) differ(format string, args ...any) {
	s.Count++
	if len(s.Differences) < maxDifferences {
		s.Differences = append(s.Differences, fmt.Sprintf(format, args...))
	}
}

// comparer compares one space.
type comparer struct {
	view  *browse.View
	c     *cloud.Client
	drive string
	r     *SpaceReport
	// without counts the files without versions that were asked about.
	without int
}

// maxDepth is more than paths of 4,096 bytes can reach.
const maxDepth = 2048

func (x *comparer) space(ctx context.Context, s *browse.Space) error {
	root, err := x.view.Item(ctx, s, "")
	if err != nil {
		return err
	}
	if err := x.folder(ctx, root, 0); err != nil {
		return err
	}
	return x.trash(ctx, s)
}

func (x *comparer) folder(ctx context.Context, dir *browse.Item, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("%q: too many folders in one another", dir.Path[:64])
	}
	want, err := x.view.List(ctx, dir)
	if err != nil {
		return err
	}
	versions, err := x.view.CountVersions(ctx, dir)
	if err != nil {
		return err
	}
	got := map[string]cloud.Entry{}
	err = x.c.List(ctx, x.drive, dir.Path, func(e cloud.Entry) error { got[e.Name] = e; return nil })
	if errors.Is(err, cloud.ErrName) || errors.Is(err, cloud.ErrNotFound) {
		x.r.differ("%s: the server does not list it: %v", show(dir.Path), err)
		return nil
	}
	if err != nil {
		return err
	}
	x.r.Folders++
	for _, w := range want {
		name := w.Name()
		e, ok := got[name]
		delete(got, name)
		switch {
		case !ok:
			x.r.differ("%s: the server does not have it", show(w.Path))
			continue
		case e.Folder != w.IsDir():
			x.r.differ("%s: a folder on one side and a file on the other", show(w.Path))
			continue
		case w.NodeID() != "" && e.NodeID() != w.NodeID():
			x.r.differ("%s: id %s instead of %s", show(w.Path), e.NodeID(), w.NodeID())
		}
		if w.IsDir() {
			if err := x.folder(ctx, w, depth+1); err != nil {
				return err
			}
			continue
		}
		x.r.Files++
		if e.Size != int64(w.Node.Size) {
			x.r.differ("%s: %d bytes instead of %d", show(w.Path), e.Size, w.Node.Size)
		}
		if sum := w.SHA1(); sum != "" && e.SHA1 != sum {
			x.r.differ("%s: SHA-1 %s instead of %s", show(w.Path), cmp.Or(e.SHA1, "none"), sum)
		}
		if e.ModTime.Unix() != w.Node.ModTime.Unix() {
			x.r.differ("%s: time %v instead of %v", show(w.Path), e.ModTime, w.Node.ModTime.UTC())
		}
		// Each question costs the server a tenth of a second, so that not all files can be asked for versions
		// that they do not have.
		if versions[w.Node.Name] > 0 || w.Space.Posix() {
			if err := x.versions(ctx, w, e); err != nil {
				return err
			}
		}
		if x.r.Read < readFiles && w.Node.Size > 0 {
			if err := x.content(ctx, w, e); err != nil {
				return err
			}
		}
	}
	for _, name := range slices.Sorted(keys(got)) {
		x.r.differ("%s: the server has it, the snapshot does not", show(strings.TrimPrefix(dir.Path+"/"+name, "/")))
	}
	return nil
}

func keys[K comparable, V any](m map[K]V) func(func(K) bool) {
	return func(yield func(K) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// show makes a path fit for a line of a report.
func show(p string) string { return fmt.Sprintf("%q", "/"+p) }

func (x *comparer) versions(ctx context.Context, w *browse.Item, e cloud.Entry) error {
	list, err := x.view.Versions(ctx, w)
	if err != nil {
		return err
	}
	if len(list) == 0 {
		if x.without++; x.without > readFiles {
			return nil
		}
	}
	got := map[string]int64{}
	have, err := x.c.Versions(ctx, e.ID)
	if err != nil {
		var se *cloud.StatusError
		if errors.As(err, &se) && ctx.Err() == nil {
			x.r.differ("%s: its versions: %v", show(w.Path), err)
			return nil
		}
		return err
	}
	for _, v := range have {
		got[v.Key] = v.Size
	}
	for _, v := range list {
		size, ok := got[v.VersionKey()]
		delete(got, v.VersionKey())
		switch {
		case !ok:
			x.r.differ("%s: the server does not have its version %s", show(w.Path), v.Stamp)
		case size != int64(v.Node.Size):
			x.r.differ("%s: its version %s has %d bytes instead of %d", show(w.Path), v.Stamp, size, v.Node.Size)
		default:
			x.r.Versions++
		}
	}
	for _, key := range slices.Sorted(keys(got)) {
		x.r.differ("%s: the server has a version %s, the snapshot does not", show(w.Path), key)
	}
	return nil
}

// content reads a file through the server and compares it with the snapshot.
func (x *comparer) content(ctx context.Context, w *browse.Item, e cloud.Entry) error {
	c, err := x.view.Content(w)
	if err != nil {
		return err
	}
	want := sha1.New()
	if err := c.WriteTo(ctx, want); err != nil {
		return err
	}
	r, err := x.c.Open(ctx, x.drive, w.Path)
	if errors.Is(err, cloud.ErrNotFound) && w.Node.Name != w.Name() && e.ID != "" {
		// The posix driver lists what came back from the trash under another name by its old one, and finds
		// it by neither.
		if len(x.r.Notes) < maxDifferences {
			x.r.Notes = append(x.r.Notes, fmt.Sprintf("%s: the server finds it by its id alone, because its file is called %q, as in the original", show(w.Path), w.Node.Name))
		}
		r, err = x.c.Open(ctx, e.ID, "")
	}
	if err != nil {
		var se *cloud.StatusError
		if errors.As(err, &se) && ctx.Err() == nil {
			x.r.differ("%s: its content: %v", show(w.Path), err)
			return nil
		}
		return err
	}
	defer r.Close()
	got := sha1.New()
	if _, err := io.Copy(got, r); err != nil {
		return err
	}
	x.r.Read++
	if a, b := hex.EncodeToString(got.Sum(nil)), hex.EncodeToString(want.Sum(nil)); a != b {
		x.r.differ("%s: the server gives a content of SHA-1 %s, the snapshot holds %s", show(w.Path), a, b)
	}
	return nil
}

func (x *comparer) trash(ctx context.Context, s *browse.Space) error {
	want, err := x.view.Trash(ctx, s)
	if err != nil {
		return err
	}
	have, err := x.c.Trash(ctx, x.drive)
	if err != nil {
		var se *cloud.StatusError
		if errors.As(err, &se) && ctx.Err() == nil {
			x.r.differ("the trash: %v", err)
			return nil
		}
		return err
	}
	got := map[string]cloud.TrashItem{}
	for _, t := range have {
		got[t.Key] = t
	}
	for _, w := range want {
		key, err := x.view.TrashKey(ctx, w)
		if err != nil {
			return err
		}
		origin, err := x.view.Origin(ctx, w)
		if err != nil {
			return err
		}
		t, ok := got[key]
		delete(got, key)
		switch {
		case !ok:
			x.r.differ("trash: the server does not have %s", show(origin))
		case strings.Trim(t.Path, "/") != strings.Trim(origin, "/") || t.Folder != w.IsDir():
			x.r.differ("trash: %s instead of %s", show(t.Path), show(origin))
		case !w.IsDir() && t.Size > 0 && t.Size != int64(w.Node.Size): // servers of the 1.0 era give 0 for any
			x.r.differ("trash: %s has %d bytes instead of %d", show(origin), t.Size, w.Node.Size)
		default:
			x.r.Trash++
		}
	}
	for _, key := range slices.Sorted(keys(got)) {
		x.r.differ("trash: the server has %s, the snapshot does not", show(got[key].Path))
	}
	return nil
}
