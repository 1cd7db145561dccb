package idempotency

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"idempotent-orders/internal/connect"
	"idempotent-orders/internal/testenv"
	"idempotent-orders/lua"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

var (
	testKey   = Key{Caller: "anonymous", Operation: "PlaceOrder", Value: "k"}
	testPlace = placeOf(testKey)
)

func newGuard(t *testing.T, rdb redis.UniversalClient) *Guard {
	return NewGuard(rdb, time.Hour, slog.New(slog.DiscardHandler))
}

func TestAKeyIsReservedByOneHolderUntilItLetsGo(t *testing.T) {
	t.Parallel()
	rdb, _ := testenv.Redis(t)
	g := newGuard(t, rdb)

	expect(t, "the first holder", g.reserve(testPlace, "one"), reserved)
	expect(t, "another holder", g.reserve(testPlace, "two"), inProgress)
	expect(t, "the first again, as when its reply was lost", g.reserve(testPlace, "one"), reserved)

	g.release(testPlace, "two")
	expect(t, "after a release by who has it not", g.reserve(testPlace, "two"), inProgress)
	complete(t, g, testKey, "two")
	expect(t, "after a complete by who has it not", g.reserve(testPlace, "two"), inProgress)

	g.release(testPlace, "one")
	expect(t, "after the holder's release", g.reserve(testPlace, "two"), reserved)
	complete(t, g, testKey, "two")
	expect(t, "after the holder's complete", g.reserve(testPlace, "three"), completed)
	g.release(testPlace, "two")
	expect(t, "after a late release", g.reserve(testPlace, "three"), completed)
}

func complete(t *testing.T, g *Guard, key Key, token string) {
	t.Helper()
	if _, err := g.calls.Do(g.completion(placeOf(key), token)); err != nil {
		t.Fatal(err)
	}
}

func TestReservationsAndMarksHaveClocksOfTheirOwn(t *testing.T) {
	t.Parallel()
	rdb, _ := testenv.Redis(t)
	g, ctx := newGuard(t, rdb), t.Context()

	g.reserve(testPlace, "one")
	if left := rdb.PTTL(ctx, placeOf(testKey)).Val(); left <= 0 || left > reservationLasts {
		t.Errorf("the reservation lasts %s; want at most %s", left, reservationLasts)
	}
	complete(t, g, testKey, "one")
	if left := rdb.PTTL(ctx, placeOf(testKey)).Val(); left <= reservationLasts || left > time.Hour {
		t.Errorf("the mark lasts %s; want the retention of an hour", left)
	}
}

func TestAReservationWithoutAnEndIsGivenOne(t *testing.T) {
	t.Parallel()
	rdb, _ := testenv.Redis(t)
	g, ctx := newGuard(t, rdb), t.Context()
	for _, expiry := range []time.Duration{0, 100 * time.Hour} {
		rdb.Set(ctx, placeOf(testKey), "held:nobody", expiry)
		expect(t, "a reservation of nobody", g.reserve(testPlace, "one"), inProgress)
		if left := rdb.PTTL(ctx, placeOf(testKey)).Val(); left <= 0 || left > reservationLasts {
			t.Errorf("it lasts another %s; want at most %s", left, reservationLasts)
		}
	}
}

func TestWhatIsNotAReservationKeepsNobodyOut(t *testing.T) {
	t.Parallel()
	rdb, _ := testenv.Redis(t)
	g, ctx := newGuard(t, rdb), t.Context()
	rdb.Set(ctx, placeOf(testKey), "garbage", 0)
	expect(t, "over garbage", g.reserve(testPlace, "one"), reserved)
	rdb.Del(ctx, placeOf(testKey))
	rdb.LPush(ctx, placeOf(testKey), "a list")
	for range 2 * breakerTrips {
		expect(t, "over a list", g.reserve(testPlace, "one"), unknown)
	}
	other := Key{Caller: "anonymous", Operation: "PlaceOrder", Value: "other"}
	expect(t, "another key: an error reply is a sign of life", g.reserve(placeOf(other), "one"), reserved)
}

func TestLostScriptsAreSentAgain(t *testing.T) {
	t.Parallel()
	rdb, _ := testenv.Redis(t)
	g, ctx := newGuard(t, rdb), t.Context()
	for i := range 3 {
		if err := rdb.ScriptFlush(ctx).Err(); err != nil {
			t.Fatal(err)
		}
		expect(t, "reserving after SCRIPT FLUSH", g.reserve(testPlace, fmt.Sprint(i)), reserved)
		rdb.ScriptFlush(ctx)
		g.release(testPlace, fmt.Sprint(i))
	}
}

func TestABatchIsReservedInOneGo(t *testing.T) {
	t.Parallel()
	rdb, _ := testenv.Redis(t)
	g, ctx := newGuard(t, rdb), t.Context()
	held := Key{Caller: "anonymous", Operation: "PlaceOrder", Value: "held"}
	g.reserve(placeOf(held), "another")
	rdb.LPush(ctx, placeOf(Key{Value: "list"}), "a list")
	calls := make([]call, 0, 4)
	for _, key := range []Key{testKey, held, {Value: "list"}, testKey} {
		calls = append(calls, call{lua.Reserve, placeOf(key), []any{"one", 1000}})
	}
	replies := g.exchange(calls)
	for i, want := range []state{reserved, inProgress, "", reserved} {
		if expect(t, fmt.Sprintf("call %d", i), state(replies[i].text), want); (replies[i].err != nil) != (want == "") {
			t.Errorf("call %d got error %v", i, replies[i].err)
		}
	}
}

func TestKeysOfOtherScopesNeverMeet(t *testing.T) {
	places := map[string]Key{}
	for _, k := range []Key{
		{"a", "b", "c"}, {"a", "c", "b"}, {"b", "a", "c"}, {"ab", "", "c"}, {"", "ab", "c"}, {"a", "b", "d"}, {"a", "bc", ""},
	} {
		if other, taken := places[placeOf(k)]; taken {
			t.Errorf("%v and %v meet", k, other)
		}
		places[placeOf(k)] = k
	}
}

func TestWithoutRedisEverythingGoesStraightToPlace(t *testing.T) {
	t.Parallel()
	rdb := connect.Redis([]string{"127.0.0.1:1"}, "") // nothing listens there
	defer rdb.Close()
	g := newGuard(t, rdb)
	for range 100 {
		got, err := Once(t.Context(), done(t), g, Send[string]{
			Key:   testKey,
			Find:  func() (string, error) { t.Error("looked up"); return "", nil },
			Place: func() (string, error) { return "placed", nil },
		})
		if got != "placed" || err != nil {
			t.Fatal(got, err)
		}
	}
}

func TestTheBreakerOpensAndClosesAgain(t *testing.T) {
	t.Parallel()
	rdb, server := testenv.Redis(t)
	g := newGuard(t, rdb)
	server.Kill()
	for range 2 * breakerTrips {
		expect(t, "without Redis", g.reserve(testPlace, "one"), unknown)
	}
	if g.breaker.State().String() != "open" {
		t.Fatalf("the breaker is %s after %d failures", g.breaker.State(), 2*breakerTrips)
	}
	server.Start()
	deadline := time.Now().Add(20 * time.Second)
	for g.reserve(testPlace, "one") != reserved {
		if time.Now().After(deadline) {
			t.Fatal("the breaker stays open though Redis is back")
		}
	}
}

// What a send is answered, for each thing that Redis may say and PostgreSQL may know.
func TestOnceTellsWhatPostgreSQLDecides(t *testing.T) {
	t.Parallel()
	errBroken := errors.New("broken")
	for _, test := range []struct {
		name   string
		redis  string // what stands under the key
		find   error
		place  error
		want   string
		err    error
		remain string // what stands under the key afterwards; "held" for this send's reservation
	}{
		{name: "fresh", want: "placed", remain: "completed"},
		{name: "fresh, but another was committed", place: ErrMismatch, err: ErrMismatch, remain: "completed"},
		{name: "fresh, and placing fails", place: errBroken, err: errBroken, remain: ""},
		{name: "fresh, and the commit is unknown", place: ErrOutcomeUnknown, err: ErrOutcomeUnknown, remain: "held"},
		{name: "completed", redis: "completed", want: "found", remain: "completed"},
		{name: "completed with another fingerprint", redis: "completed", find: ErrMismatch, err: ErrMismatch, remain: "completed"},
		{name: "completed, says Redis alone", redis: "completed", find: ErrNotCommitted, want: "placed", remain: "completed"},
		{name: "completed, and PostgreSQL is away", redis: "completed", find: errBroken, err: errBroken, remain: "completed"},
		{name: "in progress", redis: "held:other", find: ErrNotCommitted, err: ErrInProgress, remain: "held:other"},
		{name: "in progress, says Redis alone", redis: "held:other", want: "found", remain: "held:other"},
		{name: "in progress with another fingerprint", redis: "held:other", find: ErrMismatch, err: ErrMismatch, remain: "held:other"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			rdb, _ := testenv.Redis(t)
			ctx := t.Context()
			if test.redis != "" {
				rdb.Set(ctx, placeOf(testKey), test.redis, time.Minute)
			}
			g := newGuard(t, rdb)
			got, err := Once(ctx, done(t), g, Send[string]{
				Key:   testKey,
				Find:  func() (string, error) { return "found", test.find },
				Place: func() (string, error) { return "placed", test.place },
			})
			if !errors.Is(err, test.err) || err == nil && got != test.want {
				t.Errorf("got %q, %v; want %q, %v", got, err, test.want, test.err)
			}
			var remains string
			for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); { // completing rides behind the answer
				remains = rdb.Get(ctx, placeOf(testKey)).Val()
				if remains == test.remain || test.remain == "held" && strings.HasPrefix(remains, "held:"+g.name) {
					return
				}
			}
			t.Errorf("Redis holds %q; want %q", remains, test.remain)
		})
	}
}

func TestAPatientSendGetsTheOthersAnswer(t *testing.T) {
	t.Parallel()
	rdb, _ := testenv.Redis(t)
	g := newGuard(t, rdb)
	patience, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	g.reserve(testPlace, "other")
	looked := make(chan struct{}, 100)
	answer := make(chan string)
	go func() {
		committed := false
		got, err := Once(t.Context(), patience, g, Send[string]{
			Key: testKey,
			Find: func() (string, error) {
				if !committed {
					committed = true
					looked <- struct{}{}
					return "", ErrNotCommitted
				}
				return "found", nil
			},
			Place: func() (string, error) { return "placed twice", nil },
		})
		answer <- fmt.Sprint(got, err)
	}()
	<-looked // it has seen that the other is at work
	complete(t, g, testKey, "other")
	if got := <-answer; got != "found<nil>" {
		t.Errorf("the patient send got %s", got)
	}
}

func TestAPatientSendPlacesWhenTheOtherGivesUp(t *testing.T) {
	t.Parallel()
	rdb, _ := testenv.Redis(t)
	g := newGuard(t, rdb)
	patience, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	g.reserve(testPlace, "other")
	got, err := Once(t.Context(), patience, g, Send[string]{
		Key: testKey,
		Find: func() (string, error) {
			g.release(testPlace, "other")
			return "", ErrNotCommitted
		},
		Place: func() (string, error) { return "placed", nil },
	})
	if got != "placed" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
}

// done returns the patience of a send that does not wait.
func done(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

func expect(t *testing.T, what string, got, want state) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %q; want %q", what, got, want)
	}
}
