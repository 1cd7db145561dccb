package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"
)

// Channel is the Redis Pub/Sub channel of events.
const Channel = "orders.events"

const (
	// listenerRoom is how many received events wait for a consumer that is slower than the relay: some 30 MB, about what Redis
	// holds for a subscriber before it cuts the line.
	listenerRoom = 50_000
	// listenTimeout bounds one try to listen, and listenAgain is the pause before the next.
	listenTimeout, listenAgain = 2 * time.Second, 250 * time.Millisecond
	// silentAfter is for how long a line may be silent, though a sign of life is asked for three times meanwhile.
	silentAfter = 10 * time.Second
	// catchUpTimeout bounds the wait for what was published before.
	catchUpTimeout = 500 * time.Millisecond
)

// RedisPubSub publishes on a Redis Pub/Sub channel, one message for each event: a CloudEvents JSON object (structured mode).
//
// Pub/Sub remembers nothing: who does not listen when an event is published never gets it. Every process that listens gets
// every event.
type RedisPubSub struct {
	redis   redis.UniversalClient
	log     *slog.Logger
	unheard atomic.Int64 // how many events nobody received since somebody last did

	room    int           // listenerRoom
	silence time.Duration // silentAfter
}

// NewRedisPubSub returns the broker that publishes through rdb.
func NewRedisPubSub(rdb redis.UniversalClient, log *slog.Logger) *RedisPubSub {
	return &RedisPubSub{redis: rdb, log: log, room: listenerRoom, silence: silentAfter}
}

// Publish sends the events in one pipeline. An event that nobody receives counts as accepted, as Pub/Sub has it: the log says
// when that begins, and when it ends.
func (b *RedisPubSub) Publish(ctx context.Context, _ string, events []Event) error {
	refused := map[int]error{}
	cmds, err := b.redis.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i, e := range events {
			message, err := encode(e)
			if err != nil {
				refused[i] = err
				continue
			}
			say(ctx, p, Channel, message)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("publish %d events on channel %s: %w", len(events), Channel, err)
	}
	for _, cmd := range cmds {
		b.heard(ctx, cmd.(*redis.IntCmd).Val())
	}
	if len(refused) > 0 {
		return &RefusedError{Events: refused}
	}
	return nil
}

// say publishes a message in a pipeline. A cluster's client would send each to any node; at the node of the channel's slot
// they keep their order, and the subscribers, who are there too, are counted.
func say(ctx context.Context, p redis.Pipeliner, channel, message string) {
	p.Publish(ctx, channel, message).SetFirstKeyPos(1)
}

// heard notes how many received an event.
func (b *RedisPubSub) heard(ctx context.Context, receivers int64) {
	if receivers == 0 {
		if b.unheard.Add(1) == 1 {
			b.log.WarnContext(ctx, "Nobody listens: events that are published now are lost to every consumer", "channel", Channel)
		}
		return
	}
	if lost := b.unheard.Swap(0); lost > 0 {
		b.log.WarnContext(ctx, "Somebody listens again; what was published meanwhile is lost", "channel", Channel, "events", lost)
	}
}

// Epoch is always the same: what keeps nothing forgets nothing, so nothing is published again by itself, except once after a
// change from another broker.
func (b *RedisPubSub) Epoch(context.Context) (string, error) {
	return "redis-pubsub", nil
}

// envelope is an event as a message.
type envelope struct {
	SpecVersion     string          `json:"specversion"`
	ID              string          `json:"id"`
	Source          string          `json:"source"`
	Type            string          `json:"type"`
	Subject         string          `json:"subject"`
	Time            string          `json:"time"`
	DataContentType string          `json:"datacontenttype"`
	Traceparent     string          `json:"traceparent,omitempty"`
	Replay          string          `json:"replay,omitempty"`
	ReplayTime      string          `json:"replaytime,omitempty"`
	Data            json.RawMessage `json:"data"`
}

func encode(e Event) (string, error) {
	object := envelope{
		SpecVersion: "1.0", ID: e.ID.String(), Source: e.Source, Type: e.Type, Subject: e.Subject,
		Time: e.Time.UTC().Format(time.RFC3339Nano), DataContentType: "application/json", Traceparent: e.Traceparent, Data: e.Data,
	}
	if e.Replay != "" {
		object.Replay, object.ReplayTime = e.Replay, e.ReplayedAt.UTC().Format(time.RFC3339Nano)
	}
	message, err := json.Marshal(object)
	if err != nil {
		return "", fmt.Errorf("encode event %s: %w", e.ID, err)
	}
	return string(message), nil
}

func decode(message string) (Event, error) {
	var e envelope
	if err := json.Unmarshal([]byte(message), &e); err != nil {
		return Event{}, fmt.Errorf("it is not a CloudEvents object in JSON: %w", err)
	}
	return event(map[string]any{
		"specversion": e.SpecVersion, "id": e.ID, "source": e.Source, "type": e.Type, "subject": e.Subject, "time": e.Time,
		"traceparent": e.Traceparent, "replay": e.Replay, "replaytime": e.ReplayTime, "data": string(e.Data),
	})
}

// RedisListener is a process's ear on the channel, for one consumer. What it has received and the consumer has not finished is
// lost with the process, and so is what is published while its line to Redis is cut: it listens again by itself, and says so in
// the log.
type RedisListener struct {
	redis    redis.UniversalClient
	log      *slog.Logger
	silence  time.Duration // as in RedisPubSub
	messages chan string   // what came on Channel
	own      string        // a channel of its own, in the slot of Channel
	marks    chan string   // what came on it
	ended    chan struct{} // closed when the client is

	dropped int // how many messages there was no room for

	mu       sync.Mutex
	received uint64            // names deliveries; guarded by mu, as all that follows
	inHand   map[string]string // the messages of the deliveries that are not acknowledged, by tag
	back     []string          // messages that were given back
}

// Subscribe listens: everything that is published after it returns is received, until rdb is closed.
func (b *RedisPubSub) Subscribe(ctx context.Context) (*RedisListener, error) {
	l := &RedisListener{
		redis: b.redis, log: b.log, silence: b.silence, messages: make(chan string, b.room),
		own: "{" + Channel + "}:" + uuid.NewString(), marks: make(chan string, 8), ended: make(chan struct{}), inHand: map[string]string{},
	}
	line, err := l.listen(ctx)
	if err != nil {
		return nil, fmt.Errorf("listen to channel %s: %w", Channel, err)
	}
	go l.run(line) // #nosec G118 -- it listens for as long as the client is there, not for as long as the call
	return l, nil
}

// run reads one line after another, until the client is closed.
func (l *RedisListener) run(line *redis.PubSub) {
	defer close(l.ended)
	ctx := context.Background()
	for line != nil {
		line = l.again(ctx, l.read(ctx, line))
	}
}

// again listens after the line was cut, as soon as it can; it returns nil when the client is closed.
func (l *RedisListener) again(ctx context.Context, cut error) *redis.PubSub {
	began := time.Now()
	for said := false; ; said = true {
		line, err := l.listen(ctx)
		switch {
		case errors.Is(err, redis.ErrClosed):
			return nil
		case err == nil:
			l.log.WarnContext(ctx, "The line to Redis was cut; events published meanwhile are lost to this consumer",
				"after", time.Since(began).Round(time.Millisecond), "error", cut)
			return line
		case !said:
			l.log.ErrorContext(ctx, "Listening to Redis fails, and will be tried again; events published meanwhile are lost to this consumer", "error", err)
		}
		time.Sleep(listenAgain)
	}
}

// listen opens a line on which everything comes that is published after it returns.
func (l *RedisListener) listen(ctx context.Context) (*redis.PubSub, error) {
	ctx, cancel := context.WithTimeout(ctx, listenTimeout)
	defer cancel()
	line := l.redis.Subscribe(ctx, l.own, Channel)
	for {
		reply, err := line.ReceiveTimeout(ctx, listenTimeout)
		if err != nil {
			_ = line.Close()
			return nil, err
		}
		if confirmed, ok := reply.(*redis.Subscription); ok && confirmed.Channel == Channel {
			return line, nil
		}
	}
}

// read takes what comes over a line until it is cut, or silent though it was asked for a sign of life. It returns an error.
func (l *RedisListener) read(ctx context.Context, line *redis.PubSub) error {
	defer line.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		for ticker := time.NewTicker(l.silence / 3); ; {
			select {
			case <-ctx.Done():
				ticker.Stop()
				return
			case <-ticker.C:
				_ = line.Ping(ctx) // no answer to it is what read notices
			}
		}
	}()
	for {
		reply, err := line.ReceiveTimeout(ctx, l.silence)
		if err != nil {
			return err
		}
		if message, ok := reply.(*redis.Message); ok {
			l.take(ctx, message)
		}
	}
}

// take keeps a message for the consumer, or drops it when there is no room.
func (l *RedisListener) take(ctx context.Context, m *redis.Message) {
	if m.Channel == l.own {
		select {
		case l.marks <- m.Payload:
		default: // nobody waits for so many
		}
		return
	}
	select {
	case l.messages <- m.Payload:
		if l.dropped > 0 && len(l.messages) <= cap(l.messages)/2 {
			l.log.WarnContext(ctx, "The consumer has caught up; the events dropped meanwhile are lost to it", "events", l.dropped)
			l.dropped = 0
		}
	default:
		if l.dropped == 0 {
			l.log.WarnContext(ctx, "The consumer is too slow: events are dropped, and lost to it", "waiting", len(l.messages))
		}
		l.dropped++
	}
}

// Receive returns what has come. With no time to wait, none means that nothing is left of what was published before, unless
// Redis does not answer.
func (l *RedisListener) Receive(ctx context.Context, limit int, wait time.Duration) ([]Delivery, error) {
	if wait <= 0 && len(l.messages) == 0 {
		l.catchUp(ctx)
	}
	var deliveries []Delivery
	for len(deliveries) < limit && ctx.Err() == nil {
		message, ok := l.next(ctx, wait)
		if !ok {
			break
		}
		deliveries = append(deliveries, l.delivery(message))
		wait = 0
	}
	if len(deliveries) > 0 {
		return deliveries, nil
	}
	select {
	case <-l.ended:
		return nil, fmt.Errorf("receive from channel %s: %w", Channel, redis.ErrClosed)
	default:
		return nil, nil
	}
}

// next returns the next message, and waits for it if need be.
func (l *RedisListener) next(ctx context.Context, wait time.Duration) (string, bool) {
	if message, ok := l.givenBack(); ok {
		return message, true
	}
	select {
	case message := <-l.messages:
		return message, true
	default:
	}
	if wait <= 0 {
		return "", false
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case message := <-l.messages:
		return message, true
	case <-timer.C:
	case <-ctx.Done():
	case <-l.ended:
	}
	return "", false
}

// catchUp waits until everything is here that was published before. Redis answers a publisher before the message has arrived;
// but a mark that is published now arrives after it.
func (l *RedisListener) catchUp(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, catchUpTimeout)
	defer cancel()
	mark := uuid.NewString()
	_, err := l.redis.Pipelined(ctx, func(p redis.Pipeliner) error {
		say(ctx, p, l.own, mark)
		return nil
	})
	for err == nil {
		select {
		case got := <-l.marks:
			if got == mark {
				return
			}
		case <-l.ended:
			return
		case <-ctx.Done():
			return
		}
	}
}

func (l *RedisListener) givenBack() (string, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.back) == 0 {
		return "", false
	}
	message := l.back[0]
	l.back = l.back[1:]
	return message, true
}

func (l *RedisListener) delivery(message string) Delivery {
	l.mu.Lock()
	l.received++
	d := Delivery{Tag: strconv.FormatUint(l.received, 10)}
	l.inHand[d.Tag] = message
	l.mu.Unlock()
	d.Event, d.Err = decode(message)
	return d
}

// Keep does nothing: nobody else would be given a delivery.
func (l *RedisListener) Keep(context.Context, []string) error { return nil }

// Ack forgets deliveries.
func (l *RedisListener) Ack(_ context.Context, tags []string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, tag := range tags {
		delete(l.inHand, tag)
	}
	return nil
}

// Release gives deliveries back to this listener itself: they are the next that it receives.
func (l *RedisListener) Release(_ context.Context, deliveries []Delivery) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, d := range deliveries {
		if message, ok := l.inHand[d.Tag]; ok {
			l.back = append(l.back, message)
			delete(l.inHand, d.Tag)
		}
	}
	return nil
}

// Recount does nothing: deliveries are not counted.
func (l *RedisListener) Recount(context.Context, []Delivery) error { return nil }
