package freeze

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/freeze/freezetest/boltlock"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
)

// The test binary plays the other parts as well: the server, the guard, processes in containers,
// and whole backups that are killed.
func TestMain(m *testing.M) {
	// The race detector makes each process wait for a second at its end; those below need not.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		panic(err)
	}
	MaybeGuard()
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "server", "--flag":
			serverMain()
		case "hold":
			holdMain()
		case "look":
			lookMain()
		case "backup":
			backupMain()
		}
	}
	os.Exit(m.Run())
}

// serverMain behaves like the product: it locks the boltdb, appends to its files while it runs, and
// ends on SIGTERM. FT_MODE: "ignore" ignores SIGTERM, "slow:DURATION" takes its time.
func serverMain() {
	base := os.Getenv("FT_BASE")
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, "server:", err)
		os.Exit(1)
	}
	sig := make(chan os.Signal, 4)
	signal.Notify(sig, syscall.SIGTERM)
	starts, err := os.OpenFile(os.Getenv("FT_STARTS"), os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		fail(err)
	}
	fmt.Fprintln(starts, os.Getpid())
	starts.Close()
	if n, err := strconv.Atoi(os.Getenv("FT_FAIL")); err == nil && n > 0 {
		if len(startedPIDs(os.Getenv("FT_STARTS"))) <= n {
			fail(errors.New("failing as told"))
		}
	}
	if f := os.Getenv("FT_FAILFILE"); f != "" {
		data, _ := os.ReadFile(f)
		if n, err := strconv.Atoi(string(data)); err == nil && n > 0 {
			if err := os.WriteFile(f, []byte(strconv.Itoa(n-1)), 0o600); err != nil {
				fail(err)
			}
			fail(errors.New("failing as told"))
		}
	}
	db, err := os.OpenFile(filepath.Join(base, "idm", "idm.boltdb"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		fail(err)
	}
	if err := boltlock.Take(db); err != nil {
		fail(err)
	}
	data, err := os.OpenFile(filepath.Join(base, "data"), os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		fail(err)
	}
	if err := os.WriteFile(os.Getenv("FT_PIDFILE"), []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
		fail(err)
	}
	fmt.Println("serving")
	mode, arg, _ := strings.Cut(os.Getenv("FT_MODE"), ":")
	var end <-chan time.Time
	tick := time.NewTicker(5 * time.Millisecond)
	for {
		select {
		case <-tick.C:
			fmt.Fprintln(data, os.Getpid(), time.Now().UnixNano())
		case <-sig:
			switch mode {
			case "ignore":
			case "slow":
				d, err := time.ParseDuration(arg)
				if err != nil {
					fail(err)
				}
				end = time.After(d)
			default:
				os.Exit(0)
			}
		case <-end:
			os.Exit(0)
		}
	}
}

func startedPIDs(file string) []int {
	data, _ := os.ReadFile(file)
	var list []int
	for _, f := range strings.Fields(string(data)) {
		if n, err := strconv.Atoi(f); err == nil {
			list = append(list, n)
		}
	}
	return list
}

// instance is a server of the test with its data directory.
type instance struct {
	t       *testing.T
	dir     string // holds base and all that lies beside it
	base    string
	starts  string
	pidfile string
	mode    string
	fail    string
	extra   string // one more variable
	exe     string // a copy of the test binary, or ""
	inst    *ocis.Instance
}

func newInstance(t *testing.T) *instance {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	i := &instance{t: t, dir: dir, base: filepath.Join(dir, "base"),
		starts: filepath.Join(dir, "starts"), pidfile: filepath.Join(dir, "pid")}
	for _, d := range []string{"idm", "storage/users"} {
		if err := os.MkdirAll(filepath.Join(i.base, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	i.inst = &ocis.Instance{BasePath: i.base}
	t.Cleanup(func() {
		// A guard that starts a server must not see it die, or it starts another one. One that only
		// watches over a server would take its time.
		for deadline := time.Now().Add(3 * time.Second); len(i.guards()) > 0 && time.Now().Before(deadline); {
			time.Sleep(5 * time.Millisecond)
		}
		eventually(t, "no server is left", func() bool {
			quiet := len(i.guards()) == 0
			for _, pid := range startedPIDs(i.starts) {
				if isOurs(pid) || i.isCopy(pid) {
					quiet = false
					_ = unix.Kill(pid, unix.SIGKILL)
				}
			}
			return quiet
		})
	})
	return i
}

// isCopy tells whether pid runs the copy of the test binary.
func (i *instance) isCopy(pid int) bool {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return err == nil && i.exe != "" && exe == i.exe
}

// isOurs tells whether pid is a living process of this test binary.
func isOurs(pid int) bool {
	st, err := readStat(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil || st.state == 'Z' || st.state == 'X' {
		return false
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	self, _ := os.Executable()
	return err == nil && exe == self
}

// guards lists the living guards of the instance, whoever started them.
func (i *instance) guards() []int {
	entries, _ := os.ReadDir("/proc")
	var list []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || !isOurs(pid) {
			continue
		}
		args, _ := readList(fmt.Sprintf("/proc/%d/cmdline", pid))
		if len(args) != 2 || args[1] != guardArgument && args[1] != startArgument {
			continue
		}
		fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		for _, fd := range fds {
			link, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd.Name()))
			if strings.HasPrefix(link, i.dir+"/") {
				list = append(list, pid)
				break
			}
		}
	}
	return list
}

func (i *instance) env() []string {
	return []string{"FT_BASE=" + i.base, "FT_STARTS=" + i.starts, "FT_PIDFILE=" + i.pidfile,
		"FT_MODE=" + i.mode, "FT_FAIL=" + i.fail, cmp.Or(i.extra, "FT_EXTRA=")}
}

func (i *instance) startCommand() string {
	return strings.Join(i.env(), " ") + " '" + os.Args[0] + "' server >/dev/null 2>&1 &"
}

// foregroundUntilUp is a start command that fails when the server does.
func (i *instance) startChecked() string {
	return "n=$(wc -l <'" + i.starts + "'); " + i.startCommand() + " p=$!; " +
		"while kill -0 $p 2>/dev/null; do [ \"$(cat '" + i.pidfile + "')\" = $p ] && exit 0; sleep 0.01; done; exit 7"
}

func (i *instance) stopCommand() string { return "kill -TERM $(cat '" + i.pidfile + "')" }

func (i *instance) options() CommandOptions {
	return CommandOptions{
		StopCommand:  i.stopCommand(),
		StartCommand: i.startCommand(),
		ReadyCommand: "[ $(cat '" + i.pidfile + "') != " + strconv.Itoa(i.pid()) + " ]",
		StopTimeout:  20 * time.Second,
		ReadyTimeout: 20 * time.Second,
		StartBackoff: 10 * time.Millisecond,
	}
}

// start starts the server and waits until it serves.
func (i *instance) start() int {
	i.t.Helper()
	cmd := exec.Command(os.Args[0], "server")
	cmd.Env = append(os.Environ(), i.env()...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Dir = i.dir
	if err := cmd.Start(); err != nil {
		i.t.Fatal(err)
	}
	go func() { _ = cmd.Wait() }()
	i.waitRunning(cmd.Process.Pid)
	return cmd.Process.Pid
}

func (i *instance) waitRunning(pid int) {
	i.t.Helper()
	eventually(i.t, "the server serves", func() bool { return i.pid() == pid })
}

func (i *instance) pid() int {
	data, _ := os.ReadFile(i.pidfile)
	n, _ := strconv.Atoi(string(data))
	return n
}

// runs tells whether a server holds the lock.
func (i *instance) runs() bool {
	busy, _, err := tryLock(filepath.Join(i.base, "idm", "idm.boltdb"))
	return err == nil && busy
}

func (i *instance) wantRunningAgain(old int) {
	i.t.Helper()
	eventually(i.t, "the instance runs again", func() bool { return i.pid() != old && i.runs() && (isOurs(i.pid()) || i.isCopy(i.pid())) })
}

// eventually polls until ok; the deadline is for machines under load.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited in vain until %s", what)
}

// events collects what is reported.
type events struct {
	mu   sync.Mutex
	list []progress.Event
}

func (e *events) sink(ev progress.Event) {
	e.mu.Lock()
	e.list = append(e.list, ev)
	e.mu.Unlock()
}

func (e *events) has(kind progress.Kind, text string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, ev := range e.list {
		if ev.Kind == kind && strings.Contains(ev.Message, text) {
			return true
		}
	}
	return false
}

// helperProcess starts the test binary in another role, with a pipe from its output.
func helperProcess(t *testing.T, attr *syscall.SysProcAttr, env []string, args ...string) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = attr
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd, bufio.NewReader(out)
}

func readLine(t *testing.T, r *bufio.Reader) string {
	t.Helper()
	line, err := r.ReadString('\n')
	if err != nil {
		t.Fatalf("the helper ended: %v", err)
	}
	return strings.TrimSuffix(line, "\n")
}

func background() context.Context { return context.Background() }
