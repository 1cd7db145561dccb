package operate

import (
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"

	"idempotent-orders/broker"
	"idempotent-orders/gen/db"
)

// Range says which published events are meant: those that were published from From to before To. What else is zero does
// not matter.
type Range struct {
	From, To time.Time
	After    int64 // of those that were published at From itself, only those with a higher outbox id
	Order    uuid.UUID
	Type     string
}

// CountPublished returns how many events a range has.
func (o *Operator) CountPublished(ctx context.Context, r Range) (count int64, err error) {
	err = o.analyse(ctx, func(q *db.Queries) (err error) {
		count, err = q.CountPublishedEvents(ctx, db.CountPublishedEventsParams{
			FromAt: r.From, AfterID: r.After, ToAt: r.To, AggregateID: r.Order, EventType: r.Type,
		})
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("count published events: %w", err)
	}
	return count, nil
}

// Replay publishes the events of a range again, oldest first, under the ids they have: mark is broker.Replayed, and consumers
// that finished them do nothing, or broker.Forced, and they do everything again. It returns what is left of the range, too; after
// an error, a batch of that may have been published.
func (o *Operator) Replay(ctx context.Context, r Range, mark string) (Outcome, Range, error) {
	op, err := o.begin(ctx)
	if err != nil {
		return Outcome{}, r, err
	}
	for {
		if err := op.wait(ctx); err != nil {
			return op.outcome, r, err
		}
		found, err := op.replayBatch(context.WithoutCancel(ctx), &r, mark)
		if err != nil || found < o.batchSize() {
			return op.outcome, r, err
		}
	}
}

// replayBatch publishes the next events of a range, moves the range's begin behind them, and returns how many there were.
func (op *operation) replayBatch(ctx context.Context, r *Range, mark string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, batchTimeout)
	defer cancel()
	q := db.New(op.Pool)
	rows, err := q.FindPublishedBetween(ctx, db.FindPublishedBetweenParams{
		FromAt: r.From, AfterID: r.After, ToAt: r.To, AggregateID: r.Order, EventType: r.Type, BatchSize: int64(op.batchSize()),
	})
	if err != nil || len(rows) == 0 {
		return 0, err
	}
	events := make([]broker.Event, len(rows))
	for i, row := range rows {
		events[i] = broker.EventOf(row.EventID, row.Source, row.EventType, row.AggregateID, row.CreatedAt, row.Payload, row.Traceparent)
		events[i].Replay, events[i].ReplayedAt = mark, row.ReplayedAt
	}
	accepted, refused, err := op.publish(ctx, events)
	if err != nil {
		return 0, err
	}
	last := rows[len(rows)-1]
	r.From, r.After = last.PublishedAt, last.ID
	op.add(Outcome{Done: len(accepted), Refused: refused})
	if err := q.CountOperation(ctx, db.CountOperationParams{ID: op.id, Events: int64(len(accepted))}); err != nil {
		return 0, fmt.Errorf("count the events in the operation: %w", err)
	}
	return len(rows), nil
}
