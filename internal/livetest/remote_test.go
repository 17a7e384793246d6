package livetest

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/backend/rest/resttest"
	bs3 "github.com/holdfast-backup/holdfast/internal/backend/s3"
	"github.com/holdfast-backup/holdfast/internal/backend/sftp/sftptest"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/s3/s3test"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// far runs the program with a repository on a server.
type far struct {
	*testing.T
	program, tmp string
	env          []string
}

func newFar(t *testing.T, env ...string) *far {
	f := &far{T: t, program: holdfast(t), tmp: t.TempDir()}
	empty := filepath.Join(f.tmp, "empty.yaml")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f.env = append([]string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + f.tmp, "TMPDIR=" + f.tmp, "GORACE=atexit_sleep_ms=0", "HOLDFAST_CONFIG_FILE=" + empty,
		"HOLDFAST_STATE_DIR=" + filepath.Join(f.tmp, "state"), "HOLDFAST_CACHE_DIR=" + filepath.Join(f.tmp, "cache"), "HOLDFAST_HOST=test",
	}, env...)
	return f
}

func (f *far) command(args ...string) (*exec.Cmd, *bytes.Buffer) {
	var out bytes.Buffer
	cmd := exec.Command(f.program, args...)
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = f.env, f.tmp, &out, &out
	return cmd, &out
}

func (f *far) must(args ...string) string {
	f.Helper()
	cmd, out := f.command(args...)
	if err := cmd.Run(); err != nil {
		f.Fatalf("holdfast %q: %v\n%s", args, err, out)
	}
	return out.String()
}

// initOn makes a repository whose key is quick to try.
func initOn(t *testing.T, be backend.Backend, password string) {
	t.Helper()
	if _, err := repo.Init(t.Context(), be, password, repo.InitOptions{KDF: repo.KDF{N: 1024, R: 1, P: 1}}); err != nil {
		t.Fatal(err)
	}
}

func initOnS3(t *testing.T, srv *s3test.Server, bucket, password string) {
	t.Helper()
	c, err := srv.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	initOn(t, bs3.New(bs3.Options{Client: c, Bucket: bucket}), password)
}

// TestKilledOverS3 kills the program at chosen requests to a repository on S3: before, in the middle of and
// after the server's part. The repository is whole after each, the earlier snapshot comes back, and the next
// backup uses the packs that were finished.
func TestKilledOverS3(t *testing.T) {
	t.Parallel()
	srv := s3test.Start(t, s3test.Options{})
	bucket := srv.Bucket(t, false, false)
	p := s3test.NewProxy(t, srv.Endpoint)
	f := newFar(t, append(srv.Env(), "HOLDFAST_PASSWORD="+password, "HOLDFAST_REPOSITORY=s3:"+p.URL+"/"+bucket)...)
	initOnS3(t, srv, bucket, password)
	pristine, source := testfixture.Unpack(t, testfixture.OpenCloudPosix), testfixture.Unpack(t, testfixture.OpenCloudPosix)
	backup := []string{"backup", "--base-data-path", filepath.Join(source, "data"), "--config-dir", filepath.Join(source, "config"), "--freeze", "none", "--pack-size", "4"}
	restic := func(args ...string) {
		t.Helper()
		cmd := exec.Command("restic", append([]string{"-r", "s3:" + srv.Endpoint + "/" + bucket, "--no-cache", "--no-lock"}, args...)...)
		cmd.Env = append(append(os.Environ(), "RESTIC_PASSWORD="+password), srv.Env()...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("restic %q: %v\n%s", args, err, out)
		}
	}
	stored := func() int64 {
		t.Helper()
		var n int64
		err := filepath.WalkDir(filepath.Join(srv.Dir, bucket, "data"), func(_ string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			fi, err := d.Info()
			if err == nil {
				n += fi.Size()
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	first := strings.Fields(f.must(backup...))
	if len(first) < 2 {
		t.Fatalf("what a backup prints: %q", first)
	}
	f.must("snapshots")
	ids, err := os.ReadDir(filepath.Join(srv.Dir, bucket, "snapshots"))
	if err != nil || len(ids) != 1 {
		t.Fatal(ids, err)
	}
	const fresh = 13 << 20 // bytes that each run has to store: three packs, and what is left
	for i, m := range []struct {
		kind   string
		nth    int
		effect s3test.Effect
		has    int64 // bytes that are stored at least when it dies
	}{
		{"data", 1, s3test.CutUp, 0},
		{"data", 3, s3test.CutAfter, 4 << 20},
		{"index", 1, s3test.Cut, fresh},
		{"index", 1, s3test.CutAfter, fresh},
		{"snapshots", 1, s3test.CutUp, fresh},
		{"locks", 1, s3test.CutAfter, 0},
	} {
		what := fmt.Sprintf("killed at file %d of %s, %s", m.nth, m.kind, m.effect)
		noise := make([]byte, fresh)
		_, _ = rand.NewChaCha8([32]byte{byte(i), 41}).Read(noise)
		if err := os.WriteFile(filepath.Join(source, "data", "idm", "new"), noise, 0o600); err != nil {
			t.Fatal(err)
		}
		before := stored()
		cmd, out := f.command(backup...)
		started, ended := make(chan struct{}), make(chan struct{})
		puts := 0
		p.Judge(func(_ int, r *http.Request) s3test.Fault {
			if _, key := s3test.Object(r); r.Method != http.MethodPut || !strings.HasPrefix(key, m.kind+"/") {
				return s3test.Fault{}
			}
			if puts++; puts != m.nth {
				return s3test.Fault{}
			}
			return s3test.Fault{Effect: m.effect, Do: func() {
				<-started
				_ = cmd.Process.Kill()
				<-ended
			}}
		})
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		close(started)
		_ = cmd.Wait()
		close(ended)
		p.Judge(nil)
		if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signal() != syscall.SIGKILL {
			t.Fatalf("%s: it was not, and ended with %v\n%s", what, cmd.ProcessState, out)
		}
		left := stored() - before
		if left < m.has {
			t.Errorf("%s: %d bytes are stored, want %d at least", what, left, m.has)
		}
		restic("check")
		dst := filepath.Join(f.tmp, "restored")
		f.must("restore", ids[0].Name(), "--base-data-path", filepath.Join(dst, "data"), "--config-dir", filepath.Join(dst, "config"))
		for _, d := range []string{"data", "config"} {
			testfixture.Compare(t, filepath.Join(pristine, d), filepath.Join(dst, d), testfixture.Options{Limit: 5})
		}
		if err := os.RemoveAll(dst); err != nil {
			t.Fatal(err)
		}
		f.must(backup...)
		// Headers and metadata come on top; a pack that is stored twice would be 4 MiB.
		if all := stored() - before; all < fresh || all > fresh+2<<20 {
			t.Errorf("%s: %d bytes were stored by then, and %d by both runs, for %d new ones", what, left, all, fresh)
		}
		if got, err := os.ReadDir(filepath.Join(srv.Dir, bucket, "snapshots")); err != nil || len(got) != i+2 {
			t.Errorf("%s: %d snapshots after the next run, want %d (%v)", what, len(got), i+2, err)
		}
	}
	restic("check", "--read-data")
}

// watcher looks for secrets where other users of the machine can see them.
type watcher struct {
	t       *testing.T
	secrets map[string]string // what it is -> its text

	mu    sync.Mutex
	looks int // guarded by mu
}

// find fails the test if a secret is in a text.
func (w *watcher) find(where string, text []byte) {
	w.t.Helper()
	for what, secret := range w.secrets {
		if bytes.Contains(text, []byte(secret)) {
			w.t.Errorf("%s is in %s", what, where)
		}
	}
}

// processes looks at the command lines of all processes.
func (w *watcher) processes() {
	dirs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, d := range dirs {
		if line, err := os.ReadFile(d); err == nil {
			w.find("the command line "+string(bytes.ReplaceAll(line, []byte{0}, []byte{' '})), line)
		}
	}
	w.mu.Lock()
	w.looks++
	w.mu.Unlock()
}

// files looks at all files below a directory.
func (w *watcher) files(dir string) {
	w.t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		w.find("the file "+path, data)
		return err
	})
	if err != nil {
		w.t.Error(err)
	}
}

// TestSecretsStaySecret uses every kind of repository and a bucket with blobs, with the right secrets and with
// wrong ones, and looks for them in the command lines of all processes meanwhile, in what is printed, and in
// what is left on disk.
func TestSecretsStaySecret(t *testing.T) {
	t.Parallel()
	const (
		repoPassword, wrongPassword = "repo-password-f81d", "wrong-password-77aa"
		restPassword, wrongRest     = "rest-password-09c3", "wrong-rest-b6e1"
		wrongKey, wrongBlobKey      = "wrong-aws-key-5d20", "wrong-blob-key-e94f"
	)
	srv := s3test.Start(t, s3test.Options{})
	ssh, err := sftptest.Run(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ssh.Stop)
	key, err := os.ReadFile(filepath.Join(ssh.Home, ".ssh", "id_ed25519"))
	if err != nil {
		t.Fatal(err)
	}
	w := &watcher{t: t, secrets: map[string]string{
		"the repository's password": repoPassword, "a wrong password": wrongPassword, "the password of the REST server": restPassword,
		"a wrong password of it": wrongRest, "the secret key": srv.SecretKey, "a wrong secret key": wrongKey,
		"a wrong secret key of the bucket": wrongBlobKey, "the private key": strings.Split(string(key), "\n")[2],
	}}

	// An instance with its blobs in a bucket; requests to it and to the repository are moments to look.
	source := testfixture.Unpack(t, testfixture.OCISWithS3Blobs)
	blobs, bucket := srv.Bucket(t, false, false), srv.Bucket(t, false, false)
	load(t, srv, blobs, filepath.Join(source, "bucket"))
	p := s3test.NewProxy(t, srv.Endpoint)
	look := func(n int, _ *http.Request) s3test.Fault {
		if n%50 != 1 {
			return s3test.Fault{}
		}
		return s3test.Fault{Do: w.processes}
	}
	p.Judge(look)
	atRest := t.TempDir()
	restServer := &resttest.Server{Dir: atRest, User: "me", Password: restPassword}
	rest := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.processes()
		restServer.ServeHTTP(rw, r)
	}))
	t.Cleanup(rest.Close)
	atSFTP, atRclone := filepath.Join(t.TempDir(), "repo"), filepath.Join(t.TempDir(), "repo")
	initOnS3(t, srv, bucket, repoPassword)
	for _, dir := range []string{atRest, atSFTP, atRclone} {
		initOn(t, local.New(dir), repoPassword)
	}

	// The server's settings, with the keys of its bucket.
	serverEnv := filepath.Join(t.TempDir(), "server.env")
	settings := "STORAGE_USERS_DRIVER=s3ng\n"
	for name, value := range map[string]string{"ENDPOINT": p.URL, "REGION": srv.Region, "BUCKET": blobs, "ACCESS_KEY": srv.AccessKey, "SECRET_KEY": srv.SecretKey} {
		settings += "STORAGE_USERS_DECOMPOSEDS3_" + name + "=" + value + "\n"
	}
	if err := os.WriteFile(serverEnv, []byte(settings), 0o600); err != nil {
		t.Fatal(err)
	}
	f := newFar(t, append(srv.Env(), "HOLDFAST_PASSWORD="+repoPassword, "HOLDFAST_VERBOSE=true",
		"RESTIC_REST_USERNAME=me", "RESTIC_REST_PASSWORD="+restPassword, "RCLONE_CONFIG="+filepath.Join(t.TempDir(), "rclone.conf"),
		"HOLDFAST_BASE_DATA_PATH="+filepath.Join(source, "data"), "HOLDFAST_CONFIG_DIR="+filepath.Join(source, "config"), "HOLDFAST_FREEZE=none",
		"HOLDFAST_ENV_FILE="+serverEnv)...)
	if err := os.CopyFS(f.tmp, os.DirFS(ssh.Home)); err != nil {
		t.Fatal(err)
	}
	// A helper program looks for itself before it becomes what it shall be, also at what it was given.
	seen := filepath.Join(f.tmp, "seen")
	helper := func(name, text string, env ...string) string {
		file := filepath.Join(f.tmp, name)
		if err := os.WriteFile(file, []byte("#!/bin/sh\n{ cat /proc/[0-9]*/cmdline; "+strings.Join(append([]string{"env"}, env...), " | ")+"; } >>"+seen+" 2>/dev/null\n"+text+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		return file
	}
	// run runs the program with more variables. It must fail or succeed as told; with until it is interrupted
	// when it has said so.
	run := func(fails bool, until string, env []string, args ...string) string {
		t.Helper()
		cmd, out := f.command(args...)
		cmd.Env = append(cmd.Env, env...)
		if until != "" {
			cmd.Stderr = &interrupter{text: until, out: out, cmd: cmd}
			cmd.Stdout = nil
		}
		err := cmd.Run()
		if (err != nil) != fails {
			t.Errorf("holdfast %q with %q: %v\n%s", args, env, err, out)
		}
		if until != "" && !strings.Contains(out.String(), until) {
			t.Errorf("holdfast %q with %q was to say %q: %s", args, env, until, out)
		}
		w.find(fmt.Sprintf("the output of holdfast %q:\n%s", args, out), out.Bytes())
		return out.String()
	}
	s3 := func(env ...string) []string {
		return append([]string{"HOLDFAST_REPOSITORY=s3:" + p.URL + "/" + bucket}, env...)
	}
	at := func(addr string, env ...string) []string {
		return append([]string{"HOLDFAST_REPOSITORY=" + addr}, env...)
	}
	again := "trying again"

	// As it should be. A stop gives a moment with the guard and its record.
	stop := helper("stop", "cp -r "+filepath.Join(f.tmp, "state")+" "+filepath.Join(f.tmp, "state-then"))
	run(false, "", s3("HOLDFAST_FREEZE=command"), "backup", "--stop-command", stop, "--start-command", "true")
	run(false, "", s3(), "backup", "--json")
	run(false, "", s3(), "discover")
	run(false, "", s3(), "check")
	manifest := run(false, "", s3(), "cat", "latest:/manifest.json")
	if !strings.Contains(manifest, blobs) {
		t.Errorf("the manifest does not name the bucket: %s", manifest)
	}
	if _, err := os.Stat(filepath.Join(f.tmp, "state-then")); err != nil {
		t.Error("there was no state to look at:", err)
	}

	// What the server, or the way to it, refuses.
	run(true, "", s3("HOLDFAST_PASSWORD="+wrongPassword), "snapshots")
	run(true, "", s3("AWS_SECRET_ACCESS_KEY="+wrongKey), "snapshots", "--json")
	run(true, "", s3("HOLDFAST_BUCKET_ACCESS_KEY="+srv.AccessKey, "HOLDFAST_BUCKET_SECRET_KEY="+wrongBlobKey), "backup")
	run(true, "", at("s3:"+strings.Replace(p.URL, "http:", "https:", 1)+"/"+bucket), "snapshots")
	run(true, "", at("s3:http://key:"+wrongKey+"@127.0.0.1/bucket"), "snapshots")
	run(true, again, at("s3:http://127.0.0.1:1/"+bucket), "snapshots")
	p.Judge(s3test.From(1, s3test.Busy))
	run(true, again, s3(), "snapshots")
	p.Judge(look)

	run(false, "", at("rest:"+rest.URL), "backup")
	run(false, "", at("rest:"+strings.Replace(rest.URL, "://", "://me:"+restPassword+"@", 1), "RESTIC_REST_PASSWORD="), "snapshots")
	run(true, "", at("rest:"+rest.URL, "RESTIC_REST_PASSWORD="+wrongRest), "snapshots", "--json")
	run(true, "", at("rest:"+strings.Replace(rest.URL, "://", "://me:"+wrongRest+"@", 1), "RESTIC_REST_PASSWORD="), "backup")
	run(true, "", at("rest:ftp://me:"+wrongRest+"@host/"), "snapshots")
	run(true, "", at("rest:"+strings.Replace(rest.URL, "http://", "https://me:"+wrongRest+"@", 1)), "snapshots")
	run(true, again, at("rest:http://me:"+wrongRest+"@127.0.0.1:1/"), "snapshots")

	sftp := at("sftp://" + ssh.User + "@127.0.0.1:" + ssh.Port + "/" + atSFTP)
	run(false, "", sftp, "snapshots")
	run(false, "", sftp, "snapshots", "--sftp-command", helper("ssh-session", "exec "+ssh.Command()))
	run(true, "", at("sftp://me:"+wrongRest+"@127.0.0.1/repo"), "snapshots")
	other := filepath.Join(f.tmp, ".ssh", "known_hosts")
	known, err := os.ReadFile(other)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(other, bytes.Replace(known, []byte("127.0.0.1"), []byte("127.0.0.2"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	run(true, "", sftp, "snapshots")

	// rclone takes keys of S3 from the environment, too.
	rclone := at("rclone::local:"+atRclone, "HOLDFAST_RCLONE_PROGRAM="+helper("rclone", `exec rclone "$@"`, "grep -v ^AWS_"))
	run(false, "", rclone, "snapshots")
	run(true, "", append(rclone, "HOLDFAST_REPOSITORY=rclone:unknown:"+atRclone), "snapshots")

	if err := os.RemoveAll(filepath.Join(f.tmp, ".ssh")); err != nil {
		t.Fatal(err)
	}
	w.files(f.tmp)
	if lines, err := os.ReadFile(seen); err != nil || !bytes.Contains(lines, []byte(f.program)) {
		t.Errorf("the helpers saw no command line of holdfast (%v)", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.looks < 10 {
		t.Errorf("looked at the processes only %d times", w.looks)
	}
}

// interrupter passes on what a program prints, and interrupts it at the first sight of a text.
type interrupter struct {
	text string
	out  *bytes.Buffer
	cmd  *exec.Cmd
	done bool
}

func (i *interrupter) Write(p []byte) (int, error) {
	i.out.Write(p)
	if !i.done && strings.Contains(i.out.String(), i.text) {
		i.done = true
		_ = i.cmd.Process.Signal(os.Interrupt)
		time.AfterFunc(time.Minute, func() { _ = i.cmd.Process.Kill() })
	}
	return len(p), nil
}

// load puts the files below dir into a bucket.
func load(t *testing.T, srv *s3test.Server, bucket, dir string) {
	t.Helper()
	c, err := srv.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		key, err := filepath.Rel(dir, path)
		if err == nil {
			_, err = c.FPutObject(context.Background(), bucket, key, path, minio.PutObjectOptions{})
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// TestSecondLookStaysHere: what shows a snapshot asks a server for its packs once.
func TestSecondLookStaysHere(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	initOn(t, local.New(dir), password)
	var packs atomic.Int64
	served := &resttest.Server{Dir: dir}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/data/") {
			packs.Add(1)
		}
		served.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	f := newFar(t, "HOLDFAST_PASSWORD="+password, "HOLDFAST_REPOSITORY=rest:"+srv.URL)
	source := testfixture.Unpack(t, testfixture.OCIS)
	f.must("backup", "--base-data-path", filepath.Join(source, "data"), "--config-dir", filepath.Join(source, "config"), "--freeze", "none")
	for _, args := range [][]string{
		{"ls", "--long", "latest:personal/alan/Round 0"}, {"ls", "--trash", "latest:personal/alan"}, {"ls", "--versions", "latest:personal/alan/Round 0"},
		{"spaces"}, {"snapshots"},
	} {
		// Another machine, where nothing of the repository is known.
		if err := os.RemoveAll(filepath.Join(f.tmp, "cache")); err != nil {
			t.Fatal(err)
		}
		packs.Store(0)
		first := f.must(args...)
		if n := packs.Swap(0); n == 0 {
			t.Errorf("%q asked for no pack without a cache: the test tests nothing", args)
		}
		if again := f.must(args...); again != first {
			t.Errorf("%q says something else the second time:\n%s\n%s", args, first, again)
		}
		if n := packs.Load(); n != 0 {
			t.Errorf("%q asked for packs %d times when all was known", args, n)
		}
	}
}
