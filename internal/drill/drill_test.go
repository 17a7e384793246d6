package drill_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/backup"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/drill"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/freeze/freezetest"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/s3/s3test"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// This program is also the jail, and drills of another user.
func TestMain(m *testing.M) {
	// The race detector would have each of its processes wait for a second at the end.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		panic(err)
	}
	drill.MaybeJail()
	if dirs := os.Getenv(unprivileged); dirs != "" {
		if err := drillAsOther(strings.Cut(dirs, ":")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	code := m.Run()
	if err := errors.Join(freezetest.StopEngine(), os.RemoveAll(build.dir), os.RemoveAll(shared.dir)); err != nil {
		fmt.Fprintln(os.Stderr, "after the tests:", err)
		code = 1
	}
	os.Exit(code)
}

var build struct {
	once sync.Once
	dir  string
	err  error
}

// server builds the stand-in for the server, once, and returns its path. It needs no libraries.
func server(t *testing.T) string {
	t.Helper()
	build.once.Do(func() {
		if build.dir, build.err = os.MkdirTemp("", "holdfast-drilltest-"); build.err != nil {
			return
		}
		cmd := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(build.dir, "opencloud"), "./drilltest/cmd/opencloud")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			build.err = fmt.Errorf("go build: %w: %s", err, out)
			return
		}
		build.err = os.Chmod(build.dir, 0o755)
	})
	if build.err != nil {
		t.Fatal(build.err)
	}
	return filepath.Join(build.dir, "opencloud")
}

// told is a server that behaves in some way: see its source.
func told(t *testing.T, behaviour string) string {
	t.Helper()
	data, err := os.ReadFile(server(t))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "opencloud")
	if err := os.WriteFile(file, append(data, "behaviour:"+behaviour...), 0o755); err != nil {
		t.Fatal(err)
	}
	return file
}

// originalFile holds the path where the instance lay.
const originalFile = "original"

// setup backs up a fixture after change, with variables that configure it from outside.
func setup(t *testing.T, be backend.Backend, change func(data string)) (*repo.Repository, []*snapshot.Snapshot) {
	t.Helper()
	return backUp(t, be, testfixture.Unpack(t, testfixture.OpenCloud), []string{
		"OC_JWT_SECRET=a 'secret'\\", "OC_EVENTS_ENDPOINT=nats.example:4222", "NOTIFICATIONS_SMTP_HOST=mail.example", "OC_OIDC_ISSUER=https://id.example", "HOME=/nowhere",
	}, change)
}

func backUp(t *testing.T, be backend.Backend, dir string, env []string, change func(data string), options ...func(*backup.Options)) (*repo.Repository, []*snapshot.Snapshot) {
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
	o := backup.Options{Instance: inst, Repo: r, Freezer: freeze.None{}, Hostname: "test", Version: "test"}
	for _, set := range options {
		set(&o)
	}
	if _, err := backup.Run(ctx, o); err != nil {
		t.Fatal(err)
	}
	list, err := snapshot.List(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	return r, list
}

// plain is setup without a change, made once, in a directory that everybody can read.
func plain(t *testing.T) (*repo.Repository, []*snapshot.Snapshot) {
	t.Helper()
	if shared.repo == nil {
		dir, err := os.MkdirTemp("", "holdfast-drilltest-")
		if err != nil {
			t.Fatal(err)
		}
		shared.dir = dir
		r, list := setup(t, local.New(filepath.Join(dir, "repo")), nil)
		err = filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error { return errors.Join(err, os.Chmod(p, 0o755)) })
		if err != nil {
			t.Fatal(err)
		}
		shared.repo, shared.list = r, list
	}
	return shared.repo, shared.list
}

var shared struct {
	dir  string
	repo *repo.Repository
	list []*snapshot.Snapshot
}

func write(t *testing.T, file, data string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
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
	rep := run(t, r, list, drill.Options{Program: server(t)})
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
	if v := rep.Server.Variables; v == nil || v.Used != 1 || !slices.Equal(v.LeftOut, []string{"NOTIFICATIONS_SMTP_HOST", "OC_EVENTS_ENDPOINT", "OC_OIDC_ISSUER"}) {
		t.Errorf("variables %+v", v)
	}
	if _, err := drill.Run(t.Context(), r, list, list[0], drill.Options{Scratch: t.TempDir(), Program: "/nonexistent"}); err == nil {
		t.Error("a program that is not there was taken")
	}
}

// TestContainer: an image as the server. The engine is the test's own, and has nothing but what the test imports.
func TestContainer(t *testing.T) {
	e := freezetest.TheEngine(t)
	const image = "opencloudeu/opencloud:test"
	e.ImportProgram(t, image, "opencloud", server(t))
	r, list := plain(t)
	rep := run(t, r, list, drill.Options{Image: image, Docker: e.Client, Spaces: 2})
	if !rep.Passed || rep.Tested != "server" || rep.Server.NotRun != "" || rep.Server.Program != "image "+image || len(rep.Server.Spaces) != 2 {
		t.Errorf("%+v", rep.Server)
	}
	if left, err := e.Client.List(t.Context(), "holdfast.drill"); err != nil || len(left) > 0 {
		t.Errorf("containers %v are left, %v", left, err)
	}
	// One that does not start, and what a killed drill left.
	old, err := e.Client.Create(t.Context(), map[string]any{
		"Image": image, "Entrypoint": []string{"opencloud"}, "Labels": map[string]string{"holdfast.drill": filepath.Join(t.TempDir(), "gone")},
		"HostConfig": map[string]string{"NetworkMode": "none"},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Remove(old) })
	const refuses = "opencloudeu/opencloud:refuses"
	e.ImportProgram(t, refuses, "opencloud", told(t, "refuse"))
	rep = run(t, r, list, drill.Options{Image: refuses, Docker: e.Client})
	if rep.Passed || rep.Tested != "consistency" || !strings.Contains(rep.Server.NotRun, "this server refuses to start") {
		t.Errorf("%+v", rep.Server)
	}
	if left, err := e.Client.List(t.Context(), "holdfast.drill"); err != nil || len(left) > 0 {
		t.Errorf("containers %v are left, %v", left, err)
	}
	for image, want := range map[string]string{"nobody/has:it": "is not on this machine", drill.SnapshotImage: "neither holds nor names an image"} {
		_, err := drill.Run(t.Context(), r, list, list[0], drill.Options{Scratch: t.TempDir(), Image: image, Docker: e.Client})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", image, err)
		}
	}
}

// unprivileged is the variable by which this program is told to drill as it is started: it names a directory
// of its own, and that of the repository.
const unprivileged = "HOLDFAST_TEST_DRILL"

// TestUnprivileged: somebody who is not root drills, in namespaces of their own.
func TestUnprivileged(t *testing.T) {
	const nobody = 65534
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	plain(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for to, from := range map[string]string{"drill.test": exe, "opencloud": server(t)} {
		data, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, to), data, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	err = errors.Join(os.Mkdir(filepath.Join(dir, "scratch"), 0o755), filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Chown(p, nobody, nobody))
	}))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(dir, "drill.test"))
	cmd.Dir = dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "GORACE=" + os.Getenv("GORACE"), unprivileged + "=" + dir + ":" + shared.dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, &said)
	}
	var rep drill.Report
	if err := json.Unmarshal(out, &rep); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if !rep.Passed || rep.Tested != "server" || rep.Server.NotRun != "" || len(rep.Server.Spaces) != 2 {
		t.Errorf("%+v", rep)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "scratch")); err != nil || len(left) > 0 {
		t.Errorf("%v is left, %v", left, err)
	}
}

func drillAsOther(dir, repository string, _ bool) error {
	ctx := context.Background()
	r, err := repo.Open(ctx, local.New(filepath.Join(repository, "repo")), "pw", repo.Options{})
	if err != nil {
		return err
	}
	if err := r.LoadIndex(ctx); err != nil {
		return err
	}
	list, err := snapshot.List(ctx, r)
	if err != nil {
		return err
	}
	rep, err := drill.Run(ctx, r, list, list[0], drill.Options{Scratch: filepath.Join(dir, "scratch"), Program: filepath.Join(dir, "opencloud"), Spaces: 2})
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(rep)
}

// TestBucket: what is in a bucket becomes files, for the server as well, and no bucket is touched. The
// server is the image that the snapshot holds, which the engine has only for the time of the drill.
func TestBucket(t *testing.T) {
	e := freezetest.TheEngine(t)
	const image = "opencloudeu/opencloud:saved"
	e.ImportProgram(t, image, "opencloud", server(t))
	t.Setenv("DOCKER_HOST", "unix://"+e.Socket)
	srv := s3test.Start(t, s3test.Options{})
	name := srv.Bucket(t, false, false)
	dir := testfixture.Unpack(t, testfixture.OCISWithS3Blobs)
	if err := os.CopyFS(filepath.Join(srv.Dir, name), os.DirFS(filepath.Join(dir, "bucket"))); err != nil {
		t.Fatal(err)
	}
	r, list := backUp(t, mem.New(), dir, []string{
		"STORAGE_USERS_DRIVER=s3ng", "STORAGE_USERS_DECOMPOSEDS3_ENDPOINT=" + srv.Endpoint, "STORAGE_USERS_DECOMPOSEDS3_REGION=" + srv.Region,
		"STORAGE_USERS_DECOMPOSEDS3_BUCKET=" + name, "STORAGE_USERS_DECOMPOSEDS3_ACCESS_KEY=" + srv.AccessKey, "STORAGE_USERS_DECOMPOSEDS3_SECRET_KEY=" + srv.SecretKey,
	}, nil, func(o *backup.Options) { o.Instance.Software.Image, o.SaveImage = image, true })
	srv.Stop()
	e.RemoveImage(t, image)
	rep := run(t, r, list, drill.Options{Image: drill.SnapshotImage, Spaces: 3})
	if id := e.ImageID(image); id != "" {
		t.Errorf("the image %s is left", id)
	}
	if !rep.Passed || rep.Server.Program != "image "+image || rep.Tested != "server" || rep.Consistency.Damage != 0 || len(rep.Consistency.Limits) > 0 {
		t.Errorf("%+v %+v", rep, rep.Consistency.Summary)
	}
}

// TestWrong: what is wrong is found.
func TestWrong(t *testing.T) {
	t.Run("the server serves something else", func(t *testing.T) {
		r, list := plain(t)
		rep := run(t, r, list, drill.Options{Program: told(t, "lie")})
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
		r, list := plain(t)
		rep := run(t, r, list, drill.Options{Program: told(t, "refuse")})
		if rep.Passed || rep.Tested != "consistency" || !strings.Contains(rep.Server.NotRun, "this server refuses to start") {
			t.Errorf("%+v", rep.Server)
		}
	})
	t.Run("the store is damaged", func(t *testing.T) {
		r, list := setup(t, mem.New(), func(data string) {
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
	// It has no server either.
	rep, err := drill.Run(t.Context(), r, list, list[0], drill.Options{Scratch: scratch})
	if err != nil {
		t.Fatal(err)
	}
	if !rep.Passed || rep.Tested != "consistency" || !strings.Contains(rep.Server.NotRun, "no program") {
		t.Errorf("%+v", rep)
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
	o := drill.Options{Scratch: scratch, Program: server(t), Progress: func(e progress.Event) {
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
