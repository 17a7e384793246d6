// Command ocis behaves, for the tests of freezing, as the product does when it is started and
// stopped: "ocis server" locks idm/idm.boltdb below $OCIS_BASE_DATA_PATH, writes to its files while
// it runs, and ends on SIGTERM, which it records as a clean stop. It is built without cgo, so that
// an image needs nothing else. Under the name run it is what stands around a server.
//
//	ocis server             OCIS_TEST_MODE: "ignore" ignores SIGTERM, "slow:DURATION" takes its time
//	run wrapper COMMAND     what a shell does as the first process of a container: it runs COMMAND,
//	                        passes no signal on, and ends when COMMAND does
//	run stay COMMAND        the same, but it does not end
//	run supervise COMMAND   runs COMMAND again whenever it ends; passes SIGTERM on and ends then
//	run healthy             succeeds after half a second
//	run idle                does nothing until SIGTERM
//
// A file "fail" in the base directory holds how many more starts of the server shall fail.
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
	record := func(word string) {
		f, err := os.OpenFile(filepath.Join(base, "events"), os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o644)
		if err != nil {
			fail(err)
		}
		fmt.Fprintln(f, word)
		f.Close()
	}
	failing := filepath.Join(base, "fail")
	if text, err := os.ReadFile(failing); err == nil {
		if n, _ := strconv.Atoi(strings.TrimSpace(string(text))); n > 0 {
			if err := os.WriteFile(failing, []byte(strconv.Itoa(n-1)), 0o644); err != nil {
				fail(err)
			}
			record("failed")
			fail(fmt.Errorf("failing as told"))
		}
	}
	if err := os.MkdirAll(filepath.Join(base, "idm"), 0o755); err != nil {
		fail(err)
	}
	db, err := os.OpenFile(filepath.Join(base, "idm", "idm.boltdb"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		fail(err)
	}
	if err := syscall.Flock(int(db.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		record("locked out")
		fail(err)
	}
	data, err := os.OpenFile(filepath.Join(base, "data"), os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		fail(err)
	}
	record("started")
	mode, arg, _ := strings.Cut(os.Getenv("OCIS_TEST_MODE"), ":")
	var end <-chan time.Time
	tick := time.NewTicker(5 * time.Millisecond)
	for {
		select {
		case <-tick.C:
			fmt.Fprintln(data, time.Now().UnixNano())
			continue
		case <-sig:
			if mode == "ignore" {
				continue
			}
			d, _ := time.ParseDuration(arg)
			end = time.After(d)
			continue
		case <-end:
		}
		record("stopped")
		return
	}
}
