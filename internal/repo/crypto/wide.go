package crypto

import (
	"encoding/binary"
	"math/bits"
)

// wideKey seals with the instructions of processors that encrypt four blocks at once (VAES), and multiply eight numbers of 52 bits
// (IFMA): both passes in a third of the time. Nothing it does depends on what is secret but the values.
//
// Poly1305 (RFC 8439, 2.5) is a polynomial: block by block, h = (h + block) * r. Eight lanes take every eighth block each, with r^8 instead
// of r, and are put together at the end.
type wideKey struct {
	rounds [240]byte // the key schedule of AES-256: FIPS 197, 5.2
	powers [9]limbs  // of r; the first is not used
	by     [5]uint64 // r^8 for polyIFMA
}

const (
	ctrStep  = 256 // bytes, of ctrVAES
	polyStep = 128 // bytes, of polyIFMA
	// wideStep is what is encrypted and summed in turn, so that the sum finds it in the nearest cache; no goroutine can be stopped
	// in the middle of it.
	wideStep = 16 << 10
)

// limbs is a number modulo 2^130-5 in limbs of 44, 44 and 42 bits, which may be some larger.
type limbs [3]uint64

const (
	mask44 = 1<<44 - 1
	mask42 = 1<<42 - 1
)

// newWideKey returns nil where the instructions are missing.
func newWideKey(encrypt *[32]byte, macR *[16]byte) *wideKey {
	if !hasWide {
		return nil
	}
	k := new(wideKey)
	var w [60]uint32
	for i := range 8 {
		w[i] = binary.LittleEndian.Uint32(encrypt[4*i:])
	}
	rcon := uint32(1)
	for i := 8; i < len(w); i++ {
		t := w[i-1]
		switch i % 8 {
		case 0:
			t = subWord(bits.RotateLeft32(t, -8)) ^ rcon
			rcon <<= 1
		case 4:
			t = subWord(t)
		}
		w[i] = w[i-8] ^ t
	}
	for i, x := range w {
		binary.LittleEndian.PutUint32(k.rounds[4*i:], x)
	}
	lo := binary.LittleEndian.Uint64(macR[:]) & 0x0ffffffc0fffffff
	hi := binary.LittleEndian.Uint64(macR[8:]) & 0x0ffffffc0ffffffc
	r := limbs{lo & mask44, (lo>>44 | hi<<20) & mask44, hi >> 24}
	k.powers[1] = r
	for i := 2; i < len(k.powers); i++ {
		k.powers[i] = r.times(k.powers[i-1])
	}
	e := k.powers[8]
	k.by = [5]uint64{e[0], e[1], e[2], 20 * e[1], 20 * e[2]}
	return k
}

// counterOf returns the counter that starts at iv, low half first, or false if the lower half would overflow within a blob.
func counterOf(iv []byte) ([2]uint64, bool) {
	lo := binary.BigEndian.Uint64(iv[8:])
	return [2]uint64{lo, binary.BigEndian.Uint64(iv)}, lo < 1<<64-1<<32
}

// seal encrypts plain to text, and returns the MAC of that. pad is what RFC 8439 calls s.
func (k *wideKey) seal(text, plain []byte, counter [2]uint64, pad *[16]byte) [macSize]byte {
	var lanes [3][8]uint64
	text = text[:len(plain)] // the assembler does not look
	n := len(plain) &^ (ctrStep - 1)
	for i := 0; i < n; i += wideStep {
		size := min(n-i, wideStep)
		ctrVAES(&k.rounds, &counter, &text[i], &plain[i], size/ctrStep)
		polyIFMA(&lanes, &k.by, &text[i], size/polyStep)
	}
	k.cryptTail(text[n:], plain[n:], &counter)
	return k.finish(&lanes, text[n:], pad)
}

// crypt encrypts or decrypts src to dst, which may be the same.
func (k *wideKey) crypt(dst, src []byte, counter [2]uint64) {
	dst = dst[:len(src)]
	n := len(src) &^ (ctrStep - 1)
	for i := 0; i < n; i += wideStep {
		ctrVAES(&k.rounds, &counter, &dst[i], &src[i], min(n-i, wideStep)/ctrStep)
	}
	k.cryptTail(dst[n:], src[n:], &counter)
}

// cryptTail is crypt for less than a step.
func (k *wideKey) cryptTail(dst, src []byte, counter *[2]uint64) {
	if len(src) == 0 {
		return
	}
	var buf [ctrStep]byte
	copy(buf[:], src)
	ctrVAES(&k.rounds, counter, &buf[0], &buf[0], 1)
	copy(dst, buf[:])
	clear(buf[:])
}

// sum returns the MAC of text.
func (k *wideKey) sum(text []byte, pad *[16]byte) [macSize]byte {
	var lanes [3][8]uint64
	n := len(text) &^ (polyStep - 1)
	for i := 0; i < n; i += wideStep {
		polyIFMA(&lanes, &k.by, &text[i], min(n-i, wideStep)/polyStep)
	}
	return k.finish(&lanes, text[n:], pad)
}

// finish puts the lanes together, and adds the rest of the text, of any length, and pad.
func (k *wideKey) finish(lanes *[3][8]uint64, rest []byte, pad *[16]byte) (mac [macSize]byte) {
	var h limbs
	for i, block := range [8]int{0, 4, 1, 5, 2, 6, 3, 7} { // the order of polyIFMA
		p := limbs{lanes[0][i], lanes[1][i], lanes[2][i]}.times(k.powers[8-block])
		h = limbs{h[0] + p[0], h[1] + p[1], h[2] + p[2]}
	}
	h = h.carried()
	for len(rest) > 0 {
		var block [16]byte
		n := copy(block[:], rest)
		top := uint64(1 << 40) // 2^128
		if n < len(block) {
			block[n], top = 1, 0
		}
		rest = rest[n:]
		lo, hi := binary.LittleEndian.Uint64(block[:]), binary.LittleEndian.Uint64(block[8:])
		h = limbs{h[0] + lo&mask44, h[1] + (lo>>44|hi<<20)&mask44, h[2] + (hi>>24 | top)}.times(k.powers[1])
	}
	h = h.carried() // the limbs have their sizes now: only the lowest could be too large, by 160 at most
	// Less 2^130-5, if it is not less than that.
	var g limbs
	g[0] = h[0] + 5
	g[1] = h[1] + g[0]>>44
	g[2] = h[2] + g[1]>>44 - 1<<42
	keep := -(g[2] >> 63) // all ones if it is negative
	for i := range h {
		h[i] = h[i]&keep | g[i]&^keep
	}
	h[0], h[1], h[2] = h[0]&mask44, h[1]&mask44, h[2]&mask42
	lo, c := bits.Add64(h[0]|h[1]<<44, binary.LittleEndian.Uint64(pad[:]), 0)
	hi, _ := bits.Add64(h[1]>>20|h[2]<<24, binary.LittleEndian.Uint64(pad[8:]), c)
	binary.LittleEndian.PutUint64(mac[:], lo)
	binary.LittleEndian.PutUint64(mac[8:], hi)
	return mac
}

// times multiplies. The limbs of both may have up to 47 bits.
func (a limbs) times(b limbs) limbs {
	b20 := limbs{0, 20 * b[1], 20 * b[2]} // 2^132 is 4 times 2^130, and that counts five times
	h0, l0 := sum3(a[0], b[0], a[1], b20[2], a[2], b20[1])
	h1, l1 := sum3(a[0], b[1], a[1], b[0], a[2], b20[2])
	h2, l2 := sum3(a[0], b[2], a[1], b[1], a[2], b[0])
	var c uint64
	l1, c = bits.Add64(l1, h0<<20|l0>>44, 0)
	h1 += c
	l2, c = bits.Add64(l2, h1<<20|l1>>44, 0)
	h2 += c
	return limbs{l0&mask44 + 5*(h2<<22|l2>>42), l1 & mask44, l2 & mask42}.carried()
}

// carried brings the limbs back to their sizes, but for a bit or so.
func (a limbs) carried() limbs {
	a[1] += a[0] >> 44
	a[2] += a[1] >> 44
	return limbs{a[0]&mask44 + 5*(a[2]>>42), a[1] & mask44, a[2] & mask42}
}

// sum3 returns a*b + c*d + e*f.
func sum3(a, b, c, d, e, f uint64) (hi, lo uint64) {
	hi, lo = bits.Mul64(a, b)
	for _, p := range [2][2]uint64{{c, d}, {e, f}} {
		h, l := bits.Mul64(p[0], p[1])
		var carry uint64
		lo, carry = bits.Add64(lo, l, 0)
		hi += h + carry
	}
	return hi, lo
}
