package capture

import (
	"bytes"
	"encoding/binary"
	"hash/fnv"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A listing remembers what a scan saw below one directory, so that the next scan need not list a
// directory whose times are the same: on the file systems that localTimes names, each entry that is
// added, removed, renamed or replaced changes the times of its directory. The entries themselves are
// looked at all the same, but for those that scanner.trust names.
//
// The form is made for reading one directory at a time without an index: a directory's entries follow
// one another, and each subdirectory is followed by the number of bytes that are below it. An entry of
// a shard takes about 15 bytes.
type listing struct {
	owners []owner
	base   int64  // time in nanoseconds that others are counted from
	top    oldDir // the directory itself
}

// owner is what most entries of a store share.
type owner struct{ mode, uid, gid uint32 }

// Flags of an entry. The low two bits are its kind.
const (
	listedDir     = 0
	listedRegular = 1
	listedSymlink = 2
	listedOther   = 3 // the name only
	listedSparse  = 1 << 2
	listedUnsure  = 1 << 3 // changed so shortly before the scan that its times prove nothing
	listedBare    = 1 << 4 // had no extended attributes; setting one changes the ctime
	listedKind    = 3
)

// oldEntry is what a listing says of one entry.
type oldEntry struct {
	flags byte
	entry entry // its path is the name only; times, mode, owner, size but for listedOther
	kids  []byte
}

func (o *oldEntry) isDir() bool { return o.flags&listedKind == listedDir }

// oldDir is what a listing says of a directory; the zero value: nothing is known.
type oldDir struct {
	known        bool // kids are its entries
	listed       bool // the list of changes tells of it
	sure         bool // its times prove something
	mode         uint32
	uid, gid     uint32
	mtime, ctime timespec
	kids         []byte
}

func (o *oldEntry) dir() oldDir {
	e := &o.entry
	return oldDir{known: true, sure: o.flags&listedUnsure == 0, mode: e.mode, uid: e.uid, gid: e.gid, mtime: e.mtime, ctime: e.ctime, kids: o.kids}
}

// same reports whether the directory has the times, mode and owner that it had.
func (o *oldDir) same(e *entry) bool {
	return o.known && o.sure && o.mtime == e.mtime && o.ctime == e.ctime && o.mode == e.mode && o.uid == e.uid && o.gid == e.gid
}

// sameInode reports whether e, of the same name, has the times, mode, owner and, but for a directory, the size of old.
func sameInode(old, e *entry) bool {
	return old.mode == e.mode && old.uid == e.uid && old.gid == e.gid && (e.isDir() || old.size == e.size && e.nlink == 1) &&
		old.mtime == e.mtime && old.ctime == e.ctime
}

// same reports whether the file or link, whose times must prove something, is what it was.
func (o *oldEntry) same(e *entry) bool {
	p := &o.entry
	return e.nlink == 1 && p.mode == e.mode && p.uid == e.uid && p.gid == e.gid && p.size == e.size &&
		p.mtime == e.mtime && p.ctime == e.ctime
}

// cursor reads the entries of one directory after the other.
type cursor struct {
	l    *listing
	d    decoder
	name []byte
	o    oldEntry // its bytes are valid until the next call
}

func (c *cursor) reset(kids []byte) { c.d, c.name = decoder{p: kids}, c.name[:0] }

// next reads the next entry into c.o. At the end, or where it cannot read on (c.d.bad), it returns false.
func (c *cursor) next() bool {
	d, o := &c.d, &c.o
	if len(d.p) == 0 {
		return false
	}
	*o = oldEntry{flags: d.byte()}
	shared := d.count2(len(c.name))
	c.name = append(c.name[:shared], d.take(d.count())...)
	o.entry.path = unsafe.String(unsafe.SliceData(c.name), len(c.name))
	if kind := o.flags & listedKind; kind != listedOther {
		who := d.count2(len(c.l.owners) - 1)
		if d.bad {
			return false
		}
		e, w := &o.entry, &c.l.owners[who]
		e.mode, e.uid, e.gid, e.nlink = w.mode, w.uid, w.gid, 1
		e.bare = o.flags&(listedBare|listedUnsure) == listedBare
		if kind != listedDir {
			if e.size = d.int(); o.flags&listedSparse == 0 {
				e.alloc = e.size
			}
		}
		m := c.l.base + d.int()
		e.mtime = fromNanoseconds(m)
		e.ctime = fromNanoseconds(m + d.int())
		if kind == listedDir {
			o.kids = d.take(d.count())
		}
	}
	return !d.bad
}

// each calls fn for the entries in kids, in order, until fn returns false. It reports whether kids
// could be read to that point. The entry, and the bytes of its name, are valid during the call only.
func (l *listing) each(kids []byte, fn func(o *oldEntry) bool) bool {
	c := cursor{l: l, name: make([]byte, 0, 64)}
	c.reset(kids)
	for c.next() {
		if !fn(&c.o) {
			return true
		}
	}
	return !c.d.bad
}

// count2 reads a number that is at most limit.
func (d *decoder) count2(limit int) int {
	v, n := binary.Uvarint(d.p)
	if n <= 0 || limit < 0 || v > uint64(limit) {
		d.bad, d.p = true, nil
		return 0
	}
	d.p = d.p[n:]
	return int(v)
}

// nanoseconds returns t as one number, if it fits.
func (t timespec) nanoseconds() (int64, bool) {
	if far := int64(1) << 32; t.sec > far || t.sec < -far { // some 136 years from 1970
		return 0, false
	}
	return t.sec*1e9 + t.nsec, true
}

func fromNanoseconds(n int64) timespec {
	sec, nsec := n/1e9, n%1e9
	if nsec < 0 {
		sec, nsec = sec-1, nsec+1e9
	}
	return timespec{sec, nsec}
}

// listingWriter makes a listing of the entries of a walk, which come in order.
type listingWriter struct {
	c      *capturer
	l      listing
	from   *listing // what l is like; nil: nothing
	index  map[owner]int
	stack  []listingDir
	spare  [][]byte
	top    entry
	failed bool // the order was not what it must be; nothing is remembered
}

type listingDir struct {
	path string
	buf  []byte
	last string
}

// newListingWriter makes room for a listing that is about as long as old was.
func (c *capturer) newListingWriter(old []byte) *listingWriter {
	w := &listingWriter{c: c, index: map[owner]int{}}
	if len(old) > 0 {
		w.spare = append(w.spare, make([]byte, 0, len(old)+len(old)/16))
	}
	return w
}

// like makes a listing of which parts can be those of l.
func (w *listingWriter) like(l *listing) {
	w.from = l
	w.l.base, w.l.owners = l.base, slices.Clone(l.owners)
	for i, o := range l.owners {
		w.index[o] = i
	}
}

// addKids takes over from the listing that like named all that is below the directory dir, which was added last.
func (w *listingWriter) addKids(dir string, kids []byte) {
	if w.failed {
		return
	}
	top := &w.stack[len(w.stack)-1]
	if top.path != dir || len(top.buf) > 0 {
		w.failed = true
		return
	}
	top.buf = append(top.buf, kids...)
}

// add takes in the next entry of the walk; the first is the directory itself.
func (w *listingWriter) add(e *entry) {
	if w.failed {
		return
	}
	if len(w.stack) == 0 {
		if w.from == nil {
			w.l.base, _ = e.mtime.nanoseconds()
		}
		w.push(e)
		w.top = *e
		return
	}
	dir := e.path[:max(0, strings.LastIndexByte(e.path, '/'))]
	for w.stack[len(w.stack)-1].path != dir {
		if len(w.stack) == 1 {
			w.failed = true
			return
		}
		w.pop()
	}
	top := &w.stack[len(w.stack)-1]
	name := e.path[len(dir):]
	name = strings.TrimPrefix(name, "/")
	flags := byte(listedOther)
	m, ok1 := e.mtime.nanoseconds()
	c, ok2 := e.ctime.nanoseconds()
	if ok1 && ok2 {
		switch {
		case e.isDir():
			flags = listedDir
		case e.nlink > 1:
		case e.isRegular():
			flags = listedRegular
		case e.isSymlink():
			flags = listedSymlink
		}
	}
	if e.sparse() {
		flags |= listedSparse
	}
	switch {
	case w.c.racyTime(e.ctime):
		flags |= listedUnsure
	case e.bare:
		flags |= listedBare
	}
	b := append(top.buf, flags)
	shared := sharedPrefix(top.last, name)
	b = binary.AppendUvarint(b, uint64(shared))
	b = binary.AppendUvarint(b, uint64(len(name)-shared))
	b = append(b, name[shared:]...)
	top.last = name
	if kind := flags & listedKind; kind != listedOther {
		b = binary.AppendUvarint(b, uint64(w.owner(owner{e.mode, e.uid, e.gid})))
		if kind != listedDir {
			b = binary.AppendVarint(b, e.size)
		}
		b = binary.AppendVarint(b, m-w.l.base)
		b = binary.AppendVarint(b, c-m)
	}
	top.buf = b
	if flags&listedKind == listedDir {
		w.push(e)
	}
}

// push opens the directory e.
func (w *listingWriter) push(e *entry) {
	next := listingDir{path: e.path}
	if n := len(w.spare); n > 0 {
		next.buf, w.spare = w.spare[n-1], w.spare[:n-1]
	}
	w.stack = append(w.stack, next)
}

func (w *listingWriter) owner(o owner) int {
	i, ok := w.index[o]
	if !ok {
		i = len(w.l.owners)
		w.l.owners = append(w.l.owners, o)
		w.index[o] = i
	}
	return i
}

// pop closes the innermost directory.
func (w *listingWriter) pop() {
	n := len(w.stack) - 1
	inner, outer := &w.stack[n], &w.stack[n-1]
	outer.buf = binary.AppendUvarint(outer.buf, uint64(len(inner.buf)))
	outer.buf = append(outer.buf, inner.buf...)
	w.spare = append(w.spare, inner.buf[:0])
	w.stack = w.stack[:n]
}

// finish returns the encoded listing. rules names what else it depends on; a scan under other rules
// does not use it. It is nil if nothing was seen.
func (w *listingWriter) finish(rules uint64) []byte {
	if w.failed || len(w.stack) == 0 {
		return nil
	}
	for len(w.stack) > 1 {
		w.pop()
	}
	var e encoder
	e.int(int64(rules))
	e.int(w.l.base)
	e.bool(!w.c.racyTime(w.top.ctime))
	e.int(int64(w.top.mode))
	e.int(int64(w.top.uid))
	e.int(int64(w.top.gid))
	e.time(w.top.mtime)
	e.time(w.top.ctime)
	e.count(len(w.l.owners))
	for _, o := range w.l.owners {
		e.int(int64(o.mode))
		e.int(int64(o.uid))
		e.int(int64(o.gid))
	}
	return append(e.p, w.stack[0].buf...)
}

// readListing reads what finish made; nil if it does not apply.
func readListing(p []byte, rules uint64) *listing {
	d := decoder{p: p}
	if len(p) == 0 || uint64(d.int()) != rules {
		return nil
	}
	l := &listing{base: d.int()}
	l.top = oldDir{
		known: true, sure: d.bool(), mode: uint32(d.int()), uid: uint32(d.int()), gid: uint32(d.int()), mtime: d.time(), ctime: d.time(),
	}
	for n := d.count(); n > 0 && !d.bad; n-- {
		l.owners = append(l.owners, owner{uint32(d.int()), uint32(d.int()), uint32(d.int())})
	}
	if d.bad {
		return nil
	}
	l.top.kids = d.p
	return l
}

// keep returns the old bytes where the new ones are the same, so that one of them can go.
func keep(old, now []byte) []byte {
	if bytes.Equal(old, now) {
		return old
	}
	return now
}

func sharedPrefix(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

// scanRules is a number for what is left out of a scan: paths of other data sets.
func scanRules(below []string) uint64 {
	h := fnv.New64a()
	for _, p := range below {
		_, _ = h.Write([]byte(p))
		_, _ = h.Write([]byte{0})
	}
	return h.Sum64() >> 1
}

// localTimes reports whether the times of directories below r can be trusted: they are kept by this
// machine, for every change, and nothing stands between. Network file systems answer from a cache.
func localTimes(r *root) bool {
	var st unix.Statfs_t
	if err := unix.Fstatfs(r.fd, &st); err != nil {
		return false
	}
	switch int64(st.Type) {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.F2FS_SUPER_MAGIC, unix.TMPFS_MAGIC,
		unix.OVERLAYFS_SUPER_MAGIC, zfsMagic, bcachefsMagic:
		return true
	}
	return false
}

// Source: OpenZFS include/sys/fs/zfs.h; Linux fs/bcachefs.
const (
	zfsMagic      = 0x2fc12fc1
	bcachefsMagic = 0xca451a4e
)
