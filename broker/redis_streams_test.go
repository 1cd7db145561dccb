package broker

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/redis/go-redis/v9"

	"idempotent-orders/internal/connect"
	"idempotent-orders/internal/testenv"
)

func newStreams(t *testing.T) (*RedisStreams, string) {
	t.Helper()
	rdb, _ := testenv.Redis(t)
	b := NewRedisStreams(rdb)
	return b, mustEpoch(t, b)
}

func mustEpoch(t *testing.T, b *RedisStreams) string {
	t.Helper()
	epoch, err := b.Epoch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return epoch
}

func (b *RedisStreams) has(t *testing.T, want int64) {
	t.Helper()
	if n, err := b.redis.XLen(t.Context(), Stream).Result(); err != nil || n != want {
		t.Errorf("the stream has %d events, %v; want %d", n, err, want)
	}
}

// between does something between the look at the epoch and the transaction that adds the batch.
type between struct {
	redis.Hook
	do func()
}

func (b between) DialHook(next redis.DialHook) redis.DialHook          { return next }
func (b between) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }

func (b between) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		if cmds[0].Name() == "multi" {
			b.do()
		}
		return next(ctx, cmds)
	}
}

func TestABatchIsNotAddedWhenRedisForgetsAfterTheLook(t *testing.T) {
	t.Parallel()
	for how, forget := range map[string]func(ctx context.Context, b *RedisStreams) error{
		"it is flushed":         func(ctx context.Context, b *RedisStreams) error { return b.redis.FlushAll(ctx).Err() },
		"the stream is deleted": func(ctx context.Context, b *RedisStreams) error { return b.redis.Del(ctx, Stream).Err() },
	} {
		for _, made := range []bool{false, true} {
			t.Run(how+map[bool]string{true: ", and made anew"}[made], func(t *testing.T) {
				t.Parallel()
				b, epoch := newStreams(t)
				var once sync.Once
				b.redis.AddHook(between{do: func() {
					once.Do(func() {
						err := forget(t.Context(), b)
						if made {
							_, errMade := b.Epoch(t.Context())
							err = errors.Join(err, errMade)
						}
						if err != nil {
							t.Error(err)
						}
					})
				}})
				if err := b.Publish(t.Context(), epoch, events(2)); !errors.Is(err, ErrForgot) {
					t.Errorf("publishing got %v; want %v", err, ErrForgot)
				}
				b.has(t, 0)
				epoch = mustEpoch(t, b)
				if err := b.Publish(t.Context(), epoch, events(2)); err != nil {
					t.Error(err)
				}
				b.has(t, 2)
			})
		}
	}
}

func TestABatchIsAddedHoweverOftenTheStreamIsTrimmedMeanwhile(t *testing.T) {
	t.Parallel()
	b, epoch := newStreams(t)
	if err := b.Publish(t.Context(), epoch, events(20)); err != nil {
		t.Fatal(err)
	}
	b.redis.AddHook(between{do: func() {
		if err := b.redis.XTrimMaxLen(t.Context(), Stream, max(0, b.redis.XLen(t.Context(), Stream).Val()-1)).Err(); err != nil {
			t.Error(err)
		}
	}})
	if err := b.Publish(t.Context(), epoch, events(2)); err != nil {
		t.Error(err)
	}
	b.has(t, 2)
}

func TestABatchThatIsDisturbedForEverEnds(t *testing.T) {
	t.Parallel()
	b, epoch := newStreams(t)
	ctx, cancel := context.WithCancel(t.Context())
	var tries int64
	b.redis.AddHook(between{do: func() {
		if tries++; tries == 20 {
			cancel()
		}
		if err := b.redis.XAdd(t.Context(), &redis.XAddArgs{Stream: Stream, Values: []string{"a", "b"}}).Err(); err != nil {
			t.Error(err)
		}
	}})
	if err := b.Publish(ctx, epoch, events(2)); err == nil {
		t.Error("it was added")
	}
	b.has(t, tries)
}

func TestAReplayIsNotDisturbedByWhatRelaysPublish(t *testing.T) {
	t.Parallel()
	b, epoch := newStreams(t)
	relay := NewRedisStreams(connect.Redis([]string{b.redis.(*redis.Client).Options().Addr}, ""))
	t.Cleanup(func() { _ = relay.redis.Close() })
	batches := int64(0)
	b.redis.AddHook(between{do: func() {
		batches++
		if err := relay.Publish(t.Context(), epoch, events(1)); err != nil {
			t.Error(err)
		}
	}})
	if err := b.Publish(t.Context(), AnyEpoch, events(2)); err != nil {
		t.Error(err)
	}
	b.has(t, batches+2)
}
