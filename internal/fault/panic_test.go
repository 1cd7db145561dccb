package fault_test

import (
	"crypto/sha256"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"idempotent-orders/internal/fault"
	"idempotent-orders/internal/testenv"
)

// A request that panics is answered; a loop that does so ends the process, to be started again. What either prints is read by somebody.
func TestAPanicIsAnsweredOrEndsTheProcessAndShowsNoSecret(t *testing.T) {
	build(t)
	const canary = "canary"
	for point, then := range map[fault.Point]struct {
		status int
		dies   bool
	}{
		fault.ServerValidated: {status: 500}, fault.PlaceBegun: {status: 503}, fault.RelayClaimed: {status: 200, dies: true}, fault.EmailEntered: {status: 200, dies: true},
	} {
		t.Run(string(point), func(t *testing.T) {
			t.Parallel()
			_, redis := testenv.Redis(t)
			p := start(t, []string{
				"PANIC_AT=" + string(point), "GOTRACEBACK=all", "LOG_LEVEL=debug", "DATABASE_URL=" + testenv.DatabaseURL(t), "REDIS_ADDR=" + redis.Addr(),
				"OPS_ADDR=127.0.0.1:0", "OPS_TOKEN=ops-token-" + canary, fmt.Sprintf("API_KEYS=shop=%x", sha256.Sum256([]byte(canary))),
				"EMAIL_SENDER=smtp", "SMTP_ADDR=127.0.0.1:1", "EMAIL_FROM=a@example.com", "SMTP_USER=u", "SMTP_PASSWORD=" + canary,
			}, "").ready()
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, p.url+"/orders", strings.NewReader(`{"user_id":"canary@example.com"}`))
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Authorization", "Bearer "+canary)
			r.Header.Set("Idempotency-Key", "key-"+canary)
			r.Header.Set("Content-Type", "application/json")
			w, err := client.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			w.Body.Close()
			if w.StatusCode != then.status {
				t.Errorf("the answer is %d; want %d", w.StatusCode, then.status)
			}
			if !then.dies {
				p.stop()
			}
			select {
			case <-p.dead:
			case <-time.After(patience):
				t.Error("it lives on, and does nothing")
			}
			if said := p.said(); !strings.Contains(said, "PANIC_AT "+string(point)) || !strings.Contains(said, "goroutine ") || strings.Contains(said, canary) {
				t.Errorf("it says:\n%s", said)
			}
		})
	}
}
