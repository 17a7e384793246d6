package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/cloud/cloudtest"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/freeze/freezetest/boltlock"
	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// The scripts run the real main as a program of its own.
func TestMain(m *testing.M) {
	freeze.MaybeGuard()
	// The scripts wait for locks and starts more than they compute. -parallel goes before this.
	if err := flag.Set("test.parallel", "6"); err != nil {
		panic(err)
	}
	testscript.Main(m, map[string]func(){"holdfast": main, "cloud": cloudMain})
}

// cloudMain is the server of the scripts: as the product does, it locks the database, and ends on
// SIGTERM. If the file stop-this is there, it first stops the process whose id is in it: so a backup
// stands still just between the end of the server and its own next step.
func cloudMain() {
	must := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "cloud:", err)
			os.Exit(1)
		}
	}
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGTERM)
	dir := os.Getenv("CLOUD_DIR")
	db, err := os.OpenFile(filepath.Join(dir, os.Getenv("CLOUD_DB")), os.O_RDWR, 0)
	must(err)
	must(boltlock.Take(db))
	pid := []byte(strconv.Itoa(os.Getpid()))
	// Renamed, so that nobody reads half of it.
	must(os.WriteFile(filepath.Join(dir, "server.new"), pid, 0o644))
	must(os.Rename(filepath.Join(dir, "server.new"), filepath.Join(dir, "server")))
	<-sig
	stop := filepath.Join(dir, "stop-this")
	if data, err := os.ReadFile(stop); err == nil {
		n, err := strconv.Atoi(strings.TrimSpace(string(data)))
		must(err)
		must(os.Remove(stop))
		must(syscall.Kill(n, syscall.SIGSTOP))
	}
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(e *testscript.Env) error {
			home := filepath.Join(e.WorkDir, "home")
			settings := filepath.Join(home, "empty.yaml")
			e.Setenv("HOME", home)
			e.Setenv("GORACE", "atexit_sleep_ms=0") // the race detector would add a second to each run
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
		Cmds: withRemote(map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits":      cmdExits,
			"fixture":    cmdFixture,
			"history":    cmdHistory,
			"equal":      cmdEqual,
			"lock":       cmdLock,
			"repository": cmdRepository,
			"odd":        cmdOdd,
			"signal":     cmdSignal,
			"await":      cmdAwait,
			"gone":       cmdGone,
			"server":     cmdServer,
			"restarted":  cmdRestarted,
			"btrfs":      cmdBtrfs,
			"instance":   cmdInstance,
		}),
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
	sig := unix.SignalNum("SIG" + args[1])
	if sig == 0 {
		ts.Fatalf("no signal %s", args[1])
	}
	ts.Check(syscall.Kill(pid, sig))
}

// server DB: starts the server that locks DB. Its process id is in the file server.
func cmdServer(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: server DB")
	}
	ts.Setenv("CLOUD_DIR", ts.Getenv("WORK"))
	ts.Setenv("CLOUD_DB", args[0])
	path, err := exec.LookPath("cloud")
	ts.Check(err)
	cmd := exec.Command(path, "server")
	cmd.Dir = ts.Getenv("WORK")
	cmd.Env = []string{"PATH=" + ts.Getenv("PATH"), "GORACE=" + ts.Getenv("GORACE"),
		"CLOUD_DIR=" + ts.Getenv("CLOUD_DIR"), "CLOUD_DB=" + args[0]}
	ts.Check(cmd.Start())
	go func() { _ = cmd.Wait() }()
	ts.Defer(func() {
		// Whoever started it last: it is no child of this process.
		data, err := os.ReadFile(ts.MkAbs("server"))
		if err != nil {
			return
		}
		if pid, err := strconv.Atoi(string(data)); err == nil && runs(pid) {
			if exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); exe == path {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	})
	await(ts, "server")
}

// restarted FILE: waits until another server runs than the one whose process id is in the file.
func cmdRestarted(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: restarted FILE")
	}
	old := ts.ReadFile(args[0])
	eventually(ts, "another server", func() bool {
		data, err := os.ReadFile(ts.MkAbs("server"))
		if err != nil || string(data) == old {
			return false
		}
		pid, err := strconv.Atoi(string(data))
		return err == nil && runs(pid)
	})
}

// gone FILE: waits until the process whose id is in the file has ended.
func cmdGone(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: gone FILE")
	}
	pid, err := strconv.Atoi(strings.TrimSpace(await(ts, args[0])))
	ts.Check(err)
	eventually(ts, "the end of process "+strconv.Itoa(pid), func() bool { return !runs(pid) })
}

// runs tells whether a process lives; a zombie does not.
func runs(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(data), ") ")
	return rest != "" && rest[0] != 'Z' && rest[0] != 'X'
}

// await FILE: waits until the file is there and not empty.
func cmdAwait(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: await FILE")
	}
	await(ts, args[0])
}

func await(ts *testscript.TestScript, file string) string {
	var text []byte
	eventually(ts, file, func() bool {
		p, err := os.ReadFile(ts.MkAbs(file))
		text = p
		return err == nil && len(p) > 0
	})
	return string(text)
}

func eventually(ts *testscript.TestScript, what string, ok func() bool) {
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
	}
	ts.Fatalf("waited in vain for %s", what)
}

// btrfs DIR: mounts a new btrfs filesystem at DIR until the end of the script.
func cmdBtrfs(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: btrfs DIR")
	}
	dir := ts.MkAbs(args[0])
	image := ts.MkAbs(filepath.Base(dir) + ".image")
	ts.Check(os.MkdirAll(dir, 0o755))
	ts.Check(os.WriteFile(image, nil, 0o600))
	ts.Check(os.Truncate(image, 256<<20))
	ts.Check(ts.Exec("mkfs.btrfs", "-q", image))
	ts.Check(ts.Exec("mount", "-o", "loop", image, dir))
	// The loop device goes with its last mount.
	ts.Defer(func() { ts.Check(fssnap.Unmount(dir)) })
}

// instance start USER...: runs a stand-in of a running instance with these users, whose passwords are
// their names; $URL is its address. instance write USER PATH TEXT puts a file into a personal space.
// instance ls USER|PROJECT prints the files of a space with sizes, versions and tags. instance down
// has it answer nothing but errors.
func cmdInstance(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: instance start|write|ls|down ...")
	}
	if args[0] == "start" {
		s, stop := cloudtest.Start()
		ts.Defer(func() { instances.Delete(ts); stop() })
		for _, u := range args[1:] {
			s.AddUser(u, u)
			s.Home(u)
		}
		instances.Store(ts, s)
		ts.Setenv("URL", s.URL)
		return
	}
	v, ok := instances.Load(ts)
	if !ok {
		ts.Fatalf("no instance was started")
	}
	s := v.(*cloudtest.Server)
	switch {
	case args[0] == "write" && len(args) == 4:
		s.Write(s.Home(args[1]), args[2], args[3], time.Now())
	case args[0] == "ls" && len(args) == 2:
		items := s.Items(s.Find(args[1]))
		fmt.Fprintf(ts.Stdout(), "%d items\n", len(items)-1)
		for _, p := range slices.Sorted(maps.Keys(items)) {
			i := items[p]
			if i.Folder {
				continue
			}
			fmt.Fprintf(ts.Stdout(), "%s %d bytes %d versions %s %s\n", p, len(i.Data), len(i.Versions), i.ModTime.UTC().Format(time.RFC3339), strings.Join(i.Tags, ","))
		}
	case args[0] == "down":
		s.Down.Store(true)
	default:
		ts.Fatalf("instance %s?", args[0])
	}
}

// instances are the stand-ins of the scripts that run.
var instances sync.Map
