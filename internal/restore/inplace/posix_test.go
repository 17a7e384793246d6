package inplace_test

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/restore/inplace"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// p is a path of alan's posix space.
func (s *scene) p(in string) string { return filepath.Join(s.users(), "users/alan", in) }

// was is the same in the original.
func (s *scene) was(in string) string {
	return filepath.Join(s.dir, "data/storage/users/users/alan", in)
}

func (s *scene) x(file, name string) string {
	s.t.Helper()
	v := make([]byte, 1000)
	n, err := unix.Lgetxattr(file, s.pre+name, v)
	if err != nil {
		s.t.Fatalf("%s: %s: %v", file, name, err)
	}
	return string(v[:n])
}

func (s *scene) setX(file, name, value string) {
	s.t.Helper()
	s.must(unix.Lsetxattr(file, s.pre+name, []byte(value), 0))
}

// shrink takes n bytes from the size of the folders from in up.
func (s *scene) shrink(in string, n int) {
	s.t.Helper()
	for {
		size, err := strconv.Atoi(s.x(s.p(in), "treesize"))
		s.must(err)
		s.setX(s.p(in), "treesize", strconv.Itoa(size-n))
		if in == "" || in == "." {
			return
		}
		in = filepath.Dir(in)
	}
}

// sizeOf is the size of all files below in, in the original.
func (s *scene) sizeOf(in string) int {
	s.t.Helper()
	sum := 0
	s.must(filepath.WalkDir(s.was(in), func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			if d != nil && strings.HasPrefix(d.Name(), ".") {
				return filepath.SkipDir
			}
			return err
		}
		if !strings.HasSuffix(p, ".mlock") {
			n, err := strconv.Atoi(s.x(p, "blobsize"))
			s.must(err)
			sum += n
		}
		return nil
	}))
	return sum
}

// equalPosix compares the stores but for the times of folders, and sizes and times of the folders changed.
func (s *scene) equalPosix(changed ...string) {
	s.t.Helper()
	skip := map[string]bool{}
	for _, in := range changed {
		skip[filepath.Join("users/alan", in)] = true
		// The server itself had forgotten to add what came back from the trash.
		if got, want := s.x(s.p(in), "treesize"), strconv.Itoa(s.sizeOf(in)); got != want {
			s.t.Errorf("%q has the size %s, not %s", in, got, want)
		}
		if got := s.x(s.p(in), "tmtime"); got != "2026-11-26T12:00:00.000000005Z" {
			s.t.Errorf("%q has the time %s", in, got)
		}
	}
	diffs, err := testfixture.DiffOptions(filepath.Join(s.dir, "data/storage/users"), s.users(), testfixture.Options{})
	s.must(err)
	for _, d := range diffs {
		p, what, _ := strings.Cut(strings.TrimPrefix(d, "\""), "\": ")
		if u, err := strconv.Unquote("\"" + p + "\""); err == nil {
			p = u
		}
		fi, err := os.Lstat(filepath.Join(s.dir, "data/storage/users", p))
		if err == nil && fi.IsDir() && (strings.HasPrefix(what, "mtime ") || skip[p] && (strings.Contains(what, "tmtime") || strings.Contains(what, "treesize"))) {
			continue
		}
		s.t.Error(d)
	}
}

func (s *scene) cleanPosix() {
	s.t.Helper()
	for _, f := range s.check() {
		s.t.Error("found: ", f)
	}
	if _, err := os.Lstat(filepath.Join(s.data, "storage/users"+inplace.JournalDir)); !os.IsNotExist(err) {
		s.t.Error("what was being built was left")
	}
}

func TestPosix(t *testing.T) {
	w := newWorld(t, testfixture.OpenCloudPosix)
	t.Run("one file with its versions", func(t *testing.T) {
		s := w.scene(t)
		node := s.x(s.p("Round 0/versioned.txt"), "id")
		s.must(os.Remove(s.p("Round 0/versioned.txt")))
		s.must(os.RemoveAll(s.p(".oc-nodes/" + node[:2])))
		s.shrink("Round 0", 1240)
		res, err := s.run(node, node)
		s.must(err)
		if res.Nodes != 1 || res.Revisions != 4 || res.Blobs != 5 || len(res.Moved) > 0 {
			t.Errorf("%+v", res)
		}
		s.cleanPosix()
		s.equalPosix("Round 0", "")
		if res, err = s.run(node, node); err != nil || res.Unchanged != 5 || res.Nodes > 0 || len(res.Moved) > 0 {
			t.Errorf("the second time: %+v, %v", res, err)
		}
		s.dry = true
		if res, err = s.run(node, node); err != nil || res.Unchanged != 5 || res.Nodes+res.Revisions+res.Blobs > 0 || len(res.Moved) > 0 {
			t.Errorf("a dry run: %+v, %v", res, err)
		}
		s.must(os.Chtimes(s.p("Round 0/versioned.txt"), time.Now(), time.Now()))
		if res, err = s.run(node, node); err != nil || res.Unchanged != 4 || res.Nodes != 1 || res.Blobs != 1 || len(res.Moved) != 1 {
			t.Errorf("a dry run after a change: %+v, %v", res, err)
		}
		s.dry = false
		if _, err = s.run(node, node); err != nil {
			t.Error(err)
		}
		s.equalPosix("Round 0", "")
	})
	t.Run("a damaged node, and a content that is another one", func(t *testing.T) {
		s := w.scene(t)
		node := s.x(s.p("Round 0/dup1.bin"), "id")
		s.must(unix.Lremovexattr(s.p("Round 0/dup1.bin"), s.pre+"cs.sha1"))
		s.must(os.WriteFile(s.p("Round 0/dup1.bin"), []byte("bad"), 0o600))
		res, err := s.run(node, node)
		s.must(err)
		if len(res.Moved) != 1 || res.Aside == "" {
			t.Errorf("%+v", res)
		}
		s.cleanPosix()
		s.equalPosix("Round 0", "")
	})
	t.Run("one version", func(t *testing.T) {
		s := w.scene(t)
		node := s.x(s.p("Round 0/versioned.txt"), "id")
		const stamp = "2023-11-14T22:46:40Z"
		s.must(os.Remove(s.p(".oc-nodes/" + ocis.NodePath(node+".REV."+stamp))))
		res, err := s.run(node, node+".REV."+stamp)
		s.must(err)
		if res.Revisions != 1 || res.Nodes != 0 || res.Blobs != 1 {
			t.Errorf("%+v", res)
		}
		s.cleanPosix()
		s.equalPosix()
		s.must(os.Remove(s.p("Round 0/versioned.txt")))
		if _, err := s.run(node, node+".REV."+stamp); !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	})
	t.Run("a folder whose parent is gone, too", func(t *testing.T) {
		s := w.scene(t)
		folder, file := s.x(s.p("Round 0/a"), "id"), s.x(s.p("Round 0/a/b/файл-5.bin"), "id")
		size, err := strconv.Atoi(s.x(s.p("Round 0/a"), "treesize"))
		s.must(err)
		s.must(os.RemoveAll(s.p("Round 0/a")))
		s.shrink("Round 0", size)
		res, err := s.run(file, file)
		s.must(err)
		if len(res.Parents) != 2 || s.x(s.p("Round 0/a"), "treesize") != s.x(s.p("Round 0/a/b/файл-5.bin"), "blobsize") {
			t.Errorf("%+v", res)
		}
		s.cleanPosix()
		if _, err := s.run(folder, folder); err != nil {
			t.Fatal(err)
		}
		s.cleanPosix()
		// Nobody needs the lock files.
		s.must(os.WriteFile(s.p("Round 0/a/b.mlock"), nil, 0o600))
		lock, err := os.Stat(s.was("Round 0/a/b.mlock"))
		s.must(err)
		s.must(os.Chmod(s.p("Round 0/a/b.mlock"), lock.Mode()))
		s.must(os.Chtimes(s.p("Round 0/a/b.mlock"), lock.ModTime(), lock.ModTime()))
		s.ownAs(s.was("Round 0/a/b.mlock"), s.p("Round 0/a/b.mlock"))
		s.equalPosix("Round 0", "")
	})
	t.Run("trashed items", func(t *testing.T) {
		s := w.scene(t)
		for _, c := range []struct{ key, stamp string }{
			{"74291ec9-2e6b-41ee-960b-9a726df5ebca", ""}, {"72b78aa0-e9bb-45bb-a346-3cfc5ffaaad3", "2026-11-22T06:39:57"},
		} {
			item, info := s.p(".Trash/files/"+c.key+".trashitem"), s.p(".Trash/info/"+c.key+".trashinfo")
			node := s.x(item, "id")
			if c.stamp == "" {
				data, err := os.ReadFile(info)
				s.must(err)
				x, err := ocis.ParseTrashInfo(data)
				s.must(err)
				c.stamp = x.DeletionDate
			}
			s.must(os.RemoveAll(item))
			s.must(os.Remove(info))
			res, err := s.run(node, node+".T."+c.stamp)
			s.must(err)
			if len(res.Moved) > 0 {
				t.Errorf("%+v", res)
			}
		}
		s.cleanPosix()
		s.equalPosix()
		// What is in use is not put into the trash.
		item := s.p(".Trash/files/72b78aa0-e9bb-45bb-a346-3cfc5ffaaad3.trashitem")
		node := s.x(item, "id")
		s.must(os.Rename(item, s.p("Round 1/deleted.txt")))
		if _, err := s.run(node, node+".T.2026-11-22T06:39:57"); !errors.Is(err, inplace.ErrLives) {
			t.Error(err)
		}
		// From the trash into its place.
		s = w.scene(t)
		file := s.x(s.p("Round 0/dup1.bin"), "id")
		size, err := strconv.Atoi(s.x(s.p("Round 0/dup1.bin"), "blobsize"))
		s.must(err)
		s.must(os.Rename(s.p("Round 0/dup1.bin"), s.p(".Trash/files/"+file+".trashitem")))
		s.must(os.WriteFile(s.p(".Trash/info/"+file+".trashinfo"), []byte("[Trash Info]\nPath=Round 0/dup1.bin\nDeletionDate=2026-11-25T10:00:00"), 0o600))
		s.shrink("Round 0", size)
		if _, err := s.run(file, file); err != nil {
			t.Fatal(err)
		}
		s.cleanPosix()
		s.equalPosix("Round 0", "")
	})
	t.Run("a purged space", func(t *testing.T) {
		s := w.scene(t)
		s.whole = true
		id := s.spaceID()
		s.must(os.RemoveAll(s.p("")))
		for _, name := range []string{"by-type/personal", "by-user-id/" + alan} {
			s.unindex(name, id)
		}
		res, err := s.run("", "")
		s.must(err)
		if len(res.Indexes) != 2 || res.Nodes == 0 || len(res.Moved) > 0 {
			t.Errorf("%+v", res)
		}
		s.cleanPosix()
		for _, name := range []string{"by-type/personal", "by-user-id/" + alan} {
			s.sameIndex(name)
		}
		s.equalPosix()
	})
	t.Run("a space over a newer one, elsewhere", func(t *testing.T) {
		s := w.scene(t)
		s.must(os.Remove(s.p("Round 0/dup1.bin")))
		s.must(os.Rename(s.p(""), filepath.Join(s.users(), "users/alan2")))
		res, err := s.run("", "")
		s.must(err)
		if len(res.Moved) != 1 {
			t.Errorf("%+v", res)
		}
		s.must(os.Rename(filepath.Join(s.users(), "users/alan2"), s.p("")))
		s.cleanPosix()
		s.equalPosix()
	})
	t.Run("another space has the folder", func(t *testing.T) {
		s := w.scene(t)
		s.must(os.RemoveAll(s.p("")))
		s.must(os.Rename(filepath.Join(s.users(), "users/mary"), s.p("")))
		if _, err := s.run("", ""); err != nil {
			t.Fatal(err)
		}
		if got := s.x(s.p("")+"-"+s.spaceID(), "id"); got != s.spaceID() {
			t.Error(got)
		}
		if got := s.x(s.p(""), "space.alias"); got != "personal/mary" {
			t.Error(got)
		}
	})
	t.Run("another file has the name", func(t *testing.T) {
		s := w.scene(t)
		node := s.x(s.p("Round 0/dup1.bin"), "id")
		other := s.x(s.p("Round 0/renamed.bin"), "id")
		s.must(os.Rename(s.p("Round 0/renamed.bin"), s.p("Round 0/dup1.bin")))
		s.setX(s.p("Round 0/dup1.bin"), "name", "dup1.bin")
		s.shrink("Round 0", 60000)
		res, err := s.run(node, node)
		s.must(err)
		if len(res.Trashed) != 1 || res.Trashed[0] != "Round 0/dup1.bin" {
			t.Errorf("%+v", res)
		}
		if got := s.x(s.p(".Trash/files/"+other+".trashitem"), "id"); got != other {
			t.Error(got)
		}
		s.cleanPosix()
	})
	t.Run("moved and changed meanwhile", func(t *testing.T) {
		s := w.scene(t)
		node := s.x(s.p("Round 0/dup1.bin"), "id")
		size, err := strconv.Atoi(s.x(s.p("Round 0/dup1.bin"), "blobsize"))
		s.must(err)
		s.must(os.Rename(s.p("Round 0/dup1.bin"), s.p("Round 1/elsewhere.bin")))
		s.setX(s.p("Round 1/elsewhere.bin"), "parentid", s.x(s.p("Round 1"), "id"))
		s.shrink("Round 0", size)
		s.shrink("Round 1", -size)
		if _, err := s.run(node, node); err != nil {
			t.Fatal(err)
		}
		s.cleanPosix()
		s.equalPosix("Round 0", "Round 1", "")
	})
	t.Run("a link is in the way", func(t *testing.T) {
		s := w.scene(t)
		node := s.x(s.p("Round 0/dup1.bin"), "id")
		s.must(os.Rename(s.p(".oc-nodes"), s.p("kept")))
		s.must(os.RemoveAll(s.p("Round 0")))
		s.must(os.Symlink("../mary", s.p("Round 0")))
		if _, err := s.run(node, node); err == nil {
			t.Error("a link to another space was taken for a folder")
		}
		if _, err := os.Lstat(filepath.Join(s.users(), "users/mary/dup1.bin")); err == nil {
			t.Error("it was written to another space")
		}
	})
	t.Run("killed", func(t *testing.T) {
		defer inplace.SetStep(func() {})
		s := w.scene(t)
		node := s.x(s.p("Round 0/a"), "id")
		for at := 1; ; at += 3 {
			s.must(os.WriteFile(s.p("Round 0/a/copied.bin"), []byte("changed"), 0o600))
			killed := s.kill(node, at)
			if killed {
				s.run(node, node) //nolint:errcheck // what it did is looked at
			}
			for _, f := range s.check() {
				if !strings.HasPrefix(f, "note ") {
					t.Errorf("at step %d: %s", at, f)
				}
			}
			if got, want := s.x(s.p("Round 0/a/copied.bin"), "blobid"), s.x(s.was("Round 0/a/copied.bin"), "blobid"); got != want {
				t.Errorf("at step %d: another content", at)
			}
			if !killed {
				break
			}
		}
		s.cleanPosix()
	})
}

// TestPosixUploads: what is built and what is in the way goes into uploads/ where the root is a mount.
func TestPosixUploads(t *testing.T) {
	w := newWorld(t, testfixture.OpenCloudPosix)
	s := w.scene(t)
	// A link to the root stands for a mount: what lies beside it may be on another file system.
	real := filepath.Join(s.data, "storage/real")
	s.must(os.Rename(s.users(), real))
	s.must(os.Symlink(real, s.users()))
	node := s.x(s.p("Round 0/dup1.bin"), "id")
	s.must(os.WriteFile(s.p("Round 0/dup1.bin"), []byte("bad"), 0o600))
	res, err := s.run(node, node)
	s.must(err)
	if filepath.Dir(res.Aside) != filepath.Join(s.users(), "uploads") {
		t.Errorf("%+v", res)
	}
	s.must(os.RemoveAll(res.Aside))
	s.must(os.Remove(s.users()))
	s.must(os.Rename(real, s.users()))
	s.cleanPosix()
	s.equalPosix("Round 0", "")
}
