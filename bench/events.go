package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"idempotent-orders/broker"
)

// drain fills the outbox, starts a worker, and follows the stream until everything is in it.
func (l *lab) drain(ctx context.Context, events int, held bool) (s sample, err error) {
	if err := l.reset(ctx); err != nil {
		return s, err
	}
	if held {
		release, err := l.holdSnapshot(ctx)
		if err != nil {
			return s, err
		}
		defer release()
	}
	if err := l.fillOutbox(ctx, events); err != nil {
		return s, err
	}
	p, err := l.start(ctx, worker, database)
	if err != nil {
		return s, err
	}
	defer p.stop()
	watched := l.watch(p)
	if s.rate, err = l.followStream(ctx, p, events); err != nil {
		return s, err
	}
	s.used = watched()
	if events > drained { // what does an empty poll cost above so many dead rows?
		u, err := l.watchIdle(ctx, p, idleFor/2)
		if err != nil {
			return s, err
		}
		s.note = fmt.Sprintf("idle after it, for %s: worker %.1f %%, PostgreSQL %.1f %% of a core", idleFor/2, 100*u.contender, 100*u.postgres)
	}
	p.stop()
	left, err := count(ctx, l.pool, "SELECT count(*) FROM outbox")
	if err == nil && left > 0 {
		err = fmt.Errorf("%d events are left in the outbox", left)
	}
	return s, err
}

func (l *lab) fillOutbox(ctx context.Context, events int) error {
	if err := execute(ctx, l.pool, fmt.Sprintf(`INSERT INTO outbox (event_id, aggregate_id, event_type, source, payload)
		SELECT gen_random_uuid(), gen_random_uuid(), 'order.created.v1', '/orders', '%s' FROM generate_series(1, %d)`, payload, events), "CHECKPOINT"); err != nil {
		return fmt.Errorf("fill the outbox: %w", err)
	}
	return nil
}

// holdSnapshot opens a transaction elsewhere, under which nothing that dies from now on is vacuumed.
func (l *lab) holdSnapshot(ctx context.Context) (release func(), err error) {
	conn, err := pgx.Connect(ctx, l.postgres.URL(database))
	if err != nil {
		return nil, err
	}
	release = func() { _ = conn.Close(context.WithoutCancel(ctx)) }
	if _, err = conn.Exec(ctx, "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1"); err != nil {
		release()
		return nil, fmt.Errorf("hold a snapshot: %w", err)
	}
	return release, nil
}

// followStream returns how fast the stream grows, from the first events that are seen in it to the last.
func (l *lab) followStream(ctx context.Context, p *process, events int) (rate float64, err error) {
	first, err := l.awaitStream(ctx, p, 1)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	last, err := l.awaitStream(ctx, p, events)
	return float64(last-first) / time.Since(start).Seconds(), err
}

// awaitStream waits until there are as many entries in the stream, and returns how many it has then.
func (l *lab) awaitStream(ctx context.Context, p *process, entries int) (n int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute+time.Duration(entries/2000)*time.Second)
	defer cancel()
	for n < int64(entries) {
		if n, err = l.rdb.XLen(ctx, broker.Stream).Result(); err != nil {
			return 0, fmt.Errorf("after %d of %d events: %w", n, entries, err)
		}
		select {
		case <-p.exited:
			return 0, fmt.Errorf("the worker ended: %s", lastLine(p.said.Bytes()))
		case <-time.After(2 * time.Millisecond):
		}
	}
	return n, nil
}

// endToEnd places orders and waits until the last of them is mailed.
func (l *lab) endToEnd(ctx context.Context) (s sample, err error) {
	p, err := l.fresh(ctx, everything)
	if err != nil {
		return s, err
	}
	defer p.stop()
	watched := l.watch(p)
	var start, end time.Time
	if err := l.pool.QueryRow(ctx, "SELECT clock_timestamp()").Scan(&start); err != nil {
		return s, err
	}
	a, err := l.closed(ctx, load{Addr: p.addr, Connections: clientsMany, Seconds: l.seconds, Body: body})
	if err != nil {
		return s, err
	}
	s = sampleOf(a)
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	var orders, sent int
	for orders == 0 || sent < orders {
		if err := l.pool.QueryRow(ctx, `SELECT (SELECT count(*) FROM orders), count(*), coalesce(max(finished_at), now())
			FROM inbox WHERE state = 'sent'`).Scan(&orders, &sent, &end); err != nil {
			return s, fmt.Errorf("after %d mails for %d orders: %w", sent, orders, err)
		}
		select {
		case <-p.exited:
			return s, fmt.Errorf("it ended: %s", lastLine(p.said.Bytes()))
		case <-time.After(100 * time.Millisecond):
		}
	}
	s.used = watched()
	s.note = fmt.Sprintf("accepted %.0f orders/s", s.rate)
	s.rate = float64(orders) / end.Sub(start).Seconds()
	return s, nil
}

// idle measures what all of the project costs when there is nothing to do.
func (l *lab) idle(ctx context.Context) (s sample, err error) {
	p, err := l.fresh(ctx, everything)
	if err != nil {
		return s, err
	}
	defer p.stop()
	if s.used, err = l.watchIdle(ctx, p, idleFor); err != nil {
		return s, err
	}
	if s.used.contender < 0 {
		return s, errors.New("this system does not tell what a process uses")
	}
	s.rate = 100 * s.used.contender
	s.note = fmt.Sprintf("meanwhile PostgreSQL %.2f %%, Redis %.2f %%", 100*s.used.postgres, 100*s.used.redis)
	return s, nil
}

// watchIdle watches a process that has nothing to do, after it has settled.
func (l *lab) watchIdle(ctx context.Context, p *process, duration time.Duration) (usage, error) {
	if err := pause(ctx, 2*time.Second); err != nil {
		return usage{}, err
	}
	watched := l.watch(p)
	err := pause(ctx, duration)
	return watched(), err
}

// pause returns ctx's error when ctx ends before the duration does.
func pause(ctx context.Context, duration time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(duration):
		return nil
	}
}
