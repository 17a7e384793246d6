package consistency

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// Dir is a store in a directory. No link below it is followed: whoever can write into a store must not
// have a check that runs as root read files elsewhere.
type Dir struct {
	fd     int
	path   string // for messages
	prefix string
	layout string
}

// OpenDir opens the store at path, which may itself be reached through links.
func OpenDir(dir, layout, prefix string) (*Dir, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	return &Dir{fd: fd, path: dir, prefix: prefix, layout: layout}, nil
}

// Close releases the directory.
func (d *Dir) Close() error { return unix.Close(d.fd) }

func (d *Dir) abs(rel string) string { return path.Join(d.path, rel) }

// noOpenat2 is set when the kernel (before 5.6) or a filter of system calls refuses openat2.
var noOpenat2 atomic.Bool

// open opens rel below the root without following links.
func (d *Dir) open(rel string, flags int) (int, error) {
	if rel == "" {
		rel = "."
	}
	flags |= unix.O_CLOEXEC | unix.O_NOFOLLOW
	how := unix.OpenHow{Flags: uint64(flags), Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS}
	for !noOpenat2.Load() {
		fd, err := unix.Openat2(d.fd, rel, &how)
		switch {
		case err == nil:
			return fd, nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN): // a rename on the way
		case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EPERM):
			noOpenat2.Store(true)
		default:
			return -1, &fs.PathError{Op: "open", Path: d.abs(rel), Err: err}
		}
	}
	at := d.fd
	parts := strings.Split(rel, "/")
	for i, p := range parts {
		f := unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC | unix.O_NOFOLLOW
		if i == len(parts)-1 {
			f = flags
		}
		fd, err := unix.Openat(at, p, f, 0)
		if p == ".." {
			err = unix.EXDEV
		}
		if at != d.fd {
			_ = unix.Close(at)
		}
		if err != nil {
			if fd >= 0 {
				_ = unix.Close(fd)
			}
			return -1, &fs.PathError{Op: "open", Path: d.abs(rel), Err: err}
		}
		at = fd
	}
	return at, nil
}

// openFile opens a regular file, and nothing else: a FIFO must not hang the check.
func (d *Dir) openFile(rel string) (*os.File, error) {
	fd, err := d.open(rel, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = errors.New("no regular file")
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, &fs.PathError{Op: "open", Path: d.abs(rel), Err: err}
	}
	return os.NewFile(uintptr(fd), d.abs(rel)), nil
}

// dirWalk is one walk.
type dirWalk struct {
	d          *Dir
	ctx        context.Context
	fn         func(*Entry) error
	unreadable func(string, error)
	buf        []byte
	e          Entry
	at         int // descriptor of the folder that e is in, or -1
	opened     bool
	name       string
}

func (d *Dir) walk(ctx context.Context, rel string, fn func(*Entry) error, unreadable func(string, error)) error {
	w := &dirWalk{d: d, ctx: ctx, fn: fn, unreadable: unreadable, buf: make([]byte, 32<<10)}
	w.e = Entry{stat: w.stat, data: w.data, attrs: w.attrs, open: w.open}
	if rel != "" {
		fd, err := d.open(path.Dir(rel), unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err = unix.Fstatat(fd, path.Base(rel), &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			err = &fs.PathError{Op: "stat", Path: d.abs(rel), Err: err}
		} else if err = w.entry(fd, rel, path.Base(rel), kindOf(st.Mode)); err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			_ = unix.Close(fd)
			return nil
		}
		_ = unix.Close(fd)
		if err != nil {
			return err
		}
	}
	return w.dir(rel)
}

func kindOf(mode uint32) byte {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return 'f'
	case unix.S_IFDIR:
		return 'd'
	case unix.S_IFLNK:
		return 'l'
	}
	return '?'
}

type dirent struct {
	name string
	kind byte // 0 if the file system does not tell
}

// dir walks through the folder rel. Its descriptor is closed before the walk goes down: a chain of a
// thousand folders must not hold as many.
func (w *dirWalk) dir(rel string) error {
	if err := w.ctx.Err(); err != nil {
		return context.Cause(w.ctx)
	}
	fd, err := w.d.open(rel, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		if !errors.Is(err, unix.ENOENT) { // gone in between: it is not part of the picture
			w.unreadable(rel, err)
		}
		return nil
	}
	list, err := w.names(fd)
	if err != nil {
		w.unreadable(rel, &fs.PathError{Op: "read directory", Path: w.d.abs(rel), Err: err})
	}
	sort.Slice(list, func(i, j int) bool { return list[i].name < list[j].name })
	prefix := rel
	if prefix != "" {
		prefix += "/"
	}
	var below []string
	for i := range list {
		p := prefix + list[i].name
		kind := list[i].kind
		if kind == 0 {
			var st unix.Stat_t
			if err := unix.Fstatat(fd, list[i].name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				if !errors.Is(err, unix.ENOENT) {
					w.unreadable(p, &fs.PathError{Op: "stat", Path: w.d.abs(p), Err: err})
				}
				continue
			}
			kind = kindOf(st.Mode)
		}
		if kind == 'd' {
			below = append(below, p)
			continue
		}
		if err := w.entry(fd, p, list[i].name, kind); err != nil {
			_ = unix.Close(fd)
			return err
		}
	}
	_ = unix.Close(fd)
	for _, p := range below {
		// Few folders are asked for more than their name: their folder is opened again only then.
		err := w.entry(-1, p, path.Base(p), 'd')
		if w.opened {
			_ = unix.Close(w.at)
			w.opened = false
		}
		if err == nil {
			err = w.dir(p)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// folder returns the descriptor of the folder of the entry at hand.
func (w *dirWalk) folder() (int, error) {
	if w.at >= 0 {
		return w.at, nil
	}
	fd, err := w.d.open(path.Dir(w.e.Path), unix.O_PATH|unix.O_DIRECTORY)
	if err == nil {
		w.at, w.opened = fd, true
	}
	return fd, err
}

func (w *dirWalk) entry(at int, rel, name string, kind byte) error {
	w.at, w.name = at, name
	w.e.Path, w.e.Type, w.e.Link = rel, kind, ""
	if kind == 'l' {
		var buf [4096]byte
		n, err := unix.Readlinkat(at, name, buf[:])
		if err != nil {
			if !errors.Is(err, unix.ENOENT) {
				w.unreadable(rel, &fs.PathError{Op: "readlink", Path: w.d.abs(rel), Err: err})
			}
			return nil
		}
		w.e.Link = string(buf[:n])
	}
	return w.fn(&w.e)
}

func (w *dirWalk) fail(op string, err error) error {
	return &fs.PathError{Op: op, Path: w.d.abs(w.e.Path), Err: err}
}

func (w *dirWalk) stat() (size, sec, nsec int64, err error) {
	at, err := w.folder()
	if err != nil {
		return 0, 0, 0, err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(at, w.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return 0, 0, 0, w.fail("stat", err)
	}
	return st.Size, st.Mtim.Sec, st.Mtim.Nsec, nil
}

func (w *dirWalk) data() ([]byte, error) {
	fd, err := unix.Openat(w.at, w.name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, w.fail("open", err)
	}
	f := os.NewFile(uintptr(fd), w.d.abs(w.e.Path))
	defer f.Close()
	p, err := io.ReadAll(io.LimitReader(f, metaLimit+1))
	if err == nil && len(p) > metaLimit {
		err = fmt.Errorf("%s has more than %d bytes", f.Name(), metaLimit)
	}
	return p, err
}

func (w *dirWalk) open() (io.ReadCloser, error) {
	f, err := w.d.openFile(w.e.Path)
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (w *dirWalk) attrs() ([]ocis.Attribute, error) {
	fd, err := w.folder()
	if err != nil {
		return nil, err
	}
	at := "/proc/self/fd/" + strconv.Itoa(fd) + "/" + w.name // pins the folder
	var list []byte
	for size := 1 << 10; ; size *= 4 {
		list = make([]byte, size)
		n, err := unix.Llistxattr(at, list)
		if errors.Is(err, unix.ERANGE) && size < 1<<20 {
			continue
		}
		if errors.Is(err, unix.ENOTSUP) {
			return nil, nil
		}
		if err != nil {
			return nil, w.fail("listxattr", err)
		}
		list = list[:n]
		break
	}
	var out []ocis.Attribute
	for _, name := range bytes.Split(list, []byte{0}) {
		if !bytes.HasPrefix(name, []byte(w.d.prefix)) || len(name) == 0 {
			continue
		}
		for size := 256; ; size *= 4 {
			v := make([]byte, size)
			n, err := unix.Lgetxattr(at, string(name), v)
			if errors.Is(err, unix.ERANGE) && size < 1<<20 {
				continue
			}
			if errors.Is(err, unix.ENODATA) { // removed in between
				break
			}
			if err != nil {
				return nil, w.fail("getxattr "+string(name), err)
			}
			out = append(out, ocis.Attribute{Key: string(name), Value: v[:n]})
			break
		}
	}
	return out, nil
}

// names lists the folder fd.
func (w *dirWalk) names(fd int) ([]dirent, error) {
	var out []dirent
	for {
		n, err := unix.Getdents(fd, w.buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return out, err
		}
		for b := w.buf[:n]; len(b) > 0; {
			// struct linux_dirent64: ino 8, off 8, reclen 2, type 1, name
			l := binary.NativeEndian.Uint16(b[16:])
			name := b[19:l]
			if i := bytes.IndexByte(name, 0); i >= 0 {
				name = name[:i]
			}
			if s := string(name); s != "." && s != ".." {
				kind := byte('?')
				switch b[18] {
				case unix.DT_UNKNOWN:
					kind = 0
				case unix.DT_REG:
					kind = 'f'
				case unix.DT_DIR:
					kind = 'd'
				case unix.DT_LNK:
					kind = 'l'
				}
				out = append(out, dirent{s, kind})
			}
			b = b[l:]
		}
	}
}

// Spaces implements Place.
func (d *Dir) Spaces(ctx context.Context) ([]Space, error) {
	find := d.decomposedSpaces
	if d.layout == string(ocis.Posix) {
		find = d.posixSpaces
	}
	list, err := find(ctx)
	slices.SortFunc(list, func(a, b Space) int {
		return strings.Compare(a.ID+"\x00"+a.Root, b.ID+"\x00"+b.Root)
	})
	return list, err
}

// list returns the entries of one folder; none if there is no such folder.
func (d *Dir) list(rel string) ([]dirent, error) {
	fd, err := d.open(rel, unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	w := &dirWalk{d: d, buf: make([]byte, 32<<10)}
	out, err := w.names(fd)
	for i := range out {
		var st unix.Stat_t
		if out[i].kind == 0 && unix.Fstatat(fd, out[i].name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
			out[i].kind = kindOf(st.Mode)
		}
	}
	return out, err
}

func (d *Dir) decomposedSpaces(ctx context.Context) ([]Space, error) {
	var out []Space
	first, err := d.list("spaces")
	if err != nil {
		return nil, err
	}
	for _, a := range first {
		if a.kind != 'd' {
			continue
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		second, err := d.list("spaces/" + a.name)
		if err != nil {
			return nil, err
		}
		for _, b := range second {
			if s := (Space{ID: a.name + b.name, Root: "spaces/" + a.name + "/" + b.name}); b.kind == 'd' && ocis.SpacePath(s.ID) == s.Root {
				out = append(out, s)
			}
		}
	}
	return out, nil
}

// posixDepth bounds how deep space roots are looked for: the product's path templates have two levels,
// and an administrator may have added some. Capture looks as deep.
const posixDepth = 6

func (d *Dir) posixSpaces(ctx context.Context) ([]Space, error) {
	var out []Space
	var look func(rel string, depth int) error
	look = func(rel string, depth int) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		list, err := d.list(rel)
		if err != nil {
			return err
		}
		for _, e := range list {
			p := path.Join(rel, e.name)
			if e.kind != 'd' || p == "indexes" || p == "uploads" || p == "changes" {
				continue
			}
			m, err := d.dirMeta(p)
			if err != nil {
				return err
			}
			switch {
			case m.Space != nil:
				s := Space{ID: m.Space.ID, Root: p}
				if s.ID == "" {
					s.ID = m.ID
				}
				out = append(out, s)
			case d.looksLikeSpace(p):
				out = append(out, Space{Root: p})
			case depth < posixDepth:
				if err := look(p, depth+1); err != nil {
					return err
				}
			}
		}
		return nil
	}
	err := look("", 1)
	return out, err
}

// looksLikeSpace tells a space that has lost its attributes by what only spaces have.
func (d *Dir) looksLikeSpace(p string) bool {
	list, err := d.list(p)
	if err != nil {
		return false
	}
	dir := path.Dir(p)
	for _, e := range list {
		if e.kind == 'd' && (e.name == ".oc-nodes" || e.name == ".Trash" || e.name == ".space") {
			return true
		}
	}
	return dir == "users" || dir == "projects"
}

// dirMeta reads the attributes of a folder.
func (d *Dir) dirMeta(rel string) (ocis.NodeMeta, error) {
	fd, err := d.open(path.Dir(rel), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return ocis.NodeMeta{}, err
	}
	defer unix.Close(fd)
	w := &dirWalk{d: d, at: fd, name: path.Base(rel)}
	w.e.Path = rel
	attrs, err := w.attrs()
	if err != nil {
		return ocis.NodeMeta{}, err
	}
	m, err := ocis.NodeFromAttributes(d.prefix, attrs)
	var ae *ocis.AttributeError
	if errors.As(err, &ae) {
		err = nil
	}
	return m, err
}

// Walk implements Place.
func (d *Dir) Walk(ctx context.Context, s Space, sub string, fn func(*Entry) error, unreadable func(string, error)) error {
	err := d.walk(ctx, path.Join(s.Root, sub), fn, unreadable)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Rest implements Place.
func (d *Dir) Rest(ctx context.Context, fn func(*Entry) error, unreadable func(string, error)) error {
	for _, top := range []string{"indexes", "uploads", "changes"} {
		err := d.walk(ctx, top, fn, unreadable)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
