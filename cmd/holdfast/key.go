package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

func (a *app) keyCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "key",
		Short: "Manage the passwords of the repository",
		Long: `A repository can have several passwords; each opens all of it. A key file belongs to
each password.

` + exitHelp(repoCodes...),
		Args: a.noSuchCommand,
		RunE: func(c *cobra.Command, _ []string) error {
			return ui.WithHints(usageError("%s needs a command", c.CommandPath()), fmt.Sprintf("`%s --help` lists the commands.", c.CommandPath()))
		},
	}
	var noLock bool
	list := &cobra.Command{
		Use:   "list",
		Short: "List the keys",
		Long:  "List the keys of the repository. The one that was used is marked.\n\n" + exitHelp(repoCodes...),
		Args:  args(0, 0, "no arguments"),
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			return a.withRepository(ctx, repoOptions{}, readLock(noLock), a.keyList)
		}),
	}
	noLockFlag(list, &noLock)

	var newFile, newCommand string
	newFlags := func(c *cobra.Command) *cobra.Command {
		c.Flags().StringVar(&newFile, "new-password-file", "", "`file` with the new password")
		c.Flags().StringVar(&newCommand, "new-password-command", "", "shell `command` that prints the new password")
		return c
	}
	add := newFlags(&cobra.Command{
		Use:   "add",
		Short: "Add a password",
		Long:  "Add a password. The others stay.\n\n" + exitHelp(repoCodes...),
		Args:  args(0, 0, "no arguments"),
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			return a.withRepository(ctx, repoOptions{}, lockShared, func(ctx context.Context, r *repo.Repository) error {
				return a.keyAdd(ctx, r, newFile, newCommand)
			})
		}),
	})
	remove := &cobra.Command{
		Use:   "remove ID",
		Short: "Remove a password",
		Long: `Remove the password whose key has this id, or one that begins so. The password that
was used to open the repository cannot be removed.

` + exitHelp(repoCodes...),
		Args: args(1, 1, "one argument, the id of a key"),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withRepository(ctx, repoOptions{}, lockExclusive, func(ctx context.Context, r *repo.Repository) error {
				return a.keyRemove(ctx, r, args[0])
			})
		}),
	}
	passwd := newFlags(&cobra.Command{
		Use:   "passwd",
		Short: "Change the password",
		Long: `Change the password that was used to open the repository: add a new one, then
remove the old one. Whoever has copied the old key file and knows the old password
can still open the repository.

` + exitHelp(repoCodes...),
		Args: args(0, 0, "no arguments"),
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			return a.withRepository(ctx, repoOptions{}, lockExclusive, func(ctx context.Context, r *repo.Repository) error {
				return a.keyPasswd(ctx, r, newFile, newCommand)
			})
		}),
	})
	c.AddCommand(list, add, remove, passwd)
	return c
}

func (a *app) keyList(ctx context.Context, r *repo.Repository) error {
	keys, err := r.Keys(ctx)
	if err != nil {
		return fmt.Errorf("cannot list the keys: %w", err)
	}
	var rows [][]string
	for _, k := range keys {
		if a.ui.JSON() {
			a.ui.Object(struct {
				Event string `json:"event"`
				repo.KeyInfo
			}{"key", k})
			continue
		}
		mark := ""
		if k.Current {
			mark = "*"
		}
		rows = append(rows, []string{mark, k.ID.Short(), k.Created.Local().Format(time.DateTime), quoteOrBlank(k.Username), quoteOrBlank(k.Hostname)})
	}
	if !a.ui.JSON() {
		a.ui.Text(ui.Table([]string{"", "ID", "Created", "User", "Host"}, rows)...)
	}
	return nil
}

// keySummary is the final object of add, remove and passwd.
type keySummary struct {
	Event   string `json:"event"`
	Verb    string `json:"verb"`
	Added   string `json:"added,omitempty"`
	Removed string `json:"removed,omitempty"`
}

func (a *app) keyAdd(ctx context.Context, r *repo.Repository, file, command string) error {
	pw, err := a.newPassword(ctx, file, command)
	if err != nil {
		return err
	}
	d, err := r.AddKey(ctx, pw)
	if err != nil {
		return fmt.Errorf("cannot add the password: %w", err)
	}
	a.keyDone(keySummary{Verb: "key add", Added: d.String()}, "added key "+d.Short())
	return nil
}

func (a *app) keyDone(s keySummary, text string) {
	s.Event = "summary"
	switch {
	case a.ui.JSON():
		a.ui.Object(s)
	case !a.ui.Quiet():
		a.ui.Text(text)
	}
}

func (a *app) keyRemove(ctx context.Context, r *repo.Repository, prefix string) error {
	d, err := r.FindFile(ctx, backend.KeyFile, strings.ToLower(prefix))
	if err != nil {
		return ui.WithHints(fmt.Errorf("key %s: %w", ui.Quote(prefix), err), "`holdfast key list` lists the keys.")
	}
	if d == r.CurrentKey() {
		return ui.WithHints(fmt.Errorf("cannot remove key %s: it belongs to the password in use", d.Short()),
			"`holdfast key passwd` changes that password.")
	}
	if err := r.RemoveKey(ctx, d); err != nil {
		return fmt.Errorf("cannot remove key %s: %w", d.Short(), err)
	}
	a.keyDone(keySummary{Verb: "key remove", Removed: d.String()}, "removed key "+d.Short())
	return nil
}

// keyPasswd adds the new password, proves that it opens the repository, and then removes the old.
func (a *app) keyPasswd(ctx context.Context, r *repo.Repository, file, command string) error {
	old := r.CurrentKey()
	pw, err := a.newPassword(ctx, file, command)
	if err != nil {
		return err
	}
	added, err := r.AddKey(ctx, pw)
	if err != nil {
		return fmt.Errorf("cannot add the new password: %w", err)
	}
	again, err := repo.Open(ctx, r.Backend(), pw, repo.Options{KeyHint: added.String()})
	if err == nil {
		err = again.RemoveKey(ctx, old)
	}
	if err != nil {
		return ui.WithHints(fmt.Errorf("the new password was added as key %s, but the old one is still there: %w", added.Short(), err),
			fmt.Sprintf("Remove it with `holdfast key remove %s`, using the new password.", old.Short()))
	}
	a.keyDone(keySummary{Verb: "key passwd", Added: added.String(), Removed: old.String()}, "changed the password: key "+added.Short()+" instead of "+old.Short())
	return nil
}
