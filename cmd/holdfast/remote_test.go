package main

import (
	"bytes"
	"context"
	"maps"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/holdfast-backup/holdfast/internal/backend/rest/resttest"
	"github.com/holdfast-backup/holdfast/internal/backend/sftp/sftptest"
	"github.com/holdfast-backup/holdfast/internal/s3/s3test"
)

// remoteCommands are the commands of scripts that start servers.
var remoteCommands = map[string]func(ts *testscript.TestScript, neg bool, args []string){
	"s3server":   cmdS3Server,
	"objects":    cmdObjects,
	"restserver": cmdRESTServer,
	"sftpserver": cmdSFTPServer,
	"nowhere":    cmdNowhere,
}

func withRemote(m map[string]func(ts *testscript.TestScript, neg bool, args []string)) map[string]func(ts *testscript.TestScript, neg bool, args []string) {
	maps.Copy(m, remoteCommands)
	return m
}

// s3server: starts an S3 server until the end of the script. $S3 is its address, and the variables of
// the AWS tools give all rights; $S3_ACCESS and $S3_SECRET are the keys.
func cmdS3Server(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 0 {
		ts.Fatalf("usage: s3server")
	}
	dir := ts.MkAbs("s3server")
	ts.Check(os.Mkdir(dir, 0o700))
	srv, err := s3test.Run(dir, s3test.Options{Versioning: true})
	ts.Check(err)
	ts.Defer(srv.Stop)
	ts.Setenv("S3", srv.Endpoint)
	ts.Setenv("S3_ACCESS", srv.AccessKey)
	ts.Setenv("S3_SECRET", srv.SecretKey)
	for _, kv := range srv.Env() {
		name, value, _ := strings.Cut(kv, "=")
		ts.Setenv(name, value)
	}
	c, err := srv.Client()
	ts.Check(err)
	defer c.Close()
	_, err = c.ListBuckets(context.Background())
	ts.Check(err)
}

// restserver DIR [append-only]: serves the repository in DIR until the end of the script. $REST is its
// address without user and password, which are "me" and $REST_SECRET; $REST_AUTH is the one with them.
func cmdRESTServer(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 || len(args) > 2 {
		ts.Fatalf("usage: restserver DIR [append-only]")
	}
	secret := "rest-secret-8374"
	srv := httptest.NewServer(&resttest.Server{Dir: ts.MkAbs(args[0]), AppendOnly: len(args) > 1, User: "me", Password: secret})
	ts.Defer(srv.Close)
	ts.Setenv("REST", srv.URL)
	ts.Setenv("REST_SECRET", secret)
	ts.Setenv("REST_AUTH", strings.Replace(srv.URL, "://", "://me:"+secret+"@", 1))
}

// sftpserver: starts an sshd until the end of the script. $SFTP_COMMAND opens a session, $SFTP_PORT and
// $SFTP_USER are for addresses, and the home directory gets the keys.
func cmdSFTPServer(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 0 {
		ts.Fatalf("usage: sftpserver")
	}
	dir := ts.MkAbs("sftpserver")
	ts.Check(os.Mkdir(dir, 0o700))
	srv, err := sftptest.Run(dir)
	ts.Check(err)
	ts.Defer(srv.Stop)
	ts.Setenv("SFTP_COMMAND", srv.Command())
	ts.Setenv("SFTP_PORT", srv.Port)
	ts.Setenv("SFTP_USER", srv.User)
	ts.Check(os.CopyFS(ts.Getenv("HOME"), os.DirFS(srv.Home)))
}

// nowhere TEXT DIR...: the last output of a program and all files below the directories are free of TEXT.
func cmdNowhere(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 || args[0] == "" {
		ts.Fatalf("usage: nowhere TEXT DIR...")
	}
	for _, out := range []string{"stdout", "stderr"} {
		if strings.Contains(ts.ReadFile(out), args[0]) {
			ts.Fatalf("the secret is in %s: %s", out, ts.ReadFile(out))
		}
	}
	for _, dir := range args[1:] {
		ts.Check(filepath.WalkDir(ts.MkAbs(dir), func(path string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			data, err := os.ReadFile(path)
			if err == nil && bytes.Contains(data, []byte(args[0])) {
				ts.Fatalf("the secret is in %s", path)
			}
			return err
		}))
	}
}
