package repo

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/repo/index"
	"github.com/holdfast-backup/holdfast/internal/repo/pack"
)

// sink swallows packs, so that the benchmarks measure the engine and not memory.
type sink struct{ *mem.Backend }

func (s sink) Save(ctx context.Context, h backend.Handle, data []byte) error {
	if h.Type == backend.PackFile || h.Type == backend.IndexFile {
		return ctx.Err()
	}
	return s.Backend.Save(ctx, h, data)
}

func (s sink) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	return s.Backend.Load(ctx, h, length, offset, fn)
}

func BenchmarkSave(b *testing.B) {
	const size = 1 << 20
	for _, c := range []struct {
		name string
		data []byte
		o    Options
	}{
		{"text", text(1, size), Options{}}, {"noise", noise(1, size), Options{}},
		{"text-off", text(1, size), Options{Compression: CompressionOff}}, {"small", noise(1, 4<<10), Options{}},
	} {
		b.Run(fmt.Sprintf("%s/%dKiB", c.name, len(c.data)>>10), func(b *testing.B) {
			ctx := context.Background()
			r := initRepo(b, sink{mem.New()}, InitOptions{Options: c.o})
			w := r.NewWriter(ctx)
			b.SetBytes(int64(len(c.data)))
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				binary.LittleEndian.PutUint64(c.data, uint64(i))
				if _, _, err := w.Save(ctx, DataBlob, c.data); err != nil {
					b.Fatal(err)
				}
			}
			if err := w.Flush(ctx); err != nil {
				b.Fatal(err)
			}
		})
	}
	b.Run("known/1024KiB", func(b *testing.B) {
		ctx := context.Background()
		data := noise(1, size)
		w := initRepo(b, mem.New(), InitOptions{}).NewWriter(ctx)
		b.SetBytes(size)
		b.ReportAllocs()
		for b.Loop() {
			if _, _, err := w.Save(ctx, DataBlob, data); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// The decode-check alone, to see its share of what compressing takes.
func BenchmarkCompressBlob(b *testing.B) {
	for name, data := range map[string][]byte{"text": text(1, 1<<20), "noise": noise(1, 1<<20)} {
		b.Run(name+"/1024KiB", func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			c := new(compressor)
			for b.Loop() {
				if _, _, err := c.blob(data, CompressionAuto, DataBlob); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	data := text(1, 1<<20)
	out := new(compressor).encode(data, false)
	b.Run("encode-only/1024KiB", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(data)))
		c := new(compressor)
		for b.Loop() {
			c.encode(data, false)
		}
	})
	b.Run("decode-only/1024KiB", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(data)))
		buf := make([]byte, 0, 1<<20)
		for b.Loop() {
			if _, err := decompressBlob(buf, out, len(data)); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("sampling/1024KiB", func(b *testing.B) {
		p := noise(1, 1<<20)
		b.ReportAllocs()
		b.SetBytes(int64(len(p)))
		c := new(compressor)
		for b.Loop() {
			c.incompressible(p)
		}
	})
}

func BenchmarkLoadBlobs(b *testing.B) {
	ctx := context.Background()
	r := initRepo(b, mem.New(), InitOptions{})
	w := r.NewWriter(ctx)
	var ids []ID
	for i := range 64 {
		d, _ := save(b, w, DataBlob, noise(byte(i), 1<<20))
		ids = append(ids, d)
	}
	if err := w.Flush(ctx); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(64 << 20)
	b.ReportAllocs()
	for b.Loop() {
		if err := r.LoadBlobs(ctx, DataBlob, ids, func(ID, []byte) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLoadIndex(b *testing.B) {
	const files, perFile, perPack = 20, 50_000, 20
	ctx := context.Background()
	r := initRepo(b, mem.New(), InitOptions{})
	n, size := uint64(0), 0
	next := func() ID {
		n++
		return id.Hash(binary.LittleEndian.AppendUint64(nil, n))
	}
	for range files {
		body := []byte(index.Header)
		for p := range perFile / perPack {
			if p > 0 {
				body = append(body, ',')
			}
			var blobs []pack.Entry
			for i := range perPack {
				blobs = append(blobs, pack.Entry{ID: next(), Offset: uint32(i * 700_000), Length: 700_000, Plain: 1_500_000})
			}
			body = index.AppendPack(body, next(), blobs)
		}
		size += len(body)
		if _, err := r.SaveUnpacked(ctx, backend.IndexFile, append(body, index.Footer...)); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("1000000blobs", func(b *testing.B) {
		b.SetBytes(int64(size))
		b.ReportAllocs()
		for b.Loop() {
			if err := r.LoadIndex(ctx); err != nil {
				b.Fatal(err)
			}
		}
	})
}
