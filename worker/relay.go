package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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
	// turn is the advisory lock that a relay holds while it publishes: one at a time, so the order is kept.
	turn = 0x6f7574626f78 // "outbox"
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
)

// Relay moves outbox events to a broker. Any number may run, in any number of processes: they alternate turns.
type Relay struct {
	pool         *pgxpool.Pool
	publisher    broker.Publisher
	log          *slog.Logger
	nudged       chan struct{}
	stallTimeout time.Duration
	timeout      time.Duration
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
	published := 0
	err := pgx.BeginTxFunc(ctx, r.pool, connect.Tx(r.stallTimeout, 0), func(tx pgx.Tx) error {
		q := db.New(tx)
		taken, err := q.TakeTurn(ctx, turn)
		if err != nil {
			return fmt.Errorf("take the turn: %w", err)
		}
		if !taken {
			return nil
		}
		rows, err := q.ClaimOutboxBatch(ctx, relayBatch)
		if err != nil {
			return fmt.Errorf("claim a batch: %w", err)
		}
		published = len(rows)
		return r.publish(ctx, rows)
	})
	if err != nil {
		return 0, err
	}
	return published, nil
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
