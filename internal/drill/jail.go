package drill

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// jailArgument makes this program the first process of a jail.
const jailArgument = "drill-jail"

// Descriptors of a jail's first process.
const (
	fdRelay   = 3 // listener: connections go on to the server
	fdControl = 4 // listener: one command of the server's program each
	fdConfig  = 5 // jailConfig as JSON, to its end
	fdWalls   = 6 // to say why the walls cannot be made; closed when they stand
)

// hooked is set by MaybeJail: without it in main, the jail would be a second drill.
var hooked atomic.Bool

// MaybeJail must be called first thing in main. In a process that was started to be a jail it does that
// work and exits; in all others it returns at once.
func MaybeJail() {
	if len(os.Args) == 2 && os.Args[1] == jailArgument {
		fmt.Fprintln(os.Stderr, "jail:", jailMain()) // it ends well only by being killed
		os.Exit(1)
	}
	hooked.Store(true)
}

// jailConfig says what runs in a jail. A jail has a network of its own with nothing but a loopback, its
// own processes, which all end with its first one, and its own view of the files: read-only but for the
// scratch directory, without the original data.
type jailConfig struct {
	Scratch string   // mounted at inside
	Hide    []string // directories that are empty inside
	UID     int      // the server's user and group; -1 is that of the jail
	Program string   // as seen inside
	Args    []string
	Env     []string
	Target  string // host:port of the server in the jail
}

// insideName is the folder below one of mountPoints at which the scratch directory is seen inside.
const insideName = "holdfast-drill"

// mountPoints are directories that a tmpfs can cover without harm to a server.
var mountPoints = []string{"/mnt", "/media", "/opt", "/srv"}

// inside is where the scratch directory is seen inside a jail.
func inside() (string, error) {
	for _, d := range mountPoints {
		if st, err := os.Lstat(d); err == nil && st.IsDir() {
			return filepath.Join(d, insideName), nil
		}
	}
	return "", fmt.Errorf("none of %s is a directory", strings.Join(mountPoints, ", "))
}

func jailMain() error {
	walls := os.NewFile(fdWalls, "walls")
	err := jailServer(walls)
	// Nobody listens any more if they stood.
	_, _ = walls.WriteString(fmt.Sprint(err))
	return err
}

func jailServer(walls *os.File) error {
	p, err := io.ReadAll(os.NewFile(fdConfig, "config"))
	if err != nil {
		return err
	}
	var c jailConfig
	if err := json.Unmarshal(p, &c); err != nil {
		return err
	}
	for _, fd := range []int{fdRelay, fdControl, fdWalls} {
		unix.CloseOnExec(fd) // not for the server
	}
	relay, err := net.FileListener(os.NewFile(fdRelay, "relay"))
	if err != nil {
		return err
	}
	control, err := net.FileListener(os.NewFile(fdControl, "control"))
	if err != nil {
		return err
	}
	dir, err := mountJail(&c)
	if err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	walls.Close()
	server := c.command(context.Background(), dir, c.Args)
	server.Stdout, server.Stderr = os.Stdout, os.Stderr
	if err := startWithoutRights(server); err != nil {
		return fmt.Errorf("start the server: %w", err)
	}
	go forward(relay, c.Target)
	go c.serve(control, dir)
	return fmt.Errorf("the server ended by itself: %v", server.Wait())
}

// startWithoutRights starts a program that gets none of the jail's rights: where the jail was made by an
// unprivileged user they would come along, and with them the server could undo what mountJail did.
func startWithoutRights(cmd *exec.Cmd) error {
	started := make(chan error)
	go func() {
		// Both are properties of the thread, which ends with this goroutine.
		runtime.LockOSThread()
		err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		if err == nil {
			err = unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
		}
		if err == nil {
			err = cmd.Start()
		}
		started <- err
	}()
	return <-started
}

func (c *jailConfig) command(ctx context.Context, dir string, args []string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.Program, args...)
	cmd.Env, cmd.Dir = c.Env, dir
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if c.UID >= 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(c.UID), Gid: uint32(c.UID)}
	}
	return cmd
}

// mountJail makes the jail's view of the files, and returns where the scratch directory is in it.
func mountJail(c *jailConfig) (string, error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return "", fmt.Errorf("mounts of its own: %w", err)
	}
	// Held by its descriptor: the path may get covered.
	scratch, err := unix.OpenTree(unix.AT_FDCWD, c.Scratch, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return "", fmt.Errorf("scratch directory: %w", err)
	}
	err = unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	if err != nil {
		return "", fmt.Errorf("make the files read-only: %w", err)
	}
	dir, err := inside()
	if err != nil {
		return "", err
	}
	for _, h := range c.Hide {
		if st, err := os.Stat(h); err != nil || !st.IsDir() || h == "/" {
			continue
		}
		if err := unix.Mount("tmpfs", h, "tmpfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, "mode=0555,size=4k"); err != nil {
			return "", fmt.Errorf("hide %s: %w", h, err)
		}
	}
	if err := unix.Mount("tmpfs", filepath.Dir(dir), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755,size=64k"); err != nil {
		return "", fmt.Errorf("place for the scratch directory: %w", err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	if err := unix.MoveMount(scratch, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return "", fmt.Errorf("mount the scratch directory: %w", err)
	}
	unix.Close(scratch)
	return dir, nil
}

func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, r)
}

// forward passes connections on to the server.
func forward(l net.Listener, target string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			s, err := net.Dial("tcp", target)
			if err != nil {
				return
			}
			defer s.Close()
			done := make(chan struct{}, 2)
			pass := func(to, from net.Conn) {
				_, _ = io.Copy(to, from)
				if w, ok := to.(interface{ CloseWrite() error }); ok {
					_ = w.CloseWrite()
				}
				done <- struct{}{}
			}
			go pass(s, c)
			go pass(c, s)
			<-done
			<-done
		}()
	}
}

// answer is what a command of the server's program printed.
type answer struct {
	Output string
	Error  string
}

// commandTime bounds one command.
const commandTime = time.Minute

// serve runs commands of the server's program, one for each connection.
func (c *jailConfig) serve(l net.Listener, dir string) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			line, err := bufio.NewReader(conn).ReadBytes('\n')
			var args []string
			if err != nil || json.Unmarshal(line, &args) != nil {
				return
			}
			ctx, cancel := context.WithTimeout(context.Background(), commandTime)
			defer cancel()
			var out, said bytes.Buffer
			cmd := c.command(ctx, dir, args)
			cmd.Stdout, cmd.Stderr = &out, &said
			if err = startWithoutRights(cmd); err == nil {
				err = cmd.Wait()
			}
			a := answer{Output: out.String()}
			if err != nil {
				a.Error = err.Error() + ": " + lastLine(said.Bytes())
			}
			_ = json.NewEncoder(conn).Encode(a)
		}()
	}
}

func lastLine(p []byte) string {
	lines := strings.Split(strings.TrimSpace(string(p)), "\n")
	return lines[len(lines)-1]
}

// jail is a running jail, seen from outside.
type jail struct {
	proc    *os.Process
	relay   string // sockets
	control string
	dir     string
	log     *os.File
	over    chan struct{} // closed when it has ended
}

// startJail starts a jail.
//
// Errors: the kernel or a container may not allow it.
func startJail(c *jailConfig) (*jail, error) {
	if !hooked.Load() {
		return nil, errors.New("drill.MaybeJail was not called in main")
	}
	log, err := os.OpenFile(filepath.Join(c.Scratch, "server.log"), os.O_CREATE|os.O_EXCL|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	// In the scratch directory, which the next drill removes after a kill. But a path of a socket has 107
	// bytes at most, and a scratch directory may lie deep.
	dir := filepath.Join(c.Scratch, "s")
	err = os.Mkdir(dir, 0o700)
	if len(dir) > 100 {
		dir, err = os.MkdirTemp("/tmp", "holdfast-drill-")
	}
	if err != nil {
		log.Close()
		return nil, err
	}
	j := &jail{relay: filepath.Join(dir, "r"), control: filepath.Join(dir, "c"), dir: dir, log: log, over: make(chan struct{})}
	fail := func(err error) (*jail, error) {
		log.Close()
		os.RemoveAll(dir)
		return nil, err
	}
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	for _, path := range []string{j.relay, j.control} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return fail(err)
		}
		l.SetUnlinkOnClose(false)
		f, err := l.File()
		l.Close()
		if err != nil {
			return fail(err)
		}
		files = append(files, f)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	files = append(files, r)
	walls, wallsW, err := os.Pipe()
	if err != nil {
		w.Close()
		return fail(err)
	}
	defer walls.Close()
	files = append(files, wallsW)
	exe, err := os.Executable()
	if err != nil {
		w.Close()
		return fail(err)
	}
	cmd := exec.Command(exe, jailArgument)
	cmd.Args[0] = "holdfast"
	cmd.ExtraFiles, cmd.Stdout, cmd.Stderr = files, log, log
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL, // the kernel then ends all that is in the jail
		Setsid:     true,            // Ctrl-C is for us: we stop the server in order
	}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Geteuid(), HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getegid(), HostID: os.Getegid(), Size: 1}}
		cmd.SysProcAttr.AmbientCaps = []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN}
	}
	started := make(chan error)
	go func() {
		// Pdeathsig comes when the thread that started the child ends, not the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
			close(j.over)
		}
	}()
	if err := <-started; err != nil {
		w.Close()
		switch {
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EUSERS):
			err = fmt.Errorf("no more are allowed here, see user.max_user_namespaces (%w)", err)
		case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
			err = fmt.Errorf("the kernel, or a container around this program, does not allow them to this user (%w)", err)
		}
		return fail(fmt.Errorf("no namespaces for the server, without which it could reach others: %w", err))
	}
	j.proc = cmd.Process
	err = json.NewEncoder(w).Encode(c)
	w.Close()
	wallsW.Close()
	if err == nil {
		var why []byte
		if why, err = io.ReadAll(io.LimitReader(walls, 64<<10)); err == nil && len(why) > 0 {
			err = fmt.Errorf("no walls around the server: %s", why)
		}
	}
	if err != nil {
		j.stop()
		return nil, err
	}
	return j, nil
}

func (j *jail) stop() {
	_ = j.proc.Kill() // with its first process the kernel ends all others
	<-j.over
	j.log.Close()
	os.RemoveAll(j.dir)
}

func (j *jail) tail() string { return tail(j.log) }

// tail is the end of a log.
func tail(f *os.File) string {
	const n = 2000
	st, err := f.Stat()
	if err != nil {
		return ""
	}
	p := make([]byte, min(st.Size(), n))
	k, _ := f.ReadAt(p, st.Size()-int64(len(p)))
	return strings.TrimSpace(string(p[:k]))
}

func (j *jail) run(ctx context.Context, args ...string) (string, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", j.control)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := json.NewEncoder(conn).Encode(args); err != nil {
		return "", err
	}
	var a answer
	if err := json.NewDecoder(io.LimitReader(conn, 1<<20)).Decode(&a); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return "", err
	}
	if a.Error != "" {
		return "", fmt.Errorf("%s: %s", strings.Join(args[:min(2, len(args))], " "), a.Error)
	}
	return a.Output, nil
}

func (j *jail) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", j.relay)
}

func (j *jail) ended() bool {
	select {
	case <-j.over:
		return true
	default:
		return false
	}
}

// hidden leaves out of the directories to hide those that hold the scratch directory.
func hidden(scratch string, dirs []string) []string {
	return slices.DeleteFunc(slices.Clone(dirs), func(d string) bool {
		return !filepath.IsAbs(d) || d == "/" || within(scratch, d)
	})
}

func within(p, dir string) bool {
	return p == dir || strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/")
}
