// Command ocis behaves, for the tests of freezing, as the product does when it is started and
// stopped: "ocis server" locks idm/idm.boltdb below $OCIS_BASE_DATA_PATH, writes to its files while
// it runs, and ends on SIGTERM, which it records as a clean stop. It is built without cgo, so that
// an image needs nothing else. Under the name run it is what stands around a server.
//
//	ocis server             OCIS_TEST_MODE: "ignore" ignores SIGTERM, "slow:DURATION" takes its time;
//	                        OCIS_TEST_NOTES: directory for what is no data, and the server works as
//	                        under load (see package load), with a change each OCIS_TEST_PAUSE
//	run wrapper COMMAND     what a shell does as the first process of a container: it runs COMMAND,
//	                        passes no signal on, and ends when COMMAND does
//	run stay COMMAND        the same, but it does not end
//	run supervise COMMAND   runs COMMAND again whenever it ends; passes SIGTERM on and ends then
//	run healthy             succeeds after half a second
//	run idle                does nothing until SIGTERM
//
// Beside the data, or in the directory for notes, it writes what it did into the file "events". A file
// "fail" there holds how many more starts of the server shall fail; "mode" takes the place of
// OCIS_TEST_MODE; under load "pid" holds the id of the server. "halt-at-stop" and "halt-at-start" hold the
// id of a process that gets SIGSTOP just before the server ends, or once it has started: so a backup
// stands still before its own next step.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/holdfast-backup/holdfast/internal/freeze/freezetest/boltlock"
	"github.com/holdfast-backup/holdfast/internal/freeze/freezetest/load"
)

func main() {
	args := append(os.Args[1:], "")
	switch args[0] {
	case "server":
		server()
	case "wrapper", "stay":
		signal.Ignore(syscall.SIGTERM)
		cmd := child(os.Args[2:])
		_ = cmd.Wait()
		for args[0] == "stay" {
			time.Sleep(time.Hour)
		}
		os.Exit(cmd.ProcessState.ExitCode())
	case "supervise":
		supervise()
	case "healthy":
		time.Sleep(500 * time.Millisecond)
	case "idle":
		<-terminated()
	default:
		fail(fmt.Errorf("unknown command %q", args[0]))
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "ocis:", err)
	os.Exit(1)
}

func terminated() <-chan os.Signal {
	c := make(chan os.Signal, 4)
	signal.Notify(c, syscall.SIGTERM)
	return c
}

func child(args []string) *exec.Cmd {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		fail(err)
	}
	return cmd
}

func supervise() {
	var running atomic.Pointer[os.Process]
	var ending atomic.Bool
	sig := terminated()
	go func() {
		<-sig
		ending.Store(true)
		_ = running.Load().Signal(syscall.SIGTERM)
	}()
	for !ending.Load() {
		cmd := child(os.Args[2:])
		running.Store(cmd.Process)
		_ = cmd.Wait()
	}
}

func server() {
	sig := terminated()
	base := os.Getenv("OCIS_BASE_DATA_PATH")
	notes := os.Getenv("OCIS_TEST_NOTES")
	loaded := notes != ""
	if !loaded {
		notes = base
	}
	record := func(word string) {
		f, err := os.OpenFile(filepath.Join(notes, "events"), os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o644)
		check(err)
		fmt.Fprintln(f, word)
		f.Close()
	}
	failing := filepath.Join(notes, "fail")
	if text, err := os.ReadFile(failing); err == nil {
		if n, _ := strconv.Atoi(strings.TrimSpace(string(text))); n > 0 {
			check(os.WriteFile(failing, []byte(strconv.Itoa(n-1)), 0o644))
			record("failed")
			fail(fmt.Errorf("failing as told"))
		}
	}
	check(os.MkdirAll(filepath.Join(base, "idm"), 0o755))
	db, err := os.OpenFile(filepath.Join(base, "idm", "idm.boltdb"), os.O_RDWR|os.O_CREATE, 0o644)
	check(err)
	defer db.Close() // not before, as a file that nobody needs any more would be
	if err := boltlock.Take(db); err != nil {
		record("locked out")
		fail(err)
	}
	var work, stopped func()
	if loaded {
		j, err := load.Open(filepath.Join(notes, "journal"))
		check(err)
		check(j.Mark(load.Started))
		pid := filepath.Join(notes, "pid")
		check(os.WriteFile(pid+".new", []byte(strconv.Itoa(os.Getpid())), 0o644))
		check(os.Rename(pid+".new", pid)) // whoever reads it must not find an empty one
		work = func() { check(j.Change(filepath.Dir(base))) }
		stopped = func() { check(j.Mark(load.Stopped)) }
	} else {
		data, err := os.OpenFile(filepath.Join(base, "data"), os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o644)
		check(err)
		work = func() { fmt.Fprintln(data, time.Now().UnixNano()) }
		stopped = func() {}
	}
	halt(filepath.Join(notes, "halt-at-start"))
	record("started")
	var end <-chan time.Time
	pause := 5 * time.Millisecond
	if text := os.Getenv("OCIS_TEST_PAUSE"); text != "" {
		pause, err = time.ParseDuration(text)
		check(err)
	}
	tick := time.NewTicker(pause)
	for {
		select {
		case <-tick.C:
			work()
			continue
		case <-sig:
			mode, arg, _ := strings.Cut(readOr(filepath.Join(notes, "mode"), os.Getenv("OCIS_TEST_MODE")), ":")
			if mode == "ignore" {
				continue
			}
			d, _ := time.ParseDuration(arg)
			end = time.After(d)
			continue
		case <-end:
		}
		stopped()
		record("stopped")
		halt(filepath.Join(notes, "halt-at-stop"))
		return
	}
}

// halt halts the process whose id is in a file, once.
func halt(file string) {
	if text := readOr(file, ""); text != "" {
		pid, err := strconv.Atoi(text)
		check(err)
		check(os.Remove(file))
		check(syscall.Kill(pid, syscall.SIGSTOP))
	}
}

// readOr is what is in a file, or, without one, the other text.
func readOr(file, other string) string {
	if text, err := os.ReadFile(file); err == nil {
		return strings.TrimSpace(string(text))
	}
	return other
}

func check(err error) {
	if err != nil {
		fail(err)
	}
}
