package index

import (
	"testing"

	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/repo/pack"
)

func BenchmarkDecode(b *testing.B) {
	p := text(100, 500)
	b.Run("own/50000", func(b *testing.B) {
		b.SetBytes(int64(len(p)))
		b.ReportAllocs()
		for b.Loop() {
			if err := Decode(p, func(id.ID, []pack.Entry) error { return nil }); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("encodingjson/50000", func(b *testing.B) {
		b.SetBytes(int64(len(p)))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := slowDecode(p); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkAdd(b *testing.B) {
	list := make([]pack.Entry, 1_000_000)
	for i := range list {
		list[i] = blob(i)
	}
	b.ReportAllocs()
	for b.Loop() {
		x := New(Options{})
		for i := range list {
			x.Add(uint32(i/20), list[i])
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/1e6, "ns/blob")
}

func BenchmarkFirst(b *testing.B) {
	x := New(Options{})
	ids := make([]id.ID, 1_000_000)
	for i := range ids {
		e := blob(i)
		e.Type = 0
		x.Add(0, e)
		ids[i] = e.ID
	}
	i := 0
	for b.Loop() {
		x.First(0, ids[i])
		if i += 7919; i >= len(ids) {
			i -= len(ids)
		}
	}
}
