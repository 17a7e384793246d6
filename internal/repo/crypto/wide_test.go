package crypto

import (
	"bytes"
	"crypto/cipher"
	"encoding/hex"
	"math/rand/v2"
	"testing"

	//lint:ignore SA1019 the repository format prescribes it
	"golang.org/x/crypto/poly1305"
)

// narrow is the same key without the instructions.
func narrow(k *Key) *Key {
	n := *k
	n.wide = nil
	return &n
}

// With the instructions and without, the same comes out: all short lengths, and such around the steps.
func TestWideIsTheSame(t *testing.T) {
	random := rand.NewChaCha8([32]byte{3})
	var lengths []int
	for n := range 1100 {
		lengths = append(lengths, n)
	}
	for _, n := range []int{wideStep, 2 * wideStep, 5*wideStep + ctrStep, 1 << 20} {
		for d := -2; d <= 2; d++ {
			lengths = append(lengths, n+d)
		}
	}
	for _, n := range lengths {
		k := NewKey()
		iv, plain := make([]byte, ivSize), make([]byte, n)
		random.Read(iv)
		random.Read(plain)
		switch n % 5 {
		case 1:
			copy(iv[8:], "\xff\xff\xff\xff\xff\xff\xff\xfe") // the lower half of the counter overflows
		case 2:
			copy(iv[8:], "\x00\x00\x00\x00\xff\xff\xff\xfe") // a quarter does
		case 3:
			for i := range plain {
				plain[i] = 0xff
			}
		}
		before := bytes.Clone(plain)
		want, got := make([]byte, n), make([]byte, n)
		var wantMAC, gotMAC [macSize]byte
		narrow(k).seal(wantMAC[:], want, iv, plain)
		k.seal(gotMAC[:], got, iv, plain)
		if !bytes.Equal(got, want) || gotMAC != wantMAC {
			t.Fatalf("%d bytes: text is the same: %v, MAC %x, want %x", n, bytes.Equal(got, want), gotMAC, wantMAC)
		}
		if mac := k.sum(iv, got); mac != wantMAC {
			t.Fatalf("%d bytes: MAC alone %x, want %x", n, mac, wantMAC)
		}
		if !bytes.Equal(plain, before) {
			t.Fatalf("%d bytes: the plaintext was changed", n)
		}
		k.crypt(got, iv, got)
		if !bytes.Equal(got, plain) {
			t.Fatalf("%d bytes: not decrypted in place", n)
		}
	}
}

// Nothing before or after the buffers is touched, wherever they begin.
func TestWideKeepsWithinBounds(t *testing.T) {
	k := NewKey()
	iv := bytes.Repeat([]byte{5}, ivSize)
	for _, n := range []int{1, 127, 128, 255, 256, 257, 1000, 4096} {
		for shift := range 65 {
			plain := bytes.Repeat([]byte{7}, n+200)[shift:][:n]
			buf := bytes.Repeat([]byte{0xee}, n+200)
			var mac [macSize]byte
			k.seal(mac[:], buf[shift:shift+n], iv, plain)
			for i, b := range buf {
				if (i < shift || i >= shift+n) && b != 0xee {
					t.Fatalf("%d bytes at %d: byte %d was written", n, shift, i)
				}
			}
			want := make([]byte, n)
			cipher.NewCTR(k.enc, iv).XORKeyStream(want, plain)
			if !bytes.Equal(buf[shift:shift+n], want) {
				t.Fatalf("%d bytes at %d: wrong text", n, shift)
			}
		}
	}
}

// The arithmetic where it is most likely to go wrong: sums near the modulus 2^130-5, factors with all bits that are allowed. The
// vectors of RFC 8439, A.3, are those where implementations went wrong.
func TestPolyEdges(t *testing.T) {
	if !hasWide {
		t.Log("this processor has no VAES and IFMA")
		return
	}
	check := func(name string, one [32]byte, text []byte) {
		t.Helper()
		var want [macSize]byte
		poly1305.Sum(&want, text, &one)
		k := newWideKey(&[32]byte{1}, (*[16]byte)(one[:16]))
		if got := k.sum(text, (*[16]byte)(one[16:])); got != want {
			t.Errorf("%s, %d bytes: %x, want %x", name, len(text), got, want)
		}
	}
	key := func(r, s string) (one [32]byte) {
		for i, x := range []string{r, s} {
			p, err := hex.DecodeString(x)
			if err != nil || len(p) != 16 {
				t.Fatal(x, err)
			}
			copy(one[16*i:], p)
		}
		return one
	}
	const zero, ones = "00000000000000000000000000000000", "ffffffffffffffffffffffffffffffff"
	keys := map[string][32]byte{
		"r 0":           key(zero, ones),
		"r 1":           key("01000000000000000000000000000000", zero),
		"r 2":           key("02000000000000000000000000000000", ones),
		"r 4":           key("04000000000000000000000000000000", zero),
		"r 1 + 4*2^64":  key("01000000000000000400000000000000", zero),
		"r the largest": key(ones, ones),
	}
	for name, one := range keys {
		for _, fill := range []byte{0, 1, 0xfb, 0xff} {
			for n := range 700 {
				check(name, one, bytes.Repeat([]byte{fill}, n))
			}
			check(name, one, bytes.Repeat([]byte{fill}, 3*wideStep+77))
		}
		// Blocks that are just below, at and above the modulus.
		for low := 0xf0; low <= 0xff; low++ {
			block := append([]byte{byte(low)}, bytes.Repeat([]byte{0xff}, 15)...)
			for _, n := range []int{1, 2, 7, 8, 9, 16, 17, 24} {
				check(name, one, bytes.Repeat(block, n))
				check(name, one, append(make([]byte, 16*(n-1)), block...))
			}
		}
	}
	random := rand.NewChaCha8([32]byte{4})
	for range 3000 {
		var one [32]byte
		random.Read(one[:])
		text := make([]byte, random.Uint64()%600)
		random.Read(text)
		check("random", one, text)
	}
}
