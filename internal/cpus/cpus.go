// Package cpus tells how many processors this process may use, which decides how much is under way at once, and
// lets more threads than that run Go.
package cpus

import (
	"context"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

var count = runtime.GOMAXPROCS(0) // before Oversubscribe

// Count returns how many processors this process may use: what the machine, its affinity and its control group allow, or
// the environment variable GOMAXPROCS.
func Count() int { return count }

// Oversubscribe lets the scheduler run half as many threads again as there are processors, and twice as many while the processors have
// time left. A thread that waits for a disk keeps its place until the scheduler looks, which takes up to 10 ms; with as many places as processors,
// one is idle meanwhile. Where all are busy, twice as many slow down what waits for nothing by the changes from one to the other.
// Call it once, at the start of the program: it looks again and again until ctx is done. The environment variable GOMAXPROCS rules it out.
func Oversubscribe(ctx context.Context) {
	if os.Getenv("GOMAXPROCS") != "" {
		return
	}
	p := places{count: count}
	runtime.GOMAXPROCS(p.few())
	go func() {
		tick := time.NewTicker(lookEvery)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case now := <-tick.C:
				if used, ok := used(); ok {
					if n := p.next(now, used); n != runtime.GOMAXPROCS(0) {
						runtime.GOMAXPROCS(n)
					}
				}
			}
		}
	}()
}

// lookEvery is so long that stopping all for a moment, which each change does, costs nothing.
const lookEvery = 200 * time.Millisecond

// places decides how many threads may run Go.
type places struct {
	count int // processors
	at    time.Time
	used  time.Duration // of the processors by this process, at that time
	many  bool
}

func (p *places) few() int { return p.count + (p.count+1)/2 }

// next returns how many threads may run Go from now on, when this process has used so much of the processors since it began.
func (p *places) next(now time.Time, used time.Duration) int {
	elapsed := now.Sub(p.at) * time.Duration(p.count)
	if begun := !p.at.IsZero(); begun && elapsed > 0 {
		switch share := float64(used-p.used) / float64(elapsed); {
		case share < 0.80:
			p.many = true
		case share > 0.95:
			p.many = false
		}
	}
	p.at, p.used = now, used
	if p.many {
		return max(2*p.count, p.few()+1)
	}
	return p.few()
}

// used returns the time of the processors that this process has used, of the kernel for it too.
func used() (time.Duration, bool) {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		return 0, false
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano()), true
}
