package inplace_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/browse/browsetest"
	"github.com/holdfast-backup/holdfast/internal/bucket"
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
	inst *browsetest.Instance // the original
	dir  string               // where it is
	r    *repo.Repository
	tree id.ID
	m    *snapshot.Manifest
	pre  string // prefix of the attributes of the users' store
	// before is what the check finds in the original: with the system storage, and without.
	before [2]map[string]bool
}

func newWorld(t *testing.T, name string) *world {
	t.Helper()
	inst := browsetest.Unpack(t, name)
	inst.Trim(t)
	return worldOf(t, inst, snapshot.WayCopy)
}

func worldOf(t *testing.T, inst *browsetest.Instance, way string) *world {
	t.Helper()
	w := &world{inst: inst, dir: inst.Dir, r: browsetest.NewRepo(t), pre: inst.Store("users").Prefix}
	w.tree = *browsetest.BackupWay(t, w.r, inst, time.Now(), way).Tree
	var err error
	if w.m, err = snapshot.LoadManifest(t.Context(), w.r, w.tree); err != nil {
		t.Fatal(err)
	}
	return w
}

// scene is a copy of the fixture that a case damages.
type scene struct {
	*world
	t    *testing.T
	now  *browsetest.Instance
	data string
	dry  bool
	// whole makes the check look at the system storage, too.
	whole bool
}

func (w *world) scene(t *testing.T) *scene {
	t.Helper()
	s := &scene{world: w, t: t, now: w.inst.Copy(t)}
	s.data = filepath.Join(s.now.Dir, "data")
	return s
}

// blob is the file or the object of a blob of alan's.
func (s *scene) blob(id string) string {
	if s.now.Objects != "" {
		return filepath.Join(s.now.Objects, alan, ocis.NodePath(id))
	}
	return filepath.Join(s.space(), "blobs", ocis.NodePath(id))
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
	if s.now.Objects == "" {
		return
	}
	old, err = filepath.Glob(filepath.Join(s.now.Objects, "holdfast-aside-*"))
	s.must(err)
	for _, p := range append(old, filepath.Join(s.now.Objects, alan)) {
		s.must(os.RemoveAll(p))
	}
	s.must(os.CopyFS(filepath.Join(s.now.Objects, alan), os.DirFS(filepath.Join(s.inst.Objects, alan))))
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
		if sp.Alias == "personal/alan" {
			return inplace.Target{Space: sp, Store: st, Node: node, Key: key}
		}
	}
	s.t.Fatal("no such space")
	return inplace.Target{}
}

func (s *scene) run(node, key string) (*inplace.Result, error) {
	o := inplace.Options{Root: s.users(), System: s.system(), Now: time.Date(2026, 11, 26, 12, 0, 0, 5, time.UTC), DryRun: s.dry}
	for i := range s.m.Stores {
		if s.m.Stores[i].Name == "system" {
			o.SystemStore = &s.m.Stores[i]
		}
	}
	if b := s.now.Bucket(s.t); b != nil {
		o.Objects = &inplace.Objects{Dest: b}
		if s.m.Stores[0].Bucket.Way == snapshot.WayVersions {
			o.Objects.Source = b
		}
	}
	return inplace.Run(s.t.Context(), s.r, s.tree, s.target(node, key), o)
}

// check runs the consistency check and returns the findings that the original has not.
func (s *scene) check() []string {
	s.t.Helper()
	of := func(i *browsetest.Instance) []string {
		var list []consistency.Store
		for _, st := range i.Stores {
			if st.Name != "users" && (!s.whole || st.Name != "system") {
				continue
			}
			d, err := consistency.OpenDir(st.Root, string(st.Layout), st.Prefix)
			s.must(err)
			defer d.Close()
			c := consistency.Store{Name: st.Name, Place: d, Layout: string(st.Layout), Prefix: st.Prefix}
			if st.S3 != nil {
				c.Remote, c.Blobs = true, objectFiles{i.Objects}
			}
			list = append(list, c)
		}
		var out []string
		_, err := consistency.Run(s.t.Context(), list, consistency.Options{ReadData: true, Found: func(f consistency.Finding) error {
			out = append(out, strings.Join([]string{string(f.Severity), string(f.Class), f.Node, f.Path, f.Blob}, " "))
			return nil
		}})
		s.must(err)
		return out
	}
	before := &s.world.before[0]
	if s.whole {
		before = &s.world.before[1]
	}
	if *before == nil {
		*before = map[string]bool{}
		for _, f := range of(s.inst) {
			(*before)[f] = true
		}
	}
	var out []string
	for _, f := range of(s.now) {
		if !(*before)[f] {
			out = append(out, f)
		}
	}
	return out
}

// objectFiles reads a bucket as the files that its server has.
type objectFiles struct{ dir string }

func (b objectFiles) List(_ context.Context, space string, fn func(consistency.BlobInfo) error) error {
	top := filepath.Join(b.dir, space)
	err := filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		return fn(consistency.BlobInfo{ID: strings.ReplaceAll(strings.TrimPrefix(p, top), "/", ""), Size: fi.Size()})
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (b objectFiles) Others(context.Context, func(string) bool, func(consistency.OtherObjects) error) error {
	return nil
}

func (b objectFiles) Open(_ context.Context, space, blob string) (io.ReadCloser, error) {
	return os.Open(filepath.Join(b.dir, space, ocis.NodePath(blob)))
}

// spaceID is the id of alan's space, which is his own but for the posix driver.
func (s *scene) spaceID() string { return s.target("", "").Space.ID }

// equal compares the store with the original: all of it, but the times of folders, and the metadata of
// those that were changed as the server changes them.
func (s *scene) equal(changed ...string) {
	s.t.Helper()
	skip := map[string]bool{}
	for _, key := range changed {
		skip[ocis.SpacePath(alan)+"/nodes/"+ocis.NodePath(key)+".mpk"] = true
	}
	if s.now.Objects != "" {
		o := testfixture.Options{IgnoreTimes: true, IgnoreMode: true, IgnoreXattrs: true, Ignore: func(p string) bool {
			return strings.HasPrefix(p, "holdfast-aside-") || p == ".sgwtmp"
		}}
		diffs, err := testfixture.DiffOptions(s.inst.Objects, s.now.Objects, o)
		s.must(err)
		for _, d := range diffs {
			s.t.Error("bucket: ", d)
		}
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

// shareLists are the lists that speak of alan's shares: his own, what was received, what was made.
func (s *scene) shareLists() []string {
	s.t.Helper()
	names, err := os.ReadDir(s.inst.ShareNode("storages"))
	s.must(err)
	out := []string{"storages/" + names[0].Name() + "/" + alan + ".json"}
	users, err := os.ReadDir(s.inst.ShareNode("users"))
	s.must(err)
	for _, name := range []string{"received.json", "created.json"} {
		for _, u := range users {
			p := "users/" + u.Name() + "/" + name
			if strings.Contains(string(s.inst.ShareList(s.t, p)), ":"+alan) {
				out = append(out, p)
			}
		}
	}
	return out
}

// unindex removes a space from an index.
func (s *scene) unindex(name, id string) {
	s.t.Helper()
	p := filepath.Join(s.users(), "indexes", name+".mpk")
	data, err := os.ReadFile(p)
	s.must(err)
	list, err := ocis.ParseIndex(data)
	s.must(err)
	s.must(os.WriteFile(p, ocis.EncodeIndex(slices.DeleteFunc(list, func(e ocis.IndexEntry) bool { return e.SpaceID == id })), 0o600))
}

// sameIndex makes sure that the entry of a space is in the index again, at its end, and gives it back its order
// and time.
func (s *scene) sameIndex(name string) {
	s.t.Helper()
	p, q := filepath.Join(s.users(), "indexes", name+".mpk"), filepath.Join(s.dir, "data/storage/users/indexes", name+".mpk")
	a, err := os.ReadFile(p)
	s.must(err)
	b, err := os.ReadFile(q)
	s.must(err)
	if len(a) != len(b) {
		s.t.Errorf("index %s has %d bytes, not %d", name, len(a), len(b))
	}
	s.must(os.WriteFile(p, b, 0o600))
	fi, err := os.Stat(q)
	s.must(err)
	s.must(os.Chtimes(p, fi.ModTime(), fi.ModTime()))
}

// ownAs gives a file the owner of another one.
func (s *scene) ownAs(of, file string) {
	s.t.Helper()
	var st unix.Stat_t
	s.must(unix.Lstat(of, &st))
	s.must(os.Lchown(file, int(st.Uid), int(st.Gid)))
}

// kill ends a run before its change number at. It tells whether there were as many.
func (s *scene) kill(node string, at int) (killed bool) {
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
			m, err := ocis.ParseNode(s.pre, data)
			s.must(err)
			if m.BlobID != "" {
				_ = os.Remove(s.blob(m.BlobID))
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
	a.Set(s.pre, "treesize", []byte(itoa(n+by)))
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
	for _, name := range []string{testfixture.OCIS, testfixture.OCISWithS3Blobs} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inPlace(t, newWorld(t, name))
		})
	}
}

func inPlace(t *testing.T, w *world) {
	// nodes runs what has nothing to do with the place of the blobs.
	nodes := func(name string, fn func(t *testing.T)) {
		if w.inst.Objects == "" {
			t.Run(name, fn)
		}
	}
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
		for _, s.dry = range []bool{false, true} {
			if again, err := s.run(node, node); err != nil || again.Blobs+again.Nodes+again.Revisions > 0 || len(again.Moved) > 0 {
				t.Errorf("the second time (dry: %v): %+v, %v", s.dry, again, err)
			}
		}
		s.clean()
	})
	nodes("a damaged node", func(t *testing.T) {
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
		s.must(os.WriteFile(s.blob(s.attr(node, "blobid")), []byte("bad"), 0o644))
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
		s.must(os.Remove(s.blob(s.attr(key, "blobid"))))
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
	nodes("a folder whose parent is gone, too", func(t *testing.T) {
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
					s.must(os.Remove(s.blob(b)))
				}
			}
			s.must(os.RemoveAll(s.node(key)))
			s.must(os.Remove(s.node(key) + ".mpk"))
			s.must(os.Remove(l))
			_, err = s.run(node, key)
			s.must(err)
			if again, err := s.run(node, key); err != nil || len(again.Moved) > 0 {
				t.Errorf("the second time: %+v, %v", again, err)
			}
		}
		s.clean()
		s.equal()
	})
	t.Run("a purged space", func(t *testing.T) {
		s := w.scene(t)
		s.whole = true
		s.must(os.RemoveAll(s.space()))
		if s.now.Objects != "" {
			s.must(os.RemoveAll(filepath.Join(s.now.Objects, alan)))
		}
		for _, name := range []string{"by-type/personal", "by-user-id/" + alan} {
			s.unindex(name, alan)
		}
		res, err := s.run("", "")
		s.must(err)
		if len(res.Indexes) != 2 || res.Nodes == 0 || len(res.Moved) > 0 {
			t.Errorf("%+v", res)
		}
		s.clean()
		// The entries came back, at the end of their files.
		for _, name := range []string{"by-type/personal", "by-user-id/" + alan} {
			s.sameIndex(name)
		}
		s.equal()
	})
	nodes("the shares of a purged space", func(t *testing.T) {
		s := w.scene(t)
		s.whole = true
		lists := s.shareLists()
		if len(lists) != 3 {
			t.Fatalf("%q", lists)
		}
		// The records of the space are gone; those of another one, and members that nobody knows, stay.
		s.must(os.RemoveAll(s.space()))
		s.now.SetShareList(s.t, lists[0], `{"Shares":{}}`)
		s.now.SetShareList(s.t, lists[1], `{"Spaces":{"x:other":{"States":{"x:other:1":{"State":1}}}},"Odd":true}`)
		s.now.SetShareList(s.t, lists[2], `{"UserShares":null,"Etag":"\"new\""}`)
		if s.now.Objects != "" {
			s.must(os.RemoveAll(filepath.Join(s.now.Objects, alan)))
		}
		res, err := s.run("", "")
		s.must(err)
		if len(res.Shares) != 3 || len(res.Warnings) > 0 {
			t.Errorf("%+v", res)
		}
		for i, add := range []string{"", `"Odd":true`, `"Etag":"\"new\""`} {
			var got, want map[string]any
			s.must(json.Unmarshal(s.now.ShareList(s.t, lists[i]), &got))
			s.must(json.Unmarshal(s.inst.ShareList(s.t, lists[i]), &want))
			switch i {
			case 0:
				delete(want, "Etag") // of the list as a whole
			case 1:
				if other := got["Spaces"].(map[string]any); len(other) != 2 || got["Odd"] != true { //nolint:forcetypeassert // a test
					t.Errorf("%s: %v", add, got)
				}
				delete(got["Spaces"].(map[string]any), "x:other") //nolint:forcetypeassert // a test
				delete(got, "Odd")
			case 2:
				if got["Etag"] != `"new"` {
					t.Errorf("%s: %v", add, got)
				}
				got["Etag"] = want["Etag"]
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("%s: %v, want %v", lists[i], got, want)
			}
		}
		for _, f := range s.check() {
			if !strings.HasPrefix(f, "note blob-orphaned ") {
				t.Error("found: ", f)
			}
		}
		if res, err := s.run("", ""); err != nil || len(res.Shares) > 0 {
			t.Errorf("the second time: %+v, %v", res, err)
		}
		// A list that is gone comes back as it was.
		s = w.scene(t)
		s.whole = true
		file := s.now.ShareNode(lists[0])
		s.must(os.RemoveAll(s.space()))
		s.must(os.Remove(file))
		s.must(os.Remove(file + ".mpk"))
		s.must(os.Remove(filepath.Join(s.now.ShareNode(filepath.Dir(lists[0])), filepath.Base(lists[0]))))
		if res, err := s.run("", ""); err != nil || len(res.Shares) != 1 {
			t.Errorf("%+v, %v", res, err)
		}
		s.clean()
	})
	t.Run("links that nobody has made", func(t *testing.T) {
		for _, part := range []string{"nodes", "blobs"} {
			s := w.scene(t)
			if s.now.Objects != "" && part == "blobs" {
				continue
			}
			node := s.find("Round 0/dup1.bin")
			id := node
			if part == "blobs" {
				id = s.attr(node, "blobid")
			}
			dir, elsewhere := filepath.Join(s.space(), part, id[:2]), filepath.Join(s.users(), "elsewhere")
			s.must(os.RemoveAll(dir))
			s.must(os.Mkdir(elsewhere, 0o755))
			s.must(os.Symlink("../../../../elsewhere", dir))
			if _, err := s.run(node, node); !errors.Is(err, inplace.ErrPlanted) {
				t.Errorf("%s: %v", part, err)
			}
			if list, err := os.ReadDir(elsewhere); err != nil || len(list) > 0 {
				t.Errorf("%s: written through the link: %v, %v", part, list, err)
			}
		}
		// Where half of a space is removed before it is built anew.
		s := w.scene(t)
		kept := filepath.Join(s.users(), "uploads", alan)
		s.must(os.MkdirAll(kept, 0o755))
		s.must(os.Symlink("uploads", filepath.Join(s.users(), inplace.JournalDir)))
		if _, err := s.run("", ""); !errors.Is(err, inplace.ErrPlanted) {
			t.Error(err)
		}
		if _, err := os.Stat(kept); err != nil {
			t.Error(err)
		}
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
		if s.now.Objects == "" {
			return
		}
		// An object that is another one, and one that the snapshot does not have.
		blob, newer := s.blob(s.attr(node, "blobid")), s.blob("deadbeef-0000-4000-8000-000000000000")
		s.must(os.WriteFile(blob, []byte("other"), 0o644))
		s.must(os.MkdirAll(filepath.Dir(newer), 0o755))
		s.must(os.WriteFile(newer, []byte("newer"), 0o644))
		if res, err = s.run("", ""); err != nil || len(res.Moved) != 3 || res.AsideObjects == "" || res.Blobs != 1 {
			t.Errorf("%+v, %v", res, err)
		}
		s.clean()
		s.equal()
		if p, err := os.ReadFile(filepath.Join(s.now.Objects, res.AsideObjects, strings.TrimPrefix(newer, s.now.Objects))); err != nil || string(p) != "newer" {
			t.Errorf("the newer object: %q, %v", p, err)
		}
	})
	nodes("another file has the name", func(t *testing.T) {
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
		a.Set(s.pre, "name", []byte("dup1.bin"))
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
		a.Set(s.pre, "name", []byte("elsewhere.bin"))
		a.Set(s.pre, "parentid", []byte(to))
		s.must(os.WriteFile(s.node(node)+".mpk", ocis.EncodeMPK(a), 0o600))
		s.grow(from, -60000)
		s.grow(to, 60000)
		_, err = s.run(node, node)
		s.must(err)
		s.clean()
		s.equal(from, to, alan)
	})
	nodes("refused", func(t *testing.T) {
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

// TestVersions: contents that are in no repository come from the versions that the bucket has kept.
func TestVersions(t *testing.T) {
	w := worldOf(t, browsetest.UnpackVersioned(t), snapshot.WayVersions)
	s := &scene{world: w, t: t, now: w.inst, data: filepath.Join(w.dir, "data")}
	b := w.inst.Bucket(t)
	file, gone := s.find("Round 0/dup1.bin"), s.find("Round 0/renamed.bin")
	want, err := os.ReadFile(s.blob(s.attr(file, "blobid")))
	s.must(err)
	key := func(node string) string { return bucket.Key(alan, s.attr(node, "blobid")) }
	_, err = b.Put(t.Context(), key(file), 5, func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("other")), nil })
	s.must(err)
	s.must(b.Remove(t.Context(), key(gone), ""))
	for _, node := range []string{file, gone} {
		res, err := s.run(node, node)
		if err != nil || res.Blobs != 1 {
			t.Errorf("%+v, %v", res, err)
		}
		if got, err := os.ReadFile(s.blob(s.attr(node, "blobid"))); err != nil || !bytes.Equal(got, want) { // two files of one content
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if res, err := s.run(node, node); err != nil || res.Blobs != 0 || res.Unchanged != 1 {
			t.Errorf("the second time: %+v, %v", res, err)
		}
	}
	// What a bucket has lost for good.
	list, err := b.Versions(t.Context(), key(gone))
	s.must(err)
	for _, v := range list {
		s.must(b.Remove(t.Context(), key(gone), v.VersionID))
	}
	if _, err := s.run(gone, gone); err == nil || !strings.Contains(err.Error(), "is no longer in") {
		t.Error(err)
	}
}

// TestKilled: wherever the process ends, nothing is damaged, and the next run finishes.
func TestKilled(t *testing.T) {
	defer inplace.SetStep(func() {})
	worlds := map[string]*world{}
	for _, c := range [][2]string{
		{testfixture.OCIS, "file"}, {testfixture.OCIS, "damaged"}, {testfixture.OCIS, "space"}, {testfixture.OCISWithS3Blobs, "file"}, {testfixture.OCISWithS3Blobs, "space"},
	} {
		w, what := worlds[c[0]], c[1]
		if w == nil {
			w = newWorld(t, c[0])
			worlds[c[0]] = w
		}
		t.Run(c[0]+"/"+what, func(t *testing.T) {
			s := w.scene(t)
			begin := func() (node string) {
				s.reset()
				switch what {
				case "space":
					if s.now.Objects != "" {
						s.must(os.WriteFile(s.blob(s.attr(s.find("Round 0/dup1.bin"), "blobid")), []byte("bad"), 0o644))
					}
				case "file":
					node, _ = s.purge("Round 0/versioned.txt")
				case "damaged":
					node = s.find("Round 0/versioned.txt")
					s.must(os.WriteFile(s.node(node)+".mpk", nil, 0o600))
				}
				return node
			}
			every := 5
			if what == "space" {
				every = 300
			}
			for at := 1; ; at += every {
				node := begin()
				killed := s.kill(node, at)
				if killed && what != "damaged" && (what != "space" || s.now.Objects == "") {
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
