package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"unicode/utf16"

	"golang.org/x/term"

	"github.com/holdfast-backup/holdfast/internal/settings"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// maxPassword bounds what is read as a password, in bytes.
const maxPassword = 64 << 10

// password returns the repository's password from the strongest of its settings, or asks for it;
// twice if it is a new one.
func (a *app) password(ctx context.Context, isNew bool) (string, error) {
	set := a.set
	env, origin := settings.Password(a.getenv)
	if env != "" {
		set = map[string]settings.Origin{"the variable " + origin.Name: origin}
		for k, v := range a.set {
			set[k] = v
		}
	}
	switch from := settings.Strongest(set, "password-file", "password-command", "the variable "+origin.Name); {
	case len(from) == 0:
		return a.ask(ctx, "password of the repository", isNew)
	case len(from) > 1:
		return "", usageError("the password is set twice, by %s", strings.Join(from, " and "))
	case from[0] == "password-file":
		return a.passwordFrom(a.opt.passwordFile)
	case from[0] == "password-command":
		return a.passwordBy(ctx, a.opt.passwordCommand)
	}
	return env, nil
}

// newPassword returns the password that is to be added.
func (a *app) newPassword(ctx context.Context, file, command string) (string, error) {
	switch from := settings.Strongest(a.set, "new-password-file", "new-password-command"); {
	case len(from) > 1:
		return "", usageError("the new password is set twice, by %s", strings.Join(from, " and "))
	case len(from) == 0:
		return a.ask(ctx, "new password", true)
	case from[0] == "new-password-file":
		return a.passwordFrom(file)
	}
	return a.passwordBy(ctx, command)
}

// passwordFrom reads a password file as restic does: white space around the password is not part
// of it, and a byte order mark tells the encoding.
func (a *app) passwordFrom(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", ui.WithHints(fmt.Errorf("cannot read the password file: %w", err),
			"Each of --password-file, --password-command and HOLDFAST_PASSWORD can give the password.")
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Mode().IsRegular() && st.Mode().Perm()&0o004 != 0 {
		a.ui.Warn("every user of this machine can read the password file %s; `chmod 600` it", ui.Quote(path))
	}
	p := make([]byte, 0, 512)
	buf := bytes.NewBuffer(p)
	if _, err := buf.ReadFrom(&limited{f, maxPassword}); err != nil {
		return "", fmt.Errorf("cannot read the password file: %w", err)
	}
	pw := strings.TrimSpace(decode(buf.Bytes()))
	if pw == "" {
		return "", fmt.Errorf("the password file %s is empty", ui.Quote(path))
	}
	return pw, nil
}

// limited fails where io.LimitReader would quietly end.
type limited struct {
	f    *os.File
	left int
}

func (l *limited) Read(p []byte) (int, error) {
	n, err := l.f.Read(p)
	if l.left -= n; l.left < 0 {
		return 0, fmt.Errorf("it has more than %d bytes", maxPassword)
	}
	return n, err
}

// decode turns a text file with a byte order mark into UTF-8.
func decode(p []byte) string {
	switch {
	case bytes.HasPrefix(p, []byte("\xef\xbb\xbf")):
		return string(p[3:])
	case bytes.HasPrefix(p, []byte("\xff\xfe")), bytes.HasPrefix(p, []byte("\xfe\xff")):
		lo, hi := 0, 1
		if p[0] == 0xfe {
			lo, hi = 1, 0
		}
		var u []uint16
		for p = p[2:]; len(p) > 1; p = p[2:] {
			u = append(u, uint16(p[lo])|uint16(p[hi])<<8)
		}
		return string(utf16.Decode(u))
	}
	return string(p)
}

// passwordBy runs a command whose output is the password.
func (a *app) passwordBy(ctx context.Context, command string) (string, error) {
	cmd := exec.CommandContext(ctx, "sh", "-c", command)
	cmd.Env = a.environ
	cmd.Stdin, cmd.Stderr = a.in, a.err
	out, err := cmd.Output()
	if err != nil {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		return "", fmt.Errorf("the password command failed: %w", err)
	}
	pw := strings.TrimSpace(string(out))
	if pw == "" {
		return "", errors.New("the password command printed nothing")
	}
	return pw, nil
}

// ask asks on the terminal.
func (a *app) ask(ctx context.Context, what string, twice bool) (string, error) {
	return a.askOr(ctx, what, twice, "Set --password-file, --password-command or the variable HOLDFAST_PASSWORD.")
}

// askOr does so with another hint where there is no terminal.
func (a *app) askOr(ctx context.Context, what string, twice bool, hint string) (string, error) {
	if a.in == nil || !term.IsTerminal(int(a.in.Fd())) {
		return "", ui.WithHints(usageError("no %s was given, and there is no terminal to ask on", what), hint)
	}
	pw, err := a.readSecret(ctx, what)
	if err != nil {
		return "", err
	}
	if pw == "" {
		return "", usageError("the %s must not be empty", what)
	}
	if twice {
		again, err := a.readSecret(ctx, what+", again")
		if err != nil {
			return "", err
		}
		if again != pw {
			return "", usageError("the two passwords differ")
		}
	}
	return pw, nil
}

// readSecret reads a line without echo. A signal gives up, and leaves the terminal as it was.
func (a *app) readSecret(ctx context.Context, what string) (string, error) {
	fd := int(a.in.Fd())
	before, err := term.GetState(fd)
	if err != nil {
		return "", fmt.Errorf("cannot ask for the %s: %w", what, err)
	}
	fmt.Fprintf(a.err, "%s: ", what)
	type answer struct {
		pw  []byte
		err error
	}
	ch := make(chan answer, 1)
	go func() {
		pw, err := term.ReadPassword(fd)
		ch <- answer{pw, err}
	}()
	select {
	case <-ctx.Done():
		_ = term.Restore(fd, before)
		fmt.Fprintln(a.err)
		return "", context.Cause(ctx)
	case r := <-ch:
		fmt.Fprintln(a.err)
		if r.err != nil {
			return "", fmt.Errorf("cannot read the %s: %w", what, r.err)
		}
		return string(r.pw), nil
	}
}
