package reconcile_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"

	"idempotent-orders/idempotency"
	"idempotent-orders/internal/testenv"
	"idempotent-orders/order"
	"idempotent-orders/reconcile"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// books are a database with orders, and what the tests do to it.
type books struct {
	t      testing.TB
	pool   *pgxpool.Pool
	orders *order.Store
}

func newBooks(t testing.TB) books {
	pool := testenv.Database(t)
	return books{t: t, pool: pool, orders: order.NewStore(pool, options.KeyRetention, nil)}
}

var options = reconcile.Options{Consumer: "email", KeyRetention: time.Hour}

// place places n orders and returns their ids, oldest first.
func (b books) place(n int) []uuid.UUID {
	b.t.Helper()
	ids := make([]uuid.UUID, n)
	for i := range ids {
		placed, err := b.orders.Place(order.Send{
			Key:   idempotency.Key{Caller: "anonymous", Operation: order.Operation, Value: uuid.NewString()},
			Draft: order.Draft{UserID: "user-456", Amount: 1000},
		})
		if err != nil {
			b.t.Fatal(err)
		}
		ids[i] = placed.OrderID
	}
	slices.SortFunc(ids, compareIDs)
	return ids
}

func compareIDs(a, b uuid.UUID) int { return strings.Compare(a.String(), b.String()) }

// finish publishes what is in the outbox, some time ago, and finishes it.
func (b books) finish() {
	b.t.Helper()
	b.do(`WITH moved AS (DELETE FROM outbox RETURNING *)
		INSERT INTO outbox_published SELECT *, now() - interval '2 minutes' FROM moved`)
	b.do(`INSERT INTO inbox (consumer, event_id, state, holder, finished_at)
		SELECT 'email', event_id, 'sent', gen_random_uuid(), now() FROM outbox_published ON CONFLICT DO NOTHING`)
}

func (b books) do(query string, args ...any) {
	b.t.Helper()
	tag, err := b.pool.Exec(b.t.Context(), query, args...)
	if err != nil {
		b.t.Fatalf("%s: %v", query, err)
	}
	if tag.RowsAffected() == 0 {
		b.t.Fatalf("%s: it did nothing", query)
	}
}

// id returns the result of a query for one id.
func (b books) id(query string, args ...any) (id uuid.UUID) {
	b.t.Helper()
	if err := b.pool.QueryRow(b.t.Context(), query, args...).Scan(&id); err != nil {
		b.t.Fatalf("%s: %v", query, err)
	}
	return id
}

func (b books) eventOf(orderID uuid.UUID) uuid.UUID {
	b.t.Helper()
	return b.id("SELECT event_id FROM outbox_published WHERE aggregate_id = $1", orderID)
}

func (b books) reconcile(o reconcile.Options) reconcile.Report {
	b.t.Helper()
	report, err := reconcile.Run(b.t.Context(), b.pool, o)
	if err != nil {
		b.t.Fatal(err)
	}
	return report
}

// found returns the differences that are there, by name.
func found(r reconcile.Report) map[string][]uuid.UUID {
	ids := map[string][]uuid.UUID{}
	for _, d := range r.Differences {
		if d.Count > 0 {
			ids[d.Name] = d.First
		}
	}
	return ids
}

func (b books) mustFind(r reconcile.Report, want map[string][]uuid.UUID) {
	b.t.Helper()
	if got := found(r); !maps.EqualFunc(got, want, slices.Equal) {
		b.t.Errorf("found %v; want %v", got, want)
	}
}

func TestNothingDiffersInAnEmptyDatabase(t *testing.T) {
	t.Parallel()
	b := newBooks(t)
	report := b.reconcile(options)
	b.mustFind(report, nil)
	if report.Orders != 0 || report.Sent != 0 || report.Err(false) != nil {
		t.Errorf("%d orders, %d sent, %v", report.Orders, report.Sent, report.Err(false))
	}
}

func TestNothingDiffersWhenAllIsFinished(t *testing.T) {
	t.Parallel()
	b := newBooks(t)
	b.place(20)
	b.finish()
	report := b.reconcile(options)
	b.mustFind(report, nil)
	if report.Orders != 20 || report.Sent != 20 || report.Older != 0 || !report.KeptFrom.IsZero() || report.Err(false) != nil {
		t.Errorf("%d orders, %d sent, %d older than %s, %v", report.Orders, report.Sent, report.Older, report.KeptFrom, report.Err(false))
	}
}

// Another consumer, another operation and another type of event have orders and events of their own to answer for.
func TestWhatOthersDoMakesNoDifference(t *testing.T) {
	t.Parallel()
	b := newBooks(t)
	id := b.place(1)[0]
	b.finish()
	b.do(`INSERT INTO inbox (consumer, event_id, state, holder) SELECT 'audit', event_id, 'received', event_id FROM outbox_published`)
	b.do(`INSERT INTO inbox (consumer, event_id, state, holder, finished_at) SELECT 'billing', event_id, 'sent', event_id, now() FROM outbox_published`)
	b.do(`INSERT INTO inbox (consumer, event_id, state, holder, finished_at) VALUES ('audit', $1, 'sent', $1, now())`, uuid.Must(uuid.NewV7()))
	b.do(`INSERT INTO idempotency_keys SELECT caller, 'PlaceRefund', key, fingerprint, gen_random_uuid(), created_at, expires_at, gen_random_uuid()
		FROM idempotency_keys`)
	for _, aggregate := range []uuid.UUID{id, uuid.Must(uuid.NewV7())} {
		b.do(`INSERT INTO outbox_published (id, event_id, aggregate_id, event_type, source, payload, created_at)
			VALUES (1000, gen_random_uuid(), $1, 'order.cancelled.v1', '/orders', '{}', now())`, aggregate)
		b.do(`INSERT INTO outbox (event_id, aggregate_id, event_type, source, payload)
			VALUES (gen_random_uuid(), $1, 'order.cancelled.v1', '/orders', '{}')`, aggregate)
	}
	report := b.reconcile(options)
	b.mustFind(report, nil)
	if report.Sent != 1 {
		t.Errorf("%d are sent; want 1", report.Sent)
	}

	// Nor do they stand in for what is lost.
	b.do(`DELETE FROM inbox WHERE consumer = 'email'`)
	b.mustFind(b.reconcile(options), map[string][]uuid.UUID{"events_not_delivered": {b.id(`SELECT event_id FROM outbox_published WHERE event_type = 'order.created.v1'`)}})
	b.do(`DELETE FROM outbox_published WHERE event_type = 'order.created.v1'`)
	b.mustFind(b.reconcile(options), map[string][]uuid.UUID{"orders_without_event": {id}})
}

// Each case breaks the order in the middle of three that are finished, and returns the id that has to be shown.
func TestEachDifferenceStandsAloneUnderItsName(t *testing.T) {
	t.Parallel()
	toOtherPlace := func(table, columns, values string) func(books, uuid.UUID) uuid.UUID {
		return func(b books, victim uuid.UUID) uuid.UUID {
			event := b.eventOf(victim)
			b.do(`DELETE FROM inbox WHERE event_id = $1`, event)
			b.do(`INSERT INTO `+table+` (event_id, aggregate_id, event_type, source, payload, created_at`+columns+`)
				SELECT event_id, aggregate_id, event_type, source, payload, created_at`+values+` FROM outbox_published WHERE event_id = $1`, event)
			b.do(`DELETE FROM outbox_published WHERE event_id = $1`, event)
			return event
		}
	}
	for name, test := range map[string]struct {
		kind  reconcile.Kind
		spoil func(books, uuid.UUID) uuid.UUID
	}{
		"orders_without_event": {reconcile.Missing, func(b books, victim uuid.UUID) uuid.UUID {
			b.do(`DELETE FROM inbox WHERE event_id = $1`, b.eventOf(victim))
			b.do(`DELETE FROM outbox_published WHERE aggregate_id = $1`, victim)
			return victim
		}},
		"events_without_order": {reconcile.Missing, func(b books, victim uuid.UUID) uuid.UUID {
			b.do(`DELETE FROM orders WHERE id = $1`, victim)
			b.do(`DELETE FROM idempotency_keys WHERE order_id = $1`, victim)
			return b.eventOf(victim)
		}},
		"orders_with_several_events": {reconcile.Missing, func(b books, victim uuid.UUID) uuid.UUID {
			another := uuid.Must(uuid.NewV7())
			b.do(`INSERT INTO outbox_published SELECT id + 1000, $2, aggregate_id, event_type, source, payload, traceparent, created_at, published_at
				FROM outbox_published WHERE aggregate_id = $1`, victim, another)
			b.do(`INSERT INTO inbox SELECT consumer, $2, state, holder, received_at, finished_at FROM inbox WHERE event_id = $1`,
				b.id(`SELECT event_id FROM outbox_published WHERE aggregate_id = $1 AND event_id <> $2`, victim, another), another)
			return victim
		}},
		"events_not_delivered": {reconcile.Missing, func(b books, victim uuid.UUID) uuid.UUID {
			b.do(`DELETE FROM inbox WHERE event_id = $1`, b.eventOf(victim))
			return b.eventOf(victim)
		}},
		"inbox_without_event": {reconcile.Missing, func(b books, _ uuid.UUID) uuid.UUID {
			event := uuid.Must(uuid.NewV7())
			b.do(`INSERT INTO inbox (consumer, event_id, state, holder, finished_at) VALUES ('email', $1, 'sent', $1, now())`, event)
			return event
		}},
		"orders_without_key": {reconcile.Missing, func(b books, victim uuid.UUID) uuid.UUID {
			b.do(`UPDATE idempotency_keys SET expires_at = now() WHERE order_id = $1`, victim)
			return victim
		}},
		"keys_without_order": {reconcile.Missing, func(b books, _ uuid.UUID) uuid.UUID {
			nobody := uuid.Must(uuid.NewV7())
			b.do(`INSERT INTO idempotency_keys SELECT caller, operation, 'another', fingerprint, $1, created_at, expires_at, $1 FROM idempotency_keys LIMIT 1`, nobody)
			return nobody
		}},
		"pending": {reconcile.Unfinished, toOtherPlace("outbox", "", "")},
		"held":    {reconcile.Unfinished, toOtherPlace("outbox_held", ", id", ", id")},
		"just_published": {reconcile.Unfinished, func(b books, victim uuid.UUID) uuid.UUID {
			b.do(`DELETE FROM inbox WHERE event_id = $1`, b.eventOf(victim))
			b.do(`UPDATE outbox_published SET published_at = now() WHERE aggregate_id = $1`, victim)
			return b.eventOf(victim)
		}},
		"received": {reconcile.Unfinished, func(b books, victim uuid.UUID) uuid.UUID {
			b.do(`UPDATE inbox SET state = 'received', finished_at = NULL WHERE event_id = $1`, b.eventOf(victim))
			return b.eventOf(victim)
		}},
		"dead_at_publisher": {reconcile.Dead, toOtherPlace("outbox_dead", ", id, attempts, reason", ", id, 8, 'refused'")},
		"dead_at_consumer": {reconcile.Dead, func(b books, victim uuid.UUID) uuid.UUID {
			b.do(`UPDATE inbox SET state = 'dead', reason = 'no such mailbox' WHERE event_id = $1`, b.eventOf(victim))
			return b.eventOf(victim)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBooks(t)
			victim := b.place(3)[1]
			b.finish()
			id := test.spoil(b, victim)
			report := b.reconcile(options)
			b.mustFind(report, map[string][]uuid.UUID{name: {id}})
			counts := map[reconcile.Kind]int64{reconcile.Missing: report.Missing, reconcile.Unfinished: report.Unfinished, reconcile.Dead: report.Dead}
			for kind, n := range counts {
				if want := map[bool]int64{true: 1}[kind == test.kind]; n != want {
					t.Errorf("%s: %d; want %d", kind, n, want)
				}
			}
			says := map[reconcile.Kind]string{reconcile.Missing: "missing: 1", reconcile.Unfinished: "not finished yet: 1", reconcile.Dead: "dead: 1"}
			if err := report.Err(false); err == nil || err.Error() != says[test.kind] {
				t.Errorf("it says %v; want %s", err, says[test.kind])
			}
			if err := report.Err(true); (err == nil) != (test.kind == reconcile.Dead) {
				t.Errorf("with dead ones allowed it says %v", err)
			}
		})
	}
}

func TestAKeyThatIsGoneIsMissedOnlyWhileItShouldAnswer(t *testing.T) {
	t.Parallel()
	b := newBooks(t)
	ids := b.place(2)
	b.finish()
	b.do(`DELETE FROM idempotency_keys`)
	b.do(`UPDATE orders SET created_at = now() - interval '1 hour' WHERE id = $1`, ids[0])
	b.mustFind(b.reconcile(options), map[string][]uuid.UUID{"orders_without_key": ids[1:]})
}

func TestOnlyTheFirstIDsAreShownInOrder(t *testing.T) {
	t.Parallel()
	b := newBooks(t)
	ids := b.place(13)
	b.finish()
	b.do(`DELETE FROM inbox`)
	b.do(`DELETE FROM outbox_published`)
	report := b.reconcile(options)
	b.mustFind(report, map[string][]uuid.UUID{"orders_without_event": ids[:10]})
	var text strings.Builder
	if err := report.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"missing: 13\n", "          13  orders without an event\n              " + ids[0].String() + "\n", "and 3 more\n",
		"not finished yet: 0\n", "           0  events waiting in the outbox\n"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("it does not say %q:\n%s", want, text.String())
		}
	}
}

func TestARangeSelectsByWhenTheOrderWasPlaced(t *testing.T) {
	t.Parallel()
	b := newBooks(t)
	ids := b.place(3) // spoilt before, in and after the range
	b.finish()
	begin := time.Now().UTC().Truncate(time.Second).Add(-10 * time.Minute)
	for i, at := range []time.Time{begin.Add(-time.Microsecond), begin, begin.Add(time.Minute)} {
		b.do(`DELETE FROM inbox WHERE event_id = $1`, b.eventOf(ids[i]))
		b.do(`UPDATE orders SET created_at = $2 WHERE id = $1`, ids[i], at)
		b.do(`UPDATE outbox_published SET created_at = $2 WHERE aggregate_id = $1`, ids[i], at)
	}
	o := options
	o.From, o.To = begin, begin.Add(time.Minute)
	report := b.reconcile(o)
	b.mustFind(report, map[string][]uuid.UUID{"events_not_delivered": {b.eventOf(ids[1])}})
	if report.Orders != 1 {
		t.Errorf("%d orders; want 1", report.Orders)
	}
	b.do(`DELETE FROM outbox_published`)
	b.mustFind(b.reconcile(o), map[string][]uuid.UUID{"orders_without_event": {ids[1]}})
	b.do(`DELETE FROM orders`)
	b.do(`UPDATE idempotency_keys SET created_at = $2 WHERE order_id = $1`, ids[0], begin.Add(-time.Microsecond))
	b.do(`UPDATE idempotency_keys SET created_at = $2 WHERE order_id = $1`, ids[1], begin)
	b.mustFind(b.reconcile(o), map[string][]uuid.UUID{"keys_without_order": {ids[1]}})
}

func TestARangeSelectsInboxRowsByTheTimeInTheEventsID(t *testing.T) {
	t.Parallel()
	b := newBooks(t)
	begin := time.Now().UTC().Truncate(time.Second)
	ids := []uuid.UUID{idOf(begin.Add(-time.Millisecond)), idOf(begin), idOf(begin.Add(time.Minute))}
	for _, id := range ids {
		b.do(`INSERT INTO inbox (consumer, event_id, state, holder, finished_at) VALUES ('email', $1, 'sent', $1, now())`, id)
	}
	o := options
	o.From, o.To = begin, begin.Add(time.Minute)
	b.mustFind(b.reconcile(o), map[string][]uuid.UUID{"inbox_without_event": ids[1:2]})
	b.mustFind(b.reconcile(options), map[string][]uuid.UUID{"inbox_without_event": ids})
}

// idOf returns a UUIDv7 of a moment.
func idOf(t time.Time) uuid.UUID {
	id := uuid.Must(uuid.NewV7())
	ms := t.UnixMilli()
	for i := range 6 {
		id[5-i] = byte(ms >> (8 * i))
	}
	return id
}

// Two orders that are a month old have no event, and the inbox knows another event of then.
func TestWhatRetentionMayHaveDroppedIsNotMissing(t *testing.T) {
	t.Parallel()
	b := newBooks(t)
	ids := b.place(3)
	b.finish()
	monthAgo := time.Now().AddDate(0, -1, 0)
	b.do(`DELETE FROM inbox`)
	b.do(`DELETE FROM outbox_published`)
	b.do(`UPDATE orders SET created_at = $2 WHERE id = ANY ($1)`, ids[:2], monthAgo)
	inboxOnly := idOf(monthAgo)
	b.do(`INSERT INTO inbox (consumer, event_id, state, holder, finished_at) VALUES ('email', $1, 'sent', $1, now())`, inboxOnly)

	// Nothing was ever dropped: not everything from then is known to be finished.
	b.mustFind(b.reconcile(options), map[string][]uuid.UUID{"orders_without_event": ids, "inbox_without_event": {inboxOnly}})
	// It may have been dropped: it would have been finished, and the oldest day that is left is later.
	b.do(`UPDATE relay_state SET finished_to = now()`)
	report := b.reconcile(options)
	b.mustFind(report, map[string][]uuid.UUID{"orders_without_event": ids[2:]})
	if report.Older != 2 || report.KeptFrom.IsZero() || report.KeptFrom.After(report.At) || report.KeptFrom.Before(report.At.Add(-48*time.Hour)) {
		t.Errorf("%d orders are older than %s; want 2", report.Older, report.KeptFrom)
	}
	// The days of then are still there.
	b.do(`CREATE TABLE outbox_published_20000101 PARTITION OF outbox_published FOR VALUES FROM ('2000-01-01Z') TO ('2000-01-02Z');
		UPDATE relay_state SET finished_to = now()`)
	b.mustFind(b.reconcile(options), map[string][]uuid.UUID{"orders_without_event": ids, "inbox_without_event": {inboxOnly}})
}

// The day of a finished order leaves the archive in a transaction that commits when the report has begun.
func TestADayThatLeavesTheArchiveMeanwhileIsNotMissing(t *testing.T) {
	t.Parallel()
	b := newBooks(t)
	id := b.place(1)[0]
	b.finish()
	event := b.eventOf(id)
	b.do(`CREATE TABLE outbox_published_20000101 PARTITION OF outbox_published FOR VALUES FROM ('2000-01-01Z') TO ('2000-01-02Z');
		UPDATE outbox_published SET created_at = '2000-01-01Z', published_at = '2000-01-01Z'; UPDATE orders SET created_at = '2000-01-01Z';
		UPDATE relay_state SET finished_to = now()`)
	b.do(`UPDATE inbox SET event_id = $1`, idOf(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)))
	b.do(`UPDATE outbox_published SET event_id = (SELECT event_id FROM inbox) WHERE event_id = $1`, event)
	if report := b.reconcile(options); report.Older != 0 || report.Sent != 1 || report.Err(false) != nil {
		t.Fatalf("before, %d are older, %d sent, %v", report.Older, report.Sent, found(report))
	}

	tx, err := b.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(t.Context())
	if _, err := tx.Exec(t.Context(), "ALTER TABLE outbox_published DETACH PARTITION outbox_published_20000101"); err != nil {
		t.Fatal(err)
	}
	reports := make(chan reconcile.Report, 1)
	go func() {
		report, err := reconcile.Run(t.Context(), b.pool, options)
		if err != nil {
			t.Error(err)
		}
		reports <- report
	}()
	for waiting := false; !waiting && len(reports) == 0; {
		if err := b.pool.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database
			WHERE d.datname = current_database() AND NOT l.granted)`).Scan(&waiting); err != nil {
			t.Fatal(err)
		}
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	report := <-reports
	b.mustFind(report, nil)
	if report.Older != 1 || report.Sent != 0 {
		t.Errorf("%d are older, and %d sent; want 1 and 0", report.Older, report.Sent)
	}
}

func TestNothingIsMissingWhileOrdersArePlacedAndMove(t *testing.T) {
	t.Parallel()
	b := newBooks(t)
	ctx, stop := context.WithCancel(t.Context())
	var busy sync.WaitGroup
	for range 4 {
		busy.Go(func() {
			for ctx.Err() == nil {
				b.place(1)
			}
		})
	}
	busy.Go(func() {
		for ctx.Err() == nil {
			if _, err := b.pool.Exec(ctx, `WITH moved AS (DELETE FROM outbox RETURNING *)
				INSERT INTO outbox_published SELECT *, now() FROM moved`); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
		}
	})
	for last := int64(-1); last < 100; {
		report := b.reconcile(options)
		if report.Missing != 0 {
			t.Errorf("of %d orders it misses %v", report.Orders, found(report))
			break
		}
		if got := report.Unfinished; got != report.Orders {
			t.Errorf("%d of %d orders are not finished", got, report.Orders)
			break
		}
		last = report.Orders
	}
	stop()
	busy.Wait()
}

func TestTheReportIsJSONWithEveryDifference(t *testing.T) {
	t.Parallel()
	b := newBooks(t)
	b.place(1)
	report := b.reconcile(options)
	encoded, err := json.Marshal(report)
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		At, From, To, KeptFrom                         *time.Time
		Orders, Sent, Older, Missing, Unfinished, Dead *int64
		Differences                                    []struct {
			Name, Kind, Meaning *string
			Count               *int64
			First               []string
		}
	}
	if err := json.Unmarshal(encoded, &got); err != nil {
		t.Fatal(err)
	}
	if got.At == nil || got.From != nil || got.To != nil || *got.Orders != 1 || *got.Sent != 0 || *got.Older != 0 || *got.Missing != 0 || *got.Unfinished != 1 || *got.Dead != 0 {
		t.Errorf("it is %s", encoded)
	}
	if len(got.Differences) != 13 {
		t.Errorf("there are %d differences; want 13", len(got.Differences))
	}
	for i, d := range got.Differences {
		want := report.Differences[i]
		if *d.Name != want.Name || *d.Kind != string(want.Kind) || *d.Meaning == "" || *d.Count != want.Count || d.First == nil || len(d.First) != len(want.First) {
			t.Errorf("%s is encoded in %s", want.Name, encoded)
		}
	}
}

// Orders that are all finished but the first. It is to be seen that the time grows with the rows, and memory does not.
func BenchmarkRun(b *testing.B) {
	for _, orders := range []int64{1000, 1_000_000} {
		b.Run(fmt.Sprintf("orders=%d", orders), func(b *testing.B) {
			book := newBooks(b)
			book.do(`INSERT INTO orders (id, caller, user_id, amount)
				SELECT (lpad(to_hex(n), 8, '0') || '-0000-7000-8000-000000000000')::uuid, 'anonymous', 'user-456', 1000 FROM generate_series(1, $1) n`, orders)
			book.do(`INSERT INTO idempotency_keys (caller, operation, key, fingerprint, order_id, expires_at, digest)
				SELECT caller, 'PlaceOrder', id::text, sha256(''), id, now() + interval '1 hour', md5(id::text)::uuid FROM orders`)
			book.do(`INSERT INTO outbox_published (id, event_id, aggregate_id, event_type, source, payload, created_at, published_at)
				SELECT row_number() OVER (), md5(id::text)::uuid, id, 'order.created.v1', '/orders', '{}', created_at, now() - interval '1 hour'
				FROM orders WHERE id > '00000001-0000-7000-8000-000000000000'`)
			book.do(`INSERT INTO inbox (consumer, event_id, state, holder, finished_at)
				SELECT 'email', event_id, 'sent', event_id, now() FROM outbox_published`)
			for b.Loop() {
				report := book.reconcile(options)
				if report.Orders != orders || report.Sent != orders-1 || report.Missing != 1 || len(found(report)["orders_without_event"]) != 1 {
					b.Fatalf("%d orders, %d sent, and found %v", report.Orders, report.Sent, found(report))
				}
			}
		})
	}
}
