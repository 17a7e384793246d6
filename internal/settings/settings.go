// Package settings fills the flags of a command from what was not said on its line: environment
// variables, the variables of restic as fall-backs, and one YAML file. A value on the command line
// wins over the environment, and that over the file. There is no list of settings: every flag is
// one, so each has a variable and a key from the day it exists.
package settings

import (
	"encoding/csv"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strings"

	"github.com/spf13/pflag"
)

// DefaultFile is read if it exists and no other file is named.
const DefaultFile = "/etc/holdfast/holdfast.yaml"

// Prefix begins the name of every variable.
const Prefix = "HOLDFAST_"

// Layer is where a value comes from; the higher one wins.
type Layer int

// The layers, lowest first.
const (
	Default  Layer = iota
	File           // the YAML file
	Fallback       // a variable of restic
	Env            // HOLDFAST_*
	Flag           // the command line
)

// Origin tells where a value comes from. Name is the variable, or file:line, or "".
type Origin struct {
	Layer Layer
	Name  string
}

// flag --repo has the long name in the other two places, as restic has it.
const repoFlag = "repo"

// fallbacks are the variables of restic that mean the same.
var fallbacks = map[string]string{
	repoFlag:           "RESTIC_REPOSITORY",
	"password-file":    "RESTIC_PASSWORD_FILE",
	"password-command": "RESTIC_PASSWORD_COMMAND",
	"cacert":           "RESTIC_CACERT",
	"tls-client-cert":  "RESTIC_TLS_CLIENT_CERT",

	"from-repo":             "RESTIC_FROM_REPOSITORY",
	"from-password-file":    "RESTIC_FROM_PASSWORD_FILE",
	"from-password-command": "RESTIC_FROM_PASSWORD_COMMAND",
}

// passwordVariables hold the password itself. They are settings without a flag, because a command
// line can be read by every user of the machine.
var passwordVariables = []string{Prefix + "PASSWORD", "RESTIC_PASSWORD"}

// otherPasswordVariables hold the password of a second repository, by what it is for.
var otherPasswordVariables = map[string][]string{
	"from": {Prefix + "FROM_PASSWORD", "RESTIC_FROM_PASSWORD"},
	"to":   {Prefix + "TO_PASSWORD"},
}

// keyVariables hold keys of buckets, for the same reason.
var keyVariables = []string{
	Prefix + "BUCKET_ACCESS_KEY", Prefix + "BUCKET_SECRET_KEY", Prefix + "REPLICA_ACCESS_KEY", Prefix + "REPLICA_SECRET_KEY",
}

// notInFile are flags that make no sense in the file; some have no variable either.
var notInFile = map[string]bool{"config-file": true, "help": true, "version": true}

// Variable returns the environment variable of a flag: --stop-command is HOLDFAST_STOP_COMMAND.
func Variable(flag string) string {
	if flag == repoFlag {
		return Prefix + "REPOSITORY"
	}
	return Prefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// Key returns the YAML key of a flag, which is its name; --repo is "repository".
func Key(flag string) string {
	if flag == repoFlag {
		return "repository"
	}
	return flag
}

// Lookup finds an environment variable, as os.LookupEnv does.
type Lookup func(string) (string, bool)

// Apply sets each flag of fs that the command line left alone from the environment or from the
// file, which may be nil. verb is the section of the file that goes before its general keys.
// An empty variable counts as not set. The result has an entry for each flag that is set.
//
// Errors: a value that does not fit its flag; it names the variable, or the file and line.
func Apply(fs *pflag.FlagSet, verb string, file *YAML, env Lookup) (map[string]Origin, error) {
	out := map[string]Origin{}
	var errs []error
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Changed {
			out[f.Name] = Origin{Layer: Flag}
			return
		}
		if f.Name == "help" || f.Name == "version" {
			return
		}
		vals, o := find(f.Name, verb, file, env)
		if o.Layer == Default {
			return
		}
		if err := set(fs, f, vals, o); err != nil {
			errs = append(errs, fmt.Errorf("%s: setting %s: %w", o.Name, Key(f.Name), err))
			return
		}
		out[f.Name] = o
	})
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return out, nil
}

func find(flag, verb string, file *YAML, env Lookup) ([]string, Origin) {
	if v, ok := env(Variable(flag)); ok && v != "" {
		return []string{v}, Origin{Env, Variable(flag)}
	}
	if name := fallbacks[flag]; name != "" {
		if v, ok := env(name); ok && v != "" {
			return []string{v}, Origin{Fallback, name}
		}
	}
	if file != nil && !notInFile[flag] {
		if e, ok := file.get(verb, Key(flag)); ok {
			return e.values, Origin{File, fmt.Sprintf("%s:%d", file.Path, e.line)}
		}
	}
	return nil, Origin{}
}

func set(fs *pflag.FlagSet, f *pflag.Flag, vals []string, o Origin) error {
	list, isList := f.Value.(pflag.SliceValue)
	if !isList {
		if len(vals) != 1 {
			return errors.New("one value is wanted, not a list")
		}
		// pflag's own error would name the flag, which was not used.
		if err := f.Value.Set(vals[0]); err != nil {
			return fmt.Errorf("invalid value %q: %w", vals[0], err)
		}
		f.Changed = true
		return nil
	}
	if o.Layer != File {
		r := csv.NewReader(strings.NewReader(vals[0]))
		var err error
		if vals, err = r.Read(); err != nil {
			return fmt.Errorf("invalid list %q: %w", vals, err)
		}
	}
	if err := list.Replace(vals); err != nil {
		return err
	}
	f.Changed = true
	return nil
}

// Strongest keeps, of several settings that exclude one another, those of the highest layer, and
// returns their names in the order given: the command line overrules the file even if both say the
// same thing in different ways. More than one name is for the caller to refuse.
func Strongest(set map[string]Origin, names ...string) []string {
	top := Default
	for _, n := range names {
		top = max(top, set[n].Layer)
	}
	if top == Default {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(names), func(n string) bool { return set[n].Layer != top })
}

// Password returns the password that the environment holds, if any.
func Password(env Lookup) (string, Origin) {
	return firstOf(env, passwordVariables)
}

// OtherPassword does the same for a second repository, "from" or "to" which something is copied.
func OtherPassword(env Lookup, which string) (string, Origin) {
	return firstOf(env, otherPasswordVariables[which])
}

func firstOf(env Lookup, names []string) (string, Origin) {
	for i, name := range names {
		if v, ok := env(name); ok && v != "" {
			return v, Origin{[]Layer{Env, Fallback}[i], name}
		}
	}
	return "", Origin{}
}

// Strangers returns the HOLDFAST_* variables of environ ("NAME=value") that are no setting of any
// flag in known, sorted: most likely they are misspelt, and would be ignored in silence.
func Strangers(environ []string, known []string) []string {
	ok := map[string]bool{passwordVariables[0]: true}
	for _, names := range otherPasswordVariables {
		ok[names[0]] = true
	}
	for _, name := range keyVariables {
		ok[name] = true
	}
	for _, f := range known {
		ok[Variable(f)] = true
	}
	var out []string
	for _, kv := range environ {
		name, _, _ := strings.Cut(kv, "=")
		if strings.HasPrefix(name, Prefix) && !ok[name] {
			out = append(out, name)
		}
	}
	sort.Strings(out)
	return out
}
