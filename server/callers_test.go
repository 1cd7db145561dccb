package server

import (
	"crypto/sha256"
	"errors"
	"net/http"
	"strings"
	"testing"
)

// twoCallers serves the stores of an API to alice and bob, whose tokens are "token-of-alice" and "token-of-bob".
func (a *testAPI) twoCallers() *testAPI {
	a.t.Helper()
	return serveAPI(a.t, Config{Pool: a.pool, Redis: a.redis, Callers: twoCallers()}, a.server)
}

func twoCallers() []Caller {
	return []Caller{{"alice", sha256.Sum256([]byte("token-of-alice"))}, {"bob", sha256.Sum256([]byte("token-of-bob"))}}
}

const (
	asAlice = "Bearer token-of-alice"
	asBob   = "Bearer token-of-bob"
)

func TestAKeyIsScopedByCaller(t *testing.T) {
	t.Parallel()
	plain := newAPI(t)
	api := plain.twoCallers()
	alices := api.place("k", `{"amount":1}`, "Authorization", asAlice)
	bobs := api.place("k", `{"amount":1}`, "Authorization", asBob)
	if alices.placed(t) == bobs.placed(t) || bobs.header.Get("Idempotency-Replayed") != "" {
		t.Errorf("alice got %s, and bob %s", alices.body, bobs.body)
	}
	check := func(when string, api *testAPI) {
		for authorization, first := range map[string]reply{asAlice: alices, asBob: bobs} {
			again := api.place("k", `{"amount":1}`, "Authorization", authorization)
			if again.body != first.body || again.header.Get("Idempotency-Replayed") != "true" {
				t.Errorf("%s: %s got %d %s; want %s", when, authorization, again.status, again.body, first.body)
			}
			api.place("k", `{"amount":2}`, "Authorization", authorization).problem(t, 422, "idempotency-key-reused")
		}
	}
	check("from memory", api)
	check("from Redis and PostgreSQL", plain.twoCallers())
	api.redis.FlushAll(t.Context())
	check("from PostgreSQL", plain.twoCallers())
	api.expectRows(2)

	// A key that alice used for something is free for bob, with another body too.
	own := api.place("alices-own", `{"amount":1}`, "Authorization", asAlice).placed(t)
	if api.place("alices-own", `{"amount":2}`, "Authorization", asBob).placed(t) == own {
		t.Error("bob got alice's order")
	}
	plain.place("alices-own", `{"amount":3}`).placed(t) // where there are no API keys, everyone is a third caller
	api.expectRows(5)
}

func TestAnotherCallersOrderLooksLikeNone(t *testing.T) {
	t.Parallel()
	api := newAPI(t).twoCallers()
	path := "/orders/" + api.place("k", "", "Authorization", asAlice).placed(t).String()
	get := func(path, authorization string) reply {
		return api.do("GET", path, http.Header{"Authorization": {authorization}}, nil)
	}
	if got := get(path, asAlice); got.status != 200 {
		t.Errorf("alice got %d %s", got.status, got.body)
	}
	others, missing := get(path, asBob), get("/orders/00000000-0000-0000-0000-000000000000", asBob)
	same := func(r reply) string { return strings.Replace(r.body, r.problem(t, 404, "not-found").Instance, "", 1) }
	if same(others) != same(missing) || len(others.header) != len(missing.header) {
		t.Errorf("alice's order is %v to bob; a missing one is %v", others, missing)
	}
}

// The stores of this server are gone, and its clients send bodies that never come: it answers all the same.
func TestWhoIsNotKnownIsRefusedBeforeAnythingIsReadOrLookedUp(t *testing.T) {
	t.Parallel()
	api := newAPI(t).twoCallers()
	api.server.Kill()
	api.pool.Close()
	for name, header := range map[string]http.Header{
		"no header":       {},
		"empty":           {"Authorization": {""}},
		"no token":        {"Authorization": {"Bearer"}},
		"an empty token":  {"Authorization": {"Bearer "}},
		"another scheme":  {"Authorization": {"Basic token-of-alice"}},
		"a wrong token":   {"Authorization": {"Bearer token-of-alicf"}},
		"half a token":    {"Authorization": {"Bearer token-of"}},
		"the name":        {"Authorization": {"Bearer alice"}},
		"a token twice":   {"Authorization": {asAlice, asAlice}},
		"a list":          {"Authorization": {asAlice + ", " + asBob}},
		"a huge token":    {"Authorization": {"Bearer " + strings.Repeat("x", 8000)}},
		"another header":  {"X-Api-Key": {"token-of-alice"}},
		"a bad key":       {"Idempotency-Key": {"", ""}},
		"a bad body":      {"Idempotency-Key": {"k"}, "Content-Type": {"text/plain"}},
		"a broken scheme": {"Authorization": {"Bearer\ttoken-of-alice"}},
	} {
		for _, to := range []struct{ method, path string }{
			{"POST", "/orders"}, {"GET", "/orders/00000000-0000-0000-0000-000000000000"}, {"GET", "/orders/not-a-uuid"},
			{"DELETE", "/orders"}, {"POST", "/%6frders"}, {"GET", "/orders/a/b"},
		} {
			got := api.do(to.method, to.path, header, neverRead{t})
			got.problem(t, 401, "unauthorized")
			if got.header.Get("WWW-Authenticate") != "Bearer" {
				t.Errorf("%s, %s %s: %v", name, to.method, to.path, got.header)
			}
		}
	}
	// What is for everyone is.
	for _, path := range []string{"/livez", "/openapi.yaml", "/problems/unauthorized"} {
		if got := api.do("GET", path, nil, nil); got.status != 200 {
			t.Errorf("%s: %d", path, got.status)
		}
	}
	api.do("GET", "/ordersandmore", nil, nil).problem(t, 404, "not-found")
}

// neverRead is a body of which nothing comes until the answer is there.
type neverRead struct{ t *testing.T }

func (b neverRead) Read([]byte) (int, error) {
	<-b.t.Context().Done()
	return 0, errors.New("over")
}

func TestTheSchemeIsReadAsRFC6750Says(t *testing.T) {
	t.Parallel()
	api := newAPI(t).twoCallers()
	for _, authorization := range []string{asAlice, "bearer token-of-alice", "BEARER   token-of-alice"} {
		api.place("k", "", "Authorization", authorization).placed(t)
	}
	api.expectRows(1)
}

func TestAHandlerThatNobodyAskedForIsClosed(t *testing.T) {
	t.Parallel()
	s := New(Config{Callers: []Caller{{Name: "alice"}}})
	if _, err := s.caller(t.Context()); !errors.Is(err, errUnauthorized) {
		t.Errorf("without a caller: %v", err)
	}
}
