package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"github.com/minio/minio-go/v7"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/bench/internal/link"
	"github.com/holdfast-backup/holdfast/bench/internal/measure"
	"github.com/holdfast-backup/holdfast/internal/bucket"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/s3/s3test"
	"github.com/holdfast-backup/holdfast/internal/storegen"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// remote measures repositories and buckets on an S3 server behind a slow link, which is simulated: see
// package link. Two stores have the same bytes, which cannot be compressed, in few large blobs and in many
// small ones. The last part is a bucket with so many objects that only their listing exists.
type remote struct {
	ctx    context.Context
	o      *options
	log    *os.File
	dir    string
	srv    *s3test.Server
	link   *link.Link
	tools  []*tool
	stores map[string]string // size -> directory
	costs  map[remoteKey][]remoteCost
	many   []manyCost
}

// remoteKey is one line of the table.
type remoteKey struct{ step, size, tool string }

type remoteCost struct {
	measure.Cost
	bytes int64 // over the link, in the direction that counts
}

// manyCost is a backup of the bucket with many objects.
type manyCost struct {
	measure.Cost
	lists, gets int64 // requests
}

// The steps, in their order.
const (
	stepBackupOver  = "backup, repository behind the link"
	stepRestoreOver = "restore, repository behind the link"
	stepBackupFrom  = "backup, instance's bucket behind the link"
	stepRestoreTo   = "restore, instance's bucket behind the link"
)

// The sizes of blobs.
const (
	large = "large"
	small = "small"
)

// largeBlob is about the size of the large ones, in bytes.
const largeBlob = 8 << 20

func runRemote(ctx context.Context, o *options, stdout io.Writer, log *os.File) (err error) {
	r := &remote{ctx: ctx, o: o, log: log, stores: map[string]string{}, costs: map[remoteKey][]remoteCost{}}
	scratch, err := filepath.Abs(o.scratch)
	if err != nil {
		return err
	}
	r.dir = filepath.Join(scratch, "remote")
	if err := errors.Join(os.RemoveAll(r.dir), os.MkdirAll(r.dir, 0o700)); err != nil {
		return err
	}
	defer func() {
		if !o.keep {
			err = errors.Join(err, os.RemoveAll(r.dir))
		}
	}()
	// Two stores, and for each program a repository and what is restored, of one at a time.
	one := measure.StoreNeeds(o.files, int64(o.bytes))
	if err := measure.NeedSpace(r.dir, one.Times(8)); err != nil {
		return err
	}
	b := &bench{o: o, scratch: r.dir}
	for name := range strings.SplitSeq(o.tools, ",") {
		t, err := b.newTool(strings.TrimSpace(name))
		if err != nil {
			return err
		}
		if t.name == "borg" {
			return errors.New("borg has no repositories on S3: leave it out of -tools")
		}
		t.env = append(t.env, "HOLDFAST_CONFIG_FILE=/dev/null", "HOLDFAST_STATE_DIR="+filepath.Join(t.dir, "state"))
		r.tools = append(r.tools, t)
	}
	if err := r.generate(); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(r.dir, "s3"), 0o700); err != nil {
		return err
	}
	if r.srv, err = s3test.Run(filepath.Join(r.dir, "s3"), s3test.Options{}); err != nil {
		return err
	}
	defer r.srv.Stop()
	if r.link, err = link.Start(r.srv.Addr, link.Options{Rate: int64(o.link), Latency: o.latency}); err != nil {
		return err
	}
	defer r.link.Close()
	for i := range o.runs {
		for _, size := range []string{large, small} {
			for _, t := range r.tools {
				if err := r.repository(i, size, t); err != nil {
					return fmt.Errorf("%s, %s blobs: %w", t.name, size, err)
				}
			}
			if r.holdfast() != nil {
				if err := r.instance(i, size); err != nil {
					return fmt.Errorf("bucket with %s blobs: %w", size, err)
				}
			}
		}
	}
	if r.holdfast() != nil && o.objects > 0 {
		if err := r.manyObjects(); err != nil {
			return fmt.Errorf("bucket of many objects: %w", err)
		}
	}
	text := r.report()
	fmt.Fprint(stdout, text)
	if o.out != "" {
		return replaceSection(o.out, r.key(), text)
	}
	return nil
}

func (r *remote) holdfast() *tool {
	for _, t := range r.tools {
		if t.name == "holdfast" {
			return t
		}
	}
	return nil
}

func (r *remote) generate() error {
	for size, files := range map[string]int{large: max(1, int(r.o.bytes)/largeBlob), small: r.o.files} {
		dir := filepath.Join(r.dir, size)
		r.stores[size] = dir
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		fmt.Fprintf(r.log, "generating %d files, %s\n", files, measure.Size(int64(r.o.bytes)))
		_, err := storegen.Generate(r.ctx, storegen.Options{
			Dir: dir, Seed: r.o.seed, Files: files, Bytes: int64(r.o.bytes), Spaces: cmp.Or(r.o.spaces, 4), Prefix: ocis.PrefixOCIS,
			Even: true, Revisions: -1, Trash: -1, Empty: -1,
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// bucketOf makes an empty bucket.
func (r *remote) bucketOf(name string) error {
	c, err := r.srv.Client()
	if err != nil {
		return err
	}
	defer c.Close()
	return c.MakeBucket(r.ctx, name, minio.MakeBucketOptions{})
}

// drop removes a bucket with all that is in it: its directory is all there is.
func (r *remote) drop(name string) error { return os.RemoveAll(filepath.Join(r.srv.Dir, name)) }

// timed runs a program, and counts what went over the link.
func (r *remote) timed(step, size string, t *tool, env, args []string) error {
	if err := r.ctx.Err(); err != nil {
		return err
	}
	unix.Sync()
	up, down, _ := r.link.Counts()
	c, _, err := measure.Command(t.dir, append(t.env, env...), t.path, args...)
	if err != nil {
		return err
	}
	up2, down2, conns := r.link.Counts()
	x := remoteCost{c, up2 - up}
	if step == stepRestoreOver || step == stepBackupFrom {
		x.bytes = down2 - down
	}
	k := remoteKey{step, size, t.name}
	r.costs[k] = append(r.costs[k], x)
	fmt.Fprintf(r.log, "%-9s %-45s %-5s %7.2f s wall %7.2f s CPU %4d MB, %s over the link (%.0f %%), connection %d\n", t.name, step, size, c.Wall.Seconds(), c.CPU().Seconds(), c.Peak/1e6,
		measure.Size(x.bytes), 100*r.share(x), conns)
	return nil
}

// share is how much of the link was used.
func (r *remote) share(x remoteCost) float64 {
	return float64(x.bytes) / (x.Wall.Seconds() * float64(r.o.link))
}

// repository backs a store up to a repository behind the link, and restores it.
func (r *remote) repository(run int, size string, t *tool) error {
	name := fmt.Sprintf("repo-%s-%s-%d", t.name, size, run)
	if err := errors.Join(t.remove(), r.bucketOf(name)); err != nil {
		return err
	}
	if err := errors.Join(os.MkdirAll(t.restored(), 0o755), os.WriteFile(t.pass(), []byte(password+"\n"), 0o600)); err != nil {
		return err
	}
	addr, store := "s3:http://"+r.link.Addr()+"/"+name, r.stores[size]
	env := append(r.srv.Env(), "HOLDFAST_REPOSITORY="+addr, "RESTIC_REPOSITORY="+addr, "HOLDFAST_PASSWORD_FILE="+t.pass())
	initArgs, backup, restore := []string{"init"}, []string{"backup", filepath.Join(store, "data"), filepath.Join(store, "config")}, []string{"restore", "latest", "--target", t.restored()}
	if t.name == "holdfast" {
		backup = []string{"backup", "--base-data-path", filepath.Join(store, "data"), "--config-dir", filepath.Join(store, "config"), "--freeze", "none"}
		restore = []string{"restore", "latest", "--base-data-path", filepath.Join(t.restored(), "data"), "--config-dir", filepath.Join(t.restored(), "config")}
	}
	if _, _, err := measure.Command(t.dir, append(t.env, env...), t.path, initArgs...); err != nil {
		return err
	}
	if err := r.timed(stepBackupOver, size, t, env, backup); err != nil {
		return err
	}
	if err := r.timed(stepRestoreOver, size, t, env, restore); err != nil {
		return err
	}
	if r.o.verify && run == 0 {
		tree := t.restored()
		if t.name != "holdfast" {
			tree = filepath.Join(tree, store)
		}
		if err := same(store, tree, t.name != "holdfast"); err != nil {
			return err
		}
		if t.restic != "" {
			if _, _, err := measure.Command(t.dir, append(t.env, env...), t.restic, "-r", "s3:"+r.srv.Endpoint+"/"+name, "--no-cache", "check", "--read-data"); err != nil {
				return err
			}
		}
	}
	return errors.Join(r.drop(name), t.remove())
}

// same compares what was restored with the store.
func same(store, got string, ignoreHoles bool) error {
	for _, part := range []string{"data", "config"} {
		diffs, err := testfixture.DiffOptions(filepath.Join(store, part), filepath.Join(got, part), testfixture.Options{IgnoreHoles: ignoreHoles, Limit: 10})
		if err != nil {
			return err
		}
		if len(diffs) > 0 {
			return fmt.Errorf("something else was restored than was backed up:\n%s", strings.Join(diffs, "\n"))
		}
	}
	return nil
}

// withBucket makes an instance of a store whose blobs lie in a bucket. It returns the directory of the rest.
func (r *remote) withBucket(size, name string) (dir string, err error) {
	if err := r.bucketOf(name); err != nil {
		return "", err
	}
	dir = filepath.Join(r.dir, name)
	if _, _, err := measure.Command("", nil, "cp", "-a", r.stores[size], dir); err != nil {
		return "", err
	}
	c, err := r.srv.Client()
	if err != nil {
		return "", err
	}
	defer c.Close()
	spaces := filepath.Join(dir, "data", "storage", "users", "spaces")
	blobs, err := filepath.Glob(filepath.Join(spaces, "*", "*", "blobs"))
	if err != nil || len(blobs) == 0 {
		return "", fmt.Errorf("no blobs below %s (%v)", spaces, err)
	}
	g, gctx := errgroup.WithContext(r.ctx)
	g.SetLimit(8)
	for _, root := range blobs {
		above, rest := filepath.Split(filepath.Dir(root))
		space := filepath.Base(above) + rest
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			rel, err := filepath.Rel(root, path)
			if err != nil {
				return err
			}
			g.Go(func() error {
				data, err := os.ReadFile(path)
				if err == nil {
					_, err = c.PutObject(gctx, name, space+"/"+filepath.ToSlash(rel), bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{})
				}
				return err
			})
			return gctx.Err()
		})
		if err != nil {
			return "", errors.Join(err, g.Wait())
		}
	}
	if err := g.Wait(); err != nil {
		return "", err
	}
	for _, root := range blobs {
		if err := os.RemoveAll(root); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// instanceEnv configures the server whose blobs lie in a bucket.
func (r *remote) instanceEnv(endpoint, name string) []string {
	return []string{
		"STORAGE_USERS_DRIVER=s3ng", "STORAGE_USERS_S3NG_ENDPOINT=" + endpoint, "STORAGE_USERS_S3NG_REGION=" + r.srv.Region,
		"STORAGE_USERS_S3NG_BUCKET=" + name, "STORAGE_USERS_S3NG_ACCESS_KEY=" + r.srv.AccessKey, "STORAGE_USERS_S3NG_SECRET_KEY=" + r.srv.SecretKey,
	}
}

// instance backs up an instance whose bucket is behind the link, and restores it to another bucket there.
// The repository is a directory.
func (r *remote) instance(run int, size string) error {
	t := r.holdfast()
	name, back := fmt.Sprintf("blobs-%s-%d", size, run), fmt.Sprintf("back-%s-%d", size, run)
	if err := errors.Join(t.remove(), r.bucketOf(back)); err != nil {
		return err
	}
	if err := t.init(); err != nil {
		return err
	}
	dir, err := r.withBucket(size, name)
	if err != nil {
		return err
	}
	env := append(r.instanceEnv("http://"+r.link.Addr(), name), bucket.AccessKeyVariable+"="+r.srv.AccessKey, bucket.SecretKeyVariable+"="+r.srv.SecretKey, "HOLDFAST_REPOSITORY="+t.repo(), "HOLDFAST_PASSWORD_FILE="+t.pass())
	if err := r.timed(stepBackupFrom, size, t, env, []string{"backup", "--base-data-path", filepath.Join(dir, "data"), "--config-dir", filepath.Join(dir, "config"), "--freeze", "none"}); err != nil {
		return err
	}
	got := filepath.Join(t.dir, "restored")
	if err := r.timed(stepRestoreTo, size, t, env, []string{"restore", "latest", "--base-data-path", filepath.Join(got, "data"), "--config-dir", filepath.Join(got, "config"), "--bucket", back}); err != nil {
		return err
	}
	if r.o.verify && run == 0 {
		if err := same(dir, got, false); err != nil {
			return err
		}
		if err := r.sameBuckets(name, back); err != nil {
			return err
		}
	}
	return errors.Join(r.drop(name), r.drop(back), os.RemoveAll(dir), t.remove())
}

// sameBuckets compares two buckets by the ETags of their objects, which are MD5s.
func (r *remote) sameBuckets(a, b string) error {
	c, err := r.srv.Client()
	if err != nil {
		return err
	}
	defer c.Close()
	read := func(name string) (map[string]string, error) {
		out := map[string]string{}
		for o := range c.ListObjectsIter(r.ctx, name, minio.ListObjectsOptions{Recursive: true}) {
			if o.Err != nil {
				return nil, o.Err
			}
			out[o.Key] = fmt.Sprint(o.Size)
			if !strings.Contains(o.ETag, "-") { // not uploaded in parts
				out[o.Key] += o.ETag
			}
		}
		return out, nil
	}
	want, err := read(a)
	if err != nil {
		return err
	}
	got, err := read(b)
	if err != nil {
		return err
	}
	for key, x := range want {
		if y, ok := got[key]; !ok || len(x) == len(y) && x != y {
			return fmt.Errorf("object %s came back as %q, it was %q", key, y, x)
		}
	}
	if len(got) != len(want) {
		return fmt.Errorf("%d objects came back of %d", len(got), len(want))
	}
	return nil
}

// manyObjects backs up an instance in whose bucket, besides its own, are so many objects that nothing refers
// to: first without any knowledge, then unchanged.
func (r *remote) manyObjects() error {
	t := r.holdfast()
	const name = "many"
	if err := t.remove(); err != nil {
		return err
	}
	if err := t.init(); err != nil {
		return err
	}
	dir, err := r.withBucket(large, name)
	if err != nil {
		return err
	}
	space, err := os.ReadDir(filepath.Join(r.srv.Dir, name))
	if err != nil || len(space) == 0 {
		return fmt.Errorf("no space in the bucket (%v)", err)
	}
	prefix := ""
	for _, s := range space {
		if !strings.HasPrefix(s.Name(), ".") {
			prefix = s.Name()
			break
		}
	}
	n := r.o.objects
	many := s3test.Many{N: n, Key: func(i int) string {
		return bucket.Key(prefix, fmt.Sprintf("%08x-0000-4000-8000-%012x", uint64(i)*(1<<32)/uint64(n), i))
	}}
	u, err := url.Parse(r.srv.Endpoint)
	if err != nil {
		return err
	}
	var lists, gets atomic.Int64
	proxy := &httputil.ReverseProxy{Rewrite: func(p *httputil.ProxyRequest) { p.Out.URL.Scheme, p.Out.URL.Host = u.Scheme, u.Host }}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		list := q.URL.Query().Has("list-type")
		switch {
		case list:
			lists.Add(1)
		case q.Method == http.MethodGet:
			gets.Add(1)
		}
		if list && q.URL.Query().Get("prefix") == prefix+"/" {
			many.List(w, q)
			return
		}
		proxy.ServeHTTP(w, q)
	}))
	defer srv.Close()
	env := append(r.instanceEnv(srv.URL, name), "HOLDFAST_REPOSITORY="+t.repo(), "HOLDFAST_PASSWORD_FILE="+t.pass())
	for range 2 {
		lists.Store(0)
		gets.Store(0)
		c, _, err := measure.Command(t.dir, append(t.env, env...), t.path, "backup", "--base-data-path", filepath.Join(dir, "data"), "--config-dir", filepath.Join(dir, "config"), "--freeze", "none")
		if err != nil {
			return err
		}
		x := manyCost{c, lists.Load(), gets.Load()}
		r.many = append(r.many, x)
		fmt.Fprintf(r.log, "holdfast  bucket of %d objects: %.2f s wall, %.2f s CPU, %d MB, %d listings, %d objects read\n", n, c.Wall.Seconds(), c.CPU().Seconds(), c.Peak/1e6, x.lists, x.gets)
	}
	return errors.Join(r.drop(name), os.RemoveAll(dir), t.remove())
}

func (r *remote) key() string {
	return fmt.Sprintf("remote files=%d bytes=%d link=%d latency=%s", r.o.files, int64(r.o.bytes), int64(r.o.link), r.o.latency)
}

func (r *remote) report() string {
	var w strings.Builder
	mbit := float64(r.o.link) * 8 / 1e6
	fmt.Fprintf(&w, "## A link of %g Mbit/s and %d ms\n\n", mbit, r.o.latency.Milliseconds())
	m := machine(r.dir)
	fmt.Fprintf(&w, "%s: %s, %d cores, %s memory, %s, Linux %s, %s.", time.Now().UTC().Format("2006-01-02"),
		m.cpu, runtime.NumCPU(), measure.Size(m.memory), m.filesystem, m.kernel, runtime.Version())
	if r.o.note != "" {
		fmt.Fprintf(&w, " %s", r.o.note)
	}
	fmt.Fprintf(&w, "\n\nThe link is a proxy on loopback: %g Mbit/s in each direction for all connections together, %s for each byte in each direction, so that a\n"+
		"round trip takes %s. Behind it is versitygw, over HTTP, on the same processors and the same disk. Two stores have the same %s, which cannot be compressed: %s blobs of %s, and %s of %s.\n"+
		"Times are those of whole programs. Share of the link is bytes over the link by time and bandwidth. Median of %s, lowest and highest in brackets.\n\n",
		mbit, r.o.latency, 2*r.o.latency, measure.Size(int64(r.o.bytes)),
		thousands(int64(max(1, int(r.o.bytes)/largeBlob))), measure.Size(int64(r.o.bytes)/int64(max(1, int(r.o.bytes)/largeBlob))),
		thousands(int64(r.o.files)), measure.Size(int64(r.o.bytes)/int64(r.o.files)), runsText(r.o.runs))
	w.WriteString("| step | program | blobs | wall s | share of the link | user + system CPU s | peak memory | against large ones |\n|---|---|---|---:|---:|---:|---:|---:|\n")
	for _, step := range []string{stepBackupOver, stepRestoreOver, stepBackupFrom, stepRestoreTo} {
		for _, t := range r.tools {
			base := r.median(remoteKey{step, large, t.name})
			for _, size := range []string{large, small} {
				costs := r.costs[remoteKey{step, size, t.name}]
				if len(costs) == 0 {
					continue
				}
				var plain []measure.Cost
				var share []float64
				peak := int64(0)
				for _, c := range costs {
					plain, share, peak = append(plain, c.Cost), append(share, 100*r.share(c)), max(peak, c.Peak)
				}
				ratio := ""
				if size == small && base > 0 {
					ratio = fmt.Sprintf("%.2f", r.median(remoteKey{step, small, t.name})/base)
				}
				fmt.Fprintf(&w, "| %s | %s | %s | %s | %.0f %% | %s | %s | %s |\n", step, t.name, size, spread(measure.Seconds(plain, wall)), measure.Of(share).Median,
					spread(measure.Seconds(plain, measure.Cost.CPU)), measure.Size(peak), ratio)
			}
		}
	}
	w.WriteString("\nA file of users is some 14 entries of the store beside its blob; restores make them on the disk where the server keeps its objects, too.\n")
	if len(r.many) == 2 {
		fmt.Fprintf(&w, "\nA bucket in which, besides the blobs, are %s objects that nothing refers to (a server that makes up their listing; no link):\n\n"+
			"| run | wall s | user + system CPU s | peak memory | listings | objects read |\n|---|---:|---:|---:|---:|---:|\n", thousands(int64(r.o.objects)))
		for i, name := range []string{"first", "unchanged"} {
			c := r.many[i]
			fmt.Fprintf(&w, "| %s | %s | %s | %s | %s | %s |\n", name, seconds(c.Wall.Seconds()), seconds(c.CPU().Seconds()), measure.Size(c.Peak), thousands(c.lists), thousands(c.gets))
		}
		w.WriteString("\nThe one listing of an unchanged run asks for a single key: whether the keys may list at all.\n")
	}
	w.WriteString("\nPrograms:")
	for i, t := range r.tools {
		if i > 0 {
			w.WriteString(";")
		}
		fmt.Fprintf(&w, " %s (`%s`)", t.name, t.version)
	}
	w.WriteString(", each with its defaults.")
	if r.o.verify {
		w.WriteString(" What the first run had restored was compared with the store, and each repository checked by restic with all its data.")
	}
	fmt.Fprintf(&w, "\n\n    make bench-remote FILES=%d BYTES=%dB RUNS=%d\n", r.o.files, int64(r.o.bytes), r.o.runs)
	return w.String()
}

func (r *remote) median(k remoteKey) float64 {
	var plain []measure.Cost
	for _, c := range r.costs[k] {
		plain = append(plain, c.Cost)
	}
	return measure.Seconds(plain, wall).Median
}
