// Package posix reads stores of the posix driver on disk, where files and folders are what users see and
// their attributes are the metadata. No link is followed.
package posix

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// Folders of a space that users do not see.
const (
	Nodes = ".oc-nodes" // versions, and metadata that attributes have no room for
	Trash = ".Trash"
	Tmp   = ".oc-tmp" // uploads
)

// depth bounds how deep the folders of spaces are looked for; capture looks as deep.
const depth = 6

// Hidden tells of a path in a space whether users do not see it.
func Hidden(in string) bool {
	first, _, _ := strings.Cut(in, "/")
	return first == Nodes || first == Trash || first == Tmp
}

// IsLock tells the server's lock files, which lie beside what they lock.
func IsLock(p string) bool { return strings.HasSuffix(p, ".mlock") || strings.HasSuffix(p, ".flock") }

// Open opens a file or folder, and nothing else: not what a link leads to, not a FIFO.
//
// Errors: fs.ErrInvalid if it is something else or the way to it is no folder; those of the disk.
func Open(root *os.Root, rel string) (*os.File, error) {
	if err := Plain(root, rel); err != nil {
		return nil, err
	}
	fi, err := root.Lstat(rel)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() && !fi.IsDir() {
		return nil, &fs.PathError{Op: "open", Path: rel, Err: fs.ErrInvalid}
	}
	return root.Open(rel)
}

// Plain makes sure that the way to rel goes through folders alone. os.Root keeps all below it, but would
// follow a link there to another space. What is not there yet is fine.
func Plain(root *os.Root, rel string) error {
	for i := range len(rel) {
		if rel[i] != '/' {
			continue
		}
		fi, err := root.Lstat(rel[:i])
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if !fi.IsDir() {
			return &fs.PathError{Op: "go through", Path: rel[:i], Err: fs.ErrInvalid}
		}
	}
	return nil
}

// List lists a folder by name; nothing if it is none.
func List(root *os.Root, rel string) []os.DirEntry {
	if rel == "" {
		rel = "."
	}
	f, err := Open(root, rel)
	if err != nil {
		return nil
	}
	defer f.Close()
	out, _ := f.ReadDir(-1)
	slices.SortFunc(out, func(a, b os.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return out
}

// Attributes are those of an open file or folder that any user may set, the server's among them.
func Attributes(f *os.File) ([]ocis.Attribute, error) {
	fail := func(err error) ([]ocis.Attribute, error) {
		return nil, &fs.PathError{Op: "read attributes of", Path: f.Name(), Err: err}
	}
	list := make([]byte, 64<<10) // as much as the kernel gives
	n, err := unix.Flistxattr(int(f.Fd()), list)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return fail(err)
	}
	var out []ocis.Attribute
	value := make([]byte, 64<<10)
	for name := range bytes.SplitSeq(list[:n], []byte{0}) {
		if !bytes.HasPrefix(name, []byte("user.")) {
			continue
		}
		k, err := unix.Fgetxattr(int(f.Fd()), string(name), value)
		if errors.Is(err, unix.ENODATA) { // removed in between
			continue
		}
		if err != nil {
			return fail(err)
		}
		out = append(out, ocis.Attribute{Key: string(name), Value: bytes.Clone(value[:k])})
	}
	slices.SortFunc(out, func(a, b ocis.Attribute) int { return strings.Compare(a.Key, b.Key) })
	return out, nil
}

// Meta reads what the server keeps of a file or folder. ok tells whether it keeps anything.
func Meta(root *os.Root, rel, prefix string) (m ocis.NodeMeta, ok bool, err error) {
	f, err := Open(root, rel)
	if err != nil {
		return m, false, err
	}
	defer f.Close()
	all, err := Attributes(f)
	if err != nil {
		return m, false, err
	}
	own := all[:0]
	for _, a := range all {
		if strings.HasPrefix(a.Key, prefix) {
			own = append(own, a)
		}
	}
	if len(own) == 0 {
		return m, false, nil
	}
	m, err = ocis.NodeFromAttributes(prefix, own)
	var ae *ocis.AttributeError
	if errors.As(err, &ae) { // the other ones were read
		err = nil
	}
	return m, err == nil, err
}

// Space is a space on disk.
type Space struct {
	ID  string
	Rel string // its folder, below the root
	ocis.NodeMeta
}

// Spaces finds the spaces of the store at top, "" being the root itself, in the order of their folders.
func Spaces(ctx context.Context, root *os.Root, top, prefix string) ([]Space, error) {
	var out []Space
	var look func(rel string, n int) error
	look = func(rel string, n int) error {
		for _, e := range List(root, rel) {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			name := e.Name()
			if !e.IsDir() || rel == top && (name == "indexes" || name == "uploads" || name == "changes" || strings.HasPrefix(name, ".holdfast-")) {
				continue
			}
			p := path.Join(rel, name)
			m, _, err := Meta(root, p, prefix)
			switch {
			case err != nil && !errors.Is(err, fs.ErrNotExist):
				return err
			case m.Space != nil:
				s := Space{ID: m.Space.ID, Rel: p, NodeMeta: m}
				if s.ID == "" {
					s.ID = m.ID
				}
				out = append(out, s)
			case n < depth:
				if err := look(p, n+1); err != nil {
					return err
				}
			}
		}
		return nil
	}
	err := look(top, 1)
	return out, err
}
