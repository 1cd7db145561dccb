package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"idempotent-orders/broker"
	"idempotent-orders/internal/testenv"
)

// balancer sends where it is ready, as far as it knows: it asks each server every lookEvery, over a connection of its own.
type balancer struct {
	mu      sync.Mutex
	servers []*balanced // guarded by mu
}

type balanced struct {
	addr  string
	ready atomic.Bool
}

const lookEvery = 100 * time.Millisecond

// add adds a server, and returns when it is ready. The balancer looks after it until ctx is done.
func (b *balancer) add(ctx context.Context, t *testing.T, p *program) {
	t.Helper()
	server := &balanced{addr: strings.TrimPrefix(p.url, "http://")}
	first := make(chan struct{})
	once := sync.OnceFunc(func() { close(first) })
	go func() {
		client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}
		for ticker := time.NewTicker(lookEvery); ctx.Err() == nil; <-ticker.C {
			w, err := client.Get("http://" + server.addr + "/readyz")
			if err == nil {
				w.Body.Close()
			}
			ready := err == nil && w.StatusCode == http.StatusOK
			server.ready.Store(ready)
			if ready {
				once()
			}
		}
	}()
	select {
	case <-first:
	case <-time.After(30 * time.Second):
		t.Fatalf("it does not get ready:\n%s", p.said())
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.servers = append(b.servers, server)
}

// choose returns a server that is ready; turn spreads the load.
func (b *balancer) choose(turn int) (*balanced, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	ready := slices.DeleteFunc(slices.Clone(b.servers), func(s *balanced) bool { return !s.ready.Load() })
	if len(ready) == 0 {
		return nil, fmt.Errorf("none of %d servers is ready", len(b.servers))
	}
	return ready[turn%len(ready)], nil
}

// wire is a client that hides nothing: net/http's would send again by itself when a connection is closed in its face.
type wire struct {
	conns map[string]*wireConn // kept, by server
}

type wireConn struct {
	net.Conn
	reader *bufio.Reader
}

// place sends an order to a server, and returns the answer.
func (c *wire) place(addr, key string) (status int, body string, err error) {
	conn := c.conns[addr]
	if conn == nil {
		dialled, err := net.Dial("tcp", addr)
		if err != nil {
			return 0, "", err
		}
		conn = &wireConn{dialled, bufio.NewReader(dialled)}
		c.conns[addr] = conn
	}
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := fmt.Fprintf(conn, "POST /orders HTTP/1.1\r\nHost: %s\r\nIdempotency-Key: %s\r\nContent-Length: 0\r\n\r\n", addr, key); err != nil {
		return 0, "", err
	}
	w, err := http.ReadResponse(conn.reader, nil)
	if err != nil {
		return 0, "", err
	}
	content, err := io.ReadAll(w.Body)
	if w.Close {
		conn.Close()
		delete(c.conns, addr)
	}
	return w.StatusCode, string(content), err
}

func (c *wire) close() {
	for _, conn := range c.conns {
		conn.Close()
	}
}

// load sends orders through the balancer until stop is closed, each third one twice, with pauses in which its connections are
// idle. It returns the answers by key.
func (b *balancer) load(t *testing.T, name string, stop <-chan struct{}) map[string]string {
	client := &wire{conns: map[string]*wireConn{}}
	defer client.close()
	answers := map[string]string{}
	pause := time.NewTicker(4 * time.Millisecond)
	defer pause.Stop()
	for turn := 0; ; turn++ {
		select {
		case <-stop:
			return answers
		case <-pause.C:
		}
		key := fmt.Sprintf("%s-%d", name, turn-turn%3/2)
		server, err := b.choose(turn)
		if err != nil {
			t.Errorf("%s: %v", key, err)
			return answers
		}
		status, body, err := client.place(server.addr, key)
		if err != nil || status != http.StatusOK {
			t.Errorf("%s was answered %d %s, %v", key, status, body, err)
			return answers
		}
		if before, twice := answers[key]; twice && before != body {
			t.Errorf("%s was answered %s, and then %s", key, before, body)
		}
		answers[key] = body
	}
}

// Every process is replaced twice, under load, by one that is ready: start the new one, then SIGTERM to the old one.
func TestARollingDeployIsNotNoticed(t *testing.T) {
	t.Parallel()
	const each = 2
	database := testenv.DatabaseURL(t)
	rdb, redisServer := testenv.Redis(t)
	// A group that nobody reads keeps the stream whole, so that every publishing is still to be seen in the end.
	if err := rdb.XGroupCreateMkStream(t.Context(), broker.Stream, "audit", "0").Err(); err != nil {
		t.Fatal(err)
	}
	env := []string{"PORT=0", "XDG_DATA_HOME=" + testenv.Dir(t), "DATABASE_URL=" + database, "REDIS_ADDR=" + redisServer.Addr(), "EMAIL_SENDER=discard"}
	balancer, running := &balancer{}, [][]*program(nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	add := func() {
		server := start(t, env, "server").serving()
		balancer.add(ctx, t, server)
		worker := start(t, env, "worker")
		worker.waitFor(regexp.MustCompile("Outbox worker started"))
		consumer := start(t, env, "consumer")
		consumer.waitFor(regexp.MustCompile("Email consumer started"))
		running = append(running, []*program{server, worker, consumer})
	}
	for range each {
		add()
	}

	stop, answers := make(chan struct{}), make(chan map[string]string)
	const clients = 6
	for c := range clients {
		go func() { answers <- balancer.load(t, fmt.Sprint("client-", c), stop) }()
	}
	for i := range 2 * each { // the oldest first
		add()
		for _, p := range running[i] {
			p.signal()
		}
		for _, p := range running[i] {
			p.ends()
		}
	}
	close(stop)
	keys := 0
	orders := map[string]bool{}
	for range clients {
		for _, body := range <-answers {
			keys++
			orders[body] = true
		}
	}
	if keys < 100 || len(orders) != keys {
		t.Errorf("%d keys were answered with %d orders", keys, len(orders))
	}
	reconciled(t, env)
	var placed int
	if err := testenv.Pool(t, database).QueryRow(t.Context(), "SELECT count(*) FROM orders").Scan(&placed); err != nil || placed != keys {
		t.Errorf("there are %d orders, %v; want %d", placed, err, keys)
	}
	expectEachEventOnce(t, rdb.XRange(t.Context(), broker.Stream, "-", "+").Val(), keys)
	t.Logf("%d orders", keys)
}

// expectEachEventOnce looks for so many events in the stream, none of them twice.
func expectEachEventOnce(t *testing.T, messages []redis.XMessage, want int) {
	t.Helper()
	published := map[any]int{}
	for _, m := range messages {
		published[m.Values["id"]]++
	}
	for id, times := range published {
		if times > 1 {
			t.Errorf("event %v was published %d times", id, times)
		}
	}
	if len(published) != want {
		t.Errorf("%d events were published; want %d", len(published), want)
	}
}

// reconciled waits until everything that was placed is announced, mailed and accounted for.
func reconciled(t *testing.T, env []string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; {
		out, errs, code := finish(t, env, "reconcile")
		if code == 0 {
			return
		}
		if !strings.Contains(out, "missing: 0\n") || time.Now().After(deadline) {
			t.Fatalf("reconcile: %d\n%s%s", code, out, errs)
		}
	}
}
