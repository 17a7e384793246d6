package main

import (
	"reflect"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/restore"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

func TestHostMaps(t *testing.T) {
	m := &snapshot.Manifest{DataSets: []snapshot.DataSet{
		{Name: "idm", Path: "/srv/cloud/data/idm", ServerPath: "/var/lib/ocis/idm"},
		{Name: "nats", Path: "/srv/cloud/data/nats", ServerPath: "/var/lib/ocis/nats"},
		{Name: "web", Path: "/srv/web"},
	}}
	for name, c := range map[string]struct {
		in   []discover.PathMap
		want []restore.PathMap
	}{
		"a path of the old machine":      {[]discover.PathMap{{Server: "/srv/web", Host: "/new"}}, []restore.PathMap{{From: "/srv/web", To: "/new"}}},
		"the server's own name":          {[]discover.PathMap{{Server: "/var/lib/ocis", Host: "/new"}}, []restore.PathMap{{From: "/srv/cloud/data", To: "/new"}}},
		"the settings of the backup":     {[]discover.PathMap{{Server: "/var/lib/ocis", Host: "/srv/cloud/data"}}, nil},
		"part of a name is no match":     {[]discover.PathMap{{Server: "/var/lib/oc", Host: "/new"}}, []restore.PathMap{{From: "/var/lib/oc", To: "/new"}}},
		"a place that stays, said aloud": {[]discover.PathMap{{Server: "/srv/web", Host: "/srv/web"}}, nil},
		"nothing":                        {nil, nil},
	} {
		if got := hostMaps(m, c.in); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: got %v, want %v", name, got, c.want)
		}
	}
}

func TestMoved(t *testing.T) {
	for _, c := range [][3]string{{"", "/srv", ""}, {"/srv/", "/srv", ""}, {"/new", "/srv", "/new"}} {
		if got := moved(c[0], c[1]); got != c[2] {
			t.Errorf("moved(%q, %q) = %q, want %q", c[0], c[1], got, c[2])
		}
	}
}

func TestParseOwner(t *testing.T) {
	if o, err := parseOwner("1000:1001"); err != nil || *o != (restore.Owner{UID: 1000, GID: 1001}) {
		t.Errorf("got %v, %v", o, err)
	}
	for _, s := range []string{"1000", "a:b", "-1:0", "1:2:3", ":"} {
		if _, err := parseOwner(s); exitCode(err) != exitUsage {
			t.Errorf("%q is accepted, or no wrong usage: %v", s, err)
		}
	}
}
