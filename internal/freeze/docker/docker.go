// Package docker freezes an instance that runs in containers of a Docker engine on this host: one
// container, several, or the services of the product in a compose project.
//
// The server process itself gets SIGTERM, whatever the first process of its container does with
// signals, and the container is stopped only when the server has ended. SIGKILL is never sent to a
// server. While the freeze lasts the containers have the restart policy "no".
//
// Programs that freeze in this way call freeze.Register(docker.Kind, docker.Start) before
// freeze.MaybeGuard.
package docker

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	engine "github.com/holdfast-backup/holdfast/internal/docker"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/freeze/order"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
)

// Kind is the kind of recipe of this package.
const Kind = "docker"

// Options configures the freezer.
type Options struct {
	// Host is the engine, as DOCKER_HOST would name it; "" is what docker.New makes of it.
	Host string
	// Containers are names or ids. They are started in this order, and stopped in the other.
	Containers []string
	// Project is a compose project; Containers must be empty then.
	Project string
	// Services of the project to stop besides those of the product.
	Services     []string
	StopTimeout  time.Duration // 0 is freeze.DefaultStopTimeout
	ReadyCommand string        // run on this host
	ReadyURL     string
	ReadyTimeout time.Duration // 0 is freeze.DefaultReadyTimeout
	StartRetries int           // 0 is freeze.DefaultStartRetries; negative is none
	StartBackoff time.Duration // 0 is freeze.DefaultBackoff
	Progress     progress.Sink `json:"-"`

	viaExec bool // tests: behave as if processes of containers could not be seen from here
}

// Docker is the freezer.
type Docker struct {
	o      Options
	client *engine.Client
}

var (
	containerName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)
	projectName   = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]*$`)
)

// Parse reads the argument of --freeze: docker:CONTAINER[,CONTAINER...] or
// compose:PROJECT[/SERVICE[,SERVICE...]]. It sets what they stand for in o.
func (o *Options) Parse(arg string) error {
	way, rest, _ := strings.Cut(arg, ":")
	switch way {
	case "docker":
		o.Containers = strings.Split(rest, ",")
	case "compose":
		project, services, ok := strings.Cut(rest, "/")
		o.Project = project
		if ok {
			o.Services = strings.Split(services, ",")
		}
		if project == "" {
			return errors.New("--freeze compose: needs the name of a project, as in compose:ocis_full; `docker compose ls` tells it")
		}
	default:
		return fmt.Errorf("--freeze %s: neither docker:CONTAINER nor compose:PROJECT", arg)
	}
	return nil
}

// New returns the freezer of --freeze docker and --freeze compose. The engine is not asked yet.
//
// Errors: nothing to freeze, a name that no container can have, an engine that is not on this host.
func New(o Options) (*Docker, error) {
	switch {
	case o.Project != "" && len(o.Containers) > 0:
		return nil, errors.New("give containers or a compose project to freeze, not both")
	case o.Project != "" && !projectName.MatchString(o.Project):
		return nil, fmt.Errorf("%q is no name of a compose project; `docker compose ls` tells it", o.Project)
	case o.Project == "" && len(o.Services) > 0:
		return nil, errors.New("services to freeze need a compose project")
	case o.Project == "" && len(o.Containers) == 0:
		return nil, errors.New("--freeze docker: needs the name of a container, as in docker:ocis; `docker ps` tells it")
	}
	for _, n := range append(append([]string{}, o.Containers...), o.Services...) {
		if !containerName.MatchString(n) {
			return nil, fmt.Errorf("%q is no name of a container or service; `docker ps` tells it", n)
		}
	}
	c, err := engine.New(o.Host)
	if err != nil {
		return nil, err
	}
	o.StopTimeout = cmp.Or(o.StopTimeout, freeze.DefaultStopTimeout)
	o.ReadyTimeout = cmp.Or(o.ReadyTimeout, freeze.DefaultReadyTimeout)
	o.StartRetries = max(cmp.Or(o.StartRetries, freeze.DefaultStartRetries), 0)
	o.StartBackoff = cmp.Or(o.StartBackoff, freeze.DefaultBackoff)
	return &Docker{o, c}, nil
}

// Method returns "docker" or "compose".
func (d *Docker) Method() string {
	if d.o.Project != "" {
		return "compose"
	}
	return "docker"
}

// Freeze stops the containers and waits for the proof. Servers that do not end in time are left
// running.
func (d *Docker) Freeze(ctx context.Context, inst *ocis.Instance) (freeze.Frozen, error) {
	return freeze.FreezePlain(ctx, d, inst, d.o.Progress)
}

// Recipe says which containers to start, in freeze.Recipe.Other.
type Recipe struct {
	Host       string      `json:"host"`
	Containers []Container `json:"containers"`
	// Holds: something had files of the instance open, so it is up again when that is so again.
	Holds bool `json:"holds"`
}

// Container is one container that ran before the freeze.
type Container struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	// Level is its place in the order: those of the lower levels are started before.
	Level   int                  `json:"level"`
	Restart engine.RestartPolicy `json:"restart_policy"`
	Paused  bool                 `json:"paused,omitempty"`
	// Server: a process of the product was seen in it.
	Server bool `json:"server,omitempty"`
	// Healthy: others must not start before its health check succeeds.
	Healthy bool `json:"healthy,omitempty"`

	stopSignal string
}

// Plan finds the containers and records how they run.
//
// Errors: docker.ErrNoEngine, docker.ErrNotFound, containers that would not survive a stop.
func (d *Docker) Plan(ctx context.Context, inst *ocis.Instance) (*freeze.Plan, error) {
	var found []target
	var err error
	if d.o.Project != "" {
		found, err = d.project(ctx)
	} else {
		found, err = d.named(ctx)
	}
	if err != nil {
		return nil, err
	}
	paths := freeze.Paths(inst)
	recipe := Recipe{Host: "unix://" + d.client.Socket()}
	paused := false
	for _, t := range found {
		k := t.Container
		if !k.State.Running {
			d.warn("container %s does not run (%s); it is neither stopped nor started", k.Name, k.State.Status)
			continue
		}
		if err := survives(k); err != nil {
			return nil, err
		}
		c := Container{ID: k.ID, Name: k.Name, Level: t.level, Paused: k.State.Paused, Healthy: t.healthy && k.State.Health != nil,
			Restart: k.HostConfig.RestartPolicy, stopSignal: cmp.Or(k.Config.StopSignal, "SIGTERM")}
		list, err := d.inside(k).servers(ctx)
		if err != nil {
			return nil, err
		}
		c.Server = len(list) > 0
		paused = paused || c.Paused
		recipe.Containers = append(recipe.Containers, c)
	}
	if len(recipe.Containers) == 0 {
		return freeze.None{Progress: d.o.Progress}.Plan(ctx, inst)
	}
	u, err := freeze.Look(ctx, paths)
	if err != nil {
		return nil, err
	}
	for _, h := range u.Holders {
		recipe.Holds = recipe.Holds || h.Writing
	}
	other, err := json.Marshal(recipe)
	if err != nil {
		return nil, err
	}
	ready := freeze.Ready{Timeout: d.o.ReadyTimeout}
	if !paused { // it would not answer
		ready, err = freeze.NewReady(d.o.ReadyCommand, d.o.ReadyURL, d.o.ReadyTimeout)
		if err != nil {
			return nil, err
		}
	}
	return &freeze.Plan{
		Recipe: freeze.Recipe{
			Kind: Kind, Other: other, Paths: paths, Ready: ready,
			StopTimeout: d.o.StopTimeout, Retries: d.o.StartRetries, Backoff: d.o.StartBackoff,
		},
		Stop: func(ctx context.Context, run *freeze.Run) error {
			return d.stop(ctx, recipe, inst, paths, run)
		},
	}, nil
}

func (d *Docker) warn(format string, args ...any) {
	d.o.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "freeze", Message: fmt.Sprintf(format, args...)})
}

// survives refuses containers that could not be started again, or that somebody else would start.
func survives(k *engine.Container) error {
	switch {
	case k.HostConfig.AutoRemove:
		return fmt.Errorf("cannot freeze: container %s was made with --rm, so the engine would remove it when it stops; run it without", k.Name)
	case k.Config.Labels["com.docker.swarm.service.name"] != "":
		return fmt.Errorf("cannot freeze: container %s belongs to the swarm service %s, which would replace it when it stops; give a --stop-command and a --start-command that scale the service to 0 and back",
			k.Name, k.Config.Labels["com.docker.swarm.service.name"])
	case k.Config.Labels["io.kubernetes.pod.name"] != "":
		return fmt.Errorf("cannot freeze: container %s belongs to the Kubernetes pod %s, which would replace it when it stops; give a --stop-command and a --start-command that scale its deployment to 0 and back",
			k.Name, k.Config.Labels["io.kubernetes.pod.name"])
	}
	return nil
}

// target is a container to freeze with its place in the order.
type target struct {
	*engine.Container
	level   int
	healthy bool // something waits for its health
}

// named finds the containers given by name.
func (d *Docker) named(ctx context.Context) ([]target, error) {
	var list []target
	seen := map[string]bool{}
	for i, name := range d.o.Containers {
		k, err := d.client.Inspect(ctx, name)
		if errors.Is(err, engine.ErrNotFound) {
			return nil, fmt.Errorf("cannot freeze: the engine at %s knows no container %q: %w; `docker ps -a` names them", d.client.Socket(), name, err)
		}
		if err != nil {
			return nil, fmt.Errorf("cannot freeze container %s: %w", name, err)
		}
		if !seen[k.ID] {
			seen[k.ID] = true
			list = append(list, target{Container: k, level: i})
		}
	}
	return list, nil
}

// stop stops the containers of r and proves it.
func (d *Docker) stop(ctx context.Context, r Recipe, inst *ocis.Instance, paths []string, run *freeze.Run) error {
	deadline := time.Now().Add(d.o.StopTimeout)
	// All of them first: what ends by itself must not come back, and nothing is hard to undo yet.
	for _, c := range r.Containers {
		if c.Restart.Name == "" || c.Restart.Name == "no" {
			continue
		}
		if err := d.client.SetRestartPolicy(ctx, c.ID, engine.RestartPolicy{Name: "no"}); err != nil {
			return fmt.Errorf("suspend the restart policy of container %s: %w", c.Name, err)
		}
	}
	// Those that need others go first.
	for _, level := range order.Group(r.Containers, func(c Container) int { return -c.Level }) {
		g, gctx := errgroup.WithContext(ctx)
		for _, c := range level {
			g.Go(func() error { return d.stopOne(gctx, c, inst, deadline) })
		}
		if err := g.Wait(); err != nil {
			if cause := context.Cause(ctx); cause != nil {
				return cause
			}
			return err
		}
	}
	return freeze.WaitFree(ctx, paths, nil, deadline, d.o.StopTimeout, run)
}

// restGrace is what other processes of a container get to end after the server has. They have no
// files of the instance open, and it is downtime: some shells as first process never end.
const restGrace = 2 * time.Second

// stopOne ends the servers in one container, then the container. At the deadline it leaves what
// still runs alone.
func (d *Docker) stopOne(ctx context.Context, c Container, inst *ocis.Instance, deadline time.Time) error {
	fail := func(err error) error { return fmt.Errorf("stop container %s: %w", c.Name, err) }
	if c.Paused {
		if err := d.client.Unpause(ctx, c.ID); err != nil {
			return fail(err)
		}
	}
	told := map[int]bool{}
	toldFirst := false
	tellFirst := func() error { // the first process of the container
		if toldFirst {
			return nil
		}
		toldFirst = true
		return d.client.Kill(ctx, c.ID, c.stopSignal)
	}
	var lonely time.Time // when the last server was gone
	for {
		k, err := d.client.Inspect(ctx, c.ID)
		if err != nil {
			return fail(err)
		}
		if !k.State.Running {
			return nil
		}
		in := d.inside(k)
		servers, err := in.servers(ctx)
		if err != nil {
			return fail(err)
		}
		var left []freeze.Holder
		switch {
		case !c.Server && len(servers) == 0:
			// A side service, or a server by another name: it is the container that is told.
			left = []freeze.Holder{{PID: k.State.Pid, Command: k.Path, Path: inst.BasePath, How: freeze.HowRuns, Writing: true}}
			err = tellFirst()
		case len(servers) > 0:
			lonely = time.Time{}
			var fresh []process
			again := len(told) > 0
			for _, p := range servers {
				left = append(left, freeze.Holder{PID: p.pid, Command: p.name() + " server", Path: inst.BasePath, How: freeze.HowRuns, Writing: true})
				again = again && !told[p.pid]
				if !told[p.pid] {
					fresh = append(fresh, p)
				}
			}
			if again && !toldFirst {
				// A supervisor brought a new one up: it is the one to be told.
				err = tellFirst()
			}
			for _, p := range fresh {
				told[p.pid] = true
			}
			if err == nil && len(fresh) > 0 {
				err = in.terminate(ctx, fresh)
			}
		default:
			// The servers have ended. A shell does so as well then, at once.
			if lonely.IsZero() {
				lonely = time.Now()
			}
			if time.Since(lonely) > 500*time.Millisecond {
				left, err = in.holding(ctx, freeze.Paths(inst))
				if err == nil && len(left) == 0 {
					if err := d.client.Stop(ctx, c.ID, restGrace); err != nil {
						return fail(err)
					}
					return nil
				}
			}
		}
		var api *engine.APIError
		if errors.As(err, &api) && (api.Status == 409 || errors.Is(err, engine.ErrNotFound)) {
			err = nil // it ended this very moment; the next look tells
		}
		if err != nil {
			return fail(err)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("container %s did not stop within %s and was left running: %w; see `docker logs %s`, or raise --stop-timeout",
				c.Name, d.o.StopTimeout, &freeze.BusyError{Holders: left}, c.Name)
		}
		if !sleep(ctx, 30*time.Millisecond) {
			return context.Cause(ctx)
		}
	}
}

// sleep waits for d. It returns false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
