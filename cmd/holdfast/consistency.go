package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/bucket"
	"github.com/holdfast-backup/holdfast/internal/consistency"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/freeze"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// consistencyFlags are the flags of consistency.
type consistencyFlags struct {
	place                  placeFlags
	readData, fail, noLock bool
	stores                 []string
}

func (a *app) consistencyCommand() *cobra.Command {
	var f consistencyFlags
	c := &cobra.Command{
		Use:   "consistency [SNAPSHOT]",
		Short: "Check whether the data of an instance agrees with itself",
		Long: `Check whether what an instance keeps agrees with itself: nodes and their metadata,
the links between them, blobs with their sizes and checksums, the sizes of folders,
indexes, shares, uploads that are not finished. Nothing is changed.

Without an argument the instance itself is checked, or a view of one whose path is
given; with one, a snapshot in the repository. It may be running: what is found is
then looked at a second time, and only what is found twice is reported.

What is found is damage or a note. Damage is what users or the server will notice, or
what is lost. Notes are leftovers and what is in progress; a server in good order
has some, such as blobs that nothing refers to.

Checksums are compared for a sample of the files, another one each day: about 2 in
100 of at most 64 MiB, and at least 20 of each space. With --read-data all are read.

The exit code is 0 whatever is found; with --fail it is 1 if damage was found.

` + exitHelp(repoCodes...),
		Example: `  holdfast consistency --base-data-path /srv/ocis/data --config-dir /srv/ocis/config
  holdfast consistency --json --fail --read-data
  holdfast consistency latest`,
		Args: args(0, 1, "no argument, or a snapshot"),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			if len(args) == 0 {
				return a.consistencyHere(ctx, &f)
			}
			return a.consistencyOf(ctx, args[0], &f)
		}),
	}
	f.place.add(c)
	fs := c.Flags()
	fs.BoolVar(&f.readData, "read-data", false, "compare the checksum of every file, which reads them all")
	fs.BoolVar(&f.fail, "fail", false, "end with exit code 1 if damage is found")
	fs.StringArrayVar(&f.stores, "store", nil, "check this `store` only (users, system, ...); may be repeated")
	noLockFlag(c, &f.noLock)
	return c
}

// consistencyHere checks an instance in its directories.
func (a *app) consistencyHere(ctx context.Context, f *consistencyFlags) error {
	o, err := f.place.options(a)
	if err != nil {
		return err
	}
	o.NoSizes = true
	inst, err := discover.Discover(ctx, o)
	if err != nil {
		return explain(ctx, fmt.Errorf("cannot find the instance: %w", err))
	}
	for _, w := range inst.Warnings {
		a.ui.Warn("%s", w)
	}
	var list []consistency.Store
	var roots []string
	for i := range inst.Stores {
		st := &inst.Stores[i]
		d, err := consistency.OpenDir(st.Root, string(st.Layout), st.Prefix)
		if errors.Is(err, fs.ErrNotExist) && st.Name != "users" {
			continue // never used
		}
		if err != nil {
			return ui.WithHints(fmt.Errorf("cannot check the store %s: %w", ui.Quote(st.Name), err),
				"`holdfast discover` shows where Holdfast looks for it; --map or --env-file tells where it is.")
		}
		defer d.Close()
		roots = append(roots, st.Root)
		s := consistency.Store{
			Name: st.Name, Place: d, Layout: string(st.Layout), Prefix: st.Prefix,
			Remote: st.S3 != nil || remoteDriver(st.Driver),
		}
		if st.S3 != nil {
			b, err := a.bucketOf(ctx, st.S3)
			var keys *bucket.KeysError
			switch {
			case errors.As(err, &keys): // the rest can be checked
				a.ui.Warn("%v: its objects are not looked at", err)
			case err != nil:
				return fmt.Errorf("the blobs of store %s: %w", ui.Quote(st.Name), err)
			default:
				defer b.Close()
				s.Blobs = blobsIn{b}
			}
		}
		list = append(list, s)
	}
	for _, d := range inst.DataSets {
		if d.Found {
			roots = append(roots, d.Path)
		}
	}
	opt := consistency.Options{}
	use, err := freeze.Look(ctx, roots)
	if err != nil {
		return err
	}
	if opt.Live = use.Err() != nil || len(use.Limits) > 0; use.Err() != nil {
		a.ui.Info("the instance is running: what is found is looked at a second time")
	}
	return a.consistency(ctx, list, opt, f)
}

// remoteDriver tells the drivers that keep blobs in a bucket.
func remoteDriver(driver string) bool {
	_, ok := s3Drivers[driver]
	return ok
}

// consistencyOf checks a snapshot.
func (a *app) consistencyOf(ctx context.Context, arg string, f *consistencyFlags) error {
	what, p := snapshot.Split(arg)
	if p != "/" {
		return ui.WithHints(usageError("consistency checks whole snapshots, not the path %s of one", ui.Quote(p)),
			"--store limits the check to one store.")
	}
	return a.withRepository(ctx, repoOptions{}, readLock(f.noLock), func(ctx context.Context, r *repo.Repository) error {
		sn, err := a.findSnapshot(ctx, r, what)
		if err != nil {
			return err
		}
		if err := a.loadIndex(ctx, r); err != nil {
			return err
		}
		if sn.Tree == nil {
			return fmt.Errorf("snapshot %s has no tree", sn.ID().Short())
		}
		m, err := snapshot.LoadManifest(ctx, r, *sn.Tree)
		if errors.Is(err, snapshot.ErrNoSuchPath) {
			return fmt.Errorf("snapshot %s was not made by Holdfast: %w", sn.ID().Short(), err)
		}
		if err != nil {
			return fmt.Errorf("snapshot %s: %w", sn.ID().Short(), err)
		}
		var list []consistency.Store
		for i := range m.Stores {
			st := &m.Stores[i]
			tars := consistency.NewTars(r, *sn.Tree, st)
			if st.Bucket != nil && st.Bucket.Way != snapshot.WayCopy {
				src, err := a.openSource(ctx, a.instanceThere(ctx, m, &f.place), st)
				var keys *bucket.KeysError
				switch {
				case errors.As(err, &keys):
					a.ui.Warn("%v: the contents of store %s, which are there, are not looked at", err, ui.Quote(st.Name))
				case err != nil:
					return fmt.Errorf("the contents of store %s: %w", ui.Quote(st.Name), err)
				default:
					defer src.Close()
					tars.Object = blobsIn{src}.object
				}
			}
			// The archives name objects as if they were files.
			list = append(list, consistency.Store{Name: st.Name, Place: tars, Layout: st.Layout, Prefix: st.Prefix, Remote: remoteDriver(st.Driver) && st.Bucket == nil})
		}
		return a.consistency(ctx, list, consistency.Options{}, f)
	})
}

// notesShown bounds the notes of one class that people see without --verbose.
const notesShown = 10

// consistencyFinding is the JSON of a finding.
type consistencyFinding struct {
	Event string `json:"event"`
	consistency.Finding
	PathRaw []byte `json:"path_raw,omitempty"`
}

func (a *app) consistency(ctx context.Context, list []consistency.Store, o consistency.Options, f *consistencyFlags) error {
	for _, name := range f.stores {
		if !slices.ContainsFunc(list, func(s consistency.Store) bool { return s.Name == name }) {
			return usageError("there is no store %q here", name)
		}
	}
	if len(f.stores) > 0 {
		list = slices.DeleteFunc(list, func(s consistency.Store) bool { return !slices.Contains(f.stores, s.Name) })
	}
	began := time.Now()
	o.ReadData, o.Progress = f.readData, a.ui.Sink()
	o.Seed = uint64(began.Unix() / (24 * 60 * 60))
	o.Now = began
	shown := map[consistency.Class]int{}
	o.Found = func(x consistency.Finding) error {
		if a.ui.JSON() {
			out := consistencyFinding{Event: "finding", Finding: x}
			if !utf8.ValidString(x.Path) {
				out.PathRaw = []byte(x.Path)
			}
			a.ui.Object(out)
			return nil
		}
		if x.Severity == consistency.Note {
			if shown[x.Class]++; a.ui.Quiet() || shown[x.Class] > notesShown && !a.ui.Verbose() {
				return nil
			}
		}
		a.ui.Text(findingLine(&x))
		return nil
	}
	sum, err := consistency.Run(ctx, list, o)
	if err != nil {
		return fmt.Errorf("cannot check the data: %w", err)
	}
	seconds := time.Since(began)
	if a.ui.JSON() {
		a.ui.Object(struct {
			Event string `json:"event"`
			Verb  string `json:"verb"`
			Live  bool   `json:"live"`
			*consistency.Summary
			Seconds float64 `json:"seconds"`
		}{"summary", "consistency", o.Live, sum, seconds.Seconds()})
	} else if !a.ui.Quiet() {
		a.showConsistency(sum, shown, seconds)
	}
	if f.fail && sum.Damage > 0 {
		return ui.WithHints(fmt.Errorf("damage was found: %s", ui.Count(sum.Damage, "finding")),
			"`holdfast restore SNAPSHOT:SPACE/PATH` gives back single files and folders from a backup.")
	}
	return nil
}

func findingLine(x *consistency.Finding) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s: %s", x.Severity, x.Class, ui.Quote(x.Store))
	name := x.Name
	if name == "" {
		name = x.Space
	}
	for _, s := range []string{name, x.Path} {
		if s != "" {
			b.WriteString(", " + ui.Quote(s))
		}
	}
	if x.Node != "" {
		b.WriteString(", node " + ui.Quote(x.Node))
	}
	if x.Blob != "" {
		b.WriteString(", blob " + ui.Quote(x.Blob))
	}
	if x.Class == consistency.BlobOrphaned {
		b.WriteString(", " + ui.Bytes(x.Bytes))
	}
	return b.String() + ": " + ui.Clean(x.Detail)
}

func (a *app) showConsistency(sum *consistency.Summary, shown map[consistency.Class]int, took time.Duration) {
	var lines []string
	for _, c := range slices.Sorted(maps.Keys(shown)) {
		if n := shown[c]; n > notesShown && !a.ui.Verbose() {
			lines = append(lines, fmt.Sprintf("note: %s: %d more, which --verbose or --json lists", c, n-notesShown))
		}
	}
	lines = append(lines, fmt.Sprintf("checked %s: %s, %s, %s in the trash; %s (%s); %s compared (%s read); %s; took %s",
		ui.Count(sum.Spaces, "space"), ui.Count(sum.Nodes, "node"), ui.Count(sum.Revisions, "version"), ui.Count(sum.TrashItems, "item"),
		ui.Count(sum.Blobs, "blob"), ui.Bytes(sum.Bytes), ui.Count(sum.Checksums, "checksum"), ui.Bytes(sum.ReadBytes),
		ui.Count(sum.Shares, "share"), ui.Duration(took)))
	if sum.Orphans > 0 {
		lines = append(lines, fmt.Sprintf("nothing refers to %s of %s", ui.Count(sum.Orphans, "blob"), ui.Bytes(sum.OrphanBytes)))
	}
	if sum.InFlight > 0 {
		lines = append(lines, ui.Count(sum.InFlight, "upload")+" not finished by the server yet")
	}
	for _, l := range sum.Limits {
		lines = append(lines, "not checked: "+ui.Clean(l))
	}
	if sum.Damage == 0 {
		lines = append(lines, fmt.Sprintf("no damage (%s)", ui.Count(sum.Notes, "note")))
	} else {
		lines = append(lines, fmt.Sprintf("DAMAGE: %s (and %s)", ui.Count(sum.Damage, "finding"), ui.Count(sum.Notes, "note")))
	}
	a.ui.Text(lines...)
}
