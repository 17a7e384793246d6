package restore_test

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/browse/browsetest"
	"github.com/holdfast-backup/holdfast/internal/restore"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// TestFixtures: real instances come back byte for byte, at another place, and again over themselves.
func TestFixtures(t *testing.T) {
	for _, name := range []string{testfixture.OCIS, testfixture.OpenCloud, testfixture.OpenCloudPosix} {
		t.Run(name, func(t *testing.T) {
			inst := browsetest.Unpack(t, name)
			r := browsetest.NewRepo(t)
			sn := browsetest.Backup(t, r, inst, time.Now())
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
					testfixture.Compare(t, filepath.Join(inst.Dir, dir), filepath.Join(dst, dir), testfixture.Options{})
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
