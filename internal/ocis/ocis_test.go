package ocis_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

func TestPathify(t *testing.T) {
	cases := []struct {
		id           string
		depth, width int
		want         string
	}{
		{"b1f74ec4-dd7e-11ef-a543-03775734d0f7", 1, 2, "b1/f74ec4-dd7e-11ef-a543-03775734d0f7"},
		{"2df5bbae-8dfe-4162-9c4f-000000000000", 4, 2, "2d/f5/bb/ae/-8dfe-4162-9c4f-000000000000"},
		{"jsoncs3-share-manager-metadata", 4, 2, "js/on/cs/3-/share-manager-metadata"},
		{"abcde", 4, 2, "ab/cd/e"},
		{"abcd", 4, 2, "ab/cd"},
		{"ab", 4, 2, "ab"},
		{"", 4, 2, ""},
		{"abc", 0, 2, "abc"},
		{"abc", 2, 0, "abc"},
	}
	for _, c := range cases {
		if got := ocis.Pathify(c.id, c.depth, c.width); got != c.want {
			t.Errorf("Pathify(%q, %d, %d) = %q, want %q", c.id, c.depth, c.width, got, c.want)
		}
	}
}

// TestFixtures reads every metadata file, index, upload record and trash record of the sample
// instances, and finds in them what the server said about the files.
func TestFixtures(t *testing.T) {
	prefixes := map[string]string{
		testfixture.OCIS: ocis.PrefixOCIS, testfixture.OCISWithS3Blobs: ocis.PrefixOCIS,
		testfixture.OpenCloud: ocis.PrefixOpenCloud, testfixture.OpenCloudPosix: ocis.PrefixOpenCloud,
	}
	for _, name := range testfixture.Names() {
		t.Run(name, func(t *testing.T) {
			dir := testfixture.Unpack(t, name)
			prefix := prefixes[name]
			nodes := map[string]ocis.NodeMeta{} // by id
			spaces := map[string]*ocis.SpaceMeta{}
			var revisions, trashed, indexes, uploads, infos int
			err := filepath.WalkDir(filepath.Join(dir, "data/storage"), func(path string, e fs.DirEntry, err error) error {
				if err != nil {
					return err
				}
				if strings.Contains(path, "/blobs/") {
					return nil
				}
				if name == testfixture.OpenCloudPosix && strings.Contains(path, "/storage/users/") {
					attrs, err := xattrs(path)
					if err != nil {
						return err
					}
					m, err := ocis.NodeFromAttributes(prefix, attrs)
					if err != nil {
						t.Errorf("%s: %v", path, err)
					}
					if m.ID != "" {
						nodes[m.ID] = m
					}
					if m.Space != nil {
						spaces[m.Space.ID] = m.Space
					}
					if strings.Contains(path, ocisRev) && m.Type == ocis.TypeFile {
						revisions++
					}
				}
				if !e.Type().IsRegular() {
					return nil
				}
				data, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				switch {
				case strings.Contains(path, "/indexes/") && strings.HasSuffix(path, ".mpk"):
					indexes++
					list, err := ocis.ParseIndex(data)
					if err != nil || len(list) == 0 {
						t.Errorf("%s: %v (%d entries)", path, err, len(list))
					}
					if !bytes.Equal(ocis.EncodeIndex(list), data) {
						t.Errorf("%s: written again it differs", path)
					}
				case strings.HasSuffix(path, ".info") && strings.Contains(path, "/uploads/"):
					uploads++
					u, err := ocis.ParseUpload(data)
					if err != nil {
						t.Errorf("%s: %v", path, err)
					}
					if u.ID+".info" != filepath.Base(path) || u.Size != 500000 || u.SpaceID() == "" || u.NodeID() == "" || !strings.HasPrefix(u.Name(), "unfinished") {
						t.Errorf("%s: %+v", path, u)
					}
				case strings.HasSuffix(path, ".trashinfo"):
					infos++
					i, err := ocis.ParseTrashInfo(data)
					if err != nil || !strings.HasPrefix(i.Path, "Round ") {
						t.Errorf("%s: %v %+v", path, err, i)
					}
					if d, err := i.Time(time.UTC); err != nil || d.Year() != 2026 {
						t.Errorf("%s: deleted %v %v", path, d, err)
					}
				case strings.HasSuffix(path, ".mpk"):
					attrs, err := ocis.ParseMPK(data)
					if err != nil {
						t.Errorf("%s: %v", path, err)
						return nil
					}
					if !bytes.Equal(ocis.EncodeMPK(attrs), data) {
						t.Errorf("%s: written again it differs", path)
					}
					storePrefix := prefix
					if strings.Contains(path, "/storage/metadata/") {
						storePrefix = ocis.PrefixOpenCloud // the system storage of all samples was OpenCloud's
					}
					m, err := ocis.ParseNode(storePrefix, data)
					if err != nil {
						t.Errorf("%s: %v", path, err)
					}
					kind, rest, stamp := ocis.ClassifyNodeName(filepath.Base(path))
					id := idOf(path, rest)
					if !kind.IsMeta() {
						t.Errorf("%s is taken for a %v", path, kind)
					}
					if m.ID != "" && m.ID != id {
						t.Errorf("%s: id %s, the path says %s", path, m.ID, id)
					}
					switch kind.Base() {
					case ocis.NameRevision:
						revisions++
						if w, _, ok := ocis.ParseStamp(stamp); !ok || !w.Equal(m.MTime) {
							t.Errorf("%s: revision of %v, its metadata say %v", path, stamp, m.MTime)
						}
					case ocis.NameTrashed:
						trashed++
						if !strings.HasPrefix(m.TrashOrigin, "/Round ") && !strings.HasPrefix(m.TrashOrigin, "/settings/accounts/") {
							t.Errorf("%s: trashed from %q", path, m.TrashOrigin)
						}
					default:
						nodes[id] = m
						if m.Space != nil {
							spaces[m.Space.ID] = m.Space
						}
					}
				default:
					if strings.Contains(path, "/nodes/") {
						if kind, _, _ := ocis.ClassifyNodeName(filepath.Base(path)); kind >= ocis.NameTemp {
							t.Errorf("%s is taken for a %v", path, kind)
						}
					}
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if revisions == 0 || indexes < 5 || uploads == 0 || len(nodes) < 100 {
				t.Errorf("%d revisions, %d indexes, %d uploads, %d nodes", revisions, indexes, uploads, len(nodes))
			}
			if name == testfixture.OpenCloudPosix {
				if infos == 0 {
					t.Error("no trash records")
				}
			} else if trashed == 0 {
				t.Error("no trashed nodes")
			}
			for _, want := range testfixture.LoadExpected(t, dir).Spaces() {
				checkSpace(t, want, nodes, spaces)
			}
		})
	}
}

const ocisRev = ".REV."

// idOf joins the four folders above the entry with its rest.
func idOf(path, rest string) string {
	parts := strings.Split(filepath.Dir(path), "/")
	return strings.Join(parts[len(parts)-4:], "") + rest
}

func xattrs(path string) ([]ocis.Attribute, error) {
	all, err := testfixture.Xattrs(path)
	if err != nil {
		return nil, err
	}
	var attrs []ocis.Attribute
	for k, v := range all {
		attrs = append(attrs, ocis.Attribute{Key: k, Value: []byte(v)})
	}
	return attrs, nil
}

func checkSpace(t *testing.T, want testfixture.ExpectedSpace, nodes map[string]ocis.NodeMeta, spaces map[string]*ocis.SpaceMeta) {
	t.Helper()
	s := spaces[want.SpaceID()]
	if s == nil {
		t.Errorf("space %s was not found", want.ID)
		return
	}
	if s.Name != want.Name || s.Alias != want.DriveAlias || s.Type != want.DriveType || s.Description != want.Description {
		t.Errorf("space %s is %+v, want %+v", want.ID, s, want)
	}
	if dtime := nodes[want.SpaceID()].DTime; (dtime != "") != want.Disabled {
		t.Errorf("space %s was disabled at %q, want %v", want.ID, dtime, want.Disabled)
	}
	for path, i := range want.Items {
		if i.Error != 0 {
			continue
		}
		m, ok := nodes[i.NodeID()]
		if !ok {
			t.Errorf("node of %s was not found", path)
			continue
		}
		if path != "" && m.Name != filepath.Base(path) {
			t.Errorf("%s has the name %q", path, m.Name)
		}
		if i.IsFolder() {
			if m.TreeSize != i.Bytes() {
				t.Errorf("%s: %d bytes below, want %d", path, m.TreeSize, i.Bytes())
			}
			continue
		}
		if m.Type != ocis.TypeFile || m.BlobSize != i.Bytes() {
			t.Errorf("%s: type %d, %d bytes, want a file of %d", path, m.Type, m.BlobSize, i.Bytes())
		}
		if m.HasSHA1 != (i.SHA1() != "") || m.HasSHA1 && hex.EncodeToString(m.SHA1[:]) != i.SHA1() {
			t.Errorf("%s: SHA-1 %x, want %s", path, m.SHA1, i.SHA1())
		}
		if w, err := time.Parse(time.RFC1123, i.LastModified); err != nil || !m.MTime.Truncate(time.Second).Equal(w) {
			t.Errorf("%s: changed %v, want %s (%v)", path, m.MTime, i.LastModified, err)
		}
	}
}

func TestParseMPKForms(t *testing.T) {
	long := bytes.Repeat([]byte("x"), 300)
	huge := bytes.Repeat([]byte("y"), 70000)
	attrs := ocis.Attributes{
		{Key: "user.oc.a", Value: []byte{}},
		{Key: "user.oc." + string(long), Value: long},
		{Key: "user.oc.md." + strings.Repeat("k", 100), Value: huge},
		{Key: string(huge), Value: []byte{0}},
	}
	for i := range 20 { // more than a fixmap holds
		attrs = append(attrs, ocis.Attribute{Key: "user.oc.n" + string(rune('a'+i)), Value: []byte{byte(i)}})
	}
	data := ocis.EncodeMPK(attrs)
	got, err := ocis.ParseMPK(data)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(attrs) {
		t.Fatalf("%d attributes, want %d", len(got), len(attrs))
	}
	for i := range attrs {
		if got[i].Key != attrs[i].Key || !bytes.Equal(got[i].Value, attrs[i].Value) {
			t.Errorf("attribute %d differs", i)
		}
	}

	forms := map[string]string{
		"fixstr value": "\x81\xa1k\xa1v",
		"str8 value":   "\x81\xa1k\xd9\x01v",
		"str16 value":  "\x81\xa1k\xda\x00\x01v",
		"str32 value":  "\x81\xa1k\xdb\x00\x00\x00\x01v",
		"bin8 value":   "\x81\xa1k\xc4\x01v",
		"bin16 value":  "\x81\xa1k\xc5\x00\x01v",
		"bin32 value":  "\x81\xa1k\xc6\x00\x00\x00\x01v",
		"str8 key":     "\x81\xd9\x01k\xa1v",
		"map16":        "\xde\x00\x01\xa1k\xa1v",
		"map32":        "\xdf\x00\x00\x00\x01\xa1k\xa1v",
	}
	for name, data := range forms {
		got, err := ocis.ParseMPK([]byte(data))
		if err != nil || len(got) != 1 || got[0].Key != "k" || string(got[0].Value) != "v" {
			t.Errorf("%s: %v %q", name, err, got)
		}
	}
	if got, err := ocis.ParseMPK([]byte("\x81\xa1k\xc0")); err != nil || len(got) != 1 || len(got[0].Value) != 0 {
		t.Errorf("nil value: %v %q", err, got)
	}
	if got, err := ocis.ParseMPK([]byte{0x80}); err != nil || len(got) != 0 {
		t.Errorf("empty map: %v %q", err, got)
	}
}

func TestParseMPKDamage(t *testing.T) {
	if _, err := ocis.ParseMPK(nil); !errors.Is(err, ocis.ErrEmptyMPK) {
		t.Errorf("0 bytes: %v", err)
	}
	bad := map[string]string{
		"no map":          "\xa1k",
		"cut map16":       "\xde\x00",
		"cut map32":       "\xdf\x00\x00\x00",
		"map32 of 4G":     "\xdf\xff\xff\xff\xff",
		"map of too many": "\xde\xff\xff\xa1k\xa1v",
		"key missing":     "\x81",
		"key cut":         "\x81\xa5abc",
		"key no text":     "\x81\x01\xa1v",
		"key nil":         "\x81\xc0\xa1v",
		"value missing":   "\x81\xa1k",
		"value cut":       "\x81\xa1k\xc4\x05abc",
		"value length":    "\x81\xa1k\xc4",
		"value of 4G":     "\x81\xa1k\xc6\xff\xff\xff\xffv",
		"value no text":   "\x81\xa1k\x91\x01",
		"more after":      "\x81\xa1k\xa1v!",
	}
	for name, data := range bad {
		_, err := ocis.ParseMPK([]byte(data))
		var e *ocis.MPKError
		if !errors.As(err, &e) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if _, err := ocis.ParseNode("", []byte(data)); !errors.As(err, &e) {
			t.Errorf("%s: ParseNode: %v", name, err)
		}
	}
	// Each shortened form of a real file is refused.
	for n := range len(realFile) {
		if _, err := ocis.ParseMPK(realFile[:n]); err == nil {
			t.Errorf("the first %d bytes are taken for a whole file", n)
		}
	}
	stop := errors.New("stop")
	if err := ocis.ScanMPK(realFile, func(_, _ []byte) error { return stop }); err != stop {
		t.Errorf("error of the caller: %v", err)
	}
}

func TestAttributesEdit(t *testing.T) {
	a, err := ocis.ParseMPK(realFile)
	if err != nil {
		t.Fatal(err)
	}
	n := len(a)
	a.Set(ocis.PrefixOCIS, "name", []byte("other"))
	a.Set(ocis.PrefixOCIS, "nodestatus", []byte("processing:x"))
	if a.Text("name") != "other" || a.Text("nodestatus") != "processing:x" || len(a) != n+1 {
		t.Errorf("after setting: %q", a)
	}
	a.Delete("nodestatus")
	if _, ok := a.Get("nodestatus"); ok || len(a) != n {
		t.Errorf("after deleting: %q", a)
	}
	a.Sort()
	for i := 1; i < len(a); i++ {
		if a[i-1].Key > a[i].Key {
			t.Errorf("%s before %s", a[i-1].Key, a[i].Key)
		}
	}
}

func TestParseNode(t *testing.T) {
	m, err := ocis.ParseNode(ocis.PrefixOCIS, realFile)
	if err != nil {
		t.Fatal(err)
	}
	want := ocis.NodeMeta{
		ID: "2cbe3600-ddd7-4b40-879a-4bb1fa73ccf5", ParentID: "5f3a0298-f257-4f22-9b17-a691c8e0261a", Name: "dup1.bin",
		Type: ocis.TypeFile, BlobID: "ca0043a7-24ea-453c-a8cb-bc349e6e6f90", BlobSize: 60000,
	}
	if m.ID != want.ID || m.ParentID != want.ParentID || m.Name != want.Name || m.Type != want.Type || m.BlobID != want.BlobID || m.BlobSize != want.BlobSize {
		t.Errorf("got %+v", m)
	}
	if m.MTime.Format(time.RFC3339Nano) != "2026-11-22T06:33:32.340706601Z" || m.Space != nil {
		t.Errorf("got %+v", m)
	}
	if other, err := ocis.ParseNode(ocis.PrefixOpenCloud, realFile); err != nil || other.ID != "" {
		t.Errorf("with the other product's prefix: %v %+v", err, other)
	}
	if either, err := ocis.ParseNode("", realFile); err != nil || either.ID != want.ID {
		t.Errorf("without a prefix: %v %+v", err, either)
	}

	folder, err := ocis.ParseNode("", realFolder)
	if err != nil {
		t.Fatal(err)
	}
	if len(folder.Grants) != 1 || folder.TreeSize != 60001 || folder.Type != ocis.TypeFolder {
		t.Fatalf("folder: %+v", folder)
	}
	g := folder.Grants[0]
	if g.Principal != "056fc874-dd7f-11ef-ba84-af6fca4b7289" || g.Permissions != "txrwaduUq" || g.Deny || g.Group ||
		g.Creator != "b1f74ec4-dd7e-11ef-a543-03775734d0f7" || !g.Expires.IsZero() {
		t.Errorf("grant: %+v", g)
	}
}

func TestParseNodeOddValues(t *testing.T) {
	for name, value := range map[string]string{
		"type": "9", "blobsize": "-1", "treesize": "x", "cs.sha1": "short", "mtime": "yesterday", "tmtime": "2026",
		"grant.u:x": "t=A", "grant.z:x": "\x00t=A", "grant.u:y": "\x00t=Q", "grant.g:z": "\x00t=A:e=soon", "grant.u:q": "\x00novalue",
	} {
		data := ocis.EncodeMPK(ocis.Attributes{
			{Key: "user.oc." + name, Value: []byte(value)},
			{Key: "user.oc.name", Value: []byte("kept")},
		})
		m, err := ocis.ParseNode(ocis.PrefixOpenCloud, data)
		var e *ocis.AttributeError
		if !errors.As(err, &e) || !strings.Contains(err.Error(), strings.SplitN(name, ":", 2)[0]) {
			t.Errorf("%s = %q: %v", name, value, err)
		}
		if m.Name != "kept" {
			t.Errorf("%s = %q: the other attributes are lost", name, value)
		}
	}
}

func TestNodeKeepsAnyName(t *testing.T) {
	name := "a\xff\xfe\n/" + strings.Repeat("ü", 400)
	m, err := ocis.ParseNode("", ocis.EncodeMPK(ocis.Attributes{{Key: "user.oc.name", Value: []byte(name)}}))
	if err != nil || m.Name != name {
		t.Errorf("%v %q", err, m.Name)
	}
}

func TestGrantRoundTrip(t *testing.T) {
	for _, g := range []ocis.Grant{
		{Principal: "u1", Permissions: "txr", Creator: "c"},
		{Principal: "g1", Group: true, Flags: "g", Deny: true, Permissions: "O", Expires: time.Unix(1900000000, 5).UTC()},
		{Principal: "odd", Creator: "with:colon and \"quote\""},
	} {
		name, value := g.Attribute()
		got, err := ocis.ParseGrant(name, value)
		if err != nil || got != g {
			t.Errorf("%q %q: %v %+v, want %+v", name, value, err, got, g)
		}
	}
	// The product's own bytes come out again.
	a, err := ocis.ParseMPK(realFolder)
	if err != nil {
		t.Fatal(err)
	}
	for _, attr := range a {
		name, _ := ocis.StripPrefix(attr.Key)
		if !strings.HasPrefix(name, "grant.") {
			continue
		}
		g, err := ocis.ParseGrant(name, attr.Value)
		if err != nil {
			t.Fatal(err)
		}
		if n, v := g.Attribute(); n != name || !bytes.Equal(v, attr.Value) {
			t.Errorf("written again: %q %q, want %q %q", n, v, name, attr.Value)
		}
	}
}

func TestClassifyNodeName(t *testing.T) {
	const r = "-8dfe-4162-9c4f-000000000000"
	const w = "2023-11-14T22:46:40.123456789Z"
	cases := []struct {
		name  string
		kind  ocis.NameKind
		rest  string
		stamp string
	}{
		{r, ocis.NameNode, r, ""},
		{r + ".mpk", ocis.NameMeta, r, ""},
		{r + ".mlock", ocis.NameMLock, r, ""},
		{r + ".lock", ocis.NameLock, r, ""},
		{r + ".flock", ocis.NameFLock, r, ""},
		{r + ".REV." + w, ocis.NameRevision, r, w},
		{r + ".REV." + w + ".1", ocis.NameRevision, r, w + ".1"},
		{r + ".REV." + w + ".12.mpk", ocis.NameRevisionMeta, r, w + ".12"},
		{r + ".REV." + w + ".mpk", ocis.NameRevisionMeta, r, w},
		{r + ".REV." + w + ".mlock", ocis.NameRevisionMLock, r, w},
		{r + ".REV." + w + ".flock", ocis.NameRevisionFLock, r, w},
		{r + ".REV.2023-11-14T22:46:40Z", ocis.NameRevision, r, "2023-11-14T22:46:40Z"},
		{r + ".T." + w, ocis.NameTrashed, r, w},
		{r + ".T." + w + ".mpk", ocis.NameTrashedMeta, r, w},
		{r + ".T." + w + ".mlock", ocis.NameTrashedMLock, r, w},
		{r + ".T." + w + ".lock", ocis.NameTrashedLock, r, w},
		{"/share-manager-metadata", ocis.NameNode, "/share-manager-metadata", ""},
		{"." + r + ".mpk123456", ocis.NameTemp, "." + r + ".mpk123456", ""},
		{"." + r + ".T." + w + ".mpk7", ocis.NameTemp, "." + r + ".T." + w + ".mpk7", ""},
		{r + ".REV.last week", ocis.NameUnknown, r + ".REV.last week", ""},
		{r + ".REV." + w + ".x", ocis.NameUnknown, r + ".REV." + w + ".x", ""},
		{r + ".REV." + w + ".0", ocis.NameUnknown, r + ".REV." + w + ".0", ""},
		{r + ".T." + w + ".1", ocis.NameUnknown, r + ".T." + w + ".1", ""},
		{".REV." + w, ocis.NameUnknown, ".REV." + w, ""},
		{".mpk", ocis.NameUnknown, ".mpk", ""},
		{"", ocis.NameUnknown, "", ""},
	}
	for _, c := range cases {
		kind, rest, stamp := ocis.ClassifyNodeName(c.name)
		if kind != c.kind || rest != c.rest || stamp != c.stamp {
			t.Errorf("%q is %v %q %q, want %v %q %q", c.name, kind, rest, stamp, c.kind, c.rest, c.stamp)
		}
	}
	if ocis.NameTrashedMLock.Base() != ocis.NameTrashed || !ocis.NameTrashedMLock.IsLock() || ocis.NameRevisionMeta.IsLock() ||
		!ocis.NameRevisionMeta.IsMeta() || ocis.NameTemp.IsLock() || ocis.NameUnknown.Base() != ocis.NameUnknown {
		t.Error("kinds are sorted wrongly")
	}
}

func TestParseTrashInfo(t *testing.T) {
	cases := []struct{ in, path, date string }{
		{"[Trash Info]\nPath=Round 0/gone\nDeletionDate=2026-11-22T06:39:33", "Round 0/gone", "2026-11-22T06:39:33"},
		{"[Trash Info]\nPath=percent%20 5\nDeletionDate=2026-11-22T06:39:33\n", "percent%20 5", "2026-11-22T06:39:33"},
		{"[Trash Info]\nDeletionDate=2026-11-22T06:39:33\nPath=x\n", "x", "2026-11-22T06:39:33"},
		{"[Trash Info]\nPath=a\nb\nDeletionDate=2026-11-22T06:39:33", "a\nb", "2026-11-22T06:39:33"},
		{"[Trash Info]\nPath=x", "x", ""},
	}
	for _, c := range cases {
		got, err := ocis.ParseTrashInfo([]byte(c.in))
		if err != nil || got.Path != c.path || got.DeletionDate != c.date {
			t.Errorf("%q: %v %+v", c.in, err, got)
		}
	}
	for _, in := range []string{"", "Path=x", "[Trash Info]", "[Trash Info]\nDeletionDate=2026-11-22T06:39:33", "[Trash Info]\nPath=\nDeletionDate=x", "[Trash Info]\nPath="} {
		if got, err := ocis.ParseTrashInfo([]byte(in)); err == nil {
			t.Errorf("%q is taken for %+v", in, got)
		}
	}
}

func TestParseUploadErrors(t *testing.T) {
	for _, in := range []string{"", " \n", "{", "[]", "{}", `{"ID":"x","Size":"many"}`} {
		if _, err := ocis.ParseUpload([]byte(in)); err == nil {
			t.Errorf("%q is taken for a session", in)
		}
	}
}

func TestIndexAcceptsBytes(t *testing.T) {
	// Before migration 0005 the values were binary.
	data := ocis.EncodeMPK(ocis.Attributes{{Key: "id", Value: []byte("../x")}})
	list, err := ocis.ParseIndex(data)
	if err != nil || len(list) != 1 || list[0] != (ocis.IndexEntry{SpaceID: "id", Target: "../x"}) {
		t.Errorf("%v %v", err, list)
	}
	if _, err := ocis.ParseIndex(nil); !errors.Is(err, ocis.ErrEmptyMPK) {
		t.Errorf("empty index: %v", err)
	}
}

func TestScanAllocatesNothing(t *testing.T) {
	n := 0
	count := func(k, v []byte) error { n += len(k) + len(v); return nil }
	if a := testing.AllocsPerRun(100, func() { _ = ocis.ScanMPK(realFile, count) }); a > 0 {
		t.Errorf("ScanMPK takes memory %v times", a)
	}
	if a := testing.AllocsPerRun(100, func() { _, _ = ocis.ParseNode(ocis.PrefixOCIS, realFile) }); a > 1 {
		t.Errorf("ParseNode takes memory %v times, want once", a)
	}
}
