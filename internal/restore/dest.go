package restore

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// asidePrefix and asideSuffix make the name of a folder that takes what was in the way.
const (
	asideInfix  = ".holdfast-"
	stampLayout = "20060102T150405Z"
)

// A dest is one destination directory during a run.
type dest struct {
	run  *run
	res  *DataSetResult
	path string // for messages and for folders beside it
	root *root
	// absent: a dry run, and there is no such directory.
	absent bool
	// foreign: the root belongs to someone else (the target is one file in it).
	foreign bool
	// delta: entries may be there already.
	delta bool
	// ours: a file that differs was half written by an interrupted run into an empty place, and may
	// be thrown away. Everything else is moved aside.
	ours bool
	// keepExtra leaves alone what the snapshot does not have.
	keepExtra bool
	// protected names what lies on the way to the roots of other data sets, and these themselves.
	protected map[string]bool
	asideRel  string // place of the root within aside

	mu       sync.Mutex
	links    []hardlink
	shared   []*job // files with several names that may have been kept
	extras   []extra
	claimed  map[string]claim // names that a stream used in a directory that is not its own
	implicit map[string]bool  // directories made before their own entry came
	modes    []lateMode
	aside    *aside

	past struct { // see direct
		once    sync.Once
		refused atomic.Bool
	}
	fuse struct { // see onFUSE
		once sync.Once
		is   bool
	}
}

type hardlink struct {
	rel, to, from string
}

type extra struct{ dir, name string }

// lateMode is the mode of a directory that would keep us out before we are done (not for root).
type lateMode struct {
	rel  string
	mode uint32
}

func (d *dest) show(rel string) string { return filepath.Join(d.path, rel) }

// inSnapshot names the place of rel in the source called from, an archive or a folder.
func inSnapshot(from, rel string) string {
	if strings.HasSuffix(from, ".tar") {
		if rel == "" {
			return from
		}
		return from + ": " + rel
	}
	return joinPath(from, rel)
}

// fail notes that the entry rel, which came from the source called from, was not restored. It
// returns an error only if the run cannot go on.
func (d *dest) fail(from, rel string, err error) error {
	if d.run.ctx.Err() != nil {
		return d.run.cause()
	}
	if isFatal(err) {
		stop := &StoppedError{Path: d.show(rel), Err: err}
		d.run.cancel(stop)
		return stop
	}
	switch {
	case errors.Is(err, ErrRefused): // such a name is better not shown as a path on this machine
		err = fmt.Errorf("%q in the snapshot: %w", inSnapshot(from, rel), err)
	case from != "":
		err = fmt.Errorf("%q (in the snapshot: %q): %w", d.show(rel), inSnapshot(from, rel), err)
	default:
		err = fmt.Errorf("%q: %w", d.show(rel), err)
	}
	d.run.addError(err)
	return nil
}

// dirKey names a directory whatever the path that leads to it.
type dirKey struct{ dev, ino uint64 }

// A touched directory gets its modification time (and mode) back at the end of the run.
type touched struct {
	d   *dest
	rel string
	m   meta
	// mode tells that the mode has to be set back as well.
	mode bool
}

// touch notes the time of a directory that is about to be changed out of turn.
func (d *dest) touch(rel string, fd int) error {
	if d.run.dry || rel == "" && d.foreign {
		return nil
	}
	r := d.run
	r.mu.Lock()
	defer r.mu.Unlock()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	k := dirKey{uint64(st.Dev), st.Ino}
	if r.touched[k] != nil {
		return nil
	}
	t := &touched{d: d, rel: rel, m: meta{mode: st.Mode & 0o7777, sec: st.Mtim.Sec, nsec: st.Mtim.Nsec}}
	if r.euid != 0 && st.Mode&0o700 != 0o700 {
		if err := unix.Fchmod(fd, t.m.mode|0o700); err != nil {
			return err
		}
		t.mode = true
	}
	r.touched[k] = t
	return nil
}

// settled notes that a directory has got its final time from its own entry.
func (d *dest) settled(st *unix.Stat_t, m *meta) {
	r := d.run
	r.mu.Lock()
	defer r.mu.Unlock()
	if t := r.touched[dirKey{uint64(st.Dev), st.Ino}]; t != nil {
		t.m.sec, t.m.nsec, t.m.mode = m.sec, m.nsec, m.mode
	}
}

// settleTouched gives all touched directories their times back.
func (r *run) settleTouched() error {
	list := make([]*touched, 0, len(r.touched))
	for _, t := range r.touched {
		list = append(list, t)
	}
	// The deepest first: a mode that keeps us out must not hide those below.
	sort.Slice(list, func(i, j int) bool {
		return len(list[i].d.show(list[i].rel)) > len(list[j].d.show(list[j].rel))
	})
	for _, t := range list {
		fd, err := t.d.root.openDir(t.rel)
		if errors.Is(err, unix.ENOENT) {
			continue // moved aside since
		}
		if err == nil {
			if t.mode {
				err = unix.Fchmod(fd, t.m.mode)
			}
			if err == nil {
				err = unix.UtimesNanoAt(fd, "", t.m.times(), unix.AT_EMPTY_PATH)
				if err != nil {
					err = futimens(fd, &t.m)
				}
			}
			unix.Close(fd)
		}
		if err != nil {
			if err := t.d.fail("", t.rel, fmt.Errorf("set modification time: %w", err)); err != nil {
				return err
			}
		}
	}
	return nil
}

// A claim tells how a stream used a name.
type claim uint8

const (
	way   claim = 1 + iota // to reach something below
	whole                  // as an entry
)

// claim notes that a stream uses rel in a directory that belongs to another stream. It reports
// false for an entry that came before.
func (d *dest) claim(rel string, c claim) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.claimed[rel] == whole {
		return c == way
	}
	if d.claimed == nil {
		d.claimed = map[string]claim{}
	}
	d.claimed[rel] = c
	return true
}

// isProtected reports whether rel is, or leads to, the root of another data set.
func (d *dest) isProtected(rel string) bool { return d.protected[rel] }

// --- moving aside -------------------------------------------------------------------------------

// An aside is the dated folder that takes what was in the way: <root>.holdfast-<stamp> beside the
// outermost data set. Where that lies on another filesystem, because the root is a mount point, or
// cannot be made, it is .holdfast-<stamp> inside the root.
type aside struct {
	path string
	mu   sync.Mutex
	r    *root // nil until first needed
}

// asideAt returns the folder at path, one for all data sets that use it.
func (r *run) asideAt(path string) *aside {
	r.mu.Lock()
	defer r.mu.Unlock()
	a := r.asides[path]
	if a == nil {
		a = &aside{path: path}
		r.asides[path] = a
	}
	return a
}

// open returns the folder, made on first use. It is closed to all but the owner: what lies in it
// is as secret as the instance.
func (a *aside) open() (*root, error) {
	if a.r != nil {
		return a.r, nil
	}
	if err := unix.Mkdir(a.path, 0o700); err != nil && err != unix.EEXIST {
		return nil, err
	}
	fd, err := unix.Open(a.path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	a.r = &root{fd: fd}
	return a.r, nil
}

func (a *aside) close() {
	if a.r != nil {
		unix.Close(a.r.fd)
		a.r = nil
	}
}

// moveAside takes name, in the open directory dir that is rel below the root, out of the way.
func (d *dest) moveAside(dir int, rel, name string) error {
	full := joinPath(rel, name)
	if d.isProtected(full) {
		return errors.New("it is in the way, and another data set lies there: move it by hand or choose another destination")
	}
	if d.run.dry {
		d.moved(full)
		return nil
	}
	if err := d.touch(rel, dir); err != nil {
		return err
	}
	d.mu.Lock()
	a, at := d.aside, d.asideRel
	d.mu.Unlock()
	err := a.take(dir, name, joinPath(at, full))
	if in := filepath.Join(d.path, asideInfix+d.run.stamp); a.path != in &&
		(errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EROFS)) {
		a = d.run.asideAt(in)
		d.mu.Lock()
		d.aside, d.asideRel = a, ""
		d.mu.Unlock()
		if err2 := a.take(dir, name, full); err2 == nil {
			err = nil
			d.run.warnOnce("aside "+in, fmt.Sprintf(
				"what is in the way goes to %s, because it cannot be moved out of %s: look through it before the next backup", in, d.path))
		}
	}
	if err != nil {
		return fmt.Errorf("move aside to %s: %w", a.path, err)
	}
	d.moved(full)
	return nil
}

// take renames name in dir to rel in the folder.
func (a *aside) take(dir int, name, rel string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	r, err := a.open()
	if err != nil {
		return err
	}
	parent, base := splitPath(rel)
	if base == "" {
		base = name
	}
	to, err := unix.Dup(r.fd)
	if err != nil {
		return err
	}
	defer func() { unix.Close(to) }()
	for parent != "" {
		var first string
		first, parent, _ = strings.Cut(parent, "/")
		if err := unix.Mkdirat(to, first, 0o700); err != nil && err != unix.EEXIST {
			return err
		}
		next, err := openSubdir(to, first)
		if err != nil {
			return err
		}
		unix.Close(to)
		to = next
	}
	free := base
	for n := 1; ; n++ {
		err := unix.Renameat2(dir, name, to, free, unix.RENAME_NOREPLACE)
		if err == unix.EINVAL || err == unix.ENOSYS { // a filesystem without the flag
			var st unix.Stat_t
			if err = unix.Fstatat(to, free, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil {
				err = unix.EEXIST
			} else if err == unix.ENOENT {
				err = unix.Renameat(dir, name, to, free)
			}
		}
		if err != unix.EEXIST {
			return err
		}
		suffix := "." + strconv.Itoa(n)
		free = base[:min(len(base), 255-len(suffix))] + suffix
	}
}

func (d *dest) moved(rel string) {
	add(&d.res.MovedAside, 1)
	d.mu.Lock()
	if len(d.res.Moved) < movedLimit {
		d.res.Moved = append(d.res.Moved, d.show(rel))
	}
	d.mu.Unlock()
}

// clear makes way for a new entry where another one is: a half-written file of an interrupted run
// is removed, all else is moved aside.
func (d *dest) clear(dir int, rel, name string, st *unix.Stat_t) error {
	if d.ours && st.Mode&unix.S_IFMT == unix.S_IFREG && !d.isProtected(joinPath(rel, name)) {
		if d.run.dry {
			return nil
		}
		if err := d.touch(rel, dir); err != nil {
			return err
		}
		return unix.Unlinkat(dir, name, 0)
	}
	return d.moveAside(dir, rel, name)
}

// --- what is left for the end ---------------------------------------------------------------------

// finishShared looks after kept files with several names. If one of the names is none of the
// snapshot's, the file is copied, lest both change together from now on.
func (d *dest) finishShared() error {
	if d.run.dry || len(d.shared) == 0 {
		return nil
	}
	names := map[string][]string{}
	for _, l := range d.links {
		names[l.to] = append(names[l.to], l.rel)
	}
	for _, j := range d.shared {
		var st, other unix.Stat_t
		if err := d.stat(j.rel, &st); err != nil || st.Nlink < 2 {
			continue // told already, or replaced
		}
		n := uint64(1)
		for _, name := range names[j.rel] {
			if d.stat(name, &other) == nil && other.Ino == st.Ino && other.Dev == st.Dev {
				n++
			}
		}
		if n == uint64(st.Nlink) {
			continue
		}
		if err := j.unshare(); err != nil {
			if err := d.fail(j.from, j.rel, err); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *dest) stat(rel string, st *unix.Stat_t) error {
	fd, err := d.root.open(rel, unix.O_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Fstat(fd, st)
}

// unshare puts a copy in the place of a file, which is moved aside.
func (j *job) unshare() error {
	dir, name := splitPath(j.rel)
	parent, err := j.d.root.openDir(dir)
	if err != nil {
		return err
	}
	defer unix.Close(parent)
	old, st, err := openRegular(parent, name)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(old), name)
	defer f.Close()
	if err := j.d.clear(parent, dir, name, st); err != nil {
		return err
	}
	fd, err := openat(parent, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	now, err := j.fill(fd, f)
	if err == nil {
		_, err = j.d.setMeta(fd, now, &j.meta, j.all)
	}
	if err != nil {
		_ = unix.Unlinkat(parent, name, 0)
	}
	return err
}

// finishLinks makes the hard links, once all contents are in place.
func (d *dest) finishLinks() error {
	for _, l := range d.links {
		if d.run.ctx.Err() != nil {
			return d.run.cause()
		}
		if err := d.finishLink(l); err != nil {
			if err := d.fail(l.from, l.rel, fmt.Errorf("hard link to %q: %w", l.to, err)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *dest) finishLink(l hardlink) error {
	if d.absent {
		add(&d.res.Files, 1)
		return nil
	}
	dir, name := splitPath(l.rel)
	to, err := d.root.openDir(dir)
	if d.run.dry && err != nil {
		add(&d.res.Files, 1) // its folder is still to be made
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(to)
	var st unix.Stat_t
	fromDir, fromName := splitPath(l.to)
	from, err := d.root.openDir(fromDir)
	if err == nil {
		defer unix.Close(from)
		err = unix.Fstatat(from, fromName, &st, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err != nil && !d.run.dry {
		return err
	}
	if err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return refused("it is a folder")
	}
	if d.delta {
		var have unix.Stat_t
		err := unix.Fstatat(to, name, &have, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil && have.Ino == st.Ino && have.Dev == st.Dev {
			add(&d.res.Unchanged, 1)
			return nil
		}
		if err == nil {
			if err := d.clear(to, dir, name, &have); err != nil {
				return err
			}
		} else if err != unix.ENOENT {
			return err
		}
	}
	add(&d.res.Files, 1)
	if d.run.dry {
		return nil
	}
	if err := d.touch(dir, to); err != nil {
		return err
	}
	return unix.Linkat(from, fromName, to, name, 0)
}

// finishExtras moves aside what the snapshot does not have.
func (d *dest) finishExtras() error {
	for _, x := range d.extras {
		rel := joinPath(x.dir, x.name)
		if d.claimed[rel] != 0 || d.isProtected(rel) {
			continue
		}
		if d.run.ctx.Err() != nil {
			return d.run.cause()
		}
		fd, err := d.root.openDir(x.dir)
		if err == nil {
			err = d.moveAside(fd, x.dir, x.name)
			unix.Close(fd)
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			if err := d.fail("", rel, err); err != nil {
				return err
			}
		}
	}
	return nil
}

// finishModes sets the modes that were put off.
func (d *dest) finishModes() error {
	sort.Slice(d.modes, func(i, j int) bool { return len(d.modes[i].rel) > len(d.modes[j].rel) })
	for _, m := range d.modes { // children before the parents that will hide them
		fd, err := d.root.openDir(m.rel)
		if err == nil {
			err = unix.Fchmod(fd, m.mode)
			unix.Close(fd)
		}
		if err != nil {
			if err := d.fail("", m.rel, fmt.Errorf("set mode: %w", err)); err != nil {
				return err
			}
		}
	}
	return nil
}
