// Package drill proves that a snapshot comes back: it restores it into a scratch directory, checks the
// result, starts the server's own program on it in a jail, and asks that server for what the snapshot
// promises. What comes out is a Report, which Sign makes into something to keep.
//
// Run tells the order. The server runs in namespaces of its own (jail.go): its network has nothing but a
// loopback, so no traffic leaves, its ports clash with nobody's, and all of it ends with its first
// process; it sees the machine's files read-only and the original data not at all. compare.go asks it.
package drill

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/cloud"
	"github.com/holdfast-backup/holdfast/internal/consistency"
	"github.com/holdfast-backup/holdfast/internal/docker"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/restore"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/statedir"
)

// Options of a drill. Scratch is needed.
type Options struct {
	// Scratch is a directory with room for the whole instance. What is put there is removed at the end.
	Scratch string
	// Program is the server's program; "" is the one in the snapshot.
	Program string
	// Image is an image that the Docker engine of this machine has, to be the server in a container:
	// its name or id, or SnapshotImage. Docker is the engine; nil is the usual one.
	Image  string
	Docker *docker.Client
	// NoServer leaves out the server.
	NoServer bool
	// Spaces is how many spaces the server is asked for, chosen by chance; 0 is all.
	Spaces int
	// StartTimeout is how long the server may take to be ready; 0 is 5 min.
	StartTimeout time.Duration
	// ReadData compares the checksums of all contents on disk, not of a sample.
	ReadData bool
	Version  string // of Holdfast
	// Limits bound the memory of the restore.
	Limits   restore.Limits
	Progress progress.Sink
}

// Report says what was tested, and what came of it.
type Report struct {
	Holdfast       string    `json:"holdfast"`
	Host           string    `json:"host"`
	Began          time.Time `json:"began"`
	Ended          time.Time `json:"ended"`
	Repository     string    `json:"repository"` // its id
	Snapshot       string    `json:"snapshot"`
	Product        string    `json:"product"`
	ProductVersion string    `json:"product_version"`
	// RecoversTo is the moment that this snapshot brings back; Newest that of the newest complete snapshot
	// of the same instance, whose id is NewestSnapshot.
	RecoversTo     time.Time  `json:"recovers_to"`
	Newest         *time.Time `json:"newest,omitempty"`
	NewestSnapshot string     `json:"newest_snapshot,omitempty"`
	// Complete is what the snapshot says about itself; Missing counts what it says is missing.
	Complete bool `json:"complete"`
	Missing  int  `json:"missing"`

	Restore     RestoreReport     `json:"restore"`
	Consistency ConsistencyReport `json:"consistency"`
	Server      ServerReport      `json:"server"`

	// RealSeconds is how long it would take until the server runs again, at the speed of this drill.
	RealSeconds float64 `json:"real_seconds"`
	// Passed is true if nothing that was tested was wrong. Tested names the last step that was reached:
	// restore, consistency or server.
	Passed bool   `json:"passed"`
	Tested string `json:"tested"`
}

// RestoreReport is the first part of a drill.
type RestoreReport struct {
	Seconds  float64  `json:"seconds"`
	Files    int64    `json:"files"`
	Bytes    int64    `json:"bytes"`
	Warnings []string `json:"warnings"`
}

// ConsistencyReport is the second.
type ConsistencyReport struct {
	*consistency.Summary
	// Findings are the first maxDifferences findings of damage.
	Findings []consistency.Finding `json:"findings"`
}

// ServerReport is the third.
type ServerReport struct {
	// NotRun says why the server was not asked; "" if it was.
	NotRun       string        `json:"not_run,omitempty"`
	Program      string        `json:"program,omitempty"` // "snapshot", the path given, or "image" and its name
	Version      string        `json:"version,omitempty"`
	StartSeconds float64       `json:"start_seconds,omitempty"`
	Spaces       []SpaceReport `json:"spaces"`
	Differences  int64         `json:"differences"`
	// Variables is nil if the instance was configured by files alone.
	Variables *VariablesReport `json:"variables,omitempty"`
}

// cell is where the server runs: cut off from all networks, and from the machine's data.
type cell interface {
	// run has the server's program do something there, and returns what it printed.
	run(ctx context.Context, args ...string) (string, error)
	// dial connects to the server, whatever address is asked for: nothing else can be reached.
	dial(ctx context.Context, network, addr string) (net.Conn, error)
	// ended tells whether the server has ended by itself.
	ended() bool
	// tail is the end of what the server logged.
	tail() string
	// stop ends all that is in it, at once: its data are thrown away.
	stop()
}

// nobody is the user of the server in a jail that root makes: what comes out of a repository gets no rights.
const nobody = 65534

// A scratch directory has a lock that its drill holds, by which what killed ones left is known.
const (
	scratchPrefix = "holdfast-drill-"
	lockName      = ".holdfast-drill.lock"
)

// Run does a drill. The report counts also where it failed, and is nil only if there was nothing to test.
//
// Errors: of the repository and the scratch directory; the cause of ctx. What is wrong with the snapshot is
// in the report.
func Run(ctx context.Context, r *repo.Repository, list []*snapshot.Snapshot, sn *snapshot.Snapshot, o Options) (rep *Report, err error) {
	o.StartTimeout = cmp.Or(o.StartTimeout, 5*time.Minute)
	if err := canStart(ctx, &o); err != nil {
		return nil, err
	}
	view, err := browse.Open(ctx, r, sn)
	if err != nil {
		return nil, err
	}
	m := view.Manifest()
	host, _ := os.Hostname()
	rep = &Report{
		Holdfast: o.Version, Host: host, Began: time.Now().UTC(), Repository: r.ID(), Snapshot: sn.ID().String(),
		Product: m.Product, ProductVersion: m.ProductVersion, RecoversTo: moment(sn, m).UTC(),
		Complete: m.Proof.Complete, Missing: len(m.Proof.Missing), Server: ServerReport{Spaces: []SpaceReport{}},
	}
	newest(ctx, r, list, sn, rep)
	scratch, done, err := makeScratch(o.Scratch, o.Progress)
	if err != nil {
		return nil, err
	}
	defer func() {
		if derr := done(); derr != nil {
			err = errors.Join(err, fmt.Errorf("the scratch directory could not be removed: %w", derr))
		}
		rep.Ended = time.Now().UTC()
	}()

	// 1. Restore.
	p := newPlaces(m, scratch)
	if err := p.restore(ctx, r, sn, rep, o); err != nil {
		return rep, err
	}
	rep.Tested = "restore"

	if err := p.dropIDCache(); err != nil {
		return rep, err
	}

	// 2. Consistency.
	if err := p.check(ctx, rep, o); err != nil {
		return rep, err
	}
	rep.Tested = "consistency"
	rep.RealSeconds = rep.Restore.Seconds
	rep.Passed = rep.Complete && rep.Consistency.Damage == 0

	// 3. Server.
	program, why, err := p.program(ctx, r, view, rep, o)
	if err != nil {
		return rep, err
	}
	if why != "" {
		rep.Server.NotRun = why
		return rep, nil
	}
	saved, vr, err := p.variables(ctx, r, view)
	if err != nil {
		return rep, err
	}
	rep.Server.Variables = vr
	if err := p.ask(ctx, r, view, program, saved, rep, o); err != nil {
		rep.Passed = false
		return rep, err
	}
	rep.RealSeconds += rep.Server.StartSeconds
	// A server that did not get ready counts as a difference.
	rep.Passed = rep.Passed && rep.Server.Differences == 0
	if rep.Server.NotRun == "" {
		rep.Tested = "server"
	}
	return rep, nil
}

// canStart finds out what would fail only after hours of restoring.
func canStart(ctx context.Context, o *Options) error {
	if o.NoServer {
		return nil
	}
	if o.Program != "" {
		if st, err := os.Stat(o.Program); err != nil || !st.Mode().IsRegular() {
			return fmt.Errorf("the server's program %q is no file that can be read: %w", o.Program, cmp.Or(err, fs.ErrInvalid))
		}
	}
	if o.Image == "" {
		return nil
	}
	if o.Docker == nil {
		c, err := docker.New("")
		if err != nil {
			return err
		}
		o.Docker = c
	}
	if o.Image == SnapshotImage {
		_, err := o.Docker.Ping(ctx)
		return err
	}
	_, err := findImage(ctx, o.Docker, o.Image)
	return err
}

// moment is when the data of a snapshot stood still.
func moment(sn *snapshot.Snapshot, m *snapshot.Manifest) time.Time {
	for _, v := range m.Views {
		if v.MadeAt != nil {
			return *v.MadeAt
		}
	}
	if m.Freeze.StoppedAt != nil {
		return *m.Freeze.StoppedAt
	}
	return sn.Time
}

// newest finds the newest complete snapshot of the same instance.
func newest(ctx context.Context, r *repo.Repository, list []*snapshot.Snapshot, sn *snapshot.Snapshot, rep *Report) {
	own := snapshot.Own(list)
	slices.SortFunc(own, func(a, b *snapshot.Snapshot) int { return b.Time.Compare(a.Time) })
	for _, s := range own {
		if s.Hostname != sn.Hostname || !slices.Equal(s.Paths, sn.Paths) || s.Tree == nil {
			continue
		}
		if m, err := snapshot.LoadManifest(ctx, r, *s.Tree); err == nil && m.Proof.Complete {
			t := moment(s, m).UTC()
			rep.Newest, rep.NewestSnapshot = &t, s.ID().String()
			return
		}
	}
}

// makeScratch removes what killed drills left, and makes a directory for this one.
func makeScratch(dir string, sink progress.Sink) (path string, done func() error, err error) {
	if dir, err = filepath.Abs(dir); err != nil {
		return "", nil, err
	}
	old, err := filepath.Glob(filepath.Join(dir, scratchPrefix+"*"))
	if err != nil {
		return "", nil, err
	}
	for _, d := range old {
		f, err := os.OpenFile(filepath.Join(d, lockName), os.O_RDWR|unix.O_NOFOLLOW, 0)
		if err != nil {
			continue // not one of ours
		}
		if statedir.TryFlock(f) == nil {
			sink.Emit(progress.Event{Kind: progress.Info, Phase: "restore", Item: d, Message: "removing what a drill that was killed has left"})
			if err := removeAll(d); err != nil {
				f.Close()
				return "", nil, fmt.Errorf("what a drill that was killed has left cannot be removed: %w", err)
			}
		}
		f.Close()
	}
	if path, err = os.MkdirTemp(dir, scratchPrefix); err != nil {
		return "", nil, fmt.Errorf("the scratch directory: %w", err)
	}
	// The lock first: a directory without one stays for ever.
	lock, err := statedir.Lock(filepath.Join(path, lockName))
	if err != nil {
		os.Remove(path)
		return "", nil, fmt.Errorf("the scratch directory: %w", err)
	}
	return path, func() error {
		defer lock.Close()
		return removeAll(path)
	}, nil
}

// removeAll is os.RemoveAll also for directories that their owner may not write into. The lock goes last,
// so that what a kill leaves is known.
func removeAll(dir string) error {
	list, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, d := range list {
		if d.Name() == lockName {
			continue
		}
		p := filepath.Join(dir, d.Name())
		if os.RemoveAll(p) == nil {
			continue
		}
		_ = filepath.WalkDir(p, func(q string, e fs.DirEntry, err error) error {
			if e != nil && e.IsDir() {
				_ = os.Chmod(q, 0o700)
			}
			return nil // RemoveAll tells what is wrong
		})
		if err := os.RemoveAll(p); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

// places are where the parts of the instance lie in the scratch directory.
type places struct {
	m       *snapshot.Manifest
	scratch string
	maps    []restore.PathMap // longest first
	uid     int               // of the server in the jail; -1 is ours
}

func newPlaces(m *snapshot.Manifest, scratch string) *places {
	p := &places{m: m, scratch: scratch, uid: -1}
	if os.Geteuid() == 0 {
		p.uid = nobody
	}
	add := func(from, to string) {
		if from != "" && !slices.ContainsFunc(p.maps, func(x restore.PathMap) bool { return x.From == from }) {
			p.maps = append(p.maps, restore.PathMap{From: from, To: filepath.Join(scratch, to)})
		}
	}
	add(m.BasePath, "data")
	if !within(m.ConfigDir, m.BasePath) || m.BasePath == "" {
		add(m.ConfigDir, "config")
	}
	for i, d := range m.DataSets {
		if p.to(d.Path) == "" {
			add(d.Path, fmt.Sprintf("other/%d", i))
		}
	}
	return p
}

// to is where a path of the instance lies in the scratch directory; "" if it is not there.
func (p *places) to(path string) string {
	best, out := "", ""
	for _, x := range p.maps {
		if within(path, x.From) && len(x.From) >= len(best) {
			best, out = x.From, filepath.Join(x.To, strings.TrimPrefix(path, x.From))
		}
	}
	return out
}

func (p *places) restore(ctx context.Context, r *repo.Repository, sn *snapshot.Snapshot, rep *Report, o Options) error {
	ro := restore.Options{Map: p.maps, Limits: o.Limits, Progress: o.Progress, BasePath: p.to(p.m.BasePath), ConfigDir: p.to(p.m.ConfigDir)}
	for _, st := range p.m.Stores {
		if st.Bucket == nil {
			continue
		}
		if st.Bucket.Way != snapshot.WayCopy {
			return fmt.Errorf("the contents of store %q are not in the repository but in a bucket (way %s): a drill needs them in the repository", st.Name, st.Bucket.Way)
		}
		// Into files, never into a bucket.
		if ro.Objects == nil {
			ro.Objects = map[string]*restore.Objects{}
		}
		ro.Objects[st.Name] = &restore.Objects{}
	}
	ro.Owner = &restore.Owner{UID: os.Geteuid(), GID: os.Getegid()}
	if p.uid >= 0 {
		ro.Owner = &restore.Owner{UID: p.uid, GID: p.uid}
	}
	plan, err := restore.MakePlan(ctx, r, sn, ro)
	if err != nil {
		return err
	}
	// Whatever the manifest says: nothing is written anywhere else.
	for _, path := range plan.Paths() {
		if !within(path, p.scratch) {
			return fmt.Errorf("the snapshot has data at %q that would be restored outside of the scratch directory", path)
		}
	}
	start := time.Now()
	res, err := restore.Run(ctx, r, plan)
	rep.Restore.Seconds = time.Since(start).Seconds()
	rep.Restore.Warnings = append([]string{}, plan.Warnings...)
	if res != nil {
		rep.Restore.Warnings = append(rep.Restore.Warnings, res.Warnings...)
		for _, d := range res.DataSets {
			rep.Restore.Files += d.Files
			rep.Restore.Bytes += d.Bytes
		}
	}
	return err
}

// dropIDCache removes the posix driver's map of absolute paths to ids: the files lie elsewhere now, and the
// server makes it anew.
func (p *places) dropIDCache() error {
	if !slices.ContainsFunc(p.m.Stores, func(s snapshot.Store) bool { return s.Layout == string(ocis.Posix) }) {
		return nil
	}
	for _, d := range p.m.DataSets {
		if dir := p.to(d.Path); d.Name == "nats" && dir != "" {
			if _, err := restore.DropIDCaches(dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// local is the driver that keeps in files what the store's own one keeps in a bucket; "" if the snapshot
// does not have the contents.
func local(st snapshot.Store) string {
	to, away := map[string]string{"s3ng": "ocis", "decomposed_s3": "decomposed", "decomposeds3": "decomposed"}[st.Driver]
	switch {
	case !away:
		return st.Driver
	case st.Bucket != nil && st.Bucket.Way == snapshot.WayCopy:
		return to
	}
	return ""
}

func (p *places) check(ctx context.Context, rep *Report, o Options) error {
	var stores []consistency.Store
	for _, st := range p.m.Stores {
		dir := p.to(st.Root)
		if dir == "" {
			return fmt.Errorf("the store %q at %q is in none of the snapshot's data sets", st.Name, st.Root)
		}
		d, err := consistency.OpenDir(dir, st.Layout, st.Prefix)
		if errors.Is(err, fs.ErrNotExist) && st.Name != "users" {
			continue
		}
		if err != nil {
			return fmt.Errorf("the restored store %q: %w", st.Name, err)
		}
		defer d.Close()
		stores = append(stores, consistency.Store{Name: st.Name, Place: d, Layout: st.Layout, Prefix: st.Prefix, Remote: local(st) == ""})
	}
	rep.Consistency.Findings = []consistency.Finding{}
	var err error
	rep.Consistency.Summary, err = consistency.Run(ctx, stores, consistency.Options{
		ReadData: o.ReadData, Seed: uint64(rep.Began.Unix()), Now: rep.RecoversTo, Progress: o.Progress,
		Found: func(f consistency.Finding) error {
			if f.Severity == consistency.Damage && len(rep.Consistency.Findings) < maxDifferences {
				rep.Consistency.Findings = append(rep.Consistency.Findings, f)
			}
			return nil
		},
	})
	return err
}

// program puts the server's program into the scratch directory; why says why there is none.
func (p *places) program(ctx context.Context, r *repo.Repository, view *browse.View, rep *Report, o Options) (path, why string, err error) {
	who, err := view.Identities(ctx)
	if err != nil && ctx.Err() != nil {
		return "", "", context.Cause(ctx)
	}
	switch {
	case o.NoServer:
		return "", "left out on request", nil
	case slices.ContainsFunc(p.m.Stores, func(s snapshot.Store) bool { return local(s) == "" }):
		return "", "the snapshot does not hold the contents, which are in a bucket", nil
	case !who.Known:
		return "", "the users are in a directory outside of the instance, so nobody can be asked as", nil
	}
	if o.Image != "" {
		return "", "", nil
	}
	var src io.Reader
	if o.Program != "" {
		f, err := os.Open(o.Program)
		if err != nil {
			return "", "", fmt.Errorf("the server's program: %w", err)
		}
		defer f.Close()
		src, rep.Server.Program = f, o.Program
	} else {
		if p.m.Software == nil || p.m.Software.Binary == "" {
			why := "the snapshot holds no program of the server, and none was named"
			if p.m.Software != nil && p.m.Software.Image != "" {
				why += fmt.Sprintf("; it was the image %q, which --server-container can start", p.m.Software.Image)
			}
			return "", why, nil
		}
		n, err := view.Find(ctx, p.m.Software.Binary)
		if err != nil {
			return "", "", fmt.Errorf("the server's program: %w", err)
		}
		c, err := browse.OpenContent(r, n)
		if err != nil {
			return "", "", fmt.Errorf("the server's program: %w", err)
		}
		src, rep.Server.Program = c.Reader(ctx, 0), "snapshot"
	}
	dir := filepath.Join(p.scratch, "program")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", "", err
	}
	f, err := os.OpenFile(filepath.Join(dir, "server"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return "", "", err
	}
	_, err = io.Copy(f, src)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return "", "", fmt.Errorf("the server's program: %w", err)
	}
	return "program/server", "", nil
}

// target is where the server listens, in its jail.
const target = "127.0.0.1:9200"

// notNeeded are services of both products that would reach out, or that nothing is asked of.
const notNeeded = "idp,web,notifications,ocm,antivirus,audit,policies,collaboration,invitations,search,thumbnails,sse,userlog,clientlog,activitylog"

// environment is what the server gets to know, and all it gets to know. dir is the scratch directory as it
// sees it, saved what configured the original from outside. Every place is set, and every address that its files may name
// elsewhere.
func (p *places) environment(dir string, saved []string) []string {
	in := func(path string) string {
		rel, _ := filepath.Rel(p.scratch, p.to(path))
		return filepath.Join(dir, rel)
	}
	prefix := "OCIS_"
	if p.m.Product == string(ocis.OpenCloud) {
		prefix = "OC_"
	}
	const events = "127.0.0.1:9233"
	env := append(slices.Clone(saved),
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME="+dir+"/home", "TMPDIR="+dir+"/tmp", "LANG=C.UTF-8",
		prefix+"BASE_DATA_PATH="+in(p.m.BasePath), prefix+"CONFIG_DIR="+in(p.m.ConfigDir),
		prefix+"URL=https://localhost:9200", prefix+"INSECURE=true", prefix+"LOG_LEVEL=error", prefix+"TRACING_ENABLED=false",
		prefix+"EXCLUDE_RUN_SERVICES="+notNeeded, prefix+"ADD_RUN_SERVICES=auth-app",
		"PROXY_HTTP_ADDR="+target, "PROXY_TLS=true", "PROXY_ENABLE_BASIC_AUTH=true", "PROXY_ENABLE_APP_AUTH=true",
		"NOTIFICATIONS_SMTP_HOST=", "FRONTEND_ARCHIVER_INSECURE=true",
		"NATS_NATS_HOST=127.0.0.1", "NATS_NATS_PORT=9233", prefix+"EVENTS_ENDPOINT="+events, prefix+"EVENTS_ENABLE_TLS=false",
		prefix+"PERSISTENT_STORE=nats-js-kv", prefix+"PERSISTENT_STORE_NODES="+events,
		prefix+"CACHE_STORE=memory", prefix+"CACHE_STORE_NODES="+events,
	)
	for _, s := range p.m.Stores {
		var names []string
		switch s.Name {
		case "users":
			env = append(env, "STORAGE_USERS_DRIVER="+local(s))
			if s.Layout == string(ocis.Posix) { // which does not start without
				env = append(env, "STORAGE_USERS_ID_CACHE_STORE=nats-js-kv", "STORAGE_USERS_ID_CACHE_STORE_NODES="+events)
			}
			names = []string{"STORAGE_USERS_OCIS_ROOT", "STORAGE_USERS_DECOMPOSED_ROOT", "STORAGE_USERS_POSIX_ROOT"}
		case "system":
			names = []string{"STORAGE_SYSTEM_OCIS_ROOT", "STORAGE_SYSTEM_OC_ROOT"}
		}
		for _, n := range names {
			env = append(env, n+"="+in(s.Root))
		}
	}
	for _, d := range p.m.DataSets {
		if !d.Captured || within(d.Path, p.m.BasePath) {
			continue
		}
		switch d.Name {
		case "nats":
			env = append(env, "NATS_NATS_STORE_DIR="+in(d.Path))
		case "search":
			env = append(env, "SEARCH_ENGINE_BLEVE_DATA_PATH="+in(d.Path))
		}
	}
	return lastOf(env)
}

// lastOf leaves of each variable only what was set last: which of two counts is not the same everywhere.
func lastOf(env []string) []string {
	seen := map[string]bool{}
	var out []string
	for _, kv := range slices.Backward(env) {
		if name, _, _ := strings.Cut(kv, "="); !seen[name] {
			seen[name] = true
			out = append(out, kv)
		}
	}
	slices.Reverse(out)
	return out
}

// prepare makes the places that the server wants, and gives it the way to them.
func (p *places) prepare() error {
	for _, d := range []string{"home", "tmp"} {
		if err := os.Mkdir(filepath.Join(p.scratch, d), 0o700); err != nil {
			return err
		}
		if p.uid >= 0 {
			if err := os.Chown(filepath.Join(p.scratch, d), p.uid, p.uid); err != nil {
				return err
			}
		}
	}
	if p.uid >= 0 {
		// The server has to get through it, and nobody else.
		return os.Chown(p.scratch, p.uid, p.uid)
	}
	return nil
}

// start starts the server where nothing can get out. why says why it could not be.
func (p *places) start(ctx context.Context, r *repo.Repository, view *browse.View, program string, saved []string, rep *Report, o Options) (c cell, why string, err error) {
	if err := p.prepare(); err != nil {
		return nil, "", err
	}
	if o.Image != "" {
		return p.startContainer(ctx, r, view, saved, rep, o)
	}
	dir, err := inside()
	if err != nil {
		return nil, "", err
	}
	var hide []string
	for _, x := range p.maps {
		hide = append(hide, x.From)
	}
	j, err := startJail(&jailConfig{
		Scratch: p.scratch, Hide: hidden(p.scratch, hide), UID: p.uid, Program: filepath.Join(dir, program), Args: []string{"server"},
		Env: p.environment(dir, saved), Target: target,
	})
	if err != nil {
		return nil, err.Error(), nil
	}
	return j, "", nil
}

// ask starts the server and compares what it serves.
func (p *places) ask(ctx context.Context, r *repo.Repository, view *browse.View, program string, saved []string, rep *Report, o Options) error {
	o.Progress.Emit(progress.Event{Kind: progress.Start, Phase: "drill"})
	defer o.Progress.Emit(progress.Event{Kind: progress.Finish, Phase: "drill"})
	start := time.Now()
	j, why, err := p.start(ctx, r, view, program, saved, rep, o)
	if err != nil {
		return err
	}
	if why != "" {
		rep.Server.NotRun = why
		return nil
	}
	defer j.stop()
	c, err := cloud.New(cloud.Options{
		URL: "https://localhost:9200", User: "-", Secret: func() (string, error) { return "-", nil }, Insecure: true, Dial: j.dial,
		Tries: 4, Backoff: 100 * time.Millisecond, Agent: "holdfast/" + o.Version,
	})
	if err != nil {
		return err
	}
	defer c.Close()
	users := &users{cell: j, c: c, found: map[string]*cloud.Client{}}
	who, _ := view.Identities(ctx)
	spaces := slices.Clone(view.Spaces())
	if o.Spaces > 0 && o.Spaces < len(spaces) {
		// Nobody can be asked about the disabled ones.
		spaces = slices.DeleteFunc(spaces, func(s *browse.Space) bool { return s.Disabled != "" })
		rand.Shuffle(len(spaces), func(a, b int) { spaces[a], spaces[b] = spaces[b], spaces[a] })
		spaces = spaces[:min(o.Spaces, len(spaces))]
	}
	rep.Server.Spaces = make([]SpaceReport, len(spaces))
	first := ""
	for i, s := range spaces {
		login, why, err := p.whom(ctx, view, who, s)
		if err != nil {
			return err
		}
		rep.Server.Spaces[i] = SpaceReport{ID: s.ID, Alias: s.Alias, As: login, NotAsked: why, Differences: []string{}}
		first = cmp.Or(first, login)
	}
	if first == "" {
		rep.Server.NotRun = "there is no space that anybody could be asked about"
		return nil
	}
	if err := p.ready(ctx, j, c, users, first, start.Add(o.StartTimeout)); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		rep.Server.Differences++
		rep.Server.Spaces = []SpaceReport{}
		rep.Server.NotRun = fmt.Sprintf("the server did not get ready: %v; the end of its log: %s", err, j.tail())
		return nil
	}
	rep.Server.StartSeconds = time.Since(start).Seconds()
	if st, err := c.Status(ctx); err == nil {
		rep.Server.Version = st.Version
	}
	done := int64(0)
	var mu sync.Mutex
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(askers)
	for i, s := range spaces {
		r := &rep.Server.Spaces[i]
		g.Go(func() error {
			if r.NotAsked == "" {
				if err := p.one(gctx, view, users, r.As, s, r); err != nil {
					if gctx.Err() != nil {
						return context.Cause(gctx)
					}
					r.differ("the comparison broke off: %v", err)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			done++
			o.Progress.Emit(progress.Event{Kind: progress.Update, Phase: "drill", Item: s.Alias, Done: done, Total: int64(len(spaces)), Unit: "spaces"})
			return nil
		})
	}
	if err := cmp.Or(g.Wait(), context.Cause(ctx)); err != nil {
		return err
	}
	for _, r := range rep.Server.Spaces {
		rep.Server.Differences += r.Count
	}
	return nil
}

// askers is how many spaces are asked for at once: what a question costs is mostly the server's look at the
// token, which takes one processor a tenth of a second.
const askers = 4

// whom tells as whom the server can be asked about a space.
func (p *places) whom(ctx context.Context, view *browse.View, who *browse.Identities, s *browse.Space) (login, why string, err error) {
	if s.Disabled != "" {
		return "", "it is disabled, and nobody sees it", nil
	}
	if s.Kind == cloud.Personal {
		if login = who.User(s.OwnerID).Login; login == "" {
			why = "its owner is not in the directory of the snapshot"
		}
		return login, why, nil
	}
	root, err := view.Item(ctx, s, "")
	if err != nil {
		return "", "", err
	}
	list, err := view.Members(ctx, root)
	if err != nil {
		return "", "", err
	}
	// Only whoever may write sees versions and trash.
	for _, role := range []string{"manager", "editor"} {
		for _, m := range list {
			if l := who.User(m.Principal).Login; !m.Group && m.Role == role && l != "" {
				return l, "", nil
			}
		}
	}
	return "", "none of its members who may see versions and trash is in the directory of the snapshot", nil
}

// ready waits until the server can be asked as a user.
func (p *places) ready(ctx context.Context, j cell, c *cloud.Client, u *users, login string, until time.Time) error {
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		_, err := c.Status(ctx)
		if err == nil {
			var uc *cloud.Client
			if uc, err = u.as(ctx, login); err == nil {
				if _, err = uc.Me(ctx); err == nil {
					return nil
				}
				u.forget(login)
			}
		}
		switch {
		case j.ended():
			return errors.New("it ended by itself")
		case time.Now().After(until):
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
	}
}

func (p *places) one(ctx context.Context, view *browse.View, u *users, login string, s *browse.Space, r *SpaceReport) error {
	c, err := u.as(ctx, login)
	if err != nil {
		return err
	}
	drives, err := c.MyDrives(ctx)
	if err != nil {
		return err
	}
	for _, d := range drives {
		if _, id, _ := strings.Cut(d.ID, "$"); id == s.ID {
			return (&comparer{view: view, c: c, drive: d.ID, r: r}).space(ctx, s)
		}
	}
	r.differ("the server does not show it to %q", login)
	return nil
}

// users are the clients of users, with tokens that the server's own program makes: nobody's password
// is known or needed.
type users struct {
	cell  cell
	c     *cloud.Client
	mu    sync.Mutex
	found map[string]*cloud.Client
}

var tokenLine = regexp.MustCompile(`(?i)token:\s*"?([^\s"]+)`)

func (u *users) as(ctx context.Context, login string) (*cloud.Client, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if c := u.found[login]; c != nil {
		return c, nil
	}
	out, err := u.cell.run(ctx, "auth-app", "create", "--user-name="+login, "--expiration=24h")
	if err != nil {
		return nil, err
	}
	m := tokenLine.FindStringSubmatch(out)
	if m == nil {
		return nil, errors.New("auth-app create printed no token")
	}
	c := u.c.As(login, func() (string, error) { return m[1], nil })
	u.found[login] = c
	return c, nil
}

func (u *users) forget(login string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.found, login)
}
