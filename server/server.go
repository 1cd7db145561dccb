// Package server is the HTTP side: it turns requests into drafts, hands them to the order store behind the idempotency
// guard, and turns every error, from whatever door, into application/problem+json.
package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/gen/api"
	"idempotent-orders/idempotency"
	"idempotent-orders/order"
)

// Config is what a server is made of.
type Config struct {
	Orders    *order.Store
	Guard     *idempotency.Guard
	Admission *Admission            // nil: every order is admitted
	Callers   []Caller              // who may use /orders, each with a name and a hash of its own; none: everyone is anonymous
	Rates     *Rates                // nil: every rate is allowed
	Pool      *pgxpool.Pool         // for the readiness check
	Redis     redis.UniversalClient // for the readiness check
	Contract  []byte                // openapi.yaml
	Log       *slog.Logger

	// ReadTimeout bounds how long a client may take to send a request, headers and body. The default is 10 s.
	ReadTimeout time.Duration
	// DrainTimeout bounds how long a server that stops goes on to serve who has not noticed. The default is 2 s.
	DrainTimeout time.Duration
	// Room is how many requests of one caller may be under way. The default is 1024.
	Room int
}

const (
	defaultReadTimeout = 10 * time.Second
	headerTimeout      = 5 * time.Second
	idleTimeout        = 2 * time.Minute
	// writeTimeout is from the end of the headers to the end of the answer: reading the body, waiting as long as Prefer
	// may ask for, and placing.
	writeTimeout   = 30 * time.Second
	maxHeaderBytes = 16 << 10
	// A server that stops drains first, until no connection has been open for quietTime: balancers look again within that.
	defaultDrainTimeout = 2 * time.Second
	quietTime           = time.Second
	// stopTimeout is what requests under way get after that, and greetTimeout what a connection gets that was opened before,
	// to send one.
	stopTimeout  = 2 * time.Second
	greetTimeout = 500 * time.Millisecond
)

// Server serves the operations of openapi.yaml.
type Server struct {
	Config
	mux        *http.ServeMux
	operations http.Handler // mux, and what needs not go so far
	handler    http.Handler
	docs       func() ([]byte, error) // the page, made when it is first asked for
	working    *room                  // requests under way that do not wait for another send
	waiting    *room                  // those that may, and so stay longer: they keep nobody out of the other
	holds      holds
	draining   atomic.Bool     // it will stop: whoever asks is told, and served
	stopping   context.Context // done when the server stops: those who wait for another send give up
	stop       context.CancelFunc
}

var _ api.StrictServerInterface = (*Server)(nil)

// New returns a server. Serve it on a listener, or use it as an http.Handler.
func New(cfg Config) *Server {
	if cfg.ReadTimeout == 0 {
		cfg.ReadTimeout = defaultReadTimeout
	}
	if cfg.DrainTimeout == 0 {
		cfg.DrainTimeout = defaultDrainTimeout
	}
	if cfg.Room == 0 {
		cfg.Room = defaultRoom
	}
	s := &Server{
		Config: cfg, mux: http.NewServeMux(), docs: sync.OnceValues(renderDocs),
		working: newRoom(cfg.Room, cfg.Log), waiting: newRoom(cfg.Room, cfg.Log), holds: holds{longest: longestHold, released: make(chan struct{})},
	}
	s.stopping, s.stop = context.WithCancel(context.Background())
	strict := api.NewStrictHandlerWithOptions(s, nil, api.StrictHTTPServerOptions{
		RequestErrorHandlerFunc:  s.refuse,
		ResponseErrorHandlerFunc: s.refuse,
	})
	api.HandlerWithOptions(strictly{strict, s}, api.StdHTTPServerOptions{
		BaseRouter:       s.mux,
		ErrorHandlerFunc: s.refuseParameter,
	})
	s.mux.HandleFunc("/", s.refuseUnknown)
	s.operations = s.repeated(s.mux)
	s.handler = s.recovered(s.tidied(http.HandlerFunc(s.route)))
	return s
}

// ServeHTTP answers one request, and holds the connection when the answer is that it was one too many: here, where the stack is
// short, for the garbage collector walks those of all who are held.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.handler.ServeHTTP(w, r)
	if l := linkOf(r); l != nil && l.line != nil {
		s.holds.hold(w, r, l)
	}
}

// Serve answers on the listener until ctx is done. Then it drains: it serves on, but says with every answer that the
// connection ends, and at /readyz that it is not ready. After that it accepts nothing more, and returns when the requests
// under way are answered, or nil all the same when they took too long and were cut off.
func (s *Server) Serve(ctx context.Context, listener net.Listener) error {
	open := newConns(connLimit(maxFiles(), s.Log), s.Log)
	httpServer := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: min(headerTimeout, s.ReadTimeout),
		ReadTimeout:       s.ReadTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
		ConnState:         open.note,
		ConnContext:       func(ctx context.Context, _ net.Conn) context.Context { return linked(ctx) },

		DisableGeneralOptionsHandler: true,
	}
	served := make(chan error, 1)
	go func() { served <- httpServer.Serve(listener) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve HTTP: %w", err)
	case <-ctx.Done():
	}
	if !s.draining.Swap(true) { // on another listener it may drain already
		close(s.holds.released) // so that they are told, too
	}
	open.drain(s.DrainTimeout)
	s.stop()
	defer time.AfterFunc(greetTimeout, open.closeSilent).Stop() // Shutdown would wait five seconds for each
	deadline, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	if err := httpServer.Shutdown(deadline); err != nil {
		s.Log.WarnContext(ctx, "Requests under way took too long and were cut off", "after", stopTimeout)
		return httpServer.Close()
	}
	return nil
}

// recovered turns a panic into an answer, or cuts the connection when an answer had begun.
func (s *Server) recovered(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := &answer{ResponseWriter: w, draining: &s.draining}
		defer func() {
			switch cause := recover(); {
			case cause == nil:
			case cause == http.ErrAbortHandler:
				panic(cause)
			case answer.begun:
				s.Log.ErrorContext(r.Context(), "An answer was cut off", "method", r.Method, "path", r.URL.Path, "error", &panicked{cause})
				panic(http.ErrAbortHandler)
			default:
				s.refuse(w, r, &panicked{cause})
			}
		}()
		next.ServeHTTP(answer, r)
	})
}

// answer notes whether an answer has begun, and says with it that the connection ends when the server drains: a connection
// that is closed while nobody says so may be closed in the face of the next request.
type answer struct {
	http.ResponseWriter
	draining *atomic.Bool
	begun    bool
}

func (a *answer) WriteHeader(status int) {
	a.begin()
	a.ResponseWriter.WriteHeader(status)
}

func (a *answer) Write(b []byte) (int, error) {
	a.begin()
	return a.ResponseWriter.Write(b)
}

func (a *answer) begin() {
	if !a.begun && a.draining.Load() {
		a.Header().Set("Connection", "close")
	}
	a.begun = true
}

func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// tidied folds what may be sent in several header lines into one (RFC 9110, section 5.2), and drops a traceparent that
// W3C Trace Context calls invalid: the generated code would refuse both.
func (s *Server) tidied(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if lines := r.Header.Values("Prefer"); len(lines) > 1 {
			r.Header.Set("Prefer", join(lines))
		}
		if lines := r.Header.Values("Traceparent"); len(lines) > 0 && (len(lines) > 1 || !validTraceparent(lines[0])) {
			r.Header.Del("Traceparent")
		}
		next.ServeHTTP(w, r)
	})
}

// route hands the request to its operation, if the caller may use it: before it is known who calls, no body is read. ServeMux would
// redirect a path that is not clean, which makes a GET of a POST.
func (s *Server) route(w http.ResponseWriter, r *http.Request) {
	if path.Clean(r.URL.Path) != r.URL.Path {
		s.refuse(w, r, errNotFound)
		return
	}
	guardPage(w.Header(), r.URL.Path)
	known, err := s.authenticated(r)
	if err == nil {
		err = s.metered(known)
	}
	if err != nil {
		if known == nil && r.ContentLength != 0 || !skipBody(r) {
			w.Header().Set("Connection", "close") // net/http would read the body, to use the connection again
		}
		s.refuse(w, r, err)
		return
	}
	s.operations.ServeHTTP(w, known)
}

// skipBody reads the body of a known caller's request, so that the connection can be used again, if it is small and comes in time, and
// nobody waits for an answer before sending it. net/http would do so as the answer begins, and not say how that ended.
func skipBody(r *http.Request) bool {
	if r.ContentLength < 0 || r.ContentLength > maxBody || r.Header.Get("Expect") != "" {
		return false
	}
	_, err := io.Copy(io.Discard, r.Body)
	return err == nil
}

// refuseUnknown answers what no operation answers. ServeMux would do so in plain text.
func (s *Server) refuseUnknown(w http.ResponseWriter, r *http.Request) {
	var allowed []string
	for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPost} {
		other := r.Clone(r.Context())
		other.Method = method
		if _, pattern := s.mux.Handler(other); pattern != "/" {
			allowed = append(allowed, method)
		}
	}
	if len(allowed) > 0 {
		w.Header().Set("Allow", strings.Join(allowed, ", "))
		s.refuse(w, r, errMethodNotAllowed)
		return
	}
	s.refuse(w, r, errNotFound)
}

// refuseParameter answers a request whose parameters the generated code could not read.
func (s *Server) refuseParameter(w http.ResponseWriter, r *http.Request, err error) {
	var missing *api.RequiredHeaderError
	var repeated *api.TooManyValuesForParamError
	var malformed *api.InvalidParamFormatError
	switch {
	case errors.As(err, &missing):
		err = fmt.Errorf("%w: %w", errKeyMissing, err)
	case errors.As(err, &repeated):
		err = fmt.Errorf("%w: %w", idempotency.ErrInvalidKey, err)
	case errors.As(err, &malformed) && malformed.ParamName == "Idempotency-Key":
		err = fmt.Errorf("%w: %w", idempotency.ErrInvalidKey, errors.New("it is empty"))
	case errors.As(err, &malformed):
		err = fmt.Errorf("%w: %w", errNotFound, err) // a path that names nothing
	}
	s.refuse(w, r, err)
}
