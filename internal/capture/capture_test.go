package capture_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/storegen"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
	"github.com/holdfast-backup/holdfast/internal/verify"
)

// fixtures are the sample instances with local blobs.
var fixtures = []string{"ocis-posix", "opencloud-posix", "opencloud-posixfs"}

// generated makes an instance of OpenCloud in a directory of its own.
func generated(t *testing.T, o storegen.Options) (dir string, inst *ocis.Instance) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "gen")
	o.Dir = dir
	if _, err := storegen.Generate(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	return dir, instanceOf(dir, "opencloud-posix")
}

// instanceOf describes a fixture without discover.
func instanceOf(dir, name string) *ocis.Instance {
	data, config := filepath.Join(dir, "data"), filepath.Join(dir, "config")
	inst := &ocis.Instance{Product: ocis.OpenCloud, Version: "1.0.0", Setup: "posix", BasePath: data, ConfigDir: config}
	set := func(name string, kind ocis.Kind, path, store string) {
		_, err := os.Lstat(path)
		inst.DataSets = append(inst.DataSets, ocis.DataSet{Name: name, Kind: kind, Path: path, Store: store, Class: ocis.Required, Found: err == nil})
	}
	set("config", ocis.Config, config, "")
	for _, n := range []string{"idm", "nats", "proxy", "search"} {
		set(n, ocis.System, filepath.Join(data, n), "")
	}
	set("ocm", ocis.System, filepath.Join(data, "storage/ocm"), "")
	set("base", ocis.System, data, "")
	users, system := filepath.Join(data, "storage/users"), filepath.Join(data, "storage/metadata")
	st := ocis.Store{Name: "users", Root: users, Driver: "decomposed", Layout: ocis.Decomposed, Prefix: "user.oc."}
	switch name {
	case "ocis-posix":
		st.Driver, st.Prefix = "ocis", "user.ocis."
	case "opencloud-posixfs":
		st.Driver, st.Layout = "posix", ocis.Posix
	}
	inst.Stores = []ocis.Store{st, {Name: "system", Root: system, Driver: "decomposed", Layout: ocis.Decomposed, Prefix: "user.oc."}}
	set("storage-users", ocis.Metadata, users, "users")
	set("storage-users-blobs", ocis.Blobs, users, "users")
	set("storage-system", ocis.Metadata, system, "system")
	set("storage-system-blobs", ocis.Blobs, system, "system")
	return inst
}

// newRepo makes a repository with the password "pw" in a directory of its own.
func newRepo(t testing.TB) (*repo.Repository, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "repo")
	r, err := repo.Init(t.Context(), local.New(dir), "pw", repo.InitOptions{KDF: repo.KDF{N: 1024, R: 8, P: 1}})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	return r, dir
}

// run captures inst and commits a snapshot.
func run(t testing.TB, r *repo.Repository, inst *ocis.Instance, o capture.Options) (*capture.Result, *snapshot.Snapshot, repo.WriterStats) {
	t.Helper()
	ctx := t.Context()
	w := r.NewWriter(ctx)
	o.Instance = inst
	res, err := capture.Run(ctx, r, w, o)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := res.Finish(ctx, []byte("readme\n"))
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	sn := &snapshot.Snapshot{Time: time.Now(), Tree: &tree, Paths: []string{inst.BasePath}, Hostname: "test", Tags: []string{snapshot.Tag}}
	if err := snapshot.Save(ctx, r, sn); err != nil {
		t.Fatal(err)
	}
	res.Cache.Snapshot = sn.ID()
	return res, sn, w.Stats()
}

func restic(t testing.TB, dir string, args ...string) string {
	t.Helper()
	cmd := exec.Command("restic", append([]string{"-r", dir, "--no-cache"}, args...)...)
	cmd.Env = append(os.Environ(), "RESTIC_PASSWORD=pw")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("restic %s: %v\n%s%s", strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out)
}

func TestFixturesAreCompleteAndResticAgrees(t *testing.T) {
	for _, name := range fixtures {
		t.Run(name, func(t *testing.T) {
			inst := instanceOf(testfixture.Unpack(t, name), name)
			r, dir := newRepo(t)
			res, _, _ := run(t, r, inst, capture.Options{})
			p := res.Manifest.Proof
			if !p.Complete || len(p.Missing) > 0 || len(p.Unreadable) > 0 {
				b, _ := json.MarshalIndent(p, "", " ")
				t.Fatalf("not complete: %s", b)
			}
			if p.Verified == 0 || p.Verified > p.Blobs || p.Nodes == 0 || p.Revisions == 0 || p.TrashItems == 0 {
				t.Errorf("proof counts too little: %+v", p)
			}
			restic(t, dir, "check", "--read-data")
			rep, err := verify.Run(t.Context(), r, verify.Options{ReadData: true})
			if err != nil {
				t.Fatal(err)
			}
			if len(rep.Errors) > 0 || len(rep.Snapshots) != 1 || !rep.Snapshots[0].Complete {
				t.Errorf("check finds %q, %+v", rep.Errors, rep.Snapshots)
			}
			if q := rep.Snapshots[0].Proof; q.Blobs != p.Blobs && name != "opencloud-posixfs" {
				t.Errorf("check counts %d blobs, the proof %d", q.Blobs, p.Blobs)
			}
		})
	}
}

func TestSecondCaptureReadsNothingAndGivesTheSameTree(t *testing.T) {
	for _, name := range fixtures {
		t.Run(name, func(t *testing.T) {
			inst := instanceOf(testfixture.Unpack(t, name), name)
			r, _ := newRepo(t)
			// The clock is ahead, so that what was just unpacked does not count as just changed.
			ahead := func() time.Time { return time.Now().Add(time.Hour) }
			first, sn, _ := run(t, r, inst, capture.Options{Now: ahead})
			want := *sn.Tree
			for _, c := range []struct {
				what string
				o    capture.Options
				read bool
			}{
				{"with cache", capture.Options{Cache: first.Cache}, false},
				{"with the cache of a snapshot that is gone", capture.Options{Cache: first.Cache}, false},
				{"without cache", capture.Options{}, true},
				{"with nothing", capture.Options{}, true},
				{"full scan", capture.Options{Cache: first.Cache, FullScan: true}, true},
				{"one worker", capture.Options{Limits: capture.Limits{Workers: 1, Compressors: 1, Spaces: 1, Ahead: 1}}, true},
			} {
				c.o.Now = ahead
				res, again, st := run(t, r, inst, c.o)
				if *again.Tree != want {
					t.Errorf("%s: another tree", c.what)
				}
				if n := st.NewBlobs[0] + st.NewBlobs[1]; n != 0 {
					t.Errorf("%s: %d new blobs", c.what, n)
				}
				if !c.read && res.Stats.BytesRead != 0 {
					t.Errorf("%s: %d bytes were read", c.what, res.Stats.BytesRead)
				}
				if res.Stats.Files != first.Stats.Files || res.Stats.Bytes != first.Stats.Bytes {
					t.Errorf("%s: counts %+v, first %+v", c.what, res.Stats, first.Stats)
				}
			}
		})
	}
}

// TestKnownBlobsAreNotReadWithoutCache: the trees of the last snapshot tell as much as the cache about
// what was stored.
func TestKnownBlobsAreNotReadWithoutCache(t *testing.T) {
	for _, name := range fixtures {
		inst := instanceOf(testfixture.Unpack(t, name), name)
		r, _ := newRepo(t)
		first, sn, _ := run(t, r, inst, capture.Options{Now: future})
		known, err := capture.LoadKnown(t.Context(), r, sn, nil)
		if err != nil {
			t.Fatal(err)
		}
		res, again, _ := run(t, r, inst, capture.Options{Known: known, Now: future})
		if *again.Tree != *sn.Tree {
			t.Errorf("%s: another tree", name)
		}
		blobs := first.Manifest.Proof.Bytes
		if saved := first.Stats.BytesRead - res.Stats.BytesRead; saved < blobs*9/10 {
			t.Errorf("%s: only %d bytes less were read, of %d bytes of blobs", name, saved, blobs)
		}
	}
}

func TestCacheSurvivesTheDisk(t *testing.T) {
	inst := instanceOf(testfixture.Unpack(t, "ocis-posix"), "ocis-posix")
	r, _ := newRepo(t)
	ahead := func() time.Time { return time.Now().Add(time.Hour) }
	first, sn, _ := run(t, r, inst, capture.Options{Now: ahead})
	file := filepath.Join(t.TempDir(), "a", "cache")
	if err := first.Cache.Save(file); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("cache is %v, %v", st.Mode(), err)
	}
	c, err := capture.LoadCache(file)
	if err != nil {
		t.Fatal(err)
	}
	res, again, st := run(t, r, inst, capture.Options{Cache: c, Now: ahead})
	if *again.Tree != *sn.Tree || res.Stats.BytesRead != 0 || st.NewBlobs != [2]int64{} {
		t.Errorf("tree same: %v, read %d bytes, new %v", *again.Tree == *sn.Tree, res.Stats.BytesRead, st.NewBlobs)
	}
	p, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range [][]byte{nil, p[:len(p)/2], append(bytes.Clone(p), 0), flip(p, len(p)/3)} {
		if err := os.WriteFile(file, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := capture.LoadCache(file)
		if err == nil || c == nil {
			t.Errorf("a damaged cache of %d bytes gives %v, %v", len(bad), c, err)
			continue
		}
		if _, again, _ := run(t, r, inst, capture.Options{Cache: c, Now: ahead}); *again.Tree != *sn.Tree {
			t.Error("another tree with a damaged cache")
		}
	}
}

// TestDamagedSpacesOfTheCache: what is wrong with the file of the spaces costs time and nothing else.
func TestDamagedSpacesOfTheCache(t *testing.T) {
	inst := instanceOf(testfixture.Unpack(t, "ocis-posix"), "ocis-posix")
	r, _ := newRepo(t)
	first, sn, _ := run(t, r, inst, capture.Options{Now: future})
	file := filepath.Join(t.TempDir(), "[a]", "cache")
	if err := first.Cache.Save(file); err != nil {
		t.Fatal(err)
	}
	name := shelves(t, file, 1)[0]
	p, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	write := func(p []byte) func() error { return func() error { return os.WriteFile(name, p, 0o600) } }
	for what, spoil := range map[string]func() error{
		"empty": write(nil), "half": write(p[:len(p)/2]), "a bit": write(flip(p, len(p)/3)), "other bytes": write(make([]byte, len(p))),
		"longer": write(append(bytes.Clone(p), p...)), "gone": func() error { return os.Remove(name) },
	} {
		if err := write(p)(); err != nil {
			t.Fatal(err)
		}
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		c, err := capture.LoadCache(file)
		if err != nil {
			t.Fatal(err)
		}
		res, again, _ := run(t, r, inst, capture.Options{Cache: c, Now: future})
		if *again.Tree != *sn.Tree {
			t.Errorf("%s: another tree", what)
		}
		if read := res.Stats.BytesRead > 0; read == (what == "longer") {
			t.Errorf("%s: %d bytes were read", what, res.Stats.BytesRead)
		}
		c.Close()
		res.Cache.Close()
	}
}

// shelves returns the files of spaces of the cache at path, of which there must be n.
func shelves(t *testing.T, path string, n int) []string {
	t.Helper()
	all, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range all {
		if strings.HasPrefix(e.Name(), filepath.Base(path)+".spaces-") {
			names = append(names, filepath.Join(filepath.Dir(path), e.Name()))
			if st, err := e.Info(); err != nil || st.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v, %v", e.Name(), st.Mode(), err)
			}
		}
	}
	if len(names) != n {
		t.Fatalf("there are %d files of spaces, not %d: %q", len(names), n, names)
	}
	return names
}

// TestCacheIsWrittenWhereItChanged: a backup of what is unchanged writes no space again; what an interrupted
// run left goes; and two runs at once do not disturb each other.
func TestCacheIsWrittenWhereItChanged(t *testing.T) {
	dir, inst := generated(t, storegen.Options{Seed: 9, Files: 400, Bytes: 1 << 20, Spaces: 4})
	r, _ := newRepo(t)
	file := filepath.Join(t.TempDir(), "cache")
	next := func(before *capture.Cache, save bool) (*capture.Cache, *capture.Result, *snapshot.Snapshot) {
		t.Helper()
		res, sn, _ := run(t, r, inst, capture.Options{Cache: before, Now: future})
		if save {
			if err := res.Cache.Save(file); err != nil {
				t.Fatal(err)
			}
		}
		res.Cache.Close()
		before.Close()
		c, err := capture.LoadCache(file)
		if err != nil {
			t.Fatal(err)
		}
		return c, res, sn
	}
	size := func() int64 {
		t.Helper()
		st, err := os.Stat(shelves(t, file, 1)[0])
		if err != nil {
			t.Fatal(err)
		}
		return st.Size()
	}
	c, err := capture.LoadCache(file)
	if err != nil {
		t.Fatal(err)
	}
	c, first, _ := next(c, true)
	whole := size()
	c, _, _ = next(c, true)
	if now := size(); now != whole {
		t.Errorf("the spaces took %d bytes and take %d", whole, now)
	}
	mutate := func(round uint64) {
		t.Helper()
		if _, err := storegen.Mutate(t.Context(), dir, round, 0.01); err != nil {
			t.Fatal(err)
		}
	}
	mutate(1)
	c, _, _ = next(c, false) // interrupted: what it wrote is not in the index
	mutate(2)
	c, res, inc := next(c, true)
	if res.Stats.BytesRead > first.Stats.BytesRead/2 {
		t.Errorf("%d bytes were read after an interrupted run, %d the first time", res.Stats.BytesRead, first.Stats.BytesRead)
	}
	if _, full, _ := run(t, r, inst, capture.Options{Now: future}); *full.Tree != *inc.Tree {
		t.Error("another tree after an interrupted run")
	}
	mutate(3)
	other, err := capture.LoadCache(file) // while c is in use
	if err != nil {
		t.Fatal(err)
	}
	_, _, _ = next(other, true)
	c, _, inc = next(c, true)
	if _, full, _ := run(t, r, inst, capture.Options{Now: future}); *full.Tree != *inc.Tree {
		t.Error("another tree with two runs at once")
	}
	c, _, last := next(c, true)
	if *last.Tree != *inc.Tree {
		t.Error("another tree after two runs at once")
	}
	size() // and one file is left
	c.Close()
}

func flip(p []byte, i int) []byte {
	p = bytes.Clone(p)
	p[i] ^= 0x40
	return p
}
