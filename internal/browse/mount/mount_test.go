package mount

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/browse/browsetest"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// mounted mounts snapshots for the time of a test.
func mounted(t *testing.T, r browse.Repo, list ...*snapshot.Snapshot) (*Server, string) {
	t.Helper()
	dir := t.TempDir()
	s, err := Mount(r, list, dir, Options{Warn: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatalf("%v: the tests need FUSE: the device /dev/fuse", err)
	}
	t.Cleanup(func() {
		ended := make(chan struct{})
		go func() { s.Wait(); close(ended) }()
		if err := s.Unmount(); err != nil {
			t.Error(err)
		}
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			t.Error("it did not end")
		}
		if list, err := os.ReadDir(dir); err != nil || len(list) > 0 {
			t.Errorf("something is still mounted: %v, %v", list, err)
		}
	})
	return s, dir
}

func TestMountFixture(t *testing.T) {
	c := browsetest.Fixture(t, testfixture.OpenCloudPosix)
	_, dir := mounted(t, c.Repo, c.Snapshot)
	v, err := browse.Open(t.Context(), c.Repo, c.Snapshot)
	if err != nil {
		t.Fatal(err)
	}
	base := filepath.Join(dir, "snapshots", "latest")
	files := 0
	same := func(path string, it *browse.Item) {
		t.Helper()
		got, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
			return
		}
		st, err := os.Stat(path)
		if err != nil || !st.ModTime().Equal(it.Node.ModTime) || st.Mode().Perm() != 0o400 || st.Size() != int64(it.Node.Size) {
			t.Errorf("%s: %v, %v", path, st, err)
		}
		want, err := snapshot.LoadContent(t.Context(), c.Repo, it.Node, 1<<20)
		if err != nil || string(got) != string(want) {
			t.Errorf("%s differs: %v", path, err)
		}
		files++
	}
	for _, s := range v.Spaces() {
		root, err := v.Item(t.Context(), s, "")
		if err != nil {
			t.Fatal(err)
		}
		var walk func(it *browse.Item)
		walk = func(it *browse.Item) {
			if !it.IsDir() {
				same(filepath.Join(base, s.Folder, it.Path), it)
				vers, err := v.Versions(t.Context(), it)
				if err != nil {
					t.Fatal(err)
				}
				for _, x := range vers {
					same(filepath.Join(base, s.Folder, ".versions", it.Path, x.Stamp), x)
				}
				return
			}
			list, err := v.List(t.Context(), it)
			if err != nil {
				t.Fatal(err)
			}
			for _, x := range list {
				walk(x)
			}
		}
		walk(root)
		trash, err := v.Trash(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range trash {
			if !x.IsDir() {
				same(filepath.Join(base, s.Folder, ".trash", x.Path), x)
			}
		}
	}
	if files < 180 {
		t.Errorf("only %d files were read", files)
	}
	for _, err := range []error{
		os.WriteFile(filepath.Join(base, "new"), nil, 0o644), os.Mkdir(filepath.Join(dir, "new"), 0o755), os.Remove(filepath.Join(dir, "snapshots", "latest")),
	} {
		if err == nil {
			t.Error("it can be written to")
		}
	}
}

// TestMountHostile: names that are none get others, and links are not shown.
func TestMountHostile(t *testing.T) {
	r := browsetest.NewRepo(t)
	sn := browsetest.Snapshot(t, r, browsetest.Epoch, browsetest.Space{ID: "s1", Name: "A", Alias: "personal/alan", Files: []browsetest.Node{
		{Name: "..", Content: "up"}, {Name: ".", Content: "here"}, {Name: "", Content: "nothing"}, {Name: "../../evil", Content: "evil"}, {Name: "nul\x00", Content: "nul"},
		{Name: "twice", Content: "1"}, {Name: "twice", Content: "2"}, {Name: strings.Repeat("n", 300), Content: "long"}, {Name: "link", Type: snapshot.Symlink, Target: "/etc/passwd"},
		{Name: "dev", Type: snapshot.CharDev}, {Name: ".versions", Content: "own"}, {Name: "bytes-\xff", Content: "bytes"},
		{Name: "old", Content: "before the epoch", MTime: time.Unix(-1e9, 0)},
	}, Versions: []browsetest.Node{{Name: "twice", Dir: true, Nodes: []browsetest.Node{{Name: "2026-11-20T12:00:00Z", Content: "0"}}}}})
	_, dir := mounted(t, r, sn)
	got := map[string]string{}
	base := filepath.Join(dir, "snapshots", "2026-11-20T12-00-00Z", "personal", "alan")
	err := filepath.WalkDir(base, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(p)
		got[strings.TrimPrefix(p, base+"/")] = string(data)
		return err
	})
	want := map[string]string{
		"%2E%2E": "up", "%2E": "here", "%00": "nothing", "..%2F..%2Fevil": "evil", "nul%00": "nul", "twice": "1", "twice (2)": "2", ".versions (2)": "own",
		"bytes-\xff": "bytes", ".versions/twice/2026-11-20T12:00:00Z": "0", "old": "before the epoch", snapshot.SafeName(strings.Repeat("n", 300)): "long",
	}
	if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%v\n got %q\nwant %q", err, got, want)
	}
}

// TestMountForgets: memory does not follow what was looked at.
func TestMountForgets(t *testing.T) {
	defer func(l, k int) { listedEntries, knownEntries = l, k }(listedEntries, knownEntries)
	listedEntries, knownEntries = 500, 200
	r := browsetest.NewRepo(t)
	var many []browsetest.Node
	for i := range 30 {
		d := browsetest.Node{Name: fmt.Sprint("dir", i), Dir: true}
		for k := range 100 {
			d.Nodes = append(d.Nodes, browsetest.Node{Name: fmt.Sprint("file", k), Content: fmt.Sprint(i, k)})
		}
		many = append(many, d)
	}
	s, dir := mounted(t, r, browsetest.Snapshot(t, r, browsetest.Epoch, browsetest.Space{ID: "s1", Name: "A", Alias: "personal/alan", Files: many}))
	look := func() {
		files := 0
		err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			_, err = d.Info()
			if !d.IsDir() && d.Type()&fs.ModeSymlink == 0 {
				files++
			}
			return err
		})
		if err != nil || files != 3000 {
			t.Fatalf("%d files, %v", files, err)
		}
	}
	look()
	look()
	nodes := 0
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		nodes = count(s)
		if nodes <= 2*knownEntries {
			break
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if nodes > 2*knownEntries || s.listed > listedEntries+101 || len(s.known) > knownEntries {
		t.Errorf("%d entries are known, %d listed", nodes, s.listed)
	}
}

// count counts the entries that the kernel knows of.
func count(s *Server) int {
	n := 0
	var walk func(d *dir)
	walk = func(d *dir) {
		for _, c := range d.Children() {
			n++
			if sub, ok := c.Operations().(*dir); ok {
				walk(sub)
			}
		}
	}
	walk(s.root)
	return n
}

// TestMountBusy: an open file does not keep the mount from going.
func TestMountBusy(t *testing.T) {
	r := browsetest.NewRepo(t)
	sn := browsetest.Snapshot(t, r, browsetest.Epoch, browsetest.Space{ID: "s1", Name: "A", Alias: "personal/alan", Files: []browsetest.Node{{Name: "f", Content: "x"}}})
	dir := t.TempDir()
	s, err := Mount(r, []*snapshot.Snapshot{sn}, dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { s.Wait(); close(ended) }()
	f, err := os.Open(filepath.Join(dir, "snapshots", "latest", "personal", "alan", "f"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Unmount(); err != nil {
		t.Error(err)
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) > 0 {
		t.Errorf("a busy mount stays: %v, %v", list, err)
	}
	f.Close()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Error("it did not end")
	}
	_ = unix.Unmount(dir, unix.MNT_DETACH)
}
