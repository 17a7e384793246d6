package zstdfast

import "math/bits"

// Codes of lengths and offsets, and the predefined frequencies: RFC 8878, section 3.1.1.3.2.

var (
	litBits   = [maxSymbols]uint8{16: 1, 1, 1, 1, 2, 2, 3, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
	matchBits = [maxSymbols]uint8{32: 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}

	litNorm = []int16{
		4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1, 1, 1, -1, -1, -1, -1,
	}
	matchNorm = []int16{
		1, 4, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
		-1, -1, -1, -1, -1, -1, -1,
	}
	offsetNorm = []int16{1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1}

	// The codes of small lengths; those of others follow from their highest bit.
	litCodes   [64]uint8
	matchCodes [128]uint8 // of lengths less 3

	litTable, matchTable, offsetTable table // of the predefined frequencies
)

func init() {
	fill := func(codes []uint8, width []uint8) {
		at := 0
		for c, w := range width {
			for range 1 << w {
				if at == len(codes) {
					return
				}
				codes[at] = uint8(c)
				at++
			}
		}
	}
	fill(litCodes[:], litBits[:len(litNorm)])
	fill(matchCodes[:], matchBits[:len(matchNorm)])
	litTable.build(litNorm, 6)
	matchTable.build(matchNorm, 6)
	offsetTable.build(offsetNorm, 5)
}

func litCode(n uint32) uint8 {
	if n < 64 {
		return litCodes[n]
	}
	return uint8(bits.Len32(n) + 18)
}

// matchCode is the code of a match of n+3 bytes.
func matchCode(n uint32) uint8 {
	if n < 128 {
		return matchCodes[n]
	}
	return uint8(bits.Len32(n) + 35)
}
