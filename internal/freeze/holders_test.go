package freeze

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/mountinfo"
)

// holdMain holds a file in one of several ways, says so, and waits to be killed.
// Arguments: way, file, and for containers the base directory and a scratch directory.
func holdMain() {
	way, file := os.Args[2], os.Args[3]
	check := func(err error) {
		if err != nil {
			fmt.Println("failed:", err)
			os.Exit(1)
		}
	}
	flags := os.O_RDWR
	if way == "read" {
		flags = os.O_RDONLY
	}
	if strings.HasPrefix(way, "container") {
		base, scratch := os.Args[4], os.Args[5]
		check(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
		inside := filepath.Join(scratch, "var lib", "ocis")
		check(os.MkdirAll(inside, 0o755))
		check(unix.Mount(base, inside, "", unix.MS_BIND, ""))
		rel, err := filepath.Rel(base, file)
		check(err)
		file = filepath.Join(inside, rel)
		if way == "container-chroot" {
			check(unix.Chroot(scratch))
			check(os.Chdir("/"))
			file = filepath.Join("/var lib/ocis", rel)
		}
	}
	f, err := os.OpenFile(file, flags, 0)
	check(err)
	switch way {
	case "lock":
		check(flock(f, unix.LOCK_EX|unix.LOCK_NB))
	case "map":
		_, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		check(err)
		check(f.Close())
	case "cwd":
		check(f.Close())
		check(os.Chdir(filepath.Dir(file)))
	case "deleted":
		check(os.Remove(file))
	}
	fmt.Println("holding")
	select {}
}

func TestHolders(t *testing.T) {
	t.Parallel()
	container := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	podlike := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID}
	for _, c := range []struct {
		name    string
		way     string
		file    string // below base
		roots   []string
		attr    *syscall.SysProcAttr
		want    string // How; "" for nothing
		writing bool
	}{
		{"open for writing", "write", "storage/users/x", []string{"."}, nil, HowOpen, true},
		{"open for reading", "read", "storage/users/x", []string{"."}, nil, HowOpen, false},
		{"another root", "write", "storage/users/x", []string{"idm"}, nil, "", false},
		{"a root with the same beginning", "write", "storage/users/x", []string{"storage/use"}, nil, "", false},
		{"the file itself", "write", "storage/users/x", []string{"storage/users/x"}, nil, HowOpen, true},
		{"a symlink to the root", "write", "storage/users/x", []string{"link"}, nil, HowOpen, true},
		{"a bind mount in the root", "write", "storage/users/x", []string{"bound"}, nil, HowOpen, true},
		{"deleted", "deleted", "storage/users/x", []string{"."}, nil, HowOpen, true},
		{"mapped", "map", "storage/users/x", []string{"."}, nil, HowMapped, true},
		{"working directory", "cwd", "storage/users/x", []string{"."}, nil, "", false},
		{"locked below base", "lock", "idm/idm.boltdb", []string{"."}, nil, HowLock, true},
		{"locked, file given", "lock", "idm/idm.boltdb", []string{"idm/idm.boltdb"}, nil, HowLock, true},
		{"search locked", "lock", "search/bleve/store/root.bolt", []string{"search"}, nil, HowLock, true},
		{"other mount namespace", "container", "storage/users/x", []string{"."}, container, HowOpen, true},
		{"other mount namespace, other root", "container", "storage/users/x", []string{"idm"}, container, "", false},
		{"other mount and PID namespace", "container", "storage/users/x", []string{"storage"}, podlike, HowOpen, true},
		{"chroot in other mount namespace", "container-chroot", "storage/users/x", []string{"."}, container, HowOpen, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			base := filepath.Join(dir, "base")
			for _, d := range []string{"idm", "storage/users", "storage/use", "search/bleve/store", "bound"} {
				if err := os.MkdirAll(filepath.Join(base, d), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Symlink("storage", filepath.Join(base, "link")); err != nil {
				t.Fatal(err)
			}
			if c.roots[0] == "bound" {
				bound := filepath.Join(base, "bound")
				if err := unix.Mount(filepath.Join(base, "storage"), bound, "", unix.MS_BIND, ""); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					if err := unix.Unmount(bound, unix.MNT_DETACH); err != nil {
						t.Error(err)
					}
				})
			}
			file := filepath.Join(base, c.file)
			if err := os.WriteFile(file, make([]byte, 4096), 0o600); err != nil {
				t.Fatal(err)
			}
			var roots []string
			for _, r := range c.roots {
				roots = append(roots, filepath.Join(base, r))
			}
			if h, err := Holders(background(), roots); err != nil || len(h) != 0 {
				t.Fatalf("before: %v %v", h, err)
			}
			cmd, out := helperProcess(t, c.attr, nil, "hold", c.way, file, base, filepath.Join(dir, "scratch"))
			if line := readLine(t, out); line != "holding" {
				t.Fatal(line)
			}
			u, err := Look(background(), append(roots, filepath.Join(base, "missing")))
			if err != nil {
				t.Fatal(err)
			}
			if c.want == "" {
				if len(u.Holders) != 0 {
					t.Fatalf("found %v", u.Holders)
				}
				return
			}
			if len(u.Holders) == 0 {
				t.Fatal("not found")
			}
			h := u.Holders[0]
			wantPath := file
			if c.roots[0] == "bound" {
				wantPath = filepath.Join(base, "bound/users/x")
			}
			if h.PID != cmd.Process.Pid || h.How != c.want || h.Writing != c.writing || h.Path != wantPath {
				t.Errorf("got %+v, want process %d, %s of %s", h, cmd.Process.Pid, c.want, wantPath)
			}
			if h.Command != filepath.Base(os.Args[0]) {
				t.Errorf("command %q", h.Command)
			}
			if !errors.Is(u.Err(), ErrRunning) || !strings.Contains(u.Err().Error(), wantPath) {
				t.Errorf("error %v", u.Err())
			}
			if u, err := Look(background(), roots, cmd.Process.Pid); err != nil || len(u.Holders) != 0 && c.want != HowLock {
				t.Errorf("with an exception: %v %v", u, err)
			}
		})
	}
}

// A lock counts although no process can be found that has it.
func TestHoldersLockWithoutProcess(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "ocis.boltdb")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := flock(f, unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	h, err := Holders(background(), []string{dir}) // this process itself is never seen
	if err != nil {
		t.Fatal(err)
	}
	if len(h) != 1 || h[0].PID != 0 || h[0].How != HowLock || h[0].Path != path {
		t.Errorf("got %+v", h)
	}
}

func TestParseLocks(t *testing.T) {
	got := parseLocks([]byte(`1: FLOCK  ADVISORY  WRITE 708 fe:01:1234 0 EOF
1: -> FLOCK  ADVISORY  WRITE 709 fe:01:1234 0 EOF
2: OFDLCK ADVISORY  READ -1 00:2e:77 128 128
3: POSIX  ADVISORY  WRITE 0 103:00:18446744073709551615 0 EOF
4: nonsense
`))
	want := []kernelLock{{708, "254:1", 1234}, {709, "254:1", 1234}, {0, "0:46", 77}, {0, "259:0", 1<<64 - 1}}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestMountTable(t *testing.T) {
	list, err := mountinfo.Parse(strings.NewReader(`21 1 8:1 / / rw - ext4 /dev/sda1 rw
40 21 0:50 /@data/sub /srv/my\040data rw shared:1 - btrfs /dev/sdb rw
41 40 8:1 /volumes/x/_data /srv/my\040data/idm rw,relatime shared:3 master:2 - ext4 /dev/sda1 rw
42 21 0:60 / /srv/my\040data rw - tmpfs none rw
`))
	if err != nil {
		t.Fatal(err)
	}
	table := newMountTable(list, "/")
	for _, c := range []struct {
		path string
		id   int
		want place
	}{
		{"/srv/my data/a", 40, place{"0:50", "/@data/sub/a"}},
		{"/srv/my data/a", -1, place{"0:60", "/a"}},
		{"/srv/my data/idm/b", -1, place{"8:1", "/volumes/x/_data/b"}},
		{"/srv/my database", -1, place{"8:1", "/srv/my database"}},
		{"/", 21, place{"8:1", "/"}},
		{"/x", 99, place{"8:1", "/x"}},
	} {
		if got, ok := table.locate(c.path, c.id); !ok || got != c.want {
			t.Errorf("%s by %d: got %v, want %v", c.path, c.id, got, c.want)
		}
	}
}

// lookMain prints what the scan of a base directory could not see, and how many holders it saw.
func lookMain() {
	u, err := Look(context.Background(), []string{os.Args[2]})
	fmt.Printf("%d %v %v\n", len(u.Holders), err, u.Limits)
	os.Exit(0)
}

// Who may not look must say so: without root, the files of others are hidden, the lock is not.
func TestHoldersLimits(t *testing.T) {
	i := newInstance(t)
	exe := openTo(t, i.dir)
	i.start()
	if err := os.Chmod(filepath.Join(i.base, "idm/idm.boltdb"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "look", i.base)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "1 <nil>") || !strings.Contains(string(out), "run as root") {
		t.Errorf("%s %v", out, err)
	}
	cmd = exec.Command(exe, "look", i.base)
	out, err = cmd.CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "3 <nil>") || strings.Contains(string(out), "run as root") {
		t.Errorf("as root: %s %v", out, err)
	}
}

// A process that opens files for moments only is seen by what it changes.
func TestChanging(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "a", "b", "c")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	end := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-end:
				return
			case <-time.After(time.Millisecond):
				if err := os.WriteFile(file, fmt.Append(nil, n), 0o600); err != nil {
					t.Error(err)
				}
			}
		}
	})
	u, err := lookTwice(background(), []string{dir}, &Run{})
	if err != nil || len(u.Holders) != 1 || u.Holders[0].How != HowChanges || !strings.Contains(u.Err().Error(), "something writes to "+dir) {
		t.Errorf("%v %v", u, err)
	}
	close(end)
	wg.Wait()
	if u, err := lookTwice(background(), []string{dir}, &Run{}); err != nil || len(u.Holders) != 0 {
		t.Errorf("%v %v", u, err)
	}
}
