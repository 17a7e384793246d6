package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// passwordCare is shown once, when a repository is made.
const passwordCare = `Keep the password safe now, and not only on this machine:
  - Without the password nobody can read this repository, and nobody can reset it.
  - Store it where you will find it when this server and its disks are gone: a
    password manager, a printed sheet in a safe, a second person.
  - Do not store it inside the instance that you back up.
  - The repository holds the secrets of the instance, encrypted. Who has both the
    repository and the password has everything.
  - A second password can be added with ` + "`holdfast key add`" + `, for a second place.`

func (a *app) initCommand() *cobra.Command {
	var like bool
	var from otherRepo
	c := &cobra.Command{
		Use:   "init",
		Short: "Make a new repository",
		Long: `Make a new repository in an empty or missing directory, or on a server. It has restic's format,
version 2, and restic can read it.

With --copy-chunker-params it cuts files as the repository --from-repo does, so that snapshots
which are copied between them share data with those that are made there.

` + exitHelp(exitDone, exitError, exitUsage, exitNoRepository, exitWrongPassword, exitInterrupted),
		Example: `  holdfast init --repo /srv/backup/cloud --password-file /etc/holdfast/password
  holdfast init --repo s3:https://s3.example.com/bucket/cloud`,
		Args: args(0, 0, "no arguments"),
		RunE: a.verb(func(ctx context.Context, _ []string) error { return a.init(ctx, like, &from) }),
	}
	c.Flags().BoolVar(&like, "copy-chunker-params", false, "cut files as the repository --from-repo does")
	from.add(c.Flags(), "from", "to take that from")
	return c
}

func (a *app) init(ctx context.Context, like bool, from *otherRepo) error {
	if like && from.repo == "" {
		return ui.WithHints(usageError("--copy-chunker-params needs a repository to take them from"), "Set --from-repo.")
	}
	be, err := a.backend(ctx)
	if err != nil {
		return err
	}
	defer be.Close()
	where := ui.Quote(be.Location())
	switch _, err := be.Stat(ctx, backend.Handle{Type: backend.ConfigFile}); {
	case err == nil:
		return ui.WithHints(fmt.Errorf("cannot make a repository at %s: there is one already", where),
			"`holdfast snapshots` lists what it holds.")
	case !errors.Is(err, backend.ErrNotExist):
		return fmt.Errorf("cannot make a repository at %s: %w", where, err)
	}
	var o repo.InitOptions
	if like {
		err := a.withRepositoryAt(ctx, from.repo, from.password(a), repoOptions{}, lockNone, func(_ context.Context, r *repo.Repository) error {
			o.Polynomial = r.Polynomial()
			return nil
		})
		if err != nil {
			return fmt.Errorf("cannot take the chunker parameters from %s: %w", ui.Quote(from.repo), err)
		}
	}
	pw, err := a.password(ctx, true)
	if err != nil {
		return err
	}
	r, err := repo.Init(ctx, be, pw, o)
	if err != nil {
		return fmt.Errorf("cannot make a repository at %s: %w", where, err)
	}
	if a.ui.JSON() {
		a.ui.Object(struct {
			Event      string `json:"event"`
			Verb       string `json:"verb"`
			ID         string `json:"id"`
			Repository string `json:"repository"`
			Version    uint   `json:"version"`
		}{"summary", "init", r.ID(), be.Location(), r.Version()})
		return nil
	}
	if !a.ui.Quiet() {
		a.ui.Text(fmt.Sprintf("made repository %.8s at %s", r.ID(), where), "", passwordCare)
	}
	return nil
}
