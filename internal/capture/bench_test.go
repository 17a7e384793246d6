package capture

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// sampleEntries are neighbours as in the nodes of a space: shard directories, a metadata file, a blob.
func sampleEntries() []tarEntry {
	var list []tarEntry
	for i := range 32 {
		dir := "spaces/3f/619d41-8a19-4af5-ab3f-d74c9153738d/nodes/" + fmt.Sprintf("%02x/a7/", i)
		t := timespec{1700000000 + int64(i), 123456789}
		owner := []xattr{{name: "user.oc.name", value: []byte("a report.docx")}, {name: "user.oc.parentid", value: []byte("619d41-8a19-4af5-ab3f-d74c9153738d")}}
		list = append(list,
			tarEntry{entry: &entry{path: dir, mode: unix.S_IFDIR | 0o700, uid: 1000, gid: 1000, mtime: t, ctime: t}},
			tarEntry{entry: &entry{path: dir + "1b/c2/-0e5c-4a3b-9d1f-1234567890ab.mpk", mode: unix.S_IFREG | 0o600, uid: 1000, gid: 1000, size: 700, mtime: t, ctime: t}, inline: 700},
			tarEntry{entry: &entry{path: dir + "1b/c2/-0e5c-4a3b-9d1f-1234567890ab", mode: unix.S_IFLNK | 0o777, uid: 1000, gid: 1000, mtime: t, ctime: t}, link: "../../../../../0b/1c/2d/3e/-4f5a", xattrs: owner},
			tarEntry{entry: &entry{path: dir + "9a/0c/-77aa-4b5c-8e2f-fedcba098765", mode: unix.S_IFREG | 0o600, uid: 1000, gid: 1000, size: 1 << 20, mtime: t, ctime: t}, content: "/storage/users/spaces/personal/einstein/reports/a report.docx"},
		)
	}
	return list
}

// Headers and padding; what follows them is not written.
func BenchmarkTarWriter(b *testing.B) {
	list := sampleEntries()
	var w tarWriter
	add := func() {
		w.buf = w.buf[:0]
		for i := range list {
			w.add(&list[i])
		}
	}
	add()
	b.SetBytes(int64(len(w.buf)))
	b.ReportAllocs()
	for b.Loop() {
		add()
	}
}

// Bytes are those that are hashed of each entry.
func BenchmarkFingerprint(b *testing.B) {
	var list []entry
	size := 0
	for _, e := range sampleEntries() {
		list = append(list, *e.entry)
		size += len(e.path) + 53
	}
	b.SetBytes(int64(size))
	b.ReportAllocs()
	for b.Loop() {
		fingerprint(list)
	}
}
