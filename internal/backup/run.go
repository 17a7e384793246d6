// Package backup tells the whole first line of the flow in one function: freeze, view, capture, prove,
// thaw, commit. The command and whatever else starts backups call [Run].
package backup

import (
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/docker"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/fschange"
	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/replica"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

//go:embed README.snapshot.md
var readme []byte

// DefaultTargetDowntime is little beside the server's own stop and start. A pass more costs nobody
// anything but a moment of the processor, while the service runs.
const DefaultTargetDowntime = time.Second

// Options of one backup. Repo must be locked and its index loaded.
type Options struct {
	Instance *ocis.Instance
	Repo     *repo.Repository
	Freezer  freeze.Freezer
	// Guard configures the process that starts the instance again if this one dies.
	Guard freeze.Options
	// CacheDir holds what the last run remembered, per repository; "" keeps nothing.
	CacheDir                        string
	ExcludeIndex, ExcludeThumbnails bool
	ServerBinary                    string // overrides what discover found
	SaveImage                       bool
	Hostname                        string
	Tags                            []string
	// Views are the drivers that may hold the data still while the service runs again. What they cannot
	// hold still is read during the freeze.
	Views []fssnap.Driver
	// KeepViews leaves the last views on the file systems, as a fast way back.
	KeepViews int
	// Cold leaves out the warm copy: what is read while the service still runs, so that the freeze
	// has to take only what changed since.
	Cold bool
	// TargetDowntime ends the warm copy: a pass that takes less is good enough. Zero: DefaultTargetDowntime.
	TargetDowntime time.Duration
	// Blobs says how a bucket is secured, if the blobs lie in one.
	Blobs BlobOptions
	// DryRun reads and proves, and writes nothing into the repository.
	DryRun bool
	// FullScan uses nothing of the last run.
	FullScan bool
	// Limits bound the memory.
	Limits   capture.Limits
	Progress progress.Sink
	Version  string // of Holdfast
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// Result tells what was made. With a dry run SnapshotID is null.
type Result struct {
	SnapshotID id.ID
	Parent     *id.ID
	Manifest   snapshot.Manifest
	Stats      Stats
}

// Stats of one backup. Sizes are bytes.
type Stats struct {
	Entries, Files, Dirs, Bytes     int64
	BytesRead                       int64
	EntriesTaken                    int64 // of Entries: taken over without a look, see capture.Stats
	NewBlobs, NewBytes, StoredBytes int64
	Duration                        time.Duration
}

// Run makes one snapshot. A snapshot whose proof is not complete is kept and named so: look at
// Result.Manifest.Proof.
//
// Errors: *freeze.BusyError if the instance runs although it must not; *HotError if it was to run and
// must not; *fssnap.LossyViewError if a view lost something; freeze.ErrNotStarted if the instance did not come back, also beside a Result: the
// snapshot is good then.
func Run(ctx context.Context, o Options) (*Result, error) {
	b, err := prepare(ctx, &o)
	if err != nil {
		return nil, err
	}
	defer b.closeBuckets()
	defer func() { b.cache.Close() }()
	// Which data sets can be held still by views, and which must be copied while nothing writes.
	if err := b.planViews(ctx); err != nil {
		return nil, err
	}
	defer func() { b.closeViews(ctx) }()
	defer func() { b.watches.close() }()
	b.adopt(ctx)
	if err := b.warm(ctx); err != nil {
		return nil, err
	}

	if o.Freezer.Method() != freeze.KindNone || len(o.Views) > 0 {
		if err := o.Repo.Settled(ctx); err != nil {
			return nil, err
		}
	}
	// A view is made at once, and may show inside the instance; reading may begin while it is proven that nothing runs.
	o.Guard.ReadOnly = len(o.Views) == 0
	o.Guard.Own = []string{o.CacheDir, o.Repo.Location()}
	// From here to the thaw the service may be down: nothing that can wait is done in between.
	rec, down := freeze.Guarded(ctx, o.Freezer, o.Instance, o.Guard, func(ctx context.Context) error {
		if err := b.makeViews(ctx); err != nil {
			return err
		}
		if err := b.readFrozen(ctx); err != nil {
			return err
		}
		b.taken = true
		return nil
	})
	// A service that did not come back is reported, but what was taken is taken.
	if down != nil && !(errors.Is(down, freeze.ErrNotStarted) && b.taken && ctx.Err() == nil) {
		return nil, down
	}

	if err := b.readRest(ctx); err != nil {
		return nil, errors.Join(err, down)
	}
	got := b.capture.Result()
	m := &got.Manifest
	m.Holdfast, m.Freeze, m.Views = o.Version, FreezeRecord(rec), b.viewRecords()
	res, err := b.commit(ctx, got)
	if err != nil {
		return nil, errors.Join(err, down)
	}
	b.remember(res, got.Cache)
	return res, down
}

// adopt uses what an interrupted run has stored and could not enter in the index. Without it the same
// is stored again, so a failure is no reason to give up.
func (b *run) adopt(ctx context.Context) {
	if b.o.DryRun {
		return
	}
	got, err := b.o.Repo.AdoptPacks(ctx)
	switch {
	case err != nil && ctx.Err() == nil:
		b.o.Progress.Emit(progress.Event{Kind: progress.Warning, Message: fmt.Sprintf("cannot use what an interrupted run has stored; it is stored again: %v", err)})
	case got.Packs > 0:
		b.o.Progress.Emit(progress.Event{Kind: progress.Verbose, Message: fmt.Sprintf("using %d packs (%d bytes) that an interrupted run has stored", got.Packs, got.Bytes)})
	}
}

// run is the state of one backup.
type run struct {
	o         *Options
	start     time.Time
	paths     []string
	parent    *snapshot.Snapshot
	cachePath string
	cache     *capture.Cache
	known     *capture.Known
	software  map[string]capture.SoftwareFile
	writer    *repo.Writer // nil: dry run
	dry       *dryTarget
	views     views
	watches   *watches // of what the warm copy has read; nil: none
	capture   *capture.Capture
	taken     bool // the picture is complete: what is not read yet, views hold still
	objects   map[string]*capture.Objects
	replicas  []*replica.Member
}

// prepare does what can be done while the service runs.
func prepare(ctx context.Context, o *Options) (*run, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	b := &run{o: o, start: o.Now(), paths: sourcePaths(o.Instance)}
	var err error
	if b.parent, err = findParent(ctx, o.Repo, o.Hostname, b.paths); err != nil {
		o.warn("%v", err)
	}
	b.cachePath = cachePath(o.CacheDir, o.Repo.ID(), o.Hostname, o.Instance)
	b.cache = loadCache(o, b.cachePath)
	if b.parent != nil && !b.cache.Knows(b.parent.ID()) && !o.FullScan {
		if b.known, err = capture.LoadKnown(ctx, o.Repo, b.parent, o.Progress); err != nil {
			return nil, err
		}
	}
	if b.software, err = softwareFiles(o); err != nil {
		return nil, err
	}
	if err = b.openBuckets(ctx); err != nil {
		b.closeBuckets()
		b.cache.Close()
		return nil, err
	}
	b.distrustCache()
	if o.DryRun {
		b.dry = &dryTarget{repo: o.Repo}
	} else {
		b.writer = o.Repo.NewWriter(ctx)
	}
	return b, nil
}

func (b *run) target() capture.Target {
	if b.dry != nil {
		return b.dry
	}
	return b.writer
}

// newCapture begins a capture with what this run knows of the last one.
func (b *run) newCapture(warm bool) *capture.Capture {
	o := b.o
	return capture.New(o.Repo, b.target(), capture.Options{
		Instance: o.Instance, Exclude: excluded(o), Software: b.software, Cache: b.cache, Known: b.known, Objects: b.objects,
		FullScan: o.FullScan, Limits: o.Limits, Warm: warm, Progress: o.Progress, Now: o.Now,
	})
}

// warm copies what has no view while the service runs, again and again as long as it helps: blobs are
// written once, so what is stored now need not be read during the freeze. It makes no snapshot. What it
// reads of files that change meanwhile is of no use and does no harm: the frozen pass compares everything
// again.
func (b *run) warm(ctx context.Context) error {
	o := b.o
	if o.Cold || o.DryRun || o.FullScan || b.views.all() && len(b.objects) == 0 || o.Freezer.Method() == freeze.KindNone {
		return nil
	}
	// So that the frozen pass need not look at what nobody touched in the meantime.
	var why error
	if b.watches, why = startWatches(o.Instance, b.views.cold); why != nil {
		o.Progress.Emit(progress.Event{Kind: progress.Verbose, Phase: "warm", Message: "no watch: " + why.Error()})
	}
	// The file systems that list changes do so of what is on disk. Little is left to be written then.
	defer func() {
		for i := range o.Instance.Stores {
			if s := &o.Instance.Stores[i]; b.views.cold(s.Root) {
				fschange.Prepare(s.Root)
			}
		}
	}()
	return repeat(cmp.Or(o.TargetDowntime, DefaultTargetDowntime), time.Now, func(pass int) (bool, error) {
		began := time.Now()
		c := b.newCapture(true)
		// Objects that are deleted after the views are made can no longer be read.
		has := func(root string) bool { return b.views.cold(root) || b.hasBucket(root) }
		err := c.Read(ctx, capture.Part{Has: has, Unchanged: b.watches.begin()})
		if errors.Is(err, fs.ErrNotExist) && ctx.Err() == nil {
			return false, nil // a space was removed in the middle: what was copied until then is still of use
		}
		if err == nil {
			// Durable and in the index, so that the next pass can count on it.
			err = b.writer.Flush(ctx)
		}
		if err != nil {
			return false, fmt.Errorf("warm copy: %w", err)
		}
		b.watches.end()
		got := c.Result()
		b.cache = got.Cache
		o.Progress.Emit(progress.Event{Kind: progress.Verbose, Phase: "warm",
			Message: fmt.Sprintf("warm pass %d took %.1f s and read %d bytes", pass, time.Since(began).Seconds(), got.Stats.BytesRead)})
		return true, nil
	})
}

// repeat makes passes until one takes no longer than target, which is what the frozen pass may take, or
// is not at least a quarter shorter than the one before: then it is the scan that takes the time, or the
// service writes as fast as we read. It ends, because times shrink below any target. A pass that returns
// false is the last one.
func repeat(target time.Duration, now func() time.Time, pass func(n int) (bool, error)) error {
	last := time.Duration(math.MaxInt64)
	for n := 1; ; n++ {
		began := now()
		again, err := pass(n)
		took := now().Sub(began)
		if err != nil || !again || took <= target || took > last/4*3 {
			return err
		}
		last = took
	}
}

// readFrozen reads what has no view while nothing writes.
func (b *run) readFrozen(ctx context.Context) error {
	b.capture = b.newCapture(false)
	if b.views.all() {
		return nil
	}
	return b.capture.Read(ctx, capture.Part{Has: b.views.cold, Unchanged: b.watches.begin()})
}

// readRest reads the views after the thaw, and what is no data: the environment, the software.
func (b *run) readRest(ctx context.Context) error {
	v := &b.views
	if err := b.capture.Read(ctx, capture.Part{View: v.translate, PictureAt: v.madeAt}); err != nil {
		return err
	}
	return v.check(ctx)
}

// commit writes the manifest, makes everything durable, and then the snapshot record: until that is
// there nothing of the backup is visible.
func (b *run) commit(ctx context.Context, got *capture.Result) (*Result, error) {
	o := b.o
	o.Progress.Emit(progress.Event{Kind: progress.Start, Phase: "commit"})
	tree, err := got.Finish(ctx, readme)
	if err != nil {
		return nil, err
	}
	res := &Result{Manifest: got.Manifest}
	st := &res.Stats
	st.Entries, st.Files, st.Dirs, st.Bytes, st.BytesRead = got.Stats.Entries, got.Stats.Files, got.Stats.Dirs, got.Stats.Bytes, got.Stats.BytesRead
	st.EntriesTaken = got.Stats.EntriesTaken
	if b.parent != nil {
		d := b.parent.ID()
		res.Parent = &d
	}
	if b.dry != nil {
		st.NewBlobs, st.NewBytes = b.dry.blobs.Load(), b.dry.bytes.Load()
	} else {
		if err := b.writer.Flush(ctx); err != nil {
			return nil, fmt.Errorf("write the last packs and the index: %w", err)
		}
		// A lock that was lost in the meantime means that another program may have pruned.
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		ws := b.writer.Stats()
		st.NewBlobs = ws.NewBlobs[repo.DataBlob] + ws.NewBlobs[repo.TreeBlob]
		st.NewBytes = ws.PlainBytes[repo.DataBlob] + ws.PlainBytes[repo.TreeBlob]
		st.StoredBytes = ws.StoredBytes[repo.DataBlob] + ws.StoredBytes[repo.TreeBlob]
		sn := &snapshot.Snapshot{
			Time: b.start, Parent: res.Parent, Tree: &tree, Paths: b.paths, Hostname: o.Hostname, Username: userName(),
			UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), Tags: tags(o),
			ProgramVersion: "holdfast " + o.Version,
			Summary: &snapshot.Summary{
				BackupStart: b.start, BackupEnd: o.Now(),
				DataBlobs: int(ws.NewBlobs[repo.DataBlob]), TreeBlobs: int(ws.NewBlobs[repo.TreeBlob]),
				DataAdded: uint64(st.NewBytes), DataAddedPacked: uint64(st.StoredBytes),
				TotalFilesProcessed: uint(st.Files), TotalBytesProcessed: uint64(st.Bytes),
			},
		}
		if err := snapshot.Save(ctx, o.Repo, sn); err != nil {
			return nil, err
		}
		res.SnapshotID = sn.ID()
		b.renewReplicas(ctx)
	}
	b.views.keepFor(res) // only views of a good snapshot are a way back
	st.Duration = o.Now().Sub(b.start)
	o.Progress.Emit(progress.Event{Kind: progress.Finish, Phase: "commit"})
	return res, nil
}

// remember writes the cache for the next run. Failing is no harm.
func (b *run) remember(res *Result, c *capture.Cache) {
	defer c.Close()
	if b.cachePath == "" || b.dry != nil {
		return
	}
	c.Snapshot = res.SnapshotID
	if err := c.Save(b.cachePath); err != nil {
		b.o.warn("the next backup will take longer: %v", err)
	}
}

func (o *Options) warn(format string, args ...any) {
	o.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "backup", Message: fmt.Sprintf(format, args...)})
}

// FreezeRecord is what the manifest says of the freeze. A freeze that stopped nothing has no times, so
// that two captures of one picture give one tree.
func FreezeRecord(r freeze.Record) snapshot.Freeze {
	f := snapshot.Freeze{Method: r.Method}
	if r.Method == freeze.KindViewOnly {
		f.CrashConsistent, f.Warning = true, snapshot.CrashWarning
	}
	if r.Stopped.IsZero() || r.Method == freeze.KindNone {
		return f
	}
	at := func(t time.Time) *time.Time {
		if t.IsZero() {
			return nil
		}
		t = t.UTC()
		return &t
	}
	f.StoppingAt, f.StoppedAt, f.StartedAt, f.ReadyAt = at(r.Stopping), at(r.Stopped), at(r.Started), at(r.Ready)
	f.SecondsStopped = r.Downtime.Seconds()
	f.SecondsStopping, f.SecondsHeld, f.SecondsStarting = r.ForStop.Seconds(), r.ForHold.Seconds(), r.ForStart.Seconds()
	return f
}

// sourcePaths are the paths of the snapshot record: absolute and stable, because other programs group
// snapshots by them.
func sourcePaths(inst *ocis.Instance) []string {
	p := []string{inst.BasePath}
	if inst.ConfigDir != "" && inst.ConfigDir != inst.BasePath {
		p = append(p, inst.ConfigDir)
	}
	slices.Sort(p)
	return p
}

// findParent returns the newest snapshot that Holdfast made of this instance.
func findParent(ctx context.Context, r *repo.Repository, host string, paths []string) (*snapshot.Snapshot, error) {
	list, err := snapshot.List(ctx, r)
	for i := len(list) - 1; i >= 0; i-- {
		s := list[i]
		if s.HasTag(snapshot.Tag) && s.Hostname == host && slices.Equal(s.Paths, paths) {
			return s, nil
		}
	}
	if err != nil {
		return nil, fmt.Errorf("some snapshots cannot be read, so everything is read from the source: %w", err)
	}
	return nil, nil
}

func tags(o *Options) []string {
	t := []string{snapshot.Tag}
	for _, x := range o.Tags {
		if !slices.Contains(t, x) {
			t = append(t, x)
		}
	}
	return t
}

func userName() string {
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return strconv.Itoa(os.Getuid())
}

// cachePath is the cache of one instance in one repository.
func cachePath(dir, repoID, host string, inst *ocis.Instance) string {
	if dir == "" {
		return ""
	}
	sum := sha256.Sum256([]byte(host + "\x00" + inst.BasePath + "\x00" + inst.ConfigDir))
	return filepath.Join(dir, repoID, "instance-"+hex.EncodeToString(sum[:8])+".cache")
}

func loadCache(o *Options, path string) *capture.Cache {
	if path == "" {
		return nil
	}
	c, err := capture.LoadCache(path)
	if err != nil {
		o.warn("%v", err)
	}
	if o.DryRun {
		c.InMemory()
	}
	return c
}

func excluded(o *Options) map[string]bool {
	x := map[string]bool{}
	if o.ExcludeIndex {
		x["search"] = true
	}
	if o.ExcludeThumbnails {
		x["thumbnails"] = true
	}
	return x
}

// softwareFiles says what to keep of the software: the binary, or the name of the image and on request
// the image itself.
func softwareFiles(o *Options) (map[string]capture.SoftwareFile, error) {
	out := map[string]capture.SoftwareFile{}
	sw := o.Instance.Software
	if o.ServerBinary != "" {
		sw.Binary = o.ServerBinary
	}
	if sw.Binary != "" {
		st, err := os.Stat(sw.Binary)
		switch {
		case err == nil && st.Mode().IsRegular():
			real, err := filepath.EvalSymlinks(sw.Binary)
			if err != nil {
				return nil, fmt.Errorf("find the server's binary: %w", err)
			}
			out[filepath.Base(sw.Binary)] = capture.SoftwareFile{Path: real}
		case o.ServerBinary != "" && err == nil:
			return nil, fmt.Errorf("--server-binary %s is no regular file", sw.Binary)
		case o.ServerBinary != "":
			return nil, fmt.Errorf("--server-binary: %w", err)
		case err == nil:
			o.warn("the server's binary %s is not in the snapshot: it is no regular file", sw.Binary)
		default:
			o.warn("the server's binary is not in the snapshot: %v", err)
		}
	}
	if sw.Image != "" {
		p, err := json.MarshalIndent(map[string]string{
			"container": sw.Container, "image": sw.Image, "digest": sw.ImageDigest, "os": runtime.GOOS, "architecture": runtime.GOARCH,
		}, "", "  ")
		if err != nil {
			return nil, err
		}
		out["image.json"] = capture.SoftwareFile{Data: append(p, '\n')}
		if o.SaveImage {
			out["image.tar"] = capture.SoftwareFile{Open: func(ctx context.Context) (io.ReadCloser, error) {
				return openImage(ctx, sw.Image)
			}}
		}
	} else if o.SaveImage {
		return nil, errors.New("--save-image: the instance runs in no container that Holdfast knows of (name it with --container)")
	}
	return out, nil
}

func openImage(ctx context.Context, image string) (io.ReadCloser, error) {
	c, err := docker.New("")
	if err != nil {
		return nil, err
	}
	return c.SaveImage(ctx, image)
}

// dryTarget hashes and counts what a backup would write.
type dryTarget struct {
	repo         *repo.Repository
	blobs, bytes atomic.Int64
}

func (d *dryTarget) Save(ctx context.Context, t repo.BlobType, data []byte) (id.ID, bool, error) {
	b := id.Hash(data)
	isNew, err := d.SaveAs(ctx, t, b, data)
	return b, isNew, err
}

func (d *dryTarget) SaveAs(_ context.Context, t repo.BlobType, b id.ID, data []byte) (bool, error) {
	if d.repo.Has(t, b) {
		return false, nil
	}
	d.blobs.Add(1)
	d.bytes.Add(int64(len(data)))
	return true, nil
}
