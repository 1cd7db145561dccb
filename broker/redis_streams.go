package broker

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"
)

// Stream is the Redis stream of events.
const Stream = "orders.events"

// lostPendingEvery is how long what is pending, and gone, is not looked for after some was found: where somebody else trims the stream all
// the time, what was published again would have to be again before it all is, and nothing new would ever be.
const lostPendingEvery = 20 * time.Second

// readSlack is how much longer than asked for a read may take.
const readSlack = time.Second

// RedisStreams publishes to a Redis stream, one field for each attribute of an event.
type RedisStreams struct {
	redis redis.UniversalClient

	mu   sync.Mutex
	seen life // the last

	pendingLostAt    time.Time // when some was found; of Epoch's caller
	lostPendingEvery time.Duration
}

// life is what Redis says of the stream.
type life struct {
	epoch string // none when the stream has no mark, or is not there
	marks []string
	last  entryID // the last that was added
	first entryID // the first that is there, or could come
	cut   int64   // how many entries are gone that a group, if it has read any, has not read
	// pending are the groups that have not acknowledged all that they have read.
	pending []string
	// What was gone already when the mark was made: so many that were not read, and what was before this entry.
	knownCut   int64
	knownFirst entryID
}

// NewRedisStreams returns the broker that publishes in rdb.
func NewRedisStreams(rdb redis.UniversalClient) *RedisStreams {
	return &RedisStreams{redis: rdb, lostPendingEvery: lostPendingEvery}
}

// ErrForgot: Redis is not in that epoch any more.
var ErrForgot = errors.New("redis may have forgotten what it accepted")

// Publish adds the events to the stream in one transaction of Redis, in which nothing is done when the epoch is another by then:
// asked for it, Redis watches the stream until the events are in, and one that was restarted since, or is another, is not at the
// other end of the connection. It does not make a stream: Epoch does.
func (b *RedisStreams) Publish(ctx context.Context, epoch string, events []Event) error {
	if len(events) == 0 {
		return nil
	}
	err := b.publish(ctx, epoch, events)
	for errors.Is(err, redis.TxFailedErr) && ctx.Err() == nil { // the stream was trimmed or added to meanwhile, or forgotten
		err = b.publish(ctx, epoch, events)
	}
	if err != nil && !errors.As(err, new(*RefusedError)) {
		b.lookAgain(ctx)
		return fmt.Errorf("add %d events to stream %s: %w", len(events), Stream, err)
	}
	return err
}

func (b *RedisStreams) publish(ctx context.Context, epoch string, events []Event) error {
	node, err := b.node(ctx)
	if err != nil {
		return err
	}
	conn := node.Conn()
	defer conn.Close()
	if epoch != AnyEpoch {
		now, err := ask(ctx, conn, true)
		if err == nil && (epoch != now.epoch || b.isBehind(now)) {
			err = ErrForgot
		}
		if err != nil {
			_ = conn.Do(ctx, "UNWATCH").Err() // a connection that cannot is given up
			return err
		}
	}
	cmds, err := conn.TxPipelined(ctx, func(p redis.Pipeliner) error {
		for _, e := range events {
			p.XAdd(ctx, &redis.XAddArgs{Stream: Stream, NoMkStream: true, Values: fields(e)})
		}
		return nil
	})
	if err == nil {
		b.added(epoch, cmds[len(cmds)-1].(*redis.StringCmd).Val())
	}
	if err == nil || errors.Is(err, redis.TxFailedErr) {
		return err
	}
	refused := map[int]error{}
	for i, cmd := range cmds {
		switch err := cmd.Err(); {
		case err == nil:
		case errors.Is(err, redis.Nil):
			return ErrForgot
		case refuses(err):
			refused[i] = err
		default:
			return err
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

// Epoch is another when Redis was restarted, when another server took over, when the stream was lost, when its last entry is
// older than one that was seen, when it was trimmed of what a group had not acknowledged, and, from Redis 7 on, of what one had not
// read, unless that has read on.
func (b *RedisStreams) Epoch(ctx context.Context) (string, error) {
	epoch, err := b.epoch(ctx)
	if err != nil {
		b.lookAgain(ctx)
		return "", fmt.Errorf("ask for the epoch of stream %s: %w", Stream, err)
	}
	return epoch, nil
}

func (b *RedisStreams) epoch(ctx context.Context) (string, error) {
	node, err := b.node(ctx)
	if err != nil {
		return "", err
	}
	now, err := ask(ctx, node, false)
	if err != nil {
		return "", err
	}
	lost := now.epoch == "" || b.isBehind(now)
	if !lost && time.Since(b.pendingLostAt) >= b.lostPendingEvery {
		if lost, err = lostPending(ctx, node, now); lost {
			b.pendingLostAt = time.Now()
		}
	}
	if err == nil && lost {
		now, err = mark(ctx, node, now)
	}
	if err != nil {
		return "", err
	}
	b.mu.Lock()
	b.seen = now
	b.mu.Unlock()
	return now.epoch, nil
}

// mark gives the stream another mark than it had, and makes it if there is none.
func mark(ctx context.Context, node *redis.Client, had life) (life, error) {
	_, err := node.Pipelined(ctx, func(p redis.Pipeliner) error {
		for _, name := range had.marks {
			p.XGroupDestroy(ctx, Stream, name)
		}
		p.XGroupCreateMkStream(ctx, Stream, fmt.Sprintf("%s%s/%s:%d", epochMark, uuid.New(), had.first, had.cut), "$")
		return nil
	})
	if err != nil {
		return life{}, err
	}
	now, err := ask(ctx, node, false)
	if err == nil && now.epoch == "" {
		err = ErrForgot // again
	}
	return now, err
}

// lostPending tells whether the stream was trimmed of what a group has read and not acknowledged. Whoever read it may have died.
func lostPending(ctx context.Context, node *redis.Client, now life) (bool, error) {
	if !now.knownFirst.less(now.first) {
		return false, nil
	}
	for _, group := range now.pending {
		gone, err := node.XPendingExt(ctx, &redis.XPendingExtArgs{
			Stream: Stream, Group: group, Start: now.knownFirst.String(), End: "(" + now.first.String(), Count: 1,
		}).Result()
		if err != nil || len(gone) > 0 {
			return len(gone) > 0, err
		}
	}
	return false, nil
}

// isBehind tells whether the stream has forgotten what it had, and not its mark: it was put back as it was, or cut.
func (b *RedisStreams) isBehind(now life) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return now.cut > now.knownCut || now.epoch == b.seen.epoch && now.last.less(b.seen.last)
}

// added notes the last entry that was added.
func (b *RedisStreams) added(epoch, id string) {
	last, err := parseEntryID(id)
	b.mu.Lock()
	defer b.mu.Unlock()
	if err == nil && epoch == b.seen.epoch {
		b.seen.last = last
	}
}

// node returns a client of the server that has the stream: in a cluster, of the master of its slot.
func (b *RedisStreams) node(ctx context.Context) (*redis.Client, error) {
	switch c := b.redis.(type) {
	case *redis.Client:
		return c, nil
	case *redis.ClusterClient:
		return c.MasterForKey(ctx, Stream)
	default:
		return nil, fmt.Errorf("a client of another kind, %T", c)
	}
}

// lookAgain has a cluster's client ask again who has the stream. It would by itself after a minute: what is sent to one server alone
// is not sent on to another.
func (b *RedisStreams) lookAgain(ctx context.Context) {
	if c, ok := b.redis.(*redis.ClusterClient); ok {
		c.ReloadState(ctx)
	}
}

// ask returns what a server says of the stream. Its epoch names this run of the server, and its part in replication: a server that was
// another's replica for a while is the same run with other data.
func ask(ctx context.Context, server redis.Cmdable, watch bool) (now life, err error) {
	var watched redis.Cmder = redis.NewStatusCmd(ctx)
	var stream *redis.XInfoStreamCmd
	var groups *redis.XInfoGroupsCmd
	var run, replication *redis.StringCmd
	_, _ = server.Pipelined(ctx, func(p redis.Pipeliner) error { // the commands have the errors
		if watch {
			watched = p.Do(ctx, "WATCH", Stream)
		}
		groups, stream = p.XInfoGroups(ctx, Stream), p.XInfoStream(ctx, Stream) // what is added between them is not cut
		run, replication = p.Info(ctx, "server"), p.Info(ctx, "replication")
		return nil
	})
	for _, cmd := range []redis.Cmder{watched, groups, stream} {
		if err := cmd.Err(); err != nil && !strings.HasSuffix(err.Error(), "no such key") {
			return now, err
		}
	}
	runID, err := infoLine(run, "run_id:")
	if err != nil {
		return now, err
	}
	replID, err := infoLine(replication, "master_replid:")
	if err != nil {
		return now, err
	}
	if there := stream.Val(); there != nil {
		now.last, _ = parseEntryID(there.LastGeneratedID) // a Redis inside the process has none at first
		if now.first, _ = parseEntryID(there.FirstEntry.ID); there.Length == 0 {
			now.first = now.last.next()
		}
		for _, group := range groups.Val() {
			if strings.HasPrefix(group.Name, epochMark) {
				now.marks = append(now.marks, group.Name)
			} else if group.EntriesRead > 0 {
				// More was to be read than there is. Of a stream that was trimmed a newer Redis tells as the lag what is left.
				now.cut = max(now.cut, there.EntriesAdded-group.EntriesRead-there.Length)
			}
			if group.Pending > 0 {
				now.pending = append(now.pending, group.Name)
			}
		}
	}
	if len(now.marks) > 0 {
		now.epoch = runID + " " + replID + " " + now.marks[0]
		name, cut, _ := strings.Cut(now.marks[0][len(epochMark):], ":") // a former release's has no entry in it, or neither
		now.knownCut, _ = strconv.ParseInt(cut, 10, 64)
		_, first, _ := strings.Cut(name, "/")
		now.knownFirst, _ = parseEntryID(first)
	}
	return now, nil
}

// infoLine returns the line that begins so, of what a server says of itself. A Redis inside the process does not have these.
func infoLine(info *redis.StringCmd, begins string) (string, error) {
	switch err := info.Err(); {
	case redis.HasErrorPrefix(err, "NOPERM"):
		return "", fmt.Errorf("it must be allowed to say INFO: %w", err)
	case err != nil && strings.HasSuffix(err.Error(), "is not supported"):
		return "", nil
	case err != nil:
		return "", err
	}
	for line := range strings.SplitSeq(info.Val(), "\r\n") {
		if strings.HasPrefix(line, begins) {
			return line, nil
		}
	}
	return "", fmt.Errorf("its INFO does not say %s", begins)
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
// received again. The group begins at the start of the stream; both are made again when they are missing. The name is for people who
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
		if err := s.createGroup(ctx); err != nil {
			return nil, err
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

// createGroup makes the group, and the stream if there is none: without its mark, that is in no epoch yet.
func (s *RedisSubscription) createGroup(ctx context.Context) error {
	err := s.redis.XGroupCreateMkStream(ctx, Stream, s.group, "0").Err()
	if err != nil && !redis.HasErrorPrefix(err, "BUSYGROUP") {
		return fmt.Errorf("create consumer group %s of stream %s: %w", s.group, Stream, err)
	}
	return nil
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
