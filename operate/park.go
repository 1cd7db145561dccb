package operate

import (
	"context"
	"fmt"
	"time"

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

// Parked is an order whose events are held back.
type Parked struct {
	Order  uuid.UUID
	Since  time.Time
	Events int // that wait to be published
}

// FindParked returns parked orders, at most limit, those first that were parked first.
func (o *Operator) FindParked(ctx context.Context, limit int64) (parked []Parked, err error) {
	err = o.analyse(ctx, func(q *db.Queries) error {
		rows, err := q.FindParked(ctx, limit)
		for _, row := range rows {
			parked = append(parked, Parked{Order: row.AggregateID, Since: row.ParkedAt, Events: int(row.Events)})
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("find parked orders: %w", err)
	}
	return parked, nil
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
