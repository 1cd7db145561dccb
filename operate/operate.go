// Package operate is what operators do to events: look at the dead ones, requeue or drop them, replay published ones, and park
// an order.
//
// What is true. Everything is done in batches, at a rate. Each batch is a transaction that takes the relays' turn, so that no
// relay is in the midst of something, does its work and counts it in the table operations: what that table says was done was
// done, however the operation ended. Two operators who do the same at once do each event once.
//
// What happens when it breaks. A batch that was begun is finished or rolled back; what is left can be done by the same
// operation again. Only what goes to the broker cannot be rolled back: up to a batch of events may be delivered again, as always,
// and the inbox knows them. A replay, which changes nothing in the database, is repeated from where it tells that it stopped.
package operate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"idempotent-orders/broker"
	"idempotent-orders/gen/db"
	"idempotent-orders/internal/connect"
)

const (
	// DefaultRate is how many events are done in a second, unless the operator says otherwise, and MaxRate the most.
	DefaultRate, MaxRate = 100, 100_000
	// maxBatch is the most events that are done in one transaction; at a low rate it is a tenth of a second's.
	maxBatch = 500
	// turnLock is the relays' advisory lock (turnLock in worker/relay.go).
	turnLock = 0x6f7574626f78
	// turnWait bounds the wait for the turn, which a relay whose broker is silent keeps for some seconds.
	turnWait = 10 * time.Second
	// publishTimeout bounds one batch at the broker, stallTimeout is when PostgreSQL ends the transaction around it, and
	// batchTimeout bounds it all, with the wait for the turn.
	publishTimeout, stallTimeout, batchTimeout = 3 * time.Second, 5 * time.Second, 20 * time.Second
)

// ErrInterrupted: the context was done before everything was. What was done is counted.
var ErrInterrupted = errors.New("interrupted")

// Operator does operations, one at a time.
type Operator struct {
	Pool      *pgxpool.Pool    // of a migrated database
	Publisher broker.Publisher // for Requeue and Replay
	Who, What string           // what the table operations shall say
	Rate      int              // events in a second; 0 means DefaultRate
	Progress  func(done int)   // if not nil, it is called after each batch
}

// Outcome is what became of an operation's events.
type Outcome struct {
	Done    int
	Refused []error // one for each event that the broker refused, which is as it was
}

// operation is one that has begun.
type operation struct {
	*Operator
	id      int64
	outcome Outcome
	due     time.Time // when the next batch may begin
}

// begin notes the operation, with no events yet.
func (o *Operator) begin(ctx context.Context) (*operation, error) {
	id, err := db.New(o.Pool).BeginOperation(ctx, db.BeginOperationParams{Who: o.Who, What: o.What})
	if err != nil {
		return nil, fmt.Errorf("note the operation: %w", err)
	}
	return &operation{Operator: o, id: id, due: time.Now()}, nil
}

func (o *Operator) rate() int {
	if o.Rate > 0 {
		return o.Rate
	}
	return DefaultRate
}

func (o *Operator) batchSize() int { return min(max(o.rate()/10, 1), maxBatch) }

// step is what is done in a transaction to some events. It returns how many it was done to.
type step func(ctx context.Context, q *db.Queries) (Outcome, error)

// do waits until the batch is due, and does a step in a transaction that has the turn and counts it. A step that has begun is
// not interrupted.
func (op *operation) do(ctx context.Context, do step) error {
	if err := op.wait(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), batchTimeout)
	defer cancel()
	var outcome Outcome
	err := pgx.BeginTxFunc(ctx, op.Pool, connect.Tx(stallTimeout, turnWait), func(tx pgx.Tx) (err error) {
		q := db.New(tx)
		if err := takeTurn(ctx, q); err != nil {
			return err
		}
		if outcome, err = do(ctx, q); err != nil {
			return err
		}
		return q.CountOperation(ctx, db.CountOperationParams{ID: op.id, Events: int64(outcome.Done)})
	})
	if err != nil {
		return err
	}
	op.add(outcome)
	return nil
}

// add notes a batch that is done, and when the next one is due.
func (op *operation) add(batch Outcome) {
	op.outcome.Done += batch.Done
	op.outcome.Refused = append(op.outcome.Refused, batch.Refused...)
	took := time.Duration(batch.Done+len(batch.Refused)) * time.Second / time.Duration(op.rate())
	op.due = later(op.due, time.Now().Add(-took)).Add(took)
	if op.Progress != nil {
		op.Progress(op.outcome.Done)
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// wait waits until the next batch is due. It returns ErrInterrupted when ctx is done.
func (op *operation) wait(ctx context.Context) error {
	timer := time.NewTimer(time.Until(op.due))
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
	if ctx.Err() != nil {
		return ErrInterrupted
	}
	return nil
}

func takeTurn(ctx context.Context, q *db.Queries) error {
	err := q.WaitForTurn(ctx, turnLock)
	var refused *pgconn.PgError
	if errors.As(err, &refused) && refused.Code == "55P03" { // lock_not_available
		return fmt.Errorf("the relays did not give their turn away for %s; try again: %w", turnWait, err)
	}
	return err
}

// publish publishes events and returns which of them the broker accepted, and what it said to the others. After an error
// any of them may have been accepted.
func (o *Operator) publish(ctx context.Context, events []broker.Event) (accepted []broker.Event, refused []error, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, publishTimeout, errors.New("the broker did not answer in time"))
	defer cancel()
	err = o.Publisher.Publish(ctx, broker.AnyEpoch, events)
	var refusal *broker.RefusedError
	if err != nil && !errors.As(err, &refusal) {
		return nil, nil, fmt.Errorf("publish %d events: %w", len(events), err)
	}
	if refusal == nil {
		return events, nil, nil
	}
	for i, e := range events {
		if reason, ok := refusal.Events[i]; ok {
			refused = append(refused, fmt.Errorf("the broker refused event %s of order %s: %w", e.ID, e.Subject, reason))
		} else {
			accepted = append(accepted, e)
		}
	}
	return accepted, refused, nil
}

// analyse reads in a transaction that may scan whole tables, which the pool's sessions avoid.
func (o *Operator) analyse(ctx context.Context, read func(q *db.Queries) error) error {
	options := pgx.TxOptions{BeginQuery: "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY;" +
		" SET LOCAL enable_seqscan = on; SET LOCAL enable_bitmapscan = on; SET LOCAL plan_cache_mode = auto"}
	return pgx.BeginTxFunc(ctx, o.Pool, options, func(tx pgx.Tx) error { return read(db.New(tx)) })
}

// inBatches does a step to batches of the dead. It stops at the first error.
func (o *Operator) inBatches(ctx context.Context, all []Dead, do func(ctx context.Context, q *db.Queries, batch []Dead) (Outcome, error)) (Outcome, error) {
	if len(all) == 0 {
		return Outcome{}, nil
	}
	op, err := o.begin(ctx)
	if err != nil {
		return Outcome{}, err
	}
	for batch := range slices.Chunk(all, o.batchSize()) {
		err := op.do(ctx, func(ctx context.Context, q *db.Queries) (Outcome, error) { return do(ctx, q, batch) })
		if err != nil {
			return op.outcome, err
		}
	}
	return op.outcome, nil
}
