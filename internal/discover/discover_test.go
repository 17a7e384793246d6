package discover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/docker"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// write makes a tree of files: names ending in a slash are directories.
func write(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		p := filepath.Join(dir, name)
		if strings.HasSuffix(name, "/") {
			if err := os.MkdirAll(p, 0o755); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// tempDir is a temporary directory without symbolic links in its path.
func tempDir(t testing.TB) string {
	t.Helper()
	d, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func meta(prefix string, kv ...string) string {
	var a ocis.Attributes
	for i := 0; i < len(kv); i += 2 {
		a = append(a, ocis.Attribute{Key: prefix + kv[i], Value: []byte(kv[i+1])})
	}
	return string(ocis.EncodeMPK(a))
}

const spaceID = "b1f74ec4-dd7e-11ef-a543-03775734d0f7"

// addStore makes a small decomposed storage root: a space with n files, with their blobs or without.
func addStore(t testing.TB, root, prefix string, n int, blobs bool) {
	t.Helper()
	space := filepath.Join(root, ocis.SpacePath(spaceID))
	files := map[string]string{"nodes/" + ocis.NodePath(spaceID) + ".mpk": meta(prefix, "type", "2", "name", "s")}
	for i := range n {
		id := "0000000" + string(rune('a'+i)) + "-8dfe-4162-a81a-8f4d5f0a7d11"
		blob := "1111111" + string(rune('a'+i)) + "-8dfe-4162-a81a-8f4d5f0a7d11"
		files["nodes/"+ocis.NodePath(id)] = ""
		files["nodes/"+ocis.NodePath(id)+".mpk"] = meta(prefix, "type", "1", "blobid", blob, "blobsize", "5")
		if blobs {
			files["blobs/"+ocis.NodePath(blob)] = "hello"
		}
	}
	write(t, space, files)
}

// addInstance makes a small instance of a product.
func addInstance(t testing.TB, base, config string, p ocis.Product) {
	t.Helper()
	prefix, db := "user.ocis.", "ocis.boltdb"
	if p == ocis.OpenCloud {
		prefix, db = "user.oc.", "idm.boltdb"
	}
	addStore(t, filepath.Join(base, "storage/users"), prefix, 4, true)
	addStore(t, filepath.Join(base, "storage/metadata"), prefix, 3, true)
	write(t, base, map[string]string{"idm/" + db: "db", "idm/ldap.crt": "c", "nats/jetstream/": "", "search/bleve/store/root.bolt": "x",
		"idp/private-key.pem": "k", "proxy/server.crt": "c", "storage/ocm/ocmshares.json": "{}"})
	if config != "" {
		write(t, config, map[string]string{string(p) + ".yaml": "token_manager:\n  jwt_secret: s\n"})
	}
}

// quiet are options that look at nothing of this machine.
func quiet(root string) Options {
	c, err := docker.New("unix:///nonexistent/holdfast-test.sock")
	if err != nil {
		panic(err)
	}
	return Options{Root: root, Environ: []string{"HOME=/home/none"}, Docker: c,
		RunVersion: func(context.Context, string) (string, error) { return "", errors.New("not run in tests") }}
}

func mustDiscover(t testing.TB, o Options) *ocis.Instance {
	t.Helper()
	in, err := Discover(context.Background(), o)
	if err != nil {
		t.Fatalf("discover: %v (hints %q)", err, hints(err))
	}
	check(t, in)
	return in
}

// check states what holds of every result.
func check(t testing.TB, in *ocis.Instance) {
	t.Helper()
	seen := map[string]bool{}
	for _, d := range in.DataSets {
		if seen[d.Name] {
			t.Errorf("data set %s stands twice", d.Name)
		}
		seen[d.Name] = true
		if !filepath.IsAbs(d.Path) || filepath.Clean(d.Path) != d.Path {
			t.Errorf("data set %s has path %q", d.Name, d.Path)
		}
		if d.Class == "" || d.Kind == "" || d.IfMissing == "" || d.Mount == "" || d.Filesystem == "" {
			t.Errorf("data set %s is not complete: %+v", d.Name, d)
		}
		if (d.Kind == ocis.Metadata || d.Kind == ocis.Blobs) != (d.Store != "") {
			t.Errorf("data set %s of kind %s has store %q", d.Name, d.Kind, d.Store)
		}
		if d.Store != "" && in.Store(d.Store) == nil {
			t.Errorf("data set %s has unknown store %q", d.Name, d.Store)
		}
		if d.Kind == ocis.Config && d.Name != "config" {
			t.Errorf("second config data set %s", d.Name)
		}
	}
	if _, err := json.Marshal(in); err != nil {
		t.Error(err)
	}
}

func hints(err error) []string {
	var h interface{ Hints() []string }
	if errors.As(err, &h) {
		return h.Hints()
	}
	return nil
}

func set(t testing.TB, in *ocis.Instance, name string) ocis.DataSet {
	t.Helper()
	for _, d := range in.DataSets {
		if d.Name == name {
			return d
		}
	}
	var names []string
	for _, d := range in.DataSets {
		names = append(names, d.Name)
	}
	t.Fatalf("no data set %s in %q", name, names)
	return ocis.DataSet{}
}

func names(in *ocis.Instance) []string {
	var l []string
	for _, d := range in.DataSets {
		l = append(l, d.Name)
	}
	return l
}

func hasWarning(in *ocis.Instance, part string) bool {
	return slices.ContainsFunc(in.Warnings, func(w string) bool { return strings.Contains(w, part) })
}

// shared holds the sample instances for all tests: unpacking them takes longer than the tests.
var shared string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "discover-test-")
	if err == nil {
		shared, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// fixture is a sample instance; whoever changes it puts it back.
func fixture(t *testing.T, name string) string {
	t.Helper()
	dir := filepath.Join(shared, name)
	if _, err := os.Stat(dir); err != nil {
		return testfixture.UnpackInto(t, name, shared)
	}
	return dir
}

func TestFixtures(t *testing.T) {
	for _, c := range []struct {
		name   string
		env    string
		driver string
		layout ocis.Layout
		prefix string
		system string // prefix
		setup  string
	}{
		{testfixture.OCIS, "", "ocis", ocis.Decomposed, "user.ocis.", "user.oc.", "posix"},
		{testfixture.OCIS, "STORAGE_USERS_DRIVER=ocis\n", "ocis", ocis.Decomposed, "user.ocis.", "user.oc.", "posix"},
		{testfixture.OpenCloud, "", "decomposed", ocis.Decomposed, "user.oc.", "user.oc.", "posix"},
		{testfixture.OpenCloudPosix, "", "posix", ocis.Posix, "user.oc.", "user.oc.", "posix"},
		{testfixture.OpenCloudPosix, "STORAGE_USERS_DRIVER=posix\n", "posix", ocis.Posix, "user.oc.", "user.oc.", "posix"},
		{testfixture.OCISWithS3Blobs, "STORAGE_USERS_DRIVER=s3ng\nSTORAGE_USERS_DECOMPOSEDS3_ENDPOINT=http://localhost:9000\nSTORAGE_USERS_DECOMPOSEDS3_BUCKET=b\n" +
			"STORAGE_USERS_DECOMPOSEDS3_ACCESS_KEY=a\nSTORAGE_USERS_DECOMPOSEDS3_SECRET_KEY=s\n", "s3ng", ocis.Decomposed, "user.ocis.", "user.oc.", "s3"},
		{testfixture.OCISWithS3Blobs, "STORAGE_USERS_DECOMPOSEDS3_ENDPOINT=http://localhost:9000\nSTORAGE_USERS_DECOMPOSEDS3_BUCKET=b\n" +
			"STORAGE_USERS_DECOMPOSEDS3_ACCESS_KEY=a\nSTORAGE_USERS_DECOMPOSEDS3_SECRET_KEY=s\n", "s3ng", ocis.Decomposed, "user.ocis.", "user.oc.", "s3"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := fixture(t, c.name)
			o := quiet(tempDir(t))
			o.BaseDataPath, o.ConfigDir = filepath.Join(dir, "data"), filepath.Join(dir, "config")
			if c.env != "" {
				envDir := t.TempDir()
				write(t, envDir, map[string]string{"x.env": c.env})
				o.EnvFiles = []string{filepath.Join(envDir, "x.env")}
			}
			in := mustDiscover(t, o)
			u, s := in.Store("users"), in.Store("system")
			if in.Product != ocis.OpenCloud || in.Setup != c.setup || u.Driver != c.driver || u.Layout != c.layout || u.Prefix != c.prefix || s.Prefix != c.system {
				t.Errorf("got %s %s, users %+v, system %+v", in.Product, in.Setup, *u, *s)
			}
			if len(in.Warnings) > 0 {
				t.Errorf("warnings: %q", in.Warnings)
			}
			if (u.S3 != nil) != (c.setup == "s3") || slices.Contains(names(in), "storage-users-blobs") == (c.setup == "s3") {
				t.Errorf("S3 %v, data sets %q", u.S3, names(in))
			}
			// Every entry below data and config is counted exactly once.
			var entries, bytes, want, wantBytes int64
			for _, d := range in.DataSets {
				entries, bytes = entries+d.Entries, bytes+d.Bytes
			}
			for _, sub := range []string{"data", "config"} {
				if err := filepath.WalkDir(filepath.Join(dir, sub), func(_ string, e os.DirEntry, err error) error {
					if err != nil {
						return err
					}
					want++
					if e.Type().IsRegular() {
						st, err := e.Info()
						if err != nil {
							return err
						}
						wantBytes += st.Size()
					}
					return nil
				}); err != nil {
					t.Fatal(err)
				}
			}
			// The root of a nested data set is an entry of the outer one as well.
			nested := int64(0)
			for _, d := range in.DataSets {
				if d.Found && d.Kind != ocis.Blobs && d.Name != "config" && d.Name != "base" {
					nested++
				}
			}
			if entries != want+nested || bytes < wantBytes {
				t.Errorf("counted %d entries (%d nested), %d bytes; there are %d, %d", entries, nested, bytes, want, wantBytes)
			}
		})
	}
}

// TestOCISNames renames what the fixture has of OpenCloud's names.
func TestOCISNames(t *testing.T) {
	dir := fixture(t, testfixture.OCIS)
	for _, r := range [][2]string{{"config/opencloud.yaml", "config/ocis.yaml"}, {"data/idm/idm.boltdb", "data/idm/ocis.boltdb"}} {
		if err := os.Rename(filepath.Join(dir, r[0]), filepath.Join(dir, r[1])); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.Rename(filepath.Join(dir, r[1]), filepath.Join(dir, r[0])); err != nil {
				t.Error(err)
			}
		})
	}
	o := quiet(tempDir(t))
	o.BaseDataPath, o.ConfigDir = filepath.Join(dir, "data"), filepath.Join(dir, "config")
	in := mustDiscover(t, o)
	if in.Product != ocis.OCIS || in.Store("users").Driver != "ocis" {
		t.Errorf("got %s, %+v", in.Product, in.Stores)
	}
}

func TestS3WithoutSettings(t *testing.T) {
	dir := fixture(t, testfixture.OCISWithS3Blobs)
	for name, c := range map[string]struct {
		env  string
		want []string
	}{
		"no driver":       {"X=1\n", []string{"STORAGE_USERS_DRIVER", "is not set", "STORAGE_USERS_DECOMPOSEDS3_ENDPOINT"}},
		"driver alone":    {"STORAGE_USERS_DRIVER=s3ng\n", []string{"x.env, line 1", "STORAGE_USERS_DECOMPOSEDS3_BUCKET", "STORAGE_USERS_DECOMPOSEDS3_SECRET_KEY"}},
		"local driver":    {"STORAGE_USERS_DRIVER=ocis\n", []string{"x.env, line 1", "the blobs are not in"}},
		"wrong prefix":    {"STORAGE_USERS_DRIVER=decomposed_s3\n", []string{"user.ocis.", "user.oc."}},
		"wrong layout":    {"# c\nSTORAGE_USERS_DRIVER=posix\n", []string{"x.env, line 2", "decomposed layout"}},
		"unknown driver":  {"STORAGE_USERS_DRIVER=floppy\n", []string{"no such driver"}},
		"foreign driver":  {"STORAGE_USERS_DRIVER=kiteworks\n", []string{"does not know how to back up"}},
		"broken number":   {"STORAGE_USERS_DRIVER=s3ng\nSTORAGE_USERS_DECOMPOSEDS3_PUT_OBJECT_PART_SIZE=big\n", []string{"PART_SIZE=big", "line 2", "whole number"}},
		"broken flag":     {"STORAGE_USERS_DRIVER=s3ng\nSTORAGE_USERS_DECOMPOSEDS3_PUT_OBJECT_SEND_CONTENT_MD5=often\n", []string{"neither true nor false"}},
		"names of oCIS":   {"STORAGE_USERS_DRIVER=s3ng\nSTORAGE_USERS_S3NG_ENDPOINT=http://x\n", []string{"STORAGE_USERS_DECOMPOSEDS3_ENDPOINT"}},
		"system on S3":    {"STORAGE_SYSTEM_DRIVER=s3ng\nSTORAGE_USERS_DRIVER=s3ng\nSTORAGE_USERS_DECOMPOSEDS3_ENDPOINT=http://localhost:9000\nSTORAGE_USERS_DECOMPOSEDS3_BUCKET=b\nSTORAGE_USERS_DECOMPOSEDS3_ACCESS_KEY=a\nSTORAGE_USERS_DECOMPOSEDS3_SECRET_KEY=s\n", []string{"STORAGE_SYSTEM_DRIVER=s3ng", "system storage"}},
		"root is missing": {"STORAGE_USERS_DRIVER=s3ng\nSTORAGE_USERS_DECOMPOSEDS3_ROOT=/nonexistent/users\n", []string{"STORAGE_USERS_DECOMPOSEDS3_ROOT=/nonexistent/users", "line 2", "does not exist"}},
		"empty root":      {"STORAGE_USERS_DRIVER=s3ng\nSTORAGE_USERS_DECOMPOSEDS3_ROOT=\n", []string{"set but empty"}},
	} {
		t.Run(name, func(t *testing.T) {
			o := quiet(tempDir(t))
			o.BaseDataPath, o.ConfigDir, o.NoSizes = filepath.Join(dir, "data"), filepath.Join(dir, "config"), true
			f := filepath.Join(t.TempDir(), "x.env")
			if err := os.WriteFile(f, []byte(c.env), 0o600); err != nil {
				t.Fatal(err)
			}
			o.EnvFiles = []string{f}
			wantError(t, o, c.want...)
		})
	}
}

// wantError expects a *SettingError whose text holds all the parts.
func wantError(t *testing.T, o Options, parts ...string) error {
	t.Helper()
	_, err := Discover(context.Background(), o)
	if err == nil {
		t.Fatal("no error")
	}
	var se *SettingError
	if !errors.As(err, &se) {
		t.Fatalf("%T: %v", err, err)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not hold %q", err, p)
		}
	}
	return err
}

func TestDefaultPlaces(t *testing.T) {
	t.Run("one", func(t *testing.T) {
		for _, p := range products {
			root := tempDir(t)
			addInstance(t, filepath.Join(root, "var/lib", string(p)), filepath.Join(root, "etc", string(p)), p)
			in := mustDiscover(t, quiet(root))
			if in.Product != p || in.BasePath != filepath.Join(root, "var/lib", string(p)) || in.ConfigDir != filepath.Join(root, "etc", string(p)) {
				t.Errorf("got %s, %s, %s", in.Product, in.BasePath, in.ConfigDir)
			}
			if len(in.Warnings) > 0 {
				t.Errorf("warnings %q", in.Warnings)
			}
			if in.ServerBasePath != "/var/lib/"+string(p) {
				t.Errorf("server path %q", in.ServerBasePath)
			}
		}
	})
	t.Run("home", func(t *testing.T) {
		root := tempDir(t)
		addInstance(t, filepath.Join(root, "home/none/.ocis"), filepath.Join(root, "home/none/.ocis/config"), ocis.OCIS)
		in := mustDiscover(t, quiet(root))
		if in.BasePath != filepath.Join(root, "home/none/.ocis") || in.ConfigDir != filepath.Join(in.BasePath, "config") {
			t.Errorf("got %s, %s", in.BasePath, in.ConfigDir)
		}
		// The configuration lies in the data: it must not be counted twice.
		if c, b := set(t, in, "config"), set(t, in, "base"); c.Entries != 2 || b.Path != in.BasePath {
			t.Errorf("config %+v, base %+v", c, b)
		}
	})
	t.Run("both", func(t *testing.T) {
		root := tempDir(t)
		for _, p := range products {
			addInstance(t, filepath.Join(root, "var/lib", string(p)), filepath.Join(root, "etc", string(p)), p)
		}
		_, err := Discover(context.Background(), quiet(root))
		var a *AmbiguousError
		if !errors.As(err, &a) || len(a.Choices) != 2 || len(hints(err)) == 0 || !strings.Contains(err.Error(), "var/lib/opencloud") {
			t.Fatalf("got %v", err)
		}
		o := quiet(root)
		o.ConfigDir = filepath.Join(root, "etc/ocis")
		if in := mustDiscover(t, o); in.Product != ocis.OCIS {
			t.Errorf("got %s", in.Product)
		}
		o = quiet(root)
		o.Environ = append(o.Environ, "OC_URL=https://cloud.example")
		if in := mustDiscover(t, o); in.Product != ocis.OpenCloud || in.URL != "https://cloud.example" {
			t.Errorf("got %s", in.Product)
		}
	})
	t.Run("none", func(t *testing.T) {
		_, err := Discover(context.Background(), quiet(tempDir(t)))
		var n *NoInstanceError
		if !errors.As(err, &n) || len(n.Looked) != 4 || len(hints(err)) == 0 {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("empty base", func(t *testing.T) {
		o := quiet(tempDir(t))
		o.BaseDataPath = tempDir(t)
		_, err := Discover(context.Background(), o)
		var n *NoInstanceError
		if !errors.As(err, &n) || !strings.Contains(strings.Join(hints(err), ""), "--map") || !strings.Contains(err.Error(), "idm/ocis.boltdb") {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("no such base", func(t *testing.T) {
		o := quiet(tempDir(t))
		o.BaseDataPath = "/nonexistent/data"
		err := wantError(t, o, "--base-data-path=/nonexistent/data", "no such directory")
		if !strings.Contains(strings.Join(hints(err), ""), "mounted") {
			t.Errorf("hints: %q", hints(err))
		}
	})
}

func TestMoved(t *testing.T) {
	root := tempDir(t)
	base, config, other := filepath.Join(root, "srv/data"), filepath.Join(root, "srv/config"), filepath.Join(root, "mnt/other")
	addInstance(t, base, config, ocis.OCIS)
	for _, m := range [][2]string{{"storage/users", "users"}, {"storage/metadata", "meta"}, {"nats", "nats"}, {"search", "search"}, {"idm/ocis.boltdb", "db/o.boltdb"}} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(other, m[1])), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(base, m[0]), filepath.Join(other, m[1])); err != nil {
			t.Fatal(err)
		}
	}
	write(t, other, map[string]string{"themes/a.json": "{}", "ldap-ca.crt": "x", "providers.json": "[]", "keys/a.pem": "", "keys/b.pem": ""})
	write(t, base, map[string]string{"appauth.json": "{}", "idm/ocis-old.boltdb": ""})
	write(t, config, map[string]string{
		"ocis.yaml": "storage_users:\n  drivers:\n    ocis:\n      root: /wrong\nstorage_system:\n  drivers:\n    ocis:\n      root: ${META_ROOT | /mnt/other/meta}\n" +
			"ocis_url: ${THE_URL|https://a.example}\n",
		"storage-users.yaml": "drivers:\n  ocis:\n    root: /mnt/other/users\n",
		"nats.yaml":          "nats:\n  store_dir: /nonexistent\n",
	})
	env := filepath.Join(root, "ocis.env")
	write(t, root, map[string]string{"ocis.env": "OCIS_BASE_DATA_PATH=/srv/data\nOCIS_CONFIG_DIR=/srv/config\nNATS_NATS_STORE_DIR=/mnt/other/nats\n" +
		"SEARCH_ENGINE_BLEVE_DATA_PATH=/mnt/other/search/\nIDM_DATABASE_PATH=/mnt/other/db/o.boltdb\n" +
		"WEB_ASSET_THEMES_PATH=/mnt/other/themes\nOCIS_ASSET_THEMES_PATH=/nonexistent\nOCIS_LDAP_CACERT=/mnt/other/ldap-ca.crt\nOCIS_LDAP_URI=ldaps://localhost:9235\n" +
		"OCM_OCM_PROVIDER_AUTHORIZER_PROVIDERS_FILE=/mnt/other/providers.json\nIDP_SIGNING_PRIVATE_KEY_FILES=/mnt/other/keys/a.pem, /mnt/other/keys/b.pem\n" +
		"IDM_LDAPS_CERT=/srv/data/idm/my.crt\nTHUMBNAILS_FILESYSTEMSTORAGE_ROOT=/nonexistent/thumbs\nOCIS_LOG_FILE=/var/log/ocis.log\n"})
	o := quiet(root)
	o.EnvFiles = []string{env}
	in := mustDiscover(t, o)
	for name, want := range map[string]struct {
		path, setting string
		class         ocis.Class
		found         bool
	}{
		"config":               {"srv/config", "OCIS_CONFIG_DIR in " + env + ", line 2", ocis.Recommended, true},
		"base":                 {"srv/data", "OCIS_BASE_DATA_PATH in " + env + ", line 1", ocis.Required, true},
		"nats":                 {"mnt/other/nats", "NATS_NATS_STORE_DIR in " + env + ", line 3", ocis.Recommended, true},
		"search":               {"mnt/other/search", "SEARCH_ENGINE_BLEVE_DATA_PATH in " + env + ", line 4", ocis.Recommended, true},
		"idm":                  {"srv/data/idm", "", ocis.Optional, true},
		"idm-database":         {"mnt/other/db/o.boltdb", "IDM_DATABASE_PATH in " + env + ", line 5", ocis.Required, true},
		"web-themes":           {"mnt/other/themes", "WEB_ASSET_THEMES_PATH in " + env + ", line 6", ocis.Recommended, true},
		"ldap-certificate":     {"mnt/other/ldap-ca.crt", "OCIS_LDAP_CACERT in " + env + ", line 8", ocis.Recommended, true},
		"ocm-providers":        {"mnt/other/providers.json", "OCM_OCM_PROVIDER_AUTHORIZER_PROVIDERS_FILE in " + env + ", line 10", ocis.Recommended, true},
		"idp-signing-key":      {"mnt/other/keys/a.pem", "IDP_SIGNING_PRIVATE_KEY_FILES in " + env + ", line 11", ocis.Recommended, true},
		"idp-signing-key-2":    {"mnt/other/keys/b.pem", "IDP_SIGNING_PRIVATE_KEY_FILES in " + env + ", line 11", ocis.Recommended, true},
		"storage-users":        {"mnt/other/users", "drivers.ocis.root in " + filepath.Join(config, "storage-users.yaml") + ", line 3", ocis.Required, true},
		"storage-system":       {"mnt/other/meta", "storage_system.drivers.ocis.root in " + filepath.Join(config, "ocis.yaml") + ", line 8", ocis.Required, true},
		"storage-users-blobs":  {"mnt/other/users", "drivers.ocis.root in " + filepath.Join(config, "storage-users.yaml") + ", line 3", ocis.Required, true},
		"thumbnails":           {"nonexistent/thumbs", "THUMBNAILS_FILESYSTEMSTORAGE_ROOT in " + env + ", line 13", ocis.Optional, false},
		"ocm":                  {"srv/data/storage/ocm", "", ocis.Required, true},
		"storage-system-blobs": {"mnt/other/meta", "storage_system.drivers.ocis.root in " + filepath.Join(config, "ocis.yaml") + ", line 8", ocis.Required, true},
		"proxy":                {"srv/data/proxy", "", ocis.Optional, true},
		"web":                  {"srv/data/web", "", ocis.Recommended, false},
		"idp":                  {"srv/data/idp", "", ocis.Recommended, true},
	} {
		d := set(t, in, name)
		if d.Path != filepath.Join(root, want.path) || d.Setting != want.setting || d.Class != want.class || d.Found != want.found || d.ServerPath != "/"+want.path {
			t.Errorf("%s: got %+v", name, d)
		}
	}
	if len(in.DataSets) != 20 {
		t.Errorf("data sets %q", names(in))
	}
	if in.URL != "https://a.example" {
		t.Errorf("URL %q", in.URL)
	}
	// appauth.json and the empty folders storage, with the roots of the nested data sets.
	if d := set(t, in, "base"); d.Entries != 7 || d.Bytes != 2 {
		t.Errorf("base has %d entries, %d bytes", d.Entries, d.Bytes)
	}
	m, bl := set(t, in, "storage-users"), set(t, in, "storage-users-blobs")
	if bl.Bytes != 20 || m.Entries == 0 || m.Bytes == 0 {
		t.Errorf("metadata %+v, blobs %+v", m, bl)
	}
	if !hasWarning(in, "thumbs") {
		t.Errorf("warnings %q", in.Warnings)
	}
	if len(in.Environment) != 2 || in.Environment[0].Name != "ocis.env" || in.Environment[0].Path != env || len(in.Environment[0].Content) == 0 {
		t.Errorf("environment %+v", in.Environment)
	}
}

func TestMap(t *testing.T) {
	root := tempDir(t)
	addInstance(t, filepath.Join(root, "data"), filepath.Join(root, "conf"), ocis.OCIS)
	if err := os.Rename(filepath.Join(root, "data/storage/users"), filepath.Join(root, "users")); err != nil {
		t.Fatal(err)
	}
	env := "OCIS_BASE_DATA_PATH=/var/lib/ocis\nOCIS_CONFIG_DIR=/etc/ocis\nSTORAGE_USERS_OCIS_ROOT=/var/lib/ocis/storage/users\n"
	write(t, root, map[string]string{"ocis.env": env})
	check := func(t *testing.T, o Options) {
		t.Helper()
		o.EnvFiles = []string{filepath.Join(root, "ocis.env")}
		in := mustDiscover(t, o)
		if in.BasePath != filepath.Join(root, "data") || in.ServerBasePath != "/var/lib/ocis" || in.ServerConfigDir != "/etc/ocis" {
			t.Errorf("base %s, %s, config %s, %s", in.BasePath, in.ServerBasePath, in.ConfigDir, in.ServerConfigDir)
		}
		if d := set(t, in, "storage-users"); d.Path != filepath.Join(root, "users") || d.ServerPath != "/var/lib/ocis/storage/users" {
			t.Errorf("users: %+v", d)
		}
		if d := set(t, in, "idm"); d.Path != filepath.Join(root, "data/idm") || d.ServerPath != "/var/lib/ocis/idm" {
			t.Errorf("idm: %+v", d)
		}
	}
	users := PathMap{"/var/lib/ocis/storage/users", filepath.Join(root, "users")}
	t.Run("longest prefix", func(t *testing.T) {
		o := quiet(tempDir(t))
		o.Map = []PathMap{{"/var/lib/ocis", filepath.Join(root, "data")}, users, {"/etc/ocis", filepath.Join(root, "conf")}}
		check(t, o)
	})
	t.Run("flags name host paths", func(t *testing.T) {
		o := quiet(tempDir(t))
		o.BaseDataPath, o.ConfigDir, o.Map = filepath.Join(root, "data"), filepath.Join(root, "conf"), []PathMap{users}
		check(t, o)
	})
	t.Run("flags name server paths", func(t *testing.T) {
		o := quiet(tempDir(t))
		o.BaseDataPath, o.ConfigDir = "/var/lib/ocis", "/etc/ocis"
		o.Map = []PathMap{{"/var/lib/ocis", filepath.Join(root, "data")}, users, {"/etc/ocis", filepath.Join(root, "conf")}}
		check(t, o)
	})
	t.Run("without", func(t *testing.T) {
		o := quiet(tempDir(t))
		o.EnvFiles = []string{filepath.Join(root, "ocis.env")}
		err := wantError(t, o, "OCIS_BASE_DATA_PATH=/var/lib/ocis", "line 1", "no such directory")
		if !strings.Contains(strings.Join(hints(err), ""), "--map /var/lib/ocis=") {
			t.Errorf("hints %q", hints(err))
		}
	})
	t.Run("relative", func(t *testing.T) {
		o := quiet(tempDir(t))
		o.Map = []PathMap{{"var", "/x"}}
		wantError(t, o, "--map", "absolute")
	})
}

func TestSymlinks(t *testing.T) {
	root := tempDir(t)
	base := filepath.Join(root, "var/lib/ocis")
	addInstance(t, base, filepath.Join(root, "etc/ocis"), ocis.OCIS)
	for _, name := range []string{"storage/users", "nats", "custom"} {
		to := filepath.Join(root, "big", filepath.Base(name))
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		if name == "custom" {
			write(t, to, map[string]string{"f": "x"})
		} else if err := os.Rename(filepath.Join(base, name), to); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, filepath.Join(base, name)); err != nil {
			t.Fatal(err)
		}
	}
	in := mustDiscover(t, quiet(root))
	for name, want := range map[string]string{"storage-users": "big/users", "nats": "big/nats", "link-custom": "big/custom"} {
		if d := set(t, in, name); d.Path != filepath.Join(root, want) || !d.Found || d.ServerPath == "" {
			t.Errorf("%s: %+v", name, d)
		}
	}
	if in.Store("users").Root != filepath.Join(root, "big/users") {
		t.Errorf("root %s", in.Store("users").Root)
	}
}

func TestWrongSettings(t *testing.T) {
	for name, c := range map[string]struct {
		env, yaml string
		files     map[string]string
		want      []string
	}{
		"missing users root":    {env: "STORAGE_USERS_OCIS_ROOT=/nowhere", want: []string{"STORAGE_USERS_OCIS_ROOT=/nowhere in ", "does not exist"}},
		"missing root in YAML":  {yaml: "storage_users:\n  drivers:\n    ocis:\n      root: /nowhere\n", want: []string{"storage_users.drivers.ocis.root=/nowhere in ", "ocis.yaml, line 4", "does not exist"}},
		"missing system root":   {env: "STORAGE_SYSTEM_OCIS_ROOT=/nowhere", want: []string{"STORAGE_SYSTEM_OCIS_ROOT=/nowhere"}},
		"missing nats":          {env: "NATS_NATS_STORE_DIR=/nowhere", want: []string{"NATS_NATS_STORE_DIR=/nowhere", "does not exist"}},
		"missing themes":        {env: "WEB_ASSET_THEMES_PATH=/nowhere", want: []string{"WEB_ASSET_THEMES_PATH=/nowhere"}},
		"relative":              {env: "STORAGE_USERS_OCIS_ROOT=data/users", want: []string{"the path is relative"}},
		"file as root":          {env: "STORAGE_USERS_OCIS_ROOT=/etc/ocis/ocis.yaml", want: []string{"is no directory"}},
		"root around base":      {env: "STORAGE_USERS_OCIS_ROOT=/var/lib", want: []string{"contains the base data path"}},
		"nats around base":      {env: "NATS_NATS_STORE_DIR=/var", want: []string{"contains the base data path"}},
		"one root for two":      {env: "STORAGE_SYSTEM_OCIS_ROOT=/var/lib/ocis/storage/users", want: []string{"contains that of store"}},
		"driver posix":          {env: "STORAGE_USERS_DRIVER=posix", want: []string{"STORAGE_USERS_DRIVER=posix", "decomposed layout"}},
		"driver in YAML":        {yaml: "storage_users:\n  driver: posix\n", want: []string{"storage_users.driver=posix in ", "line 2"}},
		"driver s3ng":           {env: "STORAGE_USERS_DRIVER=s3ng", want: []string{"the blobs lie on disk"}},
		"driver of OpenCloud":   {env: "STORAGE_USERS_DRIVER=decomposed", want: []string{"user.ocis.", "user.oc."}},
		"required variable":     {yaml: "storage_users:\n  drivers:\n    ocis:\n      root: ${ROOT | ?give a root}\n", want: []string{"variable ROOT is required: give a root", "line 4"}},
		"map as value":          {yaml: "storage_users:\n  driver: {a: b}\n", want: []string{"is not a single value"}},
		"old layout":            {files: map[string]string{"var/lib/ocis/storage/users/nodes/root/x": ""}, want: []string{"before 2022", "storage/users/nodes"}},
		"old blobs":             {files: map[string]string{"var/lib/ocis/storage/users/blobs/0": ""}, want: []string{"before 2022"}},
		"config dir is missing": {env: "OCIS_CONFIG_DIR=/nowhere", want: []string{"OCIS_CONFIG_DIR=/nowhere", "no such directory"}},
		"main YAML is no file":  {files: map[string]string{"etc/ocis/nats.yaml/": ""}, want: []string{"nats.yaml", "is a directory"}},
	} {
		t.Run(name, func(t *testing.T) {
			root := tempDir(t)
			addInstance(t, filepath.Join(root, "var/lib/ocis"), filepath.Join(root, "etc/ocis"), ocis.OCIS)
			write(t, root, c.files)
			if c.yaml != "" {
				write(t, root, map[string]string{"etc/ocis/ocis.yaml": c.yaml})
			}
			write(t, root, map[string]string{"x.env": c.env + "\n"})
			o := quiet(root)
			o.NoSizes = true
			o.EnvFiles = []string{filepath.Join(root, "x.env")}
			wantError(t, o, c.want...)
		})
	}
}

// TestDataOfAnotherProduct: data that no driver of the product at hand can have written.
func TestDataOfAnotherProduct(t *testing.T) {
	root := tempDir(t)
	addInstance(t, filepath.Join(root, "var/lib/ocis"), filepath.Join(root, "etc/elsewhere"), ocis.OpenCloud)
	addInstance(t, filepath.Join(root, "elsewhere"), filepath.Join(root, "etc/ocis"), ocis.OCIS)
	write(t, root, map[string]string{"etc/systemd/system/ocis.service": "[Service]\nExecStart=/usr/bin/ocis server\n"})
	o := quiet(root)
	o.NoSizes, o.Unit = true, "ocis.service"
	wantError(t, o, "STORAGE_USERS_DRIVER", "storage/users holds data of the driver decomposed, which ocis does not have")
}

func TestBrokenYAMLIsSkipped(t *testing.T) {
	for _, broken := range []string{"storage_users:\n  driver: posix\n bad: x\n", "a: 1\na: 2\n", "a: *nope\n", "- list\n", "\tx: 1\n"} {
		root := tempDir(t)
		addInstance(t, filepath.Join(root, "var/lib/ocis"), filepath.Join(root, "etc/ocis"), ocis.OCIS)
		write(t, root, map[string]string{"etc/ocis/ocis.yaml": broken})
		in := mustDiscover(t, quiet(root))
		if in.Store("users").Driver != "ocis" || !hasWarning(in, "ocis.yaml is no valid YAML") {
			t.Errorf("%q: %+v, %q", broken, in.Stores, in.Warnings)
		}
	}
}

func TestPosix(t *testing.T) {
	root := tempDir(t)
	base := filepath.Join(root, "var/lib/opencloud")
	addInstance(t, base, filepath.Join(root, "etc/opencloud"), ocis.OpenCloud)
	users := filepath.Join(base, "storage/users")
	if err := os.RemoveAll(users); err != nil {
		t.Fatal(err)
	}
	write(t, users, map[string]string{"users/alan/a.txt": "12345", "users/alan/.oc-nodes/aa/x.mpk": "m", "users/alan/.Trash/info/x.trashinfo": "i",
		"users/alan/a.txt.mlock": "", "indexes/by-type/personal.mpk": "x", "uploads/u": "abc"})
	t.Run("attributes lost", func(t *testing.T) {
		in := mustDiscover(t, quiet(root))
		if in.Store("users").Driver != "posix" {
			t.Errorf("%+v", in.Store("users"))
		}
	})
	if err := unix.Setxattr(filepath.Join(users, "users/alan"), "user.oc.id", []byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	in := mustDiscover(t, quiet(root))
	st := in.Store("users")
	if st.Driver != "posix" || st.Layout != ocis.Posix || st.Prefix != "user.oc." {
		t.Errorf("%+v", st)
	}
	m, bl := set(t, in, "storage-users"), set(t, in, "storage-users-blobs")
	if bl.Entries != 1 || bl.Bytes != 5 || bl.Path != m.Path || m.Bytes != 6 {
		t.Errorf("metadata %+v, blobs %+v", m, bl)
	}
	t.Run("configured as decomposed", func(t *testing.T) {
		o := quiet(root)
		o.Environ = append(o.Environ, "STORAGE_USERS_DRIVER=decomposed")
		wantError(t, o, "STORAGE_USERS_DRIVER=decomposed in the environment of holdfast", "layout of the posix driver")
	})
	t.Run("both layouts", func(t *testing.T) {
		addStore(t, users, "user.oc.", 2, true)
		wantError(t, quiet(root), "STORAGE_USERS_DRIVER", "is not set")
		o := quiet(root)
		o.Environ = append(o.Environ, "STORAGE_USERS_DRIVER=decomposed")
		mustDiscover(t, o)
	})
}

func TestVault(t *testing.T) {
	root := tempDir(t)
	base := filepath.Join(root, "var/lib/ocis")
	addInstance(t, base, filepath.Join(root, "etc/ocis"), ocis.OCIS)
	addStore(t, filepath.Join(base, "storage/users-vault"), "user.ocis.", 2, true)
	write(t, base, map[string]string{"storage/other/file": "x", "storage/owncloud/f": ""})
	t.Run("found on disk", func(t *testing.T) {
		in := mustDiscover(t, quiet(root))
		v := in.Store("users-vault")
		if v == nil || v.Root != filepath.Join(base, "storage/users-vault") || v.Driver != "ocis" || len(in.Stores) != 3 || !hasWarning(in, "users-vault") {
			t.Fatalf("%+v, %q", in.Stores, in.Warnings)
		}
		set(t, in, "storage-users-vault-blobs")
	})
	t.Run("its process", func(t *testing.T) {
		o := quiet(root)
		o.Environ = append(o.Environ, "STORAGE_USERS_ENABLE_VAULT_MODE=true", "STORAGE_USERS_OCIS_ROOT=/var/lib/ocis/storage/users-vault", "STORAGE_USERS_DRIVER=ocis")
		in := mustDiscover(t, o)
		if len(in.Stores) != 3 || in.Store("users").Root != filepath.Join(base, "storage/users") || in.Store("users-vault") == nil || hasWarning(in, "users-vault") {
			t.Fatalf("%+v, %q", in.Stores, in.Warnings)
		}
	})
}

func TestBucketSettings(t *testing.T) {
	root := tempDir(t)
	base := filepath.Join(root, "var/lib/ocis")
	addInstance(t, base, filepath.Join(root, "etc/ocis"), ocis.OCIS)
	users := filepath.Join(base, "storage/users")
	if err := os.RemoveAll(users); err != nil {
		t.Fatal(err)
	}
	addStore(t, users, "user.ocis.", 5, false)
	write(t, root, map[string]string{"etc/ocis/ocis.yaml": "storage_users:\n  driver: s3ng\n  drivers:\n    s3ng:\n      endpoint: https://s3.example\n      bucket: b\n" +
		"      access_key: a\n      secret_key: ${SECRET}\n      put_object_part_size: 33554432\n      put_object_disable_multipart: true\n      region: eu\n"})
	o := quiet(root)
	o.Environ = append(o.Environ, "SECRET=geheim", "STORAGE_USERS_S3NG_REGION=us")
	in := mustDiscover(t, o)
	want := ocis.S3{Endpoint: "https://s3.example", Region: "us", Bucket: "b", AccessKey: "a", SecretKey: "geheim", PartSize: 32 << 20,
		Threads: 4, DisableMultipart: true, SendContentMD5: true, ConcurrentParts: true}
	if got := in.Store("users").S3; in.Setup != "s3" || *got != want {
		t.Errorf("got %+v", got)
	}
	j, err := json.Marshal(in)
	if err != nil || strings.Contains(string(j), "geheim") {
		t.Errorf("secret in %s (%v)", j, err)
	}
}

// TestBucketSettingsOfAllDrivers: each setting from the YAML file under each name of the driver, and then from the
// environment, which goes before it. Reference: 4.4, Configuration.
func TestBucketSettingsOfAllDrivers(t *testing.T) {
	for _, c := range []struct {
		product             ocis.Product
		driver, yaml, env   string
		prefix, otherPrefix string
	}{
		{ocis.OCIS, "s3ng", "s3ng", "S3NG", "user.ocis.", "DECOMPOSEDS3"},
		{ocis.OpenCloud, "decomposeds3", "decomposeds3", "DECOMPOSEDS3", "user.oc.", "S3NG"},
		{ocis.OpenCloud, "decomposed_s3", "decomposed_s3", "DECOMPOSEDS3", "user.oc.", "S3NG"},
		{ocis.OpenCloud, "decomposed-s3", "decomposed-s3", "DECOMPOSEDS3", "user.oc.", "S3NG"},
		{ocis.OpenCloud, "s3ng", "decomposeds3", "DECOMPOSEDS3", "user.ocis.", "S3NG"}, // the legacy driver, with the settings of the new one
	} {
		t.Run(string(c.product)+" "+c.driver+" "+c.yaml, func(t *testing.T) {
			root := tempDir(t)
			name := map[ocis.Product]string{ocis.OCIS: "ocis", ocis.OpenCloud: "opencloud"}[c.product]
			base, config := filepath.Join(root, "var/lib", name), filepath.Join(root, "etc", name)
			addInstance(t, base, config, c.product)
			users := filepath.Join(base, "storage/users")
			if err := os.RemoveAll(users); err != nil {
				t.Fatal(err)
			}
			addStore(t, users, c.prefix, 5, false)
			yaml := "storage_users:\n  driver: " + c.driver + "\n  drivers:\n    " + c.yaml + ":\n"
			for _, kv := range []string{
				"endpoint: http://minio:9000", "region: eu-1", "bucket: b-yaml", "access_key: a-yaml", "secret_key: s-yaml",
				"put_object_disable_content_sha256: true", "put_object_disable_multipart: true", "put_object_send_content_md5: false",
				"put_object_concurrent_stream_parts: false", "put_object_num_threads: 7", "put_object_part_size: 5242880",
			} {
				yaml += "      " + kv + "\n"
			}
			write(t, config, map[string]string{name + ".yaml": yaml})
			got := func(env ...string) ocis.S3 {
				t.Helper()
				o := quiet(root)
				o.Environ = append(o.Environ, env...)
				in := mustDiscover(t, o)
				s := in.Store("users")
				if in.Setup != "s3" || s == nil || s.S3 == nil || s.Driver != c.driver || s.Prefix != c.prefix {
					t.Fatalf("setup %s, store %+v", in.Setup, s)
				}
				return *s.S3
			}
			want := ocis.S3{Endpoint: "http://minio:9000", Region: "eu-1", Bucket: "b-yaml", AccessKey: "a-yaml", SecretKey: "s-yaml",
				PartSize: 5 << 20, Threads: 7, DisableMultipart: true, DisableContentSHA256: true}
			if s := got(); s != want {
				t.Errorf("from the file: %+v", s)
			}
			p := "STORAGE_USERS_" + c.env + "_"
			env := []string{
				p + "ENDPOINT=https://s3.example:8443", p + "REGION=us", p + "BUCKET=b-env", p + "ACCESS_KEY=a-env", p + "SECRET_KEY=s-env",
				p + "PUT_OBJECT_DISABLE_CONTENT_SHA256=false", p + "PUT_OBJECT_DISABLE_MULTIPART=false", p + "PUT_OBJECT_SEND_CONTENT_MD5=true",
				p + "PUT_OBJECT_CONCURRENT_STREAM_PARTS=true", p + "PUT_OBJECT_NUM_THREADS=2", p + "PUT_OBJECT_PART_SIZE=33554432",
				"STORAGE_USERS_" + c.otherPrefix + "_BUCKET=another driver's",
			}
			want = ocis.S3{Endpoint: "https://s3.example:8443", Region: "us", Bucket: "b-env", AccessKey: "a-env", SecretKey: "s-env",
				PartSize: 32 << 20, Threads: 2, SendContentMD5: true, ConcurrentParts: true}
			if s := got(env...); s != want {
				t.Errorf("from the environment: %+v", s)
			}
			// What is not set has the product's defaults.
			write(t, config, map[string]string{name + ".yaml": "storage_users:\n  driver: " + c.driver + "\n"})
			want = ocis.S3{Endpoint: "https://s3.example:8443", Region: "default", Bucket: "b-env", AccessKey: "a-env", SecretKey: "s-env",
				Threads: 4, SendContentMD5: true, ConcurrentParts: true}
			if s := got(env[0], env[2], env[3], env[4]); s != want {
				t.Errorf("defaults: %+v", s)
			}
		})
	}
}

func TestExternalServices(t *testing.T) {
	root := tempDir(t)
	base := filepath.Join(root, "var/lib/ocis")
	addInstance(t, base, filepath.Join(root, "etc/ocis"), ocis.OCIS)
	for _, d := range []string{"idm", "nats", "storage/ocm"} {
		if err := os.RemoveAll(filepath.Join(base, d)); err != nil {
			t.Fatal(err)
		}
	}
	in := mustDiscover(t, quiet(root))
	if d := set(t, in, "idm"); d.Class != ocis.Required || d.Found || !hasWarning(in, "data set idm is required") {
		t.Errorf("%+v, %q", d, in.Warnings)
	}
	if d := set(t, in, "ocm"); d.Class != ocis.Optional {
		t.Errorf("%+v", d)
	}
	o := quiet(root)
	o.Environ = append(o.Environ, "OCIS_LDAP_URI=ldaps://ldap.example:636", "OCIS_EXCLUDE_RUN_SERVICES=foo,nats", "SEARCH_ENGINE_TYPE=open-search")
	in = mustDiscover(t, o)
	for _, n := range []string{"idm", "nats", "search"} {
		if d := set(t, in, n); d.Class != ocis.Optional {
			t.Errorf("%+v", d)
		}
	}
	if len(in.Warnings) > 0 {
		t.Errorf("warnings %q", in.Warnings)
	}
}

// TestIdmNotInUse: what a switched-off service was configured with does not matter.
func TestIdmNotInUse(t *testing.T) {
	root := tempDir(t)
	base := filepath.Join(root, "var/lib/ocis")
	addInstance(t, base, filepath.Join(root, "etc/ocis"), ocis.OCIS)
	if err := os.RemoveAll(filepath.Join(base, "idm")); err != nil {
		t.Fatal(err)
	}
	o := quiet(root)
	o.Environ = append(o.Environ, "IDM_DATABASE_PATH=/gone/ocis.boltdb")
	wantError(t, o, "IDM_DATABASE_PATH=/gone/ocis.boltdb", "does not exist")
	o.Environ = append(o.Environ, "OCIS_EXCLUDE_RUN_SERVICES=idm")
	if in := mustDiscover(t, o); slices.Contains(names(in), "idm-database") {
		t.Errorf("data sets %q", names(in))
	}
}

// TestConfigOfAnother: a base data path by flag must not silently get the configuration of the host.
func TestConfigOfAnother(t *testing.T) {
	root := tempDir(t)
	addInstance(t, filepath.Join(root, "srv/test"), filepath.Join(root, "etc/ocis"), ocis.OCIS)
	o := quiet(root)
	o.BaseDataPath = filepath.Join(root, "srv/test")
	if in := mustDiscover(t, o); in.ConfigDir != filepath.Join(root, "etc/ocis") || !hasWarning(in, "--config-dir") {
		t.Errorf("got %s, %q", in.ConfigDir, in.Warnings)
	}
}

func TestNoData(t *testing.T) {
	for version, want := range map[string]string{"1.0.0": "decomposed", "3.0.0": "posix"} {
		root := tempDir(t)
		write(t, root, map[string]string{"var/lib/opencloud/idm/idm.boltdb": "", "bin/opencloud": ""})
		o := quiet(root)
		o.ServerBinary = filepath.Join(root, "bin/opencloud")
		o.RunVersion = func(context.Context, string) (string, error) { return version, nil }
		in := mustDiscover(t, o)
		if in.Store("users").Driver != want || set(t, in, "storage-users").Found || !hasWarning(in, "data set storage-users is required") {
			t.Errorf("%s: %+v", version, in.Stores)
		}
	}
}

func TestUnreadablePlacesAreTold(t *testing.T) {
	dir := tempDir(t)
	write(t, dir, map[string]string{"f": "x"})
	w := &walker{t: new(tally), seen: new(atomic.Int64), root: dir}
	for range 5 {
		if err := w.dir(context.Background(), filepath.Join(dir, "f")); err != nil {
			t.Fatal(err)
		}
	}
	if len(w.errs) != 3 || w.more != 2 || !strings.Contains(w.errs[0], filepath.Join(dir, "f")+": not a directory") {
		t.Errorf("%q, %d more", w.errs, w.more)
	}
}

func TestConfigIsBase(t *testing.T) {
	root := tempDir(t)
	addInstance(t, filepath.Join(root, "d"), filepath.Join(root, "d"), ocis.OCIS)
	o := quiet(tempDir(t))
	o.BaseDataPath, o.ConfigDir = filepath.Join(root, "d"), filepath.Join(root, "d")
	in := mustDiscover(t, o)
	if slices.Contains(names(in), "base") {
		t.Errorf("data sets %q", names(in))
	}
}

func TestCancelAndProgress(t *testing.T) {
	root := tempDir(t)
	addInstance(t, filepath.Join(root, "var/lib/ocis"), filepath.Join(root, "etc/ocis"), ocis.OCIS)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Discover(ctx, quiet(root)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	var kinds []progress.Kind
	o := quiet(root)
	o.Progress = func(e progress.Event) { kinds = append(kinds, e.Kind) }
	mustDiscover(t, o)
	if len(kinds) != 2 || kinds[0] != progress.Start || kinds[1] != progress.Finish {
		t.Errorf("events %q", kinds)
	}
}
