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

// A chunk that stays in the caches, with nothing to find.
func BenchmarkScan(b *testing.B) {
	c := New([32]byte{1}, Params{})
	data := random(1, 1<<20)
	for name, fn := range map[string]func([]byte, uint64, uint64) (int, uint64){"lanes": c.scan, "one": c.scanOne} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				fn(data, 1, 0)
			}
		})
	}
}
