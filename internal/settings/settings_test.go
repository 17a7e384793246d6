package settings

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

type values struct {
	repo, file, command string
	tags                []string
	dry                 bool
	wait                time.Duration
}

func flags() (*pflag.FlagSet, *values) {
	v := &values{}
	fs := pflag.NewFlagSet("backup", pflag.ContinueOnError)
	fs.StringVar(&v.repo, "repo", "", "")
	fs.StringVar(&v.file, "password-file", "", "")
	fs.StringVar(&v.command, "password-command", "", "")
	fs.StringArrayVar(&v.tags, "tag", nil, "")
	fs.BoolVar(&v.dry, "dry-run", false, "")
	fs.DurationVar(&v.wait, "freeze-timeout", 0, "")
	fs.String("config-file", "", "")
	return fs, v
}

var verbs = map[string][]string{
	"backup":  {"repo", "password-file", "password-command", "tag", "dry-run", "freeze-timeout", "config-file"},
	"restore": {"repo", "owner"},
	"key add": {"new-password-file"},
}

func lookup(kv ...string) Lookup {
	m := map[string]string{}
	for i := 0; i < len(kv); i += 2 {
		m[kv[i]] = kv[i+1]
	}
	return func(k string) (string, bool) { v, ok := m[k]; return v, ok }
}

func TestLayers(t *testing.T) {
	const file = "repository: /file\ntag: [a, 'b,c']\nfreeze-timeout: 5s\nbackup:\n  freeze-timeout: 7s\n  dry-run: true\n"
	for name, c := range map[string]struct {
		args []string
		env  []string
		file string
		want values
		from Layer // of repo
	}{
		"nothing":              {want: values{}},
		"file":                 {file: file, want: values{repo: "/file", tags: []string{"a", "b,c"}, dry: true, wait: 7 * time.Second}, from: File},
		"fallback over file":   {env: []string{"RESTIC_REPOSITORY", "/restic"}, file: "repository: /file", want: values{repo: "/restic"}, from: Fallback},
		"own over fallback":    {env: []string{"RESTIC_REPOSITORY", "/restic", "HOLDFAST_REPOSITORY", "/own"}, want: values{repo: "/own"}, from: Env},
		"flag over all":        {args: []string{"--repo=/flag"}, env: []string{"HOLDFAST_REPOSITORY", "/own"}, file: file, want: values{repo: "/flag", tags: []string{"a", "b,c"}, dry: true, wait: 7 * time.Second}, from: Flag},
		"empty flag is a flag": {args: []string{"--repo="}, env: []string{"HOLDFAST_REPOSITORY", "/own"}, want: values{}, from: Flag},
		"empty variable":       {env: []string{"HOLDFAST_REPOSITORY", ""}, file: "repository: /file", want: values{repo: "/file"}, from: File},
		"list in a variable":   {env: []string{"HOLDFAST_TAG", `x,"y,z"`}, want: values{tags: []string{"x", "y,z"}}},
		"one value for a list": {file: "tag: x,y", want: values{tags: []string{"x,y"}}},
		"any flag has one":     {env: []string{"HOLDFAST_FREEZE_TIMEOUT", "90s", "HOLDFAST_DRY_RUN", "true"}, want: values{wait: 90 * time.Second, dry: true}},
		"empty file":           {file: "# nothing\n"},
		"alias":                {file: "password-file: &p /pw\nrepository: *p\n", want: values{repo: "/pw", file: "/pw"}, from: File},
	} {
		t.Run(name, func(t *testing.T) {
			fs, v := flags()
			if err := fs.Parse(c.args); err != nil {
				t.Fatal(err)
			}
			y, err := Parse("f.yaml", []byte(c.file), verbs)
			if err != nil {
				t.Fatal(err)
			}
			set, err := Apply(fs, "backup", y, lookup(c.env...))
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(*v, c.want) {
				t.Errorf("got %+v\nwant %+v", *v, c.want)
			}
			if set["repo"].Layer != c.from {
				t.Errorf("repo comes from layer %d, want %d", set["repo"].Layer, c.from)
			}
			if c.from != Default && !fs.Changed("repo") {
				t.Error("a flag that is set does not say so")
			}
		})
	}
}

func TestValueErrorsNameTheirPlace(t *testing.T) {
	for name, c := range map[string]struct {
		env  []string
		file string
		want []string
	}{
		"variable": {env: []string{"HOLDFAST_FREEZE_TIMEOUT", "soon"}, want: []string{"HOLDFAST_FREEZE_TIMEOUT: ", "soon"}},
		"file":     {file: "\nbackup:\n  freeze-timeout: soon", want: []string{"f.yaml:3: ", "freeze-timeout", "soon"}},
		"list":     {file: "dry-run: [true, false]", want: []string{"f.yaml:1: ", "not a list"}},
	} {
		t.Run(name, func(t *testing.T) {
			fs, _ := flags()
			y, err := Parse("f.yaml", []byte(c.file), verbs)
			if err != nil {
				t.Fatal(err)
			}
			_, err = Apply(fs, "backup", y, lookup(c.env...))
			if err == nil {
				t.Fatal("no error")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q is not in %q", w, err)
				}
			}
		})
	}
}

func TestParseErrors(t *testing.T) {
	for name, c := range map[string]struct{ file, want string }{
		"unknown key":         {"a: 1\nrepository: x\n\nnope: 2", "f.yaml:1: unknown key \"a\"\nf.yaml:4: unknown key \"nope\""},
		"misspelt":            {"password_file: x", `f.yaml:1: unknown key "password_file" (did you mean "password-file"?)`},
		"swapped letters":     {"repositroy: x", `f.yaml:1: unknown key "repositroy" (did you mean "repository"?)`},
		"the flag's name":     {"repo: x", `f.yaml:1: unknown key "repo" (did you mean "repository"?)`},
		"password":            {"password: secret", "f.yaml:1: unknown key \"password\" (a password does not belong in this file: use password-file or password-command)"},
		"unknown in section":  {"backup:\n  owner: 1:1", `f.yaml:2: unknown key "owner"`},
		"unknown section":     {"bakup:\n  tag: x", `f.yaml:1: unknown key "bakup"`},
		"section twice":       {"backup: {tag: x}\nbackup: {tag: y}", `f.yaml:2: section "backup" stands twice`},
		"key twice":           {"tag: x\ntag: y", `f.yaml:2: key "tag" stands twice`},
		"no value":            {"tag:", `f.yaml:1: key "tag" has no value that can be used here`},
		"mapping for a value": {"tag: {a: b}", `f.yaml:1: key "tag" has no value that can be used here`},
		"nested list":         {"tag: [[a]]", `f.yaml:1: key "tag": a list of plain values is wanted`},
		"a list":              {"- a", "f.yaml:1: a mapping (key: value) is wanted here"},
		"broken":              {"tag: [a\n", "f.yaml: line 1: did not find expected ',' or ']'"},
		"two documents":       {"tag: x\n---\ntag: y\n", "f.yaml: more than one document in the file"},
		"not in a file":       {"config-file: x", `f.yaml:1: unknown key "config-file"`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse("f.yaml", []byte(c.file), verbs)
			if err == nil {
				t.Fatal("no error")
			}
			if err.Error() != c.want {
				t.Errorf("got  %s\nwant %s", err, c.want)
			}
		})
	}
}

func TestNoErrorShowsASecret(t *testing.T) {
	_, err := Parse("f.yaml", []byte("password: tops3cret"), verbs)
	if err == nil || strings.Contains(err.Error(), "tops3cret") {
		t.Errorf("got %v", err)
	}
}

func TestSubcommandSection(t *testing.T) {
	y, err := Parse("f.yaml", []byte("key add:\n  new-password-file: /x\n"), verbs)
	if err != nil {
		t.Fatal(err)
	}
	fs := pflag.NewFlagSet("key add", pflag.ContinueOnError)
	got := fs.String("new-password-file", "", "")
	if _, err := Apply(fs, "key add", y, lookup()); err != nil || *got != "/x" {
		t.Errorf("got %q, %v", *got, err)
	}
}

func TestStrongest(t *testing.T) {
	names := []string{"password-file", "password-command"}
	for name, c := range map[string]struct {
		file, command Layer
		want          []string
	}{
		"none":           {Default, Default, nil},
		"one":            {Default, File, []string{"password-command"}},
		"flag wins":      {Flag, Env, []string{"password-file"}},
		"own over other": {Fallback, Env, []string{"password-command"}},
		"contradiction":  {Env, Env, names},
	} {
		t.Run(name, func(t *testing.T) {
			set := map[string]Origin{"password-file": {Layer: c.file}, "password-command": {Layer: c.command}}
			if got := Strongest(set, names...); !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

func TestPassword(t *testing.T) {
	if v, o := Password(lookup("RESTIC_PASSWORD", "r", "HOLDFAST_PASSWORD", "h")); v != "h" || o.Layer != Env {
		t.Errorf("got %q from %+v", v, o)
	}
	if v, o := Password(lookup("RESTIC_PASSWORD", "r")); v != "r" || o.Layer != Fallback {
		t.Errorf("got %q from %+v", v, o)
	}
	if v, o := Password(lookup()); v != "" || o.Layer != Default {
		t.Errorf("got %q from %+v", v, o)
	}
}

func TestStrangers(t *testing.T) {
	env := []string{"HOLDFAST_REPO=x", "HOLDFAST_REPOSITORY=x", "HOLDFAST_PASSWORD=x", "PATH=x", "HOLDFAST_TAGS=x", "HOLDFAST_TAG=x"}
	got := Strangers(env, []string{"repo", "tag"})
	if want := []string{"HOLDFAST_REPO", "HOLDFAST_TAGS"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestReadFile(t *testing.T) {
	dir := t.TempDir()
	if _, err := ReadFile(filepath.Join(dir, "none"), verbs); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	if _, err := ReadFile(dir, verbs); err == nil {
		t.Error("a directory was read")
	}
	big := filepath.Join(dir, "big")
	if err := os.WriteFile(big, make([]byte, maxFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadFile(big, verbs); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("got %v", err)
	}
}

func FuzzParse(f *testing.F) {
	seeds, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(seeds) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, s := range seeds {
		p, err := os.ReadFile(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		y, err := Parse("f", p, verbs)
		if err != nil {
			return
		}
		fs, _ := flags()
		_, _ = Apply(fs, "backup", y, lookup())
	})
}
