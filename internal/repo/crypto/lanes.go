package crypto

import "encoding/binary"

// mixing is a step of one lane: out becomes scryptBlockMix of in XOR with. out overlaps neither.
type mixing struct{ out, in, with *byte }

// permuted is the place in a block of Salsa20 of each of its words in memory.
func permuted(i int) int { return i * 5 % 16 }

// roMix2 does what roMix does with two lanes, side by side. Both may be the same.
func roMix2(a, b, va, vb []byte, n int) {
	size := len(a)
	if size == 0 || size%128 != 0 || len(b) != size || len(va) < n*size || len(vb) < n*size { // the assembler does not look
		panic("scrypt: lanes of different lengths")
	}
	pairs := size / 128
	none := make([]byte, size)
	ya, yb := make([]byte, 2*size), make([]byte, 2*size)
	xa, ya := ya[:size], ya[size:]
	xb, yb := yb[:size], yb[size:]
	at := func(v []byte, i int) *byte { return &v[i*size : (i+1)*size][0] }
	for i := 0; i < size; i += 4 {
		from := i&^63 + permuted(i/4%16)*4
		copy(va[i:i+4], a[from:])
		copy(vb[i:i+4], b[from:])
	}
	for i := range n - 1 {
		mix(&mixing{at(va, i+1), at(va, i), &none[0]}, &mixing{at(vb, i+1), at(vb, i), &none[0]}, pairs)
	}
	mix(&mixing{&xa[0], at(va, n-1), &none[0]}, &mixing{&xb[0], at(vb, n-1), &none[0]}, pairs)
	// Word 0 stands where it stood.
	index := func(x []byte) int { return int(binary.LittleEndian.Uint32(x[size-64:]) & uint32(n-1)) }
	for range n {
		mix(&mixing{&ya[0], &xa[0], at(va, index(xa))}, &mixing{&yb[0], &xb[0], at(vb, index(xb))}, pairs)
		xa, ya, xb, yb = ya, xa, yb, xb
	}
	for i := 0; i < size; i += 4 {
		to := i&^63 + permuted(i/4%16)*4
		copy(a[to:to+4], xa[i:])
		copy(b[to:to+4], xb[i:])
	}
}
