// Package backup tells the whole first line of the flow in one function: freeze, view, capture, prove,
// thaw, commit. The command and whatever else starts backups call [Run].
package backup

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

//go:embed README.snapshot.md
var readme []byte

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
	// DryRun reads and proves, and writes nothing into the repository.
	DryRun bool
	// FullScan uses nothing of the last run.
	FullScan bool
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
	NewBlobs, NewBytes, StoredBytes int64
	Duration                        time.Duration
}

// Run makes one snapshot. A snapshot whose proof is not complete is kept and named so: look at
// Result.Manifest.Proof.
//
// Errors: *freeze.BusyError if the instance runs although it must not; freeze.ErrNotStarted if it did
// not come back, also beside a Result: the snapshot is good then.
func Run(ctx context.Context, o Options) (*Result, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	start := o.Now()
	inst := o.Instance
	for i := range inst.Stores {
		if s := &inst.Stores[i]; s.S3 != nil {
			return nil, &UnsupportedError{Store: s.Name, Driver: s.Driver}
		}
	}
	paths := sourcePaths(inst)
	parent, err := findParent(ctx, o.Repo, o.Hostname, paths)
	if err != nil {
		o.warn("%v", err)
	}
	cachePath := cachePath(o.CacheDir, o.Repo.ID(), o.Hostname, inst)
	cache := loadCache(&o, cachePath)
	var known *capture.Known
	if parent != nil && !cache.Knows(parent.ID()) && !o.FullScan {
		if known, err = capture.LoadKnown(ctx, o.Repo, parent, o.Progress); err != nil {
			return nil, err
		}
	}
	software, err := softwareFiles(&o)
	if err != nil {
		return nil, err
	}
	var target capture.Target
	var w *repo.Writer
	dry := &dryTarget{repo: o.Repo}
	if o.DryRun {
		target = dry
	} else {
		w = o.Repo.NewWriter(ctx)
		target = w
	}

	// From here to the thaw the service may be down: nothing that can wait is done in between.
	var got *capture.Result
	rec, err := freeze.Guarded(ctx, o.Freezer, inst, o.Guard, func(ctx context.Context) error {
		got, err = capture.Run(ctx, o.Repo, target, capture.Options{
			Instance: inst, Exclude: excluded(&o), Cache: cache, Parent: parent, Known: known, FullScan: o.FullScan,
			Software: software, Progress: o.Progress, Now: o.Now,
		})
		return err
	})
	notStarted := errors.Is(err, freeze.ErrNotStarted)
	if err != nil && (!notStarted || got == nil || ctx.Err() != nil) {
		return nil, err
	}

	got.Manifest.Holdfast = o.Version
	got.Manifest.Freeze = freezeRecord(rec)
	got.Manifest.Views = []snapshot.View{{Kind: "none", Source: inst.BasePath}}
	res, cerr := commit(ctx, &o, got, target, parent, paths, start)
	if cerr != nil {
		return nil, errors.Join(cerr, err)
	}
	if o.DryRun {
		res.Stats.NewBlobs, res.Stats.NewBytes = dry.blobs.Load(), dry.bytes.Load()
	} else {
		st := w.Stats()
		res.Stats.NewBlobs = st.NewBlobs[repo.DataBlob] + st.NewBlobs[repo.TreeBlob]
		res.Stats.NewBytes = st.PlainBytes[0] + st.PlainBytes[1]
		res.Stats.StoredBytes = st.StoredBytes[0] + st.StoredBytes[1]
		if cachePath != "" {
			got.Cache.Snapshot = res.SnapshotID
			if err := got.Cache.Save(cachePath); err != nil {
				o.warn("the next backup will take longer: %v", err)
			}
		}
	}
	return res, err
}

// commit writes the manifest, makes everything durable, and then the snapshot record: until that is
// there nothing of the backup is visible.
func commit(ctx context.Context, o *Options, got *capture.Result, target capture.Target, parent *snapshot.Snapshot, paths []string, start time.Time) (*Result, error) {
	o.Progress.Emit(progress.Event{Kind: progress.Start, Phase: "commit"})
	tree, err := got.Finish(ctx, readme)
	if err != nil {
		return nil, err
	}
	res := &Result{Manifest: got.Manifest}
	st := &res.Stats
	st.Entries, st.Files, st.Dirs, st.Bytes, st.BytesRead = got.Stats.Entries, got.Stats.Files, got.Stats.Dirs, got.Stats.Bytes, got.Stats.BytesRead
	var parentID *id.ID
	if parent != nil {
		d := parent.ID()
		parentID = &d
		res.Parent = parentID
	}
	if w, ok := target.(*repo.Writer); ok {
		if err := w.Flush(ctx); err != nil {
			return nil, fmt.Errorf("write the last packs and the index: %w", err)
		}
		// A lock that was lost in the meantime means that another program may have pruned.
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		ws := w.Stats()
		end := o.Now()
		sn := &snapshot.Snapshot{
			Time: start, Parent: parentID, Tree: &tree, Paths: paths, Hostname: o.Hostname, Username: userName(),
			UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), Tags: tags(o),
			ProgramVersion: "holdfast " + o.Version,
			Summary: &snapshot.Summary{
				BackupStart: start, BackupEnd: end, FilesUnmodified: 0,
				DataBlobs: int(ws.NewBlobs[repo.DataBlob]), TreeBlobs: int(ws.NewBlobs[repo.TreeBlob]),
				DataAdded: uint64(ws.PlainBytes[0] + ws.PlainBytes[1]), DataAddedPacked: uint64(ws.StoredBytes[0] + ws.StoredBytes[1]),
				TotalFilesProcessed: uint(st.Files), TotalBytesProcessed: uint64(st.Bytes),
			},
		}
		if err := snapshot.Save(ctx, o.Repo, sn); err != nil {
			return nil, err
		}
		res.SnapshotID = sn.ID()
	}
	st.Duration = o.Now().Sub(start)
	o.Progress.Emit(progress.Event{Kind: progress.Finish, Phase: "commit"})
	return res, nil
}

func (o *Options) warn(format string, args ...any) {
	o.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "backup", Message: fmt.Sprintf(format, args...)})
}

// UnsupportedError says that the blobs of a store lie where Holdfast cannot read them yet.
type UnsupportedError struct{ Store, Driver string }

func (e *UnsupportedError) Error() string {
	return fmt.Sprintf("the blobs of store %s lie on S3 (driver %s), and this version backs up local blobs only", e.Store, e.Driver)
}

// Hints says what to do next.
func (e *UnsupportedError) Hints() []string {
	return []string{"A backup without the bucket would be incomplete, so nothing was written."}
}

// freezeRecord is what the manifest says of the freeze. A freeze that stopped nothing has no times, so
// that two captures of one picture give one tree.
func freezeRecord(r freeze.Record) snapshot.Freeze {
	f := snapshot.Freeze{Method: r.Method}
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
	f.StoppedAt, f.StartedAt, f.ReadyAt = at(r.Stopped), at(r.Started), at(r.Ready)
	f.SecondsStopped = r.Downtime.Seconds()
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

func (d *dryTarget) Save(_ context.Context, t repo.BlobType, data []byte) (id.ID, bool, error) {
	b := id.Hash(data)
	if d.repo.Has(t, b) {
		return b, false, nil
	}
	d.blobs.Add(1)
	d.bytes.Add(int64(len(data)))
	return b, true, nil
}
