// Package cpus tells how many processors this process may use, which decides how much is under way at once, and
// lets more threads than that run Go.
package cpus

import (
	"os"
	"runtime"
)

var count = runtime.GOMAXPROCS(0) // before Oversubscribe

// Count returns how many processors this process may use: what the machine, its affinity and its control group allow, or
// the environment variable GOMAXPROCS.
func Count() int { return count }

// Oversubscribe lets the scheduler run half as many threads again as there are processors. A thread that waits for a disk keeps
// its place until the scheduler looks, which takes up to 10 ms; with as many places as processors, one is idle meanwhile. With twice
// as many, what waits for nothing is slowed down by the changes from one to the other.
// Call it at the start of the program. The environment variable GOMAXPROCS rules it out.
func Oversubscribe() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(count + (count+1)/2)
	}
}
