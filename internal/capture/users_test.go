package capture_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"path"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/capture"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// resticNode is a line of `restic ls --json`.
type resticNode struct {
	Path string `json:"path"`
	Type string `json:"type"`
	Size int64  `json:"size"`
}

// TestUsersSeeWhatTheServerServed compares what stock restic lists and holds with what the real server
// answered for each space before it was stopped.
func TestUsersSeeWhatTheServerServed(t *testing.T) {
	for _, name := range fixtures {
		t.Run(name, func(t *testing.T) {
			fx := testfixture.Unpack(t, name)
			want := testfixture.LoadExpected(t, fx)
			r, dir := newRepo(t)
			_, sn, _ := run(t, r, instanceOf(fx, name), capture.Options{})
			listed := map[string]resticNode{}
			for _, line := range strings.Split(restic(t, dir, "ls", "--json", "latest"), "\n") {
				var n resticNode
				if json.Unmarshal([]byte(line), &n) == nil && n.Path != "" {
					listed[n.Path] = n
				}
			}
			checked := 0
			for _, sp := range want.Spaces() {
				if sp.Disabled {
					continue // the server answers errors for it
				}
				base := "/storage/users/spaces/" + sp.DriveAlias
				seen := map[string]bool{base: true}
				for p, it := range sp.Items {
					full := path.Join(base, p)
					if strings.HasPrefix(it.Content, "error") {
						// The server of the posix fixture lists a file that came back from the trash
						// under its old name, and then cannot serve it: the disk has the new one.
						seen[path.Join(base, path.Dir(p), "un"+path.Base(p))] = true
						continue
					}
					seen[full] = true
					n, ok := listed[full]
					switch {
					case !ok:
						t.Errorf("restic does not list %q", full)
					case it.IsFolder() != (n.Type == "dir"):
						t.Errorf("%q is a %s", full, n.Type)
					case !it.IsFolder() && n.Size != it.Bytes() && it.Size != "":
						t.Errorf("%q has %d bytes, the server said %d", full, n.Size, it.Bytes())
					}
					if it.IsFolder() {
						continue
					}
					sum(t, r, sn, full, it.Content)
					checked++
					for _, v := range it.Versions {
						stamp := v.Key[strings.Index(v.Key, ".REV.")+len(".REV."):]
						sum(t, r, sn, path.Join("/storage/users/versions", sp.DriveAlias, p, stamp), v.SHA256)
						checked++
					}
				}
				for p := range listed {
					if strings.HasPrefix(p, base+"/") && !seen[p] {
						t.Errorf("restic lists %q, which the server did not", p)
					}
				}
				checkTrash(t, listed, sp)
			}
			if checked < 100 {
				t.Fatalf("only %d files were compared", checked)
			}
		})
	}
}

// checkTrash compares the trash bin of a space with what the server listed.
func checkTrash(t *testing.T, listed map[string]resticNode, sp testfixture.ExpectedSpace) {
	t.Helper()
	base := "/storage/users/trash/" + sp.DriveAlias + "/"
	items := 0
	for p := range listed {
		rel, ok := strings.CutPrefix(p, base)
		if ok && strings.Count(rel, "/") == 1 {
			items++
		}
	}
	if items != len(sp.Trash) {
		t.Errorf("%s: %d items in the trash, the server listed %d", sp.DriveAlias, items, len(sp.Trash))
	}
	for _, it := range sp.Trash {
		found := false
		for p, n := range listed {
			rel, ok := strings.CutPrefix(p, base)
			found = found || ok && strings.Count(rel, "/") == 1 && path.Base(rel) == path.Base(it.Path) &&
				(n.Type == "dir" || it.Size <= 0 || n.Size == it.Size) // decomposedfs answers 0 for trashed files
		}
		if !found {
			t.Errorf("%s: %q is not in the trash", sp.DriveAlias, it.Path)
		}
	}
}

// sum compares the SHA-256 of the file p of the snapshot with want.
func sum(t *testing.T, r *repo.Repository, sn *snapshot.Snapshot, p, want string) {
	t.Helper()
	n, err := snapshot.Lookup(t.Context(), r, *sn.Tree, p)
	if err != nil {
		t.Error(err)
		return
	}
	data, err := snapshot.LoadContent(t.Context(), r, n, 1<<30)
	if err != nil {
		t.Error(err)
		return
	}
	if h := sha256.Sum256(data); hex.EncodeToString(h[:]) != want {
		t.Errorf("%q holds other bytes than the server served", p)
	}
}
