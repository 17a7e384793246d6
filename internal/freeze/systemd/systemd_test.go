package systemd

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/freeze/freezetest"
	"github.com/holdfast-backup/holdfast/internal/progress"
)

// TestMain lets the test binary play the guard, and backups that are killed.
func TestMain(m *testing.M) {
	freezetest.Main(m, func() { freeze.Register(Kind, Start) }, func(arg string) (freeze.Planner, error) {
		bus, unit, _ := strings.Cut(arg, " ")
		return New(Options{Bus: bus, Units: []string{unit}, StopTimeout: 20 * time.Second, StartBackoff: 10 * time.Millisecond})
	}, nil)
}

func background() context.Context { return context.Background() }

func newFreezer(t *testing.T, o Options) *Systemd {
	t.Helper()
	o.StartBackoff = 10 * time.Millisecond
	if o.StopTimeout == 0 {
		o.StopTimeout = 20 * time.Second
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

const unit = "ocis.service"

func TestFreeze(t *testing.T) {
	for name, c := range map[string]struct {
		unit freezetest.Unit
		mute bool
	}{
		"at once":             {unit: freezetest.Unit{Restart: true}},
		"slow":                {unit: freezetest.Unit{Restart: true, Mode: "slow:500ms"}},
		"signals lost":        {unit: freezetest.Unit{Mode: "slow:100ms"}, mute: true},
		"tells when it is up": {unit: freezetest.Unit{Settle: true}},
	} {
		t.Run(name, func(t *testing.T) {
			b, bus := freezetest.NewBase(t), freezetest.StartBus(t)
			c.unit.Name, c.unit.Base = unit, b
			m := freezetest.StartManager(t, bus, c.unit)
			m.Start(unit)
			b.AwaitStarts(1)
			if c.mute {
				m.Mute()
			}
			f := newFreezer(t, Options{Units: []string{"ocis"}, Bus: bus})
			rec, err := freeze.Guarded(background(), f, b.Inst, freeze.Options{StateDir: t.TempDir()}, func(context.Context) error {
				m.WantActive()
				b.WantQuiet()
				b.WantEvents("started", "stopped")
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if !b.Runs() {
				t.Error("the server does not run when the thaw is over")
			}
			m.WantActive(unit)
			b.WantEvents("started", "stopped", "started")
			if got := m.Log(); !slices.Equal(got, []string{"stop " + unit, "start " + unit}) {
				t.Errorf("jobs %q", got)
			}
			if rec.Method != "systemd" || rec.Downtime <= 0 || rec.Ready.IsZero() {
				t.Errorf("record %+v", rec)
			}
		})
	}
}

// TestOrder: several units stop in the reverse of their order, with what triggers them first; only
// what was active is started again, and also what systemd stopped because it requires a named unit.
func TestOrder(t *testing.T) {
	b, bus := freezetest.NewBase(t), freezetest.StartBus(t)
	m := freezetest.StartManager(t, bus,
		freezetest.Unit{Name: "ocis-idm.service", Base: b, Before: []string{"ocis-proxy.service"}, RequiredBy: []string{"needs-idm.service"}},
		freezetest.Unit{Name: "ocis-proxy.service", TriggeredBy: []string{"ocis-proxy.socket", "ocis-proxy.timer"}},
		freezetest.Unit{Name: "ocis-web.service", After: []string{"ocis-proxy.service", "other.service"}},
		freezetest.Unit{Name: "ocis-idle.service"},
		freezetest.Unit{Name: "ocis-proxy.socket", Before: []string{"ocis-proxy.service"}},
		freezetest.Unit{Name: "ocis-proxy.timer"},
		freezetest.Unit{Name: "needs-idm.service"},
		freezetest.Unit{Name: "other.service"})
	all := []string{"ocis-idm.service", "ocis-proxy.socket", "ocis-proxy.service", "ocis-proxy.timer", "ocis-web.service", "needs-idm.service", "other.service"}
	m.Start(all...)
	b.AwaitStarts(1)
	f := newFreezer(t, Options{Units: []string{"ocis-idm", "ocis-proxy", "ocis-web", "ocis-idle"}, Bus: bus})
	fz, err := f.Freeze(background(), b.Inst)
	if err != nil {
		t.Fatal(err)
	}
	m.WantActive("other.service")
	if m.Connect("ocis-proxy.socket") {
		t.Error("a connection started the service")
	}
	stops := m.Log()
	slices.Sort(stops[:2]) // these two go at once
	if want := []string{"stop ocis-proxy.socket", "stop ocis-proxy.timer", "stop ocis-web.service", "stop ocis-proxy.service",
		"stop ocis-idm.service", "stop needs-idm.service"}; !slices.Equal(stops, want) {
		t.Errorf("jobs %q, want %q", stops, want)
	}
	if err := fz.Thaw(background()); err != nil {
		t.Fatal(err)
	}
	m.WantActive(all...)
	if got, want := m.Log()[len(stops):], []string{"start ocis-proxy.socket", "start ocis-idm.service", "start ocis-proxy.service",
		"start ocis-web.service", "start needs-idm.service", "start ocis-proxy.timer"}; !slices.Equal(got, want) {
		t.Errorf("jobs %q, want %q", got, want)
	}
}

// TestSocketAlone: a service that waits for its first connection is kept from starting.
func TestSocketAlone(t *testing.T) {
	b, bus := freezetest.NewBase(t), freezetest.StartBus(t)
	m := freezetest.StartManager(t, bus,
		freezetest.Unit{Name: unit, Base: b, TriggeredBy: []string{"ocis.socket"}},
		freezetest.Unit{Name: "ocis.socket"})
	m.Start("ocis.socket")
	fz, err := newFreezer(t, Options{Units: []string{unit}, Bus: bus}).Freeze(background(), b.Inst)
	if err != nil {
		t.Fatal(err)
	}
	if m.Connect("ocis.socket") {
		t.Error("a connection started the service")
	}
	if err := fz.Thaw(background()); err != nil {
		t.Fatal(err)
	}
	m.WantActive("ocis.socket")
	if !m.Connect("ocis.socket") {
		t.Error("a connection does not start the service any more")
	}
}

// TestStopTimeout: a unit that does not stop is named, and started again as soon as it has stopped.
func TestStopTimeout(t *testing.T) {
	b, bus := freezetest.NewBase(t), freezetest.StartBus(t)
	m := freezetest.StartManager(t, bus,
		freezetest.Unit{Name: unit, Base: b, Mode: "slow:2s", TriggeredBy: []string{"ocis.socket"}},
		freezetest.Unit{Name: "ocis.socket"})
	m.Start("ocis.socket", unit)
	b.AwaitStarts(1)
	pid := m.MainPID(unit)
	f := newFreezer(t, Options{Units: []string{unit}, Bus: bus, StopTimeout: 500 * time.Millisecond})
	_, err := freeze.Guarded(background(), f, b.Inst, freeze.Options{StateDir: t.TempDir()}, func(context.Context) error {
		t.Error("it was called frozen")
		return nil
	})
	var busy *freeze.BusyError
	if !errors.As(err, &busy) || busy.Holders[0].PID != pid || !strings.Contains(err.Error(), unit+" did not stop within 500ms") {
		t.Errorf("got %v", err)
	}
	m.WantActive("ocis.socket", unit)
	b.WantEvents("started", "stopped", "started")
}

// TestKilledBySystemd: the freeze holds, but the user hears of it.
func TestKilledBySystemd(t *testing.T) {
	b, bus := freezetest.NewBase(t), freezetest.StartBus(t)
	m := freezetest.StartManager(t, bus, freezetest.Unit{Name: unit, Base: b, Mode: "ignore", KillAfter: 100 * time.Millisecond})
	m.Start(unit)
	b.AwaitStarts(1)
	var ev freezetest.Events
	fz, err := newFreezer(t, Options{Units: []string{unit}, Bus: bus, Progress: ev.Sink}).Freeze(background(), b.Inst)
	if err != nil {
		t.Fatal(err)
	}
	if !ev.Has(progress.Warning, "TimeoutStopSec=") {
		t.Error("nothing was said")
	}
	if err := fz.Thaw(background()); err != nil {
		t.Fatal(err)
	}
	m.WantActive(unit)
}

// TestStartFailsAtFirst: failed starts are tried again, also when systemd has had enough of them.
func TestStartFailsAtFirst(t *testing.T) {
	for name, limit := range map[string]int{"no limit": 0, "start limit": 1} {
		t.Run(name, func(t *testing.T) {
			b, bus := freezetest.NewBase(t), freezetest.StartBus(t)
			m := freezetest.StartManager(t, bus, freezetest.Unit{Name: unit, Base: b, StartLimit: limit})
			m.Start(unit)
			b.AwaitStarts(1)
			f := newFreezer(t, Options{Units: []string{unit}, Bus: bus, StartRetries: 6})
			_, err := freeze.Guarded(background(), f, b.Inst, freeze.Options{StateDir: t.TempDir()},
				func(context.Context) error { b.FailStarts(2); return nil })
			if err != nil {
				t.Fatal(err)
			}
			b.WantEvents("started", "stopped", "failed", "failed", "started")
			m.WantActive(unit)
			if slices.Contains(m.Log(), "reset "+unit) != (limit > 0) {
				t.Errorf("jobs %q", m.Log())
			}
		})
	}
}

func TestStartFails(t *testing.T) {
	b, bus := freezetest.NewBase(t), freezetest.StartBus(t)
	m := freezetest.StartManager(t, bus, freezetest.Unit{Name: unit, Base: b})
	m.Start(unit)
	b.AwaitStarts(1)
	fz, err := newFreezer(t, Options{Units: []string{unit}, Bus: bus, StartRetries: -1}).Freeze(background(), b.Inst)
	if err != nil {
		t.Fatal(err)
	}
	b.FailStarts(5)
	if err := fz.Thaw(background()); !errors.Is(err, freeze.ErrNotStarted) || !strings.Contains(err.Error(), unit) {
		t.Errorf("got %v", err)
	}
}

// TestKilled: the backup, or backup and guard, are killed.
func TestKilled(t *testing.T) {
	for name, both := range map[string]bool{"backup": false, "backup and guard": true} {
		t.Run(name, func(t *testing.T) {
			b, bus, state := freezetest.NewBase(t), freezetest.StartBus(t), t.TempDir()
			m := freezetest.StartManager(t, bus, freezetest.Unit{Name: unit, Base: b, Restart: true})
			m.Start(unit)
			b.AwaitStarts(1)
			s := freezetest.StartSession(t, b, state, bus+" "+unit)
			s.AwaitFrozen()
			m.WantActive()
			if !both {
				s.Kill()
			} else {
				// The backup would take over at once from a guard that dies first.
				s.Pause()
				freezetest.KillGuard(t, state)
				s.Kill()
				m.WantActive()
				if _, err := freeze.Recover(background(), state); err != nil {
					t.Error(err)
				}
			}
			freezetest.AwaitThawed(t, state)
			b.AwaitStarts(2)
			m.WantActive(unit)
			b.WantEvents("started", "stopped", "started")
		})
	}
}

func TestRefused(t *testing.T) {
	b, bus, empty := freezetest.NewBase(t), freezetest.StartBus(t), freezetest.StartBus(t)
	m := freezetest.StartManager(t, bus, freezetest.Unit{Name: unit, Base: b},
		freezetest.Unit{Name: "masked.service", Load: "masked"}, freezetest.Unit{Name: "manual.service", NoManual: true})
	m.Start(unit, "masked.service", "manual.service")
	b.AwaitStarts(1)
	for name, c := range map[string]struct {
		unit, bus string
		is        error
		want      string
	}{
		"no unit":     {"nobody.service", bus, ErrNoUnit, "nobody.service"},
		"masked":      {"masked.service", bus, nil, "masked"},
		"not by hand": {"manual.service", bus, nil, "RefuseManualStop="},
		"no bus":      {unit, "unix:path=/nonexistent/bus", ErrNoManager, "/nonexistent/bus"},
		"no systemd":  {unit, empty, ErrNoManager, empty},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := newFreezer(t, Options{Units: []string{c.unit}, Bus: c.bus}).Freeze(background(), b.Inst)
			if err == nil || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("not allowed", func(t *testing.T) {
		m.Deny(true)
		defer m.Deny(false)
		_, err := newFreezer(t, Options{Units: []string{unit}, Bus: bus, StartRetries: -1}).Freeze(background(), b.Inst)
		if !errors.Is(err, ErrDenied) || errors.Is(err, freeze.ErrNotStarted) || !strings.Contains(err.Error(), "polkit") {
			t.Errorf("got %v", err)
		}
	})
	m.WantActive(unit, "masked.service", "manual.service")
	b.WantEvents("started")
}

// TestInactive: what is not active is not started.
func TestInactive(t *testing.T) {
	b, bus := freezetest.NewBase(t), freezetest.StartBus(t)
	m := freezetest.StartManager(t, bus, freezetest.Unit{Name: unit, Base: b})
	var ev freezetest.Events
	fz, err := newFreezer(t, Options{Units: []string{unit}, Bus: bus, Progress: ev.Sink}).Freeze(background(), b.Inst)
	if err != nil {
		t.Fatal(err)
	}
	if err := fz.Thaw(background()); err != nil {
		t.Fatal(err)
	}
	m.WantActive()
	if !ev.Has(progress.Warning, "none of the units") {
		t.Error("nothing was said")
	}
}

func TestOptions(t *testing.T) {
	for arg, want := range map[string]string{
		"systemd:ocis":                          "ocis.service",
		"systemd:ocis.service,ocis-web.service": "ocis.service ocis-web.service",
		"systemd:ocis@main,ocis.socket":         "ocis@main.service ocis.socket",
		`systemd:ocis\x2dx.1`:                   `ocis\x2dx.1.service`,
	} {
		var o Options
		err := o.Parse(arg)
		s, nerr := New(o)
		if err != nil || nerr != nil || strings.Join(s.o.Units, " ") != want {
			t.Errorf("%s: got %+v, %v, %v", arg, o, err, nerr)
		}
	}
	for _, arg := range []string{"systemd", "systemd:", "systemd:a,", "systemd:a/b", "systemd:../x.service", "systemd:a b", "systemd:.service",
		"systemd:ocis@.service", "systemd:" + strings.Repeat("a", 250), "docker:x"} {
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
