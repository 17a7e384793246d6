package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/ui"
)

// overlayVerb is the hidden verb with which with-view runs this program again, in a mount namespace of
// its own: PATH VIEW... -- PROGRAM ARG0 ARG...
const overlayVerb = "__with-view"

// overlay makes the command line of the hidden verb. The kernel makes the namespace as the child
// starts, and mounts in it are private.
func overlay(args ...string) *exec.Cmd {
	return &exec.Cmd{
		Path: "/proc/self/exe", Args: append([]string{os.Args[0], overlayVerb}, args...),
		SysProcAttr: &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS},
	}
}

func overlayCommand(places []viewPlace, program string, argv []string) *exec.Cmd {
	var args []string
	for _, p := range places {
		args = append(args, p.path, p.view)
	}
	return overlay(append(append(args, "--", program), argv...)...)
}

// canOverlay finds out whether --original-paths works here.
func (a *app) canOverlay(ctx context.Context) error {
	cmd := overlay("--")
	var said bytes.Buffer
	cmd.Stderr, cmd.Env = &said, a.environ
	if err := cmd.Run(); err != nil {
		if s := strings.TrimSpace(strings.TrimPrefix(said.String(), "error: ")); s != "" {
			err = errors.New(ui.Clean(s))
		}
		return ui.WithHints(fmt.Errorf("--original-paths does not work here: %w", err),
			"It needs root (CAP_SYS_ADMIN) and Linux 5.12.", "Without it the paths of the views are in the environment of the command.")
	}
	return ctx.Err()
}

// overlayVerbCommand is run by with-view only.
func (a *app) overlayVerbCommand() *cobra.Command {
	return &cobra.Command{
		Use: overlayVerb, Hidden: true, DisableFlagParsing: true,
		RunE: func(c *cobra.Command, args []string) error {
			parent := os.Getppid()
			i := slices.Index(args, "--")
			if i < 0 || i%2 != 0 {
				return usageError("%s is for Holdfast's own use", overlayVerb)
			}
			var places []viewPlace
			for j := 0; j < i; j += 2 {
				places = append(places, viewPlace{path: args[j], view: args[j+1]})
			}
			if err := mountViews(places); err != nil {
				return fmt.Errorf("the views cannot be mounted: %w", err)
			}
			argv := args[i+1:]
			if len(argv) < 2 { // a trial
				return nil
			}
			// SIGTERM at the death of the parent was set for the thread that began this process, which need
			// not be the one that ends up as the program.
			runtime.LockOSThread()
			if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(syscall.SIGTERM), 0, 0, 0); err != nil {
				return err
			}
			if err := c.Context().Err(); err != nil || os.Getppid() != parent {
				return cmp.Or(err, errInterrupted)
			}
			return withCode(126, fmt.Errorf("%s cannot be run: %w", ui.Quote(argv[0]), syscall.Exec(argv[0], argv[1:], a.environ)))
		},
	}
}

// mountViews mounts views, read-only, over the paths of the data, outer ones first, in the namespace
// of this process.
func mountViews(places []viewPlace) error {
	wd, err := os.Getwd()
	if err != nil {
		return err
	}
	// All are opened first: one mount may hide the next view.
	var trees []int
	defer func() {
		for _, fd := range trees {
			unix.Close(fd)
		}
	}()
	from := []string{}
	for _, p := range places {
		from = append(from, p.view)
	}
	if len(from) == 0 {
		from = []string{"/"} // a trial: does the kernel know how?
	}
	for _, dir := range from {
		fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE|unix.AT_SYMLINK_NOFOLLOW)
		if err != nil {
			return fmt.Errorf("open %s: %w", ui.Quote(dir), err)
		}
		trees = append(trees, fd)
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return fmt.Errorf("make %s read-only: %w", ui.Quote(dir), err)
		}
	}
	for i, p := range places {
		if err := unix.MoveMount(trees[i], "", unix.AT_FDCWD, p.path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("mount at %s: %w", ui.Quote(p.path), err)
		}
	}
	// The working directory may be below one of them: it still is the old one.
	if err := os.Chdir(wd); err != nil {
		return fmt.Errorf("the working directory is not in the view: %w", err)
	}
	return nil
}
