package capture

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash"
	"io/fs"
	"sort"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

// group is a run of neighbouring entries of one tar, in order. It is the unit of work and of change
// detection: a group whose entries look the same as last time is not read, and its part of the tar
// is used again. Where a group ends depends on names and counts alone, so the same store always
// gives the same groups, and a change moves few borders.
type group struct {
	first   string
	entries []entry // empty once it is done
	// print covers what the file system says of the entries; zero never matches.
	print [32]byte
	// refs covers the places in the snapshot that hold the contents of its files.
	refs [32]byte
	ids  []id.ID // the group's bytes of the tar
	size int64
	// recs is what was learned from the entries, encoded: node records or blob records.
	recs []byte
	// needs are the data blobs that recs refer to.
	needs []id.ID
	// reused is set when all of the above comes from the cache.
	reused bool
}

func (g *group) encode(e *encoder) {
	e.str(g.first)
	e.id(g.print)
	e.id(g.refs)
	e.int(g.size)
	e.ids(g.ids)
	e.bytes(g.recs)
	e.ids(g.needs)
}

func (g *group) decode(d *decoder) {
	g.first = d.str()
	g.print = d.id()
	g.refs = d.id()
	g.size = d.int()
	g.ids = d.ids()
	g.recs = d.bytes()
	g.needs = d.ids()
}

// Sizes of groups in entries. Who changes them, or border, changes cacheMagic as well: groups that are passed over keep their borders.
//
// A header takes about 1.5 KiB, so a usual group is some 130 KiB of tar, one
// chunk or two. What changes on a day is spread over the store, and a group with a change is read as a
// whole: with 2.8 million entries and 1 % of the files changed, groups of four times this size take
// half as much of the processor again and store 40 % more; half the size gains little, but makes
// twice as many chunks.
const (
	groupMin  = 64
	groupSoft = 256
	groupMax  = 2048
)

// border reports whether a new group begins before e when the present one has n entries.
func border(e *entry, n int) bool {
	switch {
	case n < groupMin:
		return false
	case n >= groupMax:
		return true
	case n >= groupSoft:
		return nameHash(e.path)&0x7f == 0
	default:
		return e.isDir() && nameHash(e.path)&7 == 0
	}
}

// nameHash is FNV-1a: borders must not move between versions of Go.
func nameHash(s string) uint32 {
	h := uint32(2166136261)
	for i := range len(s) {
		h = (h ^ uint32(s[i])) * 16777619
	}
	return h ^ h>>15
}

// fingerprint covers all that a change of the entries would alter. ctime alone would do on most file
// systems; the rest is for those on which it can be set back.
func fingerprint(entries []entry) (sum [32]byte) {
	h := sha256.New()
	b := make([]byte, 0, 4096)
	for i := range entries {
		e := &entries[i]
		b = binary.AppendUvarint(b, uint64(len(e.path)))
		b = append(b, e.path...)
		b = binary.LittleEndian.AppendUint32(b, e.mode)
		b = binary.LittleEndian.AppendUint32(b, e.uid)
		b = binary.LittleEndian.AppendUint32(b, e.gid)
		b = binary.LittleEndian.AppendUint64(b, e.rdev)
		if !e.isDir() { // the size of a directory says nothing, and differs between file systems
			b = binary.LittleEndian.AppendUint64(b, uint64(e.size))
		}
		b = binary.LittleEndian.AppendUint64(b, uint64(e.mtime.sec))
		b = binary.LittleEndian.AppendUint32(b, uint32(e.mtime.nsec))
		b = binary.LittleEndian.AppendUint64(b, uint64(e.ctime.sec))
		b = binary.LittleEndian.AppendUint32(b, uint32(e.ctime.nsec))
		b = binary.AppendUvarint(b, uint64(len(e.hardlink)))
		b = append(b, e.hardlink...)
		if len(b) > 3500 {
			h.Write(b)
			b = b[:0]
		}
	}
	h.Write(b)
	h.Sum(sum[:0])
	return sum
}

// inlineLimit: larger files that no blob rule explains are stored as objects of their own, so that
// a tar stays small and a change of one does not rewrite a group.
const inlineLimit = 1 << 20

// handler is what a layout adds to the capture of a group. Its methods are called for one group at a
// time, by one goroutine; several groups run at once.
type handler interface {
	// ref returns the path in the snapshot that holds the content of the regular file e, or "" if
	// the content goes into the tar.
	ref(e *entry) string
	// save stores the content of a file that has a ref. A *readError leaves the file out.
	save(ctx context.Context, e *entry, x []xattr, rec *encoder) (holes []pax.Extent, err error)
	// see is told of each other entry: link is the target of a symbolic link, data the content of a
	// regular file that goes into the tar.
	see(e *entry, link string, data []byte, x []xattr, rec *encoder)
}

// grouper cuts a stream of entries into groups and works on them in parallel.
type grouper struct {
	c       *capturer
	r       *root
	cached  map[string]*group
	links   hardlinks
	handler func() (handler, error)
	refsOf  func(entries []entry) ([32]byte, error) // nil: groups without refs
	over    *passage                                // groups that need not be looked at; nil: none

	g      *errgroup.Group
	ctx    context.Context
	cur    *group
	mu     sync.Mutex
	groups []*group
	fresh  bool // one group at least was not in the cache
}

func (c *capturer) newGrouper(ctx context.Context, r *root, cached map[string]*group, h func() (handler, error)) *grouper {
	g, gctx := errgroup.WithContext(ctx)
	return &grouper{c: c, r: r, cached: cached, handler: h, g: g, ctx: gctx}
}

// add appends e to the stream.
func (gr *grouper) add(e *entry) error {
	if gr.passing() && gr.over.next(e.path, gr.take) {
		gr.c.entries.Add(1)
		return nil
	}
	if gr.cur != nil && border(e, len(gr.cur.entries)) {
		gr.cut()
	}
	if gr.cur == nil && gr.over != nil && gr.over.enter(e.path) {
		gr.take(gr.over.groups[gr.over.at])
		gr.c.entries.Add(1)
		return nil
	}
	if gr.cur == nil {
		gr.cur = &group{first: e.path, entries: takeEntries()}
	}
	e.hardlink = gr.links.see(e)
	gr.cur.entries = append(gr.cur.entries, *e)
	if gr.ctx.Err() != nil {
		return context.Cause(gr.ctx)
	}
	return nil
}

// cut ends the present group and starts the work on it. It waits while all workers are busy, which
// bounds the entries in memory.
func (gr *grouper) cut() {
	g := gr.cur
	gr.cur = nil
	if g == nil {
		return
	}
	gr.mu.Lock()
	gr.groups = append(gr.groups, g)
	gr.mu.Unlock()
	gr.c.slots <- struct{}{}
	gr.g.Go(func() error {
		defer func() { <-gr.c.slots }()
		return gr.work(g)
	})
}

// passing reports whether the stream stands in a group that is passed over. It never ends there unless what was looked at has changed
// since: the last group is always read.
func (gr *grouper) passing() bool { return gr.over != nil && gr.over.at >= 0 }

// take uses a group of the last time again.
func (gr *grouper) take(old *group) {
	g := old.again()
	gr.mu.Lock()
	defer gr.mu.Unlock()
	gr.groups = append(gr.groups, g)
}

// wait ends the stream and returns the groups in order.
func (gr *grouper) wait() ([]*group, error) {
	gr.cut()
	if err := gr.g.Wait(); err != nil {
		return nil, err
	}
	sort.Slice(gr.groups, func(i, j int) bool { return comparePaths(gr.groups[i].first, gr.groups[j].first) < 0 })
	return gr.groups, nil
}

func (gr *grouper) work(g *group) error {
	if gr.ctx.Err() != nil {
		return context.Cause(gr.ctx)
	}
	defer func() {
		giveEntries(g.entries)
		g.entries = nil
	}()
	gr.c.entries.Add(int64(len(g.entries)))
	g.print = fingerprint(g.entries)
	old := gr.cached[g.first]
	same := old != nil && old.print == g.print && !gr.c.opts.FullScan && gr.c.hasAll(old.ids) && gr.c.hasAll(old.needs)
	if gr.refsOf != nil {
		refs, err := gr.refsOf(g.entries)
		if err != nil {
			return err
		}
		g.refs = refs
		same = same && refs == old.refs
	}
	if same {
		g.ids, g.size, g.recs, g.needs, g.reused = old.ids, old.size, old.recs, old.needs, true
		return nil
	}
	gr.mu.Lock()
	gr.fresh = true
	gr.mu.Unlock()
	if gr.c.racy(g.entries) {
		g.print = [32]byte{}
	}
	h, err := gr.handler()
	if err != nil {
		return err
	}
	w := tarWorker{c: gr.c, r: gr.r, h: h, d: newDetails(gr.r), st: stream{s: gr.c.saver, buf: gr.c.saver.heads.get()[:0]}}
	defer func() {
		w.d.close()
		gr.c.saver.heads.put(w.st.buf)
	}()
	for i := range g.entries {
		if err := w.entry(gr.ctx, &g.entries[i]); err != nil {
			return err
		}
	}
	if err := w.st.drain(gr.ctx, true); err != nil {
		return err
	}
	if w.lossy {
		g.print = [32]byte{} // what could not be read this time may be readable the next
	}
	g.ids, g.size, g.recs, g.needs = w.st.ids, w.st.size, w.rec.p, w.rec.blobs
	return nil
}

// entryPool holds the entries of groups that are done: a few groups are under way at a time.
var entryPool sync.Pool

func takeEntries() []entry {
	if p, ok := entryPool.Get().(*[]entry); ok {
		return *p
	}
	return make([]entry, 0, groupSoft)
}

func giveEntries(e []entry) {
	if cap(e) > 0 {
		clear(e) // the paths
		e = e[:0]
		entryPool.Put(&e)
	}
}

// tarWorker turns entries into tar bytes.
type tarWorker struct {
	c     *capturer
	r     *root
	h     handler
	d     *details
	st    stream
	tw    tarWriter
	rec   encoder
	lossy bool
}

func (w *tarWorker) entry(ctx context.Context, e *entry) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	te := tarEntry{entry: e}
	lost := func(err error) error {
		w.lossy = true
		w.c.unreadable(w.r.abs(e.path), err)
		return nil
	}
	var err error
	if !e.bare {
		if te.xattrs, err = w.d.xattrs(e.path); err != nil {
			return lost(err)
		}
	}
	var data []byte
	switch {
	case e.isSymlink():
		if te.link = e.link; te.link == "" {
			if te.link, err = w.d.readlink(e.path); err != nil {
				return lost(err)
			}
		}
	case e.isRegular():
		if te.content = w.h.ref(e); te.content != "" {
			te.holes, err = w.h.save(ctx, e, te.xattrs, &w.rec)
			var re *readError
			if errors.As(err, &re) {
				return lost(re.err)
			}
			if err != nil {
				return err
			}
			break
		}
		if e.size > 0 {
			if data, err = w.d.readFile(e.path, e.size); err != nil {
				return lost(err)
			}
			if int64(len(data)) != e.size {
				return lost(&fs.PathError{Op: "read", Path: w.r.abs(e.path), Err: errShrank})
			}
			if e.sparse() {
				if te.holes, err = w.holes(e); err != nil {
					return lost(err)
				}
			}
		}
		te.inline = int64(len(data))
		w.c.bytesRead.Add(te.inline)
	}
	if te.content == "" {
		w.h.see(e, te.link, data, te.xattrs, &w.rec)
	}
	if e.hardlink != "" { // the tar has the content at the first name; the proof and the users' tree need it here too
		te.content, te.holes, te.inline, data = "", nil, 0, nil
	}
	w.tw.buf = w.st.buf
	w.tw.add(&te)
	w.tw.buf = append(w.tw.buf, data...)
	w.tw.pad(te.inline)
	w.st.buf = w.tw.buf
	if len(w.st.buf) >= 2*tarChunks.Max {
		return w.st.drain(ctx, false)
	}
	return nil
}

func (w *tarWorker) holes(e *entry) ([]pax.Extent, error) {
	f, err := w.r.openFile(e.path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return pax.FindHoles(f, e.size)
}

// hashRefs covers the refs of entries.
func hashRefs(entries []entry, ref func(e *entry) string) (sum [32]byte) {
	h := newRefHash()
	for i := range entries {
		if e := &entries[i]; e.isRegular() && e.hardlink == "" {
			h.add(ref(e))
		}
	}
	return h.sum()
}

// refHash covers refs in order.
type refHash struct {
	h hash.Hash
	b []byte
}

func newRefHash() *refHash { return &refHash{h: sha256.New()} }

func (r *refHash) add(ref string) {
	r.b = binary.AppendUvarint(r.b[:0], uint64(len(ref)))
	r.b = append(r.b, ref...)
	r.h.Write(r.b)
}

func (r *refHash) sum() (sum [32]byte) {
	r.h.Sum(sum[:0])
	return sum
}

// firstOf returns the error of the workers, or else that of the walk: once a worker fails, the walk only
// reports that it was stopped.
func firstOf(werr, err error) error {
	if werr != nil {
		return werr
	}
	return err
}

// joinGroups returns what the tar of the groups consists of.
func joinGroups(groups []*group) (ids []id.ID, size int64) {
	for _, g := range groups {
		ids = append(ids, g.ids...)
		size += g.size
	}
	return ids, size
}
