package server

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"idempotent-orders/internal/testenv"
)

// rated serves the stores of an API to alice and bob, at so many requests a minute each.
func (a *testAPI) rated(perMinute int) *testAPI {
	a.t.Helper()
	log := slog.New(slog.DiscardHandler)
	return serveAPI(a.t, Config{
		Pool: a.pool, Redis: a.redis, Callers: twoCallers(), Rates: NewRates(a.redis, perMinute, time.Minute, log),
	}, a.server)
}

func TestACallerOverTheRateIsRefusedOnEveryServerAndOthersAreNot(t *testing.T) {
	t.Parallel()
	plain := newAPI(t)
	servers := []*testAPI{plain.rated(10), plain.rated(10)}
	for i := range 10 {
		servers[i%2].place("k", "", "Authorization", asAlice).placed(t) // nine are replays, and count
	}
	for _, api := range servers {
		refused := api.place("new", "", "Authorization", asAlice)
		refused.problem(t, 429, "too-many-requests")
		if seconds, err := strconv.Atoi(refused.header.Get("Retry-After")); err != nil || seconds < 1 || seconds > 6 {
			t.Errorf("Retry-After is %q; want up to the six seconds that one request takes", refused.header.Get("Retry-After"))
		}
		id := "00000000-0000-0000-0000-000000000000"
		api.do("GET", "/orders/"+id, http.Header{"Authorization": {asAlice}}, nil).problem(t, 429, "too-many-requests")
		api.place("b", "", "Authorization", asBob).placed(t)
		api.place("new", "").problem(t, 401, "unauthorized") // and is not counted
		if got := api.do("GET", "/livez", nil, nil); got.status != 200 {
			t.Errorf("/livez: %d", got.status)
		}
	}
	plain.expectRows(2)
}

func TestWithoutRedisEachServerKeepsTheRateItself(t *testing.T) {
	t.Parallel()
	plain := newAPI(t)
	api := plain.rated(5)
	api.server.Kill()
	for range 5 {
		api.place("k", "", "Authorization", asAlice).placed(t)
	}
	api.place("k", "", "Authorization", asAlice).problem(t, 429, "too-many-requests")
	api.place("b", "", "Authorization", asBob).placed(t)
}

// A flood beyond the rate must not be a flood of Redis.
func TestACallerOverTheRateCostsRedisNothing(t *testing.T) {
	t.Parallel()
	rdb, _ := testenv.Redis(t)
	rates := NewRates(rdb, 100, time.Hour, slog.New(slog.DiscardHandler))
	for i := range 100 {
		if err := rates.refusal(t.Context(), "alice"); err != nil {
			t.Fatalf("request %d: %v", i, err)
		}
	}
	before := rdb.Info(t.Context(), "commandstats").Val()
	for range 1000 {
		if rates.refusal(t.Context(), "alice") == nil {
			t.Fatal("allowed")
		}
	}
	evals := func(info string) string { return infoField(info, "cmdstat_evalsha") }
	after := rdb.Info(t.Context(), "commandstats").Val()
	if callsOf(t, evals(after))-callsOf(t, evals(before)) > 1 {
		t.Errorf("Redis was asked: %s, then %s", evals(before), evals(after))
	}
	if calls := callsOf(t, evals(after)); calls > 25 {
		t.Errorf("a hundred requests and a flood took %d calls; want a twentieth of the burst at once", calls)
	}
}

func TestEachCallerOverTheRateHasALineOfItsOwnReadAtAQuarterOfIt(t *testing.T) {
	t.Parallel()
	rdb, _ := testenv.Redis(t)
	rates := NewRates(rdb, 1, time.Minute, slog.New(slog.DiscardHandler))
	lines := map[*line]bool{}
	for _, caller := range []string{"alice", "bob", "alice"} {
		err := rates.refusal(t.Context(), caller)
		if err == nil { // its first
			err = rates.refusal(t.Context(), caller)
		}
		l := err.(*refusal).line
		if lines[l] = true; l.pace != 4*time.Minute {
			t.Errorf("%s's line is read once in %s", caller, l.pace)
		}
	}
	if len(lines) != 2 {
		t.Errorf("alice and bob have %d lines", len(lines))
	}
}

func TestWhoIsNotKnownByNameIsKnownByAddress(t *testing.T) {
	t.Parallel()
	for remote, want := range map[string]string{
		"192.0.2.7:1": "192.0.2.7", "[2001:db8:1:2:3:4:5:6]:1": "2001:db8:1:2::/64", "[::ffff:192.0.2.7]:1": "192.0.2.7",
		"[fe80::1%eth0]:1": "fe80::/64", "@": "@", "name:1": "name",
	} {
		if got := network(remote); got != want {
			t.Errorf("%s is %s; want %s", remote, got, want)
		}
	}
	rdb, _ := testenv.Redis(t)
	log := slog.New(slog.DiscardHandler)
	s := New(Config{Rates: NewRates(rdb, 1, time.Hour, log), Log: log})
	status := func(remote string) int {
		r, w := httptest.NewRequest("POST", "/orders", nil), httptest.NewRecorder()
		r.RemoteAddr = remote
		s.ServeHTTP(w, r)
		_, _ = io.Copy(io.Discard, w.Body)
		return w.Code
	}
	for _, send := range []struct {
		remote string
		want   int
	}{{"192.0.2.1:1", 400}, {"192.0.2.1:2", 429}, {"192.0.2.2:1", 400}, {"[2001:db8::1]:1", 400}, {"[2001:db8::2]:1", 429}} {
		if got := status(send.remote); got != send.want { // 400: it is not over the rate, and has no key
			t.Errorf("%s: %d; want %d", send.remote, got, send.want)
		}
	}
}

// infoField returns the line of INFO that a field has.
func infoField(info, field string) string {
	for line := range strings.Lines(info) {
		if strings.HasPrefix(line, field+":") {
			return line
		}
	}
	return ""
}

func callsOf(t *testing.T, line string) int {
	t.Helper()
	match := regexp.MustCompile(`calls=(\d+)`).FindStringSubmatch(line)
	if match == nil {
		return 0
	}
	n, err := strconv.Atoi(match[1])
	if err != nil {
		t.Fatal(err)
	}
	return n
}
