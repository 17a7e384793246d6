package snapshot

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"math/rand/v2"
	"reflect"
	"strconv"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

// oracleNode is the struct whose encoding/json form defines the canonical bytes.
type oracleNode struct {
	Name          string    `json:"name"`
	Type          string    `json:"type"`
	Mode          uint32    `json:"mode,omitempty"`
	MTime         time.Time `json:"mtime"`
	ATime         time.Time `json:"atime"`
	CTime         time.Time `json:"ctime"`
	UID           uint32    `json:"uid"`
	GID           uint32    `json:"gid"`
	User          string    `json:"user,omitempty"`
	Group         string    `json:"group,omitempty"`
	Inode         uint64    `json:"inode,omitempty"`
	DeviceID      uint64    `json:"device_id,omitempty"`
	Size          uint64    `json:"size,omitempty"`
	Links         uint64    `json:"links,omitempty"`
	LinkTarget    string    `json:"linktarget,omitempty"`
	LinkTargetRaw []byte    `json:"linktarget_raw,omitempty"`
	Xattrs        []oracleX `json:"extended_attributes,omitempty"`
	Device        uint64    `json:"device,omitempty"`
	Content       []id.ID   `json:"content"`
	Subtree       *id.ID    `json:"subtree,omitempty"`
}

type oracleX struct {
	Name  string `json:"name"`
	Value []byte `json:"value"`
}

func oracle(t *testing.T, nodes []*Node) []byte {
	t.Helper()
	out := struct {
		Nodes []oracleNode `json:"nodes"`
	}{Nodes: []oracleNode{}}
	for _, n := range nodes {
		q := strconv.Quote(n.Name)
		mt := n.ModTime.UTC()
		o := oracleNode{Name: q[1 : len(q)-1], Type: string(n.Type), Mode: uint32(n.Mode), MTime: mt, ATime: mt, CTime: mt,
			UID: n.UID, GID: n.GID, Inode: n.Inode, DeviceID: n.DeviceID, Size: n.Size, Links: n.Links,
			LinkTarget: n.LinkTarget, Device: n.Device, Content: n.Content}
		if n.Type == File && n.Content == nil {
			o.Content = []id.ID{}
		}
		if n.LinkTarget != string([]rune(n.LinkTarget)) {
			o.LinkTargetRaw = []byte(n.LinkTarget)
		}
		for _, x := range n.Xattrs {
			o.Xattrs = append(o.Xattrs, oracleX(x))
		}
		if n.Type == Dir {
			o.Subtree = &n.Subtree
		}
		out.Nodes = append(out.Nodes, o)
	}
	p, err := json.Marshal(out)
	if err != nil {
		t.Fatal(err)
	}
	return append(p, '\n')
}

func sampleNodes() []*Node {
	mt := time.Date(2026, 11, 22, 6, 37, 6, 356103112, time.UTC)
	return []*Node{
		{Name: "\x01ctl\n\t\"q\\", Type: File, Mode: 0o644, ModTime: mt, Size: 3, Content: []id.ID{id.Hash([]byte("a"))}},
		{Name: "a<b>&\u2028\u00a0", Type: Dir, Mode: fs.ModeDir | 0o755, ModTime: mt.Add(time.Hour), UID: 1000, GID: 1000, Subtree: id.Hash(nil)},
		{Name: "bad\xff\xfe", Type: Symlink, Mode: fs.ModeSymlink | 0o777, ModTime: mt.Truncate(time.Second), LinkTarget: "t\xff\u2029<"},
		{Name: "c", Type: File, Mode: 0o4755 | fs.ModeSetuid, ModTime: mt, Links: 2, Inode: 7, DeviceID: 1},
		{Name: "d", Type: FIFO, Mode: fs.ModeNamedPipe | 0o600, ModTime: mt},
		{Name: "e", Type: CharDev, Mode: fs.ModeDevice | fs.ModeCharDevice, Device: 259, ModTime: mt},
		{Name: "Ünï dir 漢字 😀", Type: File, ModTime: mt, Xattrs: []Xattr{{"user.oc.grant.u:x", []byte("\x00t=A\n")}, {"holdfast.id", []byte{}}}},
	}
}

func TestEncodeTreeIsWhatResticWrites(t *testing.T) {
	for _, nodes := range [][]*Node{nil, sampleNodes()} {
		got, want := EncodeTree(nodes), oracle(t, nodes)
		if !bytes.Equal(got, want) {
			t.Errorf("tree differs from encoding/json\n got %s\nwant %s", got, want)
		}
	}
	if got := id.Hash(EncodeTree(nil)).String(); got != "ac08ce34ba4f8123618661bef2425f7028ffb9ac740578a3ee88684d2523fee8" {
		t.Errorf("the empty tree has id %s", got)
	}
}

func TestDecodeTreeGivesBackWhatWasEncoded(t *testing.T) {
	nodes := sampleNodes()
	tree, err := DecodeTree(EncodeTree(nodes))
	if err != nil {
		t.Fatal(err)
	}
	if len(tree.Nodes) != len(nodes) {
		t.Fatalf("%d nodes, want %d", len(tree.Nodes), len(nodes))
	}
	for i, n := range tree.Nodes {
		w := *nodes[i]
		if w.Type == File && w.Content == nil {
			w.Content = []id.ID{}
		}
		if !reflect.DeepEqual(*n, w) {
			t.Errorf("node %d\n got %+v\nwant %+v", i, *n, w)
		}
	}
}

func TestTreeNamesOfRandomBytesSurvive(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 5))
	for range 2000 {
		name := make([]byte, 1+r.IntN(30))
		for i := range name {
			name[i] = byte(r.IntN(256))
		}
		n := &Node{Name: string(name), Type: File, ModTime: time.Unix(0, 0)}
		p := EncodeTree([]*Node{n})
		if want := oracle(t, []*Node{n}); !bytes.Equal(p, want) {
			t.Fatalf("name %q\n got %s\nwant %s", name, p, want)
		}
		tree, err := DecodeTree(p)
		if err != nil || tree.Nodes[0].Name != n.Name {
			t.Fatalf("name %q came back as %q, %v", name, tree.Nodes[0].Name, err)
		}
	}
}

func TestTreeWriterRefusesDisorder(t *testing.T) {
	for _, second := range []string{"b", "a"} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("a node %q after \"b\" was taken", second)
				}
			}()
			var w TreeWriter
			w.Add(&Node{Name: "b", Type: File})
			w.Add(&Node{Name: second, Type: File})
		}()
	}
}

func FuzzDecodeTree(f *testing.F) {
	f.Add(EncodeTree(nil))
	f.Add(EncodeTree(sampleNodes()))
	f.Add([]byte(`{"nodes":[{"name":"..","type":"dir","subtree":null}]}`))
	f.Add([]byte(`{"nodes":null}`))
	f.Add([]byte(`{"nodes":[{"name":"\\q","type":"file","mtime":"2026-13-01T00:00:00Z"}]}`))
	f.Fuzz(func(t *testing.T, p []byte) {
		tree, err := DecodeTree(p)
		if err != nil {
			return
		}
		for i := 1; i < len(tree.Nodes); i++ {
			if tree.Nodes[i].Name <= tree.Nodes[i-1].Name {
				return
			}
		}
		// What parses prints the same from the second time on.
		first := EncodeTree(tree.Nodes)
		again, err := DecodeTree(first)
		if err != nil {
			t.Fatalf("own tree is refused: %v", err)
		}
		if second := EncodeTree(again.Nodes); !bytes.Equal(first, second) {
			t.Fatalf("not a fixed point\n%s\n%s", first, second)
		}
	})
}
