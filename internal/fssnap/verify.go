package fssnap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/mountinfo"
)

// defaultSample is enough to notice, but for one case in 700 million, a fault of every tenth entry; it
// costs some milliseconds.
const defaultSample = 200

// clockSlack: the kernel stamps files with a clock that may be this much behind (one tick at 100 Hz,
// doubled).
const clockSlack = 20 * time.Millisecond

// VerifyOptions are those of Verify. The zero value is the usual sample of a source that may change.
type VerifyOptions struct {
	// Sample is how many entries are compared for each path; 0 is 200.
	Sample int
	// Roots are paths that are compared in any case, such as the roots of all spaces.
	Roots []string
	// Frozen tells that nothing has written since before the views were made. Else entries that
	// changed since are passed over.
	Frozen bool
	// Seed picks the sample; the same seed picks the same one from the same data.
	Seed uint64
}

// Verified counts what Verify did.
type Verified struct {
	Compared int // entries found equal
	Attrs    int // extended attributes found equal
	Skipped  int // entries that have changed since the view was made
}

// A LossyViewError is returned when a view does not show what its source has.
type LossyViewError struct {
	View string // the name of the view
	Path string // of the entry in the source
	// What differs: name, type, size, mode, owner, mtime, target or xattr; then Attribute is its name.
	What      string
	Attribute string
	Want, Got string
}

func (e *LossyViewError) Error() string {
	what := e.What
	switch e.What {
	case "xattr":
		what = "extended attribute " + e.Attribute
	case "name":
		what = "entry"
	}
	return fmt.Sprintf("the view %s is not to be trusted: %s: %s is %s there, and not %s as in the source; use another way to hold this filesystem still", e.View, e.Path, what, e.Got, e.Want)
}

// Verify asks the drivers whether the views are whole, and compares a random sample of their entries
// with the sources: names, types, sizes, modes, owners, mtimes, symlink targets, and every extended
// attribute but SELinux labels, which mounts may override.
//
// Errors: *LossyViewError for the first entry that differs; those of Check.
func (s *Set) Verify(ctx context.Context, o VerifyOptions) (Verified, error) {
	var done Verified
	if err := s.Check(ctx); err != nil {
		return done, err
	}
	if o.Sample == 0 {
		o.Sample = defaultSample
	}
	for i, p := range s.parts {
		if !p.covered() {
			continue
		}
		picture, err := s.picture(p)
		if err != nil {
			return done, err
		}
		c := &comparer{
			ctx: ctx, view: s.views[p.Source].Name, source: p.Real, picture: picture, o: o, done: &done,
			since: s.started.Add(-clockSlack), seen: map[string]bool{}, names: map[string][]string{},
		}
		for j, q := range s.parts {
			if j != i && mountinfo.Below(q.Real, p.Real) && q.Real != p.Real {
				c.others = append(c.others, q.Real)
			}
		}
		if err := c.run(); err != nil {
			return done, err
		}
	}
	return done, nil
}

// comparer compares one path with its picture.
type comparer struct {
	ctx             context.Context
	view            string
	source, picture string
	others          []string // paths below that are compared for themselves
	o               VerifyOptions
	since           time.Time
	done            *Verified
	seen            map[string]bool     // by relative path
	names           map[string][]string // of directories, but for others
}

func (c *comparer) run() error {
	if err := c.entry("."); err != nil {
		return err
	}
	for _, r := range c.o.Roots {
		if real, err := filepath.EvalSymlinks(r); err == nil {
			r = real
		}
		if mountinfo.Below(r, c.source) && !c.other(r) {
			if err := c.entry(rel(r, c.source)); err != nil {
				return err
			}
		}
	}
	h := fnv.New64a()
	h.Write([]byte(c.source))
	rnd := rand.New(rand.NewPCG(c.o.Seed, h.Sum64()))
	target := len(c.seen) + c.o.Sample
	// Descents end at known entries more and more often; small trees are known as a whole at last.
	for try := 0; len(c.seen) < target && try < 4*c.o.Sample; try++ {
		if err := c.descend(rnd, target); err != nil {
			return err
		}
	}
	return nil
}

// descend goes down at random to the first entry that is no directory.
func (c *comparer) descend(rnd *rand.Rand, target int) error {
	for dir := "."; len(c.seen) < target; {
		if err := context.Cause(c.ctx); err != nil {
			return err
		}
		names, isDir, err := c.list(dir)
		if err != nil || !isDir || len(names) == 0 {
			return err
		}
		dir = filepath.Join(dir, names[rnd.IntN(len(names))])
		if err := c.entry(dir); err != nil {
			return err
		}
	}
	return nil
}

// other tells whether path belongs to another part.
func (c *comparer) other(path string) bool {
	return slices.ContainsFunc(c.others, func(o string) bool { return mountinfo.Below(path, o) })
}

// list returns the names of a directory of the source.
func (c *comparer) list(dir string) (names []string, isDir bool, err error) {
	if names, ok := c.names[dir]; ok {
		return names, true, nil
	}
	full := filepath.Join(c.source, dir)
	st, err := os.Lstat(full)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !st.IsDir() {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	if names, err = c.namesIn(full, full); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, false, nil
		}
		return nil, false, err
	}
	c.names[dir] = names
	return names, true, nil
}

// namesIn lists dir, which is or pictures the directory source, without what is compared elsewhere and
// what views themselves bring along.
func (c *comparer) namesIn(dir, source string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	names = slices.DeleteFunc(names, func(n string) bool {
		return n == ViewsDir || c.other(filepath.Join(source, n))
	})
	slices.Sort(names)
	return names, nil
}

func (c *comparer) lossy(path, what string, want, got any) error {
	return &LossyViewError{View: c.view, Path: path, What: what, Want: fmt.Sprint(want), Got: fmt.Sprint(got)}
}

// entry compares one entry, unless that was done or it has changed.
func (c *comparer) entry(rel string) error {
	if c.seen[rel] {
		return nil
	}
	c.seen[rel] = true
	path, picture := filepath.Join(c.source, rel), filepath.Join(c.picture, rel)
	attrs, err := c.compare(path, picture)
	if err == nil {
		c.done.Compared++
		c.done.Attrs += attrs
		return nil
	}
	// The entry may be gone, or be another one, by now.
	var st unix.Stat_t
	serr := unix.Lstat(path, &st)
	if !c.o.Frozen && (errors.Is(serr, unix.ENOENT) || errors.Is(serr, unix.ENOTDIR) || serr == nil && c.changed(&st, path)) {
		c.done.Skipped++
		return nil
	}
	return err
}

// changed tells whether the entry, or the way to it, is younger than the view: a renamed directory
// takes what is in it along without a trace.
func (c *comparer) changed(st *unix.Stat_t, path string) bool {
	for {
		since := c.since
		if st.Ctim.Nsec == 0 {
			since = since.Add(-time.Second) // a filesystem that knows but whole seconds, rounded down
		}
		if !time.Unix(st.Ctim.Unix()).Before(since) {
			return true
		}
		if path == c.source {
			return false
		}
		path = filepath.Dir(path)
		if unix.Lstat(path, st) != nil {
			return true
		}
	}
}

func (c *comparer) compare(path, picture string) (attrs int, err error) {
	var want, got unix.Stat_t
	if err := unix.Lstat(path, &want); err != nil {
		return 0, fmt.Errorf("look at %s: %w", path, err)
	}
	if err := unix.Lstat(picture, &got); err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			return 0, c.lossy(path, "name", "present", "missing")
		}
		return 0, fmt.Errorf("read the view %s: %s: %w", c.view, picture, err)
	}
	// A way of copying that does not hold still may change files under our eyes; a still one does not.
	kind := want.Mode & unix.S_IFMT
	switch {
	case kind != got.Mode&unix.S_IFMT:
		return 0, c.lossy(path, "type", typeName(want.Mode), typeName(got.Mode))
	case kind == unix.S_IFREG && want.Size != got.Size:
		return 0, c.lossy(path, "size", want.Size, got.Size)
	case want.Mode != got.Mode:
		return 0, c.lossy(path, "mode", fmt.Sprintf("%04o", want.Mode&0o7777), fmt.Sprintf("%04o", got.Mode&0o7777))
	case want.Uid != got.Uid || want.Gid != got.Gid:
		return 0, c.lossy(path, "owner", fmt.Sprintf("%d:%d", want.Uid, want.Gid), fmt.Sprintf("%d:%d", got.Uid, got.Gid))
	case want.Mtim != got.Mtim:
		return 0, c.lossy(path, "mtime", stamp(want.Mtim), stamp(got.Mtim))
	}
	switch kind {
	case unix.S_IFLNK:
		a, err := os.Readlink(path)
		if err != nil {
			return 0, err
		}
		if b, err := os.Readlink(picture); err != nil || a != b {
			return 0, c.lossy(path, "target", quoted([]byte(a)), quoted([]byte(b)))
		}
	case unix.S_IFDIR:
		if err := c.compareNames(path, picture); err != nil {
			return 0, err
		}
	}
	return c.compareAttrs(path, picture)
}

func (c *comparer) compareNames(path, picture string) error {
	want, err := c.namesIn(path, path)
	if err != nil {
		return err
	}
	got, err := c.namesIn(picture, path)
	if err != nil {
		return fmt.Errorf("read the view %s: %w", c.view, err)
	}
	for i := 0; i < len(want) || i < len(got); i++ {
		switch {
		case i == len(got) || i < len(want) && want[i] < got[i]:
			return c.lossy(filepath.Join(path, want[i]), "name", "present", "missing")
		case i == len(want) || want[i] > got[i]:
			return c.lossy(filepath.Join(path, got[i]), "name", "missing", "present")
		}
	}
	return nil
}

func (c *comparer) compareAttrs(path, picture string) (int, error) {
	want, err := readAttrs(path)
	if err != nil {
		return 0, err
	}
	got, err := readAttrs(picture)
	if err != nil {
		return 0, fmt.Errorf("read the view %s: %w", c.view, err)
	}
	attr := func(name, want, got string) error {
		return &LossyViewError{View: c.view, Path: path, What: "xattr", Attribute: name, Want: want, Got: got}
	}
	names := make([]string, 0, len(want))
	for n := range want {
		names = append(names, n)
	}
	slices.Sort(names) // so that the same fault gives the same message
	for _, n := range names {
		g, ok := got[n]
		switch {
		case !ok:
			return 0, attr(n, quoted(want[n]), "missing")
		case !bytes.Equal(want[n], g):
			return 0, attr(n, quoted(want[n]), quoted(g))
		}
	}
	for n, g := range got {
		if _, ok := want[n]; !ok {
			return 0, attr(n, "missing", quoted(g))
		}
	}
	return len(names), nil
}

// readAttrs returns all extended attributes, of a link its own. A filesystem without any has none.
func readAttrs(path string) (map[string][]byte, error) {
	list, err := grow(func(b []byte) (int, error) { return unix.Llistxattr(path, b) })
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the extended attributes of %s: %w", path, err)
	}
	attrs := map[string][]byte{}
	for _, n := range strings.Split(string(list), "\x00") {
		if n == "" || n == "security.selinux" {
			continue
		}
		v, err := grow(func(b []byte) (int, error) { return unix.Lgetxattr(path, n, b) })
		if errors.Is(err, unix.ENODATA) {
			continue // removed since
		}
		if err != nil {
			return nil, fmt.Errorf("read the extended attribute %s of %s: %w", n, path, err)
		}
		attrs[n] = v
	}
	return attrs, nil
}

// grow calls read with larger buffers until the answer fits; the kernel's limit is 64 KiB.
func grow(read func([]byte) (int, error)) ([]byte, error) {
	for size := 1 << 10; ; size *= 8 {
		b := make([]byte, size)
		n, err := read(b)
		if err == nil {
			return b[:n], nil
		}
		if !errors.Is(err, unix.ERANGE) || size >= 1<<20 {
			return nil, err
		}
	}
}

func stamp(t unix.Timespec) string {
	return time.Unix(t.Unix()).UTC().Format(time.RFC3339Nano)
}

// quoted shows at most 32 bytes of a value.
func quoted(b []byte) string {
	if len(b) > 32 {
		return fmt.Sprintf("%q... (%d bytes)", b[:32], len(b))
	}
	return fmt.Sprintf("%q", b)
}

func typeName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "a file"
	case unix.S_IFDIR:
		return "a directory"
	case unix.S_IFLNK:
		return "a symbolic link"
	case unix.S_IFIFO:
		return "a pipe"
	case unix.S_IFSOCK:
		return "a socket"
	}
	return "a device"
}
