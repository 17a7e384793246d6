package docker

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// serve listens at a unix socket and returns a client for it.
func serve(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "docker.sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(h)
	s.Listener.Close()
	s.Listener = l
	s.Start()
	t.Cleanup(s.Close)
	c, err := New("unix://" + sock)
	if err != nil {
		t.Fatal(err)
	}
	if c.Socket() != sock {
		t.Fatalf("socket %q", c.Socket())
	}
	return c
}

// answers maps requests, as they arrive, to what an engine says; others are not found.
func answers(t *testing.T, m map[string]string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/_ping" {
			w.Header().Set("Api-Version", "1.47")
			_, _ = io.WriteString(w, "OK")
			return
		}
		if a, ok := m[r.Method+" "+r.URL.RequestURI()]; ok {
			_, _ = io.WriteString(w, a)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		_, _ = io.WriteString(w, `{"message":"no such object: `+r.URL.RequestURI()+`"}`)
	}
}

const inspected = `{"Id":"c0ffee","Created":"2026-01-02T03:04:05Z","Path":"/bin/sh","Args":["-c","ocis server"],
"State":{"Status":"running","Running":true,"Pid":4711},"Image":"sha256:aa","Name":"/full-ocis-1",
"Mounts":[{"Type":"volume","Name":"full_ocis-data","Source":"/var/lib/docker/volumes/full_ocis-data/_data","Destination":"/var/lib/ocis","Driver":"local","Mode":"z","RW":true,"Propagation":""}],
"Config":{"User":"1000:1000","Env":["OCIS_URL=https://x","A=b=c"],"Image":"owncloud/ocis:7.1.0","WorkingDir":"/var/lib/ocis","Labels":{"com.docker.compose.project":"full"}}}`

func TestRequests(t *testing.T) {
	c := serve(t, answers(t, map[string]string{
		"GET /v1.47/containers/full-ocis-1/json": inspected,
		"GET /v1.47/containers/json?all=1&filters=%7B%22label%22%3A%5B%22com.docker.compose.project%3Dfull%22%2C%22x%22%5D%7D": `[{"Id":"c0ffee","Names":["/full-ocis-1"],"Image":"owncloud/ocis:7.1.0","State":"running","Labels":{"a":"b"}}]`,
		"GET /v1.47/containers/json?all=1":                     `[]`,
		"GET /v1.47/images/registry:5000/owncloud/ocis:7/json": `{"Id":"sha256:aa","RepoTags":["owncloud/ocis:7"],"RepoDigests":["owncloud/ocis@sha256:dd"],"Size":123,"Config":{"Labels":{"org.opencontainers.image.version":"7.1.0"}}}`,
		"GET /v1.47/images/sha256:aa/get":                      "the archive",
		"GET /v1.47/volumes/full_ocis-data":                    `{"Name":"full_ocis-data","Driver":"local","Mountpoint":"/var/lib/docker/volumes/full_ocis-data/_data","Labels":null,"Options":null}`,
	}))
	ctx := context.Background()
	k, err := c.Inspect(ctx, "full-ocis-1")
	if err != nil {
		t.Fatal(err)
	}
	if k.ID != "c0ffee" || k.Name != "full-ocis-1" || k.ImageID != "sha256:aa" || k.State.Pid != 4711 || k.Config.Env[1] != "A=b=c" ||
		k.Mounts[0].Destination != "/var/lib/ocis" || k.Config.Labels["com.docker.compose.project"] != "full" || string(k.Raw) != inspected {
		t.Errorf("got %+v", k)
	}
	l, err := c.List(ctx, "com.docker.compose.project=full", "x")
	if err != nil || len(l) != 1 || l[0].Names[0] != "full-ocis-1" || l[0].Labels["a"] != "b" {
		t.Errorf("got %+v, %v", l, err)
	}
	if l, err = c.List(ctx); err != nil || len(l) != 0 {
		t.Errorf("got %+v, %v", l, err)
	}
	i, err := c.InspectImage(ctx, "registry:5000/owncloud/ocis:7")
	if err != nil || i.Digest() != "sha256:dd" || i.Size != 123 || len(i.Raw) == 0 {
		t.Errorf("got %+v, %v", i, err)
	}
	if i.RepoDigests = nil; i.Digest() != "sha256:aa" {
		t.Errorf("got %s", i.Digest())
	}
	v, err := c.InspectVolume(ctx, "full_ocis-data")
	if err != nil || v.Mountpoint != "/var/lib/docker/volumes/full_ocis-data/_data" {
		t.Errorf("got %+v, %v", v, err)
	}
	r, err := c.SaveImage(ctx, "sha256:aa")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if b, err := io.ReadAll(r); err != nil || string(b) != "the archive" {
		t.Errorf("got %q, %v", b, err)
	}
}

func TestErrors(t *testing.T) {
	ctx := context.Background()
	c := serve(t, answers(t, map[string]string{"GET /v1.47/containers/bad/json": "<html>"}))
	_, err := c.Inspect(ctx, "no/such?x")
	var api *APIError
	if !errors.Is(err, ErrNotFound) || !errors.As(err, &api) || api.Status != 404 || !strings.Contains(err.Error(), "no such object: /v1.47/containers/no%2Fsuch%3Fx/json") {
		t.Errorf("got %v", err)
	}
	if _, err := c.SaveImage(ctx, "x"); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v", err)
	}
	if _, err := c.Inspect(ctx, "bad"); err == nil || !strings.Contains(err.Error(), "/containers/bad/json") {
		t.Errorf("got %v", err)
	}

	gone, err := New("unix:///nonexistent/docker.sock")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := gone.Inspect(ctx, "x"); !errors.Is(err, ErrNoEngine) || !strings.Contains(err.Error(), "/nonexistent/docker.sock") {
		t.Errorf("got %v", err)
	}
	for _, host := range []string{"tcp://localhost:2375", "ssh://x", "unix://relative"} {
		if _, err := New(host); err == nil {
			t.Errorf("%s: no error", host)
		}
	}

	plain := serve(t, func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, " overloaded \n", http.StatusServiceUnavailable)
	})
	if _, err := plain.List(ctx); !errors.As(err, &api) || api.Message != "overloaded" {
		t.Errorf("got %v", err)
	}
	huge := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/_ping" {
			_, _ = w.Write(bytes.Repeat([]byte(" "), answerLimit+1))
		}
	})
	if _, err := huge.Inspect(ctx, "x"); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("got %v", err)
	}
}

func TestHost(t *testing.T) {
	t.Setenv("DOCKER_HOST", "unix:///run/x.sock")
	if c, err := New(""); err != nil || c.Socket() != "/run/x.sock" {
		t.Errorf("got %+v, %v", c, err)
	}
	t.Setenv("DOCKER_HOST", "tcp://h:1")
	if _, err := New(""); err == nil {
		t.Error("no error")
	}
}

// TestWithoutVersion: an engine that names no API version is asked without one.
func TestWithoutVersion(t *testing.T) {
	var path string
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		path = r.URL.Path
		_, _ = io.WriteString(w, "[]")
	})
	if _, err := c.List(context.Background()); err != nil || path != "/containers/json" {
		t.Errorf("asked %s, %v", path, err)
	}
}

func TestCancel(t *testing.T) {
	stop := make(chan struct{})
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/_ping" {
			<-stop
		}
	})
	defer close(stop)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Inspect(ctx, "x"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// TestSaveImageCutShort: a stream that ends early must not pass for a whole image.
func TestSaveImageCutShort(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/_ping" {
			return
		}
		_, _ = w.Write(bytes.Repeat([]byte("x"), 1<<20))
		panic(http.ErrAbortHandler)
	})
	r, err := c.SaveImage(context.Background(), "x")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.Copy(io.Discard, r); err == nil {
		t.Error("no error")
	}
}
