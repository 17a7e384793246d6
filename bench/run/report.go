package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/bench/internal/measure"
)

// key names the section of the report: the same sizes replace each other.
func (b *bench) key() string {
	return fmt.Sprintf("files=%d bytes=%d spaces=%d seed=%d", b.o.files, int64(b.o.bytes), b.o.spaces, b.o.seed)
}

func (b *bench) report() string {
	var w strings.Builder
	s := &b.record.Summary
	fmt.Fprintf(&w, "## %s files, %s, %s filesystem entries\n\n", thousands(int64(s.Files)), measure.Size(s.BlobBytes), thousands(s.Entries))
	m := machine(b.scratch)
	fmt.Fprintf(&w, "%s: %s, %d cores, %s memory, %s, Linux %s, %s.\n\n", time.Now().UTC().Format("2006-01-02"),
		m.cpu, runtime.NumCPU(), measure.Size(m.memory), m.filesystem, m.kernel, runtime.Version())
	fmt.Fprintf(&w, "The store: %s user files in %d spaces with %s folders, %s revisions, %s files in the trash, %s blobs.\n", thousands(int64(s.Files)), s.Spaces,
		thousands(int64(s.Folders)), thousands(int64(s.Revisions)), thousands(int64(s.Trashed)), thousands(int64(s.Blobs)))
	fmt.Fprintf(&w, "All programs worked on the same store in the same run, in turn, another one first in each round; page cache warm (the whole store is read once before each backup; dropped, with the programs' own caches, before the steps that are called cold), written data flushed before each step. Of one space Holdfast restores what users see, the others the directory of the storage; the file is the same. Median of %s, lowest and highest in brackets; what took more than 5 minutes ran once.\n\n", runsText(b.o.runs))
	w.WriteString("| step | program | wall s | user + system CPU s | peak memory | wall against restic | CPU against restic |\n|---|---|---:|---:|---:|---:|---:|\n")
	for _, step := range steps {
		base := b.costs[step]["restic"]
		for _, t := range b.tools {
			costs := b.costs[step][t.name]
			if len(costs) == 0 {
				continue
			}
			peaks := make([]float64, len(costs))
			for i, c := range costs {
				peaks[i] = float64(c.Peak)
			}
			name := step
			if step == stepChanged {
				name = fmt.Sprintf("%g %% changed", b.o.changed*100)
			}
			fmt.Fprintf(&w, "| %s | %s | %s | %s | %s | %s | %s |\n", name, t.name, spread(measure.Seconds(costs, wall)), spread(measure.Seconds(costs, measure.Cost.CPU)),
				measure.Size(int64(measure.Of(peaks).Max)), against(t, median(costs, wall), median(base, wall)), against(t, median(costs, measure.Cost.CPU), median(base, measure.Cost.CPU)))
		}
	}
	w.WriteString("\n| repository | program | bytes | files | index entries | bytes against restic | entries against restic |\n|---|---|---:|---:|---:|---:|---:|\n")
	for _, step := range []string{stepFirst, stepChanged} {
		after := "after the first backup"
		if step == stepChanged {
			after = fmt.Sprintf("after %s of changes", runsText(b.mutations))
		}
		base := b.usage[step]["restic"]
		for _, t := range b.tools {
			u, ok := b.usage[step][t.name]
			if !ok {
				continue
			}
			entries := "–"
			if u.entries >= 0 {
				entries = thousands(u.entries)
			}
			fmt.Fprintf(&w, "| %s | %s | %s | %s | %s | %s | %s |\n", after, t.name, thousands(u.bytes), thousands(u.files), entries,
				against(t, float64(u.bytes), float64(base.bytes)), against(t, float64(u.entries), float64(base.entries)))
		}
	}
	w.WriteString("\n| physical limit | wall s | user + system CPU s |\n|---|---:|---:|\n")
	for _, name := range limitNames {
		costs := b.costs[stepLimits][name]
		if len(costs) == 0 {
			continue
		}
		fmt.Fprintf(&w, "| %s | %s | %s |\n", name, spread(measure.Seconds(costs, wall)), spread(measure.Seconds(costs, measure.Cost.CPU)))
	}
	if find := median(b.costs[stepLimits][limitFind], wall); find > 0 {
		var list []string
		for _, t := range b.tools {
			if costs := b.costs[stepUnchanged][t.name]; len(costs) > 0 {
				list = append(list, fmt.Sprintf("%s %.2f", t.name, median(costs, wall)/find))
			}
		}
		if len(list) > 0 {
			fmt.Fprintf(&w, "\nA backup of the unchanged store takes as many times as long as find: %s.\n", strings.Join(list, ", "))
		}
	}
	w.WriteString("\nPrograms:")
	for i, t := range b.tools {
		if i > 0 {
			w.WriteString(";")
		}
		fmt.Fprintf(&w, " %s (`%s`)", t.name, t.version)
	}
	w.WriteString(".\n")
	if b.o.verify {
		w.WriteString("After the first backup of each kind (first, unchanged, changed), outside of the timing, the repository was checked with all its data")
		if b.has("holdfast") && b.has("restic") {
			w.WriteString(" (Holdfast's by restic as well)")
		}
		w.WriteString(", and the snapshot was restored and compared with the store: names, contents, modes, owners, times to the nanosecond, attributes, links.\n")
	}
	for _, n := range b.notes {
		fmt.Fprintf(&w, "%s\n", n)
	}
	fmt.Fprintf(&w, "\n    go build -o holdfast ./cmd/holdfast\n    go run ./bench/run -files %d -bytes %dB", b.o.files, int64(b.o.bytes))
	if b.o.spaces != 0 {
		fmt.Fprintf(&w, " -spaces %d", b.o.spaces)
	}
	if b.o.steps != "" {
		fmt.Fprintf(&w, " -steps %s", b.o.steps)
	}
	fmt.Fprintf(&w, " -seed %d -n %d -tools %s -scratch DIR -o docs/BENCHMARKS.md\n", b.o.seed, b.o.runs, b.o.tools)
	for _, t := range b.tools {
		switch t.name {
		case "holdfast":
			w.WriteString("    holdfast backup --repo REPO --password-file FILE --base-data-path STORE/data --config-dir STORE/config --freeze none\n" +
				"    holdfast restore latest --repo REPO --password-file FILE --base-data-path TARGET/data --config-dir TARGET/config\n")
		case "restic":
			w.WriteString("    restic -r REPO backup STORE/data STORE/config\n    restic -r REPO restore latest --target TARGET\n")
		case "borg":
			w.WriteString("    borg create --compression zstd,3 REPO::NAME STORE/data STORE/config\n    borg extract REPO::NAME\n")
		}
	}
	return w.String()
}

func (b *bench) has(name string) bool {
	for _, t := range b.tools {
		if t.name == name {
			return true
		}
	}
	return false
}

func median(costs []measure.Cost, what func(measure.Cost) time.Duration) float64 {
	return measure.Seconds(costs, what).Median
}

// against is the ratio of a program's value to restic's.
func against(t *tool, v, restic float64) string {
	if t.name == "restic" || v <= 0 || restic <= 0 {
		return "–"
	}
	return strconv.FormatFloat(v/restic, 'f', 3, 64)
}

func wall(c measure.Cost) time.Duration { return c.Wall }

func runsText(n int) string {
	if n == 1 {
		return "1 run"
	}
	return fmt.Sprintf("%d runs", n)
}

func spread(s measure.Spread) string {
	if s.Min == s.Max {
		return seconds(s.Median)
	}
	return fmt.Sprintf("%s (%s–%s)", seconds(s.Median), seconds(s.Min), seconds(s.Max))
}

func seconds(v float64) string { return strconv.FormatFloat(v, 'f', 2, 64) }

// thousands groups the digits by narrow blanks that do not break a line.
func thousands(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "\u202f" + s[i:]
	}
	return s
}

type machineInfo struct {
	cpu, filesystem, kernel string
	memory                  int64
}

func machine(dir string) machineInfo {
	m := machineInfo{cpu: procField("/proc/cpuinfo", "model name"), filesystem: filesystem(dir)}
	if kib, err := strconv.ParseInt(strings.TrimSuffix(procField("/proc/meminfo", "MemTotal"), " kB"), 10, 64); err == nil {
		m.memory = kib << 10
	}
	if m.cpu == "" {
		m.cpu = runtime.GOARCH
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.kernel, _, _ = strings.Cut(unix.ByteSliceToString(u.Release[:]), "-") // without the name of the build
	}
	return m
}

func procField(file, name string) string {
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if k, v, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// filesystem is the type of the mount that dir lies on, with a word on what changes the figures.
func filesystem(dir string) string {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "unknown filesystem"
	}
	best, kind := "", "unknown filesystem"
	for line := range strings.SplitSeq(string(data), "\n") {
		before, after, ok := strings.Cut(line, " - ")
		fields := strings.Fields(before)
		if !ok || len(fields) < 5 {
			continue
		}
		at := fields[4]
		if (at == "/" || dir == at || strings.HasPrefix(dir, at+"/")) && len(at) >= len(best) {
			best, kind = at, strings.Fields(after)[0]
			if kind == "ext4" && noJournal(fields[2]) {
				kind = withoutJournal
			}
		}
	}
	return kind
}

const withoutJournal = "ext4 without a journal"

// noJournal reports whether the ext4 on the device (major:minor) keeps none.
func noJournal(device string) bool {
	path, err := os.Readlink("/sys/dev/block/" + device)
	if err != nil {
		return false
	}
	task, err := os.ReadFile(filepath.Join("/sys/fs/ext4", filepath.Base(path), "journal_task"))
	return err == nil && strings.TrimSpace(string(task)) == "<none>"
}

const fileHead = `# Benchmarks

Made by ` + "`go run ./bench/run`" + `; each section is replaced when it is measured again. Ratios are of value, seconds are of one machine.

`

// replaceSection puts text between the marks of key in a Markdown file, at the end if it has none.
func replaceSection(path, key, text string) error {
	start, end := "<!-- bench "+key+" -->\n", "<!-- end "+key+" -->\n"
	old, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		old, err = []byte(fileHead), nil
	}
	if err != nil {
		return err
	}
	page := string(old)
	section := start + text + end
	i := strings.Index(page, start)
	if i < 0 {
		if !strings.HasSuffix(page, "\n\n") {
			page += "\n"
		}
		page += section
	} else {
		j := strings.Index(page[i:], end)
		if j < 0 {
			return fmt.Errorf("%s has the mark %q but not the one that ends it: put it in or remove the first", path, strings.TrimSpace(start))
		}
		page = page[:i] + section + page[i+j+len(end):]
	}
	return os.WriteFile(path, []byte(page), 0o644)
}
