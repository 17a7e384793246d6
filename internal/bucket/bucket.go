// Package bucket reaches the S3 bucket that holds the blobs of an instance, and buckets of the same
// kind: a replica, the destination of a restore. It knows how the product names objects; what an
// object means is the business of its callers.
//
// Every call is tried again when the server is busy or a connection breaks, for about ten seconds,
// and reads of objects go on where they stopped. What remains an error is one.
package bucket

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/s3"
	"github.com/holdfast-backup/holdfast/internal/transport"
)

// Config says how to reach a bucket.
type Config struct {
	// Endpoint is a URL; the scheme http means no TLS, any other one TLS, as in the product.
	Endpoint string
	Region   string
	Bucket   string
	// AccessKey and SecretKey never leave the process but as a signature.
	AccessKey, SecretKey string
	PathStyle            bool
	// PartSize of uploads, in bytes; 0: 16 MiB. Larger objects than 10,000 parts get larger parts.
	PartSize         int64
	DisableMultipart bool
	// Tries is how often one request is made; 0: 10 times, with up to a second in between.
	Tries int
	// Pause is the first wait before what broke off is tried again; the next ones are longer. 0: 250 ms.
	Pause time.Duration
}

// Of is the configuration of the bucket that discover found.
func Of(s *ocis.S3) Config {
	return Config{
		Endpoint: s.Endpoint, Region: s.Region, Bucket: s.Bucket, AccessKey: s.AccessKey, SecretKey: s.SecretKey,
		PathStyle: s.PathStyle, PartSize: s.PartSize, DisableMultipart: s.DisableMultipart,
	}
}

// Key is the name of the object that holds a blob (product reference, "Object keys").
func Key(space, blob string) string { return space + "/" + ocis.NodePath(blob) }

// FormerKey is its name in instances from before May 2022.
func FormerKey(blob string) string { return blob }

// Object is what the server says of one object, or of one version of it.
type Object struct {
	Key       string
	Size      int64 // bytes
	ETag      string
	VersionID string // "" where the bucket has no versions
	Modified  time.Time
	// Latest and Marker are set by listings of versions only. A marker says that the object was deleted.
	Latest, Marker bool
}

// MD5 returns the checksum of the content, if the ETag is one.
func (o *Object) MD5() (string, bool) {
	if len(o.ETag) != 32 || strings.Trim(o.ETag, "0123456789abcdef") != "" {
		return "", false // the object was uploaded in parts, or encrypted with a key
	}
	return o.ETag, true
}

// ErrNotFound is wrapped if there is no such object, or no such version.
var ErrNotFound = s3.ErrNotFound

// Error is what went wrong with a bucket.
type Error = s3.Error

// Bucket is a client of one bucket. It is safe for concurrent use.
type Bucket struct {
	cfg  Config
	cl   *s3.Client
	core minio.Core

	noCopy atomic.Bool // copies within the server are of no use
}

const (
	// defaultPart is the part size of the product's own client, in bytes.
	defaultPart = 16 << 20
	maxParts    = 10000
	// connections that are kept for reuse: as many as capture and restore use at once.
	connections = 64
	// idleTimeout ends a connection on which nothing moves: the service may be down meanwhile.
	idleTimeout = time.Minute
)

// copyLimit is the largest object that one request can copy, in bytes (S3's limit); larger ones are
// copied in parts of copyPart. Tests make them small.
var copyLimit, copyPart int64 = 5 << 30, 1 << 30

// Open makes a client. It does not reach out yet.
//
// Errors: *s3.EndpointError, *s3.CredentialsError.
func Open(ctx context.Context, cfg Config) (*Bucket, error) {
	endpoint := cfg.Endpoint
	if scheme, rest, ok := strings.Cut(endpoint, "://"); ok && scheme != "http" {
		endpoint = "https://" + rest // as the product takes it
	}
	if cfg.Bucket == "" {
		return nil, errors.New("the name of the bucket is empty")
	}
	if cfg.AccessKey == "" || cfg.SecretKey == "" {
		return nil, &KeysError{Bucket: cfg.Bucket, Endpoint: cfg.Endpoint}
	}
	o := s3.Options{
		Endpoint: endpoint, Region: cfg.Region, AccessKey: cfg.AccessKey, SecretKey: cfg.SecretKey, Tries: cfg.Tries,
		// The variables of the AWS tools are about the repository, but for the certificates.
		Env: func(name string) (string, bool) {
			if name == "AWS_CA_BUNDLE" {
				return os.LookupEnv(name)
			}
			return "", false
		},
		Transport: transport.Options{Connect: 15 * time.Second, Headers: idleTimeout, Idle: idleTimeout, Connections: connections},
	}
	if cfg.PathStyle {
		o.Style = s3.StylePath
	}
	cl, err := s3.New(ctx, o)
	if err != nil {
		return nil, err
	}
	return &Bucket{cfg: cfg, cl: cl, core: cl.Core()}, nil
}

// KeysError says that the keys of a bucket are not known.
type KeysError struct{ Bucket, Endpoint string }

func (e *KeysError) Error() string {
	return fmt.Sprintf("the keys of bucket %q at %s are not known", e.Bucket, e.Endpoint)
}

// Hints says where they are taken from.
func (e *KeysError) Hints() []string {
	return []string{"Set " + AccessKeyVariable + " and " + SecretKeyVariable + "."}
}

// Variables that hold the keys, where those of the server's configuration are not at hand or not wanted.
const (
	AccessKeyVariable = "HOLDFAST_BUCKET_ACCESS_KEY"
	SecretKeyVariable = "HOLDFAST_BUCKET_SECRET_KEY"
)

// Close lets idle connections go.
func (b *Bucket) Close() { b.cl.Close() }

// Name, Endpoint and Region tell which bucket it is.
func (b *Bucket) Name() string     { return b.cfg.Bucket }
func (b *Bucket) Endpoint() string { return b.cl.Endpoint() }
func (b *Bucket) Region() string   { return b.cfg.Region }
func (b *Bucket) PathStyle() bool  { return b.cfg.PathStyle }

// Same reports whether both are the same bucket.
func (b *Bucket) Same(o *Bucket) bool {
	return b.Endpoint() == o.Endpoint() && b.cfg.Bucket == o.cfg.Bucket
}

func (b *Bucket) String() string { return fmt.Sprintf("bucket %q at %s", b.cfg.Bucket, b.Endpoint()) }

// fail makes an error of err: what is not found is ErrNotFound, and no key is in the text, whatever the
// server answers.
func (b *Bucket) fail(ctx context.Context, op, key string, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var r minio.ErrorResponse
	if errors.As(err, &r) && r.Code == "MethodNotAllowed" && key != "" { // that version is a delete marker
		err = minio.ErrorResponse{Code: "NoSuchVersion", Message: r.Message, StatusCode: r.StatusCode}
	}
	err = b.cl.Explain(op, b.cfg.Bucket, key, err)
	var e *Error
	if errors.As(err, &e) {
		for _, secret := range []string{b.cfg.SecretKey, b.cfg.AccessKey} {
			if len(secret) > 2 {
				e.Message = strings.ReplaceAll(e.Message, secret, "***")
			}
		}
		if e.Kind == s3.ErrBadCredentials {
			return &credentialsError{err: e}
		}
	}
	return err
}

// credentialsError has a hint that names the variables of the instance's bucket.
type credentialsError struct{ err *Error }

func (e *credentialsError) Error() string { return e.err.Error() }
func (e *credentialsError) Unwrap() error { return e.err }

// Hints says where the keys come from.
func (e *credentialsError) Hints() []string {
	return []string{"The server refuses the keys that the instance's configuration gives. " + AccessKeyVariable + " and " + SecretKeyVariable + " go before it."}
}

// transient reports whether trying again may help.
func transient(err error) bool {
	var r minio.ErrorResponse
	if errors.As(err, &r) {
		// BadRequest is no code of S3: a server under load took the end of one request for the next one.
		return r.StatusCode != http.StatusNotImplemented && (r.StatusCode >= 500 || r.Code == "BadRequest" || r.StatusCode == http.StatusRequestTimeout || r.StatusCode == http.StatusTooManyRequests || r.Code == "SlowDown")
	}
	return true
}

// again calls fn until it succeeds or trying again is of no use. The client has tried each request
// several times; this is for answers that break off.
func (b *Bucket) again(ctx context.Context, fn func() error) error {
	const tries = 3
	for i := 1; ; i++ {
		err := fn()
		if err == nil || ctx.Err() != nil || !transient(err) || i == tries {
			return err
		}
		if b.pause(ctx, i) != nil {
			return err
		}
	}
}

// pause waits before try n+1.
func (b *Bucket) pause(ctx context.Context, n int) error {
	t := time.NewTimer(min(time.Duration(n)*cmp.Or(b.cfg.Pause, 250*time.Millisecond), 2*time.Second))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func object(i *minio.ObjectInfo) Object {
	return Object{
		Key: i.Key, Size: i.Size, ETag: strings.Trim(i.ETag, `"`), VersionID: i.VersionID, Modified: i.LastModified,
		Latest: i.IsLatest, Marker: i.IsDeleteMarker,
	}
}

// Stat looks an object up; version "" is the current one.
//
// Errors: ErrNotFound, *Error.
func (b *Bucket) Stat(ctx context.Context, key, version string) (Object, error) {
	var o Object
	err := b.again(ctx, func() error {
		i, err := b.cl.StatObject(ctx, b.cfg.Bucket, key, minio.StatObjectOptions{VersionID: version})
		o = object(&i)
		return err
	})
	o.Key = key
	return o, b.fail(ctx, "look up object", key, err)
}

// Remove deletes an object, or one version of it for good.
func (b *Bucket) Remove(ctx context.Context, key, version string) error {
	err := b.again(ctx, func() error {
		return b.cl.RemoveObject(ctx, b.cfg.Bucket, key, minio.RemoveObjectOptions{VersionID: version})
	})
	if err = b.fail(ctx, "delete object", key, err); errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

// Put uploads size bytes. open gives them from the start, again for each try.
func (b *Bucket) Put(ctx context.Context, key string, size int64, open func() (io.ReadCloser, error)) (Object, error) {
	part := b.cfg.PartSize
	if part <= 0 {
		part = defaultPart
	}
	part = max(part, (size+maxParts-1)/maxParts)
	opts := minio.PutObjectOptions{
		ContentType: "application/octet-stream", SendContentMd5: true, PartSize: uint64(part),
		// Each part is held in memory, so that it can be sent again.
		ConcurrentStreamParts: true, NumThreads: 2, DisableMultipart: b.cfg.DisableMultipart,
	}
	var up minio.UploadInfo
	var srcErr error // of the source, where trying again does not help
	err := b.again(ctx, func() error {
		src, err := open()
		if err != nil {
			srcErr = err
			return nil
		}
		defer src.Close()
		rd := &sourceReader{r: src}
		up, err = b.cl.PutObject(ctx, b.cfg.Bucket, key, rd, size, opts)
		if rd.err != nil {
			srcErr = rd.err
			return nil
		}
		if err == nil && rd.n != size {
			srcErr = fmt.Errorf("object %q: %d bytes where %d were announced", key, rd.n, size)
		}
		return err
	})
	if srcErr != nil {
		return Object{}, srcErr
	}
	if err != nil {
		return Object{}, b.fail(ctx, "write object", key, err)
	}
	return Object{Key: key, Size: size, ETag: strings.Trim(up.ETag, `"`), VersionID: up.VersionID, Modified: up.LastModified}, nil
}

// sourceReader keeps apart what went wrong at the source.
type sourceReader struct {
	r   io.Reader
	n   int64
	err error
}

func (s *sourceReader) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.n += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// CopyFrom makes an object of one that lies in src, which may be the same bucket. It is a copy within
// the server where both have one endpoint; else, and where the server cannot copy or the keys of the destination may
// not read the source, the bytes go through this machine. from.Size must be right.
func (b *Bucket) CopyFrom(ctx context.Context, src *Bucket, from Object, key string) (Object, error) {
	stream := func() (Object, error) {
		return b.Put(ctx, key, from.Size, func() (io.ReadCloser, error) { return src.Get(ctx, from.Key, from.VersionID) })
	}
	if b.Endpoint() != src.Endpoint() || b.noCopy.Load() {
		return stream()
	}
	var up minio.UploadInfo
	err := b.again(ctx, func() (err error) {
		s := minio.CopySrcOptions{Bucket: src.cfg.Bucket, Object: from.Key, VersionID: from.VersionID}
		d := minio.CopyDestOptions{Bucket: b.cfg.Bucket, Object: key}
		if src.Same(b) && from.Key == key {
			// Onto itself only with new metadata; the product's objects have none.
			d.ReplaceMetadata, d.ContentType = true, "application/octet-stream"
		}
		if from.Size <= copyLimit {
			up, err = b.cl.CopyObject(ctx, d, s)
			return err
		}
		d.PartSize, d.NumThreads = uint64(max(copyPart, (from.Size+maxParts-1)/maxParts)), 4
		up, err = b.cl.ComposeObject(ctx, d, s)
		return err
	})
	if err != nil {
		err = b.fail(ctx, "copy object", from.Key, err)
		if errors.Is(err, s3.ErrUnsupported) || errors.Is(err, s3.ErrAccessDenied) && b.cfg.AccessKey != src.cfg.AccessKey {
			o, serr := stream()
			if serr == nil {
				b.noCopy.Store(true) // so that not each object is tried in vain
			}
			return o, serr
		}
		return Object{}, err
	}
	// The answer to a copy does not tell the size.
	o, err := b.Stat(ctx, key, up.VersionID)
	if err == nil && o.Size != from.Size {
		err = &Error{Op: "copy object", Key: from.Key, Bucket: b.cfg.Bucket, Endpoint: b.Endpoint(),
			Message: fmt.Sprintf("the copy has %d bytes, the original %d", o.Size, from.Size), Code: "IncompleteCopy", Status: 200}
	}
	return o, err
}
