package cloud_test

import (
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/cloud"
	"github.com/holdfast-backup/holdfast/internal/cloud/cloudtest"
)

var noon = time.Date(2025, 3, 1, 12, 0, 0, 123456789, time.UTC)

func secret(s string) func() (string, error) { return func() (string, error) { return s, nil } }

func client(t *testing.T, s *cloudtest.Server, change ...func(*cloud.Options)) *cloud.Client {
	t.Helper()
	o := cloud.Options{URL: s.URL, User: "admin", Secret: secret("admin"), Backoff: time.Millisecond, Timeout: 10 * time.Second}
	for _, f := range change {
		f(&o)
	}
	c, err := cloud.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func file(data string) *cloud.File {
	sum := sha1.Sum([]byte(data))
	return &cloud.File{
		Size: int64(len(data)), ModTime: noon, SHA1: hex.EncodeToString(sum[:]),
		Open: func(_ context.Context, offset int64) (io.ReadCloser, error) {
			return io.NopCloser(strings.NewReader(data[offset:])), nil
		},
	}
}

func want(t *testing.T, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Errorf("got %v, want %v", err, target)
	}
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestFiles(t *testing.T) {
	s := cloudtest.New(t)
	c, ctx := client(t, s), t.Context()
	home := s.Home("admin")
	ok(t, c.Mkcol(ctx, home, "a"))
	want(t, c.Mkcol(ctx, home, "a"), cloud.ErrExists)
	want(t, c.Mkcol(ctx, home, "x/y"), cloud.ErrNoParent)
	want(t, c.Mkcol(ctx, home, "a/.."), cloud.ErrName)
	want(t, c.Put(ctx, home, "x/f", file("1")), cloud.ErrNoParent)
	want(t, c.Put(ctx, home, "a", file("1")), cloud.ErrNoParent)
	want(t, c.Put(ctx, home, "a/bad\nname", file("1")), cloud.ErrRejected)

	names := []string{"plain.txt", "Überraschung 100%.txt", "a+b&c=d?e#f;g", "space  twice", "quote\"'", "日本", "%2e%2e", "$a!b", "semi:colon"}
	for _, n := range names {
		ok(t, c.Put(ctx, home, "a/"+n, file("content of "+n)))
	}
	ok(t, c.Put(ctx, home, "a/empty", file("")))
	got := map[string]cloud.Entry{}
	ok(t, c.List(ctx, home, "/a/", func(e cloud.Entry) error { got[e.Name] = e; return nil }))
	if len(got) != len(names)+1 {
		t.Errorf("%d entries are listed of %d", len(got), len(names)+1)
	}
	for _, n := range names {
		f := file("content of " + n)
		if e := got[n]; e.Folder || e.Size != f.Size || e.SHA1 != f.SHA1 || !e.ModTime.Equal(noon.Truncate(time.Second)) || e.ID == "" || e.Processing {
			t.Errorf("%q: %+v", n, e)
		}
		r, err := c.Open(ctx, home, "a/"+n)
		ok(t, err)
		data, err := io.ReadAll(r)
		ok(t, err)
		ok(t, r.Close())
		if string(data) != "content of "+n {
			t.Errorf("%q holds %q", n, data)
		}
	}
	if e := got["empty"]; e.Size != 0 || e.SHA1 != "" || e.Folder {
		t.Errorf("empty: %+v", e)
	}
	if i := s.Items(home)["a/plain.txt"]; !i.ModTime.Equal(noon) {
		t.Errorf("the time is %v, want it to the nanosecond", i.ModTime)
	}
	e, err := c.Stat(ctx, home, "a")
	ok(t, err)
	if !e.Folder || e.Name != "a" {
		t.Errorf("a: %+v", e)
	}
	root, err := c.Stat(ctx, home, "")
	ok(t, err)
	if !root.Folder || root.Name != "" || root.ID != home+"!"+e.ID[strings.Index(home, "$")+1:strings.Index(e.ID, "!")] {
		t.Errorf("root: %+v", root)
	}
	_, err = c.Stat(ctx, home, "a/none")
	want(t, err, cloud.ErrNotFound)
	// A place in a space.
	inside, err := c.Stat(ctx, e.ID, "plain.txt")
	ok(t, err)
	if inside.ID != got["plain.txt"].ID {
		t.Errorf("by id: %+v", inside)
	}
}

func TestVersionsAndChecksums(t *testing.T) {
	s := cloudtest.New(t)
	c, ctx := client(t, s), t.Context()
	home := s.Home("admin")
	s.Write(home, "f", "old", noon.Add(-time.Hour))
	e, err := c.Stat(ctx, home, "f")
	ok(t, err)
	timid := file("new")
	timid.OnlyNew = true
	want(t, c.Put(ctx, home, "f", timid), cloud.ErrPrecondition)
	wrong := file("new")
	wrong.SHA1 = file("other").SHA1
	want(t, c.Put(ctx, home, "f", wrong), cloud.ErrChecksum)
	ok(t, c.Put(ctx, home, "f", file("new")))
	v, err := c.Versions(ctx, e.ID)
	ok(t, err)
	if len(v) != 1 || v[0].Size != 3 || !strings.HasPrefix(v[0].Key, e.NodeID()+".REV.2025-03-01T11:00:00") {
		t.Fatalf("versions: %+v", v)
	}
	r, err := c.OpenVersion(ctx, e.ID, v[0].Key)
	ok(t, err)
	data, _ := io.ReadAll(r)
	r.Close()
	if string(data) != "old" {
		t.Errorf("the version holds %q", data)
	}
	s.Lock(home, "f", true)
	want(t, c.Put(ctx, home, "f", file("newer")), cloud.ErrLocked)
	s.Lock(home, "f", false)
	s.SetQuota(home, 10)
	want(t, c.Put(ctx, home, "g", file("more than ten")), cloud.ErrQuota)
}

func TestProcessing(t *testing.T) {
	s := cloudtest.New(t)
	s.Processing = 3
	c, ctx := client(t, s), t.Context()
	home := s.Home("admin")
	ok(t, c.Put(ctx, home, "f", file("data")))
	e, err := c.Stat(ctx, home, "f")
	ok(t, err)
	if !e.Processing || e.Size != 4 {
		t.Errorf("%+v", e)
	}
	e, err = c.Settled(ctx, home, "f", time.Minute)
	ok(t, err)
	if e.Processing || e.SHA1 != file("data").SHA1 {
		t.Errorf("%+v", e)
	}
	ok(t, c.Put(ctx, home, "f2", file("data2")))
	r, err := c.Open(ctx, home, "f2") // 425 three times
	ok(t, err)
	r.Close()
	s.Processing = 1 << 30
	ok(t, c.Put(ctx, home, "f3", file("data3")))
	_, err = c.Settled(ctx, home, "f3", 5*time.Millisecond)
	want(t, err, cloud.ErrProcessing)
}

func TestRetry(t *testing.T) {
	for _, status := range []int{500, 502, 503, 504, 429, 425} {
		s := cloudtest.New(t)
		var left atomic.Int32
		left.Store(2)
		s.Fault = func(*http.Request) int {
			if left.Add(-1) >= 0 {
				return status
			}
			return 0
		}
		var told atomic.Int32
		c := client(t, s, func(o *cloud.Options) { o.Retry = func(error) { told.Add(1) } })
		ok(t, c.Put(t.Context(), s.Home("admin"), "f", file("data")))
		if told.Load() != 2 || s.Items(s.Home("admin"))["f"].Data != "data" {
			t.Errorf("%d: told of %d retries", status, told.Load())
		}
	}
	s := cloudtest.New(t)
	s.Fault = func(*http.Request) int { return 502 }
	c := client(t, s, func(o *cloud.Options) { o.Tries = 3 })
	_, err := c.Me(t.Context())
	var se *cloud.StatusError
	if !errors.As(err, &se) || se.Status != 502 || len(s.Requests()) != 3 {
		t.Errorf("got %v after %d requests", err, len(s.Requests()))
	}
	// What the server may have done already is not done twice.
	_, err = c.CreateDrive(t.Context(), "x", "")
	if !errors.As(err, &se) || len(s.Requests()) != 4 {
		t.Errorf("a space was asked for %d times: %v", len(s.Requests())-3, err)
	}
	for _, status := range []int{400, 403, 404, 507, 501} {
		n := len(s.Requests())
		s.Fault = func(*http.Request) int { return status }
		if _, err = c.Me(t.Context()); err == nil || len(s.Requests()) != n+1 {
			t.Errorf("%d: %v after %d requests", status, err, len(s.Requests())-n)
		}
	}
}

// TestCut breaks the connection in the middle of a body.
func TestCut(t *testing.T) {
	s := cloudtest.New(t)
	data := strings.Repeat("0123456789", 100000)
	var left atomic.Int32
	left.Store(3)
	s.Cut = func(r *http.Request) int64 {
		if r.Method == "PUT" && left.Add(-1) >= 0 {
			return 300000
		}
		return 0
	}
	c, home := client(t, s), s.Home("admin")
	ok(t, c.Put(t.Context(), home, "f", file(data)))
	if s.Items(home)["f"].Data != data || s.Count("PUT") != 4 {
		t.Errorf("%d bytes after %d tries", len(s.Items(home)["f"].Data), s.Count("PUT"))
	}
	// A failure of our own to give the data is told at once.
	bad, own := file(data), errors.New("no more")
	bad.Open = func(context.Context, int64) (io.ReadCloser, error) {
		return io.NopCloser(io.MultiReader(strings.NewReader(data[:500000]), failing{own})), nil
	}
	n := s.Count("PUT")
	want(t, c.Put(t.Context(), home, "f", bad), own)
	if s.Count("PUT") > n+1 {
		t.Errorf("it was tried %d times", s.Count("PUT")-n)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func TestResumable(t *testing.T) {
	s := cloudtest.New(t)
	s.PublicURL = "https://cloud.example.org" // nobody there: uploads go to the host we were given
	home := s.Home("admin")
	data := strings.Repeat("abcdefghij", 200000)
	var cuts atomic.Int32
	cuts.Store(4)
	s.Cut = func(r *http.Request) int64 {
		if r.Method == "PATCH" && cuts.Add(-1) >= 0 {
			return 250000
		}
		return 0
	}
	c := client(t, s)
	var session string
	var moved []int64
	res := cloud.Resumable{
		Chunk: 600000,
		Save:  func(x string) error { session = x; return nil },
		Moved: func(n int64) { moved = append(moved, n) },
	}
	ok(t, c.PutResumable(t.Context(), home, "f", file(data), res))
	i := s.Items(home)["f"]
	if i.Data != data || !i.ModTime.Equal(noon) || session == "" {
		t.Errorf("%d bytes of %v, session %q", len(i.Data), i.ModTime, session)
	}
	if !slices.IsSorted(moved) || moved[len(moved)-1] != int64(len(data)) || s.Count("POST") != 1 {
		t.Errorf("offsets %v, %d sessions", moved, s.Count("POST"))
	}
	want(t, c.PutResumable(t.Context(), home, "no/f", file(data), res), cloud.ErrNoParent)
	s.Lock(home, "f", true)
	want(t, c.PutResumable(t.Context(), home, "f", file(data), res), cloud.ErrLocked)
}

// TestResumableLater goes on with the session of a run that was killed.
func TestResumableLater(t *testing.T) {
	s := cloudtest.New(t)
	home := s.Home("admin")
	data := strings.Repeat("abcdefghij", 200000)
	kill := errors.New("killed")
	for _, forgotten := range []bool{false, true} {
		name := fmt.Sprintf("f%v", forgotten)
		c := client(t, s)
		ctx, cancel := context.WithCancelCause(t.Context())
		var session string
		sent := int64(0)
		f := file(data)
		f.Open = func(_ context.Context, offset int64) (io.ReadCloser, error) {
			return io.NopCloser(&counter{strings.NewReader(data[offset:]), &sent}), nil
		}
		res := cloud.Resumable{Chunk: 500000, Save: func(x string) error { session = x; return nil }, Moved: func(n int64) {
			if n == 1000000 {
				cancel(kill)
			}
		}}
		want(t, c.PutResumable(ctx, home, name, f, res), kill)
		if forgotten {
			s.DropSessions()
		}
		sent = 0
		res.Session, res.Moved = session, nil
		ok(t, c.PutResumable(t.Context(), home, name, f, res))
		if s.Items(home)[name].Data != data {
			t.Error("another content arrived")
		}
		if want := map[bool]int64{false: 1000000, true: 2000000}[forgotten]; sent != want {
			t.Errorf("forgotten %v: %d bytes were sent, want %d", forgotten, sent, want)
		}
	}
}

type counter struct {
	io.Reader
	n *int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	*c.n += int64(n)
	return n, err
}

func TestSecrets(t *testing.T) {
	s := cloudtest.New(t)
	s.AddToken("admin", "first")
	secrets := []string{"first", "second"}
	asked := 0
	c := client(t, s, func(o *cloud.Options) {
		o.User = ""
		o.Secret = func() (string, error) { asked++; return secrets[min(asked, 2)-1], nil }
	})
	ctx := t.Context()
	_, err := c.Me(ctx)
	ok(t, err)
	s.RemoveTokens("admin")
	s.AddToken("admin", "second")
	_, err = c.Me(ctx)
	ok(t, err)
	s.RemoveTokens("admin")
	_, err = c.Me(ctx)
	want(t, err, cloud.ErrUnauthorized)
	if strings.Contains(err.Error(), "second") {
		t.Errorf("the secret is in the message: %v", err)
	}
	_, err = client(t, s, func(o *cloud.Options) { o.Secret = secret("wrong") }).Me(ctx)
	want(t, err, cloud.ErrUnauthorized)

	for url, message := range map[string]string{
		"http://cloud.example.org":       "without TLS",
		"cloud.example.org":              "not of the form",
		"ftp://x":                        "not of the form",
		"https://admin:pw@cloud.example": "apart from it",
		"https://cloud.example/?x=y":     "apart from it",
	} {
		_, err := cloud.New(cloud.Options{URL: url, Secret: secret("s")})
		if err == nil || !strings.Contains(err.Error(), message) || strings.Contains(err.Error(), "pw") {
			t.Errorf("%s: %v", url, err)
		}
	}
}

// TestRedirect keeps the secret from a host that the server names.
func TestRedirect(t *testing.T) {
	var got atomic.Value
	other := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got.Store(r.Header.Get("Authorization")) }))
	defer other.Close()
	s := httptest.NewServer(http.RedirectHandler(other.URL, http.StatusFound))
	defer s.Close()
	c, err := cloud.New(cloud.Options{URL: s.URL, User: "u", Secret: secret("s")})
	ok(t, err)
	_, err = c.Me(t.Context())
	var se *cloud.StatusError
	if !errors.As(err, &se) || !strings.Contains(err.Error(), other.URL) || got.Load() != nil {
		t.Errorf("%v; the other host got %v", err, got.Load())
	}
}

func TestTLS(t *testing.T) {
	s, ca := cloudtest.NewTLS(t)
	_, err := client(t, s).Me(t.Context())
	if err == nil || !strings.Contains(err.Error(), "x509") || len(s.Requests()) != 0 {
		t.Errorf("an unknown certificate: %v", err)
	}
	_, err = client(t, s, func(o *cloud.Options) { o.CA = ca }).Me(t.Context())
	ok(t, err)
	_, err = client(t, s, func(o *cloud.Options) { o.Insecure = true }).Me(t.Context())
	ok(t, err)
	if _, err := cloud.New(cloud.Options{URL: s.URL, Secret: secret("s"), CA: []byte("nothing")}); err == nil {
		t.Error("no certificate was taken for one")
	}
}

// TestStall gives up on a server that answers nothing, and on one that stops in the middle.
func TestStall(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	defer l.Close()
	c, err := cloud.New(cloud.Options{
		URL: "http://" + l.Addr().String(), User: "u", Secret: secret("s"), Timeout: 50 * time.Millisecond, Tries: 2, Backoff: time.Millisecond,
	})
	ok(t, err)
	_, err = c.Me(t.Context())
	if err == nil || !strings.Contains(err.Error(), "nothing moved") {
		t.Errorf("got %v", err)
	}
	hs := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "100")
		_, _ = w.Write(make([]byte, 10))
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}))
	defer hs.Close()
	c, err = cloud.New(cloud.Options{URL: hs.URL, User: "u", Secret: secret("s"), Timeout: 50 * time.Millisecond})
	ok(t, err)
	r, err := c.Open(t.Context(), "drive", "f")
	ok(t, err)
	n, err := io.Copy(io.Discard, r)
	if n != 10 || err == nil || !strings.Contains(err.Error(), "nothing moved") {
		t.Errorf("%d bytes, %v", n, err)
	}
	r.Close()
	// A context that ends is told by its cause.
	why := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	r, err = c.Open(ctx, "drive", "f")
	ok(t, err)
	cancel(why)
	_, err = io.Copy(io.Discard, r)
	want(t, err, why)
	r.Close()
}

func TestRate(t *testing.T) {
	s := cloudtest.New(t)
	c := client(t, s, func(o *cloud.Options) { o.Rate = 1 << 20; o.Timeout = 50 * time.Millisecond })
	start := time.Now()
	// The first burst is free. Waiting for the limit is longer than the timeout and no stall.
	ok(t, c.Put(t.Context(), s.Home("admin"), "f", file(strings.Repeat("x", 400<<10))))
	if d := time.Since(start); d < 250*time.Millisecond {
		t.Errorf("400 KiB at 1 MiB/s took %v", d)
	}
}

// TestHostileAnswers shows that a list is whole or an error.
func TestHostileAnswers(t *testing.T) {
	head := `<?xml version="1.0"?><d:multistatus xmlns:d="DAV:" xmlns:oc="http://owncloud.org/ns">`
	entry := func(href string) string {
		return `<d:response><d:href>` + href + `</d:href><d:propstat><d:prop><d:resourcetype/></d:prop><d:status>HTTP/1.1 200 OK</d:status></d:propstat></d:response>`
	}
	self := entry("/dav/spaces/d/a/")
	for name, c := range map[string]struct{ body, message string }{
		"cut short":       {head + self + entry("/dav/spaces/d/a/x"), "unexpected EOF"},
		"cut in an entry": {head + self + entry("/dav/spaces/d/a/x")[:40], "EOF"},
		"empty":           {"", "unexpected EOF"},
		"no XML":          {"hello", "unexpected EOF"},
		"elsewhere":       {head + self + entry("/dav/spaces/d/b/x") + `</d:multistatus>`, "not in it"},
		"above":           {head + self + entry("/dav/spaces/d") + `</d:multistatus>`, "not in it"},
		"too deep":        {head + self + entry("/dav/spaces/d/a/b/c") + `</d:multistatus>`, "not in it"},
		"no address":      {head + entry("%zz") + `</d:multistatus>`, "not in it"},
		"endless entry":   {head + "<d:response><d:href>" + strings.Repeat("x", 9<<20) + "</d:href></d:response></d:multistatus>", "too long"},
	} {
		hs := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusMultiStatus)
			_, _ = w.Write([]byte(c.body))
		}))
		cl, err := cloud.New(cloud.Options{URL: hs.URL, User: "u", Secret: secret("s")})
		ok(t, err)
		err = cl.List(t.Context(), "d", "a", func(cloud.Entry) error { return nil })
		if err == nil || !strings.Contains(err.Error(), c.message) {
			t.Errorf("%s: %v", name, err)
		}
		hs.Close()
	}
	// An encoded slash is part of the name, and whoever writes it somewhere must look at it.
	hs := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusMultiStatus)
		_, _ = w.Write([]byte(head + self + entry("/dav/spaces/d/a/..%2F..%2Fetc") + `</d:multistatus>`))
	}))
	defer hs.Close()
	cl, err := cloud.New(cloud.Options{URL: hs.URL, User: "u", Secret: secret("s")})
	ok(t, err)
	var names []string
	ok(t, cl.List(t.Context(), "d", "a", func(e cloud.Entry) error { names = append(names, e.Name); return nil }))
	if !slices.Equal(names, []string{"../../etc"}) {
		t.Errorf("names %q", names)
	}
	want(t, cloud.CheckName(names[0]), cloud.ErrName)
}

// TestLongList lists a large folder entry by entry.
func TestLongList(t *testing.T) {
	const n = 20000
	hs := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusMultiStatus)
		var b bytes.Buffer
		b.WriteString(`<d:multistatus xmlns:d="DAV:"><d:response><d:href>/remote.php/dav/spaces/d/a/</d:href></d:response>`)
		for i := range n {
			fmt.Fprintf(&b, `<d:response><d:href>/remote.php/dav/spaces/d/a/f%d</d:href><d:propstat><d:prop><d:getcontentlength>%d</d:getcontentlength></d:prop><d:status>HTTP/1.1 200 OK</d:status></d:propstat></d:response>`, i, i)
		}
		b.WriteString(`</d:multistatus>`)
		_, _ = w.Write(b.Bytes())
	}))
	defer hs.Close()
	cl, err := cloud.New(cloud.Options{URL: hs.URL, User: "u", Secret: secret("s")})
	ok(t, err)
	i := 0
	ok(t, cl.List(t.Context(), "d", "a", func(e cloud.Entry) error {
		if e.Name != fmt.Sprintf("f%d", i) || e.Size != int64(i) {
			t.Fatalf("entry %d: %+v", i, e)
		}
		i++
		return nil
	}))
	if i != n {
		t.Errorf("%d entries", i)
	}
	stop := errors.New("stop")
	want(t, cl.List(t.Context(), "d", "a", func(cloud.Entry) error { return stop }), stop)
}

func TestGraph(t *testing.T) {
	s := cloudtest.New(t)
	alan := s.AddUser("alan", "pw")
	gid := s.AddGroup("makers")
	c, ctx := client(t, s), t.Context()
	me, err := c.Me(ctx)
	ok(t, err)
	if me.Name != "admin" {
		t.Errorf("me: %+v", me)
	}
	st, err := c.Status(ctx)
	ok(t, err)
	if st.Version != "1.0.0" {
		t.Errorf("status %+v", st)
	}
	u, err := c.User(ctx, "alan")
	ok(t, err)
	if u.ID != alan {
		t.Errorf("alan is %+v", u)
	}
	_, err = c.User(ctx, "nobody")
	want(t, err, cloud.ErrNotFound)
	groups, err := c.Groups(ctx)
	ok(t, err)
	if len(groups) != 1 || groups[0].ID != gid {
		t.Errorf("groups %+v", groups)
	}
	d, err := c.CreateDrive(ctx, "Restored", "of March")
	ok(t, err)
	if d.Name != "Restored" || d.Type != cloud.Project || d.Description != "of March" || d.Disabled() {
		t.Errorf("drive %+v", d)
	}
	_, err = c.CreateDrive(ctx, "a/b", "")
	want(t, err, cloud.ErrRejected)
	list, err := c.MyDrives(ctx)
	ok(t, err)
	if len(list) != 2 {
		t.Errorf("drives %+v", list)
	}
	roles, err := c.Roles(ctx)
	ok(t, err)
	if len(roles) < 5 || len(roles[0].Permissions) == 0 || len(roles[0].Permissions[0].Actions) == 0 {
		t.Errorf("roles %+v", roles)
	}
	ok(t, c.Invite(ctx, d.ID, "", cloud.Grantee{ID: alan}, cloudtest.RoleSpaceViewer, nil, time.Time{}))
	ok(t, c.Put(ctx, d.ID, "f", file("x")))
	e, err := c.Stat(ctx, d.ID, "f")
	ok(t, err)
	ok(t, c.Invite(ctx, d.ID, e.ID, cloud.Grantee{ID: gid, Group: true}, "", []string{"libre.graph/driveItem/basic/read"}, noon))
	err = c.Invite(ctx, d.ID, e.ID, cloud.Grantee{ID: "gone"}, cloudtest.RoleViewer, nil, time.Time{})
	want(t, err, cloud.ErrRejected)
	p, err := c.Permissions(ctx, d.ID, e.ID)
	ok(t, err)
	if len(p) != 1 || p[0].GrantedToV2.Group == nil || p[0].GrantedToV2.Group.ID != gid || len(p[0].Actions) != 1 {
		t.Errorf("permissions %+v", p)
	}
	ok(t, c.AddTags(ctx, e.ID, []string{"red", "blue"}))
	e, err = c.Stat(ctx, d.ID, "f")
	ok(t, err)
	if !slices.Equal(e.Tags, []string{"red", "blue"}) {
		t.Errorf("tags %q", e.Tags)
	}
	for _, tag := range []string{"", " ", "a,b", "b<lue", "b&w", "x\ny"} {
		want(t, c.AddTags(ctx, e.ID, []string{tag}), cloud.ErrName)
	}
	// Alan may look and not write.
	token, err := c.CreateToken(ctx, alan, time.Hour)
	ok(t, err)
	ac := c.As("alan", secret(token))
	_, err = ac.Stat(ctx, d.ID, "f")
	ok(t, err)
	want(t, ac.Put(ctx, d.ID, "g", file("x")), cloud.ErrForbidden)
	ok(t, ac.DeleteToken(ctx, token))
	_, err = ac.Me(ctx)
	want(t, err, cloud.ErrUnauthorized)
	s.Impersonation = false
	_, err = c.CreateToken(ctx, alan, time.Hour)
	want(t, err, cloud.ErrForbidden)
}

func TestTrash(t *testing.T) {
	s := cloudtest.New(t)
	c, ctx, home := client(t, s), t.Context(), s.Home("admin")
	s.Write(home, "dir/x", "1", noon)
	s.Write(home, "f", "22", noon)
	for _, p := range []string{"dir", "f"} {
		req, err := http.NewRequestWithContext(ctx, http.MethodDelete, s.URL+"/dav/spaces/"+home+"/"+p, nil)
		ok(t, err)
		req.SetBasicAuth("admin", "admin")
		r, err := http.DefaultClient.Do(req)
		ok(t, err)
		r.Body.Close()
	}
	got, err := c.Trash(ctx, home)
	ok(t, err)
	if len(got) != 2 || got[0].Path != "dir" || !got[0].Folder || got[1].Path != "f" || got[1].Size != 2 || time.Since(got[1].Deleted) > time.Minute || got[0].Key == "" {
		t.Errorf("trash %+v", got)
	}
}

func TestOnlyLoopback(t *testing.T) {
	c, err := cloud.New(cloud.Options{URL: "https://192.0.2.1", User: "u", Secret: secret("s"), OnlyLoopback: true})
	ok(t, err)
	_, err = c.Me(t.Context())
	if err == nil || !strings.Contains(err.Error(), "is not this machine") {
		t.Errorf("got %v", err)
	}
}
