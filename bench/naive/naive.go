// Package naive is the order service that one would write in an afternoon: a lock in Redis and a transaction in PostgreSQL
// for each request, nothing shared between requests. The benchmark measures the project against it, so it is written to be
// correct and no slower than it has to be: same tables, same answers, prepared statements, a pool of connections.
package naive

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/gen/api"
	"idempotent-orders/idempotency"
	"idempotent-orders/order"
)

const (
	maxConns  = 16 // as the project's own pool
	lockLasts = 10 * time.Second
	retention = 24 * time.Hour
	maxBody   = 64 << 10
	caller    = "anonymous"
)

// Open opens the pool of a naive server: pgx as it is, which prepares each statement once a connection.
func Open(ctx context.Context, url string) (*pgxpool.Pool, error) {
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, err
	}
	cfg.MaxConns = maxConns
	return pgxpool.NewWithConfig(ctx, cfg)
}

// Server answers POST /orders, and GET /readyz.
type Server struct {
	pool  *pgxpool.Pool
	redis redis.UniversalClient
}

// New returns a server on a migrated database.
func New(pool *pgxpool.Pool, rdb redis.UniversalClient) http.Handler {
	s := &Server{pool, rdb}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /orders", s.place)
	mux.HandleFunc("GET /readyz", func(http.ResponseWriter, *http.Request) {})
	return mux
}

// send is one request: its key, what it asks for, and the hash of that.
type send struct {
	key         string
	userID      string
	amount      int64
	fingerprint [sha256.Size]byte
}

// placed is what is committed under a key.
type placed struct {
	id          uuid.UUID
	fingerprint []byte
	expires     time.Time
	replayed    bool
}

func (s *Server) place(w http.ResponseWriter, r *http.Request) {
	request, err := read(w, r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	lock := "naive:" + request.key
	locked, err := s.redis.SetNX(r.Context(), lock, "held", lockLasts).Result()
	if err != nil {
		http.Error(w, "try again", http.StatusServiceUnavailable)
		return
	}
	var p placed
	if locked {
		p, err = s.once(r.Context(), request)
	} else {
		p, err = find(r.Context(), s.pool, request.key)
	}
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		http.Error(w, "the first send is still under way", http.StatusConflict)
		return
	case err != nil:
		s.redis.Del(context.WithoutCancel(r.Context()), lock)
		http.Error(w, "try again", http.StatusServiceUnavailable)
		return
	case locked:
		s.redis.Set(r.Context(), lock, "completed", retention)
	}
	answer(w, request, p)
}

func read(w http.ResponseWriter, r *http.Request) (send, error) {
	request := send{key: r.Header.Get("Idempotency-Key"), userID: order.DefaultUserID, amount: order.DefaultAmount}
	if request.key == "" {
		return request, errors.New("the Idempotency-Key is missing")
	}
	var body api.OrderRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&body); err != nil && !errors.Is(err, io.EOF) {
		return request, err
	}
	if body.UserId != nil {
		request.userID = *body.UserId
	}
	if body.Amount != nil {
		request.amount = *body.Amount
	}
	request.fingerprint = order.Draft{UserID: request.userID, Amount: request.amount}.Fingerprint()
	return request, nil
}

// once places the order, or returns what was committed under its key before.
func (s *Server) once(ctx context.Context, request send) (placed, error) {
	tx, err := s.pool.Begin(ctx)
	if err != nil {
		return placed{}, err
	}
	defer tx.Rollback(context.WithoutCancel(ctx)) // after a commit this does nothing
	p := placed{id: uuid.Must(uuid.NewV7()), fingerprint: request.fingerprint[:]}
	var created time.Time
	err = tx.QueryRow(ctx, `INSERT INTO idempotency_keys (digest, caller, operation, key, fingerprint, order_id, expires_at)
		VALUES ($1, $2, $3, $4, $5, $6, now() + $7::interval)
		ON CONFLICT DO NOTHING RETURNING created_at, expires_at`,
		digest(request.key), caller, order.Operation, request.key, p.fingerprint, p.id, retention).Scan(&created, &p.expires)
	if errors.Is(err, pgx.ErrNoRows) {
		return find(ctx, tx, request.key)
	}
	if err != nil {
		return placed{}, err
	}
	if _, err = tx.Exec(ctx, "INSERT INTO orders (id, caller, user_id, amount) VALUES ($1, $2, $3, $4)",
		p.id, caller, request.userID, request.amount); err != nil {
		return placed{}, err
	}
	event := order.CreatedEvent(uuid.Must(uuid.NewV7()),
		order.Order{ID: p.id, UserID: request.userID, Amount: request.amount, CreatedAt: created.UTC()}, "")
	payload, err := json.Marshal(event.Data)
	if err != nil {
		return placed{}, err
	}
	if _, err = tx.Exec(ctx, `INSERT INTO outbox (event_id, aggregate_id, event_type, source, payload)
		VALUES ($1, $2, $3, $4, $5)`, event.Id, p.id, string(event.Type), string(event.Source), payload); err != nil {
		return placed{}, err
	}
	return p, tx.Commit(ctx)
}

func digest(key string) uuid.UUID {
	return idempotency.Key{Caller: caller, Operation: order.Operation, Value: key}.Digest()
}

// find returns what is committed under the key, or pgx.ErrNoRows.
func find(ctx context.Context, q interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}, key string) (placed, error) {
	p := placed{replayed: true}
	err := q.QueryRow(ctx, `SELECT order_id, fingerprint, expires_at FROM idempotency_keys
		WHERE digest = $1`, digest(key)).Scan(&p.id, &p.fingerprint, &p.expires)
	return p, err
}

func answer(w http.ResponseWriter, request send, p placed) {
	if !bytes.Equal(p.fingerprint, request.fingerprint[:]) {
		http.Error(w, "the key belongs to another request", http.StatusUnprocessableEntity)
		return
	}
	if p.replayed {
		w.Header().Set("Idempotency-Replayed", "true")
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Idempotency-Expires", p.expires.UTC().Format(time.RFC3339))
	w.Header().Set("Location", "/orders/"+p.id.String())
	fmt.Fprintf(w, "{\"status\":\"success\",\"order_id\":%q}\n", p.id)
}
