package measure

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestBytes(t *testing.T) {
	for in, want := range map[string]int64{"4GB": 4e9, "512MiB": 512 << 20, "1000": 1000, "1.5 kB": 1500, "2TB": 2e12, "7B": 7} {
		var b Bytes
		if err := b.Set(in); err != nil || int64(b) != want {
			t.Errorf("%q is %d, want %d (%v)", in, b, want, err)
		}
	}
	for _, in := range []string{"", "GB", "-1", "1XB", "1e30GB"} {
		var b Bytes
		if err := b.Set(in); err == nil {
			t.Errorf("%q is taken for %d", in, b)
		}
	}
	for n, want := range map[int64]string{0: "0 B", 999: "999 B", 1000: "1.00 kB", 4e9: "4.00 GB", 12345678: "12.3 MB", 999999: "1.00 MB", 500000: "500 kB"} {
		if got := Size(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
}

func TestOf(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want Spread
	}{
		{nil, Spread{}}, {[]float64{3}, Spread{3, 3, 3}}, {[]float64{5, 1, 3}, Spread{1, 3, 5}}, {[]float64{4, 1, 2, 3}, Spread{1, 2.5, 4}},
	} {
		if got := Of(c.in); got != c.want {
			t.Errorf("%v gives %+v, want %+v", c.in, got, c.want)
		}
	}
}

func TestCommand(t *testing.T) {
	c, out, err := Command(t.TempDir(), []string{"X=seen"}, "sh", "-c", "echo $X; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")
	if err != nil || out != "seen\n" {
		t.Fatalf("%v %q", err, out)
	}
	if c.Wall <= 0 || c.CPU() <= 0 || c.Peak < 100<<10 || c.CPU() > 2*c.Wall+time.Second {
		t.Errorf("cost is %+v", c)
	}
	_, _, err = Command("", nil, "sh", "-c", "echo broken >&2; exit 3")
	var e *ExitError
	if !errors.As(err, &e) || !strings.Contains(err.Error(), "broken") {
		t.Errorf("a failing program: %v", err)
	}
}

func TestUsageAndSpace(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "a/b"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"x", "a/b/y"} {
		if err := os.WriteFile(filepath.Join(dir, f), make([]byte, 100), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if files, size, err := Usage(dir); files != 2 || size != 200 || err != nil {
		t.Errorf("%d files, %d bytes, %v", files, size, err)
	}
	if err := NeedSpace(dir, Space{Bytes: 1, Inodes: 1}); err != nil {
		t.Error(err)
	}
	if err := NeedSpace(dir, Space{Bytes: 1 << 60}); err == nil || !strings.Contains(err.Error(), "are needed") {
		t.Errorf("too large: %v", err)
	}
}
