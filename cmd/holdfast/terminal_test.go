package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal runs holdfast on a pseudo terminal, as a person would.
type terminal struct {
	t    *testing.T
	ptmx *os.File
	cmd  *exec.Cmd
	done chan struct{} // closed when there is no more output
	mu   sync.Mutex
	out  bytes.Buffer
}

func onTerminal(t *testing.T, env []string, args ...string) *terminal {
	t.Helper()
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(ptmx.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(ptmx.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The test binary is the program if it is called by its name.
	name := filepath.Join(t.TempDir(), "holdfast")
	if err := os.Symlink(self, name); err != nil {
		t.Fatal(err)
	}
	x := &terminal{t: t, ptmx: ptmx, cmd: exec.Command(name, args...), done: make(chan struct{})}
	x.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "TERM=xterm", "HOLDFAST_CONFIG_FILE=" + os.DevNull, "HOLDFAST_STATE_DIR=" + t.TempDir(), "GORACE=atexit_sleep_ms=0"}, env...)
	x.cmd.Stdin, x.cmd.Stdout, x.cmd.Stderr = tty, tty, tty
	x.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := x.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(x.done)
		buf := make([]byte, 4096)
		for {
			n, err := ptmx.Read(buf)
			x.mu.Lock()
			x.out.Write(buf[:n])
			x.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		_ = x.cmd.Process.Kill()
		ptmx.Close()
	})
	return x
}

func (x *terminal) text() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.out.String()
}

// expect waits for text on the screen, and forgets the screen up to it.
func (x *terminal) expect(want string) {
	x.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		x.mu.Lock()
		i := strings.Index(x.out.String(), want)
		if i >= 0 {
			x.out.Next(i + len(want))
		}
		x.mu.Unlock()
		if i >= 0 {
			return
		}
	}
	x.t.Fatalf("%q does not appear; the screen shows %q", want, x.text())
}

// send types text, once the echo is off if it is a secret.
func (x *terminal) send(text string, secret bool) {
	x.t.Helper()
	for secret {
		t, err := unix.IoctlGetTermios(int(x.ptmx.Fd()), unix.TCGETS)
		if err != nil {
			x.t.Fatal(err)
		}
		if t.Lflag&unix.ECHO == 0 {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if _, err := x.ptmx.WriteString(text); err != nil {
		x.t.Fatal(err)
	}
}

func (x *terminal) wait(code int) {
	x.t.Helper()
	_ = x.cmd.Wait()
	<-x.done
	if got := x.cmd.ProcessState.ExitCode(); got != code {
		x.t.Fatalf("exit code %d, want %d; the screen shows %q", got, code, x.text())
	}
}

func TestPasswordPrompts(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "repo")

	x := onTerminal(t, nil, "init", "--repo", dir)
	x.expect("password of the repository: ")
	x.send("first\n", true)
	x.expect("password of the repository, again: ")
	x.send("second\n", true)
	x.expect("error: the two passwords differ")
	x.wait(2)

	x = onTerminal(t, nil, "init", "--repo", dir)
	x.expect("password of the repository: ")
	x.send("tops3cret\n", true)
	x.expect("again: ")
	x.send("tops3cret\n", true)
	x.expect("Keep the password safe")
	x.wait(0)
	if strings.Contains(x.text(), "tops3cret") {
		t.Error("the password stands on the screen")
	}

	x = onTerminal(t, nil, "snapshots", "--repo", dir)
	x.expect("password of the repository: ")
	x.send("wrong\n", true)
	x.wait(12)

	// Ctrl-C at the prompt.
	x = onTerminal(t, nil, "snapshots", "--repo", dir)
	x.expect("password of the repository: ")
	x.send("tops\x03", true)
	x.expect("error: interrupted by SIGINT")
	x.wait(130)

	// Nobody should type a password for a path that is wrong.
	x = onTerminal(t, nil, "snapshots", "--repo", dir+"x")
	x.expect("error: no repository")
	x.wait(10)
}
