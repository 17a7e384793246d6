package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/bench/internal/measure"
)

// build builds the program that is measured.
func build(t *testing.T, dir string) string {
	t.Helper()
	program := filepath.Join(dir, "holdfast")
	if out, err := exec.Command("go", "build", "-o", program, "github.com/holdfast-backup/holdfast/cmd/holdfast").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return program
}

// TestRun runs all steps on a small store, with the real programs.
func TestRun(t *testing.T) {
	scratch := t.TempDir()
	program := build(t, scratch)
	page := filepath.Join(scratch, "BENCHMARKS.md")
	log, err := os.Create(filepath.Join(scratch, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	var out bytes.Buffer
	args := []string{"-holdfast", program, "-tools", "holdfast,restic", "-files", "60", "-bytes", "500kB", "-spaces", "3", "-n", "1", "-changed", "0.1", "-cold=false", "-scratch", filepath.Join(scratch, "s"), "-o", page}
	if err := run(t.Context(), args, &out, log); err != nil {
		said, _ := os.ReadFile(log.Name())
		t.Fatalf("%v\n%s", err, said)
	}
	text := out.String()
	for _, want := range []string{"## 60 files, 500 kB", "| first backup | restic | ", "| unchanged | restic |", "| 10 % changed | restic |", "| restore all | restic |",
		"| restore one space | holdfast | ", "| show one file, cold | holdfast | ", "| list a folder, cold | restic | ", "| check | holdfast | ",
		"| find with lstat of all entries |", "| writing as many bytes, 16 MiB files, fsync |", "takes as many times as long as find: holdfast ", "CPU against restic", "bytes against restic | entries against restic", "| SHA-256 of as many bytes, one core |", "| after the first backup | restic |", "restic 0.", "go run ./bench/run -files 60 -bytes 500000B"} {
		if !strings.Contains(text, want) {
			t.Errorf("the report lacks %q:\n%s", want, text)
		}
	}
	if strings.Contains(text, scratch) {
		t.Errorf("the report names a path of this machine:\n%s", text)
	}
	if strings.Contains(text, "differs from the store") || !strings.Contains(text, "was not dropped") {
		t.Error(text)
	}
	// Each kind of snapshot was restored and checked.
	said, err := os.ReadFile(log.Name())
	if err != nil {
		t.Fatal(err)
	}
	for _, tool := range []string{"holdfast", "restic"} {
		for _, step := range []string{stepFirst, stepUnchanged, stepChanged, stepRestore} {
			if want := tool + ", " + step + ": comparing what was restored"; strings.Count(string(said), want) != 1 {
				t.Errorf("the log does not say once %q:\n%s", want, said)
			}
		}
	}
	// What was measured is gone, the store is kept.
	left, err := os.ReadDir(filepath.Join(scratch, "s"))
	if err != nil || len(left) != 1 || !strings.HasPrefix(left[0].Name(), "store-60-") {
		t.Errorf("left behind: %v %v", left, err)
	}
	saved, err := os.ReadFile(page)
	if err != nil || !strings.Contains(string(saved), text) {
		t.Errorf("the page holds something else: %v", err)
	}
}

// TestSteps leaves steps out, and runs once what takes long.
func TestSteps(t *testing.T) {
	scratch := t.TempDir()
	program := build(t, scratch)
	log, err := os.Create(filepath.Join(scratch, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	var out bytes.Buffer
	args := []string{"-holdfast", program, "-tools", "holdfast", "-files", "20", "-bytes", "200kB", "-spaces", "3", "-n", "2", "-changed", "0.1", "-steps", "unchanged,check",
		"-verify=false", "-scratch", filepath.Join(scratch, "s")}
	if err := run(t.Context(), args, &out, log); err != nil {
		said, _ := os.ReadFile(log.Name())
		t.Fatalf("%v\n%s", err, said)
	}
	text := out.String()
	for want, is := range map[string]bool{"| first backup | holdfast |": true, "| unchanged | holdfast |": true, "| check | holdfast |": true,
		"| restore all |": false, "cold |": false, "| after 0 runs": false, "-steps unchanged,check ": true} {
		if strings.Contains(text, want) != is {
			t.Errorf("%q is in the report: %v:\n%s", want, !is, text)
		}
	}

	holdfast, restic := &tool{name: "holdfast"}, &tool{name: "restic"}
	b := &bench{o: &options{runs: 3}, wanted: map[string]bool{stepFirst: true}, costs: map[string]map[string][]measure.Cost{}}
	b.add(stepFirst, "holdfast", measure.Cost{Wall: 4 * time.Minute})
	b.add(stepFirst, "restic", measure.Cost{Wall: 6 * time.Minute})
	if !b.due(stepFirst, holdfast) || b.due(stepFirst, restic) || b.due(stepCheck, holdfast) {
		t.Errorf("due: %v %v %v", b.due(stepFirst, holdfast), b.due(stepFirst, restic), b.due(stepCheck, holdfast))
	}
	b.add(stepFirst, "holdfast", measure.Cost{Wall: 4 * time.Minute})
	b.add(stepFirst, "holdfast", measure.Cost{Wall: 4 * time.Minute})
	if b.due(stepFirst, holdfast) {
		t.Error("a fourth run of three is due")
	}
}

// Each program is the first as often as the others.
func TestInTurn(t *testing.T) {
	b := bench{tools: []*tool{{name: "a"}, {name: "b"}, {name: "c"}}}
	for round, want := range []string{"abc", "bca", "cab", "abc"} {
		var got string
		for _, t := range b.inTurn(round) {
			got += t.name
		}
		if got != want {
			t.Errorf("round %d: %s, want %s", round, got, want)
		}
	}
}

// TestRemote runs all of -remote on small stores and a quick link.
func TestRemote(t *testing.T) {
	scratch := t.TempDir()
	holdfast := filepath.Join(scratch, "holdfast")
	if said, err := exec.Command("go", "build", "-o", holdfast, "github.com/holdfast-backup/holdfast/cmd/holdfast").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	page := filepath.Join(scratch, "BENCHMARKS.md")
	log, err := os.Create(filepath.Join(scratch, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	var out bytes.Buffer
	args := []string{"-remote", "-holdfast", holdfast, "-tools", "holdfast", "-files", "20", "-bytes", "200kB", "-n", "1", "-link", "100MB", "-latency", "1ms",
		"-objects", "3000", "-note", "It was a test.", "-scratch", filepath.Join(scratch, "s"), "-o", page}
	if err := run(t.Context(), args, &out, log); err != nil {
		said, _ := os.ReadFile(log.Name())
		t.Fatalf("%v\n%s", err, said)
	}
	text := out.String()
	for _, want := range []string{"## A link of 800 Mbit/s and 1 ms", "It was a test.", "| backup, repository behind the link | holdfast | large |", "| restore, repository behind the link | holdfast | small |",
		"| backup, instance's bucket behind the link | holdfast | small |", "| restore, instance's bucket behind the link | holdfast | large |", "| unchanged | ", " | 1 | 0 |", "make bench-remote FILES=20"} {
		if !strings.Contains(text, want) {
			t.Errorf("the report lacks %q:\n%s", want, text)
		}
	}
	if strings.Contains(text, scratch) {
		t.Errorf("the report names a path of this machine:\n%s", text)
	}
	if left, err := os.ReadDir(filepath.Join(scratch, "s")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
	saved, err := os.ReadFile(page)
	if err != nil || !strings.Contains(string(saved), text) {
		t.Errorf("the page holds something else: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	dir := t.TempDir()
	discard, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer discard.Close()
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"no scratch":     {nil, "-scratch is missing"},
		"argument":       {[]string{"-scratch", dir, "x"}, "unexpected argument"},
		"size":           {[]string{"-scratch", dir, "-bytes", "many"}, "is no size"},
		"runs":           {[]string{"-scratch", dir, "-n", "0"}, "at least 1"},
		"unknown step":   {[]string{"-scratch", dir, "-steps", "first,second"}, "-steps names \"second\": there are first, unchanged, changed, restore"},
		"unknown tool":   {[]string{"-scratch", dir, "-tools", "rsync"}, "holdfast, restic and borg are known"},
		"missing binary": {[]string{"-scratch", dir, "-tools", "holdfast", "-holdfast", filepath.Join(dir, "holdfast")}, "go build -o holdfast ./cmd/holdfast"},
		"too large":      {[]string{"-scratch", dir, "-tools", "restic", "-files", "10", "-bytes", "900000TB"}, "are needed"},
	} {
		var out bytes.Buffer
		err := run(t.Context(), c.args, &out, discard)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want it to say %q", name, err, c.want)
		}
	}
}

func TestReplaceSection(t *testing.T) {
	page := filepath.Join(t.TempDir(), "p.md")
	for _, s := range []struct{ key, text string }{{"a", "first\n"}, {"b", "second\n"}, {"a", "third\n"}} {
		if err := replaceSection(page, s.key, s.text); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	if strings.Contains(text, "first") || strings.Count(text, "<!-- bench a -->") != 1 || strings.Index(text, "\nthird\n") > strings.Index(text, "\nsecond\n") || !strings.HasPrefix(text, "# Benchmarks") {
		t.Errorf("page is\n%s", text)
	}
	if err := os.WriteFile(page, []byte("<!-- bench a -->\nx"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := replaceSection(page, "a", "y"); err == nil {
		t.Error("a page with half a section was changed")
	}
}

func TestThousands(t *testing.T) {
	for n, want := range map[int64]string{0: "0", 999: "999", 1000: "1\u202f000", 1234567: "1\u202f234\u202f567", -1000: "-1\u202f000", -100: "-100"} {
		if got := thousands(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
}

// TestDowntime measures on a small store, with the real programs, and leaves nothing mounted.
func TestDowntime(t *testing.T) {
	scratch := t.TempDir()
	program := build(t, scratch)
	log, err := os.Create(filepath.Join(scratch, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	page := filepath.Join(scratch, "page.md")
	args := []string{"-downtime", "-holdfast", program, "-files", "60", "-bytes", "500kB", "-n", "1", "-scratch", filepath.Join(scratch, "s"), "-o", page}
	var out bytes.Buffer
	if err := run(t.Context(), args, &out, log); err != nil {
		said, _ := os.ReadFile(log.Name())
		t.Fatalf("%v\n%s", err, said)
	}
	text := out.String()
	for _, want := range []string{"## Downtime: 60 files, 500 kB", "| restic, service stopped |", "| holdfast, service stopped throughout |",
		"| holdfast, warm copy |", "| holdfast, btrfs views |"} {
		if !strings.Contains(text, want) {
			t.Errorf("the report lacks %q:\n%s", want, text)
		}
	}
	if saved, err := os.ReadFile(page); err != nil || !strings.Contains(string(saved), text) || strings.Contains(text, scratch) {
		t.Errorf("the page holds something else, or a path of this machine: %v\n%s", err, saved)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), scratch) {
		t.Errorf("it is still mounted: %v", err)
	}
	// The store that can be used again is kept, and a state that says that nothing was measured.
	left, err := filepath.Glob(filepath.Join(scratch, "s/downtime-*/*/*"))
	var names []string
	for _, l := range left {
		names = append(names, filepath.Base(filepath.Dir(l))+"/"+filepath.Base(l))
	}
	if err != nil || strings.Join(names, " ") != "btrfs/image btrfs/mnt btrfs/state.json" {
		t.Errorf("left behind: %q %v", names, err)
	}
}

func TestParseSample(t *testing.T) {
	good := `{"freeze":{"seconds_stopping":1,"seconds_held":2,"seconds_starting":3,"seconds_stopped":6},"proof":{"complete":true}}`
	s, err := parseSample("{}\n"+good+"\n", 9*time.Second)
	if want := (downSample{1, 2, 3, 6, 9}); err != nil || s != want {
		t.Errorf("%+v, %v", s, err)
	}
	for _, bad := range []string{"", "x", "{}", strings.Replace(good, "true", "false", 1)} {
		if _, err := parseSample(bad, 0); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}
