//go:build faults

package fault

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"idempotent-orders/gen/db"
)

var (
	crashAt Point        // empty: nowhere
	panicAt Point        // the same
	left    atomic.Int64 // how often it is still reached until the process dies
	removed Removal      // empty: none
)

func init() {
	if err := read(os.Getenv); err != nil {
		fmt.Fprintln(os.Stderr, "faults:", err)
		os.Exit(2)
	}
}

// read reads what is to break.
func read(getenv func(string) string) error {
	name, times, counted := strings.Cut(getenv("CRASH_AT"), ":")
	n, err := strconv.ParseInt(times, 10, 64)
	switch {
	case !counted:
		n = 1
	case err != nil || n < 1:
		return fmt.Errorf("CRASH_AT=%s:%s: after the colon stands how often the point is reached, from 1", name, times)
	}
	if name != "" && !slices.Contains(points, Point(name)) {
		return fmt.Errorf("CRASH_AT=%s is no point; they are %v", name, points)
	}
	panics := Point(getenv("PANIC_AT"))
	if panics != "" && !slices.Contains(points, panics) {
		return fmt.Errorf("PANIC_AT=%s is no point; they are %v", panics, points)
	}
	remove := Removal(getenv("REMOVE"))
	if remove != "" && !slices.Contains(removals, remove) {
		return fmt.Errorf("REMOVE=%s is nothing to remove; there are %v", remove, removals)
	}
	crashAt, panicAt, removed = Point(name), panics, remove
	left.Store(n)
	return nil
}

// Reached kills this process with SIGKILL if this is where it is to die, which the last line on standard error tells, and panics
// where that is asked for.
func (p Point) Reached() {
	if p == panicAt {
		panic("PANIC_AT " + p)
	}
	if p != crashAt || left.Add(-1) != 0 {
		return
	}
	fmt.Fprintln(os.Stderr, "CRASH_AT", p)
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // nothing more is done until the signal comes
}

// Removed tells whether the device is removed.
func (r Removal) Removed() bool { return r == removed }

// SQL returns d, with which the statements are other ones when a device is removed that is written in SQL.
func SQL(d db.DBTX) db.DBTX {
	change, ok := changes[removed]
	if !ok {
		return d
	}
	return changed{d, change}
}

// change is how a device is taken out of a statement, and of the table it relies on.
type change struct {
	statement string         // its name
	device    *regexp.Regexp // what is replaced
	without   string         // by what
	before    string         // what is executed before, each time
}

var changes = map[Removal]change{
	UniqueKey: {
		"PlaceOrders", regexp.MustCompile(`(?s)ON CONFLICT \(digest\).*?(RETURNING)`), `$1`,
		`DO $$ BEGIN
			IF EXISTS (SELECT FROM pg_constraint WHERE conname = 'idempotency_keys_pkey') THEN
				ALTER TABLE idempotency_keys DROP CONSTRAINT idempotency_keys_pkey;
				CREATE INDEX ON idempotency_keys (digest);
			END IF;
		END $$`,
	},
	Turn: {
		"TakeTurn", regexp.MustCompile(`pg_try_advisory_xact_lock\((\$1::bigint)\)`), `($1 IS NOT NULL)`, "",
	},
	MaterializedClaim: {
		// What the planner may do with a claim that is not materialized: it asks for the claim again with each row it looks at.
		"ClaimOutboxBatch", regexp.MustCompile(`(?s)claimed AS MATERIALIZED \(\s*(SELECT.*?)( ORDER BY.*?)\s*\), (moved AS .*?)SELECT claimed.id FROM claimed`),
		`$3$1 AND outbox.id IS NOT NULL$2`, "",
	},
	FloorHorizon: {
		"TakeTurn", regexp.MustCompile(`outbox_writers\(\)`), `'{}'::text[]`, "",
	},
	Inbox: {
		"EnterInbox", regexp.MustCompile(`(?s)(SET) (holder = .*?)\nWHERE .*?(\$4::interval)\)`),
		"$1 state = 'received', finished_at = NULL, reason = NULL, $2\nWHERE $3 IS NOT NULL", "",
	},
}

type changed struct {
	db.DBTX
	change
}

func (c changed) apply(ctx context.Context, sql string) (string, error) {
	if !strings.HasPrefix(sql, "-- name: "+c.statement+" ") {
		return sql, nil
	}
	if !c.device.MatchString(sql) {
		return "", fmt.Errorf("REMOVE=%s does not find what it removes in %s", removed, sql)
	}
	if c.before != "" {
		if _, err := c.DBTX.Exec(ctx, c.before); err != nil {
			return "", fmt.Errorf("REMOVE=%s: %w", removed, err)
		}
	}
	return c.device.ReplaceAllString(sql, c.without), nil
}

func (c changed) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	sql, err := c.apply(ctx, sql)
	if err != nil {
		return pgconn.CommandTag{}, err
	}
	return c.DBTX.Exec(ctx, sql, args...)
}

func (c changed) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	sql, err := c.apply(ctx, sql)
	if err != nil {
		return nil, err
	}
	return c.DBTX.Query(ctx, sql, args...)
}

func (c changed) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	sql, err := c.apply(ctx, sql)
	if err != nil {
		return failed{err}
	}
	return c.DBTX.QueryRow(ctx, sql, args...)
}

type failed struct{ err error }

func (f failed) Scan(...any) error { return f.err }
