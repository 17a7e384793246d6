package link

import (
	"bytes"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// echo answers each connection with what came, when all of it has come.
func echo(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				data, _ := io.ReadAll(c)
				_, _ = c.Write(data)
			}()
		}
	}()
	return l.Addr().String()
}

// A link is never faster than it says, however many connections there are, and changes nothing.
func TestLink(t *testing.T) {
	const rate, latency, each, conns = 8 << 20, 30 * time.Millisecond, 256 << 10, 4
	k, err := Start(echo(t), Options{Rate: rate, Latency: latency})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	began := time.Now()
	var wg sync.WaitGroup
	for i := range conns {
		wg.Go(func() {
			c, err := net.Dial("tcp", k.Addr())
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			want := bytes.Repeat([]byte{byte(i), 1, 2, 3, 4, 5, 6}, each/7)
			go func() {
				_, _ = c.Write(want)
				_ = c.(*net.TCPConn).CloseWrite()
			}()
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes came back of %d: %v", len(got), len(want), err)
			}
		})
	}
	wg.Wait()
	took := time.Since(began)
	up, down, n := k.Counts()
	// A handshake, the way there and the way back; and the last connection's bytes after all others'.
	lowest := 4*latency + time.Duration(up*int64(time.Second)/rate)
	if took < lowest {
		t.Errorf("%d bytes up and %d down took %v, which must be %v at least", up, down, took, lowest)
	}
	if want := int64(conns * (each / 7 * 7)); up != want || down != want || n != conns {
		t.Errorf("counted %d up, %d down, %d connections; want %d and %d", up, down, n, want, conns)
	}
}

// A server that is not there, and one that goes, end the connection.
func TestNobodyThere(t *testing.T) {
	k, err := Start("127.0.0.1:1", Options{Rate: 1 << 20, Latency: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	c, err := net.Dial("tcp", k.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if n, err := c.Read(make([]byte, 1)); err == nil {
		t.Errorf("read %d bytes from nobody", n)
	}
}
