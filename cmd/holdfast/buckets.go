package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/backup"
	"github.com/holdfast-backup/holdfast/internal/bucket"
	"github.com/holdfast-backup/holdfast/internal/consistency"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/replica"
	"github.com/holdfast-backup/holdfast/internal/restore"
	"github.com/holdfast-backup/holdfast/internal/s3"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// Variables with the keys of the replica; those of the instance's own bucket are in package bucket.
const (
	replicaAccessKey = "HOLDFAST_REPLICA_ACCESS_KEY"
	replicaSecretKey = "HOLDFAST_REPLICA_SECRET_KEY"
)

// keys reads a pair of variables. One without the other is a mistake.
func (a *app) keys(access, secret string) (id, key string, err error) {
	id, _ = a.getenv(access)
	key, _ = a.getenv(secret)
	if (id == "") != (key == "") {
		return "", "", usageError("%s and %s must both be set, or neither", access, secret)
	}
	return id, key, nil
}

// bucketKeys are the keys of the instance's bucket, where they are given apart from the server's.
func (a *app) bucketKeys() (id, key string, err error) {
	return a.keys(bucket.AccessKeyVariable, bucket.SecretKeyVariable)
}

// blobFlags say how a bucket with blobs is secured.
type blobFlags struct {
	way, unreferenced string
	replica           bucketFlags
	lockDays          int
}

// bucketFlags name a bucket.
type bucketFlags struct {
	endpoint, region, bucket string
	pathStyle                bool
}

func (f *blobFlags) add(c *cobra.Command) {
	fs := c.Flags()
	fs.StringVar(&f.way, "blobs", snapshot.WayCopy, "how to secure blobs that lie in a bucket: `way` copy, replica or versions")
	fs.StringVar(&f.unreferenced, "blobs-unreferenced", "auto", "objects that nothing refers to: `what` to do, auto, count or capture")
	fs.StringVar(&f.replica.bucket, "replica-bucket", "", "`name` of the second bucket for --blobs replica")
	fs.StringVar(&f.replica.endpoint, "replica-endpoint", "", "`URL` of its server (default: that of the instance's bucket)")
	fs.StringVar(&f.replica.region, "replica-region", "", "its `region` (default: that of the instance's bucket)")
	fs.BoolVar(&f.replica.pathStyle, "replica-path-style", false, "address it by a path, not by a host name")
	fs.IntVar(&f.lockDays, "object-lock-days", 0, "for --blobs versions: lock the versions for at least so many `days`")
}

const blobHelp = `Where the blobs lie in an S3 bucket, --blobs says how it is secured:

  copy      into the repository, as files on disk are (the default)
  replica   by copies within the S3 server, into the bucket --replica-bucket; a backup removes
            nothing there, prune what no snapshot needs
  versions  nothing is copied: the snapshot names the version of each object in the bucket,
            which must keep versions and must have no rule that expires them

The bucket and its keys are those of the server's configuration. HOLDFAST_BUCKET_ACCESS_KEY
and HOLDFAST_BUCKET_SECRET_KEY replace the keys; HOLDFAST_REPLICA_ACCESS_KEY and
HOLDFAST_REPLICA_SECRET_KEY are those of the replica, if they differ.

`

func (a *app) blobOptions(f *blobFlags) (backup.BlobOptions, error) {
	o := backup.BlobOptions{Way: f.way, LockFor: time.Duration(f.lockDays) * 24 * time.Hour}
	switch f.way {
	case snapshot.WayCopy, snapshot.WayReplica, snapshot.WayVersions:
	default:
		return o, usageError("--blobs is copy, replica or versions, not %q", f.way)
	}
	switch f.unreferenced {
	case "auto":
	case "count":
		o.CountSpare = true
	case "capture":
		o.KeepSpare = true
	default:
		return o, usageError("--blobs-unreferenced is auto, count or capture, not %q", f.unreferenced)
	}
	if f.way == snapshot.WayReplica && f.replica.bucket == "" {
		return o, ui.WithHints(usageError("--blobs replica needs --replica-bucket"), "The bucket must exist already.")
	}
	if f.lockDays < 0 || f.lockDays > 36500 {
		return o, usageError("--object-lock-days is a number of days, not %d", f.lockDays)
	}
	if f.lockDays > 0 && f.way != snapshot.WayVersions {
		return o, usageError("--object-lock-days goes with --blobs versions only")
	}
	var err error
	if o.AccessKey, o.SecretKey, err = a.bucketKeys(); err != nil {
		return o, err
	}
	r := &o.Replica
	r.Endpoint, r.Region, r.Bucket, r.PathStyle = f.replica.endpoint, f.replica.region, f.replica.bucket, f.replica.pathStyle
	r.AccessKey, r.SecretKey, err = a.keys(replicaAccessKey, replicaSecretKey)
	return o, err
}

// s3Drivers are the storage drivers that keep blobs in a bucket, with those that write the same metadata
// and keep them on disk.
var s3Drivers = map[string]string{"s3ng": "ocis", "decomposeds3": "decomposed", "decomposed_s3": "decomposed", "decomposed-s3": "decomposed"}

// family is what two drivers must have in common for one to read what the other wrote.
func family(driver string) string {
	if local, ok := s3Drivers[driver]; ok {
		return local
	}
	return driver
}

// keysFor finds the keys of a bucket that a snapshot names: the variables, or else those of the instance
// whose configuration is at hand, if it is the same server.
func (a *app) keysFor(inst *ocis.Instance, endpoint string) (id, key string, err error) {
	if id, key, err = a.bucketKeys(); err != nil || id != "" || inst == nil {
		return id, key, err
	}
	for i := range inst.Stores {
		if s := inst.Stores[i].S3; s != nil && sameEndpoint(s.Endpoint, endpoint) {
			return s.AccessKey, s.SecretKey, nil
		}
	}
	return "", "", nil
}

func sameEndpoint(a, b string) bool { return trimEndpoint(a) == trimEndpoint(b) }

func trimEndpoint(s string) string {
	for len(s) > 0 && s[len(s)-1] == '/' {
		s = s[:len(s)-1]
	}
	return s
}

// openPlace opens a bucket that a manifest names.
func (a *app) openPlace(ctx context.Context, p snapshot.BucketPlace, id, key string) (*bucket.Bucket, error) {
	return bucket.Open(ctx, bucket.Config{
		Endpoint: p.Endpoint, Region: p.Region, Bucket: p.Bucket, PathStyle: p.PathStyle, AccessKey: id, SecretKey: key,
	})
}

// openSource opens the bucket that has the contents of a store which the repository does not have; nil if
// it has all of them.
func (a *app) openSource(ctx context.Context, inst *ocis.Instance, st *snapshot.Store) (*bucket.Bucket, error) {
	switch b := st.Bucket; {
	case b == nil || b.Way == snapshot.WayCopy:
		return nil, nil
	case b.Way == snapshot.WayReplica && b.Replica != nil:
		id, key, err := a.keys(replicaAccessKey, replicaSecretKey)
		if err == nil && id == "" {
			id, key, err = a.keysFor(inst, b.Replica.Endpoint)
		}
		if err != nil {
			return nil, err
		}
		return a.openPlace(ctx, *b.Replica, id, key)
	default:
		id, key, err := a.keysFor(inst, b.Endpoint)
		if err != nil {
			return nil, err
		}
		return a.openPlace(ctx, b.BucketPlace, id, key)
	}
}

// bucketOf opens the bucket of a store of the instance at hand.
func (a *app) bucketOf(ctx context.Context, s *ocis.S3) (*bucket.Bucket, error) {
	id, key, err := a.bucketKeys()
	if err != nil {
		return nil, err
	}
	o := backup.BlobOptions{AccessKey: id, SecretKey: key}
	return bucket.Open(ctx, o.BucketOf(s))
}

// blobsIn are the blobs of a bucket, by their ids.
type blobsIn struct{ b *bucket.Bucket }

// List implements consistency.Blobs. What is no blob of the space, such as a copy that a restore put aside, is
// no business of its.
func (x blobsIn) List(ctx context.Context, space string, fn func(consistency.BlobInfo) error) error {
	var mu sync.Mutex
	return x.b.List(ctx, space+"/", func(o bucket.Object) error {
		blob := strings.ReplaceAll(strings.TrimPrefix(o.Key, space+"/"), "/", "")
		if bucket.Key(space, blob) != o.Key {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		sum, _ := o.MD5()
		return fn(consistency.BlobInfo{ID: blob, Size: o.Size, Modified: o.Modified, MD5: sum})
	})
}

// Others implements consistency.Blobs.
func (x blobsIn) Others(ctx context.Context, known func(space string) bool, fn func(consistency.OtherObjects) error) error {
	var folders []string
	single := consistency.OtherObjects{}
	count := func(into *consistency.OtherObjects) func(bucket.Object) error {
		var mu sync.Mutex
		return func(o bucket.Object) error {
			mu.Lock()
			defer mu.Unlock()
			into.Objects++
			into.Bytes += o.Size
			if o.Modified.After(into.Newest) {
				into.Newest = o.Modified
			}
			return nil
		}
	}
	countSingle := count(&single)
	err := x.b.Tops(ctx, func(o bucket.Object) error {
		folder, ok := strings.CutSuffix(o.Key, "/")
		if !ok {
			return countSingle(o)
		}
		if !known(folder) {
			folders = append(folders, folder)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, f := range folders {
		o := consistency.OtherObjects{Folder: f}
		if err := x.b.List(ctx, f+"/", count(&o)); err != nil {
			return err
		}
		if err := fn(o); err != nil {
			return err
		}
	}
	if single.Objects > 0 {
		return fn(single)
	}
	return nil
}

// Open implements consistency.Blobs.
func (x blobsIn) Open(ctx context.Context, space, blob string) (io.ReadCloser, error) {
	r, err := x.b.Get(ctx, bucket.Key(space, blob), "")
	if errors.Is(err, bucket.ErrNotFound) { // as instances from before May 2022 called it
		r, err = x.b.Get(ctx, bucket.FormerKey(blob), "")
	}
	if errors.Is(err, bucket.ErrNotFound) {
		return nil, &fs.PathError{Op: "read", Path: bucket.Key(space, blob), Err: fs.ErrNotExist}
	}
	if err != nil {
		return nil, err
	}
	return r, nil
}

// object opens an object by its key.
func (x blobsIn) object(ctx context.Context, key, version string) (io.ReadCloser, error) {
	r, err := x.b.Get(ctx, key, version)
	if errors.Is(err, bucket.ErrNotFound) {
		return nil, &fs.PathError{Op: "read", Path: key, Err: fs.ErrNotExist}
	}
	if err != nil {
		return nil, err
	}
	return r, nil
}

// accessLines tell what the keys of a store's bucket may do.
func accessLines(b *bucket.Bucket, list []bucket.Access) []string {
	out := []string{"  " + ui.Clean(b.String())}
	for _, x := range list {
		line := fmt.Sprintf("    %-7s%-18s", x.Right, "("+x.Right.Action()+")")
		switch {
		case x.Err != nil:
			line += "no: " + ui.Clean(x.Err.Error())
		case x.Untested != "":
			line += "not tested: " + x.Untested
		default:
			line += "yes"
		}
		out = append(out, line)
	}
	return out
}

// showAccess tells what the keys of the instance's buckets may do. What a backup needs and does not have is
// an error.
func (a *app) showAccess(ctx context.Context, inst *ocis.Instance) error {
	var failed error
	for i := range inst.Stores {
		s := &inst.Stores[i]
		if s.S3 == nil {
			continue
		}
		b, err := a.bucketOf(ctx, s.S3)
		if err != nil {
			return err
		}
		list := b.CheckAccess(ctx, bucket.ListBucket, bucket.GetObject, bucket.PutObject, bucket.DeleteObject)
		b.Close()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if a.ui.JSON() {
			for _, x := range list {
				o := accessObject{Event: "bucket_access", Store: s.Name, Bucket: b.Name(), Endpoint: b.Endpoint(), Right: string(x.Right), Action: x.Right.Action()}
				switch {
				case x.Err != nil:
					o.State, o.Detail = "no", x.Err.Error()
				case x.Untested != "":
					o.State, o.Detail = "untested", x.Untested
				default:
					o.State = "yes"
				}
				a.ui.Object(o)
			}
		} else {
			a.ui.Text("", "Rights of the keys of store "+ui.Quote(s.Name)+":")
			a.ui.Text(accessLines(b, list)...)
		}
		var lacks []string
		for _, x := range list {
			if x.Err == nil {
				continue
			}
			if !errors.Is(x.Err, s3.ErrAccessDenied) {
				lacks = nil // it is not a matter of rights
				if failed == nil {
					failed = fmt.Errorf("the bucket of store %s cannot be used: %w", ui.Quote(s.Name), x.Err)
				}
				break
			}
			lacks = append(lacks, x.Right.Action())
			if failed == nil && (x.Right == bucket.ListBucket || x.Right == bucket.GetObject) {
				failed = fmt.Errorf("the bucket of store %s cannot be backed up: %w", ui.Quote(s.Name), x.Err)
			}
		}
		if len(lacks) > 0 {
			a.ui.Warn("the keys of store %s lack %s: a backup needs s3:ListBucket and s3:GetObject, the server and a restore need s3:PutObject and s3:DeleteObject as well",
				ui.Quote(s.Name), strings.Join(lacks, ", "))
		}
	}
	return failed
}

// accessObject is one right, in JSON.
type accessObject struct {
	Event    string `json:"event"`
	Store    string `json:"store"`
	Bucket   string `json:"bucket"`
	Endpoint string `json:"endpoint"`
	Right    string `json:"right"`
	Action   string `json:"action"`
	State    string `json:"state"`
	Detail   string `json:"detail,omitempty"`
}

// objectFlags say where blobs are restored to.
type objectFlags struct {
	dest         bucketFlags
	toDriver     string
	delete, read bool
}

func (f *objectFlags) add(c *cobra.Command) {
	fs := c.Flags()
	fs.StringVar(&f.toDriver, "to-driver", "", "storage `driver` of the users' files at the destination: changes between\nlocal blobs and a bucket")
	fs.StringVar(&f.dest.bucket, "bucket", "", "`name` of the bucket that takes the blobs (default: where they were)")
	fs.StringVar(&f.dest.endpoint, "bucket-endpoint", "", "`URL` of its server")
	fs.StringVar(&f.dest.region, "bucket-region", "", "its `region`")
	fs.BoolVar(&f.dest.pathStyle, "bucket-path-style", false, "address it by a path, not by a host name")
	fs.BoolVar(&f.read, "read-objects", false, "compare objects that are there by their bytes, not by their checksums")
	fs.BoolVar(&f.delete, "delete", false, "delete objects of the snapshot's spaces that it does not have, and keep\nno copy of what is replaced")
}

// place puts what the flags say over where the blobs were.
func (f *bucketFlags) place(was *snapshot.Bucket) snapshot.BucketPlace {
	var p snapshot.BucketPlace
	if was != nil {
		p = was.BucketPlace
	}
	if f.endpoint != "" && !sameEndpoint(f.endpoint, p.Endpoint) {
		p.Endpoint, p.Region, p.PathStyle = f.endpoint, "", false
	}
	if f.region != "" {
		p.Region = f.region
	}
	if f.bucket != "" {
		p.Bucket = f.bucket
	}
	p.PathStyle = p.PathStyle || f.pathStyle
	return p
}

// restoreObjects finds out where the blobs of each store go, and opens the buckets.
func (a *app) restoreObjects(ctx context.Context, m *snapshot.Manifest, f *restoreFlags) (out map[string]*restore.Objects, err error) {
	of := &f.objects
	out = map[string]*restore.Objects{}
	defer func() {
		if err != nil {
			closeObjects(out)
		}
	}()
	used := false
	for i := range m.Stores {
		st := &m.Stores[i]
		driver := st.Driver
		if of.toDriver != "" && st.Layout == string(ocis.Decomposed) && st.Name != "system" {
			driver = of.toDriver
			if family(driver) != family(st.Driver) {
				return out, ui.WithHints(usageError("--to-driver %s: its metadata is not that of store %s, which has the driver %s", driver, ui.Quote(st.Name), st.Driver),
					"Between s3ng and ocis, and between decomposeds3 and decomposed, only the place of the blobs differs.")
			}
		}
		_, toBucket := s3Drivers[driver]
		if st.Bucket == nil && !toBucket {
			continue
		}
		if toBucket && st.Bucket == nil && st.Driver == driver {
			continue // recorded without a bucket: nothing of it is one
		}
		o := &restore.Objects{Read: of.read, Delete: of.delete}
		out[st.Name] = o
		inst := a.instanceThere(ctx, m, &f.place)
		if o.Source, err = a.openSource(ctx, inst, st); err != nil {
			return out, fmt.Errorf("the contents of store %s: %w", ui.Quote(st.Name), err)
		}
		if !toBucket {
			continue
		}
		used = true
		p := of.dest.place(st.Bucket)
		if p.Endpoint == "" || p.Bucket == "" {
			return out, usageError("the blobs of store %s go into a bucket: --bucket and --bucket-endpoint say which", ui.Quote(st.Name))
		}
		id, key, err := a.keysFor(inst, p.Endpoint)
		if err != nil {
			return out, err
		}
		if o.Dest, err = a.openPlace(ctx, p, id, key); err != nil {
			return out, fmt.Errorf("the blobs of store %s: %w", ui.Quote(st.Name), err)
		}
		if of.delete {
			// A replica has what other snapshots need. That it cannot be listed is told by the restore.
			if ids, err := replica.Users(ctx, o.Dest); err == nil && len(ids) > 0 {
				return out, ui.WithHints(usageError("--delete would remove from bucket %s what other snapshots need: it is a replica of repository %s", ui.Quote(p.Bucket), strings.Join(ids, ", ")),
					"Leave --delete out, or restore to another bucket.")
			}
		}
	}
	if !used && (of.dest != bucketFlags{} || of.delete || of.read) {
		return out, usageError("no blobs of this snapshot go into a bucket, so the flags that name one make no sense")
	}
	if of.toDriver != "" && len(out) == 0 {
		return out, usageError("--to-driver %s changes nothing: no store of the snapshot has another driver", of.toDriver)
	}
	if of.toDriver != "" {
		a.ui.Warn("the driver changes: set STORAGE_USERS_DRIVER=%s, and the settings of that driver, before the server starts", of.toDriver)
	}
	return out, nil
}

// instanceThere looks for the configuration of the server at the destination, for the keys of its bucket.
// nil: there is none yet.
func (a *app) instanceThere(ctx context.Context, m *snapshot.Manifest, p *placeFlags) *ocis.Instance {
	if id, _, err := a.bucketKeys(); err != nil || id != "" {
		return nil
	}
	inst, err := discover.Discover(ctx, discover.Options{
		BaseDataPath: cmp.Or(p.baseDataPath, m.BasePath), ConfigDir: cmp.Or(p.configDir, m.ConfigDir),
		Container: p.container, Unit: p.unit, EnvFiles: p.envFiles, NoSizes: true, Environ: a.environ,
	})
	if err != nil {
		return nil
	}
	return inst
}

func closeObjects(list map[string]*restore.Objects) {
	for _, o := range list {
		for _, b := range []*bucket.Bucket{o.Dest, o.Source} {
			if b != nil {
				b.Close()
			}
		}
	}
}
