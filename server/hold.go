package server

import (
	"context"
	"net/http"
	"sync/atomic"
	"time"
)

const (
	// refusals is how many requests a second are refused of clients that send again at once. To refuse one costs as much as an
	// empty handler, a third of an order: at ten times the load that a server can take, nothing would be left for orders.
	refusals = 2000
	// longestHold is what the last of all connections that may be open waits for.
	longestHold = maxConns * time.Second / refusals
	// longestPace is for how long a line may hold one for a reason of its own.
	longestPace = time.Second
)

// line is where the connections of one caller wait on which nothing is read for a while, because a request on them was refused
// for being one too many.
type line struct {
	held atomic.Int64
	pace time.Duration // one of them is read again in that time, up to longestPace for each; 0: as often as holds allow
}

// holds are the lines of all callers.
type holds struct {
	lines    atomic.Int64 // in which somebody waits
	longest  time.Duration
	released chan struct{} // closed when the server drains
}

// join puts a connection into a line, and returns for how long it is held: so long that all who are held send no more requests a
// second than refusals, of which each line has the same share. How long a caller waits so depends on its own connections, and on
// how many callers wait, not on how many connections these have.
func (h *holds) join(l *line) time.Duration {
	held := l.held.Add(1)
	if held == 1 {
		h.lines.Add(1)
	}
	share := time.Duration(held*h.lines.Load()) * time.Second / refusals
	return min(max(share, min(time.Duration(held)*l.pace, longestPace)), h.longest)
}

func (h *holds) leave(l *line) {
	if l.held.Add(-1) == 0 {
		h.lines.Add(-1)
	}
}

// hold reads nothing from a connection in a line, for no longer than the answer told. A connection that several callers have used
// is not held, for one would wait for what another did, and neither is one that ends.
func (h *holds) hold(w http.ResponseWriter, r *http.Request, l *link) {
	defer h.leave(l.line)
	l.line = nil
	ends := r.Close || w.Header().Get("Connection") == "close" // who sends it, or the server
	if l.shared || ends || http.NewResponseController(w).Flush() != nil {
		return
	}
	timer := time.NewTimer(l.held)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-r.Context().Done(): // the client left
	case <-h.released:
	}
}

// link is a client's connection, on which there is one request at a time.
type link struct {
	caller string        // who sent on it
	shared bool          // by several callers, through a proxy
	line   *line         // that it has joined; nil: none
	held   time.Duration // when it has, for how long
}

// linkOf returns the connection of a request, or nil when its server does not tell.
func linkOf(r *http.Request) *link {
	l, _ := r.Context().Value(linkKey{}).(*link)
	return l
}

type linkKey struct{}

// linked is an http.Server's ConnContext: its requests know their link.
func linked(ctx context.Context) context.Context {
	return context.WithValue(ctx, linkKey{}, new(link))
}

// carries notes whose request came over a connection.
func (l *link) carries(caller string) {
	l.shared = l.shared || l.caller != "" && l.caller != caller
	l.caller = caller
}
