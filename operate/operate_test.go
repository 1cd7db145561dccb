package operate

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/broker"
	"idempotent-orders/internal/testenv"
	"idempotent-orders/worker"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// bench is a database and a Redis, and an operator of them.
type bench struct {
	*Operator
	t     testing.TB
	pool  *pgxpool.Pool
	redis redis.UniversalClient
	relay *worker.Relay
	mails *mailbox
}

func newBench(t testing.TB) *bench {
	pool := testenv.Database(t)
	rdb, _ := testenv.Redis(t)
	streams := broker.NewRedisStreams(rdb)
	b := &bench{
		t: t, pool: pool, redis: rdb, mails: &mailbox{}, relay: worker.NewRelay(pool, streams, slog.New(slog.DiscardHandler)),
		Operator: &Operator{Pool: pool, Publisher: streams, Who: "ann@host", What: "events of a test", Rate: MaxRate},
	}
	b.drain() // the relay gets to know Redis: what is published from now on is not published again
	return b
}

// drain publishes what there is to publish.
func (b *bench) drain() {
	b.t.Helper()
	if err := b.relay.Drain(b.t.Context()); err != nil {
		b.t.Fatal(err)
	}
}

// consume mails what there is to mail.
func (b *bench) consume() {
	b.t.Helper()
	consumer := worker.NewConsumer(b.pool, broker.NewRedisStreams(b.redis).Subscribe(worker.EmailConsumer, "one", time.Minute), b.mails,
		time.Minute, slog.New(slog.DiscardHandler))
	if err := consumer.Drain(b.t.Context()); err != nil {
		b.t.Fatal(err)
	}
}

// mailbox keeps what is sent to it.
type mailbox struct {
	mu   sync.Mutex
	sent []uuid.UUID // events
}

func (m *mailbox) Send(_ context.Context, mail worker.Email) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sent = append(m.sent, mail.EventID)
	return nil
}

func (b *bench) exec(sql string, args ...any) {
	b.t.Helper()
	if _, err := b.pool.Exec(b.t.Context(), sql, args...); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) count(sql string, args ...any) (n int) {
	b.t.Helper()
	if err := b.pool.QueryRow(b.t.Context(), sql, args...).Scan(&n); err != nil {
		b.t.Fatal(err)
	}
	return n
}

func (b *bench) wantCount(want int, sql string, args ...any) {
	b.t.Helper()
	if got := b.count(sql, args...); got != want {
		b.t.Errorf("%s is %d; want %d", sql, got, want)
	}
}

// orders returns n orders.
func orders(n int) []uuid.UUID {
	ids := make([]uuid.UUID, n)
	for i := range ids {
		ids[i] = uuid.New()
	}
	return ids
}

// announce writes an event of each order into the outbox and returns them.
func (b *bench) announce(orders ...uuid.UUID) []uuid.UUID {
	b.t.Helper()
	return b.write("INSERT INTO outbox (event_id, aggregate_id, event_type, source, payload)"+
		" SELECT event, an_order, 'order.created.v1', '/orders', data FROM sent ORDER BY place", orders)
}

// bury writes an event of each order that the broker has refused for good, and returns them.
func (b *bench) bury(orders ...uuid.UUID) []uuid.UUID {
	b.t.Helper()
	return b.write("INSERT INTO outbox_dead (id, event_id, aggregate_id, event_type, source, payload, created_at, attempts, reason)"+
		" SELECT nextval('outbox_id_seq'), event, an_order, 'order.created.v1', '/orders', data, now(), 8, 'ERR too odd' FROM sent ORDER BY place", orders)
}

func (b *bench) write(insert string, orders []uuid.UUID) []uuid.UUID {
	b.t.Helper()
	events := make([]uuid.UUID, len(orders))
	for i := range events {
		events[i] = uuid.Must(uuid.NewV7())
	}
	b.exec(`WITH sent AS (
		SELECT event, an_order, place, json_build_object('order_id', an_order, 'user_id', 'user-456', 'amount', 1000, 'created_at', '2026-01-02T03:04:05Z') AS data
		FROM unnest($1::uuid[], $2::uuid[]) WITH ORDINALITY AS o (event, an_order, place)) `+insert, events, orders)
	return events
}

// poison publishes an event of each order, which the consumer then refuses for good, and returns them. The stream is emptied.
func (b *bench) poison(orders ...uuid.UUID) []uuid.UUID {
	b.t.Helper()
	events := b.announce(orders...)
	b.drain()
	b.exec("INSERT INTO inbox (consumer, event_id, state, holder, finished_at, reason) SELECT 'email', unnest($1::uuid[]), 'dead', gen_random_uuid(), now(), 'no mailbox'", events)
	b.emptyStream()
	return events
}

func (b *bench) emptyStream() {
	b.t.Helper()
	if err := b.redis.XTrimMaxLen(b.t.Context(), broker.Stream, 0).Err(); err != nil {
		b.t.Fatal(err)
	}
}

// stream returns the events of the stream and their marks, in its order.
func (b *bench) stream() (events []uuid.UUID, marks []string) {
	b.t.Helper()
	entries, err := b.redis.XRange(b.t.Context(), broker.Stream, "-", "+").Result()
	if err != nil {
		b.t.Fatal(err)
	}
	for _, e := range entries {
		mark, _ := e.Values["replay"].(string)
		events, marks = append(events, uuid.MustParse(e.Values["id"].(string))), append(marks, mark)
	}
	return events, marks
}

// wantStream checks that the stream has these events, in this order, all with the mark.
func (b *bench) wantStream(want []uuid.UUID, mark string) {
	b.t.Helper()
	events, marks := b.stream()
	if !slices.Equal(events, want) {
		b.t.Errorf("the stream has %v; want %v", events, want)
	}
	for _, m := range marks {
		if m != mark {
			b.t.Errorf("an event is marked %q; want %q", m, mark)
		}
	}
}

// find returns the dead events that a filter finds.
func (b *bench) find(f Filter) []Dead {
	b.t.Helper()
	dead, err := b.FindDead(b.t.Context(), f, Everything)
	if err != nil {
		b.t.Fatal(err)
	}
	return dead
}

// must checks that an operation did so many events, and that the table says so.
func (b *bench) must(want int, outcome Outcome, err error) {
	b.t.Helper()
	if err != nil || outcome.Done != want || len(outcome.Refused) > 0 {
		b.t.Fatalf("%+v, %v; want %d done", outcome, err, want)
	}
	var who, what string
	var events int
	if err := b.pool.QueryRow(b.t.Context(), "SELECT who, what, events FROM operations ORDER BY id DESC LIMIT 1").Scan(&who, &what, &events); err != nil {
		b.t.Fatal(err)
	}
	if who != "ann@host" || what != "events of a test" || events != want {
		b.t.Errorf("operations says that %s did %q to %d events; want %d", who, what, events, want)
	}
}

// refusing is a broker that refuses some events, or fails.
type refusing struct {
	broker.Publisher
	event uuid.UUID // this one is refused
	err   error     // of every publication
	enter chan struct{}
	leave chan struct{} // a publication goes on when this is closed
}

func (r *refusing) Publish(ctx context.Context, epoch string, events []broker.Event) error {
	if r.enter != nil {
		r.enter <- struct{}{}
		<-r.leave
	}
	if r.err != nil {
		return r.err
	}
	at := slices.IndexFunc(events, func(e broker.Event) bool { return e.ID == r.event })
	if at < 0 {
		return r.Publisher.Publish(ctx, epoch, events)
	}
	rest := slices.Delete(slices.Clone(events), at, at+1)
	return errors.Join(r.Publisher.Publish(ctx, epoch, rest), &broker.RefusedError{Events: map[int]error{at: errors.New("too odd")}})
}

func eventsIn(dead []Dead) []uuid.UUID {
	ids := make([]uuid.UUID, len(dead))
	for i, d := range dead {
		ids[i] = d.EventID
	}
	return ids
}

func sameSet(a, b []uuid.UUID) bool {
	byText := func(a, b uuid.UUID) int { return strings.Compare(a.String(), b.String()) }
	return slices.Equal(slices.SortedFunc(slices.Values(a), byText), slices.SortedFunc(slices.Values(b), byText))
}

func TestDeadEventsOfBothKindsAreFoundByWhatTheyAre(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ids := orders(4)
	refused, poisoned := b.bury(ids[0], ids[1]), b.poison(ids[2], ids[3])
	b.announce(orders(5)...) // others, well
	b.drain()
	b.exec("UPDATE outbox_dead SET event_type = 'order.paid.v1', died_at = now() - interval '2 hours' WHERE event_id = $1", refused[1])
	for name, test := range map[string]struct {
		filter Filter
		want   []uuid.UUID
	}{
		"everything":             {Filter{}, slices.Concat(refused, poisoned)},
		"one id":                 {Filter{IDs: []uuid.UUID{poisoned[0]}}, poisoned[:1]},
		"two ids":                {Filter{IDs: []uuid.UUID{poisoned[0], refused[0]}}, []uuid.UUID{poisoned[0], refused[0]}},
		"an order at a broker":   {Filter{Order: ids[0]}, refused[:1]},
		"an order at a consumer": {Filter{Order: ids[3]}, poisoned[1:]},
		"a type":                 {Filter{Type: "order.paid.v1"}, refused[1:]},
		"an age":                 {Filter{OlderThan: time.Hour}, refused[1:]},
		"a type and an order":    {Filter{Type: "order.paid.v1", Order: ids[0]}, nil},
		"an order without any":   {Filter{Order: uuid.New()}, nil},
	} {
		if got := eventsIn(b.find(test.filter)); !sameSet(got, test.want) {
			t.Errorf("%s: found %v; want %v", name, got, test.want)
		}
	}
	first, err := b.FindDead(t.Context(), Filter{}, 1)
	if err != nil || len(first) != 1 || first[0].EventID != refused[1] || first[0].Attempts != 8 || first[0].Reason != "ERR too odd" || first[0].OrderID != ids[1] {
		t.Errorf("the one that died first is %+v, %v", first, err)
	}
	for _, d := range b.find(Filter{}) {
		event, err := b.Event(t.Context(), d)
		if err != nil || event.ID != d.EventID || event.Subject != d.OrderID.String() || event.Type != d.Type || !strings.Contains(string(event.Data), d.OrderID.String()) {
			t.Errorf("%+v is %+v, %v", d, event, err)
		}
	}
	b.wantCount(0, "SELECT count(*) FROM operations")
}

func TestRequeuedEventsOfTheBrokerArePublishedInTheirOrder(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	an := orders(1)[0]
	refused := b.bury(an, an, an)
	b.Rate = 10 // a batch for each
	dead := b.find(Filter{})
	slices.Reverse(dead)
	outcome, err := b.Requeue(t.Context(), dead)
	b.must(3, outcome, err)
	b.wantCount(0, "SELECT count(*) FROM outbox_dead")
	b.drain()
	b.wantStream(refused, "")
	b.consume()
	if !sameSet(b.mails.sent, refused) {
		t.Errorf("mails were sent for %v; want %v", b.mails.sent, refused)
	}
}

func TestRequeuedEventsOfAConsumerAreDeliveredAgain(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	poisoned := b.poison(orders(3)...)
	b.exec("UPDATE relay_state SET finished_to = now()")
	outcome, err := b.Requeue(t.Context(), b.find(Filter{}))
	b.must(3, outcome, err)
	b.wantStream(poisoned, broker.Replayed)
	b.wantCount(1, "SELECT count(*) FROM relay_state WHERE finished_to <= (SELECT min(published_at) FROM outbox_published)")
	b.consume()
	b.consume()
	if !sameSet(b.mails.sent, poisoned) {
		t.Errorf("mails were sent for %v; want %v", b.mails.sent, poisoned)
	}
	if dead := b.find(Filter{}); len(dead) != 0 {
		t.Errorf("%d are dead still", len(dead))
	}
}

func TestWhatTwoOperatorsRequeueIsRequeuedOnce(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	refused, poisoned := b.bury(orders(40)...), b.poison(orders(40)...)
	dead := b.find(Filter{}) // both have seen all of it
	outcomes := make([]Outcome, 2)
	var operators sync.WaitGroup
	for i := range outcomes {
		operators.Go(func() {
			operator := *b.Operator
			operator.Rate = 100 // batches of ten
			var err error
			if outcomes[i], err = operator.Requeue(t.Context(), dead); err != nil {
				t.Error(err)
			}
		})
	}
	operators.Wait()
	if n := outcomes[0].Done + outcomes[1].Done; n != 80 {
		t.Errorf("they did %d and %d; want 80 together", outcomes[0].Done, outcomes[1].Done)
	}
	b.wantCount(80, "SELECT sum(events)::bigint FROM operations")
	b.drain()
	if got, _ := b.stream(); !sameSet(got, slices.Concat(refused, poisoned)) {
		t.Errorf("%d were published; want each of 80 once", len(got))
	}
}

func TestAnInterruptedRequeueIsCountedAndCanBeGoneOnWith(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	refused, poisoned := b.bury(orders(3)...), b.poison(orders(3)...)
	b.Rate = 20 // batches of two
	for _, want := range []int{2, 2} {
		ctx, interrupt := context.WithCancel(t.Context())
		b.Progress = func(int) { interrupt() }
		outcome, err := b.Requeue(ctx, b.find(Filter{}))
		if !errors.Is(err, ErrInterrupted) {
			t.Errorf("it says %v", err)
		}
		b.must(want, outcome, nil)
	}
	b.Progress = nil
	outcome, err := b.Requeue(t.Context(), b.find(Filter{}))
	b.must(2, outcome, err)
	b.drain()
	if got, _ := b.stream(); !sameSet(got, slices.Concat(refused, poisoned)) {
		t.Errorf("%v were published; want each of six once", got)
	}
}

// Only a lower bound is asked for: how much longer it takes is the machine's business. The first batch is done at once.
func TestAnOperationIsNotFasterThanItsRate(t *testing.T) {
	t.Parallel()
	const events, rate = 40, 40
	for name, prepare := range map[string]func(b *bench) (want []uuid.UUID, do func() (Outcome, error)){
		"requeue at the broker": func(b *bench) ([]uuid.UUID, func() (Outcome, error)) {
			refused := b.bury(orders(events)...)
			dead := b.find(Filter{})
			return refused, func() (Outcome, error) { return b.Requeue(b.t.Context(), dead) }
		},
		"requeue at a consumer": func(b *bench) ([]uuid.UUID, func() (Outcome, error)) {
			poisoned := b.poison(orders(events)...)
			dead := b.find(Filter{})
			return poisoned, func() (Outcome, error) { return b.Requeue(b.t.Context(), dead) }
		},
		"replay": func(b *bench) ([]uuid.UUID, func() (Outcome, error)) {
			noon := time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)
			published := b.archive(noon, orders(events)...)
			return published, func() (Outcome, error) {
				outcome, _, err := b.Replay(b.t.Context(), Range{From: noon, To: noon.Add(time.Hour)}, broker.Replayed)
				return outcome, err
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			want, do := prepare(b)
			b.Rate = rate
			begun := time.Now()
			outcome, err := do()
			took := time.Since(begun)
			b.must(events, outcome, err)
			if least := time.Duration(events-b.batchSize()) * time.Second / rate; took < least {
				t.Errorf("%d events at %d a second took %s; want at least %s", events, rate, took, least)
			}
			b.drain()
			if got, _ := b.stream(); !slices.Equal(got, want) {
				t.Errorf("%d were published; want each of %d once, in their order", len(got), events)
			}
		})
	}
}

func TestWhatTheBrokerDoesNotTakeStaysDead(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	poisoned := b.poison(orders(3)...)
	streams := b.Publisher

	b.Publisher = &refusing{Publisher: streams, err: errors.New("away")}
	if outcome, err := b.Requeue(t.Context(), b.find(Filter{})); err == nil || outcome.Done != 0 || !strings.Contains(err.Error(), "away") {
		t.Errorf("a broker that is away: %+v, %v", outcome, err)
	}
	if dead := b.find(Filter{}); len(dead) != 3 {
		t.Errorf("%d are dead; want 3", len(dead))
	}

	b.Publisher = &refusing{Publisher: streams, event: poisoned[1]}
	outcome, err := b.Requeue(t.Context(), b.find(Filter{}))
	if err != nil || outcome.Done != 2 || len(outcome.Refused) != 1 || !strings.Contains(outcome.Refused[0].Error(), poisoned[1].String()) {
		t.Errorf("a broker that refuses one: %+v, %v", outcome, err)
	}
	if dead := eventsIn(b.find(Filter{})); !slices.Equal(dead, poisoned[1:2]) {
		t.Errorf("%v are dead; want %v", dead, poisoned[1:2])
	}
	b.wantStream([]uuid.UUID{poisoned[0], poisoned[2]}, broker.Replayed)
	b.wantCount(2, "SELECT sum(events)::bigint FROM operations")
}

func TestWhatTheArchiveHasLostCannotBeRequeued(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.poison(orders(1)...)
	b.exec("DELETE FROM outbox_published")
	dead := b.find(Filter{})
	if len(dead) != 1 || !dead[0].Lost() {
		t.Fatalf("dead are %+v", dead)
	}
	if outcome, err := b.Requeue(t.Context(), dead); err != nil || outcome.Done != 0 {
		t.Errorf("%+v, %v", outcome, err)
	}
	if _, err := b.Event(t.Context(), dead[0]); !errors.Is(err, ErrNotFound) {
		t.Errorf("the event: %v", err)
	}
	b.wantCount(1, "SELECT count(*) FROM inbox WHERE state = 'dead'")
}

func TestDroppedEventsAreGivenUpAndStillNotTakenForNewOnes(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.bury(orders(2)...)
	poisoned := b.poison(orders(2)...)
	dead := b.find(Filter{})
	outcome, err := b.Drop(t.Context(), dead)
	b.must(4, outcome, err)
	if dead := b.find(Filter{}); len(dead) != 0 {
		t.Errorf("%d are found still", len(dead))
	}
	b.wantCount(0, "SELECT count(*) FROM outbox_dead")
	b.wantCount(2, "SELECT count(*) FROM inbox WHERE state = 'dead' AND reason = 'dropped: no mailbox'")
	again, err := b.Drop(t.Context(), dead)
	if err != nil || again.Done != 0 {
		t.Errorf("dropped again: %+v, %v", again, err)
	}
	b.wantCount(2, "SELECT count(*) FROM inbox WHERE reason = 'dropped: no mailbox'")

	_, _, err = b.Replay(t.Context(), Range{From: time.Now().Add(-time.Hour), To: time.Now().Add(time.Hour)}, broker.Replayed)
	if err != nil {
		t.Fatal(err)
	}
	b.wantStream(poisoned, broker.Replayed)
	b.consume()
	if len(b.mails.sent) != 0 {
		t.Errorf("mails were sent for %v", b.mails.sent)
	}
}

func TestNothingToDoIsNoOperation(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for name, do := range map[string]func(context.Context, []Dead) (Outcome, error){"requeue": b.Requeue, "drop": b.Drop} {
		if outcome, err := do(t.Context(), b.find(Filter{})); err != nil || outcome.Done != 0 {
			t.Errorf("%s: %+v, %v", name, outcome, err)
		}
	}
	b.wantCount(0, "SELECT count(*) FROM operations")
}

// archive publishes an event of each order, a second after the other, beginning at from. The stream is emptied.
func (b *bench) archive(from time.Time, orders ...uuid.UUID) []uuid.UUID {
	b.t.Helper()
	events := b.announce(orders...)
	b.drain()
	for i, e := range events {
		b.exec("UPDATE outbox_published SET published_at = $2 WHERE event_id = $1", e, from.Add(time.Duration(i)*time.Second))
	}
	b.emptyStream()
	return events
}

func TestAReplayPublishesItsRangeOldestFirstAndTheInboxPrevents(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	noon := time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)
	ids := orders(6)
	events := b.archive(noon, ids...)
	b.exec("UPDATE outbox_published SET event_type = 'order.paid.v1' WHERE event_id = $1", events[2])
	b.exec("INSERT INTO inbox (consumer, event_id, state, holder, finished_at) SELECT 'email', unnest($1::uuid[]), 'sent', gen_random_uuid(), now()", events)
	for name, test := range map[string]struct {
		span Range
		want []uuid.UUID
	}{
		"all":                      {Range{From: noon, To: noon.Add(time.Hour)}, events},
		"from is in, to is not":    {Range{From: noon.Add(time.Second), To: noon.Add(4 * time.Second)}, events[1:4]},
		"a type":                   {Range{From: noon, To: noon.Add(time.Hour), Type: "order.paid.v1"}, events[2:3]},
		"an order":                 {Range{From: noon, To: noon.Add(time.Hour), Order: ids[4]}, events[4:5]},
		"another time":             {Range{From: noon.Add(time.Hour), To: noon.Add(2 * time.Hour)}, nil},
		"a type and another order": {Range{From: noon, To: noon.Add(time.Hour), Order: ids[4], Type: "order.paid.v1"}, nil},
	} {
		count, err := b.CountPublished(t.Context(), test.span)
		if err != nil || int(count) != len(test.want) {
			t.Errorf("%s: counted %d, %v; want %d", name, count, err, len(test.want))
		}
		b.Rate = 20 // batches of two
		outcome, _, err := b.Replay(t.Context(), test.span, broker.Replayed)
		b.must(len(test.want), outcome, err)
		b.wantStream(test.want, broker.Replayed)
		b.consume()
		b.emptyStream()
	}
	if len(b.mails.sent) != 0 {
		t.Errorf("mails were sent for %v", b.mails.sent)
	}
}

func TestConsumersSeeThatAnEventIsReplayedAndWhen(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	noon := time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)
	event := b.archive(noon, orders(1)...)[0]
	if _, _, err := b.Replay(t.Context(), Range{From: noon, To: noon.Add(time.Second)}, broker.Forced); err != nil {
		t.Fatal(err)
	}
	deliveries, err := broker.NewRedisStreams(b.redis).Subscribe("another", "one", time.Minute).Receive(t.Context(), 2, 0)
	if err != nil || len(deliveries) != 1 || deliveries[0].Err != nil {
		t.Fatalf("received %+v, %v", deliveries, err)
	}
	got := deliveries[0].Event
	if got.ID != event || got.Replay != broker.Forced {
		t.Errorf("received %+v", got)
	}
	b.wantCount(1, "SELECT count(*) WHERE $1::timestamptz BETWEEN now() - interval '1 minute' AND now()", got.ReplayedAt)
}

func TestAForcedReplayIsMailedOnceMore(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	sent := b.announce(orders(3)...)
	b.drain()
	b.consume()
	poisoned := b.poison(orders(1)...)
	all := Range{From: time.Now().Add(-time.Hour), To: time.Now().Add(time.Hour)}
	for range 2 {
		b.mails.sent = nil
		outcome, _, err := b.Replay(t.Context(), all, broker.Forced)
		b.must(4, outcome, err)
		b.consume()
		if want := slices.Concat(sent, poisoned); !sameSet(b.mails.sent, want) {
			t.Errorf("mails were sent for %v; want %v", b.mails.sent, want)
		}
	}

	// As after a crash before the acknowledgement: what was delivered is delivered again.
	b.mails.sent = nil
	if err := b.redis.XGroupSetID(t.Context(), broker.Stream, worker.EmailConsumer, "0").Err(); err != nil {
		t.Fatal(err)
	}
	b.consume()
	if len(b.mails.sent) != 0 {
		t.Errorf("mails were sent again for %v", b.mails.sent)
	}
	b.wantCount(4, "SELECT count(*) FROM inbox WHERE state = 'sent'")
}

func TestAnInterruptedReplayTellsWhereToGoOn(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	noon := time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)
	events := b.archive(noon, orders(5)...)
	b.exec("UPDATE outbox_published SET published_at = $1", noon) // one relay published them all at once
	b.Rate = 20                                                   // batches of two
	ctx, interrupt := context.WithCancel(t.Context())
	b.Progress = func(int) { interrupt() }
	outcome, left, err := b.Replay(ctx, Range{From: noon, To: noon.Add(time.Hour)}, broker.Forced)
	if !errors.Is(err, ErrInterrupted) {
		t.Errorf("it says %v", err)
	}
	b.must(2, outcome, nil)
	b.wantStream(events[:2], broker.Forced)
	b.Progress = nil
	outcome, _, err = b.Replay(t.Context(), left, broker.Forced)
	b.must(3, outcome, err)
	b.wantStream(events, broker.Forced)
}

func TestAReplayGoesOnBehindAnEventThatTheBrokerRefuses(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	noon := time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)
	events := b.archive(noon, orders(3)...)
	b.Publisher = &refusing{Publisher: b.Publisher, event: events[1]}
	outcome, _, err := b.Replay(t.Context(), Range{From: noon, To: noon.Add(time.Hour)}, broker.Replayed)
	if err != nil || outcome.Done != 2 || len(outcome.Refused) != 1 {
		t.Errorf("%+v, %v", outcome, err)
	}
	b.wantStream([]uuid.UUID{events[0], events[2]}, broker.Replayed)
	b.wantCount(2, "SELECT sum(events)::bigint FROM operations")
}

func TestAParkedOrderWaitsAndGoesOnInItsOrder(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	ids := orders(2)
	parked, other := ids[0], ids[1]
	if before, err := b.Park(t.Context(), parked); err != nil || before.Parked {
		t.Fatal(before, err)
	}
	held := b.announce(parked, parked, parked)
	free := b.announce(other)
	b.drain()
	b.drain()
	b.wantStream(free, "")
	now, err := b.Waiting(t.Context(), parked)
	if err != nil || !now.Parked || now.Events != 3 {
		t.Errorf("the order stands like %+v, %v", now, err)
	}
	if before, err := b.Park(t.Context(), parked); err != nil || !before.Parked {
		t.Errorf("parked again: %+v, %v", before, err)
	}
	b.wantCount(0, "SELECT sum(events)::bigint FROM operations")

	before, err := b.Unpark(t.Context(), parked)
	b.must(3, Outcome{Done: before.Events}, err)
	held = append(held, b.announce(parked)...)
	for len(b.find(Filter{})) == 0 && b.count("SELECT (SELECT count(*) FROM outbox_held) + (SELECT count(*) FROM outbox)") > 0 {
		b.drain()
	}
	b.wantStream(slices.Concat(free, held), "")
	if now, err := b.Waiting(t.Context(), parked); err != nil || now.Parked || now.Events != 0 {
		t.Errorf("the order stands like %+v, %v", now, err)
	}
}

func TestParkingWaitsForARelayThatHasTheTurn(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	an := orders(1)[0]
	first := b.announce(an)
	slow := &refusing{Publisher: b.Publisher, enter: make(chan struct{}), leave: make(chan struct{})}
	relay := worker.NewRelay(b.pool, slow, slog.New(slog.DiscardHandler))
	var both sync.WaitGroup
	both.Go(func() {
		if err := relay.Drain(t.Context()); err != nil {
			t.Error(err)
		}
	})
	<-slow.enter // the relay has claimed the event, and publishes it
	parked := make(chan struct{})
	both.Go(func() {
		defer close(parked)
		if _, err := b.Park(t.Context(), an); err != nil {
			t.Error(err)
		}
	})
	for waiting := 0; waiting == 0; {
		select {
		case <-parked:
			close(slow.leave)
			t.Fatal("it did not wait")
		default:
			waiting = b.count("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted" +
				" AND database = (SELECT oid FROM pg_database WHERE datname = current_database())")
		}
	}
	b.wantCount(0, "SELECT count(*) FROM outbox_parked")
	close(slow.leave)
	both.Wait()
	b.wantStream(first, "")
	b.announce(an)
	b.drain()
	b.wantStream(first, "")
	b.wantCount(1, "SELECT count(*) FROM outbox_held")
}
