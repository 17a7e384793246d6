package main

import (
	"context"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/holdfast-backup/holdfast/internal/browse/save"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

func (a *app) dumpCommand() *cobra.Command {
	var noLock bool
	var f pickFlags
	var format string
	c := &cobra.Command{
		Use:   "dump SNAPSHOT:SPACE/PATH",
		Short: "Write a folder as an archive to standard output",
		Long: `Write what is in a folder as a tar or zip archive to standard output. Contents are
compared with the checksums that the server recorded.

` + addressHelp + `

` + exitHelp(repoCodes...),
		Example: `  holdfast dump 'latest:personal/alan/Round 0' | tar -x -C /tmp/alan
  holdfast dump latest:project/project-alpha-0 --format zip > project.zip`,
		Args: args(1, 1, "one argument, SNAPSHOT:SPACE/PATH"),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			kind := save.Format(format)
			if kind != save.Tar && kind != save.Zip {
				return usageError("--format is tar or zip, not %q", format)
			}
			if !isSpaceAddress(args[0]) {
				return ui.WithHints(usageError("%s names no space", ui.Quote(args[0])),
					"Such an address is SNAPSHOT:SPACE/PATH, e.g. latest:personal/alan/Reports.")
			}
			if out, ok := a.out.(*os.File); ok && term.IsTerminal(int(out.Fd())) {
				return ui.WithHints(usageError("an archive is nothing for a terminal"), "Send it into a file or a program: > FILE, or | tar -t.")
			}
			return a.withRepository(ctx, repoOptions{}, readLock(noLock), func(ctx context.Context, r *repo.Repository) error {
				p, err := a.pick(ctx, r, args[0], f)
				if err != nil {
					return err
				}
				res, err := save.ToArchive(ctx, p.view, p.item, kind, a.ui.Writer(), save.Options{Now: time.Now()})
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				for _, x := range res.Skipped {
					a.warnAside("%s is neither file nor folder and was left out", ui.Quote(x))
				}
				for _, x := range res.Renamed {
					a.warnAside("%s could not have its own name and is called %s", ui.Quote(x.Path), ui.Quote(x.Name))
				}
				return err
			})
		}),
	}
	c.Flags().StringVar(&format, "format", "tar", "`kind` of archive: tar or zip")
	f.add(c)
	noLockFlag(c, &noLock)
	return c
}

// warnAside warns where the standard output belongs to data: with --json warnings would go there.
func (a *app) warnAside(format string, args ...any) {
	if !a.ui.JSON() {
		a.ui.Warn(format, args...)
	}
}
