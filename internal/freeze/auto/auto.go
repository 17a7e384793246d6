// Package auto picks the way to freeze an instance: Named by the word of --freeze, Detect by looking
// at how the instance runs.
package auto

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	engine "github.com/holdfast-backup/holdfast/internal/docker"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/freeze/docker"
	"github.com/holdfast-backup/holdfast/internal/freeze/systemd"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
)

// Register makes the recipes of all ways known. It comes before freeze.MaybeGuard.
func Register() {
	freeze.Register(docker.Kind, docker.Start)
	freeze.Register(systemd.Kind, systemd.Start)
}

// Options are those that all ways have. The zero value works.
type Options struct {
	DockerHost   string        // as DOCKER_HOST; "" is what docker.New makes of it
	Bus          string        // address of the message bus; "" is the system's
	StopTimeout  time.Duration // 0 is freeze.DefaultStopTimeout
	ReadyCommand string
	ReadyURL     string
	ReadyTimeout time.Duration // 0 is freeze.DefaultReadyTimeout
	StartRetries int           // 0 is freeze.DefaultStartRetries; negative is none
	StartBackoff time.Duration // 0 is freeze.DefaultBackoff
	Progress     progress.Sink `json:"-"`

	procDir string // tests: in place of /proc, for the control groups
}

// Ways names what Named takes, for messages.
const Ways = "none, process[:PID], systemd:UNIT[,UNIT...], docker:CONTAINER[,CONTAINER...] or compose:PROJECT[/SERVICE,...]"

// Named returns the freezer that the argument of --freeze names. Commands are not among them: they
// have options of their own.
//
// Errors: an argument that is none of Ways, or has no good name in it.
func Named(arg string, o Options) (freeze.Planner, error) {
	way, rest, more := strings.Cut(arg, ":")
	switch way {
	case "none":
		if !more {
			return freeze.None{Progress: o.Progress}, nil
		}
	case "process":
		pid := 0
		if more {
			var err error
			if pid, err = strconv.Atoi(rest); err != nil || pid <= 0 {
				return nil, fmt.Errorf("--freeze %s: %q is no process id", arg, rest)
			}
		}
		return o.process(pid), nil
	case "systemd":
		s := o.systemd()
		if err := s.Parse(arg); err != nil {
			return nil, err
		}
		return systemd.New(s)
	case "docker", "compose":
		d := o.docker()
		if err := d.Parse(arg); err != nil {
			return nil, err
		}
		return docker.New(d)
	}
	return nil, fmt.Errorf("--freeze %s: the ways are %s", arg, Ways)
}

func (o Options) process(pid int) freeze.Planner {
	return freeze.NewProcess(freeze.ProcessOptions{
		PID: pid, StopTimeout: o.StopTimeout, ReadyCommand: o.ReadyCommand, ReadyURL: o.ReadyURL,
		ReadyTimeout: o.ReadyTimeout, StartRetries: o.StartRetries, StartBackoff: o.StartBackoff, Progress: o.Progress,
	})
}

func (o Options) systemd() systemd.Options {
	return systemd.Options{
		Bus: o.Bus, StopTimeout: o.StopTimeout, ReadyCommand: o.ReadyCommand, ReadyURL: o.ReadyURL,
		ReadyTimeout: o.ReadyTimeout, StartRetries: o.StartRetries, StartBackoff: o.StartBackoff, Progress: o.Progress,
	}
}

func (o Options) docker() docker.Options {
	return docker.Options{
		Host: o.DockerHost, StopTimeout: o.StopTimeout, ReadyCommand: o.ReadyCommand, ReadyURL: o.ReadyURL,
		ReadyTimeout: o.ReadyTimeout, StartRetries: o.StartRetries, StartBackoff: o.StartBackoff, Progress: o.Progress,
	}
}

// Choice is the way that Detect found.
type Choice struct {
	Freezer freeze.Planner
	// Argument is what --freeze would have to be for the same, e.g. "compose:ocis_full".
	Argument string
	// Why is a sentence for the user.
	Why string
}

// server is a process that uses the instance, with where it belongs.
type server struct {
	pid       int
	container string // id
	unit      string
	bus       string // of the unit
}

// Detect finds how inst runs: by the processes that use its data, and the control groups they are
// in. If nothing runs, the way is none. Freezes left behind must have been undone before:
// freeze.Recover.
//
// Errors: an instance that runs in a way that this host does not know, or in several ways at once.
// They name what to give instead.
func Detect(ctx context.Context, inst *ocis.Instance, o Options) (*Choice, error) {
	u, err := freeze.Look(ctx, freeze.Paths(inst))
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(u.Holders, func(h freeze.Holder) bool { return h.Writing }) {
		// Readers are not the server; whether they disturb is for the proof to say.
		return &Choice{freeze.None{Progress: o.Progress}, "none", "nothing writes to the data of the instance: it is stopped"}, nil
	}
	servers, err := o.servers(u)
	if err != nil {
		return nil, err
	}
	var containers, units, buses []string
	loose := 0
	for _, s := range servers {
		switch {
		case s.container != "":
			containers = addNew(containers, s.container)
		case s.unit != "":
			units, buses = addNew(units, s.unit), addNew(buses, s.bus)
		default:
			loose++
		}
	}
	switch {
	case len(containers) > 0 && len(units) == 0 && loose == 0:
		return o.inContainers(ctx, containers, servers)
	case len(units) > 0 && len(containers) == 0 && loose == 0 && len(buses) == 1:
		so := o.systemd()
		so.Units, so.Bus = units, cmp.Or(o.Bus, buses[0])
		f, err := systemd.New(so)
		if err != nil {
			return nil, err
		}
		arg := "systemd:" + strings.Join(units, ",")
		return &Choice{f, arg, fmt.Sprintf("the server (process %d) belongs to %s", servers[0].pid, strings.Join(units, ", "))}, nil
	case len(containers) == 0 && len(units) == 0:
		if loose > 1 {
			return nil, fmt.Errorf("cannot tell how to freeze: %d processes use the data: %w; name the server, as in --freeze process:PID, or give --stop-command and --start-command", loose, u.Err())
		}
		// Whatever else has the data open (a copy, a shell) is not ours to stop.
		if args := o.commandLine(servers[0].pid); len(args) == 0 || !productName.MatchString(filepath.Base(args[0])) {
			return nil, fmt.Errorf("cannot tell how to freeze: %w, and that does not look like the server; end it, or name the server, as in --freeze process:PID, or give --stop-command and --start-command", u.Err())
		}
		return &Choice{o.process(servers[0].pid), "process", fmt.Sprintf("the server is process %d, of no container and no unit", servers[0].pid)}, nil
	}
	return nil, fmt.Errorf("cannot tell how to freeze: the instance runs in several ways at once: %s; give --stop-command and --start-command for all of them", describe(servers))
}

func addNew(list []string, s string) []string {
	if slices.Contains(list, s) {
		return list
	}
	return append(list, s)
}

func describe(servers []server) string {
	var parts []string
	for _, s := range servers {
		where := "by itself"
		switch {
		case s.container != "":
			where = "in container " + s.container[:12]
		case s.unit != "":
			where = "in " + s.unit
		}
		parts = append(parts, fmt.Sprintf("process %d %s", s.pid, where))
	}
	return strings.Join(parts, ", ")
}

// servers picks those among the holders that are to be stopped: all that are called servers, else
// all that hold locks, else all that could write. Who only reads, or is a shell in the directory,
// is no concern of the freeze.
func (o Options) servers(u freeze.Usage) ([]server, error) {
	var called, locking, writing []int
	add := func(list []int, pid int) []int {
		if slices.Contains(list, pid) {
			return list
		}
		return append(list, pid)
	}
	for _, h := range u.Holders {
		if h.PID == 0 {
			continue
		}
		if o.isServer(h.PID) {
			called = add(called, h.PID)
		}
		if h.How == freeze.HowLock {
			locking = add(locking, h.PID)
		}
		if h.Writing {
			writing = add(writing, h.PID)
		}
	}
	pids := called
	if len(pids) == 0 {
		pids = locking
	}
	if len(pids) == 0 {
		pids = writing
	}
	if len(pids) == 0 {
		return nil, fmt.Errorf("cannot tell how to freeze: %w, but which process is the server cannot be seen; run holdfast as root on the host of the server, or name the way: --freeze %s", u.Err(), Ways)
	}
	var list []server
	for _, pid := range pids {
		s, err := o.place(pid)
		if err != nil {
			return nil, fmt.Errorf("cannot tell how to freeze: process %d: %w", pid, err)
		}
		list = append(list, s)
	}
	return list, nil
}

func (o Options) proc(pid int, file string) string {
	return filepath.Join(cmp.Or(o.procDir, "/proc"), strconv.Itoa(pid), file)
}

// productName finds the product in the name of a unit or in a command line.
var productName = regexp.MustCompile(`(^|[^a-z])(ocis|opencloud)([^a-z]|$)`)

func (o Options) commandLine(pid int) []string {
	data, err := os.ReadFile(o.proc(pid, "cmdline"))
	if err != nil || len(data) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(data), "\x00"), "\x00")
}

func (o Options) isServer(pid int) bool {
	args := o.commandLine(pid)
	return len(args) > 1 && slices.Contains(args[1:], "server")
}

// place tells where a process belongs.
func (o Options) place(pid int) (server, error) {
	s := server{pid: pid}
	data, err := os.ReadFile(o.proc(pid, "cgroup"))
	if errors.Is(err, os.ErrNotExist) {
		return s, errors.New("it has just ended; try again")
	}
	if err != nil {
		return s, err
	}
	own, err := os.ReadFile(o.proc(os.Getpid(), "cgroup"))
	if err != nil {
		return s, err
	}
	g, ours := parseCgroup(string(data)), parseCgroup(string(own))
	if g.container != ours.container {
		s.container = g.container
		if s.container == "" {
			return s, errors.New("it runs outside of the container of holdfast; run holdfast on the host")
		}
		return s, nil
	}
	// A service like cron or ssh starts things that are not its own, and Holdfast as well.
	if g.unit != "" && g.unit != ours.unit && o.unitIsProduct(g.unit, pid) {
		s.unit = g.unit
		if g.user != "" {
			s.bus = "unix:path=/run/user/" + g.user + "/bus"
		}
	}
	return s, nil
}

// unitIsProduct: the unit is called after the product, or its first process, from which all others
// descend, is the server or names it.
func (o Options) unitIsProduct(unit string, pid int) bool {
	if productName.MatchString(strings.ToLower(unit)) {
		return true
	}
	for depth := 0; depth < 16 && pid > 1; depth++ {
		args := o.commandLine(pid)
		if !productName.MatchString(strings.Join(args, " ")) {
			return false
		}
		stat, err := os.ReadFile(o.proc(pid, "stat"))
		if err != nil {
			return false
		}
		// pid (name) state parent ...; the name may hold anything
		f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(f) < 2 {
			return false
		}
		parent, err := strconv.Atoi(f[1])
		if err != nil {
			return false
		}
		text, err := os.ReadFile(o.proc(parent, "cgroup"))
		if err != nil || parseCgroup(string(text)).unit != unit {
			return true // pid is the first one
		}
		pid = parent
	}
	return false
}

// cgroup is what a control group tells of the processes in it.
type cgroup struct {
	container string // id, "" for none
	unit      string // .service, "" for none
	user      string // uid, if the unit is one of a user's own systemd
}

var (
	containerID = regexp.MustCompile(`[0-9a-f]{64}`)
	userManager = regexp.MustCompile(`^user@([0-9]+)\.service$`)
)

// parseCgroup reads /proc/PID/cgroup, of either version.
func parseCgroup(text string) cgroup {
	var g cgroup
	for line := range strings.Lines(text) {
		// 0::/system.slice/ocis.service or 9:name=systemd:/docker/0123...
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		if ids := containerID.FindAllString(f[2], -1); len(ids) > 0 {
			g.container = ids[len(ids)-1] // the innermost
		}
		if f[1] != "" && f[1] != "name=systemd" {
			continue // the other hierarchies of version 1 are not systemd's to name
		}
		unit, user := "", ""
		for part := range strings.SplitSeq(f[2], "/") {
			if m := userManager.FindStringSubmatch(part); m != nil {
				user, unit = m[1], ""
				continue
			}
			switch {
			case strings.HasSuffix(part, ".service"):
				unit = part
			case strings.HasSuffix(part, ".scope"): // started by hand
				unit = ""
			}
		}
		if unit != "" {
			g.unit, g.user = unit, user
		}
	}
	if g.container != "" {
		g.unit, g.user = "", ""
	}
	return g
}

// inContainers makes the choice for containers of the engine on this host.
func (o Options) inContainers(ctx context.Context, ids []string, servers []server) (*Choice, error) {
	do := o.docker()
	client, err := engine.New(do.Host)
	if err != nil {
		return nil, err
	}
	var names, projects, services []string
	for _, id := range ids {
		k, err := client.Inspect(ctx, id)
		if errors.Is(err, engine.ErrNotFound) {
			return nil, fmt.Errorf("cannot tell how to freeze: the server runs in a container (%s) that the engine at %s does not know: %w; set DOCKER_HOST to the socket of the right engine, or give --stop-command and --start-command", describe(servers), client.Socket(), err)
		}
		if err != nil {
			return nil, fmt.Errorf("cannot tell how to freeze: the server runs in a container (%s): %w; set DOCKER_HOST to the socket of its engine, or give --stop-command and --start-command", describe(servers), err)
		}
		names = append(names, k.Name)
		projects = addNew(projects, k.Config.Labels[docker.LabelProject])
		if service := k.Config.Labels[docker.LabelService]; service != "" && !docker.IsProduct(k) {
			services = addNew(services, service) // it uses the data, whatever it is
		}
	}
	var arg, why string
	if len(projects) == 1 && projects[0] != "" {
		do.Project, do.Services = projects[0], services
		arg = "compose:" + do.Project
		if len(services) > 0 {
			arg += "/" + strings.Join(services, ",")
		}
		why = fmt.Sprintf("the server (process %d) runs in container %s of compose project %s", servers[0].pid, names[0], do.Project)
	} else {
		do.Containers = names
		arg = "docker:" + strings.Join(names, ",")
		why = fmt.Sprintf("the server (process %d) runs in container %s", servers[0].pid, strings.Join(names, ", "))
	}
	f, err := docker.New(do)
	if err != nil {
		return nil, err
	}
	return &Choice{f, arg, why}, nil
}
