package broker

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"idempotent-orders/internal/connect"
	"idempotent-orders/internal/local"
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

func TestTheEpochIsAnotherOnceForEachTrimOfWhatIsNotAcknowledged(t *testing.T) {
	t.Parallel()
	b, epoch := newStreams(t)
	b.lostPendingEvery = 0
	ctx, group := t.Context(), b.Subscribe("email", "one", time.Hour)
	receive := func(n int) (tags []string) {
		t.Helper()
		if err := b.Publish(ctx, epoch, events(n)); err != nil {
			t.Fatal(err)
		}
		deliveries, err := group.Receive(ctx, n, 0)
		if err != nil || len(deliveries) != n {
			t.Fatal(deliveries, err)
		}
		for _, d := range deliveries {
			tags = append(tags, d.Tag)
		}
		return tags
	}
	stays := func(when string) {
		t.Helper()
		if now := mustEpoch(t, b); now != epoch {
			t.Errorf("%s the epoch is %s; it was %s", when, now, epoch)
			epoch = now
		}
	}
	ends := func(when string) {
		t.Helper()
		now := mustEpoch(t, b)
		if now == epoch {
			t.Errorf("%s the epoch is what it was", when)
		}
		epoch = now
	}
	tags := receive(4)
	stays("with all of it pending")
	if err := group.Ack(ctx, tags[:1]); err != nil {
		t.Fatal(err)
	}
	if n, err := b.Trim(ctx, "email"); err != nil || n != 1 {
		t.Fatal(n, err)
	}
	stays("with what was acknowledged trimmed")
	for _, left := range []int64{2, 0} { // by hand
		if err := b.redis.XTrimMaxLen(ctx, Stream, left).Err(); err != nil {
			t.Fatal(err)
		}
		ends("with what was pending trimmed")
		stays("asked again")
	}
	tags = receive(2)
	stays("with more of it pending")
	if err := b.redis.XTrimMaxLen(ctx, Stream, 0).Err(); err != nil {
		t.Fatal(err)
	}
	b.lostPendingEvery = time.Hour
	stays("with that trimmed, too, so soon after the other,")
	b.lostPendingEvery = 0
	ends("with that trimmed, too,")
	if err := group.Ack(ctx, tags); err != nil { // whoever had it lives
		t.Fatal(err)
	}
	stays("with that acknowledged")
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

// No event is to blame for a Redis that is full: none may be given up.
func TestAFullRedisRefusesNoEventAndTakesTheBatchWhenThereIsRoom(t *testing.T) {
	t.Parallel()
	for name, replays := range map[string]bool{"a relay": false, "a replay": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, epoch := newStreams(t)
			if replays {
				epoch = AnyEpoch
			}
			memory := func(most string) {
				t.Helper()
				err := errors.Join(b.redis.ConfigSet(t.Context(), "maxmemory-policy", "noeviction").Err(),
					b.redis.ConfigSet(t.Context(), "maxmemory", most).Err())
				if err != nil {
					t.Fatal(err)
				}
			}
			batch := events(3)
			memory("1") // byte, and more is in use
			for range 2 {
				err := b.Publish(t.Context(), epoch, batch)
				if err == nil || errors.As(err, new(*RefusedError)) || errors.Is(err, ErrForgot) {
					t.Errorf("when Redis is full, publishing says %v", err)
				}
				b.has(t, 0)
			}
			memory("0") // without a limit
			if err := b.Publish(t.Context(), epoch, batch); err != nil {
				t.Errorf("when there is room, publishing says %v", err)
			}
			b.has(t, 3)
		})
	}
}

func TestTheStreamIsFoundWhereItsSlotHasMovedTo(t *testing.T) {
	t.Parallel()
	from, to := startNode(t), startNode(t)
	ctx := t.Context()
	do := func(node *redis.Client, args ...any) string {
		t.Helper()
		reply, err := node.Do(ctx, args...).Text()
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		return reply
	}
	eventually := func(what string, is func() bool) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); !is(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("not after 20 s: %s", what)
			}
		}
	}
	if err := from.ClusterAddSlotsRange(ctx, 0, 16383).Err(); err != nil {
		t.Fatal(err)
	}
	host, port, err := net.SplitHostPort(from.Options().Addr)
	if err != nil {
		t.Fatal(err)
	}
	do(to, "CLUSTER", "MEET", host, port)
	for _, node := range []*redis.Client{from, to} {
		eventually("the two are a cluster", func() bool {
			info := do(node, "CLUSTER", "INFO")
			return strings.Contains(info, "cluster_state:ok") && strings.Contains(info, "cluster_known_nodes:2")
		})
	}
	rdb := connect.Redis([]string{from.Options().Addr, to.Options().Addr}, "")
	t.Cleanup(func() { _ = rdb.Close() })
	b := NewRedisStreams(rdb)
	before := mustEpoch(t, b)
	if err := b.Publish(ctx, before, events(2)); err != nil {
		t.Fatal(err)
	}

	slot, fromID, toID := from.ClusterKeySlot(ctx, Stream).Val(), do(from, "CLUSTER", "MYID"), do(to, "CLUSTER", "MYID")
	do(to, "CLUSTER", "SETSLOT", slot, "IMPORTING", fromID)
	do(from, "CLUSTER", "SETSLOT", slot, "MIGRATING", toID)
	from.Del(ctx, Stream)
	do(to, "CLUSTER", "SETSLOT", slot, "NODE", toID)
	do(from, "CLUSTER", "SETSLOT", slot, "NODE", toID)

	if err := b.Publish(ctx, before, events(2)); err == nil {
		t.Error("the stream is lost, and events were added")
	}
	eventually("events are added where the slot is now", func() bool {
		epoch, err := b.Epoch(ctx)
		return err == nil && epoch != before && b.Publish(ctx, epoch, events(3)) == nil
	})
	if n := to.XLen(ctx, Stream).Val(); n != 3 {
		t.Errorf("the stream has %d events; want 3", n)
	}
}

// startNode starts a server that can be part of a cluster.
func startNode(t *testing.T) *redis.Client {
	t.Helper()
	server, err := local.StartRedis(t.Context(), local.RedisOptions{
		Dir: testenv.Dir(t), Port: nodePort(t), Args: []string{"--cluster-enabled", "yes"}, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatalf("the tests need redis-server: %v\nrun `make test`, which installs it, or install redis-server", err)
	}
	node := redis.NewClient(&redis.Options{Addr: server.Addr()})
	t.Cleanup(func() {
		_ = node.Close()
		_ = server.Kill()
	})
	return node
}

// nodePort returns a free port of which the one ten thousand above is free too, where the servers of a cluster talk.
func nodePort(t *testing.T) int {
	t.Helper()
	free := func(port int) bool {
		listener, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err == nil {
			_ = listener.Close()
		}
		return err == nil
	}
	for range 100 {
		if port := 11_000 + rand.N(10_000); free(port) && free(port+10_000) {
			return port
		}
	}
	t.Fatal("no two ports are free")
	return 0
}
