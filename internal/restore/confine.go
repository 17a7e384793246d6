package restore

import (
	"errors"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A root is a destination directory that nothing below it can make us leave. All paths given to it
// are relative, slash separated, and checked by checkPath before.
type root struct {
	fd int
	// walk makes open go component by component even where openat2 exists.
	walk bool
}

// noOpenat2 is set once the kernel (before 5.6) or a seccomp filter has refused openat2.
var noOpenat2 atomic.Bool

// pathLimit keeps a path below the kernel's limit of 4096 bytes with its final NUL.
const pathLimit = 4000

// open opens rel below the root. No component may be a symbolic link; flags apply to the last one.
func (r *root) open(rel string, flags int) (int, error) {
	flags |= unix.O_CLOEXEC | unix.O_NOFOLLOW
	if rel == "" {
		return openat(r.fd, ".", flags)
	}
	if !r.walk && len(rel) < pathLimit && !noOpenat2.Load() {
		how := unix.OpenHow{
			Flags:   uint64(flags),
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
		}
		for try := 0; ; try++ {
			fd, err := unix.Openat2(r.fd, rel, &how)
			switch {
			case err == nil:
				return fd, nil
			case err == unix.EINTR, err == unix.EAGAIN && try < 8: // EAGAIN: something was renamed meanwhile
				continue
			case err == unix.ENOSYS, err == unix.EPERM && openat2Refused(r.fd):
				noOpenat2.Store(true)
			case err != unix.EAGAIN:
				return -1, err
			}
			break
		}
	}
	return r.openWalk(rel, flags)
}

// openat2Refused tells a filter that forbids the call from a file that forbids the opening.
func openat2Refused(fd int) bool {
	f, err := unix.Openat2(fd, ".", &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC})
	if err == nil {
		unix.Close(f)
	}
	return err == unix.EPERM
}

// openWalk opens rel one component at a time, none of which may be a symbolic link.
func (r *root) openWalk(rel string, flags int) (int, error) {
	dir := r.fd
	for {
		name, rest, more := strings.Cut(rel, "/")
		f := flags
		if more {
			f = unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
		}
		fd, err := openat(dir, name, f)
		if dir != r.fd {
			unix.Close(dir)
		}
		if err != nil || !more {
			return fd, err
		}
		dir, rel = fd, rest
	}
}

func (r *root) openDir(rel string) (int, error) {
	return r.open(rel, unix.O_RDONLY|unix.O_DIRECTORY)
}

func openat(dir int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, flags|unix.O_CLOEXEC, 0o600)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// openSubdir opens the directory name in dir. A symbolic link is not followed.
func openSubdir(dir int, name string) (int, error) {
	return openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
}

// isNoDir tells that a path cannot be entered because something else than a directory is in it.
func isNoDir(err error) bool {
	return errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.EXDEV)
}

// checkName refuses what cannot be the name of one directory entry.
func checkName(name string) error {
	switch {
	case name == "":
		return refused("the name is empty")
	case name == "." || name == "..":
		return refused("the name is %q", name)
	case strings.IndexByte(name, '/') >= 0:
		return refused("the name holds a slash")
	case strings.IndexByte(name, 0) >= 0:
		return refused("the name holds a NUL byte")
	}
	return nil
}

// checkPath refuses a relative path with a component that is no name.
func checkPath(rel string) error {
	if strings.HasPrefix(rel, "/") {
		return refused("the name is absolute")
	}
	for more := true; more; {
		var name string
		name, rel, more = strings.Cut(rel, "/")
		if err := checkName(name); err != nil {
			return err
		}
	}
	return nil
}

// splitPath cuts rel into its directory ("" for the root) and its last name.
func splitPath(rel string) (dir, name string) {
	if i := strings.LastIndexByte(rel, '/'); i >= 0 {
		return rel[:i], rel[i+1:]
	}
	return "", rel
}

// joinPath puts dir ("" is the root) and name together.
func joinPath(dir, name string) string {
	if dir == "" {
		return name
	}
	if name == "" {
		return dir
	}
	return dir + "/" + name
}

// within reports whether rel is dir or lies below it.
func within(rel, dir string) bool {
	return dir == "" || rel == dir || len(rel) > len(dir) && rel[len(dir)] == '/' && rel[:len(dir)] == dir
}
