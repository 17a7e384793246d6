// Command opencloud stands in for the server in the tests of drills: it serves what was restored, from
// inside of the walls, which it tries first.
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/internal/cloud/cloudtest"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return errors.New("the command is missing: server or auth-app")
	}
	switch args[0] {
	case "auth-app":
		for _, a := range args {
			if name, ok := strings.CutPrefix(a, "--user-name="); ok {
				fmt.Printf("App token created for %s\n token: %s\n", name, cloudtest.Token(name))
			}
		}
		return nil
	case "server":
	default:
		return fmt.Errorf("unknown command %q", args[0])
	}
	if err := walls(); err != nil {
		return err
	}
	told, err := behaviour()
	if err != nil {
		return err
	}
	if told == "refuse" {
		return errors.New("this server refuses to start")
	}
	prefix, ok := map[string]string{"decomposed": "user.oc.", "ocis": "user.ocis."}[os.Getenv("STORAGE_USERS_DRIVER")]
	if !ok {
		return fmt.Errorf("driver %q", os.Getenv("STORAGE_USERS_DRIVER"))
	}
	s, err := cloudtest.LoadStore(os.Getenv("STORAGE_USERS_DECOMPOSED_ROOT"), prefix)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", os.Getenv("PROXY_HTTP_ADDR"))
	if err != nil {
		return err
	}
	if told == "lie" {
		s.Write(s.Find("alan"), "not in the snapshot", "x", time.Now())
	}
	return s.ServeTLS(l)
}

// behaviour is what a test has written behind the end of this program: refuse, or lie.
func behaviour() (string, error) {
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		return "", err
	}
	defer f.Close()
	p := make([]byte, 64)
	st, err := f.Stat()
	if err != nil {
		return "", err
	}
	if _, err := f.ReadAt(p, st.Size()-int64(len(p))); err != nil {
		return "", err
	}
	_, told, _ := strings.Cut(string(p), "behaviour:")
	return told, nil
}

// walls makes sure of them, from inside.
func walls() error {
	if os.Getuid() == 0 {
		return errors.New("the server runs as root")
	}
	if rights, err := os.ReadFile("/proc/self/status"); err != nil || !strings.Contains(string(rights), "\nCapEff:\t0000000000000000\n") ||
		!strings.Contains(string(rights), "\nCapPrm:\t0000000000000000\n") || !strings.Contains(string(rights), "\nNoNewPrivs:\t1\n") {
		return fmt.Errorf("the server has rights: %s", rights)
	}
	ifs, err := net.Interfaces()
	if err != nil {
		return err
	}
	for _, i := range ifs {
		// The kernel may put tunnels that are down into each new network.
		if i.Flags&net.FlagLoopback == 0 && i.Flags&net.FlagUp != 0 {
			return fmt.Errorf("there is more than a loopback: %v", i)
		}
	}
	if routes, err := os.ReadFile("/proc/net/route"); err != nil || strings.Count(string(routes), "\n") > 1 { // its head
		return fmt.Errorf("there is a way out: %s, %v", routes, err)
	}
	if err := os.WriteFile("/etc/holdfast-drill-was-here", nil, 0o644); !errors.Is(err, unix.EROFS) {
		return fmt.Errorf("the machine's files can be written: %v", err)
	}
	if err := os.WriteFile(filepath.Join(os.Getenv("TMPDIR"), "x"), nil, 0o644); err != nil {
		return err
	}
	for _, kv := range os.Environ() {
		if strings.Contains(kv, "SECRET_OF_THE_TEST") || strings.Contains(kv, ".example") {
			return fmt.Errorf("what should have stayed outside came in: %s", kv)
		}
	}
	original, err := os.ReadFile(filepath.Join(os.Getenv("OC_BASE_DATA_PATH"), "original"))
	if err != nil {
		return err
	}
	// It may be gone: the repository outlives it.
	if list, err := os.ReadDir(string(original)); err != nil && !errors.Is(err, fs.ErrNotExist) || len(list) > 0 {
		return fmt.Errorf("the original is seen: %v, %v", list, err)
	}
	// What configured the original counts, if it was set there.
	if got := os.Getenv("OC_JWT_SECRET"); os.Getenv("STORAGE_USERS_DRIVER") == "decomposed" && got != "a 'secret'\\" {
		return fmt.Errorf("OC_JWT_SECRET is %q", got)
	}
	return nil
}
