package bucket

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/minio/minio-go/v7"
)

// readTries is how often a read goes on after the connection broke, without a mebibyte in between.
const readTries = 6

// Reader reads one object from its start to its end. When a connection breaks it goes on where it was,
// in the same object: one that was replaced meanwhile is an error.
type Reader struct {
	ctx     context.Context
	b       *Bucket
	obj     Object
	version string
	off     int64
	tries   int
	since   int64 // offset of the last failure
	body    io.ReadCloser
}

// Get opens an object; version "" is the current one.
//
// Errors: ErrNotFound, *Error. So do the errors of reading.
func (b *Bucket) Get(ctx context.Context, key, version string) (*Reader, error) {
	r := &Reader{ctx: ctx, b: b, obj: Object{Key: key}, version: version}
	if err := r.b.again(ctx, r.open); err != nil {
		return nil, b.fail(ctx, "read object", key, err)
	}
	return r, nil
}

// Object is what the server says of it.
func (r *Reader) Object() Object { return r.obj }

// open asks for what is left.
func (r *Reader) open() error {
	opts := minio.GetObjectOptions{VersionID: r.version}
	first := r.obj.ETag == ""
	if !first {
		if err := opts.SetMatchETag(r.obj.ETag); err != nil {
			return err
		}
	}
	if r.off > 0 {
		if err := opts.SetRange(r.off, 0); err != nil {
			return err
		}
	}
	body, info, h, err := r.b.core.GetObject(r.ctx, r.b.cfg.Bucket, r.obj.Key, opts)
	if err != nil {
		return err
	}
	if r.off > 0 && h.Get("Content-Range") == "" {
		_ = body.Close()
		return errors.New("the server sent the whole object where a part was asked for")
	}
	if first {
		o := object(&info)
		o.Key = r.obj.Key
		r.obj = o
	}
	r.body = body
	return nil
}

func (r *Reader) Read(p []byte) (int, error) {
	for {
		if r.off >= r.obj.Size {
			return 0, io.EOF
		}
		var err error
		if r.body == nil {
			err = r.open()
		}
		if err == nil {
			var n int
			n, err = r.body.Read(p[:min(int64(len(p)), r.obj.Size-r.off)])
			r.off += int64(n)
			if n > 0 {
				return n, nil
			}
			if err == nil {
				continue
			}
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("the connection ended after %d of %d bytes", r.off, r.obj.Size)
			}
			r.closeBody()
		}
		if r.off-r.since >= 1<<20 {
			r.tries = 0
		}
		r.since = r.off
		if r.tries++; r.tries > readTries || !transient(err) || r.ctx.Err() != nil {
			return 0, r.b.fail(r.ctx, "read object", r.obj.Key, err)
		}
		if err := r.b.pause(r.ctx, r.tries); err != nil {
			return 0, err
		}
	}
}

func (r *Reader) closeBody() {
	if r.body != nil {
		_ = r.body.Close()
		r.body = nil
	}
}

// Close ends the read, also in the middle.
func (r *Reader) Close() error {
	r.closeBody()
	return nil
}
