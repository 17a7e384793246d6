// Package capture reads one still picture of an instance into the repository: config and system data
// as plain files, each store as tars of its entries beside the spaces as users see them. While it
// reads it proves: every blob that metadata names must be there, with the size and the checksum that
// the server recorded.
//
// Start at [Run], or at [New] where a part of the picture holds still longer than the rest. The tree of
// a snapshot depends on the data alone: two captures of the same picture give the same tree.
package capture

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/holdfast-backup/holdfast/internal/cpus"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Repository is what capture needs of the repository.
type Repository interface {
	ChunkerSeed() [32]byte
	Has(t repo.BlobType, d id.ID) bool
	LoadBlob(ctx context.Context, t repo.BlobType, d id.ID, buf []byte) ([]byte, error)
}

// Options say what to capture. The zero value of each field is a sensible default.
type Options struct {
	Instance *ocis.Instance
	// View, PictureAt and Unchanged are those of the one Part that Run reads.
	View      func(path string) string
	PictureAt time.Time
	Unchanged func(dir string) bool
	// Exclude names data sets to leave out.
	Exclude map[string]bool
	// Cache is what the last run remembered; it is replaced by Result.Cache.
	Cache *Cache
	// Known is what the trees of the last snapshot say of blobs, for where the cache knows nothing.
	Known *Known
	// FullScan reads everything again and uses nothing of the last run.
	FullScan bool
	// Warm captures a running instance for the sake of the cache and of what is stored: what changes
	// meanwhile is passed over without a word, and the result must not become a snapshot.
	Warm bool
	// Objects says of each store whose blobs lie in a bucket how to secure them, by its name.
	Objects map[string]*Objects
	// Software files to keep: place below /software -> what to read.
	Software map[string]SoftwareFile
	Limits   Limits
	Progress progress.Sink
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// Limits bound the memory that a capture takes. Zero stands for the default of each.
type Limits struct {
	// Workers is how many groups and files are read at once, each with up to 9 MiB of buffers; 0: twice the processors,
	// which keeps the disk busy, up to 16.
	Workers int
	// Compressors is how many chunks are compressed at once, each with up to 10 MiB; 0: one for each processor, since more
	// would only cost memory.
	Compressors int
	// Spaces is how many spaces are read at once, each with tables of its nodes and blobs; 0: 3, because each has moments in
	// which it waits for its last file.
	Spaces int
	// Ahead is how many entries of a tree are listed before they are wanted, about 300 bytes each; 0: 65,536.
	Ahead int
	// Look is how many bytes of the cache, some 70 for each entry of a space, may be compared with spaces at once, where those are more than
	// may be read at once; 0: 32 MiB.
	Look int64
}

func (l *Limits) setDefaults() {
	if l.Workers <= 0 {
		l.Workers = min(2*cpus.Count(), 16)
	}
	if l.Compressors <= 0 {
		l.Compressors = cpus.Count()
	}
	if l.Spaces <= 0 {
		l.Spaces = 3
	}
	if l.Ahead <= 0 {
		l.Ahead = 64 << 10
	}
	if l.Look <= 0 {
		l.Look = 32 << 20
	}
}

// SoftwareFile is a file on disk, or bytes, or a stream.
type SoftwareFile struct {
	Path string
	Data []byte
	Open func(ctx context.Context) (io.ReadCloser, error)
}

// Part is what one call of Read takes. The zero value is all that was not read yet, where it lies.
type Part struct {
	// Has tells which data sets and stores belong to it, by the place of their root in the instance;
	// nil: all that were not read yet, and what is no data: the environment, the software.
	Has func(root string) bool
	// View translates a path of the instance to the place where its still picture is; nil: itself.
	View func(path string) string
	// PictureAt is when the picture was made; zero: it is being made, everything holds still.
	PictureAt time.Time
	// Unchanged reports whether nothing below the directory dir of the instance was changed since the
	// capture that made Cache began, which must have been in this process. It is called concurrently. nil: that is not known.
	Unchanged func(dir string) bool
}

// Result is what a capture made. Root, the manifest and the README are not written yet: see Finish.
type Result struct {
	Manifest snapshot.Manifest
	Stats    Stats
	Cache    *Cache
	root     *folder
	c        *capturer
}

// Stats counts what was looked at.
type Stats struct {
	Entries   int64 // file system entries
	Files     int64 // user files, versions and trashed files, and plain files
	Dirs      int64
	Bytes     int64 // bytes of all files in the snapshot
	BytesRead int64 // bytes that were read from the source
	// DirsListed counts the directories of stores that were listed; the others had not changed.
	DirsListed int64
	// EntriesTaken counts the entries of stores that were taken over without a look, because the kernel or the
	// file system told that they are what they were.
	EntriesTaken int64
	// EntriesPassed counts the entries below folders that were passed over as a whole, since nothing in them differs.
	EntriesPassed int64
}

// capturer is the state of one run.
type capturer struct {
	opts   Options
	repo   Repository
	target Target
	saver  *saver
	slots  chan struct{}
	// looking bounds what is compared with spaces, in bytes of the cache, and reading how many spaces are read.
	looking, reading *semaphore.Weighted

	part    Part // that is being read, View is set
	viewed  bool
	started time.Time
	root    *folder
	sets    map[int]snapshot.DataSet // what was read, by its place in the instance
	found   map[int]snapshot.Store
	buckets map[int]snapshot.DataSet // the blobs of a store, if they lie in a bucket
	kept    *snapshot.Software

	entries   atomic.Int64
	files     atomic.Int64
	dirs      atomic.Int64
	bytes     atomic.Int64
	bytesRead atomic.Int64
	listed    atomic.Int64
	taken     atomic.Int64
	passed    atomic.Int64

	mu    sync.Mutex
	proof snapshot.Proof
	next  *Cache
}

// Run captures everything but the manifest in one go.
func Run(ctx context.Context, r Repository, t Target, o Options) (*Result, error) {
	c := New(r, t, o)
	if err := c.Read(ctx, Part{View: o.View, PictureAt: o.PictureAt, Unchanged: o.Unchanged}); err != nil {
		return nil, err
	}
	return c.Result(), nil
}

// A Capture reads one picture in parts. It is for one goroutine.
type Capture struct{ c *capturer }

// New begins a capture and reads nothing.
func New(r Repository, t Target, o Options) *Capture {
	o.Limits.setDefaults()
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Cache == nil {
		o.Cache = newCache()
	}
	c := &capturer{
		opts: o, repo: r, target: t,
		slots:   make(chan struct{}, o.Limits.Workers),
		looking: semaphore.NewWeighted(o.Limits.Look), reading: semaphore.NewWeighted(int64(o.Limits.Spaces)),
		root: newFolder(), sets: map[int]snapshot.DataSet{}, found: map[int]snapshot.Store{}, buckets: map[int]snapshot.DataSet{},
		next: newCache(),
	}
	c.next.out = o.Cache.out
	c.saver = newSaver(t, r.ChunkerSeed(), &c.bytesRead, o.Limits, c.slots)
	c.proof.Missing = []snapshot.Missing{}
	return &Capture{c}
}

// Read reads a part. After an error the capture is of no more use.
func (c *Capture) Read(ctx context.Context, p Part) error { return c.c.read(ctx, p) }

func (c *capturer) read(ctx context.Context, p Part) error {
	c.viewed = p.View != nil
	if p.View == nil {
		p.View = func(p string) string { return p }
	}
	c.part, c.started = p, c.opts.Now()
	if !p.PictureAt.IsZero() {
		c.started = p.PictureAt
	}
	stop := c.report(ctx)
	defer stop()
	if err := c.plainData(ctx); err != nil {
		return err
	}
	if err := c.stores(ctx); err != nil {
		return err
	}
	if p.Has != nil {
		return nil
	}
	if err := c.environment(ctx); err != nil {
		return err
	}
	return c.software(ctx)
}

// wanted tells whether the data set or store i at root is to be read now.
func (c *capturer) wanted(root string, read bool) bool {
	return !read && (c.part.Has == nil || c.part.Has(root))
}

// Result tells what was read. What was not is not in it, but for what the cache knows of it.
func (c *Capture) Result() *Result { return c.c.result() }

func (c *capturer) result() *Result {
	inst := c.opts.Instance
	m := snapshot.Manifest{
		Product: string(inst.Product), ProductVersion: inst.Version, Setup: inst.Setup,
		BasePath: inst.BasePath, ConfigDir: inst.ConfigDir, URL: inst.URL, Stores: []snapshot.Store{}, Software: c.kept,
	}
	// Plain data first, then store by store.
	for i := range inst.DataSets {
		if d := &inst.DataSets[i]; d.Store == "" {
			m.DataSets = append(m.DataSets, c.described(i))
			if _, read := c.sets[i]; !read {
				c.next.carryPlain(c.opts.Cache, d.Name)
			}
		}
	}
	for k := range inst.Stores {
		for i := range inst.DataSets {
			if inst.DataSets[i].Store == inst.Stores[k].Name {
				m.DataSets = append(m.DataSets, c.described(i))
			}
		}
		if md, ok := c.buckets[k]; ok {
			m.DataSets = append(m.DataSets, md)
		}
		if s, ok := c.found[k]; ok {
			m.Stores = append(m.Stores, s)
		} else {
			c.next.carryStore(c.opts.Cache, inst.Stores[k].Name)
		}
	}
	c.judge(&m)
	m.Proof = c.proof
	return &Result{
		Manifest: m, root: c.root, c: c, Cache: c.next,
		Stats: Stats{
			Entries: c.entries.Load(), Files: c.files.Load(), Dirs: c.dirs.Load(),
			Bytes: c.bytes.Load(), BytesRead: c.bytesRead.Load(), DirsListed: c.listed.Load(), EntriesTaken: c.taken.Load(), EntriesPassed: c.passed.Load(),
		},
	}
}

// described is what the manifest says of the data set i.
func (c *capturer) described(i int) snapshot.DataSet {
	if md, ok := c.sets[i]; ok {
		return md
	}
	return manifestDataSet(&c.opts.Instance.DataSets[i])
}

// Finish writes the manifest and the README, and returns the root tree. The caller has filled in what
// capture does not know: the version, the freeze, the views.
func (res *Result) Finish(ctx context.Context, readme []byte) (id.ID, error) {
	p, err := json.MarshalIndent(&res.Manifest, "", "  ")
	if err != nil {
		return id.ID{}, fmt.Errorf("write manifest: %w", err)
	}
	for name, data := range map[string][]byte{"manifest.json": append(p, '\n'), "README.md": readme} {
		n, err := res.c.dataNode(ctx, name, data)
		if err != nil {
			return id.ID{}, err
		}
		res.root.kids[name] = n
	}
	n, err := res.root.save(ctx, res.c.target, "")
	if err != nil {
		return id.ID{}, err
	}
	return n.Subtree, nil
}

// dataNode saves data as a file that no source has.
func (c *capturer) dataNode(ctx context.Context, name string, data []byte) (*snapshot.Node, error) {
	got, err := c.saver.bytes(ctx, data)
	if err != nil {
		return nil, fmt.Errorf("save %s: %w", name, err)
	}
	return &snapshot.Node{
		Name: name, Type: snapshot.File, Mode: 0o600, ModTime: time.Unix(0, 0).UTC(),
		Size: uint64(got.size), Content: got.ids,
	}, nil
}

// racy reports whether one of the entries was changed so shortly before the scan that another change
// could bear the same time: such a group is read again the next time.
func (c *capturer) racy(entries []entry) bool {
	for i := range entries {
		if c.racyTime(entries[i].ctime) {
			return true
		}
	}
	return false
}

// racyWindow is more than the granularity of the coarsest file system times in use (2 s on FAT, which
// cannot hold a store; 1 s on old NFS servers).
const racyWindow = time.Second

// now is when the picture was made that is being read.
func (c *capturer) now() timespec { return timespec{c.started.Unix(), int64(c.started.Nanosecond())} }

func (c *capturer) racyTime(t timespec) bool {
	limit := c.started.Add(-racyWindow)
	return !t.before(timespec{limit.Unix(), int64(limit.Nanosecond())})
}

// hasAll reports whether the repository holds all these data blobs.
func (c *capturer) hasAll(ids []id.ID) bool {
	for i := range ids {
		if !c.repo.Has(repo.DataBlob, ids[i]) {
			return false
		}
	}
	return true
}

func (c *capturer) unreadable(what string, err error) {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return // the end of the run, not of the file
	}
	if c.opts.Warm {
		return
	}
	c.mu.Lock()
	c.proof.Unreadable = append(c.proof.Unreadable, snapshot.Unreadable{Path: what, Error: err.Error()})
	c.mu.Unlock()
	c.warn("cannot read %s: %v", what, err)
}

func (c *capturer) warn(format string, args ...any) {
	if c.opts.Warm {
		return
	}
	c.opts.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "capture", Message: fmt.Sprintf(format, args...)})
}

// report emits the counters until stop is called.
func (c *capturer) report(ctx context.Context) (stop func()) {
	if c.opts.Progress == nil {
		return func() {}
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	emit := func(k progress.Kind) {
		c.opts.Progress.Emit(progress.Event{
			Kind: k, Phase: "capture", Unit: "entries", Done: c.entries.Load(), Bytes: c.bytesRead.Load(),
		})
	}
	emit(progress.Start)
	wg.Go(func() {
		t := time.NewTicker(250 * time.Millisecond)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				emit(progress.Update)
			case <-done:
				return
			case <-ctx.Done():
				return
			}
		}
	})
	return func() {
		close(done)
		wg.Wait()
		emit(progress.Finish)
	}
}

// nested returns the function that leaves out, below dir, what belongs to other data sets, and the paths
// of those. The function is nil if there are none.
func (c *capturer) nested(dir string) (skip func(rel string) bool, below []string) {
	dir = filepath.Clean(dir)
	for _, d := range c.opts.Instance.DataSets {
		if p := filepath.Clean(d.Path); p != dir {
			if rel, ok := strings.CutPrefix(p, strings.TrimSuffix(dir, "/")+"/"); ok {
				below = append(below, rel)
			}
		}
	}
	if len(below) == 0 {
		return nil, nil
	}
	sort.Strings(below)
	return func(rel string) bool {
		i := sort.SearchStrings(below, rel)
		return i < len(below) && below[i] == rel
	}, below
}

// judge decides whether the snapshot is complete: all four kinds of data, every blob.
func (c *capturer) judge(m *snapshot.Manifest) {
	p := &c.proof
	sort.Slice(p.Missing, func(i, j int) bool {
		a, b := &p.Missing[i], &p.Missing[j]
		if a.Space != b.Space {
			return a.Space < b.Space
		}
		if a.Path != b.Path {
			return a.Path < b.Path
		}
		return a.BlobID < b.BlobID
	})
	sort.Slice(p.Unreadable, func(i, j int) bool { return p.Unreadable[i].Path < p.Unreadable[j].Path })
	kinds := map[string]bool{}
	for _, d := range m.DataSets {
		if d.Captured {
			kinds[d.Kind] = true
		} else if d.Class == string(ocis.Required) {
			p.NotCaptured = append(p.NotCaptured, d.Name)
		}
	}
	for _, k := range []ocis.Kind{ocis.Config, ocis.System, ocis.Metadata, ocis.Blobs} {
		if !kinds[string(k)] {
			p.NotCaptured = append(p.NotCaptured, "all "+string(k)+" data")
		}
	}
	p.Complete = len(p.Missing) == 0 && len(p.Unreadable) == 0 && len(p.NotCaptured) == 0
}

// software saves what runs the instance.
func (c *capturer) software(ctx context.Context) error {
	sw := c.opts.Instance.Software
	out := snapshot.Software{BinaryPath: sw.Binary, Image: sw.Image, ImageDigest: sw.ImageDigest}
	f := c.root.sub("software")
	for name, file := range c.opts.Software {
		if file.Open != nil {
			n, err := c.streamNode(ctx, name, file.Open)
			if err != nil {
				return fmt.Errorf("save the software (%s): %w", name, err)
			}
			f.put(n, "")
			out.ImageFile = "/software/" + name
			continue
		}
		if file.Path == "" {
			n, err := c.dataNode(ctx, name, file.Data)
			if err != nil {
				return err
			}
			f.put(n, "")
			continue
		}
		n, err := c.singleFile(ctx, c.part.View(file.Path), name)
		if err != nil {
			return fmt.Errorf("save the software: %w", err)
		}
		f.put(n, "")
		out.Binary, out.BinaryPath = "/software/"+name, file.Path
	}
	if out != (snapshot.Software{}) {
		c.kept = &out
	}
	return nil
}

// streamNode saves what open gives as a file.
func (c *capturer) streamNode(ctx context.Context, name string, open func(context.Context) (io.ReadCloser, error)) (*snapshot.Node, error) {
	rd, err := open(ctx)
	if err != nil {
		return nil, err
	}
	defer rd.Close()
	got, err := c.saver.section(ctx, rd, nil)
	if err != nil {
		return nil, err
	}
	n, err := c.dataNode(ctx, name, nil)
	if err != nil {
		return nil, err
	}
	setContent(n, got)
	return n, nil
}

// singleFile saves one file as a node called name.
func (c *capturer) singleFile(ctx context.Context, file, name string) (*snapshot.Node, error) {
	r, err := openRoot(filepath.Dir(file))
	if err != nil {
		return nil, err
	}
	defer r.close()
	e, err := r.stat(filepath.Base(file))
	if err != nil {
		return nil, err
	}
	d := newDetails(r)
	defer d.close()
	n, err := plainNode(d, &e, name)
	if err != nil {
		return nil, err
	}
	if e.isRegular() {
		got, err := c.saver.path(ctx, r, &e, false)
		if err != nil {
			return nil, err
		}
		setContent(n, got)
	}
	c.files.Add(1)
	c.bytes.Add(int64(n.Size))
	return n, nil
}

// stores captures the storage roots of this part.
func (c *capturer) stores(ctx context.Context) error {
	inst := c.opts.Instance
	for _, d := range inst.DataSets {
		if d.Store != "" && inst.Store(d.Store) == nil {
			return fmt.Errorf("data set %s belongs to a store %q that is not known", d.Name, d.Store)
		}
	}
	for k := range inst.Stores {
		s := &inst.Stores[k]
		if _, read := c.found[k]; !c.wanted(s.Root, read) {
			continue
		}
		var sets []int
		found := false
		for i := range inst.DataSets {
			if d := &inst.DataSets[i]; d.Store == s.Name {
				sets = append(sets, i)
				found = found || d.Found
			}
		}
		if !found {
			continue
		}
		ms := snapshot.Store{Name: s.Name, Root: s.Root, Driver: s.Driver, Layout: string(s.Layout), Prefix: s.Prefix, Spaces: []snapshot.Space{}}
		var objects *Objects
		if s.S3 != nil {
			if objects = c.opts.Objects[s.Name]; objects == nil {
				return fmt.Errorf("the blobs of store %s lie in a bucket, and nothing says how to reach it", s.Name)
			}
			ms.Bucket = objects.record()
		}
		sc, err := c.newStore(s)
		if err != nil {
			return err
		}
		mark := sc.askChanges(ctx)
		f, err := sc.run(ctx, &ms)
		sc.root.close()
		if err != nil {
			return fmt.Errorf("capture store %s (%s): %w", s.Name, s.Root, err)
		}
		c.root.sub("storage").folders[s.Name] = f
		c.found[k] = ms
		if mark != "" {
			c.next.marks[s.Name] = mark
		}
		for _, i := range sets {
			d := &inst.DataSets[i]
			md := manifestDataSet(d)
			md.Captured = d.Found
			switch {
			case !d.Found:
			case d.Kind == ocis.Blobs:
				md.Entries, md.Bytes = sc.counts.blobEntries, sc.counts.blobBytes
			default:
				md.Entries, md.Bytes = sc.counts.metaEntries, sc.counts.metaBytes
			}
			c.sets[i] = md
		}
		if objects != nil { // no path of the instance leads there, so no data set does
			c.buckets[k] = snapshot.DataSet{
				Name: "storage-" + s.Name + "-blobs", Kind: string(ocis.Blobs), Path: s.Root, Class: string(ocis.Required), Store: s.Name,
				Tree: "/storage/" + s.Name, Captured: true, Entries: sc.counts.blobEntries, Bytes: sc.counts.blobBytes,
			}
		}
	}
	return nil
}

func manifestDataSet(d *ocis.DataSet) snapshot.DataSet {
	md := snapshot.DataSet{
		Name: d.Name, Kind: string(d.Kind), Path: d.Path, ServerPath: d.ServerPath, Class: string(d.Class),
		Filesystem: d.Filesystem, Entries: d.Entries, Bytes: d.Bytes, Store: d.Store,
	}
	if d.Store != "" {
		md.Tree = "/storage/" + d.Store
	}
	return md
}

// group of goroutines with the run's limit on how many things go on at once.
func (c *capturer) errgroup(ctx context.Context, limit int) (*errgroup.Group, context.Context) {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(limit)
	return g, gctx
}

// beginReading waits until another space may be read, beside those that are. done must be called.
func (c *capturer) beginReading(ctx context.Context) (done func(), err error) {
	if err := c.reading.Acquire(ctx, 1); err != nil {
		return nil, context.Cause(ctx)
	}
	return func() { c.reading.Release(1) }, nil
}

// inSnapshot joins the parts of a path in the snapshot.
func inSnapshot(parts ...string) string { return path.Join(append([]string{"/"}, parts...)...) }
