package main

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const page = `# Benchmarks
| first backup | holdfast | 99.0 | of no section
<!-- bench files=200000 bytes=1 spaces=0 seed=1 -->
| step | program | wall s |
| first backup | holdfast | 61.00 (60.00–62.00) | 1 |
| first backup | restic | 117.00 | 1 |
<!-- end files=200000 bytes=1 spaces=0 seed=1 -->
<!-- bench files=20000 bytes=1 spaces=0 seed=1 -->
| first backup | holdfast | 6.00 | 1 |
| first backup | restic | 11.50 | 1 |
| check | restic | 3.00 | 1 |
<!-- end files=20000 bytes=1 spaces=0 seed=1 -->
<!-- bench downtime files=20000 bytes=1 spaces=0 seed=1 -->
| first backup | restic | 77.00 | 1 |
`

func TestRead(t *testing.T) {
	lines, err := read(strings.NewReader(page))
	if err != nil || len(lines) != 2 {
		t.Fatalf("%d lines, %v", len(lines), err)
	}
	for _, l := range lines {
		want := []point{{20000, 6}, {200000, 61}}
		if l.program == "restic" {
			want = []point{{20000, 11.5}, {200000, 117}}
		}
		if l.step != "first backup" || len(l.points) != 2 || l.points[0] != want[0] || l.points[1] != want[1] {
			t.Errorf("%+v", l)
		}
	}
}

// TestRun: the picture is well-formed, and a time ten times as long lies as much higher as ten times as
// many files lie to the right.
func TestRun(t *testing.T) {
	dir := t.TempDir()
	from, to := filepath.Join(dir, "p.md"), filepath.Join(dir, "p.svg")
	if err := os.WriteFile(from, []byte(page), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := run(from, to); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(to)
	if err != nil {
		t.Fatal(err)
	}
	for d := xml.NewDecoder(strings.NewReader(string(data))); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if n := strings.Count(string(data), "<circle"); n != 4 {
		t.Errorf("%d points", n)
	}
	a := axis{0, 2, 0, 200}
	if a.at(1) != 0 || a.at(10) != 100 || a.at(100) != 200 {
		t.Errorf("%v %v %v", a.at(1), a.at(10), a.at(100))
	}
	if err := os.WriteFile(from, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := run(from, to); err == nil {
		t.Error("a page without figures was drawn")
	}
}
