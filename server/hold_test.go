package server

import (
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"time"
)

// holdsLong makes whoever is held from now on wait for minutes, as where callers wait in many lines.
func (a *testAPI) holdsLong() {
	const minutes = 2
	a.holds.longest = time.Hour
	a.holds.lines.Store(minutes * 60 * refusals)
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
	api.holdsLong()
	before := api.holds.lines.Load()
	for range 3 {
		conn := api.dial()
		got, _ := conn.place("k")
		got.problem(t, 503, "unavailable")
		if n := api.holds.lines.Load() - before; n != 1 {
			t.Errorf("there are %d lines; want one", n)
		}
		conn.Close()
		api.eventually("the connection is let go", func() bool { return api.holds.lines.Load() == before })
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
	api.holdsLong()
	before := api.holds.lines.Load()
	fmt.Fprint(conn, "POST /orders HTTP/1.1\r\nHost: x\r\nIdempotency-Key: k\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
	got, closes := conn.read()
	if got.problem(t, 429, "too-many-requests"); closes || api.holds.lines.Load() != before+1 {
		t.Errorf("closes %t, there are %d lines; want one", closes, api.holds.lines.Load()-before)
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

func TestACallerDoesNotWaitForAnothersFlood(t *testing.T) {
	t.Parallel()
	log := slog.New(slog.DiscardHandler)
	h, r := holds{longest: longestHold}, newRoom(1, log)
	refused := func(caller string) *line {
		for {
			if err := r.enter(t.Context(), caller); err != nil {
				return err.(*refusal).line
			}
		}
	}
	flood, quiet := refused("floods"), refused("behaves")
	for range 8000 {
		h.join(flood)
	}
	if got := h.join(quiet); got > time.Millisecond {
		t.Errorf("beside a flood of 8,000 connections one that was refused is held for %s", got)
	}
	if got := h.join(flood); got < 4*time.Second {
		t.Errorf("one of a flood of 8,000 connections is held for %s", got)
	}
	for range 8001 {
		h.leave(flood)
	}
	if h.leave(quiet); h.lines.Load() != 0 {
		t.Errorf("nobody is held, and there are %d lines", h.lines.Load())
	}
}

func TestHoweverManyAreHeldTheySendNoMoreThanCanBeRefused(t *testing.T) {
	t.Parallel()
	for name, is := range map[string]struct {
		held []int // in each line
		most float64
	}{
		"one": {[]int{1}, refusals}, "a flood": {[]int{4000}, refusals}, "all one flood": {[]int{maxConns}, refusals},
		"two floods": {[]int{4000, 400}, refusals}, "many callers": {slices.Repeat([]int{1}, 1000), refusals},
		// Who has thousands would wait for longer than any may.
		"a flood beside others":    {[]int{8000, 1, 1, 1}, 2 * refusals},
		"a flood beside many more": {append(slices.Repeat([]int{1}, maxConns/2), maxConns/2), 2 * refusals},
	} {
		h, lines := holds{longest: longestHold}, make([]line, len(is.held))
		for i, n := range is.held {
			for range n {
				h.join(&lines[i])
			}
		}
		again := 0.0
		for i, n := range is.held {
			h.leave(&lines[i])
			again += float64(n) / h.join(&lines[i]).Seconds() // as each of them does that is refused again
		}
		if again > is.most*1.001 {
			t.Errorf("%s: they send %.0f requests a second; want %.0f", name, again, is.most)
		}
	}
}

func TestALineMayBeSlowerThanItsShareForUpToASecond(t *testing.T) {
	t.Parallel()
	for name, is := range map[string]struct {
		pace        time.Duration
		connections int
		held        time.Duration
	}{
		"no pace":                {0, 20, 10 * time.Millisecond},
		"one, at a high rate":    {4 * time.Millisecond, 1, 4 * time.Millisecond},
		"many, at a high rate":   {4 * time.Millisecond, 200, 800 * time.Millisecond},
		"one, at a low rate":     {4 * time.Hour, 1, time.Second},
		"more than can be read":  {4 * time.Millisecond, 4000, 2 * time.Second},
		"a pace above the share": {time.Microsecond, 20, 10 * time.Millisecond},
	} {
		h, l := holds{longest: longestHold}, line{pace: is.pace}
		held := time.Duration(0)
		for range is.connections {
			held = h.join(&l)
		}
		if held != is.held {
			t.Errorf("%s: held for %s; want %s", name, held, is.held)
		}
	}
}
