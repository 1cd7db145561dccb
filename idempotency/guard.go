// Package idempotency keeps concurrent sends of one intent apart. It knows keys and fingerprints, and nothing of what is
// placed under them.
//
// Two judges share the work. Redis says who is at work on a key, quickly: a reservation is taken by a Lua script, carries
// its holder's token, and ends by itself after seconds. PostgreSQL says what was committed, and it alone decides: what
// Redis says can only make an answer wait or look again, so Redis may be absent, flushed or wrong at any moment.
//
// The life of a key in Redis:
//
//	(absent) --reserve--> held by a token --complete--> completed --expires--> (absent)
//	                           |
//	                           +--release, or expires--> (absent)
package idempotency

import (
	"context"
	"errors"
	"log/slog"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"
	"github.com/sony/gobreaker/v2"

	"idempotent-orders/internal/fault"
	"idempotent-orders/internal/gather"
)

// What can stand between a send and its answer.
var (
	// ErrInvalidKey: the key breaks the rules of ParseKey.
	ErrInvalidKey = errors.New("invalid idempotency key")
	// ErrInProgress: another send of the key is under way.
	ErrInProgress = errors.New("another send of the idempotency key is under way")
	// ErrMismatch: the key belongs to a committed send with another fingerprint.
	ErrMismatch = errors.New("the idempotency key belongs to another request")
	// ErrNotCommitted: no send of the key is committed.
	ErrNotCommitted = errors.New("no send of the idempotency key is committed")
	// ErrOutcomeUnknown: whether the send was committed cannot be said. The reservation is left to expire.
	ErrOutcomeUnknown = errors.New("the outcome of the commit is unknown")
)

const (
	// reservationLasts bounds how long a holder that died keeps others out. It is longer than placing usually takes; when
	// placing takes longer, PostgreSQL's unique key still lets only one through.
	reservationLasts = 10 * time.Second
	// redisTimeout bounds what a stalled Redis costs one request, until the breaker opens.
	redisTimeout = 250 * time.Millisecond
	// breakerOpens is how long Redis is left alone after it failed breakerTrips times in a row.
	breakerOpens = time.Second
	breakerTrips = 3
	// A send that waits for another asks again after firstLook, then less and less often.
	firstLook, lastLook = 10 * time.Millisecond, 250 * time.Millisecond
)

// Guard reserves keys in Redis. It is safe for concurrent use.
type Guard struct {
	redis     redis.UniversalClient
	retention time.Duration // how long the mark of a committed send stands
	breaker   *gobreaker.CircuitBreaker[[]*redis.Cmd]
	calls     *gather.Gatherer[call, reply]
	name      string        // of this guard, among all there ever are
	tokens    atomic.Uint64 // how many it has made
}

// NewGuard returns a guard that reserves in rdb and remembers committed keys there for retention. It logs when it begins
// and ends to do without Redis.
func NewGuard(rdb redis.UniversalClient, retention time.Duration, log *slog.Logger) *Guard {
	g := &Guard{redis: rdb, retention: retention, name: uuid.NewString()}
	g.calls = gather.New(calling, g.exchange)
	g.breaker = gobreaker.NewCircuitBreaker[[]*redis.Cmd](gobreaker.Settings{
		Name:        "redis",
		Timeout:     breakerOpens,
		ReadyToTrip: func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= breakerTrips },
		// A reply is a sign of life, also when it is an error.
		IsSuccessful: func(err error) bool {
			var reply redis.Error
			return err == nil || errors.As(err, &reply)
		},
		OnStateChange: func(_ string, _, to gobreaker.State) {
			switch to {
			case gobreaker.StateOpen:
				log.Warn("Redis does not answer: idempotency keys go straight to PostgreSQL")
			case gobreaker.StateClosed:
				log.Info("Redis answers again")
			}
		},
	})
	return g
}

// newToken returns a token that no other reservation has.
func (g *Guard) newToken() string { return g.name + "/" + strconv.FormatUint(g.tokens.Add(1), 36) }

// Send is one send of a key: how to look up what was committed under it, and how to place it.
type Send[T any] struct {
	Key Key
	// Find returns what is committed under the key, or ErrNotCommitted, or ErrMismatch.
	Find func() (T, error)
	// Place commits the send, or returns what another send committed, or an error. An error that wraps
	// ErrOutcomeUnknown leaves the reservation standing; any other but ErrMismatch means that nothing was committed.
	Place func() (T, error)
}

// Once answers one send of a key: by placing it, or with what was committed before. When another send is under way it
// returns ErrInProgress, but not before patience is done: until then it waits for the other's outcome.
// It returns errors of Find and Place as they are.
func Once[T any](ctx, patience context.Context, g *Guard, send Send[T]) (T, error) {
	place := placeOf(send.Key)
	for look := firstLook; ; look = min(2*look, lastLook) {
		token := g.newToken()
		switch g.reserve(place, token) {
		case reserved:
			return placeReserved(g, send.Place, place, token)
		case unknown:
			return send.Place()
		case completed:
			found, err := send.Find()
			if errors.Is(err, ErrNotCommitted) { // Redis remembers what PostgreSQL does not know
				return send.Place()
			}
			return found, err
		case inProgress:
			found, err := send.Find() // it may be committed and not completed yet
			if !errors.Is(err, ErrNotCommitted) {
				return found, err
			}
		}
		select {
		case <-ctx.Done():
			return *new(T), ErrInProgress
		case <-patience.Done():
			return *new(T), ErrInProgress
		case <-time.After(look):
		}
	}
}

// placeReserved places a send whose key it holds, and tells Redis how that ended.
func placeReserved[T any](g *Guard, doPlace func() (T, error), place, token string) (T, error) {
	fault.GuardReserved.Reached()
	placed, err := doPlace()
	switch {
	case err == nil, errors.Is(err, ErrMismatch):
		fault.GuardPlaced.Reached()
		g.calls.Tell(g.completion(place, token))
	case errors.Is(err, ErrOutcomeUnknown):
	default:
		fault.GuardRefused.Reached()
		g.release(place, token)
	}
	return placed, err
}
