// Package userenv says what the commands of the user (to stop and start the instance, to make views, ...) get of our
// environment: all of it but the variables of Holdfast and restic, and the credentials of the place where the
// repository lies. Who can change such a command, or reads the environment of the server that it starts, has no
// business with the backups.
package userenv

import (
	"os"
	"slices"
	"strings"
	"sync/atomic"
)

// families are the beginnings of names that are withheld.
var families = []string{"HOLDFAST_", "RESTIC_", "AWS_", "RCLONE_"}

var passed atomic.Pointer[[]string]

// Pass lets these variables through all the same. It is for the start of the program.
func Pass(names []string) {
	names = slices.Clone(names)
	passed.Store(&names)
}

// Environ is what the commands of the user get.
func Environ() []string { return Filter(os.Environ()) }

// Filter does the same with any environment.
func Filter(environ []string) []string { return filter(environ, families) }

// ForRemotes is what a program gets that reaches a repository by credentials of its own, rclone: those of the AWS tools
// may be meant for it.
func ForRemotes() []string { return filter(os.Environ(), families[:2]) }

func filter(environ, families []string) []string {
	out := []string{}
	for _, kv := range environ {
		name, _, _ := strings.Cut(kv, "=")
		secret := slices.ContainsFunc(families, func(f string) bool { return strings.HasPrefix(name, f) })
		if p := passed.Load(); !secret || p != nil && slices.Contains(*p, name) {
			out = append(out, kv)
		}
	}
	return out
}
