package live_test

import (
	"context"
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/cloud"
	"github.com/holdfast-backup/holdfast/internal/cloud/cloudtest"
	"github.com/holdfast-backup/holdfast/internal/live"
	"github.com/holdfast-backup/holdfast/internal/ocis"
)

var noon = time.Date(2025, 3, 1, 12, 0, 0, 123456789, time.UTC)

// source is a tree in memory: path to content; folders end in a slash.
type source struct {
	files   map[string]string
	details map[string]live.Details
	names   map[string]string // of principals
	noSums  bool
	fail    error // of reading
}

func (s *source) List(_ context.Context, it live.Item) ([]live.Item, error) {
	dir, seen := it.Ref.(string), map[string]live.Item{}
	for p, data := range s.files {
		rest, ok := strings.CutPrefix(p, dir)
		if !ok || rest == "" {
			continue
		}
		name, _, folder := strings.Cut(rest, "/")
		if folder {
			seen[name] = live.Item{Name: name, Folder: true, Ref: dir + name + "/"}
			continue
		}
		seen[name] = s.item(p, name, data)
	}
	return slices.Collect(maps.Values(seen)), nil
}

func (s *source) item(p, name, data string) live.Item {
	i := live.Item{Name: name, Size: int64(len(data)), ModTime: noon, Ref: p}
	if len(data) > 0 && !s.noSums {
		sum := sha1.Sum([]byte(data))
		i.SHA1 = hex.EncodeToString(sum[:])
	}
	if strings.HasPrefix(name, "link") {
		i.Odd = "it is a symlink"
	}
	return i
}

func (s *source) Open(_ context.Context, it live.Item, offset int64) (io.ReadCloser, error) {
	if s.fail != nil {
		return nil, s.fail
	}
	return io.NopCloser(strings.NewReader(s.files[it.Ref.(string)][offset:])), nil
}

func (s *source) Details(_ context.Context, it live.Item) (live.Details, error) {
	return s.details[it.Ref.(string)], nil
}

func (s *source) Principal(id string, _ bool) string { return s.names[id] }

var root = live.Item{Folder: true, Ref: ""}

func client(t *testing.T, s *cloudtest.Server, user string) *cloud.Client {
	t.Helper()
	c, err := cloud.New(cloud.Options{
		URL: s.URL, User: user, Secret: func() (string, error) { return user, nil }, Backoff: time.Millisecond, Timeout: 10 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// setup makes a server with a user alan and the options of a restore into alan's space.
func setup(t *testing.T, src *source) (*cloudtest.Server, live.Options, string) {
	t.Helper()
	s := cloudtest.New(t)
	s.AddUser("alan", "alan")
	home := s.Home("alan")
	return s, live.Options{Client: client(t, s, "alan"), Source: src, Item: root, Drive: home, Suffix: " (restored)", Tags: true, Chunk: 1000, Large: 2000}, home
}

func run(t *testing.T, o live.Options) *live.Result {
	t.Helper()
	res, err := live.Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// contents of all files of a space; folders are "/".
func contents(s *cloudtest.Server, drive string) map[string]string {
	out := map[string]string{}
	for p, i := range s.Items(drive) {
		out[p] = i.Data
		if i.Folder {
			out[p] = "/"
		}
	}
	return out
}

func sameTree(t *testing.T, got, want map[string]string) {
	t.Helper()
	for _, p := range slices.Sorted(maps.Keys(want)) {
		if g, ok := got[p]; !ok || g != want[p] {
			t.Errorf("%q: got %.40q (%v), want %.40q", p, g, ok, want[p])
		}
	}
	for p := range got {
		if _, ok := want[p]; !ok {
			t.Errorf("%q should not be there", p)
		}
	}
}

var tree = map[string]string{
	"a.txt": "alpha", "empty": "", "Grüße 100%.txt": "hello", "dir/b": "beta", "dir/deep/c": strings.Repeat("c", 5500), "nothing/": "",
}

var restored = map[string]string{
	"": "/", "a.txt": "alpha", "empty": "", "Grüße 100%.txt": "hello", "dir": "/", "dir/b": "beta", "dir/deep": "/", "dir/deep/c": strings.Repeat("c", 5500), "nothing": "/",
}

func TestRestore(t *testing.T) {
	for _, processing := range []int{0, 3} {
		src := &source{files: tree}
		s, o, home := setup(t, src)
		s.Processing = processing
		dry := o
		dry.DryRun = true
		d := run(t, dry)
		sameTree(t, contents(s, home), map[string]string{"": "/"})
		res := run(t, o)
		sameTree(t, contents(s, home), restored)
		if i := s.Items(home)["dir/deep/c"]; !i.ModTime.Equal(noon) {
			t.Errorf("time %v", i.ModTime)
		}
		if res.Files != 5 || res.Folders != 3 || res.Unchanged != 0 || res.ProblemCount != 0 || res.Bytes != 5500+14 {
			t.Errorf("%+v", res)
		}
		if d.Files != res.Files || d.Folders != res.Folders || d.Bytes != res.Bytes {
			t.Errorf("the dry run said %+v", d)
		}
		n := s.Count("PUT") + s.Count("POST") + s.Count("MKCOL")
		again := run(t, o)
		if again.Unchanged != 5 || again.Files+again.Folders != 0 || s.Count("PUT")+s.Count("POST")+s.Count("MKCOL") != n {
			t.Errorf("the second run: %+v", again)
		}
		// Without recorded checksums the contents are read and compared.
		src.noSums = true
		if again = run(t, o); again.Unchanged != 5 || again.Files != 0 {
			t.Errorf("without checksums: %+v", again)
		}
	}
}

func TestPlaces(t *testing.T) {
	src := &source{files: tree}
	s, o, home := setup(t, src)
	o.Path = "back/from March/"
	run(t, o)
	want := map[string]string{"back": "/"}
	for p, data := range restored {
		want[strings.TrimSuffix("back/from March/"+p, "/")] = data
	}
	want[""] = "/"
	sameTree(t, contents(s, home), want)
	// One file, under another name.
	s, o, home = setup(t, src)
	o.Item, o.Path = src.item("a.txt", "a.txt", "alpha"), "x/renamed.txt"
	run(t, o)
	sameTree(t, contents(s, home), map[string]string{"": "/", "x": "/", "x/renamed.txt": "alpha"})
	// A file where a folder is needed.
	s, o, home = setup(t, src)
	s.Write(home, "x", "file", noon)
	o.Path = "x/y"
	if _, err := live.Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), `"x" is a file`) {
		t.Errorf("got %v", err)
	}
	o.Path, o.Drive = "", home+"0"
	if _, err := live.Run(t.Context(), o); !errors.Is(err, cloud.ErrNotFound) {
		t.Errorf("a space that is not there: %v", err)
	}
}

func TestExisting(t *testing.T) {
	for how, want := range map[live.Existing]map[string]string{
		live.Replace: {"": "/", "a.txt": "alpha", "b": "beta"},
		live.Keep:    {"": "/", "a.txt": "other", "a (restored).txt": "alpha", "b": "beta"},
		live.Skip:    {"": "/", "a.txt": "other", "b": "beta"},
	} {
		src := &source{files: map[string]string{"a.txt": "alpha", "b": "beta"}}
		s, o, home := setup(t, src)
		s.Write(home, "a.txt", "other", noon.Add(time.Hour))
		o.Existing = how
		for range 2 { // the second changes nothing
			run(t, o)
			sameTree(t, contents(s, home), want)
			var versions []string
			if how == live.Replace {
				versions = []string{"other"}
			}
			if got := s.Items(home)["a.txt"].Versions; !slices.Equal(got, versions) {
				t.Errorf("%s: versions %q", how, got)
			}
		}
	}
	src := &source{files: map[string]string{"x": "file", "y/z": "in a folder", "w": "fine"}}
	s, o, home := setup(t, src)
	s.Write(home, "x/inner", "1", noon)
	s.Write(home, "y", "file", noon)
	res := run(t, o)
	sameTree(t, contents(s, home), map[string]string{"": "/", "x": "/", "x/inner": "1", "y": "file", "w": "fine"})
	if res.ProblemCount != 2 || res.Files != 1 {
		t.Errorf("%+v", res)
	}
}

// problems by path.
func problems(res *live.Result) map[string]string {
	out := map[string]string{}
	for _, p := range res.Problems {
		out[p.Path] = p.Kind + ": " + p.Reason
	}
	return out
}

func TestProblems(t *testing.T) {
	src := &source{files: map[string]string{
		"locked": "new", "fine": "1", "a\\b": "2", "x\x00y": "3", "..": "4", "bad\xff": "5", "link": "6", "d\nd/in": "7",
	}}
	s, o, home := setup(t, src)
	s.Write(home, "locked", "old", noon.Add(-time.Hour))
	s.Lock(home, "locked", true)
	res := run(t, o)
	sameTree(t, contents(s, home), map[string]string{"": "/", "fine": "1", "locked": "old"})
	got := problems(res)
	for p, want := range map[string]string{
		"locked": "somebody has it locked", "a\\b": "name validation failed", "x\x00y": "not a name", "..": "not a name", "bad\xff": "not a name",
		"link": "symlink", "d\nd": "name validation failed",
	} {
		if !strings.Contains(got[p], want) {
			t.Errorf("%q: %q", p, got[p])
		}
	}
	if int(res.ProblemCount) != len(got) || len(got) != 7 {
		t.Errorf("%d problems: %q", res.ProblemCount, got)
	}
	// The reader of a shared space.
	s.AddUser("lynn", "lynn")
	o.Client = client(t, s, "lynn")
	if _, err := live.Run(t.Context(), o); !errors.Is(err, cloud.ErrNotFound) {
		t.Errorf("another one's space: %v", err)
	}
}

func TestFatal(t *testing.T) {
	src := &source{files: map[string]string{"a": strings.Repeat("x", 1000), "b": "1"}}
	s, o, home := setup(t, src)
	s.SetQuota(home, 100)
	if _, err := live.Run(t.Context(), o); !errors.Is(err, cloud.ErrQuota) {
		t.Errorf("a full space: %v", err)
	}
	s, o, _ = setup(t, src)
	src.fail = errors.New("the repository is damaged")
	if _, err := live.Run(t.Context(), o); !errors.Is(err, src.fail) || s.Count("PUT") > 2 {
		t.Errorf("an unreadable snapshot: %v", err)
	}
	src.fail = nil
	s, o, _ = setup(t, src)
	stop := errors.New("stop")
	ctx, cancel := context.WithCancelCause(t.Context())
	s.Fault = func(r *http.Request) int {
		if r.Method == "PUT" {
			cancel(stop)
			return 503
		}
		return 0
	}
	if _, err := live.Run(ctx, o); !errors.Is(err, stop) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestCorrupted has the bytes of a large upload changed on the way, which the server does not notice.
func TestCorrupted(t *testing.T) {
	src := &source{files: map[string]string{"big": strings.Repeat("x", 5000), "small": "1"}}
	s, o, _ := setup(t, src)
	s.Corrupt = func(p []byte) { p[0] = 'y' }
	res := run(t, o)
	if got := problems(res); res.Files != 1 || !strings.Contains(got["big"], "another content than was sent") {
		t.Errorf("%+v", res)
	}
}

// TestResume kills a run at many points, and runs again.
func TestResume(t *testing.T) {
	src := &source{files: tree}
	for kill := 1; ; kill++ {
		s, o, home := setup(t, src)
		o.Sessions = filepath.Join(t.TempDir(), "uploads")
		o.Workers = 2
		ctx, cancel := context.WithCancelCause(t.Context())
		var n atomic.Int64
		s.Fault = func(*http.Request) int {
			if n.Add(1) == int64(kill) {
				cancel(errors.New("killed"))
			}
			return 0
		}
		_, err := live.Run(ctx, o)
		cancel(nil)
		res := run(t, o)
		sameTree(t, contents(s, home), restored)
		if res.ProblemCount != 0 {
			t.Errorf("killed at request %d: %+v", kill, res)
		}
		for p, i := range s.Items(home) {
			if len(i.Versions) > 0 {
				t.Errorf("killed at request %d: %q was sent twice", kill, p)
			}
		}
		if list, err := os.ReadDir(o.Sessions); err == nil && len(list) > 0 {
			t.Errorf("killed at request %d: %v is left", kill, list)
		}
		if err == nil { // it was through before
			if kill < 10 {
				t.Errorf("only %d requests", kill)
			}
			return
		}
	}
}

// TestSession goes on with half an upload.
func TestSession(t *testing.T) {
	src := &source{files: map[string]string{"big": strings.Repeat("0123456789", 1000)}}
	s, o, home := setup(t, src)
	o.Sessions = filepath.Join(t.TempDir(), "uploads")
	ctx, cancel := context.WithCancelCause(t.Context())
	patches := 0
	s.Fault = func(r *http.Request) int {
		if r.Method == "PATCH" {
			if patches++; patches == 6 {
				cancel(errors.New("killed"))
				return 503
			}
		}
		return 0
	}
	if _, err := live.Run(ctx, o); err == nil {
		t.Fatal("it was not killed")
	}
	list, err := os.ReadDir(o.Sessions)
	if err != nil || len(list) != 1 {
		t.Fatalf("%v, %v", list, err)
	}
	if st, _ := list[0].Info(); st.Mode() != fs.FileMode(0o600) {
		t.Errorf("mode %v", st.Mode())
	}
	before := s.Count("PATCH")
	run(t, o)
	sameTree(t, contents(s, home), map[string]string{"": "/", "big": src.files["big"]})
	if n := s.Count("PATCH") - before; n != 5 {
		t.Errorf("%d pieces were sent, want 5", n)
	}
	// Old ones go by age.
	stale := filepath.Join(o.Sessions, "00.upload")
	if err := os.WriteFile(stale, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(stale, noon, noon); err != nil {
		t.Fatal(err)
	}
	run(t, o)
	if _, err := os.Stat(stale); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a stale session: %v", err)
	}
}

func TestTagsAndShares(t *testing.T) {
	src := &source{
		files: map[string]string{"f": "1", "dir/g": "2"},
		names: map[string]string{"old-lynn": "lynn", "old-mary": "mary", "gone": "nobody", "old-group": "makers"},
		details: map[string]live.Details{
			"f":    {Tags: []string{"red", "Blue", "b<d"}, Grants: []ocis.Grant{{Principal: "old-lynn", Permissions: "rwtxuUq"}, {Principal: "gone", Permissions: "rtx"}}},
			"dir/": {Grants: []ocis.Grant{{Principal: "old-group", Group: true, Permissions: "rtxuq"}, {Principal: "old-mary", Permissions: "rt", Expires: time.Now().Add(time.Hour)}}},
			"dir/g": {Grants: []ocis.Grant{
				{Principal: "old-lynn", Permissions: "rtxuq", Expires: noon}, // has run out
			}},
			"": {Grants: []ocis.Grant{{Principal: "old-lynn", Permissions: "rtxucq"}, {Principal: "old-alan", Permissions: "rwadtxCcoOuUPvVq"}}},
		},
	}
	s, o, home := setup(t, src)
	lynn, bob, gid := s.AddUser("lynn", "lynn"), s.AddUser("bob", "bob"), s.AddGroup("makers")
	o.Map = map[string]string{"mary": "bob"}
	res := run(t, o)
	if i := s.Items(home)["f"]; !slices.Equal(i.Tags, []string{"red", "blue"}) || len(i.Grants) != 0 {
		t.Errorf("without shares: %+v", i)
	}
	if got := problems(res)["f"]; !strings.Contains(got, "b<d") || res.Tagged != 1 {
		t.Errorf("%+v", res)
	}
	o.Shares = true
	for range 2 {
		res = run(t, o)
		i := s.Items(home)
		if g := i["f"].Grants; len(g) != 1 || g[0].ID != lynn || g[0].Role != cloudtest.RoleFileEditor {
			t.Errorf("f: %+v", g)
		}
		g := i["dir"].Grants
		if len(g) != 2 || g[0].ID != gid || !g[0].Group || g[0].Role != cloudtest.RoleViewer || g[1].ID != bob || g[1].Role != "" ||
			!slices.Contains(g[1].Actions, "libre.graph/driveItem/content/read") || g[1].Expires == "" {
			t.Errorf("dir: %+v", g)
		}
		if len(i["dir/g"].Grants)+len(i[""].Grants) != 0 {
			t.Errorf("%+v %+v", i["dir/g"].Grants, i[""].Grants)
		}
		if !slices.ContainsFunc(res.Problems, func(p live.Problem) bool {
			return p.Kind == "share" && strings.Contains(p.Reason, `"nobody" (gone): is not in the instance`)
		}) {
			t.Errorf("%+v", res.Problems)
		}
	}
	if res.Shared != 0 {
		t.Errorf("the second run set %d shares", res.Shared)
	}
	// The members of a space, into a new one.
	admin := client(t, s, "admin")
	d, isNew, err := live.NewDrive(t.Context(), admin, "Back", "")
	if err != nil || !isNew {
		t.Fatal(d, isNew, err)
	}
	o.Client, o.Drive, o.Members = admin, d.ID, true
	run(t, o)
	g := s.Items(d.ID)[""].Grants
	if len(g) != 2 || g[1].ID != lynn || g[1].Role != cloudtest.RoleSpaceViewer {
		t.Errorf("members %+v", g)
	}
	again, isNew, err := live.NewDrive(t.Context(), admin, "Back", "")
	if err != nil || isNew || again.ID != d.ID {
		t.Error(again, isNew, err)
	}
}

func TestLinks(t *testing.T) {
	soon := time.Now().Add(48 * time.Hour).UTC().Truncate(time.Second)
	src := &source{files: map[string]string{"f": "1", "dir/g": "2"}, details: map[string]live.Details{
		"f": {Links: []live.Link{
			{Name: "open", Type: "view", Expires: soon}, {Name: "closed", Type: "edit", Password: true}, {Name: "over", Type: "view", Expires: noon}, {Name: "odd"},
		}},
		"dir/": {Links: []live.Link{{Name: "drop", Type: "createOnly"}, {Type: "internal", Password: true}}},
		"":     {Links: []live.Link{{Name: "all", Type: "view"}}},
	}}
	s, o, home := setup(t, src)
	if run(t, o); len(s.Items(home)["f"].Links) != 0 {
		t.Error("links were made without being asked for")
	}
	o.Shares = true
	res := run(t, o)
	i := s.Items(home)
	if l := i["f"].Links; len(l) != 2 || l[0] != (cloudtest.Link{Type: "view", Name: "open", Expires: soon.Format(time.RFC3339)}) ||
		l[1].Name != "closed" || l[1].Type != "edit" || len(l[1].Password) < 20 {
		t.Errorf("f: %+v", l)
	}
	if l := i["dir"].Links; len(l) != 2 || l[0] != (cloudtest.Link{Type: "createOnly", Name: "drop"}) || l[1] != (cloudtest.Link{Type: "internal"}) {
		t.Errorf("dir: %+v", l)
	}
	said := ""
	for _, p := range res.Problems {
		said += fmt.Sprintln(p.Kind, p.Path, p.Reason)
	}
	if res.Links != 4 || res.ProblemCount != 2 || !strings.Contains(said, `link f "closed" (edit): it had a password`) || !strings.Contains(said, `link f "odd" (): it allows what`) {
		t.Errorf("%+v", res)
	}
	if strings.Contains(said, i["f"].Links[1].Password) {
		t.Error("the password was told")
	}
	if res = run(t, o); res.Links != 0 || res.ProblemCount != 1 || len(s.Items(home)["f"].Links) != 2 {
		t.Errorf("the second run: %+v", res)
	}
	// A server that wants passwords, and the whole of a space.
	s, o, _ = setup(t, src)
	s.LinkPasswords = true
	admin := client(t, s, "admin")
	d, _, err := live.NewDrive(t.Context(), admin, "Back", "")
	if err != nil {
		t.Fatal(err)
	}
	o.Client, o.Drive, o.Shares, o.Members = admin, d.ID, true, true
	src.details[""] = live.Details{Links: []live.Link{{Name: "all", Type: "edit", Password: true}}}
	res = run(t, o)
	if l := s.Items(d.ID)[""].Links; len(l) != 1 || l[0].Name != "all" || res.ProblemCount != 5 {
		t.Errorf("%+v, %+v", l, res)
	}
	if got := problems(res)["dir"]; !strings.Contains(got, "password protection is enforced") {
		t.Errorf("%q", got)
	}
}

func TestFindDrive(t *testing.T) {
	s := cloudtest.New(t)
	s.AddUser("alan", "alan")
	home, project := s.Home("alan"), s.AddProject("Alpha", "alan")
	id := func(drive string) string { _, x, _ := strings.Cut(drive, "$"); return x }
	c := client(t, s, "alan")
	for name, x := range map[string]struct {
		space live.Space
		m     map[string]string
		want  string
		why   string
	}{
		"the same":      {space: live.Space{ID: id(home), Kind: "personal"}, want: home},
		"project":       {space: live.Space{ID: id(project), Kind: "project"}, want: project},
		"gone project":  {space: live.Space{ID: "x", Kind: "project"}, why: "is not there for the user"},
		"new id":        {space: live.Space{ID: "x", Kind: "personal", OwnerLogin: "alan"}, want: home},
		"mapped":        {space: live.Space{ID: "x", Kind: "personal", OwnerLogin: "al"}, m: map[string]string{"al": "alan"}, want: home},
		"mapped by id":  {space: live.Space{ID: "x", Kind: "personal", OwnerID: "x"}, m: map[string]string{"x": "alan"}, want: home},
		"another one's": {space: live.Space{ID: "x", Kind: "personal", OwnerLogin: "lynn"}, why: "is not there for the user"},
		"mapped away":   {space: live.Space{ID: "x", Kind: "personal", OwnerLogin: "alan"}, m: map[string]string{"alan": "lynn"}, why: "is not there"},
	} {
		d, err := live.FindDrive(t.Context(), c, x.space, x.m)
		var none *live.NoSpaceError
		if d.ID != x.want || (err != nil) != (x.why != "") || err != nil && (!errors.As(err, &none) || !strings.Contains(err.Error(), x.why) || len(none.Hints()) == 0) {
			t.Errorf("%s: %v, %v", name, d.ID, err)
		}
	}
	// A personal space that was purged: the server makes another one, but not at once.
	s.AddUser("lynn", "lynn")
	s.Purged = true
	space := live.Space{ID: "x", Kind: "personal", OwnerLogin: "lynn"}
	_, err := live.FindDrive(t.Context(), client(t, s, "lynn"), space, nil)
	var none *live.NoSpaceError
	if !errors.As(err, &none) || !strings.Contains(err.Error(), "has no personal space") || !strings.Contains(strings.Join(none.Hints(), " "), "run this again") {
		t.Errorf("just purged: %v", err)
	}
	s.Purged = false
	if d, err := live.FindDrive(t.Context(), client(t, s, "lynn"), space, nil); err != nil || d.ID != s.Home("lynn") {
		t.Errorf("purged: %v, %v", d.ID, err)
	}
}

// TestManyFiles restores a folder whose uploads are all being worked on for a while.
func TestManyFiles(t *testing.T) {
	src := &source{files: map[string]string{}}
	for i := range 200 {
		src.files[fmt.Sprintf("f%03d", i)] = fmt.Sprint("content ", i)
	}
	s, o, home := setup(t, src)
	s.Processing = 2
	res := run(t, o)
	if res.Files != 200 || len(s.Items(home)) != 201 || s.Count("PUT") != 200 {
		t.Errorf("%+v, %d requests", res, s.Count("PUT"))
	}
	if n := s.Count("PROPFIND"); n > 20 {
		t.Errorf("%d lists for one folder", n)
	}
}
