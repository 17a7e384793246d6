package fssnap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/holdfast-backup/holdfast/internal/userenv"
)

// A Runner runs a program and returns what it wrote to its standard output. Drivers take one so that
// tests can play recorded answers.
type Runner func(ctx context.Context, argv ...string) ([]byte, error)

// A CommandError is returned when a program failed.
type CommandError struct {
	Argv   []string
	Stderr string // its last lines
	Err    error
}

func (e *CommandError) Error() string {
	s := fmt.Sprintf("%s: %v", strings.Join(e.Argv, " "), e.Err)
	if e.Stderr != "" {
		s += ": " + e.Stderr
	}
	return s
}

func (e *CommandError) Unwrap() error { return e.Err }

const (
	// maxOutput bounds what is kept of a program's output: lists of 10,000 snapshots are 1 MB.
	maxOutput = 16 << 20
	maxStderr = 4 << 10
	// runTimeout is for one call. Snapshots take seconds at most; removing big ones may take longer.
	runTimeout = 5 * time.Minute
)

var errTooMuch = errors.New("its output is longer than 16 MiB")

// Run runs a program without a shell, in the C locale and UTC, with nothing to read. It is looked for
// in the system's directories as well, which are often missing in the PATH of users. When ctx ends,
// or after 5 minutes, it and its children are killed.
//
// Errors: *CommandError; exec.ErrNotFound if there is no such program.
func Run(ctx context.Context, argv ...string) ([]byte, error) {
	path, err := lookPath(argv[0])
	if err != nil {
		return nil, &CommandError{Argv: argv, Err: err}
	}
	ctx, cancel := context.WithTimeout(ctx, runTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, argv[1:]...)
	cmd.Env = append(userenv.Environ(), "LC_ALL=C", "TZ=UTC")
	out, err := Output(ctx, cmd)
	if err != nil {
		var ce *CommandError
		if errors.As(err, &ce) {
			ce.Argv = argv
		}
		return nil, err
	}
	return out, nil
}

// Output runs a prepared command in a process group of its own and returns its bounded output. When
// ctx, which must be the command's, ends, the whole group is killed.
//
// Errors: *CommandError.
func Output(ctx context.Context, cmd *exec.Cmd) ([]byte, error) {
	stdout := &limited{max: maxOutput}
	stderr := &tail{max: maxStderr}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second // for pipes that escaped children hold open
	err := cmd.Run()
	switch {
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case err == nil && stdout.over:
		err = errTooMuch
	}
	if err != nil {
		return nil, &CommandError{Argv: cmd.Args, Stderr: stderr.String(), Err: err}
	}
	return stdout.buf.Bytes(), nil
}

func lookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil || !errors.Is(err, exec.ErrNotFound) || strings.Contains(name, "/") {
		return path, err
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if p, perr := exec.LookPath(filepath.Join(dir, name)); perr == nil {
			return p, nil
		}
	}
	return "", err
}

// limited keeps the beginning of what was written. The buffer is a field, so that nothing gets past
// Write.
type limited struct {
	buf  bytes.Buffer
	max  int
	over bool
}

func (l *limited) Write(p []byte) (int, error) {
	keep := p
	if room := l.max - l.buf.Len(); len(p) > room {
		l.over = true // the program shall not die of a closed pipe half way
		keep = p[:room]
	}
	_, _ = l.buf.Write(keep) // never fails
	return len(p), nil
}

// tail keeps the end of what was written.
type tail struct {
	buf []byte
	max int
}

func (t *tail) Write(p []byte) (int, error) {
	t.buf = append(t.buf, p...)
	if extra := len(t.buf) - t.max; extra > 0 {
		t.buf = append(t.buf[:0], t.buf[extra:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	return strings.Join(strings.Fields(strings.ToValidUTF8(string(t.buf), "?")), " ")
}
