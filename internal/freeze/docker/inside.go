package docker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	engine "github.com/holdfast-backup/holdfast/internal/docker"
	"github.com/holdfast-backup/holdfast/internal/freeze"
)

// program matches the name of the product's program: ocis, opencloud, ocis-7.1.0-linux-amd64.
var program = regexp.MustCompile(`^(ocis|opencloud)([-_].*)?$`)

// process is one process of a container.
type process struct {
	pid  int // as the engine's host numbers it
	args []string
}

func (p process) name() string { return path.Base(p.args[0]) }

// isServer tells "ocis server" and "ocis SERVICE server" from other uses of the program.
func (p process) isServer() bool {
	return len(p.args) > 1 && program.MatchString(p.name()) && slices.Contains(p.args[1:], "server")
}

// inside looks into one running container.
type inside struct {
	client *engine.Client
	k      *engine.Container
	// direct: the processes can be seen in /proc. They cannot where Holdfast runs in a container of
	// its own, or the engine in a virtual machine.
	direct bool
}

func (d *Docker) inside(k *engine.Container) inside {
	return inside{d.client, k, !d.o.viaExec && inContainer(k.State.Pid, k.ID)}
}

// inContainer tells whether a process of this host belongs to the container. Its control group is
// named after the container's id, with every driver.
func inContainer(pid int, id string) bool {
	if pid <= 0 {
		return false
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	return err == nil && strings.Contains(string(data), id)
}

// processes lists what runs in the container.
func (i inside) processes(ctx context.Context) ([]process, error) {
	if !i.direct {
		top, err := i.client.Top(ctx, i.k.ID)
		// A container that ends at this moment makes the engine answer anything; what it says of the
		// container a moment later counts.
		for try := 0; err != nil && try < 10 && ctx.Err() == nil; try++ {
			if k, kerr := i.client.Inspect(ctx, i.k.ID); kerr == nil && !k.State.Running {
				return nil, nil
			}
			time.Sleep(100 * time.Millisecond)
			top, err = i.client.Top(ctx, i.k.ID)
		}
		if err != nil {
			return nil, fmt.Errorf("list the processes of container %s: %w", i.k.Name, err)
		}
		var list []process
		for _, p := range top {
			list = append(list, process{p.PID, strings.Fields(p.Command)})
		}
		return list, nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list the processes of container %s: %w", i.k.Name, err)
	}
	var list []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		// A zombie has no command line.
		data, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil || len(data) == 0 || !inContainer(pid, i.k.ID) {
			continue
		}
		list = append(list, process{pid, strings.Split(strings.TrimSuffix(string(data), "\x00"), "\x00")})
	}
	return list, nil
}

// servers lists the processes of the product.
func (i inside) servers(ctx context.Context) ([]process, error) {
	list, err := i.processes(ctx)
	if errors.Is(err, engine.ErrNotFound) || isConflict(err) {
		return nil, nil // it ended meanwhile
	}
	return slices.DeleteFunc(list, func(p process) bool { return !p.isServer() }), err
}

// isConflict: the engine says so of a container that does not run.
func isConflict(err error) bool {
	var api *engine.APIError
	return errors.As(err, &api) && api.Status == 409
}

// holding lists the processes in the container that have files of the instance open.
func (i inside) holding(ctx context.Context, paths []string) ([]freeze.Holder, error) {
	list, err := i.processes(ctx)
	if err != nil {
		return nil, err
	}
	u, err := freeze.Look(ctx, paths)
	return slices.DeleteFunc(u.Holders, func(h freeze.Holder) bool {
		return !slices.ContainsFunc(list, func(p process) bool { return p.pid == h.PID })
	}), err
}

// terminate sends SIGTERM to servers: to the first process of the container by the engine, to others
// straight or, where that cannot be, by a shell in the container. The stop signal of an image may be
// any, this one is known to stop the product.
func (i inside) terminate(ctx context.Context, servers []process) error {
	var names []string
	for _, p := range servers {
		if p.pid == i.k.State.Pid {
			if err := i.client.Kill(ctx, i.k.ID, "SIGTERM"); err != nil {
				return err
			}
			continue
		}
		if i.direct {
			err := sigterm(p.pid, i.k.ID)
			if err == nil {
				continue
			}
			if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOSYS) {
				return fmt.Errorf("stop %s server (process %d): %w", p.name(), p.pid, err)
			}
		}
		if n := comm(p.name()); !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	if len(names) == 0 {
		return nil
	}
	code, out, err := i.client.Exec(ctx, i.k.ID, append([]string{"sh", "-c", killByName, "sh"}, names...)...)
	if err == nil && code != 0 {
		err = fmt.Errorf("exit status %d: %s", code, strings.TrimSpace(out))
	}
	if err != nil {
		return fmt.Errorf("send SIGTERM to the server by a shell in container %s: %w; run holdfast as root on the host of the engine", i.k.Name, err)
	}
	return nil
}

// killByName finds processes by their short name, with nothing but what every shell has built in.
// It fails if there are none, so that nobody waits for one that was not told.
const killByName = `n=1
for d in /proc/[0-9]*; do
  read -r name <"$d/comm" || continue
  for want; do
    if [ "$name" = "$want" ]; then kill -TERM "${d#/proc/}" && n=0; fi
  done
done 2>/dev/null
[ $n = 0 ] || echo "no process called $*"
exit $n`

// comm is what the kernel keeps of the name of a program.
func comm(name string) string { return name[:min(len(name), 15)] }

// sigterm sends SIGTERM to pid if it belongs to the container.
func sigterm(pid int, id string) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// Asked again now that the descriptor holds on to the process: its number may have changed hands.
	if !inContainer(pid, id) {
		return nil
	}
	err = unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}
