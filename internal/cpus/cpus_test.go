package cpus

import (
	"os"
	"runtime"
	"testing"
)

func TestOversubscribe(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(before)
	t.Setenv("GOMAXPROCS", "3")
	Oversubscribe()
	if n := runtime.GOMAXPROCS(0); n != before {
		t.Errorf("%d threads although the environment says how many, want %d", n, before)
	}
	os.Unsetenv("GOMAXPROCS")
	Oversubscribe()
	if n := runtime.GOMAXPROCS(0); n <= Count() || n > 2*Count() {
		t.Errorf("%d threads for %d processors", n, Count())
	}
	if Count() != before {
		t.Errorf("%d processors, want %d", Count(), before)
	}
}
