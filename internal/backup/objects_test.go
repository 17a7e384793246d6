package backup_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/backup"
	"github.com/holdfast-backup/holdfast/internal/bucket"
	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/replica"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/restore"
	"github.com/holdfast-backup/holdfast/internal/s3/s3test"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
	"github.com/holdfast-backup/holdfast/internal/verify"
)

// rig is the fixture with a bucket, its objects loaded into a real S3 server.
type rig struct {
	t      *testing.T
	srv    *s3test.Server
	source string // data/, config/, bucket/
	bucket string
	inst   *ocis.Instance
	dir    string // of the repository
}

func newRig(t *testing.T, o s3test.Options) *rig {
	t.Helper()
	g := &rig{t: t, srv: s3test.Start(t, o), source: testfixture.Unpack(t, testfixture.OCISWithS3Blobs), dir: filepath.Join(t.TempDir(), "repo")}
	g.bucket = g.srv.Bucket(t, o.Versioning, o.Versioning)
	g.load(g.bucket)
	g.inst = g.discover(g.source, g.srv.Endpoint)
	newRepo(t, local.New(g.dir))
	return g
}

// client has all rights.
func (g *rig) client() *minio.Client {
	c, err := g.srv.Client()
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(c.Close)
	return c.Client
}

// load puts the fixture's objects into a bucket.
func (g *rig) load(name string) {
	g.t.Helper()
	c := g.client()
	var eg errgroup.Group
	eg.SetLimit(8)
	for key, data := range g.want() {
		eg.Go(func() error {
			_, err := c.PutObject(context.Background(), name, key, bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{})
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		g.t.Fatal(err)
	}
}

// want are the fixture's objects.
func (g *rig) want() map[string][]byte {
	g.t.Helper()
	out := map[string][]byte{}
	root := filepath.Join(g.source, "bucket")
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		key, _ := filepath.Rel(root, p)
		out[key], err = os.ReadFile(p)
		return err
	})
	if err != nil {
		g.t.Fatal(err)
	}
	return out
}

// objects reads a whole bucket.
func (g *rig) objects(name string) map[string][]byte {
	g.t.Helper()
	b := g.open(name)
	out := map[string][]byte{}
	var mu sync.Mutex
	err := b.List(g.t.Context(), "", func(x bucket.Object) error {
		r, err := b.Get(g.t.Context(), x.Key, "")
		if err != nil {
			return err
		}
		defer r.Close()
		data, err := io.ReadAll(r)
		mu.Lock()
		out[x.Key] = data
		mu.Unlock()
		return err
	})
	if err != nil {
		g.t.Fatal(err)
	}
	return out
}

func (g *rig) sameObjects(name string, want map[string][]byte) {
	g.t.Helper()
	got := g.objects(name)
	for _, key := range slices.Sorted(maps.Keys(want)) {
		if data, ok := got[key]; !ok {
			g.t.Errorf("object %s is missing", key)
		} else if !bytes.Equal(data, want[key]) {
			g.t.Errorf("object %s differs", key)
		}
	}
	for key := range got {
		if _, ok := want[key]; !ok && !strings.HasPrefix(key, replica.Prefix) {
			g.t.Errorf("object %s should not be there", key)
		}
	}
}

func (g *rig) open(name string) *bucket.Bucket {
	g.t.Helper()
	b, err := bucket.Open(g.t.Context(), bucket.Config{Endpoint: g.srv.Endpoint, Region: g.srv.Region, Bucket: name, AccessKey: g.srv.AccessKey, SecretKey: g.srv.SecretKey})
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(b.Close)
	return b
}

func (g *rig) discover(source, endpoint string) *ocis.Instance {
	g.t.Helper()
	env := []string{
		"STORAGE_USERS_DRIVER=s3ng", "STORAGE_USERS_DECOMPOSEDS3_ENDPOINT=" + endpoint, "STORAGE_USERS_DECOMPOSEDS3_REGION=" + g.srv.Region,
		"STORAGE_USERS_DECOMPOSEDS3_BUCKET=" + g.bucket,
		"STORAGE_USERS_DECOMPOSEDS3_ACCESS_KEY=" + g.srv.AccessKey, "STORAGE_USERS_DECOMPOSEDS3_SECRET_KEY=" + g.srv.SecretKey,
	}
	return discoverWith(g.t, source, env)
}

func discoverWith(t *testing.T, source string, env []string) *ocis.Instance {
	t.Helper()
	inst, err := discover.Discover(t.Context(), discover.Options{
		BaseDataPath: filepath.Join(source, "data"), ConfigDir: filepath.Join(source, "config"), NoSizes: true, Environ: env,
	})
	if err != nil {
		t.Fatal(err)
	}
	return inst
}

// backUp makes a snapshot in the rig's repository.
func (g *rig) backUp(o backup.Options) (*backup.Result, error) {
	g.t.Helper()
	return backUpTo(g.t, g.dir, o, g.inst)
}

func backUpTo(t *testing.T, dir string, o backup.Options, inst *ocis.Instance) (*backup.Result, error) {
	t.Helper()
	return backUpAt(t, local.New(dir), repo.Options{}, o, inst)
}

func backUpAt(t *testing.T, be backend.Backend, ro repo.Options, o backup.Options, inst *ocis.Instance) (*backup.Result, error) {
	t.Helper()
	r, err := repo.Open(t.Context(), be, "pw", ro)
	if err != nil {
		return nil, err
	}
	lock, ctx, err := r.Lock(t.Context(), repo.LockOptions{})
	if err != nil {
		return nil, err
	}
	defer lock.Unlock()
	if err := r.LoadIndex(ctx); err != nil {
		return nil, err
	}
	if o.Instance == nil {
		o.Instance = inst
	}
	if o.Freezer == nil {
		o.Freezer = freeze.None{}
	}
	o.Repo, o.Hostname, o.Version = r, "test", "test"
	return backup.Run(ctx, o)
}

func (g *rig) mustBackUp(o backup.Options) *backup.Result {
	g.t.Helper()
	res, err := g.backUp(o)
	if err != nil {
		g.t.Fatal(err)
	}
	if p := &res.Manifest.Proof; !p.Complete || p.Blobs == 0 || p.Verified != p.Blobs-p.InFlight {
		g.t.Fatalf("the proof is not what it should be: %+v", p)
	}
	return res
}

// restore puts the latest snapshot of a repository below dst.
func restoreTo(t *testing.T, dir, dst string, o restore.Options) (*restore.Result, error) {
	t.Helper()
	return restoreAt(t, local.New(dir), dst, o)
}

func restoreAt(t *testing.T, be backend.Backend, dst string, o restore.Options) (*restore.Result, error) {
	t.Helper()
	r := open(t, be)
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	o.BasePath, o.ConfigDir = filepath.Join(dst, "data"), filepath.Join(dst, "config")
	p, err := restore.MakePlan(t.Context(), r, latest(t, r), o)
	if err != nil {
		t.Fatal(err)
	}
	return restore.Run(t.Context(), r, p)
}

func latest(t *testing.T, r *repo.Repository) *snapshot.Snapshot {
	t.Helper()
	list, err := snapshot.List(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	sn, err := snapshot.Find(list, "latest")
	if err != nil {
		t.Fatal(err)
	}
	return sn
}

func (g *rig) mustRestore(dst string, o restore.Options) *restore.Result {
	g.t.Helper()
	o.Progress = noMoreThanSaid(g.t)
	res, err := restoreTo(g.t, g.dir, dst, o)
	if err != nil {
		g.t.Fatal(err)
	}
	return res
}

// noMoreThanSaid fails the test if a restore says it did more than it said it would.
func noMoreThanSaid(t *testing.T) progress.Sink {
	return func(e progress.Event) {
		if e.Kind == progress.Finish && (e.Done > e.Total || e.Bytes > e.TotalBytes || e.Total == 0) {
			t.Errorf("%d of %d entries, %d of %d bytes", e.Done, e.Total, e.Bytes, e.TotalBytes)
		}
	}
}

func users(o *restore.Objects) map[string]*restore.Objects {
	return map[string]*restore.Objects{"users": o}
}

// sameFiles compares what lies on disk.
func (g *rig) sameFiles(dst string) {
	g.t.Helper()
	for _, d := range []string{"data", "config"} {
		testfixture.Compare(g.t, filepath.Join(g.source, d), filepath.Join(dst, d), testfixture.Options{Limit: 20})
	}
}

// expected compares each space of the latest snapshot with what the real server answered. Contents that are
// not in the repository are read where their links point.
func expected(t *testing.T, dir, fixture string, away *bucket.Bucket) {
	t.Helper()
	r := open(t, local.New(dir))
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	sn := latest(t, r)
	content := func(p, want string) {
		t.Helper()
		n, err := snapshot.Lookup(t.Context(), r, *sn.Tree, p)
		if err != nil {
			t.Error(err)
			return
		}
		var data []byte
		switch key, ok := n.Attr(snapshot.AttrObject); {
		case away != nil && ok:
			version, _ := n.Attr(snapshot.AttrVersion)
			if n.Type != snapshot.Symlink || !strings.HasPrefix(n.LinkTarget, "s3://"+away.Name()+"/"+key) {
				t.Errorf("%q is a %s to %q", p, n.Type, n.LinkTarget)
			}
			var rd *bucket.Reader
			if rd, err = away.Get(t.Context(), key, version); err == nil {
				data, err = io.ReadAll(rd)
			}
		case away != nil && n.Size > 0:
			t.Errorf("%q has its content in the repository", p)
		default:
			data, err = snapshot.LoadContent(t.Context(), r, n, 1<<30)
		}
		if err != nil {
			t.Error(err)
		} else if h := sha256.Sum256(data); hex.EncodeToString(h[:]) != want {
			t.Errorf("%q holds other bytes than the server served", p)
		}
	}
	checked := 0
	for _, sp := range testfixture.LoadExpected(t, fixture).Spaces() {
		if sp.Disabled {
			continue // the server answers errors for it
		}
		for p, it := range sp.Items {
			if it.IsFolder() {
				continue
			}
			content(path.Join("/storage/users/spaces", sp.DriveAlias, p), it.Content)
			checked++
			for _, v := range it.Versions {
				stamp := v.Key[strings.Index(v.Key, ".REV.")+len(".REV."):]
				content(path.Join("/storage/users/versions", sp.DriveAlias, p, stamp), v.SHA256)
				checked++
			}
		}
	}
	if checked < 100 {
		t.Fatalf("only %d files were compared", checked)
	}
}

// damage removes, cuts short and alters three objects each, and adds one. It returns how many of them it
// altered.
func (g *rig) damage(name string) {
	g.t.Helper()
	c := g.client()
	want := g.want()
	n := 0
	for _, key := range slices.Sorted(maps.Keys(want)) {
		data := bytes.Clone(want[key])
		if len(data) < 10 {
			continue
		}
		var err error
		switch n / 3 {
		case 0:
			err = c.RemoveObject(g.t.Context(), name, key, minio.RemoveObjectOptions{})
		case 1:
			_, err = c.PutObject(g.t.Context(), name, key, bytes.NewReader(data[:5]), 5, minio.PutObjectOptions{})
		case 2:
			data[3] ^= 0xff
			_, err = c.PutObject(g.t.Context(), name, key, bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{})
		}
		if err != nil {
			g.t.Fatal(err)
		}
		n++
	}
	space, _, _ := strings.Cut(slices.Sorted(maps.Keys(want))[0], "/")
	if _, err := c.PutObject(g.t.Context(), name, space+"/ex/tr/a0/00/-object", strings.NewReader("extra"), 5, minio.PutObjectOptions{}); err != nil {
		g.t.Fatal(err)
	}
}

func TestObjectsAreCopiedAndComeBack(t *testing.T) {
	g := newRig(t, s3test.Options{})
	g.mustBackUp(backup.Options{})
	expected(t, g.dir, g.source, nil)
	clean(t, g.dir)

	dst, name := filepath.Join(t.TempDir(), "a"), g.srv.Bucket(t, false, false)
	dest := g.open(name)
	res := g.mustRestore(dst, restore.Options{Objects: users(&restore.Objects{Dest: dest})})
	if b := res.Buckets[0]; b.Put != int64(len(g.want())) || b.Replaced+b.Unchanged+b.Extra != 0 {
		t.Errorf("restore to an empty bucket: %+v", b)
	}
	g.sameFiles(dst)
	g.sameObjects(name, g.want())

	g.damage(name)
	res = g.mustRestore(dst, restore.Options{Overwrite: true, DryRun: true, Objects: users(&restore.Objects{Dest: dest})})
	if b := res.Buckets[0]; b.Put != 3 || b.Replaced != 6 || b.Extra != 1 || b.Unchanged != int64(len(g.want()))-9 {
		t.Errorf("dry run onto a damaged bucket: %+v", b)
	}
	damaged := g.objects(name)
	res = g.mustRestore(dst, restore.Options{Overwrite: true, Objects: users(&restore.Objects{Dest: dest})})
	b := res.Buckets[0]
	if b.Put != 3 || b.Replaced != 6 || b.Extra != 1 || b.Deleted != 0 || b.Unchanged != int64(len(g.want()))-9 {
		t.Errorf("delta restore: %+v", b)
	}
	// What was replaced is still there, and so is what the snapshot does not know.
	want := g.want()
	for key, data := range damaged {
		if old, ok := want[key]; !ok {
			want[key] = data
		} else if !bytes.Equal(old, data) {
			want[b.Aside+key] = data
		}
	}
	g.sameObjects(name, want)

	res = g.mustRestore(dst, restore.Options{Overwrite: true, Objects: users(&restore.Objects{Dest: dest, Read: true, Delete: true})})
	if b := res.Buckets[0]; b.Put+b.Replaced != 0 || b.Deleted != 1 {
		t.Errorf("restore that deletes: %+v", b)
	}
}

// TestObjectsBecomeFilesAndBack converts between the drivers in both directions.
func TestObjectsBecomeFilesAndBack(t *testing.T) {
	g := newRig(t, s3test.Options{})
	g.mustBackUp(backup.Options{})
	files := filepath.Join(t.TempDir(), "files")
	g.mustRestore(files, restore.Options{Objects: users(&restore.Objects{})})
	// As a server with local blobs it is complete, and says the same as the real one did.
	inst := discoverWith(t, files, []string{"STORAGE_USERS_DRIVER=ocis"})
	dir := filepath.Join(t.TempDir(), "repo")
	newRepo(t, local.New(dir))
	res, err := backUpTo(t, dir, backup.Options{}, inst)
	if err != nil {
		t.Fatal(err)
	}
	if p := res.Manifest.Proof; !p.Complete || p.Verified != p.Blobs-p.InFlight || res.Manifest.Setup != "posix" {
		t.Fatalf("%+v", p)
	}
	expected(t, dir, g.source, nil)

	back, name := filepath.Join(t.TempDir(), "back"), g.srv.Bucket(t, false, false)
	if _, err := restoreTo(t, dir, back, restore.Options{Progress: noMoreThanSaid(t), Objects: users(&restore.Objects{Dest: g.open(name)})}); err != nil {
		t.Fatal(err)
	}
	g.sameFiles(back)
	g.sameObjects(name, g.want())
}

// counter passes requests on and counts them; before may answer instead.
type counter struct {
	*httptest.Server
	mu     sync.Mutex
	counts map[string]int
	before func(w http.ResponseWriter, r *http.Request, kind string) bool
}

func kindOf(r *http.Request) string {
	switch {
	case strings.Count(strings.Trim(r.URL.Path, "/"), "/") == 0 && r.Method == http.MethodGet && r.URL.Query().Has("list-type"):
		return "list"
	case strings.Count(strings.Trim(r.URL.Path, "/"), "/") == 0:
		return "bucket"
	}
	return strings.ToLower(r.Method)
}

func (g *rig) proxy(before func(w http.ResponseWriter, r *http.Request, kind string) bool) *counter {
	u, err := url.Parse(g.srv.Endpoint)
	if err != nil {
		g.t.Fatal(err)
	}
	c := &counter{counts: map[string]int{}, before: before}
	p := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = u.Scheme, u.Host }}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		kind := kindOf(r)
		c.mu.Lock()
		c.counts[kind]++
		c.mu.Unlock()
		if c.before == nil || !c.before(w, r, kind) {
			p.ServeHTTP(w, r)
		}
	}))
	g.t.Cleanup(c.Close)
	g.inst = g.discover(g.source, c.URL)
	return c
}

// seen returns the counts, and begins anew.
func (c *counter) seen() map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := c.counts
	c.counts = map[string]int{}
	return out
}

// removeAll deletes every object of a bucket.
func (g *rig) removeAll(name string) {
	g.t.Helper()
	b := g.open(name)
	for key := range g.objects(name) {
		if err := b.Remove(g.t.Context(), key, ""); err != nil {
			g.t.Fatal(err)
		}
	}
}

// check verifies the repository, and asks the bucket for what is not in it.
func (g *rig) check(away *bucket.Bucket) *verify.Report {
	g.t.Helper()
	r := open(g.t, local.New(g.dir))
	if err := r.LoadIndex(g.t.Context()); err != nil {
		g.t.Fatal(err)
	}
	rep, err := verify.Run(g.t.Context(), r, verify.Options{Bucket: func(context.Context, *snapshot.Store) (*bucket.Bucket, error) {
		if away == nil {
			return nil, errors.New("no keys")
		}
		return g.openIn(away.Name()), nil
	}})
	if err != nil {
		g.t.Fatal(err)
	}
	return rep
}

// openIn is open without a close at the end of the test: check closes what it is given.
func (g *rig) openIn(name string) *bucket.Bucket {
	b, err := bucket.Open(g.t.Context(), bucket.Config{Endpoint: g.srv.Endpoint, Region: g.srv.Region, Bucket: name, AccessKey: g.srv.AccessKey, SecretKey: g.srv.SecretKey})
	if err != nil {
		g.t.Fatal(err)
	}
	return b
}

func whole(t *testing.T, rep *verify.Report) {
	t.Helper()
	if len(rep.Errors) > 0 || len(rep.Hints) > 0 {
		t.Errorf("check: errors %q, hints %q", rep.Errors, rep.Hints)
	}
	for _, s := range rep.Snapshots {
		if !s.Complete {
			t.Errorf("snapshot %s is not complete", s.ID.Short())
		}
	}
}

func TestObjectsInAReplica(t *testing.T) {
	t.Parallel()
	g := newRig(t, s3test.Options{})
	name := g.srv.Bucket(t, false, false)
	way := backup.Options{Blobs: backup.BlobOptions{Way: snapshot.WayReplica, Replica: bucket.Config{Bucket: name}}}
	g.mustBackUp(way)
	g.sameObjects(name, g.want())
	replica := g.open(name)
	expected(t, g.dir, g.source, replica)
	whole(t, g.check(replica))
	clean(t, g.dir)
	if rep := g.check(nil); len(rep.Hints) != 1 || len(rep.Errors) != 0 {
		t.Errorf("without keys: %q, %q", rep.Errors, rep.Hints)
	}

	// The bucket is lost: everything comes from the replica, by copies within the server.
	g.removeAll(g.bucket)
	dst := filepath.Join(t.TempDir(), "a")
	g.mustRestore(dst, restore.Options{Objects: users(&restore.Objects{Dest: g.open(g.bucket), Source: replica})})
	g.sameFiles(dst)
	g.sameObjects(g.bucket, g.want())
	g.damage(g.bucket)
	res := g.mustRestore(dst, restore.Options{Overwrite: true, Objects: users(&restore.Objects{Dest: g.open(g.bucket), Source: replica})})
	if b := res.Buckets[0]; b.Put != 3 || b.Replaced != 6 || b.Extra != 1 {
		t.Errorf("%+v", b)
	}
	// And a store with local blobs.
	files := filepath.Join(t.TempDir(), "files")
	g.mustRestore(files, restore.Options{Objects: users(&restore.Objects{Source: replica})})
	dir := filepath.Join(t.TempDir(), "repo")
	newRepo(t, local.New(dir))
	if res, err := backUpTo(t, dir, backup.Options{}, discoverWith(t, files, []string{"STORAGE_USERS_DRIVER=ocis"})); err != nil || !res.Manifest.Proof.Complete {
		t.Fatal(err, res)
	}
	expected(t, dir, g.source, nil)

	// A damaged replica is found, and is not restored from.
	g.damage(name)
	if rep := g.check(replica); len(rep.Errors) != 9 {
		t.Errorf("check of a damaged replica: %d errors, want 9: %q", len(rep.Errors), rep.Errors)
	}
	g.removeAll(g.bucket)
	_, err := restoreTo(t, g.dir, dst, restore.Options{Overwrite: true, Objects: users(&restore.Objects{Dest: g.open(g.bucket), Source: replica})})
	var inc *restore.IncompleteError
	if !errors.As(err, &inc) || inc.Count != 9 {
		t.Errorf("restore from a damaged replica: %v", err)
	}
	// The next backup that looks at everything mends it: the source is whole again.
	g.removeAll(g.bucket)
	g.load(g.bucket)
	full := way
	full.FullScan = true
	g.mustBackUp(full)
	whole(t, g.check(replica))
}

func TestObjectsByVersions(t *testing.T) {
	t.Parallel()
	g := newRig(t, s3test.Options{Versioning: true})
	way := backup.Options{Blobs: backup.BlobOptions{Way: snapshot.WayVersions, LockFor: 24 * time.Hour}}
	res := g.mustBackUp(way)
	if until := res.Manifest.Stores[0].Bucket.LockedUntil; until == nil || time.Until(*until) < 23*time.Hour {
		t.Errorf("locked until %v", until)
	}
	b := g.open(g.bucket)
	expected(t, g.dir, g.source, b)
	whole(t, g.check(b))

	// Everything is deleted: the versions are still there, and locked.
	key := slices.Sorted(maps.Keys(g.want()))[0]
	versions, err := b.Versions(t.Context(), key)
	if err != nil || len(versions) != 1 {
		t.Fatal(versions, err)
	}
	if err := b.Remove(t.Context(), key, versions[0].VersionID); err == nil {
		t.Error("a locked version was removed")
	}
	g.removeAll(g.bucket)
	whole(t, g.check(b))
	dst := filepath.Join(t.TempDir(), "a")
	g.mustRestore(dst, restore.Options{Objects: users(&restore.Objects{Dest: b, Source: b})})
	g.sameFiles(dst)
	g.sameObjects(g.bucket, g.want())

	// A longer time prolongs the locks, a shorter one leaves them alone.
	c := g.client()
	locked := func() time.Duration {
		// This server tells the lock of an old version in words of its own only.
		u, err := c.Presign(t.Context(), http.MethodGet, g.bucket, key, time.Minute, url.Values{"retention": {""}, "versionId": {versions[0].VersionID}})
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.Get(u.String())
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var lock struct {
			Mode            string
			RetainUntilDate time.Time
		}
		if err := xml.NewDecoder(resp.Body).Decode(&lock); err != nil || lock.Mode != "GOVERNANCE" {
			t.Fatalf("retention %+v: %v", lock, err)
		}
		return time.Until(lock.RetainUntilDate)
	}
	for _, days := range []time.Duration{10, 1} {
		way.Blobs.LockFor = days * 24 * time.Hour
		g.mustBackUp(way)
		if left := locked(); left < 9*24*time.Hour || left > 12*24*time.Hour {
			t.Errorf("locked for %v after a backup that locks for %d days", left, days)
		}
	}

	// A bucket without versions cannot be secured in this way.
	plain := newRig(t, s3test.Options{})
	var be *backup.BucketError
	if _, err := plain.backUp(way); !errors.As(err, &be) || len(be.Hints()) == 0 {
		t.Errorf("a bucket without versions: %v", err)
	}
}

// TestRulesThatExpireVersions: a rule of the bucket's life cycle that would take away what is pinned ends the backup
// before it begins; one that concerns something else does not.
func TestRulesThatExpireVersions(t *testing.T) {
	t.Parallel()
	g := newRig(t, s3test.Options{Versioning: true})
	space, _, _ := strings.Cut(slices.Sorted(maps.Keys(g.want()))[0], "/")
	var rule string
	g.proxy(func(w http.ResponseWriter, r *http.Request, _ string) bool {
		if !r.URL.Query().Has("lifecycle") {
			return false
		}
		w.Header().Set("Content-Type", "application/xml")
		if rule == "denied" {
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, "<Error><Code>AccessDenied</Code><Message>no</Message></Error>")
			return true
		}
		fmt.Fprintf(w, "<LifecycleConfiguration><Rule><ID>the rule</ID>%s</Rule></LifecycleConfiguration>", rule)
		return true
	})
	const on, old, age = "<Status>Enabled</Status>", "<NoncurrentVersionExpiration><NoncurrentDays>30</NoncurrentDays></NoncurrentVersionExpiration>", "<Expiration><Days>9</Days></Expiration>"
	prefix := func(p string) string { return "<Filter><Prefix>" + p + "</Prefix></Filter>" }
	for _, c := range []struct {
		name, rule string
		bad        bool
	}{
		{"old versions, everywhere", on + "<Filter></Filter>" + old, true},
		{"old versions, the old form", on + "<Prefix></Prefix>" + old, true},
		{"but for some", on + prefix("") + "<NoncurrentVersionExpiration><NewerNoncurrentVersions>5</NewerNoncurrentVersions></NoncurrentVersionExpiration>", true},
		{"by age", on + prefix("") + age, true},
		{"at a date", on + prefix("") + "<Expiration><Date>2100-01-01T00:00:00Z</Date></Expiration>", true},
		{"in a space", on + prefix(space+"/") + old, true},
		{"in a part of a space", on + prefix(space+"/00") + old, true},
		{"in spaces that begin so", on + prefix(space[:3]) + age, true},
		{"prefix and size", on + "<Filter><And><Prefix>" + space + "</Prefix><ObjectSizeGreaterThan>5</ObjectSizeGreaterThan></And></Filter>" + old, true},
		{"all that does not matter", strings.Join([]string{
			on + prefix("logs/") + old, on + prefix("logs/") + age, // elsewhere
			on + "<Filter><Tag><Key>a</Key><Value>b</Value></Tag></Filter>" + old, // no object has tags
			on + "<Filter><And><Prefix>" + space + "</Prefix><Tag><Key>a</Key><Value>b</Value></Tag></And></Filter>" + old,
			"<Status>Disabled</Status>" + prefix("") + old,
			on + prefix("") + "<Expiration><ExpiredObjectDeleteMarker>true</ExpiredObjectDeleteMarker></Expiration>",
			on + prefix("") + "<AbortIncompleteMultipartUpload><DaysAfterInitiation>7</DaysAfterInitiation></AbortIncompleteMultipartUpload>",
		}, "</Rule><Rule>"), false},
	} {
		rule = c.rule
		_, err := g.backUp(backup.Options{DryRun: true, Blobs: backup.BlobOptions{Way: snapshot.WayVersions}})
		var e *capture.ExpiringError
		switch {
		case !c.bad && err != nil:
			t.Errorf("%s: %v", c.name, err)
		case c.bad && (!errors.As(err, &e) || !strings.Contains(err.Error(), "the rule") || len(e.Hints()) == 0):
			t.Errorf("%s: %v", c.name, err)
		}
	}
	// Who may not read the rules does not know.
	rule = "denied"
	var be *backup.BucketError
	if _, err := g.backUp(backup.Options{DryRun: true, Blobs: backup.BlobOptions{Way: snapshot.WayVersions}}); !errors.As(err, &be) || !strings.Contains(be.Hints()[0], "GetLifecycleConfiguration") {
		t.Errorf("without the right to read the rules: %v", err)
	}
	// An object with a name of former times is in no space.
	blob := strings.ReplaceAll(strings.TrimPrefix(slices.Sorted(maps.Keys(g.want()))[0], space+"/"), "/", "")
	g.former(blob, space)
	rule = on + prefix(blob[:5]) + old
	var e *capture.ExpiringError
	if _, err := g.backUp(backup.Options{DryRun: true, Blobs: backup.BlobOptions{Way: snapshot.WayVersions}}); !errors.As(err, &e) {
		t.Errorf("a former name: %v", err)
	}
}

// former gives an object the name that it would have had before May 2022.
func (g *rig) former(blob, space string) {
	g.t.Helper()
	key := bucket.Key(space, blob)
	data := g.want()[key]
	if _, err := g.client().PutObject(g.t.Context(), g.bucket, bucket.FormerKey(blob), bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{}); err != nil {
		g.t.Fatal(err)
	}
	if err := g.open(g.bucket).Remove(g.t.Context(), key, ""); err != nil {
		g.t.Fatal(err)
	}
}

// TestFormerNames: instances from before May 2022 have objects that are named by the blob alone. Each way finds them, and a
// restore gives them the same names, because the server looks for them there.
func TestFormerNames(t *testing.T) {
	t.Parallel()
	g := newRig(t, s3test.Options{})
	want := g.want()
	for i, key := range slices.Sorted(maps.Keys(want)) {
		space, rel, _ := strings.Cut(key, "/")
		if blob := strings.ReplaceAll(rel, "/", ""); i%3 == 0 {
			g.former(blob, space)
			want[blob] = want[key]
			delete(want, key)
		}
	}
	name := g.srv.Bucket(t, false, false)
	g.mustBackUp(backup.Options{})
	expected(t, g.dir, g.source, nil)
	g.mustRestore(filepath.Join(t.TempDir(), "a"), restore.Options{Objects: users(&restore.Objects{Dest: g.open(name)})})
	g.sameObjects(name, want)

	second, third := g.srv.Bucket(t, false, false), g.srv.Bucket(t, false, false)
	g.mustBackUp(toReplica(second))
	g.sameObjects(second, want)
	replica := g.open(second)
	whole(t, g.check(replica))
	g.mustRestore(filepath.Join(t.TempDir(), "b"), restore.Options{Objects: users(&restore.Objects{Dest: g.open(third), Source: replica})})
	g.sameObjects(third, want)
}

// TestReplicaAtAnotherServer: the objects go through this machine, with the keys of each.
func TestReplicaAtAnotherServer(t *testing.T) {
	g := newRig(t, s3test.Options{})
	there := s3test.Start(t, s3test.Options{})
	name := there.Bucket(t, false, false)
	cfg := bucket.Config{Endpoint: there.Endpoint, Region: there.Region, Bucket: name, AccessKey: there.AccessKey, SecretKey: there.SecretKey}
	g.mustBackUp(backup.Options{Blobs: backup.BlobOptions{Way: snapshot.WayReplica, Replica: cfg}})
	b, err := bucket.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	here := g.srv
	g.srv = there
	g.sameObjects(name, g.want())
	g.srv = here
	// The other way round it comes back.
	g.removeAll(g.bucket)
	g.mustRestore(filepath.Join(t.TempDir(), "a"), restore.Options{Objects: users(&restore.Objects{Dest: g.open(g.bucket), Source: b})})
	g.sameObjects(g.bucket, g.want())
	// Keys that the other server does not know.
	cfg.SecretKey = "wrong"
	var be *backup.BucketError
	if _, err := g.backUp(backup.Options{Blobs: backup.BlobOptions{Way: snapshot.WayReplica, Replica: cfg}}); !errors.As(err, &be) || !strings.Contains(err.Error(), "replica: ") || strings.Contains(err.Error(), there.AccessKey) {
		t.Errorf("wrong keys: %v", err)
	}
}

// TestKnownObjectsCostNothing: a run on an unchanged instance asks for no object and lists none.
func TestKnownObjectsCostNothing(t *testing.T) {
	g := newRig(t, s3test.Options{})
	c := g.proxy(nil)
	cache := t.TempDir()
	for _, way := range []backup.BlobOptions{{}, {Way: snapshot.WayReplica, Replica: bucket.Config{Bucket: g.srv.Bucket(t, false, false)}}} {
		first := g.mustBackUp(backup.Options{CacheDir: cache, Blobs: way})
		c.seen()
		second := g.mustBackUp(backup.Options{CacheDir: cache, Blobs: way})
		// One listing, and one look for an object that is not there: the test of the rights.
		tests := map[string]int{"list": 1, "head": 1}
		if way.Way == snapshot.WayReplica {
			// And a look for markers, with that of the repository read and renewed.
			tests = map[string]int{"list": 3, "head": 2, "post": 1, "delete": 1, "get": 1, "put": 1}
		}
		if n := c.seen(); !maps.Equal(n, tests) {
			t.Errorf("%s: an unchanged run made these requests: %v", way.Way, n)
		}
		if !reflect.DeepEqual(first.Manifest, second.Manifest) {
			t.Errorf("%s: the manifests differ:\n%+v\n%+v", way.Way, first.Manifest, second.Manifest)
		}
		// Without the cache the trees tell.
		third := g.mustBackUp(backup.Options{Blobs: way})
		if n := c.seen(); n["get"] != tests["get"] || n["put"] != tests["put"] {
			t.Errorf("%s: a run without cache made these requests: %v", way.Way, n)
		}
		if third.Stats.NewBytes > 100_000 {
			t.Errorf("%s: a run without cache stored %d bytes", way.Way, third.Stats.NewBytes)
		}
	}
}

func TestObjectsThatNothingRefersTo(t *testing.T) {
	g := newRig(t, s3test.Options{})
	space, _, _ := strings.Cut(slices.Sorted(maps.Keys(g.want()))[0], "/")
	want := g.want()
	for _, key := range []string{space + "/aa/bb/cc/dd/-eeff", space + "/odd"} {
		want[key] = []byte("nothing refers to me " + key)
		if _, err := g.client().PutObject(t.Context(), g.bucket, key, bytes.NewReader(want[key]), int64(len(want[key])), minio.PutObjectOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	res := g.mustBackUp(backup.Options{Blobs: backup.BlobOptions{CountSpare: true}})
	if u := res.Manifest.Stores[0].Bucket.Unreferenced; u == nil || u.Objects != 2 || u.Captured != 0 {
		t.Errorf("counted %+v", u)
	}
	res = g.mustBackUp(backup.Options{Blobs: backup.BlobOptions{KeepSpare: true}})
	if u := res.Manifest.Stores[0].Bucket.Unreferenced; u == nil || u.Objects != 2 || u.Captured != 2 {
		t.Errorf("captured %+v", u)
	}
	whole(t, g.check(nil))
	name := g.srv.Bucket(t, false, false)
	g.mustRestore(filepath.Join(t.TempDir(), "a"), restore.Options{Objects: users(&restore.Objects{Dest: g.open(name)})})
	g.sameObjects(name, want)
}

// TestObjectsThroughBadTimes: a server that is busy, connections that break, objects that go away.
func TestObjectsThroughBadTimes(t *testing.T) {
	t.Parallel()
	g := newRig(t, s3test.Options{})
	keys := slices.Sorted(maps.Keys(g.want()))
	object := "/" + g.bucket + "/" + keys[5]
	var mu sync.Mutex
	tries := map[string]int{}
	try := func(r *http.Request) int {
		mu.Lock()
		defer mu.Unlock()
		tries[r.Method+r.URL.Path]++
		return tries[r.Method+r.URL.Path]
	}
	c := g.proxy(func(w http.ResponseWriter, r *http.Request, kind string) bool {
		switch {
		case kind == "get" && try(r) == 1 && strings.HasSuffix(r.URL.Path, "a"):
			busy(w)
			return true
		case kind == "get" && r.URL.Path == object && r.Header.Get("Range") == "":
			cut(t, g, w, r)
			return true
		}
		return false
	})
	g.mustBackUp(backup.Options{})
	expected(t, g.dir, g.source, nil)
	if n := c.seen(); n["get"] <= len(keys) {
		t.Errorf("nothing was tried again: %v", n)
	}

	// An object that goes away between the listing and the read is missing, not wrong.
	c.before = func(w http.ResponseWriter, r *http.Request, kind string) bool {
		if (kind == "get" || kind == "head") && r.URL.Path == object {
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(http.StatusNotFound)
			_, _ = io.WriteString(w, `<Error><Code>NoSuchKey</Code><Message>gone</Message></Error>`)
			return true
		}
		return false
	}
	res, err := g.backUp(backup.Options{FullScan: true})
	if err != nil {
		t.Fatal(err)
	}
	if p := res.Manifest.Proof; p.Complete || len(p.Missing) != 1 || p.Missing[0].Problem != "missing" || bucket.Key(path.Dir(path.Dir(path.Dir(path.Dir(path.Dir(keys[5]))))), p.Missing[0].BlobID) != keys[5] {
		t.Errorf("%+v", p)
	}

	// A server that stays busy ends the backup, and no snapshot comes of it.
	before := countSnapshots(t, g.dir)
	c.before = func(w http.ResponseWriter, _ *http.Request, kind string) bool {
		if kind == "get" {
			busy(w)
		}
		return kind == "get"
	}
	_, err = g.backUp(backup.Options{FullScan: true})
	if err == nil || !strings.Contains(err.Error(), "SlowDown") {
		t.Errorf("a server that is always busy: %v", err)
	}
	if after := countSnapshots(t, g.dir); after != before {
		t.Errorf("%d snapshots, there were %d", after, before)
	}
	// Rights that are missing are named, before anything is read.
	for deny, right := range map[string]string{"list": "s3:ListBucket", "head": "s3:GetObject"} {
		c.before = func(w http.ResponseWriter, _ *http.Request, kind string) bool {
			if kind != deny {
				return false
			}
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, `<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>`)
			return true
		}
		var be *backup.BucketError
		if _, err := g.backUp(backup.Options{}); !errors.As(err, &be) || !strings.Contains(err.Error(), "lack the right "+right) || len(be.Hints()) == 0 {
			t.Errorf("without %s: %v", right, err)
		}
	}
	// Keys that the server does not know: the error says so, and does not say the keys.
	c.before = func(w http.ResponseWriter, _ *http.Request, _ string) bool {
		w.Header().Set("Content-Type", "application/xml")
		w.WriteHeader(http.StatusForbidden)
		_, _ = io.WriteString(w, `<Error><Code>InvalidAccessKeyId</Code><Message>no such key `+g.srv.AccessKey+` `+g.srv.SecretKey+`</Message></Error>`)
		return true
	}
	_, err = g.backUp(backup.Options{})
	if err == nil || strings.Contains(err.Error(), g.srv.SecretKey) || strings.Contains(err.Error(), g.srv.AccessKey) {
		t.Errorf("refused keys: %v", err)
	}
	var be *backup.BucketError
	if !errors.As(err, &be) || len(be.Hints()) == 0 || !strings.Contains(be.Hints()[0], bucket.SecretKeyVariable) {
		t.Errorf("no hint tells what to do: %v", err)
	}
}

func busy(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(http.StatusServiceUnavailable)
	_, _ = io.WriteString(w, `<Error><Code>SlowDown</Code><Message>please reduce your request rate</Message></Error>`)
}

// cut answers with the first half of the object, and ends the connection.
func cut(t *testing.T, g *rig, w http.ResponseWriter, r *http.Request) {
	key := strings.TrimPrefix(r.URL.Path, "/"+g.bucket+"/")
	x, err := g.open(g.bucket).Stat(r.Context(), key, "")
	if err != nil {
		t.Error(err)
		return
	}
	w.Header().Set("Content-Length", strconv.FormatInt(x.Size, 10))
	w.Header().Set("ETag", `"`+x.ETag+`"`)
	w.Header().Set("Last-Modified", x.Modified.UTC().Format(http.TimeFormat))
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write(g.want()[key][:x.Size/2])
	w.(http.Flusher).Flush()
	panic(http.ErrAbortHandler)
}

func countSnapshots(t *testing.T, dir string) int {
	t.Helper()
	list, err := snapshot.List(t.Context(), open(t, local.New(dir)))
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// TestBucketOfManyObjects lists a large bucket once, in bounded memory, and then not again. HOLDFAST_OBJECTS
// sets the number of objects.
func TestBucketOfManyObjects(t *testing.T) {
	objects := 30_000
	if n, err := strconv.Atoi(os.Getenv("HOLDFAST_OBJECTS")); err == nil {
		objects = n
	}
	g := newRig(t, s3test.Options{})
	space, _, _ := strings.Cut(slices.Sorted(maps.Keys(g.want()))[0], "/")
	many := s3test.Many{N: objects, Key: func(i int) string {
		return bucket.Key(space, fmt.Sprintf("%08x-0000-4000-8000-%012x", uint64(i)*(1<<32)/uint64(objects), i))
	}}
	c := g.proxy(func(w http.ResponseWriter, r *http.Request, kind string) bool {
		if kind == "list" && r.URL.Query().Get("prefix") == space+"/" {
			many.List(w, r)
			return true
		}
		return false
	})
	var peak uint64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		var m runtime.MemStats
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
				runtime.ReadMemStats(&m)
				peak = max(peak, m.HeapInuse+m.StackInuse)
			}
		}
	})
	cache := t.TempDir()
	began := time.Now()
	res := g.mustBackUp(backup.Options{CacheDir: cache})
	took := time.Since(began)
	close(stop)
	wg.Wait()
	if u := res.Manifest.Stores[0].Bucket.Unreferenced; u == nil || u.Objects != int64(objects) || u.Bytes != int64(objects)*s3test.ManySize {
		t.Errorf("counted %+v", u)
	}
	first := c.seen()
	began = time.Now()
	g.mustBackUp(backup.Options{CacheDir: cache})
	if n := c.seen(); n["list"] != 1 || n["get"] != 0 { // the listing of one key tests the rights
		t.Errorf("an unchanged run made these requests: %v", n)
	}
	t.Logf("%d objects: first run %.1f s, %d listings, %d MiB in use at the most; unchanged run %.1f s", objects, took.Seconds(), first["list"], peak>>20, time.Since(began).Seconds())
	if peak > 500<<20 {
		t.Errorf("%d MiB were in use", peak>>20)
	}
}

// TestNoKeyInTheSnapshotsOwnRecords: the keys are in the instance's configuration, and nowhere else.
func TestNoKeyInTheSnapshotsOwnRecords(t *testing.T) {
	g := newRig(t, s3test.Options{})
	var events []string
	var mu sync.Mutex
	res := g.mustBackUp(backup.Options{Progress: func(e progress.Event) {
		mu.Lock()
		events = append(events, fmt.Sprintf("%+v", e))
		mu.Unlock()
	}})
	text := fmt.Sprintf("%+v %v", res.Manifest, events)
	inst, err := json.Marshal(g.inst)
	if err != nil {
		t.Fatal(err)
	}
	text += string(inst)
	for _, secret := range []string{g.srv.AccessKey, g.srv.SecretKey} {
		if strings.Contains(text, secret) {
			t.Errorf("a key stands in the manifest, in an event, or in what discover prints")
		}
	}
}
