// Command plot draws the times of docs/BENCHMARKS.md against the number of files, as SVG:
//
//	go run ./bench/plot docs/BENCHMARKS.md docs/benchmarks.svg
//
// Both axes are logarithmic: what costs in proportion is a straight line that rises by as much as it
// goes to the right.
package main

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: plot BENCHMARKS.md PLOT.svg")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "plot:", err)
		os.Exit(1)
	}
}

func run(from, to string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	lines, err := read(f)
	if err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	text, err := draw(lines)
	if err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	return os.WriteFile(to, []byte(text), 0o644)
}

// point is a time in seconds.
type point struct{ files, seconds float64 }

// line is a step of a program.
type line struct {
	step, program string
	points        []point
}

// drawn are the steps that are drawn, with their colours.
var drawn = []struct{ step, colour string }{
	{"first backup", "#1f77b4"}, {"1 % changed", "#2ca02c"}, {"unchanged", "#ff7f0e"}, {"restore all", "#9467bd"},
}

var (
	section = regexp.MustCompile(`^<!-- bench files=(\d+) `)
	row     = regexp.MustCompile(`^\| ([^|]+) \| (holdfast|restic) \| ([0-9.]+)`)
)

// read finds the figures of the sections that bench/run wrote.
func read(r io.Reader) ([]*line, error) {
	var lines []*line
	files := 0.0
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		text := sc.Text()
		if m := section.FindStringSubmatch(text); m != nil {
			files, _ = strconv.ParseFloat(m[1], 64)
		} else if strings.HasPrefix(text, "<!-- ") {
			files = 0
		}
		m := row.FindStringSubmatch(text)
		if m == nil || files == 0 {
			continue
		}
		if !slices.ContainsFunc(drawn, func(d struct{ step, colour string }) bool { return d.step == m[1] }) {
			continue
		}
		v, err := strconv.ParseFloat(m[3], 64)
		if err != nil || v <= 0 {
			return nil, fmt.Errorf("no time in %q", text)
		}
		i := slices.IndexFunc(lines, func(l *line) bool { return l.step == m[1] && l.program == m[2] })
		if i < 0 {
			i = len(lines)
			lines = append(lines, &line{step: m[1], program: m[2]})
		}
		lines[i].points = append(lines[i].points, point{files, v})
	}
	for _, l := range lines {
		slices.SortFunc(l.points, func(a, b point) int { return cmp.Compare(a.files, b.files) })
	}
	return lines, sc.Err()
}

// The sheet, in pixels.
const (
	width, height          = 840, 520
	left, right, top, foot = 70, 210, 20, 50
)

// axis maps values onto pixels, by their logarithms.
type axis struct{ min, max, from, to float64 }

func (a axis) at(v float64) float64 {
	return a.from + (math.Log10(v)-a.min)/(a.max-a.min)*(a.to-a.from)
}

// draw makes the picture.
func draw(lines []*line) (string, error) {
	if len(lines) == 0 {
		return "", errors.New("there are no figures: run `make bench` first")
	}
	x := axis{math.Inf(1), math.Inf(-1), left, width - right}
	y := axis{math.Inf(1), math.Inf(-1), height - foot, top}
	for _, l := range lines {
		for _, p := range l.points {
			x.min, x.max = min(x.min, math.Log10(p.files)), max(x.max, math.Log10(p.files))
			y.min, y.max = min(y.min, math.Log10(p.seconds)), max(y.max, math.Log10(p.seconds))
		}
	}
	x.min, x.max = math.Floor(x.min), math.Ceil(x.max+0.01)
	y.min, y.max = math.Floor(y.min), math.Ceil(y.max+0.01)
	var w strings.Builder
	fmt.Fprintf(&w, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="13">`+"\n", width, height, width, height)
	fmt.Fprintf(&w, `<rect width="%d" height="%d" fill="white"/>`+"\n", width, height)
	for d := x.min; d <= x.max; d++ {
		v := math.Pow(10, d)
		fmt.Fprintf(&w, `<path d="M%.1f %d V%d" stroke="#ddd"/><text x="%.1f" y="%d" text-anchor="middle">%s</text>`+"\n", x.at(v), top, height-foot, x.at(v), height-foot+18, label(v))
	}
	for d := y.min; d <= y.max; d++ {
		v := math.Pow(10, d)
		fmt.Fprintf(&w, `<path d="M%d %.1f H%d" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end">%s s</text>`+"\n", left, y.at(v), width-right, left-6, y.at(v)+4, label(v))
	}
	fmt.Fprintf(&w, `<text x="%d" y="%d" text-anchor="middle">files</text>`+"\n", (left+width-right)/2, height-10)
	legend := top + 10
	for _, d := range drawn {
		for _, program := range []string{"restic", "holdfast"} {
			i := slices.IndexFunc(lines, func(l *line) bool { return l.step == d.step && l.program == program })
			if i < 0 {
				continue
			}
			dash := ""
			if program == "restic" {
				dash = ` stroke-dasharray="6 4"`
			}
			var path strings.Builder
			for k, p := range lines[i].points {
				fmt.Fprintf(&path, "%s%.1f %.1f ", map[bool]string{true: "M", false: "L"}[k == 0], x.at(p.files), y.at(p.seconds))
				fmt.Fprintf(&w, `<circle cx="%.1f" cy="%.1f" r="3.5" fill="%s"/>`+"\n", x.at(p.files), y.at(p.seconds), d.colour)
			}
			fmt.Fprintf(&w, `<path d="%s" fill="none" stroke="%s" stroke-width="2"%s/>`+"\n", strings.TrimSpace(path.String()), d.colour, dash)
			fmt.Fprintf(&w, `<path d="M%d %d h30" stroke="%s" stroke-width="2"%s/><text x="%d" y="%d">%s, %s</text>`+"\n", width-right+15, legend, d.colour, dash, width-right+52, legend+4, d.step, program)
			legend += 22
		}
	}
	w.WriteString("</svg>\n")
	return w.String(), nil
}

// label writes a power of ten.
func label(v float64) string {
	switch {
	case v >= 1e6:
		return strconv.FormatFloat(v/1e6, 'g', 6, 64) + " M"
	case v >= 1e3:
		return strconv.FormatFloat(v/1e3, 'g', 6, 64) + " k"
	}
	return strconv.FormatFloat(v, 'g', 6, 64)
}
