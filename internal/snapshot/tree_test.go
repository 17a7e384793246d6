package snapshot

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"math/rand/v2"
	"reflect"
	"strconv"
	"strings"
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

// The quick way gives what encoding/json gives, is taken for what we and restic write, and for nothing that it does not know.
func TestCanonical(t *testing.T) {
	var plain []*Node // names and targets without escapes
	for _, n := range sampleNodes() {
		if q := strconv.Quote(n.Name); q[1:len(q)-1] == n.Name && !bytes.ContainsAny([]byte(n.Name), `<>&`) && n.LinkTarget == string([]rune(n.LinkTarget)) {
			plain = append(plain, n)
		}
	}
	if len(plain) < 3 {
		t.Fatalf("%d plain nodes", len(plain))
	}
	node := `{"name":"a","type":"file","mode":420,"mtime":"2026-11-27T12:00:00.5+01:00","atime":"x","ctime":"","uid":1,"gid":2,"user":"u","group":"g","inode":3,"device_id":4,"size":5,"links":6,"content":["` + strings.Repeat("aB", 32) + `"]}`
	for _, c := range []struct {
		name, text string
		quick      bool
	}{
		{"ours", string(EncodeTree(plain)), true},
		{"empty", string(EncodeTree(nil)), true},
		{"restic's", `{"nodes":[` + node + `]}` + "\n", true},
		{"two", `{"nodes":[` + node + `,` + node + `]}`, true},
		{"letters", `{"nodes":[` + strings.Replace(node, `"a"`, `"äöü 日本"`, 1) + `]}`, true},
		{"no letters", `{"nodes":[` + strings.Replace(node, `"a"`, "\"\xff\"", 1) + `]}`, false},
		{"escape", `{"nodes":[` + strings.Replace(node, `"a"`, `"\\\\x41"`, 1) + `]}`, false},
		{"quote", `{"nodes":[` + strings.Replace(node, `"a"`, `"\u0041"`, 1) + `]}`, false},
		{"another field", `{"nodes":[` + strings.Replace(node, `,"uid"`, `,"x":{},"uid"`, 1) + `]}`, false},
		{"another order", `{"nodes":[` + strings.Replace(node, `"uid":1,"gid":2`, `"gid":2,"uid":1`, 1) + `]}`, false},
		{"twice", `{"nodes":[` + strings.Replace(node, `"uid":1`, `"uid":1,"uid":7`, 1) + `]}`, false},
		{"blank", `{"nodes": [` + node + `]}`, false},
		{"rest", `{"nodes":[` + node + `]}x`, false},
		{"comma", `{"nodes":[` + node + `,]}`, false},
		{"no comma", `{"nodes":[` + node + node + `]}`, false},
		{"large number", `{"nodes":[` + strings.Replace(node, `"size":5`, `"size":18446744073709551615`, 1) + `]}`, false},
		{"too large a number", `{"nodes":[` + strings.Replace(node, `"uid":1`, `"uid":4294967296`, 1) + `]}`, false},
		{"leading zero", `{"nodes":[` + strings.Replace(node, `"uid":1`, `"uid":01`, 1) + `]}`, false},
		{"no time", `{"nodes":[` + strings.Replace(node, `2026-11`, `2026-13`, 1) + `]}`, false},
		{"short id", `{"nodes":[` + strings.Replace(node, `aBaB`, `aB`, 1) + `]}`, false},
		{"base64", `{"nodes":[` + strings.Replace(node, `,"content"`, `,"extended_attributes":[{"name":"n","value":""},{"name":"m","value":"AAE="}],"content"`, 1) + `]}`, true},
		{"no base64", `{"nodes":[` + strings.Replace(node, `,"content"`, `,"extended_attributes":[{"name":"n","value":"?"}],"content"`, 1) + `]}`, false},
		{"raw target", `{"nodes":[` + strings.Replace(node, `,"content"`, `,"linktarget":"x","linktarget_raw":"//4=","content"`, 1) + `]}`, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			quick, ok := canonical([]byte(c.text))
			if ok != c.quick {
				t.Fatalf("taken: %v: %s", ok, c.text)
			}
			slow, err := decodeJSON([]byte(c.text))
			if ok && (err != nil || !reflect.DeepEqual(quick, slow)) {
				t.Errorf("%+v, not %+v, %v", quick, slow, err)
			}
			if got, gerr := DecodeTree([]byte(c.text)); (gerr == nil) != (err == nil) || err == nil && !reflect.DeepEqual(got, slow) {
				t.Errorf("%+v, %v, not %+v, %v", got, gerr, slow, err)
			}
		})
	}
	// Cut off or changed anywhere, it is what encoding/json says of it.
	own := EncodeTree(plain)
	for i := range own {
		for _, p := range [][]byte{own[:i], append(append(bytes.Clone(own[:i]), own[i]^1), own[i+1:]...)} {
			if quick, ok := canonical(p); ok {
				if slow, err := decodeJSON(p); err != nil || !reflect.DeepEqual(quick, slow) {
					t.Fatalf("%q is quickly\n%+v, and by encoding/json\n%+v, %v", p, quick, slow, err)
				}
			}
		}
	}
}

func FuzzDecodeTree(f *testing.F) {
	f.Add(EncodeTree(nil))
	f.Add(EncodeTree(sampleNodes()))
	f.Add(EncodeTree(usualNodes()))
	f.Add([]byte(`{"nodes":[{"name":"..","type":"dir","subtree":null}]}`))
	f.Add([]byte(`{"nodes":null}`))
	f.Add([]byte(`{"nodes":[{"name":"\\q","type":"file","mtime":"2026-13-01T00:00:00Z"}]}`))
	f.Fuzz(func(t *testing.T, p []byte) {
		tree, err := DecodeTree(p)
		if quick, ok := canonical(p); ok {
			// The quick way is right, or not taken.
			if slow, err := decodeJSON(p); err != nil || !reflect.DeepEqual(quick, slow) {
				t.Fatalf("%q is quickly\n%+v, and by encoding/json\n%+v, %v", p, quick, slow, err)
			}
		}
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
