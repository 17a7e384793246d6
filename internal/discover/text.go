package discover

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
)

// envText writes variables as an environment file that ParseEnvFile and systemd read back, sorted.
func envText(list []string) []byte {
	list = slices.Clone(list)
	slices.Sort(list)
	quote := false
	for _, kv := range list {
		_, v, _ := strings.Cut(kv, "=")
		quote = quote || strings.ContainsAny(v, "\n\r\\'\"") || strings.TrimSpace(v) != v
	}
	var b bytes.Buffer
	if quote {
		// The semicolon tells every reader the syntax, whatever the values look like.
		b.WriteString("; in systemd's syntax\n")
	}
	for _, kv := range list {
		k, v, ok := strings.Cut(kv, "=")
		if !ok || k == "" {
			continue
		}
		// One value with quotes decides the syntax of the file, so then all of them are quoted.
		if quote {
			v = `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "`", "\\`", "$", `\$`).Replace(v) + `"`
		}
		b.WriteString(k + "=" + v + "\n")
	}
	return b.Bytes()
}

func indentJSON(raw []byte) []byte {
	var b bytes.Buffer
	if json.Indent(&b, raw, "", "  ") != nil {
		return raw
	}
	b.WriteByte('\n')
	return b.Bytes()
}
