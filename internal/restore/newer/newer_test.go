package newer_test

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/browse/browsetest"
	"github.com/holdfast-backup/holdfast/internal/bucket"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/restore/newer"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

const alan = "b1f74ec4-dd7e-11ef-a543-03775734d0f7"

func TestNewer(t *testing.T) {
	for _, name := range []string{testfixture.OCIS, testfixture.OCISWithS3Blobs} {
		t.Run(name, func(t *testing.T) { testNewer(t, browsetest.Unpack(t, name)) })
	}
}

func testNewer(t *testing.T, inst *browsetest.Instance) {
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	inst.Trim(t)
	users := inst.Store("users").Root
	r := browsetest.NewRepo(t)
	sn := browsetest.Backup(t, r, inst, time.Now())
	m, err := snapshot.LoadManifest(ctx, r, *sn.Tree)
	must(err)
	var blobs func(ctx context.Context, space, blob string) (io.ReadCloser, error)
	if b := inst.Bucket(t); b != nil {
		blobs = func(ctx context.Context, space, blob string) (io.ReadCloser, error) {
			return b.Get(ctx, bucket.Key(space, blob), "")
		}
	}
	was := slices.IndexFunc(m.Stores, func(s snapshot.Store) bool { return s.Name == "users" })

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
		list, err := newer.Run(ctx, r, *sn.Tree, []newer.Store{{Root: users, Prefix: ocis.PrefixOCIS, Was: &m.Stores[was], Blobs: blobs}}, newer.Options{
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
		if inst.Objects != "" {
			p = filepath.Join(inst.Objects, bucket.Key(alan, id))
		}
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

// TestPosix: the same for files that are what users see.
func TestPosix(t *testing.T) {
	inst := browsetest.Unpack(t, testfixture.OpenCloudPosix)
	inst.Trim(t)
	r := browsetest.NewRepo(t)
	sn := browsetest.Backup(t, r, inst, time.Now())
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	m, err := snapshot.LoadManifest(t.Context(), r, *sn.Tree)
	must(err)
	st := inst.Store("users")
	run := func(save string) ([]string, []newer.Space) {
		t.Helper()
		var got []string
		for i := range m.Stores {
			if m.Stores[i].Name != "users" {
				continue
			}
			list, err := newer.Run(t.Context(), r, *sn.Tree, []newer.Store{{Root: st.Root, Prefix: st.Prefix, Was: &m.Stores[i]}}, newer.Options{
				Save: save, Found: func(it newer.Item) error {
					got = append(got, string(it.Kind)+" "+it.Name+"/"+it.Path)
					return nil
				},
			})
			must(err)
			slices.Sort(got)
			return got, list
		}
		t.Fatal("no such store")
		return nil, nil
	}
	if got, list := run(""); len(got) > 0 || len(list) > 0 {
		t.Fatalf("nothing has changed, and it says %q %v", got, list)
	}
	at := func(p string) string { return filepath.Join(st.Root, "users/alan", p) }
	must(os.WriteFile(at("Round 0/dup1.bin"), []byte("changed"), 0o600))
	must(os.WriteFile(at("Round 0/made.txt"), []byte("new"), 0o600)) // the server has not seen it
	must(os.Rename(at("Round 0/renamed.bin"), at("Round 1/again.bin")))
	must(os.Remove(at("Round 0/versioned.txt")))
	must(os.Symlink("/etc/passwd", at("Round 0/link"))) // no file of anybody
	must(os.RemoveAll(filepath.Join(st.Root, "users/mary")))
	save := filepath.Join(t.TempDir(), "newer")
	got, list := run(save)
	want := []string{
		"changed personal/alan/Round 0/dup1.bin", "deleted personal/alan/Round 0/versioned.txt",
		"moved personal/alan/Round 1/again.bin", "new personal/alan/Round 0/made.txt",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if len(list) != 2 || list[0].New != 1 || list[0].Bytes != 10 || !list[1].Gone || list[1].Name != "personal/mary" {
		t.Errorf("%+v", list)
	}
	for p, content := range map[string]string{"Round 0/dup1.bin": "changed", "Round 0/made.txt": "new"} {
		if data, err := os.ReadFile(filepath.Join(save, "personal/alan", p)); err != nil || string(data) != content {
			t.Errorf("%s holds %q, %v", p, data, err)
		}
	}
}
