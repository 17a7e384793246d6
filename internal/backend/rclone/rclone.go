// Package rclone keeps a repository on any of rclone's remotes, through `rclone serve restic --stdio`:
// restic's REST protocol over HTTP/2 on the standard input and output of rclone.
package rclone

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/child"
	"github.com/holdfast-backup/holdfast/internal/backend/rest"
	"github.com/holdfast-backup/holdfast/internal/userenv"
)

// Options of Open.
type Options struct {
	// Remote is rclone's: "name:path".
	Remote string
	// Program is the path of rclone. Empty: "rclone".
	Program string
	// Wrap is put around the connection, for limits. May be nil.
	Wrap func(net.Conn) net.Conn
	// Headers is how long an answer may take. Zero: 3 minutes.
	Headers time.Duration
	Version string
}

// server is rclone, started when it is needed and again when it has ended.
type server struct {
	o  Options
	mu sync.Mutex
	p  *child.Process // guarded by mu
	ok bool           // guarded by mu: it has answered once
}

// Open makes the backend. rclone is started by the first request.
func Open(o Options) (backend.Backend, error) {
	if o.Program == "" {
		o.Program = "rclone"
	}
	if strings.HasPrefix(o.Remote, "-") || !strings.Contains(o.Remote, ":") {
		return nil, fmt.Errorf("%q is no remote of rclone, which is written name:path", o.Remote)
	}
	if o.Headers <= 0 {
		o.Headers = 3 * time.Minute
	}
	s := &server{o: o}
	var h2c http.Protocols
	h2c.SetUnencryptedHTTP2(true)
	tr := &http.Transport{
		Protocols:             &h2c,
		ResponseHeaderTimeout: o.Headers,
		DisableCompression:    true,
		DialContext:           s.dial,
	}
	return rest.New(rest.Options{
		URL: &url.URL{Scheme: "http", Host: "localhost", Path: "/"}, Transport: &transport{tr, s},
		Location: "rclone:" + o.Remote, Close: s.close, Version: o.Version,
	}), nil
}

// dial starts rclone. An rclone that runs already has lost its connection and is ended.
func (s *server) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.p != nil {
		s.p.Kill()
		s.p = nil
	}
	// b2-hard-delete: else a removed file of B2 stays as an old version, as restic found.
	p, err := child.Start([]string{s.o.Program, "serve", "restic", "--stdio", "--b2-hard-delete", s.o.Remote}, userenv.ForRemotes())
	if err != nil {
		return nil, &startError{err}
	}
	s.p = p
	c := net.Conn(p)
	if s.o.Wrap != nil {
		c = s.o.Wrap(c)
	}
	return c, nil
}

func (s *server) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.p != nil {
		_ = s.p.Close()
		s.p = nil
	}
	return nil
}

type startError struct{ err error }

func (e *startError) Error() string { return "cannot start rclone: " + e.err.Error() }
func (e *startError) Unwrap() error { return e.err }
func (e *startError) Hints() []string {
	return []string{"Install rclone, or name it with --rclone-program."}
}

// transport adds rclone's last words to errors.
type transport struct {
	http.RoundTripper
	s *server
}

func (t *transport) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := t.RoundTripper.RoundTrip(r)
	t.s.mu.Lock()
	t.s.ok = t.s.ok || err == nil
	p, ok := t.s.p, t.s.ok
	t.s.mu.Unlock()
	var start *startError
	switch {
	case err == nil || r.Context().Err() != nil:
		return resp, err
	case errors.As(err, &start):
		return nil, &backend.PermanentError{Err: err}
	}
	if p != nil {
		err = p.Explain(err)
		if _, failed := p.Failed(); failed && !ok { // it would fail again: an unknown remote, a bad setting
			err = &backend.PermanentError{Err: err}
		}
	}
	return nil, err
}

// CloseIdleConnections lets http.Client close the connection.
func (t *transport) CloseIdleConnections() {
	t.RoundTripper.(*http.Transport).CloseIdleConnections()
}
