package freeze

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/progress"
)

// leftBehind makes a backup whose start fails; it reports that, and leaves its record.
func leftBehind(t *testing.T) (*instance, CommandOptions) {
	t.Helper()
	i := newInstance(t)
	i.start()
	good := i.options()
	bad := good
	bad.StartCommand, bad.StartRetries = "echo no such unit; exit 4", -1
	f, err := NewCommand(bad)
	if err != nil {
		t.Fatal(err)
	}
	if _, err = Guarded(background(), f, i.inst, i.guardOptions(), func(context.Context) error { return nil }); !errors.Is(err, ErrNotStarted) {
		t.Fatalf("got %v", err)
	}
	if st := i.status(); !st.Reported {
		t.Errorf("it is not known that the backup reported: %+v", st)
	}
	// This process is the owner, and lives on.
	files, err := openState(i.state(), i.base)
	if err != nil {
		t.Fatal(err)
	}
	st, err := readState(files.record())
	if err != nil {
		t.Fatal(err)
	}
	st.Owner.Start++
	if err := files.write(st); err != nil {
		t.Fatal(err)
	}
	return i, good
}

func (i *instance) state() string { return filepath.Join(i.dir, "state") }

func TestLeftBehind(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		run  func(t *testing.T, i *instance, good CommandOptions)
	}{
		{"it still fails", func(t *testing.T, i *instance, _ CommandOptions) {
			_, err := Recover(background(), i.state())
			if !errors.Is(err, ErrNotStarted) || strings.Contains(err.Error(), "died") {
				t.Fatalf("got %v", err)
			}
			for _, text := range []string{"an earlier backup left the instance", i.status().File, "`holdfast thaw`", "--forget"} {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("%q does not say %q", err, text)
				}
			}
		}},
		{"started by hand, recover", func(t *testing.T, i *instance, _ CommandOptions) {
			pid := i.start()
			r, err := Recover(background(), i.state())
			if err != nil || len(r) != 1 || !r[0].Running || !r[0].Started.IsZero() || !strings.Contains(r[0].Sign, fmt.Sprint(pid)) {
				t.Fatalf("%+v %v", r, err)
			}
			i.wantNoRecord()
		}},
		{"started by hand, next backup", func(t *testing.T, i *instance, good CommandOptions) {
			old := i.start()
			good.ReadyCommand = ""
			var ev events
			o := i.guardOptions()
			o.Progress = ev.sink
			i.mustBackup(t, good, o)
			i.wantRunningAgain(old)
			if !ev.has(progress.Info, "runs already") || ev.has(progress.Warning, "died") {
				t.Errorf("events %+v", ev.list)
			}
			if n := len(startedPIDs(i.starts)); n != 3 {
				t.Errorf("%d starts", n)
			}
		}},
		{"the start command of now", func(t *testing.T, i *instance, good CommandOptions) {
			good.ReadyCommand = ""
			i.mustBackup(t, good, i.guardOptions())
			eventually(t, "it runs", i.runs)
			if n := len(startedPIDs(i.starts)); n != 3 {
				t.Errorf("%d starts", n)
			}
		}},
		{"another start command for recover", func(t *testing.T, i *instance, good CommandOptions) {
			r, err := RecoverWith(background(), i.state(), RecoverOptions{StartCommand: good.StartCommand, BasePath: i.base})
			if err != nil || len(r) != 1 || r[0].Started.IsZero() {
				t.Fatalf("%+v %v", r, err)
			}
			eventually(t, "it runs", i.runs)
			i.wantNoRecord()
		}},
		{"the start command of another instance", func(t *testing.T, i *instance, good CommandOptions) {
			_, err := RecoverWith(background(), i.state(), RecoverOptions{StartCommand: good.StartCommand, BasePath: i.dir})
			if !errors.Is(err, ErrNotStarted) {
				t.Fatalf("got %v", err)
			}
			if i.runs() {
				t.Error("it was started by the command of another one")
			}
		}},
		{"forget", func(t *testing.T, i *instance, _ CommandOptions) {
			if _, err := Forget(i.state(), filepath.Join(i.dir, "other")); err == nil {
				t.Error("forgot what is not there")
			}
			f, err := Forget(i.state(), i.base)
			if err != nil || f.BasePath != i.base || f.File == "" {
				t.Fatalf("%+v %v", f, err)
			}
			i.wantNoRecord()
			if i.runs() {
				t.Error("it was started")
			}
			if _, err := Forget(i.state(), ""); err == nil {
				t.Error("forgot it twice")
			}
		}},
		{"the instance is gone", func(t *testing.T, i *instance, _ CommandOptions) {
			if err := os.RemoveAll(i.base); err != nil {
				t.Fatal(err)
			}
			r, err := Recover(background(), i.state())
			if err != nil || len(r) != 1 || !r[0].Gone {
				t.Fatalf("%+v %v", r, err)
			}
			i.wantNoRecord()
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			i, good := leftBehind(t)
			c.run(t, i, good)
		})
	}
}

func (i *instance) mustBackup(t *testing.T, c CommandOptions, o Options) {
	t.Helper()
	f, err := NewCommand(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Guarded(background(), f, i.inst, o, func(context.Context) error { return nil }); err != nil {
		t.Fatal(err)
	}
}

// A living backup is not forgotten.
func TestForgetHeld(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	i.start()
	f, err := NewCommand(i.options())
	if err != nil {
		t.Fatal(err)
	}
	_, err = Guarded(background(), f, i.inst, i.guardOptions(), func(context.Context) error {
		_, err := Forget(i.state(), "")
		var inUse *InUseError
		if !errors.As(err, &inUse) {
			t.Errorf("got %v", err)
		}
		i.status()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// After a stop that did nothing no second server is started, also not by the guard.
func TestGuardedStopDoesNothing(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	pid := i.start()
	o := i.options()
	o.StopCommand, o.StopTimeout = "true", 300*time.Millisecond
	f, err := NewCommand(o)
	if err != nil {
		t.Fatal(err)
	}
	tune := testTuning
	tune.Linger = 100 * time.Millisecond
	g := i.guardOptions()
	g.tuning = &tune
	rec, err := Guarded(background(), f, i.inst, g, func(context.Context) error {
		t.Error("it was frozen")
		return nil
	})
	if !errors.Is(err, ErrRunning) || errors.Is(err, ErrNotStarted) || !strings.Contains(err.Error(), fmt.Sprintf("nothing was started, because process %d", pid)) {
		t.Fatalf("got %v", err)
	}
	var h interface{ Hints() []string }
	if !errors.As(err, &h) || !strings.Contains(h.Hints()[0], fmt.Sprintf("process %d (", pid)) || !strings.Contains(h.Hints()[0], "does it stop the right service?") {
		t.Errorf("no hint: %v", err)
	}
	if n := len(startedPIDs(i.starts)); n != 1 || i.pid() != pid || !i.runs() || !rec.Started.IsZero() {
		t.Errorf("%d starts, record %+v", n, rec)
	}
	i.wantNoRecord()
}

// The parts of the downtime add up to all of it, from the stop until it is ready.
func TestDowntimeParts(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	i.mode = "slow:400ms"
	i.start()
	i.mode = ""
	o := i.options()
	o.ReadyCommand += " && sleep 0.3"
	f, err := NewCommand(o)
	if err != nil {
		t.Fatal(err)
	}
	var seen Record
	g := i.guardOptions()
	g.Observe = func(r Record) { seen = r }
	begin := time.Now()
	rec, err := Guarded(background(), f, i.inst, g, func(context.Context) error {
		time.Sleep(200 * time.Millisecond)
		return nil
	})
	if err != nil || seen != rec {
		t.Fatalf("%+v %+v %v", rec, seen, err)
	}
	if rec.ForStop < 400*time.Millisecond || rec.ForHold < 200*time.Millisecond || rec.ForStart < 300*time.Millisecond ||
		rec.ForStop+rec.ForHold+rec.ForStart != rec.Downtime || rec.Downtime != rec.UntilReady || rec.Downtime > time.Since(begin) {
		t.Errorf("%+v", rec)
	}
}

func TestWaitReport(t *testing.T) {
	begin := time.Now()
	w := waitReport{begin: begin}
	u := Usage{Holders: []Holder{{PID: 7, Command: "ocis server", Path: "/a", How: HowLock}}}
	var said []string
	for s := 0; s <= 30; s++ {
		if text := w.next(begin.Add(time.Duration(s)*time.Second), u, time.Minute); text != "" {
			said = append(said, fmt.Sprintf("%d %s", s, text))
		}
	}
	want := []string{
		"5 waiting for the instance to stop: the instance is running: process 7 (ocis server) holds /a (lock)",
		"15 still waiting for it to stop: 15 s, at most 1m0s",
		"25 still waiting for it to stop: 25 s, at most 1m0s",
	}
	if strings.Join(said, "\n") != strings.Join(want, "\n") {
		t.Errorf("said %q", said)
	}
}

// The lock and the open file of one process are one sign.
func TestBusyMerged(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	i.start()
	_, err := None{}.Freeze(background(), i.inst)
	if err == nil {
		t.Fatal("no error")
	}
	if n := strings.Count(err.Error(), "idm.boltdb"); n != 1 || !strings.Contains(err.Error(), "(lock, open file)") {
		t.Errorf("%d times: %v", n, err)
	}
}

// A clock that was set while an instance was frozen makes nobody wait for it.
func TestStopPatience(t *testing.T) {
	began := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	for name, c := range map[string]struct{ passed, want time.Duration }{
		"at once":    {0, time.Minute},
		"some time":  {20 * time.Second, 40 * time.Second},
		"long ago":   {time.Hour, 0},
		"set back":   {-24 * time.Hour, time.Minute},
		"set ahead":  {24 * time.Hour, 0},
		"a lot back": {-290 * 365 * 24 * time.Hour, time.Minute},
	} {
		if got := stopPatience(began, began.Add(c.passed), time.Minute); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}
