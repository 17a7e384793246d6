package newer_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/restore/newer"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

const alan = "b1f74ec4-dd7e-11ef-a543-03775734d0f7"

func TestNewer(t *testing.T) {
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dir := testfixture.Unpack(t, testfixture.OCIS)
	users := filepath.Join(dir, "data/storage/users")
	r, err := repo.Init(ctx, mem.New(), "pw", repo.InitOptions{KDF: repo.KDF{N: 1024, R: 1, P: 1}})
	must(err)
	inst := &ocis.Instance{Product: ocis.OpenCloud, Setup: "posix", BasePath: filepath.Join(dir, "data"), ConfigDir: filepath.Join(dir, "config"), Stores: []ocis.Store{
		{Name: "users", Root: users, Driver: "ocis", Layout: ocis.Decomposed, Prefix: ocis.PrefixOCIS},
	}}
	for _, kind := range []ocis.Kind{ocis.Metadata, ocis.Blobs} {
		inst.DataSets = append(inst.DataSets, ocis.DataSet{Name: "storage-users-" + string(kind), Kind: kind, Path: users, Store: "users", Found: true})
	}
	w := r.NewWriter(ctx)
	res, err := capture.Run(ctx, r, w, capture.Options{Instance: inst})
	must(err)
	tree, err := res.Finish(ctx, []byte("readme\n"))
	must(err)
	must(w.Flush(ctx))

	space := filepath.Join(users, ocis.SpacePath(alan))
	node := func(id string) string { return filepath.Join(space, "nodes", ocis.NodePath(id)) }
	find := func(p string) string {
		id := alan
		for _, name := range strings.Split(p, "/") {
			target, err := os.Readlink(filepath.Join(node(id), name))
			must(err)
			id = strings.ReplaceAll(strings.TrimPrefix(target, "../../../../../"), "/", "")
		}
		return id
	}
	run := func(save string) ([]string, []newer.Space) {
		var got []string
		list, err := newer.Run(ctx, r, tree, []newer.Store{{Root: users, Prefix: ocis.PrefixOCIS, Was: &res.Manifest.Stores[0]}}, newer.Options{
			Save: save,
			Found: func(it newer.Item) error {
				got = append(got, string(it.Kind)+" "+it.Path)
				return nil
			},
		})
		must(err)
		slices.Sort(got)
		return got, list
	}
	if got, list := run(""); len(got) > 0 || len(list) > 0 {
		t.Fatalf("nothing has changed, and it says %q %v", got, list)
	}

	// A new file, a changed one, a renamed one and a deleted one.
	edit := func(id string, fn func(a *ocis.Attributes)) {
		p, err := os.ReadFile(node(id) + ".mpk")
		must(err)
		a, err := ocis.ParseMPK(p)
		must(err)
		fn(&a)
		must(os.WriteFile(node(id)+".mpk", ocis.EncodeMPK(a), 0o600))
	}
	blob := func(id, content string) {
		p := filepath.Join(space, "blobs", ocis.NodePath(id))
		must(os.MkdirAll(filepath.Dir(p), 0o755))
		must(os.WriteFile(p, []byte(content), 0o644))
	}
	changed := find("Round 0/dup1.bin")
	blob("11111111-0000-4000-8000-000000000001", "changed")
	edit(changed, func(a *ocis.Attributes) {
		a.Set(ocis.PrefixOCIS, "blobid", []byte("11111111-0000-4000-8000-000000000001"))
		a.Set(ocis.PrefixOCIS, "blobsize", []byte("7"))
		a.Delete("cs.sha1")
	})
	made := "22222222-0000-4000-8000-000000000002"
	blob("33333333-0000-4000-8000-000000000003", "new")
	must(os.MkdirAll(filepath.Dir(node(made)), 0o755))
	must(os.WriteFile(node(made), nil, 0o600))
	must(os.WriteFile(node(made)+".mpk", ocis.EncodeMPK(ocis.Attributes{
		{Key: "user.ocis.blobid", Value: []byte("33333333-0000-4000-8000-000000000003")}, {Key: "user.ocis.blobsize", Value: []byte("3")},
		{Key: "user.ocis.type", Value: []byte("1")}, {Key: "user.ocis.mtime", Value: []byte("2026-11-25T10:00:00Z")},
	}), 0o600))
	round := node(find("Round 0"))
	must(os.Symlink("../../../../../"+ocis.NodePath(made), filepath.Join(round, "made.txt")))
	must(os.Rename(filepath.Join(round, "renamed.bin"), filepath.Join(round, "again.bin")))
	must(os.Remove(filepath.Join(round, "undeleted.txt")))

	save := filepath.Join(t.TempDir(), "newer")
	got, list := run(save)
	want := []string{"changed Round 0/dup1.bin", "deleted Round 0/undeleted.txt", "moved Round 0/again.bin", "new Round 0/made.txt"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if len(list) != 1 || list[0].New != 1 || list[0].Changed != 1 || list[0].Moved != 1 || list[0].Deleted != 1 || list[0].Bytes != 10 || list[0].Name != "personal/alan" {
		t.Errorf("%+v", list)
	}
	for p, content := range map[string]string{"personal/alan/Round 0/dup1.bin": "changed", "personal/alan/Round 0/made.txt": "new"} {
		data, err := os.ReadFile(filepath.Join(save, p))
		must(err)
		if string(data) != content {
			t.Errorf("%s holds %q", p, data)
		}
	}
	if fi, err := os.Stat(filepath.Join(save, "personal/alan/Round 0/made.txt")); err != nil || fi.ModTime().UTC().Format("2006-01-02T15") != "2026-11-25T10" {
		t.Errorf("%v, %v", fi, err)
	}

	// A space that is gone, and one that the snapshot does not have.
	must(os.RemoveAll(filepath.Join(users, "spaces/05")))
	_, list = run("")
	gone := slices.IndexFunc(list, func(s newer.Space) bool { return s.Gone })
	if gone < 0 || list[gone].ID != "056fc874-dd7f-11ef-ba84-af6fca4b7289" || list[gone].Deleted == 0 {
		t.Errorf("%+v", list)
	}
}
