package server

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"idempotent-orders/internal/testenv"
)

// testAdmin returns a pool on the server's maintenance database.
func testAdmin(t *testing.T, pool *pgxpool.Pool) *pgxpool.Pool {
	cfg := pool.Config().ConnConfig
	return testenv.Pool(t, fmt.Sprintf("postgres://%s:%s@%s:%d/postgres", cfg.User, cfg.Password, cfg.Host, cfg.Port))
}

func TestEveryDoorAnswersAProblem(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	for _, path := range []string{"/", "/nope", "/orders/", "/orders/a/b", "//orders", "/orders/../orders", "/problems/", "/problems/nope", "/ORDERS"} {
		api.do("GET", path, nil, nil).problem(t, 404, "not-found")
	}
	api.do("POST", "//orders", headers("k", ""), nil).problem(t, 404, "not-found")
	for path, allow := range map[string]string{
		"/orders": "POST", "/livez": "GET, HEAD", "/readyz": "GET, HEAD", "/openapi.yaml": "GET, HEAD",
		"/orders/00000000-0000-0000-0000-000000000000": "GET, HEAD", "/problems/not-found": "GET, HEAD",
	} {
		got := api.do("DELETE", path, nil, nil)
		got.problem(t, 405, "method-not-allowed")
		if got.header.Get("Allow") != allow {
			t.Errorf("%s allows %q; want %q", path, got.header.Get("Allow"), allow)
		}
	}
	api.do("GET", "/orders", nil, nil).problem(t, 405, "method-not-allowed")
	if got := api.do("HEAD", "/livez", nil, nil); got.status != 200 {
		t.Errorf("HEAD /livez answers %d", got.status)
	}
}

func TestAPanicIsAProblemAndIsLogged(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	s := New(Config{Orders: api.own.Orders, Pool: api.pool, Redis: api.redis, Log: serverLog(api)}) // without a guard: placing panics
	w := httptest.NewRecorder()
	r := httptest.NewRequest("POST", "/orders", nil)
	r.Header.Set("Idempotency-Key", "secret")
	s.ServeHTTP(w, r)
	problem := reply{w.Code, w.Header(), w.Body.String()}.problem(t, 500, "internal-error")
	logged := api.log.String()
	for _, want := range []string{problem.Instance, "nil pointer", "orders.go"} {
		if !strings.Contains(logged, want) {
			t.Errorf("the log lacks %q: %s", want, logged)
		}
	}
	if strings.Contains(logged, "secret") {
		t.Error("the log shows the key")
	}
}

func TestEachProblemHasAPage(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	for _, name := range []string{
		"idempotency-key-missing", "idempotency-key-invalid", "invalid-request", "unauthorized", "not-found", "method-not-allowed",
		"body-too-large", "unsupported-media-type", "request-in-progress", "idempotency-key-reused", "too-many-requests",
		"unavailable", "internal-error",
	} {
		got := api.do("GET", "/problems/"+name, nil, nil)
		if got.status != 200 || !strings.HasPrefix(got.header.Get("Content-Type"), "text/html") || !strings.Contains(got.body, name) {
			t.Errorf("/problems/%s answers %d %s", name, got.status, got.body)
		}
	}
	for _, p := range problems {
		if p.title == "" || p.detail == "" || p.meaning == "" || p.remedy == "" || p.status == 0 {
			t.Errorf("%s is not explained", p.name)
		}
	}
}

func TestTheContractIsServedAsItStands(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	want, err := os.ReadFile("../openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if got := api.do("GET", "/openapi.yaml", nil, nil); got.body != string(want) || got.header.Get("Content-Type") != "application/yaml" {
		t.Errorf("/openapi.yaml has %d bytes of %s; want %d", len(got.body), got.header.Get("Content-Type"), len(want))
	}
}

func TestReadinessNeedsPostgreSQLMigratedAndReportsRedis(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	if got := api.do("GET", "/readyz", nil, nil); got.status != 200 || !strings.Contains(got.body, `"redis":"ok"`) {
		t.Errorf("with everything: %v", got)
	}
	api.server.Kill()
	if got := api.do("GET", "/readyz", nil, nil); got.status != 200 || !strings.Contains(got.body, `"redis":"unreachable"`) {
		t.Errorf("without Redis: %v", got)
	}
	if _, err := api.pool.Exec(t.Context(), "DELETE FROM goose_db_version WHERE version_id = (SELECT max(version_id) FROM goose_db_version)"); err != nil {
		t.Fatal(err)
	}
	api.do("GET", "/readyz", nil, nil).problem(t, 503, "unavailable")
	if _, err := api.pool.Exec(t.Context(), "DROP TABLE goose_db_version"); err != nil {
		t.Fatal(err)
	}
	api.do("GET", "/readyz", nil, nil).problem(t, 503, "unavailable")
}

func TestASlowBodyIsRefused(t *testing.T) {
	t.Parallel()
	quick := newAPI(t)
	api := serveAPI(t, Config{Pool: quick.pool, Redis: quick.redis, ReadTimeout: 300 * time.Millisecond}, quick.server)
	conn, err := net.Dial("tcp", strings.TrimPrefix(api.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST /orders HTTP/1.1\r\nHost: x\r\nIdempotency-Key: k\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n{\"amount\"")
	w, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	content, _ := io.ReadAll(w.Body)
	reply{w.StatusCode, w.Header, string(content)}.problem(t, 400, "invalid-request")
	if !w.Close {
		t.Error("the connection is kept")
	}
	api.expectRows(0)
}

func TestABodyThatIsCutOffPlacesNothing(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	conn, err := net.Dial("tcp", strings.TrimPrefix(api.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "POST /orders HTTP/1.1\r\nHost: x\r\nIdempotency-Key: k\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n{}")
	conn.(*net.TCPConn).CloseWrite()
	w, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	content, _ := io.ReadAll(w.Body)
	reply{w.StatusCode, w.Header, string(content)}.problem(t, 400, "invalid-request")
	api.expectRows(0)
}

func TestAStoppingServerLetsWaitersGoAndFinishesTheRest(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	release := api.holdPlacing()
	placing, waiting := make(chan reply, 1), make(chan reply, 1)
	send := func(answered chan reply, more ...string) {
		got, err := api.try("POST", "/orders", headers("k", "", more...), nil)
		if err != nil {
			t.Error(err)
		}
		answered <- got
	}
	go send(placing)
	api.eventuallyRuns("PlaceOrders")
	go send(waiting, "Prefer", "wait=10")
	api.eventuallyRuns("FindIdempotencyKeys")
	stopped := make(chan struct{})
	go func() { api.stop(); close(stopped) }()
	(<-waiting).problem(t, 409, "request-in-progress")
	release()
	(<-placing).placed(t)
	<-stopped
	api.expectRows(1)
}

func TestAConnectionWithoutARequestDoesNotHoldTheServerUp(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	conn, err := net.Dial("tcp", strings.TrimPrefix(api.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	api.do("GET", "/livez", nil, nil) // by now the other is accepted
	api.stop()
	if strings.Contains(api.log.String(), "too long") {
		t.Errorf("the server waited for it: %s", api.log)
	}
}

// serverLog returns the log that the API's own server writes to; that server must be idle.
func serverLog(api *testAPI) *slog.Logger { return slog.New(slog.NewTextHandler(api.log, nil)) }

// The keys of Redis and the rows of every table are the same before and after, and no script and no SET has run.
func TestWhatIsRefusedWritesNothing(t *testing.T) {
	t.Parallel()
	plain := newAPI(t)
	api := plain.twoCallers()
	before := written(t, api)
	for name, send := range map[string]struct {
		header http.Header
		body   string
		status int
	}{
		"no key":              {http.Header{"Authorization": {asAlice}}, "", 400},
		"an empty key":        {headers("", "", "Authorization", asAlice), "", 400},
		"a key too long":      {headers(strings.Repeat("k", 256), "", "Authorization", asAlice), "", 400},
		"a key with a space":  {headers("a b", "", "Authorization", asAlice), "", 400},
		"two keys":            {headers("a", "", "Authorization", asAlice, "Idempotency-Key", "b"), "", 400},
		"an unclosed key":     {headers(`"a`, "", "Authorization", asAlice), "", 400},
		"no JSON":             {headers("k", "{", "Authorization", asAlice), "{", 400},
		"an unknown member":   {headers("k", "{", "Authorization", asAlice), `{"price":1}`, 400},
		"a repeated member":   {headers("k", "{", "Authorization", asAlice), `{"amount":1,"amount":1}`, 400},
		"too little":          {headers("k", "{", "Authorization", asAlice), `{"amount":0}`, 400},
		"a user without name": {headers("k", "{", "Authorization", asAlice), `{"user_id":""}`, 400},
		"text":                {headers("k", "", "Authorization", asAlice, "Content-Type", "text/plain"), "{}", 415},
		"too large":           {headers("k", "{", "Authorization", asAlice), strings.Repeat(" ", maxBody+1), 413},
		"no API key":          {headers("k", ""), "", 401},
		"an unknown API key":  {headers("k", "{", "Authorization", "Bearer token-of-carol"), `{"amount":1}`, 401},
	} {
		if got := api.do("POST", "/orders", send.header, strings.NewReader(send.body)); got.status != send.status {
			t.Errorf("%s: %d %s; want %d", name, got.status, got.body, send.status)
		}
		if after := written(t, api); after != before {
			t.Errorf("%s: the stores have\n%s\nbefore:\n%s", name, after, before)
		}
	}
	api.place("k", "", "Authorization", asAlice).placed(t)
	if written(t, api) == before {
		t.Error("an order is not seen either")
	}
}

// written returns all that is in Redis, how often commands were called there but those that ask, and how many rows each table has.
func written(t *testing.T, api *testAPI) string {
	t.Helper()
	keys, err := api.redis.Keys(t.Context(), "*").Result()
	if err != nil {
		t.Fatal(err)
	}
	stats, err := api.redis.Info(t.Context(), "commandstats").Result()
	if err != nil {
		t.Fatal(err)
	}
	var scripts []string
	for line := range strings.Lines(stats) {
		if name, _, _ := strings.Cut(line, ","); strings.HasPrefix(line, "cmdstat_eval") || strings.HasPrefix(line, "cmdstat_set") {
			scripts = append(scripts, name)
		}
	}
	slices.Sort(scripts)
	var rows string
	err = api.pool.QueryRow(t.Context(), `SELECT string_agg(format('%s %s', relname, xpath('/row/n/text()',
			query_to_xml(format('SELECT count(*) AS n FROM %I', relname), false, true, ''))), ', ' ORDER BY relname)
		FROM pg_class WHERE relkind IN ('r', 'p') AND relnamespace = 'public'::regnamespace`).Scan(&rows)
	if err != nil || !strings.Contains(rows, "idempotency_keys {0}") && len(keys) == 0 {
		t.Fatalf("the tables have %q, %v", rows, err)
	}
	return fmt.Sprintf("%q\n%q\n%s", keys, scripts, rows)
}
