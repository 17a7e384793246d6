package command

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/fssnap/fssnaptest"
)

// copies are commands as a user would write them. They put the view beside the source.
func copies(state string) Options {
	return Options{
		Create:   `echo copying; v="${HOLDFAST_SOURCE%/*}/$HOLDFAST_VIEW_NAME" && cp -aT "$HOLDFAST_SOURCE" "$v" && echo "$v"`,
		Destroy:  `rm -rf "${HOLDFAST_SOURCE%/*}/$HOLDFAST_VIEW_NAME"`,
		StateDir: state,
	}
}

func TestMain(m *testing.M) {
	fssnaptest.Main(m, func(state string) fssnap.Driver { return New(copies(state)) })
}

func mkdir(t *testing.T, path string) string {
	t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestNoCredentials: the commands get what they need, and no key of the repository.
func TestNoCredentials(t *testing.T) {
	t.Setenv("HOLDFAST_PASSWORD", "secret")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	t.Setenv("THEIRS", "kept")
	dir := mkdir(t, filepath.Join(t.TempDir(), "data"))
	out := filepath.Join(t.TempDir(), "env")
	o := copies(t.TempDir())
	o.Create = "env > " + out + "; " + o.Create
	d := New(o)
	src, err := d.Probe(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	views, err := d.Create(t.Context(), fssnap.NewName(time.Now()), []fssnap.Source{src})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Remove(t.Context(), views[0]); err != nil {
		t.Error(err)
	}
	env, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if s := string(env); strings.Contains(s, "secret") || !strings.Contains(s, "THEIRS=kept") || !strings.Contains(s, "HOLDFAST_SOURCE="+dir) {
		t.Errorf("%s", s)
	}
}

func TestLaws(t *testing.T) {
	fssnaptest.Laws(t, fssnaptest.Rig{
		Driver:   func(state string) fssnap.Driver { return New(copies(state)) },
		Dir:      mkdir(t, filepath.Join(t.TempDir(), "data")),
		Writable: true, Fork: true,
	})
}

// TestLossy: a copy that loses something is refused, by the name of the view, the file and what it
// lacks.
func TestLossy(t *testing.T) {
	dir := mkdir(t, filepath.Join(t.TempDir(), "data"))
	fssnaptest.Fill(t, dir)
	time.Sleep(50 * time.Millisecond) // so that all of it is older than any view
	for _, c := range []struct {
		name, copy, harm string
		what, attr       string
		path             string
	}{
		{name: "no xattrs", copy: `cp -dR --preserve=mode,ownership,timestamps,links -T`, what: "xattr"},
		{name: "one xattr of a file", harm: `user.oc.id`, what: "xattr", attr: "user.oc.id", path: "a/b/c/three"},
		{name: "times", copy: `cp -dR --preserve=mode,ownership,xattr -T`, what: "mtime"},
		{name: "owners", copy: `cp -dR --preserve=mode,timestamps,xattr -T`, what: "owner", path: "a/one"},
		{name: "a file", harm: `rm a/b/two`, what: "name", path: "a/b/two"},
		{name: "a file too many", harm: `touch a/more`, what: "name", path: "a/more"},
		{name: "a size", harm: `: > storage/users/spaces/1/root.mpk`, what: "size", path: "storage/users/spaces/1/root.mpk"},
		{name: "a mode", harm: `chmod 600 top`, what: "mode", path: "top"},
		{name: "a type", harm: `rm a/pipe && touch a/pipe`, what: "type", path: "a/pipe"},
		{name: "a target", harm: `ln -sfn /elsewhere dangling`, what: "target", path: "dangling"},
	} {
		t.Run(c.name, func(t *testing.T) {
			state := t.TempDir()
			o := copies(state)
			if c.copy != "" {
				o.Create = strings.Replace(o.Create, "cp -aT", c.copy, 1)
			}
			d := New(o)
			s := fssnaptest.NewSet(t, fssnap.Options{StateDir: state}, []fssnap.Driver{d}, dir)
			view := fssnaptest.At(t, s, dir)
			switch {
			case c.attr != "":
				if err := unix.Removexattr(filepath.Join(view, c.path), c.attr); err != nil {
					t.Fatal(err)
				}
			case c.harm != "":
				fssnaptest.Tool(t, "sh", "-c", `cd "$1" && `+c.harm, "sh", view)
				sameTimes(t, dir, view) // what is lost must be noticed by itself
			}
			_, err := s.Verify(context.Background(), fssnap.VerifyOptions{Frozen: true})
			var lossy *fssnap.LossyViewError
			if !errors.As(err, &lossy) {
				t.Fatalf("verify: %v", err)
			}
			if lossy.View != s.Views()[0].Name || lossy.What != c.what || c.what == "xattr" && lossy.Attribute == "" ||
				c.path != "" && lossy.Path != filepath.Join(dir, c.path) {
				t.Errorf("%+v", lossy)
			}
			for _, part := range []string{lossy.View, lossy.Path, lossy.Attribute} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q is not named: %v", part, err)
				}
			}
			// Nothing in the source is younger than the view: that it may change is no excuse.
			if _, err := s.Verify(context.Background(), fssnap.VerifyOptions{}); !errors.As(err, &lossy) && c.name == "no xattrs" {
				t.Errorf("verify of a running source: %v", err)
			}
		})
	}
}

// sameTimes gives what is in both trees the times that it has in the first.
func sameTimes(t *testing.T, from, to string) {
	t.Helper()
	err := filepath.WalkDir(from, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		err = unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(to, rel), []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestFailures: whatever a create command does wrong is said, and undone by the destroy command.
func TestFailures(t *testing.T) {
	dir := mkdir(t, filepath.Join(t.TempDir(), "data"))
	for _, c := range []struct{ name, create, want string }{
		{"fails", `echo no room >&2; exit 3`, "no room"},
		{"prints nothing", `:`, "last line"},
		{"prints no path", `echo done`, "done"},
		{"prints what is not there", `echo /nonexistent/view`, "no view"},
		{"prints the source", `echo "$HOLDFAST_SOURCE"`, "the source itself"},
		{"prints a link to the source", `ln -sfn "$HOLDFAST_SOURCE" "$HOLDFAST_SOURCE.link"; echo "$HOLDFAST_SOURCE.link"`, "the source itself"},
		{"prints a file", `echo /etc/passwd`, "type"},
		{"hangs", `sleep 60 & sleep 60`, "did not end within"},
		{"prints without end", `while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done`, "did not end within"},
	} {
		t.Run(c.name, func(t *testing.T) {
			state := t.TempDir()
			log := filepath.Join(t.TempDir(), "log")
			d := New(Options{Create: c.create, Destroy: `echo "$HOLDFAST_VIEW_NAME $HOLDFAST_SOURCE" >> ` + log, Timeout: 500 * time.Millisecond, StateDir: state})
			s, err := fssnap.NewSet(context.Background(), []fssnap.Driver{d}, []string{dir}, fssnap.Options{StateDir: state})
			if err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			if err := s.Create(context.Background()); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("create: %v", err)
			}
			if took := time.Since(begin); took > 10*time.Second {
				t.Errorf("took %v", took)
			}
			if data, err := os.ReadFile(log); err != nil || string(data) != s.Name()+".0 "+dir+"\n" {
				t.Errorf("destroy: %q, %v", data, err)
			}
			if found, err := fssnap.Find(context.Background(), []fssnap.Driver{d}, fssnap.FindOptions{StateDir: state}); err != nil || len(found) > 0 {
				t.Errorf("left: %v, %v", found, err)
			}
		})
	}
}

// TestDestroyFails: a view that cannot be removed stays on record, and the next run tries again.
func TestDestroyFails(t *testing.T) {
	ctx := context.Background()
	top := t.TempDir()
	dir := mkdir(t, filepath.Join(top, "data"))
	state := t.TempDir()
	o := copies(state)
	ok := filepath.Join(top, "ok")
	o.Destroy = `test -e ` + ok + ` || { echo busy >&2; exit 1; }; ` + o.Destroy
	d := New(o)
	ds := []fssnap.Driver{d}
	s, err := fssnap.NewSet(ctx, ds, []string{dir}, fssnap.Options{StateDir: state})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Create(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(ctx); err == nil || !strings.Contains(err.Error(), "busy") || !strings.Contains(err.Error(), "views --remove") {
		t.Errorf("close: %v", err)
	}
	find := fssnap.FindOptions{StateDir: state}
	// The command is no longer configured: the one on record is run.
	ds = []fssnap.Driver{New(Options{StateDir: state})}
	if _, err := fssnap.RemoveLeftovers(ctx, ds, find); err == nil {
		t.Error("removed what cannot be")
	}
	if _, err := fssnap.RemoveLeftovers(ctx, nil, find); err == nil || !strings.Contains(err.Error(), "no driver") && !strings.Contains(err.Error(), "no driver for them") {
		t.Errorf("without a driver: %v", err)
	}
	if err := os.WriteFile(ok, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if removed, err := fssnap.RemoveLeftovers(ctx, ds, find); err != nil || len(removed) != 1 {
		t.Errorf("leftovers: %v, %v", removed, err)
	}
	if e, err := os.ReadDir(top); err != nil || len(e) != 2 {
		t.Errorf("left: %v, %v", e, err)
	}
}

func TestNotConfigured(t *testing.T) {
	if _, err := New(Options{Create: "true"}).Probe(context.Background(), t.TempDir()); !errors.Is(err, fssnap.ErrNotSupported) {
		t.Errorf("probe: %v", err)
	}
}
