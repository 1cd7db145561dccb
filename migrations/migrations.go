// Package migrations holds the only definition of the database schema, and applies it. The files are goose migrations:
// the goose command works on them too, but only this package takes a lock, so that any number of programs may migrate at
// once.
package migrations

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"
)

//go:embed *.sql
var files embed.FS

// ErrNotMigrated tells that the database lacks migrations this program needs.
var ErrNotMigrated = errors.New("the database is not migrated")

// Migrations applies the schema to one database. Close it after use.
type Migrations struct {
	db       *sql.DB
	provider *goose.Provider
}

// Open prepares the migrations of the database at url, a PostgreSQL connection string. It does not connect yet. The lock
// lasts as long as its session, so url must lead to PostgreSQL itself, not to a pooler that shares sessions.
func Open(url string, log *slog.Logger) (*Migrations, error) {
	cfg, err := pgxpool.ParseConfig(url) // which takes out what is for a pool, and PostgreSQL would refuse
	if err != nil {
		return nil, fmt.Errorf("open database for migrations: %w", err)
	}
	db := stdlib.OpenDB(*cfg.ConnConfig)
	provider, err := goose.NewProvider(goose.DialectPostgres, db, files, goose.WithSessionLocker(locker{log}))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read migrations: %w", err), db.Close())
	}
	return &Migrations{db: db, provider: provider}, nil
}

// Create creates a database with the whole schema on a server of one's own, whose databases have the addresses that url
// returns.
func Create(ctx context.Context, url func(database string) string, name string) error {
	conn, err := pgx.Connect(ctx, url("postgres"))
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, "CREATE DATABASE "+pgx.Identifier{name}.Sanitize()); err != nil {
		return err
	}
	m, err := Open(url(name), slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer m.Close()
	_, err = m.Up(ctx)
	return err
}

// Close gives the connections back.
func (m *Migrations) Close() error { return m.db.Close() }

// Up applies every pending migration and returns what was applied, in order.
func (m *Migrations) Up(ctx context.Context) ([]*goose.MigrationResult, error) {
	return m.provider.Up(ctx)
}

// Down takes the last migration back, with the data in its tables. It returns nil when none is applied.
func (m *Migrations) Down(ctx context.Context) (*goose.MigrationResult, error) {
	result, err := m.provider.Down(ctx)
	if errors.Is(err, goose.ErrNoNextVersion) {
		return nil, nil
	}
	return result, err
}

// Status lists every migration and whether it is applied.
func (m *Migrations) Status(ctx context.Context) ([]*goose.MigrationStatus, error) {
	return m.provider.Status(ctx)
}

// Querier is what Check needs of a connection or a pool.
type Querier interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// Check returns nil when the database has every migration of this program, ErrNotMigrated when it lacks one, and another
// error when it cannot be asked. A database that is ahead, as during a rolling deploy, is good.
func Check(ctx context.Context, q Querier) error {
	want := latest()
	var have int64
	err := q.QueryRow(ctx, "SELECT coalesce(max(version_id), 0) FROM goose_db_version WHERE is_applied").Scan(&have)
	if pgErr := (*pgconn.PgError)(nil); errors.As(err, &pgErr) && pgErr.Code == "42P01" { // undefined_table
		have, err = 0, nil
	}
	switch {
	case err != nil:
		return fmt.Errorf("read the schema's version: %w", err)
	case have < want:
		return fmt.Errorf("%w: it is at version %d, this program needs %d; run `migrate up`", ErrNotMigrated, have, want)
	default:
		return nil
	}
}

// latest returns the version of the newest migration in this program.
func latest() int64 {
	entries, err := files.ReadDir(".") // sorted by name, and the names begin with the version
	if err != nil || len(entries) == 0 {
		panic(fmt.Sprintf("migrations are embedded and readable: %v", err))
	}
	version, err := goose.NumericComponent(entries[len(entries)-1].Name())
	if err != nil {
		panic(fmt.Sprintf("migrations are named by version: %v", err))
	}
	return version
}

// locker makes programs that migrate at once take turns. It asks again and again rather than wait inside PostgreSQL: a
// waiting statement holds a snapshot, for which a migration with CREATE INDEX CONCURRENTLY would wait in turn.
type locker struct{ log *slog.Logger }

const lockID = 0x6f7264657273 // "orders"

func (l locker) SessionLock(ctx context.Context, conn *sql.Conn) error {
	began, said := time.Now(), false
	for held := false; ; held = true {
		var locked bool
		err := conn.QueryRowContext(ctx, "SELECT pg_try_advisory_lock($1)", lockID).Scan(&locked)
		switch {
		case err == nil && locked:
			return nil
		case err != nil && !(held && ctx.Err() != nil):
			return fmt.Errorf("take the migration lock: %w", err)
		case !said && time.Since(began) > time.Second:
			l.log.Info("Waiting for another program that migrates")
			said = true
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("take the migration lock, which another program holds: %w", ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (locker) SessionUnlock(ctx context.Context, conn *sql.Conn) error {
	if _, err := conn.ExecContext(ctx, "SELECT pg_advisory_unlock($1)", lockID); err != nil {
		return fmt.Errorf("give the migration lock back: %w", err)
	}
	return nil
}

var _ lock.SessionLocker = locker{}
