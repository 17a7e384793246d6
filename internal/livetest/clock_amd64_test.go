package livetest

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/freeze/freezetest"
)

const day = 24 * time.Hour

// The clock of Holdfast and of its guard is set while the instance is stopped; all other processes,
// and those that come later, have the right one.
func init() {
	faults = append(faults,
		fault{name: "the clock jumps ahead",
			halt: "stop", harm: func(k *cloud, r *run) { k.jump(r, day); k.goOn(r) },
			code: 0, events: "started stopped started"},
		fault{name: "the clock jumps back, and Holdfast hangs until --max-downtime",
			flags: []string{"--max-downtime", "3s"},
			halt:  "stop", harm: func(k *cloud, r *run) { k.jump(r, -day); k.AwaitStarts(2); k.goOn(r) },
			code: 1, says: "the instance was down for 3s", events: "started stopped started"},
		fault{name: "the clock jumps back, and Holdfast is killed",
			halt: "stop", harm: func(k *cloud, r *run) { k.jump(r, -day); k.killHoldfast(r) },
			code: killed, events: "started stopped started"},
		fault{name: "both are killed, and the machine comes up with a clock that is late",
			halt: "stop", harm: func(k *cloud, r *run) { k.killBoth(r); k.postdate(day) },
			code: killed, events: "started stopped", down: true},
	)
}

// jump sets the clock of a backup that is halted, and of its guard.
func (c *cloud) jump(r *run, by time.Duration) {
	c.t.Helper()
	guard := c.status().Guard
	setClock(c.t, r.cmd.Process.Pid, by)
	c.signal(guard, syscall.SIGSTOP)
	setClock(c.t, guard, by)
	c.signal(guard, syscall.SIGCONT)
}

// postdate moves the time of the freeze on record.
func (c *cloud) postdate(by time.Duration) {
	c.t.Helper()
	since := c.status().Since
	c.editRecord(func(record map[string]any) { record["since"] = since.Add(by) })
}

// setClock changes what the clock on the wall says to a process that is stopped: programs read it
// through the vDSO, code of the kernel in their own memory, which is replaced here.
func setClock(t *testing.T, pid int, by time.Duration) {
	t.Helper()
	vdso, base := vdsoOf(t, pid)
	freezetest.Eventually(t, fmt.Sprintf("process %d has stopped outside of the vDSO", pid), func() bool {
		return stoppedOutside(pid, base, base+uint64(len(vdso)))
	})
	f, err := elf.NewFile(bytes.NewReader(vdso))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	symbols, err := f.DynamicSymbols()
	i := slices.IndexFunc(symbols, func(s elf.Symbol) bool { return s.Name == "__vdso_clock_gettime" })
	if err != nil || i < 0 {
		t.Fatalf("the vDSO has no clock: %v", err)
	}
	code := []byte{
		0xb8, 228, 0, 0, 0, // mov eax, SYS_clock_gettime
		0x0f, 0x05, // syscall
		0x85, 0xff, // test edi, edi; CLOCK_REALTIME is 0
		0x75, 13, // jnz ret
		0x48, 0xb9, // mov rcx, seconds
	}
	code = binary.LittleEndian.AppendUint64(code, uint64(int64(by/time.Second)))
	code = append(code,
		0x48, 0x01, 0x0e, // add [rsi], rcx
		0xc3) // ret
	// At the end, behind what is in use, and a jump to it.
	at := uint64(len(vdso) - 64)
	if !bytes.Equal(vdso[at:], make([]byte, 64)) && !bytes.HasPrefix(vdso[at:], code[:13]) {
		t.Fatal("the vDSO has no room")
	}
	entry := symbols[i].Value
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	jump := binary.LittleEndian.AppendUint32([]byte{0xe9}, uint32(at-(entry+5)))
	for _, w := range []struct {
		at   uint64
		data []byte
	}{{at, code}, {entry, jump}} {
		if _, err := mem.WriteAt(w.data, int64(base+w.at)); err != nil {
			t.Fatal(err)
		}
	}
}

// vdsoOf returns the vDSO of a process, and where it lies.
func vdsoOf(t *testing.T, pid int) (data []byte, base uint64) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		if !strings.HasSuffix(strings.TrimSpace(line), "[vdso]") {
			continue
		}
		var end uint64
		if _, err := fmt.Sscanf(line, "%x-%x", &base, &end); err != nil {
			t.Fatal(err)
		}
		data = make([]byte, end-base)
		mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
		if err != nil {
			t.Fatal(err)
		}
		defer mem.Close()
		if _, err := mem.ReadAt(data, int64(base)); err != nil {
			t.Fatal(err)
		}
		return data, base
	}
	t.Fatalf("process %d has no vDSO", pid)
	return nil, 0
}

// stoppedOutside tells whether all threads of the process stand still, and none within these addresses.
// If one does, the process goes on for a moment.
func stoppedOutside(pid int, from, to uint64) bool {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	for _, task := range tasks {
		stat, err := os.ReadFile(filepath.Join(task, "stat"))
		_, rest, _ := strings.Cut(string(stat), ") ")
		if err != nil || !strings.HasPrefix(rest, "T") {
			return false
		}
		call, err := os.ReadFile(filepath.Join(task, "syscall"))
		if err != nil {
			return false
		}
		fields := strings.Fields(string(call))
		pc, err := strconv.ParseUint(strings.TrimPrefix(fields[len(fields)-1], "0x"), 16, 64)
		if err != nil {
			return false
		}
		if from <= pc && pc < to {
			_ = syscall.Kill(pid, syscall.SIGCONT)
			time.Sleep(time.Millisecond)
			_ = syscall.Kill(pid, syscall.SIGSTOP)
			return false
		}
	}
	return len(tasks) > 0
}

// TestSetClock: a clock that is set is set, and only for that process.
func TestSetClock(t *testing.T) {
	t.Parallel()
	k := newCloud(t, "")
	k.startProcess()
	pid, err := os.ReadFile(filepath.Join(k.Notes, "pid"))
	if err != nil {
		t.Fatal(err)
	}
	server, err := strconv.Atoi(string(pid))
	if err != nil {
		t.Fatal(err)
	}
	k.signal(server, syscall.SIGSTOP)
	setClock(t, server, -7*day)
	k.signal(server, syscall.SIGCONT)
	freezetest.Eventually(t, "the server notes times of last week", func() bool {
		data, _ := os.ReadFile(filepath.Join(k.Notes, "journal"))
		lines := strings.Split(strings.TrimSpace(string(data)), "\n")
		var e struct{ At time.Time }
		if err := json.Unmarshal([]byte(lines[len(lines)-1]), &e); err != nil {
			return false
		}
		return time.Until(e.At) < -6*day
	})
}
