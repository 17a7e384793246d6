package main

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is the release; the build may set another one with -ldflags "-X main.version=...".
var version = "0.1.0"

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Long:  "Print the version of Holdfast and what it was built with.\n\n" + exitHelp(exitDone, exitUsage),
		Args:  args(0, 0, "no arguments"),
		RunE:  a.verb(func(context.Context, []string) error { a.version(); return nil }),
	}
}

func (a *app) version() {
	commit := ""
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				commit = s.Value
			}
		}
	}
	if a.ui.JSON() {
		a.ui.Object(struct {
			Event    string `json:"event"`
			Version  string `json:"version"`
			Commit   string `json:"commit,omitempty"`
			Go       string `json:"go"`
			Platform string `json:"platform"`
		}{"version", version, commit, runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH})
		return
	}
	s := fmt.Sprintf("holdfast %s (%s, %s/%s", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
	if commit != "" {
		s += fmt.Sprintf(", commit %.12s", commit)
	}
	a.ui.Text(s + ")")
}
