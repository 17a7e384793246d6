package restore

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// tarFile is one of the archives of a store.
type tarFile struct {
	name string // place in the snapshot
	node *snapshot.Node
}

// restoreStore streams the archives of a store to d: first store.tar, which holds the root, then
// those of the spaces, several at a time.
func restoreStore(d *dest, tars []tarFile, o *objectStore) error {
	l := newLookup(d.run)
	one := func(t tarFile) error { return restoreTar(d, t, l.add, o) }
	err := func() error {
		if len(tars) > 0 && strings.HasSuffix(tars[0].name, "/store.tar") {
			if err := one(tars[0]); err != nil {
				return err
			}
			tars = tars[1:]
		}
		var g errgroup.Group
		g.SetLimit(d.run.workers)
		for _, t := range tars {
			g.Go(func() error { return one(t) })
		}
		return g.Wait()
	}()
	err = errors.Join(err, l.finish(err == nil))
	return errors.Join(err, o.finish(err == nil))
}

func restoreTar(d *dest, t tarFile, sink func(*job) error, o *objectStore) error {
	if d.run.ctx.Err() != nil {
		return d.run.cause()
	}
	sum := int64(0)
	for _, b := range t.node.Content {
		n, ok := d.run.repo.Size(repo.DataBlob, b)
		if !ok {
			return d.fail(t.name, "", fmt.Errorf("blob %s is not in the repository: run `holdfast check`", b.Short()))
		}
		sum += n
	}
	if uint64(sum) != t.node.Size {
		return d.fail(t.name, "", fmt.Errorf("the snapshot records %d bytes and holds %d", t.node.Size, sum))
	}
	src := newContentReader(d.run.ctx, d.run.repo, t.node.Content)
	defer src.close()
	a := newApplier(d, sink)
	defer a.close()
	so := o.space(sink)
	defer so.done()
	r := pax.NewReader(bufio.NewReaderSize(src, 64<<10))
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil { // what came before is restored, and the folders get their times
			if err := d.fail(t.name, "", err); err != nil {
				return err
			}
			break
		}
		e, err := tarEntry(h, r, t.name)
		if err != nil {
			if err := d.fail(t.name, h.Name, err); err != nil {
				return err
			}
			continue
		}
		taken, err := so.take(a, h, e)
		if err != nil {
			return err
		}
		if taken {
			continue
		}
		if err := a.put(e); err != nil {
			return err
		}
	}
	return a.finish()
}

// tarEntry makes an entry of a header.
func tarEntry(h *pax.Header, data io.Reader, archive string) (*entry, error) {
	e := &entry{
		from: archive,
		meta: meta{mode: h.Mode, uid: h.UID, gid: h.GID, sec: h.Sec, nsec: h.Nsec},
	}
	name := h.Name
	if name == "./" || name == "." {
		name = ""
	} else {
		name = strings.TrimPrefix(name, "./")
		if h.Type == '5' {
			name = strings.TrimSuffix(name, "/")
		}
		if name == "" {
			return e, refused("the name is empty")
		}
	}
	e.rel = name
	if name != "" {
		if err := checkPath(name); err != nil {
			return e, err
		}
	}
	e.meta.xattrs = snapshot.EntryXattrs(h)
	var ok bool
	if e.typ, ok = snapshot.EntryType(h); !ok {
		return e, refused("unknown type %q", string(h.Type))
	}
	switch h.Type {
	case '0':
		if e.typ == snapshot.Socket {
			return e, nil
		}
		e.size = h.Size
		if c := h.Records[pax.Content]; c != "" {
			n, err := strconv.ParseUint(h.Records[pax.Size], 10, 62)
			if err != nil {
				return e, fmt.Errorf("record %s=%q", pax.Size, h.Records[pax.Size])
			}
			e.content, e.size = c, int64(n)
		} else {
			e.data = data
		}
		var err error
		e.holes, err = pax.ParseHoles(h.Records[pax.Holes], e.size)
		return e, err
	case '1':
		e.hardlink = strings.TrimPrefix(h.Link, "./")
		return e, checkPath(e.hardlink)
	case '2':
		e.link = h.Link
	case '3', '4':
		e.rdev = unix.Mkdev(h.Major, h.Minor)
	}
	return e, nil
}

// --- contents that lie in the users' trees --------------------------------------------------------

const (
	jobBytes = 200 // without its strings
	// lookupFiles is how many paths are looked up together, level by level.
	lookupFiles = 16384
)

// A lookup finds the contents of files by their paths in the snapshot. The tars name blobs in the
// order of their ids, which is random; sorted by path in batches they are in the order in which
// they were stored, so that packs are read in one go.
type lookup struct {
	run     *run
	batches chan []*job
	wait    sync.WaitGroup
	err     error // of the worker, valid after wait

	mu    sync.Mutex
	batch []*job
	bytes int
}

func newLookup(r *run) *lookup {
	l := &lookup{run: r, batches: make(chan []*job)}
	l.wait.Add(1)
	go func() {
		defer l.wait.Done()
		for b := range l.batches {
			if l.err == nil {
				l.err = l.resolve(b)
			}
		}
	}()
	return l
}

func (l *lookup) add(j *job) error {
	if len(j.ids) > 0 {
		return l.run.fill.add(j)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.batch = append(l.batch, j)
	l.bytes += jobBytes + len(j.content) + len(j.rel)
	if l.bytes >= l.run.batch {
		return l.flush()
	}
	return nil
}

// flush hands the batch over; l.mu is held.
func (l *lookup) flush() error {
	b := l.batch
	l.batch, l.bytes = nil, 0
	select {
	case l.batches <- b:
		return nil
	case <-l.run.ctx.Done():
		return l.run.cause()
	}
}

func (l *lookup) finish(ok bool) error {
	var err error
	if l.mu.Lock(); ok && len(l.batch) > 0 {
		err = l.flush()
	}
	l.mu.Unlock()
	close(l.batches)
	l.wait.Wait()
	return errors.Join(err, l.err)
}

func (l *lookup) resolve(batch []*job) error {
	sort.Slice(batch, func(i, k int) bool { return lessPath(batch[i].content, batch[k].content) })
	for len(batch) > 0 {
		n := min(len(batch), lookupFiles)
		if err := l.find(batch[:n]); err != nil {
			return err
		}
		for i, j := range batch[:n] {
			batch[i] = nil
			if j == nil {
				continue
			}
			if err := l.run.fill.add(j); err != nil {
				return err
			}
		}
		batch = batch[n:]
	}
	return nil
}

// lessPath orders as a walk does: by component.
func lessPath(a, b string) bool {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			if a[i] == '/' || b[i] == '/' {
				return a[i] == '/'
			}
			return a[i] < b[i]
		}
	}
	return len(a) < len(b)
}

// find fills in the ids of the files, all levels of the tree at once. Those that are not found are
// told, and replaced by nil.
func (l *lookup) find(files []*job) error {
	level := map[id.ID][]int{l.run.tree: nil}
	rest := make([]string, len(files))
	for i, j := range files {
		rest[i] = strings.TrimPrefix(j.content, "/")
		level[l.run.tree] = append(level[l.run.tree], i)
	}
	lose := func(i int, err error) error {
		j := files[i]
		files[i] = nil
		return j.drop(fmt.Errorf("content at %q in the snapshot: %w", j.content, err))
	}
	var mu sync.Mutex
	for len(level) > 0 {
		ids := make([]id.ID, 0, len(level))
		for d := range level {
			ids = append(ids, d)
		}
		slices.SortFunc(ids, func(a, b id.ID) int { return level[a][0] - level[b][0] }) // as they were stored
		next := map[id.ID][]int{}
		err := loadEach(l.run.ctx, l.run.repo, repo.TreeBlob, ids, func(d id.ID, p []byte) error {
			t, err := snapshot.DecodeTree(p)
			mu.Lock()
			defer mu.Unlock()
			var index map[string]*snapshot.Node
			for _, i := range level[d] {
				if err != nil {
					if err := lose(i, err); err != nil {
						return err
					}
					continue
				}
				name, more, deeper := strings.Cut(rest[i], "/")
				if index == nil {
					index = make(map[string]*snapshot.Node, len(t.Nodes))
					for _, n := range t.Nodes {
						index[n.Name] = n
					}
				}
				n := index[name]
				switch {
				case n == nil, deeper && n.Type != snapshot.Dir:
					err := lose(i, snapshot.ErrNoSuchPath)
					if err != nil {
						return err
					}
				case deeper:
					rest[i] = more
					next[n.Subtree] = append(next[n.Subtree], i)
				case n.Type != snapshot.File:
					if err := lose(i, fmt.Errorf("it is a %s there", n.Type)); err != nil {
						return err
					}
				case n.Size != uint64(files[i].size):
					if err := lose(i, fmt.Errorf("it has %d bytes there, not %d", n.Size, files[i].size)); err != nil {
						return err
					}
				default:
					files[i].ids = n.Content
				}
			}
			return nil
		}, func(d id.ID, err error) error {
			mu.Lock()
			defer mu.Unlock()
			for _, i := range level[d] {
				if err := lose(i, err); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, list := range next {
			slices.Sort(list)
		}
		level = next
	}
	return nil
}
