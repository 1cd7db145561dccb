package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"idempotent-orders/internal/testenv"
)

// Every secret has this in it.
const canary = "canary"

// No secret may be anywhere that somebody reads: not on the output, whatever goes wrong, nor in an answer, nor in a profile.
func TestNoSecretIsShown(t *testing.T) {
	t.Parallel()
	address, home := testenv.DatabaseURL(t), "XDG_DATA_HOME="+testenv.Dir(t)
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword("postgres", canary)
	wrongPassword := u.String()
	_, redisServer := testenv.Redis(t)
	at := "REDIS_ADDR=" + redisServer.Addr()
	smtp := []string{"EMAIL_SENDER=smtp", "SMTP_ADDR=127.0.0.1:1", "EMAIL_FROM=a@example.com", "SMTP_USER=u", "SMTP_PASSWORD=" + canary}
	for name, test := range map[string]struct {
		env  []string
		args []string
	}{
		"help":                       {env: append(smtp, "DB_PASSWORD="+canary, "REDIS_PASSWORD="+canary, "OPS_TOKEN="+canary, "API_KEYS="+canary), args: []string{"--help"}},
		"malformed":                  {env: []string{"DATABASE_URL=postgres://u:" + canary + "@:x/n", "API_KEYS=a=" + canary, "OPS_TOKEN=" + canary, "REDIS_ADDR=rediss://:" + canary + "@a:1"}},
		"a password without TLS":     {env: append(smtp, "SMTP_TLS=none")},
		"a wrong password":           {env: []string{"DATABASE_URL=" + wrongPassword, at}, args: []string{"server"}},
		"a wrong password, migrate":  {env: []string{"DATABASE_URL=" + wrongPassword}, args: []string{"migrate", "up"}},
		"an unreachable database":    {env: []string{"DB_HOST=127.0.0.1", "DB_PORT=1", "DB_PASSWORD=" + canary, at}, args: []string{"worker"}},
		"a password Redis wants not": {env: []string{"DATABASE_URL=" + address, at, "REDIS_PASSWORD=" + canary}, args: []string{"server"}},
		"an unreachable Redis":       {env: []string{"DATABASE_URL=" + address, "REDIS_ADDR=rediss://127.0.0.1:1", "REDIS_PASSWORD=" + canary}, args: []string{"server"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out, errs, _ := finish(t, append([]string{home, "PORT=0", "LOG_LEVEL=debug"}, test.env...), test.args...)
			if strings.Contains(out+errs, canary) || out+errs == "" {
				t.Errorf("it says:\n%s%s", out, errs)
			}
		})
	}

	token, opsToken := "token-"+canary, "ops-token-"+canary
	p := start(t, append(smtp, home, at, "PORT=0", "LOG_LEVEL=debug", "DATABASE_URL="+address, "OPS_ADDR=127.0.0.1:0", "OPS_TOKEN="+opsToken,
		fmt.Sprintf("API_KEYS=shop=%x", sha256.Sum256([]byte(token))))).serving()
	ops := "http://" + p.waitFor(regexp.MustCompile(`Profiles are at /debug/pprof/" address=(\S+)`))[1]
	for _, send := range []struct {
		method, url, authorization, key, body string
		status                                int
	}{
		{"POST", p.url + "/orders", "Bearer " + token, "key-" + canary, "", 200},
		{"POST", p.url + "/orders", "Bearer " + token, "key-" + canary, "", 200},
		{"POST", p.url + "/orders", "Bearer " + token, "key-" + canary, `{"amount":1}`, 422},
		{"POST", p.url + "/orders", "Bearer " + token, canary + " with a space", "", 400},
		{"POST", p.url + "/orders", "Bearer " + token, `"` + canary, "", 400},
		{"POST", p.url + "/orders", "Bearer wrong-" + token, "key-" + canary, "", 401},
		{"POST", p.url + "/orders", "Basic " + token, "key-" + canary, "", 401},
		{"GET", ops + "/debug/pprof/", "Bearer wrong-" + opsToken, "", "", 401},
		{"GET", ops + "/debug/pprof/cmdline", "Bearer " + opsToken, "", "", 200},
		{"GET", ops + "/debug/pprof/goroutine?debug=2", "Bearer " + opsToken, "", "", 200},
		{"GET", ops + "/debug/pprof/heap", "Bearer " + opsToken, "", "", 200},
	} {
		r, err := http.NewRequestWithContext(t.Context(), send.method, send.url, strings.NewReader(send.body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", send.authorization)
		if send.key != "" {
			r.Header.Set("Idempotency-Key", send.key)
		}
		r.Header.Set("Content-Type", "application/json")
		w, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		answer, _ := io.ReadAll(w.Body)
		_ = w.Body.Close()
		if w.StatusCode != send.status || strings.Contains(fmt.Sprint(w.Header)+string(answer), canary) {
			t.Errorf("%+v: %d %v\n%s", send, w.StatusCode, w.Header, answer)
		}
	}
	redisServer.Kill()
	p.waitFor(regexp.MustCompile(`Receiving events fails`))
	p.terminate()
	if strings.Contains(p.said(), canary) {
		t.Errorf("it says:\n%s", p.said())
	}
}
