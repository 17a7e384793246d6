package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/holdfast-backup/holdfast/internal/maintain"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/repo/id"
	"github.com/holdfast-backup/holdfast/internal/settings"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// otherRepo names a second repository.
type otherRepo struct {
	which                               string // from or to
	repo, passwordFile, passwordCommand string
}

func (o *otherRepo) add(fs *pflag.FlagSet, which, what string) {
	o.which = which
	fs.StringVar(&o.repo, which+"-repo", "", "`address` of the repository "+what)
	fs.StringVar(&o.passwordFile, which+"-password-file", "", "`file` with its password")
	fs.StringVar(&o.passwordCommand, which+"-password-command", "", "shell `command` that prints its password")
}

// password returns the password of the other repository, or asks for it.
func (o *otherRepo) password(a *app) func(context.Context, bool) (string, error) {
	return func(ctx context.Context, isNew bool) (string, error) {
		file, command := o.which+"-password-file", o.which+"-password-command"
		env, origin := settings.OtherPassword(a.getenv, o.which)
		variable := "the variable " + origin.Name
		set := map[string]settings.Origin{file: a.set[file], command: a.set[command]}
		if env != "" {
			set[variable] = origin
		}
		switch from := settings.Strongest(set, file, command, variable); {
		case len(from) == 0:
			return a.askOr(ctx, "password of the repository "+ui.Quote(o.repo), isNew,
				fmt.Sprintf("Set --%s, --%s or the variable %s_PASSWORD.", file, command, settings.Variable(o.which)))
		case len(from) > 1:
			return "", usageError("the password of the other repository is set twice, by %s and %s", from[0], from[1])
		case from[0] == file:
			return a.passwordFrom(o.passwordFile)
		case from[0] == command:
			return a.passwordBy(ctx, o.passwordCommand)
		}
		return env, nil
	}
}

type copyFlags struct {
	from, to otherRepo
	filter   filterFlags
	repo     repoOptions
	readBack bool
}

func (a *app) copyCommand() *cobra.Command {
	var f copyFlags
	c := &cobra.Command{
		Use:   "copy [SNAPSHOT...]",
		Short: "Copy snapshots to another repository",
		Long: `Copy snapshots, all or those that are named, from one repository to another: from --repo
to --to-repo, or from --from-repo to --repo. Only what is not there yet is transferred, and
snapshots that were copied before are passed over, so a copy that was interrupted goes on
where it was. Everything is compared with its hash when it is read, and encrypted anew.

If both repositories take backups of the same data, make the second one with
holdfast init --copy-chunker-params: then both cut files alike, and share what is equal.

The password of the other repository can also stand in the variable HOLDFAST_TO_PASSWORD or
HOLDFAST_FROM_PASSWORD.

` + exitHelp(repoCodes...),
		Example: `  holdfast copy --to-repo /mnt/usb/cloud --to-password-file /etc/holdfast/usb-password
  holdfast copy latest --from-repo /srv/backup/cloud --repo /mnt/usb/cloud`,
		Args: args(0, 10000, "ids of snapshots"),
		RunE: a.verb(func(ctx context.Context, names []string) error { return a.copy(ctx, &f, names) }),
	}
	fs := c.Flags()
	fs.SortFlags = false
	f.to.add(fs, "to", "that takes the snapshots")
	f.from.add(fs, "from", "that has the snapshots; then --repo takes them")
	f.filter.add(fs, "copy")
	fs.BoolVar(&f.readBack, "read-back", false, "read from the destination everything that a snapshot needs before it counts as copied")
	fs.StringVar(&f.repo.compression, "compression", "auto", "`mode`: auto, off or max")
	fs.IntVar(&f.repo.packSize, "pack-size", 0, "size of the destination's files in `MiB`, 4 to 128 (default 16)")
	return c
}

func (a *app) copy(ctx context.Context, f *copyFlags, names []string) error {
	type place struct {
		addr     string
		password func(context.Context, bool) (string, error)
	}
	own := place{a.opt.repo, a.password}
	var src, dst place
	switch which := settings.Strongest(a.set, "to-repo", "from-repo"); {
	case len(which) == 0:
		return ui.WithHints(usageError("no second repository was named"), "Set --to-repo or --from-repo.")
	case len(which) > 1:
		return usageError("--to-repo and --from-repo exclude each other: the other repository is --repo")
	case which[0] == "to-repo":
		src, dst = own, place{f.to.repo, f.to.password(a)}
	default:
		src, dst = place{f.from.repo, f.from.password(a)}, own
	}
	return a.withRepositoryAt(ctx, src.addr, src.password, repoOptions{}, lockShared, func(ctx context.Context, from *repo.Repository) error {
		return a.withRepositoryAt(ctx, dst.addr, dst.password, f.repo, lockShared, func(ctx context.Context, to *repo.Repository) error {
			return a.copyBetween(ctx, f, from, to, names)
		})
	})
}

func (a *app) copyBetween(ctx context.Context, f *copyFlags, from, to *repo.Repository, names []string) error {
	list, err := a.listSnapshots(ctx, from)
	if err != nil {
		return err
	}
	filter := f.filter.filter()
	which := slices.DeleteFunc(slices.Clone(list), func(s *snapshot.Snapshot) bool { return !filter.Fits(s.Hostname, s.Paths, s.Tags) })
	if len(names) > 0 {
		if which, err = findSnapshots(which, names); err != nil {
			return err
		}
		// Oldest first, as they were made.
		slices.SortStableFunc(which, func(x, y *snapshot.Snapshot) int { return slices.Index(list, x) - slices.Index(list, y) })
	}
	for _, r := range []*repo.Repository{from, to} {
		if err := a.loadIndex(ctx, r); err != nil {
			return err
		}
	}
	if from.Polynomial() != to.Polynomial() {
		a.ui.Info("the two repositories cut files differently: what is backed up into both is not shared; `holdfast init --copy-chunker-params` makes a repository that cuts like another one")
	}
	if err := a.joinReplicas(ctx, from, to, which); err != nil {
		return err
	}
	res, err := maintain.Copy(ctx, from, to, which, maintain.CopyOptions{ReadBack: f.readBack, Progress: a.ui.Sink(), Done: func(s *snapshot.Snapshot, d id.ID) {
		switch {
		case a.ui.JSON():
			o := struct {
				Event string `json:"event"`
				From  string `json:"from"`
				To    string `json:"to,omitempty"`
			}{Event: "copied", From: s.ID().String()}
			if !d.IsNull() {
				o.To = d.String()
			}
			a.ui.Object(o)
		case a.ui.Quiet():
		case d.IsNull():
			a.ui.Text("snapshot " + s.ID().Short() + " is there already")
		default:
			a.ui.Text("copied snapshot " + s.ID().Short() + " as " + d.Short())
		}
	}})
	if errors.Is(err, maintain.ErrSameRepository) {
		return usageError("%s and %s are the same repository", ui.Quote(from.Backend().Location()), ui.Quote(to.Backend().Location()))
	}
	if err != nil {
		return ui.WithHints(fmt.Errorf("cannot copy: %w", err), "What was stored stays there: the same command goes on where it was.")
	}
	for _, f := range res.Failed {
		a.ui.Warn("not copied: %v", f)
	}
	a.prolongLocks(ctx, to)
	switch {
	case a.ui.JSON():
		a.ui.Object(struct {
			Event   string `json:"event"`
			Verb    string `json:"verb"`
			Copied  int    `json:"copied"`
			Present int    `json:"present"`
			Failed  int    `json:"failed"`
			Blobs   int64  `json:"new_blobs"`
			Plain   int64  `json:"new_bytes"`
			Stored  int64  `json:"stored_bytes"`
		}{"summary", "copy", res.Copied, res.Present, len(res.Failed), res.Blobs, res.PlainBytes, res.StoredBytes})
	case !a.ui.Quiet():
		a.ui.Text(fmt.Sprintf("copied %s, %d were there; new: %s, %s, stored in %s", ui.Count(int64(res.Copied), "snapshot"), res.Present,
			ui.Count(res.Blobs, "blob"), ui.Bytes(res.PlainBytes), ui.Bytes(res.StoredBytes)))
	}
	if n := len(res.Failed); n > 0 {
		return ui.WithHints(fmt.Errorf("%s could not be copied, because the source is damaged", ui.Count(int64(n), "snapshot")),
			"`holdfast check --read-data` on the source tells what is damaged.")
	}
	return nil
}
