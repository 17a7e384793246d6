package inplace_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/consistency"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/restore/inplace"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

const alan = "b1f74ec4-dd7e-11ef-a543-03775734d0f7"

// world is a fixture, a snapshot of it, and a copy of it to damage.
type world struct {
	t    *testing.T
	dir  string // the original
	r    *repo.Repository
	tree id.ID
	m    *snapshot.Manifest
	// before is what the check finds in the original.
	before map[string]bool
}

func newWorld(t *testing.T) *world {
	t.Helper()
	ctx := t.Context()
	w := &world{t: t, dir: testfixture.Unpack(t, testfixture.OCIS)}
	r, err := repo.Init(ctx, mem.New(), "pw", repo.InitOptions{KDF: repo.KDF{N: 1024, R: 1, P: 1}})
	if err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(w.dir, "data")
	inst := &ocis.Instance{Product: ocis.OpenCloud, Setup: "posix", BasePath: data, ConfigDir: filepath.Join(w.dir, "config"), Stores: []ocis.Store{
		{Name: "users", Root: filepath.Join(data, "storage/users"), Driver: "ocis", Layout: ocis.Decomposed, Prefix: ocis.PrefixOCIS},
		{Name: "system", Root: filepath.Join(data, "storage/metadata"), Driver: "decomposed", Layout: ocis.Decomposed, Prefix: ocis.PrefixOpenCloud},
	}}
	for _, s := range inst.Stores {
		for _, kind := range []ocis.Kind{ocis.Metadata, ocis.Blobs} {
			inst.DataSets = append(inst.DataSets, ocis.DataSet{Name: "storage-" + s.Name + "-" + string(kind), Kind: kind, Path: s.Root, Store: s.Name, Found: true})
		}
	}
	rw := r.NewWriter(ctx)
	res, err := capture.Run(ctx, r, rw, capture.Options{Instance: inst})
	if err != nil {
		t.Fatal(err)
	}
	if w.tree, err = res.Finish(ctx, []byte("readme\n")); err != nil {
		t.Fatal(err)
	}
	if err := rw.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	w.r, w.m = r, &res.Manifest
	return w
}

// scene is a copy of the fixture that a case damages.
type scene struct {
	*world
	t    *testing.T
	data string
}

func (w *world) scene(t *testing.T) *scene {
	t.Helper()
	s := &scene{world: w, t: t, data: filepath.Join(t.TempDir(), "data")}
	if out, err := exec.Command("cp", "-a", filepath.Join(w.dir, "data"), s.data).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return s
}

// reset makes alan's space what it was.
func (s *scene) reset() {
	s.t.Helper()
	old, err := filepath.Glob(filepath.Join(s.users(), ".holdfast-*"))
	s.must(err)
	for _, p := range append(old, s.space()) {
		s.must(os.RemoveAll(p))
	}
	if out, err := exec.Command("cp", "-a", filepath.Join(s.dir, "data/storage/users", ocis.SpacePath(alan)), s.space()).CombinedOutput(); err != nil {
		s.t.Fatalf("%v: %s", err, out)
	}
}

func (s *scene) users() string  { return filepath.Join(s.data, "storage/users") }
func (s *scene) system() string { return filepath.Join(s.data, "storage/metadata") }
func (s *scene) space() string  { return filepath.Join(s.users(), ocis.SpacePath(alan)) }
func (s *scene) node(key string) string {
	return filepath.Join(s.space(), "nodes", ocis.NodePath(key))
}

// find is the id of a path in alan's space, in the original.
func (s *scene) find(p string) string {
	s.t.Helper()
	node := alan
	for _, name := range strings.Split(p, "/") {
		target, err := os.Readlink(filepath.Join(s.dir, "data/storage/users", ocis.SpacePath(alan), "nodes", ocis.NodePath(node), name))
		if err != nil {
			s.t.Fatal(err)
		}
		node = strings.ReplaceAll(strings.TrimPrefix(target, "../../../../../"), "/", "")
	}
	return node
}

func (s *scene) attr(key, name string) string {
	s.t.Helper()
	p, err := os.ReadFile(s.node(key) + ".mpk")
	if err != nil {
		s.t.Fatal(err)
	}
	a, err := ocis.ParseMPK(p)
	if err != nil {
		s.t.Fatal(err)
	}
	return a.Text(name)
}

func (s *scene) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *scene) target(node, key string) inplace.Target {
	st := s.m.Stores[0]
	for _, sp := range st.Spaces {
		if sp.ID == alan {
			return inplace.Target{Space: sp, Store: st, Node: node, Key: key}
		}
	}
	s.t.Fatal("no such space")
	return inplace.Target{}
}

func (s *scene) run(node, key string) (*inplace.Result, error) {
	o := inplace.Options{Root: s.users(), System: s.system(), Now: time.Date(2026, 11, 26, 12, 0, 0, 5, time.UTC)}
	for i := range s.m.Stores {
		if s.m.Stores[i].Name == "system" {
			o.SystemStore = &s.m.Stores[i]
		}
	}
	return inplace.Run(s.t.Context(), s.r, s.tree, s.target(node, key), o)
}

// check runs the consistency check and returns the findings that the original has not.
func (s *scene) check() []string {
	s.t.Helper()
	of := func(data string) []string {
		var list []consistency.Store
		for _, x := range []struct{ name, root, prefix string }{{"users", "users", ocis.PrefixOCIS}, {"system", "metadata", ocis.PrefixOpenCloud}} {
			d, err := consistency.OpenDir(filepath.Join(data, "storage", x.root), string(ocis.Decomposed), x.prefix)
			s.must(err)
			defer d.Close()
			list = append(list, consistency.Store{Name: x.name, Place: d, Layout: string(ocis.Decomposed), Prefix: x.prefix})
		}
		var out []string
		_, err := consistency.Run(s.t.Context(), list, consistency.Options{ReadData: true, Found: func(f consistency.Finding) error {
			out = append(out, strings.Join([]string{string(f.Severity), string(f.Class), f.Node, f.Path, f.Blob}, " "))
			return nil
		}})
		s.must(err)
		return out
	}
	if s.before == nil {
		s.world.before = map[string]bool{}
		for _, f := range of(filepath.Join(s.dir, "data")) {
			s.before[f] = true
		}
	}
	var out []string
	for _, f := range of(s.data) {
		if !s.before[f] {
			out = append(out, f)
		}
	}
	return out
}

// equal compares the store with the original: all of it, but the times of folders, and the metadata of
// those that were changed as the server changes them.
func (s *scene) equal(changed ...string) {
	s.t.Helper()
	skip := map[string]bool{}
	for _, key := range changed {
		skip[ocis.SpacePath(alan)+"/nodes/"+ocis.NodePath(key)+".mpk"] = true
	}
	for _, x := range []string{"users", "metadata"} {
		diffs, err := testfixture.DiffOptions(filepath.Join(s.dir, "data/storage", x), filepath.Join(s.data, "storage", x), testfixture.Options{
			Ignore: func(p string) bool { return skip[p] || strings.HasPrefix(p, ".holdfast-2") },
		})
		s.must(err)
		for _, d := range diffs {
			p, what, _ := strings.Cut(d, "\": ")
			fi, err := os.Lstat(filepath.Join(s.dir, "data/storage", x, strings.TrimPrefix(p, "\"")))
			if err == nil && fi.IsDir() && strings.HasPrefix(what, "mtime ") {
				continue
			}
			s.t.Errorf("%s: %s", x, d)
		}
	}
}

func (s *scene) clean() {
	s.t.Helper()
	for _, f := range s.check() {
		s.t.Error("found: ", f)
	}
	if _, err := os.Lstat(filepath.Join(s.users(), inplace.JournalDir)); !os.IsNotExist(err) {
		s.t.Error("the journal was left")
	}
}

// purge removes a file as the server does when its trash is emptied, sizes above included.
func (s *scene) purge(p string) (node string, above []string) {
	s.t.Helper()
	node = s.find(p)
	parent := s.attr(node, "parentid")
	list, err := filepath.Glob(s.node(node) + "*")
	s.must(err)
	size := 0
	for _, f := range list {
		if strings.HasSuffix(f, ".mpk") {
			data, err := os.ReadFile(f)
			s.must(err)
			m, err := ocis.ParseNode(ocis.PrefixOCIS, data)
			s.must(err)
			if m.BlobID != "" {
				_ = os.Remove(filepath.Join(s.space(), "blobs", ocis.NodePath(m.BlobID)))
			}
			if !strings.Contains(f, ".REV.") {
				size = int(m.BlobSize)
			}
		}
		if !strings.HasSuffix(f, ".mlock") {
			s.must(os.Remove(f))
		}
	}
	s.must(os.Remove(filepath.Join(s.node(parent), filepath.Base(p))))
	for up := parent; ; {
		above = append(above, up)
		s.grow(up, -size)
		if up == alan {
			return node, above
		}
		up = s.attr(up, "parentid")
	}
}

// grow adds to the size of a folder.
func (s *scene) grow(key string, by int) {
	s.t.Helper()
	p, err := os.ReadFile(s.node(key) + ".mpk")
	s.must(err)
	a, err := ocis.ParseMPK(p)
	s.must(err)
	n := 0
	for _, c := range a.Text("treesize") {
		n = 10*n + int(c-'0')
	}
	a.Set(ocis.PrefixOCIS, "treesize", []byte(itoa(n+by)))
	s.must(os.WriteFile(s.node(key)+".mpk", ocis.EncodeMPK(a), 0o600))
}

func itoa(n int) string {
	if n < 10 {
		return string(rune('0' + n))
	}
	return itoa(n/10) + string(rune('0'+n%10))
}

func (s *scene) sizesAsBefore(keys []string) {
	s.t.Helper()
	for _, k := range keys {
		p, err := os.ReadFile(filepath.Join(s.dir, "data/storage/users", ocis.SpacePath(alan), "nodes", ocis.NodePath(k)+".mpk"))
		s.must(err)
		a, err := ocis.ParseMPK(p)
		s.must(err)
		if got := s.attr(k, "treesize"); got != a.Text("treesize") {
			s.t.Errorf("folder %s has the size %s, not %s", k, got, a.Text("treesize"))
		}
		if got := s.attr(k, "tmtime"); got != "2026-11-26T12:00:00.000000005Z" {
			s.t.Errorf("folder %s has the time %s", k, got)
		}
	}
}

func TestInPlace(t *testing.T) {
	w := newWorld(t)
	t.Run("one file with its versions", func(t *testing.T) {
		s := w.scene(t)
		node, above := s.purge("Round 0/versioned.txt")
		res, err := s.run(node, node)
		s.must(err)
		if res.Nodes != 1 || res.Revisions != 3 && res.Revisions != 4 || len(res.Moved) > 0 {
			t.Errorf("%+v", res)
		}
		s.clean()
		s.equal(above...)
		s.sizesAsBefore(above)
		if again, err := s.run(node, node); err != nil || again.Blobs > 0 || len(again.Moved) > 1 {
			t.Errorf("the second time: %+v, %v", again, err)
		}
		s.clean()
	})
	t.Run("a damaged node", func(t *testing.T) {
		s := w.scene(t)
		node := s.find("Round 0/dup1.bin")
		s.must(os.WriteFile(s.node(node)+".mpk", nil, 0o600))
		res, err := s.run(node, node)
		s.must(err)
		if len(res.Moved) == 0 || res.Aside == "" {
			t.Errorf("%+v", res)
		}
		s.clean()
		s.equal(s.find("Round 0"), alan)
	})
	t.Run("a damaged blob", func(t *testing.T) {
		s := w.scene(t)
		node := s.find("Round 0/dup1.bin")
		s.must(os.WriteFile(filepath.Join(s.space(), "blobs", ocis.NodePath(s.attr(node, "blobid"))), []byte("bad"), 0o644))
		_, err := s.run(node, node)
		s.must(err)
		s.clean()
		s.equal(s.find("Round 0"), alan)
	})
	t.Run("one version", func(t *testing.T) {
		s := w.scene(t)
		node := s.find("Round 0/versioned.txt")
		list, err := filepath.Glob(s.node(node) + ".REV.*Z")
		s.must(err)
		key := node + strings.TrimPrefix(list[0], s.node(node))
		s.must(os.Remove(filepath.Join(s.space(), "blobs", ocis.NodePath(s.attr(key, "blobid")))))
		s.must(os.Remove(list[0]))
		s.must(os.Remove(list[0] + ".mpk"))
		res, err := s.run(node, key)
		s.must(err)
		if res.Revisions != 1 || res.Nodes != 0 || res.Blobs != 1 {
			t.Errorf("%+v", res)
		}
		s.clean()
		s.equal()
	})
	t.Run("a folder whose parent is gone, too", func(t *testing.T) {
		s := w.scene(t)
		// Round 0/a with all that is in it, and the link to it.
		folder := s.find("Round 0/a")
		for _, p := range []string{"Round 0/a/b/файл-5.bin", "Round 0/a/b/файл-3.bin", "Round 0/a/copied.bin"} {
			s.purge(p)
		}
		inner := s.find("Round 0/a/b")
		for _, k := range []string{inner, folder} {
			s.must(os.RemoveAll(s.node(k)))
			s.must(os.Remove(s.node(k) + ".mpk"))
		}
		s.must(os.Remove(filepath.Join(s.node(s.find("Round 0")), "a")))
		file := s.find("Round 0/a/b/файл-5.bin")
		res, err := s.run(file, file)
		s.must(err)
		if len(res.Parents) != 2 {
			t.Errorf("%+v", res)
		}
		if got := s.attr(folder, "treesize"); got != s.attr(file, "blobsize") {
			t.Errorf("the folder has the size %s", got)
		}
		s.clean()
		if _, err := s.run(folder, folder); err != nil {
			t.Fatal(err)
		}
		s.clean()
		s.equal(s.find("Round 0"), alan)
	})
	t.Run("a trashed item", func(t *testing.T) {
		s := w.scene(t)
		links, err := filepath.Glob(filepath.Join(s.space(), "trash/*/*/*/*/*"))
		s.must(err)
		for _, l := range links {
			target, err := os.Readlink(l)
			s.must(err)
			key := strings.ReplaceAll(strings.TrimPrefix(target, "../../../../../nodes/"), "/", "")
			node, _, _ := strings.Cut(key, ".T.")
			for _, b := range []string{s.attr(key, "blobid")} {
				if b != "" {
					s.must(os.Remove(filepath.Join(s.space(), "blobs", ocis.NodePath(b))))
				}
			}
			s.must(os.RemoveAll(s.node(key)))
			s.must(os.Remove(s.node(key) + ".mpk"))
			s.must(os.Remove(l))
			_, err = s.run(node, key)
			s.must(err)
		}
		s.clean()
		s.equal()
	})
	t.Run("a purged space", func(t *testing.T) {
		s := w.scene(t)
		s.must(os.RemoveAll(s.space()))
		for _, name := range []string{"by-type/personal", "by-user-id/" + alan} {
			p := filepath.Join(s.users(), "indexes", name+".mpk")
			data, err := os.ReadFile(p)
			s.must(err)
			list, err := ocis.ParseIndex(data)
			s.must(err)
			var kept []ocis.IndexEntry
			for _, e := range list {
				if e.SpaceID != alan {
					kept = append(kept, e)
				}
			}
			s.must(os.WriteFile(p, ocis.EncodeIndex(kept), 0o600))
		}
		res, err := s.run("", "")
		s.must(err)
		if len(res.Indexes) != 2 || res.Nodes == 0 || len(res.Moved) > 0 {
			t.Errorf("%+v", res)
		}
		s.clean()
		// The entries came back, at the end of their files.
		for _, name := range []string{"by-type/personal", "by-user-id/" + alan} {
			p, q := filepath.Join(s.users(), "indexes", name+".mpk"), filepath.Join(s.dir, "data/storage/users/indexes", name+".mpk")
			a, err := os.ReadFile(p)
			s.must(err)
			b, err := os.ReadFile(q)
			s.must(err)
			if len(a) != len(b) {
				t.Errorf("index %s has %d bytes, not %d", name, len(a), len(b))
			}
			s.must(os.WriteFile(p, b, 0o600))
			fi, err := os.Stat(q)
			s.must(err)
			s.must(os.Chtimes(p, fi.ModTime(), fi.ModTime()))
		}
		s.equal()
	})
	t.Run("a space over a newer one", func(t *testing.T) {
		s := w.scene(t)
		node := s.find("Round 0/dup1.bin")
		s.must(os.WriteFile(s.node(node)+".mpk", nil, 0o600))
		res, err := s.run("", "")
		s.must(err)
		if len(res.Moved) != 1 || res.Moved[0] != s.space() {
			t.Errorf("%+v", res)
		}
		s.clean()
		s.equal()
	})
	t.Run("another file has the name", func(t *testing.T) {
		s := w.scene(t)
		node, _ := s.purge("Round 0/dup1.bin")
		// renamed.bin is now called dup1.bin.
		other := s.find("Round 0/renamed.bin")
		dir := s.node(s.find("Round 0"))
		s.must(os.Rename(filepath.Join(dir, "renamed.bin"), filepath.Join(dir, "dup1.bin")))
		p, err := os.ReadFile(s.node(other) + ".mpk")
		s.must(err)
		a, err := ocis.ParseMPK(p)
		s.must(err)
		a.Set(ocis.PrefixOCIS, "name", []byte("dup1.bin"))
		s.must(os.WriteFile(s.node(other)+".mpk", ocis.EncodeMPK(a), 0o600))
		res, err := s.run(node, node)
		s.must(err)
		if len(res.Trashed) != 1 || res.Trashed[0] != "Round 0/dup1.bin" {
			t.Errorf("%+v", res)
		}
		s.clean()
	})
	t.Run("moved and changed meanwhile", func(t *testing.T) {
		s := w.scene(t)
		node := s.find("Round 0/dup1.bin")
		from, to := s.find("Round 0"), s.find("Round 1")
		s.must(os.Rename(filepath.Join(s.node(from), "dup1.bin"), filepath.Join(s.node(to), "elsewhere.bin")))
		p, err := os.ReadFile(s.node(node) + ".mpk")
		s.must(err)
		a, err := ocis.ParseMPK(p)
		s.must(err)
		a.Set(ocis.PrefixOCIS, "name", []byte("elsewhere.bin"))
		a.Set(ocis.PrefixOCIS, "parentid", []byte(to))
		s.must(os.WriteFile(s.node(node)+".mpk", ocis.EncodeMPK(a), 0o600))
		s.grow(from, -60000)
		s.grow(to, 60000)
		_, err = s.run(node, node)
		s.must(err)
		s.clean()
		s.equal(from, to, alan)
	})
	t.Run("refused", func(t *testing.T) {
		s := w.scene(t)
		if _, err := s.run("nosuch-node-0000", "nosuch-node-0000"); !errors.Is(err, inplace.ErrNotInSnapshot) {
			t.Error(err)
		}
		if _, err := s.run("........x", "........x"); !errors.Is(err, inplace.ErrNotInSnapshot) {
			t.Error(err)
		}
		node := s.find("Round 0/dup1.bin")
		s.must(os.RemoveAll(s.space()))
		if _, err := s.run(node, node); !errors.Is(err, inplace.ErrNoSpace) {
			t.Error(err)
		}
	})
}

// TestKilled: wherever the process ends, nothing is damaged, and the next run finishes.
func TestKilled(t *testing.T) {
	defer inplace.SetStep(func() {})
	w := newWorld(t)
	for _, what := range []string{"file", "damaged", "space"} {
		t.Run(what, func(t *testing.T) {
			s := w.scene(t)
			begin := func() (node string) {
				s.reset()
				switch what {
				case "file":
					node, _ = s.purge("Round 0/versioned.txt")
				case "damaged":
					node = s.find("Round 0/versioned.txt")
					s.must(os.WriteFile(s.node(node)+".mpk", nil, 0o600))
				}
				return node
			}
			kill := func(node string, at int) (killed bool) {
				n := 0
				inplace.SetStep(func() {
					if n++; n == at {
						panic("killed")
					}
				})
				defer inplace.SetStep(func() {})
				defer func() {
					if recover() != nil {
						killed = true
					}
				}()
				_, err := s.run(node, node)
				s.must(err)
				return false
			}
			every := 5
			if what == "space" {
				every = 300
			}
			for at := 1; ; at += every {
				node := begin()
				killed := kill(node, at)
				if killed && what != "damaged" {
					for _, f := range s.check() {
						if strings.HasPrefix(f, "damage ") {
							t.Errorf("at step %d: %s", at, f)
						}
					}
				}
				if killed {
					if _, err := s.run(node, node); err != nil {
						t.Fatalf("at step %d: %v", at, err)
					}
				}
				for _, f := range s.check() {
					if !strings.HasPrefix(f, "note ") {
						t.Errorf("at step %d: %s", at, f)
					}
				}
				if _, err := os.Lstat(filepath.Join(s.users(), inplace.JournalDir)); !os.IsNotExist(err) {
					t.Errorf("at step %d: the journal was left", at)
				}
				if !killed {
					break
				}
			}
		})
	}
}
