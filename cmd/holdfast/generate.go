package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/holdfast-backup/holdfast/internal/ui"
)

// generateOptions are the flags of generate.
type generateOptions struct {
	man, completions string
}

func (a *app) generateCommand() *cobra.Command {
	var o generateOptions
	c := &cobra.Command{
		Use:   "generate",
		Short: "Write man pages and shell completions",
		Long: `Write man pages, and completions for bash, zsh and fish, into directories: for
packages, and for those who install by hand.

` + exitHelp(exitDone, exitError, exitUsage),
		Example: "  holdfast generate --man /usr/local/share/man/man1",
		Args:    args(0, 0, "no arguments"),
		RunE:    a.verb(func(_ context.Context, _ []string) error { return a.generate(o) }),
	}
	c.Flags().StringVar(&o.man, "man", "", "write man pages into this `directory`")
	c.Flags().StringVar(&o.completions, "completions", "", "write the completion files into this `directory`")
	return c
}

func (a *app) generate(o generateOptions) error {
	if o.man == "" && o.completions == "" {
		return ui.WithHints(usageError("nothing to generate"), "Set --man, --completions or both.")
	}
	if o.man != "" {
		if err := os.MkdirAll(o.man, 0o755); err != nil {
			return fmt.Errorf("cannot write the man pages: %w", err)
		}
		// No date: the same source makes the same pages.
		a.root.DisableAutoGenTag = true
		header := &doc.GenManHeader{Section: "1", Source: "Holdfast " + version, Manual: "Holdfast"}
		if err := doc.GenManTree(a.root, header, o.man); err != nil {
			return fmt.Errorf("cannot write the man pages: %w", err)
		}
	}
	if o.completions != "" {
		if err := os.MkdirAll(o.completions, 0o755); err != nil {
			return fmt.Errorf("cannot write the completions: %w", err)
		}
		for _, f := range []struct {
			name  string
			write func(string) error
		}{
			{"holdfast.bash", func(p string) error { return a.root.GenBashCompletionFileV2(p, true) }},
			{"_holdfast", a.root.GenZshCompletionFile},
			{"holdfast.fish", func(p string) error { return a.root.GenFishCompletionFile(p, true) }},
		} {
			if err := f.write(filepath.Join(o.completions, f.name)); err != nil {
				return fmt.Errorf("cannot write the completions: %w", err)
			}
		}
	}
	return nil
}
