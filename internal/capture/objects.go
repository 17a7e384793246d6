package capture

import (
	"context"
	"crypto/sha1" //nolint:gosec // the server's own checksum, not a protection
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/bucket"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Blobs that lie in a bucket. The metadata tells which objects there must be, so nothing is listed
// where it says enough: an object whose blob id is known is neither read nor looked up, because blobs
// are written once. In the tar each object is an entry where its file would lie in a store with local
// blobs; so the tar puts both kinds of store back.

// Objects says how the bucket of a store is secured.
type Objects struct {
	// Way is one of snapshot's: WayCopy, WayReplica, WayVersions.
	Way    string
	Source *bucket.Bucket
	// Replica is the second bucket, for WayReplica.
	Replica *bucket.Bucket
	// Rules of the source's life cycle, for WayVersions.
	Rules []bucket.Rule
	// LockUntil keeps the pinned versions locked until then at least; zero: no lock.
	LockUntil time.Time
	// CountSpare lists every space to count what nothing refers to; KeepSpare captures it as well. Without
	// them it is counted where a space has to be listed anyway.
	CountSpare, KeepSpare bool
	// DryRun copies and locks nothing.
	DryRun bool

	// odd counts ETags that look like an MD5 and are none, as those of encrypted objects are.
	odd atomic.Int64
}

const (
	// objectsAtOnce is how many requests go on at once: at 20 ms each, 1600 small objects a second.
	objectsAtOnce = 32
	// listFrom is how many objects must be unknown for a listing (a request for each 1000 objects of the
	// space) to be better than to look them up one by one.
	listFrom = 500
	// oddETags is how many ETags must be no MD5 until they are not asked any more.
	oddETags = 3
	// lockSlack is added to a lock in hundredths of its time, so that the next snapshots need not renew it.
	lockSlack = 10
	// objectsInfix makes the names of groups of objects differ from those of files.
	objectsInfix = "//"
)

// keepsContent reports whether contents go into the repository, as those of local blobs do.
func (o *Objects) keepsContent() bool { return o == nil || o.Way == snapshot.WayCopy }

// identity names the place where contents are that the repository does not have.
func (o *Objects) identity() string {
	if o == nil {
		return ""
	}
	return identityOf(o.record())
}

func identityOf(b *snapshot.Bucket) string {
	if b == nil {
		return ""
	}
	p := b.BucketPlace
	switch {
	case b.Way == snapshot.WayReplica && b.Replica != nil:
		p = *b.Replica
	case b.Way != snapshot.WayVersions:
		return b.Way
	}
	return b.Way + " " + p.Bucket + " " + p.Endpoint
}

// record is what the manifest says of the bucket.
func (o *Objects) record() *snapshot.Bucket {
	place := func(b *bucket.Bucket) snapshot.BucketPlace {
		return snapshot.BucketPlace{Endpoint: b.Endpoint(), Region: b.Region(), Bucket: b.Name(), PathStyle: b.PathStyle()}
	}
	r := &snapshot.Bucket{BucketPlace: place(o.Source), Way: o.Way}
	if o.Replica != nil {
		p := place(o.Replica)
		r.Replica = &p
	}
	if !o.LockUntil.IsZero() {
		t := o.LockUntil.UTC()
		r.LockedUntil = &t
	}
	return r
}

// place is the bucket in which contents are that the repository does not have.
func (o *Objects) place() *bucket.Bucket {
	if o.Way == snapshot.WayReplica {
		return o.Replica
	}
	return o.Source
}

// ExpiringError says that the life cycle of a bucket would remove versions that a snapshot needs.
type ExpiringError struct {
	Bucket string
	Rules  []bucket.Rule
}

func (e *ExpiringError) Error() string {
	var s []string
	for _, r := range e.Rules {
		s = append(s, r.String())
	}
	return fmt.Sprintf("the life cycle of %s would expire versions that the snapshot needs: %s", e.Bucket, strings.Join(s, "; "))
}

// Hints says what to do next.
func (e *ExpiringError) Hints() []string {
	return []string{"Remove the rule, or limit it to keys that are not the instance's.", "Or secure the bucket with --blobs copy or --blobs replica."}
}

// checkRules refuses a bucket whose rules would remove what is pinned.
func (s *store) checkRules() error {
	if s.obj == nil || s.obj.Way != snapshot.WayVersions {
		return nil
	}
	var bad []bucket.Rule
	for _, r := range s.obj.Rules {
		touches := r.Prefix == ""
		for _, sp := range s.spaces {
			touches = touches || r.Touches(sp.id+"/")
		}
		switch {
		case !touches:
		case r.Ends:
			bad = append(bad, r)
		default:
			s.c.warn("%s: %s", s.obj.Source, r)
		}
	}
	if len(bad) > 0 {
		return &ExpiringError{Bucket: s.obj.Source.String(), Rules: bad}
	}
	return nil
}

// spareCount counts the objects of a space that nothing refers to.
type spareCount struct {
	listed                   bool
	objects, bytes, captured int64
}

// unreferenced adds up the spaces; nil if one was never listed.
func (s *store) unreferenced() *snapshot.Unreferenced {
	u := &snapshot.Unreferenced{}
	for _, p := range s.ids {
		if !p.spare.listed {
			return nil
		}
		u.Objects += p.spare.objects
		u.Bytes += p.spare.bytes
		u.Captured += p.spare.captured
	}
	return u
}

// objectRef is an object. The key is kept even where the blob id tells it, because it is what names the
// object to people and to a restore.
type objectRef struct {
	key     string // "" for local blobs
	version string // pinned
	etag    string // of what is not in the repository
	locked  int64  // Unix time until which the version is locked; 0: it is not
}

func (o *objectRef) encode(e *encoder) {
	e.str(o.key)
	if o.key != "" {
		e.str(o.version)
		e.str(o.etag)
		e.int(o.locked)
	}
}

func decodeObject(d *decoder) objectRef {
	o := objectRef{key: d.str()}
	if o.key != "" {
		o.version, o.etag, o.locked = d.str(), d.str(), d.int()
	}
	return o
}

// linkNode makes a symbolic link of the node of a content that is not in the repository: an empty file
// would be a lie, and a link tells where the content is.
func (d *decomposed) linkNode(n *snapshot.Node, b *blobRec) {
	if d.obj.keepsContent() || b.object.key == "" {
		return
	}
	p := d.obj.place()
	n.Type, n.Mode = snapshot.Symlink, fs.ModeSymlink|0o777
	n.LinkTarget = "s3://" + p.Name() + "/" + b.object.key
	if b.object.version != "" {
		n.LinkTarget += "?versionId=" + url.QueryEscape(b.object.version)
	}
	n.Content, n.Size = nil, 0
	add := func(name, value string) {
		if value != "" {
			n.Xattrs = append(n.Xattrs, snapshot.Xattr{Name: name, Value: []byte(value)})
		}
	}
	add(snapshot.AttrObject, b.object.key)
	add(snapshot.AttrVersion, b.object.version)
	add(snapshot.AttrETag, b.object.etag)
	add(snapshot.AttrSize, fmt.Sprint(b.size))
}

// linkedBlob reads back what linkNode wrote; nil: the link is none of those.
func linkedBlob(n *snapshot.Node) *blobRec {
	b := &blobRec{}
	b.id, _ = n.Attr(snapshot.AttrBlobID)
	b.object.key, _ = n.Attr(snapshot.AttrObject)
	b.object.version, _ = n.Attr(snapshot.AttrVersion)
	b.object.etag, _ = n.Attr(snapshot.AttrETag)
	size, _ := n.Attr(snapshot.AttrSize)
	if _, err := fmt.Sscan(size, &b.size); err != nil || b.id == "" || b.object.key == "" {
		return nil
	}
	return b
}

// objectJob is one blob of a bucket on its way into the snapshot.
type objectJob struct {
	blob string
	path string // in the tar
	w    *demand
	rec  *blobRec
	seen bucket.Object // what a listing told; Key is "" without one
	key  string        // of a spare object; else the blob id tells it
}

// objectGroups captures the objects that the metadata refers to, and makes their part of the tar. fresh is
// false if everything is as it was last time.
func (d *decomposed) objectGroups(ctx context.Context, sameNodes bool) (groups []*group, fresh bool, err error) {
	o := d.obj
	d.spare = d.old.spare
	if sameNodes && len(d.old.result) > 0 && !o.CountSpare && !o.KeepSpare && o.LockUntil.IsZero() && (!d.spare.listed || d.spare.captured == 0) {
		if groups := d.sameObjects(); groups != nil {
			return groups, false, nil
		}
	}
	d.spare.captured = 0
	if err := d.build(ctx); err != nil {
		return nil, true, err
	}
	jobs, err := d.objectJobs(ctx)
	if err != nil {
		return nil, true, err
	}
	g, gctx := d.c.errgroup(ctx, objectsAtOnce)
	for _, j := range jobs {
		if j.rec != nil {
			continue
		}
		g.Go(func() error {
			if gctx.Err() != nil {
				return context.Cause(gctx)
			}
			d.c.entries.Add(1)
			return d.secure(gctx, j)
		})
	}
	if err := g.Wait(); err != nil {
		return nil, true, err
	}
	if err := context.Cause(ctx); err != nil {
		return nil, true, err
	}
	if err := d.lock(ctx, jobs); err != nil {
		return nil, true, err
	}
	groups, err = d.objectTar(ctx, jobs)
	return groups, true, err
}

// sameObjects returns the groups of last time, if the repository still has what they name.
func (d *decomposed) sameObjects() []*group {
	groups := []*group{}
	for first, old := range d.old.groups {
		if !d.isBlobGroup(first) {
			continue
		}
		if !d.c.hasAll(old.ids) || !d.c.hasAll(old.needs) {
			return nil
		}
		g := *old
		g.reused = true
		groups = append(groups, &g)
	}
	return groups
}

// objectJobs lists what must be secured, in the order of the tar, with what is known of it.
func (d *decomposed) objectJobs(ctx context.Context) ([]*objectJob, error) {
	o := d.obj
	var jobs []*objectJob
	byKey := map[string]*objectJob{}
	unknown := 0
	for blob, w := range d.want {
		if !plainBlob(blob) {
			continue // it can be the name of no object; the proof will miss it
		}
		j := &objectJob{blob: blob, path: d.sp.rel + "/blobs/" + ocis.NodePath(blob), w: w}
		j.rec = d.knownObject(j)
		if j.rec == nil {
			unknown++
			byKey[bucket.Key(d.sp.id, blob)] = j
		}
		jobs = append(jobs, j)
	}
	first := len(d.known) == 0 && len(jobs) > 0
	if o.CountSpare || o.KeepSpare || first || unknown >= listFrom {
		spare, err := d.list(ctx, byKey)
		if err != nil {
			return nil, err
		}
		jobs = append(jobs, spare...)
	}
	sort.Slice(jobs, func(i, k int) bool { return comparePaths(jobs[i].path, jobs[k].path) < 0 })
	return jobs, nil
}

// plainBlob reports whether a blob id can name an object, and a file below blobs/. What is no UUID is
// possible, what would leave the folder is not.
func plainBlob(blob string) bool {
	if blob == "" || strings.ContainsAny(blob, "/\x00") || len(blob) > 512 {
		return false
	}
	for part := range strings.SplitSeq(ocis.NodePath(blob), "/") {
		if part == "" || part == "." || part == ".." || len(part) > 255 {
			return false
		}
	}
	return true
}

// knownObject is what an earlier run knows of the blob, if it is good enough.
func (d *decomposed) knownObject(j *objectJob) *blobRec {
	old := d.known[j.blob]
	if old == nil || d.c.opts.FullScan || old.size != j.w.size {
		return nil
	}
	b := *old
	if d.obj.keepsContent() {
		if !d.c.hasAll(b.contents.ids) || j.w.hasSHA1 && !(b.hasSHA1 && b.sha1 == j.w.sha1) {
			return nil
		}
		b.object.version, b.object.etag, b.object.locked = "", "", 0
	} else if b.object.etag == "" {
		return nil
	} else if x := (bucket.Object{ETag: b.object.etag}); !b.hasSHA1 && j.w.hasMD5 {
		// What the trees of a snapshot tell of it does not say that it was compared.
		if sum, ok := x.MD5(); ok && sum == hex.EncodeToString(j.w.md5[:]) {
			b.sha1, b.hasSHA1 = j.w.sha1, j.w.hasSHA1
		}
	}
	if b.object.key == "" {
		b.object.key = bucket.Key(d.sp.id, j.blob)
	}
	return &b
}

// list looks at all objects of the space: what it says of those that are sought spares requests, and what
// nothing refers to is counted.
func (d *decomposed) list(ctx context.Context, sought map[string]*objectJob) (spare []*objectJob, err error) {
	o := d.obj
	prefix := d.sp.id + "/"
	var mu sync.Mutex
	d.spare = spareCount{listed: true}
	err = o.Source.List(ctx, prefix, func(x bucket.Object) error {
		mu.Lock()
		defer mu.Unlock()
		if j := sought[x.Key]; j != nil {
			j.seen = x
			return nil
		}
		rel := x.Key[len(prefix):]
		blob := strings.ReplaceAll(rel, "/", "")
		if plainBlob(blob) && ocis.NodePath(blob) == rel {
			if d.want[blob] != nil {
				return nil
			}
		} else {
			blob = "./blobs/" + rel // no key of the product
		}
		d.spare.objects++
		d.spare.bytes += x.Size
		if !o.KeepSpare || !tarPath(rel) {
			return nil
		}
		d.spare.captured++
		place := inSnapshot(d.base, "unreferenced", snapshot.SafeName(d.sp.id), snapshot.SafeName(blob))
		j := &objectJob{
			blob: blob, key: x.Key, path: d.sp.rel + "/blobs/" + rel, seen: x,
			w: &demand{size: x.Size, place: place, mtime: timespec{x.Modified.Unix(), int64(x.Modified.Nanosecond())}},
		}
		j.rec = d.knownObject(j)
		spare = append(spare, j)
		return nil
	})
	return spare, err
}

// tarPath reports whether rel can be a path below a folder.
func tarPath(rel string) bool {
	for part := range strings.SplitSeq(rel, "/") {
		if part == "" || part == "." || part == ".." || len(part) > 255 || strings.ContainsRune(part, 0) {
			return false
		}
	}
	return true
}

// secure brings one object into the snapshot, in the chosen way. One that is not there leaves rec empty.
func (d *decomposed) secure(ctx context.Context, j *objectJob) error {
	key := j.key
	if key == "" {
		key = bucket.Key(d.sp.id, j.blob)
	}
	try := func(x bucket.Object) error {
		err := d.secureAs(ctx, j, x)
		if errors.Is(err, bucket.ErrNotFound) {
			return nil
		}
		return err
	}
	if err := try(bucket.Object{Key: key}); err != nil || j.rec != nil {
		return err
	}
	if j.key != "" {
		return nil // a spare object that is gone is no loss
	}
	// An old copy, the name of former times, a version from before it was deleted.
	if d.obj.Way == snapshot.WayReplica {
		x, err := d.obj.Replica.Stat(ctx, key, "")
		if err == nil && x.Size == j.w.size {
			j.rec = d.objectRec(j, x, "")
			return d.judgeObject(ctx, j, d.obj.Replica, x)
		}
		if err != nil && !errors.Is(err, bucket.ErrNotFound) {
			return err
		}
	}
	if err := try(bucket.Object{Key: bucket.FormerKey(j.blob)}); err != nil || j.rec != nil {
		return err
	}
	versions, err := d.obj.Source.Versions(ctx, key)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return nil //nolint:nilerr // the server has no versions, or the keys no right to see them: then it is missing
	}
	for _, v := range versions {
		if v.Marker || v.Size != j.w.size || v.VersionID == "" {
			continue
		}
		if err := try(v); err != nil {
			return err
		}
		if j.rec != nil {
			d.c.warn("space %s: the object of blob %s was deleted; version %s of it was taken", d.sp.id, j.blob, v.VersionID)
			return nil
		}
	}
	return nil
}

// secureAs is secure for one candidate; its version is "" for the current one.
//
// Errors: bucket.ErrNotFound if it is not there.
func (d *decomposed) secureAs(ctx context.Context, j *objectJob, x bucket.Object) error {
	switch d.obj.Way {
	case snapshot.WayReplica:
		return d.replicate(ctx, j, x)
	case snapshot.WayVersions:
		return d.pin(ctx, j, x)
	}
	return d.copyObject(ctx, j, x)
}

// copyObject streams an object into the repository.
func (d *decomposed) copyObject(ctx context.Context, j *objectJob, x bucket.Object) error {
	r, err := d.obj.Source.Get(ctx, x.Key, x.VersionID)
	if err != nil {
		return err
	}
	defer r.Close()
	size := r.Object().Size
	got, err := d.c.saver.object(ctx, r, size, d.c.slots)
	var re *readError
	if errors.As(err, &re) {
		err = re.err
	}
	if err != nil {
		return err
	}
	if got.size != size {
		return fmt.Errorf("object %q of %s was announced with %d bytes and gave %d", x.Key, d.obj.Source, size, got.size)
	}
	j.rec = &blobRec{id: j.blob, size: got.size, sha1: got.sha1, hasSHA1: true, contents: got, object: objectRef{key: x.Key}}
	return nil
}

// object saves size bytes that r gives, and makes their SHA-1. Large ones wait for a slot, which bounds
// the memory of their buffers.
func (s *saver) object(ctx context.Context, r io.Reader, size int64, slots chan struct{}) (content, error) {
	h := s.sums.New()
	if size > smallFile {
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		case <-ctx.Done():
			return content{}, context.Cause(ctx)
		}
		c, err := s.section(ctx, r, h)
		c.sha1 = h.Sum()
		return c, err
	}
	buf := s.small.get()
	defer s.small.put(buf)
	n, err := io.ReadFull(r, buf[:size])
	s.read.Add(int64(n))
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return content{}, &readError{err}
	}
	var c content
	_, err = s.cutAll(ctx, buf[:n], true, h, &c)
	c.sha1 = h.Sum()
	return c, err
}

// objectRec is the record of an object whose content stays where it is.
func (d *decomposed) objectRec(j *objectJob, x bucket.Object, version string) *blobRec {
	return &blobRec{id: j.blob, size: x.Size, object: objectRef{key: x.Key, etag: x.ETag, version: version}}
}

// replicate makes sure that the replica has the object.
func (d *decomposed) replicate(ctx context.Context, j *objectJob, x bucket.Object) error {
	o := d.obj
	var err error
	if j.seen.Key == x.Key && x.VersionID == "" {
		x = j.seen
		x.VersionID = ""
	} else if version := x.VersionID; x.ETag == "" {
		if x, err = o.Source.Stat(ctx, x.Key, version); err != nil {
			return err
		}
		x.VersionID = version
	}
	have, err := o.Replica.Stat(ctx, x.Key, "")
	if err != nil && !errors.Is(err, bucket.ErrNotFound) {
		return err
	}
	if err == nil && have.Size == x.Size && have.ETag == x.ETag {
		j.rec = d.objectRec(j, have, "")
		return d.judgeObject(ctx, j, o.Replica, have)
	}
	if err == nil && have.Size == j.w.size {
		// Older snapshots may need what is there, and it may be the better one.
		j.rec = d.objectRec(j, have, "")
		if right, err := d.rightContent(ctx, j, o.Replica, have); err != nil || right {
			return err
		}
		j.rec = nil
		switch right, err := d.rightContent(ctx, j, o.Source, x); {
		case err != nil:
			return err
		case !right:
			j.rec = d.objectRec(j, have, "") // none of them is; the proof says so
			return d.judgeObject(ctx, j, o.Replica, have)
		}
	}
	if o.DryRun {
		j.rec = d.objectRec(j, x, "")
		return d.judgeObject(ctx, j, o.Source, x)
	}
	copied, err := o.Replica.CopyFrom(ctx, o.Source, x, x.Key)
	if err != nil {
		return err
	}
	d.c.bytesRead.Add(copied.Size)
	j.rec = d.objectRec(j, copied, "")
	return d.judgeObject(ctx, j, o.Replica, copied)
}

// pin notes the version of an object.
func (d *decomposed) pin(ctx context.Context, j *objectJob, x bucket.Object) error {
	got, err := d.obj.Source.Stat(ctx, x.Key, x.VersionID)
	if err != nil {
		return err
	}
	if got.VersionID == "" {
		got.VersionID = "null" // written before the bucket kept versions
	}
	// Keys of former times are below no space, where checkRules looks.
	for _, r := range d.obj.Rules {
		if r.Ends && r.Hits(got.Key) {
			return &ExpiringError{Bucket: d.obj.Source.String(), Rules: []bucket.Rule{r}}
		}
	}
	j.rec = d.objectRec(j, got, got.VersionID)
	return d.judgeObject(ctx, j, d.obj.Source, got)
}

// judgeObject compares the ETag with the checksum that the server recorded, where it is an MD5. Where they
// differ the content decides: ETags of encrypted objects look like an MD5 and are none.
func (d *decomposed) judgeObject(ctx context.Context, j *objectJob, b *bucket.Bucket, x bucket.Object) error {
	w := j.w
	sum, ok := x.MD5()
	switch {
	case !w.hasMD5 || !ok || x.Size != w.size || d.obj.odd.Load() >= oddETags:
		return nil
	case sum == hex.EncodeToString(w.md5[:]):
		j.rec.sha1, j.rec.hasSHA1 = w.sha1, w.hasSHA1
		return nil
	}
	right, err := d.rightContent(ctx, j, b, x)
	if right {
		d.obj.odd.Add(1)
	}
	return err
}

// rightContent reads an object and tells whether its content is what the metadata says. It notes the SHA-1.
func (d *decomposed) rightContent(ctx context.Context, j *objectJob, b *bucket.Bucket, x bucket.Object) (bool, error) {
	w := j.w
	if !w.hasSHA1 {
		return false, nil
	}
	if sum, ok := x.MD5(); ok && w.hasMD5 && sum == hex.EncodeToString(w.md5[:]) {
		if j.rec != nil {
			j.rec.sha1, j.rec.hasSHA1 = w.sha1, true
		}
		return true, nil
	}
	sum, err := hashObject(ctx, b, x)
	if err != nil {
		return false, err
	}
	d.c.bytesRead.Add(x.Size)
	if j.rec != nil {
		j.rec.sha1, j.rec.hasSHA1 = sum, true
	}
	return sum == w.sha1, nil
}

func hashObject(ctx context.Context, b *bucket.Bucket, x bucket.Object) (sum [sha1.Size]byte, err error) {
	r, err := b.Get(ctx, x.Key, x.VersionID)
	if err != nil {
		return sum, err
	}
	defer r.Close()
	h := sha1.New()
	_, err = io.Copy(h, r)
	h.Sum(sum[:0])
	return sum, err
}

// lock keeps the pinned versions as long as the snapshot shall be kept.
func (d *decomposed) lock(ctx context.Context, jobs []*objectJob) error {
	o := d.obj
	if o.LockUntil.IsZero() || o.Way != snapshot.WayVersions || o.DryRun || d.c.opts.Warm {
		return nil
	}
	until := o.LockUntil.Add(o.LockUntil.Sub(d.c.started) * lockSlack / 100).Truncate(time.Second)
	g, gctx := d.c.errgroup(ctx, objectsAtOnce)
	for _, j := range jobs {
		if j.rec == nil || j.rec.object.locked >= o.LockUntil.Unix() {
			continue
		}
		g.Go(func() error {
			if err := o.Source.Lock(gctx, j.rec.object.key, j.rec.object.version, until); err != nil {
				return err
			}
			j.rec.object.locked = until.Unix()
			return nil
		})
	}
	return g.Wait()
}

// objectTar makes the entries of the objects, cut into groups where their names say so.
func (d *decomposed) objectTar(ctx context.Context, jobs []*objectJob) ([]*group, error) {
	owner, err := d.root.stat(d.sp.rel)
	if err != nil {
		return nil, err
	}
	var groups []*group
	var cur []*objectJob
	flush := func() error {
		if len(cur) == 0 {
			return nil
		}
		g, err := d.objectGroup(ctx, &owner, cur)
		groups, cur = append(groups, g), cur[:0]
		return err
	}
	for _, j := range jobs {
		if j.rec == nil {
			continue
		}
		if n := len(cur); n >= groupMax || n >= groupMin && nameHash(j.path)&0xff == 0 {
			if err := flush(); err != nil {
				return nil, err
			}
		}
		cur = append(cur, j)
	}
	return groups, flush()
}

func (d *decomposed) objectGroup(ctx context.Context, owner *entry, jobs []*objectJob) (*group, error) {
	dir := d.sp.rel + "/blobs"
	g := &group{first: dir + objectsInfix + strings.TrimPrefix(jobs[0].path, dir+"/")}
	st := stream{s: d.c.saver}
	var tw tarWriter
	var rec encoder
	h := sha256.New()
	for _, j := range jobs {
		b := j.rec
		// Nothing but the metadata says what the file of an object would look like: the mode is that of
		// the product's blob files.
		b.stat = entry{path: j.path, mode: unix.S_IFREG | 0o644, uid: owner.uid, gid: owner.gid, nlink: 1, size: b.size, mtime: j.w.mtime}
		te := tarEntry{entry: &b.stat, object: b.object}
		if d.obj.keepsContent() {
			te.content, te.holes = j.w.place, b.contents.holes
		} else if j.w.hasSHA1 {
			te.sha1 = hex.EncodeToString(j.w.sha1[:])
		}
		if j.w.hasMD5 {
			te.md5 = hex.EncodeToString(j.w.md5[:])
		}
		from := len(rec.p)
		rec.byte(recBlob)
		b.encode(&rec)
		h.Write(rec.p[from:])
		fmt.Fprintf(h, "%q %q %q", j.w.place, te.sha1, te.md5)
		tw.buf = st.buf
		tw.add(&te)
		st.buf = tw.buf
		if len(st.buf) >= 2*tarChunks.Max {
			if err := st.drain(ctx, false); err != nil {
				return nil, err
			}
		}
	}
	h.Sum(g.print[:0])
	if err := st.drain(ctx, true); err != nil {
		return nil, err
	}
	g.ids, g.size, g.recs, g.needs = st.ids, st.size, rec.p, rec.blobs
	for _, j := range jobs {
		d.objects.blob(&j.rec.stat)
	}
	return g, nil
}
