package worker

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/broker"
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

// relay returns a relay whose floor may rise with each round, and passes nobody who writes.
func (b *bench) relay(p broker.Publisher) *Relay {
	r := NewRelay(b.pool, p, b.logger())
	r.surveyEvery, r.floor.patience = 0, time.Hour
	return r
}

// consumer returns a consumer of its own name whose events are abandoned almost at once when it dies.
func (b *bench) consumer(name string, sender Sender) *Consumer {
	return b.consumerAfter(100*time.Millisecond, name, sender)
}

func (b *bench) consumerAfter(abandonedAfter time.Duration, name string, sender Sender) *Consumer {
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
		b.t.Errorf("%d mails were sent for %d orders, to these: %v", len(got), len(want), got)
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

func (p publisher) Publish(ctx context.Context, _ string, events []broker.Event) error {
	return p(ctx, events)
}
func (p publisher) Epoch(context.Context) (string, error) {
	return "", nil
}

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
