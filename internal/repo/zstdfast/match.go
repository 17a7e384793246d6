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

func (f *finder) reset(src []byte) {
	f.log = uint(min(maxTable, max(9, bits.Len(uint(len(src))))))
	clear(f.table[:1<<f.log])
	if f.sequences == nil {
		f.sequences = make([]match, maxSequences)
		f.literals = make([]byte, blockBytes+16)
	}
}

func load64(p unsafe.Pointer, i uint) uint64 {
	return binary.LittleEndian.Uint64((*[8]byte)(unsafe.Add(p, i))[:])
}

// candidates looks at n positions from p on, and returns a bit for each that begins like the last one with the same hash.
func (f *finder) candidates(base unsafe.Pointer, p, n uint) (m uint64) {
	shift := (64 - f.log) & 63
	for i := range min(n, look) {
		v := load64(base, p+i)
		h := v << (64 - 8*minMatch) * prime >> shift & (1<<maxTable - 1)
		c := f.table[h]
		f.table[h] = uint32(p + i)
		f.at[i] = c
		if (v^load64(base, uint(c)))<<(64-8*minMatch) == 0 {
			m |= 1 << i
		}
	}
	return m
}

// find sets sequences and literals to what src[start:end] is made of.
func (f *finder) find(src []byte, start, end int, recent *[3]uint32) {
	var (
		base         = unsafe.Pointer(unsafe.SliceData(src))
		seqs         = f.sequences[:maxSequences]
		lits         = f.literals[:blockBytes+16]
		to           = unsafe.Pointer(unsafe.SliceData(lits))
		ns           int
		nl           uint
		anchor, stop = uint(start), uint(end)
		rep          = *recent
	)
	for p := max(anchor, 1); p+8 <= stop; { // at 0 nothing can be found: it means an empty place of the table
		var m uint64
		next := p + look
		if p+margin <= stop {
			m = f.candidates64(base, p)
		} else {
			next = min(next, stop-7)
			m = f.candidates(base, p, next-p)
		}
		// What has no matches is looked at in ever greater steps.
		next += (p - min(p, anchor)) >> 5
		for m != 0 {
			k := uint(bits.TrailingZeros64(m))
			m &= m - 1
			s := p + k
			c := uint(f.at[k&(look-1)])
			offset := s - c
			if offset >= Window {
				continue
			}
			inside := s+17 <= stop
			if r := uint(rep[0]); inside && (load64(base, s+1)^load64(base, s+1-r))<<(64-8*minMatch) == 0 {
				// The distance of the last match costs next to nothing.
				s, offset = s+1, r
				c = s - r
			}
			e := s + minMatch
			if inside {
				if x := load64(base, e) ^ load64(base, c+minMatch); x != 0 {
					e += uint(bits.TrailingZeros64(x)) >> 3
				} else {
					e = extend(src, e+8, offset, stop)
				}
			} else {
				e = extend(src, e, offset, stop)
			}
			if c >= 8 {
				x := load64(base, s-8) ^ load64(base, c-8)
				s -= min(uint(bits.LeadingZeros64(x))>>3, s-anchor)
			}
			n := s - anchor
			if n <= 16 && inside {
				*(*[16]byte)(unsafe.Add(to, nl)) = *(*[16]byte)(unsafe.Add(base, anchor))
			} else {
				copy(lits[nl:], src[anchor:s])
			}
			nl += n
			v := uint32(offset) + 3
			if uint32(offset) == rep[0] && n > 0 {
				v = 1
			} else {
				rep[2], rep[1], rep[0] = rep[1], rep[0], uint32(offset)
			}
			q := &seqs[ns]
			q.literals, q.length, q.offset = uint32(n), uint32(e-s)-3, v
			ns++
			anchor = e
			if e >= p+look {
				next = e
				break
			}
			m &= ^uint64(0) << (e - p)
		}
		p = next
	}
	*recent = rep
	nl += uint(copy(lits[nl:], src[anchor:stop]))
	f.sequences, f.literals = seqs[:ns], lits[:nl]
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
