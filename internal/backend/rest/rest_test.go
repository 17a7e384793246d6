package rest_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/backendtest"
	"github.com/holdfast-backup/holdfast/internal/backend/rest"
	"github.com/holdfast-backup/holdfast/internal/backend/rest/resttest"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/transport"
)

func open(t *testing.T, addr string, o rest.Options) *rest.Backend {
	t.Helper()
	u, err := url.Parse(addr)
	if err != nil {
		t.Fatal(err)
	}
	tr, err := transport.New(transport.Options{})
	if err != nil {
		t.Fatal(err)
	}
	o.URL, o.Transport = u, tr
	be := rest.New(o)
	t.Cleanup(func() { be.Close() })
	return be
}

func serve(t *testing.T, h http.Handler) string {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return srv.URL
}

func TestLaws(t *testing.T) {
	for name, old := range map[string]bool{"v2": false, "v1": true} {
		t.Run(name, func(t *testing.T) {
			backendtest.Run(t, func(t *testing.T) backend.Backend {
				addr := serve(t, &resttest.Server{Dir: t.TempDir(), Old: old, User: "me", Password: "p:w"})
				return open(t, addr+"/some/path", rest.Options{User: "me", Password: "p:w"})
			})
		})
	}
}

// rclone is an implementation of the protocol that is not ours. Two writers at one name can both win,
// as it overwrites.
func TestLawsRclone(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) backend.Backend { return open(t, rcloneServer(t)+"/repo/", rest.Options{}) }, "Concurrent")
}

func rcloneServer(t *testing.T, args ...string) string {
	t.Helper()
	dir := t.TempDir()
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command("rclone", append([]string{"serve", "restic", "--addr", "127.0.0.1:0", dir}, args...)...)
	cmd.Env = append(os.Environ(), "RCLONE_CONFIG="+filepath.Join(dir, "none.conf"))
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for wait := 10 * time.Millisecond; wait < 20*time.Second; wait = wait * 3 / 2 {
		text, err := os.ReadFile(log.Name())
		if err != nil {
			t.Fatal(err)
		}
		if _, rest, ok := strings.Cut(string(text), "http://127.0.0.1:"); ok && strings.Contains(rest, "\n") {
			port := rest[:strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })]
			return "http://127.0.0.1:" + port
		}
		time.Sleep(wait)
	}
	text, _ := os.ReadFile(log.Name())
	t.Fatalf("rclone does not say its address: %s", text)
	return ""
}

func pack(seed uint64, n int) (backend.Handle, []byte) {
	data := backendtest.Bytes(seed, n)
	return backend.Handle{Type: backend.PackFile, Name: id.Hash(data).String()}, data
}

// Append-only: everything can be stored, and only locks removed.
func TestAppendOnly(t *testing.T) {
	ctx := context.Background()
	for name, addr := range map[string]string{
		"ours":   serve(t, &resttest.Server{Dir: t.TempDir(), AppendOnly: true}),
		"rclone": rcloneServer(t, "--append-only"),
	} {
		t.Run(name, func(t *testing.T) {
			be := open(t, addr, rest.Options{})
			if err := be.Create(ctx); err != nil {
				t.Fatal(err)
			}
			h, data := pack(1, 100)
			for _, ft := range []backend.FileType{backend.PackFile, backend.LockFile, backend.IndexFile, backend.SnapshotFile, backend.KeyFile} {
				h.Type = ft
				if err := be.Save(ctx, h, data); err != nil {
					t.Fatal(err)
				}
				if err := be.Save(ctx, h, data); !errors.Is(err, backend.ErrExist) {
					t.Errorf("second save to %v: %v", ft, err)
				}
				err := be.Remove(ctx, h)
				if ft == backend.LockFile {
					if err != nil {
						t.Errorf("a lock: %v", err)
					}
					continue
				}
				var pe *backend.PermanentError
				var hint interface{ Hints() []string }
				if !errors.As(err, &pe) || !errors.As(err, &hint) || !strings.Contains(hint.Hints()[0], "append-only") {
					t.Errorf("remove of %v: %v", ft, err)
				}
			}
		})
	}
}

func TestErrors(t *testing.T) {
	const secret = "topsecretvalue"
	ctx := context.Background()
	auth := serve(t, &resttest.Server{Dir: t.TempDir(), User: "me", Password: secret})
	status := func(code int) string {
		return serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.Error(w, "because\x1b[31m", code) }))
	}
	for _, c := range []struct {
		name, addr string
		o          rest.Options
		status     int
		permanent  bool
		hint       string
	}{
		{"no password", auth, rest.Options{}, 401, true, "RESTIC_REST_PASSWORD"},
		{"wrong password", auth, rest.Options{User: "me", Password: secret + "x"}, 401, true, "RESTIC_REST_PASSWORD"},
		{"redirect", status(302), rest.Options{}, 302, true, "use that one"},
		{"full", status(507), rest.Options{}, 507, true, "quota"},
		{"busy", status(503), rest.Options{}, 503, false, ""},
		{"too many", status(429), rest.Options{}, 429, false, ""},
		{"no server of this kind", status(405), rest.Options{}, 405, true, "path right"},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := strings.Replace(c.addr, "http://", "http://me:"+secret+"@", 1)
			be := open(t, u, c.o)
			err := be.Create(ctx)
			var e *rest.Error
			var pe *backend.PermanentError
			if !errors.As(err, &e) || e.Status != c.status || errors.As(err, &pe) != c.permanent {
				t.Fatalf("error %v", err)
			}
			if h := strings.Join(e.Hints(), " "); (c.hint == "") != (h == "") || !strings.Contains(h, c.hint) {
				t.Errorf("hint %q", h)
			}
			if s := err.Error() + be.Location(); strings.Contains(s, secret) || strings.Contains(s, "\x1b") {
				t.Errorf("%q", s)
			}
		})
	}
	// Nobody there: said with the address and without the password.
	be := open(t, "http://me:"+secret+"@127.0.0.1:1/repo", rest.Options{User: "me", Password: secret})
	_, err := be.Stat(ctx, backend.Handle{Type: backend.ConfigFile})
	var hint interface{ Hints() []string }
	if !errors.As(err, &hint) || !strings.Contains(err.Error(), "http://127.0.0.1:1/repo/config") || strings.Contains(err.Error(), secret) {
		t.Errorf("%v", err)
	}
}

// A server that answers from another place of the file, or with all of it, is not believed, and a
// list that ends early is an error.
func TestLyingServer(t *testing.T) {
	ctx := context.Background()
	h, _ := pack(1, 1)
	var how atomic.Value
	addr := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/vnd.x.restic.rest.v2")
		switch how.Load() {
		case "whole":
			io.WriteString(w, "the whole file")
		case "wrong part":
			w.Header().Set("Content-Range", "bytes 5-8/14")
			w.WriteHeader(http.StatusPartialContent)
			io.WriteString(w, "hole")
		case "cut":
			w.Header().Set("Content-Range", "bytes 4-7/14")
			w.Header().Set("Content-Length", "4")
			w.WriteHeader(http.StatusPartialContent)
			io.WriteString(w, "wh")
		case "list":
			io.WriteString(w, `[{"name":"`+h.Name+`","size":3}`)
		case "html":
			io.WriteString(w, `<html>`)
		}
	}))
	be := open(t, addr, rest.Options{})
	for _, c := range []string{"whole", "wrong part", "cut"} {
		how.Store(c)
		err := be.Load(ctx, h, 4, 4, func(r io.Reader) error { _, err := io.ReadAll(r); return err })
		if err == nil {
			t.Errorf("%s: no error", c)
		}
	}
	for _, c := range []string{"list", "html"} {
		how.Store(c)
		if err := be.List(ctx, backend.PackFile, func(backend.FileInfo) error { return nil }); err == nil {
			t.Errorf("%s: no error", c)
		}
	}
}
