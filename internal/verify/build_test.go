package verify_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/pax/paxtest"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

const (
	spaceID  = "11111111-aaaa-4bbb-8ccc-000000000001"
	folderID = "22222222-aaaa-4bbb-8ccc-000000000002"
	fileID   = "33333333-aaaa-4bbb-8ccc-000000000003"
	blobID   = "44444444-aaaa-4bbb-8ccc-000000000004"
	oldBlob  = "55555555-aaaa-4bbb-8ccc-000000000005" // of an old version
	upFile   = "66666666-aaaa-4bbb-8ccc-000000000006" // its upload is not finished
	upBlob   = "77777777-aaaa-4bbb-8ccc-000000000007"
	oldFile  = "88888888-aaaa-4bbb-8ccc-000000000008" // its metadata lies in attributes
	attrBlob = "99999999-aaaa-4bbb-8ccc-000000000009"
	oddFile  = "aaaaaaaa-aaaa-4bbb-8ccc-00000000000a" // has an attribute that makes no sense
	oddBlob  = "bbbbbbbb-aaaa-4bbb-8ccc-00000000000b"

	storeTar = "/storage/users/store.tar"
	spaceTar = "/storage/users/metadata/" + spaceID + ".tar"
	folder   = "/storage/users/spaces/project/tiny/folder"
	password = "pw"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func ok(err error) {
	if err != nil {
		panic(err)
	}
}

// source is an instance on disk.
type source struct {
	dir  string
	inst *ocis.Instance
}

func newSource(dir string, layout ocis.Layout) *source {
	s := &source{dir: dir}
	s.put(s.dir+"/config/opencloud.yaml", "a: b\n")
	s.put(s.dir+"/data/idm/idm.boltdb", "identities")
	users := s.dir + "/data/storage/users"
	ok(os.MkdirAll(users, 0o700))
	s.inst = &ocis.Instance{Product: ocis.OpenCloud, Setup: "posix", BasePath: s.dir + "/data", ConfigDir: s.dir + "/config",
		Stores: []ocis.Store{{Name: "users", Root: users, Driver: "decomposed", Layout: layout, Prefix: "user.oc."}},
		DataSets: []ocis.DataSet{
			{Name: "config", Kind: ocis.Config, Path: s.dir + "/config", Class: ocis.Required, Found: true},
			{Name: "idm", Kind: ocis.System, Path: s.dir + "/data/idm", Class: ocis.Required, Found: true},
			{Name: "storage-users", Kind: ocis.Metadata, Path: users, Store: "users", Class: ocis.Required, Found: true},
			{Name: "storage-users-blobs", Kind: ocis.Blobs, Path: users, Store: "users", Class: ocis.Required, Found: true},
		}}
	return s
}

func (s *source) put(p, data string) {
	ok(os.MkdirAll(filepath.Dir(p), 0o700))
	ok(os.WriteFile(p, []byte(data), 0o600))
}

func (s *source) users(rel string) string { return s.dir + "/data/storage/users/" + rel }
func (s *source) node(key string) string {
	return s.users(ocis.SpacePath(spaceID) + "/nodes/" + ocis.NodePath(key))
}

func (s *source) blob(blob, data string) {
	s.put(s.users(ocis.SpacePath(spaceID)+"/blobs/"+ocis.NodePath(blob)), data)
}

func (s *source) meta(key string, attrs ...string) {
	var a ocis.Attributes
	for i := 0; i < len(attrs); i += 2 {
		a = append(a, ocis.Attribute{Key: "user.oc." + attrs[i], Value: []byte(attrs[i+1])})
	}
	s.put(s.node(key)+".mpk", string(ocis.EncodeMPK(a)))
}

func (s *source) link(parent, name, child string) {
	ok(os.Symlink("../../../../../"+ocis.NodePath(child), filepath.Join(s.node(parent), name)))
}

func (s *source) file(key, name, blob string, size int, attrs ...string) {
	s.put(s.node(key), "")
	s.meta(key, append([]string{"type", "1", "name", name, "parentid", folderID, "id", key, "blobid", blob, "blobsize", strconv.Itoa(size)}, attrs...)...)
	if !strings.Contains(key, ".REV.") {
		s.link(folderID, name, key)
	}
}

// decomposed fills the store with what a store can hold.
func (s *source) decomposed() {
	ok(os.MkdirAll(s.node(spaceID), 0o700))
	s.meta(spaceID, "id", spaceID, "name", "Tiny", "space.id", spaceID, "space.name", "Tiny", "space.alias", "project/tiny", "space.type", "project")
	ok(os.MkdirAll(s.node(folderID), 0o700))
	s.meta(folderID, "type", "2", "name", "folder", "parentid", spaceID)
	s.link(spaceID, "folder", folderID)
	s.file(fileID, "file.txt", blobID, 12)
	s.blob(blobID, "hello world\n")
	s.file(fileID+".REV.2025-01-01T00:00:00Z", "file.txt", oldBlob, 3)
	s.blob(oldBlob, "old")
	s.file(upFile, "up.txt", upBlob, 6)
	s.put(s.users("uploads/"+upBlob), "upload")
	s.file(oddFile, "odd.txt", oddBlob, 3, "mtime", "yesterday")
	s.blob(oddBlob, "odd")
	s.put(s.node(oldFile), "")
	for k, v := range map[string]string{"type": "1", "name": "attr.txt", "blobid": attrBlob, "blobsize": "4", "mtime": "long ago", "treesize": "x"} {
		ok(unix.Setxattr(s.node(oldFile), "user.oc."+k, []byte(v), 0))
	}
	s.blob(attrBlob, "attr")
	s.link(folderID, "attr.txt", oldFile)
	// Left over by a crash, and what nobody knows: no nodes.
	s.put(filepath.Join(filepath.Dir(s.node(fileID)), "."+path.Base(s.node(fileID))+".mpk1234"), "x")
	s.put(s.node(fileID)+".REV.some time", "x")
	ok(os.Symlink("x", s.node(fileID)+"-link"))
}

// posix makes a space whose files have their metadata in attributes.
func (s *source) posix() {
	s.inst.Stores[0].Driver = "posix"
	set := func(rel string, attrs ...string) {
		for i := 0; i < len(attrs); i += 2 {
			ok(unix.Setxattr(s.users(rel), "user.oc."+attrs[i], []byte(attrs[i+1]), 0))
		}
	}
	file := func(rel, key, blob, data string, attrs ...string) {
		s.put(s.users(rel), data)
		at := time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)
		ok(os.Chtimes(s.users(rel), at, at))
		set(rel, append([]string{"id", key, "type", "1", "name", path.Base(rel), "blobid", blob, "blobsize", strconv.Itoa(len(data)), "mtime", at.Format(time.RFC3339Nano)}, attrs...)...)
	}
	root := "projects/" + spaceID
	ok(os.MkdirAll(s.users(root+"/folder"), 0o700))
	set(root, "id", spaceID, "name", "Tiny", "space.id", spaceID, "space.name", "Tiny", "space.alias", "project/tiny", "space.type", "project")
	set(root+"/folder", "id", folderID, "type", "2")
	file(root+"/folder/file.txt", fileID, blobID, "hello world\n")
	file(root+"/folder/odd.txt", oddFile, oddBlob, "odd", "treesize", "x")
	file(root+"/.oc-nodes/"+ocis.NodePath(fileID)+".REV.2025-01-01T00:00:00Z", fileID, oldBlob, "old")
	file(root+"/.Trash/files/"+oldFile+".trashitem", oldFile, attrBlob, "trashed")
	s.put(s.users(root+"/.Trash/info/"+oldFile+".trashinfo"), "[Trash Info]\nPath=folder/gone.txt\nDeletionDate=2026-01-01T00:00:00Z\n")
	file(root+"/.oc-tmp/half", upFile, upBlob, "half")
	file(root+"/.Trash/files/stray", upFile, upBlob, "stray")
	file(root+"/.Trash/stray.trashitem", upFile, upBlob, "stray")
	for _, rel := range []string{"/.oc-tmp/half", "/.Trash/files/stray", "/.Trash/stray.trashitem"} { // none of the users' files: nothing is wrong
		set(root+rel, "blobsize", "99")
	}
	file(root+"/folder/file.txt.mlock", upFile, upBlob, "")
	s.put(s.users(root+"/folder/unknown.txt"), "not seen by the server yet")
}

// base is a repository with one good snapshot. Making it is half the work, so that each test changes a copy.
type base struct {
	be *mem.Backend
	sn id.ID
}

func newBase(layout ocis.Layout) base {
	dir := must(os.MkdirTemp("", "verify"))
	defer os.RemoveAll(dir)
	s := newSource(dir, layout)
	if layout == ocis.Posix {
		s.posix()
	} else {
		s.decomposed()
	}
	ctx := context.Background()
	be := mem.New()
	r := must(repo.Init(ctx, be, password, repo.InitOptions{KDF: repo.KDF{N: 1024, R: 8, P: 1}}))
	ok(r.LoadIndex(ctx))
	w := r.NewWriter(ctx)
	res := must(capture.Run(ctx, r, w, capture.Options{Instance: s.inst}))
	if p := res.Manifest.Proof; !p.Complete {
		panic(fmt.Sprintf("the snapshot to start from is not complete: %+v", p))
	}
	tree := must(res.Finish(ctx, nil))
	ok(w.Flush(ctx))
	sn := &snapshot.Snapshot{Time: time.Unix(1e9, 0), Tree: &tree, Paths: []string{"/x"}, Tags: []string{snapshot.Tag}}
	ok(snapshot.Save(ctx, r, sn))
	return base{be, sn.ID()}
}

var (
	decomposedBase = sync.OnceValue(func() base { return newBase(ocis.Decomposed) })
	posixBase      = sync.OnceValue(func() base { return newBase(ocis.Posix) })
)

// edit is a copy of the base, and the means to change it.
type edit struct {
	t  *testing.T
	be *mem.Backend
	r  *repo.Repository
	w  *repo.Writer
	sn *snapshot.Snapshot
}

func open(t *testing.T, b base) *edit {
	t.Helper()
	e := &edit{t: t, be: b.be.Clone()}
	e.r = e.open()
	e.w = e.r.NewWriter(t.Context())
	e.sn = must(snapshot.Load(t.Context(), e.r, b.sn))
	return e
}

func (e *edit) open() *repo.Repository {
	r := must(repo.Open(e.t.Context(), e.be, password, repo.Options{}))
	ok(r.LoadIndex(e.t.Context()))
	return r
}

// saveTree saves what snapshot.EncodeTree refuses as well.
func (e *edit) saveTree(nodes []*snapshot.Node) id.ID {
	var parts [][]byte
	for _, n := range nodes {
		p := snapshot.EncodeTree([]*snapshot.Node{n})
		parts = append(parts, p[len(`{"nodes":[`):len(p)-len("]}\n")])
	}
	p := append(append([]byte(`{"nodes":[`), bytes.Join(parts, []byte(","))...), "]}\n"...)
	d, _, err := e.w.Save(e.t.Context(), repo.TreeBlob, p)
	ok(err)
	return d
}

func (e *edit) blob(data string) id.ID {
	d, _, err := e.w.Save(e.t.Context(), repo.DataBlob, []byte(data))
	ok(err)
	return d
}

func (e *edit) newFile(name, data string) *snapshot.Node {
	return &snapshot.Node{Name: name, Type: snapshot.File, Size: uint64(len(data)), Content: []id.ID{e.blob(data)}}
}

// folder changes the list of nodes of a folder.
func (e *edit) folder(place string, change func([]*snapshot.Node) []*snapshot.Node) {
	var rewrite func(d id.ID, parts []string) id.ID
	rewrite = func(d id.ID, parts []string) id.ID {
		t := must(snapshot.LoadTree(e.t.Context(), e.r, d))
		if len(parts) == 0 {
			return e.saveTree(change(t.Nodes))
		}
		n := t.Find(parts[0])
		if n == nil {
			e.t.Fatalf("%q is not in the snapshot", place)
		}
		n.Subtree = rewrite(n.Subtree, parts[1:])
		return e.saveTree(t.Nodes)
	}
	parts := strings.FieldsFunc(place, func(r rune) bool { return r == '/' })
	root := rewrite(*e.sn.Tree, parts)
	e.sn.Tree = &root
	ok(e.w.Flush(e.t.Context()))
}

// node changes one node; nil takes it away.
func (e *edit) node(place string, change func(n *snapshot.Node) *snapshot.Node) {
	e.folder(path.Dir(place), func(nodes []*snapshot.Node) (out []*snapshot.Node) {
		found := false
		for _, n := range nodes {
			if n.Name == path.Base(place) {
				found = true
				n = change(n)
			}
			if n != nil {
				out = append(out, n)
			}
		}
		if !found {
			e.t.Fatalf("%q is not in the snapshot", place)
		}
		return out
	})
}

func (e *edit) content(place string, data []byte) {
	e.node(place, func(n *snapshot.Node) *snapshot.Node {
		n.Size, n.Content = uint64(len(data)), []id.ID{e.blob(string(data))}
		return n
	})
}

func (e *edit) read(place string) []byte {
	n := must(snapshot.Lookup(e.t.Context(), e.r, *e.sn.Tree, place))
	return must(snapshot.LoadContent(e.t.Context(), e.r, n, 1<<30))
}

// tar changes the entries of an archive.
func (e *edit) tar(place string, change func([]paxtest.Item) []paxtest.Item) {
	r := pax.NewReader(bytes.NewReader(e.read(place)))
	var items []paxtest.Item
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		ok(err)
		it := paxtest.Item{Type: h.Type, Name: h.Name, Link: h.Link, Mode: h.Mode, UID: h.UID, GID: h.GID, Sec: h.Sec, Nsec: h.Nsec,
			Data: must(io.ReadAll(r)), Rec: maps.Clone(h.Records)}
		if it.Rec == nil {
			it.Rec = map[string]string{}
		}
		for _, k := range []string{"path", "linkpath", "mtime"} {
			delete(it.Rec, k)
		}
		items = append(items, it)
	}
	var w paxtest.Writer
	for _, it := range change(items) {
		w.Add(it)
	}
	e.content(place, w.End())
}

// entry changes one entry; false takes it away.
func (e *edit) entry(place, suffix string, change func(it *paxtest.Item) bool) {
	e.tar(place, func(items []paxtest.Item) []paxtest.Item {
		i := slices.IndexFunc(items, func(it paxtest.Item) bool { return strings.HasSuffix(it.Name, suffix) })
		if i < 0 {
			e.t.Fatalf("no entry %q", suffix)
		}
		if !change(&items[i]) {
			return slices.Delete(items, i, i+1)
		}
		return items
	})
}

func (e *edit) manifest() *snapshot.Manifest {
	return must(snapshot.LoadManifest(e.t.Context(), e.r, *e.sn.Tree))
}

func (e *edit) setManifest(change func(m *snapshot.Manifest)) {
	m := e.manifest()
	change(m)
	e.content(snapshot.ManifestPath, must(json.Marshal(m)))
}

// commit saves the changed snapshot in the place of the good one.
func (e *edit) commit() {
	old := e.sn.ID()
	ok(e.w.Flush(e.t.Context()))
	ok(snapshot.Save(e.t.Context(), e.r, e.sn))
	if e.sn.ID() != old {
		ok(e.be.Remove(e.t.Context(), backend.Handle{Type: backend.SnapshotFile, Name: old.String()}))
	}
}

// packOf names the pack that holds a blob of data.
func (e *edit) packOf(d id.ID) backend.Handle {
	var h backend.Handle
	e.r.EachBlob(func(t repo.BlobType, blob, pack id.ID, _, _ int64) {
		if t == repo.DataBlob && blob == d {
			h = backend.Handle{Type: backend.PackFile, Name: pack.String()}
		}
	})
	return h
}

func (e *edit) load(h backend.Handle) (p []byte) {
	ok(e.be.Load(e.t.Context(), h, 0, 0, func(r io.Reader) (err error) {
		p, err = io.ReadAll(r)
		return err
	}))
	return p
}

// inOwnPack adds a file to the folder whose blob lies alone in its pack.
func (e *edit) inOwnPack() backend.Handle {
	ok(e.w.Flush(e.t.Context()))
	f := e.newFile("zz", "alone in its pack")
	e.folder(folder, func(n []*snapshot.Node) []*snapshot.Node { return append(n, f) })
	return e.packOf(f.Content[0])
}

func dir(name string, d id.ID) *snapshot.Node {
	return &snapshot.Node{Name: name, Type: snapshot.Dir, Mode: fs.ModeDir | 0o755, Subtree: d}
}
