package worker

import (
	"bytes"
	"context"
	"log/slog"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"idempotent-orders/idempotency"
	"idempotent-orders/internal/local"
	"idempotent-orders/internal/testenv"
	"idempotent-orders/order"
	"idempotent-orders/reconcile"
)

// reconciled checks that orders, keys, events and the inbox agree, that nothing is under way, and how many events are dead.
func (b *bench) reconciled(dead int64) {
	b.t.Helper()
	b.reconciledSince(time.Time{}, dead)
}

// reconciledSince does so for orders placed since then.
func (b *bench) reconciledSince(from time.Time, dead int64) {
	b.t.Helper()
	report, err := reconcile.Run(b.t.Context(), b.pool, reconcile.Options{From: from, Consumer: EmailConsumer, KeyRetention: time.Hour})
	if err != nil || report.Missing != 0 || report.Unfinished != 0 || report.Dead != dead {
		b.t.Errorf("reconcile finds %+v, %v; want %d dead, and nothing else", report, err, dead)
	}
}

// keepPlacing places orders, one after the other, until the returned function is called, which returns how many.
func (b *bench) keepPlacing() (stop func() int) {
	done, placed := make(chan struct{}), 0
	var placing sync.WaitGroup
	placing.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			_, err := b.orders.Place(order.Send{
				Key:   idempotency.Key{Caller: "anonymous", Operation: order.Operation, Value: uuid.NewString()},
				Draft: order.Draft{UserID: "user-456", Amount: 1},
			})
			if err != nil {
				b.t.Errorf("place an order: %v", err)
				return
			}
			placed++
			time.Sleep(2 * time.Millisecond) // a load, but not more than is sent under the race detector
		}
	})
	return func() int { close(done); placing.Wait(); return placed }
}

// settle waits until every order is finished.
func (b *bench) settle() {
	b.t.Helper()
	b.eventually("every order is finished", func() bool {
		return b.count("SELECT (SELECT count(*) FROM orders) - (SELECT count(*) FROM inbox WHERE state = 'sent')") == 0
	})
}

func TestRedisMayDieAndForgetAgainAndAgainUnderLoad(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for _, name := range []string{"one", "two"} {
		relay := b.relay(b.broker)
		relay.checkEvery = 50 * time.Millisecond
		b.start(relay.Run)
		b.start(NewConsumer(b.pool, b.broker.Subscribe(EmailConsumer, name, AbandonedAfter), b.mails, AbandonedAfter, b.logger()).Run)
	}
	stop := b.keepPlacing()
	for range 20 {
		published := b.count("SELECT count(*) FROM outbox_published")
		b.eventually("publishing goes on", func() bool { return b.count("SELECT count(*) FROM outbox_published") > published+20 })
		b.server.Kill()
		b.server.Forget()
		b.server.Start()
	}
	placed := stop()
	b.settle()
	b.finished(placed)
	b.reconciled(0)
}

func TestOneEventInAHundredMayBeRefusedForEver(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	p := &picky{Publisher: b.broker, refuses: map[string]bool{}}
	orders := b.place(300)
	for i := 0; i < len(orders); i += 100 {
		p.refuses[orders[i].String()] = true
	}
	b.start(b.relay(p).Run)
	b.start(b.consumer("one", b.mails).Run)
	b.eventually("all others are sent", func() bool { return b.count("SELECT count(*) FROM inbox WHERE state = 'sent'") == 297 })
	b.eventually("those that are refused are dead", func() bool {
		b.due()
		return b.count("SELECT count(*) FROM outbox_dead") == 3
	})
	b.reconciled(3)
}

func TestSixteenRelaysAndFourConsumersShareTheWork(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for range 16 {
		b.start(b.relay(b.broker).Run)
	}
	for _, name := range []string{"a", "b", "c", "d"} {
		b.start(b.consumer(name, b.mails).Run)
	}
	b.place(200)
	b.settle()
	b.finished(200)
	b.reconciled(0)
}

// Transaction ids, sequences and positions are others in a new cluster, and its Redis knows nothing.
func TestADumpGoesOnInANewCluster(t *testing.T) {
	t.Parallel()
	old := newBench(t)
	relay, consumer := old.relay(old.broker), old.consumer("one", old.mails)
	old.place(5)
	old.drain(relay, consumer)
	old.place(5) // published, and not consumed
	if err := relay.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	old.place(5) // not even published

	b := newBench(t)
	b.mails = old.mails
	address, bin := anotherPostgreSQL(t), ""
	b.pool = testenv.Pool(t, address)
	b.orders = order.NewStore(b.pool, time.Hour, nil)
	if err := old.pool.QueryRow(t.Context(), "SELECT setting FROM pg_config() WHERE name = 'BINDIR'").Scan(&bin); err != nil {
		t.Fatal(err)
	}
	run := func(in []byte, name string, args ...string) []byte {
		var out, said bytes.Buffer
		cmd := exec.CommandContext(t.Context(), filepath.Join(bin, name), args...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, &said
		if err := cmd.Run(); err != nil {
			t.Fatalf("%s: %v: %s", name, err, &said)
		}
		return out.Bytes()
	}
	dump := run(nil, "pg_dump", "--dbname", old.pool.Config().ConnString())
	run(dump, "psql", "--quiet", "--no-psqlrc", "--set", "ON_ERROR_STOP=1", "--dbname", address)

	b.place(5)
	b.drain(b.relay(b.broker), b.consumer("one", b.mails))
	b.finished(20)
	b.reconciled(0)
}

// anotherPostgreSQL starts a PostgreSQL beside that of the tests, and returns the address of its one database, which is empty.
func anotherPostgreSQL(t *testing.T) string {
	t.Helper()
	server, err := local.StartPostgreSQL(t.Context(), local.PostgreSQLOptions{
		Dir: testenv.Dir(t), Log: slog.New(slog.DiscardHandler), Settings: map[string]string{"fsync": "off", "max_connections": "50"},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := server.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	return server.URL("postgres")
}
