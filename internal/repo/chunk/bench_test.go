package chunk

import (
	"testing"
)

func BenchmarkCut(b *testing.B) {
	c := New([32]byte{1}, Params{})
	data := random(1, 64<<20)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		for rest := data; len(rest) > 0; {
			rest = rest[c.Cut(rest):]
		}
	}
}
