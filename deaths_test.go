package main

import (
	"bytes"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/broker"
	"idempotent-orders/internal/testenv"
	"idempotent-orders/worker"
)

// gate is a way to a server that stops at a word, once: so a process can be killed or stopped at one place of its work.
type gate struct {
	t      *testing.T
	target string
	addr   string

	mu    sync.Mutex
	word  string // what to stop at; empty: nothing
	after bool   // stop when the server has answered, and not before it is asked
	conns []net.Conn

	caught chan struct{} // closed when something is stopped
	let    chan struct{} // closed to let it go on
}

func newGate(t *testing.T, target string) *gate {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{t: t, target: target, addr: listener.Addr().String(), caught: make(chan struct{}), let: make(chan struct{})}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { g.serve(client) })
		}
	})
	t.Cleanup(func() { _ = listener.Close(); g.cut(); serving.Wait() })
	return g
}

// stopAt has the next request that contains the word stopped before it reaches the server, or its answer after it did.
func (g *gate) stopAt(word string, after bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.word, g.after = word, after
}

// cut ends all connections; what is stopped never arrives.
func (g *gate) cut() {
	g.mu.Lock()
	conns := g.conns
	g.mu.Unlock()
	for _, c := range conns {
		_ = c.Close()
	}
	g.open()
}

// open lets go on what is stopped, and stops nothing more.
func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.word = ""
	select {
	case <-g.let:
	default:
		close(g.let)
	}
}

func (g *gate) serve(client net.Conn) {
	server, err := net.Dial("tcp", g.target)
	if err != nil {
		_ = client.Close()
		return
	}
	g.mu.Lock()
	g.conns = append(g.conns, client, server)
	g.mu.Unlock()
	var answer atomic.Bool // the next answer is what to stop at
	var pumping sync.WaitGroup
	pumping.Go(func() {
		pump(client, server, func(request []byte) {
			switch found, after := g.finds(request); {
			case found && after:
				answer.Store(true)
			case found:
				g.stop()
			}
		})
	})
	pump(server, client, func([]byte) {
		if answer.CompareAndSwap(true, false) {
			g.stop()
		}
	})
	pumping.Wait()
}

func (g *gate) finds(request []byte) (found, after bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.word == "" || !bytes.Contains(request, []byte(g.word)) {
		return false, false
	}
	g.word = "" // once
	return true, g.after
}

func (g *gate) stop() {
	close(g.caught)
	<-g.let
}

func pump(from, to net.Conn, seen func([]byte)) {
	defer from.Close()
	defer to.Close()
	for chunk := make([]byte, 64<<10); ; {
		n, err := from.Read(chunk)
		seen(chunk[:n])
		if _, failed := to.Write(chunk[:n]); failed != nil || err != nil {
			return
		}
	}
}

// plant is the servers of one test, and the program's processes on them.
type plant struct {
	t        *testing.T
	database string
	pool     *pgxpool.Pool
	redis    redis.UniversalClient
	addr     string // of Redis
	home     string
	server   *program
	running  []*program
}

// newPlant starts a server. What is published stays in the stream: a group that never acknowledges keeps it.
func newPlant(t *testing.T) *plant {
	t.Helper()
	rdb, server := testenv.Redis(t)
	p := &plant{t: t, database: testenv.DatabaseURL(t), redis: rdb, addr: server.Addr(), home: testenv.Dir(t)}
	p.pool = testenv.Pool(t, p.database)
	if err := rdb.XGroupCreateMkStream(t.Context(), broker.Stream, "audit", "0").Err(); err != nil {
		t.Fatal(err)
	}
	p.server = p.start(nil, "server").serving()
	return p
}

// start starts a part, with variables of its own.
func (p *plant) start(env []string, part string) *program {
	p.t.Helper()
	env = append([]string{"PORT=0", "XDG_DATA_HOME=" + p.home, "DATABASE_URL=" + p.database, "REDIS_ADDR=" + p.addr}, env...)
	started := start(p.t, env, part)
	p.running = append(p.running, started)
	return started
}

// startBehind starts a part that reaches a store through a gate.
func (p *plant) startBehind(store, part string) (*program, *gate) {
	p.t.Helper()
	if store == "Redis" {
		g := newGate(p.t, p.addr)
		return p.start([]string{"REDIS_ADDR=" + g.addr}, part), g
	}
	u, err := url.Parse(p.database)
	if err != nil {
		p.t.Fatal(err)
	}
	g := newGate(p.t, u.Host)
	u.Host = g.addr
	return p.start([]string{"DATABASE_URL=" + u.String()}, part), g
}

// place places n orders with the server.
func (p *plant) place(prefix string, n int) {
	p.t.Helper()
	for i := range n {
		p.server.mustPlace(fmt.Sprintf("%s-%d", prefix, i))
	}
}

// count returns the result of a query for one number.
func (p *plant) count(query string, args ...any) (n int) {
	p.t.Helper()
	if err := p.pool.QueryRow(p.t.Context(), query, args...).Scan(&n); err != nil {
		p.t.Fatal(err)
	}
	return n
}

func (p *plant) inbox(state string) int {
	p.t.Helper()
	return p.count("SELECT count(*) FROM inbox WHERE state = $1", state)
}

// pending returns the tags of what the consumer was delivered and did not acknowledge.
func (p *plant) pending() (tags []string) {
	p.t.Helper()
	pending, err := p.redis.XPendingExt(p.t.Context(), &redis.XPendingExtArgs{Stream: broker.Stream, Group: worker.EmailConsumer, Start: "-", End: "+", Count: 1000}).Result()
	if err != nil && !redis.HasErrorPrefix(err, "NOGROUP") {
		p.t.Fatal(err)
	}
	for _, one := range pending {
		tags = append(tags, one.ID)
	}
	return tags
}

// published returns the ids of the events in the stream, in its order; each as often as it is there.
func (p *plant) published() (ids []string) {
	p.t.Helper()
	entries, err := p.redis.XRange(p.t.Context(), broker.Stream, "-", "+").Result()
	if err != nil {
		p.t.Fatal(err)
	}
	for _, e := range entries {
		ids = append(ids, e.Values["id"].(string))
	}
	return ids
}

// eventually asks again and again until what is expected holds.
func (p *plant) eventually(what string, holds func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(time.Minute); !holds(); {
		if time.Now().After(deadline) {
			p.t.Fatalf("not within a minute: %s", what)
		}
		select {
		case <-p.t.Context().Done():
		case <-time.After(time.Millisecond):
		}
	}
}

// pass makes the time pass after which the work of a consumer that gives no sign of life counts as abandoned.
func (p *plant) pass() {
	p.t.Helper()
	if _, err := p.pool.Exec(p.t.Context(), "UPDATE inbox SET received_at = received_at - interval '1 hour' WHERE state = 'received'"); err != nil {
		p.t.Fatal(err)
	}
	claim := []any{"XCLAIM", broker.Stream, worker.EmailConsumer, "the dead", 0}
	for _, tag := range p.pending() {
		claim = append(claim, tag)
	}
	if err := p.redis.Do(p.t.Context(), append(claim, "IDLE", 3_600_000, "JUSTID")...).Err(); err != nil {
		p.t.Fatal(err)
	}
}

// reconciled waits until all orders are mailed, ends every process that lives, and checks that nothing is missing, unfinished or
// dead, that the events came in order, and that each order got the mails.
func (p *plant) reconciled(orders, mails int) {
	p.t.Helper()
	p.eventually("every order is mailed", func() bool { return p.inbox("sent") == orders })
	p.eventually("every delivery is acknowledged", func() bool { return len(p.pending()) == 0 })
	said := ""
	for _, one := range p.running {
		if one.cmd.ProcessState == nil {
			one.terminate()
		}
		said += one.said() + "\n"
	}
	out, errs, code := finish(p.t, []string{"XDG_DATA_HOME=" + p.home, "DATABASE_URL=" + p.database}, "reconcile")
	if want := fmt.Sprintf("%12d  orders\n%12d  sent by the consumer\n", orders, orders); code != 0 || !strings.Contains(out, want) {
		p.t.Errorf("reconcile: %d\n%s%s", code, out, errs)
	}
	if n := p.count("SELECT count(*) FROM inbox"); n != orders {
		p.t.Errorf("the inbox has %d events; want %d", n, orders)
	}
	if n := strings.Count(said, "✓ Email sent successfully!"); n != mails {
		p.t.Errorf("%d mails were sent; want %d", n, mails)
	}
	var archived, published []string
	if err := p.pool.QueryRow(p.t.Context(), "SELECT array_agg(event_id::text ORDER BY id) FROM outbox_published").Scan(&archived); err != nil {
		p.t.Fatal(err)
	}
	for _, id := range p.published() {
		if !slices.Contains(published, id) {
			published = append(published, id)
		}
	}
	if !slices.Equal(published, archived) {
		p.t.Errorf("the events came first as %v; want %v", published, archived)
	}
}

// inTurn starts two workers behind gates to Redis and places an order. It returns first the worker that has published it and not
// committed: Redis has answered, and the answer is held in front of it.
func (p *plant) inTurn() (first, second *program, held *gate) {
	p.t.Helper()
	one, oneGate := p.startBehind("Redis", "worker")
	two, twoGate := p.startBehind("Redis", "worker")
	p.place("before", 5)
	p.eventually("what was placed is published", func() bool { return p.count("SELECT count(*) FROM outbox_published") == 5 })
	for _, w := range []*program{one, two} {
		w.waitFor(regexp.MustCompile("Outbox worker started"))
	}
	oneGate.stopAt("xadd", true)
	twoGate.stopAt("xadd", true)
	p.place("held", 1)
	select {
	case <-oneGate.caught:
		twoGate.stopAt("", false)
		return one, two, oneGate
	case <-twoGate.caught:
		oneGate.stopAt("", false)
		return two, one, twoGate
	case <-time.After(time.Minute):
		p.t.Fatal("nothing was published")
		return nil, nil, nil
	}
}

func TestAWorkerThatIsKilledAfterItPublishedAndBeforeItCommittedLosesNothing(t *testing.T) {
	t.Parallel()
	p := newPlant(t)
	first, _, _ := p.inTurn()
	if n := p.count("SELECT count(*) FROM outbox_published"); n != 5 || len(p.published()) != 6 {
		t.Fatalf("%d of %d published events are committed; want 5 of 6", n, len(p.published()))
	}
	killed := time.Now()
	first.kill()
	p.eventually("the other publishes it", func() bool { return len(p.published()) == 7 })
	t.Logf("the other worker published %s after the first was killed", time.Since(killed))
	p.place("after", 5)
	p.start(nil, "consumer")
	p.reconciled(11, 11)
}

func TestAWorkerThatIsStoppedInItsTurnLosesItAndDoesNoHarmWhenItGoesOn(t *testing.T) {
	t.Parallel()
	p := newPlant(t)
	first, second, held := p.inTurn()
	if err := first.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	held.open()
	p.start(nil, "consumer")
	p.place("meanwhile", 5)
	p.eventually("the other has taken over", func() bool { return p.inbox("sent") == 11 })
	if err := first.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	first.waitFor(regexp.MustCompile("Publishing outbox events fails")) // its transaction is gone
	p.place("later", 5)
	p.eventually("the two go on", func() bool { return p.inbox("sent") == 16 })
	second.kill()
	p.place("alone", 5)
	p.eventually("the first does too, alone", func() bool { return p.inbox("sent") == 21 })
	p.reconciled(21, 21)
}

func TestSixteenWorkersOfWhichOneIsKilledAndOneStopsPublishEverythingInOrder(t *testing.T) {
	t.Parallel()
	p := newPlant(t)
	workers := make([]*program, 16)
	for i := range workers {
		workers[i] = p.start([]string{"DATABASE_URL=" + p.database + "&pool_max_conns=2"}, "worker")
	}
	for _, w := range workers {
		w.waitFor(regexp.MustCompile("Outbox worker started"))
	}
	p.start(nil, "consumer")
	const each = 40
	for i, then := range []func() error{
		func() error { workers[0].kill(); return nil },
		func() error { return workers[1].cmd.Process.Signal(syscall.SIGSTOP) },
		func() error { return workers[1].cmd.Process.Signal(syscall.SIGCONT) },
		func() error { return nil },
	} {
		p.place(fmt.Sprint("order-", i), each/2)
		if err := then(); err != nil {
			t.Fatal(err)
		}
		p.place(fmt.Sprint("order-later-", i), each/2)
		p.eventually("every order so far is mailed", func() bool { return p.inbox("sent") == (i+1)*each })
	}
	p.reconciled(4*each, 4*each)
}

func TestAConsumerThatIsKilledLeavesItsWorkToTheNext(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		start func(p *plant) (dies *program, there func() bool)
		mails int // to the one order
	}{
		"after the inbox, before the mail": {mails: 1, start: func(p *plant) (*program, func() bool) {
			silent, err := net.Listen("tcp", "127.0.0.1:0") // a mail server that never says a word
			if err != nil {
				p.t.Fatal(err)
			}
			p.t.Cleanup(func() { silent.Close() })
			dies := p.start([]string{"EMAIL_SENDER=smtp", "SMTP_TLS=none", "EMAIL_FROM=orders@example.com", "SMTP_ADDR=" + silent.Addr().String()}, "consumer")
			return dies, func() bool { return p.inbox("received") == 1 }
		}},
		// Whether the mail went out cannot be known: it is sent again.
		"after the mail, before its mark": {mails: 2, start: func(p *plant) (*program, func() bool) {
			dies, g := p.startBehind("PostgreSQL", "consumer")
			g.stopAt("name: MarkSent", false)
			return dies, g.isCaught
		}},
		"after the mark, before the acknowledgement": {mails: 1, start: func(p *plant) (*program, func() bool) {
			dies, g := p.startBehind("Redis", "consumer")
			g.stopAt("xack", false)
			return dies, g.isCaught
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPlant(t)
			p.start(nil, "worker")
			p.place("order", 1)
			dies, there := test.start(p)
			p.eventually("the consumer is there", there)
			if sent, pending := p.inbox("sent"), p.pending(); (sent == 1) != strings.HasPrefix(name, "after the mark") || len(pending) != 1 {
				t.Errorf("when it dies, %d events are marked sent, and %v is pending", sent, pending)
			}
			dies.kill()
			p.pass()
			p.start(nil, "consumer")
			p.reconciled(1, test.mails)
		})
	}
}

func (g *gate) isCaught() bool {
	select {
	case <-g.caught:
		return true
	default:
		return false
	}
}
