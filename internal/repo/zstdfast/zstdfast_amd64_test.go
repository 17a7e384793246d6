package zstdfast

import (
	"bytes"
	"testing"
)

// Processors without the instructions write the same frames.
func TestPlain(t *testing.T) {
	if !bmi2 {
		t.Fatal("this processor has no BMI2: nothing to compare")
	}
	defer func() { bmi2 = true }()
	var e Encoder
	both := func(src []byte) (fast, plain []byte) {
		bmi2 = true
		fast = e.Append(nil, src)
		bmi2 = false
		return fast, e.Append(nil, src)
	}
	for name, src := range samples() {
		if fast, plain := both(src); !bytes.Equal(fast, plain) {
			t.Errorf("%s: not the same", name)
		} else if !bytes.Equal(decode(t, plain), src) {
			t.Errorf("%s: does not decode", name)
		}
	}
	text, table := prose(3000, 8), records(3000, 8)
	for n := range 1500 {
		for _, src := range [][]byte{text[:n], table[:n], bytes.Repeat(text[:1+n%100], n)[:n]} {
			if fast, plain := both(src); !bytes.Equal(fast, plain) {
				t.Fatalf("%d bytes: not the same", n)
			}
		}
	}
}
