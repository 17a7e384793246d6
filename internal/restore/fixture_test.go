package restore_test

import (
	"path/filepath"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/restore"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// TestFixtures: real instances come back byte for byte, at another place, and again over themselves.
func TestFixtures(t *testing.T) {
	for _, name := range []string{testfixture.OCIS, testfixture.OpenCloud, testfixture.OpenCloudPosix} {
		t.Run(name, func(t *testing.T) {
			src := testfixture.Unpack(t, name)
			inst, err := discover.Discover(t.Context(), discover.Options{
				BaseDataPath: filepath.Join(src, "data"), ConfigDir: filepath.Join(src, "config"),
			})
			if err != nil {
				t.Fatal(err)
			}
			r, err := repo.Init(t.Context(), mem.New(), "secret", repo.InitOptions{KDF: repo.KDF{N: 1024, R: 1, P: 1}})
			if err != nil {
				t.Fatal(err)
			}
			if err := r.LoadIndex(t.Context()); err != nil {
				t.Fatal(err)
			}
			w := r.NewWriter(t.Context())
			res, err := capture.Run(t.Context(), r, w, capture.Options{Instance: inst})
			if err != nil {
				t.Fatal(err)
			}
			root, err := res.Finish(t.Context(), []byte("readme"))
			if err != nil {
				t.Fatal(err)
			}
			if err := w.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			sn := &snapshot.Snapshot{Tree: &root}
			dst := t.TempDir()
			for _, overwrite := range []bool{false, true} {
				p, err := restore.MakePlan(t.Context(), r, sn, restore.Options{
					BasePath: filepath.Join(dst, "data"), ConfigDir: filepath.Join(dst, "config"), Overwrite: overwrite,
				})
				if err != nil {
					t.Fatal(err)
				}
				got, err := restore.Run(t.Context(), r, p)
				if err != nil {
					t.Fatal(err)
				}
				for _, dir := range []string{"data", "config"} {
					testfixture.Compare(t, filepath.Join(src, dir), filepath.Join(dst, dir), testfixture.Options{})
				}
				if len(got.Warnings) > 0 {
					t.Errorf("warnings: %q", got.Warnings)
				}
				for _, d := range got.DataSets {
					if overwrite && d.Files+d.MovedAside > 0 {
						t.Errorf("the second run wrote: %+v", d)
					}
				}
			}
		})
	}
}
