package capture

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"

	"github.com/holdfast-backup/holdfast/internal/fschange"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

// Cache remembers what the last backup of one instance looked like. It saves work and nothing else:
// what it says is used only where the file system shows the same times and sizes, and a cache that
// is gone, old or damaged makes a backup slower, not wrong.
type Cache struct {
	// Snapshot is the backup that wrote it; null after a warm copy. What it names is used again only
	// while the repository has it, since prune may have taken what only a forgotten snapshot needed.
	Snapshot id.ID
	plain    map[string]*cachedPlain // by data set: what its files hold
	// marks are the moments of which spaces tell, by store, where the file system lists changes since.
	marks map[string]fschange.Mark

	mu     sync.Mutex
	spaces map[string]slot // by store and space id; "" as space id: the rest of the store
	out    *shelf          // takes what comes
}

// cachedSpace is one space, or the part of a store that belongs to no space.
type cachedSpace struct {
	folder string
	// print covers all groups and what else the result depends on.
	print  [32]byte
	groups map[string]*group // by the path of the first entry
	result []byte            // encoded spaceResult; nil if it must not be used again
	// What the scans of the nodes and of the blobs saw: listings; nil if directories must be listed.
	nodesSeen, blobsSeen []byte
	// at is where it lies, if it lies there as it is; was is where it came from.
	at, was *slot
	// live: made or checked by this process, under the lock that still holds. It is not saved.
	live   bool
	counts counts
	rules  uint64 // what was left out
	// looked is when the space was looked at in full for the last time, seen when it was last looked at.
	looked, seen timespec
	// spare counts the objects of a bucket that nothing refers to, as of the last listing.
	spare spareCount
}

// counts are what the manifest says of the entries of a space: of its metadata and of its blobs.
type counts struct{ metaEntries, metaBytes, blobEntries, blobBytes int64 }

// cachedPlain holds the contents of the files of one data set by path.
type cachedPlain struct {
	files map[string]*cachedFile
}

type cachedFile struct {
	size         int64
	mtime, ctime timespec
	holes        []pax.Extent
	ids          []id.ID
}

// Knows reports whether c is what the backup d remembered. A nil cache knows nothing.
func (c *Cache) Knows(d id.ID) bool { return c != nil && c.Snapshot == d }

func newCache() *Cache {
	return &Cache{spaces: map[string]slot{}, plain: map[string]*cachedPlain{}, marks: map[string]fschange.Mark{}, out: &shelf{}}
}

// carryPlain takes over what old knows of a data set that was not read.
func (c *Cache) carryPlain(old *Cache, name string) {
	if p := old.plain[name]; p != nil {
		c.plain[name] = p
	}
}

// carryStore takes over what old knows of a store that was not read.
func (c *Cache) carryStore(old *Cache, name string) {
	for key, s := range old.spaces {
		if strings.HasPrefix(key, name+"/") {
			c.spaces[key] = s
		}
	}
	if m := old.marks[name]; m != "" {
		c.marks[name] = m
	}
}

// DropStore forgets a store.
func (c *Cache) DropStore(name string) {
	for key := range c.spaces {
		if strings.HasPrefix(key, name+"/") {
			delete(c.spaces, key)
		}
	}
	delete(c.marks, name)
}

// cacheMagic names the format; another number is another format, and then the cache is not used.
const cacheMagic = "holdfast cache 9\n"

// LoadCache opens the cache at path. Anything wrong with it gives an empty cache and an error worth
// a line at the most. Spaces are read when they are worked on; what is wrong with one of them makes that one
// unknown. Close must be called when the last cache that came of it is no longer used.
func LoadCache(path string) (*Cache, error) {
	c, err := loadIndex(path)
	if err != nil {
		c = newCache()
		_, c.out = openShelf(path, "", 0)
		if errors.Is(err, os.ErrNotExist) {
			err = nil
		}
	}
	return c, err
}

// loadIndex reads the file at path: all but the spaces.
func loadIndex(path string) (*Cache, error) {
	p, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read cache: %w", err)
	}
	if len(p) < len(cacheMagic)+id.Size || !bytes.HasPrefix(p, []byte(cacheMagic)) {
		return nil, fmt.Errorf("cache %s is of another format: it is made anew", path)
	}
	damaged := fmt.Errorf("cache %s is damaged: it is made anew", path)
	sum := id.ID(p[len(p)-id.Size:])
	p = p[:len(p)-id.Size]
	if id.Hash(p) != sum {
		return nil, damaged
	}
	c := newCache()
	d := decoder{p: p[len(cacheMagic):]}
	c.Snapshot = d.id()
	name, size := d.str(), d.int()
	for n := d.count(); n > 0 && !d.bad; n-- {
		c.spaces[d.str()] = slot{off: d.int(), len: d.int(), sum: d.id()}
	}
	for n := d.count(); n > 0 && !d.bad; n-- {
		key := d.str()
		pl := &cachedPlain{files: map[string]*cachedFile{}}
		for m := d.count(); m > 0 && !d.bad; m-- {
			path := d.str()
			f := &cachedFile{size: d.int(), mtime: d.time(), ctime: d.time()}
			for k := d.count(); k > 0 && !d.bad; k-- {
				f.holes = append(f.holes, pax.Extent{Off: d.int(), Len: d.int()})
			}
			f.ids = d.ids()
			pl.files[path] = f
		}
		c.plain[key] = pl
	}
	for n := d.count(); n > 0 && !d.bad; n-- {
		name := d.str()
		c.marks[name] = fschange.Mark(d.str())
	}
	if d.bad {
		return nil, damaged
	}
	in, out := openShelf(path, name, size)
	for key, t := range c.spaces {
		t.on = in
		c.spaces[key] = t
	}
	c.out = out
	return c, nil
}

// InMemory keeps what comes from now on in memory and leaves the files of the cache as they are.
func (c *Cache) InMemory() { c.out = &shelf{} }

// Close gives the files of the cache up. Closing more than once does no harm.
func (c *Cache) Close() {
	if c == nil {
		return
	}
	c.out.close()
	for _, t := range c.spaces {
		t.on.close()
	}
}

// space returns what c knows of a space; nil if that is nothing, or damaged.
func (c *Cache) space(key string) *cachedSpace {
	t, ok := c.spaces[key]
	if !ok {
		return nil
	}
	p, ok := t.get()
	if !ok {
		return nil
	}
	s := decodeSpace(p)
	if s != nil {
		s.live, s.at = t.live, &t
	}
	return s
}

// sizeOf returns how many bytes of the cache are about the space, at least 1.
func (c *Cache) sizeOf(key string) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return max(c.spaces[key].len, 1)
}

// putSpace keeps s. What cannot be written is kept in memory, and so is what comes after it.
func (c *Cache) putSpace(key string, s *cachedSpace) {
	at, err := c.place(s)
	if err != nil {
		c.mu.Lock()
		c.out = &shelf{}
		c.mu.Unlock()
		at, _ = c.place(s) // memory never fails
	}
	at.live = s.live
	c.mu.Lock()
	c.spaces[key] = at
	c.mu.Unlock()
}

func (c *Cache) place(s *cachedSpace) (slot, error) {
	if s.at != nil {
		return *s.at, nil
	}
	p := encodeSpace(s)
	sum := id.Hash(p)
	if s.was != nil && sum == s.was.sum {
		return *s.was, nil
	}
	c.mu.Lock()
	out := c.out
	c.mu.Unlock()
	return out.put(p, sum)
}

func encodeSpace(s *cachedSpace) []byte {
	var e encoder
	if s.was != nil { // it will be about as long as it was
		e.p = make([]byte, 0, s.was.len+s.was.len/16)
	}
	e.str(s.folder)
	e.id(s.print)
	e.count(len(s.groups))
	firsts := make([]string, 0, len(s.groups))
	for first := range s.groups {
		firsts = append(firsts, first)
	}
	sort.Strings(firsts)
	for _, first := range firsts {
		s.groups[first].encode(&e)
		e.blobs = e.blobs[:0]
	}
	for _, b := range [][]byte{s.result, s.nodesSeen, s.blobsSeen} {
		e.bytes(b)
	}
	e.bool(s.spare.listed)
	for _, v := range []int64{
		s.spare.objects, s.spare.bytes, s.spare.captured,
		s.counts.metaEntries, s.counts.metaBytes, s.counts.blobEntries, s.counts.blobBytes,
	} {
		e.int(v)
	}
	e.int(int64(s.rules))
	e.time(s.looked)
	e.time(s.seen)
	return e.p
}

// decodeSpace returns nil if p cannot be read.
func decodeSpace(p []byte) *cachedSpace {
	d := decoder{p: p}
	s := &cachedSpace{folder: d.str(), print: d.id(), groups: map[string]*group{}}
	for m := d.count(); m > 0 && !d.bad; m-- {
		g := &group{}
		g.decode(&d)
		s.groups[g.first] = g
	}
	s.result = d.bytes()
	s.nodesSeen, s.blobsSeen = d.bytes(), d.bytes()
	s.spare = spareCount{listed: d.bool(), objects: d.int(), bytes: d.int(), captured: d.int()}
	s.counts = counts{d.int(), d.int(), d.int(), d.int()}
	s.rules = uint64(d.int())
	s.looked, s.seen = d.time(), d.time()
	if d.bad {
		return nil
	}
	return s
}

// Save writes the cache to path and to files beside it that begin with that name, for the owner alone: it
// tells names. A kill leaves the cache as it was.
func (c *Cache) Save(path string) error {
	if err := c.save(path); err != nil {
		return fmt.Errorf("write cache: %w", err)
	}
	return nil
}

func (c *Cache) save(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	if err := c.tidy(path); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".tmp-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	err = c.writeIndex(f)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return err
	}
	sweepShelves(path, c.index().name())
	return nil
}

// index is the shelf that all spaces lie on after tidy.
func (c *Cache) index() *shelf {
	for _, t := range c.spaces {
		return t.on
	}
	return c.out
}

// tidy sees to it that all spaces lie on one shelf that belongs to path and of which not much is waste.
func (c *Cache) tidy(path string) error {
	var live int64
	on := map[*shelf]bool{}
	for _, t := range c.spaces {
		live += t.len
		on[t.on] = true
	}
	if len(on) <= 1 {
		if s := c.index(); s.base == path+shelfSuffix && s.used() <= 2*live+shelfWaste {
			return nil
		}
	}
	out := c.out
	if out.base != path+shelfSuffix || out.used() > 2*live+shelfWaste {
		out = &shelf{base: path + shelfSuffix}
	}
	for key, t := range c.spaces {
		if t.on == out {
			continue
		}
		p, ok := t.get()
		if !ok {
			delete(c.spaces, key)
			continue
		}
		at, err := out.put(p, t.sum)
		if err != nil {
			return err
		}
		at.live = t.live
		c.spaces[key] = at
	}
	c.out = out
	return nil
}

// shelfWaste is how much of a shelf may be waste in any case, in bytes.
const shelfWaste = 4 << 20

// writeIndex writes all but the spaces.
func (c *Cache) writeIndex(f io.Writer) error {
	h := sha256.New()
	e := encoder{p: []byte(cacheMagic)}
	w := bufio.NewWriterSize(io.MultiWriter(f, h), 1<<16)
	// What cannot be written to f shows at the end: bufio keeps the error.
	put := func() {
		_, _ = w.Write(e.p)
		e.p, e.blobs = e.p[:0], e.blobs[:0]
	}
	e.id(c.Snapshot)
	on := c.index()
	e.str(on.name())
	e.int(on.used())
	e.count(len(c.spaces))
	for key, t := range c.spaces {
		e.str(key)
		e.int(t.off)
		e.int(t.len)
		e.id(t.sum)
		put()
	}
	e.count(len(c.plain))
	for key, pl := range c.plain {
		e.str(key)
		e.count(len(pl.files))
		for path, f := range pl.files {
			e.str(path)
			e.int(f.size)
			e.time(f.mtime)
			e.time(f.ctime)
			e.count(len(f.holes))
			for _, h := range f.holes {
				e.int(h.Off)
				e.int(h.Len)
			}
			e.ids(f.ids)
			put()
		}
	}
	e.count(len(c.marks))
	for name, m := range c.marks {
		e.str(name)
		e.str(string(m))
	}
	put()
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := f.Write(h.Sum(nil))
	return err
}

// encoder and decoder are the cache's own little format: variable-length integers and counted bytes.
type encoder struct {
	p []byte
	// blobs are all ids that were written: what the bytes are worth nothing without.
	blobs []id.ID
}

func (e *encoder) count(n int)    { e.p = binary.AppendUvarint(e.p, uint64(n)) }
func (e *encoder) int(v int64)    { e.p = binary.AppendVarint(e.p, v) }
func (e *encoder) id(d [32]byte)  { e.p = append(e.p, d[:]...) }
func (e *encoder) str(s string)   { e.count(len(s)); e.p = append(e.p, s...) }
func (e *encoder) bytes(b []byte) { e.count(len(b)); e.p = append(e.p, b...) }
func (e *encoder) byte(b byte)    { e.p = append(e.p, b) }
func (e *encoder) time(t timespec) {
	e.int(t.sec)
	e.int(t.nsec)
}
func (e *encoder) bool(b bool) {
	if b {
		e.byte(1)
	} else {
		e.byte(0)
	}
}
func (e *encoder) ids(ids []id.ID) {
	e.blobs = append(e.blobs, ids...)
	e.count(len(ids))
	for i := range ids {
		e.p = append(e.p, ids[i][:]...)
	}
}

type decoder struct {
	p   []byte
	bad bool
}

func (d *decoder) take(n int) []byte {
	if n < 0 || n > len(d.p) {
		d.bad = true
		d.p = nil
		return nil
	}
	b := d.p[:n]
	d.p = d.p[n:]
	return b
}

// count reads a length; it can never be larger than what is left, so a damaged one allocates nothing.
func (d *decoder) count() int {
	v, n := binary.Uvarint(d.p)
	if n <= 0 || v > uint64(len(d.p)) {
		d.bad = true
		return 0
	}
	d.p = d.p[n:]
	return int(v)
}

func (d *decoder) int() int64 {
	v, n := binary.Varint(d.p)
	if n <= 0 {
		d.bad = true
		return 0
	}
	d.p = d.p[n:]
	return v
}

func (d *decoder) id() (v id.ID) {
	copy(v[:], d.take(id.Size))
	return v
}
func (d *decoder) str() string { return string(d.take(d.count())) }

// bytes returns a part of what is decoded, not a copy.
func (d *decoder) bytes() []byte {
	b := d.take(d.count())
	return b[:len(b):len(b)]
}

func (d *decoder) time() timespec { return timespec{d.int(), d.int()} }
func (d *decoder) byte() byte {
	if b := d.take(1); b != nil {
		return b[0]
	}
	return 0
}
func (d *decoder) bool() bool { return d.byte() != 0 }
func (d *decoder) ids() []id.ID {
	n := d.count()
	b := d.take(n * id.Size)
	if d.bad || n == 0 {
		return nil
	}
	ids := make([]id.ID, n)
	for i := range ids {
		copy(ids[i][:], b[i*id.Size:])
	}
	return ids
}
