package crypto

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"testing"

	"golang.org/x/crypto/scrypt"
)

// Test vectors of RFC 7914, section 12.
func TestScryptVectors(t *testing.T) {
	for _, c := range []struct {
		password, salt string
		f              KDF
		want           string
	}{
		{"", "", KDF{16, 1, 1}, "77d6576238657b203b19ca42c18a0497f16b4844e3074ae8dfdffa3fede21442fcd0069ded0948f8326a753a0fc81f17e8d3e0fb2e0d3628cf35e20c38d18906"},
		{"password", "NaCl", KDF{1024, 8, 16}, "fdbabe1c9d3472007856e7190d01e9fe7c6ad7cbc8237830e77376634b3731622eaf30d92e22a3886ff109279d9830dac727afb94a83ee6d8360cbdfa2cc0640"},
		{"pleaseletmein", "SodiumChloride", KDF{16384, 8, 1}, "7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2d5432955613f0fcf62d49705242a9af9e61e85dc0d651e40dfcf017b45575887"},
	} {
		got, err := scryptKey(c.password, []byte(c.salt), c.f, 64)
		if err != nil || hex.EncodeToString(got) != c.want {
			t.Errorf("%q, %q, %v: %x, %v", c.password, c.salt, c.f, got, err)
		}
	}
}

func TestScryptLikeTheLibrary(t *testing.T) {
	for _, f := range []KDF{{2, 1, 1}, {2, 3, 2}, {64, 5, 3}, {32, 16, 7}, {1024, 8, 4}, {32768, 8, 2}, {65536, 8, 1}, {65536, 16, 3}} {
		password, salt := fmt.Sprint(f), bytes.Repeat([]byte{byte(f.P)}, SaltSize)
		want, err := scrypt.Key([]byte(password), salt, f.N, f.R, f.P, 80)
		if err != nil {
			t.Fatal(err)
		}
		got, err := scryptKey(password, salt, f, 80)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%v: %x, not %x, %v", f, got, want, err)
		}
	}
}
