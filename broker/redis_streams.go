package broker

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"
)

// Stream is the Redis stream of events.
const Stream = "orders.events"

const (
	// readSlack is how much longer than asked for a read may take.
	readSlack = time.Second
	// streamWait is after what time a consumer looks again whether there is a stream.
	streamWait = 250 * time.Millisecond
)

// RedisStreams publishes to a Redis stream, one field for each attribute of an event.
type RedisStreams struct {
	redis redis.UniversalClient
}

// NewRedisStreams returns the broker that publishes in rdb.
func NewRedisStreams(rdb redis.UniversalClient) *RedisStreams { return &RedisStreams{redis: rdb} }

// ErrForgot: the stream is not there any more.
var ErrForgot = errors.New("the stream is lost")

// Publish adds the events to the stream in one pipeline. It does not make a stream: Epoch does, which notices that it is new.
func (b *RedisStreams) Publish(ctx context.Context, events []Event) error {
	if len(events) == 0 {
		return nil
	}
	cmds, err := b.redis.Pipelined(ctx, func(p redis.Pipeliner) error {
		for _, e := range events {
			p.XAdd(ctx, &redis.XAddArgs{Stream: Stream, NoMkStream: true, Values: fields(e)})
		}
		return nil
	})
	if err == nil {
		return nil
	}
	refused := map[int]error{}
	for i, cmd := range cmds {
		switch err := cmd.Err(); {
		case err == nil:
		case errors.Is(err, redis.Nil):
			return fmt.Errorf("add %d events to stream %s: %w", len(events), Stream, ErrForgot)
		case refuses(err):
			refused[i] = err
		default:
			return fmt.Errorf("add %d events to stream %s: %w", len(events), Stream, err)
		}
	}
	return &RefusedError{Events: refused}
}

// refuses tells whether an error of Redis concerns the one event, and not Redis as a whole or for the moment.
func refuses(err error) bool {
	var reply redis.Error
	if !errors.As(err, &reply) {
		return false
	}
	for _, whole := range []string{
		"OOM", "LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "MOVED", "ASK", "TRYAGAIN", "MISCONF", "BUSY", "NOREPLICAS",
		"NOAUTH", "WRONGPASS", "NOPERM", "WRONGTYPE", "EXECABORT", "UNKILLABLE",
	} {
		if redis.HasErrorPrefix(err, whole) {
			return false
		}
	}
	return true
}

// epochMark begins the name of a consumer group that nobody reads: it marks the stream, and is lost with it.
const epochMark = "epoch:"

// Epoch is another when Redis was restarted, when another server took over, and when the stream was lost.
func (b *RedisStreams) Epoch(ctx context.Context, lost func(context.Context) error) (string, error) {
	mark, err := b.mark(ctx, lost)
	if err != nil {
		return "", fmt.Errorf("mark stream %s: %w", Stream, err)
	}
	run, err := b.runID(ctx)
	if err != nil {
		return "", fmt.Errorf("ask Redis for its run id: %w", err)
	}
	return run + " " + mark, nil
}

// mark returns the mark of the stream, and marks one that has none, or makes it.
func (b *RedisStreams) mark(ctx context.Context, lost func(context.Context) error) (string, error) {
	groups, err := b.redis.XInfoGroups(ctx, Stream).Result()
	if err != nil && !strings.HasSuffix(err.Error(), "no such key") {
		return "", err
	}
	for _, group := range groups {
		if strings.HasPrefix(group.Name, epochMark) {
			return group.Name, nil
		}
	}
	if err := lost(ctx); err != nil {
		return "", err
	}
	mark := epochMark + uuid.NewString()
	return mark, b.redis.XGroupCreateMkStream(ctx, Stream, mark, "$").Err()
}

// runID names this run of the server that has the stream, and its part in replication: a server that was another's replica for a
// while is the same run with other data. In a cluster it is the master of the stream's slot.
func (b *RedisStreams) runID(ctx context.Context) (string, error) {
	var server interface {
		Info(ctx context.Context, section ...string) *redis.StringCmd
	} = b.redis
	if cluster, ok := b.redis.(*redis.ClusterClient); ok {
		master, err := cluster.MasterForKey(ctx, Stream)
		if err != nil {
			return "", err
		}
		server = master
	}
	info, err := server.Info(ctx).Result()
	if redis.HasErrorPrefix(err, "NOPERM") {
		return "", fmt.Errorf("it must be allowed to say INFO: %w", err)
	}
	if err != nil {
		return "", err
	}
	var id []string
	for line := range strings.SplitSeq(info, "\r\n") {
		if strings.HasPrefix(line, "run_id:") || strings.HasPrefix(line, "master_replid:") {
			id = append(id, line)
		}
	}
	return strings.Join(id, " "), nil
}

func fields(e Event) []any {
	f := []any{
		"specversion", "1.0",
		"id", e.ID.String(),
		"source", e.Source,
		"type", e.Type,
		"subject", e.Subject,
		"time", e.Time.UTC().Format(time.RFC3339Nano),
		"datacontenttype", "application/json",
	}
	if e.Traceparent != "" {
		f = append(f, "traceparent", e.Traceparent)
	}
	if e.Replay != "" {
		f = append(f, "replay", e.Replay, "replaytime", e.ReplayedAt.UTC().Format(time.RFC3339Nano))
	}
	return append(f, "data", string(e.Data))
}

// event reads the fields of a stream entry.
func event(values map[string]any) (Event, error) {
	text := func(name string) string { s, _ := values[name].(string); return s }
	id, err := uuid.Parse(text("id"))
	if err != nil {
		return Event{}, fmt.Errorf("its id is not a UUID: %w", err)
	}
	at, err := time.Parse(time.RFC3339Nano, text("time"))
	if err != nil {
		return Event{}, fmt.Errorf("its time is not RFC 3339: %w", err)
	}
	var replayedAt time.Time
	if text("replay") != "" {
		if replayedAt, err = time.Parse(time.RFC3339Nano, text("replaytime")); err != nil {
			return Event{}, fmt.Errorf("its replaytime is not RFC 3339: %w", err)
		}
	}
	switch {
	case text("specversion") != "1.0":
		return Event{}, fmt.Errorf("its specversion is %q, not 1.0", text("specversion"))
	case text("type") == "":
		return Event{}, errors.New("it has no type")
	case !json.Valid([]byte(text("data"))):
		return Event{}, errors.New("its data is not JSON")
	}
	return Event{
		ID: id, Source: text("source"), Type: text("type"), Subject: text("subject"), Time: at,
		Traceparent: text("traceparent"), Data: json.RawMessage(text("data")),
		Replay: text("replay"), ReplayedAt: replayedAt,
	}, nil
}

// Subscribe returns the subscription of a consumer group. A delivery that is neither acknowledged nor kept for abandonedAfter is
// received again. The group begins at the start of the stream, and is made again when it is missing; the stream itself is made by
// Epoch alone, and until then there is nothing to receive. The name is for people who
// look into Redis: nothing depends on it, and processes may share one. One that stays the same, like the host's, leaves no
// names of the dead behind.
func (b *RedisStreams) Subscribe(group, name string, abandonedAfter time.Duration) *RedisSubscription {
	return &RedisSubscription{redis: b.redis, group: group, name: name, abandonedAfter: abandonedAfter}
}

// RedisSubscription is one process's part in a consumer group. It is for one goroutine, but for Keep.
type RedisSubscription struct {
	redis          redis.UniversalClient
	group, name    string
	abandonedAfter time.Duration

	takeOverFrom string    // where the walk over abandoned deliveries goes on; empty: at the start
	takenOver    time.Time // when the last walk was finished
}

// Receive returns deliveries that others abandoned, if there are any, and else new ones.
func (s *RedisSubscription) Receive(ctx context.Context, limit int, wait time.Duration) ([]Delivery, error) {
	deliveries, err := s.next(ctx, limit, wait)
	if redis.HasErrorPrefix(err, "NOGROUP") {
		switch made, err := s.createGroup(ctx); {
		case err != nil:
			return nil, err
		case !made:
			return nil, pause(ctx, min(wait, streamWait))
		}
		deliveries, err = s.next(ctx, limit, wait)
	}
	if err != nil {
		return nil, fmt.Errorf("receive from stream %s: %w", Stream, err)
	}
	return deliveries, nil
}

func (s *RedisSubscription) next(ctx context.Context, limit int, wait time.Duration) ([]Delivery, error) {
	messages, err := s.takeOver(ctx, limit)
	if err != nil {
		return nil, err
	}
	if len(messages) > 0 {
		taken := deliveriesOf(messages)
		return taken, s.count(ctx, taken)
	}
	messages, err = s.read(ctx, limit, wait)
	return deliveriesOf(messages), err
}

// deliveriesOf returns messages as first deliveries.
func deliveriesOf(messages []redis.XMessage) []Delivery {
	deliveries := make([]Delivery, len(messages))
	for i, m := range messages {
		d := &deliveries[i]
		d.Tag, d.Deliveries = m.ID, 1
		d.Event, d.Err = event(m.Values)
	}
	return deliveries
}

// count asks Redis how often it has made the deliveries.
func (s *RedisSubscription) count(ctx context.Context, deliveries []Delivery) error {
	asked := make([]*redis.XPendingExtCmd, len(deliveries))
	_, err := s.redis.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i, d := range deliveries {
			asked[i] = p.XPendingExt(ctx, &redis.XPendingExtArgs{Stream: Stream, Group: s.group, Start: d.Tag, End: d.Tag, Count: 1})
		}
		return nil
	})
	for i, cmd := range asked {
		if pending := cmd.Val(); len(pending) == 1 {
			deliveries[i].Deliveries = pending[0].RetryCount
		}
	}
	return err
}

func (s *RedisSubscription) takeOver(ctx context.Context, limit int) ([]redis.XMessage, error) {
	if time.Since(s.takenOver) < s.abandonedAfter/4 {
		return nil, nil
	}
	messages, next, err := s.redis.XAutoClaim(ctx, &redis.XAutoClaimArgs{
		Stream: Stream, Group: s.group, Consumer: s.name,
		MinIdle: s.abandonedAfter, Start: cmp.Or(s.takeOverFrom, "0-0"), Count: int64(limit),
	}).Result()
	if err != nil {
		return nil, err
	}
	s.takeOverFrom = next
	if next == "0-0" {
		s.takenOver = time.Now()
	}
	return messages, nil
}

func (s *RedisSubscription) read(ctx context.Context, limit int, wait time.Duration) ([]redis.XMessage, error) {
	// A read that blocks is not interrupted when ctx is cancelled, and would wait long for a Redis that is silent.
	ctx, cancel := context.WithTimeout(ctx, max(wait, 0)+readSlack)
	defer cancel()
	if wait <= 0 {
		wait = -1 // to Redis, zero means for ever
	}
	streams, err := s.redis.XReadGroup(ctx, &redis.XReadGroupArgs{
		Group: s.group, Consumer: s.name, Streams: []string{Stream, ">"}, Count: int64(limit), Block: wait,
	}).Result()
	if errors.Is(err, redis.Nil) || err == nil && len(streams) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return streams[0].Messages, nil
}

// createGroup makes the group, and returns whether there is a stream to make it of. Made here, a stream that was lost would look
// as if it had never been: a relay that has not looked since would publish into it, before what was lost.
func (s *RedisSubscription) createGroup(ctx context.Context) (made bool, err error) {
	err = s.redis.XGroupCreate(ctx, Stream, s.group, "0").Err()
	switch {
	case err == nil || redis.HasErrorPrefix(err, "BUSYGROUP"):
		return true, nil
	case strings.Contains(err.Error(), "requires the key to exist"):
		return false, nil
	default:
		return false, fmt.Errorf("create consumer group %s of stream %s: %w", s.group, Stream, err)
	}
}

// pause waits, unless ctx is done before.
func pause(ctx context.Context, wait time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(wait):
		return nil
	}
}

// Keep starts the deliveries' clocks anew in one command, without counting as another delivery.
func (s *RedisSubscription) Keep(ctx context.Context, tags []string) error {
	err := s.redis.XClaimJustID(ctx, &redis.XClaimArgs{Stream: Stream, Group: s.group, Consumer: s.name, Messages: tags}).Err()
	if err != nil {
		return fmt.Errorf("keep %d deliveries: %w", len(tags), err)
	}
	return nil
}

// Ack acknowledges deliveries in one command.
func (s *RedisSubscription) Ack(ctx context.Context, tags []string) error {
	if len(tags) == 0 {
		return nil
	}
	if err := s.redis.XAck(ctx, Stream, s.group, tags...).Err(); err != nil {
		return fmt.Errorf("acknowledge %d deliveries: %w", len(tags), err)
	}
	return nil
}
