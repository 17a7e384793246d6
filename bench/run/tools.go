package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/holdfast-backup/holdfast/bench/internal/measure"
)

// password protects the scratch repositories: what they hold is made up.
const password = "made-up password of a benchmark"

// tool is one program with a repository and a cache of its own below dir.
type tool struct {
	name    string
	path    string // of the program
	version string
	dir     string
	store   func() string
	env     []string
	restic  string // program that can read the repository; "" if there is none
	archive int    // names of borg's archives
}

func (b *bench) newTool(name string) (*tool, error) {
	t := &tool{name: name, dir: filepath.Join(b.scratch, "tool-"+name), store: func() string { return b.store }}
	program, versionArg := name, "version"
	switch name {
	case "holdfast":
		program = b.o.holdfast
	case "restic":
	case "borg":
		versionArg = "--version"
	default:
		return nil, fmt.Errorf("-tools names %q: holdfast, restic and borg are known", name)
	}
	var err error
	if t.path, err = look(program); err != nil {
		return nil, err
	}
	_, version, err := measure.Command("", nil, t.path, versionArg)
	if err != nil {
		return nil, err
	}
	t.version, _, _ = strings.Cut(strings.TrimSpace(version), "\n")
	if name != "borg" {
		// Without restic the index entries of a repository are not counted.
		if t.restic, err = look("restic"); err != nil {
			t.restic = ""
		}
	}
	cache, pass := filepath.Join(t.dir, "cache"), filepath.Join(t.dir, "password")
	t.env = []string{
		"HOLDFAST_CACHE_DIR=" + cache, "RESTIC_CACHE_DIR=" + cache, "RESTIC_PASSWORD_FILE=" + pass, "RESTIC_REPOSITORY=", "RESTIC_PASSWORD=",
		"BORG_BASE_DIR=" + filepath.Join(t.dir, "borg"), "BORG_CACHE_DIR=" + cache, "BORG_PASSCOMMAND=cat " + pass,
		"BORG_RELOCATED_REPO_ACCESS_IS_OK=yes", "TMPDIR=" + t.dir,
	}
	return t, nil
}

func (t *tool) repo() string     { return filepath.Join(t.dir, "repo") }
func (t *tool) pass() string     { return filepath.Join(t.dir, "password") }
func (t *tool) restored() string { return filepath.Join(t.dir, "restored") }

// restoredTree is where data/ and config/ are after a restore: restic and borg put the whole path of
// the source below the target.
func (t *tool) restoredTree() string {
	if t.name == "holdfast" {
		return t.restored()
	}
	return filepath.Join(t.restored(), t.store())
}

// forget removes the program's cache.
func (t *tool) forget() error {
	if t.name == "borg" {
		return nil // its cache says what is in the repository, and is not for reading
	}
	return os.RemoveAll(filepath.Join(t.dir, "cache"))
}

func (t *tool) remove() error { return os.RemoveAll(t.dir) }

func (t *tool) run(args ...string) (measure.Cost, error) {
	c, _, err := measure.Command(t.dir, t.env, t.path, args...)
	return c, err
}

func (t *tool) init() error {
	if err := os.MkdirAll(filepath.Join(t.dir, "borg"), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(t.pass(), []byte(password+"\n"), 0o600); err != nil {
		return err
	}
	var err error
	switch t.name {
	case "holdfast":
		_, err = t.run("init", "--repo", t.repo(), "--password-file", t.pass())
	case "restic":
		_, err = t.run("-r", t.repo(), "init")
	case "borg":
		_, err = t.run("init", "--encryption", "repokey-blake2", t.repo())
	}
	return err
}

func (t *tool) backup() (measure.Cost, error) {
	store := t.store()
	switch t.name {
	case "holdfast":
		return t.run("backup", "--repo", t.repo(), "--password-file", t.pass(),
			"--base-data-path", filepath.Join(store, "data"), "--config-dir", filepath.Join(store, "config"), "--freeze", "none")
	case "restic":
		return t.run("-r", t.repo(), "backup", filepath.Join(store, "data"), filepath.Join(store, "config"))
	default:
		t.archive++
		return t.run("create", "--compression", "zstd,3", fmt.Sprintf("%s::%d", t.repo(), t.archive), filepath.Join(store, "data"), filepath.Join(store, "config"))
	}
}

func (t *tool) restore() (measure.Cost, error) {
	switch t.name {
	case "holdfast":
		return t.run("restore", "latest", "--repo", t.repo(), "--password-file", t.pass(),
			"--base-data-path", filepath.Join(t.restored(), "data"), "--config-dir", filepath.Join(t.restored(), "config"))
	case "restic":
		return t.run("-r", t.repo(), "restore", "latest", "--target", t.restored())
	default:
		c, _, err := measure.Command(t.restored(), t.env, t.path, "extract", fmt.Sprintf("%s::%d", t.repo(), t.archive))
		return c, err
	}
}

// check reads the whole repository. That of Holdfast is checked by stock restic as well.
func (t *tool) check() error {
	switch t.name {
	case "holdfast":
		if _, err := t.run("check", "--read-data", "--repo", t.repo(), "--password-file", t.pass()); err != nil {
			return err
		}
		if t.restic == "" {
			return nil
		}
		_, _, err := measure.Command(t.dir, t.env, t.restic, "-r", t.repo(), "--no-cache", "check", "--read-data")
		return err
	case "restic":
		_, err := t.run("-r", t.repo(), "check", "--read-data")
		return err
	default:
		_, err := t.run("check", "--verify-data", t.repo())
		return err
	}
}

func (t *tool) usage() (usage, error) {
	u := usage{entries: -1}
	var err error
	if u.files, u.bytes, err = measure.Usage(t.repo()); err != nil {
		return u, err
	}
	switch {
	case t.restic != "":
		// --no-cache, so that counting leaves no trace in the cache that is measured.
		_, out, err := measure.Command(t.dir, t.env, t.restic, "-r", t.repo(), "--no-cache", "--no-lock", "--quiet", "list", "blobs")
		if err != nil {
			return u, err
		}
		u.entries = 0
		for line := range strings.SplitSeq(out, "\n") {
			if strings.HasPrefix(line, "data ") || strings.HasPrefix(line, "tree ") {
				u.entries++
			}
		}
	case t.name == "borg":
		_, out, err := measure.Command(t.dir, t.env, t.path, "info", "--json", t.repo())
		if err != nil {
			return u, err
		}
		var info struct {
			Cache struct {
				Stats struct {
					Chunks int64 `json:"total_unique_chunks"`
				} `json:"stats"`
			} `json:"cache"`
		}
		if err := json.Unmarshal([]byte(out), &info); err != nil {
			return u, fmt.Errorf("what borg info says is no JSON: %w", err)
		}
		u.entries = info.Cache.Stats.Chunks
	}
	return u, nil
}
