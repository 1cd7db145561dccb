package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/internal/config"
	"idempotent-orders/internal/connect"
	"idempotent-orders/internal/local"
	"idempotent-orders/migrations"
)

const (
	// closeTimeout bounds the closing of connections, on which a silent server may leave us waiting.
	closeTimeout = 500 * time.Millisecond
	// stopServersTimeout bounds the stop of servers that this program started.
	stopServersTimeout = 1500 * time.Millisecond
)

// stores are PostgreSQL and Redis, opened, and the local servers behind them, if any.
type stores struct {
	servers *local.Servers
	pool    *pgxpool.Pool
	redis   redis.UniversalClient
}

// open chooses the servers, opens them and makes sure that the schema fits.
func open(ctx context.Context, cfg config.Config, folder string, which parts, log *slog.Logger) (*stores, error) {
	servers, err := local.Choose(ctx, wanted(cfg, folder, !which.migrate, log))
	if err != nil {
		return nil, err
	}
	s := &stores{servers: servers, redis: connect.Redis(servers.RedisAddrs, servers.RedisPassword)}
	if err := s.connect(ctx, cfg, which, log); err != nil {
		s.close(ctx, log)
		return nil, err
	}
	return s, nil
}

// openDatabase opens PostgreSQL alone, and Redis should it be there, for a command that looks at what there is. Neither is started on
// an empty folder: nothing would be in it.
func openDatabase(ctx context.Context, cfg config.Config, folder string, log *slog.Logger) (*stores, error) {
	w := wanted(onlyWhatIs(cfg, folder), folder, true, log)
	w.RedisSet = true // none is needed
	servers, err := local.Choose(ctx, w)
	if err != nil {
		return nil, err
	}
	s := &stores{servers: servers, redis: connect.Redis(servers.RedisAddrs, servers.RedisPassword)}
	s.pool, err = connect.PostgreSQL(ctx, servers.DatabaseURL)
	if err != nil {
		err = fmt.Errorf("%w: %w", errNoPostgreSQL, err)
	} else {
		err = migrations.Check(ctx, s.pool)
	}
	if err != nil {
		s.close(ctx, log)
		return nil, err
	}
	return s, nil
}

// onlyWhatIs leaves only the default addresses where no server was ever started in the folder.
func onlyWhatIs(cfg config.Config, folder string) config.Config {
	for name, set := range map[string]*bool{"postgresql": &cfg.DatabaseSet, "redis": &cfg.RedisSet} {
		if _, err := os.Stat(filepath.Join(folder, name)); errors.Is(err, fs.ErrNotExist) {
			*set = true
		}
	}
	return cfg
}

var errNoPostgreSQL = errors.New("cannot use PostgreSQL; check DB_HOST, DB_PORT, DB_USER, DB_PASSWORD, DB_NAME or DATABASE_URL")

func wanted(cfg config.Config, folder string, inParts bool, log *slog.Logger) local.Wanted {
	return local.Wanted{
		DatabaseURL: cfg.DatabaseURL, DatabaseSet: cfg.DatabaseSet,
		RedisAddrs: cfg.RedisAddrs, RedisPassword: cfg.RedisPassword, RedisSet: cfg.RedisSet,
		Parts: inParts, Folder: folder, Log: log,
	}
}

func (s *stores) connect(ctx context.Context, cfg config.Config, which parts, log *slog.Logger) (err error) {
	err = local.WhenReady(ctx, log, func(ctx context.Context) (err error) {
		s.pool, err = connect.PostgreSQL(ctx, s.servers.DatabaseURL)
		return err
	})
	if err != nil {
		return fmt.Errorf("%w: %w", errNoPostgreSQL, err)
	}
	log.InfoContext(ctx, "Connected to database successfully")
	if which.migrate {
		if err := migrateUp(ctx, s.servers.DatabaseURL, log); err != nil {
			return err
		}
	}
	if err := migrations.Check(ctx, s.pool); err != nil {
		return err
	}
	if err := local.WhenReady(ctx, log, func(ctx context.Context) error { return s.redis.Ping(ctx).Err() }); err != nil {
		return fmt.Errorf("cannot use the Redis at %s; check REDIS_ADDR and REDIS_PASSWORD: %w", strings.Join(s.servers.RedisAddrs, ","), err)
	}
	log.InfoContext(ctx, "Connected to Redis successfully")
	return nil
}

// close closes what is open, and stops the servers that were started. A server that does not stop in time is left running,
// for the next run to find: nothing is lost by it.
func (s *stores) close(ctx context.Context, log *slog.Logger) {
	within(closeTimeout, func() {
		_ = s.redis.Close()
		if s.pool != nil {
			s.pool.Close()
		}
	})
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopServersTimeout)
	defer cancel()
	if err := s.servers.Stop(ctx); err != nil {
		log.WarnContext(ctx, "A local server did not stop, and is left running", "error", err)
	}
}

// within waits for do, but not longer than limit.
func within(limit time.Duration, do func()) {
	done := make(chan struct{})
	go func() { defer close(done); do() }()
	select {
	case <-done:
	case <-time.After(limit):
	}
}

func migrateUp(ctx context.Context, databaseURL string, log *slog.Logger) error {
	m, err := migrations.Open(databaseURL, log)
	if err != nil {
		return err
	}
	defer m.Close()
	applied, err := m.Up(ctx)
	for _, a := range applied {
		log.InfoContext(ctx, "Migration applied", "migration", a.Source.Path, "took", a.Duration)
	}
	if err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	return nil
}

// migrate is the command that moves the schema, or shows where it stands.
func migrate(ctx context.Context, cfg config.Config, folder, direction string, stdout io.Writer, log *slog.Logger) error {
	w := wanted(cfg, folder, true, log)
	w.RedisSet = true // the schema needs none
	servers, err := local.Choose(ctx, w)
	if err != nil {
		return err
	}
	defer servers.Stop(context.WithoutCancel(ctx))
	m, err := migrations.Open(servers.DatabaseURL, log)
	if err != nil {
		return err
	}
	defer m.Close()
	switch direction {
	case "up":
		applied, err := m.Up(ctx)
		for _, a := range applied {
			fmt.Fprintln(stdout, "up  ", a.Source.Path, a.Duration.Round(time.Millisecond))
		}
		if err == nil && len(applied) == 0 {
			fmt.Fprintln(stdout, "the database is up to date")
		}
		return err
	case "down":
		result, err := m.Down(ctx)
		if err == nil && result == nil {
			fmt.Fprintln(stdout, "no migration is applied")
		} else if err == nil {
			fmt.Fprintln(stdout, "down", result.Source.Path, result.Duration.Round(time.Millisecond))
		}
		return err
	default:
		status, err := m.Status(ctx)
		for _, s := range status {
			fmt.Fprintf(stdout, "%-8s %s\n", s.State, s.Source.Path)
		}
		return err
	}
}
