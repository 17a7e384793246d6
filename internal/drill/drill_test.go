package drill_test

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/backup"
	"github.com/holdfast-backup/holdfast/internal/cloud/cloudtest"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/drill"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/s3/s3test"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// This program is also the jail, and in it the server: a stand-in that serves what was restored.
func TestMain(m *testing.M) {
	drill.MaybeJail()
	if len(os.Args) > 1 && strings.HasSuffix(os.Args[0], "/program/server") {
		if err := server(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func server(args []string) error {
	switch args[0] {
	case "auth-app":
		for _, a := range args {
			if name, ok := strings.CutPrefix(a, "--user-name="); ok {
				fmt.Printf("App token created for %s\n token: %s\n", name, cloudtest.Token(name))
			}
		}
		return nil
	case "server":
	default:
		return fmt.Errorf("unknown command %q", args[0])
	}
	if err := inJail(); err != nil {
		return err
	}
	data := os.Getenv("OC_BASE_DATA_PATH")
	if _, err := os.Stat(filepath.Join(data, "refuse")); err == nil {
		return errors.New("this server refuses to start")
	}
	prefix, ok := map[string]string{"decomposed": "user.oc.", "ocis": "user.ocis."}[os.Getenv("STORAGE_USERS_DRIVER")]
	if !ok {
		return fmt.Errorf("driver %q", os.Getenv("STORAGE_USERS_DRIVER"))
	}
	s, err := cloudtest.LoadStore(os.Getenv("STORAGE_USERS_DECOMPOSED_ROOT"), prefix)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", os.Getenv("PROXY_HTTP_ADDR"))
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(data, "lie")); err == nil {
		s.Write(s.Find("alan"), "not in the snapshot", "x", time.Now())
	}
	return s.ServeTLS(l)
}

// inJail makes sure of the walls, from inside.
func inJail() error {
	if os.Getuid() == 0 {
		return errors.New("the server runs as root")
	}
	ifs, err := net.Interfaces()
	if err != nil || len(ifs) != 1 || ifs[0].Flags&net.FlagLoopback == 0 {
		return fmt.Errorf("there is more than a loopback: %v, %v", ifs, err)
	}
	if err := os.WriteFile("/tmp/holdfast-drill-was-here", nil, 0o644); !errors.Is(err, unix.EROFS) {
		return fmt.Errorf("the machine's files can be written: %v", err)
	}
	if err := os.WriteFile(filepath.Join(os.Getenv("TMPDIR"), "x"), nil, 0o644); err != nil {
		return err
	}
	for _, kv := range os.Environ() {
		if strings.Contains(kv, "SECRET_OF_THE_TEST") {
			return errors.New("the environment came in")
		}
	}
	original, err := os.ReadFile(filepath.Join(os.Getenv("OC_BASE_DATA_PATH"), originalFile))
	if err != nil {
		return err
	}
	// It may be gone: the repository outlives it.
	if list, err := os.ReadDir(string(original)); err != nil && !errors.Is(err, fs.ErrNotExist) || len(list) > 0 {
		return fmt.Errorf("the original is seen: %v, %v", list, err)
	}
	return nil
}

// originalFile holds the path where the instance lay.
const originalFile = "original"

// setup backs up a fixture after change.
func setup(t *testing.T, change func(data string)) (*repo.Repository, []*snapshot.Snapshot) {
	t.Helper()
	return backUp(t, testfixture.Unpack(t, testfixture.OpenCloud), nil, change)
}

func backUp(t *testing.T, dir string, env []string, change func(data string)) (*repo.Repository, []*snapshot.Snapshot) {
	t.Helper()
	t.Setenv("SECRET_OF_THE_TEST", "1")
	ctx := t.Context()
	data := filepath.Join(dir, "data")
	write(t, filepath.Join(data, originalFile), data)
	// So that only the jail keeps the server from the original.
	for _, d := range []string{filepath.Dir(filepath.Dir(dir)), filepath.Dir(dir), dir, data} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if change != nil {
		change(data)
	}
	be := mem.New()
	r, err := repo.Init(ctx, be, "pw", repo.InitOptions{KDF: repo.KDF{N: 1024, R: 8, P: 1}})
	if err != nil {
		t.Fatal(err)
	}
	lock, ctx, err := r.Lock(ctx, repo.LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	if err := r.LoadIndex(ctx); err != nil {
		t.Fatal(err)
	}
	inst, err := discover.Discover(ctx, discover.Options{BaseDataPath: data, ConfigDir: filepath.Join(dir, "config"), NoSizes: true, Environ: env})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := backup.Run(ctx, backup.Options{Instance: inst, Repo: r, Freezer: freeze.None{}, Hostname: "test", Version: "test"}); err != nil {
		t.Fatal(err)
	}
	list, err := snapshot.List(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	return r, list
}

// plain is setup without a change, made once: the repository is in memory.
func plain(t *testing.T) (*repo.Repository, []*snapshot.Snapshot) {
	t.Helper()
	if shared.repo == nil {
		shared.repo, shared.list = setup(t, nil)
	}
	return shared.repo, shared.list
}

var shared struct {
	repo *repo.Repository
	list []*snapshot.Snapshot
}

func write(t *testing.T, file, data string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
}

// self is this program under another name, to be the server.
func self(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

func run(t *testing.T, r *repo.Repository, list []*snapshot.Snapshot, o drill.Options) *drill.Report {
	t.Helper()
	if o.Scratch == "" {
		o.Scratch = t.TempDir()
	}
	rep, err := drill.Run(t.Context(), r, list, list[len(list)-1], o)
	if err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(o.Scratch); err != nil || len(left) > 0 {
		t.Errorf("%v is left, %v", left, err)
	}
	return rep
}

func TestDrill(t *testing.T) {
	r, list := plain(t)
	rep := run(t, r, list, drill.Options{Program: self(t)})
	if !rep.Passed || rep.Tested != "server" || rep.Server.NotRun != "" || !rep.Complete || rep.Consistency.Damage != 0 || rep.Restore.Bytes == 0 || rep.Newest == nil {
		t.Errorf("%+v", rep)
	}
	asked, files, versions, trash, read := 0, int64(0), int64(0), int64(0), int64(0)
	for _, s := range rep.Server.Spaces {
		if s.NotAsked == "" {
			asked++
		} else if !strings.Contains(s.Alias, "disabled") {
			t.Errorf("%s: %s", s.Alias, s.NotAsked)
		}
		files, versions, trash, read = files+s.Files, versions+s.Versions, trash+s.Trash, read+s.Read
		for _, d := range s.Differences {
			t.Errorf("%s: %s", s.Alias, d)
		}
	}
	if asked != 10 || files != 6*21+4*3 || versions != 6*7 || trash != 6*3 || read == 0 {
		t.Errorf("%d spaces, %d files, %d versions, %d in the trash, %d read", asked, files, versions, trash, read)
	}
	// A sample.
	rep = run(t, r, list, drill.Options{Program: self(t), Spaces: 1})
	if len(rep.Server.Spaces) != 1 || !rep.Passed {
		t.Errorf("%+v", rep.Server)
	}
	// Without a server.
	rep = run(t, r, list, drill.Options{})
	if !rep.Passed || rep.Tested != "consistency" || !strings.Contains(rep.Server.NotRun, "no program") {
		t.Errorf("%+v", rep)
	}
	if _, err := drill.Run(t.Context(), r, list, list[0], drill.Options{Scratch: t.TempDir(), Program: "/nonexistent"}); err == nil {
		t.Error("a program that is not there was taken")
	}
}

// TestBucket: what is in a bucket becomes files, for the server as well, and no bucket is touched.
func TestBucket(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{})
	name := srv.Bucket(t, false, false)
	dir := testfixture.Unpack(t, testfixture.OCISWithS3Blobs)
	if err := os.CopyFS(filepath.Join(srv.Dir, name), os.DirFS(filepath.Join(dir, "bucket"))); err != nil {
		t.Fatal(err)
	}
	r, list := backUp(t, dir, []string{
		"STORAGE_USERS_DRIVER=s3ng", "STORAGE_USERS_DECOMPOSEDS3_ENDPOINT=" + srv.Endpoint, "STORAGE_USERS_DECOMPOSEDS3_REGION=" + srv.Region,
		"STORAGE_USERS_DECOMPOSEDS3_BUCKET=" + name, "STORAGE_USERS_DECOMPOSEDS3_ACCESS_KEY=" + srv.AccessKey, "STORAGE_USERS_DECOMPOSEDS3_SECRET_KEY=" + srv.SecretKey,
	}, nil)
	srv.Stop()
	rep := run(t, r, list, drill.Options{Program: self(t), Spaces: 3})
	if !rep.Passed || rep.Tested != "server" || rep.Consistency.Damage != 0 || len(rep.Consistency.Limits) > 0 {
		t.Errorf("%+v %+v", rep, rep.Consistency.Summary)
	}
}

// TestWrong: what is wrong is found.
func TestWrong(t *testing.T) {
	t.Run("the server serves something else", func(t *testing.T) {
		r, list := setup(t, func(data string) { write(t, filepath.Join(data, "lie"), "") })
		rep := run(t, r, list, drill.Options{Program: self(t)})
		if rep.Passed || rep.Server.Differences != 1 || rep.Tested != "server" {
			t.Errorf("%+v", rep.Server)
		}
		for _, s := range rep.Server.Spaces {
			if s.Alias == "personal/alan" && (len(s.Differences) != 1 || !strings.Contains(s.Differences[0], "the snapshot does not")) {
				t.Errorf("%q", s.Differences)
			}
		}
	})
	t.Run("the server does not start", func(t *testing.T) {
		r, list := setup(t, func(data string) { write(t, filepath.Join(data, "refuse"), "") })
		rep := run(t, r, list, drill.Options{Program: self(t), StartTimeout: 5 * time.Second})
		if rep.Passed || rep.Tested != "consistency" || !strings.Contains(rep.Server.NotRun, "this server refuses to start") {
			t.Errorf("%+v", rep.Server)
		}
	})
	t.Run("the store is damaged", func(t *testing.T) {
		r, list := setup(t, func(data string) {
			blobs, err := filepath.Glob(filepath.Join(data, "storage/users/spaces/*/*/blobs/*/*/*/*/*"))
			if err != nil || len(blobs) == 0 {
				t.Fatal(blobs, err)
			}
			if err := os.Remove(blobs[0]); err != nil {
				t.Fatal(err)
			}
		})
		rep := run(t, r, list, drill.Options{NoServer: true})
		if rep.Passed || rep.Complete || rep.Missing != 1 || rep.Consistency.Damage != 1 || len(rep.Consistency.Findings) != 1 || rep.Newest != nil {
			t.Errorf("%+v", rep)
		}
	})
}

// TestLeftovers: the next drill removes what a killed one left, and nothing that one at work uses.
func TestLeftovers(t *testing.T) {
	r, list := plain(t)
	scratch := t.TempDir()
	mk := func(name string, lock bool) *os.File {
		dir := filepath.Join(scratch, name)
		if err := os.MkdirAll(filepath.Join(dir, "data/x"), 0o755); err != nil {
			t.Fatal(err)
		}
		if !lock {
			return nil
		}
		f, err := os.Create(filepath.Join(dir, ".holdfast-drill.lock"))
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	mk("holdfast-drill-killed", true).Close()
	mk("holdfast-drill-foreign", false)
	busy := mk("holdfast-drill-busy", true)
	defer busy.Close()
	if err := unix.Flock(int(busy.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if _, err := drill.Run(t.Context(), r, list, list[0], drill.Options{Scratch: scratch, NoServer: true}); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(scratch, "*"))
	if err != nil || len(left) != 2 || strings.Contains(fmt.Sprint(left), "killed") {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestCancel stops a drill while the server starts; nothing may be left.
func TestCancel(t *testing.T) {
	r, list := plain(t)
	scratch := t.TempDir()
	why := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	o := drill.Options{Scratch: scratch, Program: self(t), Progress: func(e progress.Event) {
		if e.Phase == "drill" && e.Kind == progress.Update && e.Done == 1 {
			cancel(why)
		}
	}}
	if rep, err := drill.Run(ctx, r, list, list[0], o); !errors.Is(err, why) || rep.Passed {
		t.Errorf("got %v, %+v", err, rep)
	}
	if left, err := os.ReadDir(scratch); err != nil || len(left) > 0 {
		t.Errorf("%v is left, %v", left, err)
	}
}

func TestSign(t *testing.T) {
	dir := t.TempDir()
	key, err := drill.LoadKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	again, err := drill.LoadKey(dir)
	if err != nil || !key.Equal(again) {
		t.Errorf("another key the second time: %v", err)
	}
	if st, err := os.Stat(filepath.Join(dir, "report.key")); err != nil || st.Mode().Perm() != 0o600 {
		t.Error(st.Mode(), err)
	}
	rep := &drill.Report{Snapshot: "abc", Passed: false}
	p, err := drill.Sign(rep, key)
	if err != nil {
		t.Fatal(err)
	}
	pub := key.Public().(ed25519.PublicKey)
	if got, err := drill.Verify(p, pub); err != nil || got.Snapshot != "abc" {
		t.Error(got, err)
	}
	forged := []byte(strings.Replace(string(p), `"passed":false`, `"passed":true`, 1))
	if _, err := drill.Verify(forged, pub); !errors.Is(err, drill.ErrForged) {
		t.Errorf("forged: %v", err)
	}
	// Somebody else signs what they have changed.
	_, other, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	p, err = drill.Sign(&drill.Report{Passed: true}, other)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := drill.Verify(p, pub); !errors.Is(err, drill.ErrOtherKey) {
		t.Errorf("another key: %v", err)
	}
	for _, bad := range []string{"", "{}", "null", `{"report":{}}`, `{"report":1}`} {
		if _, err := drill.Verify([]byte(bad), pub); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	write(t, filepath.Join(dir, "report.key"), "nonsense")
	if _, err := drill.LoadKey(dir); err == nil {
		t.Error("a damaged key was taken")
	}
}
