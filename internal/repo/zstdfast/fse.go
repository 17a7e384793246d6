package zstdfast

import "math/bits"

// What follows is section 4.1 of RFC 8878, finite state entropy, from the encoder's side.

const (
	maxLog     = 9  // the largest table that the format allows for what is encoded here
	maxSymbols = 64 // more than the 53 codes of match lengths, the largest alphabet
)

// transition says for one symbol how a state becomes the next one.
type transition struct {
	// bits is, in the upper half, how many bits of the state are written, less one for states that the lower half
	// keeps from carrying over.
	bits uint32
	next int32 // added to what is left of the state, it gives the place of the next one in states
}

// table encodes symbols of one kind.
type table struct {
	log    uint8
	sym    [maxSymbols]transition
	states [1 << maxLog]uint16
}

// build makes the table for the frequencies norm, which add up to 1<<log. A frequency of -1 is less than one.
func (t *table) build(norm []int16, log uint8) {
	t.log = log
	size := uint32(1) << log
	var (
		symbols [1 << maxLog]uint8
		start   [maxSymbols + 1]uint16
	)
	high := size - 1
	for s, n := range norm {
		if n == -1 {
			start[s+1] = start[s] + 1
			symbols[high] = uint8(s)
			high--
		} else {
			start[s+1] = start[s] + uint16(n)
		}
	}
	step := size>>1 + size>>3 + 3
	at := uint32(0)
	for s, n := range norm {
		for ; n > 0; n-- {
			symbols[at] = uint8(s)
			at = (at + step) & (size - 1)
			for at > high {
				at = (at + step) & (size - 1)
			}
		}
	}
	for i := range size {
		s := symbols[i]
		t.states[start[s]] = uint16(size + i)
		start[s]++
	}
	total := int32(0)
	for s, n := range norm {
		switch n {
		case 0:
			t.sym[s] = transition{}
		case -1, 1:
			t.sym[s] = transition{uint32(log)<<16 - size, total - 1}
			total++
		default:
			out := uint32(log) - uint32(bits.Len16(uint16(n-1))-1)
			t.sym[s] = transition{out<<16 - uint32(n)<<out, total - int32(n)}
			total += int32(n)
		}
	}
}

// first returns the state before the last symbol, which is encoded first.
func (t *table) first(s uint8) uint32 {
	x := t.sym[s&63]
	n := (x.bits + 1<<15) >> 16
	return uint32(t.states[int32((n<<16-x.bits)>>n)+x.next])
}

// normalize scales counts of n symbols to frequencies that add up to 1<<log; what occurs gets at least one. At least
// two symbols must occur, and 1<<log be no less than the number of those that do.
func normalize(norm []int16, count []uint32, n uint32, log uint8) {
	size := int32(1) << log
	left, largest := size, 0
	for s, c := range count {
		if c == 0 {
			norm[s] = 0
			continue
		}
		v := max(1, int32((uint64(c)<<log+uint64(n)/2)/uint64(n)))
		norm[s] = int16(v)
		left -= v
		if norm[s] > norm[largest] {
			largest = s
		}
	}
	// What rounding gave too much or too little, the most frequent make up for.
	for left != 0 {
		if v := int32(norm[largest]) + left; v >= 2 {
			norm[largest] = int16(v)
			return
		}
		left += int32(norm[largest]) - 1
		norm[largest] = 1
		for s, v := range norm {
			if v > norm[largest] {
				largest = s
			}
		}
	}
}

// appendNorm appends the description of a table.
func appendNorm(dst []byte, norm []int16, log uint8) []byte {
	var (
		acc   = uint64(log - 5)
		fill  = uint(4)
		left  = int32(1)<<log + 1
		limit = int32(1) << log
		width = uint(log) + 1
		zero  bool
	)
	flush := func() {
		for fill >= 8 {
			dst = append(dst, byte(acc))
			acc >>= 8
			fill -= 8
		}
	}
	for s := 0; left > 1; {
		if zero {
			run := 0
			for norm[s] == 0 {
				run++
				s++
			}
			for ; run >= 3; run -= 3 {
				acc |= 3 << fill
				fill += 2
				flush()
			}
			acc |= uint64(run) << fill
			fill += 2
			flush()
		}
		n := int32(norm[s])
		s++
		most := 2*limit - 1 - left
		if n < 0 {
			left += n
		} else {
			left -= n
		}
		v := n + 1
		if v >= limit {
			v += most
		}
		acc |= uint64(v) << fill
		fill += width
		if v < most {
			fill--
		}
		zero = n == 0
		for left < limit {
			width--
			limit >>= 1
		}
		flush()
	}
	fill += 7
	flush()
	return dst
}
