package fssnap_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/fssnap/btrfs"
	"github.com/holdfast-backup/holdfast/internal/fssnap/command"
	"github.com/holdfast-backup/holdfast/internal/fssnap/fssnaptest"
)

var ctx = context.Background()

func device(t *testing.T) string {
	t.Helper()
	return fssnaptest.Device(t, 128<<20, "mkfs.btrfs", "-q")
}

func mkdir(t *testing.T, path string) string {
	t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func write(t *testing.T, path, data string) {
	t.Helper()
	mkdir(t, filepath.Dir(path))
	if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
}

func drivers(state string) []fssnap.Driver {
	return []fssnap.Driver{btrfs.New(btrfs.Options{StateDir: state})}
}

// mine lists the views on a btrfs filesystem: other tests on this machine have theirs.
func mine(t *testing.T, state, dev string) []fssnap.View {
	t.Helper()
	list, err := drivers(state)[0].List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(list, func(v fssnap.View) bool { return !strings.HasPrefix(v.Source, dev+"[") })
}

func TestNames(t *testing.T) {
	at := time.Date(2026, 3, 4, 5, 6, 7, 8, time.FixedZone("", 3600))
	name := fssnap.NewName(at)
	if !strings.HasPrefix(name, "holdfast-20260304T040607Z-") || len(name) != len("holdfast-20260304T040607Z-")+6 || name == fssnap.NewName(at) {
		t.Errorf("name %s", name)
	}
	for n, want := range map[string]bool{
		name: true, name + ".0": true, name + ".12": true, name + ".": false, name + ".x": false, "x" + name: false, name + "a": false,
		"holdfast-20261304T040607Z-abcdef": false, "holdfast-20260304T040607Z-ABCDEF": false, "holdfast-": false, "": false, "../" + name: false,
	} {
		made, ok := fssnap.ParseName(n)
		if ok != want || ok && !made.Equal(at.Truncate(time.Second)) {
			t.Errorf("%q: %v, %v", n, made, ok)
		}
	}
	if set := (fssnap.View{Name: name + ".3"}).Set(); set != name {
		t.Errorf("set %s", set)
	}
}

// TestSeveralFilesystems: views of all that can be held still are made together, nested mounts are in
// their places, and what cannot be held still is named.
func TestSeveralFilesystems(t *testing.T) {
	root := t.TempDir()
	state := t.TempDir()
	fssnaptest.Clean(t, root)
	a, b := device(t), device(t)
	data := filepath.Join(root, "data")
	fssnaptest.MountAt(t, a, data, "btrfs", "")
	users := mkdir(t, filepath.Join(data, "ocis/storage/users"))
	fssnaptest.MountAt(t, b, users, "btrfs", "")
	thumbnails := mkdir(t, filepath.Join(data, "ocis/thumbnails"))
	fssnaptest.MountAt(t, "tmpfs", thumbnails, "tmpfs", "")
	config := mkdir(t, filepath.Join(root, "config"))
	blobs := mkdir(t, filepath.Join(data, "elsewhere/blobs"))
	bound := mkdir(t, filepath.Join(data, "ocis/blobs"))
	fssnaptest.MountAt(t, blobs, bound, "", "bind")
	for _, p := range []string{"ocis/idm/idm.boltdb", "ocis/storage/users/spaces/x", "ocis/thumbnails/t", "elsewhere/blobs/blob", "ocis/plain/file"} {
		write(t, filepath.Join(data, p), p)
	}
	write(t, filepath.Join(config, "ocis.yaml"), "secret")
	link := filepath.Join(root, "link")
	if err := os.Symlink(data+"/ocis", link); err != nil {
		t.Fatal(err)
	}

	base := filepath.Join(data, "ocis")
	missing := filepath.Join(base, "nats")
	s, err := fssnap.NewSet(ctx, drivers(state), []string{base, link, config, missing, filepath.Join(base, "idm")}, fssnap.Options{StateDir: state})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	var uncovered []string
	for _, u := range s.Uncovered() {
		uncovered = append(uncovered, u.Path)
		if u.Path == missing && !errors.Is(u.Reason, fs.ErrNotExist) || u.Path != missing && !errors.Is(u.Reason, fssnap.ErrNotSupported) {
			t.Errorf("%v", u)
		}
		if u.Path == thumbnails && !strings.Contains(u.Reason.Error(), "tmpfs") {
			t.Errorf("%v", u)
		}
	}
	slices.Sort(uncovered)
	if want := []string{config, missing, thumbnails}; !slices.Equal(uncovered, slices.Sorted(slices.Values(want))) {
		t.Errorf("uncovered %q", uncovered)
	}
	if _, ok := s.Translate(filepath.Join(base, "idm")); ok {
		t.Error("translated before there is a view")
	}
	if err := s.Create(ctx); err != nil {
		t.Fatal(err)
	}
	if len(s.Views()) != 2 || s.OneInstant() {
		t.Errorf("views %+v", s.Views())
	}
	if err := s.Create(ctx); err == nil {
		t.Error("created twice")
	}
	for _, p := range []string{"idm/idm.boltdb", "storage/users/spaces/x", "plain/file", "blobs/blob"} {
		for _, top := range []string{base, link} {
			at := fssnaptest.At(t, s, filepath.Join(top, p))
			want, err := os.ReadFile(filepath.Join(base, p))
			if err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(at); err != nil || string(got) != string(want) || !strings.Contains(at, s.Name()) {
				t.Errorf("%s is at %s: %q, %v", p, at, got, err)
			}
		}
	}
	// A walk from above meets what is mounted below.
	if got, err := os.ReadFile(filepath.Join(fssnaptest.At(t, s, filepath.Join(base, "storage")), "users/spaces/x")); err != nil || string(got) != "ocis/storage/users/spaces/x" {
		t.Errorf("the mount is not in its place: %q, %v", got, err)
	}
	for path, want := range map[string]string{
		base: thumbnails, link: thumbnails, thumbnails: "tmpfs", filepath.Join(thumbnails, "t"): "tmpfs", config: "", missing: "no such file", "/etc": "not among",
	} {
		if at, ok := s.Translate(path); ok {
			t.Errorf("%s is at %s", path, at)
		} else if err := s.Reason(path); !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if v, err := s.Verify(ctx, fssnap.VerifyOptions{Frozen: true}); err != nil || v.Compared < 10 {
		t.Errorf("verify: %+v, %v", v, err)
	}
	if err := s.Close(ctx); err != nil {
		t.Error(err)
	}
	if left := append(mine(t, state, a), mine(t, state, b)...); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestSecondFails: when the second of two filesystems has no view, the first keeps none.
func TestSecondFails(t *testing.T) {
	state := t.TempDir()
	top := filepath.Join(t.TempDir(), "mnt")
	dev := device(t)
	fssnaptest.MountAt(t, dev, top, "btrfs", "")
	data := mkdir(t, filepath.Join(top, "data"))
	other := t.TempDir()
	ds := append(drivers(state), command.New(command.Options{Create: "echo out of licences >&2; exit 1", Destroy: "true", StateDir: state}))
	s, err := fssnap.NewSet(ctx, ds, []string{data, other}, fssnap.Options{StateDir: state})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Create(ctx); err == nil || !strings.Contains(err.Error(), "out of licences") {
		t.Errorf("create: %v", err)
	}
	if left := mine(t, state, dev); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if found, err := fssnap.Find(ctx, ds[1:], fssnap.FindOptions{StateDir: state}); err != nil || len(found) > 0 {
		t.Errorf("left: %v, %v", found, err)
	}
	if err := s.Close(ctx); err != nil {
		t.Error(err)
	}
}

// TestCancelled: a cancelled run still cleans up.
func TestCancelled(t *testing.T) {
	state := t.TempDir()
	top := filepath.Join(t.TempDir(), "mnt")
	dev := device(t)
	fssnaptest.MountAt(t, dev, top, "btrfs", "")
	s := fssnaptest.NewSet(t, fssnap.Options{StateDir: state}, drivers(state), mkdir(t, filepath.Join(top, "data")))
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := s.Verify(cancelled, fssnap.VerifyOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("verify: %v", err)
	}
	if err := s.Close(cancelled); err != nil {
		t.Error(err)
	}
	if left := mine(t, state, dev); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	s, err := fssnap.NewSet(ctx, drivers(state), []string{filepath.Join(top, "data")}, fssnap.Options{StateDir: state})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Create(cancelled); !errors.Is(err, context.Canceled) {
		t.Errorf("create: %v", err)
	}
	if left := mine(t, state, dev); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestStateDir: no view is made that cannot be recorded.
func TestStateDir(t *testing.T) {
	top := filepath.Join(t.TempDir(), "mnt")
	dev := device(t)
	fssnaptest.MountAt(t, dev, top, "btrfs", "")
	data := mkdir(t, filepath.Join(top, "data"))
	full := filepath.Join(t.TempDir(), "full")
	fssnaptest.MountAt(t, "tmpfs", full, "tmpfs", "size=16k")
	mkdir(t, filepath.Join(full, "views"))
	for i := 0; ; i++ {
		if err := os.WriteFile(filepath.Join(full, fmt.Sprint(i)), make([]byte, 4096), 0o600); err != nil {
			if !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
			break
		}
	}
	for name, state := range map[string]string{"full": full, "not a directory": "/dev/null", "read-only": "/proc"} {
		s, err := fssnap.NewSet(ctx, drivers(state), []string{data}, fssnap.Options{StateDir: state})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Create(ctx); err == nil || !strings.Contains(err.Error(), "no views are made") {
			t.Errorf("%s: %v", name, err)
		}
		if left := mine(t, "", dev); len(left) > 0 {
			t.Fatalf("%s: made %v", name, left)
		}
		if err := s.Close(ctx); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if e, err := os.ReadDir(filepath.Join(full, "views")); err != nil || len(e) > 0 {
		t.Errorf("left: %v, %v", e, err)
	}
}

// TestKilledHalfway: a run that died before it wrote down what it had made.
func TestKilledHalfway(t *testing.T) {
	state := t.TempDir()
	fssnaptest.Clean(t, state)
	top := filepath.Join(t.TempDir(), "mnt")
	dev := device(t)
	fssnaptest.MountAt(t, dev, top, "btrfs", "")
	data := mkdir(t, filepath.Join(top, "data"))
	ds := drivers(state)
	s := fssnaptest.NewSet(t, fssnap.Options{StateDir: state, KeepLast: 1}, ds, data)
	if err := s.Close(ctx); err != nil { // as good as dead: nobody has the lock
		t.Fatal(err)
	}
	file := filepath.Join(state, "views", s.Name()+".json")
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the record is %v, %v", st.Mode(), err)
	}
	var record map[string]any
	if err := json.Unmarshal(raw, &record); err != nil {
		t.Fatal(err)
	}
	rewrite := func(change func()) {
		change()
		data, err := json.Marshal(record)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	find := fssnap.FindOptions{StateDir: state}

	// A record that cannot be understood protects its views, and is not passed over.
	rewrite(func() { record["version"] = 99 })
	if removed, err := fssnap.RemoveLeftovers(ctx, ds, find); err == nil || len(removed) > 0 {
		t.Errorf("a record from the future: %v, %v", removed, err)
	}
	found, err := fssnap.Find(ctx, ds, find)
	if err == nil || !slices.ContainsFunc(found, func(f fssnap.Found) bool { return f.Set() == s.Name() && f.State == fssnap.Live }) {
		t.Errorf("a record from the future: %+v, %v", found, err)
	}

	rewrite(func() { record["version"], record["kept"], record["views"] = 1, false, nil })
	// A lock and a half-written record of another that died even earlier.
	early := filepath.Join(state, "views", "holdfast-20200101T000000Z-abcdef")
	write(t, early+".lock", "")
	write(t, early+".123.tmp", "{")
	removed, err := fssnap.RemoveLeftovers(ctx, ds, find)
	if err != nil || len(removed) != 1 || removed[0].Set() != s.Name() {
		t.Errorf("removed: %+v, %v", removed, err)
	}
	if left := mine(t, state, dev); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if e, err := os.ReadDir(filepath.Join(state, "views")); err != nil || len(e) > 0 {
		t.Errorf("left: %v, %v", e, err)
	}
	if removed, err := fssnap.RemoveLeftovers(ctx, ds, find); err != nil || len(removed) > 0 {
		t.Errorf("once more: %v, %v", removed, err)
	}
}

// TestSample: large trees are sampled, small ones compared whole, the same seed picks the same, and
// the roots that are named are compared in any case.
func TestSample(t *testing.T) {
	state := t.TempDir()
	top := filepath.Join(t.TempDir(), "mnt")
	fssnaptest.MountAt(t, device(t), top, "btrfs", "")
	data := filepath.Join(top, "data")
	for i := range 2000 {
		write(t, filepath.Join(data, fmt.Sprintf("spaces/%02d/%02d/%d", i%40, i%7, i)), "x")
	}
	space := filepath.Join(data, "spaces/07")
	// A driver whose views lose one attribute, of one directory in thousands of entries.
	ds := []fssnap.Driver{command.New(command.Options{
		Create:   `v="${HOLDFAST_SOURCE}.$HOLDFAST_VIEW_NAME"; cp -aT "$HOLDFAST_SOURCE" "$v" && echo "$v"`,
		Destroy:  `rm -rf "${HOLDFAST_SOURCE}.$HOLDFAST_VIEW_NAME"`,
		StateDir: state,
	})}
	if err := unix.Setxattr(space, "user.oc.space.id", []byte("id"), 0); err != nil {
		t.Fatal(err)
	}
	s := fssnaptest.NewSet(t, fssnap.Options{StateDir: state}, ds, data)
	if v, err := s.Verify(ctx, fssnap.VerifyOptions{Frozen: true}); err != nil || v.Compared != 201 { // with the top
		t.Errorf("%+v, %v", v, err)
	}
	if err := unix.Removexattr(fssnaptest.At(t, s, space), "user.oc.space.id"); err != nil {
		t.Fatal(err)
	}
	var lossy *fssnap.LossyViewError
	if _, err := s.Verify(ctx, fssnap.VerifyOptions{Frozen: true, Sample: 1, Roots: []string{space}}); !errors.As(err, &lossy) || lossy.Path != space || lossy.Attribute != "user.oc.space.id" {
		t.Errorf("a root that is named: %v", err)
	}
	if _, err := s.Verify(ctx, fssnap.VerifyOptions{Frozen: true, Sample: 3000}); !errors.As(err, &lossy) {
		t.Errorf("a large sample: %v", err)
	}
	caught := map[uint64]bool{}
	for range 2 {
		for seed := range uint64(8) {
			_, err := s.Verify(ctx, fssnap.VerifyOptions{Frozen: true, Sample: 20, Seed: seed})
			if was, again := caught[seed]; again && was != (err != nil) {
				t.Errorf("seed %d: %v", seed, err)
			}
			caught[seed] = err != nil
		}
	}
}

// TestRun: commands are bounded and say what went wrong.
func TestRun(t *testing.T) {
	out, err := fssnap.Run(ctx, "sh", "-c", `echo "$LC_ALL $TZ"; cat`)
	if err != nil || string(out) != "C UTC\n" {
		t.Errorf("%q, %v", out, err)
	}
	var ce *fssnap.CommandError
	if _, err := fssnap.Run(ctx, "sh", "-c", "echo a b >&2; echo c >&2; exit 7"); !errors.As(err, &ce) || ce.Stderr != "a b c" || !strings.Contains(err.Error(), "exit status 7") {
		t.Errorf("%v", err)
	}
	if _, err := fssnap.Run(ctx, "head", "-c", "20000000", "/dev/zero"); err == nil || !strings.Contains(err.Error(), "16 MiB") {
		t.Errorf("%v", err)
	}
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	begin := time.Now()
	if _, err := fssnap.Run(short, "sh", "-c", "sleep 60 | sleep 60"); !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) > 4*time.Second {
		t.Errorf("%v after %v", err, time.Since(begin))
	}
}
