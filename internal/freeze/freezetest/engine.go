package freezetest

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/docker"
)

// Engine is a Docker engine of the test's own. Containers have no network.
type Engine struct {
	dir    string
	Socket string
	Client *docker.Client
	http   *http.Client
	daemon *daemon
	log    *os.File
}

// Image is the one image of an Engine: the server as /bin/ocis, the same program as /bin/run for what
// must not be taken for a server, and a shell.
const Image = "owncloud/ocis:test"

// SideImage has the same content under a name that is not the product's.
const SideImage = "library/helper:test"

var engine struct {
	once sync.Once
	e    *Engine
	err  error
}

// TheEngine returns the engine of this test program, which is started by the first test that asks.
func TheEngine(t testing.TB) *Engine {
	t.Helper()
	bin := Binary(t)
	engine.once.Do(func() { engine.e, engine.err = startEngine(bin) })
	if engine.err != nil {
		t.Fatal(engine.err)
	}
	return engine.e
}

// StopEngine ends the engine, if it was started, removes the server that was built for it, and tells what
// was left behind. It comes after all tests.
func StopEngine() error {
	var err error
	if engine.e != nil {
		err = engine.e.stop()
	}
	return errors.Join(err, os.RemoveAll(build.dir))
}

func startEngine(bin string) (e *Engine, err error) {
	dir, err := os.MkdirTemp("", "hfdocker") // short: the paths of sockets are limited
	if err != nil {
		return nil, err
	}
	e = &Engine{dir: dir, Socket: filepath.Join(dir, "d.sock")}
	defer func() {
		if err != nil {
			_ = e.stop()
		}
	}()
	if err := os.WriteFile(filepath.Join(dir, "daemon.json"), []byte("{}"), 0o600); err != nil {
		return nil, err
	}
	if e.log, err = os.Create(filepath.Join(dir, "log")); err != nil {
		return nil, err
	}
	path, err := exec.LookPath("dockerd")
	if err != nil {
		path = "/usr/sbin/dockerd"
	}
	cmd := exec.Command(path, "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs",
		"--data-root="+filepath.Join(dir, "data"), "--exec-root="+filepath.Join(dir, "exec"),
		"--pidfile="+filepath.Join(dir, "pid"), "--config-file="+filepath.Join(dir, "daemon.json"),
		"--host=unix://"+e.Socket)
	cmd.Stdout, cmd.Stderr = e.log, e.log
	if e.daemon, err = startDaemon(cmd); err != nil {
		return nil, fmt.Errorf("start a Docker engine: %w; scripts/install-test-deps.sh installs it", err)
	}
	if e.Client, err = docker.New("unix://" + e.Socket); err != nil {
		return nil, err
	}
	e.http = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", e.Socket)
	}}}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err = e.Client.Ping(context.Background()); err == nil {
			break
		}
		select {
		case <-e.daemon.done:
			deadline = time.Time{}
		default:
		}
		if time.Now().After(deadline) {
			text, _ := os.ReadFile(e.log.Name())
			return nil, fmt.Errorf("the Docker engine does not answer: %w; its log: %s", err, text)
		}
	}
	archive, err := imageArchive("ocis", bin)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{Image, SideImage} {
		if err := e.importImage(name, archive); err != nil {
			return nil, err
		}
	}
	return e, nil
}

func (e *Engine) importImage(name string, archive []byte) error {
	repo, tag, _ := strings.Cut(name, ":")
	q := url.Values{"fromSrc": {"-"}, "repo": {repo}, "tag": {tag}}
	if err := e.call(http.MethodPost, "/images/create?"+q.Encode(), "application/x-tar", bytes.NewReader(archive), nil); err != nil {
		return fmt.Errorf("import the image: %w", err)
	}
	return nil
}

// Import makes one more image with the content of Image, and returns its id.
func (e *Engine) Import(t testing.TB, name string) string {
	t.Helper()
	return e.ImportProgram(t, name, "ocis", Binary(t))
}

// ImportProgram makes an image with a program of the test's own, which needs no libraries, as /bin/PROGRAM.
func (e *Engine) ImportProgram(t testing.TB, name, program, bin string) string {
	t.Helper()
	archive, err := imageArchive(program, bin)
	if err == nil {
		err = e.importImage(name, archive)
	}
	if err != nil {
		t.Fatal(err)
	}
	return e.ImageID(name)
}

// ImageID returns the id of an image, "" if there is none.
func (e *Engine) ImageID(name string) string {
	var image struct {
		ID string `json:"Id"`
	}
	_ = e.call(http.MethodGet, "/images/"+name+"/json", "", nil, &image)
	return image.ID
}

// RemoveImage removes an image that no container uses.
func (e *Engine) RemoveImage(t testing.TB, name string) {
	t.Helper()
	if err := e.call(http.MethodDelete, "/images/"+name, "", nil, nil); err != nil {
		t.Fatal(err)
	}
}

// Load takes in a saved image.
func (e *Engine) Load(t testing.TB, saved io.Reader) {
	t.Helper()
	if err := e.call(http.MethodPost, "/images/load?quiet=1", "application/x-tar", saved, nil); err != nil {
		t.Fatal(err)
	}
}

// imageArchive is a root filesystem with the server, under the name program, and a shell.
func imageArchive(program, bin string) ([]byte, error) {
	shell, err := exec.LookPath("busybox")
	if err != nil {
		return nil, fmt.Errorf("a static shell for containers: %w; scripts/install-test-deps.sh installs it", err)
	}
	if f, err := elf.Open(shell); err != nil {
		return nil, err
	} else if libs, _ := f.ImportedLibraries(); len(libs) > 0 {
		return nil, fmt.Errorf("%s needs libraries, which the image does not have; install the package busybox-static", shell)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "bin/", Mode: 0o755, Typeflag: tar.TypeDir}); err != nil {
		return nil, err
	}
	if err := w.WriteHeader(&tar.Header{Name: "bin/run", Mode: 0o777, Typeflag: tar.TypeSymlink, Linkname: program}); err != nil {
		return nil, err
	}
	for name, file := range map[string]string{"bin/" + program: bin, "bin/sh": shell} {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(data)), Typeflag: tar.TypeReg}); err != nil {
			return nil, err
		}
		if _, err := w.Write(data); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), w.Close()
}

// call makes a request that the product has no need of.
func (e *Engine) call(method, path, contentType string, body io.Reader, v any) error {
	req, err := http.NewRequest(method, "http://docker"+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", contentType)
	res, err := e.http.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode/100 != 2 || bytes.Contains(data, []byte(`"errorDetail"`)) {
		return fmt.Errorf("%s %s: %s: %s", method, path, res.Status, data)
	}
	if v == nil {
		return nil
	}
	return json.Unmarshal(data, v)
}

func (e *Engine) stop() error {
	var errs []error
	if e.daemon != nil {
		errs = append(errs, e.daemon.stop())
	}
	if e.log != nil {
		errs = append(errs, e.log.Close())
	}
	// The engine mounts its root on itself and may leave that.
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	errs = append(errs, err)
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) > 4 && strings.Contains(line, " - cgroup") {
			// The parent of its containers' control groups. With others in it, it stays.
			_ = os.Remove(filepath.Join(f[4], "docker"))
		}
		if len(f) > 4 && strings.HasPrefix(f[4], e.dir+"/") {
			if out, err := exec.Command("umount", f[4]).CombinedOutput(); err != nil {
				errs = append(errs, fmt.Errorf("umount %s: %w: %s", f[4], err, out))
			}
		}
	}
	errs = append(errs, os.RemoveAll(e.dir))
	return errors.Join(errs...)
}

// Spec is a container to be made.
type Spec struct {
	Name    string // "" makes one up
	Image   string // "" is Image
	Base    *Base  // its data, at /var/lib/ocis
	Command []string
	Mode    string // OCIS_TEST_MODE
	Restart string // restart policy
	Labels  map[string]string
	User    string
	Network string // "" is none
	Remove  bool   // --rm
	Health  bool   // a health check that takes half a second
}

// Run makes and starts a container, and removes it after the test. It returns its id.
func (e *Engine) Run(t testing.TB, s Spec) string {
	t.Helper()
	id := e.Create(t, s)
	if err := e.Client.Start(context.Background(), id); err != nil {
		t.Fatal(err)
	}
	return id
}

// Create does not start it.
func (e *Engine) Create(t testing.TB, s Spec) string {
	t.Helper()
	if s.Image == "" {
		s.Image = Image
	}
	if s.Restart == "" {
		s.Restart = "no"
	}
	if s.Network == "" {
		s.Network = "none"
	}
	host := map[string]any{"NetworkMode": s.Network, "RestartPolicy": map[string]any{"Name": s.Restart}, "AutoRemove": s.Remove}
	env := []string{"OCIS_BASE_DATA_PATH=/var/lib/ocis"}
	switch {
	case s.Base == nil:
	case s.Base.Notes == s.Base.Dir:
		host["Binds"] = []string{s.Base.Dir + ":/var/lib/ocis"}
	default: // the load wants its paths
		dir := filepath.Dir(s.Base.Dir)
		host["Binds"] = []string{dir + ":" + dir, s.Base.Notes + ":" + s.Base.Notes}
		env = s.Base.Env()
	}
	var health any
	if s.Health {
		health = map[string]any{"Test": []string{"CMD", "run", "healthy"}, "Interval": 100 * time.Millisecond, "Timeout": 10 * time.Second, "Retries": 3}
	}
	body, err := json.Marshal(map[string]any{
		"Healthcheck": health,
		"Image":       s.Image, "Cmd": s.Command, "Labels": s.Labels, "User": s.User, "HostConfig": host,
		"Env": append(env, "OCIS_TEST_MODE="+s.Mode, "PATH=/bin"),
	})
	if err != nil {
		t.Fatal(err)
	}
	var made struct {
		ID string `json:"Id"`
	}
	path := "/containers/create"
	if s.Name != "" {
		path += "?name=" + url.QueryEscape(s.Name)
	}
	if err := e.call(http.MethodPost, path, "application/json", bytes.NewReader(body), &made); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Remove(made.ID) })
	return made.ID
}

// Remove ends and removes a container, if there is one.
func (e *Engine) Remove(name string) {
	_ = e.call(http.MethodDelete, "/containers/"+url.PathEscape(name)+"?force=1", "", nil, nil)
}

// Inspect returns the state of a container.
func (e *Engine) Inspect(t testing.TB, name string) *docker.Container {
	t.Helper()
	k, err := e.Client.Inspect(context.Background(), name)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// WantState fails the test if a container is in another state, e.g. "running", or has another
// restart policy.
func (e *Engine) WantState(t testing.TB, name, status, policy string) {
	t.Helper()
	if k := e.Inspect(t, name); k.State.Status != status || k.HostConfig.RestartPolicy.Name != policy {
		t.Errorf("container %s is %s with restart policy %s, want %s and %s", k.Name, k.State.Status, k.HostConfig.RestartPolicy.Name, status, policy)
	}
}
