package restore

import (
	"context"
	"crypto/md5"  //nolint:gosec // what S3 servers give as the ETag, not a protection
	"crypto/sha1" //nolint:gosec // the server's own checksum, not a protection
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/holdfast-backup/holdfast/internal/bucket"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Blobs that lie in a bucket, before or after. In the tars an object is an entry where its file would
// be; so what differs between a store with a bucket and one without is decided here, entry by entry.

// Objects says where the blobs of one store go, and where their contents come from.
type Objects struct {
	// Dest takes the blobs; nil: they become files.
	Dest *bucket.Bucket
	// Source has the contents that the repository does not have; nil: the repository has all.
	Source *bucket.Bucket
	// Read compares objects that are there by their bytes; else an ETag that is an MD5 is believed.
	Read bool
	// Delete removes objects below the spaces' prefixes that the snapshot does not have, and keeps no copy
	// of what is replaced.
	Delete bool
}

// BucketResult counts what was done to one bucket, or in a dry run what would be.
type BucketResult struct {
	Store     string `json:"store"`
	Endpoint  string `json:"endpoint"`
	Bucket    string `json:"bucket"`
	Put       int64  `json:"put"`       // were missing
	Replaced  int64  `json:"replaced"`  // had another content
	Unchanged int64  `json:"unchanged"` // right as they were
	Bytes     int64  `json:"bytes"`     // written
	// Extra counts objects below the spaces' prefixes that the snapshot does not have; Deleted those of
	// them that were removed.
	Extra   int64 `json:"extra"`
	Deleted int64 `json:"deleted"`
	// Aside is the prefix of the copies of what was replaced; "" if there are none.
	Aside string `json:"aside,omitempty"`
}

const (
	// putsAtOnce is how many objects are compared or written at once: of small ones so many that a server
	// which answers after 40 ms takes 1600 a second. A bucket keeps as many connections.
	putsAtOnce = 64
	// putMost is the most that one holds in memory, in bytes: one that is sent in parts has two of 16 MiB. Options.ObjectRoom
	// bounds all of them. What is read ahead of them comes on top.
	putMost = 32 << 20
	// putQueue is how many more may wait, so that the folders and files beside them are made meanwhile: an
	// archive names its objects first. Each takes some 500 bytes.
	putQueue = 32 << 10
	// asideKey begins the keys of copies of what was replaced. No space has such an id.
	asideKey = "holdfast-aside-"
)

// checkBuckets makes sure that everything may be done that will have to be done.
func (p *Plan) checkBuckets(ctx context.Context) error {
	for i := range p.Manifest.Stores {
		s := &p.Manifest.Stores[i]
		o := p.o.Objects[s.Name]
		if o == nil {
			if s.Bucket != nil && p.has(s.Name) {
				return fmt.Errorf("the blobs of store %s lay in bucket %q at %s, and nothing says where they are to go", s.Name, s.Bucket.Bucket, s.Bucket.Endpoint)
			}
			continue
		}
		if o.Source == nil && s.Bucket != nil && s.Bucket.Way != snapshot.WayCopy {
			return fmt.Errorf("the contents of store %s are not in the repository but in a bucket (way %s), and nothing says how to reach it", s.Name, s.Bucket.Way)
		}
		check := func(b *bucket.Bucket, rights ...bucket.Right) error {
			if b == nil {
				return nil
			}
			for _, a := range b.CheckAccess(ctx, rights...) {
				if a.Err != nil {
					return a.Err
				}
			}
			return context.Cause(ctx)
		}
		if err := check(o.Source, bucket.GetObject); err != nil {
			return err
		}
		rights := []bucket.Right{bucket.ListBucket, bucket.GetObject}
		if !p.o.DryRun {
			if rights = append(rights, bucket.PutObject); o.Delete {
				rights = append(rights, bucket.DeleteObject)
			}
		}
		if err := check(o.Dest, rights...); err != nil {
			return err
		}
	}
	return nil
}

// has reports whether the store is to be restored.
func (p *Plan) has(store string) bool {
	for _, t := range p.Targets {
		if t.store == store {
			return true
		}
	}
	return false
}

// objectStore is one store with objects during a run.
type objectStore struct {
	o     *Objects
	r     *run
	d     *dest
	from  bool // the blobs lay in a bucket
	res   *BucketResult
	once  sync.Once
	queue chan *job
	puts  errgroup.Group      // who empties the queue
	room  *semaphore.Weighted // of Options.ObjectRoom
	// versions: the destination keeps what is replaced.
	versions bool

	mu     sync.Mutex
	spaces []string
	wanted map[keyHash]struct{} // keys of the snapshot; only if others are to be deleted
}

// keyHash stands for a key: a bucket may have millions, and this takes a fifth of the memory.
type keyHash [16]byte

func hashKey(key string) keyHash {
	sum := sha256.Sum256([]byte(key))
	return keyHash(sum[:16])
}

// objectsOf makes the state of the target's objects; nil if it has none.
func (r *run) objectsOf(p *Plan, t *Target, d *dest) *objectStore {
	o := p.o.Objects[t.store]
	if o == nil || t.store == "" {
		return nil
	}
	s := &objectStore{o: o, r: r, d: d}
	for i := range p.Manifest.Stores {
		if m := &p.Manifest.Stores[i]; m.Name == t.store {
			s.from = m.Bucket != nil
		}
	}
	s.queue, s.room = make(chan *job, putQueue), semaphore.NewWeighted(r.objectRoom)
	if o.Dest == nil {
		return s
	}
	s.res = &BucketResult{Store: t.store, Endpoint: o.Dest.Endpoint(), Bucket: o.Dest.Name()}
	r.buckets = append(r.buckets, s.res)
	if o.Delete {
		s.wanted = map[keyHash]struct{}{}
	}
	// Without an answer the copies are made: they cost little.
	s.versions, _ = o.Dest.Versioning(r.ctx)
	return s
}

// spaceObjects is one tar of the store. A nil one takes nothing.
type spaceObjects struct {
	s    *objectStore
	sink func(*job) error
	id   string
	// there are the objects of the space that the destination has and the tar has not named yet.
	there   map[keyHash]bucket.Object
	lastDir string
}

func (s *objectStore) space(sink func(*job) error) *spaceObjects {
	if s == nil {
		return nil
	}
	return &spaceObjects{s: s, sink: sink}
}

// begin looks what the destination has of a space.
func (so *spaceObjects) begin(space string) error {
	so.id, so.there = space, map[keyHash]bucket.Object{}
	s := so.s
	s.mu.Lock()
	s.spaces = append(s.spaces, space)
	s.mu.Unlock()
	var mu sync.Mutex
	err := s.o.Dest.List(s.r.ctx, space+"/", func(x bucket.Object) error {
		mu.Lock()
		defer mu.Unlock()
		h := hashKey(x.Key)
		x.Key = "" // known when it is needed
		so.there[h] = x
		return nil
	})
	if err != nil {
		return s.stop(err)
	}
	return nil
}

// done counts what the tar did not name.
func (so *spaceObjects) done() {
	if so != nil && so.s.res != nil {
		add(&so.s.res.Extra, int64(len(so.there)))
	}
}

// stop ends the run: what one object cannot be spared from, the others cannot either.
func (s *objectStore) stop(err error) error {
	if s.r.ctx.Err() != nil {
		return s.r.cause()
	}
	stop := &StoppedError{Path: s.bucketName(), Err: err}
	s.r.cancel(stop)
	return stop
}

func (s *objectStore) bucketName() string {
	if s.o.Dest != nil {
		return s.o.Dest.String()
	}
	return s.o.Source.String()
}

// blobPlace splits the path of an entry below the blobs of a space.
func blobPlace(rel string) (space, below string, ok bool) {
	parts := strings.SplitN(rel, "/", 5)
	if len(parts) < 4 || parts[0] != "spaces" || parts[3] != "blobs" {
		return "", "", false
	}
	if len(parts) == 5 {
		below = parts[4]
	}
	return parts[1] + parts[2], below, true
}

// take handles an entry that is, was, or becomes an object. It reports whether nothing is left to do; an
// error ends the run.
func (so *spaceObjects) take(a *applier, h *pax.Header, e *entry) (bool, error) {
	key := h.Records[pax.Object]
	if so == nil {
		if key != "" && e.content == "" {
			return true, a.d.fail(e.from, e.rel, errors.New("its content lies in a bucket"))
		}
		return false, nil
	}
	s := so.s
	space, below, ok := blobPlace(e.rel)
	if !ok {
		if key != "" {
			return true, a.d.fail(e.from, e.rel, refused("an object where no blob can be"))
		}
		return false, nil
	}
	if key != "" {
		// The name decides where it is written, so it must be one of the two that such a blob can have.
		if key != space+"/"+below && key != bucket.FormerKey(strings.ReplaceAll(below, "/", "")) {
			return true, a.d.fail(e.from, e.rel, refused("the key %q does not belong to this blob", key))
		}
		n, err := strconv.ParseUint(h.Records[pax.Size], 10, 62)
		if err != nil || h.Type != '0' {
			return true, a.d.fail(e.from, e.rel, fmt.Errorf("record %s=%q", pax.Size, h.Records[pax.Size]))
		}
		e.size = int64(n)
	}
	if s.o.Dest == nil {
		return so.toFile(a, h, e, key, below)
	}
	if key == "" && s.from {
		return false, nil // something that lay on disk beside the bucket
	}
	switch {
	case e.typ == snapshot.Dir:
		s.r.entries.Add(1)
		return true, nil // a bucket has no folders
	case e.hardlink != "", e.typ != snapshot.File, key == "" && e.content == "" && e.size > 0:
		return true, a.d.fail(e.from, e.rel, fmt.Errorf("a %s cannot become an object", e.typ))
	}
	if key == "" {
		key = space + "/" + below
	}
	if s.r.sizeOnly {
		return true, nil
	}
	if so.there == nil || so.id != space {
		if err := so.begin(space); err != nil {
			return true, err
		}
	}
	s.r.entries.Add(1)
	o := &objectPut{s: s, key: key, md5: h.Records[pax.MD5], sha1: h.Records[pax.SHA1], version: h.Records[pax.Version], etag: h.Records[pax.ETag]}
	hash := hashKey(key)
	if x, ok := so.there[hash]; ok {
		delete(so.there, hash)
		o.there, o.looked = x, true
		o.there.Key = key
	} else {
		o.looked = strings.HasPrefix(key, space+"/")
	}
	if s.wanted != nil {
		s.mu.Lock()
		s.wanted[hash] = struct{}{}
		s.mu.Unlock()
	}
	j := &job{d: a.d, rel: e.rel, from: e.from, size: e.size, content: e.content, object: o}
	if e.content == "" {
		return true, o.put(j)
	}
	return true, so.sink(j)
}

// toFile makes e the file of a blob that lay in a bucket.
func (so *spaceObjects) toFile(a *applier, h *pax.Header, e *entry, key, below string) (bool, error) {
	s := so.s
	if key == "" {
		if s.from {
			s.r.warnOnce("left "+s.d.path, "files below blobs/ that lay beside the bucket are not restored, because that is the place of the blobs now")
			return true, nil
		}
		return false, nil
	}
	if e.content == "" {
		e.data = &sourceFile{s: s, obj: bucket.Object{Key: key, Size: e.size, VersionID: h.Records[pax.Version], ETag: h.Records[pax.ETag]}, sha1: h.Records[pax.SHA1], h: sha1.New()}
	}
	// The folders are in no tar: a bucket has none. They get the mode of those that the product makes.
	dir, _ := splitPath(e.rel)
	for at := strings.TrimSuffix(e.rel, "/"+below); ; {
		if !within(so.lastDir, at) {
			f := &entry{rel: at, from: e.from, typ: snapshot.Dir, meta: e.meta}
			f.meta.mode, f.meta.xattrs = 0o700, nil
			s.r.entries.Add(-1) // put counts it, but the snapshot has no such folder
			if err := a.put(f); err != nil {
				return true, err
			}
		}
		if at == dir {
			break
		}
		name, _, _ := strings.Cut(dir[len(at)+1:], "/")
		at = joinPath(at, name)
	}
	so.lastDir = dir
	return false, nil
}

// sourceFile reads an object whose content the snapshot does not have, and makes sure that it is the one.
type sourceFile struct {
	s    *objectStore
	obj  bucket.Object
	sha1 string
	h    hash.Hash
	r    *bucket.Reader
	off  int64
}

func (f *sourceFile) Read(p []byte) (int, error) {
	if f.off >= f.obj.Size {
		return 0, io.EOF
	}
	if f.r == nil {
		r, err := f.s.open(f.obj)
		if err != nil {
			return 0, err
		}
		f.r = r
	}
	n, err := f.r.Read(p[:min(int64(len(p)), f.obj.Size-f.off)])
	f.h.Write(p[:n])
	if f.off += int64(n); f.off == f.obj.Size {
		_ = f.r.Close()
		if sum := hex.EncodeToString(f.h.Sum(nil)); f.sha1 != "" && sum != f.sha1 {
			return 0, fmt.Errorf("object %q has the SHA-1 %s, and the instance recorded %s", f.obj.Key, sum, f.sha1)
		}
	}
	return n, err
}

// open opens an object of the source, if it still is what the snapshot recorded.
func (s *objectStore) open(want bucket.Object) (*bucket.Reader, error) {
	r, err := s.o.Source.Get(s.r.ctx, want.Key, want.VersionID)
	if err != nil {
		return nil, s.sourceError(want, err)
	}
	if err := s.sameAsRecorded(want, r.Object()); err != nil {
		_ = r.Close()
		return nil, err
	}
	return r, nil
}

func (s *objectStore) sameAsRecorded(want, have bucket.Object) error {
	if have.Size != want.Size || want.ETag != "" && have.ETag != want.ETag {
		return fmt.Errorf("object %q of %s has %d bytes and the ETag %s, and the snapshot recorded %d and %s", want.Key, s.o.Source, have.Size, have.ETag, want.Size, want.ETag)
	}
	return nil
}

func (s *objectStore) sourceError(want bucket.Object, err error) error {
	if errors.Is(err, bucket.ErrNotFound) {
		return fmt.Errorf("object %q is no longer in %s", want.Key, s.o.Source)
	}
	return err
}

// objectPut is a blob that becomes an object.
type objectPut struct {
	s                        *objectStore
	key                      string
	md5, sha1, version, etag string // as recorded
	// there is what the destination has; its Key is "" if that is nothing. looked says that it is known.
	there  bucket.Object
	looked bool
}

// put has it compared and written in the background. It returns an error only if the run cannot go on.
func (o *objectPut) put(j *job) error {
	if o.s.r.ctx.Err() != nil {
		return o.s.r.cause()
	}
	s := o.s
	s.once.Do(func() {
		for range putsAtOnce {
			s.puts.Go(func() (first error) {
				for j := range s.queue {
					// The queue is emptied also after an error, or the reader of the archive would wait for ever.
					if err := s.putNow(j); first == nil {
						first = err
					}
				}
				return first
			})
		}
	})
	select {
	case s.queue <- j:
		return nil
	case <-s.r.ctx.Done():
		return s.r.cause()
	}
}

func (s *objectStore) putNow(j *job) error {
	o := j.object
	need := min(j.size, putMost)
	if err := s.room.Acquire(s.r.ctx, need); err != nil {
		return s.r.cause()
	}
	defer s.room.Release(need)
	err := o.do(j)
	var be *bucket.Error
	switch {
	case err == nil:
		return nil
	case s.r.ctx.Err() != nil:
		return s.r.cause()
	case errors.As(err, &be):
		return s.stop(err)
	}
	return j.d.fail(j.from, j.rel, fmt.Errorf("object %q: %w", o.key, err))
}

func (o *objectPut) do(j *job) error {
	s, ctx := o.s, o.s.r.ctx
	if ctx.Err() != nil {
		return s.r.cause()
	}
	if !o.looked {
		x, err := s.o.Dest.Stat(ctx, o.key, "")
		if err == nil {
			o.there = x
		} else if !errors.Is(err, bucket.ErrNotFound) {
			return err
		}
	}
	same, err := o.same(j)
	if err != nil {
		return err
	}
	if same {
		add(&s.res.Unchanged, 1)
		s.r.bytes.Add(j.size)
		return nil
	}
	count := &s.res.Put
	if o.there.Key != "" {
		count = &s.res.Replaced
	}
	if !s.r.dry {
		if o.there.Key != "" && !s.versions && !s.o.Delete {
			aside := asideKey + s.r.stamp + "/"
			if _, err := s.o.Dest.CopyFrom(ctx, s.o.Dest, o.there, aside+o.key); err != nil && !errors.Is(err, bucket.ErrNotFound) {
				return err
			}
			s.mu.Lock()
			s.res.Aside = aside
			s.mu.Unlock()
		}
		if err := o.write(j); err != nil {
			return err
		}
	}
	add(count, 1)
	add(&s.res.Bytes, j.size)
	s.r.bytes.Add(j.size)
	return nil
}

// same reports whether the destination has the object with the right content.
func (o *objectPut) same(j *job) (bool, error) {
	s, x := o.s, o.there
	if x.Key == "" || x.Size != j.size {
		return false, nil
	}
	if !s.o.Read {
		if o.etag != "" && x.ETag == o.etag {
			return true, nil
		}
		if sum, ok := x.MD5(); ok && o.md5 != "" && sum == o.md5 {
			return true, nil
		}
		if s.r.trustTimes && o.md5 == "" && o.etag == "" {
			return true, nil
		}
	}
	r, err := s.o.Dest.Get(s.r.ctx, o.key, "")
	if errors.Is(err, bucket.ErrNotFound) {
		o.there = bucket.Object{}
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer r.Close()
	if r.Object().Size != j.size {
		return false, nil
	}
	if j.content == "" {
		if o.sha1 == "" {
			return false, nil
		}
		h := sha1.New()
		_, err := io.Copy(h, r)
		return err == nil && hex.EncodeToString(h.Sum(nil)) == o.sha1, err
	}
	buf := s.r.buffer()
	defer s.r.buffers.Put(buf)
	h := sha256.New()
	for _, d := range j.ids {
		n, _ := s.r.repo.Size(repo.DataBlob, d)
		h.Reset()
		if _, err := io.CopyBuffer(h, io.LimitReader(r, n), *buf); err != nil {
			return false, err
		}
		if id.ID(h.Sum(nil)) != d {
			return false, nil
		}
	}
	return true, nil
}

// write puts the object.
func (o *objectPut) write(j *job) error {
	s := o.s
	if j.content == "" {
		want := bucket.Object{Key: o.key, Size: j.size, VersionID: o.version, ETag: o.etag}
		have, err := s.o.Source.Stat(s.r.ctx, want.Key, want.VersionID)
		if err != nil {
			return s.sourceError(want, err)
		}
		if err := s.sameAsRecorded(want, have); err != nil {
			return err
		}
		_, err = s.o.Dest.CopyFrom(s.r.ctx, s.o.Source, want, o.key)
		return s.sourceError(want, err)
	}
	h := md5.New()
	x, err := s.o.Dest.Put(s.r.ctx, o.key, j.size, func() (io.ReadCloser, error) {
		h.Reset()
		c := newContentReader(s.r.ctx, s.r.repo, j.ids)
		return &contentFile{Reader: io.TeeReader(c, h), c: c}, nil
	})
	if err != nil {
		return err
	}
	if sum := hex.EncodeToString(h.Sum(nil)); o.md5 != "" && sum != o.md5 {
		s.r.warn(fmt.Sprintf("object %q has the MD5 %s, as it had when it was backed up; the instance recorded %s", o.key, sum, o.md5))
	} else if got, ok := x.MD5(); ok && got != sum {
		// Encrypted objects have ETags that look like this one, so the size has to do.
		if x, err = s.o.Dest.Stat(s.r.ctx, o.key, ""); err == nil && x.Size != j.size {
			err = fmt.Errorf("it has %d bytes after it was written, not %d", x.Size, j.size)
		}
	}
	return err
}

type contentFile struct {
	io.Reader
	c *contentReader
}

func (f *contentFile) Close() error {
	f.c.close()
	return nil
}

// finish waits for all objects, and removes what the snapshot does not have, if that is wanted and all went
// well.
func (s *objectStore) finish(ok bool) error {
	if s == nil {
		return nil
	}
	close(s.queue)
	if err := s.puts.Wait(); err != nil || !ok {
		return err
	}
	if s.r.ctx.Err() != nil {
		return s.r.cause()
	}
	s.r.mu.Lock()
	failed := s.r.errCount > 0
	s.r.mu.Unlock()
	if s.res == nil || s.wanted == nil || s.r.dry || s.r.sizeOnly || failed {
		return nil
	}
	g, ctx := errgroup.WithContext(s.r.ctx)
	g.SetLimit(putsAtOnce)
	for _, space := range s.spaces {
		err := s.o.Dest.List(ctx, space+"/", func(x bucket.Object) error {
			if _, ok := s.wanted[hashKey(x.Key)]; ok {
				return nil
			}
			g.Go(func() error {
				if err := s.o.Dest.Remove(ctx, x.Key, ""); err != nil {
					return err
				}
				add(&s.res.Deleted, 1)
				return nil
			})
			return nil
		})
		if err != nil {
			_ = g.Wait()
			return s.stop(err)
		}
	}
	if err := g.Wait(); err != nil {
		return s.stop(err)
	}
	return nil
}
