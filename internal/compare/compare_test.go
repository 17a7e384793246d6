package compare_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/backup"
	"github.com/holdfast-backup/holdfast/internal/compare"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// backed is a sample instance and its snapshot.
type backed struct {
	dir  string
	inst *ocis.Instance
	r    *repo.Repository
	sn   *snapshot.Snapshot
}

func back(t *testing.T, fixture string) *backed {
	t.Helper()
	ctx := t.Context()
	b := &backed{dir: testfixture.Unpack(t, fixture)}
	// Things that no server makes.
	extra := filepath.Join(b.dir, "config", "extra")
	must(t, os.Mkdir(extra, 0o755))
	must(t, os.WriteFile(filepath.Join(extra, "one"), []byte("one"), 0o640))
	must(t, os.Link(filepath.Join(extra, "one"), filepath.Join(extra, "two")))
	must(t, os.Symlink("one", filepath.Join(extra, "link")))
	must(t, unix.Mkfifo(filepath.Join(extra, "fifo"), 0o600))
	var err error
	b.inst, err = discover.Discover(ctx, discover.Options{BaseDataPath: filepath.Join(b.dir, "data"), ConfigDir: filepath.Join(b.dir, "config"), NoSizes: true})
	must(t, err)
	b.r, err = repo.Init(ctx, mem.New(), "pw", repo.InitOptions{KDF: repo.KDF{N: 16, R: 8, P: 1}})
	must(t, err)
	res, err := backup.Run(ctx, backup.Options{Instance: b.inst, Repo: b.r, Freezer: freeze.None{}, Hostname: "test", Version: "test"})
	must(t, err)
	b.sn, err = snapshot.Load(ctx, b.r, res.SnapshotID)
	must(t, err)
	return b
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// run compares as if the picture had been taken at a moment.
func (b *backed) run(t *testing.T, at time.Time, o compare.Options) *compare.Report {
	t.Helper()
	sn := *b.sn
	sn.Time = at
	rep, err := compare.Run(t.Context(), b.r, &sn, b.inst, o)
	must(t, err)
	if len(rep.Skipped) > 0 {
		t.Errorf("skipped: %q", rep.Skipped)
	}
	return rep
}

var all = compare.Options{Percent: 100, Seed: 1}

// An instance that nobody touches is the same in everything.
func TestSame(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"ocis-posix", "opencloud-posixfs"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := back(t, name)
			rep := b.run(t, time.Now().Add(time.Hour), all)
			if rep.Differ+rep.Changed+rep.Gone+rep.New > 0 || rep.Same < 500 || rep.Files < 50 || rep.Spaces != rep.Of {
				t.Errorf("%+v", rep)
			}
			// A sample is a part, and a seed picks the same one.
			x, y := b.run(t, time.Now().Add(time.Hour), compare.Options{Percent: 20, Seed: 5}), b.run(t, time.Now().Add(time.Hour), compare.Options{Percent: 20, Seed: 5})
			if x.Files != y.Files || x.Same != y.Same || x.Same >= rep.Same || x.Files >= rep.Files || x.Spaces < 1 || x.Differ > 0 {
				t.Errorf("%+v and %+v of %+v", x, y, rep)
			}
		})
	}
}

// Each kind of change, once as something that happened since, and once as something that nobody admits to.
func TestChanges(t *testing.T) {
	t.Parallel()
	cases := []struct {
		name   string
		change func(t *testing.T, dir string, blob string)
		want   string // of the difference
		where  string // end of its path; "" is the blob
	}{
		{"content, with the old time", func(t *testing.T, _, blob string) {
			st, err := os.Stat(blob)
			must(t, err)
			p, err := os.ReadFile(blob)
			must(t, err)
			p[len(p)/2] ^= 1
			must(t, os.WriteFile(blob, p, 0o600))
			must(t, os.Chtimes(blob, st.ModTime(), st.ModTime()))
		}, "its content differs", ""},
		{"time", func(t *testing.T, _, blob string) { must(t, os.Chtimes(blob, time.Now(), time.Now())) }, "it bears the time", ""},
		{"size", func(t *testing.T, _, blob string) { must(t, os.Truncate(blob, 1)) }, "it has 1 bytes", ""},
		{"mode", func(t *testing.T, _, blob string) { must(t, os.Chmod(blob, 0o444)) }, "it has the mode 0444", ""},
		{"owner", func(t *testing.T, _, blob string) { must(t, os.Chown(blob, 4711, 4712)) }, "it belongs to 4711:4712", ""},
		{"attribute", func(t *testing.T, _, blob string) { must(t, unix.Setxattr(blob, "user.x", []byte("y"), 0)) }, `its attribute "user.x" is not in the snapshot`, ""},
		{"type", func(t *testing.T, _, blob string) { must(t, os.Remove(blob)); must(t, os.Mkdir(blob, 0o700)) }, "it is a dir, in the snapshot a file", ""},
		{"a FIFO in its place", func(t *testing.T, _, blob string) { must(t, os.Remove(blob)); must(t, unix.Mkfifo(blob, 0o600)) }, "it is a fifo", ""},
		{"gone", func(t *testing.T, _, blob string) { must(t, os.Remove(blob)) }, "it is not there", ""},
		{"new", func(t *testing.T, _, blob string) { must(t, os.WriteFile(blob+"x", nil, 0o600)) }, "the snapshot does not have it", "x"},
		{"target of a link", func(t *testing.T, dir, _ string) {
			p := filepath.Join(dir, "config/extra/link")
			var st unix.Stat_t
			must(t, unix.Lstat(p, &st))
			must(t, os.Remove(p))
			must(t, os.Symlink("two", p))
			must(t, unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW))
		}, "it points elsewhere", "extra/link"},
	}
	b := back(t, "opencloud-posix")
	var blobs []string
	must(t, filepath.WalkDir(filepath.Join(b.dir, "data/storage/users/spaces"), func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && strings.Contains(p, "/blobs/") {
			if fi, err := d.Info(); err == nil && fi.Size() > 100 {
				blobs = append(blobs, p)
			}
		}
		return err
	}))
	if len(blobs) < len(cases) {
		t.Fatalf("%d blobs", len(blobs))
	}
	before := time.Now()
	time.Sleep(20 * time.Millisecond)
	for i, c := range cases {
		c.change(t, b.dir, blobs[i])
	}
	// The picture was taken before: normal.
	rep := b.run(t, before, all)
	if rep.Differ > 0 || rep.Gone != 1 || rep.New != 1 || rep.Changed < int64(len(cases))-2 {
		t.Errorf("as changes: %+v", rep)
	}
	// The picture was taken afterwards, and should have it: defects.
	rep = b.run(t, time.Now().Add(time.Hour), all)
	for i, c := range cases {
		found := false
		for _, d := range rep.Differences {
			place := d.Path == blobs[i]
			if c.where != "" {
				place = strings.HasSuffix(d.Path, c.where)
			}
			found = found || place && strings.Contains(d.What, c.want)
		}
		if !found {
			t.Errorf("%s is not among %+v", c.name, rep.Differences)
		}
	}
	// The times of the folders of what was made, removed or replaced differ as well.
	if rep.Differ < int64(len(cases)) || rep.Differ > int64(len(cases))+8 || rep.Changed+rep.Gone+rep.New > 0 {
		t.Errorf("as defects: %+v", rep)
	}
}
