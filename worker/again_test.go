package worker

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/broker"
	"idempotent-orders/gen/db"
	"idempotent-orders/internal/testenv"
)

// forgets is what can make a Redis forget. Each is told what Redis shall still know, and returns how to have it forget the rest.
var forgets = map[string]func(b *bench) func(){
	"it is flushed":         func(b *bench) func() { return func() { b.redis.FlushAll(b.t.Context()) } },
	"the stream is deleted": func(b *bench) func() { return func() { b.redis.Del(b.t.Context(), broker.Stream) } },
	"the stream is put back as it was": func(b *bench) func() {
		kept := b.redis.Dump(b.t.Context(), broker.Stream).Val()
		return func() { b.redis.RestoreReplace(b.t.Context(), broker.Stream, 0, kept) }
	},
	"the stream is trimmed of what nobody has read": func(b *bench) func() {
		return func() { b.redis.XTrimMaxLen(b.t.Context(), broker.Stream, 0) }
	},
	"it is killed, and is empty": func(b *bench) func() {
		return func() { b.server.Kill(); b.server.Forget(); b.startRedis() }
	},
	"it is killed, and has an old dump": func(b *bench) func() {
		b.server.Kill()
		restore := b.server.Keep()
		b.startRedis()
		return func() { b.server.Kill(); restore(); b.startRedis() }
	},
}

// startRedis starts the Redis that was killed, and waits for it.
func (b *bench) startRedis() {
	b.t.Helper()
	b.server.Start()
	b.eventually("Redis is back", func() bool { return b.redis.Ping(b.t.Context()).Err() == nil })
}

func TestWhatRedisForgotIsPublishedAgainAndMailedOnce(t *testing.T) {
	t.Parallel()
	for name, prepare := range forgets {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			relay, consumer := b.relay(b.broker), b.consumer("one", b.mails)
			b.place(10)
			b.drain(relay, consumer) // these are finished
			forget := prepare(b)
			lost := b.place(25)
			b.publish(relay)
			forget()
			want := append(b.published(), lost...)
			want = append(want, b.place(5)...)
			relay.checked = time.Time{}
			b.drain(relay, consumer)
			if got := b.published(); !slices.Equal(got, want) {
				t.Errorf("published %d again, then new ones: %v; want %d: %v", len(got), got, len(want), want)
			}
			b.finished(40)
			b.reconciled(0)
			if !strings.Contains(b.log.String(), "may have forgotten") || !strings.Contains(b.log.String(), "is published again") {
				t.Errorf("nobody was told: %s", b.log)
			}
		})
	}
}

// publish has the relay publish what there is, whatever it meets at first: after Redis was started again, its old connections.
func (b *bench) publish(relay *Relay) {
	b.t.Helper()
	b.eventually("the relay publishes", func() bool { return relay.Drain(b.t.Context()) == nil })
}

func TestWhatIsTrimmedAfterItsReaderDiedIsPublishedAgain(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	relay := b.relay(b.broker)
	b.place(3)
	b.mustRun(relay, 3)
	if got, err := b.broker.Subscribe(EmailConsumer, "gone", time.Hour).Receive(t.Context(), 10, 0); err != nil || len(got) != 3 {
		t.Fatal(got, err)
	}
	if err := b.redis.XTrimMaxLen(t.Context(), broker.Stream, 0).Err(); err != nil {
		t.Fatal(err)
	}
	relay.checked = time.Time{}
	b.drain(relay, b.consumer("one", b.mails))
	b.finished(3)
	b.reconciled(0)
}

func TestAnotherRelayGoesOnPublishingAgain(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	first, second := b.relay(b.broker), b.relay(b.broker)
	const events = 2*redriveSlice + 10
	b.fill(events)
	if err := first.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := b.published()
	b.redis.FlushAll(t.Context())
	b.fill(1)
	first.checked = time.Time{}
	b.mustRun(first, redriveSlice) // and dies
	b.mustRun(second, redriveSlice)
	b.mustRun(second, 10)
	b.mustRun(second, 1) // what is new comes last
	if got := b.published(); len(got) != events+1 || !slices.Equal(got[:events], before) {
		t.Errorf("published %d events again, or in another order; want %d and one new", len(got), events)
	}
}

func TestARestartOfRedisThatLosesNothingMailsNothingTwice(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	relay, consumer := b.relay(b.broker), b.consumer("one", b.mails)
	b.place(3)
	b.drain(relay, consumer)
	b.place(3)
	if err := relay.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.server.Kill()
	b.server.Start()
	b.eventually("Redis is back", func() bool { return b.redis.Ping(t.Context()).Err() == nil })
	relay.checked = time.Time{}
	b.drain(relay, consumer)
	b.finished(6)
	b.reconciled(0)
}

// Of 10,000 draws from the whole range, a tenth of it has 1,000, give or take 30.
func TestARefusedEventWaitsARandomTimeOfARangeThatDoublesUpToAMinute(t *testing.T) {
	t.Parallel()
	const draws = 10_000
	for attempts, longest := range map[int32]time.Duration{
		1: 500 * time.Millisecond, 2: time.Second, 3: 2 * time.Second, 4: 4 * time.Second, 5: 8 * time.Second, 6: 16 * time.Second,
		7: 32 * time.Second, 8: time.Minute, 9: time.Minute, 20: time.Minute, 21: time.Minute, 64: time.Minute, math.MaxInt32: time.Minute,
	} {
		tenths := [10]int{}
		for range draws {
			delay := retryDelay(attempts)
			if delay < time.Millisecond || delay >= longest+time.Millisecond {
				t.Fatalf("after %d refusals it is %s; want at most %s, and never at once", attempts, delay, longest)
			}
			tenths[(delay-time.Millisecond)*10/longest]++
		}
		for _, n := range tenths {
			if n < draws/10-300 || n > draws/10+300 {
				t.Errorf("after %d refusals the delays are not spread over %s; its tenths have %v", attempts, longest, tenths)
				break
			}
		}
	}
}

// picky is a broker that refuses events of some orders.
type picky struct {
	broker.Publisher
	mu      sync.Mutex
	refuses map[string]bool
}

func (p *picky) Publish(ctx context.Context, epoch string, events []broker.Event) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var good []broker.Event
	refused := map[int]error{}
	for i, e := range events {
		if p.refuses[e.Subject] {
			refused[i] = errors.New("not this one")
		} else {
			good = append(good, e)
		}
	}
	err := p.Publisher.Publish(ctx, epoch, good)
	if err == nil && len(refused) > 0 {
		err = &broker.RefusedError{Events: refused}
	}
	return err
}

func (p *picky) refuse(order uuid.UUID, refuses bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuses = map[string]bool{order.String(): refuses}
}

func TestARefusedEventHoldsBackItsOrderAndNobodyElse(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	p := &picky{Publisher: b.broker}
	relay := b.relay(p)
	orders := b.place(4)
	bad := orders[1]
	b.announce(bad, "second") // in the same batch
	p.refuse(bad, true)
	b.mustRun(relay, 3)
	b.announce(bad, "third") // and in a later one
	b.announce(orders[0], "another")
	b.mustRun(relay, 1)
	if got, want := b.published(), []uuid.UUID{orders[0], orders[2], orders[3], orders[0]}; !slices.Equal(got, want) {
		t.Fatalf("published %v; want %v", got, want)
	}
	if n := b.count("SELECT count(*) FROM outbox_held WHERE aggregate_id = $1", bad); n != 3 {
		t.Fatalf("%d events are held back; want 3", n)
	}
	if n := b.count("SELECT count(*) FROM outbox_held WHERE next_attempt_at IS NOT NULL AND attempts = 1 AND last_error = 'not this one'"); n != 1 {
		t.Errorf("%d events wait to be tried again; want 1", n)
	}

	p.refuse(bad, false)
	for range 3 {
		b.due()
		b.mustRun(relay, 1)
	}
	var types []string
	for _, e := range b.redis.XRange(t.Context(), broker.Stream, "-", "+").Val() {
		if e.Values["subject"] == bad.String() {
			types = append(types, e.Values["type"].(string))
		}
	}
	if want := []string{"order.created.v1", "second", "third"}; !slices.Equal(types, want) {
		t.Errorf("its events came as %v; want %v", types, want)
	}
	if n := b.count("SELECT count(*) FROM outbox_held"); n != 0 {
		t.Errorf("%d events are still held back", n)
	}
	if n := b.count("SELECT count(*) FROM outbox_published"); n != 7 {
		t.Errorf("the archive has %d events; want 7", n)
	}
	b.drain(relay, b.consumer("one", b.mails))
	b.reconciled(0)
}

func TestAnEventThatIsRefusedForGoodDiesAndTheNextFollows(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	p := &picky{Publisher: b.broker}
	relay := b.relay(p)
	bad := b.place(1)[0]
	p.refuse(bad, true)
	b.mustRun(relay, 0)
	b.announce(bad, "second")
	for b.count("SELECT count(*) FROM outbox_dead") == 0 {
		b.due()
		b.mustRun(relay, 0)
	}
	if n := b.count("SELECT count(*) FROM outbox_dead WHERE attempts = $1 AND reason = 'not this one'", maxAttempts); n != 1 {
		t.Fatalf("%d events are dead after %d attempts; want 1", n, maxAttempts)
	}
	p.refuse(bad, false)
	b.mustRun(relay, 1)
	if got := b.published(); !slices.Equal(got, []uuid.UUID{bad}) {
		t.Errorf("published %v; want the second event of the order", got)
	}
	b.drain(relay, b.consumer("one", b.mails))
	b.reconciled(1)
	if !strings.Contains(b.log.String(), "it is dead") {
		t.Errorf("nobody was told: %s", b.log)
	}
}

func TestAnEventThatIsRefusedWhenItIsPublishedAgainIsHeldBackWithItsOrder(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	p := &picky{Publisher: b.broker}
	relay := b.relay(p)
	bad := b.place(1)[0]
	b.announce(bad, "second")
	b.mustRun(relay, 2)
	p.refuse(bad, true)
	b.redis.FlushAll(t.Context())
	relay.checked = time.Time{}
	b.mustRun(relay, 0)
	p.refuse(bad, false)
	for range 2 {
		b.due()
		b.mustRun(relay, 1)
	}
	if got := b.published(); !slices.Equal(got, []uuid.UUID{bad, bad}) {
		t.Errorf("published %v; want both events of the order", got)
	}
	b.drain(relay, b.consumer("one", b.mails))
	b.reconciled(0)
}

func TestNothingNewOvertakesWhatRedisForgot(t *testing.T) {
	t.Parallel()
	dies := errors.New("it dies")
	for what, meanwhile := range map[string]func(b *bench){
		"nobody else notices": func(*bench) {},
		"consumers notice": func(b *bench) {
			if err := b.consumer("one", b.mails).Drain(b.t.Context()); err != nil {
				b.t.Fatal(err)
			}
		},
		"another relay notices, and dies in its turn": func(b *bench) {
			other := b.relay(dyingInItsTurn{b.broker, dies})
			if _, err := other.runOnce(b.t.Context()); !errors.Is(err, dies) {
				b.t.Fatal(err)
			}
		},
	} {
		for how, prepare := range forgets {
			t.Run(how+", "+what, func(t *testing.T) {
				t.Parallel()
				b := newBench(t)
				relay := b.relay(b.broker)
				order, forget := b.aboutToForget(relay, prepare)
				forget()
				meanwhile(b)
				b.announce(order, "second")
				relay.checkEvery = time.Hour
				relay.checked = time.Now() // and will not ask by itself
				b.publish(relay)
				b.inOrder(order)
				b.drain(relay, b.consumer("one", b.mails))
				b.reconciled(0)
			})
		}
	}
}

// aboutToForget finishes one order, and has the relay publish another, which Redis is going to forget.
func (b *bench) aboutToForget(relay *Relay, prepare func(*bench) func()) (order uuid.UUID, forget func()) {
	b.t.Helper()
	b.place(1)
	b.drain(relay, b.consumer("one", b.mails))
	forget = prepare(b)
	order = b.place(1)[0]
	b.publish(relay)
	return order, forget
}

// inOrder checks that the stream has the first and the second event of an order, in this order.
func (b *bench) inOrder(order uuid.UUID) {
	b.t.Helper()
	var types []string
	for _, e := range b.redis.XRange(b.t.Context(), broker.Stream, "-", "+").Val() {
		if e.Values["subject"] == order.String() {
			types = append(types, e.Values["type"].(string))
		}
	}
	if want := []string{"order.created.v1", "second"}; !slices.Equal(types, want) {
		b.t.Errorf("the stream has %v; want %v", types, want)
	}
}

// dyingInItsTurn is a broker whose relay dies when it has asked for the epoch.
type dyingInItsTurn struct {
	*broker.RedisStreams
	err error
}

func (d dyingInItsTurn) Epoch(ctx context.Context) (string, error) {
	if _, err := d.RedisStreams.Epoch(ctx); err != nil {
		return "", err
	}
	return "", d.err
}

// A relay has claimed an order's second event, and stands still. Meanwhile it loses its turn, and Redis forgets the first.
func TestARelayThatStoodStillWhileRedisForgotPublishesNothing(t *testing.T) {
	t.Parallel()
	for how, prepare := range forgets {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			other := b.relay(b.broker)
			order, forget := b.aboutToForget(other, prepare)
			b.announce(order, "second")

			frozen := frozen{b.broker, make(chan struct{}), make(chan struct{})}
			stalled := b.relay(frozen)
			stalled.stallTimeout = 200 * time.Millisecond
			outcome := make(chan error, 1)
			go func() {
				_, err := stalled.runOnce(t.Context())
				outcome <- err
			}()
			<-frozen.froze
			forget()
			b.eventually("the other knows that Redis forgot", func() bool {
				other.checked = time.Time{}
				done, err := other.take(t.Context())
				return err == nil && done.turn.Taken
			})
			close(frozen.thaw)
			if err := <-outcome; !errors.Is(err, broker.ErrForgot) {
				t.Errorf("the relay that stood still got %v; want %v", err, broker.ErrForgot)
			}
			b.publish(other)
			b.inOrder(order)
			b.drain(other, b.consumer("one", b.mails))
			b.reconciled(0)
		})
	}
}

// frozen is a broker whose relay stands still before it publishes.
type frozen struct {
	*broker.RedisStreams
	froze, thaw chan struct{}
}

func (f frozen) Publish(ctx context.Context, epoch string, events []broker.Event) error {
	close(f.froze)
	<-f.thaw
	return f.RedisStreams.Publish(context.WithoutCancel(ctx), epoch, events)
}

// Another server has taken over, and one of two relays has gone on with it. The other still reaches the old one, which has forgotten
// nothing and is about to go.
func TestARelayOfTheOldServerPublishesNothingOnceAnotherWentOnWithTheNew(t *testing.T) {
	t.Parallel()
	for name, before := range map[string]func(b *bench){
		"what is new":             func(b *bench) { b.place(1) },
		"what is published again": func(b *bench) { b.exec("UPDATE relay_state SET redrive_at = finished_to, redrive_id = 0") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			old := b.redis
			relayOfOld := b.relay(b.broker)
			relayOfOld.checkEvery = time.Hour // it has just looked
			b.place(1)
			b.mustRun(relayOfOld, 1)

			b.redis, b.server = testenv.Redis(t)
			b.broker = broker.NewRedisStreams(b.redis)
			relay := b.relay(b.broker)
			b.publish(relay)
			before(b)
			if n, err := relayOfOld.runOnce(t.Context()); n != 0 || !errors.Is(err, errOtherEpoch) {
				t.Errorf("the old server was given %d events, %v", n, err)
			}
			if n := old.XLen(t.Context(), broker.Stream).Val(); n != 1 {
				t.Errorf("the old server has %d events; want the one from before", n)
			}
			b.drain(relay, b.consumer("one", b.mails))
			b.reconciled(0)
		})
	}
}

func TestAServerThatWasAReplicaForAWhileIsNoticed(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	other, otherServer := testenv.Redis(t)
	relay, consumer := b.relay(b.broker), b.consumer("one", b.mails)
	b.place(1)
	b.drain(relay, consumer)
	become := func(rdb redis.UniversalClient, server *testenv.RedisServer) { // a replica of the server, or of none
		t.Helper()
		host, port := "NO", "ONE"
		if server != nil {
			var err error
			if host, port, err = net.SplitHostPort(server.Addr()); err != nil {
				t.Fatal(err)
			}
		}
		if err := rdb.Do(t.Context(), "REPLICAOF", host, port).Err(); err != nil {
			t.Fatal(err)
		}
	}
	entries := func(rdb redis.UniversalClient) int64 { return rdb.XLen(t.Context(), broker.Stream).Val() }
	become(other, b.server)
	b.eventually("the other has a copy", func() bool { return entries(other) == 1 })
	become(other, nil)
	b.place(1) // goes to the first, which is replaced by the other's copy
	if err := relay.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	become(b.redis, otherServer)
	b.eventually("the first has the other's copy", func() bool { return entries(b.redis) == 1 })
	become(b.redis, nil)
	relay.checked = time.Time{}
	b.drain(relay, consumer)
	b.finished(2)
	b.reconciled(0)
}

func TestAnOutageSpendsNoAttempt(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	away := errors.New("away")
	relay := b.relay(publisher(func(context.Context, []broker.Event) error { return away }))
	b.place(3)
	for range 2 * maxAttempts {
		if _, err := relay.runOnce(t.Context()); !errors.Is(err, away) {
			t.Fatal(err)
		}
	}
	if n := b.count("SELECT (SELECT count(*) FROM outbox_held) + (SELECT count(*) FROM outbox_dead)"); n != 0 {
		t.Errorf("%d events are held back or dead", n)
	}
	b.mustRun(b.relay(b.broker), 3)
}

func TestTheEventsOfAParkedOrderAreHeldBack(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	relay := b.relay(b.broker)
	orders := b.place(2)
	if _, err := b.pool.Exec(t.Context(), "INSERT INTO outbox_parked (aggregate_id) VALUES ($1)", orders[0]); err != nil {
		t.Fatal(err)
	}
	b.mustRun(relay, 1)
	b.due()
	b.mustRun(relay, 0)
	if got := b.published(); !slices.Equal(got, orders[1:]) {
		t.Errorf("published %v; want %v", got, orders[1:])
	}
}

func TestAMillionDeadLettersAreNotInTheWay(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	const dead = 1_000_000
	b.exec(`INSERT INTO outbox_dead (id, event_id, aggregate_id, event_type, source, payload, created_at, attempts, reason)
		SELECT n - $1, gen_random_uuid(), $2, 'order.created.v1', '/orders', '{}', now() - interval '1 day', 8, 'refused'
		FROM generate_series(1, $1) n`, dead, uuid.New())
	orders := b.place(3)
	relay := b.relay(b.broker)
	tx, err := b.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background())
	// touched returns how many pages of the dead letters and their indexes the transaction has read.
	touched := func() (pages int) {
		err := tx.QueryRow(t.Context(), `SELECT sum(pg_stat_get_xact_blocks_fetched(oid))::bigint FROM pg_class WHERE relname LIKE 'outbox\_dead%'`).Scan(&pages)
		if err != nil {
			t.Fatal(err)
		}
		return pages
	}
	done := round{batch: relayBatch} // the first also looks at the broker, and at what is held back
	if err := relay.round(t.Context(), db.New(tx), &done); err != nil || done.published != 3 {
		t.Fatalf("the relay published %d, %v; want 3", done.published, err)
	}
	if n := touched(); n != 0 {
		t.Errorf("the relay read %d pages of dead letters", n)
	}
	if _, err := tx.Exec(t.Context(), "SELECT FROM outbox_dead WHERE id = 0"); err != nil || touched() == 0 {
		t.Errorf("one that is read does not show, %v", err)
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := b.published(); !slices.Equal(got, orders) {
		t.Errorf("published %v; want %v", got, orders)
	}
	b.drain(relay, b.consumer("one", b.mails))
	b.finished(3)
	b.reconciledSince(time.Now().Add(-time.Hour), 0) // the dead are a day old, and have no orders
}

func TestWavesKeepTheOrderOfEachOrder(t *testing.T) {
	t.Parallel()
	var events []broker.Event
	for _, subject := range strings.Split("abacbad", "") {
		events = append(events, broker.Event{Subject: subject})
	}
	if got, want := fmt.Sprint(waves(events)), "[[0 1 3 6] [2 4] [5]]"; got != want {
		t.Errorf("got %s; want %s", got, want)
	}
	if got := waves(nil); len(got) != 0 {
		t.Errorf("of nothing: %v", got)
	}
}

// drain publishes and consumes until there is nothing left to.
func (b *bench) drain(relay *Relay, consumer *Consumer) {
	b.t.Helper()
	if err := errors.Join(relay.Drain(b.t.Context()), consumer.Drain(b.t.Context())); err != nil {
		b.t.Fatal(err)
	}
}

// finished checks that n orders were placed, and one mail sent for each.
func (b *bench) finished(n int) {
	b.t.Helper()
	mails := b.mails.orders()
	if got := b.count("SELECT count(*) FROM inbox WHERE state = 'sent'"); got != n || len(mails) != n {
		b.t.Errorf("%d are sent in the inbox and there are %d mails; want %d", got, len(mails), n)
	}
	slices.SortFunc(mails, func(a, b uuid.UUID) int { return strings.Compare(a.String(), b.String()) })
	if len(slices.Compact(mails)) != n {
		b.t.Errorf("some mails went out twice")
	}
}

// announce writes another event of an order into the outbox.
func (b *bench) announce(order uuid.UUID, eventType string) {
	b.t.Helper()
	_, err := b.pool.Exec(b.t.Context(), `INSERT INTO outbox (event_id, aggregate_id, event_type, source, payload)
		VALUES (gen_random_uuid(), $1, $2, '/orders', '{}')`, order, eventType)
	if err != nil {
		b.t.Fatal(err)
	}
}

// due makes the time come of all events that wait to be tried again.
func (b *bench) due() {
	b.t.Helper()
	if _, err := b.pool.Exec(b.t.Context(), "UPDATE outbox_held SET next_attempt_at = now() WHERE next_attempt_at > now()"); err != nil {
		b.t.Fatal(err)
	}
}
