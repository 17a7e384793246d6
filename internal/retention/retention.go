// Package retention decides which snapshots stay: a policy and a list of snapshots give a decision
// with its reasons for each. It reads no repository and has no clock of its own.
//
// The rules are restic's, so that a policy means the same in both programs. What comes on top:
// snapshots of other programs are left alone unless asked for, a snapshot from the future neither
// goes nor takes the place of another, and of each instance one complete snapshot always stays.
package retention

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/repo/id"
)

// Snapshot is what a decision depends on.
type Snapshot struct {
	ID    id.ID
	Time  time.Time
	Host  string
	Paths []string
	Tags  []string
	// Own is true for the snapshots that Holdfast made.
	Own bool
}

// Unlimited is a count that never runs out.
const Unlimited = Count(-1)

// Count is how many snapshots a rule keeps; zero: the rule is off.
type Count int

// Policy says what to keep. Any rule that fits keeps a snapshot. The zero value keeps nothing: see Empty.
type Policy struct {
	Last, Hourly, Daily, Weekly, Monthly, Yearly Count
	// Within keep what is not older than that, measured back from the newest snapshot: Within all
	// of it, the others one each hour, day, week, month, year.
	Within, WithinHourly, WithinDaily, WithinWeekly, WithinMonthly, WithinYearly Span
	// Tags keep what bears all tags of one of the lists. An empty list fits snapshots without tags.
	Tags [][]string
}

// Empty reports whether p has no rule, and so would keep nothing.
func (p *Policy) Empty() bool {
	for _, c := range []Count{p.Last, p.Hourly, p.Daily, p.Weekly, p.Monthly, p.Yearly} {
		if c != 0 {
			return false
		}
	}
	for _, s := range []Span{p.Within, p.WithinHourly, p.WithinDaily, p.WithinWeekly, p.WithinMonthly, p.WithinYearly} {
		if s != (Span{}) {
			return false
		}
	}
	return len(p.Tags) == 0
}

// GroupBy says which snapshots are judged together, each group on its own.
type GroupBy struct{ Host, Paths, Tags bool }

// DefaultGroup is what one instance shares.
var DefaultGroup = GroupBy{Host: true, Paths: true}

// ParseGroupBy reads a list such as "host,paths"; "" is one group for all.
func ParseGroupBy(s string) (GroupBy, error) {
	var g GroupBy
	for _, w := range strings.Split(s, ",") {
		switch strings.TrimSpace(w) {
		case "":
		case "host", "hosts":
			g.Host = true
		case "path", "paths":
			g.Paths = true
		case "tag", "tags":
			g.Tags = true
		default:
			return g, fmt.Errorf("snapshots are grouped by host, paths and tags, not by %q", w)
		}
	}
	return g, nil
}

// Key is what the snapshots of a group share; parts that do not count are zero.
type Key struct {
	Host  string
	Paths []string
	Tags  []string
}

func (g GroupBy) key(s *Snapshot) Key {
	var k Key
	if g.Host {
		k.Host = s.Host
	}
	if g.Paths {
		k.Paths = slices.Sorted(slices.Values(s.Paths))
	}
	if g.Tags {
		k.Tags = slices.Sorted(slices.Values(s.Tags))
	}
	return k
}

// text is different for different keys.
func (k Key) text() string {
	p, err := json.Marshal([]any{k.Host, k.Paths, k.Tags})
	if err != nil {
		panic(err) // strings always marshal
	}
	return string(p)
}

// Options of Decide.
type Options struct {
	Policy  Policy
	GroupBy GroupBy
	// Select tells which snapshots are judged; nil: all. The others stay and are not in the result.
	Select func(*Snapshot) bool
	// OtherPrograms judges snapshots, too, that Holdfast did not make.
	OtherPrograms bool
	// Complete tells whether a snapshot of Holdfast was proven complete. It is asked for as few
	// as possible, because the answer lies in the repository.
	Complete func(*Snapshot) bool
	// RemoveLastComplete gives up the protection of an instance's last complete snapshot.
	RemoveLastComplete bool
	Now                time.Time
}

// Decision on one snapshot. Reasons say why it stays; a snapshot that goes has none.
type Decision struct {
	*Snapshot
	Keep    bool
	Reasons []string
	// Protected: no rule keeps it, but it is the last complete one of its instance.
	Protected bool
	// Future: its time lies in the future.
	Future bool
}

// Group is the result for the snapshots that were judged together, newest first.
type Group struct {
	Key       Key
	Decisions []Decision
}

// futureSlack is what two clocks may differ without one of them being called wrong.
const futureSlack = time.Hour

// Decide applies a policy. The groups are in the order of their newest snapshots, oldest group
// first. An empty policy keeps everything: callers refuse it before.
func Decide(all []Snapshot, o Options) []Group {
	byKey := map[string]*Group{}
	var groups []*Group
	for i := range all {
		s := &all[i]
		if !s.Own && !o.OtherPrograms || o.Select != nil && !o.Select(s) {
			continue
		}
		k := o.GroupBy.key(s)
		g := byKey[k.text()]
		if g == nil {
			g = &Group{Key: k}
			byKey[k.text()] = g
			groups = append(groups, g)
		}
		g.Decisions = append(g.Decisions, Decision{Snapshot: s, Future: s.Time.After(o.Now.Add(futureSlack))})
	}
	for _, g := range groups {
		slices.SortStableFunc(g.Decisions, func(a, b Decision) int {
			return cmp.Or(b.Time.Compare(a.Time), slices.Compare(b.ID[:], a.ID[:]))
		})
		o.Policy.apply(g.Decisions, o.Now)
	}
	if !o.RemoveLastComplete {
		protect(all, groups, o.Complete)
	}
	slices.SortStableFunc(groups, func(a, b *Group) int { return a.Decisions[0].Time.Compare(b.Decisions[0].Time) })
	out := make([]Group, len(groups))
	for i, g := range groups {
		out[i] = *g
	}
	return out
}

// rule is one line of a policy at work.
type rule struct {
	count  Count
	since  time.Time // zero: as far back as the count goes
	bucket func(t time.Time, nr int) string
	last   string
	reason string
}

func everySnapshot(_ time.Time, nr int) string { return fmt.Sprint(nr) }
func hour(t time.Time, _ int) string           { return t.Format("2006-01-02 15") }
func day(t time.Time, _ int) string            { return t.Format("2006-01-02") }
func month(t time.Time, _ int) string          { return t.Format("2006-01") }
func year(t time.Time, _ int) string           { return t.Format("2006") }
func week(t time.Time, _ int) string {
	y, w := t.ISOWeek()
	return fmt.Sprintf("%d-%d", y, w)
}

// rules makes the rules of p. Buckets follow the calendar of each snapshot's own time zone.
func (p *Policy) rules(newest time.Time) []rule {
	var out []rule
	for _, r := range []rule{
		{count: p.Last, bucket: everySnapshot, reason: "last"},
		{count: p.Hourly, bucket: hour, reason: "hourly"},
		{count: p.Daily, bucket: day, reason: "daily"},
		{count: p.Weekly, bucket: week, reason: "weekly"},
		{count: p.Monthly, bucket: month, reason: "monthly"},
		{count: p.Yearly, bucket: year, reason: "yearly"},
	} {
		if r.count != 0 {
			out = append(out, r)
		}
	}
	for _, w := range []struct {
		span Span
		rule
	}{
		{p.Within, rule{bucket: everySnapshot, reason: "within "}},
		{p.WithinHourly, rule{bucket: hour, reason: "hourly within "}},
		{p.WithinDaily, rule{bucket: day, reason: "daily within "}},
		{p.WithinWeekly, rule{bucket: week, reason: "weekly within "}},
		{p.WithinMonthly, rule{bucket: month, reason: "monthly within "}},
		{p.WithinYearly, rule{bucket: year, reason: "yearly within "}},
	} {
		if w.span != (Span{}) {
			w.count, w.since = Unlimited, w.span.Before(newest)
			w.reason += w.span.String()
			out = append(out, w.rule)
		}
	}
	return out
}

// apply judges one group, which is sorted newest first.
func (p *Policy) apply(list []Decision, now time.Time) {
	if p.Empty() {
		for i := range list {
			list[i].Keep, list[i].Reasons = true, []string{"no policy"}
		}
		return
	}
	first := 0 // the newest that is not in the future
	for first < len(list) && list[first].Future {
		// Its clock was wrong, or ours is. It must neither go, nor push out others by its time.
		list[first].Keep = true
		list[first].Reasons = append(list[first].Reasons, "in the future: not judged")
		first++
	}
	list = list[first:]
	if len(list) == 0 {
		return
	}
	rules := p.rules(list[0].Time)
	for nr := range list {
		d := &list[nr]
		for _, tags := range p.Tags {
			if HasTags(d.Tags, tags) {
				d.Reasons = append(d.Reasons, "tag "+strings.Join(tags, ","))
			}
		}
		for i := range rules {
			r := &rules[i]
			if r.count == 0 || !r.since.IsZero() && !d.Time.After(r.since) {
				continue
			}
			b := r.bucket(d.Time, nr)
			oldest := nr == len(list)-1
			if b == r.last && !oldest {
				continue
			}
			reason := r.reason
			if b == r.last {
				// So that what is kept reaches back as far as it can.
				reason = "oldest " + reason
			}
			d.Reasons = append(d.Reasons, reason)
			r.last = b
			if r.count > 0 {
				r.count--
			}
		}
		d.Keep = len(d.Reasons) > 0
	}
}

// HasTags reports whether have holds all of want; an empty want fits only an empty have.
func HasTags(have, want []string) bool {
	if len(want) == 0 || len(want) == 1 && want[0] == "" {
		return len(have) == 0
	}
	for _, w := range want {
		if !slices.Contains(have, w) {
			return false
		}
	}
	return true
}

// protect keeps the newest complete snapshot of each instance that would be left without any. What counts
// as an instance does not depend on how the policy groups.
func protect(all []Snapshot, groups []*Group, complete func(*Snapshot) bool) {
	goes := map[id.ID]*Decision{}
	for _, g := range groups {
		for i := range g.Decisions {
			if d := &g.Decisions[i]; d.Own && !d.Keep {
				goes[d.ID] = d
			}
		}
	}
	if len(goes) == 0 {
		return
	}
	type instance struct{ stay, going []*Snapshot }
	instances := map[string]*instance{}
	for i := range all {
		s := &all[i]
		if !s.Own {
			continue
		}
		k := DefaultGroup.key(s).text()
		if instances[k] == nil {
			instances[k] = &instance{}
		}
		if in := instances[k]; goes[s.ID] != nil {
			in.going = append(in.going, s)
		} else {
			in.stay = append(in.stay, s)
		}
	}
	for _, in := range instances {
		if len(in.going) == 0 || NewestComplete(in.stay, complete) != nil {
			continue
		}
		if s := NewestComplete(in.going, complete); s != nil {
			d := goes[s.ID]
			d.Keep, d.Protected = true, true
			d.Reasons = []string{"last complete"}
		}
	}
}

// NewestComplete returns the newest snapshot of list that is complete, or nil. It asks newest first.
func NewestComplete(list []*Snapshot, complete func(*Snapshot) bool) *Snapshot {
	list = slices.Clone(list)
	slices.SortStableFunc(list, func(a, b *Snapshot) int { return b.Time.Compare(a.Time) })
	for _, s := range list {
		if complete(s) {
			return s
		}
	}
	return nil
}

// LastComplete returns those of remove that are the newest complete snapshot of their instance while
// nothing complete of it would stay. remove must be in all.
func LastComplete(all []Snapshot, remove map[id.ID]bool, complete func(*Snapshot) bool) []*Snapshot {
	g := &Group{}
	for i := range all {
		if remove[all[i].ID] {
			g.Decisions = append(g.Decisions, Decision{Snapshot: &all[i]})
		}
	}
	protect(all, []*Group{g}, complete)
	var out []*Snapshot
	for _, d := range g.Decisions {
		if d.Protected {
			out = append(out, d.Snapshot)
		}
	}
	return out
}
