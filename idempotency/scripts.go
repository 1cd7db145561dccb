package idempotency

import (
	"context"
	"encoding/base64"
	"slices"

	"github.com/redis/go-redis/v9"

	"idempotent-orders/internal/fault"
	"idempotent-orders/internal/gather"
	"idempotent-orders/lua"
)

// state is what Redis says of a key.
type state string

const (
	reserved   state = "reserved"
	inProgress state = "in_progress"
	completed  state = "completed"
	unknown    state = "unknown" // Redis cannot say
)

// calling is how the calls of concurrent sends gather into pipelines.
var calling = gather.Limits{Batch: 512, UnderWay: 2, Waiting: 8192, Wait: redisTimeout}

// call is one run of a script for one key.
type call struct {
	script *redis.Script
	place  string
	args   []any
}

// reply is what a script returned. An error says nothing of the key.
type reply struct {
	text string
	err  error
}

func (g *Guard) reserve(place, token string) state {
	r, err := g.calls.Do(call{lua.Reserve, place, []any{token, reservationLasts.Milliseconds()}})
	if err != nil || r.err != nil {
		return unknown
	}
	switch s := state(r.text); s {
	case reserved, inProgress, completed:
		return s
	default:
		return unknown
	}
}

// completion tells that a send of the key was committed. Nobody has to wait for it: until then, or should it fail, a send that
// finds the reservation looks in PostgreSQL.
func (g *Guard) completion(place, token string) call {
	return call{lua.Complete, place, []any{token, g.retention.Milliseconds()}}
}

// release gives the reservation back. When it fails, the reservation expires by itself.
func (g *Guard) release(place, token string) {
	_, _ = g.calls.Do(call{lua.Release, place, []any{token}})
}

// exchange runs a batch of calls in one pipeline. Without Redis all of them fail; else each has a reply of its own.
func (g *Guard) exchange(calls []call) []reply {
	ctx, cancel := context.WithTimeout(context.Background(), redisTimeout)
	defer cancel()
	cmds, err := g.breaker.Execute(func() ([]*redis.Cmd, error) {
		cmds, err := g.pipeline(ctx, calls, (*redis.Script).EvalSha)
		if !slices.ContainsFunc(cmds, func(c *redis.Cmd) bool { return redis.HasErrorPrefix(c.Err(), "NOSCRIPT") }) {
			return cmds, err
		}
		// Redis has lost a script, and a pipeline does not fall back by itself: send them along. Those that did run find
		// their own token, so running them again changes nothing.
		return g.pipeline(ctx, calls, (*redis.Script).Eval)
	})
	fault.GuardExchanged.Reached()
	replies := make([]reply, len(calls))
	for i := range replies {
		if cmds == nil {
			replies[i].err = err
		} else {
			replies[i].text, replies[i].err = cmds[i].Text()
		}
	}
	return replies
}

func (g *Guard) pipeline(ctx context.Context, calls []call,
	eval func(*redis.Script, context.Context, redis.Scripter, []string, ...any) *redis.Cmd) ([]*redis.Cmd, error) {
	cmds := make([]*redis.Cmd, len(calls))
	_, err := g.redis.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i, c := range calls {
			cmds[i] = eval(c.script, ctx, p, []string{c.place}, c.args...)
		}
		return nil
	})
	return cmds, err
}

// placeOf returns where a key stands in Redis.
func placeOf(k Key) string {
	digest := k.Digest()
	return "idempotency:" + base64.RawURLEncoding.EncodeToString(digest[:])
}
