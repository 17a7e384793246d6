package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/freeze/auto"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// freezeFlags say how to hold the instance still.
type freezeFlags struct {
	method                    string
	stop, start, ready, url   string
	stopTimeout, readyTimeout time.Duration
	startRetries              int
	maxDowntime               time.Duration
}

func (f *freezeFlags) add(c *cobra.Command) {
	fs := c.Flags()
	fs.StringVar(&f.method, "freeze", "", "`way` of holding the instance still: "+strings.Join(wayWords(), ", ")+"\n(default: command if --stop-command is set, process if --pid is, else auto)")
	fs.StringVar(&f.stop, "stop-command", "", "shell `command` that stops the instance")
	fs.StringVar(&f.start, "start-command", "", "shell `command` that starts it; it runs whatever happens to the backup")
	fs.DurationVar(&f.stopTimeout, "stop-timeout", freeze.DefaultStopTimeout, "how long the instance may take to stop")
	f.addStart(c)
	fs.DurationVar(&f.maxDowntime, "max-downtime", freeze.DefaultMaxDowntime, "give the backup up, and start the instance, when it was down for so long")
}

// addStart adds what is about the start alone, for verbs that do nothing else.
func (f *freezeFlags) addStart(c *cobra.Command) {
	fs := c.Flags()
	fs.StringVar(&f.ready, "ready-command", "", "shell `command` that succeeds as soon as the instance is ready")
	fs.StringVar(&f.url, "ready-url", "", "`address` that answers as soon as the instance is ready")
	fs.DurationVar(&f.readyTimeout, "ready-timeout", freeze.DefaultReadyTimeout, "how long it may take to be ready")
	fs.IntVar(&f.startRetries, "start-retries", freeze.DefaultStartRetries, "`number` of times that a start that fails is tried again")
}

// guard is how the promise to start the instance is kept.
func (f *freezeFlags) guard(a *app) freeze.Options {
	return freeze.Options{StateDir: a.opt.stateDir, MaxDowntime: f.maxDowntime, Progress: a.ui.Sink()}
}

// freezeRequest is what a way gets to make its freezer from.
type freezeRequest struct {
	*freezeFlags
	arg  string // what stands behind the colon, or ""
	pid  int    // --pid, or 0
	sink progress.Sink
}

// way is one word of --freeze.
type way struct {
	word string
	arg  string // what may stand behind a colon, or ""
	must bool   // it has to
	does string // for the help, a line
	make func(freezeRequest) (freeze.Freezer, error)
}

// ways are the words of --freeze, in the order of the help.
var ways = []way{
	{
		word: "auto", does: "looks how the instance runs and takes the way that fits",
		make: func(freezeRequest) (freeze.Freezer, error) { return nil, nil }, // settled once the instance is known
	},
	{
		word: "none", does: "it is stopped already, which is checked",
		make: func(r freezeRequest) (freeze.Freezer, error) { return freeze.None{Progress: r.sink}, nil },
	},
	{
		word: "command", does: "--stop-command stops it,\n--start-command starts it again",
		make: commandWay,
	},
	{
		word: "process", arg: "PID", does: "the server process is told to end,\nand is run again as it was;\nwithout PID it is --pid, or found by its data",
		make: processWay,
	},
	{
		word: "systemd", arg: "UNIT[,UNIT...]", must: true, does: "the units are stopped and started over D-Bus",
		make: namedWay("systemd"),
	},
	{
		word: "docker", arg: "CONTAINER[,CONTAINER...]", must: true, does: "the server in it is told to end,\nthen the container is stopped",
		make: namedWay("docker"),
	},
	{
		word: "compose", arg: "PROJECT[/SERVICE,...]", must: true, does: "the same for the product's services,\nand those listed",
		make: namedWay("compose"),
	},
	{
		word: freeze.KindViewOnly, does: "nothing is stopped: only views that are of one instant\nare read, as a power cut would leave them",
		make: func(freezeRequest) (freeze.Freezer, error) { return freeze.ViewOnly{}, nil },
	},
}

// wayWords lists the words for messages: none, process[:PID].
func wayWords() []string {
	var out []string
	for _, w := range ways {
		switch {
		case w.arg != "" && w.must:
			out = append(out, w.word+":"+w.arg)
		case w.arg != "":
			out = append(out, w.word+"[:"+w.arg+"]")
		default:
			out = append(out, w.word)
		}
	}
	return out
}

// wayHelp is the table for the help.
func wayHelp() string {
	words := wayWords()
	width := 0
	for _, w := range words {
		width = max(width, len(w))
	}
	var b strings.Builder
	for i, w := range ways {
		for j, line := range strings.Split(w.does, "\n") {
			word := words[i]
			if j > 0 {
				word = ""
			}
			fmt.Fprintf(&b, "  %-*s  %s\n", width, word, line)
		}
	}
	return b.String()
}

// auto are the flags for the ways that are made from a word.
func (r freezeRequest) auto() auto.Options {
	return auto.Options{
		StopTimeout: r.stopTimeout, ReadyCommand: r.ready, ReadyURL: r.url,
		ReadyTimeout: r.readyTimeout, StartRetries: r.retries(), Progress: r.sink,
	}
}

func namedWay(word string) func(freezeRequest) (freeze.Freezer, error) {
	return func(r freezeRequest) (freeze.Freezer, error) {
		fz, err := auto.Named(word+":"+r.arg, r.auto())
		if err != nil {
			return nil, withCode(exitUsage, err)
		}
		return fz, nil
	}
}

// settle returns fz, or where that is left open (auto) the way that fits how inst runs.
func (f *freezeFlags) settle(ctx context.Context, fz freeze.Freezer, inst *ocis.Instance, sink progress.Sink) (freeze.Freezer, error) {
	if fz != nil {
		return fz, nil
	}
	c, err := auto.Detect(ctx, inst, freezeRequest{freezeFlags: f, sink: sink}.auto())
	if err != nil {
		return nil, err
	}
	sink.Emit(progress.Event{Kind: progress.Info, Phase: "freeze", Message: "--freeze " + c.Argument + ": " + c.Why})
	return c.Freezer, nil
}

// freezer makes the freezer that the flags ask for; nil is left to settle. pid is that of the server as far as another flag
// names it, else 0.
func (f *freezeFlags) freezer(pid int, sink progress.Sink) (freeze.Freezer, error) {
	for _, d := range []struct {
		flag string
		time.Duration
	}{{"stop-timeout", f.stopTimeout}, {"ready-timeout", f.readyTimeout}, {"max-downtime", f.maxDowntime}} {
		if d.Duration <= 0 {
			return nil, usageError("--%s must be longer than nothing, not %s", d.flag, d.Duration)
		}
	}
	if f.startRetries < 0 {
		return nil, usageError("--start-retries must be 0 or more, not %d", f.startRetries)
	}
	method := f.method
	if method == "" {
		method = "auto"
		if f.stop != "" || f.start != "" {
			method = "command"
		} else if pid > 0 {
			method = "process"
		}
	}
	word, arg, colon := strings.Cut(method, ":")
	const hint = "`holdfast backup --help` tells what they do."
	for _, w := range ways {
		switch {
		case w.word != word:
		case colon && w.arg == "":
			return nil, ui.WithHints(usageError("--freeze=%s takes nothing behind it, not %q", word, method), hint)
		case (colon || w.must) && arg == "":
			return nil, ui.WithHints(usageError("--freeze=%s: %s is missing behind %s:", method, w.arg, word), hint)
		default:
			return w.make(freezeRequest{freezeFlags: f, arg: arg, pid: pid, sink: sink})
		}
	}
	return nil, ui.WithHints(usageError("--freeze is %s; %q is not known", strings.Join(wayWords(), ", "), method), hint)
}

// stops tells whether a way of freezing stops anything.
func stops(method string) bool { return method != freeze.KindNone && method != freeze.KindViewOnly }

// warnHot says what a backup of a running instance is worth.
func (a *app) warnHot(method string) {
	if method == freeze.KindViewOnly {
		a.ui.Warn("--freeze view-only: %s", snapshot.CrashWarning)
	}
}

// hintRunning tells what to do about an instance that runs although it must not, by the way that was
// to hold it still.
func hintRunning(err error, method string) error {
	switch {
	case !errors.Is(err, freeze.ErrRunning):
		return err
	case method == freeze.KindNone:
		return ui.WithHints(err, "Nothing was changed. Stop the instance first, or let Holdfast stop and start it: --freeze process, or --stop-command and --start-command.")
	case len(ui.Hints(err)) > 0:
		return ui.WithHints(err, "No snapshot was made.")
	}
	return ui.WithHints(err, "No snapshot was made. Does --freeze stop all that writes to the data, and does nothing start it again?")
}

// notReady is an error of an instance that was started but does not answer. It hides what it wraps:
// the hint for an instance that is down does not fit.
type notReady struct {
	text  string
	hints []string
}

func (e *notReady) Error() string   { return e.text }
func (e *notReady) Hints() []string { return e.hints }

// explainNotReady gives freeze.ErrNotReady a hint of its own; all other errors stay as they are.
func explainNotReady(err error) error {
	if !errors.Is(err, freeze.ErrNotReady) {
		return err
	}
	hints := append(ui.Hints(err), "Look into the log of the server. If it only needs longer, raise --ready-timeout; if it is ready, see --ready-url and --ready-command.")
	return withCode(exitNotStarted, &notReady{err.Error(), hints})
}

// downtimeLine says how long the instance was not available; "" if nothing was stopped.
func downtimeLine(r freeze.Record) string {
	switch {
	case !stops(r.Method) || r.Stopped.IsZero():
		return ""
	case r.Started.IsZero():
		return fmt.Sprintf("not available since %s, by %s", localTime(r.Stopping), r.Method)
	case r.Ready.IsZero():
		return fmt.Sprintf("not available since %s, started after %.1f s, not ready yet, by %s", localTime(r.Stopping), r.Downtime.Seconds(), r.Method)
	}
	return fmt.Sprintf("not available for %.1f s (stopping %.1f, held %.1f, starting %.1f), by %s",
		r.Downtime.Seconds(), r.ForStop.Seconds(), r.ForHold.Seconds(), r.ForStart.Seconds(), r.Method)
}

// retries is for options in which 0 is the default and less is none.
func (f *freezeFlags) retries() int {
	if f.startRetries == 0 {
		return -1
	}
	return f.startRetries
}

func commandWay(r freezeRequest) (freeze.Freezer, error) {
	fz, err := freeze.NewCommand(freeze.CommandOptions{
		StopCommand: r.stop, StartCommand: r.start, ReadyCommand: r.ready, ReadyURL: r.url,
		StopTimeout: r.stopTimeout, ReadyTimeout: r.readyTimeout, StartRetries: r.retries(), Progress: r.sink,
	})
	if err != nil {
		return nil, withCode(exitUsage, err)
	}
	return fz, nil
}

func processWay(r freezeRequest) (freeze.Freezer, error) {
	pid := r.pid
	if r.arg != "" {
		n, err := strconv.ParseInt(r.arg, 10, 32)
		if err != nil || n <= 0 {
			return nil, usageError("--freeze=process:%s: %q is no process id", r.arg, r.arg)
		}
		pid = int(n)
	}
	return freeze.NewProcess(freeze.ProcessOptions{
		PID: pid, ReadyCommand: r.ready, ReadyURL: r.url, StopTimeout: r.stopTimeout,
		ReadyTimeout: r.readyTimeout, StartRetries: r.retries(), Progress: r.sink,
	}), nil
}
