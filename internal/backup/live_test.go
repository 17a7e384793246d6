package backup_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/backup"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/fssnap/btrfs"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/storegen"
)

// server stands for a running instance: it adds, overwrites, renames, deletes and shares files through
// the storage layout until it is stopped, and goes on after the start. At the stop it keeps a copy of
// what it had acknowledged: that, and nothing else, must be in the snapshot.
type server struct {
	t    *testing.T
	dir  string // of the instance
	kept string // the copy

	stop   chan struct{}
	done   sync.WaitGroup
	rounds uint64
	began  time.Time // of the freeze
	down   time.Duration
}

func (s *server) start() {
	s.stop = make(chan struct{})
	stop := s.stop
	s.done.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			s.rounds++
			if _, err := storegen.Mutate(context.Background(), s.dir, s.rounds, 0.01); err != nil {
				s.t.Errorf("the server fails: %v", err)
				return
			}
		}
	})
}

func (s *server) Method() string { return "test" }

// Freeze stops the server and keeps the copy.
func (s *server) Freeze(context.Context, *ocis.Instance) (freeze.Frozen, error) {
	close(s.stop)
	s.done.Wait()
	if out, err := exec.Command("cp", "-a", s.dir, s.kept).CombinedOutput(); err != nil {
		s.t.Errorf("cp: %v\n%s", err, out)
	}
	s.began = time.Now()
	return s, nil
}

func (s *server) Thaw(context.Context) error {
	s.down = time.Since(s.began)
	s.start()
	return nil
}

func (s *server) Record() freeze.Record { return freeze.Record{Method: "test"} }

// backUpLive backs up a server under load and compares the snapshot with what was acknowledged.
func backUpLive(t *testing.T, dir string, o backup.Options) *server {
	t.Helper()
	if _, err := storegen.Generate(t.Context(), storegen.Options{Dir: dir, Seed: 7, Files: 1200, Bytes: 6 << 20, Spaces: 5}); err != nil {
		t.Fatal(err)
	}
	repoDir := filepath.Join(t.TempDir(), "repo")
	be := local.New(repoDir)
	newRepo(t, be)
	r := open(t, be)
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	inst, err := discover.Discover(t.Context(), discover.Options{
		BaseDataPath: filepath.Join(dir, "data"), ConfigDir: filepath.Join(dir, "config"), NoSizes: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	srv := &server{t: t, dir: dir, kept: filepath.Join(t.TempDir(), "kept")}
	srv.start()
	o.Instance, o.Repo, o.Freezer, o.Hostname, o.Version = inst, r, srv, "test", "test"
	if o.Guard.StateDir == "" {
		o.Guard.StateDir = t.TempDir()
	}
	res, err := backup.Run(t.Context(), o)
	close(srv.stop)
	srv.done.Wait()
	if err != nil {
		t.Fatal(err)
	}
	if p := res.Manifest.Proof; !p.Complete {
		t.Errorf("incomplete: %+v", p)
	}
	kind := "none"
	if len(o.Views) > 0 {
		kind = o.Views[0].Kind()
	}
	if v := res.Manifest.Views; len(v) == 0 || v[0].Kind != kind {
		t.Errorf("it was read from views %+v, want %s", v, kind)
	}
	clean(t, repoDir)
	sameAs(t, open(t, be), "latest", srv.kept)
	return srv
}

func TestWarmCopyOfAServerUnderLoad(t *testing.T) {
	backUpLive(t, filepath.Join(t.TempDir(), "inst"), backup.Options{TargetDowntime: time.Nanosecond})
}

func TestColdCopyOfAServerUnderLoad(t *testing.T) {
	backUpLive(t, filepath.Join(t.TempDir(), "inst"), backup.Options{Cold: true})
}

// TestViewsOfAServerUnderLoad: with btrfs the server runs again before anything is read.
func TestViewsOfAServerUnderLoad(t *testing.T) {
	tmp := t.TempDir()
	img, mnt, state := filepath.Join(tmp, "img"), filepath.Join(tmp, "mnt"), filepath.Join(tmp, "state")
	for _, cmd := range [][]string{
		{"truncate", "-s", "600M", img}, {"mkfs.btrfs", "-q", img}, {"mkdir", mnt, state}, {"mount", "-o", "loop", img, mnt},
	} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd, err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", mnt).CombinedOutput(); err != nil {
			t.Errorf("umount: %v\n%s", err, out)
		}
	})
	drv := btrfs.New(btrfs.Options{StateDir: state})
	backUpLive(t, filepath.Join(mnt, "inst"), backup.Options{Views: []fssnap.Driver{drv}, Guard: freeze.Options{StateDir: state}})
	views, err := drv.List(t.Context(), mnt)
	if err != nil {
		t.Fatal(err)
	}
	if len(views) > 0 {
		t.Errorf("views are left: %+v", views)
	}
	if left, _ := os.ReadDir(filepath.Join(mnt, fssnap.ViewsDir)); len(left) > 0 {
		t.Errorf("%d entries are left in %s", len(left), fssnap.ViewsDir)
	}
}
