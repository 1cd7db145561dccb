package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/broker"
	"idempotent-orders/internal/connect"
	"idempotent-orders/internal/testenv"
)

// pending returns what is delivered to the e-mail consumer and not acknowledged.
func (b *bench) pending() []redis.XPendingExt {
	b.t.Helper()
	pending, err := b.redis.XPendingExt(b.t.Context(), &redis.XPendingExtArgs{Stream: broker.Stream, Group: EmailConsumer, Start: "-", End: "+", Count: 10_000}).Result()
	if err != nil {
		b.t.Fatal(err)
	}
	return pending
}

// states returns how many events are sent and dead, and received and not finished.
func (b *bench) states() (sent, dead, received int) {
	b.t.Helper()
	of := func(state string) int { return b.count("SELECT count(*) FROM inbox WHERE state = $1", state) }
	return of("sent"), of("dead"), of("received")
}

func TestARefusedMailIsDeadWithItsReasonAndTheOthersAreSent(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(20)
	b.mustRun(b.relay(b.broker), 20)
	refuse := sender(func(ctx context.Context, mail Email) error {
		if mail.OrderID == orders[3] {
			return fmt.Errorf("%w: no such\x00 user \xff", ErrRefused)
		}
		return b.mails.Send(ctx, mail)
	})
	if err := b.consumer("email", refuse).Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if sent, dead, received := b.states(); sent != 19 || dead != 1 || received != 0 {
		t.Errorf("%d are sent, %d dead, %d received; want 19, 1, 0", sent, dead, received)
	}
	var reason string
	if err := b.pool.QueryRow(t.Context(), "SELECT reason FROM inbox WHERE state = 'dead'").Scan(&reason); err != nil || !strings.Contains(reason, "no such user") {
		t.Errorf("the reason is %q, %v", reason, err)
	}
	if left := b.pending(); len(left) != 0 {
		t.Errorf("%v are not acknowledged", left)
	}
	if n := strings.Count(b.log.String(), "An event is dead"); n != 1 {
		t.Errorf("the log says so %d times", n)
	}
	// The whole stream once more, as after Redis forgot the group.
	if err := b.redis.XGroupDestroy(t.Context(), broker.Stream, EmailConsumer).Err(); err != nil {
		t.Fatal(err)
	}
	if err := b.consumer("email", b.mails).Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := len(b.mails.orders()); n != 19 || len(b.pending()) != 0 {
		t.Errorf("afterwards %d mails were sent, and %v is pending; want 19 and nothing", n, b.pending())
	}
}

func TestAMailServerThatIsAwayCostsNoEventAnything(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.place(3)
	b.fill(597)
	if err := b.relay(b.broker).Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	var away atomic.Bool
	var failures, sending, atOnce atomic.Int64
	away.Store(true)
	c := b.consumer("email", sender(func(ctx context.Context, mail Email) error {
		if !away.Load() {
			return b.mails.Send(ctx, mail)
		}
		defer sending.Add(-1)
		n := sending.Add(1)
		if failures.Add(1) > 2*concurrentSends { // known to be away
			atOnce.Store(max(atOnce.Load(), n))
		}
		return errors.New("421 not now")
	}))
	c.least, c.most, c.inHand = time.Millisecond, 20*time.Millisecond, 150
	b.start(c.Run)
	b.eventually("many mails have failed", func() bool { return failures.Load() > 4*concurrentSends })
	began := time.Now()
	b.eventually("what is in hand would have been abandoned, were it not kept", func() bool { return time.Since(began) > 500*time.Millisecond })
	held := b.pending()
	if len(held) >= 150+consumerBatch {
		t.Errorf("%d events are in hand", len(held))
	}
	for _, p := range held {
		if p.RetryCount != 1 {
			t.Errorf("delivery %s counts %d", p.ID, p.RetryCount)
		}
	}
	if n := atOnce.Load(); n != 1 {
		t.Errorf("%d mails at once were tried at a server that is away; want 1", n)
	}
	away.Store(false)
	b.eventually("every mail is sent and acknowledged", func() bool {
		sent, _, _ := b.states()
		return sent == 600 && len(b.pending()) == 0
	})
	if n := len(b.mails.orders()); n != 600 || b.count("SELECT count(*) FROM inbox WHERE state = 'dead'") != 0 {
		t.Errorf("%d mails were sent; want 600, and none dead", n)
	}
}

func TestAConsumerThatIsStoppedMarksWhatWasSentAndGivesTheRestBack(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(40)
	b.mustRun(b.relay(b.broker), 40)
	begun, gate := make(chan struct{}, 40), make(chan struct{})
	log := slog.New(slog.NewTextHandler(b.log, nil))
	stopped := NewConsumer(b.pool, b.broker.Subscribe(EmailConsumer, "one", time.Hour), sender(func(ctx context.Context, mail Email) error {
		begun <- struct{}{}
		<-gate
		return b.mails.Send(ctx, mail)
	}), time.Hour, log)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); stopped.Run(ctx) }()
	for range concurrentSends {
		<-begun
	}
	cancel()
	close(gate)
	<-ended
	if sent, _, received := b.states(); sent != concurrentSends || received != 0 {
		t.Errorf("%d are sent, %d received; want %d and 0", sent, received, concurrentSends)
	}
	left := b.pending()
	if len(left) != 40-concurrentSends {
		t.Errorf("%d are pending", len(left))
	}
	for _, p := range left {
		if p.RetryCount != 0 || p.Idle < time.Hour {
			t.Errorf("a delivery that was given back counts %d, and is held for %s more", p.RetryCount, time.Hour-p.Idle)
		}
	}
	next := NewConsumer(b.pool, b.broker.Subscribe(EmailConsumer, "two", time.Hour), b.mails, time.Hour, log)
	if err := next.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.settled(orders)
}

// neglecting is a subscription that keeps nothing, as one of a process that stands still, and counts what it receives.
type neglecting struct {
	*broker.RedisSubscription
	received atomic.Int64
}

func (*neglecting) Keep(context.Context, []string) error { return nil }

func (n *neglecting) Receive(ctx context.Context, limit int, wait time.Duration) ([]broker.Delivery, error) {
	deliveries, err := n.RedisSubscription.Receive(ctx, limit, min(wait, 10*time.Millisecond))
	n.received.Add(int64(len(deliveries)))
	return deliveries, err
}

func TestAConsumerThatStoodStillSendsAndMarksNothingThatAnotherTookOver(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(40)
	b.mustRun(b.relay(b.broker), 40)
	begun, gate := make(chan struct{}, 40), make(chan struct{})
	var late atomic.Int64
	// Long enough that on a slow machine the heir's own events do not count as abandoned.
	const abandonedAfter = time.Second
	still := b.consumerAfter(abandonedAfter, "still", sender(func(context.Context, Email) error {
		begun <- struct{}{}
		<-gate
		late.Add(1)
		return nil
	}))
	still.subscription = &neglecting{RedisSubscription: still.subscription.(*broker.RedisSubscription)}
	still.inHand = concurrentSends // else it would receive again what it let go, and be less still than it seems
	b.start(still.Run)
	goOn := sync.OnceFunc(func() { close(gate) })
	t.Cleanup(goOn) // before it is waited for
	for range concurrentSends {
		<-begun
	}
	heir := b.consumerAfter(abandonedAfter, "heir", b.mails)
	stop := b.start(heir.Run)
	b.eventually("the heir has sent everything", func() bool { return len(b.mails.orders()) == 40 })
	b.eventually("and finished it", func() bool { return len(b.pending()) == 0 })
	stop()
	goOn()
	b.eventually("the other has ended what it had begun", func() bool { return late.Load() == concurrentSends })
	b.place(1)
	b.mustRun(b.relay(b.broker), 1)
	b.eventually("and has gone on to other events", func() bool { return late.Load() == concurrentSends+1 && len(b.pending()) == 0 })
	if n := b.count("SELECT count(*) FROM inbox WHERE holder = $1 AND state = 'sent'", heir.holder); n != 40 {
		t.Errorf("%d are marked by the heir; want 40", n)
	}
	if got := b.mails.orders(); !sameSet(got, orders) {
		t.Errorf("%d mails were sent by the heir; want 40", len(got))
	}
}

// What it does not keep, it receives again and again. That nobody died of it is plain to a consumer that has it in hand.
func TestAConsumerThatKeepsNothingMakesNoEventDead(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(1)
	b.mustRun(b.relay(b.broker), 1)
	stuck := make(chan struct{})
	still := b.consumer("still", sender(func(context.Context, Email) error { <-stuck; return nil }))
	neglects := &neglecting{RedisSubscription: still.subscription.(*broker.RedisSubscription)}
	still.subscription = neglects
	b.start(still.Run)
	goOn := sync.OnceFunc(func() { close(stuck) })
	t.Cleanup(goOn) // before it is waited for
	b.eventually("it has received the event more often than any may be", func() bool {
		return neglects.received.Load() >= maxDeliveries+2
	})
	b.start(b.consumer("heir", b.mails).Run)
	b.eventually("the heir has finished it", func() bool { sent, dead, _ := b.states(); return sent+dead == 1 && len(b.pending()) == 0 })
	goOn()
	b.settled(orders)
}

func TestDeliveriesAreForgivenWhenAMailWasTried(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.place(1)
	b.mustRun(b.relay(b.broker), 1)
	for i := range suspectDeliveries { // they die with it
		s := b.broker.Subscribe(EmailConsumer, "dead", time.Millisecond)
		b.eventually("it is delivered", func() bool {
			received, err := s.Receive(t.Context(), 1, 0)
			if err != nil {
				t.Fatal(err)
			}
			return len(received) == 1 && received[0].Deliveries == int64(i+1)
		})
	}
	c := b.consumer("email", sender(func(context.Context, Email) error { return errors.New("not now") }))
	c.least = time.Hour
	b.start(c.Run)
	b.eventually("its mail was tried, and it counts as delivered once", func() bool {
		left := b.pending()
		return len(left) == 1 && left[0].Consumer == "email" && left[0].RetryCount == 1
	})
}

// The processes are real, and really die. Everything else that they were delivered dies with them each time.
func TestAnEventThatKillsItsConsumersIsDeadAndNoOtherIs(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(40)
	b.mustRun(b.relay(b.broker), 40)
	done := func() bool {
		sent, dead, _ := b.states()
		return sent+dead == 40 && len(b.pending()) == 0
	}
	deaths := 0
	for ended := false; !ended; {
		child := exec.Command(os.Args[0], "-test.run=^TestConsumerThatDies$")
		child.Env = append(os.Environ(), "TEST_DATABASE="+b.pool.Config().ConnString(), "TEST_REDIS="+b.server.Addr(), "TEST_POISON="+orders[0].String())
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		died := make(chan struct{})
		go func() { defer close(died); _ = child.Wait() }()
		b.eventually("the consumer dies, or everything is done", func() bool {
			select {
			case <-died:
				deaths++
				return true
			default:
				ended = done()
				return ended
			}
		})
		if ended {
			_ = child.Process.Kill()
		}
		<-died
		if deaths > maxDeliveries {
			t.Fatalf("%d consumers died", deaths)
		}
	}
	if deaths != maxDeliveries {
		t.Errorf("%d consumers died; want %d", deaths, maxDeliveries)
	}
	var reason string
	err := b.pool.QueryRow(t.Context(), `SELECT i.reason FROM inbox i JOIN outbox_published p USING (event_id)
		WHERE i.state = 'dead' AND p.aggregate_id = $1`, orders[0]).Scan(&reason)
	if err != nil || !strings.Contains(reason, fmt.Sprintf("delivered %d times", maxDeliveries+1)) {
		t.Errorf("the reason is %q, %v", reason, err)
	}
	if sent, dead, _ := b.states(); sent != 39 || dead != 1 {
		t.Errorf("%d are sent and %d dead; want 39 and 1", sent, dead)
	}
}

// TestConsumerThatDies is the process of the test above.
func TestConsumerThatDies(t *testing.T) {
	poison, err := uuid.Parse(os.Getenv("TEST_POISON"))
	if err != nil {
		return
	}
	rdb := connect.Redis([]string{os.Getenv("TEST_REDIS")}, "")
	b := &bench{t: t, pool: testenv.Pool(t, os.Getenv("TEST_DATABASE")), redis: rdb, broker: broker.NewRedisStreams(rdb), log: &syncBuffer{}}
	b.consumer("email", sender(func(ctx context.Context, mail Email) error {
		if mail.OrderID == poison {
			os.Exit(1)
		}
		return nil
	})).Run(t.Context())
}
