package repo

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
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
	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

var cheapKDF = KDF{N: 16, R: 8, P: 1}

const password = "correct horse"

func noise(seed byte, n int) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(p)
	return p
}

func text(seed, n int) []byte {
	r := rand.New(rand.NewPCG(uint64(seed), 1))
	var b bytes.Buffer
	for b.Len() < n {
		fmt.Fprintf(&b, "line %d of file %d says %d\n", b.Len(), seed, r.IntN(1000))
	}
	return b.Bytes()[:n]
}

func initRepo(t testing.TB, be backend.Backend, o InitOptions) *Repository {
	t.Helper()
	if o.KDF == (KDF{}) {
		o.KDF = cheapKDF
	}
	r, err := Init(context.Background(), be, password, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func openRepo(t testing.TB, be backend.Backend) *Repository {
	t.Helper()
	r, err := Open(context.Background(), be, password, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.LoadIndex(context.Background()); err != nil {
		t.Fatal(err)
	}
	return r
}

func checkClean(t testing.TB, be backend.Backend) {
	t.Helper()
	r, err := Open(context.Background(), be, password, Options{})
	if err != nil {
		t.Fatal(err)
	}
	err = r.Check(context.Background(), CheckOptions{ReadData: true}, func(err error) {
		if !IsHint(err) {
			t.Errorf("check: %v", err)
		}
	})
	if err != nil {
		t.Errorf("check: %v", err)
	}
}

type blobSet map[ID][]byte

func save(t testing.TB, w *Writer, bt BlobType, data []byte) (ID, bool) {
	t.Helper()
	d, isNew, err := w.Save(context.Background(), bt, data)
	if err != nil {
		t.Fatal(err)
	}
	return d, isNew
}

func samples() [][]byte {
	return [][]byte{
		[]byte("x"), []byte("hello world\n"), noise(1, 100), noise(2, 300_000), text(3, 700_000), text(4, 70_000),
		make([]byte, 200_000), append(noise(5, 200_000), make([]byte, 200_000)...), bytes.Repeat(noise(6, 1000), 500), noise(7, 1_500_000),
	}
}

func TestWriteAndRead(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	for _, o := range []InitOptions{
		{Version: 1}, {Version: 2}, {Options: Options{Compression: CompressionOff}}, {Options: Options{Compression: CompressionMax}},
		{Options: Options{PackSize: 1}}, {Options: Options{PackSize: 64 << 20}},
	} {
		t.Run(fmt.Sprintf("version %d %v %d", o.Version, o.Compression, o.PackSize), func(t *testing.T) {
			be := mem.New()
			r := initRepo(t, be, o)
			w := r.NewWriter(ctx)
			want := map[BlobType]blobSet{DataBlob: {}, TreeBlob: {}}
			var all [2][]ID
			for _, data := range samples() {
				for bt := range want {
					keep := bytes.Clone(data)
					d, isNew := save(t, w, bt, data)
					if !isNew || d != id.Hash(keep) {
						t.Errorf("new = %v, id %v", isNew, d)
					}
					if _, isNew := save(t, w, bt, data); isNew {
						t.Error("the second time is new, too")
					}
					want[bt][d] = keep
					all[bt] = append(all[bt], d, d)
				}
			}
			if err := w.Flush(ctx); err != nil {
				t.Fatal(err)
			}
			if st := w.Stats(); st.NewBlobs != [2]int64{10, 10} || st.PlainBytes[0] != st.PlainBytes[1] || st.StoredBytes[0] == 0 {
				t.Errorf("stats %+v", st)
			}
			for _, r := range []*Repository{r, openRepo(t, be)} {
				for bt, set := range want {
					for d, data := range set {
						got, err := r.LoadBlob(ctx, bt, d, nil)
						if err != nil || !bytes.Equal(got, data) {
							t.Errorf("%v %v: %d bytes, %v", bt, d, len(got), err)
						}
						if n, ok := r.Size(bt, d); !ok || n != int64(len(data)) || !r.Has(bt, d) {
							t.Errorf("size %d %v", n, ok)
						}
					}
					var mu sync.Mutex
					seen := map[ID]int{}
					err := r.LoadBlobs(ctx, bt, all[bt], func(d ID, data []byte) error {
						mu.Lock()
						defer mu.Unlock()
						seen[d]++
						if !bytes.Equal(data, set[d]) {
							t.Errorf("LoadBlobs: wrong data for %v", d)
						}
						return nil
					})
					if err != nil || len(seen) != len(set) {
						t.Errorf("LoadBlobs: %d blobs, %v", len(seen), err)
					}
					for d, n := range seen {
						if n != 1 {
							t.Errorf("%v came %d times", d, n)
						}
					}
				}
				n := 0
				r.EachBlob(func(bt BlobType, d, p ID, plain, stored int64) {
					n++
					if plain != int64(len(want[bt][d])) {
						t.Errorf("EachBlob: %d bytes", plain)
					}
					if stored > plain+300 {
						t.Errorf("%d bytes are stored as %d", plain, stored)
					}
					if o.Version == 1 && stored != plain+32 {
						t.Errorf("version 1 is compressed")
					}
				})
				if n != 20 {
					t.Errorf("EachBlob: %d blobs", n)
				}
			}
			checkClean(t, be)
			// Nothing to do, nothing written.
			files := len(list(t, be))
			w2 := r.NewWriter(ctx)
			for _, data := range samples() {
				if _, isNew := save(t, w2, DataBlob, data); isNew {
					t.Error("a stored blob is new")
				}
			}
			if err := errors.Join(w2.Flush(ctx), w.Flush(ctx)); err != nil || len(list(t, be)) != files {
				t.Errorf("%d files became %d, %v", files, len(list(t, be)), err)
			}
		})
	}
}

func list(t testing.TB, be backend.Backend) (all []backend.Handle) {
	t.Helper()
	for ft := backend.ConfigFile; ft <= backend.PackFile; ft++ {
		err := be.List(context.Background(), ft, func(fi backend.FileInfo) error {
			all = append(all, backend.Handle{Type: ft, Name: fi.Name})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return all
}

func TestManyWriters(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	be := mem.New()
	r := initRepo(t, be, InitOptions{Options: Options{PackSize: 1 << 20}})
	r.indexBlobs = 100
	w := r.NewWriter(ctx)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range 200 {
				bt := BlobType(i % 2)
				data := text((i+g*37)%400, 1000+50*((i+g*37)%400))
				if _, _, err := w.Save(ctx, bt, data); err != nil {
					t.Error(err)
				}
				clear(data) // it may be reused after return
				if i%100 == 99 {
					if err := w.Flush(ctx); err != nil {
						t.Error(err)
					}
				}
			}
		}()
	}
	wg.Wait()
	if err := w.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	r2 := openRepo(t, be)
	seen := map[BlobRef]bool{}
	r2.EachBlob(func(bt BlobType, d, _ ID, _, _ int64) {
		if seen[BlobRef{bt, d}] {
			t.Errorf("%v is stored twice", d)
		}
		seen[BlobRef{bt, d}] = true
		if _, err := r2.LoadBlob(ctx, bt, d, nil); err != nil {
			t.Error(err)
		}
	})
	if st := w.Stats(); st.NewBlobs[0]+st.NewBlobs[1] != int64(len(seen)) {
		t.Errorf("%+v for %d blobs", st, len(seen))
	}
	checkClean(t, be)
}

func TestBadBlobs(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	r := initRepo(t, mem.New(), InitOptions{})
	w := r.NewWriter(ctx)
	if _, _, err := w.Save(ctx, DataBlob, nil); err == nil {
		t.Error("an empty blob is stored")
	}
	if _, _, err := w.Save(ctx, 2, []byte("x")); err == nil {
		t.Error("an unknown type is stored")
	}
	if _, err := r.LoadBlob(ctx, DataBlob, id.Hash([]byte("x")), nil); !errors.Is(err, ErrUnknownBlob) {
		t.Errorf("unknown blob: %v", err)
	}
	if err := r.LoadBlobs(ctx, DataBlob, []ID{id.Hash([]byte("x"))}, nil); !errors.Is(err, ErrUnknownBlob) {
		t.Errorf("unknown blob: %v", err)
	}
	if err := w.Flush(ctx); err != nil {
		t.Errorf("refused blobs spoil the writer: %v", err)
	}
	cancel()
	if _, _, err := w.Save(ctx, DataBlob, []byte("x")); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled Save: %v", err)
	}
}

func TestOpenErrors(t *testing.T) {
	ctx := context.Background()
	be := mem.New()
	if _, err := Open(ctx, be, password, Options{}); !errors.Is(err, ErrNoRepository) {
		t.Errorf("nothing there: %v", err)
	}
	r := initRepo(t, be, InitOptions{})
	if _, err := Open(ctx, be, "wrong", Options{}); !errors.Is(err, ErrWrongPassword) {
		t.Errorf("wrong password: %v", err)
	}
	if _, err := Init(ctx, be, password, InitOptions{KDF: cheapKDF}); !errors.Is(err, ErrExists) {
		t.Errorf("second init: %v", err)
	}
	keysOnly := be.Clone()
	if err := keysOnly.Remove(ctx, configHandle); err != nil {
		t.Fatal(err)
	}
	if _, err := Init(ctx, keysOnly, password, InitOptions{KDF: cheapKDF}); !errors.Is(err, ErrExists) {
		t.Errorf("init over keys: %v", err)
	}
	noKeys := be.Clone()
	if err := noKeys.Remove(ctx, backend.Handle{Type: backend.KeyFile, Name: r.CurrentKey().String()}); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(ctx, noKeys, password, Options{}); err == nil || errors.Is(err, ErrWrongPassword) || errors.Is(err, ErrNoRepository) {
		t.Errorf("no keys: %v", err)
	}
	damaged := be.Clone()
	damaged.Put(configHandle, []byte("damaged"))
	if _, err := Open(ctx, damaged, password, Options{}); err == nil || errors.Is(err, ErrWrongPassword) {
		t.Errorf("damaged config: %v", err)
	}
	future := be.Clone()
	future.Put(configHandle, r.key.Seal(nil, []byte(`{"version":3,"id":"x","chunker_polynomial":"3"}`)))
	if _, err := Open(ctx, future, password, Options{}); err == nil || !strings.Contains(err.Error(), "version 3") {
		t.Errorf("version 3: %v", err)
	}
	for _, o := range []InitOptions{{Version: 3}, {KDF: KDF{N: 3, R: 1, P: 1}}} {
		if _, err := Init(ctx, mem.New(), password, o); err == nil {
			t.Errorf("Init %+v: no error", o)
		}
	}
	if _, err := Init(ctx, mem.New(), "", InitOptions{}); err == nil {
		t.Error("empty password: no error")
	}
}

func TestKeys(t *testing.T) {
	ctx := context.Background()
	be := mem.New()
	r := initRepo(t, be, InitOptions{})
	second, err := r.AddKey(ctx, "second")
	if err != nil {
		t.Fatal(err)
	}
	// Foreign and damaged files beside the good ones.
	putKey := func(s string) {
		be.Put(backend.Handle{Type: backend.KeyFile, Name: id.Hash([]byte(s)).String()}, []byte(s))
	}
	putKey(`{"kdf":"argon2","N":1}`)
	putKey(`not json`)
	putKey(`{"kdf":"scrypt","N":1024,"r":8,"p":1,"salt":"AAAA","data":""}`)
	putKey(``)
	be.Put(backend.Handle{Type: backend.KeyFile, Name: strings.Repeat("0", 64)}, []byte(`{}`))

	for _, pw := range []string{password, "second"} {
		r2, err := Open(ctx, be, pw, Options{KeyHint: second.String()[:6]})
		if err != nil {
			t.Fatalf("%s: %v", pw, err)
		}
		if r2.ID() != r.ID() || len(r2.ID()) != 64 || r2.ChunkerSeed() != r.ChunkerSeed() || r2.Version() != 2 {
			t.Error("another repository")
		}
		if (r2.CurrentKey() == second) != (pw == "second") {
			t.Errorf("%s opened with %v", pw, r2.CurrentKey())
		}
	}
	if _, err := Open(ctx, be, "third", Options{}); !errors.Is(err, ErrWrongPassword) {
		t.Errorf("wrong password: %v", err)
	}
	keys, err := r.Keys(ctx)
	if err != nil {
		t.Fatal(err)
	}
	good, current := 0, 0
	for _, k := range keys {
		if k.Damaged == "" {
			good++
			if k.Created.IsZero() || k.Hostname == "" {
				t.Errorf("key %+v", k)
			}
		}
		if k.Current {
			current++
		}
	}
	if len(keys) != 7 || good != 2 || current != 1 {
		t.Errorf("%d keys, %d good, %d current", len(keys), good, current)
	}
	if err := r.RemoveKey(ctx, r.CurrentKey()); err == nil {
		t.Error("the key in use was removed")
	}
	if err := r.RemoveKey(ctx, second); err != nil {
		t.Error(err)
	}
	if _, err := Open(ctx, be, "second", Options{}); !errors.Is(err, ErrWrongPassword) {
		t.Errorf("removed password: %v", err)
	}
	if err := r.RemoveKey(ctx, second); !errors.Is(err, backend.ErrNotExist) {
		t.Errorf("removed twice: %v", err)
	}
}

func TestTwentyKeys(t *testing.T) {
	ctx := context.Background()
	be := mem.New()
	r := initRepo(t, be, InitOptions{})
	var last ID
	for i := range 25 {
		var err error
		if last, err = r.AddKey(ctx, fmt.Sprint("password ", i)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Open(ctx, be, "password 24", Options{KeyHint: last.String()}); err != nil {
		t.Errorf("with a hint: %v", err)
	}
	if _, err := Open(ctx, be, "none", Options{}); !errors.Is(err, ErrWrongPassword) || !strings.Contains(err.Error(), "key-hint") {
		t.Errorf("wrong password: %v", err)
	}
}

func TestUnpacked(t *testing.T) {
	ctx := context.Background()
	for _, v := range []uint{1, 2} {
		be := mem.New()
		r := initRepo(t, be, InitOptions{Version: v})
		body := []byte(`{"tree":"` + strings.Repeat("a", 5000) + `"}`)
		var ids []ID
		for range 3 { // a random IV makes each another file
			d, err := r.SaveUnpacked(ctx, backend.SnapshotFile, body)
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, d)
			if got, err := r.LoadUnpacked(ctx, backend.SnapshotFile, d); err != nil || !bytes.Equal(got, body) {
				t.Errorf("version %d: %v", v, err)
			}
			fi, err := be.Stat(ctx, backend.Handle{Type: backend.SnapshotFile, Name: d.String()})
			if err != nil || (v == 1) != (fi.Size == int64(len(body))+32) {
				t.Errorf("version %d: %d bytes, %v", v, fi.Size, err)
			}
		}
		if ids[0] == ids[1] {
			t.Error("equal IDs")
		}
		// Plain JSON is legal in version 2 as well; anything else is not.
		for content, ok := range map[string]bool{`{"a":1}`: true, `[]`: true, ` {}`: false, ``: false, "\x02junk": false, "\x03": false} {
			sealed := r.key.Seal(nil, []byte(content))
			d := id.Hash(sealed)
			be.Put(backend.Handle{Type: backend.IndexFile, Name: d.String()}, sealed)
			if got, err := r.LoadUnpacked(ctx, backend.IndexFile, d); (err == nil) != ok || (ok && string(got) != content) {
				t.Errorf("%q: %q, %v", content, got, err)
			}
		}
		full := ids[0].String()
		if d, err := r.FindFile(ctx, backend.SnapshotFile, strings.ToUpper(full[:12])); err != nil || d != ids[0] {
			t.Errorf("FindFile: %v, %v", d, err)
		}
		if d, err := r.FindFile(ctx, backend.SnapshotFile, full); err != nil || d != ids[0] {
			t.Errorf("FindFile: %v, %v", d, err)
		}
		for _, bad := range []string{"", "xyz", full + "0"} {
			if _, err := r.FindFile(ctx, backend.SnapshotFile, bad); err == nil {
				t.Errorf("FindFile %q: no error", bad)
			}
		}
		if err := r.RemoveUnpacked(ctx, backend.SnapshotFile, ids[0]); err != nil {
			t.Error(err)
		}
		if _, err := r.FindFile(ctx, backend.SnapshotFile, full); !errors.Is(err, backend.ErrNotExist) {
			t.Errorf("FindFile of a removed file: %v", err)
		}
		if _, err := r.LoadUnpacked(ctx, backend.SnapshotFile, ids[0]); !errors.Is(err, backend.ErrNotExist) {
			t.Errorf("removed: %v", err)
		}
		for _, ft := range []backend.FileType{backend.ConfigFile, backend.KeyFile, backend.PackFile} {
			if _, err := r.SaveUnpacked(ctx, ft, body); err == nil {
				t.Errorf("SaveUnpacked of a %v", ft)
			}
		}
	}
}

func TestAmbiguousPrefix(t *testing.T) {
	be := mem.New()
	r := initRepo(t, be, InitOptions{})
	for _, c := range "0123" {
		be.Put(backend.Handle{Type: backend.SnapshotFile, Name: "abc" + strings.Repeat(string(c), 61)}, []byte("x"))
	}
	_, err := r.FindFile(context.Background(), backend.SnapshotFile, "ab")
	var ae *AmbiguousError
	if !errors.As(err, &ae) || len(ae.IDs) != 4 || !strings.Contains(err.Error(), "abc0") {
		t.Errorf("FindFile: %v", err)
	}
}

// TestPairsOfPacks: after the first few a pack waits for the next, and is stored without one by Flush.
func TestPairsOfPacks(t *testing.T) {
	be := mem.New()
	r := initRepo(t, be, InitOptions{Options: Options{PackSize: 1 << 20, PackBuffers: pairBuffers}})
	w := r.NewWriter(t.Context())
	packs := func(want int) {
		t.Helper()
		w.wait()
		n := 0
		for _, h := range list(t, be) {
			if h.Type != backend.PackFile {
				continue
			}
			n++
			if err := be.Load(t.Context(), h, 0, 0, func(rd io.Reader) error {
				p, err := io.ReadAll(rd)
				if id.Hash(p).String() != h.Name {
					t.Errorf("the name of pack %s is not its checksum", h.Name)
				}
				return err
			}); err != nil {
				t.Fatal(err)
			}
		}
		if n != want {
			t.Errorf("%d packs are stored, not %d", n, want)
		}
	}
	var blobs []ID
	for i, want := range []int{1, 2, 3, 4, 4, 6, 6} {
		b, _ := save(t, w, DataBlob, noise(byte(i), 1<<20))
		blobs = append(blobs, b)
		packs(want)
	}
	small, _ := save(t, w, DataBlob, noise(99, 1000))
	blobs = append(blobs, small)
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	packs(8)
	r2 := openRepo(t, be)
	for _, b := range blobs {
		if _, err := r2.LoadBlob(t.Context(), DataBlob, b, nil); err != nil {
			t.Error(err)
		}
	}
	save(t, w, DataBlob, noise(100, 1<<20)) // alone
	packs(8)
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	packs(9)
}

// TestFlushAmongOthers: what was saved before Flush is durable after it, whatever others seal into the same pack meanwhile, and
// although packs wait for one another.
func TestFlushAmongOthers(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	be := mem.New()
	r := initRepo(t, be, InitOptions{Options: Options{PackSize: 1 << 20, PackBuffers: pairBuffers}})
	w := r.NewWriter(ctx)
	var wg sync.WaitGroup
	for g := range 6 {
		wg.Go(func() {
			for i := range 12 {
				data := noise(byte(20*g+i), 100_000+70_000*((g+i)%6))
				blob, _, err := w.Save(ctx, DataBlob, data)
				if err == nil && (g+i)%3 == 0 {
					if err = w.Flush(ctx); err == nil {
						_, err = openRepo(t, be).LoadBlob(ctx, DataBlob, blob, nil)
					}
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := w.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	checkClean(t, be)
}

// TestFlushDuringASeal: a Flush waits for who still seals into the pack that it closes, and is told when that pack begins to wait for
// another, at whatever moment that is.
func TestFlushDuringASeal(t *testing.T) {
	t.Parallel()
	be := mem.New()
	r := initRepo(t, be, InitOptions{Options: Options{PackSize: 1 << 20, PackBuffers: pairBuffers}})
	w := r.NewWriter(t.Context())
	for i := range 300 {
		save(t, w, DataBlob, append([]byte{byte(i >> 8), byte(i)}, "something short"...))
		o := w.packers[DataBlob].w
		o.users.Add(1) // as one who seals
		done := make(chan error, 1)
		go func() { done <- w.Flush(t.Context()) }()
		time.Sleep(time.Duration(i%40) * 50 * time.Microsecond)
		select {
		case err := <-done:
			t.Fatalf("run %d: Flush returned (%v) while a blob was being sealed", i, err)
		default:
		}
		w.leave(o)
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(time.Minute):
			t.Fatalf("run %d: Flush does not return", i)
		}
		w.mu.Lock()
		left := w.uploads
		if w.waiting != nil {
			left++
		}
		w.mu.Unlock()
		if left > 0 {
			t.Fatalf("run %d: Flush returned, and %d packs are not stored", i, left)
		}
	}
	checkClean(t, be)
}

// An index file is written in the middle of a backup, and only of durable packs.
func TestIndexDuringBackup(t *testing.T) {
	ctx := context.Background()
	be := mem.New()
	r := initRepo(t, be, InitOptions{Options: Options{PackSize: 1 << 20, PackBuffers: pairBuffers - 1}}) // no pack waits for another
	now := time.Unix(1_800_000_000, 0)
	r.clock.now = func() time.Time { return now }
	w := r.NewWriter(ctx)
	index := func() (n int) {
		for {
			w.mu.Lock()
			left, changed := w.uploads, w.changed
			w.mu.Unlock()
			if left == 0 {
				break
			}
			<-changed
		}
		for _, h := range list(t, be) {
			if h.Type == backend.IndexFile {
				n++
			}
		}
		return n
	}
	for i := range 4 {
		save(t, w, DataBlob, noise(byte(i), 600_000))
	}
	if n := index(); n != 0 {
		t.Errorf("%d index files at once", n)
	}
	now = now.Add(11 * time.Minute)
	save(t, w, DataBlob, noise(10, 600_000))
	if n := index(); n != 1 {
		t.Errorf("%d index files after 11 minutes", n)
	}
	r2 := openRepo(t, be)
	if r2.idx.Len(DataBlob) != 4 {
		t.Errorf("%d blobs are indexed, 4 packs are durable", r2.idx.Len(DataBlob))
	}
	r.indexBlobs = 2
	for i := range 4 {
		save(t, w, DataBlob, noise(byte(20+i), 600_000))
	}
	if n := index(); n != 3 {
		t.Errorf("%d index files after four more blobs", n)
	}
	if err := w.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	checkClean(t, be)
}

func TestPolynomial(t *testing.T) {
	if !irreducible(0x32f1199141b509) { // restic's own, from a repository of it
		t.Error("a good polynomial is refused")
	}
	for _, p := range []uint64{0, 1, 2, 1 << 53, 1<<53 | 1, 0x32f1199141b508, mulFull(1<<20|1<<3|1, 1<<33|1<<13|1)} {
		if irreducible(p) {
			t.Errorf("%x is taken for irreducible", p)
		}
	}
	p := newPolynomial()
	if !irreducible(p) || p>>53 != 1 {
		t.Errorf("%x", p)
	}
	var c config
	if err := json.Unmarshal([]byte(fmt.Sprintf(`{"chunker_polynomial":"%x"}`, p)), &c); err != nil {
		t.Fatal(err)
	}
	a := (&Repository{conf: c}).ChunkerSeed()
	b := (&Repository{conf: config{Polynomial: "3"}}).ChunkerSeed()
	if a == b {
		t.Error("seeds do not depend on the polynomial")
	}
	// Fixed: another seed would cut everything anew.
	if got := fmt.Sprintf("%x", b[:4]); got != "b1e2d908" {
		t.Errorf("the seed of polynomial 3 begins with %s", got)
	}
}

func mulFull(a, b uint64) (p uint64) {
	for ; b != 0; b >>= 1 {
		if b&1 != 0 {
			p ^= a
		}
		a <<= 1
	}
	return p
}

// withRepeats makes n bytes of each so many those from some distance before.
func withRepeats(p []byte, n, each int) []byte {
	for i := 2000; i+n < len(p); i += each {
		copy(p[i:i+n], p[i-1000-i%777:])
	}
	return p
}

// withColumns makes records of 120 bytes, of which 6 are always the same.
func withColumns(p []byte) []byte {
	for i := 0; i+6 <= len(p); i += 120 {
		copy(p[i:], "column")
	}
	return p
}

func TestIncompressible(t *testing.T) {
	for name, c := range map[string]struct {
		data []byte
		want bool
	}{
		"noise":    {noise(1, 1<<20), true},
		"text":     {text(1, 1<<20), false},
		"zeros":    {make([]byte, 1<<20), false},
		"repeated": {bytes.Repeat(noise(2, 5000), 200), false},
		"small":    {noise(3, 1000), false},
		"half":     {append(noise(4, 1<<19), text(5, 1<<19)...), false},
		"a tenth":  {withRepeats(noise(6, 1<<20), 400, 4000), false},
		"a 40th":   {withRepeats(noise(7, 1<<20), 100, 4000), true},
		// What is less evenly spread, or repeats, in the middle or at the end alone.
		"base64":  {append(noise(8, 768<<10), base64.StdEncoding.EncodeToString(noise(9, 192<<10))...), false},
		"middle":  {slices.Concat(noise(10, 500<<10), make([]byte, 40<<10), noise(11, 500<<10)), false},
		"short":   {withRepeats(noise(12, 1<<20), 8, 240), true}, // what it takes to say so is about as long
		"columns": {withColumns(noise(13, 1<<20)), false},
	} {
		if got := new(compressor).incompressible(c.data); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	for s, want := range map[string]Compression{"": CompressionAuto, "auto": CompressionAuto, "off": CompressionOff, "max": CompressionMax} {
		if c, err := ParseCompression(s); err != nil || c != want || (s != "" && c.String() != s) {
			t.Errorf("ParseCompression %q: %v, %v", s, c, err)
		}
	}
	if _, err := ParseCompression("best"); err == nil {
		t.Error("ParseCompression: no error")
	}
}

// A frame that does not give back what it was made of is replaced by that of another encoder; only if that is wrong, too, nothing can
// be stored.
func TestWrongFrame(t *testing.T) {
	ctx := context.Background()
	r := initRepo(t, mem.New(), InitOptions{})
	wrong := 0
	flip := func(frame []byte) {
		if wrong > 0 {
			wrong--
			frame[len(frame)-2] ^= 4
		}
	}
	spoiled := func(n int) {
		wrong = n
		r.compressors.free = []*compressor{{spoil: flip}}
	}
	before := WrongFrames()
	body := []byte(`{"tree":"` + strings.Repeat("abc", 5000) + `"}`)
	spoiled(1)
	name, err := r.SaveUnpacked(ctx, backend.SnapshotFile, body)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := r.LoadUnpacked(ctx, backend.SnapshotFile, name); err != nil || !bytes.Equal(got, body) {
		t.Errorf("a snapshot of which the frame was wrong: %v, the same: %v", err, bytes.Equal(got, body))
	}

	w := r.NewWriter(ctx)
	spoiled(1)
	data := text(3, 70_000)
	blob, _ := save(t, w, DataBlob, data)
	if err := w.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	if got, err := r.LoadBlob(ctx, DataBlob, blob, nil); err != nil || !bytes.Equal(got, data) {
		t.Errorf("a blob of which the frame was wrong: %v, the same: %v", err, bytes.Equal(got, data))
	}
	if n := WrongFrames() - before; n != 2 {
		t.Errorf("%d wrong frames were counted, want 2", n)
	}

	spoiled(2)
	if _, _, err := w.Save(ctx, DataBlob, text(4, 70_000)); err == nil || !strings.Contains(err.Error(), "memory") {
		t.Errorf("two wrong frames: %v", err)
	}
}

// The size that the index tells bounds what a blob can become in memory.
func TestWrongPlainSize(t *testing.T) {
	out, ok, err := new(compressor).blob(make([]byte, 1<<20), CompressionAuto, DataBlob)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	for _, n := range []int{0, 1, 1<<20 - 1, 1<<20 + 1, 1 << 21} {
		if _, err := decompressBlob(nil, bytes.Clone(out), n); err == nil {
			t.Errorf("a mebibyte passes for %d bytes", n)
		}
	}
	if got, err := decompressBlob([]byte("head"), out, 1<<20); err != nil || len(got) != 4+1<<20 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func idOf(data []byte) ID { return id.Hash(data) }
