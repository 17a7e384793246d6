package restore_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/restore"
)

func TestIDCaches(t *testing.T) {
	dir := t.TempDir()
	if list, err := restore.DropIDCaches(filepath.Join(dir, "nowhere")); err != nil || list != nil {
		t.Errorf("no event store: %v, %v", list, err)
	}
	streams := filepath.Join(dir, "jetstream", "$G", "streams")
	for _, n := range []string{"KV_ids-storage-users/msgs", "KV_postprocessing/msgs", "main-queue/msgs"} {
		if err := os.MkdirAll(filepath.Join(streams, n), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{filepath.Join(streams, "KV_ids-storage-users")}
	for range 2 {
		if list, err := restore.IDCaches(dir); err != nil || !slices.Equal(list, want) {
			t.Errorf("got %v, %v", list, err)
		}
	}
	if list, err := restore.DropIDCaches(dir); err != nil || !slices.Equal(list, want) {
		t.Errorf("got %v, %v", list, err)
	}
	left, err := os.ReadDir(streams)
	if err != nil || len(left) != 2 {
		t.Errorf("%v, %v", left, err)
	}
	// A link leads nowhere.
	outside := t.TempDir()
	if err := os.Mkdir(filepath.Join(outside, "KV_ids-x"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(streams); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, streams); err != nil {
		t.Fatal(err)
	}
	if _, err := restore.DropIDCaches(dir); err == nil {
		t.Error("a link was followed")
	}
	if _, err := os.Stat(filepath.Join(outside, "KV_ids-x")); err != nil {
		t.Error(err)
	}
}
