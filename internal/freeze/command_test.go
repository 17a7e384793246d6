package freeze

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/progress"
)

func TestNone(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	f, err := None{}.Freeze(background(), i.inst)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Thaw(background()); err != nil {
		t.Fatal(err)
	}
	r := f.Record()
	if r.Method != "none" || r.Stopped.IsZero() || !r.Started.IsZero() || !r.Ready.IsZero() {
		t.Errorf("record %+v", r)
	}
	if n := len(startedPIDs(i.starts)); n != 0 {
		t.Errorf("%d starts", n)
	}

	pid := i.start()
	_, err = None{}.Freeze(background(), i.inst)
	var busy *BusyError
	if !errors.As(err, &busy) || !errors.Is(err, ErrRunning) || busy.Holders[0].PID != pid || busy.Holders[0].How != HowLock {
		t.Fatalf("got %v", err)
	}
}

func TestCommand(t *testing.T) {
	i := newInstance(t)
	old := i.start()
	t.Setenv("FT_PASSED", "yes")
	t.Setenv("RESTIC_PASSWORD", "no")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "no")
	var ev events
	o := i.options()
	o.StopCommand += "; echo stopping $FT_PASSED ${RESTIC_PASSWORD-hidden} ${AWS_SECRET_ACCESS_KEY-hidden}"
	o.Progress = ev.sink
	c, err := NewCommand(o)
	if err != nil {
		t.Fatal(err)
	}
	f, err := c.Freeze(background(), i.inst)
	if err != nil {
		t.Fatal(err)
	}
	if !ev.has(progress.Verbose, "stopping yes hidden hidden") {
		t.Errorf("the output of the stop command was not reported: %v", ev.list)
	}
	before, err := os.ReadFile(filepath.Join(i.base, "data"))
	if err != nil {
		t.Fatal(err)
	}
	if i.runs() {
		t.Error("it runs")
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := f.Thaw(background()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	i.wantRunningAgain(old)
	after, err := os.ReadFile(filepath.Join(i.base, "data"))
	if err != nil || !strings.HasPrefix(string(after), string(before)) {
		t.Errorf("the data changed while frozen: %v", err)
	}
	if n := len(startedPIDs(i.starts)); n != 2 {
		t.Errorf("%d starts", n)
	}
	r := f.Record()
	if !r.Stopping.Before(r.Stopped) || !r.Stopped.Before(r.Started) || r.Ready.Before(r.Started) {
		t.Errorf("record %+v", r)
	}
}

func TestCommandErrors(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		mode   string
		change func(i *instance, o *CommandOptions)
		freeze []string // texts of the error of Freeze
		is     error
		thaw   []string // texts of the error of Thaw
	}{
		{name: "the stop command fails",
			change: func(_ *instance, o *CommandOptions) { o.StopCommand = "echo no such unit >&2; exit 5" },
			freeze: []string{"the stop command failed", "exit status 5", "no such unit"}},
		{name: "the stop command does nothing",
			change: func(_ *instance, o *CommandOptions) { o.StopCommand = "true"; o.StopTimeout = 300 * time.Millisecond },
			freeze: []string{"did not stop within 300ms", "idm.boltdb"}, is: ErrRunning},
		{name: "the server ignores the signal", mode: "ignore",
			change: func(_ *instance, o *CommandOptions) { o.StopTimeout = 300 * time.Millisecond },
			freeze: []string{"did not stop"}, is: ErrRunning},
		{name: "the stop command hangs",
			change: func(_ *instance, o *CommandOptions) {
				o.StopCommand = "echo waiting; sleep 100"
				o.StopTimeout = 200 * time.Millisecond
			},
			freeze: []string{"the stop command did not end", "waiting"}},
		{name: "the start command fails",
			change: func(_ *instance, o *CommandOptions) {
				o.StartCommand = "yes long line | head -c 9000; echo; echo bad port; exit 3"
				o.StartRetries = 2
			},
			thaw: []string{"tried 3 times", "exit status 3", "bad port", "..."}, is: ErrNotStarted},
		{name: "it does not get ready",
			change: func(_ *instance, o *CommandOptions) {
				o.ReadyCommand = "echo not yet; false"
				o.ReadyTimeout = 300 * time.Millisecond
			},
			thaw: []string{"was started but did not get ready within 300ms", "not yet"}, is: ErrNotReady},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			i := newInstance(t)
			i.mode = c.mode
			i.start()
			o := i.options()
			if c.freeze != nil {
				o.ReadyCommand = "true" // the old server runs on
			}
			c.change(i, &o)
			f, err := NewCommand(o)
			if err != nil {
				t.Fatal(err)
			}
			fz, err := f.Freeze(background(), i.inst)
			want := c.freeze
			if c.thaw != nil {
				if err != nil {
					t.Fatal(err)
				}
				err = fz.Thaw(background())
				want = c.thaw
			} else {
				// The old server runs on: a second one beside it would be none of its business.
				if n := len(startedPIDs(i.starts)); n != 1 || !i.runs() {
					t.Errorf("%d starts, it runs: %v", n, i.runs())
				}
				want = append(want, fmt.Sprintf("nothing was started, because process %d", i.pid()))
			}
			if err == nil {
				t.Fatal("no error")
			}
			if c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("%v is not %v", err, c.is)
			}
			for _, text := range want {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("%q does not say %q", err, text)
				}
			}
			if errors.Is(err, ErrNotReady) && (!errors.Is(err, ErrNotStarted) || strings.Contains(err.Error(), ErrNotStarted.Error())) {
				t.Errorf("it was started: %v", err)
			}
			if len(err.Error()) > outputLimit+600 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
}

func TestCommandStartRetries(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	old := i.start()
	i.fail = "3" // starts 2 and 3 fail
	o := i.options()
	o.StartCommand = i.startChecked()
	c, err := NewCommand(o)
	if err != nil {
		t.Fatal(err)
	}
	f, err := c.Freeze(background(), i.inst)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Thaw(background()); err != nil {
		t.Fatal(err)
	}
	i.wantRunningAgain(old)
	if n := len(startedPIDs(i.starts)); n != 4 {
		t.Errorf("%d starts", n)
	}
}

// A start command that is the server itself never ends, and must not be ended.
func TestCommandForeground(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	old := i.start()
	o := i.options()
	o.StartCommand = "exec env " + strings.TrimSuffix(i.startCommand(), "&")
	c, err := NewCommand(o)
	if err != nil {
		t.Fatal(err)
	}
	f, err := c.Freeze(background(), i.inst)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Thaw(background()); err != nil {
		t.Fatal(err)
	}
	i.wantRunningAgain(old)
}

func TestNewCommandMissing(t *testing.T) {
	if _, err := NewCommand(CommandOptions{StopCommand: "x"}); err == nil || !strings.Contains(err.Error(), "--start-command") {
		t.Errorf("got %v", err)
	}
}

func TestFreezeCancelled(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	i.mode = "ignore"
	i.start()
	o := i.options()
	o.ReadyCommand = ""
	c, err := NewCommand(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(background())
	time.AfterFunc(200*time.Millisecond, cancel)
	if _, err := c.Freeze(ctx, i.inst); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	if n := len(startedPIDs(i.starts)); n != 1 {
		t.Errorf("%d starts", n)
	}
}
