package backup_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/backup"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/s3/s3test"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// stopper counts how often it was to stop the instance.
type stopper struct{ stops int }

func (*stopper) Method() string { return freeze.KindCommand }

func (s *stopper) Freeze(context.Context, *ocis.Instance) (freeze.Frozen, error) {
	s.stops++
	return nil, errors.New("stopped")
}

// putRival stores an exclusive lock of another program, as if it came to light only now.
func putRival(t *testing.T, r *repo.Repository) repo.ID {
	t.Helper()
	text, err := json.Marshal(map[string]any{"time": time.Now(), "exclusive": true, "hostname": "other", "username": "other", "pid": 7})
	if err != nil {
		t.Fatal(err)
	}
	rival, err := r.SaveUnpacked(t.Context(), backend.LockFile, text)
	if err != nil {
		t.Fatal(err)
	}
	return rival
}

// An exclusive lock that comes to light only after the first look ends a backup before anything is stopped
// and before anything counts in the repository.
func TestLateLock(t *testing.T) {
	source := testfixture.Unpack(t, "opencloud-posixfs")
	inst, err := discover.Discover(t.Context(), discover.Options{
		BaseDataPath: filepath.Join(source, "data"), ConfigDir: filepath.Join(source, "config"), NoSizes: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	be := local.New(filepath.Join(t.TempDir(), "repo"))
	newRepo(t, be)
	stopping := &stopper{}
	for _, f := range []freeze.Freezer{freeze.None{}, stopping} {
		r := open(t, be)
		lock, ctx, err := r.Lock(t.Context(), repo.LockOptions{})
		if err != nil {
			t.Fatal(err)
		}
		rival := putRival(t, r)
		if err := r.LoadIndex(ctx); err != nil {
			t.Fatal(err)
		}
		_, err = backup.Run(ctx, backup.Options{Instance: inst, Repo: r, Freezer: f, Cold: true, Hostname: "test", Version: "test"})
		var le *repo.LockedError
		if !errors.As(err, &le) && !errors.As(context.Cause(ctx), &le) || le.Holder.ID != rival {
			t.Errorf("%s: %v, %v", f.Method(), err, context.Cause(ctx))
		}
		for _, d := range []string{"index", "snapshots"} {
			if list, err := os.ReadDir(filepath.Join(be.Location(), d)); err != nil || len(list) > 0 {
				t.Errorf("%s: %d files in %s, %v", f.Method(), len(list), d, err)
			}
		}
		if err := errors.Join(r.RemoveUnpacked(t.Context(), backend.LockFile, rival), lock.Unlock()); err != nil {
			t.Fatal(err)
		}
	}
	if stopping.stops > 0 {
		t.Errorf("the instance was stopped %d times", stopping.stops)
	}
}

// The replica, too, is left alone until nobody else can remove anything from it.
func TestLateLockBeforeAReplica(t *testing.T) {
	g := newRig(t, s3test.Options{})
	name := g.srv.Bucket(t, false, false)
	o := toReplica(name)
	r := open(t, local.New(g.dir))
	lock, ctx, err := r.Lock(t.Context(), repo.LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	rival := putRival(t, r)
	if err := r.LoadIndex(ctx); err != nil {
		t.Fatal(err)
	}
	o.Instance, o.Repo, o.Freezer, o.Hostname, o.Version = g.inst, r, freeze.None{}, "test", "test"
	var le *repo.LockedError
	if _, err := backup.Run(ctx, o); !errors.As(err, &le) || le.Holder.ID != rival {
		t.Errorf("the backup: %v", err)
	}
	if n := len(g.objects(name)); n != 0 {
		t.Errorf("%d objects are in the replica", n)
	}
}
