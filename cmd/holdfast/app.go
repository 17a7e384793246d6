package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/holdfast-backup/holdfast/internal/cpus"
	"github.com/holdfast-backup/holdfast/internal/membudget"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/settings"
	"github.com/holdfast-backup/holdfast/internal/ui"
	"github.com/holdfast-backup/holdfast/internal/userenv"
)

// app is what the verbs share. It is made once for a run of the program.
type app struct {
	in      *os.File
	out     io.Writer
	err     io.Writer
	environ []string

	root *cobra.Command
	ui   *ui.Printer
	set  map[string]settings.Origin // which flags are set, and from where
	opt  globalOptions
	// mem says how much may run at once; see internal/membudget.
	mem membudget.Budget

	// indexed is the repository whose index was read.
	indexed *repo.Repository

	// held is true from before the instance is stopped until it was started again.
	held atomic.Bool
	// cut is true once nobody reads the standard output any more.
	cut atomic.Bool
	// passOn gets the signals while a program of the user runs, instead of this one.
	passOn atomic.Pointer[func(os.Signal)]
}

// globalOptions are the flags of every verb.
type globalOptions struct {
	configFile      string
	repo            string
	passwordFile    string
	passwordCommand string
	retryLock       time.Duration
	stateDir        string
	cacheDir        string
	cacheSize       int // MiB
	noCache         bool
	memory          string
	passEnv         []string
	json            bool
	quiet           bool
	verbose         bool
	remote          remoteOptions
}

func (a *app) getenv(name string) (string, bool) {
	for _, kv := range slices.Backward(a.environ) {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			return v, true
		}
	}
	return "", false
}

// run runs one command line and returns the exit code.
func (a *app) run(args []string) int {
	ctx, stop := a.signals()
	defer stop()
	a.root = a.commands()
	a.root.SetArgs(args)
	a.root.SetOut(a.out)
	a.root.SetErr(a.err)
	err := explain(ctx, a.root.ExecuteContext(ctx))
	if a.ui == nil { // it never came to a verb: wrong usage
		a.opt.json = a.opt.json || slices.Contains(args, "--json")
		a.show()
	}
	code := exitCode(err)
	if n := repo.WrongFrames(); n > 0 {
		a.ui.Warn("compressed data did not decompress to the same %d times, and was stored in another way: nothing is lost, but the memory or the processor of this machine may be faulty; test them (memtest86+), and run holdfast check --read-data", n)
	}
	a.ui.Close()
	if a.cut.Load() && errors.Is(err, syscall.EPIPE) {
		return exitPipe // whoever read the list has seen enough
	}
	a.ui.Error(err, code)
	return code
}

// commands defines the command line.
func (a *app) commands() *cobra.Command {
	root := &cobra.Command{
		Use:   "holdfast",
		Short: "Back up and restore Infinite Scale and OpenCloud",
		Long: `Holdfast backs up a whole Infinite Scale or OpenCloud instance into a restic
repository, proves that every file is in it, and puts all of it back.

Every flag can also be set by an environment variable (--stop-command is
HOLDFAST_STOP_COMMAND) and by a key of the settings file (stop-command), in this
order: flag, environment, file. Exceptions: --repo is HOLDFAST_REPOSITORY and
"repository"; a password itself comes from HOLDFAST_PASSWORD only, never from a
flag. RESTIC_REPOSITORY, RESTIC_PASSWORD_FILE, RESTIC_PASSWORD_COMMAND and
RESTIC_PASSWORD are used where ours are not set.

Keys for S3 are found as the AWS tools find them: AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY, a web identity, or a profile of ~/.aws/credentials. The user and
password of a REST server are RESTIC_REST_USERNAME and RESTIC_REST_PASSWORD. SFTP
uses ssh's keys, agent, known hosts and, where it exists, its config file.

An instance that was stopped for a backup is started again whatever happens. Should
the machine go down, or everything be killed at once, then the next backup starts it,
or holdfast thaw; holdfast status tells about it.

` + exitHelp(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          a.noSuchCommand,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveDefault)
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return ui.WithHints(withCode(exitUsage, err), fmt.Sprintf("`%s --help` lists the flags.", c.CommandPath()))
	})
	f := root.PersistentFlags()
	f.SortFlags = false
	f.StringVarP(&a.opt.repo, "repo", "r", "", "`address` of the repository: a directory, s3:https://host/bucket/prefix,\nrest:https://host:8000/path, sftp:user@host:/path or rclone:remote:path")
	f.StringVarP(&a.opt.passwordFile, "password-file", "p", "", "`file` with the repository's password")
	f.StringVar(&a.opt.passwordCommand, "password-command", "", "shell `command` that prints the password")
	f.StringVar(&a.opt.configFile, "config-file", "", "settings `file` (default "+settings.DefaultFile+" if it exists)")
	f.StringVar(&a.opt.cacheDir, "cache-dir", "", "`directory` for what speeds up the next backup; may be deleted at any time")
	f.IntVar(&a.opt.cacheSize, "cache-size", 2048, "upper limit of what is kept there of repositories on servers, in `MiB`")
	f.StringVar(&a.opt.memory, "memory", "", "upper limit of the memory that is used, a `size` such as 512M; the least is "+membudget.Size(membudget.Least)+"\n(default: a quarter of what the machine or the control group has, 1G at most)")
	f.BoolVar(&a.opt.noCache, "no-cache", false, "keep nothing of repositories on servers")
	f.StringVar(&a.opt.stateDir, "state-dir", "", "`directory` for the record of what must be started again (default\n$XDG_STATE_HOME/holdfast; else /var/lib/holdfast for root, ~/.local/state/holdfast for others)")
	f.DurationVar(&a.opt.retryLock, "retry-lock", 0, "how long to wait for a locked repository, e.g. 10m")
	f.StringSliceVar(&a.opt.passEnv, "pass-env", nil, "`names` of variables that commands of yours get although they begin with\nHOLDFAST_, RESTIC_, AWS_ or RCLONE_")
	a.opt.remote.flags(f)
	f.BoolVar(&a.opt.json, "json", false, "print one JSON object a line")
	f.BoolVarP(&a.opt.quiet, "quiet", "q", false, "print warnings, errors and what was asked for only")
	f.BoolVarP(&a.opt.verbose, "verbose", "v", false, "print more")

	root.AddCommand(
		a.initCommand(), a.backupCommand(), a.snapshotsCommand(), a.spacesCommand(), a.lsCommand(), a.treeCommand(), a.catCommand(), a.dumpCommand(),
		a.findCommand(), a.diffCommand(), a.mountCommand(), a.restoreCommand(),
		a.checkCommand(), a.consistencyCommand(), a.keyCommand(), a.unlockCommand(), a.discoverCommand(),
		a.viewsCommand(), a.withViewCommand(), a.overlayVerbCommand(),
		a.forgetCommand(), a.pruneCommand(), a.tagCommand(), a.statsCommand(), a.copyCommand(),
		a.drillCommand(), a.statusCommand(), a.thawCommand(), a.versionCommand(), a.generateCommand(),
	)
	root.InitDefaultHelpCmd()
	return root
}

func (a *app) noSuchCommand(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	err := usageError("unknown command %q for %q", args[0], c.CommandPath())
	c.SuggestionsMinimumDistance = 2
	if s := c.SuggestionsFor(args[0]); len(s) > 0 {
		return ui.WithHints(err, fmt.Sprintf("Did you mean `%s %s`?", c.CommandPath(), s[0]))
	}
	return ui.WithHints(err, fmt.Sprintf("`%s --help` lists the commands.", c.CommandPath()))
}

// args makes an argument check whose error is one of usage. want says in words what is wanted.
func args(lowest, highest int, want string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) >= lowest && len(args) <= highest {
			return nil
		}
		return ui.WithHints(usageError("%s takes %s, not %s", c.CommandPath(), want, ui.Count(int64(len(args)), "argument")),
			"Usage: "+c.UseLine())
	}
}

// verb wraps the work of a command: settings first, then the display, then the work.
func (a *app) verb(fn func(ctx context.Context, args []string) error) func(*cobra.Command, []string) error {
	return func(c *cobra.Command, args []string) error {
		err := a.settings(c)
		a.show()
		if err != nil {
			return withCode(exitUsage, err)
		}
		known := []string{}
		for _, names := range flagNames(a.root) {
			known = append(known, names...)
		}
		for _, name := range settings.Strangers(a.environ, known) {
			if _, ok := a.getenv(viewVariable("base")); ok && strings.HasPrefix(name, viewVariable("")) {
				continue // run by with-view
			}
			a.ui.Warn("the variable %s is no setting of Holdfast and is ignored", name)
		}
		a.startLeft(c.Context(), a.verbName(c))
		if err := c.Context().Err(); err != nil {
			return err
		}
		// Errors take their cause here, where the innermost context is at hand; run adds the rest.
		return fn(c.Context(), args)
	}
}

// settings fills the flags that the command line left alone.
func (a *app) settings(c *cobra.Command) error {
	path, must := a.opt.configFile, true
	if path == "" {
		path, _ = a.getenv(settings.Variable("config-file"))
	}
	if path == "" {
		path, must = settings.DefaultFile, false
	}
	file, err := settings.ReadFile(path, flagNames(a.root))
	if errors.Is(err, fs.ErrNotExist) && !must {
		file, err = nil, nil
	}
	if err != nil {
		return err
	}
	a.set, err = settings.Apply(c.Flags(), a.verbName(c), file, a.getenv)
	userenv.Pass(a.opt.passEnv)
	if err != nil {
		return err
	}
	return a.budget(c)
}

// budget divides the memory and gives Go's runtime its limit.
func (a *app) budget(c *cobra.Command) error {
	size := membudget.Default()
	if a.opt.memory != "" {
		var err error
		if size, err = parseSize(a.opt.memory); err != nil {
			return fmt.Errorf("--memory: %w", err)
		}
	}
	packs := 0 // MiB
	if c.Flags().Lookup("pack-size") != nil {
		packs, _ = c.Flags().GetInt("pack-size")
		if packs < minPackSize || packs > maxPackSize {
			packs = 0 // refused where it is used
		}
	}
	var err error
	var small *membudget.TooSmallError
	a.mem, err = membudget.New(size, cpus.Count(), int64(packs)<<20)
	switch {
	case errors.As(err, &small) && small.PackSize != 0:
		return ui.WithHints(fmt.Errorf("--memory: %w", err), "Or choose a smaller --pack-size.")
	case err != nil:
		return fmt.Errorf("--memory: %w", err)
	}
	a.mem.Apply()
	return nil
}

// verbName is the verb as it is typed: backup, key add.
func (a *app) verbName(c *cobra.Command) string {
	return strings.TrimPrefix(c.CommandPath(), a.root.Name()+" ")
}

// flagNames lists the flags of every verb.
func flagNames(root *cobra.Command) map[string][]string {
	out := map[string][]string{}
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Runnable() && c != root && !c.Hidden {
			var names []string
			add := func(f *pflag.Flag) { names = append(names, f.Name) }
			c.LocalFlags().VisitAll(add)
			c.InheritedFlags().VisitAll(add)
			out[strings.TrimPrefix(c.CommandPath(), root.Name()+" ")] = names
		}
		for _, s := range c.Commands() {
			walk(s)
		}
	}
	walk(root)
	return out
}

// show makes the display that the settings ask for.
func (a *app) show() {
	o := ui.Options{Out: &pipe{a.out, &a.cut}, Err: a.err, JSON: a.opt.json, Quiet: a.opt.quiet, Verbose: a.opt.verbose}
	if f, ok := a.err.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		if t, _ := a.getenv("TERM"); t != "dumb" {
			o.Width = func() int {
				w, _, err := term.GetSize(int(f.Fd()))
				if err != nil || w <= 0 {
					return 80
				}
				return w
			}
		}
	}
	a.ui = ui.New(o)
}

// pipe notes that nobody reads any more what is written.
type pipe struct {
	w   io.Writer
	cut *atomic.Bool
}

func (p *pipe) Write(b []byte) (int, error) {
	n, err := p.w.Write(b)
	if errors.Is(err, syscall.EPIPE) {
		p.cut.Store(true)
	}
	return n, err
}

// signals returns a context that SIGINT, SIGTERM and SIGHUP cancel. A further signal ends the
// program at once, except while the instance is held: then it must be started again first.
func (a *app) signals() (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(context.Background())
	// A pipe that is closed, as by head, is an error of a write and not the end of the program: it would
	// leave its lock in the repository, or the instance to its guard.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	var catch []os.Signal
	for _, s := range []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP} {
		if !signal.Ignored(s) { // started by nohup, or in the background
			catch = append(catch, s)
		}
	}
	if len(catch) == 0 {
		return ctx, func() { cancel(nil) }
	}
	ch := make(chan os.Signal, 8)
	signal.Notify(ch, catch...)
	go func() {
		for n := 1; ; n++ {
			var s os.Signal
			select {
			case s = <-ch:
			case <-ctx.Done():
				if n == 1 { // the program is over
					return
				}
				s = <-ch
			}
			if forward := a.passOn.Load(); forward != nil {
				(*forward)(s)
				n--
				continue
			}
			cancel(fmt.Errorf("%w by %s", errInterrupted, unix.SignalName(s.(syscall.Signal))))
			switch {
			case a.held.Load():
				a.notice("interrupted: the service is being started again first; please wait")
			case n == 1:
				a.notice("interrupted: cleaning up; interrupt again to end at once")
			default:
				signal.Reset(s)
				_ = syscall.Kill(os.Getpid(), s.(syscall.Signal))
			}
		}
	}()
	return ctx, func() { signal.Stop(ch); cancel(nil) }
}

func (a *app) notice(s string) {
	if a.ui != nil {
		a.ui.Warn("%s", s)
		return
	}
	fmt.Fprintln(a.err, s)
}
