package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"idempotent-orders/broker"
)

const (
	deliveryRate     = 1000 // orders a second
	deliveryRateMost = 5000
	redriven         = 100_000 // events that Redis forgets
	// redisAway is so long that worker and consumer wait as long as they ever do before they try again.
	redisAway = 5 * time.Second
)

// delay measures from an order's commit until its event is in the stream, to a millisecond: so the times of entries are. Server and
// worker are processes of their own.
func (l *lab) delay(ctx context.Context, rate int) (s sample, err error) {
	p, err := l.fresh(ctx, server)
	if err != nil {
		return s, err
	}
	defer p.stop()
	// A group that acknowledges nothing: without it the stream would be trimmed.
	if err := l.rdb.XGroupCreateMkStream(ctx, broker.Stream, "bench", "0").Err(); err != nil {
		return s, err
	}
	w, err := l.start(ctx, worker, database)
	if err != nil {
		return s, err
	}
	defer w.stop()
	watched := l.watch(w)
	a, err := l.open(ctx, load{Addr: p.addr, Rate: rate, Seconds: l.seconds, Body: body})
	if err != nil {
		return s, err
	}
	s = sampleOf(a)
	s.used = watched()
	placed, err := count(ctx, l.pool, "SELECT count(*) FROM orders")
	if err != nil {
		return s, err
	}
	if _, err := l.awaitStream(ctx, w, placed); err != nil {
		return s, err
	}
	sinceCommit, sinceBegun, err := l.delays(ctx)
	if err != nil {
		return s, err
	}
	if len(sinceCommit) == 0 {
		return s, errors.New("nothing came to the stream after the warm-up")
	}
	s.p50, s.p99 = sinceCommit[len(sinceCommit)/2], sinceCommit[len(sinceCommit)*99/100]
	s.note = fmt.Sprintf("from the begin of the statement %.1f and %.1f ms", sinceBegun[len(sinceBegun)/2]/1000, sinceBegun[len(sinceBegun)*99/100]/1000)
	return s, nil
}

// delays returns how long each event in the stream took to get there, in microseconds, from its order's commit and from when
// the statement began that placed it, the shortest first; but for those of the generator's warm-up, which lasts a second.
func (l *lab) delays(ctx context.Context) (sinceCommit, sinceBegun []float64, err error) {
	committed := map[string]time.Time{}
	var warm time.Time
	if err := l.pool.QueryRow(ctx, "SELECT min(created_at) + interval '1 second' FROM orders").Scan(&warm); err != nil {
		return nil, nil, err
	}
	var order string
	var at time.Time
	// The time in a commit's record, which PostgreSQL takes before it writes that out.
	rows, err := l.pool.Query(ctx, "SELECT id::text, pg_xact_commit_timestamp(xmin) FROM orders")
	if err == nil {
		_, err = pgx.ForEachRow(rows, []any{&order, &at}, func() error { committed[order] = at; return nil })
	}
	if err != nil {
		return nil, nil, err
	}
	const page = 10_000
	for from := "-"; ; {
		entries, err := l.rdb.XRangeN(ctx, broker.Stream, from, "+", page).Result()
		if err != nil {
			return nil, nil, err
		}
		for _, e := range entries {
			ms, _, _ := strings.Cut(e.ID, "-")
			added, err := strconv.ParseInt(ms, 10, 64)
			if err != nil {
				return nil, nil, err
			}
			begun, err := time.Parse(time.RFC3339Nano, fmt.Sprint(e.Values["time"]))
			if err != nil {
				return nil, nil, err
			}
			commit, known := committed[fmt.Sprint(e.Values["subject"])]
			if !known {
				return nil, nil, fmt.Errorf("the stream has an event of an order that is not there: %v", e.Values)
			}
			from = "(" + e.ID
			if begun.Before(warm) {
				continue
			}
			since := func(then time.Time) float64 { return float64(time.UnixMilli(added).Sub(then).Microseconds()) }
			sinceCommit, sinceBegun = append(sinceCommit, since(commit)), append(sinceBegun, since(begun))
		}
		if len(entries) < page {
			slices.Sort(sinceCommit)
			slices.Sort(sinceBegun)
			return sinceCommit, sinceBegun, nil
		}
	}
}

// redrive has Redis lose events that were published and not mailed, and waits until each is mailed all the same. It measures from when
// Redis answers again.
func (l *lab) redrive(ctx context.Context) (s sample, err error) {
	if err := l.reset(ctx); err != nil {
		return s, err
	}
	if err := l.fillOutbox(ctx, redriven); err != nil {
		return s, err
	}
	w, err := l.start(ctx, worker, database)
	if err != nil {
		return s, err
	}
	defer w.stop()
	if _, err := l.awaitStream(ctx, w, redriven); err != nil {
		return s, err
	}
	if err := pause(ctx, 2*time.Second); err != nil { // the last of them is committed, and the worker knows the stream
		return s, err
	}
	c, err := l.start(ctx, consumer, database)
	if err != nil {
		return s, err
	}
	defer c.stop()
	if err := l.awaitMails(ctx, c, 1); err != nil { // it does not start without Redis
		return s, err
	}
	if err := l.loseRedis(ctx, redisAway); err != nil {
		return s, err
	}
	back := time.Now()
	watched := l.watch(w)
	before, err := count(ctx, l.pool, "SELECT count(*) FROM inbox WHERE state = 'sent'")
	if err != nil {
		return s, err
	}
	if _, err := l.awaitStream(ctx, w, 1); err != nil {
		return s, err
	}
	begun := time.Since(back)
	if err := l.awaitMails(ctx, c, redriven); err != nil {
		return s, err
	}
	s.rate, s.used = time.Since(back).Seconds(), watched()
	s.note = fmt.Sprintf("begins after %.1f s; %d were mailed before Redis was back", begun.Seconds(), before)
	return s, nil
}

// awaitMails waits until the consumer has marked as many mails sent.
func (l *lab) awaitMails(ctx context.Context, c *process, mails int) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		sent, err := count(ctx, l.pool, "SELECT count(*) FROM inbox WHERE state = 'sent'")
		if err != nil {
			return fmt.Errorf("wait for %d mails: %w", mails, err)
		}
		if sent >= mails {
			return nil
		}
		select {
		case <-c.exited:
			return fmt.Errorf("after %d of %d mails the consumer ended: %s", sent, mails, lastLine(c.said.Bytes()))
		case <-time.After(50 * time.Millisecond):
		}
	}
}
