package main

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// freezeFlags say how to hold the instance still.
type freezeFlags struct {
	method                    string
	stop, start, ready, url   string
	stopTimeout, readyTimeout time.Duration
	maxDowntime               time.Duration
	stateDir                  string
}

func (f *freezeFlags) add(c *cobra.Command) {
	fs := c.Flags()
	fs.StringVar(&f.method, "freeze", "", "`method` of holding the instance still: none (it is stopped already) or command\n(default: command if --stop-command is set, else none)")
	fs.StringVar(&f.stop, "stop-command", "", "shell `command` that stops the instance")
	fs.StringVar(&f.start, "start-command", "", "shell `command` that starts it; it runs whatever happens to the backup")
	fs.StringVar(&f.ready, "ready-command", "", "shell `command` that succeeds as soon as the instance is ready")
	fs.StringVar(&f.url, "ready-url", "", "`address` that answers as soon as the instance is ready")
	fs.DurationVar(&f.stopTimeout, "freeze-timeout", freeze.DefaultStopTimeout, "how long the instance may take to stop")
	fs.DurationVar(&f.readyTimeout, "ready-timeout", freeze.DefaultReadyTimeout, "how long it may take to be ready")
	fs.DurationVar(&f.maxDowntime, "max-downtime", freeze.DefaultMaxDowntime, "give the backup up, and start the instance, when it was down for so long")
	fs.StringVar(&f.stateDir, "state-dir", "", "`directory` for the record of what must be started again (default /var/lib/holdfast for root)")
}

// guard is how the promise to start the instance is kept.
func (f *freezeFlags) guard(sink progress.Sink) freeze.Options {
	return freeze.Options{StateDir: f.stateDir, MaxDowntime: f.maxDowntime, Progress: sink}
}

// freezer makes the freezer that the flags ask for.
func (f *freezeFlags) freezer(sink progress.Sink) (freeze.Freezer, error) {
	for name, d := range map[string]time.Duration{"freeze-timeout": f.stopTimeout, "ready-timeout": f.readyTimeout, "max-downtime": f.maxDowntime} {
		if d <= 0 {
			return nil, usageError("--%s must be longer than nothing, not %s", name, d)
		}
	}
	method := f.method
	if method == "" {
		method = "none"
		if f.stop != "" || f.start != "" {
			method = "command"
		}
	}
	switch method {
	case "none":
		return freeze.None{Progress: sink}, nil
	case "command":
		fz, err := freeze.NewCommand(freeze.CommandOptions{
			StopCommand: f.stop, StartCommand: f.start, ReadyCommand: f.ready, ReadyURL: f.url,
			StopTimeout: f.stopTimeout, ReadyTimeout: f.readyTimeout, Progress: sink,
		})
		if err != nil {
			return nil, withCode(exitUsage, err)
		}
		return fz, nil
	}
	return nil, ui.WithHints(usageError("--freeze is none or command, not %q", f.method), "`holdfast backup --help` tells what they do.")
}
