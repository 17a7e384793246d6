package capture_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/verify"
)

// dump shows the proof if the test fails.
func dump(t *testing.T, res *capture.Result) { t.Helper(); t.Logf("proof %+v", res.Manifest.Proof) }

func TestHardLinkedBlobsAreProven(t *testing.T) {
	s := newTinyStore(t)
	const b2 = "55555555-aaaa-4bbb-8ccc-0000000000b2"
	s.file("66666666-aaaa-4bbb-8ccc-000000000006", folderID, "copy.txt", b2, "hello world\n")
	s.check(os.Remove(s.space("blobs/" + ocis.NodePath(b2))))
	s.check(os.Link(s.space("blobs/"+ocis.NodePath(blobID)), s.space("blobs/"+ocis.NodePath(b2))))
	res, r, sn := s.capture()
	got, err := cat(t, r, sn, "/storage/users/spaces/project/tiny/folder/copy.txt")
	if got != "hello world\n" {
		t.Errorf("the second name holds %q, %v", got, err)
	}
	if !res.Manifest.Proof.Complete {
		t.Error("incomplete though both blobs are there")
	}
}

// lossy repo: one data blob is gone from the index (repair index after damage; or prune)
type lossy struct {
	*repo.Repository
	gone map[id.ID]bool
}

func (l lossy) Has(t repo.BlobType, d id.ID) bool { return !l.gone[d] && l.Repository.Has(t, d) }

type recTarget struct {
	mu    sync.Mutex
	saved map[id.ID]bool
	w     capture.Target
}

func (r *recTarget) Save(ctx context.Context, t repo.BlobType, p []byte) (id.ID, bool, error) {
	d, n, err := r.w.Save(ctx, t, p)
	r.mu.Lock()
	r.saved[d] = true
	r.mu.Unlock()
	return d, n, err
}

func (r *recTarget) SaveAs(ctx context.Context, t repo.BlobType, d id.ID, p []byte) (bool, error) {
	n, err := r.w.SaveAs(ctx, t, d, p)
	r.mu.Lock()
	r.saved[d] = true
	r.mu.Unlock()
	return n, err
}

func TestContentThatTheRepositoryLostIsSavedAgain(t *testing.T) {
	s := newTinyStore(t)
	r, _ := newRepo(t)
	first, _, _ := run(t, r, s.inst, capture.Options{Now: future})
	content := id.Hash([]byte("hello world\n"))
	if !r.Has(repo.DataBlob, content) {
		t.Fatal("setup")
	}
	l := lossy{r, map[id.ID]bool{content: true}}
	w := &recTarget{saved: map[id.ID]bool{}, w: r.NewWriter(t.Context())}
	_, err := capture.Run(t.Context(), l, w, capture.Options{Now: future, Instance: s.inst, Cache: first.Cache})
	s.check(err)
	if !w.saved[content] {
		t.Error("the content that the repository has lost was not saved again")
	}
}

func TestTwoFoldersOfOneSpaceID(t *testing.T) {
	s := newTinyStore(t)
	s.put(s.path("data/storage/users/spaces/zz/yy/first"), "one")
	s.put(s.path("data/storage/users/spaces/z/zyy/second"), "two")
	_, r, sn := s.capture()
	got := map[string]bool{}
	for n := range entries(t, r, sn, "/storage/users/store.tar") {
		got[n] = true
	}
	for n := range entries(t, r, sn, "/storage/users/metadata/zzyy.tar") {
		got[n] = true
	}
	for _, n := range []string{"spaces/zz/yy/first", "spaces/z/zyy/second"} {
		if !got[n] {
			t.Errorf("%s is in no tar", n)
		}
	}
}

func TestSpaceNamedLikeTheStore(t *testing.T) {
	defer func() {
		if p := recover(); p != nil {
			t.Errorf("panic: %v", p)
		}
	}()
	s := newTinyStore(t)
	big := strings.Repeat("0123456789", 200_000)
	s.put(s.path("data/storage/users/spaces/_s/tore/big"), big)
	s.put(s.path("data/storage/users/uploads/big"), big)
	s.capture()
}

func TestUnexplainedFilesOfOneName(t *testing.T) {
	s := newTinyStore(t)
	a, b := strings.Repeat("a123456789", 200_000), strings.Repeat("b123456789", 200_000)
	s.put(s.space("core"), a)
	s.put(s.space("blobs/core"), b)
	_, r, sn := s.capture()
	tar := entries(t, r, sn, "/storage/users/metadata/"+spaceID+".tar")
	for n, want := range map[string]string{"core": a, "blobs/core": b} {
		h := tar["spaces/"+ocis.Pathify(spaceID, 1, 2)+"/"+n]
		got, err := cat(t, r, sn, h.PAXRecords["HOLDFAST.content"])
		if got != want {
			t.Errorf("%s: content in %s starts with %.5q, want %.5q (%v)", n, h.PAXRecords["HOLDFAST.content"], got, want, err)
		}
	}
}

func TestBlobOfOneNameInAnotherPlace(t *testing.T) {
	s := newTinyStore(t)
	s.put(s.space("blobs/"+blobID), "HELLO WORLD\n")
	_, r, sn := s.capture()
	if got, err := cat(t, r, sn, tinyFile); got != "hello world\n" {
		t.Errorf("the file holds %q, %v", got, err)
	}
}

func TestLinkedSpaceIsNotComplete(t *testing.T) {
	for _, rel := range []string{"", "nodes"} {
		s := newTinyStore(t)
		p := strings.TrimSuffix(s.space(rel), "/")
		s.check(os.Rename(p, s.path("elsewhere")))
		s.check(os.Symlink(s.path("elsewhere"), p))
		res, _, _ := s.capture()
		if res.Manifest.Proof.Complete {
			t.Errorf("%q is a symbolic link, nothing behind it is in the snapshot, and it is called complete: %+v", rel, res.Manifest.Proof)
		}
	}
}

type failing struct {
	capture.Target
	n  int
	mu sync.Mutex
}

var errDisk = errors.New("disk full")

func (f *failing) Save(ctx context.Context, t repo.BlobType, p []byte) (id.ID, bool, error) {
	if f.broken() {
		return id.ID{}, false, errDisk
	}
	return f.Target.Save(ctx, t, p)
}

func (f *failing) SaveAs(ctx context.Context, t repo.BlobType, d id.ID, p []byte) (bool, error) {
	if f.broken() {
		return false, errDisk
	}
	return f.Target.SaveAs(ctx, t, d, p)
}

func (f *failing) broken() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n--
	return f.n < 0
}

func TestErrorsKeepTheirCause(t *testing.T) {
	s := newTinyStore(t)
	for i := range 3000 {
		s.put(s.space(fmt.Sprintf("stray/%d/x", i)), "y")
	}
	for n := range 14 {
		r, _ := newRepo(t)
		_, err := capture.Run(t.Context(), r, &failing{Target: r.NewWriter(t.Context()), n: n}, capture.Options{Instance: s.inst})
		if errors.Is(err, context.Canceled) {
			t.Errorf("after %d: %q", n, err)
		}
	}
}

func TestEnvironmentNamesThatClash(t *testing.T) {
	defer func() {
		if p := recover(); p != nil {
			t.Errorf("panic: %v", p)
		}
	}()
	s := newTinyStore(t)
	s.inst.Environment = []ocis.EnvironmentFile{{Name: "compose", Content: []byte("x")}, {Name: "compose/docker-compose.yml", Content: []byte("y")}}
	r, _ := newRepo(t)
	run(t, r, s.inst, capture.Options{})
}

// xattr-era store
func TestMetadataInAttributes(t *testing.T) {
	s := newTinyStore(t)
	s.check(filepath.WalkDir(s.space(""), func(p string, d os.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(p, ".mpk") {
			b, err := os.ReadFile(p)
			s.check(err)
			a, err := ocis.ParseMPK(b)
			s.check(err)
			for _, x := range a {
				s.check(unix.Setxattr(strings.TrimSuffix(p, ".mpk"), x.Key, x.Value, 0))
			}
			s.check(os.Remove(p))
		}
		return err
	}))
	_, r, sn := s.capture()
	if got, err := cat(t, r, sn, tinyFile); got != "hello world\n" {
		t.Errorf("the file holds %q, %v", got, err)
	}
}

// migrated store: xattrs remain; the file was emptied since, its old blob purged
func TestStaleAttributesBesideMetadata(t *testing.T) {
	s := newTinyStore(t)
	s.check(unix.Setxattr(s.nodePath(fileID), "user.oc.blobid", []byte("99999999-aaaa-4bbb-8ccc-000000000099"), 0))
	s.check(unix.Setxattr(s.nodePath(fileID), "user.oc.blobsize", []byte("7"), 0))
	s.put(s.nodePath(fileID)+".mpk", string(ocis.EncodeMPK(ocis.Attributes{{Key: "user.oc.type", Value: []byte("1")}, {Key: "user.oc.name", Value: []byte("file.txt")}, {Key: "user.oc.blobid", Value: nil}, {Key: "user.oc.blobsize", Value: []byte("0")}})))
	if res, _, _ := s.capture(); !res.Manifest.Proof.Complete {
		t.Errorf("proof %+v", res.Manifest.Proof)
	}
}

func TestTwoSizesForOneBlob(t *testing.T) {
	s := newTinyStore(t)
	s.node(fileID+".REV.2025-01-01T00:00:00Z", false, "user.oc.type", "1", "user.oc.blobid", blobID, "user.oc.blobsize", "999")
	r, _ := newRepo(t)
	res, _, _ := run(t, r, s.inst, capture.Options{})
	if res.Manifest.Proof.Complete {
		t.Error("capture: revision wants 999 bytes, blob has 12, complete")
	}
	bad := 0
	for range 20 {
		rep, err := verify.Run(t.Context(), r, verify.Options{})
		s.check(err)
		if len(rep.Errors) > 0 {
			bad++
		}
	}
	if bad != 0 && bad != 20 {
		t.Errorf("verify finds an error in %d of 20 runs", bad)
	}
}

func TestLargeMetadata(t *testing.T) {
	s := newTinyStore(t)
	s.node(fileID, false, "user.oc.type", "1", "user.oc.name", "file.txt", "user.oc.blobid", blobID, "user.oc.blobsize", "12", "user.oc.md.x", strings.Repeat("x", 1<<20))
	s.check(os.Remove(s.space("blobs/" + ocis.NodePath(blobID))))
	res, _, _ := s.capture()
	if res.Manifest.Proof.Complete {
		t.Error("a missing blob is not seen")
	}
}
