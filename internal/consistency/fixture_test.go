package consistency_test

import (
	"context"
	"crypto/md5"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/consistency"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// bucket reads the blobs of a fixture whose server kept them in a bucket: one file per object.
type bucket struct {
	dir string
	// encrypted: what looks like MD5s are none.
	encrypted bool
	// bad is the end of the name of an object that is another one, by its checksum, and cannot be read.
	bad string
}

func (b *bucket) List(_ context.Context, space string, fn func(consistency.BlobInfo) error) error {
	top := filepath.Join(b.dir, space)
	return filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			if os.IsNotExist(err) {
				return nil
			}
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(top, p)
		data, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		sum := md5.Sum(data)
		if b.encrypted || b.bad != "" && strings.HasSuffix(p, b.bad) {
			sum[0]++
		}
		return fn(consistency.BlobInfo{ID: strings.ReplaceAll(rel, "/", ""), Size: fi.Size(), Modified: fi.ModTime(), MD5: fmt.Sprintf("%x", sum)})
	})
}

func (b *bucket) Others(_ context.Context, known func(string) bool, fn func(consistency.OtherObjects) error) error {
	list, err := os.ReadDir(b.dir)
	if err != nil {
		return err
	}
	for _, d := range list {
		if known(d.Name()) {
			continue
		}
		o := consistency.OtherObjects{Folder: d.Name()}
		err := b.List(context.Background(), d.Name(), func(i consistency.BlobInfo) error {
			o.Objects++
			o.Bytes += i.Size
			return nil
		})
		if err == nil && o.Objects > 0 {
			err = fn(o)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *bucket) Open(_ context.Context, space, blob string) (io.ReadCloser, error) {
	if b.bad != "" && strings.HasSuffix(blob, b.bad) {
		return nil, errors.New("the server is on fire")
	}
	return os.Open(filepath.Join(b.dir, space, ocis.NodePath(blob)))
}

// stores opens both stores of the instance in dir.
func stores(t testing.TB, name, dir string) []consistency.Store {
	t.Helper()
	var out []consistency.Store
	for _, s := range []struct{ name, root string }{{"users", "users"}, {"system", "metadata"}} {
		st := consistency.Store{Name: s.name, Layout: string(ocis.Decomposed), Prefix: ocis.PrefixOpenCloud}
		if s.name == "users" {
			switch name {
			case testfixture.OpenCloudPosix:
				st.Layout = string(ocis.Posix)
			case testfixture.OCIS:
				st.Prefix = ocis.PrefixOCIS
			case testfixture.OCISWithS3Blobs:
				st.Prefix, st.Remote, st.Blobs = ocis.PrefixOCIS, true, &bucket{dir: filepath.Join(dir, "bucket")}
			}
		}
		d, err := consistency.OpenDir(filepath.Join(dir, "data/storage", s.root), st.Layout, st.Prefix)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = d.Close() })
		st.Place = d
		out = append(out, st)
	}
	return out
}

// check runs a check and returns what it found.
func check(t testing.TB, st []consistency.Store, o consistency.Options) ([]consistency.Finding, *consistency.Summary) {
	t.Helper()
	var found []consistency.Finding
	o.Found = func(f consistency.Finding) error { found = append(found, f); return nil }
	sum, err := consistency.Run(context.Background(), st, o)
	if err != nil {
		t.Fatal(err)
	}
	return found, sum
}

func show(f consistency.Finding) string {
	return fmt.Sprintf("%s %s %s %s node=%s path=%q blob=%s %s", f.Severity, f.Class, f.Store, f.Name, f.Node, f.Path, f.Blob, f.Detail)
}

// TestFixtures: what real servers left when they were stopped has no damage.
func TestFixtures(t *testing.T) {
	for _, name := range testfixture.Names() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			found, sum := check(t, stores(t, name, testfixture.Unpack(t, name)), consistency.Options{ReadData: true})
			for _, f := range found {
				if f.Severity == consistency.Damage {
					t.Error(show(f))
				} else {
					t.Log(show(f))
				}
			}
			t.Logf("%+v", *sum)
		})
	}
}
