package operate

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/google/uuid"

	"idempotent-orders/broker"
	"idempotent-orders/gen/db"
)

// ErrNotFound: there is no such dead event.
var ErrNotFound = errors.New("there is no such dead event")

// Everything is a limit that leaves nothing out.
const Everything = math.MaxInt64

// Filter says which events are meant. What is zero does not matter.
type Filter struct {
	IDs       []uuid.UUID // any of these events
	Order     uuid.UUID
	Type      string
	OlderThan time.Duration // dead for at least so long
}

// Dead is an event that was refused for good: by the broker, before it was published, or by a consumer, after.
type Dead struct {
	Consumer    string // who refused it; empty: the broker
	EventID     uuid.UUID
	OrderID     uuid.UUID // uuid.Nil when the event is lost
	Type        string
	Attempts    int // by the broker; consumers do not tell
	Reason      string
	DiedAt      time.Time
	id          int64     // in outbox_dead, or in the archive
	publishedAt time.Time // in the archive
}

// Lost tells that a consumer refused the event, and that the archive does not have it any more: it cannot be requeued.
func (d Dead) Lost() bool { return d.Consumer != "" && d.OrderID == uuid.Nil }

// FindDead returns dead events that nobody has dropped, at most limit, those first that died first. It may read the whole inbox
// and archive.
func (o *Operator) FindDead(ctx context.Context, f Filter, limit int64) ([]Dead, error) {
	var rows []db.FindDeadRow
	err := o.analyse(ctx, func(q *db.Queries) (err error) {
		rows, err = q.FindDead(ctx, db.FindDeadParams{
			OlderThan: f.OlderThan, EventIds: append([]uuid.UUID{}, f.IDs...), AggregateID: f.Order, EventType: f.Type, Most: limit,
		})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("find dead events: %w", err)
	}
	dead := make([]Dead, len(rows))
	for i, r := range rows {
		dead[i] = Dead{
			Consumer: r.Consumer, EventID: r.EventID, OrderID: r.AggregateID, Type: r.EventType, Attempts: int(r.Attempts),
			Reason: r.Reason, DiedAt: r.DiedAt, id: r.ID, publishedAt: r.PublishedAt,
		}
	}
	return dead, nil
}

// Event returns the whole event. It returns ErrNotFound when it is lost, or not dead any more.
func (o *Operator) Event(ctx context.Context, d Dead) (broker.Event, error) {
	q := db.New(o.Pool)
	if d.Consumer == "" {
		rows, err := q.FindDeadAtBroker(ctx, []int64{d.id})
		if err != nil || len(rows) == 0 {
			return broker.Event{}, cmp.Or(err, ErrNotFound)
		}
		r := rows[0]
		return broker.EventOf(r.EventID, r.Source, r.EventType, r.AggregateID, r.CreatedAt, r.Payload, r.Traceparent), nil
	}
	rows, err := q.FindPublishedEvents(ctx, db.FindPublishedEventsParams{PublishedAts: []time.Time{d.publishedAt}, Ids: []int64{d.id}})
	if err != nil || len(rows) == 0 {
		return broker.Event{}, cmp.Or(err, ErrNotFound)
	}
	r := rows[0]
	return broker.EventOf(r.EventID, r.Source, r.EventType, r.AggregateID, r.CreatedAt, r.Payload, r.Traceparent), nil
}

// Requeue has dead events tried again. Those that the broker refused go to the end of the outbox, in their order; what was
// published of their orders meanwhile is not published again. Those that a consumer refused are published from the archive,
// marked as replayed, and are unfinished to that consumer. Lost ones are passed over, and those that are not dead any more.
func (o *Operator) Requeue(ctx context.Context, dead []Dead) (Outcome, error) {
	dead = slices.DeleteFunc(slices.Clone(dead), Dead.Lost)
	slices.SortStableFunc(dead, inOrder)
	return o.inBatches(ctx, dead, func(ctx context.Context, q *db.Queries, batch []Dead) (Outcome, error) {
		atBroker, atConsumers := split(batch)
		moved, err := q.RequeueDead(ctx, idsOf(atBroker))
		if err != nil {
			return Outcome{}, fmt.Errorf("put dead events into the outbox: %w", err)
		}
		again, err := o.publishAgain(ctx, q, atConsumers)
		again.Done += int(moved)
		return again, err
	})
}

// Drop gives dead events up. Those that the broker refused are deleted. Those that a consumer refused stay in its inbox, dead,
// so that no later delivery is taken for a new event; their reason tells that they were dropped, and they are not found any more.
func (o *Operator) Drop(ctx context.Context, dead []Dead) (Outcome, error) {
	return o.inBatches(ctx, dead, func(ctx context.Context, q *db.Queries, batch []Dead) (Outcome, error) {
		atBroker, atConsumers := split(batch)
		deleted, err := q.DropDead(ctx, idsOf(atBroker))
		if err != nil {
			return Outcome{}, fmt.Errorf("delete dead events: %w", err)
		}
		consumers, events := keysOf(atConsumers)
		marked, err := q.DropDeadToConsumers(ctx, db.DropDeadToConsumersParams{Consumers: consumers, EventIds: events})
		if err != nil {
			return Outcome{}, fmt.Errorf("mark dead events as dropped: %w", err)
		}
		return Outcome{Done: int(deleted + marked)}, nil
	})
}

// publishAgain publishes events that are dead to consumers, and opens them again there. The rows are locked first: another
// operator may be at them; and they are changed last, only those of events that the broker accepted.
func (o *Operator) publishAgain(ctx context.Context, q *db.Queries, dead []Dead) (Outcome, error) {
	if len(dead) == 0 {
		return Outcome{}, nil
	}
	consumers, ids := keysOf(dead)
	locked, err := q.LockDeadToConsumers(ctx, db.LockDeadToConsumersParams{Consumers: consumers, EventIds: ids})
	if err != nil {
		return Outcome{}, fmt.Errorf("lock dead events: %w", err)
	}
	still := map[uuid.UUID]bool{}
	for _, row := range locked {
		still[row.EventID] = true
	}
	keys := db.FindPublishedEventsParams{PublishedAts: []time.Time{}, Ids: []int64{}}
	for _, d := range dead {
		if still[d.EventID] {
			keys.PublishedAts, keys.Ids = append(keys.PublishedAts, d.publishedAt), append(keys.Ids, d.id)
		}
	}
	rows, err := q.FindPublishedEvents(ctx, keys)
	if err != nil || len(rows) == 0 {
		return Outcome{}, err
	}
	events := make([]broker.Event, len(rows))
	for i, r := range rows {
		events[i] = broker.EventOf(r.EventID, r.Source, r.EventType, r.AggregateID, r.CreatedAt, r.Payload, r.Traceparent)
		events[i].Replay, events[i].ReplayedAt = broker.Replayed, r.ReplayedAt
	}
	// What is not finished any more must be published again should the broker forget it.
	if err := q.LowerFinished(ctx, rows[0].PublishedAt); err != nil {
		return Outcome{}, fmt.Errorf("note that events are not finished: %w", err)
	}
	accepted, refused, err := o.publish(ctx, events)
	if err != nil {
		return Outcome{}, err
	}
	taken := map[uuid.UUID]bool{}
	for _, e := range accepted {
		taken[e.ID] = true
	}
	consumers, ids = keysOf(slices.DeleteFunc(slices.Clone(dead), func(d Dead) bool { return !taken[d.EventID] }))
	opened, err := q.ReopenDeadToConsumers(ctx, db.ReopenDeadToConsumersParams{Consumers: consumers, EventIds: ids})
	if err != nil {
		return Outcome{}, fmt.Errorf("open dead events again: %w", err)
	}
	return Outcome{Done: int(opened), Refused: refused}, nil
}

// inOrder sorts dead events in the order in which they were, or should have been, published.
func inOrder(a, b Dead) int {
	return cmp.Or(cmp.Compare(a.Consumer, b.Consumer), a.publishedAt.Compare(b.publishedAt), cmp.Compare(a.id, b.id), bytes.Compare(a.EventID[:], b.EventID[:]))
}

func split(dead []Dead) (atBroker, atConsumers []Dead) {
	for _, d := range dead {
		if d.Consumer == "" {
			atBroker = append(atBroker, d)
		} else {
			atConsumers = append(atConsumers, d)
		}
	}
	return atBroker, atConsumers
}

func idsOf(dead []Dead) []int64 {
	ids := make([]int64, len(dead))
	for i, d := range dead {
		ids[i] = d.id
	}
	return ids
}

func keysOf(dead []Dead) (consumers []string, events []uuid.UUID) {
	consumers, events = make([]string, len(dead)), make([]uuid.UUID, len(dead))
	for i, d := range dead {
		consumers[i], events[i] = d.Consumer, d.EventID
	}
	return consumers, events
}
