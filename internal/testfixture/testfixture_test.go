package testfixture

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestUnpackAndExpected(t *testing.T) {
	for _, name := range Names() {
		t.Run(name, func(t *testing.T) {
			dir := Unpack(t, name)
			for _, p := range []string{"data", "config", "driver", "expected.json"} {
				if _, err := os.Stat(filepath.Join(dir, p)); err != nil {
					t.Error(err)
				}
			}
			e := LoadExpected(t, dir)
			if len(e.Users) != 6 {
				t.Errorf("%d users, want 6", len(e.Users))
			}
			spaces := e.Spaces()
			if len(spaces) != 12 {
				t.Errorf("%d spaces, want 12", len(spaces))
			}
			items, versions, trash, disabled := 0, 0, 0, 0
			for id, s := range spaces {
				if s.ID != id || s.SpaceID() == "" || s.Name == "" || s.DriveAlias == "" {
					t.Errorf("space %s was read as %+v", id, s)
				}
				if s.Disabled {
					disabled++
					if s.Items[""].Error != 404 {
						t.Errorf("disabled space %s answers %+v", id, s.Items[""])
					}
				}
				trash += len(s.Trash)
				for path, i := range s.Items {
					items++
					versions += len(i.Versions)
					if i.Error == 0 && (i.NodeID() == "" || i.IsFolder() == (i.Content != "")) {
						t.Errorf("item %s was read as %+v", path, i)
					}
					if i.Checksums != "" && (len(i.SHA1()) != 40 || i.Bytes() == 0) {
						t.Errorf("item %s has the checksums %q", path, i.Checksums)
					}
				}
			}
			if items < 100 || versions < 30 || trash < 10 || disabled != 2 {
				t.Errorf("%d items, %d versions, %d trash, %d disabled", items, versions, trash, disabled)
			}
			if len(e.Users["alan"].SharesByMe) == 0 || len(e.Users["mary"].SharedWithMe) == 0 {
				t.Error("shares were not read")
			}
		})
	}
}

func TestUnpackTwiceIsEqual(t *testing.T) {
	Compare(t, Unpack(t, OpenCloudPosix), Unpack(t, OpenCloudPosix), Options{})
}

func TestUnpackKeepsXattrs(t *testing.T) {
	dir := Unpack(t, OpenCloudPosix)
	x, err := Xattrs(filepath.Join(dir, "data/storage/users/users/lynn"))
	if err != nil {
		t.Fatal(err)
	}
	if x["user.oc.space.type"] != "personal" || x["user.oc.id"] == "" {
		t.Errorf("attributes of a space root: %q", x)
	}
}

// TestDiffSeesEverything changes one thing at a time.
func TestDiffSeesEverything(t *testing.T) {
	base := t.TempDir()
	build := func(t *testing.T) string {
		dir, err := os.MkdirTemp(base, "")
		must(t, err)
		must(t, os.Mkdir(dir+"/d", 0o750))
		must(t, os.WriteFile(dir+"/d/f", []byte("content"), 0o600))
		must(t, os.WriteFile(dir+"/a", []byte("linked"), 0o600))
		must(t, os.Link(dir+"/a", dir+"/b"))
		must(t, os.WriteFile(dir+"/c", []byte("linked"), 0o600))
		must(t, os.Symlink("d/f", dir+"/l"))
		must(t, unix.Mkfifo(dir+"/p", 0o600))
		must(t, unix.Lsetxattr(dir+"/d", "user.x", []byte("1"), 0))
		f, err := os.Create(dir + "/s")
		must(t, err)
		must(t, f.Truncate(1<<20))
		_, err = f.WriteAt([]byte("end"), 1<<20)
		must(t, err)
		must(t, f.Close())
		for _, p := range []string{"a", "c", "l", "p", "s", "d/f", "d", "."} {
			must(t, setTime(filepath.Join(dir, p), time.Unix(1700000000, 123456789)))
		}
		return dir
	}
	same := func(string) error { return nil }
	at := func(dir, p string) error { return setTime(filepath.Join(dir, p), time.Unix(1700000000, 123456789)) }
	cases := []struct {
		name   string
		change func(dir string) error
		want   string // "" is equal
	}{
		{"nothing", same, ""},
		{"content", func(d string) error {
			if err := os.WriteFile(d+"/d/f", []byte("conTent"), 0o600); err != nil {
				return err
			}
			return at(d, "d/f")
		}, `"d/f": content differs from byte 3 on`},
		{"size", func(d string) error {
			if err := os.WriteFile(d+"/d/f", []byte("longer content"), 0o600); err != nil {
				return err
			}
			return at(d, "d/f")
		}, `"d/f": 14 bytes instead of 7`},
		{"mode", func(d string) error { return os.Chmod(d+"/d", 0o700) }, `"d": mode 0700 instead of 0750`},
		{"owner", func(d string) error { return os.Lchown(d+"/l", 5, 6) }, `"l": owner 5:6 instead of 0:0`},
		{"time", func(d string) error { return setTime(d+"/l", time.Unix(1700000000, 123456788)) }, `"l": mtime 2023-11-14T22:13:20.123456788Z instead of`},
		{"attribute", func(d string) error { return unix.Lsetxattr(d+"/d", "user.x", []byte("2"), 0) }, `"d": attribute user.x is "2" instead of "1"`},
		{"attribute gone", func(d string) error { return unix.Lremovexattr(d+"/d", "user.x") }, `"d": attribute user.x is missing`},
		{"attribute more", func(d string) error { return unix.Lsetxattr(d+"/a", "user.y", nil, 0) }, `"a": attribute user.y should not be there`},
		{"missing", func(d string) error {
			if err := os.Remove(d + "/p"); err != nil {
				return err
			}
			return at(d, ".")
		}, `"p": missing`},
		{"more", func(d string) error {
			if err := os.WriteFile(d+"/d/g", nil, 0o600); err != nil {
				return err
			}
			return at(d, "d")
		}, `"d/g": should not be there`},
		{"symlink", func(d string) error {
			if err := errFirst(os.Remove(d+"/l"), os.Symlink("d/g", d+"/l"), at(d, "l")); err != nil {
				return err
			}
			return at(d, ".")
		}, `"l": symlink to "d/g" instead of "d/f"`},
		{"type", func(d string) error {
			return errFirst(os.Remove(d+"/p"), os.WriteFile(d+"/p", nil, 0o600), at(d, "p"), at(d, "."))
		}, `"p": is a file instead of a FIFO`},
		{"hard link", func(d string) error {
			return errFirst(os.Remove(d+"/b"), os.Link(d+"/c", d+"/b"), at(d, "."))
		}, `"a": hard links {`},
		{"holes", func(d string) error {
			if err := os.WriteFile(d+"/s", append(make([]byte, 1<<20), "end"...), 0o644); err != nil {
				return err
			}
			return at(d, "s")
		}, `"s": holes "" instead of "0:1048576"`},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			want, got := build(t), build(t)
			must(t, c.change(got))
			diffs, err := Diff(want, got)
			must(t, err)
			if many, err := DiffOptions(want, got, Options{Workers: 5}); err != nil || !slices.Equal(many, diffs) {
				t.Errorf("with more workers: %q, %v, not %q", many, err, diffs)
			}
			if c.want == "" {
				if len(diffs) > 0 {
					t.Errorf("equal trees differ: %q", diffs)
				}
				return
			}
			if len(diffs) == 0 || !strings.HasPrefix(diffs[0], c.want) {
				t.Errorf("got %q, want %q first", diffs, c.want)
			}
		})
	}
}

func errFirst(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
