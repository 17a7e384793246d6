package retention

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend/local"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// Stock restic is the judge: with the same policy it keeps the same snapshots.
func TestLikeRestic(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "repo")
	r, err := repo.Init(ctx, local.New(dir), "pw", repo.InitOptions{KDF: repo.KDF{N: 1024, R: 8, P: 1}})
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(5, 5))
	tree := id.Hash([]byte("{\"nodes\":[]}\n"))
	zones := []*time.Location{time.UTC, time.FixedZone("", 5*3600+1800), time.FixedZone("", -8*3600)}
	at := time.Now().Truncate(time.Second)
	var all []Snapshot
	for i := range 80 {
		at = at.Add(-time.Duration(1+rnd.IntN(40*(1+i/8))) * time.Hour)
		s := &snapshot.Snapshot{Time: at.In(zones[rnd.IntN(len(zones))]), Tree: &tree, Hostname: []string{"a", "b"}[rnd.IntN(2)],
			Paths: [][]string{{"/x"}, {"/x", "/y"}}[rnd.IntN(2)], Tags: [][]string{nil, {"t"}, {"t", "u"}}[rnd.IntN(3)]}
		if err := snapshot.Save(ctx, r, s); err != nil {
			t.Fatal(err)
		}
		all = append(all, Snapshot{ID: s.ID(), Time: s.Time, Host: s.Hostname, Paths: s.Paths, Tags: s.Tags, Own: true})
	}
	for seed := range uint64(14) {
		rnd := rand.New(rand.NewPCG(seed, 7))
		p := randomPolicy(rnd)
		if p.Empty() {
			continue
		}
		group := []string{"host,paths", "host", "", "tags"}[rnd.IntN(4)]
		g, err := ParseGroupBy(group)
		if err != nil {
			t.Fatal(err)
		}
		got, oldest := map[id.ID]bool{}, map[id.ID]bool{}
		for _, g := range Decide(all, Options{Policy: p, GroupBy: g, RemoveLastComplete: true, Now: time.Now()}) {
			for _, d := range g.Decisions {
				got[d.ID] = d.Keep
				oldest[d.ID] = d.Keep && !slices.ContainsFunc(d.Reasons, func(r string) bool { return !strings.HasPrefix(r, "oldest ") })
			}
		}
		for d, keep := range resticForget(t, dir, p, group) {
			// Before 0.16, restic did not fill what room a rule has left with the oldest one.
			if got[d] != keep && !(oldest[d] && !keep) {
				s := all[slices.IndexFunc(all, func(s Snapshot) bool { return s.ID == d })]
				t.Errorf("seed %d: %+v grouped by %q: snapshot of %v: we keep it %v, restic %v", seed, p, group, s.Time, got[d], keep)
			}
		}
	}
}

func resticForget(t *testing.T, dir string, p Policy, group string) map[id.ID]bool {
	t.Helper()
	args := []string{"-r", dir, "--no-cache", "--no-lock", "forget", "--dry-run", "--json", "--group-by", group}
	for _, c := range []struct {
		flag string
		n    Count
	}{{"last", p.Last}, {"hourly", p.Hourly}, {"daily", p.Daily}, {"weekly", p.Weekly}, {"monthly", p.Monthly}, {"yearly", p.Yearly}} {
		if c.n != 0 {
			args = append(args, fmt.Sprintf("--keep-%s=%v", c.flag, c.n))
		}
	}
	for _, c := range []struct {
		flag string
		s    Span
	}{{"within", p.Within}, {"within-hourly", p.WithinHourly}, {"within-daily", p.WithinDaily},
		{"within-weekly", p.WithinWeekly}, {"within-monthly", p.WithinMonthly}, {"within-yearly", p.WithinYearly}} {
		if c.s != (Span{}) {
			args = append(args, fmt.Sprintf("--keep-%s=%v", c.flag, c.s))
		}
	}
	for _, l := range p.Tags {
		args = append(args, "--keep-tag="+strings.Join(l, ","))
	}
	cmd := exec.Command("restic", args...)
	cmd.Env = append(os.Environ(), "RESTIC_PASSWORD=pw")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("restic %v: %v", args, err)
	}
	var groups []struct {
		Keep, Remove []struct {
			ID id.ID `json:"id"`
		}
	}
	if err := json.Unmarshal(out, &groups); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	m := map[id.ID]bool{}
	for _, g := range groups {
		for _, s := range g.Keep {
			m[s.ID] = true
		}
		for _, s := range g.Remove {
			m[s.ID] = false
		}
	}
	if len(m) != 80 {
		t.Fatalf("restic judged %d snapshots", len(m))
	}
	return m
}
