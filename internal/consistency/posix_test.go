package consistency_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/consistency"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// file is a file or folder of alan's space in the posix layout.
func (b *breaker) file(rel string) string { return filepath.Join(b.users, "users/alan", rel) }

func (b *breaker) setAttr(path, name, value string) {
	b.t.Helper()
	b.keepAttrs(path)
	b.must(unix.Setxattr(path, b.prefix+name, []byte(value), 0))
}

func (b *breaker) dropAttrs(path string, names ...string) {
	b.t.Helper()
	b.keepAttrs(path)
	if len(names) == 0 {
		x, err := testfixture.Xattrs(path)
		b.must(err)
		for k := range x {
			b.must(unix.Removexattr(path, k))
		}
	}
	for _, n := range names {
		b.must(unix.Removexattr(path, b.prefix+n))
	}
}

func (b *breaker) keepAttrs(path string) {
	b.t.Helper()
	x, err := testfixture.Xattrs(path)
	b.must(err)
	b.undo = append(b.undo, func() {
		for k, v := range x {
			b.must(unix.Setxattr(path, k, []byte(v), 0))
		}
	})
}

// overwrite changes the content of a file, and nothing else about it.
func (b *breaker) overwrite(path string, data []byte) {
	b.t.Helper()
	b.keep(path)
	fi, err := os.Stat(path)
	b.must(err)
	b.must(os.WriteFile(path, data, 0))
	b.must(os.Chtimes(path, fi.ModTime(), fi.ModTime()))
}

func (b *breaker) glob(pattern string) string {
	b.t.Helper()
	list, err := filepath.Glob(pattern)
	b.must(err)
	if len(list) == 0 {
		b.t.Fatalf("nothing is called %s", pattern)
	}
	return list[0]
}

var posixCases = []brokenCase{
	{"a file without attributes", func(b *breaker) {
		b.dropAttrs(b.file("Round 0/dup1.bin"))
	}, []want{{consistency.MetadataMissing, "Round 0/dup1.bin"}}},
	{"a folder without attributes", func(b *breaker) {
		b.dropAttrs(b.file("Round 0/a"))
	}, []want{{consistency.MetadataMissing, "Round 0/a"}}},
	{"a space without attributes", func(b *breaker) {
		b.dropAttrs(b.file(""))
	}, []want{{consistency.SpaceRootMissing, "users/alan"}}},
	{"an attribute that makes no sense", func(b *breaker) {
		b.setAttr(b.file("Round 0/dup1.bin"), "type", "seven")
	}, []want{{consistency.MetadataMalformed, "Round 0/dup1.bin"}}},
	{"two files with one id", func(b *breaker) {
		x, err := testfixture.Xattrs(b.file("Round 0/dup1.bin"))
		b.must(err)
		b.setAttr(b.file("Round 0/renamed.bin"), "id", x[b.prefix+"id"])
	}, []want{{consistency.IDDuplicate, "Round 0/renamed.bin"}}},
	{"another parent", func(b *breaker) {
		b.setAttr(b.file("Round 0/dup1.bin"), "parentid", nowhere)
	}, []want{{consistency.ParentMismatch, "/Round 0/dup1.bin"}}},
	{"another name", func(b *breaker) {
		b.setAttr(b.file("Round 0/dup1.bin"), "name", "other")
	}, []want{{consistency.NameMismatch, "/Round 0/dup1.bin"}}},
	{"a file that says folder", func(b *breaker) {
		b.setAttr(b.file("Round 0/dup1.bin"), "type", "2")
	}, []want{{consistency.TypeMismatch, "Round 0/dup1.bin"}}},
	{"a file that is cut off", func(b *breaker) {
		b.overwrite(b.file("Round 0/dup1.bin"), []byte("short"))
	}, []want{{consistency.BlobSize, "/Round 0/dup1.bin"}}},
	{"a bit of a file flipped", func(b *breaker) {
		data, err := os.ReadFile(b.file("Round 0/dup1.bin"))
		b.must(err)
		data[7] ^= 1
		b.overwrite(b.file("Round 0/dup1.bin"), data)
	}, []want{{consistency.BlobChecksum, "/Round 0/dup1.bin"}}},
	{"a bit of a version flipped", func(b *breaker) {
		p := b.glob(b.file(".oc-nodes/*/*/*/*/*.REV.*Z"))
		data, err := os.ReadFile(p)
		b.must(err)
		data[0] ^= 1
		b.overwrite(p, data)
	}, []want{{consistency.BlobChecksum, ".REV."}}},
	{"a file changed behind the server's back", func(b *breaker) {
		p := b.file("Round 0/dup1.bin")
		b.keep(p)
		b.must(os.Chtimes(p, time.Unix(1e9, 0), time.Unix(1e9, 0)))
	}, []want{{consistency.ChangedOutside, "/Round 0/dup1.bin"}}},
	{"a trashed item without a record", func(b *breaker) {
		item := b.glob(b.file(".Trash/files/*.trashitem"))
		b.remove(b.file(".Trash/info/" + strings.TrimSuffix(filepath.Base(item), ".trashitem") + ".trashinfo"))
	}, []want{{consistency.LinkMissing, ".trashitem"}}},
	{"a record of the trash without an item", func(b *breaker) {
		b.write(b.file(".Trash/info/"+nowhere+".trashinfo"), []byte("[Trash Info]\nPath=gone\nDeletionDate=2026-01-01T00:00:00\n"))
	}, []want{{consistency.TrashLeftover, nowhere}}},
	{"a version of a file that is gone", func(b *breaker) {
		from := b.glob(b.file(".oc-nodes/*/*/*/*/*.REV.*Z"))
		x, err := testfixture.Xattrs(from)
		b.must(err)
		data, err := os.ReadFile(from)
		b.must(err)
		to := b.file(".oc-nodes/" + ocis.NodePath(nowhere) + ".REV.2026-01-01T00:00:00Z")
		b.keep(b.file(".oc-nodes/de"))
		b.write(to, data)
		for k, v := range x {
			b.must(unix.Setxattr(to, k, []byte(v), 0))
		}
	}, []want{{consistency.RevisionLeftover, ""}}},
	{"metadata that spilled over is gone", func(b *breaker) {
		b.setAttr(b.file("Round 1/dup1.bin"), "metadata_offloaded", "1")
		b.undo = append(b.undo, func() { b.must(unix.Removexattr(b.file("Round 1/dup1.bin"), b.prefix+"metadata_offloaded")) })
	}, []want{{consistency.MetadataMissing, "/Round 1/dup1.bin"}}},
	{"a share without its grant", func(b *breaker) {
		b.dropAttrs(b.file("Round 0/a"), "grant.u:"+mary)
	}, []want{{consistency.ShareWithoutGrant, "/Round 0/a"}}},
	{"a wrong tree size", func(b *breaker) {
		b.setAttr(b.file("Round 1/a"), "treesize", "7")
	}, []want{{consistency.TreeSize, "/Round 1/a"}}},
	{"not in the index of its owner", func(b *breaker) {
		x, err := testfixture.Xattrs(b.file(""))
		b.must(err)
		b.index("by-user-id/"+alan, without(x[b.prefix+"id"]))
	}, []want{{consistency.IndexMissing, "by-user-id"}}},
	{"an upload in flight", func(b *breaker) {
		p := b.file("Round 0/dup1.bin")
		x, err := testfixture.Xattrs(p)
		b.must(err)
		data, err := os.ReadFile(p)
		b.must(err)
		blob := x[b.prefix+"blobid"]
		b.overwrite(p, []byte("the old content"))
		b.write(filepath.Join(b.users, "uploads", blob), data)
		b.must(unix.Setxattr(p, b.prefix+"nodestatus", []byte("processing:"+blob), 0))
	}, []want{{consistency.UploadInFlight, "/Round 0/dup1.bin"}}},
}

// TestBrokenPosix does for the posix layout what TestBroken does.
func TestBrokenPosix(t *testing.T) {
	broken(t, testfixture.OpenCloudPosix, consistency.Options{ReadData: true}, posixCases)
}
