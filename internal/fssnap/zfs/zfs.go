// Package zfs makes views by snapshots of ZFS datasets, with the zfs command.
package zfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/mountinfo"
)

// Options are those of a Driver. The zero value works.
type Options struct {
	// StateDir is where clones are mounted; "" is the default.
	StateDir string
	// Run runs zfs; nil is fssnap.Run.
	Run fssnap.Runner
}

// Driver makes views of ZFS datasets.
//
// It promises: datasets below each other, and with OpenZFS all datasets of one pool, are held still in
// one transaction. The picture is read through .zfs/snapshot at the dataset's mount point, which is
// there even where it is hidden; where it is not, through a read-only clone at the top of the pool,
// mounted below the state directory. Snapshots of datasets that were not asked for, which a recursive
// snapshot brings along, are destroyed at once.
//
// Run for real in the tests: zfs-fuse 0.7, which has no .zfs directory and takes one snapshot name per
// command: so recursive snapshots and clones. Not run for real: OpenZFS; its .zfs directory and its
// command lines are covered by tests that play its part.
type Driver struct{ o Options }

// New returns a driver.
func New(o Options) *Driver {
	if o.Run == nil {
		o.Run = fssnap.Run
	}
	return &Driver{o}
}

// Kind is zfs.
func (*Driver) Kind() string { return "zfs" }

func isZFS(m mountinfo.Mount) bool { return m.Type == "zfs" || m.Type == "fuse.zfs" }

// Probe implements fssnap.Driver.
func (d *Driver) Probe(ctx context.Context, path string) (fssnap.Source, error) {
	at, err := fssnap.Locate(path)
	if err != nil {
		return fssnap.Source{}, err
	}
	m := at.Mount
	if !isZFS(m) {
		return fssnap.Source{}, &fssnap.OtherFilesystem{Path: path, Filesystem: m.Type}
	}
	if strings.Contains(m.Source, "@") {
		return fssnap.Source{}, fssnap.Unsupported("%s lies in the ZFS snapshot %s, which is still already", path, m.Source)
	}
	if _, err := d.o.Run(ctx, "zfs", "list", "-H", "-o", "name", m.Source); err != nil {
		return fssnap.Source{}, fssnap.Unsupported("the dataset %s of %s cannot be looked at: %w", m.Source, path, err)
	}
	s := fssnap.Source{Kind: d.Kind(), Name: m.Source, Path: at.Path}
	if s.Rel, err = fssnap.Rel(at.Inner, "/"); err != nil {
		return fssnap.Source{}, err
	}
	s.Root = rootOf(at.Table, m.Source)
	return s, nil
}

// rootOf returns where the top of a dataset is mounted, "" if nowhere.
func rootOf(t mountinfo.Table, dataset string) string {
	for _, m := range t {
		if isZFS(m) && m.Source == dataset && m.Root == "/" && fssnap.Visible(t, m) {
			return m.Point
		}
	}
	return ""
}

func pool(dataset string) string {
	p, _, _ := strings.Cut(dataset, "/")
	return p
}

// below tells whether dataset is strictly below top.
func below(dataset, top string) bool { return strings.HasPrefix(dataset, top+"/") }

// Create implements fssnap.Driver.
func (d *Driver) Create(ctx context.Context, name string, sources []fssnap.Source) (views []fssnap.View, err error) {
	// ZFS takes what was written, but not what was changed in mapped memory only.
	for _, s := range sources {
		if err := syncfs(s.Path); err != nil {
			return nil, fmt.Errorf("write out %s: %w", s.Name, err)
		}
	}
	if d.exists(ctx, name, sources) {
		return nil, fmt.Errorf("there are snapshots named %s already", name)
	}
	defer func() {
		if err != nil {
			ctx := context.WithoutCancel(ctx)
			for _, s := range sources {
				err = errors.Join(err, d.Remove(ctx, fssnap.View{Name: name, Source: s.Name}))
			}
			views = nil
		}
	}()
	var pools []string
	for _, s := range sources {
		if p := pool(s.Name); !slices.Contains(pools, p) {
			pools = append(pools, p)
		}
	}
	made := map[string]stamp{} // by dataset
	for _, p := range pools {
		var names []string
		for _, s := range sources {
			if pool(s.Name) == p {
				names = append(names, s.Name)
			}
		}
		if err := d.snapshot(ctx, name, p, names, made); err != nil {
			return nil, err
		}
	}
	for i, s := range sources {
		v := fssnap.View{Kind: d.Kind(), Name: name, Source: s.Name, MadeAt: made[s.Name].at, Transaction: made[s.Name].transaction}
		if v, err = d.open(ctx, v, s.Root, cloneName(s.Name, name, i)); err != nil {
			return nil, err
		}
		views = append(views, v)
	}
	return views, nil
}

type stamp struct {
	at          time.Time
	transaction string
}

func (d *Driver) exists(ctx context.Context, name string, sources []fssnap.Source) bool {
	for _, s := range sources {
		if _, err := d.o.Run(ctx, "zfs", "list", "-H", "-t", "snapshot", "-o", "name", s.Name+"@"+name); err == nil {
			return true
		}
	}
	return false
}

// snapshot makes the snapshots of one pool.
func (d *Driver) snapshot(ctx context.Context, name, pool string, datasets []string, made map[string]stamp) error {
	var tops []string
	for _, s := range datasets {
		if !slices.ContainsFunc(datasets, func(o string) bool { return below(s, o) }) {
			tops = append(tops, s)
		}
	}
	recursive := len(tops) < len(datasets)
	take := func(transaction string, tops ...string) error {
		argv := []string{"zfs", "snapshot"}
		if recursive {
			argv = append(argv, "-r")
		}
		for _, s := range tops {
			argv = append(argv, s+"@"+name)
		}
		at := stamp{time.Now().UTC(), transaction}
		if _, err := d.o.Run(ctx, argv...); err != nil {
			return err
		}
		for _, s := range datasets {
			if slices.ContainsFunc(tops, func(top string) bool { return s == top || below(s, top) }) {
				made[s] = at
			}
		}
		return nil
	}
	err := take(name+" "+pool, tops...)
	var ce *fssnap.CommandError
	if len(tops) > 1 && errors.As(err, &ce) && strings.Contains(ce.Stderr, "too many arguments") {
		// zfs-fuse and others of its age.
		for _, s := range tops {
			if err = take(name+" "+s, s); err != nil {
				break
			}
		}
	}
	if err != nil {
		return fmt.Errorf("zfs snapshot: %w", err)
	}
	if !recursive {
		return nil
	}
	all, err := d.snapshots(ctx, pool)
	if err != nil {
		return err
	}
	for _, s := range all {
		if s.name == name && !slices.Contains(datasets, s.dataset) {
			if err := d.destroy(ctx, s.dataset+"@"+name); err != nil {
				return err
			}
		}
	}
	return nil
}

func syncfs(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

// open finds or makes a way to read a snapshot.
func (d *Driver) open(ctx context.Context, v fssnap.View, root, clone string) (fssnap.View, error) {
	if root != "" {
		dir := filepath.Join(root, ".zfs", "snapshot", v.Name)
		// Entering it mounts it.
		if f, err := os.OpenFile(dir, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0); err == nil {
			_, err = f.ReadDir(1)
			f.Close()
			if err == nil || errors.Is(err, io.EOF) {
				v.Path = dir
				return v, nil
			}
		}
	}
	name := strings.TrimPrefix(clone, pool(clone)+"/")
	point, err := fssnap.MountPoint(d.o.StateDir, name)
	if err != nil {
		return v, err
	}
	if _, err := d.o.Run(ctx, "zfs", "clone", "-o", "readonly=on", "-o", "mountpoint="+point, v.Source+"@"+v.Name, clone); err != nil {
		return v, fmt.Errorf("the snapshot %s@%s is not to be seen in .zfs/snapshot, and cannot be cloned: %w", v.Source, v.Name, err)
	}
	t, err := mountinfo.Self()
	if err != nil {
		return v, err
	}
	// A pool that was imported with another root puts it below that.
	if v.Path = rootOf(t, clone); v.Path == "" {
		if _, err := d.o.Run(ctx, "zfs", "mount", clone); err != nil {
			return v, fmt.Errorf("the clone %s of the snapshot cannot be mounted: %w", clone, err)
		}
		if t, err = mountinfo.Self(); err != nil {
			return v, err
		}
		if v.Path = rootOf(t, clone); v.Path == "" {
			return v, fmt.Errorf("the clone %s of the snapshot is mounted nowhere", clone)
		}
	}
	return v, nil
}

// cloneName is at the top of the pool, where snapshots of the data do not take it along.
func cloneName(dataset, set string, i int) string {
	return fmt.Sprintf("%s/%s.%d", pool(dataset), set, i)
}

type snapshot struct {
	dataset, name string
	made          time.Time
	used          int64
}

// snapshots lists those with a name of ours, of one pool or, with "", of all.
func (d *Driver) snapshots(ctx context.Context, pool string) ([]snapshot, error) {
	argv := []string{"zfs", "list", "-H", "-t", "snapshot", "-o", "name"}
	if pool != "" {
		argv = append(argv, "-r", pool)
	}
	out, err := d.o.Run(ctx, argv...)
	if err != nil {
		return nil, err
	}
	var list []snapshot
	for line := range strings.Lines(string(out)) {
		dataset, name, ok := strings.Cut(strings.TrimSpace(line), "@")
		if made, ours := fssnap.ParseName(name); ok && ours {
			list = append(list, snapshot{dataset: dataset, name: name, made: made})
		}
	}
	if len(list) == 0 {
		return nil, nil
	}
	// zfs list knows exact numbers only since OpenZFS; zfs get always did.
	argv = []string{"zfs", "get", "-H", "-p", "-o", "name,property,value", "creation,used"}
	for _, s := range list {
		argv = append(argv, s.dataset+"@"+s.name)
	}
	if out, err = d.o.Run(ctx, argv...); err != nil {
		return list, nil // one of them went away; times and sizes are a courtesy
	}
	for line := range strings.Lines(string(out)) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if len(f) != 3 {
			continue
		}
		n, err := strconv.ParseInt(f[2], 10, 64)
		i := slices.IndexFunc(list, func(s snapshot) bool { return s.dataset+"@"+s.name == f[0] })
		if err != nil || i < 0 {
			continue
		}
		switch f[1] {
		case "creation":
			list[i].made = time.Unix(n, 0).UTC()
		case "used":
			list[i].used = n
		}
	}
	return list, nil
}

// clones returns the clones of ours of a snapshot.
func (d *Driver) clones(ctx context.Context, v fssnap.View) ([]string, error) {
	out, err := d.o.Run(ctx, "zfs", "list", "-H", "-t", "filesystem", "-o", "name,origin", "-r", pool(v.Source))
	if err != nil {
		return nil, err
	}
	var list []string
	for line := range strings.Lines(string(out)) {
		name, origin, _ := strings.Cut(strings.TrimSpace(line), "\t")
		_, ours := fssnap.ParseName(filepath.Base(name))
		if ours && origin == v.Source+"@"+v.Name {
			list = append(list, name)
		}
	}
	return list, nil
}

// List implements fssnap.Driver. It needs no roots.
func (d *Driver) List(ctx context.Context, _ ...string) ([]fssnap.View, error) {
	all, err := d.snapshots(ctx, "")
	if absent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	t, err := mountinfo.Self()
	if err != nil {
		return nil, err
	}
	var list []fssnap.View
	for _, s := range all {
		v := fssnap.View{Kind: d.Kind(), Name: s.name, Source: s.dataset, MadeAt: s.made, Size: s.used}
		if root := rootOf(t, s.dataset); root != "" {
			dir := filepath.Join(root, ".zfs", "snapshot", s.name)
			if _, err := os.Lstat(dir); err == nil {
				v.Path = dir
			}
		}
		if v.Path == "" {
			clones, err := d.clones(ctx, v)
			if err != nil {
				return nil, err
			}
			for _, c := range clones {
				v.Path = rootOf(t, c)
			}
		}
		list = append(list, v)
	}
	return list, nil
}

// absent tells from the error of a command that there is no ZFS here: no command, no kernel module, no
// daemon.
func absent(err error) bool {
	if errors.Is(err, exec.ErrNotFound) {
		return true
	}
	var ce *fssnap.CommandError
	if !errors.As(err, &ce) {
		return false
	}
	return slices.ContainsFunc([]string{
		"modules are not loaded", "Unable to open /dev/zfs", "/dev/zfs and /proc/self/mounts are required",
		"Make sure that the zfs-fuse daemon is running", "connect: ", "no pools available", "Failed to initialize the libzfs",
	}, func(s string) bool { return strings.Contains(ce.Stderr, s) })
}

// find returns the snapshot of a view.
//
// Errors: ErrGone.
func (d *Driver) find(ctx context.Context, v fssnap.View) error {
	_, err := d.o.Run(ctx, "zfs", "list", "-H", "-t", "snapshot", "-o", "name", v.Source+"@"+v.Name)
	if gone(err) {
		return fmt.Errorf("%s@%s: %w", v.Source, v.Name, fssnap.ErrGone)
	}
	return err
}

func gone(err error) bool {
	var ce *fssnap.CommandError
	return errors.As(err, &ce) && (strings.Contains(ce.Stderr, "does not exist") || strings.Contains(ce.Stderr, "could not find any snapshots to destroy")) || absent(err)
}

// Open implements fssnap.Driver.
func (d *Driver) Open(ctx context.Context, v fssnap.View) (fssnap.View, error) {
	if err := d.find(ctx, v); err != nil {
		return v, err
	}
	t, err := mountinfo.Self()
	if err != nil {
		return v, err
	}
	clones, err := d.clones(ctx, v)
	if err != nil {
		return v, err
	}
	for _, c := range clones {
		if v.Path = rootOf(t, c); v.Path != "" {
			return v, nil
		}
		if err := d.destroy(ctx, c); err != nil { // an empty shell: make it anew
			return v, err
		}
	}
	for i := 0; ; i++ {
		clone := cloneName(v.Source, v.Name, i)
		if _, err := d.o.Run(ctx, "zfs", "list", "-H", "-o", "name", clone); gone(err) {
			return d.open(ctx, v, rootOf(t, v.Source), clone)
		} else if err != nil {
			return v, err
		}
	}
}

// Check implements fssnap.Driver.
func (d *Driver) Check(ctx context.Context, v fssnap.View) error {
	if err := d.find(ctx, v); err != nil {
		return err
	}
	if st, err := os.Stat(v.Path); err != nil || !st.IsDir() {
		return &fssnap.BrokenError{View: v.Name, Why: fmt.Sprintf("nothing is at %s any more: %v", v.Path, err)}
	}
	at, err := fssnap.Locate(v.Path)
	if err != nil {
		return err
	}
	if filepath.Base(filepath.Dir(at.Path)) == "snapshot" {
		return nil // its name says what it is
	}
	clones, err := d.clones(ctx, v)
	if err != nil {
		return err
	}
	if !slices.Contains(clones, at.Mount.Source) {
		return &fssnap.BrokenError{View: v.Name, Why: "its clone is no longer mounted at " + v.Path}
	}
	return nil
}

// Remove implements fssnap.Driver.
func (d *Driver) Remove(ctx context.Context, v fssnap.View) error {
	if err := d.find(ctx, v); errors.Is(err, fssnap.ErrGone) {
		return nil
	} else if err != nil {
		return err
	}
	clones, err := d.clones(ctx, v)
	if err != nil {
		return err
	}
	for _, c := range clones {
		t, err := mountinfo.Self()
		if err != nil {
			return err
		}
		root := rootOf(t, c)
		if root != "" {
			if err := fssnap.UnmountBelow(root); err != nil {
				return err
			}
		}
		if err := d.destroy(ctx, c); err != nil {
			return err
		}
		if root != "" {
			_ = os.Remove(root) // empty; zfs has mostly removed it
		}
		if err := fssnap.RemoveMountPoint(d.o.StateDir, filepath.Base(c)); err != nil {
			return err
		}
	}
	return d.destroy(ctx, v.Source+"@"+v.Name)
}

// destroy waits for what the kernel, or zfs-fuse, has not let go of yet.
func (d *Driver) destroy(ctx context.Context, name string) error {
	for try := 0; ; try++ {
		_, err := d.o.Run(ctx, "zfs", "destroy", name)
		if err == nil || gone(err) {
			return nil
		}
		var ce *fssnap.CommandError
		if !errors.As(err, &ce) || !strings.Contains(ce.Stderr, "busy") || try == 50 {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		case <-time.After(100 * time.Millisecond):
		}
	}
}
