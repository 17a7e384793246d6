package capture

import (
	"context"
	"crypto/sha1" //nolint:gosec // the server's own checksum, not a protection
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/internal/cpus"
	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/chunk"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/repo/sums"
)

// Target takes blobs. *repo.Writer is one.
type Target interface {
	Save(ctx context.Context, t repo.BlobType, data []byte) (d id.ID, isNew bool, err error)
	// SaveAs is Save where the id of data is known already.
	SaveAs(ctx context.Context, t repo.BlobType, d id.ID, data []byte) (isNew bool, err error)
}

// Chunk sizes in bytes. User files are cut coarsely, because one chunk is one index entry and files
// seldom change in part. The tars are cut finely: an unchanged chunk of headers costs nothing, and
// a changed one is little.
var (
	fileChunks = chunk.Params{Min: 512 << 10, Avg: 1 << 20, Max: 4 << 20}
	tarChunks  = chunk.Params{Min: 32 << 10, Avg: 128 << 10, Max: 512 << 10}
)

// saver turns bytes into blobs. Memory: one buffer of twice the largest chunk per concurrent file,
// from a pool.
type saver struct {
	target Target
	files  *chunk.Chunker
	tars   *chunk.Chunker
	// read counts the bytes that came from the source.
	read *atomic.Int64
	// busy bounds how many chunks are compressed at once, since each needs buffers of its own: more
	// than processors would only cost memory.
	busy  chan struct{}
	sums  *sums.Multi
	bufs  freeList
	small freeList
	heads freeList // for what a group adds to a tar
	// zeros is the blob of the largest chunk of zeros, for holes that need not be read.
	zeros struct {
		once sync.Once
		id   id.ID
		err  error
	}
}

// freeList keeps buffers of one size. A sync.Pool would drop them at each garbage collection, and the
// kernel clears every page of a new one: a tenth of the time of a first backup.
type freeList struct {
	size int
	free chan []byte
}

func newFreeList(size, keep int) freeList { return freeList{size, make(chan []byte, keep)} }

func (l *freeList) get() []byte {
	select {
	case b := <-l.free:
		return b
	default:
		return make([]byte, l.size)
	}
}

// put takes a buffer back. One that a giant made grow is left to the collector: the list bounds memory.
func (l *freeList) put(b []byte) {
	if cap(b) > 2*l.size {
		return
	}
	select {
	case l.free <- b:
	default:
	}
}

const fileBuffer = 2 * 4 << 20 // bytes: two of the largest chunks, so that a cut never needs a refill

// smallFile is what is read in one piece without a large buffer.
const smallFile = 512 << 10

// tarBuffer is what a stream drains at, and one entry more unless it is a large one, in bytes.
var tarBuffer = 2*tarChunks.Max + 64<<10

// newSaver returns a saver for those who are at work while they have one of slots.
func newSaver(t Target, seed [32]byte, read *atomic.Int64, l Limits, slots chan struct{}) *saver {
	s := &saver{target: t, read: read, busy: make(chan struct{}, l.Compressors), files: chunk.New(seed, fileChunks), tars: chunk.New(seed, tarChunks)}
	s.sums = sums.NewMulti(enoughAtWork(slots, cpus.Count()))
	s.bufs = newFreeList(fileBuffer, l.Workers)
	s.small = newFreeList(smallFile+1, l.Workers)
	s.heads = newFreeList(tarBuffer, l.Workers)
	return s
}

// enoughAtWork returns a function that tells whether those who have one of slots keep the processors busy while so many of them are parked.
func enoughAtWork(slots chan struct{}, processors int) func(parked int) bool {
	return func(parked int) bool { return len(slots)-parked >= processors }
}

// content is what a file holds: the blobs in order.
type content struct {
	ids   []id.ID
	size  int64
	sha1  [sha1.Size]byte // only if it was asked for
	holes []pax.Extent
}

// save stores one chunk.
func (s *saver) save(ctx context.Context, p []byte) (id.ID, error) {
	s.busy <- struct{}{}
	defer func() { <-s.busy }()
	d, _, err := s.target.Save(ctx, repo.DataBlob, p)
	return d, err
}

// saveAs stores one chunk whose id is known.
func (s *saver) saveAs(ctx context.Context, d id.ID, p []byte) error {
	s.busy <- struct{}{}
	defer func() { <-s.busy }()
	_, err := s.target.SaveAs(ctx, repo.DataBlob, d, p)
	return err
}

// bytes saves p as a file of its own.
func (s *saver) bytes(ctx context.Context, p []byte) (content, error) {
	c := content{size: int64(len(p))}
	for len(p) > 0 {
		n := s.files.Cut(p)
		d, err := s.save(ctx, p[:n])
		if err != nil {
			return c, err
		}
		c.ids = append(c.ids, d)
		p = p[n:]
	}
	return c, nil
}

// readError marks what went wrong at the source, in contrast to the repository.
type readError struct{ err error }

func (e *readError) Error() string { return e.err.Error() }
func (e *readError) Unwrap() error { return e.err }

// file saves what f holds from its present position to the end.
//
// Errors: *readError if the source cannot be read; others come from the repository or ctx.
func (s *saver) file(ctx context.Context, f *file, e *entry, wantSHA1 bool) (content, error) {
	var c content
	var h *sums.SHA1
	if wantSHA1 {
		h = s.sums.New()
	}
	if e.sparse() {
		holes, err := pax.FindHoles(f, e.size)
		if err != nil {
			return c, &readError{err}
		}
		c.holes = holes
	}
	pool := &s.bufs
	if e.size <= smallFile {
		pool = &s.small
	}
	buf := pool.get()
	defer pool.put(buf)
	before, fill, eof := int64(0), 0, false
	for {
		if err := ctx.Err(); err != nil {
			return c, context.Cause(ctx)
		}
		for fill < len(buf) && !eof {
			room := len(buf) - fill
			n, err := f.Read(buf[fill:])
			if err != nil && err != io.EOF {
				return c, &readError{err}
			}
			fill += n
			s.read.Add(int64(n))
			// Less than was asked for, and as much as there should be: that was the end.
			eof = err == io.EOF || n < room && before+int64(fill) == e.size
			if pool == &s.small && fill > smallFile {
				// The file grew: go on with room for whole chunks.
				nb := s.bufs.get()
				defer s.bufs.put(nb)
				copy(nb, buf[:fill])
				buf, pool = nb, &s.bufs
			}
		}
		used, err := s.cutAll(ctx, buf[:fill], eof, h, &c)
		if err != nil {
			return c, err
		}
		if eof {
			break
		}
		copy(buf, buf[used:fill])
		fill -= used
		before += int64(used)
	}
	if h != nil {
		c.sha1 = h.Sum()
	}
	return c, nil
}

// firstChunk returns the first chunk of p, or nothing where more of the content, which follows without eof, decides
// where it ends. To wait for that until the largest chunk fits would be to move half of a buffer at each turn.
func firstChunk(c *chunk.Chunker, p []byte, eof bool) []byte {
	n := c.Cut(p)
	if n == len(p) && !eof && n < c.Params().Max {
		return nil
	}
	return p[:n]
}

// cutAll saves the chunks of p, several at once, and returns how many bytes they took. Without eof
// the last piece, of which the end is not known, stays. With h it adds them to it: that goes in order, and
// gives the ids of the chunks along the way.
func (s *saver) cutAll(ctx context.Context, p []byte, eof bool, h *sums.SHA1, c *content) (int, error) {
	used := 0
	next := func() []byte {
		part := firstChunk(s.files, p[used:], eof)
		used += len(part)
		return part
	}
	one := func(ctx context.Context, part []byte, d *id.ID) (err error) {
		if h == nil {
			*d, err = s.save(ctx, part)
			return err
		}
		return s.saveAs(ctx, *d, part)
	}
	first := next()
	if len(first) == 0 {
		return 0, nil
	}
	ids, n := make([]id.ID, 1+len(p)/fileChunks.Min), 1 // only the last can be shorter
	if h != nil {
		ids[0] = h.Sum256(first)
	}
	part := next()
	if len(part) == 0 { // most files: no goroutine for them
		if err := one(ctx, first, &ids[0]); err != nil {
			return used, err
		}
	} else {
		g, gctx := errgroup.WithContext(ctx)
		g.Go(func() error { return one(gctx, first, &ids[0]) })
		for ; len(part) > 0; part = next() {
			p, d := part, &ids[n]
			n++
			if h != nil {
				*d = h.Sum256(p)
			}
			g.Go(func() error { return one(gctx, p, d) })
		}
		if err := g.Wait(); err != nil {
			return used, err
		}
	}
	c.ids = append(c.ids, ids[:n]...)
	c.size += int64(used)
	return used, nil
}

// maxChunks bounds the list of a file's chunks (32 bytes each): 32 TiB of a file in the largest chunks. A
// sparse file can claim exabytes.
const maxChunks = 8 << 20

// path opens and saves the regular file e. A file that does not have the size that the scan saw was
// changed in between, and is not part of the picture.
func (s *saver) path(ctx context.Context, r *root, e *entry, wantSHA1 bool) (content, error) {
	if e.size/int64(fileChunks.Max) > maxChunks {
		return content{}, &readError{fmt.Errorf("%s claims %d bytes, more than can be stored", r.abs(e.path), e.size)}
	}
	f, err := r.openFile(e.path)
	if err != nil {
		return content{}, &readError{err}
	}
	defer f.Close()
	read := s.file
	if e.size > fileBuffer && e.sparse() {
		read = s.sparseFile
	}
	c, err := read(ctx, f, e, wantSHA1)
	if err == nil && c.size != e.size {
		err = &readError{fmt.Errorf("%s had %d bytes and gave %d: something writes to the instance", r.abs(e.path), e.size, c.size)}
	}
	return c, err
}

// sparseFile saves a large file with holes without reading the holes: a file may claim terabytes.
func (s *saver) sparseFile(ctx context.Context, f *file, e *entry, wantSHA1 bool) (content, error) {
	holes, err := pax.FindHoles(f, e.size)
	if err != nil {
		return content{}, &readError{err}
	}
	big := false
	for _, h := range holes {
		big = big || h.Len >= int64(fileChunks.Max)
	}
	if !big {
		return s.file(ctx, f, e, wantSHA1)
	}
	c := content{holes: holes}
	var h *sums.SHA1
	if wantSHA1 {
		h = s.sums.New()
	}
	zero := make([]byte, fileChunks.Max)
	at := int64(0)
	part := func(end int64) error { // the bytes from at to end, which are read
		if end <= at {
			return nil
		}
		sec := &sectionFile{f: f, off: at, end: end}
		pc, err := s.section(ctx, sec, h)
		if err != nil {
			return err
		}
		if pc.size != end-at {
			return &readError{&fs.PathError{Op: "read", Path: f.Name(), Err: io.ErrUnexpectedEOF}}
		}
		c.ids = append(c.ids, pc.ids...)
		c.size += pc.size
		at = end
		return nil
	}
	for _, hole := range holes {
		whole := hole.Len / int64(len(zero)) * int64(len(zero))
		if whole == 0 {
			continue
		}
		if err := part(hole.Off); err != nil {
			return c, err
		}
		s.zeros.once.Do(func() { s.zeros.id, s.zeros.err = s.save(ctx, zero) })
		if s.zeros.err != nil {
			return c, s.zeros.err
		}
		for n := int64(0); n < whole; n += int64(len(zero)) {
			if err := ctx.Err(); err != nil {
				return c, context.Cause(ctx)
			}
			c.ids = append(c.ids, s.zeros.id)
			if h != nil {
				h.Write(zero)
			}
		}
		c.size += whole
		at += whole
	}
	if err := part(e.size); err != nil {
		return c, err
	}
	if h != nil {
		c.sha1 = h.Sum()
	}
	return c, nil
}

// sectionFile reads a range of a file.
type sectionFile struct {
	f        *file
	off, end int64
}

func (s *sectionFile) Read(p []byte) (int, error) {
	if s.off >= s.end {
		return 0, io.EOF
	}
	n, err := s.f.readAt(p[:min(int64(len(p)), s.end-s.off)], s.off)
	s.off += int64(n)
	return n, err
}

func (s *saver) section(ctx context.Context, r io.Reader, h *sums.SHA1) (content, error) {
	var c content
	buf := s.bufs.get()
	defer s.bufs.put(buf)
	fill := 0
	for {
		n, err := io.ReadFull(r, buf[fill:])
		fill += n
		s.read.Add(int64(n))
		eof := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !eof {
			return c, &readError{err}
		}
		used, err := s.cutAll(ctx, buf[:fill], eof, h, &c)
		if err != nil {
			return c, err
		}
		if eof {
			return c, nil
		}
		copy(buf, buf[used:fill])
		fill -= used
	}
}

// stream saves a tar group: bytes are appended to buf and cut off its front as they pile up.
type stream struct {
	s    *saver
	buf  []byte
	ids  []id.ID
	size int64
}

// drain saves what is complete; with all it saves everything.
func (st *stream) drain(ctx context.Context, all bool) error {
	used := 0
	next := func() []byte {
		part := firstChunk(st.s.tars, st.buf[used:], all)
		used += len(part)
		return part
	}
	for {
		a, b := next(), next()
		if len(a) == 0 {
			break
		}
		if len(b) == 0 {
			d := id.ID(st.s.sums.Sum256(a))
			if err := st.s.saveAs(ctx, d, a); err != nil {
				return fmt.Errorf("save metadata: %w", err)
			}
			st.ids = append(st.ids, d)
			break
		}
		// Two take two thirds of the time to hash together.
		ids := [2]id.ID{}
		ids[0], ids[1] = sums.Pair(a, b)
		for i, part := range [2][]byte{a, b} {
			if err := st.s.saveAs(ctx, ids[i], part); err != nil {
				return fmt.Errorf("save metadata: %w", err)
			}
		}
		st.ids = append(st.ids, ids[:]...)
	}
	st.size += int64(used)
	st.buf = st.buf[:copy(st.buf, st.buf[used:])]
	return nil
}
