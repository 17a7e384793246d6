package inplace_test

import (
	"archive/tar"
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/browse/browsetest"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/restore/inplace"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// entry is one entry of an archive.
type entry struct {
	name string
	typ  byte
	link string
	data string
	attr map[string]string // of the server
}

// made is a snapshot whose archives hold anything.
func made(t *testing.T, r *repo.Repository, space string, spaceTar, storeTar []entry) id.ID {
	t.Helper()
	w := r.NewWriter(t.Context())
	save := func(kind repo.BlobType, p []byte) id.ID {
		d, _, err := w.Save(t.Context(), kind, p)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	file := func(name string, list []entry) *snapshot.Node {
		var b bytes.Buffer
		tw := tar.NewWriter(&b)
		for _, e := range list {
			h := &tar.Header{Name: e.name, Typeflag: e.typ, Linkname: e.link, Mode: 0o700, Size: int64(len(e.data)), Format: tar.FormatPAX, ModTime: browsetest.Epoch, PAXRecords: map[string]string{}}
			for k, v := range e.attr {
				h.PAXRecords["SCHILY.xattr.user.oc."+k] = v
			}
			if err := tw.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			if _, err := tw.Write([]byte(e.data)); err != nil {
				t.Fatal(err)
			}
		}
		if err := tw.Close(); err != nil {
			t.Fatal(err)
		}
		return &snapshot.Node{Name: name, Type: snapshot.File, Size: uint64(b.Len()), Content: []id.ID{save(repo.DataBlob, b.Bytes())}}
	}
	dir := func(name string, nodes ...*snapshot.Node) *snapshot.Node {
		return &snapshot.Node{Name: name, Type: snapshot.Dir, Mode: fs.ModeDir | 0o755, Subtree: save(repo.TreeBlob, snapshot.EncodeTree(nodes))}
	}
	users := dir("users", dir("metadata", file(snapshot.SafeName(space)+".tar", spaceTar)), file("store.tar", storeTar))
	root := save(repo.TreeBlob, snapshot.EncodeTree([]*snapshot.Node{dir("storage", users)}))
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	return root
}

// TestHostile: whatever an archive says, nothing is written outside of the storage, nor into another space.
func TestHostile(t *testing.T) {
	const (
		space = "b1f74ec4-dd7e-11ef-a543-03775734d0f7"
		file  = "2cbe3600-ddd7-4b40-879a-4bb1fa73ccf5"
	)
	sp, node := ocis.SpacePath(space), ocis.NodePath(file)
	mpk := func(pairs ...string) string {
		var a ocis.Attributes
		for i := 0; i < len(pairs); i += 2 {
			a.Set("user.oc.", pairs[i], []byte(pairs[i+1]))
		}
		return string(ocis.EncodeMPK(a))
	}
	top := []entry{{name: sp + "/", typ: '5'}, {name: sp + "/nodes/", typ: '5'}}
	rootNode := []entry{
		{name: sp + "/nodes/" + ocis.NodePath(space) + ".mpk", typ: '0', data: mpk("name", "Alan")}, {name: sp + "/nodes/" + ocis.NodePath(space) + "/", typ: '5'},
	}
	alan := entry{name: "users/alan/", typ: '5', attr: map[string]string{"id": space, "space.id": space, "space.type": "personal"}}
	evil := map[string]string{"id": file, "type": "1", "blobsize": "4"}
	with := func(list []entry, more ...entry) []entry { return append(append([]entry{}, list...), more...) }
	for _, c := range []struct {
		name   string
		layout ocis.Layout
		space  []entry
		store  []entry
		node   string
	}{
		{name: "a name that leads up", space: with(top, entry{name: sp + "/../../../evil", typ: '0', data: "evil"})},
		{name: "another space", space: with(top, entry{name: "spaces/05/6fc874-dd7f-11ef-ba84-af6fca4b7289/evil", typ: '0', data: "evil"})},
		{name: "a file below a link", space: with(top, entry{name: sp + "/x", typ: '2', link: "../../../.."}, entry{name: sp + "/x/evil", typ: '0', data: "evil"})},
		{name: "a folder below a link", space: with(top, entry{name: sp + "/x", typ: '2', link: "../../05"}, entry{name: sp + "/x/evil/", typ: '5'})},
		{name: "a link in the place of a folder", space: with(top, entry{name: sp + "/x/", typ: '5'}, entry{name: sp + "/x", typ: '2', link: "../../.."}, entry{name: sp + "/x/evil", typ: '0', data: "evil"})},
		{name: "a further name of a file elsewhere", space: with(top, entry{name: sp + "/evil", typ: '1', link: "../other"})},
		{name: "an index elsewhere", space: with(top, rootNode...), store: []entry{{name: "indexes/../../evil.mpk", typ: '0', data: "\x80"}}},
		{
			name: "names and ids that lead elsewhere", node: file, space: with(with(top, rootNode...),
				entry{name: sp + "/nodes/" + node + ".mpk", typ: '0', data: mpk("name", "../../evil", "parentid", "../../../..", "type", "1", "blobid", "../../../../../evil", "blobsize", "4")},
				entry{name: sp + "/nodes/" + node, typ: '0'}),
		},
		{name: "posix: a name that leads up", layout: ocis.Posix, space: []entry{alan, {name: "users/alan/../../evil", typ: '0', data: "evil"}}},
		{name: "posix: another space", layout: ocis.Posix, space: []entry{alan, {name: "users/mary/evil", typ: '0', data: "evil"}}},
		{name: "posix: the whole of a space below a link", layout: ocis.Posix, space: []entry{alan, {name: "users/alan/x", typ: '2', link: "../mary"}, {name: "users/alan/x/evil", typ: '0', data: "evil", attr: evil}}},
		{name: "posix: a file below a link", layout: ocis.Posix, node: file, space: []entry{alan, {name: "users/alan/x", typ: '2', link: "../mary"}, {name: "users/alan/x/evil", typ: '0', data: "evil", attr: evil}}},
		{
			name: "posix: a folder with a link", layout: ocis.Posix, node: file, space: []entry{alan, {name: "users/alan/x/", typ: '5', attr: evil},
				{name: "users/alan/x/y", typ: '2', link: "../../mary"}, {name: "users/alan/x/y/evil", typ: '0', data: "evil"}},
		},
		{name: "posix: a space that is the root", layout: ocis.Posix, space: []entry{{name: "./", typ: '5', attr: alan.attr}}},
		{name: "posix: a space of the name of the root", layout: ocis.Posix, space: []entry{{name: "./", typ: '5', attr: alan.attr}, {name: "evil", typ: '0', data: "evil"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.layout == "" {
				c.layout = ocis.Decomposed
			}
			dir := t.TempDir()
			root := filepath.Join(dir, "in/users")
			for _, p := range []string{"spaces/05/6fc874-dd7f-11ef-ba84-af6fca4b7289", "users/mary", "users/alan", "indexes"} {
				if c.node == "" && p == "users/alan" || c.layout == ocis.Posix && p[:2] == "sp" {
					continue
				}
				if err := os.MkdirAll(filepath.Join(root, p), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			s := &scene{t: t, world: &world{pre: "user.oc."}}
			if c.node != "" && c.layout == ocis.Posix {
				s.setX(filepath.Join(root, "users/alan"), "space.id", space)
				s.setX(filepath.Join(root, "users/alan"), "id", space)
				s.setX(filepath.Join(root, "users/alan"), "space.type", "personal")
			} else if c.node != "" {
				at := filepath.Join(root, sp, "nodes", ocis.NodePath(space))
				s.must(os.MkdirAll(at, 0o755))
				s.must(os.WriteFile(at+".mpk", []byte(mpk("name", "Alan")), 0o600))
			}
			s.must(os.WriteFile(filepath.Join(root, "..", "other"), []byte("other"), 0o600))
			r := browsetest.NewRepo(t)
			tree := made(t, r, space, c.space, c.store)
			st := snapshot.Store{Name: "users", Layout: string(c.layout), Prefix: "user.oc."}
			_, err := inplace.Run(t.Context(), r, tree, inplace.Target{Space: snapshot.Space{ID: space}, Store: st, Node: c.node, Key: c.node},
				inplace.Options{Root: root, Now: time.Now()})
			t.Log(err)
			// The storage itself, below which only alan's space and what is built and put aside may have anything new.
			s.must(filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
				if err != nil {
					return err
				}
				rel, _ := filepath.Rel(root, p)
				allowed := underDir(rel, sp) || underDir(rel, "users/alan") || underDir(rel, inplace.JournalDir) || underDir(rel, "../users"+inplace.JournalDir)
				if d.Name() == "evil" && !allowed {
					t.Errorf("written: %s", rel)
				}
				return nil
			}))
			if p, err := os.ReadFile(filepath.Join(root, "..", "other")); err != nil || string(p) != "other" {
				t.Errorf("%q, %v", p, err)
			}
			if list, err := os.ReadDir(filepath.Join(root, "users/mary")); err != nil || len(list) > 0 {
				t.Errorf("in another space: %v, %v", list, err)
			}
		})
	}
}

func underDir(p, dir string) bool {
	rel, err := filepath.Rel(dir, p)
	return err == nil && filepath.IsLocal(rel)
}
