package ui

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Quote returns s as it can stand on a line of a terminal: s itself if it is plain text, and a Go
// string literal if it is empty, is no UTF-8, or holds control or invisible characters. A name
// that begins with a quotation mark is quoted too, so that no name can look like a quoted one.
func Quote(s string) string {
	if s == "" || s[0] == '"' || !utf8.ValidString(s) || strings.IndexFunc(s, unsafeRune) >= 0 {
		return strconv.Quote(s)
	}
	return s
}

// unsafeRune tells runes that move the cursor, end the line, or turn the direction of writing.
// Spaces of all kinds are left alone: they are common in real names.
func unsafeRune(r rune) bool {
	return unicode.IsControl(r) || r == '\u2028' || r == '\u2029' || unicode.Is(unicode.Bidi_Control, r)
}

// Clean makes a message fit for a terminal: line breaks and plain text stay, any other control
// character and what is no UTF-8 is written as an escape.
func Clean(s string) string {
	if utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return r != '\n' && unsafeRune(r) }) < 0 {
		return s
	}
	var b strings.Builder
	for len(s) > 0 {
		r, n := utf8.DecodeRuneInString(s)
		if r == '\n' || (r != utf8.RuneError || n > 1) && !unsafeRune(r) {
			b.WriteString(s[:n])
		} else {
			q := strconv.Quote(s[:n])
			b.WriteString(q[1 : len(q)-1])
		}
		s = s[n:]
	}
	return b.String()
}

// Bytes writes a size with a binary unit: "0 B", "1.5 KiB", "12.0 GiB".
func Bytes(n int64) string {
	if n < 1024 && n > -1024 {
		return fmt.Sprintf("%d B", n)
	}
	f := float64(n)
	for _, unit := range []string{"KiB", "MiB", "GiB", "TiB", "PiB"} {
		f /= 1024
		if f < 1023.95 && f > -1023.95 {
			return fmt.Sprintf("%.1f %s", f, unit)
		}
	}
	return fmt.Sprintf("%.1f EiB", f/1024)
}

// Count writes a number with its noun: "1 file", "2 files".
func Count(n int64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	switch {
	case strings.HasSuffix(noun, "y") && !strings.HasSuffix(noun, "ey"):
		noun = noun[:len(noun)-1] + "ies"
	case strings.HasSuffix(noun, "s"):
	default:
		noun += "s"
	}
	return strconv.FormatInt(n, 10) + " " + noun
}

// Duration writes how long something took: "0.4 s", "12.0 s", "3:05", "1:02:03".
func Duration(d time.Duration) string {
	if d < time.Minute {
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return clock(d)
}

func clock(d time.Duration) string {
	s := int64(d.Round(time.Second) / time.Second)
	if s >= 3600 {
		return fmt.Sprintf("%d:%02d:%02d", s/3600, s/60%60, s%60)
	}
	return fmt.Sprintf("%d:%02d", s/60, s%60)
}

// Table lays out rows in columns two spaces apart, under a heading and a rule. Columns whose
// heading begins with ">" are aligned right. Cells must have gone through Quote where needed.
func Table(head []string, rows [][]string) []string {
	width := make([]int, len(head))
	right := make([]bool, len(head))
	names := make([]string, len(head))
	for i, h := range head {
		names[i], right[i] = strings.TrimPrefix(h, ">"), strings.HasPrefix(h, ">")
		width[i] = columns(names[i])
	}
	for _, r := range rows {
		for i, c := range r {
			width[i] = max(width[i], columns(c))
		}
	}
	line := func(cells []string) string {
		var b strings.Builder
		for i, c := range cells {
			pad := strings.Repeat(" ", width[i]-columns(c))
			if right[i] {
				b.WriteString(pad + c)
			} else {
				b.WriteString(c + pad)
			}
			b.WriteString("  ")
		}
		return strings.TrimRight(b.String(), " ")
	}
	total := 2 * (len(head) - 1)
	for _, w := range width {
		total += w
	}
	out := []string{line(names), strings.Repeat("-", total)}
	for _, r := range rows {
		out = append(out, line(r))
	}
	return out
}

// columns counts the terminal columns of s, near enough for tables: combining marks take none,
// East Asian wide characters and pictures two.
func columns(s string) int {
	n := 0
	for _, r := range s {
		n += runeColumns(r)
	}
	return n
}

func runeColumns(r rune) int {
	switch {
	case unicode.Is(unicode.Mn, r) || unicode.Is(unicode.Me, r) || r == '\u200d':
		return 0
	case r >= 0x1100 && (r <= 0x115f || r >= 0x2e80 && r <= 0xa4cf || r >= 0xac00 && r <= 0xd7a3 ||
		r >= 0xf900 && r <= 0xfaff || r >= 0xfe30 && r <= 0xfe6f || r >= 0xff00 && r <= 0xff60 ||
		r >= 0xffe0 && r <= 0xffe6 || r >= 0x1f300 && r <= 0x1faff || r >= 0x20000 && r <= 0x3fffd):
		return 2
	}
	return 1
}

// cut shortens s to w columns.
func cut(s string, w int) string {
	n := 0
	for i, r := range s {
		n += runeColumns(r)
		if n > w {
			return s[:i]
		}
	}
	return s
}
