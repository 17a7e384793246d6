package sums

import (
	"crypto/sha1" //nolint:gosec // see sums.go
	"crypto/sha256"
	"encoding/binary"

	"github.com/klauspost/cpuid/v2"
)

var hardware = cpuid.CPU.Supports(cpuid.SHA, cpuid.SSSE3, cpuid.SSE4)

// both adds blocks at p256 to h256 and as many at p1 to h1. There must be one at least.
//
//go:noescape
func both(h256 *[8]uint32, h1 *[5]uint32, p256, p1 *byte, blocks int)

// two adds blocks at pa to ha and as many at pb to hb. There must be one at least.
//
//go:noescape
func two(ha, hb *[8]uint32, pa, pb *byte, blocks int)

// four is both for two texts: blocks at pa to ha and as many at qa to ga, blocks at pb to hb and as many at qb to gb.
// There must be one at least.
//
//go:noescape
func four(ha, hb *[8]uint32, ga, gb *[5]uint32, pa, pb, qa, qb *byte, blocks int)

// pair is Pair with the instructions.
func pair(a, b []byte) (sumA, sumB [sha256.Size]byte) {
	ha, hb := start256, start256
	n := min(len(a), len(b)) / block
	for i := 0; i < n; i += step {
		two(&ha, &hb, &a[i*block], &b[i*block], min(step, n-i))
	}
	return finish256(&ha, a[n*block:], len(a)), finish256(&hb, b[n*block:], len(b))
}

func (s *SHA1) sum256(p []byte) [sha256.Size]byte {
	h := start256
	rest := p // of what goes into the SHA-1
	if n := int(s.size % block); n > 0 {
		k := copy(s.tail[n:], rest)
		rest = rest[k:]
		if n+k == block {
			other := start256
			both(&other, &s.h, &s.tail[0], &s.tail[0], 1)
		}
	}
	s.size += uint64(len(p))
	n := len(rest) / block
	if s.multi != nil && n >= worthJoining {
		h = s.shared(p, rest, n)
	} else {
		for i := 0; i < n; i += step {
			both(&h, &s.h, &p[i*block], &rest[i*block], min(step, n-i))
		}
	}
	if k := int(s.size % block); len(rest) > 0 {
		copy(s.tail[:k], rest[n*block:])
	}
	// What the SHA-1 had too little of, or had in its tail: two blocks at most, and the last one.
	return finish256(&h, p[n*block:], len(p))
}

// shared is for n blocks of p and of rest that are enough to share a processor with those of another.
func (s *SHA1) shared(p, rest []byte, n int) [8]uint32 {
	h := start256
	s.multi.run(&job{h: &h, g: &s.h, p: p, q: rest, blocks: n})
	return h
}

// alone does n blocks of j, at most step.
func (j *job) alone(n int) {
	both(j.h, j.g, &j.p[0], &j.q[0], n)
	j.advance(n)
}

// together does n blocks of each.
func together(a, b *job, n int) {
	for n > 0 {
		k := min(step/2, n)
		four(a.h, b.h, a.g, b.g, &a.p[0], &b.p[0], &a.q[0], &b.q[0], k)
		a.advance(k)
		b.advance(k)
		n -= k
	}
}

func (s *SHA1) sum() (sum [sha1.Size]byte) {
	h, other := s.h, start256
	var end [2 * block]byte
	n := copy(end[:], s.tail[:s.size%block])
	n = pad(&end, n, s.size)
	both(&other, &h, &end[0], &end[0], n)
	for i, w := range h {
		binary.BigEndian.PutUint32(sum[4*i:], w)
	}
	return sum
}

// finish256 adds the last bytes of a text of the given size to h, and returns the sum.
func finish256(h *[8]uint32, rest []byte, size int) (sum [sha256.Size]byte) {
	other := start1
	for len(rest) >= block {
		n := min(step, len(rest)/block)
		both(h, &other, &rest[0], &rest[0], n)
		rest = rest[n*block:]
	}
	var end [2 * block]byte
	n := pad(&end, copy(end[:], rest), uint64(size))
	both(h, &other, &end[0], &end[0], n)
	for i, w := range h {
		binary.BigEndian.PutUint32(sum[4*i:], w)
	}
	return sum
}

// pad ends a text of size bytes, of which the last n, less than a block, are in end. It returns how many blocks
// that makes.
func pad(end *[2 * block]byte, n int, size uint64) int {
	end[n] = 0x80
	blocks := 1
	if n+1+8 > block {
		blocks = 2
	}
	binary.BigEndian.PutUint64(end[blocks*block-8:], 8*size)
	return blocks
}
