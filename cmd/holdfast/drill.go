package main

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-backup/holdfast/internal/drill"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
	"github.com/holdfast-backup/holdfast/internal/statedir"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

type drillFlags struct {
	scratch, program, reports string
	container, publicKey      string
	noServer, readData        bool
	noLock, verify            bool
	spaces                    int
	startTimeout              time.Duration
}

func (a *app) drillCommand() *cobra.Command {
	var f drillFlags
	c := &cobra.Command{
		Use:   "drill SNAPSHOT | drill --verify REPORT",
		Short: "Prove that a snapshot comes back",
		Long: `Prove that a snapshot comes back: restore it into a scratch directory, check whether
the result agrees with itself, start the server on it, and ask the server's API for
every space: names, sizes, checksums, versions and trash, and some contents. Then the
server is stopped, and all of it is removed.

The server is the program in the snapshot, or --server-binary. It runs in namespaces
of its own: it has no network but a loopback of its own, sees this machine's files
read-only and the original data not at all, and ends with this command. It need not be
root who starts the drill, if the kernel gives namespaces to others. With
--server-container the server runs in a container without network; that needs root.
It gets the variables that configured the original, but for those that would lead it
to mail, federation, identity providers, buckets, event stores or elsewhere.
Where there is no program, or no namespaces are to be had, the drill ends with the
check, and says so: no server is ever started that could reach others.

The report is printed, and written into --report-dir as .json and .txt. It is signed
with a key of this machine (drill/report.key in the state directory); --verify checks
that on this machine, and with --public-key anywhere: the text names that key.

The exit code is 1 if anything that was tested is wrong.

` + exitHelp(append([]int{exitIncomplete}, repoCodes...)...),
		Example: `  holdfast drill latest --scratch /srv/scratch
  holdfast drill latest --scratch /srv/scratch --server-binary /usr/local/bin/ocis
  holdfast drill latest --scratch /srv/scratch --server-container owncloud/ocis:7.1.0
  holdfast drill --verify /var/lib/holdfast/drill/2026-11-20T1400-5e87044e.json`,
		Args: args(1, 1, "one argument, a snapshot or a report"),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			if f.verify {
				return a.drillVerify(args[0], f.publicKey)
			}
			return a.drill(ctx, args[0], &f)
		}),
	}
	fs := c.Flags()
	fs.StringVar(&f.scratch, "scratch", "", "`directory` with room for the whole instance")
	fs.StringVar(&f.program, "server-binary", "", "the program `file` of the server (default: the one in the snapshot)")
	fs.StringVar(&f.container, "server-container", "", "start the server from this `image`, which the Docker engine of this machine has;\n\"snapshot\" is the one that the snapshot holds or names")
	fs.BoolVar(&f.noServer, "no-server", false, "start no server")
	fs.IntVar(&f.spaces, "spaces", 0, "ask the server for this `number` of spaces only, chosen by chance")
	fs.DurationVar(&f.startTimeout, "start-timeout", 5*time.Minute, "how long the server may take to be ready")
	fs.BoolVar(&f.readData, "read-data", false, "compare the checksums of all restored contents, not of a sample")
	fs.StringVar(&f.reports, "report-dir", "", "`directory` for the report (default: drill in the state directory)")
	fs.BoolVar(&f.verify, "verify", false, "check the signature of the report that is the argument")
	fs.StringVar(&f.publicKey, "public-key", "", "with --verify: the `key` (base64) that must have signed (default: that of this machine)")
	noLockFlag(c, &f.noLock)
	return c
}

func (a *app) drill(ctx context.Context, arg string, f *drillFlags) error {
	if f.publicKey != "" {
		return usageError("--public-key is only for --verify")
	}
	what, p := snapshot.Split(arg)
	if p != "/" {
		return usageError("a drill is about whole snapshots, not the path %s of one", ui.Quote(p))
	}
	if f.scratch == "" {
		return ui.WithHints(usageError("drill needs --scratch"), "It names a directory with room for the whole instance; what is put there is removed at the end.")
	}
	if f.spaces < 0 {
		return usageError("--spaces must not be negative")
	}
	switch {
	case f.container != "" && f.program != "":
		return usageError("--server-container and --server-binary are two servers; give one of them")
	case f.noServer && (f.container != "" || f.program != ""):
		return usageError("--no-server starts no server, so it goes with neither --server-container nor --server-binary")
	}
	state, err := statedir.Make(a.opt.stateDir, "drill")
	if err != nil {
		return err
	}
	key, err := drill.LoadKey(state)
	if err != nil {
		return err
	}
	var rep *drill.Report
	err = a.withRepository(ctx, repoOptions{}, readLock(f.noLock), func(ctx context.Context, r *repo.Repository) error {
		sn, err := a.findSnapshot(ctx, r, what)
		if err != nil {
			return err
		}
		list, err := snapshot.List(ctx, r)
		if err != nil {
			a.ui.Warn("%v", err)
		}
		if err := a.loadIndex(ctx, r); err != nil {
			return err
		}
		rep, err = drill.Run(ctx, r, list, sn, drill.Options{
			Scratch: f.scratch, Program: f.program, Image: f.container, NoServer: f.noServer, Spaces: f.spaces, StartTimeout: f.startTimeout, ReadData: f.readData,
			Version: version, Progress: a.ui.Sink(), Limits: a.restoreLimits(),
		})
		if err != nil {
			return fmt.Errorf("drill of snapshot %s: %w", sn.ID().Short(), err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if f.reports != "" {
		state = f.reports
	}
	file, err := a.keepReport(rep, key, state)
	if err != nil {
		return err
	}
	a.showDrill(rep, file)
	switch {
	case !rep.Complete:
		return withCode(exitIncomplete, fmt.Errorf("the snapshot is incomplete: %s missing", ui.Count(int64(rep.Missing), "blob")))
	case !rep.Passed:
		return errors.New("the drill has found something wrong")
	}
	return nil
}

// keepReport signs and writes the report.
func (a *app) keepReport(rep *drill.Report, key ed25519.PrivateKey, dir string) (string, error) {
	p, err := drill.Sign(rep, key)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("the report could not be kept: %w", err)
	}
	base := filepath.Join(dir, rep.Began.Format("2006-01-02T150405")+"-"+rep.Snapshot[:8])
	err = os.WriteFile(base+".json", append(p, '\n'), 0o600)
	if err == nil {
		text := append(drillText(rep), "", "Signed as "+filepath.Base(base)+".json with the key "+base64.StdEncoding.EncodeToString(key.Public().(ed25519.PublicKey)))
		err = os.WriteFile(base+".txt", []byte(strings.Join(text, "\n")+"\n"), 0o600)
	}
	if err != nil {
		return "", fmt.Errorf("the report could not be kept: %w", err)
	}
	return base + ".json", nil
}

type drillSummary struct {
	Event string `json:"event"`
	Verb  string `json:"verb"`
	*drill.Report
	File string `json:"file"`
}

func (a *app) showDrill(rep *drill.Report, file string) {
	if a.ui.JSON() {
		a.ui.Object(drillSummary{"summary", "drill", rep, file})
		return
	}
	a.ui.Text(drillText(rep)...)
	if !a.ui.Quiet() {
		a.ui.Text("", "kept and signed in "+ui.Quote(file))
	}
}

// drillText is the report for people.
func drillText(r *drill.Report) []string {
	verdict := "NOT PASSED"
	if r.Passed {
		verdict = "passed"
	}
	until := map[string]string{
		"restore": "the restore only", "consistency": "the restore and the check on disk, without a server", "server": "the restore, the check on disk, and the server",
	}[r.Tested]
	at := func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }
	out := []string{
		fmt.Sprintf("Drill of snapshot %s of %s on %s: %s", r.Snapshot[:8], ui.Quote(strings.TrimSpace(r.Product+" "+r.ProductVersion)), at(r.Began), verdict),
		"Tested: " + until,
		"The snapshot brings back: " + at(r.RecoversTo),
	}
	if r.Newest != nil {
		out = append(out, fmt.Sprintf("The newest moment that can be brought back: %s (snapshot %s)", at(*r.Newest), r.NewestSnapshot[:8]))
	}
	if !r.Complete {
		out = append(out, fmt.Sprintf("The snapshot is INCOMPLETE: %s missing", ui.Count(int64(r.Missing), "blob")))
	}
	seconds := func(s float64) string { return ui.Duration(time.Duration(s * float64(time.Second))) }
	out = append(out, fmt.Sprintf("Restored: %s, %s, in %s", ui.Count(r.Restore.Files, "file"), ui.Bytes(r.Restore.Bytes), seconds(r.Restore.Seconds)))
	for _, w := range r.Restore.Warnings {
		out = append(out, "  warning: "+ui.Clean(w))
	}
	if c := r.Consistency.Summary; c != nil {
		out = append(out, fmt.Sprintf("On disk: %s and %s of %s; %s of damage, %s",
			ui.Count(c.Nodes, "node"), ui.Count(c.Revisions, "version"), ui.Count(c.Spaces, "space"), ui.Count(c.Damage, "case"), ui.Count(c.Notes, "note")))
		for _, x := range r.Consistency.Findings {
			out = append(out, fmt.Sprintf("  %s: %s %s: %s", x.Class, ui.Quote(x.Name), ui.Quote(x.Path), ui.Clean(x.Detail)))
		}
		for _, l := range c.Limits {
			out = append(out, "  not looked at: "+ui.Clean(l))
		}
	}
	s := r.Server
	if s.NotRun != "" {
		out = append(out, "Server: not asked: "+ui.Clean(s.NotRun))
	} else {
		asked := int64(0)
		for _, x := range s.Spaces {
			if x.NotAsked == "" {
				asked++
			}
		}
		out = append(out, fmt.Sprintf("Server %s: ready after %s; asked for %s, %s", ui.Quote(s.Version), seconds(s.StartSeconds),
			ui.Count(asked, "space"), ui.Count(s.Differences, "difference")))
	}
	if v := s.Variables; v != nil && s.NotRun == "" {
		out = append(out, fmt.Sprintf("  with %s of the original; %d left out", ui.Count(int64(v.Used), "variable"), len(v.LeftOut)))
	}
	for _, x := range s.Spaces {
		if x.NotAsked != "" {
			out = append(out, fmt.Sprintf("  %s: not asked for: %s", ui.Quote(x.Alias), x.NotAsked))
			continue
		}
		out = append(out, fmt.Sprintf("  %s: %s, %s, %s, %s in the trash; %s read; %s", ui.Quote(x.Alias), ui.Count(x.Folders, "folder"), ui.Count(x.Files, "file"),
			ui.Count(x.Versions, "version"), ui.Count(x.Trash, "item"), ui.Count(x.Read, "content"), ui.Count(x.Count, "difference")))
		for _, d := range x.Differences {
			out = append(out, "    "+ui.Clean(d))
		}
		for _, n := range x.Notes {
			out = append(out, "    note: "+ui.Clean(n))
		}
	}
	took := "A real restore to a place as fast as this one would take about " + seconds(r.RealSeconds)
	if r.Tested != "server" {
		took += ", and what the server needs to start"
	}
	return append(out, took)
}

// reportKey is the key that must have signed: the one given, or that of this machine.
func (a *app) reportKey(given string) (ed25519.PublicKey, error) {
	if given != "" {
		p, err := base64.StdEncoding.DecodeString(given)
		if err != nil || len(p) != ed25519.PublicKeySize {
			return nil, usageError("--public-key is no key of a report")
		}
		return p, nil
	}
	state, err := statedir.Path(a.opt.stateDir, "drill")
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(state, "report.key")); err != nil {
		return nil, ui.WithHints(fmt.Errorf("this machine has no key for reports: %w", err), "--state-dir names the state directory of the drill, --public-key the key of another machine.")
	}
	key, err := drill.LoadKey(state)
	if err != nil {
		return nil, err
	}
	return key.Public().(ed25519.PublicKey), nil
}

func (a *app) drillVerify(file, given string) error {
	p, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("cannot read the report: %w", err)
	}
	key, err := a.reportKey(given)
	if err != nil {
		return err
	}
	rep, err := drill.Verify(p, key)
	if err != nil {
		return fmt.Errorf("%s: %w", ui.Quote(file), err)
	}
	a.showDrill(rep, file)
	return nil
}
