// Command runtests runs the project's checks: gofmt, go vet, staticcheck, and all tests with the
// race detector. A skipped test counts as a failed one, and so does a mount, a loop device, a
// process or a file that the tests leave behind. The last line is "N passed, N failed".
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// staticcheck is run at a pinned version; the checksum database vouches for it.
const staticcheck = "honnef.co/go/tools/cmd/staticcheck@v0.8.2"

// mark is in the environment of all that the tests start, so that survivors are found.
const mark = "RUNTESTS_MARK"

type tally struct {
	passed, failed int
	bad            []string // packages with failures in the run at hand
}

func main() { os.Exit(run()) }

func run() int {
	lint := flag.Bool("lint", false, "only run the linters")
	pattern := flag.String("run", "", "only run the tests that match this `expression`")
	flag.Parse()
	packages := flag.Args()
	if len(packages) == 0 {
		packages = []string{"./..."}
	}

	var t tally
	t.check("gofmt", func() error { return silent("gofmt", "-l", ".") })
	t.check("go vet", func() error { return command(os.Environ(), "go", append([]string{"vet"}, packages...)...) })
	t.check("staticcheck", func() error {
		return command(os.Environ(), "go", append([]string{"run", staticcheck}, packages...)...)
	})
	if !*lint {
		t.tests(*pattern, packages)
	}
	fmt.Printf("%d passed, %d failed\n", t.passed, t.failed)
	if t.failed > 0 {
		return 1
	}
	return 0
}

// check runs one step.
func (t *tally) check(name string, fn func() error) bool {
	began := time.Now()
	if err := fn(); err != nil {
		fmt.Printf("FAIL %s: %v\n", name, err)
		t.failed++
		return false
	}
	fmt.Printf("ok   %s (%.1f s)\n", name, time.Since(began).Seconds())
	t.passed++
	return true
}

func command(env []string, name string, arg ...string) error {
	cmd := exec.Command(name, arg...)
	cmd.Env, cmd.Stdout, cmd.Stderr = env, os.Stdout, os.Stderr
	return cmd.Run()
}

// silent fails if the command prints anything.
func silent(name string, arg ...string) error {
	out, err := exec.Command(name, arg...).CombinedOutput()
	if err == nil && len(bytes.TrimSpace(out)) > 0 {
		err = fmt.Errorf("it says:\n%s", out)
	}
	return err
}

// tests runs the tests in a temporary directory of their own and looks afterwards what is left.
func (t *tally) tests(pattern string, packages []string) {
	// A short name: sockets must fit their paths into 108 bytes.
	tmp, err := os.MkdirTemp(memoryDir(), "hf")
	if err != nil {
		t.check("temporary directory", func() error { return err })
		return
	}
	// Some tests drop their rights and must still find their files.
	if err := os.Chmod(tmp, 0o755); err != nil {
		t.check("temporary directory", func() error { return err })
		return
	}
	value := filepath.Base(tmp)
	env := append(os.Environ(), "TMPDIR="+tmp, mark+"="+value)

	args := []string{"test", "-race", "-json", "-timeout", "30m", "-count=1"}
	if pattern != "" {
		args = append(args, "-run", pattern)
	}
	before := t.failed
	t.goTest(env, append(args, packages...))
	// Engines, daemons and kernels of a busy machine have bad moments. A few packages get a second
	// chance, one after the other and aloud: what fails twice has failed.
	if again := t.bad; len(again) > 0 && len(again) <= maxAgain {
		fmt.Printf("once more, alone: %s\n", strings.Join(again, " "))
		t.failed, t.bad = before, nil
		t.goTest(env, append(append(args, "-p", "1"), again...))
		if len(t.bad) == 0 {
			fmt.Printf("UNSTABLE %s: failed at first, see above\n", strings.Join(again, " "))
		}
	}
	t.check("nothing left behind", func() error {
		var left []string
		for try := 0; ; try++ {
			if left = leftovers(tmp, value); len(left) == 0 {
				return os.Remove(tmp)
			}
			if try == 20 { // a process that was just killed may take a moment
				return fmt.Errorf("the tests left:\n  %s", strings.Join(left, "\n  "))
			}
			time.Sleep(250 * time.Millisecond)
		}
	})
}

// maxAgain is how many packages may have a second chance; more is no accident.
const maxAgain = 4

// goTest runs go test and counts what it says.
func (t *tally) goTest(env, args []string) {
	cmd := exec.Command("go", args...)
	cmd.Env, cmd.Stderr = env, os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.check("go test", func() error { return err })
		return
	}
	before := t.failed
	t.read(out)
	if err := cmd.Wait(); err != nil && t.failed == before {
		t.check("go test", func() error { return err })
	}
}

// memoryDir returns a file system in memory if there is one that the tests can use, else "": they make
// some hundred thousand small files, which takes a disk minutes.
func memoryDir() string {
	const dir = "/dev/shm"
	const tmpfs, enough = 0x01021994, 6 << 30 // bytes free
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Type != tmpfs || int64(st.Bavail)*st.Bsize < enough {
		return ""
	}
	f, err := os.CreateTemp(dir, "hf")
	if err != nil {
		return ""
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if unix.Fsetxattr(int(f.Fd()), "user.holdfast", nil, 0) != nil { // before Linux 6.6
		return ""
	}
	return dir
}

// event is a line of go test -json.
type event struct {
	Action     string
	Package    string
	ImportPath string
	Test       string
	Output     string
	Elapsed    float64
}

// read follows the tests: one line for each package, and the whole output of each failed test.
func (t *tally) read(r io.Reader) {
	type key struct{ pkg, test string }
	output := map[key][]string{}
	failed := map[string]int{} // by package
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 64<<20)
	for sc.Scan() {
		var e event
		if json.Unmarshal(sc.Bytes(), &e) != nil {
			fmt.Println(sc.Text())
			continue
		}
		k := key{e.Package, e.Test}
		switch e.Action {
		case "output":
			output[k] = append(output[k], e.Output)
		case "build-output":
			fmt.Print(e.Output)
		case "pass", "fail", "skip":
			if e.Test == "" {
				t.finished(e, failed[e.Package], strings.Join(output[k], ""))
				continue
			}
			if e.Action == "pass" {
				t.passed++
			} else {
				t.failed++
				failed[e.Package]++
				fmt.Printf("%s %s %s\n%s", strings.ToUpper(e.Action), e.Package, e.Test, strings.Join(output[k], ""))
			}
			delete(output, k)
		}
	}
	if err := sc.Err(); err != nil {
		t.check("reading the tests' output", func() error { return err })
	}
}

// finished reports a package. One that fails although none of its tests did (it does not build, it
// panicked, a race outside of a test) counts as one failure.
func (t *tally) finished(e event, failedTests int, output string) {
	if e.Action == "fail" || failedTests > 0 {
		t.bad = append(t.bad, e.Package)
	}
	switch {
	case e.Action == "skip": // no tests in the package
	case e.Action == "pass":
		fmt.Printf("ok   %s (%.1f s)\n", e.Package, e.Elapsed)
	case failedTests == 0:
		t.failed++
		fmt.Printf("FAIL %s\n%s", e.Package, output)
	default:
		fmt.Printf("FAIL %s (%.1f s)\n", e.Package, e.Elapsed)
	}
}

// leftovers lists mounts and loop devices below tmp, processes that bear the mark, and files.
func leftovers(tmp, value string) []string {
	var left []string
	if p, err := os.ReadFile("/proc/self/mounts"); err == nil {
		for line := range strings.Lines(string(p)) {
			if strings.Contains(line, tmp) {
				left = append(left, "mount: "+strings.TrimSpace(line))
			}
		}
	}
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, l := range loops {
		if p, err := os.ReadFile(l); err == nil && strings.Contains(string(p), tmp) {
			left = append(left, "loop device: "+strings.Split(l, "/")[3]+" of "+strings.TrimSpace(string(p)))
		}
	}
	procs, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, e := range procs {
		if p, err := os.ReadFile(e); err == nil && bytes.Contains(p, []byte(mark+"="+value)) {
			cmdline, _ := os.ReadFile(filepath.Join(filepath.Dir(e), "cmdline"))
			left = append(left, "process: "+strings.Split(e, "/")[2]+" "+string(bytes.ReplaceAll(cmdline, []byte{0}, []byte(" "))))
		}
	}
	files, err := os.ReadDir(tmp)
	if err != nil {
		left = append(left, err.Error())
	}
	for _, f := range files {
		left = append(left, "file: "+filepath.Join(tmp, f.Name()))
	}
	return left
}
