package server

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"idempotent-orders/gen/db"
	"idempotent-orders/order"
)

const (
	// askEvery is how often admission asks for the age of the oldest pending event, and askTimeout how long that may take.
	askEvery   = time.Second
	askTimeout = 500 * time.Millisecond
)

// Admission refuses new orders while an event waits for too long to be published: a promise that cannot be kept is not made. The
// age is asked for in the background; while it is unknown, orders are admitted.
//
// It is by the clocks of servers: an event has the time of the server that placed its order. Where these clocks differ, so does
// the age. Events of orders that an operator parked wait on purpose, and do not count.
type Admission struct {
	pool   *pgxpool.Pool
	maxAge time.Duration
	log    *slog.Logger
	age    atomic.Int64 // nanoseconds, of an event that is too old; else 0
	from   int64        // where the outbox began; an event that is committed late with an id below is not noticed here
}

// NewAdmission returns an admission by the outbox of a migrated database, for Run to ask; nil, which admits everything, for a
// maxAge of 0.
func NewAdmission(pool *pgxpool.Pool, maxAge time.Duration, log *slog.Logger) *Admission {
	if maxAge == 0 {
		return nil
	}
	return &Admission{pool: pool, maxAge: maxAge, log: log}
}

// Run asks, once a second, until ctx is done.
func (a *Admission) Run(ctx context.Context) {
	if a == nil {
		return
	}
	for ticker := time.NewTicker(askEvery); ; {
		a.ask(ctx)
		select {
		case <-ctx.Done():
			ticker.Stop()
			return
		case <-ticker.C:
		}
	}
}

// ask finds out whether an event is too old.
func (a *Admission) ask(ctx context.Context) {
	age, err := a.oldest(ctx)
	if ctx.Err() != nil {
		return
	}
	if err != nil || age <= a.maxAge {
		age = 0
	}
	switch before := time.Duration(a.age.Swap(int64(age))); {
	case before == 0 && age > 0:
		a.log.WarnContext(ctx, "Orders are refused: events wait too long to be published", "oldest", age.Round(time.Millisecond), "limit", a.maxAge)
	case before > 0 && err != nil:
		a.log.WarnContext(ctx, "Orders are admitted again: how long events wait is unknown", "error", err)
	case before > 0 && age == 0:
		a.log.InfoContext(ctx, "Orders are admitted again")
	}
}

// oldest returns the age of the oldest pending event; 0 when there is none. It begins where it found the oldest the last time: what
// was published since may still have to be walked over, and the less of that, the better.
func (a *Admission) oldest(ctx context.Context) (age time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*askTimeout) // PostgreSQL itself stops at askTimeout, without losing the connection
	defer cancel()
	begin := pgx.TxOptions{BeginQuery: fmt.Sprintf("BEGIN READ ONLY; SET LOCAL statement_timeout = %d", askTimeout.Milliseconds())}
	err = pgx.BeginTxFunc(ctx, a.pool, begin, func(tx pgx.Tx) error {
		events, err := db.New(tx).FindOldestPending(ctx, a.from)
		for _, e := range events {
			age = max(age, time.Since(e.CreatedAt))
			if !e.Held {
				a.from = e.ID
			}
		}
		return err
	})
	return age, err
}

// refusal returns the error for a new order while none are admitted, and else nil.
func (a *Admission) refusal() error {
	if a == nil {
		return nil
	}
	age := time.Duration(a.age.Load())
	if age == 0 {
		return nil
	}
	return &refusal{
		error:  fmt.Errorf("%w: an event has waited for %s to be published", order.ErrUnavailable, age.Round(time.Millisecond)),
		detail: "Too many orders wait to be announced, and this one was not placed. Send it again with the same Idempotency-Key.",
	}
}
