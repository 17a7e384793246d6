package discover

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
)

// unitDirs are systemd's directories for units, the first one wins.
var unitDirs = []string{
	"/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system",
	"/usr/lib/systemd/system", "/lib/systemd/system",
}

// unit is what matters of a systemd service.
type unit struct {
	name  string   // ocis.service
	files []string // the unit file, then its drop-ins in their order
	env   environment
	// envFiles are the files of EnvironmentFile= that exist.
	envFiles []string
	exec     []string // ExecStart=, the path first
	user     string
	home     string
	workDir  string
	maps     []PathMap // RootDirectory=, BindPaths=
}

// directive is one line of a unit file.
type directive struct {
	section, key, value string
	file                string
	line                int
}

// parseUnit reads the lines of a unit file. Lines that are none of systemd's are passed over, as
// systemd does.
func parseUnit(text, file string) []directive {
	var list []directive
	section := ""
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); i++ {
		start := i
		line := strings.TrimSpace(lines[i])
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		for endsInBackslash(line) && i+1 < len(lines) {
			i++
			next := strings.TrimSpace(lines[i])
			if next != "" && (next[0] == '#' || next[0] == ';') {
				continue // comments may stand between the parts of a long line
			}
			line = line[:len(line)-1] + " " + next
		}
		if endsInBackslash(line) {
			line = line[:len(line)-1]
		}
		if strings.HasPrefix(line, "[") {
			section = strings.Trim(line, "[]")
			continue
		}
		if k, v, ok := strings.Cut(line, "="); ok {
			list = append(list, directive{section, strings.TrimSpace(k), strings.TrimSpace(v), file, start + 1})
		}
	}
	return list
}

// splitWords splits a value as systemd does: blanks separate, quotes group, backslashes escape.
func splitWords(s string) []string {
	var words []string
	var b strings.Builder
	in := false
	var quote byte
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '\\' && i+1 < len(s):
			i++
			in = true
			i += writeEscape(&b, s, i)
		case quote != 0:
			if c == quote {
				quote = 0
			} else {
				b.WriteByte(c)
			}
		case c == '"' || c == '\'':
			quote, in = c, true
		case c == ' ' || c == '\t' || c == '\n':
			if in {
				words = append(words, b.String())
				b.Reset()
				in = false
			}
		default:
			in = true
			b.WriteByte(c)
		}
	}
	if in {
		words = append(words, b.String())
	}
	return words
}

// writeEscape writes what the escape at s[i] (behind the backslash) stands for, and returns how many
// further bytes it took.
func writeEscape(b *strings.Builder, s string, i int) int {
	simple := map[byte]byte{'a': 7, 'b': 8, 'f': 12, 'n': 10, 'r': 13, 't': 9, 'v': 11, 's': ' '}
	c := s[i]
	if r, ok := simple[c]; ok {
		b.WriteByte(r)
		return 0
	}
	digits, base, from := 0, 0, i
	switch {
	case c == 'x':
		digits, base, from = 2, 16, i+1
	case c >= '0' && c <= '7':
		digits, base = 3, 8
	}
	if digits > 0 && from+digits <= len(s) {
		if v, err := strconv.ParseUint(s[from:from+digits], base, 8); err == nil {
			b.WriteByte(byte(v))
			return from + digits - i - 1
		}
	}
	b.WriteByte(c)
	return 0
}

// specifiers replaces %i, %n and the like.
func specifiers(s, name, home, user string) string {
	if !strings.Contains(s, "%") {
		return s
	}
	full := strings.TrimSuffix(name, filepath.Ext(name))
	prefix, instance, _ := strings.Cut(full, "@")
	host, _ := os.Hostname()
	r := strings.NewReplacer("%%", "%", "%n", name, "%N", full, "%p", prefix, "%P", unescapeUnit(prefix),
		"%i", instance, "%I", unescapeUnit(instance), "%h", home, "%u", user, "%t", "/run", "%S", "/var/lib",
		"%E", "/etc", "%C", "/var/cache", "%L", "/var/log", "%T", "/tmp", "%V", "/var/tmp", "%H", host)
	return r.Replace(s)
}

// unescapeUnit undoes the escaping of instance names: dashes are slashes, \x2d is a dash.
func unescapeUnit(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '-':
			b.WriteByte('/')
		case s[i] == '\\' && i+1 < len(s):
			i++
			i += writeEscape(&b, s, i)
		default:
			b.WriteByte(s[i])
		}
	}
	return b.String()
}

// unitFiles finds the file of a unit and its drop-ins. name is a unit name or the path of a file.
func unitFiles(root, name string) (unitName string, files []string, err error) {
	var file string
	dirs := make([]string, len(unitDirs))
	for i, d := range unitDirs {
		dirs[i] = filepath.Join(root, d)
	}
	if strings.Contains(name, "/") {
		file = name
		unitName = filepath.Base(name)
		dirs = append([]string{filepath.Dir(name)}, dirs...)
		if !isFile(file) {
			return "", nil, &SettingError{Setting: "--unit", Value: name, Problem: "no such file"}
		}
	} else {
		unitName = name
		if filepath.Ext(name) != ".service" {
			unitName += ".service"
		}
		candidates := []string{unitName}
		if prefix, _, ok := strings.Cut(unitName, "@"); ok {
			candidates = append(candidates, prefix+"@.service")
		}
	search:
		for _, n := range candidates {
			for _, d := range dirs {
				if p := filepath.Join(d, n); isFile(p) || isMasked(p) {
					file = p
					break search
				}
			}
		}
		if file == "" {
			return "", nil, &SettingError{Setting: "--unit", Value: name, Problem: "no such unit in " + strings.Join(dirs, ", "),
				Hint: "`systemctl list-units --type=service` names the units; a path to a unit file works as well."}
		}
	}
	if isMasked(file) {
		return "", nil, &SettingError{Setting: "--unit", Value: name, Problem: "the unit is masked by " + file}
	}
	return unitName, append([]string{file}, dropIns(dirs, unitName)...), nil
}

// isMasked tells whether a unit file or drop-in is switched off by a link to /dev/null.
func isMasked(path string) bool {
	t, err := os.Readlink(path)
	return err == nil && t == os.DevNull
}

// dropIns lists the drop-ins of a unit in the order in which they are read: by file name; of two of
// the same name the one in the more specific, then in the earlier directory.
func dropIns(dirs []string, unitName string) []string {
	folders := []string{unitName + ".d"}
	base := strings.TrimSuffix(unitName, ".service")
	if prefix, _, ok := strings.Cut(base, "@"); ok {
		folders = append(folders, prefix+"@.service.d")
	}
	for i := len(base) - 1; i > 0; i-- {
		if base[i] == '-' {
			folders = append(folders, base[:i+1]+".service.d")
		}
	}
	folders = append(folders, "service.d")
	found := map[string]string{}
	for _, f := range folders {
		for _, d := range dirs {
			entries, err := os.ReadDir(filepath.Join(d, f))
			if err != nil {
				continue
			}
			for _, e := range entries {
				if _, ok := found[e.Name()]; !ok && strings.HasSuffix(e.Name(), ".conf") {
					found[e.Name()] = filepath.Join(d, f, e.Name())
				}
			}
		}
	}
	names := make([]string, 0, len(found))
	for n, p := range found {
		if !isMasked(p) {
			names = append(names, n)
		}
	}
	sort.Strings(names)
	list := make([]string, len(names))
	for i, n := range names {
		list[i] = found[n]
	}
	return list
}

// loadUnit reads a unit with its drop-ins and environment files.
//
// Errors: *SettingError.
func loadUnit(root, name string) (*unit, error) {
	unitName, files, err := unitFiles(root, name)
	if err != nil {
		return nil, err
	}
	u := &unit{name: unitName, files: files, env: environment{}}
	var all []directive
	for _, f := range files {
		data, err := readLimited(f, yamlLimit)
		if err != nil {
			return nil, readError("unit file", f, err)
		}
		all = append(all, parseUnit(cleanText(data), f)...)
	}
	for _, d := range all {
		if d.section == "Service" && d.key == "User" {
			u.user = d.value
		}
	}
	u.home = homeOf(root, u.user)

	var environmentLines, fileLines, execLines, unset []directive
	for _, d := range all {
		if d.section != "Service" {
			continue
		}
		d.value = specifiers(d.value, unitName, u.home, u.user)
		list := map[string]*[]directive{"Environment": &environmentLines, "EnvironmentFile": &fileLines,
			"ExecStart": &execLines, "UnsetEnvironment": &unset}[d.key]
		switch {
		case list != nil && d.value == "":
			*list = nil // an empty assignment starts anew
		case list != nil:
			*list = append(*list, d)
		case d.key == "WorkingDirectory":
			u.workDir = strings.TrimPrefix(d.value, "-")
			if u.workDir == "~" {
				u.workDir = u.home
			}
		case d.key == "RootDirectory" && d.value != "":
			u.maps = append(u.maps, PathMap{"/", d.value})
		case d.key == "BindPaths" || d.key == "BindReadOnlyPaths":
			for _, w := range splitWords(d.value) {
				p := strings.Split(strings.TrimPrefix(w, "-"), ":")
				if len(p) > 1 && p[1] != "" {
					u.maps = append(u.maps, PathMap{p[1], p[0]})
				}
			}
		}
	}
	for _, d := range environmentLines {
		for _, w := range splitWords(d.value) {
			if k, v, ok := strings.Cut(w, "="); ok && validName(k) {
				u.env[k] = envValue{v, d.file, d.line}
			}
		}
	}
	for _, d := range fileLines {
		if err := u.readEnvFiles(root, d); err != nil {
			return nil, err
		}
	}
	for _, d := range unset {
		for _, w := range splitWords(d.value) {
			k, v, withValue := strings.Cut(w, "=")
			if e, ok := u.env[k]; ok && (!withValue || e.value == v) {
				delete(u.env, k)
			}
		}
	}
	if len(execLines) > 0 {
		u.exec = splitWords(execLines[0].value)
		if len(u.exec) > 0 {
			u.exec[0] = strings.TrimLeft(u.exec[0], "-:+!|")
			if strings.HasPrefix(u.exec[0], "@") && len(u.exec) > 1 { // the second word is argv[0]
				u.exec = append([]string{strings.TrimLeft(u.exec[0], "@-:+!|")}, u.exec[2:]...)
			}
		}
	}
	return u, nil
}

// readEnvFiles reads one line EnvironmentFile=. What it sets wins against Environment=.
func (u *unit) readEnvFiles(root string, d directive) error {
	pattern, optional := strings.CutPrefix(d.value, "-")
	if words := splitWords(pattern); len(words) == 1 {
		pattern = words[0]
	}
	full := filepath.Join(root, pattern)
	paths := []string{full}
	if strings.ContainsAny(pattern, "*?[") {
		if m, err := filepath.Glob(full); err == nil && (len(m) > 0 || optional) {
			paths = m
		}
	}
	for _, p := range paths {
		data, err := readLimited(p, yamlLimit)
		if errors.Is(err, os.ErrNotExist) && optional {
			continue
		}
		if err != nil {
			e := &SettingError{Setting: "EnvironmentFile", File: d.file, Line: d.line, Value: p, Problem: "cannot be read", Err: withoutPath(err)}
			if errors.Is(err, os.ErrPermission) {
				e.Hint = "Run holdfast as root, because the file holds secrets."
			}
			return e
		}
		u.env.add(parseSystemdEnv(cleanText(data), false), p)
		u.envFiles = append(u.envFiles, p)
	}
	return nil
}

// homeOf looks a user up in /etc/passwd. systemd sets HOME only for units with User=.
func homeOf(root, user string) string {
	if user == "" {
		return ""
	}
	data, err := readLimited(filepath.Join(root, "/etc/passwd"), yamlLimit)
	if err != nil {
		return ""
	}
	for line := range strings.SplitSeq(string(data), "\n") {
		f := strings.Split(line, ":")
		if len(f) >= 6 && (f[0] == user || f[2] == user) {
			return f[5]
		}
	}
	return ""
}

// snapshotNames are the names of the unit's files below /config/environment.
func (u *unit) snapshotNames() []string {
	names := make([]string, len(u.files))
	for i, f := range u.files {
		if i == 0 {
			names[i] = "systemd/" + filepath.Base(f)
			continue
		}
		names[i] = fmt.Sprintf("systemd/%s/%s", filepath.Base(filepath.Dir(f)), filepath.Base(f))
	}
	return names
}
