package capture

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/fschange"
)

// scanner walks a directory tree. Its consumer sees the entries in one order (depth first, names
// sorted, a directory before what is in it) while several goroutines list directories ahead of it.
type scanner struct {
	r *root
	// skip leaves out an entry and all below it.
	skip func(rel string) bool
	// unreadable is told of directories and entries that cannot be read; the scan goes on.
	unreadable func(rel string, err error)
	workers    int
	// ahead bounds the entries that are listed but not consumed.
	ahead int
	// old is what an earlier scan saw; nil: nothing is known. A directory whose times are the same is not
	// listed again, and of its entries only those are looked at that trust does not vouch for.
	old *listing
	// list, if there is one, is exact: what is not in it is what it was when old was made, and is not even
	// looked at.
	list *fschange.List
	// trust reports whether an entry in an unchanged directory cannot have changed by itself.
	trust func(e *entry) bool
	// ask has what the groups will ask of each entry asked while its directory is open, but for those that old
	// tells the same of. So record tells the next scan, too.
	ask bool
	// only, if not nil, is what has just been found to differ from old. All else is as old says and is not looked at
	// once more.
	only differing
	// pass, if not nil, is asked of a directory below which nothing differs, after the directory itself was seen. If it says true it
	// has taken care of what is below, which is not walked.
	pass func(dir string, l *listing, kids []byte) bool
	// moved is set where something that only does not name is not what old says.
	moved atomic.Bool
	// listed counts the directories that were listed; nil: they are not counted.
	listed *atomic.Int64
	// taken counts the entries that were not looked at because of the list; nil: they are not counted.
	taken *atomic.Int64
	// record takes down what this scan sees; nil: nothing.
	record *listingWriter
}

// inlineEntries: a directory with at most so many entries is listed together with what is below it,
// since a job of its own costs more than the listing. Shard directories have one or two entries.
const inlineEntries = 4

// inlineMost ends a listing that goes ever deeper through narrow directories.
const inlineMost = 4096

// scanJob lists one directory.
type scanJob struct {
	rel   string
	dir   entry  // the directory itself
	old   oldDir // what is known of it
	state int8   // 0 waiting, 1 being listed, 2 listed
	items []scanItem
	size  int // entries below items
	done  chan struct{}
}

// scanItem is an entry, and for a directory that was not listed along with it the job for the rest, or what
// the listing says of it if that still holds for all that is below.
type scanItem struct {
	entry
	job  *scanJob
	kids []byte
}

type scanState struct {
	sc      *scanner
	mu      sync.Mutex
	cond    *sync.Cond
	stack   []*scanJob // the next in order is the last
	ahead   int
	stopped bool
	ctx     context.Context
	own     *lister   // of the consumer, for what no worker has begun
	cursors []*cursor // of asBefore, one for each depth
	before  entry     // what it tells of
}

// walk calls fn for rel itself and for each entry below it, in order.
func (sc *scanner) walk(ctx context.Context, rel string, fn func(*entry) error) error {
	if w := sc.record; w != nil {
		see := fn
		fn = func(e *entry) error {
			w.add(e)
			return see(e)
		}
	}
	e, err := sc.r.stat(rel)
	if err != nil {
		return err
	}
	if err := fn(&e); err != nil || !e.isDir() {
		return err
	}
	s := &scanState{sc: sc, ctx: ctx}
	s.cond = sync.NewCond(&s.mu)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer s.stop()
	for range max(sc.workers, 1) {
		wg.Go(s.work)
	}
	stopWatch := context.AfterFunc(ctx, s.stop)
	defer stopWatch()
	first := &scanJob{rel: rel, dir: e, done: make(chan struct{})}
	if sc.old != nil {
		first.old = sc.old.top
		first.old.listed = sc.list != nil
	}
	return s.consume(first, fn)
}

func (s *scanState) stop() {
	s.mu.Lock()
	s.stopped = true
	s.cond.Broadcast()
	s.mu.Unlock()
}

// work lists directories ahead of the consumer.
func (s *scanState) work() {
	l := newLister(s.sc)
	for {
		s.mu.Lock()
		for !s.stopped && (len(s.stack) == 0 || s.ahead > s.sc.ahead) {
			s.cond.Wait()
		}
		if s.stopped {
			s.mu.Unlock()
			return
		}
		j := s.stack[len(s.stack)-1]
		s.stack = s.stack[:len(s.stack)-1]
		if j.state != 0 {
			s.mu.Unlock()
			continue
		}
		j.state = 1
		s.mu.Unlock()
		s.list(l, j)
	}
}

// list fills j and queues what is below it.
func (s *scanState) list(l *lister, j *scanJob) {
	l.out = l.out[:0]
	l.list(&j.dir, j.old, &l.out)
	j.items = slices.Clone(l.out)
	l.tidy()
	s.mu.Lock()
	j.state = 2
	j.size = len(j.items)
	s.ahead += j.size
	for i := len(j.items) - 1; i >= 0; i-- {
		if c := j.items[i].job; c != nil {
			s.stack = append(s.stack, c)
		}
	}
	s.cond.Broadcast()
	s.mu.Unlock()
	close(j.done)
}

func (s *scanState) consume(j *scanJob, fn func(*entry) error) error {
	s.mu.Lock()
	if j.state == 0 { // nobody has begun: waiting for a worker that waits for us would be for ever
		j.state = 1
		s.mu.Unlock()
		if s.own == nil {
			s.own = newLister(s.sc)
		}
		s.list(s.own, j)
	} else {
		s.mu.Unlock()
		<-j.done
	}
	if err := s.ctx.Err(); err != nil {
		return context.Cause(s.ctx)
	}
	for i := range j.items {
		it := &j.items[i]
		if err := fn(&it.entry); err != nil {
			return err
		}
		switch {
		case it.job != nil:
			if err := s.consume(it.job, fn); err != nil {
				return err
			}
			it.job = nil
		case len(it.kids) > 0:
			if err := s.asBefore(it.path, it.kids, 0, fn); err != nil {
				return err
			}
		}
	}
	s.mu.Lock()
	s.ahead -= j.size
	s.cond.Broadcast()
	s.mu.Unlock()
	j.items = nil
	return nil
}

// asBefore walks what is below a directory as the listing tells it.
func (s *scanState) asBefore(dir string, kids []byte, depth int, fn func(*entry) error) error {
	sc := s.sc
	if sc.pass != nil && sc.pass(dir, sc.old, kids) {
		if sc.record != nil {
			sc.record.addKids(dir, kids)
		}
		return nil
	}
	if depth == len(s.cursors) {
		s.cursors = append(s.cursors, &cursor{l: sc.old, name: make([]byte, 0, 64)})
	}
	c := s.cursors[depth]
	c.reset(kids)
	for c.next() {
		path := join(dir, c.o.entry.path)
		s.before = c.o.entry
		s.before.path = path
		if err := fn(&s.before); err != nil {
			return err
		}
		if len(c.o.kids) > 0 {
			if err := s.asBefore(path, c.o.kids, depth+1, fn); err != nil {
				return err
			}
		}
	}
	if c.d.bad { // cannot be: the cache has a checksum
		return fmt.Errorf("what the cache says of %s is damaged", sc.r.abs(dir))
	}
	return nil
}

// lister reads directories with getdents and fstatat relative to the directory.
type lister struct {
	sc    *scanner
	buf   []byte
	names []string
	link  []byte // room for the target of a link
	// What is found in the directories on the way down, the innermost last: most have an entry or two, and slices of
	// their own would be most of what a scan allocates.
	found []scanItem
	known []oldDir
	look  []toLook
	cur   cursor
	out   []scanItem // what a job has found until it is done
}

// tidy lets go of what a large directory took.
func (l *lister) tidy() {
	if cap(l.found) > 2*inlineMost {
		l.found, l.known, l.look = nil, nil, nil
	}
	if cap(l.out) > 2*inlineMost {
		l.out = nil
	}
}

// toLook is an entry in found that must be looked at.
type toLook struct {
	i    int
	sure bool // the times that old has prove something
}

func newLister(sc *scanner) *lister {
	return &lister{sc: sc, buf: make([]byte, 32<<10), link: make([]byte, 4<<10)}
}

// list appends the entries of the directory dir, in order; old is what is known of it.
func (l *lister) list(dir *entry, old oldDir, out *[]scanItem) {
	f, k := len(l.found), len(l.known)
	defer func() { l.found, l.known = l.found[:f], l.known[:k] }()
	found, known, ok := l.unchanged(dir, old)
	if !ok {
		if l.sc.only != nil && old.known && !l.sc.only[dir.path] {
			l.sc.moved.Store(true)
		}
		found, known = l.read(dir, old)
	}
	if len(found) > inlineEntries || len(*out) > inlineMost {
		for i := range found {
			if found[i].isDir() && found[i].kids == nil {
				found[i].job = &scanJob{rel: found[i].path, dir: found[i].entry, done: make(chan struct{})}
				if known != nil {
					found[i].job.old = known[i]
				}
			}
		}
		*out = append(*out, found...)
		return
	}
	for i := range found {
		*out = append(*out, found[i])
		if found[i].isDir() && found[i].kids == nil {
			var o oldDir
			if known != nil {
				o = known[i]
			}
			l.list(&found[i].entry, o, out)
		}
	}
}

// unchanged returns the entries of a directory that is as it was, without listing it. Subdirectories are
// looked at, and so is what may have changed in place; where there is a list, only what is in it. It gives
// up (false) where anything is not as expected.
func (l *lister) unchanged(dir *entry, old oldDir) (found []scanItem, known []oldDir, ok bool) {
	list := l.sc.list
	if !old.listed {
		list = nil
	}
	if !old.same(dir) && (list == nil || list.Changed(dir.path)) {
		return nil, nil, false
	}
	short := l.sc.only != nil
	itself := short && l.sc.only[dir.path]
	f, k := len(l.found), len(l.known)
	look := l.look[:0]
	arrived := false
	l.cur.l = l.sc.old
	l.cur.reset(old.kids)
	for l.cur.next() {
		o := &l.cur.o
		o.entry.path = join(dir.path, o.entry.path)
		dir := oldDir{}
		if o.isDir() {
			dir = o.dir()
			dir.listed = list != nil
		}
		at := toLook{len(l.found) - f, o.flags&listedUnsure == 0}
		var kids []byte
		switch {
		case o.flags&listedKind == listedOther:
			look = append(look, at)
		case list != nil:
			if list.Changed(o.entry.path) {
				look = append(look, at)
				if list.Arrived(o.entry.path) {
					arrived = true
				}
			}
		case o.flags&listedUnsure != 0:
			look = append(look, at)
		case !short || itself:
			if o.isDir() || !l.sc.trust(&o.entry) {
				look = append(look, at)
			}
		case o.isDir():
			differs, above := l.sc.only[o.entry.path]
			if differs {
				look = append(look, at)
			} else if !above {
				kids = o.kids
			}
		}
		l.found, l.known = append(l.found, scanItem{entry: o.entry, kids: kids}), append(l.known, dir)
	}
	ok = !l.cur.d.bad
	l.look = look
	found, known = l.found[f:], l.known[k:]
	if !ok || arrived {
		return nil, nil, false
	}
	// A path from the root costs less than opening the directory for one or two. The path leads through
	// directories that were just found to be what they were.
	fd, at := l.sc.r.fd, 0
	if len(look) > 2 {
		var err error
		if fd, err = l.sc.r.open(dir.path, unix.O_PATH|unix.O_DIRECTORY); err != nil {
			return nil, nil, false
		}
		defer unix.Close(fd)
		if at = len(dir.path); at > 0 {
			at++ // the slash
		}
	}
	var st unix.Stat_t
	for _, k := range look {
		e := &found[k.i].entry
		if err := unix.Fstatat(fd, e.path[at:], &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return nil, nil, false
		}
		was := *e
		e.fill(&st)
		if e.isDir() != known[k.i].known {
			return nil, nil, false
		}
		if !k.sure || !sameInode(&was, e) {
			e.bare = false
			if l.sc.ask {
				e.askBare(fd, e.path[at:], l.link)
			}
		}
	}
	if list != nil && l.sc.taken != nil {
		l.sc.taken.Add(int64(len(found) - len(look)))
	}
	return found, known, true
}

// below is what stands before the names in the directory rel.
func below(rel string) string {
	if rel == "" {
		return ""
	}
	return rel + "/"
}

// join makes a path of that of a directory and a name whose bytes do not last.
func join(dir, name string) string {
	if dir == "" {
		return strings.Clone(name)
	}
	return dir + "/" + name
}

// read lists a directory. Where something is known of its subdirectories it is returned as well.
func (l *lister) read(dir *entry, old oldDir) (found []scanItem, known []oldDir) {
	rel := dir.path
	fd, err := l.sc.r.open(rel, unix.O_RDONLY|unix.O_NOATIME|unix.O_DIRECTORY)
	if err != nil {
		l.sc.unreadable(rel, err)
		return nil, nil
	}
	// Closed before going down: a chain of a thousand directories must not hold as many descriptors.
	defer unix.Close(fd)
	if l.sc.listed != nil {
		l.sc.listed.Add(1)
	}
	names, err := l.readNames(fd)
	if err != nil {
		l.sc.unreadable(rel, &fs.PathError{Op: "read directory", Path: l.sc.r.abs(rel), Err: err})
	}
	sort.Strings(names)
	prefix := below(rel)
	found = make([]scanItem, 0, len(names))
	var st unix.Stat_t
	for _, name := range names {
		p := prefix + name
		if l.sc.skip != nil && l.sc.skip(p) {
			continue
		}
		if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			if !errors.Is(err, unix.ENOENT) {
				l.sc.unreadable(p, &fs.PathError{Op: "stat", Path: l.sc.r.abs(p), Err: err})
			}
			continue // gone in between: it is not part of the picture
		}
		found = append(found, scanItem{entry: entry{path: p}})
		e := &found[len(found)-1].entry
		e.fill(&st)
		if l.sc.ask && !old.known {
			e.ask(fd, name, l.link)
		}
	}
	if !old.known {
		return found, nil
	}
	known = make([]oldDir, len(found))
	asked := make([]bool, len(found))
	i := 0
	l.sc.old.each(old.kids, func(o *oldEntry) bool { // both are in order
		for i < len(found) && found[i].path[len(prefix):] < o.entry.path {
			i++
		}
		if i == len(found) || found[i].path[len(prefix):] != o.entry.path {
			return i < len(found)
		}
		e := &found[i].entry
		// What came here since is not that of the listing.
		if old.listed && l.sc.list.Arrived(e.path) {
			return true
		}
		if e.isDir() && o.isDir() {
			known[i] = o.dir()
			known[i].listed = old.listed
		}
		if o.flags&listedUnsure == 0 && o.flags&listedKind != listedOther && sameInode(&o.entry, e) {
			e.bare, asked[i] = o.entry.bare, true
		}
		return true
	})
	for i := range found {
		if e := &found[i].entry; l.sc.ask && !asked[i] {
			e.ask(fd, e.path[len(prefix):], l.link)
		}
	}
	return found, known
}

// readNames returns the names in the directory fd; the slice is valid until the next call.
func (l *lister) readNames(fd int) ([]string, error) {
	l.names = l.names[:0]
	for {
		n, err := unix.Getdents(fd, l.buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return l.names, err
		}
		if n == 0 {
			return l.names, nil
		}
		for b := l.buf[:n]; len(b) > 0; {
			// struct linux_dirent64: ino 8, off 8, reclen 2, type 1, name
			reclen := binary.NativeEndian.Uint16(b[16:])
			name := b[19:reclen]
			if i := bytes.IndexByte(name, 0); i >= 0 {
				name = name[:i]
			}
			if s := string(name); s != "." && s != ".." {
				l.names = append(l.names, s)
			}
			b = b[reclen:]
		}
	}
}

// comparePaths orders paths as walk does: component by component, so that a directory stands
// right before what is in it.
func comparePaths(a, b string) int {
	for {
		i, j := strings.IndexByte(a, '/'), strings.IndexByte(b, '/')
		x, y := a, b
		if i >= 0 {
			x = a[:i]
		}
		if j >= 0 {
			y = b[:j]
		}
		if x != y {
			return strings.Compare(x, y)
		}
		switch {
		case i < 0 && j < 0:
			return 0
		case i < 0:
			return -1
		case j < 0:
			return 1
		}
		a, b = a[i+1:], b[j+1:]
	}
}
