package discover

import (
	"slices"
	"strings"
	"testing"
)

func flat(vars []Var) string {
	var b strings.Builder
	for _, v := range vars {
		b.WriteString(v.Name + "=<" + v.Value + ">\n")
	}
	return b.String()
}

func lookupIn(m map[string]string) func(string) (string, bool) {
	return func(n string) (string, bool) { v, ok := m[n]; return v, ok }
}

func TestParseEnvFile(t *testing.T) {
	for name, c := range map[string]struct {
		in     string
		syntax Syntax
		want   string
	}{
		"plain":              {"A=b\n\n# c\nB=c=d\n", DockerSyntax, "A=<b>\nB=<c=d>\n"},
		"empty":              {"", DockerSyntax, ""},
		"set but empty":      {"A=\n", DockerSyntax, "A=<>\n"},
		"no last newline":    {"A=b", DockerSyntax, "A=<b>\n"},
		"windows":            {"\ufeffA=b\r\nB=c\r\n", DockerSyntax, "A=<b>\nB=<c>\n"},
		"indented":           {"  A=b\n\t# c\n", DockerSyntax, "A=<b>\n"},
		"inner backslash":    {`A=p\ss` + "\n", DockerSyntax, `A=<p\ss>` + "\n"},
		"hash in value":      {"A=b # c\n", DockerSyntax, "A=<b # c>\n"},
		"lone quote":         {"A=\"b\nB=it's\n", DockerSyntax, "A=<\"b>\nB=<it's>\n"},
		"dollar":             {"A=$HOME\n", DockerSyntax, "A=<$HOME>\n"},
		"name alone":         {"HAVE\nHAVENOT\n", DockerSyntax, "HAVE=<x>\n"},
		"blank in name":      {"A B=c\n=d\n", DockerSyntax, ""},
		"double quotes":      {`A="b c"` + "\n" + `B=x\y` + "\n", SystemdSyntax, "A=<b c>\nB=<xy>\n"},
		"single quotes":      {`A='b \n "c"'` + "\n", SystemdSyntax, `A=<b \n "c">` + "\n"},
		"escapes in quotes":  {`A="a\"b\\c\$d\n"` + "\n", SystemdSyntax, `A=<a"b\c$d\n>` + "\n"},
		"key over lines":     {"A='-----BEGIN\nabc==\nEND-----'\nB=c\n", SystemdSyntax, "A=<-----BEGIN\nabc==\nEND----->\nB=<c>\n"},
		"two lone quotes":    {"A='b\nB=c'\n", DockerSyntax, "A=<'b>\nB=<c'>\n"},
		"export":             {"export A=b\nB=c\n", SystemdSyntax, "A=<b>\nB=<c>\n"},
		"semicolon":          {"; c\nA=b\n", SystemdSyntax, "A=<b>\n"},
		"continued":          {"A=b\\\nc\nB=d\n", SystemdSyntax, "A=<bc>\nB=<d>\n"},
		"continued in quote": {"A=\"b\\\nc\"\n", SystemdSyntax, "A=<bc>\n"},
		"lines in quotes":    {"A=\"b\nc\"\nB=''\n", SystemdSyntax, "A=<b\nc>\nB=<>\n"},
		"quotes then word":   {"A=\"b\"c\nB='x'\n", SystemdSyntax, "A=<bc>\nB=<x>\n"},
		"trailing blanks":    {"A='x'\nB=b  \nC= c d \n", SystemdSyntax, "A=<x>\nB=<b>\nC=<c d>\n"},
		"bad names":          {"A='x'\n1B=c\nC-D=e\nnothing\n", SystemdSyntax, "A=<x>\n"},
		"blank before equal": {"A ='x'\n", SystemdSyntax, "A=<x>\n"},
	} {
		t.Run(name, func(t *testing.T) {
			vars, syntax := ParseEnvFile([]byte(c.in), lookupIn(map[string]string{"HAVE": "x"}))
			if got := flat(vars); got != c.want || syntax != c.syntax {
				t.Errorf("got %q, %s; want %q, %s", got, syntax, c.want, c.syntax)
			}
		})
	}
}

func TestEnvFileLines(t *testing.T) {
	for in, want := range map[string]int{"# c\n\nB=c\n": 3, "A='x\ny'\n\nB=c\n": 4, "A=x\\\ny\nB=c": 3} {
		vars, _ := ParseEnvFile([]byte(in), nil)
		if last := vars[len(vars)-1]; last.Name != "B" || last.Line != want {
			t.Errorf("%q: got %+v", in, vars)
		}
	}
}

func TestDotenv(t *testing.T) {
	for name, c := range map[string]struct{ in, want, err string }{
		"plain":          {in: "A=b\nexport B=c\n", want: "A=<b>\nB=<c>\n"},
		"comment":        {in: "A=b # c\nB=b#c\nC=#d\n# e\n", want: "A=<b>\nB=<b#c>\nC=<>\n"},
		"single quotes":  {in: "A='$X # \\n'\n", want: "A=<$X # \\n>\n"},
		"double quotes":  {in: `A="x $X\t\$X \"q\"" # c` + "\n", want: "A=<x ex\t$X \"q\">\n"},
		"expansion":      {in: "A=${X}${Y:-d}$Z\nB=$A!\n", want: "A=<exd>\nB=<exd!>\n"},
		"own before":     {in: "X=mine\nA=$X\n", want: "X=<mine>\nA=<mine>\n"},
		"handed on":      {in: "X\nY\n", want: "X=<ex>\n"},
		"yaml like":      {in: "A: b\n", want: "A=<b>\n"},
		"several lines":  {in: "A=\"b\nc\"\nB=d\n", want: "A=<b\nc>\nB=<d>\n"},
		"compose files":  {in: "OCIS=:ocis.yml\nCOMPOSE_FILE=docker-compose.yml${OCIS:-}${TIKA:-}\n", want: "OCIS=<:ocis.yml>\nCOMPOSE_FILE=<docker-compose.yml:ocis.yml>\n"},
		"bad name":       {in: "A=b\n1=c\n", want: "A=<b>\n", err: "line 2"},
		"required":       {in: "A=${NO:?say it}\n", err: "NO is required: say it"},
		"unclosed brace": {in: "A=${NO\n", err: "no closing brace"},
	} {
		t.Run(name, func(t *testing.T) {
			vars, err := parseDotenv(c.in, lookupIn(map[string]string{"X": "ex"}))
			if got := flat(vars); got != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

func TestExpand(t *testing.T) {
	vars := lookupIn(map[string]string{"A": "a", "E": ""})
	for in, want := range map[string]string{
		"x":                  "x",
		"$A-${A}":            "a-a",
		"$$A $":              "$A $",
		"${A:-d}${N:-d}":     "ad",
		"${E:-d}${E-d}":      "d",
		"${N-${A}b}":         "ab",
		"${A:+r}${E:+r}":     "r",
		"${E+r}${N+r}":       "r",
		"${N:-{x}":           "{x",
		"${N:-${M:-${L-q}}}": "q",
		"100%$":              "100%$",
		"$1":                 "$1",
	} {
		if got, err := expand(in, vars); err != nil || got != want {
			t.Errorf("%q: got %q, %v; want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"${", "${}", "${A", "${A!x}", "${A:}", "${N?}", "${N:?m}", "${E:?m}"} {
		if got, err := expand(in, vars); err == nil {
			t.Errorf("%q: got %q", in, got)
		}
	}
}

func TestInterpolate(t *testing.T) {
	vars := lookupIn(map[string]string{"A": "a", "E": ""})
	for in, want := range map[string]string{
		"x":                    "x",
		"${A}":                 "a",
		"${ A }/${A|d}":        "a/a",
		"${N | d e }!":         "d e!",
		"${E|d}":               "d",
		"${N}":                 "",
		"$A ${":                "$A ${",
		"${N|http://x:1/a?b}":  "http://x:1/a?b",
		"${A|?must be}":        "a",
		"p/${N| d }/${A | q}s": "p/d/as",
	} {
		if got, err := interpolate(in, vars); err != nil || got != want {
			t.Errorf("%q: got %q, %v; want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"${N|?m}", "${E | ? m }"} {
		if _, err := interpolate(in, vars); err == nil || !strings.HasSuffix(err.Error(), ": m") {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func TestEnvTextReadsBack(t *testing.T) {
	for _, list := range [][]string{
		{"B=2", "A=1"},
		{"A=b c", "P=/x:/y", "E="},
		{`A="q"`, "B=line\nline", `C=back\slash`, "D= blank ", "E=$x`y`", "F='"},
		{`A=\`},
	} {
		var want []string
		for _, kv := range list {
			k, v, _ := strings.Cut(kv, "=")
			want = append(want, k+"="+v)
		}
		slices.Sort(want)
		vars, _ := ParseEnvFile(envText(list), nil)
		var got []string
		for _, v := range vars {
			got = append(got, v.Name+"="+v.Value)
		}
		if !slices.Equal(got, want) {
			t.Errorf("got %q, want %q (file %q)", got, want, envText(list))
		}
	}
}

// envSeeds are texts that reach each branch of the parsers.
var envSeeds = []string{
	"A=b\n# c\nB=\n", "export A='b'\n; c\nB=\"c\\\"d\\\n e\"\n", "A=b\\\nc", "A", "=", "A='", "A=\"\\", "A=$B ${C:-d} ${E:?f}", "\ufeffA=b\r\n",
	"A=\"x\n#y\"z # w", "A: 'b\\'c'", "${A:-${B:-${C", "A=\\",
}

func FuzzEnvFile(f *testing.F) {
	for _, s := range envSeeds {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		lines := strings.Count(s, "\n") + 1
		vars, syntax := ParseEnvFile([]byte(s), nil)
		for _, v := range vars {
			if v.Name == "" || v.Line < 1 || v.Line > lines {
				t.Errorf("%s: %+v", syntax, v)
			}
			if syntax == SystemdSyntax && !validName(v.Name) {
				t.Errorf("name %q", v.Name)
			}
		}
		if vars, err := parseDotenv(s, lookupIn(nil)); err == nil {
			for _, v := range vars {
				if !validName(v.Name) {
					t.Errorf("name %q", v.Name)
				}
			}
		}
		// What is written for a process reads back the same.
		var list []string
		want := map[string]string{}
		for _, v := range vars {
			if _, ok := want[v.Name]; !ok && validName(v.Name) && !strings.ContainsAny(v.Value, "\x00\r\ufeff") {
				want[v.Name] = v.Value
				list = append(list, v.Name+"="+v.Value)
			}
		}
		back, _ := ParseEnvFile(envText(list), nil)
		if len(back) != len(list) {
			t.Fatalf("%d variables of %d came back: %q", len(back), len(list), envText(list))
		}
		for _, v := range back {
			if want[v.Name] != v.Value {
				t.Errorf("%s: %q came back as %q", v.Name, want[v.Name], v.Value)
			}
		}
	})
}

func FuzzUnit(f *testing.F) {
	for _, s := range []string{
		"[Service]\nEnvironment=\"A=b c\" D=e\nExecStart=-/usr/bin/ocis \\\n# c\n server\n", "[Service\n=x\n\\", "[Service]\nEnvironment='\\x41\\101\\n\\", "",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		for _, d := range parseUnit(cleanText([]byte(s)), "f") {
			if d.line < 1 {
				t.Errorf("%+v", d)
			}
			splitWords(specifiers(d.value, "a@b.service", "/home", "u"))
		}
		unescapeUnit(s)
	})
}
