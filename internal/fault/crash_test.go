package fault_test

import (
	"cmp"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

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
	each(atOnce, cases, func(c *crash) { c.survived = t.Run(c.name(), c.play) })
	cover(t, cases)
}

// each does something with all items, so many at once.
func each[T any](atOnce int, items []T, do func(T)) {
	queue := make(chan T, len(items))
	for _, item := range items {
		queue <- item
	}
	close(queue)
	var doing sync.WaitGroup
	for range atOnce {
		doing.Go(func() {
			for item := range queue {
				do(item)
			}
		})
	}
	doing.Wait()
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
	died     bool
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
	c.died = true
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
		each(2*clients, keys(&c.sent), func(key string) {
			sent, _ := c.sent.Load(key)
			for !c.send(server, key, sent.(string)) {
				if time.Now().After(deadline) || !server.alive() {
					c.t.Errorf("%s is not acknowledged", key)
					return
				}
				time.Sleep(50 * time.Millisecond) // as a client does
			}
		})
	}
}

func keys(m *sync.Map) (all []string) {
	m.Range(func(key, _ any) bool { all = append(all, key.(string)); return true })
	return all
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
			var deaths, survived, orders, acked, twice int
			for _, c := range lines[key{point, part}] {
				if c.died {
					deaths++
				}
				if c.died && c.survived {
					survived++
				}
				orders, acked, twice = orders+c.orders, acked+c.ackedBy, twice+c.twice
			}
			fmt.Fprintf(&table, "%-18s %-9s %6d %9d %7d %12d %11d\n", point, cmp.Or(part, "all"), deaths, survived, orders, acked, twice)
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

// collect returns what a query returns.
func collect[T any](c *crash, row pgx.RowToFunc[T], query string, args ...any) []T {
	c.t.Helper()
	rows, _ := c.pool.Query(c.t.Context(), query, args...) // its error is that of CollectRows
	all, err := pgx.CollectRows(rows, row)
	if err != nil {
		c.t.Fatal(err)
	}
	return all
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
