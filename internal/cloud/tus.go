package cloud

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

// Resumable is how a large upload goes on after a break.
type Resumable struct {
	// Session is what Save was last given, "" for none.
	Session string
	// Save is told the session as soon as there is one; nil keeps nothing.
	Save func(session string) error
	// Chunk is how much goes into one request, in bytes; zero is 64 MiB. Proxies may hold a whole
	// request back before they pass it on, so this is what a break can cost.
	Chunk int64
	// Moved is told how many bytes the server has.
	Moved func(offset int64)
}

const defaultChunk = 64 << 20

// errSessionGone is returned when the server no longer knows an upload.
var errSessionGone = errors.New("the server no longer knows the upload")

// PutResumable uploads a file in chunks, by the TUS protocol. What the server already has of a
// session is not sent again; a session that ended is begun anew. What is there becomes a version.
//
// The server's check of the whole is not promised by every version: the caller compares the
// checksum of the Entry.
//
// Errors: as Put.
func (c *Client) PutResumable(ctx context.Context, drive, p string, f *File, res Resumable) error {
	if res.Chunk <= 0 {
		res.Chunk = defaultChunk
	}
	path, err := davPath(drive, p)
	if err != nil {
		return err
	}
	if len(path) < 4 {
		return fmt.Errorf("%w: %q", ErrName, p)
	}
	session, begun := res.Session, false
	for {
		if session == "" {
			if session, err = c.tusCreate(ctx, path, f); err != nil {
				return err
			}
			begun = true
			if res.Save != nil {
				if err := res.Save(session); err != nil {
					return err
				}
			}
		}
		err := c.tusSend(ctx, path, session, f, &res)
		if !errors.Is(err, errSessionGone) || begun {
			return err
		}
		session = "" // one of an earlier run
	}
}

func tusHeader() http.Header {
	h := http.Header{}
	h.Set("Tus-Resumable", "1.0.0")
	return h
}

// tusCreate begins an upload and returns its address.
func (c *Client) tusCreate(ctx context.Context, path []string, f *File) (string, error) {
	h := tusHeader()
	h.Set("Upload-Length", strconv.FormatInt(f.Size, 10))
	meta := []string{"filename", path[len(path)-1], "mtime", f.mtime()}
	if f.SHA1 != "" {
		meta = append(meta, "checksum", "sha1 "+f.SHA1)
	}
	h.Set("Upload-Metadata", tusMetadata(meta...))
	// A session too many is no harm: it ends by itself.
	what := "/" + strings.Join(path, "/")
	r, err := c.do(ctx, request{method: "POST", path: path[:len(path)-1], header: h, want: []int{201}, what: what})
	if err != nil {
		// A missing folder above is answered as a failed precondition.
		var se *StatusError
		if errors.As(err, &se) && se.Status == http.StatusPreconditionFailed {
			return "", fmt.Errorf("%w: %w", ErrNoParent, err)
		}
		return "", err
	}
	defer r.Body.Close()
	at := r.Header.Get("Location")
	if at == "" {
		return "", fmt.Errorf("POST %s: the server began an upload and does not say where", what)
	}
	return at, nil
}

// sessionURL is the address of a session. The server names itself as the world knows it, which may be
// another name than ours; the content goes to the host that we were told.
func (c *Client) sessionURL(session string) (*url.URL, error) {
	u, err := url.Parse(session)
	if err != nil || u.Path == "" {
		return nil, fmt.Errorf("the server gave %q as the address of an upload", session)
	}
	u.Scheme, u.Host, u.User = c.base.Scheme, c.base.Host, nil
	return u, nil
}

// tusSend sends what the server does not have yet.
func (c *Client) tusSend(ctx context.Context, path []string, session string, f *File, res *Resumable) error {
	what := "/" + strings.Join(path, "/")
	at, err := c.sessionURL(session)
	if err != nil {
		return err
	}
	offset, err := c.tusOffset(ctx, at, what)
	if err != nil {
		return err
	}
	for stuck := 0; ; {
		if res.Moved != nil {
			res.Moved(offset)
		}
		if offset == f.Size {
			return nil
		}
		if offset > f.Size {
			return fmt.Errorf("PATCH %s: %w: the server has %d bytes of %d", what, ErrChecksum, offset, f.Size)
		}
		n := min(res.Chunk, f.Size-offset)
		h := tusHeader()
		h.Set("Upload-Offset", strconv.FormatInt(offset, 10))
		h.Set("Content-Type", "application/offset+octet-stream")
		// Not again as it is: after a break the server may have more than the offset says.
		r, err := c.do(ctx, request{
			method: "PATCH", at: at, header: h, size: n, want: []int{200, 204}, once: true, what: what,
			body: func() (io.ReadCloser, error) {
				src, err := f.Open(ctx, offset)
				if err != nil {
					return nil, err
				}
				return &part{Reader: io.LimitReader(src, n), Closer: src}, nil
			},
		})
		if err == nil {
			got, perr := strconv.ParseInt(r.Header.Get("Upload-Offset"), 10, 64)
			r.Body.Close()
			if perr != nil || got <= offset {
				return fmt.Errorf("PATCH %s: the server took %d bytes and says its offset is %q", what, n, r.Header.Get("Upload-Offset"))
			}
			offset, stuck = got, 0
			continue
		}
		if ctx.Err() != nil || final(err) {
			return gone(err)
		}
		if stuck++; stuck >= c.opt.Tries {
			return err
		}
		if c.opt.Retry != nil {
			c.opt.Retry(err)
		}
		if err := sleep(ctx, c.backoff(stuck)); err != nil {
			return err
		}
		before := offset
		if offset, err = c.tusOffset(ctx, at, what); err != nil {
			return err
		}
		if offset > before {
			stuck = 0
		}
	}
}

// part is a piece of a content.
type part struct {
	io.Reader
	io.Closer
}

// final tells whether an error of a PATCH is the last word. A conflict is about the offset; a lock is
// the server still busy with the piece before.
func final(err error) bool {
	var open *openError
	if errors.As(err, &open) || permanent(err) {
		return true
	}
	var se *StatusError
	if !errors.As(err, &se) {
		return false // of the connection
	}
	return se.Status < 500 && se.Status != http.StatusConflict && se.Status != http.StatusLocked ||
		se.Status == http.StatusInsufficientStorage
}

// gone names the answers of the server that mean that a session has ended: it was removed, or its
// token ran out.
func gone(err error) error {
	var se *StatusError
	if errors.As(err, &se) && (se.Status == http.StatusNotFound || se.Status == http.StatusGone || se.Status == http.StatusForbidden) {
		return fmt.Errorf("%w: %w", errSessionGone, err)
	}
	return err
}

// tusOffset asks how much the server has. A piece that broke off may keep the upload locked for a while.
func (c *Client) tusOffset(ctx context.Context, at *url.URL, what string) (int64, error) {
	for try := 1; ; try++ {
		r, err := c.do(ctx, request{method: "HEAD", at: at, header: tusHeader(), want: []int{200, 204}, what: what})
		if errors.Is(err, ErrLocked) && try < c.opt.Tries {
			if err := sleep(ctx, c.backoff(try)); err != nil {
				return 0, err
			}
			continue
		}
		if err != nil {
			return 0, gone(err)
		}
		r.Body.Close()
		n, err := strconv.ParseInt(r.Header.Get("Upload-Offset"), 10, 64)
		if err != nil || n < 0 {
			return 0, fmt.Errorf("HEAD %s: the server says its offset is %q", what, r.Header.Get("Upload-Offset"))
		}
		return n, nil
	}
}

// tusMetadata is the value of Upload-Metadata, from keys and values in turn.
func tusMetadata(pairs ...string) string {
	var out []string
	for i := 0; i < len(pairs); i += 2 {
		out = append(out, pairs[i]+" "+base64.StdEncoding.EncodeToString([]byte(pairs[i+1])))
	}
	return strings.Join(out, ",")
}
