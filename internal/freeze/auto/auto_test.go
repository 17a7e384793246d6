package auto

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/freeze/docker"
	"github.com/holdfast-backup/holdfast/internal/freeze/freezetest"
)

// TestMain lets the test binary play the guard.
func TestMain(m *testing.M) {
	freezetest.Main(m, Register, nil, freezetest.StopEngine)
}

func background() context.Context { return context.Background() }

// startServer starts a server of the host.
func startServer(t *testing.T, b *freezetest.Base) int {
	t.Helper()
	cmd := exec.Command(freezetest.Binary(t), "server")
	cmd.Env = []string{"OCIS_BASE_DATA_PATH=" + b.Dir}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	b.AwaitStarts(1)
	return cmd.Process.Pid
}

func detect(t *testing.T, b *freezetest.Base, o Options, want string) *Choice {
	t.Helper()
	c, err := Detect(background(), b.Inst, o)
	if err != nil {
		t.Fatal(err)
	}
	if c.Argument != want || c.Why == "" {
		t.Errorf("got %s (%s), want %s", c.Argument, c.Why, want)
	}
	if method, _, _ := strings.Cut(want, ":"); c.Freezer.Method() != method {
		t.Errorf("method %s for %s", c.Freezer.Method(), want)
	}
	return c
}

// dockerEngine: the container is detected, and the choice freezes it.
func dockerEngine(t *testing.T, spec freezetest.Spec, want string) {
	e, b := freezetest.TheEngine(t), freezetest.NewBase(t)
	spec.Base, spec.Restart = b, "always"
	id := e.Run(t, spec)
	b.AwaitStarts(1)
	o := Options{DockerHost: "unix://" + e.Socket, StopTimeout: 20 * time.Second}
	c := detect(t, b, o, want)
	_, err := freeze.Guarded(background(), c.Freezer, b.Inst, freeze.Options{StateDir: t.TempDir()}, func(context.Context) error {
		b.WantQuiet()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	b.WantEvents("started", "stopped", "started")
	e.WantState(t, id, "running", "always")

	o.DockerHost = "unix:///nonexistent/d.sock"
	if _, err := Detect(background(), b.Inst, o); err == nil || !strings.Contains(err.Error(), "DOCKER_HOST") {
		t.Errorf("without the engine: %v", err)
	}
}

func TestDocker(t *testing.T) {
	dockerEngine(t, freezetest.Spec{Name: "cloud", Command: []string{"sh", "-c", "ocis init; ocis server"}}, "docker:cloud")
}

func TestCompose(t *testing.T) {
	dockerEngine(t, freezetest.Spec{Name: "full-ocis-1", Command: []string{"ocis", "server"},
		Labels: map[string]string{docker.LabelProject: "full", docker.LabelService: "ocis"}}, "compose:full")
}

func TestNone(t *testing.T) {
	b := freezetest.NewBase(t)
	detect(t, b, Options{}, "none")
	db := filepath.Join(b.Dir, "idm", "idm.boltdb")
	if err := os.WriteFile(db, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(db)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	reader := exec.Command(freezetest.Binary(t), "idle")
	reader.Stdin = f
	if err := reader.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = reader.Process.Kill()
		_ = reader.Wait()
	}()
	detect(t, b, Options{}, "none")
}

func TestProcess(t *testing.T) {
	b := freezetest.NewBase(t)
	startServer(t, b)
	// Somebody who reads there is not to be stopped.
	f, err := os.Open(filepath.Join(b.Dir, "data"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	reader := exec.Command(freezetest.Binary(t), "idle")
	reader.Stdin = f
	if err := reader.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = reader.Process.Kill()
		_ = reader.Wait()
	}()
	detect(t, b, Options{}, "process")
}

// TestSystemd: a server in a real control group named as systemd does, and a stand-in for systemd.
func TestSystemd(t *testing.T) {
	b, bus := freezetest.NewBase(t), freezetest.StartBus(t)
	m := freezetest.StartManager(t, bus, freezetest.Unit{Name: "ocis.service", Base: b, Restart: true})
	m.Start("ocis.service")
	b.AwaitStarts(1)
	enterGroup(t, "holdfasttest.slice/ocis.service", m.MainPID("ocis.service"))
	c := detect(t, b, Options{Bus: bus}, "systemd:ocis.service")
	_, err := freeze.Guarded(background(), c.Freezer, b.Inst, freeze.Options{StateDir: t.TempDir()}, func(context.Context) error {
		b.WantQuiet()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	b.WantEvents("started", "stopped", "started")
	m.WantActive("ocis.service")
}

// enterGroup puts a process into a control group of the hierarchy that systemd would use.
func enterGroup(t *testing.T, name string, pid int) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	root := ""
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) > 6 && (strings.Contains(line, "name=systemd") || root == "" && strings.Contains(line, " - cgroup2 ")) {
			root = f[4]
		}
	}
	if root == "" {
		t.Fatal("no control groups are mounted")
	}
	dir := filepath.Join(root, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		freezetest.Eventually(t, "the control group is empty", func() bool {
			data, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			for _, p := range strings.Fields(string(data)) {
				_ = os.WriteFile(filepath.Join(root, "cgroup.procs"), []byte(p), 0)
			}
			return os.Remove(dir) == nil && os.Remove(filepath.Dir(dir)) == nil
		})
	})
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		t.Fatal(err)
	}
}

// TestSeveralWays: what cannot be told is not guessed.
func TestSeveralWays(t *testing.T) {
	e, b := freezetest.TheEngine(t), freezetest.NewBase(t)
	e.Run(t, freezetest.Spec{Base: b, Command: []string{"ocis", "server"}})
	b.AwaitStarts(1)
	f, err := os.OpenFile(filepath.Join(b.Dir, "data"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command(freezetest.Binary(t), "idle", "server")
	cmd.ExtraFiles = []*os.File{f}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	if _, err := Detect(background(), b.Inst, Options{DockerHost: "unix://" + e.Socket}); err == nil || !strings.Contains(err.Error(), "several ways") {
		t.Errorf("got %v", err)
	}
}

func TestParseCgroup(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	for text, want := range map[string]cgroup{
		"":                                {},
		"0::/\n":                          {},
		"0::/system.slice/ocis.service\n": {unit: "ocis.service"},
		"9:name=systemd:/system.slice/ocis.service\n8:pids:/x\n0::/system.slice/ocis.service\n": {unit: "ocis.service"},
		"0::/user.slice/user-1000.slice/session-3.scope\n":                                      {},
		"0::/user.slice/user-1000.slice/user@1000.service/app.slice/opencloud.service\n":        {unit: "opencloud.service", user: "1000"},
		"0::/user.slice/user-1000.slice/user@1000.service/app.slice/term.scope\n":               {},
		"0::/system.slice/docker-" + id + ".scope\n":                                            {container: id},
		"9:name=systemd:/docker/" + id + "\n0::/system.slice/containerd.service\n":              {container: id},
		"0::/machine.slice/libpod-" + id + ".scope/container\n":                                 {container: id},
		"0::/docker/" + strings.Repeat("f", 64) + "/docker/" + id + "\n":                        {container: id},
		"0::/system.slice/system-ocis.slice/ocis@main.service\n":                                {unit: "ocis@main.service"},
		"nonsense\n1:cpu:/a.service\n":                                                          {},
		"0::/kubepods.slice/kubepods-pod12.slice/cri-containerd-" + id + ".scope\n":             {container: id},
		"0::/system.slice/ocis.service/worker\n":                                                {unit: "ocis.service"},
	} {
		if got := parseCgroup(text); got != want {
			t.Errorf("%q: got %+v", text, got)
		}
	}
}

// TestUnitOfAnother: what cron, ssh or the unit of Holdfast itself started is a process by itself.
func TestUnitOfAnother(t *testing.T) {
	proc := t.TempDir()
	add := func(pid, parent int, cgroup, cmdline string) {
		dir := filepath.Join(proc, strconv.Itoa(pid))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{"cgroup": "0::/system.slice/" + cgroup + "\n",
			"cmdline": strings.ReplaceAll(cmdline, " ", "\x00") + "\x00", "stat": fmt.Sprintf("%d (a) b) S %d 1 1", pid, parent)} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	add(os.Getpid(), 1, "cron.service", "holdfast backup")
	add(1, 0, "init.scope", "/sbin/init")
	add(10, 1, "cron.service", "cron -f")
	add(11, 10, "cron.service", "ocis server")
	add(20, 1, "ssh.service", "sshd -D")
	add(21, 20, "ssh.service", "ocis server")
	add(30, 1, "cloud.service", "/usr/local/bin/ocis server")
	add(40, 1, "files.service", "/bin/sh /opt/opencloud/run.sh")
	add(41, 40, "files.service", "/opt/opencloud/bin/opencloud server")
	add(50, 1, "ocis-main.service", "/usr/bin/wrapper")
	o := Options{procDir: proc}
	for pid, want := range map[int]string{11: "", 21: "", 30: "cloud.service", 41: "files.service", 50: "ocis-main.service"} {
		s, err := o.place(pid)
		if err != nil || s.unit != want {
			t.Errorf("process %d: got %+v, %v, want %q", pid, s, err, want)
		}
	}
}

func TestNamed(t *testing.T) {
	for arg, method := range map[string]string{
		"none": "none", "process": "process", "process:12": "process", "systemd:ocis": "systemd",
		"docker:ocis": "docker", "compose:full/db": "compose",
	} {
		p, err := Named(arg, Options{DockerHost: "unix:///x"})
		if err != nil || p.Method() != method {
			t.Errorf("%s: %v, %v", arg, p, err)
		}
	}
	for _, arg := range []string{"", "auto", "none:x", "process:", "process:-1", "process:x", "systemd", "docker", "compose:", "lxc:x"} {
		if _, err := Named(arg, Options{DockerHost: "unix:///x"}); err == nil {
			t.Errorf("%s: no error", arg)
		}
	}
}
