// Package worker announces orders: the relay moves outbox events to the broker, and the e-mail consumer sends a
// confirmation for each.
//
// Delivery is at least once, in the order of the outbox for each order's events. Nothing is lost:
//
//   - The open transaction is the claim. The relay takes the turn, claims a batch, publishes it and commits. When it dies
//     or stalls, PostgreSQL rolls back: the events are in the outbox again, and the turn is free.
//   - A crash between publish and commit publishes the batch again; the inbox absorbs it.
//   - A received event stays with Redis until it is acknowledged, and is delivered to another when its receiver is gone.
//
// An event in the inbox:
//
//	(absent) --enter--> received --mark--> sent
//	    ^                ^  | |  |
//	    |                |  | |  +---mark--> dead: refused for ever, or delivered too often
//	    |                |  | +--+ not now: entered again by the same holder
//	    |                +--+ abandoned: entered again by another holder
//	    +-- given back by a holder that is stopped
//
// A mail that cannot be sent now costs nothing, however often it is tried. An event whose receivers died with it, several
// times, is handled alone, and is dead when they go on to die: only take-overs from the dead count, not a stop, and not
// waiting for a mail server.
//
// One crash cannot be decided: after the mail server accepted a mail and before that was marked. Such mails may be sent again,
// with the same Message-ID: those under way (16 at most), those that a mark was under way for, and those accepted within the
// 20 ms before it.
package worker

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"time"
)

// grace is what a loop that is told to stop gets to finish what it holds.
const grace = 2 * time.Second

// finishing returns a context that outlives ctx by the grace, for work that should be finished once it was begun, in time.
func finishing(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(grace, cancel) })
	return longer, func() { stop(); cancel() }
}

// backoff doubles a wait from least to most; each wait has jitter, so that processes do not move in step.
type backoff struct {
	least, most time.Duration
	next        time.Duration
}

func (b *backoff) reset() { b.next = 0 }

// wait waits for the next, longer while, or until ctx is done or woken is ready. It tells whether ctx is still good.
func (b *backoff) wait(ctx context.Context, woken <-chan struct{}) bool {
	b.next = min(max(2*b.next, b.least), b.most)
	timer := time.NewTimer(b.next/2 + rand.N(b.next/2+1)) // #nosec G404 -- jitter is no secret
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-woken:
	case <-timer.C:
	}
	return ctx.Err() == nil
}

// trouble logs the first of a row of failures, and the end of the row.
type trouble struct {
	log   *slog.Logger
	doing string
	since time.Time
}

func (t *trouble) note(ctx context.Context, err error) {
	switch {
	case err != nil && t.since.IsZero():
		t.since = time.Now()
		t.log.ErrorContext(ctx, t.doing+" fails, and will be tried again", "error", err)
	case err == nil && !t.since.IsZero():
		t.log.InfoContext(ctx, t.doing+" works again", "after", time.Since(t.since).Round(time.Millisecond))
		t.since = time.Time{}
	}
}
