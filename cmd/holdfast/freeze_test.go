package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/freeze"
)

func TestWays(t *testing.T) {
	for name, c := range map[string]struct {
		f    freezeFlags
		want string // the method
		err  string
	}{
		"default":            {want: "auto"},
		"auto":               {f: freezeFlags{method: "auto"}, want: "auto"},
		"docker":             {f: freezeFlags{method: "docker:web"}, want: "docker"},
		"compose":            {f: freezeFlags{method: "compose:cloud/web"}, want: "compose"},
		"systemd":            {f: freezeFlags{method: "systemd:ocis.service"}, want: "systemd"},
		"no unit":            {f: freezeFlags{method: "systemd"}, err: "UNIT[,UNIT...] is missing behind systemd:"},
		"commands":           {f: freezeFlags{stop: "a", start: "b"}, want: "command"},
		"none over commands": {f: freezeFlags{method: "none", stop: "a", start: "b"}, want: "none"},
		"command":            {f: freezeFlags{method: "command", stop: "a", start: "b"}, want: "command"},
		"no start":           {f: freezeFlags{method: "command", stop: "a"}, err: "start-command"},
		"process":            {f: freezeFlags{method: "process"}, want: "process"},
		"process 7":          {f: freezeFlags{method: "process:7"}, want: "process"},
		"process nothing":    {f: freezeFlags{method: "process:"}, err: "PID is missing behind process:"},
		"process 0":          {f: freezeFlags{method: "process:0"}, err: `"0" is no process id`},
		"too much":           {f: freezeFlags{method: "none:x"}, err: `--freeze=none takes nothing behind it, not "none:x"`},
		"unknown":            {f: freezeFlags{method: "pray:hard"}, err: strings.Join(wayWords(), ", ")},
		"no time":            {f: freezeFlags{stopTimeout: -1}, err: "--stop-timeout must be longer than nothing"},
		"no retries":         {f: freezeFlags{startRetries: -1}, err: "--start-retries must be 0 or more"},
	} {
		t.Run(name, func(t *testing.T) {
			c.f.readyTimeout, c.f.maxDowntime = time.Second, time.Second
			if c.f.stopTimeout == 0 {
				c.f.stopTimeout = time.Second
			}
			fz, err := c.f.freezer(0, nil)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) || exitCode(err) != exitUsage {
					t.Errorf("error %v (exit code %d), want %q", err, exitCode(err), c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			method := "auto" // settled once the instance is known
			if fz != nil {
				method = fz.Method()
			}
			if method != c.want {
				t.Errorf("method %q, want %q", method, c.want)
			}
		})
	}
}

// TestWayHelp keeps words and help together.
func TestWayHelp(t *testing.T) {
	help := wayHelp()
	for _, w := range ways {
		if !strings.Contains(help, "  "+w.word) || w.does == "" || w.make == nil || w.must && w.arg == "" {
			t.Errorf("%s: incomplete", w.word)
		}
	}
	for _, line := range strings.Split(strings.TrimSuffix(help, "\n"), "\n") {
		if len(line) > 90 || strings.TrimSpace(line) == "" {
			t.Errorf("line %q", line)
		}
	}
}

func TestFrozenStates(t *testing.T) {
	now := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	for name, c := range map[string]struct {
		s       freeze.Status
		state   string
		toDo    string
		seconds float64
	}{
		"held":         {s: freeze.Status{OwnerAlive: true, GuardAlive: true, Since: now.Add(-time.Minute)}, state: stateHeld, toDo: "nothing", seconds: 60},
		"guard dead":   {s: freeze.Status{OwnerAlive: true, Owner: 7}, state: stateStarting, toDo: "kill process 7"},
		"owner dead":   {s: freeze.Status{GuardAlive: true}, state: stateStarting, toDo: "the guard starts it"},
		"both dead":    {s: freeze.Status{}, state: stateLeft, toDo: "holdfast thaw"},
		"unreadable":   {s: freeze.Status{Err: errors.New("x")}, state: stateUnknown, toDo: "service"},
		"clock turned": {s: freeze.Status{Since: now.Add(time.Hour)}, state: stateLeft, toDo: "holdfast thaw"},
	} {
		f := newFrozen(c.s, now)
		if f.State != c.state || !strings.Contains(f.ToDo, c.toDo) || f.Seconds != c.seconds {
			t.Errorf("%s: %+v", name, f)
		}
	}
	if f := newFrozen(freeze.Status{BasePath: "/a\xff"}, now); string(f.Raw) != "/a\xff" {
		t.Errorf("the bytes are lost: %q", f.Raw)
	}
}
