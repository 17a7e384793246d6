// Package restore puts a snapshot back: the whole instance ([MakePlan], [Run]) or one folder of it
// ([RestoreTree]). What it writes is exact in names, contents, types, modes, owners, modification
// times, extended attributes, symbolic links, hard links and holes.
//
// What the repository says is not trusted: names that are no plain names are refused, symbolic
// links at the destination are never followed, and nothing outside the destination is touched.
//
// Files are written in place, not under a temporary name: that would cost a rename for each. A
// marker file beside the destination, durable before the first entry and removed after the last,
// says that what lies there is not complete; a file whose content is not complete never bears its
// recorded time; and where a marker is found, contents are compared by their bytes. A file that
// exists is never written to: it is kept if it is right, and moved aside if it is not.
package restore

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

// Result tells what was done, or in a dry run what would be.
type Result struct {
	DataSets []*DataSetResult `json:"data_sets"`
	// Buckets has an entry for each store whose blobs went into a bucket.
	Buckets []*BucketResult `json:"buckets,omitempty"`
	// Aside are the folders that took what was in the way.
	Aside    []string      `json:"aside,omitempty"`
	Warnings []string      `json:"warnings,omitempty"`
	Elapsed  time.Duration `json:"elapsed"`
}

// DataSetResult counts for one data set. Bytes are those written.
type DataSetResult struct {
	Name      string `json:"name"`
	Path      string `json:"path"`
	Dirs      int64  `json:"dirs"`
	Files     int64  `json:"files"`     // written, or changed in their metadata
	Unchanged int64  `json:"unchanged"` // right as they were
	Bytes     int64  `json:"bytes"`
	// MovedAside counts what was in the way; Moved lists the first of it.
	MovedAside int64    `json:"moved_aside"`
	Moved      []string `json:"moved,omitempty"`

	direct int64 // of Bytes, what went past the page cache
}

const (
	movedLimit = 10000
	errorLimit = 100
	tempPrefix = ".holdfast-tmp-"
	bufferSize = 256 << 10
)

// What makes data durable; tests that do not look at it do without.
var (
	syncfs = unix.Syncfs
	fsync  = (*os.File).Sync
)

func add(p *int64, n int64) { atomic.AddInt64(p, n) }

// run is the state of one restore.
type run struct {
	ctx        context.Context
	cancel     context.CancelCauseFunc
	repo       Repo
	tree       id.ID // root of the snapshot
	view       *View // nil: it is a snapshot that is restored
	workers    int
	windows    int
	batch      int   // bytes
	objectRoom int64 // bytes
	dry        bool
	sizeOnly   bool // a dry run that takes a file of the right size for right
	trustTimes bool
	euid       int
	owner      *Owner
	stamp      string
	sink       progress.Sink
	fill       *filler
	buffers    sync.Pool

	entries atomic.Int64
	bytes   atomic.Int64
	temp    atomic.Int64

	mu       sync.Mutex
	touched  map[dirKey]*touched
	asides   map[string]*aside
	errs     []error
	errCount int64
	warnings []string
	warned   map[string]bool
	buckets  []*BucketResult
}

func newRun(ctx context.Context, r Repo, o *Options) *run {
	x := &run{
		repo: r, workers: o.Workers, windows: o.Windows, batch: o.Batch, objectRoom: o.ObjectRoom, dry: o.DryRun, trustTimes: o.TrustTimes, euid: os.Geteuid(),
		owner: o.Owner, stamp: o.Now().UTC().Format(stampLayout), sink: o.Progress,
		touched: map[dirKey]*touched{}, asides: map[string]*aside{}, warned: map[string]bool{},
	}
	x.ctx, x.cancel = context.WithCancelCause(ctx)
	x.buffers.New = func() any { b := make([]byte, bufferSize); return &b }
	x.fill = newFiller(x)
	return x
}

func (r *run) buffer() *[]byte { return r.buffers.Get().(*[]byte) }

func (r *run) cause() error { return context.Cause(r.ctx) }

// stopped returns why the run cannot go on, or nil.
func (r *run) stopped() error {
	if r.ctx.Err() != nil {
		return r.cause()
	}
	return nil
}

// own puts the owner that was asked for in the place of the recorded one.
func (r *run) own(m *meta) {
	if r.owner != nil {
		m.uid, m.gid = uint32(r.owner.UID), uint32(r.owner.GID)
	}
}

func (r *run) addError(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.errCount++; len(r.errs) < errorLimit {
		r.errs = append(r.errs, err)
	}
}

func (r *run) warn(text string) {
	r.mu.Lock()
	if len(r.warnings) < errorLimit {
		r.warnings = append(r.warnings, text)
	}
	r.mu.Unlock()
	r.sink.Emit(progress.Event{Kind: progress.Warning, Phase: "restore", Message: text})
}

// warnOnce warns of what would otherwise be said for each file.
func (r *run) warnOnce(key, text string) {
	r.mu.Lock()
	known := r.warned[key]
	r.warned[key] = true
	r.mu.Unlock()
	if !known {
		r.warn(text)
	}
}

// report emits progress until the returned function is called.
func (r *run) report(entries, bytes int64) (stop func()) {
	if r.sink == nil {
		return func() {}
	}
	r.sink.Emit(progress.Event{Kind: progress.Start, Phase: "restore", Total: entries, TotalBytes: bytes, Unit: "entries"})
	event := func(k progress.Kind) {
		r.sink.Emit(progress.Event{
			Kind: k, Phase: "restore", Done: r.entries.Load(), Total: entries, Unit: "entries",
			Bytes: r.bytes.Load(), TotalBytes: bytes,
		})
	}
	end := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		t := time.NewTicker(200 * time.Millisecond)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				event(progress.Update)
			case <-end:
				return
			}
		}
	})
	return func() {
		close(end)
		wg.Wait()
		event(progress.Finish)
	}
}

// finish does what has to wait until all contents are there: hard links, what the snapshot does not
// have, times and modes of folders that were changed out of turn.
func (r *run) finish(dests []*dest) error {
	if err := r.fill.finish(); err != nil {
		return err
	}
	steps := []func(d *dest) error{(*dest).finishShared, (*dest).finishLinks, (*dest).finishExtras}
	for _, step := range steps {
		for _, d := range dests {
			if err := step(d); err != nil {
				return err
			}
		}
	}
	if r.dry {
		return r.stopped()
	}
	if err := r.settleTouched(); err != nil {
		return err
	}
	for _, d := range dests {
		if err := d.finishModes(); err != nil {
			return err
		}
	}
	for _, d := range dests {
		if err := syncfs(d.root.fd); err != nil {
			return &StoppedError{Path: d.path, Err: fmt.Errorf("write to disk: %w", err)}
		}
	}
	return r.stopped()
}

// result collects what the run has to tell.
func (r *run) result(dests []*dest, start, now time.Time) *Result {
	res := &Result{Warnings: r.warnings, Elapsed: now.Sub(start)}
	for _, d := range dests {
		res.DataSets = append(res.DataSets, d.res)
	}
	res.Buckets = r.buckets
	for path, a := range r.asides {
		if a.r != nil {
			res.Aside = append(res.Aside, path)
			a.close()
		}
	}
	return res
}

func closeAll(dests []*dest) {
	for _, d := range dests {
		if d.root != nil {
			unix.Close(d.root.fd)
		}
	}
}

// Run restores what the plan says. The result is valid beside an error as well.
//
// Errors: those of Plan.Check; *StoppedError if it could not go on, e.g. because the disk is full;
// *IncompleteError if all but single entries were restored; the cause of ctx.
func Run(ctx context.Context, r Repo, p *Plan) (*Result, error) {
	if err := p.Check(ctx); err != nil {
		return nil, err
	}
	if err := p.checkBuckets(ctx); err != nil {
		return nil, err
	}
	q := *p
	q.repo = r
	return q.run(ctx, false)
}

func (p *Plan) run(ctx context.Context, sizeOnly bool) (res *Result, err error) {
	o := p.o
	start := o.Now()
	r := newRun(ctx, p.repo, &o)
	defer r.cancel(nil)
	r.tree, r.view, r.sizeOnly = p.tree, p.view, sizeOnly
	markers := map[*Target]*marker{}
	for _, t := range p.Targets {
		if t.outer != nil {
			continue
		}
		old := findMarker(t)
		m := &marker{
			Note:    "A restore by Holdfast to this place is not finished. Run it again to complete it.",
			Tree:    p.tree,
			Started: start.UTC(),
		}
		if old != nil {
			r.trustTimes = false
			m.Empty = old.Empty && old.Tree == p.tree
		} else {
			if m.Empty, err = isEmpty(t); err != nil {
				return nil, err
			}
			m.fresh = m.Empty
		}
		markers[t] = m
		if r.dry {
			continue
		}
		if err := os.MkdirAll(filepath.Dir(t.path), 0o755); err != nil {
			return nil, err
		}
		if err := writeMarker(t, m); err != nil {
			if !t.single() && os.Mkdir(t.path, 0o700) == nil {
				err = writeMarker(t, m)
			}
			if err != nil {
				return nil, fmt.Errorf("prepare destination %s: %w", t.path, err)
			}
		}
	}
	var entries, bytes int64
	for _, t := range p.Targets {
		entries += t.Entries
		bytes += t.Bytes
		if t.objects != nil {
			entries += t.objects.Entries
			bytes += t.objects.Bytes
		}
	}
	stop := r.report(entries, bytes)
	defer stop()
	var dests []*dest
	defer func() { closeAll(dests) }()
	err = func() error {
		byTarget := map[*Target]*dest{}
		for _, t := range p.Targets {
			d, err := p.open(r, t, byTarget[t.outer], markers[t.group()])
			if err != nil {
				if err := d.fail(t.tree, "", err); err != nil {
					return err
				}
				continue
			}
			byTarget[t] = d
			dests = append(dests, d)
			if err := p.restore(d, t); err != nil {
				return err
			}
		}
		return r.finish(dests)
	}()
	if err != nil { // stop what still runs before the roots are closed
		r.cancel(err)
		_ = r.fill.finish()
		if cause := r.cause(); cause != nil {
			err = cause
		}
		return r.result(dests, start, o.Now()), err
	}
	res = r.result(dests, start, o.Now())
	if r.errCount > 0 {
		inc := &IncompleteError{Errors: r.errs, Count: r.errCount}
		for _, m := range markers {
			if !r.dry {
				inc.Marker = m.file
			}
		}
		return res, inc
	}
	if r.dry {
		return res, nil
	}
	for t, m := range markers {
		if err := removeMarker(t, m); err != nil {
			return res, fmt.Errorf("everything is restored, but the marker stays: %w", err)
		}
	}
	return res, nil
}

// removeMarker ends the restore. The time of a root in which the marker lay stays what it is.
func removeMarker(t *Target, m *marker) error {
	dir := filepath.Dir(m.file)
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return err
	}
	if err := os.Remove(m.file); err != nil {
		return err
	}
	if dir == t.path {
		ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, st.Mtim}
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, dir, ts, 0); err != nil {
			return err
		}
	}
	return syncDir(dir)
}

func (p *Plan) restore(d *dest, t *Target) error {
	if t.view != nil {
		return restorePicture(d, t)
	}
	if t.node == nil {
		return restoreStore(d, t.tars, d.run.objectsOf(p, t, d))
	}
	rel := ""
	if t.single() {
		rel = filepath.Base(t.path)
	}
	return walkTree(d, t.node, t.tree, rel)
}

// open makes the destination of t ready. The returned dest is usable for messages with an error
// as well.
func (p *Plan) open(r *run, t *Target, outer *dest, m *marker) (*dest, error) {
	d := &dest{
		run: r, path: t.path, foreign: t.single(), ours: m.Empty,
		res:       &DataSetResult{Name: t.DataSet, Path: t.path},
		protected: map[string]bool{},
	}
	if d.foreign {
		d.path = filepath.Dir(t.path)
	}
	top := t.group().path
	for _, pl := range p.places {
		if rel, ok := strings.CutPrefix(pl.path, t.To+"/"); ok && !d.foreign {
			for rel != "" {
				d.protected[rel] = true
				rel, _ = splitPath(rel)
			}
		}
		if pl.path != top && within(top, pl.path) { // beside the outermost of all, restored or not
			top = pl.path
		}
	}
	d.aside = r.asideAt(top + asideInfix + r.stamp)
	d.asideRel = strings.TrimPrefix(strings.TrimPrefix(d.path, top), "/")
	if !within(d.path, top) { // a single file beside which the folder goes
		d.asideRel = ""
	}
	var made bool
	var err error
	switch {
	case t.outer != nil && outer == nil:
		return d, fmt.Errorf("it lies in %s, which could not be restored", t.outer.path)
	case outer != nil:
		made, err = d.openBelow(outer, strings.TrimPrefix(d.path[len(outer.path):], "/"))
	default:
		made, err = d.openTop()
	}
	d.delta = !made && !m.fresh && !d.absent
	return d, err
}

// openTop opens a root that lies in no other one, and makes it if it is missing.
func (d *dest) openTop() (made bool, err error) {
	parent, name := filepath.Dir(d.path), filepath.Base(d.path)
	pfd, err := unix.Open(parent, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		if d.run.dry && err == unix.ENOENT {
			d.absent = true
			return true, nil
		}
		return false, fmt.Errorf("open folder %s: %w", parent, err)
	}
	defer unix.Close(pfd)
	fd, err := openSubdir(pfd, name)
	if d.path == "/" {
		fd, err = openat(pfd, ".", unix.O_RDONLY|unix.O_DIRECTORY)
	}
	if err == unix.ENOTDIR || err == unix.ELOOP { // allowed by Check: a file to be moved aside
		if d.run.dry {
			d.moved("")
			d.absent = true
			return true, nil
		}
		if err := d.aside.take(pfd, name, name); err != nil {
			return false, fmt.Errorf("move aside to %s: %w", d.aside.path, err)
		}
		d.moved("")
		err = unix.ENOENT
	}
	if err == unix.ENOENT {
		if d.run.dry {
			d.absent = true
			return true, nil
		}
		mode := uint32(0o700)
		if d.foreign {
			mode = 0o755
		}
		d.root, err = makeDir(pfd, name, mode)
		return true, err
	}
	if err != nil {
		return false, fmt.Errorf("open folder: %w", err)
	}
	d.root = &root{fd: fd}
	return false, nil
}

func makeDir(parent int, name string, mode uint32) (*root, error) {
	if err := unix.Mkdirat(parent, name, mode); err != nil {
		return nil, fmt.Errorf("make folder: %w", err)
	}
	fd, err := openSubdir(parent, name)
	if err != nil {
		return nil, fmt.Errorf("open folder: %w", err)
	}
	return &root{fd: fd}, nil
}

// openBelow opens a root that lies in another one, under the same rules as all that is in it: no
// symbolic link on the way, whether the snapshot or somebody else put it there.
func (d *dest) openBelow(outer *dest, rel string) (made bool, err error) {
	if outer.absent {
		d.absent = true
		return true, nil
	}
	fd, err := openat(outer.root.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return false, err
	}
	at := ""
	for rel != "" {
		var name string
		name, rel, _ = strings.Cut(rel, "/")
		next, err := openSubdir(fd, name)
		made = false
		if err == unix.ENOENT && d.run.dry {
			unix.Close(fd)
			d.absent = true
			return true, nil
		}
		if err == unix.ENOENT {
			mode := uint32(0o755)
			if rel == "" && !d.foreign { // its own entry gives it its mode
				mode = 0o700
			}
			if err = outer.touch(at, fd); err == nil {
				var r *root
				if r, err = makeDir(fd, name, mode); err == nil {
					next, made = r.fd, true
				}
			}
		}
		if isNoDir(err) {
			err = refused("%q is no folder, and data set %s has its place below it", outer.show(joinPath(at, name)), d.res.Name)
		}
		unix.Close(fd)
		if err != nil {
			return false, err
		}
		fd, at = next, joinPath(at, name)
	}
	if d.foreign {
		if err := outer.touch(at, fd); err != nil {
			unix.Close(fd)
			return false, err
		}
	}
	d.root = &root{fd: fd}
	return made, nil
}
