package storegen_test

import (
	"bytes"
	"compress/flate"
	"context"
	"crypto/md5"
	"crypto/sha1"
	"encoding/binary"
	"errors"
	"hash/adler32"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/storegen"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

func generate(t *testing.T, o storegen.Options) (*storegen.Summary, string) {
	t.Helper()
	o.Dir = t.TempDir()
	s, err := storegen.Generate(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return s, o.Dir
}

// census is what a reader finds in a store.
type census struct {
	files, folders, empty, revisions, trashedTops, blobs, orphans, inFlight, shared, disabled, links int
	blobBytes, entries                                                                               int64
	hashes                                                                                           *sums
}

type sums map[[20]byte]int

// inspect reads a whole storage root as a backup would, and reports everything that does not fit
// together.
func inspect(t *testing.T, root, prefix string, accounting bool) *census {
	t.Helper()
	c := &census{hashes: &sums{}}
	spaces, err := filepath.Glob(filepath.Join(root, "spaces", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, space := range spaces {
		c.space(t, root, space, prefix, accounting)
	}
	return c
}

type seen struct {
	meta    ocis.NodeMeta
	path    string
	trashed string
	entry   bool
	isDir   bool
}

func (c *census) space(t *testing.T, root, space, prefix string, accounting bool) {
	t.Helper()
	id := filepath.Base(filepath.Dir(space)) + filepath.Base(space)
	nodes := map[string]*seen{}
	blobs := map[string]int64{}
	named := map[string]bool{}
	links := map[string]string{} // child -> folder and name
	trash := map[string]string{}
	get := func(id string) *seen {
		if nodes[id] == nil {
			nodes[id] = &seen{}
		}
		return nodes[id]
	}
	err := filepath.WalkDir(space, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		c.entries++
		rel := strings.TrimPrefix(path, space+"/")
		parts := strings.Split(rel, "/")
		if len(parts) < 6 {
			return nil
		}
		whole := strings.Join(parts[1:], "")
		switch parts[0] {
		case "blobs":
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			blobs[whole] = int64(len(data))
			c.blobs++
			c.blobBytes += int64(len(data))
			(*c.hashes)[sha1.Sum(data)]++
		case "trash":
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			if _, err := os.Stat(path); err != nil {
				t.Errorf("trash link %s is broken: %v", path, err)
			}
			trash[whole] = target
		case "nodes":
			if len(parts) == 7 { // a child
				target, err := os.Readlink(path)
				if err != nil {
					return err
				}
				child := strings.ReplaceAll(strings.TrimPrefix(target, "../../../../../"), "/", "")
				if _, err := os.Stat(path); err != nil {
					t.Errorf("link %s is broken: %v", path, err)
				}
				c.links++
				if links[child] != "" {
					t.Errorf("%s is linked twice", child)
				}
				_, rest, _ := ocis.ClassifyNodeName(parts[5])
				links[child] = strings.Join(parts[1:5], "") + rest + "/" + parts[6]
				return nil
			}
			kind, rest, stamp := ocis.ClassifyNodeName(parts[5])
			node := strings.Join(parts[1:5], "") + rest
			switch {
			case kind.IsMeta():
				data, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				m, err := ocis.ParseNode(prefix, data)
				if err != nil {
					t.Errorf("%s: %v", path, err)
				}
				c.content(t, root, space, path, m, named)
				if kind == ocis.NameRevisionMeta {
					c.revisions++
					if when, _, ok := ocis.ParseStamp(stamp); !ok || !when.Equal(m.MTime) {
						t.Errorf("%s: its time is %v", path, m.MTime)
					}
					if i, err := os.Lstat(strings.TrimSuffix(path, ".mpk")); err != nil || !i.ModTime().Equal(m.MTime) {
						t.Errorf("%s: time of the file is not that of the version: %v", path, err)
					}
					return nil
				}
				n := get(node)
				n.meta, n.path, n.trashed = m, path, stamp
			case kind == ocis.NameNode || kind == ocis.NameTrashed:
				n := get(node)
				n.entry, n.isDir = true, e.IsDir()
			case kind >= ocis.NameTemp:
				t.Errorf("%s is taken for a %v", path, kind)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	below := map[string]int64{}
	for id, n := range nodes {
		if n.path == "" || !n.entry {
			t.Errorf("node %s has metadata %v, entry %v", id, n.path != "", n.entry)
			continue
		}
		if n.meta.Space != nil {
			if n.meta.DTime != "" {
				c.disabled++
			}
			continue
		}
		if n.isDir {
			c.folders++
		} else {
			c.files++
			if n.meta.BlobID == "" {
				c.empty++
			}
			if n.meta.ID != id {
				t.Errorf("%s: id %q, the path says %q", n.path, n.meta.ID, id)
			}
		}
		if (n.meta.Type == ocis.TypeFolder) != n.isDir {
			t.Errorf("%s: type %d", n.path, n.meta.Type)
		}
		if len(n.meta.Grants) > 0 {
			c.shared++
		}
		if n.trashed != "" {
			c.trashedTops++
			if want := "../../../../../nodes/" + ocis.NodePath(id) + ".T." + n.trashed; trash[id] != want {
				t.Errorf("trash of %s is %q, want %q", id, trash[id], want)
			}
			if !strings.HasSuffix(n.meta.TrashOrigin, "/"+n.meta.Name) || links[id] != "" {
				t.Errorf("%s: trashed from %q, linked as %q", n.path, n.meta.TrashOrigin, links[id])
			}
			continue
		}
		if want := n.meta.ParentID + "/" + n.meta.Name; links[id] != want {
			t.Errorf("%s is linked as %q, its metadata say %q", n.path, links[id], want)
		}
		if !n.isDir {
			below[n.meta.ParentID] += n.meta.BlobSize
		}
	}
	if len(trash) != 0 && c.trashedTops == 0 {
		t.Errorf("%s: %d links in the trash", space, len(trash))
	}
	// Sizes of folders, bottom up by walking to the root from each of them.
	for from, size := range below {
		for at := from; accounting; {
			nodes[at].meta.TreeSize -= size
			if at == id || nodes[at].trashed != "" {
				break
			}
			at = nodes[at].meta.ParentID
		}
	}
	for at, n := range nodes {
		if accounting && (n.isDir || n.meta.Space != nil) && n.meta.TreeSize != 0 {
			t.Errorf("%s: size of all below is wrong by %d (%s)", at, n.meta.TreeSize, n.meta.Name)
		}
	}
	for b := range blobs {
		if !named[b] {
			c.orphans++
		}
	}
}

// content checks the blob that metadata name.
func (c *census) content(t *testing.T, root, space, path string, m ocis.NodeMeta, named map[string]bool) {
	t.Helper()
	if m.BlobID == "" {
		if m.HasSHA1 || m.BlobSize != 0 {
			t.Errorf("%s: no blob, but %d bytes", path, m.BlobSize)
		}
		return
	}
	named[m.BlobID] = true
	file := filepath.Join(space, "blobs", ocis.NodePath(m.BlobID))
	if strings.HasPrefix(m.NodeStatus, "processing:") {
		c.inFlight++
		file = filepath.Join(root, "uploads", m.BlobID)
		info, err := os.ReadFile(file + ".info")
		if err != nil {
			t.Fatal(err)
		}
		if u, err := ocis.ParseUpload(info); err != nil || u.ID != m.BlobID || u.NodeID() != m.ID || u.Offset != m.BlobSize {
			t.Errorf("%s: session %+v %v", path, u, err)
		}
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Errorf("%s: %v", path, err)
		return
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	attrs, err := ocis.ParseMPK(raw)
	if err != nil {
		t.Fatal(err)
	}
	md, adler := md5.Sum(data), binary.BigEndian.AppendUint32(nil, adler32.Checksum(data))
	if int64(len(data)) != m.BlobSize || !m.HasSHA1 || sha1.Sum(data) != m.SHA1 ||
		attrs.Text("cs.md5") != string(md[:]) || attrs.Text("cs.adler32") != string(adler) {
		t.Errorf("%s: %d bytes with other checksums than recorded (%d bytes)", path, len(data), m.BlobSize)
	}
}

func TestGenerateFitsTogether(t *testing.T) {
	for _, prefix := range []string{ocis.PrefixOCIS, ocis.PrefixOpenCloud} {
		t.Run(prefix, func(t *testing.T) {
			o := storegen.Options{Seed: 7, Files: 600, Bytes: 6 << 20, Spaces: 14, Prefix: prefix, Revisions: 0.2, Trash: 0.1, Empty: 0.05}
			s, dir := generate(t, o)
			c := inspect(t, filepath.Join(dir, "data/storage/users"), prefix, true)
			if c.files != 600 || s.Files != 600 || c.folders != s.Folders || c.revisions != s.Revisions || c.blobs != s.Blobs || c.inFlight != 1 || s.InFlight != 1 {
				t.Errorf("found %+v, the summary says %+v", c, s)
			}
			if s.BlobBytes != o.Bytes {
				t.Errorf("%d bytes of blobs, want %d", s.BlobBytes, o.Bytes)
			}
			if c.revisions < 80 || c.trashedTops < 15 || s.Trashed < c.trashedTops-s.Folders || c.empty < 10 || c.disabled == 0 || c.orphans != 0 || c.shared == 0 {
				t.Errorf("the mix is poor: %+v", c)
			}
			copies := 0
			for _, n := range *c.hashes {
				copies += n - 1
			}
			if share := float64(copies) / float64(c.blobs); share < 0.04 || share > 0.2 {
				t.Errorf("%.2f of the blobs are copies, want about 0.1", share)
			}
			if per := float64(s.Entries) / 600; per < 12 || per > 19 {
				t.Errorf("%.1f entries a file, want about 17 in so small spaces", per)
			}
			system := inspect(t, filepath.Join(dir, "data/storage/metadata"), prefix, false)
			if system.files < 15 || system.orphans != s.Orphans || s.Orphans < 2 {
				t.Errorf("system storage: %+v, summary %+v", system, s)
			}
			indexes(t, filepath.Join(dir, "data/storage/users"), 14)
			indexes(t, filepath.Join(dir, "data/storage/metadata"), 3)
			names := map[string][]string{
				ocis.PrefixOCIS:      {"config/ocis.yaml", "data/idm/ocis.boltdb"},
				ocis.PrefixOpenCloud: {"config/opencloud.yaml", "data/idm/idm.boltdb"},
			}
			for _, n := range append(names[prefix], "data/search/bleve/store/root.bolt", "data/nats/jetstream/$G/streams/main-queue/msgs/1.blk", "data/idp/private-key.pem", "data/proxy/server.key", "data/storage/users/.migrations") {
				if i, err := os.Stat(filepath.Join(dir, n)); err != nil || i.Size() == 0 {
					t.Errorf("%s: %v", n, err)
				}
			}
			var count int64
			for _, top := range []string{"data", "config"} {
				err := filepath.WalkDir(filepath.Join(dir, top), func(string, fs.DirEntry, error) error { count++; return nil })
				if err != nil {
					t.Fatal(err)
				}
			}
			if count != s.Entries {
				t.Errorf("%d entries, the summary says %d", count, s.Entries)
			}
		})
	}
}

// indexes checks that every entry leads to the root node of its space.
func indexes(t *testing.T, root string, spaces int) {
	t.Helper()
	found := map[string]bool{}
	files, err := filepath.Glob(filepath.Join(root, "indexes", "*", "*.mpk"))
	if err != nil || len(files) < 2 {
		t.Fatalf("%d index files, %v", len(files), err)
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		list, err := ocis.ParseIndex(data)
		if err != nil {
			t.Errorf("%s: %v", f, err)
		}
		for _, e := range list {
			found[e.SpaceID] = true
			if _, err := os.Stat(filepath.Join(root, "indexes", "kind", "name", e.Target) + ".mpk"); err != nil {
				t.Errorf("%s: %v", f, err)
			}
		}
	}
	if len(found) != spaces {
		t.Errorf("%d spaces in the indexes, want %d", len(found), spaces)
	}
}

func TestGenerateIsDeterministic(t *testing.T) {
	o := storegen.Options{Seed: 3, Files: 120, Bytes: 2 << 20}
	_, a := generate(t, o)
	o.Workers = 1
	_, b := generate(t, o)
	ignore := func(path string) bool { return path == storegen.RecordName }
	testfixture.Compare(t, a, b, testfixture.Options{Ignore: ignore, IgnoreTopTime: true})
	for _, dir := range []string{a, b} {
		if _, err := storegen.Mutate(t.Context(), dir, 5, 0.1); err != nil {
			t.Fatal(err)
		}
	}
	// What Mutate writes bears the time of now.
	testfixture.Compare(t, a, b, testfixture.Options{Ignore: ignore, IgnoreTimes: true})
	o.Seed = 4
	_, other := generate(t, o)
	if diffs, err := testfixture.Diff(b, other); err != nil || len(diffs) < 50 {
		t.Errorf("another seed makes nearly the same: %q %v", diffs, err)
	}
}

func TestMutate(t *testing.T) {
	o := storegen.Options{Seed: 9, Files: 250, Bytes: 2 << 20, Spaces: 6}
	_, dir := generate(t, o)
	root := filepath.Join(dir, "data/storage/users")
	before := inspect(t, root, ocis.PrefixOpenCloud, true)
	var sum storegen.Changes
	for range 3 {
		c, err := storegen.Mutate(t.Context(), dir, 1, 0.1)
		if err != nil {
			t.Fatal(err)
		}
		if c.Total() != 25 {
			t.Errorf("%d changes, want 25: %+v", c.Total(), c)
		}
		sum.New += c.New
		sum.Overwritten += c.Overwritten
		sum.Renamed += c.Renamed
		sum.Deleted += c.Deleted
		sum.Shared += c.Shared
		sum.Bytes += c.Bytes
		after := inspect(t, root, ocis.PrefixOpenCloud, true)
		if after.files != before.files+sum.New || after.revisions != before.revisions+sum.Overwritten ||
			after.trashedTops != before.trashedTops+sum.Deleted || after.blobs != before.blobs+sum.New+sum.Overwritten ||
			after.blobBytes != before.blobBytes+sum.Bytes || after.links != before.links+sum.New-sum.Deleted || after.orphans != 0 {
			t.Errorf("after %+v: %+v, before %+v", sum, after, before)
		}
	}
	if sum.New == 0 || sum.Overwritten == 0 || sum.Renamed == 0 || sum.Deleted == 0 || sum.Shared == 0 {
		t.Errorf("a kind of change is missing: %+v", sum)
	}
	left, err := filepath.Glob(filepath.Join(root, "spaces/*/*/nodes/*/*/*/*/.*"))
	if err != nil || len(left) > 0 {
		t.Errorf("temporary files are left: %q %v", left, err)
	}
}

func TestRefusals(t *testing.T) {
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, o := range map[string]storegen.Options{
		"directory not empty": {Dir: full, Files: 5},
		"no directory":        {Files: 5},
		"no files":            {Dir: t.TempDir()},
		"negative size":       {Dir: t.TempDir(), Files: 5, Bytes: -1},
		"unknown prefix":      {Dir: t.TempDir(), Files: 5, Prefix: "user.x."},
		"fraction above 1":    {Dir: t.TempDir(), Files: 5, Trash: 2},
	} {
		if _, err := storegen.Generate(t.Context(), o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := storegen.Mutate(t.Context(), full, 1, 0.1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("changing what was not generated: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := storegen.Generate(ctx, storegen.Options{Dir: t.TempDir(), Files: 50}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestTinyStores(t *testing.T) {
	for _, o := range []storegen.Options{
		{Seed: 1, Files: 1, Bytes: 10},
		{Seed: 2, Files: 3, Spaces: 1, Bytes: 1},
		{Seed: 3, Files: 9, Empty: 1},
		{Seed: 4, Files: 30, Trash: 1, Revisions: 1, Empty: -1},
	} {
		s, dir := generate(t, o)
		c := inspect(t, filepath.Join(dir, "data/storage/users"), ocis.PrefixOpenCloud, true)
		if c.files != o.Files || c.blobs != s.Blobs {
			t.Errorf("%+v: %+v, summary %+v", o, c, s)
		}
	}
}

func TestProgress(t *testing.T) {
	last, total := 0, 0
	generate(t, storegen.Options{Seed: 1, Files: 40, Progress: func(d, n int) { last, total = d, n }})
	if last != 40 || total != 40 {
		t.Errorf("last progress was %d of %d", last, total)
	}
}

// TestContentMix measures how far the contents can be compressed.
func TestContentMix(t *testing.T) {
	_, dir := generate(t, storegen.Options{Seed: 2, Files: 150, Bytes: 16 << 20, Trash: -1})
	var plain, packed int64
	blobs, err := filepath.Glob(filepath.Join(dir, "data/storage/users/spaces/*/*/blobs/*/*/*/*/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range blobs {
		data, err := os.ReadFile(b)
		if err != nil {
			t.Fatal(err)
		}
		var buf bytes.Buffer
		w, err := flate.NewWriter(&buf, flate.BestSpeed)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		plain += int64(len(data))
		packed += int64(buf.Len())
	}
	if share := float64(packed) / float64(plain); share < 0.6 || share > 0.95 {
		t.Errorf("compressed to %.2f of its size", share)
	}
}

func BenchmarkGenerate(b *testing.B) {
	for b.Loop() {
		if _, err := storegen.Generate(context.Background(), storegen.Options{Dir: b.TempDir(), Seed: 1, Files: 1000, Bytes: 64 << 20}); err != nil {
			b.Fatal(err)
		}
	}
}
