package config

import (
	"strings"
	"testing"
	"time"
)

func TestARateIsRequestsInASecondOrAMinute(t *testing.T) {
	for text, want := range map[string]struct {
		requests int
		period   time.Duration
	}{"": {}, "1/s": {1, time.Second}, "600/m": {600, time.Minute}, "9999999/s": {9999999, time.Second}} {
		c, err := read(map[string]string{"RATE_LIMIT": text})
		if err != nil || c.RateRequests != want.requests || c.RatePeriod != want.period {
			t.Errorf("%q is %d in %s, %v", text, c.RateRequests, c.RatePeriod, err)
		}
	}
	for _, text := range []string{"0/s", "100", "-1/s", "1.5/s", "100/h", "100/s ", "10000000/s", "/s"} {
		if _, err := read(map[string]string{"RATE_LIMIT": text}); err == nil || !strings.Contains(err.Error(), "RATE_LIMIT") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestOperatorsAreAnsweredOnLoopbackOrWithAToken(t *testing.T) {
	const token = "canary-0123456789"
	for addr, want := range map[string]string{"": "127.0.0.1:9090", "off": "", "localhost:1": "localhost:1", "[::1]:0": "[::1]:0"} {
		if c, err := read(map[string]string{"OPS_ADDR": addr}); err != nil || c.OpsAddr != want || c.OpsSet != (addr != "") {
			t.Errorf("%q: %q, %v", addr, c.OpsAddr, err)
		}
	}
	for _, addr := range []string{":9090", "0.0.0.0:9090", "192.0.2.1:9090", "host:9090", "[::]:9090"} {
		if _, err := read(map[string]string{"OPS_ADDR": addr}); err == nil || !strings.Contains(err.Error(), "set OPS_TOKEN") {
			t.Errorf("%s without a token: %v", addr, err)
		}
		if c, err := read(map[string]string{"OPS_ADDR": addr, "OPS_TOKEN": token}); err != nil || c.OpsAddr != addr || c.OpsToken != token {
			t.Errorf("%s with a token: %v", addr, err)
		}
	}
	for _, env := range []map[string]string{{"OPS_ADDR": "9090"}, {"OPS_ADDR": "127.0.0.1:http"}, {"OPS_ADDR": "127.0.0.1:65536"}, {"OPS_TOKEN": "canary"}} {
		if _, err := read(env); err == nil || strings.Contains(err.Error(), "canary") {
			t.Errorf("%v: %v", env, err)
		}
	}
}

func TestTLSIsAskedForInTheAddress(t *testing.T) {
	c, err := read(map[string]string{"DB_HOST": "db", "DB_SSLMODE": "verify-full", "REDIS_ADDR": "rediss://a:1,rediss://b:2"})
	if err != nil || !strings.HasSuffix(c.DatabaseURL, "@db:5432/outbox_db?sslmode=verify-full") || c.RedisAddrs[1] != "rediss://b:2" {
		t.Errorf("read %+v, %v", c, err)
	}
	for want, env := range map[string]map[string]string{
		"DB_SSLMODE is":               {"DB_SSLMODE": "allow"},
		"DATABASE_URL is set, and so": {"DB_SSLMODE": "require", "DATABASE_URL": "postgres://db/n"},
		"all or on none":              {"REDIS_ADDR": "rediss://a:1,b:2"},
		"rediss://a":                  {"REDIS_ADDR": "rediss://a"},
		"redis://a:1":                 {"REDIS_ADDR": "redis://a:1"},
		"REDIS_PASSWORD":              {"REDIS_ADDR": "rediss://:canary@a:1"},
	} {
		if _, err := read(env); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "canary") {
			t.Errorf("%v: %v", env, err)
		}
	}
}
