// Package chunk cuts content into pieces at places that the content itself decides, so that an
// insertion changes a few pieces and not all that follow.
//
// It is a gear hash with normalised chunking (Xia et al., FastCDC): each byte shifts the 64-bit
// state left and adds a random number that stands for the byte, so the state depends on the last
// 64 bytes. A cut falls where the state is below a limit. The limit is low before the average size
// and high after it, which draws the sizes together. The random numbers come from a secret of
// the repository, so sizes of pieces do not betray which known file they belong to.
//
// The cut points are part of what repositories hold: another algorithm would store everything anew.
package chunk

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
)

// window is how many bytes the state depends on.
const window = 64

// Params are sizes of chunks in bytes. Each chunk but the last of a file has Min to Max bytes.
type Params struct{ Min, Avg, Max int }

// DefaultParams suit files of all sizes: as many blobs as restic makes (1.5 MiB each), or a few more.
var DefaultParams = Params{Min: 512 << 10, Avg: 1 << 20, Max: 8 << 20}

// normal is the factor by which cuts are rarer before Avg and more frequent after it.
const normal = 4

// Chunker finds cut points. It is safe for concurrent use.
type Chunker struct {
	gear       [256]uint64
	p          Params
	rare, many uint64 // limits before and after Avg
}

// New returns the Chunker for a seed. It panics unless 64 <= Min <= Avg <= Max; the zero Params
// stand for DefaultParams.
func New(seed [32]byte, p Params) *Chunker {
	if p == (Params{}) {
		p = DefaultParams
	}
	if p.Min < window || p.Avg < p.Min || p.Max < p.Avg {
		panic(fmt.Sprintf("chunk: bad sizes %+v", p))
	}
	c := &Chunker{p: p}
	for i := 0; i < 256; i += 4 {
		h := sha256.Sum256(fmt.Appendf(seed[:], "holdfast gear %d", i))
		for j := range 4 {
			c.gear[i+j] = binary.LittleEndian.Uint64(h[8*j:])
		}
	}
	// The state is uniform on uint64, so limit = 2^64 times the wanted probability.
	c.rare = uint64(math.Ldexp(1/(float64(p.Avg)*normal), 64))
	c.many = uint64(math.Ldexp(1/(float64(p.Avg)/normal), 64))
	return c
}

// Params returns the sizes in use.
func (c *Chunker) Params() Params { return c.p }

// Cut returns the length of the first chunk in data, which is at least Max long or ends the file.
// It is 0 only for empty data.
func (c *Chunker) Cut(data []byte) int {
	if len(data) <= c.p.Min {
		return len(data)
	}
	data = data[:min(len(data), c.p.Max)]
	avg := min(c.p.Avg, len(data))
	// The first place to look at is after Min bytes; the state is warmed up with the bytes before.
	var h uint64
	for _, b := range data[c.p.Min-window : c.p.Min] {
		h = h<<1 + c.gear[b]
	}
	if h < c.rare {
		return c.p.Min
	}
	n, h := c.scan(data[c.p.Min:avg], h, c.rare)
	if n > 0 {
		return c.p.Min + n
	}
	if n, _ = c.scan(data[avg:], h, c.many); n > 0 {
		return avg + n
	}
	return len(data)
}

// lane is how many bytes one of four chains of states looks at in one go.
const lane = 2 << 10

// scan returns after how many bytes the state first falls below limit, or 0, and the last state.
//
// Each state waits for the one before. So where there is an assembler, four places that lie a lane apart go on side by side: what the
// state is there, the bytes before tell.
func (c *Chunker) scan(data []byte, h, limit uint64) (int, uint64) {
	i := 0
	for haveLanes && i+4*lane <= len(data) {
		piece := data[i : i+4*lane]
		states := [4]uint64{h}
		for k := range 3 {
			for _, b := range piece[(k+1)*lane-window : (k+1)*lane] {
				states[k+1] = states[k+1]<<1 + c.gear[b]
			}
		}
		if scanLanes(&piece[0], &c.gear, &states, limit) {
			// In one of them; which is the first is not known yet.
			n, h := c.scanOne(piece, h, limit)
			return i + n, h
		}
		h = states[3]
		i += 4 * lane
	}
	n, h := c.scanOne(data[i:], h, limit)
	if n > 0 {
		n += i
	}
	return n, h
}

// scanOne does what scan does, with one chain.
//
// Four bytes a turn: the states after one to four bytes are computed side by side from the state
// before, so the chain from turn to turn is one shift and one addition. A turn of one byte each
// is bound by that chain (measured: see BenchmarkCut).
func (c *Chunker) scanOne(data []byte, h, limit uint64) (int, uint64) {
	gear := &c.gear
	i := 0
	for ; i+4 <= len(data); i += 4 {
		d := data[i : i+4 : i+4]
		g0, g1, g2, g3 := gear[d[0]], gear[d[1]], gear[d[2]], gear[d[3]]
		g1 += g0 << 1
		g2 += g1 << 1
		g3 += g2 << 1
		h1, h2, h3, h4 := h<<1+g0, h<<2+g1, h<<3+g2, h<<4+g3
		if h1 < limit {
			return i + 1, h1
		}
		if h2 < limit {
			return i + 2, h2
		}
		if h3 < limit {
			return i + 3, h3
		}
		if h4 < limit {
			return i + 4, h4
		}
		h = h4
	}
	for ; i < len(data); i++ {
		if h = h<<1 + gear[data[i]]; h < limit {
			return i + 1, h
		}
	}
	return 0, h
}
