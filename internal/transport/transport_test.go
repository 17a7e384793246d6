package transport

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func get(t *testing.T, o Options, url string) error {
	t.Helper()
	tr, err := New(o)
	if err != nil {
		return err
	}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr}).Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

func write(t *testing.T, name string, blocks ...*pem.Block) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	var b strings.Builder
	for _, bl := range blocks {
		if err := pem.Encode(&b, bl); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(path, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// clientCert makes a self-signed certificate.
func clientCert(t *testing.T) (cert *x509.Certificate, file string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return cert, write(t, "client.pem", &pem.Block{Type: "CERTIFICATE", Bytes: der}, &pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})
}

func TestTLS(t *testing.T) {
	ok := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "ok") })
	srv := httptest.NewUnstartedServer(ok)
	quiet := log.New(io.Discard, "", 0)
	srv.Config.ErrorLog = quiet
	cert, certFile := clientCert(t)
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	srv.TLS = &tls.Config{}
	srv.StartTLS()
	defer srv.Close()
	mutual := httptest.NewUnstartedServer(ok)
	mutual.Config.ErrorLog = quiet
	mutual.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool, MaxVersion: tls.VersionTLS12}
	mutual.StartTLS()
	defer mutual.Close()
	plain := httptest.NewServer(ok)
	defer plain.Close()
	ca := write(t, "ca.pem", &pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})

	for _, c := range []struct {
		name, url string
		o         Options
		hint      string // "": it works
	}{
		{"system", srv.URL, Options{}, "--cacert"},
		{"ca", srv.URL, Options{CACert: ca}, ""},
		{"insecure", srv.URL, Options{Insecure: true}, ""},
		{"wrong name", strings.Replace(srv.URL, "127.0.0.1", "localhost", 1), Options{CACert: ca}, "another name"},
		{"no client certificate", mutual.URL, Options{CACert: ca}, "--tls-client-cert"},
		{"client certificate", mutual.URL, Options{CACert: ca, ClientCert: certFile}, ""},
		{"no TLS", strings.Replace(plain.URL, "http:", "https:", 1), Options{}, "does not speak TLS"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := get(t, c.o, c.url)
			if c.hint == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			hint, permanent := Explain(err)
			if err == nil || !permanent || !strings.Contains(hint, c.hint) {
				t.Errorf("error %v, hint %q, permanent %v", err, hint, permanent)
			}
		})
	}
	for _, o := range []Options{{CACert: "/nonexistent"}, {ClientCert: "/nonexistent"}, {CACert: certFile + "x"}, {ClientCert: ca}} {
		if _, err := New(o); err == nil {
			t.Errorf("%+v: no error", o)
		}
	}
}

// A server that says nothing is given up; one that sends slowly for much longer is not.
func TestIdle(t *testing.T) {
	const idle = 300 * time.Millisecond
	release := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/slow":
			for range 20 {
				io.WriteString(w, "x")
				w.(http.Flusher).Flush()
				time.Sleep(idle / 10)
			}
		case "/stuck":
			io.WriteString(w, "x")
			w.(http.Flusher).Flush()
			<-release
		case "/silent":
			<-release
		}
	}))
	defer srv.Close()
	defer close(release)
	o := Options{Idle: idle, Headers: idle}
	if err := get(t, o, srv.URL+"/slow"); err != nil {
		t.Errorf("slow: %v", err)
	}
	for _, path := range []string{"/stuck", "/silent"} {
		start := time.Now()
		if err := get(t, o, srv.URL+path); err == nil {
			t.Errorf("%s: no error", path)
		}
		if d := time.Since(start); d > 20*time.Second {
			t.Errorf("%s: given up after %v", path, d)
		}
	}
}

func TestExplainDial(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	url := "http://" + l.Addr().String()
	l.Close()
	err = get(t, Options{}, url)
	if hint, permanent := Explain(err); permanent || !strings.Contains(hint, "running") {
		t.Errorf("%v: hint %q, permanent %v", err, hint, permanent)
	}
	if hint, permanent := Explain(io.EOF); hint != "" || permanent {
		t.Errorf("EOF: %q, %v", hint, permanent)
	}
}
