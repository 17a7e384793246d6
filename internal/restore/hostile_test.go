package restore

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/pax/paxtest"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// arena is a destination dst within a folder that nothing may touch.
type arena struct {
	t              *testing.T
	top, dst, data string
	before         map[string]string
}

func newArena(t *testing.T) *arena {
	t.Helper()
	a := &arena{t: t, top: t.TempDir()}
	a.dst = filepath.Join(a.top, "dst")
	a.data = filepath.Join(a.dst, "data")
	write(t, filepath.Join(a.top, "outside/secret"), "secret")
	write(t, filepath.Join(a.top, "victim"), "victim")
	check(t, os.Mkdir(a.dst, 0o755))
	a.before = a.state()
	return a
}

// state describes everything outside of the destination and of what lies beside it.
func (a *arena) state() map[string]string {
	out := map[string]string{}
	check(a.t, filepath.WalkDir(a.top, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if p == a.dst {
			return filepath.SkipDir
		}
		var st unix.Stat_t
		check(a.t, unix.Lstat(p, &st))
		if p != a.top {
			out[p] = fmt.Sprint(st.Mode, st.Uid, st.Mtim, st.Ctim, st.Size, st.Nlink)
		}
		return nil
	}))
	return out
}

// untouched fails if something outside of the destination changed.
func (a *arena) untouched() {
	a.t.Helper()
	after := a.state()
	for p, s := range a.before {
		if after[p] != s {
			a.t.Errorf("%s was changed: %s -> %s", p, s, after[p])
		}
		delete(after, p)
	}
	for p := range after {
		a.t.Errorf("%s was written", p)
	}
	for _, e := range must(os.ReadDir(a.dst)) {
		if e.Name() != "data" && !strings.HasPrefix(e.Name(), "data.holdfast-") {
			a.t.Errorf("%s was written beside the destination", e.Name())
		}
	}
}

// refusesAll runs the restore and wants n refusals, and everything good restored.
func (a *arena) refusesAll(r Repo, sn *snapshot.Snapshot, n int64, o func(*Options)) *IncompleteError {
	a.t.Helper()
	_, err := restoreTo(a.t, r, sn, a.dst, o)
	var inc *IncompleteError
	if !errors.As(err, &inc) {
		a.t.Fatalf("got %v", err)
	}
	if inc.Count != n {
		a.t.Errorf("%d entries were refused, not %d:\n%v", inc.Count, n, errors.Join(inc.Errors...))
	}
	if !errors.Is(inc, ErrRefused) {
		a.t.Errorf("not refused: %v", inc)
	}
	if b, _ := os.ReadFile(filepath.Join(a.data, "good")); string(b) != "good" {
		a.t.Error("what was good is not there")
	}
	a.untouched()
	return inc
}

var badNames = []string{"", ".", "..", "../victim", "/etc/x", "a/b", "nul\x00byte", "../../victim", "good/../../victim"}

func TestHostileTreeNames(t *testing.T) {
	for _, name := range badNames {
		t.Run(fmt.Sprintf("%q", name), func(t *testing.T) {
			r := newMemRepo()
			bad := r.file(name, "evil")
			dir := r.folder(name, r.file("x", "evil"))
			link := symlink(name, "x")
			a := newArena(t)
			a.refusesAll(r, r.plain(bad, r.file("good", "good"), r.folder("sub", dir), r.folder("sub2", link)), 3, nil)
		})
	}
}

func TestHostileTarNames(t *testing.T) {
	for _, name := range badNames[2:] {
		t.Run(fmt.Sprintf("%q", name), func(t *testing.T) {
			r := newMemRepo()
			var w paxtest.Writer
			w.Add(paxtest.Item{Type: '5', Name: "./", Mode: 0o755})
			if name == "a/b" {
				return // a path here
			}
			w.Add(paxtest.Item{Type: '0', Name: name, Data: []byte("evil"), Mode: 0o644})
			w.Add(paxtest.Item{Type: '5', Name: name + "/", Mode: 0o755})
			w.Add(paxtest.Item{Type: '0', Name: name + "/x", Data: []byte("evil"), Mode: 0o644})
			w.Add(paxtest.Item{Type: '2', Name: name, Link: "x"})
			w.Add(paxtest.Item{Type: '1', Name: "hard", Link: name})
			w.Add(paxtest.Item{Type: '0', Name: "good", Data: []byte("good"), Mode: 0o644})
			a := newArena(t)
			a.refusesAll(r, r.archive(w.End()), 5, nil)
		})
	}
}

// TestThroughOwnSymlink: an archive makes a link that leads outside, and writes through it.
func TestThroughOwnSymlink(t *testing.T) {
	for _, mode := range []string{"openat2", "openat"} {
		t.Run(mode, func(t *testing.T) {
			noOpenat2.Store(mode == "openat")
			defer noOpenat2.Store(false)
			for _, overwrite := range []bool{false, true} {
				r := newMemRepo()
				var w paxtest.Writer
				w.Add(paxtest.Item{Type: '5', Name: "./", Mode: 0o755})
				w.Add(paxtest.Item{Type: '0', Name: "good", Data: []byte("good"), Mode: 0o644})
				w.Add(paxtest.Item{Type: '2', Name: "way", Link: "../../outside"})
				w.Add(paxtest.Item{Type: '0', Name: "way/evil", Data: []byte("evil"), Mode: 0o644})
				w.Add(paxtest.Item{Type: '0', Name: "way/secret", Data: []byte("evil"), Mode: 0o644})
				w.Add(paxtest.Item{Type: '1', Name: "hard", Link: "way/secret"})
				w.Add(paxtest.Item{Type: '5', Name: "way/", Mode: 0o777})
				a := newArena(t)
				_, err := restoreTo(t, r, r.archive(w.End()), a.dst, func(o *Options) { o.Overwrite = overwrite })
				if !errors.Is(err, ErrRefused) {
					t.Errorf("got %v", err)
				}
				a.untouched()
				if b := must(os.ReadFile(filepath.Join(a.data, "good"))); string(b) != "good" {
					t.Error("what was good is not there")
				}
				if exists(filepath.Join(a.data, "hard")) {
					t.Error("a hard link to the outside was made")
				}
			}
		})
	}
}

// TestPlantedSymlinks: links that lie at the destination are moved aside, not followed.
func TestPlantedSymlinks(t *testing.T) {
	for _, mode := range []string{"openat2", "openat"} {
		t.Run(mode, func(t *testing.T) {
			noOpenat2.Store(mode == "openat")
			defer noOpenat2.Store(false)
			r := newMemRepo()
			sn := r.plain(r.file("good", "good"), r.file("file", "content"), r.folder("dir", r.file("secret", "harmless")), symlink("link", "x"))
			a := newArena(t)
			check(t, os.Mkdir(a.data, 0o755))
			for _, name := range []string{"file", "link"} {
				check(t, os.Symlink("../../victim", filepath.Join(a.data, name)))
			}
			check(t, os.Symlink("../../outside", filepath.Join(a.data, "dir")))
			check(t, os.Symlink(a.top, filepath.Join(a.data, "extra")))
			mustRestore(t, r, sn, a.dst, func(o *Options) { o.Overwrite = true })
			a.untouched()
			for p, want := range map[string]string{"file": "content", "dir/secret": "harmless", "good": "good"} {
				if b, _ := os.ReadFile(filepath.Join(a.data, p)); string(b) != want {
					t.Errorf("%s: %q", p, b)
				}
			}
			if exists(filepath.Join(a.data, "extra")) {
				t.Error("an extra link stayed")
			}
		})
	}
}

// TestSwappedForSymlink: a folder is replaced by a link while contents are on their way.
func TestSwappedForSymlink(t *testing.T) {
	for _, mode := range []string{"openat2", "openat"} {
		t.Run(mode, func(t *testing.T) {
			noOpenat2.Store(mode == "openat")
			defer noOpenat2.Store(false)
			r := newMemRepo()
			sn := r.plain(r.file("good", "good"), r.folder("dir", r.file("secret", "evil")))
			a := newArena(t)
			evil := id.Hash([]byte("evil"))
			r.hook = func(d id.ID) {
				if d == evil {
					check(t, os.Rename(filepath.Join(a.data, "dir"), filepath.Join(a.data, "was dir")))
					check(t, os.Symlink("../../outside", filepath.Join(a.data, "dir")))
				}
			}
			_, err := restoreTo(t, r, sn, a.dst, nil)
			if err == nil {
				t.Error("no error")
			}
			a.untouched()
		})
	}
}

// TestAppearsMeanwhile: somebody makes a file where one is to be restored.
func TestAppearsMeanwhile(t *testing.T) {
	r := newMemRepo()
	sub := r.folder("dir", r.file("f", "ours"))
	sn := r.plain(r.file("a", "first"), r.file("good", "good"), sub)
	a := newArena(t)
	r.hook = func(d id.ID) {
		if d == sub.Subtree {
			write(t, filepath.Join(a.data, "dir/f"), "theirs")
		}
	}
	_, err := restoreTo(t, r, sn, a.dst, nil)
	var inc *IncompleteError
	if !errors.As(err, &inc) || inc.Count != 1 || !strings.Contains(err.Error(), "dir/f") {
		t.Fatalf("got %v", err)
	}
	if b := must(os.ReadFile(filepath.Join(a.data, "dir/f"))); string(b) != "theirs" {
		t.Error("somebody else's file was written to")
	}
}

func TestDuplicates(t *testing.T) {
	r := newMemRepo()
	a := newArena(t)
	a.refusesAll(r, r.plain(r.file("good", "good"), r.file("good", "evil"), r.folder("d", r.file("x", "1")), r.folder("d", r.file("y", "2"))), 2, nil)
	if exists(filepath.Join(a.data, "d/y")) {
		t.Error("two folders of one name were merged")
	}
	var w paxtest.Writer
	w.Add(paxtest.Item{Type: '5', Name: "./", Mode: 0o755})
	w.Add(paxtest.Item{Type: '0', Name: "good", Data: []byte("good"), Mode: 0o644})
	w.Add(paxtest.Item{Type: '0', Name: "good", Data: []byte("evil"), Mode: 0o644})
	w.Add(paxtest.Item{Type: '5', Name: "d/", Mode: 0o755})
	w.Add(paxtest.Item{Type: '0', Name: "d/x", Data: []byte("1"), Mode: 0o644})
	w.Add(paxtest.Item{Type: '0', Name: "e", Data: []byte("1"), Mode: 0o644})
	w.Add(paxtest.Item{Type: '0', Name: "d/x", Data: []byte("evil"), Mode: 0o644})
	w.Add(paxtest.Item{Type: '5', Name: "./", Mode: 0o700})
	w.Add(paxtest.Item{Type: '1', Name: "l", Link: "good"})
	w.Add(paxtest.Item{Type: '1', Name: "l", Link: "good"})
	tar := w.End()
	for range 2 {
		a = newArena(t)
		a.refusesAll(r, r.archive(tar), 4, nil)
	}
}

func TestCycle(t *testing.T) {
	r := newMemRepo()
	// No honest hash has a cycle; a broken one might.
	self := id.Hash([]byte("cycle"))
	n := &snapshot.Node{Name: "again", Type: snapshot.Dir, Mode: fs.ModeDir | 0o755, Subtree: self}
	r.blobs[repo.TreeBlob][self] = snapshot.EncodeTree([]*snapshot.Node{n})
	a := newArena(t)
	a.refusesAll(r, r.plain(r.file("good", "good"), n), 1, nil)
	// Deeper than any path.
	deep := r.folder("d", r.file("bottom", "x"))
	for range treeDepth + 10 {
		deep = r.folder("d", deep)
	}
	a = newArena(t)
	inc := a.refusesAll(r, r.plain(r.file("good", "good"), deep), 1, nil)
	if !strings.Contains(inc.Errors[0].Error(), "within one another") {
		t.Errorf("got %v", inc)
	}
	check(t, os.RemoveAll(a.dst))
}

// TestDeep: deeper than a path can be long, and than descriptors would last.
func TestDeep(t *testing.T) {
	r := newMemRepo()
	deep := r.file("bottom", "down here")
	name := strings.Repeat("n", 100)
	for range 600 {
		deep = r.folder(name, deep)
	}
	dst := t.TempDir()
	sn := r.plain(deep)
	mustRestore(t, r, sn, dst, nil)
	res := mustRestore(t, r, sn, dst, func(o *Options) { o.Overwrite = true })
	if s := res.sum(); s.Files != 0 || s.Unchanged != 1 {
		t.Errorf("the second run: %+v", s)
	}
	check(t, os.RemoveAll(dst))
}

// TestSymlinkIntoNestedDataSet: the snapshot puts a link where the way to another data set leads.
func TestSymlinkIntoNestedDataSet(t *testing.T) {
	r := newMemRepo()
	ds := func(name, p, tree string) snapshot.DataSet {
		return snapshot.DataSet{Name: name, Kind: "system", Path: oldPlace + "/" + p, Tree: tree, Captured: true}
	}
	make := func(entry *snapshot.Node) *snapshot.Snapshot {
		m := &snapshot.Manifest{BasePath: oldPlace + "/data", DataSets: []snapshot.DataSet{
			ds("base", "data", "/system/base"), ds("idm", "data/sub/idm", "/system/idm"),
		}}
		return r.snapshotOf(m, r.folder("system", r.folder("base", entry, r.file("good", "good")), r.folder("idm", r.file("secret", "evil"))))
	}
	a := newArena(t)
	res := mustRestore(t, r, make(symlink("sub", a.top+"/outside")), a.dst, nil)
	a.untouched()
	if len(res.Warnings) != 1 || !exists(filepath.Join(a.data, "sub/idm/secret")) {
		t.Errorf("warnings: %q", res.Warnings)
	}
	a = newArena(t)
	a.refusesAll(r, make(r.file("sub", "a file in the way")), 1, nil)
	// The administrator's own link is followed, and stays.
	a = newArena(t)
	check(t, os.MkdirAll(filepath.Join(a.dst, "data.holdfast-elsewhere"), 0o755))
	check(t, os.Mkdir(a.data, 0o755))
	check(t, os.Symlink("../data.holdfast-elsewhere", filepath.Join(a.data, "sub")))
	mustRestore(t, r, make(symlink("sub", "../data.holdfast-elsewhere")), a.dst, func(o *Options) { o.Overwrite = true })
	a.untouched()
	if l, _ := os.Readlink(filepath.Join(a.data, "sub")); l == "" || !exists(filepath.Join(a.dst, "data.holdfast-elsewhere/idm/secret")) {
		t.Error("the administrator's link was not kept")
	}
}

func TestHostileManifest(t *testing.T) {
	r := newMemRepo()
	for _, p := range []string{"relative", "", "/etc\x00x", "/"} {
		m := &snapshot.Manifest{DataSets: []snapshot.DataSet{{Name: "x", Path: p, Tree: "/system/x", Captured: true}}}
		if _, err := MakePlan(t.Context(), r, r.snapshotOf(m, r.folder("system", r.folder("x"))), Options{}); err == nil {
			t.Errorf("%q was taken", p)
		}
	}
	if _, err := MakePlan(t.Context(), r, &snapshot.Snapshot{Tree: new(r.tree())}, Options{}); !errors.Is(err, snapshot.ErrNoSuchPath) {
		t.Errorf("got %v", err)
	}
}

// TestContentPaths: what an archive says of contents is checked.
func TestContentPaths(t *testing.T) {
	r := newMemRepo()
	var w paxtest.Writer
	w.Add(paxtest.Item{Type: '5', Name: "./", Mode: 0o755})
	w.Add(paxtest.Item{Type: '0', Name: "good", Data: []byte("good"), Mode: 0o644})
	content := func(name, p, size string) {
		w.Add(paxtest.Item{Type: '0', Name: name, Mode: 0o644, Rec: map[string]string{pax.Content: p, pax.Size: size}})
	}
	content("right", "/storage/users/spaces/f", "5")
	content("bad1", "/storage/users/spaces/f", "6")
	content("bad2", "/storage/users/spaces/none", "5")
	content("bad3", "/storage/users/spaces", "5")
	content("bad4", "/storage/users/spaces/f/x", "5")
	content("bad5", "/../../etc/passwd", "5")
	content("bad6", "relative/../x", "5")
	content("bad7", "/storage/users/spaces/f", "-1")
	content("bad8", "/storage/users/spaces/f", "x")
	a := newArena(t)
	_, err := restoreTo(t, r, r.archive(w.End(), r.folder("spaces", r.file("f", "12345"))), a.dst, nil)
	var inc *IncompleteError
	if !errors.As(err, &inc) || inc.Count != 8 {
		t.Fatalf("got %v", err)
	}
	for _, e := range must(os.ReadDir(a.data)) {
		if e.Name() != "good" && e.Name() != "right" {
			t.Errorf("%s was made", e.Name())
		}
	}
	a.untouched()
}

// TestCutArchive: a damaged archive is told, and what came before is in place.
func TestCutArchive(t *testing.T) {
	var w paxtest.Writer
	w.Add(paxtest.Item{Type: '5', Name: "./", Mode: 0o750, Sec: 7})
	w.Add(paxtest.Item{Type: '0', Name: "first", Data: []byte("first"), Mode: 0o644})
	n := w.Len()
	w.Add(paxtest.Item{Type: '0', Name: "second", Data: make([]byte, 3000), Mode: 0o644})
	tar := w.End()
	for cut := n + 1; cut < len(tar); cut += 211 {
		r := newMemRepo()
		dst := t.TempDir()
		_, err := restoreTo(t, r, r.archive(tar[:cut]), dst, nil)
		if err == nil {
			t.Fatalf("cut at %d of %d: no error", cut, len(tar))
		}
		fi := must(os.Stat(filepath.Join(dst, "data")))
		if !exists(filepath.Join(dst, "data/first")) || fi.Mode().Perm() != 0o750 || fi.ModTime().Unix() != 7 {
			t.Fatalf("cut at %d: what came before is not in place", cut)
		}
		if b, err := os.ReadFile(filepath.Join(dst, "data/second")); err == nil && len(b) != 3000 {
			t.Fatalf("cut at %d: half a file stayed", cut)
		}
	}
}

// FuzzTarEntry: no header makes the making of entries misbehave. What comes before it is fuzzed in pax.
func FuzzTarEntry(f *testing.F) {
	f.Add(byte('5'), "./", "", "", "", "", int64(0))
	f.Add(byte('0'), "\xff/x", "", pax.Xattr+"user.a%3Db", "v", "", int64(4))
	f.Add(byte('0'), "c", "", pax.Content, "/a/b", "0:4", int64(9))
	f.Add(byte('0'), "c", "", pax.Size, "9", "0:4,4:1", int64(0))
	f.Add(byte('1'), "l", "./c", "", "", "", int64(0))
	f.Add(byte('2'), "s", "../x", "", "", "", int64(0))
	f.Add(byte('0'), "sock", "", pax.Type, pax.Socket, "", int64(0))
	f.Add(byte('7'), "../../etc/x", "", "", "", "", int64(-1))
	f.Fuzz(func(t *testing.T, typ byte, name, link, key, value, holes string, size int64) {
		h := &pax.Header{Type: typ, Name: name, Link: link, Size: max(size, 0), Records: map[string]string{pax.Size: fmt.Sprint(size), pax.Holes: holes, key: value}}
		e, err := tarEntry(h, strings.NewReader(""), "/x/store.tar")
		if err != nil {
			return
		}
		for _, p := range []string{e.rel, e.hardlink} {
			if p != "" && (strings.HasPrefix(p, "/") || strings.Contains("/"+p+"/", "/../") || strings.Contains(p, "\x00")) {
				t.Fatalf("name %q got through", p)
			}
		}
		if e.size < 0 {
			t.Fatalf("size %d", e.size)
		}
		last := int64(0)
		for _, x := range e.holes {
			if x.Off < last || x.Len <= 0 || x.End() > e.size {
				t.Fatalf("holes %v of %d bytes", e.holes, e.size)
			}
			last = x.End()
		}
	})
}

// TestTarEntry takes one entry all the way from the archive.
func TestTarEntry(t *testing.T) {
	var w paxtest.Writer
	w.Add(paxtest.Item{Type: '0', Name: "\xff raw", Mode: 0o4711, GID: 5, Data: []byte("hello"),
		Rec: map[string]string{"hdrcharset": "BINARY", "mtime": "-1.75", "uid": "4000000000", pax.Xattr + "user.empty": "", pax.Xattr + "user.a%3Db%25": "x\ny=z", pax.Xattr + snapshot.AttrID: "ours"}})
	r := pax.NewReader(strings.NewReader(string(w.End())))
	h, err := r.Next()
	check(t, err)
	e, err := tarEntry(h, r, "a.tar")
	check(t, err)
	if e.rel != "\xff raw" || e.meta.uid != 4000000000 || e.meta.gid != 5 || e.meta.mode != 0o4711 || e.meta.sec != -2 || e.meta.nsec != 250000000 {
		t.Errorf("got %+v", e)
	}
	if x := e.meta.xattrs; len(x) != 2 || x[0].Name != "user.a=b%" || string(x[0].Value) != "x\ny=z" || x[1].Name != "user.empty" || len(x[1].Value) != 0 {
		t.Errorf("attributes %q", x)
	}
	if b := must(io.ReadAll(e.data)); string(b) != "hello" {
		t.Errorf("content %q", b)
	}
}
