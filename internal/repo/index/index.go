// Package index keeps in memory where every blob lies, and reads and writes index files.
//
// Arithmetic: an entry is 48 bytes (ID 32, pack number, offset, length and plain length 4 each),
// kept in blocks that are never copied. A slot of the hash table is 4 bytes, and the table is
// 1/3 to 2/3 full: 6 to 12 bytes a blob. That is 54 to 60 bytes a blob, plus about 60 bytes a pack
// (its ID and the map that finds its number). The entries lie outside of Go's heap, and beyond a limit in a file that
// is mapped.
package index

import (
	"encoding/binary"
	"iter"
	"math/rand/v2"
	"runtime"

	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/repo/pack"
)

// Location tells where a blob lies. The fields are those of pack.Entry; Pack is a pack number.
type Location struct {
	Pack   uint32
	Offset uint32
	Length uint32
	Plain  uint32
}

type entry struct {
	id  id.ID
	loc Location
}

const (
	blockBits = 12
	blockSize = 1 << blockBits // entries: 192 KiB a block
)

// table is an open-addressing hash table with linear probing. Entries are never removed.
type table struct {
	blocks []*[blockSize]entry
	n      uint32
	slots  []uint32 // number of an entry plus one; 0: free
}

// Index is the set of all known blobs. It is not safe for concurrent use, but readers may share it.
type Index struct {
	tables [2]table // by pack.BlobType
	packs  []id.ID
	packNo map[id.ID]uint32
	seed   uint64 // so that nobody can choose contents that collide in the table
	arena  *arena
}

// Options of New. The zero value keeps everything in memory.
type Options struct {
	// Memory is how many bytes of entries stay in memory; 0: all. The others go into a file without a name in Dir, where the
	// kernel keeps as much of them in memory as it likes. If that file cannot be written, they stay in memory.
	Memory int64
	// Dir is the directory of that file, which is made if it is missing; "": the system's for temporary files.
	Dir string
}

// New returns an empty Index.
func New(o Options) *Index {
	x := &Index{packNo: map[id.ID]uint32{}, seed: rand.Uint64(), arena: &arena{dir: o.Dir, most: o.Memory}}
	release(x)
	return x
}

func (x *Index) hash(d *id.ID) uint64 {
	h := (binary.LittleEndian.Uint64(d[:]) ^ x.seed) * 0x9E3779B97F4A7C15
	return h ^ h>>32
}

func (t *table) at(n uint32) *entry { return &t.blocks[n>>blockBits][n&(blockSize-1)] }

func (t *table) grow(x *Index, want int) {
	size := max(64, len(t.slots))
	for size*2 < want*3 {
		size *= 2
	}
	t.slots = make([]uint32, size)
	mask := uint64(size - 1)
	for n := range t.n {
		i := x.hash(&t.at(n).id) & mask
		for t.slots[i] != 0 {
			i = (i + 1) & mask
		}
		t.slots[i] = n + 1
	}
}

// Grow makes room for n more blobs of type t in one step.
func (x *Index) Grow(t pack.BlobType, n int) {
	if tab := &x.tables[t]; (int(tab.n)+n)*3 > len(tab.slots)*2 {
		tab.grow(x, int(tab.n)+n)
	}
}

// Pack returns the number of a pack, and whether it is new.
func (x *Index) Pack(p id.ID) (no uint32, isNew bool) {
	no, ok := x.packNo[p]
	if !ok {
		no = uint32(len(x.packs))
		x.packs = append(x.packs, p)
		x.packNo[p] = no
	}
	return no, !ok
}

// HasPack reports whether there are entries of a pack.
func (x *Index) HasPack(p id.ID) bool {
	_, ok := x.packNo[p]
	return ok
}

// PackID is the reverse of Pack.
func (x *Index) PackID(no uint32) id.ID { return x.packs[no] }

// Packs returns how many packs there are; their numbers are 0 to Packs()-1.
func (x *Index) Packs() int { return len(x.packs) }

// Len returns how many entries of type t there are, counting copies of a blob.
func (x *Index) Len(t pack.BlobType) int { return int(x.tables[t].n) }

// Add adds e as a part of pack number no. An entry that is there already is not added again, and
// Add reports false.
func (x *Index) Add(no uint32, e pack.Entry) bool {
	defer runtime.KeepAlive(x)
	t := &x.tables[e.Type]
	if (int(t.n)+1)*3 > len(t.slots)*2 {
		t.grow(x, int(t.n)+int(t.n)/2+1) // makes it twice as large
	}
	loc := Location{Pack: no, Offset: e.Offset, Length: e.Length, Plain: e.Plain}
	mask := uint64(len(t.slots) - 1)
	i := x.hash(&e.ID) & mask
	for ; t.slots[i] != 0; i = (i + 1) & mask {
		if old := t.at(t.slots[i] - 1); old.id == e.ID && old.loc == loc {
			return false
		}
	}
	if int(t.n>>blockBits) == len(t.blocks) {
		t.blocks = append(t.blocks, x.arena.block())
	}
	*t.at(t.n) = entry{e.ID, loc}
	t.n++
	t.slots[i] = t.n
	return true
}

// Lookup returns the places where a blob lies, the one added first in front.
func (x *Index) Lookup(bt pack.BlobType, d id.ID) iter.Seq[Location] {
	return func(yield func(Location) bool) {
		defer runtime.KeepAlive(x)
		t := &x.tables[bt]
		if len(t.slots) == 0 {
			return
		}
		mask := uint64(len(t.slots) - 1)
		for i := x.hash(&d) & mask; t.slots[i] != 0; i = (i + 1) & mask {
			if e := t.at(t.slots[i] - 1); e.id == d && !yield(e.loc) {
				return
			}
		}
	}
}

// First returns the first place of a blob.
func (x *Index) First(bt pack.BlobType, d id.ID) (Location, bool) {
	defer runtime.KeepAlive(x) // the entries go with it
	t := &x.tables[bt]
	if len(t.slots) == 0 {
		return Location{}, false
	}
	mask := uint64(len(t.slots) - 1)
	for i := x.hash(&d) & mask; t.slots[i] != 0; i = (i + 1) & mask {
		if e := t.at(t.slots[i] - 1); e.id == d {
			return e.loc, true
		}
	}
	return Location{}, false
}

// Find returns the number of a blob's first entry. Entries of one type are numbered from 0 to Len-1 in the
// order in which they were added, and keep their numbers.
func (x *Index) Find(bt pack.BlobType, d id.ID) (no uint32, ok bool) {
	for no := range x.Numbers(bt, d) {
		return no, true
	}
	return 0, false
}

// Numbers yields the numbers of all entries of a blob, in ascending order.
func (x *Index) Numbers(bt pack.BlobType, d id.ID) iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		defer runtime.KeepAlive(x)
		t := &x.tables[bt]
		if len(t.slots) == 0 {
			return
		}
		mask := uint64(len(t.slots) - 1)
		for i := x.hash(&d) & mask; t.slots[i] != 0; i = (i + 1) & mask {
			if n := t.slots[i] - 1; t.at(n).id == d && !yield(n) {
				return
			}
		}
	}
}

// At returns an entry by its number, and the number of its pack.
func (x *Index) At(bt pack.BlobType, no uint32) (packNo uint32, e pack.Entry) {
	n := *x.tables[bt].at(no)
	runtime.KeepAlive(x)
	return n.loc.Pack, n.loc.Entry(bt, n.id)
}

// All yields every entry; its Pack number comes first.
func (x *Index) All() iter.Seq2[uint32, pack.Entry] {
	return func(yield func(uint32, pack.Entry) bool) {
		defer runtime.KeepAlive(x)
		for bt := range x.tables {
			t := &x.tables[bt]
			for n := range t.n {
				e := t.at(n)
				if !yield(e.loc.Pack, e.loc.Entry(pack.BlobType(bt), e.id)) {
					return
				}
			}
		}
	}
}

// Entry joins l with what it is the location of.
func (l Location) Entry(t pack.BlobType, d id.ID) pack.Entry {
	return pack.Entry{ID: d, Type: t, Offset: l.Offset, Length: l.Length, Plain: l.Plain}
}
