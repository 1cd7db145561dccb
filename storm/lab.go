package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/internal/connect"
	"idempotent-orders/internal/local"
	"idempotent-orders/internal/testbed"
	"idempotent-orders/migrations"
)

const (
	database = "storm"
	// stopPatience is longer than the ten seconds in which the program promises to end.
	stopPatience = 12 * time.Second
)

// lab is what the storm rages over: servers of this run's own, the program's processes, and the lines between them.
type lab struct {
	o         options
	dir       string // temporary; removed by close, unless it is kept
	program   string
	began     time.Time
	guard     *guard
	sink      *sink
	processes map[string]*process
	lines     map[string]*lineProxy
	ports     map[string]string // of the servers
	secrets   []string          // of the callers, by their place in callerNames; nil: the program knows no API keys
	unclean   []string          // processes that did not end on SIGTERM

	mu       sync.Mutex // held while a server is stopped or started
	postgres *local.PostgreSQL
	redis    *local.Redis
	redisAt  int // its port, the same for the whole storm
}

func (l *lab) since() time.Duration { return time.Since(l.began) }

// openLab builds the program and starts everything. Close the lab, also after an error.
func openLab(ctx context.Context, o options) (l *lab, err error) {
	l = &lab{o: o, began: time.Now(), processes: map[string]*process{}, lines: map[string]*lineProxy{}, ports: map[string]string{}}
	if l.dir, err = testbed.Folder("storm"); err != nil {
		return l, err
	}
	if l.guard, err = startGuard(l.dir); err != nil {
		return l, err
	}
	if l.program, err = testbed.Build(ctx, l.dir, "-tags="+o.tags, fmt.Sprintf("-race=%t", o.race)); err != nil {
		return l, err
	}
	if l.sink, err = openSink(l.since); err != nil {
		return l, err
	}
	port, err := stablePort()
	if err != nil {
		return l, err
	}
	l.redisAt, _ = strconv.Atoi(port)
	if err := l.startRedis(ctx); err != nil {
		return l, err
	}
	if err := l.startPostgreSQL(ctx); err != nil {
		return l, err
	}
	if err := migrations.Create(ctx, l.postgres.URL, database); err != nil {
		return l, err
	}
	if err := l.meetCallers(ctx); err != nil {
		return l, err
	}
	if err := l.openLines(); err != nil {
		return l, err
	}
	return l, l.startProcesses(ctx)
}

func (l *lab) startPostgreSQL(ctx context.Context) (err error) {
	l.postgres, err = local.StartPostgreSQL(ctx, local.PostgreSQLOptions{
		Dir: l.dir, Log: slog.New(slog.DiscardHandler),
		// Processes die here, and the machine does not: what was written is there after a crash without being synced, and a
		// slow disk would make the storm a test of its recovery. Commits are as strict as ever.
		Settings: map[string]string{"max_connections": "300", "log_min_messages": "fatal", "fsync": "off", "synchronous_commit": "on"},
	})
	if err == nil {
		l.guard.watch(l.postgres.Pid())
	}
	return err
}

func (l *lab) startRedis(ctx context.Context) (err error) {
	l.redis, err = local.StartRedis(ctx, local.RedisOptions{Dir: l.dir, Port: l.redisAt, Log: slog.New(slog.DiscardHandler)})
	if err == nil {
		l.guard.watch(l.redis.Pid())
	}
	return err
}

// meetCallers gives each caller a secret, if the program knows API keys.
func (l *lab) meetCallers(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, l.program, "reconcile")
	cmd.Env = testbed.Env("DATABASE_URL="+l.postgres.URL(database), "API_KEYS="+apiKey("probe", "secret"))
	output, err := cmd.CombinedOutput()
	switch {
	case err == nil:
		l.secrets = []string{""}
		for _, name := range callerNames[1:] {
			l.secrets = append(l.secrets, "secret-of-"+name)
		}
		return nil
	case strings.Contains(string(output), "API_KEYS is not supported"):
		return nil
	}
	return fmt.Errorf("the program does not run: %w: %s", err, oneLine(string(output)))
}

// apiKey is a caller as API_KEYS names it.
func apiKey(name, secret string) string {
	return fmt.Sprintf("%s=%x", name, sha256.Sum256([]byte(secret)))
}

// callers are the places in callerNames of those who place orders.
func (l *lab) callers() []int {
	if l.secrets == nil {
		return []int{0}
	}
	return []int{1, 2, 3}
}

func (l *lab) openLines() error {
	targets := map[string]string{postgres: hostPort(l.postgres.URL(database)), redisDB: l.redis.Addr(), smtpSink: l.sink.addr}
	for _, server := range serverNames {
		port, err := stablePort()
		if err != nil {
			return err
		}
		l.ports[server] = port
		targets[server] = "127.0.0.1:" + port
	}
	for _, name := range lines() {
		_, to, _ := strings.Cut(name, ">")
		opened, err := openLine(name, targets[to])
		if err != nil {
			return err
		}
		l.lines[name] = opened
	}
	return nil
}

// hostPort returns the host and port in the address of a database.
func hostPort(url string) string {
	_, rest, _ := strings.Cut(url, "@")
	host, _, _ := strings.Cut(rest, "/")
	return host
}

func (l *lab) startProcesses(ctx context.Context) error {
	for _, name := range processNames {
		part, _, _ := strings.Cut(name, "-")
		url := strings.Replace(l.postgres.URL(database), hostPort(l.postgres.URL(database)), l.lines[line(name, postgres)].addr(), 1)
		env := testbed.Env("DATABASE_URL="+url, "REDIS_ADDR="+l.lines[line(name, redisDB)].addr(), "LOG_LEVEL=info",
			"XDG_DATA_HOME="+l.dir, "OPS_ADDR=")
		switch part {
		case "server":
			env = append(env, "PORT="+l.ports[name])
		case "consumer":
			env = append(env, "EMAIL_SENDER=smtp", "SMTP_ADDR="+l.lines[line(name, smtpSink)].addr(), "SMTP_TLS=none", "EMAIL_FROM=orders@example.com")
		}
		if l.secrets != nil {
			var keys []string
			for _, caller := range l.callers() {
				keys = append(keys, apiKey(callerNames[caller], l.secrets[caller]))
			}
			env = append(env, "API_KEYS="+strings.Join(keys, ","))
		}
		p := &process{
			name: name, program: l.program, args: []string{part}, env: append(env, l.o.env...), log: filepath.Join(l.dir, name+".log"), guard: l.guard,
		}
		l.processes[name] = p
		if err := p.start(); err != nil {
			return err
		}
	}
	for _, server := range serverNames {
		if err := l.awaitServer(ctx, server); err != nil {
			return err
		}
	}
	return nil
}

func (l *lab) awaitServer(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		conn, err := net.Dial("tcp", "127.0.0.1:"+l.ports[name])
		if err == nil {
			return conn.Close()
		}
		select {
		case <-ctx.Done():
			said, _ := os.ReadFile(l.processes[name].log)
			return fmt.Errorf("%s does not start: %s", name, oneLine(string(said)))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// strike does what the script says and returns when the fault is over.
func (l *lab) strike(ctx context.Context, f fault) error {
	switch f.Kind {
	case "kill":
		p := l.processes[f.Target]
		p.kill()
		pause(ctx, f.For)
		return p.start()
	case "freeze":
		p := l.processes[f.Target]
		p.signal(syscall.SIGSTOP)
		defer p.signal(syscall.SIGCONT)
		pause(ctx, f.For)
		return nil
	case "cut", "slow", "reset", "silent", "cut-after-commit":
		return l.strikeLine(ctx, l.lines[f.Target], f)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if kind, is := strings.CutPrefix(f.Kind, "postgres-"); is {
		return l.strikePostgreSQL(ctx, kind, f)
	}
	return l.strikeRedis(ctx, strings.TrimPrefix(f.Kind, "redis-"), f)
}

func (l *lab) strikeLine(ctx context.Context, line *lineProxy, f fault) error {
	switch f.Kind {
	case "cut":
		line.cut()
		pause(ctx, f.For)
		return line.mend()
	case "slow":
		late, _ := time.ParseDuration(f.Detail)
		return line.while(ctx, f.For, "latency", map[string]any{"latency": late.Milliseconds(), "jitter": late.Milliseconds() / 2}, "downstream")
	case "reset":
		return line.while(ctx, f.For, "reset_peer", map[string]any{"timeout": 0}, "downstream")
	case "silent":
		return line.while(ctx, f.For, "timeout", map[string]any{"timeout": 0}, "upstream", "downstream")
	}
	struck := line.commit.arm()
	defer line.commit.disarm()
	select {
	case <-struck:
	case <-time.After(f.For): // nobody committed anything on this line
		return nil
	case <-ctx.Done():
		return nil
	}
	if f.Detail == "once" {
		return nil
	}
	line.cut()
	pause(ctx, f.For)
	return line.mend()
}

func (l *lab) strikePostgreSQL(ctx context.Context, how string, f fault) error {
	switch how {
	case "terminate":
		return l.terminate(ctx, f.Detail)
	case "freeze":
		pids := slices.AppendSeq([]int{l.postgres.Pid()}, maps.Keys(testbed.Children(l.postgres.Pid())))
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGSTOP)
		}
		pause(ctx, f.For)
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGCONT)
		}
		return nil
	case "crash":
		return l.crash(ctx)
	}
	pid := l.postgres.Pid()
	_ = syscall.Kill(pid, syscall.SIGQUIT)
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline) && syscall.Kill(pid, 0) == nil; {
		pause(context.WithoutCancel(ctx), 5*time.Millisecond)
	}
	l.guard.forget(pid)
	if err := l.postgres.Stop(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	pause(ctx, f.For)
	starting, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if err := l.startPostgreSQL(starting); err != nil {
		return err
	}
	for name, line := range l.lines {
		if isLineTo(name, postgres) {
			if err := line.retarget(hostPort(l.postgres.URL(database))); err != nil {
				return err
			}
		}
	}
	return nil
}

// ask runs something on a connection of the storm's own, beside the lines.
func (l *lab) ask(ctx context.Context, do func(context.Context, *pgx.Conn) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, l.postgres.URL(database))
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	return do(ctx, conn)
}

func (l *lab) terminate(ctx context.Context, how string) error {
	limit := map[string]string{"one": "LIMIT 1", "half": "LIMIT (SELECT count(*) / 2 FROM pg_stat_activity WHERE application_name = 'idempotent-orders')", "all": ""}[how]
	return l.ask(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity
			WHERE application_name = 'idempotent-orders' ORDER BY random() `+limit+`) chosen`)
		return err
	})
}

// crash kills a backend of the program, and waits until PostgreSQL has noticed.
func (l *lab) crash(ctx context.Context) error {
	var backend int
	err := l.ask(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, "SELECT pid FROM pg_stat_activity WHERE application_name = 'idempotent-orders' ORDER BY random() LIMIT 1").Scan(&backend)
	})
	if errors.Is(err, pgx.ErrNoRows) {
		return nil
	}
	if err != nil {
		return err
	}
	_ = syscall.Kill(backend, syscall.SIGKILL)
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		pause(context.WithoutCancel(ctx), 20*time.Millisecond)
		if l.ask(ctx, func(ctx context.Context, conn *pgx.Conn) error { return conn.Ping(ctx) }) == nil {
			return nil
		}
	}
	return errors.New("PostgreSQL did not recover from a crash within 20 s")
}

func (l *lab) strikeRedis(ctx context.Context, how string, f fault) error {
	switch how {
	case "kill", "empty":
		return l.restartRedis(ctx, how == "empty", f.For)
	case "stall":
		_ = syscall.Kill(l.redis.Pid(), syscall.SIGSTOP)
		defer syscall.Kill(l.redis.Pid(), syscall.SIGCONT)
		pause(ctx, f.For)
		return nil
	}
	rdb := connect.Redis([]string{l.redis.Addr()}, "")
	defer rdb.Close()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	switch how {
	case "flush":
		return rdb.FlushAll(ctx).Err()
	case "script-flush":
		return rdb.ScriptFlush(ctx).Err()
	}
	return fill(ctx, rdb, f)
}

func (l *lab) restartRedis(ctx context.Context, empty bool, after time.Duration) error {
	l.guard.forget(l.redis.Pid())
	if err := l.redis.Kill(); err != nil {
		return err
	}
	if empty {
		if err := os.RemoveAll(filepath.Join(l.dir, "redis")); err != nil {
			return err
		}
	}
	pause(ctx, after)
	starting, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	return l.startRedis(starting)
}

// fill leaves Redis no memory beyond what it has, and fills it up, under a policy.
func fill(ctx context.Context, rdb redis.UniversalClient, f fault) error {
	info, err := rdb.Info(ctx, "memory").Result()
	if err != nil {
		return err
	}
	used := int64(0)
	for text := range strings.Lines(info) {
		if value, is := strings.CutPrefix(strings.TrimSpace(text), "used_memory:"); is {
			used, _ = strconv.ParseInt(value, 10, 64)
		}
	}
	if err := rdb.ConfigSet(ctx, "maxmemory-policy", f.Detail).Err(); err != nil {
		return err
	}
	if err := rdb.ConfigSet(ctx, "maxmemory", fmt.Sprint(used)).Err(); err != nil {
		return err
	}
	block := strings.Repeat("x", 100<<10)
	for end := time.Now().Add(f.For); time.Now().Before(end); pause(ctx, 20*time.Millisecond) {
		for range 10 { // refused with OOM when nothing can be evicted
			rdb.Set(ctx, fmt.Sprintf("ballast:%d", time.Now().UnixNano()), block, 5*time.Second)
		}
	}
	if err := rdb.ConfigSet(ctx, "maxmemory", "0").Err(); err != nil {
		return err
	}
	return rdb.ConfigSet(ctx, "maxmemory-policy", "noeviction").Err()
}

// while puts toxics of a kind on the line for a time.
func (l *lineProxy) while(ctx context.Context, lasts time.Duration, kind string, attributes map[string]any, directions ...string) error {
	var errs []error
	for _, direction := range directions {
		errs = append(errs, l.add(kind, kind, direction, attributes))
	}
	pause(ctx, lasts)
	for _, direction := range directions {
		errs = append(errs, l.remove(kind, direction))
	}
	return errors.Join(errs...)
}

// pause waits, or until ctx is done.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// stopProcesses ends the program's processes cleanly.
func (l *lab) stopProcesses() {
	var all sync.WaitGroup
	var mu sync.Mutex
	for _, p := range l.processes {
		all.Go(func() {
			if !p.stop(stopPatience) {
				mu.Lock()
				defer mu.Unlock()
				l.unclean = append(l.unclean, p.name)
			}
		})
	}
	all.Wait()
}

// close stops everything and removes the folder, or keeps what the processes said in it.
func (l *lab) close(ctx context.Context, keep bool) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 40*time.Second)
	defer cancel()
	l.stopProcesses()
	for _, line := range l.lines {
		line.cut()
	}
	if l.sink != nil {
		l.sink.close()
	}
	var err error
	if l.redis != nil {
		_ = syscall.Kill(l.redis.Pid(), syscall.SIGCONT)
		err = errors.Join(err, l.redis.Stop(ctx))
	}
	if l.postgres != nil {
		err = errors.Join(err, l.postgres.Stop(ctx))
	}
	if l.dir != "" && !keep {
		err = errors.Join(err, os.RemoveAll(l.dir))
	}
	if l.guard != nil {
		l.guard.dismiss()
	}
	return err
}
