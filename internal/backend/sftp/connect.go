package sftp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/child"
	"github.com/holdfast-backup/holdfast/internal/transport"
	"github.com/holdfast-backup/holdfast/internal/userenv"
)

// session is a connection with an SFTP client on it.
type session struct {
	client  *sftp.Client
	ended   chan struct{} // closed when the client has lost its connection
	lost    atomic.Bool   // an operation has found out first
	proc    *child.Process
	closers []func()
	cut     func() // ends the connection at once
}

func (s *session) dead() bool {
	if s.lost.Load() {
		return true
	}
	select {
	case <-s.ended:
		return true
	default:
		return false
	}
}

func (s *session) explain(err error) error {
	if s.proc != nil {
		return s.proc.Explain(err)
	}
	return fmt.Errorf("the connection is lost: %w", err)
}

func (s *session) kill() { s.cut() }

func (s *session) close() {
	s.client.Close()
	for _, f := range s.closers {
		f()
	}
}

// Error says why no connection came about, and what to do.
type Error struct {
	Err  error
	hint string
}

func (e *Error) Error() string   { return e.Err.Error() }
func (e *Error) Unwrap() error   { return e.Err }
func (e *Error) Hints() []string { return []string{e.hint} }

func fatal(hint, format string, args ...any) error {
	return &backend.PermanentError{Err: &Error{fmt.Errorf(format, args...), hint}}
}

// connect opens a session in the way that o and the user's settings ask for.
func connect(ctx context.Context, o Options) (*session, error) {
	home, _ := o.Env("HOME")
	if home == "" {
		home, _ = os.UserHomeDir()
	}
	sshProgram, _ := exec.LookPath("ssh")
	switch {
	case o.Command != "":
		return run(ctx, o, []string{"/bin/sh", "-c", "exec " + o.Command})
	case sshProgram != "" && hasContent(filepath.Join(home, ".ssh", "config")):
		return run(ctx, o, sshCommand(sshProgram, o)) // it may say anything about this host
	}
	methods, done, tried := authMethods(o, home)
	defer done()
	if len(methods) == 0 {
		if sshProgram != "" {
			return run(ctx, o, sshCommand(sshProgram, o))
		}
		return nil, fatal("Start ssh-agent and add the key to it, or use a key without a passphrase.", "there is no key to log in with (%s)", strings.Join(tried, "; "))
	}
	return dial(ctx, o, home, methods)
}

func hasContent(file string) bool {
	data, err := os.ReadFile(file)
	return err == nil && len(bytes.TrimSpace(data)) > 0
}

// sshCommand never asks questions, and notices a dead connection.
func sshCommand(program string, o Options) []string {
	args := []string{program, "-o", "BatchMode=yes", "-o", "ServerAliveInterval=30", "-o", "ServerAliveCountMax=6",
		"-o", fmt.Sprintf("ConnectTimeout=%d", max(int(o.Connect.Seconds()), 1))}
	if o.Port != "" {
		args = append(args, "-p", o.Port)
	}
	if o.User != "" {
		args = append(args, "-l", o.User)
	}
	return append(args, "-s", "--", o.Host, "sftp")
}

// run makes a session over a program.
func run(ctx context.Context, o Options, argv []string) (*session, error) {
	p, err := child.Start(argv, userenv.Environ())
	if err != nil {
		return nil, fatal("Install ssh, or set --sftp-command.", "cannot start %s: %w", argv[0], err)
	}
	var c net.Conn = p
	if o.Wrap != nil {
		c = o.Wrap(c)
	}
	// A program that never says a word must not hold us for ever.
	t := time.AfterFunc(2*o.Connect, p.Kill)
	stop := context.AfterFunc(ctx, p.Kill)
	s, err := newSession(c, c)
	stop()
	t.Stop()
	if err != nil {
		err = p.Explain(err)
		code, failed := p.Failed()
		p.Kill()
		err = &Error{err, "Does `ssh " + shellHost(o) + "` work without a question? Log in once by hand to accept the host's key."}
		// 255 is how ssh ends when the network is in the way, but also when there is no hope.
		if failed && (code != 255 || strings.Contains(err.Error(), "Permission denied") || strings.Contains(err.Error(), "verification failed")) {
			err = &backend.PermanentError{Err: err}
		}
		return nil, err
	}
	s.proc, s.cut = p, p.Kill
	s.closers = append(s.closers, func() { p.Close() })
	return s, nil
}

func shellHost(o Options) string {
	h := o.Host
	if o.User != "" {
		h = o.User + "@" + h
	}
	if o.Port != "" {
		h = "-p " + o.Port + " " + h
	}
	return h
}

func newSession(r io.Reader, w io.WriteCloser) (*session, error) {
	c, err := sftp.NewClientPipe(r, w, sftp.UseConcurrentWrites(true), sftp.MaxConcurrentRequestsPerFile(64))
	if err != nil {
		return nil, err
	}
	s := &session{client: c, ended: make(chan struct{})}
	go func() {
		_ = c.Wait()
		close(s.ended)
	}()
	return s, nil
}

// authMethods are the agent's keys and those key files that need no passphrase.
func authMethods(o Options, home string) (methods []ssh.AuthMethod, done func(), tried []string) {
	done = func() {}
	if sock, _ := o.Env("SSH_AUTH_SOCK"); sock != "" {
		c, err := net.Dial("unix", sock)
		if err == nil {
			done = func() { c.Close() }
			a := agent.NewClient(c)
			if keys, err := a.List(); err == nil && len(keys) > 0 {
				methods = append(methods, ssh.PublicKeysCallback(a.Signers))
			} else {
				tried = append(tried, "the agent has no keys")
			}
		} else {
			tried = append(tried, "the agent does not answer")
		}
	} else {
		tried = append(tried, "no agent")
	}
	var signers []ssh.Signer
	for _, name := range []string{"id_ed25519", "id_ecdsa", "id_rsa"} {
		file := filepath.Join(home, ".ssh", name)
		pem, err := os.ReadFile(file)
		if err != nil {
			tried = append(tried, "no "+file)
			continue
		}
		s, err := ssh.ParsePrivateKey(pem)
		var locked *ssh.PassphraseMissingError
		switch {
		case errors.As(err, &locked):
			tried = append(tried, file+" needs a passphrase")
		case err != nil:
			tried = append(tried, file+" cannot be read")
		default:
			signers = append(signers, s)
		}
	}
	if len(signers) > 0 {
		methods = append(methods, ssh.PublicKeys(signers...))
	}
	return methods, done, tried
}

// dial makes a session with the built-in client.
func dial(ctx context.Context, o Options, home string, methods []ssh.AuthMethod) (*session, error) {
	name := o.User
	if name == "" {
		u, err := user.Current()
		if err != nil {
			return nil, fatal("Name the user in the address: sftp:user@host:/path.", "the user is not known: %w", err)
		}
		name = u.Username
	}
	addr := net.JoinHostPort(o.Host, orElse(o.Port, "22"))
	check, algorithms, err := hostKeys(home, addr, o)
	if err != nil {
		return nil, err
	}
	d := net.Dialer{Timeout: o.Connect, KeepAlive: 30 * time.Second}
	tcp, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		hint, permanent := transport.Explain(err)
		if permanent {
			return nil, fatal(hint, "%w", err)
		}
		return nil, &Error{err, hint}
	}
	stop := context.AfterFunc(ctx, func() { tcp.Close() })
	defer stop()
	c := transport.Watch(tcp, o.Idle)
	if o.Wrap != nil {
		c = o.Wrap(c)
	}
	conn, chans, reqs, err := ssh.NewClientConn(c, addr, &ssh.ClientConfig{
		User: name, Auth: methods, HostKeyCallback: check, HostKeyAlgorithms: algorithms, Timeout: o.Connect,
	})
	if err != nil {
		tcp.Close()
		var own *Error
		switch {
		case errors.As(err, &own):
			return nil, &backend.PermanentError{Err: own}
		case strings.Contains(err.Error(), "unable to authenticate"):
			return nil, fatal("Is the public key in the server's ~/.ssh/authorized_keys, and the user right?", "the server refuses the log-in of %s: %w", name, err)
		}
		return nil, err
	}
	client := ssh.NewClient(conn, chans, reqs)
	fail := func(err error) (*session, error) {
		client.Close()
		return nil, fmt.Errorf("the server does not offer SFTP: %w", err)
	}
	sess, err := client.NewSession()
	if err != nil {
		return fail(err)
	}
	w, err := sess.StdinPipe()
	if err != nil {
		return fail(err)
	}
	r, err := sess.StdoutPipe()
	if err != nil {
		return fail(err)
	}
	if err := sess.RequestSubsystem("sftp"); err != nil {
		return fail(err)
	}
	s, err := newSession(r, w)
	if err != nil {
		return fail(err)
	}
	s.cut = func() { tcp.Close() }
	s.closers = append(s.closers, func() { client.Close() })
	go keepAlive(client, s, o.Idle/4)
	return s, nil
}

// keepAlive lets an answer come in now and then, so that a silent connection is a dead one.
func keepAlive(c *ssh.Client, s *session, every time.Duration) {
	t := time.NewTicker(max(every, time.Second))
	defer t.Stop()
	for {
		select {
		case <-s.ended:
			return
		case <-t.C:
			if _, _, err := c.SendRequest("keepalive@openssh.com", true, nil); err != nil {
				return
			}
		}
	}
}

func orElse(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

// hostKeys checks the server's key against the files of known hosts, and says which kinds of key
// they have for it, so that the server shows one of those.
func hostKeys(home, addr string, o Options) (ssh.HostKeyCallback, []string, error) {
	var files []string
	for _, f := range []string{filepath.Join(home, ".ssh", "known_hosts"), filepath.Join(home, ".ssh", "known_hosts2"), "/etc/ssh/ssh_known_hosts"} {
		if _, err := os.Stat(f); err == nil {
			files = append(files, f)
		}
	}
	unknown := "Log in once by hand and compare the fingerprint: ssh " + shellHost(o)
	known, err := knownhosts.New(files...)
	if err != nil {
		return nil, nil, fatal("Correct the file, or move it away.", "the file of known hosts cannot be read: %w", err)
	}
	check := func(host string, remote net.Addr, key ssh.PublicKey) error {
		err := known(host, remote, key)
		var ke *knownhosts.KeyError
		if errors.As(err, &ke) && len(ke.Want) == 0 {
			return &Error{fmt.Errorf("the host %s is not known: its key has the fingerprint %s", o.Host, ssh.FingerprintSHA256(key)), unknown}
		}
		if errors.As(err, &ke) {
			return &Error{fmt.Errorf("the key of the host %s has changed: it has the fingerprint %s, but %s:%d has another one", o.Host, ssh.FingerprintSHA256(key), ke.Want[0].Filename, ke.Want[0].Line),
				"Somebody may be between you and the server. If its key was changed on purpose, remove the old one: ssh-keygen -R " + o.Host}
		}
		if err != nil {
			return &Error{err, unknown}
		}
		return nil
	}
	// A key that nobody has: the error lists those that are known.
	var ke *knownhosts.KeyError
	var algorithms []string
	if errors.As(known(addr, &net.TCPAddr{}, nobody{}), &ke) {
		for _, w := range ke.Want {
			switch t := w.Key.Type(); t {
			case ssh.KeyAlgoRSA:
				algorithms = append(algorithms, ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256)
			default:
				algorithms = append(algorithms, t)
			}
		}
	}
	return check, algorithms, nil
}

// nobody is a public key that no file has.
type nobody struct{}

func (nobody) Type() string                        { return "nobody" }
func (nobody) Marshal() []byte                     { return []byte("nobody") }
func (nobody) Verify([]byte, *ssh.Signature) error { return errors.New("no key") }
