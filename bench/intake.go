package main

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"idempotent-orders/idempotency"
	"idempotent-orders/lua"
	"idempotent-orders/order"
)

// measureClosed sends a closed loop to a running contender, after a second of warm-up, and returns what was answered in all.
func (l *lab) measureClosed(ctx context.Context, p *process, o load) (s sample, measured, warm answers, err error) {
	o.Addr, o.Seconds = p.addr, 1
	if warm, err = l.closed(ctx, o); err != nil {
		return s, measured, warm, err
	}
	o.Seconds = l.seconds
	watched := l.watch(p)
	if measured, err = l.closed(ctx, o); err != nil {
		return s, measured, warm, err
	}
	s = sampleOf(measured)
	s.used = watched()
	return s, measured, warm, nil
}

// sampleOf counts what was refused as failed.
func sampleOf(a answers) sample {
	return sample{rate: float64(a.Requests-a.Refused) / a.Micros * 1e6, p50: a.P50, p99: a.P99, failed: a.Refused + a.Broken, load: a.cores}
}

// intake places orders in a closed loop, and makes sure that each answer stands for an order. The contender gets env besides.
func (l *lab) intake(ctx context.Context, contender string, pool *pgxpool.Pool, o load, env ...string) (sample, error) {
	if err := l.reset(ctx); err != nil {
		return sample{}, err
	}
	before, err := count(ctx, pool, "SELECT count(*) FROM orders")
	if err != nil {
		return sample{}, err
	}
	p, err := l.start(ctx, contender, pool.Config().ConnConfig.Database, env...)
	if err != nil {
		return sample{}, err
	}
	defer p.stop()
	o.Body = body
	s, measured, warm, err := l.measureClosed(ctx, p, o)
	if err != nil || bare[contender] != nil {
		return s, err
	}
	p.stop() // it finishes what is under way when the generator leaves
	after, err := count(ctx, pool, "SELECT count(*) FROM orders")
	if err != nil {
		return s, err
	}
	answered := measured.Requests - measured.Refused + warm.Requests - warm.Refused
	if placed := after - before; placed < answered || placed > answered+2*o.Connections {
		return s, fmt.Errorf("%d orders were answered, and %d placed", answered, placed)
	}
	return s, nil
}

// tokenOf and apiKey make a caller's bearer token, as long as those that the README has people make, and its entry in API_KEYS.
func tokenOf(caller string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(caller))) }

func apiKey(caller string) string {
	return fmt.Sprintf("%s=%x", caller, sha256.Sum256([]byte(tokenOf(caller))))
}

// intakeOfCaller places the orders of one of three callers with API keys.
func (l *lab) intakeOfCaller(ctx context.Context) (sample, error) {
	keys := "API_KEYS=" + apiKey("first") + "," + apiKey("second") + "," + apiKey("third")
	return l.intake(ctx, server, l.pool, load{Connections: clientsSome, Token: tokenOf("second")}, keys)
}

// intakeIntoFull fills the full database when it is first asked to.
func (l *lab) intakeIntoFull(ctx context.Context) (sample, error) {
	if l.full == nil {
		if err := l.fill(ctx); err != nil {
			return sample{}, fmt.Errorf("fill %d orders: %w", fullOrders, err)
		}
	}
	if _, err := l.full.Exec(ctx, "TRUNCATE outbox"); err != nil {
		return sample{}, err
	}
	return l.intake(ctx, server, l.full, load{Connections: clientsMany})
}

// fill makes the full database: ids in order of time, as UUIDv7s are, and keys in no order, as clients make them.
func (l *lab) fill(ctx context.Context) error {
	pool, err := l.create(ctx, fullDatabase)
	if err != nil {
		return err
	}
	const id = `(lpad(to_hex(1700000000000 + n), 12, '0') || '7' || substr(md5(n::text), 1, 3) || '8' || substr(md5(n::text), 4, 15))::uuid`
	err = execute(ctx, pool,
		fmt.Sprintf(`INSERT INTO orders (id, caller, user_id, amount)
			SELECT %s, 'anonymous', 'user-456', 1000 FROM generate_series(1, %d) n`, id, fullOrders),
		fmt.Sprintf(`INSERT INTO idempotency_keys (digest, caller, operation, key, fingerprint, order_id, expires_at)
			SELECT gen_random_uuid(), 'anonymous', 'PlaceOrder', gen_random_uuid()::text, sha256('order'), %s, now() + interval '24 hours'
			FROM generate_series(1, %d) n`, id, fullOrders),
		"VACUUM ANALYZE orders", "VACUUM ANALYZE idempotency_keys",
	)
	if err != nil {
		pool.Close()
		return err
	}
	l.full = pool
	return nil
}

// oneKey is the key of the measurements that have but one.
const oneKey = "00000000-0000-4000-8000-000000000000"

func (l *lab) replay(ctx context.Context) (sample, error) {
	return l.sameKey(ctx, true, body, func(status int, replayed bool) bool { return status == http.StatusOK && replayed })
}

func (l *lab) mismatch(ctx context.Context) (sample, error) {
	return l.sameKey(ctx, true, strings.Replace(body, "1000", "2000", 1),
		func(status int, _ bool) bool { return status == http.StatusUnprocessableEntity })
}

// conflict holds the key in Redis as another process would, and holds it anew before the reservation ends.
func (l *lab) conflict(ctx context.Context) (sample, error) {
	if err := l.reset(ctx); err != nil {
		return sample{}, err
	}
	digest := idempotency.Key{Caller: "anonymous", Operation: order.Operation, Value: oneKey}.Digest()
	place := "idempotency:" + base64.RawURLEncoding.EncodeToString(digest[:]) // where idempotency.Guard keeps it
	hold := func(ctx context.Context) error {
		return lua.Reserve.Run(ctx, l.rdb, []string{place}, "another", time.Minute.Milliseconds()).Err()
	}
	if err := hold(ctx); err != nil {
		return sample{}, err
	}
	defer every(ctx, time.Second, func(ctx context.Context) { _ = hold(ctx) })()
	return l.sameKey(ctx, false, body, func(status int, _ bool) bool { return status == http.StatusConflict })
}

// every does something again and again, until the returned function is called.
func every(ctx context.Context, interval time.Duration, do func(ctx context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for pause(ctx, interval) == nil {
			do(ctx)
		}
	}()
	return func() { cancel(); <-done }
}

// sameKey sends one key again and again, committed first or held by another. The generators only tell good statuses
// from bad ones, so a few sends among theirs are looked at closely.
func (l *lab) sameKey(ctx context.Context, committed bool, repeated string, want func(status int, replayed bool) bool) (sample, error) {
	if committed {
		if err := l.reset(ctx); err != nil {
			return sample{}, err
		}
	}
	p, err := l.start(ctx, server, database)
	if err != nil {
		return sample{}, err
	}
	defer p.stop()
	if committed {
		if status, _, err := post(ctx, p, body); err != nil || status != http.StatusOK {
			return sample{}, fmt.Errorf("place the order: status %d, %v", status, err)
		}
	}
	var wrong atomic.Int64
	look := func(ctx context.Context) {
		if status, replayed, err := post(ctx, p, repeated); ctx.Err() == nil && (err != nil || !want(status, replayed)) {
			wrong.Add(1)
		}
	}
	look(ctx)
	stop := every(ctx, 50*time.Millisecond, look)
	s, a, _, err := l.measureClosed(ctx, p, load{Connections: clientsSome, Key: oneKey, Body: repeated})
	stop()
	if !want(http.StatusOK, true) { // a refusal is what is wanted
		s.rate, s.failed = float64(a.Refused)/a.Micros*1e6, a.Requests-a.Refused+a.Broken
	}
	s.failed += int(wrong.Load())
	return s, err
}

func post(ctx context.Context, p *process, body string) (status int, replayed bool, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+p.addr+"/orders", strings.NewReader(body))
	if err != nil {
		return 0, false, err
	}
	request.Header.Set("Idempotency-Key", oneKey)
	request.Header.Set("Content-Type", "application/json")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0, false, err
	}
	defer response.Body.Close()
	_, err = io.Copy(io.Discard, response.Body)
	return response.StatusCode, response.Header.Get("Idempotency-Replayed") == "true", err
}

// peak returns the best rate of a contender in this round, or 0.
func (l *lab) peak(contender string) (best float64) {
	for _, connections := range []int{1, 16, clientsSome, clientsMany} {
		if s := l.taken[nameOf(contender, connections)]; len(s) > 0 {
			best = max(best, s[len(s)-1].rate)
		}
	}
	return best
}

// openLoop places orders at a fixed rate, from a process of its own.
func (l *lab) openLoop(ctx context.Context, contender string, rate float64) (sample, error) {
	if rate < 1 {
		return sample{}, errors.New("the rate follows from the peaks; measure them in the same run: --only intake,naive,open")
	}
	p, err := l.fresh(ctx, contender)
	if err != nil {
		return sample{}, err
	}
	defer p.stop()
	watched := l.watch(p)
	a, err := l.open(ctx, load{Addr: p.addr, Rate: int(rate), Seconds: l.seconds, Body: body})
	if err != nil {
		return sample{}, err
	}
	s := sampleOf(a)
	s.used, s.note = watched(), fmt.Sprintf("asked for %d/s", int(rate))
	return s, nil
}
