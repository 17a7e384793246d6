package discover

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// envValue is one variable with the place it comes from.
type envValue struct {
	value string
	file  string // for people: a path, or "container ocis"
	line  int
}

type environment map[string]envValue

func (e environment) lookup(name string) (string, bool) {
	v, ok := e[name]
	return v.value, ok
}

func (e environment) add(vars []Var, file string) {
	for _, v := range vars {
		e[v.Name] = envValue{v.Value, file, v.Line}
	}
}

func (e environment) addList(list []string, file string) {
	for _, kv := range list {
		if k, v, ok := strings.Cut(kv, "="); ok && k != "" {
			e[k] = envValue{v, file, 0}
		}
	}
}

// merge puts o over e.
func (e environment) merge(o environment) {
	for k, v := range o {
		e[k] = v
	}
}

// field is one setting of the product: where its value can come from. Later places win: top-level
// keys of the main YAML, the service's section there, the service's own YAML, variables.
type field struct {
	service string   // with dashes, as in <service>.yaml; "" has top-level keys alone
	keys    []string // YAML keys below the service's section, with dots; later wins
	global  []string // keys at the top of the main YAML
	env     []string // left to right, the last one that is set wins; {P} is OCIS or OC
	list    bool     // comma separated in variables, a sequence in YAML
}

// value is what a field is set to.
type value struct {
	text string
	list []string
	set  bool // by anything but the default
	// setting, file and line tell what set it.
	setting string
	file    string
	line    int
}

// where says for people what set the value.
func (v value) where() string {
	switch {
	case !v.set:
		return ""
	case v.file == "":
		return v.setting
	case v.line > 0:
		return fmt.Sprintf("%s in %s, line %d", v.setting, v.file, v.line)
	}
	return v.setting + " in " + v.file
}

// fail makes the error for a value.
func (v value) fail(problem, hint string) *SettingError {
	return &SettingError{Setting: v.setting, File: v.file, Line: v.line, Value: v.text, Problem: problem, Hint: hint}
}

// config is the configuration of an instance as the server resolves it.
type config struct {
	product  ocis.Product
	env      environment
	dir      string // of the YAML files; "" if there is none
	docs     map[string]*document
	warnings []string
}

// document is one YAML file.
type document struct {
	path string
	tree map[string]any
	root *yaml.Node
}

// yamlLimit bounds a configuration file in bytes; real ones have a few KiB.
const yamlLimit = 8 << 20

// mainName is the name of the main YAML without its ending.
func mainName(p ocis.Product) string { return string(p) }

// envPrefix is what replaces {P} in the names of variables.
func envPrefix(p ocis.Product) string {
	if p == ocis.OpenCloud {
		return "OC"
	}
	return "OCIS"
}

// document loads <name>.yaml of the configuration directory. It is nil if there is no such file,
// or if it is broken: the server passes over broken files without a word, so this warns.
//
// Errors: *SettingError for a file that cannot be read.
func (c *config) document(name string) (*document, error) {
	if d, ok := c.docs[name]; ok {
		return d, nil
	}
	if c.docs == nil {
		c.docs = map[string]*document{}
	}
	c.docs[name] = nil
	if c.dir == "" {
		return nil, nil
	}
	path := filepath.Join(c.dir, name+".yaml")
	data, err := readLimited(path, yamlLimit)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, readError("configuration file", path, err)
	}
	d, err := parseDocument(data)
	if err != nil {
		c.warnings = append(c.warnings, fmt.Sprintf("%s is no valid YAML and the server ignores the whole file: %v; correct it, and look whether the settings shown here are the wanted ones", path, err))
		return nil, nil
	}
	d.path = path
	c.docs[name] = d
	return d, nil
}

func parseDocument(data []byte) (*document, error) {
	d := new(document)
	var root yaml.Node
	if err := yaml.Unmarshal(data, &root); err != nil {
		return nil, err
	}
	if len(root.Content) == 0 {
		return d, nil
	}
	d.root = root.Content[0]
	// Decoding finds what parsing lets pass: keys that stand twice, unknown anchors.
	if err := d.root.Decode(&d.tree); err != nil {
		return nil, err
	}
	return d, nil
}

// find returns what stands under a key with dots, and the line of it (0 if that is not known).
func (d *document) find(key string) (v any, line int, ok bool) {
	if d == nil {
		return nil, 0, false
	}
	v = d.tree
	node := d.root
	for part := range strings.SplitSeq(key, ".") {
		m, isMap := v.(map[string]any)
		if !isMap {
			return nil, 0, false
		}
		name := part
		if v, ok = m[part]; !ok {
			// The server's decoder falls back to names in another case.
			for k := range m {
				if strings.EqualFold(k, part) && (!ok || k < name) {
					name, v, ok = k, m[k], true
				}
			}
		}
		if !ok {
			return nil, 0, false
		}
		node = childNode(node, name)
	}
	if v == nil { // "key:" with nothing behind it sets nothing
		return nil, 0, false
	}
	if node != nil {
		line = node.Line
	}
	return v, line, true
}

func childNode(n *yaml.Node, key string) *yaml.Node {
	if n != nil && n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	return nil
}

// get resolves f.
//
// Errors: *SettingError.
func (c *config) get(f field) (value, error) {
	var v value
	main, err := c.document(mainName(c.product))
	if err != nil {
		return v, err
	}
	for _, k := range f.global {
		if err := c.fromYAML(&v, main, k, f); err != nil {
			return v, err
		}
	}
	if f.service != "" {
		section := strings.ReplaceAll(f.service, "-", "_")
		own, err := c.document(f.service)
		if err != nil {
			return v, err
		}
		for _, k := range f.keys {
			if err := c.fromYAML(&v, main, section+"."+k, f); err != nil {
				return v, err
			}
		}
		for _, k := range f.keys {
			if err := c.fromYAML(&v, own, k, f); err != nil {
				return v, err
			}
		}
	}
	for _, name := range f.env {
		name = strings.ReplaceAll(name, "{P}", envPrefix(c.product))
		if e, ok := c.env[name]; ok {
			v = value{text: e.value, set: true, setting: name, file: e.file, line: e.line}
			if f.list {
				v.list = splitList(e.value)
			}
		}
	}
	return v, nil
}

func (c *config) fromYAML(v *value, d *document, key string, f field) error {
	raw, line, ok := d.find(key)
	if !ok {
		return nil
	}
	n := value{set: true, setting: key, file: d.path, line: line}
	one := func(x any) (string, error) {
		s, ok := scalar(x)
		if !ok {
			n.text = ""
			return "", n.fail("is not a single value", "")
		}
		s, err := interpolate(s, c.env.lookup)
		if err != nil {
			e := n.fail("cannot be resolved", "Give the variable by --env-file, or another source of the server's environment.")
			e.Err = err
			return "", e
		}
		return s, nil
	}
	if seq, isSeq := raw.([]any); isSeq && f.list {
		for _, x := range seq {
			s, err := one(x)
			if err != nil {
				return err
			}
			n.list = append(n.list, s)
		}
		n.text = strings.Join(n.list, ",")
	} else {
		s, err := one(raw)
		if err != nil {
			return err
		}
		n.text = s
		if f.list {
			n.list = splitList(s)
		}
	}
	*v = n
	return nil
}

func splitList(s string) []string {
	var l []string
	for part := range strings.SplitSeq(s, ",") {
		if part = strings.TrimSpace(part); part != "" {
			l = append(l, part)
		}
	}
	return l
}

// scalar turns a YAML value into text, as the server's weak conversion does.
func scalar(v any) (string, bool) {
	switch x := v.(type) {
	case string:
		return x, true
	case bool:
		return strconv.FormatBool(x), true
	case int:
		return strconv.Itoa(x), true
	case int64, uint64, float64:
		return fmt.Sprint(x), true
	}
	return "", false
}

// interpolate replaces ${VAR}, ${VAR | default} and ${VAR | ?message} in a YAML string. A variable
// that is unset or empty takes the default; with a question mark that is an error with the message.
func interpolate(s string, lookup func(string) (string, bool)) (string, error) {
	var b strings.Builder
	for {
		start := strings.Index(s, "${")
		if start < 0 {
			break
		}
		end := strings.IndexByte(s[start:], '}')
		if end < 0 {
			break
		}
		end += start
		name, def, _ := strings.Cut(s[start+2:end], "|")
		name, def = strings.TrimSpace(name), strings.TrimSpace(def)
		v, _ := lookup(name)
		if v == "" {
			if msg, required := strings.CutPrefix(def, "?"); required {
				return "", fmt.Errorf("variable %s is required: %s", name, strings.TrimSpace(msg))
			}
			v = def
		}
		b.WriteString(s[:start])
		b.WriteString(v)
		if b.Len() > maxExpansion {
			return "", fmt.Errorf("value grows beyond %d bytes", maxExpansion)
		}
		s = s[end+1:]
	}
	b.WriteString(s)
	return b.String(), nil
}

// readLimited reads a regular file of at most limit bytes. A FIFO or a device would never end.
func readLimited(path string, limit int64) ([]byte, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.IsDir() {
		return nil, fmt.Errorf("is a directory")
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("is no regular file")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("is larger than %d bytes", limit)
	}
	return data, nil
}

// readError tells that a file that matters cannot be read.
func readError(what, path string, err error) error {
	hint := ""
	if errors.Is(err, os.ErrPermission) {
		hint = "Run holdfast as root, or as the user who owns the instance."
	}
	return &SettingError{Setting: what, File: path, Problem: "cannot be read", Hint: hint, Err: withoutPath(err)}
}

// withoutPath drops the path that an error of package os repeats.
func withoutPath(err error) error {
	var p *os.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}
