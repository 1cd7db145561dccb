package server

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-redis/redis_rate/v10"
	"github.com/maypok86/otter/v2"
	"github.com/redis/go-redis/v9"
	"golang.org/x/time/rate"
)

const (
	// rateTimeout bounds one question to Redis, and rateAway is how long Redis is left alone after it failed.
	rateTimeout = 250 * time.Millisecond
	rateAway    = time.Second
	// rateShare of the burst is what a process takes from Redis at once, so that it asks once for many requests.
	rateShare = 20
	// allowedPerRefusal is how many requests a caller is allowed in the time in which one is refused, when its clients send again at
	// once: to be refused more often gives it nothing, and takes from others.
	allowedPerRefusal = 4
	// meters is how many callers a process meters at once, at some 350 bytes each, and metersFor how long after the last request.
	meters    = 50_000
	metersFor = 10 * time.Minute
)

// Rates limits what each caller may send to /orders: so many requests in a period, and as many at once. Every request counts,
// replays and refusals too: each is work. The rate holds for all servers together while Redis answers, to within a twentieth
// per server, and for each server alone while it does not. A caller over its rate costs Redis nothing.
type Rates struct {
	limit   redis_rate.Limit
	redis   *redis_rate.Limiter
	callers *otter.Cache[string, *meter]
	away    atomic.Int64 // until when Redis is left alone, in Unix nanoseconds
	log     *slog.Logger
}

// NewRates returns rates that allow each caller so many requests in a period; nil, which allows everything, for none.
func NewRates(rdb redis.UniversalClient, requests int, period time.Duration, log *slog.Logger) *Rates {
	if requests == 0 {
		return nil
	}
	return &Rates{
		limit: redis_rate.Limit{Rate: requests, Burst: requests, Period: period},
		redis: redis_rate.NewLimiter(rdb),
		callers: otter.Must(&otter.Options[string, *meter]{
			MaximumSize: meters, ExpiryCalculator: otter.ExpiryAccessing[string, *meter](metersFor),
		}),
		log: log,
	}
}

// meter is what this process knows of a caller.
type meter struct {
	mu       sync.Mutex
	tokens   int       // taken from Redis and not used yet; guarded by mu
	emptyTil time.Time // Redis has none before; guarded by mu
	alone    *rate.Limiter
	line     line
}

// refusal returns the error for a request of a caller that is over its rate, and else nil.
func (l *Rates) refusal(ctx context.Context, caller string) error {
	if l == nil {
		return nil
	}
	m, _ := l.callers.ComputeIfAbsent(caller, func() (*meter, bool) {
		each := l.limit.Period / time.Duration(l.limit.Rate)
		return &meter{alone: rate.NewLimiter(rate.Every(each), l.limit.Burst), line: line{pace: allowedPerRefusal * each}}, false
	})
	wait := l.take(ctx, caller, m)
	if wait <= 0 {
		return nil
	}
	return &refusal{error: errTooManyRequests, retryAfter: max(1, int(math.Ceil(wait.Seconds()))), line: &m.line}
}

// take takes a token, and returns 0, or how long there is none.
func (l *Rates) take(ctx context.Context, caller string, m *meter) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	if m.tokens > 0 {
		m.tokens--
		return 0
	}
	if wait := m.emptyTil.Sub(now); wait > 0 {
		return wait
	}
	if now.UnixNano() >= l.away.Load() {
		wait, err := l.refill(ctx, caller, m)
		if err == nil {
			return wait
		}
		if l.away.Swap(now.Add(rateAway).UnixNano()) < now.Add(-rateAway).UnixNano() {
			l.log.WarnContext(ctx, "Redis does not answer: rates are kept by each server alone", "error", err)
		}
	}
	r := m.alone.ReserveN(now, 1)
	wait := r.DelayFrom(now)
	if wait > 0 {
		r.CancelAt(now)
	}
	return wait
}

// refill takes tokens from Redis, and one of them for the request at hand.
func (l *Rates) refill(ctx context.Context, caller string, m *meter) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rateTimeout) // those who wait behind want them too
	defer cancel()
	got, err := l.redis.AllowAtMost(ctx, caller, l.limit, max(1, l.limit.Burst/rateShare))
	if err != nil {
		return 0, fmt.Errorf("take from a caller's rate: %w", err)
	}
	if got.Allowed == 0 {
		m.emptyTil = time.Now().Add(got.RetryAfter)
		return max(got.RetryAfter, 1), nil
	}
	m.tokens = got.Allowed - 1
	return 0, nil
}

// metered refuses a request to /orders when its caller is over the rate. Without API keys the rate is by client address: that of the
// proxy, when there is one.
func (s *Server) metered(r *http.Request) error {
	if s.Rates == nil || !isOrders(r.URL.Path) {
		return nil
	}
	caller, err := s.caller(r.Context())
	if err != nil {
		return err
	}
	if len(s.Callers) == 0 {
		caller += " " + network(r.RemoteAddr)
	}
	return s.Rates.refusal(r.Context(), caller)
}

// network returns what stands for a client: its IPv4 address, or the /64 in which an IPv6 client may take any address.
func network(remote string) string {
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		return remote
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return host
	}
	addr = addr.Unmap().WithZone("")
	if addr.Is6() {
		return netip.PrefixFrom(addr, 64).Masked().String()
	}
	return addr.String()
}
