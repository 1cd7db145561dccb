package local

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/internal/connect"
)

// findRedisServer is what tests replace to be on a machine without one.
var findRedisServer = FindRedisServer

const (
	// probeTimeout bounds one look whether a server at a default address can be used.
	probeTimeout = 5 * time.Second
	// readyPatience is how long a server that is starting is waited for.
	readyPatience = 30 * time.Second
)

// Wanted says which servers a program asks for.
type Wanted struct {
	DatabaseURL string // of the database, on a server that may not be there
	DatabaseSet bool   // somebody chose it: it is used as it is, or not at all

	RedisAddrs    []string
	RedisPassword string
	RedisSet      bool // as DatabaseSet

	// Parts tells that other processes run the other parts, so a Redis inside this one would not do.
	Parts  bool
	Folder string // where servers are kept that are started
	Log    *slog.Logger
}

// Servers are the servers a program uses, and those among them that it must stop.
type Servers struct {
	DatabaseURL    string
	RedisAddrs     []string
	RedisPassword  string
	InProcessRedis bool // it is lost with this process

	stops []func(context.Context) error
}

// Choose finds or starts the servers. What was set is used as it is. Else a server at the default address is used if the
// default credentials open it, and only the one database in it is touched; else one is started. The log tells what was
// chosen, and how to choose otherwise.
func Choose(ctx context.Context, w Wanted) (*Servers, error) {
	s := &Servers{}
	if err := s.choosePostgreSQL(ctx, w); err != nil {
		return nil, errors.Join(err, s.Stop(context.WithoutCancel(ctx)))
	}
	if err := s.chooseRedis(ctx, w); err != nil {
		return nil, errors.Join(err, s.Stop(context.WithoutCancel(ctx)))
	}
	return s, nil
}

// Stop stops what Choose started, all at once: one that hangs takes no time from the others.
func (s *Servers) Stop(ctx context.Context) error {
	errs := make([]error, len(s.stops))
	var stops sync.WaitGroup
	for i, stop := range s.stops {
		stops.Go(func() { errs[i] = stop(ctx) })
	}
	stops.Wait()
	s.stops = nil
	return errors.Join(errs...)
}

func (s *Servers) choosePostgreSQL(ctx context.Context, w Wanted) error {
	s.DatabaseURL = w.DatabaseURL
	if w.DatabaseSet {
		return nil
	}
	absent, err := probe(ctx, w.Log, func(ctx context.Context) error { return ensureDatabase(ctx, w.DatabaseURL) })
	if err != nil {
		return fmt.Errorf("the PostgreSQL at the default address %s is there, but does not answer as it should; set DB_HOST or DATABASE_URL to use another: %w", hostOf(w.DatabaseURL), err)
	}
	if absent == nil {
		w.Log.InfoContext(ctx, "Using the PostgreSQL at the default address; set DB_HOST or DATABASE_URL to use another", "address", hostOf(w.DatabaseURL))
		return nil
	}
	w.Log.InfoContext(ctx, "No usable PostgreSQL at the default address; starting one. Set DB_HOST or DATABASE_URL to use another",
		"address", hostOf(w.DatabaseURL), "reason", reason(absent))
	server, err := StartPostgreSQL(ctx, PostgreSQLOptions{Dir: filepath.Join(w.Folder, "postgresql"), Log: w.Log})
	if err != nil {
		return err
	}
	s.stops = append(s.stops, server.Stop)
	s.DatabaseURL = server.URL(databaseOf(w.DatabaseURL))
	return ensureDatabase(ctx, s.DatabaseURL)
}

func (s *Servers) chooseRedis(ctx context.Context, w Wanted) error {
	s.RedisAddrs, s.RedisPassword = w.RedisAddrs, w.RedisPassword
	if w.RedisSet {
		return nil
	}
	absent, err := probe(ctx, w.Log, func(ctx context.Context) error { return pingRedis(ctx, w.RedisAddrs) })
	if err != nil {
		return fmt.Errorf("the Redis at the default address %s is there, but does not answer as it should; set REDIS_ADDR to use another: %w", strings.Join(w.RedisAddrs, ","), err)
	}
	if absent == nil {
		w.Log.InfoContext(ctx, "Using the Redis at the default address; set REDIS_ADDR to use another", "address", strings.Join(w.RedisAddrs, ","))
		return nil
	}
	w.Log.InfoContext(ctx, "No usable Redis at the default address; starting one. Set REDIS_ADDR to use another",
		"address", strings.Join(w.RedisAddrs, ","), "reason", reason(absent))
	if _, err := findRedisServer(); err != nil {
		return s.inProcessRedis(ctx, w, err)
	}
	server, err := StartRedis(ctx, RedisOptions{Dir: filepath.Join(w.Folder, "redis"), Log: w.Log})
	if err != nil {
		return err
	}
	s.stops = append(s.stops, server.Stop)
	s.RedisAddrs, s.RedisPassword = []string{server.Addr()}, ""
	return nil
}

func (s *Servers) inProcessRedis(ctx context.Context, w Wanted, missing error) error {
	if w.Parts {
		return fmt.Errorf("the parts of the program need a Redis to meet in; start one and set REDIS_ADDR, or install redis-server: %w", missing)
	}
	addr, stop, err := StartMiniredis()
	if err != nil {
		return fmt.Errorf("start a Redis in this process: %w", err)
	}
	w.Log.WarnContext(ctx, "There is no redis-server, so a Redis runs inside this process and is lost with it; install redis-server, or set REDIS_ADDR")
	s.stops = append(s.stops, func(context.Context) error { stop(); return nil })
	s.RedisAddrs, s.RedisPassword, s.InProcessRedis = []string{addr}, "", true
	return nil
}

// probe asks a server at a default address whether it can be used. It can, when both results are nil. It cannot, when
// nobody is there or other credentials are wanted: absent says which. What happens else is an error, because to start an
// empty server in the place of one that has the orders would be worse.
func probe(ctx context.Context, log *slog.Logger, ask func(context.Context) error) (absent, err error) {
	err = WhenReady(ctx, log, func(ctx context.Context) error { return attempt(ctx, ask) })
	if notOurs(err) {
		return err, nil
	}
	return nil, err
}

// WhenReady asks a server until it is ready, and returns what it says then. A server that is starting, loading its data,
// or full is asked again for half a minute.
func WhenReady(ctx context.Context, log *slog.Logger, ask func(context.Context) error) error {
	defer sayLater(log, "Waiting for a server that is starting or busy")()
	for deadline := time.Now().Add(readyPatience); ; {
		err := ask(ctx)
		if err == nil || !notYet(err) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pollInterval):
		}
	}
}

func attempt(ctx context.Context, ask func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	return ask(ctx)
}

// notOurs tells whether nobody listens, or who does wants other credentials.
func notOurs(err error) bool {
	var refused *pgconn.PgError
	return errors.Is(err, syscall.ECONNREFUSED) ||
		errors.As(err, &refused) && strings.HasPrefix(refused.Code, "28") || // invalid authorization
		redis.HasErrorPrefix(err, "NOAUTH") || redis.HasErrorPrefix(err, "WRONGPASS") || redis.HasErrorPrefix(err, "NOPERM")
}

// notYet tells whether a server may soon be usable: it is starting, loading its data, or has no connection left.
func notYet(err error) bool {
	var refused *pgconn.PgError
	return errors.As(err, &refused) && (refused.Code == "57P03" || refused.Code == "53300") || redis.HasErrorPrefix(err, "LOADING")
}

// ensureDatabase makes the database at databaseURL if its server has none of that name.
func ensureDatabase(ctx context.Context, databaseURL string) error {
	maintenance, err := url.Parse(databaseURL)
	if err != nil {
		return err
	}
	maintenance.Path = "/postgres"
	conn, err := pgx.Connect(ctx, maintenance.String())
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	name := databaseOf(databaseURL)
	var exists bool
	if err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", name).Scan(&exists); err != nil {
		return fmt.Errorf("look for database %s: %w", name, err)
	}
	if exists {
		return nil
	}
	_, err = conn.Exec(ctx, "CREATE DATABASE "+pgx.Identifier{name}.Sanitize()+" TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C'")
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && (pgErr.Code == "42P04" || pgErr.Code == "23505") { // another program made it first
		return nil
	}
	if err != nil {
		return fmt.Errorf("create database %s: %w", name, err)
	}
	return nil
}

func pingRedis(ctx context.Context, addrs []string) error {
	client := connect.Redis(addrs, "")
	defer client.Close()
	return client.Ping(ctx).Err()
}

func hostOf(databaseURL string) string {
	u, err := url.Parse(databaseURL)
	if err != nil {
		return ""
	}
	return u.Host
}

func databaseOf(databaseURL string) string {
	u, err := url.Parse(databaseURL)
	if err != nil {
		return ""
	}
	return strings.TrimPrefix(u.Path, "/")
}

// reason is the last and plainest part of an error about a connection.
func reason(err error) string {
	lines := strings.Split(strings.TrimSpace(err.Error()), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}
