package zstdfast

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"slices"
	"testing"
	"unsafe"

	"github.com/klauspost/compress/zstd"
)

func randomBytes(n int, seed uint64) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	return b
}

// prose is n bytes of made-up words, some far more frequent than others.
func prose(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, 0, n+16)
	for len(b) < n {
		w := r.ExpFloat64() * 500
		b = fmt.Appendf(b, "%x", uint64(w)*2654435761%(1<<28))
		b = append(b, " .,;\n"[r.IntN(5)])
	}
	return b[:n]
}

// records look like a table of a program: short fields that repeat at the same distance.
func records(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 2))
	b := make([]byte, 0, n+64)
	for i := uint64(0); len(b) < n; i++ {
		b = append(b, byte(i), byte(i>>8), 0, 0, 7, byte(r.IntN(4)), 0, 0, 0, 0, 0, byte(r.IntN(256)), 1, 2, 3, 4, 5, 6, 7, 8)
	}
	return b[:n]
}

func samples() map[string][]byte {
	m := map[string][]byte{
		"zeros":             make([]byte, 3*blockBytes+5),
		"one byte, one not": append(bytes.Repeat([]byte{'a'}, 5000), 'b'),
		"noise":             randomBytes(2*blockBytes+77, 1),
		"prose":             prose(1<<20+12345, 1),
		"records":           records(300000, 1),
		"half noise":        slices.Concat(prose(blockBytes, 2), randomBytes(blockBytes, 2), prose(blockBytes, 2), randomBytes(3000, 3)),
		"noise, again":      slices.Concat(randomBytes(blockBytes, 4), randomBytes(blockBytes, 4)),
		"just too far":      slices.Concat(randomBytes(Window, 5), randomBytes(2000, 5)),
		"just near enough":  slices.Concat(randomBytes(Window-1, 6), randomBytes(2000, 6)),
		"long period":       bytes.Repeat(randomBytes(100_000, 7), 5),
		"few symbols":       nil,
	}
	r := rand.New(rand.NewPCG(1, 3))
	few := make([]byte, 200_000)
	for i := range few {
		few[i] = "aab"[r.IntN(3)]
	}
	m["few symbols"] = few
	// Matches that all have the same length and distance of literals, and so need one code only.
	var even []byte
	word := randomBytes(8, 9)
	for range 10_000 {
		even = append(even, byte(r.IntN(256)), byte(r.IntN(256)))
		even = append(even, word...)
	}
	m["even"] = even
	// Much of one kind, then little of many, so that frequencies must be rounded up.
	skewed := bytes.Repeat([]byte("abcdefgh"), 4000)
	for i := range 300 {
		skewed = append(skewed, randomBytes(i, uint64(i))...)
		skewed = append(skewed, skewed[i*i%1000:i*i%1000+6+i]...)
	}
	m["skewed"] = skewed
	return m
}

func decode(t *testing.T, frame []byte) []byte {
	t.Helper()
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(Window))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	out, err := d.DecodeAll(frame, nil)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestRoundTrip(t *testing.T) {
	var e Encoder
	for name, src := range samples() {
		frame := e.Append([]byte("before"), src)
		if string(frame[:6]) != "before" {
			t.Fatalf("%s: what was in the buffer is lost", name)
		}
		if !bytes.Equal(decode(t, frame[6:]), src) {
			t.Errorf("%s: not the same", name)
		}
		if most := len(src) + 10 + 3*(len(src)/blockBytes+1); len(frame)-6 > most {
			t.Errorf("%s: %d bytes became %d, more than %d", name, len(src), len(frame)-6, most)
		}
	}
}

// Any length, so that each kind of end is met; one encoder for all, so that nothing is left over from the last.
func TestLengths(t *testing.T) {
	var e Encoder
	text, noise := prose(2*blockBytes, 3), randomBytes(2*blockBytes, 3)
	lengths := []int{}
	for n := range 700 {
		lengths = append(lengths, n)
	}
	for n := -20; n < 100; n += 3 {
		lengths = append(lengths, 1024+n, 4096+n, 16384+n, blockBytes+n)
	}
	for _, n := range lengths {
		for _, src := range [][]byte{text[:n], noise[:n], bytes.Repeat([]byte{'x'}, n), append(slices.Clone(noise[:n/2]), noise[:n-n/2]...)} {
			src = slices.Clip(src)
			if !bytes.Equal(decode(t, e.Append(nil, src)), src) {
				t.Fatalf("%d bytes: not the same", n)
			}
		}
	}
}

// What the window forbids is not used, and what it allows is.
func TestWindow(t *testing.T) {
	var e Encoder
	s := samples()
	if far, near := len(e.Append(nil, s["just too far"])), len(e.Append(nil, s["just near enough"])); far < Window+2000 || near > Window+1000 {
		t.Errorf("repeated beyond the window: %d bytes, within it: %d", far, near)
	}
}

func TestRatio(t *testing.T) {
	fastest, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithWindowSize(Window), zstd.WithEncoderCRC(false))
	if err != nil {
		t.Fatal(err)
	}
	var e Encoder
	for _, name := range []string{"zeros", "prose", "records", "long period", "few symbols", "even", "skewed"} {
		src := samples()[name]
		ours, theirs := len(e.Append(nil, src)), len(fastest.EncodeAll(src, nil))
		t.Logf("%s: %d bytes, %d, %d by the fastest level of the library", name, len(src), ours, theirs)
		if ours > theirs+theirs/10+200 {
			t.Errorf("%s: %d bytes, %d by the fastest level of the library", name, ours, theirs)
		}
	}
}

// The assembler finds what the plain code finds.
func TestCandidates(t *testing.T) {
	a, b := new(finder), new(finder)
	for name, src := range samples() {
		src = src[:min(len(src), 40_000)]
		a.reset(logOf(src))
		b.reset(logOf(src))
		for p := uint(1); p+margin <= uint(len(src)); p += look {
			base := unsafe.Pointer(unsafe.SliceData(src))
			if x, y := a.candidates(base, p, look), b.candidates64(base, p); x != y || a.at != b.at {
				t.Fatalf("%s, at %d: %064b %v, %064b %v", name, p, x, a.at, y, b.at)
			}
		}
		if a.table != b.table {
			t.Fatalf("%s: other tables", name)
		}
	}
}

// The assembler encodes as the plain code does.
func TestEncode(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 5))
	for range 300 {
		matches := make([]match, 1+r.IntN(2000))
		for i := range matches {
			matches[i] = match{r.Uint32N(1 << r.IntN(17)), r.Uint32N(1 << r.IntN(17)), 1 + r.Uint32N(1<<r.IntN(20))}
		}
		plain, fast := make([]sequence, len(matches)), make([]sequence, len(matches))
		var countPlain, countFast [3][maxSymbols]uint32
		encodeGo(plain, matches, &countPlain)
		encode(fast, matches, &countFast)
		if !slices.Equal(plain, fast) || countPlain != countFast {
			t.Fatalf("%v: %v, not %v", matches, fast, plain)
		}
		e := Encoder{counts: countPlain}
		last := plain[len(plain)-1]
		for i, s := range [3]uint8{last.literals, last.offset, last.match} {
			if _, mode := e.tables[i].choose(nil, e.counts[i][:], len(plain), s, 9-uint8(i)%2); mode == 0 {
				e.tables[i] = [3]table{litTable, offsetTable, matchTable}[i]
			}
		}
		var out [2][]byte
		for i := range out {
			buf := make([]byte, len(plain)*10+16)
			w := bitWriter{
				to: unsafe.Pointer(&buf[0]), acc: 5, fill: 3,
				literals: e.tables[0].first(last.literals), offset: e.tables[1].first(last.offset), match: e.tables[2].first(last.match),
			}
			if i == 0 {
				w.writeGo(plain[:len(plain)-1], &e.tables[0], &e.tables[1], &e.tables[2])
			} else {
				w.write(plain[:len(plain)-1], &e.tables[0], &e.tables[1], &e.tables[2])
			}
			out[i] = fmt.Append(buf[:uintptr(w.to)-uintptr(unsafe.Pointer(&buf[0]))], w.acc, w.fill, w.literals, w.offset, w.match)
		}
		if !bytes.Equal(out[0], out[1]) {
			t.Fatalf("other bits of %v", matches)
		}
	}
}

func TestNormalize(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 4))
	for range 20_000 {
		log := uint8(6 + r.IntN(4))
		count := make([]uint32, 2+r.IntN(52))
		n := uint32(0)
		for i := range count {
			switch r.IntN(4) {
			case 0:
			case 1:
				count[i] = 1
			default:
				count[i] = uint32(1) << r.IntN(1+r.IntN(14))
			}
			if i == len(count)-1 {
				count[i] = max(1, count[i])
			}
			n += count[i]
		}
		norm := make([]int16, len(count))
		normalize(norm, count, n, log)
		sum := 0
		for i, v := range norm {
			if (v > 0) != (count[i] > 0) || v < 0 {
				t.Fatalf("%v: %v", count, norm)
			}
			sum += int(v)
		}
		if sum != 1<<log {
			t.Fatalf("%v: %v add up to %d instead of %d", count, norm, sum, 1<<log)
		}
	}
}

// The reference implementation reads what is written, where it is installed.
func TestReference(t *testing.T) {
	tool, err := exec.LookPath("zstd")
	if err != nil {
		t.Fatal("zstd is not installed; scripts/install-test-deps.sh installs it")
	}
	var e Encoder
	for name, src := range samples() {
		c := exec.CommandContext(t.Context(), tool, "-dc", "-q", fmt.Sprintf("--memory=%d", Window))
		c.Stdin = bytes.NewReader(e.Append(nil, src))
		out, err := c.Output()
		if err != nil || !bytes.Equal(out, src) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzRoundTrip(f *testing.F) {
	for _, s := range samples() {
		f.Add(s[:min(len(s), 5000)], uint16(3))
	}
	var e Encoder
	f.Fuzz(func(t *testing.T, src []byte, times uint16) {
		src = bytes.Repeat(src, 1+int(times)%300)
		if !bytes.Equal(decode(t, e.Append(nil, src)), src) {
			t.Error("not the same")
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	s := samples()
	for _, name := range []string{"prose", "records", "noise", "zeros"} {
		src := s[name]
		for _, n := range []int{4 << 10, len(src)} {
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				var e Encoder
				buf := make([]byte, 0, 2*len(src))
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for b.Loop() {
					e.Append(buf[:0], src[:n])
				}
			})
		}
	}
}

func TestRepeats(t *testing.T) {
	var e Encoder
	half := append(make([]byte, 0, 40<<10), randomBytes(20<<10, 1)...)
	for _, tt := range []struct {
		name        string
		src         []byte
		least, most int
	}{
		{"nothing", nil, 0, 0},
		{"noise", randomBytes(100<<10, 2), 0, 0},
		{"twice the same", append(half, half...), 19 << 10, 20 << 10},
		{"zeros, of which 128 KiB are looked at", make([]byte, 1<<20), blockBytes - 64, blockBytes},
	} {
		if n := e.Repeats(tt.src); n < tt.least || n > tt.most {
			t.Errorf("%s: %d", tt.name, n)
		}
	}
	if out := e.Append(nil, half); len(out) < 20<<10 {
		t.Error("what Repeats saw changes the next frame")
	}
}
