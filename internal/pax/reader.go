package pax

import (
	"bytes"
	"errors"
	"fmt"
	"io"
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
	global map[string]string
	anySum bool // takes headers with a wrong checksum, for the fuzzer
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
	// Records are the pax records of the entry, global ones included.
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
	var local map[string]string
	for {
		if err := t.Skip(); err != nil {
			return nil, err
		}
		if err := t.full(t.blk[:]); err != nil {
			return nil, err
		}
		if t.blk == [BlockSize]byte{} {
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
		h, err := t.parseHeader()
		if err != nil {
			return nil, err
		}
		if h.Type == 'x' || h.Type == 'g' {
			if h.Size > HeaderLimit {
				return nil, t.damaged("an extended header of %d bytes", h.Size)
			}
			p := make([]byte, h.Size)
			if err := t.full(p); err != nil {
				return nil, err
			}
			t.offset += BlockSize + h.Size + padding(h.Size)
			t.pad = padding(h.Size)
			rec, err := t.parsePax(p)
			if err != nil {
				return nil, err
			}
			if h.Type == 'x' {
				local = rec
				continue
			}
			if t.global == nil {
				t.global = make(map[string]string)
			}
			for k, v := range rec {
				t.global[k] = v
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

// padding is the number of zeros that follow n bytes of data.
func padding(n int64) int64 { return -n & (BlockSize - 1) }

func (t *Reader) parseHeader() (*Header, error) {
	b := t.blk[:]
	var sum int64
	for i, c := range b {
		if i >= 148 && i < 156 {
			c = ' '
		}
		sum += int64(c)
	}
	want, ok := number(b[148:156])
	if (!ok || want != sum) && !t.anySum {
		return nil, t.damaged("wrong checksum of a header")
	}
	h := &Header{Type: b[156], Name: cString(b[0:100]), Link: cString(b[157:257])}
	if h.Type == 0 || h.Type == '7' {
		h.Type = '0'
	}
	var n [6]int64
	for i, f := range [6][]byte{b[100:108], b[108:116], b[116:124], b[124:136], b[136:148]} {
		if f == nil {
			continue
		}
		if n[i], ok = number(f); !ok {
			return nil, t.damaged("a number that is none in a header")
		}
	}
	if n[1] < 0 || n[1] > 1<<32-1 || n[2] < 0 || n[2] > 1<<32-1 || n[3] < 0 {
		return nil, t.damaged("a number out of range in a header")
	}
	h.Mode, h.UID, h.GID, h.Size, h.Sec = uint32(n[0])&0o7777, uint32(n[1]), uint32(n[2]), n[3], n[4]
	if bytes.Equal(b[257:263], []byte("ustar\x00")) {
		major, ok1 := number(b[329:337])
		minor, ok2 := number(b[337:345])
		if !ok1 || !ok2 || major < 0 || minor < 0 || major > 1<<32-1 || minor > 1<<32-1 {
			return nil, t.damaged("a device number that is none in a header")
		}
		h.Major, h.Minor = uint32(major), uint32(minor)
		if prefix := cString(b[345:500]); prefix != "" {
			h.Name = prefix + "/" + h.Name
		}
	}
	return h, nil
}

// parsePax reads records of the form "length key=value\n".
func (t *Reader) parsePax(p []byte) (map[string]string, error) {
	rec := make(map[string]string)
	for len(p) > 0 {
		sp := bytes.IndexByte(p, ' ')
		if sp < 1 || sp > 9 {
			return nil, t.damaged("an extended header without a length")
		}
		n, err := strconv.ParseUint(string(p[:sp]), 10, 31)
		if err != nil || int(n) > len(p) || int(n) < sp+3 || p[n-1] != '\n' {
			return nil, t.damaged("an extended header with a wrong length")
		}
		kv := p[sp+1 : n-1]
		eq := bytes.IndexByte(kv, '=')
		if eq < 1 {
			return nil, t.damaged("an extended header without a key")
		}
		rec[string(kv[:eq])] = string(kv[eq+1:])
		p = p[n:]
	}
	return rec, nil
}

// merge puts the pax records, the entry's own before the global ones, in the place of the fields.
func (t *Reader) merge(h *Header, local map[string]string) error {
	h.Records = local
	if len(t.global) > 0 {
		h.Records = make(map[string]string, len(t.global)+len(local))
		for k, v := range t.global {
			h.Records[k] = v
		}
		for k, v := range local {
			h.Records[k] = v
		}
	}
	for k, v := range h.Records {
		if v == "" { // the standard's way to take a global value back
			continue
		}
		var err error
		switch k {
		case "path":
			h.Name = v
		case "linkpath":
			h.Link = v
		case "size":
			var n uint64
			n, err = strconv.ParseUint(v, 10, 63)
			h.Size = int64(n)
		case "uid", "gid":
			var n uint64
			n, err = strconv.ParseUint(v, 10, 32)
			if k == "uid" {
				h.UID = uint32(n)
			} else {
				h.GID = uint32(n)
			}
		case "mtime":
			h.Sec, h.Nsec, err = parsePaxTime(v)
		}
		if err != nil {
			return t.damaged("record %s=%q", k, v)
		}
	}
	return nil
}

// parsePaxTime reads a decimal number of seconds. Digits beyond the ninth are cut off.
func parsePaxTime(s string) (sec, nsec int64, err error) {
	whole, frac, _ := strings.Cut(s, ".")
	if sec, err = strconv.ParseInt(whole, 10, 64); err != nil {
		return 0, 0, err
	}
	if frac == "" {
		return sec, 0, nil
	}
	if strings.Trim(frac, "0123456789") != "" {
		return 0, 0, strconv.ErrSyntax
	}
	if nsec, err = strconv.ParseInt((frac + "000000000")[:9], 10, 64); err != nil {
		return 0, 0, err
	}
	if strings.HasPrefix(whole, "-") && nsec > 0 {
		sec, nsec = sec-1, 1e9-nsec
	}
	return sec, nsec, nil
}

// number reads octal digits, or the base 256 form that starts with a set high bit.
func number(b []byte) (int64, bool) {
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
