package discover

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/holdfast-backup/holdfast/internal/docker"
	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// composeProject is a set of compose files with its .env.
type composeProject struct {
	dir      string
	name     string
	files    []string // compose files in their order
	others   []string // .env and env_file entries
	dotenv   environment
	services map[string]*composeService
	volumes  map[string]composeVolume
}

// composeService is what matters of a service.
type composeService struct {
	name      string
	container string // container_name
	image     string
	command   string // command and entrypoint, joined
	hasCmd    bool
	workDir   string
	env       environment
	volumes   []composeMount
}

type composeMount struct {
	kind           string // bind, volume
	source, target string
}

type composeVolume struct {
	name     string // explicit name; "" is <project>_<key>
	external bool
	device   string // of the local driver with a bind option
}

var composeNames = []string{"compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml"}
var overrideNames = []string{"compose.override.yaml", "compose.override.yml", "docker-compose.override.yaml", "docker-compose.override.yml"}

// loadCompose reads compose files, or a directory that holds them. lookup answers for variables that
// the .env does not set.
//
// Errors: *SettingError.
func loadCompose(paths []string, lookup func(string) (string, bool)) (*composeProject, error) {
	p := &composeProject{dotenv: environment{}, services: map[string]*composeService{}, volumes: map[string]composeVolume{}}
	first, err := filepath.Abs(paths[0])
	if err != nil {
		return nil, err
	}
	p.dir = first
	wholeDir := isDir(first)
	if !wholeDir {
		p.dir = filepath.Dir(first)
	}
	if err := p.readDotenv(lookup); err != nil {
		return nil, err
	}
	find := func(name string) (string, bool) {
		if v, ok := p.dotenv.lookup(name); ok {
			return v, true
		}
		return lookup(name)
	}
	listed := p.listedFiles()
	files := paths
	if wholeDir {
		if files = listed; len(files) == 0 {
			files = p.defaultFiles()
		}
		if len(files) == 0 {
			return nil, &SettingError{Setting: "--compose", Value: paths[0], Problem: "the directory holds no compose file",
				Hint: "Name the compose files one by one."}
		}
	}
	if err := p.readAll(files, find); err != nil {
		return nil, err
	}
	// With COMPOSE_FILE in .env the service often stands in another file than the one named.
	if !wholeDir && len(listed) > 0 && len(p.candidates()) == 0 {
		if err := p.readAll(listed, find); err != nil {
			return nil, err
		}
	}
	if p.name == "" {
		p.name, _ = find("COMPOSE_PROJECT_NAME")
	}
	if p.name == "" {
		p.name = projectName(filepath.Base(p.dir))
	}
	return p, nil
}

// projectName makes a project name of a directory's name, as compose does.
func projectName(s string) string {
	s = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '_' || r == '-' {
			return r
		}
		return -1
	}, strings.ToLower(s))
	return strings.TrimLeft(s, "_-")
}

func (p *composeProject) readDotenv(lookup func(string) (string, bool)) error {
	path := filepath.Join(p.dir, ".env")
	data, err := readLimited(path, yamlLimit)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return readError("environment of the compose files", path, err)
	}
	vars, err := parseDotenv(cleanText(data), lookup)
	if err != nil {
		return &SettingError{Setting: "environment of the compose files", File: path, Problem: "cannot be understood", Err: err}
	}
	p.dotenv.add(vars, path)
	p.others = append(p.others, path)
	return nil
}

// listedFiles are the files of COMPOSE_FILE in .env.
func (p *composeProject) listedFiles() []string {
	list, _ := p.dotenv.lookup("COMPOSE_FILE")
	sep, ok := p.dotenv.lookup("COMPOSE_PATH_SEPARATOR")
	if !ok || sep == "" {
		sep = ":"
	}
	var files []string
	for f := range strings.SplitSeq(list, sep) {
		if f = strings.TrimSpace(f); f != "" {
			files = append(files, p.path(f))
		}
	}
	return files
}

func (p *composeProject) defaultFiles() []string {
	for _, n := range composeNames {
		if f := filepath.Join(p.dir, n); isFile(f) {
			files := []string{f}
			for _, o := range overrideNames {
				if f := filepath.Join(p.dir, o); isFile(f) {
					return append(files, f)
				}
			}
			return files
		}
	}
	return nil
}

// path makes a path of a compose file absolute: relative ones begin at the project's directory.
func (p *composeProject) path(s string) string {
	if filepath.IsAbs(s) {
		return filepath.Clean(s)
	}
	return filepath.Join(p.dir, s)
}

// maxInclude bounds how deep compose files may include others.
const maxInclude = 16

func (p *composeProject) readAll(files []string, find func(string) (string, bool)) error {
	for _, f := range files {
		full, err := filepath.Abs(f)
		if err != nil {
			return err
		}
		if err := p.readFile(full, find, 0); err != nil {
			return err
		}
	}
	return nil
}

func (p *composeProject) readFile(path string, find func(string) (string, bool), depth int) error {
	if slices.Contains(p.files, path) {
		return nil
	}
	fail := func(err error) error {
		return &SettingError{Setting: "compose file", File: path, Problem: "cannot be read", Err: withoutPath(err)}
	}
	if depth > maxInclude {
		return fail(errors.New("files include one another without end"))
	}
	data, err := readLimited(path, yamlLimit)
	if err != nil {
		return fail(err)
	}
	d, err := parseDocument(data)
	if err != nil {
		return fail(err)
	}
	tree, err := expandTree(d.tree, find)
	if err != nil {
		return &SettingError{Setting: "compose file", File: path, Problem: "cannot be resolved", Err: err,
			Hint: "Put the variable into the .env beside the compose file."}
	}
	for _, in := range asList(asMap(tree)["include"]) {
		names := asStrings(in)
		if m := asMap(in); m != nil {
			names = asStrings(m["path"])
		}
		for _, n := range names {
			if err := p.readFile(p.path(n), find, depth+1); err != nil {
				return err
			}
		}
	}
	p.files = append(p.files, path)
	top := asMap(tree)
	if n, ok := scalar(top["name"]); ok && n != "" {
		p.name = n
	}
	for key, v := range asMap(top["volumes"]) {
		m := asMap(v)
		vol := p.volumes[key]
		if n, ok := scalar(m["name"]); ok {
			vol.name = n
		}
		if e, ok := scalar(m["external"]); ok {
			vol.external = e == "true"
		} else if em := asMap(m["external"]); em != nil {
			vol.external = true
			if n, ok := scalar(em["name"]); ok {
				vol.name = n
			}
		}
		if o := asMap(m["driver_opts"]); o != nil {
			opts, _ := scalar(o["o"])
			kind, _ := scalar(o["type"])
			if dev, ok := scalar(o["device"]); ok && (strings.Contains(opts, "bind") || kind == "none") {
				vol.device = dev
			}
		}
		p.volumes[key] = vol
	}
	services := asMap(top["services"])
	for _, name := range sortedKeys(services) {
		var node *yaml.Node
		if n := childNode(childNode(d.root, "services"), name); n != nil {
			node = childNode(n, "environment")
		}
		if err := p.readService(name, asMap(services[name]), path, node, find, depth); err != nil {
			return err
		}
	}
	return nil
}

func (p *composeProject) readService(name string, m map[string]any, file string, envNode *yaml.Node, find func(string) (string, bool), depth int) error {
	s := p.services[name]
	if s == nil {
		s = &composeService{name: name, env: environment{}}
		p.services[name] = s
	}
	if err := p.extend(s, m, file, find, depth); err != nil {
		return err
	}
	set := func(dst *string, key string) {
		if v, ok := scalar(m[key]); ok {
			*dst = v
		}
	}
	set(&s.image, "image")
	set(&s.container, "container_name")
	set(&s.workDir, "working_dir")
	entry, cmd := strings.Join(asStrings(m["entrypoint"]), " "), strings.Join(asStrings(m["command"]), " ")
	if entry != "" || cmd != "" {
		s.command, s.hasCmd = strings.TrimSpace(entry+" "+cmd), true
	}
	fileEnv := environment{}
	for _, e := range envFileEntries(m["env_file"]) {
		path := p.path(e.path)
		data, err := readLimited(path, yamlLimit)
		if errors.Is(err, os.ErrNotExist) && e.optional {
			continue
		}
		var vars []Var
		if err == nil {
			if e.raw {
				vars = parseDockerEnv(cleanText(data), find)
			} else {
				vars, err = parseDotenv(cleanText(data), find)
			}
		}
		if err != nil {
			return &SettingError{Setting: "env_file of service " + name, File: file, Value: path, Problem: "cannot be read", Err: withoutPath(err)}
		}
		fileEnv.add(vars, path)
		if !slices.Contains(p.others, path) {
			p.others = append(p.others, path)
		}
	}
	for k, v := range fileEnv {
		// What stands under environment wins against files, also against those of a later compose file.
		if old, ok := s.env[k]; !ok || !slices.Contains(p.files, old.file) && old.file != file {
			s.env[k] = v
		}
	}
	for k, v := range environmentEntries(m["environment"], find) {
		line := 0
		if n := childNode(envNode, k); n != nil {
			line = n.Line
		}
		s.env[k] = envValue{v, file, line}
	}
	for _, v := range asList(m["volumes"]) {
		mount, ok := parseMount(v)
		if !ok {
			continue
		}
		s.volumes = slices.DeleteFunc(s.volumes, func(o composeMount) bool { return o.target == mount.target })
		s.volumes = append(s.volumes, mount)
	}
	return nil
}

// extend takes over the service that this one extends.
func (p *composeProject) extend(s *composeService, m map[string]any, file string, find func(string) (string, bool), depth int) error {
	e, ok := m["extends"]
	if !ok {
		return nil
	}
	other, _ := scalar(e)
	from := file
	if em := asMap(e); em != nil {
		other, _ = scalar(em["service"])
		if f, ok := scalar(em["file"]); ok && f != "" {
			if from = f; !filepath.IsAbs(f) {
				from = filepath.Join(filepath.Dir(file), f)
			}
		}
	}
	if depth > maxInclude {
		return &SettingError{Setting: "service " + s.name, File: file, Problem: "extends other services without end"}
	}
	data, err := readLimited(from, yamlLimit)
	if err != nil {
		return &SettingError{Setting: "extends of service " + s.name, File: file, Value: from, Problem: "cannot be read", Err: withoutPath(err)}
	}
	d, err := parseDocument(data)
	if err != nil {
		return &SettingError{Setting: "extends of service " + s.name, File: file, Value: from, Problem: "cannot be read", Err: err}
	}
	tree, err := expandTree(d.tree, find)
	if err != nil {
		return &SettingError{Setting: "compose file", File: from, Problem: "cannot be resolved", Err: err}
	}
	base := asMap(asMap(asMap(tree)["services"])[other])
	if base == nil {
		return &SettingError{Setting: "extends of service " + s.name, File: file, Value: other, Problem: "no such service in " + from}
	}
	if from != file && !slices.Contains(p.others, from) && !slices.Contains(p.files, from) {
		p.others = append(p.others, from)
	}
	return p.readService(s.name, base, from, nil, find, depth+1)
}

type envFileEntry struct {
	path          string
	optional, raw bool
}

func envFileEntries(v any) []envFileEntry {
	var list []envFileEntry
	items := asList(v)
	if s, ok := scalar(v); ok {
		items = []any{s}
	}
	for _, it := range items {
		if s, ok := scalar(it); ok {
			list = append(list, envFileEntry{path: s})
			continue
		}
		m := asMap(it)
		path, _ := scalar(m["path"])
		required, _ := scalar(m["required"])
		format, _ := scalar(m["format"])
		if path != "" {
			list = append(list, envFileEntry{path, required == "false", format == "raw"})
		}
	}
	return list
}

// environmentEntries reads both forms of environment. A name without a value is handed on from the
// environment of compose, if it is set there.
func environmentEntries(v any, find func(string) (string, bool)) map[string]string {
	out := map[string]string{}
	put := func(k string, v any) {
		if v == nil {
			if s, ok := find(k); ok {
				out[k] = s
			}
			return
		}
		if s, ok := scalar(v); ok {
			out[k] = s
		}
	}
	for k, v := range asMap(v) {
		put(k, v)
	}
	for _, it := range asList(v) {
		s, _ := scalar(it)
		if k, val, ok := strings.Cut(s, "="); ok {
			put(k, val)
		} else if s != "" {
			put(s, nil)
		}
	}
	return out
}

// parseMount reads both forms of a volume entry. A short one without a source is anonymous.
func parseMount(v any) (composeMount, bool) {
	if m := asMap(v); m != nil {
		var c composeMount
		c.kind, _ = scalar(m["type"])
		c.source, _ = scalar(m["source"])
		c.target, _ = scalar(m["target"])
		return c, c.target != "" && c.source != "" && (c.kind == "bind" || c.kind == "volume")
	}
	s, ok := scalar(v)
	if !ok {
		return composeMount{}, false
	}
	parts := strings.Split(s, ":")
	if len(parts) < 2 || parts[0] == "" || !filepath.IsAbs(parts[1]) {
		return composeMount{}, false
	}
	kind := "volume"
	if c := parts[0][0]; c == '/' || c == '.' || c == '~' {
		kind = "bind"
	}
	return composeMount{kind, parts[0], filepath.Clean(parts[1])}, true
}

// productImage finds the product's name in the last part of an image's name.
var productImage = regexp.MustCompile(`^(ocis|opencloud)(-rolling|-daily|-dev|-production)?$`)

// serverCommand finds the product's server in a command line, and the single service it runs, if so.
var serverCommand = regexp.MustCompile(`(?:^|[\s/"';&|])(ocis|opencloud)\s+(?:([a-z][a-z0-9-]*)\s+)?server(?:$|[\s"';&|])`)

// imageProduct tells which product an image holds; "" if none.
func imageProduct(image string) ocis.Product {
	image, _, _ = strings.Cut(image, "@")
	name := image[strings.LastIndexByte(image, '/')+1:]
	name, _, _ = strings.Cut(name, ":")
	if m := productImage.FindStringSubmatch(name); m != nil {
		return ocis.Product(m[1])
	}
	return ""
}

// imageVersion is the tag of an image if it reads like a version.
func imageVersion(image string) string {
	image, _, _ = strings.Cut(image, "@")
	name := image[strings.LastIndexByte(image, '/')+1:]
	_, tag, _ := strings.Cut(name, ":")
	if v := strings.TrimPrefix(tag, "v"); v != "" && v[0] >= '0' && v[0] <= '9' {
		return v
	}
	return ""
}

// product and part of a service: part is "" for the whole server, else the one service it runs.
func (s *composeService) role() (product ocis.Product, part string) {
	product = imageProduct(s.image)
	if m := serverCommand.FindStringSubmatch(s.command); m != nil {
		return ocis.Product(m[1]), m[2]
	}
	if s.hasCmd && product != "" && !strings.Contains(s.command, "server") {
		return "", "" // a helper that happens to use the image
	}
	return product, ""
}

// candidates are the services that run a whole server, sorted.
func (p *composeProject) candidates() []string {
	var names []string
	for n, s := range p.services {
		if product, part := s.role(); product != "" && part == "" && !isVault(s.env) {
			names = append(names, n)
		}
	}
	sort.Strings(names)
	return names
}

// isVault tells whether an environment is that of a vault's storage-users process.
func isVault(e environment) bool {
	v, _ := e.lookup("STORAGE_USERS_ENABLE_VAULT_MODE")
	return isTrue(v)
}

func isTrue(s string) bool {
	switch strings.ToLower(strings.TrimSpace(s)) {
	case "1", "t", "true", "yes", "on":
		return true
	}
	return false
}

// service picks the service that runs the server.
//
// Errors: *SettingError, *AmbiguousError.
func (p *composeProject) service(name string) (*composeService, error) {
	if name != "" {
		if s := p.services[name]; s != nil {
			return s, nil
		}
		return nil, &SettingError{Setting: "--compose-service", Value: name, Problem: "no such service in " + strings.Join(p.files, ", "),
			Hint: "The services are: " + strings.Join(sortedKeys(p.services), ", ") + "."}
	}
	c := p.candidates()
	switch len(c) {
	case 1:
		return p.services[c[0]], nil
	case 0:
		return nil, &SettingError{Setting: "--compose", Value: strings.Join(p.files, ","),
			Problem: "no service there runs ocis or opencloud (services: " + strings.Join(sortedKeys(p.services), ", ") + ")",
			Hint:    "Name all compose files, or the directory; or name the service by --compose-service."}
	}
	return nil, &AmbiguousError{What: "compose service that runs a server", Choices: c, Hint: "Choose one by --compose-service."}
}

// maps translates the volumes of a service to paths on this host.
func (p *composeProject) maps(ctx context.Context, s *composeService, c *docker.Client, root, home string) []PathMap {
	var list []PathMap
	for _, m := range s.volumes {
		src := m.source
		if m.kind == "bind" {
			switch {
			case src == "~" || strings.HasPrefix(src, "~/"):
				src = filepath.Join(home, src[1:])
			case filepath.IsAbs(src):
				src = filepath.Join(root, src)
			default:
				src = p.path(src)
			}
		} else {
			src = p.volumePath(ctx, src, c, root)
		}
		list = append(list, PathMap{m.target, src})
	}
	return list
}

// volumePath finds the directory of a named volume: the engine knows it; without one its usual place
// is taken.
func (p *composeProject) volumePath(ctx context.Context, key string, c *docker.Client, root string) string {
	v := p.volumes[key]
	if filepath.IsAbs(v.device) {
		return filepath.Join(root, v.device)
	}
	name := v.name
	switch {
	case name != "":
	case v.external:
		name = key
	default:
		name = p.name + "_" + key
	}
	if c != nil {
		if vol, err := c.InspectVolume(ctx, name); err == nil && vol.Mountpoint != "" {
			return filepath.Join(root, vol.Mountpoint)
		}
	}
	return filepath.Join(root, "/var/lib/docker/volumes", name, "_data")
}

// snapshotName is the name of a file of the project below /config/environment.
func (p *composeProject) snapshotName(path string) string {
	rel, err := filepath.Rel(p.dir, path)
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		rel = filepath.Base(path)
	}
	return "compose/" + rel
}

// expandTree expands the variables in all strings of a YAML tree, but not in its keys.
func expandTree(v any, find func(string) (string, bool)) (any, error) {
	switch x := v.(type) {
	case string:
		return expand(x, find)
	case map[string]any:
		out := make(map[string]any, len(x))
		for k, e := range x {
			r, err := expandTree(e, find)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", k, err)
			}
			out[k] = r
		}
		return out, nil
	case []any:
		out := make([]any, len(x))
		for i, e := range x {
			r, err := expandTree(e, find)
			if err != nil {
				return nil, err
			}
			out[i] = r
		}
		return out, nil
	}
	return v, nil
}

func asMap(v any) map[string]any {
	m, _ := v.(map[string]any)
	return m
}

func asList(v any) []any {
	l, _ := v.([]any)
	return l
}

// asStrings takes a string or a list of them.
func asStrings(v any) []string {
	if s, ok := scalar(v); ok {
		return []string{s}
	}
	var out []string
	for _, e := range asList(v) {
		if s, ok := scalar(e); ok {
			out = append(out, s)
		}
	}
	return out
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}
