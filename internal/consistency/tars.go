package consistency

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strconv"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Tars is a store in a snapshot: its archives, and the files that hold the contents.
type Tars struct {
	l    snapshot.BlobLoader
	root id.ID
	st   *snapshot.Store
	find *snapshot.Finder
	// Object opens an object of a bucket that has contents which the repository does not have, or gives an
	// error that is fs.ErrNotExist; nil: they are not read.
	Object func(ctx context.Context, key, version string) (io.ReadCloser, error)
}

// errNoContent says that a content lies in a bucket that cannot be reached.
var errNoContent = errors.New("its content is in a bucket")

// objectGone says that an object is gone that a snapshot names.
type objectGone struct{ err error }

func (e *objectGone) Error() string { return e.err.Error() }
func (e *objectGone) Unwrap() error { return e.err }

// NewTars returns the store st of the snapshot whose root tree is root.
func NewTars(l snapshot.BlobLoader, root id.ID, st *snapshot.Store) *Tars {
	return &Tars{l: l, root: root, st: st, find: snapshot.NewFinder(l, root)}
}

func (t *Tars) base() string { return "/storage/" + t.st.Name }

// Spaces implements Place.
func (t *Tars) Spaces(ctx context.Context) ([]Space, error) {
	out := make([]Space, 0, len(t.st.Spaces))
	for i := range t.st.Spaces {
		s := Space{ID: t.st.Spaces[i].ID, tar: t.base() + "/metadata/" + snapshot.SafeName(t.st.Spaces[i].ID) + ".tar"}
		s.Root = ocis.SpacePath(s.ID)
		if t.st.Layout == string(ocis.Posix) {
			// The archive begins with the folder of the space.
			err := t.each(ctx, s.tar, func(h *pax.Header, _ io.Reader) error {
				s.Root = strings.TrimSuffix(h.Name, "/")
				return errStop
			})
			if err != nil && !errors.Is(err, errStop) {
				return nil, err
			}
			s.ID = strings.TrimSuffix(s.ID, "@"+s.Root) // capture tells folders of one id apart by this
		}
		out = append(out, s)
	}
	return out, nil
}

var errStop = errors.New("enough")

// each reads an archive.
func (t *Tars) each(ctx context.Context, tar string, fn func(h *pax.Header, r io.Reader) error) error {
	n, err := t.find.File(ctx, tar)
	if err != nil {
		return err
	}
	r := pax.NewReader(bufio.NewReaderSize(snapshot.NewReader(ctx, t.l, n), 64<<10))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return fmt.Errorf("%s: %w", tar, err)
		}
		if err := fn(h, r); err != nil {
			return err
		}
	}
}

// tarEntry gives what an Entry asks for.
type tarEntry struct {
	t   *Tars
	ctx context.Context
	h   *pax.Header
	r   io.Reader
	tar string
}

func (t *Tars) walk(ctx context.Context, tar, below string, fn func(*Entry) error, unreadable func(string, error)) error {
	te := &tarEntry{t: t, ctx: ctx, tar: tar}
	e := Entry{stat: te.stat, data: te.data, attrs: te.attrs, open: te.open}
	err := t.each(ctx, tar, func(h *pax.Header, r io.Reader) error {
		e.Path = strings.TrimPrefix(strings.TrimSuffix(h.Name, "/"), "./")
		if e.Path != below && !strings.HasPrefix(e.Path, below+"/") && below != "" {
			return nil
		}
		te.h, te.r = h, r
		e.Link, e.Hard = "", ""
		switch {
		case h.Type == '0' && h.Records[pax.Type] == "":
			e.Type = 'f'
		case h.Type == '1':
			e.Type, e.Hard = 'f', h.Link
		case h.Type == '2':
			e.Type, e.Link = 'l', h.Link
		case h.Type == '5':
			e.Type = 'd'
		default:
			e.Type = '?'
		}
		return fn(&e)
	})
	if errors.Is(err, pax.ErrDamaged) || errors.Is(err, snapshot.ErrNoSuchPath) {
		unreadable(tar, err)
		return nil
	}
	return err
}

func (e *tarEntry) stat() (size, sec, nsec int64, err error) {
	size = e.h.Size
	if s, ok := e.h.Records[pax.Size]; ok {
		if size, err = strconv.ParseInt(s, 10, 64); err != nil {
			return 0, 0, 0, fmt.Errorf("%s: size of %q: %w", e.tar, e.h.Name, err)
		}
	}
	return size, e.h.Sec, e.h.Nsec, nil
}

func (e *tarEntry) data() ([]byte, error) {
	r, err := e.open()
	if err != nil {
		return nil, err
	}
	p, err := io.ReadAll(io.LimitReader(r, metaLimit+1))
	if err == nil && len(p) > metaLimit {
		err = fmt.Errorf("%q has more than %d bytes", e.h.Name, metaLimit)
	}
	return p, err
}

// open returns the content, which lies in a file of its own or in the archive.
func (e *tarEntry) open() (io.ReadCloser, error) {
	if e.h.Type == '1' {
		return e.first()
	}
	place, ok := e.h.Records[pax.Content]
	if key := e.h.Records[pax.Object]; key != "" && !ok {
		if e.t.Object == nil {
			return nil, errNoContent
		}
		r, err := e.t.Object(e.ctx, key, e.h.Records[pax.Version])
		if errors.Is(err, fs.ErrNotExist) {
			err = &objectGone{err}
		}
		return r, err
	}
	if !ok {
		return io.NopCloser(e.r), nil
	}
	n, err := e.t.find.File(e.ctx, place)
	if err != nil {
		return nil, err
	}
	return io.NopCloser(snapshot.NewReader(e.ctx, e.t.l, n)), nil
}

// first returns the content of the first name of a file with several. That is rare enough to read the
// archive from its beginning.
func (e *tarEntry) first() (io.ReadCloser, error) {
	var out io.ReadCloser
	err := e.t.each(e.ctx, e.tar, func(h *pax.Header, r io.Reader) error {
		if h.Name != e.h.Link || h.Type != '0' {
			return nil
		}
		var err error
		if out, err = (&tarEntry{t: e.t, ctx: e.ctx, h: h, r: r, tar: e.tar}).open(); err != nil {
			return err
		}
		return errStop
	})
	if errors.Is(err, errStop) {
		return out, nil
	}
	if err == nil {
		err = fmt.Errorf("%s: %q is a further name of %q, which is not there", e.tar, e.h.Name, e.h.Link)
	}
	return nil, err
}

func (e *tarEntry) attrs() ([]ocis.Attribute, error) {
	var out []ocis.Attribute
	for k, v := range e.h.Records {
		if escaped, ok := strings.CutPrefix(k, pax.Xattr); ok {
			if name := pax.XattrName(escaped); strings.HasPrefix(name, e.t.st.Prefix) {
				out = append(out, ocis.Attribute{Key: name, Value: []byte(v)})
			}
		}
	}
	return out, nil
}

// Walk implements Place.
func (t *Tars) Walk(ctx context.Context, s Space, sub string, fn func(*Entry) error, unreadable func(string, error)) error {
	return t.walk(ctx, s.tar, path.Join(s.Root, sub), fn, unreadable)
}

// Rest implements Place.
func (t *Tars) Rest(ctx context.Context, fn func(*Entry) error, unreadable func(string, error)) error {
	return t.walk(ctx, t.base()+"/store.tar", "", func(e *Entry) error {
		switch top, _, _ := strings.Cut(e.Path, "/"); top {
		case "indexes", "uploads", "changes":
			return fn(e)
		}
		return nil
	}, unreadable)
}
