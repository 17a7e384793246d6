package pax_test

import (
	"testing"

	"github.com/holdfast-backup/holdfast/internal/pax"
)

func TestXattrNames(t *testing.T) {
	for name, escaped := range map[string]string{
		"user.oc.name": "user.oc.name", "user.a=b%": "user.a%3Db%25", "user.%3D": "user.%253D", "user.%253D": "user.%25253D",
		"==": "%3D%3D", "": "", "user.\xff\x00": "user.\xff\x00",
	} {
		if got := pax.EscapeXattrName(name); got != escaped {
			t.Errorf("%q is written %q, not %q", name, got, escaped)
		}
		if got := pax.XattrName(escaped); got != name {
			t.Errorf("%q is read %q, not %q", escaped, got, name)
		}
	}
	if got := pax.XattrName("user.100%"); got != "user.100%" { // others do not escape
		t.Errorf("got %q", got)
	}
}

func TestParseHoles(t *testing.T) {
	for _, c := range []struct {
		in   string
		want []pax.Extent
		ok   bool
	}{
		{"", nil, true},
		{"0:10", []pax.Extent{{Off: 0, Len: 10}}, true},
		{"0:1,1:2,9:1", []pax.Extent{{Off: 0, Len: 1}, {Off: 1, Len: 2}, {Off: 9, Len: 1}}, true},
		{"0:11", nil, false},
		{"9:2", nil, false},
		{"3:1,2:1", nil, false},
		{"0:2,1:2", nil, false},
		{"0:0", nil, false},
		{"-1:2", nil, false},
		{"0:-1", nil, false},
		{"1", nil, false},
		{"0:1,", nil, false},
		{"9223372036854775807:9223372036854775807", nil, false},
		{"0x1:1", nil, false},
	} {
		got, err := pax.ParseHoles(c.in, 10)
		if (err == nil) != c.ok || len(got) != len(c.want) {
			t.Errorf("%q: %v, %v", c.in, got, err)
			continue
		}
		for i := range got {
			if got[i] != c.want[i] {
				t.Errorf("%q: %v", c.in, got)
			}
		}
	}
}
