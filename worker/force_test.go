package worker

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/uuid"

	"idempotent-orders/broker"
	"idempotent-orders/gen/db"
	"idempotent-orders/operate"
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
		if err := force(t.Context(), db.New(b.pool), forced, replayed); err != nil {
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

// All of it was finished once, and the mark has passed it.
func TestWhatWasForcedIsMailedThoughRedisForgetsItHalfway(t *testing.T) {
	t.Parallel()
	for _, dies := range []bool{false, true} { // else it gives back what it has
		t.Run(fmt.Sprintf("its consumer dies: %t", dies), func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			relay := b.relay(b.broker)
			b.place(3)
			b.drain(relay, b.consumer("one", b.mails))
			b.exec("UPDATE outbox_published SET published_at = published_at - interval '2 hours', created_at = created_at - interval '2 hours'")
			b.mustSweep(b.sweeper())
			if n := b.count("SELECT count(*) FROM relay_state WHERE finished_to > now() - interval '2 minutes'"); n != 1 {
				t.Fatal("the mark has not passed what is finished")
			}
			operator := operate.Operator{Pool: b.pool, Publisher: b.broker}
			all := operate.Range{From: time.Now().Add(-3 * time.Hour), To: time.Now()}
			if outcome, _, err := operator.Replay(t.Context(), all, broker.Forced); err != nil || outcome.Done != 3 {
				t.Fatal(outcome, err)
			}
			halfway := b.consumer("halfway", sender(func(context.Context, Email) error { return errors.New("not now") }))
			if dies {
				deliveries, err := halfway.subscription.Receive(t.Context(), 100, 0)
				if err != nil {
					t.Fatal(err)
				}
				tasks, _ := halfway.read(t.Context(), deliveries)
				if mine, _, err := halfway.enter(t.Context(), tasks); err != nil || len(mine) != 3 {
					t.Fatal(mine, err)
				}
				b.exec("UPDATE inbox SET received_at = 'epoch' WHERE state = 'received'")
			} else if err := halfway.Drain(t.Context()); err != nil {
				t.Fatal(err)
			}
			b.redis.FlushAll(t.Context())
			relay.checked = time.Time{}
			b.drain(relay, b.consumer("two", b.mails))
			if n := len(b.mails.orders()); n != 6 {
				t.Errorf("%d mails were sent; want two for each of 3 orders", n)
			}
			b.reconciled(0)
		})
	}
}
