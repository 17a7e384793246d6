package freeze

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// startAs starts the server as another user, with a umask, limits, groups, arguments and output of
// its own, by way of a shell.
func (i *instance) startAs(uid int, exe string) int {
	i.t.Helper()
	if err := filepath.Walk(i.dir, func(p string, _ os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(p, uid, uid)
	}); err != nil {
		i.t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", "umask 027; ulimit -n 777; ulimit -c 0; exec '"+exe+"' --flag 'a b \xe4' '' server >>out.log 2>&1")
	cmd.Env = append(i.env(), "FT_SECRET=s3cret", "EMPTY=", "LATIN=\xe4\xff\n\"", "GORACE=atexit_sleep_ms=0")
	cmd.Dir = i.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true,
		Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid), Groups: []uint32{uint32(uid), 12345}}}
	if err := cmd.Start(); err != nil {
		i.t.Fatal(err)
	}
	go func() { _ = cmd.Wait() }()
	i.waitRunning(cmd.Process.Pid)
	return cmd.Process.Pid
}

// portrait is all of a process that a new start must keep.
func portrait(t *testing.T, pid int) string {
	t.Helper()
	var b strings.Builder
	for _, f := range []string{"cmdline", "environ", "oom_score_adj", "limits"} {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, f))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s: %q\n", f, data)
	}
	for _, f := range []string{"exe", "cwd", "fd/0", "fd/1", "fd/2"} {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/%s", pid, f))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s: %s\n", f, link)
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		switch key, _, _ := strings.Cut(line, ":"); key {
		case "Uid", "Gid", "Groups", "Umask", "CapEff", "CapPrm", "NoNewPrivs":
			b.WriteString(line)
		case "SigIgn":
			// Tests that run under nohup hand an ignored SIGHUP (bit 0) on; a Go program cannot pass it
			// to a process that it starts, and a server minds neither.
			v, err := strconv.ParseUint(strings.TrimSpace(line[len("SigIgn:"):]), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&b, "SigIgn: %x\n", v&^1)
		}
	}
	sid, err := unix.Getsid(pid)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(&b, "session leader: %v\n", sid == pid)
	return b.String()
}

// openTo copies the test binary to where another user can run it.
func openTo(t *testing.T, dir string) string {
	t.Helper()
	for d := dir; d != "/" && d != os.TempDir(); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(dir, "ocis")
	if err := os.WriteFile(exe, self, 0o755); err != nil {
		t.Fatal(err)
	}
	return exe
}

func TestProcess(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Fatal("this test must run as root")
	}
	for _, uid := range []int{0, 65534} {
		t.Run(strconv.Itoa(uid), func(t *testing.T) {
			t.Parallel()
			i := newInstance(t)
			i.exe = openTo(t, i.dir)
			old := i.startAs(uid, i.exe)
			before := portrait(t, old)
			o := i.guardOptions()
			rec, err := Guarded(background(), NewProcess(ProcessOptions{}), i.inst, o, func(context.Context) error {
				if i.runs() {
					t.Error("it runs")
				}
				st := i.status()
				data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", st.Guard))
				env, err2 := os.ReadFile(fmt.Sprintf("/proc/%d/environ", st.Guard))
				if err != nil || err2 != nil || strings.Contains(string(data)+string(env), "s3cret") {
					t.Errorf("the guard shows the environment: %v %v", err, err2)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			i.wantRunningAgain(old)
			i.wantNoRecord()
			if after := portrait(t, i.pid()); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
			if rec.Method != "process" || rec.Ready.IsZero() {
				t.Errorf("record %+v", rec)
			}
			out, err := os.ReadFile(filepath.Join(i.dir, "out.log"))
			if err != nil || strings.Count(string(out), "serving\n") != 2 {
				t.Errorf("output %q %v", out, err)
			}
			logs, _ := filepath.Glob(filepath.Join(o.StateDir, "freeze/*.log"))
			for _, l := range logs {
				if data, err := os.ReadFile(l); err != nil || strings.Contains(string(data), "s3cret") {
					t.Errorf("%s: %q %v", l, data, err)
				}
			}
		})
	}
}

func TestProcessDies(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	old := i.start()
	b := i.backup(func(s *backupSpec) {
		s.Command = nil
		s.Process = &ProcessOptions{PID: old}
	})
	b.expect("frozen")
	b.signal(unix.SIGKILL)
	i.wantRunningAgain(old)
	i.wantNoRecord()
	// Nobody reads the output of the old one: it goes to the log.
	logs, err := filepath.Glob(filepath.Join(i.dir, "state/freeze/*.log"))
	if err != nil || len(logs) != 1 {
		t.Fatal(logs, err)
	}
}

func TestProcessRecovered(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	old := i.start()
	killBoth(t, i, i.backup(func(s *backupSpec) {
		s.Command = nil
		s.Process = &ProcessOptions{}
	}))
	if _, err := Recover(background(), filepath.Join(i.dir, "state")); err != nil {
		t.Fatal(err)
	}
	i.wantRunningAgain(old)
	i.wantNoRecord()
}

// A server that ignores SIGTERM is reported and left running.
func TestProcessIgnores(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	i.mode = "ignore"
	old := i.start()
	o := i.guardOptions()
	quick := testTuning
	quick.Linger = 200 * time.Millisecond
	o.tuning = &quick
	_, err := Guarded(background(), NewProcess(ProcessOptions{StopTimeout: 300 * time.Millisecond}), i.inst, o, func(context.Context) error {
		t.Error("it was frozen")
		return nil
	})
	var busy *BusyError
	if !errors.As(err, &busy) || busy.Holders[0].PID != old || !strings.Contains(err.Error(), "left running") {
		t.Errorf("got %v", err)
	}
	if !isOurs(old) || i.pid() != old || len(startedPIDs(i.starts)) != 1 {
		t.Error("the server was touched")
	}
	eventually(t, "the guard has ended", func() bool { return len(i.guards()) == 0 })
	i.wantNoRecord()
}

// A server that ends after the timeout is started again.
func TestProcessStopsTooLate(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	i.mode = "slow:1s"
	old := i.start()
	_, err := Guarded(background(), NewProcess(ProcessOptions{StopTimeout: 300 * time.Millisecond}), i.inst, i.guardOptions(), func(context.Context) error { return nil })
	if !errors.Is(err, ErrRunning) {
		t.Errorf("got %v", err)
	}
	i.wantRunningAgain(old)
	i.wantNoRecord()
	eventually(t, "the guard has ended", func() bool { return len(i.guards()) == 0 })
}

func TestProcessStartRetries(t *testing.T) {
	t.Parallel()
	i := newInstance(t)
	failing := filepath.Join(i.dir, "failing")
	i.extra = "FT_FAILFILE=" + failing
	old := i.start()
	if err := os.WriteFile(failing, []byte("2"), 0o600); err != nil {
		t.Fatal(err)
	}
	var ev events
	o := i.guardOptions()
	o.Progress = ev.sink
	_, err := Guarded(background(), NewProcess(ProcessOptions{StartBackoff: 10 * time.Millisecond}), i.inst, o, func(context.Context) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	i.wantRunningAgain(old)
	if n := len(startedPIDs(i.starts)); n != 4 {
		t.Errorf("%d starts", n)
	}
	if !ev.has("warning", "ended at once: exit status 1") {
		t.Errorf("the failed starts were not reported: %v", ev.list)
	}
}

func TestProcessRefused(t *testing.T) {
	t.Parallel()
	t.Run("none runs", func(t *testing.T) {
		i := newInstance(t)
		_, err := NewProcess(ProcessOptions{}).Freeze(background(), i.inst)
		if err == nil || !strings.Contains(err.Error(), "--freeze none") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("gone", func(t *testing.T) {
		i := newInstance(t)
		if _, err := NewProcess(ProcessOptions{PID: 1 << 30}).Freeze(background(), i.inst); err == nil {
			t.Error("no error")
		}
	})
	t.Run("not a server", func(t *testing.T) {
		i := newInstance(t)
		file := filepath.Join(i.base, "x")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		_, out := helperProcess(t, nil, nil, "hold", "write", file)
		readLine(t, out)
		_, err := NewProcess(ProcessOptions{}).Freeze(background(), i.inst)
		if !errors.Is(err, ErrRunning) || !strings.Contains(err.Error(), "--pid") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("in a container", func(t *testing.T) {
		i := newInstance(t)
		file := filepath.Join(i.base, "x")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		cmd, out := helperProcess(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}, nil, "hold", "write", file)
		readLine(t, out)
		_, err := NewProcess(ProcessOptions{PID: cmd.Process.Pid}).Freeze(background(), i.inst)
		if err == nil || !strings.Contains(err.Error(), "container") {
			t.Errorf("got %v", err)
		}
	})
}

func TestText(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"", "plain", "ä\"\n\x00", "\xff\xfe latin \xe4", "{"} {
		data, err := json.Marshal(Texts{s})
		if err != nil {
			t.Fatal(err)
		}
		var back Texts
		if err := json.Unmarshal(data, &back); err != nil || len(back) != 1 || back[0] != s {
			t.Errorf("%q became %q by %s: %v", s, back, data, err)
		}
	}
}

func TestParseLimits(t *testing.T) {
	t.Parallel()
	got := parseLimits([]byte("Limit                     Soft Limit           Hard Limit           Units     \n" +
		"Max cpu time              unlimited            unlimited            seconds   \n" +
		"Max nice priority         0                    7                    \nrubbish\n"))
	want := []unix.Rlimit{{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}, {Cur: 0, Max: 7}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v", got)
	}
}
