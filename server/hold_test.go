package server

import (
	"fmt"
	"log/slog"
	"testing"
	"time"
)

// holdsLong makes whoever is held from now on wait for minutes, as where many are, and returns how many are held.
func (a *testAPI) holdsLong() int64 {
	const minutes = 2
	a.holds.held.Store(minutes * 60 * refusals)
	return a.holds.held.Load()
}

// crowd fills the room of one caller with an order that is under way until the returned function is called.
func (a *testAPI) crowd(more ...string) (release func()) {
	a.t.Helper()
	place := a.holdPlacing()
	placed := make(chan reply, 1)
	go func() {
		got, err := a.try("POST", "/orders", headers("first", "", more...), nil)
		if err != nil {
			a.t.Error(err)
		}
		placed <- got
	}()
	a.eventuallyRuns("PlaceOrders")
	return func() {
		a.t.Helper()
		place()
		(<-placed).placed(a.t)
	}
}

func TestWhoIsRefusedAndSendsAgainAtOnceWaits(t *testing.T) {
	t.Parallel()
	plain := newAPI(t)
	api := serveAPI(t, Config{Pool: plain.pool, Redis: plain.redis, Room: 1, DrainTimeout: 20 * time.Second}, plain.server)
	release := api.crowd()
	api.holdsLong()
	held := api.dial()
	got, closes := held.place("held") // at once, or the connection's deadline would have passed
	if got.problem(t, 503, "unavailable"); closes || got.header.Get("Retry-After") != "121" {
		t.Errorf("refused with %v, closes %t", got.header, closes)
	}
	release()
	held.send("held")
	other := api.dial()
	got, _ = other.place("other") // which was sent later
	got.placed(t)
	other.Close()
	api.client.CloseIdleConnections() // else the server waits for it
	api.expectRows(2)

	go api.stop()
	got, closes = held.read() // who is held learns that the server stops
	if got.placed(t); !closes {
		t.Error("the connection ends, and the answer does not say so")
	}
	api.stop()
	api.expectRows(3)
}

func TestWhoLeavesIsHeldNoLonger(t *testing.T) {
	t.Parallel()
	plain := newAPI(t)
	api := serveAPI(t, Config{Pool: plain.pool, Redis: plain.redis, Room: 1}, plain.server)
	defer api.crowd()()
	before := api.holdsLong()
	for range 3 {
		conn := api.dial()
		got, _ := conn.place("k")
		got.problem(t, 503, "unavailable")
		if n := api.holds.held.Load(); n != before+1 {
			t.Errorf("%d are held; want %d", n, before+1)
		}
		conn.Close()
		api.eventually("the connection is let go", func() bool { return api.holds.held.Load() == before })
	}
}

func TestAConnectionThatTwoCallersHaveUsedIsNotHeld(t *testing.T) {
	t.Parallel()
	plain := newAPI(t)
	api := serveAPI(t, Config{Pool: plain.pool, Redis: plain.redis, Room: 1, Callers: twoCallers()}, plain.server)
	defer api.crowd("Authorization", asAlice)()
	api.holdsLong()
	proxy := api.dial()
	as := func(authorization string) reply {
		fmt.Fprintf(proxy, "POST /orders HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nIdempotency-Key: k\r\nContent-Length: 0\r\n\r\n", authorization)
		got, closes := proxy.read()
		if closes {
			t.Error("it is closed")
		}
		return got
	}
	// Bob sends on it, too.
	fmt.Fprintf(proxy, "GET /orders/00000000-0000-0000-0000-000000000000 HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\n\r\n", asBob)
	got, _ := proxy.read()
	got.problem(t, 404, "not-found")
	for range 3 {
		as(asAlice).problem(t, 503, "unavailable")
	}
}

func TestWhoIsOverTheRateAndSendsAgainAtOnceWaits(t *testing.T) {
	t.Parallel()
	plain := newAPI(t)
	api := serveAPI(t, Config{Pool: plain.pool, Redis: plain.redis, Rates: NewRates(plain.redis, 1, time.Hour, slog.New(slog.DiscardHandler))}, plain.server)
	conn := api.dial()
	got, _ := conn.place("k")
	got.placed(t)
	before := api.holdsLong()
	fmt.Fprint(conn, "POST /orders HTTP/1.1\r\nHost: x\r\nIdempotency-Key: k\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
	got, closes := conn.read()
	if got.problem(t, 429, "too-many-requests"); closes || api.holds.held.Load() != before+1 {
		t.Errorf("closes %t, %d are held; want %d", closes, api.holds.held.Load(), before+1)
	}
}

func TestAConnectionThatEndsIsNotHeld(t *testing.T) {
	t.Parallel()
	plain := newAPI(t)
	rates := NewRates(plain.redis, 1, time.Hour, slog.New(slog.DiscardHandler))
	rated := serveAPI(t, Config{Pool: plain.pool, Redis: plain.redis, Rates: rates, ReadTimeout: time.Second}, plain.server)
	rated.place("k", "").placed(t)
	crowded := serveAPI(t, Config{Pool: plain.pool, Redis: plain.redis, Room: 1}, plain.server)
	defer crowded.crowd()()
	for name, send := range map[string]struct {
		api     *testAPI
		request string
		status  int
		problem string
	}{
		"HTTP/1.0":                {crowded, "POST /orders HTTP/1.0\r\nIdempotency-Key: k\r\n\r\n", 503, "unavailable"},
		"the client ends it":      {crowded, "POST /orders HTTP/1.1\r\nHost: x\r\nIdempotency-Key: k\r\nConnection: close\r\n\r\n", 503, "unavailable"},
		"the client asks first":   {rated, "POST /orders HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n", 429, "too-many-requests"},
		"the body does not come":  {rated, "POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{", 429, "too-many-requests"},
		"nobody knows its length": {rated, "POST /orders HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", 429, "too-many-requests"},
	} {
		send.api.holdsLong()
		conn := send.api.dial()
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		fmt.Fprint(conn, send.request)
		got, closes := conn.read()
		if got.problem(t, send.status, send.problem); !closes {
			t.Errorf("%s: it is not closed", name)
		}
		conn.closed()
	}
}
