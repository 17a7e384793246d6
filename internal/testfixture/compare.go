package testfixture

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Options say what a comparison leaves out. The zero value compares everything.
type Options struct {
	// Ignore tells by the path relative to the trees ("." is the tops) what to pass over, with all
	// below it.
	Ignore      func(path string) bool
	IgnoreOwner bool
	IgnoreMode  bool
	IgnoreTimes bool
	// IgnoreTopTime passes over the mtime of the two top directories alone.
	IgnoreTopTime bool
	IgnoreXattrs  bool
	IgnoreLinks   bool // hard-link groups
	IgnoreHoles   bool
	// Limit is how many differences are reported; 0 is 100.
	Limit int
	// Workers is how many directories are compared at the same time; 0 is one. Ignore is called by each of them.
	Workers int
}

// Compare reports each difference between the trees as an error of the test: names, types,
// contents, modes, owners, mtimes to the nanosecond, extended attributes, symlink targets, device
// numbers, hard-link groups and holes.
func Compare(t testing.TB, wantDir, gotDir string, o Options) {
	t.Helper()
	diffs, err := DiffOptions(wantDir, gotDir, o)
	if err != nil {
		t.Fatalf("compare %s with %s: %v", wantDir, gotDir, err)
	}
	for _, d := range diffs {
		t.Error(d)
	}
}

// Diff compares two trees in everything. Each line names a path and what differs there.
func Diff(want, got string) ([]string, error) { return DiffOptions(want, got, Options{}) }

// DiffOptions is Diff with something left out.
func DiffOptions(want, got string, o Options) ([]string, error) {
	if o.Limit == 0 {
		o.Limit = 100
	}
	d := differ{o: o, linksWant: map[inode][]string{}, linksGot: map[inode][]string{}}
	d.workers.SetLimit(max(0, o.Workers-1))
	err := d.entry(want, got, ".")
	if other := d.workers.Wait(); err == nil {
		err = other
	}
	if err != nil {
		return nil, err
	}
	slices.Sort(d.out) // directories were done in any order
	if !o.IgnoreLinks {
		d.links()
	}
	if d.left > 0 {
		d.out = append(d.out, fmt.Sprintf("... and %d more differences", d.left))
	}
	return d.out, nil
}

type inode struct{ dev, ino uint64 }

type differ struct {
	o       Options
	workers errgroup.Group // besides the caller

	mu                  sync.Mutex
	out                 []string           // guarded by mu
	left                int                // guarded by mu
	linksWant, linksGot map[inode][]string // guarded by mu
}

// rooms are for contents, one for each side.
var rooms = sync.Pool{New: func() any { return new([2][128 << 10]byte) }}

func (d *differ) add(path, format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.out) >= d.o.Limit {
		d.left++
		return
	}
	d.out = append(d.out, fmt.Sprintf("%q: ", path)+fmt.Sprintf(format, args...))
}

func (d *differ) entry(want, got, rel string) error {
	if d.o.Ignore != nil && d.o.Ignore(rel) {
		return nil
	}
	var sw, sg unix.Stat_t
	if err := unix.Lstat(want, &sw); err != nil {
		return &os.PathError{Op: "lstat", Path: want, Err: err}
	}
	if err := unix.Lstat(got, &sg); err != nil {
		if errors.Is(err, unix.ENOENT) {
			d.add(rel, "missing")
			return nil
		}
		return &os.PathError{Op: "lstat", Path: got, Err: err}
	}
	if sw.Mode&unix.S_IFMT != sg.Mode&unix.S_IFMT {
		d.add(rel, "is %s instead of %s", typeName(sg.Mode), typeName(sw.Mode))
		return nil
	}
	kind := sw.Mode & unix.S_IFMT
	if !d.o.IgnoreMode && sw.Mode != sg.Mode {
		d.add(rel, "mode %04o instead of %04o", sg.Mode&0o7777, sw.Mode&0o7777)
	}
	if !d.o.IgnoreOwner && (sw.Uid != sg.Uid || sw.Gid != sg.Gid) {
		d.add(rel, "owner %d:%d instead of %d:%d", sg.Uid, sg.Gid, sw.Uid, sw.Gid)
	}
	if !d.o.IgnoreTimes && !(d.o.IgnoreTopTime && rel == ".") && sw.Mtim != sg.Mtim {
		d.add(rel, "mtime %s instead of %s", stampOf(sg.Mtim), stampOf(sw.Mtim))
	}
	if !d.o.IgnoreXattrs {
		if err := d.xattrs(want, got, rel); err != nil {
			return err
		}
	}
	if kind != unix.S_IFDIR && (sw.Nlink > 1 || sg.Nlink > 1) {
		d.mu.Lock()
		if sw.Nlink > 1 {
			d.linksWant[inode{sw.Dev, sw.Ino}] = append(d.linksWant[inode{sw.Dev, sw.Ino}], rel)
		}
		if sg.Nlink > 1 {
			d.linksGot[inode{sg.Dev, sg.Ino}] = append(d.linksGot[inode{sg.Dev, sg.Ino}], rel)
		}
		d.mu.Unlock()
	}
	switch kind {
	case unix.S_IFREG:
		return d.content(want, got, rel, sw.Size, sg.Size)
	case unix.S_IFLNK:
		tw, err := os.Readlink(want)
		if err != nil {
			return err
		}
		tg, err := os.Readlink(got)
		if err != nil {
			return err
		}
		if tw != tg {
			d.add(rel, "symlink to %q instead of %q", tg, tw)
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if sw.Rdev != sg.Rdev {
			d.add(rel, "device %d:%d instead of %d:%d", unix.Major(sg.Rdev), unix.Minor(sg.Rdev), unix.Major(sw.Rdev), unix.Minor(sw.Rdev))
		}
	case unix.S_IFDIR:
		fn := func() error { return d.dir(want, got, rel) }
		if d.o.Workers > 1 && d.workers.TryGo(fn) {
			return nil
		}
		return fn()
	}
	return nil
}

func (d *differ) dir(want, got, rel string) error {
	nw, err := names(want)
	if err != nil {
		return err
	}
	ng, err := names(got)
	if err != nil {
		return err
	}
	for len(nw) > 0 || len(ng) > 0 {
		if len(nw) == 0 || len(ng) > 0 && ng[0] < nw[0] {
			path := filepath.Join(rel, ng[0])
			if d.o.Ignore == nil || !d.o.Ignore(path) {
				d.add(path, "should not be there")
			}
			ng = ng[1:]
			continue
		}
		// A name of want alone is found missing by entry.
		if err := d.entry(filepath.Join(want, nw[0]), filepath.Join(got, nw[0]), filepath.Join(rel, nw[0])); err != nil {
			return err
		}
		if len(ng) > 0 && ng[0] == nw[0] {
			ng = ng[1:]
		}
		nw = nw[1:]
	}
	return nil
}

func names(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	list, err := f.Readdirnames(-1)
	sort.Strings(list)
	return list, err
}

func (d *differ) content(want, got, rel string, sizeWant, sizeGot int64) error {
	if sizeWant != sizeGot {
		d.add(rel, "%d bytes instead of %d", sizeGot, sizeWant)
		return nil
	}
	if sizeWant == 0 {
		return nil
	}
	fw, err := os.Open(want)
	if err != nil {
		return err
	}
	defer fw.Close()
	fg, err := os.Open(got)
	if err != nil {
		return err
	}
	defer fg.Close()
	if !d.o.IgnoreHoles {
		hw, err := holes(fw, sizeWant)
		if err != nil {
			return err
		}
		hg, err := holes(fg, sizeGot)
		if err != nil {
			return err
		}
		if hw != hg {
			d.add(rel, "holes %q instead of %q", hg, hw)
		}
	}
	room, _ := rooms.Get().(*[2][128 << 10]byte)
	defer rooms.Put(room)
	bw, bg := room[0][:], room[1][:]
	for off := int64(0); ; {
		n, errw := io.ReadFull(fw, bw)
		m, errg := io.ReadFull(fg, bg)
		if n != m {
			return fmt.Errorf("%s changed while it was compared", rel)
		}
		if !bytes.Equal(bw[:n], bg[:n]) {
			i := int64(0)
			for bw[i] == bg[i] {
				i++
			}
			d.add(rel, "content differs from byte %d on", off+i)
			return nil
		}
		off += int64(n)
		for _, err := range []error{errw, errg} {
			if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
				return err
			}
		}
		if errw != nil {
			return nil
		}
	}
}

// holes lists the holes as offset:length, comma-separated.
func holes(f *os.File, size int64) (string, error) {
	var out []string
	for at := int64(0); at < size; {
		start, err := unix.Seek(int(f.Fd()), at, unix.SEEK_HOLE)
		if err != nil {
			if errors.Is(err, unix.EINVAL) { // a filesystem that knows no holes
				break
			}
			return "", &os.PathError{Op: "find holes of", Path: f.Name(), Err: err}
		}
		if start >= size {
			break
		}
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			end, err = size, nil
		}
		if err != nil {
			return "", &os.PathError{Op: "find data of", Path: f.Name(), Err: err}
		}
		out = append(out, fmt.Sprintf("%d:%d", start, end-start))
		at = end
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	return strings.Join(out, ","), nil
}

func (d *differ) xattrs(want, got, rel string) error {
	xw, err := Xattrs(want)
	if err != nil {
		return err
	}
	xg, err := Xattrs(got)
	if err != nil {
		return err
	}
	for _, k := range slices.Sorted(maps.Keys(xw)) {
		v := xw[k]
		g, ok := xg[k]
		switch {
		case !ok:
			d.add(rel, "attribute %s is missing", k)
		case g != v:
			d.add(rel, "attribute %s is %q instead of %q", k, g, v)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(xg)) {
		if _, ok := xw[k]; !ok {
			d.add(rel, "attribute %s should not be there", k)
		}
	}
	return nil
}

// Xattrs reads all extended attributes of path itself, a symlink not followed.
func Xattrs(path string) (map[string]string, error) {
	buf := make([]byte, 4<<10)
	n, err := grow(&buf, func(b []byte) (int, error) { return unix.Llistxattr(path, b) })
	if err != nil {
		if errors.Is(err, unix.ENOTSUP) {
			return nil, nil
		}
		return nil, &os.PathError{Op: "list attributes of", Path: path, Err: err}
	}
	if n == 0 {
		return nil, nil
	}
	all := map[string]string{}
	value := make([]byte, 1<<10)
	for _, name := range strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		m, err := grow(&value, func(b []byte) (int, error) { return unix.Lgetxattr(path, name, b) })
		if err != nil {
			return nil, &os.PathError{Op: "read attribute " + name + " of", Path: path, Err: err}
		}
		all[name] = string(value[:m])
	}
	return all, nil
}

// grow calls fn with a larger buffer as long as it says that the buffer is too small.
func grow(buf *[]byte, fn func([]byte) (int, error)) (int, error) {
	for {
		n, err := fn(*buf)
		if !errors.Is(err, unix.ERANGE) || len(*buf) > 1<<20 {
			return n, err
		}
		*buf = make([]byte, 4*len(*buf))
	}
}

func (d *differ) links() {
	group := func(m map[inode][]string) map[string]string {
		out := map[string]string{}
		for _, paths := range m {
			sort.Strings(paths)
			for _, p := range paths {
				out[p] = strings.Join(paths, ", ")
			}
		}
		return out
	}
	want, got := group(d.linksWant), group(d.linksGot)
	var paths []string
	for p, g := range want {
		if got[p] != g {
			paths = append(paths, p)
		}
	}
	for p, g := range got {
		if _, both := want[p]; !both && g != "" {
			paths = append(paths, p)
		}
	}
	sort.Strings(paths)
	for _, p := range paths {
		// A link to a file outside the tree stands in a group of its own on one side.
		if !strings.Contains(want[p], ", ") && !strings.Contains(got[p], ", ") {
			continue
		}
		d.add(p, "hard links {%s} instead of {%s}", got[p], want[p])
	}
}

func stampOf(ts unix.Timespec) string {
	return time.Unix(ts.Unix()).UTC().Format(time.RFC3339Nano)
}

func typeName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "a file"
	case unix.S_IFDIR:
		return "a directory"
	case unix.S_IFLNK:
		return "a symlink"
	case unix.S_IFIFO:
		return "a FIFO"
	case unix.S_IFSOCK:
		return "a socket"
	case unix.S_IFCHR:
		return "a character device"
	case unix.S_IFBLK:
		return "a block device"
	}
	return fmt.Sprintf("of the type %o", mode&unix.S_IFMT)
}
