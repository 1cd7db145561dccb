package main

import (
	"context"
	"fmt"
	"time"
)

const (
	// sweepRate is at what rate orders are placed beside a sweep, and sweepSeconds for how long: about what the sweep takes.
	sweepRate, sweepSeconds = 1000, 15
	// What there is to sweep: days of the archive, with so many events each, as many that left it and are still in the inbox, and
	// idempotency keys.
	sweptDays, sweptEvents, sweptKeys = 2, 10_000, 500_000
)

// besideSweep places orders at a fixed rate beside a worker that relays them, and sweeps when what fills the tables is old.
func (l *lab) besideSweep(ctx context.Context, old bool) (s sample, err error) {
	if err := l.reset(ctx); err != nil {
		return s, err
	}
	if err := l.fillToSweep(ctx, old); err != nil {
		return s, fmt.Errorf("fill what is to be swept: %w", err)
	}
	p, err := l.start(ctx, server, database)
	if err != nil {
		return s, err
	}
	defer p.stop()
	w, err := l.start(ctx, worker, database)
	if err != nil {
		return s, err
	}
	defer w.stop()
	watched := l.watch(p)
	a, err := l.open(ctx, load{Addr: p.addr, Rate: sweepRate, Seconds: sweepSeconds, Body: body})
	if err != nil {
		return s, err
	}
	s = sampleOf(a)
	s.used = watched()
	var days, left, keys int
	err = l.pool.QueryRow(ctx, `SELECT (SELECT count(*) FROM outbox_expired), (SELECT count(*) FROM inbox),
		(SELECT count(*) FROM idempotency_keys WHERE operation = 'swept')`).Scan(&days, &left, &keys)
	switch {
	case err != nil:
	case old && days == sweptDays && left == sweptDays*sweptEvents && keys < sweptKeys:
		s.note = fmt.Sprintf("meanwhile %d days left the archive, %d events the inbox, and %d keys were deleted", sweptDays, sweptEvents, sweptKeys-keys)
	case !old && left == (sweptDays+1)*sweptEvents && keys == sweptKeys:
	default:
		err = fmt.Errorf("the sweep was not what it should be: %d tables of old events, %d events in the inbox and %d keys are left", days, left, keys)
	}
	return s, err
}

// fillToSweep fills the tables with what is old enough to be swept, or with as much that is not.
func (l *lab) fillToSweep(ctx context.Context, old bool) error {
	midnight := time.Now().UTC().Truncate(24 * time.Hour)
	finished, expires, expired := "now()", "1 day", "0" // up to when events are finished; when the keys expire; since when the table is out of the archive
	if old {
		finished, expires, expired = "'epoch'", "-1 hour", "25 hours"
	}
	do := []string{
		// What an earlier measurement left.
		`DO $$ DECLARE name text; BEGIN
			FOR name IN SELECT e.name FROM outbox_expired e LOOP EXECUTE format('DROP TABLE IF EXISTS %I', name); END LOOP;
		END $$`,
		"TRUNCATE outbox_expired",
		"UPDATE relay_state SET finished_to = " + finished,
	}
	for day := range sweptDays {
		from := midnight
		if old {
			from = midnight.AddDate(0, 0, -5-day)
			do = append(do, fmt.Sprintf("CREATE TABLE IF NOT EXISTS outbox_published_%s PARTITION OF outbox_published FOR VALUES FROM ('%s') TO ('%s')",
				from.Format("20060102"), from.Format(time.RFC3339), from.AddDate(0, 0, 1).Format(time.RFC3339)))
		}
		do = append(do, fmt.Sprintf(`INSERT INTO outbox_published (id, event_id, aggregate_id, event_type, source, payload, created_at, published_at)
			SELECT -n, gen_random_uuid(), gen_random_uuid(), 'order.created.v1', '/orders', '%s', now(), '%s'::timestamptz + n * interval '1 microsecond'
			FROM generate_series(1, %d) n`, payload, from.Add(time.Duration(day)*time.Second).Format(time.RFC3339), sweptEvents))
	}
	do = append(do,
		"CREATE TABLE outbox_expired_bench (LIKE outbox_published)",
		fmt.Sprintf("INSERT INTO outbox_expired VALUES ('outbox_expired_bench', now() - interval '%s')", expired),
		fmt.Sprintf(`INSERT INTO outbox_expired_bench (id, event_id, aggregate_id, event_type, source, payload, created_at, published_at)
			SELECT -n, gen_random_uuid(), gen_random_uuid(), 'order.created.v1', '/orders', '%s', now(), now() FROM generate_series(1, %d) n`, payload, sweptEvents),
		`INSERT INTO inbox (consumer, event_id, state, holder, finished_at)
			SELECT 'email', event_id, 'sent', event_id, now() FROM (SELECT event_id FROM outbox_published UNION ALL SELECT event_id FROM outbox_expired_bench) AS e`,
		fmt.Sprintf(`INSERT INTO idempotency_keys (digest, caller, operation, key, fingerprint, order_id, expires_at)
			SELECT gen_random_uuid(), 'anonymous', 'swept', gen_random_uuid()::text, sha256('order'), gen_random_uuid(), now() + interval '%s'
			FROM generate_series(1, %d) n`, expires, sweptKeys),
		"VACUUM ANALYZE idempotency_keys", "VACUUM ANALYZE inbox", "VACUUM ANALYZE outbox_published", "CHECKPOINT")
	return execute(ctx, l.pool, do...)
}
