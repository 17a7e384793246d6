package discover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/docker"
	"github.com/holdfast-backup/holdfast/internal/ocis"
)

func envNames(in *ocis.Instance) string {
	var l []string
	for _, e := range in.Environment {
		if e.Name != EffectiveFile {
			l = append(l, e.Name)
		}
	}
	slices.Sort(l)
	return strings.Join(l, " ")
}

func content(t *testing.T, in *ocis.Instance, name string) string {
	t.Helper()
	for _, e := range in.Environment {
		if e.Name == name {
			return string(e.Content)
		}
	}
	t.Fatalf("no environment file %s in %s", name, envNames(in))
	return ""
}

func TestUnit(t *testing.T) {
	root := tempDir(t)
	addInstance(t, filepath.Join(root, "srv/data"), filepath.Join(root, "srv/conf"), ocis.OCIS)
	write(t, root, map[string]string{
		"etc/passwd":         "root:x:0:0::/root:/bin/sh\nocis:x:1000:1000::/home/ocis:/bin/false\n",
		"usr/local/bin/ocis": "#!/bin/sh\n",
		"usr/lib/systemd/system/ocis.service": "[Unit]\nDescription=x\n[Service]\nUser=ocis\nEnvironment=OCIS_BASE_DATA_PATH=/wrong \"OCIS_URL=https://%p.example\"\n" +
			"Environment=GONE=1\nEnvironmentFile=/etc/ocis/ocis.env\nEnvironmentFile=-/etc/ocis/none.env\nEnvironmentFile=-/etc/ocis/more.d/*.env\n" +
			"ExecStart=-/wrong/ocis server\nWorkingDirectory=~\nUnsetEnvironment=GONE\n",
		"etc/systemd/system/ocis.service.d/override.conf":     "[Service]\nExecStart=\nExecStart=/usr/local/bin/ocis \\\n  # comment\n  server\n",
		"etc/systemd/system/ocis.service.d/zz.conf":           "[Service]\nEnvironment=OCIS_CONFIG_DIR=/srv/conf\n",
		"usr/lib/systemd/system/ocis.service.d/override.conf": "[Service]\nEnvironment=HIDDEN=1\n",
		"run/systemd/system/service.d/all.conf":               "[Service]\nEnvironment=FROM_ALL=1\n",
		"etc/ocis/ocis.env":                                   "OCIS_BASE_DATA_PATH=\"/srv/data\"\n",
		"etc/ocis/more.d/a.env":                               "IDM_LDAPS_CERT=/srv/data/idm/ldap.crt\n",
	})
	o := quiet(root)
	o.Unit = "ocis"
	o.RunVersion = func(_ context.Context, b string) (string, error) { return "7.1.0 of " + filepath.Base(b), nil }
	in := mustDiscover(t, o)
	if in.BasePath != filepath.Join(root, "srv/data") || in.ConfigDir != filepath.Join(root, "srv/conf") || in.URL != "https://ocis.example" {
		t.Errorf("got %s, %s, %s", in.BasePath, in.ConfigDir, in.URL)
	}
	if in.Software.Binary != filepath.Join(root, "usr/local/bin/ocis") || in.Version != "7.1.0 of ocis" {
		t.Errorf("software %+v, version %q", in.Software, in.Version)
	}
	if got := envNames(in); got != "a.env ocis.env systemd/ocis.service systemd/ocis.service.d/override.conf systemd/ocis.service.d/zz.conf systemd/service.d/all.conf" {
		t.Errorf("environment %q", got)
	}
	if got := content(t, in, EffectiveFile); got != "IDM_LDAPS_CERT=/srv/data/idm/ldap.crt\nOCIS_BASE_DATA_PATH=/srv/data\nOCIS_CONFIG_DIR=/srv/conf\nOCIS_URL=https://ocis.example\n" {
		t.Errorf("what counts: %q", got)
	}
	u, err := loadUnit(root, "ocis.service")
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := u.env["GONE"]; ok || u.env["FROM_ALL"].value != "1" || u.home != "/home/ocis" || u.workDir != "/home/ocis" {
		t.Errorf("%+v", u)
	}
	if _, ok := u.env["HIDDEN"]; ok {
		t.Error("a drop-in that another one hides was read")
	}

	t.Run("errors", func(t *testing.T) {
		o := quiet(root)
		o.NoSizes = true
		for unit, want := range map[string]string{"nope": "no such unit", "/nonexistent/x.service": "no such file", "masked": "masked", "lost": "EnvironmentFile=" + root + "/etc/none.env in " + root + "/etc/systemd/system/lost.service, line 2"} {
			write(t, root, map[string]string{"etc/systemd/system/lost.service": "[Service]\nEnvironmentFile=/etc/none.env\nExecStart=/usr/local/bin/ocis server\n"})
			if err := os.Symlink("/dev/null", filepath.Join(root, "etc/systemd/system/masked.service")); err != nil && !errors.Is(err, os.ErrExist) {
				t.Fatal(err)
			}
			o.Unit = unit
			wantError(t, o, want)
		}
	})
}

func TestUnitCommands(t *testing.T) {
	for line, want := range map[string]string{
		"/usr/bin/ocis server":                                       "/usr/bin/ocis",
		"-+/usr/bin/opencloud server":                                "/usr/bin/opencloud",
		"@/usr/bin/ocis name server":                                 "/usr/bin/ocis",
		"/bin/sh -c 'ocis init || true; ocis server'":                "ocis",
		"/usr/bin/env A=b /opt/ocis-7.1.0-linux-amd64 server":        "/opt/ocis-7.1.0-linux-amd64",
		"/usr/bin/docker run --env-file /etc/ocis.env owncloud/ocis": "",
		"/usr/bin/ocistool":                                          "",
	} {
		root := t.TempDir()
		write(t, root, map[string]string{"etc/systemd/system/x.service": "[Service]\nExecStart=" + line + "\n"})
		u, err := loadUnit(root, "x")
		if err != nil {
			t.Fatal(err)
		}
		if got, _ := unitBinary(u.exec); got != want {
			t.Errorf("%q: got %q", line, got)
		}
	}
}

func TestUnitTemplates(t *testing.T) {
	root := tempDir(t)
	write(t, root, map[string]string{
		"etc/systemd/system/ocis@.service":             "[Service]\nEnvironment=OCIS_BASE_DATA_PATH=/srv/%i\nExecStart=/bin/ocis server\nRootDirectory=/jail\nBindPaths=/mnt/b:/srv/b /c\n",
		"etc/systemd/system/ocis@.service.d/a.conf":    "[Service]\nEnvironment=X=%I\n",
		"etc/systemd/system/ocis@a-b.service.d/b.conf": "[Service]\nEnvironment=Y='a b' \"Z=1 2\" W=\\x41\\101\n",
	})
	u, err := loadUnit(root, "ocis@a-b")
	if err != nil {
		t.Fatal(err)
	}
	for k, want := range map[string]string{"OCIS_BASE_DATA_PATH": "/srv/a-b", "X": "a/b", "Y": "a b", "Z": "1 2", "W": "AA"} {
		if got := u.env[k].value; got != want {
			t.Errorf("%s: got %q", k, got)
		}
	}
	if len(u.maps) != 2 || u.maps[1] != (PathMap{"/srv/b", "/mnt/b"}) {
		t.Errorf("maps %+v", u.maps)
	}
}

const composeMain = `
services:
  traefik:
    image: traefik:${TRAEFIK:-v3}
  ocis:
    image: ${OCIS_DOCKER_IMAGE:-owncloud/ocis}:${OCIS_DOCKER_TAG:-7.1.0}
    entrypoint: [/bin/sh]
    command: ["-c", "ocis init || true; ocis server"]
    env_file:
      - extra.env
      - path: none.env
        required: false
    environment:
      OCIS_URL: https://${OCIS_DOMAIN:-ocis.owncloud.test}
      STORAGE_USERS_DRIVER: ocis
      FROM_SHELL:
      PRICE: $$5
    volumes:
      - ./config/csp.yaml:/etc/ocis/csp.yaml
      - ${OCIS_CONFIG_DIR:-ocis-config}:/etc/ocis
      - type: volume
        source: ocis-data
        target: /var/lib/ocis
      - type: tmpfs
        target: /tmp
  collaboration:
    image: owncloud/ocis:7.1.0
    command: ["-c", "ocis collaboration server"]
    entrypoint: ["/bin/sh"]
volumes:
  ocis-config:
  ocis-data:
`

const composeVault = `
services:
  ocis:
    environment:
      - PROXY_CSP_CONFIG_FILE_LOCATION=/etc/ocis/csp.yaml
      - STORAGE_USERS_OCIS_ROOT
  storage-users-vault:
    image: owncloud/ocis:7.1.0
    command: storage-users server
    environment:
      STORAGE_USERS_ENABLE_VAULT_MODE: "true"
      STORAGE_USERS_OCIS_ROOT: /var/lib/ocis/storage/users-vault
`

func TestCompose(t *testing.T) {
	root := tempDir(t)
	project := filepath.Join(root, "opt/ocis_full")
	data, config := filepath.Join(root, "var/lib/docker/volumes/ocis_full_ocis-data/_data"), filepath.Join(root, "srv/conf")
	addInstance(t, data, config, ocis.OCIS)
	addStore(t, filepath.Join(data, "storage/users-vault"), "user.ocis.", 2, true)
	write(t, project, map[string]string{
		"docker-compose.yml": "services: {}\nname: ocis_full\n",
		"ocis.yml":           composeMain,
		"vault.yml":          composeVault,
		"config/csp.yaml":    "x",
		"extra.env":          "THUMBNAILS_FILESYSTEMSTORAGE_ROOT=/var/lib/ocis/thumbnails # default\nOCIS_URL=https://overridden\n",
		".env":               "# c\nOCIS=:ocis.yml\nVAULT=:vault.yml\nCOMPOSE_FILE=docker-compose.yml${OCIS:-}${VAULT:-}${TIKA:-}\nOCIS_DOMAIN=cloud.example\nOCIS_CONFIG_DIR=/srv/conf\n",
	})
	o := quiet(root)
	o.Compose = []string{project}
	in := mustDiscover(t, o)
	if in.BasePath != data || in.ConfigDir != config || in.ServerBasePath != "/var/lib/ocis" || in.URL != "https://cloud.example" || in.Version != "7.1.0" || in.Software.Image != "owncloud/ocis:7.1.0" {
		t.Errorf("got %s, %s, %s, %s, %s, %+v", in.BasePath, in.ConfigDir, in.ServerBasePath, in.URL, in.Version, in.Software)
	}
	if d := set(t, in, "proxy-csp"); d.Path != filepath.Join(project, "config/csp.yaml") || d.ServerPath != "/etc/ocis/csp.yaml" {
		t.Errorf("%+v", d)
	}
	if len(in.Stores) != 3 || in.Store("users-vault") == nil || hasWarning(in, "vault") {
		t.Errorf("stores %+v, warnings %q", in.Stores, in.Warnings)
	}
	if got := envNames(in); got != "compose/.env compose/docker-compose.yml compose/extra.env compose/ocis.yml compose/vault.yml" {
		t.Errorf("environment %q", got)
	}
	t.Run("one file of COMPOSE_FILE", func(t *testing.T) {
		o := quiet(root)
		o.Compose = []string{filepath.Join(project, "docker-compose.yml")}
		if in := mustDiscover(t, o); in.BasePath != data {
			t.Errorf("got %s", in.BasePath)
		}
	})
	t.Run("mount without a setting", func(t *testing.T) {
		o := quiet(root)
		o.Compose = []string{filepath.Join(project, "ocis.yml")}
		write(t, project, map[string]string{"ocis.yml": composeMain + "name: ocis_full\n"})
		in := mustDiscover(t, o)
		if d := set(t, in, "mount-config-csp.yaml"); d.Path != filepath.Join(project, "config/csp.yaml") || d.Kind != ocis.System {
			t.Errorf("%+v", d)
		}
	})
	t.Run("volume is missing", func(t *testing.T) {
		write(t, project, map[string]string{"other.yml": "name: other\n" + composeMain})
		o := quiet(root)
		o.Compose = []string{filepath.Join(project, "other.yml")}
		_, err := Discover(context.Background(), o)
		var n *NoInstanceError
		if !errors.As(err, &n) || !strings.Contains(err.Error(), "volumes/other_ocis-data/_data") || !strings.Contains(strings.Join(hints(err), ""), "--map") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("errors", func(t *testing.T) {
		dir := tempDir(t)
		write(t, dir, map[string]string{
			"none.yml":     "services: {web: {image: nginx}}\n",
			"two.yml":      "services: {a: {image: owncloud/ocis}, b: {image: opencloudeu/opencloud-rolling:2}}\n",
			"broken.yml":   "services: [\n",
			"required.yml": "services: {a: {image: 'owncloud/ocis:${TAG:?no tag}'}}\n",
			"env.yml":      "services: {a: {image: owncloud/ocis, env_file: gone.env}}\n",
			"loop.yml":     "include: [loop2.yml]\nservices: {a: {extends: {service: a}}}\n",
			"loop2.yml":    "include: [loop.yml]\n",
			"empty/":       "",
		})
		for f, want := range map[string]string{"none.yml": "no service there runs", "broken.yml": "cannot be read", "required.yml": "TAG is required: no tag",
			"env.yml": "gone.env", "empty": "no compose file", "gone.yml": "no such file", "loop.yml": "without end"} {
			o := quiet(root)
			o.Compose = []string{filepath.Join(dir, f)}
			t.Run(f, func(t *testing.T) { wantError(t, o, want) })
		}
		o := quiet(root)
		o.Compose = []string{filepath.Join(dir, "two.yml")}
		var a *AmbiguousError
		if _, err := Discover(context.Background(), o); !errors.As(err, &a) || len(a.Choices) != 2 {
			t.Errorf("got %v", err)
		}
		o.ComposeService = "c"
		wantError(t, o, "--compose-service=c", "no such service")
	})
}

func TestComposeDetails(t *testing.T) {
	dir := tempDir(t)
	write(t, dir, map[string]string{
		"compose.yaml": "include:\n  - path: [inc.yml]\nservices:\n  a:\n    extends: {file: base.yml, service: base}\n    image: opencloudeu/opencloud:2.1.0\n" +
			"    environment: {B: 2}\n    volumes: ['named:/n', './rel:/r:ro', '~/h:/h', 'plain:/p', '/only']\nvolumes:\n  named: {name: explicit}\n  plain:\n    driver_opts: {type: none, o: bind, device: /srv/dev}\n",
		"compose.override.yaml": "services: {a: {environment: [C=3], volumes: [other:/n]}}\n",
		"inc.yml":               "services: {x: {image: nginx}}\n",
		"base.yml":              "services: {base: {environment: {A: 1, B: 1}, working_dir: /w}}\n",
	})
	p, err := loadCompose([]string{dir}, lookupIn(nil))
	if err != nil {
		t.Fatal(err)
	}
	s, err := p.service("")
	if err != nil {
		t.Fatal(err)
	}
	if s.env["A"].value != "1" || s.env["B"].value != "2" || s.env["C"].value != "3" || s.workDir != "/w" || p.services["x"] == nil {
		t.Errorf("%+v", s)
	}
	want := []PathMap{{"/r", filepath.Join(dir, "rel")}, {"/h", "/home/me/h"}, {"/p", "/srv/dev"}, {"/n", "/var/lib/docker/volumes/" + p.name + "_other/_data"}}
	if got := p.maps(context.Background(), s, nil, "", "/home/me"); !slices.Equal(got, want) {
		t.Errorf("got %v", got)
	}
	for in, want := range map[string]string{"My Project!": "myproject", "_x-y": "x-y", "ocis_full": "ocis_full"} {
		if got := projectName(in); got != want {
			t.Errorf("%q: %q", in, got)
		}
	}
	for image, want := range map[string]string{"owncloud/ocis:7.1.0": "ocis 7.1.0", "reg:5000/opencloudeu/opencloud-rolling:v2@sha256:0": "opencloud 2", "owncloud/ocis": "ocis ",
		"owncloud/ocis:latest": "ocis ", "nginx:1": " 1", "x/ocis-hello:1": " 1"} {
		if got := string(imageProduct(image)) + " " + imageVersion(image); got != want {
			t.Errorf("%s: %q", image, got)
		}
	}
}

// engine is a Docker engine with some containers, images and volumes.
type engine struct {
	containers map[string]map[string]any
	images     map[string]map[string]any
	volumes    map[string]string
}

func (e *engine) start(t *testing.T) *docker.Client {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "d.sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(e)
	srv.Listener.Close()
	srv.Listener = l
	srv.Start()
	t.Cleanup(srv.Close)
	c, err := docker.New("unix://" + sock)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (e *engine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimPrefix(r.URL.Path, "/v1.47")
	send := func(v any) {
		if v == nil {
			w.WriteHeader(404)
			v = map[string]string{"message": "no such thing"}
		}
		_ = json.NewEncoder(w).Encode(v)
	}
	parts := strings.Split(strings.Trim(path, "/"), "/")
	switch {
	case path == "/_ping":
		w.Header().Set("Api-Version", "1.47")
	case path == "/containers/json":
		var f map[string][]string
		_ = json.Unmarshal([]byte(r.URL.Query().Get("filters")), &f)
		list := []any{}
		for _, id := range sortedKeys(e.containers) {
			k := e.containers[id]
			cfg := k["Config"].(map[string]any)
			labels, _ := cfg["Labels"].(map[string]string)
			match := true
			for _, l := range f["label"] {
				key, v, _ := strings.Cut(l, "=")
				match = match && labels[key] == v
			}
			if match {
				list = append(list, map[string]any{"Id": k["Id"], "Names": []string{"/" + id}, "Image": cfg["Image"]})
			}
		}
		send(list)
	case parts[0] == "containers":
		for name, k := range e.containers {
			if name == parts[1] || k["Id"] == parts[1] {
				send(k)
				return
			}
		}
		send(nil)
	case parts[0] == "images":
		if i, ok := e.images[parts[1]]; ok {
			send(i)
			return
		}
		send(nil)
	case parts[0] == "volumes":
		if m, ok := e.volumes[parts[1]]; ok {
			send(map[string]string{"Name": parts[1], "Mountpoint": m})
			return
		}
		send(nil)
	default:
		http.Error(w, "what?", 400)
	}
}

func sampleEngine(id string) *engine {
	labels := map[string]string{"com.docker.compose.project": "full", "com.docker.compose.service": "ocis"}
	return &engine{
		containers: map[string]map[string]any{
			"ocis-1": {"Id": id, "Name": "/ocis-1", "Image": "sha256:aa", "Path": "/bin/sh", "Args": []string{"-c", "ocis init || true; ocis server"},
				"Config": map[string]any{"Env": []string{"OCIS_URL=https://c.example", "STORAGE_USERS_DRIVER=ocis", "PATH=/bin"}, "Image": "owncloud/ocis:latest", "Labels": labels, "WorkingDir": "/var/lib/ocis"},
				"Mounts": []any{
					map[string]any{"Type": "volume", "Name": "v", "Source": "/var/lib/docker/volumes/v/_data", "Destination": "/var/lib/ocis", "RW": true},
					map[string]any{"Type": "bind", "Source": "/srv/conf", "Destination": "/etc/ocis", "RW": true},
					map[string]any{"Type": "bind", "Source": "/srv/vault", "Destination": "/var/lib/ocis/storage/users-vault", "RW": true},
					map[string]any{"Type": "tmpfs", "Destination": "/tmp"},
				}},
			"vault-1": {"Id": "ff", "Name": "/vault-1", "Image": "sha256:aa", "Path": "ocis", "Args": []string{"storage-users", "server"},
				"Config": map[string]any{"Env": []string{"STORAGE_USERS_ENABLE_VAULT_MODE=true", "STORAGE_USERS_OCIS_ROOT=/var/lib/ocis/storage/users-vault"}, "Image": "owncloud/ocis:latest",
					"Labels": map[string]string{"com.docker.compose.project": "full"}}},
			"db-1": {"Id": "ee", "Name": "/db-1", "Image": "sha256:bb", "Config": map[string]any{"Image": "postgres", "Labels": map[string]string{"com.docker.compose.project": "full"}}},
		},
		images: map[string]map[string]any{"sha256:aa": {"Id": "sha256:aa", "RepoDigests": []string{"owncloud/ocis@sha256:dd"},
			"Config": map[string]any{"Labels": map[string]string{"org.opencontainers.image.version": "7.1.2"}}}},
		volumes: map[string]string{"ocis_full_ocis-data": "/mnt/pool/data"},
	}
}

func TestContainer(t *testing.T) {
	root := tempDir(t)
	data, config := filepath.Join(root, "var/lib/docker/volumes/v/_data"), filepath.Join(root, "srv/conf")
	addInstance(t, data, config, ocis.OCIS)
	addStore(t, filepath.Join(root, "srv/vault"), "user.ocis.", 2, true)
	o := quiet(root)
	o.Docker = sampleEngine("cc").start(t)
	o.Container = "ocis-1"
	in := mustDiscover(t, o)
	if in.BasePath != data || in.ConfigDir != config || in.URL != "https://c.example" || in.Version != "7.1.2" ||
		in.Software != (ocis.Software{Container: "ocis-1", Image: "owncloud/ocis:latest", ImageDigest: "sha256:dd"}) {
		t.Errorf("got %s, %s, %s, %s, %+v", in.BasePath, in.ConfigDir, in.URL, in.Version, in.Software)
	}
	if v := in.Store("users-vault"); v == nil || v.Root != filepath.Join(root, "srv/vault") {
		t.Errorf("stores %+v", in.Stores)
	}
	if c := content(t, in, "container.json"); !strings.Contains(c, `"Destination": "/var/lib/ocis"`) {
		t.Errorf("container.json: %s", c)
	}
	if len(in.Warnings) > 0 {
		t.Errorf("warnings %q", in.Warnings)
	}
	t.Run("directories by flag", func(t *testing.T) {
		other := tempDir(t)
		addInstance(t, filepath.Join(other, "d"), filepath.Join(other, "c"), ocis.OCIS)
		o := o
		o.BaseDataPath, o.ConfigDir = filepath.Join(other, "d"), filepath.Join(other, "c")
		in := mustDiscover(t, o)
		if in.BasePath != o.BaseDataPath || in.ServerBasePath != "/var/lib/ocis" || in.ServerConfigDir != "/etc/ocis" {
			t.Errorf("got %s, %s, %s", in.BasePath, in.ServerBasePath, in.ServerConfigDir)
		}
	})
	t.Run("no such container", func(t *testing.T) {
		o := o
		o.Container = "nope"
		wantError(t, o, "--container=nope", "no such container")
	})
	t.Run("no engine", func(t *testing.T) {
		o := quiet(root)
		o.Container = "ocis-1"
		if _, err := Discover(context.Background(), o); !errors.Is(err, docker.ErrNoEngine) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("compose asks the engine", func(t *testing.T) {
		dir := filepath.Join(root, "opt/full")
		write(t, dir, map[string]string{"c.yml": "name: ocis_full\n" + composeMain, "extra.env": "", "config/csp.yaml": "", ".env": "OCIS_CONFIG_DIR=/srv/conf\n"})
		e := sampleEngine("cc")
		e.containers["ocis-1"]["Config"].(map[string]any)["Labels"] = map[string]string{"com.docker.compose.project": "ocis_full", "com.docker.compose.service": "ocis"}
		addInstance(t, filepath.Join(root, "mnt/pool/data"), "", ocis.OCIS)
		o := quiet(root)
		o.Docker = e.start(t)
		o.Compose = []string{filepath.Join(dir, "c.yml")}
		in := mustDiscover(t, o)
		if in.BasePath != filepath.Join(root, "mnt/pool/data") || in.Software.ImageDigest != "sha256:dd" || in.Software.Container != "ocis-1" {
			t.Errorf("got %s, %+v", in.BasePath, in.Software)
		}
	})
}

func link(t *testing.T, target, name string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, name); err != nil {
		t.Fatal(err)
	}
}

func TestProcess(t *testing.T) {
	root := tempDir(t)
	addInstance(t, filepath.Join(root, "home/me/.opencloud"), filepath.Join(root, "home/me/.opencloud/config"), ocis.OpenCloud)
	p := filepath.Join(root, "proc/77")
	write(t, root, map[string]string{"usr/bin/opencloud": "x", "home/me/cloud/themes/a": ""})
	write(t, p, map[string]string{"environ": "HOME=/home/me\x00WEB_ASSET_THEMES_PATH=themes\x00MULTI=a\nb\x00", "cmdline": "opencloud\x00server\x00", "cgroup": "0::/user.slice\n"})
	link(t, "/usr/bin/opencloud", filepath.Join(p, "exe"))
	link(t, "/home/me/cloud", filepath.Join(p, "cwd"))
	link(t, "/", filepath.Join(p, "root"))
	o := quiet(root)
	o.PID = 77
	o.RunVersion = func(context.Context, string) (string, error) { return "2.0.0", nil }
	in := mustDiscover(t, o)
	if in.BasePath != filepath.Join(root, "home/me/.opencloud") || in.Software.Binary != filepath.Join(root, "usr/bin/opencloud") || in.Version != "2.0.0" {
		t.Errorf("got %s, %+v, %s", in.BasePath, in.Software, in.Version)
	}
	if d := set(t, in, "web-themes"); d.Path != filepath.Join(root, "home/me/cloud/themes") {
		t.Errorf("%+v", d)
	}
	if got := content(t, in, "process.env"); got != "; in systemd's syntax\nHOME=\"/home/me\"\nMULTI=\"a\nb\"\nWEB_ASSET_THEMES_PATH=\"themes\"\n" {
		t.Errorf("process.env %q", got)
	}
	if err := os.Remove(filepath.Join(p, "exe")); err != nil {
		t.Fatal(err)
	}
	link(t, "/bin/sleep", filepath.Join(p, "exe"))
	write(t, p, map[string]string{"cmdline": "sleep\x009\x00"})
	if in := mustDiscover(t, o); in.Software.Binary != "" || !hasWarning(in, "no server by its name") {
		t.Errorf("software %+v, warnings %q", in.Software, in.Warnings)
	}
	o.PID = 78
	wantError(t, o, "--pid=78", "no such process")
}

func TestProcessInContainer(t *testing.T) {
	root := tempDir(t)
	id := strings.Repeat("c0", 32)
	addInstance(t, filepath.Join(root, "pool/ocis data"), filepath.Join(root, "srv/conf"), ocis.OCIS)
	p := filepath.Join(root, "proc/99")
	write(t, p, map[string]string{
		"environ": "PATH=/bin\x00OCIS_URL=https://p.example\x00", "cmdline": "ocis\x00server\x00", "cgroup": "0::/system.slice/docker-" + id + ".scope\n",
		"mountinfo": "1 0 0:50 / / rw - overlay overlay rw\n2 1 0:60 / /proc rw - proc proc rw\n3 1 8:2 /ocis\\040data /var/lib/ocis rw master:1 - ext4 /dev/sdb2 rw\n" +
			"4 1 8:1 /srv/conf /etc/ocis rw - ext4 /dev/sda1 rw\n5 1 9:9 / /elsewhere rw - ext4 /dev/sdz rw\n",
	})
	write(t, root, map[string]string{"proc/self/mountinfo": "20 1 8:1 / / rw - ext4 /dev/sda1 rw\n21 20 8:2 / /pool rw - ext4 /dev/sdb2 rw\n"})
	link(t, "mnt:[1]", filepath.Join(root, "proc/self/ns/mnt"))
	link(t, "mnt:[2]", filepath.Join(p, "ns/mnt"))
	link(t, "/usr/bin/ocis", filepath.Join(p, "exe"))
	link(t, "/var/lib/ocis", filepath.Join(p, "cwd"))
	o := quiet(root)
	o.PID = 99
	o.Docker = sampleEngine(id).start(t)
	in := mustDiscover(t, o)
	if in.BasePath != filepath.Join(root, "pool/ocis data") || in.ConfigDir != filepath.Join(root, "srv/conf") || in.ServerBasePath != "/var/lib/ocis" {
		t.Errorf("got %s, %s", in.BasePath, in.ConfigDir)
	}
	if in.Software != (ocis.Software{Container: "ocis-1", Image: "owncloud/ocis:latest", ImageDigest: "sha256:dd"}) || in.Version != "7.1.2" {
		t.Errorf("software %+v, version %s", in.Software, in.Version)
	}
}

func TestVersion(t *testing.T) {
	dir := tempDir(t)
	script := func(name, text string, mode os.FileMode) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(p, mode); err != nil {
			t.Fatal(err)
		}
		return p
	}
	good := `[ "$*" = "version --skip-services" ] || exit 3; [ -z "$SECRET" ] || exit 4; echo "Version:  7.1.0"; echo "Compiled: x"`
	t.Setenv("SECRET", "x")
	ctx := context.Background()
	if v, err := runVersion(ctx, script("ocis", good, 0o755)); v != "7.1.0" || err != nil {
		t.Errorf("got %q, %v", v, err)
	}
	var u *untrustedError
	for name, p := range map[string]string{"plain": script("plain", good, 0o644), "writable": script("writable", good, 0o777), "gone": filepath.Join(dir, "gone")} {
		if v, err := runVersion(ctx, p); v != "" || err == nil || name != "gone" && !errors.As(err, &u) {
			t.Errorf("%s: got %q, %v", name, v, err)
		}
	}
	foreign := script("foreign", good, 0o755)
	if err := os.Chown(foreign, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	if _, err := runVersion(ctx, foreign); !errors.As(err, &u) {
		t.Errorf("got %v", err)
	}
	if _, err := runVersion(ctx, script("mute", "echo hello", 0o755)); err == nil || !strings.Contains(err.Error(), "names no version") {
		t.Errorf("got %v", err)
	}
	if _, err := runVersion(ctx, script("fails", "exit 1", 0o755)); err == nil {
		t.Error("no error")
	}
	short, cancel := context.WithTimeout(ctx, 200e6)
	defer cancel()
	if _, err := runVersion(short, script("hangs", "sleep 60 & sleep 60", 0o755)); err == nil {
		t.Error("no error")
	}
	for out, want := range map[string]string{"Version: 7.0\n": "7.0", "  version : v1.2+x\r\n": "1.2+x", "ocis 1\n": "", "": ""} {
		if got := parseVersion(out); got != want {
			t.Errorf("%q: %q", out, got)
		}
	}
}

func TestServerBinary(t *testing.T) {
	root := tempDir(t)
	addInstance(t, filepath.Join(root, "var/lib/ocis"), filepath.Join(root, "etc/ocis"), ocis.OCIS)
	write(t, root, map[string]string{"bin/opencloud": "x"})
	o := quiet(root)
	o.BaseDataPath = filepath.Join(root, "var/lib/ocis")
	o.ServerBinary = filepath.Join(root, "bin/opencloud")
	in := mustDiscover(t, o)
	if in.Product != ocis.OpenCloud || !hasWarning(in, "ocis.boltdb is of ocis") || !hasWarning(in, "not run in tests") || in.Software.Binary != o.ServerBinary {
		t.Errorf("got %s, %q", in.Product, in.Warnings)
	}
	o.ServerBinary = "/nonexistent"
	wantError(t, o, "--server-binary=/nonexistent")
}

func TestParseMap(t *testing.T) {
	if m, err := ParseMap("/a/=/b/c/"); err != nil || m != (PathMap{"/a", "/b/c"}) {
		t.Errorf("got %v, %v", m, err)
	}
	for _, s := range []string{"", "/a", "a=/b", "/a=b", "=/b"} {
		if _, err := ParseMap(s); err == nil {
			t.Errorf("%q: no error", s)
		}
	}
}

func ExampleParseMap() {
	m, err := ParseMap("/var/lib/ocis=/srv/ocis/data")
	fmt.Println(m.Server, m.Host, err)
	// Output: /var/lib/ocis /srv/ocis/data <nil>
}
