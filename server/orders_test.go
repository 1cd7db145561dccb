package server

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"idempotent-orders/gen/api"
	"idempotent-orders/order"
)

func TestASecondSendGetsTheFirstAnswer(t *testing.T) {
	t.Parallel()
	api := newAPI(t)

	first := api.place("k", `{"user_id":"user-1","amount":250}`)
	id := first.placed(t)
	if want := fmt.Sprintf(`{"status":"success","order_id":"%s"}`, id); strings.TrimSpace(first.body) != want {
		t.Errorf("the body is %s; want %s", first.body, want)
	}
	if got := first.header.Get("Location"); got != "/orders/"+id.String() {
		t.Errorf("Location is %q", got)
	}
	expires, err := time.Parse(time.RFC3339, first.header.Get("Idempotency-Expires"))
	if err != nil || time.Until(expires) > time.Hour || time.Until(expires) < 59*time.Minute {
		t.Errorf("Idempotency-Expires is %s, %v; want an hour from now", expires, err)
	}
	if _, marked := first.header["Idempotency-Replayed"]; marked {
		t.Error("the first answer is marked as a replay")
	}

	// The same again, in other words, to this server and to others, which know it only from Redis and PostgreSQL, or from
	// PostgreSQL alone: byte for byte the same.
	sends := map[string]func(to *testAPI) reply{
		"again":                  func(to *testAPI) reply { return to.place("k", `{"user_id":"user-1","amount":250}`) },
		"members in other order": func(to *testAPI) reply { return to.place("k", ` { "amount" : 250 , "user_id" : "user-1" } `) },
		"escaped":                func(to *testAPI) reply { return to.place("k", `{"user_id":"\u0075ser-1","\u0061mount":250}`) },
		"quoted key":             func(to *testAPI) reply { return to.place(`"k"`, `{"user_id":"user-1","amount":250}`) },
		"charset spelled out": func(to *testAPI) reply {
			return to.do("POST", "/orders", charset("k"), body(`{"user_id":"user-1","amount":250}`))
		},
		"with a preference": func(to *testAPI) reply { return to.place("k", `{"user_id":"user-1","amount":250}`, "Prefer", "wait=1") },
	}
	check := func(name string, got reply) {
		if got.status != first.status || got.body != first.body {
			t.Errorf("%s: %d %s; want %d %s", name, got.status, got.body, first.status, first.body)
		}
		want := first.header.Clone()
		want.Set("Idempotency-Replayed", "true")
		got.header.Del("Date")
		want.Del("Date")
		if !maps.EqualFunc(got.header, want, slices.Equal) {
			t.Errorf("%s: headers %v; want %v", name, got.header, want)
		}
	}
	for name, send := range sends {
		check(name, send(api))
		check(name+" to another server", send(api.second()))
	}
	for name, send := range sends {
		api.redis.FlushAll(t.Context())
		check(name+" after FLUSHALL", send(api.second()))
	}
	api.server.Kill()
	for name, send := range sends {
		check(name+" without Redis", send(api.second()))
	}
	api.expectRows(1)

	got := api.do("GET", "/orders/"+id.String(), nil, nil)
	if !strings.Contains(got.body, fmt.Sprintf(`{"order_id":"%s","user_id":"user-1","amount":250,"status":"created","created_at":"`, id)) {
		t.Errorf("the order reads %s", got.body)
	}
}

func charset(key string) http.Header {
	return http.Header{"Idempotency-Key": {key}, "Content-Type": {"Application/JSON; charset=UTF-8"}}
}

func body(s string) io.Reader { return strings.NewReader(s) }

func TestDefaultsNeedNotBeSpelledOut(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	first := api.place("k", "").placed(t)
	for _, same := range []string{`{}`, ` {} `, `{"amount":1000}`, `{"user_id":"user-456"}`, `{"user_id":"user-456","amount":1000}`} {
		if got := api.place("k", same).placed(t); got != first {
			t.Errorf("%s placed another order", same)
		}
	}
	got := api.do("POST", "/orders", http.Header{"Idempotency-Key": {"k"}, "Content-Type": {"text/plain"}}, nil)
	if got.placed(t) != first {
		t.Error("no body, but a content type, placed another order")
	}
	api.expectRows(1)
}

func TestEveryValueCountsUnderAKey(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	api.place("k", `{"user_id":"user-1","amount":250}`).placed(t)
	for _, other := range []string{
		"", `{}`, `{"user_id":"user-1"}`, `{"amount":250}`, `{"user_id":"user-2","amount":250}`, `{"user_id":"user-1","amount":251}`,
		`{"user_id":"User-1","amount":250}`, `{"user_id":"user-1 ","amount":250}`, `{"user_id":"user\u002d1\u200b","amount":250}`,
	} {
		api.place("k", other).problem(t, 422, "idempotency-key-reused")
	}
	api.second().place("k", `{}`).problem(t, 422, "idempotency-key-reused")
	api.redis.FlushAll(t.Context())
	api.second().place("k", `{}`).problem(t, 422, "idempotency-key-reused")
	api.server.Kill()
	api.second().place("k", `{}`).problem(t, 422, "idempotency-key-reused")
	api.expectRows(1)

	api.place("another", `{}`).placed(t)
	api.expectRows(2)
}

func TestTheKeyIsRequiredAndRead(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	api.do("POST", "/orders", nil, nil).problem(t, 400, "idempotency-key-missing")
	for _, key := range []string{"", `""`, `"open`, "a secret", "sécret", strings.Repeat("s", 256)} {
		api.place(key, "").problem(t, 400, "idempotency-key-invalid")
	}
	api.do("POST", "/orders", http.Header{"Idempotency-Key": {"a", "a"}}, nil).problem(t, 400, "idempotency-key-invalid")
	api.expectRows(0)
	for _, key := range []string{"%41", "a,b;c=d", strings.Repeat("k", 255), "~"} {
		api.place(key, "").placed(t)
		if api.place(key, "").header.Get("Idempotency-Replayed") != "true" {
			t.Errorf("%q is not itself", key)
		}
	}
	api.expectRows(4)
}

func TestWhatIsNotAnOrderIsRefusedMemberByMember(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	for body, want := range map[string][]string{
		`{"amount":0}`:                             {"#/amount"},
		`{"amount":-1}`:                            {"#/amount"},
		`{"amount":-0}`:                            {"#/amount"},
		`{"amount":1000000000001}`:                 {"#/amount"},
		`{"amount":99999999999999999999999999999}`: {"#/amount"},
		`{"amount":1.0}`:                           {"#/amount"},
		`{"amount":1e3}`:                           {"#/amount"},
		`{"amount":"1000"}`:                        {"#/amount"},
		`{"amount":null}`:                          {"#/amount"},
		`{"amount":[1]}`:                           {"#/amount"},
		`{"user_id":""}`:                           {"#/user_id"},
		`{"user_id":7}`:                            {"#/user_id"},
		`{"user_id":null,"amount":true}`:           {"#/user_id", "#/amount"},
		`{"user_id":"` + strings.Repeat("ü", 65) + `"}`: {"#/user_id"},
		`{"user_id":"a\u0000b"}`:                        {"#/user_id"},
		`{"Amount":1}`:                                  {"#/Amount"},
		`{"user_ID":"a","amount":0}`:                    {"#/user_ID", "#/amount"},
		`{"note":{"amount":1}}`:                         {"#/note"},
		`{"a/b~c d":1}`:                                 {"#/a~1b~0c%20d"},
		`{"amount":1,"amount":1}`:                       {"#/amount"},
		`{"amount":1,"\u0061mount":2}`:                  {"#/amount"},
		`{"amount":0,"amount":1}`:                       {"#/amount", "#/amount"},
		`{"x":{"y":{"b":1,"b":2}}}`:                     {"#/x"},
		`{"user_id":"a"} {}`:                            {"#"},
		`{"user_id":"a"}x`:                              {"#"},
		`{"user_id":"a",}`:                              {"#"},
		`{"user_id":"a"`:                                {"#"},
		`{"user_id":"` + "\xff" + `"}`:                  {"#"},
		`{"user_id":"\ud800"}`:                          {"#"},
		"{\"user_id\":\"a\nb\"}":                        {"#"},
		"\ufeff{}":                                      {"#"},
		`   `:                                           {"#"},
		`null`:                                          {"#"},
		`[]`:                                            {"#"},
		`"{}"`:                                          {"#"},
		`{'amount':1}`:                                  {"#"},
		strings.Repeat(`[`, 20000):                      {"#"},
		`{"x":` + strings.Repeat(`[`, 20000):            {"#"},
	} {
		problem := api.place("k", body).problem(t, 400, "invalid-request")
		var got []string
		if problem.Errors != nil {
			for _, e := range *problem.Errors {
				got = append(got, e.Pointer)
				if e.Detail == "" {
					t.Errorf("%.60s: no reason for %s", body, e.Pointer)
				}
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%.60s: errors at %v; want %v", body, got, want)
		}
	}
	api.expectRows(0)

	api.place("k", `{"user_id":"`+strings.Repeat("ü", 64)+`","amount":1000000000000}`).placed(t)
	api.place("k2", `{"user_id":"line\nbreak","amount":1}`).placed(t)
	api.expectRows(2)
}

func TestOtherBodiesAreRefused(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	for _, contentType := range []string{"", "text/plain", "application/x-www-form-urlencoded", "application/json-patch+json", "application/json; charset=latin1", ";"} {
		h := http.Header{"Idempotency-Key": {"k"}, "Content-Type": {contentType}}
		api.do("POST", "/orders", h, body(`{}`)).problem(t, 415, "unsupported-media-type")
	}
	api.place("k", `{}`, "Content-Encoding", "gzip").problem(t, 415, "unsupported-media-type")

	large := `{"user_id":"` + strings.Repeat("a", maxBody) + `"}`
	api.place("k", large).problem(t, 413, "body-too-large")
	chunked := struct{ io.Reader }{strings.NewReader(large)} // of no known length
	api.do("POST", "/orders", headers("k", large), chunked).problem(t, 413, "body-too-large")
	exactly := `{"amount":1` + strings.Repeat(" ", maxBody-len(`{"amount":1}`)) + `}`
	api.place("exactly", exactly).placed(t)
	api.expectRows(1)
}

func TestAKeyInUseIsRefusedOrWaitedFor(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	release := api.holdPlacing()
	first := make(chan reply, 1)
	go func() {
		got, err := api.try("POST", "/orders", headers("k", ""), nil)
		if err != nil {
			t.Error(err)
		}
		first <- got
	}()
	api.eventuallyRuns("PlaceOrders")

	api.place("k", "").problem(t, 409, "request-in-progress")
	api.place("k", `{"amount":1}`).problem(t, 409, "request-in-progress") // only what is committed can be a mismatch
	api.place("k", "", "Prefer", "wait=0").problem(t, 409, "request-in-progress")
	api.place("k", "", "Prefer", "respond-async, wait=x").problem(t, 409, "request-in-progress")
	began := time.Now()
	api.place("k", "", "Prefer", "wait=1").problem(t, 409, "request-in-progress")
	if waited := time.Since(began); waited < time.Second {
		t.Errorf("Prefer: wait=1 waited %s", waited)
	}

	patient, mismatched := make(chan reply, 1), make(chan reply, 1)
	for body, answered := range map[string]chan reply{"": patient, `{"amount":1}`: mismatched} {
		go func() {
			got, err := api.try("POST", "/orders", headers("k", body, "Prefer", "respond-async", "Prefer", "WAIT=10; x=y"), strings.NewReader(body))
			if err != nil {
				t.Error(err)
			}
			answered <- got
		}()
	}
	release()
	placed := (<-first).placed(t)
	if got := <-patient; got.placed(t) != placed || got.header.Get("Idempotency-Replayed") != "true" {
		t.Errorf("the patient send got %v", got)
	}
	(<-mismatched).problem(t, 422, "idempotency-key-reused")
	api.expectRows(1)
}

// holdPlacing keeps sends from ending, in the middle of their transaction, until the returned function is called.
func (a *testAPI) holdPlacing() (release func()) {
	a.t.Helper()
	_, err := a.pool.Exec(a.t.Context(), `CREATE TABLE held ();
		INSERT INTO held DEFAULT VALUES;
		CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			WHILE EXISTS (SELECT FROM held) LOOP PERFORM pg_sleep(0.005); END LOOP;
			RETURN NULL;
		END $$;
		CREATE TRIGGER hold AFTER INSERT ON orders FOR EACH STATEMENT EXECUTE FUNCTION hold()`)
	if err != nil {
		a.t.Fatal(err)
	}
	return func() {
		a.t.Helper()
		if _, err := a.pool.Exec(a.t.Context(), "DELETE FROM held"); err != nil {
			a.t.Fatal(err)
		}
	}
}

// eventuallyRuns waits until a query runs, or was the last that its connection ran.
func (a *testAPI) eventuallyRuns(query string) {
	a.t.Helper()
	a.eventually(query+" runs", func() bool {
		var runs bool
		err := a.pool.QueryRow(a.t.Context(), `SELECT EXISTS (SELECT FROM pg_stat_activity
			WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE '%' || $1 || '%')`, query).Scan(&runs)
		return err == nil && runs
	})
}

// eventually asks again and again until what is expected holds.
func (a *testAPI) eventually(what string, holds func() bool) {
	a.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !holds() {
		if time.Now().After(deadline) {
			a.t.Fatalf("not within 20 s: %s", what)
		}
		select {
		case <-a.t.Context().Done():
		case <-time.After(time.Millisecond):
		}
	}
}

func TestNobodyGetsAnOrderThatIsNotThere(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	id := api.place("k", "").placed(t)
	if _, err := api.pool.Exec(t.Context(), "UPDATE orders SET caller = 'another' WHERE id = $1", id); err != nil {
		t.Fatal(err)
	}
	api.do("GET", "/orders/"+id.String(), nil, nil).problem(t, 404, "not-found")
	api.do("GET", "/orders/00000000-0000-0000-0000-000000000000", nil, nil).problem(t, 404, "not-found")
	for _, malformed := range []string{"1", "%00", "not-a-uuid", "..%2f..%2fetc"} {
		api.do("GET", "/orders/"+malformed, nil, nil).problem(t, 404, "not-found")
	}
}

func TestWithoutPostgreSQLNothingIsPromised(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	id := api.place("before", "").placed(t)
	other := api.second()
	name := api.pool.Config().ConnConfig.Database
	elsewhere := testAdmin(t, api.pool)
	if _, err := elsewhere.Exec(t.Context(), "ALTER DATABASE "+name+" ALLOW_CONNECTIONS false"); err != nil {
		t.Fatal(err)
	}
	if _, err := elsewhere.Exec(t.Context(), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name); err != nil {
		t.Fatal(err)
	}
	for range 3 { // connections that the pool still holds fail in their own ways
		api.place("after", "").problem(t, 503, "unavailable")
		other.place("before", "").problem(t, 503, "unavailable")
		if api.place("before", "").placed(t) != id { // what it has answered it can still answer
			t.Error("the order from before is another now")
		}
		api.do("GET", "/orders/"+id.String(), nil, nil).problem(t, 503, "unavailable")
		api.do("GET", "/readyz", nil, nil).problem(t, 503, "unavailable")
	}
	if got := api.do("GET", "/livez", nil, nil); got.status != 200 {
		t.Errorf("livez answers %d", got.status)
	}
	if _, err := elsewhere.Exec(t.Context(), "ALTER DATABASE "+name+" ALLOW_CONNECTIONS true"); err != nil {
		t.Fatal(err)
	}
	// It was not remembered: the same send places the order now.
	if got := api.place("after", ""); got.status != 200 || got.header.Get("Idempotency-Replayed") != "" {
		t.Errorf("sent again: %v", got)
	}
	if api.place("before", "").placed(t) != id {
		t.Error("the order from before is another now")
	}
	api.expectRows(2)
}

func TestARedisThatLiesCostsTimeOnly(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	placeOf := func(key string) string { // where Redis has the key
		api.redis.FlushAll(t.Context())
		api.place("probe-"+key, "")
		api.redis.FlushAll(t.Context())
		api.place(key, "").placed(t)
		names := api.redis.Keys(t.Context(), "idempotency:*").Val()
		if len(names) != 1 {
			t.Fatalf("Redis has %v", names)
		}
		return names[0]
	}
	for _, lie := range []string{"completed", "held:somebody-else", "held:", "garbage", ""} {
		name := placeOf("k-" + lie)
		before := api.rows()
		for _, state := range []string{"committed", "gone"} {
			if state == "gone" {
				if _, err := api.pool.Exec(t.Context(), "DELETE FROM idempotency_keys WHERE key = $1", "k-"+lie); err != nil {
					t.Fatal(err)
				}
			}
			api.redis.Set(t.Context(), name, lie, 0)
			asked := api.second() // one that knows nothing itself
			got := asked.place("k-"+lie, "")
			switch {
			case state == "committed":
				if got.placed(t); got.header.Get("Idempotency-Replayed") != "true" {
					t.Errorf("%q over a committed key: %v", lie, got)
				}
				asked.place("k-"+lie, `{"amount":7}`).problem(t, 422, "idempotency-key-reused")
			case strings.HasPrefix(lie, "held:"):
				got.problem(t, 409, "request-in-progress")
				if left := api.redis.PTTL(t.Context(), name).Val(); left <= 0 || left > 10*time.Second {
					t.Errorf("%q keeps others out for %s", lie, left)
				}
			default:
				if got.placed(t); got.header.Get("Idempotency-Replayed") != "" {
					t.Errorf("%q over a key that is gone: %v", lie, got)
				}
			}
		}
		var orders int
		if err := api.pool.QueryRow(t.Context(), "SELECT count(*) FROM orders").Scan(&orders); err != nil || orders < before {
			t.Errorf("%d orders, %v", orders, err)
		}
		// Take the order of the deleted key along, so that rows() counts pairs again.
		if _, err := api.pool.Exec(t.Context(), `WITH lone AS (DELETE FROM orders WHERE id NOT IN (SELECT order_id FROM idempotency_keys) RETURNING id)
			DELETE FROM outbox WHERE aggregate_id IN (SELECT id FROM lone)`); err != nil {
			t.Fatal(err)
		}
	}
	name := placeOf("list")
	api.redis.Del(t.Context(), name)
	api.redis.LPush(t.Context(), name, "a list")
	if got := api.second().place("list", ""); got.header.Get("Idempotency-Replayed") != "true" {
		t.Errorf("over a list: %v", got)
	}
}

func TestTheTraceGoesOnToTheEvent(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	const trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	for key, sent := range map[string][]string{
		"good": {trace}, "none": nil, "twice": {trace, trace}, "upper": {strings.ToUpper(trace)}, "zero": {"00-" + strings.Repeat("0", 32) + "-b7ad6b7169203331-01"},
		"garbage": {"x"},
	} {
		h := headers(key, "")
		h["Traceparent"] = sent
		if sent == nil {
			h.Del("Traceparent")
		}
		id := api.do("POST", "/orders", h, nil).placed(t)
		var got *string
		if err := api.pool.QueryRow(t.Context(), "SELECT traceparent FROM outbox WHERE aggregate_id = $1", id).Scan(&got); err != nil {
			t.Fatal(err)
		}
		if key == "good" && (got == nil || *got != trace) || key != "good" && got != nil {
			t.Errorf("%s: the event has traceparent %v", key, got)
		}
	}
}

func TestPreferIsReadAsRFC7240Says(t *testing.T) {
	for prefer, want := range map[string]time.Duration{
		"": 0, "wait=5": 5 * time.Second, "wait=10": 10 * time.Second, "wait=11": 10 * time.Second, "wait=4294967295": 10 * time.Second,
		"wait=99999999999999999999": 0, "wait=-1": 0, "wait": 0, "wait=": 0, "wait=1.5": 0, `wait="3"`: 3 * time.Second,
		"Wait = 2": 2 * time.Second, "respond-async, wait=7; foo=bar": 7 * time.Second, "wait=1, wait=9": time.Second, "waiting=5": 0,
	} {
		if got := preferredWait(prefer); got != want {
			t.Errorf("Prefer: %s waits %s; want %s", prefer, got, want)
		}
	}
}

func TestThePlacedAnswerIsWhatTheGeneratedCodeWouldWrite(t *testing.T) {
	for _, replayed := range []bool{false, true} {
		placed := order.Placement{OrderID: uuid.New(), ExpiresAt: time.Now().UTC(), Replayed: replayed}
		generated := api.PlaceOrder200JSONResponse{
			Body: api.OrderPlaced{Status: api.OrderPlacedStatusSuccess, OrderId: placed.OrderID},
			Headers: api.PlaceOrder200ResponseHeaders{
				Location: "/orders/" + placed.OrderID.String(), IdempotencyExpires: placed.ExpiresAt.Format(time.RFC3339),
			},
		}
		if replayed {
			generated.Headers.IdempotencyReplayed = &replayed
		}
		want, got := httptest.NewRecorder(), httptest.NewRecorder()
		if err := errors.Join(generated.VisitPlaceOrderResponse(want), placedResponse(placed).VisitPlaceOrderResponse(got)); err != nil {
			t.Fatal(err)
		}
		if got.Code != want.Code || got.Body.String() != want.Body.String() || !reflect.DeepEqual(got.Header(), want.Header()) {
			t.Errorf("got %d %v %s, want %d %v %s", got.Code, got.Header(), got.Body, want.Code, want.Header(), want.Body)
		}
	}
}
