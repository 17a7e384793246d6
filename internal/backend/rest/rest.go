// Package rest keeps a repository on a server that speaks restic's REST protocol: rest-server,
// `rclone serve restic` and others.
package rest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/transport"
)

// Options of New. URL and Transport must be set.
type Options struct {
	// URL of the repository. User information in it is not used.
	URL *url.URL
	// User and Password for Basic authentication; both empty: none.
	User, Password string
	Transport      http.RoundTripper
	// Location for messages. Empty: "rest:" and the URL.
	Location string
	// Close is called by Close. May be nil.
	Close func() error
	// Version of this program, told to servers.
	Version string
}

// Backend is a repository on a server. Its methods are safe for concurrent use, also by several processes.
type Backend struct {
	o       Options
	client  *http.Client
	base    url.URL
	cleanUp time.Duration // how long undoing a cancelled Save may take
}

var _ backend.Backend = (*Backend)(nil)

// mediaType is that of lists with sizes.
const mediaType = "application/vnd.x.restic.rest.v2"

// New returns the backend. It sends nothing.
func New(o Options) *Backend {
	b := &Backend{o: o, base: *o.URL, cleanUp: 20 * time.Second}
	b.base.User = nil
	b.base.RawQuery, b.base.Fragment, b.base.RawPath = "", "", ""
	if !strings.HasSuffix(b.base.Path, "/") {
		b.base.Path += "/"
	}
	b.client = &http.Client{Transport: o.Transport, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse // a POST would lose its body, and the password go astray
	}}
	return b
}

// Location returns the address without a password.
func (b *Backend) Location() string {
	if b.o.Location != "" {
		return b.o.Location
	}
	return "rest:" + b.base.String()
}

// Close closes idle connections.
func (b *Backend) Close() error {
	b.client.CloseIdleConnections()
	if b.o.Close != nil {
		return b.o.Close()
	}
	return nil
}

func (b *Backend) url(h backend.Handle) string {
	u := b.base
	switch {
	case h.Type == backend.ConfigFile:
		u.Path += "config"
	case h.Type != 0:
		u.Path += h.Type.Dir() + "/" + h.Name
	}
	return u.String()
}

// Error is an answer that is no success.
type Error struct {
	Op, URL string
	Status  int
	Text    string // the server's words, made harmless
	server  string
}

func (e *Error) Error() string {
	s := fmt.Sprintf("%s %s: the server answers %d %s", e.Op, e.URL, e.Status, http.StatusText(e.Status))
	if e.Text != "" && !strings.EqualFold(e.Text, http.StatusText(e.Status)) {
		s += " (" + e.Text + ")"
	}
	return s
}

// Hints says what to do next.
func (e *Error) Hints() []string {
	switch {
	case e.Status == http.StatusUnauthorized:
		return []string{"Set RESTIC_REST_USERNAME and RESTIC_REST_PASSWORD; these were missing or are wrong."}
	case e.Status == http.StatusForbidden && e.Op == "remove":
		return []string{"The server lets nobody delete (append-only). Backups work; forget, prune and the removal of keys must be done at the server."}
	case e.Status == http.StatusForbidden:
		return []string{"The server does not allow this. May this user write to this path?"}
	case e.Status == http.StatusNotFound || e.Status == http.StatusMethodNotAllowed:
		return []string{"Is the path right, and is there a REST server of restic's kind at it?"}
	case e.Status == http.StatusInsufficientStorage || e.Status == http.StatusRequestEntityTooLarge:
		return []string{"Make room at the server, or raise its quota."}
	case e.Status >= 300 && e.Status < 400:
		return []string{"The server sends clients to another address: use that one."}
	}
	return nil
}

// permanent reports whether trying again is useless.
func (e *Error) permanent() bool {
	switch e.Status {
	case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusTooEarly, http.StatusConflict:
		return false
	case http.StatusBadRequest: // what arrived does not have the hash of its name
		return false
	case http.StatusInsufficientStorage, http.StatusNotImplemented, http.StatusHTTPVersionNotSupported:
		return true
	}
	return e.Status < 500
}

// connError is a request without an answer.
type connError struct {
	op, url string
	err     error
}

func (e *connError) Error() string {
	err := e.err
	if ue := (*url.Error)(nil); errors.As(err, &ue) {
		err = ue.Err // it would tell the address once more
	}
	return fmt.Sprintf("%s %s: %v", e.op, e.url, err)
}
func (e *connError) Unwrap() error { return e.err }
func (e *connError) Hints() []string {
	if h, _ := transport.Explain(e.err); h != "" {
		return []string{h}
	}
	return nil
}

func (b *Backend) check(ctx context.Context, op string, h backend.Handle) error {
	if err := h.Check(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s %v: %w", op, h, err)
	}
	return nil
}

// do sends a request. The answer has one of the statuses ok; anything else is an error, among them
// backend.ErrNotExist. The caller closes the body.
func (b *Backend) do(ctx context.Context, op, method, addr string, h backend.Handle, body *transport.Body, size int64, header http.Header, ok ...int) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, addr, nil)
	if err != nil {
		return nil, &backend.PermanentError{Err: &connError{op, addr, err}}
	}
	if body != nil {
		req.ContentLength = size
		req.Body = http.NoBody
		if size > 0 {
			req.Body = io.NopCloser(body)
			req.GetBody = func() (io.ReadCloser, error) {
				_, err := body.Seek(0, io.SeekStart)
				return io.NopCloser(body), err
			}
		}
		req.Header.Set("Content-Type", "application/octet-stream")
	}
	for k, v := range header {
		req.Header[k] = v
	}
	req.Header.Set("Accept", mediaType)
	req.Header.Set("User-Agent", "holdfast/"+b.o.Version)
	if b.o.User != "" || b.o.Password != "" {
		req.SetBasicAuth(b.o.User, b.o.Password)
	}
	resp, err := b.client.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%s %v: %w", op, h, ctx.Err())
		}
		var pe *backend.PermanentError // of a transport that knows
		_, permanent := transport.Explain(err)
		err = &connError{op, addr, err}
		if permanent || errors.As(err, &pe) {
			err = &backend.PermanentError{Err: err}
		}
		return nil, err
	}
	for _, s := range ok {
		if resp.StatusCode == s {
			return resp, nil
		}
	}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 300))
	resp.Body.Close()
	e := &Error{Op: op, URL: addr, Status: resp.StatusCode, Text: clean(string(text)), server: resp.Header.Get("Server")}
	switch {
	case e.Status == http.StatusNotFound && (method == http.MethodGet || method == http.MethodHead || method == http.MethodDelete):
		return nil, fmt.Errorf("%s %v: %w (%w)", op, h, backend.ErrNotExist, e)
	case e.permanent():
		return nil, &backend.PermanentError{Err: e}
	}
	return nil, e
}

// finish reads what is left of a short answer, so that its connection can be used again.
func finish(resp *http.Response) {
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10))
	resp.Body.Close()
}

// Create asks the server to make the place.
func (b *Backend) Create(ctx context.Context) error {
	resp, err := b.do(ctx, "create", http.MethodPost, b.url(backend.Handle{})+"?create=true", backend.Handle{}, nil, 0, nil, http.StatusOK)
	if err != nil {
		return err
	}
	finish(resp)
	return nil
}

// Save posts the file. Some servers refuse a name that exists, with a status that they have for other
// things as well; others overwrite it. So the name is looked at before, and after a refusal.
func (b *Backend) Save(ctx context.Context, h backend.Handle, data []byte) error {
	if err := b.check(ctx, "save", h); err != nil {
		return err
	}
	exists := func() error {
		switch _, err := b.Stat(ctx, h); {
		case err == nil:
			return fmt.Errorf("save %v: %w", h, backend.ErrExist)
		case !errors.Is(err, backend.ErrNotExist):
			return err
		}
		return nil
	}
	if err := exists(); err != nil {
		return err
	}
	body := transport.NewBody(data)
	defer body.Finish()
	resp, err := b.do(ctx, "save", http.MethodPost, b.url(h), h, body, int64(len(data)), nil, http.StatusOK, http.StatusCreated, http.StatusNoContent)
	if err == nil {
		finish(resp)
		return nil
	}
	if ctx.Err() != nil {
		b.undo(ctx, h, data)
		return fmt.Errorf("save %v: %w", h, ctx.Err())
	}
	var e *Error
	if errors.As(err, &e) && e.Status == http.StatusForbidden {
		if xerr := exists(); xerr != nil {
			return xerr
		}
	}
	return err
}

// undo takes back what a cancelled upload may have stored although its answer was not awaited. Names
// come from encrypted content with a random part, so the file can be nobody else's; only the config's
// name is the same for all. An append-only server keeps the file, which does no harm.
func (b *Backend) undo(ctx context.Context, h backend.Handle, data []byte) {
	uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), b.cleanUp)
	defer cancel()
	if h.Type == backend.ConfigFile {
		same := false
		err := b.Load(uctx, h, 0, 0, func(r io.Reader) error {
			got, err := io.ReadAll(r)
			same = string(got) == string(data)
			return err
		})
		if err != nil || !same {
			return
		}
	}
	_ = b.Remove(uctx, h)
}

// Load gets a file or a part of it.
func (b *Backend) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	if err := b.check(ctx, "load", h); err != nil {
		return err
	}
	if length < 0 || offset < 0 {
		return &backend.PermanentError{Err: fmt.Errorf("load %v: bad range %d+%d", h, offset, length)}
	}
	short := func(has int64) error {
		return &backend.PermanentError{Err: fmt.Errorf("load %v: %d bytes from %d wanted, the server has %d: %w", h, length, offset, has, io.ErrUnexpectedEOF)}
	}
	header := http.Header{}
	want := http.StatusOK
	if length > 0 || offset > 0 {
		want = http.StatusPartialContent
		r := fmt.Sprintf("bytes=%d-", offset)
		if length > 0 {
			r += fmt.Sprint(offset + int64(length) - 1)
		}
		header.Set("Range", r)
	}
	resp, err := b.do(ctx, "load", http.MethodGet, b.url(h), h, nil, 0, header, want)
	if err != nil {
		var e *Error
		if errors.As(err, &e) && e.Status == http.StatusRequestedRangeNotSatisfiable {
			return short(0)
		}
		return err
	}
	defer resp.Body.Close()
	if want == http.StatusPartialContent {
		part, total, _ := strings.Cut(resp.Header.Get("Content-Range"), "/")
		if !strings.HasPrefix(part, fmt.Sprintf("bytes %d-", offset)) {
			return fmt.Errorf("load %v: the server sent another part of the file than was asked for", h)
		}
		if n, err := strconv.ParseInt(total, 10, 64); err == nil && offset > n {
			return short(n) // rclone does not call it an error
		}
	}
	if length > 0 && resp.ContentLength >= 0 && resp.ContentLength != int64(length) {
		return short(resp.ContentLength)
	}
	return fn(&reader{ctx, resp.Body, h, b.url(h)})
}

// reader puts the errors of a connection into words.
type reader struct {
	ctx context.Context
	r   io.Reader
	h   backend.Handle
	url string
}

func (r *reader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if err != nil && err != io.EOF {
		if r.ctx.Err() != nil {
			err = r.ctx.Err()
		}
		err = &connError{"load", r.url, err}
	}
	return n, err
}

// Stat asks for the size.
func (b *Backend) Stat(ctx context.Context, h backend.Handle) (backend.FileInfo, error) {
	if err := b.check(ctx, "stat", h); err != nil {
		return backend.FileInfo{}, err
	}
	resp, err := b.do(ctx, "stat", http.MethodHead, b.url(h), h, nil, 0, nil, http.StatusOK)
	if err != nil {
		return backend.FileInfo{}, err
	}
	resp.Body.Close()
	if resp.ContentLength < 0 {
		return backend.FileInfo{}, &backend.PermanentError{Err: fmt.Errorf("stat %v: the server tells no size", h)}
	}
	return backend.FileInfo{Name: h.Name, Size: resp.ContentLength}, nil
}

// List gets the whole list of names, which the protocol has no pages for; it is decoded as it arrives.
func (b *Backend) List(ctx context.Context, t backend.FileType, fn func(backend.FileInfo) error) error {
	h := backend.Handle{Type: t}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("list %v: %w", t, err)
	}
	if t == backend.ConfigFile {
		fi, err := b.Stat(ctx, h)
		if errors.Is(err, backend.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		return fn(fi)
	}
	if t.Dir() == "" {
		return &backend.PermanentError{Err: fmt.Errorf("list: unknown file type %d", t)}
	}
	resp, err := b.do(ctx, "list", http.MethodGet, b.url(h), h, nil, 0, nil, http.StatusOK)
	var e *Error
	if errors.As(err, &e) && e.Status == http.StatusNotFound {
		if strings.HasPrefix(e.server, "rclone/") { // it lists missing folders as empty, and says 404 when the remote fails
			return e
		}
		return nil
	}
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	d := json.NewDecoder(&reader{ctx, resp.Body, h, b.url(h)})
	bad := func(err error) error {
		if ctx.Err() != nil {
			return fmt.Errorf("list %v: %w", t, ctx.Err())
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("list %v: the server's list cannot be read: %w", t, err)
	}
	tok, err := d.Token()
	if err != nil {
		return bad(err)
	}
	if tok == nil { // null: how some servers write an empty list
		return nil
	}
	if tok != json.Delim('[') {
		return &backend.PermanentError{Err: bad(errors.New("it is no JSON array"))}
	}
	var old []string // of version 1, which has no sizes
	for d.More() {
		var f struct {
			Name string `json:"name"`
			Size int64  `json:"size"`
		}
		if kind == mediaType {
			err = d.Decode(&f)
		} else {
			err = d.Decode(&f.Name)
		}
		if err != nil {
			return bad(err)
		}
		if !backend.IsName(f.Name) {
			continue
		}
		if kind != mediaType {
			old = append(old, f.Name)
			continue
		}
		if err := fn(backend.FileInfo{Name: f.Name, Size: f.Size}); err != nil {
			return err
		}
	}
	if _, err := d.Token(); err != nil {
		return bad(err)
	}
	for _, name := range old {
		fi, err := b.Stat(ctx, backend.Handle{Type: t, Name: name})
		if errors.Is(err, backend.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return err
		}
		if err := fn(fi); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("list %v: %w", t, err)
	}
	return nil
}

// Remove deletes a file. Servers say the same whether it was there, so that is asked first.
func (b *Backend) Remove(ctx context.Context, h backend.Handle) error {
	if _, err := b.Stat(ctx, h); err != nil {
		return err
	}
	resp, err := b.do(ctx, "remove", http.MethodDelete, b.url(h), h, nil, 0, nil, http.StatusOK, http.StatusNoContent)
	if err != nil {
		return err
	}
	finish(resp)
	return nil
}

// clean makes text from a server fit for one line of a message.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.TrimSpace(strings.ToValidUTF8(s, "?")))
}
