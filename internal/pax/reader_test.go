package pax_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/pax/paxtest"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestReader(t *testing.T) {
	var w paxtest.Writer
	w.Add(paxtest.Item{Type: '0', Name: "\xff raw", Mode: 0o4711, UID: 1 << 20, GID: 5, Sec: -2, Nsec: 250000000, Data: []byte("hello"),
		Rec: map[string]string{"hdrcharset": "BINARY", "mtime": "-1.75", "uid": "4000000000", pax.Xattr + "user.empty": "", pax.Xattr + "user.a%3Db%25": "x\ny=z"}})
	w.Add(paxtest.Item{Type: '0', Name: "unread", Data: make([]byte, 100_000)})
	w.Add(paxtest.Item{Type: '3', Name: "dev", Rdev: 259, Sec: 1 << 40})
	r := pax.NewReader(iotest.OneByteReader(bytes.NewReader(w.End())))
	h, err := r.Next()
	check(t, err)
	if h.Name != "\xff raw" || h.UID != 4000000000 || h.GID != 5 || h.Mode != 0o4711 || h.Sec != -2 || h.Nsec != 250000000 || h.Size != 5 {
		t.Errorf("got %+v", h)
	}
	if v, ok := h.Records[pax.Xattr+"user.empty"]; !ok || v != "" {
		t.Errorf("an attribute without a value is %q, %v", v, ok)
	}
	if v := h.Records[pax.Xattr+"user.a%3Db%25"]; v != "x\ny=z" {
		t.Errorf("an attribute is %q", v)
	}
	if b, err := io.ReadAll(r); string(b) != "hello" || err != nil {
		t.Errorf("content %q, %v", b, err)
	}
	if h, err = r.Next(); err != nil || h.Name != "unread" || h.Size != 100_000 {
		t.Errorf("got %+v, %v", h, err)
	}
	if h, err = r.Next(); err != nil || h.Name != "dev" || h.Type != '3' || h.Major != 1 || h.Minor != 3 || h.Sec != 1<<40 {
		t.Errorf("got %+v, %v", h, err)
	}
	if _, err := r.Next(); err != io.EOF {
		t.Errorf("got %v", err)
	}
}

// TestReaderTakesManyAttributes: 20 of 60 KB are what a file on XFS can have, and more than the 1 MiB
// that archive/tar takes.
func TestReaderTakesManyAttributes(t *testing.T) {
	rec := map[string]string{}
	for i := range 20 {
		rec[fmt.Sprintf("%suser.%02d", pax.Xattr, i)] = strings.Repeat("v", 60_000)
	}
	var w paxtest.Writer
	w.Add(paxtest.Item{Type: '0', Name: "f", Rec: rec})
	h, err := pax.NewReader(bytes.NewReader(w.End())).Next()
	check(t, err)
	if n := len(h.Records[pax.Xattr+"user.19"]); n != 60_000 {
		t.Errorf("the last attribute has %d bytes", n)
	}
	w = paxtest.Writer{}
	w.Block('x', "pax", "", &paxtest.Item{}, pax.HeaderLimit+1)
	if _, err := pax.NewReader(bytes.NewReader(w.End())).Next(); !errors.Is(err, pax.ErrDamaged) {
		t.Errorf("a header above the limit: %v", err)
	}
}

// TestReaderGlobalRecords: they count for what follows, where an entry has none of its own; an empty one takes
// them back; and one that comes between an entry and its extended header leaves that alone.
func TestReaderGlobalRecords(t *testing.T) {
	var w paxtest.Writer
	extended := func(kind byte, rec ...string) {
		p := ""
		for i := 0; i < len(rec); i += 2 {
			p += paxtest.Record(rec[i], rec[i+1])
		}
		w.Block(kind, "pax", "", &paxtest.Item{}, len(p))
		w.Padded([]byte(p))
	}
	entry := func() { w.Block('0', "f", "", &paxtest.Item{UID: 7, GID: 8, Sec: 9}, 0) }
	extended('g', "uid", "77", "mtime", "1.5", "a", "global", "b", "global")
	entry()
	extended('x', "uid", "5", "gid", "6", "a", "own")
	entry()
	extended('x', "uid", "", "mtime", "", "path", "own", "c", "x")
	extended('g', "gid", "88", "path", "nowhere", "comment", "longer than what came before it")
	entry()
	entry()
	r := pax.NewReader(bytes.NewReader(w.End()))
	for i, want := range []pax.Header{
		{Name: "f", UID: 77, GID: 8, Sec: 1, Nsec: 5e8, Records: map[string]string{"a": "global", "b": "global"}},
		{Name: "f", UID: 5, GID: 6, Sec: 1, Nsec: 5e8, Records: map[string]string{"a": "own", "b": "global"}},
		{Name: "own", UID: 7, GID: 88, Sec: 9, Records: map[string]string{"a": "global", "b": "global", "c": "x", "comment": "longer than what came before it"}},
		{Name: "nowhere", UID: 77, GID: 88, Sec: 1, Nsec: 5e8, Records: map[string]string{"a": "global", "b": "global", "comment": "longer than what came before it"}},
	} {
		want.Type = '0'
		h, err := r.Next()
		check(t, err)
		if !reflect.DeepEqual(*h, want) {
			t.Errorf("entry %d is %+v, not %+v", i, *h, want)
		}
	}
}

// TestReaderRefusesNumbers: fields of extended headers that are no numbers, or too large.
func TestReaderRefusesNumbers(t *testing.T) {
	for _, rec := range [][2]string{
		{"uid", "4294967296"}, {"gid", "-1"}, {"gid", "1x"}, {"size", "9223372036854775808"}, {"size", "+1"}, {"size", " 1"},
		{"mtime", "1.5x"}, {"mtime", "x"}, {"mtime", "."}, {"mtime", "9223372036854775808"},
	} {
		var w paxtest.Writer
		w.Add(paxtest.Item{Type: '0', Name: "f", Rec: map[string]string{rec[0]: rec[1]}})
		if _, err := pax.NewReader(bytes.NewReader(w.End())).Next(); !errors.Is(err, pax.ErrDamaged) || !strings.Contains(err.Error(), rec[0]) {
			t.Errorf("%s=%s: %v", rec[0], rec[1], err)
		}
	}
}

// TestReaderAgreesWithArchiveTar reads what the standard library writes.
func TestReaderAgreesWithArchiveTar(t *testing.T) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	at := time.Unix(1_700_000_000, 123456789)
	for _, h := range []tar.Header{
		{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o755, ModTime: at, Format: tar.FormatPAX},
		{Typeflag: tar.TypeReg, Name: strings.Repeat("long/", 60) + "ünï", Mode: 0o644, Uid: 1 << 30, Size: 3, ModTime: at, Format: tar.FormatPAX},
		{Typeflag: tar.TypeReg, Name: "gnu", Uid: 1 << 30, Size: 3, ModTime: at.Truncate(time.Second), Format: tar.FormatGNU},
		{Typeflag: tar.TypeSymlink, Name: "s", Linkname: strings.Repeat("x", 200), ModTime: at, Format: tar.FormatPAX},
		{Typeflag: tar.TypeReg, Name: strings.Repeat("p", 90) + "/" + strings.Repeat("n", 90), Size: 3, ModTime: at.Truncate(time.Second), Format: tar.FormatUSTAR},
	} {
		check(t, w.WriteHeader(&h))
		if h.Size > 0 {
			_, err := w.Write([]byte("abc"))
			check(t, err)
		}
	}
	check(t, w.Close())
	r, s := pax.NewReader(bytes.NewReader(buf.Bytes())), tar.NewReader(bytes.NewReader(buf.Bytes()))
	for {
		got, err := r.Next()
		want, err2 := s.Next()
		if err2 == io.EOF && err == io.EOF {
			return
		}
		check(t, err)
		check(t, err2)
		if got.Name != want.Name || got.Link != want.Linkname || got.Type != want.Typeflag || got.Size != want.Size ||
			int(got.UID) != want.Uid || !time.Unix(got.Sec, got.Nsec).Equal(want.ModTime) {
			t.Errorf("got %+v\nwant %+v", got, want)
		}
	}
}

func TestReaderRefusesDamage(t *testing.T) {
	var w paxtest.Writer
	w.Add(paxtest.Item{Type: '0', Name: "f", Data: []byte("hello")})
	whole := w.End()
	read := func(p []byte) error {
		r := pax.NewReader(bytes.NewReader(p))
		for {
			if _, err := r.Next(); err != nil {
				return err
			}
		}
	}
	if err := read(whole); err != io.EOF {
		t.Fatal(err)
	}
	for n := 0; n < len(whole); n += 100 {
		if err := read(whole[:n]); !errors.Is(err, pax.ErrDamaged) {
			t.Errorf("cut at %d: %v", n, err)
		}
	}
	head := func(p string) []byte {
		var w paxtest.Writer
		w.Block('x', "pax", "", &paxtest.Item{}, len(p))
		w.Padded([]byte(p))
		w.Block('0', "f", "", &paxtest.Item{}, 0)
		return w.End()
	}
	alter := func(at int, p string) []byte {
		out := bytes.Clone(whole)
		copy(out[at:], p)
		return out
	}
	lone := &paxtest.Writer{}
	lone.Block('x', "pax", "", &paxtest.Item{}, 6)
	lone.Padded([]byte("6 a=b\n"))
	for name, p := range map[string][]byte{
		"checksum":         alter(148, "0000000"),
		"a lone zero":      append(bytes.Clone(whole[:len(whole)-512]), bytes.Repeat([]byte{'x'}, 512)...),
		"header alone":     lone.End(),
		"no length":        head("a=b\n"),
		"length too long":  head("7 a=b\n"),
		"length too short": head("4 a=b\n"),
		"no key":           head("5 =b\n"),
		"no equals sign":   head("5 ab\n"),
		"bad size":         head("10 size=x\n"),
		"bad uid":          head("18 uid=4294967296\n"),
		"bad time":         head("13 mtime=1.x\n"),
		"big length":       head("9999999999 a=b\n"),
	} {
		if err := read(p); !errors.Is(err, pax.ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := read(head("6 a=b\n")); err != io.EOF {
		t.Errorf("a good header is refused: %v", err)
	}
	// An error of the disk is no damage.
	bad := errors.New("disk")
	if _, err := pax.NewReader(iotest.ErrReader(bad)).Next(); err != bad {
		t.Errorf("got %v", err)
	}
}

func TestParseTime(t *testing.T) {
	for in, want := range map[string][2]int64{"0": {}, "5.5": {5, 5e8}, "-0.5": {-1, 5e8}, "-1": {-1, 0}, "1.1234567899": {1, 123456789}, "-3.000000001": {-4, 999999999}} {
		s, n, err := pax.ParseTime([]byte(in))
		if err != nil || s != want[0] || n != want[1] {
			t.Errorf("%s: %d %d %v", in, s, n, err)
		}
	}
}

// seedArchive holds each kind of entry.
func seedArchive() []byte {
	var w paxtest.Writer
	w.Add(paxtest.Item{Type: '5', Name: "./", Mode: 0o755})
	w.Add(paxtest.Item{Type: '0', Name: "\xff/x", Data: []byte("data"), Rec: map[string]string{"hdrcharset": "BINARY", pax.Xattr + "user.a%3Db": "v"}})
	w.Add(paxtest.Item{Type: '0', Name: "c", Rec: map[string]string{pax.Content: "/a/b", pax.Size: "9", pax.Holes: "0:4"}})
	w.Add(paxtest.Item{Type: '1', Name: "l", Link: "c"})
	w.Add(paxtest.Item{Type: '2', Name: "s", Link: "../x"})
	w.Add(paxtest.Item{Type: '3', Name: "dev", Rdev: 259, Sec: -1, Nsec: 5})
	w.Add(paxtest.Item{Type: '0', Name: "sock", Rec: map[string]string{pax.Type: pax.Socket}})
	w.Block('g', "g", "", &paxtest.Item{}, len(paxtest.Record("uid", "77")))
	w.Padded([]byte(paxtest.Record("uid", "77")))
	w.Add(paxtest.Item{Type: '6', Name: "fifo"})
	return w.End()
}

// FuzzReader: no archive makes the reader misbehave.
func FuzzReader(f *testing.F) {
	whole := seedArchive()
	f.Add(whole)
	f.Add(whole[:1500])
	f.Add(make([]byte, 1024))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, p []byte) {
		r := pax.NewReader(bytes.NewReader(p))
		r.TakeAnySum()
		for {
			h, err := r.Next()
			if err != nil {
				if err != io.EOF && !errors.Is(err, pax.ErrDamaged) {
					t.Fatalf("strange error: %v", err)
				}
				return
			}
			if h.Size < 0 || h.Nsec < 0 || h.Nsec >= 1e9 || h.Mode > 0o7777 {
				t.Fatalf("header %+v", h)
			}
			n, err := io.Copy(io.Discard, r)
			if err == nil && n != h.Size || err != nil && !errors.Is(err, pax.ErrDamaged) {
				t.Fatalf("%d bytes of %d, %v", n, h.Size, err)
			}
			last := int64(0)
			if holes, err := pax.ParseHoles(h.Records[pax.Holes], h.Size); err == nil {
				for _, x := range holes {
					if x.Off < last || x.Len <= 0 || x.End() > h.Size {
						t.Fatalf("holes %v of %d bytes", holes, h.Size)
					}
					last = x.End()
				}
			}
		}
	})
}

// BenchmarkReader reads headers as an archive of a store has them: a time to the nanosecond with each, and what
// some say about their content.
func BenchmarkReader(b *testing.B) {
	var w paxtest.Writer
	const entries = 1000
	for i := range entries {
		it := paxtest.Item{Type: '5', Name: fmt.Sprintf("spaces/ab/nodes/%02x/0f/", i), Mode: 0o700, UID: 1000, GID: 1000, Sec: 1_700_000_000, Nsec: 123456789}
		if i%8 == 0 {
			it.Type, it.Rec = '0', map[string]string{pax.Content: "/storage/users/spaces/a/b", pax.Size: "17000"}
		}
		w.Add(it)
	}
	p := w.End()
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	for b.Loop() {
		r := pax.NewReader(bytes.NewReader(p))
		n := 0
		for ; ; n++ {
			if _, err := r.Next(); err == io.EOF {
				break
			} else if err != nil {
				b.Fatal(err)
			}
		}
		if n != entries {
			b.Fatal(n)
		}
	}
}
