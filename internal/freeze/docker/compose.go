package docker

import (
	"context"
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"

	engine "github.com/holdfast-backup/holdfast/internal/docker"
	"github.com/holdfast-backup/holdfast/internal/freeze/order"
)

// Labels that compose puts on its containers.
const (
	LabelProject   = "com.docker.compose.project"
	LabelService   = "com.docker.compose.service"
	labelDependsOn = "com.docker.compose.depends_on"
	labelOneOff    = "com.docker.compose.oneoff"
)

// serverCommand finds the start of a server in a command line, also within that of a shell.
var serverCommand = regexp.MustCompile(`(^|[\s;&|/"'(])(ocis|opencloud)\s([^;&|]*\s)?server($|[\s;&|"')])`)

// IsProduct tells whether a container runs the product, by its image or its command.
func IsProduct(k *engine.Container) bool {
	image, _, _ := strings.Cut(k.Config.Image, "@")
	name := path.Base(image)
	name, _, _ = strings.Cut(name, ":")
	return program.MatchString(name) || serverCommand.MatchString(strings.Join(append([]string{k.Path}, k.Args...), " "))
}

// dependency is one entry of labelDependsOn.
type dependency struct{ service, condition string }

// parseDependsOn reads "db:service_healthy:false,cache:service_started:true"; old versions of
// compose wrote the names alone.
func parseDependsOn(label string) []dependency {
	var list []dependency
	for part := range strings.SplitSeq(label, ",") {
		f := strings.Split(strings.TrimSpace(part), ":")
		if f[0] == "" {
			continue
		}
		d := dependency{service: f[0]}
		if len(f) > 1 {
			d.condition = f[1]
		}
		list = append(list, d)
	}
	return list
}

// project finds the containers of the product in a compose project, those of the services listed,
// and those that live in the network or the processes of one of them.
func (d *Docker) project(ctx context.Context) ([]target, error) {
	summary, err := d.client.List(ctx, LabelProject+"="+d.o.Project)
	if err != nil {
		return nil, fmt.Errorf("cannot freeze compose project %s: %w", d.o.Project, err)
	}
	var all []*engine.Container
	byID := map[string]*engine.Container{}
	byService := map[string][]*engine.Container{}
	for _, s := range summary {
		if strings.EqualFold(s.Labels[labelOneOff], "true") {
			continue // docker compose run
		}
		k, err := d.client.Inspect(ctx, s.ID)
		if errors.Is(err, engine.ErrNotFound) {
			continue // gone meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("cannot freeze compose project %s: %w", d.o.Project, err)
		}
		all = append(all, k)
		byID[k.ID] = k
		service := k.Config.Labels[LabelService]
		byService[service] = append(byService[service], k)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("cannot freeze: the engine at %s knows no containers of a compose project %q; `docker compose ls -a` names the projects", d.client.Socket(), d.o.Project)
	}
	for _, s := range d.o.Services {
		if byService[s] == nil {
			return nil, fmt.Errorf("cannot freeze: compose project %s has no container of service %q", d.o.Project, s)
		}
	}
	chosen := map[string]bool{}
	for _, k := range all {
		chosen[k.ID] = IsProduct(k) || slices.Contains(d.o.Services, k.Config.Labels[LabelService])
	}
	// Who shares the network of a container is cut off from it when that one starts anew.
	for grown := true; grown; {
		grown = false
		for _, k := range all {
			for _, host := range sharing(k) {
				if chosen[host] && !chosen[k.ID] {
					chosen[k.ID], grown = true, true
				}
			}
		}
	}
	var names []string
	healthy := map[string]bool{}
	for _, k := range all {
		if chosen[k.ID] {
			names = append(names, k.ID)
		}
		for _, dep := range parseDependsOn(k.Config.Labels[labelDependsOn]) {
			for _, on := range byService[dep.service] {
				healthy[on.ID] = healthy[on.ID] || chosen[k.ID] && dep.condition == "service_healthy"
			}
		}
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("cannot freeze: no container of compose project %s runs ocis or opencloud; name the service, as in compose:%s/SERVICE", d.o.Project, d.o.Project)
	}
	slices.SortFunc(names, func(a, b string) int { return strings.Compare(byID[a].Name, byID[b].Name) })
	levels := order.Levels(names, func(id string) []string {
		k := byID[id]
		if k == nil {
			return nil
		}
		needs := sharing(k)
		for _, dep := range parseDependsOn(k.Config.Labels[labelDependsOn]) {
			for _, on := range byService[dep.service] {
				needs = append(needs, on.ID)
			}
		}
		return needs
	})
	var list []target
	for _, id := range names {
		list = append(list, target{byID[id], levels[id], healthy[id]})
	}
	return list, nil
}

// sharing lists the containers whose network, processes or memory k uses.
func sharing(k *engine.Container) []string {
	var list []string
	for _, mode := range []string{k.HostConfig.NetworkMode, k.HostConfig.PidMode, k.HostConfig.IpcMode} {
		if id, ok := strings.CutPrefix(mode, "container:"); ok {
			list = append(list, id)
		}
	}
	return list
}
