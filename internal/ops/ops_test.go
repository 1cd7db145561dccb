package ops_test

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"idempotent-orders/internal/config"
	"idempotent-orders/internal/ops"
)

var discard = slog.New(slog.DiscardHandler)

func ask(token, host, authorization string) int {
	r, w := httptest.NewRequest("GET", "/debug/pprof/cmdline", nil), httptest.NewRecorder()
	r.Host = host
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	ops.Handler(token).ServeHTTP(w, r)
	return w.Code
}

func TestWithoutATokenOnlyThisMachineByItsOwnNameIsAnswered(t *testing.T) {
	for host, want := range map[string]int{
		"localhost": 200, "localhost:9090": 200, "LOCALHOST:1": 200, "127.0.0.1:9090": 200, "127.8.9.1": 200, "[::1]:9090": 200, "[::1]": 200,
		"evil.example": 403, "evil.example:9090": 403, "localhost.evil.example": 403, "127.0.0.1.evil.example": 403, "192.0.2.1:9090": 403, "": 403,
	} {
		if got := ask("", host, ""); got != want {
			t.Errorf("Host %q: %d; want %d", host, got, want)
		}
	}
}

func TestWithATokenEveryRequestNeedsIt(t *testing.T) {
	const token = "0123456789abcdef"
	for authorization, want := range map[string]int{
		"Bearer " + token: 200, "": 401, "Bearer": 401, "Bearer ": 401, token: 401, "Bearer " + token + "0": 401, "Bearer " + token[:15]: 401,
	} {
		for _, host := range []string{"ops.example", "localhost"} {
			if got := ask(token, host, authorization); got != want {
				t.Errorf("%q to %s: %d; want %d", authorization, host, got, want)
			}
		}
	}
}

func TestAnAddressThatIsTakenMattersOnlyWhenItWasSet(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	cfg := config.Config{OpsAddr: taken.Addr().String()}
	if listener, err := ops.Listen(cfg, discard); listener != nil || err != nil {
		t.Errorf("the default address: %v, %v", listener, err)
	}
	cfg.OpsSet = true
	if _, err := ops.Listen(cfg, discard); err == nil {
		t.Error("an address that was set is taken, and no error")
	}
	if listener, err := ops.Listen(config.Config{OpsSet: true}, discard); listener != nil || err != nil {
		t.Errorf("off: %v, %v", listener, err)
	}
}

func TestProfilesAreServedUntilTheEnd(t *testing.T) {
	listener, err := ops.Listen(config.Config{OpsAddr: "127.0.0.1:0"}, discard)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); ops.Serve(ctx, listener, "", discard) }()
	for path, want := range map[string]string{"": "goroutine", "goroutine?debug=1": "ops.Serve", "heap": "", "profile?seconds=1": ""} {
		response, err := http.Get("http://" + listener.Addr().String() + "/debug/pprof/" + path)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(response.Body)
		_ = response.Body.Close()
		if response.StatusCode != 200 || len(body) == 0 || !strings.Contains(string(body), want) {
			t.Errorf("%s: %d, %d bytes", path, response.StatusCode, len(body))
		}
	}
	cancel()
	<-done
	ops.Serve(t.Context(), nil, "", discard) // is no work
}
