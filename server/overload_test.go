package server

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"idempotent-orders/gen/api"
	"idempotent-orders/idempotency"
	"idempotent-orders/lua"
	"idempotent-orders/order"
)

func TestOneCallerDoesNotFillTheRoomForOthers(t *testing.T) {
	t.Parallel()
	r := newRoom(2, slog.New(slog.DiscardHandler))
	for _, send := range []struct {
		caller string
		enters bool
	}{{"flood", true}, {"flood", true}, {"flood", false}, {"quiet", true}, {"flood", false}, {"other", true}, {"quiet", false}} {
		if err := r.enter(t.Context(), send.caller); (err == nil) != send.enters || err != nil && !errors.Is(err, errCrowded) {
			t.Errorf("%v: %v", send, err)
		}
	}
	r.leave("flood")
	for _, caller := range []string{"flood", "quiet"} { // whoever comes first
		if err := r.enter(t.Context(), caller); (err == nil) != (caller == "flood") {
			t.Errorf("%s: %v", caller, err)
		}
	}
	for _, caller := range []string{"flood", "flood", "quiet", "other"} {
		r.leave(caller)
	}
	if r.underWay.Load() != 0 || r.guest("flood").underWay.Load() != 0 {
		t.Errorf("an empty room has %d, %d", r.underWay.Load(), r.guest("flood").underWay.Load())
	}
}

func TestOneTooManyIsRefusedAtOnceAndAllOthersAreAnswered(t *testing.T) {
	t.Parallel()
	plain := newAPI(t)
	const has, tooMany = 8, 20
	api := serveAPI(t, Config{Pool: plain.pool, Redis: plain.redis, Room: has}, plain.server)
	before := api.place("before", "").placed(t)
	release := api.holdPlacing()
	answers := make(chan reply, has+tooMany)
	for i := range has + tooMany {
		go func() {
			got, err := api.try("POST", "/orders", headers(fmt.Sprint("k-", i), ""), nil)
			if err != nil {
				t.Error(err)
			}
			answers <- got
		}()
	}
	for range tooMany { // which are answered while all others wait
		got := <-answers
		if got.problem(t, 503, "unavailable"); !strings.Contains(got.body, "not begun") {
			t.Errorf("refused with %v", got)
		}
	}
	api.do("GET", "/orders/"+before.String(), nil, nil).problem(t, 503, "unavailable")
	if again := api.place("before", "").placed(t); again != before { // it costs nothing
		t.Errorf("a replay is %s; want %s", again, before)
	}
	if got := api.do("GET", "/readyz", nil, nil); got.status != 200 { // crowded is not broken
		t.Errorf("/readyz: %d", got.status)
	}
	release()
	for range has {
		(<-answers).placed(t)
	}
	api.place("after", "").placed(t)
	api.expectRows(1 + has + 1)
}

func TestWhoWaitsForAnotherSendKeepsNobodyOut(t *testing.T) {
	t.Parallel()
	plain := newAPI(t)
	api := serveAPI(t, Config{Pool: plain.pool, Redis: plain.redis, Room: 2}, plain.server)
	hold := func(key string) { // as another server does that is at work on it, or died
		guard := idempotency.Key{Caller: anonymous, Operation: order.Operation, Value: key}.Digest()
		place := "idempotency:" + base64.RawURLEncoding.EncodeToString(guard[:])
		if err := lua.Reserve.Run(t.Context(), api.redis, []string{place}, "another", time.Minute.Milliseconds()).Err(); err != nil {
			t.Fatal(err)
		}
	}
	hold("held")
	patient := make(chan reply, 2)
	for range 2 {
		go func() {
			for {
				got, err := api.try("POST", "/orders", headers("held", "", "Prefer", "wait=10"), nil)
				if err != nil {
					t.Error(err)
				}
				if got.status == 503 { // the question below was in its place
					continue
				}
				patient <- got
				return
			}
		}()
	}
	api.eventually("the patient fill their room", func() bool {
		return api.place("held", "", "Prefer", "wait=1").status == 503
	})
	api.place("k", "").placed(t)
	api.stop() // and lets them go
	for range 2 {
		(<-patient).problem(t, 409, "request-in-progress")
	}
}

func TestSlowBodiesKeepNobodyOut(t *testing.T) {
	t.Parallel()
	plain := newAPI(t)
	api := serveAPI(t, Config{Pool: plain.pool, Redis: plain.redis, Room: 4}, plain.server)
	for range 1000 {
		fmt.Fprint(api.dial(), "POST /orders HTTP/1.1\r\nHost: x\r\nIdempotency-Key: slow\r\nContent-Type: application/json\r\n"+
			"Content-Length: 20\r\n\r\n{")
	}
	for i := range 20 {
		api.place(fmt.Sprint("k-", i), "").placed(t)
	}
	api.expectRows(20)
}

func TestIdleConnectionsAreKept(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	idle := make([]*wire, 1000)
	for i := range idle {
		idle[i] = api.dial()
		idle[i].place("k")
	}
	api.place("another", "").placed(t)
	for _, conn := range idle {
		if got, closes := conn.place("k"); got.status != 200 || closes {
			t.Fatalf("on a connection that was idle: %v, closes %t", got, closes)
		}
	}
}

func TestAConnectionTooManyIsRefusedUntilAnotherCloses(t *testing.T) {
	t.Parallel()
	open := newConns(2, slog.New(slog.DiscardHandler))
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) }))
	server.Config.ConnState = open.note
	server.Start()
	t.Cleanup(server.Close)
	dial := (&testAPI{t: t, url: server.URL}).dial
	first, second := dial(), dial()
	first.place("k")
	second.place("k")
	got, closes := dial().read()
	if !closes || got.header.Get("Retry-After") == "" || got.header.Get("Content-Type") != "application/problem+json" {
		t.Errorf("the third is answered %v", got)
	}
	var problem api.Problem
	if err := json.Unmarshal([]byte(got.body), &problem); err != nil || got.status != 503 || problem.Type != "/problems/unavailable" {
		t.Errorf("the third is answered %v, %v", got, err)
	}
	if got, _ := first.place("k"); got.status != 200 {
		t.Errorf("the first is answered %v", got)
	}
	second.Close()
	for deadline := time.Now().Add(time.Minute); ; {
		n := open.open.Load()
		if n == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d are open", n)
		}
		runtime.Gosched()
	}
	if got, _ := dial().place("k"); got.status != 200 {
		t.Errorf("when one has closed: %v", got)
	}
}

func TestConnectionsLeaveFilesForTheRest(t *testing.T) {
	t.Parallel()
	for files, want := range map[uint64]int{1 << 20: maxConns, 1<<64 - 1: maxConns, 1024: 824, 100: 1} {
		if got := connLimit(files, slog.New(slog.DiscardHandler)); got != want {
			t.Errorf("of %d files %d are connections; want %d", files, got, want)
		}
	}
}
