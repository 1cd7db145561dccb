package idempotency

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"strings"

	"github.com/redis/go-redis/v9"

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

// call is one run of a script for one key.
type call struct {
	key  Key
	args []any
}

func (g *Guard) reserve(ctx context.Context, key Key, token string) state {
	cmds, err := g.run(ctx, lua.Reserve, []call{{key, []any{token, reservationLasts.Milliseconds()}}})
	if err != nil {
		return unknown
	}
	reply, _ := cmds[0].Text()
	switch s := state(reply); s {
	case reserved, inProgress, completed:
		return s
	default:
		return unknown
	}
}

// complete and release are told, not asked: when they fail, the reservation expires by itself.

func (g *Guard) complete(ctx context.Context, key Key, token string) {
	_, _ = g.run(ctx, lua.Complete, []call{{key, []any{token, g.retention.Milliseconds()}}})
}

func (g *Guard) release(ctx context.Context, key Key, token string) {
	_, _ = g.run(ctx, lua.Release, []call{{key, []any{token}}})
}

// run sends one script for a batch of keys in one pipeline. An error means that Redis could not be asked, or refused one
// of the calls.
func (g *Guard) run(ctx context.Context, script *redis.Script, calls []call) ([]*redis.Cmd, error) {
	return g.breaker.Execute(func() ([]*redis.Cmd, error) {
		ctx, cancel := context.WithTimeout(ctx, redisTimeout)
		defer cancel()
		cmds, err := pipeline(ctx, g.redis, calls, func(p redis.Pipeliner, c call) *redis.Cmd {
			return script.EvalSha(ctx, p, []string{place(c.key)}, c.args...)
		})
		if !redis.HasErrorPrefix(err, "NOSCRIPT") {
			return cmds, err
		}
		// Redis has lost the script, and a pipeline does not fall back by itself: send it along. The scripts that did run
		// in between find their own token, so running them again changes nothing.
		return pipeline(ctx, g.redis, calls, func(p redis.Pipeliner, c call) *redis.Cmd {
			return script.Eval(ctx, p, []string{place(c.key)}, c.args...)
		})
	})
}

func pipeline(ctx context.Context, rdb redis.UniversalClient, calls []call,
	queue func(redis.Pipeliner, call) *redis.Cmd) ([]*redis.Cmd, error) {
	cmds := make([]*redis.Cmd, len(calls))
	_, err := rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i, c := range calls {
			cmds[i] = queue(p, c)
		}
		return nil
	})
	return cmds, err
}

// place is where a key stands in Redis: a hash, so that its length is bounded, no part can be mistaken for another, and
// the caller's key is not there to be read.
func place(k Key) string {
	sum := sha256.Sum256([]byte(strings.Join([]string{k.Operation, k.Caller, k.Value}, "\x00")))
	return "idempotency:" + base64.RawURLEncoding.EncodeToString(sum[:])
}
