package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"idempotent-orders/order"
)

// defaultRoom is several times what keeps PostgreSQL busy. More would only wait longer and take memory.
const defaultRoom = 1024

// errCrowded: too many requests are under way; this one was not begun.
var errCrowded = errors.New("too many requests are under way")

// room bounds the requests under way: one too many is refused at once, since a longer queue would only make every answer later.
// One caller may fill half of it, so that who floods leaves as much to the others. It has no lock, which a flood would queue for.
type room struct {
	each     int64 // for one caller
	log      *slog.Logger
	underWay atomic.Int64
	guests   sync.Map     // by the caller's name: *guest
	refused  atomic.Int64 // since that was logged
	logged   atomic.Int64 // when that was, in nanoseconds
}

// guest is a caller in a room.
type guest struct {
	underWay atomic.Int64
	crowded  refusal // the same for every one of it: making it anew would cost more than all else about it
	line     line
}

func newRoom(each int, log *slog.Logger) *room { return &room{each: int64(each), log: log} }

// enter lets a request of a caller in, which has to leave, or returns why not.
func (r *room) enter(ctx context.Context, caller string) error {
	its := r.guest(caller)
	if its.underWay.Add(1) > r.each {
		its.underWay.Add(-1)
		return r.refuse(ctx, caller, its)
	}
	if r.underWay.Add(1) > 2*r.each {
		r.leave(caller)
		return r.refuse(ctx, caller, its)
	}
	return nil
}

func (r *room) leave(caller string) {
	r.underWay.Add(-1)
	r.guest(caller).underWay.Add(-1)
}

// guest returns what is known of a caller. There are as many callers as API keys, or the one that everyone is while there are none:
// nothing that a client sends becomes a name here, so that the map needs not shrink.
func (r *room) guest(caller string) *guest {
	if its, ok := r.guests.Load(caller); ok {
		return its.(*guest)
	}
	its := &guest{crowded: refusal{
		error:  fmt.Errorf("%w: %w", order.ErrUnavailable, errCrowded),
		detail: "Too many requests are under way, and this one was not begun. Send it again with the same Idempotency-Key.",
	}}
	its.crowded.line = &its.line
	known, _ := r.guests.LoadOrStore(caller, its)
	return known.(*guest)
}

func (r *room) refuse(ctx context.Context, caller string, its *guest) error {
	refused := r.refused.Add(1)
	now, last := time.Now().UnixNano(), r.logged.Load()
	if now-last >= int64(time.Second) && r.logged.CompareAndSwap(last, now) { // a line for each would be a flood of its own
		r.refused.Add(-refused)
		r.log.WarnContext(ctx, "Requests are refused: too many are under way", "caller", caller, "underWay", r.underWay.Load(), "refused", refused)
	}
	return &its.crowded
}
