package server

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"idempotent-orders/internal/testenv"
)

// newAdmission returns an API whose orders are admitted while events are younger than a minute, and its admission.
func newAdmission(t *testing.T) (*testAPI, *Admission) {
	t.Helper()
	rdb, server := testenv.Redis(t)
	pool := testenv.Database(t)
	admission := NewAdmission(pool, time.Minute, slog.New(slog.DiscardHandler))
	return serveAPI(t, Config{Pool: pool, Redis: rdb, Admission: admission}, server), admission
}

func (a *testAPI) exec(sql string, args ...any) {
	a.t.Helper()
	if _, err := a.pool.Exec(a.t.Context(), sql, args...); err != nil {
		a.t.Fatal(err)
	}
}

func TestNoOrderIsPromisedWhileEventsWaitTooLong(t *testing.T) {
	t.Parallel()
	api, admission := newAdmission(t)
	before := api.place("before", "").placed(t)
	admission.ask(t.Context())
	api.place("young", "").placed(t)

	api.exec("UPDATE outbox SET created_at = now() - interval '2 minutes' WHERE aggregate_id = $1", before)
	admission.ask(t.Context())
	for range 2 {
		p := api.place("late", "").problem(t, 503, "unavailable")
		if !strings.Contains(p.Detail, "not placed") {
			t.Errorf("the problem says %q", p.Detail)
		}
	}
	// What was promised before is answered, by this server from memory and by another from PostgreSQL.
	other := serveAPI(t, Config{Pool: api.pool, Redis: api.redis, Admission: admission}, api.server)
	for _, a := range []*testAPI{api, other} {
		if again := a.place("before", ""); again.placed(t) != before || again.header.Get("Idempotency-Replayed") != "true" {
			t.Errorf("sent again: %v", again)
		}
	}
	other.place("before", `{"amount":1}`).problem(t, 422, "idempotency-key-reused")
	other.place("late", "").problem(t, 503, "unavailable")
	api.expectRows(2)

	api.exec("DELETE FROM outbox WHERE aggregate_id = $1", before) // it is published
	admission.ask(t.Context())
	if late := api.place("late", ""); late.status != 200 || late.header.Get("Idempotency-Replayed") != "" {
		t.Errorf("afterwards: %v", late)
	}
}

func TestAnEventThatIsHeldBackIsPendingUnlessItIsParked(t *testing.T) {
	t.Parallel()
	api, admission := newAdmission(t)
	id := uuid.New()
	api.exec(`INSERT INTO outbox_held (id, event_id, aggregate_id, event_type, source, payload, created_at)
		VALUES (1, gen_random_uuid(), $1, 't', 's', '{}', now() - interval '2 minutes')`, id)
	admission.ask(t.Context())
	api.place("late", "").problem(t, 503, "unavailable")
	api.exec("INSERT INTO outbox_parked (aggregate_id) VALUES ($1)", id)
	admission.ask(t.Context())
	api.place("late", "").placed(t)
}

func TestAnAgeThatIsUnknownRefusesNobody(t *testing.T) {
	t.Parallel()
	api, admission := newAdmission(t)
	api.place("before", "").placed(t)
	api.exec("UPDATE outbox SET created_at = now() - interval '2 minutes'")
	admission.ask(t.Context())
	api.place("late", "").problem(t, 503, "unavailable")

	locked, err := api.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer locked.Rollback(context.Background())
	if _, err := locked.Exec(t.Context(), "LOCK TABLE outbox_held"); err != nil { // the question waits, and orders do not
		t.Fatal(err)
	}
	admission.ask(t.Context())
	api.place("late", "").placed(t)
	if err := locked.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	admission.ask(t.Context())
	api.place("later", "").problem(t, 503, "unavailable")
}

func TestWithoutALimitEveryOrderIsAdmitted(t *testing.T) {
	t.Parallel()
	admission := NewAdmission(nil, 0, nil)
	admission.Run(t.Context()) // returns
	if admission != nil || admission.refusal() != nil {
		t.Error("an admission without a limit refuses")
	}
}

func TestAdmissionAsksByItself(t *testing.T) {
	t.Parallel()
	api, admission := newAdmission(t)
	api.place("before", "").placed(t)
	api.exec("UPDATE outbox SET created_at = now() - interval '2 minutes'")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); admission.Run(ctx) }()
	for deadline := time.Now().Add(20 * time.Second); admission.refusal() == nil; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not ask")
		}
	}
	cancel()
	<-ended
	api.place("late", "").problem(t, 503, "unavailable")
}
