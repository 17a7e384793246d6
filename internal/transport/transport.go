// Package transport makes the HTTP transports for everything that talks to a server: timeouts that
// end a hanging connection but never a slow one, own certificates, and words for what goes wrong.
package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"
)

// Options of New. The zero value works.
type Options struct {
	// CACert is a file with the certificates (PEM) that servers are checked against. Empty: the system's.
	CACert string
	// ClientCert is a file with a certificate and its private key (PEM) to show to servers.
	ClientCert string
	// Insecure accepts every certificate.
	Insecure bool
	// Connect is the longest time for a connection and its TLS handshake. Zero: 30 s.
	Connect time.Duration
	// Headers is the longest wait between the end of a request and its answer. Zero: 3 minutes, as
	// a busy object store may take its time to make an upload durable.
	Headers time.Duration
	// Idle is how long a connection may move no byte in either direction while it is used. Zero:
	// 3 minutes. A slow transfer that goes on is never cut off.
	Idle time.Duration
	// Connections is how many connections to one server are kept for reuse. Zero: 16.
	Connections int
	// Wrap, if given, is put around each connection: that is where bandwidth is limited.
	Wrap func(net.Conn) net.Conn
}

// New returns a transport. It speaks HTTP/1.1 only: one connection for each request at work is
// what gets large transfers through a slow network.
func New(o Options) (*http.Transport, error) {
	connect := orElse(o.Connect, 30*time.Second)
	idle := orElse(o.Idle, 3*time.Minute)
	headers := orElse(o.Headers, 3*time.Minute)
	tlsConf, err := tlsConfig(o)
	if err != nil {
		return nil, err
	}
	dialer := &net.Dialer{Timeout: connect, KeepAlive: 30 * time.Second}
	conns := o.Connections
	if conns <= 0 {
		conns = 16
	}
	return &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := dialer.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			// An answer may take as long as Headers without a byte moving.
			c = Watch(c, max(idle, headers))
			if o.Wrap != nil {
				c = o.Wrap(c)
			}
			return c, nil
		},
		TLSClientConfig:       tlsConf,
		TLSHandshakeTimeout:   connect,
		ResponseHeaderTimeout: headers,
		ExpectContinueTimeout: time.Second,
		IdleConnTimeout:       90 * time.Second,
		MaxIdleConns:          4 * conns,
		MaxIdleConnsPerHost:   conns,
		WriteBufferSize:       64 << 10,
		ReadBufferSize:        64 << 10,
		DisableCompression:    true, // sizes must be those of the stored bytes
		TLSNextProto:          map[string]func(string, *tls.Conn) http.RoundTripper{},
	}, nil
}

func orElse(d, def time.Duration) time.Duration {
	if d <= 0 {
		return def
	}
	return d
}

func tlsConfig(o Options) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: o.Insecure}
	if o.CACert != "" {
		pem, err := os.ReadFile(o.CACert)
		if err != nil {
			return nil, fmt.Errorf("cannot read the file with certificates of authorities: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("the file %q holds no certificate in PEM format", o.CACert)
		}
	}
	if o.ClientCert != "" {
		pem, err := os.ReadFile(o.ClientCert)
		if err != nil {
			return nil, fmt.Errorf("cannot read the file with the client certificate: %w", err)
		}
		cert, err := tls.X509KeyPair(pem, pem)
		if err != nil {
			// The library's words name the kind of trouble, never the key.
			return nil, fmt.Errorf("the file %q must hold a client certificate and its private key in PEM format: %w", o.ClientCert, err)
		}
		c.Certificates = []tls.Certificate{cert}
	}
	return c, nil
}

// Watch makes c fail when no byte has moved in either direction for limit while somebody waits for one.
func Watch(c net.Conn, limit time.Duration) net.Conn { return &watched{c, limit} }

// watched is a connection that fails when nothing has moved for limit.
type watched struct {
	net.Conn
	limit time.Duration
}

func (w *watched) Read(p []byte) (int, error) {
	if err := w.SetReadDeadline(time.Now().Add(w.limit)); err != nil {
		return 0, err
	}
	return w.Conn.Read(p)
}

// Write moves both deadlines: while a request goes out, the reader for its answer waits already.
func (w *watched) Write(p []byte) (n int, err error) {
	const step = 64 << 10 // a deadline counts for a whole Write, so no Write is large
	for len(p) > 0 && err == nil {
		if err := w.SetDeadline(time.Now().Add(w.limit)); err != nil {
			return n, err
		}
		var m int
		m, err = w.Conn.Write(p[:min(len(p), step)])
		n += m
		p = p[m:]
	}
	return n, err
}

// Explain tells what to do about an error of a request, and whether trying again is useless.
// An error it does not know gives nothing.
func Explain(err error) (hint string, permanent bool) {
	var (
		unknown *x509.UnknownAuthorityError
		u2      x509.UnknownAuthorityError
		host    x509.HostnameError
		invalid x509.CertificateInvalidError
		verify  *tls.CertificateVerificationError
		record  tls.RecordHeaderError
		dns     *net.DNSError
		op      *net.OpError
	)
	switch {
	case errors.As(err, &unknown) || errors.As(err, &u2):
		return "The server's certificate is signed by an authority that is not known here: name its certificate with --cacert.", true
	case errors.As(err, &host):
		return "The server's certificate is for another name: use the name that it is for.", true
	case errors.As(err, &invalid):
		return "The server's certificate is not valid, e.g. expired. Is this machine's clock right?", true
	case errors.As(err, &verify):
		return "The server's certificate was refused. --cacert names certificates to check against.", true
	case errors.As(err, &record) || errors.Is(err, http.ErrSchemeMismatch):
		return "The server does not speak TLS at this port: is it http instead of https, or another port?", true
	case errors.As(err, &op) && op.Op == "remote error": // an alert of TLS
		return "The server ended the TLS handshake. Does it want a client certificate (--tls-client-cert)?", true
	case errors.As(err, &dns) && dns.IsNotFound:
		return "The host name is not known to the name service. Is the address right?", true
	case errors.As(err, &dns):
		return "The name service did not answer.", false
	case errors.As(err, &op) && op.Op == "dial":
		return "Is the server running, and the address and port right?", false
	}
	return "", false
}
