package server

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// maxConns is how many connections may be open.
const maxConns = 12_000

// conns are the connections that are open.
type conns struct {
	limit     int
	log       *slog.Logger
	mu        sync.Mutex
	silent    map[net.Conn]bool // by connection, whether no request has begun on it; guarded by mu
	lastClose time.Time         // guarded by mu
	logged    time.Time         // when it was last logged that one was refused; guarded by mu
}

func newConns(limit int, log *slog.Logger) *conns {
	return &conns{limit: limit, log: log, silent: map[net.Conn]bool{}}
}

// tooMany is all that a connection too many gets. It may be lost when the client has sent something already.
var tooMany = func() []byte {
	const problem = `{"type":"/problems/unavailable","title":"Unavailable","status":503,"detail":"Too many connections are open."}` + "\n"
	return fmt.Appendf(nil, "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\nCache-Control: no-store\r\n"+
		"Content-Type: application/problem+json\r\nContent-Length: %d\r\n\r\n%s", len(problem), problem)
}()

// note keeps the connections up to date: it is an http.Server's ConnState. One too many is closed.
func (c *conns) note(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch state {
	case http.StateNew:
		if len(c.silent) >= c.limit {
			c.refuse(conn)
			return
		}
		c.silent[conn] = true
	case http.StateClosed, http.StateHijacked:
		delete(c.silent, conn)
		c.lastClose = time.Now()
	default:
		c.silent[conn] = false
	}
}

// refuse answers and closes a connection that nobody has begun to read.
func (c *conns) refuse(conn net.Conn) {
	_, _ = conn.Write(tooMany) // into an empty buffer: it does not wait
	_ = conn.Close()
	if time.Since(c.logged) >= time.Second {
		c.logged = time.Now()
		c.log.Warn("Connections are refused: too many are open", "open", len(c.silent), "limit", c.limit)
	}
}

// connLimit returns how many connections may be open, of the files that the process may open.
func connLimit(files uint64, log *slog.Logger) int {
	const others = 200 // files: connections to the stores, and what the libraries need
	if files >= maxConns+others {
		return maxConns
	}
	limit := max(int(files)-others, 1)
	log.Warn("Few files may be open, so few connections: raise the limit (ulimit -n, LimitNOFILE)",
		"files", files, "connections", limit, "wanted", maxConns+others)
	return limit
}

// quiet tells whether no connection has been open for quietTime.
func (c *conns) quiet() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.silent) == 0 && time.Since(c.lastClose) >= quietTime
}

// drain waits until it is quiet, as it is at once when nobody uses the server, or until the limit.
func (c *conns) drain(limit time.Duration) {
	const look = 20 * time.Millisecond
	for end := time.Now().Add(limit); !c.quiet() && time.Now().Before(end); {
		time.Sleep(min(look, time.Until(end)))
	}
}

// closeSilent closes the connections on which no request has begun.
func (c *conns) closeSilent() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for conn, silent := range c.silent {
		if silent {
			_ = conn.Close()
		}
	}
}
