package restore

import (
	"errors"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

func TestMapPath(t *testing.T) {
	m := &snapshot.Manifest{BasePath: "/srv/cloud/data", ConfigDir: "/etc/cloud"}
	inner := &snapshot.Manifest{BasePath: "/home/u/.ocis", ConfigDir: "/home/u/.ocis/config"}
	for _, c := range []struct {
		name     string
		m        *snapshot.Manifest
		o        Options
		from, to string // to "": it must be refused
	}{
		{"nothing moves", m, Options{}, "/else/where", "/else/where"},
		{"the base moves", m, Options{BasePath: "/new"}, "/srv/cloud/data/idm", "/new/idm"},
		{"the config stays", m, Options{BasePath: "/new"}, "/etc/cloud", "/etc/cloud"},
		{"what lies elsewhere needs a place", m, Options{BasePath: "/new"}, "/else/where", ""},
		{"and gets one", m, Options{BasePath: "/new", Map: []PathMap{{"/else", "/x"}}}, "/else/where", "/x/where"},
		{"the config in the base moves along", inner, Options{BasePath: "/new"}, "/home/u/.ocis/config", "/new/config"},
		{"unless it is named", inner, Options{BasePath: "/new", ConfigDir: "/c"}, "/home/u/.ocis/config", "/c"},
		{"a map of a folder above the base", m, Options{Map: []PathMap{{"/srv", "/a"}}}, "/srv/cloud/data/idm", "/a/cloud/data/idm"},
		{"the longest wins", m, Options{Map: []PathMap{{"/srv", "/a"}, {"/srv/cloud/data/idm", "/c"}}}, "/srv/cloud/data/idm/x", "/c/x"},
		{"part of a name is no match", m, Options{BasePath: "/new"}, "/srv/cloud/data2", ""},
	} {
		got, err := (&Plan{Manifest: c.m, o: c.o}).mapPath("set", c.from)
		var un *UnmappedError
		if c.to == "" && !errors.As(err, &un) || c.to != "" && (err != nil || got != c.to) {
			t.Errorf("%s: %q goes to %q, %v; want %q", c.name, c.from, got, err, c.to)
		}
	}
}
