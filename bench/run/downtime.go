package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/bench/internal/measure"
	"github.com/holdfast-backup/holdfast/internal/fssnap"
	"github.com/holdfast-backup/holdfast/internal/storegen"
)

// downtime measures for how long the service is down, on one filesystem: ext4 for what is copied, btrfs
// for views. It lies in an image file, which stays if the run is interrupted, as does what was measured
// until then:
//
//	SCRATCH/downtime-.../FILESYSTEM/image       the store; on btrfs as it was made, too
//	SCRATCH/downtime-.../FILESYSTEM/state.json  what was measured so far, and by which program
//	SCRATCH/downtime-.../FILESYSTEM/tool-...    repositories and caches
//
// At the end all is removed but the image of btrfs, which can be used again; with -keep nothing is.
//
// For each sample 1 % of the files are changed while the service is stopped. Then Holdfast makes a
// backup of the running service, which makes changes of its own throughout; then restic makes one, for
// which the service is stopped.
type downtime struct {
	ctx    context.Context
	o      *options
	log    *os.File
	fs     string
	ways   []downWay // of Holdfast
	dir    string
	mnt    string
	server string           // the program
	tools  map[string]*tool // restic is missing where it is not measured
	state  downtimeState
}

// downtimeState is what is kept between two runs.
type downtimeState struct {
	Program string // checksum of the holdfast that was measured, and of the options
	// Clean: both repositories have the store as it is.
	Clean   bool
	Samples map[string][]downSample
	Record  storegen.Record
}

// downSample is one backup. All times are seconds.
type downSample struct {
	Stop, Held, Start float64 // the parts of the time in which the service was down
	Down              float64
	Run               float64 // of the whole program
}

// downWay is a way to back up.
type downWay struct {
	name  string
	flags []string // of holdfast; nil: restic
}

var downWays = []downWay{
	{"restic, service stopped", nil},
	{"holdfast, service stopped throughout", []string{"--view", "none", "--cold"}},
	{"holdfast, warm copy", []string{"--view", "none"}},
	{"holdfast, btrfs views", []string{"--view", "btrfs"}},
}

// serverPause is the time between two changes that the service makes.
const serverPause = 500 * time.Millisecond

func runDowntime(ctx context.Context, o *options, stdout io.Writer, log *os.File) error {
	scratch, err := filepath.Abs(o.scratch)
	if err != nil {
		return err
	}
	dir := filepath.Join(scratch, fmt.Sprintf("downtime-%d-%d-%d-%d", o.files, int64(o.bytes), o.spaces, o.seed))
	var list []*downtime
	for _, d := range []*downtime{{fs: "ext4", ways: downWays[1:3]}, {fs: "btrfs", ways: downWays[3:]}} {
		d.ctx, d.o, d.log, d.tools = ctx, o, log, map[string]*tool{}
		d.dir = filepath.Join(dir, d.fs)
		d.mnt = filepath.Join(d.dir, "mnt")
		if err := d.run(); err != nil {
			return fmt.Errorf("%s: %w", d.fs, err)
		}
		list = append(list, d)
	}
	text := report(list)
	fmt.Fprint(stdout, text)
	if o.out != "" {
		if err := replaceSection(o.out, downtimeKey(o), text); err != nil {
			return err
		}
	}
	for _, d := range list {
		err = errors.Join(err, d.over())
	}
	return err
}

// run takes the samples that are missing.
func (d *downtime) run() (err error) {
	if err := os.MkdirAll(d.mnt, 0o700); err != nil {
		return err
	}
	if err := d.programs(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.unmount()) }()
	if err := d.mount(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stopServer()) }()
	return d.measure()
}

// programs looks for holdfast and restic, and builds the server.
func (d *downtime) programs() error {
	b := &bench{o: d.o, scratch: d.dir}
	names := []string{"holdfast", "restic"}
	if d.fs == "btrfs" {
		names = names[:1] // how long restic takes was measured on the other one
	}
	for _, name := range names {
		t, err := b.newTool(name)
		if err != nil {
			return err
		}
		t.store = d.work
		t.env = append(t.env, "HOLDFAST_STATE_DIR="+filepath.Join(t.dir, "state"), "HOLDFAST_CONFIG_FILE=/dev/null")
		d.tools[name] = t
	}
	if _, err := look("mkfs." + d.fs); err != nil {
		return err
	}
	d.server = filepath.Join(d.dir, "ocis")
	_, _, err := measure.Command("", []string{"CGO_ENABLED=0"}, "go", "build", "-o", d.server,
		"github.com/holdfast-backup/holdfast/internal/freeze/freezetest/cmd/ocis")
	return err
}

func (d *downtime) image() string { return filepath.Join(d.dir, "image") }
func (d *downtime) work() string  { return filepath.Join(d.mnt, "work") }

// pristine is the store as it was made. Where there are no snapshots it is the one that is changed.
func (d *downtime) pristine() string {
	if d.fs == "btrfs" {
		return filepath.Join(d.mnt, "pristine")
	}
	return d.work()
}

func (d *downtime) notes() string { return filepath.Join(d.dir, "notes") }

func (d *downtime) unmount() error { return fssnap.Unmount(d.mnt) }

// mount makes the filesystem and the store in it, if they are missing.
func (d *downtime) mount() error {
	if err := d.unmount(); err != nil { // a run that was killed may have left it
		return err
	}
	need := measure.StoreNeeds(d.o.files, int64(d.o.bytes))
	_, err := os.Stat(d.image())
	fresh := errors.Is(err, os.ErrNotExist)
	if fresh {
		if d.fs == "ext4" {
			need.Bytes += need.Inodes * 512 // of which half are the inodes themselves
		}
		if err := measure.NeedSpace(d.dir, measure.Space{Bytes: need.Bytes + 2*int64(d.o.bytes)}); err != nil {
			return err
		}
		// Sparse; with room for the changes and for the filesystem's own.
		if err := os.WriteFile(d.image(), nil, 0o600); err != nil {
			return err
		}
		if err := os.Truncate(d.image(), need.Bytes+1<<30); err != nil {
			return err
		}
		options := []string{"-q", "-m", "single"}
		if d.fs == "ext4" {
			options = []string{"-q", "-F", "-N", strconv.FormatInt(need.Inodes, 10)}
		}
		if err := d.command("mkfs."+d.fs, append(options, d.image())...); err != nil {
			return err
		}
	}
	if err := d.command("mount", "-o", "loop,noatime", d.image(), d.mnt); err != nil {
		return err
	}
	if _, err := storegen.ReadRecord(d.pristine()); err != nil {
		// None, or one that was not finished.
		if err := d.removeStores(); err != nil {
			return err
		}
		if d.fs == "btrfs" {
			if err := d.command("btrfs", "subvolume", "create", d.pristine()); err != nil {
				return err
			}
		}
		fmt.Fprintf(d.log, "generating %d files, %s\n", d.o.files, measure.Size(int64(d.o.bytes)))
		began := time.Now()
		if _, err := storegen.Generate(d.ctx, storegen.Options{Dir: d.pristine(), Seed: d.o.seed, Files: d.o.files, Bytes: int64(d.o.bytes), Spaces: d.o.spaces}); err != nil {
			return err
		}
		unix.Sync()
		fmt.Fprintf(d.log, "generated in %.0f s\n", time.Since(began).Seconds())
	}
	return nil
}

// removeStores removes what is in the filesystem.
func (d *downtime) removeStores() error {
	if d.fs != "btrfs" {
		return os.RemoveAll(d.work())
	}
	return errors.Join(d.removeSubvolume(d.work()), d.removeSubvolume(d.pristine()))
}

func (d *downtime) removeSubvolume(path string) error {
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return d.command("btrfs", "subvolume", "delete", path)
}

func (d *downtime) command(name string, args ...string) error {
	_, _, err := measure.Command("", nil, name, args...)
	return err
}

func (d *downtime) stateFile() string { return filepath.Join(d.dir, "state.json") }

func (d *downtime) save() error {
	data, err := json.Marshal(d.state)
	if err != nil {
		return err
	}
	if err := os.WriteFile(d.stateFile()+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(d.stateFile()+".new", d.stateFile())
}

// measure takes the samples that are missing.
func (d *downtime) measure() error {
	program, err := checksum(d.tools["holdfast"].path)
	if err != nil {
		return err
	}
	program += fmt.Sprintf(" %g", d.o.changed)
	if data, err := os.ReadFile(d.stateFile()); err == nil {
		if err := json.Unmarshal(data, &d.state); err != nil {
			return err
		}
	}
	if _, err := os.Stat(d.work()); err != nil || d.state.Samples == nil {
		if err := d.begin(); err != nil {
			return err
		}
	}
	if d.state.Program != program { // figures of another program are of no use; its repository is
		d.state.Program, d.state.Samples = program, map[string][]downSample{}
	}
	rec, err := storegen.ReadRecord(d.pristine())
	if err != nil {
		return err
	}
	d.state.Record = *rec
	if !d.state.Clean {
		if err := d.catchUp(); err != nil {
			return err
		}
	}
	for range d.o.runs {
		for _, w := range d.ways {
			if len(d.state.Samples[w.name]) >= d.o.runs {
				continue
			}
			if err := d.sample(w); err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
		}
	}
	return nil
}

// begin makes the store that is changed, and both repositories.
func (d *downtime) begin() error {
	if d.fs == "btrfs" {
		if err := d.removeSubvolume(d.work()); err != nil {
			return err
		}
		if err := d.command("btrfs", "subvolume", "snapshot", d.pristine(), d.work()); err != nil {
			return err
		}
	}
	for _, t := range d.tools {
		if err := t.remove(); err != nil {
			return err
		}
		if err := t.init(); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(d.notes()); err != nil {
		return err
	}
	if err := os.Mkdir(d.notes(), 0o700); err != nil {
		return err
	}
	d.state.Samples, d.state.Clean = map[string][]downSample{}, false
	return d.save()
}

// catchUp makes a backup with each program, so that the next one finds as many changes as it should.
func (d *downtime) catchUp() error {
	for name, t := range d.tools {
		c, err := t.backup()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		fmt.Fprintf(d.log, "%s has the store as it is, after %.0f s\n", name, c.Wall.Seconds())
	}
	d.state.Clean = true
	return d.save()
}

// sample takes one of a way of Holdfast, and one of restic where that is measured.
func (d *downtime) sample(w downWay) error {
	d.state.Clean = false
	if err := d.save(); err != nil {
		return err
	}
	c, err := storegen.Mutate(d.ctx, d.work(), d.o.seed, d.o.changed)
	if err != nil {
		return err
	}
	unix.Sync()
	if err := d.startServer(); err != nil {
		return err
	}
	ours, err := d.holdfast(w)
	if err != nil {
		return err
	}
	fmt.Fprintf(d.log, "%d changes; %s: down for %.2f s (stop %.2f, held %.2f, start %.2f), ran for %.1f s\n",
		c.Total(), w.name, ours.Down, ours.Stop, ours.Held, ours.Start, ours.Run)
	d.state.Samples[w.name] = append(d.state.Samples[w.name], ours)
	if d.tools["restic"] != nil {
		theirs, err := d.restic()
		if err != nil {
			return err
		}
		fmt.Fprintf(d.log, "restic: down for %.2f s (stop %.2f, held %.2f, start %.2f)\n", theirs.Down, theirs.Stop, theirs.Held, theirs.Start)
		d.state.Samples[downWays[0].name] = append(d.state.Samples[downWays[0].name], theirs)
	}
	if err := d.stopServer(); err != nil {
		return err
	}
	// What the service did since it was read is little, and the next backup of either takes it.
	d.state.Clean = true
	return d.save()
}

// holdfast backs up the service, which it stops itself.
func (d *downtime) holdfast(w downWay) (downSample, error) {
	t := d.tools["holdfast"]
	args := append([]string{"backup", "--json", "--repo", t.repo(), "--password-file", t.pass(), "--base-data-path", d.data(),
		"--config-dir", filepath.Join(d.work(), "config"), "--freeze", "process"}, w.flags...)
	c, out, err := measure.Command(t.dir, t.env, t.path, args...)
	if err != nil {
		return downSample{}, err
	}
	return parseSample(out, c.Wall)
}

// parseSample reads the summary of a backup, which is the last line.
func parseSample(out string, took time.Duration) (downSample, error) {
	out = strings.TrimSpace(out)
	var s struct {
		Freeze struct {
			Stop  float64 `json:"seconds_stopping"`
			Held  float64 `json:"seconds_held"`
			Start float64 `json:"seconds_starting"`
			Down  float64 `json:"seconds_stopped"`
		}
		Proof struct{ Complete bool }
	}
	if err := json.Unmarshal([]byte(out[strings.LastIndexByte(out, '\n')+1:]), &s); err != nil {
		return downSample{}, fmt.Errorf("the summary of the backup: %w", err)
	}
	if !s.Proof.Complete || s.Freeze.Down <= 0 {
		return downSample{}, fmt.Errorf("the backup is incomplete, or did not stop the service: %s", out)
	}
	f := s.Freeze
	return downSample{Stop: f.Stop, Held: f.Held, Start: f.Start, Down: f.Down, Run: took.Seconds()}, nil
}

// restic backs up the service, which is stopped for that.
func (d *downtime) restic() (s downSample, err error) {
	began := time.Now()
	if err := d.stopServer(); err != nil {
		return s, err
	}
	stopped := time.Now()
	c, err := d.tools["restic"].backup()
	if err != nil {
		return s, err
	}
	held := time.Now()
	if err := d.startServer(); err != nil {
		return s, err
	}
	end := time.Now()
	return downSample{Stop: stopped.Sub(began).Seconds(), Held: held.Sub(stopped).Seconds(), Start: end.Sub(held).Seconds(),
		Down: end.Sub(began).Seconds(), Run: c.Wall.Seconds()}, nil
}

func (d *downtime) data() string { return filepath.Join(d.work(), "data") }

// serves tells whether the server has its lock.
func (d *downtime) serves() bool {
	f, err := os.Open(filepath.Join(d.data(), "idm", "idm.boltdb"))
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

func (d *downtime) startServer() error {
	log, err := os.Create(filepath.Join(d.dir, "server.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(d.server, "server")
	cmd.Env = []string{"OCIS_BASE_DATA_PATH=" + d.data(), "OCIS_TEST_NOTES=" + d.notes(), "OCIS_TEST_PAUSE=" + serverPause.String()}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }()
	for deadline := time.Now().Add(time.Minute); !d.serves(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			text, _ := os.ReadFile(log.Name())
			return fmt.Errorf("the server does not start: %s", text)
		}
	}
	return nil
}

// stopServer ends the server, whoever started it last, if there is one.
func (d *downtime) stopServer() error {
	for deadline := time.Now().Add(time.Minute); d.serves(); time.Sleep(time.Millisecond) {
		text, err := os.ReadFile(filepath.Join(d.notes(), "pid"))
		if err != nil {
			return err
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			return fmt.Errorf("the id of the server: %w", err)
		}
		if exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); exe == d.server {
			_ = syscall.Kill(pid, syscall.SIGTERM)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the server (process %d) does not stop", pid)
		}
	}
	return nil
}

// over removes what the next run does not need.
func (d *downtime) over() error {
	switch {
	case d.o.keep:
		return nil
	case d.fs != "btrfs":
		return os.RemoveAll(d.dir)
	}
	d.state = downtimeState{}
	err := d.command("mount", "-o", "loop,noatime", d.image(), d.mnt)
	if err == nil {
		err = errors.Join(d.removeSubvolume(d.work()), d.unmount())
	}
	err = errors.Join(err, d.save(), os.RemoveAll(d.notes()), os.Remove(d.server), os.Remove(filepath.Join(d.dir, "server.log")))
	for _, t := range d.tools {
		err = errors.Join(err, t.remove())
	}
	return err
}

func downtimeKey(o *options) string {
	return fmt.Sprintf("downtime files=%d bytes=%d spaces=%d seed=%d", o.files, int64(o.bytes), o.spaces, o.seed)
}

// report is what was measured on all filesystems.
func report(list []*downtime) string {
	var w strings.Builder
	d := list[0]
	s := &d.state.Record.Summary
	fmt.Fprintf(&w, "## Downtime: %s files, %s, %s filesystem entries, %g %% changed\n\n", thousands(int64(s.Files)), measure.Size(s.BlobBytes), thousands(s.Entries), d.o.changed*100)
	m := machine(filepath.Dir(filepath.Dir(d.dir)))
	fmt.Fprintf(&w, "%s: %s, %d cores, %s memory, ext4 and btrfs in image files on %s, Linux %s, %s; holdfast `%s`, restic `%s`.\n\n", time.Now().UTC().Format("2006-01-02"),
		m.cpu, runtime.NumCPU(), measure.Size(m.memory), m.filesystem, m.kernel, runtime.Version(), d.tools["holdfast"].version, d.tools["restic"].version)
	fmt.Fprintf(&w, "For how long the service was down. It is a small test server that holds the database's lock and changes a file each %s throughout, so its own stop and start are short: add those of a real server. "+
		"Before each backup %g %% of the files were changed, all since the last backup of the same program. Seconds; median of %s, lowest and highest in brackets (restic ran after each of the others on ext4).\n\n",
		serverPause, d.o.changed*100, runsText(d.o.runs))
	w.WriteString("| way | service down | its stop | held | its start | whole run | down, against restic | down, against stopped throughout |\n|---|---:|---:|---:|---:|---:|---:|---:|\n")
	of := func(way downWay, pick func(downSample) float64) measure.Spread {
		var figures []float64
		for _, d := range list {
			for _, s := range d.state.Samples[way.name] {
				figures = append(figures, pick(s))
			}
		}
		return measure.Of(figures)
	}
	down := func(s downSample) float64 { return s.Down }
	theirs, stopped := of(downWays[0], down).Median, of(downWays[1], down).Median
	ratio := func(v, base float64) string {
		if base <= 0 {
			return "–"
		}
		return strconv.FormatFloat(v/base, 'f', 3, 64)
	}
	for i, way := range downWays {
		med := of(way, down).Median
		against := []string{"–", "–"}
		if i > 0 {
			against[0] = ratio(med, theirs)
		}
		if i > 1 {
			against[1] = ratio(med, stopped)
		}
		fmt.Fprintf(&w, "| %s | %s | %s | %s | %s | %s | %s | %s |\n", way.name, spread(of(way, down)),
			spread(of(way, func(s downSample) float64 { return s.Stop })), spread(of(way, func(s downSample) float64 { return s.Held })),
			spread(of(way, func(s downSample) float64 { return s.Start })), spread(of(way, func(s downSample) float64 { return s.Run })), against[0], against[1])
	}
	fmt.Fprintf(&w, "\n    make bench-downtime FILES=%d BYTES=%dB RUNS=%d\n", d.o.files, int64(d.o.bytes), d.o.runs)
	for _, way := range downWays[1:] {
		fmt.Fprintf(&w, "    holdfast backup --freeze process %s\n", strings.Join(way.flags, " "))
	}
	return w.String()
}

func checksum(path string) (string, error) {
	_, out, err := measure.Command("", nil, "sha256sum", path)
	sum, _, _ := strings.Cut(out, " ")
	return sum, err
}
