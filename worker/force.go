package worker

import (
	"bytes"
	"context"
	"maps"
	"slices"
	"time"

	"github.com/google/uuid"

	"idempotent-orders/broker"
	"idempotent-orders/gen/db"
)

// forcedAt returns when an operator had the event replayed to be handled again even where it is finished; zero: nobody did.
func forcedAt(e broker.Event) time.Time {
	if e.Replay == broker.Forced {
		return e.ReplayedAt
	}
	return time.Time{}
}

// force takes back in the inbox that events were finished, if that was before they were forced: they can be entered again.
// Whatever comes twice, as after a crash, finds the event entered or finished since, and changes nothing: one mail for one replay.
// None of the events is older than oldest.
func force(ctx context.Context, q *db.Queries, forced map[uuid.UUID]time.Time, oldest time.Time) error {
	if len(forced) == 0 {
		return nil
	}
	// In one order: two consumers must not wait for each other in a circle.
	ids := slices.SortedFunc(maps.Keys(forced), func(a, b uuid.UUID) int { return bytes.Compare(a[:], b[:]) })
	// An event was published after it came to be: that by PostgreSQL's clock, this by that of a server.
	params := db.ForceInboxParams{Consumer: EmailConsumer, EventIds: ids, PublishedSince: oldest.Add(-clocksApart)}
	for _, id := range ids {
		params.ReplayedAts = append(params.ReplayedAts, forced[id])
	}
	return q.ForceInbox(ctx, params)
}

// forcedOf returns the tasks' events that are forced, and when, and of when the oldest of them is.
func forcedOf(tasks []*task) (forced map[uuid.UUID]time.Time, oldest time.Time) {
	forced = map[uuid.UUID]time.Time{}
	for _, t := range tasks {
		if t.forced.IsZero() {
			continue
		}
		if len(forced) == 0 || t.born.Before(oldest) {
			oldest = t.born
		}
		forced[t.mail.EventID] = t.forced
	}
	return forced, oldest
}
