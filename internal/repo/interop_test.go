package repo

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/local"
)

// interopKDF is cheap, and stock restic accepts it.
var interopKDF = KDF{N: 1024, R: 8, P: 1}

// restic runs stock restic on the repository in dir and returns what it prints.
func restic(t *testing.T, dir, pw string, args ...string) (string, error) {
	t.Helper()
	exe, err := exec.LookPath("restic")
	if err != nil {
		t.Fatalf("these tests need stock restic: %v", err)
	}
	cmd := exec.Command(exe, append([]string{"--no-cache", "--repo", dir}, args...)...)
	cmd.Env = append(os.Environ(), "RESTIC_PASSWORD="+pw, "RESTIC_REPOSITORY=", "RESTIC_PASSWORD_FILE=")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func mustRestic(t *testing.T, dir string, args ...string) string {
	t.Helper()
	out, err := restic(t, dir, password, args...)
	if err != nil {
		t.Fatalf("restic %v: %v\n%s", args, err, out)
	}
	return out
}

// sourceTree makes a folder with files of several kinds.
func sourceTree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, data := range map[string][]byte{
		"empty": nil, "small.txt": []byte("hello world\n"), "sub/text": text(1, 900_000), "sub/deep/noise": noise(2, 3_000_000),
		"zeros": make([]byte, 2_000_000), "sub/ünï \xff name": []byte("odd"),
	} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestResticWritesWeRead(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	src := sourceTree(t)
	for _, version := range []string{"1", "2"} {
		t.Run("version "+version, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "repo")
			mustRestic(t, dir, "init", "--repository-version", version)
			mustRestic(t, dir, "backup", "--tag", "one", src)
			be := local.New(dir)
			if _, err := Open(ctx, be, "wrong", Options{}); !errors.Is(err, ErrWrongPassword) {
				t.Errorf("wrong password: %v", err)
			}
			r := openRepo(t, be)
			if fmt.Sprint(r.Version()) != version {
				t.Errorf("version %d", r.Version())
			}
			trees, plain := 0, int64(0)
			var data []ID
			r.EachBlob(func(bt BlobType, d, _ ID, size, _ int64) {
				if bt == DataBlob {
					data = append(data, d)
					plain += size
					return
				}
				trees++
				tree, err := r.LoadBlob(ctx, bt, d, nil)
				if err != nil || !json.Valid(tree) {
					t.Errorf("tree %v: %v", d, err)
				}
			})
			loaded := int64(0)
			sizes := make(chan int64, len(data))
			if err := r.LoadBlobs(ctx, DataBlob, data, func(_ ID, p []byte) error { sizes <- int64(len(p)); return nil }); err != nil {
				t.Error(err)
			}
			for range data {
				loaded += <-sizes
			}
			if trees < 3 || loaded != plain || plain < 3_900_000 {
				t.Errorf("%d trees, %d of %d bytes", trees, loaded, plain)
			}
			checkClean(t, be)
			snap, err := r.FindFile(ctx, backend.SnapshotFile, mustSnapshots(t, dir)[0].ID[:10])
			if err != nil {
				t.Fatal(err)
			}
			body, err := r.LoadUnpacked(ctx, backend.SnapshotFile, snap)
			if err != nil || !strings.Contains(string(body), `"tags":["one"]`) {
				t.Errorf("snapshot %s, %v", body, err)
			}

			// We write into it, restic goes on.
			writeSnapshot(t, r)
			out := mustRestic(t, dir, "check", "--read-data")
			if !strings.Contains(out, "no errors were found") {
				t.Errorf("check:\n%s", out)
			}
			if version == "1" {
				r.EachBlob(func(_ BlobType, d, _ ID, plain, stored int64) {
					if stored != plain+32 {
						t.Errorf("blob %v is compressed", d)
					}
				})
			}
		})
	}
}

type resticSnapshot struct {
	ID, Hostname string
	Tags         []string
}

func mustSnapshots(t *testing.T, dir string) (list []resticSnapshot) {
	t.Helper()
	if err := json.Unmarshal([]byte(mustRestic(t, dir, "snapshots", "--json")), &list); err != nil {
		t.Fatal(err)
	}
	return list
}

var ourFiles = map[string][]byte{"a.txt": text(50, 2_500_000), "b.bin": noise(51, 1_200_000), "c": []byte("c")}

// writeSnapshot stores ourFiles in pieces, a tree and a snapshot.
func writeSnapshot(t *testing.T, r *Repository) ID {
	t.Helper()
	l, ctx, err := r.Lock(context.Background(), LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Unlock()
	if err := r.LoadIndex(ctx); err != nil {
		t.Fatal(err)
	}
	w := r.NewWriter(ctx)
	const when = "2026-01-02T03:04:05.5Z"
	var nodes []string
	for _, name := range []string{"a.txt", "b.bin", "c"} {
		data := ourFiles[name]
		var content []string
		for rest := data; len(rest) > 0; {
			n := min(len(rest), 700_001)
			d, _ := save(t, w, DataBlob, rest[:n])
			content = append(content, `"`+d.String()+`"`)
			rest = rest[n:]
		}
		nodes = append(nodes, fmt.Sprintf(`{"name":%q,"type":"file","mode":420,"mtime":"%s","atime":"%s","ctime":"%s","uid":0,"gid":0,"size":%d,"content":[%s]}`,
			name, when, when, when, len(data), strings.Join(content, ",")))
	}
	root, _ := save(t, w, TreeBlob, []byte(`{"nodes":[`+strings.Join(nodes, ",")+"]}\n"))
	if err := w.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	snap, err := r.SaveUnpacked(ctx, backend.SnapshotFile, []byte(fmt.Sprintf(`{"time":"%s","tree":"%s","paths":["/ours"],"hostname":"ours","username":"me","tags":["holdfast"]}`, when, root)))
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

func TestWeWriteResticReads(t *testing.T) {
	t.Parallel()
	for _, o := range []InitOptions{{Version: 1}, {Version: 2}, {Options: Options{Compression: CompressionOff, PackSize: 1}}} {
		t.Run(fmt.Sprintf("version %d %v", o.Version, o.Compression), func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "repo")
			be := local.New(dir)
			o.KDF = interopKDF
			r := initRepo(t, be, o)
			snap := writeSnapshot(t, r)
			clean := func() {
				t.Helper()
				if out := mustRestic(t, dir, "check", "--read-data"); !strings.Contains(out, "no errors were found") {
					t.Errorf("check:\n%s", out)
				}
				checkClean(t, be)
			}
			clean()
			list := mustSnapshots(t, dir)
			if len(list) != 1 || list[0].ID != snap.String() || list[0].Hostname != "ours" {
				t.Errorf("snapshots %+v", list)
			}
			restored := func() {
				t.Helper()
				target := t.TempDir()
				mustRestic(t, dir, "restore", snap.String(), "--target", target)
				for name, want := range ourFiles {
					if got, err := os.ReadFile(filepath.Join(target, name)); err != nil || !bytes.Equal(got, want) {
						t.Errorf("%s: %d bytes, %v", name, len(got), err)
					}
				}
			}
			restored()
			src := sourceTree(t)
			mustRestic(t, dir, "backup", src)
			clean()
			// Something to prune: restic's snapshot goes, and what it alone needs.
			for _, s := range mustSnapshots(t, dir) {
				if s.ID != snap.String() {
					mustRestic(t, dir, "forget", s.ID)
				}
			}
			mustRestic(t, dir, "prune", "--max-unused", "0")
			clean()
			restored()
			r2 := openRepo(t, be)
			if err := r2.LoadBlobs(context.Background(), DataBlob, []ID{idOf([]byte("c"))}, func(ID, []byte) error { return nil }); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestPasswordsWithRestic(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "repo")
	be := local.New(dir)
	r := initRepo(t, be, InitOptions{KDF: interopKDF})
	second, err := r.AddKey(ctx, "second")
	if err != nil {
		t.Fatal(err)
	}
	pwFile := filepath.Join(t.TempDir(), "pw")
	if err := os.WriteFile(pwFile, []byte("third\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	mustRestic(t, dir, "key", "add", "--new-password-file", pwFile)
	for _, pw := range []string{password, "second", "third"} {
		if out, err := restic(t, dir, pw, "snapshots"); err != nil {
			t.Errorf("restic with %q: %v\n%s", pw, err, out)
		}
		if _, err := Open(ctx, be, pw, Options{}); err != nil {
			t.Errorf("%q: %v", pw, err)
		}
	}
	if _, err := restic(t, dir, "fourth", "snapshots"); err == nil {
		t.Error("restic opens with a wrong password")
	}
	keys, err := r.Keys(ctx)
	if err != nil || len(keys) != 3 {
		t.Errorf("%d keys, %v", len(keys), err)
	}
	if err := r.RemoveKey(ctx, second); err != nil {
		t.Error(err)
	}
	if out, err := restic(t, dir, "second", "snapshots"); err == nil {
		t.Errorf("restic opens with a removed password:\n%s", out)
	}
}

func TestLocksWithRestic(t *testing.T) {
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "repo")
	be := local.New(dir)
	r := initRepo(t, be, InitOptions{KDF: interopKDF})
	snap := writeSnapshot(t, r)

	// restic honours ours.
	for _, c := range []struct {
		exclusive bool
		args      []string
		ok        bool
	}{
		{true, []string{"check"}, false}, {true, []string{"forget", snap.String()}, false}, {true, []string{"snapshots"}, false},
		{false, []string{"snapshots"}, true}, {false, []string{"check"}, false}, {false, []string{"prune"}, false},
	} {
		l, _, err := r.Lock(ctx, LockOptions{Exclusive: c.exclusive})
		if err != nil {
			t.Fatal(err)
		}
		out, err := restic(t, dir, password, c.args...)
		if (err == nil) != c.ok || (!c.ok && !strings.Contains(out, "already locked")) {
			t.Errorf("exclusive %v: restic %v: %v\n%s", c.exclusive, c.args, err, out)
		}
		// We live, so restic's unlock leaves the lock alone and does not kill us with its signal.
		mustRestic(t, dir, "unlock")
		if n := lockNames(t, be); len(n) != 1 {
			t.Errorf("%d locks after restic unlock", len(n))
		}
		if err := l.Unlock(); err != nil {
			t.Error(err)
		}
	}
	mustRestic(t, dir, "check")

	// We honour restic's: a backup that waits for its input holds a shared lock.
	cmd := exec.Command("restic", "--no-cache", "--repo", dir, "backup", "--stdin")
	cmd.Env = append(os.Environ(), "RESTIC_PASSWORD="+password)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); len(lockNames(t, be)) == 0; time.Sleep(10 * time.Millisecond) {
		if time.Since(start) > 20*time.Second {
			t.Fatal("restic takes no lock")
		}
	}
	locks, err := r.Locks(ctx)
	if err != nil || len(locks) != 1 || locks[0].PID != cmd.Process.Pid || locks[0].Exclusive || locks[0].Stale {
		t.Errorf("locks %+v, %v", locks, err)
	}
	var le *LockedError
	if _, _, err := r.Lock(ctx, LockOptions{Exclusive: true}); !errors.As(err, &le) || le.Holder.PID != cmd.Process.Pid {
		t.Errorf("exclusive lock beside restic: %v", err)
	}
	l, _, err := r.Lock(ctx, LockOptions{})
	if err != nil {
		t.Errorf("shared lock beside restic: %v", err)
	} else if err := l.Unlock(); err != nil {
		t.Error(err)
	}
	// It dies without removing its lock, and is stale then.
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	in.Close()
	if n, err := r.Unlock(ctx, false); n != 1 || err != nil {
		t.Errorf("Unlock removed %d, %v", n, err)
	}
	mustRestic(t, dir, "check")
	if _, err := hex.DecodeString(r.ID()); err != nil {
		t.Error(err)
	}
}
