package zstdfast

import (
	"bytes"
	"container/heap"
	"math/rand/v2"
	"slices"
	"testing"
	"unsafe"
)

type heapOf []uint32

func (h heapOf) Len() int           { return len(h) }
func (h heapOf) Less(i, j int) bool { return h[i] < h[j] }
func (h heapOf) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *heapOf) Push(x any)        { *h = append(*h, x.(uint32)) }
func (h *heapOf) Pop() any {
	v := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return v
}

// fewest returns how many bits an optimal code takes, by Huffman's own algorithm.
func fewest(count []uint32) (bits uint32) {
	h := heapOf(slices.Clone(count))
	heap.Init(&h)
	for len(h) > 1 {
		v := heap.Pop(&h).(uint32) + heap.Pop(&h).(uint32)
		bits += v
		heap.Push(&h, v)
	}
	return bits
}

func TestCodeLengths(t *testing.T) {
	r := rand.New(rand.NewPCG(6, 6))
	limited := 0
	for range 20_000 {
		count := make([]uint32, 2+r.IntN(255))
		steep := r.IntN(17)
		for i := range count {
			count[i] = 1 + r.Uint32N(1<<r.IntN(1+steep))
		}
		slices.Sort(count)
		l := slices.Clone(count)
		codeLengths(l)
		bits := uint32(0)
		for i := range l {
			bits += l[i] * count[i]
		}
		if want := fewest(count); bits != want {
			t.Fatalf("%v: lengths %v take %d bits, want %d", count, l, bits, want)
		}
		if l[0] > maxCode {
			limited++
		}
		checkLimit(t, l)
	}
	if limited < 1000 {
		t.Errorf("only %d codes had to be made shorter", limited)
	}
	// The steepest of all, and all that few symbols can be: each depth has one.
	for n := 2; n <= 26; n++ {
		l := make([]uint32, n)
		for i := range l {
			l[i] = uint32(n - max(i, 1))
		}
		checkLimit(t, l)
	}
}

// checkLimit limits l, and looks whether the code is complete: the format has no other.
func checkLimit(t *testing.T, l []uint32) {
	t.Helper()
	before := slices.Clone(l)
	if !limitLengths(l) {
		t.Fatalf("%v: no limit fits", before)
	}
	used := 0
	for _, n := range l {
		if n < 1 || n > maxCode {
			t.Fatalf("%v became %v", before, l)
		}
		used += 1 << (maxCode - n)
	}
	if used != 1<<maxCode {
		t.Fatalf("%v became %v, which fills %d of %d", before, l, used, 1<<maxCode)
	}
}

// literalsOf encodes literals and lets the library decode them.
func literalsOf(t *testing.T, h *huffman, lits []byte) (kind byte, size int) {
	t.Helper()
	frame := []byte{0x28, 0xB5, 0x2F, 0xFD, 2 << 6, (windowLog - 10) << 3, byte(len(lits)), byte(len(lits) >> 8), byte(len(lits) >> 16), 0, 0, 0, 0}
	body := len(frame)
	frame = h.append(frame, lits)
	kind = frame[body] & 3
	size = len(frame) - body
	frame = append(frame, 0) // no sequences
	head := 1 | blockCompressed<<1 | uint32(len(frame)-body)<<3
	frame[body-3], frame[body-2], frame[body-1] = byte(head), byte(head>>8), byte(head>>16)
	if !bytes.Equal(decode(t, frame), lits) {
		t.Fatalf("%d literals, kind %d: not the same", len(lits), kind)
	}
	return kind, size
}

// Of each kind of literals: what is chosen is right, and pays.
func TestLiterals(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	draw := func(n int, weight func(s int) float64) []byte {
		var sum [256]float64
		total := 0.0
		for s := range sum {
			total += weight(s)
			sum[s] = total
		}
		p := make([]byte, n)
		for i := range p {
			s, _ := slices.BinarySearch(sum[:], r.Float64()*total)
			p[i] = byte(min(s, 255))
		}
		return p
	}
	half := func(s int) float64 { return 1 / float64(uint64(1)<<min(s, 40)) }
	harmonic := func(s int) float64 { return 1 / float64(s+1) }
	for _, tt := range []struct {
		name   string
		weight func(s int) float64
		want   byte
		most   float64 // of the size of long ones
	}{
		{"each half as often as the one before", half, literalsCompressed, 0.26},
		{"at the end of the alphabet", func(s int) float64 { return half(255 - s) }, literalsCompressed, 0.26},
		{"all", harmonic, literalsCompressed, 0.85},
		{"every second", func(s int) float64 { return harmonic(s) * float64(s&1) }, literalsCompressed, 0.85},
		{"two", func(s int) float64 { return float64(s / 254) }, literalsCompressed, 0.14},
		{"evenly", func(int) float64 { return 1 }, literalsRaw, 1.01},
		{"one", func(s int) float64 { return float64(s / 255) }, literalsRLE, 0.01},
	} {
		for _, n := range []int{32, 33, 100, 255, 256, 1000, 1023, 1024, 1025, 1026, 1027, 5000, 1<<14 - 1, 1 << 14, 40_000, blockBytes - 100} {
			var h huffman
			kind, size := literalsOf(t, &h, draw(n, tt.weight))
			if n >= 5000 && (kind != tt.want || float64(size) > tt.most*float64(n)) {
				t.Errorf("%s: %d literals became %d bytes of kind %d", tt.name, n, size, kind)
			}
		}
	}
}

// A table that the reader has is used again where that is smaller, and not after what gives the reader none.
func TestReuse(t *testing.T) {
	var h huffman
	text := prose(3000, 1)
	first := h.append(nil, text[:1000])
	again := h.append(nil, text[1000:2000])
	if first[0]&3 != literalsCompressed || again[0]&3 != literalsReused {
		t.Errorf("kinds %d and %d, want a table and then none", first[0]&3, again[0]&3)
	}
	if other := h.append(nil, append(text[2000:2999:2999], 'X')); other[0]&3 != literalsCompressed {
		t.Errorf("kind %d with a byte that the table does not have", other[0]&3)
	}
	h.append(nil, randomBytes(1000, 1))
	if after := h.append(nil, text[:1000]); after[0]&3 != literalsCompressed {
		t.Errorf("kind %d after a block without a table", after[0]&3)
	}
}

// The assembler writes what the plain code writes.
func TestStream(t *testing.T) {
	var h huffman
	lits := prose(4096, 4)
	if got := h.append(nil, lits); got[0]&3 != literalsCompressed {
		t.Fatal("not compressed")
	}
	table := &h.tables[h.last]
	for n := 1; n < 400; n++ {
		var out [2][1024]byte
		a, b := table.stream(unsafe.Pointer(&out[0]), lits[:n]), table.streamGo(unsafe.Pointer(&out[1]), lits[:n])
		if x, y := uintptr(a)-uintptr(unsafe.Pointer(&out[0])), uintptr(b)-uintptr(unsafe.Pointer(&out[1])); !bytes.Equal(out[0][:x], out[1][:y]) {
			t.Fatalf("%d literals: %x, %x", n, out[0][:x], out[1][:y])
		}
	}
}

// However little room there is, nothing behind it is written.
func TestRoom(t *testing.T) {
	var h huffman
	text := prose(6000, 5)
	for _, n := range []int{32, 700, 1023, 1024, 6000} {
		most := len(h.append(nil, text[:n])) + 64
		for room := range most {
			all := bytes.Repeat([]byte{0xA5}, most+64)
			h.append(all[:0:room], text[:n])
			if behind := all[room:]; bytes.Count(behind, []byte{0xA5}) != len(behind) {
				t.Fatalf("%d literals, room for %d: behind it is %x", n, room, behind)
			}
		}
	}
}
