package zstdfast

import (
	"encoding/binary"
	"slices"
	"unsafe"

	"github.com/klauspost/compress/fse"
)

// What follows is section 4.2 of RFC 8878, Huffman coding, from the encoder's side.

const (
	maxCode     = 11   // bits of a code, the most that the format allows
	fourStreams = 1024 // literals from which on there are four: fewer have a header that is shorter by a byte
	weightsLog  = 6    // of the table for weights, the most that the format allows
)

// codes has, for each byte, its code and from bit 16 on how many bits that has; 0 where there is none.
type codes [256]uint32

// huffman encodes the literals of one block after the other.
type huffman struct {
	counts [4][256]uint32
	tables [2]codes
	last   int  // which of the tables the reader has
	known  bool // it has one

	ranks       [256]uint32 // of what occurs: how often, and in the last eight bits which byte; the rarest first
	lengths     [256]uint32
	weights     [256]byte
	fse         fse.Scratch
	description []byte // of the table that the reader does not have
}

// forget is for a reader that may have no table.
func (h *huffman) forget() { h.known = false }

// append appends the literals of a block, which may be no smaller then. It also overwrites what lies between the end and the capacity of dst.
func (h *huffman) append(dst, lits []byte) []byte {
	n := len(lits)
	if n < 32 {
		return appendPlain(dst, lits, literalsRaw)
	}
	count := h.count(lits)
	kinds, largest := 0, uint32(0)
	for s, c := range count {
		if c > 0 {
			h.ranks[kinds] = c<<8 | uint32(s)
			kinds++
			largest = max(largest, c)
		}
	}
	switch {
	case kinds == 1:
		return appendPlain(dst, lits, literalsRLE)
	case int(largest) <= n>>7+4: // all are about as frequent
		h.forget()
		return appendPlain(dst, lits, literalsRaw)
	}
	kind, table := uint64(literalsCompressed), &h.tables[1-h.last]
	size, ok := h.build(table, h.ranks[:kinds])
	if h.known {
		if again, all := h.tables[h.last].size(h.ranks[:kinds]); all && (!ok || again <= size) {
			kind, table, size, ok = literalsReused, &h.tables[h.last], again, true
		}
	}
	if !ok || size >= n {
		h.forget()
		return appendPlain(dst, lits, literalsRaw)
	}

	// What is written at once may go eight bytes beyond.
	begin, streams, width := len(dst), 1, 3
	if n >= fourStreams {
		streams, width = 4, 4
	}
	if n >= 1<<14 {
		width = 5
	}
	if need := begin + width + len(h.description) + size + 32; cap(dst) < need {
		dst = append(make([]byte, 0, need+need/4), dst...)
	}
	dst = dst[:begin+width]
	if kind == literalsCompressed {
		dst = append(dst, h.description...)
	}
	sizes := len(dst)
	at := sizes
	if streams == 4 {
		at += 6
	}
	out := dst[:cap(dst)]
	part := (n + streams - 1) / streams
	for i := range streams {
		p := lits[i*part : min((i+1)*part, n)]
		end := table.stream(unsafe.Add(unsafe.Pointer(unsafe.SliceData(out)), at), p)
		next := int(uintptr(end) - uintptr(unsafe.Pointer(unsafe.SliceData(out))))
		if i < 3 && streams == 4 {
			binary.LittleEndian.PutUint16(out[sizes+2*i:], uint16(next-at))
		}
		at = next
	}
	size = at - begin - width
	if size >= n {
		h.forget()
		return appendPlain(dst[:begin], lits, literalsRaw)
	}
	head := kind
	switch width {
	case 3:
		head |= uint64(n)<<4 | uint64(size)<<14
	case 4:
		head |= 2<<2 | uint64(n)<<4 | uint64(size)<<18
	default:
		head |= 3<<2 | uint64(n)<<4 | uint64(size)<<22
	}
	for i := range width {
		out[begin+i] = byte(head >> (8 * i))
	}
	if kind == literalsCompressed {
		h.last, h.known = 1-h.last, true
	}
	return out[:at]
}

// count returns how often each byte occurs. Neighbours are counted apart: those that are the same would wait for one another.
func (h *huffman) count(lits []byte) *[256]uint32 {
	clear(h.counts[:])
	a, b, c, d := &h.counts[0], &h.counts[1], &h.counts[2], &h.counts[3]
	for len(lits) >= 8 {
		v := binary.LittleEndian.Uint64(lits)
		a[byte(v)]++
		b[byte(v>>8)]++
		c[byte(v>>16)]++
		d[byte(v>>24)]++
		a[byte(v>>32)]++
		b[byte(v>>40)]++
		c[byte(v>>48)]++
		d[byte(v>>56)]++
		lits = lits[8:]
	}
	for _, s := range lits {
		a[s]++
	}
	for i := range a {
		a[i] += b[i] + c[i] + d[i]
	}
	return a
}

// build makes a table for what occurs, at least two kinds of bytes, and its description. It returns about how many bytes both take, and false if
// the format has no description for it. It sorts ranks.
func (h *huffman) build(t *codes, ranks []uint32) (size int, ok bool) {
	slices.Sort(ranks)
	l := h.lengths[:len(ranks)]
	for i, r := range ranks {
		l[i] = r >> 8
	}
	codeLengths(l)
	if !limitLengths(l) {
		return 0, false
	}
	// The longest codes are the smallest numbers; those of the same length follow the order of the bytes.
	var (
		of     [maxCode + 2]uint32 // how many codes have so many bits
		next   [maxCode + 2]uint32
		width  [256]uint8
		longer = l[0] // the most bits
	)
	top := uint32(0)
	body := 0
	for i, r := range ranks {
		of[l[i]]++
		width[r&0xff] = uint8(l[i])
		top = max(top, r&0xff)
		body += int(l[i] * (r >> 8))
	}
	for v, n := uint32(0), longer; n > 0; n-- {
		next[n] = v
		v = (v + of[n]) >> 1
	}
	for s, n := range width {
		t[s] = 0
		h.weights[s] = 0
		if n > 0 {
			t[s] = next[n] | uint32(n)<<16
			next[n]++
			h.weights[s] = uint8(longer) + 1 - n
		}
	}
	if !h.describe(h.weights[:top]) { // that of the last follows from the others
		return 0, false
	}
	return len(h.description) + body/8 + 8, true
}

// describe sets the description of a table of which the weights are given, but for the last one.
func (h *huffman) describe(weights []byte) bool {
	h.fse.TableLog = weightsLog
	if out, err := fse.Compress(weights, &h.fse); err == nil && len(out) < 128 && len(out) < (len(weights)+1)/2 {
		h.description = append(append(h.description[:0], byte(len(out))), out...)
		return true
	}
	if len(weights) > 128 {
		return false
	}
	h.description = append(h.description[:0], byte(127+len(weights)))
	for i := 0; i < len(weights); i += 2 {
		v := weights[i] << 4
		if i+1 < len(weights) {
			v |= weights[i+1]
		}
		h.description = append(h.description, v)
	}
	return true
}

// size returns about how many bytes it takes to encode what occurs, and whether there is a code for all of it.
func (t *codes) size(ranks []uint32) (int, bool) {
	n := uint32(0)
	for _, r := range ranks {
		c := t[r&0xff]
		if c == 0 {
			return 0, false
		}
		n += c >> 16 * (r >> 8)
	}
	return int(n)/8 + 8, true
}

// codeLengths makes of frequencies, the lowest first, the lengths of codes, the longest first, with which all together take the fewest bits. There
// are at least two. A. Moffat, J. Katajainen, In-place calculation of minimum-redundancy codes, 1995.
func codeLengths(a []uint32) {
	n := len(a)
	// What is behind leaf are frequencies yet. What is before next, and from root on, are sums; before root, where the node above is.
	a[0] += a[1]
	root, leaf := 0, 2
	take := func(next int) (v uint32) {
		if leaf >= n || root < next && a[root] < a[leaf] {
			v = a[root]
			a[root] = uint32(next)
			root++
			return v
		}
		v = a[leaf]
		leaf++
		return v
	}
	for next := 1; next < n-1; next++ {
		v := take(next)
		a[next] = v + take(next)
	}
	// Depths of the nodes, from the topmost, which is the last.
	a[n-2] = 0
	for i := n - 3; i >= 0; i-- {
		a[i] = a[a[i]] + 1
	}
	// What is not a node at some depth is a leaf.
	root, at, depth := n-2, n-1, uint32(0)
	for room := 1; room > 0; depth++ {
		nodes := 0
		for root >= 0 && a[root] == depth {
			nodes++
			root--
		}
		for ; room > nodes; room-- {
			a[at] = depth
			at--
		}
		room = 2 * nodes
	}
}

// limitLengths shortens those that are longer than maxCode, and makes others longer for it. It reports false if that cannot be made to fit.
func limitLengths(l []uint32) bool {
	if l[0] <= maxCode {
		return true
	}
	const full = 1 << maxCode
	used := 0 // of full
	for i := range l {
		l[i] = min(l[i], maxCode)
		used += full >> l[i]
	}
	for i := 0; used > full; {
		switch {
		case i == len(l):
			return false
		case l[i] == maxCode:
			i++
		default:
			l[i]++
			used -= full >> l[i]
		}
	}
	// The last step may have been too large.
	for used < full {
		before := used
		for i := len(l) - 1; i >= 0 && used < full; i-- {
			if more := full >> l[i]; l[i] > 1 && more <= full-used {
				l[i]--
				used += more
			}
		}
		if used == before {
			return false
		}
	}
	return true
}

// streamGo writes the codes of p, the last one first, and the bit that marks the end, and returns where it ends.
func (t *codes) streamGo(to unsafe.Pointer, p []byte) unsafe.Pointer {
	w := bitWriter{to: to}
	for i := len(p) - 1; i >= 0; i-- {
		c := t[p[i]]
		w.acc |= uint64(c&0xffff) << (w.fill & 63)
		w.fill += uint(c >> 16)
		if i%5 == 0 { // five take 55 bits at most
			w.flush()
		}
	}
	w.acc |= 1 << w.fill
	w.fill += 8
	w.flush()
	return w.to
}
