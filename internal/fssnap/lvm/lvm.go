// Package lvm makes views by snapshots of LVM logical volumes, with the commands of LVM.
package lvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
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
	// Size is the room for changes that a classic snapshot gets, in bytes; 0 is a fifth of the origin,
	// which lasts for hours on most servers. It is never more than what the group has free. Thin
	// snapshots take their room from their pool.
	Size int64
	// StateDir is where views are mounted; "" is the default.
	StateDir string
	// Run runs the commands; nil is fssnap.Run.
	Run fssnap.Runner
	// BlockDir is /sys/dev/block, but in tests.
	BlockDir string
}

// Driver makes views of logical volumes with ext2, ext3, ext4 or XFS.
//
// It promises: LVM holds the filesystem still while the snapshot is made, so each volume is of one
// instant; several volumes are taken one after the other. The snapshot is mounted read-only below the
// state directory. It is itself writable, because the journal must be replayed into it; on XFS, nouuid
// lets it stand beside its origin. A classic snapshot that is full is lost: Check tells that, before
// and after the view is used, and so it does of a thin pool that is full or failed.
//
// Not run for real: LVM, for want of a device mapper. The tests play its commands by the answers of
// LVM 2.03 and its documentation; the snapshots behind them are copies of frozen ext4 and XFS
// filesystems on loop devices, mounted for real.
type Driver struct{ o Options }

// New returns a driver.
func New(o Options) *Driver {
	if o.Run == nil {
		o.Run = fssnap.Run
	}
	if o.BlockDir == "" {
		o.BlockDir = "/sys/dev/block"
	}
	return &Driver{o}
}

// Kind is lvm.
func (*Driver) Kind() string { return "lvm" }

// volume is a line of lvs.
type volume struct {
	group, name, attr  string
	path               string // of the device
	origin, pool       string
	size               int64 // bytes
	data, metadata     float64
	major, minor       string
	dataSet, activated bool
}

func (v volume) full() string { return v.group + "/" + v.name }

// state returns the letter at a place of lv_attr, '-' if it has none: 0 is the type, 4 the state, 8 the
// health.
func (v volume) state(i int) byte {
	if i >= len(v.attr) {
		return '-'
	}
	return v.attr[i]
}

// broken tells why a snapshot, whose pool is given if it is thin, is not to be trusted; "" if it is.
func (v volume) broken(pool *volume) string {
	switch v.state(4) {
	case 'I', 'S':
		return "the snapshot is invalid, most likely because it was full; give it more room (--lvm-size)"
	case 'm', 'M':
		return "the snapshot failed to merge"
	}
	switch v.state(8) {
	case 'F':
		return "the thin volume failed"
	case 'p':
		return "a disk of it is missing"
	case 'X':
		return "its state is unknown to LVM"
	}
	if v.pool == "" {
		if v.dataSet && v.data >= 100 {
			return "the snapshot is full; give it more room (--lvm-size)"
		}
		return ""
	}
	if pool == nil {
		return ""
	}
	switch pool.state(8) {
	case 'F':
		return "the thin pool " + pool.full() + " failed"
	case 'D':
		return "the thin pool " + pool.full() + " is out of space"
	case 'M':
		return "the metadata of the thin pool " + pool.full() + " is read-only, so it failed or is full"
	}
	if pool.dataSet && (pool.data >= 100 || pool.metadata >= 100) {
		return "the thin pool " + pool.full() + " is full"
	}
	return ""
}

const columns = "vg_name,lv_name,lv_attr,lv_path,origin,pool_lv,lv_size,data_percent,metadata_percent,lv_kernel_major,lv_kernel_minor"

// report asks lvs or vgs.
func (d *Driver) report(ctx context.Context, command, key, columns string, names ...string) ([]map[string]string, error) {
	argv := append([]string{command, "--reportformat", "json", "--units", "b", "--nosuffix", "-o", columns}, names...)
	out, err := d.o.Run(ctx, argv...)
	if err != nil {
		return nil, err
	}
	var r struct {
		Report []map[string][]map[string]string `json:"report"`
	}
	if err := json.Unmarshal(out, &r); err != nil {
		return nil, fmt.Errorf("read the answer of %s: %w; LVM 2.02.158 or later is needed", command, err)
	}
	var rows []map[string]string
	for _, part := range r.Report {
		rows = append(rows, part[key]...)
	}
	return rows, nil
}

func (d *Driver) volumes(ctx context.Context, names ...string) ([]volume, error) {
	rows, err := d.report(ctx, "lvs", "lv", columns, names...)
	if err != nil {
		return nil, err
	}
	var list []volume
	for _, r := range rows {
		v := volume{
			group: r["vg_name"], name: r["lv_name"], attr: r["lv_attr"], path: r["lv_path"], origin: r["origin"], pool: r["pool_lv"],
			major: r["lv_kernel_major"], minor: r["lv_kernel_minor"],
		}
		if v.size, err = strconv.ParseInt(r["lv_size"], 10, 64); err != nil {
			return nil, fmt.Errorf("read the answer of lvs: size of %s: %w", v.full(), err)
		}
		v.data, err = strconv.ParseFloat(r["data_percent"], 64)
		v.dataSet = err == nil // else it is not active, or has none
		v.metadata, _ = strconv.ParseFloat(r["metadata_percent"], 64)
		v.activated = v.major != "-1" && v.major != ""
		list = append(list, v)
	}
	return list, nil
}

// Probe implements fssnap.Driver.
func (d *Driver) Probe(ctx context.Context, path string) (fssnap.Source, error) {
	at, err := fssnap.Locate(path)
	if err != nil {
		return fssnap.Source{}, err
	}
	uuid, err := os.ReadFile(filepath.Join(d.o.BlockDir, at.Mount.Device, "dm", "uuid"))
	if err != nil || !strings.HasPrefix(string(uuid), "LVM-") {
		return fssnap.Source{}, &fssnap.OtherFilesystem{Path: path, Filesystem: at.Mount.Type}
	}
	switch at.Mount.Type {
	case "ext2", "ext3", "ext4", "xfs":
	default:
		return fssnap.Source{}, fssnap.Unsupported("%s is %s on LVM; only ext2, ext3, ext4 and xfs are held still by LVM snapshots", at.Mount.Point, at.Mount.Type)
	}
	v, _, err := d.origin(ctx, at.Mount.Device)
	if err != nil {
		return fssnap.Source{}, err
	}
	s := fssnap.Source{Kind: d.Kind(), Name: v.full(), Path: at.Path}
	if at.Mount.Root == "/" {
		s.Root = at.Mount.Point
	}
	s.Rel, err = fssnap.Rel(at.Inner, "/")
	return s, err
}

// origin finds the volume with a device number, and says how many bytes its snapshot gets, 0 for a
// thin one.
func (d *Driver) origin(ctx context.Context, device string) (volume, int64, error) {
	list, err := d.volumes(ctx)
	if err != nil {
		return volume{}, 0, fssnap.Unsupported("the volumes of LVM cannot be listed: %w", err)
	}
	i := slices.IndexFunc(list, func(v volume) bool { return v.activated && v.major+":"+v.minor == device })
	if i < 0 {
		return volume{}, 0, fssnap.Unsupported("LVM does not know the device %s", device)
	}
	v := list[i]
	if v.pool != "" {
		return v, 0, nil
	}
	if v.state(0) == 's' || v.state(0) == 'S' {
		return v, 0, fssnap.Unsupported("%s is itself a classic LVM snapshot, of which there can be no other", v.full())
	}
	rows, err := d.report(ctx, "vgs", "vg", "vg_name,vg_free,vg_extent_size", v.group)
	if err != nil {
		return v, 0, err
	}
	if len(rows) != 1 {
		return v, 0, fmt.Errorf("read the answer of vgs: %d groups named %s", len(rows), v.group)
	}
	free, err := strconv.ParseInt(rows[0]["vg_free"], 10, 64)
	if err != nil {
		return v, 0, fmt.Errorf("read the answer of vgs: %w", err)
	}
	extent, err := strconv.ParseInt(rows[0]["vg_extent_size"], 10, 64)
	if err != nil || extent <= 0 {
		return v, 0, fmt.Errorf("read the answer of vgs: extent size %q", rows[0]["vg_extent_size"])
	}
	want := d.o.Size
	if want == 0 {
		want = v.size / 5
	}
	size := min((want+extent-1)/extent*extent, free/extent*extent)
	// With less than a hundredth of the origin, it would be full before it is read.
	if size < extent || d.o.Size == 0 && size < v.size/100 {
		return v, 0, fssnap.Unsupported("the group %s has %d bytes free, which is not enough for a snapshot of %s (%d bytes); add a disk to it, or use a thin volume", v.group, free, v.name, v.size)
	}
	return v, size, nil
}

// Create implements fssnap.Driver.
func (d *Driver) Create(ctx context.Context, name string, sources []fssnap.Source) (views []fssnap.View, err error) {
	var types []string
	defer func() {
		if err != nil {
			for i := range types {
				err = errors.Join(err, d.Remove(context.WithoutCancel(ctx), fssnap.View{Name: fmt.Sprintf("%s.%d", name, i), Source: sources[i].Name}))
			}
			views = nil
		}
	}()
	// First all the snapshots, one right after the other; then the mounts, which may have to replay.
	for i, s := range sources {
		at, err := fssnap.Locate(s.Path)
		if err != nil {
			return nil, err
		}
		v, size, err := d.origin(ctx, at.Mount.Device)
		if err != nil {
			return nil, err
		}
		if v.full() != s.Name {
			return nil, fmt.Errorf("%s lies on %s by now, not on %s; look at the instance again", s.Path, v.full(), s.Name)
		}
		view := fssnap.View{Kind: d.Kind(), Name: fmt.Sprintf("%s.%d", name, i), Source: s.Name, MadeAt: time.Now().UTC()}
		view.Transaction = view.Name
		if there, err := d.volumes(ctx, v.group+"/"+view.Name); err == nil && len(there) > 0 {
			return nil, fmt.Errorf("there is a volume %s/%s already", v.group, view.Name)
		}
		types = append(types, at.Mount.Type)
		// Thin snapshots would not be activated otherwise.
		argv := []string{"lvcreate", "--yes", "--snapshot", "--name", view.Name, "--addtag", "holdfast", "--setactivationskip", "n", "--permission", "rw"}
		if size > 0 {
			argv = append(argv, "--size", strconv.FormatInt(size, 10)+"b")
		}
		if _, err := d.o.Run(ctx, append(argv, v.full())...); err != nil {
			return nil, fmt.Errorf("lvm snapshot of %s: %w", s.Name, err)
		}
		views = append(views, view)
	}
	for i := range views {
		if views[i], err = d.mount(ctx, views[i], types[i]); err != nil {
			return nil, err
		}
		if err := d.Check(ctx, views[i]); err != nil {
			return nil, err
		}
	}
	return views, nil
}

// find returns the volume of a view, its pool if it is thin, and its origin's filesystem if that is
// mounted.
//
// Errors: ErrGone.
func (d *Driver) find(ctx context.Context, view fssnap.View) (volume, *volume, error) {
	group, _, _ := strings.Cut(view.Source, "/")
	list, err := d.volumes(ctx)
	if err != nil {
		return volume{}, nil, err
	}
	i := slices.IndexFunc(list, func(v volume) bool { return v.group == group && v.name == view.Name })
	if i < 0 {
		return volume{}, nil, fmt.Errorf("%s/%s: %w", group, view.Name, fssnap.ErrGone)
	}
	return list[i], poolOf(list, list[i]), nil
}

func poolOf(list []volume, v volume) *volume {
	i := slices.IndexFunc(list, func(p volume) bool { return v.pool != "" && p.group == v.group && p.name == v.pool })
	if i < 0 {
		return nil
	}
	return &list[i]
}

func (d *Driver) mount(ctx context.Context, view fssnap.View, fsType string) (fssnap.View, error) {
	v, _, err := d.find(ctx, view)
	if err != nil {
		return view, err
	}
	if view.Path, err = fssnap.MountPoint(d.o.StateDir, view.Name); err != nil {
		return view, err
	}
	options := map[string]string{"xfs": "nouuid"}[fsType]
	flags := uintptr(unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	if err := unix.Mount(v.path, view.Path, fsType, flags, options); err != nil {
		return view, fmt.Errorf("mount the snapshot %s at %s: %w", v.path, view.Path, err)
	}
	return view, nil
}

// List implements fssnap.Driver. It needs no roots.
func (d *Driver) List(ctx context.Context, _ ...string) ([]fssnap.View, error) {
	list, err := d.volumes(ctx)
	if errors.Is(err, exec.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	t, err := mountinfo.Self()
	if err != nil {
		return nil, err
	}
	var views []fssnap.View
	for _, v := range list {
		made, ours := fssnap.ParseName(v.name)
		if !ours || v.origin == "" {
			continue
		}
		view := fssnap.View{Kind: d.Kind(), Name: v.name, Source: v.group + "/" + v.origin, MadeAt: made, Broken: v.broken(poolOf(list, v))}
		if v.dataSet {
			view.Size = int64(float64(v.size) * v.data / 100)
		}
		for _, m := range t {
			if v.activated && m.Device == v.major+":"+v.minor && m.Root == "/" {
				view.Path = m.Point
			}
		}
		views = append(views, view)
	}
	return views, nil
}

// Open implements fssnap.Driver.
func (d *Driver) Open(ctx context.Context, view fssnap.View) (fssnap.View, error) {
	v, _, err := d.find(ctx, view)
	if err != nil {
		return view, err
	}
	if !v.activated {
		if _, err := d.o.Run(ctx, "lvchange", "--activate", "y", "--ignoreactivationskip", v.full()); err != nil {
			return view, err
		}
		if v, _, err = d.find(ctx, view); err != nil {
			return view, err
		}
	}
	t, err := mountinfo.Self()
	if err != nil {
		return view, err
	}
	fsType := ""
	for _, m := range t {
		if m.Device == v.major+":"+v.minor && m.Root == "/" {
			view.Path = m.Point
			return view, nil
		}
	}
	out, err := d.o.Run(ctx, "blkid", "-p", "-o", "value", "-s", "TYPE", v.path)
	if err != nil {
		return view, fmt.Errorf("find out the filesystem of %s: %w", v.path, err)
	}
	fsType = strings.TrimSpace(string(out))
	return d.mount(ctx, view, fsType)
}

// Check implements fssnap.Driver.
func (d *Driver) Check(ctx context.Context, view fssnap.View) error {
	v, pool, err := d.find(ctx, view)
	if err != nil {
		return err
	}
	if why := v.broken(pool); why != "" {
		return &fssnap.BrokenError{View: view.Name, Why: why}
	}
	if at, err := fssnap.Locate(view.Path); err != nil || at.Mount.Device != v.major+":"+v.minor {
		return &fssnap.BrokenError{View: view.Name, Why: "it is no longer mounted at " + view.Path}
	}
	return nil
}

// Remove implements fssnap.Driver.
func (d *Driver) Remove(ctx context.Context, view fssnap.View) error {
	if err := fssnap.RemoveMountPoint(d.o.StateDir, view.Name); err != nil {
		return err
	}
	v, _, err := d.find(ctx, view)
	if errors.Is(err, fssnap.ErrGone) || errors.Is(err, exec.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	t, err := mountinfo.Self()
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(t) {
		if v.activated && m.Device == v.major+":"+v.minor {
			if err := fssnap.Unmount(m.Point); err != nil {
				return err
			}
		}
	}
	for try := 0; ; try++ {
		_, err := d.o.Run(ctx, "lvremove", "--force", "--yes", v.full())
		var ce *fssnap.CommandError
		if err == nil || errors.As(err, &ce) && strings.Contains(ce.Stderr, "Failed to find logical volume") {
			return nil
		}
		// udev and others look into a device that has just been unmounted.
		if !errors.As(err, &ce) || !strings.Contains(ce.Stderr, "in use") || try == 20 {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		case <-time.After(200 * time.Millisecond):
		}
	}
}
