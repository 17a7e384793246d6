package repo

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/zstd"

	"github.com/holdfast-backup/holdfast/internal/cpus"
	"github.com/holdfast-backup/holdfast/internal/repo/zstdfast"
)

// Compression says how hard to compress.
type Compression uint8

// The compression modes.
const (
	// CompressionAuto compresses what can be compressed, about as well as restic does by default.
	CompressionAuto Compression = iota
	// CompressionOff compresses nothing but trees and small files, where the format wants it.
	CompressionOff
	// CompressionMax takes several times as long and saves some percent.
	CompressionMax
)

// ParseCompression reads "auto", "off" or "max".
func ParseCompression(s string) (Compression, error) {
	switch s {
	case "auto", "":
		return CompressionAuto, nil
	case "off":
		return CompressionOff, nil
	case "max":
		return CompressionMax, nil
	}
	return 0, fmt.Errorf("unknown compression %q; choose auto, off or max", s)
}

func (c Compression) String() string {
	switch c {
	case CompressionOff:
		return "off"
	case CompressionMax:
		return "max"
	}
	return "auto"
}

// CompressionMax is for who has more time than space. Measured on an EPYC core, chunks of 1.5 MiB; the first line is package zstdfast, the others are levels of the library:
//
//	            made-up prose      Go source          an executable
//	auto        0.338, 460 MB/s    0.136, 810 MB/s    0.453, 480 MB/s
//	fastest     0.343, 255 MB/s    0.140, 570 MB/s    0.463, 335 MB/s
//	default     0.331, 185 MB/s    0.129, 450 MB/s    0.440, 220 MB/s
//
// restic writes the default level with a window of 512 KiB.
const windowMax = 8 << 20 // what decoders must be able to hold stays small

// The encoders and the decoders keep one state for each processor and may be called concurrently.
var (
	encoderMax = sync.OnceValue(func() *zstd.Encoder {
		return newEncoder(zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithWindowSize(windowMax))
	})
	// encoderOther is for what the usual one got wrong.
	encoderOther = sync.OnceValue(func() *zstd.Encoder {
		return newEncoder(zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithWindowSize(zstdfast.Window))
	})

	// Readers of the format accept windows up to 512 MiB. The capacity limit makes the size that
	// the index tells the bound of what a blob can become.
	decoder = sync.OnceValue(func() *zstd.Decoder {
		return newDecoder(zstd.WithDecodeAllCapLimit(true))
	})
	fileDecoder = sync.OnceValue(func() *zstd.Decoder {
		return newDecoder(zstd.WithDecoderMaxMemory(16 << 30))
	})
)

func newEncoder(o ...zstd.EOption) *zstd.Encoder {
	e, err := zstd.NewWriter(nil, append(o, zstd.WithEncoderCRC(false),
		// Off: a single-segment frame makes the content the window, which readers limit.
		zstd.WithSingleSegment(false),
		zstd.WithEncoderConcurrency(cpus.Count()))...)
	if err != nil {
		panic(err) // constant options
	}
	return e
}

func newDecoder(o zstd.DOption) *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(cpus.Count()), zstd.WithDecoderMaxWindow(512<<20), o)
	if err != nil {
		panic(err)
	}
	return d
}

// compressor is what one goroutine needs to compress. The zero value is ready.
type compressor struct {
	fast      zstdfast.Encoder
	out, back []byte             // room for the frame, and for what becomes of it
	spoil     func(frame []byte) // nil but in tests: damages a frame before it is compared
}

// compressors are those not in use, the last one on top, which is the one whose memory is in the caches. There is no pool: a collection would
// empty it, and the kernel clears each page of the next.
type compressors struct {
	mu   sync.Mutex
	free []*compressor // guarded by mu
}

func (l *compressors) take() *compressor {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := len(l.free) - 1
	if n < 0 {
		return new(compressor)
	}
	c := l.free[n]
	l.free = l.free[:n]
	return c
}

func (l *compressors) release(c *compressor) {
	// A giant must not stay for ever.
	if cap(c.out) > keptRoom {
		c.out = nil
	}
	if cap(c.back) > keptRoom {
		c.back = nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.free) <= cpus.Count() {
		l.free = append(l.free, c)
	}
}

// keptRoom is the size up to which the rooms of a compressor are kept, in bytes: that of the largest chunks.
const keptRoom = 4<<20 + roomStep

const roomStep = 64 << 10

// room returns buf if it has room for n bytes, or else a larger one.
func room(buf []byte, n int) []byte {
	if cap(buf) < n {
		more := (n + n/8 + roomStep - 1) / roomStep * roomStep
		if n <= keptRoom {
			more = min(more, keptRoom)
		}
		buf = make([]byte, 0, more)
	}
	return buf[:0]
}

// decodeSlack is how much room behind the content, in bytes, lets the decoder copy without looking at each
// byte's place: half again as fast for blobs of a block or two.
const decodeSlack = 32

// frameSlack is more than a frame is longer than what it holds, in bytes: its header, and three for each block of 128 KiB.
func frameSlack(n int) int { return 512 + n>>12 }

// worthIt says whether n bytes instead of plain are a gain: less than 3 % is not worth the reader's time.
func worthIt(n, plain int) bool { return n < plain-plain/32 }

// encode returns the frame of data, which holds until the next call.
func (c *compressor) encode(data []byte, hard bool) []byte {
	c.out = room(c.out, len(data)+frameSlack(len(data)))
	if hard {
		c.out = encoderMax().EncodeAll(data, c.out)
	} else {
		c.out = c.fast.Append(c.out, data)
	}
	return c.out
}

// proven returns out if it decompresses to data, or else a frame of another encoder that does.
//
// What was compressed is decompressed again and compared: a flaw in the encoder or a flipped bit in memory
// would otherwise be found when the file is needed. Measured (BenchmarkCompressBlob), that costs 6 to 18 %
// of the time of compressing, and nothing for data that is stored as it is.
func (c *compressor) proven(out, data []byte) ([]byte, error) {
	first := c.compare(out, data)
	if first == nil {
		return out, nil
	}
	c.fast = zstdfast.Encoder{} // the flipped bit may be in it
	c.out = encoderOther().EncodeAll(data, room(c.out, len(data)+frameSlack(len(data))))
	if err := c.compare(c.out, data); err != nil {
		return nil, fmt.Errorf("compressed data does not decompress to the same, with two encoders; the memory or the processor may be faulty: test them, and run the backup again (first: %w; then: %w)", first, err)
	}
	wrongFrames.Add(1)
	return c.out, nil
}

func (c *compressor) compare(out, data []byte) error {
	if c.spoil != nil {
		c.spoil(out)
	}
	c.back = room(c.back, len(data)+decodeSlack)
	back, err := decoder().DecodeAll(out, c.back[:0:len(data)+decodeSlack])
	if err == nil && !bytes.Equal(back, data) {
		err = errors.New("other content")
	}
	return err
}

// wrongFrames counts the frames that did not decompress to what they were made of and could be replaced.
var wrongFrames atomic.Int64

// WrongFrames tells how many times compressed data did not decompress to the same and was stored in another way, since the
// process began. Each is a sign of a faulty machine, or of a flaw in an encoder.
func WrongFrames() int64 { return wrongFrames.Load() }

// blob returns the compressed form of data, which holds until the next call, or false if data is better stored as it is.
func (c *compressor) blob(data []byte, mode Compression, t BlobType) ([]byte, bool, error) {
	if t == DataBlob && (mode == CompressionOff || len(data) < 32 || (mode == CompressionAuto && c.incompressible(data))) {
		return nil, false, nil
	}
	out := c.encode(data, mode == CompressionMax)
	// Trees are compressed in any case: prune would otherwise pack them again.
	if t == DataBlob && !worthIt(len(out), len(data)) {
		return nil, false, nil
	}
	out, err := c.proven(out, data)
	return out, err == nil, err
}

// file returns the compressed form of a small file, or plain, which is JSON: readers take both.
func (c *compressor) file(plain []byte) []byte {
	c.out = append(room(c.out, 1+len(plain)+frameSlack(len(plain))), zstdMark)
	c.out = c.fast.Append(c.out, plain)
	if err := c.compare(c.out[1:], plain); err != nil {
		wrongFrames.Add(1)
		c.fast = zstdfast.Encoder{}
		return plain
	}
	return c.out
}

const (
	sampleSize  = 2 << 10
	sampleCount = 8
	trialSize   = 32 << 10
)

// incompressible says, from samples, that zstd would not gain 3 %. Videos, photos, archives and
// encrypted files are like that, and most of the bytes on many servers. It costs some 17 µs, and
// 5 µs for data that is plainly compressible; zstd itself needs 0.6 ms for a mebibyte of noise.
func (c *compressor) incompressible(data []byte) bool {
	if len(data) < 2*trialSize {
		return false // cheap enough to try
	}
	// First how evenly the bytes are spread. Text, office and program files end here.
	var count [4][256]uint32 // in turn: to count what was just counted is to wait
	step := (len(data) - sampleSize) / (sampleCount - 1)
	for i := range sampleCount {
		for p := data[i*step : i*step+sampleSize]; len(p) >= 4; p = p[4:] {
			count[0][p[0]]++
			count[1][p[1]]++
			count[2][p[2]]++
			count[3][p[3]]++
		}
	}
	for i := range 256 {
		count[0][i] += count[1][i] + count[2][i] + count[3][i]
	}
	evenly := entropy(&count[0], sampleSize*sampleCount)
	if evenly < 7.7 { // 8 x 0.97, less what the sample may be off
		return false
	}
	// Evenly spread bytes may still repeat, or be less evenly spread in places: look at a piece from the middle and one from the end.
	for _, at := range []int{len(data)/2 - trialSize/2, len(data) - trialSize} {
		piece := data[at : at+trialSize]
		count[0] = [256]uint32{}
		n := 0
		for i := 0; i < len(piece); i += 5 { // no width of a record
			count[0][piece[i]]++
			n++
		}
		left := float64(trialSize-c.fast.Repeats(piece)) * min(evenly, entropy(&count[0], n)+0.03) / 8
		if worthIt(int(left), trialSize) {
			return false
		}
	}
	return true
}

// entropy returns that of n bytes of which count tells how often each occurs, in bits a byte. Of a sample of 6,500 bytes of noise
// it is 0.03 less than of all.
func entropy(count *[256]uint32, n int) float64 {
	sum := 0.0
	for _, k := range count {
		if int(k) < len(timesLog) {
			sum += timesLog[k]
		} else {
			sum += float64(k) * math.Log2(float64(k))
		}
	}
	return math.Log2(float64(n)) - sum/float64(n)
}

// timesLog has k log2 k.
var timesLog = func() (t [256]float64) {
	for k := 1; k < len(t); k++ {
		t[k] = float64(k) * math.Log2(float64(k))
	}
	return t
}()

// decompressBlob appends the content of a compressed blob, which has size bytes, to dst.
func decompressBlob(dst, data []byte, size int) ([]byte, error) {
	n := len(dst)
	if cap(dst)-n < size {
		dst = append(make([]byte, 0, n+size+decodeSlack), dst...)
	}
	out, err := decoder().DecodeAll(data, dst[:n:min(cap(dst), n+size+decodeSlack)])
	if err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	if len(out)-n != size {
		return nil, fmt.Errorf("decompressed to %d bytes where the index tells %d", len(out)-n, size)
	}
	return out, nil
}

// zstdMark is the first byte of a compressed small file. Others begin with a bracket.
const zstdMark = 2

func decompressFile(p []byte) ([]byte, error) {
	if len(p) == 0 {
		return nil, errors.New("the content is empty")
	}
	switch p[0] {
	case '{', '[':
		return p, nil
	case zstdMark:
		out, err := fileDecoder().DecodeAll(p[1:], nil)
		if err != nil {
			return nil, fmt.Errorf("decompress: %w", err)
		}
		return out, nil
	}
	return nil, fmt.Errorf("unknown encoding %d; is the repository newer than this program?", p[0])
}

// buffers are kept by size, in powers of two from 4 KiB: in one pool for all, a large blob would
// mostly meet a small buffer and drop it.
var buffers [maxClass + 1]sync.Pool

const (
	minClass = 12
	// maxClass bounds what stays in the pools: 16 MiB. A giant tree must not stay for ever.
	maxClass = 24
)

func class(capacity int) int { return max(minClass, bits.Len(uint(max(capacity, 1)-1))) }

// getBuffer returns a buffer of length 0 and at least the given capacity.
func getBuffer(capacity int) *[]byte {
	c := class(capacity)
	if c <= maxClass {
		if b, ok := buffers[c].Get().(*[]byte); ok {
			*b = (*b)[:0]
			return b
		}
		capacity = 1 << c
	}
	b := make([]byte, 0, capacity)
	return &b
}

// putBuffer takes a buffer back, which may have grown in the meantime.
func putBuffer(b *[]byte) {
	c := bits.Len(uint(cap(*b))) - 1 // the largest class that it can serve
	if c >= minClass && c <= maxClass {
		buffers[c].Put(b)
	}
}
