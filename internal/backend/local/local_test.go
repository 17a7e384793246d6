package local_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/backendtest"
	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

func TestLaws(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) backend.Backend { return local.New(filepath.Join(t.TempDir(), "sub", "repo")) })
}

func save(t *testing.T, be backend.Backend, ft backend.FileType, s string) (backend.Handle, error) {
	t.Helper()
	h := backend.Handle{Type: ft, Name: id.Hash([]byte(s)).String()}
	return h, be.Save(context.Background(), h, []byte(s))
}

func TestLayoutAndModes(t *testing.T) {
	for _, c := range []struct {
		name           string
		config         os.FileMode // 0: none
		dirMode, fMode os.FileMode
	}{{"private", 0, 0o700, 0o400}, {"config of the owner", 0o400, 0o700, 0o400}, {"config of the group", 0o440, 0o770, 0o440}} {
		t.Run(c.name, func(t *testing.T) {
			old := syscall.Umask(0)
			defer syscall.Umask(old)
			dir := t.TempDir()
			if c.config != 0 {
				if err := os.WriteFile(filepath.Join(dir, "config"), []byte("x"), c.config); err != nil {
					t.Fatal(err)
				}
			}
			be := local.New(dir)
			if err := be.Create(context.Background()); err != nil {
				t.Fatal(err)
			}
			h, err := save(t, be, backend.PackFile, "pack")
			if err != nil {
				t.Fatal(err)
			}
			fi, err := os.Stat(filepath.Join(dir, "data", h.Name[:2], h.Name))
			if err != nil || fi.Mode() != c.fMode {
				t.Errorf("pack: %v, %v", fi, err)
			}
			for _, d := range []string{"data", "data/00", "data/ff", "index", "keys", "locks", "snapshots"} {
				fi, err := os.Stat(filepath.Join(dir, d))
				if err != nil || fi.Mode().Perm() != c.dirMode {
					t.Errorf("%s: %v, %v", d, fi, err)
				}
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "data/*/*tmp*")); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestMissingDirectoryIsMade(t *testing.T) {
	dir := t.TempDir()
	be := local.New(dir)
	if err := be.Create(context.Background()); err != nil {
		t.Fatal(err)
	}
	for i := range 256 {
		if err := os.Remove(filepath.Join(dir, "data", string("0123456789abcdef"[i/16])+string("0123456789abcdef"[i%16]))); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := save(t, be, backend.PackFile, "pack"); err != nil {
		t.Error(err)
	}
}

// Where the repository's root is gone, say not mounted, Save must not make it anew.
func TestMissingRootIsNotMade(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "gone")
	be := local.New(dir)
	for _, ft := range []backend.FileType{backend.PackFile, backend.KeyFile} {
		if _, err := save(t, be, ft, "x"); err == nil {
			t.Error("Save worked without a repository")
		}
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("Save made the root")
	}
}

func TestStrayFilesAreNotListed(t *testing.T) {
	dir := t.TempDir()
	be := local.New(dir)
	ctx := context.Background()
	if err := be.Create(ctx); err != nil {
		t.Fatal(err)
	}
	name := strings.Repeat("ab", 32)
	for _, p := range []string{"data/ab/" + name + "-tmp-1", "data/00/" + name, "data/zz-file", "index/README", "keys/" + strings.ToUpper(name), "stray"} {
		if err := os.WriteFile(filepath.Join(dir, p), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "snapshots", name), 0o700); err != nil {
		t.Fatal(err)
	}
	for ft := backend.ConfigFile; ft <= backend.PackFile; ft++ {
		if err := be.List(ctx, ft, func(fi backend.FileInfo) error { t.Errorf("%v %s is listed", ft, fi.Name); return nil }); err != nil {
			t.Error(err)
		}
	}
	if _, err := be.Stat(ctx, backend.Handle{Type: backend.SnapshotFile, Name: name}); err == nil {
		t.Error("a directory passes for a file")
	}
}

// A directory in the place of data/xx is a lasting trouble, and works as root as well.
func TestPermanent(t *testing.T) {
	dir := t.TempDir()
	be := local.New(dir)
	if err := be.Create(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "keys")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "keys"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := save(t, be, backend.KeyFile, "x")
	var pe *backend.PermanentError
	if !errors.As(err, &pe) {
		t.Errorf("Save: %v is not permanent", err)
	}
}

// What is written past the page cache is read back as it was, whatever is left over at the end and
// wherever it lay in memory.
func TestLargeFiles(t *testing.T) {
	dir := t.TempDir()
	be := local.New(dir)
	ctx := context.Background()
	if err := be.Create(ctx); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 10<<20)
	rand.NewChaCha8([32]byte{3}).Read(buf)
	for i, n := range []int{1<<20 - 1, 1 << 20, 1<<20 + 1, 1<<20 + 4095, 1<<20 + 4096, 4 << 20, 4<<20 + 77, 9<<20 + 4097} {
		for _, at := range []int{0, 1, 512, 4096} {
			data := buf[at : at+n]
			data[0] = byte(i) // no two alike
			h := backend.Handle{Type: backend.PackFile, Name: id.Hash(data).String()}
			if err := be.Save(ctx, h, data); err != nil {
				t.Fatalf("%d bytes at %d: %v", n, at, err)
			}
			got, err := os.ReadFile(filepath.Join(dir, "data", h.Name[:2], h.Name))
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes at %d: %d bytes come back, %v", n, at, len(got), err)
			}
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "data/*/*tmp*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// A full device is reported as such and leaves nothing behind. /dev/full is no directory, so the
// limit on file size stands in for the full disk: both end in the same branch.
func TestNoSpace(t *testing.T) {
	dir := t.TempDir()
	be := local.New(dir)
	if err := be.Create(context.Background()); err != nil {
		t.Fatal(err)
	}
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	lim := old
	lim.Cur = 6<<20 + 100 // in the middle of what is written past the page cache
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &lim); err != nil {
		t.Fatal(err)
	}
	big := strings.Repeat("x", 9<<20)
	h, err := save(t, be, backend.PackFile, big)
	if rerr := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old); rerr != nil {
		t.Fatal(rerr)
	}
	var pe *backend.PermanentError
	if !errors.As(err, &pe) || !errors.Is(err, syscall.EFBIG) {
		t.Errorf("Save: %v", err)
	}
	if left, _ := os.ReadDir(filepath.Join(dir, "data", h.Name[:2])); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
