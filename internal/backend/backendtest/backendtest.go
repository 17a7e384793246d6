// Package backendtest holds the laws that every backend obeys. A driver's test calls [Run].
package backendtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

var types = []backend.FileType{backend.KeyFile, backend.LockFile, backend.SnapshotFile, backend.IndexFile, backend.PackFile}

// Bytes returns n bytes that depend on seed alone.
func Bytes(seed uint64, n int) []byte {
	p := make([]byte, n)
	var key [32]byte
	key[0], key[1], key[2] = byte(seed), byte(seed>>8), byte(seed>>16)
	rand.NewChaCha8(key).Read(p)
	return p
}

func handle(t backend.FileType, data []byte) backend.Handle {
	return backend.Handle{Type: t, Name: id.Hash(data).String()}
}

// ReadAll loads a whole file.
func ReadAll(ctx context.Context, be backend.Backend, h backend.Handle) (data []byte, err error) {
	err = be.Load(ctx, h, 0, 0, func(r io.Reader) error {
		data, err = io.ReadAll(r)
		return err
	})
	return data, err
}

// Run checks the laws on backends made by open, each empty and not yet created. Laws named in
// except do not hold there, and the caller says why.
func Run(t *testing.T, open func(t *testing.T) backend.Backend, except ...string) {
	laws := []struct {
		name string
		law  func(t *testing.T, be backend.Backend)
	}{
		{"SaveLoad", saveLoad}, {"Config", config}, {"Ranges", ranges}, {"Exists", exists},
		{"NotExist", notExist}, {"List", list}, {"BadHandles", badHandles}, {"Cancelled", cancelled},
		{"CreateTwice", createTwice}, {"Concurrent", concurrent}, {"ErrorsOfFn", errorsOfFn},
	}
	for _, l := range laws {
		if slices.Contains(except, l.name) {
			continue
		}
		t.Run(l.name, func(t *testing.T) {
			be := open(t)
			if err := be.Create(context.Background()); err != nil {
				t.Fatalf("Create: %v", err)
			}
			if be.Location() == "" {
				t.Error("Location is empty")
			}
			l.law(t, be)
			if err := be.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
	}
}

func saveLoad(t *testing.T, be backend.Backend) {
	ctx := context.Background()
	for _, ft := range types {
		for _, n := range []int{0, 1, 4095, 70000, 9 << 20} {
			data := Bytes(uint64(n), n)
			h := handle(ft, data)
			if err := be.Save(ctx, h, data); err != nil {
				t.Fatalf("Save %v: %v", h, err)
			}
			got, err := ReadAll(ctx, be, h)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%v of %d bytes: read back %d bytes, error %v", h, n, len(got), err)
			}
			if fi, err := be.Stat(ctx, h); err != nil || fi.Size != int64(n) || fi.Name != h.Name {
				t.Errorf("Stat %v = %+v, %v", h, fi, err)
			}
			if err := be.Remove(ctx, h); err != nil {
				t.Errorf("Remove %v: %v", h, err)
			}
			if _, err := be.Stat(ctx, h); !errors.Is(err, backend.ErrNotExist) {
				t.Errorf("Stat after Remove: %v", err)
			}
		}
	}
}

func config(t *testing.T, be backend.Backend) {
	ctx := context.Background()
	h := backend.Handle{Type: backend.ConfigFile}
	if _, err := be.Stat(ctx, h); !errors.Is(err, backend.ErrNotExist) {
		t.Errorf("Stat of no config: %v", err)
	}
	if err := be.Save(ctx, h, []byte("one")); err != nil {
		t.Fatal(err)
	}
	if err := be.Save(ctx, h, []byte("two")); !errors.Is(err, backend.ErrExist) {
		t.Errorf("second config: %v", err)
	}
	if got, err := ReadAll(ctx, be, h); err != nil || string(got) != "one" {
		t.Errorf("config = %q, %v", got, err)
	}
}

func ranges(t *testing.T, be backend.Backend) {
	ctx := context.Background()
	data := Bytes(1, 10000)
	h := handle(backend.PackFile, data)
	if err := be.Save(ctx, h, data); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		length  int
		off     int64
		want    []byte
		wantErr bool
	}{
		{0, 0, data, false}, {10000, 0, data, false}, {1, 0, data[:1], false}, {1, 9999, data[9999:], false},
		{0, 9000, data[9000:], false}, {500, 77, data[77:577], false},
		{10001, 0, nil, true}, {2, 9999, nil, true}, {1, 10000, nil, true}, {0, 10001, nil, true},
		{-1, 0, nil, true}, {1, -1, nil, true},
	} {
		var got []byte
		err := be.Load(ctx, h, c.length, c.off, func(r io.Reader) (err error) {
			got, err = io.ReadAll(r)
			if err == nil && c.length > 0 && len(got) < c.length {
				err = io.ErrUnexpectedEOF
			}
			return err
		})
		if (err != nil) != c.wantErr || (err == nil && !bytes.Equal(got, c.want)) {
			t.Errorf("Load(length %d, offset %d): %d bytes, error %v", c.length, c.off, len(got), err)
		}
	}
	// A reader may leave bytes unread.
	if err := be.Load(ctx, h, 0, 0, func(r io.Reader) error { _, err := r.Read(make([]byte, 3)); return err }); err != nil {
		t.Errorf("partly read: %v", err)
	}
}

func exists(t *testing.T, be backend.Backend) {
	ctx := context.Background()
	data := []byte("first")
	h := handle(backend.PackFile, data)
	if err := be.Save(ctx, h, data); err != nil {
		t.Fatal(err)
	}
	if err := be.Save(ctx, h, []byte("other")); !errors.Is(err, backend.ErrExist) {
		t.Errorf("Save over a file: %v", err)
	}
	if got, err := ReadAll(ctx, be, h); err != nil || string(got) != "first" {
		t.Errorf("file changed to %q, %v", got, err)
	}
}

func notExist(t *testing.T, be backend.Backend) {
	ctx := context.Background()
	for _, ft := range types {
		h := handle(ft, []byte("nothing"))
		if _, err := be.Stat(ctx, h); !errors.Is(err, backend.ErrNotExist) {
			t.Errorf("Stat: %v", err)
		}
		if _, err := ReadAll(ctx, be, h); !errors.Is(err, backend.ErrNotExist) {
			t.Errorf("Load: %v", err)
		}
		if err := be.Remove(ctx, h); !errors.Is(err, backend.ErrNotExist) {
			t.Errorf("Remove: %v", err)
		}
		if err := be.List(ctx, ft, func(fi backend.FileInfo) error { return fmt.Errorf("listed %v", fi) }); err != nil {
			t.Errorf("List: %v", err)
		}
	}
}

func list(t *testing.T, be backend.Backend) {
	ctx := context.Background()
	for _, ft := range types {
		want := map[string]int64{}
		for i := range 40 {
			data := Bytes(uint64(1000+i), 10*i)
			h := handle(ft, data)
			want[h.Name] = int64(len(data))
			if err := be.Save(ctx, h, data); err != nil {
				t.Fatal(err)
			}
		}
		got := map[string]int64{}
		err := be.List(ctx, ft, func(fi backend.FileInfo) error {
			if _, ok := got[fi.Name]; ok {
				t.Errorf("%s listed twice", fi.Name)
			}
			got[fi.Name] = fi.Size
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != len(want) {
			t.Errorf("%v: %d files listed, not %d", ft, len(got), len(want))
		}
		for n, size := range want {
			if got[n] != size {
				t.Errorf("%v %s: size %d, not %d", ft, n, got[n], size)
			}
		}
		mine, calls := errors.New("mine"), 0
		if err := be.List(ctx, ft, func(backend.FileInfo) error { calls++; return mine }); !errors.Is(err, mine) || calls != 1 {
			t.Errorf("an error of fn: %v after %d calls", err, calls)
		}
	}
}

func badHandles(t *testing.T, be backend.Backend) {
	ctx := context.Background()
	good := strings.Repeat("a", 64)
	for _, h := range []backend.Handle{
		{}, {Type: 77, Name: good}, {Type: backend.ConfigFile, Name: good}, {Type: backend.KeyFile},
		{Type: backend.KeyFile, Name: "../config"}, {Type: backend.PackFile, Name: "a"},
		{Type: backend.PackFile, Name: strings.ToUpper(good)}, {Type: backend.LockFile, Name: good + "a"},
		{Type: backend.PackFile, Name: "../" + good[3:]},
	} {
		if err := be.Save(ctx, h, []byte("x")); err == nil {
			t.Errorf("Save %q worked", h)
		}
		if _, err := ReadAll(ctx, be, h); err == nil {
			t.Errorf("Load %q worked", h)
		}
		if _, err := be.Stat(ctx, h); err == nil {
			t.Errorf("Stat %q worked", h)
		}
		if err := be.Remove(ctx, h); err == nil {
			t.Errorf("Remove %q worked", h)
		}
	}
}

func cancelled(t *testing.T, be backend.Backend) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	data := Bytes(5, 1000)
	h := handle(backend.PackFile, data)
	if err := be.Save(ctx, h, data); !errors.Is(err, context.Canceled) {
		t.Errorf("Save: %v", err)
	}
	if _, err := be.Stat(context.Background(), h); !errors.Is(err, backend.ErrNotExist) {
		t.Errorf("a cancelled Save left a file: %v", err)
	}
	if err := be.Save(context.Background(), h, data); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadAll(ctx, be, h); !errors.Is(err, context.Canceled) {
		t.Errorf("Load: %v", err)
	}
	if _, err := be.Stat(ctx, h); !errors.Is(err, context.Canceled) {
		t.Errorf("Stat: %v", err)
	}
	if err := be.List(ctx, h.Type, func(backend.FileInfo) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("List: %v", err)
	}
	if err := be.Remove(ctx, h); !errors.Is(err, context.Canceled) {
		t.Errorf("Remove: %v", err)
	}
	if _, err := be.Stat(context.Background(), h); err != nil {
		t.Errorf("a cancelled Remove removed: %v", err)
	}
	// Cancelled on the way: either the whole file is there or none.
	big := Bytes(6, 32<<20)
	hb := handle(backend.PackFile, big)
	ctx, cancel = context.WithTimeout(context.Background(), 2*time.Millisecond)
	defer cancel()
	err := be.Save(ctx, hb, big)
	got, lerr := ReadAll(context.Background(), be, hb)
	if err == nil && !bytes.Equal(got, big) {
		t.Errorf("saved, but read %d bytes, %v", len(got), lerr)
	}
	if err != nil && !errors.Is(lerr, backend.ErrNotExist) {
		t.Errorf("Save failed with %v, but the file is there (%v)", err, lerr)
	}
}

func createTwice(t *testing.T, be backend.Backend) {
	ctx := context.Background()
	data := []byte("stays")
	h := handle(backend.SnapshotFile, data)
	if err := be.Save(ctx, h, data); err != nil {
		t.Fatal(err)
	}
	if err := be.Create(ctx); err != nil {
		t.Errorf("second Create: %v", err)
	}
	if got, err := ReadAll(ctx, be, h); err != nil || !bytes.Equal(got, data) {
		t.Errorf("after a second Create: %q, %v", got, err)
	}
}

func concurrent(t *testing.T, be backend.Backend) {
	ctx := context.Background()
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := map[int]int{}
	for w := range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			order := rand.New(rand.NewPCG(uint64(w), 7)).Perm(30)
			for _, i := range order {
				data := Bytes(uint64(i), 5000+i)
				h := handle(backend.PackFile, data)
				err := be.Save(ctx, h, data)
				switch {
				case err == nil:
					mu.Lock()
					won[i]++
					mu.Unlock()
				case !errors.Is(err, backend.ErrExist):
					t.Errorf("Save: %v", err)
				}
				if got, err := ReadAll(ctx, be, h); err != nil || !bytes.Equal(got, data) {
					t.Errorf("Load %v: %d bytes, %v", h, len(got), err)
				}
			}
		}()
	}
	wg.Wait()
	for i := range 30 {
		if won[i] != 1 {
			t.Errorf("file %d was saved by %d writers", i, won[i])
		}
	}
	var names []string
	if err := be.List(ctx, backend.PackFile, func(fi backend.FileInfo) error { names = append(names, fi.Name); return nil }); err != nil {
		t.Error(err)
	}
	slices.Sort(names)
	if len(slices.Compact(names)) != 30 {
		t.Errorf("%d files", len(names))
	}
}

func errorsOfFn(t *testing.T, be backend.Backend) {
	ctx := context.Background()
	data := Bytes(9, 100)
	h := handle(backend.IndexFile, data)
	if err := be.Save(ctx, h, data); err != nil {
		t.Fatal(err)
	}
	mine := errors.New("mine")
	err := be.Load(ctx, h, 0, 0, func(io.Reader) error { return &backend.PermanentError{Err: mine} })
	if !errors.Is(err, mine) {
		t.Errorf("Load: %v", err)
	}
}
