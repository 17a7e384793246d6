package crypto

import (
	"crypto/pbkdf2"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"sync"
	"sync/atomic"

	//lint:ignore SA1019 scrypt is made of this function; deprecated is its use for encryption
	"golang.org/x/crypto/salsa20/salsa"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/cpus"
)

// scryptMemory bounds in bytes what the lanes under way take together, unless one takes more.
const scryptMemory = 64 << 20

// scryptKey is scrypt (RFC 7914) with its lanes side by side. golang.org/x/crypto/scrypt computes them one after the
// other, and every command waits for it. The parameters must have passed Check.
func scryptKey(password string, salt []byte, f KDF, size int) ([]byte, error) {
	lane := 128 * f.R
	b, err := pbkdf2.Key(sha256.New, password, salt, 1, f.P*lane)
	if err != nil {
		return nil, err
	}
	width := 1 // lanes that one goroutine does side by side
	if hasLanes && f.P > 1 && 2*lane*f.N <= scryptMemory {
		width = 2
	}
	var wg sync.WaitGroup
	var next atomic.Int64
	for range max(1, min((f.P+width-1)/width, cpus.Count(), scryptMemory/(width*lane*f.N))) {
		wg.Go(func() {
			v, free := scratch(width * lane * f.N)
			defer free()
			for {
				i := int(next.Add(int64(width))) - width
				if i >= f.P {
					return
				}
				x := b[i*lane : (i+1)*lane]
				switch {
				case !hasLanes:
					roMix(x, v, f.N)
				case width == 1 || i+1 == f.P:
					roMix2(x, x, v, v, f.N) // the second lane costs little where there is none
				default:
					roMix2(x, b[(i+1)*lane:(i+2)*lane], v[:lane*f.N], v[lane*f.N:], f.N)
				}
			}
		})
	}
	wg.Wait()
	return pbkdf2.Key(sha256.New, password, b, 1, size)
}

// scratch returns memory that free gives back at once, not when the collector comes to it. The kernel gives it page by page, a
// third of the work; so it is asked to do so while lanes are begun, where there is another processor.
func scratch(size int) (p []byte, free func()) {
	p, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return make([]byte, size), func() {}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		const step = 1 << 20
		half := size / 2
		for i := 0; i < half; i += step {
			for _, at := range [2]int{i, half + i} {
				if unix.Madvise(p[at:min(at+step, size)], unix.MADV_POPULATE_WRITE) != nil {
					return
				}
			}
		}
	}()
	return p, func() {
		<-done
		_ = unix.Munmap(p)
	}
}

// roMix is scryptROMix of RFC 7914, section 5. v has room for n times x.
func roMix(x, v []byte, n int) {
	size := len(x)
	y := make([]byte, size)
	for i := range n {
		copy(v[i*size:], x)
		blockMix(y, x)
		x, y = y, x
	}
	for range n {
		j := int(binary.LittleEndian.Uint64(x[size-64:]) & uint64(n-1))
		subtle.XORBytes(x, x, v[j*size:(j+1)*size])
		blockMix(y, x)
		x, y = y, x
	}
	// n is even, so x is what it was at the beginning.
}

// blockMix is scryptBlockMix of RFC 7914, section 4.
func blockMix(out, in []byte) {
	half := len(in) / 2
	t := [64]byte(in[len(in)-64:])
	for i := 0; i < len(in); i += 64 {
		subtle.XORBytes(t[:], t[:], in[i:i+64])
		salsa.Core208(&t, &t)
		to := i / 2
		if i/64%2 == 1 {
			to = half + (i-64)/2
		}
		copy(out[to:to+64], t[:])
	}
}
