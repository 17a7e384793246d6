// Command run measures Holdfast beside restic and borg on a generated instance, and writes the
// figures as Markdown:
//
//	go build -o holdfast ./cmd/holdfast
//	go run ./bench/run -files 20000 -bytes 4GB -scratch /var/tmp/bench -o docs/BENCHMARKS.md
//
// With -downtime it measures instead for how long the service is down: see downtime.go; with -remote, how
// it works over a slow link: see remote.go.
//
// All programs back up the same store in the same run. Before each timed backup the whole store is
// read once, so that the page cache holds it if memory suffices, and what was written before is
// flushed to the disk. A sparse image of a disk will not do: who writes to a place of it first has to
// wait for it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/bench/internal/measure"
	"github.com/holdfast-backup/holdfast/internal/storegen"
	"github.com/holdfast-backup/holdfast/internal/testfixture"
)

type options struct {
	holdfast string
	scratch  string
	files    int
	bytes    measure.Bytes
	seed     uint64
	spaces   int
	runs     int
	changed  float64
	tools    string
	borg     bool
	steps    string
	verify   bool
	keep     bool
	cold     bool
	downtime bool
	remote   bool
	link     measure.Bytes // a second
	latency  time.Duration
	objects  int
	note     string
	out      string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "bench:", err)
		}
		os.Exit(1)
	}
}

func parse(args []string, stderr *os.File) (*options, error) {
	o := &options{bytes: 4e9, link: 100e6 / 8}
	f := flag.NewFlagSet("run", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.holdfast, "holdfast", "./holdfast", "the program to measure")
	f.StringVar(&o.scratch, "scratch", "", "directory for store, repositories and restored files")
	f.IntVar(&o.files, "files", 20000, "users' files of the store")
	f.Var(&o.bytes, "bytes", "size of all blobs together, such as 4GB")
	f.Uint64Var(&o.seed, "seed", 1, "seed of the store")
	f.IntVar(&o.spaces, "spaces", 0, "users' spaces; 0: one for 500 files")
	f.IntVar(&o.runs, "n", 3, "runs of each step, but one of those that take more than 5 minutes")
	f.Float64Var(&o.changed, "changed", 0.01, "fraction of the files that the step \"changed\" changes")
	f.StringVar(&o.tools, "tools", "holdfast,restic", "programs to measure, in this order")
	f.BoolVar(&o.borg, "borg", false, "measure borg too")
	f.StringVar(&o.steps, "steps", "", "steps to measure, of: "+strings.Join(stepKeys(), ",")+"; a first backup is made in any case (default: all)")
	f.BoolVar(&o.verify, "verify", true, "restore each kind of snapshot once and compare it with the store, and check the repositories with all their data; outside the timing")
	f.BoolVar(&o.keep, "keep", false, "leave repositories and restored files behind")
	f.BoolVar(&o.cold, "cold", true, "drop the page cache before the steps that are to be cold; needs root, and all of the machine feels it")
	f.BoolVar(&o.downtime, "downtime", false, "measure for how long the service is down instead, on ext4 and btrfs on loop devices; needs root")
	f.BoolVar(&o.remote, "remote", false, "measure a repository and a bucket on an S3 server behind a slow link instead; needs versitygw")
	f.Var(&o.link, "link", "with -remote: bandwidth of the link a second, such as 12.5MB")
	f.DurationVar(&o.latency, "latency", 20*time.Millisecond, "with -remote: time that each byte is under way")
	f.IntVar(&o.objects, "objects", 1_000_000, "with -remote: objects of the bucket that only has a listing; 0: none")
	f.StringVar(&o.note, "note", "", "with -remote: a sentence about the machine for the report")
	f.StringVar(&o.out, "o", "", "Markdown file in which the section for these sizes is replaced or added")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	switch {
	case f.NArg() > 0:
		return nil, fmt.Errorf("unexpected argument %q", f.Arg(0))
	case o.scratch == "":
		return nil, errors.New("-scratch is missing: name a directory on the disk to measure")
	case o.downtime && o.remote:
		return nil, errors.New("-downtime and -remote are two measurements: give one of them")
	case o.link < 1 || o.latency < 0 || o.objects < 0:
		return nil, errors.New("-link must be at least 1, -latency and -objects not negative")
	case o.runs < 1 || o.files < 1 || o.bytes < 1:
		return nil, errors.New("-n, -files and -bytes must be at least 1")
	}
	if _, err := parseSteps(o.steps); err != nil {
		return nil, err
	}
	if o.borg && !strings.Contains(o.tools, "borg") {
		o.tools += ",borg"
	}
	return o, nil
}

// bench is one run of everything.
type bench struct {
	ctx     context.Context
	o       *options
	log     *os.File
	scratch string
	store   string
	record  *storegen.Record
	tools   []*tool
	costs   map[string]map[string][]measure.Cost // step -> tool or limit
	usage   map[string]map[string]usage          // step -> tool
	free    measure.Space
	notes   []string
	warm    bool // the page cache was not dropped
	// restores counts what was restored and discarded.
	restores int
	// mutations is how often the store was changed.
	mutations int
	wanted    map[string]bool
	checked   map[string]bool // steps and programs whose snapshot was compared with the store
}

// usage is what a repository takes.
type usage struct {
	files, bytes, entries int64 // entries of the index; -1 where they could not be counted
}

// Steps, in their order.
const (
	stepFirst     = "first backup"
	stepUnchanged = "unchanged"
	stepChanged   = "changed"
	stepRestore   = "restore all"
	stepSpace     = "restore one space"
	stepFile      = "show one file, cold"
	stepList      = "list a folder, cold"
	stepCheck     = "check"
)

var steps = []string{stepFirst, stepUnchanged, stepChanged, stepRestore, stepSpace, stepFile, stepList, stepCheck}

// stepNames are the steps' names in -steps.
var stepNames = map[string]string{
	stepFirst: "first", stepUnchanged: "unchanged", stepChanged: "changed", stepRestore: "restore",
	stepSpace: "space", stepFile: "file", stepList: "list", stepCheck: "check",
}

func stepKeys() []string {
	var out []string
	for _, s := range steps {
		out = append(out, stepNames[s])
	}
	return out
}

// parseSteps reads -steps.
func parseSteps(list string) (map[string]bool, error) {
	out := map[string]bool{stepFirst: true} // nothing goes without
	if list == "" {
		list = strings.Join(stepKeys(), ",")
	}
	for key := range strings.SplitSeq(list, ",") {
		i := slices.Index(stepKeys(), strings.TrimSpace(key))
		if i < 0 {
			return nil, fmt.Errorf("-steps names %q: there are %s", key, strings.Join(stepKeys(), ", "))
		}
		out[steps[i]] = true
	}
	return out, nil
}

// long is from when on one run of a step is enough.
const long = 5 * time.Minute

// due tells whether a program is to run a step once more.
func (b *bench) due(step string, t *tool) bool {
	costs := b.costs[step][t.name]
	return b.wanted[step] && len(costs) < b.o.runs && !slices.ContainsFunc(costs, func(c measure.Cost) bool { return c.Wall > long })
}

// inTurn returns the programs in the order of a round: each is the first as often as the others. What ran before leaves the disk busy for a
// while, also after a sync.
func (b *bench) inTurn(round int) []*tool {
	first := round % len(b.tools)
	return slices.Concat(b.tools[first:], b.tools[:first])
}

// ofStore are the steps that read the store.
var ofStore = []string{stepFirst, stepUnchanged, stepChanged}

func run(ctx context.Context, args []string, stdout io.Writer, stderr *os.File) error {
	o, err := parse(args, stderr)
	if err != nil {
		return err
	}
	if o.downtime {
		return runDowntime(ctx, o, stdout, stderr)
	}
	if o.remote {
		return runRemote(ctx, o, stdout, stderr)
	}
	b := &bench{ctx: ctx, o: o, log: stderr, costs: map[string]map[string][]measure.Cost{}, usage: map[string]map[string]usage{}, checked: map[string]bool{}}
	if b.wanted, err = parseSteps(o.steps); err != nil {
		return err
	}
	if err := b.prepare(); err != nil {
		return err
	}
	err = errors.Join(b.measure(), os.RemoveAll(b.discarded()))
	if !o.keep {
		for _, t := range b.tools {
			err = errors.Join(err, t.remove())
		}
	}
	if err != nil {
		return err
	}
	text := b.report()
	fmt.Fprint(stdout, text)
	if o.out != "" {
		return replaceSection(o.out, b.key(), text)
	}
	return nil
}

// prepare looks for programs and room, and makes the store if it is missing.
func (b *bench) prepare() error {
	o := b.o
	var err error
	if b.scratch, err = filepath.Abs(o.scratch); err != nil {
		return err
	}
	if err := os.MkdirAll(b.scratch, 0o700); err != nil {
		return err
	}
	if b.free, err = measure.Free(b.scratch); err != nil {
		return err
	}
	if err := os.RemoveAll(b.discarded()); err != nil { // of a run that was killed
		return err
	}
	fmt.Fprintf(b.log, "%s free in %s\n", measure.Size(b.free.Bytes), b.scratch)
	for name := range strings.SplitSeq(o.tools, ",") {
		t, err := b.newTool(strings.TrimSpace(name))
		if err != nil {
			return err
		}
		b.tools = append(b.tools, t)
	}
	b.store = filepath.Join(b.scratch, fmt.Sprintf("store-%d-%d-%d-%d", o.files, int64(o.bytes), o.spaces, o.seed))
	rec, err := storegen.ReadRecord(b.store)
	have := err == nil
	one := b.oneStore()
	// Each repository, what is restored, and the plain write to compare with.
	need := measure.Space{Bytes: int64(o.bytes)}.Times(int64(len(b.tools)) + 1).Plus(one)
	if !have {
		need = need.Plus(one)
	}
	if err := measure.NeedSpace(b.scratch, need); err != nil {
		return err
	}
	if have && rec.Mutations > 0 {
		fmt.Fprintf(b.log, "the store in %s was changed %d times before: making it anew\n", b.store, rec.Mutations)
		have = false
	}
	if !have {
		if err := os.RemoveAll(b.store); err != nil {
			return err
		}
		if err := os.MkdirAll(b.store, 0o755); err != nil {
			return err
		}
		fmt.Fprintf(b.log, "generating %d files, %s\n", o.files, measure.Size(int64(o.bytes)))
		if _, err := storegen.Generate(b.ctx, storegen.Options{Dir: b.store, Seed: o.seed, Files: o.files, Bytes: int64(o.bytes), Spaces: o.spaces}); err != nil {
			return err
		}
	}
	b.record, err = storegen.ReadRecord(b.store)
	return err
}

func (b *bench) measure() error {
	for i := range b.o.runs {
		if err := b.limits(); err != nil {
			return err
		}
		for _, t := range b.inTurn(i) {
			// A first backup begins a new repository; the rest of the runs would only be of the unchanged store.
			if b.due(stepFirst, t) {
				if err := errors.Join(t.remove(), t.init()); err != nil {
					return err
				}
				if err := b.backup(stepFirst, t); err != nil {
					return err
				}
			}
			if b.due(stepUnchanged, t) {
				if err := b.backup(stepUnchanged, t); err != nil {
					return err
				}
			}
		}
	}
	behind := map[*tool]bool{}
	for i := range b.o.runs {
		if !slices.ContainsFunc(b.tools, func(t *tool) bool { return b.due(stepChanged, t) }) {
			break
		}
		c, err := storegen.Mutate(b.ctx, b.store, b.o.seed, b.o.changed)
		if err != nil {
			return err
		}
		b.mutations++
		fmt.Fprintf(b.log, "changed %d files: %+v\n", c.Total(), *c)
		for _, t := range b.inTurn(i) {
			if behind[t] = !b.due(stepChanged, t); behind[t] {
				continue
			}
			if err := b.backup(stepChanged, t); err != nil {
				return err
			}
		}
	}
	for _, t := range b.tools {
		if behind[t] { // what is restored from here on is that of the store as it is now
			fmt.Fprintf(b.log, "%s: backing up the last changes, which is not measured\n", t.name)
			if _, err := t.backup(); err != nil {
				return err
			}
		}
	}
	for i := range b.o.runs {
		for _, t := range b.inTurn(i) {
			if !b.due(stepRestore, t) {
				continue
			}
			if err := b.afresh(t); err != nil {
				return err
			}
			if err := b.timed(stepRestore, t, t.restore); err != nil {
				return err
			}
			if err := b.compareOnce(stepRestore, t); err != nil {
				return err
			}
			if err := b.discard(t); err != nil {
				return err
			}
		}
	}
	return b.parts()
}

// backup measures a backup, and after the first one of its kind looks whether what it made is right.
func (b *bench) backup(step string, t *tool) error {
	if err := b.timed(step, t, t.backup); err != nil {
		return err
	}
	if !b.o.verify || b.checked[step+t.name] {
		return nil
	}
	if err := b.afresh(t); err != nil {
		return err
	}
	fmt.Fprintf(b.log, "%s, %s: restoring the snapshot and checking the repository\n", t.name, step)
	if _, err := t.restore(); err != nil {
		return fmt.Errorf("%s, restore after %q: %w", t.name, step, err)
	}
	if err := b.compareOnce(step, t); err != nil {
		return err
	}
	return errors.Join(b.discard(t), t.check())
}

// compareOnce compares what was restored with the store, if it was not done for this step and program.
func (b *bench) compareOnce(step string, t *tool) error {
	if !b.o.verify || b.checked[step+t.name] {
		return nil
	}
	b.checked[step+t.name] = true
	return b.compare(step, t)
}

// timed runs one step of one program once.
func (b *bench) timed(step string, t *tool, fn func() (measure.Cost, error)) error {
	if err := b.ctx.Err(); err != nil {
		return err
	}
	if slices.Contains(ofStore, step) {
		if _, err := b.readStore(); err != nil {
			return err
		}
	}
	unix.Sync()
	if step == stepFile || step == stepList {
		if err := b.cold(t); err != nil {
			return err
		}
	}
	c, err := fn()
	if err != nil {
		return fmt.Errorf("%s, %s: %w", t.name, step, err)
	}
	fmt.Fprintf(b.log, "%-9s %-13s %8.2f s wall %8.2f s CPU %5d MB\n", t.name, step, c.Wall.Seconds(), c.CPU().Seconds(), c.Peak/1e6)
	b.add(step, t.name, c)
	if step == stepFirst || step == stepChanged {
		u, err := t.usage()
		if err != nil {
			return err
		}
		if b.usage[step] == nil {
			b.usage[step] = map[string]usage{}
		}
		b.usage[step][t.name] = u
	}
	return nil
}

func (b *bench) add(step, who string, c measure.Cost) {
	if b.costs[step] == nil {
		b.costs[step] = map[string][]measure.Cost{}
	}
	b.costs[step][who] = append(b.costs[step][who], c)
}

// compare holds what was restored against the store.
func (b *bench) compare(step string, t *tool) error {
	fmt.Fprintf(b.log, "%s, %s: comparing what was restored\n", t.name, step)
	var all []string
	for _, part := range []string{"data", "config"} {
		// The other programs write holes out; everything else must be equal.
		diffs, err := testfixture.DiffOptions(filepath.Join(b.store, part), filepath.Join(t.restoredTree(), part), testfixture.Options{IgnoreHoles: t.name != "holdfast", Limit: 10, Workers: 4 * runtime.GOMAXPROCS(0)})
		if err != nil {
			return fmt.Errorf("%s: compare what was restored: %w", t.name, err)
		}
		all = append(all, diffs...)
	}
	if len(all) == 0 {
		return nil
	}
	text := fmt.Sprintf("%s, %s: restored something else than was backed up:\n%s", t.name, step, strings.Join(all, "\n"))
	if t.name == "holdfast" {
		return errors.New(text)
	}
	// That of another program is worth a word, and does not stop the measuring.
	fmt.Fprintln(b.log, text)
	b.notes = append(b.notes, fmt.Sprintf("What %s restored (%s) differs from the store in at least %d places.", t.name, step, len(all)))
	return nil
}

func look(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		hint := "install it, or leave it out of -tools"
		if filepath.Base(name) == "holdfast" {
			hint = "build it with go build -o holdfast ./cmd/holdfast, or name it with -holdfast"
		}
		return "", fmt.Errorf("program %s was not found: %s", name, hint)
	}
	return filepath.Abs(path)
}
