package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/restore/newer"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// lostShown bounds the items that people see of each space without --verbose.
const lostShown = 20

// reportLost lists what is newer than the snapshot, and keeps copies of it if that is wanted.
func (a *app) reportLost(ctx context.Context, arg string, f *restoreFlags) error {
	what, p := snapshot.Split(arg)
	if p != "/" || isSpaceAddress(arg) {
		return usageError("--report-lost and --save-newer are about whole instances, not the part %s of a snapshot", ui.Quote(arg))
	}
	if f.inPlace || f.to.to != "" {
		return usageError("--report-lost and --save-newer change nothing in the instance: leave out --in-place and --to")
	}
	save := f.saveNewer
	if save != "" {
		var err error
		if save, err = filepath.Abs(save); err != nil {
			return err
		}
		if st, err := os.Stat(save); err == nil && !st.IsDir() {
			return ui.WithHints(usageError("--save-newer %s is not a directory", ui.Quote(save)), "Name one that is empty or does not exist.")
		}
	}
	return a.withRepository(ctx, repoOptions{}, readLock(f.noLock), func(ctx context.Context, r *repo.Repository) error {
		v, err := a.openView(ctx, r, what)
		if err != nil {
			return err
		}
		m := v.Manifest()
		inst, err := a.instanceHere(ctx, m, &f.place)
		if err != nil {
			return err
		}
		var stores []newer.Store
		for i := range m.Stores {
			was := &m.Stores[i]
			now := inst.Store(was.Name)
			if was.Name == "system" || now == nil {
				continue // no user has files there
			}
			if string(now.Layout) != was.Layout {
				return fmt.Errorf("store %s is laid out as %s here and as %s in the snapshot", ui.Quote(was.Name), now.Layout, ui.Quote(was.Layout))
			}
			st := newer.Store{Root: now.Root, Prefix: now.Prefix, Was: was}
			if now.S3 == nil && remoteDriver(now.Driver) && save != "" {
				return ui.WithHints(fmt.Errorf("the contents of store %s lie in a bucket, and the configuration does not say in which", ui.Quote(was.Name)),
					"--env-file names a file with the server's variables. Without --save-newer the list is made all the same.")
			}
			if now.S3 != nil && save != "" {
				b, err := a.bucketOf(ctx, now.S3)
				if err != nil {
					return fmt.Errorf("the contents of store %s: %w", ui.Quote(was.Name), err)
				}
				defer b.Close()
				st.Blobs = blobsIn{b}.Open
			}
			stores = append(stores, st)
		}
		begun := time.Now()
		shown := map[string]int{}
		o := newer.Options{Save: save, Found: func(it newer.Item) error {
			if a.ui.JSON() {
				out := struct {
					Event string `json:"event"`
					newer.Item
					PathRaw []byte `json:"path_raw,omitempty"`
				}{Event: "newer", Item: it}
				if !utf8.ValidString(it.Path) {
					out.PathRaw = []byte(it.Path)
				}
				a.ui.Object(out)
				return nil
			}
			if shown[it.Space]++; a.ui.Quiet() || shown[it.Space] > lostShown && !a.ui.Verbose() {
				return nil
			}
			line := fmt.Sprintf("%-8s %s", it.Kind, ui.Quote(it.Name+"/"+it.Path))
			if it.Was != "" {
				line += " (was " + ui.Quote(it.Was) + ")"
			}
			if !it.Dir {
				line += ", " + ui.Bytes(it.Bytes)
			}
			a.ui.Text(line)
			return nil
		}}
		list, err := newer.Run(ctx, r, *v.Snapshot().Tree, stores, o)
		if errors.Is(err, newer.ErrLayout) {
			return ui.WithHints(err, "`holdfast diff` of a new backup and this snapshot tells the same.")
		}
		if err != nil {
			return fmt.Errorf("cannot compare the instance with snapshot %s: %w", v.Snapshot().ID().Short(), err)
		}
		a.showLost(v.Snapshot(), list, save, time.Since(begun))
		return nil
	})
}

func (a *app) showLost(sn *snapshot.Snapshot, list []newer.Space, save string, took time.Duration) {
	if a.ui.JSON() {
		if list == nil {
			list = []newer.Space{}
		}
		a.ui.Object(struct {
			Event    string        `json:"event"`
			Verb     string        `json:"verb"`
			Snapshot string        `json:"snapshot"`
			Spaces   []newer.Space `json:"spaces"`
			SavedTo  string        `json:"saved_to,omitempty"`
			Seconds  float64       `json:"seconds"`
		}{"summary", "report-lost", sn.ID().String(), list, save, took.Seconds()})
		return
	}
	if len(list) == 0 {
		a.ui.Text("nothing is newer than snapshot " + sn.ID().Short())
		return
	}
	var rows [][]string
	for _, s := range list {
		remark := ""
		switch {
		case s.Gone:
			remark = "gone; comes back"
		case s.NotThen:
			remark = "the snapshot does not have this space"
		}
		rows = append(rows, []string{
			ui.Quote(s.Name), strconv.FormatInt(s.New, 10), strconv.FormatInt(s.Changed, 10), ui.Bytes(s.Bytes),
			strconv.FormatInt(s.Moved, 10), strconv.FormatInt(s.Deleted, 10), remark,
		})
	}
	lines := append([]string{""}, ui.Table([]string{"Space", ">New", ">Changed", ">Size", ">Moved", ">Deleted", "Remark"}, rows)...)
	lines = append(lines, "", "A restore of snapshot "+sn.ID().Short()+" over this instance loses what is new and changed, and brings back what was",
		"deleted and moved. Clients that sync then delete or replace their copies of it, too.")
	if save != "" {
		lines = append(lines, "copies of what is new and changed are in "+ui.Quote(save))
	} else {
		lines = append(lines, "--save-newer DIR keeps copies of what is new and changed.")
	}
	a.ui.Text(lines...)
}
