package worker

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/broker"
	"idempotent-orders/gen/db"
	"idempotent-orders/idempotency"
	"idempotent-orders/internal/connect"
	"idempotent-orders/internal/local"
	"idempotent-orders/internal/testenv"
	"idempotent-orders/operate"
	"idempotent-orders/order"
)

// sweeper returns a sweeper that keeps events for three days in the archive, and in the inbox no longer than it has to.
func (b *bench) sweeper() *Sweeper {
	s := NewSweeper(b.pool, b.broker, 72*time.Hour, slog.New(slog.NewTextHandler(b.log, nil)))
	s.grace = 0
	return s
}

// mustSweep does one round.
func (b *bench) mustSweep(s *Sweeper) swept {
	b.t.Helper()
	done, err := s.runOnce(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	return done
}

func (b *bench) exec(sql string, args ...any) {
	b.t.Helper()
	if _, err := b.pool.Exec(b.t.Context(), sql, args...); err != nil {
		b.t.Fatal(err)
	}
}

// day makes a partition for the day that was so many days ago, and returns its noon and its name.
func (b *bench) day(ago int) (noon time.Time, name string) {
	b.t.Helper()
	midnight := time.Now().UTC().Truncate(24*time.Hour).AddDate(0, 0, -ago)
	name = "outbox_published_" + midnight.Format("20060102")
	b.exec(fmt.Sprintf("CREATE TABLE %s PARTITION OF outbox_published FOR VALUES FROM ('%s') TO ('%s')",
		name, midnight.Format(time.RFC3339), midnight.AddDate(0, 0, 1).Format(time.RFC3339)))
	return midnight.Add(12 * time.Hour), name
}

// archived writes n events that were published from a time on, a microsecond apart, and mailed.
func (b *bench) archived(n int, at time.Time) {
	b.t.Helper()
	b.exec(`WITH published AS (
			INSERT INTO outbox_published (id, event_id, aggregate_id, event_type, source, payload, created_at, published_at)
			SELECT i, gen_random_uuid(), gen_random_uuid(), 't', 's', '{}', $2, $2::timestamptz + i * interval '1 microsecond'
			FROM generate_series(1, $1) AS i RETURNING event_id)
		INSERT INTO inbox (consumer, event_id, state, holder, received_at, finished_at)
		SELECT 'email', event_id, 'sent', gen_random_uuid(), $2, $2 FROM published`, n, at)
}

// unfinish takes the last event that was published on the day of a time out of the inbox.
func (b *bench) unfinish(at time.Time) {
	b.t.Helper()
	b.exec(`DELETE FROM inbox WHERE event_id = (SELECT event_id FROM outbox_published
		WHERE published_at < $1::timestamptz + interval '12 hours' ORDER BY published_at DESC LIMIT 1)`, at)
}

// there tells whether there is such a table.
func (b *bench) there(name string) bool {
	b.t.Helper()
	return b.count("SELECT count(to_regclass($1))", name) == 1
}

func TestADayLeavesTheArchiveWhenItIsOldAndFinished(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	older, olderName := b.day(6)
	old, oldName := b.day(5)
	young, youngName := b.day(1)
	for _, at := range []time.Time{older, old, young} {
		b.archived(3, at)
	}
	b.unfinish(old)
	s := b.sweeper()
	s.grace = expiredFor
	b.mustSweep(s)
	if b.there(olderName) || !b.there(oldName) || !b.there(youngName) {
		t.Errorf("there are %t %t %t; want all but the oldest", b.there(olderName), b.there(oldName), b.there(youngName))
	}
	if n := b.count("SELECT count(*) FROM relay_state WHERE finished_to = (SELECT max(published_at) FROM " + oldName + ")"); n != 1 {
		t.Error("the mark does not stand at the first event that is not finished")
	}
	b.exec(`INSERT INTO inbox (consumer, event_id, state, holder, finished_at, reason)
		SELECT 'email', event_id, 'dead', gen_random_uuid(), now(), 'refused' FROM ` + oldName + ` ON CONFLICT DO NOTHING`)
	b.mustSweep(s)
	if b.there(oldName) || !b.there(youngName) {
		t.Errorf("when it is finished, there are %t %t", b.there(oldName), b.there(youngName))
	}
	if n := b.count("SELECT count(*) FROM relay_state WHERE finished_to BETWEEN now() - interval '90 s' AND now() - interval '60 s'"); n != 1 {
		t.Error("with everything finished, the mark does not stand a minute ago")
	}
	if n := b.count("SELECT count(*) FROM inbox"); n != 9 {
		t.Errorf("%d events are in the inbox; want all 9, for a day", n)
	}
	if got := b.log.String(); strings.Count(got, "has left the archive") != 2 {
		t.Errorf("the log says\n%s", got)
	}
}

// What the consumer has no mail for is finished too: else nothing behind it would ever leave, and all of it would be published again
// whenever the broker forgets.
func TestAnEventOfATypeThatAsksForNoMailHoldsNothingUp(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	relay, consumer := b.relay(b.broker), b.consumer("one", b.mails)
	placed := b.place(1)
	b.announce(placed[0], "order.cancelled.v1")
	b.drain(relay, consumer)
	b.exec("UPDATE outbox_published SET published_at = now() - interval '1 hour'")
	b.mustSweep(b.sweeper())
	if n := b.count("SELECT count(*) FROM relay_state WHERE finished_to > now() - interval '2 minutes'"); n != 1 {
		t.Error("the mark stands before it")
	}
	b.exec("UPDATE relay_state SET finished_to = 'epoch'")
	b.redis.FlushAll(t.Context())
	relay.checked = time.Time{}
	b.drain(relay, consumer)
	if got := b.published(); len(got) != 0 {
		t.Errorf("%d events were published again", len(got))
	}
	b.reconciled(0)
}

func TestADayStaysThatIsNotFinishedThoughTheMarkHasPassedIt(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	at, name := b.day(5)
	b.archived(3, at)
	b.exec("UPDATE relay_state SET finished_to = now() - interval '1 minute'")
	b.unfinish(at) // as when an operator wants it mailed again
	s := b.sweeper()
	for range 2 {
		b.mustSweep(s)
	}
	if !b.there(name) {
		t.Error("the day is gone, with an event that is not finished")
	}
	b.exec("INSERT INTO inbox (consumer, event_id, state, holder, finished_at) SELECT 'email', event_id, 'sent', gen_random_uuid(), now() FROM " +
		name + " ON CONFLICT DO NOTHING")
	b.mustSweep(s)
	if b.there(name) {
		t.Error("the day is still there")
	}
}

// The sweep has seen that all is finished. Before it moves the mark, an operator opens an event behind it again.
func TestTheMarkDoesNotPassWhatIsOpenedAgainMeanwhile(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	at, _ := b.day(1)
	b.archived(2, at)
	b.exec("UPDATE relay_state SET finished_to = $1", at.Add(-time.Hour))
	b.exec("UPDATE inbox SET state = 'dead', reason = 'no mailbox'")
	q := db.New(b.pool)
	seen, err := q.GetFinishedTo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	operator := operate.Operator{Pool: b.pool, Publisher: b.broker}
	dead, err := operator.FindDead(t.Context(), operate.Filter{}, 1)
	if err != nil {
		t.Fatal(err)
	}
	if outcome, err := operator.Requeue(t.Context(), dead); err != nil || outcome.Done != 1 {
		t.Fatal(outcome, err)
	}
	if err := q.MoveFinishedTo(t.Context(), db.MoveFinishedToParams{FinishedTo: seen.Settled, Was: seen.FinishedTo}); err != nil {
		t.Fatal(err)
	}
	if n := b.count("SELECT count(*) FROM relay_state WHERE finished_to > $1", at); n != 0 {
		t.Error("the mark has passed the event that is open again")
	}
}

func TestADayStaysInTheArchiveUntilEveryGroupHasAcknowledgedWhatCameOnIt(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	at, name := b.day(5)
	b.archived(1, at)
	ctx, old := t.Context(), fmt.Sprintf("%d-1", at.UnixMilli())
	if err := b.redis.XAdd(ctx, &redis.XAddArgs{Stream: broker.Stream, ID: old, Values: []any{"id", "of that day"}}).Err(); err != nil {
		t.Fatal(err)
	}
	if err := b.redis.XGroupCreate(ctx, broker.Stream, EmailConsumer, "$").Err(); err != nil { // has finished it
		t.Fatal(err)
	}
	if err := b.redis.XGroupCreate(ctx, broker.Stream, "audit", "0").Err(); err != nil { // has read nothing
		t.Fatal(err)
	}
	s := b.sweeper()
	stays := func(when string) {
		t.Helper()
		for range 2 {
			b.mustSweep(s)
		}
		if !b.there(name) {
			t.Fatalf("the day has left the archive %s", when)
		}
	}
	stays("before the other group has read it")
	if err := b.redis.XReadGroup(ctx, &redis.XReadGroupArgs{Group: "audit", Consumer: "one", Streams: []string{broker.Stream, ">"}}).Err(); err != nil {
		t.Fatal(err)
	}
	stays("before the other group has acknowledged it")
	if n, err := b.redis.XAck(ctx, broker.Stream, "audit", old).Result(); err != nil || n != 1 {
		t.Fatal(n, err)
	}
	b.mustSweep(s)
	if b.there(name) {
		t.Error("the day is still in the archive")
	}
}

func TestAnEventStaysInTheInboxForAsLongAsItCanBeDelivered(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(3)
	b.mustRun(b.relay(b.broker), 3)
	if err := b.consumer("one", b.mails).Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.redis.XGroupCreate(t.Context(), broker.Stream, "audit", "0").Err(); err != nil { // has read nothing
		t.Fatal(err)
	}
	at, name := b.day(5)
	b.exec("UPDATE outbox_published SET published_at = $1", at)
	s := b.sweeper()
	for range 3 {
		if done := b.mustSweep(s); done.trimmed+done.forgotten != 0 {
			t.Errorf("the round did %+v", done)
		}
	}
	if b.there(name) {
		t.Error("the day is still in the archive")
	}
	// The consumer's group is lost, and everything in the stream is delivered once more.
	if err := b.redis.XGroupDestroy(t.Context(), broker.Stream, EmailConsumer).Err(); err != nil {
		t.Fatal(err)
	}
	if err := b.consumer("two", b.mails).Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := b.mails.orders(); !sameSet(got, slices.Clone(orders)) {
		t.Errorf("mails were sent for %v; want one for each of %v", got, orders)
	}
	if err := b.redis.XGroupDestroy(t.Context(), broker.Stream, "audit").Err(); err != nil {
		t.Fatal(err)
	}
	if done := b.mustSweep(s); done.trimmed != 3 || done.forgotten != 3 {
		t.Errorf("with nothing in their way, the round did %+v", done)
	}
	if n := b.count("SELECT (SELECT count(*) FROM inbox) + (SELECT count(*) FROM outbox_expired)"); n != 0 {
		t.Errorf("%d rows are left", n)
	}
	if expired := strings.Replace(name, "published", "expired", 1); b.there(expired) {
		t.Errorf("%s is still there", expired)
	}
}

func TestWhatLeftTheArchiveStaysInTheInboxForADay(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for ago := 5; ago < 7; ago++ {
		at, _ := b.day(ago)
		b.archived(3, at)
	}
	s := b.sweeper()
	s.grace = expiredFor
	for range 3 {
		b.mustSweep(s)
	}
	if n := b.count("SELECT count(*) FROM inbox"); n != 6 {
		t.Errorf("%d events are in the inbox; want 6", n)
	}
	b.exec("UPDATE outbox_expired SET expired_at = now() - interval '25 hours'")
	for range 2 {
		if done := b.mustSweep(s); done.forgotten != 3 {
			t.Errorf("a day later the round did %+v", done)
		}
	}
}

func TestTheDefaultPartitionIsSweptInBatches(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	at := time.Now().UTC().AddDate(0, 0, -10)
	b.archived(2*restBatch+500, at)
	b.archived(2, at.AddDate(0, 0, 1))
	b.unfinish(at.AddDate(0, 0, 1))
	b.archived(5, time.Now().UTC().AddDate(0, 0, -1)) // there is no partition for yesterday
	s := b.sweeper()
	if done := b.mustSweep(s); done.expired != 2*restBatch+501 || done.forgotten != 2*restBatch+501 {
		t.Errorf("the round did %+v", done)
	}
	b.exec("UPDATE relay_state SET finished_to = now() - interval '1 minute'") // past the one that is not
	if done := b.mustSweep(s); done != (swept{}) {
		t.Errorf("the next round did %+v", done)
	}
	if n := b.count("SELECT count(*) FROM outbox_published_default"); n != 6 {
		t.Errorf("%d events are in the default partition; want the unfinished and the young: 6", n)
	}
	if n := b.count("SELECT count(*) FROM inbox"); n != 5 {
		t.Errorf("%d events are in the inbox; want 5", n)
	}
	if b.there("outbox_expired_rest") {
		t.Error("the table they went by is still there")
	}
}

// keys writes n keys that expire after a time, which may be negative.
func (b *bench) keys(n int, expire time.Duration) {
	b.t.Helper()
	b.exec(`INSERT INTO idempotency_keys (digest, caller, operation, key, fingerprint, order_id, expires_at)
		SELECT gen_random_uuid(), 'c', 'o', i::text, decode(repeat('00', 32), 'hex'), gen_random_uuid(), now() + $2::interval
		FROM generate_series(1, $1) AS i`, n, expire)
}

func TestExpiredKeysAreDeletedAndNoOthers(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.keys(100, time.Hour)
	b.keys(3000, -time.Hour)
	b.keys(100, -30*time.Second) // just now
	b.keys(100, time.Minute)
	writer, err := b.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Rollback(context.Background())
	_, err = writer.Exec(t.Context(), "SELECT FROM idempotency_keys WHERE expires_at < now() - interval '1 minute' LIMIT 1 FOR UPDATE")
	if err != nil {
		t.Fatal(err)
	}
	s := b.sweeper()
	if done := b.mustSweep(s); done.keys != 2999 {
		t.Errorf("the round did %+v; want all but the one that somebody is writing", done)
	}
	if err := writer.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if done := b.mustSweep(s); done.keys != 1 {
		t.Errorf("the next round did %+v", done)
	}
	if n := b.count("SELECT count(*) FROM idempotency_keys"); n != 300 {
		t.Errorf("%d keys are left; want 300", n)
	}
}

func TestTheKeysOfALargeTableAreDeletedInManyRounds(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.keys(5000, -time.Hour)
	s := b.sweeper()
	s.jobTime = 0 // a step
	first := b.mustSweep(s)
	if first.keys == 0 || first.keys > 1000 || !first.more {
		t.Errorf("the first round did %+v", first)
	}
	total := first
	for rounds := 0; total.keys < 5000 && rounds < 100; rounds++ {
		total.add(b.mustSweep(s))
	}
	if n := b.count("SELECT count(*) FROM idempotency_keys"); n != 0 || total.keys != 5000 {
		t.Errorf("%d keys are left, and %+v was done", n, total)
	}
	b.keys(10, -time.Hour) // where the first were
	for rounds := 0; total.keys < 5010 && rounds < 100; rounds++ {
		total.add(b.mustSweep(s))
	}
	if total.keys != 5010 {
		t.Errorf("after the end the walk does not begin again: %+v", total)
	}
}

func TestALargeDayIsLookedAtInManyRounds(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	at, name := b.day(5)
	b.archived(3*sweepBatch+10, at)
	s := b.sweeper()
	s.jobTime = 0
	for rounds := 0; b.there(name); rounds++ {
		if rounds == 50 {
			t.Fatal("it never leaves the archive")
		}
		b.mustSweep(s)
	}
}

func TestASweepRestsLongerThanItWorksAndLessWhenItIsBehind(t *testing.T) {
	t.Parallel()
	s := NewSweeper(nil, nil, time.Hour, nil)
	for _, c := range []struct {
		behind int // rounds
		rests  time.Duration
	}{{0, restMost}, {1, restMost - 1}, {100, restLeast}} {
		s.pace(false)
		for range c.behind {
			s.pace(true)
		}
		if s.rests != c.rests {
			t.Errorf("after %d rounds that were not done in time it rests %d times as long as it works; want %d", c.behind, s.rests, c.rests)
		}
		var worked time.Duration
		steps, begun := 0, time.Now()
		err := s.steps(t.Context(), &swept{}, func(context.Context) (bool, error) {
			if steps++; steps == 5 { // after which there is no rest
				return true, nil
			}
			began := time.Now()
			for time.Since(began) < time.Millisecond {
			}
			worked += time.Since(began)
			return false, nil
		})
		if took := time.Since(begun); err != nil || took < (1+c.rests)*worked {
			t.Errorf("%s of work took %s, %v; want %d times as long", worked, took, err, 1+c.rests)
		}
	}
}

func TestOneSweepsAtATime(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.keys(3000, -time.Hour)
	other, err := b.pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer other.Release()
	if _, err := other.Exec(t.Context(), "SELECT pg_advisory_lock($1)", sweepLock); err != nil {
		t.Fatal(err)
	}
	if done := b.mustSweep(b.sweeper()); done != (swept{}) {
		t.Errorf("while another sweeps, the round did %+v", done)
	}
	if _, err := other.Exec(t.Context(), "SELECT pg_advisory_unlock($1)", sweepLock); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var total swept
	var sweepers sync.WaitGroup
	for range 4 {
		sweepers.Go(func() {
			done, err := b.sweeper().runOnce(t.Context())
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			total.add(done)
		})
	}
	sweepers.Wait()
	if total.keys != 3000 {
		t.Errorf("together they did %+v", total)
	}
	if n := b.count("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"); n != 0 {
		t.Errorf("%d locks are left", n)
	}
}

func TestASweeperThatIsStoppedLeavesItsTurn(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.keys(20_000, -time.Hour)
	s := b.sweeper()
	stop := b.start(s.Run)
	b.eventually("it is at work", func() bool { return b.count("SELECT count(*) FROM idempotency_keys") < 20_000 })
	stop()
	b.eventually("the turn is free, and another finishes", func() bool {
		b.mustSweep(b.sweeper())
		return b.count("SELECT count(*) FROM idempotency_keys") == 0
	})
}

func TestWhoReadsTheArchiveHoldsUpTheSweepAndTheSweepHoldsUpNobody(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	at, name := b.day(5)
	b.archived(3, at)
	b.keys(10, -time.Hour)
	reader, err := b.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Rollback(context.Background())
	if _, err := reader.Exec(t.Context(), "SELECT count(*) FROM outbox_published"); err != nil {
		t.Fatal(err)
	}
	s := b.sweeper()
	done, err := s.runOnce(t.Context())
	if err == nil || !strings.Contains(err.Error(), "lock timeout") || done.keys != 10 {
		t.Errorf("under a reader the round did %+v, %v; want the keys, and to have waited no longer than a lock timeout", done, err)
	}
	b.place(2)
	b.mustRun(b.relay(b.broker), 2)
	if err := reader.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.mustSweep(s)
	if b.there(name) {
		t.Error("the day is still there")
	}
}

func TestADayLeavesTheArchiveWhileNoRelayIsAtWorkThere(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	at, name := b.day(5)
	b.archived(3, at)
	relay, err := b.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer relay.Rollback(context.Background())
	if _, err := relay.Exec(t.Context(), "SELECT pg_advisory_xact_lock($1)", turnLock); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { _, err := b.sweeper().runOnce(t.Context()); ended <- err }()
	b.eventually("the sweep waits for the turn", func() bool {
		return b.count(`SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted
			AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`) == 1
	})
	if n := b.count("SELECT count(*) FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND relation = 'outbox_published'::regclass"); n != 0 {
		t.Error("it stands in the way of the relay that it waits for")
	}
	if err := relay.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil || b.there(name) {
		t.Errorf("afterwards the day is there: %t, %v", b.there(name), err)
	}
}

func TestOrdersArePlacedAndMailedWhileEverythingIsSwept(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for ago := 5; ago < 9; ago++ {
		at, _ := b.day(ago)
		b.archived(50, at)
	}
	relay := b.relay(b.broker)
	b.start(relay.Run)
	b.start(b.consumer("one", b.mails).Run)
	ctx, cancel := context.WithCancel(t.Context())
	var sweepers sync.WaitGroup
	for range 2 {
		s := b.sweeper()
		sweepers.Go(func() {
			for ctx.Err() == nil {
				done, err := s.runOnce(ctx)
				if err != nil && ctx.Err() == nil && !strings.Contains(err.Error(), "lock timeout") {
					t.Error(err)
				}
				if done == (swept{}) {
					time.Sleep(time.Millisecond) // it is the other's turn
				}
			}
		})
	}
	var mu sync.Mutex
	var orders []uuid.UUID
	var clients sync.WaitGroup
	for c := range 4 {
		clients.Go(func() {
			for i := range 100 {
				// Each key has a row that expired long ago: the sweep deletes it, or the order takes it over.
				key := idempotency.Key{Caller: "anonymous", Operation: order.Operation, Value: fmt.Sprint(c, i)}
				b.exec(`INSERT INTO idempotency_keys (digest, caller, operation, key, fingerprint, order_id, expires_at)
					VALUES ($1, 'anonymous', $2, $3, decode(repeat('00', 32), 'hex'), gen_random_uuid(), now() - interval '1 hour')`,
					key.Digest(), key.Operation, key.Value)
				placed, err := b.orders.Place(order.Send{Key: key, Draft: order.Draft{UserID: "u", Amount: 1}})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				orders = append(orders, placed.OrderID)
				mu.Unlock()
			}
		})
	}
	clients.Wait()
	b.eventually("every order is mailed", func() bool { return len(b.mails.orders()) == len(orders) })
	b.eventually("every old day is gone", func() bool {
		return b.count("SELECT count(*) FROM pg_inherits WHERE inhparent = 'outbox_published'::regclass") == daysAhead+2
	})
	b.eventually("its events have left the inbox", func() bool { return b.count("SELECT count(*) FROM inbox") == len(orders) })
	cancel()
	sweepers.Wait()
	b.reconciled(0)
	if got := b.mails.orders(); !sameSet(got, orders) {
		t.Errorf("mails were sent for %d orders; want one for each of %d", len(got), len(orders))
	}
	if n := b.count("SELECT count(*) FROM idempotency_keys WHERE expires_at > now()"); n != len(orders) {
		t.Errorf("%d keys hold; want %d", n, len(orders))
	}
}

// streams returns the bench's broker on redis-server, and one on the Redis in process.
func streams(t *testing.T) map[string]redis.UniversalClient {
	t.Helper()
	server, _ := testenv.Redis(t)
	addr, stop, err := local.StartMiniredis()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	inProcess := connect.Redis([]string{addr}, "")
	t.Cleanup(func() { inProcess.Close() })
	return map[string]redis.UniversalClient{"redis-server": server, "in process": inProcess}
}

func TestTheStreamIsTrimmedBelowWhatEveryGroupHasAcknowledged(t *testing.T) {
	t.Parallel()
	for name, rdb := range streams(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			streams := broker.NewRedisStreams(rdb)
			trimmed := func(what string, want int64) {
				t.Helper()
				if n, err := streams.Trim(t.Context(), EmailConsumer); n != want || err != nil {
					t.Errorf("%s: trimmed %d, %v; want %d", what, n, err, want)
				}
			}
			trimmed("without a stream", 0)
			const events = 500
			if _, err := streams.Epoch(t.Context()); err != nil { // its mark is a group too
				t.Fatal(err)
			}
			batch := make([]broker.Event, events)
			for i := range batch {
				batch[i] = broker.Event{ID: uuid.New(), Source: "s", Type: "t", Subject: "o", Time: time.Now(), Data: []byte("{}")}
			}
			if err := streams.Publish(t.Context(), broker.AnyEpoch, batch); err != nil {
				t.Fatal(err)
			}
			receive := func(group string, n int) []broker.Delivery {
				t.Helper()
				received, err := streams.Subscribe(group, "one", time.Hour).Receive(t.Context(), n, 0)
				if err != nil || len(received) != n {
					t.Fatalf("%s received %d, %v; want %d", group, len(received), err, n)
				}
				return received
			}
			ack := func(group string, deliveries []broker.Delivery) {
				t.Helper()
				var tags []string
				for _, d := range deliveries {
					tags = append(tags, d.Tag)
				}
				if err := streams.Subscribe(group, "one", time.Hour).Ack(t.Context(), tags); err != nil {
					t.Fatal(err)
				}
			}
			audit := receive("audit", 250)
			ack("audit", audit)
			trimmed("before the consumer has come", 0)
			email := receive(EmailConsumer, 400)
			trimmed("with the first pending", 0)
			ack(EmailConsumer, slices.Concat(email[:120], email[121:300]))
			trimmed("up to the first pending", 120)
			ack(EmailConsumer, email[120:121])
			trimmed("up to what the other group has read", 130)
			trimmed("again", 0)
			if oldest, err := streams.Oldest(t.Context()); err != nil || time.Since(oldest).Abs() > time.Minute {
				t.Errorf("the oldest entry is of %v, %v", oldest, err)
			}
			// What was not read, and what was read and is pending, is all there.
			rest := receive("audit", 250)
			if rest[0].Event.ID != batch[250].ID || rest[249].Event.ID != batch[499].ID {
				t.Error("the group that lags does not receive what follows")
			}
			ack("audit", rest)
			trimmed("up to what is pending", 50)
			ack(EmailConsumer, email[300:])
			trimmed("up to what is not read", 100)
			last := receive(EmailConsumer, 100)
			if last[0].Event.ID != batch[400].ID {
				t.Error("the consumer does not receive what follows")
			}
			ack(EmailConsumer, last)
			trimmed("when all is acknowledged", 100)
			if oldest, err := streams.Oldest(t.Context()); err != nil || !oldest.IsZero() {
				t.Errorf("in an empty stream the oldest entry is of %v, %v", oldest, err)
			}
			if epoch, err := rdb.XInfoGroups(t.Context(), broker.Stream).Result(); err != nil || len(epoch) != 3 {
				t.Errorf("the groups are %v, %v", epoch, err)
			}
		})
	}
}

func TestTrimmingWhileEventsFlowLosesNone(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	relay := b.relay(b.broker)
	b.start(relay.Run)
	b.start(b.consumer("one", b.mails).Run)
	b.start(b.consumer("two", b.mails).Run)
	b.start(func(ctx context.Context) {
		for ctx.Err() == nil {
			if _, err := b.broker.Trim(ctx, EmailConsumer); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
		}
	})
	orders := b.place(200)
	b.eventually("every mail is marked", func() bool { return b.count("SELECT count(*) FROM inbox WHERE state = 'sent'") == 200 })
	b.eventually("the stream is empty", func() bool { return b.redis.XLen(t.Context(), broker.Stream).Val() == 0 })
	b.settled(orders)
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
