package cpus

import (
	"context"
	"os"
	"runtime"
	"testing"
	"time"
)

func TestOversubscribe(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(before)
	t.Setenv("GOMAXPROCS", "3")
	Oversubscribe(t.Context())
	if n := runtime.GOMAXPROCS(0); n != before {
		t.Errorf("%d threads although the environment says how many, want %d", n, before)
	}
	os.Unsetenv("GOMAXPROCS")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	Oversubscribe(ctx)
	if n := runtime.GOMAXPROCS(0); n <= Count() || n > 2*Count() {
		t.Errorf("%d threads for %d processors", n, Count())
	}
	if Count() != before {
		t.Errorf("%d processors, want %d", Count(), before)
	}
}

// Threads that may run Go are more while processors are idle, and fewer again once they are all busy.
func TestPlaces(t *testing.T) {
	p := places{count: 4}
	now, used := time.Unix(1000, 0), time.Duration(0)
	for i, c := range []struct {
		share float64 // of all processors, since the last look
		want  int
	}{{0, 6}, {0.99, 6}, {0.85, 6}, {0.5, 8}, {0.85, 8}, {0.99, 6}, {0.9, 6}, {0, 8}} {
		now = now.Add(lookEvery)
		used += time.Duration(c.share * 4 * float64(lookEvery))
		if n := p.next(now, used); n != c.want {
			t.Errorf("look %d, %.0f %% busy: %d places, want %d", i, c.share*100, n, c.want)
		}
	}
	if n := p.next(now, used+time.Second); n != 8 {
		t.Errorf("without time between looks: %d", n)
	}
	one := places{count: 1}
	one.next(now, 0)
	if few, many := one.few(), one.next(now.Add(time.Second), 0); few != 2 || many != 3 {
		t.Errorf("of one processor: %d and %d", few, many)
	}
}

// What the process itself has used grows with work.
func TestUsed(t *testing.T) {
	a, ok := used()
	for begin := time.Now(); ok; {
		b, _ := used()
		if b > a {
			return
		}
		if time.Since(begin) > 10*time.Second {
			break
		}
	}
	t.Errorf("nothing used after 10 s of work (%v)", ok)
}
