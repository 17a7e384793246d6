package capture_test

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/fssnap/fssnaptest"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/storegen"
)

// onBtrfs makes temporary directories of the test lie in a subvolume of a new btrfs. The returned function
// makes a view of it, and says where a path is there.
func onBtrfs(t *testing.T) (view func() func(path string) string) {
	t.Helper()
	mnt, err := os.MkdirTemp("", "btrfs") // not t.TempDir, which keeps to where it was first
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(mnt) })
	image := filepath.Join(mnt, "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 512<<20)); err != nil {
		t.Fatal(err)
	}
	dev := fssnaptest.Attach(t, image)
	if err := os.Remove(image); err != nil { // the device has it
		t.Fatal(err)
	}
	fssnaptest.Tool(t, "mkfs.btrfs", "-q", dev)
	fssnaptest.MountAt(t, dev, mnt, "btrfs", "")
	sub, n := filepath.Join(mnt, "tmp"), 0
	fssnaptest.Tool(t, "btrfs", "subvolume", "create", sub)
	t.Setenv("TMPDIR", sub)
	return func() func(string) string {
		snap := func(n int) string { return filepath.Join(mnt, fmt.Sprintf("view%d", n)) }
		if n > 0 {
			fssnaptest.Tool(t, "btrfs", "subvolume", "delete", snap(n))
		}
		n++
		fssnaptest.Tool(t, "btrfs", "subvolume", "snapshot", "-r", sub, snap(n))
		return func(path string) string {
			if rel, ok := strings.CutPrefix(path, sub+"/"); ok {
				return filepath.Join(snap(n), rel)
			}
			return path
		}
	}
}

// reload writes the cache down and reads it again, as the next process does.
func reload(t *testing.T, c *capture.Cache) *capture.Cache {
	t.Helper()
	path := filepath.Join(t.TempDir(), "cache")
	if err := c.Save(path); err != nil {
		t.Fatal(err)
	}
	c, err := capture.LoadCache(path)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestEachChangeIsListed: what is seen by looking is seen by the list of the file system as well.
func TestEachChangeIsListed(t *testing.T) {
	view := onBtrfs(t)
	for _, c := range eachChange {
		for _, viewed := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, view=%v", c.name, viewed), func(t *testing.T) {
				s := newTinyStore(t)
				s.put(s.path("data/storage/users/indexes/by-type/project.mpk"), "\x81\xa1a\xa1b")
				r, _ := newRepo(t)
				o := capture.Options{Now: future}
				picture := func() {
					if viewed {
						o.View, o.PictureAt = view(), future()
					}
				}
				picture()
				first, sn, _ := run(t, r, s.inst, o)
				if first.Stats.EntriesTaken != 0 {
					t.Fatalf("the first capture took %d entries over", first.Stats.EntriesTaken)
				}
				o.Cache = reload(t, first.Cache)
				if !viewed { // reading has changed times of access
					first, _, _ = run(t, r, s.inst, o)
					o.Cache = reload(t, first.Cache)
				}
				picture()
				same, again, _ := run(t, r, s.inst, o)
				if *again.Tree != *sn.Tree || same.Stats.Entries != first.Stats.Entries || same.Stats.EntriesTaken < 20 {
					t.Fatalf("unchanged: %v, was %v; %d entries, were %d; %d not looked at",
						*again.Tree, *sn.Tree, same.Stats.Entries, first.Stats.Entries, same.Stats.EntriesTaken)
				}
				c.change(s)
				o.Cache = reload(t, same.Cache)
				picture()
				_, inc, _ := run(t, r, s.inst, o)
				if *inc.Tree == *sn.Tree {
					t.Error("the change was not seen")
				}
				o.Cache = nil
				_, full, _ := run(t, r, s.inst, o)
				if *inc.Tree != *full.Tree {
					t.Error("the incremental capture gives another tree than the full one")
				}
			})
		}
	}
}

// TestListedEqualsFull: after random changes, a capture that looks only at what the file system lists gives the
// same tree as one that reads everything.
func TestListedEqualsFull(t *testing.T) {
	for _, viewed := range []bool{false, true} {
		t.Run(fmt.Sprintf("view=%v", viewed), func(t *testing.T) {
			view := onBtrfs(t)
			dir, inst := generated(t, storegen.Options{Seed: 5, Files: 400, Bytes: 1 << 20, Spaces: 6})
			r, _ := newRepo(t)
			o := capture.Options{Now: future}
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			rng := rand.New(rand.NewPCG(seed, 2))
			var last *capture.Result
			taken := 0
			for round := range uint64(16) {
				switch {
				case round == 0:
				case round < 4:
					if _, err := storegen.Mutate(t.Context(), dir, round, 0.02); err != nil {
						t.Fatal(err)
					}
				default:
					vandalize(t, rng, filepath.Join(dir, "data/storage/users"), 1+rng.IntN(25), true)
				}
				if viewed {
					o.View, o.PictureAt = view(), future()
				}
				if last != nil {
					o.Cache = reload(t, last.Cache)
				}
				got, inc, _ := run(t, r, inst, o)
				f := o
				f.Cache, f.FullScan = nil, true
				want, full, st := run(t, r, inst, f)
				if *inc.Tree != *full.Tree {
					t.Fatalf("round %d: the capture by the list gives another tree than the full one", round)
				}
				if st.NewBlobs != [2]int64{} {
					t.Errorf("round %d: the full capture stored %v more blobs", round, st.NewBlobs)
				}
				if got.Stats.Entries != want.Stats.Entries || want.Stats.EntriesTaken != 0 {
					t.Errorf("round %d: %d entries, and %d by the full capture, which took %d over",
						round, got.Stats.Entries, want.Stats.Entries, want.Stats.EntriesTaken)
				}
				if got.Stats.EntriesTaken > 1000 {
					taken++
				}
				last = got
				if round%5 == 4 {
					last = want // a full capture is as good to begin at
				}
			}
			if taken < 12 {
				t.Errorf("the list was of use in %d rounds", taken)
			}
		})
	}
}

// TestListedEqualsFullPosix is the same for the posix driver, whose spaces are taken over as a whole or not at all.
func TestListedEqualsFullPosix(t *testing.T) {
	for _, viewed := range []bool{false, true} {
		t.Run(fmt.Sprintf("view=%v", viewed), func(t *testing.T) {
			view := onBtrfs(t)
			p := newPx(t)
			spaces := p.path("data/storage/users/projects")
			for i := range 12 {
				id := fmt.Sprintf("space%d", i)
				q := &px{p.tinyStore, filepath.Join(spaces, id)}
				p.check(os.Mkdir(q.root, 0o700))
				q.attr("", "id", id, "space.id", id, "space.alias", "project/"+id, "space.type", "project", "type", "2")
				for k := range 10 {
					q.pfile(fmt.Sprintf("f%d/g/file%d", k%3, k), fmt.Sprintf("%s-%d", id, k), fmt.Sprintf("%s-blob%d", id, k), fmt.Sprint(id, k))
				}
			}
			r, _ := newRepo(t)
			o := capture.Options{Now: future}
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			rng := rand.New(rand.NewPCG(seed, 3))
			taken := 0
			for round := range 14 {
				if round == 3 { // through a memory map, without a change of time
					f, err := os.OpenFile(filepath.Join(spaces, "space1/f0/g/file3"), os.O_RDWR, 0)
					p.check(err)
					m, err := unix.Mmap(int(f.Fd()), 0, 4, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
					p.check(err)
					m[0] = 'X'
					p.check(errors.Join(unix.Munmap(m), f.Close()))
				} else if round > 3 {
					vandalize(t, rng, p.path("data/storage/users"), 1+rng.IntN(6), true)
				}
				if viewed {
					o.View, o.PictureAt = view(), future()
				}
				got, inc, _ := run(t, r, p.inst, o)
				want, full, _ := run(t, r, p.inst, capture.Options{Now: future, FullScan: true, View: o.View, PictureAt: o.PictureAt})
				if *inc.Tree != *full.Tree {
					t.Fatalf("round %d: the capture by the list gives another tree than the full one", round)
				}
				if a, b := got.Stats, want.Stats; a.Entries != b.Entries || a.Files != b.Files || a.Bytes != b.Bytes || b.EntriesTaken != 0 {
					t.Errorf("round %d: %+v, and %+v by the full capture", round, a, b)
				}
				if got.Stats.EntriesTaken > 50 {
					taken++
				}
				o.Cache = reload(t, got.Cache)
			}
			if taken < 8 {
				t.Errorf("the list was of use in %d rounds", taken)
			}
		})
	}
}

// vandalize makes n random changes below dir: also such as no server makes.
func vandalize(t *testing.T, rng *rand.Rand, dir string, n int, inPlace bool) {
	t.Helper()
	var dirs, files []string
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (strings.Contains(path, "/spaces/") || strings.Contains(path, "/projects/")):
			dirs = append(dirs, path)
		case d.Type().IsRegular() && !strings.HasSuffix(path, ".mlock"): // whose mode is nobody's concern
			files = append(files, path)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for range n {
		d, f := dirs[rng.IntN(len(dirs))], files[rng.IntN(len(files))]
		d2, name := dirs[rng.IntN(len(dirs))], filepath.Join(d, fmt.Sprintf("n%d", rng.IntN(9)))
		// Some of these cannot be done; what can is enough.
		op := rng.IntN(13)
		if !inPlace && (op == 1 || op == 6 || op == 8 || op == 9) {
			op = 0
		}
		switch op {
		case 0:
			_ = os.WriteFile(name, []byte(name), 0o600)
		case 1:
			if !strings.Contains(f, "/blobs/") {
				_ = os.WriteFile(f, []byte{0x80}, 0o600)
			}
		case 2:
			_ = os.Rename(f, name)
		case 3:
			_ = os.Rename(d2, name)
		case 4, 5: // the shards look alike
			_ = unix.Renameat2(unix.AT_FDCWD, d, unix.AT_FDCWD, d2, unix.RENAME_EXCHANGE)
		case 6:
			_ = os.Link(f, name)
		case 7:
			_ = os.Remove(f)
		case 8:
			_ = unix.Setxattr(f, "user.x", []byte(name), 0)
		case 9:
			_ = os.Chmod(f, os.FileMode(0o600+rng.IntN(8)))
		case 10:
			_ = os.Mkdir(name, 0o700)
		case 11:
			_ = os.Symlink("../../../../../aa/bb/cc/dd/-x", name)
		case 12:
			if strings.Count(d, "/") > strings.Count(dir, "/")+6 {
				_ = os.RemoveAll(d)
			}
		}
	}
}

// TestListedButPruned: what the file system calls unchanged is read again if the repository has lost it.
func TestListedButPruned(t *testing.T) {
	onBtrfs(t)
	_, inst := generated(t, storegen.Options{Seed: 7, Files: 60, Bytes: 1 << 18, Spaces: 3})
	r, _ := newRepo(t)
	first, _, _ := run(t, r, inst, capture.Options{Now: future})
	other, _ := newRepo(t)
	res, sn, _ := run(t, other, inst, capture.Options{Now: future, Cache: reload(t, first.Cache)})
	if !res.Manifest.Proof.Complete {
		t.Error(res.Manifest.Proof)
	}
	_, full, st := run(t, other, inst, capture.Options{Now: future, FullScan: true})
	if *full.Tree != *sn.Tree || st.NewBlobs != [2]int64{} {
		t.Errorf("the tree is %v, not %v; %v blobs were missing", *sn.Tree, *full.Tree, st.NewBlobs)
	}
}

// TestTarsPruned: the users' trees of a space are still there, but not the tar of the snapshot that the cache is of,
// since that was forgotten. What is unchanged is read again then, whether it was looked at or listed.
func TestTarsPruned(t *testing.T) {
	for _, listed := range []bool{false, true} {
		t.Run(fmt.Sprintf("listed=%v", listed), func(t *testing.T) {
			if listed {
				onBtrfs(t)
			}
			s := newTinyStore(t)
			r, _ := newRepo(t)
			other, _ := newRepo(t) // never had the second snapshot
			run(t, other, s.inst, capture.Options{Now: future, FullScan: true})
			s.put(s.nodePath(fileID)+".lock", `{"expiration":"1"}`) // no user sees it
			run(t, r, s.inst, capture.Options{Now: future})         // sets times of access
			second, sn, _ := run(t, r, s.inst, capture.Options{Now: future})
			res, inc, _ := run(t, other, s.inst, capture.Options{Now: future, Cache: reload(t, second.Cache)})
			_, full, st := run(t, other, s.inst, capture.Options{Now: future, FullScan: true})
			if *inc.Tree != *sn.Tree || *full.Tree != *sn.Tree || st.NewBlobs != [2]int64{} || !res.Manifest.Proof.Complete {
				t.Errorf("the trees are %v and %v, not %v; %v blobs were missing", *inc.Tree, *full.Tree, *sn.Tree, st.NewBlobs)
			}
		})
	}
}

// TestFoldersChangePlaces: what lies in a folder that came to the place of another one is listed as little as what
// lay there before, though it is something else.
func TestFoldersChangePlaces(t *testing.T) {
	onBtrfs(t)
	s := newTinyStore(t)
	a, b := s.space("nodes/aa"), s.space("nodes/zz")
	s.put(filepath.Join(a, "in/side/file"), "1")
	s.put(filepath.Join(b, "in/side/file"), "22")
	r, _ := newRepo(t)
	run(t, r, s.inst, capture.Options{Now: future}) // sets times of access
	first, sn, _ := run(t, r, s.inst, capture.Options{Now: future})
	s.check(unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE))
	res, inc, _ := run(t, r, s.inst, capture.Options{Now: future, Cache: reload(t, first.Cache)})
	_, full, _ := run(t, r, s.inst, capture.Options{Now: future, FullScan: true})
	if *inc.Tree != *full.Tree || *inc.Tree == *sn.Tree || res.Stats.EntriesTaken == 0 {
		t.Errorf("the tree is %v, not %v; before it was %v; %d entries were taken over", *inc.Tree, *full.Tree, *sn.Tree, res.Stats.EntriesTaken)
	}
}

// TestNothingIsMissedBeforeAList: where there was no list for once, and a quick look saw no change in place, the
// capture that the next list begins at sees it.
func TestNothingIsMissedBeforeAList(t *testing.T) {
	onBtrfs(t)
	s := newTinyStore(t)
	s.mkdir("data/storage/users/uploads")
	r, _ := newRepo(t)
	first, _, _ := run(t, r, s.inst, capture.Options{Now: future})
	s.check(os.Chmod(s.blob(blobID), 0o640))
	nested := s.path("data/storage/users/uploads/nested")
	fssnaptest.Tool(t, "btrfs", "subvolume", "create", nested)
	second, _, _ := run(t, r, s.inst, capture.Options{Now: future, Cache: reload(t, first.Cache)})
	fssnaptest.Tool(t, "btrfs", "subvolume", "delete", nested)
	third, inc, _ := run(t, r, s.inst, capture.Options{Now: future, Cache: reload(t, second.Cache)})
	_, full, _ := run(t, r, s.inst, capture.Options{Now: future, FullScan: true})
	if *inc.Tree != *full.Tree {
		t.Error("the change is not seen")
	}
	again, inc, _ := run(t, r, s.inst, capture.Options{Now: future, Cache: reload(t, third.Cache)})
	if *inc.Tree != *full.Tree || again.Stats.EntriesTaken == 0 {
		t.Errorf("the change is lost; %d entries were taken over", again.Stats.EntriesTaken)
	}
}

// TestListedUnderOtherRules: a data set that is moved into a space is no part of it any more.
func TestListedUnderOtherRules(t *testing.T) {
	onBtrfs(t)
	s := newTinyStore(t)
	r, _ := newRepo(t)
	first, sn, _ := run(t, r, s.inst, capture.Options{Now: future})
	inst := *s.inst
	inst.DataSets = append(inst.DataSets[:len(inst.DataSets):len(inst.DataSets)],
		ocis.DataSet{Name: "within", Kind: ocis.System, Path: filepath.Dir(s.blob(blobID)), Class: ocis.Optional})
	_, inc, _ := run(t, r, &inst, capture.Options{Now: future, Cache: reload(t, first.Cache)})
	_, full, _ := run(t, r, &inst, capture.Options{Now: future, FullScan: true})
	if *inc.Tree != *full.Tree || *inc.Tree == *sn.Tree {
		t.Errorf("the tree is %v, not %v; before it was %v", *inc.Tree, *full.Tree, *sn.Tree)
	}
}
