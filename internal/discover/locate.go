package discover

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/mountinfo"
	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// place is a directory under both of its names.
type place struct {
	server string // as the server sees it
	host   string // on this host, symbolic links resolved
	// setting tells for people what put it there; "" is a default.
	setting string
	// err makes an error about it.
	err func(problem, hint string) error
}

// location is where an instance lies.
type location struct {
	product      ocis.Product
	base, config place
}

var products = []ocis.Product{ocis.OCIS, ocis.OpenCloud}

// markers are entries of a base data path that only an instance has.
var markers = []string{
	"storage/users", "storage/metadata", "idm/ocis.boltdb", "idm/idm.boltdb", "nats/jetstream", "idp/private-key.pem",
	"search/bleve",
}

// marked tells whether a directory looks like a base data path.
func marked(dir string) bool {
	return slices.ContainsFunc(markers, func(m string) bool {
		ok, _ := exists(filepath.Join(dir, m))
		return ok
	})
}

// hasMainYAML tells whether a directory holds the main configuration file of a product.
func hasMainYAML(dir string, p ocis.Product) bool {
	return isFile(filepath.Join(dir, mainName(p)+".yaml"))
}

// defaults are the places of a product, those below a home directory first.
func (s *sources) defaults(p ocis.Product) []location {
	var list []location
	if s.home != "" && filepath.IsAbs(s.home) && !s.container {
		b := filepath.Join(s.home, "."+string(p))
		list = append(list, location{p, s.serverPlace(b, ""), s.serverPlace(filepath.Join(b, "config"), "")})
	}
	return append(list, location{p, s.serverPlace("/var/lib/"+string(p), ""), s.serverPlace("/etc/"+string(p), "")})
}

// serverPlace translates a path of the server.
func (s *sources) serverPlace(path, setting string) place {
	path = filepath.Clean(path)
	host := s.maps.host(path)
	return place{server: path, host: resolve(host), setting: setting, err: func(problem, hint string) error {
		name := setting
		if name == "" {
			name = "default path"
		}
		return &SettingError{Setting: name, Value: host, Problem: problem, Hint: hint}
	}}
}

// absolute makes a path from the configuration absolute. Relative ones begin where the server runs.
func (s *sources) absolute(v value) (string, error) {
	p := v.text
	if rest, ok := strings.CutPrefix(p, "~/"); ok && s.home != "" {
		p = filepath.Join(s.home, rest)
	}
	if filepath.IsAbs(p) {
		return filepath.Clean(p), nil
	}
	if s.workDir == "" {
		return "", v.fail("the path is relative, and it is not known where the server runs",
			"Give the process by --pid or the unit by --unit, or write an absolute path.")
	}
	return filepath.Join(s.workDir, p), nil
}

// valuePlace is the place that a setting names.
func (s *sources) valuePlace(v value) (place, error) {
	path, err := s.absolute(v)
	if err != nil {
		return place{}, err
	}
	p := s.serverPlace(path, v.where())
	host := s.maps.host(path)
	p.err = func(problem, hint string) error {
		e := v.fail(problem, hint)
		if host != path {
			e.Problem = fmt.Sprintf("%s (on this host: %s)", problem, host)
		}
		return e
	}
	return p, nil
}

// flagPlace is the place that a flag names: a path of this host, or one of the server if --map has it.
func (s *sources) flagPlace(flag, path string) (place, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return place{}, &SettingError{Setting: flag, Value: path, Problem: "is no path", Err: err}
	}
	p := place{server: abs, host: resolve(abs), setting: flag}
	if e := s.maps.find(abs); e != nil && e.rank == rankFlag {
		p.host = resolve(s.maps.host(abs))
	}
	p.err = func(problem, hint string) error {
		return &SettingError{Setting: flag, Value: path, Problem: problem, Hint: hint}
	}
	return p, nil
}

// envPath reads a base-path variable, for which empty counts as unset.
func (s *sources) envPath(p ocis.Product, name string) (value, bool) {
	key := envPrefix(p) + name
	e, ok := s.env[key]
	if !ok || e.value == "" {
		return value{}, false
	}
	return value{text: e.value, set: true, setting: key, file: e.file, line: e.line}, true
}

const chooseHint = "Choose one by --base-data-path and --config-dir, or by --unit, --container, --compose, --pid or --env-file."

// locate finds the base data path, the configuration directory and the product.
//
// Errors: *SettingError, *NoInstanceError, *AmbiguousError.
func (s *sources) locate(o *Options) (*location, error) {
	loc, err := s.locateBase(o)
	if err != nil {
		return nil, err
	}
	if o.BaseDataPath != "" {
		s.maps.add(PathMap{loc.base.server, loc.base.host}, rankBase, loc.base.setting)
		s.mapConfigured("_BASE_DATA_PATH", "/var/lib/", loc.base.host, &loc.base)
	}
	configs, err := s.configChoices(o, loc)
	if err != nil {
		return nil, err
	}
	s.decideProduct(loc, configs)
	for _, c := range configs {
		if c.product == loc.product {
			loc.config = c.place
			break
		}
	}
	if o.BaseDataPath != "" && loc.config.setting == "" && hasMainYAML(loc.config.host, loc.product) && !mountinfo.Below(loc.config.host, loc.base.host) {
		s.warn("no configuration directory was given; %s is taken, the default place: give --config-dir if it belongs to another instance", loc.config.host)
	}
	if o.ConfigDir != "" {
		s.maps.add(PathMap{loc.config.server, loc.config.host}, rankBase, loc.config.setting)
		s.mapConfigured("_CONFIG_DIR", "/etc/", loc.config.host, &loc.config)
	}
	return loc, nil
}

// mapConfigured makes the configured name of a directory that was given by a flag lead there. Of a
// container that is the place in its image, if nothing is configured.
func (s *sources) mapConfigured(variable, imageDir, host string, p *place) {
	for _, prod := range products {
		if s.product != "" && prod != s.product {
			continue
		}
		server := ""
		if v, ok := s.envPath(prod, variable); ok && filepath.IsAbs(v.text) {
			server = filepath.Clean(v.text)
		} else if s.container && s.product == prod {
			server = imageDir + string(prod)
		}
		if server == "" || server == p.server {
			continue
		}
		s.maps.add(PathMap{server, host}, rankBase, p.setting)
		p.server = server
		return
	}
}

// unmountedHint is for a directory that the user named.
const unmountedHint = "Is the path right, and its disk mounted? Without the flag, the places are searched where the products keep their data."

func (s *sources) locateBase(o *Options) (*location, error) {
	if o.BaseDataPath != "" {
		p, err := s.flagPlace("--base-data-path", o.BaseDataPath)
		if err != nil {
			return nil, err
		}
		if !isDir(p.host) {
			return nil, p.err("no such directory", unmountedHint)
		}
		return &location{base: p}, nil
	}
	var set []value
	for _, p := range products {
		if v, ok := s.envPath(p, "_BASE_DATA_PATH"); ok && (s.product == "" || s.product == p) {
			set = append(set, v)
		}
	}
	if len(set) == 2 && set[0].text != set[1].text {
		return nil, &AmbiguousError{What: "base data path", Choices: []string{set[0].where() + ": " + set[0].text, set[1].where() + ": " + set[1].text},
			Hint: chooseHint}
	}
	if len(set) > 0 {
		p, err := s.valuePlace(set[0])
		if err != nil {
			return nil, err
		}
		if !isDir(p.host) {
			return nil, p.err("no such directory", "If the server runs in a container, name its place on this host: --map "+p.server+"=/path/on/this/host.")
		}
		return &location{base: p}, nil
	}
	return s.locateDefault(o)
}

// locateDefault looks into the default places of the products that are possible.
func (s *sources) locateDefault(o *Options) (*location, error) {
	possible := products
	if p := s.productByVariables(); s.product != "" {
		possible = []ocis.Product{s.product}
	} else if p != "" {
		possible = []ocis.Product{p}
	}
	var found []location
	var looked []string
	for _, p := range possible {
		for _, l := range s.defaults(p) {
			looked = append(looked, l.base.host)
			if marked(l.base.host) && !slices.ContainsFunc(found, func(f location) bool { return f.base.host == l.base.host }) {
				found = append(found, l)
			}
		}
	}
	if len(found) > 1 && o.ConfigDir != "" {
		// The configuration directory may belong to one of them alone.
		if c, err := s.flagPlace("--config-dir", o.ConfigDir); err == nil {
			var fit []location
			for _, f := range found {
				if f.config.host == c.host || hasMainYAML(c.host, f.product) {
					fit = append(fit, f)
				}
			}
			if len(fit) == 1 {
				found = fit
			}
		}
	}
	switch len(found) {
	case 1:
		return &found[0], nil
	case 0:
		hint := "Give --base-data-path and --config-dir, or what runs the server: --unit, --container, --compose, --pid or --env-file."
		if s.given {
			hint = "If the server sees its data under another path than this host, give --map SERVER=HOST; otherwise --base-data-path."
		}
		return nil, &NoInstanceError{Problem: "found no instance of Infinite Scale or OpenCloud", Looked: looked, Hint: hint}
	}
	choices := make([]string, len(found))
	for i, f := range found {
		choices[i] = fmt.Sprintf("%s in %s", f.product, f.base.host)
	}
	return nil, &AmbiguousError{What: "instance", Choices: choices, Hint: chooseHint}
}

// productByVariables tells the product if the environment names the variables of one product alone.
func (s *sources) productByVariables() ocis.Product {
	seen := map[ocis.Product]bool{}
	for k := range s.env {
		for _, p := range products {
			seen[p] = seen[p] || strings.HasPrefix(k, envPrefix(p)+"_")
		}
	}
	switch {
	case seen[ocis.OCIS] == seen[ocis.OpenCloud]:
		return ""
	case seen[ocis.OCIS]:
		return ocis.OCIS
	}
	return ocis.OpenCloud
}

// configChoice is a configuration directory that is right if the instance is of product.
type configChoice struct {
	product ocis.Product
	place   place
}

// configChoices lists for each product the one configuration directory it would have.
func (s *sources) configChoices(o *Options, loc *location) ([]configChoice, error) {
	var list []configChoice
	for _, p := range products {
		c, err := s.configOf(o, p, loc)
		if err != nil {
			return nil, err
		}
		list = append(list, configChoice{p, c})
	}
	return list, nil
}

func (s *sources) configOf(o *Options, p ocis.Product, loc *location) (place, error) {
	if o.ConfigDir != "" {
		c, err := s.flagPlace("--config-dir", o.ConfigDir)
		if err == nil && !isDir(c.host) {
			err = c.err("no such directory", unmountedHint)
		}
		return c, err
	}
	if v, ok := s.envPath(p, "_CONFIG_DIR"); ok && (s.product == "" || s.product == p) {
		c, err := s.valuePlace(v)
		if err == nil && !isDir(c.host) {
			err = c.err("no such directory", "If the server runs in a container, name its place on this host: --map "+c.server+"=/path/on/this/host.")
		}
		return c, err
	}
	if loc.config.host != "" && loc.product == p {
		// A default base has its own configuration directory beside or in it.
		if hasMainYAML(loc.config.host, p) || isDir(loc.config.host) {
			return loc.config, nil
		}
	}
	var choices []place
	if !s.container {
		inside := filepath.Join(loc.base.server, "config")
		choices = append(choices, s.serverPlace(inside, ""))
	}
	for _, d := range s.defaults(p) {
		choices = append(choices, d.config)
	}
	for _, c := range choices {
		if hasMainYAML(c.host, p) {
			return c, nil
		}
	}
	return choices[len(choices)-1], nil
}

// decideProduct tells the product: by what runs it, then by what is on disk, then by the variables.
func (s *sources) decideProduct(loc *location, configs []configChoice) {
	disk, by := productOnDisk(loc.base.host, configs)
	byVars := s.productByVariables()
	switch {
	case s.product != "":
		loc.product = s.product
		if disk != "" && disk != s.product {
			s.warn("%s runs %s, but %s is of %s", s.productBy, s.product, by, disk)
		}
	case disk != "":
		if byVars != "" && byVars != disk {
			s.warn("the environment has variables of %s (%s_...), but %s is of %s, and its names are used", byVars, envPrefix(byVars), by, disk)
		}
		loc.product = disk
	case byVars != "":
		loc.product = byVars
	case loc.product == "":
		loc.product = ocis.OCIS
		s.warn("neither the data in %s nor a configuration file tells the product; taken for %s", loc.base.host, loc.product)
	}
}

// productOnDisk tests what the two products name differently.
func productOnDisk(base string, configs []configChoice) (p ocis.Product, by string) {
	for _, f := range []struct {
		name string
		p    ocis.Product
	}{{"idm/idm.boltdb", ocis.OpenCloud}, {"idm/ocis.boltdb", ocis.OCIS}} {
		if path := filepath.Join(base, f.name); isFile(path) {
			return f.p, path
		}
	}
	for _, p := range []ocis.Product{ocis.OpenCloud, ocis.OCIS} {
		for _, c := range configs {
			if c.product == p && hasMainYAML(c.place.host, p) {
				return p, filepath.Join(c.place.host, mainName(p)+".yaml")
			}
		}
	}
	root := filepath.Join(base, "storage", "metadata")
	switch prefix := probePrefix(root); prefix {
	case "user.oc.", "oc.":
		return ocis.OpenCloud, root
	case "user.ocis.", "ocis.":
		return ocis.OCIS, root
	}
	return "", ""
}
