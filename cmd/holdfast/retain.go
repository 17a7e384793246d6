package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// prolongLocks keeps the files that the repository needs locked for as long as --s3-object-lock-days says, from now on.
// Failing is no reason to call a backup failed, but to say so.
func (a *app) prolongLocks(ctx context.Context, r *repo.Repository) {
	days := a.opt.remote.s3LockDays
	if days == 0 {
		return
	}
	path := ""
	if dir := a.cacheDir(); dir != "" && !a.opt.noCache {
		path = filepath.Join(dir, r.ID(), "locked")
	}
	now, renewed, err := r.Retain(ctx, time.Duration(days)*24*time.Hour, loadLocks(path), a.ui.Sink())
	if errors.Is(err, repo.ErrNoRetention) {
		return // new files would not have been stored
	}
	if serr := saveLocks(path, now); serr != nil {
		a.ui.Warn("the next backup asks again until when files are locked: %v", serr)
	}
	if err != nil {
		if ctx.Err() == nil {
			a.ui.Warn("the locks of some files of the repository could not be prolonged, so they may end before those of this snapshot: %v", err)
		}
		return
	}
	if renewed > 0 {
		a.ui.Sink().Emit(progress.Event{Kind: progress.Verbose, Message: "prolonged the locks of " + ui.Count(renewed, "file")})
	}
}

// locksHead is the first line of the file that remembers locks. A line for each file follows: name and Unix time.
const locksHead = "holdfast locks 1"

// loadLocks reads what saveLocks wrote. What cannot be read is asked for again.
func loadLocks(path string) repo.KnownLocks {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	known := repo.KnownLocks{}
	sc := bufio.NewScanner(bytes.NewReader(data))
	if !sc.Scan() || sc.Text() != locksHead {
		return nil
	}
	for sc.Scan() {
		name, at, _ := strings.Cut(sc.Text(), " ")
		sec, err := strconv.ParseInt(at, 10, 64)
		if err != nil {
			return nil
		}
		known[name] = time.Unix(sec, 0)
	}
	return known
}

func saveLocks(path string, known repo.KnownLocks) error {
	if path == "" {
		return nil
	}
	var b bytes.Buffer
	b.WriteString(locksHead + "\n")
	for _, name := range slices.Sorted(maps.Keys(known)) {
		fmt.Fprintf(&b, "%s %d\n", name, known[name].Unix())
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, b.Bytes(), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// locksObject says until when files of one type are locked, in JSON.
type locksObject struct {
	Event  string           `json:"event"`
	Type   string           `json:"type"`
	Files  int64            `json:"files"`
	Locked int64            `json:"locked"`
	First  *time.Time       `json:"first,omitempty"`
	Last   *time.Time       `json:"last,omitempty"`
	Modes  map[string]int64 `json:"modes"`
}

// showLocks tells until when the files of the repository are locked, where they can be. The result says why it
// cannot be told, or "".
func (a *app) showLocks(ctx context.Context, r *repo.Repository) string {
	list, err := r.Retentions(ctx, a.ui.Sink())
	if errors.Is(err, repo.ErrNoRetention) || ctx.Err() != nil {
		return ""
	}
	if err != nil {
		return fmt.Sprintf("it cannot be told until when files are locked: %v", err)
	}
	for _, x := range list {
		name := x.Type.String()
		if x.Type == backend.PackFile {
			name = "packs"
		}
		if a.ui.JSON() {
			o := locksObject{Event: "locks", Type: name, Files: x.Files, Locked: x.Locked, Modes: x.Modes}
			if x.Locked > 0 {
				first, last := x.First.UTC(), x.Last.UTC()
				o.First, o.Last = &first, &last
			}
			a.ui.Object(o)
			continue
		}
		if !a.ui.Quiet() {
			a.ui.Text(locksLine(name, &x))
		}
	}
	return ""
}

func locksLine(name string, x *repo.Retentions) string {
	line := fmt.Sprintf("locked: %-10s %d of %d", name+":", x.Locked, x.Files)
	if x.Locked == 0 {
		return line
	}
	at := func(t time.Time) string { return t.Local().Format("2006-01-02 15:04") }
	if first, last := at(x.First), at(x.Last); first == last {
		line += ", until " + first
	} else {
		line += ", until " + first + " to " + last
	}
	return line + " (" + ui.Clean(strings.ToLower(strings.Join(slices.Sorted(maps.Keys(x.Modes)), ", "))) + ")"
}
