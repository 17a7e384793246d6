// Command holdfast backs up and restores Infinite Scale and OpenCloud instances.
//
// Each verb has a file: it turns flags into the options of one call and the outcome into an exit
// code. What the verbs share stands in app.go (settings, display, signals), repository.go (address,
// opening, locking), password.go and exit.go (the table of exit codes).
package main

import (
	"context"
	"os"

	"github.com/holdfast-backup/holdfast/internal/cpus"
	"github.com/holdfast-backup/holdfast/internal/drill"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/freeze/auto"
)

func main() {
	auto.Register() // a guard, and thaw, must know how to start what another way has stopped
	// A second copy of this program that holds the promise to start the instance never returns.
	freeze.MaybeGuard()
	drill.MaybeJail() // the first process around the server of a drill
	cpus.Oversubscribe(context.Background())
	os.Exit(run())
}

// run is main without the exit, so that whatever is deferred has run when the process ends.
func run() int {
	a := &app{in: os.Stdin, out: os.Stdout, err: os.Stderr, environ: os.Environ()}
	return a.run(os.Args[1:])
}
