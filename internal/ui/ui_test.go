package ui

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/progress"
)

func TestQuote(t *testing.T) {
	for in, want := range map[string]string{
		"plain":          "plain",
		"two words":      "two words",
		"größe 日本 é 🐎":   "größe 日本 é 🐎",
		"":               `""`,
		"line\nbreak":    `"line\nbreak"`,
		"\x1b[2Jgone":    `"\x1b[2Jgone"`,
		"a\u009bb":       `"a\u009bb"`,
		"bad\xff":        `"bad\xff"`,
		`"looks quoted"`: `"\"looks quoted\""`,
		`quote " inside`: `quote " inside`,
		"evil\u202egpj":  `"evil\u202egpj"`,
		"sep\u2028x":     `"sep\u2028x"`,
		"\x7f":           `"\x7f"`,
	} {
		if got := Quote(in); got != want {
			t.Errorf("Quote(%q) = %s, want %s", in, got, want)
		}
	}
}

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"two\nlines":         "two\nlines",
		"x\x1b[31m\xffé\ty":  `x\x1b[31m\xffé\ty`,
		"replacement \ufffd": "replacement \ufffd",
		"both \ufffd and \r": "both \ufffd and \\r",
	} {
		if got := Clean(in); got != want {
			t.Errorf("Clean(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzNothingEscapesToTheTerminal(f *testing.F) {
	for _, s := range []string{"plain", "\x1b[2J", "\xff\xfe", "a\u202eb", "\u009b", "x\r\ny", `"`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		for _, got := range []string{Quote(s), strings.ReplaceAll(Clean(s), "\n", "")} {
			if strings.ContainsFunc(got, unsafeRune) {
				t.Errorf("%q becomes %q", s, got)
			}
			if strings.ToValidUTF8(got, "") != got {
				t.Errorf("%q becomes invalid UTF-8", s)
			}
		}
	})
}

func TestNumbers(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 1<<20 - 1: "1.0 MiB", 5 << 30: "5.0 GiB",
		1<<63 - 1: "8.0 EiB",
	} {
		if got := Bytes(n); got != want {
			t.Errorf("Bytes(%d) = %s, want %s", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{
		400 * time.Millisecond: "0.4 s", 12 * time.Second: "12.0 s", 185 * time.Second: "3:05",
		3723 * time.Second: "1:02:03",
	} {
		if got := Duration(d); got != want {
			t.Errorf("Duration(%s) = %s, want %s", d, got, want)
		}
	}
	for _, c := range []struct {
		n    int64
		noun string
		want string
	}{{1, "file", "1 file"}, {2, "file", "2 files"}, {0, "entry", "0 entries"}, {3, "key", "3 keys"}} {
		if got := Count(c.n, c.noun); got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}

func TestTable(t *testing.T) {
	got := Table([]string{"Name", ">Size", "Where"}, [][]string{{"a", "1", "x"}, {"日本", "1000", ""}})
	want := []string{
		"Name  Size  Where",
		"-----------------",
		"a        1  x",
		"日本  1000",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestHints(t *testing.T) {
	base := WithHints(errors.New("disk full"), "Make room.")
	wrapped := WithHints(fmt.Errorf("backup: %w", base), "Look at the disk.", "Make room.")
	if got, want := Hints(wrapped), []string{"Look at the disk.", "Make room."}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	joined := errors.Join(errors.New("one"), wrapped)
	if got := Hints(joined); len(got) != 2 {
		t.Errorf("hints of a joined error: %q", got)
	}
	if WithHints(nil, "x") != nil {
		t.Error("a hint makes an error out of nil")
	}
}

// clocked is a printer whose clock the test moves, and that redraws when told.
type clocked struct {
	*Printer
	now      time.Time
	out, err bytes.Buffer
}

func newClocked(t *testing.T, o Options, width int) *clocked {
	t.Helper()
	c := &clocked{now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	o.Out, o.Err, o.Now = &c.out, &c.err, func() time.Time { return c.now }
	if width > 0 {
		o.Width = func() int { return width }
	}
	c.Printer = New(o)
	// The test is the clock; the ticker would only disturb.
	c.Printer.Close()
	return c
}

func (c *clocked) after(d time.Duration, e progress.Event) {
	c.now = c.now.Add(d)
	c.Sink().Emit(e)
}

func (c *clocked) redraw() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tick()
}

func TestPlainLines(t *testing.T) {
	c := newClocked(t, Options{}, 0)
	c.after(0, progress.Event{Kind: progress.Start, Phase: "capture", Unit: "files", Total: 100, TotalBytes: 10 << 20})
	for range 10 {
		c.after(time.Second, progress.Event{Kind: progress.Update, Phase: "capture", Done: 10, Bytes: 1 << 20})
	}
	c.after(0, progress.Event{Kind: progress.Update, Phase: "capture", Done: 50, Bytes: 5 << 20})
	c.redraw()
	c.redraw() // nothing moved: no second line
	c.after(0, progress.Event{Kind: progress.Warning, Message: "a name", Item: "x\x1b"})
	c.after(0, progress.Event{Kind: progress.Verbose, Message: "not seen"})
	c.after(5*time.Second, progress.Event{Kind: progress.Finish, Phase: "capture", Done: 100, Bytes: 10 << 20})
	c.redraw()
	want := `capture: 50%, 50 of 100 files, 5.0 MiB of 10.0 MiB, 512.0 KiB/s, about 0:10 left
warning: a name: "x\x1b"
capture: done in 15.0 s: 100 of 100 files, 10.0 MiB of 10.0 MiB
`
	if got := c.err.String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if c.out.Len() > 0 {
		t.Errorf("progress on the standard output: %q", c.out.String())
	}
}

func TestTerminal(t *testing.T) {
	c := newClocked(t, Options{}, 110)
	c.after(0, progress.Event{Kind: progress.Start, Phase: "check", TotalBytes: 4 << 20})
	c.after(2*time.Second, progress.Event{Kind: progress.Update, Phase: "check", Bytes: 1 << 20, Item: "data/12\x1b"})
	c.redraw()
	bar := "\r\x1b[Kcheck     [######..................]   25%  1.0 MiB of 4.0 MiB  512.0 KiB/s  ETA 0:06"
	if got := c.err.String(); got != bar+`  "data/12\x1b"` {
		t.Errorf("got %q", got)
	}
	c.err.Reset()
	c.Warn("something")
	if got := c.err.String(); got != "\r\x1b[Kwarning: something\n" {
		t.Errorf("the live line is not wiped before a warning: %q", got)
	}
	c.err.Reset()
	c.redraw()
	c.Text("a result")
	if got := c.err.String(); !strings.HasSuffix(got, "\r\x1b[K") {
		t.Errorf("the live line is not wiped before a result: %q", got)
	}
	if c.out.String() != "a result\n" {
		t.Errorf("got %q", c.out.String())
	}
}

func TestNarrowTerminal(t *testing.T) {
	c := newClocked(t, Options{}, 20)
	c.after(0, progress.Event{Kind: progress.Update, Phase: "capture", Item: strings.Repeat("日", 50), Done: 1, Total: 2, Unit: "files"})
	c.redraw()
	line := strings.TrimPrefix(c.err.String(), "\r\x1b[K")
	if columns(line) > 19 {
		t.Errorf("%q takes %d columns of 20", line, columns(line))
	}
}

func TestJSON(t *testing.T) {
	c := newClocked(t, Options{JSON: true}, 0)
	c.after(time.Second, progress.Event{Kind: progress.Start, Phase: "capture"})
	for range 20 { // one a second is let through
		c.after(100*time.Millisecond, progress.Event{Kind: progress.Update, Phase: "capture", Done: 1})
	}
	c.after(0, progress.Event{Kind: progress.Verbose, Message: "not seen"})
	c.after(0, progress.Event{Kind: progress.Warning, Message: "<careful>\n"})
	c.Object(map[string]any{"event": "summary", "verb": "backup"})
	c.Error(WithHints(errors.New("no \x1b room"), "Make room."), 1)
	c.Error(errors.New("plain"), 1)
	var kinds []string
	for _, line := range strings.Split(strings.TrimSpace(c.out.String()), "\n") {
		var e map[string]any
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		kinds = append(kinds, e["event"].(string))
	}
	if want := []string{"start", "progress", "progress", "warning", "summary"}; !reflect.DeepEqual(kinds, want) {
		t.Errorf("got %v, want %v", kinds, want)
	}
	want := `{"event":"error","message":"no \u001b room","hints":["Make room."],"exit_code":1}
{"event":"error","message":"plain","hints":[],"exit_code":1}
`
	if got := c.err.String(); got != want {
		t.Errorf("got %s", got)
	}
}

func TestQuiet(t *testing.T) {
	for _, isJSON := range []bool{false, true} {
		c := newClocked(t, Options{Quiet: true, Verbose: true, JSON: isJSON}, 80)
		for _, k := range []progress.Kind{progress.Start, progress.Update, progress.Info, progress.Verbose, progress.Finish} {
			c.after(time.Minute, progress.Event{Kind: k, Phase: "x", Message: "y"})
		}
		if c.out.Len()+c.err.Len() > 0 {
			t.Errorf("JSON %v: %q %q", isJSON, c.out.String(), c.err.String())
		}
		c.Warn("careful")
		if c.out.Len()+c.err.Len() == 0 {
			t.Error("quiet swallows a warning")
		}
	}
}

func TestErrorText(t *testing.T) {
	c := newClocked(t, Options{Quiet: true}, 0)
	c.Error(WithHints(errors.New("one\ntwo\x1b"), "First.", "Second."), 1)
	c.Error(nil, 0)
	want := "error: one\n       two\\x1b\nhint:  First.\nhint:  Second.\n"
	if got := c.err.String(); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestManyReporters(t *testing.T) {
	var out, errs lockedBuffer
	p := New(Options{Out: &out, Err: &errs, Width: func() int { return 60 }})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 200 {
				p.Sink().Emit(progress.Event{Kind: progress.Update, Phase: fmt.Sprint("phase", i%3), Done: 1})
				p.Sink().Emit(progress.Event{Kind: progress.Info, Message: "x"})
			}
		})
	}
	wg.Wait()
	p.Close()
	p.Close()
	p.Text("after the end")
	if n := strings.Count(errs.String(), "x\n"); n != 1600 {
		t.Errorf("%d of 1600 lines", n)
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
