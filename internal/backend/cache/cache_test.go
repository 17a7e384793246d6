package cache_test

import (
	"bytes"
	"context"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/backendtest"
	"github.com/holdfast-backup/holdfast/internal/backend/cache"
	"github.com/holdfast-backup/holdfast/internal/backend/fault"
	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

func TestLaws(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) backend.Backend { return cache.New(mem.New(), cache.Options{Dir: t.TempDir()}) })
}

func file(ft backend.FileType, seed uint64, n int) (backend.Handle, []byte) {
	data := backendtest.Bytes(seed, n)
	return backend.Handle{Type: ft, Name: id.Hash(data).String()}, data
}

func read(t *testing.T, ctx context.Context, be backend.Backend, h backend.Handle, length int, offset int64) []byte {
	t.Helper()
	var got []byte
	err := be.Load(ctx, h, length, offset, func(r io.Reader) (err error) {
		got, err = io.ReadAll(r)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func copies(t *testing.T, dir string) (paths []string, size int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		paths, size = append(paths, path), size+fi.Size()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return paths, size
}

// Index files and snapshots are read once; another process finds the copies; keys, locks and data are
// never copied.
func TestWholeFiles(t *testing.T) {
	ctx := context.Background()
	m, dir := mem.New(), t.TempDir()
	for _, ft := range []backend.FileType{backend.IndexFile, backend.SnapshotFile, backend.KeyFile, backend.LockFile, backend.PackFile} {
		h, data := file(ft, uint64(ft), 5000)
		if err := m.Save(ctx, h, data); err != nil {
			t.Fatal(err)
		}
		f := fault.New(m)
		for range 3 { // three processes
			be := cache.New(f, cache.Options{Dir: dir})
			for range 2 {
				if got := read(t, ctx, be, h, 0, 0); !bytes.Equal(got, data) {
					t.Errorf("%v: wrong", h)
				}
				if got := read(t, ctx, be, h, 100, 50); !bytes.Equal(got, data[50:150]) {
					t.Errorf("%v: wrong part", h)
				}
			}
		}
		want := 12
		if ft == backend.IndexFile || ft == backend.SnapshotFile {
			want = 1
		}
		if n := f.Count(fault.Load, 0); n != want {
			t.Errorf("%v: %d loads, not %d", ft, n, want)
		}
	}
	if paths, _ := copies(t, dir); len(paths) != 2 {
		t.Errorf("copies: %q", paths)
	}
}

// Packs of trees: copied when stored, or when much of them was read.
func TestPacks(t *testing.T) {
	ctx := backend.WithHint(context.Background(), backend.Metadata)
	m := mem.New()
	f := fault.New(m)
	be := cache.New(f, cache.Options{Dir: t.TempDir()})
	h, data := file(backend.PackFile, 1, 1<<20)
	if err := be.Save(ctx, h, data); err != nil {
		t.Fatal(err)
	}
	if got := read(t, ctx, be, h, 1000, 5000); !bytes.Equal(got, data[5000:6000]) || f.Count(fault.Load, 0) != 0 {
		t.Errorf("a pack of our own was loaded %d times", f.Count(fault.Load, 0))
	}
	h, data = file(backend.PackFile, 2, 1<<20)
	if err := m.Save(ctx, h, data); err != nil {
		t.Fatal(err)
	}
	for i := range 1024 {
		if got := read(t, ctx, be, h, 1024, int64(i)*1024); !bytes.Equal(got, data[i*1024:][:1024]) {
			t.Fatalf("part %d is wrong", i)
		}
	}
	if n := f.Count(fault.Load, 0); n < 100 || n > 200 {
		t.Errorf("%d loads of 1024 parts: the pack was to be copied after an eighth", n)
	}
}

// A damaged, cut or foreign copy is not used, and replaced.
func TestDamage(t *testing.T) {
	ctx := context.Background()
	for name, harm := range map[string]func(path string, data []byte) error{
		"flipped": func(p string, data []byte) error {
			data[len(data)/2] ^= 1
			return os.WriteFile(p, data, 0o600)
		},
		"cut":       func(p string, data []byte) error { return os.WriteFile(p, data[:100], 0o600) },
		"empty":     func(p string, data []byte) error { return os.WriteFile(p, nil, 0o600) },
		"gone":      func(p string, data []byte) error { return os.Remove(p) },
		"directory": func(p string, data []byte) error { return os.Rename(filepath.Dir(p), filepath.Dir(p)+"x") },
	} {
		t.Run(name, func(t *testing.T) {
			m, dir := mem.New(), t.TempDir()
			h, data := file(backend.IndexFile, 7, 5000)
			if err := m.Save(ctx, h, data); err != nil {
				t.Fatal(err)
			}
			read(t, ctx, cache.New(m, cache.Options{Dir: dir}), h, 0, 0)
			paths, _ := copies(t, dir)
			if len(paths) != 1 {
				t.Fatalf("copies: %q", paths)
			}
			if err := harm(paths[0], bytes.Clone(data)); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if got := read(t, ctx, cache.New(m, cache.Options{Dir: dir}), h, 0, 0); !bytes.Equal(got, data) {
					t.Error("the damaged copy was used")
				}
			}
			if got, err := os.ReadFile(paths[0]); err != nil || !bytes.Equal(got, data) {
				t.Errorf("the copy was not replaced: %v", err)
			}
		})
	}
}

// Damage after the first look is found by the engine, which then asks for the original.
func TestFresh(t *testing.T) {
	ctx := context.Background()
	m, dir := mem.New(), t.TempDir()
	be := cache.New(m, cache.Options{Dir: dir})
	h, data := file(backend.IndexFile, 7, 5000)
	if err := be.Save(ctx, h, data); err != nil {
		t.Fatal(err)
	}
	read(t, ctx, be, h, 0, 0)
	paths, _ := copies(t, dir)
	bad := bytes.Clone(data)
	bad[9] ^= 1
	if err := os.WriteFile(paths[0], bad, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := read(t, backend.WithHint(ctx, backend.Fresh), be, h, 0, 0); !bytes.Equal(got, data) {
		t.Error("not the original")
	}
	if got := read(t, ctx, be, h, 0, 0); !bytes.Equal(got, data) {
		t.Error("the damaged copy is still used")
	}
}

// The size stays within its bound, and what was used lately stays.
func TestBound(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	be := cache.New(mem.New(), cache.Options{Dir: dir, MaxBytes: 100_000})
	first, _ := file(backend.IndexFile, 0, 5000)
	for i := range 100 {
		h, data := file(backend.IndexFile, uint64(i), 5000)
		if err := be.Save(ctx, h, data); err != nil {
			t.Fatal(err)
		}
		// As if time went by; the first file is used all the time.
		paths, _ := copies(t, dir)
		for _, p := range paths {
			fi, err := os.Stat(p)
			if err != nil {
				t.Fatal(err)
			}
			old := fi.ModTime().Add(-2 * time.Hour)
			if err := os.Chtimes(p, old, old); err != nil {
				t.Fatal(err)
			}
		}
		read(t, ctx, be, first, 0, 0)
	}
	paths, size := copies(t, dir)
	if size > 100_000 || size < 50_000 {
		t.Errorf("%d bytes", size)
	}
	if !strings.Contains(strings.Join(paths, " "), first.Name) {
		t.Error("the file that was used all the time is gone")
	}
}

// What the repository has no more goes from the cache at the next listing.
func TestForgotten(t *testing.T) {
	ctx := context.Background()
	m, dir := mem.New(), t.TempDir()
	be := cache.New(m, cache.Options{Dir: dir})
	a, data := file(backend.SnapshotFile, 1, 100)
	b, data2 := file(backend.SnapshotFile, 2, 100)
	for h, d := range map[backend.Handle][]byte{a: data, b: data2} {
		if err := be.Save(ctx, h, d); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Remove(ctx, a); err != nil { // by another machine
		t.Fatal(err)
	}
	if err := be.List(ctx, backend.SnapshotFile, func(backend.FileInfo) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if paths, _ := copies(t, dir); len(paths) != 1 || !strings.Contains(paths[0], b.Name) {
		t.Errorf("copies: %q", paths)
	}
}

// A cache that cannot be written is no obstacle.
func TestUnwritable(t *testing.T) {
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	warned := 0
	be := cache.New(mem.New(), cache.Options{Dir: dir, Warn: func(error) { warned++ }})
	for i := range 3 {
		h, data := file(backend.IndexFile, uint64(i), 100)
		if err := be.Save(ctx, h, data); err != nil {
			t.Fatal(err)
		}
		if got := read(t, ctx, be, h, 0, 0); !bytes.Equal(got, data) {
			t.Error("wrong")
		}
	}
	if warned != 1 {
		t.Errorf("%d warnings", warned)
	}
}

// Processes that share a tiny cache, while somebody deletes it again and again.
func TestShared(t *testing.T) {
	ctx := context.Background()
	m, dir := mem.New(), filepath.Join(t.TempDir(), "cache")
	var hs []backend.Handle
	var contents [][]byte
	for i := range 20 {
		h, data := file(backend.IndexFile, uint64(i), 3000+i)
		if err := m.Save(ctx, h, data); err != nil {
			t.Fatal(err)
		}
		hs, contents = append(hs, h), append(contents, data)
	}
	stop := make(chan struct{})
	var deleter sync.WaitGroup
	deleter.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				os.RemoveAll(dir)
				time.Sleep(time.Millisecond)
			}
		}
	})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			be := cache.New(m, cache.Options{Dir: dir, MaxBytes: 40_000})
			for range 20 {
				for i, h := range hs {
					if got, err := backendtest.ReadAll(ctx, be, h); err != nil || !bytes.Equal(got, contents[i]) {
						t.Errorf("%v: %d bytes, %v", h, len(got), err)
					}
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	deleter.Wait()
}

// Parts of packs that are metadata are read once, and nothing else of the packs is copied. Single trees as well.
func TestParts(t *testing.T) {
	for name, hint := range map[string]backend.Hint{"contents": backend.Near, "trees": backend.Metadata} {
		t.Run(name, func(t *testing.T) {
			ctx := backend.WithHint(context.Background(), hint)
			m, dir := mem.New(), t.TempDir()
			f := fault.New(m)
			h, data := file(backend.PackFile, 1, 1<<20)
			if err := m.Save(ctx, h, data); err != nil {
				t.Fatal(err)
			}
			look := func(want int) {
				t.Helper()
				before := f.Count(fault.Load, 0)
				be := cache.New(f, cache.Options{Dir: dir}) // another process
				for range 2 {
					for _, off := range []int64{0, 70_000, 70_100} {
						if got := read(t, ctx, be, h, 100, off); !bytes.Equal(got, data[off:off+100]) {
							t.Errorf("wrong part at %d", off)
						}
					}
				}
				if n := f.Count(fault.Load, 0) - before; n != want {
					t.Errorf("%d loads, not %d", n, want)
				}
			}
			look(3)
			look(0)
			paths, size := copies(t, dir)
			if len(paths) != 3 || size > 1000 {
				t.Errorf("%d bytes in %q", size, paths)
			}
			// A damaged copy is read anew, and so is one that is cut short.
			for i, spoil := range []func(p []byte) []byte{func(p []byte) []byte { p[3]++; return p }, func(p []byte) []byte { return p[:50] }} {
				p, err := os.ReadFile(paths[i])
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(paths[i], spoil(p), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			look(2)
			look(0)
			// Whoever found what it read damaged does not get the copy again.
			be := cache.New(f, cache.Options{Dir: dir})
			if got := read(t, backend.WithHint(ctx, backend.Fresh), be, h, 100, 0); !bytes.Equal(got, data[:100]) {
				t.Error("wrong")
			}
			if paths, _ := copies(t, dir); len(paths) != 0 {
				t.Errorf("copies of a pack that was damaged: %q", paths)
			}
			look(3)
			if err := be.Remove(ctx, h); err != nil {
				t.Fatal(err)
			}
			if paths, _ := copies(t, dir); len(paths) != 0 {
				t.Errorf("copies of a pack that is gone: %q", paths)
			}
		})
	}
}

// Parts are bounded by the blocks that they take.
func TestPartsAreBounded(t *testing.T) {
	ctx := backend.WithHint(context.Background(), backend.Near)
	m, dir := mem.New(), t.TempDir()
	h, data := file(backend.PackFile, 1, 100_000)
	if err := m.Save(ctx, h, data); err != nil {
		t.Fatal(err)
	}
	be := cache.New(m, cache.Options{Dir: dir, MaxBytes: 100_000})
	for off := int64(0); off < 100; off++ {
		read(t, ctx, be, h, 100, off)
	}
	if paths, _ := copies(t, dir); len(paths) < 10 || len(paths) > 25 {
		t.Errorf("%d parts of one block each in 100,000 bytes", len(paths))
	}
}
