package main

import (
	"context"
	"errors"
	"net/url"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"idempotent-orders/internal/testenv"
)

// as returns the address of a database for another role.
func as(t *testing.T, address, role string) string {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(role, "a-password")
	return u.String()
}

// execute runs SQL as a role, on a connection of its own.
func execute(t *testing.T, address, sql string) error {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context()))
	_, err = conn.Exec(t.Context(), sql)
	return err
}

func mustExecute(t *testing.T, address, sql string) {
	t.Helper()
	if err := execute(t, address, sql); err != nil {
		t.Fatalf("%v\nwith %s", err, sql)
	}
}

func file(t *testing.T, name string) string {
	t.Helper()
	content, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// The only test with roles, which belong to the whole server.
func TestEachPartRunsUnderARoleThatMayDoNoMore(t *testing.T) {
	t.Parallel()
	admin := testenv.DatabaseURL(t)
	mustExecute(t, admin, "CREATE DATABASE roles TEMPLATE template0 ENCODING 'UTF8'")
	u, err := url.Parse(admin)
	if err != nil {
		t.Fatal(err)
	}
	u.Path = "/roles"
	admin = u.String()
	mustExecute(t, admin, file(t, "docs/roles/roles.sql"))
	for _, role := range []string{"orders_server", "orders_worker", "orders_migration"} {
		mustExecute(t, admin, "ALTER ROLE "+role+" PASSWORD 'a-password'")
	}
	server, worker, migration := as(t, admin, "orders_server"), as(t, admin, "orders_worker"), as(t, admin, "orders_migration")
	home := "XDG_DATA_HOME=" + testenv.Dir(t)
	migrate := func(direction string) {
		if out, errs, code := finish(t, []string{"DATABASE_URL=" + migration, home}, "migrate", direction); code != 0 {
			t.Fatalf("migrate %s: %d %s%s", direction, code, out, errs)
		}
	}
	migrate("up")
	mustExecute(t, migration, file(t, "docs/roles/grants.sql"))
	migrate("down") // also when the archive is the worker's
	migrate("up")
	mustExecute(t, migration, file(t, "docs/roles/grants.sql"))

	_, redisServer := testenv.Redis(t)
	env := []string{"PORT=0", home, "REDIS_ADDR=" + redisServer.Addr(), "OUTBOX_MAX_AGE=1m"}
	placing := start(t, append(env, "DATABASE_URL="+server), "server").serving()
	relaying := start(t, append(env, "DATABASE_URL="+worker), "worker")
	mailing := start(t, append(env, "DATABASE_URL="+worker), "consumer")
	body, _ := placing.mustPlace("k")
	if again, replayed := placing.mustPlace("k"); again != body || !replayed {
		t.Errorf("again: %s, replayed %t", again, replayed)
	}
	mailing.waitFor(mailFor(body))
	mailing.waitFor(regexp.MustCompile("Email sent successfully"))
	for _, p := range []*program{placing, relaying, mailing} {
		p.terminate()
		if said := p.said(); strings.Contains(said, "permission denied") || strings.Contains(said, "must be owner") {
			t.Errorf("a part may not do what it has to:\n%s", said)
		}
	}

	// What the worker does at night.
	for _, sql := range []string{
		"SELECT create_outbox_partitions(9)", "SELECT expire_outbox_day(outbox_oldest_day_ends(), 1)",
		"SELECT forget_expired_events(name, 'email', 0, 10) FROM outbox_expired", "SELECT drop_expired_events(name) FROM outbox_expired",
		"SELECT expire_outbox_rest(now(), 'email', 10)", "SELECT delete_expired_keys(0, 10)",
		"DO $$ BEGIN ASSERT pg_sequence_last_value('outbox_id_seq') = 1; END $$",
	} {
		if err := execute(t, worker, sql); err != nil {
			t.Errorf("the worker cannot %s: %v", sql, err)
		}
	}
	for role, forbidden := range map[string][]string{
		server: {
			"DELETE FROM orders", "UPDATE orders SET amount = 1", "TRUNCATE orders", "DROP TABLE orders", "DELETE FROM idempotency_keys",
			"UPDATE idempotency_keys SET caller = 'x'", "SELECT * FROM outbox_published", "SELECT payload FROM outbox", "DELETE FROM outbox",
			"SELECT * FROM outbox_held", "SELECT * FROM inbox", "SELECT * FROM relay_state", "SELECT * FROM outbox_dead", "CREATE TABLE t ()",
			"SELECT delete_expired_keys(0, 10)", "INSERT INTO goose_db_version (version_id, is_applied) VALUES (99, true)",
		},
		worker: {
			"SELECT * FROM orders", "INSERT INTO orders (id, caller, user_id, amount) VALUES (gen_random_uuid(), 'x', 'x', 1)", "DELETE FROM orders",
			"SELECT drop_expired_events('orders')", "DROP TABLE idempotency_keys", "UPDATE idempotency_keys SET order_id = gen_random_uuid()",
			"INSERT INTO outbox (event_id, aggregate_id, event_type, source, payload) SELECT gen_random_uuid(), gen_random_uuid(), '', '', '{}'",
			"UPDATE outbox SET payload = '{}'", "SELECT * FROM operations", "DELETE FROM goose_db_version",
		},
	} {
		for _, sql := range forbidden {
			var refused *pgconn.PgError
			if err := execute(t, role, sql); !errors.As(err, &refused) || refused.Code != "42501" { // insufficient_privilege
				t.Errorf("%s: %v", sql, err)
			}
		}
	}
}
