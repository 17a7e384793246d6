package snapshot

import (
	"testing"
)

func BenchmarkEncodeTree(b *testing.B) {
	nodes := sampleNodes()
	b.SetBytes(int64(len(EncodeTree(nodes))))
	b.ReportAllocs()
	var w TreeWriter
	for b.Loop() {
		w.Reset()
		for _, n := range nodes {
			w.Add(n)
		}
		w.Bytes()
	}
}

func BenchmarkDecodeTree(b *testing.B) {
	p := EncodeTree(sampleNodes())
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := DecodeTree(p); err != nil {
			b.Fatal(err)
		}
	}
}
