package capture

import "sort"

// passage tells which groups of the last backup can be passed over as a whole: nothing in them differs, and neither does the entry
// behind them, where they end. A grouper that comes to the first entry of such a group takes it as it was, and needs no other
// entry of it. Whether it comes to it is seen on the way, because a group before it may have become longer.
type passage struct {
	groups []*group // in order, of one part of the tar
	stop   []int    // for each group the first one from there on that must be made of its entries
	at     int      // the group that is being passed over; -1: none
}

// passage returns what can be passed over of groups, which are in order. usable reports whether a group can
// be used again for all that is not in differ.
func (c *capturer) passage(groups []*group, differ differing, usable func(g *group) bool) *passage {
	n := len(groups)
	read := make([]bool, n+1)
	for dir, itself := range differ {
		if !itself {
			continue
		}
		k := sort.Search(n, func(i int) bool { return comparePaths(groups[i].first, dir) > 0 })
		k = max(k-1, 0) // the group that dir is in
		for read[k] = true; k+1 < n && within(groups[k+1].first, dir); k++ {
			read[k+1] = true
		}
	}
	p := &passage{groups: groups, stop: make([]int, n), at: -1}
	next := n
	for k := n - 1; k >= 0; k-- {
		// Where the last one ends is not known.
		if g := groups[k]; k == n-1 || read[k] || g.print == [32]byte{} || !usable(g) || !c.hasAll(g.ids) || !c.hasAll(g.needs) {
			next = k
		}
		p.stop[k] = next
	}
	return p
}

// enter reports whether the group that begins with first can be passed over, and begins to.
func (p *passage) enter(first string) bool {
	k := sort.Search(len(p.groups), func(i int) bool { return comparePaths(p.groups[i].first, first) >= 0 })
	if k == len(p.groups) || p.groups[k].first != first || p.stop[k] == k {
		return false
	}
	p.at = k
	return true
}

// next goes on to the entry path. It reports whether that is in a group that is passed over as well, and tells take of each
// one that begins on the way.
func (p *passage) next(path string, take func(*group)) bool {
	for k := p.at + 1; k < len(p.groups) && comparePaths(p.groups[k].first, path) <= 0; k++ {
		if p.stop[k] == k {
			p.at = -1
			return false
		}
		p.at = k
		take(p.groups[k])
	}
	return true
}

// covers reports whether all that is below the directory dir lies in groups that are passed over.
func (p *passage) covers(dir string) bool {
	if p == nil || p.at < 0 {
		return false
	}
	first := p.groups[p.stop[p.at]].first
	return comparePaths(first, dir) > 0 && !within(first, dir)
}

// passer returns what a scanner asks of a directory below which nothing differs. count is told of what is passed over.
func (gr *grouper) passer(count func(*entry)) func(dir string, l *listing, kids []byte) bool {
	return func(dir string, l *listing, kids []byte) bool {
		if !gr.over.covers(dir) {
			return false
		}
		n := countKids(l, kids, count)
		gr.c.entries.Add(n)
		gr.c.passed.Add(n)
		return true
	}
}

// again returns a group that is what g was.
func (g *group) again() *group {
	return &group{first: g.first, print: g.print, refs: g.refs, ids: g.ids, size: g.size, recs: g.recs, needs: g.needs, reused: true}
}

// countKids counts what is below a directory, and calls fn for each entry; only its kind and size are valid.
func countKids(l *listing, kids []byte, fn func(e *entry)) (n int64) {
	c := cursor{l: l, name: make([]byte, 0, 64)}
	c.reset(kids)
	for c.next() {
		n++
		fn(&c.o.entry)
		if len(c.o.kids) > 0 {
			n += countKids(l, c.o.kids, fn)
		}
	}
	return n
}
