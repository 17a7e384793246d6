package docker

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	engine "github.com/holdfast-backup/holdfast/internal/docker"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/freeze/order"
	"github.com/holdfast-backup/holdfast/internal/progress"
)

// emptyFor is how long a container that runs may be without its server before it is restarted: time
// for a shell to come to the server, or for a supervisor to bring it back.
const emptyFor = 5 * time.Second

// Start is the freeze.Starter of Kind. It puts restart policies back, starts what ran before the
// freeze in its order, and returns when the data is in use again. One that does not come up keeps
// none of the others from being started.
func Start(ctx context.Context, r freeze.Recipe, run *freeze.Run) error {
	var recipe Recipe
	if err := json.Unmarshal(r.Other, &recipe); err != nil {
		return fmt.Errorf("the record of the containers cannot be read: %w", err)
	}
	client, err := engine.New(recipe.Host)
	if err != nil {
		return err
	}
	s := &starter{Docker: &Docker{client: client}, recipe: r, run: run}
	var errs []error
	ids := make([]string, len(recipe.Containers))
	index := make([]int, len(recipe.Containers))
	for i := range index {
		index[i] = i
	}
	for _, level := range order.Group(index, func(i int) int { return recipe.Containers[i].Level }) {
		results := make(chan error)
		for _, i := range level {
			go func() {
				var err error
				ids[i], err = s.startOne(ctx, recipe.Containers[i])
				results <- err
			}()
		}
		for range level {
			if err := <-results; err != nil {
				errs = append(errs, err)
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	err = freeze.AwaitUse(ctx, r, recipe.Holds && !allPaused(recipe), func(ctx context.Context) error {
		for i, c := range recipe.Containers {
			if err := s.lives(ctx, c.Name, ids[i]); err != nil {
				return err
			}
		}
		return nil
	}, run)
	if err != nil {
		return err
	}
	for i, c := range recipe.Containers {
		if !c.Paused {
			continue
		}
		if k, err := client.Inspect(ctx, ids[i]); err == nil && k.State.Paused {
			continue
		}
		if err := client.Pause(ctx, ids[i]); err != nil {
			return fmt.Errorf("pause container %s again: %w", c.Name, err)
		}
	}
	return nil
}

// allPaused: then there is nothing to wait for.
func allPaused(r Recipe) bool {
	for _, c := range r.Containers {
		if !c.Paused {
			return false
		}
	}
	return true
}

type starter struct {
	*Docker
	recipe freeze.Recipe
	run    *freeze.Run
}

func (s *starter) warn(format string, args ...any) {
	s.run.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "thaw", Message: fmt.Sprintf(format, args...)})
}

// startOne starts one container, unless it runs, and returns its id. That is another one than before
// if somebody made the container anew meanwhile.
func (s *starter) startOne(ctx context.Context, c Container) (string, error) {
	k, err := s.client.Inspect(ctx, c.ID)
	if errors.Is(err, engine.ErrNotFound) {
		k, err = s.client.Inspect(ctx, c.Name)
	}
	if errors.Is(err, engine.ErrNotFound) {
		return "", fmt.Errorf("start container %s: it was removed meanwhile: %w; create it again", c.Name, err)
	}
	if err != nil {
		return "", fmt.Errorf("start container %s: %w", c.Name, err)
	}
	if k.ID == c.ID {
		// Before the start, so that the engine does what it always does if the server crashes.
		s.restorePolicy(ctx, c, k)
	}
	start := !k.State.Running
	if k.State.Running && c.Server && !k.State.Paused {
		if start, err = s.isEmpty(ctx, k.ID); err == nil && start {
			s.warn("container %s runs without its server; it is restarted", c.Name)
			err = s.client.Stop(ctx, k.ID, restGrace)
		}
		if err != nil {
			return k.ID, fmt.Errorf("restart container %s: %w", c.Name, err)
		}
	}
	if start {
		if err := s.client.Start(ctx, k.ID); err != nil {
			return k.ID, fmt.Errorf("start container %s: %w", c.Name, err)
		}
	}
	if c.Healthy {
		return k.ID, s.awaitHealthy(ctx, c.Name, k.ID)
	}
	return k.ID, nil
}

// restorePolicy puts the restart policy back. A service that runs without one is better than none.
func (s *starter) restorePolicy(ctx context.Context, c Container, k *engine.Container) {
	if cmp.Or(c.Restart.Name, "no") == "no" || k.HostConfig.RestartPolicy.Name != "no" {
		return // somebody else changed it meanwhile, or did so for us
	}
	var err error
	for range 3 {
		if err = s.client.SetRestartPolicy(ctx, k.ID, c.Restart); err == nil {
			return
		}
		if !sleep(ctx, 200*time.Millisecond) {
			break
		}
	}
	s.warn("the restart policy of container %s could not be put back: %v; run `docker update --restart %s %s`", c.Name, err, policyText(c.Restart), c.Name)
}

func policyText(p engine.RestartPolicy) string {
	if p.MaximumRetryCount > 0 {
		return fmt.Sprintf("%s:%d", p.Name, p.MaximumRetryCount)
	}
	return p.Name
}

// isEmpty tells whether a container has no server in it, or has stopped by itself.
func (s *starter) isEmpty(ctx context.Context, id string) (bool, error) {
	for deadline := time.Now().Add(emptyFor); ; {
		k, err := s.client.Inspect(ctx, id)
		if err != nil {
			return false, err
		}
		if !k.State.Running {
			return true, nil
		}
		servers, err := s.inside(k).servers(ctx)
		if err != nil {
			return false, err
		}
		if len(servers) > 0 {
			return false, nil
		}
		if !time.Now().Before(deadline) {
			return true, nil
		}
		if !sleep(ctx, 50*time.Millisecond) {
			return false, context.Cause(ctx)
		}
	}
}

// lives returns an error if the container has stopped.
func (s *starter) lives(ctx context.Context, name, id string) error {
	k, err := s.client.Inspect(ctx, id)
	if err != nil {
		return err
	}
	if !k.State.Running {
		return fmt.Errorf("container %s ended right after its start, with exit status %d%s; see `docker logs %s`", name, k.State.ExitCode, errorText(k.State.Error), name)
	}
	return nil
}

func errorText(e string) string {
	if e == "" {
		return ""
	}
	return " (" + e + ")"
}

// awaitHealthy waits for the health check of a container that others need. They are started in the
// end, healthy or not.
func (s *starter) awaitHealthy(ctx context.Context, name, id string) error {
	timeout := cmp.Or(s.recipe.Ready.Timeout, freeze.DefaultReadyTimeout)
	for deadline := time.Now().Add(timeout); ; {
		if err := s.lives(ctx, name, id); err != nil {
			return err
		}
		k, err := s.client.Inspect(ctx, id)
		if err != nil {
			return err
		}
		if k.State.Health == nil || k.State.Health.Status == "healthy" {
			return nil
		}
		if !time.Now().Before(deadline) {
			s.warn("container %s is not healthy %s after its start; the containers that need it are started nevertheless", name, timeout)
			return nil
		}
		if !sleep(ctx, 100*time.Millisecond) {
			return context.Cause(ctx)
		}
	}
}
