package backup

import (
	"errors"
	"testing"
	"time"
)

// TestWarmPasses: the warm copy goes on until a pass is short enough, or no shorter any more.
func TestWarmPasses(t *testing.T) {
	s := time.Second
	for name, c := range map[string]struct {
		took []time.Duration // of each pass; the last one goes on for ever
		want int
	}{
		"short at once":             {[]time.Duration{5 * s}, 1},
		"one more is enough":        {[]time.Duration{300 * s, 4 * s}, 2},
		"it helps again and again":  {[]time.Duration{300 * s, 200 * s, 140 * s, 90 * s, 60 * s, 40 * s, 20 * s, 10 * s, 5 * s}, 9},
		"the scan itself is longer": {[]time.Duration{300 * s, 20 * s, 20 * s}, 3},
		"a little does not count":   {[]time.Duration{300 * s, 230 * s}, 2},
		"it gets longer":            {[]time.Duration{10 * s, 11 * s}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			var now time.Time
			n := 0
			err := repeat(5*s, func() time.Time { return now }, func(pass int) (bool, error) {
				if n++; n != pass || n > 100 {
					t.Fatalf("pass %d is called %d", n, pass)
				}
				now = now.Add(c.took[min(n, len(c.took))-1])
				return true, nil
			})
			if err != nil || n != c.want {
				t.Errorf("%d passes, want %d; %v", n, c.want, err)
			}
		})
	}
	n := 0
	if err := repeat(s, time.Now, func(int) (bool, error) { n++; return false, nil }); err != nil || n != 1 {
		t.Errorf("the last pass is followed by %d others; %v", n-1, err)
	}
	bad := errors.New("bad")
	if err := repeat(s, time.Now, func(int) (bool, error) { return true, bad }); !errors.Is(err, bad) {
		t.Errorf("%v", err)
	}
}
