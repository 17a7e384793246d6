package ocis

import (
	"encoding/csv"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

const grantPrefix = "grant."

// Grant is one access entry of a node: a member of the space if the node is a space's root, else a
// share.
type Grant struct {
	Group     bool   // Principal is a group, else a user
	Principal string // id
	Deny      bool
	Flags     string
	// Permissions are one letter each: t stat, x list, r download, w upload, a create folder, d delete,
	// C c o O grants, u U P trash, v V versions, q quota.
	Permissions string
	Creator     string
	Expires     time.Time // UTC; zero is never
}

// ParseGrant reads the attribute called name (without prefix, "grant.u:<id>" or "grant.g:<id>").
func ParseGrant(name string, value []byte) (Grant, error) {
	var g Grant
	who, ok := strings.CutPrefix(name, grantPrefix)
	kind, id, found := strings.Cut(who, ":")
	if !ok || !found || kind != "u" && kind != "g" {
		return g, errors.New("name is not of the form grant.u:<user id> or grant.g:<group id>")
	}
	g.Group, g.Principal = kind == "g", id
	if len(value) == 0 || value[0] != 0 {
		return g, errors.New("access entry is of an unknown version: it does not start with a zero byte")
	}
	fields, err := splitGrant(string(value[1:]))
	if err != nil {
		return g, err
	}
	for _, f := range fields {
		k, v, ok := strings.Cut(f, "=")
		if !ok {
			return g, fmt.Errorf("access entry has the field %s without a value", printable([]byte(f)))
		}
		switch k {
		case "t":
			switch v {
			case "A":
			case "D":
				g.Deny = true
			default:
				return g, fmt.Errorf("access entry is neither allow nor deny but %s", printable([]byte(v)))
			}
		case "f":
			g.Flags = v
		case "p":
			g.Permissions = v
		case "c":
			g.Creator = v
		case "e":
			if v == "" || v == "0" {
				continue
			}
			ns, err := strconv.ParseInt(v, 10, 64)
			if err != nil {
				return g, fmt.Errorf("access entry expires at %s, which is no number of nanoseconds", printable([]byte(v)))
			}
			g.Expires = time.Unix(0, ns).UTC()
		}
	}
	return g, nil
}

func splitGrant(s string) ([]string, error) {
	s = strings.TrimSuffix(s, "\n")
	if !strings.ContainsAny(s, "\"\n\r") {
		return strings.Split(s, ":"), nil
	}
	r := csv.NewReader(strings.NewReader(s))
	r.Comma = ':'
	r.FieldsPerRecord = -1
	fields, err := r.Read()
	if err != nil {
		return nil, fmt.Errorf("access entry cannot be split into fields: %w", err)
	}
	return fields, nil
}

// Attribute is the name without prefix and the value of g, as the product writes them.
func (g Grant) Attribute() (name string, value []byte) {
	kind, t, e := "u", "A", int64(0)
	if g.Group {
		kind = "g"
	}
	if g.Deny {
		t = "D"
	}
	if !g.Expires.IsZero() {
		e = g.Expires.UnixNano()
	}
	fields := []string{"t=" + t, "f=" + g.Flags, "p=" + g.Permissions, "c=" + g.Creator, "e=" + strconv.FormatInt(e, 10)}
	var b strings.Builder
	b.WriteByte(0)
	w := csv.NewWriter(&b)
	w.Comma = ':'
	// A strings.Builder never fails.
	_ = w.Write(fields)
	w.Flush()
	return grantPrefix + kind + ":" + g.Principal, []byte(b.String())
}
