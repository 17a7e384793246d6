package restore

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/cpus"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Repo is what a restore needs of the repository; *repo.Repository is one. Its index is loaded.
type Repo interface {
	LoadBlob(ctx context.Context, t repo.BlobType, d id.ID, buf []byte) ([]byte, error)
	LoadBlobs(ctx context.Context, t repo.BlobType, ids []id.ID, fn func(d id.ID, data []byte) error) error
	Size(t repo.BlobType, d id.ID) (int64, bool)
}

// PathMap puts what lay at From, and below it, to To. Both are absolute.
type PathMap struct{ From, To string }

// Owner overrides the recorded owners.
type Owner struct{ UID, GID int }

// Limits bound the memory that a restore takes. Zero stands for the default of each.
type Limits struct {
	// Workers is how many files are compared, and archives read, at once; 0 is one per processor.
	Workers int
	// Windows is how many lists of contents are read at once; 0 is 2, so that one can be read while the last packs of
	// another are written.
	Windows int
	// Batch is how much memory the files of a store may take whose contents are looked up together, in bytes, about 300
	// each; two batches are under way. A larger one means that fewer trees are read twice, and that more of a pack is
	// used at once. 0 is 64 MiB.
	Batch int
	// ObjectRoom bounds the contents on their way into a bucket, in bytes, 32 MiB at least; 0 is 64 MiB.
	ObjectRoom int64
}

// Options say where and how to restore. The zero value puts everything back to where it was.
type Options struct {
	// BasePath and ConfigDir are the new places of the base data path and the config directory;
	// "" is the old place.
	BasePath, ConfigDir string
	// Map holds further places. Of all that fit a path, the two above included, the longest counts.
	Map []PathMap
	// Overwrite restores onto what is there: only what differs is written. What is in the way, and
	// what the snapshot does not have, is moved into a dated folder.
	Overwrite bool
	// TrustTimes takes a file for unchanged if its size and modification time are right, and reads
	// nothing. It is passed over where an earlier restore was interrupted.
	TrustTimes bool
	Owner      *Owner
	// Objects says of each store whose blobs lie, or lay, in a bucket where they are, by its name. Stores
	// without an entry keep their blobs on disk, as they did.
	Objects map[string]*Objects
	// DryRun changes nothing and counts what would be done.
	DryRun bool
	// Only names the data sets to restore; empty is all.
	Only []string
	Limits
	Progress progress.Sink
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

func (o *Options) setDefaults() {
	if o.Workers <= 0 {
		o.Workers = cpus.Count()
	}
	if o.Windows <= 0 {
		o.Windows = 2
	}
	if o.Batch <= 0 {
		o.Batch = 64 << 20
	}
	if o.ObjectRoom <= 0 {
		o.ObjectRoom = 2 * putMost
	}
	o.ObjectRoom = max(o.ObjectRoom, putMost)
	if o.Now == nil {
		o.Now = time.Now
	}
}

// Target is one data set and where it goes. A store is one target, named as its metadata.
type Target struct {
	DataSet string `json:"data_set"`
	From    string `json:"from"`
	To      string `json:"to"`
	Entries int64  `json:"entries"`
	Bytes   int64  `json:"bytes"`

	store string         // name of the store, if it is one
	tree  string         // place in the snapshot, or of the picture in a view
	node  *snapshot.Node // of plain data
	tars  []tarFile      // of a store
	view  *viewTarget    // of a view
	// objects are the blobs of a store that become objects of a bucket, or nil. They need no room on the disk.
	objects *snapshot.DataSet
	// path is To with the symbolic links of the administrator resolved. outer is the target whose
	// root encloses it, or nil.
	path  string
	outer *Target
}

// single reports whether the target is one file.
func (t *Target) single() bool {
	return t.node != nil && t.node.Type != snapshot.Dir || t.view != nil && t.view.file
}

// group is the outermost target around t.
func (t *Target) group() *Target {
	for t.outer != nil {
		t = t.outer
	}
	return t
}

// Need is what one filesystem must have room for.
type Need struct {
	Path    string `json:"path"` // one of the destinations on it
	Bytes   int64  `json:"bytes"`
	Entries int64  `json:"entries"`
	Free    int64  `json:"free"` // bytes
	inodes  int64  // free; -1 if the filesystem has no fixed number
	dev     uint64
	targets []*Target
}

// Plan tells what a restore will do. It has not changed anything.
type Plan struct {
	Targets []*Target
	Needs   []Need
	// Warnings are worth showing before the restore starts.
	Warnings []string
	Manifest *snapshot.Manifest

	o      Options
	repo   Repo
	tree   id.ID   // of the snapshot; of a view, a number made from its name
	view   *View   // nil: it is a snapshot
	places []place // of all data sets, restored or not
}

// place is where a data set is, or would be.
type place struct{ name, path string }

// Paths returns the destinations, for whoever has to make sure that nothing runs there.
func (p *Plan) Paths() []string {
	var out []string
	for _, t := range p.Targets {
		out = append(out, t.path)
	}
	return out
}

// BasePath is where the base data path of the instance goes.
func (p *Plan) BasePath() string { return cmp.Or(p.o.BasePath, p.Manifest.BasePath) }

// MakePlan finds out what the snapshot holds and where it goes.
//
// Errors: *UnmappedError; snapshot.ErrNoSuchPath for a snapshot that Holdfast did not make.
func MakePlan(ctx context.Context, r Repo, sn *snapshot.Snapshot, o Options) (*Plan, error) {
	if sn.Tree == nil {
		return nil, errors.New("the snapshot has no tree")
	}
	o.setDefaults()
	m, err := snapshot.LoadManifest(ctx, r, *sn.Tree)
	if errors.Is(err, snapshot.ErrNoSuchPath) {
		return nil, fmt.Errorf("the snapshot was not made by Holdfast: %w", err)
	}
	if err != nil {
		return nil, err
	}
	p := &Plan{Manifest: m, o: o, repo: r, tree: *sn.Tree}
	p.warnCrash()
	if err := p.choose(ctx); err != nil {
		return nil, err
	}
	if err := p.locate(); err != nil {
		return nil, err
	}
	if err := p.measure(); err != nil {
		return nil, err
	}
	return p, nil
}

// warnCrash tells of a picture of a running instance.
func (p *Plan) warnCrash() {
	if p.Manifest.Freeze.CrashConsistent {
		p.Warnings = append(p.Warnings, "what is restored is crash-consistent: "+snapshot.CrashWarning)
	}
}

// choose makes the list of targets.
func (p *Plan) choose(ctx context.Context) error {
	m := p.Manifest
	known := map[string]bool{}
	only := map[string]bool{}
	for _, name := range p.o.Only {
		only[name] = true
	}
	stores := map[string]*Target{}
	for i := range m.DataSets {
		d := &m.DataSets[i]
		known[d.Name] = true
		from, err := p.from(d)
		if err != nil {
			return err
		}
		to, err := p.mapPath(d.Name, from)
		selected := d.Captured && (len(only) == 0 || only[d.Name])
		if err != nil && selected {
			return err
		}
		if err == nil {
			p.places = append(p.places, place{d.Name, to})
		}
		if only[d.Name] && !d.Captured {
			return fmt.Errorf("data set %s is not in this snapshot", d.Name)
		}
		if !selected {
			continue
		}
		var objects *snapshot.DataSet
		if o := p.o.Objects[d.Store]; o != nil && o.Dest != nil && d.Kind == "blobs" && d.Store != "" {
			if t := stores[d.Store]; t != nil {
				t.objects = d
				continue
			}
			objects = d
			d = &snapshot.DataSet{Name: d.Name, Kind: d.Kind, Path: d.Path, Store: d.Store} // no room on disk is needed
		}
		if t := stores[d.Store]; d.Store != "" && t != nil {
			t.Entries += d.Entries
			t.Bytes += d.Bytes
			continue
		}
		t := &Target{DataSet: d.Name, From: from, To: to, Entries: d.Entries, Bytes: d.Bytes, tree: d.Tree, objects: objects}
		if d.Store != "" {
			stores[d.Store], t.store = t, d.Store
			if err := p.findTars(ctx, t, d.Store); err != nil {
				return err
			}
		} else {
			if t.tree == "" {
				if t.tree = "/system/" + d.Name; d.Kind == "config" {
					t.tree = "/config/files"
				}
			}
			if t.node, err = snapshot.Lookup(ctx, p.repo, p.tree, t.tree); err != nil {
				return fmt.Errorf("data set %s: %w", d.Name, err)
			}
		}
		p.Targets = append(p.Targets, t)
	}
	for name := range only {
		if !known[name] {
			names := slices.Sorted(func(yield func(string) bool) {
				for n := range known {
					if !yield(n) {
						return
					}
				}
			})
			return fmt.Errorf("the snapshot has no data set %q; it has %s", name, strings.Join(names, ", "))
		}
	}
	if len(p.Targets) == 0 {
		return errors.New("the snapshot holds no data set")
	}
	return nil
}

// from is where a data set lay.
func (p *Plan) from(d *snapshot.DataSet) (string, error) {
	from := d.Path
	if d.Store != "" {
		for k := range p.Manifest.Stores {
			if s := &p.Manifest.Stores[k]; s.Name == d.Store {
				from = s.Root
			}
		}
	}
	if !filepath.IsAbs(from) || strings.IndexByte(from, 0) >= 0 {
		return "", fmt.Errorf("the manifest gives %q as the place of data set %s, which is no absolute path", from, d.Name)
	}
	return filepath.Clean(from), nil
}

// findTars lists the archives of a store, store.tar first.
func (p *Plan) findTars(ctx context.Context, t *Target, store string) error {
	t.tree = "/storage/" + store
	top, err := snapshot.Lookup(ctx, p.repo, p.tree, t.tree+"/store.tar")
	switch {
	case err == nil:
		t.tars = append(t.tars, tarFile{t.tree + "/store.tar", top})
	case !errors.Is(err, snapshot.ErrNoSuchPath):
		return fmt.Errorf("data set %s: %w", t.DataSet, err)
	default:
		p.Warnings = append(p.Warnings, fmt.Sprintf("the snapshot has no %s/store.tar: the spaces are restored without what belongs to the whole store", t.tree))
	}
	dir, err := snapshot.Lookup(ctx, p.repo, p.tree, t.tree+"/metadata")
	if errors.Is(err, snapshot.ErrNoSuchPath) && len(t.tars) > 0 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("data set %s: %w", t.DataSet, err)
	}
	list, err := snapshot.LoadTree(ctx, p.repo, dir.Subtree)
	if err != nil {
		return fmt.Errorf("data set %s: %w", t.DataSet, err)
	}
	for _, n := range list.Nodes {
		if n.Type == snapshot.File && strings.HasSuffix(n.Name, ".tar") {
			t.tars = append(t.tars, tarFile{t.tree + "/metadata/" + n.Name, n})
		}
	}
	return nil
}

// mapPath tells where a data set goes.
func (p *Plan) mapPath(name, from string) (string, error) {
	maps := slices.Clone(p.o.Map)
	var stay []string // places that keep what no map moves
	for _, m := range []PathMap{{p.Manifest.BasePath, p.o.BasePath}, {p.Manifest.ConfigDir, p.o.ConfigDir}} {
		switch {
		case m.From == "":
		case m.To != "":
			maps = append(maps, m)
		default:
			stay = append(stay, filepath.Clean(m.From))
		}
	}
	best, to := -1, ""
	for _, m := range maps {
		if !filepath.IsAbs(m.From) {
			return "", fmt.Errorf("path %q is not absolute", m.From)
		}
		old := filepath.Clean(m.From)
		if !inside(from, old) || len(old) <= best {
			continue
		}
		abs, err := filepath.Abs(m.To)
		if err != nil {
			return "", err
		}
		best, to = len(old), filepath.Join(abs, strings.TrimPrefix(from, old))
	}
	if best < 0 {
		if len(maps) > 0 && !slices.ContainsFunc(stay, func(dir string) bool { return inside(from, dir) }) {
			return "", &UnmappedError{DataSet: name, Path: from}
		}
		to = from
	}
	if to == "/" {
		return "", fmt.Errorf("data set %s cannot be restored to /", name)
	}
	return to, nil
}

// inside reports whether the absolute path p is dir or lies below it.
func inside(p, dir string) bool {
	return p == dir || strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/")
}

// locate resolves the destinations and finds out which lie within one another.
func (p *Plan) locate() error {
	sort.SliceStable(p.Targets, func(i, j int) bool { return lessPath(p.Targets[i].To, p.Targets[j].To) })
	for i, t := range p.Targets {
		for k := i - 1; k >= 0 && t.outer == nil; k-- {
			if o := p.Targets[k]; o.To != t.To && within(t.To, o.To) {
				if o.single() {
					return fmt.Errorf("data set %s (%s) cannot lie below %s, which is a file", t.DataSet, t.To, o.To)
				}
				t.outer = o
			}
		}
		if t.outer != nil {
			path, err := belowWithoutLinks(t.outer.path, strings.TrimPrefix(t.To[len(t.outer.To):], "/"))
			if err != nil {
				return err
			}
			if t.path = path; path == "" { // a link of the administrator leads elsewhere
				t.outer = nil
			}
		}
		if t.outer == nil {
			var err error
			if t.path, err = resolve(t.To, t.single()); err != nil {
				return err
			}
		}
		for _, o := range p.Targets[:i] {
			if o.path == t.path {
				return fmt.Errorf("data sets %s and %s would both be restored to %s", o.DataSet, t.DataSet, t.path)
			}
			if t.outer == nil && (within(t.path, o.path) || within(o.path, t.path)) {
				return fmt.Errorf("the destination of data set %s, %s, lies by a symbolic link in %s: name the real path with --map", t.DataSet, t.To, o.path)
			}
		}
	}
	return nil
}

// belowWithoutLinks returns root/rel, or "" if there is a symbolic link on the way.
func belowWithoutLinks(root, rel string) (string, error) {
	path := root
	for name := range strings.SplitSeq(rel, "/") {
		path = filepath.Join(path, name)
		fi, err := os.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			return "", err
		}
		if fi.Mode()&fs.ModeSymlink != 0 {
			return "", nil
		}
	}
	return filepath.Join(root, rel), nil
}

// resolve follows the symbolic links of the part of path that exists. The last name of a single
// file is not followed: the file is replaced, whatever it is.
func resolve(path string, single bool) (string, error) {
	rest := ""
	if single {
		path, rest = filepath.Dir(path), filepath.Base(path)
	}
	for {
		real, err := filepath.EvalSymlinks(path)
		if err == nil {
			return filepath.Join(real, rest), nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("destination %s: %w", path, err)
		}
		if fi, err := os.Lstat(path); err == nil && fi.Mode()&fs.ModeSymlink != 0 {
			return "", fmt.Errorf("destination %s is a symbolic link that leads nowhere", path)
		}
		rest = filepath.Join(filepath.Base(path), rest)
		path = filepath.Dir(path)
	}
}

// existing returns the deepest part of path that exists.
func existing(path string) (string, *unix.Stat_t, error) {
	for {
		var st unix.Stat_t
		err := unix.Stat(path, &st)
		if err == nil {
			return path, &st, nil
		}
		if err != unix.ENOENT && err != unix.ENOTDIR || path == "/" {
			return "", nil, &os.PathError{Op: "stat", Path: path, Err: err}
		}
		path = filepath.Dir(path)
	}
}

// measure adds up what the filesystems must hold, by the figures of the manifest.
func (p *Plan) measure() error {
	for _, t := range p.Targets {
		path, st, err := existing(t.path)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(p.Needs, func(n Need) bool { return n.dev == uint64(st.Dev) })
		if i < 0 {
			var fs unix.Statfs_t
			if err := unix.Statfs(path, &fs); err != nil {
				return &os.PathError{Op: "statfs", Path: path, Err: err}
			}
			n := Need{Path: t.path, dev: uint64(st.Dev), Free: int64(fs.Bavail) * fs.Bsize, inodes: -1}
			if fs.Files > 0 {
				n.inodes = int64(fs.Ffree)
			}
			i = len(p.Needs)
			p.Needs = append(p.Needs, n)
		}
		n := &p.Needs[i]
		n.Bytes += t.Bytes
		n.Entries += t.Entries
		n.targets = append(n.targets, t)
	}
	return nil
}

// Check makes sure that the destinations are fit: empty, or to be overwritten, or left by an
// interrupted run of the same restore; and with room enough. Run calls it as well.
//
// Errors: *NotEmptyError, *NoSpaceError.
func (p *Plan) Check(ctx context.Context) error {
	var ne NotEmptyError
	delta := p.o.Overwrite
	for _, t := range p.Targets {
		if t.outer != nil {
			continue
		}
		m := findMarker(t)
		if m != nil && m.Tree == p.tree {
			delta = true
			continue
		}
		if p.o.Overwrite {
			continue
		}
		empty, err := isEmpty(t)
		if err != nil {
			return err
		}
		if !empty {
			ne.Paths = append(ne.Paths, t.path)
			if m != nil {
				ne.Markers = append(ne.Markers, m.file)
			}
		}
	}
	if len(ne.Paths) > 0 {
		return &ne
	}
	if p.view != nil && p.clones() {
		return nil // contents are shared with the view
	}
	return p.checkRoom(ctx, delta)
}

func (p *Plan) checkRoom(ctx context.Context, delta bool) error {
	short := func(n *Need) bool {
		return n.Bytes > n.Free || n.inodes >= 0 && n.Entries > n.inodes
	}
	if delta && slices.ContainsFunc(p.Needs, func(n Need) bool { return short(&n) }) {
		// Not enough for everything; but part of it may be there already.
		o := p.o
		o.DryRun, o.Progress = true, nil
		q := *p
		q.o = o
		res, err := q.run(ctx, true)
		if err != nil {
			var inc *IncompleteError
			if !errors.As(err, &inc) { // damage is told by the run itself
				return err
			}
		}
		for i := range p.Needs {
			n := &p.Needs[i]
			n.Bytes, n.Entries = 0, 0
			for _, t := range n.targets {
				for _, d := range res.DataSets {
					if d.Name == t.DataSet {
						n.Bytes += d.Bytes
						n.Entries += d.Files
					}
				}
			}
		}
	}
	for i := range p.Needs {
		n := &p.Needs[i]
		if n.Bytes > n.Free {
			return &NoSpaceError{Path: n.Path, Needed: n.Bytes, Free: n.Free}
		}
		if n.inodes >= 0 && n.Entries > n.inodes {
			return &NoSpaceError{Path: n.Path, NeededInodes: n.Entries, FreeInodes: n.inodes}
		}
	}
	return nil
}

// isEmpty reports whether nothing is at the destination yet.
func isEmpty(t *Target) (bool, error) {
	fi, err := os.Lstat(t.path)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	if !fi.IsDir() {
		return false, nil
	}
	if t.single() {
		return false, nil
	}
	return emptyDir(t.path)
}

func emptyDir(path string) (bool, error) {
	d, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer d.Close()
	names, err := d.Readdirnames(8)
	if err != nil && err != io.EOF {
		return false, err
	}
	for _, n := range names {
		if n != "lost+found" && n != insideMarker {
			return false, nil
		}
	}
	return len(names) < 8, nil
}

// A marker is the file that says that a restore is not finished. It lies beside the outermost
// root, or inside where that is not possible.
type marker struct {
	Note    string    `json:"note"`
	Tree    id.ID     `json:"tree"` // of the snapshot
	Started time.Time `json:"started"`
	// Empty tells that nothing was there before: a file that differs was half written by us.
	Empty bool `json:"was_empty"`

	file  string
	fresh bool // nothing is there now
}

const (
	markerSuffix = ".holdfast-restore-incomplete"
	insideMarker = ".holdfast-restore-incomplete"
)

// markerFiles lists where the marker of an outermost target may lie.
func markerFiles(t *Target) []string {
	files := []string{t.path + markerSuffix}
	if !t.single() {
		files = append(files, filepath.Join(t.path, insideMarker))
	}
	return files
}

func findMarker(t *Target) *marker {
	for _, f := range markerFiles(t) {
		data, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		m := &marker{file: f}
		if json.Unmarshal(data, m) != nil { // cut off: trust nothing in it
			*m = marker{file: f}
		}
		return m
	}
	return nil
}

// writeMarker leaves the marker, durably, before anything else is written.
func writeMarker(t *Target, m *marker) error {
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	var first error
	for _, f := range markerFiles(t) {
		if err = writeDurably(f, append(data, '\n')); err == nil {
			m.file = f
			return nil
		}
		first = cmp.Or(first, err)
	}
	return first
}

func writeDurably(path string, data []byte) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, fsync(f), f.Close())
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := fsync(d); err != nil && !errors.Is(err, unix.EINVAL) { // some filesystems cannot
		return err
	}
	return nil
}
