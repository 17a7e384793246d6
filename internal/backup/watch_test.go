package backup

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// TestWatches: a space is unchanged if nothing happened in it since the last pass that came to its end
// began; a pass that failed does not count.
func TestWatches(t *testing.T) {
	root := filepath.Join(t.TempDir(), "users")
	dir := func(id string) string { return filepath.Join(root, ocis.SpacePath(id)) }
	a, b := "aaaaaaaa-0000-4000-8000-000000000001", "aabbbbbb-0000-4000-8000-000000000002"
	touch := func(id string) {
		t.Helper()
		if err := os.MkdirAll(dir(id), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir(id), "nodes"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	touch(a)
	touch(b)
	w, why := startWatches(&ocis.Instance{Stores: []ocis.Store{
		{Name: "users", Root: root, Layout: ocis.Decomposed}, {Name: "posix", Root: root, Layout: ocis.Posix}, {Name: "viewed", Root: root + "/.", Layout: ocis.Decomposed},
	}}, func(r string) bool { return r == root })
	if why != nil || len(w.stores) != 1 {
		t.Fatal(why, len(w.stores))
	}
	defer w.close()
	want := func(step string, unchanged func(string) bool, wantA, wantB bool) {
		t.Helper()
		if unchanged(dir(a)) != wantA || unchanged(dir(b)) != wantB {
			t.Errorf("%s: unchanged are %v, %v; want %v, %v", step, unchanged(dir(a)), unchanged(dir(b)), wantA, wantB)
		}
		if unchanged(filepath.Dir(root) + "/elsewhere") {
			t.Errorf("%s: what is not watched is unchanged", step)
		}
	}
	want("first pass", w.begin(), false, false)
	touch(a) // while the pass runs
	w.end()
	want("after a pass", w.begin(), false, true)
	want("after a pass that failed", w.begin(), false, true)
	w.end()
	want("quiet", w.begin(), true, true)
	touch(b)
	want("after a change", w.begin(), true, false)
	w.end()
	if err := os.Rename(filepath.Join(root, "spaces/aa"), filepath.Join(root, "spaces/ab")); err != nil {
		t.Fatal(err)
	}
	want("the folder above was moved", w.begin(), false, false)
	w.stores[0].failed = true
	w.end()
	want("after a failure", w.begin(), false, false)
	var none *watches
	none.end()
	none.close()
	if none.begin() != nil {
		t.Error("without watches something is unchanged")
	}
}
