package retention

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

var now = time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)

// snap makes a snapshot of the instance "cloud" at a time such as "2026-11-25 03:00". What follows a
// blank after it: "incomplete", "foreign", "host=...", "path=...", or tags.
func snap(t testing.TB, line string) (s Snapshot, complete bool) {
	t.Helper()
	f := strings.Fields(line)
	at, err := time.Parse("2006-01-02 15:04", f[0]+" "+f[1])
	if err != nil {
		t.Fatal(err)
	}
	s = Snapshot{ID: id.Hash([]byte(line)), Time: at, Host: "cloud", Paths: []string{"/data", "/etc"}, Own: true, Tags: []string{"holdfast"}}
	complete = true
	for _, w := range f[2:] {
		switch k, v, _ := strings.Cut(w, "="); {
		case w == "incomplete":
			complete = false
		case w == "foreign":
			s.Own, s.Tags = false, slices.DeleteFunc(s.Tags, func(x string) bool { return x == "holdfast" })
		case k == "host":
			s.Host = v
		case k == "path":
			s.Paths = []string{v}
		default:
			s.Tags = append(s.Tags, w)
		}
	}
	return s, complete
}

func span(t testing.TB, s string) Span {
	t.Helper()
	out, err := ParseSpan(s)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Each line is a snapshot and, after the bar, why it stays; nothing there: it goes.
func TestDecide(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		options Options
		lines   string
	}{
		{"last", Options{Policy: Policy{Last: 2}}, `
			2026-11-26 03:00 | last
			2026-11-25 03:00 | last
			2026-11-24 03:00 |
			2026-11-23 03:00 |`},
		{"more than there are", Options{Policy: Policy{Last: 9}}, `
			2026-11-26 03:00 | last
			2026-11-25 03:00 | last`},
		{"unlimited", Options{Policy: Policy{Daily: Unlimited}}, `
			2026-11-26 09:00 | daily
			2026-11-26 03:00 |
			2026-11-25 03:00 | daily
			1999-01-01 00:00 | daily`},
		{"hourly takes the newest of an hour", Options{Policy: Policy{Hourly: 2}}, `
			2026-11-26 09:59 | hourly
			2026-11-26 09:01 |
			2026-11-26 08:59 | hourly
			2026-11-26 07:00 |`},
		{"daily, and the oldest while there is room", Options{Policy: Policy{Daily: 4}}, `
			2026-11-26 09:00 | daily
			2026-11-25 23:59 | daily
			2026-11-25 00:00 | oldest daily`},
		{"weeks are of the ISO calendar", Options{Policy: Policy{Weekly: 2}}, `
			2026-01-04 12:00 | weekly
			2025-12-29 00:00 |
			2025-12-28 23:00 | weekly
			2025-12-22 00:00 |`},
		{"months and years", Options{Policy: Policy{Monthly: 2, Yearly: 2}}, `
			2026-11-26 03:00 | monthly, yearly
			2026-11-01 03:00 |
			2026-10-31 03:00 | monthly
			2026-09-30 03:00 |
			2025-12-31 03:00 | yearly
			2025-01-01 03:00 |
			2024-12-31 03:00 |`},
		{"a slot is not wasted on days without a backup", Options{Policy: Policy{Daily: 3}}, `
			2026-11-26 03:00 | daily
			2026-11-20 03:00 | daily
			2026-10-01 03:00 | daily
			2026-09-01 03:00 |`},
		{"within counts from the newest, not from today", Options{Policy: Policy{Within: Span{Days: 2}}}, `
			2026-10-10 03:00 | within 2d
			2026-10-08 03:01 | within 2d
			2026-10-08 03:00 |
			2026-10-07 03:00 |`},
		{"one a day within a month", Options{Policy: Policy{WithinDaily: Span{Months: 1}}}, `
			2026-11-26 09:00 | daily within 1m
			2026-11-26 03:00 |
			2026-11-02 03:00 | daily within 1m
			2026-10-26 09:00 |
			2026-10-20 03:00 |`},
		{"tags", Options{Policy: Policy{Tags: [][]string{{"keep"}, {"a", "b"}}}}, `
			2026-11-26 03:00 a |
			2026-11-25 03:00 a b | tag a,b
			2026-11-24 03:00 keep | tag keep
			2026-11-23 03:00 |`},
		{"an incomplete one counts as any, but never as the last complete", Options{Policy: Policy{Last: 2}}, `
			2026-11-26 03:00 incomplete | last
			2026-11-25 03:00 incomplete | last
			2026-11-24 03:00 incomplete |
			2026-11-23 03:00 | last complete
			2026-11-22 03:00 |`},
		{"unless told", Options{Policy: Policy{Last: 1}, RemoveLastComplete: true}, `
			2026-11-26 03:00 incomplete | last
			2026-11-25 03:00 |`},
		{"nothing was ever complete", Options{Policy: Policy{Last: 1}}, `
			2026-11-26 03:00 incomplete | last
			2026-11-25 03:00 incomplete |`},
		{"each instance for itself", Options{Policy: Policy{Last: 1}}, `
			2026-11-26 03:00 | last
			2026-11-25 03:00 host=other | last
			2026-11-24 03:00 host=other |
			2026-11-23 03:00 path=/srv | last
			2026-11-22 03:00 |`},
		{"one group for all does not take an instance's last", Options{Policy: Policy{Last: 1}, GroupBy: GroupBy{}}, `
			2026-11-26 03:00 | last
			2026-11-25 03:00 host=other | last complete
			2026-11-24 03:00 host=other |`},
		{"a tag rule that fits nothing leaves the last complete", Options{Policy: Policy{Tags: [][]string{{"x"}}}}, `
			2026-11-26 03:00 incomplete |
			2026-11-25 03:00 | last complete
			2026-11-24 03:00 |`},
		{"other programs' snapshots are not judged", Options{Policy: Policy{Last: 1}}, `
			2026-11-26 03:00 | last
			2026-11-25 03:00 foreign | untouched
			2026-11-24 03:00 |`},
		{"unless asked, and never as the last complete", Options{Policy: Policy{Last: 1}, OtherPrograms: true}, `
			2026-11-26 03:00 foreign | last
			2026-11-25 03:00 foreign |
			2026-11-24 03:00 | last complete`},
		{"the future neither goes nor takes a place", Options{Policy: Policy{Last: 1, Daily: 2}}, `
			2099-01-01 00:00 | in the future: not judged
			2026-11-28 00:00 incomplete | in the future: not judged
			2026-11-26 12:30 | last, daily
			2026-11-25 03:00 | daily
			2026-11-24 03:00 |`},
		{"within does not count from the future", Options{Policy: Policy{Within: Span{Days: 1}}}, `
			2099-01-01 00:00 | in the future: not judged
			2026-11-26 03:00 | within 1d
			2026-11-25 02:00 |`},
		{"only the future", Options{Policy: Policy{Last: 1}}, `
			2099-01-01 00:00 | in the future: not judged`},
		{"a clock that stood at its start", Options{Policy: Policy{Daily: 1}}, `
			2026-11-26 03:00 | daily
			1970-01-01 00:00 |
			0001-01-01 00:00 |`},
		{"no policy", Options{}, `
			2026-11-26 03:00 | no policy`},
		{"none", Options{Policy: Policy{Last: 1}}, ``},
	} {
		t.Run(c.name, func(t *testing.T) {
			var all []Snapshot
			want := map[id.ID]string{}
			whole := map[id.ID]bool{}
			for line := range strings.Lines(strings.TrimSpace(c.lines)) {
				what, why, _ := strings.Cut(line, "|")
				s, complete := snap(t, what)
				all = append(all, s)
				want[s.ID], whole[s.ID] = strings.TrimSpace(why), complete
			}
			rand.New(rand.NewPCG(5, 5)).Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
			o := c.options
			o.Now, o.Complete = now, func(s *Snapshot) bool { return whole[s.ID] }
			if o.GroupBy == (GroupBy{}) && !strings.Contains(c.name, "one group") {
				o.GroupBy = DefaultGroup
			}
			got := map[id.ID]string{}
			for _, g := range Decide(all, o) {
				for _, d := range g.Decisions {
					got[d.ID] = strings.Join(d.Reasons, ", ")
					if d.Keep != (len(d.Reasons) > 0) {
						t.Errorf("%v: keep %v with reasons %q", d.Time, d.Keep, d.Reasons)
					}
				}
			}
			for _, s := range all {
				why, judged := got[s.ID]
				if !judged {
					why = "untouched"
				}
				if why != want[s.ID] {
					t.Errorf("%v: %q, want %q", s.Time, why, want[s.ID])
				}
			}
		})
	}
}

func TestSelect(t *testing.T) {
	t.Parallel()
	a, _ := snap(t, "2026-11-26 03:00")
	b, _ := snap(t, "2026-11-25 03:00 x")
	c, _ := snap(t, "2026-11-24 03:00 x")
	o := Options{Policy: Policy{Tags: [][]string{{"none"}}}, GroupBy: DefaultGroup, Now: now,
		Select: func(s *Snapshot) bool { return slices.Contains(s.Tags, "x") }}
	// What is not selected stays, and so do the others have a complete one beside them.
	o.Complete = func(s *Snapshot) bool { return s.ID == a.ID || s.ID == c.ID }
	g := Decide([]Snapshot{a, b, c}, o)
	if len(g) != 1 || len(g[0].Decisions) != 2 || g[0].Decisions[0].Keep || g[0].Decisions[1].Keep {
		t.Errorf("got %+v", g)
	}
	o.Complete = func(s *Snapshot) bool { return s.ID == c.ID }
	if g = Decide([]Snapshot{a, b, c}, o); g[0].Decisions[0].Keep || !g[0].Decisions[1].Protected {
		t.Errorf("got %+v", g)
	}
}

func TestLastComplete(t *testing.T) {
	t.Parallel()
	var all []Snapshot
	whole := map[id.ID]bool{}
	for _, line := range []string{"2026-11-26 03:00 incomplete", "2026-11-25 03:00", "2026-11-24 03:00", "2026-11-24 04:00 host=b", "2026-11-23 03:00 foreign"} {
		s, complete := snap(t, line)
		all = append(all, s)
		whole[s.ID] = complete
	}
	complete := func(s *Snapshot) bool { return whole[s.ID] }
	for _, c := range []struct{ remove, want []int }{
		{[]int{0}, nil}, {[]int{1}, nil}, {[]int{1, 2}, []int{1}}, {[]int{0, 1, 2, 3, 4}, []int{1, 3}}, {[]int{3}, []int{3}}, {[]int{4}, nil}, {nil, nil},
	} {
		remove := map[id.ID]bool{}
		for _, i := range c.remove {
			remove[all[i].ID] = true
		}
		var got []int
		for _, s := range LastComplete(all, remove, complete) {
			got = append(got, slices.IndexFunc(all, func(x Snapshot) bool { return x.ID == s.ID }))
		}
		slices.Sort(got)
		if !slices.Equal(got, c.want) {
			t.Errorf("removing %v takes the last of %v, want %v", c.remove, got, c.want)
		}
	}
}

// Three years of a backup each night, with forget after each: what is left each day is just what was
// promised, computed here from the calendar alone.
func TestThreeYears(t *testing.T) {
	t.Parallel()
	p := Policy{Daily: 7, Weekly: 5, Monthly: 12, Yearly: 3}
	start := time.Date(2023, 11, 27, 3, 0, 0, 0, time.UTC)
	const days = 3*365 + 1
	var have []Snapshot
	for n := range days {
		day := start.AddDate(0, 0, n)
		var d id.ID
		binary.BigEndian.PutUint32(d[:], uint32(n))
		have = append(have, Snapshot{ID: d, Time: day.Add(time.Duration(n%7) * time.Minute), Host: "cloud", Own: true})
		var left []Snapshot
		for _, g := range Decide(have, Options{Policy: p, GroupBy: DefaultGroup, Now: day.Add(time.Hour), Complete: func(*Snapshot) bool { return true }}) {
			for _, d := range g.Decisions {
				if d.Keep {
					left = append(left, *d.Snapshot)
				}
			}
		}
		have = left

		// Backups are daily, so the promise is: the last 7 days; the last day of each of the last 5
		// weeks, 12 months, 3 years (for the present ones: today); and while a rule has room, the first of all.
		want := map[int]bool{}
		promise := func(count int, same func(a, b time.Time) bool) {
			slots := 0
			for i := n; i >= 0 && slots < count; i-- {
				if i == n || !same(start.AddDate(0, 0, i), start.AddDate(0, 0, i+1)) {
					want[i] = true
					slots++
				}
			}
			if slots < count {
				want[0] = true
			}
		}
		promise(7, func(a, b time.Time) bool { return false })
		promise(5, func(a, b time.Time) bool { return b.Weekday() != time.Monday })
		promise(12, func(a, b time.Time) bool { return a.Month() == b.Month() })
		promise(3, func(a, b time.Time) bool { return a.Year() == b.Year() })
		got := map[int]bool{}
		for _, s := range have {
			got[int(binary.BigEndian.Uint32(s.ID[:]))] = true
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("after day %d (%s): left %v, promised %v", n, day.Format(time.DateOnly), keys(got), keys(want))
		}
	}
	if len(have) < 20 || len(have) > 27 {
		t.Errorf("%d snapshots are left after three years", len(have))
	}
}

func keys(m map[int]bool) []int {
	var out []int
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// Laws over random histories: what is judged is each snapshot once, applying a policy again changes
// nothing, a stronger policy keeps no less, and an instance that had a complete snapshot has one.
func TestLaws(t *testing.T) {
	t.Parallel()
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		all, whole := history(r)
		complete := func(s *Snapshot) bool { return whole[s.ID] }
		o := Options{Policy: randomPolicy(r), GroupBy: GroupBy{r.IntN(2) == 0, r.IntN(2) == 0, r.IntN(2) == 0},
			OtherPrograms: r.IntN(4) == 0, Complete: complete, Now: now}
		if o.Policy.Empty() {
			continue
		}
		kept, judged := run(all, o)
		for i := range all {
			if all[i].Own && !judged[all[i].ID] || !all[i].Own && judged[all[i].ID] != o.OtherPrograms {
				t.Fatalf("seed %d: snapshot %d judged %v", seed, i, judged[all[i].ID])
			}
		}
		var left []Snapshot
		had, has := map[string]bool{}, map[string]bool{}
		for _, s := range all {
			k := DefaultGroup.key(&s).text()
			good := s.Own && whole[s.ID]
			if good {
				had[k] = true
			}
			if kept[s.ID] || !judged[s.ID] {
				left = append(left, s)
				if good {
					has[k] = true
				}
			}
		}
		if !reflect.DeepEqual(had, has) {
			t.Fatalf("seed %d: complete before %v, after %v", seed, had, has)
		}
		if again, _ := run(left, o); len(again) != len(kept) {
			// A rule with room keeps the oldest there is, which cannot become less.
			t.Fatalf("seed %d: %d kept, of those %d the second time", seed, len(kept), len(again))
		}
		more := o
		more.Policy.Last, more.Policy.Daily = o.Policy.Last+2, o.Policy.Daily+3
		m, _ := run(all, more)
		for d := range kept {
			if !m[d] && !protectedOnly(all, o, d) {
				t.Fatalf("seed %d: a stronger policy removes %v", seed, d)
			}
		}
	}
}

func protectedOnly(all []Snapshot, o Options, d id.ID) bool {
	for _, g := range Decide(all, o) {
		for _, x := range g.Decisions {
			if x.ID == d {
				// What was kept only as the oldest may go when the rule has other uses for its slots.
				return x.Protected || !slices.ContainsFunc(x.Reasons, func(r string) bool { return !strings.HasPrefix(r, "oldest") })
			}
		}
	}
	return false
}

func run(all []Snapshot, o Options) (kept, judged map[id.ID]bool) {
	kept, judged = map[id.ID]bool{}, map[id.ID]bool{}
	for _, g := range Decide(all, o) {
		for _, d := range g.Decisions {
			judged[d.ID] = true
			if d.Keep {
				kept[d.ID] = true
			}
		}
	}
	return kept, judged
}

func history(r *rand.Rand) ([]Snapshot, map[id.ID]bool) {
	var all []Snapshot
	whole := map[id.ID]bool{}
	for i := range r.IntN(60) {
		s := Snapshot{ID: id.Hash(fmt.Append(nil, i)), Host: []string{"a", "b"}[r.IntN(2)], Own: r.IntN(5) > 0,
			Paths: [][]string{{"/x"}, {"/x", "/y"}}[r.IntN(2)], Time: now.Add(-time.Duration(r.IntN(900)) * time.Duration(1+r.IntN(20)) * time.Hour)}
		if r.IntN(5) == 0 {
			s.Tags = []string{"t"}
		}
		whole[s.ID] = r.IntN(3) > 0
		all = append(all, s)
	}
	return all, whole
}

func randomPolicy(r *rand.Rand) Policy {
	var p Policy
	for _, c := range []*Count{&p.Last, &p.Hourly, &p.Daily, &p.Weekly, &p.Monthly, &p.Yearly} {
		if r.IntN(3) == 0 {
			*c = Count(1 + r.IntN(8))
		}
	}
	for _, s := range []*Span{&p.Within, &p.WithinHourly, &p.WithinDaily, &p.WithinWeekly, &p.WithinMonthly, &p.WithinYearly} {
		if r.IntN(6) == 0 {
			*s = Span{Months: r.IntN(3), Days: r.IntN(9), Hours: 1 + r.IntN(50)}
		}
	}
	if r.IntN(6) == 0 {
		p.Tags = [][]string{{"t"}}
	}
	return p
}

func TestParse(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]Span{"2y5m7d3h": {2, 5, 7, 3}, "14d": {Days: 14}, "": {}, "1y1h": {Years: 1, Hours: 1}} {
		if got := span(t, in); got != want || got.String() != in {
			t.Errorf("%q: %+v, %q", in, got, got.String())
		}
	}
	for _, in := range []string{"5", "d", "-1d", "3d2m", "1d1d", "1w", "99999999999999999999d", "9999999d", "1d ", "１d"} {
		if got, err := ParseSpan(in); err == nil {
			t.Errorf("%q: %+v", in, got)
		}
	}
	for in, want := range map[string]Count{"0": 0, "7": 7, "unlimited": Unlimited, "-1": Unlimited} {
		if got, err := ParseCount(in); err != nil || got != want {
			t.Errorf("%q: %v, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "-2", "x", "1.5", "99999999999"} {
		if got, err := ParseCount(in); err == nil {
			t.Errorf("%q: %v", in, got)
		}
	}
	if g, err := ParseGroupBy("paths,host"); err != nil || g != DefaultGroup {
		t.Errorf("%+v, %v", g, err)
	}
	if g, err := ParseGroupBy(""); err != nil || g != (GroupBy{}) {
		t.Errorf("%+v, %v", g, err)
	}
	if _, err := ParseGroupBy("host,owner"); err == nil {
		t.Error("grouped by owner")
	}
}
