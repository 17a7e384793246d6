package save_test

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/browse/browsetest"
	"github.com/holdfast-backup/holdfast/internal/browse/save"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

var now = time.Date(2026, 11, 26, 20, 0, 0, 0, time.UTC)

func space(t testing.TB, files ...browsetest.Node) (*browse.View, *browse.Item) {
	t.Helper()
	r := browsetest.NewRepo(t)
	sn := browsetest.Snapshot(t, r, now, browsetest.Space{ID: "s1", Name: "Alan", Alias: "personal/alan", Files: files})
	v, err := browse.Open(t.Context(), r, sn)
	if err != nil {
		t.Fatal(err)
	}
	it, err := v.Lookup(t.Context(), "personal/alan")
	if err != nil {
		t.Fatal(err)
	}
	return v, it
}

// tree lists what is in a folder: path to content; folders end in a slash, links in @.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		switch {
		case d.IsDir():
			out[rel+"/"] = ""
		case d.Type()&fs.ModeSymlink != 0:
			out[rel+"@"], _ = os.Readlink(p)
		default:
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			out[rel] = string(data)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func equal(t testing.TB, got, want map[string]string) {
	t.Helper()
	for k, v := range want {
		if g, ok := got[k]; !ok || g != v {
			t.Errorf("%q is %q (%v), want %q", k, g, ok, v)
		}
	}
	for k := range got {
		if _, ok := want[k]; !ok {
			t.Errorf("%q is too much", k)
		}
	}
}

var files = []browsetest.Node{
	{Name: "a.txt", Content: "the first file, of several chunks"},
	{Name: "empty"},
	{Name: "dir", Dir: true, MTime: browsetest.Epoch.Add(time.Hour), Nodes: []browsetest.Node{
		{Name: "b.txt", Content: "b", MTime: browsetest.Epoch.Add(-time.Hour)},
		{Name: "none", Dir: true, Nodes: []browsetest.Node{}},
	}},
}

var filesTree = map[string]string{"a.txt": "the first file, of several chunks", "empty": "", "dir/": "", "dir/b.txt": "b", "dir/none/": ""}

func TestFolder(t *testing.T) {
	v, it := space(t, files...)
	dir := filepath.Join(t.TempDir(), "new", "dir")
	dry, err := save.ToFolder(t.Context(), v, it, dir, save.Options{DryRun: true, Now: now})
	if err != nil || dry.Files != 3 || dry.Folders != 2 || dry.Bytes != 34 {
		t.Errorf("dry run: %+v, %v", dry, err)
	}
	if _, err := os.Stat(filepath.Dir(dir)); err == nil {
		t.Error("the dry run made a folder")
	}
	res, err := save.ToFolder(t.Context(), v, it, dir, save.Options{Now: now})
	if err != nil || res.Files != 3 || res.Folders != 2 || res.Bytes != 34 {
		t.Fatalf("%+v, %v", res, err)
	}
	equal(t, tree(t, dir), filesTree)
	for name, want := range map[string]time.Time{"a.txt": browsetest.Epoch, "dir/b.txt": browsetest.Epoch.Add(-time.Hour), "dir": browsetest.Epoch.Add(time.Hour)} {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil || !st.ModTime().Equal(want) {
			t.Errorf("%s has the time %v, %v; want %v", name, st.ModTime(), err, want)
		}
	}
	if st, _ := os.Stat(dir); st.Mode().Perm() != 0o700 {
		t.Errorf("the folder has the mode %v", st.Mode())
	}
	// Again: nothing is written. What differs is, and what was there stays beside it.
	before, _ := os.Stat(filepath.Join(dir, "a.txt"))
	if err := os.WriteFile(filepath.Join(dir, "dir", "b.txt"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, "new")); err != nil {
		t.Fatal(err)
	}
	keep, err := save.ToFolder(t.Context(), v, it, dir, save.Options{Keep: true, Now: now})
	if err != nil || keep.Files != 0 || keep.Kept != 1 || keep.Unchanged != 2 {
		t.Errorf("keep: %+v, %v", keep, err)
	}
	res, err = save.ToFolder(t.Context(), v, it, dir, save.Options{Now: now})
	if err != nil || res.Files != 1 || res.Unchanged != 2 || len(res.MovedAside) != 1 {
		t.Errorf("%+v, %v", res, err)
	}
	if after, _ := os.Stat(filepath.Join(dir, "a.txt")); !os.SameFile(before, after) {
		t.Error("a file that was right was written again")
	}
	want := map[string]string{"dir/b.txt.before-20261126T200000Z": "x", "new@": "/etc/passwd"}
	for k, v := range filesTree {
		want[k] = v
	}
	equal(t, tree(t, dir), want)
	// A single file goes into the folder under its name.
	one, err := v.Lookup(t.Context(), "personal/alan/dir/b.txt")
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	if _, err := save.ToFolder(t.Context(), v, one, dir, save.Options{Now: now}); err != nil {
		t.Fatal(err)
	}
	equal(t, tree(t, dir), map[string]string{"b.txt": "b"})
}

// hostile are names that no server writes.
var hostile = []browsetest.Node{
	{Name: "..", Content: "up"},
	{Name: ".", Content: "here"},
	{Name: "", Content: "nothing"},
	{Name: "../../evil", Content: "evil"},
	{Name: "/etc/evil", Content: "abs"},
	{Name: "nul\x00", Content: "nul"},
	{Name: "link", Type: snapshot.Symlink, Target: "/outside"},
	{Name: "link", Dir: true, Nodes: []browsetest.Node{{Name: "x", Content: "through the link"}}},
	{Name: "twice", Content: "1"},
	{Name: "twice", Content: "2"},
	{Name: "twice (2)", Content: "own"},
	{Name: "clash", Dir: true, Nodes: []browsetest.Node{{Name: "x", Content: "in the folder"}}},
	{Name: "clash", Content: "the file"},
	{Name: "%2E%2E", Content: "the escaped one"},
	{Name: strings.Repeat("n", 300), Content: "long"},
	{Name: "..", Dir: true, Nodes: []browsetest.Node{{Name: "..", Dir: true, Nodes: []browsetest.Node{{Name: "x", Content: "far up"}}}}},
	{Name: "dev", Type: snapshot.CharDev},
	{Name: "not-utf8-\xff", Content: "bytes"},
	{Name: "back\\slash:", Content: "windows"},
}

func contents(m map[string]string) []string {
	var out []string
	for k, v := range m {
		if !strings.HasSuffix(k, "/") {
			out = append(out, v)
		}
	}
	sort.Strings(out)
	return out
}

// wantHostile are the contents that must all be there, under whatever names.
var wantHostile = []string{
	"1", "2", "abs", "bytes", "evil", "far up", "here", "in the folder", "long", "nothing", "nul", "own", "the escaped one",
	"the file", "through the link", "up", "windows",
}

func TestHostile(t *testing.T) {
	v, it := space(t, hostile...)
	outer := t.TempDir()
	dir := filepath.Join(outer, "a", "b", "dest")
	// What lies at the destination must not lead out of it either.
	outside := filepath.Join(outer, "outside")
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.Mkdir(outside, 0o755), os.Symlink(outside, filepath.Join(dir, "clash")),
		os.Symlink(filepath.Join(outside, "f"), filepath.Join(dir, "twice"))); err != nil {
		t.Fatal(err)
	}
	res, err := save.ToFolder(t.Context(), v, it, dir, save.Options{Now: now})
	if err != nil {
		t.Errorf("%+v: %v", res, err)
	}
	got := tree(t, dir)
	links := map[string]string{}
	for k := range got {
		if strings.HasSuffix(k, "@") {
			links[k] = got[k]
			delete(got, k)
		}
	}
	if g := contents(got); strings.Join(g, "|") != strings.Join(wantHostile, "|") {
		t.Errorf("contents are\n%q, want\n%q", g, wantHostile)
	}
	if got["twice (2)"] != "own" || got["%2E%2E"] != "the escaped one" || got["not-utf8-\xff"] != "bytes" {
		t.Errorf("good names went to others: %q", got)
	}
	if len(links) != 2 || len(res.MovedAside) != 2 {
		t.Errorf("what was in the way: %q, %q", links, res.MovedAside)
	}
	if len(res.Skipped) != 2 || len(res.Renamed) < 9 {
		t.Errorf("skipped %q, renamed %+v", res.Skipped, res.Renamed)
	}
	all := tree(t, outer)
	for k := range all {
		if !strings.HasPrefix(k, "a/") && k != "outside/" {
			t.Errorf("%q was written outside", k)
		}
	}
	if rest := tree(t, filepath.Join(outer, "a")); len(rest) != len(tree(t, dir))+2 {
		t.Errorf("something was written beside the destination")
	}
	// Again: all is right already.
	again, err := save.ToFolder(t.Context(), v, it, dir, save.Options{Now: now.Add(time.Hour)})
	if err != nil || again.Files != 0 || again.Unchanged != int64(len(wantHostile)) || len(again.MovedAside) != 0 {
		t.Errorf("again: %+v, %v", again, err)
	}
}

func TestHostileArchives(t *testing.T) {
	v, it := space(t, hostile...)
	for _, f := range []save.Format{save.Tar, save.Zip} {
		var b bytes.Buffer
		if _, err := save.ToArchive(t.Context(), v, it, f, &b, save.Options{Now: now}); err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		add := func(name string, r io.Reader) {
			p, err := io.ReadAll(r)
			if err != nil {
				t.Error(err)
			}
			if _, ok := got[name]; ok {
				t.Errorf("%s: %q is there twice", f, name)
			}
			got[name] = string(p)
			for _, part := range strings.Split(strings.TrimSuffix(name, "/"), "/") {
				if part == "" || part == "." || part == ".." || strings.Contains(part, "\x00") || f == save.Zip && strings.ContainsAny(part, `\:`) {
					t.Errorf("%s: the name %q", f, name)
				}
			}
		}
		if f == save.Tar {
			r := tar.NewReader(&b)
			for {
				h, err := r.Next()
				if err == io.EOF {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				if h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeDir {
					t.Errorf("tar: %q is of type %c", h.Name, h.Typeflag)
				}
				add(h.Name, r)
			}
		} else {
			z, err := zip.NewReader(bytes.NewReader(b.Bytes()), int64(b.Len()))
			if err != nil {
				t.Fatal(err)
			}
			for _, x := range z.File {
				r, err := x.Open()
				if err != nil {
					t.Fatal(err)
				}
				add(x.Name, r)
			}
		}
		if g := contents(got); strings.Join(g, "|") != strings.Join(wantHostile, "|") {
			t.Errorf("%s: contents are\n%q, want\n%q", f, g, wantHostile)
		}
	}
}

// TestDeep: folders beyond all measure end with an error, not with the program.
func TestDeep(t *testing.T) {
	defer save.SetMaxDepth(100)()
	n := browsetest.Node{Name: "f", Content: "deep"}
	for range 120 {
		n = browsetest.Node{Name: "d", Dir: true, Nodes: []browsetest.Node{n}}
	}
	v, it := space(t, n)
	dir := t.TempDir()
	res, err := save.ToFolder(t.Context(), v, it, dir, save.Options{Now: now})
	var failed *save.FailedError
	if !errors.As(err, &failed) || res.Failures != 1 || res.Folders < 95 {
		t.Errorf("%d folders, %v", res.Folders, err)
	}
	if _, err := save.ToArchive(t.Context(), v, it, save.Tar, io.Discard, save.Options{}); err == nil {
		t.Error("the archive took it")
	}
}

func TestMismatch(t *testing.T) {
	v, it := space(t, browsetest.Node{Name: "bad", Content: "changed since", SHA1: strings.Repeat("a", 40)}, browsetest.Node{Name: "none", Content: "no checksum", SHA1: "-"})
	dir := t.TempDir()
	for range 2 { // also if it was there already
		res, err := save.ToFolder(t.Context(), v, it, dir, save.Options{Now: now})
		var m *save.MismatchError
		if !errors.As(err, &m) || m.Count != 1 || len(res.Mismatched) != 1 || res.Mismatched[0] != "bad" {
			t.Errorf("%+v, %v", res, err)
		}
	}
	equal(t, tree(t, dir), map[string]string{"bad": "changed since", "none": "no checksum"})
	file := filepath.Join(dir, "x.tar")
	var m *save.MismatchError
	if _, err := save.ToArchiveFile(t.Context(), v, it, save.Tar, file, save.Options{Now: now}); !errors.As(err, &m) {
		t.Errorf("archive: %v", err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
}

// TestResume: a file that an interrupted run has begun is gone on with, whatever its end looks like.
func TestResume(t *testing.T) {
	v, it := space(t, files...)
	content := filesTree["a.txt"]
	for _, begun := range []string{"", content[:7], content[:10], "rubbish, and more of it than the file has in the end, by far", content} {
		dir := t.TempDir()
		part := filepath.Join(dir, ".holdfast-"+sum16("a.txt")+".part")
		if err := os.WriteFile(part, []byte(begun), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := save.ToFolder(t.Context(), v, it, dir, save.Options{Now: now}); err != nil {
			t.Error(err)
		}
		equal(t, tree(t, dir), filesTree)
	}
	// No file of ours is in the way.
	dir := t.TempDir()
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, ".holdfast-"+sum16("a.txt")+".part")); err != nil {
		t.Fatal(err)
	}
	if res, err := save.ToFolder(t.Context(), v, it, dir, save.Options{Now: now}); err == nil || res.Failures != 1 {
		t.Errorf("%+v, %v", res, err)
	}
}

func sum16(name string) string {
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:8])
}

func TestArchiveFile(t *testing.T) {
	v, it := space(t, files...)
	dir := t.TempDir()
	file := filepath.Join(dir, "x.zip")
	if err := os.WriteFile(file, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := save.ToArchiveFile(t.Context(), v, it, save.Zip, file, save.Options{Now: now, Keep: true}); err == nil {
		t.Error("what exists was not kept")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := save.ToArchiveFile(ctx, v, it, save.Zip, file, save.Options{Now: now}); err == nil {
		t.Error("a cancelled run made an archive")
	}
	equal(t, tree(t, dir), map[string]string{"x.zip": "old"})
	res, err := save.ToArchiveFile(t.Context(), v, it, save.Zip, file, save.Options{Now: now})
	if err != nil || res.Files != 3 {
		t.Fatalf("%+v, %v", res, err)
	}
	got := tree(t, dir)
	if got["x.zip.before-20261126T200000Z"] != "old" || len(got) != 2 {
		t.Errorf("%q", got)
	}
	if st, _ := os.Stat(file); st.Mode().Perm() != 0o600 {
		t.Errorf("the archive has the mode %v", st.Mode())
	}
}

// TestCancel: an interrupted run leaves nothing under a name that is not whole.
func TestCancel(t *testing.T) {
	v, it := space(t, files...)
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	_, err := save.ToFolder(ctx, v, it, dir, save.Options{Now: now, Progress: func(string, int64) { cancel() }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	for name, got := range tree(t, dir) {
		if want, ok := filesTree[name]; ok && got != want {
			t.Errorf("%s is %q", name, got)
		} else if !ok && !strings.HasSuffix(name, ".part") {
			t.Errorf("%s is left", name)
		}
	}
	if _, err := save.ToFolder(t.Context(), v, it, dir, save.Options{Now: now}); err != nil {
		t.Error(err)
	}
	equal(t, tree(t, dir), filesTree)
}
