package freeze

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/userenv"
)

// outputLimit is how many bytes of the end of a command's output an error shows.
const outputLimit = 4 << 10

// CommandOptions configures the command freezer. Commands are run by sh -c with the environment of
// this process, without the variables of Holdfast and restic, in the current directory.
type CommandOptions struct {
	StopCommand  string
	StartCommand string
	ReadyCommand string // "" : the start command ends when the instance is ready
	ReadyURL     string
	StopTimeout  time.Duration // 0 is DefaultStopTimeout; from the stop command on
	ReadyTimeout time.Duration // 0 is DefaultReadyTimeout
	StartRetries int           // 0 is DefaultStartRetries; negative is none
	StartBackoff time.Duration // 0 is DefaultBackoff
	Progress     progress.Sink `json:"-"`
}

// CommandRecipe starts an instance by a command.
type CommandRecipe struct {
	Start Text  `json:"start"`
	Dir   Text  `json:"dir"`
	Env   Texts `json:"env"`
}

// Command is the freezer that stops and starts by the user's own commands.
type Command struct{ o CommandOptions }

// NewCommand returns the freezer of --freeze command.
//
// Errors: a stop or start command that is missing.
func NewCommand(o CommandOptions) (*Command, error) {
	if strings.TrimSpace(o.StopCommand) == "" || strings.TrimSpace(o.StartCommand) == "" {
		return nil, errors.New("freezing by command needs both a stop command and a start command: give --stop-command and --start-command")
	}
	o.StopTimeout = cmp.Or(o.StopTimeout, DefaultStopTimeout)
	o.ReadyTimeout = cmp.Or(o.ReadyTimeout, DefaultReadyTimeout)
	o.StartRetries = max(cmp.Or(o.StartRetries, DefaultStartRetries), 0)
	o.StartBackoff = cmp.Or(o.StartBackoff, DefaultBackoff)
	return &Command{o}, nil
}

// Method returns "command".
func (c *Command) Method() string { return KindCommand }

// Freeze runs the stop command and waits for the proof.
func (c *Command) Freeze(ctx context.Context, inst *ocis.Instance) (Frozen, error) {
	return freezePlain(ctx, c, inst, c.o.Progress)
}

// Plan records how to start the instance again.
func (c *Command) Plan(_ context.Context, inst *ocis.Instance) (*Plan, error) {
	dir, err := os.Getwd()
	if err != nil {
		return nil, fmt.Errorf("the directory to run the start command in: %w", err)
	}
	paths := Paths(inst)
	env := commandEnv()
	return &Plan{
		Recipe: Recipe{
			Kind:        KindCommand,
			Command:     &CommandRecipe{Start: Text(c.o.StartCommand), Dir: Text(dir), Env: env},
			Paths:       paths,
			Ready:       Ready{Command: Text(c.o.ReadyCommand), Dir: Text(dir), Env: env, URL: c.o.ReadyURL, Timeout: c.o.ReadyTimeout},
			StopTimeout: c.o.StopTimeout,
			Retries:     c.o.StartRetries,
			Backoff:     c.o.StartBackoff,
		},
		Stop: func(ctx context.Context, run *Run) error {
			deadline := time.Now().Add(c.o.StopTimeout)
			cctx, cancel := context.WithDeadline(ctx, deadline)
			defer cancel()
			if err := runShell(cctx, shell{line: c.o.StopCommand, dir: dir, env: env, name: "the stop command", kill: true}, run); err != nil {
				return err
			}
			err := waitFree(ctx, paths, nil, deadline, c.o.StopTimeout, run)
			var busy *BusyError
			if errors.As(err, &busy) && len(busy.Holders) > 0 {
				return &hintError{err, fmt.Sprintf("The stop command ended, but %s still runs: does it stop the right service?", busy.Holders[0].who())}
			}
			return err
		},
	}, nil
}

// commandEnv is the environment for the commands of the user.
func commandEnv() []string { return userenv.Environ() }

func startCommand(ctx context.Context, r Recipe, run *Run) error {
	c := r.Command
	if c == nil {
		return errors.New("the record holds no start command")
	}
	sh := shell{line: string(c.Start), dir: string(c.Dir), env: c.Env, name: "the start command"}
	// A start command that stays in the foreground is the server itself.
	sh.settled = func(ctx context.Context) bool {
		if r.Ready.Command != "" || r.Ready.URL != "" {
			return askReady(ctx, r.Ready) == nil
		}
		u, err := Look(ctx, r.Paths, run.Except...)
		return err == nil && len(u.Holders) > 0
	}
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(r.Ready.Timeout, DefaultReadyTimeout))
	defer cancel()
	return runShell(ctx, sh, run)
}

// shell is one command line of the user.
type shell struct {
	line    string
	dir     string
	env     []string
	name    string // for messages: "the stop command"
	kill    bool   // end it, with all it started, when the context ends; otherwise leave it alone
	settled func(ctx context.Context) bool
}

// settleAfter is how long a start command may take before the question is asked whether it is the
// server itself that runs in the foreground.
const settleAfter = 3 * time.Second

// runShell runs a command to its end. Its output goes to a file and not a pipe, because a server
// that it leaves in the background would die of a pipe that is closed behind it.
func runShell(ctx context.Context, sh shell, run *Run) error {
	out, err := openOutput(run.Log)
	if err != nil {
		return fmt.Errorf("run %s: %w", sh.name, err)
	}
	defer out.Close()
	begin, err := out.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("run %s: %w", sh.name, err)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("run %s: %w", sh.name, err)
	}
	cmd := exec.Command("/bin/sh", "-c", sh.line)
	cmd.Dir, cmd.Env = sh.dir, sh.env
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no Ctrl-C of the terminal for the server
	if sh.kill {
		cmd.ExtraFiles = run.Inherit
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("run %s: %w", sh.name, err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()

	f := follower{file: out, at: begin, sink: run.Progress, name: sh.name}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	began := time.Now()
	for {
		select {
		case err := <-done:
			f.poll(true)
			if err != nil {
				return fmt.Errorf("%s failed: %w%s", sh.name, err, tail(out, begin))
			}
			return nil
		case <-ctx.Done():
			if sh.kill {
				_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
				<-done
			}
			f.poll(true)
			return fmt.Errorf("%s did not end: %w%s", sh.name, context.Cause(ctx), tail(out, begin))
		case <-tick.C:
			f.poll(false)
			if sh.settled != nil && time.Since(began) > settleAfter && sh.settled(ctx) {
				return nil
			}
		}
	}
}

// openLog opens the log of an instance.
func openLog(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
}

// openOutput opens the log, or a nameless file if there is none. A start must not fail for want of a
// place to write, so in the end output is thrown away.
func openOutput(log string) (*os.File, error) {
	if log != "" {
		if f, err := openLog(log); err == nil {
			return f, nil
		}
	}
	f, err := os.CreateTemp("", "holdfast-*.log")
	if err != nil {
		return os.OpenFile(os.DevNull, os.O_RDWR, 0)
	}
	_ = os.Remove(f.Name())
	return f, nil
}

// tail returns the end of what was written to f after begin, as the last lines of an error.
func tail(f *os.File, begin int64) string {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil || end <= begin {
		return ""
	}
	cut := ""
	if end-begin > outputLimit {
		begin, cut = end-outputLimit, "..."
	}
	buf := make([]byte, end-begin)
	n, _ := f.ReadAt(buf, begin)
	text := strings.TrimSpace(string(buf[:n]))
	if text == "" {
		return ""
	}
	return "; its output: " + cut + text
}

// follower turns what is appended to a file into verbose events, line by line.
type follower struct {
	file *os.File
	at   int64
	rest []byte
	sink progress.Sink
	name string
}

func (f *follower) poll(last bool) {
	if f.sink == nil {
		return
	}
	buf := make([]byte, 32<<10)
	for {
		n, err := f.file.ReadAt(buf, f.at)
		f.at += int64(n)
		f.rest = append(f.rest, buf[:n]...)
		for {
			line, rest, ok := bytes.Cut(f.rest, []byte("\n"))
			if !ok {
				break
			}
			f.emit(line)
			f.rest = rest
		}
		if len(f.rest) > 64<<10 { // no line for people
			f.emit(f.rest)
			f.rest = nil
		}
		if n == 0 || err != nil {
			break
		}
	}
	if last && len(f.rest) > 0 {
		f.emit(f.rest)
		f.rest = nil
	}
}

func (f *follower) emit(line []byte) {
	f.sink.Emit(progress.Event{Kind: progress.Verbose, Phase: "freeze", Item: f.name, Message: string(line)})
}

// askReady asks once.
func askReady(ctx context.Context, r Ready) error {
	if r.Command != "" {
		sh := shell{line: string(r.Command), dir: string(r.Dir), env: r.Env, name: "the ready command", kill: true}
		if err := runShell(ctx, sh, &Run{}); err != nil {
			return err
		}
	}
	if r.URL == "" {
		return nil
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.URL, nil)
	if err != nil {
		return err
	}
	tr := &http.Transport{
		DisableKeepAlives: true,
		// Many instances have a certificate of their own making, and nothing is said or believed here.
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}
	resp, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Do(req)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode >= 400 {
		return fmt.Errorf("%s answers %s", r.URL, resp.Status)
	}
	return nil
}
