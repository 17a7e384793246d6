package backup_test

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/backend/retry"
	bs3 "github.com/holdfast-backup/holdfast/internal/backend/s3"
	"github.com/holdfast-backup/holdfast/internal/backup"
	"github.com/holdfast-backup/holdfast/internal/bucket"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/restore"
	"github.com/holdfast-backup/holdfast/internal/s3"
	"github.com/holdfast-backup/holdfast/internal/s3/s3test"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/verify"
)

// hasty waits for nothing, and does not have the client of the library try again beside ours.
var hasty = backup.BlobOptions{Tries: 1, Pause: time.Millisecond}

// treeOf tells what was stored. Two captures of one picture have the same; only what the manifest says of
// objects that nothing refers to is not known to every run.
func treeOf(t *testing.T, be backend.Backend, res *backup.Result) string {
	t.Helper()
	r := open(t, be)
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	sn, err := snapshot.Load(t.Context(), r, res.SnapshotID)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := snapshot.LoadTree(t.Context(), r, *sn.Tree)
	if err != nil {
		t.Fatal(err)
	}
	tree.Nodes = slices.DeleteFunc(tree.Nodes, func(n *snapshot.Node) bool { return "/"+n.Name == snapshot.ManifestPath })
	return string(snapshot.EncodeTree(tree.Nodes))
}

func (g *rig) openHasty(endpoint, name string) *bucket.Bucket {
	g.t.Helper()
	b, err := bucket.Open(g.t.Context(), bucket.Config{
		Endpoint: endpoint, Region: g.srv.Region, Bucket: name, AccessKey: g.srv.AccessKey, SecretKey: g.srv.SecretKey, Tries: 1, Pause: time.Millisecond,
	})
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(b.Close)
	return b
}

// TestInstanceBehindABadNetwork breaks every request that a backup makes to the instance's bucket, in every
// way: once, which must not matter, and for good, which must end the backup without a snapshot.
func TestInstanceBehindABadNetwork(t *testing.T) {
	t.Parallel()
	g := newRig(t, s3test.Options{})
	p := s3test.NewProxy(t, g.srv.Endpoint)
	g.inst = g.discover(g.source, p.URL)
	o := backup.Options{FullScan: true, Blobs: hasty} // so that each run reads all objects
	tree := treeOf(t, local.New(g.dir), g.mustBackUp(o))
	requests := p.Judge(nil)
	if requests < len(g.want()) {
		t.Fatalf("%d requests for %d objects: the test tests nothing", requests, len(g.want()))
	}
	same := func(what string) {
		t.Helper()
		res, err := g.backUp(o)
		n := p.Judge(nil)
		switch {
		case err != nil:
			t.Errorf("%s: %v", what, err)
		case !res.Manifest.Proof.Complete || treeOf(t, local.New(g.dir), res) != tree:
			t.Errorf("%s: another snapshot than without: %+v", what, res.Manifest.Proof)
		case n < requests:
			t.Errorf("%s: %d requests, without it there are %d", what, n, requests)
		}
	}
	same("nothing")
	for _, effects := range [][]s3test.Effect{s3test.Passing, {s3test.CutDown, s3test.Cut, s3test.Busy}} {
		p.Judge(s3test.OnceEach(effects...))
		same(fmt.Sprintf("each request once %v", effects))
	}

	// An answer that was cut short and does not look it: the blob has another size than the metadata says.
	short := 0
	p.Judge(func(n int, r *http.Request) s3test.Fault {
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "a") {
			short++
			return s3test.Fault{Effect: s3test.Short}
		}
		return s3test.Fault{}
	})
	res, err := g.backUp(o)
	p.Judge(nil)
	if err != nil {
		t.Error(err)
	} else if m := res.Manifest.Proof; m.Complete || short == 0 || len(m.Missing) != short {
		t.Errorf("%d objects were short, and the proof is %+v", short, m)
	} else {
		for _, x := range m.Missing {
			if x.Problem != "size" || !strings.HasSuffix(x.BlobID, "a") {
				t.Errorf("%+v", x)
			}
		}
	}

	before := countSnapshots(t, g.dir)
	for i, from := range []int{1, requests / 2, requests} {
		e := []s3test.Effect{s3test.Cut, s3test.CutDown, s3test.Busy}[i]
		p.Judge(s3test.From(from, e))
		_, err := g.backUp(o)
		p.Judge(nil)
		if err == nil || !strings.Contains(err.Error(), p.URL) {
			t.Errorf("%s from request %d on: %v", e, from, err)
		}
		if after := countSnapshots(t, g.dir); after != before {
			t.Errorf("%s from request %d on: %d snapshots, there were %d", e, from, after, before)
		}
	}
	same("the next run")
	clean(t, g.dir)

	// The way back.
	name, dst := g.srv.Bucket(t, false, false), filepath.Join(t.TempDir(), "a")
	p.Judge(s3test.OnceEach(s3test.Passing...))
	g.mustRestore(dst, restore.Options{Objects: users(&restore.Objects{Dest: g.openHasty(p.URL, name)})})
	if n := p.Judge(nil); n < len(g.want())*3/2 {
		t.Errorf("restore: %d requests for %d objects", n, len(g.want()))
	}
	g.sameFiles(dst)
	g.sameObjects(name, g.want())
}

// TestObjectsLostBetweenListAndGet deletes objects when the listing that names them is on its way.
func TestObjectsLostBetweenListAndGet(t *testing.T) {
	t.Parallel()
	g := newRig(t, s3test.Options{})
	p := s3test.NewProxy(t, g.srv.Endpoint)
	g.inst = g.discover(g.source, p.URL)
	want := g.want()
	keys := slices.Sorted(maps.Keys(want))
	lost := map[string]bool{keys[2]: true, keys[len(keys)/2]: true, keys[len(keys)-1]: true}
	for _, way := range []string{snapshot.WayCopy, snapshot.WayReplica} {
		o := backup.Options{FullScan: true, Blobs: hasty}
		o.Blobs.Way = way
		var replica *bucket.Bucket
		if way == snapshot.WayReplica {
			o.Blobs.Replica.Bucket = g.srv.Bucket(t, false, false)
			replica = g.open(o.Blobs.Replica.Bucket)
		}
		direct := g.open(g.bucket)
		deleted := map[string]bool{}
		p.Judge(func(_ int, r *http.Request) s3test.Fault {
			prefix := r.URL.Query().Get("prefix")
			if name, _ := s3test.Object(r); name != g.bucket || kindOf(r) != "list" || prefix == "" {
				return s3test.Fault{}
			}
			return s3test.Fault{Do: func() {
				for key := range lost {
					if strings.HasPrefix(key, prefix) {
						deleted[key] = true
						if err := direct.Remove(t.Context(), key, ""); err != nil {
							t.Error(err)
						}
					}
				}
			}}
		})
		res, err := g.backUp(o)
		p.Judge(nil)
		if err != nil {
			t.Fatalf("%s: %v", way, err)
		}
		if !maps.Equal(deleted, lost) {
			t.Fatalf("%s: %v were deleted: the test tests nothing", way, deleted)
		}
		m := &res.Manifest.Proof
		if m.Complete {
			t.Errorf("%s: the snapshot is called complete", way)
		}
		got := map[string]bool{}
		for _, x := range m.Missing {
			for key := range lost {
				if strings.HasSuffix(key, "/"+ocis.NodePath(x.BlobID)) {
					got[key] = true
				}
			}
			if x.Problem != "missing" || x.Path == "" {
				t.Errorf("%s: %+v", way, x)
			}
		}
		if !maps.Equal(got, lost) || len(m.Missing) != len(lost) {
			t.Errorf("%s: missing are %+v, want %v", way, m.Missing, lost)
		}
		rep := g.check(replica)
		if n := len(rep.Snapshots); n == 0 || slices.ContainsFunc(rep.Snapshots, func(s verify.Snapshot) bool { return s.ID == res.SnapshotID && s.Complete }) {
			t.Errorf("%s: check calls it complete: %+v", way, rep.Snapshots)
		}

		// They come back, and with them a whole snapshot.
		for key := range lost {
			if _, err := g.client().PutObject(t.Context(), g.bucket, key, bytes.NewReader(want[key]), int64(len(want[key])), minio.PutObjectOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		g.mustBackUp(o)
	}
}

// remote is a repository in a bucket of the rig's server, seen through an endpoint.
func (g *rig) remote(endpoint, name string) backend.Backend {
	g.t.Helper()
	o := g.srv.Options()
	o.Endpoint = endpoint
	c, err := s3.New(g.t.Context(), o)
	if err != nil {
		g.t.Fatal(err)
	}
	be := retry.New(bs3.New(bs3.Options{Client: c, Bucket: name}), retry.Options{Tries: 5, First: time.Millisecond, Longest: time.Millisecond})
	g.t.Cleanup(func() { _ = be.Close() })
	return be
}

// TestRepositoryBehindABadNetwork is the same for the requests to the repository.
func TestRepositoryBehindABadNetwork(t *testing.T) {
	t.Parallel()
	g := newRig(t, s3test.Options{})
	p := s3test.NewProxy(t, g.srv.Endpoint)
	name := g.srv.Bucket(t, false, false)
	direct, through := g.remote(g.srv.Endpoint, name), g.remote(p.URL, name)
	newRepo(t, direct)
	// Something new each time, in three packs, or there would be little to write. What the last run remembered
	// leaves the writes as most of the requests; the reads are those of the restore at the end.
	cache := t.TempDir()
	run := func(n int, be backend.Backend) (*backup.Result, error) {
		t.Helper()
		if n > 0 {
			noise := make([]byte, 2_500_000)
			_, _ = rand.NewChaCha8([32]byte{byte(n), 17}).Read(noise)
			if err := os.WriteFile(filepath.Join(g.source, "data", "idm", "new"), noise, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return backUpAt(t, be, repo.Options{PackSize: 1 << 20}, backup.Options{Blobs: hasty, CacheDir: cache}, g.inst)
	}
	// A run that nothing disturbs tells whether what a disturbed one has left is right.
	judged := func(what string, res *backup.Result, err error, before int) {
		t.Helper()
		now := len(listed(t, direct))
		next, nerr := run(0, direct)
		switch {
		case nerr != nil:
			t.Errorf("%s: the next run: %v", what, nerr)
		case !next.Manifest.Proof.Complete:
			t.Errorf("%s: the next run: %+v", what, next.Manifest.Proof)
		case err == nil && (!res.Manifest.Proof.Complete || treeOf(t, direct, res) != treeOf(t, direct, next)):
			t.Errorf("%s: another snapshot than without: %+v", what, res.Manifest.Proof)
		case err == nil && now != before+1:
			t.Errorf("%s: it says that all is well, and there are %d snapshots after %d", what, now, before)
		case err != nil && now != before:
			t.Errorf("%s: it failed (%v), and there are %d snapshots after %d", what, err, now, before)
		case err != nil && !strings.Contains(err.Error(), p.URL):
			t.Errorf("%s: the error does not say where: %v", what, err)
		}
	}
	if _, err := run(1, through); err != nil {
		t.Fatal(err)
	}
	p.Judge(nil)
	if _, err := run(2, through); err != nil {
		t.Fatal(err)
	}
	requests := p.Judge(nil)
	n := 3
	for _, effects := range [][]s3test.Effect{s3test.Passing, {s3test.CutUp, s3test.CutAfter}, {s3test.CutAfter, s3test.CutUp, s3test.Busy}, {s3test.Short}} {
		before := len(listed(t, direct))
		p.Judge(s3test.OnceEach(effects...))
		res, err := run(n, through)
		if spoilt := p.Judge(nil); spoilt < requests && err == nil {
			t.Errorf("%v: %d requests, without it there are %d", effects, spoilt, requests)
		}
		if err != nil && effects[0] != s3test.Short {
			t.Errorf("each request once %v: %v", effects, err)
		}
		judged(fmt.Sprintf("each request once %v", effects), res, err, before)
		n++
	}
	failed := 0
	for i, from := range []int{1, requests / 3, requests * 2 / 3, requests} {
		e := []s3test.Effect{s3test.Cut, s3test.Busy, s3test.CutUp, s3test.Broken}[i]
		before := len(listed(t, direct))
		p.Judge(s3test.From(from, e))
		res, err := run(n, through)
		p.Judge(nil)
		if err != nil {
			failed++
		}
		g.unlock(direct)
		judged(e.String()+" for good", res, err, before)
		n++
	}
	if failed < 3 {
		t.Errorf("only %d backups failed", failed)
	}
	check(t, direct)
	cleanRemote(t, g, name)
	p.Judge(s3test.OnceEach(s3test.CutDown, s3test.Busy, s3test.Cut))
	back, dst := g.srv.Bucket(t, false, false), filepath.Join(t.TempDir(), "a")
	if _, err := restoreAt(t, through, dst, restore.Options{Objects: users(&restore.Objects{Dest: g.open(back)})}); err != nil {
		t.Fatal(err)
	}
	g.sameFiles(dst)
	g.sameObjects(back, g.want())
	if n := p.Judge(nil); n == 0 {
		t.Error("the restore went past the proxy")
	}
}

// listed are the snapshots of a repository.
func listed(t *testing.T, be backend.Backend) []*snapshot.Snapshot {
	t.Helper()
	list, err := snapshot.List(t.Context(), open(t, be))
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// unlock removes the lock of a run that could not do it itself: this process lives, so it counts as held.
func (g *rig) unlock(be backend.Backend) {
	g.t.Helper()
	if _, err := open(g.t, be).Unlock(g.t.Context(), true); err != nil {
		g.t.Fatal(err)
	}
}

// cleanRemote has restic check the repository in a bucket.
func cleanRemote(t *testing.T, g *rig, name string) {
	t.Helper()
	cmd := exec.Command("restic", "-r", "s3:"+g.srv.Endpoint+"/"+name, "--no-cache", "--no-lock", "check", "--read-data")
	cmd.Env = append(append(os.Environ(), "RESTIC_PASSWORD=pw"), g.srv.Env()...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("restic check: %v\n%s", err, out)
	}
}
