// Package id holds the 256-bit name that every repository object bears.
package id

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
)

// Size is the length of an ID in bytes.
const Size = sha256.Size

// ID is the SHA-256 of an object: of the plaintext for blobs, of the stored bytes for files.
type ID [Size]byte

// Hash returns the ID of p.
func Hash(p []byte) ID { return sha256.Sum256(p) }

// Parse reads 64 hexadecimal digits of either case.
func Parse(s string) (ID, error) {
	var d ID
	if len(s) != 2*Size {
		return d, fmt.Errorf("id %q has %d digits, not %d", s, len(s), 2*Size)
	}
	if _, err := hex.Decode(d[:], []byte(s)); err != nil {
		return d, fmt.Errorf("id %q: %w", s, err)
	}
	return d, nil
}

// String returns 64 lower-case hexadecimal digits.
func (d ID) String() string { return hex.EncodeToString(d[:]) }

// Short returns the first eight digits, for people.
func (d ID) Short() string { return hex.EncodeToString(d[:4]) }

// IsNull reports whether d is all zero, which no object may bear.
func (d ID) IsNull() bool { return d == ID{} }

// MarshalText makes an ID a JSON string.
func (d ID) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, d[:]), nil }

// UnmarshalText is the reverse of MarshalText.
func (d *ID) UnmarshalText(p []byte) error {
	v, err := Parse(string(p))
	if err != nil {
		return err
	}
	*d = v
	return nil
}
