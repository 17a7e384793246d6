package freeze

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/mountinfo"
	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// The signs of life in Holder.How.
const (
	HowLock    = "lock"
	HowOpen    = "open file"
	HowMapped  = "mapped file"
	HowRuns    = "running"  // a server that was told to end, whatever files it has
	HowChanges = "changing" // files changed while nobody was seen to have them open
)

// initPIDNamespace is the fixed inode number of the first PID namespace (PROC_PID_INIT_INO).
const initPIDNamespace = "pid:[4026531836]"

// Usage is the answer of Look.
type Usage struct {
	// Holders is empty if nothing uses the directories, as far as this process can see.
	Holders []Holder
	// Limits are sentences about what could not be looked at, for the user to read.
	Limits []string
}

// Err returns nil if nobody holds anything, else a *BusyError.
func (u Usage) Err() error {
	if len(u.Holders) == 0 {
		return nil
	}
	return &BusyError{Holders: u.Holders}
}

// Paths returns the places of inst that must be at rest before they are captured.
func Paths(inst *ocis.Instance) []string {
	var list []string
	seen := map[string]bool{}
	add := func(p string) {
		if p != "" && !seen[p] {
			seen[p] = true
			list = append(list, p)
		}
	}
	add(inst.BasePath)
	for _, d := range inst.DataSets {
		add(d.Path)
	}
	for _, s := range inst.Stores {
		add(s.Root)
	}
	return list
}

// Holders returns what uses the given directories or files: holders of the lock files of the
// product, and processes of the host, containers included, that have files open or mapped there.
// This process itself does not count, nor does a working directory. Paths that do not exist are
// passed over. See Look for what could not be seen.
//
// Errors: context errors, /proc that cannot be read.
func Holders(ctx context.Context, paths []string) ([]Holder, error) {
	u, err := Look(ctx, paths)
	return u.Holders, err
}

// Look does what Holders does, tells the limits of its sight as well, and leaves out the processes
// in except.
//
// Errors: context errors, /proc that cannot be read.
func Look(ctx context.Context, paths []string, except ...int) (Usage, error) {
	s, err := newScan(paths, except)
	if err != nil {
		return Usage{}, err
	}
	if len(s.roots) == 0 {
		return Usage{}, ctx.Err()
	}
	if err := s.processes(ctx); err != nil {
		return Usage{}, err
	}
	s.locks()
	return s.result(), ctx.Err()
}

// scan is one pass over /proc.
type scan struct {
	roots  []string
	areas  []area
	devs   map[string]bool // the filesystems of areas
	self   *mountTable
	selfNS string
	except map[int]bool

	mu      sync.Mutex
	tables  map[string]*mountTable // by mount namespace and root directory
	holders []Holder
	limits  []string
	blind   int // processes whose files could not be listed
}

func newScan(paths []string, except []int) (*scan, error) {
	table, err := mountinfo.Self()
	if err != nil {
		return nil, fmt.Errorf("cannot tell who uses the data: %w; is /proc mounted?", err)
	}
	s := &scan{
		self:   newMountTable(table, ""),
		devs:   map[string]bool{},
		except: map[int]bool{os.Getpid(): true},
		tables: map[string]*mountTable{},
	}
	for _, pid := range except {
		s.except[pid] = true
	}
	s.selfNS, _ = os.Readlink("/proc/self/ns/mnt")
	seen := map[area]bool{}
	network := map[string]bool{}
	for _, p := range paths {
		p, err := filepath.Abs(p)
		if err != nil {
			return nil, err
		}
		real, err := filepath.EvalSymlinks(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			s.limits = append(s.limits, fmt.Sprintf("whether anything uses %s could not be told: %v", p, err))
			continue
		}
		s.roots = append(s.roots, real)
		for _, a := range s.self.areas(real) {
			if !seen[a] {
				seen[a] = true
				s.areas = append(s.areas, a)
				s.devs[a.dev] = true
			}
		}
	}
	for _, m := range s.self.list {
		if s.devs[m.Device] && isNetwork(m.Type) && !network[m.Type] {
			network[m.Type] = true
			s.limits = append(s.limits, fmt.Sprintf("some of the data is on %s: a server that runs on another host is seen only by its locks, if at all", m.Type))
		}
	}
	if _, err := os.Stat("/proc/1"); err != nil {
		s.limits = append(s.limits, "processes of other users are hidden from this one: run as root to be sure that none of them uses the data")
	}
	if ns, err := os.Readlink("/proc/self/ns/pid"); err == nil && ns != initPIDNamespace {
		s.limits = append(s.limits, "this process runs in a PID namespace of its own (a container): processes outside of it are seen only by their locks")
	}
	return s, nil
}

// hostPath returns the name on this host of a file at p, if it belongs to the instance.
func (s *scan) hostPath(p place) (string, bool) {
	for _, a := range s.areas {
		if a.dev != p.dev {
			continue
		}
		if rest, ok := below(p.path, a.path); ok {
			return filepath.Join(a.host, rest), true
		}
	}
	return "", false
}

func (s *scan) add(h Holder) {
	s.mu.Lock()
	s.holders = append(s.holders, h)
	s.mu.Unlock()
}

// processes looks at the open and mapped files of every process.
func (s *scan) processes(ctx context.Context) error {
	d, err := os.Open("/proc")
	if err != nil {
		return fmt.Errorf("cannot tell who uses the data: %w", err)
	}
	names, err := d.Readdirnames(-1)
	d.Close()
	if err != nil {
		return fmt.Errorf("cannot tell who uses the data: list /proc: %w", err)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(4) // the kernel does the work; more only fight for its locks
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || s.except[pid] {
			continue
		}
		g.Go(func() error {
			if err := gctx.Err(); err != nil {
				return err
			}
			s.process(pid)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if s.blind > 0 {
		s.limits = append(s.limits, fmt.Sprintf("the open files of %d processes of other users could not be looked at: run as root to be sure that none of them uses the data", s.blind))
	}
	return ctx.Err()
}

// process looks at one process. One that ends meanwhile holds nothing.
func (s *scan) process(pid int) {
	dir := "/proc/" + strconv.Itoa(pid)
	// Half of all processes are threads of the kernel, without a program.
	if _, err := os.Readlink(dir + "/exe"); errors.Is(err, fs.ErrNotExist) && isEmptyProcess(dir) {
		return
	}
	d, err := os.Open(dir + "/fd")
	var names []string
	if err == nil {
		names, err = d.Readdirnames(-1)
		d.Close()
	}
	if err != nil {
		if errors.Is(err, fs.ErrPermission) && !isEmptyProcess(dir) {
			s.mu.Lock()
			s.blind++
			s.mu.Unlock()
		}
		return
	}
	var table *mountTable // fetched at the first real file
	command := ""
	found := false
	for _, fd := range names {
		link, err := os.Readlink(dir + "/fd/" + fd)
		if err != nil || !strings.HasPrefix(link, "/") || link == "/dev/null" {
			continue
		}
		info, err := os.ReadFile(dir + "/fdinfo/" + fd)
		if err != nil {
			continue
		}
		if table == nil {
			if table = s.table(dir); table == nil {
				return
			}
		}
		id, flags := parseFdinfo(info)
		p, ok := table.locate(strings.TrimSuffix(link, " (deleted)"), id)
		if !ok || !s.devs[p.dev] {
			continue
		}
		host, ok := s.hostPath(p)
		if !ok {
			continue
		}
		if !found {
			found, command = true, commandOf(pid)
		}
		s.add(Holder{PID: pid, Command: command, Path: host, How: HowOpen,
			Writing: flags&unix.O_ACCMODE != unix.O_RDONLY})
	}
	if found {
		return // its mappings would tell nothing new, and cost the most
	}
	maps, err := os.ReadFile(dir + "/maps")
	if err != nil {
		return
	}
	for line := range bytes.Lines(maps) {
		// 7f00-7f10 rw-s 00000000 fe:00 1234   /path; a private mapping never reaches the file
		f := bytes.Fields(line)
		if len(f) < 6 || len(f[1]) < 4 || f[1][3] != 's' || !s.devs[decimalDev(string(f[3]))] {
			continue
		}
		at := bytes.IndexByte(line, '/')
		if at < 0 {
			continue
		}
		if table == nil {
			if table = s.table(dir); table == nil {
				return
			}
		}
		path := strings.TrimSuffix(strings.TrimSuffix(string(line[at:]), "\n"), " (deleted)")
		p, ok := table.locate(strings.ReplaceAll(path, `\012`, "\n"), -1)
		if !ok {
			continue
		}
		if host, ok := s.hostPath(p); ok {
			s.add(Holder{PID: pid, Command: commandOf(pid), Path: host, How: HowMapped, Writing: f[1][1] == 'w'})
			return
		}
	}
}

// table returns the mounts as the process in dir has them, nil if it is gone.
func (s *scan) table(dir string) *mountTable {
	ns, err := os.Readlink(dir + "/ns/mnt")
	if err != nil {
		return nil
	}
	root, err := os.Readlink(dir + "/root")
	if err != nil {
		return nil
	}
	if ns == s.selfNS {
		return s.self // also for a process in a chroot: links are told from our root
	}
	key := ns + " " + root
	s.mu.Lock()
	t := s.tables[key]
	s.mu.Unlock()
	if t != nil {
		return t
	}
	list, err := mountinfo.Load(dir + "/mountinfo")
	if err != nil {
		return nil
	}
	t = newMountTable(list, root)
	s.mu.Lock()
	s.tables[key] = t
	s.mu.Unlock()
	return t
}

// isEmptyProcess tells kernel threads and zombies, which have no files.
func isEmptyProcess(dir string) bool {
	st, err := readStat(dir + "/stat")
	if err != nil {
		return true
	}
	const kernelThread = 0x00200000 // PF_KTHREAD
	return st.state == 'Z' || st.state == 'X' || st.flags&kernelThread != 0
}

// decimalDev turns the hexadecimal "fe:00" of maps and locks into "254:0" of mountinfo.
func decimalDev(hex string) string {
	a, b, ok := strings.Cut(hex, ":")
	major, err1 := strconv.ParseUint(a, 16, 32)
	minor, err2 := strconv.ParseUint(b, 16, 32)
	if !ok || err1 != nil || err2 != nil {
		return ""
	}
	return fmt.Sprintf("%d:%d", major, minor)
}

// lockFiles finds, by name, the files that the product keeps locked while it runs. root may be the
// base directory, the directory of idm or search alone, or such a file.
func lockFiles(root string) []string {
	st, err := os.Stat(root)
	if err != nil {
		return nil
	}
	if !st.IsDir() {
		if strings.HasSuffix(root, ".boltdb") || filepath.Base(root) == "root.bolt" {
			return []string{root}
		}
		return nil
	}
	var list []string
	for _, dir := range []string{root, filepath.Join(root, "idm")} {
		entries, _ := os.ReadDir(dir) // not Glob: the path may hold its special characters
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), ".boltdb") {
				list = append(list, filepath.Join(dir, e.Name()))
			}
		}
	}
	for _, rel := range []string{"root.bolt", "store/root.bolt", "bleve/store/root.bolt", "search/bleve/store/root.bolt"} {
		if p := filepath.Join(root, rel); isRegular(p) {
			list = append(list, p)
		}
	}
	return list
}

func isRegular(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}

// kernelLock is one line of /proc/locks.
type kernelLock struct {
	pid   int
	dev   string
	inode uint64
}

func parseLocks(data []byte) []kernelLock {
	var list []kernelLock
	for line := range bytes.Lines(data) {
		// 1: FLOCK  ADVISORY  WRITE 708 fe:00:1234 0 EOF; a waiter has -> after the number
		f := strings.Fields(string(line))
		if len(f) > 1 && f[1] == "->" {
			f = append(f[:1], f[2:]...)
		}
		if len(f) < 6 {
			continue
		}
		pid, err := strconv.Atoi(f[4])
		i := strings.LastIndexByte(f[5], ':')
		if err != nil || i < 0 {
			continue
		}
		inode, err := strconv.ParseUint(f[5][i+1:], 10, 64)
		if err != nil {
			continue
		}
		list = append(list, kernelLock{pid: max(pid, 0), dev: decimalDev(f[5][:i]), inode: inode})
	}
	return list
}

// locks tries the lock files, and asks the kernel who has them.
func (s *scan) locks() {
	data, err := os.ReadFile("/proc/locks")
	if err != nil {
		s.limits = append(s.limits, fmt.Sprintf("who holds locks could not be told: %v", err))
	}
	table := parseLocks(data)
	seen := map[string]bool{}
	for _, root := range s.roots {
		for _, path := range lockFiles(root) {
			if !seen[path] {
				seen[path] = true
				s.lock(path, table)
			}
		}
	}
}

func (s *scan) lock(path string, table []kernelLock) {
	busy, st, err := tryLock(path)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		s.limits = append(s.limits, fmt.Sprintf("the lock of %s could not be tried: %v", path, err))
	}
	if st.Ino == 0 {
		return
	}
	dev := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	// On btrfs and overlay stat gives a device that is not the one of the filesystem. Inode numbers
	// of the latter repeat among subvolumes, so such a match counts only for a lock seen to be held.
	super := ""
	if p, ok := s.self.locate(path, mountIDOf(path)); ok {
		super = p.dev
	}
	found := map[int]bool{}
	for _, l := range table {
		if l.inode != st.Ino || s.except[l.pid] || found[l.pid] {
			continue
		}
		if l.dev == dev || busy && l.dev == super {
			found[l.pid] = true
			s.add(Holder{PID: l.pid, Command: commandOf(l.pid), Path: path, How: HowLock, Writing: true})
		}
	}
	if busy && len(found) == 0 {
		s.add(Holder{Path: path, How: HowLock, Writing: true})
	}
}

// tryLock takes the exclusive lock of path and gives it back at once. The server's own attempt in
// that very moment is not disturbed: bbolt tries again.
func tryLock(path string) (busy bool, st unix.Stat_t, err error) {
	open := func(mode int) (*os.File, error) {
		return os.OpenFile(path, mode|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	}
	f, err := open(os.O_RDONLY)
	if err != nil {
		return false, st, err
	}
	defer func() { f.Close() }()
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return false, st, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		st.Ino = 0
		return false, st, nil
	}
	err = flock(f, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EBADF) {
		// NFS makes byte range locks of it, which want a file that is open for writing.
		w, werr := open(os.O_RDWR)
		if werr != nil {
			return false, st, werr
		}
		f.Close()
		f = w
		err = flock(f, unix.LOCK_EX|unix.LOCK_NB)
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, st, nil
	}
	if err != nil {
		return false, st, &fs.PathError{Op: "flock", Path: path, Err: err}
	}
	return false, st, flock(f, unix.LOCK_UN)
}

func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func openPath(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// result sorts: locks first, then by process and path, so that messages are stable.
func (s *scan) result() Usage {
	rank := map[string]int{HowLock: 0, HowOpen: 1, HowMapped: 2}
	sort.SliceStable(s.holders, func(i, j int) bool {
		a, b := s.holders[i], s.holders[j]
		if a.How != b.How {
			return rank[a.How] < rank[b.How]
		}
		if a.PID != b.PID {
			return a.PID < b.PID
		}
		return a.Path < b.Path
	})
	return Usage{Holders: s.holders, Limits: s.limits}
}
