package docker

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// post sends body, if there is one, and reads the answer into v, if there is one.
func (c *Client) post(ctx context.Context, path string, query url.Values, body, v any) error {
	var r io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return err
		}
		r = bytes.NewReader(data)
	}
	res, err := c.request(ctx, http.MethodPost, path, query, r)
	var api *APIError
	if errors.As(err, &api) && api.Status == http.StatusNotModified {
		return nil // it is so already
	}
	if err != nil {
		return err
	}
	defer drain(res.Body)
	if v == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(res.Body, answerLimit)).Decode(v); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		return fmt.Errorf("docker engine: POST %s: %w", path, err)
	}
	return nil
}

func containerPath(name, verb string) string {
	return "/containers/" + url.PathEscape(name) + "/" + verb
}

// Start starts a container. One that runs is no error.
//
// Errors: ErrNotFound, ErrNoEngine, *APIError; so do those below.
func (c *Client) Start(ctx context.Context, name string) error {
	return c.post(ctx, containerPath(name, "start"), nil, nil, nil)
}

// Stop sends the container's stop signal to its first process and, after grace (rounded up to whole
// seconds), SIGKILL to all. It returns when the container has stopped. One that does not run is no
// error. The engine goes on with it if ctx ends.
func (c *Client) Stop(ctx context.Context, name string, grace time.Duration) error {
	seconds := int((grace + time.Second - 1) / time.Second)
	return c.post(ctx, containerPath(name, "stop"), url.Values{"t": {strconv.Itoa(seconds)}}, nil, nil)
}

// Kill sends a signal, such as SIGTERM, to the first process of a container. The engine takes it as
// the wish that the container ends, and does not restart it then.
func (c *Client) Kill(ctx context.Context, name, signal string) error {
	return c.post(ctx, containerPath(name, "kill"), url.Values{"signal": {signal}}, nil, nil)
}

// Pause freezes the processes of a container by the kernel.
func (c *Client) Pause(ctx context.Context, name string) error {
	return c.post(ctx, containerPath(name, "pause"), nil, nil, nil)
}

// Unpause lets them go on.
func (c *Client) Unpause(ctx context.Context, name string) error {
	return c.post(ctx, containerPath(name, "unpause"), nil, nil, nil)
}

// SetRestartPolicy changes when the engine brings a container back, running or not.
func (c *Client) SetRestartPolicy(ctx context.Context, name string, p RestartPolicy) error {
	if p.Name == "" {
		p.Name = "no"
	}
	body := struct{ RestartPolicy RestartPolicy }{p}
	return c.post(ctx, containerPath(name, "update"), nil, body, nil)
}

// Create makes a container and returns its id; body is what the engine's API wants.
func (c *Client) Create(ctx context.Context, body any) (string, error) {
	var a struct {
		ID string `json:"Id"`
	}
	err := c.post(ctx, "/containers/create", nil, body, &a)
	return a.ID, err
}

// Remove ends and removes a container, with the volumes that have no name. One that is not there is no error.
func (c *Client) Remove(ctx context.Context, name string) error {
	return c.delete(ctx, "/containers/"+url.PathEscape(name), url.Values{"force": {"1"}, "v": {"1"}})
}

// RemoveImage removes the name of an image, and the image if it has no other. One that is not there is
// no error.
func (c *Client) RemoveImage(ctx context.Context, name string) error {
	return c.delete(ctx, "/images/"+escapeName(name), nil)
}

func (c *Client) delete(ctx context.Context, path string, query url.Values) error {
	res, err := c.request(ctx, http.MethodDelete, path, query, nil)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	drain(res.Body)
	return nil
}

// Logs returns the last lines of what a container wrote to its output and error output.
func (c *Client) Logs(ctx context.Context, name string, lines int) (string, error) {
	q := url.Values{"stdout": {"1"}, "stderr": {"1"}, "tail": {strconv.Itoa(lines)}}
	res, err := c.get(ctx, containerPath(name, "logs"), q)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	return readStreams(res.Body), nil
}

// LoadImage takes in an archive as SaveImage gives it, and returns the name or id of the image in it.
func (c *Client) LoadImage(ctx context.Context, archive io.Reader) (string, error) {
	v, err := c.Ping(ctx)
	if err != nil {
		return "", err
	}
	path := "/images/load"
	if v != "" {
		path = "/v" + v + path
	}
	res, err := c.send(ctx, http.MethodPost, path, "application/x-tar", archive)
	if err != nil {
		return "", err
	}
	defer drain(res.Body)
	// What it says for people is the only place where the name stands.
	name := ""
	for dec := json.NewDecoder(io.LimitReader(res.Body, answerLimit)); ; {
		var line struct{ Stream, Error string }
		err := dec.Decode(&line)
		if err == io.EOF {
			break
		}
		if err != nil {
			return "", fmt.Errorf("docker engine: POST /images/load: %w", err)
		}
		if line.Error != "" {
			return "", fmt.Errorf("docker engine: POST /images/load: %s", line.Error)
		}
		for _, head := range []string{"Loaded image: ", "Loaded image ID: "} {
			if n, ok := strings.CutPrefix(strings.TrimSpace(line.Stream), head); ok && name == "" {
				name = n
			}
		}
	}
	if name == "" {
		return "", errors.New("docker engine: POST /images/load: it took in no image")
	}
	return name, nil
}

// Wait returns the exit code of a container as soon as it does not run.
func (c *Client) Wait(ctx context.Context, name string) (int, error) {
	var a struct{ StatusCode int }
	err := c.post(ctx, containerPath(name, "wait"), url.Values{"condition": {"not-running"}}, nil, &a)
	return a.StatusCode, err
}

// Process is one process of a container.
type Process struct {
	PID     int    // as the engine's host numbers it
	Parent  int    // as well
	Command string // program and arguments with a space between them
}

// Top lists the processes of a container. The engine asks its host's ps.
func (c *Client) Top(ctx context.Context, name string) ([]Process, error) {
	var a struct{ Processes [][]string }
	// The engine cuts the lines at spaces, so the one column that has them comes last.
	_, err := c.getJSON(ctx, containerPath(name, "top"), url.Values{"ps_args": {"-eo pid,ppid,args"}}, &a)
	if err != nil {
		return nil, err
	}
	var list []Process
	for _, row := range a.Processes {
		if len(row) < 3 {
			return nil, fmt.Errorf("docker engine: the processes of %s: %q is not understood", name, row)
		}
		pid, err1 := strconv.Atoi(row[0])
		parent, err2 := strconv.Atoi(row[1])
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("docker engine: the processes of %s: %w", name, err)
		}
		list = append(list, Process{PID: pid, Parent: parent, Command: strings.Join(row[2:], " ")})
	}
	return list, nil
}

// outputLimit bounds in bytes what Exec keeps of the output.
const outputLimit = 64 << 10

// Exec runs a command in a running container as the container's user. It returns its exit code, 126
// or 127 if it could not be run, and what it wrote to its output and error output.
func (c *Client) Exec(ctx context.Context, name string, command ...string) (code int, output string, err error) {
	var made struct {
		ID string `json:"Id"`
	}
	body := map[string]any{"Cmd": command, "AttachStdout": true, "AttachStderr": true}
	if err := c.post(ctx, containerPath(name, "exec"), nil, body, &made); err != nil {
		return 0, "", err
	}
	path := "/exec/" + url.PathEscape(made.ID)
	res, err := c.request(ctx, http.MethodPost, path+"/start", nil, strings.NewReader(`{"Detach":false,"Tty":false}`))
	if err != nil {
		return 0, "", err
	}
	output = readStreams(res.Body)
	_ = res.Body.Close()
	var state struct {
		Running  bool
		ExitCode int
	}
	for {
		if _, err := c.getJSON(ctx, path+"/json", nil, &state); err != nil {
			return 0, output, err
		}
		if !state.Running {
			return state.ExitCode, output, nil
		}
		// The output can end before the process does.
		select {
		case <-ctx.Done():
			return 0, output, context.Cause(ctx)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// readStreams reads output and error output to their end. They come in pieces with a head of 8
// bytes: which of the two it is, three zeros, the length.
func readStreams(r io.Reader) string {
	var b bytes.Buffer
	for {
		var head [8]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return b.String()
		}
		n := int64(binary.BigEndian.Uint32(head[4:]))
		keep := min(n, int64(outputLimit-b.Len()))
		if _, err := io.CopyN(&b, r, keep); err != nil {
			return b.String()
		}
		if _, err := io.CopyN(io.Discard, r, n-keep); err != nil {
			return b.String()
		}
	}
}
