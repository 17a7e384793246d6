package freeze

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
)

var testTuning = tuning{
	Linger:       20 * time.Second,
	LingerPoll:   20 * time.Millisecond,
	Persist:      20 * time.Second,
	PersistPause: 50 * time.Millisecond,
	Grace:        time.Second,
}

func (i *instance) guardOptions() Options {
	return Options{StateDir: filepath.Join(i.dir, "state"), tuning: &testTuning}
}

// backupSpec is a backup in a process of its own.
type backupSpec struct {
	Base        string
	StateDir    string
	Command     *CommandOptions
	Process     *ProcessOptions
	MaxDowntime time.Duration
	HangTimeout time.Duration
	Tuning      tuning
	// Work: "" waits for a line of input, "panic" and "exit" do so, "deaf" waits for input and does
	// not look at its context.
	Work string
}

// backupMain runs a backup as the command does, and prints how far it got.
func backupMain() {
	var spec backupSpec
	if err := json.Unmarshal([]byte(os.Args[2]), &spec); err != nil {
		panic(err)
	}
	input := make(chan struct{}, 1)
	go func() {
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
		input <- struct{}{}
	}()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	var f Freezer = None{}
	if spec.Command != nil {
		c, err := NewCommand(*spec.Command)
		if err != nil {
			panic(err)
		}
		f = c
	}
	if spec.Process != nil {
		f = NewProcess(*spec.Process)
	}
	o := Options{StateDir: spec.StateDir, MaxDowntime: spec.MaxDowntime, HangTimeout: spec.HangTimeout, tuning: &spec.Tuning}
	_, err := Guarded(ctx, f, &ocis.Instance{BasePath: spec.Base}, o, func(ctx context.Context) error {
		fmt.Println("frozen")
		switch spec.Work {
		case "panic":
			panic("at work")
		case "exit":
			os.Exit(9)
		case "deaf":
			<-input
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-input:
			return nil
		}
	})
	switch {
	case errors.Is(err, ErrNotStarted):
		fmt.Println("not started:", err)
	case errors.Is(err, ErrGivenUp):
		fmt.Println("given up:", err)
	case err != nil:
		fmt.Println("error:", err)
	default:
		fmt.Println("done")
	}
	os.Exit(0)
}

// backup is a running backupMain.
type backup struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.Writer
	out *bufio.Reader
}

func (i *instance) backup(change func(*backupSpec)) *backup {
	i.t.Helper()
	o := i.options()
	spec := backupSpec{Base: i.base, StateDir: filepath.Join(i.dir, "state"), Command: &o,
		MaxDowntime: time.Hour, HangTimeout: 20 * time.Second, Tuning: testTuning}
	if change != nil {
		change(&spec)
	}
	data, err := json.Marshal(spec)
	if err != nil {
		i.t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		i.t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "backup", string(data))
	cmd.Stdin = r
	out, err := cmd.StdoutPipe()
	if err != nil {
		i.t.Fatal(err)
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		i.t.Fatal(err)
	}
	r.Close()
	i.t.Cleanup(func() {
		w.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if i.t.Failed() {
			i.t.Logf("the backup said: %s", stderr.String())
			if logs, _ := filepath.Glob(filepath.Join(i.dir, "state/freeze/*.log")); len(logs) > 0 {
				data, _ := os.ReadFile(logs[0])
				i.t.Logf("log: %s", data)
			}
		}
	})
	return &backup{t: i.t, cmd: cmd, in: w, out: bufio.NewReader(out)}
}

func (b *backup) expect(prefix string) string {
	b.t.Helper()
	line := readLine(b.t, b.out)
	if !strings.HasPrefix(line, prefix) {
		b.t.Fatalf("the backup says %q, want %q", line, prefix)
	}
	return line
}

func (b *backup) release() { fmt.Fprintln(b.in) }

func (b *backup) signal(s unix.Signal) {
	b.t.Helper()
	if err := unix.Kill(b.cmd.Process.Pid, s); err != nil {
		b.t.Fatal(err)
	}
}

// status returns the one freeze that must be on record.
func (i *instance) status() Status {
	i.t.Helper()
	list, err := ReadStatus(filepath.Join(i.dir, "state"))
	if err != nil || len(list) != 1 || list[0].Err != nil {
		i.t.Fatalf("status %+v %v", list, err)
	}
	return list[0]
}

func (i *instance) wantNoRecord() {
	i.t.Helper()
	eventually(i.t, "the record is gone", func() bool {
		list, err := ReadStatus(filepath.Join(i.dir, "state"))
		return err == nil && len(list) == 0
	})
}

func kill(t *testing.T, pid int, s unix.Signal) {
	t.Helper()
	if err := unix.Kill(pid, s); err != nil {
		t.Fatal(err)
	}
}

// atCommand returns a command that says that it was reached and goes on when told, then runs rest.
func (i *instance) atCommand(name, rest string) (command string, reached func() bool, proceed func()) {
	at, ok := filepath.Join(i.dir, name+".reached"), filepath.Join(i.dir, name+".proceed")
	return fmt.Sprintf("touch '%s'; while [ ! -e '%s' ]; do sleep 0.01; done; %s", at, ok, rest),
		func() bool { _, err := os.Stat(at); return err == nil },
		func() {
			if err := os.WriteFile(ok, nil, 0o600); err != nil {
				i.t.Fatal(err)
			}
		}
}

// Work that only reads begins before the second look at an instance that should be stopped, and ends when that finds a
// server; what it writes into a directory of its own is no server.
func TestGuardedReadOnly(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	own := filepath.Join(i.inst.BasePath, "own")
	if err := os.MkdirAll(own, 0o755); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(own, link); err != nil {
		t.Fatal(err)
	}
	o := i.guardOptions()
	o.ReadOnly, o.Own = true, []string{"", link}
	writing := func(dir string, until time.Duration) func(context.Context) error {
		return func(ctx context.Context) error {
			for n, end := 0, time.Now().Add(until); time.Now().Before(end); n++ {
				if err := os.WriteFile(filepath.Join(dir, "file"), fmt.Append(nil, n), 0o600); err != nil {
					t.Error(err)
				}
				select {
				case <-ctx.Done():
					return errors.New("ended")
				case <-time.After(time.Millisecond):
				}
			}
			return nil
		}
	}
	if _, err := Guarded(background(), None{}, i.inst, o, writing(own, 3*settlePause)); err != nil {
		t.Errorf("own files: %v", err)
	}
	var busy *BusyError
	if _, err := Guarded(background(), None{}, i.inst, o, writing(i.inst.BasePath, time.Minute)); !errors.As(err, &busy) || busy.Holders[0].How != HowChanges {
		t.Errorf("a server that writes while the work goes on: %v", err)
	}
	// Work that ends at once waits for the proof, and work that fails does not.
	begin := time.Now()
	if _, err := Guarded(background(), None{}, i.inst, o, func(context.Context) error { return nil }); err != nil || time.Since(begin) < settlePause {
		t.Errorf("no work: %v after %v", err, time.Since(begin))
	}
	if _, err := Guarded(background(), None{}, i.inst, o, func(context.Context) error { return io.ErrUnexpectedEOF }); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("failed work: %v", err)
	}
	// Other work does not begin.
	o.ReadOnly = false
	end := make(chan struct{})
	var server sync.WaitGroup
	server.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-end:
				return
			case <-time.After(time.Millisecond):
				_ = os.WriteFile(filepath.Join(i.inst.BasePath, "file"), fmt.Append(nil, n), 0o600)
			}
		}
	})
	if _, err := Guarded(background(), None{}, i.inst, o, func(context.Context) error { t.Error("the work began"); return nil }); !errors.As(err, &busy) {
		t.Errorf("a server that writes: %v", err)
	}
	close(end)
	server.Wait()
}

func TestGuarded(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	old := i.start()
	var ev events
	o := i.guardOptions()
	o.Progress = ev.sink
	co := i.options()
	co.StopCommand += "; echo bye"
	co.StartCommand = "echo hello; " + co.StartCommand
	co.Progress = ev.sink
	c, err := NewCommand(co)
	if err != nil {
		t.Fatal(err)
	}
	ran := false
	rec, err := Guarded(background(), c, i.inst, o, func(ctx context.Context) error {
		ran = true
		if i.runs() {
			t.Error("it runs")
		}
		st := i.status()
		if st.BasePath != i.base || st.Method != "command" || st.Owner != os.Getpid() || !st.OwnerAlive || !st.GuardAlive || time.Since(st.Since) > time.Hour || st.MaxDowntime != DefaultMaxDowntime {
			t.Errorf("status %+v", st)
		}
		files, err := os.ReadDir(filepath.Join(i.dir, "state/freeze"))
		if err != nil {
			t.Error(err)
		}
		for _, f := range files {
			if fi, err := f.Info(); err != nil || fi.Mode().Perm() != 0o600 {
				t.Errorf("%v %v", fi, err)
			}
		}
		if r, err := Recover(ctx, o.StateDir); err != nil || len(r) != 1 || !r[0].Busy || r[0].PID != os.Getpid() {
			t.Errorf("recover: %+v %v", r, err)
		}
		return ctx.Err()
	})
	if err != nil || !ran {
		t.Fatal(err)
	}
	i.wantRunningAgain(old)
	i.wantNoRecord()
	if rec.Method != "command" || !rec.Stopping.Before(rec.Stopped) || !rec.Stopped.Before(rec.Started) || rec.Ready.Before(rec.Started) || rec.Downtime <= 0 || rec.UntilReady < rec.Downtime {
		t.Errorf("record %+v", rec)
	}
	if !ev.has(progress.Verbose, "bye") || !ev.has(progress.Verbose, "hello") {
		t.Errorf("events %v", ev.list)
	}
	if g := i.guards(); len(g) != 0 {
		t.Errorf("guards %v are left", g)
	}
	if n := len(startedPIDs(i.starts)); n != 2 {
		t.Errorf("%d starts", n)
	}
}

func TestGuardedNone(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	rec, err := Guarded(background(), None{}, i.inst, i.guardOptions(), func(context.Context) error {
		var inUse *InUseError
		if _, err := Guarded(background(), None{}, i.inst, i.guardOptions(), nil); !errors.As(err, &inUse) {
			t.Errorf("got %v", err)
		}
		return nil
	})
	if err != nil || rec.Stopped.IsZero() || !rec.Started.IsZero() {
		t.Fatalf("%+v %v", rec, err)
	}
	// No state directory is no reason not to back up what is stopped anyway.
	o := i.guardOptions()
	o.StateDir = "/proc/nothing"
	if _, err := Guarded(background(), None{}, i.inst, o, func(context.Context) error { return nil }); err != nil {
		t.Fatal(err)
	}
	boom := errors.New("boom")
	if _, err := Guarded(background(), None{}, i.inst, o, func(context.Context) error { return boom }); !errors.Is(err, boom) {
		t.Errorf("got %v", err)
	}
	i.start()
	if _, err := Guarded(background(), None{}, i.inst, o, nil); !errors.Is(err, ErrRunning) {
		t.Errorf("got %v", err)
	}
}

// Whatever the work does, the instance runs afterwards.
func TestGuardedWorkFails(t *testing.T) {
	t.Parallel()
	boom := errors.New("boom")
	for _, c := range []struct {
		name string
		work func(cancel func()) func(context.Context) error
		is   error
	}{
		{"error", func(func()) func(context.Context) error {
			return func(context.Context) error { return boom }
		}, boom},
		{"cancelled", func(cancel func()) func(context.Context) error {
			return func(ctx context.Context) error {
				cancel()
				<-ctx.Done()
				return ctx.Err()
			}
		}, context.Canceled},
		{"cancelled but nil", func(cancel func()) func(context.Context) error {
			return func(context.Context) error { cancel(); return nil }
		}, context.Canceled},
		{"panic", func(func()) func(context.Context) error {
			return func(context.Context) error { panic(boom) }
		}, nil},
		{"goexit", func(func()) func(context.Context) error {
			return func(context.Context) error { runtime.Goexit(); return nil }
		}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			i := newInstance(t)
			old := i.start()
			ctx, cancel := context.WithCancel(background())
			defer cancel()
			f, err := NewCommand(i.options())
			if err != nil {
				t.Fatal(err)
			}
			returned := false
			done := make(chan any)
			go func() {
				defer func() { done <- recover() }()
				_, err = Guarded(ctx, f, i.inst, i.guardOptions(), c.work(cancel))
				returned = true
			}()
			p := <-done
			if (p != nil) != (c.name == "panic") || p != nil && p != any(boom) {
				t.Errorf("panic %v", p)
			}
			if returned != (c.is != nil) || returned && !errors.Is(err, c.is) {
				t.Errorf("returned %v: %v", returned, err)
			}
			i.wantRunningAgain(old)
			i.wantNoRecord()
			if n := len(startedPIDs(i.starts)); n != 2 {
				t.Errorf("%d starts", n)
			}
		})
	}
}

// The backup is killed, by signal or by itself, at every stage.
func TestBackupDies(t *testing.T) {
	t.Parallel()
	t.Run("at work", func(t *testing.T) {
		t.Parallel()
		i := newInstance(t)
		old := i.start()
		b := i.backup(nil)
		b.expect("frozen")
		b.signal(unix.SIGKILL)
		i.wantRunningAgain(old)
		i.wantNoRecord()
	})
	t.Run("by panic", func(t *testing.T) {
		t.Parallel()
		i := newInstance(t)
		old := i.start()
		i.backup(func(s *backupSpec) { s.Work = "panic" }).expect("frozen")
		i.wantRunningAgain(old)
		i.wantNoRecord()
	})
	t.Run("by exit", func(t *testing.T) {
		t.Parallel()
		i := newInstance(t)
		old := i.start()
		i.backup(func(s *backupSpec) { s.Work = "exit" }).expect("frozen")
		i.wantRunningAgain(old)
		i.wantNoRecord()
	})
	for _, sig := range []unix.Signal{unix.SIGINT, unix.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			i := newInstance(t)
			old := i.start()
			b := i.backup(nil)
			b.expect("frozen")
			b.signal(sig)
			b.expect("error: ")
			i.wantRunningAgain(old)
			i.wantNoRecord()
		})
	}
	t.Run("while stopping", func(t *testing.T) {
		t.Parallel()
		i := newInstance(t)
		old := i.start()
		stop, reached, proceed := i.atCommand("stop", i.stopCommand())
		b := i.backup(func(s *backupSpec) { s.Command.StopCommand = stop })
		eventually(t, "the stop command runs", reached)
		b.signal(unix.SIGKILL)
		_ = b.cmd.Wait()
		proceed() // the stop goes on without the backup, and comes before the start
		i.wantRunningAgain(old)
		i.wantNoRecord()
	})
	t.Run("while starting", func(t *testing.T) {
		t.Parallel()
		i := newInstance(t)
		old := i.start()
		start, reached, proceed := i.atCommand("start", i.startCommand())
		b := i.backup(func(s *backupSpec) { s.Command.StartCommand = start })
		b.expect("frozen")
		b.release()
		eventually(t, "the start command runs", reached)
		b.signal(unix.SIGKILL)
		_ = b.cmd.Wait()
		proceed()
		i.wantRunningAgain(old)
		i.wantNoRecord()
		if n := len(startedPIDs(i.starts)); n != 2 {
			t.Errorf("%d starts", n)
		}
	})
	t.Run("and the start fails at first", func(t *testing.T) {
		t.Parallel()
		i := newInstance(t)
		old := i.start()
		i.fail = "6"
		b := i.backup(func(s *backupSpec) {
			s.Command.StartCommand = i.startChecked()
			s.Command.StartRetries = 1
		})
		b.expect("frozen")
		b.signal(unix.SIGKILL)
		i.wantRunningAgain(old)
		i.wantNoRecord()
	})
}

func TestBackupHangs(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	old := i.start()
	b := i.backup(func(s *backupSpec) { s.HangTimeout = time.Second })
	b.expect("frozen")
	b.signal(unix.SIGSTOP)
	i.wantRunningAgain(old)
	i.wantNoRecord()
	b.release() // it would say that all is well, if it did not know better
	b.signal(unix.SIGCONT)
	if line := b.expect("given up: "); !strings.Contains(line, "no sign of life") {
		t.Error(line)
	}
}

func TestMaxDowntime(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	old := i.start()
	b := i.backup(func(s *backupSpec) {
		s.MaxDowntime = 3 * time.Second
		s.Work = "deaf"
	})
	b.expect("frozen")
	i.wantRunningAgain(old) // while the work goes on
	i.wantNoRecord()
	b.release()
	if line := b.expect("given up: "); !strings.Contains(line, "down for 3s") {
		t.Error(line)
	}
}

func TestMaxDowntimeWhileStopping(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	old := i.start()
	b := i.backup(func(s *backupSpec) {
		s.MaxDowntime = 300 * time.Millisecond
		s.Command.StopCommand += "; sleep 100"
	})
	b.expect("given up: ")
	i.wantRunningAgain(old)
	i.wantNoRecord()
}

func TestGuardDies(t *testing.T) {
	t.Parallel()
	t.Run("at work", func(t *testing.T) {
		t.Parallel()
		i := newInstance(t)
		old := i.start()
		b := i.backup(func(s *backupSpec) { s.Work = "deaf" })
		b.expect("frozen")
		kill(t, i.status().Guard, unix.SIGKILL)
		i.wantRunningAgain(old)
		i.wantNoRecord()
		b.release()
		b.expect("given up: ")
	})
	t.Run("while stopping", func(t *testing.T) {
		t.Parallel()
		i := newInstance(t)
		old := i.start()
		stop, reached, proceed := i.atCommand("stop", i.stopCommand())
		b := i.backup(func(s *backupSpec) {
			s.Command.StopCommand = stop
			s.Command.StopTimeout = time.Second
			s.Command.ReadyCommand = ""
		})
		eventually(t, "the stop command runs", reached)
		kill(t, i.status().Guard, unix.SIGKILL)
		b.expect("given up: ")
		proceed() // nobody is there any more to see it: the stop command was ended first
		if !i.runs() || i.pid() != old {
			t.Error("the instance was stopped")
		}
		i.wantNoRecord()
	})
	t.Run("while starting", func(t *testing.T) {
		t.Parallel()
		i := newInstance(t)
		old := i.start()
		start, reached, proceed := i.atCommand("start", i.startCommand())
		b := i.backup(func(s *backupSpec) { s.Command.StartCommand = start })
		b.expect("frozen")
		guard := i.status().Guard
		b.release()
		eventually(t, "the start command runs", reached)
		kill(t, guard, unix.SIGKILL)
		proceed()
		b.expect("done") // what was read is sound
		i.wantRunningAgain(old)
		i.wantNoRecord()
	})
	t.Run("by hanging", func(t *testing.T) {
		t.Parallel()
		i := newInstance(t)
		old := i.start()
		b := i.backup(func(s *backupSpec) { s.HangTimeout = time.Second })
		b.expect("frozen")
		kill(t, i.status().Guard, unix.SIGSTOP)
		b.release()
		b.expect("done")
		i.wantRunningAgain(old)
		i.wantNoRecord()
	})
	t.Run("by hanging beyond the downtime", func(t *testing.T) {
		t.Parallel()
		i := newInstance(t)
		old := i.start()
		b := i.backup(func(s *backupSpec) {
			s.HangTimeout = time.Second
			s.MaxDowntime = 3 * time.Second
			s.Work = "deaf"
		})
		b.expect("frozen")
		kill(t, i.status().Guard, unix.SIGSTOP)
		i.wantRunningAgain(old)
		i.wantNoRecord()
		b.release()
		b.expect("given up: ")
	})
}

// killBoth kills backup and guard so that neither can act on the death of the other.
func killBoth(t *testing.T, i *instance, b *backup) {
	t.Helper()
	b.expect("frozen")
	guard := i.status().Guard
	b.signal(unix.SIGSTOP)
	kill(t, guard, unix.SIGSTOP)
	kill(t, guard, unix.SIGKILL)
	b.signal(unix.SIGKILL)
	_ = b.cmd.Wait()
	// A process that dies has lost its program a moment before it counts as dead.
	eventually(t, "the guard is gone", func() bool { return !isOurs(guard) && !i.status().GuardAlive })
	if i.runs() {
		t.Fatal("it runs")
	}
	if st := i.status(); st.OwnerAlive {
		t.Fatalf("status %+v", st)
	}
}

func TestBothDie(t *testing.T) {
	t.Parallel()
	t.Run("recover", func(t *testing.T) {
		t.Parallel()
		i := newInstance(t)
		old := i.start()
		killBoth(t, i, i.backup(nil))
		r, err := Recover(background(), filepath.Join(i.dir, "state"))
		if err != nil || len(r) != 1 || r[0].BasePath != i.base || r[0].Started.IsZero() || r[0].Busy {
			t.Fatalf("%+v %v", r, err)
		}
		i.wantRunningAgain(old)
		i.wantNoRecord()
		if r, err := Recover(background(), filepath.Join(i.dir, "state")); err != nil || len(r) != 0 {
			t.Errorf("again: %+v %v", r, err)
		}
	})
	t.Run("next backup", func(t *testing.T) {
		t.Parallel()
		i := newInstance(t)
		old := i.start()
		killBoth(t, i, i.backup(nil))
		b := i.backup(nil)
		b.expect("frozen")
		b.release()
		b.expect("done")
		i.wantRunningAgain(old)
		i.wantNoRecord()
		if n := len(startedPIDs(i.starts)); n != 3 {
			t.Errorf("%d starts", n)
		}
	})
	t.Run("recover fails, then works", func(t *testing.T) {
		t.Parallel()
		i := newInstance(t)
		old := i.start()
		fixed := filepath.Join(i.dir, "fixed")
		killBoth(t, i, i.backup(func(s *backupSpec) {
			s.Command.StartCommand = "[ -e '" + fixed + "' ] || { echo broken; exit 1; }; " + i.startCommand()
		}))
		r, err := Recover(background(), filepath.Join(i.dir, "state"))
		if !errors.Is(err, ErrNotStarted) || len(r) != 1 || !strings.Contains(err.Error(), "broken") || !strings.Contains(err.Error(), i.base) {
			t.Fatalf("%+v %v", r, err)
		}
		if _, err := os.Create(fixed); err != nil {
			t.Fatal(err)
		}
		if _, err := Recover(background(), filepath.Join(i.dir, "state")); err != nil {
			t.Fatal(err)
		}
		i.wantRunningAgain(old)
	})
}

// The record survives a restart of the machine, after which all processes of that time are dead,
// even if their numbers are in use.
func TestRecoverAfterReboot(t *testing.T) {
	i := newInstance(t)
	files, err := openState(filepath.Join(i.dir, "state"), i.base)
	if err != nil {
		t.Fatal(err)
	}
	me, err := identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewCommand(i.options())
	if err != nil {
		t.Fatal(err)
	}
	plan, err := c.Plan(background(), i.inst)
	if err != nil {
		t.Fatal(err)
	}
	if err := files.write(state{Version: stateVersion, BasePath: Text(i.base), Method: "command", Since: time.Now(),
		Owner: me, Guard: me, Recipe: plan.Recipe}); err != nil {
		t.Fatal(err)
	}
	r, err := Recover(background(), filepath.Join(i.dir, "state"))
	if err != nil || len(r) != 1 || !r[0].Busy || i.runs() {
		t.Fatalf("before: %+v %v", r, err)
	}
	boot := filepath.Join(i.dir, "boot_id")
	if err := os.WriteFile(boot, []byte("another\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	was := bootIDFile
	bootIDFile = boot
	t.Cleanup(func() { bootIDFile = was })
	r, err = Recover(background(), filepath.Join(i.dir, "state"))
	if err != nil || len(r) != 1 || r[0].Busy {
		t.Fatalf("after: %+v %v", r, err)
	}
	i.wantRunningAgain(0)
	i.wantNoRecord()
}

func TestRecoverDamaged(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "freeze"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"a.json": "{", "b.json": `{"version":99}`} {
		if err := os.WriteFile(filepath.Join(dir, "freeze", name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r, err := Recover(background(), dir)
	if len(r) != 2 || err == nil || !strings.Contains(err.Error(), "a.json") || !strings.Contains(err.Error(), "version 99") {
		t.Errorf("%+v %v", r, err)
	}
	if list, err := ReadStatus(dir); err != nil || len(list) != 2 || list[0].Err == nil {
		t.Errorf("%+v %v", list, err)
	}
}

// An unknown way to start must not be lost, nor taken for done.
func TestRecoverUnknownKind(t *testing.T) {
	i := newInstance(t)
	files, err := openState(filepath.Join(i.dir, "state"), i.base)
	if err != nil {
		t.Fatal(err)
	}
	if err := files.write(state{Version: stateVersion, BasePath: Text(i.base), Recipe: Recipe{Kind: "kubernetes"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := Recover(background(), filepath.Join(i.dir, "state")); !errors.Is(err, ErrNotStarted) || !strings.Contains(err.Error(), "kubernetes") {
		t.Errorf("got %v", err)
	}
	i.status()
}

// If the record or the guard cannot be had, nothing is stopped.
func TestStateDirUnusable(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		make func(t *testing.T, dir string)
	}{
		{"a file", func(t *testing.T, dir string) {
			if err := os.WriteFile(dir, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{"read-only", func(t *testing.T, dir string) { mountTmpfs(t, dir, unix.MS_RDONLY, "") }},
		{"full", func(t *testing.T, dir string) {
			mountTmpfs(t, dir, 0, "size=8k")
			fill(t, filepath.Join(dir, "ballast"))
		}},
		{"without inodes", func(t *testing.T, dir string) { mountTmpfs(t, dir, 0, "nr_inodes=2") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			i := newInstance(t)
			pid := i.start()
			o := i.guardOptions()
			c.make(t, o.StateDir)
			f, err := NewCommand(i.options())
			if err != nil {
				t.Fatal(err)
			}
			_, err = Guarded(background(), f, i.inst, o, func(context.Context) error {
				t.Error("it was frozen")
				return nil
			})
			if err == nil || !strings.Contains(err.Error(), "nothing was stopped") {
				t.Errorf("got %v", err)
			}
			if i.pid() != pid || !isOurs(pid) || len(startedPIDs(i.starts)) != 1 {
				t.Error("the instance was touched")
			}
			if g := i.guards(); len(g) != 0 {
				t.Errorf("guards %v are left", g)
			}
		})
	}
}

func mountTmpfs(t *testing.T, dir string, flags uintptr, data string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("holdfast-test", dir, "tmpfs", flags, data); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for {
		if _, err := f.Write(make([]byte, 4096)); errors.Is(err, unix.ENOSPC) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// The state directory fills up, or goes away, while frozen: the thaw needs nothing of it.
func TestStateDirLostWhileFrozen(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		harm func(t *testing.T, dir string)
	}{
		{"full", func(t *testing.T, dir string) { fill(t, filepath.Join(dir, "ballast")) }},
		{"removed", func(t *testing.T, dir string) {
			if err := os.RemoveAll(filepath.Join(dir, "freeze")); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			i := newInstance(t)
			old := i.start()
			o := i.guardOptions()
			mountTmpfs(t, o.StateDir, 0, "size=128k")
			b := i.backup(nil)
			b.expect("frozen")
			c.harm(t, o.StateDir)
			b.signal(unix.SIGKILL)
			i.wantRunningAgain(old)
			i.wantNoRecord()
		})
	}
}

// TestHold: an instance that is held by somebody else is not frozen, by whatever name and records.
func TestHold(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	if err := os.Symlink(i.base, i.base+"-link"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ state, base string }{
		{"state", i.base}, {"another", i.base}, {"state", i.base + "-link"}, {"/proc/none", i.base},
	} {
		state := c.state
		if !filepath.IsAbs(state) {
			state = filepath.Join(i.dir, state)
		}
		release, err := Hold(state, c.base)
		if err != nil {
			t.Fatal(err)
		}
		var inUse *InUseError
		if _, err := Guarded(background(), None{}, i.inst, i.guardOptions(), func(context.Context) error { return nil }); !errors.As(err, &inUse) {
			t.Errorf("%s held by %s: %v", c.base, state, err)
		}
		if _, err := Hold(state, i.base); !errors.As(err, &inUse) {
			t.Errorf("%s held by %s twice: %v", c.base, state, err)
		}
		release()
		release()
		if _, err := Guarded(background(), None{}, i.inst, i.guardOptions(), func(context.Context) error { return nil }); err != nil {
			t.Error(err)
		}
	}
}

func TestTwoFreezers(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	old := i.start()
	b := i.backup(nil)
	b.expect("frozen")
	f, err := NewCommand(i.options())
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"state", "another"} {
		o := i.guardOptions()
		o.StateDir = filepath.Join(i.dir, dir)
		for _, f := range []Freezer{f, None{}} {
			var inUse *InUseError
			_, err := Guarded(background(), f, i.inst, o, nil)
			if !errors.As(err, &inUse) || dir == "state" && inUse.PID != b.cmd.Process.Pid {
				t.Errorf("got %v", err)
			}
		}
	}
	b.release()
	b.expect("done")
	i.wantRunningAgain(old)
}

// Many at once: each either freezes alone or is turned away.
func TestManyFreezers(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	i.start()
	var list []*backup
	for range 4 {
		list = append(list, i.backup(nil))
	}
	frozen := 0
	for _, b := range list {
		switch line := readLine(t, b.out); {
		case line == "frozen":
			frozen++
			b.release()
			b.expect("done")
		case !strings.Contains(line, "another holdfast"):
			t.Error(line)
		}
	}
	if frozen == 0 {
		t.Error("nobody got it")
	}
	eventually(t, "it runs", i.runs)
	if n := len(startedPIDs(i.starts)); n != 1+frozen {
		t.Errorf("%d freezes, %d starts", frozen, n)
	}
}

// Whoever starts the server behind our back makes the backup worthless.
func TestStartedWhileFrozen(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	old := i.start()
	o := i.options()
	o.ReadyCommand = "true"
	f, err := NewCommand(o)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Guarded(background(), f, i.inst, i.guardOptions(), func(context.Context) error {
		i.start()
		return nil
	})
	var busy *BusyError
	if !errors.As(err, &busy) || !strings.Contains(err.Error(), "by somebody") {
		t.Errorf("got %v", err)
	}
	i.wantRunningAgain(old)
}

// A server that stops too late is started again by the guard, after the backup has reported.
func TestStopsTooLate(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	i.mode = "slow:1500ms"
	old := i.start()
	i.mode = ""
	o := i.options()
	o.StopTimeout = 300 * time.Millisecond
	o.ReadyCommand = ""
	f, err := NewCommand(o)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Guarded(background(), f, i.inst, i.guardOptions(), func(context.Context) error {
		t.Error("it was frozen")
		return nil
	})
	if !errors.Is(err, ErrRunning) {
		t.Fatalf("got %v", err)
	}
	i.wantRunningAgain(old)
	i.wantNoRecord()
	eventually(t, "the guard has ended", func() bool { return len(i.guards()) == 0 })
}

func TestGuardedNotStarted(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	old := i.start()
	o := i.options()
	o.StartCommand = "echo no port; exit 4"
	o.StartRetries = 1
	f, err := NewCommand(o)
	if err != nil {
		t.Fatal(err)
	}
	boom := errors.New("boom")
	_, err = Guarded(background(), f, i.inst, i.guardOptions(), func(context.Context) error { return boom })
	if !errors.Is(err, ErrNotStarted) || !errors.Is(err, boom) || !strings.Contains(err.Error(), "no port") || !strings.HasPrefix(err.Error(), ErrNotStarted.Error()) {
		t.Fatalf("got %v", err)
	}
	eventually(t, "the guard has ended", func() bool { return len(i.guards()) == 0 })
	if i.runs() || i.status().Owner != os.Getpid() {
		t.Error("the record is gone")
	}
	_ = old
}

// A second signal ends the command at once; the guard does the rest.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	old := i.start()
	start, reached, proceed := i.atCommand("start", i.startCommand())
	b := i.backup(func(s *backupSpec) { s.Command.StartCommand = start })
	b.expect("frozen")
	b.signal(unix.SIGINT)
	eventually(t, "the start command runs", reached)
	b.signal(unix.SIGKILL)
	proceed()
	i.wantRunningAgain(old)
}

// The guard must not be ended by what ends the backup: a closed terminal, a stopped unit.
func TestGuardIgnoresSignals(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	old := i.start()
	b := i.backup(nil)
	b.expect("frozen")
	guard := i.status().Guard
	for _, s := range []unix.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGQUIT, unix.SIGUSR1} {
		kill(t, guard, s)
	}
	b.signal(unix.SIGKILL)
	i.wantRunningAgain(old)
	// The server has its own way with signals, not the guard's.
	kill(t, i.pid(), unix.SIGTERM)
	eventually(t, "the server ends by SIGTERM", func() bool { return !i.runs() })
}

func TestHiddenCommandByHand(t *testing.T) {
	t.Parallel()
	for _, arg := range []string{guardArgument, startArgument} {
		cmd := exec.Command(os.Args[0], arg)
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 2 || !strings.Contains(string(out), "own use") {
			t.Errorf("%s: %v %s", arg, err, out)
		}
	}
}

// plainFreezer is one that knows nothing of plans.
type plainFreezer struct{ thawed int }

func (p *plainFreezer) Method() string { return "plain" }
func (p *plainFreezer) Freeze(context.Context, *ocis.Instance) (Frozen, error) {
	return p, nil
}
func (p *plainFreezer) Thaw(context.Context) error { p.thawed++; return nil }
func (p *plainFreezer) Record() Record             { return Record{Method: "plain"} }

func TestGuardedPlainFreezer(t *testing.T) {
	p := &plainFreezer{}
	boom := errors.New("boom")
	rec, err := Guarded(background(), p, &ocis.Instance{}, Options{}, func(context.Context) error { return boom })
	if !errors.Is(err, boom) || p.thawed != 1 || rec.Method != "plain" {
		t.Errorf("%v %+v", err, p)
	}
}

// Whatever dies at whatever moment: the instance runs in the end.
func TestRandomDeaths(t *testing.T) {
	t.Parallel()
	const seed = 7
	rnd := rand.New(rand.NewPCG(seed, seed))
	for n := range 16 {
		name := []string{"backup", "guard", "both"}[n%3]
		delay := time.Duration(rnd.IntN(int(400 * time.Millisecond)))
		t.Run(fmt.Sprintf("%d %s after %s", n, name, delay), func(t *testing.T) {
			t.Parallel()
			i := newInstance(t)
			i.start()
			b := i.backup(func(s *backupSpec) {
				s.Command.ReadyCommand = ""
				s.Command.StopTimeout = 5 * time.Second
			})
			b.release()
			time.Sleep(delay) // the point is that it is arbitrary
			guards := i.guards()
			if name != "guard" {
				b.signal(unix.SIGKILL)
			}
			if name != "backup" {
				for _, g := range guards {
					_ = unix.Kill(g, unix.SIGKILL)
				}
			}
			_ = b.cmd.Wait()
			eventually(t, "the guard has ended", func() bool { return len(i.guards()) == 0 })
			r, err := Recover(background(), filepath.Join(i.dir, "state"))
			if err != nil {
				t.Error(err)
			}
			t.Logf("recovered: %+v; guards that were killed, if any: %v", r, guards)
			eventually(t, "the instance runs", i.runs)
			i.wantNoRecord()
		})
	}
}
