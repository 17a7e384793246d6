package backup_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/backup"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/fssnap/btrfs"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/storegen"
)

// writer is a server that writes until it is stopped, and goes on when it is started.
type writer struct {
	t    *testing.T
	dir  string
	seed uint64
}

func (w *writer) write() {
	w.seed++
	if _, err := storegen.Mutate(context.Background(), w.dir, w.seed, 0.01); err != nil {
		w.t.Error(err)
	}
}

func (w *writer) Method() string { return "test" }
func (w *writer) Freeze(context.Context, *ocis.Instance) (freeze.Frozen, error) {
	w.write()
	return w, nil
}
func (w *writer) Thaw(context.Context) error { return nil }
func (w *writer) Record() freeze.Record      { return freeze.Record{Method: "test"} }

// TestChangesListedByBtrfs: a backup looks only at what the file system lists as changed, since the last view or
// since the warm copy, and gives the same trees as a full scan of the same picture.
func TestChangesListedByBtrfs(t *testing.T) {
	for _, viewed := range []bool{true, false} {
		for _, sub := range []string{"", "ocis"} { // the very top of the file system, and a subvolume
			t.Run(fmt.Sprintf("view=%v, %q", viewed, sub), func(t *testing.T) {
				mnt, state := filepath.Join(t.TempDir(), "mnt"), t.TempDir()
				if err := os.Mkdir(mnt, 0o755); err != nil {
					t.Fatal(err)
				}
				btrfsAt(t, mnt)
				dir := filepath.Join(mnt, sub)
				if sub != "" {
					if out, err := exec.Command("btrfs", "subvolume", "create", dir).CombinedOutput(); err != nil {
						t.Fatalf("%v\n%s", err, out)
					}
				}
				if _, err := storegen.Generate(t.Context(), storegen.Options{Dir: dir, Seed: 3, Files: 300, Bytes: 1 << 20, Spaces: 5}); err != nil {
					t.Fatal(err)
				}
				inst, err := discover.Discover(t.Context(), discover.Options{
					BaseDataPath: filepath.Join(dir, "data"), ConfigDir: filepath.Join(dir, "config"), NoSizes: true,
				})
				if err != nil {
					t.Fatal(err)
				}
				be := local.New(filepath.Join(t.TempDir(), "repo"))
				newRepo(t, be)
				r := open(t, be)
				if err := r.LoadIndex(t.Context()); err != nil {
					t.Fatal(err)
				}
				srv := &writer{t: t, dir: dir}
				o := backup.Options{
					Instance: inst, Repo: r, Freezer: srv, Guard: freeze.Options{StateDir: state}, Hostname: "test", Version: "test", CacheDir: t.TempDir(),
				}
				drv := btrfs.New(btrfs.Options{StateDir: state})
				if viewed {
					o.Views = []fssnap.Driver{drv}
				}
				for round := range 4 {
					if round == 2 && viewed { // a run was killed while it had its view
						set, err := fssnap.NewSet(t.Context(), o.Views, []string{filepath.Join(dir, "data")}, fssnap.Options{StateDir: state, Label: "killed"})
						if err == nil {
							err = set.Create(t.Context())
						}
						if err != nil {
							t.Fatal(err)
						}
						defer set.Close(context.Background())
						srv.write()
					}
					res, err := backup.Run(t.Context(), o)
					if err != nil {
						t.Fatal(err)
					}
					if !res.Manifest.Proof.Complete {
						t.Errorf("incomplete: %+v", res.Manifest.Proof)
					}
					if st := res.Stats; (round > 0 || !viewed) && st.EntriesTaken < st.Entries/2 {
						t.Errorf("round %d: %d of %d entries were taken over without a look", round, st.EntriesTaken, st.Entries)
					} else if round == 0 && viewed && st.EntriesTaken > 0 {
						t.Errorf("the first backup takes %d entries over", st.EntriesTaken)
					}
					// The picture has not changed since: the writer writes at the stop alone.
					full := o
					full.Freezer, full.FullScan, full.CacheDir = freeze.None{}, true, ""
					want, err := backup.Run(t.Context(), full)
					if err != nil {
						t.Fatal(err)
					}
					if want.Stats.EntriesTaken != 0 {
						t.Errorf("the full scan took %d entries over", want.Stats.EntriesTaken)
					}
					storage := func(sn id.ID) id.ID {
						s, err := snapshot.Load(t.Context(), r, sn)
						if err != nil {
							t.Fatal(err)
						}
						n, err := snapshot.Lookup(t.Context(), r, *s.Tree, "/storage")
						if err != nil {
							t.Fatal(err)
						}
						return n.Subtree
					}
					if got, want := storage(res.SnapshotID), storage(want.SnapshotID); got != want {
						t.Errorf("round %d: the tree is %v, and %v after a full scan", round, got, want)
					}
				}
				if left, err := drv.List(t.Context()); err != nil || viewed && !strings.Contains(fmt.Sprint(left), mnt) && len(left) == 0 {
					t.Error("the view of the killed run is gone", err)
				}
			})
		}
	}
}
