package server

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/gen/api"
	"idempotent-orders/idempotency"
	"idempotent-orders/internal/testenv"
	"idempotent-orders/order"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// testAPI is a server on a real listener, with the stores behind it.
type testAPI struct {
	t      *testing.T
	url    string
	pool   *pgxpool.Pool
	redis  redis.UniversalClient
	server *testenv.RedisServer
	log    *bytes.Buffer // read it only when the server is done
	own    *Server
	holds  *holds
	stop   func()
	client *http.Client
	routes routers.Router
}

// newAPI serves a fresh database and a Redis of its own.
func newAPI(t *testing.T) *testAPI {
	t.Helper()
	rdb, server := testenv.Redis(t)
	return serveAPI(t, Config{Pool: testenv.Database(t), Redis: rdb}, server)
}

// second serves the same stores from another server.
func (a *testAPI) second() *testAPI {
	return serveAPI(a.t, Config{Pool: a.pool, Redis: a.redis}, a.server)
}

func serveAPI(t *testing.T, cfg Config, redisServer *testenv.RedisServer) *testAPI {
	t.Helper()
	contract, err := os.ReadFile("../openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cfg.Contract = contract
	cfg.Log = slog.New(slog.NewTextHandler(&out, nil))
	cfg.Guard = idempotency.NewGuard(cfg.Redis, time.Hour, cfg.Log)
	cfg.Orders = order.NewStore(cfg.Pool, time.Hour, nil)
	if cfg.DrainTimeout == 0 {
		cfg.DrainTimeout = time.Millisecond // nobody has to notice
	}

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	s := New(cfg)
	go func() { served <- s.Serve(ctx, listener) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	t.Cleanup(stop)
	t.Cleanup(transport.CloseIdleConnections)

	spec, err := api.GetSpec()
	if err != nil {
		t.Fatal(err)
	}
	spec.Servers = nil
	if err := spec.Validate(t.Context()); err != nil {
		t.Fatal(err)
	}
	routes, err := legacy.NewRouter(spec)
	if err != nil {
		t.Fatal(err)
	}
	return &testAPI{
		t: t, url: "http://" + listener.Addr().String(), pool: cfg.Pool, redis: cfg.Redis, server: redisServer, log: &out,
		own: s, holds: &s.holds, stop: stop, client: &http.Client{Transport: transport, Timeout: time.Minute}, routes: routes,
	}
}

// reply is an answer, read to its end.
type reply struct {
	status int
	header http.Header
	body   string
}

// do sends a request and checks that the answer keeps the contract.
func (a *testAPI) do(method, path string, header http.Header, body io.Reader) reply {
	a.t.Helper()
	got, err := a.try(method, path, header, body)
	if err != nil {
		a.t.Fatal(err)
	}
	return got
}

func (a *testAPI) try(method, path string, header http.Header, body io.Reader) (reply, error) {
	r, err := http.NewRequestWithContext(a.t.Context(), method, a.url+path, body)
	if err != nil {
		return reply{}, err
	}
	maps.Copy(r.Header, header)
	w, err := a.client.Do(r)
	if err != nil {
		return reply{}, err
	}
	defer w.Body.Close()
	content, err := io.ReadAll(w.Body)
	if err != nil {
		return reply{}, err
	}
	if err := a.checkContract(r, w, content); err != nil {
		return reply{}, err
	}
	return reply{w.StatusCode, w.Header, string(content)}, nil
}

// checkContract holds an answer against openapi.yaml.
func (a *testAPI) checkContract(r *http.Request, w *http.Response, body []byte) error {
	if w.StatusCode >= 400 && w.Header.Get("Content-Type") != "application/problem+json" {
		return fmt.Errorf("%s %s answered %d with %s: %s", r.Method, r.URL.Path, w.StatusCode, w.Header.Get("Content-Type"), body)
	}
	plain := &http.Request{Method: r.Method, URL: &url.URL{Path: r.URL.Path}, Header: r.Header}
	if r.Method == http.MethodHead || w.StatusCode == http.StatusMethodNotAllowed {
		return nil // the contract describes neither the GET without a body, nor the methods that are not there
	}
	route, params, err := a.routes.FindRoute(plain)
	if err != nil {
		if w.StatusCode == http.StatusNotFound || w.StatusCode == http.StatusUnauthorized {
			return nil // what the contract does not name
		}
		return fmt.Errorf("%s %s is not in the contract but answered %d", r.Method, r.URL.Path, w.StatusCode)
	}
	input := &openapi3filter.ResponseValidationInput{
		RequestValidationInput: &openapi3filter.RequestValidationInput{Request: plain, PathParams: params, Route: route},
		Status:                 w.StatusCode,
		Header:                 w.Header,
		Options:                &openapi3filter.Options{IncludeResponseStatus: true},
	}
	input.SetBodyBytes(body)
	return openapi3filter.ValidateResponse(context.Background(), input)
}

func init() {
	openapi3filter.RegisterBodyDecoder("application/problem+json", openapi3filter.JSONBodyDecoder)
	openapi3filter.RegisterBodyDecoder("text/html", func(r io.Reader, _ http.Header, _ *openapi3.SchemaRef, _ openapi3filter.EncodingFn) (any, error) {
		b, err := io.ReadAll(r)
		return string(b), err
	})
	text := func(r io.Reader, _ http.Header, _ *openapi3.SchemaRef, _ openapi3filter.EncodingFn) (any, error) {
		b, err := io.ReadAll(r)
		return string(b), err
	}
	openapi3filter.RegisterBodyDecoder("text/css", text)
	openapi3filter.RegisterBodyDecoder("text/javascript", text)
	openapi3filter.RegisterBodyDecoder("application/yaml", func(r io.Reader, _ http.Header, _ *openapi3.SchemaRef, _ openapi3filter.EncodingFn) (any, error) {
		b, err := io.ReadAll(r)
		return string(b), err
	})
}

// place sends an order under a key.
func (a *testAPI) place(key, body string, more ...string) reply {
	a.t.Helper()
	return a.do(http.MethodPost, "/orders", headers(key, body, more...), strings.NewReader(body))
}

func headers(key, body string, more ...string) http.Header {
	h := http.Header{"Idempotency-Key": {key}}
	if body != "" {
		h.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(more); i += 2 {
		h.Add(more[i], more[i+1])
	}
	return h
}

// problem checks that the reply is this problem, says nothing it must not, and returns it.
func (r reply) problem(t *testing.T, status int, name string) api.Problem {
	t.Helper()
	var p api.Problem
	if err := json.Unmarshal([]byte(r.body), &p); err != nil {
		t.Fatalf("%d %s: %v", r.status, r.body, err)
	}
	if r.status != status || p.Status != status || p.Type != "/problems/"+name || p.Title == "" || p.Detail == "" {
		t.Errorf("got %d %s; want %d %s", r.status, r.body, status, name)
	}
	if _, err := uuid.Parse(p.Instance); err != nil {
		t.Errorf("instance %q is not a request id", p.Instance)
	}
	retry := r.header.Get("Retry-After")
	if wants := status == 409 || status == 429 || status == 503; wants != (retry != "") {
		t.Errorf("%s has Retry-After %q", name, retry)
	}
	for _, secret := range []string{"SQL", "postgres:", "127.0.0.1", "panic", "goroutine", "secret"} {
		if strings.Contains(r.body, secret) {
			t.Errorf("the problem shows %q: %s", secret, r.body)
		}
	}
	return p
}

// placed checks that the reply is a placed order, and returns its id.
func (r reply) placed(t *testing.T) uuid.UUID {
	t.Helper()
	var placed api.OrderPlaced
	if err := json.Unmarshal([]byte(r.body), &placed); err != nil || r.status != http.StatusOK {
		t.Fatalf("got %d %s, %v; want an order", r.status, r.body, err)
	}
	return placed.OrderId
}

// rows counts the orders, keys and events, which must be as many.
func (a *testAPI) rows() int {
	a.t.Helper()
	var orders, keys, events int
	err := a.pool.QueryRow(a.t.Context(),
		"SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM idempotency_keys), (SELECT count(*) FROM outbox)").
		Scan(&orders, &keys, &events)
	if err != nil || orders != keys || orders != events {
		a.t.Errorf("%d orders, %d keys, %d events, %v", orders, keys, events, err)
	}
	return orders
}

func (a *testAPI) expectRows(want int) {
	a.t.Helper()
	if got := a.rows(); got != want {
		a.t.Errorf("there are %d orders; want %d", got, want)
	}
}
