package backup_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/backup"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/fssnap/btrfs"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/storegen"
)

// changer is a server that changes something just before it is stopped, after the warm copy, and
// something else right after the start. At the stop it keeps a copy of what must be in the snapshot.
type changer struct {
	t         *testing.T
	dir, kept string
	thawed    bool
}

func (c *changer) mutate(seed uint64) {
	if _, err := storegen.Mutate(context.Background(), c.dir, seed, 0.05); err != nil {
		c.t.Error(err)
	}
}

func (c *changer) Method() string { return "test" }
func (c *changer) Freeze(context.Context, *ocis.Instance) (freeze.Frozen, error) {
	c.mutate(1)
	if out, err := exec.Command("cp", "-a", c.dir, c.kept).CombinedOutput(); err != nil {
		c.t.Errorf("cp: %v\n%s", err, out)
	}
	return c, nil
}

func (c *changer) Thaw(context.Context) error {
	if !c.thawed {
		c.thawed = true
		c.mutate(2)
	}
	return nil
}
func (c *changer) Record() freeze.Record { return freeze.Record{Method: "test"} }

// btrfsAt puts what lies at dir onto a btrfs of its own, mounted there.
func btrfsAt(t *testing.T, dir string) {
	t.Helper()
	img, was := filepath.Join(t.TempDir(), "img"), dir+".was"
	for _, cmd := range [][]string{
		{"truncate", "-s", "300M", img},
		{"mkfs.btrfs", "-q", img},
		{"mv", dir, was},
		{"mkdir", dir},
		{"mount", "-o", "loop", img, dir},
	} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd, err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v\n%s", err, out)
		}
	})
	for _, cmd := range [][]string{{"cp", "-a", was + "/.", dir}, {"rm", "-rf", was}} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd, err, out)
		}
	}
}

// TestPartlyViewed: what lies on btrfs is read from views after the start, the rest is copied before the
// stop and during it, and the snapshot is of one instant.
func TestPartlyViewed(t *testing.T) {
	dir, state := filepath.Join(t.TempDir(), "inst"), t.TempDir()
	if _, err := storegen.Generate(t.Context(), storegen.Options{Dir: dir, Seed: 3, Files: 300, Bytes: 3 << 20, Spaces: 3}); err != nil {
		t.Fatal(err)
	}
	users := filepath.Join(dir, "data", "storage", "users")
	btrfsAt(t, users)
	inst, err := discover.Discover(t.Context(), discover.Options{
		BaseDataPath: filepath.Join(dir, "data"), ConfigDir: filepath.Join(dir, "config"), NoSizes: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	repoDir := filepath.Join(t.TempDir(), "repo")
	be := local.New(repoDir)
	newRepo(t, be)
	r := open(t, be)
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	srv := &changer{t: t, dir: dir, kept: filepath.Join(t.TempDir(), "kept")}
	var said []string
	o := backup.Options{
		Instance: inst, Repo: r, Freezer: srv, Guard: freeze.Options{StateDir: state}, Hostname: "test", Version: "test",
		Views: []fssnap.Driver{btrfs.New(btrfs.Options{StateDir: state})}, KeepViews: 2, CacheDir: t.TempDir(),
		Progress: func(e progress.Event) {
			if e.Message != "" {
				said = append(said, string(e.Phase)+": "+e.Message)
			}
		},
	}

	hot := o
	hot.Freezer = freeze.ViewOnly{}
	var refused *backup.HotError
	if _, err := backup.Run(t.Context(), hot); !errors.As(err, &refused) || !strings.Contains(err.Error(), "cannot be held still by a view") {
		t.Errorf("without a stop: %v", err)
	}

	said = nil
	res, err := backup.Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if p := res.Manifest.Proof; !p.Complete {
		t.Errorf("incomplete: %+v", p)
	}
	var views []string
	for _, v := range res.Manifest.Views {
		views = append(views, v.Kind+" "+filepath.Base(v.Source))
	}
	if len(views) != 3 || !strings.HasPrefix(views[0], "btrfs ") || !slices.Contains(views, "none data") || !slices.Contains(views, "none config") {
		t.Errorf("views %q", views)
	}
	all := strings.Join(said, "\n")
	for _, want := range []string{"warm: warm pass 1 took", "view: no view of ", "backup: no views are kept"} {
		if !strings.Contains(all, want) {
			t.Errorf("it does not say %q:\n%s", want, all)
		}
	}
	sameAs(t, open(t, be), "latest", srv.kept)
	clean(t, repoDir)
	if _, err := os.Lstat(filepath.Join(users, fssnap.ViewsDir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("views are left: %v", err)
	}

	// Unchanged, and read as a whole: the same contents.
	srv.kept = filepath.Join(t.TempDir(), "kept")
	cold := o
	cold.Views, cold.Cold = nil, true
	if res, err = backup.Run(t.Context(), cold); err != nil {
		t.Fatal(err)
	}
	if v := res.Manifest.Views; len(v) != 1 || v[0].Kind != "none" {
		t.Errorf("views %+v", v)
	}
	sameAs(t, open(t, be), "latest", srv.kept)
}

// TestHotViews: views of a service that is not stopped, marked as such.
func TestHotViews(t *testing.T) {
	dir, state := filepath.Join(t.TempDir(), "inst"), t.TempDir()
	if _, err := storegen.Generate(t.Context(), storegen.Options{Dir: dir, Seed: 3, Files: 100, Bytes: 1 << 20, Spaces: 3}); err != nil {
		t.Fatal(err)
	}
	btrfsAt(t, dir)
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
	o := backup.Options{
		Instance: inst, Repo: r, Freezer: freeze.ViewOnly{}, Guard: freeze.Options{StateDir: state}, Hostname: "test", Version: "test",
		Views: []fssnap.Driver{btrfs.New(btrfs.Options{StateDir: state})},
	}
	res, err := backup.Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	f := res.Manifest.Freeze
	if f.Method != "view-only" || !f.CrashConsistent || f.Warning == "" || f.StoppedAt != nil {
		t.Errorf("freeze %+v", f)
	}
	if !res.Manifest.Proof.Complete {
		t.Errorf("incomplete: %+v", res.Manifest.Proof)
	}
	sameAs(t, open(t, be), "latest", dir)

	// The data on a second filesystem: two views, and not of one instant.
	btrfsAt(t, filepath.Join(dir, "data", "storage", "users"))
	var refused *backup.HotError
	if _, err := backup.Run(t.Context(), o); !errors.As(err, &refused) || !strings.Contains(err.Error(), "one instant") {
		t.Errorf("views of several instants: %v", err)
	}
	o.Views = nil
	if _, err := backup.Run(t.Context(), o); !errors.As(err, &refused) {
		t.Errorf("without views: %v", err)
	}
	if left, err := os.ReadDir(filepath.Join(state, "views")); err != nil || len(left) > 0 {
		t.Errorf("%v, %v are left", left, err)
	}
}
