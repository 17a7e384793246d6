package main

import (
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

func TestSizes(t *testing.T) {
	for s, want := range map[string]int64{
		"1": 1, "512": 512, "4k": 4 << 10, "512M": 512 << 20, "20G": 20 << 30, "20 GiB": 20 << 30, "2tb": 2 << 40,
		"": 0, "0": 0, "-1G": 0, "G": 0, "1.5G": 0, "1GM": 0, "5X": 0, "9999999999T": 0,
	} {
		n, err := parseSize(s)
		if n != want || (err == nil) != (want > 0) {
			t.Errorf("%q: %d, %v", s, n, err)
		}
	}
}

func TestViewVariables(t *testing.T) {
	for name, want := range map[string]string{
		"base": "HOLDFAST_VIEW_BASE", "storage-users-blobs": "HOLDFAST_VIEW_STORAGE_USERS_BLOBS", "größe.2": "HOLDFAST_VIEW_GR__E_2",
	} {
		if got := viewVariable(name); got != want {
			t.Errorf("%s: %s", name, got)
		}
	}
}

func TestWhichDrivers(t *testing.T) {
	for _, c := range []struct {
		flags  viewFlags
		method string
		want   []string
	}{
		{viewFlags{}, "none", nil},
		{viewFlags{}, "process", []string{"btrfs", "zfs", "lvm", "cephfs"}},
		{viewFlags{kind: "auto"}, "none", []string{"btrfs", "zfs", "lvm", "cephfs"}},
		{viewFlags{kind: "none"}, "process", nil},
		{viewFlags{kind: "none", create: "a", destroy: "b"}, "process", nil},
		{viewFlags{kind: "zfs"}, "none", []string{"zfs"}},
		{viewFlags{create: "a", destroy: "b"}, "none", []string{"command"}},
	} {
		list, err := new(app).backupDrivers(&c.flags, c.method)
		if err != nil {
			t.Error(err)
		}
		var got []string
		for _, d := range list {
			got = append(got, d.Kind())
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%+v with %s: %v", c.flags, c.method, got)
		}
	}
}

// TestCtrlCInWithView: the program gets it once, from the keyboard, and decides what it means.
func TestCtrlCInWithView(t *testing.T) {
	dir := testfixture.Unpack(t, "ocis-posix")
	views := t.TempDir()
	x := onTerminal(t, []string{"VIEWS=" + views}, "with-view",
		"--base-data-path", filepath.Join(dir, "data"), "--config-dir", filepath.Join(dir, "config"),
		"--view-create", `cp -a "$HOLDFAST_SOURCE" "$VIEWS/$HOLDFAST_VIEW_NAME" && echo "$VIEWS/$HOLDFAST_VIEW_NAME"`,
		"--view-destroy", `rm -rf "$VIEWS/$HOLDFAST_VIEW_NAME"`, "--",
		"sh", "-c", `n=0; trap 'n=$((n+1)); echo caught' INT; trap 'exit $((10+n))' TERM; echo wait""ing; while :; do sleep 0.05; done`)
	x.expect("waiting")
	x.send("\x03", false)
	x.expect("caught")
	if err := x.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	x.wait(11)
	left, err := os.ReadDir(views)
	if err != nil || len(left) > 0 {
		t.Errorf("%d views are left, %v", len(left), err)
	}
}
