package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
	"golang.org/x/sync/errgroup"

	"idempotent-orders/internal/testbed"
	"idempotent-orders/lua"
)

// scripts runs the reservation in pipelines, over two connections, so that Redis is never without work.
func (l *lab) scripts(ctx context.Context) (s sample, err error) {
	if err := l.reset(ctx); err != nil {
		return s, err
	}
	if err := lua.Reserve.Load(ctx, l.rdb).Err(); err != nil {
		return s, err
	}
	key := freshKeys()
	var n atomic.Uint64
	var done, failed atomic.Int64
	var clients errgroup.Group
	own, watched, start := cpuSeconds(os.Getpid(), false), l.watch(nil), time.Now()
	for range 2 {
		clients.Go(func() error {
			for time.Since(start) < time.Duration(l.seconds)*time.Second {
				cmds, err := l.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
					for range statement {
						// Keys and tokens are as long as the project's: a digest in base64, and a UUID with a number behind it.
						k := key(n.Add(1))
						lua.Reserve.EvalSha(ctx, p, []string{"idempotency:" + k[:22]}, k+"/123z", 10_000)
					}
					return nil
				})
				if err != nil {
					return err
				}
				for _, cmd := range cmds {
					if text, _ := cmd.(*redis.Cmd).Text(); text != "reserved" {
						failed.Add(1)
					}
				}
				done.Add(statement)
			}
			return nil
		})
	}
	err = clients.Wait()
	took := time.Since(start).Seconds()
	return sample{rate: float64(done.Load()) / took, failed: int(failed.Load()), used: watched(),
		load: (cpuSeconds(os.Getpid(), false) - own) / took}, err
}

// payload is an event's data, as long as a real one.
const payload = `{"order_id":"01a208ee-053e-7a6b-8de6-ca958541f473","user_id":"user-456","amount":1000,"created_at":"2026-11-23T15:02:26.123456Z"}`

// pgbenchScript returns the inserts of an order, or of many in each statement: the same tables, columns and sizes.
func pgbenchScript(rows int) string {
	from := ""
	if rows > 1 {
		from = fmt.Sprintf(" FROM generate_series(1, %d)", rows)
	}
	return strings.ReplaceAll(`BEGIN;
INSERT INTO idempotency_keys (digest, caller, operation, key, fingerprint, order_id, expires_at) SELECT gen_random_uuid(), 'anonymous', 'PlaceOrder', gen_random_uuid()::text, sha256('order'), gen_random_uuid(), now() + interval '24 hours'{rows} ON CONFLICT DO NOTHING;
INSERT INTO orders (id, caller, user_id, amount) SELECT gen_random_uuid(), 'anonymous', 'user-456', 1000{rows};
INSERT INTO outbox (event_id, aggregate_id, event_type, source, payload) SELECT gen_random_uuid(), gen_random_uuid(), 'order.created.v1', '/orders', '`+payload+`'::json{rows};
COMMIT;
`, "{rows}", from)
}

func (l *lab) pgbenchOne(mode string, clients int) measurement {
	return l.pgbenchMeasurement("pgbench", namePgbench(mode, clients), mode, clients, 1)
}

func (l *lab) pgbenchMany(clients int) measurement {
	return l.pgbenchMeasurement("pgbench-128", namePgbenchMany(clients), "prepared", clients, statement)
}

func (l *lab) pgbenchMeasurement(group, name, mode string, clients, rows int) measurement {
	args := []string{"-n", "-M", mode, "-c", strconv.Itoa(clients), "-j", strconv.Itoa(min(clients, 2)), "-T", strconv.Itoa(l.seconds)}
	return measurement{group: group, name: name, unit: unitOrders, settings: "pgbench " + strings.Join(args, " "),
		take: func(ctx context.Context) (sample, error) { return l.runPgbench(ctx, args, rows) }}
}

func (l *lab) runPgbench(ctx context.Context, args []string, rows int) (s sample, err error) {
	if err := l.reset(ctx); err != nil {
		return s, err
	}
	script := filepath.Join(l.dir, "pgbench.sql")
	if err := os.WriteFile(script, []byte(pgbenchScript(rows)), 0o600); err != nil {
		return s, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(l.seconds+30)*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, l.pgbench, append(args, "-f", script, l.postgres.URL(database))...)
	cmd.Env = testbed.Env("LC_ALL=C")
	watched := l.watch(nil)
	output, err := cmd.CombinedOutput()
	s.used = watched()
	if err != nil {
		return s, fmt.Errorf("pgbench: %w: %s", err, lastLine(output))
	}
	tps, average, err := readPgbench(string(output))
	s.rate, s.note = tps*float64(rows), fmt.Sprintf("%.2f ms a transaction on average", average)
	s.load = (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds() / float64(l.seconds)
	return s, err
}

var (
	pgbenchRate    = regexp.MustCompile(`(?m)^tps = ([0-9.]+)`)
	pgbenchLatency = regexp.MustCompile(`(?m)^latency average = ([0-9.]+) ms`)
)

// readPgbench returns the transactions a second, and the milliseconds that each took.
func readPgbench(output string) (tps, average float64, err error) {
	rate, latency := pgbenchRate.FindStringSubmatch(output), pgbenchLatency.FindStringSubmatch(output)
	if rate == nil || latency == nil {
		return 0, 0, fmt.Errorf("pgbench printed no figures: %s", lastLine([]byte(output)))
	}
	tps, err = strconv.ParseFloat(rate[1], 64)
	if err != nil {
		return 0, 0, err
	}
	average, err = strconv.ParseFloat(latency[1], 64)
	return tps, average, err
}
