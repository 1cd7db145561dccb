package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"idempotent-orders/order"
)

// defaultRoom is several times what keeps PostgreSQL busy. More would only wait longer and take memory.
const defaultRoom = 1024

// errCrowded: too many requests are under way; this one was not begun.
var errCrowded = errors.New("too many requests are under way")

// room bounds the requests under way: one too many is refused at once, since a longer queue would only make every answer later.
// One caller may fill half of it, so that who floods leaves as much to the others.
type room struct {
	each int // for one caller
	log  *slog.Logger

	mu       sync.Mutex
	underWay int            // guarded by mu
	callers  map[string]int // how many of each are under way; guarded by mu
	refused  int            // since that was logged; guarded by mu
	logged   time.Time      // guarded by mu
}

func newRoom(each int, log *slog.Logger) *room {
	return &room{each: each, log: log, callers: map[string]int{}}
}

// enter lets a request of a caller in, which has to leave, or returns why not.
func (r *room) enter(ctx context.Context, caller string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.underWay < 2*r.each && r.callers[caller] < r.each {
		r.underWay++
		r.callers[caller]++
		return nil
	}
	r.refused++
	if since := time.Since(r.logged); since >= time.Second { // a line for each would be a flood of its own
		r.log.WarnContext(ctx, "Requests are refused: too many are under way", "caller", caller, "its", r.callers[caller],
			"all", r.underWay, "refused", r.refused)
		r.refused, r.logged = 0, time.Now()
	}
	return &refusal{
		error:  fmt.Errorf("%w: %w", order.ErrUnavailable, errCrowded),
		detail: "Too many requests are under way, and this one was not begun. Send it again with the same Idempotency-Key.",
	}
}

func (r *room) leave(caller string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.underWay--
	if r.callers[caller]--; r.callers[caller] == 0 {
		delete(r.callers, caller)
	}
}
