package freeze

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
)

// ProcessOptions configures the process freezer.
type ProcessOptions struct {
	// PID of the server; 0 finds the process called "... server" that uses the data.
	PID          int
	StopTimeout  time.Duration // 0 is DefaultStopTimeout
	ReadyCommand string
	ReadyURL     string
	ReadyTimeout time.Duration // 0 is DefaultReadyTimeout
	StartRetries int           // 0 is DefaultStartRetries; negative is none
	StartBackoff time.Duration // 0 is DefaultBackoff
	Progress     progress.Sink `json:"-"`
}

// ProcessRecipe starts a process again as it was. It holds the environment: keep it secret.
type ProcessRecipe struct {
	Old    identity      `json:"old"`
	Exe    Text          `json:"exe"`
	Args   Texts         `json:"args"`
	Env    Texts         `json:"env"`
	Dir    Text          `json:"dir"`
	UID    int           `json:"uid"`
	GID    int           `json:"gid"`
	Groups []int         `json:"groups"`
	Umask  int           `json:"umask"` // -1 if unknown
	OOM    string        `json:"oom_score_adj,omitempty"`
	Limits []unix.Rlimit `json:"limits"` // by number of the resource
	// Stdin, Stdout and Stderr are files; "" is /dev/null for the first, and the log of Holdfast for
	// the others.
	Stdin  Text `json:"stdin,omitempty"`
	Stdout Text `json:"stdout,omitempty"`
	Stderr Text `json:"stderr,omitempty"`
	// Holds: it had files of the instance open, so the new one is up when it has as well.
	Holds bool `json:"holds"`
}

// Process is the freezer that ends a server process by SIGTERM and starts it again as it was.
type Process struct{ o ProcessOptions }

// NewProcess returns the freezer of --freeze process.
func NewProcess(o ProcessOptions) *Process {
	o.StopTimeout = cmp.Or(o.StopTimeout, DefaultStopTimeout)
	o.ReadyTimeout = cmp.Or(o.ReadyTimeout, DefaultReadyTimeout)
	o.StartRetries = max(cmp.Or(o.StartRetries, DefaultStartRetries), 0)
	o.StartBackoff = cmp.Or(o.StartBackoff, DefaultBackoff)
	return &Process{o}
}

// Method returns "process".
func (p *Process) Method() string { return KindProcess }

// Freeze ends the process and waits for the proof. A server that does not end in time is left alone.
func (p *Process) Freeze(ctx context.Context, inst *ocis.Instance) (Frozen, error) {
	return freezePlain(ctx, p, inst, p.o.Progress)
}

// Plan finds the process and records all that it takes to start it again.
//
// Errors: no such process, several of them, one in a container.
func (p *Process) Plan(ctx context.Context, inst *ocis.Instance) (*Plan, error) {
	paths := Paths(inst)
	u, err := Look(ctx, paths)
	if err != nil {
		return nil, err
	}
	pid := p.o.PID
	if pid == 0 {
		if pid, err = findServer(u, inst.BasePath); err != nil {
			return nil, err
		}
	}
	r, err := recordProcess(pid)
	if err != nil {
		return nil, fmt.Errorf("process %d cannot be recorded for its start, so nothing was stopped: %w", pid, err)
	}
	for _, h := range u.Holders {
		r.Holds = r.Holds || h.PID == pid
	}
	if unit := unitOf(pid); unit != "" && unit != unitOf(os.Getpid()) {
		p.o.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "freeze",
			Message: fmt.Sprintf("process %d belongs to the systemd unit %s, which will not know the new process: better stop and start the unit", pid, unit)})
	}
	dir, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	env := commandEnv()
	return &Plan{
		Recipe: Recipe{
			Kind:        KindProcess,
			Process:     r,
			Paths:       paths,
			Ready:       Ready{Command: Text(p.o.ReadyCommand), Dir: Text(dir), Env: env, URL: p.o.ReadyURL, Timeout: p.o.ReadyTimeout},
			StopTimeout: p.o.StopTimeout,
			Retries:     p.o.StartRetries,
			Backoff:     p.o.StartBackoff,
		},
		Stop: func(ctx context.Context, run *Run) error {
			deadline := time.Now().Add(p.o.StopTimeout)
			if err := terminate(r.Old); err != nil {
				return err
			}
			runs := func() []Holder {
				if !r.Old.alive() {
					return nil
				}
				return []Holder{{PID: pid, Command: commandOf(pid), Path: inst.BasePath, How: HowRuns, Writing: true}}
			}
			err := waitFree(ctx, paths, runs, deadline, p.o.StopTimeout, run)
			var busy *BusyError
			if errors.As(err, &busy) && r.Old.alive() {
				return fmt.Errorf("%w; the server was left running: see its log, or raise --stop-timeout", err)
			}
			return err
		},
	}, nil
}

// findServer picks the process that uses the data most among those called "... server".
func findServer(u Usage, base string) (int, error) {
	count := map[int]int{}
	for _, h := range u.Holders {
		if h.PID != 0 {
			count[h.PID]++
		}
	}
	var servers []int
	for pid := range count {
		if isServer(pid) {
			servers = append(servers, pid)
		}
	}
	slices.SortFunc(servers, func(a, b int) int { return cmp.Or(count[b]-count[a], a-b) })
	switch {
	case len(servers) == 1:
		return servers[0], nil
	case len(servers) > 1:
		return 0, fmt.Errorf("cannot freeze: %d server processes use the data of %s (%v): it runs as several services; give commands to stop and start all of them", len(servers), base, servers)
	case len(u.Holders) > 0:
		return 0, fmt.Errorf("cannot freeze: no process called server was found: %w; give its --pid", u.Err())
	}
	return 0, fmt.Errorf("cannot freeze: no process uses the data of %s; if the instance is stopped, use --freeze none", base)
}

func isServer(pid int) bool {
	args, err := readList(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && len(args) > 1 && slices.Contains(args[1:], "server")
}

// readList reads a file of strings that end with a zero byte.
func readList(path string) ([]string, error) {
	data, err := os.ReadFile(path)
	if err != nil || len(data) == 0 {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(data), "\x00"), "\x00"), nil
}

// unitOf returns the systemd service of a process, "" if there is none.
func unitOf(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 {
			if name := filepath.Base(f[2]); strings.HasSuffix(name, ".service") {
				return name
			}
		}
	}
	return ""
}

// recordProcess reads everything from /proc that a start needs.
func recordProcess(pid int) (*ProcessRecipe, error) {
	dir := fmt.Sprintf("/proc/%d", pid)
	var err error
	r := &ProcessRecipe{}
	if r.Old, err = identify(pid); err != nil {
		return nil, err
	}
	for _, ns := range []string{"mnt", "pid", "net", "user"} {
		a, err1 := os.Readlink("/proc/self/ns/" + ns)
		b, err2 := os.Readlink(dir + "/ns/" + ns)
		if err := errors.Join(err1, err2); err != nil {
			return nil, err
		}
		if a != b {
			return nil, errors.New("it runs in a container; stop and start the container instead")
		}
	}
	exe, err := os.Readlink(dir + "/exe")
	if err != nil {
		return nil, err
	}
	// An update may have replaced the file: then the new one is what starts, as it would anyway.
	exe = strings.TrimSuffix(exe, " (deleted)")
	if _, err := os.Stat(exe); err != nil {
		return nil, fmt.Errorf("its program is gone: %w", err)
	}
	r.Exe = Text(exe)
	if r.Args, err = readList(dir + "/cmdline"); err != nil {
		return nil, err
	}
	if len(r.Args) == 0 {
		return nil, errors.New("it has no command line; has it ended?")
	}
	if r.Env, err = readList(dir + "/environ"); err != nil {
		return nil, err
	}
	cwd, err := os.Readlink(dir + "/cwd")
	if err != nil {
		return nil, err
	}
	r.Dir = Text(cwd)
	if err := r.readStatus(dir + "/status"); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(dir + "/limits") // prlimit wants a capability for processes of others
	if err != nil {
		return nil, err
	}
	r.Limits = parseLimits(data)
	if data, err := os.ReadFile(dir + "/oom_score_adj"); err == nil {
		r.OOM = strings.TrimSpace(string(data))
	}
	for fd, target := range []*Text{&r.Stdin, &r.Stdout, &r.Stderr} {
		link, err := os.Readlink(dir + "/fd/" + strconv.Itoa(fd))
		if err != nil {
			continue
		}
		// A terminal or a pipe has nobody at its other end any more.
		if st, err := os.Stat(link); link == os.DevNull || err == nil && st.Mode().IsRegular() {
			*target = Text(link)
		}
	}
	return r, nil
}

// parseLimits reads /proc/PID/limits, which has a line for each resource in the order of their
// numbers. It stops at what it does not understand.
func parseLimits(data []byte) []unix.Rlimit {
	var list []unix.Rlimit
	_, lines, _ := strings.Cut(string(data), "\n") // the heading
	for line := range strings.Lines(lines) {
		const name = 26 // width of the column
		if len(line) < name {
			break
		}
		f := strings.Fields(line[name:])
		if len(f) < 2 {
			break
		}
		var v [2]uint64
		for i := range v {
			n, err := strconv.ParseUint(f[i], 10, 64)
			if f[i] == "unlimited" {
				n, err = unix.RLIM_INFINITY, nil
			}
			if err != nil {
				return list
			}
			v[i] = n
		}
		list = append(list, unix.Rlimit{Cur: v[0], Max: v[1]})
	}
	return list
}

func (r *ProcessRecipe) readStatus(path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	r.UID, r.GID, r.Umask = -1, -1, -1
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(line, ":")
		f := strings.Fields(value)
		switch {
		case key == "Uid" && len(f) == 4:
			r.UID, err = strconv.Atoi(f[1])
		case key == "Gid" && len(f) == 4:
			r.GID, err = strconv.Atoi(f[1])
		case key == "Umask" && len(f) == 1:
			var n int64
			n, err = strconv.ParseInt(f[0], 8, 32)
			r.Umask = int(n)
		case key == "Groups":
			for _, g := range f {
				n, gerr := strconv.Atoi(g)
				if gerr != nil {
					err = gerr
					break
				}
				r.Groups = append(r.Groups, n)
			}
		}
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	if r.UID < 0 || r.GID < 0 {
		return fmt.Errorf("%s: no user and group", path)
	}
	return nil
}

// terminate sends SIGTERM to exactly this process.
func terminate(id identity) error {
	fd, err := unix.PidfdOpen(id.PID, 0)
	if err != nil && !errors.Is(err, unix.ENOSYS) {
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return fmt.Errorf("stop process %d: %w", id.PID, err)
	}
	if err == nil {
		defer unix.Close(fd)
	}
	if !id.alive() { // asked only now: the descriptor holds on to the process
		return nil
	}
	if err == nil {
		err = unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0)
	} else {
		err = unix.Kill(id.PID, unix.SIGTERM)
	}
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("stop process %d: %w", id.PID, err)
	}
	return nil
}

// startProcess starts the process of the recipe, unless one like it runs already, and returns when
// it has the data open as the old one had.
func startProcess(ctx context.Context, r Recipe, run *Run) error {
	p := r.Process
	if p == nil {
		return errors.New("the record holds no process")
	}
	if p.Old.alive() {
		return nil // it was not stopped, or not yet
	}
	u, err := Look(ctx, r.Paths, run.Except...)
	if err != nil {
		return err
	}
	for _, h := range u.Holders {
		if args, err := readList(fmt.Sprintf("/proc/%d/cmdline", h.PID)); err == nil && slices.Equal(args, p.Args) {
			return nil // somebody was faster
		}
	}
	out, err := openOutput(run.Log)
	if err != nil {
		return err
	}
	defer out.Close()
	begin, err := out.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	cmd, err := spawn(p, out)
	if err != nil {
		return fmt.Errorf("start %s: %w", p.Exe, err)
	}
	pid := cmd.Process.Pid
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()

	timeout := cmp.Or(r.Ready.Timeout, DefaultReadyTimeout)
	deadline := time.Now().Add(timeout)
	settled := time.After(time.Second)
	for {
		if p.Holds {
			u, err := Look(ctx, r.Paths, run.Except...)
			if err != nil {
				return err
			}
			for _, h := range u.Holders {
				if h.PID == pid {
					return nil
				}
			}
		}
		select {
		case err := <-done:
			return fmt.Errorf("%s ended at once: %v%s", p.Exe, err, tail(out, begin))
		case <-settled:
			if !p.Holds {
				return nil
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
		if !time.Now().Before(deadline) {
			// Left alone: it may be at work on its data for its own reasons.
			run.Progress.Emit(progress.Event{Kind: progress.Warning, Phase: "thaw",
				Message: fmt.Sprintf("the server runs (process %d) but has not opened its data within %s", pid, timeout)})
			return nil
		}
	}
}

// spawn starts p by way of this program, which sets what only a process can set for itself.
func spawn(p *ProcessRecipe, out *os.File) (*exec.Cmd, error) {
	if !hooked.Load() && (len(os.Args) < 2 || os.Args[1] != guardArgument) {
		return nil, errors.New("this program does not call freeze.MaybeGuard")
	}
	data, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	inR, inW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	errR, errW, err := os.Pipe()
	if err != nil {
		inR.Close()
		inW.Close()
		return nil, err
	}
	defer errR.Close()
	cmd := exec.Command(selfExecutable())
	cmd.Args = []string{os.Args[0], startArgument}
	cmd.Env = []string{}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.ExtraFiles = []*os.File{inR, errW}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	inR.Close()
	errW.Close()
	if err != nil {
		inW.Close()
		return nil, err
	}
	_, err = inW.Write(data)
	inW.Close()
	// The end without a word is the exec.
	text, rerr := io.ReadAll(io.LimitReader(errR, 4<<10))
	switch {
	case len(text) > 0:
		err = errors.New(string(text))
	case err == nil:
		err = rerr
	}
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, err
	}
	return cmd, nil
}

// shimMain becomes the server.
func shimMain() int {
	in, out := os.NewFile(3, "recipe"), os.NewFile(4, "errors")
	syscall.CloseOnExec(3)
	syscall.CloseOnExec(4)
	var p ProcessRecipe
	err := json.NewDecoder(in).Decode(&p)
	in.Close()
	if err != nil {
		fmt.Fprintln(os.Stderr, "holdfast: this command is for holdfast's own use")
		return 2
	}
	fmt.Fprint(out, p.become())
	return 1
}

// become turns this process into the one recorded. It returns only with an error.
func (p *ProcessRecipe) become() error {
	for fd, target := range []Text{cmp.Or(p.Stdin, os.DevNull), p.Stdout, p.Stderr} {
		name := string(target)
		if name == "" {
			continue
		}
		flags := unix.O_RDONLY
		if fd > 0 {
			flags = unix.O_WRONLY | unix.O_APPEND | unix.O_CREAT
		}
		n, err := unix.Open(name, flags|unix.O_NOCTTY|unix.O_CLOEXEC, 0o640)
		if err != nil {
			return &os.PathError{Op: "open", Path: name, Err: err}
		}
		if err := unix.Dup3(n, fd, 0); err != nil {
			return os.NewSyscallError("dup", err)
		}
	}
	if err := os.Chdir(string(p.Dir)); err != nil {
		return err
	}
	if p.OOM != "" {
		_ = os.WriteFile("/proc/self/oom_score_adj", []byte(p.OOM), 0) // lowering it is for root
	}
	for res, l := range p.Limits {
		var have unix.Rlimit
		if err := unix.Prlimit(0, res, nil, &have); err != nil {
			return os.NewSyscallError("prlimit", err)
		}
		if have == l && res != unix.RLIMIT_NOFILE {
			continue
		}
		// syscall and not unix for all: it tells the runtime, which otherwise puts its own number of
		// open files back before exec.
		err := syscall.Setrlimit(res, &syscall.Rlimit{Cur: l.Cur, Max: l.Max})
		if errors.Is(err, unix.EPERM) { // a lower limit is better than no server
			err = syscall.Setrlimit(res, &syscall.Rlimit{Cur: min(l.Cur, have.Max), Max: have.Max})
		}
		if err != nil {
			return os.NewSyscallError("setrlimit", err)
		}
	}
	if p.Umask >= 0 {
		unix.Umask(p.Umask)
	}
	if os.Geteuid() == 0 {
		if err := syscall.Setgroups(p.Groups); err != nil {
			return os.NewSyscallError("setgroups", err)
		}
	}
	if os.Getegid() != p.GID || os.Getgid() != p.GID {
		if err := syscall.Setresgid(p.GID, p.GID, p.GID); err != nil {
			return os.NewSyscallError("setgid", err)
		}
	}
	if os.Geteuid() != p.UID || os.Getuid() != p.UID {
		if err := syscall.Setresuid(p.UID, p.UID, p.UID); err != nil {
			return os.NewSyscallError("setuid", err)
		}
	}
	err := syscall.Exec(string(p.Exe), p.Args, p.Env)
	return &os.PathError{Op: "exec", Path: string(p.Exe), Err: err}
}
