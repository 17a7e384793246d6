package storegen

import (
	"crypto/md5"
	"crypto/sha1"
	"encoding/binary"
	"hash"
	"hash/adler32"
	"io"
	"math"
	"math/rand/v2"
	"sync"
)

// checksums are those that a server records.
type checksums struct {
	sha1  [sha1.Size]byte
	md5   [md5.Size]byte
	adler [adler32.Size]byte
}

// filler makes contents. It is for one goroutine.
type filler struct {
	buf   []byte
	sha1  hash.Hash
	md5   hash.Hash
	adler hash.Hash32
}

func newFiller() *filler {
	return &filler{buf: make([]byte, 256<<10), sha1: sha1.New(), md5: md5.New(), adler: adler32.New()}
}

// write writes the content of it to w, which may be nil, and returns its checksums.
func (f *filler) write(w io.Writer, it item) (checksums, error) {
	f.sha1.Reset()
	f.md5.Reset()
	f.adler.Reset()
	next := source(it)
	for left := it.size; left > 0; {
		b := f.buf[:min(left, int64(len(f.buf)))]
		next(b)
		f.sha1.Write(b)
		f.md5.Write(b)
		f.adler.Write(b)
		if w != nil {
			if _, err := w.Write(b); err != nil {
				return checksums{}, err
			}
		}
		left -= int64(len(b))
	}
	var c checksums
	f.sha1.Sum(c.sha1[:0])
	f.md5.Sum(c.md5[:0])
	f.adler.Sum(c.adler[:0])
	return c, nil
}

// source returns a function that fills buffers with the content one after the other.
func source(it item) func([]byte) {
	var seed [32]byte
	r := rng(it.key)
	for i := 0; i < len(seed); i += 8 {
		binary.LittleEndian.PutUint64(seed[i:], r.next())
	}
	if it.kind == dense {
		c := rand.NewChaCha8(seed)
		return func(b []byte) { _, _ = c.Read(b) } // never fails
	}
	return proseSource(r)
}

// words is a made-up vocabulary, and the words drawn from it by Zipf's law, one for each 16 bits.
// Text made of it takes about a third of its size when compressed, as real text and tables do.
var words = sync.OnceValue(func() *[1 << 16][]byte {
	const vocabulary = 6000
	r := rng(20220103)
	list := make([][]byte, vocabulary)
	for i := range list {
		switch {
		case i%11 == 7: // a number
			n := r.below(1000000)
			b := []byte{}
			for ; n > 0; n /= 10 {
				b = append(b, byte('0'+n%10))
			}
			list[i] = append(b, ' ')
		default:
			var b []byte
			for range 1 + r.below(4) {
				b = append(b, "bdfghklmnprstvwz"[r.below(16)], "aeiou"[r.below(5)])
				if r.below(3) == 0 {
					b = append(b, "nrslt"[r.below(5)])
				}
			}
			sep := " "
			switch i % 17 {
			case 3:
				sep = ", "
			case 5:
				sep = ".\n"
			case 9:
				sep = ";"
			}
			list[i] = append(b, sep...)
		}
	}
	total := 0.0
	for i := range list {
		total += 1 / math.Pow(float64(i+2), 0.9)
	}
	table := new([1 << 16][]byte)
	at, sum := 0, 1/math.Pow(2, 0.9)
	for i := range table {
		for float64(i)/float64(len(table)) > sum/total && at < len(list)-1 {
			at++
			sum += 1 / math.Pow(float64(at+2), 0.9)
		}
		table[i] = list[at]
	}
	return table
})

func proseSource(r rng) func([]byte) {
	table := words()
	var rest []byte // what of the last word did not fit
	return func(b []byte) {
		n := copy(b, rest)
		rest = rest[n:]
		for n < len(b) {
			x := r.next()
			for range 4 {
				word := table[x&0xffff]
				x >>= 16
				c := copy(b[n:], word)
				n += c
				if c < len(word) {
					rest = word[c:]
					return
				}
			}
		}
	}
}
