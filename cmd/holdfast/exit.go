package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// The exit codes.
const (
	exitDone          = 0
	exitError         = 1
	exitUsage         = 2
	exitIncomplete    = 3
	exitNotStarted    = 4
	exitNoRepository  = 10
	exitLocked        = 11
	exitWrongPassword = 12
	exitInterrupted   = 130
	exitPipe          = 141 // as of a program that SIGPIPE ended; nothing is wrong
)

// exitTable is the one place that says what the codes mean; help and man pages are made from it.
var exitTable = []struct {
	code    int
	meaning string
}{
	{exitDone, "done"},
	{exitError, "error"},
	{exitUsage, "wrong usage: a flag, an argument or a setting"},
	{exitIncomplete, "the snapshot is incomplete"},
	{exitNotStarted, "the instance could not be started again"},
	{exitNoRepository, "there is no repository"},
	{exitLocked, "the repository is locked"},
	{exitWrongPassword, "the password is wrong"},
	{exitInterrupted, "interrupted by a signal"},
}

// exitHelp renders the rows of the table that a verb can end with; no codes is all of them.
func exitHelp(codes ...int) string {
	var b strings.Builder
	b.WriteString("Exit codes:\n")
	for _, e := range exitTable {
		if len(codes) == 0 || slices.Contains(codes, e.code) {
			fmt.Fprintf(&b, "  %3d  %s\n", e.code, e.meaning)
		}
	}
	return b.String()
}

// Codes that verbs with a repository share.
var repoCodes = []int{exitDone, exitError, exitUsage, exitNoRepository, exitLocked, exitWrongPassword, exitInterrupted}

// codeError is an error with an exit code of its own.
type codeError struct {
	error
	code int
}

func (e *codeError) Unwrap() error { return e.error }

func withCode(code int, err error) error { return &codeError{err, code} }

// usageError is for what the caller typed or set.
func usageError(format string, args ...any) error {
	return withCode(exitUsage, fmt.Errorf(format, args...))
}

// errInterrupted is the cause of a context that a signal has cancelled.
var errInterrupted = errors.New("interrupted")

// exitCode maps err to its code. That the service is down weighs more than anything else.
func exitCode(err error) int {
	var code *codeError
	var locked *repo.LockedError
	switch {
	case err == nil:
		return exitDone
	case errors.Is(err, freeze.ErrNotStarted):
		return exitNotStarted
	case errors.Is(err, errInterrupted):
		return exitInterrupted
	case errors.As(err, &code):
		return code.code
	case errors.Is(err, repo.ErrNoRepository):
		return exitNoRepository
	case errors.As(err, &locked):
		return exitLocked
	case errors.Is(err, repo.ErrWrongPassword):
		return exitWrongPassword
	}
	return exitError
}

// explain gives an error of ctx its cause, and errors of other packages the hints that only the
// command line can give, because they name flags and verbs.
func explain(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		if c := context.Cause(ctx); !errors.Is(err, c) && !errors.Is(err, freeze.ErrNotStarted) {
			err = c
		} else if !errors.Is(err, c) {
			err = errors.Join(err, c)
		}
	}
	var locked *repo.LockedError
	switch {
	case errors.Is(err, freeze.ErrNotReady):
		return explainNotReady(err)
	case errors.Is(err, freeze.ErrNotStarted):
		return ui.WithHints(err, "Start the service by hand now, and look into its log.")
	case errors.Is(err, repo.ErrNoRepository):
		return ui.WithHints(err, "Is --repo right, and its disk mounted? `holdfast init` makes a new repository.")
	case errors.Is(err, repo.ErrWrongPassword):
		return ui.WithHints(err, "Each of the repository's passwords opens it; any other one cannot.")
	case errors.As(err, &locked):
		return ui.WithHints(err,
			"--retry-lock=10m waits for the other program.",
			"`holdfast unlock` removes locks whose program is gone.")
	case errors.Is(err, freeze.ErrGivenUp):
		return ui.WithHints(err, "What was stored stays, and need not be stored again by the next backup.",
			"--max-downtime says how long the instance may be down.")
	case errors.Is(err, freeze.ErrRunning) && len(ui.Hints(err)) == 0:
		return ui.WithHints(err, "Nothing was changed. Stop the instance first.")
	}
	return err
}
