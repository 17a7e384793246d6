package drill

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/docker"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/statedir"
)

// SnapshotImage as Options.Image is the image that the snapshot holds, or else the one that it names.
const SnapshotImage = "snapshot"

// containerDir is where the scratch directory is seen in a container, and containerLabel says which one it is.
const (
	containerDir   = "/holdfast-drill"
	containerLabel = "holdfast.drill"
)

// container is a cell that the Docker engine makes: without network, its own files read-only, no rights.
type container struct {
	c       *docker.Client
	id      string
	net     *os.File // its network namespace
	program []string // the server's, without arguments
	over    chan struct{}
	unload  string // an image to be removed at the end
}

// startContainer starts the server in a container.
func (p *places) startContainer(ctx context.Context, r *repo.Repository, view *browse.View, saved []string, rep *Report, o Options) (j cell, why string, err error) {
	if os.Geteuid() != 0 {
		return nil, "a server in a container is asked by way of its network namespace, which only root can enter", nil
	}
	c := o.Docker
	if err := removeLeftContainers(ctx, c); err != nil {
		return nil, "", err
	}
	x := &container{c: c, over: make(chan struct{})}
	defer func() {
		if err != nil || why != "" {
			x.stop()
		}
	}()
	name := o.Image
	if name == SnapshotImage {
		if name, err = x.fromSnapshot(ctx, r, view, p.m); err != nil {
			return nil, "", err
		}
	}
	image, err := findImage(ctx, c, name)
	if err != nil {
		return nil, "", err
	}
	rep.Server.Program = "image " + name
	if x.program = image.Config.Entrypoint; len(x.program) == 0 {
		x.program = []string{p.m.Product} // which is what the program is called
	}
	user := fmt.Sprintf("%d:%d", p.uid, p.uid)
	x.id, err = c.Create(ctx, map[string]any{
		"Image": image.ID, "Entrypoint": x.program, "Cmd": []string{"server"}, "User": user, "WorkingDir": containerDir,
		"Env": p.environment(containerDir, saved), "Labels": map[string]string{containerLabel: p.scratch},
		"HostConfig": map[string]any{
			"NetworkMode": "none", "Binds": []string{p.scratch + ":" + containerDir}, "ReadonlyRootfs": true, "Tmpfs": map[string]string{"/tmp": ""},
			"CapDrop": []string{"ALL"}, "SecurityOpt": []string{"no-new-privileges"}, "RestartPolicy": map[string]string{"Name": "no"},
		},
	})
	if err != nil {
		return nil, "", err
	}
	if err := c.Start(ctx, x.id); err != nil {
		return nil, "", err
	}
	k, err := c.Inspect(ctx, x.id)
	if err != nil {
		return nil, "", err
	}
	// Checked, not believed: podman and plugins have their own ideas of what is the default.
	if k.HostConfig.NetworkMode != "none" {
		return nil, fmt.Sprintf("the Docker engine gave the container the network %q instead of none", k.HostConfig.NetworkMode), nil
	}
	go func() {
		if _, err := c.Wait(context.WithoutCancel(ctx), x.id); err == nil {
			close(x.over)
		}
	}()
	if k.State.Pid == 0 { // it ended at once, which is found out as with one that ends later
		return x, "", nil
	}
	if x.net, err = os.Open(fmt.Sprintf("/proc/%d/ns/net", k.State.Pid)); err != nil {
		openErr := err
		select { // of a process that has just ended the engine learns a moment later
		case <-x.over:
			return x, "", nil
		case <-ctx.Done():
			return nil, "", context.Cause(ctx)
		case <-time.After(endSeen):
		}
		return nil, fmt.Sprintf("the container's network cannot be entered; does the Docker engine run on another machine? (%v)", openErr), nil
	}
	if same, err := sameNetwork(x.net); err != nil || same {
		return nil, fmt.Sprintf("the container has no network of its own (%v)", err), nil
	}
	return x, "", nil
}

func findImage(ctx context.Context, c *docker.Client, name string) (*docker.Image, error) {
	image, err := c.InspectImage(ctx, name)
	if errors.Is(err, docker.ErrNotFound) {
		err = fmt.Errorf("the image %q is not on this machine, and a drill fetches none: %w", name, err)
	}
	return image, err
}

// endSeen is how long an engine may take to learn that the process of a container has ended.
const endSeen = 5 * time.Second

// sameNetwork tells whether a network namespace is ours.
func sameNetwork(f *os.File) (bool, error) {
	theirs, err := f.Stat()
	if err != nil {
		return false, err
	}
	ours, err := os.Stat("/proc/self/ns/net")
	return err == nil && os.SameFile(ours, theirs), err
}

// fromSnapshot finds the image of the snapshot in the engine, or has it taken in until the end of the drill.
func (x *container) fromSnapshot(ctx context.Context, r *repo.Repository, view *browse.View, m *snapshot.Manifest) (string, error) {
	s := m.Software
	if s == nil || s.Image == "" && s.ImageFile == "" {
		return "", errors.New("the snapshot neither holds nor names an image of the server")
	}
	have, err := x.c.InspectImage(ctx, s.Image)
	switch {
	case err == nil && (s.ImageDigest == "" || have.Digest() == s.ImageDigest || have.ID == s.ImageDigest):
		return s.Image, nil
	case err != nil && !errors.Is(err, docker.ErrNotFound):
		return "", err
	case s.ImageFile == "" && err == nil:
		return "", fmt.Errorf("the image %q on this machine is another one than that of the snapshot, %s, which the snapshot does not hold", s.Image, s.ImageDigest)
	case s.ImageFile == "":
		return "", fmt.Errorf("the image %q of the snapshot is not on this machine, the snapshot does not hold it, and a drill fetches none", s.Image)
	case err == nil:
		return "", fmt.Errorf("the image %q on this machine is another one than that of the snapshot: give it another name for the time of the drill", s.Image)
	}
	n, err := view.Find(ctx, s.ImageFile)
	if err != nil {
		return "", fmt.Errorf("the image of the server: %w", err)
	}
	content, err := browse.OpenContent(r, n)
	if err != nil {
		return "", fmt.Errorf("the image of the server: %w", err)
	}
	name, err := x.c.LoadImage(ctx, content.Reader(ctx, 0))
	if err != nil {
		return "", fmt.Errorf("the image of the server: %w", err)
	}
	x.unload = name
	return name, nil
}

// removeLeftContainers removes what killed drills left.
func removeLeftContainers(ctx context.Context, c *docker.Client) error {
	list, err := c.List(ctx, containerLabel)
	if err != nil {
		return err
	}
	for _, k := range list {
		f, err := os.OpenFile(filepath.Join(k.Labels[containerLabel], lockName), os.O_RDWR|unix.O_NOFOLLOW, 0)
		if err == nil {
			err = statedir.TryFlock(f)
			f.Close()
			if err != nil {
				continue // one at work
			}
		} else if !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := c.Remove(ctx, k.ID); err != nil {
			return fmt.Errorf("what a drill that was killed has left cannot be removed: %w", err)
		}
	}
	return nil
}

// stopTime bounds what is done at the end, also of a drill that was cancelled.
const stopTime = time.Minute

func (x *container) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), stopTime)
	defer cancel()
	// What stays all the same is removed by the next drill.
	if x.id != "" {
		_ = x.c.Remove(ctx, x.id)
	}
	if x.unload != "" {
		_ = x.c.RemoveImage(ctx, x.unload)
	}
	if x.net != nil {
		x.net.Close()
	}
}

func (x *container) run(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	code, out, err := x.c.Exec(ctx, x.id, append(x.program[:len(x.program):len(x.program)], args...)...)
	if err == nil && code != 0 {
		err = fmt.Errorf("%s: exit code %d: %s", strings.Join(args[:min(2, len(args))], " "), code, lastLine([]byte(out)))
	}
	return out, err
}

func (x *container) ended() bool {
	select {
	case <-x.over:
		return true
	default:
		return false
	}
}

func (x *container) tail() string {
	ctx, cancel := context.WithTimeout(context.Background(), stopTime)
	defer cancel()
	log, err := x.c.Logs(ctx, x.id, 40)
	if err != nil {
		return err.Error()
	}
	log = strings.TrimSpace(log)
	return log[max(0, len(log)-2000):]
}

// dial makes the connection in the container's network. A socket stays in the one where it was made.
func (x *container) dial(context.Context, string, string) (net.Conn, error) {
	type result struct {
		c   net.Conn
		err error
	}
	if x.net == nil {
		return nil, unix.ECONNREFUSED
	}
	done := make(chan result)
	go func() {
		// The thread is of no more use, and ends with the goroutine.
		runtime.LockOSThread()
		c, err := dialIn(x.net, netip.MustParseAddrPort(target))
		done <- result{c, err}
	}()
	r := <-done
	return r.c, r.err
}

// dialIn changes the thread's network. The address is on a loopback, which answers at once.
func dialIn(ns *os.File, to netip.AddrPort) (net.Conn, error) {
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, os.NewSyscallError("setns", err)
	}
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	file := os.NewFile(uintptr(s), "server")
	defer file.Close()
	if err := unix.Connect(s, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}); err != nil {
		return nil, os.NewSyscallError("connect", err)
	}
	return net.FileConn(file) // which is another descriptor
}
