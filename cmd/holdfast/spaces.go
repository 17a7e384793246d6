package main

import (
	"context"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

func (a *app) spacesCommand() *cobra.Command {
	var noLock bool
	c := &cobra.Command{
		Use:   "spaces [SNAPSHOT]",
		Short: "List the spaces in a snapshot",
		Long: `List the spaces in a snapshot, by default the latest: what they are called, whose they
are, who has access, what they hold, and when they were changed last.

` + addressHelp + `

` + exitHelp(repoCodes...),
		Example: `  holdfast spaces
  holdfast spaces '2026-11-20 14:00' --json`,
		Args: args(0, 1, "at most one argument, the snapshot"),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			what := "latest"
			if len(args) > 0 {
				what = strings.TrimSuffix(args[0], ":")
			}
			return a.withRepository(ctx, repoOptions{}, readLock(noLock), func(ctx context.Context, r *repo.Repository) error {
				return a.spaces(ctx, r, what)
			})
		}),
	}
	noLockFlag(c, &noLock)
	return c
}

// spaceRow is a space as JSON.
type spaceRow struct {
	Event      string     `json:"event"`
	Snapshot   string     `json:"snapshot"`
	ID         string     `json:"id"`
	Name       string     `json:"name"`
	Kind       string     `json:"kind"`
	Alias      string     `json:"alias"`
	Address    string     `json:"address"` // what names it without doubt: the alias, or another if that is taken twice
	OwnerID    string     `json:"owner_id"`
	Owner      string     `json:"owner"` // name; "" for projects
	OwnerLogin string     `json:"owner_login,omitempty"`
	Members    []member   `json:"members"`
	Files      int64      `json:"files"`
	Bytes      int64      `json:"bytes"`
	Disabled   bool       `json:"disabled"`
	DisabledAt string     `json:"disabled_at,omitempty"`
	LastChange *time.Time `json:"last_change,omitempty"`
	Store      string     `json:"store"`
}

type member struct {
	ID      string     `json:"id"`
	Name    string     `json:"name"`
	Group   bool       `json:"group"`
	Role    string     `json:"role"`
	Expires *time.Time `json:"expires,omitempty"`
}

// spacesAtOnce is how many spaces are looked into at the same time: each waits for the repository mostly.
const spacesAtOnce = 8

func (a *app) spaces(ctx context.Context, r *repo.Repository, what string) error {
	v, err := a.openView(ctx, r, what)
	if err != nil {
		return err
	}
	list := v.Spaces()
	rows := make([]spaceRow, len(list))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(spacesAtOnce)
	for i, s := range list {
		g.Go(func() error {
			rows[i] = a.describeSpace(gctx, v, s)
			return gctx.Err()
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	var cells [][]string
	for i := range rows {
		if a.ui.JSON() {
			a.ui.Object(rows[i])
			continue
		}
		cells = append(cells, rows[i].cells())
	}
	if !a.ui.JSON() && len(cells) > 0 {
		a.ui.Text(ui.Table([]string{"Space", "Kind", "Name", "Owner", "Members", ">Files", ">Size", "Last change", ""}, cells)...)
	}
	return nil
}

// describeSpace fills a row. What cannot be read is left out, with a warning.
func (a *app) describeSpace(ctx context.Context, v *browse.View, s *browse.Space) spaceRow {
	row := spaceRow{
		Event: "space", Snapshot: v.Snapshot().ID().String(), ID: s.ID, Name: s.Name, Kind: s.Kind, Alias: s.Alias, Address: s.Folder,
		OwnerID: s.OwnerID, Files: s.Files, Bytes: s.Bytes, Disabled: s.Disabled != "", DisabledAt: s.Disabled, Store: s.Store,
		Members: []member{},
	}
	if s.Kind == "personal" {
		if who, err := v.Identities(ctx); err == nil {
			u := who.User(s.OwnerID)
			row.Owner, row.OwnerLogin = u.Name, u.Login
		}
	}
	root, err := v.Item(ctx, s, "")
	if err != nil {
		a.ui.Warn("%v", err)
		return row
	}
	if t, err := v.LastChange(ctx, s); err == nil {
		t = t.UTC()
		row.LastChange = &t
	}
	members, err := v.Members(ctx, root)
	if err != nil && ctx.Err() == nil {
		a.ui.Warn("the members of %s cannot be told: %v", ui.Quote(s.Folder), err)
	}
	for _, m := range members {
		x := member{ID: m.Principal, Name: m.Name, Group: m.Group, Role: m.Role}
		if !m.Expires.IsZero() {
			x.Expires = &m.Expires
		}
		row.Members = append(row.Members, x)
	}
	return row
}

func (r *spaceRow) cells() []string {
	names := make([]string, 0, len(r.Members))
	for _, m := range r.Members {
		if m.ID == r.OwnerID && r.Kind == "personal" {
			continue // owns it
		}
		names = append(names, ui.Quote(m.Name))
	}
	const shown = 4
	if more := len(names) - shown; more > 0 {
		names = append(names[:shown], "and "+strconv.Itoa(more)+" more")
	}
	last, state := "", ""
	if r.LastChange != nil {
		last = r.LastChange.Local().Format(time.DateTime)
	}
	if r.Disabled {
		state = "disabled"
	}
	return []string{
		ui.Quote(r.Address), quoteOrBlank(r.Kind), quoteOrBlank(r.Name), quoteOrBlank(r.Owner), strings.Join(names, ", "),
		strconv.FormatInt(r.Files, 10), ui.Bytes(r.Bytes), last, state,
	}
}
