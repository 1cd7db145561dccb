package reconcile

// horizon returns now, and the time from which on every event that was published is still in the archive. Retention takes a
// day out of it only when every event of the day is finished, oldest first: nothing is gone that was published after finished_to, or
// since the oldest day that is left began.
const horizon = `
SELECT now(), COALESCE(LEAST((SELECT finished_to FROM relay_state), outbox_oldest_day_ends() - interval '24 hours'), 'epoch')`

const totals = `
SELECT (SELECT count(*) FROM orders WHERE created_at >= @from AND created_at < @to),
       (SELECT count(*) FROM orders WHERE created_at >= @from AND created_at < LEAST(@to, @kept_from::timestamptz)),
       (SELECT count(*) FROM outbox_published e JOIN inbox i ON i.event_id = e.event_id
        WHERE i.consumer = @consumer AND i.state = 'sent' AND e.event_type = @type AND e.created_at >= @from AND e.created_at < @to)`

// counted returns how many ids a query finds, and the first of them. What it finds is written down by PostgreSQL, in a file when
// it is much.
const counted = `
WITH found AS MATERIALIZED (%s)
SELECT count(*), ARRAY(SELECT id FROM found ORDER BY id LIMIT @limit::bigint) FROM found`

// events are all events, wherever they are.
const events = `(
    SELECT event_id, aggregate_id, event_type, created_at FROM outbox UNION ALL
    SELECT event_id, aggregate_id, event_type, created_at FROM outbox_held UNION ALL
    SELECT event_id, aggregate_id, event_type, created_at FROM outbox_published UNION ALL
    SELECT event_id, aggregate_id, event_type, created_at FROM outbox_dead)`

// An event has its order's created_at, so both are selected by the same range. What has lost its order or its event is placed
// in time by what it still has: a key by its own created_at, an inbox row by the time in the event's id.
const (
	orderInRange = `o.created_at >= @from AND o.created_at < @to`
	eventInRange = `e.event_type = @type AND e.created_at >= @from AND e.created_at < @to`
)

// checks are the differences, in the order in which they are shown. Each query returns ids as id.
var checks = []struct {
	name    string
	kind    Kind
	meaning string
	query   string
}{
	{"orders_without_event", Missing, "orders without an event", `
		SELECT o.id FROM orders o
		WHERE ` + orderInRange + ` AND o.created_at >= @kept_from
		  AND NOT EXISTS (SELECT FROM ` + events + ` e WHERE e.aggregate_id = o.id AND e.event_type = @type)`},
	{"events_without_order", Missing, "events without an order", `
		SELECT e.event_id AS id FROM ` + events + ` e
		WHERE ` + eventInRange + ` AND NOT EXISTS (SELECT FROM orders o WHERE o.id = e.aggregate_id)`},
	{"orders_with_several_events", Missing, "orders with more than one event", `
		SELECT o.id FROM orders o JOIN ` + events + ` e ON e.aggregate_id = o.id
		WHERE ` + orderInRange + ` AND e.event_type = @type
		GROUP BY o.id HAVING count(*) > 1`},
	{"events_not_delivered", Missing, "events published more than a minute ago that the consumer has not received", `
		SELECT e.event_id AS id FROM outbox_published e
		WHERE ` + eventInRange + ` AND e.published_at <= @settled
		  AND NOT EXISTS (SELECT FROM inbox i WHERE i.consumer = @consumer AND i.event_id = e.event_id)`},
	{"inbox_without_event", Missing, "events in the consumer's inbox that are nowhere else", `
		SELECT i.event_id AS id FROM inbox i
		WHERE i.consumer = @consumer AND i.event_id >= @since_id AND i.event_id < @to_id
		  AND NOT EXISTS (SELECT FROM ` + events + ` e WHERE e.event_id = i.event_id)`},
	{"orders_without_key", Missing, "orders younger than IDEMPOTENCY_RETENTION without a key that answers", `
		SELECT o.id FROM orders o
		WHERE ` + orderInRange + ` AND o.created_at >= @keyed_since
		  AND NOT EXISTS (SELECT FROM idempotency_keys k WHERE k.order_id = o.id AND k.expires_at > now())`},
	{"keys_without_order", Missing, "idempotency keys without their order, by the order's id", `
		SELECT k.order_id AS id FROM idempotency_keys k
		WHERE k.operation = @operation AND k.created_at >= @from AND k.created_at < @to
		  AND NOT EXISTS (SELECT FROM orders o WHERE o.id = k.order_id)`},
	{"pending", Unfinished, "events waiting in the outbox", `
		SELECT e.event_id AS id FROM outbox e WHERE ` + eventInRange},
	{"held", Unfinished, "events held back: refused and to be tried again, behind one that is, or parked", `
		SELECT e.event_id AS id FROM outbox_held e WHERE ` + eventInRange},
	{"just_published", Unfinished, "events published within the last minute that the consumer has not received", `
		SELECT e.event_id AS id FROM outbox_published e
		WHERE ` + eventInRange + ` AND e.published_at > @settled
		  AND NOT EXISTS (SELECT FROM inbox i WHERE i.consumer = @consumer AND i.event_id = e.event_id)`},
	{"received", Unfinished, "events the consumer has received and not finished", `
		SELECT e.event_id AS id FROM outbox_published e JOIN inbox i ON i.event_id = e.event_id
		WHERE ` + eventInRange + ` AND i.consumer = @consumer AND i.state = 'received'`},
	{"dead_at_publisher", Dead, "events the broker refused for good", `
		SELECT e.event_id AS id FROM outbox_dead e WHERE ` + eventInRange},
	{"dead_at_consumer", Dead, "events the consumer gave up", `
		SELECT e.event_id AS id FROM outbox_published e JOIN inbox i ON i.event_id = e.event_id
		WHERE ` + eventInRange + ` AND i.consumer = @consumer AND i.state = 'dead'`},
}
