package pack

import (
	"bytes"
	"os"
	"slices"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/repo/crypto"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

var samples = []Entry{
	{ID: id.Hash([]byte("a")), Type: DataBlob, Offset: 0, Length: 40},
	{ID: id.Hash([]byte("b")), Type: TreeBlob, Offset: 40, Length: 32},
	{ID: id.Hash([]byte("c")), Type: DataBlob, Offset: 72, Length: 53, Plain: 12},
	{ID: id.Hash([]byte("d")), Type: TreeBlob, Offset: 125, Length: 1000, Plain: 5000},
}

func TestWriter(t *testing.T) {
	key := crypto.NewKey()
	w := NewWriter(make([]byte, 0, 100))
	for _, e := range samples {
		add(w, e.Type, e.ID, bytes.Repeat([]byte{byte(e.Type)}, int(e.Length)), e.Plain)
	}
	size := w.Size()
	if w.Count() != len(samples) {
		t.Errorf("%d blobs", w.Count())
	}
	file, entries := w.Finish(key)
	if int64(len(file)) != size || size != samples[3].End()+FooterSize(entries) {
		t.Errorf("file of %d bytes, announced as %d", len(file), size)
	}
	n, err := HeaderLength(file, size)
	if err != nil {
		t.Fatal(err)
	}
	got, err := OpenHeader(key, bytes.Clone(file[len(file)-4-n:len(file)-4]))
	if err != nil || !slices.Equal(got, samples) || !slices.Equal(entries, samples) {
		t.Errorf("read back %v, %v", got, err)
	}
	for i, e := range got {
		if want := []int64{8, 0, 12, 5000}[i]; e.PlainSize() != want {
			t.Errorf("plain size %d, not %d", e.PlainSize(), want)
		}
	}
	if _, err := OpenHeader(crypto.NewKey(), file[len(file)-4-n:len(file)-4]); err == nil {
		t.Error("a foreign key opens the header")
	}
}

func TestHeaderLength(t *testing.T) {
	for _, c := range []struct {
		name string
		tail []byte
		size int64
		ok   bool
	}{
		{"smallest", []byte{69, 0, 0, 0}, 73, true},
		{"file too short", []byte{69, 0, 0, 0}, 72, false},
		{"no entry", []byte{32, 0, 0, 0}, 1000, false},
		{"too long", []byte{0, 0, 0, 2}, 1 << 31, false},
		{"nothing", nil, 0, false},
	} {
		if _, err := HeaderLength(c.tail, c.size); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestBadHeaders(t *testing.T) {
	good := AppendHeader(nil, samples)
	for n := 1; n < len(good); n++ {
		if n == 37 || n == 74 || n == 115 {
			continue // whole entries
		}
		if _, err := ParseHeader(good[:n]); err == nil {
			t.Errorf("cut to %d bytes: no error", n)
		}
	}
	huge := AppendHeader(nil, []Entry{{Length: 1 << 31}, {Length: 1 << 31}})
	if _, err := ParseHeader(huge); err == nil {
		t.Error("4 GiB: no error")
	}
	unknown := bytes.Clone(good)
	unknown[0] = 4
	if _, err := ParseHeader(unknown); err == nil {
		t.Error("unknown type: no error")
	}
}

// What parses, encodes to the same bytes.
func FuzzParseHeader(f *testing.F) {
	f.Add([]byte{})
	f.Add(AppendHeader(nil, samples))
	for i := range samples {
		f.Add(AppendHeader(nil, samples[i:i+1]))
	}
	f.Add([]byte("\x02\x35\x00\x00\x00\x0c\x00\x00\x00cut off"))
	f.Fuzz(func(t *testing.T, p []byte) {
		entries, err := ParseHeader(p)
		if err != nil {
			return
		}
		if again := AppendHeader(nil, entries); !bytes.Equal(again, p) {
			t.Errorf("%x became %x", p, again)
		}
		if FooterSize(entries) != int64(len(p))+36 {
			t.Error("wrong footer size")
		}
	})
}

func TestSeedsExist(t *testing.T) {
	list, err := os.ReadDir("testdata/fuzz/FuzzParseHeader")
	if err != nil || len(list) == 0 {
		t.Fatalf("no seeds for the fuzz target: %v", err)
	}
}

func add(w *Writer, t BlobType, blob id.ID, sealed []byte, plain uint32) {
	copy(w.Reserve(t, blob, len(sealed), plain), sealed)
}
