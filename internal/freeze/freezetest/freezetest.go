// Package freezetest is what the tests of the ways to freeze have in common: a server that behaves
// as the product does, a Docker engine, a message bus with a stand-in for systemd on it, and whole
// freezes that are killed. Tests fail where a program they need is missing.
package freezetest

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/freeze/freezetest/load"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
)

// roleVariable makes a test binary play the backup that is killed.
const roleVariable = "FREEZETEST_BACKUP"

// Main is TestMain: register makes the kinds of recipe known, planner makes the freezer of a
// Session from its argument. cleanup, if not nil, comes after the tests.
func Main(m *testing.M, register func(), planner func(arg string) (freeze.Planner, error), cleanup func() error) {
	// The race detector makes each process wait for a second at its end; helpers need not.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		panic(err)
	}
	register()
	freeze.MaybeGuard()
	if text := os.Getenv(roleVariable); text != "" {
		backup(text, planner)
	}
	code := m.Run()
	if cleanup != nil {
		if err := cleanup(); err != nil {
			fmt.Fprintln(os.Stderr, "after the tests:", err)
			code = 1
		}
	}
	if err := os.RemoveAll(build.dir); err != nil {
		fmt.Fprintln(os.Stderr, "after the tests:", err)
		code = 1
	}
	os.Exit(code)
}

var build struct {
	once sync.Once
	dir  string
	err  error
}

// Binary builds the server, once in each test program, and returns its path.
func Binary(t testing.TB) string {
	t.Helper()
	build.once.Do(func() {
		if build.dir, build.err = os.MkdirTemp("", "holdfast-freezetest-"); build.err != nil {
			return
		}
		cmd := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(build.dir, "ocis"),
			"github.com/holdfast-backup/holdfast/internal/freeze/freezetest/cmd/ocis")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			build.err = fmt.Errorf("go build: %w: %s", err, out)
		}
	})
	if build.err != nil {
		t.Fatal(build.err)
	}
	return filepath.Join(build.dir, "ocis")
}

// Base is the data directory of a server of the test.
type Base struct {
	t    testing.TB
	Dir  string
	Inst *ocis.Instance
	// Notes is where the server writes what is no data; Dir if it does not work under load.
	Notes string
	begin map[string]string // of the tree
}

// NewBase makes a data directory.
func NewBase(t testing.TB) *Base {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err == nil {
		err = os.MkdirAll(filepath.Join(dir, "base", "idm"), 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return newBase(t, filepath.Join(dir, "base"), "")
}

func newBase(t testing.TB, dir, notes string) *Base {
	return &Base{t: t, Dir: dir, Notes: cmp.Or(notes, dir), Inst: &ocis.Instance{Product: ocis.OCIS, BasePath: dir}}
}

// NewLoad takes dir/data, of an instance that package storegen made in dir, for that of a server under
// load. notes is a directory elsewhere.
func NewLoad(t testing.TB, dir, notes string) *Base {
	t.Helper()
	b := newBase(t, filepath.Join(dir, "data"), notes)
	var err error
	if b.begin, err = load.Tree(b.Dir); err != nil {
		t.Fatal(err)
	}
	return b
}

// Env is the environment of its server.
func (b *Base) Env() []string {
	env := []string{"OCIS_BASE_DATA_PATH=" + b.Dir}
	if b.Notes != b.Dir {
		env = append(env, "OCIS_TEST_NOTES="+b.Notes, "OCIS_TEST_PAUSE=25ms")
	}
	return env
}

// Note writes one of the files by which a server is told how to behave; "" removes it.
func (b *Base) Note(name, text string) {
	b.t.Helper()
	file := filepath.Join(b.Notes, name)
	err := os.WriteFile(file+".new", []byte(text), 0o644)
	if err == nil {
		err = os.Rename(file+".new", file)
	}
	if text == "" {
		err = os.Remove(file)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// AwaitChanges waits until a server under load has made n changes since its last start.
func (b *Base) AwaitChanges(n int) {
	b.t.Helper()
	Eventually(b.t, fmt.Sprintf("the server has made %d changes", n), func() bool {
		list, err := load.Read(filepath.Join(b.Notes, "journal"))
		if err != nil {
			return false
		}
		made := 0
		for _, e := range list {
			if made++; e.Mark != "" {
				made = 0
			}
		}
		return made >= n
	})
}

// WantAcknowledged fails the test unless dir is just what a server under load had acknowledged until
// its nth stop, and it had work before and after that.
func (b *Base) WantAcknowledged(nth int, dir string) {
	b.t.Helper()
	list, err := load.Read(filepath.Join(b.Notes, "journal"))
	if err != nil {
		b.t.Fatal(err)
	}
	want, before, after, err := load.At(b.begin, list, nth)
	if err != nil {
		b.t.Fatal(err)
	}
	if before == 0 || after == 0 {
		b.t.Errorf("there were %d changes before stop %d and %d after it: that proves nothing", before, nth, after)
	}
	b.wantTree(fmt.Sprintf("what was acknowledged (%d changes before stop %d, %d after it)", before, nth, after), want, dir)
}

// WantBegin fails the test unless dir is what the data directory was when nothing had started yet.
func (b *Base) WantBegin(dir string) {
	b.t.Helper()
	b.wantTree("the beginning", b.begin, dir)
}

func (b *Base) wantTree(what string, want map[string]string, dir string) {
	b.t.Helper()
	got, err := load.Tree(dir)
	if err != nil {
		b.t.Fatal(err)
	}
	if d := load.Diff(want, got); d != "" {
		b.t.Errorf("it is not %s:\n%s", what, d)
	}
}

// FailStarts makes the next n starts of the server fail.
func (b *Base) FailStarts(n int) {
	b.t.Helper()
	b.Note("fail", strconv.Itoa(n))
}

// Events lists what the servers recorded: "started", "stopped", "failed", "locked out".
func (b *Base) Events() []string {
	data, _ := os.ReadFile(filepath.Join(b.Notes, "events"))
	return strings.Fields(string(data))
}

// WantEvents fails the test if the servers did anything else.
func (b *Base) WantEvents(want ...string) {
	b.t.Helper()
	if got := b.Events(); strings.Join(got, " ") != strings.Join(want, " ") {
		b.t.Errorf("the server did %q, want %q", got, want)
	}
}

// Count tells how often the servers recorded word.
func (b *Base) Count(word string) int {
	n := 0
	for _, e := range b.Events() {
		if e == word {
			n++
		}
	}
	return n
}

// Runs tells whether a server holds the lock.
func (b *Base) Runs() bool {
	f, err := os.Open(filepath.Join(b.Dir, "idm", "idm.boltdb"))
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB), syscall.EWOULDBLOCK)
}

// AwaitStarts waits until a server has started for the nth time.
func (b *Base) AwaitStarts(n int) {
	b.t.Helper()
	Eventually(b.t, fmt.Sprintf("the server has started %d times", n), func() bool { return b.Count("started") >= n && b.Runs() })
}

// WantQuiet fails the test if anything below the directory changes, or a process is at it.
func (b *Base) WantQuiet() {
	b.t.Helper()
	size := func() int64 {
		st, err := os.Stat(filepath.Join(b.Dir, "data"))
		if err != nil {
			return -1
		}
		return st.Size()
	}
	before := size()
	time.Sleep(50 * time.Millisecond)
	if after := size(); before != after {
		b.t.Errorf("the data grew from %d to %d bytes while frozen", before, after)
	}
	list, err := freeze.Holders(context.Background(), []string{b.Dir})
	if err != nil {
		b.t.Error(err)
	}
	for _, h := range list {
		if h.Writing { // the guard holds the directory itself
			b.t.Errorf("while frozen: %+v", h)
		}
	}
}

// Eventually polls until ok; the deadline is for machines under load.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited in vain until %s", what)
}

// Events collects what is reported.
type Events struct {
	mu   sync.Mutex
	list []progress.Event
}

// Sink takes events.
func (e *Events) Sink(ev progress.Event) {
	e.mu.Lock()
	e.list = append(e.list, ev)
	e.mu.Unlock()
}

// Has tells whether a message of that kind holds text.
func (e *Events) Has(kind progress.Kind, text string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, ev := range e.list {
		if ev.Kind == kind && strings.Contains(ev.Message, text) {
			return true
		}
	}
	return false
}

// Session is a backup in a process of its own.
type Session struct {
	t   testing.TB
	cmd *exec.Cmd
	out *bufio.Reader
}

type sessionConfig struct{ Argument, Base, State string }

// StartSession starts a backup that freezes base and then hangs about.
func StartSession(t testing.TB, b *Base, stateDir, argument string) *Session {
	t.Helper()
	text, err := json.Marshal(sessionConfig{argument, b.Dir, stateDir})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleVariable+"="+string(text))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return &Session{t: t, cmd: cmd, out: bufio.NewReader(out)}
}

// AwaitFrozen waits until the instance is frozen.
func (s *Session) AwaitFrozen() {
	s.t.Helper()
	line, err := s.out.ReadString('\n')
	if err != nil || line != "frozen\n" {
		s.t.Fatalf("the backup said %q, %v", line, err)
	}
}

// Pause makes the backup hang.
func (s *Session) Pause() {
	s.t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		s.t.Fatal(err)
	}
}

// Kill ends the backup by SIGKILL.
func (s *Session) Kill() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

func backup(text string, planner func(string) (freeze.Planner, error)) {
	var c sessionConfig
	err := json.Unmarshal([]byte(text), &c)
	// The guard must not play this role.
	_ = os.Unsetenv(roleVariable)
	var p freeze.Planner
	if err == nil {
		p, err = planner(c.Argument)
	}
	if err == nil {
		_, err = freeze.Guarded(context.Background(), p, &ocis.Instance{BasePath: c.Base}, freeze.Options{StateDir: c.State},
			func(context.Context) error {
				fmt.Println("frozen")
				select {}
			})
	}
	fmt.Fprintln(os.Stderr, "backup:", err)
	os.Exit(1)
}

// AwaitThawed waits until no freeze is on record.
func AwaitThawed(t testing.TB, stateDir string) {
	t.Helper()
	Eventually(t, "no freeze is on record", func() bool {
		list, err := freeze.ReadStatus(stateDir)
		return err == nil && len(list) == 0
	})
}

// KillGuard ends the guard of the one freeze on record by SIGKILL.
func KillGuard(t testing.TB, stateDir string) {
	t.Helper()
	list, err := freeze.ReadStatus(stateDir)
	if err != nil || len(list) != 1 {
		t.Fatalf("on record: %+v, %v", list, err)
	}
	if err := syscall.Kill(list[0].Guard, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	Eventually(t, "the guard is dead", func() bool {
		list, err := freeze.ReadStatus(stateDir)
		return err == nil && len(list) == 1 && !list[0].GuardAlive
	})
}

// daemon is a program that runs beside the tests and ends with this process, however it ends.
type daemon struct {
	cmd  *exec.Cmd
	done chan struct{}
}

func startDaemon(cmd *exec.Cmd) (*daemon, error) {
	d := &daemon{cmd: cmd, done: make(chan struct{})}
	// SIGTERM, so that a daemon can clean up behind itself.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGTERM}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // the parent in Pdeathsig is a thread
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
			close(d.done)
		}
	}()
	return d, <-started
}

// stop ends it by SIGTERM, and by SIGKILL if it must.
func (d *daemon) stop() error {
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.done:
		return nil
	case <-time.After(20 * time.Second):
		_ = d.cmd.Process.Kill()
		<-d.done
		return fmt.Errorf("%s did not end on SIGTERM", d.cmd.Path)
	}
}
