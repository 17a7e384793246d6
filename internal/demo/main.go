// Command demo shows Holdfast at work on a sample instance that a real server wrote: two backups
// with a change in between, the users' files by their real names, restores of both states and their
// comparison with the originals, and restic's own check of the repository. It works in a temporary
// directory and leaves nothing behind.
package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

// demo is one run.
type demo struct {
	ctx context.Context
	dir string // all that the demo makes
	env []string
}

func run(ctx context.Context) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("the sample instance has owners that only root can set: run it as root, e.g. sudo make demo")
	}
	dir, err := os.MkdirTemp("", "holdfast-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	d := &demo{ctx: ctx, dir: dir}
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "HOLDFAST_") && !strings.HasPrefix(kv, "RESTIC_") {
			d.env = append(d.env, kv)
		}
	}
	d.env = append(d.env, "PATH="+dir+":"+os.Getenv("PATH"), "HOLDFAST_CONFIG_FILE="+d.path("holdfast.yaml"))

	for _, step := range []func() error{
		d.build, d.unpack, d.firstBackup, d.change, d.secondBackup, d.look, d.restoreBoth, d.restic,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	d.say("All of it is equal, and restic agrees with every byte.")
	return nil
}

func (d *demo) path(elem ...string) string { return filepath.Join(append([]string{d.dir}, elem...)...) }

func (d *demo) say(format string, args ...any) {
	fmt.Printf("\n== "+format+"\n", args...)
}

// command shows a command and runs it. Lines beyond limit are counted instead of shown; 0 shows all.
func (d *demo) command(limit int, name string, arg ...string) error {
	shown := make([]string, len(arg))
	for i, a := range arg {
		shown[i] = a
		if strings.ContainsAny(a, " '\"$&;") {
			shown[i] = "'" + a + "'"
		}
	}
	fmt.Printf("\n$ %s %s\n", name, strings.Join(shown, " "))
	file := name
	if name == "holdfast" {
		file = d.path("holdfast")
	}
	cmd := exec.CommandContext(d.ctx, file, arg...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.Dir, cmd.Env = d.dir, d.env
	cmd.Stderr = os.Stdout
	var out bytes.Buffer
	cmd.Stdout = os.Stdout
	if limit > 0 {
		cmd.Stdout = &out
	}
	err := cmd.Run()
	n := 0
	for sc := bufio.NewScanner(&out); sc.Scan(); n++ {
		if n < limit {
			fmt.Println(sc.Text())
		}
	}
	if n > limit {
		fmt.Printf("... and %d lines more\n", n-limit)
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", name, strings.Join(arg, " "), err)
	}
	return nil
}

func (d *demo) build() error {
	d.say("Build Holdfast")
	cmd := exec.CommandContext(d.ctx, "go", "build", "-o", d.path("holdfast"), "./cmd/holdfast")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("build holdfast: %w", err)
	}
	return nil
}

// Where the sample instance lies, and its original state to compare with.
const (
	sample   = testfixture.OpenCloud
	original = "original"
)

// settings of the demo; relative paths are relative to its directory.
const settings = `repository: repository
password-file: password
cache-dir: cache
state-dir: state
backup:
  base-data-path: opencloud-posix/data
  config-dir: opencloud-posix/config
  freeze: none
discover:
  base-data-path: opencloud-posix/data
  config-dir: opencloud-posix/config
`

func (d *demo) unpack() error {
	d.say("A sample instance that a real OpenCloud server wrote, and these settings:")
	fmt.Printf("\n%s", settings)
	archive, err := testfixture.Archive(sample)
	if err != nil {
		return err
	}
	if err := os.Mkdir(d.path(original), 0o755); err != nil {
		return err
	}
	return errors.Join(
		testfixture.Extract(archive, d.dir),
		testfixture.Extract(archive, d.path(original)),
		os.WriteFile(d.path("holdfast.yaml"), []byte(settings), 0o644),
		os.WriteFile(d.path("password"), []byte("correct horse battery staple\n"), 0o600),
	)
}

func (d *demo) firstBackup() error {
	d.say("See what belongs to it, make a repository, back up")
	if err := d.command(0, "holdfast", "discover"); err != nil {
		return err
	}
	if err := d.command(0, "holdfast", "init"); err != nil {
		return err
	}
	return d.command(0, "holdfast", "backup")
}

func (d *demo) change() error {
	f, err := findFile(d.path(sample, "data", "storage", "users"))
	if err != nil {
		return err
	}
	d.say("A user saves a new version of %q", f.name)
	content := []byte(strings.Repeat("This line was written between the two backups of the demo.\n", 2000))
	return f.save(content, "5a3c7c1e-0d0f-4b56-9a5e-1f2d3c4b5a69", time.Date(2026, 11, 23, 12, 0, 0, 123456789, time.UTC))
}

func (d *demo) secondBackup() error {
	d.say("Back up again: only the change is read and stored")
	if err := d.command(0, "holdfast", "backup"); err != nil {
		return err
	}
	return d.command(0, "holdfast", "snapshots")
}

func (d *demo) look() error {
	d.say("The users' files by their real names")
	if err := d.command(0, "holdfast", "ls", "latest:/storage/users/spaces"); err != nil {
		return err
	}
	return d.command(25, "holdfast", "ls", "--recursive", "latest:/storage/users/spaces")
}

func (d *demo) restoreBoth() error {
	d.say("Restore the newest state, and the one before the change; compare every name, byte, mode, owner, time and attribute")
	for _, c := range []struct{ snapshot, to, want string }{
		{"latest", "restored", d.path(sample)},
		{"latest~1", "restored-first", d.path(original, sample)},
	} {
		err := d.command(0, "holdfast", "restore", c.snapshot,
			"--base-data-path", filepath.Join(c.to, "data"), "--config-dir", filepath.Join(c.to, "config"))
		if err != nil {
			return err
		}
		for _, part := range []string{"data", "config"} {
			diffs, err := testfixture.Diff(filepath.Join(c.want, part), d.path(c.to, part))
			if err != nil {
				return err
			}
			if len(diffs) > 0 {
				return fmt.Errorf("%s of %s is not restored as it was:\n%s", part, c.snapshot, strings.Join(diffs, "\n"))
			}
			fmt.Printf("%s of %s: equal\n", part, c.snapshot)
		}
	}
	return nil
}

func (d *demo) restic() error {
	d.say("Check the repository with Holdfast, and with stock restic")
	if err := d.command(0, "holdfast", "check", "--read-data"); err != nil {
		return err
	}
	return d.command(0, "restic", "-r", "repository", "-p", "password", "--no-cache", "check", "--read-data")
}
