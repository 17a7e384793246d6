package fschange

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/fssnap/fssnaptest"
)

// disk mounts a new btrfs, with a subvolume in it.
func disk(t *testing.T) (top, sub string) {
	t.Helper()
	top = filepath.Join(t.TempDir(), "mnt")
	fssnaptest.MountAt(t, fssnaptest.Device(t, 256<<20, "mkfs.btrfs", "-q"), top, "btrfs", "")
	sub = filepath.Join(top, "data")
	fssnaptest.Tool(t, "btrfs", "subvolume", "create", sub)
	return top, sub
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, path, data string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(data), 0o600))
}

// look makes a mark, either of the living directory or of a snapshot, and a list since the last one.
type look struct {
	top, sub, dir string // dir: below sub
	view          bool
	n             int
	mark          Mark
}

func (l *look) now(t *testing.T) (*List, error) {
	t.Helper()
	dir := filepath.Join(l.sub, l.dir)
	if l.view {
		l.n++
		snap := filepath.Join(l.top, fmt.Sprintf("view%d", l.n))
		fssnaptest.Tool(t, "btrfs", "subvolume", "snapshot", "-r", l.sub, snap)
		if old := filepath.Join(l.top, fmt.Sprintf("view%d", l.n-1)); l.n > 1 {
			fssnaptest.Tool(t, "btrfs", "subvolume", "delete", old)
		}
		dir = filepath.Join(snap, l.dir)
	}
	list, now, err := Since(context.Background(), dir, l.mark, l.view)
	if now == "" {
		t.Fatal("no mark:", err)
	}
	l.mark = now
	return list, err
}

func (l *look) first(t *testing.T) {
	t.Helper()
	if list, err := l.now(t); list != nil || !errors.Is(err, ErrNoMark) {
		t.Fatal("the first look has a list:", list, err)
	}
}

// both runs a test on the living subvolume and on snapshots of it.
func both(t *testing.T, fn func(t *testing.T, l *look)) {
	for _, view := range []bool{false, true} {
		t.Run(fmt.Sprintf("view=%v", view), func(t *testing.T) {
			l := &look{dir: "base/store", view: view}
			l.top, l.sub = disk(t)
			must(t, os.MkdirAll(filepath.Join(l.sub, l.dir), 0o755))
			fn(t, l)
		})
	}
}

// TestEachChange: each kind of change that a server makes is in the list, and nothing else.
func TestEachChange(t *testing.T) {
	both(t, func(t *testing.T, l *look) {
		dir := filepath.Join(l.sub, l.dir)
		at := func(rel string) string { return filepath.Join(dir, rel) }
		for _, d := range []string{"a", "b", "c"} {
			for i := range 40 {
				write(t, at(fmt.Sprintf("spaces/%s/nodes/%02d/file", d, i)), d)
			}
		}
		write(t, at("spaces/a/node.mpk"), "one")
		write(t, at("indexes/by-type"), strings.Repeat("x", 100_000))
		write(t, at("spaces/c/two-names"), "x")
		must(t, os.Link(at("spaces/c/two-names"), at("spaces/b/other-name")))
		write(t, at("spaces/c/deep/er/file"), "x")
		write(t, filepath.Join(l.sub, "base/elsewhere"), "x")
		l.first(t)
		for _, c := range []struct {
			name string
			do   func()
			want string // paths, ">" before what has arrived
		}{
			{"nothing", func() {}, ""},
			{"a new node", func() { write(t, at("spaces/a/nodes/00/new"), "x") }, "spaces/a/nodes/00 spaces/a/nodes/00/new"},
			{"a new directory", func() { write(t, at("spaces/a/nodes/new/file"), "x") }, "spaces/a/nodes >spaces/a/nodes/new spaces/a/nodes/new/file"},
			{"metadata replaced", func() {
				write(t, at("spaces/a/.tmp"), "two")
				must(t, os.Rename(at("spaces/a/.tmp"), at("spaces/a/node.mpk")))
			}, "spaces/a spaces/a/node.mpk"},
			{"an attribute set", func() { must(t, unix.Setxattr(at("spaces/b/nodes/03/file"), "user.oc.x", []byte("1"), 0)) }, "spaces/b/nodes/03/file"},
			{"an attribute replaced", func() { must(t, unix.Setxattr(at("spaces/b/nodes/03/file"), "user.oc.x", []byte("2"), 0)) }, "spaces/b/nodes/03/file"},
			{"an attribute removed", func() { must(t, unix.Removexattr(at("spaces/b/nodes/03/file"), "user.oc.x")) }, "spaces/b/nodes/03/file"},
			{"an attribute of a directory", func() { must(t, unix.Setxattr(at("spaces/b/nodes/03"), "user.oc.x", []byte("1"), 0)) }, "spaces/b/nodes/03"},
			{"written in place", func() {
				f, err := os.OpenFile(at("indexes/by-type"), os.O_WRONLY, 0)
				must(t, err)
				_, err = f.WriteAt([]byte("y"), 50_000)
				must(t, err, f.Close())
			}, "indexes/by-type"},
			{"written in place, the time set back", func() {
				st, err := os.Stat(at("indexes/by-type"))
				must(t, err)
				f, err := os.OpenFile(at("indexes/by-type"), os.O_WRONLY, 0)
				must(t, err)
				_, err = f.WriteAt([]byte("z"), 50_000)
				must(t, err, f.Close(), os.Chtimes(at("indexes/by-type"), time.Time{}, st.ModTime()))
			}, "indexes/by-type"},
			{"written in mapped memory", func() {
				f, err := os.OpenFile(at("indexes/by-type"), os.O_RDWR, 0)
				must(t, err)
				defer f.Close()
				p, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
				must(t, err)
				p[7]++
				must(t, unix.Munmap(p))
			}, "indexes/by-type"},
			{"cut short", func() { must(t, os.Truncate(at("indexes/by-type"), 10)) }, "indexes/by-type"},
			{"a hole", func() {
				f, err := os.OpenFile(at("indexes/by-type"), os.O_RDWR, 0)
				must(t, err, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 5), f.Close())
			}, "indexes/by-type"},
			{"a copy by reference", func() {
				from, err := os.Open(at("spaces/a/node.mpk"))
				must(t, err)
				to, err := os.OpenFile(at("spaces/a/nodes/01/file"), os.O_WRONLY, 0)
				must(t, err, unix.IoctlFileClone(int(to.Fd()), int(from.Fd())), from.Close(), to.Close())
			}, "spaces/a/nodes/01/file"},
			{"a deletion", func() { must(t, os.Remove(at("spaces/c/nodes/05/file"))) }, "spaces/c/nodes/05"},
			{"a tree deleted", func() { must(t, os.RemoveAll(at("spaces/c/nodes"))) }, "spaces/c"},
			{"moved across directories", func() { must(t, os.Rename(at("spaces/a/nodes/10/file"), at("spaces/b/moved"))) }, "spaces/a/nodes/10 spaces/b spaces/b/moved"},
			{"a directory moved", func() { must(t, os.Rename(at("spaces/a/nodes/11"), at("spaces/b/nodes/x"))) }, "spaces/a/nodes spaces/b/nodes >spaces/b/nodes/x"},
			{"a directory above moved", func() { must(t, os.Rename(at("spaces/c/deep"), at("spaces/c/down"))) }, "spaces/c >spaces/c/down"},
			{"two exchanged", func() {
				must(t, unix.Renameat2(unix.AT_FDCWD, at("spaces/a/nodes/12"), unix.AT_FDCWD, at("spaces/a/nodes/13"), unix.RENAME_EXCHANGE))
			}, "spaces/a/nodes >spaces/a/nodes/12 >spaces/a/nodes/13"},
			{"a link", func() { must(t, os.Symlink("../x", at("spaces/b/link"))) }, "spaces/b spaces/b/link"},
			{"a link replaced", func() {
				must(t, os.Symlink("../y", at("spaces/b/.tmp")), os.Rename(at("spaces/b/.tmp"), at("spaces/b/link")))
			}, "spaces/b spaces/b/link"},
			{"the time only", func() { must(t, os.Chtimes(at("spaces/b/nodes/07/file"), time.Time{}, time.Unix(1, 1))) }, "spaces/b/nodes/07/file"},
			{"the mode only", func() { must(t, os.Chmod(at("spaces/b/nodes/07/file"), 0o644)) }, "spaces/b/nodes/07/file"},
			{"the owner only", func() { must(t, os.Chown(at("spaces/b/nodes/07"), 7, 7)) }, "spaces/b/nodes/07"},
			{"a hard link", func() { must(t, os.Link(at("spaces/b/nodes/08/file"), at("spaces/b/nodes/09/hard"))) }, "spaces/b/nodes/08/file spaces/b/nodes/09 spaces/b/nodes/09/hard"},
			{"a file of two names", func() { must(t, os.Chmod(at("spaces/c/two-names"), 0o640)) }, "spaces/b/other-name spaces/c/two-names"},
			{"one of its names removed", func() { must(t, os.Remove(at("spaces/c/two-names"))) }, "spaces/b/other-name spaces/c"},
			{"removed and made again", func() {
				must(t, os.Remove(at("spaces/b/nodes/14/file")))
				write(t, at("spaces/b/nodes/14/file"), "b")
			}, "spaces/b/nodes/14 spaces/b/nodes/14/file"},
			{"open, removed", func() {
				f, err := os.Open(at("spaces/b/nodes/15/file"))
				must(t, err, os.Remove(at("spaces/b/nodes/15/file")))
				t.Cleanup(func() { f.Close() })
			}, "spaces/b/nodes/15"},
			{"synced alone", func() {
				f, err := os.OpenFile(at("spaces/b/nodes/16/file"), os.O_WRONLY|os.O_TRUNC, 0)
				must(t, err)
				_, err = f.WriteString("synced")
				must(t, err, f.Sync(), f.Close())
			}, "spaces/b/nodes/16/file"},
			{"elsewhere", func() { write(t, filepath.Join(l.sub, "base/other"), "x") }, ""},
			{"the directory itself", func() { must(t, os.Chmod(dir, 0o700)) }, ""},
			{"the directory moved away and back", func() {
				must(t, os.Rename(filepath.Join(l.sub, "base"), filepath.Join(l.sub, "b2")), os.Rename(filepath.Join(l.sub, "b2"), filepath.Join(l.sub, "base")))
			}, ""},
		} {
			c.do()
			list, err := l.now(t)
			if err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			var got []string
			for _, p := range slices.Sorted(maps.Keys(list.changed)) {
				if list.Arrived(p) {
					p = ">" + p
				}
				got = append(got, p)
			}
			want := strings.Fields(c.want)
			slices.Sort(want)
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("%s: got %q, want %q", c.name, got, want)
			}
		}
	})
}

// TestNotTrusted: what is no longer the same subvolume, or is not all of it, has no list.
func TestNotTrusted(t *testing.T) {
	both(t, func(t *testing.T, l *look) {
		dir := filepath.Join(l.sub, l.dir)
		fill := func() {
			for i := range 10 {
				write(t, filepath.Join(dir, fmt.Sprintf("spaces/%d/%d", i%7, i)), "x")
			}
		}
		fill()
		l.first(t)
		refused := func(step, why string) {
			t.Helper()
			list, err := l.now(t)
			if list != nil || err == nil || !strings.Contains(err.Error(), why) {
				t.Errorf("%s: got %v, %v, want an error with %q", step, list, err, why)
			}
			if list, err := l.now(t); err != nil || list.Len() != 0 {
				t.Errorf("%s: the new mark is of no use: %v %v", step, list, err)
			}
		}
		// Each of these is refused once; the mark that follows is good again.
		fssnaptest.Tool(t, "btrfs", "subvolume", "snapshot", l.sub, l.sub+".old")
		write(t, filepath.Join(dir, "spaces/1/1"), "lost")
		if list, err := l.now(t); err != nil || list.Len() != 1 {
			t.Fatal(list, err)
		}
		must(t, os.Rename(l.sub, l.sub+".bad"), os.Rename(l.sub+".old", l.sub))
		refused("a rollback", "another subvolume")

		must(t, os.Rename(l.sub, l.sub+".gone"))
		fssnaptest.Tool(t, "btrfs", "subvolume", "create", l.sub)
		fill()
		refused("a subvolume made anew at the same path", "another")

		must(t, os.Rename(dir, dir+".old"))
		fill()
		refused("a directory made anew at the same path", "another directory")

		var m btrfsMark
		must(t, json.Unmarshal([]byte(l.mark), &m))
		if m.From >= m.Generation || len(m.Witnesses) < 10 {
			t.Fatalf("%d witnesses between %d and %d", len(m.Witnesses), m.From, m.Generation)
		}
		edit := func(fn func(m *btrfsMark)) {
			t.Helper()
			x := m
			x.Witnesses = slices.Clone(m.Witnesses)
			fn(&x)
			p, err := json.Marshal(x)
			must(t, err)
			l.mark = Mark(p)
		}
		edit(func(m *btrfsMark) { m.Generation += 1000 })
		refused("a generation of the future", "older than it was")
		edit(func(m *btrfsMark) { m.Filesystem[3]++ })
		refused("another file system", "another file system")
		edit(func(m *btrfsMark) { m.Received[3]++ })
		refused("received anew", "another subvolume")
		edit(func(m *btrfsMark) { m.Witnesses[0].Nsec++ })
		refused("another past, by time", "went back")
		edit(func(m *btrfsMark) { m.Witnesses[0].Inode += 1 << 40 })
		refused("another past, by inode", "went back")
		edit(func(m *btrfsMark) { m.Witnesses = nil })
		refused("no witnesses", "older")
		edit(func(m *btrfsMark) { m.From = m.Generation; m.Witnesses = m.Witnesses[:1]; m.Witnesses[0].Sec++ })
		refused("another past, few witnesses", "went back")
		edit(func(m *btrfsMark) {
			m.From = m.Generation
			m.Witnesses = m.Witnesses[:1]
			m.Witnesses[0].Inode += 1 << 40
		})
		refused("witnesses that are gone", "proves")
		l.mark = "nonsense"
		refused("a damaged mark", "cannot be read")
	})
}

// TestNotCovered: what has no part in the tree of the subvolume must not be passed over.
func TestNotCovered(t *testing.T) {
	top, sub := disk(t)
	store := filepath.Join(sub, "base/store")
	write(t, filepath.Join(store, "spaces/a/file"), "x")
	write(t, filepath.Join(store, "spaces/b/file"), "x")
	since := func(dir string, view bool) (Mark, error) {
		list, m, err := Since(context.Background(), dir, "", view)
		if list != nil {
			t.Fatal("a list from nowhere")
		}
		return m, err
	}
	refused := func(step, dir string, view bool, why string) {
		t.Helper()
		if m, err := since(dir, view); m != "" || err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: got %q, %v, want an error with %q", step, m, err, why)
		}
	}
	good := func(step, dir string, view bool) {
		t.Helper()
		if m, err := since(dir, view); m == "" || !errors.Is(err, ErrNoMark) {
			t.Errorf("%s: got %q, %v", step, m, err)
		}
	}
	good("alone", store, false)
	fssnaptest.Tool(t, "btrfs", "subvolume", "create", filepath.Join(sub, "base/beside"))
	good("a subvolume beside it", store, false)
	fssnaptest.Tool(t, "btrfs", "subvolume", "create", filepath.Join(store, "spaces/a/nested"))
	refused("a subvolume below it", store, false, "spaces/a/nested")
	fssnaptest.Tool(t, "btrfs", "subvolume", "delete", filepath.Join(store, "spaces/a/nested"))
	good("the subvolume removed", store, false)

	fssnaptest.MountAt(t, "none", filepath.Join(store, "spaces/b"), "tmpfs", "")
	refused("a mount below it", store, false, "mounted at")
	must(t, unix.Unmount(filepath.Join(store, "spaces/b"), 0))
	good("the mount removed", store, false)

	inView := func(name string) string { return filepath.Join(top, name, "base/store") }
	fssnaptest.Tool(t, "btrfs", "subvolume", "snapshot", "-r", sub, filepath.Join(top, "v"))
	good("a view", inView("v"), true)
	refused("a view that is the source", store, true, "no read-only snapshot")
	fssnaptest.Tool(t, "btrfs", "subvolume", "snapshot", sub, filepath.Join(top, "w"))
	refused("a view that is not read-only", inView("w"), true, "no read-only snapshot")
	write(t, filepath.Join(top, "w/base/else"), "x")
	fssnaptest.Tool(t, "btrfs", "property", "set", filepath.Join(top, "w"), "ro", "true")
	good("a view that was changed elsewhere", inView("w"), true)
	fssnaptest.Tool(t, "btrfs", "subvolume", "snapshot", sub, filepath.Join(top, "x"))
	must(t, os.Remove(filepath.Join(inView("x"), "spaces/b/file")))
	fssnaptest.Tool(t, "btrfs", "property", "set", filepath.Join(top, "x"), "ro", "true")
	refused("a view that was written to", inView("x"), true, "written to")

	refused("another file system", t.TempDir(), false, ErrNoList.Error())
	if _, _, err := Since(context.Background(), filepath.Join(top, "nowhere"), "", false); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if l, m, err := Since(ctx, store, "", false); l != nil || m != "" || !errors.Is(err, context.Canceled) {
		t.Error(l, m, err)
	}
}

// TestDeviceWentBack: the device below the file system is set back, and then used until its transactions
// have greater numbers than those of the mark.
func TestDeviceWentBack(t *testing.T) {
	for _, view := range []bool{false, true} {
		image := filepath.Join(t.TempDir(), "image")
		must(t, os.WriteFile(image, nil, 0o600), os.Truncate(image, 256<<20))
		dev := fssnaptest.Attach(t, image)
		fssnaptest.Tool(t, "mkfs.btrfs", "-q", dev)
		mnt := filepath.Join(t.TempDir(), "mnt")
		mount := func() { fssnaptest.MountAt(t, dev, mnt, "btrfs", "") }
		l := &look{top: mnt, sub: filepath.Join(mnt, "data"), dir: ".", view: view}
		mount()
		fssnaptest.Tool(t, "btrfs", "subvolume", "create", l.sub)
		for i := range 500 {
			write(t, filepath.Join(l.sub, fmt.Sprintf("spaces/%d/%d", i%7, i)), "x")
		}
		must(t, unix.Unmount(mnt, 0))
		fssnaptest.Tool(t, "cp", "--sparse=always", image, image+".before")
		mount()
		write(t, filepath.Join(l.sub, "spaces/1/seen"), "seen")
		write(t, filepath.Join(l.sub, "spaces/2/5"), "seen")
		l.first(t)
		must(t, unix.Unmount(mnt, 0))
		fssnaptest.Tool(t, "cp", "--sparse=always", image+".before", image)
		mount()
		for i := range 40 {
			write(t, filepath.Join(l.sub, "spaces/3/other"), fmt.Sprint(i))
			fssnaptest.Tool(t, "btrfs", "filesystem", "sync", mnt)
		}
		l.n = 0 // the view is gone, too
		list, err := l.now(t)
		if list != nil || err == nil || !strings.Contains(err.Error(), "earlier state") {
			t.Errorf("view=%v: %v %v", view, list, err)
		}
		must(t, unix.Unmount(mnt, 0))
	}
}

// state describes a tree to the last bit.
func state(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	must(t, filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil || rel == "." {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		what := fmt.Sprintf("%o %d %d %d %v %v", st.Mode, st.Uid, st.Gid, st.Nlink, st.Mtim, st.Ctim)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			p, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			what += string(p)
		case unix.S_IFLNK:
			p, err := os.Readlink(path)
			if err != nil {
				return err
			}
			what += p
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			names, err := os.ReadDir(path)
			if err != nil {
				return err
			}
			for _, n := range names {
				what += "/" + n.Name()
			}
		}
		buf := make([]byte, 100)
		if n, err := unix.Lgetxattr(path, "user.x", buf); err == nil {
			what += string(buf[:n])
		}
		out[rel] = what
		return nil
	}))
	return out
}

// TestListIsExact: after random changes, all that differs is in the list, or below what has arrived.
func TestListIsExact(t *testing.T) {
	both(t, func(t *testing.T, l *look) {
		dir := filepath.Join(l.sub, l.dir)
		seed := uint64(time.Now().UnixNano())
		t.Logf("seed %d", seed)
		rng := rand.New(rand.NewPCG(seed, 1))
		var dirs, files []string
		name := func() string { return fmt.Sprintf("%x", rng.IntN(60)) }
		pick := func(list []string) string {
			if len(list) == 0 {
				return "nothing"
			}
			return list[rng.IntN(len(list))]
		}
		survey := func(s map[string]string) {
			dirs, files = []string{"."}, nil
			for _, p := range slices.Sorted(maps.Keys(s)) {
				if strings.HasPrefix(s[p], "4") {
					dirs = append(dirs, p)
				} else {
					files = append(files, p)
				}
			}
		}
		change := func() {
			at := func(rel string) string { return filepath.Join(dir, rel) }
			d, f := at(pick(dirs)), at(pick(files))
			n := filepath.Join(d, name())
			// Many of these cannot be done; what can is enough.
			switch rng.IntN(12) {
			case 0:
				_ = os.Mkdir(n, 0o755)
			case 1, 2:
				_ = os.WriteFile(n, []byte(name()), 0o644)
			case 3:
				_ = os.WriteFile(f, []byte(name()), 0o644)
			case 4:
				_ = os.Rename(f, n)
			case 5:
				_ = os.Rename(at(pick(dirs)), n)
			case 6:
				_ = os.Link(f, n)
			case 7:
				_ = os.Symlink(name(), n)
			case 8:
				_ = os.Remove(f)
			case 9:
				_ = unix.Lsetxattr(f, "user.x", []byte(name()), 0)
			case 10:
				_ = unix.Renameat2(unix.AT_FDCWD, at(pick(dirs)), unix.AT_FDCWD, d, unix.RENAME_EXCHANGE)
			case 11:
				if rng.IntN(20) == 0 && d != dir {
					_ = os.RemoveAll(d)
				} else {
					_ = os.Chmod(f, os.FileMode(0o600+rng.IntN(8)))
				}
			}
		}
		for range 300 {
			survey(map[string]string{"a": "4", "b": "4", "a/f": "1", "a/b": "4", "b/g": "1"})
			change()
		}
		before := state(t, dir)
		l.first(t)
		for round := range 25 {
			survey(before)
			for range 1 + rng.IntN(30) {
				change()
			}
			after := state(t, dir)
			list, err := l.now(t)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range slices.Sorted(maps.Keys(after)) {
				if before[p] != after[p] && !list.Changed(p) && !list.Moved(p) {
					t.Fatalf("round %d: %s is not in the list: %q, was %q", round, p, after[p], before[p])
				}
				if before[p] != after[p] && !list.Touched(p) {
					t.Fatalf("round %d: %s is not touched", round, p)
				}
				for d := filepath.Dir(p); before[p] != after[p] && d != "."; d = filepath.Dir(d) {
					if !list.Touched(d) {
						t.Fatalf("round %d: %s, above %s, is not touched", round, d, p)
					}
				}
			}
			for _, p := range slices.Sorted(maps.Keys(before)) {
				if _, there := after[p]; !there && filepath.Dir(p) != "." && !list.Touched(filepath.Dir(p)) {
					if _, there := after[filepath.Dir(p)]; there {
						t.Fatalf("round %d: %s is gone, and its directory is not in the list", round, p)
					}
				}
			}
			if list.Len() > 6*len(after)/10+100 {
				t.Errorf("round %d: %d of %d entries are in the list", round, list.Len(), len(after))
			}
			before = after
		}
	})
}
