package fault_test

import (
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"idempotent-orders/broker"
	"idempotent-orders/internal/fault"
	"idempotent-orders/internal/testenv"
)

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
		c.deadly[0] = "DATABASE_URL=" + testenv.CutLine(c.t, strings.TrimPrefix(c.deadly[0], "DATABASE_URL="), testenv.AfterCommit)
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

// asVictim returns the address of a database for the role of processes that are to die.
func asVictim(t *testing.T, address string) string {
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(victim, "postgres")
	return u.String()
}
