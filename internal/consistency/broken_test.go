package consistency_test

import (
	"bytes"
	"crypto/sha1"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/consistency"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// breaker damages an instance, and takes it back.
type breaker struct {
	t      *testing.T
	users  string // roots of the stores
	system string
	prefix string
	// objects is the bucket, if there is one.
	objects *bucket
	undo    []func()
}

func (b *breaker) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// keep puts path back as it is now, when the case is over.
func (b *breaker) keep(path string) {
	b.t.Helper()
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		b.undo = append(b.undo, func() { b.must(os.RemoveAll(path)) })
		return
	}
	b.must(err)
	dir := filepath.Dir(path)
	switch {
	case fi.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(path)
		b.must(err)
		b.undo = append(b.undo, func() {
			b.must(os.RemoveAll(path))
			b.must(os.MkdirAll(dir, 0o755))
			b.must(os.Symlink(target, path))
		})
	case fi.IsDir():
		aside := filepath.Join(b.t.TempDir(), "aside")
		b.must(os.Rename(path, aside))
		b.must(os.CopyFS(path, os.DirFS(aside)))
		b.undo = append(b.undo, func() {
			b.must(os.RemoveAll(path))
			b.must(os.Rename(aside, path))
		})
	default:
		data, err := os.ReadFile(path)
		b.must(err)
		x, err := testfixture.Xattrs(path)
		b.must(err)
		b.undo = append(b.undo, func() {
			b.must(os.RemoveAll(path))
			b.must(os.MkdirAll(dir, 0o755))
			b.must(os.WriteFile(path, data, fi.Mode().Perm()))
			for k, v := range x {
				b.must(unix.Setxattr(path, k, []byte(v), 0))
			}
			b.must(os.Chtimes(path, fi.ModTime(), fi.ModTime()))
		})
	}
}

func (b *breaker) remove(path string) {
	b.t.Helper()
	b.keep(path)
	b.must(os.RemoveAll(path))
}

func (b *breaker) write(path string, data []byte) {
	b.t.Helper()
	b.keep(path)
	b.must(os.MkdirAll(filepath.Dir(path), 0o755))
	b.must(os.WriteFile(path, data, 0o600))
}

func (b *breaker) link(target, path string) {
	b.t.Helper()
	b.keep(path)
	_ = os.Remove(path)
	b.must(os.MkdirAll(filepath.Dir(path), 0o755))
	b.must(os.Symlink(target, path))
}

func (b *breaker) back() {
	for _, fn := range slices.Backward(b.undo) {
		fn()
	}
	b.undo = nil
}

// A place is a node of a decomposed store.
type place struct {
	b    *breaker
	root string // of the store
	pre  string // prefix of its attributes
	sp   string // space id
	id   string // with .T.<time>
	link string // the link that leads here
}

func (p place) dir() string          { return filepath.Join(p.root, ocis.SpacePath(p.sp)) }
func (p place) node() string         { return filepath.Join(p.dir(), "nodes", ocis.NodePath(p.id)) }
func (p place) mpk() string          { return p.node() + ".mpk" }
func (p place) blob(x string) string { return filepath.Join(p.dir(), "blobs", ocis.NodePath(x)) }

// at finds a node by its path in a space.
func (b *breaker) at(space, path string) place {
	b.t.Helper()
	return b.in(b.users, b.prefix, space, path)
}

func (b *breaker) in(root, prefix, space, path string) place {
	b.t.Helper()
	p := place{b: b, root: root, pre: prefix, sp: space, id: space}
	for _, name := range strings.Split(strings.Trim(path, "/"), "/") {
		if name == "" {
			continue
		}
		p.link = filepath.Join(p.node(), name)
		target, err := os.Readlink(p.link)
		b.must(err)
		p.id = strings.ReplaceAll(strings.TrimPrefix(target, "../../../../../"), "/", "")
	}
	return p
}

func (p place) attrs() ocis.Attributes {
	p.b.t.Helper()
	data, err := os.ReadFile(p.mpk())
	p.b.must(err)
	a, err := ocis.ParseMPK(data)
	p.b.must(err)
	return a
}

func (p place) set(name, value string) {
	p.b.t.Helper()
	a := p.attrs()
	a.Set(p.pre, name, []byte(value))
	p.b.write(p.mpk(), ocis.EncodeMPK(a))
}

func (p place) unset(name string) {
	p.b.t.Helper()
	a := p.attrs()
	a.Delete(name)
	p.b.write(p.mpk(), ocis.EncodeMPK(a))
}

// content gives the node another content, as if a server had written it.
func (p place) content(data []byte) {
	p.b.t.Helper()
	a := p.attrs()
	sum := sha1.Sum(data)
	p.b.write(p.blob(a.Text("blobid")), data)
	a.Set(p.pre, "blobsize", []byte(fmt.Sprint(len(data))))
	a.Set(p.pre, "cs.sha1", sum[:])
	p.b.write(p.mpk(), ocis.EncodeMPK(a))
}

const (
	alan    = "b1f74ec4-dd7e-11ef-a543-03775734d0f7" // owner and id of a personal space
	mary    = "056fc874-dd7f-11ef-ba84-af6fca4b7289"
	nowhere = "deadbeef-0000-4000-8000-00000000dead"
)

// revision returns the id of a version of the node.
func (p place) revision() string {
	p.b.t.Helper()
	list, err := filepath.Glob(p.node() + ".REV.*Z")
	p.b.must(err)
	if len(list) == 0 {
		p.b.t.Fatal("no version")
	}
	sort.Strings(list)
	return p.id + strings.TrimPrefix(list[0], p.node())
}

// trashed finds a trashed item of a space; folder tells which kind.
func (b *breaker) trashed(space string, folder bool) place {
	b.t.Helper()
	links, err := filepath.Glob(filepath.Join(b.users, ocis.SpacePath(space), "trash/*/*/*/*/*"))
	b.must(err)
	for _, l := range links {
		target, err := os.Readlink(l)
		b.must(err)
		p := place{b: b, root: b.users, pre: b.prefix, sp: space, link: l}
		p.id = strings.ReplaceAll(strings.TrimPrefix(target, "../../../../../nodes/"), "/", "")
		if fi, err := os.Stat(p.node()); err == nil && fi.IsDir() == folder {
			return p
		}
	}
	b.t.Fatal("nothing in the trash")
	return place{}
}

// index returns the entries of an index, and writes what fn makes of them.
func (b *breaker) index(name string, fn func([]ocis.IndexEntry) []ocis.IndexEntry) {
	b.t.Helper()
	p := filepath.Join(b.users, "indexes", name+".mpk")
	data, err := os.ReadFile(p)
	b.must(err)
	list, err := ocis.ParseIndex(data)
	b.must(err)
	b.write(p, ocis.EncodeIndex(fn(list)))
}

func without(space string) func([]ocis.IndexEntry) []ocis.IndexEntry {
	return func(l []ocis.IndexEntry) []ocis.IndexEntry {
		return slices.DeleteFunc(l, func(e ocis.IndexEntry) bool { return e.SpaceID == space })
	}
}

// want is a finding that a case expects: its class and a part of its path.
type want struct {
	class consistency.Class
	path  string
}

// cases of the decomposed layout. Each one breaks one thing.
// brokenCase is one way to damage an instance, and what is to be found then.
type brokenCase struct {
	name   string
	damage func(b *breaker)
	want   []want
}

var decomposedCases = []brokenCase{
	{"metadata of a file is gone", func(b *breaker) {
		b.remove(b.at(alan, "Round 0/dup1.bin").mpk())
	}, []want{{consistency.MetadataMissing, "/Round 0/dup1.bin"}}},
	{"metadata of a folder is gone", func(b *breaker) {
		b.remove(b.at(alan, "Round 0/a").mpk())
	}, []want{{consistency.MetadataMissing, "/Round 0/a"}}},
	{"metadata is empty, as a full disk leaves it", func(b *breaker) {
		b.write(b.at(alan, "Round 0/dup1.bin").mpk(), nil)
	}, []want{{consistency.MetadataMalformed, "/Round 0/dup1.bin"}}},
	{"metadata is cut off", func(b *breaker) {
		p := b.at(alan, "Round 0/dup1.bin")
		data := ocis.EncodeMPK(p.attrs())
		b.write(p.mpk(), data[:len(data)/2])
	}, []want{{consistency.MetadataMalformed, "/Round 0/dup1.bin"}}},
	{"an attribute makes no sense", func(b *breaker) {
		b.at(alan, "Round 0/dup1.bin").set("type", "seven")
	}, []want{{consistency.MetadataMalformed, "/Round 0/dup1.bin"}}},
	{"metadata of a version is gone", func(b *breaker) {
		p := b.at(alan, "Round 0/versioned.txt")
		p.id = p.revision()
		b.remove(p.mpk())
	}, []want{{consistency.MetadataMissing, "/Round 0/versioned.txt (version "}}},
	{"a link to a file is gone", func(b *breaker) {
		b.remove(b.at(alan, "Round 0/dup1.bin").link)
	}, []want{{consistency.LinkMissing, ".../dup1.bin"}}},
	{"a link to a folder is gone", func(b *breaker) {
		b.remove(b.at(alan, "Round 0/a").link)
	}, []want{{consistency.LinkMissing, ".../a"}}},
	{"an entry of the trash is gone", func(b *breaker) {
		b.remove(b.trashed(alan, true).link)
	}, []want{{consistency.LinkMissing, "(trashed)"}}},
	{"the node of a file is gone", func(b *breaker) {
		b.remove(b.at(alan, "Round 0/dup1.bin").node())
	}, []want{{consistency.NodeMissing, "/Round 0/dup1.bin"}}},
	{"node and metadata of a file are gone", func(b *breaker) {
		p := b.at(alan, "Round 0/dup1.bin")
		b.remove(p.node())
		b.remove(p.mpk())
	}, []want{{consistency.NodeMissing, "/Round 0/dup1.bin"}}},
	{"the node of a folder is gone", func(b *breaker) {
		b.remove(b.at(alan, "Round 0/a").node())
	}, []want{{consistency.NodeMissing, "/Round 0/a"}}},
	{"the node of a trashed item is gone", func(b *breaker) {
		b.remove(b.trashed(alan, false).node())
	}, []want{{consistency.NodeMissing, "(trashed)"}}},
	{"a link leads nowhere", func(b *breaker) {
		b.link("../../../../../"+ocis.NodePath(nowhere), filepath.Join(b.at(alan, "Round 0").node(), "ghost"))
	}, []want{{consistency.NodeMissing, "/Round 0/ghost"}}},
	{"a link leads out of the store", func(b *breaker) {
		b.link("/etc/passwd", filepath.Join(b.at(alan, "Round 0").node(), "passwd"))
	}, []want{{consistency.NodeMissing, "/Round 0/passwd"}}},
	{"two links to one node", func(b *breaker) {
		p := b.at(alan, "Round 0/dup1.bin")
		b.link("../../../../../"+ocis.NodePath(p.id), filepath.Join(b.at(alan, "Round 1").node(), "again.bin"))
	}, []want{{consistency.LinkDuplicate, "/Round "}}},
	{"a file says that it is a folder", func(b *breaker) {
		b.at(alan, "Round 0/dup1.bin").set("type", "2")
	}, []want{{consistency.TypeMismatch, "/Round 0/dup1.bin"}}},
	{"another parent", func(b *breaker) {
		b.at(alan, "Round 0/dup1.bin").set("parentid", b.at(alan, "Round 1").id)
	}, []want{{consistency.ParentMismatch, "/Round 0/dup1.bin"}}},
	{"another name", func(b *breaker) {
		b.at(alan, "Round 0/dup1.bin").set("name", "other.bin")
	}, []want{{consistency.NameMismatch, "/Round 0/dup1.bin"}}},
	{"a trashed item without origin", func(b *breaker) {
		b.trashed(alan, true).unset("trash.origin")
	}, []want{{consistency.OriginMissing, "(trashed)"}}},
	{"a folder in itself", func(b *breaker) {
		p, inner := b.at(alan, "Round 0/a"), b.at(alan, "Round 0/a/b")
		target, _ := os.Readlink(p.link)
		b.remove(p.link)
		b.link(target, filepath.Join(inner.node(), "a"))
	}, []want{{consistency.Cycle, "/nodes/"}}},
	{"a blob is gone", func(b *breaker) {
		p := b.at(alan, "Round 0/dup1.bin")
		b.remove(p.blob(p.attrs().Text("blobid")))
	}, []want{{consistency.BlobMissing, "/Round 0/dup1.bin"}}},
	{"the blob of a version is gone", func(b *breaker) {
		p := b.at(alan, "Round 0/versioned.txt")
		p.id = p.revision()
		b.remove(p.blob(p.attrs().Text("blobid")))
	}, []want{{consistency.BlobMissing, "/Round 0/versioned.txt (version "}}},
	{"a blob is cut off", func(b *breaker) {
		p := b.at(alan, "Round 0/dup1.bin")
		b.write(p.blob(p.attrs().Text("blobid")), []byte("short"))
	}, []want{{consistency.BlobSize, "/Round 0/dup1.bin"}}},
	{"a bit of a blob flipped", func(b *breaker) {
		p := b.at(alan, "Round 0/dup1.bin")
		name := p.blob(p.attrs().Text("blobid"))
		data, err := os.ReadFile(name)
		b.must(err)
		data[len(data)/2] ^= 1
		b.write(name, data)
	}, []want{{consistency.BlobChecksum, "/Round 0/dup1.bin"}}},
	{"a size without a blob", func(b *breaker) {
		p := b.at(alan, "Round 0/dup1.bin")
		b.remove(p.blob(p.attrs().Text("blobid")))
		p.set("blobid", "")
	}, []want{{consistency.BlobMissing, "/Round 0/dup1.bin"}}},
	{"an orphaned blob", func(b *breaker) {
		b.write(b.at(alan, "").blob(nowhere), []byte("nobody's"))
	}, []want{{consistency.BlobOrphaned, "/blobs/de/ad/be/ef/"}}},
	{"two nodes with one blob", func(b *breaker) {
		p, q := b.at(alan, "Round 0/dup1.bin"), b.at(alan, "Round 0/renamed.bin")
		b.remove(q.blob(q.attrs().Text("blobid")))
		q.set("blobid", p.attrs().Text("blobid")) // they have the same content
	}, []want{{consistency.BlobShared, "/Round 0/"}}},
	{"a wrong tree size", func(b *breaker) {
		b.at(alan, "Round 0/a").set("treesize", "7")
	}, []want{{consistency.TreeSize, "/Round 0/a"}}},
	{"no root node", func(b *breaker) {
		p := b.at(alan, "")
		b.remove(p.node())
		b.remove(p.mpk())
	}, []want{{consistency.SpaceRootMissing, "/"}}},
	{"not in the index of its type", func(b *breaker) {
		b.index("by-type/personal", without(alan))
	}, []want{{consistency.IndexMissing, "indexes/by-type/personal.mpk"}}},
	{"not in the index of its owner", func(b *breaker) {
		b.index("by-user-id/"+alan, without(alan))
	}, []want{{consistency.IndexMissing, "indexes/by-user-id/" + alan + ".mpk"}}},
	{"an index that leads elsewhere", func(b *breaker) {
		b.index("by-type/personal", func(l []ocis.IndexEntry) []ocis.IndexEntry {
			for i := range l {
				if l[i].SpaceID == alan {
					l[i].Target = "../../../spaces/no/where"
				}
			}
			return l
		})
	}, []want{{consistency.IndexWrong, "indexes/by-type/personal.mpk"}}},
	{"an index that is cut off", func(b *breaker) {
		b.write(filepath.Join(b.users, "indexes/by-type/personal.mpk"), []byte{0x86})
	}, []want{{consistency.IndexMalformed, "indexes/by-type/personal.mpk"}}},
	{"an index with a space that is gone", func(b *breaker) {
		b.index("by-type/project", func(l []ocis.IndexEntry) []ocis.IndexEntry {
			return append(l, ocis.IndexEntry{SpaceID: nowhere, Target: "../../../spaces/x"})
		})
	}, []want{{consistency.IndexStale, "indexes/by-type/project.mpk"}}},
	{"a share of an item that is gone", func(b *breaker) {
		p, data := b.shareList()
		shared := b.at(alan, "Round 0/a").id
		p.content(bytes.Replace(data, []byte(shared), []byte(nowhere), 1))
	}, []want{{consistency.ShareStale, ""}}},
	{"a share whose space is gone", func(b *breaker) {
		p, data := b.shareList()
		at := bytes.Index(data, []byte(`"space_id":"`+alan))
		data = append(slices.Clone(data[:at]), bytes.Replace(data[at:], []byte(alan), []byte(nowhere), 1)...)
		p.content(data)
	}, []want{{consistency.ShareStale, "/storages/"}}},
	{"a share without its grant", func(b *breaker) {
		b.at(alan, "Round 0/a").unset("grant.u:" + mary)
	}, []want{{consistency.ShareWithoutGrant, "/Round 0/a"}}},
	{"a list of shares that is no JSON", func(b *breaker) {
		p, data := b.shareList()
		p.content(data[:len(data)/2])
	}, []want{{consistency.ShareMalformed, "/storages/"}}},
	{"an upload in flight", func(b *breaker) {
		p := b.at(alan, "Round 0/dup1.bin")
		blob := p.attrs().Text("blobid")
		data, err := os.ReadFile(p.blob(blob))
		b.must(err)
		b.remove(p.blob(blob))
		b.write(filepath.Join(b.users, "uploads", blob), data)
		p.set("nodestatus", "processing:"+blob)
	}, []want{{consistency.UploadInFlight, "/Round 0/dup1.bin"}}},
	{"an upload in flight that lost bytes", func(b *breaker) {
		p := b.at(alan, "Round 0/dup1.bin")
		blob := p.attrs().Text("blobid")
		b.remove(p.blob(blob))
		b.write(filepath.Join(b.users, "uploads", blob), []byte("a part"))
		p.set("nodestatus", "processing:"+blob)
	}, []want{{consistency.BlobMissing, "/Round 0/dup1.bin"}}},
	{"bytes of an upload without a record", func(b *breaker) {
		b.write(filepath.Join(b.users, "uploads", nowhere), []byte("bytes"))
	}, []want{{consistency.UploadLeftover, "uploads/" + nowhere}}},
	{"an upload that the client did not complete", func(b *breaker) {
		b.write(filepath.Join(b.users, "uploads", nowhere), []byte("byt"))
		b.write(filepath.Join(b.users, "uploads", nowhere+".info"), []byte(`{"ID":"`+nowhere+`","Size":5,"Offset":3,"MetaData":{"filename":"x.txt"},"Storage":{"SpaceRoot":"`+alan+`"}}`))
	}, []want{{consistency.UploadUnfinished, "uploads/" + nowhere}}},
	{"a restore in place that was interrupted", func(b *breaker) {
		p := b.at(alan, "Round 0/dup1.bin")
		b.remove(p.mpk())
		b.write(filepath.Join(b.users, ".holdfast-restore", alan+".nodes"), []byte("write "+p.id+"\n"))
	}, []want{{consistency.RestoreUnfinished, ".holdfast-restore/"}}},
	{"metadata of a purged version", func(b *breaker) {
		p := b.at(alan, "Round 0/versioned.txt")
		p.id = p.revision()
		blob := p.blob(p.attrs().Text("blobid"))
		b.remove(p.node())
		b.remove(blob)
	}, []want{{consistency.MetadataLeftover, "/Round 0/versioned.txt (version "}}},
	{"half written metadata", func(b *breaker) {
		b.write(filepath.Join(filepath.Dir(b.at(alan, "Round 0/a").node()), ".-x.mpk1234567"), []byte("half"))
	}, []want{{consistency.TemporaryFile, "/nodes/"}}},
	{"something unknown", func(b *breaker) {
		b.write(filepath.Join(b.at(alan, "").dir(), "README"), []byte("hello"))
	}, []want{{consistency.UnknownEntry, "/README"}}},
	{"a tree size while changes wait", func(b *breaker) {
		b.at(alan, "Round 0/a").set("treesize", "7")
		b.write(filepath.Join(b.users, "changes", alan[:2], alan+":"+alan, "x.mpk"), nil)
	}, []want{{consistency.TreeSize, "/Round 0/a"}}},
}

// shareList finds the list of alan's shares in the system storage.
func (b *breaker) shareList() (place, []byte) {
	b.t.Helper()
	const space = "jsoncs3-share-manager-metadata"
	root := filepath.Join(b.system, ocis.SpacePath(space), "nodes")
	p := b.in(b.system, ocis.PrefixOpenCloud, space, "storages")
	list, err := os.ReadDir(p.node())
	b.must(err)
	if len(list) != 1 {
		b.t.Fatalf("%d storages in %s", len(list), root)
	}
	p = b.in(b.system, ocis.PrefixOpenCloud, space, "storages/"+list[0].Name()+"/"+alan+".json")
	data, err := os.ReadFile(p.blob(p.attrs().Text("blobid")))
	b.must(err)
	return p, data
}

// mark is what tells findings apart.
func mark(f consistency.Finding) string {
	return strings.Join([]string{string(f.Class), f.Store, f.Space, f.Node, f.Path, f.Blob}, "\x00")
}

// fresh returns the findings that were not there before.
func fresh(before map[string]int, found []consistency.Finding) []consistency.Finding {
	have := map[string]int{}
	var out []consistency.Finding
	for _, f := range found {
		if have[mark(f)]++; have[mark(f)] > before[mark(f)] {
			out = append(out, f)
		}
	}
	return out
}

// TestBroken: each class has a store that is broken in exactly that way, and the report names it and
// nothing else.
func TestBroken(t *testing.T) {
	broken(t, testfixture.OCIS, consistency.Options{ReadData: true}, decomposedCases)
}

// broken damages the instance in each way, one after the other, and looks at what is reported besides what is
// without damage.
func broken(t *testing.T, name string, o consistency.Options, cases []brokenCase) {
	dir := testfixture.Unpack(t, name)
	st := stores(t, name, dir)
	o.Now = time.Now()
	clean, _ := check(t, st, o)
	before := map[string]int{}
	for _, f := range clean {
		before[mark(f)]++
	}
	b := &breaker{prefix: st[0].Prefix, users: filepath.Join(dir, "data/storage/users"), system: filepath.Join(dir, "data/storage/metadata")}
	if x, ok := st[0].Blobs.(*bucket); ok {
		b.objects = x
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			b.t = t
			defer b.back()
			c.damage(b)
			found, _ := check(t, st, o)
			compare(t, c.want, fresh(before, found))
		})
	}
	again, _ := check(t, st, o)
	if len(again) != len(clean) {
		t.Errorf("the cases left damage behind: %d findings, before %d", len(again), len(clean))
	}
}

func compare(t *testing.T, wants []want, got []consistency.Finding) {
	t.Helper()
	ok := len(got) == len(wants)
	for i := range wants {
		ok = ok && got[i].Class == wants[i].class && strings.Contains(got[i].Path, wants[i].path)
	}
	for _, f := range got {
		if !ok {
			t.Error("found ", show(f))
		} else {
			t.Log(show(f))
		}
	}
	if !ok {
		t.Errorf("want %v", wants)
	}
}

// TestBrokenBucket: the same for objects. Without reading them all a wrong checksum of the bucket tells that one is
// another; a bucket whose ETags are no checksums of contents makes no damage.
func TestBrokenBucket(t *testing.T) {
	broken(t, testfixture.OCISWithS3Blobs, consistency.Options{}, []brokenCase{
		{"an object is gone", func(b *breaker) { b.remove(b.object()) }, []want{{consistency.BlobMissing, "/Round 0/dup1.bin"}}},
		{"an object is cut off", func(b *breaker) { b.write(b.object(), []byte("short")) }, []want{{consistency.BlobSize, "/Round 0/dup1.bin"}}},
		{"another content of the same size", func(b *breaker) {
			b.write(b.object(), bytes.Repeat([]byte("x"), 60000))
		}, []want{{consistency.BlobChecksum, "/Round 0/dup1.bin"}}},
		{"an object of nobody", func(b *breaker) {
			b.write(filepath.Join(b.objects.dir, alan, ocis.NodePath(nowhere)), []byte("nobody's"))
		}, []want{{consistency.BlobOrphaned, "/blobs/de/ad/be/ef/"}}},
		{"objects of no space", func(b *breaker) {
			b.write(filepath.Join(b.objects.dir, nowhere, ocis.NodePath(nowhere)), []byte("nobody's"))
			b.undo = append(b.undo, func() { b.must(os.RemoveAll(filepath.Join(b.objects.dir, nowhere))) })
		}, []want{{consistency.BlobOrphaned, "(bucket)/" + nowhere}}},
		{"objects that a restore put aside", func(b *breaker) {
			dir := filepath.Join(b.objects.dir, "holdfast-aside-20261126T120000Z")
			b.write(filepath.Join(dir, nowhere, "x"), []byte("old"))
			b.undo = append(b.undo, func() { b.must(os.RemoveAll(dir)) })
		}, []want{{consistency.BlobOrphaned, "(bucket)/holdfast-aside-20261126T120000Z"}}},
		{"an object that cannot be read", func(b *breaker) {
			b.objects.bad = filepath.Base(b.object())
			b.undo = append(b.undo, func() { b.objects.bad = "" })
		}, []want{{consistency.Unreadable, "/Round 0/dup1.bin"}}},
		{"ETags that are no checksums", func(b *breaker) {
			b.objects.encrypted = true
			b.undo = append(b.undo, func() { b.objects.encrypted = false })
		}, nil},
	})
}

// object is the file of one object.
func (b *breaker) object() string {
	b.t.Helper()
	return filepath.Join(b.objects.dir, alan, ocis.NodePath(b.at(alan, "Round 0/dup1.bin").attrs().Text("blobid")))
}
