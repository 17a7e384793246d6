// Package crypto seals and opens the objects of a repository: AES-256 in counter mode, authenticated
// by Poly1305-AES over the ciphertext, as restic's format has it.
//
// A sealed object is IV (16 bytes), ciphertext, MAC (16 bytes). Nothing ties an object to its
// place; what protects against swapped objects is that the caller compares the hash with the name.
package crypto

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"math/bits"
	"slices"

	//lint:ignore SA1019 the repository format prescribes Poly1305 with an AES-derived one-time key
	"golang.org/x/crypto/poly1305"
)

const (
	ivSize  = 16
	macSize = 16
	// Overhead is how many bytes a sealed object is longer than its plaintext.
	Overhead = ivSize + macSize
)

// ErrAuth is returned when an object was not sealed with this key, or was changed since.
var ErrAuth = errors.New("wrong key or damaged data: authentication failed")

// Key seals and opens. It is safe for concurrent use.
type Key struct {
	encrypt    [32]byte
	macK, macR [16]byte
	enc, mac   cipher.Block
	wide       *wideKey // nil: the processor has no such instructions
}

// NewKey returns a random key.
func NewKey() *Key {
	var p [64]byte
	rand.Read(p[:])
	k, err := fromBytes(p[:])
	if err != nil {
		panic(err) // 2^-128
	}
	return k
}

func fromBytes(p []byte) (*Key, error) {
	k := &Key{encrypt: [32]byte(p[:32]), macK: [16]byte(p[32:48]), macR: [16]byte(p[48:64])}
	return k, k.setup()
}

func (k *Key) setup() (err error) {
	if k.encrypt == [32]byte{} || k.macK == [16]byte{} || k.macR == [16]byte{} {
		return errors.New("key with a part that is all zero")
	}
	if k.enc, err = aes.NewCipher(k.encrypt[:]); err != nil {
		return err
	}
	k.wide = newWideKey(&k.encrypt, &k.macR)
	k.mac, err = aes.NewCipher(k.macK[:])
	return err
}

// oneTime returns the key of Poly1305 for iv. Poly1305 itself clamps r, the first half.
func (k *Key) oneTime(iv []byte) (one [32]byte) {
	copy(one[:16], k.macR[:])
	k.mac.Encrypt(one[16:], iv)
	return one
}

// sum computes the MAC of ciphertext.
func (k *Key) sum(iv, ciphertext []byte) (mac [macSize]byte) {
	one := k.oneTime(iv)
	if k.wide != nil {
		return k.wide.sum(ciphertext, (*[16]byte)(one[16:]))
	}
	poly1305.Sum(&mac, ciphertext, &one)
	return mac
}

// crypt encrypts or decrypts src to dst, which may be the same.
func (k *Key) crypt(dst, iv, src []byte) {
	if counter, ok := counterOf(iv); ok && k.wide != nil {
		k.wide.crypt(dst, src, counter)
		return
	}
	cipher.NewCTR(k.enc, iv).XORKeyStream(dst, src)
}

// Seal appends the sealed form of plain to dst. plain must not overlap the free space of dst.
func (k *Key) Seal(dst, plain []byte) []byte {
	n := len(dst)
	total := n + len(plain) + Overhead
	if cap(dst) < total {
		bigger := make([]byte, total)
		copy(bigger, dst)
		dst = bigger
	}
	dst = dst[:total]
	iv, text := dst[n:n+ivSize], dst[n+ivSize:total-macSize]
	rand.Read(iv) // never all zero but once in 2^128
	k.seal(dst[total-macSize:], text, iv, plain)
	return dst
}

// seal encrypts plain to text, and puts the MAC into mac.
func (k *Key) seal(mac, text, iv, plain []byte) {
	if counter, ok := counterOf(iv); ok && k.wide != nil {
		one := k.oneTime(iv)
		*(*[macSize]byte)(mac) = k.wide.seal(text, plain, counter, (*[16]byte)(one[16:]))
		return
	}
	k.crypt(text, iv, plain)
	*(*[macSize]byte)(mac) = k.sum(iv, text)
}

// Open checks sealed and decrypts it in its own memory; the result is a part of sealed. When the
// check fails, sealed is left as it was. Errors: ErrAuth.
func (k *Key) Open(sealed []byte) ([]byte, error) {
	iv, text, err := k.verify(sealed)
	if err != nil {
		return nil, err
	}
	k.crypt(text, iv, text)
	return text, nil
}

// OpenTo checks sealed and appends its plaintext to dst, which must not overlap it. Errors: ErrAuth.
func (k *Key) OpenTo(dst, sealed []byte) ([]byte, error) {
	iv, text, err := k.verify(sealed)
	if err != nil {
		return dst, err
	}
	n := len(dst)
	dst = slices.Grow(dst, len(text))[:n+len(text)]
	k.crypt(dst[n:], iv, text)
	return dst, nil
}

func (k *Key) verify(sealed []byte) (iv, text []byte, err error) {
	if len(sealed) < Overhead {
		return nil, nil, fmt.Errorf("sealed object of %d bytes is too short: %w", len(sealed), ErrAuth)
	}
	end := len(sealed) - macSize
	iv, text = sealed[:ivSize], sealed[ivSize:end:end]
	mac := k.sum(iv, text)
	if [ivSize]byte(iv) == [ivSize]byte{} || subtle.ConstantTimeCompare(mac[:], sealed[end:]) != 1 {
		return nil, nil, ErrAuth
	}
	return iv, text, nil
}

type keyJSON struct {
	MAC struct {
		K []byte `json:"k"`
		R []byte `json:"r"`
	} `json:"mac"`
	Encrypt []byte `json:"encrypt"`
}

// MarshalJSON writes the key in the form key files hold.
func (k *Key) MarshalJSON() ([]byte, error) {
	var j keyJSON
	j.MAC.K, j.MAC.R, j.Encrypt = k.macK[:], k.macR[:], k.encrypt[:]
	return json.Marshal(j)
}

// UnmarshalJSON is the reverse of MarshalJSON.
func (k *Key) UnmarshalJSON(p []byte) error {
	var j keyJSON
	if err := json.Unmarshal(p, &j); err != nil {
		return err
	}
	if len(j.MAC.K) != 16 || len(j.MAC.R) != 16 || len(j.Encrypt) != 32 {
		return errors.New("key with a part of wrong length")
	}
	k.encrypt, k.macK, k.macR = [32]byte(j.Encrypt), [16]byte(j.MAC.K), [16]byte(j.MAC.R)
	return k.setup()
}

// SaltSize is the length of a salt in bytes; the format allows no other.
const SaltSize = 64

// KDF holds the parameters of scrypt. Memory is 128*N*R bytes for each lane under way.
type KDF struct{ N, R, P int }

// DefaultKDF costs 64 MiB and, on two cores of a machine of 2024, about 0.07 s, most of it on one of them: enough to make guessing dear, little
// enough for a command that runs every few minutes.
var DefaultKDF = KDF{N: 32768, R: 8, P: 2}

// Check says whether the parameters are in the range that every reader of the format accepts.
func (f KDF) Check() error {
	if f.N < 2 || bits.OnesCount(uint(f.N)) != 1 || f.R < 1 || f.P < 1 || f.R >= 1<<24 || f.P >= 1<<24 || f.N >= 1<<31 ||
		f.R*f.P >= 1<<30 || 128*f.R*f.N >= 1<<31 || 128*f.R*f.P >= 1<<31 {
		return fmt.Errorf("scrypt parameters N=%d r=%d p=%d are out of range", f.N, f.R, f.P)
	}
	return nil
}

// Derive makes a key from a password.
func (f KDF) Derive(password string, salt []byte) (*Key, error) {
	if err := f.Check(); err != nil {
		return nil, err
	}
	if len(salt) != SaltSize {
		return nil, fmt.Errorf("salt of %d bytes, not %d", len(salt), SaltSize)
	}
	p, err := scryptKey(password, salt, f, 64)
	if err != nil {
		return nil, fmt.Errorf("scrypt: %w", err)
	}
	return fromBytes(p)
}
