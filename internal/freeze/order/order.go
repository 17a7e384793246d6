// Package order sorts what depends on one another for stopping and starting.
package order

import "slices"

// Levels gives each name the number of its level, from 0: everything that needs(name) lists is on a
// lower one. Names that are not in the list are looked through: if a needs x and x needs b, then b
// comes before a. Of a circle one link is left out; which one depends on the order of names alone.
func Levels(names []string, needs func(name string) []string) map[string]int {
	listed := map[string]bool{}
	for _, n := range names {
		listed[n] = true
	}
	const atWork = -1
	level := map[string]int{}
	var visit func(name string) int
	visit = func(name string) int {
		if l, ok := level[name]; ok {
			return max(l, 0)
		}
		level[name] = atWork
		l := 0
		for _, n := range needs(name) {
			if l, ok := level[n]; ok && l == atWork {
				continue
			}
			below := visit(n)
			if listed[n] {
				below++
			}
			l = max(l, below)
		}
		level[name] = l
		return l
	}
	result := map[string]int{}
	for _, n := range names {
		result[n] = visit(n)
	}
	return result
}

// Group puts items of one level together, lowest first.
func Group[T any](items []T, level func(T) int) [][]T {
	byLevel := map[int][]T{}
	for _, i := range items {
		byLevel[level(i)] = append(byLevel[level(i)], i)
	}
	var keys []int
	for k := range byLevel {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	var groups [][]T
	for _, k := range keys {
		groups = append(groups, byLevel[k])
	}
	return groups
}
