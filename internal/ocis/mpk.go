package ocis

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sort"
	"strings"
	"unicode/utf8"
)

// Attribute name prefixes of the two products, as they stand in .mpk files and xattr names.
const (
	PrefixOCIS      = "user.ocis."
	PrefixOpenCloud = "user.oc."
)

// ErrEmptyMPK is returned for a metadata file of 0 bytes: what a server leaves behind when its disk
// was full.
var ErrEmptyMPK = errors.New("metadata is empty (0 bytes), as a full disk leaves it behind")

// MPKError says that bytes are no message pack map of names to values.
type MPKError struct {
	Offset int    // byte at which the reading stopped
	What   string // what is wrong there
}

func (e *MPKError) Error() string {
	return fmt.Sprintf("damaged message pack metadata at byte %d: %s", e.Offset, e.What)
}

// Attribute is one name with its raw value.
type Attribute struct {
	Key   string // with prefix
	Value []byte
}

// Attributes keeps the order of the file it was read from.
type Attributes []Attribute

// StripPrefix cuts the product's prefix off an attribute name; ok is false if it bears none.
func StripPrefix(key string) (name string, ok bool) {
	if rest, ok := strings.CutPrefix(key, PrefixOCIS); ok {
		return rest, true
	}
	return strings.CutPrefix(key, PrefixOpenCloud)
}

// Get returns the value of the attribute whose name without prefix is name. Where a name stands
// twice, the last one counts, as for the product.
func (a Attributes) Get(name string) (value []byte, ok bool) {
	if i := a.find(name); i >= 0 {
		return a[i].Value, true
	}
	return nil, false
}

// Text is Get as a string; "" if it is missing.
func (a Attributes) Text(name string) string {
	v, _ := a.Get(name)
	return string(v)
}

// Set replaces the value of the attribute called prefix+name, or adds it at the end.
func (a *Attributes) Set(prefix, name string, value []byte) {
	if i := a.find(name); i >= 0 {
		(*a)[i].Value = value
		return
	}
	*a = append(*a, Attribute{Key: prefix + name, Value: value})
}

// Delete removes every attribute called name.
func (a *Attributes) Delete(name string) {
	kept := (*a)[:0]
	for _, attr := range *a {
		if n, ok := StripPrefix(attr.Key); !ok || n != name {
			kept = append(kept, attr)
		}
	}
	*a = kept
}

// Sort orders by key.
func (a Attributes) Sort() {
	sort.SliceStable(a, func(i, j int) bool { return a[i].Key < a[j].Key })
}

func (a Attributes) find(name string) int {
	for i := len(a) - 1; i >= 0; i-- {
		if n, ok := StripPrefix(a[i].Key); ok && n == name {
			return i
		}
	}
	return -1
}

// ParseMPK reads a node's metadata file. The values share memory with data. Values that are text
// instead of binary, as old index files have the other way round, are accepted.
//
// Errors: ErrEmptyMPK, *MPKError.
func ParseMPK(data []byte) (Attributes, error) {
	n, _, err := mpkHeader(data)
	if err != nil {
		return nil, err
	}
	// Each pair takes at least two bytes, so a header that promises more is refused before memory
	// is taken for it.
	if n > len(data)/2 {
		return nil, &MPKError{Offset: 0, What: fmt.Sprintf("map of %d pairs in %d bytes", n, len(data))}
	}
	attrs := make(Attributes, 0, n)
	text := string(data) // one copy that all keys are cut from
	err = scanMPK(data, func(keyAt, keyLen int, value []byte) error {
		attrs = append(attrs, Attribute{Key: text[keyAt : keyAt+keyLen], Value: value})
		return nil
	})
	if err != nil {
		return nil, err
	}
	return attrs, nil
}

// ScanMPK calls fn for each pair, without allocating. key and value share memory with data. It
// stops at the first error of fn and returns it as it is.
//
// Errors: ErrEmptyMPK, *MPKError, those of fn.
func ScanMPK(data []byte, fn func(key, value []byte) error) error {
	return scanMPK(data, func(keyAt, keyLen int, value []byte) error {
		return fn(data[keyAt:keyAt+keyLen:keyAt+keyLen], value)
	})
}

func scanMPK(data []byte, fn func(keyAt, keyLen int, value []byte) error) error {
	n, at, err := mpkHeader(data)
	if err != nil {
		return err
	}
	for range n {
		keyAt, keyLen, err := mpkString(data, at, "name")
		if err != nil {
			return err
		}
		valueAt, valueLen, err := mpkString(data, keyAt+keyLen, "value")
		if err != nil {
			return err
		}
		at = valueAt + valueLen
		if err := fn(keyAt, keyLen, data[valueAt:at:at]); err != nil {
			return err
		}
	}
	if at != len(data) {
		return &MPKError{Offset: at, What: fmt.Sprintf("%d bytes follow the map", len(data)-at)}
	}
	return nil
}

func mpkHeader(data []byte) (pairs, next int, err error) {
	if len(data) == 0 {
		return 0, 0, ErrEmptyMPK
	}
	switch c := data[0]; {
	case c&0xf0 == 0x80:
		return int(c & 0x0f), 1, nil
	case c == 0xde && len(data) >= 3:
		return int(binary.BigEndian.Uint16(data[1:])), 3, nil
	case c == 0xdf && len(data) >= 5:
		n := binary.BigEndian.Uint32(data[1:])
		if n > math.MaxInt32 {
			return 0, 0, &MPKError{Offset: 0, What: fmt.Sprintf("map of %d pairs", n)}
		}
		return int(n), 5, nil
	case c == 0xde || c == 0xdf:
		return 0, 0, &MPKError{Offset: 0, What: "map header is cut off"}
	default:
		return 0, 0, &MPKError{Offset: 0, What: fmt.Sprintf("no map (first byte 0x%02x)", c)}
	}
}

// mpkString reads the header of a text or binary at data[at:] and returns where its bytes lie.
func mpkString(data []byte, at int, what string) (start, length int, err error) {
	if at >= len(data) {
		return 0, 0, &MPKError{Offset: at, What: what + " is missing"}
	}
	c := data[at]
	rest := len(data) - at - 1
	head := 0 // bytes of length after the first
	switch {
	case c&0xe0 == 0xa0:
		length = int(c & 0x1f)
	case c == 0xc0 && what == "value": // nil, as some encoders write an empty value
	case c == 0xd9 || c == 0xc4:
		head = 1
	case c == 0xda || c == 0xc5:
		head = 2
	case c == 0xdb || c == 0xc6:
		head = 4
	default:
		return 0, 0, &MPKError{Offset: at, What: fmt.Sprintf("%s is neither text nor binary (0x%02x)", what, c)}
	}
	if rest < head {
		return 0, 0, &MPKError{Offset: at, What: what + " is cut off"}
	}
	switch head {
	case 1:
		length = int(data[at+1])
	case 2:
		length = int(binary.BigEndian.Uint16(data[at+1:]))
	case 4:
		n := binary.BigEndian.Uint32(data[at+1:])
		if int64(n) > int64(rest) {
			return 0, 0, &MPKError{Offset: at, What: fmt.Sprintf("%s of %d bytes is cut off", what, n)}
		}
		length = int(n)
	}
	if length > rest-head {
		return 0, 0, &MPKError{Offset: at, What: fmt.Sprintf("%s of %d bytes is cut off", what, length)}
	}
	return at + 1 + head, length, nil
}

// EncodeMPK writes attributes in their order as the product does: names as text, values as binary,
// each in its shortest form. What ParseMPK read from a product's file comes out byte for byte.
func EncodeMPK(attrs Attributes) []byte {
	size := 5
	for _, a := range attrs {
		size += 10 + len(a.Key) + len(a.Value)
	}
	return AppendMPK(make([]byte, 0, size), attrs)
}

// AppendMPK is EncodeMPK into a buffer of the caller.
func AppendMPK(dst []byte, attrs Attributes) []byte {
	dst = appendMapHeader(dst, len(attrs))
	for _, a := range attrs {
		dst = appendText(dst, a.Key)
		dst = appendBinary(dst, a.Value)
	}
	return dst
}

func appendMapHeader(dst []byte, n int) []byte {
	switch {
	case n < 16:
		return append(dst, 0x80|byte(n))
	case n <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(dst, 0xde), uint16(n))
	default:
		return binary.BigEndian.AppendUint32(append(dst, 0xdf), uint32(n))
	}
}

func appendText(dst []byte, s string) []byte {
	switch n := len(s); {
	case n < 32:
		dst = append(dst, 0xa0|byte(n))
	case n <= math.MaxUint8:
		dst = append(dst, 0xd9, byte(n))
	case n <= math.MaxUint16:
		dst = binary.BigEndian.AppendUint16(append(dst, 0xda), uint16(n))
	default:
		dst = binary.BigEndian.AppendUint32(append(dst, 0xdb), uint32(n))
	}
	return append(dst, s...)
}

func appendBinary(dst, b []byte) []byte {
	switch n := len(b); {
	case n <= math.MaxUint8:
		dst = append(dst, 0xc4, byte(n))
	case n <= math.MaxUint16:
		dst = binary.BigEndian.AppendUint16(append(dst, 0xc5), uint16(n))
	default:
		dst = binary.BigEndian.AppendUint32(append(dst, 0xc6), uint32(n))
	}
	return append(dst, b...)
}

// IndexEntry is one line of an index file: a space and where its root node is. In the decomposed
// layout Target is a path relative to a folder of the index file's name without .mpk (which earlier
// versions had in its place), in the posix layout it is an id.
type IndexEntry struct {
	SpaceID string
	Target  string
}

// ParseIndex reads a file below indexes/, in the order of the file. Servers rewrite these in place, so a
// copy from a running one can be cut short.
//
// Errors: ErrEmptyMPK, *MPKError.
func ParseIndex(data []byte) ([]IndexEntry, error) {
	var entries []IndexEntry
	err := ScanMPK(data, func(key, value []byte) error {
		entries = append(entries, IndexEntry{SpaceID: string(key), Target: string(value)})
		return nil
	})
	if err != nil {
		return nil, err
	}
	return entries, nil
}

// EncodeIndex writes an index file in the order given.
func EncodeIndex(entries []IndexEntry) []byte {
	dst := appendMapHeader(nil, len(entries))
	for _, e := range entries {
		dst = appendText(dst, e.SpaceID)
		dst = appendText(dst, e.Target)
	}
	return dst
}

// printable shortens a value of unknown bytes for an error message.
func printable(b []byte) string {
	const most = 60
	s := string(b)
	if len(s) > most {
		s = s[:most] + "..."
	}
	if !utf8.ValidString(s) {
		return fmt.Sprintf("%x", s)
	}
	return fmt.Sprintf("%q", s)
}
