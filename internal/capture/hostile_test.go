package capture_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha1" //nolint:gosec // what the product records
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/verify"
)

const (
	spaceID  = "11111111-aaaa-4bbb-8ccc-000000000001"
	folderID = "22222222-aaaa-4bbb-8ccc-000000000002"
	fileID   = "33333333-aaaa-4bbb-8ccc-000000000003"
	blobID   = "44444444-aaaa-4bbb-8ccc-000000000004"
)

// tinyStore is a store with one space, one folder and one file in it, written by hand.
type tinyStore struct {
	t    *testing.T
	dir  string
	inst *ocis.Instance
}

func newTinyStore(t *testing.T) *tinyStore {
	t.Helper()
	s := &tinyStore{t: t, dir: t.TempDir()}
	for _, d := range []string{"data/idm", "data/storage/metadata", "config"} {
		s.mkdir(d)
	}
	s.write("data/idm/idm.boltdb", "identities")
	s.write("config/opencloud.yaml", "a: b\n")
	s.inst = tinyInstance(s.dir)
	s.node(spaceID, true, "user.oc.id", spaceID, "user.oc.name", "Tiny", "user.oc.space.id", spaceID,
		"user.oc.space.name", "Tiny", "user.oc.space.alias", "project/tiny", "user.oc.space.type", "project")
	s.node(folderID, true, "user.oc.type", "2", "user.oc.name", "folder", "user.oc.parentid", spaceID)
	s.link(spaceID, "folder", folderID)
	s.file(fileID, folderID, "file.txt", blobID, "hello world\n")
	return s
}

func tinyInstance(dir string) *ocis.Instance {
	inst := instanceOf(dir, "opencloud-posix")
	for i := range inst.DataSets {
		inst.DataSets[i].Found = true
	}
	inst.DataSets = slices.DeleteFunc(inst.DataSets, func(d ocis.DataSet) bool {
		return slices.Contains([]string{"nats", "proxy", "search", "ocm"}, d.Name)
	})
	return inst
}

func (s *tinyStore) path(rel string) string { return filepath.Join(s.dir, rel) }
func (s *tinyStore) space(rel string) string {
	return s.path("data/storage/users/" + ocis.SpacePath(spaceID) + "/" + rel)
}
func (s *tinyStore) nodePath(key string) string { return s.space("nodes/" + ocis.NodePath(key)) }

func (s *tinyStore) check(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}
func (s *tinyStore) mkdir(rel string) { s.t.Helper(); s.check(os.MkdirAll(s.path(rel), 0o700)) }
func (s *tinyStore) write(rel, data string) {
	s.t.Helper()
	s.put(s.path(rel), data)
}
func (s *tinyStore) put(p, data string) {
	s.t.Helper()
	s.check(os.MkdirAll(filepath.Dir(p), 0o700))
	s.check(os.WriteFile(p, []byte(data), 0o600))
}

func (s *tinyStore) node(key string, dir bool, attrs ...string) {
	s.t.Helper()
	if dir {
		s.check(os.MkdirAll(s.nodePath(key), 0o700))
	} else {
		s.put(s.nodePath(key), "")
	}
	var a ocis.Attributes
	for i := 0; i < len(attrs); i += 2 {
		a = append(a, ocis.Attribute{Key: attrs[i], Value: []byte(attrs[i+1])})
	}
	s.put(s.nodePath(key)+".mpk", string(ocis.EncodeMPK(a)))
}

func (s *tinyStore) link(parent, name, child string) {
	s.t.Helper()
	s.check(os.Symlink("../../../../../"+ocis.NodePath(child), filepath.Join(s.nodePath(parent), name)))
}

func (s *tinyStore) file(key, parent, name, blob, data string) {
	s.t.Helper()
	s.node(key, false, "user.oc.type", "1", "user.oc.name", name, "user.oc.parentid", parent, "user.oc.id", key,
		"user.oc.blobid", blob, "user.oc.blobsize", itoa(len(data)), "user.oc.cs.sha1", sha1Of(data))
	s.link(parent, name, key)
	s.put(s.space("blobs/"+ocis.NodePath(blob)), data)
}

// capture makes a snapshot and demands that restic and verify find nothing wrong with it.
func (s *tinyStore) capture() (*capture.Result, *repo.Repository, *snapshot.Snapshot) {
	s.t.Helper()
	r, dir := newRepo(s.t)
	res, sn, _ := run(s.t, r, s.inst, capture.Options{})
	restic(s.t, dir, "check", "--read-data")
	rep, err := verify.Run(s.t.Context(), r, verify.Options{})
	s.check(err)
	if len(rep.Errors) > 0 {
		s.t.Errorf("check finds %q", rep.Errors)
	}
	return res, r, sn
}

// entries returns the names in a tar of the snapshot, with their contents.
func entries(t *testing.T, r *repo.Repository, sn *snapshot.Snapshot, place string) map[string]*tar.Header {
	t.Helper()
	n, err := snapshot.Lookup(t.Context(), r, *sn.Tree, place)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]*tar.Header{}
	tr := tar.NewReader(snapshot.NewReader(t.Context(), r, n))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if out[h.Name] != nil {
			t.Errorf("%q stands twice in %s", h.Name, place)
		}
		out[h.Name] = h
	}
}

func cat(t *testing.T, r *repo.Repository, sn *snapshot.Snapshot, place string) (string, error) {
	t.Helper()
	n, err := snapshot.Lookup(t.Context(), r, *sn.Tree, place)
	if err != nil {
		return "", err
	}
	p, err := snapshot.LoadContent(t.Context(), r, n, 1<<24)
	return string(p), err
}

const tinyFile = "/storage/users/spaces/project/tiny/folder/file.txt"

func TestTinyStore(t *testing.T) {
	s := newTinyStore(t)
	res, r, sn := s.capture()
	if p := res.Manifest.Proof; !p.Complete || p.Blobs != 1 || p.Verified != 1 || p.Bytes != 12 || p.Nodes != 3 {
		t.Errorf("proof %+v", p)
	}
	if got, err := cat(t, r, sn, tinyFile); got != "hello world\n" {
		t.Errorf("the file holds %q, %v", got, err)
	}
}

// TestDamageIsReported breaks one thing at a time, and the proof must name that and nothing else.
func TestDamageIsReported(t *testing.T) {
	blob := func(s *tinyStore) string { return s.space("blobs/" + ocis.NodePath(blobID)) }
	for _, c := range []struct {
		name    string
		break_  func(s *tinyStore)
		problem string
	}{
		{"blob missing", func(s *tinyStore) { s.check(os.Remove(blob(s))) }, "missing"},
		{"blob short", func(s *tinyStore) { s.check(os.Truncate(blob(s), 3)) }, "size"},
		{"blob longer", func(s *tinyStore) { s.put(blob(s), "hello world\nand more") }, "size"},
		{"blob altered", func(s *tinyStore) { s.put(blob(s), "hello wOrld\n") }, "checksum"},
		{"blob is a folder", func(s *tinyStore) { s.check(os.Remove(blob(s))); s.check(os.Mkdir(blob(s), 0o700)) }, "missing"},
		{"blob is a link to itself", func(s *tinyStore) { s.check(os.Remove(blob(s))); s.check(os.Symlink("x", blob(s))) }, "missing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newTinyStore(t)
			c.break_(s)
			res, r, sn := s.capture()
			p := res.Manifest.Proof
			if p.Complete || len(p.Missing) != 1 {
				t.Fatalf("proof %+v", p)
			}
			m := p.Missing[0]
			if m.Problem != c.problem || m.BlobID != blobID || m.Path != "/folder/file.txt" || m.Space != "project/tiny" {
				t.Errorf("it says %+v", m)
			}
			got, err := cat(t, r, sn, tinyFile)
			if c.problem == "missing" {
				if !errors.Is(err, snapshot.ErrNoSuchPath) {
					t.Errorf("a file whose blob is missing is there: %q, %v", got, err)
				}
				return
			}
			want, err := os.ReadFile(blob(s))
			s.check(err)
			if got != string(want) {
				t.Errorf("the damaged blob was not kept as it is: %q, %v", got, err)
			}
		})
	}
}

func TestBlobInFlightIsTakenFromUploads(t *testing.T) {
	s := newTinyStore(t)
	up := s.path("data/storage/users/uploads/" + blobID)
	s.check(os.MkdirAll(filepath.Dir(up), 0o700))
	s.check(os.Rename(s.space("blobs/"+ocis.NodePath(blobID)), up))
	res, r, sn := s.capture()
	if p := res.Manifest.Proof; !p.Complete || p.InFlight != 1 || len(p.Missing) != 0 {
		t.Errorf("proof %+v", p)
	}
	if got, err := cat(t, r, sn, tinyFile); got != "hello world\n" {
		t.Errorf("the file holds %q, %v", got, err)
	}
	if h := entries(t, r, sn, "/storage/users/store.tar")["uploads/"+blobID]; h == nil || h.Size != 12 {
		t.Errorf("the upload itself is not in the store's tar: %+v", h)
	}
}

// TestNothingIsLost puts all kinds of things into the store that no rule explains (law 2).
func TestNothingIsLost(t *testing.T) {
	s := newTinyStore(t)
	long, raw := strings.Repeat("n", 255), "raw\xff\xfe\x01name"
	s.link(folderID, "to nowhere", "99999999-aaaa-4bbb-8ccc-000000000009")
	s.link(folderID, "up", spaceID)  // a circle
	s.link(folderID, "me", folderID) // a smaller circle
	s.file("55555555-aaaa-4bbb-8ccc-000000000005", folderID, long, "66666666-aaaa-4bbb-8ccc-000000000006", "long")
	s.file("77777777-aaaa-4bbb-8ccc-000000000007", folderID, raw, "88888888-aaaa-4bbb-8ccc-000000000008", "raw")
	s.node("aaaaaaaa-aaaa-4bbb-8ccc-00000000000a", false)
	s.put(s.nodePath("aaaaaaaa-aaaa-4bbb-8ccc-00000000000a")+".mpk", "") // a full disk leaves such
	s.link(folderID, "empty metadata", "aaaaaaaa-aaaa-4bbb-8ccc-00000000000a")
	s.node("bbbbbbbb-aaaa-4bbb-8ccc-00000000000b", false)
	s.put(s.nodePath("bbbbbbbb-aaaa-4bbb-8ccc-00000000000b")+".mpk", "\x8f\xff garbage")
	s.put(s.space("blobs/"+ocis.NodePath("cccccccc-aaaa-4bbb-8ccc-00000000000c")), "orphan")
	s.put(s.space("blobs/odd/file"), "odd")
	s.put(s.space("nodes/surprise.txt"), "what is this")
	s.put(s.space("stray/deep/er"), "stray")
	big := bytes.Repeat([]byte("0123456789abcdef"), 200_000)
	s.put(s.space("big.bin"), string(big))
	s.put(s.path("data/storage/users/uploads/big-upload"), string(big[:2_000_000]))
	s.put(s.path("data/appauth.json"), "{}")
	s.check(unix.Mkfifo(s.space("fifo"), 0o600))
	s.check(unix.Mknod(s.space("socket"), syscall.S_IFSOCK|0o600, 0))
	s.check(os.Link(s.space("stray/deep/er"), s.space("stray/second name")))
	s.check(os.Symlink("loop", s.space("loop")))
	s.check(unix.Setxattr(s.space("stray"), "user.a=b", []byte("c"), 0))
	res, r, sn := s.capture()
	p := res.Manifest.Proof
	if !p.Complete || p.Blobs != 3 {
		t.Errorf("proof %+v", p)
	}
	for place, want := range map[string]string{
		"/storage/users/spaces/project/tiny/folder/" + long:                                "long",
		"/storage/users/spaces/project/tiny/folder/" + raw:                                 "raw",
		"/storage/users/unreferenced/" + spaceID + "/cccccccc-aaaa-4bbb-8ccc-00000000000c": "orphan",
		"/storage/users/unreferenced/" + spaceID + "/.%2Fblobs%2Fodd%2Ffile":               "odd",
		"/storage/users/unreferenced/" + spaceID + "/.%2Fbig.bin":                          string(big),
		"/storage/users/unreferenced/_store/uploads%2Fbig-upload":                          string(big[:2_000_000]),
		"/system/base/appauth.json":                                                        "{}",
	} {
		if got, err := cat(t, r, sn, place); got != want {
			t.Errorf("%s holds %d bytes, %v", place, len(got), err)
		}
	}
	// Each entry of the store is in exactly one tar.
	got := map[string]bool{}
	for _, place := range []string{"/storage/users/store.tar", "/storage/users/metadata/" + spaceID + ".tar"} {
		for name := range entries(t, r, sn, place) {
			name = strings.Trim(strings.TrimPrefix(name, "./"), "/")
			if got[name] {
				t.Errorf("%q is in both tars", name)
			}
			got[name] = true
		}
	}
	root := s.path("data/storage/users")
	s.check(filepath.WalkDir(root, func(p string, _ os.DirEntry, err error) error {
		rel := strings.TrimPrefix(strings.TrimPrefix(p, root), "/")
		if err == nil && !got[rel] {
			t.Errorf("%q is in no tar", rel)
		}
		delete(got, rel)
		return err
	}))
	for name := range got {
		t.Errorf("%q is in a tar and not on disk", name)
	}
}

// TestAliasesThatClash: names of spaces are users' input and must not lead anywhere else.
func TestAliasesThatClash(t *testing.T) {
	for _, c := range []struct{ alias, want string }{
		{"project/tiny", "project/tiny"},
		{"../../../etc", spaceID},
		{"/", spaceID},
		{"", spaceID},
		{"project//x", spaceID},
		{"project/a\x00b", spaceID},
	} {
		s := newTinyStore(t)
		s.put(s.nodePath(spaceID)+".mpk", string(ocis.EncodeMPK(ocis.Attributes{
			{Key: "user.oc.space.alias", Value: []byte(c.alias)}, {Key: "user.oc.space.id", Value: []byte(spaceID)}})))
		res, _, _ := s.capture()
		if got := res.Manifest.Stores[0].Spaces[0].Folder; got != c.want {
			t.Errorf("alias %q: folder %q, want %q", c.alias, got, c.want)
		}
	}
}

func itoa(n int) string { return strconv.Itoa(n) }

func sha1Of(s string) string {
	h := sha1.Sum([]byte(s))
	return string(h[:])
}
