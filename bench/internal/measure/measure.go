// Package measure runs programs and loops and says what they took.
package measure

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Bytes is a size as a flag: 4GB, 512MiB, 1000.
type Bytes int64

var units = []struct {
	name  string
	bytes int64
}{
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40},
	{"kB", 1e3}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}, {"B", 1},
}

// Set reads a size.
func (b *Bytes) Set(s string) error {
	number, unit := s, int64(1)
	for _, u := range units {
		if cut, ok := strings.CutSuffix(s, u.name); ok {
			number, unit = cut, u.bytes
			break
		}
	}
	n, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
	if err != nil || n < 0 || n*float64(unit) > math.MaxInt64/2 {
		return fmt.Errorf("%q is no size: write it as 4GB or 512MiB", s)
	}
	*b = Bytes(n * float64(unit))
	return nil
}

// String shows a size with three digits.
func (b *Bytes) String() string { return Size(int64(*b)) }

// Size shows n bytes with three digits and a decimal unit.
func Size(n int64) string {
	v, unit := float64(n), 0
	for v >= 999.5 && unit < 4 {
		v /= 1000
		unit++
	}
	digits := 0
	if unit > 0 && v < 9.995 {
		digits = 2
	} else if unit > 0 && v < 99.95 {
		digits = 1
	}
	return strconv.FormatFloat(v, 'f', digits, 64) + " " + [...]string{"B", "kB", "MB", "GB", "TB"}[unit]
}

// Cost is what one run took.
type Cost struct {
	Wall, User, System time.Duration
	Peak               int64 // bytes of memory at most; 0 for what ran in this process
}

// CPU is user and system time together.
func (c Cost) CPU() time.Duration { return c.User + c.System }

// ExitError is a program that failed, with the end of what it wrote.
type ExitError struct {
	Command string
	Output  string
	Err     error
}

func (e *ExitError) Error() string {
	return fmt.Sprintf("%s: %v\n%s", e.Command, e.Err, e.Output)
}

func (e *ExitError) Unwrap() error { return e.Err }

// Command runs a program and waits for it. Its output is kept for the error and returned.
func Command(dir string, env []string, name string, args ...string) (Cost, string, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	start := time.Now()
	err := cmd.Start()
	var peak int64
	var took time.Duration
	if err == nil {
		over, polled := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(polled)
			for {
				peak = max(peak, highWater(cmd.Process.Pid))
				select {
				case <-over:
					return
				case <-time.After(10 * time.Millisecond):
				}
			}
		}()
		err = cmd.Wait()
		took = time.Since(start)
		close(over)
		<-polled
	}
	c := Cost{Wall: took, Peak: peak}
	if s := cmd.ProcessState; s != nil {
		c.User, c.System = s.UserTime(), s.SystemTime()
		if u, ok := s.SysUsage().(*syscall.Rusage); ok && peak == 0 {
			c.Peak = u.Maxrss << 10 // Linux counts in KiB
		}
	}
	if err != nil {
		text := out.String()
		if len(text) > 4000 {
			text = "..." + text[len(text)-4000:]
		}
		return c, out.String(), &ExitError{Command: filepath.Base(name) + " " + strings.Join(args, " "), Output: text, Err: err}
	}
	return c, out.String(), nil
}

// highWater is the most memory that a process had so far, in bytes; 0 if it is gone. What the kernel tells of a
// process that has ended is never less than what the one that started it had, which may be a lot here.
func highWater(pid int) int64 {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return 0
	}
	for line := range strings.SplitSeq(string(data), "\n") {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(v), "kB")), 10, 64)
			if err != nil {
				return 0
			}
			return kib << 10
		}
	}
	return 0
}

// Func runs fn in this process.
func Func(fn func() error) (Cost, error) {
	var before, after unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &before); err != nil {
		return Cost{}, err
	}
	start := time.Now()
	err := fn()
	c := Cost{Wall: time.Since(start)}
	if e := unix.Getrusage(unix.RUSAGE_SELF, &after); e != nil {
		return c, errors.Join(err, e)
	}
	c.User = time.Duration(after.Utime.Nano() - before.Utime.Nano())
	c.System = time.Duration(after.Stime.Nano() - before.Stime.Nano())
	return c, err
}

// Spread is the lowest, the middle and the highest of several figures.
type Spread struct{ Min, Median, Max float64 }

// Of sorts figures out; of an even number the middle is the mean of the two.
func Of(figures []float64) Spread {
	if len(figures) == 0 {
		return Spread{}
	}
	s := slices.Sorted(slices.Values(figures))
	n := len(s)
	return Spread{Min: s[0], Median: (s[(n-1)/2] + s[n/2]) / 2, Max: s[n-1]}
}

// Seconds picks durations out of costs.
func Seconds(costs []Cost, pick func(Cost) time.Duration) Spread {
	figures := make([]float64, len(costs))
	for i, c := range costs {
		figures[i] = pick(c).Seconds()
	}
	return Of(figures)
}

// Usage counts the files and bytes below dir.
func Usage(dir string) (files, size int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.Type().IsRegular() {
			i, err := e.Info()
			if err != nil {
				return err
			}
			files++
			size += i.Size()
		}
		return nil
	})
	return files, size, err
}

// Space is what a filesystem has free for this user.
type Space struct{ Bytes, Inodes int64 }

// Free asks the filesystem of dir.
func Free(dir string) (Space, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return Space{}, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	free := Space{Bytes: int64(s.Bavail) * s.Bsize, Inodes: int64(s.Ffree)}
	if s.Files == 0 { // btrfs and others make them as needed
		free.Inodes = math.MaxInt64
	}
	return free, nil
}

// StoreNeeds is what a generated store takes at most: about 14 entries and 12 blocks a file.
func StoreNeeds(files int, size int64) Space {
	return Space{Bytes: size + int64(files)*60<<10 + 100<<20, Inodes: int64(files)*15 + 10000}
}

// Times is n times as much.
func (s Space) Times(n int64) Space { return Space{s.Bytes * n, s.Inodes * n} }

// Plus adds up.
func (s Space) Plus(t Space) Space { return Space{s.Bytes + t.Bytes, s.Inodes + t.Inodes} }

// NeedSpace fails clearly if the filesystem of dir has not that much free.
func NeedSpace(dir string, need Space) error {
	free, err := Free(dir)
	if err != nil {
		return err
	}
	if free.Bytes < need.Bytes {
		return fmt.Errorf("%s has %s free, but about %s are needed: choose another directory or smaller sizes", dir, Size(free.Bytes), Size(need.Bytes))
	}
	if free.Inodes < need.Inodes {
		return fmt.Errorf("%s has room for %d more files and folders, but about %d are needed: choose another filesystem or fewer files", dir, free.Inodes, need.Inodes)
	}
	return nil
}
