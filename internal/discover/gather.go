package discover

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/docker"
	"github.com/holdfast-backup/holdfast/internal/mountinfo"
	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// sources is what the sources of the options say together.
type sources struct {
	env   environment
	files []ocis.EnvironmentFile
	maps  pathMap
	soft  ocis.Software
	// labels and tag of the image may tell the version.
	imageVersion string
	// product is what the binary or the image is; productBy says which.
	product   ocis.Product
	productBy string
	// container is true if the server has the layout of a container image.
	container bool
	// home leads to the default places of a binary; "" if there is none.
	home string
	// workDir is the server's working directory, for relative paths; "" if it is not known.
	workDir string
	// extra are the environments of further storage-users processes with a vault.
	extra    []environment
	warnings []string
	given    bool // any source of environment was given
}

func (s *sources) warn(format string, args ...any) {
	s.warnings = append(s.warnings, fmt.Sprintf(format, args...))
}

// addFile keeps a configuration file from outside, under a name that is still free.
func (s *sources) addFile(name, path string, content []byte) {
	if path != "" && slices.ContainsFunc(s.files, func(f ocis.EnvironmentFile) bool { return f.Path == path }) {
		return
	}
	base, ext := strings.TrimSuffix(name, filepath.Ext(name)), filepath.Ext(name)
	if filepath.Base(name) == ext { // ".env" has no ending
		base, ext = name, ""
	}
	for n := 2; slices.ContainsFunc(s.files, func(f ocis.EnvironmentFile) bool { return f.Name == name }); n++ {
		name = fmt.Sprintf("%s-%d%s", base, n, ext)
	}
	s.files = append(s.files, ocis.EnvironmentFile{Name: name, Path: path, Content: content})
}

// addPath keeps a file that lies on this host.
func (s *sources) addPath(name, path string) error {
	data, err := readLimited(path, yamlLimit)
	if err != nil {
		return readError("configuration file", path, err)
	}
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	s.addFile(name, path, data)
	return nil
}

// environ is the environment of this process.
func (o *Options) environ() environment {
	list := o.Environ
	if list == nil {
		list = os.Environ()
	}
	e := environment{}
	e.addList(list, "the environment of holdfast")
	return e
}

// docker returns the client, or nil if there is none to be had.
func (o *Options) docker() *docker.Client {
	if o.Docker != nil {
		return o.Docker
	}
	c, err := docker.New("")
	if err != nil {
		return nil
	}
	return c
}

// gather reads all sources.
//
// Errors: *SettingError, *AmbiguousError, those of the Docker engine.
func gather(ctx context.Context, o *Options) (*sources, error) {
	own := o.environ()
	s := &sources{env: environment{}, maps: pathMap{root: o.Root}}
	s.given = o.Unit != "" || len(o.Compose) > 0 || o.Container != "" || o.PID != 0 || len(o.EnvFiles) > 0
	s.home, _ = own.lookup("HOME")
	if !s.given {
		s.env.merge(own)
	}
	for _, m := range o.Map {
		if !filepath.IsAbs(m.Server) || !filepath.IsAbs(m.Host) {
			return nil, &SettingError{Setting: "--map", Value: m.Server + "=" + m.Host, Problem: "both paths must be absolute"}
		}
		s.maps.add(m, rankFlag, "--map")
	}
	if o.Unit != "" {
		if err := s.fromUnit(o); err != nil {
			return nil, err
		}
	}
	if len(o.Compose) > 0 {
		if err := s.fromCompose(ctx, o, own); err != nil {
			return nil, err
		}
	}
	if o.Container != "" {
		if err := s.fromContainer(ctx, o); err != nil {
			return nil, err
		}
	}
	if o.PID != 0 {
		if err := s.fromProcess(ctx, o); err != nil {
			return nil, err
		}
	}
	for _, f := range o.EnvFiles {
		data, err := readLimited(f, yamlLimit)
		if err != nil {
			return nil, readError("--env-file", f, err)
		}
		vars, _ := ParseEnvFile(data, own.lookup)
		s.env.add(vars, f)
		if err := s.addPath(filepath.Base(f), f); err != nil {
			return nil, err
		}
	}
	if o.ServerBinary != "" {
		path, err := filepath.Abs(o.ServerBinary)
		if err != nil {
			return nil, err
		}
		if !isFile(path) {
			return nil, &SettingError{Setting: "--server-binary", Value: o.ServerBinary, Problem: "no such file"}
		}
		s.soft.Binary = resolve(path)
		s.setProduct(binaryProduct(path), "the binary "+path)
	}
	s.effective()
	return s, nil
}

// EffectiveFile is the name below /config/environment of what all sources come to, in the syntax of
// ParseEnvFile: the product's variables alone.
const EffectiveFile = "holdfast/effective.env"

// effective keeps the variables as they count, so that nobody has to resolve compose files and units of
// another machine again.
func (s *sources) effective() {
	var list []string
	for name, v := range s.env {
		if ocis.IsVariable(name) {
			list = append(list, name+"="+v.value)
		}
	}
	if len(list) > 0 {
		s.addFile(EffectiveFile, "", envText(list))
	}
}

// setProduct notes what runs the instance. A contradiction leaves it to what is on disk.
func (s *sources) setProduct(p ocis.Product, by string) {
	switch {
	case p == "":
	case s.product == "":
		s.product, s.productBy = p, by
	case s.product != p:
		s.warn("%s is of %s, but %s is of %s", by, p, s.productBy, s.product)
	}
}

// binaryProduct tells by the name of a binary which product it is, e.g. ocis-7.1.0-linux-amd64.
func binaryProduct(path string) ocis.Product {
	name := filepath.Base(path)
	for _, p := range []ocis.Product{ocis.OpenCloud, ocis.OCIS} {
		if rest, ok := strings.CutPrefix(name, string(p)); ok && (rest == "" || rest[0] == '-' || rest[0] == '_' || rest[0] == '.') {
			return p
		}
	}
	return ""
}

func (s *sources) fromUnit(o *Options) error {
	u, err := loadUnit(o.Root, o.Unit)
	if err != nil {
		return err
	}
	for i, name := range u.snapshotNames() {
		if err := s.addPath(name, u.files[i]); err != nil {
			return err
		}
	}
	for _, f := range u.envFiles {
		if err := s.addPath(filepath.Base(f), f); err != nil {
			return err
		}
	}
	s.env.merge(u.env)
	for _, m := range u.maps {
		if filepath.IsAbs(m.Server) && filepath.IsAbs(m.Host) {
			s.maps.add(PathMap{m.Server, filepath.Join(o.Root, m.Host)}, rankMount, u.name)
		}
	}
	s.home = u.home
	if h, ok := u.env.lookup("HOME"); ok {
		s.home = h
	}
	if s.workDir = u.workDir; s.workDir == "" {
		s.workDir = "/"
	}
	if len(u.exec) == 0 {
		s.warn("unit %s starts nothing that could be understood (no ExecStart)", u.name)
		return nil
	}
	bin, p := unitBinary(u.exec)
	switch {
	case p != "":
		s.setProduct(p, "the binary of "+u.name)
		if filepath.IsAbs(bin) {
			if host := s.maps.host(filepath.Clean(bin)); isFile(host) {
				s.soft.Binary = resolve(host)
			} else {
				s.warn("unit %s starts %s, which does not exist", u.name, host)
			}
		}
	case slices.ContainsFunc(u.exec, func(w string) bool {
		b := filepath.Base(w)
		return b == "docker" || b == "podman" || b == "docker-compose"
	}):
		s.warn("unit %s runs containers; give --compose or --container as well, so that their environment and volumes are known", u.name)
	}
	return nil
}

// unitBinary finds the server's binary in a command: its first word, or a word of the shell line.
func unitBinary(words []string) (string, ocis.Product) {
	if p := binaryProduct(words[0]); p != "" {
		return words[0], p
	}
	switch filepath.Base(words[0]) {
	case "sh", "bash", "dash", "env", "nice", "ionice", "setpriv", "runuser", "sudo":
		for _, w := range words[1:] {
			for part := range strings.FieldsSeq(w) {
				if p := binaryProduct(part); p != "" && !strings.Contains(part, "=") && !strings.HasSuffix(part, ".env") {
					return part, p
				}
			}
		}
	}
	return "", ""
}

func (s *sources) fromCompose(ctx context.Context, o *Options, own environment) error {
	p, err := loadCompose(o.Compose, own.lookup)
	if err != nil {
		return err
	}
	svc, err := p.service(o.ComposeService)
	if err != nil {
		return err
	}
	for _, f := range append(slices.Clone(p.files), p.others...) {
		if err := s.addPath(p.snapshotName(f), f); err != nil {
			return err
		}
	}
	s.env.merge(svc.env)
	c := o.docker()
	home, _ := own.lookup("HOME")
	for _, m := range p.maps(ctx, svc, c, o.Root, home) {
		s.maps.add(m, rankMount, "volume of compose service "+svc.name)
	}
	product, _ := svc.role()
	s.setProduct(product, "compose service "+svc.name)
	s.inContainer(svc.workDir)
	s.soft.Image = svc.image
	s.soft.Container = svc.container
	s.imageVersion = imageVersion(svc.image)
	for _, n := range sortedKeys(p.services) {
		if e := p.services[n].env; n != svc.name && isVault(e) {
			s.extra = append(s.extra, e)
		}
	}
	if c == nil {
		return nil
	}
	// The engine knows more, if it runs: which container it is, and the image that was pulled.
	list, err := c.List(ctx, "com.docker.compose.project="+p.name, "com.docker.compose.service="+svc.name)
	if err != nil || len(list) == 0 {
		return context.Cause(ctx)
	}
	if k, err := c.Inspect(ctx, list[0].ID); err == nil {
		s.describe(ctx, c, k)
	}
	return context.Cause(ctx)
}

// inContainer notes that the server runs from an image: its default places are those of the image.
func (s *sources) inContainer(workDir string) {
	s.container = true
	s.home = ""
	if workDir != "" {
		s.workDir = workDir
	}
}

// describe takes from a container what names its software.
func (s *sources) describe(ctx context.Context, c *docker.Client, k *docker.Container) {
	s.soft.Container = k.Name
	if k.Config.Image != "" {
		s.soft.Image = k.Config.Image
	}
	if v := imageVersion(s.soft.Image); v != "" {
		s.imageVersion = v
	}
	img, err := c.InspectImage(ctx, k.ImageID)
	if err != nil {
		s.soft.ImageDigest = k.ImageID
		return
	}
	s.soft.ImageDigest = img.Digest()
	if strings.HasPrefix(s.soft.Image, "sha256:") && len(img.RepoTags) > 0 {
		s.soft.Image = img.RepoTags[0]
	}
	if v := strings.TrimPrefix(img.Config.Labels["org.opencontainers.image.version"], "v"); v != "" {
		s.imageVersion = v
	}
}

func (s *sources) fromContainer(ctx context.Context, o *Options) error {
	c := o.Docker
	if c == nil {
		var err error
		if c, err = docker.New(""); err != nil {
			return err
		}
	}
	k, err := c.Inspect(ctx, o.Container)
	if errors.Is(err, docker.ErrNotFound) {
		return &SettingError{Setting: "--container", Value: o.Container, Problem: "the Docker engine knows no such container",
			Hint: "`docker ps -a` names them."}
	}
	if err != nil {
		return fmt.Errorf("inspect container %s: %w", o.Container, err)
	}
	raw := indentJSON(k.Raw)
	s.addFile("container.json", "", raw)
	env := environment{}
	env.addList(k.Config.Env, "container "+k.Name)
	s.env.merge(env)
	for _, m := range k.Mounts {
		if m.Source != "" && filepath.IsAbs(m.Destination) && (m.Type == "bind" || m.Type == "volume") {
			s.maps.add(PathMap{m.Destination, filepath.Join(o.Root, m.Source)}, rankMount, "mount of container "+k.Name)
		}
	}
	s.inContainer(k.Config.WorkingDir)
	s.describe(ctx, c, k)
	product := imageProduct(s.soft.Image)
	if m := serverCommand.FindStringSubmatch(k.Path + " " + strings.Join(k.Args, " ")); m != nil {
		product = ocis.Product(m[1])
	}
	s.setProduct(product, "container "+k.Name)
	project := k.Config.Labels["com.docker.compose.project"]
	if project == "" {
		return nil
	}
	// A vault is a second process, in a container beside this one.
	list, err := c.List(ctx, "com.docker.compose.project="+project)
	if err != nil {
		return fmt.Errorf("list the containers of project %s: %w", project, err)
	}
	for _, l := range list {
		if l.ID == k.ID || imageProduct(l.Image) == "" {
			continue
		}
		other, err := c.Inspect(ctx, l.ID)
		if errors.Is(err, docker.ErrNotFound) {
			continue // gone meanwhile
		}
		if err != nil {
			return fmt.Errorf("inspect container %s: %w", l.ID, err)
		}
		e := environment{}
		e.addList(other.Config.Env, "container "+other.Name)
		if isVault(e) {
			s.extra = append(s.extra, e)
		}
	}
	return nil
}

// containerID finds the id of a container in the text of /proc/PID/cgroup.
var containerID = regexp.MustCompile(`(?:docker[-/]|/libpod-|crio-|cri-containerd-|/)([0-9a-f]{64})`)

func (s *sources) fromProcess(ctx context.Context, o *Options) error {
	dir := filepath.Join(o.Root, "/proc", strconv.Itoa(o.PID))
	fail := func(err error) error {
		e := &SettingError{Setting: "--pid", Value: strconv.Itoa(o.PID), Problem: "cannot be inspected", Err: withoutPath(err)}
		switch {
		case errors.Is(err, os.ErrNotExist):
			e.Problem, e.Err = "no such process", nil
		case errors.Is(err, os.ErrPermission):
			e.Hint = "Run holdfast as root, or as the user of the process."
		}
		return e
	}
	data, err := os.ReadFile(filepath.Join(dir, "environ"))
	if err != nil {
		return fail(err)
	}
	list := strings.Split(strings.Trim(string(data), "\x00"), "\x00")
	env := environment{}
	env.addList(list, fmt.Sprintf("the environment of process %d", o.PID))
	s.env.merge(env)
	// Who starts the server and the backup from one shell gives it our password, too.
	s.addFile("process.env", "", envText(slices.DeleteFunc(list, func(kv string) bool {
		return strings.HasPrefix(kv, "HOLDFAST_") || strings.HasPrefix(kv, "RESTIC_")
	})))

	exe, err := os.Readlink(filepath.Join(dir, "exe"))
	if err != nil {
		return fail(err)
	}
	exe = strings.TrimSuffix(exe, " (deleted)")
	s.home, _ = env.lookup("HOME")
	if s.workDir, err = os.Readlink(filepath.Join(dir, "cwd")); err != nil {
		return fail(err)
	}
	product := binaryProduct(exe)
	if product == "" {
		if cmd, err := os.ReadFile(filepath.Join(dir, "cmdline")); err == nil {
			if m := serverCommand.FindStringSubmatch(strings.ReplaceAll(string(cmd), "\x00", " ")); m != nil {
				product = ocis.Product(m[1])
			}
		}
	}
	s.setProduct(product, fmt.Sprintf("process %d", o.PID))

	foreign := false
	mine, err1 := os.Readlink(filepath.Join(o.Root, "/proc/self/ns/mnt"))
	theirs, err2 := os.Readlink(filepath.Join(dir, "ns/mnt"))
	if err1 == nil && err2 == nil && mine != theirs {
		foreign = true
		if err := s.mapNamespace(o, dir); err != nil {
			return fail(err)
		}
	} else if r, err := os.Readlink(filepath.Join(dir, "root")); err == nil && r != "/" {
		s.maps.add(PathMap{"/", filepath.Join(o.Root, r)}, rankMount, fmt.Sprintf("root of process %d", o.PID))
	}
	if cg, err := os.ReadFile(filepath.Join(dir, "cgroup")); err == nil {
		if m := containerID.FindSubmatch(cg); m != nil {
			s.inContainer(s.workDir)
			if s.soft.Container == "" {
				s.soft.Container = string(m[1][:12])
				if c := o.docker(); c != nil {
					if k, err := c.Inspect(ctx, string(m[1])); err == nil {
						s.describe(ctx, c, k)
					}
				}
			}
		}
	}
	if product == "" {
		s.warn("process %d runs %s, which is no server by its name; give the binary by --server-binary", o.PID, exe)
	} else if !foreign || s.maps.find(exe) != nil {
		if host := s.maps.host(exe); isFile(host) {
			s.soft.Binary = resolve(host)
		} else {
			s.warn("process %d runs %s, which is not there any more; give the binary by --server-binary", o.PID, exe)
		}
	}
	return context.Cause(ctx)
}

// mapNamespace translates the mounts that a process in another mount namespace sees: the same
// filesystem is looked for among the mounts of this host.
func (s *sources) mapNamespace(o *Options, dir string) error {
	theirs, err := mountinfo.Load(filepath.Join(dir, "mountinfo"))
	if err != nil {
		return err
	}
	host, err := mountinfo.Load(filepath.Join(o.Root, "/proc/self/mountinfo"))
	if err != nil {
		return err
	}
	for _, m := range theirs {
		switch m.Type {
		case "proc", "sysfs", "tmpfs", "devpts", "cgroup", "cgroup2", "mqueue", "overlay", "devtmpfs":
			continue // none of these holds data that outlives the process
		}
		best := -1
		for i, h := range host {
			if h.Device != m.Device || !mountinfo.Below(m.Root, h.Root) {
				continue
			}
			p := filepath.Join(h.Point, strings.TrimPrefix(m.Root, h.Root))
			if top, ok := host.Find(p); !ok || top.ID != h.ID {
				continue // hidden by another mount
			}
			if best < 0 || len(h.Root) > len(host[best].Root) {
				best = i
			}
		}
		if best >= 0 {
			p := filepath.Join(host[best].Point, strings.TrimPrefix(m.Root, host[best].Root))
			s.maps.add(PathMap{m.Point, filepath.Join(o.Root, p)}, rankMount, fmt.Sprintf("mount of process %d", o.PID))
		}
	}
	return nil
}
