package crypto

import (
	"fmt"
	"testing"
)

func BenchmarkSeal(b *testing.B) {
	k := NewKey()
	for _, n := range []int{4 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("%dKiB", n>>10), func(b *testing.B) {
			plain, buf := make([]byte, n), make([]byte, 0, n+Overhead)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				k.Seal(buf, plain)
			}
		})
	}
}

func BenchmarkOpen(b *testing.B) {
	k := NewKey()
	sealed := k.Seal(nil, make([]byte, 1<<20))
	work := make([]byte, len(sealed))
	b.SetBytes(1 << 20)
	b.ReportAllocs()
	for b.Loop() {
		copy(work, sealed)
		if _, err := k.Open(work); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkKDF(b *testing.B) {
	for b.Loop() {
		if _, err := DefaultKDF.Derive("x", make([]byte, SaltSize)); err != nil {
			b.Fatal(err)
		}
	}
}
