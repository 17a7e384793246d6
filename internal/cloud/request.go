package cloud

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// request is one call.
type request struct {
	method string
	// path is below the URL, one element each, not yet encoded. A trailing empty one is a slash.
	path  []string
	query url.Values
	// at overrides path: an address that the server gave.
	at     *url.URL
	header http.Header
	// body makes the body anew for each try; nil for none. size is its length in bytes.
	body func() (io.ReadCloser, error)
	size int64
	// want lists the statuses that are success.
	want []int
	// once forbids a second try after which the server may have done the work twice.
	once bool
	// what names the thing in errors; zero is the path.
	what string
}

// maxWait bounds the wait before a try, and what a server can ask for, each.
const (
	maxWait       = 30 * time.Second
	maxRetryAfter = 2 * time.Minute
)

// triesOf500 is how often a request is sent that the server fails at. It also answers 500 where it
// will never succeed, so this is no more than what bridges a hiccup.
const triesOf500 = 3

// do sends a request, again if need be. The caller closes the body of the answer, which gives up
// when nothing moves for the timeout.
//
// Errors: *StatusError for any status that is not wanted; the cause of ctx.
func (c *Client) do(ctx context.Context, q request) (*http.Response, error) {
	what := cmp.Or(q.what, "/"+strings.Join(q.path, "/"))
	refused := ""
	for try := 1; ; try++ {
		secret, err := c.token(refused)
		if err != nil {
			return nil, err
		}
		r, err := c.send(ctx, q, secret)
		var wait time.Duration
		switch {
		case ctx.Err() != nil:
			if err == nil {
				r.Body.Close()
			}
			return nil, context.Cause(ctx)
		case err != nil:
			var open *openError
			if errors.As(err, &open) {
				return nil, open.err
			}
			// Nothing reached the server only if there was no connection.
			if q.once && !notSent(err) {
				return nil, fmt.Errorf("%s %s: %w", q.method, what, err)
			}
			err = fmt.Errorf("%s %s: %w", q.method, what, err)
			if permanent(err) {
				return nil, err
			}
		default:
			for _, s := range q.want {
				if r.StatusCode == s {
					return r, nil
				}
			}
			e := statusError(q.method, what, r)
			wait = retryAfter(r)
			r.Body.Close()
			if e.Status == http.StatusUnauthorized && refused == "" {
				// The token may have run out; a new one may be there.
				refused = secret
				if now, err := c.token(refused); err == nil && now != refused {
					try--
					continue
				}
			}
			if !again(e.Status, q.once) || e.Status == http.StatusInternalServerError && try >= triesOf500 {
				return nil, e
			}
			err = e
		}
		if try >= c.opt.Tries {
			return nil, err
		}
		if c.opt.Retry != nil {
			c.opt.Retry(err)
		}
		if err := sleep(ctx, max(wait, c.backoff(try))); err != nil {
			return nil, err
		}
	}
}

// again tells whether a status is worth another try.
func again(status int, once bool) bool {
	switch status {
	case http.StatusTooManyRequests, http.StatusTooEarly, http.StatusServiceUnavailable:
		return true
	case http.StatusRequestTimeout, http.StatusInternalServerError, http.StatusBadGateway, http.StatusGatewayTimeout:
		return !once
	}
	return false
}

// backoff is the wait after the try of that number, with a fifth of chance in it, so that many
// clients do not come back together.
func (c *Client) backoff(try int) time.Duration {
	d := min(c.opt.Backoff<<min(try-1, 16), maxWait)
	return d - d/10 + rand.N(d/5+1)
}

func retryAfter(r *http.Response) time.Duration {
	v := r.Header.Get("Retry-After")
	if n, err := strconv.Atoi(v); err == nil && n > 0 {
		return min(time.Duration(min(n, 3600))*time.Second, maxRetryAfter)
	}
	if t, err := http.ParseTime(v); err == nil {
		return min(max(time.Until(t), 0), maxRetryAfter)
	}
	return 0
}

// sleep waits; its error is the cause of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// openError is a failure of our own side to give the body: no retry can mend it.
type openError struct{ err error }

func (e *openError) Error() string { return e.err.Error() }
func (e *openError) Unwrap() error { return e.err }

// notSent tells whether the failure was before anything was sent.
func notSent(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial"
}

// permanent tells failures that another try cannot mend: of the certificate or the address.
func permanent(err error) bool {
	var cert *tls.CertificateVerificationError
	var dns *net.DNSError
	var alert tls.AlertError
	var plain tls.RecordHeaderError
	return errors.As(err, &cert) || errors.As(err, &alert) || errors.As(err, &plain) ||
		errors.As(err, &dns) && dns.IsNotFound || errors.Is(err, errNotHere) ||
		strings.Contains(err.Error(), "server gave HTTP response to HTTPS client") // net/http has no type for it
}

// send sends a request once.
func (c *Client) send(ctx context.Context, q request, secret string) (*http.Response, error) {
	u := q.at
	if u == nil {
		u = c.address(q.path, q.query)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	timeout := c.opt.Timeout
	watch := time.AfterFunc(timeout, func() { cancel(fmt.Errorf("%w for %v", errStalled, timeout)) })
	stop := func() { watch.Stop(); cancel(nil) }
	req, err := http.NewRequestWithContext(ctx, q.method, u.String(), http.NoBody)
	if err != nil {
		stop()
		return nil, &openError{err}
	}
	for k, v := range q.header {
		req.Header[k] = v
	}
	req.Header.Set("User-Agent", c.opt.Agent)
	if c.opt.User != "" {
		req.SetBasicAuth(c.opt.User, secret)
	} else {
		req.Header.Set("Authorization", "Bearer "+secret)
	}
	var body *movingBody
	if q.body != nil && q.size > 0 {
		src, err := q.body()
		if err != nil {
			stop()
			return nil, &openError{err}
		}
		// Only after the last byte the server may take its time.
		body = &movingBody{ctx: ctx, r: src, limit: c.up, watch: watch, timeout: timeout, atEnd: 3 * timeout, left: q.size}
		req.Body, req.ContentLength = body, q.size
	}
	r, err := c.http.Do(req)
	if err != nil {
		stop()
		if body != nil {
			if own := body.failed.Load(); own != nil {
				return nil, &openError{*own}
			}
		}
		if cause := context.Cause(ctx); cause != nil && errors.Is(err, context.Canceled) && cause != context.Canceled {
			err = cause
		}
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err // the method and what is asked for are said by the caller; the URL may hold a token
		}
		return nil, err
	}
	watch.Reset(timeout)
	a := &answerBody{stop: stop}
	a.ctx, a.r, a.limit, a.watch, a.timeout, a.atEnd, a.left = ctx, r.Body, c.down, watch, timeout, timeout, -1
	r.Body = a
	return r, nil
}

// address makes a URL. Each element is encoded whole, so a slash in it stays part of it.
func (c *Client) address(path []string, query url.Values) *url.URL {
	u := *c.base
	var raw, plain strings.Builder
	raw.WriteString((&url.URL{Path: u.Path}).EscapedPath())
	plain.WriteString(u.Path)
	for _, p := range path {
		raw.WriteString("/" + url.PathEscape(p))
		plain.WriteString("/" + p)
	}
	u.Path, u.RawPath, u.RawQuery = plain.String(), raw.String(), query.Encode()
	return &u
}

// movingBody passes a body on, at the rate allowed, and keeps the watch from barking while it moves.
type movingBody struct {
	ctx            context.Context
	r              io.ReadCloser
	limit          *rate.Limiter
	watch          *time.Timer
	timeout, atEnd time.Duration
	left           int64 // bytes until the end; -1 is unknown
	// failed is why our own side could not give the body.
	failed atomic.Pointer[error]
}

func (b *movingBody) Read(p []byte) (int, error) {
	if b.limit != nil && len(p) > burst {
		p = p[:burst]
	}
	n, err := b.r.Read(p)
	if err != nil && err != io.EOF {
		b.failed.Store(&err)
	}
	if n > 0 && b.limit != nil {
		b.watch.Stop() // waiting for our own limit is no stall
		if werr := b.limit.WaitN(b.ctx, n); werr != nil {
			return 0, werr
		}
	}
	if b.left > 0 {
		b.left -= int64(n)
	}
	if b.left == 0 || err == io.EOF {
		b.watch.Reset(b.atEnd)
	} else {
		b.watch.Reset(b.timeout)
	}
	return n, err
}

func (b *movingBody) Close() error { return b.r.Close() }

// answerBody is the body of an answer; closing it ends the request.
type answerBody struct {
	movingBody
	stop func()
}

func (b *answerBody) Read(p []byte) (int, error) {
	n, err := b.movingBody.Read(p)
	if err != nil && err != io.EOF {
		if cause := context.Cause(b.ctx); cause != nil {
			err = cause
		}
	}
	return n, err
}

func (b *answerBody) Close() error {
	// A short rest is read, so that the connection can be used again.
	_, _ = io.CopyN(io.Discard, b.r, 4<<10)
	err := b.r.Close()
	b.stop()
	return err
}
