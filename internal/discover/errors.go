package discover

import (
	"fmt"
	"strings"
)

// SettingError is returned for a setting that is wrong, missing, or contradicts what is on disk.
type SettingError struct {
	// Setting is the variable, the YAML key or the flag.
	Setting string
	// File is where it stands, with the line if that is known; "" for a flag or a default.
	File string
	Line int
	// Value is empty for secrets and for settings that are missing.
	Value string
	// Problem is what is wrong, e.g. "does not exist".
	Problem string
	// Hint says what to do, in a sentence.
	Hint string
	// Err is the cause, if there is one.
	Err error
}

func (e *SettingError) Error() string {
	var b strings.Builder
	b.WriteString(e.Setting)
	if e.Value != "" {
		b.WriteString("=" + quoted(e.Value))
	}
	if e.File != "" {
		b.WriteString(" in " + e.File)
		if e.Line > 0 {
			fmt.Fprintf(&b, ", line %d", e.Line)
		}
	}
	b.WriteString(": " + e.Problem)
	if e.Err != nil {
		b.WriteString(": " + e.Err.Error())
	}
	return b.String()
}

func (e *SettingError) Unwrap() error { return e.Err }

// Hints returns the hint as a list, as package ui wants it.
func (e *SettingError) Hints() []string { return hintList(e.Hint) }

// NoInstanceError is returned when the places looked at hold no instance.
type NoInstanceError struct {
	// Problem says where nothing was found.
	Problem string
	// Looked lists the paths that were looked for.
	Looked []string
	Hint   string
}

func (e *NoInstanceError) Error() string {
	s := e.Problem
	if len(e.Looked) > 0 {
		s += " (looked for " + strings.Join(e.Looked, ", ") + ")"
	}
	return s
}

// Hints returns the hint as a list.
func (e *NoInstanceError) Hints() []string { return hintList(e.Hint) }

// AmbiguousError is returned when there is more than one thing to choose from.
type AmbiguousError struct {
	// What is to be chosen: "instance", "compose service", ...
	What string
	// Choices name them.
	Choices []string
	Hint    string
}

func (e *AmbiguousError) Error() string {
	return fmt.Sprintf("found more than one %s: %s", e.What, strings.Join(e.Choices, "; "))
}

// Hints returns the hint as a list.
func (e *AmbiguousError) Hints() []string { return hintList(e.Hint) }

func hintList(h string) []string {
	if h == "" {
		return nil
	}
	return []string{h}
}

// quoted shows a value; plain ones stay as they are.
func quoted(s string) string {
	for _, r := range s {
		if r <= ' ' || r == '"' || r == '\'' || r > '~' {
			return fmt.Sprintf("%q", s)
		}
	}
	return s
}
