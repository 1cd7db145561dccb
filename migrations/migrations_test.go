package migrations_test

import (
	"context"
	"errors"
	"log/slog"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/pressly/goose/v3"

	"idempotent-orders/internal/testenv"
	"idempotent-orders/migrations"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// tables lists what there is in the database, but for goose's own.
func tables(t *testing.T, pool *pgxpool.Pool) []string {
	t.Helper()
	rows, err := pool.Query(t.Context(), `SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace
		AND relkind IN ('r', 'p', 'S', 'v', 'm') AND relname NOT LIKE 'goose%' AND relname !~ '_[0-9]{8}$'
		UNION SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY 1`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	var names []string
	for rows.Next() {
		var name string
		if err := rows.Scan(&name); err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	return names
}

func open(t *testing.T, address string) *migrations.Migrations {
	t.Helper()
	m, err := migrations.Open(address, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func TestTheAddressMaySetTheParametersOfAPool(t *testing.T) {
	t.Parallel()
	if _, err := open(t, testenv.DatabaseURL(t)+"&pool_max_conns=2&pool_max_conn_lifetime=1h").Up(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestTheSchemaGoesUpDownAndUp(t *testing.T) {
	t.Parallel()
	address := testenv.DatabaseURL(t) // migrated
	pool := testenv.Pool(t, address)
	m := open(t, address)
	all := tables(t, pool)
	for _, name := range []string{"orders", "idempotency_keys", "outbox", "outbox_published", "inbox"} {
		if !slices.Contains(all, name) {
			t.Errorf("there is no table %s", name)
		}
	}
	if err := migrations.Check(t.Context(), pool); err != nil {
		t.Errorf("a migrated database is refused: %v", err)
	}
	for {
		result, err := m.Down(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if result == nil {
			break
		}
		if err := migrations.Check(t.Context(), pool); !errors.Is(err, migrations.ErrNotMigrated) {
			t.Errorf("after %s: %v; want ErrNotMigrated", result.Source.Path, err)
		}
	}
	if left := tables(t, pool); len(left) > 0 {
		t.Errorf("going down leaves %v", left)
	}
	status, err := m.Status(t.Context())
	if err != nil || len(status) == 0 || slices.ContainsFunc(status, func(s *goose.MigrationStatus) bool { return s.State != "pending" }) {
		t.Errorf("the status is %v, %v", status, err)
	}
	applied, err := m.Up(t.Context())
	if err != nil || len(applied) != len(status) {
		t.Errorf("going up applied %d, %v; want %d", len(applied), err, len(status))
	}
	if again := tables(t, pool); !slices.Equal(again, all) {
		t.Errorf("up, down and up gives %v; want %v", again, all)
	}
}

func TestEightProgramsMayMigrateAtOnce(t *testing.T) {
	t.Parallel()
	address := emptyDatabase(t)
	var group sync.WaitGroup
	total, mu := 0, sync.Mutex{}
	for range 8 {
		group.Go(func() {
			m, err := migrations.Open(address, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Error(err)
				return
			}
			defer m.Close()
			applied, err := m.Up(t.Context())
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			total += len(applied)
		})
	}
	group.Wait()
	if err := migrations.Check(t.Context(), testenv.Pool(t, address)); err != nil {
		t.Error(err)
	}
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	want := 0
	for _, f := range files {
		if strings.HasSuffix(f.Name(), ".sql") {
			want++
		}
	}
	if total != want {
		t.Errorf("eight programs applied %d migrations; want %d", total, want)
	}
}

func TestWhoWaitsForTheLockCanGiveUp(t *testing.T) {
	t.Parallel()
	address := emptyDatabase(t) // with nothing to do, nobody needs the lock
	conn, err := testenv.Pool(t, address).Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	const lockID = 0x6f7264657273
	if _, err := conn.Exec(t.Context(), "SELECT pg_advisory_lock($1)", lockID); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	m, err := migrations.Open(address, slog.New(slog.NewTextHandler(writerFunc(cancel), nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if _, err := m.Up(ctx); err == nil || !strings.Contains(err.Error(), "which another program holds") {
		t.Errorf("under another's lock: %v", err)
	}
}

// writerFunc is called with each line of a log.
type writerFunc func()

func (f writerFunc) Write(line []byte) (int, error) { f(); return len(line), nil }

func TestAnEmptyDatabaseIsNotMigrated(t *testing.T) {
	t.Parallel()
	if err := migrations.Check(t.Context(), testenv.Pool(t, emptyDatabase(t))); !errors.Is(err, migrations.ErrNotMigrated) ||
		!strings.Contains(err.Error(), "migrate up") {
		t.Errorf("got %v; want ErrNotMigrated and the remedy", err)
	}
}

// emptyDatabase returns the address of a database without any schema.
func emptyDatabase(t *testing.T) string {
	u, err := url.Parse(testenv.DatabaseURL(t))
	if err != nil {
		t.Fatal(err)
	}
	pool := testenv.Pool(t, u.String())
	name := strings.TrimPrefix(u.Path, "/") + "_empty"
	if _, err := pool.Exec(t.Context(), "CREATE DATABASE "+name); err != nil {
		t.Fatal(err)
	}
	u.Path = "/" + name
	return u.String()
}
