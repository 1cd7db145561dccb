package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/broker"
	"idempotent-orders/gen/db"
	"idempotent-orders/operate"
)

// PostgreSQL is away between a mail and its mark, for many times as long as after what a delivery counts as abandoned.
func TestAMailThatCannotBeMarkedYetIsNotSentByAnother(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(5)
	b.mustRun(b.relay(b.broker), 5)
	away, err := b.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer away.Rollback(context.Background())
	var once sync.Once
	silenced := make(chan struct{})
	b.start(b.consumer("first", sender(func(ctx context.Context, mail Email) error {
		once.Do(func() {
			if _, err := away.Exec(ctx, "LOCK TABLE inbox"); err != nil {
				t.Error(err)
			}
			close(silenced)
		})
		return b.mails.Send(ctx, mail)
	})).Run)
	<-silenced
	b.start(b.consumer("second", b.mails).Run)
	since := time.Now()
	b.eventually("a long time has passed", func() bool { return time.Since(since) > time.Second })
	held, err := b.redis.XPendingExt(t.Context(), &redis.XPendingExtArgs{Stream: broker.Stream, Group: EmailConsumer, Start: "-", End: "+", Count: 10}).Result()
	if err != nil || len(held) != 5 || slices.ContainsFunc(held, func(p redis.XPendingExt) bool { return p.Consumer != "first" }) {
		t.Errorf("another took over what the first is working on: %v, %v", held, err)
	}
	if err := away.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.eventually("every delivery is acknowledged", func() bool {
		p, err := b.redis.XPending(t.Context(), broker.Stream, EmailConsumer).Result()
		return err == nil && p.Count == 0
	})
	b.settled(orders)
}

func TestWhatADeadConsumerHeldIsTakenOver(t *testing.T) {
	t.Parallel()
	for _, died := range []string{"before the inbox", "after the inbox", "after the mark"} {
		t.Run(died, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			orders := b.place(5)
			b.mustRun(b.relay(b.broker), 5)
			dead := b.consumer("dead", b.mails)
			// It dies: what it does after that point never happens.
			deliveries, err := dead.subscription.Receive(t.Context(), 100, 0)
			if err != nil || len(deliveries) != 5 {
				t.Fatal(deliveries, err)
			}
			tasks, _ := dead.read(t.Context(), deliveries)
			if died != "before the inbox" {
				if mine, _, err := dead.enter(t.Context(), tasks); err != nil || len(mine) != 5 {
					t.Fatal(mine, err)
				}
			}
			if died == "after the mark" {
				for _, task := range tasks {
					if err := dead.sender.Send(t.Context(), task.mail); err != nil {
						t.Fatal(err)
					}
				}
				if marked, err := dead.mark(t.Context(), tasks); err != nil || len(marked) != 5 {
					t.Fatal(marked, err)
				}
			}
			b.start(b.consumer("heir", b.mails).Run)
			b.eventually("every delivery is acknowledged", func() bool {
				p, err := b.redis.XPending(t.Context(), broker.Stream, EmailConsumer).Result()
				return err == nil && p.Count == 0
			})
			b.settled(orders)
			b.reconciled(0)

			// The dead one was only slow, and finishes too late: it touches nothing.
			late, err := db.New(b.pool).MarkSent(t.Context(), db.MarkSentParams{Consumer: EmailConsumer, EventIds: []uuid.UUID{b.mails.mails[0].EventID}, Holder: dead.holder})
			if err != nil || len(late) != 0 {
				t.Errorf("the late finisher marked %v, %v", late, err)
			}
		})
	}
}

func TestAnEventThatAnotherHoldsIsLeftToIt(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.place(1)
	b.mustRun(b.relay(b.broker), 1)
	events, err := b.broker.Subscribe("probe", "probe", time.Hour).Receive(t.Context(), 1, 0)
	if err != nil || len(events) != 1 {
		t.Fatal(events, err)
	}
	holder := uuid.New()
	if _, err := db.New(b.pool).EnterInbox(t.Context(), db.EnterInboxParams{
		Consumer: EmailConsumer, EventIds: []uuid.UUID{events[0].Event.ID}, Holder: holder,
	}); err != nil {
		t.Fatal(err)
	}
	c := b.consumer("email", b.mails)
	c.abandonedAfter = time.Hour
	if err := c.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(b.mails.orders()) != 0 {
		t.Error("a mail that another holder is sending was sent")
	}
	p, err := b.redis.XPending(t.Context(), broker.Stream, EmailConsumer).Result()
	if err != nil || p.Count != 1 {
		t.Errorf("%v deliveries are pending, %v; want the one that is not finished", p, err)
	}
}

func TestAMailThatFailsIsSentLaterAndHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(20)
	b.mustRun(b.relay(b.broker), 20)
	var mu sync.Mutex
	failures := 0
	c := b.consumer("email", sender(func(ctx context.Context, mail Email) error {
		mu.Lock()
		defer mu.Unlock()
		if mail.OrderID == orders[7] && failures < 2 {
			failures++
			return errors.New("mailbox full")
		}
		return b.mails.Send(ctx, mail)
	}))
	if err := c.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := len(b.mails.orders()); n != 19 {
		t.Errorf("%d mails were sent at first; want 19", n)
	}
	b.start(c.Run)
	b.eventually("the last mail is sent", func() bool { return len(b.mails.orders()) == 20 })
	b.eventually("it is acknowledged", func() bool {
		p, err := b.redis.XPending(t.Context(), broker.Stream, EmailConsumer).Result()
		return err == nil && p.Count == 0
	})
	b.settled(orders)
}

func TestWhatIsNotAnEventHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(1)
	other := uuid.New()
	valid := []string{"specversion", "1.0", "id", uuid.NewString(), "type", "order.created.v1", "time", "2026-01-02T15:04:05Z"}
	for _, values := range [][]string{
		{"x", "y"},
		{"specversion", "1.0", "id", "not a uuid", "type", "order.created.v1", "time", "2026-01-02T15:04:05Z", "data", "{}"},
		slices.Concat(valid, []string{"data", "{"}),
		slices.Concat(valid, []string{"id", other.String(), "type", "order.cancelled.v1", "data", "{}"}),
	} {
		if err := b.redis.XAdd(t.Context(), &redis.XAddArgs{Stream: broker.Stream, Values: values}).Err(); err != nil {
			t.Fatal(err)
		}
	}
	b.mustRun(b.relay(b.broker), 1)
	if err := b.consumer("email", b.mails).Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.consumer("email", b.mails).Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := b.count("DELETE FROM inbox WHERE event_id = $1 AND state = 'sent' RETURNING 1", other); n != 1 {
		t.Error("the event of another type is not finished")
	}
	b.settled(orders)
	if n := strings.Count(b.log.String(), "is left in the stream"); n != 3 {
		t.Errorf("%d entries were logged; want 3\n%s", n, b.log)
	}
	if n := b.redis.XLen(t.Context(), broker.Stream).Val(); n != 5 {
		t.Errorf("the stream has %d entries; want all 5", n)
	}
}

// Else nothing behind it would ever leave the archive, and all of it would be published again whenever the broker forgets.
func TestAnEventThatCannotBeReadIsDeadAndHoldsNothingUp(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.place(4)
	for id, payload := range map[int]string{1: `{}`, 2: `{"order_id":"x"}`, 3: `[]`} {
		b.exec("UPDATE outbox SET payload = $2 WHERE id = (SELECT id FROM outbox ORDER BY id OFFSET $1 LIMIT 1)", id, payload)
	}
	b.drain(b.relay(b.broker), b.consumer("one", b.mails))
	b.reconciled(3)
	operator := operate.Operator{Pool: b.pool}
	dead, err := operator.FindDead(t.Context(), operate.Filter{}, operate.Everything)
	if err != nil || len(dead) != 3 {
		t.Fatalf("the operator finds %+v, %v; want three", dead, err)
	}
	for _, d := range dead {
		if !strings.HasPrefix(d.Reason, "its data ") || d.OrderID == uuid.Nil {
			t.Errorf("the operator finds %+v; want a reason, and the order", d)
		}
	}
	b.exec("UPDATE outbox_published SET published_at = now() - interval '1 hour'")
	b.mustSweep(b.sweeper())
	if n := b.count("SELECT count(*) FROM relay_state WHERE finished_to > now() - interval '2 minutes'"); n != 1 {
		t.Error("the mark stands before them")
	}
	if n := len(b.pending()); n != 0 {
		t.Errorf("%d deliveries are not acknowledged", n)
	}
}

func TestAStreamOrGroupThatIsGoneIsMadeAgain(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	relay, c := b.relay(b.broker), b.consumer("email", b.mails)
	var orders []uuid.UUID
	for _, destroy := range []func() error{
		func() error { return nil },
		func() error { return b.redis.FlushAll(t.Context()).Err() },
		func() error { return b.redis.Del(t.Context(), broker.Stream).Err() },
		func() error { return b.redis.XGroupDestroy(t.Context(), broker.Stream, EmailConsumer).Err() },
	} {
		if err := destroy(); err != nil {
			t.Fatal(err)
		}
		orders = append(orders, b.place(2)...)
		b.eventually("the events are published", func() bool { // the first attempt finds that the stream is lost
			published, err := relay.runOnce(t.Context())
			return err == nil && published == 2
		})
		b.eventually("the mails are sent", func() bool {
			if err := c.Drain(t.Context()); err != nil {
				t.Fatal(err)
			}
			return len(b.mails.orders()) == len(orders)
		})
	}
	b.settled(orders)
}

func TestAnIdleConsumerWaitsInRedisAndDoesNotSpin(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	began := time.Now()
	stop := b.start(b.consumer("email", b.mails).Run)
	b.eventually("some time has passed", func() bool { return time.Since(began) > 1500*time.Millisecond })
	stop()
	stats, err := b.redis.Info(t.Context(), "commandstats").Result()
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(stats, "cmdstat_xreadgroup:calls=")
	calls, _, _ := strings.Cut(after, ",")
	if n, err := strconv.Atoi(calls); err != nil || n < 2 || n > 6 { // one that finds no group, and one a second
		t.Errorf("an idle consumer read %q times in %s", calls, time.Since(began))
	}
}

func TestAMailInTheLogIsFourLines(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	plain := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.MessageKey {
			return a
		}
		return slog.Attr{}
	}}))
	id := uuid.New()
	if err := NewLogSender(plain).Send(t.Context(), Email{OrderID: id, UserID: "user-456\n[EMAIL] ✓ forged", Amount: 1000}); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf(`msg="[EMAIL] Sending confirmation email for Order %s"
msg="[EMAIL] -> User: user-456\\n[EMAIL] ✓ forged"
msg="[EMAIL] -> Amount: 1000"
msg="[EMAIL] ✓ Email sent successfully!"
`, id)
	if out.String() != want {
		t.Errorf("the log reads\n%s\nwant\n%s", &out, want)
	}
}

func TestAnEventThatIsDeliveredAgainAfterItsMailIsNotMailedAgain(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	orders := b.place(2)
	again := b.relay(publisher(func(ctx context.Context, events []broker.Event) error {
		return errors.Join(b.broker.Publish(ctx, broker.AnyEpoch, events), errors.New("killed"))
	}))
	if _, err := again.runOnce(t.Context()); err == nil {
		t.Fatal("the relay lived")
	}
	if err := b.consumer("one", b.mails).Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.mustRun(b.relay(b.broker), 2)
	if err := b.consumer("another", b.mails).Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.settled(orders)
}
