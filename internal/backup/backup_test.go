package backup_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/fault"
	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/backend/retry"
	"github.com/holdfast-backup/holdfast/internal/backup"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/restore"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
	"github.com/holdfast-backup/holdfast/internal/verify"
)

// The variables that make this test binary a backup that is going to be killed.
const (
	envRepo   = "HOLDFAST_TEST_REPO"
	envSource = "HOLDFAST_TEST_SOURCE"
	envKillAt = "HOLDFAST_TEST_KILL_AT" // number of the write before which it dies; "" if it is killed from outside
)

func TestMain(m *testing.M) {
	freeze.MaybeGuard()
	if os.Getenv(envRepo) != "" {
		os.Exit(child())
	}
	os.Exit(m.Run())
}

// child makes one backup, and dies by SIGKILL at the write it was told.
func child() int {
	ctx := context.Background()
	var be backend.Backend = local.New(os.Getenv(envRepo))
	if n, err := strconv.Atoi(os.Getenv(envKillAt)); err == nil {
		be = &killer{Backend: be, at: int64(n)}
	}
	r, err := repo.Open(ctx, be, "pw", repo.Options{PackSize: 1 << 20})
	if err == nil {
		_, err = backUp(ctx, r, os.Getenv(envSource))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// killer kills its own process before the nth write to the repository.
type killer struct {
	backend.Backend
	at int64
	n  atomic.Int64
}

func (k *killer) Save(ctx context.Context, h backend.Handle, data []byte) error {
	if h.Type != backend.LockFile {
		if k.n.Add(1) == k.at {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	return k.Backend.Save(ctx, h, data)
}

func backUp(ctx context.Context, r *repo.Repository, source string) (*backup.Result, error) {
	lock, ctx, err := r.Lock(ctx, repo.LockOptions{})
	if err != nil {
		return nil, err
	}
	defer lock.Unlock()
	if err := r.LoadIndex(ctx); err != nil {
		return nil, err
	}
	inst, err := discover.Discover(ctx, discover.Options{
		BaseDataPath: filepath.Join(source, "data"), ConfigDir: filepath.Join(source, "config"), NoSizes: true,
	})
	if err != nil {
		return nil, err
	}
	return backup.Run(ctx, backup.Options{Instance: inst, Repo: r, Freezer: freeze.None{}, Hostname: "test", Version: "test"})
}

// newRepo makes a repository whose key is cheap to open.
func newRepo(t *testing.T, be backend.Backend) {
	t.Helper()
	if _, err := repo.Init(t.Context(), be, "pw", repo.InitOptions{KDF: repo.KDF{N: 1024, R: 8, P: 1}}); err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, be backend.Backend) *repo.Repository {
	t.Helper()
	r, err := repo.Open(t.Context(), be, "pw", repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func mustBackUp(t *testing.T, r *repo.Repository, source string) *backup.Result {
	t.Helper()
	res, err := backUp(t.Context(), r, source)
	if err != nil {
		t.Fatal(err)
	}
	if !res.Manifest.Proof.Complete {
		t.Fatalf("incomplete: %+v", res.Manifest.Proof)
	}
	return res
}

// sameAs restores what names and compares it with the tree at want in everything.
func sameAs(t *testing.T, r *repo.Repository, what, want string) {
	t.Helper()
	ctx := t.Context()
	if err := r.LoadIndex(ctx); err != nil {
		t.Fatal(err)
	}
	list, err := snapshot.List(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	sn, err := snapshot.Find(list, what)
	if err != nil {
		t.Fatal(err)
	}
	dst := filepath.Join(t.TempDir(), "restored")
	p, err := restore.MakePlan(ctx, r, sn, restore.Options{BasePath: filepath.Join(dst, "data"), ConfigDir: filepath.Join(dst, "config")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := restore.Run(ctx, r, p); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"data", "config"} {
		diff, err := testfixture.Diff(filepath.Join(want, d), filepath.Join(dst, d))
		if err != nil {
			t.Fatal(err)
		}
		for i, line := range diff {
			if i == 20 {
				t.Errorf("and %d more", len(diff)-i)
				break
			}
			t.Errorf("%s: %s", d, line)
		}
	}
	if err := os.RemoveAll(dst); err != nil {
		t.Fatal(err)
	}
}

func clean(t *testing.T, dir string) {
	t.Helper()
	cmd := exec.Command("restic", "-r", dir, "--no-cache", "--no-lock", "check", "--read-data")
	cmd.Env = append(os.Environ(), "RESTIC_PASSWORD=pw")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("restic check: %v\n%s", err, out)
	}
}

func TestFixturesComeBackExactly(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"ocis-posix", "opencloud-posix", "opencloud-posixfs"} {
		t.Run(name, func(t *testing.T) {
			source := testfixture.Unpack(t, name)
			extras(t, source)
			dir := t.TempDir()
			be := local.New(filepath.Join(dir, "repo"))
			newRepo(t, be)
			r := open(t, be)
			mustBackUp(t, r, source)
			sameAs(t, open(t, be), "latest", source)
			clean(t, filepath.Join(dir, "repo"))
		})
	}
}

// extras adds to a fixture what law 1 speaks of and servers seldom make.
func extras(t *testing.T, source string) {
	t.Helper()
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, base := range []string{"data/idm", "data/storage/users", "config"} {
		d := filepath.Join(source, base, "extras")
		do(os.MkdirAll(filepath.Join(d, "deep/er"), 0o751))
		p := func(n string) string { return filepath.Join(d, n) }
		do(os.WriteFile(p("one"), []byte("linked"), 0o640))
		do(os.Link(p("one"), p("deep/two")))
		do(os.Link(p("one"), p("deep/er/three")))
		do(os.Symlink("../no\xff\xfewhere\n", p("link")))
		do(unix.Mkfifo(p("fifo"), 0o604))
		do(unix.Mknod(p("socket"), unix.S_IFSOCK|0o611, 0))
		do(unix.Mknod(p("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
		do(os.WriteFile(p("bytes \x01\x7f\xff"), nil, 0o600))
		do(os.WriteFile(p(strings.Repeat("x", 255)), []byte("long"), 0o600))
		do(os.WriteFile(p("suid"), []byte("x"), 0o600))
		do(os.Chown(p("suid"), 12345, 54321))
		do(os.Chmod(p("suid"), 0o755|fs.ModeSetuid|fs.ModeSetgid))
		do(os.Chmod(p("deep"), 0o1777|fs.ModeSticky))
		do(unix.Setxattr(p("one"), "user.empty", nil, 0))
		do(unix.Setxattr(p("deep"), "user.a=b%", []byte{0, 0xff, '\n', '='}, 0))
		do(unix.Setxattr(p("suid"), "trusted.of", []byte("root"), 0))
		f, err := os.Create(p("sparse"))
		do(err)
		do(f.Truncate(40 << 20))
		_, err = f.WriteAt([]byte("island"), 20<<20)
		do(err)
		do(f.Close())
		f, err = os.Create(p("small sparse"))
		do(err)
		do(f.Truncate(300_000))
		_, err = f.WriteAt([]byte("end"), 299_990)
		do(err)
		do(f.Close())
		old := time.Date(1969, 12, 31, 23, 59, 58, 250_000_000, time.UTC)
		do(os.Chtimes(p("one"), old, old))
		do(os.Chtimes(p("deep"), old, time.Date(2038, 2, 3, 4, 5, 6, 789, time.UTC)))
	}
}

// TestKilledAtEachWrite kills a small backup before each of its writes. The repository must be whole
// after each, hold the earlier snapshot and take the next backup.
func TestKilledAtEachWrite(t *testing.T) {
	source := testfixture.Unpack(t, "opencloud-posixfs")
	dir := filepath.Join(t.TempDir(), "repo")
	be := local.New(dir)
	newRepo(t, be)
	first := mustBackUp(t, open(t, be), source)
	for n := 1; ; n++ {
		// Something new each time, or there would be nothing to write.
		p := filepath.Join(source, "data", "idm", "new-"+strconv.Itoa(n))
		if err := os.WriteFile(p, bytes.Repeat([]byte(p), 100_000+n), 0o600); err != nil {
			t.Fatal(err)
		}
		killed := runChild(t, dir, source, strconv.Itoa(n), 0)
		clean(t, dir)
		rep := check(t, be)
		if want := 1 + btoi(!killed); len(rep.Snapshots) != want {
			t.Fatalf("killed before write %d: %d snapshots, want %d", n, len(rep.Snapshots), want)
		}
		if !killed {
			if n < 4 {
				t.Fatalf("a backup has only %d writes: the test tests nothing", n-1)
			}
			sameAs(t, open(t, be), "latest", source)
			break
		}
	}
	if first.SnapshotID.IsNull() {
		t.Fatal("no first snapshot")
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func check(t *testing.T, be backend.Backend) *verify.Report {
	t.Helper()
	r := open(t, be)
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	rep, err := verify.Run(t.Context(), r, verify.Options{ReadData: true})
	if err != nil {
		t.Fatal(err)
	}
	if len(rep.Errors) > 0 {
		t.Fatalf("check finds %q", rep.Errors)
	}
	return rep
}

// runChild makes a backup in a process of its own and reports whether it was killed.
func runChild(t *testing.T, dir, source, killAt string, after time.Duration) bool {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), envRepo+"="+dir, envSource+"="+source, envKillAt+"="+killAt, "XDG_STATE_HOME="+t.TempDir())
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if killAt == "" {
		timer := time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
		defer timer.Stop()
	}
	err = cmd.Wait()
	var ee *exec.ExitError
	if errors.As(err, &ee) && ee.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
		return true
	}
	if err != nil {
		t.Fatalf("child: %v\n%s", err, stderr.String())
	}
	return false
}

// TestKilledAtRandomPoints kills backups at 20 random moments.
func TestKilledAtRandomPoints(t *testing.T) {
	t.Parallel()
	source := testfixture.Unpack(t, "opencloud-posix")
	dir := filepath.Join(t.TempDir(), "repo")
	be := local.New(dir)
	newRepo(t, be)
	start := time.Now()
	if runChild(t, dir, source, "0", 0) {
		t.Fatal("killed although nobody did")
	}
	took := time.Since(start)
	rnd := rand.New(rand.NewPCG(5, 5))
	kills := 0
	for n := range 20 {
		p := filepath.Join(source, "data", "idm", "new-"+strconv.Itoa(n))
		noise := make([]byte, 3<<20)
		for i := range noise {
			noise[i] = byte(rnd.Uint32())
		}
		if err := os.WriteFile(p, noise, 0o600); err != nil {
			t.Fatal(err)
		}
		if runChild(t, dir, source, "", time.Duration(rnd.Int64N(int64(took)))) {
			kills++
		}
		clean(t, dir)
	}
	if kills < 5 {
		t.Errorf("only %d of 20 backups were hit", kills)
	}
	check(t, be)
	mustBackUp(t, open(t, be), source)
	sameAs(t, open(t, be), "latest", source)
}

// TestFaults breaks every operation that a backup needs on every kind of file in every way. A backup either says
// so and leaves no snapshot, or it is good; the earlier one is good in any case.
func TestFaults(t *testing.T) {
	t.Parallel()
	source := testfixture.Unpack(t, "opencloud-posixfs")
	dir := filepath.Join(t.TempDir(), "repo")
	plain := local.New(dir)
	newRepo(t, plain)
	mustBackUp(t, open(t, plain), source)
	n := 0
	for _, op := range []fault.Op{fault.Save, fault.Load, fault.List} {
		for _, typ := range []backend.FileType{backend.PackFile, backend.IndexFile, backend.SnapshotFile, backend.LockFile, backend.KeyFile, backend.ConfigFile} {
			for _, eff := range []fault.Effect{fault.Fail, fault.FailAfter, fault.Short, fault.Corrupt, fault.Hang} {
				n++
				if err := os.WriteFile(filepath.Join(source, "data", "idm", "new"), bytes.Repeat([]byte{byte(n), byte(n >> 8)}, 50_000+n), 0o600); err != nil {
					t.Fatal(err)
				}
				// Backends publish files whole or not at all, and a disk that lies about what it
				// stored is found by check --read-data alone.
				if op == fault.Save && (eff == fault.Corrupt || eff == fault.Short && typ != backend.PackFile) {
					continue
				}
				f := fault.Fault{Op: op, Type: typ, Effect: eff, Times: -1}
				t.Run(f.String(), func(t *testing.T) {
					before := snapshots(t, plain)
					broken := fault.New(plain, f)
					ctx := t.Context()
					if eff == fault.Hang {
						var cancel context.CancelFunc
						ctx, cancel = context.WithTimeout(ctx, time.Second)
						defer cancel()
					}
					var res *backup.Result
					r, err := repo.Open(ctx, broken, "pw", repo.Options{})
					if err == nil {
						res, err = backUp(ctx, r, source)
					}
					after := snapshots(t, plain)
					if err != nil && len(after) != len(before) && eff != fault.FailAfter {
						t.Errorf("it failed (%v) and left a snapshot", err)
					}
					if err == nil {
						if len(after) != len(before)+1 || !res.Manifest.Proof.Complete {
							t.Errorf("no error, %d snapshots after %d", len(after), len(before))
						}
					} else if len(err.Error()) < 10 {
						t.Errorf("an error that says nothing: %q", err)
					}
				})
				removeLocks(t, dir)
			}
		}
	}
	check(t, plain)
	clean(t, dir)
	mustBackUp(t, open(t, plain), source)
	sameAs(t, open(t, plain), "latest", source)
}

func snapshots(t *testing.T, be *local.Backend) (names []string) {
	t.Helper()
	if err := be.List(t.Context(), backend.SnapshotFile, func(fi backend.FileInfo) error {
		names = append(names, fi.Name)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return names
}

func removeLocks(t *testing.T, dir string) {
	t.Helper()
	locks, err := filepath.Glob(filepath.Join(dir, "locks", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range locks {
		if err := os.Remove(l); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTransientFaultsAreRetried: what a network does now and then must not end a backup.
func TestTransientFaultsAreRetried(t *testing.T) {
	source := testfixture.Unpack(t, "opencloud-posixfs")
	plain := local.New(filepath.Join(t.TempDir(), "repo"))
	newRepo(t, plain)
	broken := fault.New(plain,
		fault.Fault{Op: fault.Save, Type: backend.PackFile, N: 1, Times: 2},
		fault.Fault{Op: fault.Save, Type: backend.IndexFile, N: 1, Effect: fault.FailAfter},
		fault.Fault{Op: fault.Save, Type: backend.SnapshotFile, N: 1},
		fault.Fault{Op: fault.List, Type: backend.SnapshotFile, N: 1},
	)
	be := retry.New(broken, retry.Options{Sleep: func(context.Context, time.Duration) error { return nil }})
	r, err := repo.Open(t.Context(), be, "pw", repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	mustBackUp(t, r, source)
	sameAs(t, open(t, plain), "latest", source)
}

// TestDiskFull fills the disk of the repository in the middle of a backup.
func TestDiskFull(t *testing.T) {
	source := testfixture.Unpack(t, "opencloud-posixfs")
	mnt := smallDisk(t, 24)
	dir := filepath.Join(mnt, "repo")
	be := local.New(dir)
	newRepo(t, be)
	mustBackUp(t, open(t, be), source)
	noise := make([]byte, 60<<20)
	rnd := rand.NewChaCha8([32]byte{5})
	_, _ = rnd.Read(noise)
	big := filepath.Join(source, "data", "idm", "big")
	if err := os.WriteFile(big, noise, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := backUp(t.Context(), open(t, be), source)
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("a full disk gives %v", err)
	}
	if !strings.Contains(err.Error(), dir) {
		t.Errorf("the message does not say where: %v", err)
	}
	if rep := check(t, be); len(rep.Snapshots) != 1 {
		t.Errorf("%d snapshots", len(rep.Snapshots))
	}
	clean(t, dir)
	if err := os.Remove(big); err != nil {
		t.Fatal(err)
	}
	sameNames(t, open(t, be), source)
}

// sameNames restores the latest snapshot and compares all but the folder that was touched.
func sameNames(t *testing.T, r *repo.Repository, source string) {
	t.Helper()
	ctx := t.Context()
	if err := r.LoadIndex(ctx); err != nil {
		t.Fatal(err)
	}
	list, err := snapshot.List(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	dst := t.TempDir()
	p, err := restore.MakePlan(ctx, r, list[0], restore.Options{BasePath: filepath.Join(dst, "d"), ConfigDir: filepath.Join(dst, "c")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := restore.Run(ctx, r, p); err != nil {
		t.Fatal(err)
	}
	diff, err := testfixture.Diff(filepath.Join(source, "data"), filepath.Join(dst, "d"))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range diff {
		if !strings.HasPrefix(line, `"idm":`) {
			t.Error(line)
		}
	}
}

// smallDisk mounts a file system of size MiB on a loop device.
func smallDisk(t *testing.T, size int) string {
	t.Helper()
	dir := t.TempDir()
	img, mnt := filepath.Join(dir, "img"), filepath.Join(dir, "mnt")
	for _, cmd := range [][]string{
		{"truncate", "-s", strconv.Itoa(size) + "M", img},
		{"mkfs.ext4", "-q", "-m", "0", "-N", "2000", img},
		{"mkdir", mnt},
		{"mount", "-o", "loop", img, mnt},
	} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd, err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", mnt).CombinedOutput(); err != nil {
			t.Errorf("umount: %v\n%s", err, out)
		}
	})
	return mnt
}
