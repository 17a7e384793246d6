// Package browsetest makes snapshots for tests: of the sample instances, and with any content, hostile ones
// too.
package browsetest

import (
	"bytes"
	"crypto/sha1"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/bucket"
	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/s3/s3test"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// Fixtures are the sample instances.
var Fixtures = testfixture.Names()

// Instance is an unpacked sample instance.
type Instance struct {
	*ocis.Instance
	Dir string // has data/ and config/
	// Objects is the folder with the objects of its bucket as files, on a server that ends with the test; ""
	// if its blobs lie on disk.
	Objects string
	server  *s3test.Server
}

// Unpack unpacks a sample instance. If its blobs lie in a bucket, a server is started that has them.
func Unpack(t testing.TB, name string) *Instance {
	t.Helper()
	i := &Instance{Dir: testfixture.Unpack(t, name)}
	if name == testfixture.OCISWithS3Blobs {
		i.server = s3test.Start(t, s3test.Options{})
		i.fill(t, filepath.Join(i.Dir, "bucket"))
	}
	i.find(t)
	return i
}

// UnpackVersioned unpacks the spaces of alan and mary of the sample instance with a bucket, which keeps versions.
func UnpackVersioned(t testing.TB) *Instance {
	t.Helper()
	i := &Instance{Dir: testfixture.Unpack(t, testfixture.OCISWithS3Blobs), server: s3test.Start(t, s3test.Options{Versioning: true})}
	i.Objects = filepath.Join(i.server.Dir, i.server.Bucket(t, true, false))
	i.find(t)
	b, top := i.Bucket(t), filepath.Join(i.Dir, "bucket")
	for _, space := range []string{alan, mary} {
		err := filepath.WalkDir(filepath.Join(top, space), func(p string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			fi, err := d.Info()
			if err != nil {
				return err
			}
			_, err = b.Put(t.Context(), strings.TrimPrefix(p, top+"/"), fi.Size(), func() (io.ReadCloser, error) { return os.Open(p) })
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	i.Trim(t)
	return i
}

const alan, mary = "b1f74ec4-dd7e-11ef-a543-03775734d0f7", "056fc874-dd7f-11ef-ba84-af6fca4b7289"

// Trim leaves of the instance the spaces of alan and mary, the system storage, and the data sets that are named:
// what is small is quick to capture, to copy and to compare.
func (i *Instance) Trim(t testing.TB, sets ...string) {
	t.Helper()
	i.DataSets = slices.DeleteFunc(i.DataSets, func(d ocis.DataSet) bool { return d.Store == "" && !slices.Contains(sets, d.Name) })
	data, users := filepath.Join(i.Dir, "data"), i.Store("users").Root
	for pattern, keep := range map[string][]string{
		data + "/*": append([]string{"storage"}, sets...), users + "/spaces/*/*": {alan[2:], mary[2:]},
		users + "/users/*": {"alan", "alan.mlock", "mary", "mary.mlock"}, users + "/projects/*": nil,
		filepath.Join(i.Dir, "bucket") + "/*": nil, i.Objects + "/*": {alan, mary},
	} {
		if strings.HasPrefix(pattern, "/*") {
			continue // no bucket
		}
		list, err := filepath.Glob(pattern)
		for _, p := range list {
			if !slices.Contains(keep, filepath.Base(p)) {
				err = errors.Join(err, os.RemoveAll(p))
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// Copy copies it, to be damaged.
func (i *Instance) Copy(t testing.TB) *Instance {
	t.Helper()
	c := &Instance{Dir: t.TempDir(), server: i.server}
	for _, part := range []string{"data", "config"} {
		if out, err := exec.Command("cp", "-a", filepath.Join(i.Dir, part), c.Dir).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	if i.server != nil {
		c.fill(t, i.Objects)
	}
	c.find(t)
	return c
}

func (i *Instance) fill(t testing.TB, from string) {
	t.Helper()
	i.Objects = filepath.Join(i.server.Dir, i.server.Bucket(t, false, false))
	if err := os.CopyFS(i.Objects, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

func (i *Instance) find(t testing.TB) {
	t.Helper()
	o := discover.Options{BaseDataPath: filepath.Join(i.Dir, "data"), ConfigDir: filepath.Join(i.Dir, "config"), NoSizes: true}
	if s := i.server; s != nil {
		const p = "STORAGE_USERS_DECOMPOSEDS3_"
		o.Environ = []string{
			"STORAGE_USERS_DRIVER=s3ng", p + "ENDPOINT=" + s.Endpoint, p + "REGION=" + s.Region, p + "BUCKET=" + filepath.Base(i.Objects),
			p + "ACCESS_KEY=" + s.AccessKey, p + "SECRET_KEY=" + s.SecretKey,
		}
	}
	var err error
	if i.Instance, err = discover.Discover(t.Context(), o); err != nil {
		t.Fatal(err)
	}
}

// Bucket opens the bucket; nil if there is none.
func (i *Instance) Bucket(t testing.TB) *bucket.Bucket {
	t.Helper()
	if i.server == nil {
		return nil
	}
	b, err := bucket.Open(t.Context(), bucket.Of(i.Store("users").S3))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

const sharesSpace = "jsoncs3-share-manager-metadata"

// ShareNode is the node of a path in the space of the system storage that holds the lists of shares; a path
// that does not exist leads to one that does not.
func (i *Instance) ShareNode(p string) string {
	at := filepath.Join(i.Store("system").Root, ocis.SpacePath(sharesSpace), "nodes", ocis.NodePath(sharesSpace))
	for _, name := range strings.Split(p, "/") {
		target, err := os.Readlink(filepath.Join(at, name))
		if err != nil {
			return filepath.Join(at, name)
		}
		at = filepath.Join(at, target)
	}
	return at
}

// ShareList is the content of a list of shares; nothing if there is none.
func (i *Instance) ShareList(t testing.TB, p string) []byte {
	t.Helper()
	node := i.ShareNode(p)
	if _, err := os.Lstat(node); err != nil {
		return nil
	}
	_, blob := i.shareMeta(t, node)
	data, err := os.ReadFile(blob)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// SetShareList gives a list of shares another content, in its old blob.
func (i *Instance) SetShareList(t testing.TB, p, content string) {
	t.Helper()
	node := i.ShareNode(p)
	a, blob := i.shareMeta(t, node)
	sum := sha1.Sum([]byte(content))
	a.Set(i.Store("system").Prefix, "blobsize", []byte(strconv.Itoa(len(content))))
	a.Set(i.Store("system").Prefix, "cs.sha1", sum[:])
	if err := errors.Join(os.WriteFile(node+".mpk", ocis.EncodeMPK(a), 0o600), os.WriteFile(blob, []byte(content), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func (i *Instance) shareMeta(t testing.TB, node string) (a ocis.Attributes, blob string) {
	t.Helper()
	p, err := os.ReadFile(node + ".mpk")
	if err == nil {
		a, err = ocis.ParseMPK(p)
	}
	if err != nil {
		t.Fatal(err)
	}
	return a, filepath.Join(i.Store("system").Root, ocis.SpacePath(sharesSpace), "blobs", ocis.NodePath(a.Text("blobid")))
}

// NewRepo makes an empty repository in memory.
func NewRepo(t testing.TB) *repo.Repository {
	t.Helper()
	r, err := repo.Init(t.Context(), mem.New(), "secret", repo.InitOptions{KDF: repo.KDF{N: 1024, R: 1, P: 1}})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	return r
}

// Backup captures an instance and saves its record.
func Backup(t testing.TB, r *repo.Repository, i *Instance, at time.Time) *snapshot.Snapshot {
	t.Helper()
	return BackupWay(t, r, i, at, snapshot.WayCopy)
}

// BackupWay is Backup with a way to secure the blobs of a bucket.
func BackupWay(t testing.TB, r *repo.Repository, i *Instance, at time.Time, way string) *snapshot.Snapshot {
	t.Helper()
	o := capture.Options{Instance: i.Instance}
	if b := i.Bucket(t); b != nil {
		o.Objects = map[string]*capture.Objects{"users": {Way: way, Source: b}}
	}
	w := r.NewWriter(t.Context())
	res, err := capture.Run(t.Context(), r, w, o)
	if err != nil {
		t.Fatal(err)
	}
	root, err := res.Finish(t.Context(), []byte("readme"))
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	return record(t, r, root, at)
}

func record(t testing.TB, r *repo.Repository, root id.ID, at time.Time) *snapshot.Snapshot {
	t.Helper()
	sn := &snapshot.Snapshot{Time: at, Tree: &root, Tags: []string{snapshot.Tag}, Hostname: "cloud", Paths: []string{"/data"}}
	if err := snapshot.Save(t.Context(), r, sn); err != nil {
		t.Fatal(err)
	}
	return sn
}

// Captured is a snapshot of a sample instance.
type Captured struct {
	Repo     *repo.Repository
	Snapshot *snapshot.Snapshot
	Want     *testfixture.Expected
}

var (
	mu       sync.Mutex
	captured = map[string]*Captured{}
)

// Fixture captures a sample instance, once for all tests of a program.
func Fixture(t testing.TB, name string) *Captured {
	t.Helper()
	mu.Lock()
	defer mu.Unlock()
	if c := captured[name]; c != nil {
		return c
	}
	i := Unpack(t, name)
	r := NewRepo(t)
	c := &Captured{Repo: r, Snapshot: Backup(t, r, i, time.Now()), Want: testfixture.LoadExpected(t, i.Dir)}
	captured[name] = c
	return c
}

// Node is a file or, if Dir is set or there are Nodes, a folder. Names are taken as they are.
type Node struct {
	Name    string
	Content string
	ID      string // node id
	SHA1    string // "" is the right one, "-" none
	MTime   time.Time
	Mode    fs.FileMode
	Dir     bool
	Nodes   []Node
	Type    snapshot.NodeType // for what is neither
	Target  string
}

// Epoch is the time of what has none.
var Epoch = time.Date(2026, 11, 20, 12, 0, 0, 123456789, time.UTC)

// Space is one space with what is in it.
type Space struct {
	ID, Name, Alias          string
	Files, Versions, Trashed []Node // Versions and Trashed as docs/FORMAT.md lays them out
}

// Snapshot saves a snapshot with these spaces in a store called users.
func Snapshot(t testing.TB, r *repo.Repository, at time.Time, spaces ...Space) *snapshot.Snapshot {
	t.Helper()
	w := r.NewWriter(t.Context())
	tops := map[string][]Node{}
	st := snapshot.Store{Name: "users", Layout: "decomposed", Prefix: "user.oc.", Driver: "decomposed"}
	for _, s := range spaces {
		kind, _, _ := strings.Cut(s.Alias, "/")
		st.Spaces = append(st.Spaces, snapshot.Space{ID: s.ID, Name: s.Name, Alias: s.Alias, Folder: s.Alias, Type: kind, Owner: s.ID})
		for top, nodes := range map[string][]Node{"spaces": s.Files, "versions": s.Versions, "trash": s.Trashed} {
			if nodes != nil {
				tops[top] = insert(tops[top], strings.Split(s.Alias, "/"), Node{ID: s.ID, Dir: true, Nodes: nodes})
			}
		}
	}
	m, err := json.Marshal(snapshot.Manifest{Holdfast: "test", Product: "opencloud", Stores: []snapshot.Store{st}, Proof: snapshot.Proof{Complete: true}})
	if err != nil {
		t.Fatal(err)
	}
	var store []Node
	for top, nodes := range tops {
		store = append(store, Node{Name: top, Dir: true, Nodes: nodes})
	}
	root := tree(t, w, []Node{
		{Name: "manifest.json", Content: string(m)},
		{Name: "storage", Dir: true, Nodes: []Node{{Name: "users", Dir: true, Nodes: store}}},
	})
	if err := w.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	return record(t, r, root, at)
}

// insert puts n at a path.
func insert(list []Node, path []string, n Node) []Node {
	if len(path) == 1 {
		n.Name = path[0]
		return append(list, n)
	}
	for i := range list {
		if list[i].Name == path[0] {
			list[i].Nodes = insert(list[i].Nodes, path[1:], n)
			return list
		}
	}
	return append(list, Node{Name: path[0], Dir: true, Nodes: insert(nil, path[1:], n)})
}

// tree writes a folder. Names that no program of ours would write, or twice, are written all the same.
func tree(t testing.TB, w *repo.Writer, nodes []Node) id.ID {
	t.Helper()
	nodes = append([]Node{}, nodes...)
	sort.SliceStable(nodes, func(i, j int) bool { return nodes[i].Name < nodes[j].Name })
	var parts [][]byte
	for _, n := range nodes {
		x := &snapshot.Node{Name: n.Name, Type: snapshot.File, Mode: n.Mode, ModTime: n.MTime}
		if x.ModTime.IsZero() {
			x.ModTime = Epoch
		}
		if n.ID != "" {
			x.Xattrs = append(x.Xattrs, snapshot.Xattr{Name: snapshot.AttrID, Value: []byte(n.ID)})
		}
		switch {
		case n.Type != "":
			x.Type, x.LinkTarget = n.Type, n.Target
		case n.Dir || n.Nodes != nil:
			x.Type, x.Subtree = snapshot.Dir, tree(t, w, n.Nodes)
			x.Mode |= fs.ModeDir | 0o755
		default:
			if x.Mode == 0 {
				x.Mode = 0o644
			}
			x.Size = uint64(len(n.Content))
			// Chunks of a few bytes, so that contents of several chunks are nothing special.
			for rest := []byte(n.Content); len(rest) > 0; {
				k := min(len(rest), max(7, len(n.Content)/5))
				x.Content = append(x.Content, save(t, w, repo.DataBlob, rest[:k]))
				rest = rest[k:]
			}
			sum := n.SHA1
			if sum == "" && n.Content != "" {
				h := sha1.Sum([]byte(n.Content))
				sum = hex.EncodeToString(h[:])
			}
			if sum != "" && sum != "-" {
				x.Xattrs = append(x.Xattrs, snapshot.Xattr{Name: snapshot.AttrSHA1, Value: []byte(sum)})
			}
		}
		p := snapshot.EncodeTree([]*snapshot.Node{x})
		p = bytes.TrimPrefix(bytes.TrimSuffix(p, []byte("]}\n")), []byte(`{"nodes":[`))
		parts = append(parts, p)
	}
	return save(t, w, repo.TreeBlob, append(append([]byte(`{"nodes":[`), bytes.Join(parts, []byte(","))...), "]}\n"...))
}

func save(t testing.TB, w *repo.Writer, kind repo.BlobType, p []byte) id.ID {
	t.Helper()
	d, _, err := w.Save(t.Context(), kind, p)
	if err != nil {
		t.Fatal(err)
	}
	return d
}
