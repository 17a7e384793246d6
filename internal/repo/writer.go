package repo

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/repo/crypto"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/repo/index"
	"github.com/holdfast-backup/holdfast/internal/repo/pack"
	"github.com/holdfast-backup/holdfast/internal/repo/sums"
)

const (
	// defaultPackBuffers is how many pack buffers a Writer has: one being filled for each type of blob,
	// one that waits to be hashed with the next, and three being hashed and uploaded, which keeps a disk busy during its syncs. With packs of
	// 16 MiB that bounds a Writer at 96 MiB; each goroutine in Save adds a chunk and its
	// compressed form and what that decompresses to (some MiB), and each blob in an open pack about 100 bytes.
	defaultPackBuffers = 6
	// pairBuffers is from how many buffers on a pack waits for another: two packs are hashed in two thirds of the time that they take one
	// after the other. With fewer too little would be under way.
	pairBuffers = 6
	// pairAfter is how many packs a Writer stores at once before one waits: what stores little would only end later.
	pairAfter = 4
	// maxPackBlobs keeps a pack's header (41 bytes a blob) well below the 16 MiB that readers take.
	maxPackBlobs = 200_000
	// maxBlob keeps every offset and length below 4 GiB, the limit of the format, in bytes.
	maxBlob = 1<<32 - 1<<20
)

// WriterStats counts what a Writer stored, by type of blob. Sizes are in bytes.
type WriterStats struct {
	NewBlobs    [2]int64
	PlainBytes  [2]int64
	StoredBytes [2]int64 // compressed and encrypted, with the entries in the packs' headers
}

type blobKey struct {
	t  BlobType
	id ID
}

// packer is the open pack of one type.
type packer struct {
	sem chan struct{} // a mutex that a context can interrupt
	w   *openPack     // nil: none open
}

// openPack is a pack that blobs are sealed into.
type openPack struct {
	*pack.Writer
	users atomic.Int32 // who seals into it, and one while it is open
}

// Writer stores blobs. It is safe for concurrent use. After an error that leaves a blob unstored,
// all its methods return that error: nothing may refer to what it did not store.
type Writer struct {
	r       *Repository
	ctx     context.Context
	packers [2]packer
	free    chan []byte // the pack buffers not in use; nil: not yet made

	mu       sync.Mutex
	inFlight map[blobKey]struct{} // guarded by mu: saved by this Writer, not yet in the index
	uploads  int                  // guarded by mu: packs that are closed and not yet durable, but for the one that waits
	changed  chan struct{}        // guarded by mu: closed and renewed when there is one less of them
	full     int                  // guarded by mu: packs so far
	waiting  *pack.Writer         // guarded by mu: a full pack that is stored together with the next
	err      error                // guarded by mu
	stats    WriterStats          // guarded by mu
}

// pendingPack is a durable pack that no index file names yet.
type pendingPack struct {
	id    ID
	blobs []pack.Entry
	since time.Time
}

// NewWriter returns a Writer. ctx bounds everything it does in the background. A Writer that is
// dropped without Flush leaves packs that no index names, which does no harm.
func (r *Repository) NewWriter(ctx context.Context) *Writer {
	w := &Writer{r: r, ctx: ctx, free: make(chan []byte, r.opts.PackBuffers), inFlight: map[blobKey]struct{}{}, changed: make(chan struct{})}
	for range r.opts.PackBuffers {
		w.free <- nil
	}
	for t := range w.packers {
		w.packers[t].sem = make(chan struct{}, 1)
	}
	return w
}

// Stats tells what was stored since NewWriter, also in packs that are not yet durable.
func (w *Writer) Stats() WriterStats {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stats
}

func (w *Writer) fail(err error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
	return w.err
}

func (w *Writer) failed() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// Save stores a blob unless it is there. It hashes, compresses and encrypts on the caller's goroutine,
// and waits while too many packs are on their way; data may be changed afterwards. The blob is
// durable only after Flush. isNew is true for one of several callers with the same content.
// Empty blobs do not exist in the format: that is an error.
func (w *Writer) Save(ctx context.Context, t BlobType, data []byte) (blob ID, isNew bool, err error) {
	blob = id.Hash(data)
	isNew, err = w.SaveAs(ctx, t, blob, data)
	if err != nil {
		blob = ID{}
	}
	return blob, isNew, err
}

// SaveAs is Save for a caller that knows the SHA-256 of data already. It is taken on trust: another one
// would make a repository that check calls damaged.
func (w *Writer) SaveAs(ctx context.Context, t BlobType, blob ID, data []byte) (isNew bool, err error) {
	return w.save(ctx, t, blob, data, false)
}

// save stores a blob. With again it does so although the blob is there, because that copy is to go.
func (w *Writer) save(ctx context.Context, t BlobType, blob ID, data []byte, again bool) (isNew bool, err error) {
	switch {
	case t > TreeBlob:
		return false, fmt.Errorf("save a blob: unknown type %d", t)
	case len(data) == 0:
		return false, fmt.Errorf("save a %v blob: it is empty, and empty blobs are never stored", t)
	case len(data) > maxBlob:
		return false, fmt.Errorf("save a %v blob of %d bytes: the format's limit is 4 GiB", t, len(data))
	}
	if err := ctx.Err(); err != nil {
		return false, fmt.Errorf("save a %v blob: %w", t, context.Cause(ctx))
	}
	if !again && w.r.Has(t, blob) {
		return false, w.failed()
	}
	key := blobKey{t, blob}
	w.mu.Lock()
	_, known := w.inFlight[key]
	// Once more: its pack may have moved from inFlight to the index since the first look.
	known = known || !again && w.r.Has(t, blob)
	err = w.err
	if !known && err == nil {
		w.inFlight[key] = struct{}{}
	}
	w.mu.Unlock()
	if err != nil {
		return false, err
	}
	if known {
		return false, nil
	}

	// Others may rely on this blob from here on, so whatever goes wrong spoils the Writer.
	plain := data
	var size uint32
	if w.r.conf.Version >= 2 {
		c := w.r.compressors.take()
		defer w.r.compressors.release(c)
		out, smaller, err := c.blob(data, w.r.opts.Compression, t)
		if err != nil {
			return false, w.fail(fmt.Errorf("save %v blob %s: %w", t, blob.Short(), err))
		}
		if smaller {
			plain, size = out, uint32(len(data))
		}
	}
	if err := w.add(ctx, t, blob, plain, size); err != nil {
		return false, w.fail(fmt.Errorf("save %v blob %s: %w", t, blob.Short(), err))
	}
	w.mu.Lock()
	w.stats.NewBlobs[t]++
	w.stats.PlainBytes[t] += int64(len(data))
	w.stats.StoredBytes[t] += int64(len(plain)) + crypto.Overhead + pack.EntrySize(size != 0)
	w.mu.Unlock()
	return true, nil
}

// add seals content into the open pack of its type. size is as in pack.Entry.
func (w *Writer) add(ctx context.Context, t BlobType, blob ID, content []byte, size uint32) error {
	p, n := &w.packers[t], len(content)+crypto.Overhead
	if err := p.lock(ctx, w.ctx); err != nil {
		return err
	}
	// Closed before it overflows, a pack keeps to its buffer; only a giant blob outgrows it, and is alone then: nobody
	// else seals into the buffer that is left behind.
	if p.w != nil && (p.w.Size()+int64(n)+41 > w.r.opts.PackSize || p.w.Count() >= maxPackBlobs) {
		w.close(p)
	}
	if p.w == nil {
		select {
		case buf := <-w.free:
			if buf == nil {
				buf = make([]byte, 0, w.r.opts.PackSize)
			}
			p.w = &openPack{Writer: pack.NewWriter(buf)}
			p.w.users.Store(1)
		case <-ctx.Done():
			p.unlock()
			return context.Cause(ctx)
		case <-w.ctx.Done():
			p.unlock()
			return context.Cause(w.ctx)
		}
	}
	o := p.w
	room := o.Reserve(t, blob, n, size)
	o.users.Add(1)
	if o.Size() >= w.r.opts.PackSize {
		w.close(p)
	}
	p.unlock()
	w.r.key.Seal(room[:0], content)
	w.leave(o)
	return nil
}

func (p *packer) lock(ctx, ctx2 context.Context) error {
	select {
	case p.sem <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-ctx2.Done():
		return context.Cause(ctx2)
	}
}

func (p *packer) unlock() { <-p.sem }

// close ends the open pack, which is stored when the last blob is sealed. The caller holds the lock of p.
func (w *Writer) close(p *packer) {
	o := p.w
	p.w = nil
	w.mu.Lock()
	w.uploads++
	w.mu.Unlock()
	w.leave(o)
}

// leave stores a pack in the background, perhaps together with the next, once it is closed and nobody seals into it any more. The number
// of buffers bounds how many are stored at a time.
func (w *Writer) leave(o *openPack) {
	if o.users.Add(-1) > 0 {
		return
	}
	packs := []*pack.Writer{o.Writer}
	w.mu.Lock()
	switch {
	case w.waiting != nil:
		packs = append(packs, w.waiting)
		w.waiting = nil
		w.uploads++
	case cap(w.free) >= pairBuffers && w.full >= pairAfter:
		w.waiting, packs = packs[0], nil
		w.ended()
	}
	w.full++
	w.mu.Unlock()
	w.store(packs)
}

// ended takes one from the uploads under way. The caller holds w.mu.
func (w *Writer) ended() {
	w.uploads--
	close(w.changed)
	w.changed = make(chan struct{})
}

// release stores the pack that waits for another. It returns how many are on their way, and what is closed when there is one
// less: both of the same moment, or the last one could begin to wait in between.
func (w *Writer) release() (left int, changed chan struct{}) {
	w.mu.Lock()
	var packs []*pack.Writer
	if w.waiting != nil {
		packs = append(packs, w.waiting)
		w.waiting = nil
		w.uploads++
	}
	left, changed = w.uploads, w.changed
	w.mu.Unlock()
	w.store(packs)
	return left, changed
}

// store stores two packs at most in the background. They count as uploads already.
func (w *Writer) store(packs []*pack.Writer) {
	switch len(packs) {
	case 1:
		go func() {
			file, blobs := packs[0].Finish(w.r.key)
			w.storeFile(id.Hash(file), file, blobs)
		}()
	case 2:
		go func() {
			a, blobsA := packs[0].Finish(w.r.key)
			b, blobsB := packs[1].Finish(w.r.key)
			nameA, nameB := sums.Pair(a, b)
			go w.storeFile(nameA, a, blobsA)
			w.storeFile(nameB, b, blobsB)
		}()
	}
}

// storeFile stores a pack under its name, enters it in the index, and gives its buffer back.
func (w *Writer) storeFile(name ID, file []byte, blobs []pack.Entry) {
	err := w.failed()
	if err == nil {
		err = w.r.be.Save(hint(w.ctx, blobs[0].Type), backend.Handle{Type: backend.PackFile, Name: name.String()}, file)
	}
	if err != nil { // before the buffer is free: who waits for one must not go on
		w.fail(fmt.Errorf("store a pack of %d blobs at %s: %w", len(blobs), w.r.be.Location(), err))
	}
	if cap(file) > int(w.r.opts.PackSize)+1<<20 {
		file = nil // outgrown by a giant blob
	}
	w.free <- file[:0:cap(file)]
	if err == nil {
		full := w.r.addPack(name, blobs)
		w.mu.Lock()
		for _, e := range blobs {
			delete(w.inFlight, blobKey{e.Type, e.ID})
		}
		w.mu.Unlock()
		if full {
			if err := w.r.saveIndex(w.ctx, false); err != nil {
				w.fail(err)
			}
		}
	}
	w.mu.Lock()
	w.ended()
	w.mu.Unlock()
}

// Flush returns once everything that was saved before is durable: first the packs, then the index
// files that name them. The Writer can go on afterwards. Saves that run meanwhile may miss it.
func (w *Writer) Flush(ctx context.Context) error {
	for t := range w.packers {
		p := &w.packers[t]
		if err := p.lock(ctx, w.ctx); err != nil {
			return w.flushError(err)
		}
		if p.w != nil {
			w.close(p)
		}
		p.unlock()
	}
	for {
		left, changed := w.release()
		if left == 0 {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return w.flushError(context.Cause(ctx))
		}
	}
	if err := w.failed(); err != nil {
		return w.flushError(err)
	}
	if err := w.r.saveIndex(ctx, true); err != nil {
		return w.flushError(err)
	}
	return nil
}

// wait returns when no upload is under way any more; their errors are kept in w.
func (w *Writer) wait() {
	for {
		w.mu.Lock()
		left, changed := w.uploads, w.changed
		w.mu.Unlock()
		if left == 0 {
			return
		}
		<-changed
	}
}

func (w *Writer) flushError(err error) error {
	// The first failure explains more than a wait that was cut short because of it.
	if first := w.failed(); first != nil && !errors.Is(err, first) {
		err = first
	}
	return fmt.Errorf("finish writing to the repository: %w", err)
}

// addPack enters a durable pack into the index in memory, and says whether it is time for an index file.
func (r *Repository) addPack(name ID, blobs []pack.Entry) (full bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	no, _ := r.idx.Pack(name)
	for _, e := range blobs {
		r.idx.Add(no, e)
	}
	r.pending = append(r.pending, pendingPack{name, blobs, r.clock.now()})
	r.pendingBlobs += len(blobs)
	return r.indexDue()
}

// indexDue tells whether an index file should be written now. The caller holds r.mu.
func (r *Repository) indexDue() bool {
	return r.pendingBlobs >= r.indexBlobs || (len(r.pending) > 0 && r.clock.now().Sub(r.pending[0].since) >= r.indexAge)
}

// saveIndex writes index files for the packs that have none: all of them, or those that are due.
//
// The list belongs to the Repository and not to a Writer, since the index in memory does too: when a Writer
// fails between a pack and its index file, the next Writer finds the pack's blobs present, so its
// Flush must see to their index file. For the same reason it waits for one that is being written.
func (r *Repository) saveIndex(ctx context.Context, all bool) error {
	select {
	case r.indexSem <- struct{}{}:
		defer func() { <-r.indexSem }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	for {
		r.mu.Lock()
		if len(r.pending) == 0 || !(all || r.indexDue()) {
			r.mu.Unlock()
			return nil
		}
		n, blobs := 0, 0
		for n < len(r.pending) && blobs < r.indexBlobs { // whole packs only
			blobs += len(r.pending[n].blobs)
			n++
		}
		batch := r.pending[:n:n]
		r.mu.Unlock()

		text := append(make([]byte, 0, 64+blobs*190), index.Header...)
		for i, p := range batch {
			if i > 0 {
				text = append(text, ',')
			}
			text = index.AppendPack(text, p.id, p.blobs)
		}
		text = append(text, index.Footer...)
		if _, err := r.SaveUnpacked(ctx, backend.IndexFile, text); err != nil {
			r.mu.Lock()
			r.indexDoubt = true
			r.mu.Unlock()
			return fmt.Errorf("store an index file at %s: %w", r.be.Location(), err)
		}
		r.mu.Lock()
		r.pending = append([]pendingPack(nil), r.pending[n:]...)
		r.pendingBlobs -= blobs
		r.mu.Unlock()
	}
}
