package livetest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/freeze/auto"
	"github.com/holdfast-backup/holdfast/internal/freeze/freezetest"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/storegen"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

func TestMain(m *testing.M) {
	freezetest.Main(m, auto.Register, nil, func() error {
		return errors.Join(freezetest.StopEngine(), os.RemoveAll(program.dir))
	})
}

var program struct {
	once sync.Once
	dir  string
	err  error
}

// holdfast builds the program, once in each test run, and returns its path.
func holdfast(t testing.TB) string {
	t.Helper()
	program.once.Do(func() {
		if program.dir, program.err = os.MkdirTemp("", "holdfast-livetest-"); program.err == nil {
			program.err = build(filepath.Join(program.dir, "holdfast"))
		}
	})
	if program.err != nil {
		t.Fatal(program.err)
	}
	return filepath.Join(program.dir, "holdfast")
}

// build builds the program as the test was built, so that the compiler's work is shared.
func build(to string, flags ...string) error {
	args := append([]string{"build", "-o", to}, flags...)
	if race {
		args = append(args, "-race")
	}
	cmd := exec.Command("go", append(args, "github.com/holdfast-backup/holdfast/cmd/holdfast")...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w: %s", err, out)
	}
	return nil
}

const password = "a good password"

// cloud is an instance with a server under load, a repository, and a state directory of its own.
type cloud struct {
	*freezetest.Base
	t       *testing.T
	program string
	dir     string // of the instance
	tmp     string
	state   string
	bin     string // the server
	env     []string
}

// newCloud makes an instance in dir, which is missing or empty; "" is a temporary directory.
func newCloud(t *testing.T, dir string) *cloud {
	t.Helper()
	return newCloudOf(t, dir, ocis.PrefixOpenCloud)
}

// newCloudOf makes one with the names of attributes of another product.
func newCloudOf(t *testing.T, dir, prefix string) *cloud {
	t.Helper()
	tmp, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if dir == "" {
		dir = filepath.Join(tmp, "inst")
	}
	if _, err := storegen.Generate(t.Context(), storegen.Options{Dir: dir, Seed: 7, Files: 60, Bytes: 1 << 20, Spaces: 3, Prefix: prefix}); err != nil {
		t.Fatal(err)
	}
	return newCloudAt(t, dir, tmp)
}

// newCloudPosix takes the sample instance of the driver posix.
func newCloudPosix(t *testing.T) *cloud {
	t.Helper()
	tmp, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return newCloudAt(t, testfixture.UnpackInto(t, testfixture.OpenCloudPosix, tmp), tmp)
}

// newCloudAt takes the instance in dir.
func newCloudAt(t *testing.T, dir, tmp string) *cloud {
	t.Helper()
	notes := filepath.Join(tmp, "notes")
	if err := os.Mkdir(notes, 0o755); err != nil {
		t.Fatal(err)
	}
	c := &cloud{Base: freezetest.NewLoad(t, dir, notes), t: t, program: holdfast(t), dir: dir, tmp: tmp,
		state: filepath.Join(tmp, "state"), bin: freezetest.Binary(t)}
	// A password that is quick to try, unlike that of init.
	if _, err := repo.Init(t.Context(), local.New(filepath.Join(tmp, "repo")), password, repo.InitOptions{KDF: repo.KDF{N: 1024, R: 1, P: 1}}); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(tmp, "empty.yaml")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c.env = append(slices.DeleteFunc(os.Environ(), func(kv string) bool {
		return strings.HasPrefix(kv, "HOLDFAST_") || strings.HasPrefix(kv, "RESTIC_")
	}), "HOLDFAST_CONFIG_FILE="+empty, "HOLDFAST_STATE_DIR="+c.state, "HOLDFAST_CACHE_DIR="+filepath.Join(tmp, "cache"),
		"HOLDFAST_REPOSITORY="+filepath.Join(tmp, "repo"), "HOLDFAST_PASSWORD="+password,
		"HOLDFAST_HOST=test", "VIEWS="+filepath.Join(tmp, "views"), "HOLDFAST_START_RETRIES=5")
	t.Cleanup(c.end)
	return c
}

// end ends the servers that are left. One that a guard watches over would come back.
func (c *cloud) end() {
	if c.t.Failed() {
		log, _ := os.ReadFile(filepath.Join(c.tmp, "log"))
		c.t.Logf("the server did %q and said: %s", c.Events(), log)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		left := 0
		dirs, _ := os.ReadDir("/proc")
		for _, d := range dirs {
			pid, err := strconv.Atoi(d.Name())
			if err != nil {
				continue
			}
			exe, _ := os.Readlink(filepath.Join("/proc", d.Name(), "exe"))
			env, _ := os.ReadFile(filepath.Join("/proc", d.Name(), "environ"))
			switch {
			case exe == c.bin && bytes.Contains(env, []byte("OCIS_BASE_DATA_PATH="+c.Dir+"\x00")):
				_ = syscall.Kill(pid, syscall.SIGKILL)
				left++
			case exe == c.program && opens(pid, c.state):
				left++
			}
		}
		if left == 0 {
			return
		}
		if time.Now().After(deadline) {
			c.t.Errorf("%d servers and guards are left", left)
			return
		}
	}
}

// opens tells whether the process has a file below dir open.
func opens(pid int, dir string) bool {
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	return slices.ContainsFunc(fds, func(fd string) bool {
		to, _ := os.Readlink(fd)
		return strings.HasPrefix(to, dir+"/")
	})
}

// startProcess starts the server as a process of its own.
func (c *cloud) startProcess() {
	c.t.Helper()
	cmd := exec.Command(c.bin, "server")
	cmd.Env = append(c.Env(), "PATH="+os.Getenv("PATH"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	log, err := os.OpenFile(filepath.Join(c.tmp, "log"), os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		c.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	n := c.Count("started")
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	go func() { _ = cmd.Wait() }()
	c.AwaitStarts(n + 1)
}

// run is a program that runs.
type run struct {
	t        *testing.T
	cmd      *exec.Cmd
	out, err bytes.Buffer
	line     string
}

// start starts holdfast with a command line whose words are separated by blanks, and further arguments.
func (c *cloud) start(line string, args ...string) *run {
	c.t.Helper()
	return c.startIn(nil, line, args...)
}

// startIn puts other words before the program.
func (c *cloud) startIn(before []string, line string, args ...string) *run {
	c.t.Helper()
	all := slices.Concat(before, []string{c.program}, strings.Fields(line), args)
	r := &run{t: c.t, cmd: exec.Command(all[0], all[1:]...), line: line}
	r.cmd.Env, r.cmd.Dir = c.env, c.tmp
	r.cmd.Stdout, r.cmd.Stderr = &r.out, &r.err
	r.cmd.WaitDelay = time.Minute // servers may keep the output open
	if err := r.cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = r.cmd.Process.Kill() })
	return r
}

// wait waits for its end, and fails the test if the exit code is another one; -1 is for a signal.
func (r *run) wait(code int) *run {
	r.t.Helper()
	_ = r.cmd.Wait()
	if got := r.cmd.ProcessState.ExitCode(); got != code {
		r.t.Fatalf("holdfast %s: exit code %d, want %d\n%s%s", r.line, got, code, &r.out, &r.err)
	}
	return r
}

// says fails the test unless the text is in what it printed.
func (r *run) says(text string) *run {
	r.t.Helper()
	if !strings.Contains(r.out.String()+r.err.String(), text) {
		r.t.Errorf("holdfast %s does not say %q:\n%s%s", r.line, text, &r.out, &r.err)
	}
	return r
}

// must runs holdfast, which must succeed.
func (c *cloud) must(line string, args ...string) *run {
	c.t.Helper()
	return c.start(line, args...).wait(0)
}

// backup is the command line of a backup.
func (c *cloud) backup(flags string) string {
	return "backup --json --base-data-path " + c.Dir + " --config-dir " + filepath.Join(c.dir, "config") + " " + flags
}

// summary is what the tests look at in the last object that a backup prints.
type summary struct {
	Snapshot string
	Freeze   struct {
		Method                                                        string
		SecondsStopped, SecondsStopping, SecondsHeld, SecondsStarting float64
	}
	Views []struct{ Kind string }
	Proof struct{ Complete bool }
}

func (r *run) summary() summary {
	r.t.Helper()
	text := strings.TrimSpace(r.out.String())
	var s summary
	if err := json.Unmarshal([]byte(text[strings.LastIndexByte(text, '\n')+1:]), &s); err != nil {
		r.t.Fatalf("%v: %s", err, text)
	}
	return s
}

// wantComplete fails the test unless the snapshot is complete and was read as told.
func (r *run) wantComplete(method, view string) summary {
	r.t.Helper()
	s := r.summary()
	if !s.Proof.Complete || s.Freeze.Method != method || len(s.Views) == 0 || s.Views[0].Kind != view {
		r.t.Errorf("want a complete backup by %s with views %s, got %+v", method, view, s)
	}
	return s
}

// restored restores a snapshot and returns the base data path.
func (c *cloud) restored(snapshot string) string {
	c.t.Helper()
	to, err := os.MkdirTemp(c.tmp, "restored-")
	if err != nil {
		c.t.Fatal(err)
	}
	base := filepath.Join(to, "data")
	c.must("restore --base-data-path "+base+" --config-dir "+filepath.Join(to, "config"), snapshot)
	return base
}

// wantNothingLeft fails the test if there is a record of a freeze, or a view.
func (c *cloud) wantNothingLeft() {
	c.t.Helper()
	freezetest.AwaitThawed(c.t, c.state)
	var r *run
	freezetest.Eventually(c.t, "views can be listed", func() bool { // not while the zfs of another test comes or goes
		r = c.start("views --json")
		_ = r.cmd.Wait()
		return r.cmd.ProcessState.ExitCode() == 0
	})
	for line := range strings.Lines(r.out.String()) {
		if strings.Contains(line, `"`+c.dir) {
			c.t.Errorf("a view is left: %s", line)
		}
	}
}
