package zstdfast

import (
	"encoding/binary"
	"math/bits"
	"unsafe"
)

const (
	look         = 64 // positions that are looked at together
	minMatch     = 6  // bytes of a match that a hash finds
	maxTable     = 16 // the logarithm of how many hashes are remembered
	maxSequences = blockBytes/minMatch + 1
	// margin is how far from the end of a block the first of the positions must be, in bytes, so that what is read
	// and copied beyond a position is still of the block.
	margin = look + 16
	prime  = 0x9E3779B185EB // spreads six bytes
)

// match is what a sequence says: so many literals, then so many bytes, less 3, that were before.
type match struct {
	literals, length uint32
	offset           uint32 // as the format counts: 1 to 3 are the last ones, others are 3 more than the distance
}

// finder finds matches. If it looked at one position after the other, the processor would have to wait for the length of each match
// before it knows where to look next. So look at many positions first, which do not depend on one another, and choose
// from what was found then.
type finder struct {
	sequences []match
	literals  []byte
	table     [1 << maxTable]uint32 // for each hash the last position; 0 where there is none
	log       uint                  // so much of the table is in use
	at        [look]uint32          // for each position looked at the one before with the same hash
}

// logOf returns the logarithm of how many hashes are worth remembering of src.
func logOf(src []byte) uint { return uint(min(maxTable, max(9, bits.Len(uint(len(src)))))) }

// reset forgets what was seen, and remembers 1<<log hashes from now on.
func (f *finder) reset(log uint) {
	f.log = log
	clear(f.table[:1<<f.log])
	if f.sequences == nil {
		f.sequences = make([]match, maxSequences)
		f.literals = make([]byte, blockBytes+16)
	}
}

func load64(p unsafe.Pointer, i uint) uint64 {
	return binary.LittleEndian.Uint64((*[8]byte)(unsafe.Add(p, i))[:])
}

// candidates looks at n positions from p on, and returns a bit for each that begins like the last one with the same hash. For an empty place of the
// table that is the very first, which may be the position itself. Of four positions the first and the third are looked at, and the second is only
// remembered: what a match there would find, the next position does, and the match is extended back. The fourth is passed over: whatever the
// distance, one of the positions looked at meets one that is remembered.
func (f *finder) candidates(base unsafe.Pointer, p, n uint) (m uint64) {
	shift := (64 - f.log) & 63
	for i := range min(n, look) {
		if i%4 == 3 {
			continue
		}
		v := load64(base, p+i)
		h := v << (64 - 8*minMatch) * prime >> shift & (1<<maxTable - 1)
		c := f.table[h]
		f.table[h] = uint32(p + i)
		if i%4 == 1 {
			continue
		}
		f.at[i] = c
		if (v^load64(base, uint(c)))<<(64-8*minMatch) == 0 {
			m |= 1 << i
		}
	}
	return m
}

// find sets sequences and literals to what src[start:end] is made of. The distance of the last match before is recent,
// which is returned for the next block.
func (f *finder) find(src []byte, start, end int, recent uint32) uint32 {
	lits := f.literals[:blockBytes+16]
	seqs := f.sequences[:maxSequences]
	w := walk{
		base: unsafe.Pointer(unsafe.SliceData(src)), at: &f.at,
		literals: unsafe.Pointer(unsafe.SliceData(lits)), matches: unsafe.Pointer(unsafe.SliceData(seqs)),
		anchor: uint(start), stop: uint(end), recent: recent,
	}
	for w.p = w.anchor; w.p+8 <= w.stop; {
		next := w.p + look
		if w.p+margin <= w.stop {
			w.found = f.candidates64(w.base, w.p)
			w.choose(src)
		} else {
			next = min(next, w.stop-7)
			w.found = f.candidates(w.base, w.p, next-w.p)
			w.chooseGo(src)
		}
		// What has no matches is looked at in ever greater steps.
		next += (w.p - min(w.p, w.anchor)) >> 5
		w.p = max(next, w.anchor)
	}
	n := int(uintptr(w.literals) - uintptr(unsafe.Pointer(unsafe.SliceData(lits))))
	n += copy(lits[n:], src[w.anchor:end])
	f.literals = lits[:n]
	f.sequences = seqs[:int(uintptr(w.matches)-uintptr(unsafe.Pointer(unsafe.SliceData(seqs))))/int(unsafe.Sizeof(match{}))]
	return w.recent
}

// walk is where finding is. The assembler knows its fields.
type walk struct {
	base     unsafe.Pointer // of what is compressed
	at       *[look]uint32
	literals unsafe.Pointer // where the next go
	matches  unsafe.Pointer // where the next goes
	anchor   uint           // behind the last match
	p        uint           // the first of the positions that are looked at
	found    uint64         // a bit for each of them, as candidates tells
	stop     uint           // the end of the block
	recent   uint32         // the distance of the last match
}

// chooseGo takes the first of the matches found, the first behind that, and so on.
func (w *walk) chooseGo(src []byte) {
	base, m := w.base, w.found
	for m != 0 {
		k := uint(bits.TrailingZeros64(m))
		m &= m - 1
		s := w.p + k
		c := uint(w.at[k&(look-1)])
		offset := s - c
		if offset-1 >= Window-1 { // too far, or an empty place at the beginning
			continue
		}
		inside := s+17 <= w.stop
		if r := uint(w.recent); inside && (load64(base, s+1)^load64(base, s+1-r))<<(64-8*minMatch) == 0 {
			// The distance of the last match costs next to nothing.
			s, offset = s+1, r
			c = s - r
		}
		e := extend(src, s+minMatch, offset, w.stop)
		if c >= 8 {
			x := load64(base, s-8) ^ load64(base, c-8)
			s -= min(uint(bits.LeadingZeros64(x))>>3, s-w.anchor)
		}
		n := s - w.anchor
		copy(unsafe.Slice((*byte)(w.literals), n), src[w.anchor:s])
		w.literals = unsafe.Add(w.literals, n)
		q := (*match)(w.matches)
		w.matches = unsafe.Add(w.matches, unsafe.Sizeof(match{}))
		q.literals, q.length, q.offset = uint32(n), uint32(e-s)-3, uint32(offset)+3
		if uint32(offset) == w.recent && n > 0 {
			q.offset = 1
		}
		w.recent = uint32(offset)
		w.anchor = e
		if e >= w.p+look {
			break
		}
		m &= ^uint64(0) << (e - w.p)
	}
}

// extend returns where the bytes from e on stop being those that are offset before them.
func extend(src []byte, e, offset, end uint) uint {
	base := unsafe.Pointer(unsafe.SliceData(src))
	for ; e+8 <= end; e += 8 {
		if x := load64(base, e) ^ load64(base, e-offset); x != 0 {
			return e + uint(bits.TrailingZeros64(x))>>3
		}
	}
	for e < end && src[e] == src[e-offset] {
		e++
	}
	return e
}
