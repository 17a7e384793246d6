package order

import (
	"fmt"
	"maps"
	"testing"
)

func TestLevels(t *testing.T) {
	for name, c := range map[string]struct {
		names []string
		needs map[string][]string
		want  map[string]int
	}{
		"nothing needed":     {[]string{"a", "b"}, nil, map[string]int{"a": 0, "b": 0}},
		"a chain":            {[]string{"a", "b", "c"}, map[string][]string{"a": {"b"}, "b": {"c"}}, map[string]int{"a": 2, "b": 1, "c": 0}},
		"through another":    {[]string{"a", "b"}, map[string][]string{"a": {"x"}, "x": {"b"}}, map[string]int{"a": 1, "b": 0}},
		"two ways, one long": {[]string{"a", "b", "c"}, map[string][]string{"a": {"c", "b"}, "b": {"c"}}, map[string]int{"a": 2, "b": 1, "c": 0}},
		"a circle":           {[]string{"a", "b"}, map[string][]string{"a": {"b"}, "b": {"a"}}, map[string]int{"a": 1, "b": 0}},
		"itself":             {[]string{"a"}, map[string][]string{"a": {"a"}}, map[string]int{"a": 0}},
	} {
		t.Run(name, func(t *testing.T) {
			got := Levels(c.names, func(n string) []string { return c.needs[n] })
			if !maps.Equal(got, c.want) {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

func TestGroup(t *testing.T) {
	got := Group([]string{"ccc", "a", "bb", "b"}, func(s string) int { return len(s) })
	if fmt.Sprint(got) != "[[a b] [bb] [ccc]]" {
		t.Errorf("got %v", got)
	}
}
