package backup_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/backup"
	"github.com/holdfast-backup/holdfast/internal/bucket"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/replica"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/restore"
	"github.com/holdfast-backup/holdfast/internal/s3/s3test"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

func toReplica(name string) backup.Options {
	return backup.Options{Blobs: backup.BlobOptions{Way: snapshot.WayReplica, Replica: bucket.Config{Bucket: name}}}
}

// needed tells what the snapshots in the rig's repository need.
func (g *rig) needed() *replica.Needed {
	g.t.Helper()
	r := open(g.t, local.New(g.dir))
	if err := r.LoadIndex(g.t.Context()); err != nil {
		g.t.Fatal(err)
	}
	list, err := snapshot.List(g.t.Context(), r)
	if err != nil {
		g.t.Fatal(err)
	}
	n, err := replica.Collect(g.t.Context(), r, list, nil)
	if err != nil {
		g.t.Fatal(err)
	}
	return n
}

func (g *rig) repoID() string { return open(g.t, local.New(g.dir)).ID() }

// remove does what prune does in the replica.
func (g *rig) remove(ctx context.Context, b *bucket.Bucket, o replica.Options) (*replica.Result, error) {
	g.t.Helper()
	if o.Repository == "" {
		o.Repository = g.repoID()
	}
	if o.Confirm == nil {
		o.Confirm = func(context.Context) error { return nil }
	}
	return replica.Remove(ctx, b, g.needed(), o)
}

// purgeRevisions removes old versions from the source as the product does, and returns the keys of their objects.
func (g *rig) purgeRevisions(most int) (keys []string) {
	g.t.Helper()
	root := filepath.Join(g.source, "data", "storage", "users", "spaces")
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || len(keys) == most || !strings.Contains(d.Name(), ".REV.") || !strings.HasSuffix(d.Name(), ".mpk") {
			return err
		}
		data, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		m, err := ocis.ParseNode("user.ocis.", data)
		if err != nil || m.BlobID == "" {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		parts := strings.Split(rel, "/")
		key := bucket.Key(parts[0]+parts[1], m.BlobID)
		if _, ok := g.want()[key]; !ok {
			return nil
		}
		keys = append(keys, key)
		return errors.Join(os.Remove(p), os.Remove(strings.TrimSuffix(p, ".mpk")), g.open(g.bucket).Remove(g.t.Context(), key, ""))
	})
	if err != nil {
		g.t.Fatal(err)
	}
	if len(keys) != most {
		g.t.Fatalf("the fixture has %d versions, want %d", len(keys), most)
	}
	return keys
}

// put makes objects that are older than all backups.
func (g *rig) put(name string, keys ...string) {
	g.t.Helper()
	for _, key := range keys {
		if _, err := g.client().PutObject(g.t.Context(), name, key, strings.NewReader("1234567"), 7, minio.PutObjectOptions{}); err != nil {
			g.t.Fatal(err)
		}
		g.age(name, key, -time.Hour)
	}
}

// age sets the time of an object of the server.
func (g *rig) age(name, key string, by time.Duration) {
	g.t.Helper()
	at := time.Now().Add(by)
	if err := os.Chtimes(filepath.Join(g.srv.Dir, name, key), at, at); err != nil {
		g.t.Fatal(err)
	}
}

// forgetFirst removes the record of the oldest snapshot.
func (g *rig) forgetFirst() {
	g.t.Helper()
	r := open(g.t, local.New(g.dir))
	list, err := snapshot.List(g.t.Context(), r)
	if err != nil {
		g.t.Fatal(err)
	}
	l, ctx, err := r.Lock(g.t.Context(), repo.LockOptions{Exclusive: true})
	if err != nil {
		g.t.Fatal(err)
	}
	defer l.Unlock()
	if err := r.RemoveUnpacked(ctx, backend.SnapshotFile, list[0].ID()); err != nil {
		g.t.Fatal(err)
	}
}

// keys lists a bucket without the markers of repositories.
func (g *rig) keys(name string) map[string]bool {
	g.t.Helper()
	out := map[string]bool{}
	var mu sync.Mutex
	err := g.open(name).List(g.t.Context(), "", func(x bucket.Object) error {
		mu.Lock()
		defer mu.Unlock()
		if !strings.HasPrefix(x.Key, replica.Prefix) {
			out[x.Key] = true
		}
		return nil
	})
	if err != nil {
		g.t.Fatal(err)
	}
	return out
}

// settled is keys once the server has done what was asked of it before the asking was cut short.
func (g *rig) settled(name string) map[string]bool {
	g.t.Helper()
	for last, same := g.keys(name), 0; ; {
		time.Sleep(50 * time.Millisecond)
		now := g.keys(name)
		if same++; !maps.Equal(now, last) {
			last, same = now, 0
		}
		if same == 5 {
			return now
		}
	}
}

// spare are names of objects that nothing refers to.
func spare(n int) (keys []string) {
	for i := range n {
		keys = append(keys, bucket.Key("00000000-0000-4000-8000-000000000000", "aabbccdd-"+strings.Repeat(string(rune('a'+i%20)), i/20+1)))
	}
	return keys
}

func TestReplicaGivesBackWhatNoSnapshotNeeds(t *testing.T) {
	t.Parallel()
	g := newRig(t, s3test.Options{})
	name := g.srv.Bucket(t, false, false)
	b := g.open(name)
	g.mustBackUp(toReplica(name))
	all := g.keys(name)
	g.needsAreTheTars()
	gone := g.purgeRevisions(3)
	g.mustBackUp(toReplica(name))

	// As long as a snapshot names them they stay.
	res, err := g.remove(t.Context(), b, replica.Options{})
	if err != nil || res.Refused != "" || res.Removed.Count != 0 || res.Needed.Count != int64(len(all)) || res.Missing != 0 {
		t.Fatalf("%+v, %v", res, err)
	}
	if got := g.keys(name); !maps.Equal(got, all) {
		t.Fatalf("%d objects, there were %d", len(got), len(all))
	}

	// What an interrupted backup has copied goes; what came after the last one, and what is not the product's, stays.
	s := spare(3)
	g.put(name, append(s, "notes.txt")...)
	g.age(name, s[2], time.Hour)
	g.forgetFirst()
	res, err = g.remove(t.Context(), b, replica.Options{DryRun: true})
	if err != nil || res.Removed.Count != 5 || res.Newer.Count != 1 || res.Foreign.Count != 1 || res.Newer.Bytes != 7 {
		t.Fatalf("dry run: %+v, %v", res, err)
	}
	if n := len(g.keys(name)); n != len(all)+4 {
		t.Fatalf("after a dry run there are %d objects", n)
	}
	plan := *res
	res, err = g.remove(t.Context(), b, replica.Options{})
	if err != nil || *res != plan {
		t.Fatalf("%+v, %v; the plan was %+v", res, err, plan)
	}
	want := maps.Clone(all)
	for _, key := range gone {
		delete(want, key)
	}
	want[s[2]], want["notes.txt"] = true, true
	if got := g.keys(name); !maps.Equal(got, want) {
		t.Errorf("the replica has %d objects, want %d", len(got), len(want))
	}
	whole(t, g.check(b))
	dst := filepath.Join(t.TempDir(), "a")
	g.removeAll(g.bucket)
	g.mustRestore(dst, restore.Options{Objects: users(&restore.Objects{Dest: g.open(g.bucket), Source: b})})
	g.sameFiles(dst)
	// Nothing is left to do, and a backup finds what it needs.
	if res, err = g.remove(t.Context(), b, replica.Options{}); err != nil || res.Removed.Count != 0 {
		t.Errorf("a second time: %+v, %v", res, err)
	}
	full := toReplica(name)
	full.FullScan = true
	g.mustBackUp(full)
	// An object that is gone is told.
	for key := range g.objects(g.bucket) {
		if err := b.Remove(t.Context(), key, ""); err != nil {
			t.Fatal(err)
		}
		break
	}
	if res, err = g.remove(t.Context(), b, replica.Options{}); err != nil || res.Missing != 1 {
		t.Errorf("with an object missing: %+v, %v", res, err)
	}
}

// needsAreTheTars compares what Collect finds in the only snapshot with what a reader of its tars finds.
func (g *rig) needsAreTheTars() {
	t := g.t
	t.Helper()
	r := open(t, local.New(g.dir))
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	n := g.needed()
	sn := latest(t, r)
	dir, err := snapshot.Lookup(t.Context(), r, *sn.Tree, "/storage/users/metadata")
	if err != nil {
		t.Fatal(err)
	}
	tree, err := snapshot.LoadTree(t.Context(), r, dir.Subtree)
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string]bool{}
	for _, node := range tree.Nodes {
		tr := pax.NewReader(bufio.NewReader(snapshot.NewReader(t.Context(), r, node)))
		for {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if key := h.Records[pax.Object]; key != "" {
				keys[key] = true
			}
		}
	}
	for key := range keys {
		if !n.Has(key) {
			t.Errorf("%s is not needed", key)
		}
	}
	if n.Len() != len(keys) || len(keys) != len(g.want()) {
		t.Errorf("%d keys are needed, the tars have %d, the bucket %d", n.Len(), len(keys), len(g.want()))
	}
	// Whatever cannot be read, nobody is told that all is known.
	list := []*snapshot.Snapshot{sn}
	for at := 1; ; at++ {
		f := &failing{Loader: r, at: at}
		_, err := replica.Collect(t.Context(), f, list, nil)
		if f.n < at {
			if err != nil || at < 5 {
				t.Errorf("%d loads: %v", f.n, err)
			}
			break
		}
		if !errors.Is(err, errFailing) {
			t.Errorf("load %d failed: %v", at, err)
		}
	}
}

var errFailing = errors.New("this load fails")

// failing fails to load one blob.
type failing struct {
	replica.Loader
	at, n int
}

func (f *failing) LoadBlob(ctx context.Context, bt repo.BlobType, d id.ID, buf []byte) ([]byte, error) {
	if f.n++; f.n == f.at {
		return nil, errFailing
	}
	return f.Loader.LoadBlob(ctx, bt, d, buf)
}

func (f *failing) LoadBlobs(ctx context.Context, bt repo.BlobType, ids []id.ID, fn func(id.ID, []byte) error) error {
	if f.n++; f.n == f.at {
		return errFailing
	}
	return f.Loader.LoadBlobs(ctx, bt, ids, fn)
}

// TestReplicaOfSeveralIsLeftAlone: nobody but a repository itself knows what it needs.
func TestReplicaOfSeveralIsLeftAlone(t *testing.T) {
	t.Parallel()
	g := newRig(t, s3test.Options{})
	name := g.srv.Bucket(t, false, false)
	b := g.open(name)
	first := g.dir
	g.mustBackUp(toReplica(name))
	g.put(name, spare(2)...)
	refused := func(what, why string, o replica.Options) {
		t.Helper()
		before := g.keys(name)
		for _, dry := range []bool{true, false} {
			o.DryRun = dry
			res, err := g.remove(t.Context(), b, o)
			if err != nil || !strings.Contains(res.Refused, why) || res.Removed.Count != 0 {
				t.Errorf("%s: %+v, %v", what, res, err)
			}
		}
		if after := g.keys(name); !maps.Equal(before, after) {
			t.Errorf("%s: %d objects, there were %d", what, len(after), len(before))
		}
	}
	// A second repository uses the bucket as well.
	g.dir = filepath.Join(t.TempDir(), "repo")
	newRepo(t, local.New(g.dir))
	second := g.repoID()
	refused("without a marker", "has no marker", replica.Options{})
	g.mustBackUp(toReplica(name))
	refused("the second", "other repositories", replica.Options{Claim: true})
	g.dir = first
	refused("the first", second, replica.Options{})
	// It is given up: then the first is alone.
	if err := b.Remove(t.Context(), replica.Prefix+second, ""); err != nil {
		t.Fatal(err)
	}
	if res, err := g.remove(t.Context(), b, replica.Options{}); err != nil || res.Removed.Count != 2 {
		t.Fatalf("alone: %+v, %v", res, err)
	}
	// A bucket that was not empty may hold anything, until somebody says that it does not.
	g.put(name, spare(2)...)
	if err := b.Remove(t.Context(), replica.Prefix+g.repoID(), ""); err != nil {
		t.Fatal(err)
	}
	g.mustBackUp(toReplica(name))
	refused("not empty", "not empty", replica.Options{})
	if res, err := g.remove(t.Context(), b, replica.Options{Claim: true}); err != nil || res.Removed.Count != 2 {
		t.Errorf("claimed: %+v, %v", res, err)
	}
	// The replica has become the bucket of an instance.
	live := g.bucket
	g.bucket = name
	g.inst = g.discover(g.source, g.srv.Endpoint)
	if _, err := g.backUp(backup.Options{}); err != nil {
		t.Fatal(err)
	}
	refused("in use", "bucket of an instance", replica.Options{Claim: true})
	g.bucket = live
}

// TestReplicaIsNotUsedWhileItIsCleanedUp: of a backup that begins to use a bucket and a prune that removes from it, one
// gives way.
func TestReplicaIsNotUsedWhileItIsCleanedUp(t *testing.T) {
	g := newRig(t, s3test.Options{})
	name := g.srv.Bucket(t, false, false)
	g.mustBackUp(toReplica(name))
	s := spare(1)
	g.put(name, s...)
	first, own := g.dir, g.repoID()
	// The other one begins between the look for markers and the flag.
	var other *replica.Member
	var joinErr error
	join := func() {
		other, joinErr = replica.Join(context.Background(), g.open(name), strings.Repeat("b", 64), "other")
	}
	c := g.proxy(func(_ http.ResponseWriter, r *http.Request, _ string) bool {
		if r.Method == http.MethodPut && strings.HasSuffix(r.URL.Path, ".removing") && other == nil {
			join()
		}
		return false
	})
	through := func() *bucket.Bucket {
		b, err := bucket.Open(t.Context(), bucket.Config{Endpoint: c.URL, Region: g.srv.Region, Bucket: name, AccessKey: g.srv.AccessKey, SecretKey: g.srv.SecretKey})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(b.Close)
		return b
	}
	res, err := g.remove(t.Context(), through(), replica.Options{})
	if err != nil || joinErr != nil || !strings.Contains(res.Refused, strings.Repeat("b", 64)) || !g.keys(name)[s[0]] {
		t.Fatalf("%+v, %v, %v", res, err, joinErr)
	}
	if err := g.open(name).Remove(t.Context(), replica.Prefix+strings.Repeat("b", 64), ""); err != nil {
		t.Fatal(err)
	}

	// It begins in the middle of the removal.
	var busy error
	c.before = func(_ http.ResponseWriter, r *http.Request, kind string) bool {
		if kind == "delete" && busy == nil {
			g.dir = filepath.Join(t.TempDir(), "repo")
			newRepo(t, local.New(g.dir))
			g.inst = g.discover(g.source, g.srv.Endpoint)
			_, busy = g.backUp(toReplica(name))
			g.dir = first
		}
		return false
	}
	if res, err = g.remove(t.Context(), through(), replica.Options{}); err != nil || res.Removed.Count != 1 {
		t.Fatalf("%+v, %v", res, err)
	}
	var be *replica.BusyError
	if !errors.As(busy, &be) || be.Repository != own || len(be.Hints()) == 0 {
		t.Errorf("a backup meanwhile: %v", busy)
	}
	// The repository's own flag, left by a kill, stops neither its backup nor its prune.
	if err := g.open(name).Remove(t.Context(), replica.Prefix+g.otherMarker(name, own), ""); err != nil {
		t.Fatal(err)
	}
	g.put(name, replica.Prefix+own+".removing", spare(1)[0])
	g.mustBackUp(toReplica(name))
	if res, err = g.remove(t.Context(), through(), replica.Options{}); err != nil || res.Removed.Count != 1 {
		t.Errorf("%+v, %v", res, err)
	}
	if _, ok := g.objects(name)[replica.Prefix+own+".removing"]; ok {
		t.Error("the flag is still there")
	}
}

// otherMarker finds the marker that is not ours.
func (g *rig) otherMarker(name, own string) string {
	g.t.Helper()
	for key := range g.objects(name) {
		if id, ok := strings.CutPrefix(key, replica.Prefix); ok && !strings.HasPrefix(id, own) {
			return id
		}
	}
	g.t.Fatal("there is no other marker")
	return ""
}

// TestReplicaThroughBadTimes: what cannot be removed is told, a kill in the middle leaves nothing undone, and a lock that
// is lost ends it.
func TestReplicaThroughBadTimes(t *testing.T) {
	t.Parallel()
	g := newRig(t, s3test.Options{})
	name := g.srv.Bucket(t, false, false)
	g.mustBackUp(toReplica(name))
	needed := g.keys(name)
	s := spare(60)
	g.put(name, s...)
	var deletes atomic.Int32
	unasked := false // whether the bucket keeps versions: few may ask
	denied := "/" + name + "/" + s[7]
	ctx, cancel := context.WithCancel(t.Context())
	c := g.proxy(func(w http.ResponseWriter, r *http.Request, kind string) bool {
		if kind == "delete" && deletes.Add(1) == 20 {
			cancel()
		}
		if versions := r.URL.Query().Has("versioning"); versions || kind == "delete" && r.URL.Path == denied {
			unasked = unasked || versions
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, `<Error><Code>AccessDenied</Code><Message>no</Message></Error>`)
			return true
		}
		return false
	})
	b, err := bucket.Open(t.Context(), bucket.Config{Endpoint: c.URL, Region: g.srv.Region, Bucket: name, AccessKey: g.srv.AccessKey, SecretKey: g.srv.SecretKey})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, err := g.remove(ctx, b, replica.Options{}); !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled: %v", err)
	}
	left := g.settled(name)
	if n := len(left) - len(needed); n < 1 || n > 59 {
		t.Fatalf("after the kill %d of 60 are left", n)
	}
	for key := range needed {
		if !left[key] {
			t.Fatalf("%s is gone", key)
		}
	}
	// Our lock is not ours any more.
	lost := errors.New("lost")
	if _, err := g.remove(t.Context(), b, replica.Options{Confirm: func(context.Context) error { return lost }}); !errors.Is(err, lost) || !maps.Equal(left, g.keys(name)) {
		t.Errorf("with a lost lock: %v", err)
	}
	// The next one goes on, and tells what it cannot remove.
	res, err := g.remove(t.Context(), b, replica.Options{})
	var fe *replica.FailedError
	if !errors.As(err, &fe) || fe.Count != 1 || res.Failed != 1 || len(fe.Hints()) == 0 || !strings.Contains(err.Error(), s[7]) {
		t.Errorf("%+v, %v", res, err)
	}
	want := maps.Clone(needed)
	want[s[7]] = true
	if got := g.keys(name); !maps.Equal(got, want) {
		t.Errorf("left: %q", slices.Sorted(maps.Keys(got)))
	}
	if !unasked {
		t.Error("nobody was refused to ask for versions")
	}
	// Who may remove nothing does not ask for everything.
	g.put(name, spare(300)...)
	c.before = func(w http.ResponseWriter, r *http.Request, kind string) bool {
		if kind == "delete" && !strings.HasSuffix(r.URL.Path, ".removing") {
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.Copy(w, bytes.NewReader([]byte(`<Error><Code>AccessDenied</Code><Message>no</Message></Error>`)))
			return true
		}
		return false
	}
	c.seen()
	if _, err := g.remove(t.Context(), b, replica.Options{}); !errors.As(err, &fe) || fe.Count < 100 || fe.Count > 120 {
		t.Errorf("without the right: %v", err)
	}
}
