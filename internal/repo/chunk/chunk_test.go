package chunk

import (
	"bytes"
	"crypto/sha256"
	"math/rand/v2"
	"testing"
)

func random(seed byte, n int) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(p)
	return p
}

// slowCut is the definition: at each place the state is computed from the 64 bytes before it.
func slowCut(c *Chunker, data []byte) int {
	for n := c.p.Min; n < min(len(data), c.p.Max); n++ {
		var h uint64
		for _, b := range data[n-window : n] {
			h = h<<1 + c.gear[b]
		}
		limit := c.rare
		if n > c.p.Avg {
			limit = c.many
		}
		if h < limit {
			return n
		}
	}
	return min(len(data), c.p.Max)
}

func chunks(c *Chunker, data []byte) (list [][]byte) {
	for len(data) > 0 {
		n := c.Cut(data)
		list = append(list, data[:n])
		data = data[n:]
	}
	return list
}

var small = Params{Min: 64, Avg: 256, Max: 2048}

func TestEqualsSlowOracle(t *testing.T) {
	inputs := map[string][]byte{
		"random":  random(1, 200_000),
		"zeros":   make([]byte, 20_000),
		"text":    bytes.Repeat([]byte("the quick brown fox jumps over the lazy dog\n"), 2000),
		"mixed":   append(append(random(2, 5000), make([]byte, 5000)...), random(3, 5001)...),
		"tiny":    []byte("x"),
		"exactly": random(4, 64),
	}
	for _, p := range []Params{small, {64, 64, 64}, {100, 333, 1001}, {64, 256, 256}, {256, 256, 1024}} {
		for name, data := range inputs {
			c := New([32]byte{9}, p)
			rest := data
			for _, piece := range chunks(c, data) {
				if want := slowCut(c, rest); len(piece) != want {
					t.Fatalf("%s %+v: cut at %d, not %d", name, p, len(piece), want)
				}
				if len(piece) > p.Max || (len(piece) < p.Min && len(piece) != len(rest)) {
					t.Fatalf("%s %+v: chunk of %d", name, p, len(piece))
				}
				rest = rest[len(piece):]
			}
		}
	}
}

// Cut needs to see no more than Max bytes.
func TestMaxBytesAreEnough(t *testing.T) {
	c := New([32]byte{9}, small)
	for data := random(5, 100_000); len(data) > 0; {
		n := c.Cut(data)
		if got := c.Cut(data[:min(small.Max, len(data))]); got != n {
			t.Fatalf("%d with all the data, %d with Max bytes", n, got)
		}
		data = data[n:]
	}
}

func TestInsertChangesFewChunks(t *testing.T) {
	c := New([32]byte{1}, small)
	data := random(6, 1<<20)
	known := map[[32]byte]bool{}
	for _, p := range chunks(c, data) {
		known[sha256.Sum256(p)] = true
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		at, n := r.IntN(len(data)), 1+r.IntN(300)
		changed := append(append(bytes.Clone(data[:at]), random(7, n)...), data[at:]...)
		fresh := 0
		for _, p := range chunks(c, changed) {
			if !known[sha256.Sum256(p)] {
				fresh++
			}
		}
		// Cuts meet again at the first common place that neither side jumps over, mostly at once.
		if fresh > 25 {
			t.Errorf("inserting %d bytes at %d changed %d chunks", n, at, fresh)
		}
	}
}

func TestSeedDecides(t *testing.T) {
	data := random(8, 100_000)
	a, b := New([32]byte{1}, small), New([32]byte{2}, small)
	same, n := 0, 0
	for rest := data; len(rest) > 0; n++ {
		if a.Cut(rest) == b.Cut(rest) {
			same++
		}
		rest = rest[a.Cut(rest):]
	}
	if same > n/10 {
		t.Errorf("%d of %d cuts are equal under another seed", same, n)
	}
}

// The mean and the numbers for a fixed seed: a change of either stores everything anew.
func TestGolden(t *testing.T) {
	c := New([32]byte{42}, Params{Min: 4 << 10, Avg: 16 << 10, Max: 64 << 10})
	data := random(42, 8<<20)
	list := chunks(c, data)
	h := sha256.New()
	for _, p := range list {
		h.Write([]byte{byte(len(p)), byte(len(p) >> 8), byte(len(p) >> 16)})
	}
	mean := len(data) / len(list)
	if mean < 14<<10 || mean > 20<<10 {
		t.Errorf("mean size %d", mean)
	}
	if got, want := [2]int{len(list), int(h.Sum(nil)[0])}, [2]int{451, 108}; got != want {
		t.Errorf("%v, not %v", got, want)
	}
}

func TestBadParams(t *testing.T) {
	for _, p := range []Params{{1, 2, 3}, {64, 63, 100}, {64, 100, 99}} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%+v is accepted", p)
				}
			}()
			New([32]byte{}, p)
		}()
	}
}
