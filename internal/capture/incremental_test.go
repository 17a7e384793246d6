package capture_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/fswatch"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/storegen"
)

// TestIncrementalEqualsFull is the law of change detection: after the changes that a server makes, a
// capture with the cache gives the same tree as one that reads everything.
func TestIncrementalEqualsFull(t *testing.T) {
	dir, inst := generated(t, storegen.Options{Seed: 5, Files: 1500, Bytes: 6 << 20, Spaces: 6})
	r, _ := newRepo(t)
	res, _, _ := run(t, r, inst, capture.Options{Now: future})
	if !res.Manifest.Proof.Complete {
		t.Fatalf("incomplete: %+v", res.Manifest.Proof.Missing)
	}
	for round := range uint64(4) {
		if _, err := storegen.Mutate(t.Context(), dir, round, 0.02); err != nil {
			t.Fatal(err)
		}
		next, inc, _ := run(t, r, inst, capture.Options{Cache: res.Cache, Now: future})
		_, full, st := run(t, r, inst, capture.Options{Now: future})
		if *inc.Tree != *full.Tree {
			t.Fatalf("round %d: the incremental capture gives another tree than the full one", round)
		}
		if st.NewBlobs != [2]int64{} {
			t.Errorf("round %d: the full capture stored %v more blobs", round, st.NewBlobs)
		}
		if all := next.Stats.Bytes; next.Stats.BytesRead > all/3 {
			t.Errorf("round %d: %d of %d bytes were read for 2%% of changes", round, next.Stats.BytesRead, all)
		}
		if !next.Manifest.Proof.Complete {
			t.Fatalf("round %d: incomplete: %+v", round, next.Manifest.Proof)
		}
		res = next
	}
}

// future is a clock that is ahead, so that what was just written does not count as just changed.
func future() time.Time { return time.Now().Add(time.Hour) }

// eachChange changes one thing of the small store at a time, also in ways that no server does and that leave
// times and sizes as they were.
var eachChange = []struct {
	name   string
	byHand bool // no server does it: seen where the file system tells, or when the space is looked at in full
	change func(s *tinyStore)
}{
	{"metadata replaced", false, func(s *tinyStore) {
		p := s.nodePath(folderID) + ".mpk"
		s.put(p+".tmp", string(ocis.EncodeMPK(ocis.Attributes{{Key: "user.oc.type", Value: []byte("2")}, {Key: "user.oc.tmtime", Value: []byte("2026-01-01T00:00:00Z")}})))
		s.check(os.Rename(p+".tmp", p))
	}},
	{"metadata rewritten, same size and time", true, func(s *tinyStore) {
		p := s.nodePath(folderID) + ".mpk"
		keepTime(s, p, func() {
			b, err := os.ReadFile(p)
			s.check(err)
			s.check(os.WriteFile(p, []byte(strings.Replace(string(b), "folder", "fOlder", 1)), 0o600))
		})
	}},
	{"renamed", false, func(s *tinyStore) {
		s.check(os.Rename(filepath.Join(s.nodePath(folderID), "file.txt"), filepath.Join(s.nodePath(folderID), "other.txt")))
	}},
	{"mode", true, func(s *tinyStore) { s.check(os.Chmod(s.blob(blobID), 0o640)) }},
	{"owner", true, func(s *tinyStore) { s.check(os.Lchown(s.nodePath(fileID), 7, 8)) }},
	{"attribute", false, func(s *tinyStore) { s.check(unix.Setxattr(s.nodePath(folderID), "user.x", []byte("y"), 0)) }},
	{"new orphan", false, func(s *tinyStore) {
		s.put(s.space("blobs/"+ocis.NodePath("99999999-aaaa-4bbb-8ccc-000000000009")), "o")
	}},
	{"child link removed", false, func(s *tinyStore) { s.check(os.Remove(filepath.Join(s.nodePath(folderID), "file.txt"))) }},
	{"child link to another node", false, func(s *tinyStore) {
		p := filepath.Join(s.nodePath(folderID), "file.txt")
		s.check(os.Remove(p))
		s.check(os.Symlink("../../../../../"+ocis.NodePath(folderID), p))
	}},
	{"mode of a shard", false, func(s *tinyStore) { s.check(os.Chmod(filepath.Dir(s.nodePath(fileID)), 0o711)) }},
	{"shard replaced", false, func(s *tinyStore) {
		p := filepath.Dir(filepath.Dir(s.nodePath(fileID)))
		s.check(os.Rename(p, p+".old"))
		s.check(os.Mkdir(p, 0o700))
	}},
	{"shard replaced by a link", false, func(s *tinyStore) {
		p := filepath.Dir(filepath.Dir(s.blob(blobID)))
		s.check(os.Rename(p, s.path("elsewhere")))
		s.check(os.Symlink(s.path("elsewhere"), p))
	}},
	{"trashed", false, func(s *tinyStore) {
		p, key := s.nodePath(fileID), ".T.2026-01-02T03:04:05.000000006Z"
		s.check(os.Rename(p, p+key))
		s.check(os.Rename(p+".mpk", p+key+".mpk"))
		s.check(os.Remove(filepath.Join(s.nodePath(folderID), "file.txt")))
		link := s.space("trash/" + ocis.NodePath(fileID))
		s.check(os.MkdirAll(filepath.Dir(link), 0o700))
		s.check(os.Symlink("../../../../../nodes/"+ocis.NodePath(fileID)+key, link))
	}},
	{"lock with content", false, func(s *tinyStore) { s.put(s.nodePath(fileID)+".lock", "{}") }},
	{"new shard", false, func(s *tinyStore) {
		s.node("77777777-aaaa-4bbb-8ccc-000000000007", false, "user.oc.type", "1", "user.oc.name", "lost")
	}},
	{"blob gone", false, func(s *tinyStore) { s.check(os.Remove(s.blob(blobID))) }},
	{"blob grown", true, func(s *tinyStore) { s.put(s.blob(blobID), "hello world\n!") }},
	{"system file, same size and time", false, func(s *tinyStore) {
		p := s.path("data/idm/idm.boltdb")
		keepTime(s, p, func() { s.check(os.WriteFile(p, []byte("Identities"), 0o600)) })
	}},
	{"config", false, func(s *tinyStore) { s.write("config/opencloud.yaml", "a: c\n") }},
	{"index in place", false, func(s *tinyStore) { s.put(s.path("data/storage/users/indexes/by-type/project.mpk"), "\x81\xa1b\xa1c") }},
	{"alias, in place", true, func(s *tinyStore) {
		s.put(s.nodePath(spaceID)+".mpk", string(ocis.EncodeMPK(ocis.Attributes{
			{Key: "user.oc.space.alias", Value: []byte("project/new")}, {Key: "user.oc.space.id", Value: []byte(spaceID)}})))
	}},
	{"alias", false, func(s *tinyStore) {
		s.replaceMeta(spaceID, "user.oc.space.alias", "project/new", "user.oc.space.id", spaceID)
	}},
}

// keepTime gives p the mtime back that it had.
func keepTime(s *tinyStore, p string, fn func()) {
	s.t.Helper()
	st, err := os.Lstat(p)
	s.check(err)
	fn()
	s.check(os.Chtimes(p, time.Time{}, st.ModTime()))
}

func TestEachChangeIsSeen(t *testing.T) {
	for _, c := range eachChange {
		t.Run(c.name, func(t *testing.T) {
			s := newTinyStore(t)
			s.put(s.path("data/storage/users/indexes/by-type/project.mpk"), "\x81\xa1a\xa1b")
			r, _ := newRepo(t)
			first, sn, _ := run(t, r, s.inst, capture.Options{Now: future})
			s.tick()
			c.change(s)
			_, full, _ := run(t, r, s.inst, capture.Options{Now: future})
			looks := []capture.Options{{Now: future}, {FullScan: true, Now: future}, {Now: func() time.Time { return future().Add(7 * 24 * time.Hour) }}}
			if c.byHand {
				looks = looks[1:]
			}
			for i, o := range looks {
				o.Cache = first.Cache
				_, inc, _ := run(t, r, s.inst, o)
				if *inc.Tree == *sn.Tree {
					t.Errorf("%d: the change was not seen", i)
				}
				if *inc.Tree != *full.Tree {
					t.Errorf("%d: the incremental capture gives another tree than the full one", i)
				}
			}
		})
	}
}

// TestUnchangedDirectoriesAreNotListed: a second scan lists the top directories and what has changed.
func TestUnchangedDirectoriesAreNotListed(t *testing.T) {
	_, inst := generated(t, storegen.Options{Seed: 6, Files: 400, Bytes: 1 << 20, Spaces: 4})
	r, _ := newRepo(t)
	first, _, _ := run(t, r, inst, capture.Options{Now: future})
	again, _, _ := run(t, r, inst, capture.Options{Cache: first.Cache, Now: future})
	// What belongs to no space is listed each time.
	if a, b := first.Stats.DirsListed, again.Stats.DirsListed; b > a/10 {
		t.Errorf("%d directories were listed, %d the first time", b, a)
	}
	if again.Stats.Entries != first.Stats.Entries {
		t.Errorf("%d entries, %d the first time", again.Stats.Entries, first.Stats.Entries)
	}
	full, _, _ := run(t, r, inst, capture.Options{Cache: again.Cache, FullScan: true, Now: future})
	if full.Stats.DirsListed != first.Stats.DirsListed {
		t.Errorf("a full scan listed %d directories, not %d", full.Stats.DirsListed, first.Stats.DirsListed)
	}
	// With a clock that is not far ahead, though past the time in which a change could hide.
	soon := time.Now().Add(2 * time.Second)
	just, _, _ := run(t, r, inst, capture.Options{Cache: first.Cache, Now: func() time.Time { return soon }})
	last, _, _ := run(t, r, inst, capture.Options{Cache: just.Cache, Now: future})
	if just.Stats.DirsListed > first.Stats.DirsListed/10 {
		t.Errorf("%d directories were listed although nothing had changed", just.Stats.DirsListed)
	}
	if last.Stats.DirsListed > first.Stats.DirsListed/10 {
		t.Errorf("%d directories were listed after a scan that used what was known", last.Stats.DirsListed)
	}
}

// TestJustChangedIsReadAgain: two changes within the granularity of the file system's clock bear the
// same time, so what was changed just before a scan is not trusted at the next.
func TestJustChangedIsReadAgain(t *testing.T) {
	s := newTinyStore(t)
	r, _ := newRepo(t)
	// A clock that stands still at the last write, because a slow machine takes longer than the window.
	st, err := os.Stat(s.space("blobs/" + ocis.NodePath(blobID)))
	s.check(err)
	now := func() time.Time { return st.ModTime() }
	first, sn, _ := run(t, r, s.inst, capture.Options{Now: now})
	res, again, _ := run(t, r, s.inst, capture.Options{Cache: first.Cache, Now: now})
	if res.Stats.BytesRead == 0 {
		t.Error("what was written a moment ago was not read again")
	}
	if *again.Tree != *sn.Tree {
		t.Error("another tree")
	}
}

// TestViewOfAnotherDevice: device and inode numbers differ in every view, and must not matter.
func TestViewOfAnotherDevice(t *testing.T) {
	s := newTinyStore(t)
	r, _ := newRepo(t)
	_, sn, _ := run(t, r, s.inst, capture.Options{Now: future})
	view := t.TempDir()
	if out, err := exec.Command("cp", "-a", s.dir+"/.", view).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	_, again, st := run(t, r, s.inst, capture.Options{Now: future, View: func(p string) string {
		return strings.Replace(p, s.dir, view, 1)
	}})
	if *again.Tree != *sn.Tree || st.NewBlobs[repo.DataBlob] != 0 {
		t.Errorf("a copy of the store gives another tree, %v new blobs", st.NewBlobs)
	}
}

// TestUnreadableIsNamed captures in a process of another user, who cannot read one folder and one blob.
func TestUnreadableIsNamed(t *testing.T) {
	const env = "HOLDFAST_TEST_UNREADABLE"
	if dir := os.Getenv(env); dir != "" {
		s := &tinyStore{t: t, dir: dir, inst: tinyInstance(dir)}
		res, r, sn := s.capture()
		p := res.Manifest.Proof
		if p.Complete || len(p.Unreadable) != 2 {
			t.Errorf("proof %+v", p)
		}
		if len(p.Missing) != 1 || p.Missing[0].BlobID != blobID {
			t.Errorf("missing %+v", p.Missing)
		}
		if _, err := snapshot.Lookup(t.Context(), r, *sn.Tree, tinyFile); err == nil {
			t.Error("a file that could not be read is there")
		}
		return
	}
	s := newTinyStore(t)
	s.check(os.Chmod(s.space("blobs/"+ocis.NodePath(blobID)), 0))
	s.check(os.Mkdir(s.path("data/closed"), 0))
	tmp := t.TempDir()
	s.check(exec.Command("chown", "-R", "65534:65534", s.dir, tmp).Run())
	for d := s.dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		s.check(os.Chmod(d, 0o755))
	}
	exe := filepath.Join(tmp, "capture.test") // the test binary may lie where the other user cannot go
	p, err := os.ReadFile("/proc/self/exe")
	s.check(err)
	s.check(os.WriteFile(exe, p, 0o755))
	cmd := exec.Command(exe, "-test.run", "^TestUnreadableIsNamed$", "-test.v")
	cmd.Dir = tmp
	cmd.Env = append(os.Environ(), env+"="+s.dir, "TMPDIR="+tmp, "HOME="+tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestUnreadableIsNamed") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestUntouchedSpacesAreNotScanned: within one run, what is known to be unchanged is taken as it was; what
// is not known is looked at, and the same tree comes out.
func TestUntouchedSpacesAreNotScanned(t *testing.T) {
	dir, inst := generated(t, storegen.Options{Seed: 7, Files: 400, Bytes: 1 << 20, Spaces: 8})
	r, _ := newRepo(t)
	first, _, _ := run(t, r, inst, capture.Options{Now: future})
	store := filepath.Join(dir, "data/storage/users")
	w, err := fswatch.Start(store, capture.SpaceOf)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := storegen.Mutate(t.Context(), dir, 1, 0.01); err != nil {
		t.Fatal(err)
	}
	changed, err := w.Take()
	if err != nil {
		t.Fatal(err)
	}
	var asked, same atomic.Int64
	unchanged := func(dir string) bool {
		rel, ok := strings.CutPrefix(dir, store+"/")
		if !ok {
			return false // the system store
		}
		asked.Add(1)
		if capture.Touched(changed, rel) {
			return false
		}
		same.Add(1)
		return true
	}
	next, inc, _ := run(t, r, inst, capture.Options{Cache: first.Cache, Unchanged: unchanged, Now: future})
	_, full, _ := run(t, r, inst, capture.Options{Now: future})
	if *inc.Tree != *full.Tree {
		t.Error("the tree is another one than that of a full capture")
	}
	if same.Load() == 0 || same.Load() == asked.Load() {
		t.Errorf("%d of %d spaces were unchanged: the test shows nothing", same.Load(), asked.Load())
	}
	// From the file, the cache is not of this run.
	p := filepath.Join(t.TempDir(), "cache")
	if err := next.Cache.Save(p); err != nil {
		t.Fatal(err)
	}
	c, err := capture.LoadCache(p)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := storegen.Mutate(t.Context(), dir, 2, 0.01); err != nil {
		t.Fatal(err)
	}
	_, inc, _ = run(t, r, inst, capture.Options{Cache: c, Unchanged: func(string) bool { return true }, Now: future})
	_, full, _ = run(t, r, inst, capture.Options{Now: future})
	if *inc.Tree != *full.Tree {
		t.Error("what another run had seen was taken for known")
	}
}

// TestAttributesOfEntriesBesideAChange: a group that is read again has the attributes of all its entries, also of those that
// are not asked for them because they are what they were.
func TestAttributesOfEntriesBesideAChange(t *testing.T) {
	s := newTinyStore(t)
	shard := filepath.Dir(s.nodePath(fileID))
	s.check(unix.Setxattr(s.nodePath(folderID), "user.x", []byte("kept"), 0))
	s.check(unix.Setxattr(shard, "user.x", []byte("to go"), 0))
	r, _ := newRepo(t)
	res, sn, _ := run(t, r, s.inst, capture.Options{Now: future})
	for i, change := range []func(){
		func() { s.replaceMeta(fileID, meta(blobID, content, "user.oc.a", "1")...) },
		func() { s.replaceMeta(fileID, meta(blobID, content, "user.oc.a", "2")...) },
		func() { s.check(unix.Removexattr(shard, "user.x")) },
		func() { s.check(unix.Setxattr(filepath.Dir(shard), "user.y", nil, 0)) },
		func() { s.check(unix.Setxattr(s.nodePath(folderID), "user.x", []byte("put in"), 0)) },
		func() { s.check(unix.Setxattr(s.nodePath(folderID), "user.z", nil, 0)) },
		func() {
			s.replaceMeta(fileID, meta(blobID, content, "user.oc.a", "3")...)
			s.check(unix.Setxattr(s.nodePath(fileID)+".mpk", "user.m", nil, 0))
		},
		func() { s.check(unix.Removexattr(filepath.Dir(shard), "user.y")) },
	} {
		s.tick()
		change()
		next, inc, _ := run(t, r, s.inst, capture.Options{Cache: reload(t, res.Cache), Now: future})
		_, full, _ := run(t, r, s.inst, capture.Options{Now: future})
		if *inc.Tree == *sn.Tree {
			t.Errorf("%d: the change was not seen", i)
		}
		if *inc.Tree != *full.Tree {
			t.Errorf("%d: the incremental capture gives another tree than the full one", i)
		}
		res, sn = next, inc
	}
}
