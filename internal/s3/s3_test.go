package s3_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/holdfast-backup/holdfast/internal/s3"
	"github.com/holdfast-backup/holdfast/internal/s3/s3test"
	"github.com/holdfast-backup/holdfast/internal/transport"
)

const secret = "topsecretvalue"

func TestParseEndpoint(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"s3.example.com", "https://s3.example.com"},
		{"s3.example.com:9000", "https://s3.example.com:9000"},
		{"http://[::1]:9000/", "http://[::1]:9000"},
		{"https://key:topsecretvalue@host", ""},
		{"key:topsecretvalue@host:70000x", ""},
		{"ftp://host", ""}, {"https://", ""}, {"", ""}, {"https://host/path", ""}, {"https://host?x=y", ""}, {"https://:9000", ""},
	} {
		u, err := s3.ParseEndpoint(c.in)
		if c.want == "" {
			var e *s3.EndpointError
			if !errors.As(err, &e) || strings.Contains(err.Error(), secret) {
				t.Errorf("%q: %v", c.in, err)
			}
		} else if err != nil || u.String() != c.want {
			t.Errorf("%q: %v, %v", c.in, u, err)
		}
	}
}

// noAWS takes away what the tester's own environment says.
func noAWS(t *testing.T) (home string) {
	t.Helper()
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); strings.HasPrefix(name, "AWS_") {
			t.Setenv(name, "")
			os.Unsetenv(name)
		}
	}
	home = t.TempDir()
	t.Setenv("HOME", home)
	return home
}

func TestCredentials(t *testing.T) {
	sts := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.FormValue("WebIdentityToken") != "the-token" || r.FormValue("RoleArn") != "arn:aws:iam::1:role/x" {
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		fmt.Fprintf(w, `<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult><Credentials>
			<AccessKeyId>webid</AccessKeyId><SecretAccessKey>%s</SecretAccessKey><SessionToken>t</SessionToken><Expiration>%s</Expiration></Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>`,
			secret, time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
	}))
	defer sts.Close()
	var asked atomic.Int32
	role := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		fmt.Fprintf(w, `{"AccessKeyId":"role","SecretAccessKey":%q,"Token":"t","Expiration":%q}`, secret, time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
	}))
	defer role.Close()
	files := map[string]string{
		".aws/credentials": "[default]\naws_access_key_id=default\naws_secret_access_key=" + secret + "\n[other]\naws_access_key_id=other\naws_secret_access_key=" + secret + "\n[half]\naws_access_key_id=half\n",
		".aws/config":      "[default]\nregion=eu-test-1\n[profile other]\nregion=eu-test-2\n[profile proc]\ncredential_process=/bin/cat /nonexistent\n",
		"token":            "the-token\n",
	}
	for _, c := range []struct {
		name     string
		env      map[string]string
		files    bool
		o        s3.Options
		id, from string // the key, or what the error says
	}{
		{name: "nothing", from: "none were found"},
		{name: "given", env: map[string]string{"AWS_ACCESS_KEY_ID": "env", "AWS_SECRET_ACCESS_KEY": secret}, files: true, o: s3.Options{AccessKey: "given", SecretKey: secret}, id: "given", from: "the configuration"},
		{name: "half given", o: s3.Options{SecretKey: secret}, from: "only one of"},
		{name: "environment", env: map[string]string{"AWS_ACCESS_KEY_ID": "env", "AWS_SECRET_ACCESS_KEY": secret}, files: true, id: "env", from: "the environment"},
		{name: "half an environment", env: map[string]string{"AWS_SECRET_ACCESS_KEY": secret}, files: true, from: "only one of"},
		{name: "default profile", files: true, id: "default", from: `the profile "default"`},
		{name: "AWS_PROFILE", env: map[string]string{"AWS_PROFILE": "other"}, files: true, id: "other", from: `the profile "other"`},
		{name: "profile before environment", env: map[string]string{"AWS_ACCESS_KEY_ID": "env", "AWS_SECRET_ACCESS_KEY": secret}, files: true, o: s3.Options{Profile: "other"}, id: "other", from: `the profile "other"`},
		{name: "missing profile", files: true, o: s3.Options{Profile: "nobody"}, from: `"nobody"`},
		{name: "half a profile", files: true, o: s3.Options{Profile: "half"}, from: `"half"`},
		{name: "failing program", files: true, o: s3.Options{Profile: "proc"}, from: `"proc"`},
		{name: "no files", o: s3.Options{Profile: "other"}, from: "no file"},
		{name: "web identity", env: map[string]string{"AWS_WEB_IDENTITY_TOKEN_FILE": "HOME/token", "AWS_ROLE_ARN": "arn:aws:iam::1:role/x", "AWS_ENDPOINT_URL_STS": sts.URL}, files: true, id: "webid", from: "a web identity"},
		{name: "web identity refused", env: map[string]string{"AWS_WEB_IDENTITY_TOKEN_FILE": "HOME/token", "AWS_ROLE_ARN": "wrong", "AWS_ENDPOINT_URL_STS": sts.URL}, files: true, from: "was not accepted"},
		{name: "role not asked for", env: map[string]string{"AWS_CONTAINER_CREDENTIALS_FULL_URI": role.URL}, from: "none were found"},
		{name: "role", env: map[string]string{"AWS_CONTAINER_CREDENTIALS_FULL_URI": role.URL}, o: s3.Options{InstanceRole: true}, id: "role", from: "the instance's role"},
	} {
		t.Run(c.name, func(t *testing.T) {
			home := noAWS(t)
			if c.files {
				for name, text := range files {
					path := filepath.Join(home, name)
					if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
						t.Fatal(err)
					}
					if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			for k, v := range c.env {
				t.Setenv(k, strings.Replace(v, "HOME", home, 1))
			}
			c.o.Endpoint = "https://s3.example.com"
			before := asked.Load()
			cl, err := s3.New(context.Background(), c.o)
			if !c.o.InstanceRole && asked.Load() != before {
				t.Error("the provider of roles was asked")
			}
			if c.id == "" {
				var ce *s3.CredentialsError
				if !errors.As(err, &ce) || !strings.Contains(err.Error(), c.from) || len(ce.Hints()) == 0 {
					t.Errorf("error %v", err)
				}
				if err != nil && strings.Contains(err.Error(), secret) {
					t.Errorf("the error holds the secret: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer cl.Close()
			v, err := cl.GetCreds()
			if err != nil || v.AccessKeyID != c.id || v.SecretAccessKey != secret || !strings.HasPrefix(cl.Credentials, c.from) {
				t.Errorf("key %q from %q, %v", v.AccessKeyID, cl.Credentials, err)
			}
		})
	}
}

func TestErrors(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{})
	bucket := srv.Bucket(t, false, false)
	ctx := context.Background()
	good, err := srv.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer good.Close()
	put := func(c *s3.Client, bucket string, o minio.PutObjectOptions) error {
		_, err := c.PutObject(ctx, bucket, "k", bytes.NewReader([]byte("hello")), 5, o)
		return c.Explain("put", bucket, "k", err)
	}
	get := func(c *s3.Client, key string, from, to int64) error {
		var o minio.GetObjectOptions
		if err := o.SetRange(from, to); err != nil {
			t.Fatal(err)
		}
		r, _, _, err := c.Core().GetObject(ctx, bucket, key, o)
		if err == nil {
			_, err = io.ReadAll(r)
			r.Close()
		}
		return c.Explain("get", bucket, key, err)
	}
	if err := put(good, bucket, minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	with := func(change func(*s3.Options)) *s3.Client {
		o := srv.Options()
		change(&o)
		c, err := s3.New(ctx, o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		return c
	}
	busy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusServiceUnavailable)
		io.WriteString(w, `<Error><Code>SlowDown</Code><Message>Please reduce your request rate.`+"\x1b[31m"+`</Message></Error>`)
	}))
	defer busy.Close()
	fresh := minio.PutObjectOptions{}
	fresh.SetMatchETagExcept("*")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := "http://" + l.Addr().String()
	l.Close()

	for _, c := range []struct {
		name      string
		err       error
		kind      error
		permanent bool
		hint      string
	}{
		{"no object", get(good, "absent", 0, 0), s3.ErrNotFound, true, ""},
		{"no bucket", put(good, "no-such-bucket", minio.PutObjectOptions{}), s3.ErrNoBucket, true, "name of the bucket"},
		{"unknown key", put(with(func(o *s3.Options) { o.AccessKey = "nobody" }), bucket, minio.PutObjectOptions{}), s3.ErrBadCredentials, true, "AWS_ACCESS_KEY_ID"},
		{"wrong secret", put(with(func(o *s3.Options) { o.SecretKey = secret }), bucket, minio.PutObjectOptions{}), s3.ErrBadCredentials, true, "AWS_ACCESS_KEY_ID"},
		{"exists", put(good, bucket, fresh), s3.ErrChanged, true, ""},
		{"range", get(good, "k", 10, 20), s3.ErrRange, true, ""},
		{"busy", put(with(func(o *s3.Options) { o.Endpoint = busy.URL }), bucket, minio.PutObjectOptions{}), s3.ErrBusy, false, "later"},
		{"dead", put(with(func(o *s3.Options) { o.Endpoint = dead }), bucket, minio.PutObjectOptions{}), nil, false, "running"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var e *s3.Error
			if !errors.As(c.err, &e) {
				t.Fatalf("error %v", c.err)
			}
			if e.Kind != c.kind || (c.kind != nil && !errors.Is(c.err, c.kind)) || e.Permanent() != c.permanent {
				t.Errorf("%+v (%v): permanent %v", e, e, e.Permanent())
			}
			if h := strings.Join(e.Hints(), " "); !strings.Contains(h, c.hint) {
				t.Errorf("hint %q", h)
			}
			text := fmt.Sprintf("%v %+v", e, e)
			if strings.Contains(text, secret) || strings.Contains(text, srv.SecretKey) || strings.Contains(e.Error(), "\x1b") {
				t.Errorf("error %q", text)
			}
			if !strings.Contains(e.Error(), e.Endpoint) {
				t.Errorf("error %q does not say where", e)
			}
		})
	}
	cctx, cancel := context.WithCancel(ctx)
	cancel()
	_, err = good.StatObject(cctx, bucket, "k", minio.StatObjectOptions{})
	if err := good.Explain("stat", bucket, "k", err); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if good.Explain("x", bucket, "", nil) != nil {
		t.Error("an error from nothing")
	}
}

func TestTLSAndStyle(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{TLS: true, Domain: "localhost"})
	bucket := srv.Bucket(t, false, false)
	ctx := context.Background()
	for _, c := range []struct {
		name string
		o    func(*s3.Options)
		ok   bool
	}{
		{"path", func(o *s3.Options) {}, true},
		{"no authority", func(o *s3.Options) { o.Transport.CACert = "" }, false},
		{"insecure", func(o *s3.Options) { o.Transport = transport.Options{Insecure: true} }, true},
	} {
		o := srv.Options()
		c.o(&o)
		cl, err := s3.New(ctx, o)
		if err != nil {
			t.Fatal(err)
		}
		ok, err := cl.BucketExists(ctx, bucket)
		if (ok && err == nil) != c.ok {
			t.Errorf("%s: %v, %v", c.name, ok, err)
		}
		cl.Close()
	}
	// Not every machine resolves names below localhost, so the address tells.
	o := srv.Options()
	o.Style = s3.StyleVirtualHost
	_, port, _ := net.SplitHostPort(srv.Addr)
	o.Endpoint = "https://localhost:" + port
	cl, err := s3.New(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	defer cl.Close()
	if u, err := cl.PresignedGetObject(ctx, bucket, "k", time.Minute, nil); err != nil || u.Host != bucket+".localhost:"+port {
		t.Errorf("virtual host: %v, %v", u, err)
	}
}

// A server that asks for a client certificate.
func TestClientCertificate(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{TLS: true})
	bucket := srv.Bucket(t, false, false)
	cert, err := os.ReadFile(srv.CACert)
	if err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(filepath.Dir(srv.CACert), "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	both := filepath.Join(t.TempDir(), "client.pem")
	if err := os.WriteFile(both, append(cert, key...), 0o600); err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(cert)
	u, err := url.Parse(srv.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	proxy := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = u.Scheme, u.Host },
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}},
	}
	front := httptest.NewUnstartedServer(proxy)
	front.Config.ErrorLog = log.New(io.Discard, "", 0)
	front.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	front.StartTLS()
	defer front.Close()
	for _, file := range []string{both, ""} {
		o := srv.Options()
		o.Endpoint = front.URL
		o.Transport = transport.Options{Insecure: true, ClientCert: file}
		cl, err := s3.New(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		ok, err := cl.BucketExists(t.Context(), bucket)
		if with := file != ""; ok != with || (err == nil) != with {
			t.Errorf("with the certificate %v: %v, %v", with, ok, err)
		}
		cl.Close()
	}
}

func TestVersions(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{Versioning: true})
	bucket := srv.Bucket(t, true, true)
	ctx := context.Background()
	c, err := srv.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	until := time.Now().Add(time.Hour)
	for range 2 {
		if _, err := c.PutObject(ctx, bucket, "k", strings.NewReader("x"), 1, minio.PutObjectOptions{Mode: minio.Compliance, RetainUntilDate: until, SendContentMd5: true}); err != nil {
			t.Fatal(err)
		}
	}
	n := 0
	for v := range c.ListObjects(ctx, bucket, minio.ListObjectsOptions{WithVersions: true}) {
		if v.Err != nil {
			t.Fatal(v.Err)
		}
		n++
		err := c.Explain("remove", bucket, "k", c.RemoveObject(ctx, bucket, "k", minio.RemoveObjectOptions{VersionID: v.VersionID}))
		if !errors.Is(err, s3.ErrLocked) {
			t.Errorf("a locked version: %v", err)
		}
	}
	if n != 2 {
		t.Errorf("%d versions", n)
	}
}
