package fault_test

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/broker"
	"idempotent-orders/internal/fault"
	"idempotent-orders/internal/testenv"
)

const (
	// patience bounds each wait. The longest is for what a dead consumer held: 30 s, and a walk over the stream.
	patience = 90 * time.Second
	// clients is how many send orders at once, until the process dies.
	clients = 4
	// mostOrders ends a case in which the process does not die.
	mostOrders = 2000
	// atOnce is how many cases run at once. They mostly wait for what a dead process held.
	atOnce = 12
	// victim is the role of PostgreSQL that processes have which are to die.
	victim = "victim"
)

// Each point, in a process of its own and in one that does everything: the process dies there, is started again, every send is
// repeated, and then it is judged. CRASHES=n does so n times, where a point can be reached more often at a later time.
func TestAProcessMayDieAtAnyPoint(t *testing.T) {
	t.Parallel()
	rounds := 1
	if n := os.Getenv("CRASHES"); n != "" {
		var err error
		if rounds, err = strconv.Atoi(n); err != nil || rounds < 1 {
			t.Fatalf("CRASHES=%s is not how often each point is tried", n)
		}
	}
	build(t)
	var cases []*crash
	for round := range rounds {
		for _, point := range fault.Points() {
			cases = append(cases, &crash{point: point, round: round, part: partOf(point)}, &crash{point: point, round: round})
		}
	}
	// What takes longest comes first.
	slices.SortStableFunc(cases, func(a, b *crash) int { return cmp.Compare(partOf(a.point), partOf(b.point)) })
	queue := make(chan *crash, len(cases))
	for _, c := range cases {
		queue <- c
	}
	close(queue)
	var players sync.WaitGroup
	for range atOnce {
		players.Go(func() {
			for c := range queue {
				c.survived = t.Run(c.name(), c.play)
			}
		})
	}
	players.Wait()
	cover(t, cases)
}

// partOf returns the part of the program that has a point.
func partOf(p fault.Point) string {
	where, _, _ := strings.Cut(string(p), ".")
	part, ok := map[string]string{
		"server": "server", "guard": "server", "place": "server",
		"relay": "worker", "retry": "worker", "redrive": "worker", "sweep": "worker",
		"email": "consumer",
	}[where]
	if !ok {
		panic("no part has the point " + p)
	}
	return part
}

// crash is one death.
type crash struct {
	point fault.Point
	part  string // the part that dies; empty: the process that does everything
	round int

	t        *testing.T
	env      []string // of processes that live
	deadly   []string // of the one that dies
	pool     *pgxpool.Pool
	redis    redis.UniversalClient
	sent     sync.Map   // key to body
	acked    sync.Map   // key to the first answer
	before   []string   // keys that were sent before, and are sent again to the process that dies
	parked   string     // an order that is parked
	all      []*process // every one there was
	survived bool
	orders   int
	ackedBy  int // how many were acknowledged before the death
	twice    int // mails that were sent twice, since it cannot be decided whether they were
}

func (c *crash) name() string {
	return fmt.Sprintf("%s/%s/%d", c.point, cmp.Or(c.part, "all"), c.round+1)
}

// times is which time the point is reached when the process dies. Points that are reached all the time are tried at other times.
func (c *crash) times() int {
	switch where, _, _ := strings.Cut(string(c.point), "."); {
	case c.point == fault.RelayTurn:
		return 10 + c.round // the first turns find nothing
	case where == "server" || where == "email" || where == "relay" && c.point != fault.RelayHeld,
		c.point == fault.GuardExchanged, c.point == fault.GuardReserved, c.point == fault.GuardPlaced, c.point == fault.PlaceBegun, c.point == fault.PlaceCommitted:
		return 1 + c.round%5
	default:
		return 1
	}
}

func (c *crash) play(t *testing.T) {
	c.t = t
	address := testenv.DatabaseURL(t)
	c.pool = testenv.Pool(t, address)
	rdb, server := testenv.Redis(t)
	c.redis = rdb
	c.exec(`DO $$ BEGIN CREATE ROLE victim SUPERUSER LOGIN PASSWORD 'postgres'; EXCEPTION WHEN OTHERS THEN NULL; END $$`)
	c.env = []string{"DATABASE_URL=" + address + "&pool_max_conns=4", "REDIS_ADDR=" + server.Addr()}
	c.deadly = []string{"DATABASE_URL=" + asVictim(t, address) + "&pool_max_conns=4", "REDIS_ADDR=" + server.Addr(),
		fmt.Sprintf("CRASH_AT=%s:%d", c.point, c.times())}
	c.prepare()

	processes, dying := c.startAll()
	c.sendUntil(serverOf(processes), dying)
	dying.died(string(c.point))
	marked := c.markedWhenDead()
	c.ackedBy = len(keys(&c.acked))
	c.afterwards()

	again := c.start(c.env, c.part)
	processes = append(slices.DeleteFunc(processes, func(p *process) bool { return p == dying }), again)
	c.sendAgain(serverOf(processes))
	c.quiet()
	c.judge(dying, marked)
	for _, p := range processes {
		p.stop()
	}
}

func (c *crash) start(env []string, part string) *process {
	p := start(c.t, env, part)
	c.all = append(c.all, p)
	if part == "" || part == "server" {
		p.ready()
	}
	return p
}

// startAll starts the process that is to die, last, and those beside it.
func (c *crash) startAll() (processes []*process, dying *process) {
	if c.part != "" {
		for _, part := range []string{"server", "worker", "consumer"} {
			if part != c.part {
				processes = append(processes, c.start(c.env, part))
			}
		}
	}
	dying = c.start(c.deadly, c.part)
	return append(processes, dying), dying
}

func serverOf(processes []*process) *process {
	return processes[slices.IndexFunc(processes, func(p *process) bool { return p.part == "" || p.part == "server" })]
}

// prepare brings about what a point needs to be reached.
func (c *crash) prepare() {
	where, _, _ := strings.Cut(string(c.point), ".")
	switch {
	case c.point == fault.PlaceFound, c.point == fault.PlaceLost:
		c.placeBefore("server")
		if c.point == fault.PlaceLost {
			c.redis.FlushAll(c.t.Context())
		}
	case c.point == fault.PlaceUnknown:
		c.deadly[0] = "DATABASE_URL=" + cutCommits(c.t, strings.TrimPrefix(c.deadly[0], "DATABASE_URL="))
	case c.point == fault.GuardRefused:
		c.exec("ALTER TABLE orders ADD CONSTRAINT unlucky CHECK (amount <> 13)")
	case c.point == fault.RelayHeld:
		c.placeBefore("server")
		c.park()
	case where == "retry":
		c.placeBefore("server")
		c.park()
		relay := c.start(c.env, "worker")
		c.eventually("the event is held back", func() bool { return c.count("SELECT count(*) FROM outbox_held") == 1 })
		relay.stop()
		c.unpark()
	case where == "redrive":
		c.placeBefore("server", "worker")
		c.redis.Del(c.t.Context(), broker.Stream)
	case where == "sweep":
		c.age()
	}
}

// placeBefore places some orders, and has everything published if there is a worker.
func (c *crash) placeBefore(parts ...string) {
	var processes []*process
	for _, part := range parts {
		processes = append(processes, c.start(c.env, part))
	}
	for i := range 3 {
		key := fmt.Sprintf("before-%d", i)
		c.before = append(c.before, key)
		c.send(processes[0], key, body(i))
	}
	if len(parts) > 1 {
		c.eventually("everything is published", func() bool { return c.count("SELECT count(*) FROM outbox") == 0 })
	}
	for _, p := range processes {
		p.stop()
	}
}

func (c *crash) park() {
	first, acked := c.acked.Load(c.before[0])
	if !acked {
		c.t.Fatal("there is no order to park")
	}
	c.parked = strings.TrimPrefix(first.(answer).location, "/orders/")
	c.command("events", "park", "--order", c.parked, "--yes")
}

func (c *crash) unpark() {
	c.command("events", "unpark", "--order", c.parked, "--yes")
	c.parked = ""
}

func (c *crash) command(args ...string) {
	c.t.Helper()
	if output, err := run(c.t, c.env, args...); err != nil {
		c.t.Fatalf("%v: %v\n%s", args, err, output)
	}
}

// age writes what a sweep removes: a day of finished events that is to leave the archive, one that has left it, and expired keys.
func (c *crash) age() {
	day := func(ago int) {
		midnight := time.Now().UTC().Truncate(24*time.Hour).AddDate(0, 0, -ago)
		c.exec(fmt.Sprintf("CREATE TABLE outbox_published_%s PARTITION OF outbox_published FOR VALUES FROM ('%s') TO ('%s')",
			midnight.Format("20060102"), midnight.Format(time.RFC3339), midnight.AddDate(0, 0, 1).Format(time.RFC3339)))
		c.exec(`WITH placed AS (
				INSERT INTO orders (id, caller, user_id, amount, created_at) SELECT gen_random_uuid(), 'anonymous', 'old', 1, $1
				FROM generate_series(1, 50) RETURNING id
			), published AS (
				INSERT INTO outbox_published (id, event_id, aggregate_id, event_type, source, payload, created_at, published_at)
				SELECT -row_number() OVER (), (lpad(to_hex((extract(epoch FROM $1::timestamptz) * 1000)::bigint), 12, '0') || '7' || substr(md5(id::text), 1, 3) || '8' || substr(md5(id::text), 4, 15))::uuid, id, 'order.created.v1', '/orders', '{}', $1, $1 FROM placed RETURNING event_id
			)
			INSERT INTO inbox (consumer, event_id, state, holder, received_at, finished_at)
			SELECT 'email', event_id, 'sent', gen_random_uuid(), $1, $1 FROM published`, midnight.Add(12*time.Hour))
	}
	day(6)
	sweeper := c.start(c.env, "worker")
	c.eventually("a day has left the archive", func() bool { return c.count("SELECT count(*) FROM outbox_expired") == 1 })
	sweeper.stop()
	c.exec("UPDATE outbox_expired SET expired_at = expired_at - interval '2 days'")
	day(5)
	c.exec(`INSERT INTO idempotency_keys (digest, caller, operation, key, fingerprint, order_id, expires_at)
		SELECT gen_random_uuid(), 'anonymous', 'old', 'old-' || i, sha256('old'), gen_random_uuid(), now() - interval '1 hour' FROM generate_series(1, 50) AS i`)
}

// afterwards takes away, when the process is dead, what kept it from going on.
func (c *crash) afterwards() {
	if c.point == fault.GuardRefused {
		c.exec("ALTER TABLE orders DROP CONSTRAINT unlucky")
	}
	if c.parked != "" {
		c.unpark()
	}
}

func body(i int) string { return fmt.Sprintf(`{"user_id":"user-%d","amount":%d}`, i%7, 1000+i) }

// sendUntil sends again what was sent before, and then new orders, until the process is dead.
func (c *crash) sendUntil(server, dying *process) {
	if c.point == fault.GuardRefused {
		c.send(server, "unlucky", `{"amount":13}`)
	}
	for i, key := range c.before {
		c.send(server, key, body(i))
	}
	var next atomic.Int64
	var sending sync.WaitGroup
	for range clients {
		sending.Go(func() {
			for dying.alive() {
				i := int(next.Add(1))
				if i > mostOrders {
					return
				}
				c.send(server, fmt.Sprintf("key-%d", i), body(i))
			}
		})
	}
	sending.Wait()
}

// send sends an order, and compares the answer with an earlier one. It returns whether it was acknowledged.
func (c *crash) send(server *process, key, body string) bool {
	if !server.alive() {
		return false
	}
	c.sent.Store(key, body)
	a, err := server.place(key, body)
	if err != nil || a.status != http.StatusOK {
		if err == nil && a.status < 500 && a.status != http.StatusConflict {
			c.t.Errorf("%s was answered %d %s", key, a.status, a.body)
		}
		return false
	}
	first, again := c.acked.LoadOrStore(key, a)
	if again && (first.(answer).body != a.body || first.(answer).expires != a.expires || first.(answer).location != a.location || !a.replayed) {
		c.t.Errorf("%s was answered %+v, and now %+v", key, first, a)
	}
	return true
}

// sendAgain sends everything again, as clients do that have no answer, until each is acknowledged; and then once more.
func (c *crash) sendAgain(server *process) {
	c.t.Helper()
	deadline := time.Now().Add(patience)
	for range 2 {
		queue := make(chan string, mostOrders+10)
		for _, key := range keys(&c.sent) {
			queue <- key
		}
		close(queue)
		var sending sync.WaitGroup
		for range 2 * clients {
			sending.Go(func() {
				for key := range queue {
					sent, _ := c.sent.Load(key)
					for !c.send(server, key, sent.(string)) {
						if time.Now().After(deadline) || !server.alive() {
							c.t.Errorf("%s is not acknowledged", key)
							return
						}
						time.Sleep(50 * time.Millisecond) // as a client does
					}
				}
			})
		}
		sending.Wait()
	}
}

func keys(m *sync.Map) (all []string) {
	m.Range(func(key, _ any) bool { all = append(all, key.(string)); return true })
	return all
}

// markedWhenDead waits until PostgreSQL has done what the dead process asked for, and returns the orders whose mails are marked.
func (c *crash) markedWhenDead() map[string]bool {
	c.t.Helper()
	c.eventually("the connections of the dead are closed", func() bool {
		return c.count("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND usename = $1", victim) == 0
	})
	rows, err := c.pool.Query(c.t.Context(), `SELECT aggregate_id::text FROM outbox_published JOIN inbox USING (event_id) WHERE state = 'sent'`)
	if err != nil {
		c.t.Fatal(err)
	}
	marked := map[string]bool{}
	for rows.Next() {
		var order string
		if err := rows.Scan(&order); err != nil {
			c.t.Fatal(err)
		}
		marked[order] = true
	}
	return marked
}

// quiet waits until there is nothing more to do: everything is published, mailed, marked and acknowledged.
func (c *crash) quiet() {
	c.t.Helper()
	c.eventually("everything is published, mailed and marked", func() bool {
		return c.count(`SELECT (SELECT count(*) FROM outbox) + (SELECT count(*) FROM outbox_held)
			+ (SELECT count(*) FROM orders o WHERE o.user_id <> 'old' AND NOT EXISTS (
				SELECT FROM outbox_published p JOIN inbox i USING (event_id) WHERE p.aggregate_id = o.id AND i.state = 'sent'))`) == 0
	})
	c.eventually("everything is acknowledged", func() bool {
		pending, err := c.redis.XPending(c.t.Context(), broker.Stream, "email").Result()
		return err == nil && pending.Count == 0
	})
	if strings.HasPrefix(string(c.point), "sweep.") {
		c.eventually("everything old is swept", func() bool {
			return c.count(`SELECT (SELECT count(*) FROM idempotency_keys WHERE operation = 'old')
				+ (SELECT count(*) FROM outbox_published WHERE id < 0)
				+ (SELECT count(*) FROM outbox_expired WHERE expired_at < now() - interval '1 day')`) == 0
		})
	}
}

// judge compares what there is with what was promised.
func (c *crash) judge(dead *process, marked map[string]bool) {
	c.t.Helper()
	orders := map[string]string{} // key to order
	rows, err := c.pool.Query(c.t.Context(), "SELECT k.key, o.id::text FROM idempotency_keys k JOIN orders o ON o.id = k.order_id WHERE k.operation <> 'old'")
	if err != nil {
		c.t.Fatal(err)
	}
	for rows.Next() {
		var key, id string
		if err := rows.Scan(&key, &id); err != nil {
			c.t.Fatal(err)
		}
		orders[key] = id
	}
	sent := keys(&c.sent)
	c.orders = len(sent)
	if n := c.count("SELECT count(*) FROM orders WHERE user_id <> 'old'"); n != len(sent) || len(orders) != n {
		c.t.Errorf("there are %d orders and %d keys; %d were sent", n, len(orders), len(sent))
	}
	for _, key := range sent {
		first, ok := c.acked.Load(key)
		if !ok || first.(answer).location != "/orders/"+orders[key] {
			c.t.Errorf("%s is acknowledged as %v, and is order %s", key, first, orders[key])
		}
	}
	if output, err := run(c.t, c.env, "reconcile"); err != nil {
		c.t.Errorf("reconcile: %v\n%s", err, output)
	}
	c.judgeMails(dead, marked, slices.Collect(maps.Values(orders)))
}

// judgeMails checks that each order is mailed once. What a dead process had mailed and not marked may be mailed twice.
func (c *crash) judgeMails(dead *process, marked map[string]bool, orders []string) {
	c.t.Helper()
	total := map[string]int{}
	for _, p := range c.all {
		for order, n := range p.mails() {
			total[order] += n
		}
	}
	ofTheDead := dead.mails()
	for _, order := range orders {
		undecided := ofTheDead[order] == 1 && !marked[order]
		switch n := total[order]; {
		case n == 1:
		case n == 2 && undecided:
			c.twice++
		default:
			c.t.Errorf("order %s is mailed %d times; when the process died it had mailed it %d times, and marked it %t", order, n, ofTheDead[order], marked[order])
		}
		delete(total, order)
	}
	if len(total) > 0 {
		c.t.Errorf("mails for orders that are not there: %v", total)
	}
}

// cover prints how often each point was died at, and what came of it.
func cover(t *testing.T, cases []*crash) {
	type key struct {
		point fault.Point
		part  string
	}
	lines := map[key][]*crash{}
	for _, c := range cases {
		lines[key{c.point, c.part}] = append(lines[key{c.point, c.part}], c)
	}
	var table strings.Builder
	fmt.Fprintf(&table, "\n%-18s %-9s %6s %9s %7s %12s %11s\n", "point", "process", "deaths", "survived", "orders", "acknowledged", "mailed twice")
	for _, point := range fault.Points() {
		for _, part := range []string{partOf(point), ""} {
			var survived, orders, acked, twice int
			for _, c := range lines[key{point, part}] {
				if c.survived {
					survived++
				}
				orders, acked, twice = orders+c.orders, acked+c.ackedBy, twice+c.twice
			}
			fmt.Fprintf(&table, "%-18s %-9s %6d %9d %7d %12d %11d\n", point, cmp.Or(part, "all"), len(lines[key{point, part}]), survived, orders, acked, twice)
		}
	}
	t.Log(table.String())
}

func (c *crash) exec(sql string, args ...any) {
	c.t.Helper()
	if _, err := c.pool.Exec(c.t.Context(), sql, args...); err != nil {
		c.t.Fatal(err)
	}
}

func (c *crash) count(query string, args ...any) (n int) {
	c.t.Helper()
	if err := c.pool.QueryRow(c.t.Context(), query, args...).Scan(&n); err != nil {
		c.t.Fatal(err)
	}
	return n
}

func (c *crash) eventually(what string, is func() bool) {
	c.t.Helper()
	for deadline := time.Now().Add(patience); !is(); {
		if time.Now().After(deadline) {
			c.t.Fatalf("it did not come to this: %s", what)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// asVictim returns the address of a database for the role of processes that are to die.
func asVictim(t *testing.T, address string) string {
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(victim, "postgres")
	return u.String()
}

// cutCommits returns the address of a proxy before a database that cuts the line when orders were placed: the reply is lost.
func cutCommits(t *testing.T, address string) string {
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	backend := u.Host
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", backend)
			if err != nil {
				client.Close()
				return
			}
			var cutting atomic.Bool
			note := func(said []byte) {
				if bytes.Contains(said, []byte("order.created.v1")) { // an argument
					cutting.Store(true)
				}
			}
			go pass(server, client, note, func() bool { return false })
			go pass(client, server, func([]byte) {}, cutting.Load)
		}
	}()
	u.Host = listener.Addr().String()
	return u.String()
}

// pass passes on what is said, until the line is cut.
func pass(to, from net.Conn, note func([]byte), cut func() bool) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		note(buf[:n])
		if err != nil && err != io.EOF || cut() {
			return
		}
		if _, werr := to.Write(buf[:n]); werr != nil || err != nil {
			return
		}
	}
}
