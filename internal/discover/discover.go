// Package discover finds out what an instance of Infinite Scale or OpenCloud consists of: where its
// data lies, how it is configured, and what runs it. It changes nothing.
//
// Start with Discover. The result depends on the configuration as the server itself would read it
// (later wins: defaults, main YAML, service YAML, environment) and on what lies on disk, which
// decides where the configuration is silent and is a cross-check where it is not.
package discover

import (
	"context"

	"github.com/holdfast-backup/holdfast/internal/docker"
	"github.com/holdfast-backup/holdfast/internal/progress"
)

// Options say where to look. The zero value looks in the default places of both products.
//
// Several sources of environment variables may be given; where two name the same variable, the
// later of this order wins: unit, compose, container, process, environment files.
type Options struct {
	// EnvFiles are files of KEY=VALUE lines, in Docker's or systemd's syntax: see ParseEnvFile.
	EnvFiles []string
	// PID is a process of the server: its environment, binary, working directory and mounts are read.
	PID int
	// BaseDataPath and ConfigDir are paths on this host and override what is configured. If the
	// configuration names another base data path, that is taken as the server's name of this one.
	BaseDataPath, ConfigDir string
	// Map translates paths of the server to paths on this host; the longest prefix wins, and an
	// entry here wins against one from mounts and volumes.
	Map []PathMap
	// Unit is the name of a systemd unit, or a unit file.
	Unit string
	// Compose are compose files, or one directory that holds them.
	Compose []string
	// ComposeService is the service that runs the server; "" finds it by image and command.
	ComposeService string
	// Container is the name or id of a Docker container.
	Container string
	// ServerBinary is the server's binary on this host.
	ServerBinary string

	// NoSizes leaves the sizes of the data sets out, which needs no walk over them.
	NoSizes bool
	// Environ is the environment of this process; nil is os.Environ. HOME leads to the default
	// places. Variables of the products count only if no other source of environment is given.
	Environ []string
	// Root is put before every path of the system that is not given in these options: default
	// places, systemd's directories, /proc, Docker's volumes, and server paths that no map covers.
	Root string
	// Docker is the client to inspect containers and volumes with; nil makes one from DOCKER_HOST.
	Docker *docker.Client
	// RunVersion asks a server binary for its version; nil runs it, if it can be trusted.
	RunVersion func(ctx context.Context, binary string) (string, error)
	Progress   progress.Sink
}
