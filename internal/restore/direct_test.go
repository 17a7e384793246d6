package restore

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// directly lets all file systems count as fit for direct writes, and replaces the call.
func directly(t *testing.T, pwrite func(fd int, p []byte, off int64) (int, error)) {
	t.Helper()
	oldFS, oldWrite := directFS, directPwrite
	t.Cleanup(func() { directFS, directPwrite = oldFS, oldWrite })
	directFS = func(int) bool { return true }
	if pwrite != nil {
		directPwrite = pwrite
	}
}

func randomBytes(n int) string {
	p := make([]byte, n)
	rnd := rand.New(rand.NewPCG(uint64(n), 1))
	for i := range p {
		p[i] = byte(rnd.Uint32())
	}
	return string(p)
}

// directSizes are around all borders: of a write, of a page, and of several pieces.
var directSizes = []int{
	directMin - 1, directMin, directMin + 1, directMin + 4095, 2*directMin - 1,
	200_000, 999_999, 1 << 20, 1<<20 + 1, 3<<20 + 77, 8<<20 - 4096,
}

// directFiles makes one file of each size, of one piece and of pieces of odd lengths in turn, and one with holes.
func directFiles(r *memRepo) (files []*snapshot.Node, contents map[string]string) {
	contents = map[string]string{}
	for i, n := range directSizes {
		c := randomBytes(n)
		f := r.file(fmt.Sprintf("f%d", n), c)
		if i%2 == 0 {
			f.Content = []id.ID{r.save(0, []byte(c))}
		}
		files, contents[f.Name] = append(files, f), c
	}
	c := randomBytes(500_001) + strings.Repeat("\x00", 1<<20+5) + randomBytes(700_003)
	f := r.file("holes", c)
	f.Xattrs = []snapshot.Xattr{{Name: snapshot.AttrHoles, Value: fmt.Appendf(nil, "500001:%d", 1<<20+5)}}
	contents["holes"] = c
	return append(files, f), contents
}

func checkFiles(t *testing.T, dir string, contents map[string]string) {
	t.Helper()
	for name, want := range contents {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, wanted %d: %v", name, len(got), len(want), err)
		}
	}
}

func directBytes(res *Result) (n int64) {
	for _, d := range res.DataSets {
		n += d.direct
	}
	return n
}

// TestDirect: contents are the same past the page cache, however their pieces lie, and holes stay holes.
func TestDirect(t *testing.T) {
	directly(t, nil)
	r := newMemRepo()
	files, contents := directFiles(r)
	for _, dst := range []string{t.TempDir(), onDisk(t), ext4(t, 64)} {
		res := mustRestore(t, r, r.plain(files...), dst, nil)
		checkFiles(t, filepath.Join(dst, "data"), contents)
		if n := directBytes(res); n < 10<<20 && !refusesDirect(t, dst) {
			t.Errorf("%s: %d bytes went past the page cache", dst, n)
		}
		var st unix.Stat_t
		check(t, unix.Stat(filepath.Join(dst, "data/holes"), &st))
		if st.Blocks*512 > 500_001+700_003+64<<10 {
			t.Errorf("%s: the sparse file takes %d bytes", dst, st.Blocks*512)
		}
		for _, f := range files {
			check(t, unix.Stat(filepath.Join(dst, "data", f.Name), &st))
			if st.Blocks*512 > int64(f.Size)+16<<10 {
				t.Errorf("%s: %s takes %d bytes of the disk", dst, f.Name, st.Blocks*512)
			}
		}
	}
}

// refusesDirect tells whether the file system of dir takes no direct writes at all.
func refusesDirect(t *testing.T, dir string) bool {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0o600)
	if err == nil {
		unix.Close(fd)
	}
	return err == unix.EINVAL
}

// ext4 mounts a file system of size MiB.
func ext4(t *testing.T, size int) string {
	t.Helper()
	needRoot(t)
	dir := onDisk(t)
	img, mnt := filepath.Join(dir, "img"), filepath.Join(dir, "mnt")
	for _, c := range [][]string{
		{"truncate", "-s", fmt.Sprint(size) + "M", img}, {"mkfs.ext4", "-q", "-m", "0", img}, {"mkdir", mnt}, {"mount", "-o", "loop", img, mnt},
	} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", c, err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", mnt).CombinedOutput(); err != nil {
			t.Errorf("umount: %v\n%s", err, out)
		}
	})
	return mnt
}

// TestDirectRefused: a file system that takes no direct writes after all, at once or in the middle, or that
// takes a part of one, gets the same contents.
func TestDirectRefused(t *testing.T) {
	r := newMemRepo()
	files, contents := directFiles(r)
	for name, pwrite := range map[string]func(fd int, p []byte, off int64) (int, error){
		"EINVAL":     func(int, []byte, int64) (int, error) { return 0, unix.EINVAL },
		"EOPNOTSUPP": func(int, []byte, int64) (int, error) { return 0, unix.EOPNOTSUPP },
		"middle": func(fd int, p []byte, off int64) (int, error) {
			if off > 1<<20 {
				return 0, unix.EINVAL
			}
			return unix.Pwrite(fd, p, off)
		},
		"short": func(fd int, p []byte, off int64) (int, error) {
			return unix.Pwrite(fd, p[:len(p)/4096/2*4096+512], off)
		},
		"aligned": func(fd int, p []byte, off int64) (int, error) {
			return unix.Pwrite(fd, p[:(len(p)/4096+1)/2*4096], off)
		},
	} {
		t.Run(name, func(t *testing.T) {
			directly(t, pwrite)
			dst := t.TempDir()
			mustRestore(t, r, r.plain(files...), dst, nil)
			checkFiles(t, filepath.Join(dst, "data"), contents)
		})
	}
}

// TestDirectAlignment: what is handed to the kernel begins and ends on a page, in memory and in the file.
func TestDirectAlignment(t *testing.T) {
	calls := make(chan string, 10000)
	directly(t, func(fd int, p []byte, off int64) (int, error) {
		calls <- ""
		if len(p)%4096 != 0 || off%4096 != 0 || !aligned(p) {
			calls <- fmt.Sprintf("%d bytes at %d", len(p), off)
		}
		return unix.Pwrite(fd, p, off)
	})
	r := newMemRepo()
	files, _ := directFiles(r)
	mustRestore(t, r, r.plain(files...), t.TempDir(), nil)
	if close(calls); len(calls) == 0 {
		t.Error("nothing was written directly")
	}
	for c := range calls {
		if c != "" {
			t.Error(c)
		}
	}
}

// TestDirectFull: a full disk is told as such, as with other writes, and no file looks whole.
func TestDirectFull(t *testing.T) {
	directly(t, nil)
	r := newMemRepo()
	files, _ := directFiles(r)
	mnt := ext4(t, 12)
	_, err := restoreTo(t, r, r.plain(files...), mnt, nil)
	if err == nil || !isFatal(err) {
		t.Fatalf("got %v", err)
	}
	if !exists(filepath.Join(mnt, "data"+markerSuffix)) {
		t.Error("no marker")
	}
	for _, f := range files {
		p := filepath.Join(mnt, "data", f.Name)
		fi, err := os.Stat(p)
		if err != nil || !fi.ModTime().Equal(f.ModTime) {
			continue
		}
		if got, err := os.ReadFile(p); err != nil || id.Hash(got) != id.Hash([]byte(randomBytes(int(f.Size)))) && f.Name != "holes" {
			t.Errorf("%s is not complete and bears its time", f.Name)
		}
	}
}
