package docker

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// frame is a piece of output as the engine sends it.
func frame(stream byte, text string) string {
	head := [8]byte{stream}
	binary.BigEndian.PutUint32(head[4:], uint32(len(text)))
	return string(head[:]) + text
}

func TestControl(t *testing.T) {
	var asked []string
	polls := 0
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/_ping" {
			w.Header().Set("Api-Version", "1.41")
			return
		}
		body, _ := io.ReadAll(r.Body)
		asked = append(asked, strings.TrimSpace(r.Method+" "+strings.TrimPrefix(r.URL.RequestURI(), "/v1.41")+" "+string(body)))
		switch strings.TrimPrefix(r.URL.Path, "/v1.41") {
		case "/containers/up/start", "/containers/down/stop":
			w.WriteHeader(http.StatusNotModified)
		case "/containers/x/wait":
			_, _ = io.WriteString(w, `{"StatusCode":137}`)
		case "/containers/x/top":
			_, _ = io.WriteString(w, `{"Titles":["PID","PPID","COMMAND"],"Processes":[["12","1","ocis server"],["13","12","sh","-c"]]}`)
		case "/containers/create":
			_, _ = io.WriteString(w, `{"Id":"c1","Warnings":[]}`)
		case "/containers/x/logs":
			_, _ = io.WriteString(w, frame(1, "one\n")+frame(2, "two\n"))
		case "/images/load":
			_, _ = io.WriteString(w, `{"stream":"Loading\n"}`+"\n"+`{"stream":"Loaded image: owncloud/ocis:7\n"}`+"\n")
		case "/containers/none":
			http.Error(w, `{"message":"No such container: none"}`, http.StatusNotFound)
		case "/containers/x/exec":
			_, _ = io.WriteString(w, `{"Id":"e1"}`)
		case "/exec/e1/start":
			_, _ = io.WriteString(w, frame(1, "out ")+frame(2, "err"))
		case "/exec/e1/json":
			polls++
			_, _ = fmt.Fprintf(w, `{"Running":%v,"ExitCode":3}`, polls < 3)
		case "/containers/x/kill":
			http.Error(w, `{"message":"container x is not running"}`, http.StatusConflict)
		default:
			w.WriteHeader(http.StatusNoContent)
		}
	})
	ctx := context.Background()
	for name, err := range map[string]error{
		"start": c.Start(ctx, "up"), "stop": c.Stop(ctx, "down", 1500*time.Millisecond), "pause": c.Pause(ctx, "x"), "unpause": c.Unpause(ctx, "x"),
		"policy":    c.SetRestartPolicy(ctx, "x", RestartPolicy{Name: "on-failure", MaximumRetryCount: 4}),
		"no policy": c.SetRestartPolicy(ctx, "x", RestartPolicy{}),
	} {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	var api *APIError
	if err := c.Kill(ctx, "x", "SIGTERM"); !errors.As(err, &api) || api.Status != http.StatusConflict {
		t.Errorf("got %v", err)
	}
	if code, err := c.Wait(ctx, "x"); err != nil || code != 137 {
		t.Errorf("got %d, %v", code, err)
	}
	if list, err := c.Top(ctx, "x"); err != nil || len(list) != 2 || list[0] != (Process{12, 1, "ocis server"}) || list[1] != (Process{13, 12, "sh -c"}) {
		t.Errorf("got %+v, %v", list, err)
	}
	if code, out, err := c.Exec(ctx, "x", "kill", "-TERM"); err != nil || code != 3 || out != "out err" {
		t.Errorf("got %d, %q, %v", code, out, err)
	}
	if id, err := c.Create(ctx, map[string]string{"Image": "i"}); err != nil || id != "c1" {
		t.Errorf("got %q, %v", id, err)
	}
	if log, err := c.Logs(ctx, "x", 5); err != nil || log != "one\ntwo\n" {
		t.Errorf("got %q, %v", log, err)
	}
	if name, err := c.LoadImage(ctx, strings.NewReader("archive")); err != nil || name != "owncloud/ocis:7" {
		t.Errorf("got %q, %v", name, err)
	}
	if err := errors.Join(c.Remove(ctx, "x"), c.Remove(ctx, "none"), c.RemoveImage(ctx, "owncloud/ocis:7")); err != nil {
		t.Error(err)
	}
	all := strings.Join(asked, "\n")
	for _, want := range []string{
		"POST /containers/down/stop?t=2",
		`POST /containers/x/update {"RestartPolicy":{"Name":"on-failure","MaximumRetryCount":4}}`,
		`POST /containers/x/update {"RestartPolicy":{"Name":"no","MaximumRetryCount":0}}`,
		"POST /containers/x/kill?signal=SIGTERM",
		"GET /containers/x/top?ps_args=-eo+pid%2Cppid%2Cargs",
		`POST /containers/x/exec {"AttachStderr":true,"AttachStdout":true,"Cmd":["kill","-TERM"]}`,
		`POST /exec/e1/start {"Detach":false,"Tty":false}`,
		`POST /containers/create {"Image":"i"}`,
		"GET /containers/x/logs?stderr=1&stdout=1&tail=5",
		"POST /images/load archive",
		"DELETE /containers/x?force=1&v=1",
		"DELETE /images/owncloud/ocis:7",
	} {
		if !strings.Contains(all+"\n", want+"\n") {
			t.Errorf("not asked: %s; asked:\n%s", want, all)
		}
	}
}

func TestReadStreams(t *testing.T) {
	long := strings.Repeat("x", outputLimit+10)
	for in, want := range map[string]string{
		"":                             "",
		frame(1, "a") + frame(1, ""):   "a",
		frame(1, "abc")[:9]:            "a",
		frame(1, long) + frame(2, "y"): long[:outputLimit],
	} {
		if got := readStreams(bytes.NewReader([]byte(in))); got != want {
			t.Errorf("got %d bytes, want %d", len(got), len(want))
		}
	}
}
