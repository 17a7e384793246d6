// Package sftptest starts a real sshd for tests, on loopback, for the user who runs the test.
package sftptest

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

// Server is an sshd that runs.
type Server struct {
	Addr, Port, User string
	// Home has .ssh/id_ed25519, which may log in, and .ssh/known_hosts.
	Home string
	// HostKey is the server's.
	HostKey ssh.PublicKey

	cmd     *exec.Cmd
	log     bytes.Buffer
	done    chan struct{}
	madeDir bool
}

const privsep = "/run/sshd"

// Run starts an sshd that keeps its files below dir. Stop ends it.
func Run(dir string) (*Server, error) {
	prog, err := exec.LookPath("sshd")
	if err != nil {
		prog = "/usr/sbin/sshd"
		if _, err := os.Stat(prog); err != nil {
			return nil, fmt.Errorf("sshd is missing: scripts/install-test-deps.sh installs it")
		}
	}
	u, err := user.Current()
	if err != nil {
		return nil, err
	}
	s := &Server{User: u.Username, Home: filepath.Join(dir, "home")}
	if err := os.MkdirAll(filepath.Join(s.Home, ".ssh"), 0o700); err != nil {
		return nil, err
	}
	if s.HostKey, err = makeKey(filepath.Join(dir, "hostkey")); err != nil {
		return nil, err
	}
	mine, err := makeKey(filepath.Join(s.Home, ".ssh", "id_ed25519"))
	if err != nil {
		return nil, err
	}
	authorized := filepath.Join(dir, "authorized_keys")
	if err := os.WriteFile(authorized, ssh.MarshalAuthorizedKey(mine), 0o600); err != nil {
		return nil, err
	}
	if os.Geteuid() == 0 {
		if err := os.Mkdir(privsep, 0o755); err == nil {
			s.madeDir = true
		}
	}
	// The port is free for a moment only, so another one is tried if somebody takes it.
	for range 5 {
		if err = s.run(prog, dir, authorized); err == nil {
			return s, nil
		}
	}
	return nil, err
}

func (s *Server) run(prog, dir, authorized string) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s.Addr = l.Addr().String()
	_, s.Port, _ = net.SplitHostPort(s.Addr)
	l.Close()
	conf := filepath.Join(dir, "sshd_config")
	text := fmt.Sprintf("ListenAddress %s\nHostKey %s\nAuthorizedKeysFile %s\nUsePAM no\nStrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\nPidFile none\nMaxStartups 100\nSubsystem sftp internal-sftp\n",
		s.Addr, filepath.Join(dir, "hostkey"), authorized)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return err
	}
	known := fmt.Sprintf("[127.0.0.1]:%s %s", s.Port, ssh.MarshalAuthorizedKey(s.HostKey))
	if err := os.WriteFile(filepath.Join(s.Home, ".ssh", "known_hosts"), []byte(known), 0o600); err != nil {
		return err
	}
	s.log.Reset()
	s.cmd = exec.Command(prog, "-D", "-e", "-f", conf)
	s.cmd.Stderr = &s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.cmd.Start(); err != nil {
		return err
	}
	s.done = make(chan struct{})
	go func() {
		_ = s.cmd.Wait()
		close(s.done)
	}()
	for wait := 5 * time.Millisecond; wait < 20*time.Second; wait = wait * 3 / 2 {
		if c, err := net.Dial("tcp", s.Addr); err == nil {
			c.Close()
			return nil
		}
		select {
		case <-s.done:
			return fmt.Errorf("sshd ended: %s", s.log.String())
		case <-time.After(wait):
		}
	}
	s.Stop()
	return fmt.Errorf("sshd does not answer")
}

// Stop kills the server and its sessions.
func (s *Server) Stop() {
	s.Sessions(func(pid int) { _ = syscall.Kill(pid, syscall.SIGKILL) })
	_ = syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL)
	<-s.done
	if s.madeDir {
		_ = os.Remove(privsep)
	}
}

// Sessions calls fn for each process that serves a connection.
func (s *Server) Sessions(fn func(pid int)) {
	parents := map[int]int{}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		var pid, ppid int
		if _, err := fmt.Sscanf(e.Name(), "%d", &pid); err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue
		}
		rest := string(stat[bytes.LastIndexByte(stat, ')')+1:])
		if _, err := fmt.Sscanf(strings.TrimSpace(rest), "%s %d", new(string), &ppid); err == nil {
			parents[pid] = ppid
		}
	}
	for pid := range parents {
		for p := parents[pid]; p > 1; p = parents[p] {
			if p == s.cmd.Process.Pid {
				fn(pid)
				break
			}
		}
	}
}

// Command is a shell command line of ssh that opens an SFTP session without the tester's settings.
func (s *Server) Command() string {
	ssh := filepath.Join(s.Home, ".ssh")
	return fmt.Sprintf("ssh -F none -o BatchMode=yes -o IdentitiesOnly=yes -i %s/id_ed25519 -o UserKnownHostsFile=%s/known_hosts -p %s -l %s -s -- 127.0.0.1 sftp", ssh, ssh, s.Port, s.User)
}

func makeKey(file string) (ssh.PublicKey, error) {
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	block, err := ssh.MarshalPrivateKey(priv, "test")
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
		return nil, err
	}
	return ssh.NewPublicKey(pub)
}
