package worker

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/broker"
	"idempotent-orders/gen/api"
	"idempotent-orders/operate"
	"idempotent-orders/reconcile"
)

// counted counts what a subscription receives.
type counted struct {
	broker.Counting
	received atomic.Int64
}

func (c *counted) Receive(ctx context.Context, limit int, wait time.Duration) ([]broker.Delivery, error) {
	deliveries, err := c.Counting.Receive(ctx, limit, wait)
	c.received.Add(int64(len(deliveries)))
	return deliveries, err
}

func (b *bench) pubSub() *broker.RedisPubSub {
	return broker.NewRedisPubSub(b.redis, slog.New(slog.NewTextHandler(b.log, nil)))
}

// listener returns a consumer that listens, and what counts its deliveries.
func (b *bench) listener(pubSub *broker.RedisPubSub) (*Consumer, *counted) {
	b.t.Helper()
	subscription, err := pubSub.Subscribe(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	c := &counted{Counting: subscription}
	return NewConsumer(b.pool, c, b.mails, AbandonedAfter, slog.New(slog.NewTextHandler(b.log, nil))), c
}

func TestPubSubAnOrderIsMailedOnceThoughEveryConsumerReceivesIt(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	pubSub := b.pubSub()
	one, toOne := b.listener(pubSub)
	two, toTwo := b.listener(pubSub)
	b.start(one.Run)
	b.start(two.Run)
	relay := b.relay(pubSub)
	b.start(relay.Run)
	orders := b.place(50)
	relay.Nudge()
	b.eventually("both received everything", func() bool { return toOne.received.Load() == 50 && toTwo.received.Load() == 50 })
	b.eventually("every mail is marked", func() bool { return b.count("SELECT count(*) FROM inbox WHERE state = 'sent'") == 50 })
	if !sameSet(b.mails.orders(), slices.Clone(orders)) {
		t.Errorf("%d mails were sent for %d orders", len(b.mails.orders()), len(orders))
	}
}

func TestPubSubTheMessageIsWhatTheContractSays(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	line := b.redis.Subscribe(t.Context(), broker.Channel)
	t.Cleanup(func() { line.Close() })
	if _, err := line.Receive(t.Context()); err != nil { // that it listens
		t.Fatal(err)
	}
	id := b.place(1)[0]
	b.mustRun(b.relay(b.pubSub()), 1)
	reply, err := line.Receive(t.Context())
	message, ok := reply.(*redis.Message)
	if err != nil || !ok {
		t.Fatal(reply, err)
	}
	var object map[string]any
	if err := json.Unmarshal([]byte(message.Payload), &object); err != nil {
		t.Fatal(err)
	}
	spec, err := api.GetSpec()
	if err != nil {
		t.Fatal(err)
	}
	schema := spec.Components.Schemas["OrderCreatedV1"].Value
	if err := schema.VisitJSON(object); err != nil {
		t.Errorf("%s is not what openapi.yaml describes: %v", message.Payload, err)
	}
	for name := range object {
		if schema.Properties[name] == nil {
			t.Errorf("openapi.yaml does not name %s", name)
		}
	}
	var event api.OrderCreatedV1
	if err := json.Unmarshal([]byte(message.Payload), &event); err != nil {
		t.Fatal(err)
	}
	if event.Subject != id || event.Data.OrderId != id || event.Id.Version() != 7 || !event.Time.Equal(event.Data.CreatedAt) {
		t.Errorf("the event is %+v", event)
	}
}

func TestPubSubWhatAConsumerHoldsWhenItStopsIsDrained(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	pubSub := b.pubSub()
	consumer, _ := b.listener(pubSub)
	var away atomic.Bool
	var refused atomic.Int64
	away.Store(true)
	consumer.sender = sender(func(ctx context.Context, mail Email) error {
		if away.Load() {
			refused.Add(1)
			return errors.New("the mail server is away")
		}
		return b.mails.Send(ctx, mail)
	})
	orders := b.place(5)
	b.mustRun(b.relay(pubSub), 5)
	stop := b.start(consumer.Run)
	b.eventually("every mail failed", func() bool { return refused.Load() >= 5 })
	stop()
	away.Store(false)
	if err := consumer.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !sameSet(b.mails.orders(), slices.Clone(orders)) {
		t.Errorf("%d mails were sent for %d orders", len(b.mails.orders()), len(orders))
	}
}

func TestPubSubWhatAConsumerDoesNotFinishIsFinishedByAnotherThatReceivedItToo(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	pubSub := b.pubSub()
	hung, _ := b.listener(pubSub)
	heir, _ := b.listener(pubSub)
	heir.abandonedAfter = 100 * time.Millisecond
	sending := make(chan struct{}, 5)
	hung.sender = sender(func(ctx context.Context, _ Email) error {
		sending <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	})
	orders := b.place(5)
	b.mustRun(b.relay(pubSub), 5)
	b.start(hung.Run)
	for range orders {
		<-sending
	}
	b.start(heir.Run)
	b.eventually("every mail is sent", func() bool { return len(b.mails.orders()) == 5 })
	if !sameSet(b.mails.orders(), slices.Clone(orders)) {
		t.Errorf("mails were sent for %v; want %v", b.mails.orders(), orders)
	}
}

// What the documentation says is lost is lost, and no relay brings it back by itself; but the archive has it, and reconcile finds it.
func TestPubSubAnOrderOfWhichNobodyHeardIsFoundByReconcileAndMailedOnlyWhenItIsReplayed(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	pubSub := b.pubSub()
	unheard := b.place(3)
	b.mustRun(b.relay(pubSub), len(unheard))
	consumer, received := b.listener(pubSub)
	heard := b.place(2)
	b.mustRun(b.relay(pubSub), len(heard)) // a relay that starts anew
	if err := consumer.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := b.mails.orders(); !sameSet(got, slices.Clone(heard)) || received.received.Load() != 2 {
		t.Errorf("mails were sent for %v, after %d deliveries; want %v", got, received.received.Load(), heard)
	}
	b.exec("UPDATE outbox_published SET published_at = now() - interval '1 hour'") // long enough ago to have been delivered
	report, err := reconcile.Run(t.Context(), b.pool, reconcile.Options{Consumer: EmailConsumer, KeyRetention: time.Hour})
	if err != nil || report.Orders != 5 || report.Sent != 2 || report.Missing != 3 || report.Unfinished != 0 || report.Dead != 0 {
		t.Errorf("before the replay reconcile finds %+v, %v; want the three of which nobody heard, and nothing else", report, err)
	}
	var lost []uuid.UUID
	if err := b.pool.QueryRow(t.Context(), "SELECT array_agg(event_id) FROM outbox_published WHERE aggregate_id = ANY($1)", unheard).Scan(&lost); err != nil {
		t.Fatal(err)
	}
	for _, d := range report.Differences {
		if d.Count > 0 && !(d.Name == "events_not_delivered" && sameSet(d.First, lost)) {
			t.Errorf("it finds %+v; want the events %v", d, lost)
		}
	}
	operator := operate.Operator{Pool: b.pool, Publisher: pubSub, Who: "a test", What: "replay"}
	everything := operate.Range{To: time.Now().Add(time.Hour)}
	if outcome, _, err := operator.Replay(t.Context(), everything, broker.Replayed); err != nil || outcome.Done != 5 {
		t.Fatal(outcome, err)
	}
	if err := consumer.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, want := b.mails.orders(), slices.Concat(unheard, heard); !sameSet(got, want) {
		t.Errorf("after the replay mails were sent for %v; want one for each of %v", got, want)
	}
	b.finished(5)
	b.reconciled(0)
}
