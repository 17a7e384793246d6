package backup_test

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

func packs(t *testing.T, be backend.Backend) (n int, bytes int64) {
	t.Helper()
	err := be.List(context.Background(), backend.PackFile, func(fi backend.FileInfo) error {
		n++
		bytes += fi.Size
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n, bytes
}

// TestResume kills a backup after several of its packs. Whatever was stored by then is not stored again
// by the next run: together they store what one run alone does.
func TestResume(t *testing.T) {
	source := testfixture.Unpack(t, "opencloud-posixfs")
	// 12 MiB in packs of 1 MiB, which do not compress.
	for i := range 12 {
		p := make([]byte, 1<<20)
		rand.NewChaCha8([32]byte{byte(i), 99}).Read(p)
		if err := os.WriteFile(filepath.Join(source, "data", "idm", "big-"+strconv.Itoa(i)), p, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	alone := local.New(filepath.Join(t.TempDir(), "repo"))
	newRepo(t, alone)
	if runChild(t, alone.Location(), source, "1000000", 0) {
		t.Fatal("killed")
	}
	_, whole := packs(t, alone)
	for _, killAt := range []int{4, 9} {
		dir := filepath.Join(t.TempDir(), "repo")
		be := local.New(dir)
		newRepo(t, be)
		if !runChild(t, dir, source, strconv.Itoa(killAt), 0) {
			t.Fatalf("not killed before write %d", killAt)
		}
		n, stored := packs(t, be)
		if n == 0 {
			t.Fatalf("killed before write %d: no pack was stored", killAt)
		}
		if _, err := backUp(context.Background(), open(t, be), source); err != nil {
			t.Fatal(err)
		}
		check(t, be)
		clean(t, dir)
		_, both := packs(t, be)
		// Nothing is stored twice; the packs are cut otherwise, which makes some headers more or less.
		if again := both - whole; again > 200<<10 {
			t.Errorf("killed before write %d: %d of %d bytes were stored before, and %d again", killAt, stored, whole, again)
		}
		sameAs(t, open(t, be), "latest", source)
	}
}
