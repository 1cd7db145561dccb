package broker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/internal/connect"
	"idempotent-orders/internal/local"
	"idempotent-orders/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// syncLog is a log that can be read while it is written.
type syncLog struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *syncLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// says checks how often the log has a text.
func (l *syncLog) says(t testing.TB, text string, times int) {
	t.Helper()
	if n := l.count(text); n != times {
		t.Errorf("the log has %q %d times; want %d", text, n, times)
	}
}

func (l *syncLog) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.buf.String(), text)
}

func newPubSub(t testing.TB) (*RedisPubSub, *testenv.RedisServer, *syncLog) {
	rdb, server := testenv.Redis(t)
	log := &syncLog{}
	return NewRedisPubSub(rdb, slog.New(slog.NewTextHandler(log, nil))), server, log
}

func mustListen(t testing.TB, b *RedisPubSub) *RedisListener {
	t.Helper()
	l, err := b.Subscribe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func events(n int) []Event {
	made := make([]Event, n)
	for i := range made {
		made[i] = Event{
			ID: uuid.New(), Source: "/orders", Type: "order.created.v1", Subject: uuid.NewString(), Time: time.UnixMicro(1_700_000_000_123_456).UTC(),
			Data: json.RawMessage(fmt.Sprintf(`{"n":%d,"text":"\"<ä用户\u2028"}`, i)),
		}
	}
	made[0].Traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	made[0].Replay, made[0].ReplayedAt = Forced, time.UnixMicro(1_800_000_000_000_001).UTC()
	return made
}

func mustPublish(t testing.TB, b *RedisPubSub, events []Event) {
	t.Helper()
	if err := b.Publish(t.Context(), AnyEpoch, events); err != nil {
		t.Fatal(err)
	}
}

// mustReceive checks that what was published so far, and not received before, is want.
func mustReceive(t testing.TB, l *RedisListener, want []Event) {
	t.Helper()
	l.catchUp(t.Context())
	got, err := l.Receive(t.Context(), len(want)+1, 0)
	if err != nil || len(got) != len(want) {
		t.Fatalf("received %d events, %v; want %d", len(got), err, len(want))
	}
	tags := map[string]bool{}
	for i, d := range got {
		tags[d.Tag] = true
		if d.Err != nil || !sameEvent(d.Event, want[i]) {
			t.Fatalf("received %+v, %v; want %+v", d.Event, d.Err, want[i])
		}
	}
	if len(tags) != len(want) {
		t.Errorf("%d deliveries have %d tags", len(want), len(tags))
	}
}

// sameEvent tells whether events are the same, whatever the spelling of their data.
func sameEvent(a, b Event) bool {
	var dataA, dataB any
	if json.Unmarshal(a.Data, &dataA) != nil || json.Unmarshal(b.Data, &dataB) != nil || !reflect.DeepEqual(dataA, dataB) {
		return false
	}
	a.Data, b.Data = nil, nil
	return reflect.DeepEqual(a, b)
}

func TestPubSubEveryListenerReceivesEverythingInItsOrderWithoutWaiting(t *testing.T) {
	t.Parallel()
	for name, client := range map[string]func() redis.UniversalClient{
		"redis-server": func() redis.UniversalClient { rdb, _ := testenv.Redis(t); return rdb },
		"in process": func() redis.UniversalClient {
			addr, stop, err := local.StartMiniredis()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(stop)
			rdb := connect.Redis([]string{addr}, "")
			t.Cleanup(func() { rdb.Close() })
			return rdb
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := NewRedisPubSub(client(), slog.New(slog.DiscardHandler))
			one, two := mustListen(t, b), mustListen(t, b)
			mustReceive(t, one, nil)
			for range 20 {
				published := events(500)
				mustPublish(t, b, published)
				for received := 0; received < 500; { // none would mean that there is no more
					got, err := one.Receive(t.Context(), 1000, 0)
					if err != nil || len(got) == 0 {
						t.Fatalf("received %d and then %d events, %v", received, len(got), err)
					}
					received += len(got)
				}
				mustReceive(t, two, published)
			}
		})
	}
}

func TestPubSubAReceiverThatWaitsIsWokenByAnEventAndByItsContext(t *testing.T) {
	t.Parallel()
	b, _, _ := newPubSub(t)
	l := mustListen(t, b)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var deliveries []Delivery
	var err error
	receive := func() (done chan struct{}) {
		done = make(chan struct{})
		go func() { defer close(done); deliveries, err = l.Receive(ctx, 10, time.Hour) }()
		return done
	}
	received := receive()
	mustPublish(t, b, events(1))
	<-received
	if err != nil || len(deliveries) != 1 {
		t.Fatal(deliveries, err)
	}
	received = receive()
	cancel()
	<-received
	if err != nil || len(deliveries) != 0 {
		t.Error(deliveries, err)
	}
}

func TestPubSubAReceiverTakesNoMoreThanItsLimit(t *testing.T) {
	t.Parallel()
	b, _, _ := newPubSub(t)
	l := mustListen(t, b)
	published := events(5)
	mustPublish(t, b, published)
	l.catchUp(t.Context())
	if got, err := l.Receive(t.Context(), 2, 0); err != nil || len(got) != 2 {
		t.Fatal(got, err)
	}
	mustReceive(t, l, published[2:])
}

func TestPubSubWhatIsGivenBackIsReceivedAgainAndWhatIsAcknowledgedIsNot(t *testing.T) {
	t.Parallel()
	b, _, _ := newPubSub(t)
	l := mustListen(t, b)
	published := events(3)
	mustPublish(t, b, published)
	l.catchUp(t.Context())
	got, err := l.Receive(t.Context(), 10, 0)
	if err != nil || len(got) != 3 {
		t.Fatal(got, err)
	}
	if err := l.Ack(t.Context(), []string{got[1].Tag}); err != nil {
		t.Fatal(err)
	}
	if err := l.Release(t.Context(), got); err != nil {
		t.Fatal(err)
	}
	mustReceive(t, l, []Event{published[0], published[2]})
}

func TestPubSubWhatIsPublishedWhileNobodyListensIsAcceptedLostAndSaidOnce(t *testing.T) {
	t.Parallel()
	b, _, log := newPubSub(t)
	mustPublish(t, b, events(2))
	mustPublish(t, b, events(3))
	log.says(t, "Nobody listens", 1)
	l := mustListen(t, b)
	for range 2 {
		heard := events(1)
		mustPublish(t, b, heard)
		mustReceive(t, l, heard)
	}
	log.says(t, "Nobody listens", 1)
	log.says(t, "channel=orders.events events=5", 1)
}

func TestPubSubWhatThereIsNoRoomForIsDroppedAndSaidOnce(t *testing.T) {
	t.Parallel()
	b, _, log := newPubSub(t)
	b.room = 2
	l := mustListen(t, b)
	published := events(6)
	mustPublish(t, b, published)
	mustReceive(t, l, published[:2])
	log.says(t, "The consumer is too slow", 1)
	log.says(t, "The consumer has caught up", 0)
	for range 2 {
		again := events(1)
		mustPublish(t, b, again)
		mustReceive(t, l, again)
	}
	log.says(t, "The consumer is too slow", 1)
	log.says(t, "events=4", 1)
}

func TestPubSubAnEventThatCannotBeEncodedIsRefusedAloneAndWhatIsNotAnEventIsTold(t *testing.T) {
	t.Parallel()
	b, _, _ := newPubSub(t)
	l := mustListen(t, b)
	published := events(3)
	published[1].Data = json.RawMessage("{")
	var refused *RefusedError
	if err := b.Publish(t.Context(), AnyEpoch, published); !errors.As(err, &refused) || len(refused.Events) != 1 || refused.Events[1] == nil {
		t.Fatalf("publishing says %v", err)
	}
	mustReceive(t, l, []Event{published[0], published[2]})
	valid, err := encode(published[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, message := range []string{
		"", "x", "[]", `{"data":{}}`, strings.Replace(valid, `"specversion":"1.0"`, `"specversion":"0.3"`, 1), valid[:strings.Index(valid, `,"data"`)] + "}",
	} {
		if err := b.redis.Publish(t.Context(), Channel, message).Err(); err != nil {
			t.Fatal(err)
		}
		if got, err := l.Receive(t.Context(), 10, time.Minute); err != nil || len(got) != 1 || got[0].Err == nil || got[0].Event.ID != uuid.Nil {
			t.Errorf("%s: received %+v, %v", message, got, err)
		}
	}
}

func TestPubSubAListenerSurvivesItsRedisAndSaysWhatItMayHaveMissed(t *testing.T) {
	t.Parallel()
	b, server, log := newPubSub(t)
	l := mustListen(t, b)
	for round := range 2 {
		server.Kill()
		if err := b.Publish(t.Context(), AnyEpoch, events(1)); err == nil {
			t.Fatal("published without a Redis")
		}
		server.Start()
		untilHeard(t, b, l)
		log.says(t, "The line to Redis was cut", round+1)
	}
}

// untilHeard publishes until the listener receives.
func untilHeard(t testing.TB, b *RedisPubSub, l *RedisListener) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		mustPublish(t, b, events(1))
		if got, err := l.Receive(t.Context(), 10, 10*time.Millisecond); err != nil || len(got) > 0 {
			if err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatal("the listener does not come back")
}

func TestPubSubALineThatIsSilentIsGivenUp(t *testing.T) {
	t.Parallel()
	b, server, log := newPubSub(t)
	b.silence = 300 * time.Millisecond
	l := mustListen(t, b)
	if err := syscall.Kill(server.Pid(), syscall.SIGSTOP); err != nil { // every connection stays open, and nothing comes back
		t.Fatal(err)
	}
	defer syscall.Kill(server.Pid(), syscall.SIGCONT)
	for deadline := time.Now().Add(20 * time.Second); log.count("Listening to Redis fails") == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the listener does not notice")
		}
	}
	if err := syscall.Kill(server.Pid(), syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	untilHeard(t, b, l)
	log.says(t, "Listening to Redis fails", 1)
}

func TestPubSubAListenerEndsWithItsClient(t *testing.T) {
	t.Parallel()
	b, _, log := newPubSub(t)
	l := mustListen(t, b)
	published := events(2)
	mustPublish(t, b, published)
	l.catchUp(t.Context())
	if err := b.redis.Close(); err != nil {
		t.Fatal(err)
	}
	<-l.ended
	if got, err := l.Receive(t.Context(), 10, time.Hour); err != nil || len(got) != 2 {
		t.Errorf("what was received before is now %v, %v", got, err)
	}
	if _, err := l.Receive(t.Context(), 10, time.Hour); !errors.Is(err, redis.ErrClosed) {
		t.Errorf("received after the end: %v", err)
	}
	log.says(t, "line to Redis", 0)
	if _, err := b.Subscribe(t.Context()); !errors.Is(err, redis.ErrClosed) || !strings.Contains(err.Error(), Channel) {
		t.Errorf("a closed client listens: %v", err)
	}
}
