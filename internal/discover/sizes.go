package discover

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/internal/cpus"
	"github.com/holdfast-backup/holdfast/internal/mountinfo"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
)

// tally counts what a walk meets. Metadata and blobs of a store are told apart.
type tally struct {
	entries, bytes         atomic.Int64
	blobEntries, blobBytes atomic.Int64
}

// walker measures directories with several goroutines, because the time goes into waiting for the
// disk where the inodes are not cached.
type walker struct {
	skip map[string]bool // roots of other data sets, which are measured on their own
	isB  func(rel string, d fs.DirEntry) bool
	t    *tally
	root string

	group *errgroup.Group
	seen  *atomic.Int64
	sink  progress.Sink
	item  string

	mu   sync.Mutex
	errs []string // the first few places that could not be read
	more int
}

// progressStep is how many entries lie between two reports.
const progressStep = 5000

func (w *walker) count(path string, d fs.DirEntry) error {
	if n := w.seen.Add(1); n%progressStep == 0 {
		w.sink.Emit(progress.Event{Kind: progress.Update, Phase: "discover", Item: w.item, Done: n, Unit: "entries"})
	}
	rel := strings.TrimPrefix(strings.TrimPrefix(path, w.root), "/")
	blob := w.isB != nil && w.isB(rel, d)
	var size int64
	if d.Type().IsRegular() {
		in, err := d.Info()
		if err != nil {
			if os.IsNotExist(err) {
				return nil // a running server removes files at any time
			}
			return err
		}
		size = in.Size()
	}
	if blob {
		w.t.blobEntries.Add(1)
		w.t.blobBytes.Add(size)
	} else {
		w.t.entries.Add(1)
		w.t.bytes.Add(size)
	}
	return nil
}

func (w *walker) fail(path string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.errs) < 3 {
		w.errs = append(w.errs, fmt.Sprintf("%s: %v", path, withoutPath(err)))
	} else {
		w.more++
	}
}

func (w *walker) dir(ctx context.Context, path string) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	entries, err := os.ReadDir(path)
	if err != nil && !os.IsNotExist(err) {
		w.fail(path, err)
	}
	for _, e := range entries {
		p := filepath.Join(path, e.Name())
		if err := w.count(p, e); err != nil {
			w.fail(p, err)
		}
		if !e.IsDir() || w.skip[p] {
			continue
		}
		if !w.group.TryGo(func() error { return w.dir(ctx, p) }) {
			if err := w.dir(ctx, p); err != nil {
				return err
			}
		}
	}
	return nil
}

// isBlobPath tells the contents of a decomposed store from its metadata: what lies below blobs/ of a
// space.
func isBlobPath(rel string, d fs.DirEntry) bool {
	p := strings.SplitN(rel, "/", 5)
	return len(p) == 5 && p[0] == "spaces" && p[3] == "blobs"
}

// isPosixBlob tells contents from metadata in the posix layout: regular files but for the driver's own.
func isPosixBlob(rel string, d fs.DirEntry) bool {
	if !d.Type().IsRegular() {
		return false
	}
	first, _, below := strings.Cut(rel, "/")
	switch {
	case !below, first == "indexes", first == "uploads", first == "changes":
		return false
	case strings.HasSuffix(rel, ".mlock"), strings.HasSuffix(rel, ".flock"), strings.HasSuffix(rel, ".trashinfo"):
		return false
	}
	return !strings.HasSuffix(rel, ".mpk") || !strings.Contains(rel, "/.oc-nodes/")
}

// measure fills in the sizes of all data sets that were found.
//
// Errors: only the cancellation of ctx; what cannot be read is a warning.
func (b *builder) measure(ctx context.Context) error {
	var seen atomic.Int64
	for i := range b.sets {
		d := &b.sets[i]
		if !d.Found || d.Kind == ocis.Blobs {
			continue
		}
		t := new(tally)
		w := &walker{t: t, root: d.Path, seen: &seen, sink: b.o.Progress, item: d.Name, skip: map[string]bool{}}
		for _, o := range b.sets {
			if o.Path != d.Path && mountinfo.Below(o.Path, d.Path) {
				w.skip[o.Path] = true
			}
		}
		if d.Kind == ocis.Metadata {
			w.isB = isBlobPath
			if k := slices.IndexFunc(b.stores, func(s *store) bool { return s.Name == d.Store }); b.stores[k].Layout == ocis.Posix {
				w.isB = isPosixBlob
			}
		}
		st, err := os.Lstat(d.Path)
		if err != nil {
			w.fail(d.Path, err)
			continue
		}
		if err := w.count(d.Path, fs.FileInfoToDirEntry(st)); err != nil {
			w.fail(d.Path, err)
		}
		if st.IsDir() {
			g, gctx := errgroup.WithContext(ctx)
			g.SetLimit(max(4, cpus.Count()))
			w.group = g
			err := w.dir(gctx, d.Path)
			if e := g.Wait(); err == nil {
				err = e
			}
			if err == nil {
				err = context.Cause(ctx)
			}
			if err != nil {
				return err
			}
		}
		if len(w.errs) > 0 {
			more := ""
			if w.more > 0 {
				more = fmt.Sprintf(", and %d more places", w.more)
			}
			b.warn("data set %s could not be read completely: %s%s", d.Name, strings.Join(w.errs, "; "), more)
		}
		d.Entries, d.Bytes = t.entries.Load(), t.bytes.Load()
		if d.Kind == ocis.Metadata {
			if k := slices.IndexFunc(b.sets, func(o ocis.DataSet) bool { return o.Kind == ocis.Blobs && o.Store == d.Store }); k >= 0 {
				b.sets[k].Entries, b.sets[k].Bytes = t.blobEntries.Load(), t.blobBytes.Load()
			} else {
				d.Entries, d.Bytes = d.Entries+t.blobEntries.Load(), d.Bytes+t.blobBytes.Load()
			}
		}
	}
	return nil
}
