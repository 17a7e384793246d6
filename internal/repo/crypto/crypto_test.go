package crypto

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"testing"
)

func b64(t *testing.T, s string) []byte {
	t.Helper()
	p, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// The sample was made by stock restic with the password "demo".
func TestSampleOfRestic(t *testing.T) {
	user, err := KDF{32768, 8, 2}.Derive("demo", b64(t, "eU5MHeDXllt/THyNjK+GF6d31ZJWSeLZB9PM5QN56b8DrBMuTgOe/wjmHGNY6sCe2IFVunPhns2MZAQjmaSRNw=="))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := user.Open(b64(t, "+6Z7HF6Eu0YFWg4+MRwsVoKnwPUlh6wSbVJlvKCpqAy9X4ADT74I9+tduhcKbBHrDEdXbacqWcmIA0gY60Pk1YGpBNBJ7/VfFmhHQcYFGxIrVof/AG6DAzhqJLXUeY7CyC0pPNTmy73xGrZigPRXXPtXQRDQ6v130IFuBWEp1iAkpenbEfQXGgUz9Y05tnN2Swoy3m8dsAE2B2iWwvRoDA=="))
	if err != nil {
		t.Fatal(err)
	}
	var master Key
	if err := json.Unmarshal(plain, &master); err != nil {
		t.Fatal(err)
	}
	again, err := json.Marshal(&master)
	if err != nil || !bytes.Equal(again, plain) {
		t.Errorf("key JSON %s, not %s (%v)", again, plain, err)
	}
	conf, err := master.Open(b64(t, "SUV9BvI1sya6Wu/UehKi+ih8sHTYsq/BppE1RC2wnmIhTjoPugsEw+7UN3zRuC0oJNFVjVOvHLAN4iuuQ+4Bkjmmdi/mq78oFd/z9oWxMORCtVwoHNjT3CxY73Bg6cHWbz4ZxdENBTyYnyxEpmsBkCNXPjZgniIawIThCdMslonjYU9zZ2ETn+lPKQTiBQzxdfzljG2pcQglBB8="))
	want := `{"version":2,"id":"7891176b2a7713ad928c8a2a8c505d5469892d00f8053c9690c17332e96e16f5","chunker_polynomial":"32f1199141b509"}`
	if err != nil || string(conf) != want {
		t.Errorf("config %s, %v", conf, err)
	}
}

func TestRoundTrip(t *testing.T) {
	k := NewKey()
	for _, n := range []int{0, 1, 15, 16, 17, 1000, 1 << 20} {
		plain := bytes.Repeat([]byte("a"), n)
		sealed := k.Seal([]byte("head"), plain)
		if len(sealed) != 4+n+Overhead || string(sealed[:4]) != "head" {
			t.Fatalf("%d bytes sealed to %d", n, len(sealed))
		}
		roomy := k.Seal(make([]byte, 0, n+100), plain)
		for _, s := range [][]byte{sealed[4:], roomy} {
			got, err := k.Open(bytes.Clone(s))
			if err != nil || !bytes.Equal(got, plain) {
				t.Errorf("%d bytes: %v", n, err)
			}
		}
		if bytes.Equal(sealed[4:], roomy) {
			t.Error("the IV repeats")
		}
	}
}

func TestChangedDataIsRefused(t *testing.T) {
	k := NewKey()
	sealed := k.Seal(nil, []byte("some content"))
	for i := range sealed {
		bad := bytes.Clone(sealed)
		bad[i] ^= 1
		keep := bytes.Clone(bad)
		if _, err := k.Open(bad); !errors.Is(err, ErrAuth) || !bytes.Equal(bad, keep) {
			t.Errorf("byte %d changed: %v", i, err)
		}
	}
	for n := range len(sealed) {
		if _, err := k.Open(bytes.Clone(sealed[:n])); !errors.Is(err, ErrAuth) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
	if _, err := NewKey().Open(bytes.Clone(sealed)); !errors.Is(err, ErrAuth) {
		t.Errorf("another key: %v", err)
	}
	if _, err := k.Open(make([]byte, 50)); !errors.Is(err, ErrAuth) {
		t.Errorf("zero IV: %v", err)
	}
}

func TestBadKeys(t *testing.T) {
	for _, s := range []string{
		`{}`, `[]`, `{"mac":{"k":"AAAA","r":"AAAA"},"encrypt":"AAAA"}`,
		`{"mac":{"k":"VPh7FwdxKNlsKZQv+1z+6w==","r":"U0s543dAINbPEi/bZppADw=="},"encrypt":"` + base64.StdEncoding.EncodeToString(make([]byte, 32)) + `"}`,
	} {
		if err := new(Key).UnmarshalJSON([]byte(s)); err == nil {
			t.Errorf("%s is taken for a key", s)
		}
	}
	for _, f := range []KDF{{}, {1, 8, 1}, {3, 8, 1}, {1024, 0, 1}, {1024, 8, 0}, {1 << 30, 8, 1}, {-2, 8, 1}, {1024, 1 << 40, 1 << 40}, {1024, 8, 1 << 22}} {
		if _, err := f.Derive("x", make([]byte, SaltSize)); err == nil {
			t.Errorf("%+v is accepted", f)
		}
	}
	if _, err := (KDF{16, 8, 1}).Derive("x", make([]byte, 63)); err == nil {
		t.Error("a short salt is accepted")
	}
}
