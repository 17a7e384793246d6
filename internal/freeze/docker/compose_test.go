package docker

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	engine "github.com/holdfast-backup/holdfast/internal/docker"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/freeze/freezetest"
)

// composed makes a container as compose does.
func composed(t *testing.T, project, service, dependsOn string, s freezetest.Spec) string {
	t.Helper()
	s.Name = project + "-" + service + "-1"
	s.Labels = map[string]string{LabelProject: project, LabelService: service, labelDependsOn: dependsOn, labelOneOff: "False"}
	return freezetest.TheEngine(t).Run(t, s)
}

// started is when a container was started last.
func started(t *testing.T, id string) time.Time {
	t.Helper()
	var raw struct{ State struct{ StartedAt time.Time } }
	if err := json.Unmarshal(freezetest.TheEngine(t).Inspect(t, id).Raw, &raw); err != nil {
		t.Fatal(err)
	}
	return raw.State.StartedAt
}

func TestCompose(t *testing.T) {
	t.Parallel()
	e := freezetest.TheEngine(t)
	idle := []string{"run", "idle"}
	for name, c := range map[string]struct {
		services []string
		db       string // its state while frozen
	}{
		"the product alone":     {nil, "running"},
		"with a service listed": {[]string{"db"}, "exited"},
	} {
		t.Run(name, func(t *testing.T) {
			b := freezetest.NewBase(t)
			project := fmt.Sprintf("full%d", len(c.services))
			db := composed(t, project, "db", "", freezetest.Spec{Image: freezetest.SideImage, Command: idle, Restart: "always", Health: true})
			tika := composed(t, project, "tika", "db:service_started:false", freezetest.Spec{Image: freezetest.SideImage, Command: idle})
			cloud := composed(t, project, "cloud", "tika:service_started:false,db:service_healthy:false", freezetest.Spec{Image: freezetest.SideImage, Base: b, Command: shell, Restart: "always"})
			collab := composed(t, project, "collaboration", "cloud:service_started:true,tika:service_started:false", freezetest.Spec{Command: idle, Restart: "unless-stopped"})
			proxy := composed(t, project, "proxy", "cloud:service_started:false", freezetest.Spec{Image: freezetest.SideImage, Command: idle, Restart: "always"})
			// It lives in the network of the server, which is another one after a start.
			sidecar := composed(t, project, "sidecar", "", freezetest.Spec{Image: freezetest.SideImage, Command: idle, Network: "container:" + cloud})
			other := composed(t, "other", "cloud", "", freezetest.Spec{Command: idle})
			b.AwaitStarts(1)
			proxyStart := started(t, proxy)

			f := newFreezer(t, Options{Project: project, Services: c.services})
			rec, err := freeze.Guarded(background(), f, b.Inst, freeze.Options{StateDir: t.TempDir()}, func(context.Context) error {
				b.WantQuiet()
				b.WantEvents("started", "stopped")
				policy := map[string]string{"running": "always", "exited": "no"}[c.db]
				e.WantState(t, db, c.db, policy)
				e.WantState(t, tika, "running", "no")
				e.WantState(t, cloud, "exited", "no")
				e.WantState(t, collab, "exited", "no")
				e.WantState(t, sidecar, "exited", "no")
				e.WantState(t, proxy, "running", "always")
				e.WantState(t, other, "running", "no")
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if rec.Method != "compose" {
				t.Errorf("method %s", rec.Method)
			}
			e.WantState(t, db, "running", "always")
			e.WantState(t, cloud, "running", "always")
			e.WantState(t, collab, "running", "unless-stopped")
			e.WantState(t, sidecar, "running", "no")
			b.WantEvents("started", "stopped", "started")
			if started(t, proxy) != proxyStart {
				t.Error("the proxy was restarted")
			}
			if at := started(t, cloud); !at.Before(started(t, collab)) || !at.Before(started(t, sidecar)) {
				t.Errorf("started cloud %s, collaboration %s, sidecar %s", at, started(t, collab), started(t, sidecar))
			}
			// The health check alone takes half a second.
			if gap := started(t, cloud).Sub(started(t, db)); c.db == "exited" && gap < 500*time.Millisecond {
				t.Errorf("cloud was started %s after db, which was not healthy by then", gap)
			}
		})
	}
}

// TestComposeRefused: what is asked for must be there.
func TestComposeRefused(t *testing.T) {
	t.Parallel()
	b := freezetest.NewBase(t)
	composed(t, "side", "db", "", freezetest.Spec{Image: freezetest.SideImage, Command: []string{"run", "idle"}})
	for _, o := range []Options{{Project: "side"}, {Project: "side", Services: []string{"nobody"}}} {
		if _, err := newFreezer(t, o).Plan(background(), b.Inst); err == nil {
			t.Errorf("%+v: no error", o)
		} else {
			t.Log(err)
		}
	}
}

func TestIsProduct(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		image, path string
		args        []string
		want        bool
	}{
		{"owncloud/ocis:7.1", "/usr/bin/ocis", []string{"server"}, true},
		{"owncloud/ocis-rolling@sha256:00", "x", nil, true},
		{"registry:5000/opencloudeu/opencloud-rolling:latest", "x", nil, true},
		{"sha256:00", "/bin/sh", []string{"-c", "opencloud init || true; opencloud server"}, true},
		{"mine", "/usr/local/bin/ocis", []string{"collaboration", "server"}, true},
		{"opencloudeu/web-extensions:draw", "/bin/cp", []string{"-R", "/usr/share/nginx/html/", "/apps"}, false},
		{"traefik:v3", "/entrypoint.sh", []string{"traefik", "--docker.network=opencloud-net"}, false},
		{"minio/minio", "/bin/sh", []string{"-c", "mkdir -p /data/ocis-bucket && minio server /data"}, false},
		{"minio/minio", "/bin/sh", []string{"-c", "mkdir -p /data/ocis && minio server /data"}, false},
		{"collabora/code:24", "/start.sh", nil, false},
	} {
		var k engine.Container
		k.Config.Image, k.Path, k.Args = c.image, c.path, c.args
		if got := IsProduct(&k); got != c.want {
			t.Errorf("%s %s %q: got %v", c.image, c.path, c.args, got)
		}
	}
}

func TestParseDependsOn(t *testing.T) {
	t.Parallel()
	for label, want := range map[string][]dependency{
		"":      nil,
		"db":    {{"db", ""}},
		"db,kv": {{"db", ""}, {"kv", ""}},
		"db:service_healthy:false,kv:service_started:true": {{"db", "service_healthy"}, {"kv", "service_started"}},
	} {
		if got := parseDependsOn(label); !slices.Equal(got, want) {
			t.Errorf("%q: got %v", label, got)
		}
	}
}
