package verify_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/pax/paxtest"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/verify"
)

// blobEntry ends the name of a blob's entry in the tar of the space.
func blobEntry(blob string) string { return "/blobs/" + ocis.NodePath(blob) }
func nodeEntry(key string) string  { return "/nodes/" + ocis.NodePath(key) }

// known makes a gap of which the manifest tells.
func known(blob string) func(m *snapshot.Manifest) {
	return func(m *snapshot.Manifest) {
		m.Proof.Complete = false
		m.Proof.Missing = append(m.Proof.Missing, snapshot.Missing{Space: "project/tiny", Path: "/folder/file.txt", BlobID: blob, Problem: "missing"})
	}
}

func drop(*paxtest.Item) bool { return false }

// set changes a record of an entry.
func set(k, v string) func(it *paxtest.Item) bool {
	return func(it *paxtest.Item) bool {
		it.Rec[k] = v
		return true
	}
}

func take(*snapshot.Node) *snapshot.Node { return nil }

const (
	complete   = true
	incomplete = false
)

type alteration struct {
	name     string
	alter    func(e *edit)
	complete bool
	want     []string // each is in one of the errors, and there are no others
}

// alterations are snapshots that differ from a good one in one way, and what must be found: that and
// nothing else.
var alterations = []alteration{
	{"nothing", func(*edit) {}, complete, nil},

	// the archives
	{"blob missing from the tar", func(e *edit) { e.entry(spaceTar, blobEntry(blobID), drop) }, incomplete,
		[]string{"blob " + blobID + " of node " + fileID + " is not in the snapshot"}},
	{"blob of a version missing from the tar", func(e *edit) { e.entry(spaceTar, blobEntry(oldBlob), drop) }, incomplete,
		[]string{"blob " + oldBlob + " of node " + fileID + ".REV.2025-01-01T00:00:00Z is not in the snapshot"}},
	{"blob of a node with attributes missing", func(e *edit) { e.entry(spaceTar, blobEntry(attrBlob), drop) }, incomplete,
		[]string{"blob " + attrBlob + " of node " + oldFile + " is not in the snapshot"}},
	{"blob of a node with an odd attribute missing", func(e *edit) { e.entry(spaceTar, blobEntry(oddBlob), drop) }, incomplete,
		[]string{"blob " + oddBlob + " of node " + oddFile + " is not in the snapshot"}},
	{"blob as a second name", func(e *edit) {
		e.tar(spaceTar, func(items []paxtest.Item) []paxtest.Item {
			i := slices.IndexFunc(items, func(it paxtest.Item) bool { return strings.HasSuffix(it.Name, blobEntry(oddBlob)) })
			twin := items[i]
			twin.Name = strings.Replace(twin.Name, blobEntry(oddBlob), blobEntry("00000000-aaaa-4bbb-8ccc-000000000000"), 1)
			items[i].Type, items[i].Link, items[i].Rec = '1', twin.Name, nil
			return slices.Insert(items, i, twin)
		})
	}, complete, nil},
	{"wrong size in the tar", func(e *edit) { e.entry(spaceTar, blobEntry(blobID), set(pax.Size, "13")) }, incomplete,
		[]string{`has "13" bytes, but "/storage/users/spaces/project/tiny/folder/file.txt" holds 12`}},
	{"no size in the tar", func(e *edit) { e.entry(spaceTar, blobEntry(blobID), set(pax.Size, "0x0c")) }, incomplete,
		[]string{`has "0x0c" bytes, but`}},
	{"no size of an empty file in the tar", func(e *edit) {
		e.folder("/config/files", func(n []*snapshot.Node) []*snapshot.Node {
			return append(n, &snapshot.Node{Name: "zz", Type: snapshot.File})
		})
		e.tar(spaceTar, func(items []paxtest.Item) []paxtest.Item {
			return append(items, paxtest.Item{Type: '0', Name: "zz", Rec: map[string]string{pax.Content: "/config/files/zz", pax.Size: "none"}})
		})
	}, incomplete, []string{`"zz" has "none" bytes, but`}},
	{"content nowhere", func(e *edit) { e.entry(spaceTar, blobEntry(blobID), set(pax.Content, folder+"/none")) }, incomplete,
		[]string{"which is not there"}},
	{"content is a folder", func(e *edit) { e.entry(spaceTar, blobEntry(blobID), set(pax.Content, folder)) }, incomplete,
		[]string{"which is not there"}},
	{"content by a way that restore does not go", func(e *edit) {
		e.entry(spaceTar, blobEntry(blobID), set(pax.Content, folder+"/../folder/file.txt"))
	}, incomplete, []string{"which is not there"}},
	{"content not as metadata says", func(e *edit) {
		e.entry(spaceTar, blobEntry(blobID), func(it *paxtest.Item) bool {
			it.Rec[pax.Content], it.Rec[pax.Size] = folder+"/odd.txt", "3"
			return true
		})
	}, incomplete, []string{"blob " + blobID + " of node " + fileID + " has 3 bytes, metadata says 12"}},
	{"content inline", func(e *edit) {
		e.entry(spaceTar, blobEntry(blobID), func(it *paxtest.Item) bool {
			it.Rec, it.Data = nil, []byte("hello world\n")
			return true
		})
	}, complete, nil},
	{"holes outside of the file", func(e *edit) { e.entry(spaceTar, blobEntry(blobID), set(pax.Holes, "4:9")) }, incomplete,
		[]string{`the list of holes is damaged at "4:9"`}},
	{"metadata of two minds", func(e *edit) {
		e.entry(spaceTar, nodeEntry(fileID)+".REV.2025-01-01T00:00:00Z.mpk", func(it *paxtest.Item) bool {
			it.Data = ocis.EncodeMPK(ocis.Attributes{{Key: "user.oc.blobid", Value: []byte(blobID)}, {Key: "user.oc.blobsize", Value: []byte("3")}})
			return true
		})
		e.setManifest(func(m *snapshot.Manifest) { m.Proof.Blobs-- })
	}, incomplete, []string{"blob " + blobID + " has 3 bytes by the metadata of node " + fileID + ".REV.2025-01-01T00:00:00Z and 12 by that of another"}},
	{"metadata without its node", func(e *edit) {
		e.entry(spaceTar, nodeEntry(fileID)+".REV.2025-01-01T00:00:00Z", drop)
		e.entry(spaceTar, blobEntry(oldBlob), drop)
		e.setManifest(func(m *snapshot.Manifest) { m.Proof.Blobs-- })
	}, complete, nil},
	{"attributes beside metadata", func(e *edit) {
		e.entry(spaceTar, nodeEntry(fileID), set(pax.Xattr+"user.oc.blobid", "void"))
	}, complete, nil},
	{"attributes behind metadata", func(e *edit) {
		e.tar(spaceTar, func(items []paxtest.Item) []paxtest.Item {
			i := slices.IndexFunc(items, func(it paxtest.Item) bool { return strings.HasSuffix(it.Name, nodeEntry(fileID)) })
			it := items[i]
			it.Rec[pax.Xattr+"user.oc.blobid"] = "void"
			return append(slices.Delete(items, i, i+1), it)
		})
	}, complete, nil},
	{"metadata that is lost", func(e *edit) { e.entry(spaceTar, nodeEntry(fileID)+".mpk", drop) }, incomplete,
		[]string{"its record speaks of 5 blobs, its metadata of 4"}},
	{"node that is lost", func(e *edit) { e.entry(spaceTar, nodeEntry(fileID), drop) }, incomplete,
		[]string{"its record speaks of 5 blobs, its metadata of 4"}},
	{"fifo in the place of a node", func(e *edit) {
		e.entry(spaceTar, nodeEntry(fileID), func(it *paxtest.Item) bool { it.Type = '6'; return true })
	}, incomplete, []string{"its record speaks of 5 blobs, its metadata of 4"}},
	{"upload missing", func(e *edit) { e.entry(storeTar, "uploads/"+upBlob, drop) }, incomplete,
		[]string{"blob " + upBlob + " of node " + upFile + " is not in the snapshot"}},
	{"upload of another size", func(e *edit) {
		e.entry(storeTar, "uploads/"+upBlob, func(it *paxtest.Item) bool { it.Data = it.Data[1:]; return true })
	}, incomplete, []string{"blob " + upBlob + " of node " + upFile + " is not in the snapshot"}},
	{"many large attributes", func(e *edit) {
		e.entry(spaceTar, nodeEntry(fileID), func(it *paxtest.Item) bool {
			for i := range 20 {
				it.Rec[fmt.Sprintf("%suser.%02d", pax.Xattr, i)] = strings.Repeat("v", 60_000)
			}
			return true
		})
	}, complete, nil},
	{"name that is no text", func(e *edit) {
		e.tar(storeTar, func(items []paxtest.Item) []paxtest.Item {
			return append(items, paxtest.Item{Type: '0', Name: "\xff", Rec: map[string]string{"hdrcharset": "BINARY"}})
		})
	}, complete, nil},
	{"archive cut off", func(e *edit) {
		p := e.read(spaceTar)
		e.content(spaceTar, p[:len(p)-1024])
	}, incomplete, []string{spaceTar + ": damaged tar stream"}},
	{"archive cut in half", func(e *edit) {
		p := e.read(spaceTar)
		e.content(spaceTar, p[:len(p)/2])
	}, incomplete, []string{spaceTar + ": damaged tar stream"}},
	{"archive missing", func(e *edit) { e.node(spaceTar, take) }, incomplete,
		[]string{spaceTar + ": no such file or folder in the snapshot"}},
	{"store's archive missing", func(e *edit) {
		e.node(storeTar, take)
		e.setManifest(known(upBlob)) // it was in there
	}, incomplete, []string{storeTar + ": no such file or folder in the snapshot"}},

	// the trees
	{"file with another size than its blobs", func(e *edit) {
		e.node(folder+"/file.txt", func(n *snapshot.Node) *snapshot.Node { n.Size = 13; return n })
	}, incomplete, []string{`folder/file.txt" has 12 bytes by its blobs and 13 by its record`}},
	{"file with other blobs than its size", func(e *edit) {
		e.node(folder+"/file.txt", func(n *snapshot.Node) *snapshot.Node {
			n.Content = []id.ID{e.blob("hello")}
			return n
		})
	}, incomplete, []string{`folder/file.txt" has 5 bytes by its blobs and 12 by its record`}},
	{"file outside of the stores with another size", func(e *edit) {
		e.node("/config/files/opencloud.yaml", func(n *snapshot.Node) *snapshot.Node { n.Size++; return n })
	}, incomplete, []string{`opencloud.yaml" has 5 bytes by its blobs and 6 by its record`}},
	{"blob not in the index", func(e *edit) {
		e.node(folder+"/file.txt", func(n *snapshot.Node) *snapshot.Node { n.Content = []id.ID{{1, 2, 3, 4}}; return n })
	}, incomplete, []string{`folder/file.txt" needs blob 01020304, which is not in the index`}},
	{"blob of an archive not in the index", func(e *edit) {
		e.node(spaceTar, func(n *snapshot.Node) *snapshot.Node { n.Content = []id.ID{{1, 2, 3, 4}}; return n })
	}, incomplete, []string{spaceID + `.tar" needs blob 01020304, which is not in the index`}},
	{"blob of the manifest not in the index", func(e *edit) {
		e.node(snapshot.ManifestPath, func(n *snapshot.Node) *snapshot.Node { n.Content = []id.ID{{1, 2, 3, 4}}; return n })
	}, incomplete, []string{`manifest.json" needs blob 01020304, which is not in the index`}},
	{"folder not in the index", func(e *edit) {
		e.node(folder, func(n *snapshot.Node) *snapshot.Node { n.Subtree = id.ID{1, 2, 3, 4}; return n })
	}, incomplete, []string{`tiny/folder": load tree 01020304`}},
	{"folder not in the index, in two places", func(e *edit) {
		e.folder(folder, func(n []*snapshot.Node) []*snapshot.Node {
			return append(n, dir("y", id.ID{1, 2, 3, 4}), dir("z", id.ID{1, 2, 3, 4}))
		})
	}, incomplete, []string{`folder/y": load tree 01020304`}},
	{"folder of archives not in the index", func(e *edit) {
		e.node("/storage/users/metadata", func(n *snapshot.Node) *snapshot.Node { n.Subtree = id.ID{1, 2, 3, 4}; return n })
	}, incomplete, []string{`users/metadata": load tree 01020304`}},
	{"names not sorted", func(e *edit) {
		e.folder(folder, func(n []*snapshot.Node) []*snapshot.Node { return append(n[1:], n[0]) })
	}, incomplete, []string{`folder/attr.txt" is not in the order`}},
	{"name twice", func(e *edit) {
		e.folder(folder, func(n []*snapshot.Node) []*snapshot.Node { return slices.Insert(n, 1, n[0]) })
	}, incomplete, []string{`folder/attr.txt" stands twice`}},
	{"name twice with another between", func(e *edit) {
		e.folder(folder, func(n []*snapshot.Node) []*snapshot.Node { return slices.Insert(n, 2, n[0]) })
	}, incomplete, []string{`folder/attr.txt" stands twice`}},
	{"name twice behind what is not sorted", func(e *edit) {
		e.folder(folder, func(n []*snapshot.Node) []*snapshot.Node {
			return append([]*snapshot.Node{e.newFile("zz", "z"), n[0]}, append(n, e.newFile("zz", "z"), e.newFile("yy", "y"))...)
		})
	}, incomplete, []string{`folder/attr.txt" is not in the order`, `folder/attr.txt" stands twice`, `folder/zz" stands twice`}},
	{"name empty", named(""), incomplete, []string{`folder/" is no name`}},
	{"name dot", named("."), incomplete, []string{`folder/." is no name`}},
	{"name dot dot", named(".."), incomplete, []string{`folder/.." is no name`}},
	{"name with a slash", named("a/b"), incomplete, []string{`folder/a/b" is no name`}},
	{"name with a NUL", named("a\x00b"), incomplete, []string{`folder/a\x00b" is no name`}},
	{"name odd but good", named("a\n\xff\\..."), complete, nil},
	{"holes outside of a file", func(e *edit) {
		e.node(folder+"/file.txt", func(n *snapshot.Node) *snapshot.Node {
			n.Xattrs = append(n.Xattrs, snapshot.Xattr{Name: snapshot.AttrHoles, Value: []byte("12:1")})
			return n
		})
	}, incomplete, []string{`folder/file.txt": the list of holes is damaged`}},
	{"folders that lie deep", func(e *edit) { e.deep(e.saveTree([]*snapshot.Node{e.newFile("bottom", "x")})) }, complete, nil},
	{"damage that lies deep", func(e *edit) { e.deep(id.ID{1, 2, 3, 4}) }, incomplete, []string{"/d/d\": load tree 01020304"}},

	// the records
	{"manifest missing", func(e *edit) { e.node(snapshot.ManifestPath, take) }, incomplete,
		[]string{`"/manifest.json": no such file or folder in the snapshot`}},
	{"manifest damaged", func(e *edit) { e.content(snapshot.ManifestPath, []byte("{")) }, incomplete, []string{": manifest: "}},
	{"manifest counts more", func(e *edit) { e.setManifest(func(m *snapshot.Manifest) { m.Proof.Blobs++ }) }, incomplete,
		[]string{"its record speaks of 6 blobs, its metadata of 5"}},
	{"manifest says incomplete", func(e *edit) { e.setManifest(func(m *snapshot.Manifest) { m.Proof.Complete = false }) }, incomplete, nil},
	{"known missing blob", func(e *edit) {
		e.entry(spaceTar, blobEntry(blobID), drop)
		e.setManifest(known(blobID))
	}, incomplete, nil},
	{"known missing blob and another", func(e *edit) {
		e.entry(spaceTar, blobEntry(blobID), drop)
		e.entry(spaceTar, blobEntry(oldBlob), drop)
		e.setManifest(known(blobID))
	}, incomplete, []string{"blob " + oldBlob + " of node"}},
	{"tree missing", func(e *edit) { e.sn.Tree = &id.ID{1, 2, 3, 4} }, incomplete,
		[]string{`:/": load tree 01020304`}},

	// the packs
	{"pack missing", func(e *edit) { ok(e.be.Remove(context.Background(), e.inOwnPack())) }, incomplete, []string{"the pack is missing"}},
	{"pack of an archive missing", func(e *edit) {
		e.entry(spaceTar, nodeEntry(fileID), func(it *paxtest.Item) bool { it.Sec++; return true })
		n := must(snapshot.Lookup(e.t.Context(), e.r, *e.sn.Tree, spaceTar))
		ok(e.be.Remove(context.Background(), e.packOf(n.Content[0])))
	}, incomplete, []string{"the pack is missing"}},
	{"pack missing of which there is another", func(e *edit) {
		other := e.open() // which does not know yet that the blob is there
		h := e.inOwnPack()
		w := other.NewWriter(e.t.Context())
		_, _, err := w.Save(e.t.Context(), 0, []byte("alone in its pack"))
		ok(err)
		_, _, err = w.Save(e.t.Context(), 0, []byte("so that the pack is another"))
		ok(err)
		ok(w.Flush(e.t.Context()))
		ok(e.r.LoadIndex(e.t.Context()))
		ok(e.be.Remove(e.t.Context(), h))
	}, complete, []string{"the pack is missing"}},
	{"pack cut off", func(e *edit) {
		h := e.inOwnPack()
		p := e.load(h)
		e.be.Put(h, p[:len(p)-1])
	}, incomplete, []string{"by the index it should have"}},
}

func named(name string) func(e *edit) {
	return func(e *edit) {
		e.folder(folder, func(n []*snapshot.Node) []*snapshot.Node {
			n = append(n, e.newFile(name, "x"))
			slices.SortFunc(n, func(a, b *snapshot.Node) int { return strings.Compare(a.Name, b.Name) })
			return n
		})
	}
}

// deep puts d below more folders than any path can have.
func (e *edit) deep(d id.ID) {
	for range 5000 {
		d = e.saveTree([]*snapshot.Node{dir("d", d)})
	}
	e.folder(folder, func(n []*snapshot.Node) []*snapshot.Node { return slices.Insert(n, 1, dir("d", d)) })
}

// twice saves two snapshots that differ elsewhere.
func (e *edit) twice() {
	for i := range 2 {
		e.folder("/config/files", func(n []*snapshot.Node) []*snapshot.Node {
			return append(n, e.newFile(fmt.Sprintf("z%d", i), "z"))
		})
		e.sn.Time = time.Unix(2e9+int64(i), 0)
		ok(snapshot.Save(e.t.Context(), e.r, e.sn))
	}
}

func run(t *testing.T, e *edit, readData bool) *verify.Report {
	t.Helper()
	rep, err := verify.Run(t.Context(), e.r, verify.Options{ReadData: readData})
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

// expect demands these errors and no others.
func expect(t *testing.T, rep *verify.Report, want ...string) {
	t.Helper()
	left := slices.Clone(rep.Errors)
	for _, w := range want {
		i := slices.IndexFunc(left, func(s string) bool { return strings.Contains(s, w) })
		if i < 0 {
			t.Errorf("not found: %s", w)
			continue
		}
		left = slices.Delete(left, i, i+1)
	}
	for _, s := range left {
		t.Errorf("found too much: %.500s", s)
	}
	if len(rep.Hints) > 0 {
		t.Errorf("hints: %q", rep.Hints)
	}
}

func verdict(t *testing.T, rep *verify.Report, want bool) {
	t.Helper()
	if len(rep.Snapshots) != 1 {
		t.Fatalf("%d verdicts", len(rep.Snapshots))
	}
	if got := rep.Snapshots[0].Complete; got != want {
		t.Errorf("complete: %v, want %v", got, want)
	}
}

func TestAlterations(t *testing.T) {
	for _, c := range alterations {
		t.Run(c.name, func(t *testing.T) {
			e := open(t, decomposedBase())
			c.alter(e)
			e.commit()
			rep := run(t, e, false)
			expect(t, rep, c.want...)
			verdict(t, rep, c.complete)
		})
	}
}

// TestGoodSnapshot compares all that is counted with what capture counted.
func TestGoodSnapshot(t *testing.T) {
	for name, b := range map[string]base{"decomposed": decomposedBase(), "posix": posixBase()} {
		t.Run(name, func(t *testing.T) {
			e := open(t, b)
			rep := run(t, e, true)
			expect(t, rep)
			verdict(t, rep, complete)
			got, want := rep.Snapshots[0].Proof, e.manifest().Proof
			if got.Nodes != want.Nodes || got.Revisions != want.Revisions || got.Blobs != want.Blobs || got.Bytes != want.Bytes || got.InFlight != want.InFlight {
				t.Errorf("check counts %+v\ncapture %+v", got, want)
			}
			if want.Nodes < 4 || want.Revisions != 1 || want.Blobs < 3 {
				t.Errorf("the snapshot holds too little: %+v", want)
			}
		})
	}
}

var (
	posixSize = pax.Xattr + "user.oc.blobsize"
	posixFile = func(e *edit, change func(it *paxtest.Item) bool) { e.entry(spaceTar, "/folder/file.txt", change) }
)

// posixAlterations are the same for a space of the posix driver.
var posixAlterations = []alteration{
	{"metadata says another size", func(e *edit) { posixFile(e, set(posixSize, "13")) }, incomplete,
		[]string{`folder/file.txt" has 12 bytes, its metadata says 13`}},
	{"trashed file of another size", func(e *edit) { e.entry(spaceTar, ".trashitem", set(posixSize, "13")) }, incomplete,
		[]string{`.trashitem" has 7 bytes, its metadata says 13`}},
	{"version of another size", func(e *edit) { e.entry(spaceTar, ".REV.2025-01-01T00:00:00Z", set(posixSize, "13")) }, incomplete,
		[]string{`.REV.2025-01-01T00:00:00Z" has 3 bytes, its metadata says 13`}},
	{"changed behind the server's back", func(e *edit) {
		posixFile(e, func(it *paxtest.Item) bool { it.Sec++; it.Rec[posixSize] = "13"; return true })
	}, complete, nil},
	{"in flight", func(e *edit) {
		posixFile(e, func(it *paxtest.Item) bool {
			it.Rec[posixSize], it.Rec[pax.Xattr+"user.oc.nodestatus"] = "6", "processing:x"
			return true
		})
		e.tar(storeTar, func(items []paxtest.Item) []paxtest.Item {
			return append(items, paxtest.Item{Type: '0', Name: "uploads/" + blobID, Data: []byte("upload")})
		})
	}, complete, nil},
	{"in flight without its upload", func(e *edit) {
		posixFile(e, func(it *paxtest.Item) bool {
			it.Rec[posixSize], it.Rec[pax.Xattr+"user.oc.nodestatus"] = "6", "processing:x"
			return true
		})
	}, incomplete, []string{`folder/file.txt" has 12 bytes, its metadata says 6`}},
	{"in flight with another upload", func(e *edit) {
		posixFile(e, func(it *paxtest.Item) bool {
			it.Rec[posixSize], it.Rec[pax.Xattr+"user.oc.nodestatus"] = "6", "processing:x"
			return true
		})
		e.tar(storeTar, func(items []paxtest.Item) []paxtest.Item {
			return append(items, paxtest.Item{Type: '0', Name: "uploads/" + blobID, Data: []byte("up")})
		})
	}, incomplete, []string{`folder/file.txt" has 12 bytes, its metadata says 6`}},
	{"second name of a file", func(e *edit) {
		e.tar(spaceTar, func(items []paxtest.Item) []paxtest.Item {
			i := slices.IndexFunc(items, func(it paxtest.Item) bool { return strings.HasSuffix(it.Name, "/folder/odd.txt") })
			items[i].Type, items[i].Link, items[i].Rec = '1', items[i-1].Name, nil
			return items
		})
	}, complete, nil},
	{"known", func(e *edit) { posixFile(e, set(posixSize, "13")); e.setManifest(known(blobID)) }, incomplete, nil},
	{"content nowhere", func(e *edit) { posixFile(e, set(pax.Content, "/storage/none")) }, incomplete, []string{"which is not there"}},
	{"wrong size", func(e *edit) { posixFile(e, set(pax.Size, "13")) }, incomplete, []string{`has "13" bytes, but`}},
}

func TestPosix(t *testing.T) {
	for _, c := range posixAlterations {
		t.Run(c.name, func(t *testing.T) {
			e := open(t, posixBase())
			c.alter(e)
			e.commit()
			rep := run(t, e, false)
			expect(t, rep, c.want...)
			verdict(t, rep, c.complete)
		})
	}
}

func TestDamagedByte(t *testing.T) {
	e := open(t, decomposedBase())
	h := e.inOwnPack()
	e.commit()
	p := e.load(h)
	p[20] ^= 1
	e.be.Put(h, p)
	rep := run(t, e, false)
	expect(t, rep) // only reading tells
	rep = run(t, e, true)
	expect(t, rep, h.Name)
	verdict(t, rep, incomplete)
}

// TestKnownGapsAreInTheVerdict: whoever reads the verdict need not look into the manifest.
func TestKnownGapsAreInTheVerdict(t *testing.T) {
	e := open(t, decomposedBase())
	e.setManifest(func(m *snapshot.Manifest) {
		known(blobID)(m)
		m.Proof.Unreadable = []snapshot.Unreadable{{Path: "/x", Error: "y"}}
		m.Proof.NotCaptured = []string{"idm"}
	})
	e.commit()
	rep := run(t, e, false)
	expect(t, rep)
	p := rep.Snapshots[0].Proof
	if len(p.Missing) != 1 || p.Missing[0].BlobID != blobID || len(p.Unreadable) != 1 || len(p.NotCaptured) != 1 {
		t.Errorf("proof %+v", p)
	}
}

func TestSnapshotRecords(t *testing.T) {
	for _, c := range []struct {
		name string
		harm func(e *edit)
		want string
		own  []bool // verdicts
	}{
		{"without a tree", func(e *edit) {
			must(e.r.SaveUnpacked(e.t.Context(), backend.SnapshotFile, []byte(`{"time":"2026-01-02T03:04:05Z","tags":["holdfast"]}`)))
		}, "has no tree", []bool{complete, incomplete}},
		{"without a tree, of another program", func(e *edit) {
			must(e.r.SaveUnpacked(e.t.Context(), backend.SnapshotFile, []byte(`{"time":"2026-01-02T03:04:05Z"}`)))
		}, "has no tree", []bool{complete}},
		{"unreadable", func(e *edit) {
			e.be.Put(backend.Handle{Type: backend.SnapshotFile, Name: strings.Repeat("ab", 32)}, []byte("no snapshot, but long enough for one"))
		}, "load snapshot abababab", []bool{complete}},
		{"no JSON", func(e *edit) { must(e.r.SaveUnpacked(e.t.Context(), backend.SnapshotFile, []byte(`{"time":`))) }, "load snapshot", []bool{complete}},
		{"of another program", func(e *edit) {
			e.sn.Tags, e.sn.Time = nil, time.Unix(2e9, 0)
			e.node(snapshot.ManifestPath, take)
			ok(snapshot.Save(e.t.Context(), e.r, e.sn))
		}, "", []bool{complete}},
		{"two with one damage", func(e *edit) {
			e.node(folder+"/file.txt", func(n *snapshot.Node) *snapshot.Node { n.Content = []id.ID{{1, 2, 3, 4}}; return n })
			e.twice()
		}, "needs blob 01020304", []bool{complete, incomplete, incomplete}},
		{"two with one folder lost", func(e *edit) {
			e.node(folder, func(n *snapshot.Node) *snapshot.Node { n.Subtree = id.ID{1, 2, 3, 4}; return n })
			e.twice()
		}, "load tree 01020304", []bool{complete, incomplete, incomplete}},
		{"two of which one is damaged", func(e *edit) {
			e.sn.Time = time.Unix(2e9, 0)
			e.node("/config/files/opencloud.yaml", func(n *snapshot.Node) *snapshot.Node { n.Size++; return n })
			ok(snapshot.Save(e.t.Context(), e.r, e.sn))
		}, "has 5 bytes by its blobs and 6 by its record", []bool{complete, incomplete}},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := open(t, decomposedBase())
			c.harm(e)
			rep := run(t, e, false)
			if c.want == "" {
				expect(t, rep)
			} else {
				expect(t, rep, c.want)
			}
			var own []bool
			for _, s := range rep.Snapshots {
				own = append(own, s.Complete)
			}
			if !slices.Equal(own, c.own) {
				t.Errorf("verdicts %v, want %v", own, c.own)
			}
		})
	}
}

func TestCancelled(t *testing.T) {
	e := open(t, decomposedBase())
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	if rep, err := verify.Run(ctx, e.r, verify.Options{}); err == nil {
		t.Errorf("a check that was cancelled says %+v", rep)
	}
}
