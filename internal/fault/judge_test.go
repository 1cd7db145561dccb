package fault_test

import (
	"maps"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"idempotent-orders/broker"
)

// markedWhenDead waits until PostgreSQL has done what the dead process asked for, and returns the orders whose mails are marked.
func (c *crash) markedWhenDead() map[string]bool {
	c.t.Helper()
	c.eventually("the connections of the dead are closed", func() bool {
		return c.count("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND usename = $1", victim) == 0
	})
	marked := map[string]bool{}
	for _, order := range collect(c, pgx.RowTo[string], `SELECT aggregate_id::text FROM outbox_published JOIN inbox USING (event_id) WHERE state = 'sent'`) {
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
	type placed struct{ Key, Order string }
	orders := map[string]string{} // key to order
	for _, p := range collect(c, pgx.RowToStructByPos[placed], "SELECT k.key, o.id::text FROM idempotency_keys k JOIN orders o ON o.id = k.order_id WHERE k.operation <> 'old'") {
		orders[p.Key] = p.Order
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
