package capture_test

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// TestInParts: what is read in several parts, in whatever order, gives the tree, the manifest and the
// cache of one go.
func TestInParts(t *testing.T) {
	const name = "opencloud-posixfs"
	dir := testfixture.Unpack(t, name)
	for _, set := range []string{"data/idm", "config"} { // hard links in two data sets
		one := filepath.Join(dir, set, "one")
		if err := os.WriteFile(one, []byte(set), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Link(one, filepath.Join(dir, set, "two")); err != nil {
			t.Fatal(err)
		}
	}
	inst := instanceOf(dir, name)
	r, _ := newRepo(t)
	now := func() time.Time { return time.Now().Add(time.Hour) }
	whole, sn, _ := run(t, r, inst, capture.Options{Now: now})

	o := capture.Options{Instance: inst, Now: now, Cache: whole.Cache}
	c := capture.New(r, r.NewWriter(t.Context()), o)
	var order []string
	for _, root := range []string{inst.Stores[0].Root, inst.DataSets[0].Path} {
		if err := c.Read(t.Context(), capture.Part{Has: func(p string) bool {
			if p == root {
				order = append(order, p)
			}
			return p == root
		}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Read(t.Context(), capture.Part{}); err != nil {
		t.Fatal(err)
	}
	if len(order) != 2 {
		t.Fatalf("read %q: not in parts", order)
	}
	got := c.Result()
	if !reflect.DeepEqual(got.Manifest, whole.Manifest) {
		t.Errorf("manifest:\n%+v\nwant\n%+v", got.Manifest, whole.Manifest)
	}
	tree, err := got.Finish(t.Context(), []byte("readme\n"))
	if err != nil {
		t.Fatal(err)
	}
	if tree != *sn.Tree {
		t.Errorf("tree %v, want %v", tree, *sn.Tree)
	}
	if got.Stats.BytesRead > whole.Stats.BytesRead/2 {
		t.Errorf("%d of %d bytes were read again", got.Stats.BytesRead, whole.Stats.BytesRead)
	}
}

// TestPartKeepsTheCache: what was not read is still known afterwards.
func TestPartKeepsTheCache(t *testing.T) {
	const name = "opencloud-posixfs"
	inst := instanceOf(testfixture.Unpack(t, name), name)
	r, _ := newRepo(t)
	now := func() time.Time { return time.Now().Add(time.Hour) }
	whole, _, _ := run(t, r, inst, capture.Options{Now: now})
	c := capture.New(r, r.NewWriter(t.Context()), capture.Options{Instance: inst, Now: now, Cache: whole.Cache, Warm: true})
	if err := c.Read(t.Context(), capture.Part{Has: func(p string) bool { return p == inst.Stores[0].Root }}); err != nil {
		t.Fatal(err)
	}
	res, _, _ := run(t, r, inst, capture.Options{Now: now, Cache: whole.Cache})
	again, _, _ := run(t, r, inst, capture.Options{Now: now, Cache: c.Result().Cache})
	if again.Stats.BytesRead > res.Stats.BytesRead {
		t.Errorf("%d bytes were read, with the whole cache %d", again.Stats.BytesRead, res.Stats.BytesRead)
	}
}
