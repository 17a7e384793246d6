// Package docker reads from the Docker Engine API what Holdfast needs: containers, images, volumes;
// and stops and starts containers. It speaks HTTP over the engine's unix socket, with the standard library only. Podman's service
// answers the same requests.
package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// DefaultSocket is where the engine listens unless DOCKER_HOST says otherwise.
const DefaultSocket = "/var/run/docker.sock"

// ErrNotFound is returned (wrapped) when there is no such container, image or volume.
var ErrNotFound = errors.New("not found")

// ErrNoEngine is returned (wrapped) when nothing answers at the socket.
var ErrNoEngine = errors.New("docker engine not reachable")

// APIError is an answer of the engine other than success.
type APIError struct {
	Request string // e.g. "GET /containers/ocis/json"
	Status  int
	Message string
}

func (e *APIError) Error() string {
	return fmt.Sprintf("docker engine: %s: %s (status %d)", e.Request, e.Message, e.Status)
}

// Is makes errors.Is(err, ErrNotFound) true for status 404.
func (e *APIError) Is(target error) bool {
	return target == ErrNotFound && e.Status == http.StatusNotFound
}

// Client talks to one engine. It is safe for concurrent use.
type Client struct {
	socket string
	http   *http.Client

	mu      sync.Mutex
	version string // API version of the engine, "" until asked
	asked   bool
}

// New makes a client for host, which is "" or unix://PATH. "" means DOCKER_HOST, else the default
// socket, else the socket of a rootless engine of this user. Nothing is connected yet.
func New(host string) (*Client, error) {
	if host == "" {
		host = os.Getenv("DOCKER_HOST")
	}
	socket := ""
	switch {
	case host == "":
		socket = DefaultSocket
		if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
			rootless := filepath.Join(dir, "docker.sock")
			if _, err := os.Stat(socket); err != nil {
				if _, err := os.Stat(rootless); err == nil {
					socket = rootless
				}
			}
		}
	case strings.HasPrefix(host, "unix://"):
		socket = strings.TrimPrefix(host, "unix://")
	default:
		return nil, fmt.Errorf("DOCKER_HOST=%s: only unix:// sockets are supported, because the data must be on this host", host)
	}
	if !filepath.IsAbs(socket) {
		return nil, fmt.Errorf("DOCKER_HOST=%s: the path of the socket must be absolute", host)
	}
	c := &Client{socket: socket}
	c.http = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		DisableCompression: true, // image archives are compressed by the repository
	}}
	return c, nil
}

// Socket returns the path of the engine's socket.
func (c *Client) Socket() string { return c.socket }

// Ping asks the engine for its API version, e.g. "1.47".
//
// Errors: ErrNoEngine.
func (c *Client) Ping(ctx context.Context) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.asked {
		return c.version, nil
	}
	res, err := c.do(ctx, http.MethodGet, "/_ping", nil)
	if err != nil {
		return "", err
	}
	defer drain(res.Body)
	c.version, c.asked = res.Header.Get("Api-Version"), true
	return c.version, nil
}

func (c *Client) get(ctx context.Context, path string, query url.Values) (*http.Response, error) {
	return c.request(ctx, http.MethodGet, path, query, nil)
}

// request adds the engine's own API version to path: requests without one go away.
func (c *Client) request(ctx context.Context, method, path string, query url.Values, body io.Reader) (*http.Response, error) {
	v, err := c.Ping(ctx)
	if err != nil {
		return nil, err
	}
	if v != "" {
		path = "/v" + v + path
	}
	if len(query) > 0 {
		path += "?" + query.Encode()
	}
	return c.do(ctx, method, path, body)
}

func (c *Client) do(ctx context.Context, method, path string, body io.Reader) (*http.Response, error) {
	return c.send(ctx, method, path, "application/json", body)
}

func (c *Client) send(ctx context.Context, method, path, contentType string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://docker"+path, body)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", contentType)
	}
	res, err := c.http.Do(req)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return nil, cause
		}
		var op *net.OpError
		if errors.As(err, &op) && op.Op == "dial" {
			return nil, fmt.Errorf("%w at %s: %w", ErrNoEngine, c.socket, op.Err)
		}
		return nil, fmt.Errorf("docker engine at %s: %w", c.socket, err)
	}
	if res.StatusCode/100 == 2 {
		return res, nil
	}
	defer drain(res.Body)
	e := &APIError{Request: method + " " + path, Status: res.StatusCode}
	text, _ := io.ReadAll(io.LimitReader(res.Body, 64<<10))
	var m struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(text, &m) == nil && m.Message != "" {
		e.Message = m.Message
	} else if e.Message = strings.TrimSpace(string(text)); e.Message == "" {
		e.Message = http.StatusText(res.StatusCode)
	}
	return nil, e
}

// drain reads the rest of a short body so that the connection can be used again.
func drain(b io.ReadCloser) {
	_, _ = io.CopyN(io.Discard, b, 64<<10)
	_ = b.Close()
}

// answerLimit bounds an answer in bytes; the inspection of a container is some 10 KiB.
const answerLimit = 16 << 20

func (c *Client) getJSON(ctx context.Context, path string, query url.Values, v any) (raw []byte, err error) {
	res, err := c.get(ctx, path, query)
	if err != nil {
		return nil, err
	}
	defer drain(res.Body)
	raw, err = io.ReadAll(io.LimitReader(res.Body, answerLimit+1))
	if err != nil {
		return nil, fmt.Errorf("docker engine: GET %s: %w", path, err)
	}
	if len(raw) > answerLimit {
		return nil, fmt.Errorf("docker engine: GET %s: answer is longer than %d MiB", path, answerLimit>>20)
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return nil, fmt.Errorf("docker engine: GET %s: %w", path, err)
	}
	return raw, nil
}

// Container is the inspection of one container: the fields that matter here.
type Container struct {
	ID      string `json:"Id"`
	Name    string `json:"Name"` // with a slash before it
	ImageID string `json:"Image"`
	Path    string `json:"Path"`
	Args    []string
	State   State
	Config  struct {
		User       string
		Env        []string
		Image      string // as it was named when the container was made
		WorkingDir string
		Labels     map[string]string
		StopSignal string // "" is SIGTERM
	}
	HostConfig struct {
		RestartPolicy RestartPolicy
		AutoRemove    bool   // --rm
		NetworkMode   string // "container:ID" for that of another one, as are the following
		PidMode       string
		IpcMode       string
	}
	Mounts []Mount
	// Raw is the whole answer.
	Raw json.RawMessage `json:"-"`
}

// State is what a container does. One that is paused, or waits to be restarted, is running as well.
type State struct {
	Status     string // created, running, paused, restarting, removing, exited, dead
	Running    bool
	Paused     bool
	Restarting bool
	Pid        int // of the first process, as the engine's host numbers it; 0 if there is none
	ExitCode   int
	Error      string // why the last start failed
	Health     *struct {
		Status string // starting, healthy, unhealthy, none
	}
}

// RestartPolicy says when the engine brings a container back.
type RestartPolicy struct {
	Name              string // "", no, always, unless-stopped, on-failure
	MaximumRetryCount int    // of on-failure
}

// Mount is one mount of a container.
type Mount struct {
	Type        string // bind, volume, tmpfs, ...
	Name        string // of a volume
	Source      string // on the engine's host
	Destination string // in the container
	RW          bool
}

// Inspect returns what the engine knows of a container, running or not.
//
// Errors: ErrNotFound, ErrNoEngine, *APIError.
func (c *Client) Inspect(ctx context.Context, name string) (*Container, error) {
	var k Container
	raw, err := c.getJSON(ctx, "/containers/"+url.PathEscape(name)+"/json", nil, &k)
	if err != nil {
		return nil, err
	}
	k.Name = strings.TrimPrefix(k.Name, "/")
	k.Raw = raw
	return &k, nil
}

// Summary is one line of a list of containers.
type Summary struct {
	ID     string `json:"Id"`
	Names  []string
	Image  string
	State  string
	Labels map[string]string
}

// List returns the containers, stopped ones as well, that bear all the labels. A label is "key" or
// "key=value".
func (c *Client) List(ctx context.Context, labels ...string) ([]Summary, error) {
	q := url.Values{"all": {"1"}}
	if len(labels) > 0 {
		f, err := json.Marshal(map[string][]string{"label": labels})
		if err != nil {
			return nil, err
		}
		q.Set("filters", string(f))
	}
	var l []Summary
	if _, err := c.getJSON(ctx, "/containers/json", q, &l); err != nil {
		return nil, err
	}
	for i := range l {
		for k, n := range l[i].Names {
			l[i].Names[k] = strings.TrimPrefix(n, "/")
		}
	}
	return l, nil
}

// Image is the inspection of one image.
type Image struct {
	ID          string `json:"Id"` // sha256:...
	RepoTags    []string
	RepoDigests []string // name@sha256:...
	Size        int64    // bytes
	Config      struct {
		Entrypoint []string
		Labels     map[string]string
		WorkingDir string
	}
	Raw json.RawMessage `json:"-"`
}

// Digest returns the digest under which a registry knows the image, or its id if none does.
func (i *Image) Digest() string {
	for _, d := range i.RepoDigests {
		if _, digest, ok := strings.Cut(d, "@"); ok {
			return digest
		}
	}
	return i.ID
}

// InspectImage returns what the engine knows of an image, given by name or id.
//
// Errors: ErrNotFound, ErrNoEngine, *APIError.
func (c *Client) InspectImage(ctx context.Context, name string) (*Image, error) {
	var i Image
	raw, err := c.getJSON(ctx, "/images/"+escapeName(name)+"/json", nil, &i)
	if err != nil {
		return nil, err
	}
	i.Raw = raw
	return &i, nil
}

// SaveImage streams an image with all its layers as a tar archive, as `docker save` makes it. The
// caller closes it. A name keeps its tag in the archive, an id has none.
//
// Errors: ErrNotFound, ErrNoEngine, *APIError.
func (c *Client) SaveImage(ctx context.Context, name string) (io.ReadCloser, error) {
	res, err := c.get(ctx, "/images/"+escapeName(name)+"/get", nil)
	if err != nil {
		return nil, err
	}
	return res.Body, nil
}

// Volume is the inspection of one volume.
type Volume struct {
	Name       string
	Driver     string
	Mountpoint string // on the engine's host
	Labels     map[string]string
	Options    map[string]string
}

// InspectVolume returns what the engine knows of a volume.
//
// Errors: ErrNotFound, ErrNoEngine, *APIError.
func (c *Client) InspectVolume(ctx context.Context, name string) (*Volume, error) {
	var v Volume
	if _, err := c.getJSON(ctx, "/volumes/"+url.PathEscape(name), nil, &v); err != nil {
		return nil, err
	}
	return &v, nil
}

// escapeName escapes an image name; the engine wants its slashes as they are.
func escapeName(name string) string {
	parts := strings.Split(name, "/")
	for i := range parts {
		parts[i] = url.PathEscape(parts[i])
	}
	return strings.Join(parts, "/")
}
