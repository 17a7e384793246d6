package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/membudget"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/storegen"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

// With the least memory everything works, stays within it, and gives what it gives with plenty.
func TestLeastMemory(t *testing.T) {
	// The real program, without the race detector, which takes many times as much.
	dir := t.TempDir()
	program := filepath.Join(dir, "holdfast")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	store := filepath.Join(dir, "store")
	if _, err := storegen.Generate(t.Context(), storegen.Options{Dir: store, Seed: 11, Files: 2000, Bytes: 120 << 20, Spaces: 5}); err != nil {
		t.Fatal(err)
	}
	repository, pw, copied := filepath.Join(dir, "repo"), filepath.Join(dir, "pw"), filepath.Join(dir, "copy")
	if err := os.WriteFile(pw, []byte("a good password"), 0o600); err != nil {
		t.Fatal(err)
	}
	least := membudget.Size(membudget.Least)
	// bound is what the least may be exceeded by: pages of the program and of files that are mapped come and go.
	const bound = membudget.Least + membudget.Least/8
	run := func(memory string, args ...string) int64 {
		t.Helper()
		cmd := exec.Command(program, append(args, "--memory", memory)...)
		cmd.Env = append(os.Environ(), "HOLDFAST_CONFIG_FILE=/dev/null", "HOLDFAST_CACHE_DIR="+dir+"/cache-"+memory, "HOLDFAST_STATE_DIR="+dir+"/state",
			"HOLDFAST_REPOSITORY="+repository, "HOLDFAST_PASSWORD_FILE="+pw, "HOLDFAST_TO_PASSWORD_FILE="+pw, "GOGC=", "GOMEMLIMIT=")
		var out strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		peak, over := int64(0), make(chan error, 1)
		go func() { over <- cmd.Wait() }()
		for {
			// Not ru_maxrss: that is never less than what this test has.
			peak = max(peak, highWater(cmd.Process.Pid))
			select {
			case err := <-over:
				if err != nil {
					t.Fatalf("%v: %v\n%s", args, err, out.String())
				}
				return peak
			case <-time.After(5 * time.Millisecond):
			}
		}
	}
	small := func(args ...string) {
		t.Helper()
		if peak := run(least, args...); peak > bound || peak == 0 {
			t.Errorf("holdfast %s --memory %s took %d MiB", strings.Join(args, " "), least, peak>>20)
		}
	}
	backup := []string{"backup", "--freeze", "none", "--base-data-path", store + "/data", "--config-dir", store + "/config"}
	restore := []string{"restore", "latest", "--base-data-path", dir + "/back/data", "--config-dir", dir + "/back/config"}
	small("init")
	small(backup...)
	small(backup...) // unchanged
	run("2G", append(backup, "--full-scan")...)
	plenty := filepath.Join(dir, "plenty")
	run("2G", "init", "--repo", plenty)
	if peak := run("2G", append(backup, "--repo", plenty)...); peak <= bound {
		t.Errorf("with 2G of memory as little is used: %d MiB, so this test shows nothing", peak>>20)
	}
	small("check", "--read-data")
	small("consistency", "latest")
	small(restore...)
	small(append(restore, "--overwrite")...)
	for _, part := range []string{"data", "config"} {
		diff, err := testfixture.Diff(filepath.Join(store, part), filepath.Join(dir, "back", part))
		if err != nil || len(diff) > 0 {
			t.Errorf("%s is restored with differences: %v %v", part, diff, err)
		}
	}
	small("find", "xyzzy")
	small("forget", "--keep-last", "2", "--prune", "--max-unused", "0")
	small("init", "--repo", copied, "--password-file", pw)
	small("copy", "--to-repo", copied)
	sameTrees(t, repository, "a good password")
}

func highWater(pid int) int64 {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(data), "VmHWM:")
	rest, _, _ = strings.Cut(rest, "kB")
	kib, _ := strconv.ParseInt(strings.TrimSpace(rest), 10, 64)
	return kib << 10
}

// sameTrees compares all snapshots of a repository, but for their manifests, which tell when they were made.
func sameTrees(t *testing.T, dir, password string) {
	t.Helper()
	be := local.New(dir)
	defer be.Close()
	r, err := repo.Open(t.Context(), be, password, repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	list, err := snapshot.List(t.Context(), r)
	if err != nil || len(list) != 2 {
		t.Fatalf("%d snapshots, %v", len(list), err)
	}
	var want string
	for _, sn := range list {
		p, err := r.LoadBlob(t.Context(), repo.TreeBlob, *sn.Tree, nil)
		if err != nil {
			t.Fatal(err)
		}
		var tree struct {
			Nodes []json.RawMessage `json:"nodes"`
		}
		if err := json.Unmarshal(p, &tree); err != nil {
			t.Fatal(err)
		}
		got := ""
		for _, n := range tree.Nodes {
			if !strings.HasPrefix(string(n), `{"name":"manifest.json"`) {
				got += string(n) + "\n"
			}
		}
		if want == "" {
			want = got
		}
		if got != want || strings.Count(got, "\n") < 4 {
			t.Errorf("the tree with much memory:\n%s\nwith little:\n%s", got, want)
		}
	}
}
