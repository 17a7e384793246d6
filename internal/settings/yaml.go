package settings

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sort"
	"strings"

	"go.yaml.in/yaml/v3"
)

// YAML is one settings file: keys for all verbs, and a section for each verb that needs its own.
//
//	repository: /srv/backup
//	backup:
//	  exclude-thumbnails: true
type YAML struct {
	Path     string
	general  map[string]entry
	sections map[string]map[string]entry
}

type entry struct {
	values []string
	line   int
}

// maxFile bounds what is read as a settings file, in bytes; a real one has a few hundred.
const maxFile = 1 << 20

// ReadFile reads and parses a file. flags tells which flags each verb has.
//
// Errors: fs.ErrNotExist; what Parse returns.
func ReadFile(path string, flags map[string][]string) (*YAML, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read the settings: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("cannot read the settings: %w", err)
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("cannot read the settings: %s has more than %d bytes", path, maxFile)
	}
	return Parse(path, data, flags)
}

// Parse reads settings. flags tells which flags each verb has; the verb of a subcommand is
// written with a space ("key add").
//
// Errors: all keys that no verb knows, keys given twice, and values of a wrong shape, each with
// its line. Whether a value fits is seen by Apply.
func Parse(path string, data []byte, flags map[string][]string) (*YAML, error) {
	y := &YAML{Path: path, general: map[string]entry{}, sections: map[string]map[string]entry{}}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return y, nil
	} else if err != nil {
		return nil, fmt.Errorf("%s: %s", path, strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: more than one document in the file", path)
	}
	p := parser{y: y, flags: flags, all: map[string]bool{}}
	for _, names := range flags {
		for _, f := range names {
			if !notInFile[f] {
				p.all[Key(f)] = true
			}
		}
	}
	if len(doc.Content) == 1 {
		p.top(doc.Content[0])
	}
	return y, errors.Join(p.errs...)
}

func (y *YAML) get(verb, key string) (entry, bool) {
	if e, ok := y.sections[verb][key]; ok {
		return e, true
	}
	e, ok := y.general[key]
	return e, ok
}

type parser struct {
	y     *YAML
	flags map[string][]string
	all   map[string]bool
	errs  []error
}

func (p *parser) fail(n *yaml.Node, format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf("%s:%d: %s", p.y.Path, n.Line, fmt.Sprintf(format, args...)))
}

func (p *parser) top(n *yaml.Node) {
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return
	}
	p.pairs(n, p.y.general, func(k, v *yaml.Node) bool {
		own, isVerb := p.flags[k.Value]
		if !isVerb || v.Kind != yaml.MappingNode {
			return false
		}
		known := map[string]bool{}
		for _, f := range own {
			if !notInFile[f] {
				known[Key(f)] = true
			}
		}
		if p.y.sections[k.Value] != nil {
			p.fail(k, "section %q stands twice", k.Value)
			return true
		}
		section := map[string]entry{}
		p.y.sections[k.Value] = section
		p.pairs(v, section, nil, known)
		return true
	}, p.all)
}

// pairs reads a mapping into dst. special may take a pair for itself.
func (p *parser) pairs(n *yaml.Node, dst map[string]entry, special func(k, v *yaml.Node) bool, known map[string]bool) {
	if n.Kind != yaml.MappingNode {
		p.fail(n, "a mapping (key: value) is wanted here")
		return
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		for v.Kind == yaml.AliasNode {
			v = v.Alias
		}
		if special != nil && special(k, v) {
			continue
		}
		if !known[k.Value] {
			p.fail(k, "unknown key %q%s", k.Value, p.meant(k.Value, known))
			continue
		}
		if _, twice := dst[k.Value]; twice {
			p.fail(k, "key %q stands twice", k.Value)
			continue
		}
		if vals, ok := p.values(k.Value, v); ok {
			dst[k.Value] = entry{vals, k.Line}
		}
	}
}

func (p *parser) values(key string, v *yaml.Node) ([]string, bool) {
	switch {
	case v.Kind == yaml.ScalarNode && v.Tag != "!!null":
		return []string{v.Value}, true
	case v.Kind == yaml.SequenceNode:
		var out []string
		for _, e := range v.Content {
			for e.Kind == yaml.AliasNode {
				e = e.Alias
			}
			if e.Kind != yaml.ScalarNode || e.Tag == "!!null" {
				p.fail(e, "key %q: a list of plain values is wanted", key)
				return nil, false
			}
			out = append(out, e.Value)
		}
		return out, true
	}
	p.fail(v, "key %q has no value that can be used here", key)
	return nil, false
}

// meant helps with a misspelt key, and with the one secret that people look for a key for.
func (p *parser) meant(key string, known map[string]bool) string {
	if key == "password" {
		return " (a password does not belong in this file: use password-file or password-command)"
	}
	if key == repoFlag && known["repository"] {
		return ` (did you mean "repository"?)`
	}
	norm := func(s string) string { return strings.NewReplacer("_", "", "-", "").Replace(strings.ToLower(s)) }
	var best []string
	for k := range known {
		if a, b := norm(k), norm(key); a == b || near(a, b) {
			best = append(best, k)
		}
	}
	if len(best) == 0 {
		return ""
	}
	sort.Strings(best)
	return fmt.Sprintf(" (did you mean %q?)", best[0])
}

// near reports whether one edit makes a into b: a character more, less, changed, or two swapped.
func near(a, b string) bool {
	if len(a) > len(b) {
		a, b = b, a
	}
	i := 0
	for i < len(a) && a[i] == b[i] {
		i++
	}
	switch len(b) - len(a) {
	case 0:
		return i == len(a) || a[i+1:] == b[i+1:] ||
			i+1 < len(a) && a[i] == b[i+1] && a[i+1] == b[i] && a[i+2:] == b[i+2:]
	case 1:
		return a[i:] == b[i+1:]
	}
	return false
}
