package inplace

import (
	"bytes"
	"crypto/md5"  //nolint:gosec // what S3 servers give as the ETag
	"crypto/sha1" //nolint:gosec // the server's checksum
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"github.com/holdfast-backup/holdfast/internal/bucket"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Objects say where the blobs of a store lie that keeps them in a bucket.
type Objects struct {
	// Dest takes them.
	Dest *bucket.Bucket
	// Source has the contents that the repository does not have; nil: the repository has all.
	Source *bucket.Bucket
}

// asideKey begins the keys of objects that were in the way. No space has such an id.
const asideKey = "holdfast-aside-"

// objects are the blobs of a store in a bucket; the zero value is one with local blobs.
type objects struct {
	r  *run
	o  *Objects
	at map[string]bucket.Object // what was looked up, by key; an empty Key says that it is not there
	// wanted are the keys of the snapshot, if a whole space is put back.
	wanted map[string]bool
	err    error // the first one of those who cannot return it
}

func newObjects(r *run) *objects {
	return &objects{r: r, o: r.o.Objects, at: map[string]bucket.Object{}, wanted: map[string]bool{}}
}

// on tells whether the blobs lie in a bucket.
func (s *objects) on() bool { return s.o != nil }

// key is the key of the object whose file would be at rel, or "".
func (s *objects) key(rel string) string {
	if below, ok := strings.CutPrefix(rel, s.r.sp+"/blobs/"); ok && s.on() {
		return s.r.t.Space.ID + "/" + below
	}
	return ""
}

// keyOf is the key that an entry of the snapshot had, which decides where it is written.
func (s *objects) keyOf(h *pax.Header, rel string) (string, error) {
	key := s.key(rel)
	if rec := h.Records[pax.Object]; rec != "" && rec != key {
		if rec != bucket.FormerKey(strings.ReplaceAll(strings.TrimPrefix(rel, s.r.sp+"/blobs/"), "/", "")) {
			return "", fmt.Errorf("%s: the key %q does not belong to this blob", rel, rec)
		}
		key = rec
	}
	return key, nil
}

// look looks an object up, once.
func (s *objects) look(key string) (bucket.Object, error) {
	if x, ok := s.at[key]; ok {
		return x, nil
	}
	x, err := s.o.Dest.Stat(s.r.ctx, key, "")
	if errors.Is(err, bucket.ErrNotFound) {
		x, err = bucket.Object{}, nil
	}
	if err == nil {
		s.at[key] = x
	}
	return x, err
}

// blobThere tells whether the blob is there. What goes wrong with a bucket is in objects.err.
func (r *run) blobThere(b string) bool {
	rel := r.blobRel(b)
	if !r.objects.on() {
		return r.exists(rel)
	}
	x, err := r.objects.look(r.objects.key(rel))
	if err != nil && r.objects.err == nil {
		r.objects.err = err
	}
	return x.Key != ""
}

// moveAside gives an object another key.
func (s *objects) moveAside(key string) error {
	x, err := s.look(key)
	if err != nil || x.Key == "" {
		return err
	}
	s.r.res.Moved = append(s.r.res.Moved, "s3://"+s.o.Dest.Name()+"/"+key)
	if s.r.o.DryRun {
		return nil
	}
	aside := asideKey + s.r.o.Now.UTC().Format("20060102T150405Z") + "/"
	step()
	if _, err := s.o.Dest.CopyFrom(s.r.ctx, s.o.Dest, x, aside+key); err != nil {
		if errors.Is(err, bucket.ErrNotFound) {
			err = nil
		}
		return err
	}
	s.r.res.AsideObjects = aside
	step()
	if err := s.o.Dest.Remove(s.r.ctx, key, ""); err != nil {
		return err
	}
	s.at[key] = bucket.Object{}
	return nil
}

// same tells whether the bucket has the object as the snapshot has it.
func (s *objects) same(h *pax.Header, rel string) (bool, error) {
	key, err := s.keyOf(h, rel)
	if err != nil {
		return false, err
	}
	x, err := s.look(key)
	if err != nil || x.Key == "" || h.Type != '0' || x.Size != sizeOf(h) {
		return false, err
	}
	if sum, ok := x.MD5(); ok && h.Records[pax.MD5] != "" {
		return sum == h.Records[pax.MD5], nil
	}
	if e := h.Records[pax.ETag]; e != "" && e == x.ETag {
		return true, nil
	}
	want, err := s.content(h)
	if err != nil {
		return false, err
	}
	defer want.Close()
	have, err := s.o.Dest.Get(s.r.ctx, key, "")
	if errors.Is(err, bucket.ErrNotFound) {
		s.at[key] = bucket.Object{}
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer have.Close()
	return sameBytes(s.r.ctx, want, have)
}

// content opens what the object is to have.
func (s *objects) content(h *pax.Header) (io.ReadCloser, error) {
	if place, ok := h.Records[pax.Content]; ok {
		n, err := s.r.find.File(s.r.ctx, place)
		if err != nil {
			return nil, err
		}
		return io.NopCloser(snapshot.NewReader(s.r.ctx, s.r.l, n)), nil
	}
	if sizeOf(h) == 0 {
		return io.NopCloser(bytes.NewReader(nil)), nil
	}
	if s.o.Source == nil {
		return nil, fmt.Errorf("the content of %q is not in the repository but in a bucket, and nothing says how to reach it", h.Name)
	}
	x, err := s.source(h)
	if err != nil {
		return nil, err
	}
	return s.o.Source.Get(s.r.ctx, x.Key, x.VersionID)
}

// source looks up the object that has the content, and makes sure that it still is the one.
func (s *objects) source(h *pax.Header) (bucket.Object, error) {
	key, version, etag := h.Records[pax.Object], h.Records[pax.Version], h.Records[pax.ETag]
	x, err := s.o.Source.Stat(s.r.ctx, key, version)
	if errors.Is(err, bucket.ErrNotFound) {
		return x, fmt.Errorf("object %q is no longer in %s", key, s.o.Source)
	}
	if err != nil {
		return x, err
	}
	if x.Size != sizeOf(h) || etag != "" && x.ETag != etag {
		return x, fmt.Errorf("object %q of %s has %d bytes and the ETag %s, and the snapshot recorded %d and %s", key, s.o.Source, x.Size, x.ETag, sizeOf(h), etag)
	}
	x.VersionID = version
	return x, nil
}

// put writes the object.
func (s *objects) put(h *pax.Header, rel string) error {
	key, err := s.keyOf(h, rel)
	if err != nil {
		return err
	}
	if h.Type != '0' {
		s.r.warn("%q cannot become an object: it was left out", rel)
		return nil
	}
	step()
	if _, ok := h.Records[pax.Content]; !ok && sizeOf(h) > 0 && s.o.Source != nil {
		x, err := s.source(h)
		if err == nil {
			x, err = s.o.Dest.CopyFrom(s.r.ctx, s.o.Source, x, key)
		}
		if err == nil {
			s.at[key] = x
		}
		return err
	}
	m, sum := md5.New(), sha1.New() //nolint:gosec // see the imports
	x, err := s.o.Dest.Put(s.r.ctx, key, sizeOf(h), func() (io.ReadCloser, error) {
		m.Reset()
		sum.Reset()
		src, err := s.content(h)
		if err != nil {
			return nil, err
		}
		return tee{io.TeeReader(src, io.MultiWriter(m, sum)), src}, nil
	})
	if err != nil {
		return err
	}
	for _, c := range []struct{ name, got, want string }{
		{"MD5", hex.EncodeToString(m.Sum(nil)), h.Records[pax.MD5]}, {"SHA-1", hex.EncodeToString(sum.Sum(nil)), h.Records[pax.SHA1]},
	} {
		if c.want != "" && c.got != c.want {
			s.r.warn("object %q has the %s %s, as it had when it was backed up; the instance recorded %s", key, c.name, c.got, c.want)
		}
	}
	if got, ok := x.MD5(); ok && got != hex.EncodeToString(m.Sum(nil)) {
		// Encrypted objects have ETags that look like this one, so the size has to do.
		if x, err = s.o.Dest.Stat(s.r.ctx, key, ""); err == nil && x.Size != sizeOf(h) {
			err = fmt.Errorf("object %q has %d bytes after it was written, not %d", key, x.Size, sizeOf(h))
		}
	}
	s.at[key] = x
	return err
}

type tee struct {
	io.Reader
	io.Closer
}

// ofSpace puts one blob of a whole space back. Folders of local blobs become nothing.
func (s *objects) ofSpace(h *pax.Header, rel string) error {
	if h.Type == '5' {
		return nil
	}
	key, err := s.keyOf(h, rel)
	if err != nil {
		return err
	}
	if len(s.wanted) == 0 { // the first one
		if err := s.list(); err != nil {
			return err
		}
	}
	s.wanted[key] = true
	return s.back(h, rel)
}

// back puts one blob back, if the bucket does not have it already.
func (s *objects) back(h *pax.Header, rel string) error {
	key, err := s.keyOf(h, rel)
	if err != nil {
		return err
	}
	same, err := s.same(h, rel)
	if err != nil {
		return err
	}
	if same {
		s.r.res.Unchanged++
		return nil
	}
	s.r.res.Blobs++
	s.r.res.Bytes += sizeOf(h)
	if err := s.moveAside(key); err != nil || s.r.o.DryRun {
		return err
	}
	return s.put(h, rel)
}

// list looks up all objects of the space at once: about 200 bytes for each.
func (s *objects) list() error {
	var mu sync.Mutex
	return s.o.Dest.List(s.r.ctx, s.r.t.Space.ID+"/", func(x bucket.Object) error {
		mu.Lock()
		defer mu.Unlock()
		s.at[x.Key] = x
		return nil
	})
}

// rest moves aside the objects of the space that the snapshot does not have: nothing refers to them any more.
func (s *objects) rest() error {
	if !s.on() {
		return nil
	}
	if len(s.wanted) == 0 {
		if err := s.list(); err != nil {
			return err
		}
	}
	var gone []string
	for key, x := range s.at {
		if x.Key != "" && !s.wanted[key] {
			gone = append(gone, key)
		}
	}
	slices.Sort(gone)
	for _, key := range gone {
		if err := s.moveAside(key); err != nil {
			return err
		}
	}
	return nil
}
