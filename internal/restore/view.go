package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// A View is a still picture of an instance on its filesystems, to be restored from without a
// repository.
type View struct {
	Name string
	// Path returns where the picture of a path of the instance can be read.
	//
	// Errors: the view has no picture of it.
	Path func(path string) (string, error)
	// MadeAt is no later than the instant of the picture.
	MadeAt time.Time
	// Leave names entries that belong to the views themselves: they are neither restored nor moved.
	Leave []string
}

// leaves tells whether name belongs to the views.
func (v *View) leaves(name string) bool { return v != nil && slices.Contains(v.Leave, name) }

// viewTarget is what a target of a view has.
type viewTarget struct {
	file bool            // it is a single file
	skip map[string]bool // roots of other data sets below it, relative
}

// PartialViewError is returned for a view that does not show the whole instance.
type PartialViewError struct {
	View, DataSet string
	Err           error
}

func (e *PartialViewError) Error() string {
	return fmt.Sprintf("the view %s does not show data set %s: %v", e.View, e.DataSet, e.Err)
}

func (e *PartialViewError) Unwrap() error { return e.Err }

// Hints says what to do next.
func (e *PartialViewError) Hints() []string {
	return []string{"Restore a snapshot from the repository: it is of one moment as a whole."}
}

// MakeViewPlan finds out what the view shows of the instance that m describes, and where it goes. What
// is there is restored onto, as with Options.Overwrite: only what differs is written, and what is in the
// way is moved aside. A file that has been the same since the view was made, by all that its filesystem
// tells of it, is not read. Where the filesystem can share contents, they are shared. Run does it,
// without a repository.
//
// Errors: *PartialViewError, *UnmappedError.
func MakeViewPlan(m *snapshot.Manifest, v View, o Options) (*Plan, error) {
	o.setDefaults()
	o.Overwrite = true
	if m.Setup == "s3" {
		return nil, &PartialViewError{v.Name, "blobs", errors.New("they lie in a bucket")}
	}
	p := &Plan{Manifest: m, o: o, view: &v, tree: id.Hash([]byte(v.Name))}
	p.warnCrash()
	if err := p.choosePictures(); err != nil {
		return nil, err
	}
	if err := p.locate(); err != nil {
		return nil, err
	}
	if err := p.measure(); err != nil {
		return nil, err
	}
	return p, nil
}

// choosePictures makes the list of targets of a view.
func (p *Plan) choosePictures() error {
	m := p.Manifest
	from := make([]string, len(m.DataSets))
	for i := range m.DataSets {
		var err error
		if from[i], err = p.from(&m.DataSets[i]); err != nil {
			return err
		}
	}
	made := map[string]*Target{}
	for i := range m.DataSets {
		d := &m.DataSets[i]
		to, err := p.mapPath(d.Name, from[i])
		if err != nil {
			return err
		}
		p.places = append(p.places, place{d.Name, to})
		if len(p.o.Only) > 0 && !slices.Contains(p.o.Only, d.Name) {
			continue
		}
		if t := made[from[i]]; t != nil { // the other half of a store
			t.Entries += d.Entries
			t.Bytes += d.Bytes
			continue
		}
		picture, err := p.view.Path(from[i])
		var st unix.Stat_t
		if err == nil {
			if err = unix.Lstat(picture, &st); err != nil {
				err = &os.PathError{Op: "lstat", Path: picture, Err: err}
			}
		}
		if err != nil && d.Captured {
			return &PartialViewError{p.view.Name, d.Name, err}
		}
		if err != nil {
			continue // left out of the snapshot, and of the view
		}
		t := &Target{
			DataSet: d.Name, From: from[i], To: to, Entries: d.Entries, Bytes: d.Bytes, tree: picture,
			view: &viewTarget{file: st.Mode&unix.S_IFMT != unix.S_IFDIR, skip: map[string]bool{}},
		}
		for _, other := range from {
			if rel, ok := strings.CutPrefix(other, t.From+"/"); ok {
				t.view.skip[rel] = true
			}
		}
		d.Captured = true // in the view it is, even if the snapshot left it out
		made[from[i]] = t
		p.Targets = append(p.Targets, t)
	}
	for _, name := range p.o.Only {
		if !slices.ContainsFunc(p.Targets, func(t *Target) bool { return t.DataSet == name }) {
			return fmt.Errorf("the view %s has no data set %q", p.view.Name, name)
		}
	}
	if len(p.Targets) == 0 {
		return fmt.Errorf("the view %s shows no data set", p.view.Name)
	}
	return nil
}

// restorePicture walks the picture of one data set.
func restorePicture(d *dest, t *Target) error {
	w := &pictureWalker{d: d, t: t, a: newApplier(d, d.run.sinkPicture), links: map[[2]uint64]string{}}
	defer w.a.close()
	dir, name := t.tree, "."
	if t.view.file {
		dir, name = filepath.Split(t.tree)
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return d.fail(t.tree, "", fmt.Errorf("open the picture: %w", err))
	}
	defer unix.Close(fd)
	if t.view.file {
		err = w.entry(fd, name, filepath.Base(t.path))
	} else if err = w.entry(fd, name, ""); err == nil {
		err = w.list(fd, "", 1)
	}
	if err != nil {
		return err
	}
	return w.a.finish()
}

// A pictureWalker turns a picture into entries, parents before children.
type pictureWalker struct {
	d     *dest
	t     *Target
	a     *applier
	links map[[2]uint64]string // first names of files with several
}

func (w *pictureWalker) fail(rel string, err error) error { return w.d.fail(w.t.tree, rel, err) }

func (w *pictureWalker) list(dir int, rel string, depth int) error {
	if depth > treeDepth {
		return w.fail(rel, refused("more than %d folders within one another", treeDepth))
	}
	names, err := namesIn(dir)
	if err != nil {
		return w.fail(rel, fmt.Errorf("list the picture: %w", err))
	}
	for _, name := range names {
		child := joinPath(rel, name)
		if w.t.view.skip[child] || w.d.run.view.leaves(name) {
			continue
		}
		if err := w.entry(dir, name, child); err != nil {
			return err
		}
		fd, err := openSubdir(dir, name)
		if isNoDir(err) || err == unix.ENXIO { // ENXIO: a socket
			continue
		}
		if err == nil {
			err = w.list(fd, child, depth+1)
			unix.Close(fd)
		} else {
			err = w.fail(child, fmt.Errorf("open the picture: %w", err))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func namesIn(dir int) ([]string, error) {
	fd, err := openat(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "")
	defer f.Close()
	names, err := f.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

// entry hands on what is at name in the open directory of the picture.
func (w *pictureWalker) entry(dir int, name, rel string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return w.fail(rel, fmt.Errorf("look at the picture: %w", err))
	}
	e := &entry{
		rel: rel, from: w.t.tree, typ: nodeType(st.Mode), stat: &st, rdev: uint64(st.Rdev),
		meta: meta{mode: st.Mode & 0o7777, uid: st.Uid, gid: st.Gid, sec: st.Mtim.Sec, nsec: st.Mtim.Nsec},
	}
	e.complete = func() (err error) {
		e.meta.xattrs, err = attrsOf(dir, name)
		return err
	}
	switch e.typ {
	case snapshot.Symlink:
		var err error
		if e.link, err = readlinkat(dir, name); err != nil {
			return w.fail(rel, fmt.Errorf("read the symbolic link in the picture: %w", err))
		}
	case snapshot.File:
		e.size = st.Size
		path := joinPath(w.t.tree, rel)
		if w.t.view.file {
			path = w.t.tree
		}
		e.src = func() (*os.File, error) { return openPicture(path, st.Size) }
	}
	if st.Nlink > 1 && e.typ != snapshot.Dir {
		k := [2]uint64{uint64(st.Dev), st.Ino}
		if first, ok := w.links[k]; ok {
			e.hardlink = first
		} else {
			w.links[k] = rel
		}
	}
	return w.a.put(e)
}

func nodeType(mode uint32) snapshot.NodeType {
	for _, t := range []snapshot.NodeType{snapshot.File, snapshot.Dir, snapshot.Symlink, snapshot.Dev, snapshot.CharDev, snapshot.FIFO} {
		if fileType(t) == mode&unix.S_IFMT {
			return t
		}
	}
	return snapshot.Socket
}

// attrsOf reads the attributes of name in an open directory, of a link its own.
func attrsOf(dir int, name string) ([]snapshot.Xattr, error) {
	c := pathXattrs(procFD(dir) + "/" + name)
	names, err := c.names()
	if err != nil {
		return nil, fmt.Errorf("list the extended attributes in the picture: %w", err)
	}
	var out []snapshot.Xattr
	for _, n := range names {
		buf := make([]byte, 64<<10) // the kernel's limit
		k, err := c.get(n, buf)
		if err == unix.ENODATA || n == "" {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read the extended attribute %q in the picture: %w", n, err)
		}
		out = append(out, snapshot.Xattr{Name: n, Value: slices.Clone(buf[:k])})
	}
	return out, nil
}

// openPicture opens a file of a picture, which is still: nobody puts a link in its way.
func openPicture(path string, size int64) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, fmt.Errorf("open the picture: %w", err)
	}
	st, err := statRegular(int(f.Fd()))
	if err == nil && st.Size != size {
		err = errors.New("the picture is not still: its size has changed")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// raceWindow: what changed so shortly before the view was made may have changed once more within the
// same tick of the filesystem's clock, whose coarsest grain in use is a second.
const raceWindow = time.Second

// unchanged tells whether what is there is the very thing that the view shows, by number and by the
// time of its last change, which nobody can set. Files with several names are looked at one by one.
func (d *dest) unchanged(e *entry, st *unix.Stat_t) bool {
	p := e.stat
	if p == nil || st == nil || d.run.owner != nil || d.onFUSE() || st.Ino != p.Ino || st.Ctim != p.Ctim || st.Mtim != p.Mtim ||
		st.Mode != p.Mode || st.Uid != p.Uid || st.Gid != p.Gid {
		return false
	}
	if e.typ != snapshot.Dir && (st.Size != p.Size || st.Nlink != 1 || p.Nlink != 1) {
		return false
	}
	return time.Unix(st.Ctim.Unix()).Before(d.run.view.MadeAt.Add(-raceWindow))
}

// onFUSE tells whether the destination is a filesystem of some program: zfs-fuse, for one, leaves the
// time of the last change alone when attributes are set.
func (d *dest) onFUSE() bool {
	d.fuse.once.Do(func() {
		var st unix.Statfs_t
		d.fuse.is = unix.Fstatfs(d.root.fd, &st) != nil || st.Type == unix.FUSE_SUPER_MAGIC
	})
	return d.fuse.is
}

// sinkPicture brings a file to the content of the picture.
func (r *run) sinkPicture(j *job) error {
	if r.ctx.Err() != nil {
		return r.cause()
	}
	r.fill.compare.Go(func() error {
		if err := j.fromPicture(r); err != nil {
			return j.d.fail(j.from, j.rel, err)
		}
		return nil
	})
	return nil
}

func (j *job) fromPicture(r *run) error {
	src, err := j.src()
	if err != nil {
		if !j.present {
			j.remove()
		}
		return err
	}
	defer src.Close()
	if j.present {
		same, err := j.comparePicture(r, src)
		if err != nil || same {
			return err
		}
		if err := j.replace(); err != nil || r.dry {
			return err
		}
	}
	fd, err := j.d.root.open(j.rel, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err == nil {
		defer unix.Close(fd)
		err = j.copyPicture(fd, src)
	}
	if err == nil {
		err = j.seal(fd)
	}
	if err != nil {
		j.remove() // half a file must not look like a whole one
	}
	return err
}

// copyPicture shares the content with the picture, or copies it.
func (j *job) copyPicture(fd int, src *os.File) error {
	if err := unix.IoctlFileClone(fd, int(src.Fd())); err == nil {
		return nil
	}
	var err error
	if j.holes, err = pax.FindHoles(src, j.size); err != nil {
		return err
	}
	_, err = j.fill(fd, src)
	return err
}

// comparePicture tells whether the file that is there has the content of the picture. If so, its metadata
// is set right; if not, src is at its beginning.
func (j *job) comparePicture(r *run, src *os.File) (bool, error) {
	same, err := j.compareBy(r, func(fd int, buf []byte) (bool, error) {
		cmp := &comparer{r: src, fd: fd, same: true}
		for cmp.same {
			if r.ctx.Err() != nil {
				return false, r.cause()
			}
			if _, err := cmp.Read(buf); err == io.EOF {
				break
			} else if err != nil {
				return false, fmt.Errorf("read the picture: %w", err)
			}
		}
		return cmp.same, nil
	})
	if err == nil && !same {
		_, err = src.Seek(0, io.SeekStart)
	}
	return same, err
}

// clones tells whether all destinations can share contents with their pictures. It tries, with a file
// that has no name.
func (p *Plan) clones() bool {
	for _, t := range p.Targets {
		file := firstFile(t.tree, 8)
		if file == "" {
			continue // nothing to share
		}
		dir, st, err := existing(t.path)
		if err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			dir = filepath.Dir(dir)
		}
		if err != nil || !cloneTo(dir, file) {
			return false
		}
	}
	return true
}

func cloneTo(dir, file string) bool {
	src, err := os.OpenFile(file, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer src.Close()
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return unix.IoctlFileClone(fd, int(src.Fd())) == nil
}

// firstFile finds some regular file that is not empty at path, or below it within depth folders; "" if
// there is none.
func firstFile(path string, depth int) string {
	st, err := os.Lstat(path)
	if err != nil {
		return ""
	}
	if st.Mode().IsRegular() && st.Size() > 0 {
		return path
	}
	if !st.IsDir() || depth == 0 {
		return ""
	}
	list, _ := os.ReadDir(path) // what cannot be read tells nothing
	for _, e := range list {
		if f := firstFile(filepath.Join(path, e.Name()), depth-1); f != "" {
			return f
		}
	}
	return ""
}

// RunView restores what a plan of MakeViewPlan says.
//
// Errors: those of Run.
func RunView(ctx context.Context, p *Plan) (*Result, error) { return Run(ctx, nil, p) }
