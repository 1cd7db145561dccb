package server

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"idempotent-orders/idempotency"
	"idempotent-orders/internal/testenv"
	"idempotent-orders/order"
)

// What the handlers cost beside net/http: a replay that the process remembers asks nobody.
func BenchmarkReplay(b *testing.B) {
	rdb, _ := testenv.Redis(b)
	log := slog.New(slog.DiscardHandler)
	server := New(Config{
		Orders: order.NewStore(testenv.Database(b), time.Hour, nil), Guard: idempotency.NewGuard(rdb, time.Hour, log), Log: log,
	})
	const body = `{"user_id":"user-456","amount":1000}`
	r := httptest.NewRequest("POST", "/orders", strings.NewReader(body))
	r.Header.Set("Idempotency-Key", "00000000-0000-4000-8000-000000000000")
	r.Header.Set("Content-Type", "application/json")
	w := &discarded{http.Header{}}
	serve := func() {
		clear(w.header)
		r.Body = io.NopCloser(strings.NewReader(body))
		server.ServeHTTP(w, r)
	}
	serve()
	b.ReportAllocs()
	for b.Loop() {
		serve()
	}
	if w.header.Get("Idempotency-Replayed") != "true" {
		b.Errorf("the answer has the headers %v", w.header)
	}
}

// discarded takes an answer for its headers.
type discarded struct{ header http.Header }

func (d *discarded) Header() http.Header         { return d.header }
func (d *discarded) WriteHeader(int)             {}
func (d *discarded) Write(b []byte) (int, error) { return len(b), nil }
