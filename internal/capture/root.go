package capture

import (
	"errors"
	"io"
	"io/fs"
	"path"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// root is a directory that is read. All paths are relative to it, and no symbolic link below it is
// ever followed: whoever can write into the store must not make a backup that runs as root read
// files elsewhere.
type root struct {
	fd   int
	path string // for messages
}

// openRoot opens dir, which may itself be reached through symbolic links.
func openRoot(dir string) (*root, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	return &root{fd: fd, path: dir}, nil
}

func (r *root) close() { _ = unix.Close(r.fd) }

// abs returns rel as a path for messages.
func (r *root) abs(rel string) string {
	if rel == "" || rel == "." {
		return r.path
	}
	return r.path + "/" + rel
}

// noOpenat2 is set when the kernel (before 5.6) or a seccomp filter refuses openat2.
var noOpenat2 atomic.Bool

// open opens rel below the root. With O_NOATIME, a refusal of that is no error: only the owner of a file, and
// root, may ask for it.
func (r *root) open(rel string, flags int) (int, error) {
	fd, err := r.openPlain(rel, flags)
	if flags&unix.O_NOATIME != 0 && errors.Is(err, unix.EPERM) {
		return r.openPlain(rel, flags&^unix.O_NOATIME)
	}
	return fd, err
}

func (r *root) openPlain(rel string, flags int) (int, error) {
	if rel == "" {
		rel = "."
	}
	if !noOpenat2.Load() {
		how := unix.OpenHow{
			Flags:   uint64(flags | unix.O_CLOEXEC | unix.O_NOFOLLOW),
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
		}
		for {
			fd, err := unix.Openat2(r.fd, rel, &how)
			switch {
			case err == nil:
				return fd, nil
			case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
				continue // EAGAIN: a rename raced with the resolution
			case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EPERM) && flags&unix.O_NOATIME == 0:
				noOpenat2.Store(true)
			default:
				return -1, &fs.PathError{Op: "open", Path: r.abs(rel), Err: err}
			}
			break
		}
	}
	return r.openStepwise(rel, flags)
}

// openStepwise is open for systems without openat2: one component at a time.
func (r *root) openStepwise(rel string, flags int) (int, error) {
	dir := r.fd
	parts := strings.Split(rel, "/")
	for i, p := range parts {
		if p == ".." || p == "" {
			return -1, &fs.PathError{Op: "open", Path: r.abs(rel), Err: unix.EXDEV}
		}
		f := unix.O_PATH | unix.O_DIRECTORY
		if i == len(parts)-1 {
			f = flags
		}
		fd, err := unix.Openat(dir, p, f|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		if dir != r.fd {
			_ = unix.Close(dir)
		}
		if err != nil {
			return -1, &fs.PathError{Op: "open", Path: r.abs(rel), Err: err}
		}
		dir = fd
	}
	return dir, nil
}

// openFile opens the regular file rel for reading. It refuses anything else, so that a FIFO that
// took the place of a file cannot hang the backup.
func (r *root) openFile(rel string) (*file, error) {
	fd, err := r.open(rel, unix.O_RDONLY|unix.O_NOATIME|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		_ = unix.Close(fd)
		if err == nil {
			err = errors.New("no regular file any more")
		}
		return nil, &fs.PathError{Op: "open", Path: r.abs(rel), Err: err}
	}
	return &file{fd, r, rel}, nil
}

// file is a regular file that is read. An os.File would ask the kernel three times more what it is.
type file struct {
	fd  int
	r   *root
	rel string
}

func (f *file) Fd() uintptr  { return uintptr(f.fd) }
func (f *file) Name() string { return f.r.abs(f.rel) }
func (f *file) Close() error { return unix.Close(f.fd) }

func (f *file) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(f.fd, p)
		if !errors.Is(err, unix.EINTR) {
			return f.result(n, len(p), err)
		}
	}
}

// readAt is like Read, from an offset.
func (f *file) readAt(p []byte, off int64) (int, error) {
	for {
		n, err := unix.Pread(f.fd, p, off)
		if !errors.Is(err, unix.EINTR) {
			return f.result(n, len(p), err)
		}
	}
}

func (f *file) result(n, room int, err error) (int, error) {
	switch {
	case err != nil:
		return 0, &fs.PathError{Op: "read", Path: f.Name(), Err: err}
	case n == 0 && room > 0:
		return 0, io.EOF
	}
	return n, nil
}

// entry is one file system object below a root.
type entry struct {
	path  string // relative to the root; "" is the root itself
	mode  uint32 // st_mode
	uid   uint32
	gid   uint32
	nlink uint32
	rdev  uint64
	dev   uint64
	ino   uint64
	size  int64 // bytes
	alloc int64 // bytes that the file system has allocated
	mtime timespec
	ctime timespec
	// hardlink is the path of the first name of the same file, if this is another one.
	hardlink string
	// What the scan asked already, if it did: see ask.
	bare bool   // there are no extended attributes
	link string // target of a symbolic link
}

type timespec struct {
	sec  int64
	nsec int64
}

func (t timespec) before(o timespec) bool {
	return t.sec < o.sec || t.sec == o.sec && t.nsec < o.nsec
}

func (e *entry) isDir() bool     { return e.mode&unix.S_IFMT == unix.S_IFDIR }
func (e *entry) isRegular() bool { return e.mode&unix.S_IFMT == unix.S_IFREG }
func (e *entry) isSymlink() bool { return e.mode&unix.S_IFMT == unix.S_IFLNK }
func (e *entry) base() string    { return path.Base(e.path) }

func (e *entry) fill(st *unix.Stat_t) {
	e.mode, e.uid, e.gid = st.Mode, st.Uid, st.Gid
	e.nlink, e.rdev, e.dev, e.ino = uint32(st.Nlink), st.Rdev, st.Dev, st.Ino
	e.size, e.alloc = st.Size, st.Blocks*512
	e.mtime = timespec{st.Mtim.Sec, st.Mtim.Nsec}
	e.ctime = timespec{st.Ctim.Sec, st.Ctim.Nsec}
}

// stat returns the entry rel.
func (r *root) stat(rel string) (entry, error) {
	e := entry{path: rel}
	fd, err := r.open(rel, unix.O_PATH)
	if err != nil {
		return e, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return e, &fs.PathError{Op: "stat", Path: r.abs(rel), Err: err}
	}
	e.fill(&st)
	return e, nil
}

// ask finds out what is cheap to know of the entry name while its directory dir is open: whether it has no
// attributes, as most have none, and where a link leads. A whole chain of directories that hold one entry each
// need not be opened again then. What cannot be found out is left to [details]. buf is room for a target.
func (e *entry) ask(dir int, name string, buf []byte) {
	if noListxattrat.Load() {
		return
	}
	e.askBare(dir, name, buf)
	if !e.isSymlink() {
		return
	}
	if n, err := unix.Readlinkat(dir, name, buf); err == nil && n < len(buf) {
		e.link = string(buf[:n])
	}
}

// askBare finds out whether the entry name in dir has no attributes.
func (e *entry) askBare(dir int, name string, buf []byte) {
	if noListxattrat.Load() {
		return
	}
	n, err := listxattrat(dir, name, buf)
	switch {
	case err == nil:
		e.bare = n == 0
	case errors.Is(err, unix.ENOTSUP): // this file system has none
		e.bare = true
	}
}

// xattr is one extended attribute.
type xattr struct {
	name  string
	value []byte
}

// details reads what a stat does not tell. It keeps the directory of the last entry open, because
// neighbours are asked for one after the other. Not for concurrent use.
type details struct {
	r     *root
	dir   string
	fd    int
	open  bool
	buf   []byte
	names []byte
}

func newDetails(r *root) *details {
	return &details{r: r, buf: make([]byte, 4096), names: make([]byte, 1024)}
}

func (d *details) close() {
	if d.open {
		_ = unix.Close(d.fd)
		d.open = false
	}
}

// at returns the descriptor of the directory that holds rel, and the last name of rel.
func (d *details) at(rel string) (int, string, error) {
	if rel == "" {
		return d.r.fd, ".", nil
	}
	dir, name := "", rel
	if i := strings.LastIndexByte(rel, '/'); i >= 0 {
		dir, name = rel[:i], rel[i+1:]
	}
	if dir == "" {
		return d.r.fd, name, nil
	}
	if d.open && d.dir == dir {
		return d.fd, name, nil
	}
	d.close()
	fd, err := d.r.open(dir, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return -1, "", err
	}
	d.fd, d.dir, d.open = fd, dir, true
	return fd, name, nil
}

func (d *details) readlink(rel string) (string, error) {
	fd, name, err := d.at(rel)
	if err != nil {
		return "", err
	}
	for {
		n, err := unix.Readlinkat(fd, name, d.buf)
		if err != nil {
			return "", &fs.PathError{Op: "readlink", Path: d.r.abs(rel), Err: err}
		}
		if n < len(d.buf) {
			return string(d.buf[:n]), nil
		}
		d.buf = make([]byte, 2*len(d.buf))
	}
}

// readFile returns the content of the small regular file rel, valid until the next call. It reads
// at most limit bytes; more is an error, because the file was that small a moment ago.
func (d *details) readFile(rel string, limit int64) ([]byte, error) {
	fd, name, err := d.at(rel)
	if err != nil {
		return nil, err
	}
	flags := unix.O_RDONLY | unix.O_NOATIME | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC
	f, err := unix.Openat(fd, name, flags, 0)
	if errors.Is(err, unix.EPERM) {
		f, err = unix.Openat(fd, name, flags&^unix.O_NOATIME, 0)
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: d.r.abs(rel), Err: err}
	}
	defer unix.Close(f)
	n := 0
	for {
		if n == len(d.buf) {
			if int64(n) > limit {
				return nil, &fs.PathError{Op: "read", Path: d.r.abs(rel), Err: errGrew}
			}
			d.buf = append(d.buf, make([]byte, len(d.buf))...)
		}
		room := len(d.buf) - n
		k, err := unix.Read(f, d.buf[n:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, &fs.PathError{Op: "read", Path: d.r.abs(rel), Err: err}
		}
		if k == 0 {
			break
		}
		n += k
		if k < room && int64(n) == limit { // less than was asked for: that was the end
			break
		}
	}
	if int64(n) > limit {
		return nil, &fs.PathError{Op: "read", Path: d.r.abs(rel), Err: errGrew}
	}
	return d.buf[:n], nil
}

var (
	errGrew   = errors.New("the file grew while it was read: something writes to the instance")
	errShrank = errors.New("the file shrank while it was read: something writes to the instance")
)

// xattrs returns the extended attributes of rel, sorted by name. System attributes that the kernel
// makes up (system.posix_acl_*) are kept, since they carry access rights.
func (d *details) xattrs(rel string) ([]xattr, error) {
	fd, name, err := d.at(rel)
	if err != nil {
		return nil, err
	}
	p := ""
	list, get := unix.Llistxattr, unix.Lgetxattr
	if rel == "" {
		list, get = unix.Listxattr, unix.Getxattr
	}
	byFD := func() { // the magic link pins the directory
		p = "/proc/self/fd/" + strconv.Itoa(fd)
		if rel != "" {
			p += "/" + name
		}
	}
	var n int
	for {
		if rel == "" || noListxattrat.Load() {
			byFD()
			n, err = list(p, d.names)
		} else if n, err = listxattrat(fd, name, d.names); errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
			noListxattrat.Store(true)
			continue
		}
		if errors.Is(err, unix.ERANGE) {
			d.names = make([]byte, 2*len(d.names))
			continue
		}
		break
	}
	if errors.Is(err, unix.ENOTSUP) { // this file system has none
		return nil, nil
	}
	if err != nil {
		return nil, &fs.PathError{Op: "listxattr", Path: d.r.abs(rel), Err: err}
	}
	if n == 0 {
		return nil, nil
	}
	byFD()
	var out []xattr
	for _, name := range strings.Split(strings.TrimSuffix(string(d.names[:n]), "\x00"), "\x00") {
		var v []byte
		size := 256
		for {
			v = make([]byte, size)
			n, err = get(p, name, v)
			if errors.Is(err, unix.ERANGE) {
				if size > 64<<10 {
					break
				}
				size *= 4
				continue
			}
			break
		}
		if errors.Is(err, unix.ENODATA) {
			continue // removed in between, or an attribute that only shows in the list
		}
		if err != nil {
			return nil, &fs.PathError{Op: "getxattr " + name, Path: d.r.abs(rel), Err: err}
		}
		out = append(out, xattr{name, v[:n]})
	}
	sortXattrs(out)
	return out, nil
}

// noListxattrat is set when the kernel (before 6.13) or a seccomp filter refuses listxattrat.
var noListxattrat atomic.Bool

// listxattrat is llistxattr relative to a directory, at half the cost: most entries have no attributes,
// and this is called for each.
func listxattrat(dir int, name string, buf []byte) (int, error) {
	p, err := unix.BytePtrFromString(name)
	if err != nil {
		return 0, err
	}
	n, _, errno := unix.Syscall6(unix.SYS_LISTXATTRAT, uintptr(dir), uintptr(unsafe.Pointer(p)), unix.AT_SYMLINK_NOFOLLOW,
		uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func sortXattrs(x []xattr) {
	for i := 1; i < len(x); i++ { // a handful, nearly sorted
		for k := i; k > 0 && x[k].name < x[k-1].name; k-- {
			x[k], x[k-1] = x[k-1], x[k]
		}
	}
}

// sparse reports whether e may have holes: fewer bytes allocated than its size. File systems that
// compress look the same, so the holes themselves are asked for afterwards.
func (e *entry) sparse() bool { return e.isRegular() && e.size > 0 && e.alloc < e.size }

// hardlinks finds further names of files within one data set or one tar.
type hardlinks struct {
	mu    sync.Mutex
	first map[[2]uint64]string
}

// see returns the first name of the file e, or "" if e is the first.
func (h *hardlinks) see(e *entry) string {
	if e.nlink < 2 || e.isDir() {
		return ""
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.first == nil {
		h.first = map[[2]uint64]string{}
	}
	k := [2]uint64{e.dev, e.ino}
	if p, ok := h.first[k]; ok {
		return p
	}
	h.first[k] = e.path
	return ""
}
