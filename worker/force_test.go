package worker

import (
	"testing"
	"time"

	"github.com/google/uuid"

	"idempotent-orders/broker"
	"idempotent-orders/gen/db"
)

func TestOnlyWhatWasFinishedBeforeItWasForcedIsOpenedAgain(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	forced := map[uuid.UUID]time.Time{}
	replayed := time.Now().Truncate(time.Microsecond)
	enter := func(state string, finished any, reason any) {
		id := uuid.New()
		_, err := b.pool.Exec(t.Context(), "INSERT INTO inbox (consumer, event_id, state, holder, finished_at, reason) VALUES ('email', $1, $2, $1, $3, $4)",
			id, state, finished, reason)
		if err != nil {
			t.Fatal(err)
		}
		forced[id] = forcedAt(broker.Event{Replay: broker.Forced, ReplayedAt: replayed})
	}
	enter("sent", replayed.Add(-time.Second), nil)
	enter("dead", replayed.Add(-time.Second), "no mailbox")
	enter("received", nil, nil)                   // somebody is sending it
	enter("sent", replayed.Add(time.Second), nil) // it was mailed since
	for range 2 {                                 // the second finds nothing more to open
		if err := force(t.Context(), db.New(b.pool), forced); err != nil {
			t.Fatal(err)
		}
		if n := b.count("SELECT count(*) FROM inbox WHERE state = 'received' AND received_at = 'epoch'"); n != 2 {
			t.Errorf("%d are open again; want 2", n)
		}
		if n := b.count("SELECT count(*) FROM inbox WHERE state = 'sent' AND finished_at > $1 OR state = 'received' AND received_at > 'epoch'", replayed); n != 2 {
			t.Errorf("%d are as they were; want 2", n)
		}
	}
	if at := forcedAt(broker.Event{Replay: broker.Replayed, ReplayedAt: replayed}); !at.IsZero() {
		t.Errorf("a replay that is not forced is forced at %s", at)
	}
}
