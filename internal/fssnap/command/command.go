// Package command makes views by commands of the user: for storage that Holdfast does not know.
package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/statedir"
	"github.com/holdfast-backup/holdfast/internal/userenv"
)

// Options are those of a Driver.
type Options struct {
	// Create is run by sh -c. It gets HOLDFAST_SOURCE, the path to be held still, and
	// HOLDFAST_VIEW_NAME, a name that no other view has. The last line that it prints is the path where
	// the picture of HOLDFAST_SOURCE can be read.
	Create string
	// Destroy is run by sh -c to remove a view. It gets the same and HOLDFAST_VIEW, the path, which is
	// empty if Create was killed before it printed it. It must not fail if there is nothing to remove.
	Destroy string
	// Timeout is for each run of a command; 0 is 2 minutes.
	Timeout time.Duration
	// StateDir is where the driver notes what it has made; "" is the default.
	StateDir string
}

const defaultTimeout = 2 * time.Minute

// Driver makes views by commands of the user, one for each path.
//
// It promises: a note is on disk before the create command runs, so that the destroy command is run
// for whatever a killed run may have left, with the very command that belonged to it. A command that
// fails, runs out of time, or prints no path of a picture is followed by the destroy command, too.
// What the view is worth is up to the command; Verify tells whether it lost anything.
//
// All of it runs for real in the tests.
type Driver struct{ o Options }

// New returns a driver.
func New(o Options) *Driver {
	if o.Timeout == 0 {
		o.Timeout = defaultTimeout
	}
	return &Driver{o}
}

// Kind is command.
func (*Driver) Kind() string { return "command" }

// Probe implements fssnap.Driver. It takes any path.
func (d *Driver) Probe(_ context.Context, path string) (fssnap.Source, error) {
	at, err := fssnap.Locate(path)
	if err != nil {
		return fssnap.Source{}, err
	}
	if d.o.Create == "" || d.o.Destroy == "" {
		return fssnap.Source{}, fssnap.Unsupported("views by command need a command to make them and one to remove them")
	}
	return fssnap.Source{Kind: d.Kind(), Name: at.Path, Root: at.Path, Path: at.Path, Rel: "."}, nil
}

// note is what the driver writes down of a view.
type note struct {
	View    fssnap.View `json:"view"`
	Destroy string      `json:"destroy"`
}

// notesSub is where the notes lie in the state directory.
var notesSub = filepath.Join("views", "command")

func (d *Driver) file(name string) (string, error) {
	if _, ok := fssnap.ParseName(name); !ok {
		return "", fmt.Errorf("%q is not the name of a view", name)
	}
	dir, err := statedir.Path(d.o.StateDir, notesSub)
	return filepath.Join(dir, name+".json"), err
}

func (d *Driver) write(n note) error {
	file, err := d.file(n.View.Name)
	if err != nil {
		return err
	}
	if _, err := statedir.Make(d.o.StateDir, notesSub); err != nil {
		return err
	}
	return statedir.Write(file, n)
}

// read returns the note of a view.
//
// Errors: ErrGone.
func (d *Driver) read(name string) (note, error) {
	file, err := d.file(name)
	if err != nil {
		return note{}, err
	}
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return note{}, fmt.Errorf("%s: %w", name, fssnap.ErrGone)
	}
	if err != nil {
		return note{}, err
	}
	var n note
	if err := json.Unmarshal(data, &n); err != nil {
		return n, fmt.Errorf("the note of a view, %s, cannot be read: %w", file, err)
	}
	return n, nil
}

// Create implements fssnap.Driver.
func (d *Driver) Create(ctx context.Context, name string, sources []fssnap.Source) (views []fssnap.View, err error) {
	begun := 0
	defer func() {
		if err != nil {
			for i := range begun {
				err = errors.Join(err, d.Remove(context.WithoutCancel(ctx), fssnap.View{Name: fmt.Sprintf("%s.%d", name, i)}))
			}
			views = nil
		}
	}()
	for i, s := range sources {
		v := fssnap.View{Kind: d.Kind(), Name: fmt.Sprintf("%s.%d", name, i), Source: s.Name, MadeAt: time.Now().UTC()}
		if _, err := d.read(v.Name); !errors.Is(err, fssnap.ErrGone) {
			return nil, fmt.Errorf("there is a view %s already", v.Name)
		}
		if err := d.write(note{v, d.o.Destroy}); err != nil {
			return nil, fmt.Errorf("no view is made, because it cannot be noted: %w", err)
		}
		begun++
		out, err := d.run(ctx, d.o.Create, v)
		if err != nil {
			return nil, fmt.Errorf("make a view of %s: %w", s.Name, err)
		}
		if v.Path, err = picture(out, s.Path); err != nil {
			return nil, fmt.Errorf("make a view of %s: the command %q %w", s.Name, d.o.Create, err)
		}
		if err := d.write(note{v, d.o.Destroy}); err != nil {
			return nil, fmt.Errorf("the view is given up, because it cannot be noted: %w", err)
		}
		views = append(views, v)
	}
	return views, nil
}

// picture reads the answer of the create command.
func picture(out []byte, source string) (string, error) {
	lines := strings.Split(strings.TrimRight(string(out), "\r\n"), "\n")
	path := strings.TrimRight(lines[len(lines)-1], "\r")
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("printed %.200q as its last line, and not the path of the view", path)
	}
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", fmt.Errorf("printed the path of no view: %w", err)
	}
	var a, b unix.Stat_t
	if err := unix.Lstat(source, &a); err != nil {
		return "", fmt.Errorf("has ended, and its source is gone: %w", err)
	}
	if err := unix.Lstat(path, &b); err != nil {
		return "", fmt.Errorf("printed the path of no view: %w", err)
	}
	switch {
	case a.Dev == b.Dev && a.Ino == b.Ino:
		return "", fmt.Errorf("printed the path of the source itself, %s, which is no still view", path)
	case a.Mode&unix.S_IFMT != b.Mode&unix.S_IFMT:
		return "", fmt.Errorf("printed %s, which is not of the same type as the source", path)
	}
	return path, nil
}

func (d *Driver) run(ctx context.Context, command string, v fssnap.View) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, d.o.Timeout, fmt.Errorf("it did not end within %v, and was killed", d.o.Timeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", command)
	cmd.Dir = "/"
	cmd.Env = append(userenv.Environ(), "HOLDFAST_SOURCE="+v.Source, "HOLDFAST_VIEW_NAME="+v.Name, "HOLDFAST_VIEW="+v.Path)
	return fssnap.Output(ctx, cmd)
}

// List implements fssnap.Driver: it reads the notes in the state directory, and needs no roots.
func (d *Driver) List(context.Context, ...string) ([]fssnap.View, error) {
	_, names, err := statedir.Names(d.o.StateDir, notesSub, ".json")
	var list []fssnap.View
	errs := []error{err}
	for _, name := range names {
		n, err := d.read(name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if n.View.Path == "" {
			n.View.Broken = "the command that was to make it did not end"
		}
		list = append(list, n.View)
	}
	return list, errors.Join(errs...)
}

// Open implements fssnap.Driver. What the create command mounted must still be mounted.
func (d *Driver) Open(ctx context.Context, v fssnap.View) (fssnap.View, error) {
	n, err := d.read(v.Name)
	if err != nil {
		return v, err
	}
	return n.View, d.Check(ctx, n.View)
}

// Check implements fssnap.Driver.
func (d *Driver) Check(_ context.Context, v fssnap.View) error {
	n, err := d.read(v.Name)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(n.View.Path); n.View.Path == "" || err != nil {
		return &fssnap.BrokenError{View: v.Name, Why: fmt.Sprintf("there is nothing at %q: %v", n.View.Path, err)}
	}
	return nil
}

// Remove implements fssnap.Driver.
func (d *Driver) Remove(ctx context.Context, v fssnap.View) error {
	n, err := d.read(v.Name)
	if errors.Is(err, fssnap.ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	if _, err := d.run(ctx, n.Destroy, n.View); err != nil {
		return err
	}
	file, err := d.file(v.Name)
	if err != nil {
		return err
	}
	return statedir.Remove(file)
}
