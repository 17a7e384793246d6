package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/pflag"

	"github.com/holdfast-backup/holdfast/internal/backend"
	"github.com/holdfast-backup/holdfast/internal/backend/cache"
	"github.com/holdfast-backup/holdfast/internal/backend/location"
	"github.com/holdfast-backup/holdfast/internal/backend/retry"
	"github.com/holdfast-backup/holdfast/internal/s3"
	"github.com/holdfast-backup/holdfast/internal/settings"
	"github.com/holdfast-backup/holdfast/internal/transport"
	"github.com/holdfast-backup/holdfast/internal/ui"
)

// remoteOptions are the flags about the way to the repository.
type remoteOptions struct {
	limitUpload, limitDownload int // KiB/s
	connections                int
	caCert, clientCert         string
	insecureTLS                bool
	timeout                    time.Duration

	s3Region, s3PathStyle, s3Profile string
	s3InstanceRole                   bool
	s3LockDays                       int
	s3LockMode, s3StorageClass       string

	sftpCommand, rcloneProgram string
}

func (o *remoteOptions) flags(f *pflag.FlagSet) {
	f.IntVar(&o.limitUpload, "limit-upload", 0, "upper limit of uploads to the repository in `KiB/s`")
	f.IntVar(&o.limitDownload, "limit-download", 0, "upper limit of downloads from the repository in `KiB/s`")
	f.IntVar(&o.connections, "connections", 0, "how many requests to the repository run at a time, `N` (default 8 for servers)")
	f.StringVar(&o.caCert, "cacert", "", "`file` with the certificates that servers are checked against (default: the system's)")
	f.StringVar(&o.clientCert, "tls-client-cert", "", "`file` with a client certificate and its private key")
	f.BoolVar(&o.insecureTLS, "insecure-tls", false, "accept every certificate of a server")
	f.DurationVar(&o.timeout, "timeout", 0, "how long a server may be silent before its connection is given up (default 3m)")
	f.StringVar(&o.s3Region, "s3-region", "", "`region` of the bucket (default AWS_REGION, AWS_DEFAULT_REGION, or what the server says)")
	f.StringVar(&o.s3PathStyle, "s3-path-style", "auto", "`style` of addresses of buckets: auto, path or virtual-host")
	f.StringVar(&o.s3Profile, "s3-profile", "", "`profile` of the AWS tools to take the keys from (default AWS_PROFILE)")
	f.BoolVar(&o.s3InstanceRole, "s3-instance-role", false, "ask the machine's or container's provider for keys if there are no others")
	f.IntVar(&o.s3LockDays, "s3-object-lock-days", 0, "lock every new file in the bucket for so many `days` (Object Lock)")
	f.StringVar(&o.s3LockMode, "s3-object-lock-mode", "governance", "`mode` of these locks: governance or compliance")
	f.StringVar(&o.s3StorageClass, "s3-storage-class", "", "storage `class` of packs")
	f.StringVar(&o.sftpCommand, "sftp-command", "", "shell `command` whose input and output are an SFTP session, instead of ssh")
	f.StringVar(&o.rcloneProgram, "rclone-program", "", "`path` of rclone (default: the one in PATH)")
}

func (o *remoteOptions) options(a *app) (location.Options, error) {
	out := location.Options{
		Transport: transport.Options{
			CACert: o.caCert, ClientCert: o.clientCert, Insecure: o.insecureTLS, Headers: o.timeout, Idle: o.timeout,
		},
		UploadLimit: o.limitUpload, DownloadLimit: o.limitDownload, Connections: o.connections,
		SFTPCommand: o.sftpCommand, RcloneProgram: o.rcloneProgram, Env: a.getenv, Version: version,
		S3: location.S3Options{
			Region: o.s3Region, Profile: o.s3Profile, InstanceRole: o.s3InstanceRole, LockDays: o.s3LockDays, StorageClass: o.s3StorageClass,
		},
	}
	for _, n := range []struct {
		flag  string
		value int
	}{{"limit-upload", o.limitUpload}, {"limit-download", o.limitDownload}, {"connections", o.connections}, {"s3-object-lock-days", o.s3LockDays}} {
		if n.value < 0 {
			return out, usageError("--%s is a positive number, not %d", n.flag, n.value)
		}
	}
	if o.timeout < 0 {
		return out, usageError("--timeout is a positive time, not %s", o.timeout)
	}
	switch o.s3PathStyle {
	case "auto":
	case "path":
		out.S3.Style = s3.StylePath
	case "virtual-host":
		out.S3.Style = s3.StyleVirtualHost
	default:
		return out, usageError("--s3-path-style is auto, path or virtual-host, not %q", o.s3PathStyle)
	}
	switch o.s3LockMode {
	case "governance":
	case "compliance":
		out.S3.LockCompliance = true
	default:
		return out, usageError("--s3-object-lock-mode is governance or compliance, not %q", o.s3LockMode)
	}
	return out, nil
}

// backend finds the driver for the repository's address.
func (a *app) backend(ctx context.Context) (backend.Backend, error) {
	return a.backendAt(ctx, a.opt.repo)
}

func (a *app) backendAt(ctx context.Context, addr string) (backend.Backend, error) {
	if addr == "" {
		return nil, ui.WithHints(usageError("no repository was named"),
			"Set --repo, the variable HOLDFAST_REPOSITORY, or the key repository of the settings file.")
	}
	loc, err := location.Parse(addr)
	if err != nil {
		return nil, withCode(exitUsage, err)
	}
	if a.opt.cacheSize < 1 {
		return nil, usageError("--cache-size is a positive number of MiB, not %d; --no-cache does without", a.opt.cacheSize)
	}
	if loc.Password != "" && a.set["repo"].Layer == settings.Flag {
		a.ui.Warn("every user of this machine can see the password in --repo; set RESTIC_REST_PASSWORD instead")
	}
	o, err := a.opt.remote.options(a)
	if err != nil {
		return nil, err
	}
	be, err := loc.Open(ctx, o)
	if err != nil {
		return nil, err
	}
	be = retry.New(be, retry.Options{Report: func(op string, h backend.Handle, err error, wait time.Duration) {
		a.ui.Warn("%s of %s failed, trying again in %s: %v", op, h, ui.Duration(wait), err)
	}})
	if dir := a.cacheDir(); loc.Scheme != "local" && dir != "" && !a.opt.noCache {
		be = cache.New(be, cache.Options{
			Dir: filepath.Join(dir, "repository"), MaxBytes: int64(a.opt.cacheSize) << 20,
			Warn: func(err error) { a.ui.Warn("%v", err) },
		})
	}
	return be, nil
}

// openError explains why the place of the repository could not be looked at. Errors of servers name it
// already, those of the file system do not.
func openError(addr, at string, err error) error {
	if errors.Is(err, context.Canceled) {
		return err
	}
	if loc, perr := location.Parse(addr); perr != nil || loc.Scheme != "local" {
		return fmt.Errorf("cannot open the repository: %w", err)
	}
	err = fmt.Errorf("cannot open the repository at %s: %w", ui.Quote(at), err)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return ui.WithHints(err, "Run holdfast as the user who made the repository, or as root.")
	case errors.Is(err, syscall.ENOTDIR):
		return ui.WithHints(err, "Is --repo right? A repository is a directory.")
	}
	return err
}
