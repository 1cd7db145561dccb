package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"idempotent-orders/gen/api"
	"idempotent-orders/gen/db"
	"idempotent-orders/migrations"
	"idempotent-orders/order"
)

// readyTimeout bounds each question of the readiness check.
const readyTimeout = time.Second

// GetLiveness tells that the process is alive.
func (s *Server) GetLiveness(context.Context, api.GetLivenessRequestObject) (api.GetLivenessResponseObject, error) {
	return api.GetLiveness200JSONResponse{Status: api.LivenessStatusAlive}, nil
}

// errStopping: the server serves on for a moment, so that balancers can send elsewhere.
var errStopping = errors.New("the server is stopping")

// GetReadiness tells whether orders can be placed here: PostgreSQL answers and is migrated, and the server is not about to
// stop. Redis is reported only.
func (s *Server) GetReadiness(ctx context.Context, _ api.GetReadinessRequestObject) (api.GetReadinessResponseObject, error) {
	if s.draining.Load() {
		return nil, &refusal{
			error: fmt.Errorf("%w: %w", order.ErrUnavailable, errStopping), detail: "This server is stopping; send to another.",
		}
	}
	asked, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if err := migrations.Check(asked, s.Pool); err != nil {
		return nil, fmt.Errorf("%w: %w", order.ErrUnavailable, err)
	}
	standby, err := db.New(s.Pool).IsStandby(asked)
	if err != nil || standby {
		return nil, fmt.Errorf("%w: it is a standby: %t, %w", order.ErrUnavailable, standby, err)
	}
	ready := api.GetReadiness200JSONResponse{
		Status: api.ReadinessStatusReady, Postgresql: api.ReadinessPostgresqlOk, Redis: api.ReadinessRedisOk,
	}
	asked, cancel = context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if err := s.Redis.Ping(asked).Err(); err != nil {
		s.Log.WarnContext(ctx, "Redis does not answer", "error", err)
		ready.Redis = api.ReadinessRedisUnreachable
	}
	return ready, nil
}

// GetContract serves openapi.yaml.
func (s *Server) GetContract(context.Context, api.GetContractRequestObject) (api.GetContractResponseObject, error) {
	return api.GetContract200ApplicationyamlResponse{
		Body: bytes.NewReader(s.Contract), ContentLength: int64(len(s.Contract)),
	}, nil
}

// panicked is a panic as an error; the log shows where it came from.
type panicked struct{ cause any }

func (p *panicked) Error() string { return fmt.Sprintf("panic: %v\n%s", p.cause, debug.Stack()) }
