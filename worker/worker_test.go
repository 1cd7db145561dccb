package worker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/broker"
	"idempotent-orders/gen/api"
	"idempotent-orders/gen/db"
	"idempotent-orders/idempotency"
	"idempotent-orders/internal/connect"
	"idempotent-orders/internal/local"
	"idempotent-orders/internal/testenv"
	"idempotent-orders/order"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// bench is a database and a Redis, with what the tests do to them.
type bench struct {
	t      testing.TB
	pool   *pgxpool.Pool
	redis  redis.UniversalClient
	server *testenv.RedisServer
	broker *broker.RedisStreams
	orders *order.Store
	mails  *mailbox
	log    *syncBuffer
}

func newBench(t testing.TB) *bench {
	pool := testenv.Database(t)
	rdb, server := testenv.Redis(t)
	streams := broker.NewRedisStreams(rdb)
	if _, err := streams.Epoch(t.Context()); err != nil { // makes the stream
		t.Fatal(err)
	}
	return &bench{
		t: t, pool: pool, redis: rdb, server: server, broker: streams,
		orders: order.NewStore(pool, time.Hour, nil), mails: &mailbox{}, log: &syncBuffer{},
	}
}

// place places n orders and returns their ids in the order of the outbox.
func (b *bench) place(n int) []uuid.UUID {
	b.t.Helper()
	ids := make([]uuid.UUID, n)
	for i := range ids {
		placed, err := b.orders.Place(order.Send{
			Key:   idempotency.Key{Caller: "anonymous", Operation: order.Operation, Value: uuid.NewString()},
			Draft: order.Draft{UserID: "user-456", Amount: int64(i + 1)},
		})
		if err != nil {
			b.t.Fatal(err)
		}
		ids[i] = placed.OrderID
	}
	return ids
}

// fill writes n events of orders that do not exist into the outbox.
func (b *bench) fill(n int) {
	b.t.Helper()
	_, err := b.pool.Exec(b.t.Context(), `INSERT INTO outbox (event_id, aggregate_id, event_type, source, payload)
		SELECT gen_random_uuid(), id, 'order.created.v1', '/orders',
			json_build_object('order_id', id, 'user_id', 'user-456', 'amount', 1000, 'created_at', '2026-01-02T03:04:05.678901Z')
		FROM (SELECT gen_random_uuid() AS id FROM generate_series(1, $1)) AS an_order`, n)
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) logger() *slog.Logger { return slog.New(slog.NewTextHandler(b.log, nil)) }

func (b *bench) relay(p broker.Publisher) *Relay { return NewRelay(b.pool, p, b.logger()) }

// consumer returns a consumer of its own name whose events are abandoned almost at once when it dies.
func (b *bench) consumer(name string, sender Sender) *Consumer {
	const abandonedAfter = 100 * time.Millisecond
	return NewConsumer(b.pool, b.broker.Subscribe(EmailConsumer, name, abandonedAfter), sender, abandonedAfter,
		slog.New(slog.NewTextHandler(b.log, nil)))
}

// mustRun does one round of the relay and checks how many events it published.
func (b *bench) mustRun(r *Relay, want int) {
	b.t.Helper()
	if got, err := r.runOnce(b.t.Context()); err != nil || got != want {
		b.t.Fatalf("the relay published %d, %v; want %d", got, err, want)
	}
}

// published returns the subjects of the stream, in its order.
func (b *bench) published() []uuid.UUID {
	b.t.Helper()
	entries, err := b.redis.XRange(b.t.Context(), broker.Stream, "-", "+").Result()
	if err != nil {
		b.t.Fatal(err)
	}
	var subjects []uuid.UUID
	for _, e := range entries {
		subjects = append(subjects, uuid.MustParse(e.Values["subject"].(string)))
	}
	return subjects
}

// count returns the result of a query for one number.
func (b *bench) count(query string, args ...any) int {
	b.t.Helper()
	var n int
	if err := b.pool.QueryRow(b.t.Context(), query, args...).Scan(&n); err != nil {
		b.t.Fatal(err)
	}
	return n
}

// settled checks that every order is announced and mailed once, and that nothing is left to do.
func (b *bench) settled(orders []uuid.UUID) {
	b.t.Helper()
	if n := b.count("SELECT count(*) FROM outbox"); n != 0 {
		b.t.Errorf("%d events are left in the outbox", n)
	}
	if n := b.count("SELECT count(DISTINCT event_id) FROM outbox_published"); n != len(orders) {
		b.t.Errorf("%d events are in the archive; want %d", n, len(orders))
	}
	if n := b.count("SELECT count(*) FROM inbox WHERE consumer = 'email' AND state = 'sent'"); n != len(orders) {
		b.t.Errorf("%d events are sent in the inbox; want %d", n, len(orders))
	}
	if got, want := b.mails.orders(), slices.Clone(orders); !sameSet(got, want) {
		b.t.Errorf("mails were sent for %d orders %v; want one for each of %d", len(got), got, len(want))
	}
	pending, err := b.redis.XPending(b.t.Context(), broker.Stream, EmailConsumer).Result()
	if err != nil || pending.Count != 0 {
		b.t.Errorf("%v deliveries are not acknowledged, %v", pending, err)
	}
}

func sameSet(a, b []uuid.UUID) bool {
	compare := func(x, y uuid.UUID) int { return bytes.Compare(x[:], y[:]) }
	slices.SortFunc(a, compare)
	slices.SortFunc(b, compare)
	return slices.Equal(a, b)
}

// eventually asks again and again until what is expected holds.
func (b *bench) eventually(what string, holds func() bool) {
	b.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !holds() {
		if time.Now().After(deadline) {
			b.t.Fatalf("not within 20 s: %s\n%s", what, b.log)
		}
		select {
		case <-b.t.Context().Done():
		case <-time.After(time.Millisecond):
		}
	}
}

// start runs a loop until the test ends or the returned function is called, which waits for its end.
func (b *bench) start(run func(context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); run(ctx) }()
	stop = func() { cancel(); <-ended }
	b.t.Cleanup(stop)
	return stop
}

// mailbox is a sender that keeps what it is given.
type mailbox struct {
	mu    sync.Mutex
	mails []Email
}

func (m *mailbox) Send(_ context.Context, mail Email) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mails = append(m.mails, mail)
	return nil
}

func (m *mailbox) orders() []uuid.UUID {
	m.mu.Lock()
	defer m.mu.Unlock()
	var ids []uuid.UUID
	for _, mail := range m.mails {
		ids = append(ids, mail.OrderID)
	}
	return ids
}

// sender is a function that sends.
type sender func(context.Context, Email) error

func (s sender) Send(ctx context.Context, mail Email) error { return s(ctx, mail) }

// publisher is a function that publishes.
type publisher func(context.Context, []broker.Event) error

func (p publisher) Publish(ctx context.Context, events []broker.Event) error { return p(ctx, events) }
func (p publisher) Epoch(context.Context) (string, error)                    { return "", nil }

type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func TestAnOrderIsAnnouncedAndMailedOnce(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	relay := b.relay(b.broker)
	b.start(relay.Run)
	b.start(b.consumer("one", b.mails).Run)
	b.start(b.consumer("two", b.mails).Run)
	orders := b.place(50)
	relay.Nudge()
	b.eventually("every mail is marked", func() bool { return b.count("SELECT count(*) FROM inbox WHERE state = 'sent'") == 50 })
	b.eventually("every delivery is acknowledged", func() bool {
		p, err := b.redis.XPending(t.Context(), broker.Stream, EmailConsumer).Result()
		return err == nil && p.Count == 0
	})
	b.settled(orders)
	if mail := b.mails.mails[0]; mail.UserID != "user-456" || mail.Amount < 1 || mail.EventID == uuid.Nil {
		t.Errorf("the mail is %+v", mail)
	}
}

func TestWithoutARedisServerARedisInProcessDoes(t *testing.T) {
	t.Parallel()
	addr, stop, err := local.StartMiniredis()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	rdb := connect.Redis([]string{addr}, "")
	t.Cleanup(func() { rdb.Close() })
	b := &bench{t: t, pool: testenv.Database(t), redis: rdb, broker: broker.NewRedisStreams(rdb), mails: &mailbox{}, log: &syncBuffer{}}
	b.orders = order.NewStore(b.pool, time.Hour, nil)
	guard := idempotency.NewGuard(rdb, time.Hour, slog.New(slog.DiscardHandler))
	send := order.Send{Key: idempotency.Key{Caller: "anonymous", Operation: order.Operation, Value: "k"}, Draft: order.Draft{UserID: "u", Amount: 1}}
	var orders []uuid.UUID
	for _, replayed := range []bool{false, true} {
		placed, err := idempotency.Once(t.Context(), t.Context(), guard, idempotency.Send[order.Placement]{
			Key:   send.Key,
			Find:  func() (order.Placement, error) { return b.orders.Find(send) },
			Place: func() (order.Placement, error) { return b.orders.Place(send) },
		})
		if err != nil || placed.Replayed != replayed {
			t.Fatalf("%+v, %v; want a replay: %t", placed, err, replayed)
		}
		orders = []uuid.UUID{placed.OrderID}
	}
	if marks, err := rdb.Keys(t.Context(), "idempotency:*").Result(); err != nil || len(marks) != 1 {
		t.Errorf("the scripts left %v, %v", marks, err)
	}
	orders = append(orders, b.place(5)...)
	if err := b.relay(b.broker).Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	received, err := b.consumer("dead", b.mails).subscription.Receive(t.Context(), 2, 0)
	if err != nil || len(received) != 2 {
		t.Fatal(received, err)
	}
	heir := b.consumer("heir", b.mails)
	b.start(heir.Run)
	b.eventually("every delivery is acknowledged", func() bool {
		p, err := rdb.XPending(t.Context(), broker.Stream, EmailConsumer).Result()
		return err == nil && p.Count == 0 && len(b.mails.orders()) == len(orders)
	})
	b.settled(orders)
}

func TestAnOrderPlacedWhileTheConsumerIsDownIsMailedWhenItReturns(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	stop := b.start(b.consumer("email", b.mails).Run)
	b.eventually("the group exists", func() bool { return b.redis.XInfoGroups(t.Context(), broker.Stream).Err() == nil })
	stop()
	orders := b.place(3)
	b.mustRun(b.relay(b.broker), 3)
	if len(b.mails.orders()) != 0 {
		t.Fatal("somebody sent mails")
	}
	if err := b.consumer("email", b.mails).Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.settled(orders)
}

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
	lateOrder := uuid.New()
	_, err = late.Exec(t.Context(), `INSERT INTO outbox (event_id, aggregate_id, event_type, source, payload)
		VALUES (gen_random_uuid(), $1, 'order.created.v1', '/orders', '{}')`, lateOrder)
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
	b.mustRun(relay, 1)
	if got, want := b.published(), append(early, lateOrder); !slices.Equal(got, want) {
		t.Errorf("published %v; want %v", got, want)
	}
	if n := b.count("SELECT count(*) FROM outbox"); n != 0 {
		t.Errorf("%d events are left", n)
	}
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
		if _, err := db.New(tx).ClaimOutboxBatch(t.Context(), db.ClaimOutboxBatchParams{Floor: r.floor.get(), BatchSize: 1000}); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(tx.QueryRow(t.Context(), before).Scan(&walked), tx.Rollback(t.Context())); err != nil || walked-at > 10 {
			t.Errorf("with the floor at %d a poll walked over %d entries, %v", r.floor.get(), walked-at, err)
		}
	}
	b.place(1)
	b.mustRun(other, 1)
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
		return errors.Join(b.broker.Publish(ctx, events), errors.New("killed"))
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
}

// Two relays: one stalls in its turn, the other takes over when PostgreSQL ends the stalled one, which then wakes up.
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

func TestMakingAPartitionDoesNotStandInTheWayOfPublishing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	if _, err := b.pool.Exec(t.Context(), "DROP TABLE outbox_published_"+time.Now().UTC().AddDate(0, 0, 3).Format("20060102")); err != nil {
		t.Fatal(err)
	}
	reader, err := b.pool.Begin(t.Context()) // an audit, or a dump
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Rollback(context.Background())
	if _, err := reader.Exec(t.Context(), "SELECT count(*) FROM outbox_published"); err != nil {
		t.Fatal(err)
	}
	made := make(chan error, 1)
	go func() { _, err := createPartitions(t.Context(), b.pool); made <- err }()
	b.eventually("making the partition waits for the reader", func() bool {
		return b.count("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'outbox_published_default'::regclass") == 1
	})
	if n := b.count("SELECT count(*) FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND relation = 'outbox_published'::regclass"); n != 0 {
		t.Error("it has the archive as a whole locked, and publishing waits behind it")
	}
	b.place(2)
	b.mustRun(b.relay(b.broker), 2)
	if err := <-made; err == nil || !strings.Contains(err.Error(), "lock timeout") {
		t.Errorf("it waited for the reader: %v", err)
	}
	if err := reader.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if created, err := createPartitions(t.Context(), b.pool); err != nil || created != 1 {
		t.Errorf("afterwards it made %d, %v; want 1", created, err)
	}
}

// PostgreSQL is away between a mail and its mark, for many times as long as after what a delivery counts as abandoned.
func TestAMailThatCannotBeMarkedYetIsNotSentByAnother(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(5)
	b.mustRun(b.relay(b.broker), 5)
	away, err := b.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer away.Rollback(context.Background())
	var once sync.Once
	silenced := make(chan struct{})
	b.start(b.consumer("first", sender(func(ctx context.Context, mail Email) error {
		once.Do(func() {
			if _, err := away.Exec(ctx, "LOCK TABLE inbox"); err != nil {
				t.Error(err)
			}
			close(silenced)
		})
		return b.mails.Send(ctx, mail)
	})).Run)
	<-silenced
	b.start(b.consumer("second", b.mails).Run)
	since := time.Now()
	b.eventually("a long time has passed", func() bool { return time.Since(since) > time.Second })
	held, err := b.redis.XPendingExt(t.Context(), &redis.XPendingExtArgs{Stream: broker.Stream, Group: EmailConsumer, Start: "-", End: "+", Count: 10}).Result()
	if err != nil || len(held) != 5 || slices.ContainsFunc(held, func(p redis.XPendingExt) bool { return p.Consumer != "first" }) {
		t.Errorf("another took over what the first is working on: %v, %v", held, err)
	}
	if err := away.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.eventually("every delivery is acknowledged", func() bool {
		p, err := b.redis.XPending(t.Context(), broker.Stream, EmailConsumer).Result()
		return err == nil && p.Count == 0
	})
	b.settled(orders)
}

func TestARelayThatStallsInItsTurnLosesAndSkipsNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(3)
	claimed, wake := make(chan struct{}), make(chan struct{})
	stalled := b.relay(publisher(func(ctx context.Context, events []broker.Event) error {
		close(claimed)
		<-wake
		return b.broker.Publish(context.WithoutCancel(ctx), events)
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

func TestWhatADeadConsumerHeldIsTakenOver(t *testing.T) {
	t.Parallel()
	for _, died := range []string{"before the inbox", "after the inbox", "after the mark"} {
		t.Run(died, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			orders := b.place(5)
			b.mustRun(b.relay(b.broker), 5)
			dead := b.consumer("dead", b.mails)
			// It dies: what it does after that point never happens.
			deliveries, err := dead.subscription.Receive(t.Context(), 100, 0)
			if err != nil || len(deliveries) != 5 {
				t.Fatal(deliveries, err)
			}
			tasks, _ := dead.read(t.Context(), deliveries)
			if died != "before the inbox" {
				if mine, _, err := dead.enter(t.Context(), tasks); err != nil || len(mine) != 5 {
					t.Fatal(mine, err)
				}
			}
			if died == "after the mark" {
				for _, task := range tasks {
					if err := dead.sender.Send(t.Context(), task.mail); err != nil {
						t.Fatal(err)
					}
				}
				if marked, err := dead.mark(t.Context(), tasks); err != nil || len(marked) != 5 {
					t.Fatal(marked, err)
				}
			}
			b.start(b.consumer("heir", b.mails).Run)
			b.eventually("every delivery is acknowledged", func() bool {
				p, err := b.redis.XPending(t.Context(), broker.Stream, EmailConsumer).Result()
				return err == nil && p.Count == 0
			})
			b.settled(orders)

			// The dead one was only slow, and finishes too late: it touches nothing.
			late, err := db.New(b.pool).MarkSent(t.Context(), db.MarkSentParams{Consumer: EmailConsumer, EventIds: []uuid.UUID{b.mails.mails[0].EventID}, Holder: dead.holder})
			if err != nil || len(late) != 0 {
				t.Errorf("the late finisher marked %v, %v", late, err)
			}
		})
	}
}

func TestAnEventThatAnotherHoldsIsLeftToIt(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.place(1)
	b.mustRun(b.relay(b.broker), 1)
	events, err := b.broker.Subscribe("probe", "probe", time.Hour).Receive(t.Context(), 1, 0)
	if err != nil || len(events) != 1 {
		t.Fatal(events, err)
	}
	holder := uuid.New()
	if _, err := db.New(b.pool).EnterInbox(t.Context(), db.EnterInboxParams{
		Consumer: EmailConsumer, EventIds: []uuid.UUID{events[0].Event.ID}, Holder: holder,
	}); err != nil {
		t.Fatal(err)
	}
	c := b.consumer("email", b.mails)
	c.abandonedAfter = time.Hour
	if err := c.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(b.mails.orders()) != 0 {
		t.Error("a mail that another holder is sending was sent")
	}
	p, err := b.redis.XPending(t.Context(), broker.Stream, EmailConsumer).Result()
	if err != nil || p.Count != 1 {
		t.Errorf("%v deliveries are pending, %v; want the one that is not finished", p, err)
	}
}

func TestAMailThatFailsIsSentLaterAndHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(20)
	b.mustRun(b.relay(b.broker), 20)
	var mu sync.Mutex
	failures := 0
	c := b.consumer("email", sender(func(ctx context.Context, mail Email) error {
		mu.Lock()
		defer mu.Unlock()
		if mail.OrderID == orders[7] && failures < 2 {
			failures++
			return errors.New("mailbox full")
		}
		return b.mails.Send(ctx, mail)
	}))
	if err := c.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := len(b.mails.orders()); n != 19 {
		t.Errorf("%d mails were sent at first; want 19", n)
	}
	b.start(c.Run)
	b.eventually("the last mail is sent", func() bool { return len(b.mails.orders()) == 20 })
	b.eventually("it is acknowledged", func() bool {
		p, err := b.redis.XPending(t.Context(), broker.Stream, EmailConsumer).Result()
		return err == nil && p.Count == 0
	})
	b.settled(orders)
}

func TestWhatIsNotAnEventHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(1)
	valid := []string{"specversion", "1.0", "id", uuid.NewString(), "type", "order.created.v1", "time", "2026-01-02T15:04:05Z"}
	for _, values := range [][]string{
		{"x", "y"},
		{"specversion", "1.0", "id", "not a uuid", "type", "order.created.v1", "time", "2026-01-02T15:04:05Z", "data", "{}"},
		slices.Concat(valid, []string{"data", "{"}),
		slices.Concat(valid, []string{"data", "{}"}),
		slices.Concat(valid, []string{"data", `{"order_id":"x"}`}),
		slices.Concat(valid, []string{"type", "order.cancelled.v1", "data", "{}"}),
	} {
		if err := b.redis.XAdd(t.Context(), &redis.XAddArgs{Stream: broker.Stream, Values: values}).Err(); err != nil {
			t.Fatal(err)
		}
	}
	b.mustRun(b.relay(b.broker), 1)
	if err := b.consumer("email", b.mails).Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.consumer("email", b.mails).Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.settled(orders)
	if n := strings.Count(b.log.String(), "is left in the stream"); n != 5 {
		t.Errorf("%d entries were logged; want 5\n%s", n, b.log)
	}
	if n := b.redis.XLen(t.Context(), broker.Stream).Val(); n != 7 {
		t.Errorf("the stream has %d entries; want all 7", n)
	}
}

func TestAStreamOrGroupThatIsGoneIsMadeAgain(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	relay, c := b.relay(b.broker), b.consumer("email", b.mails)
	var orders []uuid.UUID
	for _, destroy := range []func() error{
		func() error { return nil },
		func() error { return b.redis.FlushAll(t.Context()).Err() },
		func() error { return b.redis.Del(t.Context(), broker.Stream).Err() },
		func() error { return b.redis.XGroupDestroy(t.Context(), broker.Stream, EmailConsumer).Err() },
	} {
		if err := destroy(); err != nil {
			t.Fatal(err)
		}
		orders = append(orders, b.place(2)...)
		b.eventually("the events are published", func() bool { // the first attempt finds that the stream is lost
			published, err := relay.runOnce(t.Context())
			return err == nil && published == 2
		})
		b.eventually("the mails are sent", func() bool {
			if err := c.Drain(t.Context()); err != nil {
				t.Fatal(err)
			}
			return len(b.mails.orders()) == len(orders)
		})
	}
	b.settled(orders)
}

func TestAnIdleConsumerWaitsInRedisAndDoesNotSpin(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	began := time.Now()
	stop := b.start(b.consumer("email", b.mails).Run)
	b.eventually("some time has passed", func() bool { return time.Since(began) > 1500*time.Millisecond })
	stop()
	stats, err := b.redis.Info(t.Context(), "commandstats").Result()
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(stats, "cmdstat_xreadgroup:calls=")
	calls, _, _ := strings.Cut(after, ",")
	if n, err := strconv.Atoi(calls); err != nil || n < 2 || n > 6 { // one that finds no group, and one a second
		t.Errorf("an idle consumer read %q times in %s", calls, time.Since(began))
	}
}

func TestAMailInTheLogIsFourLines(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	plain := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.MessageKey {
			return a
		}
		return slog.Attr{}
	}}))
	id := uuid.New()
	if err := NewLogSender(plain).Send(t.Context(), Email{OrderID: id, UserID: "user-456\n[EMAIL] ✓ forged", Amount: 1000}); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf(`msg="[EMAIL] Sending confirmation email for Order %s"
msg="[EMAIL] -> User: user-456\\n[EMAIL] ✓ forged"
msg="[EMAIL] -> Amount: 1000"
msg="[EMAIL] ✓ Email sent successfully!"
`, id)
	if out.String() != want {
		t.Errorf("the log reads\n%s\nwant\n%s", &out, want)
	}
}

func TestPartitionsAreMadeAhead(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	partitions := func() int {
		return b.count("SELECT count(*) FROM pg_inherits WHERE inhparent = 'outbox_published'::regclass")
	}
	before := partitions()
	if _, err := b.pool.Exec(t.Context(), "DROP TABLE "+"outbox_published_"+time.Now().UTC().AddDate(0, 0, 3).Format("20060102")); err != nil {
		t.Fatal(err)
	}
	stop := b.start(func(ctx context.Context) { NewSweeper(b.pool, nil, 72*time.Hour, b.logger()).Run(ctx) })
	b.eventually("the partition is back", func() bool { return partitions() == before })
	stop()
	if before != daysAhead+2 { // today, the days ahead, and the default
		t.Errorf("there are %d partitions; want %d", before, daysAhead+2)
	}
}
