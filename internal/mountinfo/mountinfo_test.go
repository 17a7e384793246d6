package mountinfo

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const sample = `22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
23 22 0:21 / /proc rw,nosuid - proc proc rw
30 22 0:40 /@data /srv/my\040data rw,noatime shared:5 master:2 - btrfs /dev/sdb rw,subvol=/@data
31 22 0:41 / /mnt rw - nfs4 host:/export rw
32 31 0:42 / /mnt/in rw - zfs pool/in rw,xattr
33 22 0:43 / /mnt rw - tmpfs none rw
34 22 8:1 /opt/x /bind rw - ext4 /dev/sda1 rw
`

func TestFind(t *testing.T) {
	tab, err := Parse(strings.NewReader(sample))
	if err != nil {
		t.Fatal(err)
	}
	if len(tab) != 7 || tab[2].Point != "/srv/my data" || tab[2].Root != "/@data" || tab[2].Device != "0:40" || tab[2].Super != "rw,subvol=/@data" || tab[2].Parent != 22 {
		t.Errorf("got %+v", tab)
	}
	for path, want := range map[string]string{
		"/":                 "ext4 /",
		"/srv":              "ext4 /",
		"/srv/my data":      "btrfs /srv/my data",
		"/srv/my data/x/..": "btrfs /srv/my data",
		"/srv/my dataset":   "ext4 /",
		"/mnt/x":            "tmpfs /mnt", // the later mount hides the earlier one
		"/bind/a":           "ext4 /bind",
		"/proc/self":        "proc /proc",
	} {
		if m, ok := tab.Find(path); !ok || m.Type+" "+m.Point != want {
			t.Errorf("%s: got %s %s", path, m.Type, m.Point)
		}
	}
	if _, ok := (Table{}).Find("/"); ok {
		t.Error("found a mount in an empty table")
	}
}

func TestParseErrors(t *testing.T) {
	for _, line := range []string{"x", "a 1 8:1 / / rw - ext4 /dev/sda rw", "1 b 8:1 / / rw - ext4 /dev/sda rw", "1 2 8:1 / / rw shared:1 ext4", "1 2 8:1 / / rw -"} {
		if _, err := Parse(strings.NewReader("\n" + line + "\n")); err == nil || !strings.Contains(err.Error(), "line 2") {
			t.Errorf("%q: got %v", line, err)
		}
	}
	if _, err := Load("/nonexistent"); err == nil {
		t.Error("no error")
	}
}

func TestOf(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink(dir, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	in, err := Of(dir)
	if err != nil {
		t.Fatal(err)
	}
	if in.Filesystem == "" || !filepath.IsAbs(in.Mount) || in.Free <= 0 || in.Total < in.Free || in.FreeFiles == 0 {
		t.Errorf("got %+v", in)
	}
	for _, p := range []string{"link/not/there/yet", "not/there", "link"} {
		got, err := Of(filepath.Join(dir, p))
		if err != nil || got.Mount != in.Mount || got.Filesystem != in.Filesystem {
			t.Errorf("%s: got %+v, %v", p, got, err)
		}
	}
	if p, err := Of("/proc/self"); err != nil || p.Filesystem != "proc" {
		t.Errorf("got %+v, %v", p, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(sample)
	f.Add(`1 2 3 4 5 6 - 7 8`)
	f.Add(`1 2 3 / \ rw - \0 \777`)
	f.Fuzz(func(t *testing.T, s string) {
		tab, err := Parse(strings.NewReader(s))
		if err != nil {
			return
		}
		for _, m := range tab {
			if filepath.IsAbs(m.Point) && filepath.Clean(m.Point) == m.Point {
				if _, ok := tab.Find(m.Point); !ok {
					t.Errorf("%q is a mount point but lies on no mount", m.Point)
				}
			}
		}
	})
}
