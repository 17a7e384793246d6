package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"sync"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/repo/index"
	"github.com/holdfast-backup/holdfast/internal/repo/pack"
	"github.com/holdfast-backup/holdfast/internal/repo/sums"
	"golang.org/x/sync/errgroup"
)

// ErrUnknownBlob is returned when no index file names a blob.
var ErrUnknownBlob = errors.New("blob is in no index")

func (r *Repository) newIndex() *index.Index {
	return index.New(index.Options{Memory: r.opts.IndexMemory, Dir: r.opts.TempDir})
}

// LoadIndex reads all index files into memory, in place of what was there. It must come before
// everything that finds or stores blobs.
func (r *Repository) LoadIndex(ctx context.Context) error {
	x := r.newIndex()
	early := r.settles()
	files, err := r.indexFiles(ctx)
	if err != nil {
		return fmt.Errorf("load the index: %w", err)
	}
	var mu sync.Mutex
	err = r.eachIndex(ctx, files, func(_ ID, p ID, blobs []pack.Entry) error {
		mu.Lock()
		defer mu.Unlock()
		no, _ := x.Pack(p)
		for _, e := range blobs {
			x.Add(no, e)
		}
		return nil
	}, nil)
	if err != nil {
		return fmt.Errorf("load the index of the repository at %s: %w", r.be.Location(), err)
	}
	r.mu.Lock()
	r.idx = x
	r.mu.Unlock()
	r.earlyMu.Lock()
	defer r.earlyMu.Unlock()
	if r.early = nil; early {
		r.early = files
	}
	return nil
}

func (r *Repository) indexFiles(ctx context.Context) (files []ID, err error) {
	err = r.ListFiles(ctx, backend.IndexFile, func(d ID, _ int64) error { files = append(files, d); return nil })
	return files, err
}

// eachIndex decodes index files, several at once, and calls fn for each pack in them. An index file
// that cannot be read ends it, unless bad is given and returns nil for the error.
func (r *Repository) eachIndex(ctx context.Context, files []ID, fn func(file, p ID, blobs []pack.Entry) error, bad func(file ID, err error) error) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(r.opts.Readers)
	for _, f := range files {
		g.Go(func() error {
			if gctx.Err() != nil {
				return context.Cause(gctx)
			}
			text, err := r.LoadUnpacked(gctx, backend.IndexFile, f)
			if err == nil {
				err = index.Decode(text, func(p id.ID, blobs []pack.Entry) error { return fn(f, p, blobs) })
				if err != nil {
					err = fmt.Errorf("index/%v: %w", f, err)
				}
			}
			if err != nil && bad != nil && gctx.Err() == nil {
				err = bad(f, err)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}

// Has reports whether a blob is stored and indexed.
func (r *Repository) Has(t BlobType, blob ID) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	_, ok := r.idx.First(t, blob)
	return ok
}

// Size returns the size in bytes of a blob's content.
func (r *Repository) Size(t BlobType, blob ID) (plain int64, ok bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	l, ok := r.idx.First(t, blob)
	if !ok {
		return 0, false
	}
	return l.Entry(t, blob).PlainSize(), true
}

// EachBlob calls fn for every place of every blob, with its sizes in bytes before compression and as
// stored. fn must not call methods of r that store something.
func (r *Repository) EachBlob(fn func(t BlobType, blob, packID ID, plain, stored int64)) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for no, e := range r.idx.All() {
		fn(e.Type, e.ID, r.idx.PackID(no), e.PlainSize(), int64(e.Length))
	}
}

// place is a blob in a pack.
type place struct {
	pack ID
	e    pack.Entry
}

func (r *Repository) places(t BlobType, blob ID) iter.Seq[place] {
	var list []place
	r.mu.RLock()
	for l := range r.idx.Lookup(t, blob) {
		list = append(list, place{r.idx.PackID(l.Pack), l.Entry(t, blob)})
	}
	r.mu.RUnlock()
	return slices.Values(list)
}

// LoadBlob returns a blob's content, decrypted, decompressed and compared with its ID, in the
// memory of buf if that is large enough. If the blob has several copies, each is tried.
// Errors: ErrUnknownBlob.
func (r *Repository) LoadBlob(ctx context.Context, t BlobType, blob ID, buf []byte) ([]byte, error) {
	var errs []error
	for p := range r.places(t, blob) {
		// Twice, as damage may come from the way and not from the place.
		for try := range 2 {
			tctx := ctx
			if try > 0 {
				tctx = backend.WithHint(ctx, backend.Fresh) // nor from a cache
			}
			out, err := r.loadPlace(tctx, p, buf[:0])
			if err == nil {
				return out, nil
			}
			if ctx.Err() != nil {
				return nil, fmt.Errorf("load %v blob %s: %w", t, blob.Short(), context.Cause(ctx))
			}
			errs = append(errs, fmt.Errorf("data/%s: %w", p.pack, err))
			var de *damageError
			if !errors.As(err, &de) {
				break // the backend has tried what it can
			}
		}
	}
	if len(errs) == 0 {
		return nil, fmt.Errorf("load %v blob %s: %w", t, blob, ErrUnknownBlob)
	}
	return nil, fmt.Errorf("load %v blob %s: %w", t, blob, errors.Join(errs...))
}

func (r *Repository) loadPlace(ctx context.Context, p place, dst []byte) ([]byte, error) {
	sealed := getBuffer(int(p.e.Length))
	defer putBuffer(sealed)
	if err := r.readRange(hint(ctx, p.e.Type), p.pack, int64(p.e.Offset), (*sealed)[:p.e.Length]); err != nil {
		return nil, err
	}
	return r.decodeBlob(dst, (*sealed)[:p.e.Length], p.e)
}

// hint tells caches that packs of trees are read again and again.
func hint(ctx context.Context, t BlobType) context.Context {
	if t == TreeBlob {
		return backend.WithHint(ctx, backend.Metadata)
	}
	return ctx
}

// Near marks loads of data blobs that will be read again and again: metadata that lies among the contents.
// Backends that keep copies then keep one of them.
func Near(ctx context.Context) context.Context { return backend.WithHint(ctx, backend.Near) }

// readRange fills p from a pack.
func (r *Repository) readRange(ctx context.Context, packID ID, offset int64, p []byte) error {
	h := backend.Handle{Type: backend.PackFile, Name: packID.String()}
	return r.be.Load(ctx, h, len(p), offset, func(rd io.Reader) error {
		_, err := io.ReadFull(rd, p)
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	})
}

// damageError marks bytes that were read and are not what they should be.
type damageError struct{ err error }

func (e *damageError) Error() string { return e.err.Error() }
func (e *damageError) Unwrap() error { return e.err }

// decodeBlob appends the content of a sealed blob to dst and compares it with the ID. sealed may
// be overwritten. Every error is a *damageError.
func (r *Repository) decodeBlob(dst, sealed []byte, e pack.Entry) ([]byte, error) {
	n := len(dst)
	out, err := r.openBlob(dst, sealed, e)
	if err != nil {
		return nil, err
	}
	if err := compareID(id.Hash(out[n:]), e); err != nil {
		return nil, err
	}
	return out, nil
}

// openBlob does the same without comparing.
func (r *Repository) openBlob(dst, sealed []byte, e pack.Entry) (out []byte, err error) {
	if e.Plain == 0 {
		out, err = r.key.OpenTo(dst, sealed)
	} else {
		var plain []byte
		if plain, err = r.key.Open(sealed); err == nil {
			out, err = decompressBlob(dst, plain, int(e.Plain))
		}
	}
	if err != nil {
		return nil, &damageError{err}
	}
	return out, nil
}

func compareID(sum id.ID, e pack.Entry) error {
	if sum != e.ID {
		return &damageError{fmt.Errorf("content has the hash %s", sum.Short())}
	}
	return nil
}

// pairMax is the most content, in bytes, that two blobs have which are decoded together.
const pairMax = 4 << 20

// pairDecoder decodes blobs that follow one another, two at a time where they are not large: hashing both
// together takes two thirds of the time. Not for concurrent use.
type pairDecoder struct {
	r    *Repository
	bufs [2]*[]byte
	out  [2]opened
}

// opened is what became of a sealed blob: its content, or what is wrong with it.
type opened struct {
	data []byte
	err  error
}

func (r *Repository) newPairDecoder() *pairDecoder {
	return &pairDecoder{r: r, bufs: [2]*[]byte{getBuffer(0), getBuffer(0)}}
}

func (d *pairDecoder) close() {
	for _, b := range d.bufs {
		putBuffer(b)
	}
}

// asPair tells whether a and b are to be decoded together.
func asPair(a, b pack.Entry) bool { return a.PlainSize()+b.PlainSize() <= pairMax }

// decode does what decodeBlob does for one or two blobs. What is wrong with one does not touch the other. The contents are valid
// until the next call.
func (d *pairDecoder) decode(sealed [][]byte, es []pack.Entry) []opened {
	out := d.out[:len(es)]
	good := 0
	for i, e := range es {
		// A large one gets its memory when its seal has been found good.
		if n := e.PlainSize(); n <= pairMax && int64(cap(*d.bufs[i])) < n+decodeSlack {
			putBuffer(d.bufs[i])
			d.bufs[i] = getBuffer(int(n + decodeSlack))
		}
		o := &out[i]
		if o.data, o.err = d.r.openBlob((*d.bufs[i])[:0], sealed[i], e); o.err == nil {
			*d.bufs[i] = o.data
			good++
		}
	}
	if good == 2 {
		a, b := sums.Pair(out[0].data, out[1].data)
		out[0].err, out[1].err = compareID(a, es[0]), compareID(b, es[1])
		return out
	}
	for i, e := range es {
		if o := &out[i]; o.err == nil {
			o.err = compareID(id.Hash(o.data), e)
		}
	}
	return out
}

const (
	// readMax is the most that is read in one piece from a pack unless a single blob is larger, in bytes.
	readMax = 4 << 20
	// readGap is how many unwanted bytes between two blobs are read rather than asking twice. At
	// 100 MB/s it takes as long as half a millisecond of latency.
	readGap = 64 << 10
)

// LoadBlobs loads many blobs as LoadBlob does, and calls fn for each distinct one. Blobs near one
// another in a pack are read in one piece, and several packs at once, so fn may be called concurrently;
// data is valid only during the call. The first error ends it. Errors: ErrUnknownBlob.
func (r *Repository) LoadBlobs(ctx context.Context, t BlobType, ids []ID, fn func(blob ID, data []byte) error) error {
	type want struct {
		id  ID
		loc index.Location
	}
	list := make([]want, 0, len(ids))
	r.mu.RLock()
	for _, d := range ids {
		l, ok := r.idx.First(t, d)
		if !ok {
			r.mu.RUnlock()
			return fmt.Errorf("load %v blob %s: %w", t, d, ErrUnknownBlob)
		}
		list = append(list, want{d, l})
	}
	r.mu.RUnlock()
	slices.SortFunc(list, func(a, b want) int {
		return cmp.Or(cmp.Compare(a.loc.Pack, b.loc.Pack), cmp.Compare(a.loc.Offset, b.loc.Offset))
	})
	list = slices.CompactFunc(list, func(a, b want) bool { return a.id == b.id })

	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(r.opts.Readers)
	for len(list) > 0 && gctx.Err() == nil {
		// The next piece: blobs of one pack, near one another.
		start := int64(list[0].loc.Offset)
		end := start + int64(list[0].loc.Length)
		n := 1
		for ; n < len(list) && list[n].loc.Pack == list[0].loc.Pack; n++ {
			o := int64(list[n].loc.Offset)
			e := max(end, o+int64(list[n].loc.Length))
			if o-end > readGap || e-start > readMax {
				break
			}
			end = e
		}
		piece := list[:n]
		list = list[n:]
		g.Go(func() error {
			r.mu.RLock()
			packID := r.idx.PackID(piece[0].loc.Pack)
			r.mu.RUnlock()
			raw := getBuffer(int(end - start))
			defer putBuffer(raw)
			d := r.newPairDecoder()
			defer d.close()
			rerr := r.readRange(hint(gctx, t), packID, start, (*raw)[:end-start])
			var sealed [2][]byte
			var es [2]pack.Entry
			for len(piece) > 0 {
				n := 0
				for ; n < len(es) && n < len(piece); n++ {
					w := piece[n]
					es[n] = w.loc.Entry(t, w.id)
					if n == 1 && !asPair(es[0], es[1]) {
						break
					}
					at := int64(w.loc.Offset) - start
					sealed[n] = (*raw)[at : at+int64(w.loc.Length)]
				}
				var out []opened
				if rerr == nil {
					out = d.decode(sealed[:n], es[:n])
				}
				for i, w := range piece[:n] {
					if gctx.Err() != nil {
						return context.Cause(gctx)
					}
					var data []byte
					if rerr == nil && out[i].err == nil {
						data = out[i].data
					} else { // alone, once more, and from other packs if there are copies
						var err error
						if data, err = r.LoadBlob(gctx, t, w.id, nil); err != nil {
							return err
						}
					}
					if err := fn(w.id, data); err != nil {
						return err
					}
				}
				piece = piece[n:]
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}
