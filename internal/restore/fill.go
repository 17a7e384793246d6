package restore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"sort"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

const (
	// windowPieces and windowBytes bound how much content is asked for at once. What is asked for
	// together is read pack by pack, each byte once; 8192 pieces cost about 1 MiB to remember, and
	// 512 MiB are 32 packs of the usual size.
	windowPieces = 8192
	windowBytes  = 512 << 20
)

// jobState counts what is missing of a file.
type jobState struct {
	left   atomic.Int64 // pieces
	failed atomic.Bool
	warned atomic.Bool
	// reserved: room was asked for.
	reserved atomic.Bool
}

// piece is a place where a blob belongs.
type piece struct {
	j   *job
	off int64
}

// want is one blob of a window.
type want struct {
	size   int64 // bytes of plain content
	pieces []piece
}

// A filler writes the contents of files: blobs in the order in which they come, read in windows.
type filler struct {
	run     *run
	compare errgroup.Group
	loads   errgroup.Group

	mu    sync.Mutex
	win   map[id.ID]*want
	order []id.ID
	count int
	bytes int64
}

func newFiller(r *run) *filler {
	f := &filler{run: r, win: map[id.ID]*want{}}
	f.compare.SetLimit(r.workers)
	f.loads.SetLimit(r.windows)
	return f
}

// add takes a file whose blobs are known. It returns an error only if the run cannot go on.
func (f *filler) add(j *job) error {
	if f.run.ctx.Err() != nil {
		return f.run.cause()
	}
	sum := int64(0)
	for _, d := range j.ids {
		n, ok := f.run.repo.Size(repo.DataBlob, d)
		if !ok {
			return j.drop(fmt.Errorf("blob %s is not in the repository: run `holdfast check`", d.Short()))
		}
		sum += n
	}
	if sum != j.size {
		return j.drop(fmt.Errorf("the snapshot records %d bytes and holds %d", j.size, sum))
	}
	if j.object != nil {
		return j.object.put(j)
	}
	if !j.present {
		return f.fetch(j)
	}
	f.compare.Go(func() error {
		same, err := j.compare(f.run)
		if err != nil {
			return j.d.fail(j.from, j.rel, err)
		}
		if same {
			return nil
		}
		if err := j.replace(); err != nil {
			return j.d.fail(j.from, j.rel, err)
		}
		if f.run.dry {
			return nil
		}
		return f.fetch(j)
	})
	return nil
}

// fetch puts the blobs of j on the list.
func (f *filler) fetch(j *job) error {
	j.state.left.Store(int64(len(j.ids)))
	f.mu.Lock()
	defer f.mu.Unlock()
	off := int64(0)
	for _, d := range j.ids {
		w := f.win[d]
		if w == nil {
			n, _ := f.run.repo.Size(repo.DataBlob, d)
			w = &want{size: n}
			f.win[d] = w
			f.order = append(f.order, d)
			f.bytes += n
		}
		w.pieces = append(w.pieces, piece{j, off})
		off += w.size
		f.count++
		if f.count >= windowPieces || f.bytes >= windowBytes {
			f.dispatch()
		}
		if f.run.ctx.Err() != nil {
			return f.run.cause()
		}
	}
	return nil
}

// dispatch starts to read the window; f.mu is held, which holds everybody back while two are read.
func (f *filler) dispatch() {
	if len(f.order) == 0 {
		return
	}
	win, order := f.win, f.order
	f.win, f.order, f.count, f.bytes = map[id.ID]*want{}, nil, 0, 0
	f.loads.Go(func() error { return f.load(win, order) })
}

// finish waits until all contents are written.
func (f *filler) finish() error {
	err := f.compare.Wait()
	if err == nil {
		f.mu.Lock()
		f.dispatch()
		f.mu.Unlock()
	}
	return errors.Join(err, f.loads.Wait())
}

func (f *filler) load(win map[id.ID]*want, order []id.ID) error {
	return loadEach(f.run.ctx, f.run.repo, repo.DataBlob, order, func(d id.ID, data []byte) error {
		w := win[d]
		for _, p := range w.pieces {
			if int64(len(data)) != w.size {
				p.j.bad(fmt.Errorf("blob %s has %d bytes, the index says %d", d.Short(), len(data), w.size))
			}
			if err := p.j.piece(p.off, data); err != nil {
				return err
			}
		}
		return nil
	}, func(d id.ID, err error) error {
		for _, p := range win[d].pieces {
			p.j.bad(fmt.Errorf("content: %w", err))
			if err := p.j.piece(p.off, nil); err != nil {
				return err
			}
		}
		return nil
	})
}

// loadEach calls fn once for each blob, or lost for those that cannot be loaded: one damaged pack
// must not take away what lies beside it. Both may be called concurrently; an error of theirs
// ends the call.
func loadEach(ctx context.Context, r Repo, t repo.BlobType, ids []id.ID, fn func(id.ID, []byte) error, lost func(id.ID, error) error) error {
	var mu sync.Mutex
	done := make(map[id.ID]bool, len(ids))
	var fatal error
	err := r.LoadBlobs(ctx, t, ids, func(d id.ID, data []byte) error {
		err := fn(d, data)
		mu.Lock()
		defer mu.Unlock()
		done[d] = true
		if err != nil && fatal == nil {
			fatal = err
		}
		return err
	})
	if fatal != nil {
		return fatal
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err == nil && len(done) == len(ids) {
		return nil
	}
	var buf []byte
	for _, d := range ids {
		if done[d] {
			continue
		}
		done[d] = true
		p, err := r.LoadBlob(ctx, t, d, buf)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			if err := lost(d, err); err != nil {
				return err
			}
			continue
		}
		buf = p
		if err := fn(d, p); err != nil {
			return err
		}
	}
	return nil
}

// bad notes that the file cannot be restored; the first reason is told.
func (j *job) bad(err error) {
	if !j.state.failed.Swap(true) {
		_ = j.d.fail(j.from, j.rel, err)
	}
}

// drop gives up a file before any piece of it was fetched.
func (j *job) drop(err error) error {
	if stop := j.d.fail(j.from, j.rel, err); stop != nil {
		return stop
	}
	if !j.present && j.object == nil {
		j.remove()
	}
	return nil
}

// remove takes away what was written of a file: half of it must not look like a whole one.
func (j *job) remove() {
	if j.d.run.dry {
		return
	}
	dir, name := splitPath(j.rel)
	fd, err := j.d.root.openDir(dir)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if j.d.touch(dir, fd) == nil {
		_ = unix.Unlinkat(fd, name, 0)
	}
}

// piece writes data at off; the last piece finishes the file. It returns an error only if the run
// cannot go on.
func (j *job) piece(off int64, data []byte) error {
	last := func() bool { return j.state.left.Add(-1) == 0 }
	if j.state.failed.Load() {
		if last() {
			j.remove()
		}
		return j.d.run.stopped()
	}
	fd, err := j.d.root.open(j.rel, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err == nil {
		defer unix.Close(fd)
		j.reserve(fd)
		err = j.write(fd, off, data, j.put)
	}
	if err != nil {
		j.bad(err)
	}
	if !last() {
		return j.d.run.stopped()
	}
	if !j.state.failed.Load() {
		if err := j.seal(fd); err != nil {
			j.bad(err)
		}
	}
	if j.state.failed.Load() {
		j.remove()
	}
	return j.d.run.stopped()
}

// write puts data at off by means of write, and leaves out what is a hole.
func (j *job) write(fd int, off int64, data []byte, write func(fd int, p []byte, off int64) error) error {
	for len(data) > 0 {
		n, hole := int64(len(data)), false
		if i := sort.Search(len(j.holes), func(i int) bool { return j.holes[i].End() > off }); i < len(j.holes) {
			if h := j.holes[i]; h.Off > off {
				n = min(n, h.Off-off)
			} else {
				n, hole = min(n, h.End()-off), true
			}
		}
		if hole && !isZero(data[:n]) {
			hole = false // what was stored counts
			if !j.state.warned.Swap(true) {
				j.d.run.warn(fmt.Sprintf("%q: the list of holes names bytes that are not zero; they were written", j.d.show(j.rel)))
			}
		}
		if !hole {
			if err := write(fd, data[:n], off); err != nil {
				return err
			}
		}
		data, off = data[n:], off+n
	}
	return nil
}

// checkSize extends a file that ends with a hole, and makes sure of the size.
func (j *job) checkSize(fd int) (*unix.Stat_t, error) {
	if n := len(j.holes); n > 0 && j.holes[n-1].End() == j.size {
		if err := unix.Ftruncate(fd, j.size); err != nil {
			return nil, fmt.Errorf("set size: %w", err)
		}
	}
	st, err := statRegular(fd)
	if err != nil {
		return nil, err
	}
	if st.Size != j.size {
		return nil, fmt.Errorf("it has %d bytes after it was written, not %d: something else writes into the destination", st.Size, j.size)
	}
	return st, nil
}

// seal finishes a file whose content is complete.
func (j *job) seal(fd int) error {
	st, err := j.checkSize(fd)
	if err != nil {
		return err
	}
	if _, err := j.d.setMeta(fd, st, &j.meta, j.all); err != nil {
		return err
	}
	add(&j.d.res.Files, 1)
	add(&j.d.res.Bytes, j.size)
	j.d.run.bytes.Add(j.size)
	return nil
}

// compare reads the file that is there and tells whether it has the content of the snapshot. If
// so, its metadata is set right.
func (j *job) compare(r *run) (bool, error) {
	return j.compareBy(r, func(fd int, buf []byte) (bool, error) {
		h := sha256.New()
		off := int64(0)
		for _, d := range j.ids {
			n, _ := r.repo.Size(repo.DataBlob, d)
			h.Reset()
			for end := off + n; off < end; {
				if r.ctx.Err() != nil {
					return false, r.cause()
				}
				m, err := pread(fd, buf[:min(int64(len(buf)), end-off)], off)
				if err != nil {
					return false, fmt.Errorf("read: %w", err)
				}
				if m == 0 {
					return false, nil
				}
				h.Write(buf[:m])
				off += int64(m)
			}
			if id.ID(h.Sum(nil)) != d {
				return false, nil
			}
		}
		return true, nil
	})
}

// compareBy tells whether the file that is there has the right size and, by same, the right content, and then
// sets its metadata right. same is not asked if times are trusted.
func (j *job) compareBy(r *run, same func(fd int, buf []byte) (bool, error)) (bool, error) {
	dir, name := splitPath(j.rel)
	parent, err := j.d.root.openDir(dir)
	if err != nil {
		return false, err
	}
	defer unix.Close(parent)
	fd, st, err := openRegular(parent, name)
	if errors.Is(err, unix.EACCES) { // our own, but closed to us: write it again
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	if st.Size != j.size {
		return false, nil
	}
	if !r.trustTimes || !j.meta.sameTime(st) {
		buf := r.buffer()
		defer r.buffers.Put(buf)
		if ok, err := same(fd, *buf); err != nil || !ok {
			return false, err
		}
	}
	r.bytes.Add(j.size)
	if r.dry {
		add(&j.d.res.Unchanged, 1)
		return true, nil
	}
	changed, err := j.d.setMeta(fd, st, &j.meta, true)
	j.d.count(changed)
	return true, err
}

// replace moves aside the file that is there and makes an empty one for the content.
func (j *job) replace() error {
	dir, name := splitPath(j.rel)
	fd, err := j.d.root.openDir(dir)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if err := j.d.clear(fd, dir, name, &st); err != nil {
		return err
	}
	if j.d.run.dry {
		add(&j.d.res.Files, 1)
		add(&j.d.res.Bytes, j.size)
		return nil
	}
	return unix.Mknodat(fd, name, unix.S_IFREG|0o600, 0)
}

var zeros [64 << 10]byte

func isZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeros))
		if !bytes.Equal(p[:n], zeros[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}
