package bucket

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/s3"
	"github.com/holdfast-backup/holdfast/internal/s3/s3test"
)

func open(t *testing.T, endpoint, name string) *Bucket {
	t.Helper()
	b, err := Open(t.Context(), Config{Endpoint: endpoint, Region: "us-east-1", Bucket: name, AccessKey: "access", SecretKey: "topsecret", Tries: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

// TestCopyInParts copies an object that is too large for one request.
func TestCopyInParts(t *testing.T) {
	limit, part := copyLimit, copyPart
	copyLimit, copyPart = 6<<20, 5<<20
	defer func() { copyLimit, copyPart = limit, part }()
	srv := s3test.Start(t, s3test.Options{})
	at := func(name string) *Bucket {
		b, err := Open(t.Context(), Config{Endpoint: srv.Endpoint, Region: srv.Region, Bucket: name, AccessKey: srv.AccessKey, SecretKey: srv.SecretKey})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(b.Close)
		return b
	}
	src, dst := at(srv.Bucket(t, false, false)), at(srv.Bucket(t, false, false))
	data := bytes.Repeat([]byte("0123456789abcdef"), 10<<20/16)
	for key, size := range map[string]int{"large": len(data), "small": 1000, "empty": 0} {
		x, err := src.Put(t.Context(), key, int64(size), func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data[:size])), nil })
		if err != nil {
			t.Fatal(err)
		}
		if x, err = dst.CopyFrom(t.Context(), src, x, key); err != nil || x.Size != int64(size) {
			t.Fatal(key, x, err)
		}
		r, err := dst.Get(t.Context(), key, "")
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(got, data[:size]) {
			t.Errorf("%s: %d bytes came back: %v", key, len(got), err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := dst.Get(t.Context(), "nothing", ""); !errors.Is(err, ErrNotFound) {
		t.Errorf("what is not there: %v", err)
	}
	for _, a := range dst.CheckAccess(t.Context(), ListBucket, GetObject, PutObject, DeleteObject) {
		if a.Err != nil || a.Untested != "" {
			t.Errorf("%+v", a)
		}
	}
}

// TestCopyThroughThisMachine: between two servers, and where a server does not copy or may not.
func TestCopyThroughThisMachine(t *testing.T) {
	t.Setenv("AWS_CA_BUNDLE", "")
	tls := s3test.Start(t, s3test.Options{TLS: true})
	plain := s3test.Start(t, s3test.Options{})
	at := func(srv *s3test.Server, endpoint, name string) *Bucket {
		if srv.CACert != "" { // the bucket of an instance may have a certificate of its own
			t.Setenv("AWS_CA_BUNDLE", srv.CACert)
			defer t.Setenv("AWS_CA_BUNDLE", "")
		}
		b, err := Open(t.Context(), Config{Endpoint: endpoint, Region: srv.Region, Bucket: name, AccessKey: srv.AccessKey, SecretKey: srv.SecretKey, PathStyle: true, Tries: 2})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(b.Close)
		return b
	}
	u, err := url.Parse(plain.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	var refused, asked atomic.Int32
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Amz-Copy-Source") != "" {
			refused.Add(1)
			answer(http.StatusNotImplemented, "<Error><Code>NotImplemented</Code></Error>")(w, r)
			return
		}
		asked.Add(1)
		(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = u.Scheme, u.Host }}).ServeHTTP(w, r)
	}))
	defer front.Close()
	data := bytes.Repeat([]byte("0123456789abcdef"), 12<<20/16)
	one, two := plain.Bucket(t, false, false), plain.Bucket(t, false, false)
	for _, c := range []struct {
		name     string
		src, dst *Bucket
	}{
		{"from http to https", at(plain, plain.Endpoint, one), at(tls, tls.Endpoint, tls.Bucket(t, false, false))},
		{"a server that does not copy", at(plain, front.URL, one), at(plain, front.URL, two)},
	} {
		c.dst.cfg.PartSize = 5 << 20 // the large one goes in parts
		for key, size := range map[string]int{"large": len(data), "small": 1000, "empty": 0} {
			x, err := c.src.Put(t.Context(), key, int64(size), func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data[:size])), nil })
			if err != nil {
				t.Fatal(err)
			}
			if x, err = c.dst.CopyFrom(t.Context(), c.src, x, key); err != nil || x.Size != int64(size) || x.ETag == "" {
				t.Fatalf("%s, %s: %+v, %v", c.name, key, x, err)
			}
			r, err := c.dst.Get(t.Context(), key, "")
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, data[:size]) {
				t.Errorf("%s, %s: %d bytes came back: %v", c.name, key, len(got), err)
			}
		}
	}
	if refused.Load() != 1 || asked.Load() == 0 {
		t.Errorf("%d copies were tried in vain", refused.Load())
	}
	// A certificate that nobody vouches for.
	b, err := Open(t.Context(), Config{Endpoint: tls.Endpoint, Region: tls.Region, Bucket: "bucket", AccessKey: tls.AccessKey, SecretKey: tls.SecretKey, Tries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, err := b.Stat(t.Context(), "x", ""); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("an unknown certificate: %v", err)
	}
}

func answer(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/xml")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

func TestAccessThatIsMissing(t *testing.T) {
	srv := httptest.NewServer(answer(http.StatusForbidden, `<Error><Code>AccessDenied</Code><Message>denied to access with topsecret</Message></Error>`))
	defer srv.Close()
	for _, a := range open(t, srv.URL, "bucket").CheckAccess(t.Context(), ListBucket, GetObject, PutObject, DeleteObject) {
		if a.Right == GetObject && a.Untested != "" {
			continue // who may not list is not told what is not there
		}
		if a.Err == nil {
			t.Errorf("%s: allowed", a.Right)
		} else if strings.Contains(a.Err.Error(), "topsecret") {
			t.Errorf("%s: the secret is in %q", a.Right, a.Err)
		}
	}
}

// TestAccessOneByOne takes each right away from keys that have the others, on a real server.
func TestAccessOneByOne(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{})
	u, err := url.Parse(srv.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	kind := func(r *http.Request) Right {
		switch {
		case r.Method == http.MethodPut, r.Method == http.MethodPost:
			return PutObject
		case r.Method == http.MethodDelete && !r.URL.Query().Has("uploadId"): // giving an upload up goes with s3:PutObject at most servers
			return DeleteObject
		case r.URL.Query().Has("list-type"):
			return ListBucket
		case strings.Count(strings.Trim(r.URL.Path, "/"), "/") > 0 && r.Method != http.MethodDelete:
			return GetObject
		}
		return ""
	}
	var denied []Right
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		k := kind(r)
		// As Amazon does it: who may not list is not told that something is not there.
		if slices.Contains(denied, k) || k == GetObject && slices.Contains(denied, ListBucket) {
			answer(http.StatusForbidden, "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")(w, r)
			return
		}
		(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = u.Scheme, u.Host }}).ServeHTTP(w, r)
	}))
	defer front.Close()
	name := srv.Bucket(t, false, false)
	b, err := Open(t.Context(), Config{Endpoint: front.URL, Region: srv.Region, Bucket: name, AccessKey: srv.AccessKey, SecretKey: srv.SecretKey, PathStyle: true, Tries: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	all := []Right{ListBucket, GetObject, PutObject, DeleteObject}
	for _, c := range []struct {
		denied         []Right
		none, untested string
	}{
		{nil, "", ""},
		{[]Right{ListBucket}, "s3:ListBucket", "s3:GetObject"},
		{[]Right{GetObject}, "s3:GetObject", ""},
		{[]Right{PutObject}, "s3:PutObject", ""},
		{[]Right{DeleteObject}, "s3:DeleteObject", ""},
		{[]Right{PutObject, DeleteObject}, "s3:PutObject s3:DeleteObject", ""},
		{all, "s3:ListBucket s3:PutObject s3:DeleteObject", "s3:GetObject"},
	} {
		denied = c.denied
		var none, untested []string
		for _, a := range b.CheckAccess(t.Context(), all...) {
			switch {
			case a.Err != nil:
				if !errors.Is(a.Err, s3.ErrAccessDenied) {
					t.Errorf("without %v: %s: %v", c.denied, a.Right, a.Err)
				}
				none = append(none, a.Right.Action())
			case a.Untested != "":
				untested = append(untested, a.Right.Action())
			}
		}
		if strings.Join(none, " ") != c.none || strings.Join(untested, " ") != c.untested {
			t.Errorf("without %v: found missing %q, untested %q", c.denied, none, untested)
		}
	}
	// Nothing is left behind.
	denied = nil
	if err := b.List(t.Context(), "", func(o Object) error { t.Errorf("object %s is there", o.Key); return nil }); err != nil {
		t.Error(err)
	}
	up, err := b.core.ListMultipartUploads(t.Context(), name, "", "", "", "", 10)
	if err != nil || len(up.Uploads) > 0 {
		t.Errorf("%d uploads are left: %v", len(up.Uploads), err)
	}
}

func TestRules(t *testing.T) {
	rule := func(id, body string) string {
		return "<Rule><ID>" + id + "</ID><Status>Enabled</Status>" + body + "</Rule>"
	}
	srv := httptest.NewServer(answer(http.StatusOK, "<LifecycleConfiguration>"+
		rule("old", "<Filter><Prefix></Prefix></Filter><NoncurrentVersionExpiration><NoncurrentDays>30</NoncurrentDays></NoncurrentVersionExpiration>")+
		rule("few", "<Filter><Prefix>space/</Prefix></Filter><NoncurrentVersionExpiration><NewerNoncurrentVersions>3</NewerNoncurrentVersions></NoncurrentVersionExpiration>")+
		rule("tagged", "<Filter><Tag><Key>a</Key><Value>b</Value></Tag></Filter><NoncurrentVersionExpiration><NoncurrentDays>1</NoncurrentDays></NoncurrentVersionExpiration>")+
		rule("age", "<Filter></Filter><Expiration><Days>9</Days></Expiration>")+
		rule("parts", "<Filter></Filter><AbortIncompleteMultipartUpload><DaysAfterInitiation>7</DaysAfterInitiation></AbortIncompleteMultipartUpload>")+
		"<Rule><ID>off</ID><Status>Disabled</Status><Filter></Filter><NoncurrentVersionExpiration><NoncurrentDays>1</NoncurrentDays></NoncurrentVersionExpiration></Rule>"+
		"</LifecycleConfiguration>"))
	defer srv.Close()
	rules, err := open(t, srv.URL, "bucket").Rules(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range rules {
		s := r.ID
		if r.Ends {
			s += " ends"
		}
		if r.Touches("space/") {
			s += " space"
		}
		if r.Touches("other/") {
			s += " other"
		}
		got = append(got, s)
	}
	if want := "old ends space other|few ends space|age ends space other"; strings.Join(got, "|") != want {
		t.Errorf("got %q, want %q", strings.Join(got, "|"), want)
	}
	none := httptest.NewServer(answer(http.StatusNotImplemented, `<Error><Code>NotImplemented</Code></Error>`))
	defer none.Close()
	if rules, err := open(t, none.URL, "bucket").Rules(context.Background()); err != nil || len(rules) > 0 {
		t.Errorf("a server without rules: %v, %v", rules, err)
	}
}
