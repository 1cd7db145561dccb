package server

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// maxConns is how many connections may be open.
const maxConns = 12_000

// conns are the connections that are open.
type conns struct {
	limit     int64
	log       *slog.Logger
	open      atomic.Int64
	counted   sync.Map     // connections that count as open
	silent    sync.Map     // those of them on which no request has begun
	lastClose atomic.Int64 // when one was closed, in nanoseconds
	logged    atomic.Int64 // when it was last logged that one was refused, in nanoseconds
}

func newConns(limit int, log *slog.Logger) *conns { return &conns{limit: int64(limit), log: log} }

// tooMany is all that a connection too many gets. It may be lost when the client has sent something already.
var tooMany = func() []byte {
	const problem = `{"type":"/problems/unavailable","title":"Unavailable","status":503,"detail":"Too many connections are open."}` + "\n"
	return fmt.Appendf(nil, "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\nCache-Control: no-store\r\n"+
		"Content-Type: application/problem+json\r\nContent-Length: %d\r\n\r\n%s", len(problem), problem)
}()

// note keeps the connections up to date: it is an http.Server's ConnState. One too many is closed.
func (c *conns) note(conn net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew: // of which there is one at a time
		if c.open.Load() >= c.limit {
			c.refuse(conn)
			return
		}
		c.open.Add(1)
		c.counted.Store(conn, true)
		c.silent.Store(conn, true)
	case http.StateActive:
		if _, first := c.silent.Load(conn); first {
			c.silent.Delete(conn)
		}
	case http.StateClosed, http.StateHijacked:
		c.silent.Delete(conn)
		if _, counted := c.counted.LoadAndDelete(conn); counted {
			c.lastClose.Store(time.Now().UnixNano())
			c.open.Add(-1)
		}
	}
}

// refuse answers and closes a connection that nobody has begun to read. No other is accepted meanwhile, and for a moment after:
// those that the kernel then refuses cost nearly nothing.
func (c *conns) refuse(conn net.Conn) {
	_, _ = conn.Write(tooMany) // into an empty buffer: it does not wait
	_ = conn.Close()
	if now := time.Now().UnixNano(); now-c.logged.Load() >= int64(time.Second) {
		c.logged.Store(now)
		c.log.Warn("Connections are refused: too many are open", "limit", c.limit)
	}
	time.Sleep(time.Second / refusals)
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
	return c.open.Load() == 0 && time.Now().UnixNano()-c.lastClose.Load() >= int64(quietTime)
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
	c.silent.Range(func(conn, _ any) bool {
		_ = conn.(net.Conn).Close()
		return true
	})
}
