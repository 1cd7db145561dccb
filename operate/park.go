package operate

import (
	"context"
	"fmt"

	"github.com/google/uuid"

	"idempotent-orders/gen/db"
)

// Waiting is what there is of an order that is not published.
type Waiting struct {
	Events int // that wait to be published
	Parked bool
}

// Waiting returns how an order stands.
func (o *Operator) Waiting(ctx context.Context, order uuid.UUID) (w Waiting, err error) {
	err = o.analyse(ctx, func(q *db.Queries) error {
		row, err := q.CountWaiting(ctx, order)
		w = Waiting{Events: int(row.Events), Parked: row.Parked}
		return err
	})
	if err != nil {
		return w, fmt.Errorf("count the events of order %s: %w", order, err)
	}
	return w, nil
}

// Park holds back the events of an order, those that wait and those to come, until Unpark. What a relay publishes at this
// moment is published first. It returns how the order stood before; when that was parked, nothing happened.
func (o *Operator) Park(ctx context.Context, order uuid.UUID) (Waiting, error) {
	return o.onOrder(ctx, order, func(ctx context.Context, q *db.Queries) (int64, error) { return q.ParkOrder(ctx, order) })
}

// Unpark lets the events of an order go on, the first of them at once, the others behind it. It returns how the order stood
// before; when that was not parked, nothing happened.
func (o *Operator) Unpark(ctx context.Context, order uuid.UUID) (Waiting, error) {
	return o.onOrder(ctx, order, func(ctx context.Context, q *db.Queries) (int64, error) {
		unparked, err := q.UnparkOrder(ctx, order)
		if err != nil || unparked == 0 {
			return 0, err
		}
		return unparked, q.ReleaseOrder(ctx, order)
	})
}

// onOrder changes how an order stands. The change has the turn: a relay that claimed before it and held events back after it
// would not know of it, and nobody would of these events. The events are counted before, because that may take long.
func (o *Operator) onOrder(ctx context.Context, order uuid.UUID, change func(context.Context, *db.Queries) (int64, error)) (Waiting, error) {
	before, err := o.Waiting(ctx, order)
	if err != nil {
		return before, err
	}
	op, err := o.begin(ctx)
	if err != nil {
		return before, err
	}
	return before, op.do(ctx, func(ctx context.Context, q *db.Queries) (Outcome, error) {
		changed, err := change(ctx, q)
		if err != nil || changed == 0 {
			return Outcome{}, err
		}
		return Outcome{Done: before.Events}, nil
	})
}
