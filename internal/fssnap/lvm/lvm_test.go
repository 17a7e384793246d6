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
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/fssnap/fssnaptest"
)

// lvm2 plays the commands of LVM 2.03. Its volumes are images on loop devices; a snapshot is a copy of
// the image, taken while the filesystem is frozen, as the device mapper does it.
type lvm2 struct {
	t     *testing.T
	sys   string // /sys/dev/block
	free  int64
	rows  []map[string]string
	image map[string]string // by device
	point string            // where the origin is mounted
	ran   []string
	fail  string // the command that fails
}

const extent = 4 << 20

// newLVM makes a volume vg/data with a filesystem, mounted at the returned directory.
func newLVM(t *testing.T, size int64, thin bool, fsType string, mkfs ...string) (*lvm2, string) {
	t.Helper()
	image := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	dev := fssnaptest.Attach(t, image)
	fssnaptest.Tool(t, append(mkfs, dev)...)
	f := &lvm2{t: t, sys: t.TempDir(), free: 100 * extent, image: map[string]string{dev: image}, point: filepath.Join(t.TempDir(), "mnt")}
	row := f.row("data", dev, size)
	if thin {
		row["pool_lv"], row["lv_attr"], row["data_percent"] = "pool", "Vwi-aotz--", "12.50"
		pool := f.row("pool", "", 2*size)
		pool["lv_attr"], pool["data_percent"], pool["metadata_percent"] = "twi-aotz--", "6.25", "10.94"
		pool["lv_kernel_major"], pool["lv_kernel_minor"] = "253", "1000"
		f.rows = append(f.rows, pool)
	}
	f.rows = append(f.rows, row)
	uuid := filepath.Join(f.sys, row["lv_kernel_major"]+":"+row["lv_kernel_minor"], "dm", "uuid")
	if err := os.MkdirAll(filepath.Dir(uuid), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(uuid, []byte("LVM-aX2bXy0cLzPIrbJz3GZlUbHCw7xJ0eRbfYvDNaGvhUcSxK1TqUIQqWlc8nHcD9mM\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	fssnaptest.MountAt(t, dev, f.point, fsType, "")
	return f, f.point
}

func (f *lvm2) row(name, dev string, size int64) map[string]string {
	r := map[string]string{
		"vg_name": "vg", "lv_name": name, "lv_attr": "-wi-ao----", "lv_path": dev, "origin": "", "pool_lv": "",
		"lv_size": fmt.Sprint(size), "data_percent": "", "metadata_percent": "", "lv_kernel_major": "-1", "lv_kernel_minor": "-1",
	}
	if dev != "" {
		var st unix.Stat_t
		if err := unix.Stat(dev, &st); err != nil {
			f.t.Fatal(err)
		}
		r["lv_kernel_major"], r["lv_kernel_minor"] = fmt.Sprint(unix.Major(st.Rdev)), fmt.Sprint(unix.Minor(st.Rdev))
	}
	return r
}

func (f *lvm2) get(name string) map[string]string {
	i := slices.IndexFunc(f.rows, func(r map[string]string) bool { return r["lv_name"] == name })
	if i < 0 {
		return nil
	}
	return f.rows[i]
}

func (f *lvm2) Run(ctx context.Context, argv ...string) ([]byte, error) {
	f.ran = append(f.ran, strings.Join(argv, " "))
	fail := func(code int, stderr string) ([]byte, error) {
		return nil, &fssnap.CommandError{Argv: argv, Stderr: stderr, Err: fmt.Errorf("exit status %d", code)}
	}
	if f.fail == argv[0] {
		return fail(5, "Volume group \"vg\" has insufficient free space (0 extents): 1 required.")
	}
	last := strings.TrimPrefix(argv[len(argv)-1], "vg/")
	switch argv[0] {
	case "lvs":
		rows := f.rows
		if strings.HasPrefix(argv[len(argv)-1], "vg/") {
			if f.get(last) == nil {
				return fail(5, `Failed to find logical volume "vg/`+last+`"`)
			}
			rows = []map[string]string{f.get(last)}
		}
		return json.Marshal(map[string]any{"report": []any{map[string]any{"lv": rows}}})
	case "vgs":
		return []byte(fmt.Sprintf("  {\n      \"report\": [\n          {\n              \"vg\": [\n                  {\"vg_name\":\"vg\", \"vg_free\":\"%d\", \"vg_extent_size\":\"%d\"}\n              ]\n          }\n      ]\n  }\n", f.free, extent)), nil
	case "blkid":
		return fssnap.Run(ctx, argv...)
	case "lvcreate":
		name := argv[slices.Index(argv, "--name")+1]
		origin := f.get(last)
		if f.get(name) != nil {
			return fail(5, `Logical Volume "`+name+`" already exists in volume group "vg"`)
		}
		image := f.image[origin["lv_path"]] + "." + name
		fssnaptest.Tool(f.t, "fsfreeze", "--freeze", f.point)
		_, err := fssnap.Run(ctx, "cp", "--sparse=always", f.image[origin["lv_path"]], image)
		fssnaptest.Tool(f.t, "fsfreeze", "--unfreeze", f.point)
		if err != nil {
			return nil, err
		}
		dev := fssnaptest.Tool(f.t, "losetup", "--find", "--show", image)
		f.image[dev] = image
		size, _ := strconv.ParseInt(origin["lv_size"], 10, 64)
		row := f.row(name, dev, size)
		row["origin"], row["data_percent"], row["lv_attr"] = last, "0.05", "swi-a-s---"
		if origin["pool_lv"] != "" {
			row["pool_lv"], row["lv_attr"] = origin["pool_lv"], "Vwi-a-tz--"
		}
		f.rows = append(f.rows, row)
		return []byte("  Logical volume \"" + name + "\" created.\n"), nil
	case "lvremove":
		row := f.get(last)
		if row == nil {
			return fail(5, `Failed to find logical volume "vg/`+last+`"`)
		}
		if strings.Contains(fssnaptest.Tool(f.t, "cat", "/proc/self/mounts"), row["lv_path"]+" ") {
			return fail(5, "Logical volume vg/"+last+" contains a filesystem in use.")
		}
		fssnaptest.Tool(f.t, "losetup", "--detach", row["lv_path"])
		f.rows = slices.DeleteFunc(f.rows, func(r map[string]string) bool { return r["lv_name"] == last })
		return nil, os.Remove(f.image[row["lv_path"]])
	}
	f.t.Errorf("unexpected command %q", argv)
	return fail(3, "no such command")
}

// cleanup takes away what a failed test leaves.
func (f *lvm2) cleanup() {
	for _, r := range slices.Clone(f.rows) {
		if r["origin"] != "" {
			if _, err := f.Run(context.Background(), "lvremove", "vg/"+r["lv_name"]); err != nil {
				f.t.Error(err)
			}
		}
	}
}

func (f *lvm2) driver(o Options) *Driver {
	o.Run, o.BlockDir = f.Run, f.sys
	return New(o)
}

func mkdir(t *testing.T, path string) string {
	t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

var ext4 = []string{"mkfs.ext4", "-q", "-F"}

func TestLaws(t *testing.T) {
	for _, c := range []struct {
		name, fsType string
		thin         bool
		size         int64
		mkfs         []string
	}{
		{"classic ext4", "ext4", false, 32 << 20, ext4},
		{"thin xfs", "xfs", true, 300 << 20, []string{"mkfs.xfs", "-q"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, top := newLVM(t, c.size, c.thin, c.fsType, c.mkfs...)
			t.Cleanup(f.cleanup)
			dir := mkdir(t, filepath.Join(top, "srv/ocis"))
			fssnaptest.Laws(t, fssnaptest.Rig{
				Driver: func(state string) fssnap.Driver { return f.driver(Options{StateDir: state}) },
				Dir:    dir,
			})
		})
	}
}

// TestSize: what a classic snapshot gets.
func TestSize(t *testing.T) {
	f, top := newLVM(t, 32<<20, false, "ext4", ext4...)
	t.Cleanup(f.cleanup)
	ctx := context.Background()
	for _, c := range []struct {
		name       string
		want, free int64
		size       int64 // 0: refused
	}{
		{"a fifth, in whole extents", 0, 100 * extent, 2 * extent},
		{"at most what is free", 0, extent + 1, extent},
		{"as told", 9*extent - 1, 100 * extent, 9 * extent},
		{"as told, at most what is free", 9 * extent, 3 * extent, 3 * extent},
		{"nothing is free", 0, extent - 1, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			f.free, f.ran = c.free, nil
			state := t.TempDir()
			d := f.driver(Options{Size: c.want, StateDir: state})
			src, err := d.Probe(ctx, top)
			if c.size == 0 {
				if !errors.Is(err, fssnap.ErrNotSupported) || !strings.Contains(err.Error(), "vg") {
					t.Errorf("probe: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			name := fssnap.NewName(time.Now())
			views, err := d.Create(ctx, name, []fssnap.Source{src})
			if err != nil {
				t.Fatal(err)
			}
			want := fmt.Sprintf("lvcreate --yes --snapshot --name %s.0 --addtag holdfast --setactivationskip n --permission rw --size %db vg/data", name, c.size)
			if !slices.Contains(f.ran, want) {
				t.Errorf("not run: %s\n%s", want, strings.Join(f.ran, "\n"))
			}
			if err := d.Remove(ctx, views[0]); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestOverflow: what lvs says of a snapshot that cannot be trusted.
func TestOverflow(t *testing.T) {
	for _, c := range []struct {
		name, attr, data, poolAttr, poolData, poolMeta string
		thin                                           bool
		want                                           string // "" is fine
	}{
		{name: "classic", attr: "swi-aos---", data: "42.00"},
		{name: "classic, full", attr: "swi-aos---", data: "100.00", want: "full"},
		{name: "classic, invalid", attr: "swi-Ios---", data: "100.00", want: "invalid"},
		{name: "classic, invalid and suspended", attr: "swi-Sos---", data: "100.00", want: "invalid"},
		{name: "classic, a disk is gone", attr: "swi-aos-p-", data: "1.00", want: "disk"},
		{name: "thin", thin: true, attr: "Vwi-aotz--", data: "100.00", poolAttr: "twi-aotz--", poolData: "99.99", poolMeta: "50.00"},
		{name: "thin, pool full", thin: true, attr: "Vwi-aotz--", data: "1.00", poolAttr: "twi-aotz--", poolData: "100.00", poolMeta: "50.00", want: "vg/pool is full"},
		{name: "thin, pool out of space", thin: true, attr: "Vwi-aotz--", data: "1.00", poolAttr: "twi-aotzD-", poolData: "100.00", poolMeta: "50.00", want: "out of space"},
		{name: "thin, pool metadata full", thin: true, attr: "Vwi-aotz--", data: "1.00", poolAttr: "twi-aotzM-", poolData: "10.00", poolMeta: "100.00", want: "metadata"},
		{name: "thin, failed", thin: true, attr: "Vwi-aotzF-", data: "1.00", poolAttr: "twi-aotz--", poolData: "10.00", poolMeta: "10.00", want: "failed"},
		{name: "thin, pool failed", thin: true, attr: "Vwi-aotz--", data: "1.00", poolAttr: "twi-aotzF-", poolData: "10.00", poolMeta: "10.00", want: "vg/pool failed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, top := newLVM(t, 16<<20, c.thin, "ext4", ext4...)
			t.Cleanup(f.cleanup)
			ctx := context.Background()
			state := t.TempDir()
			fssnaptest.Clean(t, state)
			d := f.driver(Options{StateDir: state})
			s := fssnaptest.NewSet(t, fssnap.Options{StateDir: state}, []fssnap.Driver{d}, top)
			if err := s.Check(ctx); err != nil {
				t.Errorf("check of a new view: %v", err)
			}
			row := f.get(s.Views()[0].Name)
			row["lv_attr"], row["data_percent"] = c.attr, c.data
			if c.thin {
				p := f.get("pool")
				p["lv_attr"], p["data_percent"], p["metadata_percent"] = c.poolAttr, c.poolData, c.poolMeta
			}
			err := s.Check(ctx)
			_, verr := s.Verify(ctx, fssnap.VerifyOptions{Frozen: true})
			list, lerr := d.List(ctx)
			if lerr != nil || len(list) != 1 || !strings.Contains(list[0].Broken, c.want) || (list[0].Broken == "") != (c.want == "") {
				t.Errorf("list: %+v, %v", list, lerr)
			}
			if c.want == "" {
				if err != nil || verr != nil {
					t.Errorf("check: %v; verify: %v", err, verr)
				}
				return
			}
			var broken *fssnap.BrokenError
			if !errors.As(err, &broken) || !errors.As(verr, &broken) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("check: %v; verify: %v", err, verr)
			}
		})
	}
}

func TestCreateFails(t *testing.T) {
	f, top := newLVM(t, 16<<20, false, "ext4", ext4...)
	t.Cleanup(f.cleanup)
	state := t.TempDir()
	d := f.driver(Options{StateDir: state})
	s, err := fssnap.NewSet(context.Background(), []fssnap.Driver{d}, []string{top}, fssnap.Options{StateDir: state})
	if err != nil {
		t.Fatal(err)
	}
	f.fail = "lvcreate"
	if err := s.Create(context.Background()); err == nil || !strings.Contains(err.Error(), "insufficient free space") {
		t.Errorf("create: %v", err)
	}
	if e, err := os.ReadDir(filepath.Join(state, "views")); err != nil || len(e) > 1 { // mnt, empty
		t.Errorf("left: %v, %v", e, err)
	}
}

func TestRefused(t *testing.T) {
	ctx := context.Background()
	f, top := newLVM(t, 16<<20, false, "ext4", ext4...)
	d := f.driver(Options{})
	if _, err := d.Probe(ctx, t.TempDir()); !errors.Is(err, fssnap.ErrNotSupported) {
		t.Errorf("what is not on LVM: %v", err)
	}
	f.get("data")["lv_attr"] = "swi-aos---"
	if _, err := d.Probe(ctx, top); !errors.Is(err, fssnap.ErrNotSupported) || !strings.Contains(err.Error(), "itself") {
		t.Errorf("a snapshot: %v", err)
	}
	f.fail = "lvs"
	if _, err := d.Probe(ctx, top); !errors.Is(err, fssnap.ErrNotSupported) {
		t.Errorf("lvs fails: %v", err)
	}
	g, top := newLVM(t, 128<<20, false, "btrfs", "mkfs.btrfs", "-q")
	// Btrfs has a device number of its own.
	if _, err := g.driver(Options{}).Probe(ctx, top); !errors.Is(err, fssnap.ErrNotSupported) {
		t.Errorf("btrfs on LVM: %v", err)
	}
	none := New(Options{Run: func(_ context.Context, argv ...string) ([]byte, error) {
		return nil, &fssnap.CommandError{Argv: argv, Err: exec.ErrNotFound}
	}, StateDir: t.TempDir()})
	if list, err := none.List(ctx); err != nil || list != nil {
		t.Errorf("without lvm2: %v, %v", list, err)
	}
}
