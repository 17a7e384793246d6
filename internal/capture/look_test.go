package capture_test

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/storegen"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// replaceMeta writes metadata as the server does: beside it, and then by a rename.
func (s *tinyStore) replaceMeta(key string, attrs ...string) {
	s.t.Helper()
	var a ocis.Attributes
	for i := 0; i < len(attrs); i += 2 {
		a = append(a, ocis.Attribute{Key: attrs[i], Value: []byte(attrs[i+1])})
	}
	p := s.nodePath(key) + ".mpk"
	tmp := filepath.Join(filepath.Dir(p), "."+filepath.Base(p)+"123")
	s.put(tmp, string(ocis.EncodeMPK(a)))
	s.check(os.Rename(tmp, p))
}

// tick waits until the file system's clock has moved on. A backup believes times that are older than a
// second, and these tests tell it that everything is; so no two changes may bear the same time.
func (s *tinyStore) tick() {
	s.t.Helper()
	p := filepath.Join(s.dir, "tick")
	now := func() time.Time {
		s.put(p, "")
		st, err := os.Stat(p)
		s.check(err)
		return st.ModTime()
	}
	for first := now(); !now().After(first); {
	}
	s.remove(p)
}

// meta are the attributes of a file with the content data in blob.
func meta(blob, data string, more ...string) []string {
	return append([]string{"user.oc.type", "1", "user.oc.name", "file.txt", "user.oc.parentid", folderID, "user.oc.id", fileID,
		"user.oc.blobid", blob, "user.oc.blobsize", itoa(len(data)), "user.oc.cs.sha1", sha1Of(data)}, more...)
}

const (
	blob2   = "55555555-aaaa-4bbb-8ccc-000000000005"
	blob3   = "66666666-aaaa-4bbb-8ccc-000000000006"
	rev1    = fileID + ".REV.2026-01-01T00:00:00.000000001Z"
	rev2    = fileID + ".REV.2026-01-02T00:00:00.000000002Z"
	trashed = fileID + ".T.2026-01-03T00:00:00.000000003Z"
	content = "hello world\n" // of blobID
)

func (s *tinyStore) blob(id string) string { return s.space("blobs/" + ocis.NodePath(id)) }

// upload puts the bytes of a session where the server keeps them, and finalize moves them to their place.
func (s *tinyStore) upload(id, data string) {
	s.t.Helper()
	s.put(s.path("data/storage/users/uploads/"+id), data)
}

// copyBlob is what it does where uploads/ lies on another file system.
func (s *tinyStore) copyBlob(id, data string) {
	s.t.Helper()
	s.check(os.MkdirAll(filepath.Dir(s.blob(id)), 0o700))
	f, err := os.OpenFile(s.blob(id), os.O_CREATE|os.O_WRONLY, 0o700)
	s.check(err)
	_, err = f.WriteString(data)
	s.check(err)
	s.check(f.Close())
}

func (s *tinyStore) finalize(id string) {
	s.t.Helper()
	s.check(os.MkdirAll(filepath.Dir(s.blob(id)), 0o700))
	s.check(os.Rename(s.path("data/storage/users/uploads/"+id), s.blob(id)))
}

// overwrite is an upload to the file: its former content becomes a revision.
func (s *tinyStore) overwrite(rev, oldBlob, oldData, blob, data string) {
	s.t.Helper()
	s.node(rev, false, "user.oc.type", "1", "user.oc.blobid", oldBlob, "user.oc.blobsize", itoa(len(oldData)), "user.oc.cs.sha1", sha1Of(oldData))
	s.upload(blob, data)
	s.replaceMeta(fileID, meta(blob, data)...)
	s.finalize(blob)
}

func (s *tinyStore) trash() {
	s.t.Helper()
	s.replaceMeta(fileID, meta(blobID, content, "user.oc.trash.origin", "/folder/file.txt")...)
	s.check(os.Rename(s.nodePath(fileID), s.nodePath(trashed)))
	s.check(os.Rename(s.nodePath(fileID)+".mpk", s.nodePath(trashed)+".mpk"))
	s.check(os.Remove(filepath.Join(s.nodePath(folderID), "file.txt")))
	link := s.space("trash/" + ocis.NodePath(fileID))
	s.check(os.MkdirAll(filepath.Dir(link), 0o700))
	s.check(os.Symlink("../../../../../nodes/"+ocis.NodePath(trashed), link))
}

func (s *tinyStore) remove(paths ...string) {
	s.t.Helper()
	for _, p := range paths {
		s.check(os.Remove(p))
	}
}

// TestWhatTheServerDoesIsSeen: each way in which the server changes a space is seen by the next backup, although it
// does not look at files in unchanged directories. A backup is made after each step.
func TestWhatTheServerDoesIsSeen(t *testing.T) {
	type steps []func(s *tinyStore)
	overwrite := func(s *tinyStore) { s.overwrite(rev1, blobID, content, blob2, "second") }
	for name, todo := range map[string]steps{
		"upload": {func(s *tinyStore) {
			s.file("77777777-aaaa-4bbb-8ccc-000000000007", folderID, "new", blob3, "new file")
		}},
		"overwrite": {overwrite, func(s *tinyStore) { s.overwrite(rev2, blob2, "second", blob3, "third one") }},
		"overwrite without versions": {func(s *tinyStore) {
			s.upload(blob2, "second")
			s.replaceMeta(fileID, meta(blob2, "second")...)
			s.finalize(blob2)
		}},
		"postprocessing, and a kill between the two steps of its end": {func(s *tinyStore) {
			s.upload(blob2, "second")
			s.replaceMeta(fileID, meta(blob2, "second", "user.oc.nodestatus", "processing:"+blob2)...)
		}, func(s *tinyStore) {
			s.finalize(blob2)
		}, func(s *tinyStore) {
			s.replaceMeta(fileID, meta(blob2, "second")...)
		}},
		"upload aborted": {func(s *tinyStore) {
			s.node(rev1, false, meta(blobID, content)...)
			s.upload(blob2, "second")
			s.replaceMeta(fileID, meta(blob2, "second", "user.oc.nodestatus", "processing:"+blob2)...)
		}, func(s *tinyStore) {
			s.replaceMeta(fileID, meta(blobID, content)...)
			s.remove(s.nodePath(rev1), s.nodePath(rev1)+".mpk", s.path("data/storage/users/uploads/"+blob2))
		}},
		"upload rolled back after its blob was stored": {overwrite, func(s *tinyStore) {
			s.replaceMeta(fileID, meta(blobID, content)...)
			s.remove(s.nodePath(rev1), s.nodePath(rev1)+".mpk", s.blob(blob2))
		}},
		"blob that is copied over, and completed in place": {func(s *tinyStore) {
			s.replaceMeta(fileID, meta(blob2, "second")...)
			s.copyBlob(blob2, "sec")
		}, func(s *tinyStore) {
			s.copyBlob(blob2, "second")
		}},
		"blob with another's bytes, replaced in place": {func(s *tinyStore) {
			s.replaceMeta(fileID, meta(blob2, "second")...)
			s.copyBlob(blob2, "sEcond")
		}, func(s *tinyStore) {
			s.copyBlob(blob2, "second")
		}},
		"orphan": {func(s *tinyStore) { s.copyBlob(blob2, "sec") }, func(s *tinyStore) { s.copyBlob(blob2, "second") }, func(s *tinyStore) { s.remove(s.blob(blob2)) }},
		"version restored": {overwrite, func(s *tinyStore) {
			s.node(rev2, false, meta(blob2, "second")...)
			s.replaceMeta(fileID, meta(blobID, content)...)
		}, func(s *tinyStore) {
			s.remove(s.nodePath(rev1), s.nodePath(rev1)+".mpk")
		}},
		"place of a revision used again": {overwrite, func(s *tinyStore) {
			s.replaceMeta(rev1, meta(blob2, "second")...)
			s.upload(blob3, "third one")
			s.replaceMeta(fileID, meta(blob3, "third one")...)
			s.finalize(blob3)
			s.remove(s.blob(blobID))
		}},
		"revision purged": {overwrite, func(s *tinyStore) {
			s.remove(s.nodePath(rev1), s.nodePath(rev1)+".mpk", s.blob(blobID))
		}},
		"revision purged together with the blob of the file": {func(s *tinyStore) {
			s.node(rev1, false, meta(blobID, content)...)
		}, func(s *tinyStore) {
			s.remove(s.nodePath(rev1), s.nodePath(rev1)+".mpk", s.blob(blobID))
		}},
		"trash": {(*tinyStore).trash, func(s *tinyStore) {
			s.remove(s.nodePath(trashed), s.nodePath(trashed)+".mpk", s.blob(blobID), s.space("trash/"+ocis.NodePath(fileID)))
		}},
		"purge that was killed before the blob": {(*tinyStore).trash, func(s *tinyStore) {
			s.remove(s.nodePath(trashed), s.nodePath(trashed)+".mpk")
		}, func(s *tinyStore) {
			s.remove(s.blob(blobID))
		}},
		"purge that was killed after the blob": {(*tinyStore).trash, func(s *tinyStore) {
			s.remove(s.nodePath(trashed)+".mpk", s.blob(blobID))
		}},
		"space disabled, and a purge of it that was killed": {func(s *tinyStore) {
			s.replaceMeta(spaceID, "user.oc.space.id", spaceID, "user.oc.space.alias", "project/one", "user.oc.dtime", "2026-01-01T00:00:00Z")
		}, func(s *tinyStore) {
			s.remove(s.blob(blobID))
		}},
		"space purged": {func(s *tinyStore) { s.check(os.RemoveAll(s.space(""))) }},
		"lock": {func(s *tinyStore) {
			s.put(s.nodePath(fileID)+".lock", `{"expiration":"1"}`)
		}, func(s *tinyStore) {
			s.put(s.nodePath(fileID)+".lock", `{"expiration":"2"}`)
		}},
		"folder": {func(s *tinyStore) {
			s.node("88888888-aaaa-4bbb-8ccc-000000000008", true, "user.oc.type", "2", "user.oc.name", "sub")
			s.link(folderID, "sub", "88888888-aaaa-4bbb-8ccc-000000000008")
		}},
		"propagation": {func(s *tinyStore) {
			s.replaceMeta(folderID, "user.oc.type", "2", "user.oc.name", "folder", "user.oc.tmtime", "2026-05-01T00:00:00Z")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newTinyStore(t)
			s.put(s.path("data/storage/users/uploads/x.info"), "{}")
			r, _ := newRepo(t)
			last, sn, _ := run(t, r, s.inst, capture.Options{Now: future})
			for i, step := range todo {
				s.tick()
				step(s)
				next, inc, _ := run(t, r, s.inst, capture.Options{Cache: last.Cache, Now: future})
				_, full, _ := run(t, r, s.inst, capture.Options{Now: future})
				if *inc.Tree == *sn.Tree {
					t.Errorf("step %d was not seen", i)
				}
				if *inc.Tree != *full.Tree {
					t.Errorf("step %d: the incremental capture gives another tree than the full one", i)
				}
				last, sn = next, inc
			}
		})
	}
}

// TestFilesSettle: the server is not yet done with a file when its name is there: a revision gets its time a
// moment later. So what lies in a directory that had just changed is looked at again.
func TestFilesSettle(t *testing.T) {
	s := newTinyStore(t)
	s.node(rev1, false, meta(blobID, content)...)
	r, _ := newRepo(t)
	st, err := os.Stat(filepath.Dir(s.nodePath(rev1)))
	s.check(err)
	clock := func(d time.Duration) func() time.Time { return func() time.Time { return st.ModTime().Add(d) } }
	first, sn, _ := run(t, r, s.inst, capture.Options{Now: clock(10 * time.Second)})
	s.check(os.Chtimes(s.nodePath(rev1), time.Time{}, time.Unix(1e9, 0)))
	_, inc, _ := run(t, r, s.inst, capture.Options{Cache: first.Cache, Now: clock(time.Hour)})
	if *inc.Tree == *sn.Tree {
		t.Error("the time of the revision was not seen")
	}
	_, full, _ := run(t, r, s.inst, capture.Options{Now: clock(time.Hour)})
	if *inc.Tree != *full.Tree {
		t.Error("the incremental capture gives another tree than the full one")
	}
}

// TestAttributesChangedInPlace: what oCIS 2 changes in place is seen, since nothing is believed of such a space.
func TestAttributesChangedInPlace(t *testing.T) {
	s := newTinyStore(t)
	for _, id := range []string{spaceID, folderID, fileID} {
		s.remove(s.nodePath(id) + ".mpk")
	}
	r, _ := newRepo(t)
	first, sn, _ := run(t, r, s.inst, capture.Options{Now: future})
	s.tick()
	s.check(os.Chmod(s.nodePath(fileID), 0o640)) // as an attribute does, it changes the time of the file alone
	_, inc, _ := run(t, r, s.inst, capture.Options{Cache: first.Cache, Now: future})
	if *inc.Tree == *sn.Tree {
		t.Error("the change was not seen")
	}
}

// TestLargeSpaceIsSharedOut: the same is found where several goroutines look at one space.
func TestLargeSpaceIsSharedOut(t *testing.T) {
	dir, inst := generated(t, storegen.Options{Seed: 8, Files: 2500, Bytes: 1 << 20, Spaces: 1})
	r, _ := newRepo(t)
	res, sn, _ := run(t, r, inst, capture.Options{Now: future})
	again, same, _ := run(t, r, inst, capture.Options{Cache: res.Cache, Now: future})
	if *same.Tree != *sn.Tree || again.Stats.DirsListed > res.Stats.DirsListed/10 {
		t.Errorf("unchanged: %d of %d directories were listed", again.Stats.DirsListed, res.Stats.DirsListed)
	}
	for round := range uint64(3) {
		if _, err := storegen.Mutate(t.Context(), dir, round, 0.01); err != nil {
			t.Fatal(err)
		}
		next, inc, _ := run(t, r, inst, capture.Options{Cache: again.Cache, Now: future})
		if next.Stats.DirsListed > res.Stats.DirsListed/3 {
			t.Errorf("round %d: %d directories were listed for 1 %% of changes, %d the first time", round, next.Stats.DirsListed, res.Stats.DirsListed)
		}
		_, full, _ := run(t, r, inst, capture.Options{Now: future})
		if *inc.Tree != *full.Tree {
			t.Fatalf("round %d: the incremental capture gives another tree than the full one", round)
		}
		again = next
	}
}

// TestPassedOverEqualsFull: after random changes that touch directories, a capture that passes groups over gives the same tree as one
// that reads everything, and remembers the same.
func TestPassedOverEqualsFull(t *testing.T) {
	dir, inst := generated(t, storegen.Options{Seed: 9, Files: 1200, Bytes: 1 << 20, Spaces: 2})
	r, _ := newRepo(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 3))
	last, _, _ := run(t, r, inst, capture.Options{Now: future})
	passed, most := 0, last.Stats.Entries
	for round := range uint64(24) {
		switch {
		case round < 8: // what the server does, while the store is still one
			if _, err := storegen.Mutate(t.Context(), dir, round, 0.001); err != nil {
				t.Fatal(err)
			}
		case round == 23: // so much that groups are where they were nowhere
			vandalize(t, rng, filepath.Join(dir, "data/storage/users"), 200, false)
		case round%2 == 0:
			vandalize(t, rng, filepath.Join(dir, "data/storage/users"), 1+rng.IntN(4), false)
		default:
			for range 1 + rng.IntN(3) {
				changeFirst(rng, filepath.Join(dir, "data/storage/users"), capture.Firsts(last.Cache))
			}
		}
		got, inc, _ := run(t, r, inst, capture.Options{Now: future, Cache: reload(t, last.Cache)})
		want, full, st := run(t, r, inst, capture.Options{Now: future, FullScan: true})
		if *inc.Tree != *full.Tree {
			t.Fatalf("round %d: the capture that passes over gives another tree than the full one", round)
		}
		if st.NewBlobs != [2]int64{} {
			t.Errorf("round %d: the full capture stored %v more blobs", round, st.NewBlobs)
		}
		a, b := got.Stats, want.Stats
		a.BytesRead, a.DirsListed, a.EntriesPassed = b.BytesRead, b.DirsListed, 0
		if a != b {
			t.Errorf("round %d: %+v, and %+v by the full capture", round, got.Stats, b)
		}
		if got.Stats.EntriesPassed > most/4 {
			passed++
		}
		kept, all := capture.Remembered(got.Cache), capture.Remembered(want.Cache)
		for space := range all {
			if !slices.Equal(kept[space], all[space]) {
				t.Errorf("round %d: of space %s is remembered\n%q\nand by the full capture\n%q", round, space,
					without(kept[space], all[space]), without(all[space], kept[space]))
			}
		}
		// Nothing differs from it.
		again, same, _ := run(t, r, inst, capture.Options{Now: future, Cache: reload(t, got.Cache)})
		if *same.Tree != *full.Tree || again.Stats.DirsListed > 30 {
			t.Errorf("round %d: %d directories were listed although nothing had changed", round, again.Stats.DirsListed)
		}
		last = got
	}
	if passed < 12 {
		t.Errorf("much was passed over in %d rounds", passed)
	}

	// What a repository does not have cannot be passed over there.
	vandalize(t, rng, filepath.Join(dir, "data/storage/users"), 1, false)
	other, _ := newRepo(t)
	_, inc, _ := run(t, other, inst, capture.Options{Now: future, Cache: reload(t, last.Cache)})
	_, full, st := run(t, other, inst, capture.Options{Now: future, FullScan: true})
	if *inc.Tree != *full.Tree || st.NewBlobs != [2]int64{} {
		t.Errorf("in another repository the tree is %v, not %v, and %v blobs were missing", *inc.Tree, *full.Tree, st.NewBlobs)
	}
}

// changeFirst changes something about the first entry of a group, or beside it: that is where groups end.
func changeFirst(rng *rand.Rand, root string, firsts []string) {
	first := firsts[rng.IntN(len(firsts))]
	p := filepath.Join(root, first)
	if strings.Count(first, "/") < 5 { // not all of a space
		return
	}
	// Some of these cannot be done; what can is enough.
	switch rng.IntN(6) {
	case 0:
		_ = os.RemoveAll(p)
	case 1:
		_ = os.Rename(p, p+"z")
	case 2:
		_ = os.WriteFile(filepath.Join(filepath.Dir(p), "!"), nil, 0o600)
	case 3:
		_ = os.WriteFile(filepath.Join(p, "new"), nil, 0o600)
	case 4: // a file in the place of a directory
		_ = os.RemoveAll(p)
		_ = os.WriteFile(p, nil, 0o600)
	case 5: // and the other way round
		if os.Remove(p) == nil {
			_ = os.MkdirAll(p+"/a/b", 0o700)
		}
	}
}

// without returns what of a is not in b.
func without(a, b []string) (out []string) {
	for _, s := range a {
		if !slices.Contains(b, s) && len(out) < 5 {
			out = append(out, s)
		}
	}
	return out
}

// TestChangedAfterTheLook: what is changed between the look at a space and the walk is no error, and if that run does not see it the
// next one does.
func TestChangedAfterTheLook(t *testing.T) {
	dir, inst := generated(t, storegen.Options{Seed: 10, Files: 400, Bytes: 1 << 18, Spaces: 1})
	r, _ := newRepo(t)
	last, _, _ := run(t, r, inst, capture.Options{Now: future})
	spaces, err := filepath.Glob(filepath.Join(dir, "data/storage/users/spaces/*/*"))
	if err != nil || len(spaces) != 1 {
		t.Fatal(spaces, err)
	}
	at := func(p string) string { return filepath.Join(spaces[0], p) }
	shards, _ := filepath.Glob(at("nodes/*"))
	blobs, _ := filepath.Glob(at("blobs/*"))
	if len(shards) < 150 || len(blobs) < 100 {
		t.Fatal(len(shards), len(blobs))
	}
	put := func(p string) func() error { return func() error { return os.WriteFile(p, nil, 0o600) } }
	var mark string
	for i, change := range []func() error{
		put(at("aa")),
		put(at("zz")),
		put(at("nodes/zz")),
		put(at("blobs/zz")),
		put(at("blobs/!")),
		put(filepath.Join(shards[20], "zz")),
		func() error { return removeAll(shards[30:50]) },
		func() error { return removeAll(blobs[30:50]) },
		func() error { return os.Rename(blobs[60], blobs[60]+"x") },
		func() error { return removeAll(shards[len(shards)-40:]) },
		func() error { return removeAll(blobs[70:]) },
		func() error { // a folder that the look has named is gone, so that the one above it is read
			return errors.Join(os.RemoveAll(mark), put(shards[100]+"x")())
		},
		func() error { return os.Rename(at("nodes"), at("gone")) },
	} {
		// One change is seen by the look, so that there is something to do.
		mark = shards[5+i]
		if err := put(filepath.Join(mark, "new"))(); err != nil {
			t.Fatal(err)
		}
		called := false
		restore := capture.AfterLook(func() {
			if !called {
				called = true
				if err := change(); err != nil {
					t.Error(i, err)
				}
			}
		})
		got, seen, _ := run(t, r, inst, capture.Options{Now: future, Cache: reload(t, last.Cache)})
		restore()
		if !called {
			t.Errorf("change %d: the space was not looked at", i)
		}
		next, inc, _ := run(t, r, inst, capture.Options{Now: future, Cache: reload(t, got.Cache)})
		want, full, _ := run(t, r, inst, capture.Options{Now: future, FullScan: true})
		if top := i < 2 || i == 12; top && (*seen.Tree != *full.Tree || got.Stats.Entries != want.Stats.Entries) {
			t.Errorf("change %d, at the top: not walked again: %d entries, and %d by a full capture", i, got.Stats.Entries, want.Stats.Entries)
		}
		if *inc.Tree != *full.Tree {
			t.Errorf("change %d: the tree of the next run is not that of a full capture", i)
		}
		last = next
	}
}

// TestSpacesAreLookedAtTogether: more spaces are looked at than are read at once, and no more than their part of the memory allows.
func TestSpacesAreLookedAtTogether(t *testing.T) {
	dir, inst := generated(t, storegen.Options{Seed: 11, Files: 400, Bytes: 1 << 18, Spaces: 8})
	r, _ := newRepo(t)
	last, _, _ := run(t, r, inst, capture.Options{Now: future})
	if _, err := storegen.Mutate(t.Context(), dir, 1, 0.2); err != nil {
		t.Fatal(err)
	}
	// together runs a capture while none may be read, and returns how many looks were under way or done then.
	together := func(spaces int, look, want int64) int64 {
		var looks atomic.Int64
		defer capture.AfterLook(func() { looks.Add(1) })()
		c := capture.New(r, r.NewWriter(t.Context()), capture.Options{
			Instance: inst, Now: future, Cache: reload(t, last.Cache), Limits: capture.Limits{Spaces: spaces, Look: look},
		})
		release := capture.HoldReading(c)
		done := make(chan error, 1)
		go func() {
			done <- c.Read(t.Context(), capture.Part{Has: func(root string) bool { return root == inst.Stores[0].Root }})
		}()
		for begin := time.Now(); looks.Load() < want && time.Since(begin) < 10*time.Second; {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(50 * time.Millisecond) // for those that should not be
		n := looks.Load()
		select {
		case err := <-done:
			t.Errorf("read although it had to wait: %v", err)
			done <- err
		default:
		}
		release()
		if err := <-done; err != nil {
			t.Error(err)
		}
		return n
	}
	if n := together(1, 0, 8); n < 8 {
		t.Errorf("%d spaces were looked at while none could be read, want 8", n)
	}
	if n := together(1, 1, 1); n != 1 {
		t.Errorf("%d spaces were looked at at once, where one fills the memory for that", n)
	}
	if n := together(3, 3, 3); n != 3 {
		t.Errorf("%d large spaces were looked at at once, want as many as may be read", n)
	}
}

// TestPosixSpacesWait: spaces of the posix driver are read no more at once than is allowed.
func TestPosixSpacesWait(t *testing.T) {
	inst := instanceOf(testfixture.Unpack(t, "opencloud-posixfs"), "opencloud-posixfs")
	r, _ := newRepo(t)
	c := capture.New(r, r.NewWriter(t.Context()), capture.Options{Instance: inst, Now: future})
	release := capture.HoldReading(c)
	done := make(chan error, 1)
	go func() { done <- c.Read(t.Context(), capture.Part{}) }()
	select {
	case err := <-done:
		t.Fatalf("read although it had to wait: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	release()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func removeAll(paths []string) error {
	for _, p := range paths {
		if err := os.RemoveAll(p); err != nil {
			return err
		}
	}
	return nil
}
