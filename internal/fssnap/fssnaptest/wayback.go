package fssnaptest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/restore"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// WayBack restores an instance below dir from views that were kept: all of it comes back, what differs
// alone is written, and what was in the way is moved aside. If the view is lossy, what it shows comes back.
func WayBack(t *testing.T, d fssnap.Driver, state, dir string, lossy bool) {
	ctx := context.Background()
	drivers := []fssnap.Driver{d}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	base := filepath.Join(dir, "instance")
	must(os.Mkdir(base, 0o755))
	t.Cleanup(func() { _ = os.RemoveAll(base) })
	Fill(t, base)
	at := func(rel string) string { return filepath.Join(base, rel) }
	must(os.WriteFile(at("a/linked"), []byte("linked"), 0o600))
	must(os.Link(at("a/linked"), at("storage/linked too")))
	must(os.WriteFile(at("sparse"), []byte("begin"), 0o600))
	must(os.Truncate(at("sparse"), 1<<20))
	must(os.WriteFile(at("damaged"), []byte("good"), 0o600))
	must(unix.Mknod(at("a/socket"), unix.S_IFSOCK|0o600, 0))
	// Older than the view by more than the coarsest clock in use, so that they need not be read.
	time.Sleep(1100 * time.Millisecond)

	o := fssnap.Options{StateDir: state, Label: base, KeepLast: 1}
	s := NewSet(t, o, drivers, base)
	must(s.SetNote("a note"))
	before := Describe(t, base)
	var lost *fssnap.LossyViewError
	if _, err := s.Verify(ctx, fssnap.VerifyOptions{Frozen: true}); errors.As(err, &lost) != lossy || !lossy && err != nil {
		t.Fatalf("verify: %v", err)
	}
	must(s.Close(ctx))

	Change(t, base)
	must(os.WriteFile(at("a/linked"), []byte("other!"), 0o600)) // both names
	must(os.RemoveAll(at("storage/users/spaces")))
	must(os.WriteFile(at("storage/users/spaces"), []byte("a file in the place of a folder"), 0o600))
	must(os.Remove(at("dangling")))
	must(os.MkdirAll(at("dangling/folder"), 0o700))
	st, err := os.Stat(at("damaged"))
	must(err)
	must(os.WriteFile(at("damaged"), []byte("evil"), 0o600))
	must(os.Chtimes(at("damaged"), st.ModTime(), st.ModTime())) // as if nothing had happened
	changed := Describe(t, base)

	list, err := fssnap.ListKept(state)
	must(err)
	if len(list) != 1 || list[0].Name != s.Name() || list[0].Label != base {
		t.Fatalf("kept: %+v", list)
	}
	s, err = fssnap.OpenKept(ctx, drivers, list[0].Name, o)
	must(err)
	t.Cleanup(func() {
		if err := s.Close(ctx); err != nil {
			t.Error(err)
		}
		if err := fssnap.RemoveKept(ctx, drivers, s.Name(), fssnap.FindOptions{StateDir: state}); err != nil {
			t.Error(err)
		}
	})
	must(s.Check(ctx))
	if string(s.Note()) != `"a note"` {
		t.Errorf("note %s", s.Note())
	}
	want := Describe(t, At(t, s, base))
	if !lossy {
		Same(t, "the view", before, want)
	}
	plan := func(o restore.Options) *restore.Plan {
		t.Helper()
		p, err := restore.MakeViewPlan(&snapshot.Manifest{BasePath: base, DataSets: []snapshot.DataSet{
			{Name: "base", Path: base, Captured: true},
			{Name: "users", Path: at("storage/users"), Captured: true},
			{Name: "a file", Path: at("top"), Captured: true},
			{Name: "absent", Path: at("absent")},
		}}, restore.View{
			Name: s.Name(), MadeAt: s.MadeAt(), Leave: []string{fssnap.ViewsDir},
			Path: func(p string) (string, error) { return At(t, s, p), nil },
		}, o)
		must(err)
		return p
	}
	sum := func(r *restore.Result) (files, unchanged, moved int64) {
		for _, d := range r.DataSets {
			files, unchanged, moved = files+d.Files, unchanged+d.Unchanged, moved+d.MovedAside
		}
		return
	}
	dry, err := restore.RunView(ctx, plan(restore.Options{DryRun: true}))
	must(err)
	Same(t, "after a dry run", changed, Describe(t, base))
	res, err := restore.RunView(ctx, plan(restore.Options{}))
	must(err)
	Same(t, "restored", want, Describe(t, base))
	files, unchanged, moved := sum(res)
	if files < 8 || unchanged < 3 || moved < 6 {
		t.Errorf("%d written, %d unchanged, %d moved aside", files, unchanged, moved)
	}
	if f, u, _ := sum(dry); f == 0 || u == 0 {
		t.Errorf("dry run: %d to write, %d unchanged", f, u)
	}
	if len(res.Aside) != 1 {
		t.Fatalf("aside: %q", res.Aside)
	}
	t.Cleanup(func() { _ = os.RemoveAll(res.Aside[0]) })
	if data, err := os.ReadFile(filepath.Join(res.Aside[0], "damaged")); err != nil || string(data) != "evil" {
		t.Errorf("what was in the way: %q, %v", data, err)
	}
	if data, err := os.ReadFile(filepath.Join(res.Aside[0], "top")); err != nil || string(data) != "other" {
		t.Errorf("what was in the way: %q, %v", data, err)
	}
	again, err := restore.RunView(ctx, plan(restore.Options{}))
	must(err)
	if files, _, moved := sum(again); files > 0 || moved > 0 {
		t.Errorf("once more: %d written, %d moved aside", files, moved)
	}

	// Elsewhere: nothing is there yet.
	other := filepath.Join(dir, "elsewhere")
	t.Cleanup(func() { _ = os.RemoveAll(other) })
	_, err = restore.RunView(ctx, plan(restore.Options{BasePath: other}))
	must(err)
	Same(t, "elsewhere", want, Describe(t, other))
}
