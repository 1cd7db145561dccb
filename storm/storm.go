package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"idempotent-orders/internal/testbed"
)

const (
	// quietLimit is how long nothing may change after the storm before everything is done: a consumer's death leaves what it
	// held for 30 s, and what failed to be sent again and again waits for a minute. quietMost bounds the wait for a backlog.
	quietLimit, quietMost = 150 * time.Second, 15 * time.Minute
	// againAtTheEnd is how many acknowledged keys are sent once more when all is quiet.
	againAtTheEnd = 2000
	progressEvery = 10 * time.Second
)

// rage runs the storm and judges it.
func rage(ctx context.Context, o options, progress io.Writer) (result *result, err error) {
	script := draw(o.seed, o.duration, o.every)
	fmt.Fprintf(progress, "storm: seed %d, %d faults in %s; building and starting\n", o.seed, len(script), o.duration)
	l, err := openLab(ctx, o)
	keep := o.keep
	defer func() {
		keep = keep || err != nil || result.Verdict.total() > 0
		err = errors.Join(err, l.close(ctx, keep))
		if keep && l.dir != "" {
			fmt.Fprintln(progress, "storm: what the processes said is in", l.dir)
		}
	}()
	if err != nil {
		return nil, err
	}
	h := &history{}
	c := newCrowd(l, h, o.rate)
	storming, calm := context.WithTimeout(ctx, o.duration)
	defer calm()
	l.began = time.Now()
	var all sync.WaitGroup
	all.Go(func() { c.run(storming, o.seed, o.clients) })
	all.Go(func() { c.tell(storming, progress) })
	strikes := l.play(storming, script, progress)
	<-storming.Done()
	until := l.since()
	all.Wait()

	fmt.Fprintln(progress, "storm: waiting for quiet")
	judging := context.WithoutCancel(ctx)
	quiet, unfinished := l.quiet(judging)
	c.again(judging, againAtTheEnd)
	e := &evidence{keys: h.keys, strikes: strikes, until: until}
	if e.reconcile = l.reconcile(judging); e.reconcile != "" {
		e.reconcile = strings.TrimSpace(unfinished + " " + e.reconcile)
	}
	l.stopProcesses()
	if err := l.read(judging, e); err != nil {
		return nil, err
	}
	fmt.Fprintln(progress, "storm: judging")
	return newResult(o, e, judgeAll(e), quiet, l), nil
}

// play does what the script says, when it says so. A fault that takes longer than it should puts off those after it.
func (l *lab) play(ctx context.Context, script []fault, progress io.Writer) (strikes []strike) {
	for _, f := range script {
		pause(ctx, f.At-l.since())
		if ctx.Err() != nil {
			break
		}
		s := strike{fault: f, Began: l.since()}
		err := l.strike(ctx, f)
		s.Ended = l.since()
		if err != nil {
			s.Error = err.Error()
			fmt.Fprintf(progress, "storm: %s: %v\n", f, err)
		}
		strikes = append(strikes, s)
	}
	return strikes
}

// tell tells how it goes, until ctx is done.
func (c *crowd) tell(ctx context.Context, progress io.Writer) {
	for {
		pause(ctx, progressEvery)
		if ctx.Err() != nil {
			return
		}
		n := int64(0)
		for i := range c.done {
			n += c.done[i].Load()
		}
		fmt.Fprintf(progress, "storm: %s  %d calls, %d placed, %d unclear, %d wrong; %d mails\n", clock(c.lab.since()), n,
			c.done[placed].Load(), c.done[unclear].Load(), c.done[wrong].Load(), c.lab.sink.count())
	}
}

// again sends acknowledged keys once more.
func (c *crowd) again(ctx context.Context, most int) {
	var all errgroup.Group
	all.SetLimit(8)
	for i, every := 0, max(1, len(c.history.keys)/most); i < len(c.history.keys); i += every {
		k := c.history.keys[i]
		if _, body, ok := k.acknowledged(); ok {
			all.Go(func() error {
				r := rand.New(rand.NewPCG(uint64(i), 3))
				c.post(ctx, r, k, body, r.IntN(len(c.urls)), callTimeout)
				return nil
			})
		}
	}
	_ = all.Wait()
}

// quiet waits until every event is published and finished, and returns how long that took, and what was left if it did not.
func (l *lab) quiet(ctx context.Context) (took time.Duration, unfinished string) {
	const left = `SELECT (SELECT count(*) FROM outbox), (SELECT count(*) FROM outbox_held),
		(SELECT count(*) FROM outbox_published e WHERE NOT EXISTS
			(SELECT FROM inbox i WHERE i.consumer = 'email' AND i.event_id = e.event_id AND i.state <> 'received'))`
	began, changed, last := time.Now(), time.Now(), -1
	for {
		var pending, held, unsent int
		err := l.ask(ctx, func(ctx context.Context, conn *pgx.Conn) error {
			return conn.QueryRow(ctx, left).Scan(&pending, &held, &unsent)
		})
		switch {
		case err == nil && pending+held+unsent == 0:
			return time.Since(began), ""
		case err == nil && pending+held+unsent != last:
			changed, last = time.Now(), pending+held+unsent
		}
		if time.Since(changed) > quietLimit || time.Since(began) > quietMost {
			took = time.Since(began)
			return took, fmt.Sprintf("not quiet after %s: %d events pending, %d held, %d not mailed (%v).", took, pending, held, unsent, err)
		}
		pause(ctx, 200*time.Millisecond)
	}
}

// reconcile runs the program's own audit, and returns what it says against the program's work.
func (l *lab) reconcile(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, l.program, "reconcile")
	cmd.Env = testbed.Env("DATABASE_URL="+l.postgres.URL(database), "LOG_LEVEL=error")
	output, err := cmd.CombinedOutput()
	if err != nil {
		return oneLine(string(output)) + " " + err.Error()
	}
	return ""
}

// read reads what there is: orders, keys and events from the database, mails from the sink, and what the processes said.
func (l *lab) read(ctx context.Context, e *evidence) error {
	err := l.ask(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		rows, err := conn.Query(ctx, `SELECT COALESCE(o.id, k.order_id)::text, COALESCE(k.caller, ''), COALESCE(k.key, ''),
			COALESCE(o.caller, ''), COALESCE(o.user_id, ''), COALESCE(o.amount, 0)
			FROM orders o FULL JOIN idempotency_keys k ON k.order_id = o.id`)
		if err != nil {
			return err
		}
		var o dbOrder
		var id string
		if _, err := pgx.ForEachRow(rows, []any{&id, &o.caller, &o.key, &o.owner, &o.userID, &o.amount}, func() (err error) {
			o.id, err = uuid.Parse(id)
			e.orders = append(e.orders, o)
			return err
		}); err != nil {
			return err
		}
		e.events = make(map[uuid.UUID]uuid.UUID, len(e.orders))
		rows, err = conn.Query(ctx, `SELECT event_id::text, aggregate_id::text FROM outbox_published
			UNION ALL SELECT event_id::text, aggregate_id::text FROM outbox_dead
			UNION ALL SELECT event_id::text, aggregate_id::text FROM outbox_held
			UNION ALL SELECT event_id::text, aggregate_id::text FROM outbox`)
		if err != nil {
			return err
		}
		var event, order string
		_, err = pgx.ForEachRow(rows, []any{&event, &order}, func() error {
			e.events[uuid.MustParse(event)] = uuid.MustParse(order)
			return nil
		})
		return err
	})
	if err != nil {
		return fmt.Errorf("read what there is: %w", err)
	}
	e.mails, e.unclean = l.sink.taken(), l.unclean
	for _, p := range l.processes {
		e.cries = append(e.cries, p.cries()...)
	}
	return nil
}
