package server

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"idempotent-orders/idempotency"
	"idempotent-orders/internal/testenv"
	"idempotent-orders/order"
)

const (
	aKey  = `Idempotency-Key: k"1`
	aType = "Content-Type: application/json"
	aBody = `{"user_id":"user-456","amount":1000}` // the defaults, so that no body asks for the same
)

// message is a request with these header lines.
func message(method, path, body string, lines ...string) string {
	return fmt.Sprintf("%s %s HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n%s", method, path, strings.Join(lines, "\r\n"), body)
}

// send is a request to place an order whose length is told.
func send(body string, lines ...string) string {
	return message("POST", "/orders", body, append(lines, fmt.Sprintf("Content-Length: %d", len(body)))...)
}

func chunks(body string, lines ...string) string {
	if body != "" {
		body = fmt.Sprintf("%x\r\n%s\r\n", len(body), body)
	}
	return message("POST", "/orders", body+"0\r\n\r\n", append(lines, "Transfer-Encoding: chunked")...)
}

// staysOpen is a header of a request whose sender does not end its side of the connection.
const staysOpen = "X-Sender: stays"

// Requests beside one that was answered before: whether each is known again.
var besideARepeat = []struct {
	name    string
	known   bool
	request string
}{
	{"the same", true, send(aBody, aKey, aType)},
	{"headers in another order and case", true, message("POST", "/orders", aBody, "content-length: 36", "CONTENT-TYPE: application/json", `idempotency-key: k"1`)},
	{"a quoted key", true, send(aBody, `Idempotency-Key: "k\"1"`, aType)},
	{"a charset", true, send(aBody, aKey, aType+"; charset=UTF-8")},
	{"a query", true, message("POST", "/orders?a=b", aBody, aKey, aType, "Content-Length: 36")},
	{"a whole URL", true, message("POST", "http://x/orders", aBody, aKey, aType, "Content-Length: 36")},
	{"an escaped path", true, message("POST", "/%6Frders", aBody, aKey, aType, "Content-Length: 36")},
	{"who would wait", true, send(aBody, aKey, aType, "Prefer: wait=1")},
	{"an empty preference", true, send(aBody, aKey, aType, "Prefer:")},
	{"two preferences", true, send(aBody, aKey, aType, "Prefer: a", "Prefer: wait=x")},
	{"a trace", true, send(aBody, aKey, aType, "Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")},
	{"two traces that are none", true, send(aBody, aKey, aType, "Traceparent: nothing", "Traceparent:")},
	{"who waits to be told to go on", true, send(aBody, aKey, aType, "Expect: 100-continue")},
	{"a connection that ends", true, send(aBody, aKey, aType, "Connection: close")},
	{"HTTP/1.0", true, strings.Replace(send(aBody, aKey, aType), "HTTP/1.1", "HTTP/1.0", 1)},
	{"two on a connection", true, send(aBody, aKey, aType) + send(aBody, aKey, aType)},

	{"other white space", false, send(`{"user_id":"user-456", "amount":1000}`, aKey, aType)},
	{"another order of members", false, send(`{"amount":1000,"user_id":"user-456"}`, aKey, aType)},
	{"another amount", false, send(`{"user_id":"user-456","amount":2000}`, aKey, aType)},
	{"what is no JSON, and a repeat behind", false, send(`{"user_id":"user-456","amount":1000?`, aKey, aType) + send(aBody, aKey)},
	{"no body", false, message("POST", "/orders", "", aKey)},
	{"an empty body", false, send("", aKey, aType)},
	{"chunks", false, chunks(aBody, aKey, aType)},
	{"no chunks", false, chunks("", aKey, aType)},
	{"a broken chunk", false, message("POST", "/orders", "zz\r\n", aKey, aType, "Transfer-Encoding: chunked")},
	{"too much", false, message("POST", "/orders", "", aKey, aType, fmt.Sprint("Content-Length: ", maxBody+1))},
	{"too much in chunks", false, chunks(strings.Repeat(" ", maxBody+1), aKey, aType)},
	{"half a body", false, message("POST", "/orders", aBody[:18], aKey, aType, "Content-Length: 36")},
	{"half a body, and no end", false, message("POST", "/orders", aBody[:18], aKey, aType, "Content-Length: 36", staysOpen)},
	{"another type", false, send(aBody, aKey, "Content-Type: text/plain")},
	{"no type", false, send(aBody, aKey)},
	{"an encoding", false, send(aBody, aKey, aType, "Content-Encoding: gzip")},
	{"an unknown expectation", false, send(aBody, aKey, aType, "Expect: more")},
	{"no key", false, send(aBody, aType)},
	{"an empty key", false, send(aBody, "Idempotency-Key:", aType)},
	{"two keys", false, send(aBody, aKey, aKey, aType)},
	{"half a quoted key", false, send(aBody, `Idempotency-Key: "k`, aType)},
	{"GET", false, message("GET", "/orders", aBody, aKey, aType, "Content-Length: 36")},
	{"HEAD", false, message("HEAD", "/orders", aBody, aKey, aType, "Content-Length: 36")},
	{"PUT", false, message("PUT", "/orders", aBody, aKey, aType, "Content-Length: 36")},
	{"a path below", false, message("POST", "/orders/", aBody, aKey, aType, "Content-Length: 36")},
	{"a path that is not clean", false, message("POST", "//orders", aBody, aKey, aType, "Content-Length: 36")},
}

func TestARepeatIsAnsweredAsIfItHadGoneTheWholeWay(t *testing.T) {
	t.Parallel()
	base := newAPI(t)
	cfg := Config{Pool: base.pool, Redis: base.redis, ReadTimeout: time.Second} // of a body that does not come
	quick, whole := serveAPI(t, cfg, base.server), serveAPI(t, cfg, base.server)
	whole.own.operations = whole.own.mux
	quick.learn()
	whole.learn()
	for _, draining := range []bool{false, true} {
		quick.own.draining.Store(draining)
		whole.own.draining.Store(draining)
		for _, c := range besideARepeat {
			got, want := quick.raw(c.request), whole.raw(c.request)
			if got != want || !strings.HasPrefix(want, "HTTP/1.") {
				t.Errorf("%s, draining %t: answered\n%s\nwant\n%s", c.name, draining, got, want)
			}
			restore := quick.forge("from memory")
			if known := strings.Contains(quick.raw(c.request), "from memory"); known != c.known {
				t.Errorf("%s: known again %t", c.name, known)
			}
			restore()
		}
	}
	base.expectRows(1)
}

// learn has the server note a replay.
func (a *testAPI) learn() {
	a.t.Helper()
	for range 2 {
		if got := a.raw(send(aBody, aKey, aType)); !strings.Contains(got, " 200 OK") {
			a.t.Fatalf("answered %s", got)
		}
	}
	if a.own.Orders.Noted(noted) == nil {
		a.t.Fatal("a replay was not noted")
	}
}

var noted = idempotency.Key{Caller: anonymous, Operation: order.Operation, Value: `k"1`}

// forge changes the answer that is noted, until it is restored.
func (a *testAPI) forge(content string) (restore func()) {
	a.t.Helper()
	placed, err := a.own.Orders.Recall(order.Send{Key: noted, Draft: order.Draft{UserID: order.DefaultUserID, Amount: order.DefaultAmount}})
	if err != nil {
		a.t.Fatal(err)
	}
	answer := placedResponse(placed).text()
	forged := answer
	forged.content = []byte(content)
	a.own.Orders.Note(noted, placed, &replay{aBody, forged})
	return func() { a.own.Orders.Note(noted, placed, &replay{aBody, answer}) }
}

// raw sends a request over a connection of its own, and returns what comes back, but for what is new in every answer.
func (a *testAPI) raw(request string) string {
	a.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(a.url, "http://"))
	if err != nil {
		a.t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	if _, err := io.WriteString(conn, request); err == nil && !strings.Contains(request, staysOpen) {
		_ = conn.(*net.TCPConn).CloseWrite()
	}
	got, _ := io.ReadAll(conn) // a request that is not read to its end ends with a reset
	return newEachTime.ReplaceAllString(string(got), "")
}

var newEachTime = regexp.MustCompile(`Date: [^\r]*|"instance":"[^"]*"`)

func TestARepeatIsAnsweredToItsCallerAlone(t *testing.T) {
	t.Parallel()
	api := newAPI(t).twoCallers()
	as := func(authorization string) reply { return api.place("k", aBody, "Authorization", authorization) }
	alices := as(asAlice).placed(t)
	for range 2 {
		if again := as(asAlice).placed(t); again != alices {
			t.Errorf("alice got %s, then %s", alices, again)
		}
	}
	if bobs := as(asBob); bobs.placed(t) == alices || bobs.header.Get("Idempotency-Replayed") != "" {
		t.Errorf("bob got %v", bobs)
	}
	as("Bearer token-of-nobody").problem(t, 401, "unauthorized")
	api.expectRows(2)
}

// Whatever is sent, twice to let it be noted: the third is answered as a server answers that knows nothing again.
func FuzzRepeat(f *testing.F) {
	for _, key := range []string{"k", `"k"`, `"k`, "", "k\xff", "k k"} {
		for _, body := range []string{"", aBody, "{}", "{", strings.Repeat(" ", 300) + "{}", `{"amount":2}`} {
			f.Add(key, "application/json", body, "wait=0")
		}
	}
	f.Add("k", "text/plain", aBody, "")
	f.Add("k", "", "", "wait=")
	rdb, _ := testenv.Redis(f)
	log := slog.New(slog.DiscardHandler)
	cfg := Config{Orders: order.NewStore(testenv.Database(f), time.Hour, nil), Guard: idempotency.NewGuard(rdb, time.Hour, log), Log: log}
	quick, whole := New(cfg), New(cfg)
	whole.operations = whole.mux
	f.Fuzz(func(t *testing.T, key, contentType, body, prefer string) {
		answer := func(s *Server) string {
			r := httptest.NewRequest(http.MethodPost, "/orders", strings.NewReader(body))
			r.Header = http.Header{"Idempotency-Key": {key}, "Content-Type": {contentType}, "Prefer": {prefer}}
			w := httptest.NewRecorder()
			s.ServeHTTP(w, r)
			return newEachTime.ReplaceAllString(fmt.Sprint(w.Code, w.Header(), w.Body), "")
		}
		answer(whole)
		want := answer(whole)
		if got := answer(quick); got != want {
			t.Errorf("answered %s; want %s", got, want)
		}
	})
}
