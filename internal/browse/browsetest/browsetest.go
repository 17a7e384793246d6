// Package browsetest makes snapshots for tests: of the sample instances, and with any content, hostile ones
// too.
package browsetest

import (
	"bytes"
	"crypto/sha1"
	"encoding/hex"
	"encoding/json"
	"io/fs"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// Fixtures are the sample instances whose blobs lie on disk.
var Fixtures = []string{testfixture.OCIS, testfixture.OpenCloud, testfixture.OpenCloudPosix}

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

// Backup captures the instance in dir and saves its record.
func Backup(t testing.TB, r *repo.Repository, dir string, at time.Time) *snapshot.Snapshot {
	t.Helper()
	inst, err := discover.Discover(t.Context(), discover.Options{
		BaseDataPath: filepath.Join(dir, "data"), ConfigDir: filepath.Join(dir, "config"),
	})
	if err != nil {
		t.Fatal(err)
	}
	w := r.NewWriter(t.Context())
	res, err := capture.Run(t.Context(), r, w, capture.Options{Instance: inst})
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
	dir := testfixture.Unpack(t, name)
	r := NewRepo(t)
	c := &Captured{Repo: r, Snapshot: Backup(t, r, dir, time.Now()), Want: testfixture.LoadExpected(t, dir)}
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
