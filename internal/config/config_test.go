package config

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"
)

func read(env map[string]string) (Config, error) {
	return Read(func(name string) string { return env[name] })
}

func TestNothingNeedsToBeSet(t *testing.T) {
	c, err := read(nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.DatabaseURL != DefaultDatabaseURL || c.DatabaseSet || c.RedisSet || !slices.Equal(c.RedisAddrs, []string{DefaultRedisAddr}) ||
		c.Port != 8080 || c.IdempotencyRetention != 24*time.Hour || c.EmailSender != "log" || c.LogJSON || c.LogLevel != slog.LevelInfo {
		t.Errorf("the defaults are %+v", c)
	}
}

func TestEveryVariableCounts(t *testing.T) {
	c, err := read(map[string]string{
		"DB_HOST": "db", "DB_PORT": "6543", "DB_USER": "u", "DB_PASSWORD": "p@ss/word?", "DB_NAME": "n",
		"REDIS_ADDR": "a:1, b:2", "REDIS_PASSWORD": "r", "PORT": "0", "IDEMPOTENCY_RETENTION": "90m", "EMAIL_SENDER": "discard",
		"EVENT_BROKER": "redis-streams", "LOG_FORMAT": "json", "LOG_LEVEL": "debug",
	})
	if err != nil {
		t.Fatal(err)
	}
	if c.DatabaseURL != "postgres://u:p%40ss%2Fword%3F@db:6543/n" || !c.DatabaseSet || !slices.Equal(c.RedisAddrs, []string{"a:1", "b:2"}) ||
		c.RedisPassword != "r" || !c.RedisSet || c.Port != 0 || c.IdempotencyRetention != 90*time.Minute || c.EmailSender != "discard" ||
		!c.LogJSON || c.LogLevel != slog.LevelDebug {
		t.Errorf("read %+v", c)
	}
	c, err = read(map[string]string{"DATABASE_URL": "postgres://u:p@db/n?sslmode=require"})
	if err != nil || c.DatabaseURL != "postgres://u:p@db/n?sslmode=require" || !c.DatabaseSet {
		t.Errorf("read %+v, %v", c, err)
	}
}

func TestEachMistakeIsNamedAndNoSecretIsShown(t *testing.T) {
	env := map[string]string{
		"DB_HOST": "db", "DB_PORT": "x", "DB_PASSWORD": "canary", "DATABASE_URL": "postgres://u:canary@:x/n", "REDIS_ADDR": "nohost",
		"REDIS_PASSWORD": "canary", "PORT": "65536", "IDEMPOTENCY_RETENTION": "1", "EMAIL_SENDER": "smtp", "EVENT_BROKER": "kafka",
		"LOG_FORMAT": "xml", "LOG_LEVEL": "loud", "API_KEYS": "canary", "OPS_ADDR": ":9090", "SMTP_ADDR": "canary",
	}
	_, err := read(env)
	if err == nil {
		t.Fatal("everything is wrong, and no error")
	}
	for name := range env {
		if name == "REDIS_PASSWORD" || name == "DB_PORT" { // a password is never wrong; DATABASE_URL stands for the parts
			continue
		}
		if !strings.Contains(err.Error(), name) {
			t.Errorf("the error does not name %s:\n%v", name, err)
		}
	}
	if strings.Contains(err.Error(), "canary") {
		t.Errorf("the error shows a secret:\n%v", err)
	}
	for _, env := range []map[string]string{
		{"DB_PORT": "0"}, {"DB_PORT": "-1"}, {"PORT": ""}, {"PORT": "-1"}, {"PORT": "http"}, {"REDIS_ADDR": "a:1,"}, {"REDIS_ADDR": ":6379"},
		{"REDIS_ADDR": "a:0"}, {"IDEMPOTENCY_RETENTION": "-1h"}, {"IDEMPOTENCY_RETENTION": "59s"},
	} {
		_, err := read(env)
		for name, value := range env {
			if value == "" && err != nil || value != "" && (err == nil || !strings.Contains(err.Error(), name)) {
				t.Errorf("%s=%q: %v", name, value, err)
			}
		}
	}
}

func TestTheLogShowsNoSecret(t *testing.T) {
	for _, env := range []map[string]string{
		{"DB_PASSWORD": "canary", "REDIS_PASSWORD": "canary"}, {"DATABASE_URL": "postgres://u:canary@db/n"},
		{"DATABASE_URL": "host=db user=u password=canary dbname=n"},
	} {
		c, err := read(env)
		if err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		slog.New(slog.NewTextHandler(&out, nil)).Info("Starting", "config", c)
		if strings.Contains(out.String(), "canary") {
			t.Errorf("the log shows the password: %s", &out)
		}
		if !strings.Contains(out.String(), fmt.Sprintf("port=%d", c.Port)) {
			t.Errorf("the log does not show the configuration: %s", &out)
		}
	}
}
