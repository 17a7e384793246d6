package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/holdfast-backup/holdfast/internal/browse/save"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// toFlags are the flags of a restore of single things to a folder or an archive.
type toFlags struct {
	pick pickFlags
	to   string
	keep bool
}

// partSummary begins the final object of a restore of what an address names.
type partSummary struct {
	Event    string `json:"event"`
	Verb     string `json:"verb"`
	DryRun   bool   `json:"dry_run"`
	Snapshot string `json:"snapshot"`
	Space    string `json:"space"`
	Path     string `json:"path"`
	Kind     string `json:"kind"`
}

func summaryOf(p *picked, dryRun bool) partSummary {
	return partSummary{
		Event: "summary", Verb: "restore", DryRun: dryRun, Snapshot: p.sn.ID().String(), Space: p.item.Space.Folder,
		Path: p.item.Path, Kind: string(p.item.Kind),
	}
}

// saveSummary is the final object of a restore to a folder or an archive.
type saveSummary struct {
	partSummary
	To string `json:"to"`
	*save.Result
	Seconds float64 `json:"seconds"`
}

// restoreTo writes a file or folder of a space to where --to says.
func (a *app) restoreTo(ctx context.Context, arg string, f *restoreFlags) error {
	if !isSpaceAddress(arg) {
		return ui.WithHints(usageError("--to, --version, --trash and --keep-existing are about what is in a space, and %s names none", ui.Quote(arg)),
			"Such an address is SNAPSHOT:SPACE/PATH, e.g. latest:personal/alan/Reports.",
			"restic restores a folder by its place in the snapshot: restic restore ID --include PATH --target DIR")
	}
	if f.to.to == "" {
		return ui.WithHints(usageError("%s is a part of the snapshot: --to must say where it goes", ui.Quote(arg)),
			"--to DIR writes into a folder, --to FILE.tar or FILE.zip makes an archive.",
			"--live puts it back into the running instance, --in-place into the storage of the stopped one.")
	}
	return a.withRepository(ctx, repoOptions{}, readLock(f.noLock), func(ctx context.Context, r *repo.Repository) error {
		p, err := a.pick(ctx, r, arg, f.to.pick)
		if err != nil {
			return err
		}
		to, err := filepath.Abs(f.to.to)
		if err != nil {
			return err
		}
		begun := time.Now()
		sink := a.ui.Sink()
		count := progress.NewCounter(sink, "restore", "files")
		o := save.Options{DryRun: f.dryRun, Keep: f.to.keep, Now: begun, Progress: count.Add}
		var res *save.Result
		if format := save.FormatOf(f.to.to); format != "" {
			res, err = save.ToArchiveFile(ctx, p.view, p.item, format, to, o)
		} else {
			res, err = save.ToFolder(ctx, p.view, p.item, to, o)
		}
		count.Done()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		sum := saveSummary{partSummary: summaryOf(p, f.dryRun), To: to, Result: res, Seconds: time.Since(begun).Seconds()}
		a.showSaved(&sum)
		var failed *save.FailedError
		var mismatch *save.MismatchError
		switch {
		case err == nil || ctx.Err() != nil:
			return err
		case errors.As(err, &failed), errors.As(err, &mismatch):
			return ui.WithHints(err, "--json lists them all. Running it again writes only what is not right yet.")
		}
		return fmt.Errorf("cannot restore to %s: %w", ui.Quote(to), err)
	})
}

func (a *app) showSaved(s *saveSummary) {
	if a.ui.JSON() {
		a.ui.Object(s)
		return
	}
	r := s.Result
	for _, x := range r.Renamed {
		a.ui.Warn("%s could not have its own name and is called %s", ui.Quote(x.Path), ui.Quote(x.Name))
	}
	if more := r.Renames - int64(len(r.Renamed)); more > 0 {
		a.ui.Warn("and %s more could not have their own names", ui.Count(more, "item"))
	}
	for _, x := range r.Skipped {
		a.ui.Warn("%s is neither file nor folder and was left out", ui.Quote(x))
	}
	for _, x := range r.Failed {
		a.ui.Warn("%s was not written: %s", ui.Quote(x.Path), x.Error)
	}
	for _, x := range r.Mismatched {
		a.ui.Warn("%s has not the checksum that the server recorded", ui.Quote(x))
	}
	if a.ui.Quiet() {
		return
	}
	verb, was := "restored", "what was in the way is now "
	if s.DryRun {
		verb, was = "dry run, nothing changed; would restore", "what is in the way would become "
	}
	line := fmt.Sprintf("%s %s and %s, %s, to %s", verb, ui.Count(r.Files, "file"), ui.Count(r.Folders, "folder"), ui.Bytes(r.Bytes), ui.Quote(s.To))
	if r.Unchanged > 0 {
		line += fmt.Sprintf("; %d were right already", r.Unchanged)
	}
	if r.Kept > 0 {
		line += fmt.Sprintf("; %d differ and were kept", r.Kept)
	}
	a.ui.Text(line)
	for _, x := range r.MovedAside {
		a.ui.Text(was + ui.Quote(x))
	}
	if more := r.Moved - int64(len(r.MovedAside)); more > 0 {
		a.ui.Text(fmt.Sprintf("and %d more in the way likewise", more))
	}
}
