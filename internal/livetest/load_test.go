package livetest

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/freeze/docker"
	"github.com/holdfast-backup/holdfast/internal/freeze/freezetest"
	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/fssnap/fssnaptest"
)

// A way to freeze starts the server and says how Holdfast stops it.
type way struct {
	name  string
	start func(t *testing.T, c *cloud) (flags []string)
}

var (
	byProcess = way{"process", func(_ *testing.T, c *cloud) []string {
		c.startProcess()
		return []string{"--freeze", "process"}
	}}
	bySystemd = way{"systemd", func(t *testing.T, c *cloud) []string {
		bus := freezetest.StartBus(t)
		m := freezetest.StartManager(t, bus, freezetest.Unit{Name: "ocis.service", Base: c.Base, Restart: true})
		m.Start("ocis.service")
		c.AwaitStarts(1)
		c.env = append(c.env, "DBUS_SYSTEM_BUS_ADDRESS="+bus)
		return []string{"--freeze", "systemd:ocis"}
	}}
	byDocker = way{"docker", func(t *testing.T, c *cloud) []string {
		c.container(t, freezetest.Spec{Name: "loaded", Restart: "always", Command: []string{"sh", "-c", "ocis init || true; ocis server"}})
		return []string{"--freeze", "docker:loaded"}
	}}
	byCompose = way{"compose", func(t *testing.T, c *cloud) []string {
		c.container(t, freezetest.Spec{Restart: "unless-stopped", Command: []string{"ocis", "server"},
			Labels: map[string]string{docker.LabelProject: "loaded", docker.LabelService: "ocis"}})
		return []string{"--freeze", "compose:loaded"}
	}}
	byCommand = way{"command", func(_ *testing.T, c *cloud) []string {
		c.startProcess()
		return c.commands()
	}}
)

// container runs the server in one.
func (c *cloud) container(t *testing.T, s freezetest.Spec) {
	t.Helper()
	e := freezetest.TheEngine(t)
	s.Base = c.Base
	e.Run(t, s)
	c.AwaitStarts(1)
	c.env = append(c.env, "DOCKER_HOST=unix://"+e.Socket)
}

// commands are those that a user might write.
func (c *cloud) commands() []string {
	return []string{
		"--stop-command", "kill -TERM $(cat '" + c.Notes + "/pid')",
		"--start-command", strings.Join(c.Env(), " ") + " '" + c.bin + "' server </dev/null >/dev/null 2>&1 &",
	}
}

// A way to read says where the data lies, and how it is read.
type reading struct {
	name  string
	view  string // in the manifest
	flags string
	place func(t *testing.T) string
	posix bool // the driver, which changes files in place
}

var (
	cold    = reading{"cold", "none", "--view none --cold", func(*testing.T) string { return "" }, false}
	warm    = reading{"warm", "none", "--view none --target-downtime 1ns", cold.place, false}
	inPlace = reading{"warm, driver posix", "none", warm.flags, cold.place, true}
	btrfs   = reading{"btrfs", "btrfs", "--view btrfs", func(t *testing.T) string {
		return filepath.Join(mountBtrfs(t), "inst")
	}, false}
	zfs = reading{"zfs", "zfs", "--view zfs", func(t *testing.T) string {
		_, top := fssnaptest.ZFSFuse(t)
		return filepath.Join(top, "inst")
	}, false}
)

// mountBtrfs mounts a new btrfs until the test ends.
func mountBtrfs(t *testing.T) string {
	t.Helper()
	mnt := filepath.Join(t.TempDir(), "mnt")
	fssnaptest.MountAt(t, fssnaptest.Device(t, 256<<20, "mkfs.btrfs", "-q"), mnt, "btrfs", "")
	return mnt
}

// TestUnderLoad: a server adds, overwrites, renames, deletes and shares files until it is stopped, and
// goes on after the start. What it had acknowledged at the stop is in the snapshot, nothing that it did
// later is, and the proof is complete.
func TestUnderLoad(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		way  way
		read reading
	}{
		{byProcess, warm},
		{byProcess, inPlace},
		{byProcess, btrfs},
		{bySystemd, warm},
		{bySystemd, cold},
		{byDocker, zfs},
		{byCompose, btrfs},
		{byCommand, cold},
	} {
		t.Run(c.way.name+", "+c.read.name, func(t *testing.T) {
			t.Parallel()
			var k *cloud
			if c.read.posix {
				k = newCloudPosix(t)
			} else {
				k = newCloud(t, c.read.place(t))
			}
			flags := c.way.start(t, k)
			k.AwaitChanges(20)
			r := k.must(k.backup(c.read.flags), flags...)
			k.AwaitChanges(5) // after the start
			r.wantComplete(c.way.name, c.read.view)
			k.WantAcknowledged(1, k.restored("latest"))
			k.WantEvents("started", "stopped", "started")
			k.wantNothingLeft()
			left, _ := filepath.Glob(filepath.Join(k.dir, "..", fssnap.ViewsDir, "*"))
			if len(left) > 0 {
				t.Errorf("left: %q", left)
			}
		})
	}
}

// TestUnderLoadNone: with --freeze none nothing is read while the server runs, and what it had
// acknowledged when somebody stopped it is in the snapshot.
func TestUnderLoadNone(t *testing.T) {
	t.Parallel()
	k := newCloud(t, "")
	k.startProcess()
	k.AwaitChanges(20)
	k.start(k.backup("--freeze none")).wait(1).says("the instance is running")
	k.stopProcess()
	r := k.must(k.backup("--freeze none"))
	k.startProcess()
	k.AwaitChanges(5)
	r.wantComplete("none", "none")
	k.WantAcknowledged(1, k.restored("latest"))
}

// stopProcess ends the server, as somebody else than Holdfast would.
func (c *cloud) stopProcess() {
	c.t.Helper()
	n := c.Count("stopped")
	fssnaptest.Tool(c.t, "sh", "-c", "kill -TERM $(cat '"+c.Notes+"/pid')")
	freezetest.Eventually(c.t, "the server has stopped", func() bool { return c.Count("stopped") > n && !c.Runs() })
}
