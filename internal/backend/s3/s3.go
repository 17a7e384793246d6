// Package s3 keeps a repository in a bucket of an S3 server, in restic's layout.
package s3

import (
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"strings"
	"sync/atomic"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/s3"
	"github.com/holdfast-backup/holdfast/internal/transport"
)

// Options of New. Client and Bucket must be set.
type Options struct {
	// Client must not try again by itself (s3.Options.Tries 1): package retry does.
	Client *s3.Client
	Bucket string
	// Prefix is what all keys begin with; slashes at its ends do not matter.
	Prefix string
	// LockDays keeps every new file but locks from being deleted or changed for so many days. The
	// bucket must have been made with Object Lock. Zero: what the bucket says.
	LockDays int
	// LockCompliance chooses the mode in which nobody at all can end the retention early; else it
	// is GOVERNANCE, in which accounts with a special right can.
	LockCompliance bool
	// StorageClass of packs, e.g. STANDARD_IA. Empty: the bucket's. Other files stay at hand.
	StorageClass string
	// PartsFrom is the size in bytes above which a file is uploaded in parts. Zero: 200 MiB. Parts
	// have half of it at most and 5 MiB at least.
	PartsFrom int64
}

// minPart is the smallest part that servers take, except for the last, in bytes.
const minPart = 5 << 20

// Backend is a prefix in a bucket. Its methods are safe for concurrent use, also by several processes.
type Backend struct {
	o       Options
	core    minio.Core
	prefix  string
	cleanUp time.Duration // how long undoing a cancelled Save may take

	noCondition atomic.Bool // the server does not know If-None-Match
	md5         atomic.Bool // the server wants Content-MD5
}

var _ backend.Backend = (*Backend)(nil)

// New returns the backend. It sends nothing.
func New(o Options) *Backend {
	if o.PartsFrom <= 0 {
		o.PartsFrom = 200 << 20
	}
	b := &Backend{o: o, core: o.Client.Core(), cleanUp: 20 * time.Second}
	if p := strings.Trim(o.Prefix, "/"); p != "" {
		b.prefix = strings.Trim(path.Clean("/"+p), "/") + "/"
		if b.prefix == "/" {
			b.prefix = ""
		}
	}
	b.md5.Store(o.LockDays > 0) // servers demand it for locked objects
	return b
}

// Location returns the address as restic writes it.
func (b *Backend) Location() string {
	return strings.TrimSuffix("s3:"+b.o.Client.Endpoint()+"/"+b.o.Bucket+"/"+b.prefix, "/")
}

// Close closes idle connections.
func (b *Backend) Close() error {
	b.o.Client.Close()
	return nil
}

func (b *Backend) key(h backend.Handle) string {
	switch h.Type {
	case backend.ConfigFile:
		return b.prefix + "config"
	case backend.PackFile:
		return b.prefix + "data/" + h.Name[:2] + "/" + h.Name
	}
	return b.prefix + h.Type.Dir() + "/" + h.Name
}

// explain adds the backend's own error classes.
func (b *Backend) explain(op string, h backend.Handle, key string, err error) error {
	err = b.o.Client.Explain(op, b.o.Bucket, key, err)
	var e *s3.Error
	switch {
	case err == nil:
		return nil
	case errors.Is(err, s3.ErrNotFound):
		return fmt.Errorf("%s %v: %w", op, h, backend.ErrNotExist)
	case errors.As(err, &e) && e.Permanent():
		return &backend.PermanentError{Err: err}
	}
	return err
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

// Create makes the bucket if it is missing.
func (b *Backend) Create(ctx context.Context) error {
	ok, err := b.core.BucketExists(ctx, b.o.Bucket)
	if err != nil {
		err = b.explain("look for the bucket", backend.Handle{}, "", err)
		if !errors.Is(err, s3.ErrAccessDenied) { // the right to look is not needed
			return err
		}
		ok = true
	}
	if ok {
		return nil
	}
	err = b.core.MakeBucket(ctx, b.o.Bucket, minio.MakeBucketOptions{ObjectLocking: b.o.LockDays > 0})
	var r minio.ErrorResponse
	if errors.As(err, &r) && r.Code == "BucketAlreadyOwnedByYou" {
		return nil // another program made it just now
	}
	return b.explain("make the bucket", backend.Handle{}, "", err)
}

// Save uploads data in one request, or in parts if it is very large. Both appear at once or not at
// all. That the name is new is asked for twice: before, for servers that do not know the condition,
// and as a condition, because another program may be at the same name.
func (b *Backend) Save(ctx context.Context, h backend.Handle, data []byte) error {
	if err := b.check(ctx, "save", h); err != nil {
		return err
	}
	switch _, err := b.Stat(ctx, h); {
	case err == nil:
		return fmt.Errorf("save %v: %w", h, backend.ErrExist)
	case !errors.Is(err, backend.ErrNotExist):
		return err
	}
	err := b.put(ctx, h, data)
	if err != nil && ctx.Err() != nil {
		b.undo(ctx, h, data)
		return fmt.Errorf("save %v: %w", h, ctx.Err())
	}
	return err
}

func (b *Backend) put(ctx context.Context, h backend.Handle, data []byte) error {
	key := b.key(h)
	for {
		condition, withMD5 := !b.noCondition.Load(), b.md5.Load()
		o := minio.PutObjectOptions{DisableContentSha256: true}
		if condition {
			o.SetMatchETagExcept("*")
		}
		if h.Type == backend.PackFile {
			o.StorageClass = b.o.StorageClass
		}
		if b.o.LockDays > 0 && h.Type != backend.LockFile {
			o.Mode = minio.Governance
			if b.o.LockCompliance {
				o.Mode = minio.Compliance
			}
			o.RetainUntilDate = time.Now().AddDate(0, 0, b.o.LockDays)
		}
		var err error
		if int64(len(data)) > b.o.PartsFrom {
			err = b.putParts(ctx, key, data, o)
		} else {
			err = b.putOne(ctx, h, key, data, withMD5, o)
		}
		err = b.explain("save", h, key, err)
		var e *s3.Error
		switch {
		case err == nil:
			return nil
		case errors.Is(err, s3.ErrChanged):
			return fmt.Errorf("save %v: %w", h, backend.ErrExist)
		case condition && errors.As(err, &e) && (errors.Is(err, s3.ErrUnsupported) || strings.Contains(e.Message, "If-None-Match")):
			b.noCondition.Store(true)
		case !withMD5 && errors.As(err, &e) && strings.Contains(e.Message, "Content-MD5"):
			b.md5.Store(true) // the bucket locks its objects by default
		case b.o.LockDays > 0 && errors.As(err, &e) && strings.Contains(strings.ReplaceAll(e.Message, " ", ""), "ObjectLock"):
			return &noLockError{err}
		default:
			return err
		}
	}
}

// noLockError says what the server's words leave open.
type noLockError struct{ err error }

func (e *noLockError) Error() string { return e.err.Error() }
func (e *noLockError) Unwrap() error { return e.err }
func (e *noLockError) Hints() []string {
	return []string{"Files can be locked only in a bucket that was made with Object Lock. Without --s3-object-lock-days they are not locked."}
}

// putOne is a single request. The hash of the content is signed with it, so the server refuses
// everything that was damaged on the way.
func (b *Backend) putOne(ctx context.Context, h backend.Handle, key string, data []byte, withMD5 bool, o minio.PutObjectOptions) error {
	sum := sha256.Sum256(data)
	var md string
	if withMD5 {
		m := md5.Sum(data)
		md = base64.StdEncoding.EncodeToString(m[:])
	}
	body := transport.NewBody(data)
	defer body.Finish()
	_, err := b.core.PutObject(ctx, b.o.Bucket, key, body, int64(len(data)), md, hex.EncodeToString(sum[:]), o)
	return err
}

// putParts uploads a file in parts, one after the other: several files go at the same time anyway.
func (b *Backend) putParts(ctx context.Context, key string, data []byte, o minio.PutObjectOptions) (err error) {
	upload, err := b.core.NewMultipartUpload(ctx, b.o.Bucket, key, o)
	if err != nil {
		return err
	}
	defer func() {
		if err == nil {
			return
		}
		// Parts that nobody puts together cost money for ever.
		actx, cancel := context.WithTimeout(context.WithoutCancel(ctx), b.cleanUp)
		defer cancel()
		_ = b.core.AbortMultipartUpload(actx, b.o.Bucket, key, upload)
	}()
	var parts []minio.CompletePart
	size := max(b.o.PartsFrom/2, minPart)
	for n, rest := 1, data; len(rest) > 0; n++ {
		p := rest[:min(int64(len(rest)), size)]
		rest = rest[len(p):]
		sum, md := sha256.Sum256(p), md5.Sum(p)
		body := transport.NewBody(p)
		part, err := b.core.PutObjectPart(ctx, b.o.Bucket, key, upload, n, body, int64(len(p)), minio.PutObjectPartOptions{
			Md5Base64: base64.StdEncoding.EncodeToString(md[:]), Sha256Hex: hex.EncodeToString(sum[:]), DisableContentSha256: true,
		})
		body.Finish()
		if err != nil {
			return err
		}
		parts = append(parts, minio.CompletePart{PartNumber: n, ETag: part.ETag})
	}
	_, err = b.core.CompleteMultipartUpload(ctx, b.o.Bucket, key, upload, parts, o)
	return err
}

// undo takes back what a cancelled upload may have stored although its answer was not awaited. Names
// come from encrypted content with a random part, so the file can be nobody else's; only the
// config's name is the same for all.
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

// Load gets a part of an object.
func (b *Backend) Load(ctx context.Context, h backend.Handle, length int, offset int64, fn func(io.Reader) error) error {
	if err := b.check(ctx, "load", h); err != nil {
		return err
	}
	if length < 0 || offset < 0 {
		return &backend.PermanentError{Err: fmt.Errorf("load %v: bad range %d+%d", h, offset, length)}
	}
	key := b.key(h)
	var o minio.GetObjectOptions
	ranged := length > 0 || offset > 0
	if ranged {
		end := int64(0)
		if length > 0 {
			end = offset + int64(length) - 1
		}
		if length == 1 && offset == 0 {
			o.Set("Range", "bytes=0-0") // SetRange(0, 0) means something else
		} else if err := o.SetRange(offset, end); err != nil {
			return &backend.PermanentError{Err: fmt.Errorf("load %v: %w", h, err)}
		}
	}
	body, info, header, err := b.core.GetObject(ctx, b.o.Bucket, key, o)
	if errors.Is(b.o.Client.Explain("load", b.o.Bucket, key, err), s3.ErrRange) {
		return &backend.PermanentError{Err: fmt.Errorf("load %v: %d bytes from %d wanted, the file is shorter: %w", h, length, offset, io.ErrUnexpectedEOF)}
	}
	if err != nil {
		return b.explain("load", h, key, err)
	}
	defer body.Close()
	if ranged && !strings.HasPrefix(header.Get("Content-Range"), fmt.Sprintf("bytes %d-", offset)) {
		return fmt.Errorf("load %v: the server sent another part of the file than was asked for", h)
	}
	if length > 0 && info.Size != int64(length) {
		return &backend.PermanentError{Err: fmt.Errorf("load %v: %d bytes from %d wanted, the server has %d: %w", h, length, offset, info.Size, io.ErrUnexpectedEOF)}
	}
	return fn(&reader{b, h, key, body})
}

// reader puts the errors of a connection into words.
type reader struct {
	b   *Backend
	h   backend.Handle
	key string
	r   io.Reader
}

func (r *reader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if err != nil && err != io.EOF {
		err = r.b.explain("load", r.h, r.key, err)
	}
	return n, err
}

// Stat asks for the size. For the config it reads a byte, as only then a server says what exactly
// is missing: that decides about "there is no repository".
func (b *Backend) Stat(ctx context.Context, h backend.Handle) (backend.FileInfo, error) {
	if err := b.check(ctx, "stat", h); err != nil {
		return backend.FileInfo{}, err
	}
	key := b.key(h)
	info, err := b.core.StatObject(ctx, b.o.Bucket, key, minio.StatObjectOptions{})
	if err != nil && h.Type == backend.ConfigFile && minio.ToErrorResponse(err).StatusCode == http.StatusNotFound {
		body, _, _, gerr := b.core.GetObject(ctx, b.o.Bucket, key, minio.GetObjectOptions{})
		if gerr == nil {
			body.Close()
			gerr = errors.New("the server says that the config exists, and that it does not")
		}
		err = b.explain("load", h, key, gerr)
		if errors.Is(err, s3.ErrNoBucket) {
			err = fmt.Errorf("%w (%w)", backend.ErrNotExist, err)
		}
		return backend.FileInfo{}, err
	}
	if err != nil {
		return backend.FileInfo{}, b.explain("stat", h, key, err)
	}
	return backend.FileInfo{Name: h.Name, Size: info.Size}, nil
}

// List lists the objects below the directory of t.
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
	prefix := b.prefix + t.Dir() + "/"
	lctx, cancel := context.WithCancel(ctx) // ends the listing when fn does
	defer cancel()
	for o := range b.core.ListObjectsIter(lctx, b.o.Bucket, minio.ListObjectsOptions{Prefix: prefix, Recursive: t == backend.PackFile}) {
		if o.Err != nil {
			err := b.explain("list", h, prefix, o.Err)
			if t == backend.KeyFile && errors.Is(err, s3.ErrNoBucket) {
				return nil // whoever makes a repository looks for keys first
			}
			return err
		}
		name := strings.TrimPrefix(o.Key, prefix)
		if t == backend.PackFile {
			dir, rest, _ := strings.Cut(name, "/")
			if !strings.HasPrefix(rest, dir) || len(dir) != 2 {
				continue // Load would not look there
			}
			name = rest
		}
		if !backend.IsName(name) {
			continue
		}
		if err := fn(backend.FileInfo{Name: name, Size: o.Size}); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("list %v: %w", t, err)
	}
	return nil
}

// Remove deletes an object. Servers say the same whether it was there, so that is asked first. In a
// bucket with versions the content stays until a rule of the bucket ends it.
func (b *Backend) Remove(ctx context.Context, h backend.Handle) error {
	if _, err := b.Stat(ctx, h); err != nil {
		return err
	}
	key := b.key(h)
	return b.locked(ctx, h, b.explain("remove", h, key, b.core.RemoveObject(ctx, b.o.Bucket, key, minio.RemoveObjectOptions{})))
}
