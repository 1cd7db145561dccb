package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/internal/connect"
	"idempotent-orders/internal/local"
	"idempotent-orders/internal/testbed"
	"idempotent-orders/migrations"
)

// settings are the only ones that differ from PostgreSQL's defaults, the same for every contender. All contenders reach it
// over TCP on 127.0.0.1.
var settings = map[string]string{"max_connections": "200", "track_commit_timestamp": "on"}

// database is the database that starts every measurement empty, and fullDatabase the one that does not.
const (
	database     = "bench"
	fullDatabase = "bench_full"
)

// lab is what the measurements use: servers of this run's own, and the programs.
type lab struct {
	dir      string // temporary, removed by close
	program  string // the project, built
	self     string // this program
	pgbench  string
	wrk      string // empty when it is not installed
	taskset  string // likewise
	postgres *local.PostgreSQL
	redis    *local.Redis
	rdb      redis.UniversalClient
	pool     *pgxpool.Pool
	seconds  int
	full     *pgxpool.Pool // nil until the full database is filled
	taken    map[string][]sample
}

// openLab builds the program and starts the servers. Close the lab, also after an error.
func openLab(ctx context.Context, seconds int) (l *lab, err error) {
	l = &lab{seconds: seconds, taken: map[string][]sample{}}
	if l.self, err = os.Executable(); err != nil {
		return l, err
	}
	l.wrk, _ = exec.LookPath("wrk")
	l.taskset, _ = exec.LookPath("taskset")
	if l.dir, err = testbed.Folder("bench"); err != nil {
		return l, err
	}
	if l.program, err = testbed.Build(ctx, l.dir); err != nil {
		return l, err
	}
	log := slog.New(slog.DiscardHandler)
	if l.postgres, err = local.StartPostgreSQL(ctx, local.PostgreSQLOptions{Dir: l.dir, Settings: settings, Log: log}); err != nil {
		return l, err
	}
	if l.redis, err = l.startRedis(ctx, 0); err != nil {
		return l, err
	}
	l.rdb = connect.Redis([]string{l.redis.Addr()}, "")
	if l.pool, err = l.create(ctx, database); err != nil {
		return l, err
	}
	return l, l.findPgbench(ctx)
}

// startRedis starts a Redis that keeps nothing on disk, and returns when it answers. Port 0 means any.
func (l *lab) startRedis(ctx context.Context, port int) (*local.Redis, error) {
	return local.StartRedis(ctx, local.RedisOptions{Dir: l.dir, Port: port, Args: []string{"--appendonly", "no", "--save", ""}, Log: slog.New(slog.DiscardHandler)})
}

// loseRedis kills Redis, leaves it away for so long, and starts it again at its address, empty. It returns when Redis answers.
func (l *lab) loseRedis(ctx context.Context, away time.Duration) error {
	_, text, err := net.SplitHostPort(l.redis.Addr())
	if err != nil {
		return err
	}
	port, err := strconv.Atoi(text)
	if err != nil {
		return err
	}
	if err := l.redis.Kill(); err != nil {
		return err
	}
	if err := pause(ctx, away); err != nil {
		return err
	}
	again, err := l.startRedis(ctx, port)
	if err == nil {
		l.redis = again
	}
	return err
}

// findPgbench finds pgbench where the running PostgreSQL has its other programs.
func (l *lab) findPgbench(ctx context.Context) error {
	var bin string
	if err := l.pool.QueryRow(ctx, "SELECT setting FROM pg_config WHERE name = 'BINDIR'").Scan(&bin); err != nil {
		return fmt.Errorf("ask PostgreSQL for its folder: %w", err)
	}
	var err error
	if l.pgbench, err = exec.LookPath(filepath.Join(bin, "pgbench")); err != nil {
		if l.pgbench, err = exec.LookPath("pgbench"); err != nil {
			return errors.New("no pgbench found: install PostgreSQL, of which it is a part (apt-get install postgresql postgresql-contrib)")
		}
	}
	return nil
}

// create makes a database with the project's schema.
func (l *lab) create(ctx context.Context, name string) (*pgxpool.Pool, error) {
	if err := migrations.Create(ctx, l.postgres.URL, name); err != nil {
		return nil, err
	}
	return pgxpool.New(ctx, l.postgres.URL(name)) // without the project's time limits: emptying and filling take what they take
}

// close stops everything and removes the folder, however ctx stands.
func (l *lab) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	var err error
	for _, pool := range []*pgxpool.Pool{l.pool, l.full} {
		if pool != nil {
			pool.Close()
		}
	}
	if l.rdb != nil {
		err = errors.Join(err, l.rdb.Close())
	}
	if l.redis != nil {
		err = errors.Join(err, l.redis.Stop(ctx))
	}
	if l.postgres != nil {
		err = errors.Join(err, l.postgres.Stop(ctx))
	}
	if l.dir != "" {
		err = errors.Join(err, os.RemoveAll(l.dir))
	}
	return err
}

// reset gives every measurement the same start: empty tables, an empty Redis, and a checkpoint just done.
func (l *lab) reset(ctx context.Context) error {
	if err := l.rdb.FlushAll(ctx).Err(); err != nil {
		return fmt.Errorf("empty Redis: %w", err)
	}
	return execute(ctx, l.pool, "TRUNCATE orders, idempotency_keys, outbox, outbox_published, inbox RESTART IDENTITY", "CHECKPOINT")
}

// execute does one thing after the other.
func execute(ctx context.Context, pool *pgxpool.Pool, statements ...string) error {
	for _, sql := range statements {
		if _, err := pool.Exec(ctx, sql); err != nil {
			return fmt.Errorf("%.40s…: %w", sql, err)
		}
	}
	return nil
}

// count returns the one number that a query gives.
func count(ctx context.Context, pool *pgxpool.Pool, sql string) (n int, err error) {
	err = pool.QueryRow(ctx, sql).Scan(&n)
	return n, err
}

// process is a contender: the project, or one of the servers it is measured against.
type process struct {
	name   string
	addr   string // where it serves HTTP
	cmd    *exec.Cmd
	said   *bytes.Buffer // read it after exited
	exited chan struct{}
}

// fresh resets everything and starts a contender.
func (l *lab) fresh(ctx context.Context, name string) (*process, error) {
	if err := l.reset(ctx); err != nil {
		return nil, err
	}
	return l.start(ctx, name, database)
}

// start starts a contender on a database and waits until it answers. Its parts without HTTP are not waited for.
func (l *lab) start(ctx context.Context, name, database string, env ...string) (*process, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	p := &process{name: name, addr: net.JoinHostPort("127.0.0.1", port), said: &bytes.Buffer{}, exited: make(chan struct{})}
	switch name {
	case everything:
		p.cmd = exec.CommandContext(ctx, l.program)
	case server, worker, consumer:
		p.cmd = exec.CommandContext(ctx, l.program, name)
	default:
		p.cmd = exec.CommandContext(ctx, l.self, hiddenServer, name)
	}
	p.cmd.Env = testbed.Env("DATABASE_URL="+l.postgres.URL(database), "REDIS_ADDR="+l.redis.Addr(), "PORT="+port,
		"EMAIL_SENDER=discard", "LOG_LEVEL=warn")
	p.cmd.Env = append(p.cmd.Env, env...)
	p.cmd.Stdout, p.cmd.Stderr = p.said, p.said
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(syscall.SIGTERM) }
	p.cmd.WaitDelay = 15 * time.Second
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.exited)
		_ = p.cmd.Wait()
	}()
	if name == worker || name == consumer {
		return p, nil
	}
	if err := p.ready(ctx); err != nil {
		p.stop()
		return nil, fmt.Errorf("start %s: %w: %s", name, err, lastLine(p.said.Bytes()))
	}
	return p, nil
}

// ready waits until the contender answers.
func (p *process) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	for {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.addr+"/readyz", nil)
		if err != nil {
			return err
		}
		if response, err := http.DefaultClient.Do(request); err == nil {
			_ = response.Body.Close()
			if response.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-p.exited:
			return errors.New("it ended")
		case <-ctx.Done():
			return fmt.Errorf("it does not get ready: %w", ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// stop ends the contender and waits for that; after 15 s it is killed. Stopping again does nothing.
func (p *process) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(15 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.exited
	}
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, err
}
