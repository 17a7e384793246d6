package repo

import (
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo/index"
	"github.com/holdfast-backup/holdfast/internal/repo/pack"
	"golang.org/x/sync/errgroup"
)

// CheckOptions of Repository.Check.
type CheckOptions struct {
	// ReadData reads and verifies every byte of every pack, not only sizes and lists.
	ReadData bool
	Progress progress.Sink
}

// Problem is the kind of a finding of Check.
type Problem uint8

// The kinds of findings. Hints are no loss of data.
const (
	IndexDamaged  Problem = iota + 1 // an index file cannot be read: nothing can be stored or restored
	IndexWrong                       // an index file describes a pack in an impossible way
	PackMissing                      // an index names a pack that is not there
	PackSize                         // a pack has not the size that follows from the index
	PackDamaged                      // a pack's bytes are not what its name, header or blobs' IDs say
	PackUnlisted                     // hint: no index names a pack, as after an interrupted backup
	PackInIndexes                    // hint: several index files name a pack, in the same way
	PackMixed                        // hint: a pack holds both data and trees
)

func (p Problem) String() string {
	return [...]string{"", "index-damaged", "index-wrong", "pack-missing", "pack-size", "pack-damaged",
		"pack-unlisted", "pack-in-several-indexes", "pack-mixed"}[p]
}

// BlobRef names a blob.
type BlobRef struct {
	Type BlobType
	ID   ID
}

// CheckError is a finding of Check.
type CheckError struct {
	Problem Problem
	File    backend.Handle
	// Blobs that are lost or in doubt because of it. Copies in other packs may still be good.
	Blobs []BlobRef
	Err   error
}

// Hint reports whether nothing is lost and nothing need be done.
func (e *CheckError) Hint() bool { return e.Problem >= PackUnlisted }

func (e *CheckError) Error() string {
	s := fmt.Sprintf("%v: %v", e.File, e.Err)
	if n := len(e.Blobs); n > 0 {
		s += fmt.Sprintf(" (%d blobs hit", n)
		for i, b := range e.Blobs {
			if i == 3 {
				s += ", ..."
				break
			}
			s += fmt.Sprintf(", %v %s", b.Type, b.ID.Short())
		}
		s += ")"
	}
	return s
}

func (e *CheckError) Unwrap() error { return e.Err }

// IsHint reports whether err is a finding that means no harm.
func IsHint(err error) bool {
	var ce *CheckError
	return errors.As(err, &ce) && ce.Hint()
}

// packState is what the index files say of a pack.
type packState struct {
	first ID // the index file that named it first
	blobs int
	size  int64
	types [2]bool
	seen  bool // in the backend
}

type checker struct {
	r  *Repository
	o  CheckOptions
	mu sync.Mutex

	report func(error) // guarded by mu, as are the fields below while index files are read
	x      *index.Index
	state  []packState // by pack number
}

func (c *checker) found(p Problem, h backend.Handle, blobs []BlobRef, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report(&CheckError{Problem: p, File: h, Blobs: blobs, Err: err})
}

func packHandle(p ID) backend.Handle { return backend.Handle{Type: backend.PackFile, Name: p.String()} }

// Check compares the index files with the packs that are there, and with ReadData reads all packs. It
// hands each finding, a *CheckError, to report, one at a time, and returns an error only if it could not
// finish. It reads the index files itself and does not need LoadIndex.
func (r *Repository) Check(ctx context.Context, o CheckOptions, report func(error)) error {
	c := &checker{r: r, o: o, report: report, x: r.newIndex()}
	files, err := r.indexFiles(ctx)
	if err != nil {
		return err
	}
	err = r.eachIndex(ctx, files, c.addPack, func(file ID, err error) error {
		c.found(IndexDamaged, backend.Handle{Type: backend.IndexFile, Name: file.String()}, nil, err)
		return nil
	})
	if err != nil {
		return fmt.Errorf("check the index: %w", err)
	}
	sizes, err := c.comparePacks(ctx)
	if err != nil {
		return fmt.Errorf("check the packs: %w", err)
	}
	if !o.ReadData {
		return nil
	}
	if err := c.readPacks(ctx, sizes); err != nil {
		return fmt.Errorf("read the packs: %w", err)
	}
	return nil
}

// addPack takes over what an index file says of a pack.
func (c *checker) addPack(file, p ID, blobs []pack.Entry) error {
	blobs = slices.Clone(blobs)
	slices.SortFunc(blobs, func(a, b pack.Entry) int { return cmp.Compare(a.Offset, b.Offset) })
	var end int64
	gap := false
	for _, e := range blobs {
		gap = gap || int64(e.Offset) != end
		end = e.End()
	}
	h := backend.Handle{Type: backend.IndexFile, Name: file.String()}
	if gap {
		c.found(IndexWrong, h, nil, fmt.Errorf("the blobs of pack %s overlap or leave gaps", p.Short()))
	}
	c.mu.Lock()
	no, isNew := c.x.Pack(p)
	if isNew {
		c.state = append(c.state, packState{first: file})
	}
	st := &c.state[no]
	added := 0
	for _, e := range blobs {
		if c.x.Add(no, e) {
			added++
			st.blobs++
			st.size += int64(e.Length) + pack.EntrySize(e.Plain != 0)
			st.types[e.Type] = true
		}
	}
	first, total := st.first, st.blobs
	c.mu.Unlock()
	switch {
	case isNew:
	case added == 0 && total == len(blobs):
		c.found(PackInIndexes, packHandle(p), nil, fmt.Errorf("index files %s and %s both name it", first.Short(), file.Short()))
	default:
		c.found(IndexWrong, h, nil, fmt.Errorf("it tells other blobs of pack %s than index file %s does", p.Short(), first.Short()))
	}
	return nil
}

// comparePacks returns the sizes of the packs that are worth reading, by number; -1 for others.
func (c *checker) comparePacks(ctx context.Context) ([]int64, error) {
	sizes := make([]int64, len(c.state))
	err := c.r.ListFiles(ctx, backend.PackFile, func(p ID, size int64) error {
		no, isNew := c.x.Pack(p)
		if isNew {
			c.state = append(c.state, packState{seen: true})
			sizes = append(sizes, -1)
			c.found(PackUnlisted, packHandle(p), nil, errors.New("no index names it: left by an interrupted backup, or being written just now; prune removes it"))
			return nil
		}
		st := &c.state[no]
		st.seen = true
		sizes[no] = size
		return nil
	})
	if err != nil {
		return nil, err
	}
	bad := map[uint32]bool{}
	for no := range c.state {
		st := &c.state[no]
		if st.blobs == 0 {
			continue
		}
		if !st.seen || sizes[no] != st.fileSize() {
			bad[uint32(no)] = true
		}
		if st.types == [2]bool{true, true} {
			c.found(PackMixed, packHandle(c.x.PackID(uint32(no))), nil, errors.New("it holds both data and trees"))
		}
	}
	for no, blobs := range c.blobsOf(bad) {
		h, st := packHandle(c.x.PackID(no)), &c.state[no]
		if !st.seen {
			sizes[no] = -1
			c.found(PackMissing, h, blobs, errors.New("the pack is missing"))
		} else {
			c.found(PackSize, h, blobs, fmt.Errorf("the pack has %d bytes, by the index it should have %d", sizes[no], st.fileSize()))
		}
	}
	return sizes, ctx.Err()
}

func (s *packState) fileSize() int64 { return s.size + pack.FooterSize(nil) }

// blobsOf finds the blobs of some packs.
func (c *checker) blobsOf(packs map[uint32]bool) map[uint32][]BlobRef {
	if len(packs) == 0 {
		return nil
	}
	m := map[uint32][]BlobRef{}
	for no, e := range c.x.All() {
		if packs[no] {
			m[no] = append(m[no], BlobRef{e.Type, e.ID})
		}
	}
	return m
}

// readPacks verifies the contents of all packs that are there.
func (c *checker) readPacks(ctx context.Context, sizes []int64) error {
	var packs, bytes, done, doneBytes int64
	for no, size := range sizes {
		if size >= 0 && c.state[no].blobs > 0 {
			packs++
			bytes += size
		}
	}
	ev := progress.Event{Kind: progress.Start, Phase: "check", Unit: "packs", Total: packs, TotalBytes: bytes}
	c.o.Progress.Emit(ev)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(c.r.opts.Readers)
	for no, size := range sizes {
		if size < 0 || c.state[no].blobs == 0 {
			continue
		}
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			if err := c.readPack(gctx, uint32(no), size); err != nil {
				return err
			}
			e := ev
			e.Kind, e.Done, e.Bytes = progress.Update, atomic.AddInt64(&done, 1), atomic.AddInt64(&doneBytes, size)
			c.o.Progress.Emit(e)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	ev.Kind, ev.Done, ev.Bytes = progress.Finish, packs, bytes
	c.o.Progress.Emit(ev)
	return nil
}

// readPack reads a pack, and if something is wrong once more, so that only damage that stays is reported.
func (c *checker) readPack(ctx context.Context, no uint32, size int64) error {
	for try := 0; ; try++ {
		blobs, err := c.verifyPack(ctx, no, size)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var de *damageError
		if try == 0 && errors.As(err, &de) {
			continue
		}
		if blobs == nil { // the whole pack is in doubt
			blobs = c.blobsOf(map[uint32]bool{no: true})[no]
		}
		c.found(PackDamaged, packHandle(c.x.PackID(no)), blobs, err)
		return nil
	}
}

// verifyPack returns what is wrong with a pack, and the damaged blobs if it could tell them apart.
// Memory: one blob, sealed and plain, besides the header.
func (c *checker) verifyPack(ctx context.Context, no uint32, size int64) ([]BlobRef, error) {
	p := c.x.PackID(no)
	entries, err := c.r.packHeader(ctx, p, size)
	if err != nil {
		return nil, err
	}
	var errs []error
	if len(entries) != c.state[no].blobs {
		errs = append(errs, fmt.Errorf("the header lists %d blobs, the index %d", len(entries), c.state[no].blobs))
	}
	var blobs []BlobRef
	for _, e := range entries {
		if !c.indexed(no, e) {
			errs = append(errs, fmt.Errorf("%v blob %s of the header is not so in the index", e.Type, e.ID.Short()))
		}
	}
	var streamed []error
	err = c.r.be.Load(ctx, packHandle(p), 0, 0, func(rd io.Reader) error {
		streamed, blobs = nil, nil // it may be called again
		sum := sha256.New()
		br := packReaders.Get().(*bufio.Reader)
		defer packReaders.Put(br)
		br.Reset(io.TeeReader(rd, sum))
		sealed, plain := getBuffer(0), getBuffer(0)
		defer func() { putBuffer(sealed); putBuffer(plain) }()
		for _, e := range entries {
			*sealed = slices.Grow((*sealed)[:0], int(e.Length))[:e.Length]
			if _, err := io.ReadFull(br, *sealed); err != nil {
				return fmt.Errorf("read blob %s: %w", e.ID.Short(), noEOF(err))
			}
			out, err := c.r.decodeBlob((*plain)[:0], *sealed, e)
			if err != nil {
				streamed = append(streamed, fmt.Errorf("%v blob %s: %w", e.Type, e.ID.Short(), err))
				blobs = append(blobs, BlobRef{e.Type, e.ID})
				continue
			}
			*plain = out
		}
		if _, err := io.Copy(io.Discard, br); err != nil {
			return err
		}
		if got := ID(sum.Sum(nil)); got != p {
			streamed = append(streamed, fmt.Errorf("the file has the hash %s", got.Short()))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if errs = append(errs, streamed...); len(errs) > 0 {
		return blobs, &damageError{errors.Join(errs...)}
	}
	return nil, nil
}

var packReaders = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, 1<<20) }}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (c *checker) indexed(no uint32, e pack.Entry) bool {
	for l := range c.x.Lookup(e.Type, e.ID) {
		if l.Pack == no && l.Entry(e.Type, e.ID) == e {
			return true
		}
	}
	return false
}

// packHeader reads the list of blobs at the end of a pack of the given size. Errors in the bytes read
// are a *damageError.
func (r *Repository) packHeader(ctx context.Context, p ID, size int64) ([]pack.Entry, error) {
	tail := make([]byte, min(size, pack.TailSize))
	if len(tail) == 0 {
		return nil, &damageError{errors.New("the file is empty")}
	}
	if err := r.readRange(ctx, p, size-int64(len(tail)), tail); err != nil {
		return nil, err
	}
	n, err := pack.HeaderLength(tail, size)
	if err != nil {
		return nil, &damageError{err}
	}
	sealed := tail[:len(tail)-4]
	if n > len(sealed) {
		sealed = make([]byte, n)
		if err := r.readRange(ctx, p, size-4-int64(n), sealed); err != nil {
			return nil, err
		}
	}
	entries, err := pack.OpenHeader(r.key, sealed[len(sealed)-n:])
	if err != nil {
		return nil, &damageError{err}
	}
	if len(entries) > 0 && entries[len(entries)-1].End()+pack.FooterSize(entries) != size {
		return nil, &damageError{fmt.Errorf("the header describes %d bytes, the file has %d", entries[len(entries)-1].End()+pack.FooterSize(entries), size)}
	}
	return entries, nil
}
