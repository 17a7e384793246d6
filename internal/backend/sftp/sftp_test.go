package sftp_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/backendtest"
	"github.com/holdfast-backup/holdfast/internal/backend/sftp"
	"github.com/holdfast-backup/holdfast/internal/backend/sftp/sftptest"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

func start(t *testing.T) *sftptest.Server {
	t.Helper()
	s, err := sftptest.Run(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	return s
}

func env(kv ...string) func(string) (string, bool) {
	return func(name string) (string, bool) {
		for i := 0; i < len(kv); i += 2 {
			if kv[i] == name {
				return kv[i+1], true
			}
		}
		return "", false
	}
}

func builtIn(s *sftptest.Server, dir string) sftp.Options {
	return sftp.Options{User: s.User, Host: "127.0.0.1", Port: s.Port, Path: dir, Env: env("HOME", s.Home), Location: "sftp:test"}
}

func TestLaws(t *testing.T) {
	s := start(t)
	backendtest.Run(t, func(t *testing.T) backend.Backend {
		return sftp.New(builtIn(s, filepath.Join(t.TempDir(), "a", "repo")))
	})
}

func TestLawsCommand(t *testing.T) {
	s := start(t)
	backendtest.Run(t, func(t *testing.T) backend.Backend {
		return sftp.New(sftp.Options{Command: s.Command(), Path: t.TempDir(), Location: "sftp:test"})
	})
}

func pack(seed uint64, n int) (backend.Handle, []byte) {
	data := backendtest.Bytes(seed, n)
	return backend.Handle{Type: backend.PackFile, Name: id.Hash(data).String()}, data
}

// A connection that is lost is made again by the next operation.
func TestReconnect(t *testing.T) {
	s := start(t)
	ctx := context.Background()
	for name, o := range map[string]sftp.Options{
		"built in": builtIn(s, t.TempDir()),
		"command":  {Command: s.Command(), Path: t.TempDir(), Location: "sftp:test"},
	} {
		be := sftp.New(o)
		if err := be.Create(ctx); err != nil {
			t.Fatal(err)
		}
		h, data := pack(1, 100)
		if err := be.Save(ctx, h, data); err != nil {
			t.Fatal(err)
		}
		s.Sessions(func(pid int) { _ = syscall.Kill(pid, syscall.SIGKILL) })
		var err error
		// The first one finds out; a busy machine takes a while to begin a new session.
		for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
			if _, err = be.Stat(ctx, h); err == nil || time.Now().After(end) {
				break
			}
			var pe *backend.PermanentError
			if errors.As(err, &pe) || errors.Is(err, backend.ErrNotExist) {
				t.Fatalf("%s: a lost connection is not for ever: %v", name, err)
			}
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		be.Close()
	}
}

// A command of the user gets neither the password of the repository nor the keys of another one.
func TestCommandGetsNoKeys(t *testing.T) {
	t.Setenv("HOLDFAST_PASSWORD", "topsecretvalue")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "topsecretvalue")
	t.Setenv("THEIRS", "kept")
	file := filepath.Join(t.TempDir(), "env")
	be := sftp.New(sftp.Options{Host: "h", Path: "/p", Command: "sh -c 'env >" + file + "'"})
	defer be.Close()
	if _, err := be.Stat(context.Background(), backend.Handle{Type: backend.ConfigFile}); err == nil {
		t.Error("a command that is no session")
	}
	env, err := os.ReadFile(file)
	if err != nil || strings.Contains(string(env), "topsecretvalue") || !strings.Contains(string(env), "THEIRS=kept") {
		t.Errorf("%v: %s", err, env)
	}
}

func TestConnectErrors(t *testing.T) {
	s := start(t)
	dir := t.TempDir()
	other := start(t) // another server, whose keys are wrong here
	read := func(file string) []byte {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	home := func(key string, known string) string {
		h := t.TempDir()
		if err := os.Mkdir(filepath.Join(h, ".ssh"), 0o700); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{"id_ed25519": key, "known_hosts": known} {
			if text != "" {
				if err := os.WriteFile(filepath.Join(h, ".ssh", name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		return h
	}
	key := string(read(filepath.Join(s.Home, ".ssh", "id_ed25519")))
	known := string(read(filepath.Join(s.Home, ".ssh", "known_hosts")))
	wrongKey := string(read(filepath.Join(other.Home, ".ssh", "id_ed25519")))
	changed := "[127.0.0.1]:" + s.Port + " " + string(ssh.MarshalAuthorizedKey(other.HostKey))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, free, _ := net.SplitHostPort(l.Addr().String())
	l.Close()
	for _, c := range []struct {
		name      string
		home      string
		change    func(*sftp.Options)
		what      string
		hint      string
		permanent bool
	}{
		{"unknown host", home(key, ""), nil, "is not known: its key has the fingerprint " + ssh.FingerprintSHA256(s.HostKey), "Log in once", true},
		{"changed host", home(key, changed), nil, "has changed", "ssh-keygen -R", true},
		{"key refused", home(wrongKey, known), nil, "refuses the log-in", "authorized_keys", true},
		{"nobody there", s.Home, func(o *sftp.Options) { o.Port = free }, "refused", "running", false},
		{"command fails", s.Home, func(o *sftp.Options) { o.Command = "sh -c 'echo no such thing >&2; exit 3'" }, "no such thing", "ssh ", true},
		{"no network", s.Home, func(o *sftp.Options) { o.Command = "sh -c 'echo no route >&2; exit 255'" }, "no route", "ssh ", false},
		{"refused by ssh", s.Home, func(o *sftp.Options) { o.Command = "sh -c 'echo Permission denied. >&2; exit 255'" }, "denied", "ssh ", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := builtIn(s, dir)
			o.Env = env("HOME", c.home)
			if c.change != nil {
				c.change(&o)
			}
			be := sftp.New(o)
			defer be.Close()
			_, err := be.Stat(context.Background(), backend.Handle{Type: backend.ConfigFile})
			var hint interface{ Hints() []string }
			if err == nil || !errors.As(err, &hint) || !strings.Contains(err.Error(), c.what) || !strings.Contains(hint.Hints()[0], c.hint) {
				t.Errorf("error %v", err)
			}
			var pe *backend.PermanentError
			if errors.As(err, &pe) != c.permanent {
				t.Errorf("permanent: %v", err)
			}
		})
	}
}

// The agent's key is enough.
func TestAgent(t *testing.T) {
	s := start(t)
	raw, err := os.ReadFile(filepath.Join(s.Home, ".ssh", "id_ed25519"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.ParseRawPrivateKey(raw)
	if err != nil {
		t.Fatal(err)
	}
	ring := agent.NewKeyring()
	if err := ring.Add(agent.AddedKey{PrivateKey: key}); err != nil {
		t.Fatal(err)
	}
	home := t.TempDir()
	if err := os.Mkdir(filepath.Join(home, ".ssh"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(s.Home, ".ssh", "known_hosts"), filepath.Join(home, ".ssh", "known_hosts")); err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(home, "agent")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go agent.ServeAgent(ring, c)
		}
	}()
	o := builtIn(s, t.TempDir())
	o.Env = env("HOME", home, "SSH_AUTH_SOCK", sock)
	be := sftp.New(o)
	defer be.Close()
	if err := be.Create(context.Background()); err != nil {
		t.Fatal(err)
	}
}
