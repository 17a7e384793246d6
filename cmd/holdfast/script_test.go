package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// The scripts run the real main as a program of its own.
func TestMain(m *testing.M) {
	freeze.MaybeGuard()
	testscript.Main(m, map[string]func(){"holdfast": main})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(e *testscript.Env) error {
			home := filepath.Join(e.WorkDir, "home")
			settings := filepath.Join(home, "empty.yaml")
			e.Setenv("HOME", home)
			e.Setenv("TZ", "UTC")
			e.Setenv("TERM", "dumb")
			e.Setenv("HOLDFAST_CONFIG_FILE", settings) // not the one of this machine
			e.Setenv("HOLDFAST_STATE_DIR", filepath.Join(home, "state"))
			e.Setenv("HOLDFAST_CACHE_DIR", filepath.Join(home, "cache"))
			e.Setenv("RESTIC_CACHE_DIR", filepath.Join(home, "restic"))
			return errors.Join(
				os.Mkdir(home, 0o755),
				os.WriteFile(settings, nil, 0o644),
				os.WriteFile(filepath.Join(e.WorkDir, "pw"), []byte("a good password\n"), 0o600),
			)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits":      cmdExits,
			"fixture":    cmdFixture,
			"equal":      cmdEqual,
			"lock":       cmdLock,
			"repository": cmdRepository,
			"odd":        cmdOdd,
			"signal":     cmdSignal,
			"await":      cmdAwait,
		},
	})
}

// exits CODE COMMAND ARG...: the command ends with just this exit code.
func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND ARG...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// fixture NAME: unpacks a sample instance into the folder of its name.
func cmdFixture(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: fixture NAME")
	}
	archive, err := testfixture.Archive(args[0])
	ts.Check(err)
	ts.Check(testfixture.Extract(archive, ts.Getenv("WORK")))
}

// equal WANT GOT: the trees are equal in everything.
func cmdEqual(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: [!] equal WANT GOT")
	}
	diffs, err := testfixture.Diff(ts.MkAbs(args[0]), ts.MkAbs(args[1]))
	ts.Check(err)
	if neg && len(diffs) == 0 {
		ts.Fatalf("the trees are equal")
	}
	if !neg && len(diffs) > 0 {
		ts.Fatalf("%s", strings.Join(diffs, "\n"))
	}
}

// repository DIR: makes a repository whose password is quick to try, unlike that of init.
func cmdRepository(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: repository DIR")
	}
	_, err := repo.Init(context.Background(), local.New(ts.MkAbs(args[0])), "a good password",
		repo.InitOptions{KDF: repo.KDF{N: 1024, R: 1, P: 1}})
	ts.Check(err)
}

// lock REPO shared|exclusive: locks a repository until the end of the script.
func cmdLock(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: lock REPO shared|exclusive")
	}
	ctx := context.Background()
	r, err := repo.Open(ctx, local.New(ts.MkAbs(args[0])), "a good password", repo.Options{})
	ts.Check(err)
	l, _, err := r.Lock(ctx, repo.LockOptions{Exclusive: args[1] == "exclusive"})
	ts.Check(err)
	ts.Defer(func() { l.Unlock() })
}

// odd DIR: makes files with names that a terminal must not see.
func cmdOdd(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: odd DIR")
	}
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o755))
	for _, name := range []string{"plain", "esc\x1b[2J", "new\nline", "not-utf8-\xff", "größe"} {
		ts.Check(os.WriteFile(filepath.Join(dir, name), []byte(name), 0o640))
	}
	ts.Check(os.Symlink("a\x1btarget", filepath.Join(dir, "symlink")))
}

// signal FILE NAME: waits for the file and sends the signal to the process whose id is in it.
func cmdSignal(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: signal FILE SIGNAL")
	}
	pid, err := strconv.Atoi(strings.TrimSpace(await(ts, args[0])))
	ts.Check(err)
	ts.Check(syscall.Kill(pid, map[string]syscall.Signal{"INT": syscall.SIGINT, "TERM": syscall.SIGTERM}[args[1]]))
}

// await FILE: waits until the file is there and not empty.
func cmdAwait(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: await FILE")
	}
	await(ts, args[0])
}

func await(ts *testscript.TestScript, file string) string {
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if p, err := os.ReadFile(ts.MkAbs(file)); err == nil && len(p) > 0 {
			return string(p)
		}
	}
	ts.Fatalf("waited in vain for %s", file)
	return ""
}
