package index

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	"github.com/holdfast-backup/holdfast/internal/repo/crypto"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/repo/pack"
)

// Header and Footer enclose the packs of an index file; between packs stands a comma.
const (
	Header = `{"packs":[`
	Footer = "]}\n"
)

// AppendPack appends a pack to the text of an index file.
func AppendPack(dst []byte, p id.ID, blobs []pack.Entry) []byte {
	dst = append(dst, `{"id":"`...)
	dst = hex.AppendEncode(dst, p[:])
	dst = append(dst, `","blobs":[`...)
	for i, e := range blobs {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(dst, `{"id":"`...)
		dst = hex.AppendEncode(dst, e.ID[:])
		dst = append(dst, `","type":"`...)
		dst = append(dst, e.Type.String()...)
		dst = append(dst, `","offset":`...)
		dst = strconv.AppendUint(dst, uint64(e.Offset), 10)
		dst = append(dst, `,"length":`...)
		dst = strconv.AppendUint(dst, uint64(e.Length), 10)
		if e.Plain != 0 {
			dst = append(dst, `,"uncompressed_length":`...)
			dst = strconv.AppendUint(dst, uint64(e.Plain), 10)
		}
		dst = append(dst, '}')
	}
	return append(dst, "]}"...)
}

// Decode reads the JSON of an index file and calls fn for each pack. The slice is reused.
//
// It is written by hand because every command starts by decoding all index files: for a million blobs
// encoding/json takes some seconds, this one a fraction of one. It accepts what encoding/json accepts
// for the same structure (any order, unknown fields, keys of any case, and the bare list of
// packs of the oldest index files), but no key twice in an object.
func Decode(text []byte, fn func(p id.ID, blobs []pack.Entry) error) error {
	d := decoder{s: text}
	if err := d.file(fn); err != nil {
		return fmt.Errorf("index file, byte %d: %w", d.i, err)
	}
	return nil
}

var (
	errSyntax = errors.New("syntax error")
	errTwice  = errors.New("a key stands there twice")
	errDepth  = errors.New("nested too deeply")
)

type decoder struct {
	s     []byte
	i     int
	blobs []pack.Entry
}

func (d *decoder) space() {
	for d.i < len(d.s) {
		switch d.s[d.i] {
		case ' ', '\t', '\n', '\r':
			d.i++
		default:
			return
		}
	}
}

// next reports whether c comes next, and if so passes it.
func (d *decoder) next(c byte) bool {
	if d.i < len(d.s) && d.s[d.i] == c { // the common case without blanks
		d.i++
		return true
	}
	d.space()
	if d.i < len(d.s) && d.s[d.i] == c {
		d.i++
		return true
	}
	return false
}

func (d *decoder) literal(word string) bool {
	d.space()
	if bytes.HasPrefix(d.s[d.i:], []byte(word)) {
		d.i += len(word)
		return true
	}
	return false
}

// text reads a string. The result may be a part of the input.
func (d *decoder) text() ([]byte, error) {
	if !d.next('"') {
		return nil, errSyntax
	}
	start := d.i
	for i := d.i; i < len(d.s); i++ {
		switch c := d.s[i]; {
		case c == '"':
			d.i = i + 1
			return d.s[start:i], nil
		case c == '\\':
			return d.escaped(start)
		case c < 0x20:
			d.i = i
			return nil, errSyntax
		}
	}
	return nil, errSyntax
}

func (d *decoder) escaped(start int) ([]byte, error) {
	for i := start; i < len(d.s); i++ {
		switch d.s[i] {
		case '\\':
			i++
		case '"':
			var s string
			if err := json.Unmarshal(d.s[start-1:i+1], &s); err != nil {
				return nil, errSyntax
			}
			d.i = i + 1
			return []byte(s), nil
		}
	}
	return nil, errSyntax
}

func (d *decoder) id() (out id.ID, err error) {
	s, err := d.text()
	if err != nil {
		return out, err
	}
	if len(s) != 2*id.Size {
		return out, fmt.Errorf("id of %d digits", len(s))
	}
	_, err = hex.Decode(out[:], s)
	return out, err
}

func (d *decoder) uint32() (uint32, error) {
	d.space()
	start, n := d.i, uint64(0)
	for d.i < len(d.s) && d.s[d.i]-'0' <= 9 {
		if n = 10*n + uint64(d.s[d.i]-'0'); n >= 1<<32 {
			return 0, errors.New("number too large")
		}
		d.i++
	}
	if d.i == start || (d.s[start] == '0' && d.i > start+1) {
		return 0, errSyntax
	}
	if d.i < len(d.s) && (d.s[d.i] == '.' || d.s[d.i]|0x20 == 'e') {
		return 0, errors.New("not a whole number")
	}
	return uint32(n), nil
}

// object calls field for each key, which must read the value.
func (d *decoder) object(field func(key []byte) error) error {
	if !d.next('{') {
		return errSyntax
	}
	if d.next('}') {
		return nil
	}
	for {
		key, err := d.text()
		if err != nil {
			return err
		}
		if !d.next(':') {
			return errSyntax
		}
		if err := field(key); err != nil {
			return err
		}
		if d.next('}') {
			return nil
		}
		if !d.next(',') {
			return errSyntax
		}
	}
}

// array calls item for each item. null is an empty array.
func (d *decoder) array(item func() error) error {
	if !d.next('[') {
		if d.literal("null") {
			return nil
		}
		return errSyntax
	}
	if d.next(']') {
		return nil
	}
	for {
		if err := item(); err != nil {
			return err
		}
		if d.next(']') {
			return nil
		}
		if !d.next(',') {
			return errSyntax
		}
	}
}

// skip passes any value.
func (d *decoder) skip(depth int) error {
	if depth > 1000 {
		return errDepth
	}
	d.space()
	if d.i >= len(d.s) {
		return errSyntax
	}
	switch c := d.s[d.i]; c {
	case '{':
		return d.object(func([]byte) error { return d.skip(depth + 1) })
	case '[':
		return d.array(func() error { return d.skip(depth + 1) })
	case '"':
		_, err := d.text()
		return err
	default:
		start := d.i
		for d.i < len(d.s) && !bytes.ContainsRune([]byte(" \t\r\n,]}"), rune(d.s[d.i])) {
			d.i++
		}
		if !json.Valid(d.s[start:d.i]) {
			return errSyntax
		}
		return nil
	}
}

func is(key []byte, name string) bool {
	return string(key) == name || (len(key) >= len(name) && bytes.EqualFold(key, []byte(name)))
}

func (d *decoder) file(fn func(id.ID, []pack.Entry) error) error {
	seen := false
	packs := func() error { return d.pack(fn) }
	d.space()
	var err error
	if d.i < len(d.s) && d.s[d.i] == '[' {
		err = d.array(packs)
	} else {
		err = d.object(func(key []byte) error {
			if !is(key, "packs") {
				return d.skip(0)
			}
			if seen {
				return errTwice
			}
			seen = true
			return d.array(packs)
		})
	}
	if err != nil {
		return err
	}
	if d.space(); d.i != len(d.s) {
		return errors.New("something follows the end")
	}
	return nil
}

// set marks bit n and reports whether it was marked before.
func set(seen *uint, n uint) error {
	if *seen&(1<<n) != 0 {
		return errTwice
	}
	*seen |= 1 << n
	return nil
}

func (d *decoder) pack(fn func(id.ID, []pack.Entry) error) error {
	var (
		p    id.ID
		seen uint
	)
	d.blobs = d.blobs[:0]
	err := d.object(func(key []byte) (err error) {
		switch {
		case is(key, "id"):
			if err = set(&seen, 0); err == nil {
				p, err = d.id()
			}
		case is(key, "blobs"):
			if err = set(&seen, 1); err == nil {
				err = d.array(d.blob)
			}
		default:
			err = d.skip(0)
		}
		return err
	})
	if err != nil {
		return err
	}
	if seen&1 == 0 {
		return errors.New("pack without an id")
	}
	return fn(p, d.blobs)
}

func (d *decoder) blob() error {
	var (
		e    pack.Entry
		seen uint
	)
	// As object, without the closure: this is the hot loop.
	if !d.next('{') {
		return errSyntax
	}
	for {
		key, err := d.text()
		if err != nil {
			return err
		}
		if !d.next(':') {
			return errSyntax
		}
		switch {
		case is(key, "id"):
			if err = set(&seen, 0); err == nil {
				e.ID, err = d.id()
			}
		case is(key, "type"):
			if err = set(&seen, 1); err == nil {
				var t []byte
				if t, err = d.text(); err == nil {
					switch string(t) {
					case "data":
						e.Type = pack.DataBlob
					case "tree":
						e.Type = pack.TreeBlob
					default:
						err = fmt.Errorf("unknown blob type %q", t)
					}
				}
			}
		case is(key, "offset"):
			if err = set(&seen, 2); err == nil {
				e.Offset, err = d.uint32()
			}
		case is(key, "length"):
			if err = set(&seen, 3); err == nil {
				e.Length, err = d.uint32()
			}
		case is(key, "uncompressed_length"):
			if err = set(&seen, 4); err == nil {
				e.Plain, err = d.uint32()
			}
		default:
			err = d.skip(0)
		}
		if err != nil {
			return err
		}
		if d.next('}') {
			break
		}
		if !d.next(',') {
			return errSyntax
		}
	}
	const required = 1<<0 | 1<<1 | 1<<2 | 1<<3
	switch {
	case seen&required != required:
		return errors.New("blob without id, type, offset or length")
	case e.Length < crypto.Overhead:
		return fmt.Errorf("blob %s has a length of %d bytes, which is too short", e.ID.Short(), e.Length)
	case e.End() >= 1<<32:
		return fmt.Errorf("blob %s ends beyond 4 GiB", e.ID.Short())
	}
	d.blobs = append(d.blobs, e)
	return nil
}
