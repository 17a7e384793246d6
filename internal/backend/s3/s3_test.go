package s3_test

import (
	"context"
	"errors"
	"io"
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

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/backendtest"
	bs3 "github.com/holdfast-backup/holdfast/internal/backend/s3"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/s3"
	"github.com/holdfast-backup/holdfast/internal/s3/s3test"
)

func open(t *testing.T, so s3.Options, o bs3.Options) *bs3.Backend {
	t.Helper()
	c, err := s3.New(context.Background(), so)
	if err != nil {
		t.Fatal(err)
	}
	o.Client = c
	be := bs3.New(o)
	t.Cleanup(func() { be.Close() })
	return be
}

func TestLaws(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{})
	var n atomic.Int32
	backendtest.Run(t, func(t *testing.T) backend.Backend {
		// A bucket that Create makes, and parts for what is large.
		return open(t, srv.Options(), bs3.Options{Bucket: "laws" + string(rune('a'+n.Add(1))), Prefix: "/some//place/", PartsFrom: 6 << 20})
	})
}

func TestLawsLocked(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{Versioning: true, TLS: true})
	backendtest.Run(t, func(t *testing.T) backend.Backend {
		return open(t, srv.Options(), bs3.Options{Bucket: srv.Bucket(t, true, true), LockDays: 1})
	})
}

func pack(seed uint64, n int) (backend.Handle, []byte) {
	data := backendtest.Bytes(seed, n)
	return backend.Handle{Type: backend.PackFile, Name: id.Hash(data).String()}, data
}

// Locked files survive their removal, locks are never locked.
func TestObjectLock(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{Versioning: true})
	bucket := srv.Bucket(t, true, true)
	ctx := context.Background()
	be := open(t, srv.Options(), bs3.Options{Bucket: bucket, LockDays: 3, LockCompliance: true})
	h, data := pack(1, 1000)
	lock := backend.Handle{Type: backend.LockFile, Name: h.Name}
	for _, h := range []backend.Handle{h, lock} {
		if err := be.Save(ctx, h, data); err != nil {
			t.Fatal(err)
		}
	}
	c, err := srv.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	retention := func(key string) (string, time.Duration) {
		info, err := c.StatObject(ctx, bucket, key, minio.StatObjectOptions{})
		if err != nil {
			t.Fatal(err)
		}
		until, _ := time.Parse(time.RFC3339, info.Metadata.Get("X-Amz-Object-Lock-Retain-Until-Date"))
		return info.Metadata.Get("X-Amz-Object-Lock-Mode"), time.Until(until)
	}
	if mode, left := retention("data/" + h.Name[:2] + "/" + h.Name); mode != "COMPLIANCE" || left < 70*time.Hour || left > 73*time.Hour {
		t.Errorf("retention %v for %v", mode, left)
	}
	if mode, left := retention("locks/" + h.Name); mode != "" {
		t.Errorf("a lock is locked for %v", left)
	}
	// Locks are shown, and made longer, never shorter or weaker.
	weak := open(t, srv.Options(), bs3.Options{Bucket: bucket, LockDays: 1})
	if can, err := weak.CanRetain(ctx); err != nil || !can {
		t.Errorf("Object Lock: %v, %v", can, err)
	}
	old, err := weak.Retention(ctx, h)
	if err != nil || old.Mode != "COMPLIANCE" || time.Until(old.Until) < 70*time.Hour {
		t.Errorf("%+v, %v", old, err)
	}
	if none, err := weak.Retention(ctx, lock); err != nil || !none.Until.IsZero() {
		t.Errorf("of a lock file: %+v, %v", none, err)
	}
	if _, err := weak.Retention(ctx, backend.Handle{Type: backend.PackFile, Name: strings.Repeat("0", 64)}); !errors.Is(err, backend.ErrNotExist) {
		t.Errorf("of what is not there: %v", err)
	}
	for _, until := range []time.Time{time.Now().Add(100 * time.Hour).Truncate(time.Second), time.Now().Add(time.Hour)} {
		if err := weak.Retain(ctx, h, until); err != nil {
			t.Error(err)
		}
		if got, err := weak.Retention(ctx, h); err != nil || got.Mode != "COMPLIANCE" || time.Until(got.Until) < 99*time.Hour {
			t.Errorf("%+v, %v", got, err)
		}
	}
	// What forget and prune remove is gone for the repository, and its version stays locked.
	if err := weak.Remove(ctx, h); err != nil {
		t.Error(err)
	}
	if _, err := weak.Stat(ctx, h); !errors.Is(err, backend.ErrNotExist) {
		t.Errorf("after the removal: %v", err)
	}
	left := 0
	for o := range c.ListObjects(ctx, bucket, minio.ListObjectsOptions{Prefix: "data/", Recursive: true, WithVersions: true}) {
		if o.Err != nil {
			t.Fatal(o.Err)
		}
		if !o.IsDeleteMarker {
			left++
			if err := c.RemoveObject(ctx, bucket, o.Key, minio.RemoveObjectOptions{VersionID: o.VersionID}); err == nil {
				t.Error("a locked version was removed")
			}
		}
	}
	if left != 1 {
		t.Errorf("%d versions are left", left)
	}
	// A bucket without Object Lock: said clearly.
	plain := open(t, srv.Options(), bs3.Options{Bucket: srv.Bucket(t, false, false), LockDays: 3})
	err = plain.Save(ctx, h, data)
	var hint interface{ Hints() []string }
	var pe *backend.PermanentError
	if !errors.As(err, &pe) || !errors.As(err, &hint) || len(hint.Hints()) == 0 || !strings.Contains(hint.Hints()[0], "--s3-object-lock-days") {
		t.Errorf("no lock: %v", err)
	}
}

// A server that refuses to remove a locked file: the error says until when.
func TestLockedFileIsNotRemoved(t *testing.T) {
	until := time.Now().Add(50 * time.Hour).UTC().Truncate(time.Second)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/xml")
		w.Header().Set("Last-Modified", time.Now().UTC().Format(http.TimeFormat))
		w.Header().Set("ETag", `"x"`)
		switch {
		case r.Method == http.MethodHead:
			w.Header().Set("X-Amz-Object-Lock-Mode", "GOVERNANCE")
			w.Header().Set("X-Amz-Object-Lock-Retain-Until-Date", until.Format(time.RFC3339))
		case r.Method == http.MethodDelete:
			w.WriteHeader(http.StatusForbidden)
			io.WriteString(w, "<Error><Code>AccessDenied</Code><Message>no</Message></Error>")
		}
	}))
	defer srv.Close()
	be := open(t, s3.Options{Endpoint: srv.URL, AccessKey: "a", SecretKey: "b", Region: "r", Tries: 1}, bs3.Options{Bucket: "bucket"})
	h, _ := pack(1, 1)
	err := be.Remove(context.Background(), h)
	var pe *backend.PermanentError
	var hint interface{ Hints() []string }
	if !errors.As(err, &pe) || !strings.Contains(err.Error(), "locked until "+until.Local().Format(time.DateTime)) || !errors.As(err, &hint) || !strings.Contains(hint.Hints()[0], "again after that") {
		t.Errorf("%v", err)
	}
}

// Stat of the config tells a missing repository from a wrong key, though HEAD answers 404 to both.
func TestWhatIsMissing(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{})
	ctx := context.Background()
	config := backend.Handle{Type: backend.ConfigFile}
	if _, err := open(t, srv.Options(), bs3.Options{Bucket: "no-such-bucket"}).Stat(ctx, config); !errors.Is(err, backend.ErrNotExist) {
		t.Errorf("no bucket: %v", err)
	}
	never := func(fi backend.FileInfo) error { t.Errorf("listed %v", fi); return nil }
	if err := open(t, srv.Options(), bs3.Options{Bucket: "no-such-bucket"}).List(ctx, backend.KeyFile, never); err != nil {
		t.Errorf("no bucket: %v", err)
	}
	// A bucket that vanishes is never an empty list of snapshots.
	if err := open(t, srv.Options(), bs3.Options{Bucket: "no-such-bucket"}).List(ctx, backend.SnapshotFile, never); !errors.Is(err, s3.ErrNoBucket) {
		t.Errorf("no bucket: %v", err)
	}
	o := srv.Options()
	o.AccessKey = "nobody"
	_, err := open(t, o, bs3.Options{Bucket: srv.Bucket(t, false, false)}).Stat(ctx, config)
	if errors.Is(err, backend.ErrNotExist) || !errors.Is(err, s3.ErrBadCredentials) {
		t.Errorf("wrong key: %v", err)
	}
}

// An upload that was cancelled leaves no parts behind.
func TestAbortedParts(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{})
	bucket := srv.Bucket(t, false, false)
	u, err := url.Parse(srv.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = u.Scheme, u.Host }}
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("partNumber") == "2" {
			cancel()
		}
		proxy.ServeHTTP(w, r)
	}))
	defer front.Close()
	o := srv.Options()
	o.Endpoint = front.URL
	be := open(t, o, bs3.Options{Bucket: bucket, PartsFrom: 6 << 20})
	h, data := pack(2, 13<<20)
	if err := be.Save(ctx, h, data); !errors.Is(err, context.Canceled) {
		t.Errorf("Save: %v", err)
	}
	c, err := srv.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	res, err := c.Core().ListMultipartUploads(context.Background(), bucket, "", "", "", "", 10)
	if err != nil || len(res.Uploads) != 0 {
		t.Errorf("%d uploads left, %v", len(res.Uploads), err)
	}
}

// A server that answers from another place of the file, or with all of it, is not believed.
func TestLyingServer(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Last-Modified", time.Now().UTC().Format(http.TimeFormat))
		w.Header().Set("ETag", `"x"`)
		switch {
		case strings.HasSuffix(r.URL.Path, "aa"):
			io.WriteString(w, "the whole file")
		default:
			w.Header().Set("Content-Range", "bytes 5-8/14")
			w.WriteHeader(http.StatusPartialContent)
			io.WriteString(w, "hole")
		}
	}))
	defer srv.Close()
	be := open(t, s3.Options{Endpoint: srv.URL, AccessKey: "a", SecretKey: "b", Region: "r", Tries: 1}, bs3.Options{Bucket: "bucket"})
	for _, c := range []string{"a", "b"} {
		h := backend.Handle{Type: backend.PackFile, Name: strings.Repeat(c, 64)}
		err := be.Load(context.Background(), h, 4, 4, func(io.Reader) error { t.Error("fn was called"); return nil })
		if err == nil {
			t.Error("no error")
		}
	}
}

// Files of others in the same bucket are passed over.
func TestStrays(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{})
	bucket := srv.Bucket(t, false, false)
	be := open(t, srv.Options(), bs3.Options{Bucket: bucket, Prefix: "p"})
	ctx := context.Background()
	h, data := pack(3, 10)
	if err := be.Save(ctx, h, data); err != nil {
		t.Fatal(err)
	}
	wrong := "0" + h.Name[1:2]
	if wrong == h.Name[:2] {
		wrong = "1" + h.Name[1:2]
	}
	for _, p := range []string{"p/data/stray", "p/data/" + wrong + "/" + h.Name, "p/data/zz/" + h.Name, "p/index/dir/" + h.Name, "q/data/ab/" + h.Name} {
		path := filepath.Join(srv.Dir, bucket, p)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, ft := range []backend.FileType{backend.PackFile, backend.IndexFile} {
		n := 0
		if err := be.List(ctx, ft, func(fi backend.FileInfo) error { n++; return nil }); err != nil {
			t.Fatal(err)
		}
		if want := map[backend.FileType]int{backend.PackFile: 1}[ft]; n != want {
			t.Errorf("%v: %d files, not %d", ft, n, want)
		}
	}
}
