package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"time"

	"idempotent-orders/bench/naive"
	"idempotent-orders/internal/connect"
	"idempotent-orders/internal/gather"
)

// The contenders. The first four are the project: all of it, and its parts.
const (
	everything    = "everything"
	server        = "server"
	worker        = "worker"
	consumer      = "consumer"
	naiveServer   = "naive"
	emptyServer   = "empty"
	readingServer = "reading"
	waitingServer = "waiting"
)

// bare are the contenders that place nothing: what net/http costs, and what it costs whoever reads and waits.
var bare = map[string]http.HandlerFunc{
	emptyServer:   func(w http.ResponseWriter, _ *http.Request) { answerOrder(w) },
	readingServer: readOrder,
	waitingServer: waitForBatches(),
}

// serveContender serves one of the servers that the project is measured against, until ctx is done.
func serveContender(ctx context.Context, name string) error {
	debug.SetGCPercent(400) // as the project does
	handler := http.Handler(bare[name])
	if name == naiveServer {
		pool, err := naive.Open(ctx, os.Getenv("DATABASE_URL"))
		if err != nil {
			return err
		}
		defer pool.Close()
		rdb := connect.Redis([]string{os.Getenv("REDIS_ADDR")}, "")
		defer rdb.Close()
		handler = naive.New(pool, rdb)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Getenv("PORT"))
	if err != nil {
		return err
	}
	s := &http.Server{Handler: handler}
	if bare[name] != nil { // as the project's, which has to bound its clients
		s.ReadHeaderTimeout, s.ReadTimeout, s.WriteTimeout, s.IdleTimeout = 5*time.Second, 10*time.Second, 30*time.Second, 2*time.Minute
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(listener) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	if err := s.Shutdown(context.WithoutCancel(ctx)); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("stop: %w", err)
	}
	return nil
}

// answerOrder answers as if an order had been placed: the status, headers and size are those of the real answer.
func answerOrder(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Idempotency-Expires", "2026-11-24T15:02:26Z")
	w.Header().Set("Location", "/orders/01a208ee-053e-7a6b-8de6-ca958541f473")
	_, _ = w.Write([]byte(`{"status":"success","order_id":"01a208ee-053e-7a6b-8de6-ca958541f473"}` + "\n"))
}

// readOrder answers as to a replay, and does nothing for it but read the request.
func readOrder(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	w.Header().Set("Idempotency-Replayed", "true")
	answerOrder(w)
}

// waitForBatches returns a handler that reads the request and then waits twice, as an order waits for Redis and for PostgreSQL. Its
// batches do nothing, so that nothing but the processor holds it up.
func waitForBatches() http.HandlerFunc {
	limits := gather.Limits{Batch: 256, UnderWay: 2, Waiting: 8192, Wait: time.Second}
	same := func(bodies [][]byte) [][]byte { return bodies }
	reserve, place := gather.New(limits, same), gather.New(limits, same)
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err == nil {
			_, err = reserve.Do(body)
		}
		if err == nil {
			_, err = place.Do(body)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		answerOrder(w)
	}
}
