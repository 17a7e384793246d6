package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

func TestExitCodes(t *testing.T) {
	interrupted, cancel := context.WithCancelCause(context.Background())
	cancel(fmt.Errorf("%w by SIGTERM", errInterrupted))
	lost, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("the lock was lost"))
	for name, c := range map[string]struct {
		ctx  context.Context
		err  error
		code int
		text string
	}{
		"nil":                       {err: nil, code: 0},
		"plain":                     {err: errors.New("disk full"), code: 1, text: "disk full"},
		"usage":                     {err: fmt.Errorf("x: %w", usageError("wrong")), code: 2, text: "wrong"},
		"incomplete":                {err: withCode(exitIncomplete, errors.New("incomplete")), code: 3},
		"not started":               {err: fmt.Errorf("thaw: %w", freeze.ErrNotStarted), code: 4, text: "started again"},
		"not started, interrupted":  {ctx: interrupted, err: errors.Join(context.Canceled, freeze.ErrNotStarted), code: 4, text: "started again"},
		"not started, wrong usage":  {err: errors.Join(usageError("x"), freeze.ErrNotStarted), code: 4},
		"no repository":             {err: fmt.Errorf("%w at x", repo.ErrNoRepository), code: 10},
		"locked":                    {err: fmt.Errorf("x: %w", &repo.LockedError{}), code: 11},
		"wrong password":            {err: fmt.Errorf("x: %w", repo.ErrWrongPassword), code: 12},
		"interrupted":               {ctx: interrupted, err: fmt.Errorf("read: %w", context.Canceled), code: 130, text: "interrupted by SIGTERM"},
		"interrupted, as cause":     {ctx: interrupted, err: context.Cause(interrupted), code: 130, text: "interrupted by SIGTERM"},
		"a real error just before":  {ctx: interrupted, err: errors.New("disk full"), code: 1, text: "disk full"},
		"lock lost":                 {ctx: lost, err: fmt.Errorf("read: %w", context.Canceled), code: 1, text: "the lock was lost"},
		"cancelled by someone else": {err: context.Canceled, code: 1, text: "canceled"},
		"running":                   {err: &freeze.BusyError{}, code: 1, text: "running"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := c.ctx
			if ctx == nil {
				ctx = context.Background()
			}
			err := explain(ctx, c.err)
			if got := exitCode(err); got != c.code {
				t.Errorf("exit code %d, want %d", got, c.code)
			}
			if err != nil && !strings.Contains(err.Error(), c.text) {
				t.Errorf("%q is not in %q", c.text, err)
			}
			if c.code > 3 && c.code != 130 && len(ui.Hints(err)) == 0 {
				t.Error("nothing tells what to do")
			}
			// Done twice, as the inner and the outer call do.
			if again := explain(ctx, err); exitCode(again) != c.code || len(ui.Hints(again)) != len(ui.Hints(err)) {
				t.Errorf("explained twice: %v %q", again, ui.Hints(again))
			}
		})
	}
}

func TestExitHelp(t *testing.T) {
	all := exitHelp()
	for _, code := range []int{0, 1, 2, 3, 4, 10, 11, 12, 130} {
		if !strings.Contains(all, fmt.Sprintf("  %3d  ", code)) {
			t.Errorf("%d is not in the help", code)
		}
	}
	if some := exitHelp(exitDone, exitUsage); strings.Contains(some, "130") || !strings.Contains(some, "  2  ") {
		t.Error(some)
	}
}

// TestEveryVerbSaysItsCodes keeps help and man pages complete.
func TestEveryVerbSaysItsCodes(t *testing.T) {
	a := &app{}
	for verb := range flagNames(a.commands()) {
		switch verb {
		case "help", "key":
			continue
		}
		c, _, err := a.commands().Find(strings.Fields(verb))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(c.Long, "Exit codes:") || c.Short == "" {
			t.Errorf("%s: the help has no exit codes, or no short text", verb)
		}
	}
}

func TestCacheDir(t *testing.T) {
	for name, c := range map[string]struct {
		opt  string
		env  []string
		want string
	}{
		"set":     {opt: "/x", env: []string{"XDG_CACHE_HOME=/y"}, want: "/x"},
		"service": {env: []string{"CACHE_DIRECTORY=/var/cache/hf", "XDG_CACHE_HOME=/y"}, want: "/var/cache/hf"},
		"user":    {env: []string{"XDG_CACHE_HOME=/y"}, want: "/y/holdfast"},
		"root":    {want: "/var/cache/holdfast"},
	} {
		a := &app{environ: c.env, opt: globalOptions{cacheDir: c.opt}}
		if got := a.cacheDir(); got != c.want {
			t.Errorf("%s: got %q, want %q", name, got, c.want)
		}
	}
}

// Who runs out of room is told what to do, and that nothing has to be done again.
func TestFullDisk(t *testing.T) {
	for _, e := range []error{syscall.ENOSPC, syscall.EDQUOT} {
		err := explainBackup(fmt.Errorf("store a pack: %w", &os.PathError{Op: "write", Path: "/r/data/ab", Err: e}))
		if h := strings.Join(ui.Hints(err), " "); !errors.Is(err, e) || !strings.Contains(h, "holdfast prune --max-repack-size 0") {
			t.Errorf("%v: %q", err, h)
		}
	}
	if err := explainBackup(errors.New("something else")); len(ui.Hints(err)) > 0 {
		t.Errorf("%v: %q", err, ui.Hints(err))
	}
}

// Who may not look at a repository on disk is told where it is, and who may.
func TestForbiddenRepository(t *testing.T) {
	denied := &backend.PermanentError{Err: fmt.Errorf("stat config: %w", syscall.EACCES)}
	err := openError("/srv/backup", "/srv/backup", denied)
	if h := strings.Join(ui.Hints(err), " "); !strings.Contains(err.Error(), "/srv/backup") || !strings.Contains(h, "as root") || exitCode(err) != 1 {
		t.Errorf("%v: %q", err, h)
	}
	if err := openError("sftp:host:dir", "sftp:host:dir", denied); len(ui.Hints(err)) > 0 {
		t.Errorf("%v: %q", err, ui.Hints(err))
	}
	if err := openError("/srv/backup", "/srv/backup", context.Canceled); err != context.Canceled {
		t.Error(err)
	}
}
