package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/restore"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
	"github.com/holdfast-backup/holdfast/internal/userenv"
)

// hostMaps translates --map for a restore. OLD may be a path of the machine that was backed up, or
// the server's own name of it, as in the --map of a backup; then it stands for the former. Maps that
// leave everything in its place are dropped: they say nothing about a move.
func hostMaps(m *snapshot.Manifest, maps []discover.PathMap) []restore.PathMap {
	var out []restore.PathMap
	for _, pm := range maps {
		var from []string
		plain := false // a path of the machine
		for _, d := range m.DataSets {
			if _, ok := below(d.Path, pm.Server); ok {
				plain = true
			}
			rest, ok := below(d.ServerPath, pm.Server)
			if !ok {
				continue
			}
			if host, ok := strings.CutSuffix(d.Path, rest); ok && host != "" {
				from = append(from, host)
			}
		}
		if plain || len(from) == 0 {
			from = append(from, pm.Server)
		}
		seen := map[string]bool{pm.Host: true}
		for _, f := range from {
			if !seen[f] {
				seen[f] = true
				out = append(out, restore.PathMap{From: f, To: pm.Host})
			}
		}
	}
	return out
}

// moved returns dir, or "" if that is where it was: nothing moves then.
func moved(dir, was string) string {
	if abs, err := filepath.Abs(dir); err == nil && dir != "" && abs == filepath.Clean(was) {
		return ""
	}
	return dir
}

// below cuts dir off the front of p; rest begins with a slash or is empty.
func below(p, dir string) (rest string, ok bool) {
	if p == "" {
		return "", false
	}
	rest, ok = strings.CutPrefix(p, strings.TrimSuffix(dir, "/"))
	return rest, ok && (rest == "" || rest[0] == '/')
}

// sameVersion stops if the server at the destination is not the one that was backed up.
func (a *app) sameVersion(ctx context.Context, plan *restore.Plan, f *restoreFlags) error {
	m := plan.Manifest
	product, version, err := a.versionHere(ctx, plan, f)
	if err != nil {
		return err
	}
	if version == "" || m.ProductVersion == "" {
		if version != "" || f.place.serverBinary != "" {
			a.ui.Warn("the version of the snapshot and that of the server here cannot be compared: one of them is unknown")
		}
		return nil
	}
	if strings.TrimPrefix(version, "v") == strings.TrimPrefix(m.ProductVersion, "v") && (product == "" || product == m.Product) {
		return nil
	}
	err = fmt.Errorf("%w: the snapshot is of %s %s, here is %s %s", errOtherVersion, m.Product, m.ProductVersion, cmp.Or(product, m.Product), version)
	if f.allowVer || f.dryRun {
		a.ui.Warn("%v", err)
		return nil
	}
	return ui.WithHints(err, fmt.Sprintf("Install %s %s, restore, start, and update then.", m.Product, m.ProductVersion),
		"--allow-version restores all the same; the server may migrate the data when it starts, and there is no way back.")
}

// versionHere finds out what would run at the destination. Both are "" if that cannot be told.
func (a *app) versionHere(ctx context.Context, plan *restore.Plan, f *restoreFlags) (product, version string, err error) {
	if bin := f.place.serverBinary; bin != "" {
		v, err := binaryVersion(ctx, bin)
		return "", v, err
	}
	named := f.place.container != "" || f.place.unit != ""
	if !named && absent(plan.Paths()) {
		return "", "", nil
	}
	base := cmp.Or(f.place.baseDataPath, plan.Manifest.BasePath)
	config := cmp.Or(f.place.configDir, plan.Manifest.ConfigDir)
	inst, err := discover.Discover(ctx, discover.Options{
		BaseDataPath: base, ConfigDir: config, Container: f.place.container, Unit: f.place.unit, NoSizes: true, Environ: a.environ,
	})
	if ctx.Err() != nil {
		return "", "", context.Cause(ctx)
	}
	if err != nil {
		// Most likely there is no whole instance, which is why it is restored.
		if named {
			a.ui.Warn("the version of the server here cannot be told: %v", err)
		}
		return "", "", nil
	}
	return string(inst.Product), inst.Version, nil
}

// versionTimeout bounds the run of the server's program, which prints its version within a second.
const versionTimeout = 20 * time.Second

// binaryVersion asks the program that the user named for its version.
func binaryVersion(ctx context.Context, binary string) (string, error) {
	bin, err := filepath.Abs(binary)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, versionTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, "version", "--skip-services")
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LANG=C", "HOME=" + os.DevNull}
	cmd.Dir, cmd.WaitDelay = "/", time.Second
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("cannot ask %s for its version: %w", ui.Quote(binary), err)
	}
	for line := range strings.Lines(string(out)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.EqualFold(strings.TrimSpace(k), "version") {
			return strings.TrimSpace(v), nil
		}
	}
	return "", fmt.Errorf("cannot ask %s for its version: it names none", ui.Quote(binary))
}

// environmentFolder holds what configures an instance from outside.
const environmentFolder = "/config/environment"

// environmentFile is one file below it.
type environmentFile struct {
	name string // with slashes
	node *snapshot.Node
}

// maxEnvironment bounds one of these files, in bytes: they are written by hand.
const maxEnvironment = 16 << 20

// environment lists what configured the instance from outside.
func environment(ctx context.Context, r *repo.Repository, sn *snapshot.Snapshot) ([]environmentFile, error) {
	top, err := snapshot.Lookup(ctx, r, *sn.Tree, environmentFolder)
	if errors.Is(err, snapshot.ErrNoSuchPath) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []environmentFile
	var walk func(tree id.ID, dir string, depth int) error
	walk = func(tree id.ID, dir string, depth int) error {
		if depth > 32 { // systemd's drop-ins are two folders deep
			return fmt.Errorf("%s%s: too many folders", environmentFolder, dir)
		}
		t, err := snapshot.LoadTree(ctx, r, tree)
		if err != nil {
			return err
		}
		for _, n := range t.Nodes {
			name := path.Join(dir, n.Name)
			switch {
			case n.Name == "" || n.Name == "." || n.Name == ".." || strings.ContainsAny(n.Name, "/\x00"):
				return fmt.Errorf("%s: refused the name %s", environmentFolder, ui.Quote(n.Name))
			case n.Type == snapshot.Dir:
				err = walk(n.Subtree, name, depth+1)
			case n.Type == snapshot.File:
				out = append(out, environmentFile{name, n})
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	err = walk(top.Subtree, "", 0)
	return out, err
}

// writeEnvironment writes the files into a folder, for nobody else to read: they may hold secrets.
// Nothing that is there is overwritten.
func writeEnvironment(ctx context.Context, r *repo.Repository, env []environmentFile, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, e := range env {
		data, err := snapshot.LoadContent(ctx, r, e.node, maxEnvironment)
		if err != nil {
			return err
		}
		if err := root.MkdirAll(path.Dir(e.name), 0o700); err != nil {
			return err
		}
		f, err := root.OpenFile(e.name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, fs.ErrExist) && sameContent(root, e.name, data) {
			continue
		}
		if err != nil {
			return err
		}
		_, err = f.Write(data)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

func sameContent(root *os.Root, name string, want []byte) bool {
	f, err := root.Open(name)
	if err != nil {
		return false
	}
	defer f.Close()
	got, err := io.ReadAll(io.LimitReader(f, maxEnvironment+1))
	return err == nil && bytes.Equal(got, want)
}

// shell runs a command of the user.
func (a *app) shell(ctx context.Context, line string) error {
	cmd := exec.CommandContext(ctx, "sh", "-c", line)
	cmd.Env = userenv.Filter(a.environ)
	cmd.Stdout, cmd.Stderr = a.err, a.err
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("the command failed: %w", err)
	}
	return nil
}
