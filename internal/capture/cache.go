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
	"strings"

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
	spaces   map[string]*cachedSpace // by store and space id; "" as space id: the rest of the store
	plain    map[string]*cachedPlain // by data set: what its files hold
	// marks are the moments of which spaces tell, by store, where the file system lists changes since.
	marks map[string]fschange.Mark
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
	// live: made or checked by this process, under the lock that still holds. It is not saved.
	live   bool
	counts counts
	rules  uint64 // what was left out
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
	return &Cache{spaces: map[string]*cachedSpace{}, plain: map[string]*cachedPlain{}, marks: map[string]fschange.Mark{}}
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
const cacheMagic = "holdfast cache 7\n"

// LoadCache reads the cache at path. Anything wrong with it gives an empty cache and an error worth
// a line at the most.
func LoadCache(path string) (*Cache, error) {
	c := newCache()
	p, err := os.ReadFile(path)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return c, nil
		}
		return c, fmt.Errorf("read cache: %w", err)
	}
	if len(p) < len(cacheMagic)+id.Size || !bytes.HasPrefix(p, []byte(cacheMagic)) {
		return c, fmt.Errorf("cache %s is of another format: it is made anew", path)
	}
	sum := id.ID(p[len(p)-id.Size:])
	p = p[:len(p)-id.Size]
	if id.Hash(p) != sum {
		return c, fmt.Errorf("cache %s is damaged: it is made anew", path)
	}
	d := decoder{p: p[len(cacheMagic):]}
	c.Snapshot = d.id()
	for n := d.count(); n > 0 && !d.bad; n-- {
		key := d.str()
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
		c.spaces[key] = s
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
		return newCache(), fmt.Errorf("cache %s is damaged: it is made anew", path)
	}
	return c, nil
}

// Save writes the cache to path, atomically and for the owner alone: it tells names.
func (c *Cache) Save(path string) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("write cache: %w", err)
	}
	f, err := os.CreateTemp(dir, filepath.Base(path)+".tmp-*")
	if err != nil {
		return fmt.Errorf("write cache: %w", err)
	}
	defer os.Remove(f.Name())
	err = c.write(f)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write cache: %w", err)
	}
	return nil
}

// write writes the cache piece by piece: as a whole it would be in memory twice.
func (c *Cache) write(f io.Writer) error {
	h := sha256.New()
	e := encoder{p: []byte(cacheMagic)}
	w := bufio.NewWriterSize(io.MultiWriter(f, h), 1<<20)
	// What cannot be written to f shows at the end: bufio keeps the error.
	put := func() {
		_, _ = w.Write(e.p)
		e.p, e.blobs = e.p[:0], e.blobs[:0]
	}
	e.id(c.Snapshot)
	e.count(len(c.spaces))
	for key, s := range c.spaces {
		e.str(key)
		e.str(s.folder)
		e.id(s.print)
		e.count(len(s.groups))
		for _, g := range s.groups {
			g.encode(&e)
			put()
		}
		for _, b := range [][]byte{s.result, s.nodesSeen, s.blobsSeen} {
			e.count(len(b))
			put()
			_, _ = w.Write(b)
		}
		e.bool(s.spare.listed)
		e.int(s.spare.objects)
		e.int(s.spare.bytes)
		e.int(s.spare.captured)
		for _, n := range []int64{s.counts.metaEntries, s.counts.metaBytes, s.counts.blobEntries, s.counts.blobBytes} {
			e.int(n)
		}
		e.int(int64(s.rules))
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
