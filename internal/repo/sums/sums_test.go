package sums

import (
	"crypto/sha1"
	"crypto/sha256"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"
)

func random(n int) []byte {
	p := make([]byte, n)
	c := rand.NewChaCha8([32]byte{7})
	_, _ = c.Read(p)
	return p
}

// each runs f as a processor without the instructions would, and as this one does.
func each(t *testing.T, f func(t *testing.T, start func() *SHA1)) {
	t.Run("library", func(t *testing.T) { f(t, func() *SHA1 { return &SHA1{std: sha1.New()} }) })
	t.Run("processor", func(t *testing.T) { f(t, New) })
}

// All lengths around the borders of blocks, at all distances from a border that earlier bytes left.
func TestSumsAreThoseOfTheLibrary(t *testing.T) {
	p := random(700)
	each(t, func(t *testing.T, start func() *SHA1) {
		for before := range 130 {
			for n := range 330 {
				s := start()
				s.Write(p[:before])
				piece := p[before : before+n : before+n]
				if got := s.Sum256(piece); got != sha256.Sum256(piece) {
					t.Fatalf("SHA-256 of %d bytes after %d", n, before)
				}
				if s.Sum() != sha1.Sum(p[:before+n]) {
					t.Fatalf("SHA-1 of %d and %d bytes", before, n)
				}
			}
		}
	})
}

func TestPiecesOfAnySize(t *testing.T) {
	p := random(3 << 20)
	r := rand.New(rand.NewPCG(1, 2))
	each(t, func(t *testing.T, start func() *SHA1) {
		for range 30 {
			s, at := start(), 0
			for at < len(p) {
				n := min(len(p)-at, r.IntN(1<<r.IntN(21)+1))
				if s.Sum256(p[at:at+n]) != sha256.Sum256(p[at:at+n]) {
					t.Fatalf("SHA-256 of %d bytes at %d", n, at)
				}
				at += n
				if r.IntN(40) == 0 && s.Sum() != sha1.Sum(p[:at]) { // a look does not end it
					t.Fatalf("SHA-1 of %d bytes", at)
				}
			}
			if s.Sum() != sha1.Sum(p) {
				t.Fatal("SHA-1 of all")
			}
		}
	})
}

func TestPair(t *testing.T) {
	p := random(1 << 20)
	check := func(a, b []byte) {
		t.Helper()
		if x, y := Pair(a, b); x != sha256.Sum256(a) || y != sha256.Sum256(b) {
			t.Fatalf("SHA-256 of %d and %d bytes", len(a), len(b))
		}
	}
	for n := range 200 {
		for m := range 200 {
			check(p[:n], p[1000:1000+m])
		}
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		i, j := r.IntN(len(p)), r.IntN(len(p))
		check(p[i:], p[j:])
	}
}

func FuzzSums(f *testing.F) {
	f.Add([]byte("abc"), uint8(1))
	f.Fuzz(func(t *testing.T, a []byte, cut uint8) {
		n := min(int(cut), len(a))
		s := New()
		if s.Sum256(a[:n]) != sha256.Sum256(a[:n]) || s.Sum256(a[n:]) != sha256.Sum256(a[n:]) || s.Sum() != sha1.Sum(a) {
			t.Error("sums differ")
		}
	})
}

func BenchmarkSums(b *testing.B) {
	p := random(1 << 20)
	b.Run("together", func(b *testing.B) {
		b.SetBytes(1 << 20)
		s := New()
		for b.Loop() {
			s.Sum256(p)
		}
	})
	b.Run("apart", func(b *testing.B) {
		b.SetBytes(1 << 20)
		for b.Loop() {
			sha1.Sum(p)
			sha256.Sum256(p)
		}
	})
	b.Run("two files", func(b *testing.B) {
		if !hardware {
			b.Skip("this processor hashes one at a time")
		}
		b.SetBytes(2 << 20)
		q, m := slices.Clone(p), NewMulti(nil)
		s, o := m.New(), m.New()
		for b.Loop() {
			x, y := start256, start256
			together(&job{h: &x, g: &s.h, p: p, q: p, blocks: len(p) / block}, &job{h: &y, g: &o.h, p: q, q: q, blocks: len(p) / block}, len(p)/block)
		}
	})
	b.Run("pair", func(b *testing.B) {
		b.SetBytes(2 << 20)
		q := slices.Clone(p)
		for b.Loop() {
			Pair(p, q)
		}
	})
	b.Run("one", func(b *testing.B) {
		b.SetBytes(1 << 20)
		for b.Loop() {
			sha256.Sum256(p)
		}
	})
}

// Pieces of all sizes of many files at a time, some alone, some together, some given up by the other in the middle.
func TestMultiIsAsAlone(t *testing.T) {
	p := random(4 << 20)
	for _, tt := range []struct {
		name     string
		spare    func(int) bool
		patience time.Duration
	}{
		{"waits", func(int) bool { return true }, patience},
		{"waits in vain", func(int) bool { return true }, time.Microsecond},
		{"never waits", func(int) bool { return false }, patience},
		{"waits while others work", func(parked int) bool { return parked < 4 }, patience},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := NewMulti(tt.spare)
			m.patience = tt.patience
			var wg sync.WaitGroup
			for i := range 8 {
				wg.Go(func() {
					r := rand.New(rand.NewPCG(uint64(i), 2))
					for range 10 {
						s, at := m.New(), 0
						for at < len(p) {
							n := min(len(p)-at, r.IntN(1<<r.IntN(22)+1))
							if s.Sum256(p[at:at+n]) != sha256.Sum256(p[at:at+n]) {
								t.Errorf("SHA-256 of %d bytes at %d", n, at)
								return
							}
							at += n
						}
						if s.Sum() != sha1.Sum(p) {
							t.Error("SHA-1 of all")
						}
					}
				})
			}
			wg.Wait()
			if hardware && tt.name == "waits" && m.shared == 0 {
				t.Error("none met another")
			}
			if m.parked != 0 || m.waiting != nil {
				t.Errorf("%d are parked, %v waits", m.parked, m.waiting)
			}
		})
	}
}

// Four sums of four texts, which lie anywhere, end anywhere, and begin where others ended.
func TestTogether(t *testing.T) {
	if !hardware {
		t.Log("this processor hashes one at a time")
		return
	}
	p := random(1 << 20)
	for _, n := range []int{1, 2, 511, 512, 513, 1024, 1025} {
		for off := range 16 {
			jobs, alone := [2]job{}, [2]job{}
			for i := range jobs {
				texts := [2][]byte{p[i*300_000+off:], p[i*300_000+150_000+3*off:]}
				start := job{p: texts[0][:n*block+5], q: texts[1][:n*block+5], blocks: n + i}
				h, g := start256, start1
				h[off%8], g[off%5] = uint32(off), uint32(n+i)
				h2, g2 := h, g
				jobs[i], alone[i] = start, start
				jobs[i].h, jobs[i].g = &h, &g
				alone[i].h, alone[i].g = &h2, &g2
				for left := n; left > 0; left -= step {
					alone[i].alone(min(step, left))
				}
			}
			together(&jobs[0], &jobs[1], n)
			for i := range jobs {
				if *jobs[i].h != *alone[i].h || *jobs[i].g != *alone[i].g || jobs[i].blocks != i || len(jobs[i].p) != 5 || len(jobs[i].q) != 5 {
					t.Fatalf("job %d, %d blocks at %d: %+v", i, n, off, jobs[i])
				}
			}
		}
	}
}

// Who has waited in vain tells others, and small pieces wait for nobody and are waited for by nobody.
func TestMultiGivesUp(t *testing.T) {
	if !hardware {
		t.Log("this processor hashes one at a time")
		return
	}
	p := random(1 << 20)
	var asked []int
	m := NewMulti(func(parked int) bool { asked = append(asked, parked); return true })
	m.patience = time.Nanosecond
	for range 1 + 1 + 1 + 3 + 1 + 7 + 1 {
		m.New().Sum256(p[:worthWaiting*block])
	}
	// Between those that asked more do not, each time.
	if !slices.Equal(asked, []int{1, 1, 1, 1}) || m.vain != 4 {
		t.Errorf("asked with %d parked, %d in vain", asked, m.vain)
	}
	// Nor was it in vain for one that has met another and has used up its time.
	met := &job{met: true, back: make(chan struct{}, 1)}
	m.waiting, m.parked = met, 1
	if m.wait(met, time.NewTimer(0)) || m.vain != 4 || m.parked != 0 || m.waiting != nil {
		t.Errorf("who had met another counts: %d in vain, %d parked", m.vain, m.parked)
	}
	m.skip, asked = 0, nil
	m.New().Sum256(p[:(worthWaiting-1)*block])
	if asked != nil {
		t.Error("a small piece would wait")
	}
	waiting := &job{blocks: 1000}
	m.waiting = waiting
	m.New().Sum256(p[:(worthJoining-1)*block])
	if m.waiting != waiting || m.shared != 0 {
		t.Error("a small piece has woken who waits")
	}
}

// Who waits is done by the next who comes, all of what the two have in common.
func TestMultiShares(t *testing.T) {
	if !hardware {
		t.Log("this processor hashes one at a time")
		return
	}
	p := random(1 << 20)
	asked := 0
	m := NewMulti(func(int) bool { asked++; return asked == 1 }) // what the first has beyond the second it does alone
	m.patience = time.Minute
	m.vain = 3
	done := make(chan struct{})
	go func() {
		defer close(done)
		if m.New().Sum256(p) != sha256.Sum256(p) {
			t.Error("SHA-256 of who waited")
		}
	}()
	var first *job
	for first == nil {
		m.mu.Lock()
		first = m.waiting
		m.mu.Unlock()
	}
	if q := p[:1<<19]; m.New().Sum256(q) != sha256.Sum256(q) {
		t.Error("SHA-256 of who came")
	}
	<-done
	if m.shared != 1<<19/block || m.vain != 0 || !first.met {
		t.Errorf("%d blocks were shared, %d waited in vain, the first has met another: %v", m.shared, m.vain, first.met)
	}
}
