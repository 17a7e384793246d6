package snapshot

import (
	"fmt"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

func BenchmarkEncodeTree(b *testing.B) {
	nodes := sampleNodes()
	b.SetBytes(int64(len(EncodeTree(nodes))))
	b.ReportAllocs()
	var w TreeWriter
	for b.Loop() {
		w.Reset()
		for _, n := range nodes {
			w.Add(n)
		}
		w.Bytes()
	}
}

// usualNodes are files as users have them.
func usualNodes() []*Node {
	var list []*Node
	for i := range 20 {
		list = append(list, &Node{
			Name: fmt.Sprintf("report %02d of March.docx", i), Type: File, Mode: 0o600, ModTime: time.Unix(1700000000+int64(i), 123456789).UTC(), UID: 1000, GID: 1000,
			Size: 1 << 20, Links: 1, Content: []id.ID{{1, byte(i)}, {2, byte(i)}},
			Xattrs: []Xattr{{AttrID, []byte("619d41-8a19-4af5-ab3f-d74c9153738d")}, {AttrBlobID, []byte("77aa-4b5c-8e2f-fedcba098765")}, {AttrSHA1, []byte("2fd4e1c67a2d28fced849ee1bb76e7391b93eb12")}},
		})
	}
	return list
}

func BenchmarkDecodeTree(b *testing.B) {
	p := EncodeTree(usualNodes())
	for name, fn := range map[string]func([]byte) (*Tree, error){"own": DecodeTree, "encodingjson": decodeJSON} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(p)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := fn(p); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
