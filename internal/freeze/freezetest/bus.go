package freezetest

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
)

const busConfig = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path=%s</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
</busconfig>
`

// StartBus starts a message bus for one test and returns its address.
func StartBus(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hfbus") // short: the paths of sockets are limited
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	config, socket := filepath.Join(dir, "bus.conf"), filepath.Join(dir, "bus")
	if err := os.WriteFile(config, fmt.Appendf(nil, busConfig, socket), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("dbus-daemon", "--config-file="+config, "--nofork", "--nopidfile")
	d, err := startDaemon(cmd)
	if err != nil {
		t.Fatalf("start a message bus: %v; scripts/install-test-deps.sh installs it", err)
	}
	t.Cleanup(func() {
		if err := d.stop(); err != nil {
			t.Error(err)
		}
	})
	Eventually(t, "the bus listens", func() bool {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	return "unix:path=" + socket
}

// Unit is a unit of a Manager. Services run the server on Base.
type Unit struct {
	Name        string
	Base        *Base  // nil for a unit without processes
	Mode        string // OCIS_TEST_MODE
	After       []string
	Before      []string
	RequiredBy  []string
	TriggeredBy []string
	// Restart: a server that ends without the manager's doing is started again at once.
	Restart bool
	// KillAfter is TimeoutStopSec=; 0 is forever.
	KillAfter time.Duration
	// StartLimit is how many starts may fail until the manager refuses more; 0 is no limit.
	StartLimit int
	// Settle: the start is over only when the server has its lock, as with Type=notify.
	Settle   bool
	Load     string // LoadState; "" is loaded
	NoManual bool   // RefuseManualStop=
}

// Manager stands in for systemd on a bus: units that are stopped and started by jobs, with servers
// behind them that are real.
type Manager struct {
	t    testing.TB
	conn *dbus.Conn
	bin  string

	mu     sync.Mutex
	units  map[string]*unitState // guarded by mu, as are the following
	log    []string
	jobs   uint32
	denied bool
	mute   bool
	wg     sync.WaitGroup
}

type unitState struct {
	Unit
	state    string // ActiveState
	result   string
	cmd      *exec.Cmd
	done     chan struct{} // closed when cmd has ended
	stopping bool
	failures int
}

const (
	systemdName    = "org.freedesktop.systemd1"
	systemdPath    = dbus.ObjectPath("/org/freedesktop/systemd1")
	systemdManager = "org.freedesktop.systemd1.Manager"
)

// StartManager puts a Manager on the bus, with all units inactive.
func StartManager(t testing.TB, address string, units ...Unit) *Manager {
	t.Helper()
	conn, err := dbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	m := &Manager{t: t, conn: conn, bin: Binary(t), units: map[string]*unitState{}}
	for _, u := range units {
		m.units[u.Name] = &unitState{Unit: u, state: "inactive", result: "success"}
		if err := conn.Export(&unitObject{m, u.Name}, unitPath(u.Name), "org.freedesktop.DBus.Properties"); err != nil {
			t.Fatal(err)
		}
	}
	if err := conn.Export(&managerObject{m}, systemdPath, systemdManager); err != nil {
		t.Fatal(err)
	}
	if r, err := conn.RequestName(systemdName, dbus.NameFlagDoNotQueue); err != nil || r != dbus.RequestNameReplyPrimaryOwner {
		t.Fatal(r, err)
	}
	t.Cleanup(func() {
		m.mu.Lock()
		for _, u := range m.units {
			u.stopping = true
			if u.cmd != nil {
				_ = u.cmd.Process.Kill()
			}
		}
		m.mu.Unlock()
		m.wg.Wait()
		_ = conn.Close()
	})
	return m
}

// Deny makes the manager refuse to stop and start anything.
func (m *Manager) Deny(yes bool) { m.mu.Lock(); m.denied = yes; m.mu.Unlock() }

// Mute makes it keep the ends of jobs to itself.
func (m *Manager) Mute() { m.mu.Lock(); m.mute = true; m.mu.Unlock() }

// Log lists the jobs so far, as "start ocis.service".
func (m *Manager) Log() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.log)
}

// Active returns the states of all units that are not inactive.
func (m *Manager) Active() map[string]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	active := map[string]string{}
	for n, u := range m.units {
		if u.state != "inactive" {
			active[n] = u.state
		}
	}
	return active
}

// WantActive fails the test unless exactly these units are active, and none in any other state but
// inactive.
func (m *Manager) WantActive(names ...string) {
	m.t.Helper()
	want := map[string]string{}
	for _, n := range names {
		want[n] = "active"
	}
	if got := m.Active(); !maps.Equal(got, want) {
		m.t.Errorf("active are %v, want %v", got, want)
	}
}

// Start starts a unit as somebody else would.
func (m *Manager) Start(names ...string) {
	m.t.Helper()
	for _, n := range names {
		if r := m.start(n); r != "done" {
			m.t.Fatalf("start %s: %s", n, r)
		}
	}
	m.mu.Lock()
	m.log = nil
	m.mu.Unlock()
}

// Connect does what a connection to a socket does: if the socket is active, its service is started.
func (m *Manager) Connect(socket string) bool {
	m.mu.Lock()
	active := m.units[socket].state == "active"
	var service string
	for n, u := range m.units {
		if slices.Contains(u.TriggeredBy, socket) {
			service = n
		}
	}
	m.mu.Unlock()
	return active && m.start(service) == "done"
}

// MainPID returns the process of a service.
func (m *Manager) MainPID(name string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	if u := m.units[name]; u.cmd != nil {
		return u.cmd.Process.Pid
	}
	return 0
}

func unitPath(name string) dbus.ObjectPath {
	var b strings.Builder
	for _, c := range []byte(name) {
		if c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "_%02x", c)
		}
	}
	return systemdPath + "/unit/" + dbus.ObjectPath(b.String())
}

// start is a start job from its beginning to its end. It waits for a stop that is under way.
func (m *Manager) start(name string) string {
	for {
		m.mu.Lock()
		if m.units[name].state != "deactivating" {
			break
		}
		m.mu.Unlock()
		time.Sleep(5 * time.Millisecond)
	}
	defer m.mu.Unlock()
	u := m.units[name]
	m.log = append(m.log, "start "+name)
	if u.state == "active" {
		return "done"
	}
	if strings.HasSuffix(name, ".socket") {
		for _, s := range m.units {
			if slices.Contains(s.TriggeredBy, name) && s.state != "inactive" && s.state != "failed" {
				return "failed" // "already active, refusing"
			}
		}
	}
	if u.StartLimit > 0 && u.failures >= u.StartLimit {
		u.state, u.result = "failed", "start-limit-hit"
		return "failed"
	}
	if u.Base == nil {
		u.state = "active"
		return "done"
	}
	if err := m.spawn(u); err != nil {
		return "failed"
	}
	if u.Settle {
		u.state = "activating"
		m.mu.Unlock()
		for u.Base.Count("started") == 0 || !u.Base.Runs() {
			select {
			case <-u.done:
				m.mu.Lock()
				return "failed"
			case <-time.After(5 * time.Millisecond):
			}
		}
		m.mu.Lock()
		u.state = "active"
	}
	return "done"
}

// spawn starts the server of a unit; mu is held.
func (m *Manager) spawn(u *unitState) error {
	u.cmd = exec.Command(m.bin, "server")
	u.cmd.Env = append(u.Base.Env(), "OCIS_TEST_MODE="+u.Mode)
	u.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := u.cmd.Start(); err != nil {
		return err
	}
	u.state, u.result, u.stopping, u.done = "active", "success", false, make(chan struct{})
	cmd, done := u.cmd, u.done
	m.wg.Go(func() {
		err := cmd.Wait()
		m.mu.Lock()
		defer m.mu.Unlock()
		u.cmd = nil
		switch {
		case u.stopping && u.result == "timeout":
			u.state = "failed"
		case u.stopping:
			u.state = "inactive"
		case u.Restart && err == nil:
			_ = m.spawn(u)
		default:
			u.state, u.result = "failed", "exit-code"
			u.failures++
		}
		close(done)
	})
	return nil
}

// stop is a stop job.
func (m *Manager) stop(name string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	u := m.units[name]
	m.log = append(m.log, "stop "+name)
	for _, other := range u.RequiredBy { // what needs it goes with it
		m.mu.Unlock()
		m.stop(other)
		m.mu.Lock()
	}
	if u.cmd == nil {
		if u.state != "failed" {
			u.state = "inactive"
		}
		return "done"
	}
	u.stopping, u.state = true, "deactivating"
	cmd, done := u.cmd, u.done
	_ = cmd.Process.Signal(syscall.SIGTERM)
	var late <-chan time.Time
	if u.KillAfter > 0 {
		late = time.After(u.KillAfter)
	}
	m.mu.Unlock()
	select {
	case <-done:
	case <-late:
		m.mu.Lock()
		u.result = "timeout"
		m.mu.Unlock()
		_ = cmd.Process.Kill()
		<-done
	}
	m.mu.Lock()
	return "done"
}

// managerObject is what the bus sees.
type managerObject struct{ m *Manager }

// Subscribe does nothing: signals are always sent.
func (o *managerObject) Subscribe() *dbus.Error { return nil }

// LoadUnit is asked for every unit, loaded or not.
func (o *managerObject) LoadUnit(name string) (dbus.ObjectPath, *dbus.Error) {
	o.m.mu.Lock()
	defer o.m.mu.Unlock()
	if o.m.units[name] == nil {
		o.m.units[name] = &unitState{Unit: Unit{Name: name, Load: "not-found"}, state: "inactive"}
		if err := o.m.conn.Export(&unitObject{o.m, name}, unitPath(name), "org.freedesktop.DBus.Properties"); err != nil {
			return "", dbus.MakeFailedError(err)
		}
	}
	return unitPath(name), nil
}

// ResetFailedUnit forgets failed starts.
func (o *managerObject) ResetFailedUnit(name string) *dbus.Error {
	o.m.mu.Lock()
	defer o.m.mu.Unlock()
	u := o.m.units[name]
	u.failures, u.state, u.result = 0, "inactive", "success"
	o.m.log = append(o.m.log, "reset "+name)
	return nil
}

// StopUnit queues a job.
func (o *managerObject) StopUnit(name, mode string) (dbus.ObjectPath, *dbus.Error) {
	return o.job(name, mode, o.m.stop)
}

// StartUnit queues a job.
func (o *managerObject) StartUnit(name, mode string) (dbus.ObjectPath, *dbus.Error) {
	return o.job(name, mode, o.m.start)
}

func (o *managerObject) job(name, mode string, do func(string) string) (dbus.ObjectPath, *dbus.Error) {
	o.m.mu.Lock()
	defer o.m.mu.Unlock()
	if o.m.denied {
		return "", dbus.NewError("org.freedesktop.DBus.Error.InteractiveAuthorizationRequired", []any{"Interactive authentication required."})
	}
	u := o.m.units[name]
	if u == nil || u.Load == "not-found" {
		return "", dbus.NewError("org.freedesktop.systemd1.NoSuchUnit", []any{"Unit " + name + " not found."})
	}
	if mode != "replace" {
		return "", dbus.MakeFailedError(errors.New("unexpected mode " + mode))
	}
	o.m.jobs++
	number := o.m.jobs
	path := systemdPath + dbus.ObjectPath(fmt.Sprintf("/job/%d", number))
	_ = o.m.conn.Export(&jobObject{}, path, "org.freedesktop.DBus.Properties")
	o.m.wg.Go(func() {
		result := do(name)
		_ = o.m.conn.Export(nil, path, "org.freedesktop.DBus.Properties")
		o.m.mu.Lock()
		mute := o.m.mute
		o.m.mu.Unlock()
		if !mute {
			_ = o.m.conn.Emit(systemdPath, systemdManager+".JobRemoved", number, path, name, result)
		}
	})
	return path, nil
}

// jobObject is a job that has not ended.
type jobObject struct{}

// Get answers for its only property.
func (*jobObject) Get(_, _ string) (dbus.Variant, *dbus.Error) {
	return dbus.MakeVariant("running"), nil
}

// unitObject is one unit.
type unitObject struct {
	m    *Manager
	name string
}

// GetAll returns the properties of an interface of the unit.
func (o *unitObject) GetAll(iface string) (map[string]dbus.Variant, *dbus.Error) {
	o.m.mu.Lock()
	defer o.m.mu.Unlock()
	u := o.m.units[o.name]
	load := u.Load
	if load == "" {
		load = "loaded"
	}
	list := func(l []string) dbus.Variant { return dbus.MakeVariant(append([]string{}, l...)) }
	switch iface {
	case "org.freedesktop.systemd1.Unit":
		return map[string]dbus.Variant{
			"Id": dbus.MakeVariant(u.Name), "LoadState": dbus.MakeVariant(load), "ActiveState": dbus.MakeVariant(u.state),
			"After": list(u.After), "Before": list(u.Before), "RequiredBy": list(u.RequiredBy), "TriggeredBy": list(u.TriggeredBy),
			"BoundBy": list(nil), "ConsistsOf": list(nil),
			"RefuseManualStop": dbus.MakeVariant(u.NoManual), "RefuseManualStart": dbus.MakeVariant(false),
		}, nil
	case "org.freedesktop.systemd1.Service":
		pid := uint32(0)
		if u.cmd != nil {
			pid = uint32(u.cmd.Process.Pid)
		}
		return map[string]dbus.Variant{"Result": dbus.MakeVariant(u.result), "MainPID": dbus.MakeVariant(pid)}, nil
	}
	return map[string]dbus.Variant{"Result": dbus.MakeVariant(u.result)}, nil
}
