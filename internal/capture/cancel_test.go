package capture_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/storegen"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

type canceller struct {
	capture.Target
	n      atomic.Int64
	cancel context.CancelCauseFunc
}

func (c *canceller) Save(ctx context.Context, t repo.BlobType, p []byte) (id.ID, bool, error) {
	if c.n.Add(-1) == 0 {
		c.cancel(errors.New("lock lost"))
	}
	return c.Target.Save(ctx, t, p)
}

func (c *canceller) SaveAs(ctx context.Context, t repo.BlobType, d id.ID, p []byte) (bool, error) {
	if c.n.Add(-1) == 0 {
		c.cancel(errors.New("lock lost"))
	}
	return c.Target.SaveAs(ctx, t, d, p)
}

func TestCancelIsAnError(t *testing.T) {
	for _, name := range fixtures {
		inst := instanceOf(testfixture.Unpack(t, name), name)
		r, _ := newRepo(t)
		first, _, _ := run(t, r, inst, capture.Options{Now: future})
		before := runtime.NumGoroutine()
		for n := int64(1); n < 400; n += 7 {
			ctx, cancel := context.WithCancelCause(t.Context())
			c := &canceller{Target: r.NewWriter(ctx), cancel: cancel}
			c.n.Store(n)
			o := capture.Options{Instance: inst, Now: future}
			if n%2 == 0 {
				o.Cache = first.Cache
			}
			res, err := capture.Run(ctx, r, c, o)
			if err == nil {
				_, err = res.Finish(ctx, nil)
			}
			if c.n.Load() <= 0 && err == nil {
				t.Errorf("%s %d: cancelled and no error", name, n)
			}
			if err != nil && !strings.Contains(err.Error(), "lock lost") {
				t.Errorf("%s %d: %v", name, n, err)
			}
			cancel(nil)
		}
		time.Sleep(100 * time.Millisecond)
		if now := runtime.NumGoroutine(); now > before+2 {
			t.Errorf("%d goroutines, before %d", now, before)
		}
		fds, _ := os.ReadDir("/proc/self/fd")
		t.Log(len(fds), "fds")
	}
}

// hasCancel ends the run at the n-th question of what the repository has.
type hasCancel struct {
	*repo.Repository
	n      atomic.Int64
	cancel context.CancelCauseFunc
}

func (h *hasCancel) Has(t repo.BlobType, d id.ID) bool {
	if h.n.Add(-1) == 0 {
		h.cancel(errors.New("lock lost"))
	}
	return h.Repository.Has(t, d)
}

// TestCancelWhilePassingOver: a run that ends while it passes groups over tells why.
func TestCancelWhilePassingOver(t *testing.T) {
	dir, inst := generated(t, storegen.Options{Seed: 3, Files: 250, Bytes: 1 << 18, Spaces: 1})
	r, _ := newRepo(t)
	first, _, _ := run(t, r, inst, capture.Options{Now: future})
	if _, err := storegen.Mutate(t.Context(), dir, 1, 0.01); err != nil {
		t.Fatal(err)
	}
	ended := 0
	for n := int64(1); n < 3000; n += 41 {
		ctx, cancel := context.WithCancelCause(t.Context())
		h := &hasCancel{Repository: r, cancel: cancel}
		h.n.Store(n)
		if _, err := capture.Run(ctx, h, r.NewWriter(ctx), capture.Options{Instance: inst, Now: future, Cache: first.Cache}); err != nil {
			if ended++; !strings.Contains(err.Error(), "lock lost") {
				t.Errorf("%d: %v", n, err)
			}
		}
		cancel(nil)
	}
	if ended < 10 {
		t.Errorf("%d runs ended", ended)
	}
}

func TestTrashedTreesWithVersions(t *testing.T) {
	s := newTinyStore(t)
	const dir, f1, b1, b2, b3 = "aaaaaaaa-1111-4bbb-8ccc-00000000000a", "bbbbbbbb-1111-4bbb-8ccc-00000000000b", "cccccccc-1111-4bbb-8ccc-00000000000c", "dddddddd-1111-4bbb-8ccc-00000000000d", "eeeeeeee-1111-4bbb-8ccc-00000000000e"
	const T = "2025-03-03T03:03:03.000000003Z"
	s.node(dir+".T."+T, true, "user.oc.type", "2", "user.oc.name", "gone", "user.oc.trash.origin", "/gone")
	s.file(f1, dir+".T."+T, "in.txt", b1, "one")
	for i, b := range []string{b2, b3} {
		st := []string{"2025-01-01T00:00:00Z", "2025-01-01T00:00:00Z.1"}[i]
		s.node(f1+".REV."+st, false, "user.oc.type", "1", "user.oc.blobid", b, "user.oc.blobsize", "3")
		s.put(s.space("blobs/"+ocis.NodePath(b)), "ol"+itoa(i))
	}
	tr := s.space("trash/" + ocis.NodePath(dir))
	s.check(os.MkdirAll(filepath.Dir(tr), 0o755))
	s.check(os.Symlink("../../../../../nodes/"+ocis.NodePath(dir+".T."+T), tr))
	res, r, sn := s.capture()
	dump(t, res)
	for p, want := range map[string]string{
		"/storage/users/trash/project/tiny/" + T + "/gone/in.txt":                                 "one",
		"/storage/users/trash-versions/project/tiny/" + T + "/gone/in.txt/2025-01-01T00:00:00Z":   "ol0",
		"/storage/users/trash-versions/project/tiny/" + T + "/gone/in.txt/2025-01-01T00:00:00Z.1": "ol1",
	} {
		if got, err := cat(t, r, sn, p); got != want {
			t.Errorf("%s %q %v", p, got, err)
		}
	}
}
