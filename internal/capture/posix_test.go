package capture_test

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/storegen"
	"github.com/holdfast-backup/holdfast/internal/verify"
)

type px struct {
	*tinyStore
	root string
}

func newPx(t *testing.T) *px {
	s := &tinyStore{t: t, dir: t.TempDir()}
	for _, d := range []string{"data/idm", "data/storage/metadata", "data/storage/users/projects/p1", "data/storage/users/indexes", "config"} {
		s.mkdir(d)
	}
	s.write("data/idm/idm.boltdb", "x")
	s.write("config/opencloud.yaml", "a: b\n")
	inst := instanceOf(s.dir, "opencloud-posixfs")
	for i := range inst.DataSets {
		inst.DataSets[i].Found = true
	}
	var ds []ocis.DataSet
	for _, d := range inst.DataSets {
		switch d.Name {
		case "nats", "proxy", "search", "ocm":
		default:
			ds = append(ds, d)
		}
	}
	inst.DataSets = ds
	s.inst = inst
	p := &px{s, s.path("data/storage/users/projects/p1")}
	p.attr("", "id", "sp1", "space.id", "sp1", "space.alias", "project/p1", "space.type", "project", "type", "2")
	return p
}

func (p *px) attr(rel string, kv ...string) {
	p.t.Helper()
	for i := 0; i < len(kv); i += 2 {
		p.check(unix.Setxattr(filepath.Join(p.root, rel), "user.oc."+kv[i], []byte(kv[i+1]), 0))
	}
}

func (p *px) pfile(rel, id, blob, data string, kv ...string) {
	p.t.Helper()
	f := filepath.Join(p.root, rel)
	p.put(f, data)
	p.attr(rel, append([]string{"id", id, "type", "1", "name", filepath.Base(rel), "blobid", blob, "blobsize", itoa(len(data)), "cs.sha1", sha1Of(data)}, kv...)...)
}

func TestPosixEmptyFileWithBlobID(t *testing.T) {
	p := newPx(t)
	p.pfile("a.txt", "id-a", "blob-a", "hello")
	p.pfile("empty.txt", "id-e", "blob-e", "")
	res, _, _ := p.capture()
	dump(t, res)
}

func TestPosixHardLinks(t *testing.T) {
	p := newPx(t)
	p.pfile("a.txt", "id-a", "blob-a", "hello")
	p.check(os.Link(filepath.Join(p.root, "a.txt"), filepath.Join(p.root, "b.txt")))
	res, r, sn := p.capture()
	dump(t, res)
	for _, n := range []string{"a.txt", "b.txt"} {
		if got, err := cat(t, r, sn, "/storage/users/spaces/project/p1/"+n); got != "hello" {
			t.Errorf("%s: %q %v", n, got, err)
		}
	}
}

func TestPosixProcessingWithoutUpload(t *testing.T) {
	p := newPx(t)
	p.pfile("a.txt", "id-a", "blob-a", "hello")
	p.check(os.Truncate(filepath.Join(p.root, "a.txt"), 0))
	p.attr("a.txt", "nodestatus", "processing:blob-a")
	res, _, _ := p.capture()
	dump(t, res)
	if res.Manifest.Proof.Complete {
		t.Error("5 bytes are nowhere, and it is complete")
	}
}

func TestPosixSpacesOfOneID(t *testing.T) {
	p := newPx(t)
	for _, d := range []string{"projects/a_b", "projects/a/b"} {
		p.root = p.path("data/storage/users/" + d)
		p.check(os.MkdirAll(p.root, 0o755))
		p.attr("", "id", "sp2", "space.id", "sp2", "space.alias", "project/p2", "type", "2")
		p.pfile("f-"+strings.ReplaceAll(d, "/", "-"), "i", "b", d)
	}
	_, r, sn := p.capture()
	root := p.path("data/storage/users")
	got := map[string]bool{}
	tr, err := snapshot.Lookup(t.Context(), r, *sn.Tree, "/storage/users/metadata")
	p.check(err)
	tt, err := snapshot.LoadTree(t.Context(), r, tr.Subtree)
	p.check(err)
	for _, n := range tt.Nodes {
		for e := range entries(t, r, sn, "/storage/users/metadata/"+n.Name) {
			got[strings.TrimSuffix(e, "/")] = true
		}
	}
	for e := range entries(t, r, sn, "/storage/users/store.tar") {
		got[strings.Trim(strings.TrimPrefix(e, "./"), "/")] = true
	}
	p.check(filepath.WalkDir(root, func(f string, _ os.DirEntry, err error) error {
		rel := strings.TrimPrefix(strings.TrimPrefix(f, root), "/")
		if !got[rel] {
			t.Errorf("%q is in no tar", rel)
		}
		return err
	}))
}

func TestPosixRevisionOfAFolder(t *testing.T) {
	defer func() {
		if x := recover(); x != nil {
			t.Errorf("panic: %v", x)
		}
	}()
	p := newPx(t)
	const dirID, fID = "11111111-aaaa-4bbb-8ccc-00000000d000", "22222222-aaaa-4bbb-8ccc-00000000f000"
	const stamp = "2025-01-01T00:00:00Z"
	p.check(os.MkdirAll(filepath.Join(p.root, "a"), 0o755))
	p.attr("a", "id", dirID, "type", "2")
	p.pfile("a/"+stamp, fID, "b1", "x")
	for _, id := range []string{dirID, fID} {
		p.pfile(".oc-nodes/"+ocis.NodePath(id)+".REV."+stamp, "", "b-"+id, "old "+id)
	}
	p.capture()
}

// Snapshot A holds v1, B holds v2 with the same size and time; B is forgotten and pruned by restic.
func TestForgottenParentIsNotUsed(t *testing.T) {
	p := newPx(t)
	big := strings.Repeat("v1", 300_000)
	p.pfile("a.bin", "id-a", "blob-a", big)
	f := filepath.Join(p.root, "a.bin")
	st, err := os.Stat(f)
	p.check(err)
	r, dir := newRepo(t)
	run(t, r, p.inst, capture.Options{Now: future})
	v2 := strings.Repeat("v2", 300_000)
	p.check(os.WriteFile(f, []byte(v2), 0o600))
	p.attr("a.bin", "cs.sha1", sha1Of(v2)) // same length: the tar header differs only here
	p.attr("a.bin", "cs.sha1", sha1Of(big))
	p.check(os.Chtimes(f, time.Time{}, st.ModTime()))
	second, sn, _ := run(t, r, p.inst, capture.Options{Now: future})
	t.Logf("second complete %v", second.Manifest.Proof.Missing)
	restic(t, dir, "forget", "--prune", "--max-unused", "0", sn.ID().String())
	r2, err := repo.Open(t.Context(), local.New(dir), "pw", repo.Options{})
	p.check(err)
	p.check(r2.LoadIndex(t.Context()))
	list, err := snapshot.List(t.Context(), r2)
	p.check(err)
	t.Log(len(list), "snapshots left")
	res, _, _ := run(t, r2, p.inst, capture.Options{Now: future, Cache: second.Cache})
	dump(t, res)
	rep, err := verify.Run(t.Context(), r2, verify.Options{})
	p.check(err)
	if len(rep.Errors) > 0 {
		t.Errorf("the repository is broken now: %q", rep.Errors)
	}
}

func TestSamePictureSameTree(t *testing.T) {
	_, inst := generated(t, storegen.Options{Seed: 9, Files: 1500, Bytes: 20 << 20, Spaces: 9})
	r, _ := newRepo(t)
	first, sn, _ := run(t, r, inst, capture.Options{Now: future})
	for w := 1; w <= 8; w++ {
		old := runtime.GOMAXPROCS(1 + w%4)
		_, a, _ := run(t, r, inst, capture.Options{Now: future, Limits: capture.Limits{Workers: w}})
		_, b, _ := run(t, r, inst, capture.Options{Now: future, Limits: capture.Limits{Workers: w}, Cache: first.Cache})
		_, c, _ := run(t, r, inst, capture.Options{Now: future, Limits: capture.Limits{Workers: w}, Cache: first.Cache})
		_, d, _ := run(t, r, inst, capture.Options{Now: future, Limits: capture.Limits{Workers: w}})
		runtime.GOMAXPROCS(old)
		for i, x := range []*snapshot.Snapshot{a, b, c, d} {
			if *x.Tree != *sn.Tree {
				t.Errorf("workers %d variant %d: another tree", w, i)
			}
		}
	}
}
