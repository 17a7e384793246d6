// Package systemd freezes an instance that runs as units of systemd, over D-Bus. The manager stops
// and starts them, so Restart= does not bring them back, and it knows their state all the time.
//
// Programs that freeze in this way call freeze.Register(systemd.Kind, systemd.Start) before
// freeze.MaybeGuard.
package systemd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/freeze/order"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
)

// Kind is the kind of recipe of this package.
const Kind = "systemd"

// ErrNoUnit is returned (wrapped) when systemd knows no such unit.
var ErrNoUnit = errors.New("no such unit")

// ErrDenied is returned (wrapped) when systemd does not let this user stop or start units.
var ErrDenied = errors.New("not allowed")

// ErrNoManager is returned (wrapped) when no systemd answers on the bus.
var ErrNoManager = errors.New("systemd not reachable")

// Options configures the freezer.
type Options struct {
	// Units are names as systemctl takes them; ".service" may be left out.
	Units []string
	// Bus is the address of the message bus; "" is the system's. The units of a user are on
	// unix:path=/run/user/UID/bus.
	Bus          string
	StopTimeout  time.Duration // 0 is freeze.DefaultStopTimeout
	ReadyCommand string
	ReadyURL     string
	ReadyTimeout time.Duration // 0 is freeze.DefaultReadyTimeout
	StartRetries int           // 0 is freeze.DefaultStartRetries; negative is none
	StartBackoff time.Duration // 0 is freeze.DefaultBackoff
	Progress     progress.Sink `json:"-"`
}

// Systemd is the freezer.
type Systemd struct{ o Options }

// Parse reads the argument of --freeze, systemd:UNIT[,UNIT...], and sets the units.
func (o *Options) Parse(arg string) error {
	rest, ok := strings.CutPrefix(arg, "systemd:")
	if !ok || rest == "" {
		return fmt.Errorf("--freeze %s: name the unit, as in systemd:ocis.service; `systemctl list-units` tells it", arg)
	}
	o.Units = strings.Split(rest, ",")
	return nil
}

// unitName is a name without its suffix: letters, digits and some signs, with an instance after @.
var unitName = regexp.MustCompile(`^[a-zA-Z0-9:_.\\-]+(@[a-zA-Z0-9:_.\\@-]+)?$`)

// suffixes are the kinds of unit that may be named.
var suffixes = []string{".service", ".socket", ".timer", ".path", ".target"}

// checkName completes and checks the name of a unit.
func checkName(name string) (string, error) {
	stem := name
	for _, s := range suffixes {
		stem = strings.TrimSuffix(stem, s)
		if stem != name {
			break
		}
	}
	if stem == name {
		name += ".service"
	}
	const longest = 255 // UNIT_NAME_MAX of systemd is that with the zero byte
	if !unitName.MatchString(stem) || len(name) > longest {
		return "", fmt.Errorf("%q is no name of a unit; `systemctl list-units` tells it", name)
	}
	return name, nil
}

// New returns the freezer of --freeze systemd. The bus is not asked yet.
//
// Errors: no units, a name that no unit can have.
func New(o Options) (*Systemd, error) {
	if len(o.Units) == 0 {
		return nil, errors.New("--freeze systemd: needs the name of a unit, as in systemd:ocis.service")
	}
	var names []string
	for _, n := range o.Units {
		n, err := checkName(n)
		if err != nil {
			return nil, err
		}
		names = append(names, n)
	}
	o.Units = names
	o.StopTimeout = cmp.Or(o.StopTimeout, freeze.DefaultStopTimeout)
	o.ReadyTimeout = cmp.Or(o.ReadyTimeout, freeze.DefaultReadyTimeout)
	o.StartRetries = max(cmp.Or(o.StartRetries, freeze.DefaultStartRetries), 0)
	o.StartBackoff = cmp.Or(o.StartBackoff, freeze.DefaultBackoff)
	return &Systemd{o}, nil
}

// Method returns "systemd".
func (s *Systemd) Method() string { return Kind }

// Freeze stops the units and waits for the proof.
func (s *Systemd) Freeze(ctx context.Context, inst *ocis.Instance) (freeze.Frozen, error) {
	return freeze.FreezePlain(ctx, s, inst, s.o.Progress)
}

// Recipe says which units to start, in freeze.Recipe.Other.
type Recipe struct {
	Bus   string `json:"bus,omitempty"`
	Units []Unit `json:"units"`
	// Holds: something had files of the instance open, so it is up again when that is so again.
	Holds bool `json:"holds"`
}

// Unit is one unit that was active before the freeze.
type Unit struct {
	Name string `json:"name"`
	Role Role   `json:"role"`
	// Level is its place among those of its role: lower ones are started before.
	Level int `json:"level"`
}

// Role says what a unit is in the freeze, in the order of the start.
type Role int

// The roles.
const (
	// Socket units start a named unit when somebody connects. Systemd refuses to start them once
	// that unit is active.
	Socket Role = iota
	Named
	// Dependent units are stopped by systemd itself because they require a named one.
	Dependent
	// Trigger units start a named unit at a time, or when a file changes.
	Trigger
)

// Plan finds out which of the units, and of those that hang on them, are active.
//
// Errors: ErrNoManager, ErrNoUnit, units that cannot be stopped or started by hand.
func (s *Systemd) Plan(ctx context.Context, inst *ocis.Instance) (*freeze.Plan, error) {
	m, err := dial(ctx, s.o.Bus)
	if err != nil {
		return nil, fmt.Errorf("cannot freeze: %w", err)
	}
	defer m.close()
	units, err := s.collect(ctx, m)
	if err != nil {
		return nil, fmt.Errorf("cannot freeze: %w", err)
	}
	if !slices.ContainsFunc(units, func(u Unit) bool { return u.Role != Dependent }) {
		s.o.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "freeze",
			Message: fmt.Sprintf("none of the units %s is active; nothing is stopped", strings.Join(s.o.Units, ", "))})
		return freeze.None{Progress: s.o.Progress}.Plan(ctx, inst)
	}
	paths := freeze.Paths(inst)
	u, err := freeze.Look(ctx, paths)
	if err != nil {
		return nil, err
	}
	recipe := Recipe{Bus: s.o.Bus, Units: units}
	for _, h := range u.Holders {
		recipe.Holds = recipe.Holds || h.Writing
	}
	other, err := json.Marshal(recipe)
	if err != nil {
		return nil, err
	}
	ready, err := freeze.NewReady(s.o.ReadyCommand, s.o.ReadyURL, s.o.ReadyTimeout)
	if err != nil {
		return nil, err
	}
	return &freeze.Plan{
		Recipe: freeze.Recipe{
			Kind: Kind, Other: other, Paths: paths, Ready: ready,
			StopTimeout: s.o.StopTimeout, Retries: s.o.StartRetries, Backoff: s.o.StartBackoff,
		},
		Stop: func(ctx context.Context, run *freeze.Run) error {
			return s.stop(ctx, recipe, inst, paths, run)
		},
	}, nil
}

// collect lists the active units with their roles and levels.
func (s *Systemd) collect(ctx context.Context, m *manager) ([]Unit, error) {
	infos := map[string]*unitInfo{}
	var found []Unit
	get := func(name string) (*unitInfo, error) {
		if u := infos[name]; u != nil {
			return u, nil
		}
		u, err := m.unit(ctx, name)
		if err != nil {
			return nil, err
		}
		infos[name], infos[u.id] = u, u
		return u, nil
	}
	known := map[string]bool{}
	add := func(u *unitInfo, role Role) error {
		if known[u.id] || !u.up() {
			return nil
		}
		known[u.id] = true
		if role != Dependent {
			if err := u.controllable(); err != nil {
				return err
			}
		}
		found = append(found, Unit{Name: u.id, Role: role})
		return nil
	}
	var named []*unitInfo
	for _, name := range s.o.Units {
		u, err := get(name)
		if err == nil && u.loadState == "not-found" {
			err = fmt.Errorf("%w %s: `systemctl list-units` names them", ErrNoUnit, name)
		}
		if err == nil {
			err = add(u, roleOf(u.id, Named))
		}
		if err != nil {
			return nil, err
		}
		named = append(named, u)
	}
	for _, u := range named {
		for _, name := range u.triggeredBy {
			t, err := get(name)
			if err == nil {
				err = add(t, roleOf(t.id, Trigger))
			}
			if err != nil {
				return nil, err
			}
		}
	}
	for queue := named; len(queue) > 0; queue = queue[1:] {
		for _, name := range queue[0].stoppedWith {
			if known[name] {
				continue
			}
			d, err := get(name)
			if err != nil {
				return nil, err
			}
			if err := add(d, Dependent); err != nil {
				return nil, err
			}
			if known[d.id] {
				queue = append(queue, d)
			}
		}
	}
	var names []string
	for _, u := range found {
		names = append(names, u.Name)
	}
	levels := order.Levels(names, func(name string) []string {
		after := slices.Clone(infos[name].after)
		for _, other := range names { // the same, told by the other side
			if slices.Contains(infos[other].before, name) {
				after = append(after, other)
			}
		}
		return slices.DeleteFunc(after, func(n string) bool { return infos[n] == nil })
	})
	for i := range found {
		found[i].Level = levels[found[i].Name]
	}
	return found, nil
}

// roleOf tells sockets from what else triggers units.
func roleOf(name string, otherwise Role) Role {
	switch {
	case strings.HasSuffix(name, ".socket"):
		return Socket
	case strings.HasSuffix(name, ".timer"), strings.HasSuffix(name, ".path"):
		return Trigger
	}
	return otherwise
}

// stop stops the units and proves it: first whatever could start them again, then those that come
// after others.
func (s *Systemd) stop(ctx context.Context, r Recipe, inst *ocis.Instance, paths []string, run *freeze.Run) error {
	deadline := time.Now().Add(s.o.StopTimeout)
	m, err := dial(ctx, r.Bus)
	if err != nil {
		return err
	}
	defer m.close()
	step := func(u Unit) int {
		switch u.Role {
		case Named:
			return -u.Level
		case Dependent:
			return 1 << 30 // comes down with the others; looked at in the end
		}
		return -1 << 30
	}
	for _, group := range order.Group(r.Units, step) {
		g, gctx := errgroup.WithContext(ctx)
		for _, u := range group {
			g.Go(func() error { return s.stopOne(gctx, m, u, inst, deadline) })
		}
		if err := g.Wait(); err != nil {
			if cause := context.Cause(ctx); cause != nil {
				return cause
			}
			return err
		}
	}
	return freeze.WaitFree(ctx, paths, nil, deadline, s.o.StopTimeout, run)
}

// stopOne stops one unit and waits until it is inactive.
func (s *Systemd) stopOne(ctx context.Context, m *manager, u Unit, inst *ocis.Instance, deadline time.Time) error {
	if u.Role == Dependent {
		return nil
	}
	limited, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	result, err := m.job(limited, "StopUnit", u.Name)
	var state *unitInfo
	for err == nil {
		if state, err = m.unit(limited, u.Name); err != nil || state.down() {
			break
		}
		if result != "" && result != "done" {
			return fmt.Errorf("stop %s: systemd says: %s; did somebody else start it? See `systemctl status %s`", u.Name, result, u.Name)
		}
		sleep(limited, 20*time.Millisecond)
	}
	if err == nil {
		if state.result == "timeout" {
			s.o.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "freeze",
				Message: fmt.Sprintf("%s did not stop in the time that its TimeoutStopSec= allows, and was killed by systemd; raise it to 60 s or more", u.Name)})
		}
		return nil
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if limited.Err() == nil {
		return err
	}
	busy := &freeze.BusyError{Holders: []freeze.Holder{{Path: inst.BasePath, Command: u.Name, How: freeze.HowRuns, Writing: true}}}
	brief, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if state, err := m.unit(brief, u.Name); err == nil && state.mainPID != 0 {
		busy.Holders[0].PID = state.mainPID
	}
	return fmt.Errorf("%s did not stop within %s: %w; it is started again as soon as it has; see `journalctl -u %s`, or raise --stop-timeout", u.Name, s.o.StopTimeout, busy, u.Name)
}

// sleep waits for d. It returns false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// Start is the freeze.Starter of Kind. It starts the units in their order, unless they are active,
// and returns when the data is in use again.
func Start(ctx context.Context, r freeze.Recipe, run *freeze.Run) error {
	var recipe Recipe
	if err := json.Unmarshal(r.Other, &recipe); err != nil {
		return fmt.Errorf("the record of the units cannot be read: %w", err)
	}
	m, err := dial(ctx, recipe.Bus)
	if err != nil {
		return err
	}
	defer m.close()
	// One that is still stopping is waited for: its socket could not be started now.
	limited, cancel := context.WithTimeout(ctx, cmp.Or(r.Ready.Timeout, freeze.DefaultReadyTimeout))
	defer cancel()
	for _, u := range recipe.Units {
		for {
			state, err := m.unit(limited, u.Name)
			if err != nil {
				return fmt.Errorf("start %s: %w", u.Name, err)
			}
			if state.activeState != "deactivating" {
				break
			}
			if !sleep(limited, 50*time.Millisecond) {
				break
			}
		}
	}
	var errs []error
	for _, group := range order.Group(recipe.Units, func(u Unit) int { return int(u.Role)<<20 + u.Level }) {
		results := make(chan error)
		for _, u := range group {
			go func() { results <- startOne(limited, m, u, run) }()
		}
		for range group {
			if err := <-results; err != nil {
				errs = append(errs, err)
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return freeze.AwaitUse(ctx, r, recipe.Holds, func(ctx context.Context) error {
		for _, u := range recipe.Units {
			if u.Role != Named {
				continue
			}
			state, err := m.unit(ctx, u.Name)
			if err != nil {
				return err
			}
			if !state.up() {
				return fmt.Errorf("%s ended right after its start (%s); see `journalctl -u %s`", u.Name, cmp.Or(state.result, state.activeState), u.Name)
			}
		}
		return nil
	}, run)
}

func startOne(ctx context.Context, m *manager, u Unit, run *freeze.Run) error {
	state, err := m.unit(ctx, u.Name)
	if err == nil && state.result == "start-limit-hit" {
		// Systemd refuses further starts until it is told that somebody has looked.
		err = m.call(ctx, "ResetFailedUnit", u.Name)
	}
	var result string
	if err == nil {
		// Also one that is active: there may be a stop of it in the queue.
		result, err = m.job(ctx, "StartUnit", u.Name)
		if errors.Is(err, ErrDenied) && state.activeState == "active" {
			return nil // neither could it be stopped
		}
	}
	if err == nil && result != "" && result != "done" {
		err = fmt.Errorf("start %s: systemd says: %s; see `journalctl -u %s`", u.Name, result, u.Name)
	}
	if err != nil && u.Role == Socket {
		// With its service running, that is how it is: the service itself listens.
		run.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "thaw",
			Message: fmt.Sprintf("%v; if its service stops one day, start %s then", err, u.Name)})
		return nil
	}
	return err
}
