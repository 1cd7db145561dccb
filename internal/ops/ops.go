// Package ops answers operators, on an address of its own: the profiles of net/http/pprof. It is for this machine alone, or for
// those who have the token.
package ops

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"strings"
	"time"

	"idempotent-orders/internal/config"
)

const (
	headerTimeout = 5 * time.Second
	writeTimeout  = 5 * time.Minute // a profile takes as long as it is asked to
	stopTimeout   = 500 * time.Millisecond
)

// Listen listens at cfg.OpsAddr; nil when there is none. Several programs on one machine have the same default address: the first
// gets it, the others say so and do without. An address that was set must be had.
func Listen(cfg config.Config, log *slog.Logger) (net.Listener, error) {
	if cfg.OpsAddr == "" {
		return nil, nil
	}
	listener, err := net.Listen("tcp", cfg.OpsAddr)
	if err != nil && !cfg.OpsSet {
		log.Warn("No profiles here: the default address is taken; set OPS_ADDR to another, or to off", "address", cfg.OpsAddr, "error", err)
		return nil, nil
	}
	return listener, err
}

// Serve answers on the listener until ctx is done; a nil one is no work.
func Serve(ctx context.Context, listener net.Listener, token string, log *slog.Logger) {
	if listener == nil {
		return
	}
	server := &http.Server{
		Handler: Handler(token), ReadHeaderTimeout: headerTimeout, WriteTimeout: writeTimeout,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	log.InfoContext(ctx, "Profiles are at /debug/pprof/", "address", listener.Addr().String())
	stop := context.AfterFunc(ctx, func() {
		deadline, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		if server.Shutdown(deadline) != nil {
			_ = server.Close()
		}
	})
	defer stop()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		log.ErrorContext(ctx, "Profiles are gone", "error", err)
	}
}

// Handler returns what operators are answered with, when they have the token, or when there is none and they call this machine by
// a name of its own: a page from elsewhere, whose name was made to lead here, does not.
func Handler(token string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	want := sha256.Sum256([]byte("Bearer " + token))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		got := sha256.Sum256([]byte(r.Header.Get("Authorization")))
		switch {
		case token != "" && subtle.ConstantTimeCompare(got[:], want[:]) != 1:
			w.Header().Set("WWW-Authenticate", "Bearer")
			http.Error(w, "send the header Authorization: Bearer, with OPS_TOKEN", http.StatusUnauthorized)
		case token == "" && !config.IsLoopback(hostname(r.Host)):
			http.Error(w, "without OPS_TOKEN this address answers to localhost and 127.0.0.1 alone", http.StatusForbidden)
		default:
			mux.ServeHTTP(w, r)
		}
	})
}

// hostname returns the host of a Host header, without its port.
func hostname(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		return name
	}
	return strings.Trim(host, "[]")
}
