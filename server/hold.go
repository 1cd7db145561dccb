package server

import (
	"context"
	"net/http"
	"sync/atomic"
	"time"
)

// refusals is how many requests a second are refused of clients that send again at once. To refuse one costs as much as an
// empty handler, a third of an order: at ten times the load that a server can take, nothing would be left for orders.
const refusals = 2000

// holds are the connections on which nothing is read for a while, because a request on them was refused for being one too many.
type holds struct {
	held     atomic.Int64
	released chan struct{} // closed when the server drains
}

// join counts a connection in, and returns for how long it is held: so long that all who are held send as many requests a
// second as refusals.
func (h *holds) join() time.Duration { return time.Duration(h.held.Add(1)) * time.Second / refusals }

// hold reads nothing from a connection after an answer, for no longer than the answer told. A connection that several callers
// have used is not held, for one would wait for what another did, and neither is one that ends.
func (h *holds) hold(w http.ResponseWriter, r *http.Request, d time.Duration) {
	defer h.held.Add(-1)
	l, known := r.Context().Value(linkKey{}).(*link)
	ends := r.Close || w.Header().Get("Connection") == "close" // who sends it, or the server
	if !known || l.shared || ends || http.NewResponseController(w).Flush() != nil {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-r.Context().Done(): // the client left
	case <-h.released:
	}
}

// link is a client's connection, on which there is one request at a time.
type link struct {
	caller string // who sent on it
	shared bool   // by several callers, through a proxy
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
