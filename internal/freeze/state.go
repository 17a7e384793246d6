package freeze

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/progress"
	"github.com/holdfast-backup/holdfast/internal/statedir"
)

// stateVersion is the version of the record on disk. A record of another version is not run.
const stateVersion = 1

// bootIDFile is replaced in tests.
var bootIDFile = "/proc/sys/kernel/random/boot_id"

// freezeSub is the directory of the records in the state directory.
const freezeSub = "freeze"

// identity names a process for good: its number is used again, also after a restart of the machine.
type identity struct {
	PID       int    `json:"pid"`
	Start     uint64 `json:"start"` // clock ticks after boot
	Boot      string `json:"boot_id"`
	Namespace string `json:"pid_namespace"`
}

func identify(pid int) (identity, error) {
	st, err := readStat(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return identity{}, err
	}
	boot, ns, err := whereAmI()
	if err != nil {
		return identity{}, err
	}
	return identity{PID: pid, Start: st.start, Boot: boot, Namespace: ns}, nil
}

func whereAmI() (boot, namespace string, err error) {
	data, err := os.ReadFile(bootIDFile)
	if err != nil {
		return "", "", err
	}
	namespace, err = os.Readlink("/proc/self/ns/pid")
	return strings.TrimSpace(string(data)), namespace, err
}

// alive tells whether the process still runs. One of another PID namespace cannot be looked up; it
// counts as dead, and the lock on the instance decides.
func (id identity) alive() bool {
	if id.PID <= 0 {
		return false
	}
	boot, ns, err := whereAmI()
	if err != nil || boot != id.Boot || ns != id.Namespace {
		return false
	}
	st, err := readStat(fmt.Sprintf("/proc/%d/stat", id.PID))
	return err == nil && st.start == id.Start && st.state != 'Z' && st.state != 'X'
}

// state is the record on disk of a freeze, from before the stop until after the start.
type state struct {
	Version     int           `json:"version"`
	BasePath    Text          `json:"base_path"`
	Method      string        `json:"method"`
	Since       time.Time     `json:"since"`
	MaxDowntime time.Duration `json:"max_downtime"`
	Owner       identity      `json:"owner"`
	Guard       identity      `json:"guard"`
	Recipe      Recipe        `json:"recipe"`
	Disks       []disk        `json:"disks,omitempty"`
	// Reported: the start failed, and its user was told so.
	Reported bool `json:"reported,omitempty"`
}

// stateFiles names the files of one instance.
type stateFiles struct {
	dir string // freeze/ below the state directory
	key string
}

func (f stateFiles) record() string { return filepath.Join(f.dir, f.key+".json") }
func (f stateFiles) lock() string   { return filepath.Join(f.dir, f.key+".lock") }
func (f stateFiles) stop() string   { return filepath.Join(f.dir, f.key+".stop") }
func (f stateFiles) log() string    { return filepath.Join(f.dir, f.key+".log") }

// openState makes the directory and returns the names for the instance at base.
func openState(stateDir, base string) (stateFiles, error) {
	dir, err := statedir.Make(stateDir, freezeSub)
	if err != nil {
		return stateFiles{}, fmt.Errorf("nothing was stopped: %w", err)
	}
	sum := sha256.Sum256([]byte(base))
	return stateFiles{dir: dir, key: hex.EncodeToString(sum[:8])}, nil
}

// basePath is the name by which an instance is told from others.
func basePath(inst *ocis.Instance) (string, error) {
	base := inst.BasePath
	if base == "" {
		if p := Paths(inst); len(p) > 0 {
			base = p[0]
		}
	}
	if base == "" {
		return "", errors.New("cannot freeze: the instance has no data directory")
	}
	base, err := filepath.Abs(base)
	if err != nil {
		return "", err
	}
	if real, err := filepath.EvalSymlinks(base); err == nil {
		base = real
	}
	return base, nil
}

// write puts the record on disk for good, or leaves what was there.
func (f stateFiles) write(s state) error { return statedir.Write(f.record(), s) }

// markReported notes that the user was told of the start that failed.
func (f stateFiles) markReported() error {
	s, err := readState(f.record())
	if err != nil || s.Reported {
		return err
	}
	s.Reported = true
	return f.write(s)
}

// remove takes the record away; that it is gone already is no error.
func (f stateFiles) remove() error { return statedir.Remove(f.record()) }

func readState(path string) (state, error) {
	var s state
	data, err := os.ReadFile(path)
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return s, fmt.Errorf("the record of a freeze %s cannot be read: %w; see that the instance runs, then remove the file", path, err)
	}
	if s.Version != stateVersion {
		return s, fmt.Errorf("the record of a freeze %s has version %d, this holdfast knows %d; use the holdfast that made it, or see that the instance runs and remove the file", path, s.Version, stateVersion)
	}
	return s, nil
}

// InUseError is returned when another Holdfast has the instance frozen, or is about to.
type InUseError struct {
	BasePath string
	PID      int       // 0 if unknown
	Since    time.Time // zero if it has not stopped the instance
}

func (e *InUseError) Error() string {
	who := "another holdfast"
	if e.PID != 0 {
		who = fmt.Sprintf("another holdfast (process %d)", e.PID)
	}
	if e.Since.IsZero() {
		return fmt.Sprintf("%s is at work on the instance at %s; wait for it to end", who, e.BasePath)
	}
	return fmt.Sprintf("%s has frozen the instance at %s since %s; wait for it to end, see holdfast status",
		who, e.BasePath, e.Since.Local().Format(time.DateTime))
}

// instanceLock keeps other Holdfasts away from an instance. A guard inherits its files: the lock is
// free only when both processes have closed them, so it is never unlocked but by closing.
type instanceLock struct{ files []*os.File }

// lockPatience lets a process end that is just about to, or a child come out of its fork.
const lockPatience = 500 * time.Millisecond

// lockInstance takes the lock in the state directory, and that of the base directory itself, which
// also keeps those away that have another state directory. Some network filesystems lock no
// directories; then the former must do. Without files there is the latter alone.
//
// Errors: *InUseError.
func lockInstance(files stateFiles, base string) (*instanceLock, error) {
	for deadline := time.Now().Add(lockPatience); ; time.Sleep(lockPatience / 20) {
		l, err := tryLockInstance(files, base)
		var inUse *InUseError
		if !errors.As(err, &inUse) || !time.Now().Before(deadline) {
			return l, err
		}
	}
}

func tryLockInstance(files stateFiles, base string) (*instanceLock, error) {
	l := &instanceLock{}
	busy := func() error {
		l.release()
		e := &InUseError{BasePath: base}
		if s, err := readState(files.record()); err == nil {
			e.PID, e.Since = s.Owner.PID, s.Since
			if !s.Owner.alive() {
				e.PID = s.Guard.PID
			}
		}
		return e
	}
	if files.dir != "" {
		f, err := statedir.Lock(files.lock())
		if errors.Is(err, statedir.ErrLocked) {
			return nil, busy()
		}
		if err != nil {
			return nil, fmt.Errorf("the state directory cannot be used, so nothing was stopped: %w", err)
		}
		l.files = append(l.files, f)
	}
	d, err := os.Open(base)
	if err != nil {
		return l, nil // the missing directory is for others to report
	}
	if err := statedir.TryFlock(d); err != nil {
		d.Close()
		if errors.Is(err, statedir.ErrLocked) {
			return nil, busy()
		}
		return l, nil
	}
	l.files = append(l.files, d)
	return l, nil
}

// Hold keeps every other Holdfast from freezing the instance whose base data path is base, which may be
// missing, until release is called: it is for those who write to an instance that is stopped. Where the
// state directory cannot be used, only those are kept away that lock the base data path itself.
//
// Errors: *InUseError.
func Hold(stateDir, base string) (release func(), err error) {
	if base, err = basePath(&ocis.Instance{BasePath: base}); err != nil {
		return nil, err
	}
	var inUse *InUseError
	files, err := openState(stateDir, base)
	var l *instanceLock
	if err == nil {
		l, err = lockInstance(files, base)
	}
	if err != nil && !errors.As(err, &inUse) {
		l, err = lockInstance(stateFiles{}, base)
	}
	if err != nil {
		return nil, err
	}
	return l.release, nil
}

func (l *instanceLock) release() {
	for _, f := range l.files {
		f.Close()
	}
	l.files = nil
}

// Status is one freeze that is on record.
type Status struct {
	BasePath    string
	Method      string
	Since       time.Time // when the stop began, UTC
	MaxDowntime time.Duration
	Owner       int // the backup's process
	OwnerAlive  bool
	Guard       int
	GuardAlive  bool
	// Reported: the start failed and the backup said so, rather than died.
	Reported bool
	// File is the record.
	File string
	// Err is set, and the rest may be empty, where the record cannot be read.
	Err error
}

// ReadStatus lists the freezes on record in stateDir ("" is statedir.Default). One whose owner and
// guard are both dead waits for Recover.
//
// Errors: a directory that cannot be read; that there is none is an empty list.
func ReadStatus(stateDir string) ([]Status, error) {
	records, err := listRecords(stateDir)
	if err != nil {
		return nil, err
	}
	var list []Status
	for _, f := range records {
		s, err := readState(f.record())
		if errors.Is(err, fs.ErrNotExist) {
			continue // thawed this very moment
		}
		list = append(list, Status{
			BasePath: string(s.BasePath), Method: s.Method, Since: s.Since, MaxDowntime: s.MaxDowntime,
			Owner: s.Owner.PID, OwnerAlive: s.Owner.alive(),
			Guard: s.Guard.PID, GuardAlive: s.Guard.alive(),
			Reported: s.Reported, File: f.record(), Err: err,
		})
	}
	return list, nil
}

func listRecords(stateDir string) ([]stateFiles, error) {
	dir, keys, err := statedir.Names(stateDir, freezeSub, ".json")
	if err != nil {
		return nil, fmt.Errorf("look for frozen instances: %w", err)
	}
	var list []stateFiles
	for _, key := range keys {
		list = append(list, stateFiles{dir: dir, key: key})
	}
	return list, nil
}

// Recovered is what Recover did about one freeze on record.
type Recovered struct {
	BasePath string
	Method   string
	Since    time.Time // when the stop began, UTC
	// Busy: a living Holdfast or its guard looks after it; nothing was done.
	Busy bool
	PID  int // of that process
	// Reported: the backup told of the start that failed, rather than died.
	Reported bool
	// Started is when the start was given, zero if it failed, or there was nothing to start.
	Started time.Time
	// Running: it runs already, and the record is gone. Sign tells by what that is seen.
	Running bool
	Sign    string
	// Gone: its base path does not exist any more, and neither does the record.
	Gone bool
	Err  error // ErrNotStarted, or a record that cannot be read
}

// RecoverOptions change how Recover starts. The zero value starts everything as it is on record.
type RecoverOptions struct {
	// StartCommand, if not "", is run for the instance at BasePath instead of what is on record.
	StartCommand string
	// BasePath may be "": then nothing is replaced, but no start is tried twice, because the caller
	// has another command for one of them.
	BasePath string
}

// Recover starts the instances again whose backup and guard both died, by kill, power cut or
// restart of the machine. It is for the beginning of every command and for holdfast thaw. Without
// records it costs one look at a directory. stateDir "" is statedir.Default.
//
// Errors: those of the list joined; ErrNotStarted.
func Recover(ctx context.Context, stateDir string) ([]Recovered, error) {
	return RecoverWith(ctx, stateDir, RecoverOptions{})
}

// RecoverWith is Recover with options.
func RecoverWith(ctx context.Context, stateDir string, o RecoverOptions) ([]Recovered, error) {
	records, err := listRecords(stateDir)
	if err != nil {
		return nil, err
	}
	var list []Recovered
	var errs []error
	for _, f := range records {
		r, ok := recoverOne(ctx, f, o)
		if !ok {
			continue
		}
		list = append(list, r)
		if r.Err != nil {
			errs = append(errs, r.Err)
		}
	}
	return list, errors.Join(errs...)
}

// change makes of r what o says for the instance at base.
func (o RecoverOptions) change(base string, r *Recipe) error {
	if o.StartCommand == "" {
		return nil
	}
	if o.BasePath == "" {
		r.Retries = 0
		return nil
	}
	given, err := basePath(&ocis.Instance{BasePath: o.BasePath})
	if err != nil || given != base {
		return err
	}
	dir, err := os.Getwd()
	if err != nil {
		return fmt.Errorf("the directory to run the start command in: %w", err)
	}
	r.Kind = KindCommand
	r.Command = &CommandRecipe{Start: Text(o.StartCommand), Dir: Text(dir), Env: commandEnv()}
	return nil
}

func recoverOne(ctx context.Context, f stateFiles, o RecoverOptions) (Recovered, bool) {
	s, err := readState(f.record())
	r := Recovered{BasePath: string(s.BasePath), Method: s.Method, Since: s.Since, Reported: s.Reported}
	if errors.Is(err, fs.ErrNotExist) {
		return r, false
	}
	if err != nil {
		r.Err = err
		return r, true
	}
	if s.Owner.alive() || s.Guard.alive() {
		r.Busy, r.PID = true, s.Owner.PID
		if !s.Owner.alive() {
			r.PID = s.Guard.PID
		}
		return r, true
	}
	lock, err := lockInstance(f, string(s.BasePath))
	var inUse *InUseError
	if errors.As(err, &inUse) {
		r.Busy, r.PID = true, inUse.PID
		return r, true
	}
	if err != nil {
		r.Err = err
		return r, true
	}
	defer lock.release()
	// Only now is it certain that nobody else is at it: look again.
	if s, err = readState(f.record()); errors.Is(err, fs.ErrNotExist) {
		return r, false
	} else if err != nil {
		r.Err = err
		return r, true
	}
	if r.Err = o.change(r.BasePath, &s.Recipe); r.Err != nil {
		return r, true
	}
	done, err := recoverLocked(ctx, f, s, nil)
	r.Started, r.Sign, r.Gone, r.Err = done.started, done.sign, done.gone, err
	r.Running = done.sign != ""
	return r, true
}

// recovery is what recoverLocked did.
type recovery struct {
	started time.Time
	sign    string // by what is seen that it runs already, "" if it did not
	gone    bool   // there is no such instance any more
}

// recoverLocked undoes a freeze that was left behind; the caller holds the lock of the instance. It
// runs the recipe only if the instance does not run, and there still is one.
func recoverLocked(ctx context.Context, f stateFiles, s state, sink progress.Sink) (done recovery, err error) {
	run := &Run{Log: f.log(), Progress: sink}
	drop := func(kind progress.Kind, format string, args ...any) error {
		if err := f.remove(); err != nil {
			return fmt.Errorf("the record %s is out of date but stays: %w; remove it", f.record(), err)
		}
		sink.Emit(progress.Event{Kind: kind, Phase: "freeze", Message: fmt.Sprintf(format, args...)})
		return nil
	}
	if err := s.disksMounted(f.record()); err != nil {
		return done, err
	}
	if _, err := os.Lstat(string(s.BasePath)); errors.Is(err, fs.ErrNotExist) {
		done.gone = true
		return done, drop(progress.Warning, "an earlier backup left the instance at %s stopped, but that does not exist any more: its record was removed", s.BasePath)
	}
	running := func(fresh bool) (bool, error) {
		sign, ok := alreadyRuns(ctx, s.Recipe, run, fresh)
		if !ok {
			return false, nil
		}
		done.sign = sign
		return true, drop(progress.Info, "an earlier backup left the instance at %s stopped, but it runs already (%s): nothing was started, and the record was removed", s.BasePath, sign)
	}
	if ok, err := running(true); ok {
		return done, err
	}
	if boot, _, err := whereAmI(); err == nil && boot == s.Owner.Boot && !s.Reported {
		// What the dead ones began may still be under way.
		awaitStop(ctx, f, s.Recipe, stopPatience(s.Since, time.Now(), s.Recipe.StopTimeout), run)
	}
	if ok, err := running(false); ok {
		return done, err
	}
	how := "an earlier backup left the instance at %s stopped: starting it"
	if !s.Reported {
		how = "an earlier backup died while it had the instance at %s frozen: starting it"
	}
	sink.Emit(progress.Event{Kind: progress.Warning, Phase: "freeze", Message: fmt.Sprintf(how, s.BasePath)})
	o, err := startInstance(ctx, s.Recipe, run)
	done.started = o.started
	if err == nil || errors.Is(err, ErrNotReady) {
		if rerr := f.remove(); rerr != nil {
			err = errors.Join(err, fmt.Errorf("the instance was started again, but its record stays: %w", rerr))
		}
	}
	if err == nil {
		return done, nil
	}
	since := s.Since.Local().Format(time.DateTime)
	if s.Reported {
		err = fmt.Errorf("an earlier backup left the instance at %s stopped since %s: %w", s.BasePath, since, err)
	} else {
		err = fmt.Errorf("the instance at %s is stopped since %s, by a backup that died: %w", s.BasePath, since, err)
	}
	if done.started.IsZero() {
		err = fmt.Errorf("%w; it is on record in %s: `holdfast thaw` tries again, `holdfast thaw --forget` removes the record once the service runs or is given up", err, f.record())
		if ctx.Err() == nil {
			_ = f.markReported()
		}
	}
	return done, err
}

// Forgotten is a record that Forget removed.
type Forgotten struct {
	BasePath string // "" if the record could not be read
	Method   string
	Since    time.Time // when the stop began, UTC
	Owner    int       // the backup's process
	File     string    // the record that was
}

// Forget removes the record of an instance that is on record as stopped, and starts nothing: for
// users who have started it by hand, or have given it up. base may be "" if there is only one record.
//
// Errors: no such record, several of them; *InUseError if a backup or its guard is at work on it.
func Forget(stateDir, base string) (Forgotten, error) {
	records, err := listRecords(stateDir)
	if err != nil {
		return Forgotten{}, err
	}
	if base != "" {
		if base, err = basePath(&ocis.Instance{BasePath: base}); err != nil {
			return Forgotten{}, err
		}
	}
	type found struct {
		files stateFiles
		s     state
		err   error
	}
	var list []found
	var names []string
	for _, f := range records {
		s, err := readState(f.record())
		if errors.Is(err, fs.ErrNotExist) || base != "" && string(s.BasePath) != base {
			continue
		}
		list = append(list, found{f, s, err})
		names = append(names, cmp.Or(string(s.BasePath), f.record()))
	}
	switch {
	case len(list) == 0 && base != "":
		return Forgotten{}, fmt.Errorf("no instance at %s is on record as stopped", base)
	case len(list) == 0:
		return Forgotten{}, errors.New("no instance is on record as stopped")
	case len(list) > 1:
		return Forgotten{}, fmt.Errorf("%d instances are on record as stopped: %s; name one of them", len(list), strings.Join(names, ", "))
	}
	f := list[0]
	gone := Forgotten{BasePath: string(f.s.BasePath), Method: f.s.Method, Since: f.s.Since, Owner: f.s.Owner.PID, File: f.files.record()}
	if f.err == nil {
		for _, id := range []identity{f.s.Owner, f.s.Guard} {
			if id.alive() {
				return Forgotten{}, &InUseError{BasePath: gone.BasePath, PID: id.PID, Since: f.s.Since}
			}
		}
	}
	lock, err := lockInstance(f.files, gone.BasePath)
	if err != nil {
		return Forgotten{}, err
	}
	defer lock.release()
	return gone, f.files.remove()
}

// stopPatience is how long a stop that began at since may still take. The clock may have been set since
// then, which must not make it longer than the whole.
func stopPatience(since, now time.Time, timeout time.Duration) time.Duration {
	return min(max(since.Add(timeout).Sub(now), 0), timeout)
}

// awaitStop waits for a stop that somebody else began: until its commands have ended, and nobody
// holds the data. It reports whether that came true within d.
func awaitStop(ctx context.Context, f stateFiles, r Recipe, d time.Duration, run *Run) bool {
	deadline := time.Now().Add(d)
	for {
		// Only a stop command can go on without anybody at the data. In all other ways the backup itself
		// has the stop lock, also while it hangs.
		free := r.Kind != KindCommand || stopEnded(f.stop())
		if free {
			u, err := Look(ctx, r.Paths, run.Except...)
			free = err == nil && len(u.Holders) == 0
		}
		if free {
			return true
		}
		if !time.Now().Before(deadline) || !sleep(ctx, 50*time.Millisecond) {
			return false
		}
	}
}

// stopEnded tells whether no process has the stop lock any more, which stop commands inherit.
func stopEnded(path string) bool {
	busy, _, err := tryLock(path)
	return err != nil || !busy
}
