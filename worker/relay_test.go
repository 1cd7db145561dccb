package worker

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"idempotent-orders/broker"
	"idempotent-orders/gen/api"
	"idempotent-orders/gen/db"
)

func TestTheRelayPublishesInTheOrderOfTheOutbox(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(3)
	// Beyond one batch; placing each would take long.
	_, err := b.pool.Exec(t.Context(), `INSERT INTO outbox (event_id, aggregate_id, event_type, source, payload)
		SELECT gen_random_uuid(), gen_random_uuid(), 'order.created.v1', '/orders', '{}' FROM generate_series(1, $1)`, relayBatch)
	if err != nil {
		t.Fatal(err)
	}
	var want []uuid.UUID
	rows, err := b.pool.Query(t.Context(), "SELECT aggregate_id FROM outbox ORDER BY id")
	if err != nil {
		t.Fatal(err)
	}
	for rows.Next() {
		var id uuid.UUID
		if err := rows.Scan(&id); err != nil {
			t.Fatal(err)
		}
		want = append(want, id)
	}
	if !slices.Equal(want[:3], orders) {
		t.Fatal("the outbox is not in the order of placing")
	}
	relay := b.relay(b.broker)
	b.mustRun(relay, relayBatch)
	b.mustRun(relay, 3)
	b.mustRun(relay, 0)
	if !slices.Equal(b.published(), want) {
		t.Error("the stream is not in the order of the outbox")
	}
	if n := b.count("SELECT count(*) FROM outbox_published WHERE published_at IS NOT NULL"); n != relayBatch+3 {
		t.Errorf("the archive has %d events", n)
	}
	if n := b.count("SELECT count(*) FROM outbox_published_default"); n != 0 {
		t.Errorf("%d events are in no day's partition", n)
	}
}

func TestTheEventOnTheStreamIsWhatTheContractSays(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	id := b.place(1)[0]
	b.mustRun(b.relay(b.broker), 1)
	entries, err := b.redis.XRange(t.Context(), broker.Stream, "-", "+").Result()
	if err != nil || len(entries) != 1 {
		t.Fatal(entries, err)
	}
	// One field an attribute: put together, they are the schema's object.
	object := map[string]any{}
	for name, value := range entries[0].Values {
		object[name] = value
	}
	var data any
	if err := json.Unmarshal([]byte(object["data"].(string)), &data); err != nil {
		t.Fatal(err)
	}
	object["data"] = data
	spec, err := api.GetSpec()
	if err != nil {
		t.Fatal(err)
	}
	schema := spec.Components.Schemas["OrderCreatedV1"].Value
	if err := schema.VisitJSON(object); err != nil {
		t.Errorf("%v is not what openapi.yaml describes: %v", object, err)
	}
	for name := range object {
		if schema.Properties[name] == nil {
			t.Errorf("openapi.yaml does not name %s", name)
		}
	}
	encoded, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	var event api.OrderCreatedV1
	if err := json.Unmarshal(encoded, &event); err != nil {
		t.Fatal(err)
	}
	if event.Subject != id || event.Data.OrderId != id || event.Id.Version() != 7 || !event.Time.Equal(event.Data.CreatedAt) {
		t.Errorf("the event is %+v", event)
	}
}

func TestALowIDThatCommitsLateIsPublished(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	late, err := b.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer late.Rollback(context.Background())
	lateOrder := uuid.New() // placed an hour ago, by a transaction that hangs
	_, err = late.Exec(t.Context(), `WITH placed AS (
			INSERT INTO orders (id, caller, user_id, amount, created_at) VALUES ($1, 'anonymous', 'user-456', 1, now() - interval '1 hour') RETURNING *
		), announced AS (
			INSERT INTO outbox (event_id, aggregate_id, event_type, source, payload, created_at)
			SELECT gen_random_uuid(), id, 'order.created.v1', '/orders',
				json_build_object('order_id', id, 'user_id', user_id, 'amount', amount, 'created_at', created_at), created_at FROM placed
		)
		INSERT INTO idempotency_keys (digest, caller, operation, key, fingerprint, order_id, expires_at)
		SELECT idempotency_digest(caller, 'PlaceOrder', 'late'), caller, 'PlaceOrder', 'late', sha256(''), id, now() + interval '1 hour' FROM placed`, lateOrder)
	if err != nil {
		t.Fatal(err)
	}
	early := b.place(2) // later ids, committed first
	relay := b.relay(b.broker)
	b.mustRun(relay, 2)
	for range 5 { // time to raise the floor, if it could be raised
		b.mustRun(relay, 0)
	}
	if err := late.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n, err := relay.runOnce(t.Context()); err != nil || n != 1 {
		t.Fatalf("the low id is committed, and the relay published %d, %v; want 1", n, err)
	}
	orders := append(early, lateOrder)
	if got := b.published(); !slices.Equal(got, orders) {
		t.Errorf("published %v; want %v", got, orders)
	}
	b.drain(relay, b.consumer("one", b.mails))
	b.settled(orders)
	b.reconciled(0)
}

func TestUnderAnOldSnapshotAPollDoesNotWalkOverWhatWasPublished(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	old, err := b.pool.BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if err != nil {
		t.Fatal(err)
	}
	defer old.Rollback(context.Background())
	if _, err := old.Exec(t.Context(), "SELECT FROM orders"); err != nil { // takes the snapshot
		t.Fatal(err)
	}
	const events = 3000
	b.fill(events)
	relay, other := b.relay(b.broker), b.relay(b.broker)
	if err := relay.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, r := range []*Relay{relay, other} { // also one that has claimed nothing itself
		for range 3 {
			b.mustRun(r, 0)
		}
		var walked int
		tx, err := b.pool.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		before := "SELECT pg_stat_get_xact_tuples_returned('outbox_pkey'::regclass)"
		var at int
		if err := tx.QueryRow(t.Context(), before).Scan(&at); err != nil {
			t.Fatal(err)
		}
		if _, err := db.New(tx).ClaimOutboxBatch(t.Context(), db.ClaimOutboxBatchParams{Floor: r.floor.get(), Epoch: r.epoch, BatchSize: 1000}); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(tx.QueryRow(t.Context(), before).Scan(&walked), tx.Rollback(t.Context())); err != nil || walked-at > 10 {
			t.Errorf("with the floor at %d a poll walked over %d entries, %v", r.floor.get(), walked-at, err)
		}
	}
	b.place(1)
	b.mustRun(other, 1)
}

// Somebody holds a low id for long. Meanwhile a poll walks over nothing, and afterwards the id is published at once, without a look.
func TestWhoWritesForLongNeitherKeepsTheFloorDownNorIsForgotten(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	late, err := b.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer late.Rollback(context.Background())
	lateOrder := uuid.New()
	if _, err := late.Exec(t.Context(), `INSERT INTO outbox (event_id, aggregate_id, event_type, source, payload)
		VALUES (gen_random_uuid(), $1, 'order.created.v1', '/orders', '{}')`, lateOrder); err != nil {
		t.Fatal(err)
	}
	relay := b.relay(b.broker)
	relay.floor.patience = 0
	b.fill(10)
	b.mustRun(relay, 10)
	for range 2 {
		b.mustRun(relay, 0)
	}
	if at := relay.floor.get(); at < 11 {
		t.Errorf("the floor is %d, and a poll walks over everything above that", at)
	}
	if err := late.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.announce(lateOrder, "second")
	b.mustRun(relay, 0) // finds that it has ended
	b.mustRun(relay, 2)
	b.inOrder(lateOrder)
}

func TestTheFloorRisesOnlyInRoundsThatAskWhoWrites(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	relay := b.relay(b.broker)
	relay.surveyEvery = time.Hour
	b.fill(10)
	b.mustRun(relay, 10) // the first asks
	for range 5 {
		b.mustRun(relay, 0)
	}
	if at := relay.floor.get(); at != 0 {
		t.Errorf("nobody asked who writes, and the floor is %d", at)
	}
	relay.surveyEvery = 0
	for range 2 {
		b.mustRun(relay, 0)
	}
	if at := relay.floor.get(); at == 0 {
		t.Error("nobody writes, and the floor does not rise")
	}
}

func TestAnEventBelowTheFloorIsFound(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	relay := b.relay(b.broker)
	b.fill(1)
	locked, err := b.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer locked.Rollback(context.Background())
	if _, err := locked.Exec(t.Context(), "SELECT FROM outbox FOR NO KEY UPDATE"); err != nil {
		t.Fatal(err)
	}
	for relay.floor.get() == 0 { // the claim skips what somebody has locked
		b.mustRun(relay, 0)
	}
	if err := locked.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.mustRun(relay, 0)
	relay.look(t.Context())
	b.mustRun(relay, 1)
	if !strings.Contains(b.log.String(), "left behind") {
		t.Errorf("nobody was told: %s", b.log)
	}
}

func TestTheFloorNeverPassesWhatAFullBatchLeft(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	relay := b.relay(b.broker)
	b.fill(relayBatch*7 + 1)
	for range 7 {
		b.mustRun(relay, relayBatch)
	}
	b.mustRun(relay, 1)
}

func TestABatchThatWasNotPublishedIsStillThere(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(2)
	outage := errors.New("the broker is away")
	broken := b.relay(publisher(func(context.Context, []broker.Event) error { return outage }))
	for range 3 {
		if n, err := broken.runOnce(t.Context()); n != 0 || !errors.Is(err, outage) {
			t.Fatalf("published %d, %v", n, err)
		}
	}
	if n := b.count("SELECT count(*) FROM outbox"); n != 2 {
		t.Errorf("%d events are in the outbox; want 2", n)
	}
	if n := b.count("SELECT count(*) FROM outbox_published"); n != 0 {
		t.Errorf("%d events are in the archive; want none", n)
	}
	b.mustRun(b.relay(b.broker), 2)
	if err := b.consumer("email", b.mails).Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.settled(orders)
}

func TestABatchThatIsPublishedTwiceIsMailedOnce(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(3)
	// The relay dies after publishing and before its commit: the events go out, and stay in the outbox.
	dies := b.relay(publisher(func(ctx context.Context, events []broker.Event) error {
		return errors.Join(b.broker.Publish(ctx, broker.AnyEpoch, events), errors.New("killed"))
	}))
	if _, err := dies.runOnce(t.Context()); err == nil {
		t.Fatal("the relay lived")
	}
	b.mustRun(b.relay(b.broker), 3)
	if n := len(b.published()); n != 6 {
		t.Fatalf("the stream has %d entries; want each event twice", n)
	}
	for _, limit := range []string{"email", "another"} {
		if err := b.consumer(limit, b.mails).Drain(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	b.settled(orders)
	b.reconciled(0)
}

func TestARelayDoesNotWaitForEverForASilentPostgreSQL(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(1)
	silence, err := b.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer silence.Rollback(context.Background())
	if _, err := silence.Exec(t.Context(), "LOCK TABLE outbox"); err != nil {
		t.Fatal(err)
	}
	relay := b.relay(b.broker)
	relay.timeout = 100 * time.Millisecond
	if n, err := relay.runOnce(t.Context()); n != 0 || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("published %d, %v; want the deadline", n, err)
	}
	if err := silence.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	relay.timeout = time.Minute
	b.eventually("PostgreSQL has noticed too, and the turn is free", func() bool {
		n, err := relay.runOnce(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return n == 1
	})
	if got := b.published(); !slices.Equal(got, orders) {
		t.Errorf("published %v; want %v", got, orders)
	}
}

// Two relays: one stalls in its turn, the other takes over when PostgreSQL ends the stalled one, which then wakes up.
func TestARelayThatStallsInItsTurnLosesAndSkipsNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(3)
	claimed, wake := make(chan struct{}), make(chan struct{})
	stalled := b.relay(publisher(func(ctx context.Context, events []broker.Event) error {
		close(claimed)
		<-wake
		return b.broker.Publish(context.WithoutCancel(ctx), broker.AnyEpoch, events)
	}))
	stalled.stallTimeout = 200 * time.Millisecond
	outcome := make(chan error, 1)
	go func() {
		_, err := stalled.runOnce(t.Context())
		outcome <- err
	}()
	<-claimed

	other := b.relay(b.broker)
	b.mustRun(other, 0) // not its turn
	more := b.place(2)
	b.eventually("PostgreSQL ends the stalled relay's turn", func() bool {
		n, err := other.runOnce(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return n == 5
	})
	close(wake)
	if err := <-outcome; err == nil {
		t.Error("the stalled relay believes that it committed")
	}
	b.mustRun(other, 0)
	orders = append(orders, more...)
	if got := b.published()[:5]; !slices.Equal(got, orders) {
		t.Errorf("published %v; want %v", got, orders)
	}
	if err := b.consumer("email", b.mails).Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.settled(orders)
	b.reconciled(0)
}

func TestManyRelaysShareTheWork(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for range 8 {
		b.start(b.relay(b.broker).Run)
	}
	orders := b.place(100)
	b.eventually("the outbox is empty", func() bool { return b.count("SELECT count(*) FROM outbox") == 0 })
	if got := b.published(); !slices.Equal(got, orders) {
		t.Errorf("published %d events, or not in order; want %d", len(got), len(orders))
	}
}

func TestANudgedRelayDoesNotWaitForItsPoll(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	idle := backoff{least: time.Hour, most: time.Hour}
	relay := b.relay(b.broker)
	relay.Nudge()
	relay.Nudge() // never blocks
	if !idle.wait(t.Context(), relay.nudged) {
		t.Error("the wait was given up")
	}
}

func TestHintsReachRelaysOfOtherProcesses(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	heard := make(chan struct{}, 100)
	b.start(func(ctx context.Context) { broker.OnHint(ctx, b.redis, func() { heard <- struct{}{} }) })
	hint := broker.NewHint(b.redis)
	b.start(hint.Run)
	b.eventually("a hint is heard", func() bool {
		hint.Give()
		select {
		case <-heard:
			return true
		default:
			return false
		}
	})
}

func TestARelayWithoutRedisTriesAgainAndSaysSoOnce(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.server.Kill()
	orders := b.place(2)
	stop := b.start(b.relay(b.broker).Run)
	b.start(b.consumer("email", b.mails).Run)
	b.eventually("the relay says so", func() bool { return strings.Contains(b.log.String(), "Publishing outbox events fails") })
	b.server.Start()
	b.eventually("the mails are sent", func() bool { return len(b.mails.orders()) == 2 })
	b.eventually("they are marked and acknowledged", func() bool {
		p, err := b.redis.XPending(t.Context(), broker.Stream, EmailConsumer).Result()
		return err == nil && p.Count == 0 && b.count("SELECT count(*) FROM inbox WHERE state = 'sent'") == 2
	})
	stop()
	b.settled(orders)
	if n := strings.Count(b.log.String(), "Publishing outbox events fails"); n != 1 {
		t.Errorf("the relay said it %d times", n)
	}
	if !strings.Contains(b.log.String(), "Publishing outbox events works again") {
		t.Error("the relay does not say that it works again")
	}
}

func TestWhileOneRelayHasTheTurnAnotherPublishesNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(1)
	publishing, goOn := make(chan struct{}), make(chan struct{})
	first := b.relay(publisher(func(ctx context.Context, events []broker.Event) error {
		close(publishing)
		<-goOn
		return b.broker.Publish(ctx, broker.AnyEpoch, events)
	}))
	release := sync.OnceFunc(func() { close(goOn) })
	t.Cleanup(release)
	ended := make(chan error, 1)
	go func() { _, err := first.runOnce(t.Context()); ended <- err }()
	<-publishing
	orders = append(orders, b.place(1)...)
	if n, err := b.relay(b.broker).runOnce(t.Context()); err != nil || n != 0 {
		t.Fatalf("one relay has the turn, and another published %d, %v; want 0", n, err)
	}
	release()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	b.mustRun(b.relay(b.broker), 1)
	if got := b.published(); !slices.Equal(got, orders) {
		t.Errorf("published %v; want %v", got, orders)
	}
}
