package livetest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/freeze/freezetest"
)

// fault is a line of the matrix: what happens to a backup of a running instance on btrfs.
type fault struct {
	name string
	// before prepares what will go wrong. It may be nil, as may be all the others.
	before func(k *cloud)
	flags  []string
	// halt: "stop" or "start" halts Holdfast when the server has just stopped, or was just started
	// again. Then comes harm.
	halt string
	harm func(k *cloud, r *run)
	// code and says are how the backup ends; -1 is by a signal.
	code int
	says string
	// events are what the server did until then.
	events string
	// after mends what must not outlast the fault.
	after func(k *cloud)
	// next are flags of the next run, which makes views by command then.
	next []string
	// down: nobody is left who could start the instance, so the next run does.
	down bool
}

const killed = -1

var faults = []fault{
	{name: "Holdfast is killed while the instance is stopped",
		halt: "stop", harm: (*cloud).killHoldfast,
		code: killed, events: "started stopped started"},
	{name: "Holdfast is killed after the start, with a view",
		halt: "start", harm: func(k *cloud, r *run) { k.wantView(true); k.killHoldfast(r) },
		code: killed, events: "started stopped started"},
	{name: "Holdfast is killed while a view is made",
		flags: []string{"--view-create", makeView + "kill -KILL $PPID", "--view-destroy", destroyView},
		code:  killed, events: "started stopped started",
		after: func(k *cloud) { k.wantView(true) },
		next:  []string{"--view-create", makeView, "--view-destroy", destroyView}},
	{name: "the guard is killed",
		halt: "stop", harm: func(k *cloud, r *run) { k.killGuard(r); k.goOn(r) },
		code: 1, says: "given up so that the instance runs: the guard process died", events: "started stopped started"},
	{name: "the guard hangs",
		halt: "stop", harm: func(k *cloud, r *run) { k.signal(k.status().Guard, syscall.SIGSTOP); k.goOn(r) },
		code: 0, events: "started stopped started"},
	{name: "both are killed, and the next backup starts it",
		halt: "stop", harm: (*cloud).killBoth,
		code: killed, events: "started stopped", down: true},
	{name: "both are killed, and thaw starts it",
		halt: "stop", harm: (*cloud).killBoth,
		code: killed, events: "started stopped",
		after: func(k *cloud) { k.must("thaw").says("started the instance") }},
	{name: "the machine goes down, and comes up with other processes under the old numbers",
		halt: "stop", harm: (*cloud).killBoth,
		code: killed, events: "started stopped", after: (*cloud).reboot},
	{name: "Holdfast hangs until --max-downtime",
		flags: []string{"--max-downtime", "3s"},
		halt:  "stop", harm: func(k *cloud, r *run) { k.AwaitStarts(2); k.goOn(r) },
		code: 1, says: "the instance was down for 3s", events: "started stopped started"},
	{name: "the state directory is full",
		before: func(k *cloud) { k.smallState(); k.fillState() },
		code:   1, says: "nothing was stopped", events: "started",
		after: (*cloud).emptyState},
	{name: "the state directory gets full while the instance is stopped",
		before: (*cloud).smallState,
		halt:   "stop", harm: func(k *cloud, r *run) { k.fillState(); k.goOn(r) },
		code: 1, says: "no space left on device", events: "started stopped started",
		after: (*cloud).emptyState},
	{name: "it gets full, and Holdfast is killed",
		before: (*cloud).smallState,
		halt:   "stop", harm: func(k *cloud, r *run) { k.fillState(); k.killHoldfast(r) },
		code: killed, events: "started stopped started",
		after: (*cloud).emptyState},
	{name: "the snapshot command fails",
		flags: []string{"--view-create", "echo no room; exit 3", "--view-destroy", destroyView},
		code:  1, says: "no room", events: "started stopped started"},
	{name: "the filesystem makes no snapshot",
		before: func(k *cloud) { k.write(k.viewsDir(), "") },
		code:   1, says: ".holdfast-views", events: "started stopped started",
		after: func(k *cloud) { k.remove(k.viewsDir()) }},
	{name: "the stop times out",
		before: func(k *cloud) { k.Note("mode", "ignore") },
		flags:  []string{"--stop-timeout", "1s"},
		code:   1, says: "did not stop within 1s", events: "started",
		after: func(k *cloud) { k.Note("mode", "") }},
	{name: "the stop times out, and it stops later",
		before: func(k *cloud) { k.Note("mode", "slow:3s") },
		flags:  []string{"--stop-timeout", "2s"},
		code:   1, says: "did not stop within 2s", events: "started",
		after: func(k *cloud) { k.Note("mode", ""); k.AwaitStarts(2) }},
	{name: "the start fails at first",
		halt: "stop", harm: func(k *cloud, r *run) { k.FailStarts(2); k.goOn(r) },
		code: 0, events: "started stopped failed failed started"},
	{name: "the start fails for good",
		flags: []string{"--start-retries", "0"},
		halt:  "stop", harm: func(k *cloud, r *run) { k.FailStarts(1000); k.goOn(r) },
		code: 4, says: "could not be started again", events: "started stopped failed",
		after: func(k *cloud) { k.FailStarts(0) }, down: true},
}

const (
	makeView    = `mkdir -p "$VIEWS" && cp -a "$HOLDFAST_SOURCE" "$VIEWS/$HOLDFAST_VIEW_NAME" && echo "$VIEWS/$HOLDFAST_VIEW_NAME"; `
	destroyView = `rm -rf "$VIEWS/$HOLDFAST_VIEW_NAME"` // its path is not known if the making was cut short
)

// TestFaults: whatever goes wrong, the instance runs, the next backup works, no view and no record is
// left after it, and the last good snapshot restores as it was.
func TestFaults(t *testing.T) {
	t.Parallel()
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			k := newCloud(t, filepath.Join(mountBtrfs(t), "inst"))
			good := k.must(k.backup("--freeze none")).wantComplete("none", "none").Snapshot
			if f.before != nil {
				f.before(k)
			}
			k.startProcess()
			k.AwaitChanges(5)

			r := k.startHalted(f.halt, k.backup("--freeze process"), f.flags...)
			if f.harm != nil {
				k.awaitHalted(r)
				f.harm(k, r)
			}
			r.wait(f.code).says(f.says)
			n := len(strings.Fields(f.events))
			freezetest.Eventually(t, "the server did "+f.events, func() bool { return len(k.Events()) >= n })
			if got := strings.Join(k.Events()[:n], " "); got != f.events {
				t.Errorf("the server did %q, want %q", got, f.events)
			}
			if f.after != nil {
				f.after(k)
			}
			if f.down {
				if k.Runs() {
					t.Error("somebody started it")
				}
			} else {
				freezetest.Eventually(t, "the instance runs", k.Runs)
				freezetest.AwaitThawed(t, k.state)
			}

			stops := k.Count("stopped")
			kind := "btrfs"
			if f.next != nil {
				kind = "command"
			}
			k.must(k.backup("--freeze process"), f.next...).wantComplete("process", kind)
			freezetest.Eventually(t, "the instance runs", k.Runs)
			k.AwaitChanges(5)
			if f.down && k.Count("stopped") != stops+1 {
				t.Error("it was not started before it was stopped")
			}
			k.wantNothingLeft()
			k.wantView(false)
			k.WantAcknowledged(k.Count("stopped"), k.restored("latest"))
			if f.code == 0 {
				k.WantAcknowledged(1, k.restored("latest~1"))
			}
			k.WantBegin(k.restored(good))
		})
	}
}

// startHalted starts a backup that the server will halt.
func (c *cloud) startHalted(when, line string, args ...string) *run {
	c.t.Helper()
	if when == "" {
		return c.start(line, args...)
	}
	return c.startIn([]string{"sh", "-c", `echo $$ >"$0.new" && mv "$0.new" "$0" && exec "$@"`, filepath.Join(c.Notes, "halt-at-"+when)}, line, args...)
}

func (c *cloud) awaitHalted(r *run) {
	c.t.Helper()
	freezetest.Eventually(c.t, "the backup stands still", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", r.cmd.Process.Pid))
		_, rest, _ := strings.Cut(string(stat), ") ")
		return err == nil && strings.HasPrefix(rest, "T")
	})
}

func (c *cloud) killHoldfast(r *run) { c.signal(r.cmd.Process.Pid, syscall.SIGKILL) }

func (c *cloud) goOn(r *run) { c.signal(r.cmd.Process.Pid, syscall.SIGCONT) }

func (c *cloud) killGuard(*run) { freezetest.KillGuard(c.t, c.state) }

func (c *cloud) killBoth(r *run) {
	c.killGuard(r)
	c.killHoldfast(r)
}

func (c *cloud) signal(pid int, s syscall.Signal) {
	c.t.Helper()
	if err := syscall.Kill(pid, s); err != nil {
		c.t.Fatal(err)
	}
}

// status returns the one freeze that must be on record.
func (c *cloud) status() freeze.Status {
	c.t.Helper()
	list, err := freeze.ReadStatus(c.state)
	if err != nil || len(list) != 1 || list[0].Err != nil {
		c.t.Fatalf("on record: %+v, %v", list, err)
	}
	return list[0]
}

// editRecord changes the one freeze that must be on record.
func (c *cloud) editRecord(change func(record map[string]any)) {
	c.t.Helper()
	file := c.status().File
	data, err := os.ReadFile(file)
	if err != nil {
		c.t.Fatal(err)
	}
	var record map[string]any
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := d.Decode(&record); err != nil {
		c.t.Fatal(err)
	}
	change(record)
	if data, err = json.Marshal(record); err != nil {
		c.t.Fatal(err)
	}
	c.write(file, string(data))
}

func (c *cloud) write(file, text string) {
	c.t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cloud) remove(file string) {
	c.t.Helper()
	if err := os.Remove(file); err != nil {
		c.t.Fatal(err)
	}
}

// reboot is a restart of the machine, as far as a program can tell: the numbers in the record belong
// to a process that lives, but that is another one, because the machine has another boot id.
func (c *cloud) reboot() {
	c.t.Helper()
	stat, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		c.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	c.editRecord(func(record map[string]any) {
		for _, who := range []string{"owner", "guard"} {
			id := record[who].(map[string]any)
			id["pid"], id["start"] = os.Getpid(), json.Number(strings.Fields(rest)[19])
		}
	})
	c.must("thaw").says("left alone")
	if c.Runs() {
		c.t.Error("it was started")
	}
	boot := filepath.Join(c.tmp, "boot_id")
	c.write(boot, "another\n")
	c.startIn([]string{"unshare", "--mount", "sh", "-ec", `mount --bind "$0" /proc/sys/kernel/random/boot_id; exec "$@"`, boot}, "thaw").
		wait(0).says("started the instance")
	// A server in a mount namespace of its own is taken for one in a container.
	c.AwaitStarts(2)
	c.stopProcess()
	c.startProcess()
}

func (c *cloud) viewsDir() string { return filepath.Join(filepath.Dir(c.dir), ".holdfast-views") }

// wantView fails the test unless there are views of the instance on its filesystem, or none.
func (c *cloud) wantView(yes bool) {
	c.t.Helper()
	btrfs, _ := os.ReadDir(c.viewsDir())
	byCommand, _ := os.ReadDir(filepath.Join(c.tmp, "views"))
	if n := len(btrfs) + len(byCommand); (n > 0) != yes {
		c.t.Errorf("%d views", n)
	}
}

// smallState puts the state directory on a small filesystem.
func (c *cloud) smallState() {
	c.t.Helper()
	if err := unix.Mount("holdfast-test", c.state, "tmpfs", 0, "size=64k"); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		if err := unix.Unmount(c.state, unix.MNT_DETACH); err != nil {
			c.t.Error(err)
		}
	})
}

func (c *cloud) fillState() {
	c.t.Helper()
	f, err := os.Create(filepath.Join(c.state, "ballast"))
	if err != nil {
		c.t.Fatal(err)
	}
	defer f.Close()
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	if !errors.Is(err, unix.ENOSPC) {
		c.t.Fatal(err)
	}
}

func (c *cloud) emptyState() { c.remove(filepath.Join(c.state, "ballast")) }

// TestNeverTwo: whoever wants to freeze an instance that another Holdfast has frozen is turned away,
// whatever name the instance has and wherever the records are.
func TestNeverTwo(t *testing.T) {
	t.Parallel()
	k := newCloud(t, "")
	k.startProcess()
	link, bind := filepath.Join(k.tmp, "link"), filepath.Join(k.tmp, "bind")
	err := errors.Join(os.Symlink(k.dir, link), os.Mkdir(bind, 0o755), unix.Mount(k.dir, bind, "", unix.MS_BIND, ""))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(bind, 0); err != nil {
			t.Error(err)
		}
	})
	names := map[string]string{
		"same": k.Dir, "dots": k.dir + "/../inst//data/.", "link": link + "/data", "bind": bind + "/data",
	}
	command := func(base, state string) string {
		return "backup --freeze process --view none --base-data-path " + base + " --config-dir " + k.dir + "/config --state-dir " + state
	}
	k.must(k.backup("--freeze process --view none"))
	r := k.startHalted("stop", command(k.Dir, k.state))
	k.awaitHalted(r)
	all := func() (list []*run) {
		for name, base := range names {
			list = append(list, k.start(command(base, k.state)), k.start(command(base, filepath.Join(k.tmp, "state-"+name))))
		}
		return list
	}
	for _, r := range all() {
		r.wait(1).says("another holdfast")
	}
	k.start("restore --overwrite --base-data-path " + bind + "/data --config-dir " + k.dir + "/config latest").wait(1).says("another holdfast")
	k.goOn(r)
	r.wait(0)
	k.WantEvents("started", "stopped", "started", "stopped", "started")

	// All at once: each either has it for itself or is turned away.
	list := all()
	done := 0
	for _, r := range list {
		_ = r.cmd.Wait()
		switch code := r.cmd.ProcessState.ExitCode(); {
		case code == 0:
			done++
		case code != 1:
			t.Errorf("exit code %d: %s", code, &r.err)
		default:
			// Between two freezes of others it finds the server gone.
			if s := r.err.String(); !strings.Contains(s, "another holdfast") && !strings.Contains(s, "no process uses the data") {
				t.Error(s)
			}
		}
	}
	freezetest.Eventually(t, "the instance runs", k.Runs)
	if done == 0 || k.Count("stopped") != 2+done || k.Count("started") != 3+done || k.Count("locked") > 0 {
		t.Errorf("%d backups of %d were made, and the server did %q", done, len(list), k.Events())
	}
}
