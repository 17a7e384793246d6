package restore

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/pax/paxtest"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// TestNarrowFolders: folders with one name each, as deep as more than descriptors are kept and as long as a path is not, and what
// comes beside them on the way back.
func TestNarrowFolders(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs root: owners are compared")
	}
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			repo, r := newMemRepo(), rand.New(rand.NewPCG(seed, 1))
			var all []*snapshot.Node
			names := 0
			var grow func(depth int) *snapshot.Node
			grow = func(depth int) *snapshot.Node {
				names++
				name := fmt.Sprintf("%c", 'a'+r.IntN(26))
				if seed%3 == 1 && r.IntN(20) == 0 {
					name = fmt.Sprintf("%0250d", names)
				}
				var n *snapshot.Node
				switch {
				case depth > 0:
					kids := []*snapshot.Node{}
					more := 0
					if r.IntN(4+int(seed%4)*60) == 0 {
						more = 1 + r.IntN(2)
					}
					for range 1 + more {
						next := depth - 1
						if len(kids) > 0 {
							next = r.IntN(5)
						}
						k := grow(next)
						if !slices.ContainsFunc(kids, func(o *snapshot.Node) bool { return o.Name == k.Name }) {
							kids = append(kids, k)
						}
					}
					n = repo.folder(name, kids...)
					n.Mode = fs.ModeDir | []fs.FileMode{0o700, 0o755, 0o500, 0o770 | fs.ModeSetgid}[r.IntN(4)]
					if r.IntN(10) == 0 {
						n.Xattrs = append(n.Xattrs, snapshot.Xattr{Name: "user.x", Value: []byte("y")})
					}
				case r.IntN(3) == 0:
					n = symlink(name, "/nowhere")
				case r.IntN(2) == 0:
					n = repo.folder(name)
				default:
					n = repo.file(name, fmt.Sprint(name, names))
				}
				n.UID, n.GID = uint32(1000+r.IntN(3)), uint32(1000+r.IntN(3))
				n.ModTime = time.Unix(1e9+int64(names), int64(names))
				all = append(all, n)
				return n
			}
			top := grow(3 + int(seed)*30)
			dst := t.TempDir()
			mustRestore(t, repo, repo.plain(top), dst, nil)
			seen := 0
			var compare func(dir *os.Root, n *snapshot.Node, at string)
			compare = func(dir *os.Root, n *snapshot.Node, at string) {
				seen++
				info, err := dir.Lstat(n.Name)
				check(t, err)
				st := info.Sys().(*syscall.Stat_t)
				if st.Uid != n.UID || st.Gid != n.GID || !info.ModTime().Equal(n.ModTime) || n.Type != snapshot.Symlink && info.Mode() != n.Mode || info.Mode().Type() != n.Mode.Type() {
					t.Errorf("%s: %v %v %d:%d, not %v %v %d:%d", at, info.Mode(), info.ModTime(), st.Uid, st.Gid, n.Mode, n.ModTime, n.UID, n.GID)
				}
				switch n.Type {
				case snapshot.Symlink:
					if l, err := dir.Readlink(n.Name); err != nil || l != n.LinkTarget {
						t.Errorf("%s leads to %q, %v", at, l, err)
					}
				case snapshot.File:
					if p, err := dir.ReadFile(n.Name); err != nil || uint64(len(p)) != n.Size {
						t.Errorf("%s holds %q, %v", at, p, err)
					}
				case snapshot.Dir:
					sub, err := dir.OpenRoot(n.Name)
					check(t, err)
					defer sub.Close()
					tree := must(snapshot.LoadTree(t.Context(), repo, n.Subtree))
					f := must(sub.Open("."))
					names, err := f.Readdirnames(-1)
					check(t, err)
					f.Close()
					if len(names) != len(tree.Nodes) {
						t.Errorf("%s holds %q", at, names)
					}
					for _, k := range tree.Nodes {
						compare(sub, k, filepath.Join(at, k.Name))
					}
				}
			}
			root := must(os.OpenRoot(filepath.Join(dst, "data")))
			defer root.Close()
			compare(root, top, top.Name)
			if seen < 3 || len(all) < seen {
				t.Errorf("%d of %d were compared", seen, len(all))
			}
			check(t, os.RemoveAll(dst))
		})
	}
}

// A folder without an entry of its own, below those that were not opened.
func TestNarrowFolderWithoutEntry(t *testing.T) {
	repo := newMemRepo()
	var w paxtest.Writer
	for _, name := range []string{"a/", "a/b/", "a/b/c/"} {
		w.Add(paxtest.Item{Type: '5', Name: name, Mode: 0o700, Sec: 5})
	}
	w.Add(paxtest.Item{Type: '0', Name: "a/b/c/d/e/file", Mode: 0o600, Sec: 5, Data: []byte("x")})
	w.Add(paxtest.Item{Type: '0', Name: "a/b/c/other", Mode: 0o600, Sec: 5, Data: []byte("y")})
	dst := t.TempDir()
	mustRestore(t, repo, repo.archive(w.End()), dst, nil)
	for name, want := range map[string]string{"d/e/file": "x", "other": "y"} {
		if p, err := os.ReadFile(filepath.Join(dst, "data/a/b/c", name)); string(p) != want {
			t.Errorf("%s holds %q, %v", name, p, err)
		}
	}
}

// Only what nobody else can change meanwhile is reached by more than one name at once.
func TestMayStayClosed(t *testing.T) {
	made := frame{made: true, fd: 7}
	for name, tt := range map[string]struct {
		f, n frame
		way  string
		want bool
	}{
		"both are ours":               {made, frame{made: true}, "n", true},
		"the folder above was there":  {frame{fd: 7}, frame{made: true}, "n", false},
		"it was there":                {made, frame{}, "n", false},
		"it inherits an access list":  {made, frame{made: true, all: true}, "n", false},
		"the way is long":             {made, frame{made: true}, strings.Repeat("n", narrowWay+1), false},
		"the one that is open is far": {frame{made: true, narrow: true, base: 200 - narrowFrames - 1}, frame{made: true}, "n", false},
		"the one that is open is not": {frame{made: true, narrow: true, base: 200 - narrowFrames}, frame{made: true}, "n", true},
	} {
		a := applier{stack: make([]frame, 200)}
		if got := a.mayStayClosed(&tt.f, &tt.n, tt.way); got != tt.want || tt.n.narrow != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
