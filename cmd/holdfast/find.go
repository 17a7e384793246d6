package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// findFlags are the flags of find.
type findFlags struct {
	id, checksum, glob, in, since, until string
	ignoreCase, noLock                   bool
}

func (a *app) findCommand() *cobra.Command {
	var f findFlags
	c := &cobra.Command{
		Use:   "find [NAME]",
		Short: "Find a file in all snapshots",
		Long: `Find files and folders in all snapshots: by name, by a pattern, by the id or the
checksum that the server knows. Older versions and the trash are looked through as
well. It tells in which snapshots each state of a file is, where it lay, and since when
it is gone; with --json there is one object for each file and snapshot.

A pattern has * for any letters, ? for one and [abc] for one of these. One with a slash
is compared with the whole path in the space.

What the snapshots changed is remembered in the cache directory, so that the next
search is quick.

` + exitHelp(repoCodes...),
		Example: `  holdfast find notes.txt
  holdfast find --glob '*.ods' --in personal/alan --since 2026-11-01
  holdfast find --checksum 2fd4e1c67a2d28fced849ee1bb76e7391b93eb12 --json`,
		Args: args(0, 1, "at most one argument, the name"),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			q, err := f.query(args)
			if err != nil {
				return err
			}
			return a.withRepository(ctx, repoOptions{}, readLock(f.noLock), func(ctx context.Context, r *repo.Repository) error {
				return a.find(ctx, r, q, strings.TrimSuffix(f.in, "/"))
			})
		}),
	}
	fs := c.Flags()
	fs.StringVar(&f.glob, "glob", "", "find names that fit a `pattern`")
	fs.StringVar(&f.id, "id", "", "find the item with this `fileid`")
	fs.StringVar(&f.checksum, "checksum", "", "find contents with this `sha1`")
	fs.StringVar(&f.in, "in", "", "look into this `space` only: its alias, name, owner, or id:SPACEID")
	fs.StringVar(&f.since, "since", "", "look into snapshots from this `time` on only")
	fs.StringVar(&f.until, "until", "", "look into snapshots up to this `time` only")
	fs.BoolVarP(&f.ignoreCase, "ignore-case", "i", false, "let capital and small letters be the same")
	noLockFlag(c, &f.noLock)
	return c
}

func (f *findFlags) query(args []string) (*browse.Query, error) {
	q := &browse.Query{Glob: f.glob, FileID: f.id, SHA1: f.checksum, IgnoreCase: f.ignoreCase}
	if len(args) > 0 {
		q.Name = args[0]
	}
	if q.Name == "" && q.Glob == "" && q.FileID == "" && q.SHA1 == "" {
		return nil, ui.WithHints(usageError("find needs something to look for"),
			"Give a name, or one of --glob, --id and --checksum.")
	}
	if err := q.Check(); err != nil {
		return nil, withCode(exitUsage, err)
	}
	for _, t := range []struct {
		flag, text string
		to         *time.Time
		begin      bool
	}{{"--since", f.since, &q.Since, true}, {"--until", f.until, &q.Until, false}} {
		if t.text == "" {
			continue
		}
		at, ok := snapshot.ParseTime(t.text, time.Local)
		if !ok {
			return nil, usageError("%s is a time such as 2026-11-20 or 2026-11-20 14:00, not %q", t.flag, t.text)
		}
		if _, err := time.Parse(time.DateOnly, t.text); err == nil && t.begin {
			at = at.AddDate(0, 0, -1).Add(1) // from the beginning of the day
		}
		*t.to = at
	}
	if in := strings.TrimSuffix(f.in, "/"); in != "" {
		q.In = func(s *browse.SpaceInfo) bool { return isSpace(s, in) }
	}
	return q, nil
}

// byOwner makes the query take the personal space of the owner called in, too: by the name that the directory
// has for him in the newest snapshot, or else in the oldest one.
func (a *app) byOwner(ctx context.Context, r *repo.Repository, own []*snapshot.Snapshot, q *browse.Query, in string) error {
	if in == "" || strings.Contains(in, "/") || strings.HasPrefix(in, "id:") || len(own) == 0 {
		return nil
	}
	oldest, newest := own[0], own[0]
	for _, sn := range own {
		if sn.Time.Before(oldest.Time) {
			oldest = sn
		}
		if !sn.Time.Before(newest.Time) {
			newest = sn
		}
	}
	for _, sn := range []*snapshot.Snapshot{newest, oldest} {
		v, err := a.openView(ctx, r, sn.ID().String())
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			continue // the names of the spaces will do
		}
		var none *browse.AddressError
		s, rest, err := v.Resolve(ctx, in)
		if errors.As(err, &none) || err == nil && rest != "" {
			continue
		}
		if err != nil {
			return err
		}
		byName := q.In
		q.In = func(x *browse.SpaceInfo) bool { return x.ID == s.ID && x.Store == s.Store || byName(x) }
		return nil
	}
	return nil
}

// isSpace tells whether name names the space.
func isSpace(s *browse.SpaceInfo, name string) bool {
	if id, ok := strings.CutPrefix(name, "id:"); ok {
		return s.ID == id
	}
	return s.Folder == name || s.Name == name || s.ID == name || s.Folder == "personal/"+name
}

// findRow is a match as JSON.
type findRow struct {
	Event    string            `json:"event"`
	Snapshot string            `json:"snapshot"`
	Time     time.Time         `json:"snapshot_time"`
	Space    string            `json:"space"`
	SpaceID  string            `json:"space_id"`
	Name     string            `json:"name"`
	Path     string            `json:"path"`
	Raw      []byte            `json:"path_raw,omitempty"`
	Type     snapshot.NodeType `json:"type"`
	ID       string            `json:"id"`
	Size     uint64            `json:"size"`
	MTime    time.Time         `json:"mtime"`
	SHA1     string            `json:"sha1"`
	Kind     browse.Kind       `json:"kind"`
	Version  string            `json:"version,omitempty"`
	Deleted  string            `json:"deleted,omitempty"`
}

func newFindRow(sn *snapshot.Snapshot, m *browse.Match) *findRow {
	e := m.Entry
	row := &findRow{
		Event: "match", Snapshot: sn.ID().String(), Time: sn.Time.UTC(), Space: m.Space.Folder, SpaceID: m.Space.ID,
		Name: e.Name(), Path: e.Path, Type: snapshot.File, ID: m.Space.FileID(e.NodeID), Size: e.Size, MTime: e.MTime, SHA1: e.SHA1, Kind: e.Kind,
	}
	if e.Dir {
		row.Type = snapshot.Dir
	}
	if e.Kind == browse.Version {
		row.Version = e.Stamp
	} else if e.Kind == browse.Trashed {
		row.Deleted = e.Stamp
	}
	if !utf8.ValidString(e.Path) {
		row.Raw = []byte(e.Path)
	}
	return row
}

// history is what the snapshots changed, as far as the cache knows it.
func (a *app) history(r *repo.Repository) *browse.History {
	h := &browse.History{
		Repo: func(ctx context.Context) (browse.Repo, error) { return r, a.loadIndexOnce(ctx, r) },
		Warn: func(err error) { a.ui.Warn("%v", err) },
	}
	if dir := a.cacheDir(); dir != "" {
		h.Dir = filepath.Join(dir, snapshot.SafeName(r.ID()), "changes")
	}
	sink := a.ui.Sink()
	h.Progress = func(done, total int) {
		sink.Emit(progress.Event{Kind: progress.Update, Phase: "find", Done: int64(done), Total: int64(total), Unit: "snapshots"})
	}
	return h
}

// spansShown is how many lines are gathered before they are sorted and printed.
const spansShown = 100000

func (a *app) find(ctx context.Context, r *repo.Repository, q *browse.Query, in string) error {
	list, listErr := snapshot.List(ctx, r)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	own := snapshot.Own(list)
	if len(own) == 0 && len(list) > 0 {
		return errors.New("no snapshot of this repository was made by Holdfast, so there are no spaces to look into")
	}
	h := a.history(r)
	err := a.byOwner(ctx, r, own, q, in)
	if err != nil {
		return err
	}
	if a.ui.JSON() {
		out := bufio.NewWriterSize(a.ui.Writer(), 64<<10)
		h.Progress = nil // its lines would stand in the middle of ours
		enc := json.NewEncoder(out)
		enc.SetEscapeHTML(false)
		err = h.Find(ctx, own, q, func(sn *snapshot.Snapshot, list []*browse.Match) error {
			for _, m := range list {
				if err := enc.Encode(newFindRow(sn, m)); err != nil {
					return fmt.Errorf("cannot write the list: %w", err)
				}
			}
			return nil
		}, nil)
		if ferr := out.Flush(); err == nil && ferr != nil {
			err = fmt.Errorf("cannot write the list: %w", ferr)
		}
	} else {
		var found []*browse.Match
		n := 0
		err = h.Find(ctx, own, q, nil, func(m *browse.Match) error {
			if found = append(found, m); len(found) >= spansShown {
				n += len(found)
				a.showMatches(found)
				found = nil
			}
			return nil
		})
		a.ui.Sink().Emit(progress.Event{Kind: progress.Finish, Phase: "find"})
		if len(found) > 0 {
			a.showMatches(found)
		} else if n == 0 && err == nil {
			a.ui.Info("nothing was found in %s", ui.Count(int64(len(own)), "snapshot"))
		}
	}
	if err != nil {
		return err
	}
	return ui.WithHints(listErr, "`holdfast check` tells what is damaged.")
}

// showMatches prints states of files, each with the snapshots that have it.
func (a *app) showMatches(list []*browse.Match) {
	slices.SortFunc(list, func(x, y *browse.Match) int {
		return cmp.Or(strings.Compare(x.Space.Folder, y.Space.Folder), strings.Compare(x.Entry.Path, y.Entry.Path),
			strings.Compare(string(x.Entry.Kind), string(y.Entry.Kind)), strings.Compare(x.Entry.Stamp, y.Entry.Stamp), x.First.Time.Compare(y.First.Time))
	})
	rows := make([][]string, 0, len(list))
	day := func(t time.Time) string { return t.Local().Format(time.DateTime) }
	for _, m := range list {
		e := m.Entry
		what, size, state := string(e.Kind), "", "still there"
		switch {
		case e.Kind == browse.Version:
			what = "version " + e.Stamp
		case e.Dir && e.Kind == browse.Current:
			what = "folder"
		}
		if !e.Dir {
			size = ui.Bytes(int64(e.Size))
		}
		if m.Gone != nil {
			state = "gone in " + m.Gone.ID().Short()
		}
		rows = append(rows, []string{
			ui.Quote(m.Space.Folder + "/" + e.Path), ui.Quote(what), size, day(e.MTime), fmt.Sprint(m.Snapshots),
			m.First.ID().Short() + " " + day(m.First.Time), m.Last.ID().Short() + " " + day(m.Last.Time), state,
		})
	}
	a.ui.Text(ui.Table([]string{"Path", "What", ">Size", "Changed", ">Snapshots", "From", "To", ""}, rows)...)
}
