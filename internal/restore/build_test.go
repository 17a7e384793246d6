package restore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/pax/paxtest"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// memRepo is a repository in memory, with faults.
type memRepo struct {
	blobs [2]map[id.ID][]byte
	lost  map[id.ID]bool  // cannot be loaded
	lie   map[id.ID]int64 // wrong length in the index
	hook  func(id.ID)     // before a blob is handed out by LoadBlobs

	mu     sync.Mutex
	loaded map[id.ID]int
}

func newMemRepo() *memRepo {
	return &memRepo{
		blobs: [2]map[id.ID][]byte{{}, {}}, lost: map[id.ID]bool{}, lie: map[id.ID]int64{}, loaded: map[id.ID]int{},
	}
}

func (r *memRepo) save(t repo.BlobType, p []byte) id.ID {
	d := id.Hash(p)
	if _, ok := r.blobs[t][d]; !ok {
		r.blobs[t][d] = bytes.Clone(p)
	}
	return d
}

func (r *memRepo) Size(t repo.BlobType, d id.ID) (int64, bool) {
	p, ok := r.blobs[t][d]
	if n, lie := r.lie[d]; lie {
		return n, true
	}
	return int64(len(p)), ok
}

func (r *memRepo) LoadBlob(ctx context.Context, t repo.BlobType, d id.ID, buf []byte) ([]byte, error) {
	p, ok := r.blobs[t][d]
	if !ok || r.lost[d] {
		return nil, fmt.Errorf("blob %s is damaged", d.Short())
	}
	r.mu.Lock()
	r.loaded[d]++
	r.mu.Unlock()
	return append(buf[:0], p...), ctx.Err()
}

func (r *memRepo) LoadBlobs(ctx context.Context, t repo.BlobType, ids []id.ID, fn func(id.ID, []byte) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for _, d := range ids {
		g.Go(func() error {
			if r.hook != nil {
				r.hook(d)
			}
			p, err := r.LoadBlob(ctx, t, d, nil)
			if err != nil {
				return err
			}
			return fn(d, p)
		})
	}
	return g.Wait()
}

// piecesOf cuts data into blobs of uneven sizes.
func (r *memRepo) piecesOf(data []byte) []id.ID {
	ids := []id.ID{}
	for n := 1000; len(data) > 0; n = n*3/2 + 7 {
		n = min(n, len(data))
		ids = append(ids, r.save(repo.DataBlob, data[:n]))
		data = data[n:]
	}
	return ids
}

func (r *memRepo) tree(nodes ...*snapshot.Node) id.ID {
	sort.SliceStable(nodes, func(i, j int) bool { return nodes[i].Name < nodes[j].Name })
	var out []byte
	for i, n := range nodes { // one by one, so that bad trees can be made
		p := snapshot.EncodeTree([]*snapshot.Node{n})
		p = p[len(`{"nodes":[`) : len(p)-len("]}\n")]
		if i > 0 {
			out = append(out, ',')
		}
		out = append(out, p...)
	}
	return r.save(repo.TreeBlob, []byte(`{"nodes":[`+string(out)+"]}\n"))
}

func (r *memRepo) folder(name string, nodes ...*snapshot.Node) *snapshot.Node {
	return &snapshot.Node{Name: name, Type: snapshot.Dir, Mode: fs.ModeDir | 0o755, ModTime: time.Unix(1e9, 5), Subtree: r.tree(nodes...)}
}

func (r *memRepo) file(name, content string) *snapshot.Node {
	return &snapshot.Node{
		Name: name, Type: snapshot.File, Mode: 0o644, ModTime: time.Unix(1e9, 7), Size: uint64(len(content)), Content: r.piecesOf([]byte(content)),
	}
}

func symlink(name, target string) *snapshot.Node {
	return &snapshot.Node{Name: name, Type: snapshot.Symlink, Mode: fs.ModeSymlink | 0o777, ModTime: time.Unix(1e9, 9), LinkTarget: target}
}

// --- a small capture, as the oracle's other half ---------------------------------------------------

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// capturer makes snapshots of directories the slow and simple way.
type capturer struct{ r *memRepo }

func readXattrs(p string) (out []snapshot.Xattr) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(p, buf)
	if err != nil || n == 0 {
		return nil
	}
	for _, name := range strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		v := make([]byte, 64<<10)
		k := must(unix.Lgetxattr(p, name, v))
		out = append(out, snapshot.Xattr{Name: name, Value: v[:k]})
	}
	return out
}

func holesOf(p string, size int64) string {
	f := must(os.Open(p))
	defer f.Close()
	var out []string
	for off := int64(0); off < size; {
		data, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if err != nil {
			data = size
		}
		if data > off {
			out = append(out, fmt.Sprintf("%d:%d", off, data-off))
		}
		if data >= size {
			break
		}
		off = must(unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE))
	}
	return strings.Join(out, ",")
}

func (c *capturer) node(p, name string, skip func(string) bool) *snapshot.Node {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		panic(err)
	}
	n := &snapshot.Node{
		Name: name, UID: st.Uid, GID: st.Gid, ModTime: time.Unix(st.Mtim.Sec, st.Mtim.Nsec).UTC(), Mode: fs.FileMode(st.Mode & 0o777),
		Xattrs: readXattrs(p),
	}
	for bit, m := range map[uint32]fs.FileMode{unix.S_ISUID: fs.ModeSetuid, unix.S_ISGID: fs.ModeSetgid, unix.S_ISVTX: fs.ModeSticky} {
		if st.Mode&bit != 0 {
			n.Mode |= m
		}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		data := must(os.ReadFile(p))
		n.Type, n.Size, n.Content = snapshot.File, uint64(len(data)), c.r.piecesOf(data)
		if h := holesOf(p, st.Size); h != "" {
			n.Xattrs = append(n.Xattrs, snapshot.Xattr{Name: snapshot.AttrHoles, Value: []byte(h)})
		}
	case unix.S_IFDIR:
		n.Type = snapshot.Dir
		var kids []*snapshot.Node
		for _, e := range must(os.ReadDir(p)) {
			child := filepath.Join(p, e.Name())
			if skip == nil || !skip(child) {
				kids = append(kids, c.node(child, e.Name(), skip))
			}
		}
		n.Subtree = c.r.tree(kids...)
	case unix.S_IFLNK:
		n.Type, n.LinkTarget = snapshot.Symlink, must(os.Readlink(p))
	case unix.S_IFIFO:
		n.Type = snapshot.FIFO
	case unix.S_IFSOCK:
		n.Type = snapshot.Socket
	case unix.S_IFCHR:
		n.Type, n.Device = snapshot.CharDev, st.Rdev
	case unix.S_IFBLK:
		n.Type, n.Device = snapshot.Dev, st.Rdev
	}
	if st.Nlink > 1 && n.Type != snapshot.Dir {
		n.Links, n.Inode, n.DeviceID = st.Nlink, st.Ino, 1
	}
	return n
}

// store captures dir the way a store is: everything below spaces/<name> in an archive of its own,
// files below a folder called blobs with their content in the tree of the users.
func (c *capturer) store(dir string) (storeNode *snapshot.Node) {
	tars := map[string]*paxtest.Writer{"": {}}
	first := map[string]map[uint64]string{}
	var contents []*snapshot.Node
	var walk func(rel string)
	walk = func(rel string) {
		p := filepath.Join(dir, rel)
		n := c.node(p, path.Base(rel), func(string) bool { return true })
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			panic(err)
		}
		key := ""
		if parts := strings.Split(rel, "/"); parts[0] == "spaces" && len(parts) > 1 {
			key = parts[1]
		}
		if tars[key] == nil {
			tars[key] = &paxtest.Writer{}
		}
		if first[key] == nil {
			first[key] = map[uint64]string{}
		}
		it := paxtest.Item{
			Name: rel, Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, Sec: st.Mtim.Sec, Nsec: st.Mtim.Nsec, Rdev: st.Rdev, Rec: map[string]string{},
		}
		for _, x := range n.Xattrs {
			switch {
			case x.Name == snapshot.AttrHoles:
				it.Rec[pax.Holes] = string(x.Value)
			default:
				it.Rec[pax.Xattr+x.Name] = string(x.Value)
			}
		}
		switch n.Type {
		case snapshot.Dir:
			it.Type, it.Name = '5', rel+"/"
			if rel == "" {
				it.Name = "./"
			}
		case snapshot.File:
			it.Type = '0'
			switch {
			case strings.Contains(rel, "/blobs/"):
				name := fmt.Sprintf("file %s", id.Hash([]byte(rel)))
				contents = append(contents, &snapshot.Node{Name: name, Type: snapshot.File, Mode: 0o600, Size: n.Size, Content: n.Content})
				it.Rec[pax.Content], it.Rec[pax.Size] = "/storage/users/spaces/a/"+name, fmt.Sprint(n.Size)
			default:
				it.Data = must(os.ReadFile(p))
			}
		case snapshot.Symlink:
			it.Type, it.Link = '2', n.LinkTarget
		case snapshot.CharDev:
			it.Type = '3'
		case snapshot.Dev:
			it.Type = '4'
		case snapshot.FIFO:
			it.Type = '6'
		case snapshot.Socket:
			it.Type, it.Rec[pax.Type] = '0', "socket"
		}
		if f := first[key][st.Ino]; f != "" && st.Nlink > 1 && n.Type != snapshot.Dir {
			it.Type, it.Link, it.Rec, it.Data = '1', f, nil, nil
		} else {
			first[key][st.Ino] = rel
		}
		tars[key].Add(it)
		if n.Type == snapshot.Dir {
			for _, e := range must(os.ReadDir(p)) {
				walk(joinPath(rel, e.Name()))
			}
		}
	}
	walk("")
	var meta []*snapshot.Node
	for k, w := range tars {
		if k != "" {
			meta = append(meta, c.r.file(k+".tar", string(w.End())))
		}
	}
	return c.r.folder("users",
		c.r.file("store.tar", string(tars[""].End())),
		c.r.folder("metadata", meta...),
		c.r.folder("spaces", c.r.folder("a", contents...)))
}

// oldPlace is where the instances of the tests lay: nowhere on this machine.
const oldPlace = "/nonexistent/instance"

// instance makes a snapshot of root/data (with idm and storage/users in it) and root/config.
func (r *memRepo) instance(root string) *snapshot.Snapshot {
	c := &capturer{r: r}
	data := filepath.Join(root, "data")
	skip := func(p string) bool {
		return p == filepath.Join(data, "idm") || p == filepath.Join(data, "storage/users")
	}
	m := &snapshot.Manifest{
		BasePath: oldPlace + "/data", ConfigDir: oldPlace + "/config",
		Stores: []snapshot.Store{{Name: "users", Root: oldPlace + "/data/storage/users"}},
	}
	ds := func(name, kind, p, tree, store string) {
		m.DataSets = append(m.DataSets, snapshot.DataSet{
			Name: name, Kind: kind, Path: oldPlace + "/" + p, Tree: tree, Store: store, Captured: true, Entries: 10, Bytes: 1000,
		})
	}
	ds("config", "config", "config", "/config/files", "")
	ds("base", "system", "data", "/system/base", "")
	ds("idm", "system", "data/idm", "/system/idm", "")
	ds("storage-users", "metadata", "data/storage/users", "/storage/users", "users")
	ds("storage-users-blobs", "blobs", "data/storage/users", "/storage/users", "users")
	return r.snapshotOf(m,
		r.folder("config", c.node(filepath.Join(root, "config"), "files", nil)),
		r.folder("system", c.node(data, "base", skip), c.node(filepath.Join(data, "idm"), "idm", nil)),
		r.folder("storage", c.store(filepath.Join(data, "storage/users"))),
	)
}

func (r *memRepo) snapshotOf(m *snapshot.Manifest, nodes ...*snapshot.Node) *snapshot.Snapshot {
	nodes = append(nodes, r.file("manifest.json", string(must(json.Marshal(m)))))
	tree := r.tree(nodes...)
	return &snapshot.Snapshot{Tree: &tree}
}

// plain makes a snapshot with the single data set "base" that holds nodes.
func (r *memRepo) plain(nodes ...*snapshot.Node) *snapshot.Snapshot {
	m := &snapshot.Manifest{BasePath: oldPlace + "/data", ConfigDir: oldPlace + "/config", DataSets: []snapshot.DataSet{
		{Name: "base", Kind: "system", Path: oldPlace + "/data", Tree: "/system/base", Captured: true},
	}}
	return r.snapshotOf(m, r.folder("system", r.folder("base", nodes...)))
}

// archive makes a snapshot with a store of one archive.
func (r *memRepo) archive(tar []byte, more ...*snapshot.Node) *snapshot.Snapshot {
	m := &snapshot.Manifest{
		BasePath: oldPlace + "/data", ConfigDir: oldPlace + "/config",
		Stores: []snapshot.Store{{Name: "users", Root: oldPlace + "/data"}},
		DataSets: []snapshot.DataSet{
			{Name: "storage-users", Kind: "metadata", Path: oldPlace + "/data", Store: "users", Captured: true},
		},
	}
	return r.snapshotOf(m, r.folder("storage", r.folder("users", append(more, r.file("store.tar", string(tar)))...)))
}

// --- running ----------------------------------------------------------------------------------------

var testTime = time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)

const testStamp = "20260304T050607Z"

func restoreTo(t *testing.T, r Repo, sn *snapshot.Snapshot, dir string, change func(*Options)) (*Result, error) {
	t.Helper()
	o := Options{BasePath: filepath.Join(dir, "data"), ConfigDir: filepath.Join(dir, "config"), Now: func() time.Time { return testTime }}
	if change != nil {
		change(&o)
	}
	p, err := MakePlan(t.Context(), r, sn, o)
	if err != nil {
		t.Fatalf("plan: %v", err)
	}
	return Run(t.Context(), r, p)
}

func mustRestore(t *testing.T, r Repo, sn *snapshot.Snapshot, dir string, change func(*Options)) *Result {
	t.Helper()
	res, err := restoreTo(t, r, sn, dir, change)
	if err != nil {
		var inc *IncompleteError
		if errors.As(err, &inc) {
			for _, e := range inc.Errors {
				t.Log(e)
			}
		}
		t.Fatalf("restore: %v", err)
	}
	return res
}

func (r *Result) sum() (out DataSetResult) {
	for _, d := range r.DataSets {
		out.Files += d.Files
		out.Unchanged += d.Unchanged
		out.Dirs += d.Dirs
		out.MovedAside += d.MovedAside
		out.Bytes += d.Bytes
		out.Moved = append(out.Moved, d.Moved...)
	}
	return out
}

func write(t *testing.T, p, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func exists(p string) bool {
	_, err := os.Lstat(p)
	return err == nil
}
