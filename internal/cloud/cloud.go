// Package cloud talks to a running Infinite Scale or OpenCloud server as its clients do: Graph for
// users, spaces, shares and tags, WebDAV for files, TUS for large uploads.
//
// A Client is made by New and may be used by many goroutines. It retries what a busy or restarting
// server refuses, gives up on a connection on which nothing moves, and never sends its secret to any
// host but the one it was told. What a server answers is data: names come back as they are, errors
// quote it.
//
// Facts about the server come from its documentation, its source and from watching one.
package cloud

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Options say which server to talk to, and how. URL and Secret are needed.
type Options struct {
	// URL is where the server is reached, such as https://cloud.example.org.
	URL string
	// User is the name for basic authentication: with the user's password, or with an app token.
	// Empty means that the secret is a bearer token.
	User string
	// Secret returns the password or token. It is asked again when the server no longer takes what it
	// returned, because tokens end while work goes on.
	Secret func() (string, error)
	// CA holds certificates in PEM that are trusted beside those of the system.
	CA []byte
	// Insecure takes any certificate.
	Insecure bool
	// PlainHTTP allows a URL without TLS to another machine. To this one it is always allowed.
	PlainHTTP bool
	// Dial makes all connections, if given, in place of the network.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// OnlyLoopback refuses to connect to anything but this machine.
	OnlyLoopback bool
	// Timeout is how long nothing may move on a connection; zero is 60 s. Three times as long is
	// waited for the answer to an upload, because the server may copy it first.
	Timeout time.Duration
	// Tries is how often a request is sent at most; zero is 8, which bridges about a minute.
	Tries int
	// Backoff is the wait before the second try; it doubles with each, up to 30 s. Zero is 500 ms.
	Backoff time.Duration
	// Rate bounds what is sent and received, in bytes a second each; zero is no bound.
	Rate int64
	// Agent names the program.
	Agent string
	// Retry is told of each request that is sent again.
	Retry func(error)
}

// Client talks to one server as one user.
type Client struct {
	opt    Options
	base   *url.URL
	http   *http.Client
	up     *rate.Limiter
	down   *rate.Limiter
	mu     sync.Mutex
	secret string
}

// burst is the most that one wait for the rate limit covers, in bytes: small enough for an even
// flow at low rates.
const burst = 64 << 10

// New makes a client. It connects to nothing.
//
// Errors: of the URL, the certificates, or a secret that would go over the network unprotected.
func New(o Options) (*Client, error) {
	u, err := url.Parse(o.URL)
	if err != nil {
		return nil, fmt.Errorf("the server's URL: %w", err)
	}
	switch {
	case u.Scheme != "https" && u.Scheme != "http" || u.Host == "":
		return nil, fmt.Errorf("the server's URL %q is not of the form https://HOST[:PORT]", o.URL)
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("the server's URL holds more than https://HOST[:PORT]/PATH; user and secret are given apart from it")
	case u.Scheme == "http" && !loopback(u.Hostname()) && !o.PlainHTTP:
		return nil, fmt.Errorf("%w to %s", ErrPlainHTTP, u.Host)
	}
	if o.Secret == nil {
		return nil, errors.New("no secret for the server")
	}
	if o.Timeout == 0 {
		o.Timeout = 60 * time.Second
	}
	if o.Tries == 0 {
		o.Tries = 8
	}
	if o.Backoff == 0 {
		o.Backoff = 500 * time.Millisecond
	}
	if o.Agent == "" {
		o.Agent = "holdfast"
	}
	u.Path = strings.TrimSuffix(u.Path, "/")
	u.RawPath = ""
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if len(o.CA) > 0 && !pool.AppendCertsFromPEM(o.CA) {
		return nil, errors.New("no certificate in PEM was found among those to trust")
	}
	dial := (&net.Dialer{Timeout: o.Timeout, KeepAlive: 30 * time.Second}).DialContext
	if o.Dial != nil {
		dial = o.Dial
	}
	t := &http.Transport{
		DialContext:         dial,
		TLSClientConfig:     &tls.Config{RootCAs: pool, InsecureSkipVerify: o.Insecure, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout: o.Timeout,
		MaxIdleConnsPerHost: 16,
		IdleConnTimeout:     90 * time.Second,
		// Bodies are compared with what was stored: they must come as they are.
		DisableCompression: true,
	}
	if !loopback(u.Hostname()) && o.Dial == nil {
		t.Proxy = http.ProxyFromEnvironment
	}
	if o.OnlyLoopback {
		t.Proxy = nil
		t.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			host, _, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			if !loopback(host) {
				return nil, fmt.Errorf("%s %w", host, errNotHere)
			}
			return dial(ctx, network, addr)
		}
	}
	c := &Client{
		opt: o, base: u,
		http: &http.Client{
			Transport: t,
			// A redirect could carry the secret to another host, and uploads cannot follow one.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
	if o.Rate > 0 {
		c.up = rate.NewLimiter(rate.Limit(o.Rate), burst)
		c.down = rate.NewLimiter(rate.Limit(o.Rate), burst)
	}
	return c, nil
}

// As is a client for the same server and another user; it shares connections and rate limit.
func (c *Client) As(user string, secret func() (string, error)) *Client {
	o := c.opt
	o.User, o.Secret = user, secret
	return &Client{opt: o, base: c.base, http: c.http, up: c.up, down: c.down}
}

// Host is the server's host and port as given in the URL.
func (c *Client) Host() string { return c.base.Host }

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.Unmap().IsLoopback()
}

// token returns the secret, asked for once, or again if the server refused the one named.
func (c *Client) token(refused string) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.secret != "" && c.secret != refused {
		return c.secret, nil
	}
	s, err := c.opt.Secret()
	if err != nil {
		return "", err
	}
	if s == "" {
		return "", errors.New("the secret for the server is empty")
	}
	c.secret = s
	return s, nil
}
