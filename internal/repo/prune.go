package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo/index"
	"github.com/holdfast-backup/holdfast/internal/repo/pack"
	"golang.org/x/sync/errgroup"
)

// PruneOptions of PlanPrune. The zero value works.
type PruneOptions struct {
	// MaxUnused returns how many bytes that nobody needs may stay in packs beside what is needed,
	// given how many bytes are needed. Nil: 5 % of what the repository then has.
	MaxUnused func(used int64) int64
	// LimitRepack bounds the size of the packs that are packed again to MaxRepack bytes.
	LimitRepack bool
	MaxRepack   int64
	Progress    progress.Sink
}

// UnusedPercent is a MaxUnused: percent of the size of the repository after the prune.
func UnusedPercent(percent float64) func(int64) int64 {
	return func(used int64) int64 { return int64(percent / (100 - percent) * float64(used)) }
}

const (
	defaultUnused = 5 // percent
	// minSmallPacks is how many small packs there must be before they are joined: each backup adds two.
	minSmallPacks = 10
	// minSmallIndexes is the same for index files.
	minSmallIndexes = 8
	// repackBatch is how many blobs are read and stored at a time: 0.5 MB of ids.
	repackBatch = 16 << 10
	// maxMissing is how many missing blobs are named.
	maxMissing = 20
)

// Amount counts things and their stored size in bytes.
type Amount struct {
	Count int64 `json:"count"`
	Bytes int64 `json:"bytes"`
}

func (a *Amount) add(bytes int64) { a.Count++; a.Bytes += bytes }

// PruneStats is what a plan comes to.
type PruneStats struct {
	// Blobs: needed, further copies of needed ones, and not needed.
	Used      Amount `json:"used"`
	Duplicate Amount `json:"duplicate"`
	Unused    Amount `json:"unused"`
	// Packs: left alone; packed again and then removed; removed at once; removed because no index names them.
	Keep     Amount `json:"keep"`
	Repack   Amount `json:"repack"`
	Remove   Amount `json:"remove"`
	Unlisted Amount `json:"unlisted"`
	// RepackUsed is what is kept of the packs that are packed again.
	RepackUsed Amount `json:"repack_used"`
	// Missing packs are named by an index, are not there, and hold nothing that is needed.
	Missing int64 `json:"missing"`
	// Freed is what the repository will be smaller by, in bytes, leaving the index aside.
	Freed int64 `json:"freed"`
	// UnusedAfter is what stays in packs without being needed, in bytes.
	UnusedAfter int64 `json:"unused_after"`
	// IndexFiles are rewritten.
	IndexFiles int64 `json:"index_files"`
}

// MissingBlobsError says that something snapshots need is not there. Nothing was changed.
type MissingBlobsError struct {
	Location string
	// Blobs are the first of Count blobs that no index names; Packs those packs that are missing or have a
	// wrong size while a needed blob is in no other one.
	Blobs []BlobRef
	Count int64
	Packs []ID
}

func (e *MissingBlobsError) Error() string {
	s := "the repository at " + e.Location + " lacks data that snapshots need, so nothing is removed: "
	if e.Count > 0 {
		s += fmt.Sprintf("%d blobs are in no index, the first is %v %s", e.Count, e.Blobs[0].Type, e.Blobs[0].ID.Short())
	}
	if n := len(e.Packs); n > 0 {
		if e.Count > 0 {
			s += "; "
		}
		s += fmt.Sprintf("%d packs are missing or have a wrong size, the first is %s", n, e.Packs[0].Short())
	}
	return s
}

// bitset is a set of entry numbers that many goroutines may add to.
type bitset []uint32

func newBitset(n int) bitset { return make(bitset, (n+31)/32) }

// set adds n and reports whether it is new.
func (b bitset) set(n uint32) bool {
	m := uint32(1) << (n % 32)
	return atomic.OrUint32(&b[n/32], m)&m == 0
}

func (b bitset) has(n uint32) bool { return atomic.LoadUint32(&b[n/32])&(1<<(n%32)) != 0 }

// fate is what becomes of a pack.
type fate uint8

const (
	keepPack fate = iota
	repackPack
	removePack
)

// prunePack is what is known of a pack: 56 bytes each. Sizes are in bytes, stored, with header entries.
type prunePack struct {
	file               int64 // as the backend says; -1: it is not there
	size               int64 // by the index
	used, unused, dup  int64
	usedBlobs, entries uint32
	types              [2]bool
	fate               fate
	split              bool // several index files name different parts of it
}

func (p *prunePack) ok() bool    { return p.file == p.size+pack.FooterSize(nil) }
func (p *prunePack) mixed() bool { return p.types[DataBlob] && p.types[TreeBlob] }

// pruneIndex is an index file: 4 bytes for each of its packs.
type pruneIndex struct {
	id      ID
	packs   []uint32
	blobs   int
	rewrite bool
}

// PrunePlan says what Execute will do. Memory: the index, two bits a blob and 60 bytes a pack; while the packs are
// listed, about 100 bytes a pack more.
type PrunePlan struct {
	Stats PruneStats

	r        *Repository
	o        PruneOptions
	x        *index.Index
	total    [2]uint32 // entries, without those that Execute adds
	packs    []prunePack
	files    []*pruneIndex
	unlisted []ID
	used     [2]bitset // first entry of each needed blob
	keep     [2]bitset // the entry of each needed blob that stays
}

// PlanPrune finds out what nobody needs. It reads the index anew and then calls used, which must call mark for
// every blob that is needed; mark reports whether the blob is there and was not marked before, and may be called
// concurrently. While used runs, blobs can be loaded. Nothing is changed. No Writer of r may be at work.
// Errors: *MissingBlobsError.
func (r *Repository) PlanPrune(ctx context.Context, o PruneOptions, used func(ctx context.Context, mark func(BlobType, ID) bool) error) (*PrunePlan, error) {
	if o.MaxUnused == nil {
		o.MaxUnused = UnusedPercent(defaultUnused)
	}
	p := &PrunePlan{r: r, o: o, x: r.newIndex()}
	if err := p.load(ctx); err != nil {
		return nil, fmt.Errorf("plan a prune of the repository at %s: %w", r.be.Location(), err)
	}
	for t := range p.used {
		p.total[t] = uint32(p.x.Len(BlobType(t)))
		p.used[t], p.keep[t] = newBitset(int(p.total[t])), newBitset(int(p.total[t]))
	}
	missing := &MissingBlobsError{Location: r.be.Location()}
	var mu sync.Mutex
	lost := map[BlobRef]bool{}
	err := used(ctx, func(t BlobType, d ID) bool {
		r.mu.RLock()
		no, ok := p.x.Find(t, d)
		r.mu.RUnlock()
		if ok {
			return p.used[t].set(no)
		}
		mu.Lock()
		defer mu.Unlock()
		ref := BlobRef{t, d}
		if len(lost) < maxMissing && !lost[ref] {
			lost[ref] = true
			missing.Blobs = append(missing.Blobs, ref)
		}
		missing.Count++
		return false
	})
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("find out what snapshots need: %w", err)
	}
	p.count()
	p.settleCopies()
	for no := range p.packs {
		if k := &p.packs[no]; k.used > 0 && !k.ok() {
			missing.Packs = append(missing.Packs, p.x.PackID(uint32(no)))
		}
	}
	if missing.Count > 0 || len(missing.Packs) > 0 {
		return nil, missing
	}
	p.choose()
	p.chooseIndexes()
	return p, nil
}

// load lists the packs and then reads the index, so that a pack that was finished meanwhile is not
// taken for one that no index names.
func (p *PrunePlan) load(ctx context.Context) error {
	sizes := map[ID]int64{}
	if err := p.r.ListFiles(ctx, backend.PackFile, func(d ID, size int64) error { sizes[d] = size; return nil }); err != nil {
		return err
	}
	var mu sync.Mutex
	files := map[ID]*pruneIndex{}
	list, err := p.r.indexFiles(ctx)
	if err != nil {
		return err
	}
	err = p.r.eachIndex(ctx, list, func(file, d ID, blobs []pack.Entry) error {
		mu.Lock()
		defer mu.Unlock()
		f := files[file]
		if f == nil {
			f = &pruneIndex{id: file}
			files[file] = f
		}
		no, isNew := p.x.Pack(d)
		if isNew {
			k := prunePack{file: -1}
			if size, ok := sizes[d]; ok {
				k.file = size
			}
			p.packs = append(p.packs, k)
		}
		if len(blobs) > 0 { // a file that lists nothing of a pack does not name it
			f.packs = append(f.packs, no)
		}
		f.blobs += len(blobs)
		for _, e := range blobs {
			if p.x.Add(no, e) && !isNew {
				p.packs[no].split = true
			}
		}
		return nil
	}, nil)
	if err != nil {
		return fmt.Errorf("read the index: %w", err)
	}
	// Files without any pack are in the way as well.
	if err := p.r.ListFiles(ctx, backend.IndexFile, func(d ID, _ int64) error {
		if files[d] == nil {
			files[d] = &pruneIndex{id: d}
		}
		return nil
	}); err != nil {
		return err
	}
	for _, f := range files {
		p.files = append(p.files, f)
	}
	slices.SortFunc(p.files, func(a, b *pruneIndex) int { return slices.Compare(a.id[:], b.id[:]) })
	for d, size := range sizes {
		if !p.x.HasPack(d) {
			p.unlisted = append(p.unlisted, d)
			p.Stats.Unlisted.add(size)
		}
	}
	slices.SortFunc(p.unlisted, func(a, b ID) int { return slices.Compare(a[:], b[:]) })
	p.r.mu.Lock()
	// Packs that a failed Writer left are unlisted, too: nobody may name them any more.
	p.r.idx, p.r.pending, p.r.pendingBlobs = p.x, nil, 0
	p.r.mu.Unlock()
	return nil
}

func storedSize(e pack.Entry) int64 { return int64(e.Length) + pack.EntrySize(e.Plain != 0) }

// entries yields the entries that there were when the plan was made, by type and number.
func (p *PrunePlan) entries() iter.Seq2[uint32, BlobType] {
	return func(yield func(uint32, BlobType) bool) {
		for t, n := range p.total {
			for no := range n {
				if !yield(no, BlobType(t)) {
					return
				}
			}
		}
	}
}

// copies tells the first entry of a blob and whether there are others.
func (p *PrunePlan) copies(t BlobType, d ID) (first uint32, several bool) {
	n := 0
	for no := range p.x.Numbers(t, d) {
		if n++; n > 1 {
			return first, true
		}
		first = no
	}
	return first, false
}

// count adds up what is in each pack. Which copy of a blob stays is open yet.
func (p *PrunePlan) count() {
	for no, t := range p.entries() {
		packNo, e := p.x.At(t, no)
		k := &p.packs[packNo]
		size := storedSize(e)
		k.size += size
		k.entries++
		k.types[t] = true
		first, several := p.copies(t, e.ID)
		switch {
		case !p.used[t].has(first):
			k.unused += size
			p.Stats.Unused.add(size)
		case several:
			k.dup += size
		default:
			k.used += size
			k.usedBlobs++
			p.keep[t].set(no)
			p.Stats.Used.add(size)
		}
	}
}

// settleCopies picks one copy of each needed blob, so that as few packs as possible must be packed again: best
// in one without anything useless, then in one that is needed anyway.
func (p *PrunePlan) settleCopies() {
	rank := func(k *prunePack) int {
		switch {
		case !k.ok():
			return 0
		case k.unused == 0 && k.used > 0:
			return 4
		case k.unused == 0:
			return 3
		case k.used > 0:
			return 2
		}
		return 1
	}
	for no, t := range p.entries() {
		_, e := p.x.At(t, no)
		first, several := p.copies(t, e.ID)
		if !several || first != no || !p.used[t].has(no) {
			continue
		}
		best, bestRank := no, -1
		for c := range p.x.Numbers(t, e.ID) {
			packNo, _ := p.x.At(t, c)
			if r := rank(&p.packs[packNo]); r > bestRank {
				best, bestRank = c, r
			}
		}
		p.keep[t].set(best)
		for c := range p.x.Numbers(t, e.ID) {
			packNo, ce := p.x.At(t, c)
			k, size := &p.packs[packNo], storedSize(ce)
			k.dup -= size
			if c == best {
				k.used += size
				k.usedBlobs++
				p.Stats.Used.add(size)
			} else {
				k.unused += size
				p.Stats.Duplicate.add(size)
			}
		}
	}
}

// choose decides the fate of each pack.
func (p *PrunePlan) choose() {
	small := func(k *prunePack) bool { return k.file < p.r.opts.PackSize/4 }
	var smalls [2]int
	for i := range p.packs {
		if k := &p.packs[i]; k.used > 0 && !k.mixed() && small(k) {
			smalls[b2i(k.types[TreeBlob])]++
		}
	}
	join := func(k *prunePack) bool { return small(k) && smalls[b2i(k.types[TreeBlob])] >= minSmallPacks }
	var candidates []uint32
	var unusedAfter int64
	for i := range p.packs {
		k := &p.packs[i]
		switch {
		case k.used == 0:
			k.fate = removePack
			if k.file < 0 {
				p.Stats.Missing++
				continue
			}
			p.Stats.Remove.add(k.file)
		case k.unused > 0 || k.mixed() || join(k):
			unusedAfter += k.unused
			candidates = append(candidates, uint32(i))
		default:
			p.Stats.Keep.add(k.file)
		}
	}
	// What must be packed again comes first, then what is worst.
	must := func(k *prunePack) bool { return k.types[TreeBlob] || join(k) }
	slices.SortStableFunc(candidates, func(a, b uint32) int {
		x, y := &p.packs[a], &p.packs[b]
		if d := cmp.Compare(b2i(must(y)), b2i(must(x))); d != 0 {
			return d
		}
		return cmp.Compare(float64(y.unused)/float64(y.size), float64(x.unused)/float64(x.size))
	})
	allowed := p.o.MaxUnused(p.Stats.Used.Bytes)
	for _, no := range candidates {
		k := &p.packs[no]
		full := p.o.LimitRepack && p.Stats.Repack.Bytes+k.file > p.o.MaxRepack
		if full || !must(k) && unusedAfter <= allowed {
			p.Stats.Keep.add(k.file)
			continue
		}
		k.fate = repackPack
		unusedAfter -= k.unused
		p.Stats.Repack.add(k.file)
		p.Stats.RepackUsed.Count += int64(k.usedBlobs)
		p.Stats.RepackUsed.Bytes += k.used
	}
	p.Stats.UnusedAfter = unusedAfter
	p.Stats.Freed = p.Stats.Remove.Bytes + p.Stats.Unlisted.Bytes + p.Stats.Repack.Bytes - p.Stats.RepackUsed.Bytes
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// chooseIndexes decides which index files are written anew: those that name a pack that goes, or one that another
// file names as well; and with them all that are not full.
func (p *PrunePlan) chooseIndexes() {
	seen := newBitset(len(p.packs))
	smalls := 0
	some := false
	for _, f := range p.files {
		f.rewrite = f.blobs == 0
		for _, no := range f.packs {
			if p.packs[no].fate != keepPack || !seen.set(no) {
				f.rewrite = true
			}
		}
		some = some || f.rewrite
		if f.blobs < p.r.indexBlobs {
			smalls++
		}
	}
	// A pack that two files name must lose both names and get one again.
	twice := newBitset(len(p.packs))
	for _, f := range p.files {
		if f.rewrite {
			for _, no := range f.packs {
				twice.set(no)
			}
		}
	}
	for _, f := range p.files {
		if f.blobs < p.r.indexBlobs && (some || smalls >= minSmallIndexes) {
			f.rewrite = true
		}
		if !f.rewrite && slices.ContainsFunc(f.packs, func(no uint32) bool { return p.packs[no].split && twice.has(no) }) {
			f.rewrite = true
		}
		if f.rewrite {
			p.Stats.IndexFiles++
		}
	}
}

// Nothing reports whether there is nothing to do.
func (p *PrunePlan) Nothing() bool {
	s := &p.Stats
	return s.Repack.Count == 0 && s.Remove.Count == 0 && s.Unlisted.Count == 0 && s.IndexFiles == 0
}

// Execute does what the plan says. The repository must have been locked exclusively since before the plan was made.
//
// Whenever it stops, the repository is whole, and another prune does the rest: what is kept is stored anew and
// indexed before anything that was there is taken away, and no pack goes before the index that names it.
// Afterwards the index is loaded afresh. Errors: ErrNotExclusive, ErrNoRemoval.
func (p *PrunePlan) Execute(ctx context.Context) error {
	if err := p.execute(ctx); err != nil {
		return fmt.Errorf("prune the repository at %s: %w", p.r.be.Location(), err)
	}
	return nil
}

func (p *PrunePlan) execute(ctx context.Context) error {
	if err := p.r.confirmExclusive(ctx); err != nil {
		return err
	}
	if p.Nothing() {
		return nil
	}
	if err := p.r.CanRemove(ctx, backend.IndexFile); err != nil {
		return err
	}
	// First, as it needs no room and makes some.
	if err := p.removePacks(ctx, p.unlisted); err != nil {
		return err
	}
	if err := p.repack(ctx); err != nil {
		return err
	}
	if err := p.rewriteIndex(ctx); err != nil {
		return err
	}
	var gone []ID
	for no := range p.packs {
		if k := &p.packs[no]; k.fate != keepPack && k.file >= 0 {
			gone = append(gone, p.x.PackID(uint32(no)))
		}
	}
	if err := p.removePacks(ctx, gone); err != nil {
		return err
	}
	return p.r.LoadIndex(ctx)
}

func (p *PrunePlan) event(what string, total int64, unit string) progress.Event {
	ev := progress.Event{Kind: progress.Start, Phase: what, Unit: unit, Total: total}
	p.o.Progress.Emit(ev)
	return ev
}

func (p *PrunePlan) finish(ev progress.Event) {
	ev.Kind, ev.Done = progress.Finish, ev.Total
	p.o.Progress.Emit(ev)
}

// repack stores what is kept of some packs in new ones.
func (p *PrunePlan) repack(ctx context.Context) (err error) {
	if p.Stats.Repack.Count == 0 {
		return nil
	}
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w := p.r.NewWriter(wctx)
	defer func() {
		if err != nil && ctx.Err() == nil {
			cancel()
			err = p.undo(ctx, w, err)
		}
	}()
	ev := p.event("repack", p.Stats.RepackUsed.Count, "blobs")
	var done atomic.Int64
	for t := range p.total {
		t := BlobType(t)
		var batch []ID
		flush := func() error {
			err := p.r.LoadBlobs(ctx, t, batch, func(d ID, data []byte) error {
				if _, err := w.save(ctx, t, d, data, true); err != nil {
					return err
				}
				e := ev
				e.Kind, e.Done = progress.Update, done.Add(1)
				p.o.Progress.Emit(e)
				return nil
			})
			batch = batch[:0]
			return err
		}
		for no := range p.total[t] {
			if !p.keep[t].has(no) {
				continue
			}
			p.r.mu.RLock()
			packNo, e := p.x.At(t, no)
			p.r.mu.RUnlock()
			if p.packs[packNo].fate != repackPack {
				continue
			}
			if batch = append(batch, e.ID); len(batch) == repackBatch {
				if err := flush(); err != nil {
					return err
				}
			}
		}
		if err := flush(); err != nil {
			return err
		}
	}
	if err := w.Flush(ctx); err != nil {
		return err
	}
	p.finish(ev)
	return nil
}

// undo takes away the new packs that no index names after a failed repack: if the disk is full, they should not
// fill it until the next prune.
func (p *PrunePlan) undo(ctx context.Context, w *Writer, cause error) error {
	w.wait()
	p.r.mu.Lock()
	pending, doubt := p.r.pending, p.r.indexDoubt
	p.r.pending, p.r.pendingBlobs = nil, 0
	p.r.mu.Unlock()
	if doubt { // an index file may name them after all
		return cause
	}
	for _, k := range pending {
		if err := p.r.be.Remove(ctx, packHandle(k.id)); err != nil && !errors.Is(err, backend.ErrNotExist) {
			return fmt.Errorf("%w; %d new packs are left for the next prune: %w", cause, len(pending), err)
		}
	}
	if err := p.r.LoadIndex(ctx); err != nil { // the one in memory names them
		return fmt.Errorf("%w; %w", cause, err)
	}
	return cause
}

// rewriteIndex stores new index files without the packs that go, and then removes the old ones.
func (p *PrunePlan) rewriteIndex(ctx context.Context) error {
	if p.Stats.IndexFiles == 0 {
		return nil
	}
	ev := p.event("index", p.Stats.IndexFiles, "files")
	var text []byte
	blobs := 0
	add := func(d ID, entries []pack.Entry) {
		if blobs == 0 {
			text = append(text[:0], index.Header...)
		} else {
			text = append(text, ',')
		}
		text = index.AppendPack(text, d, entries)
		blobs += len(entries)
	}
	save := func(least int) error {
		if blobs < max(least, 1) {
			return nil
		}
		text = append(text, index.Footer...)
		if _, err := p.r.SaveUnpacked(ctx, backend.IndexFile, text); err != nil {
			return fmt.Errorf("store a new index file: %w", err)
		}
		blobs = 0
		return nil
	}
	written := newBitset(len(p.packs))
	for _, f := range p.files { // what stays, stays named
		if !f.rewrite {
			for _, no := range f.packs {
				if !p.packs[no].split {
					written.set(no)
				}
			}
		}
	}
	for _, f := range p.files {
		if !f.rewrite || f.blobs == 0 {
			continue
		}
		data, err := p.r.LoadUnpacked(ctx, backend.IndexFile, f.id)
		if err != nil {
			return err
		}
		err = index.Decode(data, func(d ID, entries []pack.Entry) error {
			no, isNew := p.x.Pack(d)
			if len(entries) == 0 { // another file may name the pack with its blobs
				return nil
			}
			if isNew || p.packs[no].fate != keepPack || p.packs[no].split || !written.set(no) {
				return nil
			}
			add(d, entries)
			return save(p.r.indexBlobs)
		})
		if err != nil {
			return fmt.Errorf("index/%v: %w", f.id, err)
		}
		ev.Kind, ev.Done = progress.Update, ev.Done+1
		p.o.Progress.Emit(ev)
	}
	for no, entries := range p.splitPacks() {
		if !written.has(no) {
			add(p.x.PackID(no), entries)
			if err := save(p.r.indexBlobs); err != nil {
				return err
			}
		}
	}
	if err := save(0); err != nil {
		return err
	}
	// From here on things go away.
	if err := p.r.confirmExclusive(ctx); err != nil {
		return err
	}
	for _, f := range p.files {
		if f.rewrite {
			if err := p.r.RemoveUnpacked(ctx, backend.IndexFile, f.id); err != nil && !errors.Is(err, backend.ErrNotExist) {
				return fmt.Errorf("remove an old index file: %w", err)
			}
		}
	}
	p.finish(ev)
	return nil
}

// splitPacks collects the entries of packs that stay and that no single index file describes whole.
func (p *PrunePlan) splitPacks() map[uint32][]pack.Entry {
	if !slices.ContainsFunc(p.packs, func(k prunePack) bool { return k.split && k.fate == keepPack }) {
		return nil
	}
	m := map[uint32][]pack.Entry{}
	p.r.mu.RLock()
	defer p.r.mu.RUnlock()
	for no, t := range p.entries() {
		packNo, e := p.x.At(t, no)
		if k := &p.packs[packNo]; k.split && k.fate == keepPack {
			m[packNo] = append(m[packNo], e)
		}
	}
	for _, entries := range m {
		slices.SortFunc(entries, func(a, b pack.Entry) int { return cmp.Compare(a.Offset, b.Offset) })
	}
	return m
}

// removePacks deletes packs that no index names. It goes on after an error, as the rest is of no use either.
func (p *PrunePlan) removePacks(ctx context.Context, list []ID) error {
	if len(list) == 0 {
		return nil
	}
	if err := p.r.confirmExclusive(ctx); err != nil {
		return err
	}
	ev := p.event("remove", int64(len(list)), "packs")
	var done, failed atomic.Int64
	var first error
	var once sync.Once
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(p.r.opts.Readers)
	for _, d := range list {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			if gctx.Err() != nil {
				return context.Cause(gctx)
			}
			err := p.r.be.Remove(gctx, packHandle(d))
			if err != nil && !errors.Is(err, backend.ErrNotExist) {
				if gctx.Err() != nil {
					return context.Cause(gctx)
				}
				failed.Add(1)
				once.Do(func() { first = err })
				return nil
			}
			e := ev
			e.Kind, e.Done = progress.Update, done.Add(1)
			p.o.Progress.Emit(e)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if n := failed.Load(); n > 0 {
		return fmt.Errorf("%d of %d packs that nothing needs any more could not be removed; the next prune tries again: %w", n, len(list), first)
	}
	p.finish(ev)
	return nil
}
