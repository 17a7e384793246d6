package freeze

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/progress"
)

// The hidden arguments by which this program runs itself.
const (
	guardArgument = "__guard"
	startArgument = "__start"
)

// hooked is set by MaybeGuard: without it in main, a guard would be a second backup.
var hooked atomic.Bool

// MaybeGuard must be called first thing in main, and in TestMain of tests that freeze. In a process
// that was started to be a guard it does that work and exits; in all others it returns at once.
func MaybeGuard() {
	if len(os.Args) == 2 {
		switch os.Args[1] {
		case guardArgument:
			os.Exit(guardMain())
		case startArgument:
			os.Exit(shimMain())
		}
	}
	hooked.Store(true)
}

// Descriptors of a guard.
const (
	guardSocket = 3 // to the backup; its end tells that the backup died
	guardLocks  = 4 // and up: the files of instanceLock
)

// message is what backup and guard tell each other, one JSON object each.
type message struct {
	Kind   string       `json:"kind"`
	Config *guardConfig `json:"config,omitempty"` // msgConfig

	Event   *progress.Event `json:"event,omitempty"`   // msgEvent
	Reason  string          `json:"reason,omitempty"`  // msgGivenUp
	Stopped bool            `json:"stopped,omitempty"` // msgThaw: the stop was proven
	Started time.Time       `json:"started,omitzero"`  // msgResult, as are the following
	Ready   time.Time       `json:"ready,omitzero"`
	// Since is the time since Started, by the clock that nobody sets.
	Since    time.Duration `json:"since,omitempty"`
	Took     time.Duration `json:"took,omitempty"`
	Runs     string        `json:"runs,omitempty"` // nothing was started, because this still runs
	Error    string        `json:"error,omitempty"`
	NotReady bool          `json:"not_ready,omitempty"`
	Stays    bool          `json:"stays,omitempty"` // the guard goes on watching
}

const (
	msgConfig  = "config"   // backup: the first message
	msgWatch   = "watching" // guard: the answer
	msgArm     = "arm"      // backup: the stop comes now
	msgArmed   = "armed"    // guard: the answer
	msgStopped = "stopped"  // backup: the stop is proven
	msgBeat    = "beat"     // both: a sign of life
	msgThaw    = "thaw"     // backup: start the instance
	msgGivenUp = "given up" // guard: it starts the instance, the backup is over
	msgEvent   = "event"    // guard: to be reported
	msgResult  = "result"   // guard: how the start went
)

// guardConfig is all that a guard knows. It comes through the socket because it may hold secrets.
type guardConfig struct {
	Dir         Text          `json:"dir"`
	Key         string        `json:"key"`
	BasePath    Text          `json:"base_path"`
	Recipe      Recipe        `json:"recipe"`
	MaxDowntime time.Duration `json:"max_downtime"`
	HangTimeout time.Duration `json:"hang_timeout"`
	Tuning      tuning        `json:"tuning"`
}

// tuning holds what only tests change.
type tuning struct {
	// Linger is how long a guard watches over an instance that was told to stop but did not: it may
	// stop yet. 0 is the stop timeout.
	Linger time.Duration `json:"linger"`
	// LingerPoll is the pause between its looks; three empty ones in a row mean that it is down.
	LingerPoll time.Duration `json:"linger_poll"`
	// Persist is how long a guard goes on trying to start the instance when nobody is left to tell.
	Persist      time.Duration `json:"persist"`
	PersistPause time.Duration `json:"persist_pause"`
	// Grace is how long the work may take to end after it was cancelled, before the thaw comes anyway.
	Grace time.Duration `json:"grace"`
}

var defaultTuning = tuning{
	LingerPoll:   time.Second,
	Persist:      15 * time.Minute,
	PersistPause: 30 * time.Second,
	Grace:        10 * time.Second,
}

// wire writes and reads messages. Writers never wait for long for a peer that hangs.
type wire struct {
	conn   net.Conn
	dec    *json.Decoder
	mu     sync.Mutex
	broken error // guarded by mu; half a message was written, another would make no sense
}

func newWire(f *os.File) (*wire, error) {
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return nil, err
	}
	return &wire{conn: conn, dec: json.NewDecoder(conn)}, nil
}

func (w *wire) send(m message) error {
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.broken != nil {
		return w.broken
	}
	if err := w.conn.SetWriteDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return err
	}
	_, w.broken = w.conn.Write(append(data, '\n'))
	return w.broken
}

func (w *wire) receive() (message, error) {
	var m message
	err := w.dec.Decode(&m)
	return m, err
}

// guard is the other side of a freeze: it has the recipe, and runs it when it is asked, or when the
// backup can no longer ask.
type guard struct {
	cfg    guardConfig
	files  stateFiles
	wire   *wire
	locks  []*os.File
	parent int
	log    *os.File
	run    *Run

	oom       []byte       // own oom_score_adj as it was, nil if it was left
	lastBeat  atomic.Int64 // nanoseconds of the monotonic clock since epoch
	epoch     time.Time
	orphaned  atomic.Bool // the socket has ended
	over      atomic.Bool // the backup was given up; it may hang, and gets no reports
	messages  chan message
	thawing   chan struct{} // closed when messages no longer matter
	stopped   bool
	parentEnd chan struct{} // closed at the end of the socket
}

func guardMain() int {
	syscall.CloseOnExec(guardSocket)
	var locks []*os.File
	for fd := guardLocks; fd < guardLocks+2; fd++ {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			syscall.CloseOnExec(fd)
			locks = append(locks, os.NewFile(uintptr(fd), "lock"))
		}
	}
	w, err := newWire(os.NewFile(guardSocket, "socket"))
	if err != nil {
		fmt.Fprintln(os.Stderr, "holdfast: this command is for holdfast's own use")
		return 2
	}
	// Caught and dropped, not ignored: the server would inherit that. Only SIGKILL ends a guard
	// before its time.
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM,
		unix.SIGPIPE, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM)
	_ = os.Chdir("/") // hold no mount busy
	m, err := w.receive()
	if err != nil || m.Kind != msgConfig || m.Config == nil {
		return 1
	}
	g := &guard{
		cfg: *m.Config, files: stateFiles{dir: string(m.Config.Dir), key: m.Config.Key}, wire: w, locks: locks,
		parent: os.Getppid(), epoch: time.Now(),
		messages: make(chan message), thawing: make(chan struct{}), parentEnd: make(chan struct{}),
	}
	if g.log, err = openLog(g.files.log()); err != nil {
		_ = w.send(message{Kind: msgResult, Error: err.Error()})
		return 1
	}
	g.run = &Run{Log: g.files.log(), Except: []int{g.parent}, Progress: g.report}
	g.protect()
	if err := w.send(message{Kind: msgWatch}); err != nil {
		return 1
	}
	g.beat()
	go g.listen()
	g.watch()
	return 0
}

// protect asks the kernel to spare this process when memory runs out. Only root may.
func (g *guard) protect() {
	const file = "/proc/self/oom_score_adj"
	old, err := os.ReadFile(file)
	if err == nil && os.WriteFile(file, []byte("-900"), 0) == nil {
		g.oom = old
	}
}

// unprotect comes before the server is started, which would inherit it.
func (g *guard) unprotect() {
	if g.oom != nil {
		_ = os.WriteFile("/proc/self/oom_score_adj", g.oom, 0)
	}
}

func (g *guard) note(format string, args ...any) {
	fmt.Fprintf(g.log, "%s guard %d: %s\n", time.Now().UTC().Format(time.RFC3339), os.Getpid(), fmt.Sprintf(format, args...))
}

func (g *guard) report(e progress.Event) {
	if !g.orphaned.Load() && !g.over.Load() {
		_ = g.wire.send(message{Kind: msgEvent, Event: &e})
	}
}

func (g *guard) beat() { g.lastBeat.Store(int64(time.Since(g.epoch))) }

func (g *guard) silence() time.Duration {
	return time.Since(g.epoch) - time.Duration(g.lastBeat.Load())
}

// listen reads messages to the end of the socket.
func (g *guard) listen() {
	defer close(g.parentEnd)
	for {
		m, err := g.wire.receive()
		if err != nil {
			g.orphaned.Store(true)
			return
		}
		g.beat()
		if m.Kind == msgBeat {
			continue
		}
		select {
		case g.messages <- m:
		case <-g.thawing:
		}
	}
}

// watch is the life of a guard.
func (g *guard) watch() {
	armed := false
	var downtime <-chan time.Time // on the monotonic clock, as all timers are
	look := time.NewTicker(max(g.cfg.HangTimeout/8, time.Millisecond))
	defer look.Stop()
	for {
		select {
		case m := <-g.messages:
			switch m.Kind {
			case msgArm:
				armed = true
				downtime = time.After(g.cfg.MaxDowntime)
				_ = g.wire.send(message{Kind: msgArmed})
			case msgStopped:
				g.stopped = true
			case msgThaw:
				g.stopped = m.Stopped
				g.thaw(true)
				return
			}
		case <-g.parentEnd:
			if !armed {
				_ = g.files.remove() // nothing was stopped
				return
			}
			g.giveUp("the backup died")
			return
		case <-downtime:
			g.giveUp(fmt.Sprintf("the instance was down for %s, the most that is allowed", g.cfg.MaxDowntime))
			return
		case <-look.C:
			if !armed || g.silence() < g.cfg.HangTimeout {
				continue
			}
			// If this process was held up itself, its mail is read first.
			time.Sleep(min(time.Second, g.cfg.HangTimeout/4))
			if g.silence() >= g.cfg.HangTimeout {
				g.giveUp(fmt.Sprintf("the backup gave no sign of life for %s", g.cfg.HangTimeout))
				return
			}
		}
	}
}

// giveUp ends the backup and starts the instance.
func (g *guard) giveUp(reason string) {
	g.note("%s", reason)
	g.over.Store(true)
	_ = g.wire.send(message{Kind: msgGivenUp, Reason: reason})
	g.thaw(false)
}

// thaw runs the recipe. asked: the backup is there and knows how far the stop got.
func (g *guard) thaw(asked bool) {
	close(g.thawing)
	end := make(chan struct{})
	defer close(end)
	go func() {
		for {
			select {
			case <-end:
				return
			case <-time.After(min(time.Second, g.cfg.HangTimeout/4)):
				_ = g.wire.send(message{Kind: msgBeat})
			}
		}
	}()
	ctx := context.Background()
	down := g.stopped
	if !asked {
		free := awaitStop(ctx, g.files, g.cfg.Recipe, g.patience(), g.run)
		down = down || free
	}
	g.unprotect()
	deadline := time.Now().Add(g.cfg.Tuning.Persist)
	for try := 0; ; try++ {
		if sign, ok := "", false; try > 0 {
			if sign, ok = alreadyRuns(ctx, g.cfg.Recipe, g.run, false); ok {
				g.note("the instance runs already: %s", sign)
				if err := g.files.remove(); err != nil {
					g.note("the record stays: %v", err)
				}
				return
			}
		}
		o, err := startInstance(ctx, g.cfg.Recipe, g.run)
		up := err == nil || errors.Is(err, ErrNotReady)
		result := message{Kind: msgResult, Started: o.started, Ready: o.ready, Took: o.took, Runs: o.runs}
		switch {
		case err != nil:
			result.Error, result.NotReady = err.Error(), errors.Is(err, ErrNotReady)
			g.note("%v", err)
		case o.runs != "":
			g.note("started nothing: %s still runs", o.runs)
		default:
			g.note("started the instance")
		}
		// With nobody left to tell, trying on is all that can be done.
		again := !up && (!asked || g.orphaned.Load()) && time.Now().Before(deadline)
		result.Stays = again || up && !down
		if up {
			if err := g.files.remove(); err != nil {
				g.note("the record stays: %v", err)
			}
			for _, f := range g.locks {
				f.Close()
			}
		}
		if try == 0 {
			if !o.started.IsZero() {
				result.Since = time.Since(o.started)
			}
			if !up && asked {
				g.reported()
			}
			_ = g.wire.send(result)
		}
		if up && !down {
			g.linger(ctx)
		}
		if !again {
			return
		}
		time.Sleep(g.cfg.Tuning.PersistPause)
	}
}

// reported notes in the record that the backup lives and tells of the start that failed.
func (g *guard) reported() {
	if g.orphaned.Load() {
		return
	}
	if err := g.files.markReported(); err != nil {
		g.note("%v", err)
	}
}

// patience is how long a stop may still take that was not proven.
func (g *guard) patience() time.Duration {
	if g.stopped {
		return 0
	}
	return g.cfg.Recipe.StopTimeout
}

// linger watches over an instance that was told to stop, did not in time, and may stop yet. It
// keeps nobody from the instance: it ends when another backup comes.
func (g *guard) linger(ctx context.Context) {
	d := g.cfg.Tuning.Linger
	if d <= 0 {
		d = g.cfg.Recipe.StopTimeout
	}
	empty := 0
	// One that seems down at the end is looked at until that is certain.
	for deadline := time.Now().Add(d); empty > 0 || time.Now().Before(deadline); time.Sleep(g.cfg.Tuning.LingerPoll) {
		if _, err := os.Lstat(g.files.record()); err == nil {
			return // somebody has frozen it again
		}
		u, err := Look(ctx, g.cfg.Recipe.Paths, g.run.Except...)
		if err != nil || len(u.Holders) > 0 {
			empty = 0
			continue
		}
		if empty++; empty < 3 {
			continue
		}
		lock, err := lockInstance(g.files, string(g.cfg.BasePath))
		if err != nil {
			empty = 0
			continue // if it is a backup, its record will show
		}
		g.note("the instance stopped after all, starting it")
		if _, err := startInstance(ctx, g.cfg.Recipe, g.run); err != nil {
			g.note("%v", err)
		}
		lock.release()
		return
	}
}

// guardClient is the backup's end.
type guardClient struct {
	cmd    *exec.Cmd
	wire   *wire
	id     identity
	exited chan struct{} // the process was waited for

	sink    progress.Sink
	armed   chan struct{}
	givenUp chan string   // the reason, once
	result  chan message  // once
	dead    chan struct{} // closed at the end of the socket
	seen    chan struct{} // a sign of life, dropped if nobody looks
	end     chan struct{} // closed by close
	once    sync.Once
}

// selfExecutable is this very program, also when its file was replaced by an update meanwhile.
func selfExecutable() string {
	const link = "/proc/self/exe"
	path, err := os.Executable()
	if err != nil {
		return link
	}
	a, err1 := os.Stat(path)
	b, err2 := os.Stat(link)
	if err1 != nil || err2 != nil || !os.SameFile(a, b) {
		return link
	}
	return path
}

// startGuard starts a guard that watches but does nothing until it is armed.
func startGuard(cfg guardConfig, lock *instanceLock, sink progress.Sink) (*guardClient, error) {
	fail := func(err error) (*guardClient, error) {
		return nil, fmt.Errorf("the guard that would start the instance again cannot be started, so nothing was stopped: %w", err)
	}
	if !hooked.Load() {
		return fail(errors.New("this program does not call freeze.MaybeGuard"))
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fail(os.NewSyscallError("socketpair", err))
	}
	theirs := os.NewFile(uintptr(fds[1]), "guard")
	defer theirs.Close()
	w, err := newWire(os.NewFile(uintptr(fds[0]), "guard"))
	if err != nil {
		return fail(err)
	}
	cmd := exec.Command(selfExecutable())
	cmd.Args = []string{os.Args[0], guardArgument}
	cmd.Env = commandEnv()
	cmd.ExtraFiles = append([]*os.File{theirs}, lock.files...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	log, err := openLog(stateFiles{dir: string(cfg.Dir), key: cfg.Key}.log())
	if err != nil {
		w.conn.Close()
		return fail(err)
	}
	defer log.Close()
	cmd.Stderr = log // should it crash
	if err := cmd.Start(); err != nil {
		w.conn.Close()
		return fail(err)
	}
	theirs.Close()
	c := &guardClient{
		cmd: cmd, wire: w, sink: sink, exited: make(chan struct{}),
		armed: make(chan struct{}, 1), givenUp: make(chan string, 1), result: make(chan message, 1),
		dead: make(chan struct{}), seen: make(chan struct{}, 1), end: make(chan struct{}),
	}
	watching := make(chan struct{}, 1)
	c.id, err = identify(cmd.Process.Pid)
	go func() {
		_ = cmd.Wait()
		close(c.exited)
	}()
	go c.listen(watching)
	if err == nil {
		err = w.send(message{Kind: msgConfig, Config: &cfg})
	}
	if err == nil {
		select {
		case <-watching:
		case m := <-c.result:
			err = errors.New(m.Error)
		case <-c.dead:
			err = errors.New("it ended at once")
		case <-time.After(guardAnswer):
			err = fmt.Errorf("it gave no answer within %s", guardAnswer)
		}
	}
	if err != nil {
		c.kill()
		return fail(err)
	}
	go c.beats(cfg.HangTimeout / 6)
	return c, nil
}

// guardAnswer is how long a guard may take for an answer that costs it nothing, on a machine under
// heavy load.
const guardAnswer = 15 * time.Second

func (c *guardClient) listen(watching chan<- struct{}) {
	defer close(c.dead)
	for {
		m, err := c.wire.receive()
		if err != nil {
			return
		}
		select {
		case c.seen <- struct{}{}:
		default:
		}
		switch m.Kind {
		case msgWatch:
			watching <- struct{}{}
		case msgArmed:
			c.armed <- struct{}{}
		case msgGivenUp:
			c.givenUp <- m.Reason
		case msgEvent:
			if m.Event != nil {
				c.sink.Emit(*m.Event)
			}
		case msgResult:
			c.result <- m
			if m.Stays {
				return
			}
		}
	}
}

func (c *guardClient) beats(every time.Duration) {
	t := time.NewTicker(max(every, time.Millisecond))
	defer t.Stop()
	for {
		select {
		case <-c.end:
			return
		case <-c.dead:
			return
		case <-t.C:
			_ = c.wire.send(message{Kind: msgBeat})
		}
	}
}

// arm returns once the guard will start the instance, come what may.
func (c *guardClient) arm() error {
	err := c.wire.send(message{Kind: msgArm})
	if err == nil {
		select {
		case <-c.armed:
			return nil
		case <-c.dead:
			err = errors.New("it ended")
		case <-time.After(guardAnswer):
			err = errors.New("it gives no answer")
		}
	}
	return fmt.Errorf("the guard that would start the instance again does not work, so nothing was stopped: %w", err)
}

// await waits for the outcome of a thaw; false means that the guard is dead or hangs.
func (c *guardClient) await(silence time.Duration) (message, bool) {
	t := time.NewTimer(silence)
	defer t.Stop()
	for {
		select {
		case m := <-c.result:
			return m, true
		case <-c.dead:
			select {
			case m := <-c.result: // its last words
				return m, true
			default:
				return message{}, false
			}
		case <-c.seen:
			t.Reset(silence)
		case <-t.C:
			return message{}, false
		}
	}
}

// kill makes sure that the guard does nothing any more.
func (c *guardClient) kill() {
	_ = c.cmd.Process.Kill()
	<-c.exited
	c.close()
}

// close lets go of the guard.
func (c *guardClient) close() {
	c.once.Do(func() {
		close(c.end)
		c.wire.conn.Close()
	})
}
