package repo

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/fault"
	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/repo/index"
	"github.com/holdfast-backup/holdfast/internal/repo/pack"
)

// oneOf returns the first file of a type and its content.
func oneOf(t *testing.T, be *mem.Backend, ft backend.FileType) (backend.Handle, []byte) {
	t.Helper()
	for _, h := range list(t, be) {
		if h.Type == ft {
			r := &Repository{be: be}
			data, err := r.readFile(context.Background(), h)
			if err != nil {
				t.Fatal(err)
			}
			return h, bytes.Clone(data)
		}
	}
	t.Fatalf("no %v", ft)
	return backend.Handle{}, nil
}

func putIndex(t *testing.T, r *Repository, packs ...pendingPack) {
	t.Helper()
	body := []byte(index.Header)
	for i, p := range packs {
		if i > 0 {
			body = append(body, ',')
		}
		body = index.AppendPack(body, p.id, p.blobs)
	}
	if _, err := r.SaveUnpacked(context.Background(), backend.IndexFile, append(body, index.Footer...)); err != nil {
		t.Fatal(err)
	}
}

// putPack stores a pack that holds blobs as given, under its true name.
func putPack(r *Repository, be *mem.Backend, blobs ...[]byte) pendingPack {
	w := pack.NewWriter(nil)
	for _, b := range blobs {
		add(w, DataBlob, id.Hash(b), r.key.Seal(nil, b), 0)
	}
	file, entries := w.Finish(r.key)
	p := pendingPack{id: id.Hash(file), blobs: entries}
	be.Put(packHandle(p.id), file)
	return p
}

func TestCheckFindings(t *testing.T) {
	ctx := context.Background()
	base, ids := baseRepo(t)
	lost := func(t *testing.T, e *CheckError) {
		if len(e.Blobs) != len(ids) {
			t.Errorf("%d blobs named, not %d", len(e.Blobs), len(ids))
		}
		for _, b := range e.Blobs {
			if b.Type != DataBlob || !slices.Contains(ids, b.ID) {
				t.Errorf("%v is named", b)
			}
		}
	}
	for _, c := range []struct {
		name     string
		harm     func(t *testing.T, be *mem.Backend, r *Repository)
		fast     []Problem // without reading
		full     []Problem
		inspects func(t *testing.T, e *CheckError)
	}{
		{"nothing", func(*testing.T, *mem.Backend, *Repository) {}, nil, nil, nil},
		{"pack missing", func(t *testing.T, be *mem.Backend, _ *Repository) {
			h, _ := oneOf(t, be, backend.PackFile)
			if err := be.Remove(ctx, h); err != nil {
				t.Fatal(err)
			}
		}, []Problem{PackMissing}, []Problem{PackMissing}, lost},
		{"pack cut off", func(t *testing.T, be *mem.Backend, _ *Repository) {
			h, data := oneOf(t, be, backend.PackFile)
			be.Put(h, data[:len(data)-10])
		}, []Problem{PackSize}, []Problem{PackSize, PackDamaged}, lost},
		{"pack empty", func(t *testing.T, be *mem.Backend, _ *Repository) {
			h, _ := oneOf(t, be, backend.PackFile)
			be.Put(h, nil)
		}, []Problem{PackSize}, []Problem{PackSize, PackDamaged}, lost},
		{"a bit in a blob", func(t *testing.T, be *mem.Backend, _ *Repository) {
			h, data := oneOf(t, be, backend.PackFile)
			data[100] ^= 4
			be.Put(h, data)
		}, nil, []Problem{PackDamaged}, func(t *testing.T, e *CheckError) {
			if len(e.Blobs) != 1 || e.Blobs[0].ID != ids[0] {
				t.Errorf("named: %v", e.Blobs)
			}
		}},
		{"a bit in the header", func(t *testing.T, be *mem.Backend, _ *Repository) {
			h, data := oneOf(t, be, backend.PackFile)
			data[len(data)-50] ^= 4
			be.Put(h, data)
		}, nil, []Problem{PackDamaged}, lost},
		{"a bit in the header's length", func(t *testing.T, be *mem.Backend, _ *Repository) {
			h, data := oneOf(t, be, backend.PackFile)
			data[len(data)-1] ^= 4
			be.Put(h, data)
		}, nil, []Problem{PackDamaged}, lost},
		{"pack in no index", func(_ *testing.T, be *mem.Backend, r *Repository) { putPack(r, be, []byte("x")) },
			[]Problem{PackUnlisted}, []Problem{PackUnlisted}, nil},
		{"pack in two index files", func(t *testing.T, be *mem.Backend, r *Repository) {
			p := putPack(r, be, []byte("x"))
			putIndex(t, r, p)
			putIndex(t, r, p)
		}, []Problem{PackInIndexes}, []Problem{PackInIndexes}, nil},
		{"pack split over index files", func(t *testing.T, be *mem.Backend, r *Repository) {
			p := putPack(r, be, []byte("x"), []byte("y"))
			a, b := p, p
			a.blobs, b.blobs = p.blobs[:1], p.blobs[1:]
			putIndex(t, r, a)
			putIndex(t, r, b)
		}, []Problem{IndexWrong, IndexWrong}, []Problem{IndexWrong, IndexWrong}, nil},
		{"blob not indexed", func(t *testing.T, be *mem.Backend, r *Repository) {
			p := putPack(r, be, []byte("x"), []byte("y"))
			p.blobs = p.blobs[:1]
			putIndex(t, r, p)
		}, []Problem{PackSize}, []Problem{PackSize, PackDamaged}, nil},
		{"wrong plain length", func(t *testing.T, be *mem.Backend, r *Repository) {
			w := pack.NewWriter(nil)
			plain := text(1, 1000)
			out, _, err := new(compressor).blob(plain, CompressionAuto, DataBlob)
			if err != nil {
				t.Fatal(err)
			}
			add(w, DataBlob, id.Hash(plain), r.key.Seal(nil, out), 1001)
			file, entries := w.Finish(r.key)
			be.Put(packHandle(id.Hash(file)), file)
			putIndex(t, r, pendingPack{id: id.Hash(file), blobs: entries})
		}, nil, []Problem{PackDamaged}, nil},
		{"blob under a wrong ID", func(t *testing.T, be *mem.Backend, r *Repository) {
			w := pack.NewWriter(nil)
			add(w, DataBlob, id.Hash([]byte("a")), r.key.Seal(nil, []byte("b")), 0)
			file, entries := w.Finish(r.key)
			be.Put(packHandle(id.Hash(file)), file)
			putIndex(t, r, pendingPack{id: id.Hash(file), blobs: entries})
		}, nil, []Problem{PackDamaged}, nil},
		{"data and trees mixed", func(t *testing.T, be *mem.Backend, r *Repository) {
			w := pack.NewWriter(nil)
			add(w, DataBlob, id.Hash([]byte("a")), r.key.Seal(nil, []byte("a")), 0)
			add(w, TreeBlob, id.Hash([]byte("a")), r.key.Seal(nil, []byte("a")), 0)
			file, entries := w.Finish(r.key)
			be.Put(packHandle(id.Hash(file)), file)
			putIndex(t, r, pendingPack{id: id.Hash(file), blobs: entries})
		}, []Problem{PackMixed}, []Problem{PackMixed}, nil},
		{"index file damaged", func(t *testing.T, be *mem.Backend, _ *Repository) {
			h, data := oneOf(t, be, backend.IndexFile)
			data[50] ^= 1
			be.Put(h, data)
		}, []Problem{IndexDamaged, PackUnlisted}, []Problem{IndexDamaged, PackUnlisted}, nil},
		{"index file of nonsense", func(t *testing.T, _ *mem.Backend, r *Repository) {
			if _, err := r.SaveUnpacked(ctx, backend.IndexFile, []byte(`{"packs":[{"id":7}]}`)); err != nil {
				t.Fatal(err)
			}
		}, []Problem{IndexDamaged}, []Problem{IndexDamaged}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			be := base.Clone()
			c.harm(t, be, openRepo(t, be))
			r, err := Open(ctx, be, password, Options{})
			if err != nil {
				t.Fatal(err)
			}
			for _, read := range []bool{false, true} {
				want := c.fast
				if read {
					want = c.full
				}
				var got []Problem
				var last progress.Event
				err := r.Check(ctx, CheckOptions{ReadData: read, Progress: func(e progress.Event) {
					if e.Kind == progress.Finish {
						last = e
					}
				}}, func(err error) {
					var ce *CheckError
					if !errors.As(err, &ce) || ce.Error() == "" || ce.Problem.String() == "" {
						t.Fatalf("reported: %v", err)
					}
					got = append(got, ce.Problem)
					if IsHint(err) != (ce.Problem >= PackUnlisted) {
						t.Errorf("%v: hint %v", ce.Problem, IsHint(err))
					}
					if c.inspects != nil {
						c.inspects(t, ce)
					}
				})
				if err != nil {
					t.Errorf("Check: %v", err)
				}
				slices.Sort(got)
				if !slices.Equal(got, want) {
					t.Errorf("reading %v: found %v, not %v", read, got, want)
				}
				if read && last.Done != last.Total {
					t.Errorf("last event %+v", last)
				}
			}
		})
	}
}

// What fails in passing is no finding, and what keeps Check from working is an error.
func TestCheckUnderFaults(t *testing.T) {
	base, _ := baseRepo(t)
	r, err := Open(context.Background(), fault.New(base, fault.Fault{Op: fault.Load, Type: backend.PackFile, N: 2, Effect: fault.Corrupt},
		fault.Fault{Op: fault.Load, Type: backend.IndexFile, N: 1, Effect: fault.Corrupt}), password, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Check(context.Background(), CheckOptions{ReadData: true}, func(err error) { t.Error(err) }); err != nil {
		t.Error(err)
	}
	for _, ft := range []backend.FileType{backend.IndexFile, backend.PackFile} {
		r, err := Open(context.Background(), fault.New(base, fault.Fault{Op: fault.List, Type: ft}), password, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Check(context.Background(), CheckOptions{}, func(error) {}); !errors.Is(err, fault.ErrFault) {
			t.Errorf("List of %v fails: %v", ft, err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	r, err = Open(ctx, base, password, Options{})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := r.Check(ctx, CheckOptions{ReadData: true}, func(err error) { t.Error(err) }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// A damaged copy of a blob is passed over for a good one.
func TestSeveralCopies(t *testing.T) {
	ctx := context.Background()
	be := mem.New()
	r := initRepo(t, be, InitOptions{})
	a := putPack(r, be, []byte("first"), []byte("both"))
	b := putPack(r, be, []byte("both"))
	putIndex(t, r, a, b)
	d := id.Hash([]byte("both"))
	for _, harmed := range []ID{a.id, b.id} {
		m := be.Clone()
		r := &Repository{be: m}
		data, err := r.readFile(ctx, packHandle(harmed))
		if err != nil {
			t.Fatal(err)
		}
		bad := bytes.Clone(data)
		for i := range len(bad) - 100 {
			bad[i] ^= 1
		}
		if harmed == b.id {
			bad = nil
		}
		m.Put(packHandle(harmed), bad)
		r2 := openRepo(t, m)
		if got, err := r2.LoadBlob(ctx, DataBlob, d, nil); err != nil || string(got) != "both" {
			t.Errorf("LoadBlob: %q, %v", got, err)
		}
		n := 0
		err = r2.LoadBlobs(ctx, DataBlob, []ID{d}, func(_ ID, data []byte) error { n++; return nil })
		if err != nil || n != 1 {
			t.Errorf("LoadBlobs: %d, %v", n, err)
		}
	}
}

func add(w *pack.Writer, t BlobType, blob ID, sealed []byte, plain uint32) {
	copy(w.Reserve(t, blob, len(sealed), plain), sealed)
}

// Blobs are decoded two at a time. What is wrong with one, its seal or its content, is told of that one, and the other is
// loaded all the same.
func TestOneOfTwoDamaged(t *testing.T) {
	ctx := context.Background()
	be := mem.New()
	r := initRepo(t, be, InitOptions{})
	blobs := [][]byte{noise(1, 100), noise(2, 70_000), noise(3, 3<<20), noise(4, 3<<20), noise(5, 1<<20), noise(6, 1)}
	for bad := -1; bad < len(blobs); bad++ {
		for _, forged := range []bool{false, true} {
			m := be.Clone()
			w := pack.NewWriter(nil)
			for i, b := range blobs {
				sealed := r.key.Seal(nil, b)
				if i == bad && forged {
					other := bytes.Clone(b)
					other[len(b)/2] ^= 1
					sealed = r.key.Seal(nil, other)
				} else if i == bad {
					sealed[len(sealed)/2] ^= 1
				}
				add(w, DataBlob, id.Hash(b), sealed, 0)
			}
			file, entries := w.Finish(r.key)
			first := pendingPack{id: id.Hash(file), blobs: entries}
			m.Put(packHandle(first.id), file)
			r := openRepo(t, m)
			putIndex(t, r, first)

			var named []BlobRef
			err := r.Check(ctx, CheckOptions{ReadData: true}, func(err error) {
				var ce *CheckError
				if !errors.As(err, &ce) || ce.Problem != PackDamaged {
					t.Error(err)
					return
				}
				named = append(named, ce.Blobs...)
			})
			if err != nil {
				t.Fatal(err)
			}
			if bad >= 0 && (len(named) != 1 || named[0].ID != id.Hash(blobs[bad])) || bad < 0 && named != nil {
				t.Errorf("blob %d, forged %v: check names %v", bad, forged, named)
			}

			// Without another copy the call fails, after what comes before it.
			load := func(r *Repository) (map[ID]bool, error) {
				if err := r.LoadIndex(ctx); err != nil {
					t.Fatal(err)
				}
				var ids []ID
				want := map[ID][]byte{}
				for _, b := range blobs {
					ids = append(ids, id.Hash(b))
					want[id.Hash(b)] = b
				}
				got := map[ID]bool{}
				var mu sync.Mutex
				err := r.LoadBlobs(ctx, DataBlob, ids, func(d ID, data []byte) error {
					mu.Lock()
					defer mu.Unlock()
					if got[d] || !bytes.Equal(data, want[d]) {
						t.Errorf("blob %d, forged %v: wrong or given twice: %v", bad, forged, d.Short())
					}
					got[d] = true
					return nil
				})
				return got, err
			}
			got, err := load(openRepo(t, m))
			if bad >= 0 && (err == nil || !strings.Contains(err.Error(), id.Hash(blobs[bad]).Short()) || got[id.Hash(blobs[bad])]) {
				t.Errorf("blob %d, forged %v: %v, loaded %v", bad, forged, err, got)
			}
			// With one, all are loaded.
			if bad >= 0 {
				putIndex(t, r, putPack(r, m, blobs[bad]))
			}
			if got, err := load(openRepo(t, m)); err != nil || len(got) != len(blobs) {
				t.Errorf("blob %d, forged %v, with a copy: %d of %d, %v", bad, forged, len(got), len(blobs), err)
			}
		}
	}
}
