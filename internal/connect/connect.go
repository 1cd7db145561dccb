// Package connect opens the program's two stores, the same way for the program and for its tests.
package connect

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

const (
	// patience bounds the first contact with a store.
	patience = 5 * time.Second
	// maxConns is how many connections a process may hold, unless the url says otherwise. Sends that wait for another's
	// commit hold one each; pgx's own default, four on a small machine, is soon used up.
	maxConns = 16
)

// PostgreSQL opens a pool on the database at url and makes sure that it answers. The url may set the pool's own
// parameters, such as pool_max_conns.
func PostgreSQL(ctx context.Context, url string) (*pgxpool.Pool, error) {
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, fmt.Errorf("read the database's address: %w", err)
	}
	if !strings.Contains(url, "pool_max_conns") {
		cfg.MaxConns = maxConns
	}
	cfg.ConnConfig.RuntimeParams["application_name"] = "idempotent-orders"
	cfg.ConnConfig.ConnectTimeout = patience
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("open the database: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := pool.Ping(ctx); err != nil {
		pool.Close()
		return nil, fmt.Errorf("reach the database: %w", err)
	}
	return pool, nil
}

// Redis returns a client for the server at addrs, or for a Redis Cluster when there are several. It does not connect yet.
func Redis(addrs []string, password string) redis.UniversalClient {
	return redis.NewUniversalClient(&redis.UniversalOptions{
		Addrs:                 addrs,
		Password:              password,
		ContextTimeoutEnabled: true, // else a deadline in the context does nothing
		MaxRetries:            -1,   // the callers know what a lost reply means to them
		DialTimeout:           time.Second,
		DialerRetries:         1,
		PoolSize:              64,
		DisableIdentity:       true,
		MaintNotificationsConfig: &maintnotifications.Config{
			Mode: maintnotifications.ModeDisabled, // they would delay commands on servers that know them
		},
	})
}

// LogRedis sends what go-redis has to say of its connections to log, instead of to standard error.
func LogRedis(log *slog.Logger) { redis.SetLogger(redisLog{log}) }

type redisLog struct{ log *slog.Logger }

func (l redisLog) Printf(ctx context.Context, format string, args ...any) {
	l.log.DebugContext(ctx, fmt.Sprintf(format, args...), "from", "go-redis")
}
