// Package connect opens the program's two stores, the same way for the program and for its tests.
package connect

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
	pgxuuid "github.com/vgarvardt/pgx-google-uuid/v5"
)

const (
	// patience bounds the first contact with a store.
	patience = 5 * time.Second
	// connectTimeout bounds each try to connect to PostgreSQL, unless the url says otherwise. It is short enough for a
	// request to try a second address.
	connectTimeout = 2 * time.Second
	// maxConns is how many connections a process may hold, unless the url says otherwise. Sends that wait for another's
	// commit hold one each; pgx's own default, four on a small machine, is soon used up.
	maxConns = 16
)

// session is what each connection is told, whatever the database's defaults are. A lock is waited for a little longer than
// PostgreSQL takes to notice a deadlock, which is tried again. Statements are planned once for each
// connection, when the tables may still be empty; each finds its rows by an index, and shall go on to when they are full. Where
// there is none to use, the price of a scan that is off would have the statement compiled (jit) each time, for a second.
const session = `
SET default_transaction_isolation = 'read committed';
SET default_transaction_read_only = off;
SET lock_timeout = '1500ms';
SET plan_cache_mode = force_generic_plan;
SET enable_seqscan = off;
SET enable_bitmapscan = off;
SET jit = off`

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
	switch cfg.ConnConfig.DefaultQueryExecMode {
	case pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol:
		return nil, errors.New("default_query_exec_mode cannot be exec or simple_protocol, which have no arrays; use cache_describe behind a pooler")
	}
	cfg.ConnConfig.RuntimeParams["application_name"] = "idempotent-orders"
	cfg.ConnConfig.RuntimeParams["client_encoding"] = "UTF8"
	if !strings.Contains(url, "connect_timeout") {
		cfg.ConnConfig.ConnectTimeout = connectTimeout
	}
	cfg.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
		pgxuuid.Register(conn.TypeMap()) // else each UUID goes as text
		_, err := conn.Exec(ctx, session)
		return err
	}
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("open the database: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := checkEncoding(ctx, pool); err != nil {
		pool.Close()
		return nil, fmt.Errorf("reach the database: %w", err)
	}
	return pool, nil
}

// checkEncoding refuses a database that cannot store, or cannot count, every character a request may have.
func checkEncoding(ctx context.Context, pool *pgxpool.Pool) error {
	conn, err := pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	if encoding := conn.Conn().PgConn().ParameterStatus("server_encoding"); encoding != "UTF8" {
		return fmt.Errorf("it is encoded in %s; make it with ENCODING 'UTF8' TEMPLATE template0", encoding)
	}
	return nil
}

// Tx returns how transactions that write begin: whatever the database's defaults are, and with an end should this process
// leave one idle for as long as stall, because it stopped or its line was cut. Until then others may wait for its locks.
// It waits itself for a lock no longer than lockWait; 0 is for ever.
func Tx(stall, lockWait time.Duration) pgx.TxOptions {
	return pgx.TxOptions{BeginQuery: fmt.Sprintf("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;"+
		" SET LOCAL idle_in_transaction_session_timeout = %d; SET LOCAL lock_timeout = %d", stall.Milliseconds(), lockWait.Milliseconds())}
}

// encrypted is what stands before the address of a Redis that is reached by TLS.
const encrypted = "rediss://"

// Redis returns a client for the server at addrs, or for a Redis Cluster when there are several. With rediss:// before each address
// it speaks TLS alone, to servers whose certificates the system, or SSL_CERT_FILE, trusts. It does not connect yet.
func Redis(addrs []string, password string) redis.UniversalClient {
	var secure *tls.Config
	plain := make([]string, len(addrs))
	for i, addr := range addrs {
		if plain[i] = strings.TrimPrefix(addr, encrypted); plain[i] != addr {
			secure = &tls.Config{MinVersion: tls.VersionTLS12} // the name is taken from the address
		}
	}
	return redis.NewUniversalClient(&redis.UniversalOptions{
		Addrs:                 plain,
		Password:              password,
		TLSConfig:             secure,
		ContextTimeoutEnabled: true, // else a deadline in the context does nothing
		MaxRetries:            -1,   // the callers know what a lost reply means to them
		DialTimeout:           time.Second,
		ReadTimeout:           2 * time.Second,
		WriteTimeout:          2 * time.Second,
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
