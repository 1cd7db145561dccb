package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"idempotent-orders/broker"
	"idempotent-orders/gen/db"
	"idempotent-orders/internal/connect"
)

const (
	// relayBatch is the most events a relay claims at once.
	relayBatch = 1000
	// turnLock is the advisory lock that a relay holds while it publishes: one at a time, so the order is kept.
	turnLock = 0x6f7574626f78 // "outbox"
	// publishTimeout bounds the one slow thing that happens inside a transaction.
	publishTimeout = 3 * time.Second
	// stallTimeout is when PostgreSQL ends the transaction of a relay that does nothing. It is longer than publishing may
	// take.
	stallTimeout = 5 * time.Second
	// relayTimeout bounds a whole round: a PostgreSQL that is silent shall be noticed, and said.
	relayTimeout = 15 * time.Second
	// An idle relay looks at the outbox again after idleLeast, then less and less often.
	idleLeast, idleMost = 5 * time.Millisecond, 250 * time.Millisecond
	// A relay that failed tries again after failedLeast, then less and less often.
	failedLeast, failedMost = 50 * time.Millisecond, 2 * time.Second
	// lookEvery is how often a relay looks for events below the floor, and lookTimeout how long that may take.
	lookEvery, lookTimeout = time.Minute, 30 * time.Second
)

// Relay moves outbox events to a broker. Any number may run, in any number of processes: they alternate turns.
type Relay struct {
	pool         *pgxpool.Pool
	publisher    broker.Publisher
	log          *slog.Logger
	nudged       chan struct{}
	stallTimeout time.Duration
	timeout      time.Duration
	floor        floor
}

// NewRelay returns a relay from the outbox of a migrated database to publisher.
func NewRelay(pool *pgxpool.Pool, publisher broker.Publisher, log *slog.Logger) *Relay {
	return &Relay{pool: pool, publisher: publisher, log: log, nudged: make(chan struct{}, 1), stallTimeout: stallTimeout, timeout: relayTimeout}
}

// Nudge tells the relay that there may be something in the outbox. It never blocks. A relay that is not nudged polls.
func (r *Relay) Nudge() {
	select {
	case r.nudged <- struct{}{}:
	default:
	}
}

// Run publishes until ctx is done; then it finishes the batch it holds.
func (r *Relay) Run(ctx context.Context) {
	idle, failed := backoff{least: idleLeast, most: idleMost}, backoff{least: failedLeast, most: failedMost}
	publishing := trouble{log: r.log, doing: "Publishing outbox events"}
	var looking sync.WaitGroup
	defer looking.Wait()
	looking.Go(func() { r.keepLooking(ctx) })
	for ctx.Err() == nil {
		published, err := r.runOnce(ctx)
		publishing.note(ctx, err)
		switch {
		case err != nil:
			failed.wait(ctx, nil)
		case published == 0:
			failed.reset()
			idle.wait(ctx, r.nudged)
		default:
			failed.reset()
			idle.reset()
		}
	}
}

// Drain publishes until the outbox is empty, or another relay has the turn.
func (r *Relay) Drain(ctx context.Context) error {
	for {
		if published, err := r.runOnce(ctx); published == 0 || err != nil {
			return err
		}
	}
}

// runOnce takes the turn, claims a batch, publishes it and commits, and returns how many events it published; none when
// another relay has the turn. After an error nothing happened, but events may have been published that will be again.
func (r *Relay) runOnce(ctx context.Context) (int, error) {
	ctx, cancel := finishing(ctx, r.timeout)
	defer cancel()
	var turn db.TakeTurnRow
	var claimed []db.ClaimOutboxBatchRow
	err := pgx.BeginTxFunc(ctx, r.pool, connect.Tx(r.stallTimeout, 0), func(tx pgx.Tx) (err error) {
		q := db.New(tx)
		if turn, err = q.TakeTurn(ctx, turnLock); err != nil {
			return fmt.Errorf("take the turn: %w", err)
		}
		if !turn.Taken {
			return nil
		}
		if claimed, err = q.ClaimOutboxBatch(ctx, db.ClaimOutboxBatchParams{Floor: r.floor.get(), BatchSize: relayBatch}); err != nil {
			return fmt.Errorf("claim a batch: %w", err)
		}
		return r.publish(ctx, claimed)
	})
	if err != nil {
		return 0, err
	}
	switch {
	case len(claimed) == relayBatch:
		r.floor.raise(turn, claimed[relayBatch-1].ID)
	case turn.Taken:
		r.floor.raise(turn, math.MaxInt64)
	}
	return len(claimed), nil
}

// keepLooking looks below the floor from time to time, until ctx is done.
func (r *Relay) keepLooking(ctx context.Context) {
	for ticker := time.NewTicker(lookEvery); ; {
		select {
		case <-ctx.Done():
			ticker.Stop()
			return
		case <-ticker.C:
			r.look(ctx) // whatever keeps it from looking keeps the relay from publishing, which says so
		}
	}
}

// look searches for events at or below the floor, and lowers the floor below the first it finds. It does not take the turn,
// and may walk over everything that was ever published: others go on meanwhile.
func (r *Relay) look(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	found, err := db.New(r.pool).FindLowestOutboxID(ctx, r.floor.get())
	if err != nil || found == 0 {
		return
	}
	r.log.WarnContext(ctx, "An event was left behind, and is published now", "id", found)
	r.floor.lower(found)
	r.Nudge()
}

func (r *Relay) publish(ctx context.Context, rows []db.ClaimOutboxBatchRow) error {
	if len(rows) == 0 {
		return nil
	}
	events := make([]broker.Event, len(rows))
	for i, row := range rows {
		events[i] = broker.Event{
			ID: row.EventID, Source: row.Source, Type: row.EventType, Subject: row.AggregateID.String(),
			Time: row.CreatedAt, Data: row.Payload,
		}
		if row.Traceparent != nil {
			events[i].Traceparent = *row.Traceparent
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, publishTimeout, errors.New("the broker did not answer in time"))
	defer cancel()
	return r.publisher.Publish(ctx, events)
}
