package discover

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

func TestPrecedence(t *testing.T) {
	themes := field{service: "web", keys: []string{"asset.themes_path"}, env: []string{"{P}_ASSET_THEMES_PATH", "WEB_ASSET_THEMES_PATH"}}
	for name, c := range map[string]struct {
		main, own string
		env       map[string]string
		want      string
		setting   string // "" is the default
	}{
		"default":                {},
		"main":                   {main: "web:\n  asset:\n    themes_path: /m\n", want: "/m", setting: "web.asset.themes_path"},
		"service over main":      {main: "web: {asset: {themes_path: /m}}", own: "asset: {themes_path: /s}", want: "/s", setting: "asset.themes_path"},
		"environment over all":   {main: "web: {asset: {themes_path: /m}}", own: "asset: {themes_path: /s}", env: map[string]string{"OCIS_ASSET_THEMES_PATH": "/e"}, want: "/e", setting: "OCIS_ASSET_THEMES_PATH"},
		"specific over global":   {env: map[string]string{"OCIS_ASSET_THEMES_PATH": "/g", "WEB_ASSET_THEMES_PATH": "/s"}, want: "/s", setting: "WEB_ASSET_THEMES_PATH"},
		"empty overrides":        {main: "web: {asset: {themes_path: /m}}", env: map[string]string{"WEB_ASSET_THEMES_PATH": ""}, want: "", setting: "WEB_ASSET_THEMES_PATH"},
		"other product's":        {env: map[string]string{"OC_ASSET_THEMES_PATH": "/x"}},
		"null sets nothing":      {main: "web: {asset: {themes_path: /m}}", own: "asset: {themes_path: }", want: "/m", setting: "web.asset.themes_path"},
		"unknown keys":           {main: "nope: 1\nweb: {asset: {other: 1, themes_path: /m}, x: [1]}", want: "/m", setting: "web.asset.themes_path"},
		"section is no map":      {main: "web: 1"},
		"other case":             {main: "Web: {Asset: {Themes_Path: /m}}", want: "/m", setting: "web.asset.themes_path"},
		"number":                 {main: "web: {asset: {themes_path: 12}}", want: "12", setting: "web.asset.themes_path"},
		"bool":                   {main: "web: {asset: {themes_path: true}}", want: "true", setting: "web.asset.themes_path"},
		"interpolated":           {main: "web: {asset: {themes_path: '${X|/d}/t'}}", env: map[string]string{"X": "/x"}, want: "/x/t", setting: "web.asset.themes_path"},
		"interpolated late":      {main: "web: {asset: {themes_path: '${X|/d: [}/t'}}", want: "/d: [/t", setting: "web.asset.themes_path"},
		"broken service is none": {main: "web: {asset: {themes_path: /m}}", own: "asset: {themes_path: /s", want: "/m", setting: "web.asset.themes_path"},
		"anchor":                 {main: "x: &a {themes_path: /m}\nweb: {asset: *a}", want: "/m", setting: "web.asset.themes_path"},
		"merge key":              {main: "x: &a {themes_path: /m}\nweb: {asset: {<<: *a}}", want: "/m", setting: "web.asset.themes_path"},
		"empty file":             {main: "# nothing\n"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for f, text := range map[string]string{"ocis.yaml": c.main, "web.yaml": c.own} {
				if text != "" {
					write(t, dir, map[string]string{f: text})
				}
			}
			env := environment{}
			for k, v := range c.env {
				env[k] = envValue{value: v}
			}
			cfg := &config{product: ocis.OCIS, env: env, dir: dir}
			v, err := cfg.get(themes)
			if err != nil || v.text != c.want || v.setting != c.setting || v.set != (c.setting != "") {
				t.Errorf("got %+v, %v", v, err)
			}
		})
	}
}

func TestListFields(t *testing.T) {
	f := field{service: "idp", keys: []string{"idp.files"}, env: []string{"FILES"}, list: true}
	for name, c := range map[string]struct{ yaml, env, want string }{
		"sequence": {"idp: {files: [a, '${X|b}', 3]}", "", "a b 3"},
		"string":   {"idp: {files: 'a, b'}", "", "a b"},
		"variable": {"idp: {files: [a]}", "x,y ,", "x y"},
	} {
		t.Run(name, func(t *testing.T) {
			doc, err := parseDocument([]byte(c.yaml))
			if err != nil {
				t.Fatal(err)
			}
			env := environment{}
			if c.env != "" {
				env["FILES"] = envValue{value: c.env}
			}
			// The main file holds the section, and the key repeats the service's name in it.
			doc.tree = map[string]any{"idp": doc.tree}
			doc.root = nil
			cfg := &config{product: ocis.OCIS, env: env, docs: map[string]*document{"ocis": doc, "idp": nil}}
			v, err := cfg.get(f)
			if err != nil || strings.Join(v.list, " ") != c.want {
				t.Errorf("got %+v, %v", v, err)
			}
		})
	}
}

func TestUnreadableConfig(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink("ocis.yaml", filepath.Join(dir, "ocis.yaml")); err != nil {
		t.Fatal(err)
	}
	cfg := &config{product: ocis.OCIS, dir: dir}
	if _, err := cfg.get(userDriver); err == nil || !strings.Contains(err.Error(), "ocis.yaml: cannot be read: too many levels") {
		t.Errorf("got %v", err)
	}
}

func FuzzConfig(f *testing.F) {
	for _, s := range []string{
		"storage_users:\n  driver: ${D | ocis}\n  drivers: {s3ng: {root: /x, endpoint: y}}\n", "a: &a [*a]", "a: 1\na: 2", "storage_users: {driver: [1, {b: c}]}",
		"? [a]\n: b\n", "storage_users: !!binary aGk=\n", "- x\n", "storage_users: {driver: 2001-01-01}", "%YAML 1.1\n---\na: b\n...\n---\nc: d", "storage_users: {<<: {driver: x}}",
		"idp: {idp: {signing_private_key_files: [a, '${B|c}', null, 1.5e3]}}",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		doc, err := parseDocument([]byte(s))
		if err != nil {
			return
		}
		for _, name := range []string{"main", "own"} {
			cfg := &config{product: ocis.OCIS, env: environment{"D": {value: "posix"}}, docs: map[string]*document{"ocis": nil}}
			for _, fs := range fileSets {
				cfg.docs[fs.field.service] = nil
			}
			if name == "main" {
				cfg.docs["ocis"] = doc
			} else {
				cfg.docs["storage-users"] = doc
				cfg.docs["idp"] = doc
			}
			fields := []field{userDriver, systemDriver, systemRoot(ocis.OCIS)}
			for _, fs := range fileSets {
				fields = append(fields, fs.field)
			}
			for _, fd := range fields {
				v, err := cfg.get(fd)
				if err == nil && !v.set && (v.text != "" || v.list != nil) {
					t.Errorf("unset but %+v", v)
				}
			}
		}
	})
}
