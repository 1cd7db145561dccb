package server

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

// wire is a connection to a server, without a client that hides what becomes of it.
type wire struct {
	t *testing.T
	net.Conn
	reader *bufio.Reader
}

func (a *testAPI) dial() *wire {
	a.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(a.url, "http://"))
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	return &wire{a.t, conn, bufio.NewReader(conn)}
}

// place sends an order and returns the answer, and whether the server closes the connection with it.
func (w *wire) place(key string) (reply, bool) {
	w.t.Helper()
	w.send(key)
	return w.read()
}

func (w *wire) send(key string) {
	fmt.Fprintf(w, "POST /orders HTTP/1.1\r\nHost: x\r\nIdempotency-Key: %s\r\nContent-Length: 0\r\n\r\n", key)
}

func (w *wire) read() (reply, bool) {
	w.t.Helper()
	answer, err := http.ReadResponse(w.reader, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return reply{answer.StatusCode, answer.Header, string(body)}, answer.Close
}

// closed checks that the server has closed the connection.
func (w *wire) closed() {
	w.t.Helper()
	_, err := w.reader.ReadByte()
	switch {
	case err == nil:
		w.t.Error("the server goes on to send")
	case errors.Is(err, os.ErrDeadlineExceeded):
		w.t.Error("the server keeps the connection open")
	}
}

func TestAServerThatStopsSaysSoAndServesOn(t *testing.T) {
	t.Parallel()
	plain := newAPI(t)
	api := serveAPI(t, Config{Pool: plain.pool, Redis: plain.redis, DrainTimeout: 3 * time.Second}, plain.server)
	kept := api.dial()
	if got, closes := kept.place("a"); got.status != 200 || closes {
		t.Fatalf("before: %v, closes %t", got, closes)
	}
	stopped := make(chan struct{})
	go func() { api.stop(); close(stopped) }()
	for ready := true; ready; {
		got := api.do("GET", "/readyz", nil, nil)
		if ready = got.status == 200; !ready {
			got.problem(t, 503, "unavailable")
		}
	}
	for name, conn := range map[string]*wire{"kept": kept, "new": api.dial()} {
		got, closes := conn.place(name)
		got.placed(t)
		if !closes {
			t.Errorf("on a %s connection it is not said that it ends", name)
		}
		conn.closed()
	}
	if got := api.do("GET", "/livez", nil, nil); got.status != 200 {
		t.Errorf("/livez: %d", got.status)
	}
	select {
	case <-stopped:
		t.Error("it did not stay for who has not noticed yet")
	default:
	}
	<-stopped // by itself, though the time is not up: nobody is left
	api.expectRows(3)
}

func TestAServerThatNobodyUsesStopsAtOnce(t *testing.T) {
	t.Parallel()
	plain := newAPI(t)
	for name, use := range map[string]func(*testAPI){
		"never used": func(*testAPI) {},
		"left by all": func(api *testAPI) {
			conn := api.dial()
			conn.place("k")
			conn.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			api := serveAPI(t, Config{Pool: plain.pool, Redis: plain.redis, DrainTimeout: time.Hour}, plain.server)
			use(api)
			api.stop()
		})
	}
}
