package discover

import (
	"fmt"
	"strings"
)

// Var is one variable of an environment file.
type Var struct {
	Name, Value string
	Line        int // 1 is the first
}

// Syntax is how an environment file is read.
type Syntax string

// The syntaxes.
const (
	// DockerSyntax takes what follows the equals sign as it is, quotes and backslashes as well.
	DockerSyntax Syntax = "docker"
	// SystemdSyntax knows quotes, backslashes and continuation lines.
	SystemdSyntax Syntax = "systemd"
)

// ParseEnvFile reads an environment file of which it is not known who else reads it. The syntaxes
// of Docker and systemd differ only for quotes, backslashes and continuation lines, so those decide:
//
// A file is in systemd's syntax if any line of it begins with "export " or with a semicolon, ends in
// an odd number of backslashes, or has a value that begins and ends with the same kind of quote; the
// end may be on a later line, if no line between begins like NAME=. Docker would hand such quotes on
// to the server, which cannot be meant. All other files are taken verbatim, as Docker does. "export "
// is passed over, which neither of the two does.
//
// lookup answers for names that stand without a value, which Docker takes from its own environment;
// it may be nil.
func ParseEnvFile(data []byte, lookup func(string) (string, bool)) ([]Var, Syntax) {
	text := cleanText(data)
	if isSystemd(text) {
		return parseSystemdEnv(text, true), SystemdSyntax
	}
	return parseDockerEnv(text, lookup), DockerSyntax
}

// cleanText drops a byte order mark and the carriage returns of line ends.
func cleanText(data []byte) string {
	s := strings.TrimPrefix(string(data), "\ufeff")
	return strings.ReplaceAll(s, "\r\n", "\n")
}

func isSystemd(text string) bool {
	open := byte(0) // the quote that a value began with and that is not closed yet
	for line := range strings.SplitSeq(text, "\n") {
		line = strings.TrimSpace(line)
		if open != 0 && startsVariable(line) {
			open = 0
		}
		if open != 0 && line != "" && line[len(line)-1] == open {
			return true
		}
		if open != 0 || line == "" || line[0] == '#' {
			continue
		}
		if line[0] == ';' || strings.HasPrefix(line, "export ") || endsInBackslash(line) {
			return true
		}
		_, v, ok := strings.Cut(line, "=")
		if v = strings.TrimSpace(v); ok && v != "" && (v[0] == '"' || v[0] == '\'') {
			if len(v) >= 2 && v[len(v)-1] == v[0] {
				return true
			}
			open = v[0]
		}
	}
	return false
}

// startsVariable tells whether a line begins like NAME=, in the capitals that all variables have.
func startsVariable(line string) bool {
	name, _, ok := strings.Cut(line, "=")
	return ok && validName(name) && name == strings.ToUpper(name)
}

func endsInBackslash(s string) bool {
	return (len(s)-len(strings.TrimRight(s, `\`)))%2 == 1
}

// parseDockerEnv reads what `docker run --env-file` takes. Lines that it would refuse are passed over.
func parseDockerEnv(text string, lookup func(string) (string, bool)) []Var {
	var vars []Var
	n := 0
	for line := range strings.SplitSeq(text, "\n") {
		n++
		line = strings.TrimLeft(line, " \t\f\v")
		if line == "" || line[0] == '#' {
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		if !ok {
			name = strings.TrimRight(name, " \t")
			if lookup == nil {
				continue
			}
			if value, ok = lookup(name); !ok {
				continue
			}
		}
		if name == "" || strings.ContainsAny(name, " \t") {
			continue
		}
		vars = append(vars, Var{name, value, n})
	}
	return vars
}

// validName tells whether systemd and shells take s as the name of a variable.
func validName(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c != '_' && (c|0x20 < 'a' || c|0x20 > 'z') && (i == 0 || c < '0' || c > '9') {
			return false
		}
	}
	return s != ""
}

const blanks = " \t\n\r"

// parseSystemdEnv reads a file as EnvironmentFile= does: quotes may begin at any word of a value and
// run over lines, there is no expansion of variables, and lines without a valid name are passed over.
func parseSystemdEnv(text string, allowExport bool) []Var {
	var vars []Var
	p := lineReader{text: text, line: 1}
	for !p.end() {
		c := p.peek()
		switch {
		case strings.IndexByte(blanks, c) >= 0:
			p.next()
			continue
		case c == '#' || c == ';':
			p.skipLine()
			continue
		}
		line := p.line
		var name strings.Builder
		for !p.end() && p.peek() != '=' && p.peek() != '\n' {
			name.WriteByte(p.next())
		}
		if p.end() || p.peek() == '\n' {
			continue
		}
		p.next() // =
		value := systemdValue(&p)
		key := strings.TrimRight(name.String(), blanks)
		if allowExport {
			key = strings.TrimLeft(strings.TrimPrefix(key, "export "), blanks)
		}
		if validName(key) {
			vars = append(vars, Var{key, value, line})
		}
	}
	return vars
}

// systemdValue reads a value up to the end of its last line.
func systemdValue(p *lineReader) string {
	var b strings.Builder
	inWord := false // inside an unquoted word, where quotes are ordinary
	keep := 0       // length up to which trailing blanks are kept
	for !p.end() {
		c := p.next()
		switch {
		case c == '\n':
			return b.String()[:keep]
		case c == '\\':
			if p.end() {
				return b.String()[:keep]
			}
			inWord = true
			if e := p.next(); e != '\n' {
				b.WriteByte(e)
				keep = b.Len()
			}
		case !inWord && (c == '\'' || c == '"'):
			quotedPart(p, c, &b)
			keep = b.Len()
		case strings.IndexByte(blanks, c) >= 0:
			if inWord {
				b.WriteByte(c)
			}
		default:
			inWord = true
			b.WriteByte(c)
			keep = b.Len()
		}
	}
	return b.String()[:keep]
}

// quotedPart reads up to the closing quote. In double quotes a backslash protects the characters
// that a shell would treat specially, and joins lines.
func quotedPart(p *lineReader, quote byte, b *strings.Builder) {
	for !p.end() {
		c := p.next()
		if c == quote {
			return
		}
		if c != '\\' || quote == '\'' || p.end() {
			b.WriteByte(c)
			continue
		}
		switch e := p.next(); e {
		case '"', '\\', '`', '$':
			b.WriteByte(e)
		case '\n':
		default:
			b.WriteByte('\\')
			b.WriteByte(e)
		}
	}
}

// lineReader counts the lines of what it reads.
type lineReader struct {
	text string
	at   int
	line int
}

func (p *lineReader) end() bool  { return p.at >= len(p.text) }
func (p *lineReader) peek() byte { return p.text[p.at] }

func (p *lineReader) next() byte {
	c := p.text[p.at]
	p.at++
	if c == '\n' {
		p.line++
	}
	return c
}

func (p *lineReader) skipLine() {
	for !p.end() && p.next() != '\n' {
	}
}

// parseDotenv reads the .env beside a compose file, and env_file entries of services: comments after
// a blank, single quotes literal, double quotes with escapes, variables expanded except in single
// quotes. lookup answers for variables that the file itself has not set before.
func parseDotenv(text string, lookup func(string) (string, bool)) ([]Var, error) {
	var vars []Var
	own := map[string]string{}
	find := func(name string) (string, bool) {
		if v, ok := own[name]; ok {
			return v, true
		}
		if lookup == nil {
			return "", false
		}
		return lookup(name)
	}
	p := lineReader{text: text, line: 1}
	for !p.end() {
		c := p.peek()
		if strings.IndexByte(blanks, c) >= 0 {
			p.next()
			continue
		}
		if c == '#' {
			p.skipLine()
			continue
		}
		line := p.line
		var name strings.Builder
		for !p.end() && strings.IndexByte("=:\n", p.peek()) < 0 {
			name.WriteByte(p.next())
		}
		key := strings.TrimSpace(strings.TrimPrefix(name.String(), "export "))
		if p.end() || p.peek() == '\n' {
			if v, ok := find(key); ok && validName(key) { // a name alone is handed on
				vars, own[key] = append(vars, Var{key, v, line}), v
			}
			continue
		}
		p.next()
		v, expandable := dotenvValue(&p)
		if !validName(key) {
			return vars, fmt.Errorf("line %d: %q is no name of a variable", line, key)
		}
		if expandable {
			var err error
			if v, err = expand(v, find); err != nil {
				return vars, fmt.Errorf("line %d: %w", line, err)
			}
		}
		vars, own[key] = append(vars, Var{key, v, line}), v
	}
	return vars, nil
}

func dotenvValue(p *lineReader) (value string, expandable bool) {
	for !p.end() && (p.peek() == ' ' || p.peek() == '\t') {
		p.next()
	}
	if p.end() {
		return "", false
	}
	var b strings.Builder
	switch p.peek() {
	case '\'':
		p.next()
		for !p.end() {
			c := p.next()
			if c == '\'' {
				break
			}
			if c == '\\' && !p.end() && p.peek() == '\'' {
				c = p.next()
			}
			b.WriteByte(c)
		}
		p.skipLine()
		return b.String(), false
	case '"':
		p.next()
		for !p.end() {
			c := p.next()
			if c == '"' {
				break
			}
			if c != '\\' || p.end() {
				b.WriteByte(c)
				continue
			}
			switch e := p.next(); e {
			case 'n':
				b.WriteByte('\n')
			case 'r':
				b.WriteByte('\r')
			case 't':
				b.WriteByte('\t')
			case '$':
				b.WriteString("$$") // stays a dollar sign when variables are expanded
			case '"', '\\':
				b.WriteByte(e)
			default:
				b.WriteByte('\\')
				b.WriteByte(e)
			}
		}
		p.skipLine()
		return b.String(), true
	}
	for !p.end() {
		c := p.next()
		if c == '\n' {
			break
		}
		if c == '#' && (b.Len() == 0 || strings.HasSuffix(b.String(), " ") || strings.HasSuffix(b.String(), "\t")) {
			p.skipLine()
			break
		}
		b.WriteByte(c)
	}
	return strings.TrimSpace(b.String()), true
}

// maxExpansion bounds what an expansion may grow to, in bytes; real values are far shorter.
const maxExpansion = 1 << 20

// expand replaces $NAME and ${NAME...} as compose does: with :- and - a default, with :? and ? an
// error, with :+ and + a replacement; $$ is a dollar sign.
func expand(s string, lookup func(string) (string, bool)) (string, error) {
	return expandDepth(s, lookup, 0)
}

func expandDepth(s string, lookup func(string) (string, bool), depth int) (string, error) {
	if depth > 20 {
		return "", fmt.Errorf("variables are nested too deeply in %q", short(s))
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if b.Len() > maxExpansion {
			return "", fmt.Errorf("value grows beyond %d bytes", maxExpansion)
		}
		if s[i] != '$' || i+1 == len(s) {
			b.WriteByte(s[i])
			continue
		}
		switch c := s[i+1]; {
		case c == '$':
			b.WriteByte('$')
			i++
		case c == '{':
			end := closingBrace(s, i+2)
			if end < 0 {
				return "", fmt.Errorf("no closing brace in %q", short(s))
			}
			v, err := expandBraced(s[i+2:end], lookup, depth)
			if err != nil {
				return "", err
			}
			b.WriteString(v)
			i = end
		default:
			n := nameLen(s[i+1:])
			if n == 0 {
				b.WriteByte('$')
				continue
			}
			v, _ := lookup(s[i+1 : i+1+n])
			b.WriteString(v)
			i += n
		}
	}
	return b.String(), nil
}

func expandBraced(s string, lookup func(string) (string, bool), depth int) (string, error) {
	n := nameLen(s)
	name, op := s[:n], s[n:]
	if name == "" {
		return "", fmt.Errorf("no name of a variable in ${%s}", short(s))
	}
	v, ok := lookup(name)
	if op == "" {
		return v, nil
	}
	has := ok
	if op[0] == ':' {
		has, op = ok && v != "", op[1:]
	}
	if op == "" {
		return "", fmt.Errorf("no operator in ${%s}", short(s))
	}
	arg := op[1:]
	switch op[0] {
	case '-':
		if has {
			return v, nil
		}
	case '+':
		if !has {
			return "", nil
		}
	case '?':
		if has {
			return v, nil
		}
		msg, err := expandDepth(arg, lookup, depth+1)
		if err != nil {
			return "", err
		}
		return "", fmt.Errorf("variable %s is required: %s", name, msg)
	default:
		return "", fmt.Errorf("unknown operator in ${%s}", short(s))
	}
	return expandDepth(arg, lookup, depth+1)
}

// closingBrace finds the brace that closes the one before from; braces inside nest.
func closingBrace(s string, from int) int {
	depth := 1
	for i := from; i < len(s); i++ {
		switch s[i] {
		case '{':
			if s[i-1] == '$' {
				depth++
			}
		case '}':
			if depth--; depth == 0 {
				return i
			}
		}
	}
	return -1
}

func nameLen(s string) int {
	n := 0
	for n < len(s) && validName(s[:n+1]) {
		n++
	}
	return n
}

func short(s string) string {
	if len(s) > 60 {
		return s[:57] + "..."
	}
	return s
}
