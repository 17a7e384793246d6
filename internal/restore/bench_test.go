package restore

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/pax"
	"github.com/holdfast-backup/holdfast/internal/pax/paxtest"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// BenchmarkRestoreStore restores a store with the shape of decomposedfs, 13 entries for each file of
// 16 KiB, from memory: what is measured is the restore alone.
func BenchmarkRestoreStore(b *testing.B) {
	const files = 2000
	b.Run(fmt.Sprintf("%dx16KiB", files), func(b *testing.B) {
		r := newMemRepo()
		var w, space paxtest.Writer
		w.Add(paxtest.Item{Type: '5', Name: "./", Mode: 0o755})
		w.Add(paxtest.Item{Type: '5', Name: "spaces/", Mode: 0o755})
		var contents []*snapshot.Node
		at := func(kind, i int) string {
			h := id.Hash(fmt.Append(nil, i, kind)).String()
			return fmt.Sprintf("%02x%02x%s", i>>8, i&0xff, h[:30])
		}
		shard := func(root, s string) string {
			p := root
			for range 4 {
				p += "/" + s[:2]
				space.Add(paxtest.Item{Type: '5', Name: p + "/", Mode: 0o700, Sec: 5, Nsec: 7})
				s = s[2:]
			}
			return p + "/" + s
		}
		space.Add(paxtest.Item{Type: '5', Name: "spaces/aa/", Mode: 0o755})
		data := make([]byte, 16<<10)
		seen := map[string]bool{}
		for _, kind := range []string{"blobs", "nodes"} {
			space.Add(paxtest.Item{Type: '5', Name: "spaces/aa/" + kind + "/", Mode: 0o755})
			for i := range files {
				s := at(0, i)
				s = fmt.Sprintf("%04x", i*31%65536) + s // spread over the shards
				if seen[kind+s[:4]] {
					continue
				}
				seen[kind+s[:4]] = true
				p := shard("spaces/aa/"+kind+"/"+fmt.Sprintf("%05d", i), s)
				if kind == "nodes" {
					space.Add(paxtest.Item{Type: '0', Name: p, Mode: 0o600, Sec: 5})
					space.Add(paxtest.Item{Type: '0', Name: p + ".mlock", Mode: 0o600, Sec: 5})
					space.Add(paxtest.Item{Type: '0', Name: p + ".mpk", Mode: 0o600, Sec: 5, Data: data[:600]})
					continue
				}
				copy(data, s)
				name := fmt.Sprintf("f%05d", i)
				contents = append(contents, r.file(name, string(data)))
				space.Add(paxtest.Item{Type: '0', Name: p, Mode: 0o600, Sec: 5, Rec: map[string]string{
					pax.Content: "/storage/users/spaces/" + name, pax.Size: fmt.Sprint(len(data)),
				}})
			}
		}
		sn := r.archive(w.End(), r.folder("spaces", contents...), r.folder("metadata", r.file("aa.tar", string(space.End()))))
		b.SetBytes(files * 16 << 10)
		b.ReportAllocs()
		n := 0
		for b.Loop() {
			dst := filepath.Join(b.TempDir(), fmt.Sprint(n))
			n++
			p, err := MakePlan(b.Context(), r, sn, Options{BasePath: dst})
			if err != nil {
				b.Fatal(err)
			}
			res, err := Run(b.Context(), r, p)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(res.sum().Files+res.sum().Dirs), "entries/op")
			b.StopTimer()
			if err := os.RemoveAll(dst); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	})
}
