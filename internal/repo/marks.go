package repo

import (
	"sync/atomic"

	"github.com/holdfast-backup/holdfast/internal/repo/index"
)

// Marks is a set of blobs of the repository, one bit for each. It does not know blobs that are stored after
// NewMarks.
type Marks struct {
	r    *Repository
	x    *index.Index
	bits [2]bitset
}

// NewMarks returns an empty set. The index must be loaded, and not again while the set is in use.
func (r *Repository) NewMarks() *Marks {
	r.mu.RLock()
	defer r.mu.RUnlock()
	m := &Marks{r: r, x: r.idx}
	for t := range m.bits {
		m.bits[t] = newBitset(m.x.Len(BlobType(t)))
	}
	return m
}

// Adder adds blobs to a set and counts those that are new in it.
type Adder struct {
	m                    *Marks
	blobs, plain, stored atomic.Int64
}

// Adder returns an Adder whose counts are zero.
func (m *Marks) Adder() *Adder { return &Adder{m: m} }

// Mark adds a blob and reports whether it is new. Blobs that are in no index are never new. Several goroutines may
// call it.
func (a *Adder) Mark(t BlobType, d ID) bool {
	a.m.r.mu.RLock()
	no, ok := a.m.x.Find(t, d)
	if !ok || int(no/32) >= len(a.m.bits[t]) {
		a.m.r.mu.RUnlock()
		return false
	}
	_, e := a.m.x.At(t, no)
	a.m.r.mu.RUnlock()
	if !a.m.bits[t].set(no) {
		return false
	}
	a.blobs.Add(1)
	a.plain.Add(e.PlainSize())
	a.stored.Add(storedSize(e))
	return true
}

// Sum tells how many blobs were new, and their size in bytes: their content, and as stored.
func (a *Adder) Sum() (blobs, plain, stored int64) {
	return a.blobs.Load(), a.plain.Load(), a.stored.Load()
}
