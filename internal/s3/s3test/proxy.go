package s3test

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// Effect is what a Proxy makes of a request.
type Effect uint8

// The effects.
const (
	// Pass does nothing to it.
	Pass Effect = iota
	// Late holds the answer back for a moment.
	Late
	// Busy answers 503 SlowDown instead of the server.
	Busy
	// Broken answers 500 instead of the server.
	Broken
	// Cut ends the connection before the server has heard of it.
	Cut
	// CutUp ends both connections when the server has got half of the body.
	CutUp
	// CutAfter lets the server do it, and ends the connection instead of an answer.
	CutAfter
	// CutDown ends the connection in the middle of the answer.
	CutDown
	// Short gives half of the answer as if that were all.
	Short
)

// Passing are the effects that a second try gets over.
var Passing = []Effect{Late, Busy, Broken, Cut, CutUp, CutAfter, CutDown}

func (e Effect) String() string {
	return [...]string{"pass", "late", "busy", "broken", "cut", "cut on the way up", "cut after", "cut on the way down", "short"}[e]
}

// Fault is what becomes of one request. Do, if it is given, runs just before the client notices: for Pass,
// Late, CutAfter, CutDown and Short the server has done its part by then, for CutUp half of it.
type Fault struct {
	Effect Effect
	Do     func()
}

// Judge decides about a request; n counts them from 1. It is called for one at a time.
type Judge func(n int, r *http.Request) Fault

// Proxy stands before a server, on loopback, and breaks what goes through it.
type Proxy struct {
	*httptest.Server
	target *url.URL
	tr     *http.Transport

	mu    sync.Mutex
	n     int   // guarded by mu
	judge Judge // guarded by mu; nil: all pass
}

// NewProxy starts a proxy before the server at an endpoint. It ends with the test.
func NewProxy(t testing.TB, endpoint string) *Proxy {
	t.Helper()
	u, err := url.Parse(endpoint)
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{target: u, tr: &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true}}
	p.Server = httptest.NewServer(p)
	t.Cleanup(func() {
		p.Close()
		p.tr.CloseIdleConnections()
	})
	return p
}

// Judge sets who decides from now on, and counts anew. It returns how many requests there were.
func (p *Proxy) Judge(j Judge) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.n
	p.n, p.judge = 0, j
	return n
}

// OnceEach is a judge that spoils the first try of each request, with the effects in turn.
func OnceEach(effects ...Effect) Judge {
	seen := map[string]bool{}
	return func(_ int, r *http.Request) Fault {
		key := r.Method + " " + r.URL.RequestURI()
		if seen[key] {
			return Fault{}
		}
		seen[key] = true
		return Fault{Effect: effects[len(seen)%len(effects)]}
	}
}

// From is a judge that spoils each request from the nth on.
func From(from int, e Effect) Judge {
	return func(n int, _ *http.Request) Fault {
		if n < from {
			return Fault{}
		}
		return Fault{Effect: e}
	}
}

func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	p.n++
	var f Fault
	if p.judge != nil {
		f = p.judge(p.n, r)
	}
	p.mu.Unlock()
	do := func() {
		if f.Do != nil {
			f.Do()
		}
	}
	hangUp := func() { panic(http.ErrAbortHandler) }
	switch f.Effect {
	case Busy, Broken:
		_, _ = io.Copy(io.Discard, r.Body)
		do()
		code, name := http.StatusServiceUnavailable, "SlowDown"
		if f.Effect == Broken {
			code, name = http.StatusInternalServerError, "InternalError"
		}
		w.Header().Set("Content-Type", "application/xml")
		w.WriteHeader(code)
		_, _ = io.WriteString(w, "<Error><Code>"+name+"</Code><Message>not now</Message></Error>")
		return
	case Cut:
		do()
		hangUp()
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		hangUp() // the client has gone
	}
	out := r.Clone(r.Context())
	out.URL.Scheme, out.URL.Host, out.RequestURI = p.target.Scheme, p.target.Host, ""
	out.Header.Del("Connection")
	out.Body, out.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	if len(body) == 0 {
		out.Body = nil
	}
	if f.Effect == CutUp {
		if len(body) > 1 {
			out.Body = io.NopCloser(io.MultiReader(bytes.NewReader(body[:len(body)/2]), broken{}))
			if resp, err := p.tr.RoundTrip(out); err == nil {
				_ = resp.Body.Close()
			}
		}
		do()
		hangUp()
	}
	resp, err := p.tr.RoundTrip(out)
	if err != nil {
		hangUp()
	}
	answer, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if err != nil {
		hangUp()
	}
	for name, values := range resp.Header {
		w.Header()[name] = values
	}
	w.Header().Del("Connection")
	w.Header().Del("Transfer-Encoding")
	if len(answer) > 0 {
		w.Header().Set("Content-Length", strconv.Itoa(len(answer)))
	}
	do()
	switch {
	case f.Effect == Late:
		time.Sleep(20 * time.Millisecond)
	case f.Effect == CutAfter, f.Effect == CutDown && len(answer) < 2:
		hangUp()
	case f.Effect == CutDown:
		w.WriteHeader(resp.StatusCode)
		_, _ = w.Write(answer[:len(answer)/2])
		w.(http.Flusher).Flush()
		hangUp()
	case f.Effect == Short && len(answer) > 1:
		answer = answer[:len(answer)/2]
		w.Header().Set("Content-Length", strconv.Itoa(len(answer)))
	}
	w.WriteHeader(resp.StatusCode)
	_, _ = w.Write(answer)
}

// broken is a body that breaks off.
type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, errors.New("broken off") }

// Object is the bucket and the key of a request, for buckets addressed by a path; the key is "" for
// requests about the bucket.
func Object(r *http.Request) (bucket, key string) {
	bucket, key, _ = strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	return bucket, key
}
