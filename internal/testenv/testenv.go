// Package testenv gives tests real servers: one PostgreSQL for each package's run, a fresh database for each test, and a
// redis-server for each test that wants one. They are this run's own, on free ports, and end with it. A server that is not
// installed fails the run and says what to do; nothing is skipped.
package testenv

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/internal/connect"
	"idempotent-orders/internal/local"
	"idempotent-orders/migrations"
)

const template = "template_migrated"

// postgres is started by the first test that wants a database, and stopped by Main.
var postgres struct {
	once    sync.Once
	dir     string
	server  *local.PostgreSQL
	dismiss func() // its guard
	err     error
	count   atomic.Int64
}

// Main runs a package's tests and stops what they started: call it from TestMain, with os.Exit.
func Main(m *testing.M) int {
	connect.LogRedis(slog.New(slog.DiscardHandler)) // tests that take Redis away know that it is away
	code := m.Run()
	if postgres.server != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := postgres.server.Stop(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "stop the tests' PostgreSQL:", err)
			code = max(code, 1)
		}
		if postgres.dismiss != nil { // the guard could be started
			postgres.dismiss()
		}
	}
	if postgres.dir != "" {
		_ = os.RemoveAll(postgres.dir)
	}
	return code
}

// DatabaseURL returns the address of a fresh, migrated database on the run's own PostgreSQL. A test that fails keeps it as
// long as the run lasts.
func DatabaseURL(t testing.TB) string {
	t.Helper()
	postgres.once.Do(startPostgreSQL)
	if postgres.err != nil {
		t.Fatalf("the tests need PostgreSQL: %v\nrun `make test`, which installs it, or install PostgreSQL 14 or newer", postgres.err)
	}
	name := fmt.Sprintf("test_%d", postgres.count.Add(1))
	admin(t, "CREATE DATABASE "+name+" TEMPLATE "+template)
	address := postgres.server.URL(name)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the database was %s", address)
			return
		}
		admin(t, "DROP DATABASE "+name+" WITH (FORCE)")
	})
	return address
}

// Database returns a pool on a fresh, migrated database.
func Database(t testing.TB) *pgxpool.Pool {
	t.Helper()
	return Pool(t, DatabaseURL(t))
}

// Pool opens a pool that closes with the test.
func Pool(t testing.TB, address string) *pgxpool.Pool {
	t.Helper()
	pool, err := connect.PostgreSQL(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

// Redis returns a client of a redis-server of the test's own, and the server, to be killed and started again.
func Redis(t testing.TB) (redis.UniversalClient, *RedisServer) {
	t.Helper()
	s := &RedisServer{t: t, dir: Dir(t)}
	s.Start()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_ = s.server.Stop(ctx)
		s.dismiss()
	})
	client := connect.Redis([]string{s.Addr()}, "")
	t.Cleanup(func() { _ = client.Close() })
	return client, s
}

// RedisServer is a redis-server of one test.
type RedisServer struct {
	t       testing.TB
	dir     string
	port    int
	server  *local.Redis
	dismiss func() // its guard
}

// Addr is where the server is; it stays the same when it is started again.
func (s *RedisServer) Addr() string { return s.server.Addr() }

// Pid is the server's process id.
func (s *RedisServer) Pid() int { return s.server.Pid() }

// Start starts the server, the first time or after Kill, with the data it has on disk.
func (s *RedisServer) Start() {
	s.t.Helper()
	server, err := local.StartRedis(s.t.Context(), local.RedisOptions{Dir: s.dir, Port: s.port, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		s.t.Fatalf("the tests need redis-server: %v\nrun `make test`, which installs it, or install redis-server", err)
	}
	if s.dismiss, err = guard(server.Pid(), s.dir); err != nil {
		s.t.Fatal(err)
	}
	s.server = server
	_, port, err := net.SplitHostPort(server.Addr())
	if err != nil {
		s.t.Fatal(err)
	}
	if s.port, err = strconv.Atoi(port); err != nil {
		s.t.Fatal(err)
	}
}

// Kill kills the server with SIGKILL.
func (s *RedisServer) Kill() {
	s.t.Helper()
	if err := s.server.Kill(); err != nil {
		s.t.Fatal(err)
	}
	s.dismiss()
}

// Forget removes what the killed server has on disk: started again, it is empty.
func (s *RedisServer) Forget() {
	s.t.Helper()
	if err := os.RemoveAll(filepath.Join(s.dir, "redis")); err != nil {
		s.t.Fatal(err)
	}
}

// Keep keeps a copy of what the killed server has on disk, and returns a function that puts it back, while the server is killed
// again: started then, it knows only what it knew when it was kept.
func (s *RedisServer) Keep() (restore func()) {
	s.t.Helper()
	data, kept := filepath.Join(s.dir, "redis"), filepath.Join(s.dir, "kept")
	copyFolder := func(from, to string) {
		if err := errors.Join(os.RemoveAll(to), exec.Command("cp", "-a", from, to).Run()); err != nil {
			s.t.Fatal(err)
		}
	}
	copyFolder(data, kept)
	return func() { copyFolder(kept, data) }
}

// Dir returns a folder that goes with the test, and that an unprivileged server can be given: it lies directly below the
// system's temporary folder, where t.TempDir does not.
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "idempotent-orders-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil { // #nosec G302 -- a folder
		t.Fatal(err)
	}
	return dir
}

func startPostgreSQL() {
	postgres.dir, postgres.err = os.MkdirTemp("", "idempotent-orders-test-")
	if postgres.err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	postgres.server, postgres.err = local.StartPostgreSQL(ctx, local.PostgreSQLOptions{
		Dir: postgres.dir,
		Log: slog.New(slog.DiscardHandler),
		Settings: map[string]string{
			"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "500",
		},
	})
	if postgres.err == nil {
		postgres.dismiss, postgres.err = guard(postgres.server.Pid(), postgres.dir)
	}
	if postgres.err == nil {
		postgres.err = migrations.Create(ctx, postgres.server.URL, template)
	}
}

// admin runs a statement outside any test's database.
func admin(t testing.TB, sql string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, postgres.server.URL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}
