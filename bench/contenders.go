package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"time"

	"idempotent-orders/bench/naive"
	"idempotent-orders/internal/connect"
)

// The contenders. The first three are the project: all of it, and two of its parts.
const (
	everything  = "everything"
	server      = "server"
	worker      = "worker"
	consumer    = "consumer"
	naiveServer = "naive"
	emptyServer = "empty"
)

// serveContender serves one of the servers that the project is measured against, until ctx is done.
func serveContender(ctx context.Context, name string) error {
	debug.SetGCPercent(400) // as the project does
	handler := http.Handler(http.HandlerFunc(doNothing))
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
	if name == emptyServer { // as the project's, which has to bound its clients
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

// doNothing answers as if it had placed an order: the status, headers and size are those of the real answer.
func doNothing(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Idempotency-Expires", "2026-11-24T15:02:26Z")
	w.Header().Set("Location", "/orders/01a208ee-053e-7a6b-8de6-ca958541f473")
	_, _ = w.Write([]byte(`{"status":"success","order_id":"01a208ee-053e-7a6b-8de6-ca958541f473"}` + "\n"))
}
