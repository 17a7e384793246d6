package maintain_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/backend/mem"
	"github.com/holdfast-backup/holdfast/internal/maintain"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/retention"
)

// The variables that make this test binary a program of its own: "backup SEED" or "prune".
const (
	envRole = "HOLDFAST_TEST_ROLE"
	envRepo = "HOLDFAST_TEST_REPO"
)

func TestMain(m *testing.M) {
	if role := os.Getenv(envRole); role != "" {
		if err := child(role); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

var keepThree = maintain.ForgetOptions{Policy: retention.Policy{Last: 3}, GroupBy: retention.GroupBy{}}

// child does the work, and waits for others as --retry-lock does, only that it looks more often.
func child(role string) error {
	ctx := context.Background()
	be := local.New(os.Getenv(envRepo))
	what, seed, _ := strings.Cut(role, " ")
	for start := time.Now(); ; time.Sleep(30 * time.Millisecond) {
		var err error
		switch what {
		case "backup":
			n, perr := strconv.ParseUint(seed, 10, 64)
			if perr != nil {
				return perr
			}
			_, err = backUp(ctx, be, instanceAt(n), time.Now(), true)
		case "prune":
			err = forgetAndPrune(ctx, be, keepThree, maintain.PruneOptions{PruneOptions: repo.PruneOptions{MaxUnused: repo.UnusedPercent(0)}})
		}
		var locked *repo.LockedError
		if !errors.As(err, &locked) || time.Since(start) > 2*time.Minute {
			return err
		}
	}
}

// instanceAt is an instance whose content depends on the seed; those of near seeds share files.
func instanceAt(seed uint64) *instance {
	in := &instance{rnd: rand.New(rand.NewPCG(seed/3, 17)), host: "a", files: map[string][]byte{}}
	for range 5 {
		in.change()
	}
	in.rnd = rand.New(rand.NewPCG(seed, 18))
	in.change()
	return in
}

// expect adds what a backup of the seed must give back.
func expect(t *testing.T, want map[id.ID]state, seed uint64) {
	t.Helper()
	be := mem.New()
	newRepo(t, be)
	s, err := backUp(t.Context(), be, instanceAt(seed), time.Now(), true)
	if err != nil {
		t.Fatal(err)
	}
	want[*s.Tree] = instanceAt(seed).state()
}

func process(t *testing.T, dir, role string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), envRole+"="+role, envRepo+"="+dir, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	return cmd
}

// Backups and prunes in processes of their own at the same time: they take turns, nobody loses anything.
func TestConcurrentProcesses(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "repo")
	be := local.New(dir)
	newRepo(t, be)
	want := map[id.ID]state{}
	const workers, rounds = 3, 3
	for seed := range uint64(workers * rounds) {
		expect(t, want, seed)
	}
	var wg sync.WaitGroup
	start := func(roles ...string) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for _, role := range roles {
				if err := process(t, dir, role).Run(); err != nil {
					t.Errorf("%s: %v", role, err)
				}
			}
		}()
	}
	for w := range workers {
		var roles []string
		for i := range rounds {
			roles = append(roles, fmt.Sprintf("backup %d", w*rounds+i))
		}
		start(roles...)
	}
	start("prune", "prune", "prune")
	wg.Wait()
	if t.Failed() {
		return
	}
	if list := holds(t, "in the end", be, want); len(list) < 3 {
		t.Errorf("%d snapshots are left", len(list))
	}
	if err := process(t, dir, "prune").Run(); err != nil {
		t.Fatal(err)
	}
	if list := holds(t, "after a last prune", be, want); len(list) != 3 {
		t.Errorf("%d snapshots are left after a last prune", len(list))
	}
	unused(t, "after a last prune", be)
	resticClean(t, "in the end", dir)
}

// SIGKILL at any moment, to a backup or a prune; then the next one goes on.
func TestKilledProcesses(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir := filepath.Join(t.TempDir(), "repo")
	be := local.New(dir)
	newRepo(t, be)
	want := map[id.ID]state{}
	seed := uint64(time.Now().UnixNano()) // the moments cannot be repeated anyway
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 19))
	took := map[string]time.Duration{} // of one that was left alone
	for i := range uint64(14) {
		role := "prune"
		if i%2 == 0 {
			role = fmt.Sprintf("backup %d", 100+i)
			expect(t, want, 100+i)
		}
		kind, _, _ := strings.Cut(role, " ")
		what := fmt.Sprintf("seed %d, step %d, %s", seed, i, role)
		cmd := process(t, dir, role)
		began := time.Now()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if d, ok := took[kind]; ok && i%4 < 2 {
			time.Sleep(time.Duration(rnd.Int64N(int64(d))))
			_ = cmd.Process.Kill() // it may have ended
			_ = cmd.Wait()
			if _, err := mustOpen(t, be).Unlock(ctx, false); err != nil { // the process is gone, so its lock is stale
				t.Fatal(err)
			}
		} else {
			if err := cmd.Wait(); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			took[kind] = time.Since(began)
		}
		holds(t, what, be, want)
	}
	if err := process(t, dir, "prune").Run(); err != nil {
		t.Fatal(err)
	}
	if list := holds(t, "in the end", be, want); len(list) != 3 {
		t.Errorf("%d snapshots are left", len(list))
	}
	unused(t, "in the end", be)
	resticClean(t, "in the end", dir)
}
