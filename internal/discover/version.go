package discover

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// versionTimeout bounds the run of a server binary: it prints its version within a second.
const versionTimeout = 10 * time.Second

// runVersion asks a binary for its version. It is run only if nobody but root and the caller could
// have changed it, with an environment that leads it to no configuration.
//
// Errors: *untrustedError; those of running it.
func runVersion(ctx context.Context, binary string) (string, error) {
	if err := trusted(binary); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, versionTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "version", "--skip-services")
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LANG=C", "HOME=" + os.DevNull, "OCIS_CONFIG_DIR=" + os.DevNull, "OC_CONFIG_DIR=" + os.DevNull}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	var out bytes.Buffer
	cmd.Stdout = &limitedWriter{w: &out, left: 64 << 10}
	if err := cmd.Run(); err != nil {
		if ctx.Err() == context.DeadlineExceeded {
			return "", fmt.Errorf("%s version: no answer within %s", binary, versionTimeout)
		}
		return "", fmt.Errorf("%s version: %w", binary, err)
	}
	v := parseVersion(out.String())
	if v == "" {
		return "", fmt.Errorf("%s version: the output names no version", binary)
	}
	return v, nil
}

// limitedWriter drops what goes beyond its limit.
type limitedWriter struct {
	w    io.Writer
	left int
}

func (l *limitedWriter) Write(p []byte) (int, error) {
	n := min(len(p), l.left)
	l.left -= n
	if _, err := l.w.Write(p[:n]); err != nil {
		return 0, err
	}
	return len(p), nil
}

// parseVersion finds the line "Version: 7.1.0".
func parseVersion(out string) string {
	for line := range strings.SplitSeq(out, "\n") {
		k, v, ok := strings.Cut(line, ":")
		if ok && strings.EqualFold(strings.TrimSpace(k), "version") {
			return strings.TrimPrefix(strings.TrimSpace(v), "v")
		}
	}
	return ""
}

// untrustedError says why a binary is not run.
type untrustedError struct{ path, why string }

func (e *untrustedError) Error() string { return fmt.Sprintf("%s is not run: %s", e.path, e.why) }

// trusted checks that a binary is executable, and that neither it nor a directory above it can be
// changed by anyone but root and the caller.
func trusted(path string) error {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	for p := path; ; p = filepath.Dir(p) {
		st, err := os.Stat(p)
		if err != nil {
			return err
		}
		if p == path && (!st.Mode().IsRegular() || st.Mode()&0o111 == 0) {
			return &untrustedError{path, "it is no executable file"}
		}
		if sys, ok := st.Sys().(*syscall.Stat_t); ok && sys.Uid != 0 && int(sys.Uid) != os.Getuid() {
			return &untrustedError{path, p + " belongs to another user"}
		}
		if st.Mode()&0o022 != 0 && st.Mode()&os.ModeSticky == 0 {
			return &untrustedError{path, p + " can be changed by others"}
		}
		if p == filepath.Dir(p) {
			return nil
		}
	}
}
