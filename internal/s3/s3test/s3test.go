// Package s3test starts a real S3 server for tests: versitygw on loopback, over a temporary directory.
package s3test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/holdfast-backup/holdfast/internal/s3"
	"github.com/holdfast-backup/holdfast/internal/transport"
)

// Options of Start.
type Options struct {
	// Versioning lets buckets have versions and Object Lock.
	Versioning bool
	// TLS makes the server speak https with a certificate that Server.CACert verifies.
	TLS bool
	// Domain lets buckets be addressed as virtual hosts below it. Empty: paths only.
	Domain string
	// Args are further arguments before "posix".
	Args []string
}

// Server is a server that runs.
type Server struct {
	Endpoint             string // http://127.0.0.1:port
	Addr                 string // 127.0.0.1:port
	AccessKey, SecretKey string
	Region               string
	// Dir has a directory for each bucket, with the objects as files at their keys.
	Dir string
	// CACert is the file with the server's certificate, if it speaks TLS.
	CACert string

	o    Options
	cmd  *exec.Cmd
	log  bytes.Buffer
	done chan struct{}
}

// Program finds versitygw: on the path, or where "go install" puts it.
func Program() (string, error) { return find("versitygw") }

func find(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	out, err := exec.Command("go", "env", "GOBIN", "GOPATH").Output()
	if err != nil {
		return "", fmt.Errorf("find %s: go env: %w", name, err)
	}
	lines := strings.SplitN(string(out), "\n", 3)
	dirs := []string{strings.TrimSpace(lines[0])}
	for _, d := range filepath.SplitList(strings.TrimSpace(lines[1])) {
		dirs = append(dirs, filepath.Join(d, "bin"))
	}
	for _, d := range dirs {
		if p := filepath.Join(d, name); d != "" {
			if _, err := os.Stat(p); err == nil {
				return p, nil
			}
		}
	}
	return "", fmt.Errorf("%s is missing: scripts/install-test-deps.sh installs it", name)
}

// Start starts a server, which ends with the test.
func Start(t testing.TB, o Options) *Server {
	t.Helper()
	s, err := Run(t.TempDir(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Stop()
		if t.Failed() && s.log.Len() > 0 {
			t.Logf("versitygw: %s", s.log.Bytes())
		}
	})
	return s
}

// Run starts a server that keeps everything below dir. Stop ends it.
func Run(dir string, o Options) (*Server, error) {
	s := &Server{AccessKey: "test" + random(8), SecretKey: random(20), Region: "us-east-1", Dir: filepath.Join(dir, "buckets"), o: o}
	for _, d := range []string{s.Dir, filepath.Join(dir, "versions")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return nil, err
		}
	}
	if o.TLS {
		if err := s.makeCert(dir); err != nil {
			return nil, err
		}
	}
	// The port is free for a moment only, so another one is tried if somebody takes it.
	var err error
	for range 5 {
		if err = s.freePort(); err == nil {
			if err = s.run(dir); err == nil {
				return s, nil
			}
		}
	}
	return nil, err
}

func (s *Server) freePort() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s.Addr = l.Addr().String()
	s.Endpoint = "http://" + s.Addr
	if s.o.TLS {
		s.Endpoint = "https://" + s.Addr
	}
	return l.Close()
}

func (s *Server) run(dir string) error {
	prog, err := Program()
	if err != nil {
		return err
	}
	args := []string{"--port", s.Addr, "--region", s.Region, "--keep-alive", "--quiet"}
	if s.o.TLS {
		args = append(args, "--cert", s.CACert, "--key", filepath.Join(dir, "key.pem"))
	}
	if s.o.Domain != "" {
		args = append(args, "--virtual-domain", s.o.Domain)
	}
	args = append(append(args, s.o.Args...), "posix")
	if s.o.Versioning {
		args = append(args, "--versioning-dir", filepath.Join(dir, "versions"))
	}
	args = append(args, s.Dir)
	s.cmd = exec.Command(prog, args...)
	s.cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY="+s.AccessKey, "ROOT_SECRET_KEY="+s.SecretKey)
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	s.done = make(chan struct{})
	started := make(chan error)
	go func() {
		defer close(s.done)
		// The kernel sends Pdeathsig when the starting thread ends, so the thread is kept.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := s.cmd.Start()
		started <- err
		if err == nil {
			_ = s.cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	c, err := s.Client()
	if err != nil {
		s.Stop()
		return err
	}
	defer c.Close()
	for wait := 5 * time.Millisecond; wait < 20*time.Second; wait = wait * 3 / 2 {
		select {
		case <-s.done:
			return fmt.Errorf("versitygw ended: %s", s.log.String())
		default:
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		_, err = c.ListBuckets(ctx)
		cancel()
		if err == nil {
			return nil
		}
		time.Sleep(wait)
	}
	s.Stop()
	return fmt.Errorf("versitygw does not answer: %w", err)
}

// Stop kills the server. The directory stays.
func (s *Server) Stop() {
	_ = s.cmd.Process.Kill()
	<-s.done
}

// Options are those of a client with all rights.
func (s *Server) Options() s3.Options {
	return s3.Options{
		Endpoint: s.Endpoint, Region: s.Region, AccessKey: s.AccessKey, SecretKey: s.SecretKey,
		Style: s3.StylePath, Tries: 1, Transport: transport.Options{CACert: s.CACert},
	}
}

// Client makes a client with all rights.
func (s *Server) Client() (*s3.Client, error) { return s3.New(context.Background(), s.Options()) }

// Env are the variables that give a program all rights.
func (s *Server) Env() []string {
	return []string{"AWS_ACCESS_KEY_ID=" + s.AccessKey, "AWS_SECRET_ACCESS_KEY=" + s.SecretKey, "AWS_DEFAULT_REGION=" + s.Region}
}

// Bucket makes a bucket of a new name. versioned turns its versions on, lock also Object Lock; both need
// Options.Versioning.
func (s *Server) Bucket(t testing.TB, versioned, lock bool) string {
	t.Helper()
	name := "b" + random(6)
	c, err := s.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx := context.Background()
	if err := c.MakeBucket(ctx, name, minio.MakeBucketOptions{ObjectLocking: lock}); err != nil {
		t.Fatalf("make bucket %s: %v", name, err)
	}
	if versioned && !lock {
		if err := c.EnableVersioning(ctx, name); err != nil {
			t.Fatalf("versions of bucket %s: %v", name, err)
		}
	}
	return name
}

func random(n int) string {
	p := make([]byte, n)
	_, _ = rand.Read(p)
	return hex.EncodeToString(p)
}

// makeCert makes a certificate that is its own authority.
func (s *Server) makeCert(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	if s.o.Domain != "" {
		tmpl.DNSNames = append(tmpl.DNSNames, s.o.Domain, "*."+s.o.Domain)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	s.CACert = filepath.Join(dir, "cert.pem")
	if err := os.WriteFile(s.CACert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}), 0o600)
}
