package docker

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	engine "github.com/holdfast-backup/holdfast/internal/docker"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/freeze/freezetest"
	"github.com/holdfast-backup/holdfast/internal/progress"
)

func register() { freeze.Register(Kind, Start) }

// TestMain lets the test binary play the guard, and backups that are killed.
func TestMain(m *testing.M) {
	freezetest.Main(m, register, func(arg string) (freeze.Planner, error) {
		host, name, _ := strings.Cut(arg, " ")
		return New(Options{Host: host, Containers: []string{name}, StopTimeout: 20 * time.Second, StartBackoff: 10 * time.Millisecond})
	}, freezetest.StopEngine)
}

func background() context.Context { return context.Background() }

// The ways in which a container comes to its server.
var (
	direct     = []string{"ocis", "server"}
	wrapper    = []string{"run", "wrapper", "ocis", "server"}
	shell      = []string{"sh", "-c", "ocis init || true; ocis server"}
	supervisor = []string{"run", "supervise", "ocis", "server"}
	stays      = []string{"run", "stay", "ocis", "server"}
)

func newFreezer(t *testing.T, o Options) *Docker {
	t.Helper()
	if o.Host == "" {
		o.Host = "unix://" + freezetest.TheEngine(t).Socket
	}
	o.StartBackoff = 10 * time.Millisecond
	if o.StopTimeout == 0 {
		o.StopTimeout = 20 * time.Second
	}
	d, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestFreeze(t *testing.T) {
	t.Parallel()
	e := freezetest.TheEngine(t)
	for name, c := range map[string]struct {
		spec    freezetest.Spec
		viaExec bool
		want    []string // events until the freeze; nil is one clean stop
	}{
		"direct":                 {spec: freezetest.Spec{Command: direct, Restart: "always"}},
		"direct, seen by engine": {spec: freezetest.Spec{Command: direct, Restart: "unless-stopped"}, viaExec: true},
		"wrapper":                {spec: freezetest.Spec{Command: wrapper, Restart: "always"}},
		"wrapper that stays":     {spec: freezetest.Spec{Command: stays, Restart: "always"}},
		"shell":                  {spec: freezetest.Spec{Command: shell, Restart: "always"}},
		"shell, by exec":         {spec: freezetest.Spec{Command: shell, Restart: "always"}, viaExec: true},
		"slow":                   {spec: freezetest.Spec{Command: shell, Mode: "slow:700ms", Restart: "no"}},
		"another user, by exec":  {spec: freezetest.Spec{Command: shell, User: "4711:4711"}, viaExec: true},
		"supervisor": {spec: freezetest.Spec{Command: supervisor, Restart: "on-failure"},
			want: []string{"started", "stopped", "started", "stopped"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := freezetest.NewBase(t)
			if c.spec.User != "" {
				for _, dir := range []string{b.Dir, b.Dir + "/idm"} {
					if err := os.Chown(dir, 4711, 4711); err != nil {
						t.Fatal(err)
					}
				}
			}
			c.spec.Base = b
			id := e.Run(t, c.spec)
			b.AwaitStarts(1)
			policy := e.Inspect(t, id).HostConfig.RestartPolicy.Name
			want := c.want
			if want == nil {
				want = []string{"started", "stopped"}
			}
			f := newFreezer(t, Options{Containers: []string{id}, viaExec: c.viaExec})
			rec, err := freeze.Guarded(background(), f, b.Inst, freeze.Options{StateDir: t.TempDir()}, func(context.Context) error {
				e.WantState(t, id, "exited", "no")
				b.WantQuiet()
				b.WantEvents(want...)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if !b.Runs() {
				t.Error("the server does not run when the thaw is over")
			}
			e.WantState(t, id, "running", policy)
			b.WantEvents(append(want, "started")...)
			if rec.Method != "docker" || rec.Downtime <= 0 || rec.Ready.IsZero() {
				t.Errorf("record %+v", rec)
			}
		})
	}
}

// TestPaused: the state before the freeze comes back, and the server gets its clean stop.
func TestPaused(t *testing.T) {
	t.Parallel()
	e, b := freezetest.TheEngine(t), freezetest.NewBase(t)
	id := e.Run(t, freezetest.Spec{Base: b, Command: shell, Restart: "always"})
	b.AwaitStarts(1)
	if err := e.Client.Pause(background(), id); err != nil {
		t.Fatal(err)
	}
	// Nobody would answer there.
	f := newFreezer(t, Options{Containers: []string{id}, ReadyURL: "http://127.0.0.1:1/", ReadyTimeout: 10 * time.Second})
	fz, err := f.Freeze(background(), b.Inst)
	if err != nil {
		t.Fatal(err)
	}
	b.WantQuiet()
	b.WantEvents("started", "stopped")
	if err := fz.Thaw(background()); err != nil {
		t.Fatal(err)
	}
	e.WantState(t, id, "paused", "always")
}

// TestStopped: what did not run is not started.
func TestStopped(t *testing.T) {
	t.Parallel()
	e, b := freezetest.TheEngine(t), freezetest.NewBase(t)
	id := e.Create(t, freezetest.Spec{Base: b, Command: direct, Restart: "always"})
	var ev freezetest.Events
	fz, err := newFreezer(t, Options{Containers: []string{id}, Progress: ev.Sink}).Freeze(background(), b.Inst)
	if err != nil {
		t.Fatal(err)
	}
	if err := fz.Thaw(background()); err != nil {
		t.Fatal(err)
	}
	e.WantState(t, id, "created", "always")
	if !ev.Has(progress.Warning, "does not run (created)") {
		t.Error("nothing was said")
	}
}

// TestStopTimeout: a server that does not stop is named, and keeps running as before.
func TestStopTimeout(t *testing.T) {
	t.Parallel()
	e := freezetest.TheEngine(t)
	for name, command := range map[string][]string{"direct": direct, "shell": shell} {
		t.Run(name, func(t *testing.T) {
			b := freezetest.NewBase(t)
			id := e.Run(t, freezetest.Spec{Base: b, Command: command, Mode: "ignore", Restart: "always"})
			b.AwaitStarts(1)
			f := newFreezer(t, Options{Containers: []string{id}, StopTimeout: time.Second})
			_, err := freeze.Guarded(background(), f, b.Inst, freeze.Options{StateDir: t.TempDir()}, func(context.Context) error {
				t.Error("it was called frozen")
				return nil
			})
			var busy *freeze.BusyError
			if !errors.As(err, &busy) || busy.Holders[0].Command != "ocis server" || busy.Holders[0].PID == 0 ||
				!strings.Contains(err.Error(), "did not stop within 1s and was left running") {
				t.Errorf("got %v", err)
			}
			e.WantState(t, id, "running", "always")
			b.WantEvents("started")
		})
	}
}

// TestLateStop: a server that ends after the time for it comes back: by the engine, as its restart
// policy stands again, or, where the container stays, by running the recipe again.
func TestLateStop(t *testing.T) {
	t.Parallel()
	e := freezetest.TheEngine(t)
	for name, command := range map[string][]string{"container ends": shell, "container stays": stays} {
		t.Run(name, func(t *testing.T) {
			b := freezetest.NewBase(t)
			id := e.Run(t, freezetest.Spec{Base: b, Command: command, Mode: "slow:1500ms", Restart: "always"})
			b.AwaitStarts(1)
			f := newFreezer(t, Options{Containers: []string{id}, StopTimeout: time.Second})
			plan, err := f.Plan(background(), b.Inst)
			if err != nil {
				t.Fatal(err)
			}
			if err := plan.Stop(background(), &freeze.Run{}); !errors.Is(err, freeze.ErrRunning) {
				t.Errorf("got %v", err)
			}
			if err := Start(background(), plan.Recipe, &freeze.Run{}); err != nil {
				t.Error(err)
			}
			b.WantEvents("started")
			e.WantState(t, id, "running", "always")
			freezetest.Eventually(t, "the server has ended", func() bool { return b.Count("stopped") == 1 })
			if err := Start(background(), plan.Recipe, &freeze.Run{}); err != nil {
				t.Error(err)
			}
			if !b.Runs() {
				t.Error("it does not run")
			}
			b.WantEvents("started", "stopped", "started")
			e.WantState(t, id, "running", "always")
		})
	}
}

// TestStartFailsAtFirst: a server that ends at its start is started again.
func TestStartFailsAtFirst(t *testing.T) {
	t.Parallel()
	e, b := freezetest.TheEngine(t), freezetest.NewBase(t)
	id := e.Run(t, freezetest.Spec{Base: b, Command: shell})
	b.AwaitStarts(1)
	_, err := freeze.Guarded(background(), newFreezer(t, Options{Containers: []string{id}}), b.Inst, freeze.Options{StateDir: t.TempDir()},
		func(context.Context) error { b.FailStarts(2); return nil })
	if err != nil {
		t.Fatal(err)
	}
	b.WantEvents("started", "stopped", "failed", "failed", "started")
	e.WantState(t, id, "running", "no")
}

// TestStartFails: the error says what to do, and counts as an instance that is down.
func TestStartFails(t *testing.T) {
	t.Parallel()
	e, b := freezetest.TheEngine(t), freezetest.NewBase(t)
	id := e.Run(t, freezetest.Spec{Base: b, Command: direct})
	b.AwaitStarts(1)
	f := newFreezer(t, Options{Containers: []string{id}, StartRetries: -1})
	fz, err := f.Freeze(background(), b.Inst)
	if err != nil {
		t.Fatal(err)
	}
	b.FailStarts(5)
	if err := fz.Thaw(background()); !errors.Is(err, freeze.ErrNotStarted) || !strings.Contains(err.Error(), "with exit status 1") {
		t.Errorf("got %v", err)
	}
}

// TestKilled: the backup, its guard, or both are killed; the restart policy comes back as well.
func TestKilled(t *testing.T) {
	t.Parallel()
	e := freezetest.TheEngine(t)
	for name, both := range map[string]bool{"backup": false, "backup and guard": true} {
		t.Run(name, func(t *testing.T) {
			b, state := freezetest.NewBase(t), t.TempDir()
			id := e.Run(t, freezetest.Spec{Base: b, Command: shell, Restart: "always"})
			b.AwaitStarts(1)
			s := freezetest.StartSession(t, b, state, "unix://"+e.Socket+" "+id)
			s.AwaitFrozen()
			e.WantState(t, id, "exited", "no")
			if !both {
				s.Kill()
			} else {
				// The backup would take over at once from a guard that dies first.
				s.Pause()
				freezetest.KillGuard(t, state)
				s.Kill()
				if b.Runs() {
					t.Error("something started it")
				}
				if _, err := freeze.Recover(background(), state); err != nil {
					t.Error(err)
				}
			}
			freezetest.AwaitThawed(t, state)
			b.AwaitStarts(2)
			e.WantState(t, id, "running", "always")
			b.WantEvents("started", "stopped", "started")
		})
	}
}

// TestKilledWhileStopping: the guard waits for the end of the stop that it finds, then starts.
func TestKilledWhileStopping(t *testing.T) {
	t.Parallel()
	e, b, state := freezetest.TheEngine(t), freezetest.NewBase(t), t.TempDir()
	id := e.Run(t, freezetest.Spec{Base: b, Command: shell, Mode: "slow:1s", Restart: "always"})
	b.AwaitStarts(1)
	s := freezetest.StartSession(t, b, state, "unix://"+e.Socket+" "+id)
	freezetest.Eventually(t, "the restart policy is suspended", func() bool {
		return e.Inspect(t, id).HostConfig.RestartPolicy.Name == "no"
	})
	time.Sleep(200 * time.Millisecond) // until the signal is out
	s.Kill()
	b.AwaitStarts(2)
	freezetest.AwaitThawed(t, state)
	e.WantState(t, id, "running", "always")
	b.WantEvents("started", "stopped", "started")
}

// TestRecreated: a container that was made anew meanwhile is found by its name.
func TestRecreated(t *testing.T) {
	t.Parallel()
	e, b := freezetest.TheEngine(t), freezetest.NewBase(t)
	spec := freezetest.Spec{Name: "recreated", Base: b, Command: direct}
	e.Run(t, spec)
	b.AwaitStarts(1)
	f := newFreezer(t, Options{Containers: []string{"recreated"}})
	fz, err := f.Freeze(background(), b.Inst)
	if err != nil {
		t.Fatal(err)
	}
	e.Remove("recreated")
	spec.Restart = "always"
	e.Create(t, spec)
	if err := fz.Thaw(background()); err != nil {
		t.Fatal(err)
	}
	e.WantState(t, "recreated", "running", "always")
	b.WantEvents("started", "stopped", "started")

	fz, err = f.Freeze(background(), b.Inst)
	if err != nil {
		t.Fatal(err)
	}
	e.Remove("recreated")
	if err := fz.Thaw(background()); !errors.Is(err, freeze.ErrNotStarted) || !errors.Is(err, engine.ErrNotFound) {
		t.Errorf("got %v", err)
	}
}

func TestRefused(t *testing.T) {
	t.Parallel()
	e, b := freezetest.TheEngine(t), freezetest.NewBase(t)
	removed := e.Run(t, freezetest.Spec{Command: []string{"run", "idle"}, Remove: true})
	swarm := e.Run(t, freezetest.Spec{Command: []string{"run", "idle"}, Labels: map[string]string{"com.docker.swarm.service.name": "web"}})
	for name, c := range map[string]struct {
		o    Options
		want string
		is   error
	}{
		"no container": {Options{Containers: []string{"nobody"}}, `knows no container "nobody"`, engine.ErrNotFound},
		"no project":   {Options{Project: "nobody"}, `compose project "nobody"`, nil},
		"no engine":    {Options{Host: "unix:///nonexistent/d.sock", Containers: []string{"x"}}, "/nonexistent/d.sock", engine.ErrNoEngine},
		"no engine for a project": {Options{Host: "unix:///nonexistent/d.sock", Project: "x"},
			"/nonexistent/d.sock", engine.ErrNoEngine},
		"--rm":  {Options{Containers: []string{removed}}, "--rm", nil},
		"swarm": {Options{Containers: []string{swarm}}, "swarm service web", nil},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := newFreezer(t, c.o).Plan(background(), b.Inst)
			if err == nil || !strings.Contains(err.Error(), c.want) || c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestOptions(t *testing.T) {
	t.Parallel()
	for arg, want := range map[string]Options{
		"docker:ocis":            {Containers: []string{"ocis"}},
		"docker:idm,ocis":        {Containers: []string{"idm", "ocis"}},
		"compose:full":           {Project: "full"},
		"compose:full/db,tika-1": {Project: "full", Services: []string{"db", "tika-1"}},
	} {
		var o Options
		err := o.Parse(arg)
		if _, nerr := New(o); err != nil || nerr != nil || o.Project != want.Project ||
			!slices.Equal(o.Containers, want.Containers) || !slices.Equal(o.Services, want.Services) {
			t.Errorf("%s: got %+v, %v, %v", arg, o, err, nerr)
		}
	}
	for _, arg := range []string{"docker", "docker:", "docker:a,", "docker:../x", "docker:-a", "compose:", "compose:/x", "compose:A", "compose:a/", "compose:a/b c", "podman:x"} {
		var o Options
		err := o.Parse(arg)
		if err == nil {
			_, err = New(o)
		}
		if err == nil {
			t.Errorf("%s: no error", arg)
		}
	}
}

// TestRecipe: the record on disk holds no environment, which may have secrets.
func TestRecipe(t *testing.T) {
	t.Parallel()
	e, b := freezetest.TheEngine(t), freezetest.NewBase(t)
	id := e.Run(t, freezetest.Spec{Base: b, Command: shell, Restart: "always"})
	b.AwaitStarts(1)
	p, err := newFreezer(t, Options{Containers: []string{id}}).Plan(background(), b.Inst)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(p.Recipe)
	if err != nil || strings.Contains(string(text), "OCIS_BASE_DATA_PATH") || p.Recipe.Kind != Kind {
		t.Errorf("got %s, %v", text, err)
	}
	var r Recipe
	if err := json.Unmarshal(p.Recipe.Other, &r); err != nil || !r.Holds || len(r.Containers) != 1 || !r.Containers[0].Server ||
		r.Containers[0].ID != id || r.Containers[0].Restart.Name != "always" {
		t.Errorf("got %+v, %v", r, err)
	}
	e.WantState(t, id, "running", "always")
}
