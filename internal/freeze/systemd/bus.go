package systemd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"
)

const (
	busName      = "org.freedesktop.systemd1"
	objectPath   = "/org/freedesktop/systemd1"
	managerIface = "org.freedesktop.systemd1.Manager"
	unitIface    = "org.freedesktop.systemd1.Unit"
	serviceIface = "org.freedesktop.systemd1.Service"
	socketIface  = "org.freedesktop.systemd1.Socket"

	systemBus = "unix:path=/run/dbus/system_bus_socket"
)

// manager is a connection to systemd.
type manager struct {
	conn *dbus.Conn
	obj  dbus.BusObject
	bus  string

	mu      sync.Mutex
	results map[dbus.ObjectPath]string // guarded by mu: of jobs that have ended
	changed chan struct{}              // guarded by mu: closed at the next result
}

// answer is how long the bus and systemd may take for a question, as in libdbus. Jobs are another
// matter.
const answer = 25 * time.Second

// connect bounds what the library does not.
func connect(ctx context.Context, address string) (*dbus.Conn, error) {
	type outcome struct {
		conn *dbus.Conn
		err  error
	}
	done := make(chan outcome, 1)
	go func() {
		conn, err := dbus.Connect(address)
		done <- outcome{conn, err}
	}()
	ctx, cancel := context.WithTimeout(ctx, answer)
	defer cancel()
	select {
	case o := <-done:
		return o.conn, o.err
	case <-ctx.Done():
		go func() {
			if o := <-done; o.err == nil {
				_ = o.conn.Close()
			}
		}()
		return nil, ctx.Err()
	}
}

// dial connects to the bus at address, "" for the system's.
//
// Errors: ErrNoManager.
func dial(ctx context.Context, address string) (*manager, error) {
	address = cmp.Or(address, os.Getenv("DBUS_SYSTEM_BUS_ADDRESS"), systemBus)
	conn, err := connect(ctx, address)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return nil, cause
		}
		return nil, fmt.Errorf("%w: the message bus at %s: %w", ErrNoManager, address, err)
	}
	m := &manager{conn: conn, obj: conn.Object(busName, objectPath), bus: address,
		results: map[dbus.ObjectPath]string{}, changed: make(chan struct{})}
	signals := make(chan *dbus.Signal, 64)
	conn.Signal(signals)
	go m.listen(signals)
	short, cancel := context.WithTimeout(ctx, answer)
	defer cancel()
	err = conn.AddMatchSignalContext(short, dbus.WithMatchInterface(managerIface), dbus.WithMatchMember("JobRemoved"))
	if err == nil {
		// Without it systemd keeps its signals to itself.
		err = m.call(short, "Subscribe")
	}
	if err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

func (m *manager) close() { _ = m.conn.Close() }

// listen notes the results of jobs, also of those whose number is not known yet.
func (m *manager) listen(signals <-chan *dbus.Signal) {
	for s := range signals {
		var number uint32
		var job dbus.ObjectPath
		var unit, result string
		if s.Name != managerIface+".JobRemoved" || dbus.Store(s.Body, &number, &job, &unit, &result) != nil {
			continue
		}
		m.mu.Lock()
		m.results[job] = result
		close(m.changed)
		m.changed = make(chan struct{})
		m.mu.Unlock()
	}
}

func (m *manager) result(job dbus.ObjectPath) (string, <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.results[job], m.changed
}

// explain makes an error of the bus one of ours.
func (m *manager) explain(ctx context.Context, doing string, err error) error {
	if err == nil {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	var e dbus.Error
	if errors.As(err, &e) {
		switch e.Name {
		case "org.freedesktop.systemd1.NoSuchUnit":
			return fmt.Errorf("%s: %w: %s", doing, ErrNoUnit, e.Error())
		case "org.freedesktop.DBus.Error.AccessDenied", "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired",
			"org.freedesktop.DBus.Error.AuthFailed":
			return fmt.Errorf("%s: %w: %s; run holdfast as root, or let its user manage the unit by a polkit rule for org.freedesktop.systemd1.manage-units", doing, ErrDenied, e.Error())
		case "org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NameHasNoOwner":
			return fmt.Errorf("%w: nobody of that name is on the bus at %s", ErrNoManager, m.bus)
		}
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// call calls a method of the manager that has no answer.
func (m *manager) call(ctx context.Context, method string, args ...any) error {
	err := m.obj.CallWithContext(ctx, managerIface+"."+method, 0, args...).Err
	doing := method
	if len(args) > 0 {
		doing += fmt.Sprintf(" %v", args[0])
	}
	return m.explain(ctx, doing, err)
}

var verbs = map[string]string{"StopUnit": "stop", "StartUnit": "start"}

// job stops or starts a unit and waits until systemd has done it. It returns the result, "done" if
// all went well, or "" if it was missed.
//
// Errors: ErrNoUnit, ErrDenied.
func (m *manager) job(ctx context.Context, method, unit string) (string, error) {
	doing := verbs[method] + " " + unit
	var job dbus.ObjectPath
	// replace: a job of somebody else that goes the other way is called off.
	err := m.obj.CallWithContext(ctx, managerIface+"."+method, 0, unit, "replace").Store(&job)
	if err != nil {
		return "", m.explain(ctx, doing, err)
	}
	for {
		result, changed := m.result(job)
		if result != "" {
			return result, nil
		}
		select {
		case <-changed:
			continue
		case <-ctx.Done():
			return "", m.explain(ctx, doing, ctx.Err())
		case <-m.conn.Context().Done():
			return "", fmt.Errorf("%s: %w: the bus closed the connection", doing, ErrNoManager)
		case <-time.After(200 * time.Millisecond):
		}
		// Signals get lost when systemd starts itself anew; a job that has ended is no more.
		_, err := m.conn.Object(busName, job).GetProperty("org.freedesktop.systemd1.Job.State")
		if err != nil {
			result, _ := m.result(job)
			return result, nil
		}
	}
}

// unitInfo is what matters of a unit.
type unitInfo struct {
	id                     string // its one true name
	loadState, activeState string
	after, before          []string
	triggeredBy            []string
	// stoppedWith are the units that systemd stops whenever it stops this one.
	stoppedWith     []string
	noStart, noStop bool // RefuseManualStart=, RefuseManualStop=
	result          string
	mainPID         int
}

// up: it runs, or is about to.
func (u *unitInfo) up() bool {
	return slices.Contains([]string{"active", "activating", "reloading", "refreshing"}, u.activeState)
}

// down: no process of it is left.
func (u *unitInfo) down() bool { return u.activeState == "inactive" || u.activeState == "failed" }

// controllable refuses what could not be started again.
func (u *unitInfo) controllable() error {
	switch {
	case u.loadState != "loaded":
		return fmt.Errorf("%s could not be started again: systemd says that it is %s; see `systemctl status %s`", u.id, u.loadState, u.id)
	case u.noStop, u.noStart:
		return fmt.Errorf("%s must not be stopped and started by hand (RefuseManualStop=, RefuseManualStart=)", u.id)
	}
	return nil
}

// unit asks for the state of a unit, loaded or not. One that does not exist is no error: its
// loadState is not-found.
func (m *manager) unit(ctx context.Context, name string) (*unitInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, answer)
	defer cancel()
	var path dbus.ObjectPath
	if err := m.obj.CallWithContext(ctx, managerIface+".LoadUnit", 0, name).Store(&path); err != nil {
		return nil, m.explain(ctx, "look at "+name, err)
	}
	p, err := m.properties(ctx, path, unitIface)
	if err != nil {
		return nil, m.explain(ctx, "look at "+name, err)
	}
	u := &unitInfo{
		id: cmp.Or(value[string](p, "Id"), name), loadState: value[string](p, "LoadState"), activeState: value[string](p, "ActiveState"),
		after: value[[]string](p, "After"), before: value[[]string](p, "Before"), triggeredBy: value[[]string](p, "TriggeredBy"),
		noStart: value[bool](p, "RefuseManualStart"), noStop: value[bool](p, "RefuseManualStop"),
	}
	for _, key := range []string{"RequiredBy", "BoundBy", "ConsistsOf"} {
		u.stoppedWith = append(u.stoppedWith, value[[]string](p, key)...)
	}
	iface := map[string]string{".service": serviceIface, ".socket": socketIface}[suffix(u.id)]
	if iface == "" {
		return u, nil
	}
	if p, err = m.properties(ctx, path, iface); err != nil {
		return nil, m.explain(ctx, "look at "+name, err)
	}
	u.result, u.mainPID = value[string](p, "Result"), int(value[uint32](p, "MainPID"))
	return u, nil
}

func (m *manager) properties(ctx context.Context, path dbus.ObjectPath, iface string) (map[string]dbus.Variant, error) {
	var p map[string]dbus.Variant
	err := m.conn.Object(busName, path).CallWithContext(ctx, "org.freedesktop.DBus.Properties.GetAll", 0, iface).Store(&p)
	return p, err
}

// value returns a property, or the zero value if there is none of that type.
func value[T any](p map[string]dbus.Variant, key string) T {
	v, _ := p[key].Value().(T)
	return v
}

func suffix(name string) string {
	for i := len(name) - 1; i >= 0; i-- {
		if name[i] == '.' {
			return name[i:]
		}
	}
	return ""
}
