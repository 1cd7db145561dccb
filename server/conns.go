package server

import (
	"net"
	"net/http"
	"sync"
	"time"
)

// conns are the connections that are open.
type conns struct {
	mu        sync.Mutex
	silent    map[net.Conn]bool // by connection, whether no request has begun on it; guarded by mu
	lastClose time.Time         // guarded by mu
}

func newConns() *conns { return &conns{silent: map[net.Conn]bool{}} }

// note keeps the connections up to date: it is an http.Server's ConnState.
func (c *conns) note(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch state {
	case http.StateNew:
		c.silent[conn] = true
	case http.StateClosed, http.StateHijacked:
		delete(c.silent, conn)
		c.lastClose = time.Now()
	default:
		c.silent[conn] = false
	}
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
