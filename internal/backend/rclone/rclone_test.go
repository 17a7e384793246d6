package rclone_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/backendtest"
	"github.com/holdfast-backup/holdfast/internal/backend/rclone"
)

func open(t *testing.T, o rclone.Options) backend.Backend {
	t.Helper()
	t.Setenv("RCLONE_CONFIG", filepath.Join(t.TempDir(), "rclone.conf"))
	be, err := rclone.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { be.Close() })
	return be
}

// Two writers at one name can both win: rclone overwrites, unless it was told to append only.
func TestLaws(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) backend.Backend {
		return open(t, rclone.Options{Remote: ":local:" + filepath.Join(t.TempDir(), "repo")})
	}, "Concurrent")
}

func TestErrors(t *testing.T) {
	ctx := context.Background()
	config := backend.Handle{Type: backend.ConfigFile}
	for _, c := range []struct {
		o    rclone.Options
		what string
	}{
		{rclone.Options{Remote: "nosuchremote:path"}, "nosuchremote"},
		{rclone.Options{Remote: ":local:/x", Program: "/nonexistent/rclone"}, "cannot start rclone"},
		{rclone.Options{Remote: ":local:/x", Program: "/bin/false"}, "exit status 1"},
	} {
		c.o.Headers = 5 * time.Second
		_, err := open(t, c.o).Stat(ctx, config)
		var pe *backend.PermanentError
		if err == nil || !errors.As(err, &pe) || errors.Is(err, backend.ErrNotExist) || !strings.Contains(err.Error(), c.what) {
			t.Errorf("%+v: %v", c.o, err)
		}
	}
	for _, r := range []string{"path", "-x:y"} {
		if _, err := rclone.Open(rclone.Options{Remote: r}); err == nil {
			t.Errorf("%q was taken", r)
		}
	}
}

// The password of the repository does not reach rclone, and a killed rclone is started again.
func TestProcess(t *testing.T) {
	t.Setenv("RESTIC_PASSWORD", "topsecretvalue")
	dir := t.TempDir()
	script := filepath.Join(dir, "rclone")
	text := "#!/bin/sh\nenv >>" + dir + "/env\necho $$ >>" + dir + "/pids\nexec rclone \"$@\"\n"
	if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	be := open(t, rclone.Options{Remote: ":local:" + dir + "/repo", Program: script})
	ctx := context.Background()
	if err := be.Create(ctx); err != nil {
		t.Fatal(err)
	}
	environ, err := os.ReadFile(dir + "/env")
	if err != nil || strings.Contains(string(environ), "topsecretvalue") || !strings.Contains(string(environ), "RCLONE_CONFIG") {
		t.Errorf("environment: %v", err)
	}
	kill(t, dir+"/pids")
	for range 5 { // the first one finds out
		if err = be.Create(ctx); err == nil {
			break
		}
	}
	if err != nil {
		t.Error(err)
	}
}

func kill(t *testing.T, file string) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}
