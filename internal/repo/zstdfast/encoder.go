// Package zstdfast compresses data to frames of the Zstandard format (RFC 8878), at a fast level and as fast as it can.
//
// Data that cannot be compressed is not its business: callers know. The frame is for readers that have
// Window bytes, and has no checksum.
package zstdfast

import (
	"encoding/binary"
	"math/bits"
	"unsafe"
)

const (
	// Window is how far back matches reach, in bytes.
	Window     = 1 << windowLog
	windowLog  = 20
	blockBytes = 128 << 10 // the most that the format allows

	blockRaw, blockCompressed          = 0, 2
	literalsRaw, literalsRLE           = 0, 1
	literalsCompressed, literalsReused = 2, 3

	repeatsTable = 13 // the logarithm of how many hashes Repeats remembers: they stay in the nearest cache
	sequenceCost = 4  // bytes, about
)

// sequence is some literals and the match that follows them: the codes of how many literals, of the offset and of the
// length, and the bits that are written beside them.
type sequence struct {
	extra                   uint64
	width                   uint8 // of extra, in bits; at most 53
	literals, offset, match uint8
}

// Encoder compresses, one after the other. The zero value is ready. Not for concurrent use. It has some 900 KiB.
type Encoder struct {
	finder    finder
	sequences []sequence
	counts    [3][maxSymbols]uint32 // how often each code is in sequences: of literals, offsets and matches
	huff      huffman
	tables    [3]table
}

// Append appends the frame of src, which has less than 4 GiB, to dst. It also overwrites what lies between the end of the frame
// and the capacity of dst.
func (e *Encoder) Append(dst, src []byte) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, 0xFD2FB528)
	// Descriptor: size of the content in four bytes, no single segment, which would make the content the window.
	dst = append(dst, 2<<6, (windowLog-10)<<3)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(src)))
	e.finder.reset(logOf(src))
	e.huff.forget()     // what the last frame had
	recent := uint32(1) // as the format begins
	for start := 0; ; start += blockBytes {
		end := min(start+blockBytes, len(src))
		last := uint32(0)
		if end == len(src) {
			last = 1
		}
		header := len(dst)
		dst = append(dst, 0, 0, 0)
		kind, before := uint32(blockCompressed), recent
		recent = e.finder.find(src, start, end, recent)
		dst = e.appendSequences(e.huff.append(dst, e.finder.literals), e.finder.sequences)
		if len(dst)-header-3 >= end-start {
			// The reader does not see what the compressed block would have left behind.
			recent = before
			e.huff.forget()
			kind = blockRaw
			dst = append(dst[:header+3], src[start:end]...)
		}
		size := uint32(len(dst) - header - 3)
		head := last | kind<<1 | size<<3
		dst[header], dst[header+1], dst[header+2] = byte(head), byte(head>>8), byte(head>>16)
		if last == 1 {
			return dst
		}
	}
}

// Repeats tells, for a piece of up to 128 KiB, about how many bytes shorter it becomes because parts of it occur twice. That takes a
// fraction of the time of Append.
func (e *Encoder) Repeats(src []byte) int {
	src = src[:min(len(src), blockBytes)]
	e.finder.reset(min(repeatsTable, logOf(src)))
	e.finder.find(src, 0, len(src), 1)
	saved := 0
	for i := range e.finder.sequences {
		q := &e.finder.sequences[i]
		saved += int(q.length) + 3 - sequenceCost
		if q.offset == 1 { // the distance of the last one
			saved += sequenceCost - 1
		}
	}
	return max(0, saved)
}

// appendPlain appends literals that are not compressed, or, of such that are all the same, the first.
func appendPlain(dst, lits []byte, kind uint64) []byte {
	n := uint64(len(lits))
	switch {
	case n < 32:
		dst = append(dst, byte(kind|n<<3))
	case n < 4096:
		n = kind | 1<<2 | n<<4
		dst = append(dst, byte(n), byte(n>>8))
	default:
		n = kind | 3<<2 | n<<4
		dst = append(dst, byte(n), byte(n>>8), byte(n>>16))
	}
	if kind == literalsRLE {
		lits = lits[:1]
	}
	return append(dst, lits...)
}

// encodeGo sets seqs to the codes of matches, and counts them.
func encodeGo(seqs []sequence, matches []match, counts *[3][maxSymbols]uint32) {
	for i := range matches {
		m := &matches[i]
		l, o, g := litCode(m.literals), uint8(bits.Len32(m.offset)-1), matchCode(m.length)
		counts[0][l&63]++
		counts[1][o&63]++
		counts[2][g&63]++
		// The codes stand for multiples of what their bits count to.
		wl, wm := litBits[l&63]&31, matchBits[g&63]&31
		// Field by field: the compiler would make the whole elsewhere and copy it, and the processor wait.
		q := &seqs[i]
		q.extra = uint64(m.literals)&(1<<wl-1) | uint64(m.length)&(1<<wm-1)<<wl | uint64(m.offset)&(1<<(o&31)-1)<<((wl+wm)&63)
		q.width, q.literals, q.offset, q.match = wl+wm+o, l, o, g
	}
}

func (e *Encoder) appendSequences(dst []byte, matches []match) []byte {
	n := len(matches)
	if n < 128 {
		dst = append(dst, byte(n))
	} else { // no block has the 32,512 that would take three bytes
		dst = append(dst, byte(n>>8+128), byte(n))
	}
	if n == 0 {
		return dst
	}
	if e.sequences == nil {
		e.sequences = make([]sequence, maxSequences)
	}
	seqs := e.sequences[:n]
	e.counts = [3][maxSymbols]uint32{}
	encode(seqs, matches, &e.counts)
	modes := len(dst)
	dst = append(dst, 0)
	var (
		t    [3]*table
		mode [3]byte
	)
	last := [3]uint8{seqs[n-1].literals, seqs[n-1].offset, seqs[n-1].match}
	for i, d := range [3]struct {
		std     *table
		symbols int
		log     uint8
	}{{&litTable, len(litNorm), 9}, {&offsetTable, len(offsetNorm), 8}, {&matchTable, len(matchNorm), 9}} {
		t[i] = &e.tables[i]
		dst, mode[i] = t[i].choose(dst, e.counts[i][:], n, last[i], d.log)
		if mode[i] == 0 {
			t[i] = d.std
		}
	}
	dst[modes] = mode[0]<<6 | mode[1]<<4 | mode[2]<<2
	return appendBits(dst, seqs, t[0], t[1], t[2])
}

// choose builds the table for n symbols, of which the last is given, and appends its description. It returns how the format names that: 0 for
// the predefined table, 1 for a symbol that is always the same, 2 for a description.
func (t *table) choose(dst []byte, count []uint32, n int, last uint8, maxLog uint8) ([]byte, byte) {
	if int(count[last]) == n && n > 2 {
		t.log = 0
		t.sym[last] = transition{}
		t.states[0] = 0
		return append(dst, last), 1
	}
	if n < 64 {
		return dst, 0
	}
	log := min(maxLog, uint8(max(6, bits.Len(uint(n))-2)))
	top := len(count)
	for count[top-1] == 0 {
		top--
	}
	var norm [64]int16
	normalize(norm[:top], count[:top], uint32(n), log)
	t.build(norm[:top], log)
	return appendNorm(dst, norm[:top], log), 2
}

// appendBits appends the bits of the sequences, the last one first, so that the reader, who begins at the end, gets them in order.
func appendBits(dst []byte, seqs []sequence, lt, ot, mt *table) []byte {
	// No sequence takes more than 10 bytes.
	begin := len(dst)
	if need := begin + len(seqs)*10 + 16; cap(dst) < need {
		dst = append(make([]byte, 0, need+need/4), dst...)
	}
	out := dst[:cap(dst)]
	last := &seqs[len(seqs)-1]
	w := bitWriter{
		to:  unsafe.Add(unsafe.Pointer(unsafe.SliceData(out)), begin),
		acc: last.extra, fill: uint(last.width),
		literals: lt.first(last.literals), offset: ot.first(last.offset), match: mt.first(last.match),
	}
	w.flush()
	w.write(seqs[:len(seqs)-1], lt, ot, mt)
	for _, v := range [3]struct {
		state uint32
		log   uint8
	}{{w.match, mt.log}, {w.offset, ot.log}, {w.literals, lt.log}} {
		w.acc |= uint64(v.state&(1<<v.log-1)) << w.fill
		w.fill += uint(v.log)
	}
	w.acc |= 1 << w.fill // marks the end
	w.fill += 8
	w.flush()
	at := int(uintptr(w.to) - uintptr(unsafe.Pointer(unsafe.SliceData(out))))
	return out[:at]
}

// bitWriter writes bits to memory that is known to have room. The assembler knows its fields.
type bitWriter struct {
	to                      unsafe.Pointer
	acc                     uint64 // what is not written yet: fewer than eight bits after each flush
	fill                    uint
	literals, offset, match uint32 // the states
}

func (w *bitWriter) flush() {
	binary.LittleEndian.PutUint64((*[8]byte)(w.to)[:], w.acc)
	w.to = unsafe.Add(w.to, w.fill>>3)
	w.acc >>= w.fill &^ 7 & 63
	w.fill &= 7
}

// writeGo writes sequences, the last one first: what the states lose on the way to the next, then the other bits.
func (w *bitWriter) writeGo(seqs []sequence, lt, ot, mt *table) {
	b := *w
	for i := len(seqs) - 1; i >= 0; i-- {
		s := &seqs[i]
		o, m, l := &ot.sym[s.offset&63], &mt.sym[s.match&63], &lt.sym[s.literals&63]
		// At most 9 bits each; the masks are for the compiler.
		wo, wm, wl := uint((b.offset+o.bits)>>16)&31, uint((b.match+m.bits)>>16)&31, uint((b.literals+l.bits)>>16)&31
		v := uint64(b.offset&(1<<wo-1)) | uint64(b.match&(1<<wm-1))<<wo | uint64(b.literals&(1<<wl-1))<<((wo+wm)&63)
		b.offset = uint32(ot.states[(int32(b.offset>>wo)+o.next)&(1<<maxLog-1)])
		b.match = uint32(mt.states[(int32(b.match>>wm)+m.next)&(1<<maxLog-1)])
		b.literals = uint32(lt.states[(int32(b.literals>>wl)+l.next)&(1<<maxLog-1)])
		b.acc |= v << (b.fill & 63)
		b.fill += wo + wm + wl
		b.flush()
		b.acc |= s.extra << (b.fill & 63)
		b.fill += uint(s.width)
		b.flush()
	}
	*w = b
}
