// Package child runs a helper program whose standard input and output are a connection: ssh, rclone.
package child

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"
)

// Process is a program that runs. It is a net.Conn to it.
type Process struct {
	in   *os.File // our end of its output
	out  *os.File // our end of its input
	cmd  *exec.Cmd
	tail tail
	done chan struct{} // closed when it has ended
	err  error         // valid after done

	once sync.Once
}

var _ net.Conn = (*Process)(nil)

// Start runs argv with the environment env. The program has a process group of its own, so that
// Ctrl-C does not take the connection away before the repository is unlocked; it ends when its input
// does, that is also when we are killed.
func Start(argv, env []string) (*Process, error) {
	p := &Process{cmd: exec.Command(argv[0], argv[1:]...), done: make(chan struct{})}
	p.cmd.Env = env
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	theirIn, ourOut, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	ourIn, theirOut, err := os.Pipe()
	if err != nil {
		theirIn.Close()
		ourOut.Close()
		return nil, err
	}
	p.in, p.out = ourIn, ourOut
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = theirIn, theirOut, &p.tail
	p.cmd.WaitDelay = 2 * time.Second // its own children may keep its stderr open
	err = p.cmd.Start()
	theirIn.Close()
	theirOut.Close()
	if err != nil {
		ourIn.Close()
		ourOut.Close()
		return nil, err
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// Explain adds to an error what the program said last, and how it ended if it did.
func (p *Process) Explain(err error) error {
	name := p.cmd.Args[0]
	select {
	case <-p.done:
	case <-time.After(500 * time.Millisecond): // the end comes a moment after its last words
	}
	select {
	case <-p.done:
		how := "it ended"
		if p.err != nil {
			how = p.err.Error()
		}
		if said := p.tail.String(); said != "" {
			return fmt.Errorf("%s: %s: %s", name, how, said)
		}
		return fmt.Errorf("%s: %s: %w", name, how, err)
	default:
	}
	if said := p.tail.String(); said != "" {
		return fmt.Errorf("%w; %s says: %s", err, name, said)
	}
	return err
}

// Failed reports whether the program has ended by itself and in failure, and with which exit code. A
// program that a signal has ended did not fail by itself.
func (p *Process) Failed() (code int, failed bool) {
	select {
	case <-p.done:
		code = p.cmd.ProcessState.ExitCode()
		return code, code > 0
	default:
		return 0, false
	}
}

// Close ends the input of the program, waits for a moment for its end, and kills it then.
func (p *Process) Close() error {
	p.once.Do(func() {
		p.out.Close()
		select {
		case <-p.done:
		case <-time.After(2 * time.Second):
			_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
			<-p.done
		}
		p.in.Close()
	})
	return nil
}

// Kill ends the program at once.
func (p *Process) Kill() {
	select {
	case <-p.done:
	default:
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	}
	_ = p.Close()
}

func (p *Process) Read(b []byte) (int, error) { return p.in.Read(b) }

func (p *Process) Write(b []byte) (int, error) {
	n, err := p.out.Write(b)
	if errors.Is(err, syscall.EPIPE) {
		err = fmt.Errorf("the program has ended: %w", io.ErrClosedPipe)
	}
	return n, err
}

type addr struct{}

func (addr) Network() string { return "pipe" }
func (addr) String() string  { return "pipe" }

// LocalAddr is of no use here.
func (p *Process) LocalAddr() net.Addr { return addr{} }

// RemoteAddr is of no use here.
func (p *Process) RemoteAddr() net.Addr { return addr{} }

// SetDeadline sets both deadlines.
func (p *Process) SetDeadline(t time.Time) error {
	return errors.Join(p.in.SetReadDeadline(t), p.out.SetWriteDeadline(t))
}

// SetReadDeadline limits Read.
func (p *Process) SetReadDeadline(t time.Time) error { return p.in.SetReadDeadline(t) }

// SetWriteDeadline limits Write.
func (p *Process) SetWriteDeadline(t time.Time) error { return p.out.SetWriteDeadline(t) }

// tail keeps the end of what a program says.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	const most = 4 << 10
	t.buf = append(t.buf, p...)
	if len(t.buf) > most {
		t.buf = append([]byte(nil), t.buf[len(t.buf)-most:]...)
	}
	return len(p), nil
}

// String is the last lines, at most three, made harmless and joined.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := bytes.Split(bytes.TrimSpace(t.buf), []byte("\n"))
	if len(lines) > 3 {
		lines = lines[len(lines)-3:]
	}
	s := strings.ToValidUTF8(string(bytes.Join(lines, []byte("; "))), "?")
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		switch {
		case r == '\r':
			return -1
		case !unicode.IsPrint(r):
			return '?'
		}
		return r
	}, s))
}
