package restore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/pax/paxtest"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it sets owners and makes devices")
	}
}

// TestMain leaves the waiting for the disk out, where no test looks at it: tests work in memory if
// the filesystem there knows attributes (tmpfs since Linux 6.6). Those that use onDisk do not.
func TestMain(m *testing.M) {
	if os.Getenv(childEnv) == "" {
		syncfs = func(int) error { return nil }
		fsync = func(*os.File) error { return nil }
		if dir, err := os.MkdirTemp("/dev/shm", "holdfast"); err == nil {
			if unix.Setxattr(dir, "user.test", []byte("x"), 0) == nil {
				os.Setenv("TMPDIR", dir)
			}
			code := m.Run()
			_ = os.RemoveAll(dir)
			os.Exit(code)
		}
	}
	os.Exit(m.Run())
}

// disk is the directory for temporary files as the environment has it.
var disk = os.TempDir()

// onDisk is t.TempDir, on the disk.
func onDisk(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(disk, "restore")
	check(t, err)
	t.Cleanup(func() { check(t, os.RemoveAll(dir)) })
	return dir
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// setTimes gives everything below dir a time of its own, folders last.
func setTimes(t *testing.T, dir string) {
	t.Helper()
	n := int64(0)
	var walk func(p string)
	walk = func(p string) {
		if list, err := os.ReadDir(p); err == nil {
			for _, e := range list {
				walk(filepath.Join(p, e.Name()))
			}
		}
		n++
		ts := []unix.Timespec{{Sec: 1e9 + n, Nsec: 123456000 + n}, {Sec: 1e9 + n, Nsec: 987654000 + n}}
		check(t, unix.UtimesNanoAt(unix.AT_FDCWD, p, ts, unix.AT_SYMLINK_NOFOLLOW))
	}
	walk(dir)
}

// makeInstance makes data and config with every kind of entry in every kind of place.
func makeInstance(t *testing.T, root string) {
	t.Helper()
	data := filepath.Join(root, "data")
	write(t, filepath.Join(root, "config/ocis.yaml"), "secret: 1\n")
	write(t, filepath.Join(root, "config/deep/er/x"), "")
	write(t, filepath.Join(data, "idm/idm.boltdb"), strings.Repeat("bolt", 5000))
	write(t, filepath.Join(data, "top.json"), "{}")
	for _, dir := range []string{filepath.Join(data, "odd"), filepath.Join(data, "storage/users/odd"), filepath.Join(data, "storage/users/spaces/s1/odd")} {
		everyKind(t, dir)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range 60 {
		b := make([]byte, rnd.IntN(30000))
		for k := range b {
			b[k] = byte(rnd.Uint32())
		}
		space := fmt.Sprintf("s%d", i%3)
		write(t, filepath.Join(data, "storage/users/spaces", space, "nodes", fmt.Sprintf("%02d", i%7), fmt.Sprintf("n%d.mpk", i)), string(b[:min(len(b), 700)]))
		write(t, filepath.Join(data, "storage/users/spaces", space, "blobs", fmt.Sprintf("%02d", i%9), fmt.Sprintf("b%d", i)), string(b))
	}
	blob := filepath.Join(data, "storage/users/spaces/s0/blobs/00/b0")
	check(t, os.Link(blob, filepath.Join(data, "storage/users/spaces/s0/blobs/00/zlink")))
	check(t, unix.Setxattr(blob, "user.oc.id", []byte("x\x00y"), 0))
	write(t, filepath.Join(data, "storage/users/spaces/s0/blobs/empty"), "")
	check(t, os.Chmod(filepath.Join(data, "storage/users/spaces"), 0o500))
	setTimes(t, root)
}

// everyKind fills dir with an entry of every type and every odd property.
func everyKind(t *testing.T, dir string) {
	t.Helper()
	p := func(name string) string { return filepath.Join(dir, name) }
	write(t, p("plain"), strings.Repeat("0123456789", 3000))
	write(t, p("empty"), "")
	write(t, p("bytes \xff\xfe\n\\ \"<&>"), "raw name")
	write(t, p(strings.Repeat("n", 255)), "long name")
	write(t, p("ünïcødé/ꙮ"), "unicode")
	write(t, p("setuid"), "s")
	check(t, os.Chown(p("setuid"), 1234, 4321))
	check(t, unix.Chmod(p("setuid"), 0o6755))
	write(t, p("nomode"), "none")
	check(t, os.Chmod(p("nomode"), 0))
	check(t, os.Mkdir(p("sticky"), 0o755))
	check(t, unix.Chmod(p("sticky"), 0o3777))
	check(t, os.Chown(p("sticky"), 7, 8))
	check(t, os.Mkdir(p("emptydir"), 0o700))
	check(t, os.Mkdir(p("locked"), 0o755))
	write(t, p("locked/in"), "in")
	check(t, os.Chmod(p("locked"), 0))
	check(t, os.Symlink("../../../\xff nowhere", p("link")))
	check(t, os.Symlink("plain", p("link2")))
	check(t, os.Lchown(p("link2"), 55, 66))
	check(t, unix.Lsetxattr(p("link2"), "trusted.of.link", []byte("1"), 0))
	check(t, unix.Mkfifo(p("fifo"), 0o640))
	check(t, unix.Mknod(p("sock"), unix.S_IFSOCK|0o755, 0))
	check(t, unix.Mknod(p("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	check(t, unix.Mknod(p("block"), unix.S_IFBLK|0o660, int(unix.Mkdev(7, 300))))
	check(t, os.Link(p("plain"), p("plain link")))
	check(t, os.Link(p("plain"), p("ünïcødé/linked")))
	check(t, os.Link(p("fifo"), p("fifo link")))
	check(t, unix.Setxattr(p("plain"), "user.oc.md", []byte("\x00\xff binary\n"), 0))
	check(t, unix.Setxattr(p("plain"), "user.empty", nil, 0))
	check(t, unix.Setxattr(p("emptydir"), "user.on.dir", []byte("d"), 0))
	acl := []byte{2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 2, 0, 5, 0, 210, 4, 0, 0, 4, 0, 5, 0, 255, 255, 255, 255, 16, 0, 5, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255}
	check(t, os.Mkdir(p("acl"), 0o755))
	check(t, unix.Setxattr(p("acl"), "system.posix_acl_default", acl, 0))
	write(t, p("acl/inherited"), "has an access list")
	write(t, p("acl/without"), "has none")
	check(t, unix.Removexattr(p("acl/without"), "system.posix_acl_access"))
	for name, layout := range map[string][]pax.Extent{
		"sparse":     {{Off: 0, Len: 4096}, {Off: 1 << 20, Len: 8192}},
		"sparse end": {{Off: 0, Len: 4096}},
		"all hole":   nil,
	} {
		f, err := os.Create(p(name))
		check(t, err)
		for _, x := range layout {
			_, err := f.WriteAt(bytes.Repeat([]byte{'d'}, int(x.Len)), x.Off)
			check(t, err)
		}
		check(t, f.Truncate(2<<20))
		check(t, f.Close())
	}
	deep := dir
	for range 30 {
		deep = filepath.Join(deep, "d")
	}
	write(t, filepath.Join(deep, "bottom"), "deep")
}

func compare(t *testing.T, want, got string) {
	t.Helper()
	testfixture.Compare(t, want, got, testfixture.Options{IgnoreTopTime: true})
}

// TestRoundTrip: what was captured comes back in everything, in both ways of opening paths.
func TestRoundTrip(t *testing.T) {
	needRoot(t)
	src := t.TempDir()
	makeInstance(t, src)
	r := newMemRepo()
	sn := r.instance(src)
	for _, mode := range []string{"openat2", "openat"} {
		t.Run(mode, func(t *testing.T) {
			noOpenat2.Store(mode == "openat")
			defer noOpenat2.Store(false)
			dst := t.TempDir()
			res := mustRestore(t, r, sn, dst, nil)
			compare(t, src, dst)
			if len(res.Warnings) > 0 {
				t.Errorf("warnings: %v", res.Warnings)
			}
			if res.sum().MovedAside != 0 || len(res.Aside) != 0 {
				t.Errorf("moved aside: %+v", res)
			}
			noOpenat2.Store(mode == "openat") // unchanged, and nothing is written
			before := snapState(t, dst)
			res = mustRestore(t, r, sn, dst, func(o *Options) { o.Overwrite = true })
			if s := res.sum(); s.Files != 0 || s.Bytes != 0 || s.MovedAside != 0 {
				t.Errorf("the second run wrote: %+v", s)
			}
			after := snapState(t, dst)
			for p, s := range before {
				if after[p] != s {
					t.Errorf("%s was touched: %s -> %s", p, s, after[p])
				}
			}
			compare(t, src, dst)
		})
	}
}

// snapState tells inode and change time of everything below dir that is no folder.
func snapState(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	check(t, filepath.Walk(dir, func(p string, fi os.FileInfo, err error) error {
		if err != nil || fi.IsDir() {
			return err
		}
		var st unix.Stat_t
		check(t, unix.Lstat(p, &st))
		out[p] = fmt.Sprint(st.Ino, st.Ctim)
		return nil
	}))
	return out
}

// TestDelta: only what differs is written, the rest is moved aside, and the result is exact.
func TestDelta(t *testing.T) {
	needRoot(t)
	src := t.TempDir()
	makeInstance(t, src)
	r := newMemRepo()
	sn := r.instance(src)
	dst := t.TempDir()
	mustRestore(t, r, sn, dst, nil)
	data := filepath.Join(dst, "data")
	in := func(p string) string { return filepath.Join(data, p) }

	write(t, in("extra file"), "mine")
	write(t, in("idm/extra/deep"), "mine")
	write(t, in("storage/users/spaces/s9/unknown"), "a space that the snapshot does not know")
	write(t, in("storage/users/spaces/s1/extra"), "mine")
	changed := in("storage/users/spaces/s1/blobs/01/b1")
	old, err := os.ReadFile(changed)
	check(t, err)
	st := snapState(t, dst)
	same := bytes.Clone(old)
	same[len(same)/2] ^= 1
	var keep unix.Stat_t
	check(t, unix.Stat(changed, &keep))
	check(t, os.WriteFile(changed, same, 0)) // same size and, below, the same time
	check(t, unix.UtimesNanoAt(unix.AT_FDCWD, changed, []unix.Timespec{keep.Mtim, keep.Mtim}, 0))
	mpk := in("storage/users/spaces/s2/nodes/02/n2.mpk")
	write(t, mpk, "broken")
	check(t, os.Remove(in("storage/users/spaces/s0/blobs/03/b3")))
	check(t, os.RemoveAll(in("odd/ünïcødé")))
	check(t, os.Symlink("/etc", in("odd/ünïcødé")))
	check(t, os.Remove(in("odd/empty")))
	check(t, os.Mkdir(in("odd/empty"), 0o755))
	write(t, in("odd/empty/inside"), "x")
	check(t, os.Chmod(in("top.json"), 0o600))
	check(t, unix.Setxattr(in("idm/idm.boltdb"), "user.extra", []byte("x"), 0))
	check(t, os.Chown(in("odd/acl/without"), 3, 3))

	dry := mustRestore(t, r, sn, dst, func(o *Options) { o.Overwrite, o.DryRun = true, true })
	if string(must(os.ReadFile(in("extra file")))) != "mine" || exists(data+".holdfast-"+testStamp) {
		t.Fatal("the dry run changed something")
	}
	res := mustRestore(t, r, sn, dst, func(o *Options) { o.Overwrite = true })
	aside := data + ".holdfast-" + testStamp
	compare(t, filepath.Join(src, "data"), data)
	compare(t, filepath.Join(src, "config"), filepath.Join(dst, "config"))
	for p, content := range map[string]string{
		"extra file":                              "mine",
		"idm/extra/deep":                          "mine",
		"storage/users/spaces/s9/unknown":         "a space that the snapshot does not know",
		"storage/users/spaces/s1/extra":           "mine",
		"storage/users/spaces/s1/blobs/01/b1":     string(same),
		"storage/users/spaces/s2/nodes/02/n2.mpk": "broken",
		"odd/empty/inside":                        "x",
	} {
		got, err := os.ReadFile(filepath.Join(aside, p))
		if err != nil || string(got) != content {
			t.Errorf("%s is not in the folder aside: %.20q, %v", p, got, err)
		}
	}
	if l, _ := os.Readlink(filepath.Join(aside, "odd/ünïcødé")); l != "/etc" {
		t.Errorf("the link in the way is not aside: %q", l)
	}
	if fi := must(os.Stat(aside)); fi.Mode().Perm() != 0o700 {
		t.Errorf("the folder aside has mode %v", fi.Mode())
	}
	if len(res.Aside) != 1 || res.Aside[0] != aside {
		t.Errorf("aside: %v", res.Aside)
	}
	now := snapState(t, dst)
	for _, p := range []string{"storage/users/spaces/s2/blobs/02/b2", "storage/users/spaces/s2/nodes/05/n5.mpk", "odd/sparse", "odd/sock", "odd/null"} {
		if st[in(p)] == "" || st[in(p)] != now[in(p)] {
			t.Errorf("%s was touched", p)
		}
	}
	d, w := dry.sum(), res.sum()
	if d.MovedAside != w.MovedAside {
		t.Errorf("the dry run would move %d aside, the run moved %d\n%q\n%q", d.MovedAside, w.MovedAside, d.Moved, w.Moved)
	}
	if d.Bytes != w.Bytes {
		t.Errorf("the dry run would write %d bytes, the run wrote %d", d.Bytes, w.Bytes)
	}
}

// TestSharedOutside: a file that is right, but has a further name that the snapshot does not know,
// becomes a file of its own.
func TestSharedOutside(t *testing.T) {
	r := newMemRepo()
	var w paxtest.Writer
	w.Add(paxtest.Item{Type: '5', Name: "./", Mode: 0o755})
	w.Add(paxtest.Item{Type: '0', Name: "f", Mode: 0o644, Sec: 5, Data: []byte("content")})
	w.Add(paxtest.Item{Type: '1', Name: "f link", Link: "f"})
	w.Add(paxtest.Item{Type: '0', Name: "g", Mode: 0o644, Sec: 5, Data: []byte("other content")})
	sn := r.archive(w.End())
	dst := t.TempDir()
	mustRestore(t, r, sn, dst, nil)
	check(t, os.Link(filepath.Join(dst, "data/f"), filepath.Join(dst, "outside f")))
	check(t, os.Link(filepath.Join(dst, "data/g"), filepath.Join(dst, "outside g")))
	mustRestore(t, r, sn, dst, func(o *Options) { o.Overwrite = true })
	for name, links := range map[string]uint64{"data/f": 2, "data/f link": 2, "data/g": 1} {
		var st unix.Stat_t
		check(t, unix.Stat(filepath.Join(dst, name), &st))
		if uint64(st.Nlink) != links {
			t.Errorf("%s has %d names", name, st.Nlink)
		}
	}
	if b := must(os.ReadFile(filepath.Join(dst, "data/f link"))); string(b) != "content" {
		t.Errorf("got %q", b)
	}
	if b := must(os.ReadFile(filepath.Join(dst, "data/g"))); string(b) != "other content" {
		t.Errorf("got %q", b)
	}
}

func TestTrustTimes(t *testing.T) {
	r := newMemRepo()
	f := r.file("f", strings.Repeat("right", 100))
	f.UID, f.GID = uint32(os.Geteuid()), uint32(os.Getegid())
	sn := r.plain(f)
	dst := t.TempDir()
	mustRestore(t, r, sn, dst, nil)
	p := filepath.Join(dst, "data/f")
	check(t, os.WriteFile(p, []byte(strings.Repeat("wrong", 100)), 0))
	check(t, os.Chtimes(p, f.ModTime, f.ModTime))
	mustRestore(t, r, sn, dst, func(o *Options) { o.Overwrite, o.TrustTimes = true, true })
	if b := must(os.ReadFile(p)); b[0] != 'w' {
		t.Error("a file was read though its times are trusted")
	}
	write(t, filepath.Join(dst, "data"+markerSuffix), "{}")
	mustRestore(t, r, sn, dst, func(o *Options) { o.Overwrite, o.TrustTimes = true, true })
	if b := must(os.ReadFile(p)); b[0] != 'r' {
		t.Error("times were trusted after an interrupted run")
	}
}

func TestNotEmpty(t *testing.T) {
	r := newMemRepo()
	sn := r.plain(r.file("f", "x"))
	dst := t.TempDir()
	write(t, filepath.Join(dst, "data/there"), "x")
	_, err := restoreTo(t, r, sn, dst, nil)
	var ne *NotEmptyError
	if !errors.As(err, &ne) || len(ne.Paths) != 1 || !strings.HasSuffix(ne.Paths[0], "/data") || len(ne.Hints()) < 2 {
		t.Fatalf("got %v", err)
	}
	if exists(filepath.Join(dst, "data/f")) {
		t.Error("something was written")
	}
	check(t, os.RemoveAll(filepath.Join(dst, "data")))
	write(t, filepath.Join(dst, "data"), "a file")
	if _, err := restoreTo(t, r, sn, dst, nil); !errors.As(err, &ne) {
		t.Fatalf("got %v", err)
	}
	mustRestore(t, r, sn, dst, func(o *Options) { o.Overwrite = true })
	if b, _ := os.ReadFile(filepath.Join(dst, "data.holdfast-"+testStamp, "data")); string(b) != "a file" {
		t.Error("the file in the place of the root is gone")
	}
}

func TestNoSpace(t *testing.T) {
	r := newMemRepo()
	m := &snapshot.Manifest{BasePath: oldPlace + "/data", DataSets: []snapshot.DataSet{
		{Name: "base", Kind: "system", Path: oldPlace + "/data", Tree: "/system/base", Captured: true, Bytes: 1 << 60},
	}}
	sn := r.snapshotOf(m, r.folder("system", r.folder("base", r.file("f", "x"))))
	dst := t.TempDir()
	_, err := restoreTo(t, r, sn, dst, nil)
	var ns *NoSpaceError
	if !errors.As(err, &ns) || ns.Needed != 1<<60 || ns.Free <= 0 {
		t.Fatalf("got %v", err)
	}
	if exists(filepath.Join(dst, "data")) {
		t.Error("something was written")
	}
	// With a delta restore only what is missing has to fit.
	write(t, filepath.Join(dst, "data/g"), "x")
	mustRestore(t, r, sn, dst, func(o *Options) { o.Overwrite = true })
}

func TestMaps(t *testing.T) {
	m := &snapshot.Manifest{BasePath: "/var/lib/ocis", ConfigDir: "/etc/ocis"}
	inner := &snapshot.Manifest{BasePath: "/home/u/.ocis", ConfigDir: "/home/u/.ocis/config"}
	for _, c := range []struct {
		name, from string
		m          *snapshot.Manifest
		o          Options
		want       string
	}{
		{"old places", "/var/lib/ocis/idm", m, Options{}, "/var/lib/ocis/idm"},
		{"outside, old place", "/mnt/blobs", m, Options{}, "/mnt/blobs"},
		{"base", "/var/lib/ocis/idm", m, Options{BasePath: "/new"}, "/new/idm"},
		{"config stays", "/etc/ocis", m, Options{BasePath: "/new"}, "/etc/ocis"},
		{"config moves", "/etc/ocis", m, Options{ConfigDir: "/c"}, "/c"},
		{"no half names", "/var/lib/ocis2", m, Options{BasePath: "/new"}, ""},
		{"outside, unmapped", "/mnt/blobs", m, Options{BasePath: "/new"}, ""},
		{"outside, mapped", "/mnt/blobs/x", m, Options{BasePath: "/new", Map: []PathMap{{"/mnt", "/m"}}}, "/m/blobs/x"},
		{"longest", "/mnt/blobs/x", m, Options{Map: []PathMap{{"/mnt/blobs", "/b"}, {"/mnt", "/m"}}}, "/b/x"},
		{"within base", "/var/lib/ocis/storage/users", m, Options{BasePath: "/new", Map: []PathMap{{"/var/lib/ocis/storage", "/s"}}}, "/s/users"},
		{"config in base", "/home/u/.ocis/config", inner, Options{BasePath: "/new"}, "/new/config"},
		{"config in base, moved", "/home/u/.ocis/config", inner, Options{BasePath: "/new", ConfigDir: "/c"}, "/c"},
		{"to the top", "/etc/ocis", m, Options{ConfigDir: "/"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := &Plan{Manifest: c.m, o: c.o}
			got, err := p.mapPath("x", c.from)
			if got != c.want || (err != nil) != (c.want == "") {
				t.Errorf("got %q, %v, want %q", got, err, c.want)
			}
		})
	}
}

func TestOnly(t *testing.T) {
	needRoot(t)
	src := t.TempDir()
	makeInstance(t, src)
	r := newMemRepo()
	sn := r.instance(src)
	dst := t.TempDir()
	mustRestore(t, r, sn, dst, func(o *Options) { o.Only = []string{"idm"} })
	compare(t, filepath.Join(src, "data/idm"), filepath.Join(dst, "data/idm"))
	if exists(filepath.Join(dst, "config")) || exists(filepath.Join(dst, "data/top.json")) {
		t.Error("more than idm was restored")
	}
	// Another data set in the place of a restored one's folder is no extra.
	write(t, filepath.Join(dst, "data/mine"), "x")
	mustRestore(t, r, sn, dst, func(o *Options) { o.Only, o.Overwrite = []string{"base"}, true })
	compare(t, filepath.Join(src, "data/idm"), filepath.Join(dst, "data/idm"))
	if exists(filepath.Join(dst, "data/mine")) {
		t.Error("an extra file stayed")
	}
	if _, err := MakePlan(t.Context(), r, sn, Options{Only: []string{"nope"}}); err == nil || !strings.Contains(err.Error(), "storage-users") {
		t.Errorf("got %v", err)
	}
}

// TestSingleFile: a data set that is one file, in a folder that belongs to another.
func TestSingleFile(t *testing.T) {
	r := newMemRepo()
	ds := func(name, p, tree string) snapshot.DataSet {
		return snapshot.DataSet{Name: name, Kind: "system", Path: oldPlace + "/" + p, Tree: tree, Captured: true}
	}
	m := &snapshot.Manifest{BasePath: oldPlace + "/data", DataSets: []snapshot.DataSet{
		ds("base", "data", "/system/base"), ds("appauth", "data/appauth.json", "/system/appauth/appauth.json"),
		ds("far", "far/x.json", "/system/far/x.json"),
	}}
	base := r.folder("base", r.file("f", "x"))
	sn := r.snapshotOf(m, r.folder("system", base,
		r.folder("appauth", r.file("appauth.json", "{1}")), r.folder("far", r.file("x.json", "{2}"))))
	dst := t.TempDir()
	for _, overwrite := range []bool{false, true} {
		mustRestore(t, r, sn, dst, func(o *Options) {
			o.Map = []PathMap{{oldPlace + "/far/x.json", filepath.Join(dst, "other/place.json")}}
			o.Overwrite = overwrite
		})
		for p, want := range map[string]string{"data/appauth.json": "{1}", "data/f": "x", "other/place.json": "{2}"} {
			if b, err := os.ReadFile(filepath.Join(dst, p)); string(b) != want {
				t.Errorf("%s: %q, %v", p, b, err)
			}
		}
		if fi := must(os.Stat(filepath.Join(dst, "data"))); !fi.ModTime().Equal(base.ModTime) {
			t.Errorf("the folder around it has the time %v", fi.ModTime())
		}
	}
	if list := must(os.ReadDir(filepath.Join(dst, "other"))); len(list) != 1 {
		t.Errorf("left behind: %v", list)
	}
}

func TestOwnerAndOwnAttributes(t *testing.T) {
	needRoot(t)
	r := newMemRepo()
	f := r.file("f", "x")
	f.UID = 5
	f.Xattrs = []snapshot.Xattr{{Name: "holdfast.id", Value: []byte("n")}, {Name: "user.x", Value: []byte("v")}}
	dst := t.TempDir()
	mustRestore(t, r, r.plain(f, r.folder("d", symlink("l", "x"))), dst, func(o *Options) { o.Owner = &Owner{UID: 77, GID: 88} })
	for _, p := range []string{"", "f", "d", "d/l"} {
		var st unix.Stat_t
		check(t, unix.Lstat(filepath.Join(dst, "data", p), &st))
		if st.Uid != 77 || st.Gid != 88 {
			t.Errorf("%q belongs to %d:%d", p, st.Uid, st.Gid)
		}
	}
	if x := readXattrs(filepath.Join(dst, "data/f")); len(x) != 1 || x[0].Name != "user.x" {
		t.Errorf("attributes: %v", x)
	}
}

// TestInheritedAccessLists: a default access list above the destination must not leak into it.
func TestInheritedAccessLists(t *testing.T) {
	needRoot(t)
	src, dst := t.TempDir(), t.TempDir()
	makeInstance(t, src)
	acl := []byte{2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 2, 0, 5, 0, 210, 4, 0, 0, 4, 0, 5, 0, 255, 255, 255, 255, 16, 0, 5, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255}
	check(t, unix.Setxattr(dst, "system.posix_acl_default", acl, 0))
	check(t, unix.Chmod(dst, 0o2755))
	r := newMemRepo()
	mustRestore(t, r, r.instance(src), dst, nil)
	for _, d := range []string{"data", "config"} {
		compare(t, filepath.Join(src, d), filepath.Join(dst, d))
	}
}

// TestDamage: what is lost in the repository is told by name, and all else is restored.
func TestDamage(t *testing.T) {
	r := newMemRepo()
	big := r.file("big", strings.Repeat("abcdefg", 5000))
	sn := r.plain(big, r.file("small", "s"), r.file("gone", "g"), r.file("liar", "lies"),
		r.folder("dir", r.file("x", "x")), r.folder("lost", r.file("y", "y")),
		&snapshot.Node{Name: "short", Type: snapshot.File, Mode: 0o644, Size: 5, Content: r.piecesOf([]byte("four"))},
		&snapshot.Node{Name: "none", Type: snapshot.File, Mode: 0o644, Size: 5, Content: []id.ID{}},
		&snapshot.Node{Name: "zero", Type: snapshot.File, Mode: 0o644, Content: r.piecesOf([]byte("zero"))},
	)
	r.lost[big.Content[2]] = true
	delete(r.blobs[repo.DataBlob], id.Hash([]byte("g")))
	r.lie[id.Hash([]byte("lies"))] = 4
	r.blobs[repo.DataBlob][id.Hash([]byte("lies"))] = []byte("longer lies")
	r.lost[r.tree(r.file("y", "y"))] = true
	dst := t.TempDir()
	res, err := restoreTo(t, r, sn, dst, nil)
	var inc *IncompleteError
	if !errors.As(err, &inc) || res == nil {
		t.Fatalf("got %v", err)
	}
	all := errors.Join(inc.Errors...).Error()
	for _, name := range []string{"big", "gone", "liar", "short", "none", "zero", "lost"} {
		if !strings.Contains(all, "/"+name+`"`) {
			t.Errorf("%s is not named in\n%s", name, all)
		}
		if name != "lost" && exists(filepath.Join(dst, "data", name)) {
			t.Errorf("%s is there though its content is not", name)
		}
	}
	if inc.Count != 7 {
		t.Errorf("%d errors:\n%s", inc.Count, all)
	}
	for _, name := range []string{"small", "dir/x", "lost"} {
		if !exists(filepath.Join(dst, "data", name)) {
			t.Errorf("%s is missing", name)
		}
	}
	if !exists(filepath.Join(dst, "data"+markerSuffix)) || inc.Marker == "" {
		t.Error("no marker tells that the restore is incomplete")
	}
	clear(r.lost)
	if _, err := restoreTo(t, r, sn, dst, nil); !errors.As(err, &inc) { // goes on without --overwrite
		t.Fatalf("got %v", err)
	}
	if b, _ := os.ReadFile(filepath.Join(dst, "data/big")); string(b) != strings.Repeat("abcdefg", 5000) {
		t.Error("the second run did not complete the file")
	}
}

func TestBadHoles(t *testing.T) {
	r := newMemRepo()
	withHoles := func(name, holes string) *snapshot.Node {
		f := r.file(name, strings.Repeat("x", 5000))
		f.Xattrs = []snapshot.Xattr{{Name: snapshot.AttrHoles, Value: []byte(holes)}}
		return f
	}
	dst := t.TempDir()
	_, err := restoreTo(t, r, r.plain(withHoles("data", "0:4096"), withHoles("long", "0:9999"), withHoles("junk", "a:b"), withHoles("over", "9223372036854775807:9223372036854775807"), withHoles("back", "4096:1,0:1")), dst, nil)
	var inc *IncompleteError
	if !errors.As(err, &inc) || inc.Count != 4 {
		t.Fatalf("got %v", err)
	}
	if b, _ := os.ReadFile(filepath.Join(dst, "data/data")); string(b) != strings.Repeat("x", 5000) {
		t.Error("bytes were lost in a hole that is none")
	}
}

func TestCancel(t *testing.T) {
	src := t.TempDir()
	r := newMemRepo()
	var files []*snapshot.Node
	for i := range 500 {
		files = append(files, r.file(fmt.Sprint("f", i), fmt.Sprint("content ", i)))
	}
	sn := r.plain(files...)
	ctx, cancel := context.WithCancel(t.Context())
	n := 0
	r.hook = func(id.ID) {
		r.mu.Lock()
		defer r.mu.Unlock()
		if n++; n == 100 {
			cancel()
		}
	}
	p, err := MakePlan(ctx, r, sn, Options{BasePath: filepath.Join(src, "data")})
	check(t, err)
	if _, err := Run(ctx, r, p); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	if !exists(filepath.Join(src, "data"+markerSuffix)) {
		t.Error("no marker")
	}
	r.hook = nil
	res := mustRestore(t, r, sn, src, nil)
	for i, f := range files {
		if b, _ := os.ReadFile(filepath.Join(src, "data", f.Name)); string(b) != fmt.Sprint("content ", i) && f.Name == fmt.Sprint("f", i) {
			t.Errorf("%s: %q", f.Name, b)
		}
	}
	if exists(filepath.Join(src, "data"+markerSuffix)) || len(res.Aside) > 0 {
		t.Errorf("after the second run: %+v", res.Aside)
	}
}

func TestProgress(t *testing.T) {
	r := newMemRepo()
	var events []progress.Event
	mustRestore(t, r, r.plain(r.file("f", "12345")), t.TempDir(), func(o *Options) {
		o.Progress = func(e progress.Event) { events = append(events, e) }
	})
	last := events[len(events)-1]
	if events[0].Kind != progress.Start || last.Kind != progress.Finish || last.Bytes != 5 || last.Done != 2 {
		t.Errorf("events: %+v", events)
	}
}

// TestEachBlobOnce: what several files share is fetched once in a window.
func TestEachBlobOnce(t *testing.T) {
	r := newMemRepo()
	var files []*snapshot.Node
	for i := range 50 {
		files = append(files, r.file(fmt.Sprint(i), strings.Repeat("same", 2000)))
	}
	sn := r.plain(files...)
	dst := t.TempDir()
	mustRestore(t, r, sn, dst, nil)
	for _, d := range files[0].Content {
		if r.loaded[d] != 1 {
			t.Errorf("blob %s was loaded %d times", d.Short(), r.loaded[d])
		}
	}
	for _, f := range files {
		if b := must(os.ReadFile(filepath.Join(dst, "data", f.Name))); string(b) != strings.Repeat("same", 2000) {
			t.Fatalf("%s is wrong", f.Name)
		}
	}
}

// TestManyPieces: a file of more pieces than one window holds.
func TestManyPieces(t *testing.T) {
	r := newMemRepo()
	var all []byte
	var ids []id.ID
	for i := range windowPieces*2 + 100 {
		b := fmt.Appendf(nil, "%d;", i)
		all = append(all, b...)
		ids = append(ids, r.save(repo.DataBlob, b))
	}
	f := &snapshot.Node{Name: "f", Type: snapshot.File, Mode: 0o644, ModTime: time.Unix(5, 0), Size: uint64(len(all)), Content: ids}
	dst := t.TempDir()
	mustRestore(t, r, r.plain(f), dst, nil)
	if b := must(os.ReadFile(filepath.Join(dst, "data/f"))); !bytes.Equal(b, all) {
		t.Error("wrong content")
	}
}

func TestRestoreTree(t *testing.T) {
	needRoot(t)
	src := t.TempDir()
	everyKind(t, filepath.Join(src, "folder"))
	setTimes(t, src)
	r := newMemRepo()
	n := (&capturer{r: r}).node(filepath.Join(src, "folder"), "folder", nil)
	dst := t.TempDir()
	_, err := RestoreTree(t.Context(), r, n.Subtree, filepath.Join(dst, "a/b"), TreeOptions{})
	check(t, err)
	testfixture.Compare(t, filepath.Join(src, "folder"), filepath.Join(dst, "a/b"), testfixture.Options{IgnoreTopTime: true})
	_, err = RestoreNode(t.Context(), r, n, filepath.Join(dst, "c"), TreeOptions{})
	check(t, err)
	testfixture.Compare(t, filepath.Join(src, "folder"), filepath.Join(dst, "c"), testfixture.Options{})
	var ne *NotEmptyError
	if _, err = RestoreTree(t.Context(), r, n.Subtree, filepath.Join(dst, "c"), TreeOptions{}); !errors.As(err, &ne) {
		t.Fatalf("got %v", err)
	}
	write(t, filepath.Join(dst, "c/mine"), "mine")
	write(t, filepath.Join(dst, "c/plain"), "differs")
	now := func() time.Time { return testTime }
	_, err = RestoreTree(t.Context(), r, n.Subtree, filepath.Join(dst, "c"), TreeOptions{Overwrite: true, Now: now})
	check(t, err)
	if b, _ := os.ReadFile(filepath.Join(dst, "c.holdfast-"+testStamp, "plain")); string(b) != "differs" {
		t.Error("the file in the way is gone")
	}
	if b, _ := os.ReadFile(filepath.Join(dst, "c/mine")); string(b) != "mine" {
		t.Error("a file that the snapshot does not have was taken away")
	}
	_, err = RestoreTree(t.Context(), r, n.Subtree, filepath.Join(dst, "c"), TreeOptions{Overwrite: true, Exact: true, Now: now})
	check(t, err)
	if exists(filepath.Join(dst, "c/mine")) {
		t.Error("a file that the snapshot does not have stayed")
	}
	testfixture.Compare(t, filepath.Join(src, "folder"), filepath.Join(dst, "c"), testfixture.Options{IgnoreTopTime: true})
	file := r.file("one", "content")
	_, err = RestoreNode(t.Context(), r, file, filepath.Join(dst, "d/other name"), TreeOptions{})
	check(t, err)
	if b, _ := os.ReadFile(filepath.Join(dst, "d/other name")); string(b) != "content" {
		t.Errorf("got %q", b)
	}
}

// TestRandomTrees: any tree comes back, and again over any other tree.
func TestRandomTrees(t *testing.T) {
	needRoot(t)
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 99))
			a, b, dst := t.TempDir(), t.TempDir(), t.TempDir()
			for _, root := range []string{a, b} {
				check(t, os.MkdirAll(filepath.Join(root, "config"), 0o755))
				check(t, os.MkdirAll(filepath.Join(root, "data/idm"), 0o755))
				check(t, os.MkdirAll(filepath.Join(root, "data/storage/users/spaces/s"), 0o755))
				randomTree(t, rnd, filepath.Join(root, "config"), 2)
				randomTree(t, rnd, filepath.Join(root, "data/idm"), 3)
				randomTree(t, rnd, filepath.Join(root, "data/storage/users/spaces/s"), 4)
				setTimes(t, root)
			}
			r := newMemRepo()
			sa, sb := r.instance(a), r.instance(b)
			mustRestore(t, r, sa, dst, nil)
			for _, d := range []string{"data", "config"} {
				compare(t, filepath.Join(a, d), filepath.Join(dst, d))
			}
			mustRestore(t, r, sb, dst, func(o *Options) { o.Overwrite = true })
			for _, d := range []string{"data", "config"} {
				compare(t, filepath.Join(b, d), filepath.Join(dst, d))
			}
		})
	}
}

func randomTree(t *testing.T, rnd *rand.Rand, dir string, depth int) {
	t.Helper()
	names := []string{"a", "b", "c", "d", "blobs", "e-", "e", "e.x", "\xff"}
	var files []string
	for _, n := range names {
		p := filepath.Join(dir, n)
		switch k := rnd.IntN(12); {
		case k < 3 && depth > 0:
			check(t, os.Mkdir(p, 0o755))
			randomTree(t, rnd, p, depth-1)
			check(t, os.Chmod(p, os.FileMode(rnd.IntN(0o1000))))
		case k < 7:
			b := bytes.Repeat([]byte{byte(rnd.IntN(3))}, rnd.IntN(3)*rnd.IntN(5000))
			check(t, os.WriteFile(p, b, 0o600))
			check(t, unix.Chmod(p, uint32(rnd.IntN(0o10000))))
			check(t, os.Chown(p, rnd.IntN(3), rnd.IntN(3)))
			files = append(files, p)
		case k == 7:
			check(t, os.Symlink(names[rnd.IntN(len(names))], p))
		case k == 8:
			check(t, unix.Mkfifo(p, 0o600))
		case k == 9 && len(files) > 0:
			check(t, os.Link(files[rnd.IntN(len(files))], p))
		}
	}
}
