package pax

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"strconv"
	"strings"
)

// A Reader reads an archive from front to back. It is stricter than archive/tar where that guesses, and
// takes what that does not give back: raw bytes in names (hdrcharset=BINARY), attributes with an empty
// value, extended headers of more than 1 MiB.
//
// Source: POSIX.1-2017, pax interchange format.
type Reader struct {
	r      io.Reader
	left   int64 // bytes of the current entry's data that were not read
	pad    int64
	offset int64 // of the next header, for messages
	blk    [BlockSize]byte
	buf    []byte // room for the extended header of an entry
	local  records
	global *records          // nil: there were none
	keys   map[string]string // those of records that came, each made once
	anySum bool              // takes headers with a wrong checksum, for the fuzzer
}

// The keys of records that are fields of a Header.
const (
	keyPath = iota
	keyLinkpath
	keySize
	keyUID
	keyGID
	keyMtime
	keyFields
)

var fieldNames = [keyFields]string{"path", "linkpath", "size", "uid", "gid", "mtime"}

// records are those of an extended header.
type records struct {
	fields [keyFields][]byte // nil: not there
	rest   map[string]string // nil: none
}

// HeaderLimit bounds an extended header, in bytes: 64 KiB for each of many attributes fits.
const HeaderLimit = 8 << 20

// Header is one entry. Names are raw bytes as they stand in the archive, and nobody has checked them.
type Header struct {
	// Type is '0' to '6' as in POSIX, with the old forms of '0' made one; others are passed through.
	Type     byte
	Name     string
	Link     string
	Mode     uint32 // permission, setuid, setgid, sticky
	UID, GID uint32
	Sec      int64
	Nsec     int64
	Size     int64 // bytes of data that follow
	Major    uint32
	Minor    uint32
	// Records are the pax records of the entry, global ones included, without those that the fields above hold.
	Records map[string]string
}

// ErrDamaged is returned (wrapped, with the place) for what is no archive, or only a part of one.
var ErrDamaged = errors.New("damaged tar stream")

func (t *Reader) damaged(format string, args ...any) error {
	return fmt.Errorf("%w at offset %d: %s", ErrDamaged, t.offset, fmt.Sprintf(format, args...))
}

// NewReader returns a Reader of the archive in r. It reads headers block by block: r should have a buffer.
func NewReader(r io.Reader) *Reader { return &Reader{r: r} }

// Read reads the data of the current entry, and returns io.EOF at its end.
//
// Errors: ErrDamaged; others are those of the underlying reader.
func (t *Reader) Read(p []byte) (int, error) {
	if t.left == 0 {
		return 0, io.EOF
	}
	if int64(len(p)) > t.left {
		p = p[:t.left]
	}
	n, err := t.r.Read(p)
	t.left -= int64(n)
	if err == io.EOF && t.left > 0 {
		err = t.damaged("it ends within the data of an entry: %v", io.ErrUnexpectedEOF)
	}
	return n, err
}

func (t *Reader) full(p []byte) error {
	if _, err := io.ReadFull(t.r, p); err != nil {
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return t.damaged("it ends too early")
		}
		return err
	}
	return nil
}

// Skip passes over what is left of the current entry, as Next does, so that the next header begins with the next byte that is read.
//
// Errors: ErrDamaged; others are those of the underlying reader.
func (t *Reader) Skip() error {
	n := t.left + t.pad
	t.left, t.pad = 0, 0
	for n > 0 {
		p := t.blk[:]
		if n < BlockSize {
			p = p[:n]
		}
		if n >= 64*BlockSize { // long data that nobody wanted
			m, err := io.CopyN(io.Discard, t.r, n)
			if err == io.EOF {
				return t.damaged("it ends within the data of an entry")
			}
			if err != nil {
				return err
			}
			n -= m
			continue
		}
		if err := t.full(p); err != nil {
			return err
		}
		n -= int64(len(p))
	}
	return nil
}

// Offset is where in the archive the next header begins, in bytes.
func (t *Reader) Offset() int64 { return t.offset }

// Global tells whether there were global records, which count for all entries that follow.
func (t *Reader) Global() bool { return t.global != nil }

// Passed tells that the underlying reader went on by n bytes, from the beginning of one header to that of another.
func (t *Reader) Passed(n int64) { t.offset += n }

// Next returns the next entry, or io.EOF after the two zero blocks that end an archive. What was not read
// of the last entry is passed over.
//
// Errors: ErrDamaged; others are those of the underlying reader.
func (t *Reader) Next() (*Header, error) {
	h := &Header{}
	var local *records
	for {
		if err := t.Skip(); err != nil {
			return nil, err
		}
		if err := t.full(t.blk[:]); err != nil {
			return nil, err
		}
		if t.blk[0] == 0 && t.blk == [BlockSize]byte{} {
			if err := t.full(t.blk[:]); err != nil {
				return nil, err
			}
			if t.blk != [BlockSize]byte{} {
				return nil, t.damaged("a lone zero block")
			}
			if local != nil {
				return nil, t.damaged("an extended header without an entry")
			}
			return nil, io.EOF
		}
		if err := t.parseHeader(h); err != nil {
			return nil, err
		}
		if h.Type == 'x' || h.Type == 'g' {
			if h.Size > HeaderLimit {
				return nil, t.damaged("an extended header of %d bytes", h.Size)
			}
			p := t.room(int(h.Size), h.Type)
			if err := t.full(p); err != nil {
				return nil, err
			}
			t.offset += BlockSize + h.Size + padding(h.Size)
			t.pad = padding(h.Size)
			if h.Type == 'x' {
				local = &t.local
				*local = records{}
				if err := t.parsePax(p, local); err != nil {
					return nil, err
				}
				continue
			}
			if t.global == nil {
				t.global = &records{}
			}
			if err := t.parsePax(p, t.global); err != nil {
				return nil, err
			}
			for i, v := range t.global.fields { // lest a short one keep all of a long header
				t.global.fields[i] = bytes.Clone(v)
			}
			continue
		}
		if err := t.merge(h, local); err != nil {
			return nil, err
		}
		switch h.Type {
		case '1', '2', '3', '4', '5', '6': // no data follows, whatever the size says
			h.Size = 0
		}
		t.left, t.pad = h.Size, padding(h.Size)
		t.offset += BlockSize + t.left + t.pad
		return h, nil
	}
}

// keepRoom is the longest extended header for which room is kept, in bytes.
const keepRoom = 64 << 10

// room is for an extended header of n bytes. That of an entry is kept until the next such one, so that a global one
// that comes between it and its entry does not spoil it.
func (t *Reader) room(n int, kind byte) []byte {
	if kind == 'g' || n > keepRoom {
		return make([]byte, n)
	}
	if n > cap(t.buf) {
		t.buf = make([]byte, max(n, 1024))
	}
	return t.buf[:n]
}

// padding is the number of zeros that follow n bytes of data.
func padding(n int64) int64 { return -n & (BlockSize - 1) }

// checksum is the sum of the bytes of a header, with those of the sum itself taken for spaces.
func checksum(b *[BlockSize]byte) int64 {
	// Four lanes of 16 bits each hold the sums of every other byte: 64 words of them do not fill a lane.
	const even = 0x00ff00ff00ff00ff
	fold := func(x uint64) int64 { return int64(x&0xffff + x>>16&0xffff + x>>32&0xffff + x>>48) }
	var lo, hi uint64
	for i := 0; i < BlockSize; i += 8 {
		x := binary.LittleEndian.Uint64(b[i:])
		lo += x & even
		hi += x >> 8 & even
	}
	sum := fold(lo) + fold(hi)
	for _, c := range b[148:156] {
		sum += ' ' - int64(c)
	}
	return sum
}

// parseHeader reads the header that is in t.blk. Of an extended one it takes type and size only.
func (t *Reader) parseHeader(h *Header) error {
	b := t.blk[:]
	want, ok := number(b[148:156])
	if (!ok || want != checksum(&t.blk)) && !t.anySum {
		return t.damaged("wrong checksum of a header")
	}
	*h = Header{Type: b[156]}
	if h.Type == 0 || h.Type == '7' {
		h.Type = '0'
	}
	var n [5]int64
	for i, f := range [5][]byte{b[100:108], b[108:116], b[116:124], b[124:136], b[136:148]} {
		if n[i], ok = number(f); !ok {
			return t.damaged("a number that is none in a header")
		}
	}
	if n[1] < 0 || n[1] > 1<<32-1 || n[2] < 0 || n[2] > 1<<32-1 || n[3] < 0 {
		return t.damaged("a number out of range in a header")
	}
	h.Mode, h.UID, h.GID, h.Size, h.Sec = uint32(n[0])&0o7777, uint32(n[1]), uint32(n[2]), n[3], n[4]
	ustar := string(b[257:263]) == "ustar\x00"
	if ustar {
		major, ok1 := number(b[329:337])
		minor, ok2 := number(b[337:345])
		if !ok1 || !ok2 || major < 0 || minor < 0 || major > 1<<32-1 || minor > 1<<32-1 {
			return t.damaged("a device number that is none in a header")
		}
		h.Major, h.Minor = uint32(major), uint32(minor)
	}
	if h.Type == 'x' || h.Type == 'g' {
		return nil
	}
	h.Name, h.Link = cString(b[0:100]), cString(b[157:257])
	if ustar && b[345] != 0 {
		h.Name = cString(b[345:500]) + "/" + h.Name
	}
	return nil
}

// parsePax adds records of the form "length key=value\n" to rec, whose fields become parts of p.
func (t *Reader) parsePax(p []byte, rec *records) error {
	for len(p) > 0 {
		sp := bytes.IndexByte(p, ' ')
		if sp < 1 || sp > 9 {
			return t.damaged("an extended header without a length")
		}
		n, ok := decimal(p[:sp])
		if !ok || n > int64(len(p)) || int(n) < sp+3 || p[n-1] != '\n' {
			return t.damaged("an extended header with a wrong length")
		}
		kv := p[sp+1 : n-1]
		p = p[n:]
		eq := bytes.IndexByte(kv, '=')
		if eq < 1 {
			return t.damaged("an extended header without a key")
		}
		key, value := kv[:eq], kv[eq+1:]
		field := keyFields
		switch string(key) {
		case "path":
			field = keyPath
		case "linkpath":
			field = keyLinkpath
		case "size":
			field = keySize
		case "uid":
			field = keyUID
		case "gid":
			field = keyGID
		case "mtime":
			field = keyMtime
		}
		if field < keyFields {
			rec.fields[field] = value
			continue
		}
		if rec.rest == nil {
			rec.rest = make(map[string]string)
		}
		rec.rest[t.key(key)] = string(value)
	}
	return nil
}

// keyLimit bounds how many keys are remembered; an archive has the same few again and again.
const keyLimit = 256

// key returns the string of a key, the same for each time that it comes.
func (t *Reader) key(k []byte) string {
	if s, ok := t.keys[string(k)]; ok {
		return s
	}
	s := string(k)
	if len(t.keys) < keyLimit && len(s) <= 256 {
		if t.keys == nil {
			t.keys = make(map[string]string)
		}
		t.keys[s] = s
	}
	return s
}

// merge puts the pax records, the entry's own before the global ones, in the place of the fields.
func (t *Reader) merge(h *Header, local *records) error {
	if local != nil {
		h.Records = local.rest
	}
	if g := t.global; g != nil && len(g.rest) > 0 {
		h.Records = make(map[string]string, len(g.rest)+len(h.Records))
		maps.Copy(h.Records, g.rest)
		if local != nil {
			maps.Copy(h.Records, local.rest)
		}
	}
	for k := range keyFields {
		var v []byte
		if local != nil {
			v = local.fields[k]
		}
		if v == nil && t.global != nil {
			v = t.global.fields[k]
		}
		if len(v) == 0 { // empty: the standard's way to take a global value back
			continue
		}
		ok := true
		switch k {
		case keyPath:
			h.Name = string(v)
		case keyLinkpath:
			h.Link = string(v)
		case keySize:
			h.Size, ok = decimal(v)
		case keyUID:
			h.UID, ok = id(v)
		case keyGID:
			h.GID, ok = id(v)
		case keyMtime:
			var err error
			h.Sec, h.Nsec, err = parsePaxTime(v)
			ok = err == nil
		}
		if !ok {
			return t.damaged("record %s=%q", fieldNames[k], v)
		}
	}
	return nil
}

// decimal reads digits, of which there must be some, and not more than 63 bits can hold.
func decimal(b []byte) (int64, bool) {
	var x int64
	for _, c := range b {
		c -= '0'
		if c > 9 || x > (math.MaxInt64-int64(c))/10 {
			return 0, false
		}
		x = 10*x + int64(c)
	}
	return x, len(b) > 0
}

func id(b []byte) (uint32, bool) {
	x, ok := decimal(b)
	return uint32(x), ok && x <= math.MaxUint32
}

// parsePaxTime reads a decimal number of seconds. Digits beyond the ninth are cut off.
func parsePaxTime(b []byte) (sec, nsec int64, err error) {
	whole, frac, _ := bytes.Cut(b, []byte{'.'})
	var ok bool
	if sec, ok = decimal(whole); !ok {
		if sec, err = strconv.ParseInt(string(whole), 10, 64); err != nil {
			return 0, 0, err
		}
	}
	for i, c := range frac {
		if c -= '0'; c > 9 {
			return 0, 0, strconv.ErrSyntax
		} else if i < 9 {
			nsec = 10*nsec + int64(c)
		}
	}
	if len(frac) == 0 {
		return sec, 0, nil
	}
	for range 9 - len(frac) {
		nsec *= 10
	}
	if whole[0] == '-' && nsec > 0 {
		sec, nsec = sec-1, 1e9-nsec
	}
	return sec, nsec, nil
}

// octal reads what nearly all numbers are: digits up to a zero or to the end.
func octal(b []byte) (x int64, ok bool) {
	for _, c := range b {
		if c == 0 {
			break
		}
		if c -= '0'; c > 7 {
			return 0, false
		}
		x = x<<3 | int64(c)
	}
	return x, true
}

// number reads octal digits, also with spaces around them, or the base 256 form that starts with a set high bit.
func number(b []byte) (int64, bool) {
	if x, ok := octal(b); ok {
		return x, true
	}
	if b[0]&0x80 != 0 {
		neg := byte(0)
		if b[0]&0x40 != 0 {
			neg = 0xff
		}
		var x uint64
		for i, c := range b {
			c ^= neg
			if i == 0 {
				c &= 0x7f
			}
			if x>>56 > 0 {
				return 0, false
			}
			x = x<<8 | uint64(c)
		}
		if x>>63 > 0 {
			return 0, false
		}
		if neg == 0xff {
			return ^int64(x), true
		}
		return int64(x), true
	}
	s := strings.Trim(cString(b), " ")
	if s == "" {
		return 0, true
	}
	x, err := strconv.ParseUint(s, 8, 63)
	return int64(x), err == nil
}

func cString(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}
