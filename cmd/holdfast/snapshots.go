package main

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

func (a *app) snapshotsCommand() *cobra.Command {
	var noLock bool
	c := &cobra.Command{
		Use:   "snapshots",
		Short: "List the snapshots in the repository",
		Long: `List the snapshots in the repository, oldest first. Snapshots that other programs
made are listed too; what only Holdfast records is left blank for them.

` + exitHelp(repoCodes...),
		Args: args(0, 0, "no arguments"),
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			return a.withRepository(ctx, repoOptions{}, readLock(noLock), a.snapshots)
		}),
	}
	noLockFlag(c, &noLock)
	return c
}

// noLockFlag adds --no-lock to a verb that only reads.
func noLockFlag(c *cobra.Command, to *bool) {
	c.Flags().BoolVar(to, "no-lock", false, "do not lock the repository, e.g. because it cannot be written to")
}

func readLock(noLock bool) lockMode {
	if noLock {
		return lockNone
	}
	return lockShared
}

// snapshotRow is what is told of a snapshot.
type snapshotRow struct {
	Event          string    `json:"event"`
	ID             string    `json:"id"`
	ShortID        string    `json:"short_id"`
	Time           time.Time `json:"time"`
	Hostname       string    `json:"hostname"`
	Tags           []string  `json:"tags"`
	Paths          []string  `json:"paths"`
	Parent         string    `json:"parent,omitempty"`
	Program        string    `json:"program_version,omitempty"`
	Product        string    `json:"product,omitempty"`
	ProductVersion string    `json:"product_version,omitempty"`
	Complete       *bool     `json:"complete,omitempty"` // absent: not one of Holdfast's
	Missing        int       `json:"missing,omitempty"`
	Crash          bool      `json:"crash_consistent,omitempty"`
	Spaces         *int      `json:"spaces,omitempty"`
	Files          *int64    `json:"files,omitempty"`
	Bytes          *int64    `json:"bytes,omitempty"`
}

func (a *app) snapshots(ctx context.Context, r *repo.Repository) error {
	list, listErr := snapshot.List(ctx, r)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if len(snapshot.Own(list)) > 0 {
		if err := a.loadIndex(ctx, r); err != nil {
			return err
		}
	}
	var rows [][]string
	for _, s := range list {
		row, err := describe(ctx, r, s)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			a.ui.Warn("snapshot %s: %v", s.ID().Short(), err)
		}
		if a.ui.JSON() {
			a.ui.Object(row)
			continue
		}
		rows = append(rows, row.cells())
	}
	if !a.ui.JSON() {
		if len(rows) > 0 {
			a.ui.Text(ui.Table([]string{"ID", "Time", "Host", "Product", "Complete", ">Spaces", ">Files", ">Size", "Tags"}, rows)...)
		}
		a.ui.Info("%s", ui.Count(int64(len(rows)), "snapshot"))
	}
	return ui.WithHints(listErr, "`holdfast check` tells what is damaged.")
}

// describe fills a row. The row is usable even with an error.
func describe(ctx context.Context, r *repo.Repository, s *snapshot.Snapshot) (*snapshotRow, error) {
	row := &snapshotRow{
		Event: "snapshot", ID: s.ID().String(), ShortID: s.ID().Short(), Time: s.Time.UTC(), Hostname: s.Hostname,
		Tags: append([]string{}, s.Tags...), Paths: append([]string{}, s.Paths...), Program: s.ProgramVersion,
	}
	if s.Parent != nil {
		row.Parent = s.Parent.String()
	}
	if s.Summary != nil {
		files, bytes := int64(s.Summary.TotalFilesProcessed), int64(s.Summary.TotalBytesProcessed)
		row.Files, row.Bytes = &files, &bytes
	}
	if !s.HasTag(snapshot.Tag) || s.Tree == nil {
		return row, nil
	}
	m, err := snapshot.LoadManifest(ctx, r, *s.Tree)
	if errors.Is(err, snapshot.ErrNoSuchPath) {
		return row, nil
	}
	if err != nil {
		return row, err
	}
	spaces, files, bytes := 0, int64(0), int64(0)
	for _, st := range m.Stores {
		for _, sp := range st.Spaces {
			files += sp.Files
			bytes += sp.Bytes
			// The system storage holds settings and shares in spaces that no user sees.
			if st.Name != "system" {
				spaces++
			}
		}
	}
	row.Product, row.ProductVersion = m.Product, m.ProductVersion
	row.Complete, row.Missing, row.Crash = &m.Proof.Complete, len(m.Proof.Missing), m.Freeze.CrashConsistent
	row.Spaces, row.Files, row.Bytes = &spaces, &files, &bytes
	return row, nil
}

func (r *snapshotRow) cells() []string {
	product := strings.TrimSpace(r.Product + " " + r.ProductVersion)
	complete, spaces, files, bytes := "", "", "", ""
	if r.Complete != nil {
		complete = "yes"
		if !*r.Complete {
			complete = "NO"
			if r.Missing > 0 {
				complete += ", " + strconv.Itoa(r.Missing) + " missing"
			}
		}
	}
	if r.Crash {
		complete += ", of a running instance"
	}
	if r.Spaces != nil {
		spaces = strconv.Itoa(*r.Spaces)
	}
	if r.Files != nil {
		files = strconv.FormatInt(*r.Files, 10)
	}
	if r.Bytes != nil {
		bytes = ui.Bytes(*r.Bytes)
	}
	tags := make([]string, len(r.Tags))
	for i, t := range r.Tags {
		tags[i] = ui.Quote(t)
	}
	return []string{
		r.ShortID, r.Time.Local().Format(time.DateTime), quoteOrBlank(r.Hostname), quoteOrBlank(product), complete,
		spaces, files, bytes, strings.Join(tags, ","),
	}
}

func quoteOrBlank(s string) string {
	if s == "" {
		return ""
	}
	return ui.Quote(s)
}
